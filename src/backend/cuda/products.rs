//! The products of the forward pass: their inputs in bfloat16, and which kernel multiplies which rows.

use super::backend::{Cuda, Rows, lock};
use super::device::{Buffer, DeviceError, Slice};
use super::matmul::{Epilogue, Operands, Shape, matmul};
use super::matmul_wgmma::matmul_wgmma;
use super::matrix::Matrix;
use super::norm::{norm_add, norm_rows, round_rows};
use super::plan::{Plan, Run};
use crate::backend::Norm;
use half::bf16;

/// What the memory between two kernels of an operation is for.
const SCRATCH: &str = "intermediate results";

/// The rows of a product.
#[derive(Clone, Copy)]
pub(super) enum Of<'a> {
    /// All rows of a batch.
    Batch(&'a Plan),
    /// Those whose logits are computed, be they prompts' or candidates'.
    These(Slice<u32>),
}

impl Of<'_> {
    fn rows(self) -> usize {
        match self {
            Of::Batch(plan) => plan.rows,
            Of::These(rows) => rows.len(),
        }
    }
}

impl Cuda {
    /// `out = epilogue(inputs · weightᵀ + bias)`. In a layer, the runs of prompts' rows go through
    /// `matmul_wgmma` where the matrix has tiles for it. (Steps that are recorded have none of these rows,
    /// so that no tiles are made meanwhile.)
    fn product(
        &self,
        of: Of,
        inputs: &Buffer<bf16>,
        weight: &Matrix,
        bias: Option<&Buffer<f32>>,
        epilogue: Epilogue,
        out: &Buffer<f32>,
    ) -> Result<(), DeviceError> {
        let device = &*self.device;
        let operands = Operands {
            x: inputs,
            weight: &weight.weight,
            bias,
            epilogue,
            shape: Shape {
                first_row: 0,
                rows: of.rows(),
                out_features: weight.out_features,
                stride: weight.stride,
                width: weight.width,
            },
            out,
        };
        let (Of::Batch(plan), Some(of_weight)) = (of, &weight.tiles) else {
            return matmul(device, &operands);
        };
        let mut input_tiles = lock(&self.input_tiles);
        for Run { rows, of_prompts } in &plan.runs {
            let operands = operands.of(rows.clone());
            let of_inputs = match of_prompts {
                true => input_tiles.get(&self.device, inputs, weight.stride)?,
                false => None,
            };
            match of_inputs {
                Some(of_inputs) => matmul_wgmma(device, &operands, (of_inputs, of_weight)),
                None => matmul(device, &operands),
            }?;
        }
        Ok(())
    }

    /// `out = epilogue(norm(x) · weightᵀ + bias)`
    pub(super) fn norm_product(
        &self,
        (x, of): (&Rows, Of),
        norm: Norm<Buffer<f32>>,
        weight: &Matrix,
        bias: Option<&Buffer<f32>>,
        epilogue: Epilogue,
        out: &Rows,
    ) {
        let rows = of.rows();
        if rows == 0 {
            return;
        }
        self.run(|| {
            let mut scratch = lock(&self.inputs);
            let len = rows * weight.stride;
            let inputs = scratch.at_least(&self.device, &self.layout, len, SCRATCH)?;
            let chosen = match of {
                Of::Batch(_) => None,
                Of::These(rows) => Some(rows),
            };
            norm_rows(
                &*self.device,
                x.buffer(),
                chosen,
                norm.weight,
                norm.epsilon,
                (rows, x.width(), weight.stride),
                inputs,
            )?;
            self.product(of, inputs, weight, bias, epilogue, out.buffer())
        });
    }

    /// `residual += x · weightᵀ + bias`, or, with a norm, `residual += norm(x · weightᵀ + bias)`
    pub(super) fn product_add(
        &self,
        (x, plan): (&Rows, &Plan),
        weight: &Matrix,
        bias: Option<&Buffer<f32>>,
        norm: Option<Norm<Buffer<f32>>>,
        residual: &Rows,
    ) {
        let (of, rows) = (Of::Batch(plan), plan.rows);
        if rows == 0 {
            return;
        }
        self.run(|| {
            let (device, residual) = (&*self.device, residual.buffer());
            let mut scratch = lock(&self.inputs);
            let len = rows * weight.stride;
            let inputs = scratch.at_least(&self.device, &self.layout, len, SCRATCH)?;
            let shape = (rows, x.width(), weight.stride);
            round_rows(device, x.buffer(), shape, inputs)?;
            let Some(norm) = norm else {
                return self.product(of, inputs, weight, bias, Epilogue::Add, residual);
            };
            let mut scratch = lock(&self.unfinished);
            let len = rows * weight.width;
            let product = scratch.at_least(&self.device, &self.layout, len, SCRATCH)?;
            self.product(of, inputs, weight, bias, Epilogue::Store, product)?;
            let shape = (rows, weight.width);
            norm_add(device, product, norm.weight, norm.epsilon, shape, residual)
        });
    }
}
