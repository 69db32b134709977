//! Random numbers of training: functions of a seed and of what they are for, so that a run that was
//! interrupted goes on as if it had not been.

/// SplitMix64's output function: every bit of the result depends on every bit of `x`.
#[inline(always)]
pub(super) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A stream of random numbers (SplitMix64).
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// The stream of one use: `purpose` tells streams of one seed apart.
    pub fn new(seed: u64, purpose: &[u64]) -> Self {
        Random(
            purpose
                .iter()
                .fold(mix(seed), |key, &part| mix(key ^ mix(part))),
        )
    }

    pub fn next(&mut self) -> u64 {
        let drawn = mix(self.0);
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        drawn
    }

    /// Below `bound`, which is far below 2⁶⁴: the bias of the multiplication does not matter.
    pub fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }

    /// In (0, 1).
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Of mean 0 and variance 1 (Box and Muller).
    pub fn normal(&mut self) -> f32 {
        let (length, angle) = (self.uniform(), self.uniform());
        ((-2.0 * length.ln()).sqrt() * (2.0 * std::f64::consts::PI * angle).cos()) as f32
    }

    /// `count` of `0..len` in random order (Fisher and Yates).
    pub fn choose(&mut self, len: usize, count: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..len).collect();
        let count = count.min(len);
        for i in 0..count {
            let other = i + self.below(len - i);
            all.swap(i, other);
        }
        all.truncate(count);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_repeat_and_differ() {
        let draw = |seed, purpose: &[u64]| Random::new(seed, purpose).next();
        assert_eq!(draw(1, &[2, 3]), draw(1, &[2, 3]));
        assert_ne!(draw(1, &[2, 3]), draw(1, &[3, 2]));
        assert_ne!(draw(1, &[2, 3]), draw(2, &[2, 3]));
    }

    #[test]
    fn choices_are_distinct_and_even() {
        let mut counts = [0; 5];
        for seed in 0..5000 {
            let mut chosen = Random::new(seed, &[]).choose(5, 2);
            for &i in &chosen {
                counts[i] += 1;
            }
            chosen.sort_unstable();
            chosen.dedup();
            assert_eq!(chosen.len(), 2);
        }
        // Each is expected 2000 times, with a standard deviation of 35.
        assert!(
            counts.iter().all(|&c| (1825..2175).contains(&c)),
            "{counts:?}"
        );
        assert_eq!(Random::new(0, &[]).choose(3, 9).len(), 3);
    }

    #[test]
    fn normal_numbers_have_their_moments() {
        let mut random = Random::new(7, &[]);
        let numbers: Vec<f64> = (0..100_000).map(|_| f64::from(random.normal())).collect();
        let moment = |power| numbers.iter().map(|x| x.powi(power)).sum::<f64>() / 1e5;
        // Five standard errors: 1, √2 and √96 times 5 / √100000.
        assert!(moment(1).abs() < 0.016 && (moment(2) - 1.0).abs() < 0.023);
        assert!((moment(4) - 3.0).abs() < 0.16);
    }
}
