//! A batch, laid out for the kernels.

use super::attention_plan::{AttentionPlan, Group, Segment};
use super::device::{Address, Buffer, Device, DeviceError};
use super::kv_cache::KvCache;
use crate::backend::cpu::rope::Angles;
use crate::backend::{Batch, PAGE_LEN};
use crate::model::config::Rope;
use std::sync::{Arc, Mutex};

/// Where each row of a batch stands, on the device.
pub struct Plan {
    pub rows: usize,
    pub tokens: Buffer<u32>,
    pub positions: Buffer<u32>,
    /// The page of each row's token, and its place there.
    pub pages: Buffer<Address>,
    pub slots: Buffer<u32>,
    /// Pages that rows attend to, and how.
    pub tables: Buffer<Address>,
    pub attention: AttentionPlan,
    angles: Vec<(Rope, Arc<Buffer<f32>>)>,
}

impl Plan {
    pub fn new(
        device: &Arc<dyn Device>,
        batch: &Batch,
        ropes: &[&Rope],
        kv: &mut KvCache,
        tables_of_angles: &AngleTables,
    ) -> Result<Plan, DeviceError> {
        let rows = batch.tokens.len();
        let mut positions = Vec::with_capacity(rows);
        let (mut pages, mut slots) = (Vec::with_capacity(rows), Vec::with_capacity(rows));
        let (mut tables, mut groups) = (Vec::new(), Vec::with_capacity(batch.groups.len()));
        for group in &batch.groups {
            let prefix_table = tables.len();
            for &page in &group.prefix {
                tables.push(kv.reserve(page)?);
            }
            let mut segments = Vec::with_capacity(group.segments.len());
            for segment in &group.segments {
                let own_table = tables.len();
                let end = segment.start + segment.rows;
                for &page in &segment.pages[..end.div_ceil(PAGE_LEN)] {
                    tables.push(kv.reserve(page)?);
                }
                for own in segment.start..end {
                    pages.push(tables[own_table + own / PAGE_LEN]);
                    slots.push((own % PAGE_LEN) as u32);
                    positions.push((group.prefix_len + own) as u32);
                }
                segments.push(Segment {
                    table: own_table,
                    start: segment.start,
                    rows: segment.rows,
                });
            }
            groups.push(Group {
                prefix_table,
                prefix_len: group.prefix_len,
                segments,
            });
        }
        assert_eq!(
            positions.len(),
            rows,
            "the groups of a batch cover its rows"
        );
        let positions_in_use = positions.iter().max().map_or(0, |&last| last as usize + 1);
        let mut angles: Vec<(Rope, Arc<Buffer<f32>>)> = Vec::new();
        for &rope in ropes {
            if !angles.iter().any(|(known, _)| known == rope) {
                let table = tables_of_angles.of(device, rope, positions_in_use)?;
                angles.push((rope.clone(), table));
            }
        }
        Ok(Plan {
            rows,
            tokens: Buffer::from_slice(device, &batch.tokens, "tokens")?,
            positions: Buffer::from_slice(device, &positions, "positions")?,
            pages: Buffer::from_slice(device, &pages, "pages of rows")?,
            slots: Buffer::from_slice(device, &slots, "places in pages")?,
            tables: Buffer::from_slice(device, &tables, "page tables")?,
            attention: AttentionPlan::new(device, &groups, kv.shape())?,
            angles,
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
    fn of(
        &self,
        device: &Arc<dyn Device>,
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
