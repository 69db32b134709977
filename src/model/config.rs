//! What a model is: the numbers that the forward pass needs, whichever file they came from.

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
