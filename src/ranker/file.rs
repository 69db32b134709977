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

#[cfg(test)]
mod tests {
    use super::super::reference::{config, random_ranker};
    use super::*;

    fn good(kind: RankerKind) -> Ranker {
        random_ranker(config(kind, 24), 5)
    }

    /// The message for a ranker whose description and tensors were changed.
    fn message(
        kind: RankerKind,
        change: impl Fn(&mut RankerConfig, &mut BTreeMap<String, RankerTensor>),
    ) -> String {
        let ranker = good(kind);
        let (mut config, mut tensors) = (ranker.config().clone(), ranker.tensors().clone());
        change(&mut config, &mut tensors);
        let message = Ranker::new(config, tensors)
            .expect_err("it was spoilt")
            .to_string();
        assert!(!message.contains('\n'), "{message}");
        message
    }

    /// The bytes of a file of the given description, with the tensors of a good ranker.
    fn file_with(description: Option<&str>) -> Vec<u8> {
        let data = 1f32.to_le_bytes();
        let view = TensorView::new(Dtype::F32, vec![1], &data).unwrap();
        let metadata = description.map(|d| HashMap::from([(METADATA_KEY.into(), d.into())]));
        safetensors::serialize([("linear.bias", view)], metadata).unwrap()
    }

    #[test]
    fn a_saved_ranker_is_the_same_when_loaded() {
        let folder = tempfile::tempdir().unwrap();
        for kind in [
            RankerKind::Listwise,
            RankerKind::Pointwise,
            RankerKind::Linear,
        ] {
            let mut config = config(kind, 24);
            config.task = Some("gcd".into());
            config.training.insert("seed".into(), 7.into());
            if kind == RankerKind::Pointwise {
                config.relevance = Some(Relevance::Cosine);
            }
            let ranker = random_ranker(config, 5);
            let path = folder.path().join("ranker.safetensors");
            ranker.save(&path).unwrap();
            let loaded = Ranker::load(&path).unwrap();
            assert_eq!(loaded.config(), ranker.config());
            assert_eq!(loaded.tensors(), ranker.tensors());
            assert_eq!(std::fs::read(&path).unwrap(), ranker.to_bytes().unwrap());
            // Nothing temporary is left behind.
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_failed_save_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        // A folder of that name cannot be replaced by a file.
        let path = folder.path().join("taken");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("inside"), "x").unwrap();
        let error = good(RankerKind::Linear).save(&path).unwrap_err();
        assert!(
            error.to_string().starts_with("cannot write ranker "),
            "{error}"
        );
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let missing = folder.path().join("no/such/folder/r.safetensors");
        assert!(matches!(
            good(RankerKind::Linear).save(&missing),
            Err(RankerFileError::Write { .. })
        ));
    }

    #[test]
    fn files_that_are_no_rankers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.safetensors");
        assert!(matches!(
            Ranker::load(&path),
            Err(RankerFileError::Read { .. })
        ));
        let load = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let message = Ranker::load(&path).unwrap_err().to_string();
            assert!(!message.contains('\n'), "{message}");
            message
        };
        let bytes = good(RankerKind::Linear).to_bytes().unwrap();
        for cut in [0, 4, 8, 50, bytes.len() - 1] {
            assert!(
                load(&bytes[..cut]).contains("not a safetensors file"),
                "cut at {cut}"
            );
        }
        let mut hostile = bytes.clone();
        hostile[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(load(&hostile).contains("not a safetensors file"));
        assert!(load(&vec![0; MAX_FILE_BYTES as usize + 1]).contains("16777217 bytes"));
        assert!(load(&file_with(None)).contains("no `podium.ranker`"));
        assert!(load(&file_with(Some("{"))).contains("cannot be read"));
        let description = serde_json::to_value(config(RankerKind::Linear, 24)).unwrap();
        let with = |field: &str, value: Value| {
            let mut description = description.clone();
            description[field] = value;
            load(&file_with(Some(&description.to_string())))
        };
        assert!(with("kind", "best".into()).contains("unknown variant `best`, expected one of"));
        assert!(with("hidden_size", (-1).into()).contains("cannot be read"));
        assert!(with("final_norm", true.into()).contains("unknown field `final_norm`"));
        assert!(with("format_version", 2.into()).contains("format_version is 2"));
        assert!(with("name", "x".into()).contains("`normalization.candidate.mean` is missing"));
    }

    #[test]
    fn tensors_are_f32() {
        let ranker = good(RankerKind::Linear);
        let data = [0u8; 2];
        let view = TensorView::new(Dtype::F16, vec![1], &data).unwrap();
        let description = serde_json::to_string(ranker.config()).unwrap();
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), description)]);
        let bytes = safetensors::serialize([("linear.bias", view)], Some(metadata)).unwrap();
        let message = Ranker::from_bytes(&bytes).unwrap_err().to_string();
        assert_eq!(
            message,
            "tensor `linear.bias` is F16; a ranker's tensors are F32"
        );
    }

    #[test]
    fn inconsistent_descriptions_are_refused() {
        use RankerKind::*;
        for (kind, change, expected) in [
            (
                Listwise,
                (|c| c.heads = None) as fn(&mut RankerConfig),
                "heads is missing",
            ),
            (
                Listwise,
                |c| c.heads = Some(5),
                "heads is 5, but must divide projection_width, 64",
            ),
            (Listwise, |c| c.heads = Some(0), "heads is 0"),
            (
                Listwise,
                |c| c.projection_width = Some(60),
                "projection_width is 60",
            ),
            (
                Listwise,
                |c| c.projection_width = Some(0),
                "projection_width is 0",
            ),
            (
                Listwise,
                |c| c.feed_forward_width = Some(usize::MAX),
                "feed_forward_width is",
            ),
            (
                Listwise,
                |c| c.feed_forward_width = Some(1 << 60),
                "parameters; a ranker has fewer",
            ),
            (
                Listwise,
                |c| c.projection_width = Some(1 << 40),
                "parameters; a ranker has fewer",
            ),
            (Listwise, |c| c.relevance = None, "relevance is missing"),
            (
                Pointwise,
                |c| c.heads = Some(4),
                "heads is given, but a pointwise ranker has none",
            ),
            (Pointwise, |c| c.hidden_size = 0, "hidden_size is 0"),
            (Pointwise, |c| c.hidden_size = 7600, "503168 parameters"),
            (
                Pointwise,
                |c| c.hidden_size = usize::MAX,
                "parameters; a ranker has fewer",
            ),
            (
                Linear,
                |c| c.relevance = Some(Relevance::Dot),
                "relevance is given",
            ),
            (
                Linear,
                |c| c.layer = 0,
                "layer is 0, but must be within 1..=3",
            ),
            (
                Linear,
                |c| c.layer = 4,
                "layer is 4, but must be within 1..=3",
            ),
            (
                Linear,
                |c| c.extra_inputs = vec![ExtraInput::Length; 2],
                "one input twice",
            ),
            (Linear, |c| c.model_fingerprint.clear(), "must not be empty"),
        ] {
            let message = message(kind, |config, _| change(config));
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn tensors_that_do_not_fit_are_refused() {
        let message = |change: fn(&mut BTreeMap<String, RankerTensor>)| {
            message(RankerKind::Listwise, |_, tensors| change(tensors))
        };
        fn of<'a>(t: &'a mut BTreeMap<String, RankerTensor>, name: &str) -> &'a mut RankerTensor {
            t.get_mut(name).unwrap()
        }
        assert_eq!(
            message(|t| _ = t.remove("attention.qkv.bias")),
            "tensor `attention.qkv.bias` is missing; its shape would be [192]"
        );
        assert_eq!(
            message(|t| {
                let extra = t["attention.qkv.bias"].clone();
                t.insert("attention.rope".into(), extra);
            }),
            "tensor `attention.rope` is not part of a ranker of this description"
        );
        assert_eq!(
            message(|t| of(t, "projection.weight").shape = vec![64, 25]),
            "tensor `projection.weight` has shape [64, 25], but the description asks for [25, 64]"
        );
        assert!(message(|t| _ = of(t, "projection.weight").data.pop()).contains("holds 1599"));
        assert_eq!(
            message(|t| of(t, "feed_forward.up.bias").data[3] = f32::NAN),
            "number 3 of tensor `feed_forward.up.bias` is NaN"
        );
        for value in [0.0, -1.0, 1e-45] {
            let scale = |t: &mut BTreeMap<String, RankerTensor>, value| {
                of(t, "normalization.prompt.scale").data[1] = value;
            };
            let ranker = good(RankerKind::Listwise);
            let mut tensors = ranker.tensors().clone();
            scale(&mut tensors, value);
            let problem = Ranker::new(ranker.config().clone(), tensors).unwrap_err();
            assert!(
                matches!(problem, InvalidRanker::NotPositive { index: 1, .. }),
                "{problem}"
            );
        }
    }

    #[test]
    fn parameters_are_those_of_the_paper() {
        // Hidden size 5120: 0.36M, of which the projection is 327,680.
        let mut config = config(RankerKind::Listwise, 5120);
        config.extra_inputs.clear();
        assert_eq!(config.parameters(), 327_680 + 33_472);
        config.hidden_size = 4096;
        assert_eq!(config.parameters(), 262_144 + 33_472);
        // Statistics are not counted.
        let with_statistics = config.parameters();
        config.normalization = Normalization::None;
        assert_eq!(config.parameters(), with_statistics);
    }
}
