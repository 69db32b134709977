//! Requests that are broken off: what the caller gets, that all pages come back, and that the next
//! request does not notice.

use super::scheduler::Limits;
use super::select::Strategy;
use super::{Candidate, Engine, EngineError, Event, GenerateRequest, Generated, ScoreRequest};
use crate::backend::cpu::Cpu;
use crate::backend::cpu::simd::Isa;
use crate::backend::{Backend, PAGE_LEN};
use crate::model::files::ModelFiles;
use crate::model::forward::Model;
use std::ops::ControlFlow::{self, Break, Continue};
use std::path::Path;

const STRATEGIES: [Strategy; 3] = [Strategy::First, Strategy::Greedy, Strategy::Beam];

/// A small random model that is allowed prompts of several chunks.
fn engine() -> Engine<Cpu> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/llama-tied");
    let files = ModelFiles::open(&path).unwrap();
    let cpu = Cpu::new(1, Isa::best()).unwrap();
    let mut model = Model::load(cpu, &files, &mut |_| {}).unwrap();
    model.config.max_position_embeddings = 4 * Cpu::PROMPT_ROWS;
    Engine::without_text(model).unwrap()
}

fn request(strategy: Strategy, prompt_len: usize) -> GenerateRequest {
    let prompt = (0..prompt_len as u32).map(|i| (i * i + 7) % 300).collect();
    let mut request = GenerateRequest::new(prompt);
    (request.n, request.max_tokens, request.strategy) = (3, 20, strategy);
    request.sampling.temperature = 3.0;
    request.feature_layers = vec![1, 3];
    request
}

fn complete(engine: &mut Engine<Cpu>, request: &GenerateRequest) -> Generated {
    engine.generate(request, &mut |_| Continue(())).unwrap()
}

/// Breaks off at an event, counted from 0.
fn break_at(
    engine: &mut Engine<Cpu>,
    request: &GenerateRequest,
    event: usize,
) -> (Result<Generated, EngineError>, bool) {
    let mut seen = 0;
    let generated = engine.generate(request, &mut |_| {
        seen += 1;
        if seen == event + 1 {
            Break(())
        } else {
            Continue(())
        }
    });
    (generated, seen > event)
}

fn assert_same(ours: &Generated, expected: &Generated) {
    let outcome = |candidate: &Candidate| {
        let bits = |row: &Vec<f32>| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        (
            candidate.token_ids.clone(),
            bits(&candidate.token_logprobs),
            candidate.features.iter().map(bits).collect::<Vec<_>>(),
            candidate.finish_reason,
        )
    };
    let outcomes =
        |generated: &Generated| -> Vec<_> { generated.candidates.iter().map(outcome).collect() };
    assert_eq!(outcomes(ours), outcomes(expected));
}

#[test]
fn an_observer_that_breaks_off_prefill_gets_an_error_and_leaves_nothing_behind() {
    let mut engine = engine();
    for strategy in STRATEGIES {
        let request = request(strategy, 2 * Cpu::PROMPT_ROWS + 100);
        let expected = complete(&mut engine, &request);
        assert_eq!(engine.load().used_pages, 0);
        for chunk in 0..3 {
            let mut heard = Vec::new();
            let interrupted = engine.generate(&request, &mut |event| {
                heard.push(match event {
                    Event::Prefill { done, total } => (done, total),
                    other => panic!("{other:?} after the request was broken off"),
                });
                if heard.len() > chunk {
                    Break(())
                } else {
                    Continue(())
                }
            });
            let interrupted = interrupted.unwrap_err();
            assert!(
                matches!(interrupted, EngineError::Interrupted),
                "{interrupted}"
            );
            let total = request.prompt_token_ids.len();
            let done = |chunk: usize| (total.min((chunk + 1) * Cpu::PROMPT_ROWS), total);
            assert_eq!(heard, (0..=chunk).map(done).collect::<Vec<_>>());
            assert_eq!(engine.load().used_pages, 0, "{strategy:?}, chunk {chunk}");
            assert_same(&complete(&mut engine, &request), &expected);
        }
    }
}

/// At every single event of a request.
#[test]
fn a_request_that_is_broken_off_anywhere_gives_what_it_has_and_all_pages_back() {
    let mut engine = engine();
    for strategy in STRATEGIES {
        // Answers that leave the prompt's last page, and one of their own, behind.
        let request = request(strategy, 2 * PAGE_LEN - 5);
        let expected = complete(&mut engine, &request);
        for event in 0.. {
            let (generated, broken_off) = break_at(&mut engine, &request, event);
            assert_eq!(engine.load().used_pages, 0, "{strategy:?}, event {event}");
            match generated {
                Err(interrupted) => {
                    assert!(matches!(interrupted, EngineError::Interrupted));
                    assert_eq!(event, 0, "only the prefill has no answer yet");
                }
                Ok(generated) if strategy == Strategy::Beam => {
                    assert!(!generated.candidates.is_empty());
                }
                Ok(generated) => {
                    for (ours, whole) in generated.candidates.iter().zip(&expected.candidates) {
                        assert!(whole.token_ids.starts_with(&ours.token_ids));
                    }
                }
            }
            if !broken_off {
                assert!(event > 10, "there were events to break off at");
                break;
            }
        }
        assert_same(&complete(&mut engine, &request), &expected);
    }
}

/// Whatever number of pages there is, a request that needs more says so and gives back what it took.
#[test]
fn a_request_that_runs_out_of_pages_gives_them_back() {
    let mut engine = engine();
    let whole = |engine: &mut Engine<Cpu>, strategy| {
        let request = request(strategy, 2 * PAGE_LEN - 5);
        let proceed: &mut dyn FnMut(Event) -> ControlFlow<()> = &mut |_| Continue(());
        engine.generate(&request, proceed).map(|_| ())
    };
    let score = |engine: &mut Engine<Cpu>| {
        let request = ScoreRequest {
            prompt_token_ids: vec![5; PAGE_LEN + 1],
            candidate_token_ids: vec![vec![3; 3 * PAGE_LEN], vec![4; 1], vec![5; 40]],
            layers: vec![2],
            logprobs: true,
        };
        engine.score(&request).map(|_| ())
    };
    let mut refused = 0;
    for capacity in 0..20 {
        engine = engine.with_limits(Limits {
            pages: capacity,
            ..Limits::default()
        });
        for strategy in STRATEGIES {
            let outcome = whole(&mut engine, strategy);
            refused += usize::from(matches!(outcome, Err(EngineError::Pages(_))));
            assert!(matches!(outcome, Ok(()) | Err(EngineError::Pages(_))));
            assert_eq!(engine.load().used_pages, 0, "{strategy:?} of {capacity}");
        }
        let outcome = score(&mut engine);
        assert!(matches!(outcome, Ok(()) | Err(EngineError::Pages(_))));
        assert_eq!(engine.load().used_pages, 0, "scoring with {capacity}");
    }
    assert!(refused > 10, "only {refused} requests ran out of pages");
    assert!(whole(&mut engine, Strategy::Beam).is_ok() && score(&mut engine).is_ok());
}
