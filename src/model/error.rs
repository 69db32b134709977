//! Everything that can be wrong with a model's files.

use std::path::{Path, PathBuf};

use super::tensor::Dtype;

/// Why a model's files cannot be used. Each message is one line: what, where, what to do.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("{}: no such file or folder", .path.display())]
    NotFound { path: PathBuf },

    #[error("{}: {source}", .path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },

    #[error("{}: {problem}", .path.display())]
    NotAModel { path: PathBuf, problem: String },

    #[error(
        "{} is truncated: it should hold {expected} bytes and holds {actual}; fetch it again",
        .path.display()
    )]
    Truncated {
        path: PathBuf,
        expected: u64,
        actual: u64,
    },

    #[error("{}: bad header: {problem}", .path.display())]
    BadHeader { path: PathBuf, problem: String },

    #[error("{}: tensors {first} and {second} overlap", .path.display())]
    OverlappingTensors {
        path: PathBuf,
        first: String,
        second: String,
    },

    #[error(
        "{}: tensor {tensor} ends at byte {end}, but the file holds {actual}; fetch it again",
        .path.display()
    )]
    TensorOutsideFile {
        path: PathBuf,
        tensor: String,
        end: u64,
        actual: u64,
    },

    #[error("{}: the model needs tensor {tensor}, which is not there", .path.display())]
    MissingTensor { path: PathBuf, tensor: String },

    #[error(
        "{}: tensor {tensor} has shape {found:?}, but the configuration asks for {expected:?}",
        .path.display()
    )]
    ShapeMismatch {
        path: PathBuf,
        tensor: String,
        expected: Vec<usize>,
        found: Vec<usize>,
    },

    #[error(
        "{}: tensor {tensor} belongs to a layer that the configuration, with {layers} layers, does not have",
        .path.display()
    )]
    LayerBeyondConfig {
        path: PathBuf,
        tensor: String,
        layers: usize,
    },

    #[error(
        "{}: tensor {tensor} is stored as {dtype}; supported are {}",
        .path.display(),
        Dtype::NAMES
    )]
    UnsupportedDtype {
        path: PathBuf,
        tensor: String,
        dtype: String,
    },

    #[error("tensor {tensor} holds {value} in row {row}, column {column}: the weights are damaged")]
    NotFinite {
        tensor: String,
        row: usize,
        column: usize,
        /// `NaN` or `infinity`; for a block format, what the scale of the number's block is.
        value: &'static str,
    },

    #[error(
        "{}: unknown architecture {architecture:?}; supported are {supported}",
        .path.display()
    )]
    UnknownArchitecture {
        path: PathBuf,
        architecture: String,
        supported: &'static str,
    },

    #[error(
        "{}: rope scaling {kind:?} is not supported; supported are {supported}",
        .path.display()
    )]
    UnsupportedRopeScaling {
        path: PathBuf,
        kind: String,
        supported: &'static str,
    },

    /// A field that is missing, of the wrong type, out of range, or at odds with another.
    #[error("{}: {field}: {problem}", .path.display())]
    Config {
        path: PathBuf,
        field: String,
        problem: String,
    },

    #[error("{model:?} is neither a file, nor a folder, nor a hub id (owner/name)")]
    BadModelName { model: String },

    #[error("cannot fetch {model} from the hub: {problem}")]
    Hub { model: String, problem: String },

    #[error(
        "the default model is not at {}; fetch it with scripts/demo, or name a model with --model",
        .path.display()
    )]
    NoDefaultModel { path: PathBuf },

    #[error("no cache folder is known: set PODIUM_CACHE, or name a model with --model")]
    NoCacheFolder,
}

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            std::io::ErrorKind::NotFound => ModelError::NotFound { path },
            _ => ModelError::Io { path, source },
        }
    }

    pub(crate) fn header(path: &Path, problem: impl Into<String>) -> Self {
        ModelError::BadHeader {
            path: path.to_path_buf(),
            problem: problem.into(),
        }
    }

    pub(crate) fn config(
        path: &Path,
        field: impl Into<String>,
        problem: impl Into<String>,
    ) -> Self {
        ModelError::Config {
            path: path.to_path_buf(),
            field: field.into(),
            problem: problem.into(),
        }
    }

    pub(crate) fn not_a_model(path: &Path, problem: impl Into<String>) -> Self {
        ModelError::NotAModel {
            path: path.to_path_buf(),
            problem: problem.into(),
        }
    }
}
