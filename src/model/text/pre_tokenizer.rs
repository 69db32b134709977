//! How byte-level BPE vocabularies of GGUF files cut a text before merging.
//!
//! GGUF names the rule (`tokenizer.ggml.pre`) and leaves its meaning to the reader. The rules here
//! are those of the `tokenizer.json` files that the named models came from; llama.cpp writes the
//! same rules in the dialect of its own regular expressions.

use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::punctuation::Punctuation;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior::{Contiguous, Isolated};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper};

/// One cut of a text; each applies to the pieces that the one before left.
#[derive(Clone, Copy, Debug)]
enum Cut {
    /// Around every match of a regular expression.
    Regex(&'static str),
    /// Around every digit, or every run of digits.
    Digits { each: bool },
    /// Around every run of punctuation.
    Punctuation,
    /// GPT-2's words; only as the last cut.
    Gpt2Words,
}

/// What a `tokenizer.ggml.pre` name stands for.
pub(super) struct PreTokenizer {
    cuts: &'static [Cut],
    /// Texts are composed (NFC) first.
    nfc: bool,
    /// A word that is a token is that token, whatever the merges would make of it.
    pub ignore_merges: bool,
    /// Whether a beginning-of-text token is added where the file does not say.
    pub add_bos: bool,
}

pub(super) const SUPPORTED: &str = "command-r, dbrx, deepseek-coder, deepseek-r1-qwen, default, \
     falcon, falcon3, gpt-2, gpt-4o, llama-bpe, llama3, llama4, megrez, phi-2, qwen2, refact, \
     smaug-bpe, smollm, starcoder, tekken";

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

impl PreTokenizer {
    /// The rule of a name; `None` for one that is not known, since a wrong rule would yield wrong
    /// tokens that nothing reports. A file without a name gets llama.cpp's default.
    pub(super) fn named(name: Option<&str>) -> Option<Self> {
        use Cut::*;
        let plain = |cuts| Self {
            cuts,
            nfc: false,
            ignore_merges: false,
            add_bos: false,
        };
        Some(match name.unwrap_or("default") {
            "default" => plain(&[
                Regex(r"[\p{P}\$\+<=>\^~\|]+"),
                Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
                Regex(r"\p{N}+"),
                Regex("[0-9][0-9][0-9]"),
            ]),
            "gpt-2" | "phi-2" => plain(&[Gpt2Words]),
            "smollm" | "starcoder" | "refact" => plain(&[Digits { each: true }, Gpt2Words]),
            "command-r" => Self {
                nfc: true,
                ..plain(&[Digits { each: true }, Gpt2Words])
            },
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" => Self {
                ignore_merges: true,
                add_bos: true,
                ..plain(&[Regex(LLAMA3)])
            },
            "dbrx" | "smaug-bpe" => plain(&[Regex(LLAMA3)]),
            "qwen2" | "deepseek-r1-qwen" | "megrez" => Self {
                nfc: true,
                ..plain(&[Regex(QWEN2)])
            },
            "gpt-4o" | "llama4" => plain(&[Regex(GPT_4O)]),
            "tekken" => Self {
                ignore_merges: true,
                add_bos: true,
                ..plain(&[Regex(TEKKEN)])
            },
            "falcon" => plain(&[
                Punctuation,
                Regex(
                    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
                ),
                Digits { each: false },
                Regex("[0-9][0-9][0-9]"),
            ]),
            "deepseek-coder" => plain(&[
                Regex("[\r\n]"),
                Regex(r"\s?\p{L}+"),
                Regex(r"\s?\p{P}+"),
                Regex("[一-龥ࠀ-一가-퟿]+"),
                Digits { each: true },
            ]),
            _ => return None,
        })
    }

    /// What texts are brought into before they are cut.
    pub(super) fn normalizer(&self) -> Option<NormalizerWrapper> {
        self.nfc.then(|| NormalizerWrapper::NFC(NFC))
    }

    /// The cuts, and the byte alphabet last. Fails only if a regular expression above is wrong.
    pub(super) fn pre_tokenizer(&self) -> Result<PreTokenizerWrapper, String> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        let mut use_regex = false;
        for cut in self.cuts {
            match *cut {
                Cut::Regex(regex) => {
                    let pattern = SplitPattern::Regex(regex.to_string());
                    let split =
                        Split::new(pattern, Isolated, false).map_err(|error| error.to_string())?;
                    steps.push(split.into());
                }
                Cut::Digits { each } => steps.push(self::Digits::new(each).into()),
                Cut::Punctuation => steps.push(self::Punctuation::new(Contiguous).into()),
                Cut::Gpt2Words => use_regex = true,
            }
        }
        steps.push(ByteLevel::new(false, true, use_regex).into());
        Ok(Sequence::new(steps).into())
    }
}

#[cfg(test)]
mod tests {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    use super::*;

    fn pieces(name: &str, text: &str) -> Vec<String> {
        let pre_tokenizer = PreTokenizer::named(Some(name)).unwrap().pre_tokenizer();
        let mut text = PreTokenizedString::from(text);
        pre_tokenizer.unwrap().pre_tokenize(&mut text).unwrap();
        text.get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(piece, _, _)| piece.replace('Ġ', " ").replace('Ċ', "\n"))
            .collect()
    }

    #[test]
    fn every_supported_name_is_known_and_compiles() {
        for name in SUPPORTED.split(", ") {
            assert!(
                !pieces(name, "I'LL take 12345 of  them.\n").is_empty(),
                "{name}"
            );
        }
        assert!(PreTokenizer::named(Some("kimi-k2")).is_none());
        assert!(PreTokenizer::named(None).is_some());
    }

    #[test]
    fn digits_are_cut_as_each_family_does() {
        let text = "a 12345";
        assert_eq!(pieces("smollm", text), ["a", " ", "1", "2", "3", "4", "5"]);
        assert_eq!(pieces("gpt-2", text), ["a", " 12345"]);
        assert_eq!(pieces("llama-bpe", text), ["a", " ", "123", "45"]);
        assert_eq!(pieces("qwen2", text), ["a", " ", "1", "2", "3", "4", "5"]);
        assert_eq!(pieces("falcon", text), ["a", " ", "123", "45"]);
    }

    #[test]
    fn contractions_and_whitespace() {
        assert_eq!(pieces("gpt-2", "I'LL I'll"), ["I", "'", "LL", " I", "'ll"]);
        assert_eq!(pieces("llama-bpe", "I'LL I'll"), ["I", "'LL", " I", "'ll"]);
        assert_eq!(
            pieces("smollm", "a   b\n\nc"),
            ["a", "  ", " b", "\n", "\n", "c"]
        );
        assert_eq!(
            pieces("qwen2", "a   b\n\nc"),
            ["a", "  ", " b", "\n\n", "c"]
        );
        assert_eq!(pieces("tekken", "HelloWorld"), ["Hello", "World"]);
    }
}
