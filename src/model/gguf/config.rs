//! The configuration in a GGUF file's metadata, as llama.cpp's `convert_hf_to_gguf.py` writes it
//! and llama.cpp reads it.

use std::collections::BTreeMap;

use super::metadata::GgufMetadata;
use super::parser::TensorEntry;
use crate::model::config::{
    Activation, AttentionConfig, MAX_CONTEXT, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_VOCABULARY,
    MAX_WIDTH, ModelConfig, Rope,
};
use crate::model::error::ModelError;
use crate::model::layout::TensorLayout;
use crate::model::rope::{RopeScaling, rope};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// Mistral files, too.
    Llama,
    Qwen2,
    Qwen3,
    Gemma2,
    Gemma3,
}

const SUPPORTED: &str = "llama (and mistral), qwen2, qwen3, gemma2 and gemma3";

impl Family {
    /// True where the file keeps the rows of each query and key head interleaved: those of a
    /// rotated pair beside each other.
    pub fn interleaves_heads(self) -> bool {
        self == Family::Llama
    }

    fn is_gemma(self) -> bool {
        matches!(self, Family::Gemma2 | Family::Gemma3)
    }
}

/// Metadata of the file's architecture: keys without their `llama.` prefix.
struct Fields<'a> {
    metadata: GgufMetadata<'a>,
    architecture: &'a str,
}

impl Fields<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn wrong(&self, key: &str, problem: impl Into<String>) -> ModelError {
        self.metadata.wrong(&self.key(key), problem)
    }

    fn size(&self, key: &str, max: usize) -> Result<Option<usize>, ModelError> {
        match self.metadata.u32(&self.key(key))? {
            None => Ok(None),
            Some(n) if (1..=max).contains(&(n as usize)) => Ok(Some(n as usize)),
            Some(n) => Err(self.wrong(key, format!("{n} is not from 1 to {max}"))),
        }
    }

    fn required(&self, key: &str, max: usize) -> Result<usize, ModelError> {
        self.size(key, max)?
            .ok_or_else(|| self.wrong(key, "missing"))
    }

    fn positive(&self, key: &str) -> Result<Option<f32>, ModelError> {
        match self.metadata.f32(&self.key(key))? {
            Some(n) if !(n > 0.0 && n.is_finite()) => {
                Err(self.wrong(key, format!("{n} is not a number above zero")))
            }
            n => Ok(n),
        }
    }
}

/// Reads the configuration; `rope_divisors` are the numbers of `rope_freqs.weight`, where the file
/// has it: Llama 3's scaling, worked out by the converter.
pub(super) fn parse(
    metadata: GgufMetadata,
    tensors: &BTreeMap<String, TensorEntry>,
    rope_divisors: Option<Vec<f32>>,
) -> Result<(ModelConfig, TensorLayout, Family), ModelError> {
    let architecture = metadata
        .string("general.architecture")?
        .ok_or_else(|| metadata.wrong("general.architecture", "missing"))?;
    let family = match architecture {
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "qwen3" => Family::Qwen3,
        "gemma2" => Family::Gemma2,
        "gemma3" => Family::Gemma3,
        _ => {
            return Err(ModelError::UnknownArchitecture {
                path: metadata.path.to_path_buf(),
                architecture: architecture.to_string(),
                supported: SUPPORTED,
            });
        }
    };
    let fields = Fields {
        metadata,
        architecture,
    };
    if metadata.u32("split.count")?.unwrap_or(1) > 1 {
        return Err(metadata.wrong(
            "split.count",
            "the model is split over many files; merge them with llama-gguf-split --merge",
        ));
    }
    if fields
        .size("expert_count", MAX_WIDTH)
        .is_ok_and(|n| n.is_some())
    {
        return Err(fields.wrong("expert_count", "mixtures of experts are not supported"));
    }

    let hidden_size = fields.required("embedding_length", MAX_WIDTH)?;
    let layers = fields.required("block_count", MAX_LAYERS)?;
    let heads = fields.required("attention.head_count", MAX_HEADS)?;
    let kv_heads = fields
        .size("attention.head_count_kv", MAX_HEADS)?
        .unwrap_or(heads);
    let head_dim = match fields.size("attention.key_length", MAX_HEAD_DIM)? {
        Some(head_dim) => head_dim,
        None if hidden_size >= heads => hidden_size / heads,
        None => {
            return Err(fields.wrong(
                "attention.head_count",
                format!("{heads} heads cannot share a hidden size of {hidden_size}"),
            ));
        }
    };
    for key in ["attention.value_length", "rope.dimension_count"] {
        match fields.size(key, MAX_HEAD_DIM)? {
            Some(dim) if dim != head_dim => {
                return Err(fields.wrong(
                    key,
                    format!("{dim} is not the head dimension, {head_dim}; this is not supported"),
                ));
            }
            _ => {}
        }
    }
    let vocab_size = match fields.size("vocab_size", MAX_VOCABULARY)? {
        Some(size) => size,
        None => tensors
            .get("token_embd.weight")
            .and_then(|embedding| embedding.shape.first().copied())
            .filter(|size| (1..=MAX_VOCABULARY).contains(size))
            .ok_or_else(|| ModelError::MissingTensor {
                path: metadata.path.to_path_buf(),
                tensor: "token_embd.weight".to_string(),
            })?,
    };

    let layout = TensorLayout {
        // The metadata does not say; llama.cpp, too, takes the biases that are there. Layers that
        // lack one are found when all are looked up.
        qkv_bias: tensors.contains_key("blk.0.attn_q.bias"),
        output_bias: tensors.contains_key("blk.0.attn_output.bias"),
        mlp_bias: tensors.contains_key("blk.0.ffn_gate.bias"),
        qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
        sandwich_norms: family.is_gemma(),
    };
    let (attention_softcap, logit_softcap) = match family {
        Family::Gemma2 => (
            Some(fields.positive("attn_logit_softcapping")?.unwrap_or(50.0)),
            Some(fields.positive("final_logit_softcapping")?.unwrap_or(30.0)),
        ),
        _ => (None, None),
    };
    let config = ModelConfig {
        architecture: architecture.to_string(),
        hidden_size,
        intermediate_size: fields.required("feed_forward_length", MAX_WIDTH)?,
        vocab_size,
        layers,
        heads,
        kv_heads,
        head_dim,
        max_position_embeddings: fields.required("context_length", MAX_CONTEXT)?,
        rms_norm_eps: fields
            .positive("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| fields.wrong("attention.layer_norm_rms_epsilon", "missing"))?,
        tie_word_embeddings: !tensors.contains_key("output.weight"),
        attention: attention(&fields, family, layers, head_dim, rope_divisors)?,
        activation: match family.is_gemma() {
            true => Activation::GeluTanh,
            false => Activation::Silu,
        },
        attention_scale: attention_scale(family, layers, hidden_size, heads, head_dim),
        attention_softcap,
        logit_softcap,
        embedding_scale: match family.is_gemma() {
            true => (hidden_size as f64).sqrt() as f32,
            false => 1.0,
        },
        // The converter has added the one already.
        norm_weight_plus_one: false,
        eos_token_ids: eos_token_ids(&metadata)?,
    };
    config.check(metadata.path)?;
    Ok((config, layout, family))
}

/// GGUF does not store Gemma's `query_pre_attn_scalar`. It is the head dimension, but for the 27B
/// models, which llama.cpp, too, tells by their number of layers.
fn attention_scale(
    family: Family,
    layers: usize,
    hidden_size: usize,
    heads: usize,
    head_dim: usize,
) -> f32 {
    let scalar = match (family, layers) {
        (Family::Gemma2, 46) | (Family::Gemma3, 62) => hidden_size / heads,
        _ => head_dim,
    };
    (1.0 / (scalar as f64).sqrt()) as f32
}

fn attention(
    fields: &Fields,
    family: Family,
    layers: usize,
    head_dim: usize,
    rope_divisors: Option<Vec<f32>>,
) -> Result<Vec<AttentionConfig>, ModelError> {
    // What llama.cpp takes where the file says nothing.
    let theta = fields.positive("rope.freq_base")?.unwrap_or(10_000.0);
    let local_theta = fields.positive("rope.freq_base_swa")?.unwrap_or(10_000.0);
    let mut full = rope(theta.into(), head_dim, &scaling(fields)?);
    if let Some(divisors) = rope_divisors {
        apply_divisors(fields, &mut full, &divisors)?;
    }
    let window = fields.size("attention.sliding_window", MAX_CONTEXT)?;
    let window = match family {
        // A Mistral file; Llama files do not have the key.
        Family::Llama => window,
        // The converter does not say which layers slide, and llama.cpp lets none.
        Family::Qwen2 | Family::Qwen3 => None,
        Family::Gemma2 => Some(window.unwrap_or(4096)),
        Family::Gemma3 => {
            Some(window.ok_or_else(|| fields.wrong("attention.sliding_window", "missing"))?)
        }
    };
    let slides = sliding_layers(fields, family, layers)?;
    Ok(slides
        .into_iter()
        .map(|slides| AttentionConfig {
            window: window.filter(|_| slides),
            rope: match family == Family::Gemma3 && slides {
                true => rope(local_theta.into(), head_dim, &RopeScaling::None),
                false => full.clone(),
            },
        })
        .collect())
}

/// Which layers have a sliding window, if the model has one.
fn sliding_layers(fields: &Fields, family: Family, layers: usize) -> Result<Vec<bool>, ModelError> {
    let default_period = match family {
        Family::Gemma2 => 2,
        Family::Gemma3 => 6,
        _ => return Ok(vec![true; layers]),
    };
    let key = "attention.sliding_window_pattern";
    if fields.metadata.is_array(&fields.key(key)) {
        let pattern = fields.metadata.bools(&fields.key(key))?.unwrap_or_default();
        return match pattern.len() == layers {
            true => Ok(pattern),
            false => Err(fields.wrong(
                key,
                format!("{} entries for {layers} layers", pattern.len()),
            )),
        };
    }
    let period = fields.size(key, MAX_LAYERS)?.unwrap_or(default_period);
    Ok((0..layers).map(|layer| (layer + 1) % period != 0).collect())
}

fn scaling(fields: &Fields) -> Result<RopeScaling, ModelError> {
    let kind = fields.metadata.string(&fields.key("rope.scaling.type"))?;
    let factor = match fields.positive("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => fields.positive("rope.scale_linear")?,
    };
    match kind {
        None | Some("linear") => Ok(match factor {
            Some(factor) => RopeScaling::Linear {
                factor: factor.into(),
            },
            None => RopeScaling::None,
        }),
        Some("none") => Ok(RopeScaling::None),
        Some("yarn") => yarn(fields, factor),
        Some(other) => Err(ModelError::UnsupportedRopeScaling {
            path: fields.metadata.path.to_path_buf(),
            kind: other.to_string(),
            supported: "none, linear and yarn",
        }),
    }
}

fn yarn(fields: &Fields, factor: Option<f32>) -> Result<RopeScaling, ModelError> {
    for key in [
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_log_multiplier",
    ] {
        if fields.positive(key)?.is_some_and(|factor| factor != 1.0) {
            return Err(fields.wrong(key, "this variant of YaRN is not supported"));
        }
    }
    let original = fields.required("rope.scaling.original_context_length", MAX_CONTEXT)?;
    let beta = |key, default| Ok(f64::from(fields.positive(key)?.unwrap_or(default)));
    Ok(RopeScaling::Yarn {
        factor: factor
            .ok_or_else(|| fields.wrong("rope.scaling.factor", "missing"))?
            .into(),
        attention_factor: None,
        beta_fast: beta("rope.scaling.yarn_beta_fast", 32.0)?,
        beta_slow: beta("rope.scaling.yarn_beta_slow", 1.0)?,
        original_context: original as f64,
        truncate: true,
    })
}

fn apply_divisors(fields: &Fields, rope: &mut Rope, divisors: &[f32]) -> Result<(), ModelError> {
    if divisors.len() != rope.frequencies.len() {
        return Err(ModelError::ShapeMismatch {
            path: fields.metadata.path.to_path_buf(),
            tensor: "rope_freqs.weight".to_string(),
            expected: vec![rope.frequencies.len()],
            found: vec![divisors.len()],
        });
    }
    for (frequency, &divisor) in rope.frequencies.iter_mut().zip(divisors) {
        if !(divisor > 0.0 && divisor.is_finite()) {
            return Err(ModelError::header(
                fields.metadata.path,
                format!("rope_freqs.weight holds {divisor}"),
            ));
        }
        *frequency /= divisor;
    }
    Ok(())
}

/// The end of a text, and of a turn or message where the file names a token for that.
fn eos_token_ids(metadata: &GgufMetadata) -> Result<Vec<u32>, ModelError> {
    let mut ids = Vec::new();
    for key in ["eos", "eot", "eom"] {
        if let Some(id) = metadata.u32(&format!("tokenizer.ggml.{key}_token_id"))?
            && !ids.contains(&id)
        {
            ids.push(id);
        }
    }
    Ok(ids)
}
