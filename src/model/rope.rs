//! Rotary frequencies from a configuration's parameters.

use super::config::Rope;

/// How a model stretches its rotary embedding beyond the context it was trained on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        /// Context of the pretraining, in tokens.
        original_context: f64,
    },
    /// arXiv 2309.00071.
    Yarn {
        factor: f64,
        /// `None`: 0.1 · ln(factor) + 1.
        attention_factor: Option<f64>,
        /// Rotations over the original context above which a pair is left alone.
        beta_fast: f64,
        /// Rotations below which it is interpolated in full.
        beta_slow: f64,
        original_context: f64,
        /// Rounds the range between the two to whole pairs.
        truncate: bool,
    },
}

/// The `head_dim / 2` frequencies and the attention factor.
///
/// Every step is rounded to float32 where transformers (5.23, `modeling_rope_utils.py`) rounds it,
/// since angles are frequency × position: one unit in the last place of a frequency is 5e-4 rad at
/// position 8192. The power itself is taken in float64.
pub(crate) fn rope(theta: f64, head_dim: usize, scaling: &RopeScaling) -> Rope {
    let base = f64::from(theta as f32);
    // theta^(2i / head_dim): positions per radian of pair i.
    let periods = (0..head_dim / 2).map(|i| {
        let exponent = (2 * i) as f32 / head_dim as f32;
        base.powf(f64::from(exponent)) as f32
    });
    let unscaled = periods.clone().map(|period| 1.0 / period);
    match *scaling {
        RopeScaling::None => Rope {
            frequencies: unscaled.collect(),
            attention_factor: 1.0,
        },
        RopeScaling::Linear { factor } => Rope {
            frequencies: unscaled.map(|f| f / factor as f32).collect(),
            attention_factor: 1.0,
        },
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        } => {
            let longest = (original_context / low_freq_factor) as f32;
            let shortest = (original_context / high_freq_factor) as f32;
            let scale = |frequency: f32| {
                let wavelength = std::f64::consts::TAU as f32 / frequency;
                if wavelength < shortest {
                    frequency
                } else if wavelength > longest {
                    frequency / factor as f32
                } else {
                    let smooth = (original_context as f32 / wavelength - low_freq_factor as f32)
                        / (high_freq_factor - low_freq_factor) as f32;
                    (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
                }
            };
            Rope {
                frequencies: unscaled.map(scale).collect(),
                attention_factor: 1.0,
            }
        }
        RopeScaling::Yarn {
            factor,
            attention_factor,
            beta_fast,
            beta_slow,
            original_context,
            truncate,
        } => {
            // The pair that makes so many rotations over the original context.
            let pair = |rotations: f64| {
                head_dim as f64 * (original_context / (rotations * std::f64::consts::TAU)).ln()
                    / (2.0 * theta.ln())
            };
            let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            low = low.max(0.0);
            high = high.min(head_dim as f64 - 1.0);
            if low == high {
                high += 0.001;
            }
            let frequencies = periods
                .enumerate()
                .map(|(i, period)| {
                    let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    let kept = 1.0 - ramp;
                    1.0 / (factor as f32 * period) * (1.0 - kept) + 1.0 / period * kept
                })
                .collect();
            let attention_factor = attention_factor.unwrap_or(if factor > 1.0 {
                0.1 * factor.ln() + 1.0
            } else {
                1.0
            });
            Rope {
                frequencies,
                attention_factor: attention_factor as f32,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The golden of `hugging_face::config` holds every scaling against transformers; here is what
    // the formulas promise.

    #[test]
    fn frequencies_fall_from_one_towards_one_over_theta() {
        let rope = rope(10_000.0, 64, &RopeScaling::None);
        assert_eq!(rope.frequencies.len(), 32);
        assert_eq!(rope.frequencies[0], 1.0);
        assert!(rope.frequencies.is_sorted_by(|a, b| a > b));
        assert!(rope.frequencies[31] > 1e-4);
    }

    #[test]
    fn llama3_leaves_short_wavelengths_and_stretches_long_ones() {
        let plain = rope(500_000.0, 128, &RopeScaling::None);
        let scaled = rope(
            500_000.0,
            128,
            &RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_context: 8192.0,
            },
        );
        for (plain, scaled) in plain.frequencies.iter().zip(&scaled.frequencies) {
            let rotations = 8192.0 * plain / std::f32::consts::TAU;
            match rotations {
                4.1.. => assert_eq!(scaled, plain),
                ..0.9 => assert_eq!(*scaled, plain / 8.0),
                _ => assert!(plain / 8.0 <= *scaled && scaled <= plain),
            }
        }
    }
}
