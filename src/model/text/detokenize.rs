//! Token ids to text, one at a time.

use std::sync::Arc;

use super::token_table::TokenTable;

/// Turns a stream of token ids into text, in time linear in the text.
///
/// A token may end in the middle of a character; its bytes are held back until the character is
/// complete, or until it is certain that they are no character: then U+FFFD stands for them, by
/// the rule of [`String::from_utf8_lossy`]. However a sequence of tokens is cut up, the text is
/// the same, and equals [`Tokenizer::decode`](super::Tokenizer::decode) of the whole.
#[derive(Clone)]
pub struct Detokenizer {
    table: Arc<TokenTable>,
    skip_special: bool,
    /// Spaces that may still be dropped at the start.
    leading_spaces: usize,
    text: String,
    /// Bytes of a character that is not complete: fewer than four between calls.
    pending: Vec<u8>,
}

impl Detokenizer {
    pub(super) fn new(table: Arc<TokenTable>, skip_special: bool) -> Self {
        let leading_spaces = table.leading_spaces();
        Self {
            table,
            skip_special,
            leading_spaces,
            text: String::new(),
            pending: Vec::new(),
        }
    }

    /// Takes one token and returns the text that it completes, which may be empty.
    ///
    /// An id outside the vocabulary stands for nothing.
    pub fn push(&mut self, token: u32) -> &str {
        let start = self.text.len();
        if !(self.skip_special && self.table.is_special(token)) {
            let mut bytes = self.table.bytes(token);
            while self.leading_spaces > 0 && !bytes.is_empty() {
                if bytes[0] == b' ' {
                    bytes = &bytes[1..];
                    self.leading_spaces -= 1;
                } else {
                    self.leading_spaces = 0;
                }
            }
            self.pending.extend_from_slice(bytes);
            self.take_complete();
        }
        &self.text[start..]
    }

    /// Ends the text: an incomplete character becomes U+FFFD, which is returned.
    pub fn finish(&mut self) -> &str {
        let start = self.text.len();
        if !self.pending.is_empty() {
            self.pending.clear();
            self.text.push(char::REPLACEMENT_CHARACTER);
        }
        &self.text[start..]
    }

    /// All text so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// All text, with what [`finish`](Self::finish) adds.
    pub fn into_text(mut self) -> String {
        self.finish();
        self.text
    }

    /// Moves what is decided from `pending` to `text`.
    fn take_complete(&mut self) {
        let mut start = 0;
        while start < self.pending.len() {
            match std::str::from_utf8(&self.pending[start..]) {
                Ok(text) => {
                    self.text.push_str(text);
                    start = self.pending.len();
                }
                Err(error) => {
                    let end = start + error.valid_up_to();
                    // Nothing is lost here: these bytes were just found valid.
                    self.text
                        .push_str(&String::from_utf8_lossy(&self.pending[start..end]));
                    start = end;
                    match error.error_len() {
                        Some(length) => {
                            self.text.push(char::REPLACEMENT_CHARACTER);
                            start += length;
                        }
                        None => break,
                    }
                }
            }
        }
        self.pending.drain(..start);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::token_table::{Entry, PieceEncoding};
    use super::*;

    /// Fallback tokens for all bytes (ids 0 to 255), then a few words.
    fn table(leading_spaces: usize) -> Arc<TokenTable> {
        let words = ["▁the", "▁", "é", "漢字", "▁▁", "</s>"];
        let entries = (0..256u32)
            .map(|byte| (byte, format!("<0x{byte:02X}>")))
            .chain((256..).zip(words.map(String::from)))
            .map(|(id, text)| Entry {
                id,
                special: text == "</s>",
                added: text == "</s>",
                text,
            })
            .collect();
        let encoding = PieceEncoding::Marked {
            byte_fallback: true,
            leading_spaces,
        };
        Arc::new(TokenTable::new(entries, encoding, "test").unwrap())
    }

    #[test]
    fn characters_are_never_split() {
        let mut detokenizer = Detokenizer::new(table(0), true);
        assert_eq!(detokenizer.push(256), " the");
        assert_eq!(detokenizer.push(0xF0), "");
        assert_eq!(detokenizer.push(0x9F), "");
        assert_eq!(detokenizer.push(261), "", "a special token is skipped");
        assert_eq!(detokenizer.push(0x98), "");
        assert_eq!(detokenizer.push(0x80), "😀");
        assert_eq!(detokenizer.push(0xE6), "");
        assert_eq!(detokenizer.push(258), "\u{FFFD}é");
        assert_eq!(detokenizer.push(0xE6), "");
        assert_eq!(detokenizer.push(0xBC), "");
        assert_eq!(detokenizer.finish(), "\u{FFFD}");
        assert_eq!(detokenizer.finish(), "");
        assert_eq!(detokenizer.text(), " the😀\u{FFFD}é\u{FFFD}");
    }

    #[test]
    fn leading_space_is_dropped_once() {
        let decode = |tokens: &[u32]| {
            let mut detokenizer = Detokenizer::new(table(1), true);
            for &token in tokens {
                detokenizer.push(token);
            }
            detokenizer.into_text()
        };
        assert_eq!(decode(&[256, 256]), "the the");
        assert_eq!(decode(&[261, 257, 256]), " the");
        assert_eq!(decode(&[260]), " ");
        assert_eq!(decode(&[258, 257]), "é ");
        assert_eq!(decode(&[0x20, 0x20]), " ");
    }

    proptest! {
        #[test]
        fn streaming_equals_lossy_decoding(tokens in prop::collection::vec(0u32..270, 0..60)) {
            let table = table(0);
            let mut detokenizer = Detokenizer::new(table.clone(), false);
            let mut streamed = String::new();
            let mut bytes = Vec::new();
            for &token in &tokens {
                streamed.push_str(detokenizer.push(token));
                bytes.extend_from_slice(table.bytes(token));
                prop_assert!(detokenizer.pending.len() < 4);
            }
            streamed.push_str(detokenizer.finish());
            prop_assert_eq!(&streamed, detokenizer.text());
            prop_assert_eq!(&*streamed, &*String::from_utf8_lossy(&bytes));
        }
    }
}
