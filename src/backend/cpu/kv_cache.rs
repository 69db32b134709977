//! Keys and values in pages of sixteen tokens, laid out as the attention's register tiles read them.
//!
//! A page holds, for every layer and kv head, in float32, keys as `[head_dim][16 tokens]` (a vector is one
//! coordinate of sixteen keys) and values as `[head_dim / 16][16 tokens][16]` (a vector is sixteen
//! coordinates of one value).
//!
//! As whole numbers of sixteen bits ([`Form::Halves`]) two of them are a word, a coordinate is
//! `scale · code` with code in -16383..=16383, and scales are float32:
//!
//! ```text
//! keys    of every 64 coordinates   scales [16 tokens], then [pairs of coordinates][16 tokens]
//! values                            scales [16 tokens], then [head_dim / 16][8 pairs of tokens][16]
//! ```
//!
//! A key has a scale for each 64 coordinates, a value one. Eight pages are a slab, in which what a head has of one
//! page lies beside what it has of the next: a prefix is read as long runs, not in pieces that the
//! processor would have to be told of.

use super::halves::{GREATEST, SPAN, SPAN_STEPS, VECTORS, magnitudes, put_whole};
use super::rows::Aligned;
use super::simd::{Isa, Kernel, LANES, Simd};
use crate::backend::{BackendError, KvShape, PAGE_LEN, PageId};

const _: () = assert!(PAGE_LEN == LANES, "a page is one vector of keys wide");

/// What keys and values are kept as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Float,
    Halves,
}

pub struct KvCache {
    shape: KvShape,
    form: Form,
    /// Slabs come into being when a page of theirs is first used, and stay.
    slabs: Vec<Aligned>,
}

/// Pages of a slab: enough for long runs; what the last slab has too many is memory for nothing.
const SLAB_PAGES: usize = 8;

impl KvCache {
    pub fn new(shape: KvShape, form: Form) -> KvCache {
        KvCache {
            shape,
            form,
            slabs: Vec::new(),
        }
    }

    pub fn shape(&self) -> KvShape {
        self.shape
    }

    pub(super) fn form(&self) -> Form {
        self.form
    }

    /// Bytes of a page.
    pub fn page_bytes(shape: KvShape, form: Form) -> usize {
        shape.layers * shape.kv_heads * head_words(shape, form) * 4
    }

    /// Makes sure that a page exists.
    pub fn reserve(&mut self, page: PageId) -> Result<(), BackendError> {
        while self.slabs.len() <= page as usize / SLAB_PAGES {
            // Zeroed, for attention may multiply a place that was never written by a weight of zero.
            let bytes = SLAB_PAGES * Self::page_bytes(self.shape, self.form);
            self.slabs.push(Aligned::kept(bytes));
        }
        Ok(())
    }

    /// Makes page `to` a copy of page `from`.
    pub fn copy(&mut self, from: PageId, to: PageId) {
        let words = head_words(self.shape, self.form);
        for layer in 0..self.shape.layers {
            for kv_head in 0..self.shape.kv_heads {
                let places = [from, to].map(|page| self.place(page, layer, kv_head));
                let [(from, start), (to, target)] = places;
                if from == to {
                    let slab = self.slabs[from].as_f32_mut();
                    slab.copy_within(start..start + words, target);
                } else {
                    let slabs = self.slabs.get_disjoint_mut([from, to]);
                    // Both exist: `from` was written, `to` was reserved.
                    let [from, to] = slabs.expect("two different slabs of the cache");
                    to.as_f32_mut()[target..target + words]
                        .copy_from_slice(&from.as_f32()[start..start + words]);
                }
            }
        }
    }

    /// A head's keys of a page; its values follow.
    #[inline]
    pub(super) fn keys(&self, page: PageId, layer: usize, kv_head: usize) -> *const u32 {
        let (slab, start) = self.place(page, layer, kv_head);
        self.slabs[slab].as_f32()[start..].as_ptr().cast()
    }

    /// Words that a head's keys take of a page.
    pub(super) fn key_words(&self) -> usize {
        key_words(self.shape.head_dim, self.form)
    }

    /// Words that keys and values of a head take of a page.
    pub(super) fn head_words(&self) -> usize {
        head_words(self.shape, self.form)
    }

    fn place(&self, page: PageId, layer: usize, kv_head: usize) -> (usize, usize) {
        place(self.shape, self.form, page, layer, kv_head)
    }

    /// For the threads of one operation, which append different tokens.
    pub(super) fn shared(&mut self) -> SharedKv<'_> {
        let slabs = self
            .slabs
            .iter_mut()
            .map(|slab| slab.as_mut_ptr().cast())
            .collect();
        SharedKv {
            slabs,
            shape: self.shape,
            form: self.form,
            borrow: std::marker::PhantomData,
        }
    }
}

/// The cache while several threads append to it.
pub(super) struct SharedKv<'a> {
    slabs: Vec<*mut u32>,
    shape: KvShape,
    form: Form,
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
        isa: Isa,
        (page, slot): (PageId, usize),
        layer: usize,
        kv_head: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let head_dim = self.shape.head_dim;
        assert!(slot < PAGE_LEN && key.len() == head_dim && value.len() == head_dim);
        let (slab, start) = place(self.shape, self.form, page, layer, kv_head);
        // SAFETY: `place` checks layer and head; within a head's part the indices below stay under
        // `head_words`.
        unsafe {
            let keys = self.slabs[slab].add(start);
            let values = keys.add(key_words(head_dim, self.form));
            match self.form {
                Form::Float => {
                    let (keys, values) = (keys.cast::<f32>(), values.cast::<f32>());
                    for (d, (key, value)) in key.iter().zip(value).enumerate() {
                        *keys.add(d * PAGE_LEN + slot) = *key;
                        *values.add((d / LANES * PAGE_LEN + slot) * LANES + d % LANES) = *value;
                    }
                }
                Form::Halves => isa.dispatch(AppendHalves {
                    key,
                    value,
                    keys,
                    values,
                    slot,
                }),
            }
        }
    }
}

/// Rounds a key and a value and puts them into their slot of a page.
struct AppendHalves<'a> {
    key: &'a [f32],
    value: &'a [f32],
    keys: *mut u32,
    values: *mut u32,
    slot: usize,
}

impl Kernel for AppendHalves<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let slot = self.slot;
        // SAFETY: the parts of a page are as large as `key_words` and `value_words` say.
        unsafe {
            let mut words = [0u32; SPAN_STEPS];
            let mut block = self.keys;
            for key in self.key.chunks(SPAN) {
                let x = vectors::<S>(key);
                let scale = code_scale(magnitudes::<S, VECTORS>(x));
                put_whole::<S, VECTORS>(x, scale, words.as_mut_ptr());
                *block.add(slot).cast() = scale;
                let steps = key_steps(key.len());
                for (step, word) in words[..steps].iter().enumerate() {
                    *block.add((1 + step) * PAGE_LEN + slot) = *word;
                }
                block = block.add((1 + steps) * PAGE_LEN);
            }

            let mut most = (0.0f32, 0.0f32);
            for value in self.value.chunks(SPAN) {
                let (greatest, sum) = magnitudes::<S, VECTORS>(vectors::<S>(value));
                most = (most.0.max(greatest), most.1 + sum);
            }
            let scale = code_scale(most);
            *self.values.add(slot).cast() = scale;
            // Halves of words, one for each token of a pair.
            let values = self.values.add(PAGE_LEN).cast::<u16>();
            for (span, value) in self.value.chunks(SPAN).enumerate() {
                put_whole::<S, VECTORS>(vectors::<S>(value), scale, words.as_mut_ptr());
                let codes = words.as_ptr().cast::<u16>();
                for d in 0..value.len() {
                    let at = span * SPAN + d;
                    let word = (at / LANES * (PAGE_LEN / 2) + slot / 2) * LANES + at % LANES;
                    *values.add(word * 2 + slot % 2) = *codes.add(d);
                }
            }
        }
    }
}

/// At most a span of numbers, and zeros.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(super) unsafe fn vectors<S: Simd>(numbers: &[f32]) -> [S::V; VECTORS] {
    let mut padded = [0.0f32; SPAN];
    padded[..numbers.len()].copy_from_slice(numbers);
    let mut vectors = [unsafe { S::splat(0.0) }; VECTORS];
    for (vector, numbers) in vectors.iter_mut().zip(padded.chunks_exact(LANES)) {
        *vector = unsafe { S::load(numbers.as_ptr()) };
    }
    vectors
}

/// The scale of codes with this greatest magnitude and this sum of magnitudes, which is not a number if
/// one of them is not.
fn code_scale((greatest, sum): (f32, f32)) -> f32 {
    if sum.is_nan() {
        sum
    } else {
        greatest / GREATEST
    }
}

/// Pairs of so many coordinates of a key, at most a span: whole fours.
pub(super) fn key_steps(coordinates: usize) -> usize {
    coordinates.div_ceil(2).next_multiple_of(4)
}

/// The pairs of each span of a key.
pub(super) fn key_spans(head_dim: usize) -> impl Iterator<Item = usize> {
    (0..head_dim)
        .step_by(SPAN)
        .map(move |first| key_steps(SPAN.min(head_dim - first)))
}

/// Words of one key, or of a query that is multiplied with it: its pairs and its scales.
pub(super) fn key_halves(head_dim: usize) -> usize {
    key_spans(head_dim).map(|steps| steps + 1).sum()
}

/// Words that a head's keys of a page take.
fn key_words(head_dim: usize, form: Form) -> usize {
    let vectors = match form {
        Form::Float => head_dim,
        Form::Halves => key_halves(head_dim),
    };
    vectors * PAGE_LEN
}

/// Words that a head's values of a page take.
fn value_words(head_dim: usize, form: Form) -> usize {
    let panels = head_dim.div_ceil(LANES);
    let vectors = match form {
        Form::Float => panels * PAGE_LEN,
        Form::Halves => 1 + panels * PAGE_LEN / 2,
    };
    vectors * LANES
}

/// Words that a head has of a page in one layer.
fn head_words(shape: KvShape, form: Form) -> usize {
    key_words(shape.head_dim, form) + value_words(shape.head_dim, form)
}

/// Where a head's part of a page begins: the slab, and the word within it.
fn place(shape: KvShape, form: Form, page: PageId, layer: usize, kv_head: usize) -> (usize, usize) {
    assert!(layer < shape.layers && kv_head < shape.kv_heads);
    let (slab, page) = (page as usize / SLAB_PAGES, page as usize % SLAB_PAGES);
    let run = (layer * shape.kv_heads + kv_head) * SLAB_PAGES + page;
    (slab, run * head_words(shape, form))
}
