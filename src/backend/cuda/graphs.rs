//! Steps that are recorded once and replayed: on a GPU, CUDA graphs.
//!
//! A recording holds addresses, numbers and grids as they were. So a step may be replayed where all
//! that differs between it and the recorded one is in memory that it is sent to: its [`Key`] is the
//! same, and nothing has moved since.

use super::device::{Device, DeviceError, GraphId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Recordings that are kept; beyond them, the one that was not used for longest goes.
pub const MAX_GRAPHS: usize = 64;

/// Most rows of a step that is recorded. A larger one computes for so long that launches are nothing.
pub const MAX_ROWS: usize = 1024;

/// What the launches of a step depend on besides what the step is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    pub rows: usize,
    pub logits: usize,
    pub draws: usize,
    /// Jobs of attention, and whether it is the plain form.
    pub prefix: usize,
    pub suffix: usize,
    pub is_plain: bool,
    /// What is computed, by the caller's numbers.
    pub what: Vec<usize>,
}

/// The size that a step of so many rows, or a list of so many jobs, is recorded for, so that few
/// recordings do for all sizes: at most half more up to 128, where products are bound by reading
/// weights, and a quarter more above.
pub fn bucket(count: usize) -> usize {
    let power = count.next_power_of_two();
    match count {
        0..=4 => power.min(count * 2),
        5..=128 => count.next_multiple_of(power / 4).max(power / 4 * 3),
        _ => count.next_multiple_of(power / 8),
    }
}

/// A recording; gone with this.
struct Graph {
    device: Arc<dyn Device>,
    id: GraphId,
}

impl Graph {
    fn record(
        device: &Arc<dyn Device>,
        step: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<Graph, DeviceError> {
        device.begin_recording()?;
        let recorded = step();
        let id = device.end_recording();
        recorded?;
        Ok(Graph {
            device: Arc::clone(device),
            id: id?,
        })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.device.free_recording(self.id);
    }
}

/// How steps that can be recorded were run, since the start.
#[derive(Debug, Default)]
pub struct GraphUse {
    /// Launched one by one: the first of their key.
    pub plain: AtomicU64,
    pub recorded: AtomicU64,
    /// Recorded ones count too.
    pub replayed: AtomicU64,
    /// Recordings that gave way to others, or whose memory had moved.
    pub dropped: AtomicU64,
}

/// Recordings of the steps of one KV cache.
#[derive(Default)]
pub struct Graphs {
    /// Of all entries.
    layout: u64,
    /// The latest used last.
    entries: Vec<(Key, Option<Graph>)>,
}

impl Graphs {
    /// Runs a step. The first of a key is launched as it is, so that all its memory is there and its
    /// kernels are loaded; the second is recorded; from then on the recording is replayed.
    ///
    /// # Safety
    /// With one key and one layout `step` makes the same launches, and what they point to is there.
    pub unsafe fn run(
        &mut self,
        device: &Arc<dyn Device>,
        usage: &GraphUse,
        layout: u64,
        key: &Key,
        step: &mut dyn FnMut() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let count =
            |counter: &AtomicU64, by: usize| counter.fetch_add(by as u64, Ordering::Relaxed);
        let made = |entries: &[(Key, Option<Graph>)]| {
            entries.iter().filter(|(_, graph)| graph.is_some()).count()
        };
        if self.layout != layout {
            count(&usage.dropped, made(&self.entries));
            self.entries.clear();
            self.layout = layout;
        }
        let Some(place) = self.entries.iter().position(|(known, _)| known == key) else {
            count(&usage.plain, 1);
            step()?;
            if self.entries.len() == MAX_GRAPHS {
                count(&usage.dropped, made(&self.entries[..1]));
                self.entries.remove(0);
            }
            self.entries.push((key.clone(), None));
            return Ok(());
        };
        let (key, graph) = self.entries.remove(place);
        let graph = match graph {
            Some(graph) => graph,
            None => {
                count(&usage.recorded, 1);
                Graph::record(device, step)?
            }
        };
        count(&usage.replayed, 1);
        // SAFETY: the caller's promise.
        let replayed = unsafe { device.replay(graph.id) };
        self.entries.push((key, Some(graph)));
        replayed
    }
}

#[cfg(test)]
mod tests {
    use super::super::device::{Buffer, Launch};
    use super::super::embed::embed;
    use super::super::emulated::Emulated;
    use super::super::testing::device;
    use super::super::weights::Weights;
    use super::*;
    use crate::arguments;
    use half::bf16;

    fn key(rows: usize) -> Key {
        Key {
            rows,
            logits: 0,
            draws: 0,
            prefix: 0,
            suffix: 0,
            is_plain: false,
            what: Vec::new(),
        }
    }

    #[test]
    fn buckets_hold_their_count_and_are_few() {
        let all: std::collections::BTreeSet<usize> = (0..=MAX_ROWS).map(bucket).collect();
        assert!(all.len() <= 27, "{all:?}");
        for count in 0..=MAX_ROWS {
            let (bucket, part) = (bucket(count), if count <= 128 { 2 } else { 4 });
            assert!(
                bucket >= count && bucket <= count + count / part,
                "{count}: {bucket}"
            );
        }
        let counts = [0, 1, 2, 3, 5, 8, 9, 13, 33, 100, 129, 300];
        let expected = [0, 1, 2, 4, 6, 8, 12, 16, 48, 128, 160, 320];
        assert_eq!(counts.map(bucket), expected);
    }

    /// Rows of a table by numbers that are on the device, and by a number that is an argument.
    struct Case {
        device: Arc<dyn Device>,
        table: Weights,
        tokens: Buffer<u32>,
        out: Buffer<f32>,
    }

    impl Case {
        fn new(device: Arc<dyn Device>) -> Case {
            let table: Vec<bf16> = (0..32).map(|i| bf16::from_f32(i as f32)).collect();
            Case {
                table: Weights::Bf16(Buffer::from_slice(&device, &table, "table").unwrap()),
                tokens: Buffer::from_slice(&device, &[0u32, 1], "tokens").unwrap(),
                out: Buffer::new(&device, 16, "out").unwrap(),
                device,
            }
        }

        fn launch(&self, scale: f32) -> Result<(), DeviceError> {
            let (table, tokens) = (&self.table, self.tokens.slice());
            embed(&*self.device, table, tokens, scale, (2, 8, 8, 4), &self.out)
        }

        fn run(&self, graphs: &mut Graphs, usage: &GraphUse, layout: u64, scale: f32) -> Vec<f32> {
            let mut step = || self.launch(scale);
            // SAFETY: the case's buffers stay; a scale that differs is what one of the tests is about.
            unsafe { graphs.run(&self.device, usage, layout, &key(2), &mut step) }.unwrap();
            let out = self.out.read(0, 16).unwrap();
            vec![out[1], out[9]]
        }
    }

    #[test]
    fn what_is_sent_is_read_anew_and_arguments_are_not() {
        let mut case = Case::new(device());
        let (mut graphs, usage) = (Graphs::default(), GraphUse::default());
        for (i, tokens) in [[0u32, 1], [2, 3], [3, 0], [1, 1]].iter().enumerate() {
            case.tokens.write(0, tokens).unwrap();
            let expected: Vec<f32> = tokens.iter().map(|t| (t * 8 + 1) as f32).collect();
            assert_eq!(case.run(&mut graphs, &usage, 0, 1.0), expected, "step {i}");
        }
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counts = [
            &usage.plain,
            &usage.recorded,
            &usage.replayed,
            &usage.dropped,
        ]
        .map(of);
        assert_eq!(counts, [1, 1, 3, 0]);
        // The planted bug: a number that changes, as an argument. The replay has the old one.
        assert_eq!(case.run(&mut graphs, &usage, 0, 2.0), [9.0, 9.0]);
        // Memory that moved makes recordings stale, and they are not replayed.
        assert_eq!(case.run(&mut graphs, &usage, 1, 2.0), [18.0, 18.0]);
        assert_eq!(of(&usage.dropped), 1);
    }

    #[test]
    fn the_recording_that_was_not_used_for_longest_gives_way() {
        let case = Case::new(device());
        let (mut graphs, usage) = (Graphs::default(), GraphUse::default());
        let mut run = |rows: usize| {
            let mut step = || case.launch(1.0);
            // SAFETY: the case's buffers stay, and the launches are the same.
            unsafe { graphs.run(&case.device, &usage, 0, &key(rows), &mut step) }.unwrap();
            usage.plain.load(Ordering::Relaxed)
        };
        for rows in 0..MAX_GRAPHS {
            run(rows);
            assert_eq!(run(rows), rows as u64 + 1);
        }
        let all = MAX_GRAPHS as u64;
        assert_eq!(run(0), all, "it is still there");
        run(MAX_GRAPHS);
        assert_eq!(run(0), all + 1, "it was used");
        assert_eq!(run(1), all + 2, "it has given way");
        assert_eq!(graphs.entries.len(), MAX_GRAPHS);
    }

    #[test]
    fn a_recording_holds_no_more_than_launches_and_copies() {
        let refused = |act: &mut dyn FnMut(&Case) -> Result<(), DeviceError>| {
            let case = Case::new(device());
            case.device.begin_recording().unwrap();
            let refused = act(&case).unwrap_err();
            assert!(matches!(refused, DeviceError::Recording(_)), "{refused}");
            refused.to_string()
        };
        let text = refused(&mut |case| case.device.allocate(8, "test").map(|_| ()));
        assert_eq!(text, "recording launches: memory was asked for meanwhile");
        refused(&mut |case| case.device.upload(&[1], case.tokens.address()));
        refused(&mut |case| case.tokens.read(0, 1).map(|_| ()));
        refused(&mut |case| case.device.synchronize());
        refused(&mut |case| case.device.begin_recording());
        refused(&mut |case| {
            drop(Buffer::<u32>::from_slice(&case.device, &[1], "test"));
            case.device.end_recording().map(|_| ())
        });
    }

    /// Nothing is done while it is recorded, and a fault shows when it is replayed.
    #[test]
    fn a_recording_is_not_done() {
        let case = Case::new(Arc::new(Emulated::default()));
        let mut shape = Launch::blocks(1, 64);
        shape.shared_bytes = 256;
        let faulty = || {
            // SAFETY: the kernel takes the output, and is there to be caught.
            unsafe {
                case.device
                    .launch("fault_null", shape, &mut arguments![&case.out])
            }
        };
        let graph = Graph::record(&case.device, &mut || faulty()).unwrap();
        assert!(
            case.out.read(0, 1).unwrap()[0].is_nan(),
            "nothing was written"
        );
        // SAFETY: the buffer is there.
        let replayed = unsafe { case.device.replay(graph.id) };
        assert!(matches!(replayed, Err(DeviceError::Fault(_))));
    }
}
