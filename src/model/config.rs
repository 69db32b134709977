//! What a model is: the numbers that the forward pass needs, whichever file they came from.

use std::path::Path;

use super::error::ModelError;

// What a configuration may ask for. Far beyond any model of these families, and small enough that
// products of two never overflow and a hostile file cannot ask for absurd amounts of memory before
// its tensors are seen to be missing.
pub(crate) const MAX_LAYERS: usize = 4096;
pub(crate) const MAX_WIDTH: usize = 1 << 22;
pub(crate) const MAX_HEADS: usize = 1 << 14;
pub(crate) const MAX_HEAD_DIM: usize = 1 << 12;
pub(crate) const MAX_VOCABULARY: usize = 1 << 26;
pub(crate) const MAX_CONTEXT: usize = 1 << 30;

/// Every number of the architecture, in the terms of Hugging Face's `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `llama`, `mistral`, `qwen2`, `qwen3`, …: for people and fingerprints; the forward pass never asks.
    pub architecture: String,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Longest context, prompt and answer together, in tokens.
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f32,
    pub tie_word_embeddings: bool,
    /// One entry a layer.
    pub attention: Vec<AttentionConfig>,
    pub activation: Activation,
    /// Attention scores are multiplied by this: 1/√head_dim, but for the Gemma family.
    pub attention_scale: f32,
    /// `cap · tanh(x / cap)` on attention scores (Gemma 2).
    pub attention_softcap: Option<f32>,
    /// The same on logits (Gemma 2).
    pub logit_softcap: Option<f32>,
    /// Embeddings are multiplied by this: 1, but for the Gemma family.
    pub embedding_scale: f32,
    /// RMSNorm multiplies by `1 + weight` (Gemma family); applied once, when the weights are loaded.
    pub norm_weight_plus_one: bool,
    /// Tokens that end an answer, from `generation_config.json`, else `config.json`, else the tokenizer.
    pub eos_token_ids: Vec<u32>,
}

/// What differs from layer to layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Sliding window: a token at position p sees positions p - window + 1 ..= p. `None`: all.
    pub window: Option<usize>,
    pub rope: Rope,
}

/// Rotary position embedding in the half-split form of Hugging Face: coordinate i is rotated with
/// coordinate i + dim/2, where dim = 2 · frequencies.len() ≤ head_dim (the rest passes unrotated).
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Angle per position of each pair, in radians, scaling (linear, llama3) already applied.
    pub frequencies: Vec<f32>,
    /// Multiplies sine and cosine (1 but for YaRN-like scalings).
    pub attention_factor: f32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

impl ModelConfig {
    /// Numbers of all query heads together: the rows of `q_proj`.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Numbers of all key (or value) heads together: the rows of `k_proj` and `v_proj`.
    pub fn key_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// What must hold between the numbers, whichever file they came from; their single ranges are
    /// checked where they are read.
    pub(crate) fn check(&self, path: &Path) -> Result<(), ModelError> {
        let wrong = |field: &str, problem: String| Err(ModelError::config(path, field, problem));
        if !self.heads.is_multiple_of(self.kv_heads) {
            return wrong(
                "attention heads",
                format!(
                    "{} query heads cannot share {} key heads evenly",
                    self.heads, self.kv_heads
                ),
            );
        }
        if !self.head_dim.is_multiple_of(2) {
            return wrong(
                "head dimension",
                format!("{} is odd; rotary embedding needs pairs", self.head_dim),
            );
        }
        if !(self.rms_norm_eps >= 0.0 && self.rms_norm_eps.is_finite()) {
            return wrong(
                "RMS norm epsilon",
                format!("{} is not a small positive number", self.rms_norm_eps),
            );
        }
        if !(self.attention_scale > 0.0 && self.attention_scale.is_finite()) {
            return wrong(
                "attention scale",
                format!("{} is not a positive number", self.attention_scale),
            );
        }
        for cap in [self.attention_softcap, self.logit_softcap]
            .into_iter()
            .flatten()
        {
            if !(cap > 0.0 && cap.is_finite()) {
                return wrong("softcap", format!("{cap} is not a positive number"));
            }
        }
        Ok(())
    }
}
