//! Weights in the layout that the matmul reads: the stored numbers, their order changed.
//!
//! A matrix `[out_features, in_features]` is cut into panels of sixteen outputs. Within a panel the
//! inputs follow each other, and of each input its sixteen outputs lie side by side: one vector. So
//! every output is a plain chain of multiply-adds along `in_features`, in the same order for one row
//! as for a hundred, and a panel is read from front to back.
//!
//! Formats keep the bits of the file; a block (as many inputs as share a scale) becomes
//!
//! | format | inputs | layout, × 16 outputs each | bytes |
//! | --- | --- | --- | --- |
//! | F32, F16, BF16 | 8 | numbers | 32·16, 16·16 |
//! | Q8_0 | 32 | scale f16, 32 codes i8 | 34·16 |
//! | Q4_0, Q4_1 | 32 | scale f16, (minimum f16,) 4 words of 8 nibbles | 18·16, 20·16 |
//! | Q5_0, Q5_1 | 32 | the same, then 1 word of 32 fifth bits | 22·16, 24·16 |
//! | Q4_K, Q5_K | 256 | d f16, dmin f16, then 8 × (scale u8, minimum u8, nibbles(, fifth bits)) | 148·16, 180·16 |
//! | Q6_K | 256 | d f16, then 16 × (scale i8, 2 words of nibbles, 1 word of 2-bit upper parts) | 210·16 |

use super::rows::Aligned;
use super::simd::{Isa, Kernel, LANES, Simd};
use super::team::Team;
use crate::model::tensor::{Dtype, Tensor};
use std::marker::PhantomData;

/// Evaluates an expression with a type alias for the format of a dtype.
macro_rules! with_format {
    ($dtype:expr, $format:ident => $body:expr) => {
        with_format!(@arms $dtype, $format => $body;
            F32 F32, F16 F16, BF16 BF16, Q8_0 Q8, Q4_0 Q4Symmetric, Q4_1 Q4Minimum,
            Q5_0 Q5Symmetric, Q5_1 Q5Minimum, Q4K Q4K, Q5K Q5K, Q6K Q6K)
    };
    (@arms $dtype:expr, $format:ident => $body:expr; $($variant:ident $name:ident),*) => {
        match $dtype {
            $($crate::model::tensor::Dtype::$variant => {
                type $format = $crate::backend::cpu::matrix::$name;
                $body
            })*
        }
    };
}
pub(super) use with_format;

/// Inputs that a kernel widens at a time.
pub const UNIT: usize = 8;

/// One stored matrix, packed.
pub struct Part {
    dtype: Dtype,
    out_features: usize,
    data: Aligned,
    panel_bytes: usize,
}

/// Sixteen outputs of one part.
#[derive(Clone, Copy)]
pub struct Panel {
    part: usize,
    index: usize,
    /// First column of the result that it gives.
    pub column: usize,
    /// Outputs that exist: 16, fewer in a part's last panel.
    pub columns: usize,
}

/// Weights `[out_features, in_features]` of one or more stored matrices side by side, with the same
/// inputs: query, key and value; gate and up.
pub struct Matrix {
    parts: Vec<Part>,
    in_features: usize,
    out_features: usize,
    /// What one task computes: two panels at a time. In a gated matrix panel i of the gate and panel
    /// i of the up projection, else neighbours.
    pairs: Vec<(Panel, Option<Panel>)>,
}

impl Matrix {
    /// Packs matrices with the same number of columns, whose outputs follow each other.
    pub fn pack(team: &Team, parts: &[Tensor]) -> Matrix {
        let matrix = Matrix::pack_parts(team, parts);
        let mut pairs = Vec::new();
        let mut column = 0;
        for (index, part) in matrix.parts.iter().enumerate() {
            let panels = part.panels(index, column);
            pairs.extend(panels.chunks(2).map(|two| (two[0], two.get(1).copied())));
            column += part.out_features;
        }
        Matrix { pairs, ..matrix }
    }

    /// Packs a gate and an up projection, for `activation(gate · x) ⊙ (up · x)`.
    pub fn pack_gated(team: &Team, gate: &Tensor, up: &Tensor) -> Matrix {
        let matrix = Matrix::pack_parts(team, &[gate.clone(), up.clone()]);
        let (gate, up) = (matrix.parts[0].panels(0, 0), matrix.parts[1].panels(1, 0));
        let pairs = gate.into_iter().zip(up.into_iter().map(Some)).collect();
        Matrix {
            pairs,
            out_features: matrix.parts[0].out_features,
            ..matrix
        }
    }

    fn pack_parts(team: &Team, parts: &[Tensor]) -> Matrix {
        let in_features = parts[0].columns();
        assert!(
            parts.iter().all(|part| part.columns() == in_features),
            "parts of one matrix share inputs"
        );
        let parts: Vec<Part> = parts
            .iter()
            .map(|tensor| Part::pack(team, tensor))
            .collect();
        let out_features = parts.iter().map(|part| part.out_features).sum();
        Matrix {
            parts,
            in_features,
            out_features,
            pairs: Vec::new(),
        }
    }

    pub fn in_features(&self) -> usize {
        self.in_features
    }

    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Bytes of the weights as packed.
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.data.len()).sum()
    }

    pub(super) fn pairs(&self) -> &[(Panel, Option<Panel>)] {
        &self.pairs
    }

    /// The format of a panel and its first byte.
    pub(super) fn panel(&self, panel: Panel) -> (Dtype, *const u8) {
        let part = &self.parts[panel.part];
        debug_assert!((panel.index + 1) * part.panel_bytes <= part.data.len());
        // SAFETY: a part has `out_features / 16` panels, rounded up, of `panel_bytes` each.
        (part.dtype, unsafe {
            part.data.as_ptr().add(panel.index * part.panel_bytes)
        })
    }

    /// The weights of one output, widened: a row of the matrix, an embedding.
    pub fn read_output(&self, isa: Isa, output: usize, out: &mut [f32]) {
        assert!(output < self.parts[0].out_features && out.len() == self.in_features);
        let panel = Panel {
            part: 0,
            index: output / LANES,
            column: 0,
            columns: LANES,
        };
        let (dtype, panel) = self.panel(panel);
        isa.dispatch(ReadLane {
            dtype,
            panel,
            lane: output % LANES,
            out,
        });
    }
}

/// Widens one lane of a panel.
struct ReadLane<'a> {
    dtype: Dtype,
    panel: *const u8,
    lane: usize,
    out: &'a mut [f32],
}

impl Kernel for ReadLane<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut wide = [0.0f32; UNIT * LANES];
        for (unit, out) in self.out.chunks_mut(UNIT).enumerate() {
            // SAFETY: the panel has inputs in whole units, as many as `out` needs.
            unsafe {
                widen::<S>(
                    (self.dtype, self.panel),
                    unit * UNIT,
                    UNIT,
                    wide.as_mut_ptr(),
                )
            };
            for (i, out) in out.iter_mut().enumerate() {
                *out = wide[i * LANES + self.lane];
            }
        }
    }
}

/// Widens inputs `first .. first + count` of a panel into `out`, `[count][16]`; both are whole units.
pub(super) struct Widen<F> {
    pub panel: *const u8,
    pub first: usize,
    pub count: usize,
    pub out: *mut f32,
    pub format: PhantomData<F>,
}

impl<F: Format> Kernel for Widen<F> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        unsafe {
            for unit in 0..self.count / UNIT {
                let input = self.first + unit * UNIT;
                let block = self.panel.add(input / F::BLOCK_INPUTS * F::BLOCK_BYTES);
                let weights = F::unit::<S>(block, input % F::BLOCK_INPUTS / UNIT);
                for (i, weight) in weights.into_iter().enumerate() {
                    S::store(self.out.add((unit * UNIT + i) * LANES), weight);
                }
            }
        }
    }
}

/// [`Widen`], the format chosen at run time.
///
/// # Safety
/// As [`Simd`]; the panel must have the inputs and `out` room for them.
pub(super) unsafe fn widen<S: Simd>(
    (dtype, panel): (Dtype, *const u8),
    first: usize,
    count: usize,
    out: *mut f32,
) {
    // SAFETY: passed on.
    unsafe {
        with_format!(dtype, F => S::call(Widen::<F> { panel, first, count, out, format: PhantomData }))
    }
}

impl Part {
    fn pack(team: &Team, tensor: &Tensor) -> Part {
        let (out_features, in_features) = (tensor.rows(), tensor.columns());
        let block_inputs = block_inputs(tensor.dtype);
        let panel_bytes = in_features.div_ceil(block_inputs) * block_bytes(tensor.dtype);
        let panels = out_features.div_ceil(LANES);
        let mut data = Aligned::zeroed(panels * panel_bytes);
        let chunks: Vec<std::sync::Mutex<&mut [u8]>> = data
            .bytes_mut()
            .chunks_mut(panel_bytes)
            .map(std::sync::Mutex::new)
            .collect();
        team.run(panels, |panel| {
            let Ok(mut out) = chunks[panel].lock() else {
                return;
            };
            for lane in 0..LANES.min(out_features - panel * LANES) {
                pack_row(
                    tensor.dtype,
                    tensor.row(panel * LANES + lane),
                    lane,
                    &mut out,
                );
            }
        });
        drop(chunks);
        Part {
            dtype: tensor.dtype,
            out_features,
            data,
            panel_bytes,
        }
    }

    fn panels(&self, part: usize, first_column: usize) -> Vec<Panel> {
        let panel = |index: usize| Panel {
            part,
            index,
            column: first_column + index * LANES,
            columns: LANES.min(self.out_features - index * LANES),
        };
        (0..self.out_features.div_ceil(LANES)).map(panel).collect()
    }
}

/// Inputs of a packed block.
pub const fn block_inputs(dtype: Dtype) -> usize {
    if dtype.block_len() == 1 {
        UNIT
    } else {
        dtype.block_len()
    }
}

/// Bytes of a packed block of sixteen outputs.
const fn block_bytes(dtype: Dtype) -> usize {
    LANES
        * match dtype {
            Dtype::F32 => 32,
            Dtype::F16 | Dtype::BF16 => 16,
            // Scales and minima are unpacked from 6 bits to 8: 4 bytes more than stored.
            Dtype::Q4K => 148,
            Dtype::Q5K => 180,
            _ => dtype.block_bytes(),
        }
}

/// Puts one stored row into its lane of a packed panel.
fn pack_row(dtype: Dtype, row: &[u8], lane: usize, panel: &mut [u8]) {
    // Element `index` of a run of vectors that starts at byte `at`, `size` bytes a lane.
    let lane_at = |at: usize, index: usize, size: usize| at + (index * LANES + lane) * size;
    let copy = |panel: &mut [u8], at: usize, index: usize, bytes: &[u8]| {
        panel[lane_at(at, index, bytes.len())..][..bytes.len()].copy_from_slice(bytes);
    };
    if dtype.block_len() == 1 {
        let size = dtype.block_bytes();
        for (input, bytes) in row.chunks_exact(size).enumerate() {
            copy(panel, 0, input, bytes);
        }
        return;
    }
    for (block, stored) in row.chunks_exact(dtype.block_bytes()).enumerate() {
        let panel = &mut panel[block * block_bytes(dtype)..][..block_bytes(dtype)];
        match dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 => unreachable!("handled above"),
            Dtype::Q8_0 => {
                copy(panel, 0, 0, &stored[..2]);
                for (input, code) in stored[2..].iter().enumerate() {
                    copy(panel, 2 * LANES, input, &[*code]);
                }
            }
            Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q5_0 | Dtype::Q5_1 => {
                let halves = if matches!(dtype, Dtype::Q4_1 | Dtype::Q5_1) {
                    2
                } else {
                    1
                };
                for half in 0..halves {
                    copy(panel, 0, half, &stored[2 * half..][..2]);
                }
                let fifth = matches!(dtype, Dtype::Q5_0 | Dtype::Q5_1);
                let (bits, nibbles) = stored[2 * halves..].split_at(if fifth { 4 } else { 0 });
                let code = |input: usize| nibbles[input % 16] >> (input / 16 * 4) & 15;
                for word in 0..4 {
                    copy(
                        panel,
                        2 * halves * LANES,
                        word,
                        &word_of_nibbles(|i| code(word * 8 + i)),
                    );
                }
                if fifth {
                    copy(panel, (2 * halves + 16) * LANES, 0, bits);
                }
            }
            Dtype::Q4K | Dtype::Q5K => {
                copy(panel, 0, 0, &stored[..2]);
                copy(panel, 0, 1, &stored[2..4]);
                let fifth = dtype == Dtype::Q5K;
                let (bits, nibbles) = stored[16..].split_at(if fifth { 32 } else { 0 });
                let group_bytes = (2 + 16 + if fifth { 4 } else { 0 }) * LANES;
                for group in 0..8 {
                    let at = 4 * LANES + group * group_bytes;
                    let (scale, minimum) = six_bit_pair(&stored[4..16], group);
                    copy(panel, at, 0, &[scale]);
                    copy(panel, at, 1, &[minimum]);
                    // Of each 32 bytes the low nibbles are one group, the high nibbles the next.
                    let code =
                        |input: usize| nibbles[group / 2 * 32 + input] >> (group % 2 * 4) & 15;
                    for word in 0..4 {
                        copy(
                            panel,
                            at + 2 * LANES,
                            word,
                            &word_of_nibbles(|i| code(word * 8 + i)),
                        );
                    }
                    if fifth {
                        let word =
                            (0..32).fold(0u32, |w, i| w | u32::from(bits[i] >> group & 1) << i);
                        copy(panel, at + 18 * LANES, 0, &word.to_le_bytes());
                    }
                }
            }
            Dtype::Q6K => {
                let (low, rest) = stored.split_at(128);
                let (high, rest) = rest.split_at(64);
                let (scales, d) = rest.split_at(16);
                copy(panel, 0, 0, d);
                // Inputs lie in two halves of 128; in each, four runs of 32 share bytes.
                let nibble = |input: usize| {
                    let (half, run, i) = (input / 128, input % 128 / 32, input % 32);
                    low[half * 64 + run % 2 * 32 + i] >> (run / 2 * 4) & 15
                };
                let upper = |input: usize| {
                    let (half, run, i) = (input / 128, input % 128 / 32, input % 32);
                    high[half * 32 + i] >> (run * 2) & 3
                };
                for (group, scale) in scales.iter().enumerate() {
                    let at = 2 * LANES + group * 13 * LANES;
                    copy(panel, at, 0, &[*scale]);
                    for word in 0..2 {
                        let code = |i: usize| nibble(group * 16 + word * 8 + i);
                        copy(panel, at + LANES, word, &word_of_nibbles(code));
                    }
                    let word =
                        (0..16).fold(0u32, |w, i| w | u32::from(upper(group * 16 + i)) << (2 * i));
                    copy(panel, at + 9 * LANES, 0, &word.to_le_bytes());
                }
            }
        }
    }
}

fn word_of_nibbles(code: impl Fn(usize) -> u8) -> [u8; 4] {
    (0..8)
        .fold(0u32, |word, i| word | u32::from(code(i)) << (4 * i))
        .to_le_bytes()
}

/// Scale and minimum of a group of 32 in a K-quant's twelve bytes of 6-bit numbers.
fn six_bit_pair(packed: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let low = packed[group + 4];
        (
            low & 15 | packed[group - 4] >> 6 << 4,
            low >> 4 | packed[group] >> 6 << 4,
        )
    }
}

/// How a kernel reads a packed format.
///
/// # Safety
/// As [`Simd`]; pointers must point to a packed block of the format.
pub(super) unsafe trait Format {
    const BLOCK_INPUTS: usize;
    const BLOCK_BYTES: usize;
    /// The eight weight vectors of unit `unit` (inputs `8·unit ..`) of a block, exactly as
    /// dequantisation gives them, but that scale · code + minimum is rounded once where it can be.
    unsafe fn unit<S: Simd>(block: *const u8, unit: usize) -> [S::V; UNIT];
}

macro_rules! plain_format {
    ($name:ident, $dtype:ident, $element:ty, $load:ident) => {
        pub(super) struct $name;
        // SAFETY: reads the 8 × 16 elements of a block.
        unsafe impl Format for $name {
            const BLOCK_INPUTS: usize = UNIT;
            const BLOCK_BYTES: usize = block_bytes(Dtype::$dtype);
            #[inline(always)]
            unsafe fn unit<S: Simd>(block: *const u8, _unit: usize) -> [S::V; UNIT] {
                let p = block.cast::<$element>();
                unsafe {
                    let mut out = [S::splat(0.0); UNIT];
                    for (i, out) in out.iter_mut().enumerate() {
                        *out = S::$load(p.add(i * LANES));
                    }
                    out
                }
            }
        }
    };
}
plain_format!(F32, F32, f32, load);
plain_format!(F16, F16, u16, load_f16);
plain_format!(BF16, BF16, u16, load_bf16);

pub(super) struct Q8;
// SAFETY: reads within the packed block described at the top of this file.
unsafe impl Format for Q8 {
    const BLOCK_INPUTS: usize = 32;
    const BLOCK_BYTES: usize = block_bytes(Dtype::Q8_0);
    #[inline(always)]
    unsafe fn unit<S: Simd>(block: *const u8, unit: usize) -> [S::V; UNIT] {
        unsafe {
            let scale = S::load_f16(block.cast());
            let codes = block.add(2 * LANES + unit * UNIT * LANES).cast::<i8>();
            let mut out = [scale; UNIT];
            for (i, out) in out.iter_mut().enumerate() {
                *out = S::mul(S::load_i8(codes.add(i * LANES)), scale);
            }
            out
        }
    }
}

/// Nibbles of one word a lane, with a fifth bit each where `bits` is given, times scale plus offset.
#[inline(always)]
unsafe fn nibbles<S: Simd>(
    word: S::I,
    bits: Option<S::I>,
    scale: S::V,
    offset: S::V,
) -> [S::V; UNIT] {
    unsafe {
        let mut out = [scale; UNIT];
        for (i, out) in out.iter_mut().enumerate() {
            let low = S::shift_right(word, 4 * i as u32);
            let code = match bits {
                None => S::nibble(low),
                Some(bits) => {
                    let fifth = S::shift_left(S::and(S::shift_right(bits, i as u32), 1), 4);
                    S::to_f32(S::or(S::and(low, 15), fifth))
                }
            };
            *out = S::fma(code, scale, offset);
        }
        out
    }
}

macro_rules! nibble_format {
    ($name:ident, $dtype:ident, minimum: $minimum:expr, fifth: $fifth:expr) => {
        pub(super) struct $name;
        // SAFETY: reads within the packed block described at the top of this file.
        unsafe impl Format for $name {
            const BLOCK_INPUTS: usize = 32;
            const BLOCK_BYTES: usize = block_bytes(Dtype::$dtype);
            #[inline(always)]
            unsafe fn unit<S: Simd>(block: *const u8, unit: usize) -> [S::V; UNIT] {
                const HALVES: usize = if $minimum { 2 } else { 1 };
                unsafe {
                    let scale = S::load_f16(block.cast());
                    let offset = if $minimum {
                        S::load_f16(block.cast::<u16>().add(LANES))
                    } else {
                        // Codes are stored above zero: the middle is 8, or 16 with a fifth bit.
                        S::mul(scale, S::splat(if $fifth { -16.0 } else { -8.0 }))
                    };
                    let words = block.add(2 * HALVES * LANES).cast::<u32>();
                    let bits = if $fifth {
                        let bits = S::load_u32(words.add(4 * LANES));
                        Some(S::shift_right(bits, (unit * UNIT) as u32))
                    } else {
                        None
                    };
                    nibbles::<S>(S::load_u32(words.add(unit * LANES)), bits, scale, offset)
                }
            }
        }
    };
}
nibble_format!(Q4Symmetric, Q4_0, minimum: false, fifth: false);
nibble_format!(Q4Minimum, Q4_1, minimum: true, fifth: false);
nibble_format!(Q5Symmetric, Q5_0, minimum: false, fifth: true);
nibble_format!(Q5Minimum, Q5_1, minimum: true, fifth: true);

macro_rules! k_format {
    ($name:ident, $dtype:ident, fifth: $fifth:expr) => {
        pub(super) struct $name;
        // SAFETY: reads within the packed block described at the top of this file.
        unsafe impl Format for $name {
            const BLOCK_INPUTS: usize = 256;
            const BLOCK_BYTES: usize = block_bytes(Dtype::$dtype);
            #[inline(always)]
            unsafe fn unit<S: Simd>(block: *const u8, unit: usize) -> [S::V; UNIT] {
                const GROUP_BYTES: usize = (if $fifth { 22 } else { 18 }) * LANES;
                unsafe {
                    let d = S::load_f16(block.cast());
                    let dmin = S::load_f16(block.cast::<u16>().add(LANES));
                    let group = block.add(4 * LANES + unit / 4 * GROUP_BYTES);
                    let scale = S::mul(d, S::load_u8(group));
                    let offset = S::sub(S::splat(0.0), S::mul(dmin, S::load_u8(group.add(LANES))));
                    let words = group.add(2 * LANES).cast::<u32>();
                    let bits = if $fifth {
                        let bits = S::load_u32(words.add(4 * LANES));
                        Some(S::shift_right(bits, (unit % 4 * UNIT) as u32))
                    } else {
                        None
                    };
                    nibbles::<S>(
                        S::load_u32(words.add(unit % 4 * LANES)),
                        bits,
                        scale,
                        offset,
                    )
                }
            }
        }
    };
}
k_format!(Q4K, Q4K, fifth: false);
k_format!(Q5K, Q5K, fifth: true);

pub(super) struct Q6K;
// SAFETY: reads within the packed block described at the top of this file.
unsafe impl Format for Q6K {
    const BLOCK_INPUTS: usize = 256;
    const BLOCK_BYTES: usize = block_bytes(Dtype::Q6K);
    #[inline(always)]
    unsafe fn unit<S: Simd>(block: *const u8, unit: usize) -> [S::V; UNIT] {
        unsafe {
            let group = block.add(2 * LANES + unit / 2 * 13 * LANES);
            let scale = S::mul(S::load_f16(block.cast()), S::load_i8(group.cast()));
            let offset = S::mul(scale, S::splat(-32.0));
            let words = group.add(LANES).cast::<u32>();
            let word = S::load_u32(words.add(unit % 2 * LANES));
            let upper = S::shift_right(S::load_u32(words.add(2 * LANES)), (unit % 2 * 16) as u32);
            let mut out = [scale; UNIT];
            for (i, out) in out.iter_mut().enumerate() {
                let low = S::and(S::shift_right(word, 4 * i as u32), 15);
                let high = S::shift_left(S::and(S::shift_right(upper, 2 * i as u32), 3), 4);
                *out = S::fma(S::to_f32(S::or(low, high)), scale, offset);
            }
            out
        }
    }
}
