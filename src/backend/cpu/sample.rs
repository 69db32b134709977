//! Draws a token from a row of logits: the CPU twin of the sampling kernel.
//!
//! What it computes, so that a kernel can do the same:
//!
//! 1. Bias and repetition penalty change the logits of single tokens.
//! 2. Temperature 0 takes the token with the largest logit, the lowest id among equals.
//! 3. Each token gets the weight w = exp((logit - max) / temperature), a float32 in [0, 1], and the
//!    mass round(w · 2⁴⁰), an integer. Sums of masses are exact, so their order is free.
//! 4. Each filter keeps the tokens whose weight is at least a cut. Top-k: the cut is the k-th
//!    largest weight. Top-p, of what top-k left: the largest cut at which the mass reaches
//!    ⌈top_p · total⌉; of the tokens that weigh exactly the cut, the lowest ids are kept, as many
//!    as are needed. Min-p: the cut is min_p, the largest weight being 1.
//! 5. With u = [`uniform`](crate::backend::random::uniform)(seed, candidate, position), the token is
//!    the first in the order of ids at which the running sum of kept masses exceeds ⌊u · total⌋.
//!
//! The cuts are found by bisection over the bits of w, which order as the numbers do: each step is
//! one pass of compare and add over the weights still in question. Nothing is sorted.

use std::cell::RefCell;

use super::softmax::{CHUNK, any_above, mass, mass_and_count, max_and_sum, statistics, weigh};
use crate::backend::random::{UNIFORM_BITS, uniform};
use crate::backend::sampling::{LogitsError, SampleRow, Sampled};

/// Draws a token for `row` from its `logits`, one for each token of the vocabulary.
///
/// `row.params` are valid ([`SamplingParams::validate`](crate::backend::sampling::SamplingParams::validate)).
/// The result depends on the arguments alone, not on the thread or the CPU.
pub fn sample(logits: &[f32], row: &SampleRow) -> Result<Sampled, LogitsError> {
    let statistics = statistics(logits);
    check(logits, statistics.max, f64::from(statistics.mean), row)?;
    let token = SCRATCH.with_borrow_mut(|scratch| {
        let (logits, max) = adjust(logits, statistics.max, row, &mut scratch.adjusted)?;
        if row.params.temperature == 0.0 {
            return Ok(first_of(logits, max));
        }
        let cut = filter(
            logits,
            max,
            row,
            &mut scratch.weights,
            &mut scratch.undecided,
        );
        Ok(draw(&scratch.weights, cut, row, &mut scratch.chunk_masses))
    })?;
    let log_sum_exp = f64::from(statistics.log_sum_exp);
    let logprob = |token: usize| (f64::from(logits[token]) - log_sum_exp) as f32;
    let entropy_of_uniform = (logits.len() as f64).ln();
    Ok(Sampled {
        token: token as u32,
        logprob: logprob(token),
        self_certainty: (log_sum_exp - f64::from(statistics.mean) - entropy_of_uniform) as f32,
        top_logprobs: largest(logits, row.top_logprobs)
            .into_iter()
            .map(|token| (token as u32, logprob(token)))
            .collect(),
    })
}

/// The distribution that [`sample`] draws from: the kept tokens in the order of ids, each with its
/// probability.
pub fn distribution(logits: &[f32], row: &SampleRow) -> Result<Vec<(u32, f64)>, LogitsError> {
    let (max, sum) = max_and_sum(logits);
    check(logits, max, sum, row)?;
    SCRATCH.with_borrow_mut(|scratch| {
        let (logits, max) = adjust(logits, max, row, &mut scratch.adjusted)?;
        if row.params.temperature == 0.0 {
            return Ok(vec![(first_of(logits, max) as u32, 1.0)]);
        }
        let cut = filter(
            logits,
            max,
            row,
            &mut scratch.weights,
            &mut scratch.undecided,
        );
        let (total, _) = mass_and_count(&scratch.weights, cut);
        let kept = scratch
            .weights
            .iter()
            .enumerate()
            .filter(|&(_, &weight)| weight >= cut);
        Ok(kept
            .map(|(token, &weight)| (token as u32, mass(weight) as f64 / total as f64))
            .filter(|&(_, probability)| probability > 0.0)
            .collect())
    })
}

/// Buffers as long as the vocabulary, kept from row to row: mapping fresh memory would cost as much
/// as the sampling.
#[derive(Default)]
struct Scratch {
    adjusted: Vec<f32>,
    weights: Vec<f32>,
    undecided: Vec<f32>,
    chunk_masses: Vec<u64>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Refuses logits that no token can be drawn from. `sum` is that of the logits, or their mean.
fn check(logits: &[f32], max: f32, sum: f64, row: &SampleRow) -> Result<(), LogitsError> {
    // The sum of huge numbers may also be NaN (+∞ and -∞ met); the search then finds nothing.
    if sum.is_nan() || max == f32::INFINITY {
        let damaged = |value: f32| value.is_nan() || value == f32::INFINITY;
        if let Some(token) = logits.iter().position(|&value| damaged(value)) {
            return Err(LogitsError::NotFinite {
                row: row.row,
                token,
                value: logits[token],
            });
        }
    }
    if max == f32::NEG_INFINITY {
        return Err(LogitsError::NothingPossible {
            row: row.row,
            vocab_size: logits.len(),
        });
    }
    Ok(())
}

/// The logits with bias and penalty, and their maximum: copied into `adjusted` if anything changes.
fn adjust<'a>(
    logits: &'a [f32],
    max: f32,
    row: &SampleRow,
    adjusted: &'a mut Vec<f32>,
) -> Result<(&'a [f32], f32), LogitsError> {
    let penalty = row.params.repetition_penalty;
    if penalty == 1.0 && row.logit_bias.is_empty() {
        return Ok((logits, max));
    }
    adjusted.clear();
    adjusted.extend_from_slice(logits);
    for &(token, bias) in row.logit_bias {
        if let Some(logit) = adjusted.get_mut(token as usize) {
            *logit += bias;
        }
    }
    if penalty != 1.0 {
        let mut seen = vec![false; logits.len()];
        for &token in row.prompt.iter().chain(row.answer) {
            let token = token as usize;
            if token < seen.len() && !seen[token] {
                seen[token] = true;
                let logit = &mut adjusted[token];
                *logit = if *logit < 0.0 {
                    *logit * penalty
                } else {
                    *logit / penalty
                };
            }
        }
    }
    let (max, sum) = max_and_sum(adjusted);
    check(adjusted, max, sum, row)?;
    Ok((adjusted, max))
}

/// Index of the first number equal to `max`, which is among them.
fn first_of(values: &[f32], max: f32) -> usize {
    values.iter().position(|&value| value == max).unwrap_or(0)
}

/// Writes the weights of all tokens into `weights` and returns the cut: the tokens that weigh at
/// least as much are kept.
fn filter(
    logits: &[f32],
    max: f32,
    row: &SampleRow,
    weights: &mut Vec<f32>,
    undecided: &mut Vec<f32>,
) -> f32 {
    let params = row.params;
    weights.resize(logits.len(), 0.0);
    // Below 1 / f32::MAX the inverse would be infinite, and the weight of the maximum 0 · ∞.
    let inverse_temperature = params.temperature.recip().min(f32::MAX);
    weigh(logits, max, inverse_temperature, weights);

    let mut cut = 0.0;
    if (1..weights.len()).contains(&params.top_k) {
        let wanted = params.top_k;
        cut = find_cut(weights, 0.0, undecided, |tally| tally.count >= wanted).weight;
    }
    if params.top_p < 1.0 {
        let total = mass_and_count(weights, cut).0;
        // As a float64 the product may be off by 2⁻⁵² of it, as a float32 top_p is by far more.
        let wanted = ((f64::from(params.top_p) * total as f64).ceil() as u64).clamp(1, total);
        // Tokens below this weight have no more than half of the mass to be cut off, so the search
        // starts above most of the vocabulary.
        let tail = (total - wanted) as f64 / super::softmax::UNIT_MASS as f64;
        let lowest = (0.5 * tail / weights.len() as f64) as f32;
        let found = find_cut(weights, lowest.max(cut), undecided, |tally| {
            tally.mass >= wanted
        });
        // Among tokens of equal weight the lowest ids are kept.
        let ties_kept = (wanted - found.above.mass).div_ceil(mass(found.weight)) as usize;
        if ties_kept < found.ties {
            let ties = weights.iter_mut().filter(|weight| **weight == found.weight);
            ties.skip(ties_kept).for_each(|weight| *weight = 0.0);
        }
        cut = found.weight;
    }
    cut.max(params.min_p).min(1.0)
}

/// Mass and number of the tokens from some weight upward.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Tally {
    mass: u64,
    count: usize,
}

#[derive(Debug, PartialEq)]
struct Cut {
    weight: f32,
    /// Of the tokens that weigh more than `weight`.
    above: Tally,
    /// Tokens that weigh exactly `weight`.
    ties: usize,
}

/// The largest weight such that the tokens weighing at least as much satisfy `enough`, which all
/// tokens together do.
///
/// `likely_below` only makes it fast: most weights are smaller, the one sought probably is not.
fn find_cut(
    weights: &[f32],
    likely_below: f32,
    undecided: &mut Vec<f32>,
    enough: impl Fn(Tally) -> bool,
) -> Cut {
    let tally = |weights: &[f32], cut: f32| {
        let (mass, count) = mass_and_count(weights, cut);
        Tally { mass, count }
    };
    // Weights are not negative, so that their bits order as they do. Invariant: the tokens from
    // `low` upward are enough, those from `high` upward are not; only weights in low..high can be
    // the cut.
    let mut low = likely_below.to_bits();
    let mut at_low = tally(weights, likely_below);
    if !enough(at_low) {
        (low, at_low) = (0, tally(weights, 0.0));
    }
    let mut high = 1.0f32.to_bits() + 1;
    let mut above = Tally { mass: 0, count: 0 };
    // Holds low..high once that is a small part of all.
    let mut gathered = false;
    let mut gathered_above = above;
    while high - low > 1 {
        let left = at_low.count - above.count;
        let searched = if gathered {
            undecided.len()
        } else {
            weights.len()
        };
        if left < searched / 8 {
            let (from, to) = (f32::from_bits(low), f32::from_bits(high));
            if gathered {
                undecided.retain(|&weight| weight >= from && weight < to);
            } else {
                gather(weights, from, to, undecided);
                gathered = true;
            }
            gathered_above = above;
        }
        let middle = low + (high - low) / 2;
        let at_middle = if gathered {
            let inside = tally(undecided, f32::from_bits(middle));
            Tally {
                mass: gathered_above.mass + inside.mass,
                count: gathered_above.count + inside.count,
            }
        } else {
            tally(weights, f32::from_bits(middle))
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

/// Collects the weights in `from..to`; few are expected.
fn gather(weights: &[f32], from: f32, to: f32, into: &mut Vec<f32>) {
    into.clear();
    // The largest number below a positive one; below 0 anything negative.
    let below = if from > 0.0 {
        f32::from_bits(from.to_bits() - 1)
    } else {
        -1.0
    };
    for block in weights.chunks(64) {
        if any_above(block, below) {
            into.extend(
                block
                    .iter()
                    .filter(|&&weight| weight >= from && weight < to),
            );
        }
    }
}

/// Draws among the weights of at least `cut`, by inverse distribution function in the order of ids.
fn draw(weights: &[f32], cut: f32, row: &SampleRow, chunk_masses: &mut Vec<u64>) -> usize {
    chunk_masses.clear();
    chunk_masses.extend(
        weights
            .chunks(CHUNK)
            .map(|chunk| mass_and_count(chunk, cut).0),
    );
    let total: u64 = chunk_masses.iter().sum();
    let grid = 1u64 << UNIFORM_BITS;
    let random = (uniform(row.seed, row.candidate, row.position) * grid as f32) as u64;
    // Exact: `random` is below 2²⁴. The product shifted back is below `total`.
    let mut target = ((u128::from(random) * u128::from(total)) >> UNIFORM_BITS) as u64;

    let mut first = 0;
    for &chunk_mass in chunk_masses.iter() {
        if target < chunk_mass {
            break;
        }
        target -= chunk_mass;
        first += CHUNK;
    }
    for (token, &weight) in weights.iter().enumerate().skip(first) {
        let mass = if weight >= cut { mass(weight) } else { 0 };
        if target < mass {
            return token;
        }
        target -= mass;
    }
    // The largest weight is 1 and no cut is higher, so `total` is positive and `target` below it.
    unreachable!("the masses add up to more than the target")
}

/// Tokens of the `count` largest logits, best first, the lowest id first among equals.
fn largest(logits: &[f32], count: usize) -> Vec<usize> {
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    let by_rank = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    // Tokens that beat the `count` best so far; those are sifted out whenever it has grown enough.
    let mut best: Vec<usize> = (0..count).collect();
    let mut bound = best
        .iter()
        .map(|&token| logits[token])
        .fold(f32::INFINITY, f32::min);
    let enough = 2 * count + 64;
    for (block_index, block) in logits[count..].chunks(64).enumerate() {
        if !any_above(block, bound) {
            continue;
        }
        let first = count + block_index * 64;
        best.extend((first..first + block.len()).filter(|&token| logits[token] > bound));
        if best.len() >= enough {
            best.select_nth_unstable_by(count - 1, by_rank);
            best.truncate(count);
            bound = logits[best[count - 1]];
        }
    }
    best.sort_unstable_by(by_rank);
    best.truncate(count);
    best
}
