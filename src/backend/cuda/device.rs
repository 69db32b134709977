//! What the kernels' launcher needs of a device: memory, launches by name with an array of arguments,
//! and recordings of them. A GPU ([`super::gpu::Gpu`]) and its emulation
//! ([`super::emulated::Emulated`]) take the same.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

/// Why a device did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    #[error(
        "no CUDA driver on this machine (libcuda was not found); use --device cpu, or --device emulate to run the kernels without a GPU"
    )]
    NoDriver,
    #[error("{0} is no device: give cuda, cuda:INDEX or emulate")]
    NoSuchName(String),
    #[error("there is no CUDA device {ordinal}: this machine has {count}")]
    NoSuchDevice { ordinal: usize, count: usize },
    #[error(
        "{device} has compute capability {capability}, for which this build has no kernels ({built})"
    )]
    NoImage {
        device: String,
        capability: String,
        built: String,
    },
    #[error("out of device memory for {what}: {} needed, {} free", Size(*.needed), Size(*.free))]
    OutOfMemory {
        what: String,
        needed: usize,
        free: usize,
    },
    #[error("there is no kernel {0}")]
    NoKernel(String),
    #[error(
        "kernel {kernel} cannot be launched with {threads} threads and {shared_bytes} bytes of shared memory a block"
    )]
    Launch {
        kernel: String,
        threads: usize,
        shared_bytes: usize,
    },
    /// The emulation found a fault, or the driver lost the device.
    #[error("a kernel failed: {0}")]
    Fault(String),
    #[error("a copy of {bytes} bytes goes beyond its memory on the device")]
    Copy { bytes: usize },
    /// A recording holds launches and copies on the device, nothing else.
    #[error("recording launches: {0}")]
    Recording(&'static str),
    #[error("CUDA driver: {0}")]
    Driver(String),
}

impl DeviceError {
    /// Whether the device does nothing more from now on.
    pub fn is_final(&self) -> bool {
        matches!(
            self,
            DeviceError::Fault(_)
                | DeviceError::Driver(_)
                | DeviceError::Launch { .. }
                | DeviceError::Recording(_)
        )
    }
}

/// Bytes, for people.
pub struct Size(pub usize);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        match self.0 {
            0..1000 => write!(f, "{bytes} bytes"),
            1000..1_000_000 => write!(f, "{:.1} KB", bytes / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.1} MB", bytes / 1e6),
            _ => write!(f, "{:.2} GB", bytes / 1e9),
        }
    }
}

/// Bytes of a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub free: usize,
    pub total: usize,
}

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl Launch {
    /// A row of blocks.
    pub fn blocks(blocks: usize, threads: u32) -> Launch {
        Launch {
            grid: [u32::try_from(blocks).unwrap_or(u32::MAX), 1, 1],
            block: threads,
            shared_bytes: 0,
        }
    }
}

/// An address in a device's memory.
pub type Address = u64;

/// `TensorMap` of `kernels/hopper.cuh`: to be aligned to 64 bytes on the device.
pub type TileMap = [u64; 16];

/// Bytes that a thread copies at a time.
const UPLOAD_UNIT: usize = 256 << 10;

/// Writes the n-th piece of what is brought to a device.
pub type Fill<'a> = &'a (dyn Fn(usize, &mut [u8]) + Sync);

/// A recording, as its device knows it.
pub type GraphId = u64;

/// Memory, copies and launches, all in the order in which they are asked for (one stream).
///
/// A fault of a kernel is told by the call that notices it, or a later one, and by all from then on.
///
/// Between [`Device::begin_recording`] and [`Device::end_recording`] launches, [`Device::copy`] and
/// [`Device::zero`] are recorded as they are, addresses and numbers included, and not done; all else
/// is refused. One thread works on a device at a time.
pub trait Device: Send + Sync + 'static {
    fn name(&self) -> String;

    /// What is free now, and what there is.
    fn memory(&self) -> Result<Memory, DeviceError>;

    /// Uninitialised memory, aligned to 256 bytes. `what` is for the message where there is none.
    fn allocate(&self, bytes: usize, what: &str) -> Result<Address, DeviceError>;
    /// # Safety
    /// The address must come from [`Device::allocate`], and nothing may use it any more but launches
    /// that were asked for before.
    unsafe fn free(&self, address: Address);

    /// Brings `bytes` bytes to the device. `fill(i, piece)` writes the i-th `unit` bytes (the last may
    /// be fewer), on several threads, into memory that the device copies from by itself; it is over
    /// when this returns, the copies may not be.
    fn upload_by(
        &self,
        to: Address,
        bytes: usize,
        unit: usize,
        fill: Fill,
    ) -> Result<(), DeviceError>;

    fn upload(&self, from: &[u8], to: Address) -> Result<(), DeviceError> {
        self.upload_by(to, from.len(), UPLOAD_UNIT, &|i, piece| {
            piece.copy_from_slice(&from[i * UPLOAD_UNIT..][..piece.len()]);
        })
    }

    /// Waits for all before it.
    fn download(&self, from: Address, to: &mut [u8]) -> Result<(), DeviceError>;
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), DeviceError>;
    fn zero(&self, at: Address, bytes: usize) -> Result<(), DeviceError>;

    /// # Safety
    /// `arguments` must be what the kernel takes, in number, size and meaning.
    unsafe fn launch(
        &self,
        kernel: &str,
        launch: Launch,
        arguments: &mut Arguments,
    ) -> Result<(), DeviceError>;

    fn begin_recording(&self) -> Result<(), DeviceError>;
    /// The recording, ready to be replayed.
    fn end_recording(&self) -> Result<GraphId, DeviceError>;
    /// Does what was recorded.
    ///
    /// # Safety
    /// Everything that the recording points to must still be there.
    unsafe fn replay(&self, graph: GraphId) -> Result<(), DeviceError>;
    /// Forgets a recording, once replays that were asked for are over.
    fn free_recording(&self, graph: GraphId);

    /// Waits for all that was asked for.
    fn synchronize(&self) -> Result<(), DeviceError>;

    /// What `copy_tile` (`kernels/hopper.cuh`) takes to copy tiles of `tile_rows` rows and 64 numbers of a
    /// matrix of bfloat16 [rows, stride]; `None` on all but Hopper and the emulation.
    fn tile_map(
        &self,
        _matrix: Address,
        (_rows, _stride): (usize, usize),
        _tile_rows: usize,
    ) -> Result<Option<TileMap>, DeviceError> {
        Ok(None)
    }

    /// Multiprocessors: blocks that run at a time where one fills a multiprocessor.
    fn multiprocessors(&self) -> usize;

    /// Dynamic shared memory that a block can have.
    fn max_shared_bytes(&self) -> u32;
}

/// The arguments of a launch, in the order of the kernel's parameters.
#[derive(Default)]
pub struct Arguments {
    /// Each in the low bytes of its own slot; every machine with a GPU is little-endian.
    slots: Vec<u64>,
    pointers: Vec<*mut c_void>,
}

/// What a kernel takes as an argument.
pub trait Argument {
    fn slot(self) -> u64;
}

impl Argument for u32 {
    fn slot(self) -> u64 {
        u64::from(self)
    }
}
impl Argument for u64 {
    fn slot(self) -> u64 {
        self
    }
}
impl Argument for i32 {
    fn slot(self) -> u64 {
        u64::from(self.cast_unsigned())
    }
}
impl Argument for f32 {
    fn slot(self) -> u64 {
        u64::from(self.to_bits())
    }
}
impl<T> Argument for &Buffer<T> {
    fn slot(self) -> u64 {
        self.address()
    }
}
impl<T> Argument for Slice<T> {
    fn slot(self) -> u64 {
        self.address
    }
}
/// A null pointer for `None`.
impl<T> Argument for Option<Slice<T>> {
    fn slot(self) -> u64 {
        self.map_or(0, |slice| slice.address)
    }
}
/// A null pointer for `None`.
impl<T> Argument for Option<&Buffer<T>> {
    fn slot(self) -> u64 {
        self.map_or(0, Buffer::address)
    }
}

impl Arguments {
    pub fn new() -> Arguments {
        Arguments::default()
    }

    #[must_use]
    pub fn with(mut self, argument: impl Argument) -> Arguments {
        self.slots.push(argument.slot());
        self
    }

    /// The arguments themselves.
    pub(super) fn slots(&self) -> &[u64] {
        &self.slots
    }

    /// Arguments with these slots.
    pub(super) fn from_slots(slots: &[u64]) -> Arguments {
        Arguments {
            slots: slots.to_vec(),
            pointers: Vec::new(),
        }
    }

    /// The addresses of the arguments, as `cuLaunchKernel` takes them.
    pub(super) fn pointers(&mut self) -> &mut [*mut c_void] {
        self.pointers.clear();
        self.pointers.extend(
            self.slots
                .iter_mut()
                .map(|slot| std::ptr::from_mut(slot).cast()),
        );
        &mut self.pointers
    }
}

/// `arguments![x, y, …]`: the arguments of a launch.
#[macro_export]
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => {
        $crate::backend::cuda::device::Arguments::new()$(.with($argument))*
    };
}

/// Plain numbers that go to a device as their bytes.
///
/// # Safety
/// Any bytes must be a value of the type, and it must have no padding.
pub unsafe trait Plain: Copy + 'static {}
// SAFETY: integers and floats.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: sixteen bits, each pattern a number or NaN.
unsafe impl Plain for half::bf16 {}
// SAFETY: as above.
unsafe impl Plain for half::f16 {}
// SAFETY: an array has no padding of its own.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

pub(super) fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: `Plain` has no padding, and any alignment suits bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), std::mem::size_of_val(values)) }
}

fn bytes_of_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as above, and any bytes are a value of `T`.
    unsafe {
        std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), std::mem::size_of_val(values))
    }
}

/// An array in a device's memory, freed with the buffer.
pub struct Buffer<T> {
    device: Arc<dyn Device>,
    address: Address,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    /// `len` elements, uninitialised.
    pub fn new(device: &Arc<dyn Device>, len: usize, what: &str) -> Result<Buffer<T>, DeviceError> {
        let too_much = || DeviceError::OutOfMemory {
            what: what.to_string(),
            needed: usize::MAX,
            free: 0,
        };
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(too_much)?;
        Ok(Buffer {
            device: Arc::clone(device),
            address: device.allocate(bytes, what)?,
            len,
            element: PhantomData,
        })
    }

    /// The same values on the device.
    pub fn from_slice(
        device: &Arc<dyn Device>,
        values: &[T],
        what: &str,
    ) -> Result<Buffer<T>, DeviceError> {
        let buffer = Buffer::new(device, values.len(), what)?;
        device.upload(bytes_of(values), buffer.address)?;
        Ok(buffer)
    }

    /// Overwrites `count` elements from `at` on. `fill(i, run)` writes the i-th `unit` of them (the last
    /// run may be shorter), on several threads.
    pub fn fill(
        &mut self,
        at: usize,
        count: usize,
        unit: usize,
        fill: impl Fn(usize, &mut [T]) + Sync,
    ) -> Result<(), DeviceError> {
        self.check(at, count)?;
        let bytes = size_of::<T>();
        self.device
            .upload_by(self.at(at), count * bytes, unit * bytes, &|i, piece| {
                // SAFETY: staging memory is aligned to more than any number, `unit` elements are a
                // multiple of an element, and any bytes are a value of `T`.
                let (before, run, behind) = unsafe { piece.align_to_mut::<T>() };
                debug_assert!(before.is_empty() && behind.is_empty());
                fill(i, run);
            })
    }

    /// Overwrites the elements from `at` on.
    pub fn write(&mut self, at: usize, values: &[T]) -> Result<(), DeviceError> {
        self.check(at, values.len())?;
        self.device.upload(bytes_of(values), self.at(at))
    }

    /// `len` elements from `at` on, brought to the host.
    pub fn read(&self, at: usize, len: usize) -> Result<Vec<T>, DeviceError>
    where
        T: Default,
    {
        self.check(at, len)?;
        let mut values = vec![T::default(); len];
        self.device
            .download(self.at(at), bytes_of_mut(&mut values))?;
        Ok(values)
    }

    pub fn zero(&mut self) -> Result<(), DeviceError> {
        self.device.zero(self.address, self.len * size_of::<T>())
    }

    fn check(&self, at: usize, len: usize) -> Result<(), DeviceError> {
        match at.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(DeviceError::Copy {
                bytes: len.saturating_mul(size_of::<T>()),
            }),
        }
    }
}

impl<T> Buffer<T> {
    pub fn address(&self) -> Address {
        self.address
    }

    /// The address of an element.
    pub fn at(&self, index: usize) -> Address {
        self.address + (index * size_of::<T>()) as u64
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// All of it.
    pub fn slice(&self) -> Slice<T> {
        Slice::at(self.address, self.len)
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Elements in a device's memory, where some buffer keeps them.
pub struct Slice<T> {
    address: Address,
    len: usize,
    element: PhantomData<T>,
}

// Not derived: that would ask the same of `T`.
impl<T> Clone for Slice<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Slice<T> {}

impl<T> Slice<T> {
    pub fn at(address: Address, len: usize) -> Slice<T> {
        Slice {
            address,
            len,
            element: PhantomData,
        }
    }

    pub fn address(&self) -> Address {
        self.address
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `len` elements, brought to the host.
    pub fn read(&self, device: &dyn Device, len: usize) -> Result<Vec<T>, DeviceError>
    where
        T: Plain + Default,
    {
        if len > self.len {
            return Err(DeviceError::Copy {
                bytes: len.saturating_mul(size_of::<T>()),
            });
        }
        let mut values = vec![T::default(); len];
        if len > 0 {
            device.download(self.address, bytes_of_mut(&mut values))?;
        }
        Ok(values)
    }
}

impl<T> fmt::Debug for Slice<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slice({} elements at {:#x})", self.len, self.address)
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // SAFETY: the buffer owns its address, and who launched with it borrowed the buffer.
        unsafe { self.device.free(self.address) };
    }
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} elements at {:#x})", self.len, self.address)
    }
}
