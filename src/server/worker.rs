//! The engine's thread: it owns engine and model, takes requests from a channel, and steps while
//! there is work.
//!
//! A request's client is a channel's other end. When that is gone (the connection broke, the handler
//! was dropped) the group is cancelled before the next step, and its pages are free with it.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::metrics::Metrics;
use crate::backend::Backend;
use crate::engine::scheduler::GroupId;
use crate::engine::stop::FinishReason;
use crate::engine::{
    Completion, Engine, EngineError, Event, GenerateRequest, Generated, Load, ScoreRequest,
};

/// What a request's client hears.
#[derive(Debug)]
pub enum Progress {
    /// The request is in the queue: nothing is wrong with it.
    Accepted,
    Prefill {
        done: usize,
        total: usize,
    },
    Token {
        candidate: usize,
        token: u32,
        logprob: f32,
        top: Vec<(u32, f32)>,
    },
    Text {
        candidate: usize,
        piece: String,
    },
    Finished {
        candidate: usize,
        reason: FinishReason,
    },
    /// A step is over.
    Step,
    /// The last there is to hear.
    Done(Result<Completion, EngineError>),
}

/// The receiving end of a request; dropping it cancels the request.
pub type Answers = UnboundedReceiver<Progress>;

enum Work {
    Write(Box<GenerateRequest>),
    Score(ScoreRequest),
}

struct Submission {
    work: Work,
    /// Whether more is wanted than the end.
    progress: bool,
    client: UnboundedSender<Progress>,
    arrived: Instant,
}

/// Hands requests to the engine's thread.
#[derive(Clone)]
pub struct EngineHandle {
    submissions: Sender<Submission>,
    load: Arc<Mutex<Load>>,
    alive: Arc<AtomicBool>,
}

impl EngineHandle {
    /// Starts the thread.
    pub fn start<B: Backend>(engine: Engine<B>, metrics: Arc<Metrics>) -> std::io::Result<Self> {
        let (submissions, inbox) = channel();
        let load = Arc::new(Mutex::new(engine.load()));
        let alive = Arc::new(AtomicBool::new(true));
        let handle = EngineHandle {
            submissions,
            load: load.clone(),
            alive: alive.clone(),
        };
        let mut worker = Worker {
            engine,
            inbox,
            clients: HashMap::new(),
            load,
            metrics,
        };
        std::thread::Builder::new()
            .name("engine".to_string())
            .spawn(move || {
                // Clients hear of a panic by their channels' end.
                if catch_unwind(AssertUnwindSafe(|| worker.run())).is_err() {
                    tracing::error!("the engine has panicked; no request can be answered any more");
                }
                alive.store(false, Ordering::Release);
            })?;
        Ok(handle)
    }

    /// Whether the thread still answers.
    pub fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }

    pub fn load(&self) -> Load {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `progress`: whether to hear of every step, or of the end alone.
    pub fn write(&self, request: GenerateRequest, progress: bool) -> Answers {
        self.submit(Work::Write(Box::new(request)), progress)
    }

    pub fn score(&self, request: ScoreRequest) -> Answers {
        self.submit(Work::Score(request), false)
    }

    fn submit(&self, work: Work, progress: bool) -> Answers {
        let (client, answers) = unbounded_channel();
        // If the thread is gone, so is `client`: the receiver hears of it.
        let _ = self.submissions.send(Submission {
            work,
            progress,
            client,
            arrived: Instant::now(),
        });
        answers
    }
}

/// Whoever waits for a group.
struct Client {
    answers: UnboundedSender<Progress>,
    progress: bool,
    arrived: Instant,
    /// When the prompt was begun, and when its candidates had their first token.
    begun: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    prompt_tokens: u64,
}

struct Worker<B: Backend> {
    engine: Engine<B>,
    inbox: Receiver<Submission>,
    clients: HashMap<GroupId, Client>,
    load: Arc<Mutex<Load>>,
    metrics: Arc<Metrics>,
}

impl<B: Backend> Worker<B> {
    /// Until every handle is gone.
    fn run(&mut self) {
        loop {
            let first = match self.engine.is_idle() {
                true => match self.inbox.recv() {
                    Ok(submission) => Some(submission),
                    Err(_) => return,
                },
                false => None,
            };
            first.into_iter().for_each(|first| self.admit(first));
            loop {
                match self.inbox.try_recv() {
                    Ok(submission) => self.admit(submission),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) if self.clients.is_empty() => return,
                    Err(TryRecvError::Disconnected) => break,
                }
            }
            self.cancel_abandoned();
            self.step();
        }
    }

    fn admit(&mut self, submission: Submission) {
        let Submission {
            work,
            progress,
            client,
            arrived,
        } = submission;
        if client.is_closed() {
            return;
        }
        let prompt_tokens = match &work {
            Work::Write(request) => request.prompt_token_ids.len(),
            Work::Score(request) => request.prompt_token_ids.len(),
        } as u64;
        let submitted = match work {
            Work::Write(request) => {
                let candidates = request.n as f64;
                let submitted = self.engine.submit(*request);
                submitted.inspect(|_| self.metrics.candidates.observe(candidates))
            }
            Work::Score(request) => self.engine.submit_score(request),
        };
        match submitted {
            Ok(group) => {
                self.metrics.prompt_tokens.inc_by(prompt_tokens);
                let _ = client.send(Progress::Accepted);
                let client = Client {
                    answers: client,
                    progress,
                    arrived,
                    begun: None,
                    first_token: None,
                    last_token: None,
                    prompt_tokens,
                };
                self.clients.insert(group, client);
            }
            // Whoever asked may be gone.
            Err(error) => drop(client.send(Progress::Done(Err(error)))),
        }
    }

    fn cancel_abandoned(&mut self) {
        let abandoned: Vec<GroupId> = self
            .clients
            .iter()
            .filter(|(_, client)| client.answers.is_closed())
            .map(|(&group, _)| group)
            .collect();
        for group in abandoned {
            self.clients.remove(&group);
            self.engine.cancel(group);
            self.metrics.finished.with_label_values(&["abort"]).inc();
            tracing::info!(group, "cancelled: the client has gone");
        }
    }

    fn step(&mut self) {
        let (clients, metrics) = (&mut self.clients, &self.metrics);
        let completed = self.engine.step(&mut |group, event| {
            let Some(client) = clients.get_mut(&group) else {
                return ControlFlow::Continue(());
            };
            client.hear(event, metrics);
            ControlFlow::Continue(())
        });
        // Before anybody hears of an end, so that whoever asks after it sees the pages free.
        let load = self.engine.load();
        *self.load.lock().unwrap_or_else(PoisonError::into_inner) = load;
        for completed in completed {
            let Some(client) = self.clients.remove(&completed.group) else {
                continue;
            };
            client.count(&completed.result, &self.metrics);
            let _ = client.answers.send(Progress::Done(completed.result));
        }
    }
}

impl Client {
    fn hear(&mut self, event: Event, metrics: &Metrics) {
        let progress = match event {
            Event::Prefill { done, total } => {
                if self.begun.is_none() {
                    self.begun = Some(Instant::now());
                    let waited = self.arrived.elapsed().as_secs_f64();
                    metrics.queue_time.observe(waited);
                }
                Progress::Prefill { done, total }
            }
            Event::Step { .. } => {
                let now = Instant::now();
                if let Some(last) = self.last_token.replace(now) {
                    metrics
                        .inter_token_latency
                        .observe((now - last).as_secs_f64());
                }
                if self.first_token.is_none() {
                    self.first_token = Some(Instant::now());
                    let waited = self.arrived.elapsed().as_secs_f64();
                    metrics.time_to_first_token.observe(waited);
                }
                Progress::Step
            }
            // The rest is for those who asked.
            _ if !self.progress => return,
            Event::Token {
                candidate,
                token,
                logprob,
                top,
            } => Progress::Token {
                candidate,
                token,
                logprob,
                top: top.to_vec(),
            },
            Event::Text { candidate, piece } => Progress::Text {
                candidate,
                piece: piece.to_string(),
            },
            Event::Finished { candidate, reason } => Progress::Finished { candidate, reason },
        };
        if self.progress {
            // A client that has gone is noticed before the next step.
            let _ = self.answers.send(progress);
        }
    }

    fn count(&self, result: &Result<Completion, EngineError>, metrics: &Metrics) {
        let latency = self.arrived.elapsed().as_secs_f64();
        metrics.request_latency.observe(latency);
        let ended = |how: &str| metrics.finished.with_label_values(&[how]).inc();
        let generated = match result {
            Ok(Completion::Generated(generated)) => generated,
            Ok(Completion::Scored(_)) => return ended("stop"),
            Err(_) => return ended("error"),
        };
        let Generated {
            candidates,
            selected,
            timings,
            ..
        } = &**generated;
        let tokens: usize = candidates.iter().map(|c| c.token_ids.len()).sum();
        metrics.generation_tokens.inc_by(tokens as u64);
        metrics.looked_up_tokens.inc_by(self.prompt_tokens);
        metrics.cached_tokens.inc_by(generated.cached_tokens as u64);
        let longest = candidates.iter().map(|c| c.token_ids.len()).max();
        if let Some(longest @ 2..) = longest {
            let apart = timings.decode_s / (longest - 1) as f64;
            metrics.time_per_output_token.observe(apart);
        }
        let chosen = &candidates[*selected];
        if let (Some(score), Some(first)) = (chosen.score, candidates[0].score)
            && candidates.len() > 1
        {
            metrics.ranker_time.observe(timings.rank_s);
            metrics.gain_over_first.observe(f64::from(score - first));
            metrics.ranked.inc();
            metrics.ranked_other.inc_by(u64::from(*selected != 0));
        }
        ended(
            &chosen
                .finish_reason
                .map_or("abort".into(), |r| r.to_string()),
        );
    }
}
