//! Beam search, a strategy that the ranker is held against.
//!
//! At each step every beam offers its most probable continuations; of all, the n with the highest
//! summed log-probability that go on live on, and those that end an answer (among the first n) are
//! set aside with their mean log-probability. It is over when n answers are set aside and no beam's
//! mean is above the worst of them, which is what transformers' `generate(num_beams=n)` does.

use super::generate::Written;
use super::scheduler::Sequence;
use super::stop::StopConditions;
use super::writing::{Features, Writing};
use super::{Engine, EngineError, Event, GenerateRequest, Generated, Observer, Timings};
use crate::backend::sampling::{SampleRow, Sampled, SamplingParams};
use crate::backend::{Backend, Batch, Group};
use crate::model::forward::Depth;
use std::time::Instant;

/// Everything that a beam search holds while it runs, beside all groups of the scheduler.
struct Run<B: Backend> {
    conditions: StopConditions,
    prefix: Sequence,
    beams: Vec<Beam>,
    features: Features<B>,
}

/// An answer on its way.
struct Beam {
    writing: Writing,
    /// Keys and values of its tokens, but for the last, which has not been through the model yet.
    sequence: Sequence,
}

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
    beam: Beam,
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
        let mut run = Run {
            conditions,
            prefix: Sequence::default(),
            beams: Vec::new(),
            features,
        };
        let mut ended = Vec::new();
        let timings = self.beams(request, &mut run, &mut ended, observer);
        // Only the finished answers remain; live beams give their pages back.
        ended.sort_by(|a: &Ended, b: &Ended| b.mean.total_cmp(&a.mean));
        for beam in &mut run.beams {
            beam.sequence.release(self.scheduler.pages_mut());
        }
        run.beams = ended.into_iter().map(|ended| ended.beam).collect();
        let timings = timings.and_then(|timings| self.beam_features(&mut run, timings));
        let sequences = run.beams.iter_mut().map(|beam| &mut beam.sequence);
        for sequence in sequences.chain([&mut run.prefix]) {
            sequence.release(self.scheduler.pages_mut());
        }
        let writing = run.beams.into_iter().map(|beam| beam.writing).collect();
        let written = Written::new(request.clone(), writing, run.features, timings?);
        let mut written = [written];
        self.rank(&mut written)?;
        let [written] = written;
        let mut generated = self.choose(written)?;
        generated.selected = 0;
        Ok(generated)
    }

    /// Prefills the prompt and keeps its feature; gives the row of its last token.
    fn open(
        &mut self,
        prompt: &[u32],
        run: &mut Run<B>,
        observer: &mut Observer,
    ) -> Result<usize, EngineError> {
        let depth = Depth {
            layers: self.config().layers,
            capture: &run.features.layers,
        };
        let mut last_row = 0;
        for chunk in prompt.chunks(B::PROMPT_ROWS) {
            let segment = run.prefix.extend(self.scheduler.pages_mut(), chunk.len())?;
            let group = Group {
                segments: vec![segment],
                ..Group::default()
            };
            let batch = Batch {
                tokens: chunk.to_vec(),
                groups: vec![group],
            };
            self.model.forward(&mut self.state, &batch, depth)?;
            last_row = chunk.len() - 1;
            let event = Event::Prefill {
                done: run.prefix.len(),
                total: prompt.len(),
            };
            if observer(event).is_break() {
                return Err(EngineError::Interrupted);
            }
        }
        run.features
            .keep(&self.model.backend, &self.state, last_row, 0);
        Ok(last_row)
    }

    /// The tokens of some indices of some beams, each behind what its beam has before it.
    fn batch(&mut self, run: &mut Run<B>, wanted: &[(usize, usize)]) -> Result<Batch, EngineError> {
        let mut batch = Batch::default();
        let mut group = Group {
            prefix: run.prefix.page_ids(),
            prefix_len: run.prefix.len(),
            segments: Vec::with_capacity(wanted.len()),
        };
        for &(beam, index) in wanted {
            let Beam { writing, sequence } = &mut run.beams[beam];
            batch.tokens.push(writing.token_ids[index]);
            group.segments.push(match index < sequence.len() {
                true => sequence.again(index),
                false => sequence.extend(self.scheduler.pages_mut(), 1)?,
            });
        }
        batch.groups.push(group);
        Ok(batch)
    }

    fn beams(
        &mut self,
        request: &GenerateRequest,
        run: &mut Run<B>,
        ended: &mut Vec<Ended>,
        observer: &mut Observer,
    ) -> Result<Timings, EngineError> {
        let mut timings = Timings::default();
        let started = Instant::now();
        let last_row = self.open(&request.prompt_token_ids, run, observer)?;
        timings.prefill_s = started.elapsed().as_secs_f64();
        run.beams.push(Beam {
            writing: Writing::new(&run.conditions, self.tokenizer.as_deref()),
            sequence: Sequence::default(),
        });
        let started = Instant::now();
        let mut tokens = 0;
        let mut logits_rows = vec![last_row as u32];
        loop {
            let offers = self.offers(request, run, &logits_rows)?;
            tokens += run.beams.len();
            self.advance(request.n, run, ended, offers)?;
            let step = Event::Step {
                tokens,
                running: run.beams.len(),
            };
            let interrupted = observer(step).is_break();
            if interrupted || run.beams.is_empty() || settled(request.n, run, ended) {
                if ended.is_empty() {
                    let cut_off = run.beams.drain(..);
                    ended.extend(cut_off.map(|beam| Ended {
                        mean: mean(&beam),
                        beam,
                    }));
                }
                break;
            }
            let beams = run.beams.iter().enumerate();
            let last = beams.map(|(beam, b)| (beam, b.writing.token_ids.len() - 1));
            let last: Vec<(usize, usize)> = last.collect();
            let batch = self.batch(run, &last)?;
            // Features come from a pass of their own in the end, for beams change places.
            let depth = Depth {
                layers: self.config().layers,
                capture: &[],
            };
            self.model.forward(&mut self.state, &batch, depth)?;
            logits_rows = (0..last.len() as u32).collect();
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
        // However many end tokens there are, n continuations are left that go on.
        let wanted = request.n * (1 + self.end_token_ids().len().max(1));
        let most = wanted.min(self.model.config.vocab_size);
        let most_probable = SamplingParams {
            temperature: 0.0,
            ..SamplingParams::default()
        };
        let prompt = &request.prompt_token_ids;
        let rows = run.beams.iter().enumerate().map(|(row, beam)| {
            let answer = &beam.writing.token_ids;
            SampleRow {
                row,
                params: &most_probable,
                seed: request.seed,
                candidate: row as u32,
                position: (prompt.len() + answer.len()) as u32,
                prompt,
                answer,
                logit_bias: &[],
                top_logprobs: most,
            }
        });
        let rows: Vec<SampleRow> = rows.collect();
        let logits = self.model.logits(&mut self.state, logits_rows)?;
        let sampled = self.model.backend.sample(logits, &rows)?;
        let mut offers = Vec::new();
        for (beam, sampled) in sampled.into_iter().enumerate() {
            let before = sum(&run.beams[beam]);
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
        let mut before = std::mem::take(&mut run.beams);
        let advanced = self.take_best(n, run, ended, offers, &before);
        for beam in &mut before {
            beam.sequence.release(self.scheduler.pages_mut());
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
        before: &[Beam],
    ) -> Result<(), EngineError> {
        for (rank, offer) in offers.into_iter().enumerate() {
            if run.beams.len() == n {
                break;
            }
            let mut beam = self.fork(&before[offer.beam])?;
            let sampled = Sampled {
                token: offer.token,
                logprob: offer.logprob,
                self_certainty: 0.0,
                top_logprobs: Vec::new(),
            };
            if beam.writing.push(&run.conditions, sampled).is_none() {
                run.beams.push(beam);
                continue;
            }
            // An end token too far down the list is not an answer yet.
            if rank >= n {
                beam.sequence.release(self.scheduler.pages_mut());
                continue;
            }
            let mean = offer.sum / (before[offer.beam].writing.token_ids.len() + 1) as f64;
            ended.push(Ended { beam, mean });
            ended.sort_by(|a, b| b.mean.total_cmp(&a.mean));
            for mut worst in ended.drain(n.min(ended.len())..) {
                worst.beam.sequence.release(self.scheduler.pages_mut());
            }
        }
        Ok(())
    }

    /// A copy of a beam: full pages are shared, a part-full one is copied.
    fn fork(&mut self, beam: &Beam) -> Result<Beam, EngineError> {
        let (mut sequence, copied) = beam.sequence.fork(self.scheduler.pages_mut())?;
        if let Some((from, to)) = copied
            && let Err(error) = self.state.copy_page(&self.model.backend, from, to)
        {
            sequence.release(self.scheduler.pages_mut());
            return Err(error.into());
        }
        Ok(Beam {
            writing: beam.writing.clone(),
            sequence,
        })
    }

    /// The states of all answers' last tokens.
    fn beam_features(
        &mut self,
        run: &mut Run<B>,
        timings: Timings,
    ) -> Result<Timings, EngineError> {
        let started = Instant::now();
        let backend = &self.model.backend;
        let mut missing = Vec::new();
        for (candidate, beam) in run.beams.iter().enumerate() {
            match beam.writing.stop.kept_tokens() {
                0 => run.features.keep_prompt(backend, candidate),
                kept => missing.push((candidate, kept - 1)),
            }
        }
        if let (Some(&highest), false) = (run.features.layers.last(), missing.is_empty()) {
            let batch = self.batch(run, &missing)?;
            let depth = Depth {
                layers: highest,
                capture: &run.features.layers,
            };
            self.model.forward(&mut self.state, &batch, depth)?;
            for (row, &(candidate, _)) in missing.iter().enumerate() {
                let (backend, state) = (&self.model.backend, &self.state);
                run.features.keep(backend, state, row, 1 + candidate);
            }
        }
        Ok(Timings {
            features_s: started.elapsed().as_secs_f64(),
            ..timings
        })
    }
}

/// Summed log-probability of a beam.
fn sum(beam: &Beam) -> f64 {
    beam.writing
        .sampled
        .iter()
        .map(|s| f64::from(s.logprob))
        .sum()
}

/// Mean log-probability of a beam's tokens.
fn mean(beam: &Beam) -> f64 {
    sum(beam) / beam.writing.sampled.len().max(1) as f64
}

/// Whether no beam can be expected to end better than what is set aside.
fn settled<B: Backend>(n: usize, run: &Run<B>, ended: &[Ended]) -> bool {
    let worst = ended
        .iter()
        .map(|ended| ended.mean)
        .fold(f64::INFINITY, f64::min);
    ended.len() >= n && run.beams.iter().all(|beam| mean(beam) <= worst)
}
