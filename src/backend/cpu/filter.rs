//! Top-k, top-p and min-p over the weights of a vocabulary, without sorting it.
//!
//! Each filter keeps the tokens whose weight is at least a cut. The cuts are found by bisection over
//! the bits of the weights, which order as the numbers do: a step is one pass of compare and add
//! over the weights still in question, and those soon are few.

use super::softmax::{BLOCK, UNIT_MASS, count, mass, mass_and_count, weigh};
use crate::backend::sampling::SamplingParams;

/// The weights of a row's tokens, and the buffers to filter them: kept from row to row, because
/// mapping fresh memory costs as much as the sampling.
#[derive(Default)]
pub(super) struct Weights {
    /// exp((logit - max) / temperature) of each token: from 0 to exactly 1.
    values: Vec<f32>,
    /// The largest of each [`BLOCK`] of `values`.
    block_maxima: Vec<f32>,
    /// Weights of at least this are kept.
    cut: f32,
    /// Weights in question while a cut is searched.
    undecided: Vec<f32>,
    ranked_maxima: Vec<f32>,
}

/// Mass and number of the tokens from some weight upward.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Tally {
    mass: u64,
    count: usize,
}

/// Where a filter cuts.
#[derive(Debug, PartialEq)]
struct Cut {
    weight: f32,
    /// Of the tokens that weigh more than `weight`.
    above: Tally,
    /// Tokens that weigh exactly `weight`.
    ties: usize,
}

impl Weights {
    /// Weighs the tokens by their logits, of which `max` is the largest, and filters them.
    pub fn filter(&mut self, logits: &[f32], max: f32, params: &SamplingParams) {
        self.values.resize(logits.len(), 0.0);
        self.block_maxima.resize(logits.len().div_ceil(BLOCK), 0.0);
        // Below 1 / f32::MAX the inverse would be infinite, and the weight of the maximum 0 · ∞.
        let inverse_temperature = params.temperature.recip().min(f32::MAX);
        weigh(
            logits,
            max,
            inverse_temperature,
            &mut self.values,
            &mut self.block_maxima,
        );
        self.cut = 0.0;
        if (1..logits.len()).contains(&params.top_k) {
            self.keep_top_k(params.top_k);
        }
        if params.top_p < 1.0 {
            self.keep_top_p(params.top_p);
        }
        self.cut = self.cut.max(params.min_p).min(1.0);
    }

    /// Weights of all tokens.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Weight from which on tokens are kept.
    pub fn cut(&self) -> f32 {
        self.cut
    }

    /// Keeps the `k` heaviest tokens, and all that weigh as much as the lightest of them.
    fn keep_top_k(&mut self, k: usize) {
        // The k-th largest of the blocks' maxima is at most the k-th largest weight, and near it.
        self.ranked_maxima.clone_from(&self.block_maxima);
        let lowest = if k <= self.ranked_maxima.len() {
            *self
                .ranked_maxima
                .select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a))
                .1
        } else {
            0.0
        };
        let tally = |weights: &[f32], cut: f32| Tally {
            mass: 0,
            count: count(weights, cut),
        };
        self.cut = self
            .find_cut(lowest, tally, |tally| tally.count >= k)
            .weight;
    }

    /// Of the tokens kept so far, keeps the fewest heaviest whose mass is at least `top_p` of
    /// theirs; among equals those with the lowest ids.
    fn keep_top_p(&mut self, top_p: f32) {
        let total = mass_and_count(&self.values, self.cut).0;
        // Off by no more than 2⁻⁵² of the mass, far less than top_p as a float32 is.
        let wanted = ((f64::from(top_p) * total as f64).ceil() as u64).clamp(1, total);
        // All tokens below this weight together have at most half of the mass to be cut off.
        let tail = (total - wanted) as f64 / UNIT_MASS as f64;
        let lowest = (0.5 * tail / self.values.len() as f64) as f32;
        let tally = |weights: &[f32], cut: f32| {
            let (mass, count) = mass_and_count(weights, cut);
            Tally { mass, count }
        };
        let found = self.find_cut(lowest.max(self.cut), tally, |tally| tally.mass >= wanted);
        self.cut = found.weight;
        // Without its ties the cut is not enough, so they have some mass.
        let ties_kept = (wanted - found.above.mass).div_ceil(mass(found.weight)) as usize;
        if ties_kept < found.ties {
            let ties = self
                .values
                .iter_mut()
                .filter(|weight| **weight == found.weight);
            ties.skip(ties_kept).for_each(|weight| *weight = 0.0);
        }
    }

    /// The largest weight such that the tokens weighing at least as much are `enough`, which all
    /// tokens together are. It is at least `lowest`, but for rounding.
    fn find_cut(
        &mut self,
        lowest: f32,
        tally: impl Fn(&[f32], f32) -> Tally,
        enough: impl Fn(Tally) -> bool,
    ) -> Cut {
        // The bits of numbers that are not negative order as they do. Invariant: the tokens from
        // `low` upward are enough, those from `high` upward are not; only weights in low..high can
        // be the cut.
        let mut low = lowest.to_bits();
        let mut at_low = tally(&self.values, lowest);
        if !enough(at_low) {
            (low, at_low) = (0, tally(&self.values, 0.0));
        }
        let mut high = 1.0f32.to_bits() + 1;
        let mut above = Tally::default();
        // Once low..high is a small part of the vocabulary it is copied to `undecided`; what lies
        // above all of that has been tallied.
        let mut copied: Option<Tally> = None;
        while high - low > 1 {
            let searched = if copied.is_some() {
                self.undecided.len()
            } else {
                self.values.len()
            };
            if at_low.count - above.count < searched / 8 {
                let (from, to) = (f32::from_bits(low), f32::from_bits(high));
                if copied.is_some() {
                    narrow(&mut self.undecided, from, to);
                } else {
                    self.copy_undecided(from, to);
                }
                copied = Some(above);
            }
            let middle = low + (high - low) / 2;
            let at_middle = match copied {
                Some(outside) => {
                    let inside = tally(&self.undecided, f32::from_bits(middle));
                    Tally {
                        mass: outside.mass + inside.mass,
                        count: outside.count + inside.count,
                    }
                }
                None => tally(&self.values, f32::from_bits(middle)),
            };
            if enough(at_middle) {
                (low, at_low) = (middle, at_middle);
            } else {
                (high, above) = (middle, at_middle);
            }
        }
        Cut {
            weight: f32::from_bits(low),
            above,
            ties: at_low.count - above.count,
        }
    }

    /// Copies the weights in `from..to` to `undecided`.
    fn copy_undecided(&mut self, from: f32, to: f32) {
        self.undecided.clear();
        for (block, &maximum) in self.values.chunks(BLOCK).zip(&self.block_maxima) {
            if maximum >= from {
                // Writes each and keeps those in question: which they are no branch can predict.
                let mut len = self.undecided.len();
                self.undecided.resize(len + block.len(), 0.0);
                for &weight in block {
                    self.undecided[len] = weight;
                    len += usize::from(weight >= from && weight < to);
                }
                self.undecided.truncate(len);
            }
        }
    }
}

/// Drops the weights that are not in `from..to`.
fn narrow(weights: &mut Vec<f32>, from: f32, to: f32) {
    let mut len = 0;
    for place in 0..weights.len() {
        let weight = weights[place];
        weights[len] = weight;
        len += usize::from(weight >= from && weight < to);
    }
    weights.truncate(len);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::random::uniform;

    fn filtered(logits: &[f32], params: &SamplingParams) -> Vec<usize> {
        let mut weights = Weights::default();
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        weights.filter(logits, max, params);
        let kept = |&token: &usize| weights.values()[token] >= weights.cut();
        (0..logits.len()).filter(kept).collect()
    }

    #[test]
    fn top_k_keeps_k_at_every_size() {
        // Fewer and more than there are blocks, in vocabularies that end within a block.
        for vocab_size in [5, 64, 65, 1000, 20_001] {
            // Distinct logits within a range where weights are normal numbers.
            let logits: Vec<f32> = (0..vocab_size)
                .map(|token| (token * 7919 % vocab_size) as f32 / vocab_size as f32 * 20.0)
                .collect();
            let mut ranked: Vec<usize> = (0..vocab_size).collect();
            ranked.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            for k in [1, 2, 15, 16, 17, 300, 999, 19_000] {
                let params = SamplingParams {
                    top_k: k,
                    ..Default::default()
                };
                let mut expected = ranked[..k.min(vocab_size)].to_vec();
                expected.sort_unstable();
                assert_eq!(filtered(&logits, &params), expected, "{k} of {vocab_size}");
            }
        }
    }

    #[test]
    fn top_k_keeps_all_that_equal_the_last() {
        let params = SamplingParams {
            top_k: 2,
            ..Default::default()
        };
        assert_eq!(filtered(&[1.0, 3.0, 1.0, 0.0, 1.0], &params), [0, 1, 2, 4]);
    }

    #[test]
    fn top_p_keeps_the_lowest_ids_of_equal_tokens() {
        for (top_p, kept) in [(0.5, 2), (0.5001, 3), (0.75, 3), (0.0001, 1), (0.9999, 4)] {
            let params = SamplingParams {
                top_p,
                ..Default::default()
            };
            let expected: Vec<usize> = (0..kept).collect();
            assert_eq!(filtered(&[2.0; 4], &params), expected, "{top_p}");
        }
        // A thousand equal tokens behind a heavier one: 2 / 1002 + 499 / 1002 = 0.5.
        let mut logits = vec![0.0; 1001];
        logits[700] = 2f32.ln();
        let params = SamplingParams {
            top_p: 0.4999,
            ..Default::default()
        };
        let expected: Vec<usize> = (0..499).chain([700]).collect();
        assert_eq!(filtered(&logits, &params), expected);
    }

    #[test]
    fn top_p_in_a_flat_vocabulary_is_exact() {
        let logits: Vec<f32> = (0..50_000)
            .map(|token| uniform(3, 0, token) * 2.0)
            .collect();
        let mut ranked: Vec<usize> = (0..logits.len()).collect();
        ranked.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        for top_p in [0.01f32, 0.3, 0.95, 0.999] {
            let mut above = 0.0;
            let kept = ranked.iter().take_while(|&&token| {
                let keep = above < f64::from(top_p) * total;
                above += f64::from(logits[token]).exp();
                keep
            });
            let params = SamplingParams {
                top_p,
                ..Default::default()
            };
            // Rounding of the weights may move the border by a token.
            let difference = filtered(&logits, &params).len().abs_diff(kept.count());
            assert!(difference <= 1, "{top_p}: {difference}");
        }
    }

    #[test]
    fn min_p_is_a_fraction_of_the_largest() {
        let logits = [0.0, 0.5f32.ln(), 0.26f32.ln(), 0.24f32.ln()];
        let params = SamplingParams {
            min_p: 0.25,
            ..Default::default()
        };
        assert_eq!(filtered(&logits, &params), [0, 1, 2]);
        let params = SamplingParams {
            min_p: 1.0,
            ..Default::default()
        };
        assert_eq!(filtered(&[3.0, 3.0, 2.9], &params), [0, 1]);
    }

    #[test]
    fn buffers_of_a_longer_row_leave_no_trace() {
        let mut weights = Weights::default();
        let params = SamplingParams {
            top_k: 3,
            top_p: 0.9,
            ..Default::default()
        };
        weights.filter(&[9.0; 500], 9.0, &params);
        weights.filter(&[1.0, 2.0, 0.0], 2.0, &params);
        let kept = weights
            .values()
            .iter()
            .filter(|&&weight| weight >= weights.cut());
        assert_eq!((weights.values().len(), kept.count()), (3, 2));
    }
}
