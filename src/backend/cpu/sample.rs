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

use std::cell::RefCell;
use std::cmp::Ordering;

use super::filter::Weights;
use super::softmax::{CHUNK, any_above, mass, mass_and_count, max_and_sum, statistics};
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
        scratch.weights.filter(logits, max, row.params);
        let random = uniform(row.seed, row.candidate, row.position);
        Ok(draw(&scratch.weights, random, &mut scratch.chunk_masses))
    })?;
    let logprob = |token: usize| statistics.logprob(logits[token]);
    Ok(Sampled {
        token: token as u32,
        logprob: logprob(token),
        self_certainty: statistics.self_certainty(logits.len()),
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
        scratch.weights.filter(logits, max, row.params);
        let (weights, cut) = (scratch.weights.values(), scratch.weights.cut());
        let (total, _) = mass_and_count(weights, cut);
        let masses = weights
            .iter()
            .map(|&weight| if weight >= cut { mass(weight) } else { 0 });
        Ok(masses
            .enumerate()
            .filter(|&(_, mass)| mass > 0)
            .map(|(token, mass)| (token as u32, mass as f64 / total as f64))
            .collect())
    })
}

/// Buffers kept from row to row.
#[derive(Default)]
struct Scratch {
    adjusted: Vec<f32>,
    weights: Weights,
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

/// Draws among the kept tokens, by inverse distribution function in the order of ids. `random` is
/// from [`uniform`].
fn draw(weights: &Weights, random: f32, chunk_masses: &mut Vec<u64>) -> usize {
    let (weights, cut) = (weights.values(), weights.cut());
    chunk_masses.clear();
    chunk_masses.extend(
        weights
            .chunks(CHUNK)
            .map(|chunk| mass_and_count(chunk, cut).0),
    );
    let total: u64 = chunk_masses.iter().sum();
    let steps = (random * (1u32 << UNIFORM_BITS) as f32) as u128;
    let mut target = ((steps * u128::from(total)) >> UNIFORM_BITS) as u64;

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
    // No logit is NaN here; 0 and -0 are equal.
    let by_rank = |a: &usize, b: &usize| {
        let order = logits[*b].partial_cmp(&logits[*a]);
        order.unwrap_or(Ordering::Equal).then(a.cmp(b))
    };
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
