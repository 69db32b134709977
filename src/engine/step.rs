//! One step of all running groups: a batch through the model, and what comes of its rows.

use super::generate::WriteJob;
use super::scheduler::{Drawn, GroupId, Piece, Purpose, Step, Task, Work};
use super::score::ScoreJob;
use super::{Completed, Completion, Engine, EngineError, Event, GroupObserver};
use crate::backend::sampling::{SampleRow, Sampled};
use crate::backend::{Backend, BackendError, Batch, Draws};
use crate::model::forward::Depth;
use std::collections::{BTreeSet, HashMap};
use std::ops::ControlFlow;
use std::time::Instant;

/// A group, as far as the scheduler does not know it.
pub(super) enum Job<B: Backend> {
    Write(Box<WriteJob<B>>),
    Score(Box<ScoreJob>),
}

/// A candidate that draws a token from a row of the batch.
#[derive(Clone, Copy)]
struct Draw {
    group: GroupId,
    candidate: usize,
    /// Of its tokens, those that are computed: its row is the last one's.
    computed: usize,
    row: u32,
}

impl<B: Backend> Engine<B> {
    /// Runs one step of all groups that were [submitted](Engine::submit), and gives those that ended
    /// with it. Does nothing if there are none.
    ///
    /// What the device fails with ends the groups that took part in the step, with the texts that they
    /// have so far.
    pub fn step(&mut self, observer: &mut GroupObserver) -> Vec<Completed> {
        let step = self.scheduler.step();
        for &(id, cached_tokens) in &step.admitted {
            if let Some(Job::Write(job)) = self.jobs.get_mut(&id) {
                job.admitted(cached_tokens);
            }
        }
        self.preemptions += step.preempted.len() as u64;
        if !step.tasks.is_empty()
            && let Err(error) = self.compute(&step, observer)
        {
            for task in &step.tasks {
                self.lose(task.group, &error);
            }
        }
        std::mem::take(&mut self.completed)
    }

    fn compute(&mut self, step: &Step, observer: &mut GroupObserver) -> Result<(), BackendError> {
        let mut batch = Batch::default();
        let mut first_rows = Vec::with_capacity(step.tasks.len());
        for task in &step.tasks {
            first_rows.push(batch.tokens.len());
            self.tokens(task, &mut batch.tokens);
            batch.groups.push(task.batch.clone());
        }
        let (layers, capture) = self.depth(step);
        let depth = Depth {
            layers,
            capture: &capture,
        };
        let draws = draws(step, &first_rows);
        let (sampled, failed) = self.forward(&batch, depth, &draws)?;
        self.computed_tokens += batch.tokens.len() as u64;
        for (group, error) in failed {
            self.fail(group, error.into());
        }
        for (task, &first_row) in step.tasks.iter().zip(&first_rows) {
            self.read_logprobs(task, first_row)?;
        }
        let mut sampled = draws.into_iter().zip(sampled).peekable();
        let mut drawn = HashMap::new();
        let mut broken_off = Vec::new();
        for (task, &first_row) in step.tasks.iter().zip(&first_rows) {
            let mut of_task = Vec::new();
            while let Some(next) = sampled.next_if(|(draw, _)| draw.group == task.group) {
                of_task.push(next);
            }
            let mut observer = |event: Event| observer(task.group, event);
            match self.take_rows(task, first_row, of_task, &mut drawn, &mut observer) {
                ControlFlow::Continue(()) => {}
                ControlFlow::Break(()) if self.has_tokens(task.group) => {
                    broken_off.push(task.group);
                }
                ControlFlow::Break(()) => self.fail(task.group, EngineError::Interrupted),
            }
        }
        let ended = self.scheduler.complete(step, |group, candidate| {
            // A candidate without a result belongs to a group that has failed and is gone.
            let result = drawn.remove(&(group, candidate));
            result.unwrap_or(Drawn::Ended)
        });
        self.finish_all(ended);
        for group in broken_off {
            self.break_off(group);
        }
        Ok(())
    }

    /// The tokens of a task's rows.
    fn tokens(&self, task: &Task, tokens: &mut Vec<u32>) {
        // Every group of the scheduler has a job.
        let Some(job) = self.jobs.get(&task.group) else {
            return;
        };
        match (&task.work, job) {
            (Work::Prefill { tokens: range, .. }, _) => {
                tokens.extend(&job.prompt()[range.clone()]);
            }
            (Work::Candidates(pieces), Job::Write(job)) => {
                for piece in pieces {
                    tokens.extend(&job.writing[piece.candidate].token_ids[piece.tokens.clone()]);
                }
            }
            (Work::Candidates(pieces), Job::Score(job)) => {
                let all = &job.request.candidate_token_ids;
                for piece in pieces {
                    tokens.extend(&all[piece.candidate][piece.tokens.clone()]);
                }
            }
        }
    }

    /// How many layers the step runs, and the ones after which states are kept.
    fn depth(&self, step: &Step) -> (usize, Vec<usize>) {
        let all = self.config().layers;
        let (mut layers, mut capture) = (0, BTreeSet::new());
        for task in &step.tasks {
            let states_only = match &task.work {
                Work::Prefill { .. } => false,
                Work::Candidates(pieces) => {
                    pieces.iter().all(|piece| piece.purpose == Purpose::State)
                }
            };
            let (wanted, deepest) = match &self.jobs.get(&task.group) {
                Some(Job::Write(job)) => {
                    let wanted = &job.features.layers;
                    let highest = wanted.last().copied().unwrap_or(0);
                    (wanted, if states_only { highest } else { all })
                }
                Some(Job::Score(job)) => (&job.layers, job.deepest(all)),
                None => continue,
            };
            layers = layers.max(deepest);
            if takes_states(task, self.jobs[&task.group].prompt().len()) {
                capture.extend(wanted.iter().copied());
            }
        }
        (layers, capture.into_iter().collect())
    }

    /// Log-probabilities of given tokens, where they are asked for.
    fn read_logprobs(&mut self, task: &Task, first_row: usize) -> Result<(), BackendError> {
        let Some(mut job) = self.jobs.remove(&task.group) else {
            return Ok(());
        };
        let read = match (&mut job, &task.work) {
            (Job::Write(job), Work::Prefill { tokens, .. }) => {
                self.prompt_logprobs(job, tokens.clone(), first_row)
            }
            (Job::Write(_), Work::Candidates(_)) => Ok(()),
            (Job::Score(job), work) => self.score_logprobs(job, work, first_row),
        };
        self.jobs.insert(task.group, job);
        read
    }

    /// Runs the batch through the model. Gives a token for each draw, and for those for which there is
    /// none (their places are empty) the groups, which cannot go on.
    #[allow(clippy::type_complexity)]
    fn forward(
        &mut self,
        batch: &Batch,
        depth: Depth,
        draws: &[Draw],
    ) -> Result<(Vec<Option<Sampled>>, Vec<(GroupId, BackendError)>), BackendError> {
        let mut logits_rows: Vec<u32> = Vec::new();
        let mut places = Vec::with_capacity(draws.len());
        for draw in draws {
            // Candidates that draw from the prompt's row follow each other.
            if logits_rows.last() != Some(&draw.row) {
                logits_rows.push(draw.row);
            }
            places.push(logits_rows.len() - 1);
        }
        if logits_rows.is_empty() {
            self.model.forward(&mut self.state, batch, depth)?;
            return Ok((Vec::new(), Vec::new()));
        }
        let biases: Vec<Vec<(u32, f32)>> = draws
            .iter()
            .map(|draw| match self.jobs.get(&draw.group) {
                Some(Job::Write(job)) => job.logit_bias(draw.candidate),
                _ => Vec::new(),
            })
            .collect();
        let mut rows = Vec::with_capacity(draws.len());
        for ((draw, &row), logit_bias) in draws.iter().zip(&places).zip(&biases) {
            // Only groups that are written draw.
            if let Some(Job::Write(job)) = self.jobs.get(&draw.group) {
                rows.push(SampleRow {
                    logit_bias,
                    ..job.sample_row(draw.candidate, row)
                });
            }
        }
        let wanted = Draws {
            rows: &logits_rows,
            draws: &rows,
            vocab_size: self.model.config.vocab_size,
        };
        let drawn = self
            .model
            .forward_and_draw(&mut self.state, batch, depth, &wanted)?;
        let (mut sampled, mut failed) = (Vec::with_capacity(drawn.len()), Vec::new());
        for (draw, drawn) in draws.iter().zip(drawn) {
            match drawn {
                Ok(drawn) => sampled.push(Some(drawn)),
                Err(error) => {
                    sampled.push(None);
                    failed.push((draw.group, error.into()));
                }
            }
        }
        Ok((sampled, failed))
    }

    /// What comes of a task's rows: features, tokens, texts.
    fn take_rows(
        &mut self,
        task: &Task,
        first_row: usize,
        sampled: Vec<(Draw, Option<Sampled>)>,
        drawn: &mut HashMap<(GroupId, usize), Drawn>,
        observer: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let job = match self.jobs.get_mut(&task.group) {
            Some(Job::Write(job)) => job,
            Some(Job::Score(job)) => {
                if let Err(error) = job.take_rows(&self.model, &self.state, &task.work, first_row) {
                    self.fail(task.group, error);
                }
                return ControlFlow::Continue(());
            }
            None => return ControlFlow::Continue(()),
        };
        let (backend, state) = (&self.model.backend, &self.state);
        match &task.work {
            Work::Prefill { tokens, .. } => {
                let total = job.request.prompt_token_ids.len();
                let done = tokens.end;
                // It is computed once more after a preemption, which is nobody's business.
                if !job.has_tokens() {
                    observer(Event::Prefill { done, total })?;
                }
                if done == total {
                    let row = first_row + tokens.len() - 1;
                    job.features.keep(backend, state, row, 0);
                    job.prefilled();
                }
            }
            Work::Candidates(pieces) => {
                for (row, piece) in last_rows(pieces, first_row) {
                    if piece.purpose == Purpose::State {
                        job.features.keep(backend, state, row, 1 + piece.candidate);
                    }
                }
            }
        }
        if sampled.is_empty() {
            return ControlFlow::Continue(());
        }
        let mut flow = ControlFlow::Continue(());
        for (draw, sampled) in sampled {
            let Some(sampled) = sampled else {
                continue;
            };
            let candidate = draw.candidate;
            let ended = job.accept(candidate, sampled, observer, &mut flow);
            let result = match ended {
                false => Drawn::GoesOn,
                true => {
                    let kept = job.writing[candidate].stop.kept_tokens();
                    if job.features.layers.is_empty() {
                        Drawn::Ended
                    } else if kept == 0 {
                        job.features.keep_prompt(backend, candidate);
                        Drawn::Ended
                    } else if kept == draw.computed {
                        job.features
                            .keep(backend, state, draw.row as usize, 1 + candidate);
                        Drawn::Ended
                    } else {
                        Drawn::EndedWith(kept - 1)
                    }
                }
            };
            drawn.insert((task.group, candidate), result);
        }
        let step = job.step_event();
        flow?;
        observer(step)
    }

    fn has_tokens(&self, group: GroupId) -> bool {
        matches!(self.jobs.get(&group), Some(Job::Write(job)) if job.has_tokens())
    }

    /// Ends a group at the texts that it has so far.
    fn break_off(&mut self, group: GroupId) {
        if let Some(Job::Write(job)) = self.jobs.get(&group) {
            let wanted = !job.features.layers.is_empty();
            self.scheduler.finish_early(group, wanted);
            let ended = self.scheduler.take_ended();
            self.finish_all(ended);
        }
    }

    /// Ends a group with what the device failed with.
    fn lose(&mut self, group: GroupId, error: &BackendError) {
        let error = match self.jobs.remove(&group) {
            Some(Job::Write(job)) if job.has_tokens() => {
                job.written(Instant::now()).lost(error.clone())
            }
            _ => error.clone().into(),
        };
        self.scheduler.cancel(group);
        self.completed.push(Completed {
            group,
            result: Err(error),
        });
    }

    /// Ends a group with an error.
    fn fail(&mut self, group: GroupId, error: EngineError) {
        self.scheduler.cancel(group);
        if self.jobs.remove(&group).is_some() {
            self.completed.push(Completed {
                group,
                result: Err(error),
            });
        }
    }

    fn finish_all(&mut self, ended: Vec<GroupId>) {
        let (mut groups, mut written) = (Vec::new(), Vec::new());
        for group in ended {
            match self.jobs.remove(&group) {
                Some(Job::Write(job)) => {
                    groups.push(group);
                    written.push(*job);
                }
                Some(Job::Score(job)) => self.completed.push(Completed {
                    group,
                    result: Ok(Completion::Scored(Box::new(job.scored))),
                }),
                None => {}
            }
        }
        let results = self.finish_writes(written);
        for (group, result) in groups.into_iter().zip(results) {
            let result = result.map(|generated| Completion::Generated(Box::new(generated)));
            self.completed.push(Completed { group, result });
        }
    }
}

impl<B: Backend> Job<B> {
    fn prompt(&self) -> &[u32] {
        match self {
            Job::Write(job) => &job.request.prompt_token_ids,
            Job::Score(job) => &job.request.prompt_token_ids,
        }
    }
}

/// Whether a task has a row whose state may be kept.
fn takes_states(task: &Task, prompt_len: usize) -> bool {
    match &task.work {
        Work::Prefill { tokens, .. } => tokens.end == prompt_len,
        Work::Candidates(pieces) => pieces.iter().any(|piece| piece.purpose != Purpose::CatchUp),
    }
}

/// The pieces with the batch's row of their last token.
pub(super) fn last_rows(
    pieces: &[Piece],
    first_row: usize,
) -> impl Iterator<Item = (usize, &Piece)> {
    pieces.iter().scan(first_row, |next, piece| {
        *next += piece.tokens.len();
        Some((*next - 1, piece))
    })
}

/// Who draws in a step.
fn draws(step: &Step, first_rows: &[usize]) -> Vec<Draw> {
    let mut all = Vec::new();
    for (task, &first_row) in step.tasks.iter().zip(first_rows) {
        let group = task.group;
        match &task.work {
            Work::Prefill { tokens, draws } => all.extend(draws.iter().map(|&candidate| Draw {
                group,
                candidate,
                computed: 0,
                row: (first_row + tokens.len()) as u32 - 1,
            })),
            Work::Candidates(pieces) => {
                for (row, piece) in last_rows(pieces, first_row) {
                    if piece.purpose == Purpose::Draw {
                        all.push(Draw {
                            group,
                            candidate: piece.candidate,
                            computed: piece.tokens.end,
                            row: row as u32,
                        });
                    }
                }
            }
        }
    }
    all
}
