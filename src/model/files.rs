//! A model on disk: its configuration, its stored tensors, and where its text side comes from.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::config::ModelConfig;
use super::error::ModelError;
use super::gguf::metadata::GgufMetadata;
use super::gguf::{self, MetadataIndex};
use super::hugging_face;
use super::layout::TensorLayout;
use super::mapped::MappedFile;
use super::tensor::{Dtype, Tensor};

/// Bytes of every tensor that go into a model's fingerprint.
const FINGERPRINT_SAMPLE_BYTES: usize = 4096;
/// Hexadecimal digits of a fingerprint.
const FINGERPRINT_DIGITS: usize = 16;

/// An open model. Weights stay in the mapped files until they are asked for.
#[derive(Debug)]
pub struct ModelFiles {
    path: PathBuf,
    name: String,
    config: ModelConfig,
    files: Vec<MappedFile>,
    /// Exactly the tensors that the model needs, by canonical name; shapes are checked.
    tensors: BTreeMap<String, StoredTensor>,
    /// For a GGUF file.
    metadata: Option<MetadataIndex>,
    /// Weight matrices stored as numbers are to be loaded in eight bits.
    pub(crate) quantize: bool,
}

/// What the tokenizer and the chat template are to be built from.
#[derive(Clone, Copy, Debug)]
pub enum TextSource<'a> {
    /// A folder with `tokenizer.json`, `tokenizer_config.json` and so on.
    Folder(&'a Path),
    /// The metadata of a GGUF file: `tokenizer.ggml.*` and `tokenizer.chat_template`.
    Gguf(GgufMetadata<'a>),
}

/// What the readers of both formats hand over.
pub(crate) struct Opened {
    pub name: String,
    pub config: ModelConfig,
    pub layout: TensorLayout,
    pub files: Vec<MappedFile>,
    /// By canonical name; there may be more than the model needs.
    pub tensors: BTreeMap<String, StoredTensor>,
}

/// Where a tensor lies.
#[derive(Clone, Debug)]
pub(crate) struct StoredTensor {
    /// Which of the model's files.
    pub file: usize,
    /// Bytes of that file, within its length; as many as `shape` and `dtype` need.
    pub range: Range<usize>,
    /// Or the name of one that is not supported.
    pub dtype: Result<Dtype, String>,
    pub shape: Vec<usize>,
    /// GGUF files of the Llama family keep the rows of each of so many heads interleaved:
    /// 0, d/2, 1, d/2 + 1, …
    pub interleaved_heads: Option<usize>,
}

impl ModelFiles {
    /// Opens a folder in Hugging Face's layout, a GGUF file, or a folder with exactly one.
    ///
    /// # Errors
    ///
    /// [`ModelError`], if the configuration is not understood, or if any tensor that it asks for is
    /// missing or has another shape. The weights themselves are not read: see
    /// [`check_finite`](super::tensor::check_finite).
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let (mut opened, metadata) = match Place::of(path)? {
            Place::Folder(folder) => (hugging_face::open(&folder)?, None),
            Place::Gguf(file) => {
                let (opened, metadata) = gguf::open(&file)?;
                (opened, Some(metadata))
            }
        };
        settle_tied_embeddings(&mut opened);
        let Opened {
            name,
            config,
            layout,
            files,
            tensors,
        } = opened;
        let tensors = expected_tensors(path, &layout, &config, &files, tensors)?;
        Ok(ModelFiles {
            path: path.to_path_buf(),
            name,
            config,
            files,
            tensors,
            metadata,
            quantize: false,
        })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's name, for people: what a GGUF file calls it, or the folder's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the tokenizer and the chat template come from.
    pub fn text_source(&self) -> TextSource<'_> {
        match &self.metadata {
            Some(metadata) => TextSource::Gguf(metadata.view(&self.files[0])),
            None => TextSource::Folder(&self.path),
        }
    }

    /// The canonical names of all tensors that the model has, sorted.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Bytes of all these tensors in the files.
    pub fn tensor_bytes(&self) -> u64 {
        let ranges = self.tensors.values().map(|stored| &stored.range);
        ranges.map(|range| range.len() as u64).sum()
    }

    /// Asks for weight matrices that are stored as numbers to be quantised to Q8_0 when they are
    /// loaded: half the memory and bandwidth of 16 bits.
    pub fn quantized(self) -> Self {
        ModelFiles {
            quantize: true,
            ..self
        }
    }

    /// A tensor by the name that Hugging Face files use, such as
    /// `model.layers.0.self_attn.q_proj.weight`. Borrowed from the mapped file, but for the query
    /// and key projections of GGUF's Llama files, whose rows are put back in order.
    ///
    /// # Errors
    ///
    /// [`ModelError::MissingTensor`] if models of this family have no such tensor.
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>, ModelError> {
        self.optional_tensor(name)?
            .ok_or_else(|| ModelError::MissingTensor {
                path: self.path.clone(),
                tensor: name.to_string(),
            })
    }

    /// The same, or `None` where the model has no such tensor: a bias, a norm of another family, or
    /// `lm_head.weight` where the embedding takes its place.
    pub fn optional_tensor(&self, name: &str) -> Result<Option<Tensor<'_>>, ModelError> {
        let Some(stored) = self.tensors.get(name) else {
            return Ok(None);
        };
        let dtype = stored.supported_dtype(&self.path, name)?;
        let data = &self.files[stored.file][stored.range.clone()];
        let data = match stored.interleaved_heads {
            None => data.into(),
            Some(heads) => gguf::rows_in_order(data, stored.shape[0], heads).into(),
        };
        Ok(Some(Tensor {
            dtype,
            shape: stored.shape.clone(),
            data,
        }))
    }

    /// Gives back the memory into which the file's bytes of a tensor were read: whoever made
    /// something else of them has them twice otherwise.
    pub fn forget(&self, name: &str) {
        if let Some(stored) = self.tensors.get(name) {
            self.files[stored.file].forget(stored.range.clone());
        }
    }

    /// Tells this model from others: 16 hexadecimal digits that depend on the architecture's
    /// numbers and on the first 4 KiB of every stored tensor. The same weights in another format
    /// or precision have another fingerprint, since they have other features.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(b"podium model 1\n");
        hash_numbers(&mut hash, &self.config);
        for (name, stored) in &self.tensors {
            let data = &self.files[stored.file][stored.range.clone()];
            let dtype = stored.dtype.as_ref().map_or("?", |dtype| dtype.name());
            hash.update(format!("{name} {dtype} {:?}\n", stored.shape));
            hash.update(&data[..data.len().min(FINGERPRINT_SAMPLE_BYTES)]);
        }
        let mut digits = String::new();
        for byte in hash.finalize() {
            digits.push_str(&format!("{byte:02x}"));
        }
        digits.truncate(FINGERPRINT_DIGITS);
        digits
    }
}

impl StoredTensor {
    fn supported_dtype(&self, path: &Path, name: &str) -> Result<Dtype, ModelError> {
        self.dtype
            .clone()
            .map_err(|dtype| ModelError::UnsupportedDtype {
                path: path.to_path_buf(),
                tensor: name.to_string(),
                dtype,
            })
    }
}

/// Which of the two layouts a path has.
enum Place {
    Folder(PathBuf),
    Gguf(PathBuf),
}

impl Place {
    fn of(path: &Path) -> Result<Self, ModelError> {
        let io = |error| ModelError::io(path, error);
        if !std::fs::metadata(path).map_err(io)?.is_dir() {
            let extension = path.extension().and_then(|extension| extension.to_str());
            return match extension {
                Some("safetensors" | "json") => Err(ModelError::not_a_model(
                    path,
                    "a part of a model; name the folder that holds it",
                )),
                _ => Ok(Place::Gguf(path.to_path_buf())),
            };
        }
        if hugging_face::has_weights(path) {
            return Ok(Place::Folder(path.to_path_buf()));
        }
        let mut gguf = Vec::new();
        for entry in std::fs::read_dir(path).map_err(io)? {
            let file = entry.map_err(io)?.path();
            if file
                .extension()
                .is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
            {
                gguf.push(file);
            }
        }
        match gguf.len() {
            1 => Ok(Place::Gguf(gguf.swap_remove(0))),
            0 if path.join(hugging_face::CONFIG).is_file() => Ok(Place::Folder(path.to_path_buf())),
            0 => Err(ModelError::not_a_model(
                path,
                "no model: neither config.json with model.safetensors nor a .gguf file is there",
            )),
            n => Err(ModelError::not_a_model(
                path,
                format!("{n} .gguf files are there; name one of them"),
            )),
        }
    }
}

/// As transformers does: tied embeddings whose file holds two different matrices are not tied, and
/// if only the output's is there, it serves for both.
fn settle_tied_embeddings(opened: &mut Opened) {
    if !opened.config.tie_word_embeddings {
        return;
    }
    let Some(output) = opened.tensors.get("lm_head.weight") else {
        return;
    };
    let bytes = |tensor: &StoredTensor| &opened.files[tensor.file][tensor.range.clone()];
    match opened.tensors.get("model.embed_tokens.weight") {
        Some(embedding) => {
            let same = embedding.dtype == output.dtype
                && embedding.shape == output.shape
                && bytes(embedding) == bytes(output);
            opened.config.tie_word_embeddings = same;
        }
        None => {
            let output = output.clone();
            opened
                .tensors
                .insert("model.embed_tokens.weight".to_string(), output);
        }
    }
}

/// Keeps what the model needs, and checks that all of it is there.
fn expected_tensors(
    path: &Path,
    layout: &TensorLayout,
    config: &ModelConfig,
    files: &[MappedFile],
    mut found: BTreeMap<String, StoredTensor>,
) -> Result<BTreeMap<String, StoredTensor>, ModelError> {
    let mut tensors = BTreeMap::new();
    for expected in layout.tensors(config) {
        let name = expected.name;
        let Some(stored) = found.remove(&name) else {
            return Err(ModelError::MissingTensor {
                path: path.to_path_buf(),
                tensor: name,
            });
        };
        let file = &files[stored.file].path;
        let dtype = stored.supported_dtype(file, &name)?;
        if stored.shape != expected.shape {
            return Err(ModelError::ShapeMismatch {
                path: file.clone(),
                tensor: name,
                expected: expected.shape,
                found: stored.shape,
            });
        }
        // A vector has one row a head only if its numbers stand alone.
        if stored.interleaved_heads.is_some() && stored.shape.len() == 1 && dtype.block_len() > 1 {
            return Err(ModelError::UnsupportedDtype {
                path: file.clone(),
                tensor: name,
                dtype: format!("{} though it is a bias", dtype.name()),
            });
        }
        tensors.insert(name, stored);
    }
    Ok(tensors)
}

/// Feeds what determines a model's features, but for its weights, to a hash. Frequencies are left
/// out: they come from a library's power function, which may round differently elsewhere.
fn hash_numbers(hash: &mut Sha256, config: &ModelConfig) {
    // Taken apart, so that a new field cannot be forgotten here.
    let ModelConfig {
        architecture: _,
        hidden_size,
        intermediate_size,
        vocab_size,
        layers,
        heads,
        kv_heads,
        head_dim,
        max_position_embeddings: _,
        rms_norm_eps,
        tie_word_embeddings,
        attention,
        activation,
        attention_scale,
        attention_softcap,
        logit_softcap,
        embedding_scale,
        norm_weight_plus_one,
        eos_token_ids: _,
    } = config;
    for size in [
        hidden_size,
        intermediate_size,
        vocab_size,
        layers,
        heads,
        kv_heads,
        head_dim,
    ] {
        hash.update((*size as u64).to_le_bytes());
    }
    for layer in attention {
        hash.update((layer.window.unwrap_or(0) as u64).to_le_bytes());
    }
    for number in [
        *rms_norm_eps,
        *attention_scale,
        attention_softcap.unwrap_or(0.0),
        logit_softcap.unwrap_or(0.0),
        *embedding_scale,
    ] {
        hash.update(number.to_le_bytes());
    }
    hash.update([
        u8::from(*tie_word_embeddings),
        u8::from(*norm_weight_plus_one),
        *activation as u8,
    ]);
}
