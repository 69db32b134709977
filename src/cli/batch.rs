//! `podium generate --input`: candidates for every item of a file, with their features.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::error::CliError;
use super::generate::{GenerateOptions, chat};
use super::interrupt;
use super::options::GlobalOptions;
use super::output::Output;
use super::progress::{Progress, Unit};
use super::session::Session;
use crate::backend::random::philox4x32;
use crate::engine::{Candidate, EngineError, Generated};
use crate::tasks::candidates::{CandidateFile, Item, Prompt};
use crate::tasks::feature_file::FeatureWriter;

pub fn run(
    global: &GlobalOptions,
    options: &GenerateOptions,
    input: &Path,
) -> Result<(), CliError> {
    let total = CandidateFile::check(input)?;
    interrupt::catch();
    let mut output = Output::open(options.output.as_deref())?;
    let mut session = Session::open(global)?;
    let ranker = session.optional_ranker(options.ranker.as_deref())?;
    let layer = options.layer.index(session.engine.config().layers);
    let mut features = match &options.features {
        Some(path) => Some(FeatureWriter::create(path, session.feature_source(layer)?)?),
        None => None,
    };
    let seed = options.seed();
    session.log(|| format!("seed {seed}"));
    let progress = Progress::beside(&output, "generating", total, Unit::Items);
    let (mut items, mut tokens, mut seconds) = (0, 0, 0.0);
    let mut file = CandidateFile::open(input)?;
    let mut lost = None;
    while let Some(item) = file.next().transpose()? {
        let seed = item_seed(seed, items);
        let (prompt, fields) = as_asked(options, &item);
        let generated = (|| {
            let prompt = session.prompt_tokens(&prompt)?;
            let mut request = options.request(&session, prompt, seed, ranker.clone());
            if let Some(stop) = &item.stop {
                request.stop = stop.clone();
            }
            request.feature_layers = features.iter().map(|_| layer).collect();
            Ok(session
                .engine
                .generate(&request, &mut |_| interrupt::flow())?)
        })();
        if interrupt::interrupted() {
            break;
        }
        if let Err(CliError::Engine(error @ EngineError::Lost { .. })) = generated {
            lost = Some(error.to_string());
            break;
        }
        let generated = generated
            .map_err(|error: CliError| error.at(format!("{}:{}", file.name(), item.line)))?;
        output.line(&line(&item, fields, &generated, seed))?;
        if let Some(features) = &mut features {
            let candidates = generated
                .candidates
                .iter()
                .map(|candidate| &candidate.features[0][..]);
            features.push(&generated.prompt_features[0], candidates)?;
        }
        items += 1;
        tokens += generated
            .candidates
            .iter()
            .map(|candidate| candidate.token_ids.len())
            .sum::<usize>();
        seconds += generated.timings.decode_s;
        progress.note(format!(
            "{:.0} tokens/s",
            tokens as f64 / f64::max(seconds, 1e-9)
        ));
        progress.advance(1);
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
    session.log(|| format!("{items} items, {tokens} tokens, decoded in {seconds:.1} s"));
    Ok(())
}

/// The prompt of an item, and the fields of its line: with `--chat`, a plain prompt becomes the
/// message of a chat, here and there.
fn as_asked(options: &GenerateOptions, item: &Item) -> (Prompt, Map<String, Value>) {
    let mut fields = item.fields.clone();
    let mut prompt = item.prompt.clone();
    if let (Prompt::Text(text), true) = (&prompt, options.chat) {
        let messages = chat(options.system.as_deref(), text);
        fields.shift_remove("prompt");
        fields.insert("messages".to_string(), json!(messages));
        prompt = Prompt::Messages(messages);
    }
    (prompt, fields)
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
