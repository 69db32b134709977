//! `kernels/attention_prefix.cu`; its tests are those of [`attention_plan`](super::attention_plan).

use super::attention_plan::{Inputs, Parts};
use super::device::{Device, DeviceError, Launch, Plain, Slice};
use crate::arguments;

const THREADS: u32 = 128;

/// `PrefixJob` of the kernel, field for field.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct PrefixJob {
    /// Rows of the group.
    pub first_row: u32,
    pub rows: u32,
    /// Which 64 of its queries.
    pub tile: u32,
    /// Where in the table of pages the prefix begins.
    pub table: u32,
    /// Tokens of the run.
    pub first: u32,
    pub end: u32,
    /// Of the group's first row among the parts.
    pub slot: u32,
    pub padding: u32,
}
// SAFETY: eight integers of one size.
unsafe impl Plain for PrefixJob {}

/// A group's queries against runs of its prefix: a part of each query.
pub fn attention_prefix(
    device: &dyn Device,
    inputs: &Inputs,
    jobs: Slice<PrefixJob>,
    parts: &Parts,
) -> Result<(), DeviceError> {
    let (kernel, shared_bytes) = inputs.kernel("attention_prefix", usize::MAX);
    let shape = inputs.shape;
    let mut arguments = arguments![
        inputs.qkv,
        inputs.pages,
        jobs,
        inputs.positions,
        inputs.scores.scale,
        inputs.scores.softcap.unwrap_or(0.0),
        inputs.scores.window_or_none(),
        shape.heads as u32,
        shape.kv_heads as u32,
        shape.head_dim as u32,
        inputs.layer_offset(),
        parts.statistics,
        parts.totals,
    ];
    let launch = Launch {
        grid: [jobs.len() as u32, shape.kv_heads as u32, 1],
        block: THREADS,
        shared_bytes,
    };
    // SAFETY: as the kernel's head says.
    unsafe { device.launch(&kernel, launch, &mut arguments) }
}
