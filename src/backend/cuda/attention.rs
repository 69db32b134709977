//! `kernels/attention.cu`

use super::device::{Address, Buffer, Device, DeviceError, Launch};
use super::rope_append::{head_stride, layer_len};
use crate::arguments;
use crate::backend::KvShape;

const WARPS: usize = 4;

/// What the rows of a batch attend to.
pub struct Spans<'a> {
    pub rows: usize,
    /// Pages of prefixes and of the rows' own tokens.
    pub pages: &'a Buffer<Address>,
    /// Four numbers a row: where in `pages` the prefix begins, and its tokens; the same of the own
    /// tokens, the row's the last of them.
    pub spans: &'a Buffer<u32>,
}

/// The numbers of a layer's attention.
#[derive(Clone, Copy, Debug)]
pub struct Scores {
    pub scale: f32,
    pub softcap: Option<f32>,
    pub window: Option<usize>,
}

/// `out[row] = softmax(scale · q · keysᵀ) · values`: `qkv` [rows, (heads + 2 · kv_heads) · head_dim],
/// rotated; `out` [rows, heads · head_dim].
pub fn attention(
    device: &dyn Device,
    qkv: &Buffer<f32>,
    spans: &Spans,
    scores: Scores,
    shape: KvShape,
    layer: usize,
    out: &Buffer<f32>,
) -> Result<(), DeviceError> {
    let window = scores.window.unwrap_or(0);
    let mut arguments = arguments![
        qkv,
        spans.pages,
        spans.spans,
        scores.scale,
        scores.softcap.unwrap_or(0.0),
        u32::try_from(window).unwrap_or(0),
        shape.heads as u32,
        shape.kv_heads as u32,
        shape.head_dim as u32,
        head_stride(shape) as u32,
        (layer * layer_len(shape)) as u64,
        out,
    ];
    let mut launch = Launch::blocks(spans.rows, 32 * WARPS as u32);
    launch.grid[1] = shape.heads.div_ceil(WARPS) as u32;
    launch.shared_bytes = (WARPS * (head_stride(shape) + 32) * size_of::<f32>()) as u32;
    // SAFETY: as the kernel's head says.
    unsafe { device.launch("attention", launch, &mut arguments) }
}
