//! Which tensors a model has, under their canonical names, and their shapes.

use super::config::ModelConfig;

/// What a family has beside the tensors that all share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TensorLayout {
    /// Biases of `q_proj`, `k_proj` and `v_proj`.
    pub qkv_bias: bool,
    /// Bias of `o_proj`.
    pub output_bias: bool,
    /// Biases of `gate_proj`, `up_proj` and `down_proj`.
    pub mlp_bias: bool,
    /// RMSNorm of every query and key head (Qwen 3, Gemma 3).
    pub qk_norm: bool,
    /// Norms on what attention and feed-forward return, too (Gemma 2 and 3):
    /// `post_attention_layernorm` is then the one on attention's output, and
    /// `pre_feedforward_layernorm` takes its usual place.
    pub sandwich_norms: bool,
}

/// A tensor that the model must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExpectedTensor {
    /// As Hugging Face files call it.
    pub name: String,
    pub shape: Vec<usize>,
}

impl TensorLayout {
    /// Every tensor that the model must have.
    pub fn tensors(&self, config: &ModelConfig) -> Vec<ExpectedTensor> {
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize]| {
            tensors.push(ExpectedTensor {
                name,
                shape: shape.to_vec(),
            });
        };
        let hidden = config.hidden_size;
        add(
            "model.embed_tokens.weight".into(),
            &[config.vocab_size, hidden],
        );
        for layer in 0..config.layers {
            let prefix = format!("model.layers.{layer}");
            let (query, key) = (config.query_width(), config.key_width());
            let inner = config.intermediate_size;
            for (module, rows, columns, bias) in [
                ("self_attn.q_proj", query, hidden, self.qkv_bias),
                ("self_attn.k_proj", key, hidden, self.qkv_bias),
                ("self_attn.v_proj", key, hidden, self.qkv_bias),
                ("self_attn.o_proj", hidden, query, self.output_bias),
                ("mlp.gate_proj", inner, hidden, self.mlp_bias),
                ("mlp.up_proj", inner, hidden, self.mlp_bias),
                ("mlp.down_proj", hidden, inner, self.mlp_bias),
            ] {
                add(format!("{prefix}.{module}.weight"), &[rows, columns]);
                if bias {
                    add(format!("{prefix}.{module}.bias"), &[rows]);
                }
            }
            for (module, len, present) in [
                ("input_layernorm", hidden, true),
                ("post_attention_layernorm", hidden, true),
                ("pre_feedforward_layernorm", hidden, self.sandwich_norms),
                ("post_feedforward_layernorm", hidden, self.sandwich_norms),
                ("self_attn.q_norm", config.head_dim, self.qk_norm),
                ("self_attn.k_norm", config.head_dim, self.qk_norm),
            ] {
                if present {
                    add(format!("{prefix}.{module}.weight"), &[len]);
                }
            }
        }
        add("model.norm.weight".into(), &[hidden]);
        if !config.tie_word_embeddings {
            add("lm_head.weight".into(), &[config.vocab_size, hidden]);
        }
        tensors
    }
}
