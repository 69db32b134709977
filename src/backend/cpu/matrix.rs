//! Weights in the layout that the matmul reads: the stored numbers, their order changed.
//!
//! A matrix `[out_features, in_features]` is cut into panels of sixteen outputs. Within a panel the
//! inputs follow each other, and of each input its sixteen outputs lie side by side: one vector. So
//! every output is a plain chain of multiply-adds along `in_features`, in the same order for one row
//! as for a hundred, and a panel is read from front to back.
//!
//! The formats keep the bits of the file: `format.rs` has their layouts, `packing.rs` makes them. Or
//! numbers of sixteen bits become halves: `halves.rs`.

use super::format::{Format, Packed, UNIT};
use super::halves;
use super::inputs::Form;
use super::packing::pack_row;
use super::rows::Aligned;
use super::simd::{Isa, Kernel, LANES, Simd};
use super::team::Team;
use crate::model::tensor::Tensor;
use std::marker::PhantomData;

/// Evaluates an expression with a type alias for the format of a dtype.
macro_rules! with_format {
    ($packed:expr, $format:ident => $body:expr) => {
        with_format!(@arms $packed, $format => $body;
            Halves; F32 F32, F16 F16, BF16 BF16, Q8_0 Q8, Q4_0 Q4Symmetric, Q4_1 Q4Minimum,
            Q5_0 Q5Symmetric, Q5_1 Q5Minimum, Q4K Q4K, Q5K Q5K, Q6K Q6K)
    };
    (codes $packed:expr, $format:ident => $body:expr, else $other:expr) => {
        with_format!(@arms $packed, $format => $body;
            ; Q8_0 Q8, Q4_0 Q4Symmetric, Q4_1 Q4Minimum,
            Q5_0 Q5Symmetric, Q5_1 Q5Minimum, Q4K Q4K, Q5K Q5K, Q6K Q6K; _ => $other)
    };
    (plain $packed:expr, $format:ident => $body:expr, else $other:expr) => {
        with_format!(@arms $packed, $format => $body; ; F32 F32, F16 F16, BF16 BF16; _ => $other)
    };
    (@arms $packed:expr, $format:ident => $body:expr; $($halves:ident)?;
            $($variant:ident $name:ident),* $(; _ => $other:expr)?) => {
        match $packed {
            $($crate::backend::cpu::format::Packed::$halves => {
                type $format = $crate::backend::cpu::format::$halves;
                $body
            })?
            $($crate::backend::cpu::format::Packed::Stored($crate::model::tensor::Dtype::$variant) => {
                type $format = $crate::backend::cpu::format::$name;
                $body
            })*
            $(_ => $other)?
        }
    };
}
pub(super) use with_format;

/// One stored matrix, packed.
pub struct Part {
    packed: Packed,
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
    /// Packs matrices with the same number of columns, whose outputs follow each other; numbers of
    /// sixteen bits as they are, or as `halves`.
    pub fn pack(team: &Team, parts: &[Tensor], halves: bool) -> Matrix {
        let matrix = Matrix::pack_parts(team, parts, halves);
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
    pub fn pack_gated(team: &Team, gate: &Tensor, up: &Tensor, halves: bool) -> Matrix {
        let matrix = Matrix::pack_parts(team, &[gate.clone(), up.clone()], halves);
        let (gate, up) = (matrix.parts[0].panels(0, 0), matrix.parts[1].panels(1, 0));
        let pairs = gate.into_iter().zip(up.into_iter().map(Some)).collect();
        Matrix {
            pairs,
            out_features: matrix.parts[0].out_features,
            ..matrix
        }
    }

    fn pack_parts(team: &Team, parts: &[Tensor], halves: bool) -> Matrix {
        let in_features = parts[0].columns();
        assert!(
            parts.iter().all(|part| part.columns() == in_features),
            "parts of one matrix share inputs"
        );
        let parts: Vec<Part> = parts
            .iter()
            .map(|tensor| Part::pack(team, tensor, halves))
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

    /// What inputs become for its products: whole numbers only where it has nothing but codes, and
    /// `integers` says so, or nothing but halves.
    pub fn form(&self, integers: bool) -> Form {
        let all = |is: fn(Packed) -> bool| self.parts.iter().all(|part| is(part.packed));
        if all(|packed| packed == Packed::Halves) {
            Form::Halves
        } else if integers && all(|packed| packed.codes().is_some()) {
            Form::Quantised
        } else {
            Form::Float
        }
    }

    /// Whether all weights are numbers of one format.
    pub(super) fn is_plain(&self) -> bool {
        let packed = self.parts[0].packed;
        matches!(packed, Packed::Stored(_))
            && packed.codes().is_none()
            && self.parts.iter().all(|part| part.packed == packed)
    }

    pub(super) fn pairs(&self) -> &[(Panel, Option<Panel>)] {
        &self.pairs
    }

    /// The format of a panel and its first byte.
    pub(super) fn panel(&self, panel: Panel) -> (Packed, *const u8) {
        let part = &self.parts[panel.part];
        debug_assert!((panel.index + 1) * part.panel_bytes <= part.data.len());
        // SAFETY: a part has `out_features / 16` panels, rounded up, of `panel_bytes` each.
        (part.packed, unsafe {
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
        let (packed, panel) = self.panel(panel);
        isa.dispatch(ReadLane {
            packed,
            panel,
            lane: output % LANES,
            out,
        });
    }
}

/// Widens one lane of a panel.
struct ReadLane<'a> {
    packed: Packed,
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
                    (self.packed, self.panel),
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
    (packed, panel): (Packed, *const u8),
    first: usize,
    count: usize,
    out: *mut f32,
) {
    // SAFETY: passed on.
    unsafe {
        with_format!(packed, F => S::call(Widen::<F> { panel, first, count, out, format: PhantomData }))
    }
}

impl Part {
    fn pack(team: &Team, tensor: &Tensor, halves: bool) -> Part {
        let (out_features, in_features) = (tensor.rows(), tensor.columns());
        let packed = match halves {
            true => halves::packed(tensor.dtype, in_features),
            false => Packed::Stored(tensor.dtype),
        };
        let panel_bytes = packed.bytes(in_features);
        let panels = out_features.div_ceil(LANES);
        let mut data = Aligned::kept(panels * panel_bytes);
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
                let row = tensor.row(panel * LANES + lane);
                match packed {
                    Packed::Halves => halves::pack_row(tensor.dtype, row, lane, &mut out),
                    Packed::Stored(dtype) => pack_row(dtype, row, lane, &mut out),
                }
            }
        });
        drop(chunks);
        Part {
            packed,
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
