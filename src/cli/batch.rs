//! `podium generate --input`: candidates for every item of a file, with their features.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::error::CliError;
use super::generate::{GenerateOptions, chat};
use super::in_order::InOrder;
use super::interrupt;
use super::options::GlobalOptions;
use super::output::Output;
use super::progress::{Progress, Unit};
use super::session::Session;
use crate::backend::random::philox4x32;
use crate::engine::select::Strategy;
use crate::engine::{Candidate, Completion, EngineError, GenerateRequest, Generated};
use crate::tasks::candidates::{CandidateFile, CandidateFileError, Item, Prompt};
use crate::tasks::feature_file::FeatureWriter;

/// Items that are read ahead.
const READ_AHEAD: usize = 16;
/// How often Ctrl-C is looked for while there is nothing to do but to wait for an item.
const PATIENCE: Duration = Duration::from_millis(100);

/// What an item asks for, as far as its line needs it.
struct Asked {
    item: Item,
    fields: Map<String, Value>,
    seed: u64,
}

pub fn run(
    global: &GlobalOptions,
    options: &GenerateOptions,
    input: &Path,
) -> Result<(), CliError> {
    let total = CandidateFile::check(input)?;
    interrupt::catch();
    let mut output = Output::open(options.output.as_deref())?;
    let session = Session::open(global)?;
    let ranker = session.optional_ranker(options.ranker.as_deref())?;
    let layer = options.layer.index(session.engine.config().layers);
    let mut features = match &options.features {
        Some(path) => Some(FeatureWriter::create(path, session.feature_source(layer)?)?),
        None => None,
    };
    let feature_layers: Vec<usize> = features.iter().map(|_| layer).collect();
    let seed = options.seed();
    session.log(|| format!("seed {seed}"));
    let progress = Progress::beside(&output, "generating", total, Unit::Items);
    let inbox = read(input.to_path_buf());
    let of_line = |line: usize, error: CliError| {
        error.at(format!("{}:{line}", CandidateFile::name_of(input)))
    };
    let started = Instant::now();
    let (mut items, mut tokens) = (0, 0);
    let mut lost = None;
    // The end of the input, or what is wrong with an item: those before it are written first.
    let mut input_ended: Option<Result<(), CliError>> = None;
    let (mut session, mut writing) = InOrder::new(session, 0);
    let has_room = |writing: &InOrder<Asked>| match options.strategy() {
        // It does not run beside others.
        Strategy::Beam => writing.is_empty(),
        _ => writing.has_room(options.n),
    };
    'items: loop {
        while input_ended.is_none() && has_room(&writing) {
            let patience = match writing.is_empty() {
                true => PATIENCE,
                false => Duration::ZERO,
            };
            let item = match inbox.recv_timeout(patience) {
                Ok(item) => item,
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => {
                    input_ended = Some(Ok(()));
                    break;
                }
            };
            let begun = item.map_err(CliError::from).and_then(|item| {
                let line = item.line;
                let mut fields = item.fields.clone();
                let prompt = match options.chat {
                    true => as_chat(&item.prompt, options.system.as_deref(), &mut fields),
                    false => item.prompt.clone(),
                };
                let seed = item_seed(seed, writing.next() as u64);
                let prompt = session
                    .prompt_tokens(&prompt)
                    .map_err(|error| of_line(line, error))?;
                let mut request = options.request(&session, prompt, seed, ranker.clone());
                request.feature_layers.clone_from(&feature_layers);
                if let Some(stop) = &item.stop {
                    request.stop.clone_from(stop);
                }
                let asked = Asked { item, fields, seed };
                begin(&mut writing, &mut session, request, asked)
                    .map_err(|error| of_line(line, error.into()))
            });
            input_ended = begun.err().map(Err);
        }
        if interrupt::interrupted() {
            break;
        }
        if writing.is_empty() {
            match input_ended {
                None => continue,
                Some(ended) => break ended?,
            }
        }
        writing.step(&mut session);
        if interrupt::interrupted() {
            break;
        }
        while let Some((_, asked, ended)) = writing.hand_out() {
            let generated = match ended {
                Ok(completions) => generated(completions),
                Err(error @ EngineError::Lost { .. }) => {
                    lost = Some(error.to_string());
                    break 'items;
                }
                Err(error) => return Err(of_line(asked.item.line, error.into())),
            };
            // Nothing was submitted to be scored.
            let Some(generated) = generated else { continue };
            output.line(&line(&asked.item, asked.fields, &generated, asked.seed))?;
            if let Some(features) = &mut features {
                let candidates = generated
                    .candidates
                    .iter()
                    .map(|candidate| &candidate.features[0][..]);
                features.push(&generated.prompt_features[0], candidates)?;
            }
            items += 1;
            let lengths = generated.candidates.iter().map(|c| c.token_ids.len());
            tokens += lengths.sum::<usize>();
            let seconds = started.elapsed().as_secs_f64();
            progress.note(format!("{:.0} tokens/s", tokens as f64 / seconds));
            progress.advance(1);
        }
    }
    drop(progress);
    output.finish()?;
    if let Some(features) = features {
        features.finish()?;
    }
    let interrupted = interrupt::interrupted().then(|| "interrupted".to_string());
    if let Some(why) = lost.or(interrupted) {
        let of = total
            .map(|total| format!(" of {total}"))
            .unwrap_or_default();
        return Err(CliError::Failed(format!(
            "{why}: wrote the first {items}{of} items"
        )));
    }
    let seconds = started.elapsed().as_secs_f64();
    session.log(|| format!("{items} items, {tokens} tokens in {seconds:.1} s"));
    Ok(())
}

/// Reads items on a thread of its own: whoever writes them to a pipe may want the answer to one before
/// the next.
fn read(path: PathBuf) -> Receiver<Result<Item, CandidateFileError>> {
    let (items, inbox) = sync_channel(READ_AHEAD);
    std::thread::spawn(move || match CandidateFile::open(&path) {
        // Where nobody listens any more, there is nothing left to do.
        Ok(mut file) => file.all(|item| items.send(item).is_ok()),
        Err(error) => items.send(Err(error)).is_ok(),
    });
    inbox
}

fn begin(
    writing: &mut InOrder<Asked>,
    session: &mut Session,
    request: GenerateRequest,
    asked: Asked,
) -> Result<(), EngineError> {
    if request.strategy == Strategy::Beam {
        let generated = session
            .engine
            .generate(&request, &mut |_| interrupt::flow());
        writing.ended(asked, generated.map(|g| Completion::Generated(Box::new(g))));
    } else {
        let group = session.engine.submit(request)?;
        writing.begin(asked, &[group]);
    }
    Ok(())
}

/// What was written of an item that has one group.
fn generated(completions: Vec<Completion>) -> Option<Box<Generated>> {
    match completions.into_iter().next()? {
        Completion::Generated(generated) => Some(generated),
        Completion::Scored(_) => None,
    }
}

/// An item's prompt with `--chat`, where plain text is the message of a chat: there, and in the fields
/// of its line.
pub fn as_chat(prompt: &Prompt, system: Option<&str>, fields: &mut Map<String, Value>) -> Prompt {
    let Prompt::Text(text) = prompt else {
        return prompt.clone();
    };
    let messages = chat(system, text);
    fields.shift_remove("prompt");
    fields.insert("messages".to_string(), json!(messages));
    Prompt::Messages(messages)
}

/// The item's line: its fields, then what came of them.
fn line(item: &Item, mut fields: Map<String, Value>, generated: &Generated, seed: u64) -> Value {
    let candidates = &generated.candidates;
    fn each<T: serde::Serialize>(candidates: &[Candidate], of: impl Fn(&Candidate) -> T) -> Value {
        candidates
            .iter()
            .map(|candidate| json!(of(candidate)))
            .collect()
    }
    let mut results = vec![
        ("candidates", each(candidates, |c| c.text.clone())),
        (
            "candidate_token_ids",
            each(candidates, |c| c.token_ids.clone()),
        ),
        ("mean_logprob", each(candidates, Candidate::mean_logprob)),
        ("length", each(candidates, |c| c.token_ids.len())),
        (
            "cumulative_logprob",
            each(candidates, Candidate::cumulative_logprob),
        ),
        ("self_certainty", each(candidates, |c| c.self_certainty)),
        ("finish_reasons", each(candidates, |c| c.finish_reason)),
        ("seed", json!(seed)),
        ("selected", json!(generated.selected)),
    ];
    if candidates.iter().any(|candidate| candidate.score.is_some()) {
        results.push(("scores", each(candidates, |c| c.score)));
    }
    // Labels would be those of other candidates.
    for stale in ["labels", "scores"] {
        fields.shift_remove(stale);
    }
    let mut line = Map::new();
    line.insert("id".to_string(), item.id.clone());
    line.extend(fields);
    line.insert("id".to_string(), item.id.clone());
    line.extend(
        results
            .into_iter()
            .map(|(name, value)| (name.to_string(), value)),
    );
    Value::Object(line)
}

/// The seed of the item at `index`: a number of 53 bits, which every reader of JSON takes exactly,
/// from a stream of its own.
pub fn item_seed(seed: u64, index: u64) -> u64 {
    const STREAM: u32 = 1;
    let key = [seed as u32, (seed >> 32) as u32];
    let [low, high, ..] = philox4x32([index as u32, (index >> 32) as u32, STREAM, 0], key);
    (u64::from(high) << 32 | u64::from(low)) >> 11
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_items_differ_and_stay_the_same() {
        let seeds: std::collections::HashSet<u64> = (0..4)
            .flat_map(|seed| (0..1000).map(move |index| item_seed(seed, index)))
            .collect();
        assert_eq!(seeds.len(), 4000);
        assert!(seeds.iter().all(|&seed| seed < 1 << 53));
        // Files that were made once can be made again.
        assert_eq!(item_seed(7, 3), item_seed(7, 3));
    }
}
