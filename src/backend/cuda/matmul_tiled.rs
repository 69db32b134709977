//! `kernels/matmul_tiled.cu`; its tests are those of [`matmul`](super::matmul).

use super::device::{Device, DeviceError, Launch};
use super::matmul::Operands;
use half::bf16;

const THREADS: u32 = 256;
const OUTPUTS: usize = 128;
const ROWS: usize = 64;
const STEP: usize = 128;
/// Stages of the ring, as the kernels are built: the most that a block has memory for.
const FORMS: [(usize, &str); 2] = [(3, "matmul_tiled_3"), (2, "matmul_tiled_2")];

/// `out = epilogue(x · weightᵀ + bias)`, for many rows.
pub fn matmul_tiled(device: &dyn Device, operands: &Operands) -> Result<(), DeviceError> {
    let shape = operands.shape;
    let bytes = |stages: usize| (stages * (OUTPUTS + ROWS) * STEP * size_of::<bf16>()) as u32;
    let available = device.max_shared_bytes();
    let fits = FORMS.iter().find(|(stages, _)| bytes(*stages) <= available);
    let &(stages, kernel) = fits.unwrap_or(&FORMS[FORMS.len() - 1]);
    let mut launch = Launch::blocks(shape.rows.div_ceil(ROWS), THREADS);
    launch.grid[1] = shape.out_features.div_ceil(OUTPUTS) as u32;
    launch.shared_bytes = bytes(stages);
    // SAFETY: as the kernel's head says.
    unsafe { device.launch(kernel, launch, &mut operands.arguments()) }
}
