//! Text to token ids, for one model's vocabulary.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use tokenizers::AddedToken;

use super::panic_guard::contain;
use super::token_table::{Entry, PieceEncoding, SUPPORTED_DECODERS, TokenTable};
use super::{Detokenizer, GgufVocabulary, TextError};
use crate::model::files::TextSource;

/// The largest vocabularies in use (262k tokens) make files of some 35 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// Tokens that end a turn by convention, for files that name only the end of the text.
const END_OF_TURN_TOKENS: [&str; 6] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|end_of_turn|>",
];

/// Which tokens are put around a text that is encoded with special tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Surround {
    /// What the `post_processor` of `tokenizer.json` says.
    PostProcessor,
    /// These, whatever the post-processor says.
    Tokens {
        before: Option<u32>,
        after: Option<u32>,
    },
}

/// What the files say about a model's special tokens.
#[derive(Clone, Debug, Default)]
pub(super) struct SpecialTokens {
    pub bos: Option<u32>,
    /// Ends of text and of turn, ascending.
    pub eos: Vec<u32>,
    /// By their names in chat templates, such as `bos_token`.
    pub texts: BTreeMap<String, String>,
}

/// A model's tokenizer: text to token ids and back.
///
/// Cheap to clone; clones share one vocabulary.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    table: Arc<TokenTable>,
    special: Arc<SpecialTokens>,
    surround: Surround,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("special", &self.special)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// The tokenizer of a model, wherever it lies.
    pub fn from_source(source: TextSource) -> Result<Self, TextError> {
        match source {
            TextSource::Folder(folder) => Self::from_folder(folder),
            TextSource::Gguf(metadata) => {
                Self::from_gguf(&GgufVocabulary::from_metadata(&metadata)?)
            }
        }
    }

    /// Reads the tokenizer of a folder in Hugging Face layout.
    ///
    /// `tokenizer.json` is required. `tokenizer_config.json`, `special_tokens_map.json` and
    /// `generation_config.json` name the special tokens, and are read where they are there.
    pub fn from_folder(folder: &Path) -> Result<Self, TextError> {
        let path = folder.join("tokenizer.json");
        let origin = path.display().to_string();
        let Some(bytes) = read_optional(&path, MAX_TOKENIZER_BYTES)? else {
            return Err(TextError::NoTokenizer {
                folder: folder.to_path_buf(),
                has_sentencepiece: folder.join("tokenizer.model").exists(),
            });
        };
        let malformed = |reason: String| TextError::Malformed {
            origin: origin.clone(),
            reason,
        };
        refuse_unsupported_model(&bytes, &path)?;
        let mut inner = contain(|| tokenizers::Tokenizer::from_bytes(&bytes))
            .map_err(malformed)?
            .map_err(|error| malformed(one_line(&error.to_string())))?;
        drop(bytes);

        let mut config = read_json(&folder.join("tokenizer_config.json"))?;
        let map = read_json(&folder.join("special_tokens_map.json"))?;
        if let (Value::Object(config), Value::Object(map)) = (&mut config, map) {
            for (name, token) in map {
                config.entry(name).or_insert(token);
            }
        }
        add_configured_tokens(&mut inner, &config).map_err(malformed)?;

        let mut special = SpecialTokens::default();
        for name in ["bos_token", "eos_token", "unk_token", "pad_token"] {
            if let Some(text) = token_content(&config[name]) {
                special.texts.insert(name.to_string(), text.to_string());
            }
        }
        let id_of = |name: &str| special.texts.get(name).and_then(|t| inner.token_to_id(t));
        special.bos = id_of("bos_token");
        special.eos.extend(id_of("eos_token"));
        let ends_before = special.eos.len();
        let generation = read_json(&folder.join("generation_config.json"))?;
        match &generation["eos_token_id"] {
            Value::Array(ids) => special.eos.extend(ids.iter().filter_map(json_token_id)),
            id => special.eos.extend(json_token_id(id)),
        }
        // An explicit list is the whole truth; a lone end of text may have forgotten the turns.
        if special.eos.len() == ends_before {
            special.eos.extend(conventional_ends(&inner));
        }

        let adds = |name: &str| config.get(name).and_then(Value::as_bool);
        let surround = match (adds("add_bos_token"), adds("add_eos_token")) {
            (None, None) => Surround::PostProcessor,
            (bos, eos) => Surround::Tokens {
                before: special.bos.filter(|_| bos == Some(true)),
                after: id_of("eos_token").filter(|_| eos == Some(true)),
            },
        };
        Self::assemble(inner, special, surround, &origin)
    }

    /// Puts a tokenizer together; `origin` names the file in errors.
    pub(super) fn assemble(
        mut inner: tokenizers::Tokenizer,
        mut special: SpecialTokens,
        surround: Surround,
        origin: &str,
    ) -> Result<Self, TextError> {
        // Files may ask to cut or pad texts, which was meant for training.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| TextError::Malformed {
                origin: origin.to_string(),
                reason: one_line(&error.to_string()),
            })?;
        let encoding = PieceEncoding::from_decoder(inner.get_decoder()).map_err(|what| {
            TextError::Unsupported {
                origin: origin.to_string(),
                what,
                supported: SUPPORTED_DECODERS,
            }
        })?;
        let added = inner.get_added_tokens_decoder();
        let entries = inner
            .get_vocab(false)
            .into_iter()
            .filter(|(_, id)| !added.contains_key(id))
            .map(|(text, id)| Entry {
                id,
                text,
                added: false,
                special: false,
            })
            .chain(added.iter().map(|(&id, token)| Entry {
                id,
                text: token.content.clone(),
                added: true,
                special: token.special,
            }))
            .collect();
        let table = TokenTable::new(entries, encoding, origin)?;
        special.eos.retain(|&id| (id as usize) < table.len());
        special.eos.sort_unstable();
        special.eos.dedup();
        Ok(Self {
            inner: Arc::new(inner),
            table: Arc::new(table),
            special: Arc::new(special),
            surround,
        })
    }

    /// The token ids of `text`.
    ///
    /// With `add_special`, the tokens that the model expects around a plain text (often a
    /// beginning-of-text token) are added; a rendered chat has them already. Either way, text
    /// that spells a special token becomes that token, as in transformers.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let by_post_processor = add_special && self.surround == Surround::PostProcessor;
        let failed = |reason: String| TextError::Encode {
            bytes: text.len(),
            reason: one_line(&reason),
        };
        let encoding = contain(|| self.inner.encode_fast(text, by_post_processor))
            .map_err(failed)?
            .map_err(|error| failed(error.to_string()))?;
        let ids = encoding.get_ids();
        match self.surround {
            Surround::Tokens { before, after } if add_special => {
                let mut all = Vec::with_capacity(ids.len() + 2);
                all.extend(before);
                all.extend_from_slice(ids);
                all.extend(after);
                Ok(all)
            }
            _ => Ok(ids.to_vec()),
        }
    }

    /// The text of `ids`; with `skip_special`, without that of special tokens.
    ///
    /// Bytes that are not UTF-8 become U+FFFD by the rule of [`String::from_utf8_lossy`], and ids
    /// outside the vocabulary stand for nothing. Where tokens stand for single bytes (`<0x0A>`),
    /// transformers differs on invalid text: it replaces every byte of such a run of tokens, even
    /// the valid characters.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut detokenizer = self.detokenizer(skip_special);
        for &id in ids {
            detokenizer.push(id);
        }
        detokenizer.into_text()
    }

    /// Decodes a stream of tokens.
    pub fn detokenizer(&self, skip_special: bool) -> Detokenizer {
        Detokenizer::new(self.table.clone(), skip_special)
    }

    /// One more than the highest token id. The model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.table.len()
    }

    /// The token as the vocabulary spells it, such as `Ġhello`.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The bytes that a token adds to a text; not always valid UTF-8 by themselves.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.table.bytes(id)
    }

    /// The id of a token by its text, special tokens included.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text)
    }

    /// Whether a token controls the model rather than being text.
    pub fn is_special(&self, id: u32) -> bool {
        self.table.is_special(id)
    }

    /// The beginning-of-text token, where the files name one.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.special.bos
    }

    /// The tokens that end an answer (end of text, end of turn), ascending; may be empty.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.special.eos
    }

    /// The special tokens by the names that chat templates use, such as `bos_token`.
    pub fn special_token_texts(&self) -> &BTreeMap<String, String> {
        &self.special.texts
    }

    /// The tokenizers crate's tokenizer, to hold this one's decoding against.
    #[cfg(test)]
    pub(super) fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }
}

/// The special tokens of a vocabulary that end a turn by convention.
pub(super) fn conventional_ends(inner: &tokenizers::Tokenizer) -> Vec<u32> {
    let added = inner.get_added_vocabulary();
    END_OF_TURN_TOKENS
        .iter()
        .filter(|text| added.is_special_token(text))
        .filter_map(|text| inner.token_to_id(text))
        .collect()
}

/// Reads a file, or `None` where there is none.
pub(super) fn read_optional(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, TextError> {
    let failed = |source| TextError::Read {
        path: path.to_path_buf(),
        source,
    };
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > limit => Err(TextError::FileTooLarge {
            path: path.to_path_buf(),
            size: metadata.len(),
            limit,
        }),
        Ok(_) => fs::read(path).map(Some).map_err(failed),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

/// Reads an optional JSON file; `{}` where there is none.
pub(super) fn read_json(path: &Path) -> Result<Value, TextError> {
    match read_optional(path, MAX_TOKENIZER_BYTES)? {
        None => Ok(Value::Object(serde_json::Map::new())),
        Some(bytes) => serde_json::from_slice(&bytes).map_err(|source| TextError::Json {
            path: path.to_path_buf(),
            source,
        }),
    }
}

/// Refuses models that the tokenizers crate reads but would not treat as a language model needs.
fn refuse_unsupported_model(bytes: &[u8], path: &Path) -> Result<(), TextError> {
    #[derive(serde::Deserialize)]
    struct File {
        model: Model,
    }
    #[derive(serde::Deserialize)]
    struct Model {
        dropout: Option<f32>,
        continuing_subword_prefix: Option<String>,
        end_of_word_suffix: Option<String>,
    }
    let file: File = serde_json::from_slice(bytes).map_err(|source| TextError::Json {
        path: path.to_path_buf(),
        source,
    })?;
    let what = if file.model.dropout.is_some_and(|p| p != 0.0) {
        "BPE dropout"
    } else if file
        .model
        .continuing_subword_prefix
        .is_some_and(|p| !p.is_empty())
    {
        "a continuing_subword_prefix"
    } else if file.model.end_of_word_suffix.is_some_and(|s| !s.is_empty()) {
        "an end_of_word_suffix"
    } else {
        return Ok(());
    };
    Err(TextError::Unsupported {
        origin: path.display().to_string(),
        what: what.to_string(),
        supported: "BPE and Unigram vocabularies without these",
    })
}

/// Adds the tokens that only `tokenizer_config.json` has, at the ids that it gives them.
fn add_configured_tokens(inner: &mut tokenizers::Tokenizer, config: &Value) -> Result<(), String> {
    let Some(listed) = config["added_tokens_decoder"].as_object() else {
        return Ok(());
    };
    let mut missing = Vec::new();
    for (id, token) in listed {
        let id: u32 = id
            .parse()
            .map_err(|_| format!("added_tokens_decoder has the id {id:?}"))?;
        let content = token_content(token)
            .ok_or_else(|| format!("added_tokens_decoder has no content for id {id}"))?;
        if inner.token_to_id(content).is_none() {
            let flag = |name: &str| token[name].as_bool().unwrap_or(false);
            let added = AddedToken::from(content, flag("special"))
                .single_word(flag("single_word"))
                .lstrip(flag("lstrip"))
                .rstrip(flag("rstrip"))
                .normalized(flag("normalized"));
            missing.push((id, added));
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    // New tokens get the next free ids in the order in which they are added.
    missing.sort_by_key(|(id, _)| *id);
    let tokens: Vec<AddedToken> = missing.iter().map(|(_, token)| token.clone()).collect();
    contain(|| inner.add_tokens(tokens))?.map_err(|error| error.to_string())?;
    for (id, token) in missing {
        if inner.token_to_id(&token.content) != Some(id) {
            return Err(format!(
                "tokenizer_config.json gives {:?} the id {id}, which does not follow the ids of \
                 tokenizer.json",
                token.content
            ));
        }
    }
    Ok(())
}

/// The text of a token that is written as a string or as an object with `content`.
fn token_content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

fn json_token_id(id: &Value) -> Option<u32> {
    id.as_u64().and_then(|id| u32::try_from(id).ok())
}

pub(super) fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;
    use serde::Deserialize;
    use serde::de::DeserializeOwned;
    use serde_json::json;

    use super::*;
    use crate::model::default_model;
    use crate::model::files::ModelFiles;

    pub(in crate::model::text) fn golden_folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/text")
    }

    /// A file that tests/reference/tokenizer_goldens.py or chat_template_goldens.py wrote.
    pub(in crate::model::text) fn golden<T: DeserializeOwned>(name: &str) -> T {
        let file = fs::File::open(golden_folder().join(name)).unwrap();
        serde_json::from_reader(std::io::BufReader::new(file)).unwrap()
    }

    /// The default model; `None`, said aloud, where it has not been fetched.
    pub(in crate::model::text) fn default_model() -> Option<ModelFiles> {
        let path = match std::env::var_os("PODIUM_TEST_MODEL") {
            Some(path) => PathBuf::from(path),
            None => default_model::expected_path().ok()?,
        };
        if !path.exists() {
            println!("skipped: {} is not there", path.display());
            return None;
        }
        Some(ModelFiles::open(&path).unwrap())
    }

    #[derive(Deserialize)]
    struct Samples {
        samples: Vec<Sample>,
    }

    #[derive(Deserialize)]
    struct Sample {
        text: String,
        ids: Vec<u32>,
        decoded: String,
    }

    fn check_folder(name: &str) -> Tokenizer {
        let tokenizer = Tokenizer::from_folder(&golden_folder().join(name)).unwrap();
        let golden: Samples = golden(&format!("{name}/samples.json"));
        assert!(golden.samples.len() > 150);
        for sample in &golden.samples {
            let ids = tokenizer.encode(&sample.text, true).unwrap();
            assert_eq!(ids, sample.ids, "{:?}", sample.text);
            assert_eq!(tokenizer.decode(&ids, true), sample.decoded);
        }
        tokenizer
    }

    #[test]
    fn byte_level_folder() {
        let tokenizer = check_folder("byte_level");
        assert_eq!(tokenizer.bos_token_id(), Some(0));
        assert_eq!(tokenizer.eos_token_ids(), [1, 2]);
        let tool = tokenizer.token_id("<tool>").unwrap();
        assert_eq!(tokenizer.vocab_size(), tool as usize + 1);
        assert!(tokenizer.is_special(2) && !tokenizer.is_special(tool));
        assert_eq!(tokenizer.encode("", true).unwrap(), [0]);
        assert!(tokenizer.encode("", false).unwrap().is_empty());
        assert_eq!(tokenizer.token_text(tool + 1), None);
        assert_eq!(tokenizer.token_bytes(tool), b"<tool>");
        assert_eq!(
            tokenizer.decode(&[0, tool, u32::MAX], false),
            "<|begin_of_text|><tool>"
        );
    }

    #[test]
    fn sentencepiece_folder() {
        let tokenizer = check_folder("sentencepiece");
        assert_eq!(tokenizer.bos_token_id(), Some(1));
        assert_eq!(tokenizer.eos_token_ids(), [2]);
        assert_eq!(tokenizer.special_token_texts().len(), 3);

        // Where the library finds the bytes of a run of tokens valid, so do we.
        let tokens = prop::collection::vec(3u32..900, 0..40);
        proptest!(|(ids in tokens)| {
            let theirs = tokenizer.inner().decode(&ids, true).unwrap();
            let ours = tokenizer.decode(&ids, true);
            prop_assert!(ours == theirs || theirs.contains(char::REPLACEMENT_CHARACTER));
            prop_assert_eq!(ours.contains(char::REPLACEMENT_CHARACTER),
                theirs.contains(char::REPLACEMENT_CHARACTER));
        });
    }

    /// A folder with these files, as JSON.
    fn folder(files: &[(&str, Value)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, json) in files {
            fs::write(folder.path().join(name), json.to_string()).unwrap();
        }
        folder
    }

    fn minimal() -> Value {
        json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "added_tokens": [], "post_processor": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false,
                "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
                "use_regex": true},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
        })
    }

    #[test]
    fn configured_tokens_and_settings() {
        let mut tokenizer = minimal();
        tokenizer["truncation"] = json!({"direction": "Right", "max_length": 2,
            "strategy": "LongestFirst", "stride": 0});
        tokenizer["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right",
            "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "a"});
        let config = json!({
            "added_tokens_decoder": {
                "3": {"content": "<|im_end|>", "special": true},
                "4": {"content": "<x>", "special": false},
                "0": {"content": "a", "special": false},
            },
            "bos_token": {"content": "b"},
            "add_bos_token": true,
        });
        let map = json!({"eos_token": "ab", "bos_token": "ignored"});
        let folder = folder(&[
            ("tokenizer.json", tokenizer),
            ("tokenizer_config.json", config),
            ("special_tokens_map.json", map),
        ]);
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        let ids = tokenizer.encode("ababa<x><|im_end|>", true).unwrap();
        assert_eq!(ids, [1, 2, 2, 0, 4, 3], "neither cut nor padded");
        // The end of a turn goes by its name where no list is given.
        assert_eq!(tokenizer.eos_token_ids(), [2, 3]);
        assert_eq!(tokenizer.decode(&ids, true), "bababa<x>");
    }

    fn refusal(files: &[(&str, Value)]) -> String {
        let folder = folder(files);
        let message = Tokenizer::from_folder(folder.path())
            .unwrap_err()
            .to_string();
        assert!(!message.contains('\n'), "{message}");
        message
    }

    #[test]
    fn malformed_folders_are_refused() {
        assert!(refusal(&[]).contains("has no tokenizer.json"));
        assert!(refusal(&[("tokenizer.model", json!(1))]).contains("not enough"));
        let change = |change: &dyn Fn(&mut Value)| {
            let mut changed = minimal();
            change(&mut changed);
            refusal(&[("tokenizer.json", changed)])
        };
        // The library panics on a merge that is longer than every token.
        let panics = change(&|t| t["model"]["vocab"] = json!({"a": 0, "b": 1}));
        assert!(panics.contains("internal error"), "{panics}");
        assert!(change(&|t| t["model"]["merges"] = json!([["a", "c"]])).contains("malformed"));
        assert!(change(&|t| t["model"]["type"] = json!("Nonsense")).contains("malformed"));
        assert!(change(&|t| t["model"]["dropout"] = json!(0.5)).contains("dropout"));
        assert!(
            change(&|t| t["model"]["continuing_subword_prefix"] = json!("##"))
                .contains("continuing_subword_prefix")
        );
        assert!(
            change(&|t| {
                t["model"]["vocab"] = json!({"a": 0, "b": 1, "ab": 4_000_000_000_u32});
            })
            .contains("beyond the limit")
        );
        assert!(
            change(&|t| t["model"]["vocab"] = json!({"a": 0, "b": 0, "ab": 1})).contains("twice")
        );
        assert!(change(&|t| t["decoder"] = json!(null)).contains("no decoder"));
        assert!(
            change(
                &|t| t["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true})
            )
            .contains("WordPiece")
        );
        let truncated = folder(&[]);
        let text = minimal().to_string();
        for length in (0..text.len()).step_by(7) {
            fs::write(truncated.path().join("tokenizer.json"), &text[..length]).unwrap();
            assert!(Tokenizer::from_folder(truncated.path()).is_err());
        }
        let gap = json!({"added_tokens_decoder": {"9": {"content": "<x>", "special": true}}});
        let gap = refusal(&[
            ("tokenizer.json", minimal()),
            ("tokenizer_config.json", gap),
        ]);
        assert!(gap.contains("\"<x>\" the id 9"), "{gap}");
        let config = json!({"added_tokens_decoder": {"x": {}}});
        refusal(&[
            ("tokenizer.json", minimal()),
            ("tokenizer_config.json", config),
        ]);
    }

    #[test]
    fn odd_configurations_are_harmless() {
        for config in [
            json!(null),
            json!([]),
            json!({"bos_token": 3, "eos_token": null, "added_tokens_decoder": []}),
            json!({"eos_token": "not a token"}),
        ] {
            let generation = json!({"eos_token_id": [-1, 1e30, "x", 7, 1]});
            let folder = folder(&[
                ("tokenizer.json", minimal()),
                ("tokenizer_config.json", config),
                ("generation_config.json", generation),
            ]);
            let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
            assert_eq!(tokenizer.eos_token_ids(), [1]);
            assert_eq!(tokenizer.bos_token_id(), None);
        }
    }

    /// Files of others may say anything: whatever is done to one, it is read or refused.
    #[test]
    fn damaged_files_never_panic() {
        let text = fs::read(golden_folder().join("byte_level/tokenizer.json")).unwrap();
        let tail = text.len() - 200;
        // Half of the damage goes to the settings at both ends, not to the vocabulary.
        let place = prop_oneof![0..text.len(), 0..1500usize, tail..text.len()];
        let byte = prop::sample::select(b"\"{}[]:,.-0123456789eEntfu\\ \xC4".to_vec());
        let damage = prop::collection::vec((place, byte), 1..4);
        let folder = folder(&[]);
        let path = folder.path().join("tokenizer.json");
        proptest!(ProptestConfig::with_cases(300), |(damage in damage)| {
            let mut damaged = text.clone();
            for (place, byte) in damage {
                damaged[place] = byte;
            }
            fs::write(&path, &damaged).unwrap();
            if let Ok(tokenizer) = Tokenizer::from_folder(folder.path())
                && let Ok(ids) = tokenizer.encode("Hello wörld 123 <tool>\n", true)
            {
                tokenizer.decode(&ids, false);
            }
        });
    }
}
