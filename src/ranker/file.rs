//! A ranker's file: one safetensors file with float32 tensors and, under the metadata key
//! `podium.ranker`, a JSON object that says what they are. `docs/RANKER.md` has the format.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Ranker;
use super::simd::LANES;

/// A ranker has fewer learned weights than this. Statistics of normalisation (`normalization.*`)
/// are measured, not learned, and are not counted.
pub const MAX_PARAMETERS: usize = 500_000;

/// The key of the description in the file's metadata.
pub const METADATA_KEY: &str = "podium.ranker";

/// The format that this code reads and writes.
const FORMAT_VERSION: u32 = 1;

/// Larger files are refused unread: 0.5M parameters are 2 MB, and the statistics of a hidden size
/// that still fits the limit are less than that.
const MAX_FILE_BYTES: u64 = 16 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RankerKind {
    /// A transformer block over the prompt and all candidates: candidates see each other.
    Listwise,
    /// A feed-forward block on each alone.
    Pointwise,
    /// One weight for each coordinate of the candidate's feature.
    Linear,
}

/// Whose state stands for a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeaturePosition {
    /// The last token of the text.
    LastToken,
    /// The end token after it.
    EndToken,
}

/// What is done to a feature first, in float32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalization {
    None,
    /// Divided by the root of its mean square (plus 1e-6).
    Rms,
    /// Less the mean, over the scale, coordinate by coordinate; prompts and candidates each by
    /// their own.
    Standardized,
}

/// How a candidate is held against the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Relevance {
    /// Dot product over √projection_width.
    Dot,
    /// Cosine over a learned temperature.
    Cosine,
}

/// A number that decoding yields for free, appended to a candidate's feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExtraInput {
    MeanLogprob,
    Length,
}

impl std::fmt::Display for ExtraInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ExtraInput::MeanLogprob => "mean_logprob",
            ExtraInput::Length => "length",
        })
    }
}

/// The description of a ranker: the JSON object under `podium.ranker`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankerConfig {
    pub format_version: u32,
    /// What people call it.
    pub name: String,
    /// The task that it was trained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    pub kind: RankerKind,
    /// Numbers in a feature: the model's hidden size.
    pub hidden_size: usize,
    /// Width of the block, a multiple of 16; 64 is the usual one. Not for the linear kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub projection_width: Option<usize>,
    /// Attention heads, a divisor of the width. Only for the listwise kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads: Option<usize>,
    /// Inner width of the feed-forward, a multiple of 16; 128 is the usual one. Not for the linear kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feed_forward_width: Option<usize>,
    /// Not for the linear kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relevance: Option<Relevance>,
    /// Features are the residual stream after this layer of the model, counted from 1.
    pub layer: usize,
    /// Layers of the model.
    pub layers: usize,
    pub feature_position: FeaturePosition,
    pub normalization: Normalization,
    /// In the order in which they follow the feature.
    #[serde(default)]
    pub extra_inputs: Vec<ExtraInput>,
    pub model_name: String,
    pub model_fingerprint: String,
    /// Data, seed, epochs, loss: whatever lets people train it again.
    #[serde(default)]
    pub training: Map<String, Value>,
    /// What was measured on held-out items.
    #[serde(default)]
    pub metrics: Map<String, Value>,
}

/// A tensor of a ranker, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct RankerTensor {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

/// What is wrong with a ranker.
#[derive(Debug, thiserror::Error)]
pub enum InvalidRanker {
    #[error("not a safetensors file: {0}")]
    Safetensors(#[from] safetensors::SafeTensorError),
    #[error("not a ranker: the file's metadata has no `{METADATA_KEY}`")]
    NoDescription,
    #[error("metadata `{METADATA_KEY}` cannot be read: {0}")]
    Description(#[from] serde_json::Error),
    #[error("format_version is {0}, but this version of podium reads {FORMAT_VERSION}")]
    FormatVersion(u32),
    #[error("metadata `{METADATA_KEY}`: {0}")]
    Inconsistent(String),
    #[error(
        "{parameters} parameters; a ranker has fewer than {MAX_PARAMETERS} (normalisation not counted)"
    )]
    TooManyParameters { parameters: usize },
    #[error("tensor `{name}` is missing; its shape would be {expected:?}")]
    MissingTensor { name: String, expected: Vec<usize> },
    #[error("tensor `{name}` is not part of a ranker of this description")]
    UnexpectedTensor { name: String },
    #[error("tensor `{name}` has shape {found:?}, but the description asks for {expected:?}")]
    Shape {
        name: String,
        expected: Vec<usize>,
        found: Vec<usize>,
    },
    #[error(
        "tensor `{name}` holds {found} numbers, but its shape {shape:?} asks for another count"
    )]
    Count {
        name: String,
        shape: Vec<usize>,
        found: usize,
    },
    #[error("tensor `{name}` is {found}; a ranker's tensors are F32")]
    Dtype { name: String, found: String },
    #[error("number {index} of tensor `{name}` is {value}")]
    NonFinite {
        name: String,
        index: usize,
        value: f32,
    },
    #[error(
        "number {index} of tensor `{name}` is {value}; it must be positive, and so must its reciprocal be finite"
    )]
    NotPositive {
        name: String,
        index: usize,
        value: f32,
    },
    #[error("{bytes} bytes, which is far more than a ranker's file has (at most {MAX_FILE_BYTES})")]
    TooLarge { bytes: u64 },
}

/// Why a ranker's file was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum RankerFileError {
    #[error("cannot read ranker {path}: {source}")]
    Read {
        path: String,
        source: std::io::Error,
    },
    #[error("cannot write ranker {path}: {source}")]
    Write {
        path: String,
        source: std::io::Error,
    },
    #[error("ranker {path}: {problem}")]
    Invalid {
        path: String,
        problem: InvalidRanker,
    },
}

impl RankerConfig {
    /// Every tensor that the file holds, with its shape, in the order of the computation. Matrices
    /// are [inputs, outputs].
    pub fn tensor_shapes(&self) -> Vec<(&'static str, Vec<usize>)> {
        let d = self.hidden_size;
        let inputs = d.saturating_add(self.extra_inputs.len());
        let mut shapes = Vec::new();
        if self.normalization == Normalization::Standardized {
            if self.kind != RankerKind::Linear {
                shapes.push(("normalization.prompt.mean", vec![d]));
                shapes.push(("normalization.prompt.scale", vec![d]));
            }
            shapes.push(("normalization.candidate.mean", vec![d]));
            shapes.push(("normalization.candidate.scale", vec![d]));
        }
        if !self.extra_inputs.is_empty() {
            shapes.push(("normalization.extra.mean", vec![self.extra_inputs.len()]));
            shapes.push(("normalization.extra.scale", vec![self.extra_inputs.len()]));
        }
        if self.kind == RankerKind::Linear {
            shapes.push(("linear.weight", vec![inputs]));
            shapes.push(("linear.bias", vec![1]));
            return shapes;
        }
        let w = self.projection_width.unwrap_or(0);
        let f = self.feed_forward_width.unwrap_or(0);
        shapes.push(("projection.weight", vec![inputs, w]));
        if self.kind == RankerKind::Listwise {
            shapes.push(("attention.norm.weight", vec![w]));
            shapes.push(("attention.norm.bias", vec![w]));
            shapes.push(("attention.qkv.weight", vec![w, w.saturating_mul(3)]));
            shapes.push(("attention.qkv.bias", vec![w.saturating_mul(3)]));
            shapes.push(("attention.output.weight", vec![w, w]));
            shapes.push(("attention.output.bias", vec![w]));
        }
        shapes.push(("feed_forward.norm.weight", vec![w]));
        shapes.push(("feed_forward.norm.bias", vec![w]));
        shapes.push(("feed_forward.up.weight", vec![w, f]));
        shapes.push(("feed_forward.up.bias", vec![f]));
        shapes.push(("feed_forward.down.weight", vec![f, w]));
        shapes.push(("feed_forward.down.bias", vec![w]));
        if self.relevance == Some(Relevance::Cosine) {
            shapes.push(("relevance.temperature", vec![1]));
        }
        shapes
    }

    /// Weights that were learned: every tensor but `normalization.*`.
    pub fn parameters(&self) -> usize {
        self.tensor_shapes()
            .iter()
            .filter(|(name, _)| !name.starts_with("normalization."))
            .fold(0, |sum: usize, (_, shape)| sum.saturating_add(count(shape)))
    }

    fn check(&self) -> Result<(), InvalidRanker> {
        let inconsistent = |what: String| Err(InvalidRanker::Inconsistent(what));
        if self.format_version != FORMAT_VERSION {
            return Err(InvalidRanker::FormatVersion(self.format_version));
        }
        if self.name.is_empty() || self.model_name.is_empty() || self.model_fingerprint.is_empty() {
            return inconsistent("name, model_name and model_fingerprint must not be empty".into());
        }
        if self.hidden_size == 0 {
            return inconsistent("hidden_size is 0".into());
        }
        if self.layer == 0 || self.layer > self.layers {
            return inconsistent(format!(
                "layer is {}, but must be within 1..={}",
                self.layer, self.layers
            ));
        }
        if self
            .extra_inputs
            .iter()
            .enumerate()
            .any(|(i, input)| self.extra_inputs[..i].contains(input))
        {
            return inconsistent("extra_inputs names one input twice".into());
        }
        let has_block = self.kind != RankerKind::Linear;
        let kind = format!("{:?}", self.kind).to_lowercase();
        for (field, given, wanted) in [
            (
                "projection_width",
                self.projection_width.is_some(),
                has_block,
            ),
            (
                "feed_forward_width",
                self.feed_forward_width.is_some(),
                has_block,
            ),
            ("relevance", self.relevance.is_some(), has_block),
            (
                "heads",
                self.heads.is_some(),
                self.kind == RankerKind::Listwise,
            ),
        ] {
            if wanted && !given {
                return inconsistent(format!("{field} is missing; a {kind} ranker needs it"));
            }
            if given && !wanted {
                return inconsistent(format!("{field} is given, but a {kind} ranker has none"));
            }
        }
        for (field, width) in [
            ("projection_width", self.projection_width),
            ("feed_forward_width", self.feed_forward_width),
        ] {
            if let Some(width) = width.filter(|&width| width == 0 || width % LANES != 0) {
                return inconsistent(format!(
                    "{field} is {width}, but must be a positive multiple of {LANES}"
                ));
            }
        }
        if let (Some(heads), Some(width)) = (self.heads, self.projection_width)
            && (heads == 0 || width % heads != 0)
        {
            return inconsistent(format!(
                "heads is {heads}, but must divide projection_width, {width}"
            ));
        }
        let parameters = self.parameters();
        if parameters >= MAX_PARAMETERS {
            return Err(InvalidRanker::TooManyParameters { parameters });
        }
        Ok(())
    }
}

fn count(shape: &[usize]) -> usize {
    shape
        .iter()
        .fold(1, |product: usize, &len| product.saturating_mul(len))
}

/// Everything that must hold before a ranker may score.
pub(super) fn validate(
    config: &RankerConfig,
    tensors: &BTreeMap<String, RankerTensor>,
) -> Result<(), InvalidRanker> {
    config.check()?;
    let shapes = config.tensor_shapes();
    if let Some(name) = tensors
        .keys()
        .find(|name| shapes.iter().all(|(known, _)| known != name))
    {
        return Err(InvalidRanker::UnexpectedTensor { name: name.clone() });
    }
    for (name, expected) in shapes {
        let Some(RankerTensor { shape, data }) = tensors.get(name) else {
            return Err(InvalidRanker::MissingTensor {
                name: name.into(),
                expected,
            });
        };
        if *shape != expected {
            return Err(InvalidRanker::Shape {
                name: name.into(),
                expected,
                found: shape.clone(),
            });
        }
        if data.len() != count(shape) {
            return Err(InvalidRanker::Count {
                name: name.into(),
                shape: shape.clone(),
                found: data.len(),
            });
        }
        if let Some(index) = data.iter().position(|value| !value.is_finite()) {
            return Err(InvalidRanker::NonFinite {
                name: name.into(),
                index,
                value: data[index],
            });
        }
        let divides = name.ends_with(".scale") || name == "relevance.temperature";
        if divides
            && let Some(index) = data
                .iter()
                .position(|&value| value <= 0.0 || !(1.0 / value).is_finite())
        {
            return Err(InvalidRanker::NotPositive {
                name: name.into(),
                index,
                value: data[index],
            });
        }
    }
    Ok(())
}

impl Ranker {
    /// Reads a ranker's file.
    pub fn load(path: &Path) -> Result<Self, RankerFileError> {
        let shown = || path.display().to_string();
        let read = |source| RankerFileError::Read {
            path: shown(),
            source,
        };
        let mut bytes = Vec::new();
        // One byte more than the limit tells a file that is too large from one that just fits.
        File::open(path)
            .map_err(read)?
            .take(MAX_FILE_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(read)?;
        let ranker = if bytes.len() as u64 > MAX_FILE_BYTES {
            let bytes =
                std::fs::metadata(path).map_or(bytes.len() as u64, |metadata| metadata.len());
            Err(InvalidRanker::TooLarge { bytes })
        } else {
            Self::from_bytes(&bytes)
        };
        ranker.map_err(|problem| RankerFileError::Invalid {
            path: shown(),
            problem,
        })
    }

    /// Reads a ranker from the bytes of its file.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, InvalidRanker> {
        let (_, metadata) = SafeTensors::read_metadata(bytes)?;
        let description = metadata
            .metadata()
            .as_ref()
            .and_then(|metadata| metadata.get(METADATA_KEY));
        let config: RankerConfig =
            serde_json::from_str(description.ok_or(InvalidRanker::NoDescription)?)?;
        let mut tensors = BTreeMap::new();
        for (name, view) in SafeTensors::deserialize(bytes)?.iter() {
            if view.dtype() != Dtype::F32 {
                return Err(InvalidRanker::Dtype {
                    name: name.into(),
                    found: format!("{:?}", view.dtype()),
                });
            }
            let data = view
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&bytes| f32::from_le_bytes(bytes))
                .collect();
            tensors.insert(
                name.to_owned(),
                RankerTensor {
                    shape: view.shape().to_vec(),
                    data,
                },
            );
        }
        Ranker::new(config, tensors)
    }

    /// The bytes of this ranker's file; the same every time.
    pub fn to_bytes(&self) -> Result<Vec<u8>, InvalidRanker> {
        let description = serde_json::to_string(self.config())?;
        let bytes: BTreeMap<&str, Vec<u8>> = self
            .tensors()
            .iter()
            .map(|(name, tensor)| {
                (
                    name.as_str(),
                    tensor
                        .data
                        .iter()
                        .flat_map(|value| value.to_le_bytes())
                        .collect(),
                )
            })
            .collect();
        let views = bytes
            .iter()
            .map(|(&name, bytes)| {
                Ok((
                    name,
                    TensorView::new(Dtype::F32, self.tensors()[name].shape.clone(), bytes)?,
                ))
            })
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
        Ok(safetensors::serialize(
            views,
            Some(HashMap::from([(METADATA_KEY.to_owned(), description)])),
        )?)
    }

    /// Writes a ranker's file: whole, or not at all. It is written under a temporary name beside
    /// `path`, brought to the disk, and renamed.
    pub fn save(&self, path: &Path) -> Result<(), RankerFileError> {
        let shown = || path.display().to_string();
        let bytes = self
            .to_bytes()
            .map_err(|problem| RankerFileError::Invalid {
                path: shown(),
                problem,
            })?;
        write_whole(path, &bytes).map_err(|source| RankerFileError::Write {
            path: shown(),
            source,
        })
    }
}

fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Less the umask, as for any new file; temporary files are private otherwise.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.prefix(".ranker-").tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    // The new name is on the disk once the folder is.
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    Ok(())
}
