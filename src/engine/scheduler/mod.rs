//! What goes through the model next: a state machine without model, clock or threads.
//!
//! A *group* is a prompt and its candidates. Groups join and leave the running batch at every step.
//! [`Scheduler::step`] says which rows the next batch has; the caller computes them and tells
//! [`Scheduler::complete`] what came of the candidates that drew a token.
//!
//! **Known and computed.** Of every sequence the scheduler knows how many tokens there are and how
//! many of them have their keys and values in the cache. A step computes tokens that are known; a
//! candidate whose last known token is among them draws the next. A candidate that is being written
//! is one token behind; one that lost its pages is behind by all its tokens, and catches up in pieces.
//!
//! **Order.** Groups are served in the order in which they came. A group is admitted whole, when all
//! pages that it needs now are free, or it waits, and so do those behind it. When a running group
//! needs a page and there is none, the one that came last gives up all of its pages and waits at its
//! place in the order; so the oldest always goes on, and nobody waits for ever. The rows that decoding
//! leaves of a step's budget are shared among the prompts being prefilled, equally but for what a
//! short one does not need.

mod group;
pub mod pages;
mod prefix_tree;
mod sequence;

pub use group::GroupShape;
pub(super) use sequence::Sequence;

use crate::backend::{Group as BatchGroup, PAGE_LEN};
use group::{Candidate, Group, Phase};
use pages::{OutOfPages, PagePool};
use prefix_tree::PrefixTree;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Of two groups, the one that came later has the higher id.
pub type GroupId = u64;

/// How much runs at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pages of the KV cache.
    pub pages: usize,
    /// Of these, how many may keep prompts of groups that have ended.
    pub cached_pages: usize,
    /// Rows that a step aims at: candidates that decode always go, prefill gets what they leave (and
    /// at least an eighth).
    pub step_rows: usize,
    /// Most candidates in the running groups together. A group with more runs by itself.
    pub candidates: usize,
}

/// What a prompt's chunk and the candidates beside it share, unless told otherwise.
const STEP_ROWS: usize = 512;

impl Default for Limits {
    /// One request at a time, with as much memory as it takes.
    fn default() -> Limits {
        Limits {
            pages: usize::MAX,
            cached_pages: 0,
            step_rows: STEP_ROWS,
            candidates: super::MAX_CANDIDATES,
        }
    }
}

/// The next batch.
#[derive(Debug, Default)]
pub struct Step {
    /// In the order of their rows.
    pub tasks: Vec<Task>,
    /// Groups that began or resumed with this step, and how many tokens of the prompt were in the
    /// cache already.
    pub admitted: Vec<(GroupId, usize)>,
    /// Groups that lost their pages and wait again.
    pub preempted: Vec<GroupId>,
}

/// One group's part of a step.
#[derive(Debug)]
pub struct Task {
    pub group: GroupId,
    /// Pages, as the batch wants them.
    pub batch: BatchGroup,
    pub work: Work,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// These tokens of the prompt, in one segment. With the last of them, candidates that have no
    /// tokens yet draw their first from its row.
    Prefill {
        tokens: Range<usize>,
        draws: Vec<usize>,
    },
    /// A segment for each of these.
    Candidates(Vec<Piece>),
}

/// Tokens of a candidate, by their index among its tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub candidate: usize,
    pub tokens: Range<usize>,
    pub purpose: Purpose,
}

/// What the last row of a piece is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Its keys and values alone.
    CatchUp,
    /// The next token is drawn from it.
    Draw,
    /// It is the candidate's last: its state is wanted.
    State,
}

/// What became of a candidate that drew a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drawn {
    /// It goes on with that token.
    GoesOn,
    /// It has ended, and nothing more is to be computed for it.
    Ended,
    /// It has ended with its token of that index, whose state is still to be computed.
    EndedWith(usize),
}

/// Groups, and who has which pages.
pub struct Scheduler {
    limits: Limits,
    pages: PagePool,
    tree: PrefixTree,
    groups: BTreeMap<GroupId, Group>,
}

impl Scheduler {
    pub fn new(limits: Limits) -> Scheduler {
        Scheduler {
            pages: PagePool::new(limits.pages),
            tree: PrefixTree::new(limits.cached_pages.min(limits.pages)),
            groups: BTreeMap::new(),
            limits,
        }
    }

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    pub fn pages(&self) -> &PagePool {
        &self.pages
    }

    /// For work that runs beside all groups.
    pub(super) fn pages_mut(&mut self) -> &mut PagePool {
        &mut self.pages
    }

    /// Pages that keep prompts which no group may be using.
    pub fn cached_pages(&self) -> usize {
        self.tree.len()
    }

    /// Groups that have pages, and groups that wait for some.
    pub fn running_and_waiting(&self) -> (usize, usize) {
        let running = self.groups.values().filter(|group| group.running).count();
        (running, self.groups.len() - running)
    }

    /// Candidates that are decoding or about to.
    pub fn running_candidates(&self) -> usize {
        let running = self.groups.values().filter(|group| group.running);
        running.map(Group::width).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    pub fn contains(&self, id: GroupId) -> bool {
        self.groups.contains_key(&id)
    }

    /// Puts a group at the end of the queue.
    ///
    /// # Errors
    /// If it could not end even alone in the cache.
    ///
    /// # Panics
    /// If `id` is not above those of all groups that are there.
    pub fn submit(
        &mut self,
        id: GroupId,
        prompt: Arc<[u32]>,
        shape: GroupShape,
    ) -> Result<(), OutOfPages> {
        assert!(
            self.groups
                .last_key_value()
                .is_none_or(|(last, _)| *last < id),
            "group {id} is not the last"
        );
        let most = shape.most_pages(prompt.len());
        if most > self.limits.pages {
            return Err(OutOfPages {
                wanted: most,
                free: self.limits.pages,
                capacity: self.limits.pages,
            });
        }
        self.groups.insert(id, Group::new(prompt, shape));
        Ok(())
    }

    /// Forgets a group; its pages are free at once. Says whether it was there.
    pub fn cancel(&mut self, id: GroupId) -> bool {
        match self.groups.remove(&id) {
            Some(mut group) => {
                group.release(&mut self.pages);
                true
            }
            None => false,
        }
    }

    /// Ends candidates that are being written, at their present length: their last token's state is
    /// still computed if that is `wanted`.
    pub fn finish_early(&mut self, id: GroupId, wanted: bool) {
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        for candidate in &mut group.candidates {
            if candidate.phase == Phase::Writing {
                let last = candidate.known.checked_sub(1).filter(|_| wanted);
                candidate.end(last, &mut self.pages);
            }
        }
    }

    /// The next batch; without tasks if there are no groups.
    pub fn step(&mut self) -> Step {
        let mut step = Step::default();
        self.admit(&mut step);
        loop {
            let running: Vec<GroupId> = self.running().collect();
            let mut shares = self.shares(&running);
            for &id in &running {
                let share = shares.remove(&id).unwrap_or(0);
                if let Some(task) = self.task(id, share, &mut step.preempted) {
                    step.tasks.push(task);
                }
            }
            // All rows may have been those of groups that found no page and wait now: others get them.
            if !step.tasks.is_empty() || running.is_empty() {
                return step;
            }
        }
    }

    /// Takes note that a step was computed. `drawn` is asked for every candidate that drew a token.
    /// Gives the groups that have ended; their pages are free.
    pub fn complete(
        &mut self,
        step: &Step,
        mut drawn: impl FnMut(GroupId, usize) -> Drawn,
    ) -> Vec<GroupId> {
        for task in &step.tasks {
            // It may have been cancelled meanwhile.
            let Some(group) = self.groups.get_mut(&task.group) else {
                continue;
            };
            let mut draws = Vec::new();
            match &task.work {
                Work::Prefill { tokens, draws: all } => {
                    if group.shape.shares_prompt {
                        let known = &group.prompt[..tokens.end];
                        let pages = group.prefix.pages_mut();
                        self.tree.insert(&mut self.pages, known, pages);
                    }
                    draws.extend(all);
                }
                Work::Candidates(pieces) => {
                    for piece in pieces {
                        match piece.purpose {
                            Purpose::CatchUp => {}
                            Purpose::Draw => draws.push(piece.candidate),
                            Purpose::State => {
                                group.candidates[piece.candidate].end(None, &mut self.pages);
                            }
                        }
                    }
                }
            }
            for index in draws {
                let candidate = &mut group.candidates[index];
                match drawn(task.group, index) {
                    Drawn::GoesOn => candidate.known += 1,
                    Drawn::Ended => candidate.end(None, &mut self.pages),
                    Drawn::EndedWith(last) => candidate.end(Some(last), &mut self.pages),
                }
            }
        }
        self.take_ended()
    }

    /// Removes the groups whose candidates have all ended.
    pub fn take_ended(&mut self) -> Vec<GroupId> {
        // A group without candidates has ended when its prompt is computed.
        let ended = self
            .groups
            .iter()
            .filter(|(_, group)| group.live() == 0 && group.prompt_done);
        let ended: Vec<GroupId> = ended.map(|(id, _)| *id).collect();
        for id in &ended {
            self.cancel(*id);
        }
        ended
    }

    fn running(&self) -> impl Iterator<Item = GroupId> {
        let running = self.groups.iter().filter(|(_, group)| group.running);
        running.map(|(id, _)| *id)
    }

    /// Lets waiting groups in, in their order, until one does not fit.
    fn admit(&mut self, step: &mut Step) {
        let running = self.groups.values().filter(|group| group.running);
        let mut candidates: usize = running.clone().map(Group::width).sum();
        // What those who run need soon is not to be given away: the rest of what they were admitted
        // for, and a page for each candidate to grow into.
        let mut promised: usize = running
            .map(|group| group.needed_pages().saturating_sub(group.held_pages()) + group.width())
            .sum();
        let waiting = self.groups.iter().filter(|(_, group)| !group.running);
        let waiting: Vec<GroupId> = waiting.map(|(id, _)| *id).collect();
        let mut anybody = self.running().next().is_some();
        for id in waiting {
            let Some(group) = self.groups.get_mut(&id) else {
                continue;
            };
            if anybody && candidates + group.width() > self.limits.candidates {
                return;
            }
            if group.shape.reads_shared_prompts {
                // The last token's row is needed, so it is computed in any case.
                let known = &group.prompt[..group.prompt.len().saturating_sub(1)];
                let pages = self.tree.claim(&mut self.pages, known);
                group.prefix.adopt(pages);
            }
            let missing = group.needed_pages().saturating_sub(group.held_pages());
            let wanted = promised + missing;
            let mut free = self.pages.free_pages();
            if free < wanted {
                free += self.tree.evictable(&self.pages);
            }
            if free < wanted && anybody {
                group.release(&mut self.pages);
                return;
            }
            group.running = true;
            anybody = true;
            candidates += group.width();
            promised += missing + group.width();
            step.admitted.push((id, group.prefix.len()));
        }
    }

    /// The rows of the budget, beyond those that must go, that each group gets: equal shares, and what
    /// one does not need goes to the others.
    fn shares(&self, running: &[GroupId]) -> BTreeMap<GroupId, usize> {
        let mut mandatory = 0;
        let mut hungry: Vec<(usize, GroupId)> = Vec::new();
        for &id in running {
            let group = &self.groups[&id];
            mandatory += group.mandatory_rows();
            hungry.push((group.appetite(), id));
        }
        let rows = self.limits.step_rows;
        let mut budget = rows.saturating_sub(mandatory).max(rows.div_ceil(8));
        // The least hungry first; among equals the oldest takes what does not divide.
        hungry.sort_unstable_by_key(|&(appetite, id)| (appetite, std::cmp::Reverse(id)));
        let mut shares = BTreeMap::new();
        for (place, &(appetite, id)) in hungry.iter().enumerate() {
            let share = appetite.min(budget / (hungry.len() - place));
            budget -= share;
            shares.insert(id, share);
        }
        shares
    }

    /// A group's part of the step; `None` if the budget has none for it, or if it was preempted.
    fn task(&mut self, id: GroupId, share: usize, preempted: &mut Vec<GroupId>) -> Option<Task> {
        let group = self.groups.get(&id).filter(|group| group.running)?;
        let prefill = group.next_prefill(share);
        let (pieces, missing) = match &prefill {
            Some(tokens) => (Vec::new(), group.prefix.missing_pages(tokens.len())),
            None => group.that_fit(group.next_pieces(share), || {
                self.pages.free_pages() + self.tree.evictable(&self.pages)
            }),
        };
        if !self.make_room(id, missing, preempted) {
            self.preempt(id, preempted);
            return None;
        }
        let group = self.groups.get_mut(&id)?;
        if let Some(tokens) = prefill {
            if tokens.is_empty() {
                return None;
            }
            let segment = group.prefix.extend(&mut self.pages, tokens.len());
            // `make_room` saw to it.
            let segment = segment.expect("there is room for the prompt's next tokens");
            let mut draws = Vec::new();
            if tokens.end == group.prompt.len() {
                group.prompt_done = true;
                draws = group.without_tokens();
            }
            return Some(Task {
                group: id,
                batch: BatchGroup {
                    segments: vec![segment],
                    ..BatchGroup::default()
                },
                work: Work::Prefill { tokens, draws },
            });
        }
        if pieces.is_empty() {
            return None;
        }
        let mut batch = BatchGroup {
            prefix: group.prefix.page_ids(),
            prefix_len: group.prefix.len(),
            segments: Vec::with_capacity(pieces.len()),
        };
        for piece in &pieces {
            let Candidate { sequence, .. } = &mut group.candidates[piece.candidate];
            batch
                .segments
                .push(match piece.tokens.end <= sequence.len() {
                    true => sequence.again(piece.tokens.start),
                    false => sequence
                        .extend(&mut self.pages, piece.tokens.len())
                        // As above.
                        .expect("there is room for the candidate's next tokens"),
                });
        }
        Some(Task {
            group: id,
            batch,
            work: Work::Candidates(pieces),
        })
    }

    /// Sees to it that so many pages are free: cached prompts go first, then the groups that came
    /// after `id`, the last one first.
    fn make_room(&mut self, id: GroupId, pages: usize, preempted: &mut Vec<GroupId>) -> bool {
        while self.pages.free_pages() < pages {
            if self.tree.evict(&mut self.pages) {
                continue;
            }
            let last = self.groups.range(id + 1..).rev();
            let mut last = last.filter(|(_, group)| group.running);
            match last.next().map(|(id, _)| *id) {
                Some(last) => self.preempt(last, preempted),
                None => return false,
            }
        }
        true
    }

    fn preempt(&mut self, id: GroupId, preempted: &mut Vec<GroupId>) {
        if let Some(group) = self.groups.get_mut(&id) {
            group.release(&mut self.pages);
            preempted.push(id);
        }
    }
}

/// Pages that so many tokens take.
fn pages_of(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_LEN)
}
