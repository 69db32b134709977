//! The scheduler against a simulated device: arrivals, endings, cancellations, device failures and
//! memory pressure, each drawn from a seed.
//!
//! The simulated KV cache remembers what was written into every slot, and every row that is computed
//! checks all the slots that it reads. A page that was freed too early, shared wrongly or written by
//! two sequences is seen at once.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use podium::backend::random::philox4x32;
use podium::backend::{PAGE_LEN, PageId};
use podium::engine::scheduler::{
    Drawn, GroupId, GroupShape, Limits, Purpose, Scheduler, Step, Task, Work,
};

const SEEDS: u64 = 10_000;

/// What a slot of the cache holds: the tokens of a prompt up to a place (by a hash of them), or a
/// group's candidate's token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Prompt(u64),
    Answer(GroupId, usize, usize),
}

struct Random {
    seed: u64,
    count: u32,
}

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.count += 1;
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        u64::from(philox4x32([self.count, 0, 0, 7], key)[0]) % end
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A group as its client knows it.
struct Expected {
    prompt: Arc<[u32]>,
    shape: GroupShape,
    /// Of candidates that are written: tokens drawn; of given ones: all.
    tokens: Vec<usize>,
    /// Candidates that have not ended, with the token whose state they still wait for.
    live: BTreeMap<usize, Option<usize>>,
}

struct Simulation {
    random: Random,
    scheduler: Scheduler,
    limits: Limits,
    memory: HashMap<PageId, [Option<Slot>; PAGE_LEN]>,
    groups: BTreeMap<GroupId, Expected>,
    next_id: GroupId,
    ended: usize,
    preemptions: usize,
    reused: usize,
}

impl Simulation {
    fn new(seed: u64) -> Simulation {
        let mut random = Random { seed, count: 0 };
        let pages = 4 + random.below(40) as usize;
        let limits = Limits {
            pages,
            cached_pages: random.below(pages as u64 + 1) as usize,
            step_rows: 1 + random.below(60) as usize,
            candidates: 1 + random.below(12) as usize,
        };
        Simulation {
            random,
            scheduler: Scheduler::new(limits),
            limits,
            memory: HashMap::new(),
            groups: BTreeMap::new(),
            next_id: 0,
            ended: 0,
            preemptions: 0,
            reused: 0,
        }
    }

    fn arrive(&mut self) {
        // Few different tokens and beginnings, so that prompts share pages.
        let length = 1 + self.random.below(70) as usize;
        let turn = self.random.below(length as u64 + 1) as usize;
        let other = 1 + self.random.below(2) as u32;
        let prompt: Arc<[u32]> = (0..length)
            .map(|i| if i < turn { 0 } else { other })
            .collect();
        let written = self.random.below(4) as usize;
        let given = match written == 0 || self.random.one_in(6) {
            true => self.random.below(4),
            false => 0,
        };
        let given: Vec<usize> = (0..given).map(|_| self.random.below(40) as usize).collect();
        let shape = GroupShape {
            given: given.clone(),
            reads_shared_prompts: !self.random.one_in(4),
            shares_prompt: !self.random.one_in(4),
            ..GroupShape::write(written, 1 + self.random.below(100) as usize)
        };
        let id = self.next_id;
        self.next_id += 1;
        let fits = shape.most_pages(length) <= self.limits.pages;
        let submitted = self.scheduler.submit(id, prompt.clone(), shape.clone());
        assert_eq!(submitted.is_ok(), fits);
        if fits {
            let mut live: BTreeMap<usize, Option<usize>> =
                (0..written).map(|candidate| (candidate, None)).collect();
            for (place, &tokens) in given.iter().enumerate().filter(|(_, tokens)| **tokens > 0) {
                live.insert(written + place, Some(tokens - 1));
            }
            let tokens = std::iter::repeat_n(0, written).chain(given).collect();
            self.groups.insert(
                id,
                Expected {
                    prompt,
                    shape,
                    tokens,
                    live,
                },
            );
        }
    }

    fn slot(&self, pages: &[PageId], index: usize) -> Option<Slot> {
        self.memory.get(&pages[index / PAGE_LEN])?[index % PAGE_LEN]
    }

    /// "Computes" a group's rows: reads everything before them, writes them.
    fn compute(&mut self, task: &Task) {
        let group = &self.groups[&task.group];
        let prompt: Vec<Slot> = (1..=group.prompt.len())
            .map(|end| Slot::Prompt(fingerprint(&group.prompt[..end])))
            .collect();
        let mut writes = Vec::new();
        let mut write = |pages: &[PageId], index: usize, slot: Slot| {
            writes.push((pages[index / PAGE_LEN], index % PAGE_LEN, slot));
        };
        match &task.work {
            Work::Prefill { tokens, draws } => {
                let [segment] = &task.batch.segments[..] else {
                    panic!("a prompt is one segment");
                };
                assert_eq!((task.batch.prefix_len, segment.start), (0, tokens.start));
                assert_eq!(segment.rows, tokens.len());
                assert!(!tokens.is_empty() && tokens.end <= prompt.len());
                assert!(draws.is_empty() || tokens.end == prompt.len());
                for (index, slot) in prompt.iter().enumerate().take(tokens.start) {
                    assert_eq!(self.slot(&segment.pages, index), Some(*slot));
                }
                for index in tokens.clone() {
                    write(&segment.pages, index, prompt[index]);
                }
            }
            Work::Candidates(pieces) => {
                assert_eq!(task.batch.prefix_len, prompt.len());
                for (index, slot) in prompt.iter().enumerate() {
                    assert_eq!(self.slot(&task.batch.prefix, index), Some(*slot));
                }
                assert_eq!(pieces.len(), task.batch.segments.len());
                for (piece, segment) in pieces.iter().zip(&task.batch.segments) {
                    let candidate = piece.candidate;
                    assert_eq!(
                        (segment.start, segment.rows),
                        (piece.tokens.start, piece.tokens.len())
                    );
                    let own = |index| Slot::Answer(task.group, candidate, index);
                    for index in 0..segment.start {
                        assert_eq!(self.slot(&segment.pages, index), Some(own(index)));
                    }
                    for index in piece.tokens.clone() {
                        write(&segment.pages, index, own(index));
                    }
                    let wanted = group.live[&candidate];
                    match piece.purpose {
                        Purpose::Draw => {
                            assert_eq!((wanted, piece.tokens.end), (None, group.tokens[candidate]));
                        }
                        Purpose::State => assert_eq!(wanted, Some(piece.tokens.end - 1)),
                        Purpose::CatchUp => {}
                    }
                }
                // A group draws as a whole.
                let drawing = pieces.iter().filter(|p| p.purpose == Purpose::Draw).count();
                let writing = group
                    .live
                    .values()
                    .filter(|wanted| wanted.is_none())
                    .count();
                assert!(
                    drawing == 0 || drawing == writing,
                    "a part of a group draws"
                );
            }
        }
        for (page, slot, content) in writes {
            assert!((page as usize) < self.limits.pages);
            self.memory.entry(page).or_default()[slot] = Some(content);
        }
    }

    fn check_rows(&self, step: &Step) {
        let rows: usize = step
            .tasks
            .iter()
            .flat_map(|task| &task.batch.segments)
            .map(|segment| segment.rows)
            .sum();
        // Besides the budget: candidates that draw or settle, an eighth for prefill at least.
        let candidates: usize = step
            .tasks
            .iter()
            .map(|task| task.batch.segments.len())
            .sum();
        let most = self.limits.step_rows.max(candidates) + self.limits.step_rows.div_ceil(8);
        assert!(rows <= most, "{rows} rows, where {most} are the most");
        // Each page is written by one segment.
        let mut written = HashMap::new();
        for task in &step.tasks {
            for (place, segment) in task.batch.segments.iter().enumerate() {
                let pages =
                    segment.start / PAGE_LEN..(segment.start + segment.rows).div_ceil(PAGE_LEN);
                for page in &segment.pages[pages] {
                    let before = written.insert(*page, (task.group, place));
                    assert_eq!(before, None, "page {page} is written twice");
                }
            }
        }
    }

    /// One step: the device may fail, and candidates end at random.
    fn step(&mut self, failures: bool) {
        let step = self.scheduler.step();
        self.preemptions += step.preempted.len();
        self.reused += step
            .admitted
            .iter()
            .filter(|admitted| admitted.1 > 0)
            .count();
        assert!(self.scheduler.pages().used_pages() <= self.limits.pages);
        assert_eq!(
            step.tasks.is_empty(),
            self.groups.is_empty(),
            "nobody goes on"
        );
        self.check_rows(&step);
        if failures && self.random.one_in(60) {
            for task in &step.tasks {
                assert!(self.scheduler.cancel(task.group));
                self.groups.remove(&task.group);
                self.ended += 1;
            }
            return;
        }
        for task in &step.tasks {
            self.compute(task);
            // A state that was computed is there once.
            if let Work::Candidates(pieces) = &task.work {
                let group = self.groups.get_mut(&task.group).unwrap();
                for piece in pieces.iter().filter(|p| p.purpose == Purpose::State) {
                    assert!(group.live.remove(&piece.candidate).is_some());
                }
            }
        }
        let (random, groups) = (&mut self.random, &mut self.groups);
        let ended = self.scheduler.complete(&step, |id, candidate| {
            let group = groups.get_mut(&id).expect("it is there");
            assert_eq!(group.live[&candidate], None);
            let tokens = &mut group.tokens[candidate];
            *tokens += 1;
            let most = group.shape.max_tokens;
            assert!(*tokens <= most);
            // An end token is none of the answer, and may come in its place.
            let length = *tokens == most;
            if !length && !random.one_in(200) {
                return Drawn::GoesOn;
            }
            match random.below(3) {
                0 => {
                    group.live.remove(&candidate);
                    Drawn::Ended
                }
                // A stop string may cut tokens off.
                _ => {
                    let last = *tokens - 1 - random.below(u64::min(3, *tokens as u64)) as usize;
                    group.live.insert(candidate, Some(last));
                    Drawn::EndedWith(last)
                }
            }
        });
        for id in ended {
            let group = self.groups.remove(&id).expect("a group ends once");
            assert!(group.live.is_empty(), "{:?}", group.live);
            assert!(!self.scheduler.contains(id));
            self.ended += 1;
        }
    }

    /// Cancels a group, or cuts it short.
    fn interfere(&mut self) {
        let place = self.random.below(self.groups.len().max(1) as u64) as usize;
        let Some(id) = self.groups.keys().nth(place).copied() else {
            return;
        };
        if self.random.one_in(2) {
            assert!(self.scheduler.cancel(id));
            assert!(!self.scheduler.cancel(id));
            self.groups.remove(&id);
            self.ended += 1;
            return;
        }
        let wanted = self.random.one_in(2);
        self.scheduler.finish_early(id, wanted);
        let group = self.groups.get_mut(&id).unwrap();
        for candidate in 0..group.shape.write {
            if group.live.get(&candidate) == Some(&None) {
                match group.tokens[candidate].checked_sub(1).filter(|_| wanted) {
                    Some(last) => group.live.insert(candidate, Some(last)),
                    None => group.live.remove(&candidate),
                };
            }
        }
        for id in self.scheduler.take_ended() {
            let group = self.groups.remove(&id).expect("a group ends once");
            assert!(group.live.is_empty());
            self.ended += 1;
        }
    }

    fn run(&mut self) {
        let arrivals = 1 + self.random.below(12);
        let failures = self.random.one_in(3);
        let cancellations = self.random.one_in(2);
        let mut arrived = 0;
        while arrived < arrivals {
            if self.random.one_in(3) {
                self.arrive();
                arrived += 1;
            }
            if cancellations && self.random.one_in(15) {
                self.interfere();
            }
            self.step(failures);
        }
        // No group is starved: each step computes at least a row of the oldest one.
        let mut steps = 0;
        while !self.groups.is_empty() {
            let oldest = *self.groups.keys().next().unwrap();
            self.step(failures);
            steps += 1;
            assert!(steps < 20_000, "group {oldest} waits for ever");
        }
        assert!(self.scheduler.is_empty());
        let (used, cached) = (
            self.scheduler.pages().used_pages(),
            self.scheduler.cached_pages(),
        );
        assert_eq!(used, cached, "pages have leaked");
        assert!(cached <= self.limits.cached_pages);
        assert!(self.scheduler.step().tasks.is_empty());
    }
}

fn fingerprint(tokens: &[u32]) -> u64 {
    // FNV-1a: two prompts of these tests that share it are the same one.
    tokens.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &token| {
        (hash ^ u64::from(token + 1)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[test]
fn ten_thousand_simulations() {
    let (mut ended, mut preemptions, mut reused) = (0, 0, 0);
    for seed in 0..SEEDS {
        let mut simulation = Simulation::new(seed);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| simulation.run()));
        assert!(result.is_ok(), "seed {seed}");
        ended += simulation.ended;
        preemptions += simulation.preemptions;
        reused += simulation.reused;
    }
    // What is to be tested has happened.
    assert!(
        ended > 40_000 && preemptions > 1_000 && reused > 5_000,
        "{ended} {preemptions} {reused}"
    );
}
