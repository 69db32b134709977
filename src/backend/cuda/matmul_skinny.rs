//! `kernels/matmul_skinny.cu`; its tests are those of [`matmul`](super::matmul).

use super::device::{Device, DeviceError, Launch};
use super::matmul::Operands;
use half::bf16;

const THREADS: u32 = 256;
const OUTPUTS: usize = 32;
const STEP: usize = 128;
/// Rows of a block and stages of its ring, as the kernels are built.
const FORMS: [(usize, usize, &str); 5] = [
    (8, 6, "matmul_skinny_8"),
    (16, 6, "matmul_skinny_16"),
    (32, 5, "matmul_skinny_32"),
    (64, 4, "matmul_skinny_64"),
    (128, 2, "matmul_skinny_128"),
];

/// Rows for which weights are read once.
pub const MAX_ROWS: usize = 128;

/// `out = epilogue(x · weightᵀ + bias)`, for few rows.
pub fn matmul_skinny(device: &dyn Device, operands: &Operands) -> Result<(), DeviceError> {
    let shape = operands.shape;
    let fits = FORMS.iter().find(|(rows, ..)| shape.rows <= *rows);
    let &(rows, stages, kernel) = fits.unwrap_or(&FORMS[FORMS.len() - 1]);
    let mut launch = Launch::blocks(shape.out_features.div_ceil(OUTPUTS), THREADS);
    launch.grid[1] = shape.rows.div_ceil(rows) as u32;
    launch.shared_bytes = (stages * (OUTPUTS + rows) * STEP * size_of::<bf16>()) as u32;
    // SAFETY: as the kernel's head says.
    unsafe { device.launch(kernel, launch, &mut operands.arguments()) }
}
