//! Training rankers on the CPU, in float32.
//!
//! A step takes some groups, and of each some candidates. Features are widened and normalised a
//! block of coordinates at a time, into cache, and multiplied with the projection there; for the
//! projection's gradient they are read once more, so that nothing of the features' size is ever
//! held but the features themselves, which may be mapped from a file.
//!
//! Every number is computed in one order of additions: groups by their place in the batch, rows by
//! their place in the group. So the result depends on the seed and not on the number of threads,
//! and a run that goes on from a checkpoint ends with the bits of one that was never interrupted.
//!
//! `features` normalises, `product` multiplies, `block` and `elementwise` are a group's forward and
//! backward pass, `loss` and `optimizer` what their names say, `checkpoint` is a run on disk.

mod block;
mod checkpoint;
mod elementwise;
mod features;
mod loss;
mod optimizer;
mod product;
mod random;
#[cfg(test)]
mod tests;
mod weights;

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

pub use checkpoint::CheckpointError;
pub use features::{Features, Statistics};
pub use loss::Loss;
pub use optimizer::OptimizerKind;

use super::best_of::{best_of, powers_of_two};
use super::file::{
    ExtraInput, InvalidRanker, Normalization, RankerConfig, RankerKind, RankerTensor, Relevance,
};
use super::{ExtraInputs, Ranker};
use crate::backend::cpu::simd::{Isa, LANES};
use block::{Block, Trace};
use features::{Dropout, Row, Standardizer, normalize};
use optimizer::{Moments, Rates};
use product::{Into, Left, Matrix, Shape, product};
use random::Random;
use weights::{LEAST_TEMPERATURE, Layout};

/// Coordinates that are normalised at a time: those of a hundred rows stay in the second-level cache.
const BLOCK: usize = 256;

/// One item to learn from.
#[derive(Clone, Debug)]
pub struct Group<'a> {
    /// What the item is by content: groups of one key are never on both sides of a split.
    pub key: &'a str,
    /// [hidden_size]
    pub prompt: Features<'a>,
    /// [candidates, hidden_size]
    pub candidates: Features<'a>,
    /// One a candidate, from 0 (wrong) to 1 (right).
    pub labels: Vec<f32>,
    /// One a candidate; may be empty where the ranker has no extra inputs.
    pub extra: Vec<ExtraInputs>,
}

/// How a ranker is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainOptions {
    pub loss: Loss,
    pub optimizer: OptimizerKind,
    /// The highest of the schedule.
    pub learning_rate: f64,
    /// Of matrices, a step's part of it being the learning rate.
    pub weight_decay: f64,
    /// Passes over the groups, at most.
    pub epochs: usize,
    /// Passes without a better ranker on the held-out groups after which training ends.
    pub patience: usize,
    /// Groups of one step.
    pub batch: usize,
    /// A step takes so many random candidates of each group, a number within these that it draws.
    pub group_size: (usize, usize),
    /// The part of the normalised candidates' features that is dropped, at random.
    pub dropout: f32,
    /// The part of the keys that is held out to choose the best ranker by; with 0 the last one is
    /// taken.
    pub validation: f64,
    pub seed: u64,
}

impl TrainOptions {
    /// What does well with each kind of ranker.
    pub fn of(kind: RankerKind) -> Self {
        TrainOptions {
            loss: match kind {
                RankerKind::Listwise => Loss::Listwise,
                RankerKind::Pointwise | RankerKind::Linear => Loss::Pointwise,
            },
            optimizer: OptimizerKind::AdamW,
            learning_rate: 1e-3,
            weight_decay: 1.0,
            epochs: 60,
            patience: 20,
            batch: 16,
            group_size: (8, 32),
            dropout: 0.5,
            validation: 0.15,
            seed: 0,
        }
    }
}

/// Why nothing can be trained. Groups count from 0.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error("there is no group to learn from")]
    NoGroups,
    #[error(
        "all candidates are labelled alike in every one of the {groups} groups that are not held out: there is nothing to rank"
    )]
    NothingToRank { groups: usize },
    #[error("group {group} (`{key}`): {problem}")]
    Group {
        group: usize,
        key: String,
        problem: String,
    },
    #[error("{0}")]
    Options(String),
    #[error(transparent)]
    Ranker(#[from] InvalidRanker),
    #[error(
        "the loss is {loss} in epoch {epoch}: the learning rate is too high, or a feature is far outside the others"
    )]
    Diverged { epoch: usize, loss: f64 },
}

/// What one pass over the groups came to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Epoch {
    /// Counted from 1.
    pub epoch: usize,
    /// Mean over the pass: of groups (listwise) or of candidates (pointwise).
    pub loss: f64,
    /// The same of the held-out groups, all of their candidates, nothing dropped.
    pub validation_loss: Option<f64>,
    /// Accuracy of the chosen candidate on the held-out groups, averaged over n = 2, 4, … pool.
    pub validation_accuracy: Option<f64>,
}

/// A group, ready for every step.
struct Prepared<'a> {
    prompt: Features<'a>,
    candidates: Features<'a>,
    labels: Vec<f32>,
    /// Standardised, [candidates, extra inputs].
    extra: Vec<f32>,
    /// The prompt's and the candidates' factors, where each row has its own.
    factors: Vec<f32>,
}

/// A ranker in training.
pub struct Trainer<'a> {
    isa: Isa,
    config: RankerConfig,
    options: TrainOptions,
    layout: Layout,
    /// The statistics' tensors, as the file holds them.
    statistics: BTreeMap<String, RankerTensor>,
    prompt_standardizer: Standardizer,
    candidate_standardizer: Standardizer,
    groups: Vec<Prepared<'a>>,
    /// Those that steps draw from, and those that are held out.
    fitted: Vec<usize>,
    held_out: Vec<usize>,
    state: State,
}

/// All that changes from epoch to epoch: what a checkpoint holds.
#[derive(Clone, Debug, PartialEq)]
struct State {
    weights: Vec<f32>,
    moments: Moments,
    history: Vec<Epoch>,
    /// Epoch (from 1) and weights of the best ranker so far.
    best: Option<(usize, Vec<f32>)>,
}

impl<'a> Trainer<'a> {
    /// A new ranker of that description, or one that goes on from `init`: its weights and its
    /// statistics, which the weights rely on.
    ///
    /// `config.training` and `config.metrics` are the caller's. Works on the current rayon pool, as
    /// does [`epoch`](Self::epoch).
    pub fn new(
        config: RankerConfig,
        options: TrainOptions,
        groups: Vec<Group<'a>>,
        init: Option<&Ranker>,
    ) -> Result<Self, TrainError> {
        check(&config, &options, &groups)?;
        let (fitted, held_out) = split(&groups, &options);
        let fitted: Vec<usize> = fitted
            .into_iter()
            .filter(|&group| options.loss == Loss::Pointwise || loss::ranks(&groups[group].labels))
            .collect();
        if !fitted
            .iter()
            .any(|&group| loss::ranks(&groups[group].labels))
        {
            let groups = groups.len() - held_out.len();
            return Err(TrainError::NothingToRank { groups });
        }
        let layout = Layout::new(&config);
        let statistics = match init {
            None => statistics(&config, &groups, &fitted),
            Some(ranker) => {
                let of_ranker = ranker.tensors().iter();
                of_ranker
                    .filter(|(name, _)| name.starts_with("normalization."))
                    .map(|(name, tensor)| (name.clone(), tensor.clone()))
                    .collect()
            }
        };
        let standardizer = |of: &str| match statistics_of(&statistics, of) {
            Some(statistics) => Standardizer::new(&statistics),
            None => Standardizer::identity(config.hidden_size),
        };
        let weights = match init {
            None => layout.initial(options.seed),
            Some(ranker) => layout.read_tensors(&config, ranker.tensors()),
        };
        let moments = Moments::new(options.optimizer, layout.len);
        let extra_statistics = statistics_of(&statistics, "extra");
        let isa = Isa::best();
        let groups: Vec<Prepared> = groups
            .into_par_iter()
            .map(|group| prepare(group, &config, extra_statistics.as_ref()))
            .collect();
        let trainer = Trainer {
            isa,
            prompt_standardizer: standardizer("prompt"),
            candidate_standardizer: standardizer("candidate"),
            statistics,
            layout,
            groups,
            fitted,
            held_out,
            state: State {
                weights,
                moments,
                history: Vec::new(),
                best: None,
            },
            config,
            options,
        };
        // Refuses what no ranker may be, and statistics that are not finite, before any work.
        trainer.to_ranker(&trainer.state.weights)?;
        Ok(trainer)
    }

    pub fn config(&self) -> &RankerConfig {
        &self.config
    }

    pub fn options(&self) -> &TrainOptions {
        &self.options
    }

    /// Groups that steps draw from, and groups that are held out.
    pub fn group_counts(&self) -> (usize, usize) {
        (self.fitted.len(), self.held_out.len())
    }

    /// All epochs so far.
    pub fn history(&self) -> &[Epoch] {
        &self.state.history
    }

    /// The epoch (from 1) whose ranker is the best so far; none before the first has ended.
    pub fn best_epoch(&self) -> Option<&Epoch> {
        let (epoch, _) = self.state.best.as_ref()?;
        self.state.history.get(epoch - 1)
    }

    /// Whether all epochs are done, or too many have passed without a better ranker.
    pub fn is_done(&self) -> bool {
        let done = self.state.history.len();
        let best = self.state.best.as_ref().map_or(0, |(epoch, _)| *epoch);
        done >= self.options.epochs
            || (!self.held_out.is_empty() && done - best >= self.options.patience)
    }

    /// The best ranker so far; the initial one before the first epoch.
    pub fn ranker(&self) -> Result<Ranker, TrainError> {
        match &self.state.best {
            Some((_, weights)) => self.to_ranker(weights),
            None => self.to_ranker(&self.state.weights),
        }
    }

    fn to_ranker(&self, weights: &[f32]) -> Result<Ranker, TrainError> {
        let mut tensors = self.layout.to_tensors(&self.config, weights);
        tensors.extend(self.statistics.clone());
        Ok(Ranker::new(self.config.clone(), tensors)?)
    }

    /// One pass over the groups.
    pub fn epoch(&mut self) -> Result<Epoch, TrainError> {
        let number = self.state.history.len() as u64;
        let mut random = Random::new(self.options.seed, &[1, number]);
        let order = random.choose(self.fitted.len(), self.fitted.len());
        let batches = order.len().div_ceil(self.options.batch) as u64;
        let steps = batches * self.options.epochs as u64;
        let (mut loss, mut count) = (0.0, 0);
        for (index, batch) in (0..).zip(order.chunks(self.options.batch)) {
            let (least, most) = self.options.group_size;
            let size = least + random.below(most - least + 1);
            let samples: Vec<Sample> = batch
                .iter()
                .map(|&at| {
                    let group = self.fitted[at];
                    Sample {
                        group,
                        chosen: random.choose(self.groups[group].labels.len(), size),
                        dropout_key: random.next(),
                    }
                })
                .collect();
            let rate = optimizer::schedule(number * batches + index, steps);
            let (batch_loss, batch_count) = self.step(&samples, rate);
            loss += batch_loss;
            count += batch_count;
        }
        let loss = loss / count.max(1) as f64;
        let epoch = self.state.history.len() + 1;
        if !loss.is_finite() || self.state.weights.iter().any(|weight| !weight.is_finite()) {
            return Err(TrainError::Diverged { epoch, loss });
        }
        let validation = (!self.held_out.is_empty()).then(|| self.validate());
        let result = Epoch {
            epoch,
            loss,
            validation_loss: validation.map(|(loss, _)| loss),
            validation_accuracy: validation.map(|(_, accuracy)| accuracy),
        };
        let best = self.best_epoch().and_then(|best| best.validation_accuracy);
        if result.validation_accuracy.is_none() || result.validation_accuracy > best {
            self.state.best = Some((epoch, self.state.weights.clone()));
        }
        self.state.history.push(result);
        Ok(result)
    }

    /// One step; gives the sum of the loss and what it is to be divided by.
    fn step(&mut self, samples: &[Sample], rate: f64) -> (f64, usize) {
        let Some((loss, count, gradient)) = self.gradient(samples) else {
            return (0.0, 0);
        };
        let rates = Rates {
            learning_rate: self.options.learning_rate * rate,
            weight_decay: self.options.weight_decay,
            decayed: &self.layout.decayed(),
        };
        let State {
            weights, moments, ..
        } = &mut self.state;
        let optimizer = self.options.optimizer;
        optimizer::step(self.isa, optimizer, &rates, weights, &gradient, moments);
        if let Some(temperature) = self.layout.temperature {
            weights[temperature] = weights[temperature].max(LEAST_TEMPERATURE);
        }
        (loss, count)
    }

    /// The sum of the loss over some groups, what it is to be divided by, and the gradient of that
    /// mean; none where there is nothing to learn.
    fn gradient(&self, samples: &[Sample]) -> Option<(f64, usize, Vec<f32>)> {
        let labels = |sample: &Sample| -> Vec<f32> {
            let labels = &self.groups[sample.group].labels;
            sample.chosen.iter().map(|&i| labels[i]).collect()
        };
        let loss = self.options.loss;
        let count: usize = samples
            .iter()
            .map(|sample| loss.count(&labels(sample)))
            .sum();
        if count == 0 {
            return None;
        }
        let block = self.block().with_transposes();
        let bias = self.state.weights[self.layout.bias];
        let width = self.layout.width;
        let behind = self.layout.projection.end;
        let passes: Vec<Pass> = samples
            .par_iter()
            .map(|sample| {
                let rows = self.rows(sample);
                let (scores, trace) = self.forward(&block, sample, &rows);
                let group = loss.of(&scores, bias, &labels(sample), 1.0 / count as f64);
                let mut gradient = vec![0.0; self.layout.len - behind];
                let d_projected = block.backward(&trace, &group.d_scores, &mut gradient);
                gradient[self.layout.bias - behind] += group.d_bias as f32;
                Pass {
                    rows,
                    loss: group.loss,
                    d_projected,
                    gradient,
                }
            })
            .collect();

        let mut gradient = vec![0.0; self.layout.len];
        let (projection, others) = gradient.split_at_mut(behind);
        for pass in &passes {
            elementwise::add(self.isa, others, &pass.gradient);
        }
        let (of_features, of_extra) = projection.split_at_mut(self.layout.hidden_size * width);
        // Blocks of a small hidden size are smaller, so that every thread has several.
        let block_len = BLOCK.min(self.layout.hidden_size.div_ceil(8).next_multiple_of(LANES));
        of_features
            .par_chunks_mut(block_len * width)
            .enumerate()
            .for_each(|(index, gradient)| {
                let (from, len) = (index * block_len, gradient.len() / width);
                let stride = len.next_multiple_of(LANES);
                let mut normalized = Vec::new();
                for pass in &passes {
                    normalized.resize(pass.rows.len() * stride, 0.0);
                    normalize(self.isa, &pass.rows, from, len, &mut normalized, stride);
                    self.outer(&normalized, stride, &pass.d_projected, gradient);
                }
            });
        if !of_extra.is_empty() {
            for (sample, pass) in samples.iter().zip(&passes) {
                let extra = self.extra(sample);
                self.outer(&extra, of_extra.len() / width, &pass.d_projected, of_extra);
            }
        }
        let loss = passes.iter().map(|pass| pass.loss).sum();
        Some((loss, count, gradient))
    }

    /// `gradient += inputsᵀ · d_projected`, rows of inputs `stride` apart.
    fn outer(&self, inputs: &[f32], stride: usize, d_projected: &[f32], gradient: &mut [f32]) {
        let width = self.layout.width;
        let shape = Shape {
            rows: gradient.len() / width,
            inner: d_projected.len() / width,
            columns: width,
        };
        product(
            self.isa,
            shape,
            Left::Transposed(Matrix::new(inputs, stride)),
            Matrix::new(d_projected, width),
            gradient,
            width,
            Into::Add,
        );
    }

    fn block(&self) -> Block<'_> {
        Block::new(
            self.isa,
            self.config.kind,
            self.config.relevance.unwrap_or(Relevance::Dot),
            &self.layout,
            &self.state.weights,
        )
    }

    /// The prompt and the chosen candidates.
    fn rows(&self, sample: &Sample) -> Vec<Row<'_>> {
        let group = &self.groups[sample.group];
        let hidden_size = self.layout.hidden_size;
        let factor = |row: usize| group.factors.get(row).copied().unwrap_or(1.0);
        let prompt = Row {
            features: group.prompt,
            standardizer: &self.prompt_standardizer,
            factor: factor(0),
            dropout: None,
        };
        let candidates = sample.chosen.iter().map(|&candidate| Row {
            features: group.candidates.slice(candidate * hidden_size, hidden_size),
            standardizer: &self.candidate_standardizer,
            factor: factor(candidate + 1),
            dropout: match sample.dropout_key {
                0 => None,
                key => Dropout::new(self.options.dropout, random::mix(key ^ candidate as u64)),
            },
        });
        std::iter::once(prompt).chain(candidates).collect()
    }

    /// The extra inputs of the same rows, [rows, extra inputs]; the prompt's are zero.
    fn extra(&self, sample: &Sample) -> Vec<f32> {
        let count = self.config.extra_inputs.len();
        let group = &self.groups[sample.group];
        let mut extra = vec![0.0; count];
        for &candidate in &sample.chosen {
            extra.extend(&group.extra[candidate * count..][..count]);
        }
        extra
    }

    /// Scores of the chosen candidates.
    fn forward(&self, block: &Block, sample: &Sample, rows: &[Row]) -> (Vec<f32>, Trace) {
        let Layout {
            hidden_size,
            inputs,
            width,
            ..
        } = self.layout;
        let weight = &self.state.weights[self.layout.projection.clone()];
        let mut projected = vec![0.0; rows.len() * width];
        let mut normalized = vec![0.0; rows.len() * BLOCK];
        let mut multiply = |left: Matrix, from: usize, inner: usize| {
            product(
                self.isa,
                Shape {
                    rows: rows.len(),
                    inner,
                    columns: width,
                },
                Left::AsIs(left),
                Matrix::new(&weight[from * width..], width),
                &mut projected,
                width,
                Into::Add,
            );
        };
        for from in (0..hidden_size).step_by(BLOCK) {
            let inner = BLOCK.min(hidden_size - from);
            normalize(self.isa, rows, from, inner, &mut normalized, BLOCK);
            multiply(Matrix::new(&normalized, BLOCK), from, inner);
        }
        if inputs > hidden_size {
            let extra = self.extra(sample);
            let count = inputs - hidden_size;
            multiply(Matrix::new(&extra, count), hidden_size, count);
        }
        block.forward(projected)
    }

    /// Loss and accuracy on the held-out groups.
    fn validate(&self) -> (f64, f64) {
        let loss = self.options.loss;
        let bias = self.state.weights[self.layout.bias];
        let smallest = self
            .held_out
            .iter()
            .map(|&group| self.groups[group].labels.len())
            .min();
        let mut ns = powers_of_two(smallest.unwrap_or(1));
        if ns.len() > 1 {
            ns.remove(0);
        }
        let groups: Vec<(f64, usize, f64)> = self
            .held_out
            .par_iter()
            .map(|&group| {
                let scores = self.scores(group);
                let labels = &self.groups[group].labels;
                let of_ns = best_of(&scores, labels, &ns);
                (
                    loss.of(&scores, bias, labels, 1.0).loss,
                    loss.count(labels),
                    of_ns.iter().sum::<f64>() / ns.len() as f64,
                )
            })
            .collect();
        let count: usize = groups.iter().map(|(_, count, _)| count).sum();
        let loss: f64 = groups.iter().map(|(loss, _, _)| loss).sum();
        let accuracy: f64 = groups.iter().map(|(_, _, accuracy)| accuracy).sum();
        (loss / count.max(1) as f64, accuracy / groups.len() as f64)
    }

    /// Scores of all candidates of a group with the current weights, nothing dropped.
    fn scores(&self, group: usize) -> Vec<f32> {
        let sample = Sample {
            group,
            chosen: (0..self.groups[group].labels.len()).collect(),
            dropout_key: 0,
        };
        self.forward(&self.block(), &sample, &self.rows(&sample)).0
    }
}

/// What a step takes of one group.
struct Sample {
    group: usize,
    chosen: Vec<usize>,
    /// 0: nothing is dropped.
    dropout_key: u64,
}

/// What the forward and backward pass of one group leaves.
struct Pass<'a> {
    rows: Vec<Row<'a>>,
    loss: f64,
    /// [rows, width]
    d_projected: Vec<f32>,
    /// Of all weights behind the projection.
    gradient: Vec<f32>,
}

fn check(
    config: &RankerConfig,
    options: &TrainOptions,
    groups: &[Group],
) -> Result<(), TrainError> {
    let refuse = |problem: String| Err(TrainError::Options(problem));
    let TrainOptions {
        learning_rate,
        weight_decay,
        epochs,
        batch,
        group_size: (least, most),
        dropout,
        validation,
        ..
    } = *options;
    if !(learning_rate > 0.0 && learning_rate <= 10.0) {
        return refuse(format!(
            "the learning rate is {learning_rate}; give one above 0, such as 0.001"
        ));
    }
    if !(weight_decay >= 0.0 && weight_decay * learning_rate < 1.0) {
        return refuse(format!(
            "weight decay is {weight_decay}; give 0 or more, and less than 1 / learning rate"
        ));
    }
    if epochs == 0 || batch == 0 {
        return refuse("give at least one epoch, and one group a step".into());
    }
    if least == 0 || least > most {
        return refuse(format!("group sizes from {least} to {most} make no sense"));
    }
    if !(0.0..=0.95).contains(&dropout) {
        return refuse(format!("dropout is {dropout}; give a part from 0 to 0.95"));
    }
    if !(0.0..1.0).contains(&validation) {
        return refuse(format!(
            "the held-out part is {validation}; give one from 0 to below 1"
        ));
    }
    if groups.is_empty() {
        return Err(TrainError::NoGroups);
    }
    for (index, group) in groups.iter().enumerate() {
        let refuse = |problem: String| {
            Err(TrainError::Group {
                group: index,
                key: group.key.to_owned(),
                problem,
            })
        };
        let candidates = group.labels.len();
        if candidates == 0 {
            return refuse("it has no candidates".into());
        }
        if group.prompt.len() != config.hidden_size
            || group.candidates.len() != candidates * config.hidden_size
        {
            return refuse(format!(
                "{} numbers of its prompt and {} of its candidates are not 1 and {candidates} rows of {}",
                group.prompt.len(),
                group.candidates.len(),
                config.hidden_size
            ));
        }
        if let Some(label) = group
            .labels
            .iter()
            .find(|label| !(0.0..=1.0).contains(*label))
        {
            return refuse(format!(
                "a label is {label}; labels go from 0 (wrong) to 1 (right)"
            ));
        }
        if !config.extra_inputs.is_empty() && group.extra.len() != candidates {
            return refuse(format!(
                "extra inputs of {} of its {candidates} candidates",
                group.extra.len()
            ));
        }
    }
    Ok(())
}

/// Groups to learn from and groups that are held out; those of one key stay together.
fn split(groups: &[Group], options: &TrainOptions) -> (Vec<usize>, Vec<usize>) {
    let keys: Vec<&str> = groups
        .iter()
        .map(|group| group.key)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let count = (keys.len() as f64 * options.validation).ceil() as usize;
    // At least one stays to learn from.
    let count = count.min(keys.len() - 1);
    let mut random = Random::new(options.seed, &[2]);
    let held_out: BTreeSet<&str> = random
        .choose(keys.len(), count)
        .into_iter()
        .map(|key| keys[key])
        .collect();
    (0..groups.len()).partition(|&group| !held_out.contains(groups[group].key))
}

/// The statistics' tensors of a ranker of that description, from the groups that it learns from.
fn statistics(
    config: &RankerConfig,
    groups: &[Group],
    fitted: &[usize],
) -> BTreeMap<String, RankerTensor> {
    let mut tensors = BTreeMap::new();
    let mut insert = |of: &str, statistics: Statistics| {
        for (what, data) in [("mean", statistics.mean), ("scale", statistics.scale)] {
            let shape = vec![data.len()];
            let tensor = RankerTensor { shape, data };
            tensors.insert(format!("normalization.{of}.{what}"), tensor);
        }
    };
    let fitted = || fitted.iter().map(|&group| &groups[group]);
    if config.normalization == Normalization::Standardized {
        if config.kind != RankerKind::Linear {
            let prompts: Vec<_> = fitted().map(|group| group.prompt).collect();
            insert("prompt", Statistics::of(&prompts, config.hidden_size));
        }
        let candidates: Vec<_> = fitted().map(|group| group.candidates).collect();
        insert("candidate", Statistics::of(&candidates, config.hidden_size));
    }
    if !config.extra_inputs.is_empty() {
        let numbers: Vec<[u8; 4]> = fitted()
            .flat_map(|group| &group.extra)
            .flat_map(|extra| config.extra_inputs.iter().map(|&input| extra.get(input)))
            .map(f32::to_le_bytes)
            .collect();
        let width = config.extra_inputs.len();
        insert("extra", Statistics::of(&[Features::F32(&numbers)], width));
    }
    tensors
}

fn statistics_of(tensors: &BTreeMap<String, RankerTensor>, of: &str) -> Option<Statistics> {
    let data = |what: &str| {
        let tensor = tensors.get(&format!("normalization.{of}.{what}"))?;
        Some(tensor.data.clone())
    };
    Some(Statistics {
        mean: data("mean")?,
        scale: data("scale")?,
    })
}

fn prepare<'a>(
    group: Group<'a>,
    config: &RankerConfig,
    extra_statistics: Option<&Statistics>,
) -> Prepared<'a> {
    let standardized = |(index, &input): (usize, &ExtraInput), extra: &ExtraInputs| {
        let value = extra.get(input);
        extra_statistics.map_or(value, |of| {
            (value - of.mean[index]) * (1.0 / of.scale[index])
        })
    };
    let extra = group
        .extra
        .iter()
        .flat_map(|extra| {
            let inputs = config.extra_inputs.iter().enumerate();
            inputs.map(move |input| standardized(input, extra))
        })
        .collect();
    let factors = match config.normalization {
        Normalization::Rms => {
            let candidates = 0..group.labels.len();
            let d = config.hidden_size;
            std::iter::once(group.prompt)
                .chain(candidates.map(|candidate| group.candidates.slice(candidate * d, d)))
                .map(|row| super::projection::inverse_rms(&row.to_f32()))
                .collect()
        }
        Normalization::None | Normalization::Standardized => Vec::new(),
    };
    Prepared {
        prompt: group.prompt,
        candidates: group.candidates,
        labels: group.labels,
        extra,
        factors,
    }
}
