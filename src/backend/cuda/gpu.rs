//! A GPU, through NVIDIA's driver, which is loaded when the first is opened: the binary starts without
//! one.

use super::device::{
    Address, Arguments, Device, DeviceError, Fill, GraphId, Launch, Memory, TileMap,
};
use super::images::{architectures, best_for};
use super::matmul_wgmma::TILE_NUMBERS;
use super::staging::{Copies, Ring};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

/// Pieces of pinned memory that uploads go through.
const UPLOAD_PIECES: usize = 4;
const UPLOAD_PIECE_BYTES: usize = 16 << 20;
/// Of pinned memory that downloads go through.
const DOWNLOAD_BYTES: usize = 1 << 20;
/// The first driver that takes programmatic dependent launches into graphs: 12.3.
const DEPENDENT_LAUNCH_DRIVER: i32 = 12_030;

/// One GPU with all kernels loaded, and a stream on which everything happens in order.
pub struct Gpu {
    name: String,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    /// Kernels by name, as they are first launched.
    functions: Mutex<HashMap<String, Function>>,
    multiprocessors: usize,
    max_shared_bytes: u32,
    /// The first fault: a context that has failed does nothing more.
    fault: Mutex<Option<DeviceError>>,
    /// Whether a kernel may start while the one before it ends (programmatic dependent launch).
    dependent_launch: bool,
    /// Whether the last thing that the stream was given is a kernel's launch.
    after_launch: AtomicBool,
    recording: AtomicBool,
    graphs: Mutex<Graphs>,
    ring: Mutex<Ring>,
    /// Of each piece of the ring: after its last copy.
    copied: [sys::CUevent; UPLOAD_PIECES],
    pinned: Mutex<Vec<*mut c_void>>,
    /// [`DOWNLOAD_BYTES`], pinned.
    landing: Mutex<*mut u8>,
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

#[derive(Default)]
struct Graphs {
    ready: HashMap<GraphId, sys::CUgraphExec>,
    next: GraphId,
}

// SAFETY: handles of the driver, which any thread may use; each call makes the context its thread's.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

/// What `podium devices` says of a GPU.
#[derive(Clone, Debug)]
pub struct GpuInfo {
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    pub memory_bytes: usize,
}

fn driver(error: DriverError) -> DeviceError {
    let text = |text: Result<&std::ffi::CStr, DriverError>| match text {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => format!("error {:?}", error.0 as i32),
    };
    DeviceError::Driver(format!(
        "{} ({})",
        text(error.error_string()),
        text(error.error_name())
    ))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// GPUs of this machine; none where there is no driver.
fn count() -> Result<usize, DeviceError> {
    // SAFETY: it only looks for the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::NoDriver);
    }
    match result::init() {
        Ok(()) => {}
        Err(DriverError(sys::cudaError_enum::CUDA_ERROR_NO_DEVICE)) => return Ok(0),
        Err(error) => return Err(driver(error)),
    }
    let count = result::device::get_count().map_err(driver)?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// 12030 for 12.3.
fn driver_version() -> Result<i32, DeviceError> {
    let mut version = 0;
    // SAFETY: it writes one number.
    let result = unsafe { sys::cuDriverGetVersion(&mut version) };
    result.result().map_err(driver)?;
    Ok(version)
}

fn attribute(
    device: sys::CUdevice,
    attribute: sys::CUdevice_attribute,
) -> Result<u32, DeviceError> {
    // SAFETY: the device came from the driver.
    let value = unsafe { result::device::get_attribute(device, attribute) }.map_err(driver)?;
    Ok(u32::try_from(value).unwrap_or(0))
}

fn info(device: sys::CUdevice) -> Result<GpuInfo, DeviceError> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    Ok(GpuInfo {
        name: result::device::get_name(device).map_err(driver)?,
        capability: (attribute(device, MAJOR)?, attribute(device, MINOR)?),
        // SAFETY: the device came from the driver.
        memory_bytes: unsafe { result::device::total_mem(device) }.map_err(driver)?,
    })
}

/// All GPUs of this machine.
///
/// # Errors
/// Where there is no driver, or it fails.
pub fn list() -> Result<Vec<GpuInfo>, DeviceError> {
    (0..count()?)
        .map(|ordinal| info(result::device::get(ordinal as i32).map_err(driver)?))
        .collect()
}

impl Gpu {
    /// [`Gpu::open`] of the one that `cuda` (the first) or `cuda:INDEX` names.
    pub fn named(name: &str) -> Result<Gpu, DeviceError> {
        let index = match name {
            "cuda" => Some(0),
            _ => name.strip_prefix("cuda:").and_then(|i| i.parse().ok()),
        };
        Gpu::open(index.ok_or_else(|| DeviceError::NoSuchName(name.to_string()))?)
    }

    /// Opens a GPU, counted from 0, and loads the kernels for it.
    ///
    /// # Errors
    /// Where there is no driver, no such GPU, or this build has no kernels for it.
    pub fn open(ordinal: usize) -> Result<Gpu, DeviceError> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as SHARED,
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
        };
        let count = count()?;
        if ordinal >= count {
            return Err(DeviceError::NoSuchDevice { ordinal, count });
        }
        let device = result::device::get(ordinal as i32).map_err(driver)?;
        let GpuInfo {
            name,
            capability: (major, minor),
            ..
        } = info(device)?;
        let images = best_for(major, minor);
        if images.is_empty() {
            let built = architectures();
            return Err(DeviceError::NoImage {
                device: name,
                capability: format!("{major}.{minor}"),
                built: match built.is_empty() {
                    true => "it was built without nvcc".to_string(),
                    false => built.join(", "),
                },
            });
        }
        let (multiprocessors, max_shared_bytes) = (
            attribute(device, MULTIPROCESSORS)?,
            attribute(device, SHARED)?,
        );
        // SAFETY: the device came from the driver; it is released when the `Gpu` goes.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(driver)?;
        let mut gpu = Gpu {
            name,
            device,
            context,
            stream: std::ptr::null_mut(),
            modules: Vec::new(),
            functions: Mutex::new(HashMap::new()),
            multiprocessors: multiprocessors as usize,
            max_shared_bytes,
            fault: Mutex::new(None),
            // Kernels compiled for less do not wait for their predecessor.
            dependent_launch: images.iter().all(|image| image.waits_for_predecessors())
                && driver_version()? >= DEPENDENT_LAUNCH_DRIVER,
            after_launch: AtomicBool::new(false),
            recording: AtomicBool::new(false),
            graphs: Mutex::default(),
            ring: Mutex::new(Ring::new(UPLOAD_PIECES, UPLOAD_PIECE_BYTES)),
            copied: [std::ptr::null_mut(); UPLOAD_PIECES],
            pinned: Mutex::default(),
            landing: Mutex::new(std::ptr::null_mut()),
        };
        gpu.enter()?;
        gpu.stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(driver)?;
        for event in &mut gpu.copied {
            use sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING;
            *event = result::event::create(CU_EVENT_DISABLE_TIMING).map_err(driver)?;
        }
        *lock(&gpu.landing) = gpu.pin(DOWNLOAD_BYTES)?;
        for image in images {
            // PTX is text that ends with a zero; to a cubin it does nothing.
            let mut code = image.code.to_vec();
            code.push(0);
            // SAFETY: a whole image, as nvcc wrote it.
            let module = unsafe { result::module::load_data(code.as_ptr().cast()) };
            gpu.modules.push(module.map_err(driver)?);
        }
        gpu.keep_freed_memory()?;
        Ok(gpu)
    }

    /// The same, each kernel begun when the one before it has ended.
    #[must_use]
    pub fn without_dependent_launch(mut self) -> Gpu {
        self.dependent_launch = false;
        self
    }

    /// Freed memory stays with the process: a step frees and asks for the same again.
    fn keep_freed_memory(&self) -> Result<(), DeviceError> {
        use sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD as THRESHOLD;
        // SAFETY: the device came from the driver, and the attribute is a 64-bit number.
        unsafe {
            let pool = result::device::get_default_mem_pool(self.device).map_err(driver)?;
            let mut all = u64::MAX;
            let value = std::ptr::from_mut(&mut all).cast::<c_void>();
            sys::cuMemPoolSetAttribute(pool, THRESHOLD, value)
                .result()
                .map_err(driver)
        }
    }

    /// Makes the context this thread's, unless something has failed before.
    fn enter(&self) -> Result<(), DeviceError> {
        if let Some(fault) = &*lock(&self.fault) {
            return Err(fault.clone());
        }
        // SAFETY: it is retained as long as the `Gpu` lives.
        unsafe { result::ctx::set_current(self.context) }.map_err(driver)
    }

    /// Refuses what a stream must not be asked while it is captured.
    fn not_recording(&self, what: &'static str) -> Result<(), DeviceError> {
        self.enter()?;
        match self.recording.load(Ordering::Relaxed) {
            true => Err(self.fail(DeviceError::Recording(what))),
            false => Ok(()),
        }
    }

    /// What comes behind is not behind a kernel.
    fn not_a_launch(&self) {
        self.after_launch.store(false, Ordering::Relaxed);
    }

    fn fail(&self, fault: DeviceError) -> DeviceError {
        lock(&self.fault).get_or_insert(fault).clone()
    }

    fn checked(&self, result: Result<(), DriverError>) -> Result<(), DeviceError> {
        result.map_err(|error| self.fail(driver(error)))
    }

    fn function(&self, name: &str) -> Result<Function, DeviceError> {
        let mut functions = lock(&self.functions);
        if let Some(function) = functions.get(name) {
            return Ok(*function);
        }
        let unknown = || DeviceError::NoKernel(name.to_string());
        let in_c = CString::new(name).map_err(|_| unknown())?;
        // SAFETY: the modules are loaded as long as the `Gpu` lives.
        let found = self
            .modules
            .iter()
            .find_map(|&module| unsafe { result::module::get_function(module, in_c.clone()) }.ok());
        let function = found.ok_or_else(unknown)?;
        use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED;
        let bytes = i32::try_from(self.max_shared_bytes).unwrap_or(i32::MAX);
        // SAFETY: the function was just found.
        unsafe { result::function::set_function_attribute(function, SHARED, bytes) }
            .map_err(driver)?;
        functions.insert(name.to_string(), Function(function));
        Ok(Function(function))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // Nothing can be done about what fails here.
        // SAFETY: all of these were made in `open`, and whoever holds memory holds the `Gpu`.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            if !self.stream.is_null() {
                let _ = result::stream::synchronize(self.stream);
                for &graph in lock(&self.graphs).ready.values() {
                    let _ = result::graph::exec_destroy(graph);
                }
                for &event in self.copied.iter().filter(|event| !event.is_null()) {
                    let _ = result::event::destroy(event);
                }
                for &memory in &*lock(&self.pinned) {
                    let _ = result::free_host(memory);
                }
                let _ = result::stream::destroy(self.stream);
            }
            for &module in &self.modules {
                let _ = result::module::unload(module);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

impl Copies for Gpu {
    fn pin(&self, bytes: usize) -> Result<*mut u8, DeviceError> {
        // SAFETY: freed with the `Gpu`.
        let memory = unsafe { result::malloc_host(bytes, 0) }.map_err(driver)?;
        lock(&self.pinned).push(memory);
        Ok(memory.cast())
    }

    unsafe fn begin(
        &self,
        number: usize,
        from: *const u8,
        bytes: usize,
        to: Address,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        let from = unsafe { std::slice::from_raw_parts(from, bytes) };
        self.not_a_launch();
        // SAFETY: the same; `Buffer` has checked the length.
        self.checked(unsafe { result::memcpy_htod_async(to, from, self.stream) })?;
        // SAFETY: the event and the stream live as long as the `Gpu`.
        self.checked(unsafe { result::event::record(self.copied[number], self.stream) })
    }

    fn finish(&self, number: usize) -> Result<(), DeviceError> {
        // SAFETY: the event lives as long as the `Gpu`.
        self.checked(unsafe { result::event::synchronize(self.copied[number]) })
    }
}

impl Device for Gpu {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn memory(&self) -> Result<Memory, DeviceError> {
        use sys::CUmemPool_attribute_enum::{
            CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT as RESERVED,
            CU_MEMPOOL_ATTR_USED_MEM_CURRENT as USED,
        };
        self.enter()?;
        let (free, total) = result::mem_get_info().map_err(driver)?;
        // What the pool keeps for us counts as taken there.
        // SAFETY: the device came from the driver.
        let pool = unsafe { result::device::get_default_mem_pool(self.device) }.map_err(driver)?;
        let attribute = |attribute| {
            let mut value = 0u64;
            // SAFETY: both attributes are 64-bit numbers.
            unsafe {
                sys::cuMemPoolGetAttribute(pool, attribute, std::ptr::from_mut(&mut value).cast())
            }
            .result()
            .map(|()| value as usize)
            .map_err(driver)
        };
        let kept = attribute(RESERVED)?.saturating_sub(attribute(USED)?);
        Ok(Memory {
            free: free + kept,
            total,
        })
    }

    fn allocate(&self, bytes: usize, what: &str) -> Result<Address, DeviceError> {
        self.not_recording("memory was asked for meanwhile")?;
        self.not_a_launch();
        // SAFETY: the stream lives as long as the `Gpu`.
        match unsafe { result::malloc_async(self.stream, bytes.max(1)) } {
            Ok(address) => Ok(address),
            Err(DriverError(sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY)) => {
                Err(DeviceError::OutOfMemory {
                    what: what.to_string(),
                    needed: bytes,
                    free: self.memory().map_or(0, |memory| memory.free),
                })
            }
            Err(error) => Err(self.fail(driver(error))),
        }
    }

    unsafe fn free(&self, address: Address) {
        if self.not_recording("memory was freed meanwhile").is_ok() {
            self.not_a_launch();
            // SAFETY: the caller's promise; the stream frees it behind the launches that use it.
            let _ = unsafe { result::free_async(address, self.stream) };
        }
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
        let landing = lock(&self.landing);
        let mut from = from;
        for to in to.chunks_mut(DOWNLOAD_BYTES) {
            // SAFETY: so many bytes are pinned there, and nobody else has them.
            let landed = unsafe { std::slice::from_raw_parts_mut(*landing, to.len()) };
            self.not_a_launch();
            // SAFETY: `Buffer` has checked the length, and the copy has ended before the memory is read.
            self.checked(unsafe { result::memcpy_dtoh_async(landed, from, self.stream) })?;
            self.synchronize()?;
            to.copy_from_slice(landed);
            from += to.len() as u64;
        }
        Ok(())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), DeviceError> {
        self.enter()?;
        self.not_a_launch();
        // SAFETY: the caller's addresses, on one device.
        self.checked(unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) })
    }

    fn zero(&self, at: Address, bytes: usize) -> Result<(), DeviceError> {
        self.enter()?;
        self.not_a_launch();
        // SAFETY: as above.
        self.checked(unsafe { result::memset_d8_async(at, 0, bytes, self.stream) })
    }

    unsafe fn launch(
        &self,
        kernel: &str,
        launch: Launch,
        arguments: &mut Arguments,
    ) -> Result<(), DeviceError> {
        self.enter()?;
        let Function(function) = self.function(kernel)?;
        use sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        let mut attribute = sys::CUlaunchAttribute {
            id: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { pad: [0; 64] },
        };
        attribute.value.programmaticStreamSerializationAllowed = 1;
        // Behind a copy or a graph there is no kernel to begin beside.
        let dependent = self.after_launch.swap(true, Ordering::Relaxed) && self.dependent_launch;
        let [x, y, z] = launch.grid;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream,
            attrs: &mut attribute,
            numAttrs: u32::from(dependent),
        };
        // SAFETY: the caller's promise about the arguments, whose values the driver copies.
        let result = unsafe {
            sys::cuLaunchKernelEx(
                &config,
                function,
                arguments.pointers().as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        match result.result() {
            Err(DriverError(sys::cudaError_enum::CUDA_ERROR_INVALID_VALUE)) => {
                Err(self.fail(DeviceError::Launch {
                    kernel: kernel.to_string(),
                    threads: launch.block as usize,
                    shared_bytes: launch.shared_bytes as usize,
                }))
            }
            other => self.checked(other),
        }
    }

    fn begin_recording(&self) -> Result<(), DeviceError> {
        use sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.not_recording("another recording was begun meanwhile")?;
        // A graph's first kernel has none before it.
        self.not_a_launch();
        // SAFETY: the stream lives as long as the `Gpu`.
        let begun = unsafe {
            result::stream::begin_capture(self.stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        };
        self.checked(begun)?;
        self.recording.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn end_recording(&self) -> Result<GraphId, DeviceError> {
        self.recording.store(false, Ordering::Relaxed);
        self.not_a_launch();
        self.enter()?;
        // SAFETY: by the thread that began the capture, of this stream; the graph is destroyed below.
        let graph = match unsafe { result::stream::end_capture(self.stream) } {
            Ok(graph) => graph,
            Err(error) => return Err(self.fail(driver(error))),
        };
        let mut ready = std::ptr::null_mut();
        // SAFETY: the graph was just captured; the executable one does not need it any more.
        let made = unsafe {
            let made = sys::cuGraphInstantiateWithFlags(&mut ready, graph, 0).result();
            let destroyed = result::graph::destroy(graph);
            made.and(destroyed)
        };
        self.checked(made)?;
        let mut graphs = lock(&self.graphs);
        graphs.next += 1;
        let id = graphs.next;
        graphs.ready.insert(id, ready);
        Ok(id)
    }

    unsafe fn replay(&self, graph: GraphId) -> Result<(), DeviceError> {
        self.not_recording("another recording was replayed meanwhile")?;
        let ready = lock(&self.graphs).ready.get(&graph).copied();
        let ready = ready.ok_or(DeviceError::Recording("one that is gone was replayed"))?;
        self.not_a_launch();
        // SAFETY: the graph is there, and the caller promises what it points to.
        self.checked(unsafe { result::graph::launch(ready, self.stream) })
    }

    fn free_recording(&self, graph: GraphId) {
        let Some(ready) = lock(&self.graphs).ready.remove(&graph) else {
            return;
        };
        // It may still be running.
        if self.synchronize().is_ok() {
            // SAFETY: it is nobody's any more.
            let _ = unsafe { result::graph::exec_destroy(ready) };
        }
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        self.not_recording("the host waited meanwhile")?;
        // SAFETY: the stream lives as long as the `Gpu`.
        let result = unsafe { result::stream::synchronize(self.stream) };
        result.map_err(|error| match driver(error) {
            DeviceError::Driver(text) => self.fail(DeviceError::Fault(text)),
            other => self.fail(other),
        })
    }

    fn tile_map(
        &self,
        matrix: Address,
        (rows, stride): (usize, usize),
        tile_rows: usize,
    ) -> Result<Option<TileMap>, DeviceError> {
        use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR;
        self.enter()?;
        if attribute(self.device, MAJOR)? != 9 {
            return Ok(None);
        }
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let row_bytes = stride * size_of::<half::bf16>();
        let (sizes, strides) = ([stride as u64, rows as u64], [row_bytes as u64]);
        let (tile, steps) = ([TILE_NUMBERS as u32, tile_rows as u32], [1u32, 1]);
        // SAFETY: the arrays have as many entries as two dimensions want; the matrix is only described.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                matrix as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        result.result().map_err(driver)?;
        Ok(Some(map.opaque))
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn max_shared_bytes(&self) -> u32 {
        self.max_shared_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever this machine has, a GPU that it has not is refused with one line.
    #[test]
    fn a_gpu_that_is_not_there_is_refused() {
        let error = Gpu::open(999).err().unwrap();
        let refused = matches!(
            error,
            DeviceError::NoDriver | DeviceError::NoSuchDevice { ordinal: 999, .. }
        );
        assert!(refused, "{error}");
        assert_eq!(error.to_string().lines().count(), 1);
    }
}
