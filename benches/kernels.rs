//! Every kernel of the CUDA backend, alone (`podium bench-gpu` times `gather_rank`, and whole steps), on the GPU that `PODIUM_BENCH_DEVICE` names (`cuda`,
//! `cuda:INDEX`), or the first: shapes of Llama-3.1-8B. Where there is none, it says so and runs them
//! emulated, on small shapes, which shows that they run and nothing of their speed.
//!
//! A product's throughput is bytes of weights for up to 100 rows, operations for 512; weights take
//! turns, so that none is found in the second-level cache. Launches follow each other: a kernel of a
//! few microseconds is bound by them.

use std::sync::Arc;
use std::time::Instant;

use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
    measurement::WallTime,
};
use half::bf16;
use podium::backend::cuda::copy_rows::copy_rows;
use podium::backend::cuda::device::{Buffer, Device, DeviceError};
use podium::backend::cuda::embed::embed;
use podium::backend::cuda::emulated::Emulated;
use podium::backend::cuda::gpu::Gpu;
use podium::backend::cuda::matmul::{Epilogue, Operands, Shape, gated_rows};
use podium::backend::cuda::matmul_skinny::matmul_skinny;
use podium::backend::cuda::matmul_tiled::matmul_tiled;
use podium::backend::cuda::matmul_wgmma::{Tiles, matmul_wgmma};
use podium::backend::cuda::norm::{norm_add, norm_rows, round_rows};
use podium::backend::cuda::token_logprobs::token_logprobs;
use podium::backend::cuda::weights::Form;
use podium::backend::cuda::{Cuda, Matrix};
use podium::backend::random::uniform;
use podium::backend::sampling::{SampleRow, SamplingParams};
use podium::backend::{Attention, Backend, Batch, Group, KvShape, PAGE_LEN, Segment};
use podium::model::config::{Activation, Rope};

struct Bench {
    device: Arc<dyn Device>,
    /// Stands before the names of what says nothing of a GPU.
    mark: &'static str,
    hidden: usize,
    intermediate: usize,
    vocabulary: usize,
    kv: KvShape,
    prompt: usize,
    /// Decoding rows, and rows of a prompt.
    rows: Vec<usize>,
    /// Matrices that take turns.
    copies: usize,
}

impl Bench {
    fn new() -> Bench {
        let name = std::env::var("PODIUM_BENCH_DEVICE").unwrap_or_default();
        let gpu = match name.as_str() {
            "" => Gpu::open(0).map_err(|error| error.to_string()),
            "emulate" => Err("PODIUM_BENCH_DEVICE asks for none".to_string()),
            name => Gpu::named(name).map_err(|error| error.to_string()),
        };
        match gpu {
            Ok(gpu) => Bench {
                device: Arc::new(gpu),
                mark: "",
                hidden: 4096,
                intermediate: 14336,
                vocabulary: 128_256,
                kv: KvShape {
                    layers: 1,
                    heads: 32,
                    kv_heads: 8,
                    head_dim: 128,
                },
                prompt: 512,
                rows: vec![1, 8, 32, 100, 512],
                copies: 4,
            },
            Err(reason) => {
                eprintln!("No GPU is benchmarked: {reason}");
                eprintln!(
                    "The kernels run emulated on the CPU, on small shapes: no time here is a GPU's."
                );
                Bench {
                    device: Arc::new(Emulated::default()),
                    mark: "emulated/",
                    hidden: 128,
                    intermediate: 192,
                    vocabulary: 256,
                    kv: KvShape {
                        layers: 1,
                        heads: 4,
                        kv_heads: 2,
                        head_dim: 32,
                    },
                    prompt: 256,
                    rows: vec![1, 8, 130],
                    copies: 1,
                }
            }
        }
    }

    fn numbers(&self, seed: u64, len: usize) -> Buffer<f32> {
        let numbers: Vec<f32> = (0..len)
            .map(|i| 2.0 * uniform(seed, 0, i as u32) - 1.0)
            .collect();
        Buffer::from_slice(&self.device, &numbers, "numbers").expect("memory")
    }

    fn inputs(&self, len: usize) -> Buffer<bf16> {
        let numbers: Vec<bf16> = (0..len)
            .map(|i| bf16::from_f32(2.0 * uniform(1, 0, i as u32) - 1.0))
            .collect();
        Buffer::from_slice(&self.device, &numbers, "inputs").expect("memory")
    }

    fn group<'c>(&self, criterion: &'c mut Criterion, name: &str) -> BenchmarkGroup<'c, WallTime> {
        let mut group = criterion.benchmark_group(format!("{}{name}", self.mark));
        group.sample_size(10);
        group
    }

    /// Times launches that follow each other; `launch` is told the number of each.
    fn time(
        &self,
        group: &mut BenchmarkGroup<WallTime>,
        what: impl std::fmt::Display,
        throughput: Throughput,
        mut launch: impl FnMut(usize) -> Result<(), DeviceError>,
    ) {
        group.throughput(throughput);
        group.bench_function(BenchmarkId::from_parameter(what), |bencher| {
            bencher.iter_custom(|count| {
                self.device.synchronize().expect("a working device");
                let started = Instant::now();
                for number in 0..count {
                    launch(number as usize).expect("a launch");
                }
                self.device.synchronize().expect("a working device");
                started.elapsed()
            });
        });
    }

    fn products(&self, criterion: &mut Criterion) {
        let sizes = [
            (
                "gate_up",
                gated_rows(self.intermediate),
                self.hidden,
                self.intermediate,
            ),
            ("down", self.hidden, self.intermediate, self.hidden),
        ];
        for (name, out_features, inputs, width) in sizes {
            for form in Form::ALL {
                let matrices: Vec<Matrix> = (0..self.copies as u32)
                    .map(|seed| {
                        Matrix::random(&self.device, form, (out_features, inputs), width, seed)
                            .expect("memory")
                    })
                    .collect();
                let mut group = self.group(criterion, &format!("{name}/{form:?}"));
                for &rows in &self.rows {
                    let (x, out) = (self.inputs(rows * inputs), self.numbers(2, rows * width));
                    let few = rows <= 100;
                    let (kernel, throughput) = match few {
                        true => ("skinny", Throughput::Bytes(matrices[0].bytes() as u64)),
                        false => (
                            "tiled",
                            Throughput::Elements((2 * rows * inputs * out_features) as u64),
                        ),
                    };
                    let epilogue = match name {
                        "down" => Epilogue::Add,
                        _ => Epilogue::Gated(Activation::Silu),
                    };
                    let operands = |number: usize| Operands {
                        x: &x,
                        weight: &matrices[number % matrices.len()].weight,
                        bias: None,
                        epilogue,
                        shape: Shape {
                            first_row: 0,
                            rows,
                            out_features,
                            stride: matrices[0].stride,
                            width,
                        },
                        out: &out,
                    };
                    let what = format!("{kernel}, {rows} rows");
                    self.time(&mut group, what, throughput.clone(), |i| match few {
                        true => matmul_skinny(&*self.device, &operands(i)),
                        false => matmul_tiled(&*self.device, &operands(i)),
                    });
                    if few {
                        continue;
                    }
                    // On Hopper, weights of bfloat16.
                    let stride = matrices[0].stride;
                    let x_tiles = Tiles::new(&self.device, &x, stride).expect("memory");
                    let tiles = matrices.iter().map(|matrix| {
                        Tiles::of_weights(&self.device, &matrix.weight, stride).expect("memory")
                    });
                    let tiles = tiles.collect::<Option<Vec<_>>>();
                    if let (Some(x), Some(weights)) = (x_tiles, tiles) {
                        let what = format!("wgmma, {rows} rows");
                        self.time(&mut group, what, throughput, |i| {
                            let tiles = (&x, &weights[i % weights.len()]);
                            matmul_wgmma(&*self.device, &operands(i), tiles)
                        });
                    }
                }
            }
        }
    }

    fn rows(&self, criterion: &mut Criterion) {
        let (device, width) = (&*self.device, self.hidden);
        let weight = self.numbers(3, width);
        for form in Form::ALL {
            let size = (self.vocabulary, width);
            let table = Matrix::random(&self.device, form, size, self.vocabulary, 1);
            let table = table.expect("memory");
            let mut group = self.group(criterion, &format!("embed/{form:?}"));
            for &rows in &self.rows {
                let tokens: Vec<u32> = (0..rows)
                    .map(|r| (r * 7919 % self.vocabulary) as u32)
                    .collect();
                let tokens = Buffer::from_slice(&self.device, &tokens, "tokens").expect("memory");
                let out = self.numbers(1, rows * width);
                let shape = (rows, width, table.stride, self.vocabulary);
                let bytes = Throughput::Bytes((rows * width * 6) as u64);
                self.time(&mut group, rows, bytes, |_| {
                    embed(device, &table.weight, tokens.slice(), 1.0, shape, &out)
                });
            }
        }
        type Launch<'a> = Box<dyn Fn(usize) -> Result<(), DeviceError> + 'a>;
        for &rows in &self.rows {
            let (x, more) = (self.numbers(1, rows * width), self.numbers(2, rows * width));
            let out = self.inputs(rows * width);
            let moves: Vec<u32> = (0..rows as u32)
                .flat_map(|r| [r, rows as u32 - 1 - r])
                .collect();
            let moves = Buffer::from_slice(&self.device, &moves, "moves").expect("memory");
            let shape = (rows, width, width);
            let kernels: [(&str, usize, Launch); 4] = [
                (
                    "norm_rows",
                    6,
                    Box::new(|_| norm_rows(device, &x, None, &weight, 1e-5, shape, &out)),
                ),
                (
                    "round_rows",
                    6,
                    Box::new(|_| round_rows(device, &x, shape, &out)),
                ),
                (
                    "norm_add",
                    12,
                    Box::new(|_| norm_add(device, &x, &weight, 1e-5, (rows, width), &more)),
                ),
                (
                    "copy_rows",
                    8,
                    Box::new(|_| copy_rows(device, &x, &moves, width, &more)),
                ),
            ];
            for (name, bytes, launch) in kernels {
                let mut group = self.group(criterion, name);
                let bytes = Throughput::Bytes((rows * width * bytes) as u64);
                self.time(&mut group, rows, bytes, launch);
            }
        }
    }

    /// Decoding behind a shared prompt (`attention_prefix`, `attention_suffix`, `attention_merge`), a
    /// prompt's own rows (`attention_prefill`), and `rope_append` of each.
    fn attention(&self, criterion: &mut Criterion) {
        let backend = Cuda::new(Arc::clone(&self.device));
        let (kv, own) = (self.kv, 32);
        let rope = Rope {
            frequencies: (0..kv.head_dim / 2)
                .map(|i| 0.9f32.powi(i as i32))
                .collect(),
            attention_factor: 1.0,
        };
        let attention = Attention {
            layer: 0,
            scale: (kv.head_dim as f32).sqrt().recip(),
            softcap: None,
            window: None,
            rope: &rope,
            query_norm: None,
            key_norm: None,
        };
        let prefix: Vec<u32> = (0..self.prompt.div_ceil(PAGE_LEN) as u32).collect();
        let prompt = Batch {
            tokens: vec![0; self.prompt],
            groups: vec![Group {
                segments: vec![Segment {
                    pages: prefix.clone(),
                    start: 0,
                    rows: self.prompt,
                }],
                ..Group::default()
            }],
        };
        let decoding = |n: usize| {
            let pages = |k: usize| {
                let first = prefix.len() + k * own / PAGE_LEN;
                (first as u32..(first + own / PAGE_LEN) as u32).collect()
            };
            let segment = |k| Segment {
                pages: pages(k),
                start: own - 1,
                rows: 1,
            };
            Batch {
                tokens: vec![0; n],
                groups: vec![Group {
                    prefix: prefix.clone(),
                    prefix_len: self.prompt,
                    segments: (0..n).map(segment).collect(),
                }],
            }
        };
        let token_bytes = 2 * kv.kv_heads * kv.head_dim * 2;
        let mut cases = vec![("prompt", self.prompt, prompt, {
            let pairs = self.prompt * (self.prompt + 1) / 2;
            Throughput::Elements((4 * kv.heads * kv.head_dim * pairs) as u64)
        })];
        for &n in self.rows.iter().filter(|n| **n <= 100) {
            let bytes = Throughput::Bytes(((self.prompt + n * own) * token_bytes) as u64);
            cases.push(("decoding", n, decoding(n), bytes));
        }
        let mut cache = backend.kv_cache(kv).expect("memory");
        let width = (kv.heads + 2 * kv.kv_heads) * kv.head_dim;
        for (name, rows, batch, throughput) in cases {
            let plan = backend
                .plan(&batch, None, &[&rope], &mut cache)
                .expect("memory");
            let row = |seed: usize| -> Vec<f32> {
                (0..width)
                    .map(|i| uniform(seed as u64, 0, i as u32))
                    .collect()
            };
            let mut qkv = backend.rows(rows, width).expect("memory");
            let mut out = backend.rows(rows, kv.heads * kv.head_dim).expect("memory");
            let numbers: Vec<f32> = (0..rows).flat_map(row).collect();
            qkv.write(&numbers).expect("memory");
            let mut group = self.group(criterion, &format!("rope_append/{name}"));
            let bytes = Throughput::Bytes((rows * (8 * width + token_bytes)) as u64);
            self.time(&mut group, rows, bytes, |_| {
                backend.rope_append(&plan, &attention, &mut qkv, &mut cache);
                Ok(())
            });
            group.finish();
            let mut group = self.group(criterion, &format!("attention/{name}"));
            self.time(&mut group, rows, throughput, |_| {
                backend.attention(&plan, &attention, &qkv, &cache, &mut out);
                Ok(())
            });
        }
    }

    fn logits(&self, criterion: &mut Criterion) {
        let backend = Cuda::new(Arc::clone(&self.device));
        for &n in self.rows.iter().filter(|n| **n <= 100) {
            let mut logits = backend.rows(n, self.vocabulary).expect("memory");
            let numbers: Vec<f32> = (0..n * self.vocabulary)
                .map(|i| 8.0 * uniform(5, 0, i as u32))
                .collect();
            logits.write(&numbers).expect("memory");
            let bytes = Throughput::Bytes((n * self.vocabulary * 4) as u64);
            for (name, params) in [
                ("sample/temperature", SamplingParams::default()),
                (
                    "sample/top-k, top-p",
                    SamplingParams {
                        top_k: 50,
                        top_p: 0.9,
                        ..SamplingParams::default()
                    },
                ),
            ] {
                let draws: Vec<SampleRow> = (0..n)
                    .map(|row| SampleRow {
                        row,
                        params: &params,
                        seed: 1,
                        candidate: row as u32,
                        position: 0,
                        prompt: &[],
                        answer: &[],
                        logit_bias: &[],
                        top_logprobs: 0,
                    })
                    .collect();
                // Waits for the tokens, as a step does.
                let mut group = self.group(criterion, name);
                self.time(&mut group, n, bytes.clone(), |_| {
                    backend.sample(&logits, &draws).expect("finite logits");
                    Ok(())
                });
            }
            let values = Buffer::from_slice(&self.device, &numbers, "logits").expect("memory");
            let tokens = vec![1; n];
            let mut group = self.group(criterion, "token_logprobs");
            self.time(&mut group, n, bytes, |_| {
                token_logprobs(&self.device, &values, self.vocabulary, &tokens).map(drop)
            });
        }
    }
}

fn bench(criterion: &mut Criterion) {
    let bench = Bench::new();
    bench.products(criterion);
    bench.rows(criterion);
    bench.attention(criterion);
    bench.logits(criterion);
}

criterion_group!(benches, bench);
criterion_main!(benches);
