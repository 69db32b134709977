//! Best-of-N accuracy: what rankers are worth, beside everything that they must be held against.
//!
//! For each item there is a pool of candidates. Accuracy at n is the expected label of the chosen one
//! of n candidates drawn from the pool without replacement: in closed form where each candidate has a
//! score of its own, by seeded random subsets where the choice depends on which others there are
//! (majorities, listwise rankers; exact again for n = 1 and for the whole pool).

pub mod plot;
pub mod strategies;

use std::collections::{BTreeMap, HashSet};

use rayon::prelude::*;
use serde::Serialize;

use crate::ranker::best_of::{oracle, powers_of_two};
use crate::ranker::{Ranker, RankerError, RankerKind};
use crate::tasks::collection::{Collection, CollectionError};
use crate::tasks::training::{self, TrainingDataError};
use strategies::{AnswerPrior, Pool, auc};

/// Resamples of the bootstrap.
const RESAMPLES: usize = 2000;

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    #[error(transparent)]
    Data(#[from] TrainingDataError),
    #[error("{folder}: {source}")]
    Ranker {
        folder: String,
        source: Box<RankerError>,
    },
    #[error("{folder}, item {item}: {source}")]
    Item {
        folder: String,
        item: String,
        source: Box<RankerError>,
    },
    #[error("{folder}: every one of its {items} items occurs in the training collections")]
    AllSeen { folder: String, items: usize },
    #[error("{folder} has no items with candidates")]
    Empty { folder: String },
}

impl From<CollectionError> for EvalError {
    fn from(error: CollectionError) -> EvalError {
        EvalError::Data(error.into())
    }
}

/// Accuracy for each n, and the 95 % interval of a bootstrap over items.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Curve {
    pub strategy: String,
    pub accuracy: Vec<f64>,
    pub low: Vec<f64>,
    pub high: Vec<f64>,
    /// The part of all pairs of a right and a wrong candidate of one item that it orders, averaged
    /// over items; for what scores each candidate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auc: Option<f64>,
}

/// By how much a ranker is more accurate than another strategy on the same items, for each n: the mean
/// of the items' differences, and its 95 % interval. Items that are hard are so for both, so it is
/// narrower than those of the two accuracies.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gain {
    pub ranker: String,
    pub over: String,
    pub gain: Vec<f64>,
    pub low: Vec<f64>,
    pub high: Vec<f64>,
}

/// What was measured on one collection.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    pub folder: String,
    pub task: String,
    pub model: String,
    /// Items measured, and items left out since their key occurs in training.
    pub items: usize,
    pub seen_in_training: usize,
    pub n: Vec<usize>,
    pub curves: Vec<Curve>,
    /// Of every ranker over every strategy that knows no ranker.
    pub gains: Vec<Gain>,
}

impl Evaluation {
    pub fn curve(&self, strategy: &str) -> Option<&Curve> {
        self.curves.iter().find(|curve| curve.strategy == strategy)
    }
}

/// A ranker with the name that tables give it.
pub struct NamedRanker {
    pub name: String,
    pub ranker: Ranker,
}

/// One strategy's values, [items][ns], and the area under its curve where it has one.
struct Rows {
    strategy: String,
    values: Vec<Vec<f64>>,
    auc: Option<f64>,
}

/// Measures rankers and everything else on the items of a collection that do not occur in
/// `training`. Works on the current rayon pool.
pub fn evaluate(
    collection: &Collection,
    training: &[Collection],
    rankers: &[NamedRanker],
    seed: u64,
) -> Result<Evaluation, EvalError> {
    let folder = || collection.folder().display().to_string();
    let info = &collection.info;
    let seen: HashSet<&str> = training
        .iter()
        .flat_map(Collection::items)
        .map(|item| &item.key[..])
        .collect();
    let all = collection.items();
    let with_candidates = (0..all.len()).filter(|&item| !all[item].labels.is_empty());
    let (seen, items): (Vec<usize>, Vec<usize>) =
        with_candidates.partition(|&item| seen.contains(&all[item].key[..]));
    if items.is_empty() {
        return Err(match seen.len() {
            0 => EvalError::Empty { folder: folder() },
            items => EvalError::AllSeen {
                folder: folder(),
                items,
            },
        });
    }
    let smallest = items.iter().map(|&item| all[item].labels.len()).min();
    let ns = powers_of_two(smallest.unwrap_or(1));
    let pool = |item: usize| Pool {
        labels: &all[item].labels,
        answers: &all[item].answers,
        index: item as u32,
    };
    let rows_of = |strategy: &str, value: &(dyn Fn(usize) -> Vec<f64> + Sync)| Rows {
        strategy: strategy.to_string(),
        values: items.par_iter().map(|&item| value(item)).collect(),
        auc: None,
    };
    let by_score = |strategy: &str, score: &(dyn Fn(usize) -> Vec<f32> + Sync)| {
        let scores: Vec<Vec<f32>> = items.par_iter().map(|&item| score(item)).collect();
        let of_items = || items.iter().zip(&scores);
        let areas = of_items().filter_map(|(&item, scores)| auc(scores, &all[item].labels));
        Rows {
            strategy: strategy.to_string(),
            values: of_items()
                .map(|(&item, scores)| pool(item).best_by(scores, &ns))
                .collect(),
            auc: mean(areas),
        }
    };

    let oracle = rows_of("oracle", &|item| oracle(&all[item].labels, &ns));
    let mut ranked_rows = Vec::new();
    for NamedRanker { name, ranker } in rankers {
        let ranked = Ranked::new(collection, ranker, &items)?;
        let of_items = || items.par_iter().zip(&ranked.scores);
        let values = match ranker.config().kind {
            RankerKind::Listwise => of_items()
                .map(|(&item, scores)| {
                    pool(item).best_among(&ns, seed, |subset| {
                        match subset.len() == scores.len() {
                            // Order does not matter to the ranker, but to whom a score belongs.
                            true => Ok(subset.iter().map(|&i| scores[i]).collect()),
                            false => ranked.score(item, subset),
                        }
                    })
                })
                .collect::<Result<_, EvalError>>()?,
            _ => of_items()
                .map(|(&item, scores)| pool(item).best_by(scores, &ns))
                .collect(),
        };
        let areas = items.iter().zip(&ranked.scores);
        ranked_rows.push(Rows {
            strategy: name.clone(),
            values,
            auc: mean(areas.filter_map(|(&item, scores)| auc(scores, &all[item].labels))),
        });
        if has_answers(&items, collection) {
            ranked_rows.push(Rows {
                strategy: format!("majority weighted by {name}"),
                values: of_items()
                    .map(|(&item, scores)| pool(item).weighted_majority(scores, &ns, seed))
                    .collect(),
                auc: None,
            });
        }
    }
    let mut rules = vec![rows_of("first", &|item| pool(item).first(&ns))];
    if items.iter().all(|&item| all[item].greedy.is_some()) {
        rules.push(rows_of("greedy", &|item| {
            vec![all[item].greedy.map_or(0.0, f64::from); ns.len()]
        }));
    }
    if has_answers(&items, collection) {
        rules.push(rows_of("majority", &|item| pool(item).majority(&ns, seed)));
    }
    if items.iter().all(|&item| all[item].mean_logprob.is_some()) {
        rules.push(by_score("mean log-probability", &|item| {
            all[item].mean_logprob.clone().unwrap_or_default()
        }));
    }
    if items.iter().all(|&item| all[item].self_certainty.is_some()) {
        rules.push(by_score("self-certainty", &|item| {
            all[item].self_certainty.clone().unwrap_or_default()
        }));
    }
    if !training.is_empty() && has_answers(&items, collection) {
        let known = training.iter().flat_map(Collection::items);
        let prior = AnswerPrior::new(
            known.flat_map(|item| item.answers.iter().zip(item.labels.iter().copied())),
        );
        rules.push(by_score("answer prior", &|item| {
            all[item]
                .answers
                .iter()
                .map(|answer| prior.score(answer))
                .collect()
        }));
    }
    let chosen_by = |name: &str| ranked_rows.iter().find(|rows| rows.strategy == name);
    let pairs: Vec<(&Rows, &Rows)> = rankers
        .iter()
        .filter_map(|ranker| chosen_by(&ranker.name))
        .flat_map(|ranked| rules.iter().map(move |rule| (ranked, rule)))
        .collect();
    let table: Vec<&Rows> = [&oracle]
        .into_iter()
        .chain(&ranked_rows)
        .chain(&rules)
        .collect();
    Ok(Evaluation {
        folder: folder(),
        task: info.task.clone(),
        model: info.model.clone(),
        items: items.len(),
        seen_in_training: seen.len(),
        curves: table
            .par_iter()
            .map(|rows| curve(rows, ns.len(), seed))
            .collect(),
        gains: pairs
            .par_iter()
            .map(|(ranked, rule)| gain(ranked, rule, ns.len(), seed))
            .collect(),
        n: ns,
    })
}

/// A ranker's scores of all candidates of each item, among themselves. Works on the current rayon pool.
pub fn scores(collection: &Collection, ranker: &Ranker) -> Result<Vec<Vec<f32>>, EvalError> {
    let items: Vec<usize> = (0..collection.items().len()).collect();
    Ok(Ranked::new(collection, ranker, &items)?.scores)
}

/// Whether answers mean anything here.
fn has_answers(items: &[usize], collection: &Collection) -> bool {
    let mut answers = items
        .iter()
        .flat_map(|&item| &collection.items()[item].answers);
    answers.any(Option::is_some)
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

/// A ranker's scores of some items of a collection.
struct Ranked<'a> {
    collection: &'a Collection,
    ranker: &'a Ranker,
    /// Of all candidates of each item, among themselves.
    scores: Vec<Vec<f32>>,
}

impl<'a> Ranked<'a> {
    fn new(
        collection: &'a Collection,
        ranker: &'a Ranker,
        items: &[usize],
    ) -> Result<Self, EvalError> {
        let info = &collection.info;
        ranker
            .check_model(&info.fingerprint, info.hidden_size, info.layers)
            .map_err(|source| EvalError::Ranker {
                folder: collection.folder().display().to_string(),
                source: Box::new(source),
            })?;
        let mut ranked = Ranked {
            collection,
            ranker,
            scores: Vec::new(),
        };
        ranked.scores = items
            .par_iter()
            .map(|&item| {
                let candidates = 0..collection.items()[item].labels.len();
                ranked.score(item, &candidates.collect::<Vec<_>>())
            })
            .collect::<Result<_, EvalError>>()?;
        Ok(ranked)
    }

    /// Scores of some candidates of an item, among themselves.
    fn score(&self, item: usize, candidates: &[usize]) -> Result<Vec<f32>, EvalError> {
        let config = self.ranker.config();
        let layer = self.collection.layer(config.layer)?;
        let extra = training::extra_inputs(self.collection, item, &config.extra_inputs)?;
        let extra: Vec<_> = candidates.iter().map(|&i| extra[i]).collect();
        let rows = layer.candidates(item);
        let features: Vec<f32> = candidates
            .iter()
            .flat_map(|&i| rows.row(i).to_vec())
            .collect();
        let prompt = layer.prompt(item).to_vec();
        self.ranker
            .score(&prompt, &features, &extra)
            .map_err(|source| EvalError::Item {
                folder: self.collection.folder().display().to_string(),
                item: self.collection.items()[item].id.to_string(),
                source: Box::new(source),
            })
    }
}

/// The mean over items, and the interval that holds 95 % of the means over resampled items. The
/// same resamples serve every strategy.
fn curve(rows: &Rows, ns: usize, seed: u64) -> Curve {
    let items = rows.values.len();
    let mean_of = |at: usize, chosen: &mut dyn Iterator<Item = usize>| {
        chosen.map(|item| rows.values[item][at]).sum::<f64>() / items as f64
    };
    let accuracy = (0..ns).map(|at| mean_of(at, &mut (0..items))).collect();
    let mut means = vec![Vec::with_capacity(RESAMPLES); ns];
    for resample in 0..RESAMPLES {
        let drawn = |draw: usize| {
            let uniform =
                crate::backend::random::uniform(seed ^ 0xb007, resample as u32, draw as u32);
            ((uniform * items as f32) as usize).min(items - 1)
        };
        let chosen: Vec<usize> = (0..items).map(drawn).collect();
        for (at, means) in means.iter_mut().enumerate() {
            means.push(mean_of(at, &mut chosen.iter().copied()));
        }
    }
    let mut low = Vec::with_capacity(ns);
    let mut high = Vec::with_capacity(ns);
    for means in &mut means {
        means.sort_by(f64::total_cmp);
        low.push(means[RESAMPLES / 40]);
        high.push(means[RESAMPLES - 1 - RESAMPLES / 40]);
    }
    Curve {
        strategy: rows.strategy.clone(),
        accuracy,
        low,
        high,
        auc: rows.auc,
    }
}

fn gain(ranked: &Rows, over: &Rows, ns: usize, seed: u64) -> Gain {
    let pairs = ranked.values.iter().zip(&over.values);
    let differences = Rows {
        strategy: ranked.strategy.clone(),
        values: pairs
            .map(|(ranked, over)| ranked.iter().zip(over).map(|(r, o)| r - o).collect())
            .collect(),
        auc: None,
    };
    let Curve {
        strategy,
        accuracy,
        low,
        high,
        ..
    } = curve(&differences, ns, seed);
    Gain {
        ranker: strategy,
        over: over.strategy.clone(),
        gain: accuracy,
        low,
        high,
    }
}

/// Accuracy of every ranker (rows) on every collection (columns), at the largest n that all of them
/// have.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Transfer {
    pub n: usize,
    pub collections: Vec<String>,
    pub rankers: BTreeMap<String, Vec<f64>>,
}

pub fn transfer(evaluations: &[Evaluation], rankers: &[NamedRanker]) -> Option<Transfer> {
    let n = *evaluations
        .first()?
        .n
        .iter()
        .rev()
        .find(|n| evaluations.iter().all(|of| of.n.contains(n)))?;
    let accuracy = |name: &str| {
        evaluations
            .iter()
            .filter_map(|of| {
                let at = of.n.iter().position(|found| *found == n)?;
                Some(of.curve(name)?.accuracy[at])
            })
            .collect()
    };
    Some(Transfer {
        n,
        collections: evaluations.iter().map(|of| of.task.clone()).collect(),
        rankers: rankers
            .iter()
            .map(|ranker| (ranker.name.clone(), accuracy(&ranker.name)))
            .collect(),
    })
}
