//! `kernels/attention.cu`

use super::device::{Address, Buffer, Device, DeviceError, Launch, Slice};
use super::rope_append::{head_stride, layer_len};
use crate::arguments;
use crate::backend::KvShape;

const WARPS: usize = 4;

/// What the rows of a batch attend to.
pub struct Spans {
    pub rows: usize,
    /// Pages of prefixes and of the rows' own tokens.
    pub pages: Slice<Address>,
    /// Four numbers a row: where in `pages` the prefix begins, and its tokens; the same of the own
    /// tokens, the row's the last of them.
    pub spans: Slice<u32>,
}

/// The numbers of a layer's attention.
#[derive(Clone, Copy, Debug)]
pub struct Scores {
    pub scale: f32,
    pub softcap: Option<f32>,
    pub window: Option<usize>,
}

impl Scores {
    /// The window as the kernels take it: 0 where there is none.
    pub(super) fn window_or_none(&self) -> u32 {
        // Longer than any context: none.
        u32::try_from(self.window.unwrap_or(0)).unwrap_or(0)
    }
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
    let mut arguments = arguments![
        qkv,
        spans.pages,
        spans.spans,
        scores.scale,
        scores.softcap.unwrap_or(0.0),
        scores.window_or_none(),
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

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_within, device, random, to_bf16};
    use super::*;
    use crate::backend::PAGE_LEN;
    use half::bf16;

    struct Case {
        shape: KvShape,
        /// Tokens of the prefix, and of each row's own.
        prefix: usize,
        own: Vec<usize>,
        scores: Scores,
    }

    impl Case {
        /// Results, and what float64 makes of the same queries, keys and values.
        fn run(&self) -> (Vec<f32>, Vec<f64>) {
            let device = device();
            let KvShape {
                layers,
                heads,
                kv_heads,
                head_dim,
            } = self.shape;
            let (layer, stride) = (layers - 1, head_stride(self.shape));
            let width = (heads + 2 * kv_heads) * head_dim;
            let qkv = random(1, self.own.len() * width);

            // Each table of pages begins where the last ends; the rows of a batch share the prefix's.
            let tables: Vec<usize> = [self.prefix].iter().chain(&self.own).copied().collect();
            let starts: Vec<usize> = tables
                .iter()
                .scan(0, |next, tokens| {
                    let start = *next;
                    *next += tokens.div_ceil(PAGE_LEN);
                    Some(start)
                })
                .collect();
            let count = tables.iter().map(|t| t.div_ceil(PAGE_LEN)).sum::<usize>();
            let len = layers * layer_len(self.shape);
            let contents: Vec<Vec<bf16>> = (0..count)
                .map(|page| {
                    let mut page = to_bf16(&random(10 + page as u64, len));
                    for token in page.chunks_mut(stride) {
                        token[head_dim..].fill(bf16::ZERO);
                    }
                    page
                })
                .collect();
            let pages: Vec<Buffer<bf16>> = contents
                .iter()
                .map(|page| Buffer::from_slice(&device, page, "page").unwrap())
                .collect();
            let addresses: Vec<Address> = pages.iter().map(Buffer::address).collect();
            let spans: Vec<u32> = self
                .own
                .iter()
                .enumerate()
                .flat_map(|(row, &own)| [starts[0], self.prefix, starts[row + 1], own])
                .map(|n| n as u32)
                .collect();

            let addresses = Buffer::from_slice(&device, &addresses, "pages").unwrap();
            let spans = Buffer::from_slice(&device, &spans, "spans").unwrap();
            let out = Buffer::new(&device, self.own.len() * heads * head_dim, "out").unwrap();
            attention(
                &*device,
                &Buffer::from_slice(&device, &qkv, "qkv").unwrap(),
                &Spans {
                    rows: self.own.len(),
                    pages: addresses.slice(),
                    spans: spans.slice(),
                },
                self.scores,
                self.shape,
                layer,
                &out,
            )
            .unwrap();

            let mut expected = Vec::new();
            for (row, &own) in self.own.iter().enumerate() {
                let visible = self.prefix + own;
                let first = visible.saturating_sub(self.scores.window.unwrap_or(usize::MAX));
                for head in 0..heads {
                    let kv_head = head / (heads / kv_heads);
                    let place = |position: usize, part: usize| {
                        let (table, token) = match position.checked_sub(self.prefix) {
                            None => (starts[0], position),
                            Some(token) => (starts[row + 1], token),
                        };
                        let page = &contents[table + token / PAGE_LEN];
                        let at = layer * layer_len(self.shape)
                            + ((kv_head * 2 + part) * PAGE_LEN + token % PAGE_LEN) * stride;
                        &page[at..][..head_dim]
                    };
                    let query = &qkv[row * width + head * head_dim..][..head_dim];
                    let weight_of = |position: usize| {
                        let key = place(position, 0);
                        let products = query.iter().zip(key);
                        let dot = products.map(|(&q, k)| f64::from(q) * k.to_f64());
                        let score = dot.sum::<f64>() * f64::from(self.scores.scale);
                        match self.scores.softcap.map(f64::from) {
                            Some(cap) => (cap * (score / cap).tanh()).exp(),
                            None => score.exp(),
                        }
                    };
                    let weights: Vec<f64> = (first..visible).map(weight_of).collect();
                    let sum = weights.iter().sum::<f64>();
                    expected.extend((0..head_dim).map(|i| {
                        let values = (first..visible).map(|p| place(p, 1)[i].to_f64());
                        values.zip(&weights).map(|(v, w)| v * w).sum::<f64>() / sum
                    }));
                }
            }
            (out.read(0, expected.len()).unwrap(), expected)
        }
    }

    fn case(heads: [usize; 3], prefix: usize, own: &[usize]) -> Case {
        let [heads, kv_heads, head_dim] = heads;
        Case {
            shape: KvShape {
                layers: 2,
                heads,
                kv_heads,
                head_dim,
            },
            prefix,
            own: own.to_vec(),
            scores: Scores {
                scale: 1.0 / (head_dim as f32).sqrt(),
                softcap: None,
                window: None,
            },
        }
    }

    /// Keys and values are the same bfloat16 on both sides, so what is left is float32: the rounding
    /// of a score (below 32, so 2e-6 at most, which its exponential carries on) and of a mean of
    /// numbers below 1.
    #[track_caller]
    fn check(case: &Case) {
        let (got, expected) = case.run();
        assert_within(&got, &expected, |_| 1e-5);
    }

    #[test]
    fn agrees_with_float64() {
        check(&case([1, 1, 2], 0, &[1]));
        check(&case([3, 1, 64], 33, &[1, 16, 40]));
        check(&case([4, 2, 80], 16, &[5]));
        check(&case([8, 1, 20], 5, &[17, 2]));
        check(&case([2, 2, 256], 70, &[3]));
    }

    #[test]
    fn windows_and_caps() {
        // Windows that begin in the own tokens, at their first, inside the prefix and before it.
        for window in [1, 7, 40, 41, 60, 1000] {
            for softcap in [None, Some(0.5)] {
                let mut case = case([4, 2, 32], 50, &[40, 3, 64]);
                case.scores.window = Some(window);
                case.scores.softcap = softcap;
                check(&case);
            }
        }
    }

    #[test]
    fn a_row_of_a_batch_has_the_bits_of_the_row_alone() {
        // Row 0's pages are the same in both: the tables behind it only grow.
        let (together, _) = case([4, 2, 64], 40, &[37, 5, 90]).run();
        let (alone, _) = case([4, 2, 64], 40, &[37]).run();
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&together[..alone.len()]), bits(&alone));
    }
}
