//! `kernels/attention_merge.cu`; its tests are those of [`attention_plan`](super::attention_plan).

use super::attention_plan::Parts;
use super::device::{Buffer, Device, DeviceError, Launch, Plain, Slice};
use crate::arguments;
use crate::backend::KvShape;

const WARPS: usize = 4;

/// `MergedRow` of the kernel, field for field.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct MergedRow {
    pub row: u32,
    /// The first part of the prefix, how far apart they are, and how many.
    pub prefix_slot: u32,
    pub prefix_step: u32,
    pub prefix_parts: u32,
    /// Parts of the own tokens, side by side.
    pub own_slot: u32,
    pub own_parts: u32,
    pub padding: [u32; 2],
}
// SAFETY: eight integers of one size.
unsafe impl Plain for MergedRow {}

/// Rows' attention from its parts: `out` [rows, heads · head_dim].
pub fn attention_merge(
    device: &dyn Device,
    rows: Slice<MergedRow>,
    parts: &Parts,
    shape: KvShape,
    out: &Buffer<f32>,
) -> Result<(), DeviceError> {
    let mut arguments = arguments![
        rows,
        parts.statistics,
        parts.totals,
        shape.heads as u32,
        shape.head_dim as u32,
        out,
    ];
    let mut launch = Launch::blocks(rows.len(), 32 * WARPS as u32);
    launch.grid[1] = shape.heads.div_ceil(WARPS) as u32;
    // SAFETY: as the kernel's head says.
    unsafe { device.launch("attention_merge", launch, &mut arguments) }
}
