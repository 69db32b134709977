//! A GPU, through NVIDIA's driver, which is loaded when the first is opened: the binary starts without
//! one.

use super::device::{Address, Arguments, Device, DeviceError, Launch};
use super::images::{architectures, best_for};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, MutexGuard};

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
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

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
        };
        gpu.enter()?;
        gpu.stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(driver)?;
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
                let _ = result::stream::destroy(self.stream);
            }
            for &module in &self.modules {
                let _ = result::module::unload(module);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

impl Device for Gpu {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn allocate(&self, bytes: usize, what: &str) -> Result<Address, DeviceError> {
        self.enter()?;
        // SAFETY: the stream lives as long as the `Gpu`.
        match unsafe { result::malloc_async(self.stream, bytes.max(1)) } {
            Ok(address) => Ok(address),
            Err(DriverError(sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY)) => {
                Err(DeviceError::OutOfMemory {
                    what: what.to_string(),
                    needed: bytes,
                    free: result::mem_get_info().map_or(0, |(free, _)| free),
                })
            }
            Err(error) => Err(self.fail(driver(error))),
        }
    }

    unsafe fn free(&self, address: Address) {
        if self.enter().is_ok() {
            // SAFETY: the caller's promise; the stream frees it behind the launches that use it.
            let _ = unsafe { result::free_async(address, self.stream) };
        }
    }

    fn upload(&self, from: &[u8], to: Address) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: `Buffer` has checked the length; pageable memory is staged before the call returns.
        self.checked(unsafe { result::memcpy_htod_async(to, from, self.stream) })
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: `Buffer` has checked the length, and `to` is not left before the copy has ended.
        self.checked(unsafe { result::memcpy_dtoh_async(to, from, self.stream) })?;
        self.synchronize()
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: the caller's addresses, on one device.
        self.checked(unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) })
    }

    fn zero(&self, at: Address, bytes: usize) -> Result<(), DeviceError> {
        self.enter()?;
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
        let [x, y, z] = launch.grid;
        // SAFETY: the caller's promise about the arguments.
        let result = unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (launch.block, 1, 1),
                launch.shared_bytes,
                self.stream,
                arguments.pointers(),
            )
        };
        match result {
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

    fn synchronize(&self) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: the stream lives as long as the `Gpu`.
        let result = unsafe { result::stream::synchronize(self.stream) };
        result.map_err(|error| match driver(error) {
            DeviceError::Driver(text) => self.fail(DeviceError::Fault(text)),
            other => self.fail(other),
        })
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
