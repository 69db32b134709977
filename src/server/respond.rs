//! Prompts through the engine and back to the client, whole or as a stream.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::{Sender, channel};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

use super::answer::{
    ScoredToken, Usage, logprobs_json, order, podium, result, scored_prompt, scored_tokens,
};
use super::ask::{Ask, Form, random_id};
use super::error::ApiError;
use super::state::{Place, Shared, unix_time};
use super::worker::{Answers, Progress};
use crate::engine::stop::FinishReason;
use crate::engine::{Candidate, Completion, EngineError, Generated, Scored};
use crate::model::text::Tokenizer;

/// Events that wait for a slow client before its candidates' progress waits too.
const STREAM_BUFFER: usize = 64;
/// A client that takes nothing for so long counts as gone.
const SLOW_READER: Duration = Duration::from_secs(30);
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A prompt as it came and as the engine takes it.
#[derive(Clone, Debug)]
pub struct PromptInput {
    /// What `echo` gives back.
    pub text: String,
    pub token_ids: Vec<u32>,
}

impl PromptInput {
    /// Drops all but the last tokens.
    fn keep_last(&mut self, most: usize, tokenizer: &Tokenizer) {
        let dropped = self.token_ids.len().saturating_sub(most);
        if dropped > 0 {
            self.token_ids.drain(..dropped);
            self.text = tokenizer.decode(&self.token_ids, false);
        }
    }
}

/// What all choices of an answer have in common.
struct Frame {
    state: Shared,
    ask: Ask,
    id: String,
    created: u64,
    /// The field that the prompt came in.
    field: &'static str,
}

/// Answers a chat or completion.
pub async fn respond(
    state: Shared,
    ask: Ask,
    prompts: Vec<PromptInput>,
    field: &'static str,
) -> Result<Response, ApiError> {
    let place = state.admit(prompts.len())?;
    let progress = ask.stream && (ask.is_plain() || ask.stream_candidates);
    let mut waiting = Vec::with_capacity(prompts.len());
    for mut prompt in prompts {
        if let Some(most) = ask.truncate_prompt {
            prompt.keep_last(most, &state.tokenizer);
        }
        let request = ask.for_prompt(prompt.token_ids.clone());
        waiting.push((prompt, state.engine.write(request, progress)));
    }
    // What is wrong with a prompt is known before anything is sent.
    for (_, answers) in &mut waiting {
        accepted(answers, field).await?;
    }
    let prefix = match ask.form {
        Form::Chat => "chatcmpl",
        Form::Completion => "cmpl",
    };
    let frame = Frame {
        id: random_id(prefix),
        created: unix_time(SystemTime::now()),
        state,
        ask,
        field,
    };
    match frame.ask.stream {
        true => Ok(stream(frame, waiting, place)),
        false => whole(frame, waiting, place).await,
    }
}

/// Waits until the engine has taken a request.
async fn accepted(answers: &mut Answers, field: &str) -> Result<(), ApiError> {
    match answers.recv().await {
        Some(Progress::Done(Err(error))) => Err(ApiError::from_engine(error, field)),
        Some(_) => Ok(()),
        None => Err(ApiError::engine_gone()),
    }
}

fn completed(
    outcome: Option<Result<Completion, EngineError>>,
    field: &str,
) -> Result<Completion, ApiError> {
    match outcome {
        Some(Ok(completion)) => Ok(completion),
        Some(Err(error)) => Err(ApiError::from_engine(error, field)),
        None => Err(ApiError::engine_gone()),
    }
}

/// Waits for a request's end.
async fn finished(
    state: &Shared,
    answers: &mut Answers,
    field: &str,
) -> Result<Completion, ApiError> {
    let end = async {
        while let Some(progress) = answers.recv().await {
            if let Progress::Done(outcome) = progress {
                return Some(outcome);
            }
        }
        None
    };
    tokio::select! {
        outcome = end => completed(outcome, field),
        () = state.aborted() => Err(ApiError::draining()),
    }
}

/// Features and log-probabilities of given candidates.
pub async fn score(
    state: &Shared,
    request: crate::engine::ScoreRequest,
    field: &str,
) -> Result<Scored, ApiError> {
    let _place = state.admit(1)?;
    let mut answers = state.engine.score(request);
    accepted(&mut answers, field).await?;
    match finished(state, &mut answers, field).await? {
        Completion::Scored(scored) => Ok(*scored),
        Completion::Generated(_) => unreachable!("the request was to be scored"),
    }
}

fn written(completion: Completion, ask: &Ask) -> Generated {
    let Completion::Generated(mut generated) = completion else {
        unreachable!("the request was to be written")
    };
    if ask.prompt_alone {
        for candidate in &mut generated.candidates {
            candidate.text.clear();
            candidate.token_ids.clear();
            candidate.token_logprobs.clear();
            candidate.top_logprobs.clear();
            candidate.end_token = None;
            candidate.finish_reason = Some(FinishReason::Length);
        }
    }
    *generated
}

async fn whole(
    frame: Frame,
    waiting: Vec<(PromptInput, Answers)>,
    _place: Place,
) -> Result<Response, ApiError> {
    let mut choices = Vec::new();
    let mut results = Vec::new();
    let mut usage = Usage::default();
    for (prompt_index, (prompt, mut answers)) in waiting.into_iter().enumerate() {
        let completion = finished(&frame.state, &mut answers, frame.field).await?;
        let generated = written(completion, &frame.ask);
        usage = usage.add(Usage::of(&prompt.token_ids, &generated));
        for index in order(&generated, frame.ask.request.strategy, frame.ask.n) {
            choices.push(frame.choice(choices.len(), &prompt, &generated, index));
        }
        results.push(result(&frame.ask, prompt_index, &generated));
    }
    let mut body = frame.head(match frame.ask.form {
        Form::Chat => "chat.completion",
        Form::Completion => "text_completion",
    });
    body.insert("choices".to_string(), Value::Array(choices));
    body.insert("usage".to_string(), usage.json());
    body.insert("podium".to_string(), podium(&frame.ask, results));
    Ok(Json(Value::Object(body)).into_response())
}

impl Frame {
    fn head(&self, object: &str) -> Map<String, Value> {
        let Value::Object(head) = json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.ask.model,
        }) else {
            unreachable!("an object was written")
        };
        head
    }

    fn choice(
        &self,
        place: usize,
        prompt: &PromptInput,
        generated: &Generated,
        index: usize,
    ) -> Value {
        let candidate = &generated.candidates[index];
        let mut choice = json!({
            "index": place,
            "finish_reason": finish_reason(candidate),
            "logprobs": self.logprobs(prompt, generated, candidate),
        });
        match self.ask.form {
            Form::Chat => {
                choice["message"] =
                    json!({"role": "assistant", "content": candidate.text, "refusal": null});
            }
            Form::Completion => {
                choice["text"] = match self.ask.echo {
                    true => json!(format!("{}{}", prompt.text, candidate.text)),
                    false => json!(candidate.text),
                };
            }
        }
        self.annotate(&mut choice, candidate);
        choice
    }

    /// Which candidate a choice is.
    fn annotate(&self, choice: &mut Value, candidate: &Candidate) {
        choice["candidate"] = json!(candidate.index);
        if self.ask.return_scores || self.ask.return_all {
            choice["score"] = json!(candidate.score);
        }
    }

    fn logprobs(
        &self,
        prompt: &PromptInput,
        generated: &Generated,
        candidate: &Candidate,
    ) -> Value {
        let Some(alternatives) = self.ask.logprobs else {
            return Value::Null;
        };
        let mut tokens = match self.ask.echo {
            true => scored_prompt(&prompt.token_ids, &generated.prompt_logprobs),
            false => Vec::new(),
        };
        tokens.extend(scored_tokens(self.ask.form, candidate));
        let tokenizer = &self.state.tokenizer;
        logprobs_json(self.ask.form, tokenizer, &tokens, alternatives, &mut 0)
    }

    /// A piece of a choice, as a stream has it.
    fn chunk(&self, choices: Vec<Value>) -> Map<String, Value> {
        let mut chunk = self.head(match self.ask.form {
            Form::Chat => "chat.completion.chunk",
            Form::Completion => "text_completion",
        });
        chunk.insert("choices".to_string(), Value::Array(choices));
        if self.ask.include_usage {
            chunk.insert("usage".to_string(), Value::Null);
        }
        chunk
    }

    fn piece(&self, place: usize, text: &str, logprobs: Value) -> Value {
        let mut choice = json!({"index": place, "finish_reason": null, "logprobs": logprobs});
        match self.ask.form {
            Form::Chat => choice["delta"] = json!({"content": text}),
            Form::Completion => choice["text"] = json!(text),
        }
        choice
    }

    /// What opens a choice: the role of a chat, the prompt of a completion that echoes it.
    fn opening(&self, place: usize, prompt: &PromptInput) -> Option<Value> {
        match self.ask.form {
            Form::Chat => {
                let mut choice = self.piece(place, "", Value::Null);
                choice["delta"]["role"] = json!("assistant");
                Some(choice)
            }
            Form::Completion if self.ask.echo && self.ask.logprobs.is_none() => {
                Some(self.piece(place, &prompt.text, Value::Null))
            }
            Form::Completion => None,
        }
    }

    fn closing(&self, place: usize, candidate: &Candidate) -> Value {
        let mut choice = self.piece(place, "", Value::Null);
        if self.ask.form == Form::Chat {
            choice["delta"] = json!({});
        }
        choice["finish_reason"] = finish_reason(candidate);
        self.annotate(&mut choice, candidate);
        choice
    }
}

fn finish_reason(candidate: &Candidate) -> Value {
    json!(candidate.finish_reason)
}

/// The sending end of a stream; an error means that the client has gone.
type Out = Sender<Result<Event, Infallible>>;

struct Gone;

async fn send(out: &Out, value: Value) -> Result<(), Gone> {
    send_named(out, None, value).await
}

async fn send_named(out: &Out, name: Option<&str>, value: Value) -> Result<(), Gone> {
    let event = Event::default().data(value.to_string());
    let event = match name {
        Some(name) => event.event(name),
        None => event,
    };
    let sent = out.send_timeout(Ok(event), SLOW_READER).await;
    sent.map_err(|_| Gone)
}

fn stream(frame: Frame, waiting: Vec<(PromptInput, Answers)>, place: Place) -> Response {
    let (out, events) = channel(STREAM_BUFFER);
    tokio::spawn(async move {
        // Held until the last event is on its way.
        let _place = place;
        let frame = Arc::new(frame);
        let mut prompts = JoinSet::new();
        for (prompt_index, (prompt, answers)) in waiting.into_iter().enumerate() {
            let follower = Follower::new(frame.clone(), prompt_index, prompt, out.clone());
            prompts.spawn(follower.follow(answers));
        }
        let mut usage = Usage::default();
        while let Some(ended) = prompts.join_next().await {
            match ended {
                Ok(Ok(Some(of_prompt))) => usage = usage.add(of_prompt),
                // The client has gone; the others' tasks end with the set.
                Ok(Ok(None)) => return,
                Ok(Err(error)) => {
                    let _ = send_named(&out, Some("error"), error.body()).await;
                    return;
                }
                Err(_) => {
                    let error = ApiError::engine_gone();
                    let _ = send_named(&out, Some("error"), error.body()).await;
                    return;
                }
            }
        }
        if frame.ask.include_usage {
            let mut chunk = frame.chunk(Vec::new());
            chunk.insert("usage".to_string(), usage.json());
            if send(&out, Value::Object(chunk)).await.is_err() {
                return;
            }
        }
        let _ = out.send(Ok(Event::default().data("[DONE]"))).await;
    });
    let alive = KeepAlive::new().interval(KEEP_ALIVE);
    let mut response = Sse::new(ReceiverStream::new(events))
        .keep_alive(alive)
        .into_response();
    // Proxies are not to wait for more.
    let no = axum::http::HeaderValue::from_static("no");
    response.headers_mut().insert("x-accel-buffering", no);
    response
}

/// One prompt's part of a stream.
struct Follower {
    frame: Arc<Frame>,
    prompt_index: usize,
    prompt: PromptInput,
    out: Out,
    /// What is not sent yet of the choices that go out as they are written.
    unsent: Vec<Unsent>,
    /// Text of candidates since the last step, for those who watch them.
    watched: BTreeMap<usize, String>,
}

#[derive(Default)]
struct Unsent {
    tokens: Vec<ScoredToken>,
    /// Tokens whose log-probabilities have gone out, and their characters.
    sent_tokens: usize,
    offset: usize,
    /// Bytes of the text that has gone out, less those of the tokens that have.
    ahead: isize,
}

impl Follower {
    fn new(frame: Arc<Frame>, prompt_index: usize, prompt: PromptInput, out: Out) -> Follower {
        let unsent = (0..frame.ask.n).map(|_| Unsent::default()).collect();
        Follower {
            frame,
            prompt_index,
            prompt,
            out,
            unsent,
            watched: BTreeMap::new(),
        }
    }

    /// `None`: the client has gone, and by dropping `answers` the engine hears of it.
    async fn follow(mut self, mut answers: Answers) -> Result<Option<Usage>, ApiError> {
        let frame = self.frame.clone();
        let out = self.out.clone();
        if frame.ask.is_plain() && self.open(0..frame.ask.n).await.is_err() {
            return Ok(None);
        }
        loop {
            let progress = tokio::select! {
                progress = answers.recv() => progress,
                () = out.closed() => return Ok(None),
                () = frame.state.aborted() => return Err(ApiError::draining()),
            };
            let sent = match progress {
                None => return Err(ApiError::engine_gone()),
                Some(Progress::Done(outcome)) => {
                    let completion = completed(Some(outcome), frame.field)?;
                    let generated = written(completion, &frame.ask);
                    let usage = Usage::of(&self.prompt.token_ids, &generated);
                    let sent = self.close(&generated).await;
                    return Ok(sent.is_ok().then_some(usage));
                }
                Some(progress) => self.pass_on(progress).await,
            };
            if sent.is_err() {
                return Ok(None);
            }
        }
    }

    /// Place among the answer's choices.
    fn place(&self, choice: usize) -> usize {
        self.prompt_index * self.frame.ask.n + choice
    }

    async fn open(&self, choices: std::ops::Range<usize>) -> Result<(), Gone> {
        for choice in choices {
            if let Some(opening) = self.frame.opening(self.place(choice), &self.prompt) {
                send(&self.out, Value::Object(self.frame.chunk(vec![opening]))).await?;
            }
        }
        Ok(())
    }

    async fn pass_on(&mut self, progress: Progress) -> Result<(), Gone> {
        let frame = self.frame.clone();
        let ask = &frame.ask;
        let own = |candidate: usize| ask.is_plain() && candidate < ask.n;
        let watch = ask.stream_candidates;
        match progress {
            Progress::Token {
                candidate,
                token,
                logprob,
                top,
            } if own(candidate) && ask.logprobs.is_some() => {
                let (token, logprob) = (token, Some(logprob));
                let tokens = &mut self.unsent[candidate].tokens;
                tokens.push(ScoredToken {
                    token,
                    logprob,
                    top,
                });
            }
            Progress::Text { candidate, piece } => {
                if watch {
                    self.watched.entry(candidate).or_default().push_str(&piece);
                }
                if own(candidate) {
                    let logprobs = self.certain_logprobs(candidate, piece.len());
                    let choice = frame.piece(self.place(candidate), &piece, logprobs);
                    send(&self.out, Value::Object(frame.chunk(vec![choice]))).await?;
                }
            }
            Progress::Finished { candidate, reason } if watch => {
                self.flush_watched().await?;
                let finished = json!({"candidate": candidate, "finish_reason": reason});
                self.tell("podium.finished", finished).await?;
            }
            Progress::Prefill { done, total } if watch => {
                let prefill = json!({"done": done, "total": total});
                self.tell("podium.prefill", prefill).await?;
            }
            Progress::Step if watch => self.flush_watched().await?,
            _ => {}
        }
        Ok(())
    }

    async fn flush_watched(&mut self) -> Result<(), Gone> {
        if self.watched.is_empty() {
            return Ok(());
        }
        let pieces = std::mem::take(&mut self.watched).into_iter();
        let pieces: Vec<Value> = pieces
            .map(|(candidate, text)| json!({"candidate": candidate, "text": text}))
            .collect();
        self.tell("podium.candidates", json!({"pieces": pieces}))
            .await
    }

    /// Sends an event beside the answer: a chunk without choices, which clients that know nothing of
    /// it skip.
    async fn tell(&self, name: &str, fields: Value) -> Result<(), Gone> {
        let mut event = self.frame.chunk(Vec::new());
        event.insert("object".to_string(), json!(name));
        event.insert("prompt_index".to_string(), json!(self.prompt_index));
        if let Value::Object(fields) = fields {
            event.extend(fields);
        }
        send_named(&self.out, Some(name), Value::Object(event)).await
    }

    /// Log-probabilities of the tokens that a piece of text makes certain: a stop string may still
    /// take back the others.
    fn certain_logprobs(&mut self, candidate: usize, piece_len: usize) -> Value {
        let Some(alternatives) = self.frame.ask.logprobs else {
            return Value::Null;
        };
        let tokenizer = &self.frame.state.tokenizer;
        let unsent = &mut self.unsent[candidate];
        unsent.ahead += piece_len as isize;
        let mut certain = 0;
        for scored in &unsent.tokens {
            let bytes = tokenizer.token_bytes(scored.token).len() as isize;
            if bytes > unsent.ahead {
                break;
            }
            unsent.ahead -= bytes;
            certain += 1;
        }
        let tokens: Vec<ScoredToken> = unsent.tokens.drain(..certain).collect();
        unsent.sent_tokens += certain;
        let (form, offset) = (self.frame.ask.form, &mut unsent.offset);
        logprobs_json(form, tokenizer, &tokens, alternatives, offset)
    }

    /// What is left to say once all candidates have ended and one is chosen.
    async fn close(&mut self, generated: &Generated) -> Result<(), Gone> {
        self.flush_watched().await?;
        let frame = self.frame.clone();
        let ask = &frame.ask;
        let tokenizer = &frame.state.tokenizer;
        let order = order(generated, ask.request.strategy, ask.n);
        let mut closings = Vec::with_capacity(order.len());
        for (choice, &index) in order.iter().enumerate() {
            let candidate = &generated.candidates[index];
            let place = self.place(choice);
            if ask.is_plain() {
                // Tokens without text of their own, such as the last of a broken character.
                if let Some(alternatives) = ask.logprobs {
                    let unsent = &mut self.unsent[choice];
                    let mut rest = scored_tokens(ask.form, candidate);
                    rest.drain(..unsent.sent_tokens.min(candidate.token_ids.len()));
                    if !rest.is_empty() {
                        let offset = &mut unsent.offset;
                        let logprobs =
                            logprobs_json(ask.form, tokenizer, &rest, alternatives, offset);
                        let piece = frame.piece(place, "", logprobs);
                        send(&self.out, Value::Object(frame.chunk(vec![piece]))).await?;
                    }
                }
            } else {
                self.open(choice..choice + 1).await?;
                let logprobs = frame.logprobs(&self.prompt, generated, candidate);
                let text = match ask.echo && ask.logprobs.is_some() {
                    true => format!("{}{}", self.prompt.text, candidate.text),
                    false => candidate.text.clone(),
                };
                let piece = frame.piece(place, &text, logprobs);
                send(&self.out, Value::Object(frame.chunk(vec![piece]))).await?;
            }
            closings.push(frame.closing(place, candidate));
        }
        let last = closings.len() - 1;
        for (choice, closing) in closings.into_iter().enumerate() {
            let mut chunk = frame.chunk(vec![closing]);
            if choice == last {
                let results = vec![result(ask, self.prompt_index, generated)];
                chunk.insert("podium".to_string(), podium(ask, results));
            }
            send(&self.out, Value::Object(chunk)).await?;
        }
        Ok(())
    }
}
