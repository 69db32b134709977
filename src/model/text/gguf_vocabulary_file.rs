//! Reads the vocabulary of a real GGUF file, for the tests of this module alone.

use std::collections::HashMap;
use std::path::PathBuf;

use super::GgufVocabulary;

/// A metadata value of the kinds that a tokenizer uses.
enum Metadata {
    Integer(u64),
    Text(String),
    Texts(Vec<String>),
    Integers(Vec<i32>),
    Floats(Vec<f32>),
    Other,
}

pub(super) struct GgufVocabularyFile {
    metadata: HashMap<String, Metadata>,
}

/// The default model's GGUF; `None`, said aloud, where it has not been fetched.
pub(super) fn default_model() -> Option<GgufVocabularyFile> {
    let path = std::env::var_os("PODIUM_TEST_MODEL")
        .map(PathBuf::from)
        .or_else(|| Some(cache_folder()?.join("SmolLM2-135M-Instruct.Q4_1.gguf")))
        .filter(|path| path.exists());
    let Some(path) = path else {
        println!("skipped: the default model is not there (set PODIUM_TEST_MODEL)");
        return None;
    };
    // The metadata and vocabulary are the first 2 MB; tensors are not touched.
    let file = std::fs::File::open(&path).unwrap();
    // Safety: the test's model is not written to while it runs.
    let bytes = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    Some(GgufVocabularyFile::parse(&bytes))
}

fn cache_folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    variable("PODIUM_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("podium")))
        .or_else(|| Some(variable("HOME")?.join(".cache/podium")))
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let (head, tail) = self.0.split_first_chunk().unwrap();
        self.0 = tail;
        *head
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    fn text(&mut self) -> String {
        let length = self.u64() as usize;
        let (head, tail) = self.0.split_at(length);
        self.0 = tail;
        String::from_utf8(head.to_vec()).unwrap()
    }

    fn value(&mut self, kind: u32) -> Metadata {
        match kind {
            0 | 1 | 7 => Metadata::Integer(self.bytes::<1>()[0].into()),
            2 | 3 => Metadata::Integer(u16::from_le_bytes(self.bytes()).into()),
            4 | 5 => Metadata::Integer(self.u32().into()),
            10 | 11 => Metadata::Integer(self.u64()),
            6 => {
                self.u32();
                Metadata::Other
            }
            12 => {
                self.u64();
                Metadata::Other
            }
            8 => Metadata::Text(self.text()),
            9 => {
                let (kind, count) = (self.u32(), self.u64());
                match kind {
                    8 => Metadata::Texts((0..count).map(|_| self.text()).collect()),
                    4 | 5 => Metadata::Integers((0..count).map(|_| self.u32() as i32).collect()),
                    6 => Metadata::Floats((0..count).map(|_| f32::from_bits(self.u32())).collect()),
                    _ => panic!("array of kind {kind}"),
                }
            }
            _ => panic!("value of kind {kind}"),
        }
    }
}

impl GgufVocabularyFile {
    fn parse(bytes: &[u8]) -> Self {
        let mut reader = Reader(bytes);
        assert_eq!(&reader.bytes(), b"GGUF");
        assert_eq!(reader.u32(), 3, "version");
        let (_tensors, count) = (reader.u64(), reader.u64());
        let metadata = (0..count)
            .map(|_| {
                let key = reader.text();
                let kind = reader.u32();
                (key, reader.value(kind))
            })
            .collect();
        Self { metadata }
    }

    fn get(&self, key: &str) -> &Metadata {
        self.metadata
            .get(&format!("tokenizer.{key}"))
            .unwrap_or(&Metadata::Other)
    }

    fn text(&self, key: &str) -> Option<&str> {
        match self.get(key) {
            Metadata::Text(text) => Some(text),
            _ => None,
        }
    }

    fn texts(&self, key: &str) -> Vec<&str> {
        match self.get(key) {
            Metadata::Texts(texts) => texts.iter().map(String::as_str).collect(),
            _ => Vec::new(),
        }
    }

    fn id(&self, key: &str) -> Option<u32> {
        match self.get(key) {
            Metadata::Integer(id) => u32::try_from(*id).ok(),
            _ => None,
        }
    }

    pub(super) fn vocabulary(&self) -> GgufVocabulary<'_> {
        GgufVocabulary {
            model: self.text("ggml.model").unwrap(),
            pre: self.text("ggml.pre"),
            tokens: self.texts("ggml.tokens"),
            token_types: match self.get("ggml.token_type") {
                Metadata::Integers(types) => types.clone(),
                _ => Vec::new(),
            },
            scores: match self.get("ggml.scores") {
                Metadata::Floats(scores) => scores.clone(),
                _ => Vec::new(),
            },
            merges: self.texts("ggml.merges"),
            bos_token_id: self.id("ggml.bos_token_id"),
            eos_token_id: self.id("ggml.eos_token_id"),
            eot_token_id: self.id("ggml.eot_token_id"),
            eom_token_id: self.id("ggml.eom_token_id"),
            unknown_token_id: self.id("ggml.unknown_token_id"),
            padding_token_id: self.id("ggml.padding_token_id"),
            add_bos: self.id("ggml.add_bos_token").map(|flag| flag != 0),
            add_eos: self.id("ggml.add_eos_token").map(|flag| flag != 0),
            add_space_prefix: self.id("ggml.add_space_prefix").map(|flag| flag != 0),
            chat_template: self.text("chat_template"),
        }
    }
}
