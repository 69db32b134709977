//! N candidates for one prompt, and the choice among them.

use super::scheduler::{GroupId, GroupShape};
use super::select::{Strategy, select};
use super::step::Job;
use super::stop::{FinishReason, StopConditions};
use super::writing::{Features, Writing, extra_inputs, facts};
use super::{
    Candidate, Completion, Engine, EngineError, Event, GenerateRequest, Generated, MAX_CANDIDATES,
    Observer, Timings, TokenLogprob,
};
use crate::backend::sampling::{SampleRow, Sampled, SamplingParams};
use crate::backend::{Backend, BackendError, Ranked, Ranking};
use crate::ranker::{ExtraInputs, RankerError};
use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::time::Instant;

/// Rows of logits that are kept at a time: 64 of a vocabulary of 150k are 38 MB.
const LOGITS_CHUNK: usize = 64;

/// A request for candidates, and what there is of them.
pub(super) struct WriteJob<B: Backend> {
    pub request: GenerateRequest,
    conditions: StopConditions,
    sampling: SamplingParams,
    pub writing: Vec<Writing>,
    pub features: Features<B>,
    prompt_logprobs: Vec<TokenLogprob>,
    /// Of the first admission.
    cached_tokens: Option<usize>,
    /// Tokens drawn for all candidates, end tokens included.
    tokens: usize,
    running: usize,
    clock: Clock,
}

/// When what began.
#[derive(Default)]
struct Clock {
    admitted: Option<Instant>,
    prefilled: Option<Instant>,
    /// The last candidate's end.
    written: Option<Instant>,
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
        if request.strategy == Strategy::Beam {
            let conditions = self.check(request)?;
            return self.beam_search(request, conditions, observer);
        }
        let group = self.submit(request.clone())?;
        match self.complete(group, observer)? {
            Completion::Generated(generated) => Ok(*generated),
            Completion::Scored(_) => unreachable!("the group was submitted to be written"),
        }
    }

    /// Steps until a group has ended. Others that were submitted go on meanwhile; their events go
    /// unheard, and the next [`step`](Self::step) gives those that ended.
    pub(super) fn complete(
        &mut self,
        group: GroupId,
        observer: &mut Observer,
    ) -> Result<Completion, EngineError> {
        let mut others = Vec::new();
        loop {
            let completed = self.step(&mut |id, event| match id == group {
                true => observer(event),
                false => ControlFlow::Continue(()),
            });
            let mut result = None;
            for completed in completed {
                match completed.group == group {
                    true => result = Some(completed.result),
                    false => others.push(completed),
                }
            }
            if let Some(result) = result {
                self.completed = others;
                return result;
            }
        }
    }

    /// Puts a request in the queue, to be written by [`step`](Self::step).
    ///
    /// # Errors
    /// What is wrong with the request: also [`Strategy::Beam`], which does not run beside others, and
    /// more tokens than the KV cache has room for.
    pub fn submit(&mut self, request: GenerateRequest) -> Result<GroupId, EngineError> {
        let conditions = self.check(&request)?;
        let greedy = match request.strategy {
            Strategy::Beam => return Err(EngineError::BeamAlone),
            strategy => strategy == Strategy::Greedy,
        };
        let n = if greedy { 1 } else { request.n };
        let mut sampling = request.sampling.clone();
        if greedy {
            sampling.temperature = 0.0;
        }
        let prompt_len = request.prompt_token_ids.len();
        let room = self.config().max_position_embeddings - prompt_len;
        let shape = GroupShape {
            // The rows of tokens that are not computed have no logits.
            reads_shared_prompts: request.prompt_logprobs.is_none(),
            ..GroupShape::write(n, request.max_tokens.min(room))
        };
        self.check_pages(&shape, prompt_len)?;
        let features = self.features(&request, n)?;
        let blank = Writing::new(&conditions, self.tokenizer.as_deref());
        let group = self.next_group;
        self.scheduler
            .submit(group, request.prompt_token_ids[..].into(), shape)?;
        self.next_group += 1;
        let job = WriteJob {
            writing: vec![blank; n],
            prompt_logprobs: Vec::new(),
            cached_tokens: None,
            tokens: 0,
            running: n,
            clock: Clock::default(),
            request,
            conditions,
            sampling,
            features,
        };
        self.jobs.insert(group, Job::Write(Box::new(job)));
        Ok(group)
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
        let mut end_tokens = request.stop_token_ids.clone();
        if !request.ignore_end {
            end_tokens.extend(self.end_token_ids());
        }
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
        })
    }

    /// The log-probabilities of the tokens behind those of a chunk of the prompt.
    pub(super) fn prompt_logprobs(
        &mut self,
        job: &mut WriteJob<B>,
        chunk: Range<usize>,
        first_row: usize,
    ) -> Result<(), BackendError> {
        let Some(top_logprobs) = job.request.prompt_logprobs else {
            return Ok(());
        };
        let prompt = &job.request.prompt_token_ids;
        // After a preemption, what is there already is left out.
        let from = chunk.start.max(job.prompt_logprobs.len());
        let indices: Vec<usize> = (from..chunk.end.min(prompt.len() - 1)).collect();
        let most_probable = SamplingParams {
            temperature: 0.0,
            ..SamplingParams::default()
        };
        for indices in indices.chunks(LOGITS_CHUNK) {
            let rows = indices.iter().map(|i| (first_row + i - chunk.start) as u32);
            let rows: Vec<u32> = rows.collect();
            let targets: Vec<u32> = indices.iter().map(|i| prompt[i + 1]).collect();
            let logits = self.model.logits(&mut self.state, &rows)?;
            let logprobs = self.model.backend.token_logprobs(logits, &targets)?;
            let mut top = vec![Vec::new(); rows.len()];
            if top_logprobs > 0 {
                let rows = (0..rows.len()).map(|row| SampleRow {
                    row,
                    params: &most_probable,
                    seed: 0,
                    candidate: 0,
                    position: 0,
                    prompt: &[],
                    answer: &[],
                    logit_bias: &[],
                    top_logprobs,
                });
                let sampled = self
                    .model
                    .backend
                    .sample(logits, &rows.collect::<Vec<_>>())?;
                top = sampled.into_iter().map(|s| s.top_logprobs).collect();
            }
            let both = logprobs.into_iter().zip(top);
            job.prompt_logprobs
                .extend(both.map(|(logprob, top)| TokenLogprob { logprob, top }));
        }
        Ok(())
    }

    /// The results of groups that have ended; those with rankers are ranked together.
    pub(super) fn finish_writes(
        &self,
        jobs: Vec<WriteJob<B>>,
    ) -> Vec<Result<Generated, EngineError>> {
        let now = Instant::now();
        let mut written: Vec<Written<B>> = jobs.into_iter().map(|job| job.written(now)).collect();
        match self.rank(&mut written) {
            Ok(()) => written.into_iter().map(|w| self.choose(w)).collect(),
            Err(error) => {
                let lost = written.into_iter().map(|w| Err(w.lost(error.clone())));
                lost.collect()
            }
        }
    }

    /// Scores the candidates of the groups that have a ranker.
    pub(super) fn rank(&self, written: &mut [Written<B>]) -> Result<(), BackendError> {
        let started = Instant::now();
        let mut ranked = {
            let rankings = written.iter().filter_map(Written::ranking);
            self.model.backend.rank(&rankings.collect::<Vec<_>>())?
        }
        .into_iter();
        let seconds = started.elapsed().as_secs_f64();
        for group in written.iter_mut().filter(|w| w.request.ranker.is_some()) {
            group.ranked = ranked.next();
            group.timings.rank_s = seconds;
        }
        Ok(())
    }

    /// Selects, and puts everything into words.
    pub(super) fn choose(&self, written: Written<B>) -> Result<Generated, EngineError> {
        let Written {
            request,
            mut candidates,
            features,
            ranked,
            ..
        } = written;
        let Features { layers, rows } = features;
        let of_row = |row: usize| -> Result<Vec<Vec<f32>>, EngineError> {
            let wanted = request.feature_layers.iter();
            let states = wanted.filter_map(|layer| layers.iter().position(|l| l == layer));
            Ok(states
                .map(|at| self.model.backend.read_row(&rows[at], row))
                .collect::<Result<_, _>>()?)
        };
        for candidate in &mut candidates {
            candidate.features = of_row(1 + candidate.index)?;
        }
        let ranked = ranked.transpose()?;
        if let Some(Ranked { scores, .. }) = &ranked {
            for (candidate, &score) in candidates.iter_mut().zip(scores) {
                candidate.score = Some(score);
            }
        }
        let selected = match (request.strategy, ranked) {
            (Strategy::Ranker, Some(ranked)) => ranked.best,
            (strategy, _) => select(strategy, &candidates.iter().map(facts).collect::<Vec<_>>())?,
        };
        Ok(Generated {
            selected,
            prompt_features: of_row(0)?,
            candidates,
            prompt_logprobs: written.prompt_logprobs,
            cached_tokens: written.cached_tokens,
            timings: written.timings,
        })
    }
}

/// What there is of a group whose candidates have all ended.
pub(super) struct Written<B: Backend> {
    pub request: GenerateRequest,
    pub candidates: Vec<Candidate>,
    /// For rankers.
    pub extra: Vec<ExtraInputs>,
    pub features: Features<B>,
    pub ranked: Option<Result<Ranked, RankerError>>,
    pub prompt_logprobs: Vec<TokenLogprob>,
    pub cached_tokens: usize,
    pub timings: Timings,
}

impl<B: Backend> Written<B> {
    pub fn new(
        request: GenerateRequest,
        writing: Vec<Writing>,
        features: Features<B>,
        timings: Timings,
    ) -> Written<B> {
        let writing = writing.into_iter().enumerate();
        let candidates: Vec<Candidate> = writing
            .map(|(index, writing)| writing.finished(index))
            .collect();
        Written {
            extra: candidates.iter().map(extra_inputs).collect(),
            candidates,
            request,
            features,
            ranked: None,
            prompt_logprobs: Vec::new(),
            cached_tokens: 0,
            timings,
        }
    }

    /// The error that a device failed with, and the texts so far where it does nothing more.
    pub fn lost(self, error: BackendError) -> EngineError {
        if !error.is_final() {
            return error.into();
        }
        // What cannot be ranked any more.
        let strategy = match self.request.strategy {
            Strategy::Ranker => Strategy::Logprob,
            strategy => strategy,
        };
        let selected = select(
            strategy,
            &self.candidates.iter().map(facts).collect::<Vec<_>>(),
        );
        EngineError::Lost {
            source: error,
            so_far: Box::new(Generated {
                selected: selected.unwrap_or(0),
                candidates: self.candidates,
                prompt_features: Vec::new(),
                prompt_logprobs: self.prompt_logprobs,
                cached_tokens: self.cached_tokens,
                timings: self.timings,
            }),
        }
    }

    fn ranking(&self) -> Option<Ranking<'_, B::Rows>> {
        let ranker = self.request.ranker.as_ref()?;
        let layer = ranker.config().layer;
        let at = self.features.layers.iter().position(|l| *l == layer)?;
        Some(Ranking {
            ranker,
            features: &self.features.rows[at],
            extra: &self.extra,
        })
    }
}

/// A bias that no logit makes up for; finite, for what is computed with it must be.
const NEVER: f32 = -1e9;

impl<B: Backend> WriteJob<B> {
    /// What there is of it, as it stands.
    pub fn written(self, now: Instant) -> Written<B> {
        let seconds = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.duration_since(from).as_secs_f64(),
            _ => 0.0,
        };
        let Clock {
            admitted,
            prefilled,
            written,
        } = self.clock;
        let written = written.or(Some(now));
        let decode_s = seconds(prefilled, written);
        let timings = Timings {
            prefill_s: seconds(admitted, prefilled),
            decode_s,
            features_s: seconds(written, Some(now)),
            rank_s: 0.0,
            decode_tokens_per_s: self.tokens as f64 / decode_s.max(1e-9),
        };
        Written {
            prompt_logprobs: self.prompt_logprobs,
            cached_tokens: self.cached_tokens.unwrap_or(0),
            ..Written::new(self.request, self.writing, self.features, timings)
        }
    }

    pub fn admitted(&mut self, cached_tokens: usize) {
        self.cached_tokens.get_or_insert(cached_tokens);
        self.clock.admitted.get_or_insert_with(Instant::now);
    }

    pub fn prefilled(&mut self) {
        self.clock.prefilled.get_or_insert_with(Instant::now);
    }

    /// Whether every candidate has drawn its first token.
    pub fn has_tokens(&self) -> bool {
        self.tokens > 0
    }

    /// Bias of every token that has one for a candidate's next.
    pub fn logit_bias(&self, candidate: usize) -> Vec<(u32, f32)> {
        let GenerateRequest {
            logit_bias,
            presence_penalty,
            frequency_penalty,
            min_tokens,
            ..
        } = &self.request;
        let too_short = self.writing[candidate].token_ids.len() < *min_tokens;
        if *presence_penalty == 0.0 && *frequency_penalty == 0.0 && !too_short {
            return logit_bias.clone();
        }
        let mut counts: BTreeMap<u32, f32> = BTreeMap::new();
        for &token in &self.writing[candidate].token_ids {
            *counts.entry(token).or_default() += 1.0;
        }
        let mut biases: BTreeMap<u32, f32> = counts
            .into_iter()
            .map(|(token, count)| (token, -presence_penalty - frequency_penalty * count))
            .collect();
        for (token, bias) in logit_bias {
            *biases.entry(*token).or_default() += bias;
        }
        if too_short {
            let ends = self.conditions.end_tokens().iter();
            biases.extend(ends.map(|&token| (token, NEVER)));
        }
        biases.into_iter().collect()
    }

    /// What a candidate's next token is drawn with, from this row of logits; without its bias.
    pub fn sample_row(&self, candidate: usize, row: usize) -> SampleRow<'_> {
        let prompt = &self.request.prompt_token_ids;
        let answer = &self.writing[candidate].token_ids;
        SampleRow {
            row,
            params: &self.sampling,
            seed: self.request.seed,
            candidate: candidate as u32,
            position: (prompt.len() + answer.len()) as u32,
            prompt,
            answer,
            logit_bias: &[],
            top_logprobs: self.request.top_logprobs,
        }
    }

    /// Takes a drawn token; says whether it was the candidate's last. After a `Break` the observer
    /// hears no more.
    pub fn accept(
        &mut self,
        candidate: usize,
        sampled: Sampled,
        observer: &mut dyn FnMut(Event) -> ControlFlow<()>,
        flow: &mut ControlFlow<()>,
    ) -> bool {
        self.tokens += 1;
        let writing = &mut self.writing[candidate];
        let (token, logprob) = (sampled.token, sampled.logprob);
        let top = sampled.top_logprobs.clone();
        let reason = writing.push(&self.conditions, sampled);
        let mut tell = |event: Event| {
            if flow.is_continue() {
                *flow = observer(event);
            }
        };
        if reason != Some(FinishReason::Stop) {
            tell(Event::Token {
                candidate,
                token,
                logprob,
                top: &top,
            });
        }
        let piece = writing.stop.stream();
        if !piece.is_empty() {
            tell(Event::Text { candidate, piece });
        }
        if let Some(reason) = reason {
            tell(Event::Finished { candidate, reason });
            self.running -= 1;
            if self.running == 0 {
                self.clock.written = Some(Instant::now());
            }
        }
        reason.is_some()
    }

    /// What there is to say of the step that is over.
    pub fn step_event(&self) -> Event<'static> {
        Event::Step {
            tokens: self.tokens,
            running: self.running,
        }
    }
}
