//! N candidates for one prompt, as one batch, and the choice among them.

use super::scheduler::Sequence;
use super::select::{CandidateFacts, Strategy, select};
use super::stop::{FinishReason, StopConditions, StopState};
use super::{
    Candidate, Engine, EngineError, Event, GenerateRequest, Generated, MAX_CANDIDATES, Observer,
    Timings,
};
use crate::backend::sampling::{SampleRow, Sampled, SamplingParams};
use crate::backend::{Backend, Batch, Group, PageId};
use crate::model::forward::Depth;
use crate::model::text::Detokenizer;
use crate::ranker::ExtraInputs;
use std::ops::ControlFlow;
use std::time::Instant;

/// A candidate that is being written.
pub(super) struct Writing {
    /// Keys and values of its tokens, but for the last, which has not been through the model yet.
    pub sequence: Sequence,
    pub stop: StopState,
    pub detokenizer: Option<Detokenizer>,
    pub token_ids: Vec<u32>,
    pub sampled: Vec<Sampled>,
}

/// Features of a group, kept on the device while its candidates end one by one.
pub(super) struct Features<B: Backend> {
    pub layers: Vec<usize>,
    /// For each layer `[1 + n, hidden_size]`: the prompt's, then the candidates'.
    pub rows: Vec<B::Rows>,
    /// Candidates whose last token's state is not at hand, and which of their tokens that is.
    pub missing: Vec<(usize, usize)>,
}

/// Everything that a request holds while it runs.
pub(super) struct Run<B: Backend> {
    pub conditions: StopConditions,
    pub sampling: SamplingParams,
    pub prefix: Sequence,
    pub writing: Vec<Writing>,
    pub features: Features<B>,
}

impl<B: Backend> Engine<B> {
    /// Writes candidates for a prompt and chooses one of them. `observer` hears of every step.
    ///
    /// # Errors
    /// What is wrong with the request, before anything is computed; what the device failed with; or
    /// [`EngineError::Interrupted`], where the observer broke off before the first token.
    ///
    /// # Examples
    /// ```no_run
    /// use podium::backend::cpu::{Cpu, simd::Isa};
    /// use podium::engine::select::Strategy;
    /// use podium::engine::{Engine, Event, GenerateRequest};
    /// use podium::model::text::Tokenizer;
    /// use podium::model::{files::ModelFiles, forward::Model};
    /// use podium::ranker::Ranker;
    /// use std::{ops::ControlFlow, path::Path, sync::Arc};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let files = ModelFiles::open(Path::new("SmolLM2-135M-Instruct.Q4_1.gguf"))?;
    /// let tokenizer = Arc::new(Tokenizer::from_source(files.text_source())?);
    /// let model = Model::load(Cpu::new(2, Isa::best())?, &files, &mut |_| {})?;
    /// let mut engine = Engine::new(model, tokenizer.clone())?;
    ///
    /// let mut request = GenerateRequest::new(tokenizer.encode("Once upon a time", true)?);
    /// request.n = 8;
    /// request.strategy = Strategy::Ranker;
    /// request.ranker = Some(Arc::new(Ranker::load(Path::new("stories.ranker"))?));
    /// let generated = engine.generate(&request, &mut |event| {
    ///     if let Event::Finished { candidate, reason } = event {
    ///         println!("candidate {candidate} ended: {reason}");
    ///     }
    ///     ControlFlow::Continue(())
    /// })?;
    /// println!("{}", generated.candidates[generated.selected].text);
    /// # Ok(())
    /// # }
    /// ```
    pub fn generate(
        &mut self,
        request: &GenerateRequest,
        observer: &mut Observer,
    ) -> Result<Generated, EngineError> {
        let conditions = self.check(request)?;
        if request.strategy == Strategy::Beam {
            return self.beam_search(request, conditions, observer);
        }
        let greedy = request.strategy == Strategy::Greedy;
        let n = if greedy { 1 } else { request.n };
        let mut sampling = request.sampling.clone();
        if greedy {
            sampling.temperature = 0.0;
        }
        let writing = (0..n).map(|_| self.blank(&conditions)).collect();
        let features = self.features(request, n)?;
        let mut run = Run {
            writing,
            features,
            prefix: Sequence::default(),
            conditions,
            sampling,
        };
        let timings = self.write(request, &mut run, observer);
        self.release(&mut run);
        self.choose(request, run, timings?)
    }

    /// A candidate without tokens.
    pub(super) fn blank(&self, conditions: &StopConditions) -> Writing {
        Writing {
            sequence: Sequence::default(),
            stop: StopState::new(conditions),
            detokenizer: self
                .tokenizer
                .as_ref()
                .map(|tokenizer| tokenizer.detokenizer(true)),
            token_ids: Vec::new(),
            sampled: Vec::new(),
        }
    }

    /// Gives back the pages that a request holds.
    pub(super) fn release(&mut self, run: &mut Run<B>) {
        for sequence in run
            .writing
            .iter_mut()
            .map(|w| &mut w.sequence)
            .chain([&mut run.prefix])
        {
            sequence.release(&mut self.pages);
        }
    }

    /// Refuses what cannot be done, before anything is computed.
    fn check(&self, request: &GenerateRequest) -> Result<StopConditions, EngineError> {
        self.check_prompt(&request.prompt_token_ids)?;
        self.check_layers(&request.feature_layers)?;
        if !(1..=MAX_CANDIDATES).contains(&request.n) {
            return Err(EngineError::Candidates {
                n: request.n,
                most: MAX_CANDIDATES,
            });
        }
        if request.max_tokens == 0 {
            return Err(EngineError::NoTokens);
        }
        request.sampling.validate()?;
        match &request.ranker {
            Some(ranker) => self.check_ranker(ranker)?,
            None if request.strategy == Strategy::Ranker => return Err(EngineError::NoRanker),
            None => {}
        }
        let (tokens, context) = (
            request.prompt_token_ids.len(),
            self.config().max_position_embeddings,
        );
        if tokens >= context {
            return Err(EngineError::PromptTooLong { tokens, context });
        }
        let end_tokens = self.end_token_ids();
        Ok(StopConditions::new(
            &end_tokens,
            &request.stop,
            request.max_tokens,
            context - tokens,
        )?)
    }

    /// Tokens that end an answer: the configuration's and the tokenizer's.
    pub fn end_token_ids(&self) -> Vec<u32> {
        let mut tokens = self.config().eos_token_ids.clone();
        tokens.extend(
            self.tokenizer
                .iter()
                .flat_map(|tokenizer| tokenizer.eos_token_ids()),
        );
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    pub(super) fn features(
        &self,
        request: &GenerateRequest,
        n: usize,
    ) -> Result<Features<B>, EngineError> {
        let mut layers = request.feature_layers.clone();
        layers.extend(request.ranker.as_ref().map(|ranker| ranker.config().layer));
        layers.sort_unstable();
        layers.dedup();
        let hidden_size = self.config().hidden_size;
        let rows = layers
            .iter()
            .map(|_| self.model.backend.rows(1 + n, hidden_size));
        Ok(Features {
            rows: rows.collect::<Result<_, _>>()?,
            layers,
            missing: Vec::new(),
        })
    }

    /// Prefill, decode until the last candidate has ended, then the features that are missing.
    fn write(
        &mut self,
        request: &GenerateRequest,
        run: &mut Run<B>,
        observer: &mut Observer,
    ) -> Result<Timings, EngineError> {
        let mut timings = Timings::default();
        let last_row = self.open(request, run, observer, &mut timings)?;
        let layers = run.features.layers.clone();
        let depth = Depth {
            layers: self.config().layers,
            capture: &layers,
        };

        let started = Instant::now();
        let mut tokens = 0;
        let mut running: Vec<usize> = (0..run.writing.len()).collect();
        let prefix_pages = run.prefix.page_ids();
        // Every candidate's first token comes from the prompt's last row.
        let mut logits_rows = vec![last_row];
        let mut row_of = vec![0; running.len()];
        while !running.is_empty() {
            let top = request.top_logprobs;
            let sampled = self.draw(request, run, &running, &row_of, &logits_rows, top)?;
            let mut interrupted = false;
            let mut still = Vec::with_capacity(running.len());
            for ((&candidate, &row), sampled) in running.iter().zip(&row_of).zip(sampled) {
                tokens += 1;
                let (reason, flow) = run.accept(candidate, sampled, observer);
                interrupted |= flow.is_break();
                match reason {
                    None => still.push(candidate),
                    Some(_) => self.finish(run, candidate, row),
                }
            }
            running = still;
            let step = Event::Step {
                tokens,
                running: running.len(),
            };
            if observer(step).is_break() || interrupted {
                break;
            }
            if running.is_empty() {
                break;
            }
            let batch = self.next_batch(run, &running, &prefix_pages)?;
            self.model.forward(&mut self.state, &batch, depth)?;
            row_of = (0..running.len()).collect();
            logits_rows = (0..running.len() as u32).collect();
        }
        // Cut off by the observer: their features are those of the text so far.
        for candidate in running {
            let last = run.writing[candidate].token_ids.len();
            run.features.missing.push((candidate, last - 1));
        }
        timings.decode_s = started.elapsed().as_secs_f64();
        timings.decode_tokens_per_s = tokens as f64 / timings.decode_s.max(1e-9);

        let started = Instant::now();
        self.fetch_missing(run, &prefix_pages)?;
        timings.features_s = started.elapsed().as_secs_f64();
        Ok(timings)
    }

    /// Prefills the prompt and keeps its feature; gives the row of its last token.
    pub(super) fn open(
        &mut self,
        request: &GenerateRequest,
        run: &mut Run<B>,
        observer: &mut Observer,
        timings: &mut Timings,
    ) -> Result<u32, EngineError> {
        let depth = Depth {
            layers: self.config().layers,
            capture: &run.features.layers,
        };
        let started = Instant::now();
        let prompt = &request.prompt_token_ids;
        let last_row = self.prefill(prompt, depth, &mut run.prefix, observer)?;
        timings.prefill_s = started.elapsed().as_secs_f64();
        self.keep(&mut run.features, last_row as usize, 0);
        Ok(last_row)
    }

    /// One token for each running candidate, with the `top_logprobs` most probable ones.
    pub(super) fn draw(
        &mut self,
        request: &GenerateRequest,
        run: &Run<B>,
        running: &[usize],
        row_of: &[usize],
        logits_rows: &[u32],
        top_logprobs: usize,
    ) -> Result<Vec<Sampled>, EngineError> {
        let prompt = &request.prompt_token_ids;
        let rows = running.iter().zip(row_of).map(|(&candidate, &row)| {
            let answer = &run.writing[candidate].token_ids;
            SampleRow {
                row,
                params: &run.sampling,
                seed: request.seed,
                candidate: candidate as u32,
                position: (prompt.len() + answer.len()) as u32,
                prompt,
                answer,
                logit_bias: &[],
                top_logprobs,
            }
        });
        let rows: Vec<SampleRow> = rows.collect();
        let logits = self.model.logits(&mut self.state, logits_rows)?;
        Ok(self.model.backend.sample(logits, &rows)?)
    }

    /// The last token of each running candidate, behind the shared prompt.
    pub(super) fn next_batch(
        &mut self,
        run: &mut Run<B>,
        running: &[usize],
        prefix_pages: &[PageId],
    ) -> Result<Batch, EngineError> {
        let mut batch = Batch::default();
        let mut group = Group {
            prefix: prefix_pages.to_vec(),
            prefix_len: run.prefix.len(),
            segments: Vec::with_capacity(running.len()),
        };
        for &candidate in running {
            let writing = &mut run.writing[candidate];
            batch.tokens.extend(writing.token_ids.last());
            group
                .segments
                .push(writing.sequence.extend(&mut self.pages, 1)?);
        }
        batch.groups.push(group);
        Ok(batch)
    }

    /// Keeps a finished candidate's feature if it is at hand in `row` of this step, else notes which
    /// token it is of.
    fn finish(&mut self, run: &mut Run<B>, candidate: usize, row: usize) {
        let writing = &mut run.writing[candidate];
        let kept = writing.stop.kept_tokens();
        if run.features.layers.is_empty() {
            return writing.sequence.release(&mut self.pages);
        }
        if kept == 0 {
            self.keep_prompt(&mut run.features, candidate);
        } else if kept == writing.sequence.len() {
            self.keep(&mut run.features, row, 1 + candidate);
        } else {
            return run.features.missing.push((candidate, kept - 1));
        }
        run.writing[candidate].sequence.release(&mut self.pages);
    }

    /// Copies a row of the last batch's captured states into the group's features.
    pub(super) fn keep(&self, features: &mut Features<B>, row: usize, place: usize) {
        for (layer, rows) in features.layers.iter().zip(&mut features.rows) {
            self.model
                .backend
                .copy_rows(self.state.captured(*layer), &[(row, place)], rows);
        }
    }

    /// An empty answer ends where the prompt does.
    pub(super) fn keep_prompt(&self, features: &mut Features<B>, candidate: usize) {
        for rows in &mut features.rows {
            self.model.backend.copy_row_within(rows, 0, 1 + candidate);
        }
    }

    /// The states of last tokens that never went through the model, or did so some steps ago: one
    /// batch through the lower layers.
    pub(super) fn fetch_missing(
        &mut self,
        run: &mut Run<B>,
        prefix_pages: &[PageId],
    ) -> Result<(), EngineError> {
        let missing = std::mem::take(&mut run.features.missing);
        let Some(&highest) = run.features.layers.last().filter(|_| !missing.is_empty()) else {
            return Ok(());
        };
        let mut batch = Batch::default();
        let mut group = Group {
            prefix: prefix_pages.to_vec(),
            prefix_len: run.prefix.len(),
            segments: Vec::with_capacity(missing.len()),
        };
        for &(candidate, index) in &missing {
            let Writing {
                sequence,
                token_ids,
                ..
            } = &mut run.writing[candidate];
            batch.tokens.push(token_ids[index]);
            group.segments.push(match index < sequence.len() {
                true => sequence.again(index),
                false => sequence.extend(&mut self.pages, 1)?,
            });
        }
        batch.groups.push(group);
        let depth = Depth {
            layers: highest,
            capture: &run.features.layers,
        };
        self.model.forward(&mut self.state, &batch, depth)?;
        for (row, &(candidate, _)) in missing.iter().enumerate() {
            self.keep(&mut run.features, row, 1 + candidate);
        }
        Ok(())
    }

    /// Ranks, selects, and puts everything into words.
    pub(super) fn choose(
        &self,
        request: &GenerateRequest,
        run: Run<B>,
        mut timings: Timings,
    ) -> Result<Generated, EngineError> {
        let Features { layers, rows, .. } = &run.features;
        let mut candidates: Vec<Candidate> =
            run.writing.into_iter().enumerate().map(finished).collect();
        let at = |layer: usize| layers.iter().position(|l| *l == layer);
        let read = |layer: usize, row: usize| match at(layer) {
            Some(at) => self.model.backend.read_row(&rows[at], row),
            None => Ok(Vec::new()),
        };
        let of_row = |row: usize| -> Result<Vec<Vec<f32>>, EngineError> {
            Ok(request
                .feature_layers
                .iter()
                .map(|&layer| read(layer, row))
                .collect::<Result<_, _>>()?)
        };
        for candidate in &mut candidates {
            candidate.features = of_row(1 + candidate.index)?;
        }
        if let Some(ranker) = &request.ranker {
            let started = Instant::now();
            let layer = ranker.config().layer;
            let mut features = Vec::with_capacity(candidates.len() * self.config().hidden_size);
            for candidate in &candidates {
                features.extend(read(layer, 1 + candidate.index)?);
            }
            let extra: Vec<ExtraInputs> = candidates.iter().map(extra_inputs).collect();
            let scores = ranker.score(&read(layer, 0)?, &features, &extra)?;
            for (candidate, score) in candidates.iter_mut().zip(scores) {
                candidate.score = Some(score);
            }
            timings.rank_s = started.elapsed().as_secs_f64();
        }
        let facts: Vec<CandidateFacts> = candidates.iter().map(facts).collect();
        let selected = select(request.strategy, &facts)?;
        Ok(Generated {
            selected,
            prompt_features: of_row(0)?,
            candidates,
            timings,
        })
    }
}

impl<B: Backend> Run<B> {
    /// Takes a drawn token; says whether it was the candidate's last, and whether to go on at all.
    fn accept(
        &mut self,
        candidate: usize,
        sampled: Sampled,
        observer: &mut Observer,
    ) -> (Option<FinishReason>, ControlFlow<()>) {
        let writing = &mut self.writing[candidate];
        let (token, logprob) = (sampled.token, sampled.logprob);
        let reason = writing.push(&self.conditions, sampled);
        let mut flow = ControlFlow::Continue(());
        if reason != Some(FinishReason::Stop) {
            flow = observer(Event::Token {
                candidate,
                token,
                logprob,
            });
        }
        let piece = writing.stop.stream();
        if !piece.is_empty() && flow.is_continue() {
            flow = observer(Event::Text { candidate, piece });
        }
        if let (Some(reason), true) = (reason, flow.is_continue()) {
            flow = observer(Event::Finished { candidate, reason });
        }
        (reason, flow)
    }
}

impl Writing {
    /// Takes the next token; says why it was the last, if it was.
    pub fn push(&mut self, conditions: &StopConditions, sampled: Sampled) -> Option<FinishReason> {
        let piece = self
            .detokenizer
            .as_mut()
            .map_or("", |d| d.push(sampled.token));
        let reason = self.stop.push(conditions, sampled.token, piece);
        if reason != Some(FinishReason::Stop) {
            self.token_ids.push(sampled.token);
            self.sampled.push(sampled);
        }
        reason?;
        let rest = self.detokenizer.as_mut().map_or("", |d| d.finish());
        let reason = self.stop.close(conditions, rest);
        self.token_ids.truncate(self.stop.kept_tokens());
        self.sampled.truncate(self.stop.kept_tokens());
        reason
    }
}

fn finished((index, writing): (usize, Writing)) -> Candidate {
    let tokens = writing.sampled.len().max(1) as f64;
    let certainty: f64 = writing
        .sampled
        .iter()
        .map(|s| f64::from(s.self_certainty))
        .sum();
    Candidate {
        index,
        text: writing.stop.text().to_string(),
        token_ids: writing.token_ids,
        finish_reason: writing.stop.finish_reason(),
        token_logprobs: writing.sampled.iter().map(|s| s.logprob).collect(),
        self_certainty: certainty / tokens,
        top_logprobs: writing
            .sampled
            .into_iter()
            .map(|s| s.top_logprobs)
            .collect(),
        score: None,
        features: Vec::new(),
    }
}

/// What decoding knows of a candidate beside its feature.
fn extra_inputs(candidate: &Candidate) -> ExtraInputs {
    ExtraInputs {
        mean_logprob: candidate.mean_logprob() as f32,
        length: candidate.token_ids.len() as f32,
    }
}

fn facts(candidate: &Candidate) -> CandidateFacts<'_> {
    CandidateFacts {
        text: &candidate.text,
        cumulative_logprob: candidate.cumulative_logprob(),
        tokens: candidate.token_ids.len(),
        self_certainty: candidate.self_certainty,
        score: candidate.score,
    }
}
