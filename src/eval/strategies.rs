//! What each way of choosing among n candidates is worth on one item.

use std::collections::HashMap;

use crate::backend::random;
use crate::ranker::best_of::best_of;

/// Random subsets for each n, where there is no closed form.
pub const SUBSETS: usize = 64;

/// One item as strategies see it. Lists have one entry a candidate.
pub struct Pool<'a> {
    pub labels: &'a [f32],
    pub answers: &'a [Option<String>],
    /// Its place in the collection: subsets are drawn by it.
    pub index: u32,
}

impl Pool<'_> {
    fn len(&self) -> usize {
        self.labels.len()
    }

    /// A random order of the candidates: its first n are a random subset of n, for every n.
    fn order(&self, sample: usize, seed: u64) -> Vec<usize> {
        let key = |candidate: usize| {
            let sample = (sample * self.len() + candidate) as u32;
            random::uniform(seed, self.index, sample)
        };
        let mut order: Vec<(f32, usize)> = (0..self.len()).map(|i| (key(i), i)).collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        order.into_iter().map(|(_, candidate)| candidate).collect()
    }

    /// The mean over subsets of each size in `ns` of what `value` makes of them: [`SUBSETS`] random
    /// ones, but all of them for 1 and for the whole pool. `value` must not depend on the order.
    fn over_subsets(
        &self,
        ns: &[usize],
        seed: u64,
        mut value: impl FnMut(&[usize]) -> f64,
    ) -> Vec<f64> {
        let orders: Vec<Vec<usize>> = (0..SUBSETS)
            .map(|sample| self.order(sample, seed))
            .collect();
        ns.iter()
            .map(|&n| {
                if n == 1 {
                    let each = (0..self.len()).map(|candidate| value(&[candidate]));
                    return each.sum::<f64>() / self.len() as f64;
                }
                if n == self.len() {
                    return value(&orders[0]);
                }
                let sum: f64 = orders.iter().map(|order| value(&order[..n])).sum();
                sum / SUBSETS as f64
            })
            .collect()
    }

    /// The label of one candidate drawn at random, which the first is.
    pub fn first(&self, ns: &[usize]) -> Vec<f64> {
        let sum: f64 = self.labels.iter().map(|&label| f64::from(label)).sum();
        vec![sum / self.len() as f64; ns.len()]
    }

    /// The best by a score that each candidate has by itself; exact.
    pub fn best_by(&self, scores: &[f32], ns: &[usize]) -> Vec<f64> {
        best_of(scores, self.labels, ns)
    }

    /// The best by scores that candidates have among others, by random subsets. `score` fails as
    /// the ranker does.
    pub fn best_among<E>(
        &self,
        ns: &[usize],
        seed: u64,
        mut score: impl FnMut(&[usize]) -> Result<Vec<f32>, E>,
    ) -> Result<Vec<f64>, E> {
        let mut failed = None;
        let values = self.over_subsets(ns, seed, |subset| match score(subset) {
            Ok(scores) => {
                let labels: Vec<f32> = subset.iter().map(|&i| self.labels[i]).collect();
                best_of(&scores, &labels, &[subset.len()])[0]
            }
            Err(error) => {
                failed.get_or_insert(error);
                0.0
            }
        });
        match failed {
            None => Ok(values),
            Some(error) => Err(error),
        }
    }

    /// The most frequent answer, by random subsets; equally frequent ones share the choice.
    pub fn majority(&self, ns: &[usize], seed: u64) -> Vec<f64> {
        self.over_subsets(ns, seed, |subset| self.elected(subset, |_| 1.0))
    }

    /// The answer with the most votes, where a candidate's vote weighs as much as the softmax of the
    /// subset's scores gives it.
    pub fn weighted_majority(&self, scores: &[f32], ns: &[usize], seed: u64) -> Vec<f64> {
        self.over_subsets(ns, seed, |subset| {
            let largest = subset
                .iter()
                .map(|&i| scores[i])
                .fold(f32::NEG_INFINITY, f32::max);
            self.elected(subset, |i| f64::from(scores[i] - largest).exp())
        })
    }

    /// The mean label of the candidates that gave the answer with the most votes. Candidates without
    /// an answer do not vote; where none has one, any is chosen.
    fn elected(&self, subset: &[usize], vote: impl Fn(usize) -> f64) -> f64 {
        struct Party {
            votes: f64,
            labels: f64,
            count: f64,
        }
        let mut parties: HashMap<&str, Party> = HashMap::new();
        // Votes are added in the candidates' order, whatever order the subset has.
        let mut sorted = subset.to_vec();
        sorted.sort_unstable();
        for &candidate in &sorted {
            let Some(answer) = &self.answers[candidate] else {
                continue;
            };
            let party = parties.entry(answer).or_insert(Party {
                votes: 0.0,
                labels: 0.0,
                count: 0.0,
            });
            party.votes += vote(candidate);
            party.labels += f64::from(self.labels[candidate]);
            party.count += 1.0;
        }
        let most = parties
            .values()
            .map(|party| party.votes)
            .fold(f64::MIN, f64::max);
        let mut winners: Vec<f64> = parties
            .values()
            .filter(|party| party.votes == most)
            .map(|party| party.labels / party.count)
            .collect();
        // A hash map has no order, and sums of floats have one.
        winners.sort_by(f64::total_cmp);
        if winners.is_empty() {
            winners = subset.iter().map(|&i| f64::from(self.labels[i])).collect();
        }
        winners.iter().sum::<f64>() / winners.len() as f64
    }
}

/// How often each answer's text was right in training, drawn to the mean where it is rare: what
/// can be known without looking at the question.
pub struct AnswerPrior {
    of_answer: HashMap<String, f32>,
    of_others: f32,
}

impl AnswerPrior {
    pub fn new<'a>(
        answers: impl Iterator<Item = (&'a Option<String>, f32)> + Clone,
    ) -> AnswerPrior {
        let mut counts: HashMap<&str, (f64, f64)> = HashMap::new();
        let (mut sum, mut total) = (0.0, 0.0);
        for (answer, label) in answers {
            sum += f64::from(label);
            total += 1.0;
            if let Some(answer) = answer {
                let (right, count) = counts.entry(answer).or_default();
                *right += f64::from(label);
                *count += 1.0;
            }
        }
        let mean = sum / f64::max(total, 1.0);
        let shrunk = |(answer, (right, count)): (&str, (f64, f64))| {
            (answer.to_string(), ((right + mean) / (count + 1.0)) as f32)
        };
        AnswerPrior {
            of_answer: counts.into_iter().map(shrunk).collect(),
            of_others: mean as f32,
        }
    }

    pub fn score(&self, answer: &Option<String>) -> f32 {
        let known = answer
            .as_ref()
            .and_then(|answer| self.of_answer.get(answer));
        known.copied().unwrap_or(self.of_others)
    }
}

/// The part of all pairs of a better and a worse candidate in which the better one has the higher
/// score; none where all labels are alike.
pub fn auc(scores: &[f32], labels: &[f32]) -> Option<f64> {
    let (mut pairs, mut ordered) = (0.0, 0.0);
    for (a, label) in scores.iter().zip(labels) {
        for (b, other) in scores.iter().zip(labels) {
            if label > other {
                pairs += 1.0;
                ordered += match a.total_cmp(b) {
                    _ if a == b => 0.5,
                    std::cmp::Ordering::Greater => 1.0,
                    _ => 0.0,
                };
            }
        }
    }
    (pairs > 0.0).then(|| ordered / pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool<'a>(labels: &'a [f32], answers: &'a [Option<String>]) -> Pool<'a> {
        Pool {
            labels,
            answers,
            index: 3,
        }
    }

    fn answers(text: &str) -> Vec<Option<String>> {
        text.chars()
            .map(|c| (c != '-').then(|| c.to_string()))
            .collect()
    }

    #[test]
    fn majorities_by_hand() {
        // Of the pairs, aa has a majority; ab, ab, aX, aX, bX by lot or by the one that votes.
        let (labels, answers) = ([1.0, 1.0, 0.0, 0.0], answers("aab-"));
        let pool = pool(&labels, &answers);
        let values = pool.majority(&[1, 2, 4], 1);
        assert_eq!((values[0], values[2]), (0.5, 1.0));
        // aa 1, ab ½ twice, a- 1 twice, b- 0: mean 4/6; 64 samples of a value within 0..1 have a
        // standard error below 1/16.
        assert!((values[1] - 4.0 / 6.0).abs() < 0.25, "{values:?}");
        assert_eq!(values, pool.majority(&[1, 2, 4], 1), "seeded");

        // The vote for b weighs e² against twice 1.
        let values = pool.weighted_majority(&[0.0, 0.0, 2.0, 9.0], &[1, 4], 1);
        assert_eq!(values, [0.5, 0.0]);
    }

    #[test]
    fn nobody_votes_and_all_tie() {
        let labels = [1.0, 0.0, 0.0];
        assert_eq!(
            pool(&labels, &answers("---")).majority(&[3], 0),
            [1.0 / 3.0]
        );
        assert_eq!(
            pool(&labels, &answers("abc")).majority(&[3], 0),
            [1.0 / 3.0]
        );
    }

    #[test]
    fn subsets_agree_with_the_closed_form() {
        let labels: Vec<f32> = (0..12).map(|i| f32::from(i % 3 == 0)).collect();
        let scores: Vec<f32> = (0..12).map(|i| ((i * 7) % 12) as f32).collect();
        let answers = vec![None; 12];
        let (mut exact, mut sampled) = ([0.0; 3], [0.0; 3]);
        for index in 0..200 {
            let pool = Pool {
                labels: &labels,
                answers: &answers,
                index,
            };
            let by_subsets = pool.best_among(&[1, 4, 12], 5, |subset| {
                Ok::<_, ()>(subset.iter().map(|&i| scores[i]).collect())
            });
            let pairs = pool
                .best_by(&scores, &[1, 4, 12])
                .into_iter()
                .zip(by_subsets.unwrap());
            for (i, (a, b)) in pairs.enumerate() {
                exact[i] += a / 200.0;
                sampled[i] += b / 200.0;
            }
        }
        assert!((exact[0] - sampled[0]).abs() < 1e-12 && (exact[2] - sampled[2]).abs() < 1e-12);
        // 12800 samples of a value within 0..1: a standard error below 0.0045.
        assert!(
            (exact[1] - sampled[1]).abs() < 0.02,
            "{exact:?} {sampled:?}"
        );
    }

    #[test]
    fn priors_shrink_to_the_mean() {
        let seen = [("a", 1.0), ("a", 1.0), ("b", 0.0), ("c", 0.0)];
        let seen: Vec<(Option<String>, f32)> = seen
            .iter()
            .map(|(answer, label)| (Some(answer.to_string()), *label))
            .collect();
        let prior = AnswerPrior::new(seen.iter().map(|(answer, label)| (answer, *label)));
        assert_eq!(prior.score(&Some("a".into())), 2.5 / 3.0);
        assert_eq!(prior.score(&Some("b".into())), 0.25);
        assert_eq!(prior.score(&Some("new".into())), 0.5);
        assert_eq!(prior.score(&None), 0.5);
    }

    #[test]
    fn auc_counts_pairs() {
        assert_eq!(auc(&[3.0, 1.0, 2.0], &[1.0, 0.0, 0.0]), Some(1.0));
        assert_eq!(auc(&[1.0, 1.0, 2.0], &[1.0, 0.0, 0.0]), Some(0.25));
        assert_eq!(auc(&[1.0, 2.0], &[1.0, 1.0]), None);
        assert_eq!(auc(&[1.0, 2.0, 3.0], &[0.0, 0.5, 1.0]), Some(1.0));
    }
}
