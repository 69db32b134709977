//! Memory that the launches of one step after another find at the same place: what a step is sent, in
//! one copy, and what its kernels leave there.

use super::device::{Address, Buffer, Device, DeviceError, Plain, Slice, bytes_of};
use super::graphs::Graphs;
use super::sample::DrawMemory;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Tells recordings made before some memory moved from those made since.
#[derive(Debug, Default)]
pub struct Layout(AtomicU64);

impl Layout {
    pub fn moved(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub fn version(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A buffer that grows, to whole powers of two. Its contents do not outlast that.
pub struct Growing<T>(Option<Buffer<T>>);

impl<T> Default for Growing<T> {
    fn default() -> Growing<T> {
        Growing(None)
    }
}

impl<T: Plain> Growing<T> {
    pub fn at_least(
        &mut self,
        device: &Arc<dyn Device>,
        layout: &Layout,
        len: usize,
        what: &str,
    ) -> Result<&mut Buffer<T>, DeviceError> {
        if self.0.as_ref().is_none_or(|buffer| buffer.len() < len) {
            // What has room already is given back first.
            self.0 = None;
            layout.moved();
            self.0 = Some(Buffer::new(device, len.next_power_of_two(), what)?);
        }
        // Made above, where there was none.
        Ok(self.0.as_mut().expect("memory that has grown"))
    }
}

/// Arrays on their way to the device, side by side.
#[derive(Default)]
pub struct Packer(Vec<u8>);

/// Where an array lies among them.
#[derive(Clone, Copy, Debug)]
pub struct Section<T> {
    offset: usize,
    len: usize,
    element: PhantomData<T>,
}

/// What vectors of the kernels are aligned to.
const ALIGNMENT: usize = 16;

impl Packer {
    /// Appends `capacity` elements: these, and `filler` behind them.
    pub fn push<T: Plain>(&mut self, values: &[T], capacity: usize, filler: T) -> Section<T> {
        let offset = self.0.len().next_multiple_of(ALIGNMENT);
        self.0.resize(offset, 0);
        self.0.extend_from_slice(bytes_of(values));
        for _ in values.len()..capacity {
            self.0.extend_from_slice(bytes_of(&[filler]));
        }
        Section {
            offset,
            len: capacity.max(values.len()),
            element: PhantomData,
        }
    }

    /// How many elements into all that is packed the next array of this type begins.
    pub fn next_index<T: Plain>(&self) -> usize {
        self.0.len().div_ceil(size_of::<T>())
    }

    /// Appends an array that is found by its index, counted from the start of all that is packed: it
    /// may lie anywhere, so it goes behind those that must be found at the same place again.
    ///
    /// # Panics
    /// If something lies there.
    pub fn push_indexed<T: Plain>(&mut self, first: usize, values: &[T]) {
        assert!(first >= self.next_index::<T>(), "there is something");
        self.0.resize(first * size_of::<T>(), 0);
        self.0.extend_from_slice(bytes_of(values));
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl<T> Section<T> {
    pub fn at(&self, base: Address) -> Slice<T> {
        Slice::at(base + self.offset as u64, self.len)
    }
}

/// Memory of the steps of one KV cache.
#[derive(Default)]
pub struct StepMemory {
    sent: Growing<u8>,
    statistics: Growing<f32>,
    totals: Growing<f32>,
    pub draws: DrawMemory,
    pub graphs: Arc<Mutex<Graphs>>,
}

impl StepMemory {
    /// Sends what is packed; says where it begins.
    pub fn send(
        &mut self,
        device: &Arc<dyn Device>,
        layout: &Layout,
        packed: &Packer,
    ) -> Result<Address, DeviceError> {
        let bytes = packed.bytes();
        let what = "what a step is sent";
        let sent = self
            .sent
            .at_least(device, layout, bytes.len().max(1 << 14), what)?;
        sent.write(0, bytes)?;
        Ok(sent.address())
    }

    /// Places for parts of attention: two statistics a query, and its totals.
    pub fn parts(
        &mut self,
        device: &Arc<dyn Device>,
        layout: &Layout,
        (queries, head_dim): (usize, usize),
    ) -> Result<(Slice<f32>, Slice<f32>), DeviceError> {
        let what = "parts of attention";
        let statistics = self
            .statistics
            .at_least(device, layout, 2 * queries, what)?;
        let totals = self
            .totals
            .at_least(device, layout, queries * head_dim, what)?;
        Ok((statistics.slice(), totals.slice()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::device;
    use super::*;

    #[test]
    fn arrays_are_found_where_their_section_or_index_says() {
        let device = device();
        let mut packer = Packer::default();
        let a = packer.push(&[1u32, 2, 3], 5, 9);
        let b = packer.push(&[7u64], 1, 0);
        let first = packer.next_index::<u64>();
        packer.push_indexed(first, &[11u64, 12]);
        let third = packer.next_index::<[u32; 3]>();
        packer.push_indexed(third, &[[1u32, 2, 3], [4, 5, 6]]);
        let (mut memory, layout) = (StepMemory::default(), Layout::default());
        let base = memory.send(&device, &layout, &packer).unwrap();
        assert_eq!(a.at(base).read(&*device, 5).unwrap(), [1, 2, 3, 9, 9]);
        assert_eq!(b.at(base).read(&*device, 1).unwrap(), [7]);
        let all = Slice::<u64>::at(base, first + 2);
        assert_eq!(all.read(&*device, first + 2).unwrap()[first..], [11, 12]);
        let all = Slice::<[u32; 3]>::at(base, third + 2);
        let all = all.read(&*device, third + 2).unwrap();
        assert_eq!(all[third..], [[1, 2, 3], [4, 5, 6]]);
        assert_eq!(a.at(base).len() * 4 % 16, 4, "padding is between sections");
    }

    #[test]
    fn memory_moves_only_when_it_grows() {
        let device = device();
        let (mut memory, layout) = (Growing::<u32>::default(), Layout::default());
        let mut address = |len| {
            let buffer = memory.at_least(&device, &layout, len, "test").unwrap();
            (buffer.address(), layout.version())
        };
        let first = address(5);
        assert_eq!(address(8), first);
        let second = address(9);
        assert!(second.0 != first.0 && second.1 > first.1);
        assert_eq!(address(3), second);
    }
}
