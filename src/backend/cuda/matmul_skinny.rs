//! `kernels/matmul_skinny.cu`; its tests are those of [`matmul`](super::matmul).

use super::device::{Device, DeviceError, Launch};
use super::matmul::Operands;
use super::weights::{Form, STEP};
use half::bf16;

const THREADS: u32 = 256;
const OUTPUTS: usize = 32;
const SLICES: usize = 4;

/// Rows of a block and stages of its ring, as the kernels are built.
type Kernels = [(usize, usize, &'static str); 5];
const BF16: Kernels = [
    (8, 6, "matmul_skinny_8"),
    (16, 6, "matmul_skinny_16"),
    (32, 5, "matmul_skinny_32"),
    (64, 4, "matmul_skinny_64"),
    (128, 2, "matmul_skinny_128"),
];
const INT8: Kernels = [
    (8, 8, "matmul_skinny_int8_8"),
    (16, 8, "matmul_skinny_int8_16"),
    (32, 6, "matmul_skinny_int8_32"),
    (64, 3, "matmul_skinny_int8_64"),
    (128, 2, "matmul_skinny_int8_128"),
];
const FP8: Kernels = [
    (8, 8, "matmul_skinny_fp8_8"),
    (16, 8, "matmul_skinny_fp8_16"),
    (32, 6, "matmul_skinny_fp8_32"),
    (64, 4, "matmul_skinny_fp8_64"),
    (128, 2, "matmul_skinny_fp8_128"),
];

/// Rows for which weights are read once.
pub const MAX_ROWS: usize = 128;

/// `out = epilogue(x · weightᵀ + bias)`, for few rows.
pub fn matmul_skinny(device: &dyn Device, operands: &Operands) -> Result<(), DeviceError> {
    let (shape, form) = (operands.shape, operands.weight.form());
    let kernels = match form {
        Form::Bf16 => &BF16,
        Form::Int8 => &INT8,
        Form::Fp8 => &FP8,
    };
    let fits = kernels.iter().find(|(rows, ..)| shape.rows <= *rows);
    let &(rows, stages, kernel) = fits.unwrap_or(&kernels[kernels.len() - 1]);
    let mut launch = Launch::blocks(shape.out_features.div_ceil(OUTPUTS), THREADS);
    launch.grid[1] = shape.rows.div_ceil(rows) as u32;
    let stage = OUTPUTS * form.stage_bytes() + rows * STEP * size_of::<bf16>();
    // The ring, or the partial sums that take its place.
    let partial = SLICES * rows * (OUTPUTS + 4) * size_of::<f32>();
    launch.shared_bytes = (stages * stage).max(partial) as u32;
    // SAFETY: as the kernel's head says.
    unsafe { device.launch(kernel, launch, &mut operands.arguments()) }
}
