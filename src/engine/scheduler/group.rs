//! A prompt and its candidates, as far as the scheduler knows them: numbers of tokens, and pages.

use super::pages::PagePool;
use super::sequence::Sequence;
use super::{Piece, Purpose, pages_of};
use std::ops::Range;
use std::sync::Arc;

/// What a group is going to need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupShape {
    /// Candidates to write, and the most tokens of each.
    pub write: usize,
    pub max_tokens: usize,
    /// Candidates that are given, by their numbers of tokens; they come behind the written ones.
    pub given: Vec<usize>,
    /// Whether the prompt may begin with pages that another group computed.
    pub reads_shared_prompts: bool,
    /// Whether its own may be left to others: only if all layers are run.
    pub shares_prompt: bool,
}

impl GroupShape {
    /// Candidates to write, for a prompt that takes and leaves shared pages.
    pub fn write(candidates: usize, max_tokens: usize) -> GroupShape {
        GroupShape {
            write: candidates,
            max_tokens,
            given: Vec::new(),
            reads_shared_prompts: true,
            shares_prompt: true,
        }
    }

    /// Most pages that the group takes, whatever it is interrupted by. Given candidates go through the
    /// cache one after the other.
    pub fn most_pages(&self, prompt: usize) -> usize {
        let given = self.given.iter().copied().max().unwrap_or(0);
        pages_of(prompt)
            .saturating_add(self.write.saturating_mul(pages_of(self.max_tokens)))
            .saturating_add(pages_of(given))
    }
}

pub struct Group {
    pub prompt: Arc<[u32]>,
    pub shape: GroupShape,
    /// Whether it has pages, rather than waiting for some.
    pub running: bool,
    /// Whether the whole prompt was computed once, be it that its pages are lost again.
    pub prompt_done: bool,
    pub prefix: Sequence,
    pub candidates: Vec<Candidate>,
}

pub struct Candidate {
    /// Keys and values of the tokens that are computed.
    pub sequence: Sequence,
    /// Tokens that there are.
    pub known: usize,
    pub phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Draws a token whenever all that it has are computed.
    Writing,
    /// Is over once the state of the token of this index is computed.
    Settling(usize),
    Ended,
}

impl Candidate {
    fn new(known: usize, phase: Phase) -> Candidate {
        Candidate {
            sequence: Sequence::default(),
            known,
            phase,
        }
    }

    /// Ends it, with or without one more token whose state is wanted. Its pages are free unless they
    /// are still read.
    pub fn end(&mut self, last: Option<usize>, pages: &mut PagePool) {
        match last {
            Some(last) => {
                self.phase = Phase::Settling(last);
                self.known = last + 1;
            }
            None => {
                self.phase = Phase::Ended;
                self.sequence.release(pages);
            }
        }
    }

    /// Tokens that are to be computed, those without which nothing can be drawn or settled included.
    fn to_compute(&self) -> Range<usize> {
        match self.phase {
            Phase::Writing => self.sequence.len()..self.known,
            Phase::Settling(last) => self.sequence.len().min(last)..last + 1,
            Phase::Ended => 0..0,
        }
    }

    /// Pages that its tokens up to `end` take beside those that it has.
    pub fn missing_pages(&self, end: usize) -> usize {
        self.sequence
            .missing_pages(end.saturating_sub(self.sequence.len()))
    }
}

impl Group {
    pub fn new(prompt: Arc<[u32]>, shape: GroupShape) -> Group {
        let written = (0..shape.write).map(|_| Candidate::new(0, Phase::Writing));
        let given = shape.given.iter().map(|&tokens| {
            let phase = tokens.checked_sub(1).map_or(Phase::Ended, Phase::Settling);
            Candidate::new(tokens, phase)
        });
        Group {
            candidates: written.chain(given).collect(),
            prompt,
            shape,
            running: false,
            prompt_done: false,
            prefix: Sequence::default(),
        }
    }

    /// Gives all pages back and waits.
    pub fn release(&mut self, pages: &mut PagePool) {
        self.running = false;
        self.prefix.release(pages);
        for candidate in &mut self.candidates {
            candidate.sequence.release(pages);
        }
    }

    /// Candidates that have not ended.
    pub fn live(&self) -> usize {
        let live = |candidate: &&Candidate| candidate.phase != Phase::Ended;
        self.candidates.iter().filter(live).count()
    }

    /// Candidates that go through the model side by side: those that are written, and of the given ones
    /// about one at a time.
    pub fn width(&self) -> usize {
        let phases = || self.candidates.iter().map(|candidate| candidate.phase);
        let writing = phases().filter(|phase| *phase == Phase::Writing).count();
        let settling = phases().any(|phase| matches!(phase, Phase::Settling(_)));
        writing + usize::from(settling)
    }

    /// Candidates that have no tokens yet and are to be written.
    pub fn without_tokens(&self) -> Vec<usize> {
        let blank =
            |candidate: &Candidate| candidate.phase == Phase::Writing && candidate.known == 0;
        let all = 0..self.candidates.len();
        all.filter(|&index| blank(&self.candidates[index]))
            .collect()
    }

    pub fn held_pages(&self) -> usize {
        let candidates = self.candidates.iter().map(|c| c.sequence.pages());
        self.prefix.pages() + candidates.sum::<usize>()
    }

    /// Pages with which all of its tokens are computed and every candidate has drawn one more; of those
    /// that settle, one at a time.
    pub fn needed_pages(&self) -> usize {
        let mut pages = pages_of(self.prompt.len());
        let mut settling = 0;
        for candidate in &self.candidates {
            match candidate.phase {
                Phase::Writing => pages += pages_of(candidate.known.max(1)),
                Phase::Settling(last) => settling = settling.max(pages_of(last + 1)),
                Phase::Ended => {}
            }
        }
        pages + settling
    }

    fn prefilled(&self) -> bool {
        self.prefix.len() == self.prompt.len()
    }

    /// Whether some candidate that is being written has more to compute than the token drawn last.
    fn catching_up(&self) -> bool {
        let behind = |candidate: &Candidate| {
            candidate.phase == Phase::Writing && candidate.to_compute().len() > 1
        };
        self.candidates.iter().any(behind)
    }

    /// Rows that go with the next step whatever the budget.
    pub fn mandatory_rows(&self) -> usize {
        match self.prefilled() {
            true => self.candidates.iter().filter(|c| self.must_go(c)).count(),
            false => 0,
        }
    }

    /// A single row that a candidate draws from or settles with.
    fn must_go(&self, candidate: &Candidate) -> bool {
        candidate.to_compute().len() == 1
            && match candidate.phase {
                Phase::Writing => !self.catching_up(),
                Phase::Settling(_) => !candidate.sequence.is_empty() || candidate.known == 1,
                Phase::Ended => false,
            }
    }

    /// Rows that it could use beyond those.
    pub fn appetite(&self) -> usize {
        if !self.prefilled() {
            return self.prompt.len() - self.prefix.len();
        }
        let optional = |candidate: &Candidate| match candidate.phase {
            // The last one draws, and goes when all have caught up.
            Phase::Writing => candidate.to_compute().len().saturating_sub(1),
            Phase::Settling(_) if !self.must_go(candidate) => candidate.to_compute().len(),
            Phase::Settling(_) | Phase::Ended => 0,
        };
        self.candidates.iter().map(optional).sum()
    }

    /// Tokens of the prompt that come next, `None` behind its end.
    pub fn next_prefill(&self, share: usize) -> Option<Range<usize>> {
        let done = self.prefix.len();
        let rows = share.min(self.prompt.len() - done);
        (!self.prefilled()).then_some(done..done + rows)
    }

    /// Tokens of the candidates that come next, with at most `share` rows beyond the mandatory ones.
    pub fn next_pieces(&self, mut share: usize) -> Vec<Piece> {
        let catching_up = self.catching_up();
        let mut pieces = Vec::new();
        for (index, candidate) in self.candidates.iter().enumerate() {
            let all = candidate.to_compute();
            let (end, purpose) = if self.must_go(candidate) {
                let purpose = match candidate.phase {
                    Phase::Writing => Purpose::Draw,
                    _ => Purpose::State,
                };
                (all.end, purpose)
            } else {
                let wanted = match candidate.phase {
                    Phase::Writing if catching_up => all.len().saturating_sub(1),
                    Phase::Settling(_) => all.len(),
                    _ => 0,
                };
                let rows = wanted.min(share);
                share -= rows;
                let end = all.start + rows;
                match candidate.phase {
                    Phase::Settling(_) if end == all.end => (end, Purpose::State),
                    _ => (end, Purpose::CatchUp),
                }
            };
            if end > all.start {
                pieces.push(Piece {
                    candidate: index,
                    tokens: all.start..end,
                    purpose,
                });
            }
        }
        pieces
    }

    /// Of the pieces those for which there is room, with the pages that they take. Drawing is not to be
    /// delayed, and the first piece is not either: for them others have to go.
    pub fn that_fit(
        &self,
        mut pieces: Vec<Piece>,
        room: impl FnOnce() -> usize,
    ) -> (Vec<Piece>, usize) {
        let missing =
            |piece: &Piece| self.candidates[piece.candidate].missing_pages(piece.tokens.end);
        let draws = |piece: &Piece| piece.purpose == Purpose::Draw;
        let mut taken: usize = pieces.iter().filter(|p| draws(p)).map(missing).sum();
        let all: usize = pieces.iter().map(missing).sum();
        if all == 0 {
            return (pieces, 0);
        }
        let room = room();
        let mut progress = pieces.iter().any(draws);
        // Given candidates take pages in their order, lest two of them have some and neither enough.
        let mut full = false;
        pieces.retain(|piece| {
            if draws(piece) {
                return true;
            }
            let fits = match missing(piece) {
                0 => true,
                missing => !full && (!progress || taken + missing <= room),
            };
            full |= !fits;
            if fits {
                taken += missing(piece);
                progress = true;
            }
            fits
        });
        (pieces, taken)
    }
}
