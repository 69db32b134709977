//! How the rows of a batch attend: which kernel, which cuts. The one place that decides it.
//!
//! A row's path depends on its own request alone, on how long its prefix is, never on how many
//! candidates there are or what else is in the batch: so its numbers do not either.
//!
//! | rows | path |
//! | --- | --- |
//! | a prompt's (no prefix before them) | [`attention_prefill`] |
//! | a candidate's, long prefix | [`attention_prefix`], [`attention_suffix`], [`attention_merge`] |
//! | a candidate's, short prefix | [`attention_suffix`], which reads the prefix too, and [`attention_merge`] |
//! | any, of a head size that those are not built for | [`attention`](super::attention) |

use super::attention::{Scores, Spans, attention};
use super::attention_merge::{MergedRow, attention_merge};
use super::attention_prefill::{PrefillJob, attention_prefill};
use super::attention_prefix::{PrefixJob, attention_prefix};
use super::attention_suffix::{SuffixJob, attention_suffix};
use super::device::{Address, Buffer, Device, DeviceError, Slice};
use super::rope_append::{head_stride, layer_len};
use super::step_memory::{Packer, Section};
use crate::backend::KvShape;

/// Queries of a block (`kernels/attention_tile.cuh`).
const BLOCK_QUERIES: usize = 64;
/// Head sizes that the kernels are built for, rounded up to sixteen numbers, and keys at a time.
const HEAD_SIZES: [(usize, usize); 6] =
    [(32, 64), (64, 64), (80, 64), (96, 64), (128, 64), (256, 16)];
/// Own tokens of a part.
const OWN_RUN: usize = 256;

/// Sequences that share a prefix, with their pages' places in the table of addresses.
#[derive(Clone, Debug)]
pub struct Group {
    pub prefix_table: usize,
    pub prefix_len: usize,
    pub segments: Vec<Segment>,
}

/// Consecutive rows of a sequence, of which `start` tokens are there already.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    pub table: usize,
    pub start: usize,
    pub rows: usize,
}

/// How a candidate's rows read the prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Each by itself, with its own tokens.
    Whole,
    /// All candidates of a group together, in runs of so many tokens.
    Split { run: usize },
}

/// The path for a prefix of that many tokens: the one that takes less time, by the figures below.
pub fn path(prefix_len: usize) -> Path {
    /// A block reads one token of a kv head, 512 bytes at 128 numbers a head, at some 60 GB/s.
    const TOKEN_NS: usize = 9;
    /// A warp by itself has fewer reads on their way.
    const TOKEN_OF_WARP_NS: usize = 18;
    const LAUNCH_NS: usize = 2000;
    /// A part of 32 candidates, 32 heads each, is written and read: 1 MB.
    const PART_NS: usize = 360;
    let split = |run: usize| LAUNCH_NS + run * TOKEN_NS + prefix_len.div_ceil(run) * PART_NS;
    let runs = (1..=6).map(|doubled| BLOCK_QUERIES << doubled);
    match runs.min_by_key(|&run| split(run)) {
        Some(run) if split(run) < prefix_len * TOKEN_OF_WARP_NS => Path::Split { run },
        _ => Path::Whole,
    }
}

/// What the kernels read besides queries and pages, of one layer.
pub struct Inputs<'a> {
    pub qkv: &'a Buffer<f32>,
    /// Addresses of pages.
    pub pages: Slice<Address>,
    /// Of each row.
    pub positions: Slice<u32>,
    pub scores: Scores,
    pub shape: KvShape,
    pub layer: usize,
}

impl Inputs<'_> {
    /// A layer's keys and values in a page, in numbers.
    pub(super) fn layer_offset(&self) -> u64 {
        (self.layer * layer_len(self.shape)) as u64
    }

    /// The kernel for these heads, and the shared memory of a block that takes at most so many keys at a
    /// time.
    pub(super) fn kernel(&self, name: &str, most_keys: usize) -> (String, u32) {
        let stride = head_stride(self.shape);
        let found = HEAD_SIZES.iter().find(|(size, _)| *size == stride);
        let keys = found.map_or(0, |(_, keys)| *keys.min(&most_keys));
        // Two stages of keys and values, bfloat16.
        let shared_bytes = 2 * 2 * keys * (stride + 8) * 2;
        (format!("{name}_{stride}"), shared_bytes as u32)
    }
}

/// Parts of queries' attention: what [`attention_prefix`] and [`attention_suffix`] leave for
/// [`attention_merge`].
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    /// Highest score and sum, two numbers a query.
    pub statistics: Slice<f32>,
    pub totals: Slice<f32>,
}

/// The jobs of a batch's attention on the device, the same in every layer. A list may have more
/// places than jobs: what fills them has nothing to do.
#[derive(Clone, Copy, Debug)]
pub struct AttentionPlan {
    /// For the plain form: four numbers a row.
    spans: Slice<u32>,
    prefill: Slice<PrefillJob>,
    prefix: Slice<PrefixJob>,
    suffix: Slice<SuffixJob>,
    merged: Slice<MergedRow>,
    parts: Parts,
}

impl AttentionPlan {
    /// One layer's attention: `out` [rows, heads · head_dim].
    pub fn attend(
        &self,
        device: &dyn Device,
        inputs: &Inputs,
        out: &Buffer<f32>,
    ) -> Result<(), DeviceError> {
        if !self.spans.is_empty() {
            let Inputs {
                qkv, pages, scores, ..
            } = *inputs;
            let spans = Spans {
                rows: self.spans.len() / 4,
                pages,
                spans: self.spans,
            };
            attention(device, qkv, &spans, scores, inputs.shape, inputs.layer, out)?;
        }
        if !self.prefill.is_empty() {
            attention_prefill(device, inputs, self.prefill, out)?;
        }
        if !self.prefix.is_empty() {
            attention_prefix(device, inputs, self.prefix, &self.parts)?;
        }
        if !self.suffix.is_empty() {
            attention_suffix(device, inputs, self.suffix, &self.parts)?;
        }
        if !self.merged.is_empty() {
            attention_merge(device, self.merged, &self.parts, inputs.shape, out)?;
        }
        Ok(())
    }
}

/// Whether the kernels on tensor cores are built for these heads.
fn is_built_for(shape: KvShape) -> bool {
    HEAD_SIZES
        .iter()
        .any(|(size, _)| *size == head_stride(shape))
        && shape.head_dim.is_multiple_of(2)
}

/// The jobs of a batch's attention, before they are sent.
#[derive(Default)]
pub struct Jobs {
    /// Rows of the groups so far, and places for parts.
    rows: usize,
    slots: usize,
    spans: Vec<u32>,
    prefill: Vec<PrefillJob>,
    prefix: Vec<PrefixJob>,
    suffix: Vec<SuffixJob>,
    merged: Vec<MergedRow>,
}

/// Where packed jobs lie.
pub struct PackedJobs {
    spans: Section<u32>,
    prefill: Section<PrefillJob>,
    prefix: Section<PrefixJob>,
    suffix: Section<SuffixJob>,
    merged: Section<MergedRow>,
}

impl PackedJobs {
    pub fn at(&self, base: Address, parts: Parts) -> AttentionPlan {
        AttentionPlan {
            spans: self.spans.at(base),
            prefill: self.prefill.at(base),
            prefix: self.prefix.at(base),
            suffix: self.suffix.at(base),
            merged: self.merged.at(base),
            parts,
        }
    }
}

impl Jobs {
    pub fn new(groups: &[Group], shape: KvShape) -> Jobs {
        match is_built_for(shape) {
            true => Jobs::by(groups, shape, path),
            false => Jobs::plain(groups),
        }
    }

    /// Every row by the plain kernel.
    fn plain(groups: &[Group]) -> Jobs {
        let mut jobs = Jobs::default();
        for group in groups {
            for segment in &group.segments {
                jobs.rows += segment.rows;
                for own in segment.start..segment.start + segment.rows {
                    let span = [group.prefix_table, group.prefix_len, segment.table, own + 1];
                    jobs.spans.extend(span.map(|n| n as u32));
                }
            }
        }
        jobs
    }

    /// The other kernels, candidates' rows on the path that `path` says for their prefix.
    fn by(groups: &[Group], shape: KvShape, path: impl Fn(usize) -> Path) -> Jobs {
        let mut jobs = Jobs::default();
        for group in groups {
            let rows: usize = group.segments.iter().map(|segment| segment.rows).sum();
            match group.prefix_len {
                0 => jobs.prefill(group, shape),
                prefix_len => jobs.candidates(group, rows, shape, path(prefix_len)),
            }
            jobs.rows += rows;
        }
        jobs
    }

    pub fn is_plain(&self) -> bool {
        !self.spans.is_empty()
    }

    /// Jobs of [`attention_prefix`] and [`attention_suffix`].
    pub fn counts(&self) -> (usize, usize) {
        (self.prefix.len(), self.suffix.len())
    }

    /// Queries that leave a part each.
    pub fn parts(&self, shape: KvShape) -> usize {
        self.slots * shape.heads
    }

    /// Packs the jobs, each list with as many places as `places` says for its length. The tables of
    /// pages begin at index `first_table`; `packer` must not reach there.
    pub fn pack(
        mut self,
        packer: &mut Packer,
        places: impl Fn(usize) -> usize,
        first_table: usize,
    ) -> PackedJobs {
        let by = first_table as u32;
        for span in self.spans.chunks_exact_mut(4) {
            (span[0], span[2]) = (span[0] + by, span[2] + by);
        }
        self.prefill.iter_mut().for_each(|job| job.table += by);
        self.prefix.iter_mut().for_each(|job| job.table += by);
        for job in &mut self.suffix {
            (job.table, job.prefix_table) = (job.table + by, job.prefix_table + by);
        }
        PackedJobs {
            spans: packer.push(&self.spans, 4 * places(self.spans.len() / 4), 0),
            prefill: packer.push(&self.prefill, self.prefill.len(), PrefillJob::default()),
            prefix: packer.push(
                &self.prefix,
                places(self.prefix.len()),
                PrefixJob::default(),
            ),
            suffix: packer.push(
                &self.suffix,
                places(self.suffix.len()),
                SuffixJob::default(),
            ),
            merged: packer.push(
                &self.merged,
                places(self.merged.len()),
                MergedRow::default(),
            ),
        }
    }

    /// Bytes that [`Jobs::pack`] appends at most.
    pub fn packed_bytes(&self, places: impl Fn(usize) -> usize) -> usize {
        16 * places(self.spans.len() / 4)
            + size_of::<PrefillJob>() * self.prefill.len()
            + size_of::<PrefixJob>() * places(self.prefix.len())
            + size_of::<SuffixJob>() * places(self.suffix.len())
            + size_of::<MergedRow>() * places(self.merged.len())
            + 5 * 16
    }

    fn prefill(&mut self, group: &Group, shape: KvShape) {
        let mut first_row = self.rows;
        for segment in &group.segments {
            let queries = segment.rows * (shape.heads / shape.kv_heads);
            for tile in 0..queries.div_ceil(BLOCK_QUERIES) {
                self.prefill.push(PrefillJob {
                    first_row: first_row as u32,
                    rows: segment.rows as u32,
                    tile: tile as u32,
                    table: segment.table as u32,
                    start: segment.start as u32,
                    padding: [0; 3],
                });
            }
            first_row += segment.rows;
        }
    }

    fn candidates(&mut self, group: &Group, rows: usize, shape: KvShape, path: Path) {
        let Group {
            prefix_table,
            prefix_len,
            ..
        } = *group;
        let prefix_slot = self.slots;
        let prefix_parts = match path {
            Path::Whole => 0,
            Path::Split { run } => {
                let queries = rows * (shape.heads / shape.kv_heads);
                for (part, first) in (0..prefix_len).step_by(run).enumerate() {
                    for tile in 0..queries.div_ceil(BLOCK_QUERIES) {
                        self.prefix.push(PrefixJob {
                            first_row: self.rows as u32,
                            rows: rows as u32,
                            tile: tile as u32,
                            table: prefix_table as u32,
                            first: first as u32,
                            end: prefix_len.min(first + run) as u32,
                            slot: (prefix_slot + part * rows) as u32,
                            padding: 0,
                        });
                    }
                }
                prefix_len.div_ceil(run)
            }
        };
        self.slots += prefix_parts * rows;
        let mut place = 0;
        for segment in &group.segments {
            for own in segment.start..segment.start + segment.rows {
                let (row, visible) = (self.rows + place, own + 1);
                self.merged.push(MergedRow {
                    row: row as u32,
                    prefix_slot: (prefix_slot + place) as u32,
                    prefix_step: rows as u32,
                    prefix_parts: prefix_parts as u32,
                    own_slot: self.slots as u32,
                    own_parts: visible.div_ceil(OWN_RUN) as u32,
                    padding: [0; 2],
                });
                for first in (0..visible).step_by(OWN_RUN) {
                    let reads_prefix = path == Path::Whole && first == 0;
                    let prefix = if reads_prefix { prefix_len } else { 0 };
                    self.suffix.push(SuffixJob {
                        row: row as u32,
                        slot: self.slots as u32,
                        prefix_table: prefix_table as u32,
                        prefix: prefix as u32,
                        table: segment.table as u32,
                        first: first as u32,
                        end: visible.min(first + OWN_RUN) as u32,
                        hidden: (prefix_len - prefix) as u32,
                    });
                    self.slots += 1;
                }
                place += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention_cases::{Case, random_case};
    use super::*;

    #[test]
    fn the_path_is_short_for_short_prefixes_and_runs_grow_with_long_ones() {
        assert_eq!(path(1), Path::Whole);
        assert_eq!(path(100), Path::Whole);
        let run = |prefix_len| match path(prefix_len) {
            Path::Split { run } => run,
            Path::Whole => panic!("a prefix of {prefix_len} is read by each candidate"),
        };
        assert_eq!((run(512), run(131_072)), (128, 2048));
        let runs: Vec<usize> = (300..50_000).step_by(97).map(run).collect();
        assert!(runs.is_sorted() && runs.iter().all(|run| run % 64 == 0));
    }

    /// Whole batches on every path: prompts beside candidates, first tokens, replayed rows.
    #[test]
    fn agrees_with_float64() {
        for seed in 0..24 {
            let case = random_case(seed);
            case.in_f64().assert(&case.run(case.jobs()), seed);
        }
    }

    /// Each result is within its own bound of float64's, so that two paths are within the sum of both.
    #[test]
    fn split_and_unsplit_agree() {
        for seed in 0..8 {
            let case = random_case(seed);
            let bounds = case.in_f64().bounds;
            let by = |path: Path| case.run(Jobs::by(&case.groups, case.shape, |_| path));
            let whole = by(Path::Whole);
            for run in [64, 128, 512] {
                let split = by(Path::Split { run });
                for (i, (a, b)) in whole.iter().zip(&split).enumerate() {
                    let difference = f64::from(a - b).abs();
                    assert!(difference <= 2.0 * bounds[i], "number {i}: {a} and {b}");
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_any_batch() {
        for seed in 0..8 {
            let case = random_case(seed);
            let together = case.run(case.jobs());
            let width = case.shape.heads * case.shape.head_dim;
            let mut row = 0;
            for group in &case.groups {
                for segment in &group.segments {
                    for n in 0..segment.rows {
                        let alone = Group {
                            segments: vec![Segment {
                                start: segment.start + n,
                                rows: 1,
                                ..*segment
                            }],
                            ..group.clone()
                        };
                        let one = case.only(row, alone);
                        let got = one.run(one.jobs());
                        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                        assert_eq!(
                            bits(&got),
                            bits(&together[row * width..][..width]),
                            "row {row}"
                        );
                        row += 1;
                    }
                }
            }
        }
    }

    #[test]
    fn one_candidate_with_one_token_and_wide_groups() {
        for (heads, kv_heads, head_dim) in [(1, 1, 64), (8, 1, 64), (24, 1, 32), (6, 2, 256)] {
            for prefix_len in [1, 40, 300] {
                let case = Case::new(
                    5,
                    (heads, kv_heads, head_dim),
                    &[(prefix_len, vec![(0, 1)])],
                );
                case.in_f64().assert(&case.run(case.jobs()), prefix_len);
            }
        }
    }
}
