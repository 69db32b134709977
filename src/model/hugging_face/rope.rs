//! Rotary parameters of `config.json`, as transformers 4 (`rope_theta` and `rope_scaling`) and 5
//! (`rope_parameters`, flat or nested by layer type) write them.

use super::fields::Fields;
use crate::model::config::Rope;
use crate::model::error::ModelError;
use crate::model::rope::{RopeScaling, rope};

/// What transformers takes where no theta is given.
const DEFAULT_THETA: f64 = 10_000.0;
const GEMMA3_GLOBAL_THETA: f64 = 1_000_000.0;

/// Rotary embedding of the layers that see everything and of those with a sliding window.
pub(crate) struct LayerRopes {
    pub full: Rope,
    pub sliding: Rope,
}

/// Families whose layers all rotate alike.
pub(crate) fn uniform(
    config: &Fields,
    head_dim: usize,
    max_position_embeddings: usize,
) -> Result<LayerRopes, ModelError> {
    let parameters = match config.object("rope_scaling")? {
        // transformers gives the older name precedence unless it is empty.
        Some(scaling) if !scaling.is_empty() => Some(scaling),
        _ => config.object("rope_parameters")?,
    };
    let theta = config.positive("rope_theta")?.unwrap_or(DEFAULT_THETA);
    let build = |parameters: Option<Fields>| {
        build(config, parameters, theta, head_dim, max_position_embeddings)
    };
    if let Some(nested) = parameters
        && let Some(full) = nested.object("full_attention")?
    {
        let sliding = nested.object("sliding_attention")?.unwrap_or(full);
        return Ok(LayerRopes {
            full: build(Some(full))?,
            sliding: build(Some(sliding))?,
        });
    }
    let full = build(parameters)?;
    Ok(LayerRopes {
        sliding: full.clone(),
        full,
    })
}

/// Gemma 3: layers with a window rotate with a base of their own, which is never scaled.
pub(crate) fn gemma3(
    config: &Fields,
    head_dim: usize,
    max_position_embeddings: usize,
) -> Result<LayerRopes, ModelError> {
    let global_theta = config
        .positive("rope_theta")?
        .unwrap_or(GEMMA3_GLOBAL_THETA);
    let local_theta = config
        .positive("rope_local_base_freq")?
        .unwrap_or(DEFAULT_THETA);
    let (mut full, mut sliding) = (None, None);
    if let Some(nested) = config.object("rope_parameters")? {
        full = nested.object("full_attention")?;
        sliding = nested.object("sliding_attention")?;
        if full.is_none() && sliding.is_none() && !nested.is_empty() {
            return Err(config.wrong(
                "rope_parameters",
                "Gemma 3 needs them by layer type (full_attention, sliding_attention)",
            ));
        }
    }
    if let Some(scaling) = config.object("rope_scaling")? {
        full = Some(scaling);
    }
    let build =
        |parameters, theta| build(config, parameters, theta, head_dim, max_position_embeddings);
    Ok(LayerRopes {
        full: build(full, global_theta)?,
        sliding: build(sliding, local_theta)?,
    })
}

fn build(
    config: &Fields,
    parameters: Option<Fields>,
    default_theta: f64,
    head_dim: usize,
    max_position_embeddings: usize,
) -> Result<Rope, ModelError> {
    let partial = |fields: &Fields| match fields.number("partial_rotary_factor")? {
        Some(factor) if factor != 1.0 => Err(fields.wrong(
            "partial_rotary_factor",
            format!("{factor} is not supported; only whole heads are rotated"),
        )),
        _ => Ok(()),
    };
    partial(config)?;
    let Some(parameters) = parameters else {
        return Ok(rope(default_theta, head_dim, &RopeScaling::None));
    };
    partial(&parameters)?;
    let theta = parameters
        .positive("rope_theta")?
        .or(config.positive("rope_theta")?)
        .unwrap_or(default_theta);
    let scaling = scaling(config, &parameters, max_position_embeddings)?;
    Ok(rope(theta, head_dim, &scaling))
}

fn scaling(
    config: &Fields,
    parameters: &Fields,
    max_position_embeddings: usize,
) -> Result<RopeScaling, ModelError> {
    let kind = match parameters.string("rope_type")? {
        Some(kind) => kind,
        None => parameters.string("type")?.unwrap_or("default"),
    };
    let required = |key: &str| {
        parameters
            .positive(key)?
            .ok_or_else(|| parameters.wrong(key, format!("rope scaling {kind:?} needs it")))
    };
    let original_context = || -> Result<f64, ModelError> {
        let key = "original_max_position_embeddings";
        Ok(config
            .positive(key)?
            .or(parameters.positive(key)?)
            .unwrap_or(max_position_embeddings as f64))
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear {
            factor: required("factor")?,
        }),
        "llama3" => {
            let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
            if low >= high {
                return Err(parameters.wrong(
                    "high_freq_factor",
                    format!("{high} is not above low_freq_factor, {low}"),
                ));
            }
            Ok(RopeScaling::Llama3 {
                factor: required("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_context: original_context()?,
            })
        }
        "yarn" => {
            for key in ["mscale", "mscale_all_dim"] {
                if parameters.get(key).is_some() {
                    return Err(parameters.wrong(key, "this variant of YaRN is not supported"));
                }
            }
            let original_context = original_context()?;
            Ok(RopeScaling::Yarn {
                factor: parameters
                    .positive("factor")?
                    .unwrap_or(max_position_embeddings as f64 / original_context),
                attention_factor: parameters.positive("attention_factor")?,
                beta_fast: parameters.positive("beta_fast")?.unwrap_or(32.0),
                beta_slow: parameters.positive("beta_slow")?.unwrap_or(1.0),
                original_context,
                truncate: parameters.flag("truncate")?.unwrap_or(true),
            })
        }
        _ => Err(ModelError::UnsupportedRopeScaling {
            path: parameters.path.to_path_buf(),
            kind: kind.to_string(),
            supported: "default, linear, llama3 and yarn",
        }),
    }
}
