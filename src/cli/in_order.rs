//! Items that the model is busy with: several at a time, so that the batch stays full while candidates
//! of one after the other end, and handed out in the order in which they began.

use std::collections::{HashMap, VecDeque};

use super::interrupt;
use super::session::Session;
use crate::engine::scheduler::{GroupId, Limits};
use crate::engine::{Completion, EngineError};

/// Candidates that decode at a time, where an item does not have more by itself: what a batch gains
/// by more rows is little, and the last layer's rows and the keys and values take memory.
const ROWS: usize = 128;

/// Bytes of keys and values of earlier prompts that are kept: items of a task mostly begin alike, with
/// the same instruction and solved examples.
const CACHED_PROMPT_BYTES: usize = 256 << 20;

/// What came of an item's groups, in the order in which they were begun; or what ended the first one
/// that failed.
pub type Ended = Result<Vec<Completion>, EngineError>;

/// An item's groups, as far as they have ended.
struct Pending<T> {
    what: T,
    results: Vec<Option<Result<Completion, EngineError>>>,
}

/// Items from the first that has not been handed out to the last that has begun; `T` is whatever
/// belongs to one.
pub struct InOrder<T> {
    pending: VecDeque<Pending<T>>,
    /// The first one's number.
    first: usize,
    /// Of each group, its item, and which of the item's groups it is.
    groups: HashMap<GroupId, (usize, usize)>,
}

impl<T> InOrder<T> {
    /// Nothing yet; `first` is the number of the item to begin with. The session gets the limits that
    /// go with it.
    pub fn new(session: Session, first: usize) -> (Session, InOrder<T>) {
        let page_bytes = session.engine.page_bytes();
        let limits = Limits {
            cached_pages: CACHED_PROMPT_BYTES / page_bytes,
            candidates: ROWS,
            ..Limits::default()
        };
        let items = InOrder {
            pending: VecDeque::new(),
            first,
            groups: HashMap::new(),
        };
        (session.with_limits(limits), items)
    }

    /// The number of the next item to begin.
    pub fn next(&self) -> usize {
        self.first + self.pending.len()
    }

    /// Whether there is less in the engine's queue, with `n` candidates a group, than what may decode
    /// at a time.
    pub fn has_room(&self, n: usize) -> bool {
        self.groups.len() * n < 2 * ROWS.max(n)
    }

    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// The next item: its groups were submitted to the engine.
    pub fn begin(&mut self, what: T, groups: &[GroupId]) {
        let number = self.next();
        for (place, &group) in groups.iter().enumerate() {
            self.groups.insert(group, (number, place));
        }
        let results = groups.iter().map(|_| None).collect();
        self.pending.push_back(Pending { what, results });
    }

    /// The next item, of which everything is there.
    pub fn ended(&mut self, what: T, result: Result<Completion, EngineError>) {
        let results = vec![Some(result)];
        self.pending.push_back(Pending { what, results });
    }

    /// One step of everything that has begun.
    pub fn step(&mut self, session: &mut Session) {
        for completed in session.engine.step(&mut |_, _| interrupt::flow()) {
            if let Some((number, place)) = self.groups.remove(&completed.group) {
                self.pending[number - self.first].results[place] = Some(completed.result);
            }
        }
    }

    /// The first item's number and what came of it, once all its groups have ended.
    pub fn hand_out(&mut self) -> Option<(usize, T, Ended)> {
        let first = self
            .pending
            .pop_front_if(|first| first.results.iter().all(Option::is_some))?;
        let number = self.first;
        self.first += 1;
        Some((
            number,
            first.what,
            first.results.into_iter().flatten().collect(),
        ))
    }
}
