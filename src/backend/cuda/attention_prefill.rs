//! `kernels/attention_prefill.cu`; its tests are those of [`attention_plan`](super::attention_plan).

use super::attention_plan::Inputs;
use super::device::{Buffer, Device, DeviceError, Launch, Plain, Slice};
use crate::arguments;

const THREADS: u32 = 128;

/// `PrefillJob` of the kernel, field for field.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct PrefillJob {
    /// Rows of the sequence in this batch.
    pub first_row: u32,
    pub rows: u32,
    /// Which 64 of their queries.
    pub tile: u32,
    /// Where in the table of pages the sequence begins.
    pub table: u32,
    /// Tokens before the first row.
    pub start: u32,
    pub padding: [u32; 3],
}
// SAFETY: eight integers of one size.
unsafe impl Plain for PrefillJob {}

/// Rows of prompts against the prompt up to each of them: `out` [rows, heads · head_dim].
pub fn attention_prefill(
    device: &dyn Device,
    inputs: &Inputs,
    jobs: Slice<PrefillJob>,
    out: &Buffer<f32>,
) -> Result<(), DeviceError> {
    let (kernel, shared_bytes) = inputs.kernel("attention_prefill", usize::MAX);
    let shape = inputs.shape;
    let mut arguments = arguments![
        inputs.qkv,
        inputs.pages,
        jobs,
        inputs.scores.scale,
        inputs.scores.softcap.unwrap_or(0.0),
        inputs.scores.window_or_none(),
        shape.heads as u32,
        shape.kv_heads as u32,
        shape.head_dim as u32,
        inputs.layer_offset(),
        out,
    ];
    let launch = Launch {
        grid: [jobs.len() as u32, shape.kv_heads as u32, 1],
        block: THREADS,
        shared_bytes,
    };
    // SAFETY: as the kernel's head says.
    unsafe { device.launch(&kernel, launch, &mut arguments) }
}
