//! Which of the candidates is the answer: strategies as pure functions of what is known of each.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::answer;

/// How one of the candidates is chosen. Equal candidates: the one with the lowest index. A number
/// that is NaN counts as worse than any other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// The highest score of the ranker
    Ranker,
    /// The first candidate: one sample, whatever N is
    First,
    /// The most probable token at each step: one candidate, written at temperature 0
    Greedy,
    /// Beam search: the finished beam with the highest mean log-probability
    Beam,
    /// The answer that most candidates give (self-consistency)
    Majority,
    /// The highest mean log-probability of a token
    Logprob,
    /// The highest mean divergence from the uniform distribution
    SelfCertainty,
}

impl fmt::Display for Strategy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Strategy::Ranker => "ranker",
            Strategy::First => "first",
            Strategy::Greedy => "greedy",
            Strategy::Beam => "beam",
            Strategy::Majority => "majority",
            Strategy::Logprob => "logprob",
            Strategy::SelfCertainty => "self-certainty",
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown strategy \"{name}\": give one of {}", names().join(", "))]
pub struct UnknownStrategy {
    pub name: String,
}

fn names() -> Vec<String> {
    Strategy::value_variants()
        .iter()
        .map(Strategy::to_string)
        .collect()
}

impl FromStr for Strategy {
    type Err = UnknownStrategy;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let mut strategies = Strategy::value_variants().iter().copied();
        strategies
            .find(|strategy| strategy.to_string() == name)
            .ok_or_else(|| UnknownStrategy {
                name: name.to_string(),
            })
    }
}

/// What selection knows of a finished candidate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CandidateFacts<'a> {
    pub text: &'a str,
    /// Sum of the log-probabilities of its tokens, in nats.
    pub cumulative_logprob: f64,
    /// How many tokens that sum goes over.
    pub tokens: usize,
    /// Mean over its tokens of the model's divergence from the uniform distribution, in nats.
    pub self_certainty: f64,
    /// From the ranker, if there was one.
    pub score: Option<f32>,
}

impl CandidateFacts<'_> {
    /// NaN without tokens.
    pub fn mean_logprob(&self) -> f64 {
        self.cumulative_logprob / self.tokens as f64
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectError {
    #[error("there is no candidate to select from")]
    NoCandidates,
    #[error(
        "candidate {index} has no score: the strategy \"ranker\" needs a ranker (--ranker FILE)"
    )]
    NoScore { index: usize },
}

/// Index of the candidate that the strategy chooses.
pub fn select(strategy: Strategy, candidates: &[CandidateFacts<'_>]) -> Result<usize, SelectError> {
    if candidates.is_empty() {
        return Err(SelectError::NoCandidates);
    }
    let highest = |fact: fn(&CandidateFacts<'_>) -> f64| first_highest(candidates.iter().map(fact));
    match strategy {
        // Beam search hands over its beams best first.
        Strategy::First | Strategy::Greedy | Strategy::Beam => Ok(0),
        Strategy::Logprob => Ok(highest(|candidate| candidate.mean_logprob())),
        Strategy::SelfCertainty => Ok(highest(|candidate| candidate.self_certainty)),
        Strategy::Majority => Ok(majority(candidates)),
        Strategy::Ranker => {
            let scores = candidates.iter().enumerate().map(|(index, candidate)| {
                candidate
                    .score
                    .map(f64::from)
                    .ok_or(SelectError::NoScore { index })
            });
            Ok(first_highest(scores.collect::<Result<Vec<_>, _>>()?))
        }
    }
}

/// The first candidate with the answer that most give. Among answers with as many votes the one
/// whose candidates have the higher mean probability of a token wins, then the one that was given
/// first. Candidates without an answer have no vote; if none has an answer, the first candidate.
fn majority(candidates: &[CandidateFacts<'_>]) -> usize {
    struct Votes {
        first: usize,
        count: usize,
        probability: f64,
    }
    let mut votes: Vec<Votes> = Vec::new();
    let mut place_of = HashMap::new();
    for (index, candidate) in candidates.iter().enumerate() {
        let Some(answer) = answer::extract(candidate.text) else {
            continue;
        };
        let place = *place_of.entry(answer).or_insert(votes.len());
        if place == votes.len() {
            votes.push(Votes {
                first: index,
                count: 0,
                probability: 0.0,
            });
        }
        let votes = &mut votes[place];
        votes.count += 1;
        // A candidate without a probability counts as improbable, not as NaN for all its answer.
        votes.probability += candidate.mean_logprob().exp().max(0.0);
    }
    let mut best: Option<&Votes> = None;
    for candidate in &votes {
        let better = best.is_none_or(|best| {
            candidate
                .count
                .cmp(&best.count)
                .then(compare(candidate.probability, best.probability))
                .is_gt()
        });
        if better {
            best = Some(candidate);
        }
    }
    best.map_or(0, |votes| votes.first)
}

/// Index of the first of the highest numbers.
fn first_highest(values: impl IntoIterator<Item = f64>) -> usize {
    let mut best = (0, f64::NAN);
    for (index, value) in values.into_iter().enumerate() {
        if compare(value, best.1).is_gt() {
            best = (index, value);
        }
    }
    best.0
}

/// Orders numbers, NaN below all.
fn compare(a: f64, b: f64) -> Ordering {
    a.partial_cmp(&b)
        .unwrap_or_else(|| b.is_nan().cmp(&a.is_nan()))
}

#[cfg(test)]
mod tests {
    use super::{CandidateFacts, SelectError, Strategy, select};
    use clap::ValueEnum;
    use proptest::prelude::{Just, Strategy as _, prop, prop_assert, prop_oneof, proptest};

    fn candidate(text: &str, mean_logprob: f64) -> CandidateFacts<'_> {
        CandidateFacts {
            text,
            cumulative_logprob: mean_logprob * 4.0,
            tokens: 4,
            self_certainty: -mean_logprob,
            score: Some(0.0),
        }
    }

    #[test]
    fn names_go_there_and_back() {
        for &strategy in Strategy::value_variants() {
            let name = strategy.to_string();
            assert_eq!(name.parse(), Ok(strategy));
            assert_eq!(strategy.to_possible_value().unwrap().get_name(), name);
            assert_eq!(serde_json::to_value(strategy).unwrap(), name);
            assert_eq!(
                serde_json::from_value::<Strategy>(name.into()).unwrap(),
                strategy
            );
        }
        assert_eq!(
            "best".parse::<Strategy>().unwrap_err().to_string(),
            "unknown strategy \"best\": give one of ranker, first, greedy, beam, majority, logprob, self-certainty"
        );
    }

    #[test]
    fn each_strategy_reads_its_own_fact() {
        let mut candidates = [
            candidate("3", -0.5),
            candidate("4", -0.1),
            candidate("3", -0.9),
        ];
        candidates[0].score = Some(1.0);
        candidates[2].score = Some(2.5);
        // A long candidate: the lowest sum, the highest mean.
        candidates[1].tokens = 4000;
        candidates[1].cumulative_logprob = -400.0;
        for (strategy, expected) in [
            (Strategy::Ranker, 2),
            (Strategy::First, 0),
            (Strategy::Greedy, 0),
            (Strategy::Beam, 0),
            (Strategy::Majority, 0),
            (Strategy::Logprob, 1),
            (Strategy::SelfCertainty, 2),
        ] {
            assert_eq!(select(strategy, &candidates), Ok(expected), "{strategy}");
        }
    }

    #[test]
    fn majority_counts_answers_and_not_texts() {
        let candidates = [
            candidate("I say 7", -0.1),
            candidate("So x = 1/2. The answer is \\boxed{\\frac{1}{2}}.", -3.0),
            candidate("", -0.01),
            candidate("The answer is 0.50", -3.0),
        ];
        assert_eq!(select(Strategy::Majority, &candidates), Ok(1));
    }

    #[test]
    fn majority_ties_go_to_the_more_probable_answer_then_to_the_first() {
        let candidates = [
            candidate("5", -2.0),
            candidate("6", -1.0),
            candidate("5", -0.3),
            candidate("6", -0.9),
        ];
        // e^-2 + e^-0.3 = 0.876 against e^-1 + e^-0.9 = 0.774.
        assert_eq!(select(Strategy::Majority, &candidates), Ok(0));
        assert_eq!(select(Strategy::Majority, &candidates[1..3]), Ok(1));
        let equal = [candidate("8", -1.0), candidate("9", -1.0)];
        assert_eq!(select(Strategy::Majority, &equal), Ok(0));
        let unknown = [candidate("8", f64::NAN), candidate("9", -9.0)];
        assert_eq!(select(Strategy::Majority, &unknown), Ok(1));
        let silent = [candidate("", -1.0), candidate(" \n", -0.5)];
        assert_eq!(select(Strategy::Majority, &silent), Ok(0));
    }

    #[test]
    fn nan_loses_and_empty_candidates_too() {
        let mut candidates = [candidate("a", f64::NAN), candidate("b", f64::NEG_INFINITY)];
        candidates[0].score = Some(f32::NAN);
        candidates[1].score = Some(f32::NEG_INFINITY);
        for strategy in [Strategy::Ranker, Strategy::Logprob] {
            assert_eq!(select(strategy, &candidates), Ok(1));
        }
        candidates[1].score = Some(f32::NAN);
        assert_eq!(select(Strategy::Ranker, &candidates), Ok(0));

        let empty = CandidateFacts {
            tokens: 0,
            cumulative_logprob: 0.0,
            ..candidate("", 0.0)
        };
        assert_eq!(
            select(Strategy::Logprob, &[empty, candidate("a", -9.0)]),
            Ok(1)
        );
    }

    #[test]
    fn what_is_missing_is_said() {
        assert_eq!(select(Strategy::First, &[]), Err(SelectError::NoCandidates));
        let mut candidates = [candidate("a", -1.0), candidate("b", -1.0)];
        candidates[1].score = None;
        assert_eq!(
            select(Strategy::Ranker, &candidates),
            Err(SelectError::NoScore { index: 1 })
        );
    }

    proptest! {
        /// The chosen candidate is the highest, and the first of those.
        #[test]
        fn the_first_of_the_highest_is_chosen(
            scores in prop::collection::vec(
                prop_oneof![Just(f32::NAN), Just(f32::INFINITY), (-3i8..3).prop_map(f32::from)],
                1..12,
            ),
        ) {
            let candidates: Vec<_> = scores
                .iter()
                .map(|&score| CandidateFacts { score: Some(score), ..candidate("", 0.0) })
                .collect();
            let chosen = select(Strategy::Ranker, &candidates).unwrap();
            for (index, &score) in scores.iter().enumerate() {
                if scores[chosen].is_nan() {
                    prop_assert!(score.is_nan() && chosen == 0);
                } else {
                    prop_assert!(score.is_nan() || score <= scores[chosen]);
                    prop_assert!(score != scores[chosen] || chosen <= index);
                }
            }
        }
    }
}
