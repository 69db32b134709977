//! Models of known sizes, their weights made up on the device.

use crate::backend::cuda::device::Buffer;
use crate::backend::cuda::matmul::gated_rows;
use crate::backend::cuda::weights::Form;
use crate::backend::cuda::{Cuda, Matrix};
use crate::backend::{Backend, BackendError};
use crate::model::config::{Activation, AttentionConfig, ModelConfig, Rope};
use crate::model::forward::{LoadError, Model, WeightSource};

/// A model's sizes.
pub struct Shape {
    pub name: &'static str,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub vocab_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    tied: bool,
    /// Query, key and value have biases.
    biases: bool,
}

pub const SHAPES: [Shape; 4] = [
    Shape {
        name: "llama-3.1-8b",
        hidden_size: 4096,
        intermediate_size: 14336,
        vocab_size: 128_256,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        tied: false,
        biases: false,
    },
    Shape {
        name: "qwen2.5-7b",
        hidden_size: 3584,
        intermediate_size: 18944,
        vocab_size: 152_064,
        layers: 28,
        heads: 28,
        kv_heads: 4,
        head_dim: 128,
        tied: false,
        biases: true,
    },
    Shape {
        name: "smollm2-135m",
        hidden_size: 576,
        intermediate_size: 1536,
        vocab_size: 49_152,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        tied: true,
        biases: false,
    },
    Shape {
        name: "tiny",
        hidden_size: 128,
        intermediate_size: 256,
        vocab_size: 512,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        tied: false,
        biases: true,
    },
];

impl Shape {
    /// The model on a backend's device.
    pub fn model(&self, backend: Cuda, form: Form) -> Result<Model<Cuda>, LoadError> {
        let source = MadeUp {
            shape: self,
            form,
            seed: 1,
        };
        let name = self.name.to_string();
        Model::assemble(backend, self.config(), name, String::new(), source)
    }

    fn config(&self) -> ModelConfig {
        let frequency = |pair: usize| 500_000f32.powf(-(2.0 * pair as f32) / self.head_dim as f32);
        let attention = AttentionConfig {
            window: None,
            rope: Rope {
                frequencies: (0..self.head_dim / 2).map(frequency).collect(),
                attention_factor: 1.0,
            },
        };
        ModelConfig {
            architecture: "llama".to_string(),
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            vocab_size: self.vocab_size,
            layers: self.layers,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            max_position_embeddings: 8192,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: self.tied,
            attention: vec![attention; self.layers],
            activation: Activation::Silu,
            attention_scale: (self.head_dim as f32).sqrt().recip(),
            attention_softcap: None,
            logit_softcap: None,
            embedding_scale: 1.0,
            norm_weight_plus_one: false,
            eos_token_ids: Vec::new(),
        }
    }

    /// Outputs and inputs of a tensor.
    fn size(&self, name: &str) -> (usize, usize) {
        let (hidden, query) = (self.hidden_size, self.heads * self.head_dim);
        let part = name.trim_end_matches(".weight").trim_end_matches(".bias");
        match part.rsplit('.').next().unwrap_or(part) {
            "embed_tokens" | "lm_head" => (self.vocab_size, hidden),
            "q_proj" => (query, hidden),
            "k_proj" | "v_proj" => (self.kv_heads * self.head_dim, hidden),
            "o_proj" => (hidden, query),
            "gate_proj" | "up_proj" => (self.intermediate_size, hidden),
            "down_proj" => (hidden, self.intermediate_size),
            _ => (hidden, 1),
        }
    }
}

/// Weights of a shape, made up on the device.
struct MadeUp<'a> {
    shape: &'a Shape,
    form: Form,
    seed: u32,
}

impl MadeUp<'_> {
    fn random(
        &mut self,
        backend: &Cuda,
        outputs: (usize, usize),
        inputs: usize,
    ) -> Result<Matrix, LoadError> {
        self.seed = self.seed.wrapping_add(0x9E37_79B9);
        let (out_features, width) = outputs;
        let size = (out_features, inputs);
        let matrix = Matrix::random(backend.device(), self.form, size, width, self.seed);
        let matrix = matrix.and_then(|matrix| backend.prepared(matrix));
        Ok(matrix.map_err(BackendError::from)?)
    }
}

impl WeightSource<Cuda> for MadeUp<'_> {
    fn has(&self, _: &str) -> Result<bool, LoadError> {
        Ok(false)
    }

    fn matrix(&mut self, backend: &Cuda, names: &[String]) -> Result<Matrix, LoadError> {
        let outputs = names.iter().map(|name| self.shape.size(name).0).sum();
        self.random(backend, (outputs, outputs), self.shape.size(&names[0]).1)
    }

    fn gated_matrix(&mut self, backend: &Cuda, gate: &str, _: &str) -> Result<Matrix, LoadError> {
        let (width, inputs) = self.shape.size(gate);
        self.random(backend, (gated_rows(width), width), inputs)
    }

    fn norm(&mut self, backend: &Cuda, name: &str) -> Result<Buffer<f32>, LoadError> {
        Ok(backend.vector(&vec![1.0; self.shape.size(name).0])?)
    }

    fn bias(&mut self, backend: &Cuda, names: &[String]) -> Result<Option<Buffer<f32>>, LoadError> {
        if !self.shape.biases || !names[0].contains("q_proj") {
            return Ok(None);
        }
        let outputs = names.iter().map(|name| self.shape.size(name).0).sum();
        Ok(Some(backend.vector(&vec![0.01; outputs])?))
    }
}
