//! Keys and values in pages of sixteen tokens, laid out as the attention's register tile reads them.
//!
//! A page holds, for every layer and kv head, keys as `[head_dim][16 tokens]` (a vector is one
//! coordinate of sixteen keys) and values as `[head_dim / 16][16 tokens][16]` (a vector is sixteen
//! coordinates of one value), in float32. Eight pages are a slab, in which what a head has of one
//! page lies beside what it has of the next: a prefix is read as long runs, not in pieces that the
//! processor would have to be told of.

use super::rows::Aligned;
use super::simd::LANES;
use crate::backend::{BackendError, KvShape, PAGE_LEN, PageId};

const _: () = assert!(PAGE_LEN == LANES, "a page is one vector of keys wide");

pub struct KvCache {
    shape: KvShape,
    /// Slabs come into being when a page of theirs is first used, and stay.
    slabs: Vec<Aligned>,
}

/// Pages of a slab: enough for long runs; what the last slab has too many is memory for nothing.
const SLAB_PAGES: usize = 8;

impl KvCache {
    pub fn new(shape: KvShape) -> KvCache {
        KvCache {
            shape,
            slabs: Vec::new(),
        }
    }

    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Bytes of a page.
    pub fn page_bytes(shape: KvShape) -> usize {
        shape.layers * shape.kv_heads * head_numbers(shape) * 4
    }

    /// Makes sure that a page exists.
    pub fn reserve(&mut self, page: PageId) -> Result<(), BackendError> {
        while self.slabs.len() <= page as usize / SLAB_PAGES {
            // Zeroed, for attention may multiply a place that was never written by a weight of zero.
            let bytes = SLAB_PAGES * Self::page_bytes(self.shape);
            self.slabs.push(Aligned::kept(bytes));
        }
        Ok(())
    }

    /// Makes page `to` a copy of page `from`.
    pub fn copy(&mut self, from: PageId, to: PageId) {
        let numbers = head_numbers(self.shape);
        for layer in 0..self.shape.layers {
            for kv_head in 0..self.shape.kv_heads {
                let places = [from, to].map(|page| place(self.shape, page, layer, kv_head));
                let [(from, start), (to, target)] = places;
                if from == to {
                    let slab = self.slabs[from].as_f32_mut();
                    slab.copy_within(start..start + numbers, target);
                } else {
                    let slabs = self.slabs.get_disjoint_mut([from, to]);
                    // Both exist: `from` was written, `to` was reserved.
                    let [from, to] = slabs.expect("two different slabs of the cache");
                    to.as_f32_mut()[target..target + numbers]
                        .copy_from_slice(&from.as_f32()[start..start + numbers]);
                }
            }
        }
    }

    /// The keys of a page; its values follow.
    pub(super) fn keys(&self, page: PageId, layer: usize, kv_head: usize) -> *const f32 {
        let (slab, start) = place(self.shape, page, layer, kv_head);
        self.slabs[slab].as_f32()[start..].as_ptr()
    }

    /// The values of a page.
    pub(super) fn values(&self, page: PageId, layer: usize, kv_head: usize) -> *const f32 {
        let (slab, start) = place(self.shape, page, layer, kv_head);
        self.slabs[slab].as_f32()[start + self.shape.head_dim * PAGE_LEN..].as_ptr()
    }

    /// For the threads of one operation, which append different tokens.
    pub(super) fn shared(&mut self) -> SharedKv<'_> {
        let slabs = self
            .slabs
            .iter_mut()
            .map(|slab| slab.as_f32_mut().as_mut_ptr())
            .collect();
        SharedKv {
            slabs,
            shape: self.shape,
            borrow: std::marker::PhantomData,
        }
    }
}

/// The cache while several threads append to it.
pub(super) struct SharedKv<'a> {
    slabs: Vec<*mut f32>,
    shape: KvShape,
    borrow: std::marker::PhantomData<&'a mut KvCache>,
}

// SAFETY: `append` is the only access, and its callers keep to different tokens.
unsafe impl Send for SharedKv<'_> {}
unsafe impl Sync for SharedKv<'_> {}

impl SharedKv<'_> {
    /// Stores one token's key and value of a head.
    ///
    /// # Safety
    /// No two threads may append to the same page and slot.
    pub unsafe fn append(
        &self,
        (page, slot): (PageId, usize),
        layer: usize,
        kv_head: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let head_dim = self.shape.head_dim;
        assert!(slot < PAGE_LEN && key.len() == head_dim && value.len() == head_dim);
        let (slab, start) = place(self.shape, page, layer, kv_head);
        // SAFETY: `place` checks layer and head; within a head's part the indices below stay under
        // (head_dim + padded head_dim) × 16.
        unsafe {
            let keys = self.slabs[slab].add(start);
            let values = keys.add(head_dim * PAGE_LEN);
            for (d, (key, value)) in key.iter().zip(value).enumerate() {
                *keys.add(d * PAGE_LEN + slot) = *key;
                *values.add((d / LANES * PAGE_LEN + slot) * LANES + d % LANES) = *value;
            }
        }
    }
}

/// Numbers that a head has of a page in one layer.
fn head_numbers(shape: KvShape) -> usize {
    (shape.head_dim + shape.head_dim.next_multiple_of(LANES)) * PAGE_LEN
}

/// Where a head's part of a page begins: the slab, and the number within it.
fn place(shape: KvShape, page: PageId, layer: usize, kv_head: usize) -> (usize, usize) {
    assert!(layer < shape.layers && kv_head < shape.kv_heads);
    let (slab, page) = (page as usize / SLAB_PAGES, page as usize % SLAB_PAGES);
    let run = (layer * shape.kv_heads + kv_head) * SLAB_PAGES + page;
    (slab, run * head_numbers(shape))
}
