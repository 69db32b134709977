//! `kernels/attention_suffix.cu`; its tests are those of [`attention_plan`](super::attention_plan).

use super::attention_plan::{Inputs, Parts};
use super::device::{Device, DeviceError, Launch, Plain, Slice};
use crate::arguments;

const THREADS: u32 = 32;
/// Query heads of a block.
const QUERIES: usize = 16;
/// Keys at a time, at most.
const MOST_KEYS: usize = 32;

/// `SuffixJob` of the kernel, field for field.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct SuffixJob {
    pub row: u32,
    /// Its part's place.
    pub slot: u32,
    /// The prefix's tokens that belong to this job: all or none.
    pub prefix_table: u32,
    pub prefix: u32,
    /// The run of own tokens.
    pub table: u32,
    pub first: u32,
    pub end: u32,
    /// Tokens of the prefix that are not this job's.
    pub hidden: u32,
}
// SAFETY: eight integers of one size.
unsafe impl Plain for SuffixJob {}

/// Rows' queries against runs of their own tokens: a part of each query.
pub fn attention_suffix(
    device: &dyn Device,
    inputs: &Inputs,
    jobs: Slice<SuffixJob>,
    parts: &Parts,
) -> Result<(), DeviceError> {
    let (kernel, shared_bytes) = inputs.kernel("attention_suffix", MOST_KEYS);
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
    let tiles = (shape.heads / shape.kv_heads).div_ceil(QUERIES);
    let launch = Launch {
        grid: [jobs.len() as u32, shape.kv_heads as u32, tiles as u32],
        block: THREADS,
        shared_bytes,
    };
    // SAFETY: as the kernel's head says.
    unsafe { device.launch(&kernel, launch, &mut arguments) }
}
