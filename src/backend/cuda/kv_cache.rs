//! Keys and values on the device: pages as `kernels/pages.cuh` has them, sixteen in an allocation.

use super::device::{Address, Buffer, Device, DeviceError};
use super::rope_append::layer_len;
use super::step_memory::StepMemory;
use crate::backend::{KvShape, PageId};
use half::bf16;
use std::sync::Arc;

/// Pages of a slab.
const SLAB_PAGES: usize = 16;

pub struct KvCache {
    device: Arc<dyn Device>,
    shape: KvShape,
    /// Slabs come into being when a page of theirs is first used, and stay.
    slabs: Vec<Buffer<bf16>>,
    memory: StepMemory,
}

impl KvCache {
    pub fn new(device: &Arc<dyn Device>, shape: KvShape) -> KvCache {
        KvCache {
            device: Arc::clone(device),
            shape,
            slabs: Vec::new(),
            memory: StepMemory::default(),
        }
    }

    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Of the steps that work on this cache.
    pub fn memory(&mut self) -> &mut StepMemory {
        &mut self.memory
    }

    /// Numbers of a page.
    fn page_len(shape: KvShape) -> usize {
        shape.layers * layer_len(shape)
    }

    /// Bytes of a page.
    pub fn page_bytes(shape: KvShape) -> usize {
        Self::page_len(shape) * size_of::<bf16>()
    }

    /// Bytes of all pages so far.
    pub fn bytes(&self) -> usize {
        self.slabs.len() * SLAB_PAGES * Self::page_bytes(self.shape)
    }

    /// The address of a page, which comes into being if need be.
    pub fn reserve(&mut self, page: PageId) -> Result<Address, DeviceError> {
        let len = Self::page_len(self.shape);
        let (slab, place) = (page as usize / SLAB_PAGES, page as usize % SLAB_PAGES);
        while self.slabs.len() <= slab {
            let mut fresh = Buffer::new(&self.device, SLAB_PAGES * len, "the KV cache")?;
            // Attention may multiply a place that was never written by a weight of zero.
            fresh.zero()?;
            self.slabs.push(fresh);
        }
        Ok(self.slabs[slab].at(place * len))
    }

    /// Makes page `to` a copy of page `from`.
    pub fn copy(&mut self, from: PageId, to: PageId) -> Result<(), DeviceError> {
        let (from, to) = (self.reserve(from)?, self.reserve(to)?);
        self.device.copy(from, to, Self::page_bytes(self.shape))
    }
}
