//! Passes over one row of logits: exponentials, sums, masses.
//!
//! Every result here has the same bits on every CPU and for every thread: additions run in an order
//! fixed by [`CHUNK`] and [`LANES`], not by the width of the machine's vectors, and no
//! multiplication is fused with an addition. The bodies are plain loops for the compiler to
//! vectorise; `vectorised!` compiles them for each kind of vector there is.

use super::simd::Isa;
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

/// Numbers added up in float32 before the sum goes over to float64.
pub(super) const CHUNK: usize = 1024;

/// Independent partial sums within a chunk: number i goes to sum i mod LANES, and the sums are
/// added up in halves (0 + 16, 1 + 17, …; then 0 + 8, …). Two AVX-512 vectors' worth, which hides
/// the latency of an addition.
const LANES: usize = 32;

/// Vector instructions that the bodies below are compiled for.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Width {
    Baseline,
    Avx2,
    Avx512,
}

/// What [`limit`] was given.
#[cfg(target_arch = "x86_64")]
static LIMIT: OnceLock<Width> = OnceLock::new();

/// From now on this process uses no wider vectors than an instruction set has, for measurements as on a
/// processor that has nothing newer. The first call counts. No result depends on it.
pub fn limit(isa: Isa) {
    #[cfg(target_arch = "x86_64")]
    let _ = LIMIT.set(match isa {
        Isa::Avx512 => Width::Avx512,
        Isa::AvxVnni | Isa::Avx2 => Width::Avx2,
        _ => Width::Baseline,
    });
    #[cfg(not(target_arch = "x86_64"))]
    let _ = isa;
}

/// The widest that the CPU has, within the limit.
#[cfg(target_arch = "x86_64")]
fn widest() -> Width {
    let width = if is_x86_feature_detected!("avx512f") {
        Width::Avx512
    } else if is_x86_feature_detected!("avx2") {
        Width::Avx2
    } else {
        Width::Baseline
    };
    let width = LIMIT.get().map_or(width, |limit| width.min(*limit));
    #[cfg(test)]
    let width = width.min(tests::WIDEST.get());
    width
}

/// Defines a function once and compiles it for each of [`Width`], chosen at run time.
macro_rules! vectorised {
    ($(#[$attribute:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$attribute])*
        $visibility fn $name($($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2($($argument: $type),*) $(-> $result)? {
                    body($($argument),*)
                }
                #[target_feature(enable = "avx512f")]
                fn avx512($($argument: $type),*) $(-> $result)? {
                    body($($argument),*)
                }
                match widest() {
                    // SAFETY: `widest` has found that the CPU has AVX-512F.
                    Width::Avx512 => return unsafe { avx512($($argument),*) },
                    // SAFETY: `widest` has found that the CPU has AVX2.
                    Width::Avx2 => return unsafe { avx2($($argument),*) },
                    Width::Baseline => {}
                }
            }
            body($($argument),*)
        }
    };
}

/// What the softmax of a row of logits comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Statistics {
    pub max: f32,
    /// log Σ exp(logit), in nats.
    pub log_sum_exp: f32,
    /// Mean logit. NaN if any logit is, or if logits of +∞ and -∞ meet.
    pub mean: f32,
}

impl Statistics {
    /// From Σ logit and Σ exp(logit - max) over `vocab_size` logits.
    pub fn new(max: f32, sum: f64, sum_exp: f64, vocab_size: usize) -> Statistics {
        Statistics {
            max,
            log_sum_exp: (f64::from(max) + sum_exp.ln()) as f32,
            mean: (sum / vocab_size as f64) as f32,
        }
    }

    /// Natural log-probability of a token with this logit.
    pub fn logprob(&self, logit: f32) -> f32 {
        (f64::from(logit) - f64::from(self.log_sum_exp)) as f32
    }

    /// KL divergence from the uniform distribution over `vocab_size` tokens, in nats.
    pub fn self_certainty(&self, vocab_size: usize) -> f32 {
        let entropy_of_uniform = (vocab_size as f64).ln();
        (f64::from(self.log_sum_exp) - f64::from(self.mean) - entropy_of_uniform) as f32
    }
}

/// Statistics of one row of logits, within 1e-6 relative of float64.
pub fn statistics(logits: &[f32]) -> Statistics {
    let (max, sum) = max_and_sum(logits);
    Statistics::new(max, sum, sum_exp(logits, max), logits.len())
}

/// e^x for x ≤ 0, within 2 units in the last place; 0 below -87 (where float32 leaves its normal
/// range, 1.6e-38) and exactly 1 at 0. NaN gives some number.
///
/// x = n · ln 2 + r with |r| ≤ ln 2 / 2; the polynomial in r is that of Cephes' `expf`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.0;
    // Adding 1.5 · 2²³ rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the first has so few bits that n times it is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;

    let clamped = if x > LOWEST { x } else { LOWEST };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut polynomial = 1.987_569_1e-4;
    for coefficient in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_6e-1,
        0.5,
    ] {
        polynomial = polynomial * r + coefficient;
    }
    let fraction = polynomial * (r * r) + r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x < LOWEST { 0.0 } else { fraction * power }
}

/// Adds up the partial sums of a chunk in halves.
#[inline(always)]
fn add_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

vectorised! {
    /// The largest number that is not NaN (-∞ if there is none) and the sum, which is NaN if any
    /// number is.
    pub(super) fn max_and_sum(values: &[f32]) -> (f32, f64) {
        let mut maxima = [f32::NEG_INFINITY; LANES];
        let mut total = 0.0;
        for chunk in values.chunks(CHUNK) {
            let mut sums = [0.0; LANES];
            let mut blocks = chunk.chunks_exact(LANES);
            for block in &mut blocks {
                for lane in 0..LANES {
                    let value = block[lane];
                    maxima[lane] = if value > maxima[lane] { value } else { maxima[lane] };
                    sums[lane] += value;
                }
            }
            for (lane, &value) in blocks.remainder().iter().enumerate() {
                maxima[lane] = if value > maxima[lane] { value } else { maxima[lane] };
                sums[lane] += value;
            }
            total += f64::from(add_lanes(sums));
        }
        let max = maxima.into_iter().fold(f32::NEG_INFINITY, f32::max);
        (max, total)
    }
}

vectorised! {
    /// Σ exp(value - max); `max` is the largest value.
    fn sum_exp(values: &[f32], max: f32) -> f64 {
        let mut total = 0.0;
        for chunk in values.chunks(CHUNK) {
            let mut sums = [0.0; LANES];
            let mut blocks = chunk.chunks_exact(LANES);
            for block in &mut blocks {
                for lane in 0..LANES {
                    sums[lane] += exp(block[lane] - max);
                }
            }
            for (lane, &value) in blocks.remainder().iter().enumerate() {
                sums[lane] += exp(value - max);
            }
            total += f64::from(add_lanes(sums));
        }
        total
    }
}

/// Weights that share an entry of `block_maxima`.
pub(super) const BLOCK: usize = 64;

vectorised! {
    /// Writes exp((logit - max) · inverse_temperature), from 0 to exactly 1, into `weights`, and the
    /// largest weight of each [`BLOCK`] into `block_maxima`. `weights` is as long as `logits`,
    /// `block_maxima` as the number of blocks.
    pub(super) fn weigh(
        logits: &[f32],
        max: f32,
        inverse_temperature: f32,
        weights: &mut [f32],
        block_maxima: &mut [f32],
    ) {
        let blocks = logits.chunks(BLOCK).zip(weights.chunks_mut(BLOCK)).zip(block_maxima);
        for ((logits, weights), maximum) in blocks {
            for (weight, &logit) in weights.iter_mut().zip(logits) {
                *weight = exp((logit - max) * inverse_temperature);
            }
            let mut maxima = [0.0; LANES];
            for half in weights.chunks(LANES) {
                for (maximum, &weight) in maxima.iter_mut().zip(half) {
                    *maximum = if weight > *maximum { weight } else { *maximum };
                }
            }
            let mut half = LANES / 2;
            while half > 0 {
                for lane in 0..half {
                    let (a, b) = (maxima[lane], maxima[lane + half]);
                    maxima[lane] = if a > b { a } else { b };
                }
                half /= 2;
            }
            *maximum = maxima[0];
        }
    }
}

/// A weight of 1 as a mass.
pub(super) const UNIT_MASS: u64 = 1 << 40;

/// A weight in [0, 1] in fixed point: round(weight · 2⁴⁰), halves to even. Sums of masses are
/// integers, so that they come out the same in whatever order they are added. A u64 holds the sum
/// of 2²³ of them.
#[inline(always)]
pub(super) fn mass(weight: f32) -> u64 {
    // 1.5 · 2¹²: the last bit of a float64 of this size stands for 2⁻⁴⁰.
    const ROUND: f64 = 6144.0;
    (f64::from(weight) + ROUND)
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
}

vectorised! {
    /// Mass and number of the weights of at least `cut`.
    pub(super) fn mass_and_count(weights: &[f32], cut: f32) -> (u64, usize) {
        let mut masses = [0u64; LANES];
        let mut counts = [0u32; LANES];
        let mut blocks = weights.chunks_exact(LANES);
        for block in &mut blocks {
            for lane in 0..LANES {
                let kept = block[lane] >= cut;
                masses[lane] += mass(if kept { block[lane] } else { 0.0 });
                counts[lane] += u32::from(kept);
            }
        }
        for (lane, &weight) in blocks.remainder().iter().enumerate() {
            let kept = weight >= cut;
            masses[lane] += mass(if kept { weight } else { 0.0 });
            counts[lane] += u32::from(kept);
        }
        (masses.iter().sum(), counts.iter().map(|&count| count as usize).sum())
    }
}

vectorised! {
    /// Number of the weights of at least `cut`.
    pub(super) fn count(weights: &[f32], cut: f32) -> usize {
        weights.iter().map(|&weight| u32::from(weight >= cut)).sum::<u32>() as usize
    }
}

vectorised! {
    /// Whether any number exceeds `bound`.
    pub(super) fn any_above(values: &[f32], bound: f32) -> bool {
        values.iter().fold(false, |found, &value| found | (value > bound))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::random::uniform;

    #[cfg(target_arch = "x86_64")]
    thread_local! {
        /// Lets a test run narrower vectors than the CPU has.
        pub(super) static WIDEST: std::cell::Cell<Width> = const { std::cell::Cell::new(Width::Avx512) };
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_width_of_vectors_gives_the_same_bits() {
        for len in [1, 100, 1024, 5003] {
            let logits: Vec<f32> = (0..len).map(|i| uniform(5, 0, i) * 30.0).collect();
            let results = [Width::Baseline, Width::Avx2, Width::Avx512].map(|widest| {
                WIDEST.set(widest);
                let statistics = statistics(&logits);
                let (max, sum) = max_and_sum(&logits);
                let mut weights = vec![0.0; logits.len()];
                let mut block_maxima = vec![0.0; logits.len().div_ceil(BLOCK)];
                weigh(&logits, max, 1.4, &mut weights, &mut block_maxima);
                let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                (
                    bits(&[statistics.max, statistics.log_sum_exp, statistics.mean]),
                    (sum.to_bits(), sum_exp(&logits, max).to_bits()),
                    (bits(&weights), bits(&block_maxima)),
                    (mass_and_count(&weights, 0.01), count(&weights, 0.01)),
                    any_above(&weights, 0.999),
                )
            });
            assert_eq!(results[0], results[1]);
            assert_eq!(results[0], results[2]);
        }
    }

    #[test]
    fn weights_and_their_maxima() {
        for len in [1, 33, 64, 65, 200] {
            let logits: Vec<f32> = (0..len).map(|i| uniform(8, 0, i) * 5.0).collect();
            let mut weights = vec![0.0; logits.len()];
            let mut block_maxima = vec![0.0; logits.len().div_ceil(BLOCK)];
            weigh(&logits, 5.0, 0.5, &mut weights, &mut block_maxima);
            for (&weight, &logit) in weights.iter().zip(&logits) {
                assert_eq!(weight, exp((logit - 5.0) * 0.5));
            }
            for (block, &maximum) in weights.chunks(BLOCK).zip(&block_maxima) {
                assert_eq!(maximum, block.iter().copied().fold(0.0, f32::max));
            }
        }
    }

    /// Distance in units of the last place of `expected` rounded to float32.
    fn ulps(actual: f32, expected: f64) -> f64 {
        let rounded = expected as f32;
        let unit = f64::from(f32::from_bits(rounded.to_bits() + 1)) - f64::from(rounded);
        (f64::from(actual) - expected).abs() / unit
    }

    #[test]
    fn exp_is_within_two_units_of_float64() {
        let mut worst = 0.0f64;
        for step in 0..=870_000u32 {
            let x = -(step as f32) * 1e-4;
            worst = worst.max(ulps(exp(x), f64::from(x).exp()));
        }
        assert!(worst < 2.0, "{worst}");
    }

    #[test]
    fn exp_at_its_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert!(exp(-87.0) > f32::MIN_POSITIVE);
        assert_eq!(exp(-87.1), 0.0);
        assert_eq!(exp(f32::MIN), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn statistics_match_float64() {
        // Lengths around the borders of a vector and of a chunk, and that of a real vocabulary.
        for len in [1, 31, 32, 33, 1023, 1024, 1025, 49_152, 151_936] {
            for scale in [0.1, 5.0, 60.0] {
                let logits: Vec<f32> = (0..len)
                    .map(|i| (uniform(len, 0, i as u32) - 0.4) * scale)
                    .collect();
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let exact = |f: &dyn Fn(f64) -> f64| -> f64 {
                    logits.iter().map(|&logit| f(f64::from(logit))).sum()
                };
                let log_sum_exp =
                    f64::from(max) + exact(&|logit| (logit - f64::from(max)).exp()).ln();
                let mean = exact(&|logit| logit) / len as f64;
                let actual = statistics(&logits);
                assert_eq!(actual.max, max);
                // A float32 of this size, and 32 additions of float32 within a chunk.
                let tolerance = 1e-6 * f64::from(scale).max(10.0);
                assert!((f64::from(actual.log_sum_exp) - log_sum_exp).abs() < tolerance);
                assert!((f64::from(actual.mean) - mean).abs() < tolerance);
            }
        }
    }

    #[test]
    fn nan_shows_in_the_mean_wherever_it_stands() {
        for position in [0, 31, 32, 1055, 1056, 2000] {
            let mut logits = vec![0.5; 2001];
            logits[position] = f32::NAN;
            assert!(statistics(&logits).mean.is_nan());
        }
    }

    #[test]
    fn mass_rounds_to_fixed_point() {
        assert_eq!(mass(0.0), 0);
        assert_eq!(mass(1.0), UNIT_MASS);
        assert_eq!(mass(0.5), UNIT_MASS / 2);
        for exponent in 0..60 {
            let weight = 1.7 * 0.5f32.powi(exponent);
            if weight <= 1.0 {
                let expected = (f64::from(weight) * UNIT_MASS as f64).round_ties_even();
                assert_eq!(mass(weight), expected as u64);
            }
        }
    }

    #[test]
    fn mass_and_count_match_a_plain_sum() {
        for len in [0, 1, 32, 45, 5000] {
            let weights: Vec<f32> = (0..len).map(|i| uniform(7, 1, i)).collect();
            for cut in [0.0, 0.25, 1.0] {
                let kept = weights.iter().filter(|&&weight| weight >= cut);
                assert_eq!(count(&weights, cut), kept.clone().count());
                assert_eq!(
                    mass_and_count(&weights, cut),
                    (kept.clone().map(|&weight| mass(weight)).sum(), kept.count())
                );
            }
        }
    }
}
