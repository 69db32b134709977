//! A block of keys and values: where a head's part of its pages lies, and what memory is asked for while
//! queries attend to it. Both are the same for every tile of queries, and worked out once.

use super::ahead::LINE;
use super::kv_cache::KvCache;
use super::simd::Simd;
use crate::backend::{PAGE_LEN, PageId};
use std::ops::Range;

/// Keys between two updates of the running maximum.
pub(super) const BLOCK: usize = 64;
/// Pages of a block.
pub(super) const PAGES: usize = BLOCK / PAGE_LEN;

/// Keys and values of one head of a layer.
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    pub kv: &'a KvCache,
    pub layer: usize,
    pub kv_head: usize,
}

/// The pages of the block of keys that begins there, as many as there are.
pub(super) fn block_pages(pages: &[PageId], first_key: usize) -> &[PageId] {
    let pages = &pages[first_key / PAGE_LEN..];
    &pages[..pages.len().min(PAGES)]
}

/// Where the pages of a block lie.
#[derive(Clone, Copy)]
struct Places {
    starts: [*const u32; PAGES],
    count: usize,
}

impl Head<'_> {
    fn places(self, pages: &[PageId]) -> Places {
        let mut starts = [std::ptr::null(); PAGES];
        for (start, &page) in starts.iter_mut().zip(pages) {
            *start = self.kv.keys(page, self.layer, self.kv_head);
        }
        Places {
            starts,
            count: pages.len(),
        }
    }
}

pub(super) struct Block {
    /// The keys that it holds, counted from the first of their pages' sequence.
    pub range: Range<usize>,
    keys: Places,
    values: [*const u32; PAGES],
    ahead: NextBlock,
}

impl Block {
    /// The keys `range`, at most [`BLOCK`], of `pages`, for so many tiles of queries, which ask for the
    /// block `next` on the way.
    pub fn new(
        head: Head,
        pages: &[PageId],
        range: Range<usize>,
        next: &[PageId],
        tiles: usize,
    ) -> Block {
        let pages = &pages[range.start / PAGE_LEN..range.end.div_ceil(PAGE_LEN)];
        let (keys, next) = (head.places(pages), head.places(next));
        let page_lines = head.kv.head_words() * 4 / LINE;
        let times = tiles * (pages.len().div_ceil(2) + 1);
        Block {
            range,
            keys,
            values: (keys.starts).map(|start| start.wrapping_add(head.kv.key_words())),
            ahead: NextBlock {
                next,
                page_lines,
                page: 0,
                line: 0,
                at_a_time: (next.count * page_lines).div_ceil(times),
            },
        }
    }

    /// Where the keys of its pages lie, and their values; and what is to be asked for.
    pub fn parts(&mut self) -> (&[*const u32], &[*const u32], &mut NextBlock) {
        let count = self.keys.count;
        let (keys, values) = (&self.keys.starts[..count], &self.values[..count]);
        (keys, values, &mut self.ahead)
    }
}

/// What is asked for: the keys and values of a head, which lie side by side in a page.
pub(super) struct NextBlock {
    next: Places,
    page_lines: usize,
    /// Asked for next.
    page: usize,
    line: usize,
    /// Lines each time: twice a tile and block of four pages, and once more.
    at_a_time: usize,
}

impl NextBlock {
    /// Asks for a part of it. For a few queries the time is all in waiting for memory.
    ///
    /// # Safety
    /// As [`Simd`].
    #[inline(always)]
    pub unsafe fn ask<S: Simd>(&mut self) {
        for _ in 0..self.at_a_time {
            if self.page == self.next.count {
                return;
            }
            let line = self.next.starts[self.page].wrapping_add(self.line * LINE / 4);
            unsafe { S::prefetch_far(line.cast()) };
            self.line += 1;
            if self.line == self.page_lines {
                (self.page, self.line) = (self.page + 1, 0);
            }
        }
    }
}
