//! The kernels on the CPU: `kernels/emulate`, which checks every access to memory and every barrier.

use super::device::{
    Address, Arguments, Device, DeviceError, Fill, GraphId, Launch, Memory, TileMap,
};
use super::matmul_wgmma::TILE_NUMBERS;
use super::staging::{Copies, Ring};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};

/// `emulate::Kernel`, which only C++ looks into.
#[repr(C)]
struct Kernel {
    _private: [u8; 0],
}

/// `emulate::Launch`.
#[repr(C)]
struct RawLaunch {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    find_races: u32,
    order_seed: u64,
    era: u32,
}

unsafe extern "C" {
    /// One entry a kernel file; naming it makes the linker take them, and with them their kernels.
    static podium_kernel_files: [*const i32; 1];
    fn podium_emulate_allocate(bytes: u64) -> Address;
    fn podium_emulate_free(address: Address);
    fn podium_emulate_bytes(address: Address, bytes: u64) -> *mut u8;
    fn podium_emulate_find(name: *const c_char) -> *const Kernel;
    fn podium_emulate_block(
        kernel: *const Kernel,
        launch: *const RawLaunch,
        arguments: *const *mut c_void,
        index: *const u32,
        error: *mut c_char,
        error_bytes: usize,
    ) -> i32;
}

#[cfg(test)]
#[link(name = "podium_emulation_faults", kind = "static")]
unsafe extern "C" {
    /// The kernels with planted faults, which nothing but tests links.
    static podium_kernels_emulate_faults: i32;
}

/// As on an H100.
const MAX_THREADS: u32 = 1024;
const MAX_SHARED_BYTES: u32 = 227 * 1024;
/// Small, so that whatever depends on it has several waves of blocks with small models too.
const MULTIPROCESSORS: usize = 8;

/// Pieces of memory that uploads go through, small enough that those of small models wrap.
const UPLOAD_PIECES: usize = 3;
const UPLOAD_PIECE_BYTES: usize = 256 << 10;

/// A GPU played by the CPU. Slow, exact about what a kernel may do, and everywhere.
///
/// Copies from the host are done as late as a GPU may do them: when something behind them needs it.
pub struct Emulated {
    checks: Checks,
    /// The first fault: from then on everything fails, as on a GPU.
    fault: Mutex<Option<DeviceError>>,
    /// Threads that run blocks; rayon's own where there are none.
    pool: Option<ThreadPool>,
    /// Of each kernel.
    launches: Mutex<HashMap<String, u64>>,
    /// How often the host has waited, from 1 on: then no kernel is running that wrote before.
    era: AtomicU32,
    memory: Mutex<Allocations>,
    ring: Mutex<Ring>,
    pinned: Mutex<Vec<Box<[u128]>>>,
    /// Copies from the host that are still to be done.
    copies: Mutex<Vec<HostCopy>>,
    recordings: Mutex<Recordings>,
}

#[derive(Default)]
struct Allocations {
    bytes: HashMap<Address, usize>,
    used: usize,
}

struct HostCopy {
    number: usize,
    from: *const u8,
    bytes: usize,
    to: *mut u8,
}
// SAFETY: it points to pinned memory and to the device's, and `Copies::begin` promises both.
unsafe impl Send for HostCopy {}

#[derive(Default)]
struct Recordings {
    /// What is being recorded.
    open: Option<Vec<Recorded>>,
    done: HashMap<GraphId, Vec<Recorded>>,
    next: GraphId,
}

/// What a recording holds: everything by value.
#[derive(Clone)]
enum Recorded {
    Launch {
        kernel: String,
        launch: Launch,
        arguments: Vec<u64>,
    },
    Copy {
        from: Address,
        to: Address,
        bytes: usize,
    },
    Zero {
        at: Address,
        bytes: usize,
    },
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// What is checked besides bounds, alignment and barriers, which always are.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checks {
    /// Report two threads that touch one address of shared memory, one of them writing, with no
    /// barrier between. About doubles the time.
    pub races: bool,
    /// Run threads in a random order between barriers, which this seed fixes; `None`: in turn.
    pub order_seed: Option<u64>,
    /// Bytes of memory; `None`: as many as the host gives.
    pub memory: Option<usize>,
    /// The device is lost with the launch after so many.
    pub lost_after: Option<u64>,
}

impl Emulated {
    pub fn new(checks: Checks) -> Emulated {
        Emulated {
            checks,
            fault: Mutex::default(),
            pool: None,
            launches: Mutex::default(),
            era: AtomicU32::new(1),
            memory: Mutex::default(),
            ring: Mutex::new(Ring::new(UPLOAD_PIECES, UPLOAD_PIECE_BYTES)),
            pinned: Mutex::default(),
            copies: Mutex::default(),
            recordings: Mutex::default(),
        }
    }

    /// Launches so far, replayed ones too.
    pub fn launches(&self) -> u64 {
        lock(&self.launches).values().sum()
    }

    /// Those of one kernel.
    pub fn launches_of(&self, kernel: &str) -> u64 {
        lock(&self.launches).get(kernel).copied().unwrap_or(0)
    }

    /// The same, its blocks on that many threads.
    pub fn with_threads(self, threads: usize) -> Result<Emulated, ThreadPoolBuildError> {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build()?;
        Ok(Emulated {
            pool: Some(pool),
            ..self
        })
    }

    fn check(&self) -> Result<(), DeviceError> {
        match &*lock(&self.fault) {
            Some(fault) => Err(fault.clone()),
            None => Ok(()),
        }
    }

    fn fail(&self, fault: DeviceError) -> DeviceError {
        lock(&self.fault).get_or_insert(fault).clone()
    }

    /// Records what `record` gives, where a recording is open; says whether one is.
    fn recorded(&self, record: impl FnOnce() -> Recorded) -> bool {
        match &mut lock(&self.recordings).open {
            Some(recording) => {
                recording.push(record());
                true
            }
            None => false,
        }
    }

    /// Refuses what must not happen while launches are recorded, as the driver does.
    fn not_recording(&self, what: &'static str) -> Result<(), DeviceError> {
        self.check()?;
        match lock(&self.recordings).open {
            Some(_) => Err(self.fail(DeviceError::Recording(what))),
            None => Ok(()),
        }
    }

    /// Does the copies from the host that were begun, up to the last of this number, or all.
    fn do_copies(&self, number: Option<usize>) {
        let mut copies = lock(&self.copies);
        let end = match number {
            Some(number) => copies
                .iter()
                .rposition(|copy| copy.number == number)
                .map_or(0, |last| last + 1),
            None => copies.len(),
        };
        for copy in copies.drain(..end) {
            // SAFETY: `Copies::begin` promises the source, and has found the target; a target that was
            // freed since had its copies done first.
            unsafe { std::ptr::copy_nonoverlapping(copy.from, copy.to, copy.bytes) };
        }
    }

    /// The bytes behind a device address.
    fn bytes(address: Address, bytes: usize) -> Result<*mut u8, DeviceError> {
        // SAFETY: it looks an address up, and knows which are none.
        let found = unsafe { podium_emulate_bytes(address, bytes as u64) };
        match found.is_null() {
            true => Err(DeviceError::Copy { bytes }),
            false => Ok(found),
        }
    }

    fn find(name: &str) -> Result<*const Kernel, DeviceError> {
        let unknown = || DeviceError::NoKernel(name.to_string());
        // SAFETY: a static array, of which the first entry is always there; reading it keeps the linker
        // from leaving the kernels out.
        std::hint::black_box(unsafe { podium_kernel_files[0] });
        #[cfg(test)]
        // SAFETY: a static number.
        std::hint::black_box(unsafe { podium_kernels_emulate_faults });
        let name = CString::new(name).map_err(|_| unknown())?;
        // SAFETY: `name` ends with a zero.
        let found = unsafe { podium_emulate_find(name.as_ptr()) };
        match found.is_null() {
            true => Err(unknown()),
            false => Ok(found),
        }
    }
}

impl Default for Emulated {
    fn default() -> Emulated {
        Emulated::new(Checks::default())
    }
}

impl Copies for Emulated {
    fn pin(&self, bytes: usize) -> Result<*mut u8, DeviceError> {
        let mut memory = vec![0u128; bytes.div_ceil(16)].into_boxed_slice();
        let start = memory.as_mut_ptr().cast();
        lock(&self.pinned).push(memory);
        Ok(start)
    }

    unsafe fn begin(
        &self,
        number: usize,
        from: *const u8,
        bytes: usize,
        to: Address,
    ) -> Result<(), DeviceError> {
        let to = Self::bytes(to, bytes)?;
        lock(&self.copies).push(HostCopy {
            number,
            from,
            bytes,
            to,
        });
        Ok(())
    }

    fn finish(&self, number: usize) -> Result<(), DeviceError> {
        self.do_copies(Some(number));
        Ok(())
    }
}

impl Device for Emulated {
    fn name(&self) -> String {
        "emulated GPU".to_string()
    }

    fn memory(&self) -> Result<Memory, DeviceError> {
        self.check()?;
        let total = self.checks.memory.unwrap_or(usize::MAX);
        Ok(Memory {
            free: total - lock(&self.memory).used,
            total,
        })
    }

    fn allocate(&self, bytes: usize, what: &str) -> Result<Address, DeviceError> {
        self.not_recording("memory was asked for meanwhile")?;
        let free = self.memory()?.free;
        let out_of_memory = || DeviceError::OutOfMemory {
            what: what.to_string(),
            needed: bytes,
            free,
        };
        if bytes > free {
            return Err(out_of_memory());
        }
        // SAFETY: no requirements.
        let address = unsafe { podium_emulate_allocate(bytes as u64) };
        if address == 0 {
            return Err(out_of_memory());
        }
        let mut memory = lock(&self.memory);
        memory.used += bytes;
        memory.bytes.insert(address, bytes);
        Ok(address)
    }

    unsafe fn free(&self, address: Address) {
        self.do_copies(None);
        if lock(&self.recordings).open.is_some() {
            self.fail(DeviceError::Recording("memory was freed meanwhile"));
        }
        let mut memory = lock(&self.memory);
        memory.used -= memory.bytes.remove(&address).unwrap_or(0);
        // SAFETY: the caller's promise; launches are over when `launch` returns.
        unsafe { podium_emulate_free(address) };
    }

    fn upload_by(
        &self,
        to: Address,
        bytes: usize,
        unit: usize,
        fill: Fill,
    ) -> Result<(), DeviceError> {
        self.not_recording("the host sent something meanwhile")?;
        lock(&self.ring).upload(self, to, bytes, unit, fill)
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<(), DeviceError> {
        self.not_recording("the host read something meanwhile")?;
        self.do_copies(None);
        self.era.fetch_add(1, Ordering::Relaxed);
        let from = Self::bytes(from, to.len())?;
        // SAFETY: as many bytes are there, and the device's memory is nobody else's.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), DeviceError> {
        self.check()?;
        if self.recorded(|| Recorded::Copy { from, to, bytes }) {
            return Ok(());
        }
        self.do_copies(None);
        let (from, to) = (Self::bytes(from, bytes)?, Self::bytes(to, bytes)?);
        // SAFETY: as above; the two may overlap.
        unsafe { std::ptr::copy(from, to, bytes) };
        Ok(())
    }

    fn zero(&self, at: Address, bytes: usize) -> Result<(), DeviceError> {
        self.check()?;
        if self.recorded(|| Recorded::Zero { at, bytes }) {
            return Ok(());
        }
        self.do_copies(None);
        let at = Self::bytes(at, bytes)?;
        // SAFETY: as above.
        unsafe { std::ptr::write_bytes(at, 0, bytes) };
        Ok(())
    }

    unsafe fn launch(
        &self,
        kernel: &str,
        launch: Launch,
        arguments: &mut Arguments,
    ) -> Result<(), DeviceError> {
        self.check()?;
        let Launch {
            grid,
            block,
            shared_bytes,
        } = launch;
        if block == 0
            || block > MAX_THREADS
            || shared_bytes > MAX_SHARED_BYTES
            || grid.contains(&0)
            || grid[1].max(grid[2]) > u32::from(u16::MAX)
        {
            return Err(self.fail(DeviceError::Launch {
                kernel: kernel.to_string(),
                threads: block as usize,
                shared_bytes: shared_bytes as usize,
            }));
        }
        let found = Shared(Self::find(kernel)?);
        let recorded = self.recorded(|| Recorded::Launch {
            kernel: kernel.to_string(),
            launch,
            arguments: arguments.slots().to_vec(),
        });
        if recorded {
            return Ok(());
        }
        self.do_copies(None);
        let before = self.launches();
        *lock(&self.launches).entry(kernel.to_string()).or_default() += 1;
        if self.checks.lost_after == Some(before) {
            let message = format!("the emulated device was to be lost after {before} launches");
            return Err(self.fail(DeviceError::Fault(message)));
        }
        let raw = RawLaunch {
            grid,
            block: [block, 1, 1],
            shared_bytes,
            find_races: u32::from(self.checks.races),
            order_seed: self.checks.order_seed.map_or(0, |seed| seed | 1),
            era: self.era.load(Ordering::Relaxed),
        };
        let pointers = Shared(arguments.pointers().as_ptr());
        let stop = AtomicBool::new(false);
        let blocks = u64::from(grid[0]) * u64::from(grid[1]) * u64::from(grid[2]);
        let run_block = |number: u64| {
            if stop.load(Ordering::Relaxed) {
                return None;
            }
            let (x, y) = (u64::from(grid[0]), u64::from(grid[1]));
            let index = [
                (number % x) as u32,
                (number / x % y) as u32,
                (number / (x * y)) as u32,
            ];
            let mut error = [0; 1024];
            // SAFETY: the caller's promise about the arguments; the emulation holds every access that the
            // kernel makes against its memory, and switches stacks only below this call.
            let status = unsafe {
                podium_emulate_block(
                    found.get(),
                    &raw,
                    pointers.get(),
                    index.as_ptr(),
                    error.as_mut_ptr(),
                    error.len(),
                )
            };
            (status != 0).then(|| {
                stop.store(true, Ordering::Relaxed);
                // SAFETY: it was zero throughout, and what is written into it ends with a zero.
                let text = unsafe { CStr::from_ptr(error.as_ptr()) };
                text.to_string_lossy().into_owned()
            })
        };
        let run_all = || (0..blocks).into_par_iter().find_map_any(run_block);
        let fault = match &self.pool {
            Some(pool) => pool.install(run_all),
            None => run_all(),
        };
        match fault {
            Some(message) => Err(self.fail(DeviceError::Fault(message))),
            None => Ok(()),
        }
    }

    fn begin_recording(&self) -> Result<(), DeviceError> {
        self.not_recording("another recording was begun meanwhile")?;
        lock(&self.recordings).open = Some(Vec::new());
        Ok(())
    }

    fn end_recording(&self) -> Result<GraphId, DeviceError> {
        let mut recordings = lock(&self.recordings);
        let recording = recordings.open.take();
        self.check()?;
        let recording = recording.ok_or(DeviceError::Recording("nothing was begun"))?;
        recordings.next += 1;
        let graph = recordings.next;
        recordings.done.insert(graph, recording);
        Ok(graph)
    }

    unsafe fn replay(&self, graph: GraphId) -> Result<(), DeviceError> {
        self.not_recording("another recording was replayed meanwhile")?;
        let found = lock(&self.recordings).done.get(&graph).cloned();
        for step in found.ok_or(DeviceError::Recording("one that is gone was replayed"))? {
            match step {
                Recorded::Launch {
                    kernel,
                    launch,
                    arguments,
                } => {
                    let mut arguments = Arguments::from_slots(&arguments);
                    // SAFETY: they were a launch's, and the caller promises what they point to.
                    unsafe { self.launch(&kernel, launch, &mut arguments) }?;
                }
                Recorded::Copy { from, to, bytes } => self.copy(from, to, bytes)?,
                Recorded::Zero { at, bytes } => self.zero(at, bytes)?,
            }
        }
        Ok(())
    }

    fn free_recording(&self, graph: GraphId) {
        lock(&self.recordings).done.remove(&graph);
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        self.not_recording("the host waited meanwhile")?;
        self.do_copies(None);
        self.era.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Fields in the order in which `kernels/emulate/runtime.cc` reads them.
    fn tile_map(
        &self,
        matrix: Address,
        (rows, stride): (usize, usize),
        tile_rows: usize,
    ) -> Result<Option<TileMap>, DeviceError> {
        let mut map = [0; 16];
        let row_bytes = stride * size_of::<half::bf16>();
        let fields = [stride, rows, row_bytes, TILE_NUMBERS, tile_rows];
        map[0] = matrix;
        for (field, value) in map[1..].iter_mut().zip(fields) {
            *field = value as u64;
        }
        Ok(Some(map))
    }

    fn multiprocessors(&self) -> usize {
        MULTIPROCESSORS
    }

    fn max_shared_bytes(&self) -> u32 {
        MAX_SHARED_BYTES
    }
}

/// A pointer to what all blocks only read.
struct Shared<T>(*const T);
// SAFETY: read only, for as long as the launch lasts.
unsafe impl<T> Sync for Shared<T> {}
impl<T> Shared<T> {
    fn get(&self) -> *const T {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::super::device::Buffer;
    use super::*;
    use crate::arguments;
    use std::sync::Arc;

    const CHECKED: Checks = Checks {
        races: true,
        order_seed: None,
        memory: None,
        lost_after: None,
    };

    /// Launches a kernel of `kernels/emulate/faults.cu`: 64 threads, 64 floats of shared memory.
    fn launch(kernel: &str, takes_input: bool, checks: Checks) -> Result<Vec<f32>, String> {
        let device: Arc<dyn Device> = Arc::new(Emulated::new(checks));
        let input: Vec<f32> = (0..64).map(|i| i as f32).collect();
        let input = Buffer::from_slice(&device, &input, "input").unwrap();
        let out = Buffer::<f32>::new(&device, 64, "output").unwrap();
        let mut arguments = match takes_input {
            true => arguments![&input, &out],
            false => arguments![&out],
        };
        let shape = Launch {
            shared_bytes: 256,
            ..Launch::blocks(1, 64)
        };
        // SAFETY: the kernels take the input where `takes_input` says so, and the output.
        unsafe { device.launch(kernel, shape, &mut arguments) }.map_err(|e| e.to_string())?;
        out.read(0, 64).map_err(|e| e.to_string())
    }

    #[test]
    fn a_correct_kernel_passes_in_every_order() {
        for order_seed in [None, Some(0), Some(1), Some(2)] {
            let checks = Checks {
                order_seed,
                ..CHECKED
            };
            let got = launch("fault_none", false, checks).unwrap();
            let expected: Vec<f32> = (0..64)
                .map(|i| ((i ^ 1) + 1) as f32 % 64.0 + 32.0)
                .collect();
            assert_eq!(got, expected);
            let got = launch("fault_none_copy", true, checks).unwrap();
            assert_eq!(got, (0..64).map(|i| i as f32).collect::<Vec<_>>());
        }
    }

    #[test]
    fn each_planted_bug_is_reported_for_what_it_is() {
        let global = "global memory out of bounds: 4 bytes at";
        let shared = "shared memory out of bounds: 4 bytes at offset 256 of 256";
        let race = "race in shared memory at offset";
        let barrier = "divergent barrier: ";
        for (kernel, takes_input, message) in [
            (
                "fault_global_read",
                true,
                format!("{global} offset 256 of an allocation of 256"),
            ),
            (
                "fault_global_write",
                false,
                format!("{global} 4 before an allocation of 256"),
            ),
            (
                "fault_null",
                false,
                "global memory that was never allocated".to_string(),
            ),
            (
                "fault_misaligned",
                false,
                "misaligned access to global memory: 16 bytes".to_string(),
            ),
            ("fault_shared_bounds", false, shared.to_string()),
            ("fault_missing_barrier", false, race.to_string()),
            ("fault_overwrite", false, race.to_string()),
            ("fault_missing_warp_barrier", false, race.to_string()),
            ("fault_copy_without_barrier", true, race.to_string()),
            (
                "fault_divergent_barrier",
                false,
                format!("{barrier}32 threads (0 is one) wait at"),
            ),
            (
                "fault_two_barriers",
                false,
                format!("{barrier}it is at __syncthreads (faults.cu:"),
            ),
            (
                "fault_divergent_warp",
                false,
                format!("{barrier}32 threads (0 is one) wait at"),
            ),
            (
                "fault_early_write",
                false,
                "early access: it may write global memory before it waits".to_string(),
            ),
            (
                "fault_never_waits",
                false,
                "it ends without having waited for the kernels before it".to_string(),
            ),
        ] {
            for order_seed in [None, Some(7)] {
                let checks = Checks {
                    order_seed,
                    ..CHECKED
                };
                let error = launch(kernel, takes_input, checks).expect_err(kernel);
                assert!(
                    error.contains(kernel) && error.contains(&message),
                    "{error}"
                );
            }
        }
    }

    /// What the host sent may be read early (weights are); what a kernel wrote may not, be it the one
    /// before or one before that, until the host has waited.
    #[test]
    fn what_kernels_wrote_is_not_read_before_the_wait() {
        for kernel in ["fault_early_read", "fault_early_copy"] {
            let sent: Vec<f32> = (0..64).map(|i| i as f32).collect();
            assert_eq!(launch(kernel, true, CHECKED).unwrap(), sent);

            let device: Arc<dyn Device> = Arc::new(Emulated::new(CHECKED));
            let input = Buffer::from_slice(&device, &sent, "input").unwrap();
            let [middle, out] = [(); 2].map(|()| Buffer::<f32>::new(&device, 64, "out").unwrap());
            let shape = Launch {
                shared_bytes: 256,
                ..Launch::blocks(1, 64)
            };
            let run = |kernel: &str, from: &Buffer<f32>, to: &Buffer<f32>| {
                // SAFETY: the kernels take an input and an output.
                unsafe { device.launch(kernel, shape, &mut arguments![from, to]) }
            };
            run("fault_none_copy", &input, &middle).unwrap();
            device.synchronize().unwrap();
            run(kernel, &middle, &out).unwrap();
            run("fault_none_copy", &input, &middle).unwrap();
            run("fault_none_copy", &input, &out).unwrap();
            let error = run(kernel, &middle, &out).unwrap_err().to_string();
            let expected = "early access: it reads what a kernel has written before it waits";
            assert!(
                error.contains(kernel) && error.contains(expected),
                "{error}"
            );
        }
    }

    #[test]
    fn a_lost_device_and_full_memory() {
        let device: Arc<dyn Device> = Arc::new(Emulated::new(Checks {
            memory: Some(1000),
            lost_after: Some(2),
            ..CHECKED
        }));
        let out = Buffer::<f32>::new(&device, 64, "output").unwrap();
        assert_eq!(device.memory().unwrap().free, 1000 - 256);
        let refused = Buffer::<f32>::new(&device, 190, "more").err().unwrap();
        let expected = "out of device memory for more: 760 bytes needed, 744 bytes free";
        assert_eq!(refused.to_string(), expected);
        drop(Buffer::<f32>::new(&device, 186, "all").unwrap());
        assert_eq!(device.memory().unwrap().free, 744);
        let launch = || {
            // SAFETY: the kernel takes the output.
            unsafe { device.launch("fault_order", Launch::blocks(1, 32), &mut arguments![&out]) }
        };
        launch().and_then(|()| launch()).unwrap();
        let lost = launch().unwrap_err();
        assert!(lost.is_final() && !refused.is_final());
        assert_eq!(out.read(0, 1).unwrap_err(), lost);
    }

    /// Uploads through few pieces that take turns, done as late as can be, units that no piece holds
    /// among them.
    #[test]
    fn uploads_arrive_in_their_order() {
        let device: Arc<dyn Device> = Arc::new(Emulated::default());
        let len = 3 * UPLOAD_PIECES * UPLOAD_PIECE_BYTES / 4 + 1003;
        let mut buffer = Buffer::<u32>::new(&device, len, "test").unwrap();
        for (round, unit) in [(1, 1000), (2, 7), (3, 100_000), (4, len)] {
            let value = |i: usize| (i * 31) as u32 ^ round;
            let fill = |n: usize, run: &mut [u32]| {
                for (i, to) in run.iter_mut().enumerate() {
                    *to = value(n * unit + i);
                }
            };
            buffer.fill(0, len, unit, fill).unwrap();
            // A later copy to the same place wins.
            buffer.write(5, &[round, 77]).unwrap();
            let got = buffer.read(0, len).unwrap();
            assert_eq!(got[5..7], [round, 77]);
            let rest = got.iter().enumerate().skip(7);
            assert!(
                rest.into_iter().all(|(i, &x)| x == value(i)),
                "units of {unit}"
            );
        }
    }

    #[test]
    fn what_was_never_written_is_nan() {
        let checks = Checks::default();
        for (kernel, takes_input) in [
            ("fault_uninitialised_shared", false),
            ("fault_copy_not_awaited", true),
        ] {
            let got = launch(kernel, takes_input, checks).unwrap();
            assert!(got.iter().all(|x| x.is_nan()), "{kernel}: {got:?}");
        }
        let device: Arc<dyn Device> = Arc::new(Emulated::default());
        let fresh = Buffer::<f32>::new(&device, 3, "fresh").unwrap();
        assert!(fresh.read(0, 3).unwrap().iter().all(|x| x.is_nan()));
    }

    #[test]
    fn the_seed_changes_the_order_of_threads() {
        let last = |order_seed| {
            let checks = Checks {
                order_seed,
                ..CHECKED
            };
            launch("fault_order", false, checks).unwrap()[0]
        };
        assert_eq!(last(None), 63.0);
        let seen: std::collections::BTreeSet<u32> =
            (0..20).map(|seed| last(Some(seed)) as u32).collect();
        assert!(seen.len() > 5, "{seen:?}");
        assert_eq!(last(Some(3)), last(Some(3)));
    }

    #[test]
    fn after_a_fault_everything_fails_with_it() {
        let device: Arc<dyn Device> = Arc::new(Emulated::new(CHECKED));
        let out = Buffer::<f32>::new(&device, 64, "output").unwrap();
        // SAFETY: the kernel takes the output.
        let fault =
            unsafe { device.launch("fault_null", Launch::blocks(1, 32), &mut arguments![&out]) }
                .unwrap_err();
        assert_eq!(device.synchronize().unwrap_err(), fault);
        assert_eq!(out.read(0, 1).unwrap_err(), fault);
    }

    #[test]
    fn launches_that_hardware_refuses_are_refused() {
        let device: Arc<dyn Device> = Arc::new(Emulated::default());
        let out = Buffer::<f32>::new(&device, 64, "output").unwrap();
        for (block, shared_bytes, grid) in [
            (1025, 0, [1, 1, 1]),
            (0, 0, [1, 1, 1]),
            (32, MAX_SHARED_BYTES + 1, [1, 1, 1]),
            (32, 0, [1, 65536, 1]),
            (32, 0, [0, 1, 1]),
        ] {
            let device: Arc<dyn Device> = Arc::new(Emulated::default());
            let launch = Launch {
                grid,
                block,
                shared_bytes,
            };
            // SAFETY: the kernel takes the output.
            let result = unsafe { device.launch("fault_order", launch, &mut arguments![&out]) };
            assert!(
                matches!(result, Err(DeviceError::Launch { .. })),
                "{launch:?}"
            );
        }
        // SAFETY: there is no such kernel.
        let unknown = unsafe { device.launch("nothing", Launch::blocks(1, 32), &mut arguments![]) };
        assert_eq!(unknown, Err(DeviceError::NoKernel("nothing".to_string())));
    }

    #[test]
    fn mma_and_ldmatrix_follow_the_documented_layouts() {
        let device: Arc<dyn Device> = Arc::new(Emulated::new(CHECKED));
        // Small whole numbers: exact in bfloat16, and their sums in float32.
        let number = |i: usize| half::bf16::from_f32(((i * 37 + 11) % 61) as f32 - 30.0);
        let a: Vec<half::bf16> = (0..256).map(number).collect();
        let b: Vec<half::bf16> = (0..128).map(|i| number(i * 5 + 3)).collect();
        let expected: Vec<f32> = (0..128)
            .map(|i| {
                let (row, column) = (i / 8, i % 8);
                (0..16)
                    .map(|k| a[row * 16 + k].to_f32() * b[column * 16 + k].to_f32())
                    .sum()
            })
            .collect();
        let [a, b] = [a, b].map(|values| Buffer::from_slice(&device, &values, "in").unwrap());
        let d = Buffer::<f32>::new(&device, 128, "out").unwrap();
        let shape = Launch {
            shared_bytes: 768,
            ..Launch::blocks(1, 32)
        };
        // SAFETY: the kernel takes these.
        unsafe { device.launch("check_mma", shape, &mut arguments![&a, &b, &d]) }.unwrap();
        assert_eq!(d.read(0, 128).unwrap(), expected);
    }

    #[test]
    fn a_tile_is_there_when_it_is_waited_for_and_lies_where_its_swizzle_says() {
        let device: Arc<dyn Device> = Arc::new(Emulated::new(CHECKED));
        // Seven rows: the eighth of the tile is zeros.
        let numbers: Vec<half::bf16> = (0..7 * 64)
            .map(|i| half::bf16::from_f32((i % 251) as f32))
            .collect();
        let matrix = Buffer::from_slice(&device, &numbers, "in").unwrap();
        let map = device.tile_map(matrix.address(), (7, 64), 8).unwrap();
        let map = Buffer::from_slice(&device, &map.unwrap(), "map").unwrap();
        let read = |waits: u32| {
            let out = Buffer::<f32>::new(&device, 64, "out").unwrap();
            let shape = Launch {
                shared_bytes: 1032,
                ..Launch::blocks(1, 64)
            };
            // SAFETY: the kernel takes these.
            unsafe { device.launch("check_tile", shape, &mut arguments![&map, waits, &out]) }
                .unwrap();
            out.read(0, 64).unwrap()
        };
        assert!(read(0).iter().all(|x| x.is_nan()));
        let first_of_chunk = |thread: usize| match thread / 8 {
            7 => 0.0,
            row => numbers[row * 64 + thread % 8 * 8].to_f32(),
        };
        let expected: Vec<f32> = (0..64).map(first_of_chunk).collect();
        assert_eq!(read(1), expected);
    }

    #[test]
    fn ldmatrix_transposes() {
        let device: Arc<dyn Device> = Arc::new(Emulated::new(CHECKED));
        let numbers: Vec<u16> = (0..256).collect();
        let input = Buffer::from_slice(&device, &numbers, "in").unwrap();
        let out = Buffer::<u32>::new(&device, 128, "out").unwrap();
        let shape = Launch {
            shared_bytes: 512,
            ..Launch::blocks(1, 32)
        };
        // SAFETY: the kernel takes these.
        unsafe { device.launch("check_transposed", shape, &mut arguments![&input, &out]) }.unwrap();
        for (i, &got) in out.read(0, 128).unwrap().iter().enumerate() {
            let (lane, matrix) = (i as u32 / 4, i as u32 % 4);
            let (row, column) = (lane % 4 * 2, lane / 4);
            let element = |row: u32| matrix * 64 + row * 8 + column;
            assert_eq!(got, element(row) | element(row + 1) << 16, "lane {lane}");
        }
    }
}
