//! The forward pass and the engine against transformers, for a model of every family, every kind of
//! file and every tensor type. `tests/reference/README.md` says how the references were made.

#[path = "support/golden_file.rs"]
mod golden_file;
#[path = "support/smollm2.rs"]
mod smollm2_file;
#[path = "support/tolerance.rs"]
mod tolerance;

use golden_file::{Golden, Reference, folder};
use podium::backend::cpu::Cpu;
use podium::backend::cpu::simd::Isa;
use podium::backend::{Backend, Batch, Group, PAGE_LEN, PageId, Segment};
use podium::engine::select::Strategy;
use podium::engine::stop::FinishReason;
use podium::engine::{Candidate, Engine, EngineError, GenerateRequest, ScoreRequest, Scored};
use podium::model::files::ModelFiles;
use podium::model::forward::{Depth, Model};
use podium::ranker::{builtin, find_builtin};
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use tolerance::{assert_coordinates, assert_logprobs, assert_row};

/// The model's own file: a folder, or a GGUF in it.
fn model_path(name: &str) -> PathBuf {
    let gguf = folder(name).join("model.gguf");
    if gguf.exists() { gguf } else { folder(name) }
}

fn load(path: &Path, threads: usize, isa: Isa) -> Model<Cpu> {
    let files = ModelFiles::open(path).unwrap();
    let exact = Cpu::new(threads, isa).unwrap().exact();
    Model::load(exact, &files, &mut |_| {}).unwrap()
}

/// As a user gets it: quantised weights by byte products, where the processor has them.
fn fast_engine(path: &Path, threads: usize) -> Engine<Cpu> {
    let files = ModelFiles::open(path).unwrap();
    let fast = Cpu::new(threads, Isa::best()).unwrap();
    Engine::without_text(Model::load(fast, &files, &mut |_| {}).unwrap()).unwrap()
}

fn engine(path: &Path, threads: usize, isa: Isa) -> Engine<Cpu> {
    Engine::without_text(load(path, threads, isa)).unwrap()
}

fn request(prompt: &Reference, candidates: &[&Reference], layers: &[usize]) -> ScoreRequest {
    ScoreRequest {
        prompt_token_ids: prompt.tokens.clone(),
        candidate_token_ids: candidates
            .iter()
            .map(|candidate| candidate.tokens.clone())
            .collect(),
        layers: layers.to_vec(),
        logprobs: true,
    }
}

/// Holds what the engine makes of a prompt and candidates against the golden.
fn assert_scores(
    engine: &mut Engine<Cpu>,
    prompt: &Reference,
    candidates: &[&Reference],
    layers: &[usize],
) {
    let scored = engine.score(&request(prompt, candidates, layers)).unwrap();
    let features = |reference: &Reference, ours: &[Vec<f32>]| {
        assert_eq!(ours.len(), layers.len());
        for (layer, (ours, theirs)) in layers.iter().zip(ours.iter().zip(&reference.features)) {
            assert_row(
                &format!("{} after layer {layer}", reference.name),
                ours,
                theirs,
            );
        }
    };
    features(prompt, &scored.prompt_features);
    assert_eq!(scored.candidate_features.len(), candidates.len());
    for (index, candidate) in candidates.iter().enumerate() {
        let what = format!("log-probabilities of {}", candidate.name);
        assert_logprobs(
            &what,
            &scored.token_logprobs[index],
            candidate.logprobs.as_ref().unwrap(),
        );
        features(candidate, &scored.candidate_features[index]);
    }
}

/// Hands out pages of the KV cache one after the other.
#[derive(Default)]
struct Pages(PageId);

impl Pages {
    fn take(&mut self, tokens: usize) -> Vec<PageId> {
        let first = self.0;
        self.0 += tokens.div_ceil(PAGE_LEN) as PageId;
        (first..self.0).collect()
    }
}

/// Logits behind the last token of the prompt, and of each candidate.
fn assert_logits(model: &Model<Cpu>, prompt: &Reference, candidates: &[&Reference]) {
    let mut state = model.state().unwrap();
    let mut pages = Pages::default();
    let depth = Depth {
        layers: model.config.layers,
        capture: &[],
    };
    let mut check = |batch: Batch, sequences: &[&Reference]| {
        model.forward(&mut state, &batch, depth).unwrap();
        let mut next_row = 0;
        let last_rows = sequences.iter().map(|sequence| {
            next_row += sequence.tokens.len() as u32;
            next_row - 1
        });
        let last_rows: Vec<u32> = last_rows.collect();
        let logits = model.logits(&mut state, &last_rows).unwrap();
        for (row, sequence) in sequences.iter().enumerate() {
            if let Some(reference) = &sequence.logits {
                let ours = model.backend.read_row(logits, row).unwrap();
                assert_row(&format!("logits of {}", sequence.name), &ours, reference);
            }
        }
    };
    let mut segment = |sequence: &Reference| {
        let rows = sequence.tokens.len();
        Segment {
            pages: pages.take(rows),
            start: 0,
            rows,
        }
    };
    let prompt_segment = segment(prompt);
    let prefix = prompt_segment.pages.clone();
    let group = Group {
        segments: vec![prompt_segment],
        ..Group::default()
    };
    check(
        Batch {
            tokens: prompt.tokens.clone(),
            groups: vec![group],
        },
        &[prompt],
    );
    if !candidates.is_empty() {
        let segments = candidates
            .iter()
            .map(|candidate| segment(candidate))
            .collect();
        let group = Group {
            prefix,
            prefix_len: prompt.tokens.len(),
            segments,
        };
        let tokens = candidates
            .iter()
            .flat_map(|candidate| &candidate.tokens)
            .copied()
            .collect();
        check(
            Batch {
                tokens,
                groups: vec![group],
            },
            candidates,
        );
    }
}

fn greedy_answer(engine: &mut Engine<Cpu>, golden: &Golden) -> Vec<u32> {
    let mut request = GenerateRequest::new(golden.prompt.tokens.clone());
    request.strategy = Strategy::Greedy;
    request.max_tokens = golden.greedy.len();
    let generated = engine
        .generate(&request, &mut |_| ControlFlow::Continue(()))
        .unwrap();
    generated.candidates[generated.selected].token_ids.clone()
}

/// Features and log-probabilities through the engine and logits of the model, by every instruction set.
fn outputs(name: &str) {
    let golden = Golden::read(name);
    let candidates: Vec<&Reference> = golden.candidates.iter().collect();
    for isa in Isa::available() {
        println!("{}", isa.name());
        assert_logits(
            &load(&model_path(name), 1, isa),
            &golden.prompt,
            &candidates,
        );
        let mut engine = engine(&model_path(name), 1, isa);
        assert_scores(&mut engine, &golden.prompt, &candidates, &golden.layers);
    }
}

/// Token by token: every step reads keys and values that earlier steps have left in the cache.
fn greedy(name: &str) {
    let golden = Golden::read(name);
    for isa in Isa::available() {
        let ours = greedy_answer(&mut engine(&model_path(name), 2, isa), &golden);
        assert_eq!(ours, golden.greedy, "{}", isa.name());
    }
}

/// A prompt of one token, and one that fills the context.
fn extreme_prompts(name: &str) {
    let golden = Golden::read(name);
    let (single, candidate) = golden.single.as_ref().unwrap();
    let full = golden.full.as_ref().unwrap();
    let mut engine = engine(&model_path(name), 1, Isa::best());
    assert_eq!(single.tokens.len(), 1);
    assert_eq!(full.tokens.len(), engine.config().max_position_embeddings);

    assert_scores(&mut engine, single, &[candidate], &golden.layers);
    assert_scores(&mut engine, full, &[], &golden.layers);
    assert_logits(engine.model(), single, &[candidate]);
    assert_logits(engine.model(), full, &[]);

    let context = full.tokens.len();
    let refused = engine
        .score(&request(full, &[candidate], &[1]))
        .unwrap_err();
    assert!(
        matches!(refused, EngineError::CandidateTooLong { candidate: 0, context: limit, .. } if limit == context),
        "{refused}"
    );
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter()
        .map(|row| row.iter().map(|x| x.to_bits()).collect())
        .collect()
}

/// What a user gets, products in whole numbers where the processor has fast ones: weights and
/// activations are off by up to 2^-15 of the greatest of a span, so a product by about 1e-4 of its size,
/// the sum of a few such products in a row by 3e-4, and the worst of some thousand numbers by 1e-3. A
/// wrong scale, pair or sign is off by 1e-2 and more; so would eight bits be.
fn whole_numbers(name: &str) {
    const TOLERANCE: f64 = 2e-3;
    let golden = Golden::read(name);
    let mut engine = fast_engine(&model_path(name), 2);
    for candidate in &golden.candidates {
        let scored = engine
            .score(&request(&golden.prompt, &[candidate], &golden.layers))
            .unwrap();
        let rows = scored.candidate_features[0].iter().zip(&candidate.features);
        let logprobs = candidate.logprobs.as_ref().unwrap();
        let rows = rows.chain([(&scored.token_logprobs[0], logprobs)]);
        for (index, (ours, theirs)) in rows.enumerate() {
            assert_eq!(ours.len(), theirs.len());
            let largest = theirs
                .iter()
                .fold(1.0f64, |most, x| most.max(f64::from(x.abs())));
            for (ours, theirs) in ours.iter().zip(theirs) {
                let off = f64::from(ours - theirs).abs() / largest;
                assert!(
                    off < TOLERANCE,
                    "{} {index}: {ours}, not {theirs}",
                    candidate.name
                );
            }
        }
    }
}

/// What a candidate gets is the same bit for bit whoever shares its batch: it alone, all at once, in
/// another order, in a batch of 7 and of 64, on one thread and on two; and its features do not depend
/// on whether the layers above are run.
fn batching(name: &str) {
    let golden = Golden::read(name);
    let engine_of = |threads| fast_engine(&model_path(name), threads);
    let mut engine = engine_of(1);
    let alone: Vec<Scored> = golden
        .candidates
        .iter()
        .map(|candidate| {
            engine
                .score(&request(&golden.prompt, &[candidate], &golden.layers))
                .unwrap()
        })
        .collect();

    let count = golden.candidates.len();
    let in_order: Vec<usize> = (0..count).collect();
    let reversed = in_order.iter().rev().copied().collect();
    // Every candidate among ever other neighbours.
    let crowd = |size: usize| {
        (0..size)
            .map(|place| (place * place + place / count) % count)
            .collect()
    };
    for order in [in_order, reversed, crowd(7), crowd(64)] {
        for threads in [1, 2] {
            let candidates: Vec<&Reference> = order
                .iter()
                .map(|&index| &golden.candidates[index])
                .collect();
            let together = engine_of(threads)
                .score(&request(&golden.prompt, &candidates, &golden.layers))
                .unwrap();
            assert_eq!(
                bits(&together.prompt_features),
                bits(&alone[0].prompt_features)
            );
            for (place, &index) in order.iter().enumerate() {
                let what = format!(
                    "candidate {index} at place {place} of {}, {threads} threads",
                    order.len()
                );
                let alone = &alone[index];
                assert_eq!(
                    bits(&together.candidate_features[place]),
                    bits(&alone.candidate_features[0]),
                    "{what}"
                );
                let logprobs =
                    |scored: &Scored, place: usize| bits(&scored.token_logprobs[place..=place]);
                assert_eq!(logprobs(&together, place), logprobs(alone, 0), "{what}");
            }
        }
    }

    for (index, &layer) in golden.layers.iter().enumerate() {
        let candidates: Vec<&Reference> = golden.candidates.iter().collect();
        let shallow = ScoreRequest {
            logprobs: false,
            ..request(&golden.prompt, &candidates, &[layer])
        };
        let shallow = engine.score(&shallow).unwrap();
        assert_eq!(
            bits(&shallow.prompt_features),
            bits(&alone[0].prompt_features[index..=index])
        );
        for (candidate, alone) in alone.iter().enumerate() {
            let deep = &alone.candidate_features[0][index..=index];
            assert_eq!(
                bits(&shallow.candidate_features[candidate]),
                bits(deep),
                "layer {layer}"
            );
        }
    }
}

/// Sampled answers: candidate k is the same bit for bit whatever the number of candidates and threads,
/// and its features, caught while decoding, are bit for bit what scoring its tokens finds.
fn generation(name: &str) {
    let golden = Golden::read(name);
    let generate = |prompt: &[u32], n, threads| {
        let mut request = GenerateRequest::new(prompt.to_vec());
        (request.n, request.max_tokens, request.seed) = (n, 20, 11);
        // Hot, for some of these models are very sure of themselves.
        request.sampling.temperature = 4.0;
        request.feature_layers = golden.layers.clone();
        let mut engine = fast_engine(&model_path(name), threads);
        let generated = engine.generate(&request, &mut |_| ControlFlow::Continue(()));
        (generated.unwrap(), engine)
    };
    let single = &golden.single.as_ref().unwrap().0.tokens;
    let full = &golden.full.as_ref().unwrap().tokens;
    let mut ended_early = 0;
    // The last leaves room for three tokens.
    for prompt in [&golden.prompt.tokens[..], single, &full[..full.len() - 3]] {
        let (all, mut engine) = generate(prompt, 64, 1);
        for (n, threads) in [(1, 1), (7, 1), (7, 2), (64, 2)] {
            let (some, _) = generate(prompt, n, threads);
            assert_eq!(some.candidates.len(), n);
            assert_eq!(bits(&some.prompt_features), bits(&all.prompt_features));
            for (some, all) in some.candidates.iter().zip(&all.candidates) {
                let what = format!("candidate {} of {n}, {threads} threads", some.index);
                assert_eq!(some.token_ids, all.token_ids, "{what}");
                assert_eq!(some.finish_reason, all.finish_reason, "{what}");
                assert_eq!(bits(&some.features), bits(&all.features), "{what}");
                let logprobs =
                    |candidate: &Candidate| bits(std::slice::from_ref(&candidate.token_logprobs));
                assert_eq!(logprobs(some), logprobs(all), "{what}");
            }
        }

        let distinct: HashSet<&[u32]> = all.candidates.iter().map(|c| &c.token_ids[..]).collect();
        assert!(
            distinct.len() > 32,
            "{} different answers of 64",
            distinct.len()
        );
        let ended = |c: &&Candidate| c.finish_reason == Some(FinishReason::Stop);
        ended_early += all.candidates.iter().filter(ended).count();
        let scored = engine
            .score(&ScoreRequest {
                prompt_token_ids: prompt.to_vec(),
                candidate_token_ids: all.candidates.iter().map(|c| c.token_ids.clone()).collect(),
                layers: golden.layers.clone(),
                logprobs: true,
            })
            .unwrap();
        for (index, candidate) in all.candidates.iter().enumerate() {
            assert!(candidate.token_ids.len() <= 20.min(full.len() - prompt.len()));
            let scored_features = &scored.candidate_features[index];
            assert_eq!(
                bits(&candidate.features),
                bits(scored_features),
                "candidate {index}"
            );
            let what = format!("log-probabilities of candidate {index}");
            assert_logprobs(
                &what,
                &candidate.token_logprobs,
                &scored.token_logprobs[index],
            );
        }
    }
    // Up to 192 answers of 20 tokens: some draw the end token before the others, but in the models
    // that happen to find it improbable.
    assert!(
        ended_early > 0 || name.starts_with("qwen"),
        "no candidate left the batch early"
    );
}

/// Tests of each model, named after it.
macro_rules! models {
    ($($module:ident: $name:literal,)*) => {
        const NAMES: &[&str] = &[$($name),*];
        $(mod $module {
            #[test]
            fn outputs() {
                super::outputs($name);
            }
            #[test]
            fn greedy() {
                super::greedy($name);
            }
            #[test]
            fn extreme_prompts() {
                super::extreme_prompts($name);
            }
            #[test]
            fn whole_numbers() {
                super::whole_numbers($name);
            }
            #[test]
            fn batching() {
                super::batching($name);
            }
            #[test]
            fn generation() {
                super::generation($name);
            }
        })*
    };
}

models! {
    llama_tied: "llama-tied",
    llama_untied_sharded: "llama-untied",
    llama_bias: "llama-bias",
    llama_mlp_bias: "llama-mlp-bias",
    llama_llama3_rope: "llama-llama3-rope",
    llama_linear_rope: "llama-linear-rope",
    mistral: "mistral",
    qwen2: "qwen2",
    qwen2_window: "qwen2-window",
    qwen3: "qwen3",
    gemma2: "gemma2",
    gemma3: "gemma3",
    gemma3_pattern: "gemma3-pattern",
    gguf_f32: "gguf-f32",
    gguf_f16: "gguf-f16",
    gguf_bf16: "gguf-bf16",
    gguf_q8_0: "gguf-q8-0",
    gguf_q4_0: "gguf-q4-0",
    gguf_q4_1: "gguf-q4-1",
    gguf_q5_0: "gguf-q5-0",
    gguf_q5_1: "gguf-q5-1",
    gguf_q4_k: "gguf-q4-k",
    gguf_q5_k: "gguf-q5-k",
    gguf_q6_k: "gguf-q6-k",
    gguf_untied_mixed: "gguf-untied-mixed",
    gguf_llama3_rope: "gguf-llama3-rope",
    gguf_linear_rope: "gguf-linear-rope",
    gguf_qwen2: "gguf-qwen2",
    gguf_qwen3: "gguf-qwen3",
    gguf_gemma2: "gguf-gemma2",
    gguf_gemma3: "gguf-gemma3",
}

#[test]
fn every_golden_has_tests() {
    let entries = std::fs::read_dir(folder("")).unwrap();
    let mut folders: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    folders.sort();
    let mut tested: Vec<&str> = NAMES.iter().copied().chain(["smollm2"]).collect();
    tested.sort();
    assert_eq!(folders, tested);
}

/// The default model.
mod smollm2 {
    use super::smollm2_file::path;
    use super::*;

    #[test]
    fn outputs() {
        let Some(path) = path() else { return };
        let golden = Golden::read("smollm2");
        let candidates: Vec<&Reference> = golden.candidates.iter().collect();
        assert_logits(&load(&path, 2, Isa::best()), &golden.prompt, &candidates);
        let mut engine = engine(&path, 2, Isa::best());
        assert_scores(&mut engine, &golden.prompt, &candidates, &golden.layers);
    }

    #[test]
    fn features_of_ordinary_size() {
        let Some(path) = path() else { return };
        let golden = Golden::read("smollm2");
        let candidates: Vec<&Reference> = golden.candidates.iter().collect();
        let mut engine = engine(&path, 2, Isa::best());
        let scored = engine
            .score(&request(&golden.prompt, &candidates, &golden.layers))
            .unwrap();
        for (candidate, ours) in candidates.iter().zip(&scored.candidate_features) {
            for (layer, (ours, theirs)) in golden
                .layers
                .iter()
                .zip(ours.iter().zip(&candidate.features))
            {
                let what = format!("{} after layer {layer}", candidate.name);
                assert_coordinates(&what, ours, theirs);
            }
        }
    }

    #[test]
    fn greedy() {
        let Some(path) = path() else { return };
        let golden = Golden::read("smollm2");
        assert_eq!(
            greedy_answer(&mut engine(&path, 2, Isa::best()), &golden),
            golden.greedy
        );
    }

    #[test]
    fn every_shipped_ranker_fits() {
        let Some(path) = path() else { return };
        let engine = fast_engine(&path, 2);
        let (model, config) = (engine.model(), engine.config());
        assert!(!builtin().is_empty());
        for ranker in builtin() {
            let fits = ranker.check_model(&model.fingerprint, config.hidden_size, config.layers);
            assert!(fits.is_ok(), "{fits:?}");
            let name = &ranker.config().name;
            let found = find_builtin(name, &model.fingerprint).unwrap();
            assert_eq!(&found.config().name, name);
        }
    }
}
