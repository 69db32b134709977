//! Keys and values in pages of sixteen tokens, laid out as the attention's register tile reads them.
//!
//! A page holds, for every layer and kv head, keys as `[head_dim][16 tokens]` (a vector is one
//! coordinate of sixteen keys) and values as `[head_dim / 16][16 tokens][16]` (a vector is sixteen
//! coordinates of one value), in float32.

use super::rows::Aligned;
use super::simd::LANES;
use crate::backend::{BackendError, KvShape, PAGE_LEN, PageId};

const _: () = assert!(PAGE_LEN == LANES, "a page is one vector of keys wide");

pub struct KvCache {
    shape: KvShape,
    /// Pages come into being when they are first used, and stay.
    pages: Vec<Aligned>,
}

impl KvCache {
    pub fn new(shape: KvShape) -> KvCache {
        KvCache {
            shape,
            pages: Vec::new(),
        }
    }

    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Bytes of a page.
    pub fn page_bytes(shape: KvShape) -> usize {
        let padded = shape.head_dim.next_multiple_of(LANES);
        shape.layers * shape.kv_heads * (shape.head_dim + padded) * PAGE_LEN * 4
    }

    /// Makes sure that a page exists.
    pub fn reserve(&mut self, page: PageId) -> Result<(), BackendError> {
        while self.pages.len() <= page as usize {
            // Zeroed, for attention may multiply a place that was never written by a weight of zero.
            self.pages
                .push(Aligned::zeroed(Self::page_bytes(self.shape)));
        }
        Ok(())
    }

    /// Makes page `to` a copy of page `from`.
    pub fn copy(&mut self, from: PageId, to: PageId) {
        if from != to {
            let pages = self.pages.get_disjoint_mut([from as usize, to as usize]);
            // Both exist: `from` was written, `to` was reserved.
            let [from, to] = pages.expect("two different pages of the cache");
            to.as_f32_mut().copy_from_slice(from.as_f32());
        }
    }

    /// The keys of a page; its values follow.
    pub(super) fn keys(&self, page: PageId, layer: usize, kv_head: usize) -> *const f32 {
        self.pages[page as usize].as_f32()[offset(self.shape, layer, kv_head)..].as_ptr()
    }

    /// The values of a page.
    pub(super) fn values(&self, page: PageId, layer: usize, kv_head: usize) -> *const f32 {
        let keys = self.shape.head_dim * PAGE_LEN;
        self.pages[page as usize].as_f32()[offset(self.shape, layer, kv_head) + keys..].as_ptr()
    }

    /// For the threads of one operation, which append different tokens.
    pub(super) fn shared(&mut self) -> SharedKv<'_> {
        let pages = self
            .pages
            .iter_mut()
            .map(|page| page.as_f32_mut().as_mut_ptr())
            .collect();
        SharedKv {
            pages,
            shape: self.shape,
            borrow: std::marker::PhantomData,
        }
    }
}

/// The cache while several threads append to it.
pub(super) struct SharedKv<'a> {
    pages: Vec<*mut f32>,
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
        let offset = offset(self.shape, layer, kv_head);
        // SAFETY: `offset` checks layer and head; within a head's part the indices below stay under
        // (head_dim + padded head_dim) × 16.
        unsafe {
            let keys = self.pages[page as usize].add(offset);
            let values = keys.add(head_dim * PAGE_LEN);
            for (d, (key, value)) in key.iter().zip(value).enumerate() {
                *keys.add(d * PAGE_LEN + slot) = *key;
                *values.add((d / LANES * PAGE_LEN + slot) * LANES + d % LANES) = *value;
            }
        }
    }
}

/// Where a head's keys begin in a page, in numbers.
fn offset(shape: KvShape, layer: usize, kv_head: usize) -> usize {
    assert!(layer < shape.layers && kv_head < shape.kv_heads);
    let padded = shape.head_dim.next_multiple_of(LANES);
    (layer * shape.kv_heads + kv_head) * (shape.head_dim + padded) * PAGE_LEN
}
