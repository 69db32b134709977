//! The matmul of the CPU backend: one row to a prompt, plain and quantised weights, the latter also
//! by integer products where the processor has fast ones.
//!
//! Throughput is bytes of weights for one row, multiply-adds (two operations each) for more: hold
//! them against the machine's limits that `podium bench` prints.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use podium::backend::cpu::inputs::{Form, Inputs};
use podium::backend::cpu::matmul::{Epilogue, matmul};
use podium::backend::cpu::matrix::Matrix;
use podium::backend::cpu::rows::Rows;
use podium::backend::cpu::simd::Isa;
use podium::backend::cpu::team::Team;
use podium::model::tensor::{Dtype, Tensor};
use std::borrow::Cow;

/// Valid bits of any format: every scale is a small half, every code anything.
fn weights(dtype: Dtype, out_features: usize, in_features: usize) -> Tensor<'static> {
    let len = out_features * dtype.row_bytes(in_features).expect("whole blocks");
    let mut state = 1u64;
    let data = (0..len)
        .map(|i| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            // The upper byte of every 16-bit number keeps exponents small.
            if i % 2 == 1 {
                0x20
            } else {
                (state >> 56) as u8
            }
        })
        .collect();
    Tensor {
        dtype,
        shape: vec![out_features, in_features],
        data: Cow::Owned(data),
    }
}

fn bench(criterion: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (team, isa) = (Team::new(threads).expect("threads start"), Isa::best());
    // Larger than the last-level cache, as a model's weights are.
    let (out_features, in_features) = (32768, 1536);
    let codes = [Dtype::Q8_0, Dtype::Q4_1, Dtype::Q4K, Dtype::Q6K];
    let mut kinds = vec![(Dtype::BF16, Form::Float)];
    kinds.extend(
        isa.has_half_products()
            .then_some((Dtype::BF16, Form::Halves)),
    );
    for dtype in codes {
        kinds.push((dtype, Form::Float));
        kinds.extend(
            isa.has_integer_products()
                .then_some((dtype, Form::Quantised)),
        );
    }
    for (dtype, form) in kinds {
        let halves = form == Form::Halves;
        let weight = Matrix::pack(&team, &[weights(dtype, out_features, in_features)], halves);
        let mut group =
            criterion.benchmark_group(format!("matmul/{dtype:?}/{form:?}/{}", isa.name()));
        group.sample_size(10);
        for rows in [1, 2, 4, 8, 32, 100, 512] {
            let mut x = Rows::new(rows, in_features);
            for row in 0..rows {
                x.row_mut(row)
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, x)| *x = (i % 17) as f32 - 8.0);
            }
            let mut out = Rows::new(rows, out_features);
            let mut inputs = Inputs::default();
            group.throughput(match rows {
                1 => Throughput::Bytes(weight.bytes() as u64),
                _ => Throughput::Elements((2 * rows * out_features * in_features) as u64),
            });
            group.bench_function(BenchmarkId::from_parameter(rows), |bencher| {
                bencher.iter(|| {
                    inputs.fill(&team, isa, form, (&x, None, None));
                    matmul(
                        &team,
                        isa,
                        &inputs,
                        &weight,
                        None,
                        Epilogue::Store,
                        &mut out,
                    );
                });
            });
        }
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
