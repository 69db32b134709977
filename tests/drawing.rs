//! Tokens drawn from a batch whose logits come in slices, against those drawn from all logits at
//! once: the same, bit for bit, and what cannot be drawn is refused alone.

use std::path::Path;

use podium::backend::cpu::Cpu;
use podium::backend::cpu::simd::Isa;
use podium::backend::sampling::{LogitsError, SampleRow, Sampled, SamplingParams};
use podium::backend::{Backend, Batch, Draws, Group, PageId, Segment};
use podium::model::files::ModelFiles;
use podium::model::forward::{Depth, Model};

fn model() -> Model<Cpu> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/llama-tied");
    let files = ModelFiles::open(&path).unwrap();
    let cpu = Cpu::new(2, Isa::best()).unwrap();
    Model::load(cpu, &files, &mut |_| {}).unwrap()
}

/// So many sequences of one token each.
fn batch(sequences: usize) -> Batch {
    let segment = |page| Segment {
        pages: vec![page],
        start: 0,
        rows: 1,
    };
    Batch {
        tokens: (0..sequences as u32).map(|i| (i * i + 7) % 300).collect(),
        groups: vec![Group {
            segments: (0..sequences as PageId).map(segment).collect(),
            ..Group::default()
        }],
    }
}

/// A draw from a row of the logits, with a random number of its own.
fn draw<'a>(params: &'a SamplingParams, row: usize, candidate: usize) -> SampleRow<'a> {
    SampleRow {
        row,
        params,
        seed: 5,
        candidate: candidate as u32,
        position: 1,
        prompt: &[],
        answer: &[],
        logit_bias: &[],
        top_logprobs: 3,
    }
}

/// What is drawn when all logits are there at once, and when the backend has them as it likes.
fn both_ways(
    model: &Model<Cpu>,
    sequences: usize,
    rows: &[u32],
    draws: &[SampleRow],
) -> [Vec<Result<Sampled, LogitsError>>; 2] {
    let (mut state, batch) = (model.state().unwrap(), batch(sequences));
    let depth = Depth {
        layers: model.config.layers,
        capture: &[],
    };
    model.forward(&mut state, &batch, depth).unwrap();
    let logits = model.logits(&mut state, rows).unwrap();
    let at_once = draws
        .iter()
        .map(|draw| {
            let row = model.backend.read_row(logits, draw.row).unwrap();
            podium::backend::cpu::sample::sample(&row, draw)
        })
        .collect();
    let wanted = Draws {
        rows,
        draws,
        vocab_size: model.config.vocab_size,
    };
    let drawn = model.forward_and_draw(&mut state, &batch, depth, &wanted);
    [at_once, drawn.unwrap()]
}

#[test]
fn tokens_do_not_depend_on_how_many_logits_are_there_at_a_time() {
    let (model, params) = (model(), SamplingParams::default());
    for drawing in [1, 47, 48, 49, 96, 97, 100, 145] {
        // Not every row of the batch draws, and some draw more than one token.
        let rows: Vec<u32> = (0..drawing).map(|row| row + row / 3).collect();
        let draws: Vec<SampleRow> = (0..drawing as usize)
            .flat_map(|row| std::iter::repeat_n(row, 1 + usize::from(row % 24 == 23)))
            .enumerate()
            .map(|(candidate, row)| draw(&params, row, candidate))
            .collect();
        let [at_once, drawn] = both_ways(&model, 200, &rows, &draws);
        assert_eq!(drawn, at_once, "{drawing} rows");
        assert!(drawn.iter().all(Result::is_ok));
    }
    // All candidates draw their first token from the prompt's last row.
    let draws: Vec<SampleRow> = (0..100).map(|n| draw(&params, 0, n)).collect();
    let [at_once, drawn] = both_ways(&model, 2, &[1], &draws);
    assert_eq!(drawn, at_once);
}

#[test]
fn logits_of_many_candidates_are_never_there_together() {
    let (model, params) = (model(), SamplingParams::default());
    let (backend, batch) = (&model.backend, batch(100));
    let mut kv = backend.kv_cache(model.kv_shape()).unwrap();
    for (drawing, at_a_time) in [(1, 1), (48, 48), (49, 25), (100, 34)] {
        let rows: Vec<u32> = (0..drawing).collect();
        let draws: Vec<SampleRow> = (0..drawing as usize)
            .map(|row| draw(&params, row, row))
            .collect();
        let wanted = Draws {
            rows: &rows,
            draws: &draws,
            vocab_size: model.config.vocab_size,
        };
        let plan = backend.plan(&batch, Some(&wanted), &[], &mut kv).unwrap();
        assert_eq!(backend.planned_rows(&plan).logits, at_a_time, "{drawing}");
    }
}

#[test]
fn logits_that_cannot_be_drawn_from_are_named_by_their_row_and_end_no_other_draw() {
    let (model, params) = (model(), SamplingParams::default());
    let rows: Vec<u32> = (0..100).collect();
    let damaged = [(7, f32::INFINITY)];
    let draws: Vec<SampleRow> = (0..100)
        .map(|row| SampleRow {
            logit_bias: if row == 70 { &damaged } else { &[] },
            ..draw(&params, row, row)
        })
        .collect();
    let [at_once, drawn] = both_ways(&model, 100, &rows, &draws);
    assert_eq!(drawn, at_once);
    for (row, drawn) in drawn.iter().enumerate() {
        match (row, drawn) {
            (70, Err(LogitsError::NotFinite { row, token, .. })) => {
                assert_eq!((*row, *token), (70, 7));
            }
            (70, other) => panic!("{other:?} from a logit of infinity"),
            (_, drawn) => assert!(drawn.is_ok(), "row {row}: {drawn:?}"),
        }
    }
}
