//! Random batches for the tests of the attention kernels, and what float64 makes of them.

use super::attention::Scores;
use super::attention_plan::{Group, Inputs, Jobs, Parts, Segment};
use super::device::{Address, Buffer, Device};
use super::rope_append::{head_stride, layer_len};
use super::step_memory::{Layout, Packer, StepMemory};
use super::testing::{device, random, to_bf16};
use crate::backend::random::philox4x32;
use crate::backend::{KvShape, PAGE_LEN};
use half::bf16;
use std::sync::Arc;

const LAYERS: usize = 2;
const LAYER: usize = 1;

/// A batch: queries, pages, and which rows see what.
pub struct Case {
    pub device: Arc<dyn Device>,
    pub shape: KvShape,
    pub groups: Vec<Group>,
    pub scores: Scores,
    /// [rows, (heads + 2 · kv_heads) · head_dim]
    qkv: Vec<f32>,
    pages: Arc<Vec<(Vec<bf16>, Buffer<bf16>)>>,
}

/// Results in float64, and how far float32 with bfloat16 queries and probabilities may be off.
pub struct Expected {
    pub values: Vec<f64>,
    pub bounds: Vec<f64>,
}

impl Expected {
    #[track_caller]
    pub fn assert(&self, got: &[f32], case: impl std::fmt::Debug) {
        assert_eq!(got.len(), self.values.len());
        for (i, (&got, &expected)) in got.iter().zip(&self.values).enumerate() {
            let error = (f64::from(got) - expected).abs();
            // Not `error > bound`: NaN must not pass.
            assert!(
                error <= self.bounds[i],
                "case {case:?}, number {i}: {got} instead of {expected}"
            );
        }
    }
}

/// A mixture of prompts and candidates, of heads and lengths, some with windows and caps.
pub fn random_case(seed: u32) -> Case {
    let pick = |what: u32, below: usize| philox4x32([seed, what, 0, 0], [3, 4])[0] as usize % below;
    let head_dim = [64, 128, 80, 96, 32, 256, 30, 64][pick(0, 8)];
    let kv_heads = 1 + pick(1, 2);
    let heads = kv_heads * (1 + pick(2, 8));
    let groups: Vec<(usize, Vec<(usize, usize)>)> = (0..2 + pick(3, 2) as u32)
        .map(|g| {
            let pick = |what: u32, below: usize| pick(100 * (g + 1) + what, below);
            let prefix_len = [0, 1 + pick(0, 60), 200 + pick(0, 200)][pick(1, 3)];
            let segments = (0..1 + pick(2, 4) as u32)
                .map(|s| {
                    let start = [0, pick(3 + 2 * s, 40), 250][pick(30 + s, 3)];
                    let rows = [1, 1, 1 + pick(4 + 2 * s, 20)][pick(40 + s, 3)];
                    (start, rows)
                })
                .collect();
            (prefix_len, segments)
        })
        .collect();
    let mut case = Case::new(u64::from(seed), (heads, kv_heads, head_dim), &groups);
    case.scores.window = [None, Some(1), Some(70)][pick(4, 3)];
    case.scores.softcap = [None, Some(2.0)][pick(5, 2)];
    case
}

impl Case {
    /// `groups`: the prefix's tokens, and of each segment the tokens that are there and its rows.
    pub fn new(
        seed: u64,
        (heads, kv_heads, head_dim): (usize, usize, usize),
        groups: &[(usize, Vec<(usize, usize)>)],
    ) -> Case {
        let device = device();
        let shape = KvShape {
            layers: LAYERS,
            heads,
            kv_heads,
            head_dim,
        };
        let mut count = 0;
        let mut table = |tokens: usize| {
            count += tokens.div_ceil(PAGE_LEN);
            count - tokens.div_ceil(PAGE_LEN)
        };
        let groups: Vec<Group> = groups
            .iter()
            .map(|(prefix_len, segments)| Group {
                prefix_table: table(*prefix_len),
                prefix_len: *prefix_len,
                segments: segments
                    .iter()
                    .map(|&(start, rows)| Segment {
                        table: table(start + rows),
                        start,
                        rows,
                    })
                    .collect(),
            })
            .collect();
        let segments = groups.iter().flat_map(|group| &group.segments);
        let rows: usize = segments.map(|segment| segment.rows).sum();
        let pages = (0..count).map(|page| {
            let len = LAYERS * layer_len(shape);
            let mut contents = to_bf16(&random(seed * 1000 + 10 + page as u64, len));
            for token in contents.chunks_mut(head_stride(shape)) {
                token[head_dim..].fill(bf16::ZERO);
            }
            let buffer = Buffer::from_slice(&device, &contents, "page").unwrap();
            (contents, buffer)
        });
        let pages = Arc::new(pages.collect());
        let qkv = random(seed + 1, rows * (heads + 2 * kv_heads) * head_dim);
        Case {
            scores: Scores {
                // Scores of some size, so that the softmax is not flat.
                scale: 6.0 / (head_dim as f32).sqrt(),
                softcap: None,
                window: None,
            },
            device,
            shape,
            groups,
            qkv,
            pages,
        }
    }

    /// A batch of one row of this one, of its group alone.
    pub fn only(&self, row: usize, group: Group) -> Case {
        let width = (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim;
        Case {
            device: Arc::clone(&self.device),
            shape: self.shape,
            groups: vec![group],
            scores: self.scores,
            qkv: self.qkv[row * width..][..width].to_vec(),
            pages: Arc::clone(&self.pages),
        }
    }

    pub fn jobs(&self) -> Jobs {
        Jobs::new(&self.groups, self.shape)
    }

    /// Group, segment and own tokens (its own the last) of each row.
    fn rows(&self) -> Vec<(&Group, &Segment, usize)> {
        let mut rows = Vec::new();
        for group in &self.groups {
            for segment in &group.segments {
                let owns = segment.start..segment.start + segment.rows;
                rows.extend(owns.map(|own| (group, segment, own + 1)));
            }
        }
        rows
    }

    /// Every list of jobs with some places that have nothing to do, as in a recorded step.
    pub fn run(&self, jobs: Jobs) -> Vec<f32> {
        let rows = self.rows();
        let len = rows.len() * self.shape.heads * self.shape.head_dim;
        let positions: Vec<u32> = rows
            .iter()
            .map(|(group, _, own)| (group.prefix_len + own - 1) as u32)
            .collect();
        let addresses: Vec<Address> = self.pages.iter().map(|(_, page)| page.address()).collect();
        // Rows beyond those of the batch, which must stay as they are.
        let spare = 3 * self.shape.heads * self.shape.head_dim;
        let out = vec![f32::NAN; len + spare];
        let out = Buffer::from_slice(&self.device, &out, "out").unwrap();
        let addresses = Buffer::from_slice(&self.device, &addresses, "pages").unwrap();
        let positions = Buffer::from_slice(&self.device, &positions, "positions").unwrap();
        let mut packer = Packer::default();
        let (mut memory, layout) = (StepMemory::default(), Layout::default());
        let queries = (jobs.parts(self.shape), self.shape.head_dim);
        let packed = jobs.pack(&mut packer, |jobs| jobs + 3.min(jobs), 0);
        let base = memory.send(&self.device, &layout, &packer).unwrap();
        let (statistics, totals) = memory.parts(&self.device, &layout, queries).unwrap();
        let plan = packed.at(base, Parts { statistics, totals });
        let inputs = Inputs {
            qkv: &Buffer::from_slice(&self.device, &self.qkv, "qkv").unwrap(),
            pages: addresses.slice(),
            positions: positions.slice(),
            scores: self.scores,
            shape: self.shape,
            layer: LAYER,
        };
        plan.attend(&*self.device, &inputs, &out).unwrap();
        let spare = out.read(len, spare).unwrap();
        assert!(spare.iter().all(|x| x.is_nan()), "a row that is not there");
        out.read(0, len).unwrap()
    }

    /// From the queries as bfloat16.
    ///
    /// The bound: probabilities are rounded to bfloat16, each off by 2⁻⁸ of itself at most, so a result
    /// by 2⁻⁸ Σ p |v|; scores and sums are off by float32's rounding.
    pub fn in_f64(&self) -> Expected {
        let KvShape {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.shape;
        let (stride, width) = (head_stride(self.shape), (heads + 2 * kv_heads) * head_dim);
        let (mut values, mut bounds) = (Vec::new(), Vec::new());
        for (row, (group, segment, own)) in self.rows().into_iter().enumerate() {
            let visible = group.prefix_len + own;
            let first = visible.saturating_sub(self.scores.window.unwrap_or(usize::MAX));
            for head in 0..heads {
                let kv_head = head / (heads / kv_heads);
                let place = |position: usize, part: usize| {
                    let (table, token) = match position.checked_sub(group.prefix_len) {
                        None => (group.prefix_table, position),
                        Some(token) => (segment.table, token),
                    };
                    let page = &self.pages[table + token / PAGE_LEN].0;
                    let at = LAYER * layer_len(self.shape)
                        + ((kv_head * 2 + part) * PAGE_LEN + token % PAGE_LEN) * stride;
                    &page[at..][..head_dim]
                };
                let query = &self.qkv[row * width + head * head_dim..][..head_dim];
                let weight_of = |position: usize| {
                    let products = query.iter().zip(place(position, 0));
                    let dot: f64 = products
                        .map(|(&q, k)| bf16::from_f32(q).to_f64() * k.to_f64())
                        .sum();
                    let score = dot * f64::from(self.scores.scale);
                    match self.scores.softcap.map(f64::from) {
                        Some(cap) => (cap * (score / cap).tanh()).exp(),
                        None => score.exp(),
                    }
                };
                let weights: Vec<f64> = (first..visible).map(weight_of).collect();
                let sum = weights.iter().sum::<f64>();
                for i in 0..head_dim {
                    let of_keys = (first..visible).map(|p| place(p, 1)[i].to_f64());
                    let parts = of_keys.zip(&weights).map(|(v, w)| v * w / sum);
                    let parts: Vec<f64> = parts.collect();
                    values.push(parts.iter().sum());
                    let size: f64 = parts.iter().map(|part| part.abs()).sum();
                    bounds.push(size / 256.0 + 2e-5);
                }
            }
        }
        Expected { values, bounds }
    }
}
