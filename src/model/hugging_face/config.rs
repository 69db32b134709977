//! `config.json` and `generation_config.json`, with the defaults of transformers 5.23 for every
//! field that a file leaves out (`configuration_*.py` of each family).

use super::fields::Fields;
use super::rope;
use crate::model::config::{
    Activation, AttentionConfig, MAX_CONTEXT, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_VOCABULARY,
    MAX_WIDTH, ModelConfig,
};
use crate::model::error::ModelError;
use crate::model::layout::TensorLayout;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma2,
    Gemma3,
}

const SUPPORTED: &str = "llama, mistral, qwen2, qwen3, gemma2 and gemma3_text";

/// What a family takes for a field that its `config.json` leaves out.
struct Defaults {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    layers: usize,
    heads: usize,
    /// `None`: as many as there are query heads.
    kv_heads: Option<usize>,
    /// `None`: hidden_size / heads.
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    tie_word_embeddings: bool,
}

impl Family {
    fn of(model_type: &str) -> Option<Self> {
        Some(match model_type {
            "llama" => Family::Llama,
            "mistral" => Family::Mistral,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            "gemma2" => Family::Gemma2,
            "gemma3_text" => Family::Gemma3,
            _ => return None,
        })
    }

    fn is_gemma(self) -> bool {
        matches!(self, Family::Gemma2 | Family::Gemma3)
    }

    fn defaults(self) -> Defaults {
        let llama = Defaults {
            vocab_size: 32_000,
            hidden_size: 4096,
            intermediate_size: 11_008,
            layers: 32,
            heads: 32,
            kv_heads: None,
            head_dim: None,
            max_position_embeddings: 2048,
            tie_word_embeddings: false,
        };
        let gemma2 = Defaults {
            vocab_size: 256_000,
            hidden_size: 2304,
            intermediate_size: 9216,
            layers: 26,
            heads: 8,
            kv_heads: Some(4),
            head_dim: Some(256),
            max_position_embeddings: 8192,
            tie_word_embeddings: true,
        };
        match self {
            Family::Llama => llama,
            Family::Mistral => Defaults {
                intermediate_size: 14_336,
                kv_heads: Some(8),
                max_position_embeddings: 131_072,
                ..llama
            },
            Family::Qwen2 | Family::Qwen3 => Defaults {
                vocab_size: 151_936,
                intermediate_size: 22_016,
                kv_heads: Some(32),
                head_dim: (self == Family::Qwen3).then_some(128),
                max_position_embeddings: 32_768,
                ..llama
            },
            Family::Gemma2 => gemma2,
            Family::Gemma3 => Defaults {
                vocab_size: 262_208,
                max_position_embeddings: 131_072,
                ..gemma2
            },
        }
    }
}

/// Reads a configuration; `generation` is `generation_config.json`, where there is one.
pub(crate) fn parse(
    config: &Fields,
    generation: Option<&Fields>,
) -> Result<(ModelConfig, TensorLayout), ModelError> {
    let architecture = config.string("model_type")?.ok_or_else(|| {
        config.wrong(
            "model_type",
            "missing; it says which architecture the model has",
        )
    })?;
    let family = Family::of(architecture).ok_or_else(|| ModelError::UnknownArchitecture {
        path: config.path.to_path_buf(),
        architecture: architecture.to_string(),
        supported: SUPPORTED,
    })?;
    refuse_unreadable_weights(config)?;

    let defaults = family.defaults();
    let size = |key: &str, max, default| Ok(config.size(key, max)?.unwrap_or(default));
    let hidden_size = size("hidden_size", MAX_WIDTH, defaults.hidden_size)?;
    let layers = size("num_hidden_layers", MAX_LAYERS, defaults.layers)?;
    let heads = size("num_attention_heads", MAX_HEADS, defaults.heads)?;
    // An explicit null means "as many as query heads" whatever the family's default is.
    let kv_heads = match config.size("num_key_value_heads", MAX_HEADS)? {
        Some(kv_heads) => kv_heads,
        None if config.is_null("num_key_value_heads") => heads,
        None => defaults.kv_heads.unwrap_or(heads),
    };
    let head_dim = match config.size("head_dim", MAX_HEAD_DIM)? {
        Some(head_dim) => head_dim,
        None => match defaults.head_dim {
            Some(head_dim) if !config.is_null("head_dim") => head_dim,
            _ => hidden_size / heads,
        },
    };
    if head_dim == 0 {
        return Err(config.wrong(
            "num_attention_heads",
            format!("{heads} heads cannot share a hidden size of {hidden_size}"),
        ));
    }
    let max_position_embeddings = size(
        "max_position_embeddings",
        MAX_CONTEXT,
        defaults.max_position_embeddings,
    )?;

    let ropes = match family {
        Family::Gemma3 => rope::gemma3(config, head_dim, max_position_embeddings)?,
        _ => rope::uniform(config, head_dim, max_position_embeddings)?,
    };
    let attention = windows(config, family, layers)?
        .into_iter()
        .map(|window| AttentionConfig {
            rope: match window {
                Some(_) => ropes.sliding.clone(),
                None => ropes.full.clone(),
            },
            window,
        })
        .collect();

    let gemma2_softcap = (family == Family::Gemma2).then_some(());
    let softcap = |key: &str, default: f64| -> Result<Option<f32>, ModelError> {
        // An explicit null switches the cap off; Gemma 3 has none unless it asks for one.
        let default = gemma2_softcap
            .filter(|()| !config.is_null(key))
            .map(|()| default);
        Ok(config.positive(key)?.or(default).map(|cap| cap as f32))
    };
    let (attention_softcap, logit_softcap) = if family.is_gemma() {
        (
            softcap("attn_logit_softcapping", 50.0)?,
            softcap("final_logit_softcapping", 30.0)?,
        )
    } else {
        (None, None)
    };
    let scale_of = match family.is_gemma() {
        true => config.positive("query_pre_attn_scalar")?.unwrap_or(256.0),
        false => head_dim as f64,
    };
    if config.flag("use_bidirectional_attention")? == Some(true) {
        return Err(config.wrong(
            "use_bidirectional_attention",
            "this is a model for embedding texts, not for writing them",
        ));
    }

    let attention_bias = match family {
        Family::Qwen2 | Family::Mistral => false,
        _ => config.flag("attention_bias")?.unwrap_or(false),
    };
    let layout = TensorLayout {
        qkv_bias: attention_bias || family == Family::Qwen2,
        output_bias: attention_bias,
        mlp_bias: family == Family::Llama && config.flag("mlp_bias")?.unwrap_or(false),
        qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
        sandwich_norms: family.is_gemma(),
    };
    let parsed = ModelConfig {
        architecture: architecture.to_string(),
        hidden_size,
        intermediate_size: size("intermediate_size", MAX_WIDTH, defaults.intermediate_size)?,
        vocab_size: size("vocab_size", MAX_VOCABULARY, defaults.vocab_size)?,
        layers,
        heads,
        kv_heads,
        head_dim,
        max_position_embeddings,
        rms_norm_eps: config.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        tie_word_embeddings: config
            .flag("tie_word_embeddings")?
            .unwrap_or(defaults.tie_word_embeddings),
        attention,
        activation: activation(config, family)?,
        attention_scale: (1.0 / scale_of.sqrt()) as f32,
        attention_softcap,
        logit_softcap,
        embedding_scale: match family.is_gemma() {
            true => (hidden_size as f64).sqrt() as f32,
            false => 1.0,
        },
        norm_weight_plus_one: family.is_gemma(),
        eos_token_ids: eos_token_ids(config, generation)?,
    };
    parsed.check(config.path)?;
    Ok((parsed, layout))
}

fn refuse_unreadable_weights(config: &Fields) -> Result<(), ModelError> {
    if let Some(quantization) = config.object("quantization_config")? {
        let method = quantization.string("quant_method")?.unwrap_or("unnamed");
        return Err(config.wrong(
            "quantization_config",
            format!("weights quantised by {method} are not supported; take the unquantised model or a GGUF file"),
        ));
    }
    // Where the stored weights are of another of these types, what is stored is used.
    for key in ["dtype", "torch_dtype"] {
        if let Some(dtype) = config.string(key)?
            && !["float32", "float16", "bfloat16", "auto"]
                .contains(&dtype.trim_start_matches("torch."))
        {
            return Err(config.wrong(
                key,
                format!("{dtype:?} is not supported; supported are float32, float16 and bfloat16"),
            ));
        }
    }
    Ok(())
}

/// The sliding window of each layer.
fn windows(
    config: &Fields,
    family: Family,
    layers: usize,
) -> Result<Vec<Option<usize>>, ModelError> {
    if family == Family::Llama {
        return Ok(vec![None; layers]);
    }
    let window = match config.size("sliding_window", MAX_CONTEXT)? {
        Some(window) => Some(window),
        None if config.is_null("sliding_window") => None,
        None => Some(4096),
    };
    if family == Family::Mistral {
        return Ok(vec![window; layers]);
    }
    let is_qwen = matches!(family, Family::Qwen2 | Family::Qwen3);
    let window = match is_qwen && !config.flag("use_sliding_window")?.unwrap_or(false) {
        true => None,
        false => window,
    };
    if let Some(types) = config.strings("layer_types")? {
        if types.len() != layers {
            return Err(config.wrong(
                "layer_types",
                format!("{} entries for {layers} layers", types.len()),
            ));
        }
        return types
            .into_iter()
            .map(|layer_type| match layer_type {
                "full_attention" => Ok(None),
                "sliding_attention" if window.is_some() => Ok(window),
                "sliding_attention" => Err(config.wrong(
                    "layer_types",
                    "asks for sliding_attention, but no sliding window is given",
                )),
                other => Err(config.wrong("layer_types", format!("{other:?} is not a known type"))),
            })
            .collect();
    }
    let slides: Box<dyn Fn(usize) -> bool> = match family {
        Family::Gemma2 => Box::new(|layer| layer % 2 == 0),
        Family::Gemma3 => {
            let pattern = config
                .size("sliding_window_pattern", MAX_LAYERS)?
                .unwrap_or(6);
            Box::new(move |layer| (layer + 1) % pattern != 0)
        }
        _ => {
            let first = config.get("max_window_layers").map_or(Ok(28), |value| {
                value
                    .as_u64()
                    .ok_or_else(|| config.wrong("max_window_layers", "is not a whole number"))
            })?;
            Box::new(move |layer| layer as u64 >= first)
        }
    };
    Ok((0..layers)
        .map(|layer| window.filter(|_| slides(layer)))
        .collect())
}

fn activation(config: &Fields, family: Family) -> Result<Activation, ModelError> {
    let (key, default) = match family.is_gemma() {
        true => ("hidden_activation", "gelu_pytorch_tanh"),
        false => ("hidden_act", "silu"),
    };
    match config.string(key)?.unwrap_or(default) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        other => Err(config.wrong(
            key,
            format!("{other:?} is not supported; supported are silu and gelu_pytorch_tanh"),
        )),
    }
}

fn eos_token_ids(config: &Fields, generation: Option<&Fields>) -> Result<Vec<u32>, ModelError> {
    if let Some(generation) = generation {
        let ids = generation.token_ids("eos_token_id")?;
        if !ids.is_empty() {
            return Ok(ids);
        }
    }
    config.token_ids("eos_token_id")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;

    /// Written by `tests/reference/configs.py`.
    const GOLDEN: &str = include_str!("../../../tests/golden/configs.json");

    fn parse_value(config: &Value) -> Result<(ModelConfig, TensorLayout), ModelError> {
        let object = config.as_object().unwrap();
        parse(&Fields::new(Path::new("config.json"), object), None)
    }

    fn floats(value: &Value) -> Vec<f32> {
        let items = value.as_array().unwrap();
        items.iter().map(|x| x.as_f64().unwrap() as f32).collect()
    }

    #[test]
    fn every_configuration_means_what_transformers_takes_it_to_mean() {
        let cases: Vec<Value> = serde_json::from_str(GOLDEN).unwrap();
        assert!(cases.len() > 20);
        for case in &cases {
            let name = case["name"].as_str().unwrap();
            let (config, layout) = parse_value(&case["config"]).unwrap();
            let expected = &case["expected"];
            for (field, size) in [
                ("hidden_size", config.hidden_size),
                ("intermediate_size", config.intermediate_size),
                ("vocab_size", config.vocab_size),
                ("layers", config.layers),
                ("heads", config.heads),
                ("kv_heads", config.kv_heads),
                ("head_dim", config.head_dim),
                ("max_position_embeddings", config.max_position_embeddings),
            ] {
                assert_eq!(expected[field], size, "{name}: {field}");
            }
            for (field, flag) in [
                ("tie_word_embeddings", config.tie_word_embeddings),
                ("norm_weight_plus_one", config.norm_weight_plus_one),
                ("gelu", config.activation == Activation::GeluTanh),
            ] {
                assert_eq!(expected[field], flag, "{name}: {field}");
            }
            for (field, number) in [
                ("rms_norm_eps", Some(config.rms_norm_eps)),
                ("attention_scale", Some(config.attention_scale)),
                ("embedding_scale", Some(config.embedding_scale)),
                ("attention_softcap", config.attention_softcap),
                ("logit_softcap", config.logit_softcap),
            ] {
                let expected = expected[field].as_f64().map(|x| x as f32);
                assert_eq!(expected, number, "{name}: {field}");
            }
            let windows: Vec<_> = config.attention.iter().map(|layer| layer.window).collect();
            assert_eq!(expected["windows"], json!(windows), "{name}");

            // The cases of all defaults state no more than that.
            let Some(tensors) = expected["tensors"].as_object() else {
                continue;
            };
            let mut names = Vec::new();
            for tensor in layout.tensors(&config) {
                assert_eq!(
                    tensors[&tensor.name],
                    json!(tensor.shape),
                    "{name}: {}",
                    tensor.name
                );
                names.push(tensor.name);
            }
            names.sort();
            let mut expected_names: Vec<_> = tensors.keys().cloned().collect();
            expected_names.sort();
            assert_eq!(names, expected_names, "{name}");
            for (layer, expected) in config
                .attention
                .iter()
                .zip(expected["attention"].as_array().unwrap())
            {
                same_rope(name, &layer.rope, expected);
            }
        }
    }

    /// Two units in the last place: torch's float32 power may be off by one, and what is computed
    /// from it by one more. Where scaling interpolates between two frequencies, which cancels no
    /// digits, the same holds.
    fn same_rope(name: &str, rope: &crate::model::config::Rope, expected: &Value) {
        let frequencies = floats(&expected["frequencies"]);
        assert_eq!(rope.frequencies.len(), frequencies.len(), "{name}");
        for (i, (ours, theirs)) in rope.frequencies.iter().zip(&frequencies).enumerate() {
            let ulps = ours.to_bits().abs_diff(theirs.to_bits());
            assert!(
                ulps <= 2,
                "{name}, pair {i}: {ours:e}, reference {theirs:e}"
            );
        }
        let factor = expected["attention_factor"].as_f64().unwrap() as f32;
        assert_eq!(rope.attention_factor, factor, "{name}");
    }

    #[test]
    fn eos_tokens_come_from_the_generation_config_first() {
        let ids = |config: Value, generation: Option<Value>| {
            let mut config = config;
            config["model_type"] = json!("llama");
            let generation = generation.map(|value| value.as_object().unwrap().clone());
            let path = Path::new("x.json");
            let generation = generation.as_ref().map(|object| Fields::new(path, object));
            let fields = Fields::new(path, config.as_object().unwrap());
            parse(&fields, generation.as_ref()).map(|(config, _)| config.eos_token_ids)
        };
        let one = || json!({"eos_token_id": 7});
        assert_eq!(ids(one(), None).unwrap(), [7]);
        assert_eq!(
            ids(one(), Some(json!({"eos_token_id": [5, 6]}))).unwrap(),
            [5, 6]
        );
        assert_eq!(
            ids(one(), Some(json!({"eos_token_id": null}))).unwrap(),
            [7]
        );
        assert!(ids(json!({}), None).unwrap().is_empty());
        assert!(ids(json!({"eos_token_id": -1}), None).is_err());
    }

    #[test]
    fn what_is_not_understood_is_refused_in_one_line_that_names_the_field() {
        for (changes, named) in [
            (json!({"model_type": "mamba"}), "mamba"),
            (json!({"model_type": null}), "model_type"),
            (json!({"model_type": 3}), "model_type"),
            (json!({"hidden_size": -1}), "hidden_size"),
            (json!({"hidden_size": 1.5}), "hidden_size"),
            (
                json!({"num_hidden_layers": 1_000_000_000_000_u64}),
                "num_hidden_layers",
            ),
            (json!({"num_hidden_layers": 0}), "num_hidden_layers"),
            (json!({"vocab_size": "many"}), "vocab_size"),
            (
                json!({"num_attention_heads": 6, "num_key_value_heads": 4}),
                "heads",
            ),
            (json!({"head_dim": 7}), "odd"),
            (
                json!({"hidden_size": 2, "num_attention_heads": 3, "num_key_value_heads": 3}),
                "num_attention_heads",
            ),
            (json!({"rms_norm_eps": -0.5}), "epsilon"),
            (json!({"rms_norm_eps": "1e-5"}), "rms_norm_eps"),
            (json!({"rope_theta": 0}), "rope_theta"),
            (json!({"rope_theta": -1e4}), "rope_theta"),
            (
                json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
                "dynamic",
            ),
            (
                json!({"rope_scaling": {"rope_type": "linear"}}),
                "rope_scaling.factor",
            ),
            (
                json!({"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}}),
                "rope_parameters.high_freq_factor",
            ),
            (json!({"rope_scaling": "linear"}), "rope_scaling"),
            (
                json!({"partial_rotary_factor": 0.5}),
                "partial_rotary_factor",
            ),
            (json!({"hidden_act": "relu"}), "hidden_act"),
            (json!({"torch_dtype": "int8"}), "int8"),
            (
                json!({"quantization_config": {"quant_method": "gptq"}}),
                "gptq",
            ),
            (
                json!({"model_type": "qwen2", "layer_types": ["full_attention"]}),
                "layer_types",
            ),
            (
                json!({"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]}),
                "layer_types",
            ),
            (
                json!({"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["mamba"]}),
                "layer_types",
            ),
            (
                json!({"model_type": "gemma3_text", "rope_parameters": {"rope_type": "default"}}),
                "rope_parameters",
            ),
            (
                json!({"model_type": "gemma2", "query_pre_attn_scalar": 0}),
                "query_pre_attn_scalar",
            ),
        ] {
            let mut config = json!({"model_type": "llama"});
            for (key, value) in changes.as_object().unwrap() {
                config[key] = value.clone();
            }
            let message = parse_value(&config).unwrap_err().to_string();
            assert!(message.contains(named), "{changes}: {message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }
}
