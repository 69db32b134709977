//! What training computes row by row: norms, softmax, GELU, and their derivatives.
//!
//! Rows are whole vectors of [`LANES`], one after the other. Sums over a row add lanes in a fixed
//! tree, sums over rows go from the first to the last.

use crate::backend::cpu::simd::{Isa, Kernel, LANES, Simd};

/// Added to the variance, as in the formulas of `docs/RANKER.md`.
const NORM_EPSILON: f32 = 1e-5;

/// Layer normalisation as its backward pass needs it.
pub(super) struct Normalized {
    /// `(x − mean) / deviation`, [rows, width].
    x: Vec<f32>,
    /// 1 / deviation, [rows].
    inverse: Vec<f32>,
}

/// Normalises every row of `x`; `out` gets that with gain and bias.
pub(super) fn layer_norm(
    isa: Isa,
    x: &[f32],
    gain: &[f32],
    bias: &[f32],
    out: &mut [f32],
) -> Normalized {
    let width = gain.len();
    assert!(width.is_multiple_of(LANES) && bias.len() == width && out.len() == x.len());
    let mut normalized = Normalized {
        x: vec![0.0; x.len()],
        inverse: vec![0.0; x.len() / width],
    };
    isa.dispatch(LayerNorm {
        x,
        gain,
        bias,
        out,
        normalized: &mut normalized,
    });
    normalized
}

struct LayerNorm<'a> {
    x: &'a [f32],
    gain: &'a [f32],
    bias: &'a [f32],
    out: &'a mut [f32],
    normalized: &'a mut Normalized,
}

impl Kernel for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = self.gain.len();
        let scale = 1.0 / width as f32;
        let rows = self.x.chunks_exact(width);
        let outs = self.out.chunks_exact_mut(width);
        let normalized = self.normalized.x.chunks_exact_mut(width);
        for (((x, out), to), inverse) in rows
            .zip(outs)
            .zip(normalized)
            .zip(&mut self.normalized.inverse)
        {
            // SAFETY: every access is to LANES numbers from a multiple of LANES below `width`, the
            // length of each of the rows and of gain and bias, which is a multiple of LANES.
            unsafe {
                let mut sum = S::splat(0.0);
                for at in (0..width).step_by(LANES) {
                    sum = S::add(sum, S::load(x.as_ptr().add(at)));
                }
                let mean = S::splat(S::sum(sum) * scale);
                let mut squares = S::splat(0.0);
                for at in (0..width).step_by(LANES) {
                    let difference = S::sub(S::load(x.as_ptr().add(at)), mean);
                    squares = S::fma(difference, difference, squares);
                }
                *inverse = 1.0 / (S::sum(squares) * scale + NORM_EPSILON).sqrt();
                let factor = S::splat(*inverse);
                for at in (0..width).step_by(LANES) {
                    let value = S::mul(S::sub(S::load(x.as_ptr().add(at)), mean), factor);
                    S::store(to.as_mut_ptr().add(at), value);
                    let gain = S::load(self.gain.as_ptr().add(at));
                    let bias = S::load(self.bias.as_ptr().add(at));
                    S::store(out.as_mut_ptr().add(at), S::fma(value, gain, bias));
                }
            }
        }
    }
}

/// Adds to `d_x` what the gradient of a norm's result means for its input, and to `d_gain` and
/// `d_bias` what it means for them.
pub(super) fn layer_norm_backward(
    isa: Isa,
    normalized: &Normalized,
    gain: &[f32],
    d_out: &[f32],
    d_x: &mut [f32],
    d_gain: &mut [f32],
    d_bias: &mut [f32],
) {
    let width = gain.len();
    assert!(width.is_multiple_of(LANES) && d_gain.len() == width && d_bias.len() == width);
    assert!(d_out.len() == normalized.x.len() && d_x.len() == d_out.len());
    isa.dispatch(LayerNormBackward {
        normalized,
        gain,
        d_out,
        d_x,
        d_gain,
        d_bias,
    });
}

struct LayerNormBackward<'a> {
    normalized: &'a Normalized,
    gain: &'a [f32],
    d_out: &'a [f32],
    d_x: &'a mut [f32],
    d_gain: &'a mut [f32],
    d_bias: &'a mut [f32],
}

impl Kernel for LayerNormBackward<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = self.gain.len();
        let scale = 1.0 / width as f32;
        let gain = self.gain.as_ptr();
        let (d_gain, d_bias) = (self.d_gain.as_mut_ptr(), self.d_bias.as_mut_ptr());
        let rows = self.normalized.x.chunks_exact(width);
        let d_outs = self.d_out.chunks_exact(width);
        let d_xs = self.d_x.chunks_exact_mut(width);
        for (((x, d_out), d_x), &inverse) in
            rows.zip(d_outs).zip(d_xs).zip(&self.normalized.inverse)
        {
            // SAFETY: as in `LayerNorm`.
            unsafe {
                let (mut sum, mut product) = (S::splat(0.0), S::splat(0.0));
                for at in (0..width).step_by(LANES) {
                    let (x, d) = (S::load(x.as_ptr().add(at)), S::load(d_out.as_ptr().add(at)));
                    S::store(d_gain.add(at), S::fma(d, x, S::load(d_gain.add(at))));
                    S::store(d_bias.add(at), S::add(d, S::load(d_bias.add(at))));
                    let d = S::mul(d, S::load(gain.add(at)));
                    sum = S::add(sum, d);
                    product = S::fma(d, x, product);
                }
                let mean = S::splat(S::sum(sum) * scale);
                let along = S::splat(S::sum(product) * scale);
                for at in (0..width).step_by(LANES) {
                    let x = S::load(x.as_ptr().add(at));
                    let d = S::mul(S::load(d_out.as_ptr().add(at)), S::load(gain.add(at)));
                    let d = S::sub(S::sub(d, mean), S::mul(x, along));
                    let to = d_x.as_mut_ptr().add(at);
                    S::store(to, S::fma(d, S::splat(inverse), S::load(to)));
                }
            }
        }
    }
}

/// Softmax of `scale · x` over the first `valid` numbers of every row of `width`; the others become 0.
pub(super) fn softmax(isa: Isa, x: &mut [f32], width: usize, valid: usize, scale: f32) {
    assert!(width.is_multiple_of(LANES) && valid <= width && valid > 0);
    isa.dispatch(Softmax {
        x,
        width,
        valid,
        scale,
    });
}

struct Softmax<'a> {
    x: &'a mut [f32],
    width: usize,
    valid: usize,
    scale: f32,
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for row in self.x.chunks_exact_mut(self.width) {
            row[self.valid..].fill(f32::NEG_INFINITY);
            // SAFETY: accesses are to LANES numbers from a multiple of LANES below the row's length,
            // which is a multiple of LANES.
            unsafe {
                let p = row.as_mut_ptr();
                let mut largest = S::splat(f32::NEG_INFINITY);
                for at in (0..self.width).step_by(LANES) {
                    largest = S::max(largest, S::load(p.add(at)));
                }
                let largest = S::splat(S::greatest(largest));
                let mut sum = S::splat(0.0);
                for at in (0..self.width).step_by(LANES) {
                    let x = S::sub(S::load(p.add(at)), largest);
                    let x = S::exp(S::mul(x, S::splat(self.scale)));
                    S::store(p.add(at), x);
                    sum = S::add(sum, x);
                }
                let total = S::splat(S::sum(sum));
                for at in (0..self.width).step_by(LANES) {
                    S::store(p.add(at), S::div(S::load(p.add(at)), total));
                }
            }
        }
    }
}

/// Turns the gradient of a softmax's result `y` into that of its argument before scaling, in place.
pub(super) fn softmax_backward(isa: Isa, y: &[f32], d: &mut [f32], width: usize, scale: f32) {
    assert!(width.is_multiple_of(LANES) && y.len() == d.len());
    isa.dispatch(SoftmaxBackward { y, d, width, scale });
}

struct SoftmaxBackward<'a> {
    y: &'a [f32],
    d: &'a mut [f32],
    width: usize,
    scale: f32,
}

impl Kernel for SoftmaxBackward<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let rows = self.y.chunks_exact(self.width);
        for (y, d) in rows.zip(self.d.chunks_exact_mut(self.width)) {
            // SAFETY: as in `Softmax`.
            unsafe {
                let mut sum = S::splat(0.0);
                for at in (0..self.width).step_by(LANES) {
                    sum = S::fma(
                        S::load(y.as_ptr().add(at)),
                        S::load(d.as_ptr().add(at)),
                        sum,
                    );
                }
                let mean = S::splat(S::sum(sum));
                for at in (0..self.width).step_by(LANES) {
                    let d = d.as_mut_ptr().add(at);
                    let y = S::mul(S::load(y.as_ptr().add(at)), S::splat(self.scale));
                    S::store(d, S::mul(y, S::sub(S::load(d), mean)));
                }
            }
        }
    }
}

const SQRT_2_OVER_PI: f32 = 0.797_884_6;
const CUBIC: f32 = 0.044715;

/// tanh(√(2/π) · (x + 0.044715 · x³)), of which GELU is made.
#[inline(always)]
unsafe fn gelu_tanh<S: Simd>(x: S::V) -> S::V {
    unsafe {
        let square = S::mul(x, x);
        let inner = S::fma(S::mul(square, x), S::splat(CUBIC), x);
        // tanh(u) = 1 − 2 / (1 + exp(2u))
        let power = S::exp(S::mul(inner, S::splat(2.0 * SQRT_2_OVER_PI)));
        let one = S::splat(1.0);
        S::sub(one, S::div(S::splat(2.0), S::add(one, power)))
    }
}

/// GELU (its tanh approximation) of every number of `x`.
pub(super) fn gelu(isa: Isa, x: &[f32], out: &mut [f32]) {
    assert!(x.len().is_multiple_of(LANES) && x.len() == out.len());
    isa.dispatch(Gelu { x, out });
}

struct Gelu<'a> {
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Gelu<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (x, out) in self
            .x
            .chunks_exact(LANES)
            .zip(self.out.chunks_exact_mut(LANES))
        {
            // SAFETY: chunks have LANES numbers.
            unsafe {
                let x = S::load(x.as_ptr());
                let half = S::mul(x, S::splat(0.5));
                S::store(out.as_mut_ptr(), S::fma(half, gelu_tanh::<S>(x), half));
            }
        }
    }
}

/// Multiplies the gradient of GELU's results with its derivatives at `x`, in place.
pub(super) fn gelu_backward(isa: Isa, x: &[f32], d: &mut [f32]) {
    assert!(x.len().is_multiple_of(LANES) && x.len() == d.len());
    isa.dispatch(GeluBackward { x, d });
}

struct GeluBackward<'a> {
    x: &'a [f32],
    d: &'a mut [f32],
}

impl Kernel for GeluBackward<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (x, d) in self
            .x
            .chunks_exact(LANES)
            .zip(self.d.chunks_exact_mut(LANES))
        {
            // SAFETY: chunks have LANES numbers.
            unsafe {
                let x = S::load(x.as_ptr());
                let t = gelu_tanh::<S>(x);
                let one = S::splat(1.0);
                let half = S::splat(0.5);
                // ½ (1 + t) + ½ x (1 − t²) · √(2/π) · (1 + 3 · 0.044715 · x²)
                let inner = S::fma(S::mul(x, x), S::splat(3.0 * CUBIC), one);
                let slope = S::mul(S::splat(SQRT_2_OVER_PI), inner);
                let bend = S::mul(S::sub(one, S::mul(t, t)), S::mul(x, slope));
                let derivative = S::mul(half, S::add(S::add(one, t), bend));
                S::store(d.as_mut_ptr(), S::mul(S::load(d.as_ptr()), derivative));
            }
        }
    }
}

/// `to += of`, number by number.
pub(super) fn add(isa: Isa, to: &mut [f32], of: &[f32]) {
    assert!(to.len() == of.len());
    isa.dispatch(Add { to, of });
}

struct Add<'a> {
    to: &'a mut [f32],
    of: &'a [f32],
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (to, of) in self.to.iter_mut().zip(self.of) {
            *to += of;
        }
    }
}

/// Adds `bias` to every row.
pub(super) fn add_bias(isa: Isa, rows: &mut [f32], bias: &[f32]) {
    for row in rows.chunks_exact_mut(bias.len()) {
        add(isa, row, bias);
    }
}

/// Adds every row to `sums`, from the first on.
pub(super) fn add_rows(isa: Isa, rows: &[f32], sums: &mut [f32]) {
    for row in rows.chunks_exact(sums.len()) {
        add(isa, sums, row);
    }
}
