//! A batch, laid out for the kernels.

use super::attention_plan::{AttentionPlan, Group, Jobs, Parts, Segment};
use super::device::{Address, Buffer, Device, DeviceError, Slice};
use super::graphs::{self, Graphs, Key, bucket};
use super::kv_cache::KvCache;
use super::sample::{self, Edit, PlannedDraws};
use super::step_memory::{Layout, Packer};
use crate::backend::cpu::rope::Angles;
use crate::backend::{Batch, Draws, PAGE_LEN};
use crate::model::config::Rope;
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Where each row of a batch stands, on the device, and what is drawn from it.
///
/// All arrays are sent in one copy. A decode step's have more places than rows, up to the next
/// [`bucket`]: rows beyond the batch's have no page, no attention and no draw, and what is computed
/// for them is read by nobody.
pub struct Plan {
    /// With those beyond the batch's.
    pub rows: usize,
    /// All rows.
    pub runs: Vec<Run>,
    pub tokens: Slice<u32>,
    pub positions: Slice<u32>,
    /// The page of each row's token, and its place there.
    pub pages: Slice<Address>,
    pub slots: Slice<u32>,
    /// Pages that rows attend to, and how.
    pub tables: Slice<Address>,
    pub attention: AttentionPlan,
    angles: RopeAngles,
    pub draws: Option<DrawPlan>,
    /// Where the step may be recorded, and as what.
    pub graph: Option<(Arc<Mutex<Graphs>>, Key)>,
}

/// Rows that follow each other, all of them prompts', or none: that is what decides how products may add
/// them up, for it follows from a row's request alone. (A prompt's rows have no prefix, in one chunk or in
/// several; candidates' have one, those that catch up too; and what is cached of prompts was computed as a
/// prompt's rows.)
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub rows: Range<usize>,
    pub of_prompts: bool,
}

impl Run {
    /// The longest runs, up to row `rows`: those beyond the batch's belong to the last.
    fn all(groups: &[Group], rows: usize) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut end = 0;
        for group in groups {
            let start = end;
            end += group.segments.iter().map(|s| s.rows).sum::<usize>();
            if end == start {
                continue;
            }
            let of_prompts = group.prefix_len == 0;
            match runs.last_mut() {
                Some(last) if last.of_prompts == of_prompts => last.rows.end = end,
                _ => runs.push(Run {
                    rows: start..end,
                    of_prompts,
                }),
            }
        }
        if let Some(last) = runs.last_mut() {
            last.rows.end = rows;
        }
        runs
    }
}

/// The angles of each rope ([`AngleTables`]).
type RopeAngles = Vec<(Rope, Arc<Buffer<f32>>)>;

/// What is drawn.
pub struct DrawPlan {
    /// Rows whose logits are computed, with those beyond the batch's.
    pub logits: Slice<u32>,
    pub on_device: PlannedDraws,
    pub on_host: sample::Draws,
}

/// What a plan is made with.
pub struct Planner<'a> {
    pub device: &'a Arc<dyn Device>,
    pub layout: &'a Layout,
    pub angles: &'a AngleTables,
    /// Whether steps may be recorded.
    pub records: bool,
}

/// Rows of a batch, on the host.
#[derive(Default)]
struct Layed {
    positions: Vec<u32>,
    pages: Vec<Address>,
    slots: Vec<u32>,
    tables: Vec<Address>,
    groups: Vec<Group>,
}

impl Layed {
    fn new(batch: &Batch, kv: &mut KvCache) -> Result<Layed, DeviceError> {
        let mut layed = Layed::default();
        for group in &batch.groups {
            let prefix_table = layed.tables.len();
            for &page in &group.prefix {
                layed.tables.push(kv.reserve(page)?);
            }
            let mut segments = Vec::with_capacity(group.segments.len());
            for segment in &group.segments {
                let own_table = layed.tables.len();
                let end = segment.start + segment.rows;
                for &page in &segment.pages[..end.div_ceil(PAGE_LEN)] {
                    layed.tables.push(kv.reserve(page)?);
                }
                for own in segment.start..end {
                    layed.pages.push(layed.tables[own_table + own / PAGE_LEN]);
                    layed.slots.push((own % PAGE_LEN) as u32);
                    layed.positions.push((group.prefix_len + own) as u32);
                }
                segments.push(Segment {
                    table: own_table,
                    start: segment.start,
                    rows: segment.rows,
                });
            }
            layed.groups.push(Group {
                prefix_table,
                prefix_len: group.prefix_len,
                segments,
            });
        }
        assert_eq!(
            layed.positions.len(),
            batch.tokens.len(),
            "the groups of a batch cover its rows"
        );
        Ok(layed)
    }
}

/// Whether every row is a candidate's next token: such steps follow each other, differ in what they
/// are sent, and are recorded. A prompt's rows, and candidates that catch up, are launched as they are.
fn is_decode(batch: &Batch) -> bool {
    let mut segments = batch.groups.iter().flat_map(|group| &group.segments);
    batch.tokens.len() <= graphs::MAX_ROWS
        && batch.groups.iter().all(|group| group.prefix_len > 0)
        && segments.all(|segment| segment.rows == 1)
}

impl Plan {
    pub fn new(
        planner: &Planner,
        batch: &Batch,
        draws: Option<&Draws>,
        ropes: &[&Rope],
        kv: &mut KvCache,
    ) -> Result<Plan, DeviceError> {
        let Planner {
            device,
            layout,
            angles,
            records,
        } = *planner;
        let layed = Layed::new(batch, kv)?;
        let positions_in_use = layed.positions.iter().max().map_or(0, |&p| p as usize + 1);
        let angles = angles.of_all(device, layout, ropes, positions_in_use)?;
        let jobs = Jobs::new(&layed.groups, kv.shape());
        let recorded = records && draws.is_some() && is_decode(batch);
        let places = |count: usize| if recorded { bucket(count) } else { count };
        let rows = places(batch.tokens.len());
        let key = draws.filter(|_| recorded).map(|draws| {
            let (prefix, suffix) = jobs.counts();
            Key {
                rows,
                logits: places(draws.rows.len()),
                draws: places(draws.draws.len()),
                prefix: places(prefix),
                suffix: places(suffix),
                is_plain: jobs.is_plain(),
                what: Vec::new(),
            }
        });

        // First what the kernels are given the address of: its place follows from the key. Then what
        // they find by an index.
        let queries = (jobs.parts(kv.shape()), kv.shape().head_dim);
        let mut packer = Packer::default();
        let tokens = packer.push(&batch.tokens, rows, 0);
        let positions = packer.push(&layed.positions, rows, 0);
        let pages = packer.push(&layed.pages, rows, 0);
        let slots = packer.push(&layed.slots, rows, 0);
        let mut on_host = draws.map(|draws| {
            let logits = packer.push(draws.rows, places(draws.rows.len()), 0);
            (logits, sample::Draws::new(draws.draws, draws.vocab_size))
        });
        let draw_places = draws.map_or(0, |draws| places(draws.draws.len()));
        let vocab_size = draws.map_or(0, |draws| draws.vocab_size);
        let first_table = {
            let mut behind = packer.next_index::<[u8; 16]>() * 16 + jobs.packed_bytes(places);
            behind += draw_places * size_of::<sample::Draw>() + 16;
            behind.div_ceil(size_of::<Address>())
        };
        let first_edit = (first_table + layed.tables.len()) * size_of::<Address>();
        let first_edit = first_edit.div_ceil(size_of::<Edit>());
        let jobs = jobs.pack(&mut packer, places, first_table);
        let packed_draws = on_host.as_mut().map(|(_, draws)| {
            draws.begin_edits_at(first_edit);
            draws.pack(&mut packer, draw_places)
        });
        packer.push_indexed(first_table, &layed.tables);
        if let Some((_, draws)) = &on_host {
            packer.push_indexed(first_edit, draws.edits());
        }

        let memory = kv.memory();
        let base = memory.send(device, layout, &packer)?;
        let (statistics, totals) = memory.parts(device, layout, queries)?;
        let draws = match (on_host, packed_draws) {
            (Some((logits, on_host)), Some(packed)) => Some(DrawPlan {
                logits: logits.at(base),
                on_device: on_host.plan(
                    device,
                    layout,
                    &mut memory.draws,
                    (packed.at(base), base),
                    vocab_size,
                )?,
                on_host,
            }),
            _ => None,
        };
        Ok(Plan {
            rows,
            runs: Run::all(&layed.groups, rows),
            tokens: tokens.at(base),
            positions: positions.at(base),
            pages: pages.at(base),
            slots: slots.at(base),
            tables: Slice::at(base, first_table + layed.tables.len()),
            attention: jobs.at(base, Parts { statistics, totals }),
            angles,
            draws,
            graph: key.map(|key| (Arc::clone(&memory.graphs), key)),
        })
    }

    /// The angles of one of the ropes that the batch was planned with.
    pub fn angles(&self, rope: &Rope) -> &Buffer<f32> {
        let found = self.angles.iter().find(|(known, _)| known == rope);
        &found
            .expect("a batch is planned with the ropes of every layer")
            .1
    }
}

/// Cosines and sines of all positions so far, `[positions][cos × pairs | sin × pairs]` for each rope:
/// they stay on the device, so that a step uploads none.
#[derive(Default)]
pub struct AngleTables(Mutex<Vec<Table>>);

struct Table {
    rope: Rope,
    angles: Arc<Buffer<f32>>,
    positions: usize,
}

impl AngleTables {
    fn of_all(
        &self,
        device: &Arc<dyn Device>,
        layout: &Layout,
        ropes: &[&Rope],
        positions: usize,
    ) -> Result<RopeAngles, DeviceError> {
        let mut angles = RopeAngles::new();
        for &rope in ropes {
            if !angles.iter().any(|(known, _)| known == rope) {
                angles.push((rope.clone(), self.of(device, layout, rope, positions)?));
            }
        }
        Ok(angles)
    }

    fn of(
        &self,
        device: &Arc<dyn Device>,
        layout: &Layout,
        rope: &Rope,
        positions: usize,
    ) -> Result<Arc<Buffer<f32>>, DeviceError> {
        let mut tables = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let known = tables.iter().position(|table| table.rope == *rope);
        if let Some(known) = known
            && tables[known].positions >= positions
        {
            return Ok(Arc::clone(&tables[known].angles));
        }
        // By halves again and more, so that a text that grows does not have it made at each step.
        let positions = positions.next_power_of_two().max(256);
        let all: Vec<u32> = (0..positions as u32).collect();
        let values = Angles::new(rope, &all);
        layout.moved();
        let angles = Arc::new(Buffer::from_slice(
            device,
            values.values(),
            "rotary angles",
        )?);
        let table = Table {
            rope: rope.clone(),
            angles: Arc::clone(&angles),
            positions,
        };
        match known {
            Some(known) => tables[known] = table,
            None => tables.push(table),
        }
        Ok(angles)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_where_prompts_and_candidates_meet() {
        let group = |prefix_len: usize, rows: &[usize]| Group {
            prefix_table: 0,
            prefix_len,
            segments: rows
                .iter()
                .map(|&rows| Segment {
                    table: 0,
                    start: 5,
                    rows,
                })
                .collect(),
        };
        let runs = |groups: &[Group], rows| -> Vec<(Range<usize>, bool)> {
            let runs = Run::all(groups, rows).into_iter();
            runs.map(|run| (run.rows, run.of_prompts)).collect()
        };
        assert_eq!(runs(&[], 0), []);
        // Candidates alone, of a step that is recorded for more rows.
        let decode = [group(9, &[1, 1]), group(20, &[1])];
        assert_eq!(runs(&decode, 4), [(0..4, false)]);
        let mixed = [
            group(0, &[7]),
            group(0, &[1]),
            group(9, &[0]),
            group(9, &[1, 3]),
            group(20, &[1]),
            group(0, &[2]),
        ];
        let expected = [(0..8, true), (8..13, false), (13..15, true)];
        assert_eq!(runs(&mixed, 15), expected);
    }
}
