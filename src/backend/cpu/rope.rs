//! Rotary position embedding (Su et al. 2021, in the half-split form), and what goes with it: the
//! norms of queries and keys, and the append to the KV cache.

use super::kv_cache::KvCache;
use super::rows::{Rows, Vector};
use super::simd::Isa;
use super::team::Team;
use crate::backend::{Norm, PageId};
use crate::model::config::Rope;

/// Cosines and sines of the rows of a batch, for one rope: `[rows][cos × pairs | sin × pairs]`.
pub struct Angles {
    values: Vec<f32>,
    pairs: usize,
}

impl Angles {
    pub fn new(rope: &Rope, positions: &[u32]) -> Angles {
        let pairs = rope.frequencies.len();
        let mut values = Vec::with_capacity(positions.len() * 2 * pairs);
        let mut last: Option<u32> = None;
        for &position in positions {
            // All candidates of a step stand at the same few positions.
            if last == Some(position) {
                values.extend_from_within(values.len() - 2 * pairs..);
                continue;
            }
            last = Some(position);
            // The angle is rounded to float32 first, as every reference implementation does.
            let angle = |f: &f32| position as f32 * f;
            values.extend(
                rope.frequencies
                    .iter()
                    .map(|f| angle(f).cos() * rope.attention_factor),
            );
            values.extend(
                rope.frequencies
                    .iter()
                    .map(|f| angle(f).sin() * rope.attention_factor),
            );
        }
        Angles { values, pairs }
    }

    /// `[rows][cos × pairs | sin × pairs]`
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    fn rotate(&self, row: usize, head: &mut [f32]) {
        let (cos, sin) = self.values[row * 2 * self.pairs..][..2 * self.pairs].split_at(self.pairs);
        let (low, high) = head[..2 * self.pairs].split_at_mut(self.pairs);
        for i in 0..self.pairs {
            let (a, b) = (low[i], high[i]);
            low[i] = a * cos[i] - b * sin[i];
            high[i] = b * cos[i] + a * sin[i];
        }
    }
}

/// Which parts of a row are queries, keys and values.
#[derive(Clone, Copy)]
pub struct Heads {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// One layer's part in [`rope_append`].
pub struct Append<'a> {
    pub layer: usize,
    pub heads: Heads,
    pub query_norm: Option<Norm<'a, Vector>>,
    pub key_norm: Option<Norm<'a, Vector>>,
}

/// Normalises and rotates each row's queries and keys in place; appends keys and values to the cache.
/// `places` says where each row's token goes; no two rows share one.
pub fn rope_append(
    team: &Team,
    isa: Isa,
    angles: &Angles,
    append: &Append,
    places: &[(PageId, usize)],
    qkv: &mut Rows,
    kv: &mut KvCache,
) {
    let Heads {
        heads,
        kv_heads,
        head_dim,
    } = append.heads;
    let (width, rows) = (qkv.width(), qkv.rows());
    assert!(width == (heads + 2 * kv_heads) * head_dim && rows == places.len());
    let (qkv, kv) = (qkv.shared(), kv.shared());
    let chunk = rows.div_ceil(4 * team.threads());
    team.run(rows.div_ceil(chunk), |task| {
        let first = task * chunk;
        for (row, &place) in (first..).zip(&places[first..rows.min(first + chunk)]) {
            // SAFETY: each row belongs to one task, and so does its place in the cache.
            let row_of_qkv = unsafe { std::slice::from_raw_parts_mut(qkv.row(row), width) };
            let (queries, rest) = row_of_qkv.split_at_mut(heads * head_dim);
            let (keys, values) = rest.split_at_mut(kv_heads * head_dim);
            for query in queries.chunks_exact_mut(head_dim) {
                normalize(query, append.query_norm.as_ref());
                angles.rotate(row, query);
            }
            for (kv_head, key) in keys.chunks_exact_mut(head_dim).enumerate() {
                normalize(key, append.key_norm.as_ref());
                angles.rotate(row, key);
                let value = &values[kv_head * head_dim..][..head_dim];
                // SAFETY: as above.
                unsafe { kv.append(isa, place, append.layer, kv_head, key, value) };
            }
        }
    });
}

fn normalize(head: &mut [f32], norm: Option<&Norm<Vector>>) {
    let Some(norm) = norm else { return };
    let mean_square = head.iter().map(|x| x * x).sum::<f32>() / head.len() as f32;
    let scale = 1.0 / (mean_square + norm.epsilon).sqrt();
    for (x, weight) in head.iter_mut().zip(norm.weight.as_slice()) {
        *x *= scale * weight;
    }
}
