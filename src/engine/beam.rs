//! Beam search, a strategy that the ranker is held against.
//!
//! At each step every beam offers its most probable continuations; of all, the n with the highest
//! summed log-probability that go on live on, and those that end an answer (among the first n) are
//! set aside with their mean log-probability. It is over when n answers are set aside and no beam's
//! mean is above the worst of them, which is what transformers' `generate(num_beams=n)` does.

use super::generate::{Run, Writing};
use super::scheduler::Sequence;
use super::stop::StopConditions;
use super::{Engine, EngineError, Event, GenerateRequest, Generated, Observer, Timings};
use crate::backend::Backend;
use crate::backend::sampling::{Sampled, SamplingParams};
use crate::model::forward::Depth;
use std::time::Instant;

/// A continuation of one of the beams.
struct Offer {
    beam: usize,
    token: u32,
    logprob: f32,
    /// Of the beam and this token.
    sum: f64,
}

/// An answer that is set aside.
struct Ended {
    writing: Writing,
    /// Mean log-probability, the end token counted.
    mean: f64,
}

impl<B: Backend> Engine<B> {
    /// The `request.n` best answers that beam search finds, best first.
    pub(super) fn beam_search(
        &mut self,
        request: &GenerateRequest,
        conditions: StopConditions,
        observer: &mut Observer,
    ) -> Result<Generated, EngineError> {
        let features = self.features(request, request.n)?;
        let sampling = SamplingParams {
            temperature: 0.0,
            ..SamplingParams::default()
        };
        let prefix = Sequence::default();
        let mut run = Run {
            writing: Vec::new(),
            features,
            prefix,
            conditions,
            sampling,
        };
        let mut ended = Vec::new();
        let timings = self.beams(request, &mut run, &mut ended, observer);
        // Only the finished answers remain; live beams gave their pages back.
        ended.sort_by(|a: &Ended, b: &Ended| b.mean.total_cmp(&a.mean));
        for beam in &mut run.writing {
            beam.sequence.release(&mut self.pages);
        }
        run.writing = ended.into_iter().map(|ended| ended.writing).collect();
        let timings = timings.and_then(|timings| self.beam_features(&mut run, timings));
        self.release(&mut run);
        let mut generated = self.choose(request, run, timings?)?;
        generated.selected = 0;
        Ok(generated)
    }

    fn beams(
        &mut self,
        request: &GenerateRequest,
        run: &mut Run<B>,
        ended: &mut Vec<Ended>,
        observer: &mut Observer,
    ) -> Result<Timings, EngineError> {
        let mut timings = Timings::default();
        let last_row = self.open(request, run, observer, &mut timings)?;
        run.writing.push(self.blank(&run.conditions));
        let prefix_pages = run.prefix.page_ids();
        let started = Instant::now();
        let mut tokens = 0;
        let mut logits_rows = vec![last_row];
        loop {
            let offers = self.offers(request, run, &logits_rows)?;
            tokens += run.writing.len();
            self.advance(request.n, run, ended, offers)?;
            let step = Event::Step {
                tokens,
                running: run.writing.len(),
            };
            let interrupted = observer(step).is_break();
            if interrupted || run.writing.is_empty() || settled(request.n, run, ended) {
                if ended.is_empty() {
                    let cut_off = run.writing.drain(..);
                    ended.extend(cut_off.map(|writing| Ended {
                        mean: mean(&writing),
                        writing,
                    }));
                }
                break;
            }
            let beams: Vec<usize> = (0..run.writing.len()).collect();
            let batch = self.next_batch(run, &beams, &prefix_pages)?;
            // Features come from a pass of their own in the end, for beams change places.
            let depth = Depth {
                layers: self.config().layers,
                capture: &[],
            };
            self.model.forward(&mut self.state, &batch, depth)?;
            logits_rows = (0..beams.len() as u32).collect();
        }
        timings.decode_s = started.elapsed().as_secs_f64();
        timings.decode_tokens_per_s = tokens as f64 / timings.decode_s.max(1e-9);
        Ok(timings)
    }

    /// The most probable continuations of all beams, best first.
    fn offers(
        &mut self,
        request: &GenerateRequest,
        run: &Run<B>,
        logits_rows: &[u32],
    ) -> Result<Vec<Offer>, EngineError> {
        let beams: Vec<usize> = (0..run.writing.len()).collect();
        // However many end tokens there are, n continuations are left that go on.
        let wanted = request.n * (1 + self.end_token_ids().len().max(1));
        let most = wanted.min(self.model.config.vocab_size);
        let sampled = self.draw(request, run, &beams, &beams, logits_rows, most)?;
        let mut offers = Vec::new();
        for (beam, sampled) in sampled.into_iter().enumerate() {
            let before = sum(&run.writing[beam]);
            for (token, logprob) in sampled.top_logprobs {
                offers.push(Offer {
                    beam,
                    token,
                    logprob,
                    sum: before + f64::from(logprob),
                });
            }
        }
        // Stable: among equals the earlier beam, the more probable token.
        offers.sort_by(|a, b| b.sum.total_cmp(&a.sum));
        offers.truncate(wanted);
        Ok(offers)
    }

    /// Replaces the beams by their best continuations; sets finished ones aside.
    fn advance(
        &mut self,
        n: usize,
        run: &mut Run<B>,
        ended: &mut Vec<Ended>,
        offers: Vec<Offer>,
    ) -> Result<(), EngineError> {
        let mut before = std::mem::take(&mut run.writing);
        let advanced = self.take_best(n, run, ended, offers, &before);
        for beam in &mut before {
            beam.sequence.release(&mut self.pages);
        }
        advanced
    }

    /// [`advance`](Self::advance) from the beams `before`, which stay the caller's.
    fn take_best(
        &mut self,
        n: usize,
        run: &mut Run<B>,
        ended: &mut Vec<Ended>,
        offers: Vec<Offer>,
        before: &[Writing],
    ) -> Result<(), EngineError> {
        for (rank, offer) in offers.into_iter().enumerate() {
            if run.writing.len() == n {
                break;
            }
            let mut beam = self.fork(&before[offer.beam])?;
            let sampled = Sampled {
                token: offer.token,
                logprob: offer.logprob,
                self_certainty: 0.0,
                top_logprobs: Vec::new(),
            };
            if beam.push(&run.conditions, sampled).is_none() {
                run.writing.push(beam);
                continue;
            }
            // An end token too far down the list is not an answer yet.
            if rank >= n {
                beam.sequence.release(&mut self.pages);
                continue;
            }
            let mean = offer.sum / (before[offer.beam].token_ids.len() + 1) as f64;
            ended.push(Ended {
                writing: beam,
                mean,
            });
            ended.sort_by(|a, b| b.mean.total_cmp(&a.mean));
            for mut worst in ended.drain(n.min(ended.len())..) {
                worst.writing.sequence.release(&mut self.pages);
            }
        }
        Ok(())
    }

    /// A copy of a beam: full pages are shared, a part-full one is copied.
    fn fork(&mut self, beam: &Writing) -> Result<Writing, EngineError> {
        let (mut sequence, copied) = beam.sequence.fork(&mut self.pages)?;
        if let Some((from, to)) = copied
            && let Err(error) = self.state.copy_page(&self.model.backend, from, to)
        {
            sequence.release(&mut self.pages);
            return Err(error.into());
        }
        Ok(Writing {
            sequence,
            stop: beam.stop.clone(),
            detokenizer: beam.detokenizer.clone(),
            token_ids: beam.token_ids.clone(),
            sampled: beam.sampled.clone(),
        })
    }

    /// The states of all answers' last tokens.
    fn beam_features(
        &mut self,
        run: &mut Run<B>,
        timings: Timings,
    ) -> Result<Timings, EngineError> {
        let started = Instant::now();
        for (candidate, beam) in run.writing.iter().enumerate() {
            match beam.stop.kept_tokens() {
                0 => self.keep_prompt(&mut run.features, candidate),
                kept => run.features.missing.push((candidate, kept - 1)),
            }
        }
        let prefix_pages = run.prefix.page_ids();
        self.fetch_missing(run, &prefix_pages)?;
        Ok(Timings {
            features_s: started.elapsed().as_secs_f64(),
            ..timings
        })
    }
}

/// Summed log-probability of a beam.
fn sum(beam: &Writing) -> f64 {
    beam.sampled.iter().map(|s| f64::from(s.logprob)).sum()
}

/// Mean log-probability of a beam's tokens.
fn mean(beam: &Writing) -> f64 {
    sum(beam) / beam.sampled.len().max(1) as f64
}

/// Whether no beam can be expected to end better than what is set aside.
fn settled<B: Backend>(n: usize, run: &Run<B>, ended: &[Ended]) -> bool {
    let worst = ended
        .iter()
        .map(|ended| ended.mean)
        .fold(f64::INFINITY, f64::min);
    ended.len() >= n && run.writing.iter().all(|beam| mean(beam) <= worst)
}
