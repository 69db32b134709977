//! Ranking on the device: the groups of candidates that end with a step, in one launch of
//! [`gather_rank`](super::gather_rank), whatever rankers they have.

use super::backend::Rows;
use super::device::{Device, DeviceError};
use super::gather_rank::{GatherRank, GatherRankError, Group, NONE, RankerWeights};
use super::step_memory::{Growing, Layout, Packer};
use crate::backend::{Ranked, Ranking};
use crate::ranker::Ranker;
use std::sync::Arc;

/// Rankers whose weights stay on the device; beyond them, the one that was not used for longest goes.
const MAX_RANKERS: usize = 16;

/// Rankers on the device, and memory for their launches.
#[derive(Default)]
pub struct OnDevice {
    launches: Option<GatherRank>,
    /// The latest used last.
    rankers: Vec<(Arc<Ranker>, Arc<RankerWeights>)>,
    sent: Growing<u8>,
    results: Growing<u32>,
    layout: Layout,
}

impl OnDevice {
    fn weights(
        &mut self,
        device: &Arc<dyn Device>,
        ranker: &Arc<Ranker>,
    ) -> Result<Arc<RankerWeights>, DeviceError> {
        let known = |(other, _): &(Arc<Ranker>, _)| Arc::ptr_eq(other, ranker);
        let found = match self.rankers.iter().position(known) {
            Some(place) => self.rankers.remove(place),
            None => {
                let weights = RankerWeights::new(device, ranker)?;
                (Arc::clone(ranker), Arc::new(weights))
            }
        };
        if self.rankers.len() == MAX_RANKERS {
            self.rankers.remove(0);
        }
        let weights = Arc::clone(&found.1);
        self.rankers.push(found);
        Ok(weights)
    }

    /// Scores of each group and its best candidate; `None` where a score is not finite.
    pub fn rank(
        &mut self,
        device: &Arc<dyn Device>,
        groups: &[Ranking<Rows>],
    ) -> Result<Vec<Option<Ranked>>, GatherRankError> {
        // What is sent: of each group its rows and extra inputs. What comes back: scores, then the best.
        let mut packer = Packer::default();
        let mut results = 0;
        let mut sections = Vec::with_capacity(groups.len());
        for group in groups {
            let n = group.extra.len();
            let rows: Vec<u32> = (1..=n as u32).collect();
            let wanted = &group.ranker.config().extra_inputs;
            let of_candidate = |extra: &crate::ranker::ExtraInputs| -> Vec<f32> {
                wanted.iter().map(|&input| extra.get(input)).collect()
            };
            let extra: Vec<f32> = group.extra.iter().flat_map(of_candidate).collect();
            let rows = packer.push(&rows, n, 0);
            sections.push((rows, packer.push(&extra, extra.len(), 0.0), results));
            results += n + 1;
        }
        let (what, len) = ("ranking", packer.bytes().len().max(1));
        let sent = self.sent.at_least(device, &self.layout, len, what)?;
        sent.write(0, packer.bytes())?;
        let base = sent.address();
        let scores = self.results.at_least(device, &self.layout, results, what)?;
        let places: Vec<_> = sections
            .iter()
            .map(|(rows, extra, first)| (rows.at(base), extra.at(base), scores.at(*first)))
            .collect();
        let mut jobs = Vec::with_capacity(groups.len());
        for (group, (rows, extra, scores)) in groups.iter().zip(places) {
            let (features, n) = (group.features.buffer(), group.extra.len());
            let width = group.features.width();
            jobs.push((
                self.weights(device, group.ranker)?,
                Group {
                    candidates: n,
                    residual: features.address(),
                    row_stride: width,
                    rows: rows.address(),
                    prompt: features.address(),
                    extra: extra.address(),
                    scores,
                    best: scores + (n * size_of::<f32>()) as u64,
                },
            ));
        }
        if self.launches.is_none() {
            self.launches = Some(GatherRank::new(device)?);
        }
        // Made above, where there were none.
        let launches = self.launches.as_mut().expect("launches");
        launches.prepare(&jobs)?;
        launches.launch()?;
        let all = self
            .results
            .at_least(device, &self.layout, results, what)?
            .read(0, results)?;
        let ranked = groups.iter().zip(&sections).map(|(group, (_, _, first))| {
            let (scores, best) = all[*first..].split_at(group.extra.len());
            (best[0] != NONE).then(|| Ranked {
                scores: scores.iter().map(|&bits| f32::from_bits(bits)).collect(),
                best: best[0] as usize,
            })
        });
        Ok(ranked.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Cuda;
    use super::super::testing::device;
    use super::*;
    use crate::backend::Backend;
    use crate::ranker::reference::{
        Group, config, exact_scores, golden_rankers, random_group, random_ranker,
    };
    use crate::ranker::{Normalization, RankerConfig, RankerKind};

    /// Features as the engine keeps them: the prompt's row, then the candidates'.
    fn features(cuda: &Cuda, (prompt, candidates, _): &Group) -> Rows {
        let width = prompt.len();
        let mut rows = cuda.rows(1 + candidates.len() / width, width).unwrap();
        let all = [&prompt[..], candidates].concat();
        rows.write(&all).unwrap();
        rows
    }

    #[test]
    fn goldens_of_all_kinds_in_one_launch() {
        let cuda = Cuda::new(device());
        let goldens = golden_rankers();
        let rankers: Vec<Arc<Ranker>> =
            goldens.iter().map(|g| Arc::new(g.ranker.clone())).collect();
        let rows: Vec<Rows> = goldens.iter().map(|g| features(&cuda, &g.group)).collect();
        let groups: Vec<Ranking<Rows>> = goldens
            .iter()
            .zip(&rankers)
            .zip(&rows)
            .map(|((golden, ranker), features)| Ranking {
                ranker,
                features,
                extra: &golden.group.2,
            })
            .collect();
        let ranked = cuda.rank(&groups).unwrap();
        for (golden, ranked) in goldens.iter().zip(ranked) {
            let Ranked { scores, best } = ranked.unwrap();
            let (prompt, candidates, extra) = &golden.group;
            let exact = exact_scores(&golden.ranker, prompt, candidates, extra);
            assert_eq!(scores.len(), golden.scores.len());
            for ((score, expected), (_, magnitude)) in scores.iter().zip(&golden.scores).zip(exact)
            {
                // As in gather_rank's own tests: products of two bfloat16 each.
                let error = f64::from(score - expected).abs();
                assert!(
                    error <= 2e-5 * magnitude,
                    "{}: {score}, PyTorch {expected}",
                    golden.name
                );
            }
            let on_cpu = golden.ranker.score(prompt, candidates, extra).unwrap();
            let highest = on_cpu.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(on_cpu[best], highest, "{}: the same choice", golden.name);
        }
    }

    /// More rankers than stay on the device, again and again.
    #[test]
    fn rankers_come_and_go() {
        let cuda = Cuda::new(device());
        let group = random_group(24, 5, 1);
        let rows = features(&cuda, &group);
        let rankers: Vec<Arc<Ranker>> = (0..MAX_RANKERS as u64 + 3)
            .map(|seed| Arc::new(random_ranker(config(RankerKind::Linear, 24), seed)))
            .collect();
        for _ in 0..2 {
            for ranker in &rankers {
                let ranking = Ranking {
                    ranker,
                    features: &rows,
                    extra: &group.2,
                };
                let ranked = cuda.rank(&[ranking]).unwrap().remove(0).unwrap();
                let expected = ranker.score(&group.0, &group.1, &group.2).unwrap();
                for (got, expected) in ranked.scores.iter().zip(&expected) {
                    assert!((got - expected).abs() < 1e-3, "{got}, {expected}");
                }
            }
        }
    }

    #[test]
    fn the_host_says_whose_score_is_not_finite() {
        let cuda = Cuda::new(device());
        let options = RankerConfig {
            normalization: Normalization::Rms,
            ..config(RankerKind::Pointwise, 24)
        };
        let ranker = Arc::new(random_ranker(options, 1));
        let (good, mut bad) = (random_group(24, 6, 1), random_group(24, 6, 2));
        bad.1[3 * 24 + 5] = f32::NAN;
        let rows = [&good, &bad].map(|group| features(&cuda, group));
        let groups = [&good, &bad];
        let rankings = groups.iter().zip(&rows);
        let rankings = rankings.map(|(group, features)| Ranking {
            ranker: &ranker,
            features,
            extra: &group.2,
        });
        let ranked = cuda.rank(&rankings.collect::<Vec<_>>()).unwrap();
        let expected = ranker.score(&bad.0, &bad.1, &bad.2).unwrap_err();
        assert!(ranked[0].is_ok());
        assert_eq!(
            ranked[1].as_ref().unwrap_err().to_string(),
            expected.to_string()
        );
    }
}
