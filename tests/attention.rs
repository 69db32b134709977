//! `rope_append` and `attention` of the CPU backend against float64, for random shapes and batches on
//! every instruction set, in float32 and as users get it, which is in whole numbers where the processor
//! has fast ones; and the promise that a row's bits do not depend on its batch.

use podium::backend::cpu::Cpu;
use podium::backend::cpu::rows::{Rows, Vector};
use podium::backend::cpu::simd::Isa;
use podium::backend::{Attention, Backend, Batch, Group, KvShape, Norm, PAGE_LEN, PageId, Segment};
use podium::model::config::Rope;
use proptest::prelude::*;
use std::ops::Range;

const EPSILON: f32 = 1e-5;
/// The layer that is tested, of two: what lies before it in a page must be skipped.
const LAYER: usize = 1;

/// One attention layer and a batch for it.
#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    kv_heads: usize,
    /// Query heads that share a key head.
    per_kv_head: usize,
    head_dim: usize,
    /// Rotated pairs; the rest of a head passes as it is.
    pairs: usize,
    scale: f32,
    softcap: Option<f32>,
    window: Option<usize>,
    norms: bool,
    groups: Vec<GroupCase>,
}

#[derive(Clone, Debug)]
struct GroupCase {
    prefix_len: usize,
    /// Tokens that a sequence has in its own pages, and rows that the batch adds.
    segments: Vec<(usize, usize)>,
}

impl Case {
    fn heads(&self) -> usize {
        self.kv_heads * self.per_kv_head
    }

    fn width(&self) -> usize {
        (self.heads() + 2 * self.kv_heads) * self.head_dim
    }

    fn rope(&self) -> Rope {
        Rope {
            frequencies: (0..self.pairs)
                .map(|pair| 100f32.powf(-(pair as f32) / self.pairs as f32))
                .collect(),
            attention_factor: 1.1,
        }
    }

    /// Weights of the query norm and of the key norm.
    fn norm_weights(&self) -> [Vec<f32>; 2] {
        let weight = |step: usize| {
            let number = |i| 0.5 + (i * step % 17) as f32 / 17.0;
            (0..self.head_dim).map(number).collect()
        };
        [weight(5), weight(7)]
    }

    /// Queries, keys and values of all tokens, before norm and rotation.
    fn rows(&self) -> Vec<Vec<f32>> {
        let queries = self.heads() * self.head_dim;
        let mut state = self.seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        // Long queries, so that a few keys stand out and a wrong one shows.
        let mut row = |_| {
            let size = |i| if i < queries { 3.0 } else { 1.0 };
            (0..self.width()).map(|i| size(i) * next()).collect()
        };
        (0..self.tokens()).map(&mut row).collect()
    }

    fn tokens(&self) -> usize {
        let own = |group: &GroupCase| -> usize {
            let segments = group.segments.iter();
            segments.map(|(start, rows)| start + rows).sum()
        };
        let groups = self.groups.iter();
        groups.map(|group| group.prefix_len + own(group)).sum()
    }

    /// All tokens, numbered: of each group the prefix, then each sequence's own.
    fn sequences(&self) -> Vec<Vec<Sequence>> {
        let mut next = 0;
        let mut take = |count: usize| {
            next += count;
            next - count..next
        };
        let groups = self.groups.iter();
        groups
            .map(|group| {
                let prefix = take(group.prefix_len);
                let own = group.segments.iter().map(|&(start, rows)| Sequence {
                    prefix: prefix.clone(),
                    own: take(start + rows),
                    start,
                });
                own.collect()
            })
            .collect()
    }
}

/// Token numbers of a sequence.
struct Sequence {
    prefix: Range<usize>,
    own: Range<usize>,
    /// Own tokens before the batch.
    start: usize,
}

impl Sequence {
    fn tokens(&self) -> impl Iterator<Item = usize> {
        self.prefix.clone().chain(self.own.clone())
    }
}

/// An instruction set, and whether everything is float32.
type Way = (Isa, bool);

fn ways() -> impl Iterator<Item = Way> {
    let all = Isa::available().into_iter();
    let whole = all.clone().filter(|isa| isa.has_half_products());
    all.map(|isa| (isa, true))
        .chain(whole.map(|isa| (isa, false)))
}

/// The layer and its cache on the CPU.
struct Layer<'a> {
    case: &'a Case,
    cpu: Cpu,
    kv: <Cpu as Backend>::KvCache,
    rope: Rope,
    norms: Option<[Vector; 2]>,
}

impl Layer<'_> {
    fn new(case: &Case, (isa, exact): Way, threads: usize) -> Layer<'_> {
        let cpu = Cpu::new(threads, isa).unwrap();
        let cpu = if exact { cpu.exact() } else { cpu };
        let shape = KvShape {
            layers: LAYER + 1,
            heads: case.heads(),
            kv_heads: case.kv_heads,
            head_dim: case.head_dim,
        };
        Layer {
            kv: cpu.kv_cache(shape).unwrap(),
            cpu,
            rope: case.rope(),
            norms: case
                .norms
                .then(|| case.norm_weights().map(|weight| Vector::new(&weight))),
            case,
        }
    }

    /// What attention makes of the batch's rows, whose numbers `rows` gives; without `attend`, only
    /// the cache gets them.
    fn run(&mut self, groups: Vec<Group>, rows: &[Vec<f32>], attend: bool) -> Vec<Vec<f32>> {
        let batch = Batch {
            tokens: vec![0; rows.len()],
            groups,
        };
        let norm = |weight| Norm {
            weight,
            epsilon: EPSILON,
        };
        let norms = self.norms.as_ref();
        let attention = Attention {
            layer: LAYER,
            scale: self.case.scale,
            softcap: self.case.softcap,
            window: self.case.window,
            rope: &self.rope,
            query_norm: norms.map(|[query, _]| norm(query)),
            key_norm: norms.map(|[_, key]| norm(key)),
        };
        let mut qkv = Rows::new(rows.len(), self.case.width());
        for (index, row) in rows.iter().enumerate() {
            qkv.row_mut(index).copy_from_slice(row);
        }
        let (cpu, kv) = (&self.cpu, &mut self.kv);
        let plan = cpu.plan(&batch, None, &[&self.rope], kv).unwrap();
        cpu.rope_append(&plan, &attention, &mut qkv, kv);
        if !attend {
            return Vec::new();
        }
        let mut out = Rows::new(rows.len(), self.case.heads() * self.case.head_dim);
        cpu.attention(&plan, &attention, &qkv, kv, &mut out);
        (0..rows.len()).map(|row| out.row(row).to_vec()).collect()
    }

    /// The batch with its outputs as bits.
    fn bits(&mut self, groups: Vec<Group>, rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
        let rows = self.run(groups, rows, true);
        let bits = |row: Vec<f32>| row.into_iter().map(f32::to_bits).collect();
        rows.into_iter().map(bits).collect()
    }
}

/// Hands out pages in an order that is not that of the tokens.
struct Pages {
    next: PageId,
    count: PageId,
}

impl Pages {
    /// Pages that a case needs, and a few more.
    fn of(case: &Case) -> Pages {
        let mut count = 1;
        for group in &case.groups {
            count += group.prefix_len.div_ceil(PAGE_LEN);
            let own = group.segments.iter();
            count += own
                .map(|(start, rows)| (start + rows).div_ceil(PAGE_LEN))
                .sum::<usize>();
        }
        // A power of two, so that every odd step reaches every page.
        Pages {
            next: 0,
            count: count.next_power_of_two() as PageId,
        }
    }

    fn take(&mut self, tokens: usize) -> Vec<PageId> {
        (0..tokens.div_ceil(PAGE_LEN))
            .map(|_| {
                self.next += 1;
                self.next.wrapping_mul(0x9e37_79b1) % self.count
            })
            .collect()
    }
}

/// A batch of one segment without a prefix.
fn single(pages: Vec<PageId>, rows: usize) -> Vec<Group> {
    vec![Group {
        segments: vec![Segment {
            pages,
            start: 0,
            rows,
        }],
        ..Group::default()
    }]
}

/// Fills the cache with all that comes before the case's batch, and gives the batch.
fn prepare(layer: &mut Layer, case: &Case, tokens: &[Vec<f32>]) -> Vec<Group> {
    let mut pages = Pages::of(case);
    // Keys and values of earlier requests: large, so that one of them would show.
    let places = pages.count as usize * PAGE_LEN;
    let stale = vec![vec![1e4; case.width()]; places];
    layer.run(single((0..pages.count).collect(), places), &stale, false);

    let mut batch = Vec::new();
    for (group, sequences) in case.groups.iter().zip(case.sequences()) {
        let prefix = pages.take(group.prefix_len);
        if group.prefix_len > 0 {
            let whole = single(prefix.clone(), group.prefix_len);
            layer.run(whole, &tokens[sequences[0].prefix.clone()], false);
        }
        let mut segments = Vec::new();
        for (sequence, &(start, rows_added)) in sequences.iter().zip(&group.segments) {
            let own = pages.take(start + rows_added);
            let before = Group {
                prefix: prefix.clone(),
                prefix_len: group.prefix_len,
                segments: vec![Segment {
                    pages: own.clone(),
                    start: 0,
                    rows: start,
                }],
            };
            if start > 0 {
                let own = sequence.own.start;
                layer.run(vec![before], &tokens[own..own + start], false);
            }
            segments.push(Segment {
                pages: own,
                start,
                rows: rows_added,
            });
        }
        batch.push(Group {
            prefix,
            prefix_len: group.prefix_len,
            segments,
        });
    }
    batch
}

/// The batch's rows, in its order.
fn batch_rows(case: &Case, tokens: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let sequences = case.sequences();
    let added = sequences
        .iter()
        .flatten()
        .flat_map(|sequence| sequence.own.start + sequence.start..sequence.own.end);
    added.map(|token| tokens[token].clone()).collect()
}

/// A number, and how far float32 and whole numbers may be from it.
#[derive(Clone, Copy)]
struct Exact {
    value: f64,
    float: f64,
    whole: f64,
}

/// Norm and rotation of a head at a position, in float64.
fn rotated(case: &Case, rope: &Rope, head: &[f32], norm: &[f32], position: usize) -> Vec<f64> {
    let mut head: Vec<f64> = head.iter().map(|&x| f64::from(x)).collect();
    if case.norms {
        let mean = head.iter().map(|x| x * x).sum::<f64>() / head.len() as f64;
        let scale = 1.0 / (mean + f64::from(EPSILON)).sqrt();
        for (x, weight) in head.iter_mut().zip(norm) {
            *x *= scale * f64::from(*weight);
        }
    }
    for (i, frequency) in rope.frequencies.iter().enumerate() {
        // `Angles` says why the angle itself is float32.
        let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
        let factor = f64::from(rope.attention_factor);
        let (a, b) = (head[i], head[i + case.pairs]);
        head[i] = factor * (a * cos - b * sin);
        head[i + case.pairs] = factor * (b * cos + a * sin);
    }
    head
}

/// Attention of all rows of the batch, key by key in float64.
fn reference(case: &Case, tokens: &[Vec<f32>]) -> Vec<Vec<Exact>> {
    let (rope, [query_norm, key_norm]) = (case.rope(), case.norm_weights());
    let dim = case.head_dim;
    let part = |token: usize, head: usize| &tokens[token][head * dim..][..dim];
    let sequences = case.sequences();
    // Keys of a token's kv heads; a prefix is the same for all sequences of its group.
    let mut keys = vec![Vec::new(); tokens.len()];
    for sequence in sequences.iter().flatten() {
        for (position, token) in sequence.tokens().enumerate() {
            if keys[token].is_empty() {
                let heads = case.heads()..case.heads() + case.kv_heads;
                keys[token] = heads
                    .map(|head| rotated(case, &rope, part(token, head), &key_norm, position))
                    .collect();
            }
        }
    }
    let mut out = Vec::new();
    for sequence in sequences.iter().flatten() {
        let all: Vec<usize> = sequence.tokens().collect();
        for position in sequence.prefix.len() + sequence.start..all.len() {
            let seen = match case.window {
                Some(window) => &all[(position + 1).saturating_sub(window)..=position],
                None => &all[..=position],
            };
            let mut values = Vec::with_capacity(case.heads() * dim);
            for head in 0..case.heads() {
                let kv_head = head / case.per_kv_head;
                let query = part(all[position], head);
                let query = rotated(case, &rope, query, &query_norm, position);
                let mut size: f64 = 0.0;
                let mut rounding: f64 = 0.0;
                let score = |&token: &usize| {
                    let key = &keys[token][kv_head];
                    rounding = rounding.max(whole_rounding(&query, key) * f64::from(case.scale));
                    let products = query.iter().zip(key).map(|(q, k)| q * k);
                    let (sum, squares): (f64, f64) =
                        products.fold((0.0, 0.0), |(sum, squares), p| (sum + p, squares + p * p));
                    let scale = f64::from(case.scale);
                    size = size.max(sum.abs().max(squares.sqrt()) * scale);
                    match case.softcap.map(f64::from) {
                        Some(cap) => cap * (sum * scale / cap).tanh(),
                        None => sum * scale,
                    }
                };
                let scores: Vec<f64> = seen.iter().map(score).collect();
                let maximum = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let mut total = 0.0;
                let mut sums = vec![0.0; dim];
                for (&token, score) in seen.iter().zip(scores) {
                    let weight = (score - maximum).exp();
                    total += weight;
                    let value = part(token, case.heads() + case.kv_heads + kv_head);
                    for (sum, value) in sums.iter_mut().zip(value) {
                        *sum += weight * f64::from(*value);
                    }
                }
                let float = tolerance(dim, seen.len(), size);
                let whole = float + whole_tolerance(rounding);
                values.extend(sums.iter().map(|sum| Exact {
                    value: sum / total,
                    float,
                    whole,
                }));
            }
            out.push(values);
        }
    }
    out
}

/// Values are at most 1 in size, so an output errs by what its weights err, relative, and by its own
/// rounding. A weight errs by twice the error of a score: a chain of `head_dim` additions that reach
/// `size` on the way, of terms that norm, rotation and scale have rounded before. Errors of a chain
/// have either sign, so they grow with the root of its length; four deviations of all of them
/// together do not happen.
fn tolerance(head_dim: usize, keys: usize, size: f64) -> f64 {
    let half_unit = f64::from(f32::EPSILON) / 2.0;
    let score = (head_dim as f64 + 16.0).sqrt() * size;
    half_unit * 4.0 * (2.0 * score + (keys as f64 + 16.0).sqrt())
}

/// Standard deviation of what is lost of a score in whole numbers: key coordinates become codes of up to 16383 of
/// the greatest of 64, and those of a query of up to 32767, with a sum below 2^17. Rounding errs by up to
/// half a step, by a root of three less in the mean.
fn whole_rounding(query: &[f64], key: &[f64]) -> f64 {
    let greatest = |x: &[f64]| x.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    let squares = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>();
    let spans = query.chunks(64).zip(key.chunks(64));
    let variance = spans.map(|(query, key)| {
        let key_step = greatest(key) / 16383.0;
        let sum: f64 = query.iter().map(|x| x.abs()).sum();
        let query_step = (greatest(query) / 32767.0).max(sum / f64::from((1 << 17) - 32));
        squares(query) * key_step.powi(2) + squares(key) * query_step.powi(2)
    });
    (variance.sum::<f64>() / 12.0).sqrt()
}

/// What whole numbers may add to an output's error: twice that of a score, four deviations; half a step of the
/// values, which are at most 1 in size; and half a step of each of a block's 64 weights, 2^-18 of
/// their sum or 2^-16 of the greatest, which have either sign.
fn whole_tolerance(rounding: f64) -> f64 {
    let values = 0.5 / 16383.0;
    let weights = 64f64.sqrt() * 2f64.powi(-16);
    2.0 * 4.0 * rounding + values + weights
}

/// Holds a case against float64 on every instruction set; gives the largest error relative to its
/// tolerance.
fn check(case: &Case) -> Result<f64, TestCaseError> {
    let tokens = case.rows();
    let exact = reference(case, &tokens);
    let rows = batch_rows(case, &tokens);
    let mut worst: f64 = 0.0;
    for way in ways() {
        let (isa, float) = way;
        let mut layer = Layer::new(case, way, 2);
        let batch = prepare(&mut layer, case, &tokens);
        let out = layer.run(batch, &rows, true);
        prop_assert_eq!(out.len(), exact.len());
        for (row, (out, exact)) in out.iter().zip(&exact).enumerate() {
            for (i, (&out, exact)) in out.iter().zip(exact).enumerate() {
                let error = (f64::from(out) - exact.value).abs();
                let tolerance = if float { exact.float } else { exact.whole };
                // Written so that NaN fails.
                prop_assert!(
                    error <= tolerance,
                    "{}, float32 {float}: row {row}, output {i} is {out}, exactly {}: off by {error:.1e}, allowed are {tolerance:.1e}",
                    isa.name(),
                    exact.value,
                );
                worst = worst.max(error / tolerance);
            }
        }
    }
    Ok(worst)
}

/// Holds every row's bits in the whole batch, in other batches and on other numbers of threads
/// against each other.
fn check_bits(case: &Case) -> Result<(), TestCaseError> {
    let tokens = case.rows();
    let rows = batch_rows(case, &tokens);
    for way in ways() {
        let mut layer = Layer::new(case, way, 1);
        let batch = prepare(&mut layer, case, &tokens);
        let whole = layer.bits(batch.clone(), &rows);

        let mut more_threads = Layer::new(case, way, 3);
        let same_batch = prepare(&mut more_threads, case, &tokens);
        prop_assert_eq!(&more_threads.bits(same_batch, &rows), &whole, "3 threads");

        // Groups and segments the other way round.
        let mut first_row = 0;
        let mut segments = Vec::new();
        for group in &batch {
            for segment in &group.segments {
                segments.push((group, segment, first_row));
                first_row += segment.rows;
            }
        }
        let mut reversed = batch.clone();
        reversed.reverse();
        reversed
            .iter_mut()
            .for_each(|group| group.segments.reverse());
        let order = segments.iter().rev();
        let order: Vec<usize> = order
            .flat_map(|(_, segment, first)| *first..first + segment.rows)
            .collect();
        let reordered: Vec<Vec<f32>> = order.iter().map(|&row| rows[row].clone()).collect();
        let out = layer.bits(reversed, &reordered);
        for (place, &row) in order.iter().enumerate() {
            prop_assert_eq!(&out[place], &whole[row], "row {} of a reversed batch", row);
        }

        // Rows alone, and with the rows behind them.
        for (group, segment, first) in segments {
            let part = |start: usize, end: usize| {
                let segment = Segment {
                    start: segment.start + start,
                    rows: end - start,
                    ..segment.clone()
                };
                vec![Group {
                    segments: vec![segment],
                    ..group.clone()
                }]
            };
            for start in (0..segment.rows).rev().step_by(7) {
                let row = first + start;
                let alone = layer.bits(part(start, start + 1), &rows[row..=row]);
                prop_assert_eq!(&alone[0], &whole[row], "row {} alone", row);
            }
            let half = segment.rows / 2;
            let rest = first + half..first + segment.rows;
            let tail = layer.bits(part(half, segment.rows), &rows[rest.clone()]);
            prop_assert_eq!(&tail[..], &whole[rest]);
        }
    }
    Ok(())
}

fn group() -> impl Strategy<Value = GroupCase> {
    let prefix_len = prop_oneof![
        3 => prop::sample::select(vec![0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129]),
        1 => 0usize..200,
        1 => 600usize..800,
    ];
    let segment = prop_oneof![
        // A decode step …
        3 => (prop_oneof![Just(0), 1usize..140], Just(1)),
        // … a chunk of a prompt, and given candidates.
        1 => (prop_oneof![Just(0), 1usize..70], 2usize..40),
    ];
    (prefix_len, prop::collection::vec(segment, 1..5)).prop_map(|(prefix_len, segments)| {
        GroupCase {
            prefix_len,
            segments,
        }
    })
}

fn case() -> impl Strategy<Value = Case> {
    let head_dim = prop_oneof![
        2 => prop::sample::select(vec![16, 32, 64, 80, 96, 128, 256]),
        1 => (8usize..=128).prop_map(|pairs| 2 * pairs),
    ];
    let window = prop_oneof![
        2 => Just(None),
        1 => prop::sample::select(vec![1, 2, 15, 16, 17, 63, 64, 65]).prop_map(Some),
        1 => (1usize..300).prop_map(Some),
    ];
    let softcap = prop::option::of(1f32..20.0);
    let groups = prop::collection::vec(group(), 1..4);
    (
        (any::<u64>(), 1usize..=3, 1usize..=8, head_dim),
        (any::<bool>(), any::<bool>(), softcap, window),
        groups,
    )
        .prop_map(
            |(
                (seed, kv_heads, per_kv_head, head_dim),
                (norms, partly, softcap, window),
                groups,
            )| {
                Case {
                    seed,
                    kv_heads,
                    per_kv_head,
                    head_dim,
                    pairs: if partly { head_dim / 4 } else { head_dim / 2 },
                    scale: 1.0 / (head_dim as f32).sqrt(),
                    softcap,
                    window,
                    norms,
                    groups,
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_float64(case in case()) {
        let worst = check(&case)?;
        println!("off by up to {worst:.2} of what is allowed");
    }

    #[test]
    fn a_row_has_the_same_bits_in_every_batch(case in case()) {
        check_bits(&case)?;
    }
}

/// A prompt of several runs of rows, whose queries do not fit one task, and a long prefix behind
/// which a hundred candidates decode.
#[test]
fn prefill_and_a_hundred_candidates() {
    let case = |groups| Case {
        seed: 7,
        kv_heads: 2,
        per_kv_head: 3,
        head_dim: 64,
        pairs: 32,
        scale: 0.125,
        softcap: None,
        window: None,
        norms: false,
        groups,
    };
    let prefill = case(vec![GroupCase {
        prefix_len: 0,
        segments: vec![(65, 300)],
    }]);
    let candidates = case(vec![GroupCase {
        prefix_len: 1000,
        segments: (0..100).map(|k| (k % 23, 1)).collect(),
    }]);
    for case in [prefill, candidates] {
        let worst = check(&case).unwrap();
        println!("off by up to {worst:.2} of what is allowed");
        check_bits(&case).unwrap();
    }
}
