//! Reads `golden.safetensors`: what transformers computed (`tests/reference/golden.py` says what is in it).

use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::path::PathBuf;

/// The repository, where cargo says, or whoever runs the tests without it.
fn root() -> PathBuf {
    let root = std::env::var_os("CARGO_MANIFEST_DIR");
    root.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// The folder of a model and its golden.
pub fn folder(name: &str) -> PathBuf {
    root().join("tests/golden/models").join(name)
}

pub struct Golden {
    pub prompt: Reference,
    pub candidates: Vec<Reference>,
    /// The most probable continuation of the prompt.
    pub greedy: Vec<u32>,
    /// A prompt of one token, and a candidate behind it.
    pub single: Option<(Reference, Reference)>,
    /// A prompt that fills the context.
    pub full: Option<Reference>,
    /// Layers whose states are kept, counted from 1.
    pub layers: Vec<usize>,
}

/// A sequence of tokens and what the model makes of it.
pub struct Reference {
    /// Where it stands in the file.
    pub name: String,
    pub tokens: Vec<u32>,
    /// Behind its last token; `None` where the golden does not have them.
    pub logits: Option<Vec<f32>>,
    /// State of its last token after each of `Golden::layers`.
    pub features: Vec<Vec<f32>>,
    /// Of each of its tokens; `None` of a prompt.
    pub logprobs: Option<Vec<f32>>,
}

impl Golden {
    pub fn read(name: &str) -> Golden {
        let path = folder(name).join("golden.safetensors");
        let bytes =
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (mut ids, mut numbers) = (HashMap::new(), HashMap::new());
        for (name, tensor) in file.tensors() {
            let words = tensor
                .data()
                .chunks_exact(4)
                .map(|word| <[u8; 4]>::try_from(word).unwrap());
            match tensor.dtype() {
                Dtype::U32 => {
                    drop(ids.insert(name, words.map(u32::from_le_bytes).collect::<Vec<u32>>()))
                }
                Dtype::F32 => drop(numbers.insert(name, words.map(f32::from_le_bytes).collect())),
                other => panic!("{}: {name} is {other:?}", path.display()),
            }
        }
        let layers: Vec<usize> = ids["layers"].iter().map(|&layer| layer as usize).collect();
        let mut take = |name: String| {
            let tokens = ids.remove(&format!("{name}.input_ids"))?;
            let features: Vec<f32> = numbers.remove(&format!("{name}.features")).unwrap();
            Some(Reference {
                tokens,
                logits: numbers.remove(&format!("{name}.logits")),
                features: features
                    .chunks_exact(features.len() / layers.len())
                    .map(<[f32]>::to_vec)
                    .collect(),
                logprobs: numbers.remove(&format!("{name}.logprobs")),
                name,
            })
        };
        let golden = Golden {
            prompt: take("prompt".into()).unwrap(),
            candidates: (0..)
                .map_while(|index| take(format!("candidate.{index}")))
                .collect(),
            single: take("single".into()).zip(take("single.candidate".into())),
            full: take("full".into()),
            greedy: ids.remove("greedy.input_ids").unwrap(),
            layers,
        };
        assert!(!golden.candidates.is_empty());
        assert!(numbers.is_empty(), "nobody compares {:?}", numbers.keys());
        golden
    }
}
