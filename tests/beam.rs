//! Beam search against transformers' `generate(num_beams=n)`, on models of several families and on
//! SmolLM2. `tests/reference/beam.py` made the answers, and says how.

#[path = "support/smollm2.rs"]
mod smollm2;

use podium::backend::cpu::Cpu;
use podium::backend::cpu::simd::Isa;
use podium::engine::select::Strategy;
use podium::engine::stop::FinishReason;
use podium::engine::{Engine, GenerateRequest, ScoreRequest};
use podium::model::files::ModelFiles;
use podium::model::forward::Model;
use serde::Deserialize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Mean log-probabilities: what `tests/support/tolerance.rs` allows a single one.
const TOLERANCE: f64 = 1e-4;

#[derive(Deserialize)]
struct Case {
    model: String,
    prompt: Vec<u32>,
    end_tokens: Vec<u32>,
    n: usize,
    max_tokens: usize,
    /// Best first, without their end tokens.
    sequences: Vec<Vec<u32>>,
    /// The end token of each, where it has one.
    ended: Vec<Option<u32>>,
    /// Of each, its end token counted.
    mean_logprobs: Vec<f64>,
}

fn cases() -> Vec<Case> {
    #[derive(Deserialize)]
    struct Golden {
        cases: Vec<Case>,
    }
    let golden: Golden = serde_json::from_str(include_str!("golden/beam.json")).unwrap();
    golden.cases
}

fn engine(path: &Path, end_tokens: &[u32]) -> Engine<Cpu> {
    let files = ModelFiles::open(path).unwrap();
    let cpu = Cpu::new(2, Isa::best()).unwrap().exact();
    let mut model = Model::load(cpu, &files, &mut |_| {}).unwrap();
    model.config.eos_token_ids = end_tokens.to_vec();
    Engine::without_text(model).unwrap()
}

fn check(path: &Path, case: &Case) {
    let what = format!(
        "{}: {} tokens, {} beams, end tokens {:?}",
        case.model,
        case.prompt.len(),
        case.n,
        case.end_tokens
    );
    let mut engine = engine(path, &case.end_tokens);
    let mut request = GenerateRequest::new(case.prompt.clone());
    (request.n, request.max_tokens) = (case.n, case.max_tokens);
    request.strategy = Strategy::Beam;
    let generated = engine
        .generate(&request, &mut |_| ControlFlow::Continue(()))
        .unwrap();
    assert_eq!(generated.selected, 0, "{what}");
    let ours: Vec<&[u32]> = generated
        .candidates
        .iter()
        .map(|candidate| &candidate.token_ids[..])
        .collect();
    assert_eq!(ours, case.sequences, "{what}");

    // An answer has no log-probability of its end token: scoring the answer with it tells.
    let whole = ours.iter().zip(&case.ended).map(|(tokens, end)| {
        let mut tokens = tokens.to_vec();
        tokens.extend(end);
        tokens
    });
    let scored = engine
        .score(&ScoreRequest {
            prompt_token_ids: case.prompt.clone(),
            candidate_token_ids: whole.collect(),
            layers: Vec::new(),
            logprobs: true,
        })
        .unwrap();
    for (index, candidate) in generated.candidates.iter().enumerate() {
        let expected = match case.ended[index] {
            Some(_) => FinishReason::Stop,
            None => FinishReason::Length,
        };
        assert_eq!(candidate.finish_reason, Some(expected), "{what}");
        let scored = &scored.token_logprobs[index];
        let mean = scored.iter().map(|&x| f64::from(x)).sum::<f64>() / scored.len() as f64;
        let error = (mean - case.mean_logprobs[index]).abs();
        assert!(
            error <= TOLERANCE,
            "{what}: mean of {index} is off by {error:.1e}"
        );
        assert_eq!(candidate.token_logprobs.len(), candidate.token_ids.len());
        for (ours, scored) in candidate.token_logprobs.iter().zip(scored) {
            let error = f64::from(ours - scored).abs();
            assert!(error <= TOLERANCE, "{what}: off by {error:.1e}");
        }
    }
}

#[test]
fn small_models_find_what_transformers_finds() {
    for case in cases().iter().filter(|case| case.model != "smollm2") {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/models")
            .join(&case.model);
        let gguf = folder.join("model.gguf");
        let path: PathBuf = if gguf.exists() { gguf } else { folder };
        check(&path, case);
    }
}

#[test]
fn smollm2_finds_what_transformers_finds() {
    let Some(path) = smollm2::path() else { return };
    for case in cases().iter().filter(|case| case.model == "smollm2") {
        check(&path, case);
    }
}

/// The cases hold every turn that the search can take.
#[test]
fn cases_are_of_every_kind() {
    let cases = cases();
    let some = |kind: &dyn Fn(&Case) -> bool| cases.iter().any(kind);
    assert!(some(&|case| case.sequences.iter().any(Vec::is_empty)));
    assert!(some(
        &|case| case.ended.contains(&None) && case.ended.iter().any(Option::is_some)
    ));
    assert!(some(&|case| case.end_tokens.len() > 1));
    // The search was over before the length limit.
    assert!(some(&|case| {
        let longest = case.sequences.iter().map(Vec::len).max().unwrap();
        longest + 2 < case.max_tokens && !case.ended.contains(&None)
    }));
}
