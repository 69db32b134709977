//! Prompts' rows through `matmul_wgmma` (`Cuda::wgmma`), which only Hopper and the emulation have.

use super::*;
use podium::backend::cuda::matmul_wgmma::is_supported;
use podium::engine::Completion;
use podium::engine::scheduler::Limits;

const MODEL: &str = "qwen3";

fn model(cuda: Cuda, wgmma: bool) -> Model<Cuda> {
    let files = ModelFiles::open(&folder(MODEL)).unwrap();
    let mut model = Model::load(cuda.wgmma(wgmma), &files, &mut |_| {}).unwrap();
    model.config.max_position_embeddings = 2048;
    model
}

fn request(seed: u64, prompt: usize, n: usize, tokens: usize) -> GenerateRequest {
    let prompt = (0..prompt).map(|i| ((i * i + 7 * seed as usize) % 300) as u32);
    let mut request = GenerateRequest::new(prompt.collect());
    request.sampling.temperature = 1.5;
    (request.n, request.max_tokens, request.seed) = (n, tokens, seed);
    (request.feature_layers, request.ignore_end) = (vec![1, 3], true);
    request
}

fn states(rows: &[Vec<f32>]) -> Vec<u32> {
    rows.iter().flatten().map(|x| x.to_bits()).collect()
}

/// All that comes of a request, to the bit.
fn all_bits(generated: &Generated) -> impl PartialEq + std::fmt::Debug + use<> {
    let candidates = generated.candidates.iter().map(bits);
    (
        states(&generated.prompt_features),
        candidates.collect::<Vec<_>>(),
    )
}

/// Norms on both sides of a product, biases, gates of either kind.
#[test]
fn numbers_are_the_cpus_within_what_bfloat16_explains() {
    for name in ["llama-mlp-bias", "qwen2", "qwen3", "gemma2"] {
        let files = ModelFiles::open(&folder(name)).unwrap();
        let cuda = cuda(Checks::default()).wgmma(true);
        assert_the_cpus_numbers(name, Model::load(cuda, &files, &mut |_| {}).unwrap());
    }
}

/// A prompt in one chunk and in many, alone, beside candidates of others and behind a beginning that is
/// cached, of requests that come and go; and its states, where it and its candidates are only scored.
#[test]
fn what_comes_of_a_request_does_not_depend_on_what_is_beside_it() {
    let requests = [
        request(1, 20, 4, 30),
        request(2, 150, 3, 8),
        request(3, 70, 1, 9),
        // The second's prompt again, from the cache, and three tokens more.
        request(2, 153, 2, 8),
    ];
    let alone = |request: &GenerateRequest, order: u64, races: bool, wgmma: bool| {
        let checks = Checks {
            races,
            order_seed: Some(order),
            ..Checks::default()
        };
        let mut engine = engine(model(cuda(checks), wgmma));
        let generated = generate(&mut engine, request);
        let scored = engine.score(&ScoreRequest {
            prompt_token_ids: request.prompt_token_ids.clone(),
            candidate_token_ids: texts(&generated),
            layers: vec![1, 3],
            logprobs: false,
        });
        let scored = scored.unwrap();
        let same = states(&scored.prompt_features) == states(&generated.prompt_features);
        assert!(same, "the prompt's states where it is scored");
        for (candidate, features) in generated.candidates.iter().zip(&scored.candidate_features) {
            assert_eq!(states(features), states(&candidate.features));
        }
        generated
    };
    let expected: Vec<Generated> = requests
        .iter()
        .enumerate()
        .map(|(i, request)| alone(request, i as u64, i == 2, true))
        .collect();

    let limits = Limits {
        pages: 60,
        cached_pages: 20,
        step_rows: 24,
        candidates: 64,
    };
    let mut crowd = engine(model(cuda(Checks::default()), true)).with_limits(limits);
    let (mut groups, mut done) = (Vec::new(), Vec::new());
    for step in 0.. {
        if step % 3 == 0 && groups.len() < 3 {
            groups.push(crowd.submit(requests[groups.len()].clone()).unwrap());
        } else if groups.len() == 3 && done.len() == 3 {
            groups.push(crowd.submit(requests[3].clone()).unwrap());
        } else if crowd.is_idle() {
            break;
        }
        done.extend(crowd.step(&mut |_, _| Continue(())));
    }
    for ((i, group), expected) in groups.iter().enumerate().zip(&expected) {
        let found = done.iter().find(|completed| completed.group == *group);
        let Ok(Completion::Generated(together)) = &found.unwrap().result else {
            panic!("request {i}");
        };
        let cached = together.cached_tokens;
        assert_eq!(cached, if i == 3 { 144 } else { 0 }, "request {i}");
        assert_eq!(all_bits(together), all_bits(expected), "request {i}");
    }

    if !is_supported(cuda(Checks::default()).device()).unwrap() {
        println!("that bits differ is skipped: this is no Hopper GPU");
        return;
    }
    let without = alone(&requests[1], 1, false, false);
    let [with, without] = [&expected[1], &without].map(|g| states(&g.prompt_features));
    assert_ne!(with, without, "the sums have another order");
}

fn texts(generated: &Generated) -> Vec<Vec<u32>> {
    let candidates = generated.candidates.iter();
    candidates.map(|c| c.token_ids.clone()).collect()
}

/// The four products of a layer, once for each chunk of a prompt, and for nothing else; with weights in
/// eight bits, or where it is off, never.
#[test]
fn it_is_launched_for_prompts_rows_alone() {
    let launches = |eight_bits: bool, wgmma: bool| {
        let device = Arc::new(Emulated::default());
        let cuda = match eight_bits {
            true => Cuda::new(device.clone()).fp8(),
            false => Cuda::new(device.clone()),
        };
        let limits = Limits {
            step_rows: 16,
            ..Limits::default()
        };
        let mut engine = engine(model(cuda, wgmma)).with_limits(limits);
        generate(&mut engine, &request(1, 40, 3, 6));
        device.launches_of("matmul_wgmma")
    };
    let (chunks, layers) = (3, 3);
    assert_eq!(launches(false, true), chunks * layers * 4);
    assert_eq!(launches(true, true), 0);
    assert_eq!(launches(false, false), 0);
}
