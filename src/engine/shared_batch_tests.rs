//! Requests that share the machine: what comes of each is what comes of it alone, bit for bit,
//! whatever joins, leaves, is cancelled, waits or loses its memory meanwhile.

use super::scheduler::{GroupId, Limits};
use super::select::Strategy;
use super::{
    Completion, Engine, EngineError, Event, GenerateRequest, Generated, ScoreRequest, Scored,
};
use crate::backend::cpu::Cpu;
use crate::backend::cpu::simd::Isa;
use crate::backend::random::philox4x32;
use crate::model::files::ModelFiles;
use crate::model::forward::Model;
use std::collections::BTreeMap;
use std::ops::ControlFlow::{Break, Continue};
use std::path::Path;

fn engine(limits: Limits) -> Engine<Cpu> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/llama-tied");
    let files = ModelFiles::open(&path).unwrap();
    let cpu = Cpu::new(2, Isa::best()).unwrap();
    let mut model = Model::load(cpu, &files, &mut |_| {}).unwrap();
    model.config.max_position_embeddings = 2048;
    Engine::without_text(model).unwrap().with_limits(limits)
}

fn crowded(pages: usize, step_rows: usize) -> Limits {
    Limits {
        pages,
        cached_pages: pages / 2,
        step_rows,
        candidates: 32,
    }
}

#[derive(Clone)]
enum Request {
    Write(GenerateRequest),
    Score(ScoreRequest),
}

/// Request `index` of a mixture: all kinds and sizes, many with the same beginning.
fn request(index: u32) -> Request {
    let random = |what: u32, below: u32| philox4x32([index, what, 0, 0], [9, 9])[0] % below;
    let length = 1 + random(0, 90);
    let shared = random(1, 3) * 20;
    let prompt: Vec<u32> = (0..length)
        .map(|i| {
            if i < shared {
                i % 50
            } else {
                (i * i + index) % 300
            }
        })
        .collect();
    if random(2, 4) == 0 {
        let candidate = |k: u32| (0..random(10 + k, 40)).map(|i| (i + k * 7) % 300).collect();
        return Request::Score(ScoreRequest {
            prompt_token_ids: prompt,
            candidate_token_ids: (0..random(3, 5)).map(candidate).collect(),
            layers: vec![2, 1],
            logprobs: random(4, 2) == 0,
        });
    }
    let mut request = GenerateRequest::new(prompt);
    request.n = 1 + random(5, 6) as usize;
    request.max_tokens = 1 + random(6, 140) as usize;
    request.seed = u64::from(random(7, 1000));
    request.sampling.temperature = 2.0;
    request.feature_layers = [vec![], vec![1, 3], vec![2]][random(8, 3) as usize].clone();
    request.stop_token_ids = (0..random(9, 4)).collect();
    request.top_logprobs = random(20, 3) as usize;
    request.prompt_logprobs = (random(21, 3) == 0).then_some(random(22, 3) as usize);
    request.frequency_penalty = random(23, 2) as f32;
    request.presence_penalty = random(24, 2) as f32 * 0.5;
    request.logit_bias = vec![(random(25, 300), 1.5)];
    request.strategy =
        [Strategy::First, Strategy::Logprob, Strategy::Greedy][random(26, 3) as usize];
    Request::Write(request)
}

/// Everything that a request computes, in bits.
fn bits(completion: &Completion) -> Vec<u64> {
    let float = |x: f32| u64::from(x.to_bits());
    match completion {
        Completion::Generated(generated) => {
            let mut bits = vec![generated.selected as u64];
            for candidate in &generated.candidates {
                bits.extend(candidate.token_ids.iter().map(|&token| u64::from(token)));
                bits.extend(candidate.token_logprobs.iter().copied().map(float));
                bits.extend(candidate.features.iter().flatten().copied().map(float));
                bits.push(candidate.finish_reason.map_or(9, |reason| reason as u64));
                for (token, logprob) in candidate.top_logprobs.iter().flatten() {
                    bits.extend([u64::from(*token), float(*logprob)]);
                }
            }
            bits.extend(
                generated
                    .prompt_features
                    .iter()
                    .flatten()
                    .copied()
                    .map(float),
            );
            for token in &generated.prompt_logprobs {
                bits.push(float(token.logprob));
                bits.extend(token.top.iter().map(|(_, logprob)| float(*logprob)));
            }
            bits
        }
        Completion::Scored(scored) => {
            let Scored {
                prompt_features,
                candidate_features,
                token_logprobs,
            } = &**scored;
            let features = prompt_features
                .iter()
                .chain(candidate_features.iter().flatten());
            let features = features.flatten().chain(token_logprobs.iter().flatten());
            features.copied().map(float).collect()
        }
    }
}

/// What comes of each request by itself, in a fresh engine.
fn alone(requests: &[Request]) -> Vec<Vec<u64>> {
    let run = |request: &Request| {
        let mut engine = engine(Limits::default());
        let completion = match request {
            Request::Write(request) => {
                let generated = engine.generate(request, &mut |_| Continue(())).unwrap();
                Completion::Generated(Box::new(generated))
            }
            Request::Score(request) => Completion::Scored(Box::new(engine.score(request).unwrap())),
        };
        assert_eq!(engine.load().used_pages, 0);
        bits(&completion)
    };
    requests.iter().map(run).collect()
}

fn submit(engine: &mut Engine<Cpu>, request: &Request) -> Result<GroupId, EngineError> {
    match request.clone() {
        Request::Write(request) => engine.submit(request),
        Request::Score(request) => engine.submit_score(request),
    }
}

/// Requests that arrive one after the other, `every` so many steps; of those whose place in the order
/// `cancelled` names, nothing is to come. Gives how often somebody lost their pages.
fn together(
    limits: Limits,
    requests: &[Request],
    expected: &[Vec<u64>],
    every: usize,
    cancelled: impl Fn(usize) -> bool,
) -> u64 {
    let mut engine = engine(limits);
    let mut place_of: BTreeMap<GroupId, usize> = BTreeMap::new();
    let (mut next, mut done, mut steps) = (0, 0, 0);
    while next < requests.len() || !engine.is_idle() {
        if next < requests.len() && steps % every == 0 {
            let group = submit(&mut engine, &requests[next]).unwrap();
            place_of.insert(group, next);
            next += 1;
        }
        let victim = place_of.iter().find(|(_, place)| cancelled(**place));
        if let (Some((&group, _)), true) = (victim, steps % 5 == 4) {
            assert!(engine.cancel(group));
            place_of.remove(&group);
            done += 1;
        }
        for completed in engine.step(&mut |_, _| Continue(())) {
            let place = place_of.remove(&completed.group).expect("it ends once");
            let completion = completed.result.unwrap();
            assert!(
                bits(&completion) == expected[place],
                "request {place} of {limits:?}"
            );
            done += 1;
        }
        steps += 1;
    }
    let load = engine.load();
    assert_eq!((done, load.used_pages), (requests.len(), load.cached_pages));
    load.preemptions
}

#[test]
fn results_are_those_of_a_request_alone() {
    let requests: Vec<Request> = (0..40).map(request).collect();
    let expected = alone(&requests);
    let none = |_| false;
    assert_eq!(
        together(crowded(10_000, 512), &requests, &expected, 1, none),
        0
    );
    assert_eq!(
        together(crowded(10_000, 7), &requests, &expected, 3, none),
        0
    );
    // Hardly more memory than the largest request needs.
    let mut preemptions = 0;
    for (pages, step_rows, every) in [(63, 512, 1), (63, 24, 1), (70, 100, 4), (90, 16, 2)] {
        let limits = crowded(pages, step_rows);
        preemptions += together(limits, &requests, &expected, every, none);
        preemptions += together(limits, &requests, &expected, every, |place| place % 3 == 0);
    }
    assert!(preemptions > 10, "only {preemptions} preemptions");
}

#[test]
fn a_prompt_that_begins_like_an_earlier_one_is_not_computed_again() {
    let mut engine = engine(crowded(1000, 512));
    let mut request = GenerateRequest::new((0..100).collect());
    request.feature_layers = vec![3];
    request.max_tokens = 5;
    let proceed = &mut |_: Event| Continue(());
    let first = engine.generate(&request, proceed).unwrap();
    let computed = engine.load().computed_tokens;
    let second = engine.generate(&request, proceed).unwrap();
    // 96 of 100 tokens are six full pages.
    assert_eq!((first.cached_tokens, second.cached_tokens), (0, 96));
    assert_eq!(engine.load().computed_tokens - computed, computed - 96);
    let both = [first, second].map(|generated| bits(&Completion::Generated(Box::new(generated))));
    assert_eq!(both[0], both[1]);
}

#[test]
fn memory_is_refused_before_anything_is_computed_and_beams_run_alone() {
    let mut engine = engine(crowded(10, 64));
    let mut request = GenerateRequest::new(vec![1; 20]);
    (request.n, request.max_tokens) = (4, 40);
    assert!(matches!(
        engine.submit(request.clone()),
        Err(EngineError::Pages(_))
    ));
    request.n = 2;
    request.strategy = Strategy::Beam;
    assert!(matches!(
        engine.submit(request.clone()),
        Err(EngineError::BeamAlone)
    ));
    assert!(engine.is_idle());
    request.strategy = Strategy::First;
    let group = engine.submit(request).unwrap();
    let mut results = Vec::new();
    while !engine.is_idle() {
        results.extend(engine.step(&mut |_, _| Continue(())));
    }
    assert_eq!(results.len(), 1);
    assert_eq!(results[0].group, group);
}

#[test]
fn breaking_off_ends_one_group_and_leaves_the_others() {
    let requests: Vec<Request> = (0..12).map(request).collect();
    let expected = alone(&requests);
    let mut engine = engine(crowded(200, 64));
    let groups: Vec<GroupId> = requests
        .iter()
        .map(|request| submit(&mut engine, request).unwrap())
        .collect();
    let mut heard: BTreeMap<GroupId, usize> = BTreeMap::new();
    let mut results = BTreeMap::new();
    while !engine.is_idle() {
        let completed = engine.step(&mut |group, event| {
            let place = groups.iter().position(|g| *g == group).unwrap();
            let heard = heard.entry(group).or_default();
            assert!(*heard < 8 || place % 2 == 1, "{event:?} after the end");
            *heard += 1;
            match place % 2 == 0 && *heard == 8 {
                true => Break(()),
                false => Continue(()),
            }
        });
        results.extend(completed.into_iter().map(|c| (c.group, c.result)));
    }
    for (place, group) in groups.iter().enumerate() {
        let result = &results[group];
        if place % 2 == 1 {
            assert!(
                bits(result.as_ref().unwrap()) == expected[place],
                "request {place}"
            );
        } else if let (Ok(Completion::Generated(generated)), Request::Write(request)) =
            (result, &requests[place])
        {
            let Generated { candidates, .. } = &**generated;
            for candidate in candidates {
                assert_eq!(candidate.features.len(), request.feature_layers.len());
            }
        }
    }
    let load = engine.load();
    assert_eq!(load.used_pages, load.cached_pages);
}
