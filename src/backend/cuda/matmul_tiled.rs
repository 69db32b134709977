//! `kernels/matmul_tiled.cu`; its tests are those of [`matmul`](super::matmul).

use super::device::{Device, DeviceError, Launch};
use super::matmul::Operands;
use super::weights::{Form, STEP};
use half::bf16;

const THREADS: u32 = 256;
const OUTPUTS: usize = 128;
const ROWS: usize = 64;

/// Stages of the ring, as the kernels are built.
type Kernel = (usize, &'static str);
/// The most that a block has memory for.
const BF16: [Kernel; 2] = [(3, "matmul_tiled_3"), (2, "matmul_tiled_2")];
const INT8: [Kernel; 1] = [(3, "matmul_tiled_int8")];
const FP8: [Kernel; 1] = [(3, "matmul_tiled_fp8")];

/// `out = epilogue(x · weightᵀ + bias)`, for many rows.
pub fn matmul_tiled(device: &dyn Device, operands: &Operands) -> Result<(), DeviceError> {
    let (shape, form) = (operands.shape, operands.weight.form());
    let kernels: &[Kernel] = match form {
        Form::Bf16 => &BF16,
        Form::Int8 => &INT8,
        Form::Fp8 => &FP8,
    };
    let stage = OUTPUTS * form.stage_bytes() + ROWS * STEP * size_of::<bf16>();
    let bytes = |stages: usize| (stages * stage) as u32;
    let available = device.max_shared_bytes();
    let fits = kernels
        .iter()
        .find(|(stages, _)| bytes(*stages) <= available);
    let &(stages, kernel) = fits.unwrap_or(&kernels[kernels.len() - 1]);
    let mut launch = Launch::blocks(shape.rows.div_ceil(ROWS), THREADS);
    launch.grid[1] = shape.out_features.div_ceil(OUTPUTS) as u32;
    launch.shared_bytes = bytes(stages);
    // SAFETY: as the kernel's head says.
    unsafe { device.launch(kernel, launch, &mut operands.arguments()) }
}
