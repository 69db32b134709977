//! What `podium generate` prints.

use std::io::{self, Write};

use console::style;
use serde::Serialize;

use super::error::CliError;
use crate::engine::select::Strategy;
use crate::engine::stop::FinishReason;
use crate::engine::{Candidate, Generated, Timings};
use crate::model::text::ChatMessage;
use crate::ranker::Ranker;

/// A request and what came of it, as `--json` prints it.
#[derive(Serialize)]
pub struct Report<'a> {
    pub model: &'a str,
    /// As it was given.
    pub prompt: &'a str,
    /// What it became, where it is the message of a chat.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<&'a [ChatMessage]>,
    pub seed: u64,
    pub strategy: Strategy,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranker: Option<&'a str>,
    pub selected: usize,
    candidates: Vec<ReportedCandidate<'a>>,
    usage: Usage,
    timings: ReportedTimings,
}

#[derive(Serialize)]
struct ReportedCandidate<'a> {
    index: usize,
    text: &'a str,
    token_ids: &'a [u32],
    /// `null`: cut off by the user.
    finish_reason: Option<FinishReason>,
    cumulative_logprob: f64,
    mean_logprob: f64,
    self_certainty: f64,
    /// `null`: there was no ranker.
    score: Option<f32>,
}

#[derive(Serialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
}

#[derive(Serialize)]
struct ReportedTimings {
    prefill_s: f64,
    decode_s: f64,
    features_s: f64,
    rank_s: f64,
    decode_tokens_per_s: f64,
}

/// What was asked.
pub struct Asked<'a> {
    pub model: &'a str,
    pub prompt: &'a str,
    pub messages: Option<&'a [ChatMessage]>,
    pub prompt_tokens: usize,
    pub seed: u64,
    pub strategy: Strategy,
    pub ranker: Option<&'a Ranker>,
}

impl<'a> Report<'a> {
    pub fn new(asked: &Asked<'a>, generated: &'a Generated) -> Report<'a> {
        let reported = |candidate: &'a Candidate| ReportedCandidate {
            index: candidate.index,
            text: &candidate.text,
            token_ids: &candidate.token_ids,
            finish_reason: candidate.finish_reason,
            cumulative_logprob: candidate.cumulative_logprob(),
            mean_logprob: candidate.mean_logprob(),
            self_certainty: candidate.self_certainty,
            score: candidate.score,
        };
        let Timings {
            prefill_s,
            decode_s,
            features_s,
            rank_s,
            decode_tokens_per_s,
        } = generated.timings;
        Report {
            model: asked.model,
            prompt: asked.prompt,
            messages: asked.messages,
            seed: asked.seed,
            strategy: asked.strategy,
            ranker: asked.ranker.map(|ranker| ranker.config().name.as_str()),
            selected: generated.selected,
            candidates: generated.candidates.iter().map(reported).collect(),
            usage: Usage {
                prompt_tokens: asked.prompt_tokens,
                completion_tokens: completion_tokens(generated),
            },
            timings: ReportedTimings {
                prefill_s,
                decode_s,
                features_s,
                rank_s,
                decode_tokens_per_s,
            },
        }
    }

    pub fn print(&self) -> Result<(), CliError> {
        let mut stdout = io::stdout().lock();
        serde_json::to_writer(&mut stdout, self).map_err(io::Error::from)?;
        Ok(writeln!(stdout)?)
    }
}

/// Tokens of all candidates.
fn completion_tokens(generated: &Generated) -> usize {
    generated
        .candidates
        .iter()
        .map(|candidate| candidate.token_ids.len())
        .sum()
}

/// The chosen text, or every candidate with the chosen one marked.
pub fn print_texts(generated: &Generated, all: bool) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    if !all {
        let chosen = &generated.candidates[generated.selected];
        return Ok(writeln!(stdout, "{}", chosen.text)?);
    }
    for (place, candidate) in generated.candidates.iter().enumerate() {
        let chosen = place == generated.selected;
        let headline = headline(candidate, chosen);
        let headline = if chosen {
            style(headline).bold()
        } else {
            style(headline).dim()
        };
        writeln!(stdout, "{headline}\n{}\n", candidate.text)?;
    }
    Ok(())
}

/// One line about a candidate.
fn headline(candidate: &Candidate, chosen: bool) -> String {
    let mark = if chosen { "*" } else { " " };
    let score = candidate
        .score
        .map(|score| format!("score {score:.4}, "))
        .unwrap_or_default();
    let tokens = candidate.token_ids.len();
    let finish = candidate
        .finish_reason
        .map_or("cut off".to_string(), |reason| reason.to_string());
    let chosen = if chosen { ", chosen" } else { "" };
    format!(
        "{mark} [{}] {score}mean log-probability {:.4}, {tokens} {}, {finish}{chosen}",
        candidate.index,
        candidate.mean_logprob(),
        plural(tokens, "token"),
    )
}

/// One line about the work, for standard error.
pub fn print_work(asked: &Asked, generated: &Generated) {
    let Timings {
        prefill_s,
        decode_s,
        features_s,
        rank_s,
        decode_tokens_per_s,
    } = generated.timings;
    let n = generated.candidates.len();
    let ranked = match asked.ranker {
        Some(_) => format!(
            ", features {:.1} ms, ranker {:.2} ms",
            features_s * 1e3,
            rank_s * 1e3
        ),
        None => String::new(),
    };
    let line = format!(
        "{n} {} by {}: {} tokens in {decode_s:.2} s ({decode_tokens_per_s:.0} tokens/s), \
         prompt of {} in {prefill_s:.2} s{ranked}; seed {}",
        plural(n, "candidate"),
        asked.strategy,
        completion_tokens(generated),
        asked.prompt_tokens,
        asked.seed,
    );
    eprintln!("{}", style(line).dim().for_stderr());
}

fn plural(count: usize, word: &str) -> String {
    if count == 1 {
        word.to_string()
    } else {
        format!("{word}s")
    }
}
