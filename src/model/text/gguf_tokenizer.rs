//! Tokenizers out of GGUF metadata.
//!
//! GGUF stores a vocabulary as parallel arrays under `tokenizer.ggml.*`. Two kinds are read:
//! byte-level BPE (`gpt2`: tokens and merges, cut by a named [rule](super::pre_tokenizer)) and
//! SentencePiece BPE (`llama`: tokens with scores and byte fallback, as Llama 2, Mistral and Gemma
//! have it). Both become the tokenizer that the model's own `tokenizer.json` describes.

use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, BpeBuilder, Merges, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper};

use super::panic_guard::contain;
use super::pre_tokenizer::{self, PreTokenizer};
use super::token_table::fallback_byte;
use super::tokenizer::{SpecialTokens, Surround, conventional_ends, one_line};
use super::{TextError, Tokenizer};
use crate::model::error::ModelError;
use crate::model::gguf::metadata::GgufMetadata;

/// The tokenizer metadata of a GGUF file (`tokenizer.ggml.*`), as it stands there.
#[derive(Clone, Debug, Default)]
pub struct GgufVocabulary<'a> {
    /// The file, for error messages.
    pub path: Option<&'a Path>,
    /// `model`: the kind of tokenizer, such as `gpt2` or `llama`.
    pub model: &'a str,
    /// `pre`: the rule by which byte-level BPE cuts a text.
    pub pre: Option<&'a str>,
    /// `tokens`, by id.
    pub tokens: Vec<&'a str>,
    /// `token_type`, by id (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte);
    /// empty where the file has none.
    pub token_types: Vec<i32>,
    /// `scores`, by id; `llama` only.
    pub scores: Vec<f32>,
    /// `merges`, first to last; `gpt2` only.
    pub merges: Vec<&'a str>,
    pub bos_token_id: Option<u32>,
    pub eos_token_id: Option<u32>,
    /// `eot_token_id`: the end of a turn, where it is not the end of the text.
    pub eot_token_id: Option<u32>,
    /// `eom_token_id`: the end of a message that calls a tool.
    pub eom_token_id: Option<u32>,
    pub unknown_token_id: Option<u32>,
    pub padding_token_id: Option<u32>,
    /// `add_bos_token`
    pub add_bos: Option<bool>,
    /// `add_eos_token`
    pub add_eos: Option<bool>,
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`
    pub chat_template: Option<&'a str>,
}

/// `token_type` values.
mod token_type {
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
}

impl Tokenizer {
    /// Builds the tokenizer that a GGUF file describes.
    pub fn from_gguf(vocabulary: &GgufVocabulary) -> Result<Self, TextError> {
        vocabulary.check()?;
        let (mut inner, add_bos) = match vocabulary.model {
            "gpt2" => vocabulary.byte_level()?,
            "llama" => vocabulary.sentencepiece()?,
            other => {
                return Err(TextError::Unsupported {
                    origin: vocabulary.origin(),
                    what: format!("the model {other:?}"),
                    supported: "gpt2 (byte-level BPE), llama (SentencePiece)",
                });
            }
        };
        let added = vocabulary.added_tokens();
        contain(|| inner.add_tokens(added))
            .map_err(|reason| vocabulary.malformed(reason))?
            .map_err(|error| vocabulary.refused(error))?;

        let mut special = SpecialTokens {
            bos: vocabulary.bos_token_id,
            eos: [
                vocabulary.eos_token_id,
                vocabulary.eot_token_id,
                vocabulary.eom_token_id,
            ]
            .into_iter()
            .flatten()
            .collect(),
            texts: vocabulary.special_texts(),
        };
        if vocabulary.eot_token_id.is_none() {
            special.eos.extend(conventional_ends(&inner));
        }
        let adds_bos = vocabulary.add_bos.unwrap_or(add_bos);
        let surround = Surround::Tokens {
            before: vocabulary.bos_token_id.filter(|_| adds_bos),
            after: vocabulary
                .eos_token_id
                .filter(|_| vocabulary.add_eos == Some(true)),
        };
        Self::assemble(inner, special, surround, &vocabulary.origin())
    }
}

impl<'a> GgufVocabulary<'a> {
    /// Reads the tokenizer's part of a GGUF file's metadata.
    ///
    /// # Errors
    ///
    /// [`ModelError::Config`] where a key is missing that every tokenizer needs, or is of another
    /// type. What the values say is checked by [`Tokenizer::from_gguf`].
    pub fn from_metadata(metadata: &GgufMetadata<'a>) -> Result<Self, ModelError> {
        let required = |key: &str| metadata.wrong(key, "is missing");
        let id = |name: &str| metadata.u32(&format!("tokenizer.ggml.{name}_token_id"));
        let (model, tokens) = ("tokenizer.ggml.model", "tokenizer.ggml.tokens");
        Ok(Self {
            path: Some(metadata.path()),
            model: metadata.string(model)?.ok_or_else(|| required(model))?,
            pre: metadata.string("tokenizer.ggml.pre")?,
            tokens: metadata.strings(tokens)?.ok_or_else(|| required(tokens))?,
            token_types: metadata
                .i32s("tokenizer.ggml.token_type")?
                .unwrap_or_default(),
            scores: metadata.f32s("tokenizer.ggml.scores")?.unwrap_or_default(),
            merges: metadata
                .strings("tokenizer.ggml.merges")?
                .unwrap_or_default(),
            bos_token_id: id("bos")?,
            eos_token_id: id("eos")?,
            eot_token_id: id("eot")?,
            eom_token_id: id("eom")?,
            unknown_token_id: id("unknown")?,
            padding_token_id: id("padding")?,
            add_bos: metadata.bool("tokenizer.ggml.add_bos_token")?,
            add_eos: metadata.bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: metadata.bool("tokenizer.ggml.add_space_prefix")?,
            chat_template: metadata.string("tokenizer.chat_template")?,
        })
    }
}

impl GgufVocabulary<'_> {
    /// The file's name in errors.
    fn origin(&self) -> String {
        match self.path {
            Some(path) => path.display().to_string(),
            None => "the GGUF file".to_string(),
        }
    }

    fn malformed(&self, reason: impl Into<String>) -> TextError {
        TextError::Malformed {
            origin: self.origin(),
            reason: reason.into(),
        }
    }

    /// A failure of the tokenizers library.
    fn refused(&self, error: tokenizers::Error) -> TextError {
        self.malformed(one_line(&error.to_string()))
    }

    /// Lengths and ids, so that the rest may index freely.
    fn check(&self) -> Result<(), TextError> {
        let count = self.tokens.len();
        if count == 0 {
            return Err(self.malformed("it has no tokens"));
        }
        for (name, length) in [
            ("token_type", self.token_types.len()),
            ("scores", self.scores.len()),
        ] {
            if length != 0 && length != count {
                return Err(
                    self.malformed(format!("{name} has {length} entries for {count} tokens"))
                );
            }
        }
        if let Some(id) = self.scores.iter().position(|score| score.is_nan()) {
            return Err(self.malformed(format!("the score of token {id} is not a number")));
        }
        for (name, id) in [
            ("bos_token_id", self.bos_token_id),
            ("eos_token_id", self.eos_token_id),
            ("eot_token_id", self.eot_token_id),
            ("eom_token_id", self.eom_token_id),
            ("unknown_token_id", self.unknown_token_id),
            ("padding_token_id", self.padding_token_id),
        ] {
            let Some(id) = id else { continue };
            match self.tokens.get(id as usize) {
                None => {
                    return Err(
                        self.malformed(format!("{name} is {id}, beyond its {count} tokens"))
                    );
                }
                Some(&"") => {
                    return Err(self.malformed(format!("{name} is {id}, an empty token")));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn token_type(&self, id: usize) -> i32 {
        self.token_types
            .get(id)
            .copied()
            .unwrap_or(token_type::NORMAL)
    }

    /// The vocabulary by text. Empty tokens are placeholders and are left out.
    fn vocab(&self, spell: impl Fn(usize) -> String) -> Result<Vocab, TextError> {
        let mut vocab = Vocab::with_capacity(self.tokens.len());
        for id in 0..self.tokens.len() {
            let text = spell(id);
            if text.is_empty() {
                continue;
            }
            let id = u32::try_from(id).map_err(|_| self.malformed("it has too many tokens"))?;
            if let Some(first) = vocab.insert(text, id) {
                return Err(self.malformed(format!(
                    "the tokens {first} and {id} are the same: {:?}",
                    self.tokens[id as usize]
                )));
            }
        }
        Ok(vocab)
    }

    /// Control and user-defined tokens, which are found in a text before anything else is done
    /// to it. Only control tokens (and the unknown token) are special.
    fn added_tokens(&self) -> Vec<AddedToken> {
        (0..self.tokens.len())
            .filter(|&id| !self.tokens[id].is_empty())
            .filter_map(|id| match self.token_type(id) {
                token_type::CONTROL | token_type::UNKNOWN => {
                    Some(AddedToken::from(self.spelling(id), true))
                }
                token_type::USER_DEFINED => {
                    Some(AddedToken::from(self.spelling(id), false).normalized(false))
                }
                _ => None,
            })
            .collect()
    }

    /// A token as it is spelled in the tokenizer. User-defined tokens of a SentencePiece
    /// vocabulary are matched against the text itself, where a space is a space; newer files
    /// spell them so already.
    fn spelling(&self, id: usize) -> String {
        let text = self.tokens[id];
        if self.model == "llama" && self.token_type(id) == token_type::USER_DEFINED {
            text.replace('▁', " ")
        } else {
            text.to_string()
        }
    }

    fn special_texts(&self) -> BTreeMap<String, String> {
        [
            ("bos_token", self.bos_token_id),
            ("eos_token", self.eos_token_id),
            ("unk_token", self.unknown_token_id),
            ("pad_token", self.padding_token_id),
        ]
        .into_iter()
        .filter_map(|(name, id)| {
            let text = self.tokens.get(id? as usize)?;
            Some((name.to_string(), text.to_string()))
        })
        .collect()
    }

    /// Byte-level BPE, and whether it begins texts with a token if the file does not say.
    fn byte_level(&self) -> Result<(tokenizers::Tokenizer, bool), TextError> {
        let rule = PreTokenizer::named(self.pre).ok_or_else(|| TextError::Unsupported {
            origin: self.origin(),
            what: format!("the pre-tokenizer {:?}", self.pre.unwrap_or_default()),
            supported: pre_tokenizer::SUPPORTED,
        })?;
        let vocab = self.vocab(|id| self.tokens[id].to_string())?;
        let mut merges = Merges::with_capacity(self.merges.len());
        for (index, merge) in self.merges.iter().enumerate() {
            // The left part may itself be a space, so the first character never separates.
            let first = merge.chars().next().map_or(0, char::len_utf8);
            let (left, right) = merge[first..]
                .find(' ')
                .map(|at| (&merge[..first + at], &merge[first + at + 1..]))
                .ok_or_else(|| self.malformed(format!("merge {index} is not a pair: {merge:?}")))?;
            for part in [left, right, &format!("{left}{right}")] {
                if !vocab.contains_key(part) {
                    return Err(self.malformed(format!(
                        "merge {index} ({merge:?}) needs {part:?}, which is not a token"
                    )));
                }
            }
            merges.push((left.to_string(), right.to_string()));
        }
        let model = self.build_bpe(|builder| {
            builder
                .vocab_and_merges(vocab, merges)
                .ignore_merges(rule.ignore_merges)
        })?;
        let mut tokenizer = tokenizers::Tokenizer::new(model);
        tokenizer
            .with_normalizer(rule.normalizer())
            .map_err(|error| self.refused(error))?;
        tokenizer.with_pre_tokenizer(Some(
            rule.pre_tokenizer()
                .map_err(|reason| self.malformed(reason))?,
        ));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        Ok((tokenizer, rule.add_bos))
    }

    /// SentencePiece BPE, and whether it begins texts with a token if the file does not say.
    fn sentencepiece(&self) -> Result<(tokenizers::Tokenizer, bool), TextError> {
        if self.scores.is_empty() {
            return Err(self.malformed("a SentencePiece vocabulary needs scores"));
        }
        let vocab = self.vocab(|id| self.spelling(id))?;
        let merges = self.merges_by_score();
        let byte_fallback = (0..=255u8).all(|byte| vocab.contains_key(&format!("<0x{byte:02X}>")));
        let unknown = self
            .unknown_token_id
            .map(|id| self.tokens[id as usize].to_string());
        let model = self.build_bpe(|builder| {
            let builder = builder
                .vocab_and_merges(vocab, merges)
                .byte_fallback(byte_fallback)
                .fuse_unk(true);
            match unknown {
                Some(text) => builder.unk_token(text),
                None => builder,
            }
        })?;
        let space_prefix = self.add_space_prefix.unwrap_or(true);
        let library = |error| self.refused(error);

        let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
        let mut decoders: Vec<DecoderWrapper> = vec![
            Replace::new("▁", " ").map_err(library)?.into(),
            ByteFallback::new().into(),
            Fuse::new().into(),
        ];
        if space_prefix {
            normalizers.push(Prepend::new("▁".to_string()).into());
            decoders.push(Strip::new(' ', 1, 0).into());
        }
        normalizers.push(Replace::new(" ", "▁").map_err(library)?.into());
        let mut tokenizer = tokenizers::Tokenizer::new(model);
        tokenizer
            .with_normalizer(Some(NormalizerSequence::new(normalizers)))
            .map_err(library)?;
        tokenizer.with_decoder(Some(DecoderSequence::new(decoders)));
        Ok((tokenizer, true))
    }

    /// SentencePiece keeps scores where BPE keeps merges: two pieces merge when together they are
    /// a piece, the one with the highest score first. So every way to cut a piece in two pieces is
    /// a merge, in the order of the pieces' scores; ties are ordered as transformers orders them
    /// when it converts such a vocabulary.
    fn merges_by_score(&self) -> Merges {
        let normal: HashMap<&str, u32> = (0u32..)
            .zip(&self.tokens)
            .filter(|&(id, token)| {
                self.token_type(id as usize) == token_type::NORMAL && fallback_byte(token).is_none()
            })
            .map(|(id, &token)| (token, id))
            .collect();
        struct Merge<'a> {
            score: f32,
            /// Lengths in characters.
            lengths: (usize, usize),
            parts: (&'a str, &'a str),
        }
        let mut merges = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if normal.get(token) != Some(&(id as u32)) {
                continue;
            }
            let length = token.chars().count();
            let mut cuts: Vec<_> = token
                .char_indices()
                .enumerate()
                .skip(1)
                .filter_map(|(chars, (at, _))| {
                    let (left, right) = token.split_at(at);
                    let ids = (*normal.get(left)?, *normal.get(right)?);
                    let merge = Merge {
                        score: self.scores[id],
                        lengths: (chars, length - chars),
                        parts: (left, right),
                    };
                    Some((ids, merge))
                })
                .collect();
            cuts.sort_by_key(|(ids, _)| *ids);
            merges.extend(cuts.into_iter().map(|(_, merge)| merge));
        }
        merges.sort_by(|a, b| {
            // NaN scores were refused.
            let by_score = b.score.partial_cmp(&a.score).unwrap_or(Ordering::Equal);
            by_score.then(b.lengths.cmp(&a.lengths))
        });
        merges
            .into_iter()
            .map(|merge| (merge.parts.0.to_string(), merge.parts.1.to_string()))
            .collect()
    }

    fn build_bpe(
        &self,
        configure: impl FnOnce(BpeBuilder) -> BpeBuilder,
    ) -> Result<BPE, TextError> {
        contain(|| configure(BPE::builder()).build())
            .map_err(|reason| self.malformed(reason))?
            .map_err(|error| self.refused(error))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;

    use super::super::tokenizer::tests::{default_model, golden};
    use super::*;

    #[derive(Deserialize)]
    struct SmolLm2 {
        llama_cpp_compared: bool,
        samples: Vec<Sample>,
    }

    #[derive(Deserialize)]
    struct Sample {
        text: String,
        ids: Vec<u32>,
        /// Where llama.cpp differs from the published pipeline.
        llama_cpp: Option<Vec<u32>>,
    }

    #[test]
    fn smollm2_as_published_and_as_llama_cpp() {
        let Some(files) = default_model() else {
            return;
        };
        let tokenizer = Tokenizer::from_source(files.text_source()).unwrap();
        assert_eq!(tokenizer.vocab_size(), 49152);
        assert_eq!(tokenizer.bos_token_id(), Some(1));
        assert_eq!(tokenizer.eos_token_ids(), [2]);
        assert_eq!(tokenizer.token_text(2).unwrap(), "<|im_end|>");
        assert_eq!(tokenizer.special_token_texts()["bos_token"], "<|im_start|>");
        assert!((0..=16).all(|id| tokenizer.is_special(id)));
        assert!((17..49152).all(|id| !tokenizer.is_special(id)));

        let golden: SmolLm2 = golden("smollm2.json");
        assert!(golden.llama_cpp_compared && golden.samples.len() >= 300);
        for sample in &golden.samples {
            let ids = tokenizer.encode(&sample.text, false).unwrap();
            assert_eq!(ids, sample.ids, "{:?}", sample.text);
            assert_eq!(sample.llama_cpp, None, "{:?}", sample.text);
            assert_eq!(tokenizer.decode(&ids, false), sample.text);
            // The file says that no token is added.
            assert_eq!(tokenizer.encode(&sample.text, true).unwrap(), ids);
        }
    }

    /// Random tokens are mostly not text: characters are cut, and bytes are left over.
    #[test]
    fn streaming_equals_the_library_on_random_tokens() {
        let Some(files) = default_model() else {
            return;
        };
        let tokenizer = Tokenizer::from_source(files.text_source()).unwrap();
        // Single bytes and short pieces are what cuts characters.
        let token = prop_oneof![0u32..49152, 17u32..1000, Just(2u32), 49100u32..49400];
        let sequences = (prop::collection::vec(token, 0..80), any::<bool>());
        proptest!(ProptestConfig::with_cases(500), |((ids, skip_special) in sequences)| {
            let expected = tokenizer.inner().decode(&ids, skip_special).unwrap();
            let mut detokenizer = tokenizer.detokenizer(skip_special);
            let mut streamed = String::new();
            for &id in &ids {
                streamed.push_str(detokenizer.push(id));
            }
            streamed.push_str(detokenizer.finish());
            prop_assert_eq!(&streamed, &expected);
            prop_assert_eq!(tokenizer.decode(&ids, skip_special), expected);
        });
    }

    #[derive(Deserialize)]
    struct SentencePiece {
        tokens: Vec<String>,
        scores: Vec<f32>,
        token_types: Vec<i32>,
        samples: Vec<SentencePieceSample>,
    }

    #[derive(Deserialize)]
    struct SentencePieceSample {
        text: String,
        ids: Vec<u32>,
        decoded: String,
    }

    impl SentencePiece {
        fn vocabulary(&self) -> GgufVocabulary<'_> {
            GgufVocabulary {
                model: "llama",
                tokens: self.tokens.iter().map(String::as_str).collect(),
                scores: self.scores.clone(),
                token_types: self.token_types.clone(),
                unknown_token_id: Some(0),
                bos_token_id: Some(1),
                eos_token_id: Some(2),
                ..GgufVocabulary::default()
            }
        }

        fn check(&self, tokenizer: &Tokenizer) {
            assert!(self.samples.len() > 300);
            for sample in &self.samples {
                let ids = tokenizer.encode(&sample.text, false).unwrap();
                assert_eq!(ids, sample.ids, "{:?}", sample.text);
                assert_eq!(tokenizer.decode(&ids, false), sample.decoded);
            }
        }
    }

    #[test]
    fn scores_merge_as_sentencepiece_does() {
        let golden: SentencePiece = golden("sentencepiece.json");
        let tokenizer = Tokenizer::from_gguf(&golden.vocabulary()).unwrap();
        golden.check(&tokenizer);
        assert_eq!(tokenizer.encode("", true).unwrap(), [1]);
        let no_bos = GgufVocabulary {
            add_bos: Some(false),
            add_eos: Some(true),
            ..golden.vocabulary()
        };
        let tokenizer = Tokenizer::from_gguf(&no_bos).unwrap();
        assert_eq!(tokenizer.encode("", true).unwrap(), [2]);
        // Special tokens that a text spells are parsed.
        let ids = tokenizer.encode("a</s>", false).unwrap();
        assert_eq!(ids.last(), Some(&2));
    }

    #[test]
    fn gemma_kind_with_user_defined_pieces() {
        let golden: SentencePiece = golden("sentencepiece_gemma.json");
        let vocabulary = GgufVocabulary {
            add_space_prefix: Some(false),
            ..golden.vocabulary()
        };
        let tokenizer = Tokenizer::from_gguf(&vocabulary).unwrap();
        golden.check(&tokenizer);
        // Named by no key, but a control token with a name that ends a turn.
        let end_of_turn = tokenizer.token_id("<end_of_turn>").unwrap();
        assert_eq!(tokenizer.eos_token_ids(), [2, end_of_turn]);
        let tool = tokenizer.token_id("<tool>").unwrap();
        assert!(!tokenizer.is_special(tool));
        assert_eq!(tokenizer.decode(&[tool, end_of_turn], true), "<tool>");
        // Older files spell the spaces of user-defined pieces as ▁.
        let marked: Vec<String> = golden
            .tokens
            .iter()
            .map(|token| token.replace(' ', "▁"))
            .collect();
        let vocabulary = GgufVocabulary {
            tokens: marked.iter().map(String::as_str).collect(),
            ..vocabulary
        };
        golden.check(&Tokenizer::from_gguf(&vocabulary).unwrap());
    }

    fn refusal(vocabulary: &GgufVocabulary) -> String {
        let message = Tokenizer::from_gguf(vocabulary).unwrap_err().to_string();
        assert!(!message.contains('\n'), "{message}");
        message
    }

    #[test]
    fn malformed_vocabularies_are_refused() {
        let base = GgufVocabulary {
            model: "gpt2",
            pre: Some("smollm"),
            tokens: vec!["a", "b", "ab", "Ġ"],
            merges: vec!["a b"],
            ..GgufVocabulary::default()
        };
        let tokenizer = Tokenizer::from_gguf(&base).unwrap();
        assert_eq!(tokenizer.encode("ab a", false).unwrap(), [2, 3, 0]);

        let change = |change: &dyn Fn(&mut GgufVocabulary)| {
            let mut changed = base.clone();
            change(&mut changed);
            refusal(&changed)
        };
        assert!(change(&|v| v.tokens.clear()).contains("no tokens"));
        assert!(change(&|v| v.tokens[1] = "a").contains("the same"));
        assert!(change(&|v| v.token_types = vec![1]).contains("token_type has 1"));
        assert!(change(&|v| v.eos_token_id = Some(4)).contains("beyond its 4"));
        assert!(change(&|v| v.merges = vec!["ab"]).contains("not a pair"));
        assert!(change(&|v| v.merges = vec![""]).contains("not a pair"));
        assert!(change(&|v| v.merges = vec!["b a"]).contains("\"ba\""));
        assert!(change(&|v| v.pre = Some("kimi-k2")).contains("kimi-k2"));
        assert!(change(&|v| v.model = "bert").contains("bert"));
        assert!(change(&|v| v.model = "llama").contains("scores"));
        assert!(
            change(&|v| {
                v.model = "llama";
                v.scores = vec![0.0, f32::NAN, 0.0, 0.0];
            })
            .contains("token 1")
        );
    }

    proptest! {
        #[test]
        fn any_vocabulary_is_read_or_refused(
            model in prop::sample::select(vec!["gpt2", "llama"]),
            tokens in prop::collection::vec("[ab▁Ġ é]{0,3}|<0x[0-9A-F]{2}>|<s>", 0..20),
            token_types in prop::collection::vec(-1i32..8, 0..20),
            scores in prop::collection::vec(prop::num::f32::ANY, 0..20),
            merges in prop::collection::vec("[ab▁Ġ é]{0,5}", 0..6),
            ids in prop::array::uniform4(prop::option::of(0u32..25)),
            space in prop::option::of(any::<bool>()),
            text in "[ab▁ é\n]{0,12}",
        ) {
            let count = tokens.len();
            let vocabulary = GgufVocabulary {
                model,
                pre: Some("smollm"),
                tokens: tokens.iter().map(String::as_str).collect(),
                // Mostly of the right length, so that the rest is reached.
                token_types: token_types.into_iter().cycle().take(count).collect(),
                scores: scores.into_iter().cycle().take(count).collect(),
                merges: merges.iter().map(String::as_str).collect(),
                bos_token_id: ids[0],
                eos_token_id: ids[1],
                unknown_token_id: ids[2],
                padding_token_id: ids[3],
                add_bos: space,
                add_space_prefix: space,
                ..GgufVocabulary::default()
            };
            if let Ok(tokenizer) = Tokenizer::from_gguf(&vocabulary)
                && let Ok(ids) = tokenizer.encode(&text, true)
            {
                tokenizer.decode(&ids, false);
                prop_assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
            }
        }
    }
}
