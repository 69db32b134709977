//! Sampling on the CPU against transformers, against a naive float64 implementation, and against
//! the frequencies that it promises.

use std::collections::BTreeMap;
use std::path::Path;

use podium::backend::cpu::sample::{distribution, sample};
use podium::backend::sampling::{LogitsError, SampleRow, SamplingParams};
use proptest::prelude::*;
use serde::Deserialize;

fn row(params: &SamplingParams) -> SampleRow<'_> {
    SampleRow {
        row: 0,
        params,
        seed: 1,
        candidate: 0,
        position: 0,
        prompt: &[],
        answer: &[],
        logit_bias: &[],
        top_logprobs: 0,
    }
}

/// The distribution to draw from, done plainly in float64: sort, then filter.
fn naive(logits: &[f32], row: &SampleRow) -> BTreeMap<u32, f64> {
    let params = row.params;
    let mut logits: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
    for &(token, bias) in row.logit_bias {
        logits[token as usize] += f64::from(bias);
    }
    let penalty = f64::from(params.repetition_penalty);
    for (token, logit) in logits.iter_mut().enumerate() {
        if row.prompt.contains(&(token as u32)) || row.answer.contains(&(token as u32)) {
            *logit = if *logit < 0.0 {
                *logit * penalty
            } else {
                *logit / penalty
            };
        }
    }
    let mut kept: Vec<(usize, f64)> = logits.into_iter().enumerate().collect();
    // Not total_cmp: -0 equals 0.
    kept.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    let max = kept[0].1;
    for (_, logit) in &mut kept {
        *logit = ((*logit - max) / f64::from(params.temperature)).exp();
    }
    if params.top_k > 0 && params.top_k < kept.len() {
        let last = kept[params.top_k - 1].1;
        kept.retain(|&(_, weight)| weight >= last);
    }
    if params.top_p < 1.0 {
        let total: f64 = kept.iter().map(|&(_, weight)| weight).sum();
        let mut above = 0.0;
        kept.retain(|&(_, weight)| {
            let keep = above < f64::from(params.top_p) * total;
            above += weight;
            keep
        });
    }
    kept.retain(|&(_, weight)| weight >= f64::from(params.min_p));
    let total: f64 = kept.iter().map(|&(_, weight)| weight).sum();
    kept.into_iter()
        .map(|(token, weight)| (token as u32, weight / total))
        .collect()
}

#[derive(Deserialize)]
struct Golden {
    rows: Vec<Vec<f32>>,
    cases: Vec<GoldenCase>,
}

#[derive(Debug, Deserialize)]
struct GoldenCase {
    row: usize,
    seen: Vec<u32>,
    repetition_penalty: f32,
    temperature: f32,
    top_k: usize,
    top_p: f32,
    min_p: f32,
    kept: Vec<u32>,
    probabilities: Vec<f64>,
}

#[test]
fn keeps_the_tokens_that_transformers_keeps() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/sampling.json");
    let golden: Golden = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert!(golden.cases.len() > 200);
    for case in &golden.cases {
        let params = SamplingParams {
            repetition_penalty: case.repetition_penalty,
            temperature: case.temperature,
            top_k: case.top_k,
            top_p: case.top_p,
            min_p: case.min_p,
        };
        // What was seen may stand in the prompt or in the answer.
        let (prompt, answer) = case.seen.split_at(case.seen.len() / 2);
        let row = SampleRow {
            prompt,
            answer,
            ..row(&params)
        };
        let actual = distribution(&golden.rows[case.row], &row).unwrap();
        let tokens: Vec<u32> = actual.iter().map(|&(token, _)| token).collect();
        assert_eq!(tokens, case.kept, "{case:?}");
        for (&(_, actual), &expected) in actual.iter().zip(&case.probabilities) {
            // transformers works in float32: logits up to 20, rounded to 6e-8 of that, then exp.
            assert!(
                (actual - expected).abs() < 3e-6 * expected + 1e-9,
                "{actual} {expected} {case:?}"
            );
        }
    }
}

/// Logits on a coarse grid (many ties) or a fine one (hardly any).
fn logits() -> impl Strategy<Value = Vec<f32>> {
    (prop_oneof![Just(2.0f32), Just(1024.0)], 1usize..300).prop_flat_map(|(grid, len)| {
        prop::collection::vec(-8.0f32..8.0, len).prop_map(move |logits| {
            logits
                .iter()
                .map(|logit| (logit * grid).round() / grid)
                .collect()
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn distribution_matches_a_naive_one(
        logits in logits(),
        temperature in prop_oneof![Just(1.0f32), 0.3f32..2.0],
        top_k in prop_oneof![Just(0usize), 1usize..40],
        top_p in prop_oneof![Just(1.0f32), 0.05f32..1.0],
        min_p in prop_oneof![Just(0.0f32), 0.001f32..1.0],
        repetition_penalty in prop_oneof![Just(1.0f32), 0.5f32..2.0],
        seen in prop::collection::vec(0u32..400, 0..12),
        bias in prop::collection::vec((0u32..300, -5.0f32..5.0), 0..3),
    ) {
        let params = SamplingParams { repetition_penalty, temperature, top_k, top_p, min_p };
        let (prompt, answer) = seen.split_at(seen.len() / 2);
        let bias: Vec<_> =
            bias.into_iter().filter(|&(token, _)| (token as usize) < logits.len()).collect();
        let row = SampleRow { prompt, answer, logit_bias: &bias, ..row(&params) };
        let actual: BTreeMap<u32, f64> = distribution(&logits, &row).unwrap().into_iter().collect();
        let expected = naive(&logits, &row);

        // Rounding decides on the border of a filter: then the two may differ by what lies within
        // rounding of it, and the test asks again with the filter a little wider and narrower.
        let within = |factor: f32| {
            let params = SamplingParams {
                top_p: (top_p * factor).min(1.0),
                min_p: if min_p == 0.0 { 0.0 } else { min_p / factor },
                ..params.clone()
            };
            naive(&logits, &SampleRow { params: &params, ..row.clone() })
        };
        let (narrow, wide) = (within(1.0 - 1e-5), within(1.0 + 1e-5));
        if narrow.len() == wide.len() {
            prop_assert_eq!(
                actual.keys().collect::<Vec<_>>(),
                expected.keys().collect::<Vec<_>>()
            );
            for (token, &probability) in &actual {
                // float32 exponents of up to 60, and masses of 2⁻⁴⁰ of the largest.
                prop_assert!((probability - expected[token]).abs() < 1e-5 * probability + 1e-9);
            }
        } else {
            prop_assert!(narrow.keys().all(|token| actual.contains_key(token)));
            prop_assert!(actual.keys().all(|token| wide.contains_key(token)));
        }

        // Whatever is drawn was kept, and carries the model's own log-probability.
        let exponentials = logits.iter().map(|&logit| f64::from(logit).exp());
        let log_sum_exp = exponentials.sum::<f64>().ln();
        for position in 0..20 {
            let sampled =
                sample(&logits, &SampleRow { position, top_logprobs: 5, ..row.clone() }).unwrap();
            prop_assert!(actual.contains_key(&sampled.token));
            let logprob = |token: u32| f64::from(logits[token as usize]) - log_sum_exp;
            prop_assert!((f64::from(sampled.logprob) - logprob(sampled.token)).abs() < 1e-5);
            let mut best: Vec<u32> = (0..logits.len() as u32).collect();
            best.sort_by(|&a, &b| {
                let order = logits[b as usize].partial_cmp(&logits[a as usize]);
                order.unwrap().then(a.cmp(&b))
            });
            prop_assert_eq!(sampled.top_logprobs.len(), logits.len().min(5));
            for (&(token, value), &expected) in sampled.top_logprobs.iter().zip(&best) {
                prop_assert_eq!(token, expected);
                prop_assert!((f64::from(value) - logprob(token)).abs() < 1e-5);
            }
        }
    }
}

#[test]
fn frequencies_follow_the_distribution() {
    const DRAWS: u32 = 20_000;
    // Three chunks' worth of tokens, so that the walk over chunks is drawn through as well.
    let logits: Vec<f32> = (0..3000u32)
        .map(|token| ((token.wrapping_mul(2_654_435_761) >> 8) % 4000) as f32 / 500.0)
        .collect();
    for params in [
        SamplingParams {
            temperature: 0.5,
            top_k: 60,
            ..Default::default()
        },
        SamplingParams {
            temperature: 0.3,
            top_p: 0.6,
            ..Default::default()
        },
        SamplingParams {
            temperature: 0.25,
            min_p: 0.05,
            ..Default::default()
        },
    ] {
        let row = SampleRow {
            seed: 99,
            candidate: 4,
            ..row(&params)
        };
        let expected = naive(&logits, &row);
        let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
        for position in 0..DRAWS {
            let token = sample(
                &logits,
                &SampleRow {
                    position,
                    ..row.clone()
                },
            )
            .unwrap()
            .token;
            *counts.entry(token).or_default() += 1;
        }
        assert!(counts.keys().all(|token| expected.contains_key(token)));
        let chi_square: f64 = expected
            .iter()
            .map(|(token, probability)| {
                let expected = probability * f64::from(DRAWS);
                assert!(expected > 5.0);
                let count = counts.get(token).copied().unwrap_or(0);
                (f64::from(count) - expected).powi(2) / expected
            })
            .sum();
        let freedom = (expected.len() - 1) as f64;
        assert!(freedom > 20.0);
        // Mean and four standard deviations of χ².
        let limit = freedom + 4.0 * (2.0 * freedom).sqrt();
        assert!(chi_square < limit, "{chi_square} over {limit}: {params:?}");
    }
}

#[test]
fn low_temperatures_come_down_to_the_most_probable_token() {
    let logits = [1.0, 3.0, 3.5, 3.5, -2.0];
    for temperature in [0.0, f32::from_bits(1), f32::MIN_POSITIVE, 1e-6, 0.01] {
        let params = SamplingParams {
            temperature,
            ..Default::default()
        };
        let mut drawn: Vec<u32> = (0..100)
            .map(|position| {
                sample(
                    &logits,
                    &SampleRow {
                        position,
                        ..row(&params)
                    },
                )
                .unwrap()
                .token
            })
            .collect();
        drawn.sort_unstable();
        drawn.dedup();
        // At 0 the lowest id; above it, equal tokens stay equal.
        assert_eq!(
            drawn,
            if temperature == 0.0 {
                vec![2]
            } else {
                vec![2, 3]
            }
        );
    }
    let params = SamplingParams {
        temperature: 1e30,
        ..Default::default()
    };
    for (_, probability) in distribution(&logits, &row(&params)).unwrap() {
        assert!((probability - 0.2).abs() < 1e-9);
    }
}

#[test]
fn greedy_choice_sees_bias_and_penalty_but_reports_the_models_own_numbers() {
    let logits = [0.0, 2.0, 1.5, 1.0];
    let params = SamplingParams {
        temperature: 0.0,
        repetition_penalty: 2.0,
        ..Default::default()
    };
    let answer = [1, 1, 9];
    let row = SampleRow {
        answer: &answer,
        logit_bias: &[(3, 0.25), (77, 9.0)],
        ..row(&params)
    };
    let sampled = sample(&logits, &row).unwrap();
    // 2 / 2 (once, though seen twice) < 1.0 + 0.25 < 1.5.
    assert_eq!(sampled.token, 2);
    let log_sum_exp = logits
        .iter()
        .map(|&logit| f64::from(logit).exp())
        .sum::<f64>()
        .ln();
    assert!((f64::from(sampled.logprob) - (1.5 - log_sum_exp)).abs() < 1e-6);
    let mean = 4.5 / 4.0;
    let self_certainty = log_sum_exp - mean - 4f64.ln();
    assert!((f64::from(sampled.self_certainty) - self_certainty).abs() < 1e-6);
}

#[test]
fn uniform_logits_have_no_self_certainty() {
    let params = SamplingParams::default();
    let sampled = sample(&[0.7; 49_152], &row(&params)).unwrap();
    assert!(
        sampled.self_certainty.abs() < 2e-6,
        "{}",
        sampled.self_certainty
    );
    assert!((sampled.logprob + 49_152f32.ln()).abs() < 2e-6);
}

#[test]
fn impossible_tokens_are_never_drawn() {
    let mut logits = vec![f32::NEG_INFINITY; 2000];
    logits[1500] = -1e30;
    for (top_k, top_p) in [(0, 1.0), (7, 1.0), (0, 0.5), (7, 0.5)] {
        let params = SamplingParams {
            top_k,
            top_p,
            ..Default::default()
        };
        assert_eq!(sample(&logits, &row(&params)).unwrap().token, 1500);
    }
    let params = SamplingParams {
        temperature: 0.0,
        ..Default::default()
    };
    let ban = SampleRow {
        logit_bias: &[(1, f32::NEG_INFINITY)],
        ..row(&params)
    };
    assert_eq!(sample(&[0.0, 5.0, 1.0], &ban).unwrap().token, 2);
}

#[test]
fn damaged_logits_are_an_error() {
    let params = SamplingParams::default();
    let row = SampleRow {
        row: 6,
        ..row(&params)
    };
    for value in [f32::NAN, f32::INFINITY] {
        for token in [0, 40, 3000] {
            let mut logits = vec![0.25; 3001];
            logits[token] = value;
            for temperature in [0.0, 1.0] {
                let params = SamplingParams {
                    temperature,
                    ..Default::default()
                };
                let row = SampleRow {
                    params: &params,
                    ..row.clone()
                };
                let error = sample(&logits, &row).unwrap_err();
                assert!(matches!(
                    error,
                    LogitsError::NotFinite { row: 6, token: found, .. } if found == token
                ));
                assert_eq!(
                    distribution(&logits, &row).unwrap_err().to_string(),
                    error.to_string()
                );
            }
        }
    }
    let nothing = LogitsError::NothingPossible {
        row: 6,
        vocab_size: 3,
    };
    assert_eq!(sample(&[f32::NEG_INFINITY; 3], &row), Err(nothing));
    assert!(sample(&[], &row).is_err());
    // From the bias rather than the model.
    let bias = SampleRow {
        logit_bias: &[(2, f32::NAN)],
        ..row.clone()
    };
    assert!(matches!(
        sample(&[0.0; 3], &bias),
        Err(LogitsError::NotFinite { token: 2, .. })
    ));
}

#[test]
fn huge_finite_logits_are_fine() {
    let mut logits = vec![f32::MIN; 200];
    logits[100..].fill(f32::MAX);
    let params = SamplingParams::default();
    assert!(sample(&logits, &row(&params)).unwrap().token >= 100);
}

#[test]
fn every_thread_and_row_draws_the_same() {
    let params = SamplingParams {
        temperature: 0.8,
        top_k: 50,
        top_p: 0.9,
        ..Default::default()
    };
    let logits: Vec<f32> = (0..5000u32)
        .map(|token| ((token * 7919) % 997) as f32 / 60.0)
        .collect();
    let draw = |position: u32| {
        sample(
            &logits,
            &SampleRow {
                position,
                ..row(&params)
            },
        )
        .unwrap()
    };
    let here: Vec<_> = (0..50).map(draw).collect();
    let there = std::thread::scope(|scope| {
        // In another order, after a row of another length.
        let thread = scope.spawn(|| {
            sample(&[1.0, 2.0], &row(&params)).unwrap();
            (0..50).rev().map(draw).collect::<Vec<_>>()
        });
        thread.join().unwrap()
    });
    assert_eq!(here, there.into_iter().rev().collect::<Vec<_>>());
}
