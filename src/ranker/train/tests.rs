//! Training as a whole: gradients against finite differences in float64, the trainer's scores
//! against the ranker's, the promises about threads and interruptions, and that it learns.

use proptest::prelude::*;

use super::super::reference::{
    ExactTensors, any_config, config, exact_scores_of, exact_tensors, random_ranker,
};
use super::*;

/// Numbers of the kind that features are: a few coordinates of the residual stream are huge. Those
/// that no statistics make small again are left out.
fn numbers(config: &RankerConfig, rows: usize, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed, &[9]);
    let standardized = config.normalization == Normalization::Standardized;
    (0..rows * config.hidden_size)
        .map(|i| match i % config.hidden_size % 97 {
            3 if standardized => 1000.0 + 30.0 * random.normal(),
            41 if standardized => -700.0 + 30.0 * random.normal(),
            _ => random.normal(),
        })
        .collect()
}

/// Groups with the numbers that they refer to.
struct Data {
    prompts: Vec<Vec<[u8; 4]>>,
    candidates: Vec<Vec<[u8; 4]>>,
    labels: Vec<Vec<f32>>,
    extra: Vec<Vec<ExtraInputs>>,
    keys: Vec<String>,
}

fn bytes(numbers: &[f32]) -> Vec<[u8; 4]> {
    numbers.iter().map(|x| x.to_le_bytes()).collect()
}

impl Data {
    fn random(config: &RankerConfig, sizes: &[usize], seed: u64) -> Data {
        let mut random = Random::new(seed, &[8]);
        let part = |index: usize, rows: usize, which: u64| {
            bytes(&numbers(
                config,
                rows,
                seed ^ (index as u64 * 2 + which) << 20,
            ))
        };
        Data {
            prompts: (0..sizes.len()).map(|index| part(index, 1, 0)).collect(),
            candidates: sizes
                .iter()
                .enumerate()
                .map(|(index, &n)| part(index, n, 1))
                .collect(),
            labels: sizes
                .iter()
                .map(|&n| (0..n).map(|_| random.below(3) as f32 / 2.0).collect())
                .collect(),
            extra: sizes
                .iter()
                .map(|&n| {
                    let extra = |_| ExtraInputs {
                        mean_logprob: -random.normal().abs(),
                        length: 1.0 + random.below(9) as f32,
                    };
                    (0..n).map(extra).collect()
                })
                .collect(),
            keys: (0..sizes.len())
                .map(|index| format!("item {index}"))
                .collect(),
        }
    }

    fn groups(&self) -> Vec<Group<'_>> {
        (0..self.keys.len())
            .map(|i| Group {
                key: &self.keys[i],
                prompt: Features::F32(&self.prompts[i]),
                candidates: Features::F32(&self.candidates[i]),
                labels: self.labels[i].clone(),
                extra: self.extra[i].clone(),
            })
            .collect()
    }
}

/// The mean loss over all candidates of all groups, in float64.
fn exact_loss(config: &RankerConfig, tensors: &ExactTensors, data: &Data, loss: Loss) -> f64 {
    let (mut total, mut count) = (0.0, 0.0);
    for (index, labels) in data.labels.iter().enumerate() {
        let scores: Vec<f64> = exact_scores_of(
            config,
            tensors,
            &Features::F32(&data.prompts[index]).to_f32(),
            &Features::F32(&data.candidates[index]).to_f32(),
            &data.extra[index],
        )
        .iter()
        .map(|(score, _)| *score)
        .collect();
        let labels: Vec<f64> = labels.iter().map(|&label| f64::from(label)).collect();
        match loss {
            Loss::Listwise => {
                let sum: f64 = labels.iter().sum();
                if labels.iter().all(|label| *label == labels[0]) {
                    continue;
                }
                let largest = scores.iter().copied().fold(f64::MIN, f64::max);
                let partition = scores.iter().map(|s| (s - largest).exp()).sum::<f64>().ln();
                let terms = scores.iter().zip(&labels);
                total -= terms
                    .map(|(score, label)| label / sum * (score - largest - partition))
                    .sum::<f64>();
                count += 1.0;
            }
            Loss::Pointwise => {
                // ln σ(x); taken from 1 - σ(-x), it would lose its digits at scores above ten, and
                // finite differences with them.
                let log_sigmoid = |x: f64| x.min(0.0) - (-x.abs()).exp().ln_1p();
                for (&score, label) in scores.iter().zip(&labels) {
                    total -= label * log_sigmoid(score) + (1.0 - label) * log_sigmoid(-score);
                    count += 1.0;
                }
            }
        }
    }
    total / count
}

fn options(loss: Loss) -> TrainOptions {
    TrainOptions {
        loss,
        dropout: 0.0,
        validation: 0.0,
        weight_decay: 0.1,
        ..TrainOptions::of(RankerKind::Listwise)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn gradients_are_those_of_finite_differences(
        config in any_config(), hidden_size in 1usize..60, is_listwise: bool, seed in 0u64..1 << 40,
    ) {
        let config = RankerConfig { hidden_size, ..config };
        let loss = if is_listwise { Loss::Listwise } else { Loss::Pointwise };
        let mut data = Data::random(&config, &[5, 1, 18, 2], seed);
        // One group that ranks for certain, and one that does not.
        data.labels[0] = vec![0.0, 1.0, 0.5, 0.0, 1.0];
        data.labels[3] = vec![1.0, 1.0];
        let ranker = random_ranker(config.clone(), seed);
        let trainer = Trainer::new(config.clone(), options(loss), data.groups(), Some(&ranker)).unwrap();
        let samples: Vec<Sample> = (0..4)
            .filter(|&group| loss == Loss::Pointwise || loss::ranks(&data.labels[group]))
            .map(|group| Sample {
                group,
                chosen: (0..data.labels[group].len()).collect(),
                dropout_key: 0,
            })
            .collect();
        let (sum, count, gradient) = trainer.gradient(&samples).unwrap();
        let mut tensors = exact_tensors(&ranker);
        if let Some(bias) = tensors.get_mut("linear.bias") {
            prop_assert_eq!(bias[0] as f32, trainer.state.weights[trainer.layout.bias]);
        }
        let exact = exact_loss(&config, &tensors, &data, loss);
        prop_assert!((sum / count as f64 - exact).abs() < 1e-4 * (1.0 + exact), "{sum} / {count}, {exact}");

        let found = trainer.layout.to_tensors(&config, &gradient);
        // Errors are relative to the tensor's longest number, and none matters that is a
        // millionth of the longest of all.
        let longest = |data: &[f32]| data.iter().fold(0.0f32, |longest, x| longest.max(x.abs()));
        let of_all = longest(&gradient);
        let mut random = Random::new(seed, &[7]);
        for (name, tensor) in &found {
            let largest = f64::from(longest(&tensor.data).max(1e-3 * of_all));
            for _ in 0..6 {
                let at = random.below(tensor.data.len());
                let weight = tensors[name][at];
                let step = 1e-5 * weight.abs().max(0.1);
                let mut loss_at = |weight: f64| {
                    tensors.get_mut(name).unwrap()[at] = weight;
                    exact_loss(&config, &tensors, &data, loss)
                };
                let slope = (loss_at(weight + step) - loss_at(weight - step)) / (2.0 * step);
                loss_at(weight);
                let error = (f64::from(tensor.data[at]) - slope).abs();
                // Float32's 6e-8 through some hundred operations, a softmax of scores up to a
                // hundred among them.
                prop_assert!(
                    error < 1e-3 * largest + 1e-9,
                    "{name}[{at}]: {} instead of {slope}, the largest is {largest}", tensor.data[at]
                );
            }
        }
    }

    #[test]
    fn scores_are_those_of_the_finished_ranker(config in any_config(), seed in 0u64..1 << 40) {
        let data = Data::random(&config, &[3, 20], seed);
        let ranker = random_ranker(config.clone(), seed);
        let mut options = options(Loss::Pointwise);
        options.dropout = 0.5;
        let trainer = Trainer::new(config.clone(), options, data.groups(), Some(&ranker)).unwrap();
        let finished = trainer.ranker().unwrap();
        prop_assert_eq!(finished.tensors(), ranker.tensors());
        let bias = match config.kind {
            RankerKind::Linear => trainer.state.weights[trainer.layout.bias],
            _ => 0.0,
        };
        for group in 0..2 {
            let prompt = Features::F32(&data.prompts[group]).to_f32();
            let candidates = Features::F32(&data.candidates[group]).to_f32();
            let expected = ranker.score(&prompt, &candidates, &data.extra[group]).unwrap();
            let exact = exact_scores_of(
                &config, &exact_tensors(&ranker), &prompt, &candidates, &data.extra[group],
            );
            for ((score, expected), (_, magnitude)) in
                trainer.scores(group).iter().zip(&expected).zip(exact)
            {
                // Both are within the same bound of the exact score; see `reference.rs`.
                let difference = f64::from(score + bias - expected).abs();
                prop_assert!(difference < 2e-4 * (1.0 + magnitude), "{score} {expected} {magnitude}");
            }
        }
    }
}

/// Groups in which a direction in feature space says what is right.
fn planted(config: &RankerConfig, groups: usize, n: usize, seed: u64) -> Data {
    let mut data = Data::random(config, &vec![n; groups], seed);
    for (candidates, labels) in data.candidates.iter_mut().zip(&mut data.labels) {
        for (row, label) in candidates.chunks_exact_mut(config.hidden_size).zip(labels) {
            *label = f32::from(*label > 0.6);
            for number in &mut row[..2] {
                let x = f32::from_le_bytes(*number) + 2.0 * *label;
                *number = x.to_le_bytes();
            }
        }
    }
    data
}

fn in_pool<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap();
    pool.install(work)
}

#[test]
fn every_kind_learns_from_every_loss() {
    for kind in [
        RankerKind::Listwise,
        RankerKind::Pointwise,
        RankerKind::Linear,
    ] {
        let config = RankerConfig {
            extra_inputs: Vec::new(),
            ..config(kind, 24)
        };
        let data = planted(&config, 200, 12, 1);
        for loss in [Loss::Listwise, Loss::Pointwise] {
            for optimizer in [OptimizerKind::AdamW, OptimizerKind::Sgd] {
                let options = TrainOptions {
                    optimizer,
                    validation: 0.25,
                    epochs: 40,
                    batch: 8,
                    dropout: 0.2,
                    learning_rate: match optimizer {
                        OptimizerKind::AdamW => 5e-3,
                        OptimizerKind::Sgd => 0.1,
                    },
                    ..options(loss)
                };
                let mut trainer =
                    Trainer::new(config.clone(), options, data.groups(), None).unwrap();
                while !trainer.is_done() {
                    trainer.epoch().unwrap();
                }
                let best = trainer.best_epoch().unwrap().validation_accuracy.unwrap();
                // A third are right, and that is what choosing blindly gives.
                assert!(best > 0.45, "{kind:?} {loss:?} {optimizer:?}: {best}");
            }
        }
    }
}

#[test]
fn threads_change_nothing() {
    let config = RankerConfig {
        hidden_size: 300,
        ..config(RankerKind::Listwise, 300)
    };
    let data = planted(&config, 20, 10, 2);
    let train = |threads| {
        in_pool(threads, || {
            let options = TrainOptions {
                validation: 0.2,
                dropout: 0.3,
                ..options(Loss::Listwise)
            };
            let mut trainer = Trainer::new(config.clone(), options, data.groups(), None).unwrap();
            for _ in 0..3 {
                trainer.epoch().unwrap();
            }
            trainer.ranker().unwrap().to_bytes().unwrap()
        })
    };
    let one = train(1);
    assert_eq!(one, train(2));
    assert_eq!(one, train(5));
}

#[test]
fn a_run_that_was_interrupted_ends_the_same() {
    let config = config(RankerKind::Listwise, 20);
    let data = planted(&config, 24, 10, 3);
    for optimizer in [OptimizerKind::AdamW, OptimizerKind::Sgd] {
        let begin = || {
            let options = TrainOptions {
                optimizer,
                validation: 0.25,
                epochs: 6,
                dropout: 0.3,
                learning_rate: 0.01,
                ..options(Loss::Listwise)
            };
            Trainer::new(config.clone(), options, data.groups(), None).unwrap()
        };
        let mut whole = begin();
        while !whole.is_done() {
            whole.epoch().unwrap();
        }
        for after in 0..=whole.history().len() {
            let mut trainer = begin();
            for _ in 0..after {
                trainer.epoch().unwrap();
            }
            let checkpoint = trainer.to_checkpoint().unwrap();
            let mut trainer = begin();
            trainer.restore(&checkpoint).unwrap();
            assert_eq!(trainer.history().len(), after);
            while !trainer.is_done() {
                trainer.epoch().unwrap();
            }
            assert!(
                trainer.state == whole.state,
                "interrupted after {after} epochs"
            );
        }
    }
}

#[test]
fn a_checkpoint_of_another_run_is_refused() {
    let config = config(RankerKind::Pointwise, 20);
    let data = planted(&config, 12, 6, 4);
    let begin = |config: &RankerConfig, data, seed| {
        let options = TrainOptions {
            seed,
            ..options(Loss::Pointwise)
        };
        Trainer::new(config.clone(), options, data, None).unwrap()
    };
    let checkpoint = begin(&config, data.groups(), 1).to_checkpoint().unwrap();
    let refusal = |config: &RankerConfig, data, seed| {
        let mut trainer = begin(config, data, seed);
        trainer.restore(&checkpoint).unwrap_err().to_string()
    };
    assert!(refusal(&config, data.groups(), 2).contains("other options"));
    let mut changed = data.groups();
    changed[3].labels[2] = 0.5;
    assert!(refusal(&config, changed, 1).contains("other data"));
    let wider = RankerConfig {
        projection_width: Some(32),
        ..config.clone()
    };
    assert!(refusal(&wider, data.groups(), 1).contains("properties of the ranker"));
    for cut in [0, 7, 100, checkpoint.len() - 1] {
        let error = begin(&config, data.groups(), 1).restore(&checkpoint[..cut]);
        assert!(matches!(error, Err(CheckpointError::Unreadable(_))));
    }
}

#[test]
fn one_key_stays_on_one_side() {
    let config = config(RankerKind::Linear, 4);
    let mut data = Data::random(&config, &[2; 40], 5);
    for (index, key) in data.keys.iter_mut().enumerate() {
        *key = format!("item {}", index / 4);
    }
    let options = TrainOptions {
        validation: 0.3,
        ..options(Loss::Pointwise)
    };
    let groups = data.groups();
    let (fitted, held_out) = split(&groups, &options);
    assert_eq!((fitted.len(), held_out.len()), (28, 12));
    let keys = |of: &[usize]| -> BTreeSet<&str> { of.iter().map(|&i| groups[i].key).collect() };
    assert!(keys(&fitted).is_disjoint(&keys(&held_out)));
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let config = config(RankerKind::Pointwise, 6);
    let data = planted(&config, 4, 5, 6);
    type Change = fn(&mut TrainOptions, &mut Vec<Group>);
    let message = |change: Change| {
        let (mut options, mut groups) = (options(Loss::Listwise), data.groups());
        change(&mut options, &mut groups);
        let trainer = Trainer::new(config.clone(), options, groups, None);
        trainer.err().unwrap().to_string()
    };
    let cases: [(Change, &str); 9] = [
        (|_, groups| groups.clear(), "no group"),
        (
            |_, groups| groups.iter_mut().for_each(|group| group.labels.fill(1.0)),
            "alike in every one of the 4 groups",
        ),
        (
            |_, groups| groups[2].labels[1] = f32::NAN,
            "group 2 (`item 2`): a label is NaN",
        ),
        (|_, groups| groups[1].labels.truncate(3), "group 1"),
        (|_, groups| groups[1].extra.clear(), "extra inputs of 0"),
        (|options, _| options.learning_rate = 0.0, "learning rate"),
        (|options, _| options.dropout = 1.0, "dropout"),
        (|options, _| options.group_size = (9, 8), "from 9 to 8"),
        (|options, _| options.validation = 1.0, "held-out part"),
    ];
    for (change, expected) in cases {
        let message = message(change);
        assert!(message.contains(expected), "{message}");
    }
}
