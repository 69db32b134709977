//! A run of tokens in the KV cache and the pages that it owns.

use super::error::EngineError;
use super::pages::{Page, PagePool};
use crate::backend::{PAGE_LEN, PageId, Segment};

/// Tokens whose keys and values lie in pages of their own: a prompt, or a candidate's answer.
#[derive(Default)]
pub struct Sequence {
    pages: Vec<Page>,
    len: usize,
}

impl Sequence {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn page_ids(&self) -> Vec<PageId> {
        self.pages
            .iter()
            .map(|page| page.index() as PageId)
            .collect()
    }

    /// Takes pages for `rows` more tokens, and gives the segment that writes them.
    pub fn extend(&mut self, pool: &mut PagePool, rows: usize) -> Result<Segment, EngineError> {
        let missing = (self.len + rows).div_ceil(PAGE_LEN) - self.pages.len();
        self.pages.extend(pool.allocate_many(missing)?);
        let start = self.len;
        self.len += rows;
        Ok(Segment {
            pages: self.page_ids(),
            start,
            rows,
        })
    }

    /// The segment that computes the token at `index` once more: it sees what lies before it, and
    /// writes the same keys and values again.
    pub fn again(&self, index: usize) -> Segment {
        Segment {
            pages: self.page_ids(),
            start: index,
            rows: 1,
        }
    }

    /// A second sequence with the same tokens. Full pages are shared; a part-full last page gets a
    /// twin, into which the caller copies its contents: `(from, to)`.
    pub fn fork(
        &self,
        pool: &mut PagePool,
    ) -> Result<(Sequence, Option<(PageId, PageId)>), EngineError> {
        let full = self.len / PAGE_LEN;
        let mut pages: Vec<Page> = self.pages[..full]
            .iter()
            .map(|page| pool.share(page))
            .collect();
        let mut copied = None;
        if let Some(partial) = self.pages.get(full) {
            let twin = match pool.allocate() {
                Ok(twin) => twin,
                Err(full) => {
                    pages.into_iter().for_each(|page| {
                        pool.release(page);
                    });
                    return Err(full.into());
                }
            };
            copied = Some((partial.index() as PageId, twin.index() as PageId));
            pages.push(twin);
        }
        Ok((
            Sequence {
                pages,
                len: self.len,
            },
            copied,
        ))
    }

    /// Gives the pages back.
    pub fn release(&mut self, pool: &mut PagePool) {
        self.pages.drain(..).for_each(|page| {
            pool.release(page);
        });
        self.len = 0;
    }
}
