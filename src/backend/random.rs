//! Counter-based random numbers: a number is a pure function of its key, so a candidate draws the
//! same ones whatever else is in the batch, on the CPU and on a GPU alike.
//!
//! The generator is Philox4x32-10 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*,
//! SC 2011). A kernel that does the following gets the same numbers bit for bit:
//!
//! - key = (low 32 bits of the seed, high 32 bits of the seed);
//! - counter = (position, candidate, 0, 0); the zeros are reserved for further streams;
//! - ten rounds; the key grows by (`0x9E3779B9`, `0xBB67AE85`) between rounds;
//! - the number is the upper 24 bits of the first output word, times 2⁻²⁴.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_INCREMENTS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Bits of [`uniform`]: as many as a float32 in [0, 1) holds on an even grid.
pub const UNIFORM_BITS: u32 = 24;

/// The Philox4x32-10 bijection of `counter` under `key`.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..ROUNDS {
        if round > 0 {
            key[0] = key[0].wrapping_add(KEY_INCREMENTS[0]);
            key[1] = key[1].wrapping_add(KEY_INCREMENTS[1]);
        }
        let (low0, high0) = widening_mul(MULTIPLIERS[0], counter[0]);
        let (low1, high1) = widening_mul(MULTIPLIERS[1], counter[2]);
        counter = [
            high1 ^ counter[1] ^ key[0],
            low1,
            high0 ^ counter[3] ^ key[1],
            low0,
        ];
    }
    counter
}

/// The random number in [0, 1) with which `candidate` of the request seeded with `seed` draws the
/// token at `position`: a multiple of 2⁻²⁴, each as likely as the other.
pub fn uniform(seed: u64, candidate: u32, position: u32) -> f32 {
    let key = [seed as u32, (seed >> 32) as u32];
    let word = philox4x32([position, candidate, 0, 0], key)[0];
    (word >> (u32::BITS - UNIFORM_BITS)) as f32 * (1.0 / (1u32 << UNIFORM_BITS) as f32)
}

/// (low, high) word of the product.
fn widening_mul(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    (product as u32, (product >> 32) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// `kat_vectors` of Random123, the authors' own implementation.
    #[test]
    fn philox_meets_the_published_known_answers() {
        for (counter, key, expected) in [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox4x32(counter, key), expected);
        }
    }

    #[test]
    fn uniform_is_the_upper_bits_of_the_first_word() {
        // The first known answer: 0x6627e8d5 >> 8.
        assert_eq!(uniform(0, 0, 0), 0x0066_27e8 as f32 / 16_777_216.0);
        assert_eq!(
            uniform(0x299f_31d0_a409_3822, 5, 7),
            (philox4x32([7, 5, 0, 0], [0xa409_3822, 0x299f_31d0])[0] >> 8) as f32 / 16_777_216.0
        );
    }

    #[test]
    fn every_part_of_the_key_counts() {
        let mut words = HashSet::new();
        for bit in 0..64 {
            words.insert(uniform(1 << bit, 0, 0).to_bits());
        }
        for bit in 0..32 {
            words.insert(uniform(0, 1 << bit, 0).to_bits());
            words.insert(uniform(0, 0, 1 << bit).to_bits());
        }
        assert_eq!(words.len(), 128);
    }

    #[test]
    fn uniform_fills_the_unit_interval_evenly() {
        const BINS: usize = 64;
        const DRAWS: u32 = 1 << 18;
        let mut counts = [0u32; BINS];
        let mut sum = 0.0;
        for position in 0..DRAWS {
            let value = uniform(42, 3, position);
            assert!((0.0..1.0).contains(&value));
            counts[(value * BINS as f32) as usize] += 1;
            sum += f64::from(value);
        }
        // Standard error of the mean: 1 / √(12 · draws) = 5.6e-4.
        assert!((sum / f64::from(DRAWS) - 0.5).abs() < 4.0 * 5.6e-4);
        let expected = f64::from(DRAWS) / BINS as f64;
        let chi_square: f64 = counts
            .iter()
            .map(|&count| (f64::from(count) - expected).powi(2) / expected)
            .sum();
        // 63 degrees of freedom: mean 63, standard deviation 11.2.
        assert!((20.0..110.0).contains(&chi_square), "{chi_square}");
    }
}
