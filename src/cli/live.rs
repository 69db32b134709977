//! What a terminal shows while candidates are being written.
//!
//! [`LiveView`] takes the engine's events and lays out frames; [`LiveTerminal`] draws them on
//! standard error, each over the last, and wipes the last away.

use std::time::{Duration, Instant};

use console::{Term, measure_text_width, style};

use super::generate::Stream;
use crate::engine::Event;

/// Time between two frames: smooth enough to read, and nothing beside a decode step.
const FRAME: Duration = Duration::from_millis(66);

/// The candidates as they grow.
pub struct LiveView {
    stream: Stream,
    candidates: Vec<Growing>,
    prefill: (usize, usize),
    running: usize,
    tokens: usize,
}

#[derive(Clone, Default)]
struct Growing {
    text: String,
    logprob: f64,
    tokens: usize,
    finished: bool,
}

impl Growing {
    fn mean_logprob(&self) -> f64 {
        match self.tokens {
            0 => f64::NEG_INFINITY,
            tokens => self.logprob / tokens as f64,
        }
    }
}

impl LiveView {
    pub fn new(stream: Stream, n: usize) -> LiveView {
        LiveView {
            stream,
            candidates: vec![Growing::default(); n],
            prefill: (0, 0),
            running: n,
            tokens: 0,
        }
    }

    pub fn observe(&mut self, event: Event) {
        match event {
            Event::Prefill { done, total } => self.prefill = (done, total),
            Event::Token {
                candidate, logprob, ..
            } => {
                if let Some(candidate) = self.candidates.get_mut(candidate) {
                    candidate.logprob += f64::from(logprob);
                    candidate.tokens += 1;
                }
            }
            Event::Text { candidate, piece } => {
                if let Some(candidate) = self.candidates.get_mut(candidate) {
                    candidate.text.push_str(piece);
                }
            }
            Event::Finished { candidate, .. } => {
                if let Some(candidate) = self.candidates.get_mut(candidate) {
                    candidate.finished = true;
                }
            }
            Event::Step { tokens, running } => (self.tokens, self.running) = (tokens, running),
        }
    }

    /// The candidate with the highest mean log-probability so far.
    fn best(&self) -> usize {
        let mut best = 0;
        for (index, candidate) in self.candidates.iter().enumerate() {
            if candidate.mean_logprob() > self.candidates[best].mean_logprob() {
                best = index;
            }
        }
        best
    }

    /// The lines to show on a terminal of this size, none of them wider or more than it holds.
    /// `seconds` is the time since the first token.
    fn frame(&self, width: usize, height: usize, seconds: f64) -> Vec<String> {
        // The last column and line stay free, so that nothing wraps or scrolls.
        let (width, height) = (
            width.saturating_sub(1).max(1),
            height.saturating_sub(1).max(1),
        );
        let mut lines = vec![last_columns(&self.status(seconds), width)];
        let rest = height - 1;
        match self.stream {
            Stream::Best => {
                let wrapped = wrap(&self.candidates[self.best()].text, width);
                lines.extend(
                    wrapped[wrapped.len().saturating_sub(rest)..]
                        .iter()
                        .cloned(),
                );
            }
            Stream::All => {
                let best = self.best();
                for (index, candidate) in self.candidates.iter().enumerate().take(rest) {
                    let mark = match (index == best, candidate.finished) {
                        (true, _) => '*',
                        (false, true) => '.',
                        (false, false) => ' ',
                    };
                    let label = format!("{mark}{index:>3} ");
                    let room = width.saturating_sub(label.len());
                    lines.push(
                        last_columns(&label, width)
                            + &last_columns(&on_one_line(&candidate.text), room),
                    );
                }
            }
            Stream::None => {}
        }
        lines
    }

    fn status(&self, seconds: f64) -> String {
        let (done, total) = self.prefill;
        if self.tokens == 0 {
            return format!("reading the prompt: {done} of {total} tokens");
        }
        let rate = self.tokens as f64 / seconds.max(1e-3);
        let (n, running) = (self.candidates.len(), self.running);
        let shown = match self.stream {
            Stream::Best => format!("candidate {} leads; ", self.best()),
            _ => String::new(),
        };
        format!(
            "{shown}{running} of {n} running, {} tokens, {rate:.0} tokens/s",
            self.tokens
        )
    }
}

/// Draws a view on standard error.
pub struct LiveTerminal {
    view: LiveView,
    terminal: Term,
    drawn: usize,
    last_frame: Option<Instant>,
    first_token: Option<Instant>,
}

impl LiveTerminal {
    /// `None` where nothing is to be shown: not asked for, or no terminal.
    pub fn new(stream: Option<Stream>, n: usize) -> Option<LiveTerminal> {
        let terminal = Term::buffered_stderr();
        let stream = stream.unwrap_or(Stream::Best);
        if stream == Stream::None || !terminal.features().is_attended() {
            return None;
        }
        let view = LiveView::new(stream, n);
        Some(LiveTerminal {
            view,
            terminal,
            drawn: 0,
            last_frame: None,
            first_token: None,
        })
    }

    pub fn observe(&mut self, event: Event) {
        self.view.observe(event);
        if matches!(event, Event::Step { .. }) {
            self.first_token.get_or_insert_with(Instant::now);
        }
        let draws = matches!(event, Event::Step { .. } | Event::Prefill { .. });
        if draws && self.last_frame.is_none_or(|last| last.elapsed() >= FRAME) {
            self.draw();
            self.last_frame = Some(Instant::now());
        }
    }

    fn draw(&mut self) {
        let (height, width) = self.terminal.size();
        let seconds = self
            .first_token
            .map_or(0.0, |first| first.elapsed().as_secs_f64());
        let lines = self.view.frame(width.into(), height.into(), seconds);
        // A terminal that cannot be written to shows nothing; the result does not depend on it.
        let _ = self.terminal.clear_last_lines(self.drawn);
        for (index, line) in lines.iter().enumerate() {
            let line = if index == 0 {
                style(line).dim().for_stderr().to_string()
            } else {
                line.clone()
            };
            let _ = self.terminal.write_line(&line);
        }
        let _ = self.terminal.flush();
        self.drawn = lines.len();
    }
}

impl Drop for LiveTerminal {
    fn drop(&mut self) {
        let _ = self.terminal.clear_last_lines(self.drawn);
        let _ = self.terminal.flush();
    }
}

/// A text without line ends and other characters that move the cursor.
fn on_one_line(text: &str) -> String {
    text.chars()
        .map(|character| {
            if character.is_control() {
                ' '
            } else {
                character
            }
        })
        .collect()
}

/// The end of a line, as much as fits into so many columns.
fn last_columns(line: &str, width: usize) -> String {
    let mut columns = 0;
    let mut start = line.len();
    for (place, character) in line.char_indices().rev() {
        columns += columns_of(character);
        if columns > width {
            break;
        }
        start = place;
    }
    line[start..].to_string()
}

/// Lines of at most so many columns.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for line in text.lines() {
        let (mut current, mut columns) = (String::new(), 0);
        for character in on_one_line(line).chars() {
            let wide = columns_of(character);
            if columns + wide > width && !current.is_empty() {
                lines.push(std::mem::take(&mut current));
                columns = 0;
            }
            current.push(character);
            columns += wide;
        }
        lines.push(current);
    }
    lines
}

fn columns_of(character: char) -> usize {
    measure_text_width(character.encode_utf8(&mut [0; 4]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::stop::FinishReason;
    use proptest::prelude::*;

    fn grow(view: &mut LiveView, candidate: usize, piece: &str, logprob: f32) {
        view.observe(Event::Token {
            candidate,
            token: 0,
            logprob,
            top: &[],
        });
        view.observe(Event::Text { candidate, piece });
    }

    #[test]
    fn best_shows_the_candidate_with_the_highest_mean_logprob() {
        let mut view = LiveView::new(Stream::Best, 2);
        view.observe(Event::Prefill { done: 3, total: 9 });
        assert_eq!(
            view.frame(80, 24, 0.0),
            ["reading the prompt: 3 of 9 tokens"]
        );
        grow(&mut view, 0, "Paris", -1.0);
        grow(&mut view, 1, "Lyon", -2.0);
        view.observe(Event::Step {
            tokens: 2,
            running: 2,
        });
        assert_eq!(
            view.frame(80, 24, 1.0),
            [
                "candidate 0 leads; 2 of 2 running, 2 tokens, 2 tokens/s",
                "Paris"
            ]
        );
        // A mean, not a sum: the longer one may lead.
        grow(&mut view, 1, " is\nnice", -0.2);
        grow(&mut view, 1, "", -0.2);
        view.observe(Event::Finished {
            candidate: 0,
            reason: FinishReason::Stop,
        });
        view.observe(Event::Step {
            tokens: 4,
            running: 1,
        });
        assert_eq!(view.frame(80, 24, 1.0)[1..], ["Lyon is", "nice"]);
        // Where there is little room, the end of the text counts.
        assert_eq!(view.frame(4, 3, 1.0)[1..], ["e"]);
    }

    #[test]
    fn all_shows_the_end_of_every_candidate() {
        let mut view = LiveView::new(Stream::All, 3);
        grow(&mut view, 0, "one\ntwo three", -1.0);
        grow(&mut view, 2, "x", -0.1);
        view.observe(Event::Finished {
            candidate: 0,
            reason: FinishReason::Stop,
        });
        view.observe(Event::Step {
            tokens: 2,
            running: 2,
        });
        let frame = view.frame(13, 10, 1.0);
        assert_eq!(frame[1..], [".  0 o three", "   1 ", "*  2 x"]);
    }

    #[test]
    fn escape_sequences_of_a_candidate_do_not_reach_the_terminal() {
        let mut view = LiveView::new(Stream::Best, 1);
        grow(&mut view, 0, "a\u{1b}[2Jb\rc", 0.0);
        view.observe(Event::Step {
            tokens: 1,
            running: 1,
        });
        assert_eq!(view.frame(80, 24, 1.0)[1], "a [2Jb c");
    }

    proptest! {
        /// Whatever the candidates say, a frame stays within its terminal.
        #[test]
        fn frames_fit_the_terminal(
            pieces in prop::collection::vec((0usize..5, "[a-z中é\n\t 👍]{0,20}", -5.0f32..0.0), 0..20),
            width in 1usize..50,
            height in 1usize..12,
            all in any::<bool>(),
        ) {
            let mut view = LiveView::new(if all { Stream::All } else { Stream::Best }, 5);
            for (candidate, piece, logprob) in &pieces {
                grow(&mut view, *candidate, piece, *logprob);
            }
            view.observe(Event::Step { tokens: pieces.len(), running: 5 });
            let frame = view.frame(width, height, 1.0);
            prop_assert!(frame.len() < height.max(2));
            for line in frame {
                // A character of two columns fits no line of one.
                prop_assert!(measure_text_width(&line) < width.max(3), "{line:?}");
                prop_assert!(!line.contains(char::is_control));
            }
        }
    }
}
