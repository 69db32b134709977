//! Items that the model is writing: several at a time, so that the batch stays full while candidates
//! of one after the other end, and handed out in the order in which they began.

use std::collections::{HashMap, VecDeque};

use serde_json::{Map, Value, json};

use super::{Candidate, CollectOptions};
use crate::cli::batch::item_seed;
use crate::cli::error::CliError;
use crate::cli::generate::chat;
use crate::cli::interrupt;
use crate::cli::session::Session;
use crate::engine::scheduler::{GroupId, Limits};
use crate::engine::select::Strategy;
use crate::engine::stop::FinishReason;
use crate::engine::{Completion, GenerateRequest, Generated, ScoreRequest, Scored};
use crate::tasks::candidates::{Candidates, Item, Prompt};

/// Candidates that decode at a time, where an item does not have more by itself: what a batch gains
/// by more rows is little, and the last layer's rows and the keys and values take memory.
const ROWS: usize = 128;

/// Bytes of keys and values of earlier prompts that are kept: items of a task mostly begin alike, with
/// the same instruction and solved examples.
const CACHED_PROMPT_BYTES: usize = 256 << 20;

/// An item that is being written.
struct Pending {
    line: Map<String, Value>,
    /// The candidates, and with `--greedy` one more answer, for as long as they are not there.
    missing: usize,
    written: Option<Written>,
    greedy: Option<Generated>,
    /// Whether the log-probabilities of given candidates were asked for: the item has none.
    logprobs: bool,
}

enum Written {
    Generated(Generated),
    /// Candidates that came with the item.
    Scored(Scored),
}

/// Items from the first that has not been handed out to the last that has begun.
pub struct Writing {
    pending: VecDeque<Pending>,
    /// The first one's number.
    first: usize,
    /// Of each group, its item, and whether it is the greedy answer.
    groups: HashMap<GroupId, (usize, bool)>,
}

impl Writing {
    /// Nothing yet; `first` is the number of the item to begin with.
    pub fn new(session: Session, first: usize) -> (Session, Writing) {
        let page_bytes = session.engine.page_bytes();
        let limits = Limits {
            cached_pages: CACHED_PROMPT_BYTES / page_bytes,
            candidates: ROWS,
            ..Limits::default()
        };
        let writing = Writing {
            pending: VecDeque::new(),
            first,
            groups: HashMap::new(),
        };
        (session.with_limits(limits), writing)
    }

    /// The number of the next item to begin.
    pub fn next(&self) -> usize {
        self.first + self.pending.len()
    }

    /// Whether there is less in the engine's queue than what may decode at a time.
    pub fn has_room(&self, n: usize) -> bool {
        self.groups.len() * n < 2 * ROWS.max(n)
    }

    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Puts the next item into the engine's queue.
    pub fn begin(
        &mut self,
        session: &mut Session,
        options: &CollectOptions,
        item: &Item,
        layers: &[usize],
    ) -> Result<(), CliError> {
        let number = self.next();
        let mut line = Map::new();
        line.insert("id".to_string(), item.id.clone());
        line.extend(item.fields.clone());
        line.insert("id".to_string(), item.id.clone());
        let mut missing = 1;
        if item.candidates.is_some() {
            let request = ScoreRequest {
                layers: layers.to_vec(),
                logprobs: item.mean_logprob.is_none(),
                ..session.score_request(item)?
            };
            if item.length.is_none() {
                let lengths = request.candidate_token_ids.iter().map(Vec::len);
                line.insert("length".to_string(), lengths.collect());
            }
            let texts = given_texts(session, item, &line, &request)?;
            line.insert("candidates".to_string(), json!(texts));
            let group = session.engine.submit_score(request)?;
            self.groups.insert(group, (number, false));
        } else {
            let mut prompt = item.prompt.clone();
            if let (Prompt::Text(text), true) = (&prompt, options.chat) {
                let messages = chat(options.system.as_deref(), text);
                line.shift_remove("prompt");
                line.insert("messages".to_string(), json!(messages));
                prompt = Prompt::Messages(messages);
            }
            let seed = item_seed(options.seed, number as u64);
            line.insert("seed".to_string(), json!(seed));
            let prompt = session.prompt_tokens(&prompt)?;
            let request = options.request(session, item, prompt, seed);
            let sampled = GenerateRequest {
                feature_layers: layers.to_vec(),
                ..request.clone()
            };
            let group = session.engine.submit(sampled)?;
            self.groups.insert(group, (number, false));
            if options.greedy {
                let greedy = GenerateRequest {
                    strategy: Strategy::Greedy,
                    ..request
                };
                let group = session.engine.submit(greedy)?;
                self.groups.insert(group, (number, true));
                missing += 1;
            }
        }
        self.pending.push_back(Pending {
            line,
            missing,
            written: None,
            greedy: None,
            logprobs: item.candidates.is_some() && item.mean_logprob.is_none(),
        });
        Ok(())
    }

    /// One step of everything that is being written. An error comes with its item's number.
    pub fn step(&mut self, session: &mut Session) -> Result<(), (usize, CliError)> {
        for completed in session.engine.step(&mut |_, _| interrupt::flow()) {
            let Some((number, greedy)) = self.groups.remove(&completed.group) else {
                continue;
            };
            let result = completed.result.map_err(|error| (number, error.into()))?;
            let pending = &mut self.pending[number - self.first];
            pending.missing -= 1;
            match result {
                Completion::Generated(answer) if greedy => pending.greedy = Some(*answer),
                Completion::Generated(written) => {
                    pending.written = Some(Written::Generated(*written));
                }
                Completion::Scored(scored) => pending.written = Some(Written::Scored(*scored)),
            }
        }
        Ok(())
    }

    /// The first item's number, everything of it but its verdicts, and the texts to be judged; once
    /// it is written.
    pub fn hand_out(&mut self) -> Option<(usize, Candidate, Vec<String>)> {
        let first = self.pending.pop_front_if(|first| first.missing == 0)?;
        let number = self.first;
        self.first += 1;
        let (candidate, texts) = match first.written? {
            Written::Generated(generated) => generated_item(first.line, generated, first.greedy),
            Written::Scored(scored) => scored_item(first.line, scored, first.logprobs),
        };
        Some((number, candidate, texts))
    }
}

fn generated_item(
    mut line: Map<String, Value>,
    generated: Generated,
    greedy: Option<Generated>,
) -> (Candidate, Vec<String>) {
    let candidates = generated.candidates;
    let mut texts: Vec<String> = candidates.iter().map(|c| c.text.clone()).collect();
    let token_ids: Vec<&Vec<u32>> = candidates.iter().map(|c| &c.token_ids).collect();
    let lengths: Vec<usize> = candidates.iter().map(|c| c.token_ids.len()).collect();
    let mean_logprob: Vec<f64> = candidates.iter().map(|c| c.mean_logprob()).collect();
    let self_certainty: Vec<f64> = candidates.iter().map(|c| c.self_certainty).collect();
    let reasons: Vec<Option<FinishReason>> = candidates.iter().map(|c| c.finish_reason).collect();
    let seed = line.shift_remove("seed");
    for (name, value) in [
        ("candidates", json!(texts)),
        ("candidate_token_ids", json!(token_ids)),
        ("labels", Value::Null),
        ("answers", Value::Null),
        ("mean_logprob", json!(mean_logprob)),
        ("length", json!(lengths)),
        ("self_certainty", json!(self_certainty)),
        ("finish_reasons", json!(reasons)),
        ("seed", json!(seed)),
    ] {
        line.insert(name.to_string(), value);
    }
    let greedy = greedy.map(|greedy| {
        let answer = &greedy.candidates[0];
        texts.push(answer.text.clone());
        let mut fields = Map::new();
        fields.insert("text".to_string(), json!(answer.text));
        fields.insert("mean_logprob".to_string(), json!(answer.mean_logprob()));
        fields
    });
    let candidate = Candidate {
        line,
        prompt_features: generated.prompt_features,
        features: candidates.into_iter().map(|c| c.features).collect(),
        greedy,
    };
    (candidate, texts)
}

/// The texts of candidates that came with the item.
fn given_texts(
    session: &Session,
    item: &Item,
    line: &Map<String, Value>,
    request: &ScoreRequest,
) -> Result<Vec<String>, CliError> {
    if let Some(Candidates::Texts(texts)) = &item.candidates {
        return Ok(texts.clone());
    }
    // The texts of token ids, where the line has them beside.
    if let Some(texts) = line.get("candidates").and_then(Value::as_array) {
        let texts = texts.iter().filter_map(Value::as_str);
        return Ok(texts.map(str::to_string).collect());
    }
    let tokenizer = session.tokenizer()?;
    let token_ids = &request.candidate_token_ids;
    Ok(token_ids
        .iter()
        .map(|ids| tokenizer.decode(ids, true))
        .collect())
}

fn scored_item(
    mut line: Map<String, Value>,
    scored: Scored,
    logprobs: bool,
) -> (Candidate, Vec<String>) {
    if logprobs {
        let means = scored.token_logprobs.iter().map(|logprobs| {
            let sum: f64 = logprobs.iter().map(|&logprob| f64::from(logprob)).sum();
            sum / logprobs.len().max(1) as f64
        });
        line.insert("mean_logprob".to_string(), means.collect());
    }
    let texts = line.get("candidates").and_then(Value::as_array);
    let texts = texts.into_iter().flatten().filter_map(Value::as_str);
    let texts = texts.map(str::to_string).collect();
    let candidate = Candidate {
        line,
        prompt_features: scored.prompt_features,
        features: scored.candidate_features,
        greedy: None,
    };
    (candidate, texts)
}
