//! A tiny model that chats, made on the spot: random weights of the llama family, the byte-level
//! tokenizer of `tests/golden/text`, a chat template. What it says means nothing; everything else is
//! as in a real model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use podium::backend::random::uniform;
use podium::model::files::ModelFiles;
use podium::ranker::{
    ExtraInput, FeaturePosition, Normalization, Ranker, RankerConfig, RankerKind, RankerTensor,
    Relevance,
};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;
use tempfile::TempDir;

pub const LAYERS: usize = 4;
pub const HIDDEN_SIZE: usize = 32;
pub const VOCAB_SIZE: usize = 701;
pub const CONTEXT: usize = 256;

const TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}<{{ message.role }}>\
     {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

pub struct ChatModel {
    folder: TempDir,
}

impl ChatModel {
    /// The weights depend on the seed.
    pub fn new(seed: u64) -> ChatModel {
        ChatModel::with_context(seed, CONTEXT)
    }

    pub fn with_context(seed: u64, context: usize) -> ChatModel {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, value: serde_json::Value| {
            std::fs::write(folder.path().join(name), value.to_string()).unwrap();
        };
        write(
            "config.json",
            json!({
                "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN_SIZE,
                "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
                "num_key_value_heads": 2, "max_position_embeddings": context, "rms_norm_eps": 1e-5,
                "tie_word_embeddings": true,
            }),
        );
        write(
            "generation_config.json",
            json!({"eos_token_id": [1, 2], "temperature": 0.9}),
        );
        write(
            "tokenizer_config.json",
            json!({
                "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
                "chat_template": TEMPLATE,
            }),
        );
        // Where cargo says, or whoever runs the tests without it.
        let root = std::env::var_os("CARGO_MANIFEST_DIR")
            .unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let tokenizer = Path::new(&root).join("tests/golden/text/byte_level/tokenizer.json");
        std::fs::copy(tokenizer, folder.path().join("tokenizer.json")).unwrap();
        write_weights(seed, &folder.path().join("model.safetensors"));
        ChatModel { folder }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a random ranker for this model into its folder.
    pub fn ranker(&self, name: &str, extra_inputs: &[ExtraInput]) -> PathBuf {
        let files = ModelFiles::open(self.path()).unwrap();
        let config = RankerConfig {
            format_version: 1,
            name: name.to_string(),
            task: None,
            kind: RankerKind::Listwise,
            hidden_size: HIDDEN_SIZE,
            projection_width: Some(16),
            heads: Some(2),
            feed_forward_width: Some(32),
            relevance: Some(Relevance::Dot),
            layer: 2,
            layers: LAYERS,
            feature_position: FeaturePosition::LastToken,
            normalization: Normalization::Rms,
            extra_inputs: extra_inputs.to_vec(),
            model_name: files.name().to_string(),
            model_fingerprint: files.fingerprint(),
            training: Default::default(),
            metrics: Default::default(),
        };
        let tensor = |(name, shape): (&str, Vec<usize>)| {
            let mut data = random(3, name.len() as u32, shape.iter().product(), 1.0);
            if name.ends_with(".scale") {
                data.iter_mut().for_each(|scale| *scale = scale.abs() + 0.1);
            }
            (name.to_string(), RankerTensor { shape, data })
        };
        let tensors = config.tensor_shapes().into_iter().map(tensor).collect();
        let path = self.path().join(format!("{name}.ranker"));
        Ranker::new(config, tensors).unwrap().save(&path).unwrap();
        path
    }
}

fn random(seed: u64, stream: u32, count: usize, width: f32) -> Vec<f32> {
    let number = |i| (uniform(seed, stream, i as u32) - 0.5) * width;
    (0..count).map(number).collect()
}

fn write_weights(seed: u64, path: &Path) {
    let mut shapes = BTreeMap::from([
        (
            "model.embed_tokens".to_string(),
            vec![VOCAB_SIZE, HIDDEN_SIZE],
        ),
        ("model.norm".to_string(), vec![HIDDEN_SIZE]),
    ]);
    for layer in 0..LAYERS {
        for (module, shape) in [
            ("self_attn.q_proj", vec![32, 32]),
            ("self_attn.k_proj", vec![16, 32]),
            ("self_attn.v_proj", vec![16, 32]),
            ("self_attn.o_proj", vec![32, 32]),
            ("mlp.gate_proj", vec![48, 32]),
            ("mlp.up_proj", vec![48, 32]),
            ("mlp.down_proj", vec![32, 48]),
            ("input_layernorm", vec![32]),
            ("post_attention_layernorm", vec![32]),
        ] {
            shapes.insert(format!("model.layers.{layer}.{module}"), shape);
        }
    }
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .enumerate()
        .map(|(stream, (name, shape))| {
            let numbers = random(seed, stream as u32, shape.iter().product(), 1.0);
            // Norms around 1, so that activations stay in range.
            let shift = if name.ends_with("norm") { 1.0 } else { 0.0 };
            let bytes = numbers
                .iter()
                .flat_map(|x| (x + shift).to_le_bytes())
                .collect();
            (format!("{name}.weight"), shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (
            name,
            TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap(),
        )
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}
