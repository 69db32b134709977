//! Whole requests on the CUDA kernels, run by the emulation, against the CPU. With
//! `PODIUM_TEST_DEVICE=cuda` a GPU runs them.

#[path = "support/chat_model.rs"]
mod chat_model;
#[path = "support/golden_file.rs"]
#[allow(dead_code)]
mod golden_file;
#[path = "emulate/wgmma.rs"]
mod wgmma;

use std::ops::ControlFlow::Continue;
use std::path::Path;
use std::sync::Arc;

use assert_cmd::Command;
use chat_model::ChatModel;
use golden_file::{Golden, Reference, folder};
use podium::backend::cpu::Cpu;
use podium::backend::cpu::simd::Isa;
use podium::backend::cuda::Cuda;
use podium::backend::cuda::device::Device;
use podium::backend::cuda::emulated::{Checks, Emulated};
use podium::backend::cuda::gpu::Gpu;
use podium::backend::{Backend, Batch, Group, PAGE_LEN, Segment};
use podium::engine::select::Strategy;
use podium::engine::{Candidate, Engine, GenerateRequest, Generated, ScoreRequest, Scored};
use podium::model::files::ModelFiles;
use podium::model::forward::{Depth, Model};
use podium::ranker::{ExtraInput, Ranker};

/// A model of each family, and of each oddity of one: biases, norms of queries and keys, sliding
/// windows, capped scores and logits, norms on both sides, scaled angles.
const FAMILIES: [&str; 9] = [
    "llama-bias",
    "llama-llama3-rope",
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "gemma2",
    "gemma3",
    "llama-mlp-bias",
];

fn on_cpu(path: &Path) -> Model<Cpu> {
    let files = ModelFiles::open(path).unwrap();
    let cpu = Cpu::new(2, Isa::best()).unwrap().exact();
    Model::load(cpu, &files, &mut |_| {}).unwrap()
}

fn emulated(path: &Path, checks: Checks) -> Model<Cuda> {
    let files = ModelFiles::open(path).unwrap();
    Model::load(cuda(checks), &files, &mut |_| {}).unwrap()
}

/// The emulation, or the GPU that `PODIUM_TEST_DEVICE` names (`cuda`, `cuda:INDEX`).
fn cuda(checks: Checks) -> Cuda {
    let gpu = std::env::var("PODIUM_TEST_DEVICE").ok();
    let gpu = gpu.filter(|name| !name.is_empty() && name != "emulate");
    let device: Arc<dyn Device> = match gpu {
        Some(name) => Arc::new(Gpu::named(&name).unwrap()),
        None => Arc::new(Emulated::new(checks)),
    };
    Cuda::new(device)
}

fn engine<B: Backend>(model: Model<B>) -> Engine<B> {
    Engine::without_text(model).unwrap()
}

fn generate<B: Backend>(engine: &mut Engine<B>, request: &GenerateRequest) -> Generated {
    engine.generate(request, &mut |_| Continue(())).unwrap()
}

/// How far a row may be off, relative to its root mean square, after so many layers.
///
/// Every input of a product is rounded to bfloat16, which puts it off by 2⁻⁸ of its size at most and
/// 2⁻⁸ / √3 in the mean: weights, activations, keys and values. Roundings are independent, so that the
/// mean error after n products in a row is about √(2 n / 3) · 2⁻⁸; a layer has four, and two roundings
/// more of keys and values. Three times that, for layers pass on an error larger than they got it (the
/// largest in these models: 2.7).
fn bound(layers: usize) -> f64 {
    3.0 * (2.0 * (6.0 * layers as f64 + 1.0) / 3.0).sqrt() / 256.0
}

fn root_mean_square(row: &[f32]) -> f64 {
    let sum = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
    (sum / row.len() as f64).sqrt()
}

/// Asserts that the root mean square of the error is within the bound; says what it is.
#[track_caller]
fn assert_near(what: &str, ours: &[f32], reference: &[f32], bound: f64) {
    assert_eq!(ours.len(), reference.len());
    let error: Vec<f32> = ours.iter().zip(reference).map(|(x, y)| x - y).collect();
    let relative = root_mean_square(&error) / root_mean_square(reference);
    println!("{what}: {relative:.2e} of {bound:.2e}");
    // Not `relative > bound`: NaN must not pass.
    assert!(
        relative <= bound,
        "{what}: off by {relative:.2e}, more than {bound:.2e}"
    );
}

fn score<B: Backend>(engine: &mut Engine<B>, golden: &Golden, layers: &[usize]) -> Scored {
    let tokens = |reference: &Reference| reference.tokens.clone();
    let request = ScoreRequest {
        prompt_token_ids: tokens(&golden.prompt),
        candidate_token_ids: golden.candidates.iter().map(tokens).collect(),
        layers: layers.to_vec(),
        logprobs: true,
    };
    engine.score(&request).unwrap()
}

/// Logits behind a prompt.
fn logits<B: Backend>(model: &Model<B>, prompt: &[u32]) -> Vec<f32> {
    let mut state = model.state().unwrap();
    let segment = Segment {
        pages: (0..prompt.len().div_ceil(PAGE_LEN) as u32).collect(),
        start: 0,
        rows: prompt.len(),
    };
    let batch = Batch {
        tokens: prompt.to_vec(),
        groups: vec![Group {
            segments: vec![segment],
            ..Group::default()
        }],
    };
    let depth = Depth {
        layers: model.config.layers,
        capture: &[],
    };
    model.forward(&mut state, &batch, depth).unwrap();
    let last = prompt.len() as u32 - 1;
    let logits = model.logits(&mut state, &[last]).unwrap();
    model.backend.read_row(logits, 0).unwrap()
}

#[test]
fn features_logits_and_log_probabilities_are_the_cpus_within_what_bfloat16_explains() {
    for name in FAMILIES {
        assert_the_cpus_numbers(name, emulated(&folder(name), Checks::default()));
    }
}

#[track_caller]
fn assert_the_cpus_numbers(name: &str, cuda: Model<Cuda>) {
    let (golden, cpu) = (Golden::read(name), on_cpu(&folder(name)));
    let all = cpu.config.layers;
    let [expected, got] = [
        logits(&cpu, &golden.prompt.tokens),
        logits(&cuda, &golden.prompt.tokens),
    ];
    assert_near(&format!("{name}: logits"), &got, &expected, bound(all));
    let layers: Vec<usize> = (1..=all).collect();
    let expected = score(&mut engine(cpu), &golden, &layers);
    let got = score(&mut engine(cuda), &golden, &layers);
    for (i, layer) in layers.iter().enumerate() {
        let what = format!("{name}: prompt after layer {layer}");
        let [ours, reference] = [&got, &expected].map(|s| &s.prompt_features[i]);
        assert_near(&what, ours, reference, bound(*layer));
        for candidate in 0..golden.candidates.len() {
            let what = format!("{name}: candidate {candidate} after layer {layer}");
            let [ours, reference] = [&got, &expected].map(|s| &s.candidate_features[candidate][i]);
            assert_near(&what, ours, reference, bound(*layer));
        }
    }
    for (ours, reference) in got.token_logprobs.iter().zip(&expected.token_logprobs) {
        assert_near(
            &format!("{name}: log-probabilities"),
            ours,
            reference,
            bound(all),
        );
    }
}

/// Where two tokens are all but equally probable, rounding may put either first, and the texts part:
/// there the CPU must have found the other no less probable than the bound explains.
#[test]
fn the_same_greedy_text() {
    let mut parted = Vec::new();
    for name in FAMILIES {
        let golden = Golden::read(name);
        let mut request = GenerateRequest::new(golden.prompt.tokens.clone());
        (request.strategy, request.max_tokens) = (Strategy::Greedy, 10);
        (request.ignore_end, request.top_logprobs) = (true, 5);
        let cpu = on_cpu(&folder(name));
        let close =
            bound(cpu.config.layers) * root_mean_square(&logits(&cpu, &golden.prompt.tokens));
        let expected = &generate(&mut engine(cpu), &request).candidates[0];
        let cuda = emulated(&folder(name), Checks::default());
        let got = &generate(&mut engine(cuda), &request).candidates[0];
        let pairs = got.token_ids.iter().zip(&expected.token_ids);
        let Some(place) = pairs
            .enumerate()
            .find_map(|(i, (a, b))| (a != b).then_some(i))
        else {
            continue;
        };
        let found = &expected.top_logprobs[place];
        let other = found
            .iter()
            .find(|(token, _)| *token == got.token_ids[place]);
        let gap = found[0].1 - other.map_or(f32::NEG_INFINITY, |(_, logprob)| *logprob);
        println!("{name}: parts at token {place}, {gap:.1e} nats apart, of {close:.1e}");
        assert!(
            f64::from(gap) <= close,
            "{name}: token {place} is another, {gap} nats apart"
        );
        parted.push(name);
    }
    assert!(parted.len() <= 1, "{parted:?}");
}

/// All that comes of a candidate, to the bit.
fn bits(candidate: &Candidate) -> impl PartialEq + std::fmt::Debug + use<> {
    let of = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    (
        candidate.token_ids.clone(),
        of(&candidate.token_logprobs),
        candidate
            .features
            .iter()
            .map(|row| of(row))
            .collect::<Vec<_>>(),
    )
}

/// The promise on candidate k, threads in one random order and another: behind a prompt that candidates
/// read one by one (with every check on), and one that they share.
#[test]
fn candidate_k_is_the_same_to_the_bit_whatever_n_is() {
    let all = |generated: &Generated| generated.candidates.iter().map(bits).collect::<Vec<_>>();
    for prompt_len in [37, 300] {
        let run = |n: usize, order: u64| {
            let checks = Checks {
                races: prompt_len == 37,
                order_seed: Some(order),
                ..Checks::default()
            };
            let mut model = emulated(&folder("qwen3"), checks);
            model.config.max_position_embeddings = 2048;
            let prompt = (0..prompt_len).map(|i| (i * i + 7) % 300).collect();
            let mut request = GenerateRequest::new(prompt);
            request.sampling.temperature = 1.5;
            request.sampling.top_p = 0.95;
            request.sampling.repetition_penalty = 1.1;
            (request.n, request.max_tokens, request.seed) = (n, 4, 5);
            (request.feature_layers, request.ignore_end) = (vec![1, 3], true);
            generate(&mut engine(model), &request)
        };
        let (one, seven) = (run(1, 1), run(7, 2));
        assert_eq!(bits(&one.candidates[0]), bits(&seven.candidates[0]));
        if prompt_len == 37 {
            assert_eq!(all(&seven), all(&run(7, 3)));
        }
        let texts = seven.candidates.iter().map(|c| c.token_ids.clone());
        let texts: std::collections::HashSet<_> = texts.collect();
        assert!(texts.len() > 3, "candidates differ");
    }
}

/// Requests in a crowd that has too few pages, so that groups are preempted and replayed, against
/// the same alone.
#[test]
fn a_crowd_changes_nothing() {
    use podium::engine::Completion;
    use podium::engine::scheduler::Limits;
    let golden = Golden::read("qwen3");
    let prompt = &golden.prompt.tokens;
    let requests: Vec<GenerateRequest> = (0..2)
        .map(|i| {
            let mut request = GenerateRequest::new(prompt[i..8 + i].to_vec());
            request.sampling.temperature = 1.5;
            (request.n, request.max_tokens, request.seed) = (2, 34, i as u64);
            request.ignore_end = true;
            request
        })
        .collect();
    let limits = Limits {
        pages: 10,
        cached_pages: 0,
        step_rows: 24,
        candidates: 16,
    };
    let model = || emulated(&folder("qwen3"), Checks::default());
    let mut crowd = engine(model()).with_limits(limits);
    let groups: Vec<_> = requests
        .iter()
        .map(|request| crowd.submit(request.clone()).unwrap())
        .collect();
    let mut done = Vec::new();
    while !crowd.is_idle() {
        done.extend(crowd.step(&mut |_, _| Continue(())));
    }
    assert!(crowd.load().preemptions > 0, "the crowd was too small");
    for (group, request) in groups.iter().zip(&requests) {
        let found = done
            .iter()
            .find(|completed| completed.group == *group)
            .unwrap();
        let Ok(Completion::Generated(together)) = &found.result else {
            panic!("{:?}", found.result.as_ref().err());
        };
        let alone = generate(&mut engine(model()), request);
        let all = |generated: &Generated| generated.candidates.iter().map(bits).collect::<Vec<_>>();
        assert_eq!(all(together), all(&alone));
    }
}

/// A model whose weights are in eight bits on the device, beside the CPU's with the same numbers.
struct EightBits {
    name: &'static str,
    cpu: Model<Cpu>,
    cuda: Model<Cuda>,
}

fn eight_bits(checks: Checks) -> Vec<EightBits> {
    let exact = || Cpu::new(2, Isa::best()).unwrap().exact();
    let on_cpu = |files: &ModelFiles| Model::load(exact(), files, &mut |_| {}).unwrap();
    let q8 = |name| {
        let files = ModelFiles::open(&folder(name)).unwrap().quantized();
        EightBits {
            name,
            cpu: on_cpu(&files),
            cuda: Model::load(cuda(checks), &files, &mut |_| {}).unwrap(),
        }
    };
    let fp8 = |name| {
        let files = ModelFiles::open(&folder(name)).unwrap();
        let rounded = rounded_to_e4m3(name);
        EightBits {
            name,
            cpu: on_cpu(&ModelFiles::open(rounded.path()).unwrap()),
            cuda: Model::load(cuda(checks).fp8(), &files, &mut |_| {}).unwrap(),
        }
    };
    // GGUF's own Q8_0, and 16 bits quantised; e4m3 with and without biases, tied and not.
    vec![
        q8("gguf-q8-0"),
        q8("qwen2-window"),
        fp8("qwen3"),
        fp8("qwen2"),
        fp8("llama-untied"),
    ]
}

/// A copy of a model with every weight matrix rounded to e4m3, a scale an output, by search among all
/// 256 numbers.
fn rounded_to_e4m3(name: &str) -> tempfile::TempDir {
    use safetensors::{Dtype, tensor::TensorView};
    let number = |code: i32| match (code >> 3 & 15, f64::from(code & 7)) {
        (0, fraction) => fraction / 8.0 * 2f64.powi(-6),
        (exponent, fraction) => (1.0 + fraction / 8.0) * 2f64.powi(exponent - 7),
    };
    let numbers: Vec<f64> = (0..0x7F).map(number).collect();
    let files = ModelFiles::open(&folder(name)).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = files
        .tensor_names()
        .map(|name| {
            let tensor = files.tensor(name).unwrap();
            let mut values = tensor.to_f32();
            if tensor.shape.len() == 2 {
                for row in values.chunks_mut(tensor.columns()) {
                    let scale = row.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 448.0;
                    for x in row {
                        let wanted = f64::from(x.abs() / scale);
                        let off = |code: &usize| ((numbers[*code] - wanted).abs(), code % 2);
                        let nearest = (0..numbers.len())
                            .min_by(|a, b| off(a).partial_cmp(&off(b)).unwrap())
                            .unwrap();
                        *x = (numbers[nearest] as f32 * scale).copysign(*x);
                    }
                }
            }
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            (name.to_string(), tensor.shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (name.clone(), view)
    });
    let into = tempfile::tempdir().unwrap();
    safetensors::serialize_to_file(views, None, &into.path().join("model.safetensors")).unwrap();
    for file in ["config.json", "generation_config.json"] {
        std::fs::copy(folder(name).join(file), into.path().join(file)).unwrap();
    }
    into
}

#[test]
fn eight_bit_weights_give_the_cpus_numbers() {
    for EightBits { name, cpu, cuda } in eight_bits(Checks::default()) {
        let golden = Golden::read(name);
        // Bfloat16 would be twice as many as weights; scales and padding are less than half.
        assert!(
            cuda.weight_bytes() < cuda.multiply_adds() * 3 / 2,
            "{name}: {} bytes",
            cuda.weight_bytes()
        );
        let all = cpu.config.layers;
        let [expected, got] = [
            logits(&cpu, &golden.prompt.tokens),
            logits(&cuda, &golden.prompt.tokens),
        ];
        assert_near(&format!("{name}: logits"), &got, &expected, bound(all));
        let expected = score(&mut engine(cpu), &golden, &[1, all]);
        let got = score(&mut engine(cuda), &golden, &[1, all]);
        for (i, layer) in [1, all].into_iter().enumerate() {
            for candidate in 0..golden.candidates.len() {
                let what = format!("{name}: candidate {candidate} after layer {layer}");
                let [ours, reference] =
                    [&got, &expected].map(|s| &s.candidate_features[candidate][i]);
                assert_near(&what, ours, reference, bound(layer));
            }
        }
        for (ours, reference) in got.token_logprobs.iter().zip(&expected.token_logprobs) {
            let what = format!("{name}: log-probabilities");
            assert_near(&what, ours, reference, bound(all));
        }
    }
}

/// One candidate's row and seven go through other kernels, as do a prompt's rows.
#[test]
fn with_eight_bit_weights_candidate_k_is_the_same_too() {
    let run = |n: usize, order: u64| -> Vec<Generated> {
        let checks = Checks {
            races: true,
            order_seed: Some(order),
            ..Checks::default()
        };
        let models = eight_bits(checks).into_iter();
        models
            .map(|model| {
                let prompt = Golden::read(model.name).prompt.tokens;
                let mut request = GenerateRequest::new(prompt);
                request.sampling.temperature = 1.5;
                (request.n, request.max_tokens, request.seed) = (n, 4, 5);
                (request.feature_layers, request.ignore_end) = (vec![1], true);
                generate(&mut engine(model.cuda), &request)
            })
            .collect()
    };
    for (one, twelve) in run(1, 1).iter().zip(&run(12, 2)) {
        assert_eq!(bits(&one.candidates[0]), bits(&twelve.candidates[0]));
    }
}

#[test]
fn the_same_candidate_is_chosen() {
    let model = ChatModel::new(4);
    let path = model.ranker("judge", &[ExtraInput::MeanLogprob]);
    let ranker = Arc::new(Ranker::load(&path).unwrap());
    let mut request = GenerateRequest::new((0..20).map(|i| i * 31 % 700).collect());
    (request.n, request.max_tokens, request.seed) = (6, 8, 3);
    request.sampling.temperature = 1.0;
    request.strategy = Strategy::Ranker;
    request.ranker = Some(ranker.clone());
    request.feature_layers = vec![ranker.config().layer];
    let got = generate(
        &mut engine(emulated(model.path(), Checks::default())),
        &request,
    );
    // The CPU's states of the same texts.
    let scored = engine(on_cpu(model.path()))
        .score(&ScoreRequest {
            prompt_token_ids: request.prompt_token_ids.clone(),
            candidate_token_ids: got.candidates.iter().map(|c| c.token_ids.clone()).collect(),
            layers: vec![ranker.config().layer],
            logprobs: true,
        })
        .unwrap();
    let features: Vec<f32> = scored
        .candidate_features
        .iter()
        .flat_map(|f| f[0].clone())
        .collect();
    let extra: Vec<podium::ranker::ExtraInputs> = scored
        .token_logprobs
        .iter()
        .map(|logprobs| podium::ranker::ExtraInputs {
            mean_logprob: logprobs.iter().sum::<f32>() / logprobs.len() as f32,
            length: logprobs.len() as f32,
        })
        .collect();
    let scores = ranker
        .score(&scored.prompt_features[0], &features, &extra)
        .unwrap();
    let best = (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    assert_eq!(got.selected, best.unwrap());
}

#[test]
fn the_command_line_takes_it() {
    let model = ChatModel::new(4);
    let test_device = std::env::var("PODIUM_TEST_DEVICE");
    let test_device = test_device.unwrap_or_else(|_| "emulate".to_string());
    let run = |n: &str, dtype: &str| {
        let arguments = [
            "generate",
            "Hi",
            "--device",
            &test_device,
            "--max-tokens",
            "6",
            "--seed",
            "3",
        ];
        let output = Command::cargo_bin("podium")
            .unwrap()
            .arg("--model")
            .arg(model.path())
            .args(arguments)
            .args(["--n", n, "--dtype", dtype, "--json"])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        json["candidates"][0].clone()
    };
    for dtype in ["auto", "q8", "fp8"] {
        let (one, three) = (run("1", dtype), run("3", dtype));
        assert_eq!(one["token_ids"], three["token_ids"]);
        assert_eq!(one["cumulative_logprob"], three["cumulative_logprob"]);
    }
}
