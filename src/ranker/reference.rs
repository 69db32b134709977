//! Tests of all kinds together: rankers with random weights against the formulas of
//! `docs/RANKER.md` in float64, against PyTorch, and the promises about order and threads.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// The formulas, one number at a time. Gives each score and the sum of magnitudes that rounding
/// errors of a dot product are relative to.
pub(crate) fn exact_scores(
    ranker: &Ranker,
    prompt: &[f32],
    candidates: &[f32],
    extra: &[ExtraInputs],
) -> Vec<(f64, f64)> {
    let tensors = exact_tensors(ranker);
    exact_scores_of(ranker.config(), &tensors, prompt, candidates, extra)
}

/// A ranker's tensors by name.
pub(super) type ExactTensors = BTreeMap<String, Vec<f64>>;

pub(super) fn exact_tensors(ranker: &Ranker) -> ExactTensors {
    let tensors = ranker.tensors().iter();
    tensors
        .map(|(name, tensor)| {
            (
                name.clone(),
                tensor.data.iter().map(|&x| x as f64).collect(),
            )
        })
        .collect()
}

/// The same for any tensors.
pub(super) fn exact_scores_of(
    config: &RankerConfig,
    tensors: &ExactTensors,
    prompt: &[f32],
    candidates: &[f32],
    extra: &[ExtraInputs],
) -> Vec<(f64, f64)> {
    let tensor = |name: &str| tensors[name].clone();
    let normalize = |x: &[f32], of: &str| -> Vec<f64> {
        let x: Vec<f64> = x.iter().map(|&x| x as f64).collect();
        match config.normalization {
            Normalization::None => x,
            Normalization::Rms => {
                let mean_square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
                x.iter().map(|x| x / (mean_square + 1e-6).sqrt()).collect()
            }
            Normalization::Standardized => {
                let mean = tensor(&format!("normalization.{of}.mean"));
                let scale = tensor(&format!("normalization.{of}.scale"));
                (0..x.len()).map(|i| (x[i] - mean[i]) / scale[i]).collect()
            }
        }
    };
    let candidates: Vec<Vec<f64>> = candidates
        .chunks(config.hidden_size)
        .enumerate()
        .map(|(candidate, x)| {
            let mut x = normalize(x, "candidate");
            for (i, input) in config.extra_inputs.iter().enumerate() {
                let value = match input {
                    ExtraInput::MeanLogprob => extra[candidate].mean_logprob,
                    ExtraInput::Length => extra[candidate].length,
                };
                let (mean, scale) = (
                    tensor("normalization.extra.mean"),
                    tensor("normalization.extra.scale"),
                );
                x.push((value as f64 - mean[i]) / scale[i]);
            }
            x
        })
        .collect();
    if config.kind == RankerKind::Linear {
        let (weight, bias) = (tensor("linear.weight"), tensor("linear.bias")[0]);
        let terms =
            |x: &Vec<f64>| -> Vec<f64> { x.iter().zip(&weight).map(|(x, w)| x * w).collect() };
        return candidates
            .iter()
            .map(|x| {
                (
                    terms(x).iter().sum::<f64>() + bias,
                    terms(x).iter().map(|t| t.abs()).sum::<f64>() + bias.abs(),
                )
            })
            .collect();
    }

    let product = |x: &[f64], weight: &[f64]| -> Vec<f64> {
        let columns = weight.len() / x.len();
        (0..columns)
            .map(|j| (0..x.len()).map(|i| x[i] * weight[i * columns + j]).sum())
            .collect()
    };
    let linear = |x: &[f64], name: &str| -> Vec<f64> {
        let bias = tensor(&format!("{name}.bias"));
        product(x, &tensor(&format!("{name}.weight")))
            .iter()
            .zip(&bias)
            .map(|(x, b)| x + b)
            .collect()
    };
    let norm = |x: &[f64], name: &str| -> Vec<f64> {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
        let (gain, bias) = (
            tensor(&format!("{name}.weight")),
            tensor(&format!("{name}.bias")),
        );
        (0..x.len())
            .map(|i| (x[i] - mean) / (variance + 1e-5).sqrt() * gain[i] + bias[i])
            .collect()
    };
    let add = |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };

    let mut prompt = normalize(prompt, "prompt");
    prompt.resize(prompt.len() + config.extra_inputs.len(), 0.0);
    let weight = tensor("projection.weight");
    let mut rows: Vec<Vec<f64>> = std::iter::once(&prompt)
        .chain(&candidates)
        .map(|x| product(x, &weight))
        .collect();
    let width = rows[0].len();
    if config.kind == RankerKind::Listwise {
        let heads = config.heads.unwrap();
        let head_dim = width / heads;
        let qkv: Vec<Vec<f64>> = rows
            .iter()
            .map(|x| linear(&norm(x, "attention.norm"), "attention.qkv"))
            .collect();
        let attended: Vec<Vec<f64>> = qkv
            .iter()
            .map(|query| {
                let mut joined = Vec::new();
                for head in 0..heads {
                    fn part(x: &[f64], start: usize, len: usize) -> &[f64] {
                        &x[start..start + len]
                    }
                    let first = head * head_dim;
                    let logits: Vec<f64> = qkv
                        .iter()
                        .map(|key| {
                            let query = part(query, first, head_dim);
                            dot(query, part(key, width + first, head_dim))
                                / (head_dim as f64).sqrt()
                        })
                        .collect();
                    let largest = logits.iter().copied().fold(f64::MIN, f64::max);
                    let weights: Vec<f64> = logits.iter().map(|x| (x - largest).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    joined.extend((0..head_dim).map(|i| {
                        qkv.iter()
                            .zip(&weights)
                            .map(|(value, w)| value[2 * width + first + i] * w / total)
                            .sum::<f64>()
                    }));
                }
                joined
            })
            .collect();
        rows = rows
            .iter()
            .zip(&attended)
            .map(|(x, attended)| add(x, &linear(attended, "attention.output")))
            .collect();
    }
    let gelu = |x: &f64| {
        let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
        0.5 * x * (1.0 + u.tanh())
    };
    rows = rows
        .iter()
        .map(|x| {
            let wide: Vec<f64> = linear(&norm(x, "feed_forward.norm"), "feed_forward.up")
                .iter()
                .map(gelu)
                .collect();
            add(x, &linear(&wide, "feed_forward.down"))
        })
        .collect();
    let lengths: Vec<f64> = rows.iter().map(|x| dot(x, x).sqrt()).collect();
    (1..rows.len())
        .map(|row| {
            let lengths = lengths[0] * lengths[row];
            match config.relevance.unwrap() {
                Relevance::Dot => {
                    let scale = (width as f64).sqrt();
                    (dot(&rows[0], &rows[row]) / scale, lengths / scale)
                }
                Relevance::Cosine => {
                    let temperature = tensor("relevance.temperature")[0];
                    (
                        dot(&rows[0], &rows[row]) / lengths / temperature,
                        1.0 / temperature,
                    )
                }
            }
        })
        .collect()
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
    }

    /// Variance 1, roughly normal.
    fn normal(&mut self) -> f32 {
        ((0..6).map(|_| self.uniform()).sum::<f32>() - 3.0) * std::f32::consts::SQRT_2
    }
}

/// Coordinates in which a residual stream is huge.
fn mean_of_coordinate(i: usize) -> f32 {
    match i % 97 {
        3 => 1000.0,
        41 => -700.0,
        _ => 0.1 * (i % 5) as f32,
    }
}

fn scale_of_coordinate(i: usize) -> f32 {
    if mean_of_coordinate(i).abs() > 10.0 {
        30.0
    } else {
        1.0
    }
}

pub(crate) fn random_ranker(config: RankerConfig, seed: u64) -> Ranker {
    let mut random = Random(seed);
    let tensors = config
        .tensor_shapes()
        .into_iter()
        .map(|(name, shape)| {
            let inputs = (shape[0] as f32).sqrt();
            let data = (0..shape.iter().product())
                .map(|i| match name {
                    "normalization.extra.mean" => 3.0 * random.normal(),
                    _ if name.starts_with("normalization.extra") => 0.5 + random.uniform(),
                    _ if name.ends_with(".mean") => mean_of_coordinate(i) + 0.1 * random.normal(),
                    _ if name.ends_with(".scale") => {
                        scale_of_coordinate(i) * (0.5 + random.uniform())
                    }
                    _ if name.ends_with("norm.weight") => 1.0 + 0.2 * random.normal(),
                    "relevance.temperature" => 0.05 + random.uniform(),
                    _ if name.ends_with(".bias") => 0.2 * random.normal(),
                    _ => random.normal() / inputs,
                })
                .collect();
            (name.to_owned(), RankerTensor { shape, data })
        })
        .collect();
    Ranker::new(config, tensors).unwrap()
}

pub(crate) fn config(kind: RankerKind, hidden_size: usize) -> RankerConfig {
    let has_block = kind != RankerKind::Linear;
    RankerConfig {
        format_version: 1,
        name: "test".into(),
        task: None,
        kind,
        hidden_size,
        projection_width: has_block.then_some(64),
        heads: (kind == RankerKind::Listwise).then_some(4),
        feed_forward_width: has_block.then_some(128),
        relevance: has_block.then_some(Relevance::Dot),
        layer: 2,
        layers: 3,
        feature_position: FeaturePosition::LastToken,
        normalization: Normalization::Standardized,
        extra_inputs: vec![ExtraInput::MeanLogprob],
        model_name: "a model".into(),
        model_fingerprint: "0123".into(),
        training: Default::default(),
        metrics: Default::default(),
    }
}

/// Prompt, candidates and extra inputs of one group.
pub(crate) type Group = (Vec<f32>, Vec<f32>, Vec<ExtraInputs>);

pub(crate) fn random_group(hidden_size: usize, n: usize, seed: u64) -> Group {
    let mut random = Random(seed ^ 0x5eed);
    let mut feature = || {
        (0..hidden_size)
            .map(|i| mean_of_coordinate(i) + scale_of_coordinate(i) * random.normal())
            .collect()
    };
    let prompt: Vec<f32> = feature();
    let candidates = (0..n).flat_map(|_| -> Vec<f32> { feature() }).collect();
    let extra = (0..n)
        .map(|_| ExtraInputs {
            mean_logprob: -3.0 * random.uniform(),
            length: 1.0 + (30.0 * random.uniform()).floor(),
        })
        .collect();
    (prompt, candidates, extra)
}

pub(super) fn any_config() -> impl Strategy<Value = RankerConfig> {
    let kind = prop_oneof![
        Just(RankerKind::Listwise),
        Just(RankerKind::Pointwise),
        Just(RankerKind::Linear)
    ];
    let normalization = prop_oneof![
        Just(Normalization::None),
        Just(Normalization::Rms),
        Just(Normalization::Standardized)
    ];
    let extra_inputs = prop_oneof![
        Just(vec![]),
        Just(vec![ExtraInput::MeanLogprob]),
        Just(vec![ExtraInput::Length, ExtraInput::MeanLogprob])
    ];
    let relevance = prop_oneof![Just(Relevance::Dot), Just(Relevance::Cosine)];
    let hidden_size = prop_oneof![1usize..40, 250usize..260, Just(576usize), Just(1000usize)];
    let widths = prop_oneof![
        Just((64, 128)),
        Just((32, 48)),
        Just((16, 16)),
        Just((80, 96))
    ];
    let heads = prop_oneof![Just(1), Just(2), Just(4), Just(8), Just(16)];
    (
        kind,
        normalization,
        extra_inputs,
        relevance,
        hidden_size,
        widths,
        heads,
    )
        .prop_map(
            |(
                kind,
                normalization,
                extra_inputs,
                relevance,
                hidden_size,
                (width, feed_forward),
                heads,
            )| {
                let has_block = kind != RankerKind::Linear;
                RankerConfig {
                    projection_width: has_block.then_some(width),
                    heads: (kind == RankerKind::Listwise).then_some(heads),
                    feed_forward_width: has_block.then_some(feed_forward),
                    relevance: has_block.then_some(relevance),
                    normalization,
                    extra_inputs,
                    ..config(kind, hidden_size)
                }
            },
        )
}

fn assert_near(ranker: &Ranker, group: &Group) {
    let (prompt, candidates, extra) = group;
    let found = ranker.score(prompt, candidates, extra).unwrap();
    let exact = exact_scores(ranker, prompt, candidates, extra);
    assert_eq!(found.len(), exact.len());
    for (candidate, (found, (exact, magnitude))) in found.iter().zip(exact).enumerate() {
        // float32 rounds at 6e-8; a sum of 1000 terms, then a block of a dozen sums, each of which
        // may be smaller than its terms, leaves a few 1e-6 of the vectors' lengths.
        let error = (*found as f64 - exact).abs() / magnitude;
        assert!(
            error < 2e-5,
            "candidate {candidate}: {found}, exactly {exact}, error {error:e} of {magnitude}"
        );
    }
}

/// A group with its candidates moved: candidate i of the result is candidate `order[i]`.
pub(crate) fn permuted((prompt, candidates, extra): &Group, order: &[usize]) -> Group {
    let hidden_size = prompt.len();
    let moved = order
        .iter()
        .flat_map(|&i| candidates[i * hidden_size..][..hidden_size].iter().copied())
        .collect();
    (
        prompt.clone(),
        moved,
        order.iter().map(|&i| extra[i]).collect(),
    )
}

pub(crate) fn bits(scores: &[f32]) -> Vec<u32> {
    scores.iter().map(|score| score.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn scores_follow_the_formulas(config in any_config(), n in 1usize..50, seed: u64) {
        let group = random_group(config.hidden_size, n, seed);
        assert_near(&random_ranker(config, seed), &group);
    }

    #[test]
    fn permuting_candidates_permutes_scores_bit_for_bit(
        config in any_config(),
        order in (1usize..70).prop_flat_map(|n| Just((0..n).collect::<Vec<_>>()).prop_shuffle()),
        repeated: bool,
        seed: u64,
    ) {
        let mut group = random_group(config.hidden_size, order.len(), seed);
        if repeated {
            // Candidates that are the same text tie in every comparison.
            group = permuted(&group, &(0..order.len()).map(|i| i / 3).collect::<Vec<_>>());
        }
        let ranker = random_ranker(config, seed);
        let scores = bits(&ranker.score(&group.0, &group.1, &group.2).unwrap());
        let (prompt, candidates, extra) = permuted(&group, &order);
        let moved = bits(&ranker.score(&prompt, &candidates, &extra).unwrap());
        prop_assert_eq!(moved, order.iter().map(|&i| scores[i]).collect::<Vec<_>>());
    }

    #[test]
    fn pointwise_and_linear_scores_do_not_depend_on_the_others(
        config in any_config().prop_filter("each alone", |config| config.kind != RankerKind::Listwise),
        n in 1usize..40,
        seed: u64,
    ) {
        let (prompt, candidates, extra) = random_group(config.hidden_size, n, seed);
        let ranker = random_ranker(config, seed);
        let together = ranker.score(&prompt, &candidates, &extra).unwrap();
        for (i, candidate) in candidates.chunks(prompt.len()).enumerate() {
            let alone = ranker.score(&prompt, candidate, &extra[i..=i]).unwrap();
            prop_assert_eq!(alone[0].to_bits(), together[i].to_bits());
        }
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    for kind in [
        RankerKind::Listwise,
        RankerKind::Pointwise,
        RankerKind::Linear,
    ] {
        let ranker = random_ranker(config(kind, 576), 7);
        let (prompt, candidates, extra) = random_group(576, 333, 7);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            bits(
                &pool
                    .install(|| ranker.score(&prompt, &candidates, &extra))
                    .unwrap(),
            )
        };
        let one = with(1);
        assert_eq!(with(2), one);
        assert_eq!(with(5), one);
    }
}

#[test]
fn large_groups_and_large_models() {
    for (kind, hidden_size, n) in [
        (RankerKind::Listwise, 300, 1100),
        (RankerKind::Listwise, 4096, 100),
        (RankerKind::Pointwise, 4096, 500),
        (RankerKind::Linear, 4096, 1100),
    ] {
        let extra_inputs = vec![ExtraInput::Length];
        let config = RankerConfig {
            extra_inputs,
            ..config(kind, hidden_size)
        };
        assert_near(&random_ranker(config, 3), &random_group(hidden_size, n, 3));
    }
}

#[test]
fn identical_candidates_get_identical_scores() {
    let ranker = random_ranker(config(RankerKind::Listwise, 40), 1);
    let group = permuted(&random_group(40, 5, 1), &[0, 0, 0, 0, 0, 0, 0]);
    let scores = bits(&ranker.score(&group.0, &group.1, &group.2).unwrap());
    assert!(scores.iter().all(|score| *score == scores[0]));
}

#[test]
fn numbers_that_are_not_finite_are_named() {
    for kind in [
        RankerKind::Listwise,
        RankerKind::Pointwise,
        RankerKind::Linear,
    ] {
        let ranker = random_ranker(config(kind, 600), 1);
        let good = random_group(600, 40, 1);
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (prompt, mut candidates, extra) = good.clone();
            candidates[17 * 600 + 599] = value;
            candidates[30 * 600] = value;
            let error = ranker.score(&prompt, &candidates, &extra).unwrap_err();
            let RankerError::NonFiniteCandidate {
                candidate: 17,
                coordinate: 599,
                ..
            } = error
            else {
                panic!("{error}");
            };
            let (mut prompt, candidates, extra) = good.clone();
            prompt[3] = value;
            let error = ranker.score(&prompt, &candidates, &extra).unwrap_err();
            assert!(
                matches!(error, RankerError::NonFinitePrompt { coordinate: 3, .. }),
                "{error}"
            );
            let (prompt, candidates, mut extra) = good.clone();
            extra[9].mean_logprob = value;
            let error = ranker.score(&prompt, &candidates, &extra).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("mean_logprob of candidate 9 is {value}")
            );
            // This ranker does not read lengths.
            let (prompt, candidates, mut extra) = good.clone();
            extra[9].length = value;
            ranker.score(&prompt, &candidates, &extra).unwrap();
        }
    }
}

#[test]
fn features_that_overflow_are_an_error_not_a_score() {
    for kind in [
        RankerKind::Listwise,
        RankerKind::Pointwise,
        RankerKind::Linear,
    ] {
        let ranker = random_ranker(config(kind, 40), 1);
        let (prompt, mut candidates, extra) = random_group(40, 3, 1);
        candidates[40..80]
            .iter_mut()
            .enumerate()
            .for_each(|(i, x)| *x = if i % 2 == 0 { f32::MAX } else { f32::MIN });
        let error = ranker.score(&prompt, &candidates, &extra).unwrap_err();
        assert!(
            matches!(error, RankerError::NonFiniteScore { .. }),
            "{error}"
        );
    }
}

#[test]
fn sizes_that_do_not_fit_are_errors() {
    let ranker = random_ranker(config(RankerKind::Listwise, 8), 1);
    let (prompt, candidates, extra) = random_group(8, 3, 1);
    let message = |prompt: &[f32], candidates: &[f32], extra: &[ExtraInputs]| {
        ranker
            .score(prompt, candidates, extra)
            .unwrap_err()
            .to_string()
    };
    assert!(
        message(&prompt[1..], &candidates, &extra).contains("has 7 numbers; the ranker reads 8")
    );
    assert!(message(&prompt, &candidates[1..], &extra).contains("23 numbers"));
    assert_eq!(message(&prompt, &[], &[]), "there is no candidate to rank");
    assert_eq!(
        message(&prompt, &candidates, &extra[1..]),
        "the ranker reads mean_logprob of each of 3 candidates, but was given those of 2"
    );
}

#[test]
fn rankers_for_another_model_or_layer_are_refused() {
    let ranker = random_ranker(config(RankerKind::Linear, 8), 1);
    assert_eq!(ranker.check_model("0123", 8, 3), Ok(()));
    assert!(matches!(
        ranker.check_model("4567", 8, 3),
        Err(RankerError::OtherModel { .. })
    ));
    assert!(matches!(
        ranker.check_model("0123", 9, 3),
        Err(RankerError::OtherHiddenSize { .. })
    ));
    assert!(matches!(
        ranker.check_model("0123", 8, 4),
        Err(RankerError::OtherLayers { .. })
    ));
    assert_eq!(ranker.check_layer(2), Ok(()));
    let message = ranker.check_layer(1).unwrap_err().to_string();
    assert_eq!(
        message,
        "ranker `test` reads features taken after layer 2, but these were taken after layer 1"
    );
}

/// A ranker of each kind, a group, and its scores.
pub(crate) struct GoldenRanker {
    pub name: &'static str,
    pub ranker: Ranker,
    pub group: Group,
    pub scores: Vec<f32>,
}

/// Files written by `scripts/train_ranker.py`, scored in float64 by PyTorch's own transformer layer:
/// `tests/reference/ranker.py`.
pub(crate) fn golden_rankers() -> Vec<GoldenRanker> {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/ranker");
    let bytes = std::fs::read(folder.join("cases.safetensors")).unwrap();
    let cases = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |name: &str| -> Vec<f32> {
        let view = cases.tensor(name).unwrap();
        assert_eq!(view.dtype(), safetensors::Dtype::F32);
        view.data()
            .chunks(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect()
    };
    let both = tensor("mean_logprob").into_iter().zip(tensor("length"));
    let extra: Vec<ExtraInputs> = both
        .map(|(mean_logprob, length)| ExtraInputs {
            mean_logprob,
            length,
        })
        .collect();
    ["listwise", "listwise_cosine", "pointwise", "linear"]
        .map(|name| GoldenRanker {
            name,
            ranker: Ranker::load(&folder.join(format!("{name}.safetensors"))).unwrap(),
            group: (tensor("prompt"), tensor("candidates"), extra.clone()),
            scores: tensor(&format!("scores.{name}")),
        })
        .into()
}

#[test]
fn scores_equal_those_of_pytorch() {
    let mut kinds = BTreeMap::new();
    for golden in golden_rankers() {
        let GoldenRanker {
            name,
            ranker,
            group: (prompt, candidates, extra),
            scores: expected,
        } = golden;
        let found = ranker.score(&prompt, &candidates, &extra).unwrap();
        assert_eq!(found.len(), expected.len());
        let largest = expected.iter().fold(0.0, |a: f32, b| a.max(b.abs()));
        for (found, expected) in found.iter().zip(&expected) {
            // float32 against float64: a few roundings of the largest score.
            assert!(
                (found - expected).abs() < 5e-6 * largest,
                "{name}: {found}, PyTorch {expected}"
            );
        }
        kinds.insert(name, ranker.config().kind);
    }
    assert_eq!(kinds["listwise_cosine"], RankerKind::Listwise);
    assert_eq!(kinds["linear"], RankerKind::Linear);
}
