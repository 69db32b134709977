//! Steps of the CUDA backend on the emulation: recorded ones against plain ones, ranking on the device,
//! full memory and lost devices.

#[path = "support/chat_model.rs"]
mod chat_model;
#[path = "support/golden_file.rs"]
#[allow(dead_code)]
mod golden_file;

use std::ops::ControlFlow::Continue;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use assert_cmd::Command;
use chat_model::ChatModel;
use golden_file::folder;
use podium::backend::BackendError;
use podium::backend::cuda::Cuda;
use podium::backend::cuda::device::{
    Address, Arguments, Device, DeviceError, Fill, GraphId, Launch, Memory,
};
use podium::backend::cuda::emulated::{Checks, Emulated};
use podium::engine::scheduler::Limits;
use podium::engine::select::Strategy;
use podium::engine::{Candidate, Completion, Engine, EngineError, GenerateRequest, Generated};
use podium::model::files::ModelFiles;
use podium::model::forward::{LoadError, Model};
use podium::ranker::{ExtraInput, Ranker};

fn load(path: &Path, cuda: Cuda) -> Result<Model<Cuda>, LoadError> {
    Model::load(cuda, &ModelFiles::open(path).unwrap(), &mut |_| {})
}

fn engine(path: &Path, cuda: Cuda) -> Engine<Cuda> {
    Engine::without_text(load(path, cuda).unwrap()).unwrap()
}

fn emulated(checks: Checks) -> Cuda {
    Cuda::new(Arc::new(Emulated::new(checks)))
}

/// All that comes of a candidate, to the bit.
fn bits(candidate: &Candidate) -> impl PartialEq + std::fmt::Debug + use<> {
    let of = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let tops = candidate.top_logprobs.iter().flatten();
    (
        candidate.token_ids.clone(),
        of(&candidate.token_logprobs),
        tops.map(|(token, logprob)| (*token, logprob.to_bits()))
            .collect::<Vec<_>>(),
        candidate
            .features
            .iter()
            .map(|row| of(row))
            .collect::<Vec<_>>(),
    )
}

fn all_bits(generated: &[Generated]) -> Vec<impl PartialEq + std::fmt::Debug + use<>> {
    let candidates = generated.iter().flat_map(|g| &g.candidates);
    candidates.map(bits).collect()
}

/// Runs requests together; a new one is submitted every so many steps.
fn together(
    engine: &mut Engine<Cuda>,
    requests: &[GenerateRequest],
    every: usize,
) -> Vec<Generated> {
    let (mut groups, mut done) = (Vec::new(), Vec::new());
    for step in 0.. {
        if step % every == 0
            && let Some(request) = requests.get(groups.len())
        {
            groups.push(engine.submit(request.clone()).unwrap());
        }
        if engine.is_idle() && groups.len() == requests.len() {
            break;
        }
        done.extend(engine.step(&mut |_, _| Continue(())));
    }
    let result = |group| {
        let found = done.iter().position(|completed| completed.group == group);
        match done.remove(found.unwrap()).result {
            Ok(Completion::Generated(generated)) => *generated,
            other => panic!("{other:?}"),
        }
    };
    groups.into_iter().map(result).collect()
}

/// Requests of many sizes, whose candidates end one by one: prompts that are shared and that are not,
/// every way to change logits.
fn requests() -> Vec<GenerateRequest> {
    [(7, 9, 40), (1, 300, 22), (5, 30, 30), (3, 280, 12)]
        .into_iter()
        .enumerate()
        .map(|(i, (n, prompt, tokens))| {
            let prompt = (0..prompt).map(|t| (t * t + 7 * i as u32) % 280);
            let mut request = GenerateRequest::new(prompt.collect());
            (request.n, request.max_tokens, request.seed) = (n, tokens, i as u64);
            request.sampling.temperature = 1.5;
            request.feature_layers = vec![1, 2];
            // A twentieth of the tokens end an answer, so that few reach the limit.
            request.stop_token_ids = (0..280).filter(|t| t % 20 == 3).collect();
            match i {
                0 => request.sampling.repetition_penalty = 1.3,
                1 => request.top_logprobs = 3,
                2 => (request.sampling.top_p, request.frequency_penalty) = (0.9, 0.5),
                _ => request.logit_bias = vec![(5, 2.0)],
            }
            request
        })
        .collect()
}

fn crowd(path: &Path, cuda: Cuda) -> Engine<Cuda> {
    let mut model = load(path, cuda).unwrap();
    model.config.max_position_embeddings = 2048;
    let limits = Limits {
        pages: 1000,
        cached_pages: 10,
        step_rows: 64,
        candidates: 64,
    };
    Engine::without_text(model).unwrap().with_limits(limits)
}

#[test]
fn recorded_steps_are_those_that_were_launched() {
    // Heads for tensor cores and for the plain form of attention; windows, caps and post-norms.
    for name in ["qwen3", "gemma2"] {
        let path = folder(name);
        let mut plain = crowd(&path, emulated(Checks::default()).without_graphs());
        let expected = together(&mut plain, &requests(), 3);
        let usage = plain.model().backend.graph_use();
        assert_eq!(
            (usage.plain.load(Relaxed), usage.recorded.load(Relaxed)),
            (0, 0)
        );

        let mut recorded = crowd(&path, emulated(Checks::default()));
        let got = together(&mut recorded, &requests(), 3);
        assert_eq!(all_bits(&got), all_bits(&expected), "{name}");
        let lengths = got
            .iter()
            .flat_map(|g| &g.candidates)
            .map(|c| c.token_ids.len());
        let lengths: std::collections::BTreeSet<usize> = lengths.collect();
        assert!(
            lengths.len() > 5 && lengths.last() > Some(&16),
            "{lengths:?}"
        );
        let usage = recorded.model().backend.graph_use();
        let counts = [&usage.plain, &usage.recorded, &usage.replayed].map(|c| c.load(Relaxed));
        println!("{name}: launched, recorded, replayed: {counts:?}");
        assert!(counts[1] >= 3 && counts[2] > counts[1] + 3, "{counts:?}");
    }
}

/// An emulated device that is watched, and may be made to do wrong.
struct Watched {
    inner: Emulated,
    /// Once a recording was replayed, what the host sends is lost: what a step reads is what it was when
    /// the step was recorded, as if it were an argument.
    keeps_old: bool,
    replayed: Mutex<bool>,
    kernels: Mutex<Vec<String>>,
    /// Calls while a step runs: what the host sent, what it read, memory that it asked for.
    calls: Mutex<[usize; 3]>,
}

impl Watched {
    fn new(keeps_old: bool) -> Arc<Watched> {
        Arc::new(Watched {
            inner: Emulated::default(),
            keeps_old,
            replayed: Mutex::new(false),
            kernels: Mutex::default(),
            calls: Mutex::default(),
        })
    }

    fn count(&self, call: usize) {
        self.calls.lock().unwrap()[call] += 1;
    }
}

impl Device for Watched {
    fn name(&self) -> String {
        self.inner.name()
    }
    fn memory(&self) -> Result<Memory, DeviceError> {
        self.inner.memory()
    }
    fn allocate(&self, bytes: usize, what: &str) -> Result<Address, DeviceError> {
        self.count(2);
        self.inner.allocate(bytes, what)
    }
    unsafe fn free(&self, address: Address) {
        // SAFETY: the caller's promise.
        unsafe { self.inner.free(address) }
    }
    fn upload_by(
        &self,
        to: Address,
        bytes: usize,
        unit: usize,
        fill: Fill,
    ) -> Result<(), DeviceError> {
        self.count(0);
        match self.keeps_old && *self.replayed.lock().unwrap() {
            true => Ok(()),
            false => self.inner.upload_by(to, bytes, unit, fill),
        }
    }
    fn download(&self, from: Address, to: &mut [u8]) -> Result<(), DeviceError> {
        self.count(1);
        self.inner.download(from, to)
    }
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), DeviceError> {
        self.inner.copy(from, to, bytes)
    }
    fn zero(&self, at: Address, bytes: usize) -> Result<(), DeviceError> {
        self.inner.zero(at, bytes)
    }
    unsafe fn launch(
        &self,
        kernel: &str,
        launch: Launch,
        arguments: &mut Arguments,
    ) -> Result<(), DeviceError> {
        self.kernels.lock().unwrap().push(kernel.to_string());
        // SAFETY: the caller's promise.
        unsafe { self.inner.launch(kernel, launch, arguments) }
    }
    fn begin_recording(&self) -> Result<(), DeviceError> {
        self.inner.begin_recording()
    }
    fn end_recording(&self) -> Result<GraphId, DeviceError> {
        self.inner.end_recording()
    }
    unsafe fn replay(&self, graph: GraphId) -> Result<(), DeviceError> {
        *self.replayed.lock().unwrap() = true;
        // SAFETY: the caller's promise.
        unsafe { self.inner.replay(graph) }
    }
    fn free_recording(&self, graph: GraphId) {
        self.inner.free_recording(graph);
    }
    fn synchronize(&self) -> Result<(), DeviceError> {
        self.inner.synchronize()
    }
    fn multiprocessors(&self) -> usize {
        self.inner.multiprocessors()
    }
    fn max_shared_bytes(&self) -> u32 {
        self.inner.max_shared_bytes()
    }
}

/// The planted bug: had a step anything in its recording that changes from step to step, it would show.
#[test]
fn a_recording_that_kept_what_changes_would_be_noticed() {
    let run = |keeps_old: bool| {
        let watched = Watched::new(keeps_old);
        let mut engine = crowd(&folder("qwen3"), Cuda::new(watched.clone()));
        let mut request = requests().remove(0);
        request.stop_token_ids.clear();
        request.feature_layers.clear();
        request.ignore_end = true;
        let generated = engine.generate(&request, &mut |_| Continue(())).unwrap();
        assert!(*watched.replayed.lock().unwrap());
        all_bits(&[generated])
    };
    assert_ne!(run(true), run(false));
}

/// A replayed step sends once, reads once, and asks for no memory.
#[test]
fn a_replayed_step_is_one_copy_there_and_one_back() {
    let watched = Watched::new(false);
    let mut engine = crowd(&folder("qwen3"), Cuda::new(watched.clone()));
    let mut request = GenerateRequest::new((0..20).collect());
    (request.n, request.max_tokens, request.ignore_end) = (3, 24, true);
    request.sampling.temperature = 1.0;
    engine.submit(request).unwrap();
    let mut clean = 0;
    while !engine.is_idle() {
        let replayed = &engine.model().backend.graph_use().replayed;
        let before = replayed.load(Relaxed);
        *watched.calls.lock().unwrap() = [0; 3];
        engine.step(&mut |_, _| Continue(()));
        let replayed = &engine.model().backend.graph_use().replayed;
        if replayed.load(Relaxed) > before {
            assert_eq!(*watched.calls.lock().unwrap(), [1, 1, 0]);
            clean += 1;
        }
    }
    assert!(clean > 10, "{clean} steps were replayed");
}

/// Groups that end in one step, each with a ranker of its own, and one without.
#[test]
fn groups_that_end_together_are_ranked_by_one_launch_as_on_the_host() {
    let model = ChatModel::new(4);
    let rankers = [("judge", vec![ExtraInput::MeanLogprob]), ("critic", vec![])];
    let rankers =
        rankers.map(|(name, extra)| Arc::new(Ranker::load(&model.ranker(name, &extra)).unwrap()));
    let watched = Watched::new(false);
    let mut engine = engine(model.path(), Cuda::new(watched.clone()));
    engine = engine.with_limits(Limits {
        pages: 500,
        ..Limits::default()
    });
    let mut requests = Vec::new();
    for (i, ranker) in [Some(&rankers[0]), Some(&rankers[1]), None]
        .into_iter()
        .enumerate()
    {
        let mut request = GenerateRequest::new((0..20 + i as u32).map(|t| t * 31 % 700).collect());
        (request.n, request.max_tokens, request.seed) = (4 + i, 8, 3);
        request.sampling.temperature = 1.0;
        request.ignore_end = true;
        if let Some(ranker) = ranker {
            request.strategy = Strategy::Ranker;
            request.ranker = Some(Arc::clone(ranker));
            request.feature_layers = vec![ranker.config().layer];
        }
        requests.push(request);
    }
    let apart: Vec<Generated> = requests
        .iter()
        .map(|request| engine.generate(request, &mut |_| Continue(())).unwrap())
        .collect();
    let launches = || {
        let kernels = watched.kernels.lock().unwrap();
        kernels
            .iter()
            .filter(|kernel| *kernel == "gather_rank")
            .count()
    };
    let alone = launches();
    assert_eq!(alone, 2, "one for each group that has a ranker");
    let groups: Vec<_> = requests
        .iter()
        .map(|r| engine.submit(r.clone()).unwrap())
        .collect();
    let mut done = Vec::new();
    while !engine.is_idle() {
        done.extend(engine.step(&mut |_, _| Continue(())));
    }
    assert_eq!(launches() - alone, 1, "one launch for both groups");
    for ((group, request), apart) in groups.iter().zip(&requests).zip(&apart) {
        let found = done.iter().find(|completed| completed.group == *group);
        let Ok(Completion::Generated(generated)) = &found.unwrap().result else {
            panic!("group {group}");
        };
        assert_eq!(generated.selected, apart.selected);
        let scores = |g: &Generated| -> Vec<Option<u32>> {
            g.candidates
                .iter()
                .map(|c| c.score.map(f32::to_bits))
                .collect()
        };
        assert_eq!(scores(generated), scores(apart));
        let Some(ranker) = &request.ranker else {
            continue;
        };
        // The same states, ranked by the CPU.
        let states = generated
            .candidates
            .iter()
            .flat_map(|c| c.features[0].clone());
        let extra = generated
            .candidates
            .iter()
            .map(|c| podium::ranker::ExtraInputs {
                mean_logprob: c.mean_logprob() as f32,
                length: c.token_ids.len() as f32,
            });
        let (states, extra): (Vec<f32>, Vec<_>) = (states.collect(), extra.collect());
        let expected = ranker
            .score(&generated.prompt_features[0], &states, &extra)
            .unwrap();
        let best = (0..expected.len()).max_by(|&a, &b| expected[a].total_cmp(&expected[b]));
        assert_eq!(Some(generated.selected), best);
        let largest = expected.iter().fold(0f32, |a, b| a.max(b.abs()));
        for (candidate, expected) in generated.candidates.iter().zip(expected) {
            // Products of two bfloat16 each are off by 2e-5 of their terms' size at most, which is
            // some times that of the score.
            let error = (candidate.score.unwrap() - expected).abs();
            assert!(error <= 2e-4 * largest.max(1.0), "{error} of {largest}");
        }
    }
}

fn lost_after(launches: u64) -> Cuda {
    emulated(Checks {
        lost_after: Some(launches),
        ..Checks::default()
    })
}

#[test]
fn a_lost_device_ends_a_request_with_its_texts_so_far() {
    let path = folder("qwen3");
    let mut request = GenerateRequest::new((0..20).collect());
    (request.n, request.max_tokens, request.ignore_end) = (3, 12, true);
    request.sampling.temperature = 1.0;
    let proceed = &mut |_: podium::engine::Event| Continue(());
    let device = Arc::new(Emulated::default());
    let whole = engine(&path, Cuda::new(device.clone()))
        .generate(&request, proceed)
        .unwrap();
    let all = device.launches();
    let mut seen = Vec::new();
    // In the prefill, in plain steps, in replayed ones.
    for launches in [5, all / 5, all / 2, all * 9 / 10] {
        let mut engine = engine(&path, lost_after(launches));
        match engine.generate(&request, proceed).unwrap_err() {
            EngineError::Lost { source, so_far } => {
                let expected = format!(
                    "a kernel failed: the emulated device was to be lost after {launches} launches"
                );
                assert_eq!(source.to_string(), expected);
                for (cut, whole) in so_far.candidates.iter().zip(&whole.candidates) {
                    let tokens = cut.token_ids.len();
                    assert!(tokens > 0 && cut.finish_reason.is_none());
                    assert_eq!(cut.token_ids, whole.token_ids[..tokens]);
                }
                seen.push(so_far.candidates[0].token_ids.len());
            }
            // Before the first token there is no text.
            EngineError::Backend(BackendError::Device(DeviceError::Fault(_))) => seen.push(0),
            other => panic!("{other}"),
        }
        assert!(engine.is_idle());
        // From then on it says so at once.
        assert!(engine.generate(&request, proceed).is_err());
    }
    println!("tokens that each candidate had: {seen:?}");
    assert!(
        seen[0] == 0 && seen.is_sorted() && seen[3] > seen[1],
        "{seen:?}"
    );
}

#[test]
fn what_does_not_fit_is_refused_before_it_starts() {
    let path = folder("qwen3");
    let with = |bytes: usize| {
        emulated(Checks {
            memory: Some(bytes),
            ..Checks::default()
        })
    };
    let refused = load(&path, with(1_000_000)).err().unwrap().to_string();
    println!("{refused}");
    assert!(
        refused.starts_with("out of device memory for weights ("),
        "{refused}"
    );
    assert!(refused.ends_with("1.0 MB free"), "{refused}");

    let mut model = load(&path, with(80 << 20)).unwrap();
    model.config.max_position_embeddings = 1 << 20;
    let mut engine = Engine::without_text(model).unwrap();
    let mut request = GenerateRequest::new((0..20).collect());
    (request.n, request.max_tokens) = (64, 100_000);
    let launched = |engine: &Engine<Cuda>| engine.load().computed_tokens;
    let proceed = &mut |_: podium::engine::Event| Continue(());
    let refused = engine.generate(&request, proceed).unwrap_err().to_string();
    println!("{refused}");
    assert!(
        refused.contains("keys and values of the request"),
        "{refused}"
    );
    assert_eq!(launched(&engine), 0);
    request.n = 2;
    request.max_tokens = 5;
    engine.generate(&request, proceed).unwrap();

    let limits = Limits {
        pages: 1_000_000,
        ..Limits::default()
    };
    let refused = engine.with_room_for(limits).err().unwrap().to_string();
    assert!(
        refused.starts_with("out of device memory for the KV cache: "),
        "{refused}"
    );
}

#[test]
fn the_command_line_says_what_happened_to_the_device() {
    let model = ChatModel::new(4);
    let run = |variable: &str, value: &str| {
        let mut command = Command::cargo_bin("podium").unwrap();
        command
            .args([
                "generate",
                "Hi",
                "--device",
                "emulate",
                "--n",
                "3",
                "--max-tokens",
                "40",
            ])
            .args(["--seed", "3", "--all", "--json", "--model"])
            .arg(model.path())
            .env(variable, value);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let error = String::from_utf8(output.stderr).unwrap();
        let last = error.lines().last().unwrap().to_string();
        (String::from_utf8(output.stdout).unwrap(), last)
    };
    let (text, error) = run("PODIUM_EMULATE_LOST_AFTER", "150");
    assert_eq!(
        error,
        "podium: the device failed: a kernel failed: the emulated device was to be lost after 150 launches: these are the texts so far"
    );
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let tokens = json["candidates"][2]["token_ids"].as_array().unwrap();
    assert!((1..40).contains(&tokens.len()), "{} tokens", tokens.len());

    let (text, error) = run("PODIUM_EMULATE_MEMORY", "2000000");
    assert_eq!(text, "");
    assert!(
        error.starts_with("podium: out of device memory for weights (")
            && error.ends_with("2.0 MB free"),
        "{error}"
    );
}
