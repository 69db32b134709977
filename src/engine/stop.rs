//! When a candidate ends, and which of its text and tokens are kept: a state machine without model,
//! tokenizer or clock.
//!
//! Text arrives in pieces, one for each token; a stop string may begin in one piece and end in
//! another. The outcome does not depend on how the text was cut into pieces: the stop string that is
//! complete first ends the candidate (of several that end at the same character, the longest), and
//! the text is cut where it begins.

use std::fmt;

use serde::Serialize;

/// Why a candidate ended. OpenAI's API knows two reasons, and so do `Display` and serde: `stop` and
/// `length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum FinishReason {
    /// The model ended it with an end token.
    #[serde(rename = "stop")]
    Stop,
    /// A stop string was written.
    #[serde(rename = "stop")]
    StopString,
    /// It has as many tokens as were allowed.
    #[serde(rename = "length")]
    Length,
    /// Prompt and answer fill the model's context.
    #[serde(rename = "length")]
    Context,
}

impl fmt::Display for FinishReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            FinishReason::Stop | FinishReason::StopString => "stop",
            FinishReason::Length | FinishReason::Context => "length",
        })
    }
}

/// What ends a candidate; the same for all candidates of a request.
#[derive(Clone, Debug)]
pub struct StopConditions {
    end_tokens: Vec<u32>,
    strings: Vec<StopString>,
    max_tokens: usize,
    context: usize,
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum StopError {
    #[error("--stop: an empty string would end every answer before it begins; leave it out")]
    EmptyString,
}

impl StopConditions {
    /// `end_tokens` end an answer and are not part of it; `max_tokens` is the most that an answer
    /// may have, and `context` what the model's context has room for behind the prompt, in tokens.
    /// Neither count includes the end token.
    pub fn new(
        end_tokens: &[u32],
        stop_strings: &[impl AsRef<str>],
        max_tokens: usize,
        context: usize,
    ) -> Result<Self, StopError> {
        let strings = stop_strings
            .iter()
            .map(|string| StopString::new(string.as_ref()));
        Ok(StopConditions {
            end_tokens: end_tokens.to_vec(),
            strings: strings.collect::<Result<_, _>>()?,
            max_tokens,
            context,
        })
    }

    /// Tokens that end an answer and are not part of it.
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// The reason why a candidate of this many tokens cannot go on.
    fn length_reached(&self, tokens: usize) -> Option<FinishReason> {
        if tokens >= self.max_tokens {
            Some(FinishReason::Length)
        } else if tokens >= self.context {
            Some(FinishReason::Context)
        } else {
            None
        }
    }
}

/// A stop string, searched byte by byte (Knuth, Morris, Pratt). UTF-8 makes bytes as good as
/// characters: no character's bytes begin inside another.
#[derive(Clone, Debug)]
struct StopString {
    bytes: Vec<u8>,
    /// `fallback[n]`: the longest proper prefix of the first n + 1 bytes that is also their suffix.
    fallback: Vec<usize>,
}

impl StopString {
    fn new(string: &str) -> Result<Self, StopError> {
        let bytes = string.as_bytes().to_vec();
        if bytes.is_empty() {
            return Err(StopError::EmptyString);
        }
        let mut string = StopString {
            fallback: vec![0],
            bytes,
        };
        for end in 1..string.bytes.len() {
            let shorter = string.fallback[end - 1];
            let next = string.advance(shorter, string.bytes[end]);
            string.fallback.push(next);
        }
        Ok(string)
    }

    /// Bytes matched after `byte`, when `matched` (fewer than all) were matched before it.
    fn advance(&self, mut matched: usize, byte: u8) -> usize {
        while matched > 0 && self.bytes[matched] != byte {
            matched = self.fallback[matched - 1];
        }
        matched + usize::from(self.bytes[matched] == byte)
    }
}

/// One candidate on its way to its end.
///
/// Call [`push`](Self::push) for every token until it gives a reason; then [`close`](Self::close)
/// once. After either, [`stream`](Self::stream) gives the text that is new and certain to stay.
#[derive(Clone, Debug)]
pub struct StopState {
    text: String,
    /// Bytes of `text` before each token's piece.
    token_starts: Vec<usize>,
    /// For each stop string, how many of its bytes the text ends with.
    matched: Vec<usize>,
    /// Bytes of `text` that [`stream`](Self::stream) has given out.
    streamed: usize,
    finish: Option<FinishReason>,
    closed: bool,
}

impl StopState {
    /// A candidate without tokens; already finished if the conditions allow it none.
    pub fn new(conditions: &StopConditions) -> Self {
        StopState {
            text: String::new(),
            token_starts: Vec::new(),
            matched: vec![0; conditions.strings.len()],
            streamed: 0,
            finish: conditions.length_reached(0),
            closed: false,
        }
    }

    /// Takes the next token with the text that it completes (empty while a character is unfinished;
    /// ignored for an end token), and says whether it was the last. Once finished, further tokens
    /// change nothing.
    pub fn push(
        &mut self,
        conditions: &StopConditions,
        token: u32,
        piece: &str,
    ) -> Option<FinishReason> {
        if self.finish.is_some() {
            return self.finish;
        }
        if conditions.end_tokens.contains(&token) {
            self.finish = Some(FinishReason::Stop);
            return self.finish;
        }
        self.token_starts.push(self.text.len());
        if !self.append(conditions, piece) {
            self.finish = conditions.length_reached(self.token_starts.len());
        }
        self.finish
    }

    /// Ends the text with what was left in the detokenizer (an unfinished character; mostly
    /// nothing), which may still complete a stop string, and gives the final reason: `None` for a
    /// candidate closed before it was finished, by cancellation.
    pub fn close(&mut self, conditions: &StopConditions, rest: &str) -> Option<FinishReason> {
        if !self.closed && self.finish != Some(FinishReason::StopString) {
            self.append(conditions, rest);
        }
        self.closed = true;
        self.finish
    }

    /// Appends `piece`; if that completes a stop string, cuts the text there, finishes, and says so.
    fn append(&mut self, conditions: &StopConditions, piece: &str) -> bool {
        let before = self.text.len();
        self.text.push_str(piece);
        for (offset, byte) in piece.bytes().enumerate() {
            let mut longest = 0;
            for (matched, string) in self.matched.iter_mut().zip(&conditions.strings) {
                *matched = string.advance(*matched, byte);
                if *matched == string.bytes.len() {
                    longest = longest.max(*matched);
                }
            }
            if longest > 0 {
                self.text.truncate(before + offset + 1 - longest);
                self.finish = Some(FinishReason::StopString);
                return true;
            }
        }
        false
    }

    /// The text that has become certain since the last call: whatever could still turn out to be
    /// the beginning of a stop string is held back, until the candidate is closed or the stop
    /// string complete.
    pub fn stream(&mut self) -> &str {
        let held_back = if self.closed || self.finish == Some(FinishReason::StopString) {
            0
        } else {
            self.matched.iter().copied().max().unwrap_or(0)
        };
        let certain = self.text.len() - held_back;
        let from = std::mem::replace(&mut self.streamed, certain);
        &self.text[from..certain]
    }

    /// The text so far, cut before the stop string if one was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish
    }

    /// Tokens taken, the end token not counted.
    pub fn tokens(&self) -> usize {
        self.token_starts.len()
    }

    /// How many of the tokens taken belong to [`text`](Self::text): those whose piece begins before
    /// the cut, be it that the cut goes through them. A token without text (part of a character, a
    /// special token) belongs to the piece that follows it. The last of them is the one whose
    /// hidden state stands for the candidate; 0 if the stop string opens the text.
    pub fn kept_tokens(&self) -> usize {
        match self.finish {
            Some(FinishReason::StopString) => self
                .token_starts
                .partition_point(|&start| start < self.text.len()),
            _ => self.token_starts.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const END: u32 = 2;

    fn conditions(strings: &[&str], max_tokens: usize) -> StopConditions {
        StopConditions::new(&[END, 7], strings, max_tokens, 1000).unwrap()
    }

    /// Feeds the pieces as tokens; the state after the end, and what was streamed after each.
    fn run(conditions: &StopConditions, pieces: &[&str]) -> (StopState, Vec<String>) {
        let mut state = StopState::new(conditions);
        let mut streamed = Vec::new();
        for piece in pieces {
            let reason = state.push(conditions, 100, piece);
            streamed.push(state.stream().to_string());
            if reason.is_some() {
                break;
            }
        }
        state.close(conditions, "");
        streamed.push(state.stream().to_string());
        (state, streamed)
    }

    #[test]
    fn end_token_finishes_without_becoming_text() {
        let conditions = conditions(&[], 10);
        for end in [END, 7] {
            let mut state = StopState::new(&conditions);
            assert_eq!(state.push(&conditions, 5, "four"), None);
            assert_eq!(
                state.push(&conditions, end, "</s>"),
                Some(FinishReason::Stop)
            );
            assert_eq!(state.close(&conditions, ""), Some(FinishReason::Stop));
            assert_eq!(state.text(), "four");
            assert_eq!((state.tokens(), state.kept_tokens()), (1, 1));
            // Nothing changes afterwards.
            assert_eq!(state.push(&conditions, 5, "more"), Some(FinishReason::Stop));
            assert_eq!(state.text(), "four");
        }
    }

    #[test]
    fn stop_string_across_pieces_is_held_back_and_cut() {
        let conditions = conditions(&["\n\nQ:"], 10);
        let (state, streamed) = run(&conditions, &["Paris", ".\n", "\n", "Q", ": Next"]);
        assert_eq!(state.finish_reason(), Some(FinishReason::StopString));
        assert_eq!(state.text(), "Paris.");
        assert_eq!(streamed, ["Paris", ".", "", "", "", ""]);
        // "Paris" and ".\n", which begins before the cut.
        assert_eq!((state.tokens(), state.kept_tokens()), (5, 2));
    }

    #[test]
    fn held_back_text_is_released_when_it_turns_out_harmless() {
        let conditions = conditions(&["aab"], 4);
        let (state, streamed) = run(&conditions, &["xa", "a", "a", "c"]);
        assert_eq!(streamed, ["x", "", "a", "aac", ""]);
        assert_eq!(state.finish_reason(), Some(FinishReason::Length));
        // Ends while text is held back: released by the close.
        let (state, streamed) = run(&conditions, &["x", "y", "z", "aa"]);
        assert_eq!(streamed, ["x", "y", "z", "", "aa"]);
        assert_eq!((state.text(), state.kept_tokens()), ("xyzaa", 4));
    }

    #[test]
    fn the_stop_string_that_is_complete_first_counts() {
        let (state, _) = run(&conditions(&["abcd", "c"], 9), &["xabcd"]);
        assert_eq!(state.text(), "xab");
        // Both end at the same character: the longer one.
        let (state, _) = run(&conditions(&["c", "abc"], 9), &["xabcd"]);
        assert_eq!(state.text(), "x");
    }

    #[test]
    fn stop_string_at_the_very_beginning_keeps_nothing() {
        let (state, streamed) = run(&conditions(&["###"], 9), &["#", "##"]);
        assert_eq!(
            (state.text(), state.tokens(), state.kept_tokens()),
            ("", 2, 0)
        );
        assert_eq!(streamed.concat(), "");
    }

    #[test]
    fn cut_inside_a_token_keeps_it() {
        let (state, _) = run(&conditions(&["."], 9), &["one", " two. Three"]);
        assert_eq!((state.text(), state.kept_tokens()), ("one two", 2));
    }

    #[test]
    fn tokens_without_text_belong_to_the_piece_that_follows() {
        let conditions = conditions(&["!"], 9);
        // A character of two tokens, the first without text.
        let (state, _) = run(&conditions, &["a", "", "é", "!"]);
        assert_eq!((state.text(), state.kept_tokens()), ("aé", 3));
        // The tokens of the stop string itself are not kept, be they empty.
        let (state, _) = run(&conditions, &["a", "", "!"]);
        assert_eq!((state.text(), state.kept_tokens()), ("a", 1));
    }

    #[test]
    fn limits_of_length() {
        let (state, _) = run(&conditions(&[], 2), &["a", "b", "c"]);
        assert_eq!(state.finish_reason(), Some(FinishReason::Length));
        assert_eq!((state.text(), state.kept_tokens()), ("ab", 2));

        let full = StopConditions::new(&[], &[] as &[&str], 100, 1).unwrap();
        let (state, _) = run(&full, &["a", "b"]);
        assert_eq!(state.finish_reason(), Some(FinishReason::Context));

        // A stop string completed by the last token allowed counts as one.
        let (state, _) = run(&conditions(&["b"], 2), &["a", "b"]);
        assert_eq!(state.finish_reason(), Some(FinishReason::StopString));

        let none = StopState::new(&conditions(&[], 0));
        assert_eq!(none.finish_reason(), Some(FinishReason::Length));
        assert_eq!(none.kept_tokens(), 0);
    }

    #[test]
    fn the_rest_of_the_detokenizer_counts() {
        let conditions = conditions(&["\u{fffd}"], 1);
        let mut state = StopState::new(&conditions);
        assert_eq!(state.push(&conditions, 9, ""), Some(FinishReason::Length));
        assert_eq!(
            state.close(&conditions, "\u{fffd}"),
            Some(FinishReason::StopString)
        );
        assert_eq!(state.text(), "");
    }

    #[test]
    fn cancelled_candidates_have_no_reason() {
        let conditions = conditions(&["zz"], 9);
        let mut state = StopState::new(&conditions);
        state.push(&conditions, 9, "az");
        assert_eq!(state.close(&conditions, ""), None);
        assert_eq!(state.stream(), "az");
    }

    #[test]
    fn empty_stop_strings_are_refused() {
        let error = StopConditions::new(&[], &["a", ""], 1, 1).unwrap_err();
        assert_eq!(error, StopError::EmptyString);
    }

    #[test]
    fn reasons_read_as_in_the_openai_api() {
        for (reason, name) in [
            (FinishReason::Stop, "stop"),
            (FinishReason::StopString, "stop"),
            (FinishReason::Length, "length"),
            (FinishReason::Context, "length"),
        ] {
            assert_eq!(reason.to_string(), name);
            assert_eq!(serde_json::to_value(reason).unwrap(), name);
        }
    }

    proptest! {
        /// Against a naive search, with the text cut into pieces anywhere: the same text and
        /// reason, nothing streamed is ever taken back, and nothing certain is held back.
        #[test]
        fn pieces_do_not_matter(
            text in "[abé]{0,24}",
            strings in prop::collection::vec("[abé]{1,4}", 0..4),
            cuts in prop::collection::vec(any::<bool>(), 24),
        ) {
            let end = |start: usize, string: &str| {
                text[start..].starts_with(string).then_some(start + string.len())
            };
            let first = text.char_indices().flat_map(|(start, _)| {
                strings.iter().filter_map(move |string| Some((end(start, string)?, start)))
            }).min();
            let expected = first.map_or(&text[..], |(_, start)| &text[..start]);

            let mut pieces = vec![String::new()];
            for (character, &cut) in text.chars().zip(&cuts) {
                if cut {
                    pieces.push(String::new());
                }
                pieces.last_mut().unwrap().push(character);
            }
            let conditions = StopConditions::new(&[], &strings, 1000, 1000).unwrap();
            let mut state = StopState::new(&conditions);
            let (mut fed, mut streamed) = (String::new(), String::new());
            for piece in &pieces {
                fed.push_str(piece);
                let reason = state.push(&conditions, 0, piece);
                streamed.push_str(state.stream());
                if reason.is_some() {
                    break;
                }
                let longest_held = fed
                    .char_indices()
                    .map(|(start, _)| &fed[start..])
                    .find(|suffix| strings.iter().any(|string| string.starts_with(suffix)))
                    .map_or(0, str::len);
                prop_assert_eq!(&streamed, &fed[..fed.len() - longest_held]);
            }
            state.close(&conditions, "");
            streamed.push_str(state.stream());
            prop_assert_eq!(state.text(), expected);
            prop_assert_eq!(streamed, expected);
            prop_assert_eq!(
                state.finish_reason(),
                first.map(|_| FinishReason::StopString)
            );
            // The kept tokens are the fewest whose pieces hold the text.
            if first.is_some() {
                let held = |tokens: usize| pieces[..tokens].concat();
                let kept = state.kept_tokens();
                prop_assert!(held(kept).starts_with(expected));
                prop_assert!(kept == 0 || held(kept - 1).len() < expected.len());
            }
        }
    }
}
