//! What each token id contributes to text, in bytes.

use tokenizers::DecoderWrapper;

use super::TextError;

/// How a tokenizer's tokens become text; the `decoder` of `tokenizer.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PieceEncoding {
    /// Byte-level BPE: each character of a token stands for one byte (GPT-2's alphabet).
    ByteLevel,
    /// SentencePiece-like: `▁` stands for a space and, with `byte_fallback`, `<0x0A>` for a byte.
    /// Up to `leading_spaces` spaces are dropped at the start of a text.
    Marked {
        byte_fallback: bool,
        leading_spaces: usize,
    },
}

pub(super) const SUPPORTED_DECODERS: &str =
    "ByteLevel, Metaspace, and sequences of Replace(▁), ByteFallback, Fuse and Strip";

impl PieceEncoding {
    /// Reads a decoder of the tokenizers crate; the error says what is not supported.
    pub(super) fn from_decoder(decoder: Option<&DecoderWrapper>) -> Result<Self, String> {
        let Some(decoder) = decoder else {
            return Err("no decoder".to_string());
        };
        let json = serde_json::to_value(decoder).map_err(|error| error.to_string())?;
        let steps = match json["type"].as_str() {
            Some("ByteLevel") => return Ok(Self::ByteLevel),
            Some("Metaspace") => {
                if json["replacement"] != "▁" {
                    return Err(format!("Metaspace({})", json["replacement"]));
                }
                let prepends = json["prepend_scheme"] != "never";
                return Ok(Self::Marked {
                    byte_fallback: false,
                    leading_spaces: usize::from(prepends),
                });
            }
            Some("Sequence") => json["decoders"].as_array().cloned().unwrap_or_default(),
            _ => vec![json],
        };
        let (mut marked, mut byte_fallback, mut leading_spaces) = (false, false, 0);
        for step in &steps {
            let unsupported = || Err(format!("decoder {step}"));
            match step["type"].as_str() {
                Some("ByteLevel") if steps.len() == 1 => return Ok(Self::ByteLevel),
                Some("Replace") => {
                    if step["pattern"]["String"] != "▁" || step["content"] != " " {
                        return unsupported();
                    }
                    marked = true;
                }
                Some("ByteFallback") => byte_fallback = true,
                Some("Fuse") => {}
                Some("Strip") => {
                    if step["content"] != " " || step["stop"] != 0 {
                        return unsupported();
                    }
                    leading_spaces = step["start"].as_u64().unwrap_or(0) as usize;
                }
                _ => return unsupported(),
            }
        }
        if !marked {
            return Err("a decoder that leaves ▁ in the text".to_string());
        }
        Ok(Self::Marked {
            byte_fallback,
            leading_spaces,
        })
    }

    /// The bytes that the token `text` stands for.
    fn bytes(self, text: &str, into: &mut Vec<u8>) {
        match self {
            Self::ByteLevel => {
                let start = into.len();
                for c in text.chars() {
                    match byte_of(c) {
                        Some(byte) => into.push(byte),
                        None => {
                            // Not of the alphabet: a token that was added as plain text.
                            into.truncate(start);
                            into.extend_from_slice(text.as_bytes());
                            return;
                        }
                    }
                }
            }
            Self::Marked { byte_fallback, .. } => match fallback_byte(text) {
                Some(byte) if byte_fallback => into.push(byte),
                _ => into.extend_from_slice(text.replace('▁', " ").as_bytes()),
            },
        }
    }
}

/// The byte that a character of GPT-2's byte alphabet stands for: printable Latin-1 characters
/// stand for themselves, the other bytes are numbered from U+0100 in ascending order.
fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => Some(code as u8),
        // 0x00-0x20, then 0x7F-0xA0, then 0xAD.
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The byte of a fallback token such as `<0x0A>`.
pub(super) fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(hex, 16).ok()
}

/// One token of a vocabulary.
pub(super) struct Entry {
    pub id: u32,
    pub text: String,
    /// Added beside the trained vocabulary: its text is itself, not a byte alphabet.
    pub added: bool,
    /// Controls the model (end of turn, padding) and is left out of decoded text on request.
    pub special: bool,
}

/// The bytes of every token, in one arena, and which tokens are special.
pub(super) struct TokenTable {
    bytes: Vec<u8>,
    /// End of each token's bytes; its start is the end of the one before.
    ends: Vec<u32>,
    special: Vec<bool>,
    leading_spaces: usize,
}

/// Ids are used as indices of a table, so a huge one in a hostile file must not size it.
const MAX_TOKENS: u32 = 1 << 22;

impl TokenTable {
    /// A table of all ids up to the highest; ids that no entry has stand for nothing.
    pub(super) fn new(
        mut entries: Vec<Entry>,
        encoding: PieceEncoding,
        origin: &str,
    ) -> Result<Self, TextError> {
        let malformed = |reason| TextError::Malformed {
            origin: origin.to_string(),
            reason,
        };
        entries.sort_by_key(|entry| entry.id);
        let Some(last) = entries.last() else {
            return Err(malformed("it has no tokens".to_string()));
        };
        if last.id >= MAX_TOKENS {
            return Err(malformed(format!(
                "token id {} is beyond the limit of {MAX_TOKENS}",
                last.id
            )));
        }
        let size = last.id as usize + 1;
        let mut table = Self {
            bytes: Vec::with_capacity(size * 6),
            ends: Vec::with_capacity(size),
            special: vec![false; size],
            leading_spaces: match encoding {
                PieceEncoding::ByteLevel => 0,
                PieceEncoding::Marked { leading_spaces, .. } => leading_spaces,
            },
        };
        for entry in &entries {
            let id = entry.id as usize;
            if id < table.ends.len() {
                return Err(malformed(format!("token id {id} is given twice")));
            }
            table.ends.resize(id, table.bytes.len() as u32);
            if entry.added && encoding == PieceEncoding::ByteLevel {
                table.bytes.extend_from_slice(entry.text.as_bytes());
            } else {
                encoding.bytes(&entry.text, &mut table.bytes);
            }
            let end = u32::try_from(table.bytes.len())
                .map_err(|_| malformed("its tokens are longer than 4 GiB together".to_string()))?;
            table.ends.push(end);
            table.special[id] = entry.special;
        }
        Ok(table)
    }

    /// One more than the highest id.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of a token; none for an id that the vocabulary does not have.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// How many spaces are dropped at the start of a text.
    pub(super) fn leading_spaces(&self) -> usize {
        self.leading_spaces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_alphabet_is_a_bijection() {
        let mut seen = [false; 256];
        for code in 0..0x1000 {
            if let Some(byte) = char::from_u32(code).and_then(byte_of) {
                assert!(!std::mem::replace(&mut seen[byte as usize], true), "{code}");
            }
        }
        assert!(seen.iter().all(|&seen| seen));
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
    }

    #[test]
    fn fallback_tokens() {
        assert_eq!(fallback_byte("<0x0A>"), Some(10));
        assert_eq!(fallback_byte("<0xfF>"), Some(255));
        for text in [
            "<0x0A", "<0x0>", "<0x+1>", "<0x00A>", "0x0A", "<0xGG>", "<0x€>",
        ] {
            assert_eq!(fallback_byte(text), None, "{text}");
        }
    }

    fn entry(id: u32, text: &str) -> Entry {
        Entry {
            id,
            text: text.to_string(),
            added: false,
            special: false,
        }
    }

    #[test]
    fn holes_and_unknown_ids_are_empty() {
        let entries = vec![entry(5, "Ġb"), entry(1, "a")];
        let table = TokenTable::new(entries, PieceEncoding::ByteLevel, "test").unwrap();
        assert_eq!(table.len(), 6);
        assert_eq!(table.bytes(1), b"a");
        assert_eq!(table.bytes(5), b" b");
        for id in [0, 2, 3, 4, 6, u32::MAX] {
            assert_eq!(table.bytes(id), b"");
            assert!(!table.is_special(id));
        }
    }

    #[test]
    fn hostile_ids_are_refused() {
        let new = |entries| TokenTable::new(entries, PieceEncoding::ByteLevel, "test").err();
        let message = |entries| new(entries).expect("refused").to_string();
        assert!(message(vec![entry(u32::MAX, "a")]).contains("beyond the limit"));
        assert!(message(vec![entry(3, "a"), entry(3, "b")]).contains("twice"));
        assert!(message(vec![]).contains("no tokens"));
    }
}
