//! A run of tokens in the KV cache and the pages that it owns.

use super::pages::{OutOfPages, Page, PagePool};
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

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn page_ids(&self) -> Vec<PageId> {
        self.pages
            .iter()
            .map(|page| page.index() as PageId)
            .collect()
    }

    /// Begins with pages that are full of tokens already.
    pub fn adopt(&mut self, full_pages: Vec<Page>) {
        self.len = full_pages.len() * PAGE_LEN;
        self.pages = full_pages;
    }

    /// Pages held.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    pub(super) fn pages_mut(&mut self) -> &mut [Page] {
        &mut self.pages
    }

    /// Pages that `rows` more tokens take beside those held.
    pub fn missing_pages(&self, rows: usize) -> usize {
        (self.len + rows)
            .div_ceil(PAGE_LEN)
            .saturating_sub(self.pages.len())
    }

    /// Takes pages for `rows` more tokens, and gives the segment that writes them.
    pub fn extend(&mut self, pool: &mut PagePool, rows: usize) -> Result<Segment, OutOfPages> {
        self.pages
            .extend(pool.allocate_many(self.missing_pages(rows))?);
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
    ) -> Result<(Sequence, Option<(PageId, PageId)>), OutOfPages> {
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
                    return Err(full);
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
