//! Products of every format on every instruction set against float64.

use super::format::{CodeLayout, SPAN};
use super::halves;
use super::inputs::{Form, Inputs};
use super::matmul::{Epilogue, ROW_BLOCK, RUN, STREAMED_FROM, matmul};
use super::matrix::Matrix;
use super::rows::{Rows, Vector};
use super::simd::Isa;
use super::team::Team;
use crate::backend::Norm;
use crate::model::config::Activation;
use crate::model::tensor::{Dtype, Tensor};
use std::borrow::Cow;

/// Numbers in -1..1 from a seed.
fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Random stored bits; 16-bit numbers (scales among them) are made small by their upper byte.
fn stored(dtype: Dtype, seed: u64, rows: usize, columns: usize) -> Tensor<'static> {
    let values = random(seed, rows * columns);
    let data: Vec<u8> = match dtype {
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::F16 | Dtype::BF16 => return sixteen_bits(dtype, &values, columns),
        _ => {
            let len = rows * dtype.row_bytes(columns).unwrap();
            let mut data: Vec<u8> = random(seed, len)
                .iter()
                .map(|v| (v * 128.0) as i32 as u8)
                .collect();
            let scale = half::f16::from_f32(0.013).to_le_bytes();
            for block in data.chunks_mut(dtype.block_bytes()) {
                let at = if dtype == Dtype::Q6K {
                    block.len() - 2
                } else {
                    0
                };
                block[at..at + 2].copy_from_slice(&scale);
                if matches!(dtype, Dtype::Q4_1 | Dtype::Q5_1 | Dtype::Q4K | Dtype::Q5K) {
                    block[2..4].copy_from_slice(&half::f16::from_f32(0.07).to_le_bytes());
                }
            }
            data
        }
    };
    Tensor {
        dtype,
        shape: vec![rows, columns],
        data: Cow::Owned(data),
    }
}

fn sixteen_bits(dtype: Dtype, values: &[f32], columns: usize) -> Tensor<'static> {
    let bits = |x: &f32| match dtype {
        Dtype::F16 => half::f16::from_f32(*x).to_le_bytes(),
        _ => half::bf16::from_f32(*x).to_le_bytes(),
    };
    Tensor {
        dtype,
        shape: vec![values.len() / columns, columns],
        data: Cow::Owned(values.iter().flat_map(bits).collect()),
    }
}

fn filled(rows: usize, width: usize, seed: u64) -> Rows {
    let mut x = Rows::new(rows, width);
    for row in 0..rows {
        x.row_mut(row)
            .copy_from_slice(&random(seed + row as u64, width));
    }
    x
}

/// `x · weightᵀ` in float64, and the sum of magnitudes that rounding errors are relative to.
fn reference(x: &[f32], weight: &Tensor) -> Vec<(f64, f64)> {
    let values = weight.to_f32();
    let row = |w: &[f32]| {
        let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
        products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()))
    };
    values.chunks(x.len()).map(row).collect()
}

/// A chain of n additions, each rounded, errs by at most n half-units of the running sum, which
/// is at most the sum of magnitudes.
fn assert_close(got: f32, (exact, size): (f64, f64), inputs: usize, what: &str) {
    let bound = size * (inputs as f64 + 4.0) * f64::from(f32::EPSILON) / 2.0 + 1e-30;
    assert!(
        (f64::from(got) - exact).abs() <= bound,
        "{what}: {got}, exactly {exact}"
    );
}

/// One product, everything plain.
struct Product<'a> {
    team: &'a Team,
    isa: Isa,
    weight: &'a Matrix,
    form: Form,
}

impl Product<'_> {
    fn of(&self, x: &Rows, rows: &[u32]) -> Rows {
        let mut inputs = Inputs::default();
        inputs.fill(self.team, self.isa, self.form, (x, Some(rows), None));
        let mut out = Rows::new(rows.len(), self.weight.out_features());
        let epilogue = Epilogue::Store;
        matmul(
            self.team,
            self.isa,
            &inputs,
            self.weight,
            None,
            epilogue,
            &mut out,
        );
        out
    }
}

/// Rows whose spans are whole numbers times a power of two, so that rounding changes nothing.
fn whole(rows: usize, width: usize, seed: u64) -> Rows {
    let mut x = filled(rows, width, seed);
    for row in 0..rows {
        for (index, span) in x.row_mut(row).chunks_mut(SPAN).enumerate() {
            let scale = f32::powi(2.0, index as i32 % 5 - 9);
            span.iter_mut()
                .for_each(|x| *x = (*x * 32512.0).round() * scale);
            span[(row + index) % span.len()] = 32512.0 * scale;
        }
    }
    x
}

#[test]
fn every_format_and_shape_agrees_with_float64_and_rows_do_not_see_each_other() {
    let team = &Team::new(2).unwrap();
    for (isa, dtype) in Isa::available()
        .into_iter()
        .flat_map(|isa| Dtype::ALL.map(|dtype| (isa, dtype)))
    {
        let block = dtype.block_len();
        for (out_features, blocks) in [(16, 1), (50, 3), (33, 2)] {
            let in_features = match block {
                1 => 40 * blocks + 3,
                _ => block * blocks,
            };
            let stored = stored(dtype, 7, out_features, in_features);
            let weight = &Matrix::pack(team, std::slice::from_ref(&stored), false);
            for form in [Form::Float, Form::Quantised] {
                if form == Form::Quantised && CodeLayout::of(dtype).is_none() {
                    continue;
                }
                let what = format!("{dtype:?} {} {form:?}", isa.name());
                let product = Product {
                    team,
                    isa,
                    weight,
                    form,
                };
                let x = whole(29, in_features, 3);
                let alone: Vec<Rows> = (0..29).map(|row| product.of(&x, &[row])).collect();
                for (row, alone) in alone.iter().enumerate() {
                    let exact = reference(x.row(row), &stored);
                    for (got, exact) in alone.row(0).iter().zip(exact) {
                        assert_close(*got, exact, in_features, &what);
                    }
                }
                for rows in [2, 7, 13, 29] {
                    let together = product.of(&x, &(0..rows).collect::<Vec<u32>>());
                    for (row, alone) in alone.iter().enumerate().take(rows as usize) {
                        assert_eq!(
                            together.row(row),
                            alone.row(0),
                            "{what}, row {row} of {rows}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn rounding_activations_to_sixteen_bits_costs_half_a_step_each() {
    let (team, dtype) = (&Team::new(1).unwrap(), Dtype::Q6K);
    let stored = stored(dtype, 4, 48, 512);
    let weight = &Matrix::pack(team, std::slice::from_ref(&stored), false);
    let mut x = filled(3, 512, 6);
    // A span of nothing, one too small for a scale, one with an outlier.
    x.row_mut(0)[..SPAN].fill(0.0);
    x.row_mut(1)[..SPAN].fill(1e-41);
    x.row_mut(2)[7] = 1e6;
    let weights = stored.to_f32();
    for isa in Isa::available() {
        let form = Form::Quantised;
        let out = Product {
            team,
            isa,
            weight,
            form,
        }
        .of(&x, &[0, 1, 2]);
        for row in 0..3 {
            let exact = reference(x.row(row), &stored);
            for (output, (exact, size)) in exact.into_iter().enumerate() {
                let spans = x
                    .row(row)
                    .chunks(SPAN)
                    .zip(weights[output * 512..].chunks(SPAN));
                let half_steps = spans.map(|(x, w)| {
                    let greatest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                    let sum: f64 = w.iter().map(|w| f64::from(w.abs())).sum();
                    f64::from(greatest) / 65024.0 * sum
                });
                let bound = half_steps.sum::<f64>() * 1.0001 + size * 1e-5;
                let error = (f64::from(out.row(row)[output]) - exact).abs();
                assert!(
                    error <= bound,
                    "{}: off by {error}, bound {bound}",
                    isa.name()
                );
            }
        }
    }
}

/// Weights and activations become whole numbers: each is off by half a step of its span at most.
#[test]
fn halves_cost_half_a_step_each_and_rows_do_not_see_each_other() {
    const SPAN: usize = halves::SPAN;
    // What is rounded to a whole number below 2^15 has been rounded to float32 twice.
    const HALF: f64 = 0.5 + 2.0 / (1 << 9) as f64;
    let team = &Team::new(2).unwrap();
    let shapes = [(50, SPAN), (16, 3 * SPAN), (33, 2 * halves::RUN + 5 * SPAN)];
    for (isa, dtype, (outputs, width)) in Isa::available().into_iter().flat_map(|isa| {
        let dtypes = [Dtype::F16, Dtype::BF16].into_iter();
        dtypes.flat_map(move |dtype| shapes.map(|shape| (isa, dtype, shape)))
    }) {
        let what = format!("{dtype:?} {} {outputs} x {width}", isa.name());
        let mut weights = random(3, outputs * width);
        // A span of nothing, one with an outlier, one of the greatest products that there are.
        weights[..SPAN].fill(0.0);
        weights[width + 3] = 40.0;
        weights[2 * width..][..SPAN].fill(-3.0);
        let stored = sixteen_bits(dtype, &weights, width);
        let weights = stored.to_f32();
        let weight = &Matrix::pack(team, std::slice::from_ref(&stored), true);
        assert_eq!(weight.form(true), Form::Halves);
        let mut x = filled(29, width, 6);
        x.row_mut(0)[..SPAN].fill(0.0);
        x.row_mut(1)[..SPAN].fill(1e-41);
        x.row_mut(2)[7] = 1e6;
        x.row_mut(3)[..SPAN].fill(5.0);
        x.row_mut(4)[..SPAN].fill(-1e-3);
        let form = Form::Halves;
        let product = Product {
            team,
            isa,
            weight,
            form,
        };
        let alone: Vec<Rows> = (0..29).map(|row| product.of(&x, &[row])).collect();
        for (row, alone) in alone.iter().enumerate() {
            let x = x.row(row);
            for (output, (exact, size)) in reference(x, &stored).into_iter().enumerate() {
                let spans = x
                    .chunks(SPAN)
                    .zip(weights[output * width..].chunks(SPAN))
                    .map(|(x, w)| (magnitudes(x), magnitudes(w)));
                let half_steps = spans.map(|(x, w)| {
                    let x_step = (x.greatest / 32767.0).max(x.sum / 131040.0);
                    let w_step = w.greatest / 16383.0;
                    // The last term: both at once.
                    x_step * w.sum * 0.50005 + w_step * x.sum * HALF + 17.0 * x_step * w_step
                });
                let rounding = size * (width / SPAN + 8) as f64 * f64::from(f32::EPSILON);
                let bound = half_steps.sum::<f64>() + rounding + 1e-30;
                let error = (f64::from(alone.row(0)[output]) - exact).abs();
                assert!(error <= bound, "{what}: off by {error}, bound {bound}");
            }
        }
        for rows in [2, 7, 13, 29] {
            let together = product.of(&x, &(0..rows).collect::<Vec<u32>>());
            for (row, alone) in alone.iter().enumerate().take(rows as usize) {
                let (together, alone) = (together.row(row), alone.row(0));
                assert_eq!(together, alone, "{what}, row {row} of {rows}");
            }
        }
        // An embedding is a row of the same numbers, widened.
        let mut row = vec![0.0; width];
        for (output, weights) in weights.chunks(width).enumerate() {
            weight.read_output(isa, output, &mut row);
            for (got, stored) in row.chunks(SPAN).zip(weights.chunks(SPAN)) {
                let most = magnitudes(stored).greatest / 16383.0 * HALF;
                for (got, stored) in got.iter().zip(stored) {
                    let error = f64::from(got - stored).abs();
                    assert!(error <= most, "{what}: {got}, not {stored}");
                }
            }
        }
    }
}

struct Magnitudes {
    greatest: f64,
    sum: f64,
}

fn magnitudes(numbers: &[f32]) -> Magnitudes {
    let numbers = || numbers.iter().map(|x| f64::from(x.abs()));
    Magnitudes {
        greatest: numbers().fold(0.0, f64::max),
        sum: numbers().sum(),
    }
}

#[test]
fn what_has_no_whole_spans_stays_as_it_is_stored() {
    let team = &Team::new(1).unwrap();
    for (dtype, width) in [
        (Dtype::BF16, halves::SPAN + SPAN),
        (Dtype::F32, 2 * halves::SPAN),
    ] {
        let stored = stored(dtype, 1, 20, width);
        let weight = Matrix::pack(team, std::slice::from_ref(&stored), true);
        assert_eq!(weight.form(true), Form::Float);
        let mut row = vec![0.0; width];
        weight.read_output(Isa::best(), 19, &mut row);
        assert_eq!(row, stored.to_f32()[19 * width..]);
    }
}

#[test]
fn more_rows_than_a_block_and_more_inputs_than_a_run() {
    for isa in Isa::available() {
        let team = Team::new(3).unwrap();
        let stored = stored(Dtype::BF16, 5, 40, 2 * RUN + 17);
        let weight = Matrix::pack(&team, std::slice::from_ref(&stored), false);
        let rows = ROW_BLOCK + 31;
        let x = filled(rows, stored.columns(), 11);
        let product = Product {
            team: &team,
            isa,
            weight: &weight,
            form: Form::Float,
        };
        let out = product.of(&x, &(0..rows as u32).collect::<Vec<u32>>());
        for row in 0..rows {
            for (got, exact) in out.row(row).iter().zip(reference(x.row(row), &stored)) {
                assert_close(*got, exact, stored.columns(), isa.name());
            }
        }
    }
}

/// Results that are written past the caches, those of a part that begins within a cache line too.
#[test]
fn many_results_of_few_rows_are_those_of_each_row_alone() {
    let (rows, width, outputs) = (8, halves::SPAN, STREAMED_FROM / 32 + 5);
    let team = Team::new(3).unwrap();
    let [first, second] = [1, 2].map(|seed| stored(Dtype::BF16, seed, outputs, width));
    let plain = Matrix::pack(&team, &[first.clone(), second.clone()], true);
    let gated = Matrix::pack_gated(&team, &first, &second, true);
    let x = filled(rows, width, 3);
    for isa in Isa::available() {
        let product = |of: &[u32], weight: &Matrix, epilogue: Epilogue| {
            let mut inputs = Inputs::default();
            inputs.fill(&team, isa, Form::Halves, (&x, Some(of), None));
            let mut out = Rows::new(of.len(), weight.out_features());
            matmul(&team, isa, &inputs, weight, None, epilogue, &mut out);
            out
        };
        let all: Vec<u32> = (0..rows as u32).collect();
        for (weight, epilogue) in [
            (&plain, Epilogue::Store),
            (&plain, Epilogue::Softcap(3.0)),
            (&gated, Epilogue::Gated(Activation::Silu)),
        ] {
            let together = product(&all, weight, epilogue);
            for &row in &all {
                let alone = product(&[row], weight, epilogue);
                assert!(together.row(row as usize) == alone.row(0), "{}", isa.name());
            }
        }
    }
}

#[test]
fn norm_bias_and_epilogues_agree_with_float64() {
    let (width, outputs) = (72, 38);
    for isa in Isa::available() {
        let team = Team::new(1).unwrap();
        let (gate, up) = (
            stored(Dtype::F32, 1, outputs, width),
            stored(Dtype::F16, 2, outputs, width),
        );
        let bias_values = random(9, 2 * outputs);
        let (bias, norm_weight) = (Vector::new(&bias_values), Vector::new(&random(8, width)));
        let norm = Norm {
            weight: &norm_weight,
            epsilon: 1e-5,
        };
        let x = filled(3, width, 21);
        let mut inputs = Inputs::default();
        inputs.fill(&team, isa, Form::Float, (&x, None, Some(&norm)));
        let before = random(77, outputs);
        let gated = Matrix::pack_gated(&team, &gate, &up, false);
        let plain = Matrix::pack(&team, &[gate.clone(), up.clone()], false);
        let product_onto = |mut out: Rows, weight: &Matrix, epilogue: Epilogue| {
            matmul(&team, isa, &inputs, weight, Some(&bias), epilogue, &mut out);
            out
        };
        let (wide, narrow) = (|| Rows::new(3, 2 * outputs), || Rows::new(3, outputs));
        let mut residual = wide();
        for row in 0..3 {
            residual.row_mut(row)[..outputs].copy_from_slice(&before);
        }
        let out = product_onto(wide(), &plain, Epilogue::Store);
        let capped = product_onto(wide(), &plain, Epilogue::Softcap(3.0));
        let added = product_onto(residual, &plain, Epilogue::Add);
        let silu = product_onto(narrow(), &gated, Epilogue::Gated(Activation::Silu));
        let gelu = product_onto(narrow(), &gated, Epilogue::Gated(Activation::GeluTanh));
        let [gate, up] = [gate, up].map(|weight| weight.to_f32());
        for row in 0..3 {
            let x: Vec<f64> = x.row(row).iter().map(|x| f64::from(*x)).collect();
            let scale = (x.iter().map(|x| x * x).sum::<f64>() / width as f64 + 1e-5).sqrt();
            let normed = x
                .iter()
                .zip(norm_weight.as_slice())
                .map(|(x, w)| x / scale * f64::from(*w));
            let normed: Vec<f64> = normed.collect();
            let product = |weight: &[f32], output: usize, bias: usize| -> f64 {
                let row = &weight[output * width..][..width];
                let dot: f64 = row
                    .iter()
                    .zip(&normed)
                    .map(|(w, x)| f64::from(*w) * x)
                    .sum();
                dot + f64::from(bias_values[bias])
            };
            let check = |got: &Rows, at: usize, exact: f64, what: &str| {
                // The norm's scale, the products and the activation each round: 1e-5 of numbers of
                // size one is ten times what they add up to.
                let error = (f64::from(got.row(row)[at]) - exact).abs();
                assert!(
                    error < 1e-5 * exact.abs().max(1.0),
                    "{what} {}: off by {error}",
                    isa.name()
                );
            };
            for (output, before) in before.iter().enumerate() {
                let (g, u) = (
                    product(&gate, output, output),
                    product(&up, output, outputs + output),
                );
                check(&out, output, g, "store");
                check(&out, outputs + output, u, "store");
                check(&capped, output, 3.0 * (g / 3.0).tanh(), "softcap");
                check(&added, output, g + f64::from(*before), "add");
                check(&silu, output, g / (1.0 + (-g).exp()) * u, "silu");
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
                check(&gelu, output, 0.5 * g * (1.0 + inner.tanh()) * u, "gelu");
            }
        }
    }
}
