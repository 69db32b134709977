"""The small models of every family: how each is built and stored, and which mistakes it must show."""

from dataclasses import dataclass, field
from typing import Callable

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

CONTEXT = 96  # of every model: prompt (37) and longest candidate (40) fit, and a full context stays small


@dataclass
class Spec:
    """One model: how it is built, how it is stored, and which mistakes it must show."""

    name: str
    config: PreTrainedConfig
    dtype: torch.dtype = torch.float32
    form: int = 5  # config.json as transformers 5 or 4 writes it
    shard: str = "5GB"
    # `edit(config)` for a wrong reading of config.json, `edit(config, weights)` where it is the weights.
    mistakes: dict[str, Callable] = field(default_factory=dict)
    # Keys of config.json that the form-4 file spells in its own way.
    legacy: dict = field(default_factory=dict)


def rope(theta: float, **scaling) -> dict:
    return {"rope_type": scaling.pop("rope_type", "default"), "rope_theta": theta, **scaling}


def set_config(**values) -> Callable:
    def edit(config, _weights):
        for key, value in values.items():
            setattr(config, key, value)

    return edit


def set_rope(layer_type: str | None = None, **values) -> Callable:
    def edit(config, _weights):
        parameters = config.rope_parameters
        (parameters[layer_type] if layer_type else parameters).update(values)

    return edit


def reset(suffix: str, value: float) -> Callable:
    """All weights whose name ends so are set to one value: what ignoring them would mean."""

    def edit(_config, weights):
        names = [name for name in weights if name.endswith(suffix)]
        assert names, f"no weight ends with {suffix}"
        for name in names:
            weights[name] = torch.full_like(weights[name], value)

    return edit


THETA = set_rope(rope_theta=777.0)
EPSILON = set_config(rms_norm_eps=0.2)
SHARED = dict(max_position_embeddings=CONTEXT, bos_token_id=1, pad_token_id=None)


def specs() -> list[Spec]:
    return [
        # As many key-value heads as heads; tied embeddings.
        Spec(
            "llama-tied",
            LlamaConfig(
                vocab_size=320, hidden_size=64, intermediate_size=118, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5,
                tie_word_embeddings=True, rope_parameters=rope(10000.0), **SHARED,
            ),
            mistakes={"rope_theta": THETA, "rms_norm_eps": EPSILON},
        ),
        # Untied embeddings, several shards; no length is a multiple of 16.
        Spec(
            "llama-untied",
            LlamaConfig(
                vocab_size=257, hidden_size=72, intermediate_size=90, num_hidden_layers=3,
                num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-6,
                tie_word_embeddings=False, rope_parameters=rope(500.0), **SHARED,
            ),
            form=4,
            shard="150KB",
            legacy={"rope_theta": 500.0, "rope_scaling": None},
            mistakes={
                "rope_theta": set_rope(rope_theta=10000.0),
                "tied": lambda config, weights: weights.update(
                    {"lm_head.weight": weights["model.embed_tokens.weight"]}
                ),
            },
        ),
        # Biases on all four attention projections; head_dim is not hidden_size / heads.
        Spec(
            "llama-bias",
            LlamaConfig(
                vocab_size=300, hidden_size=60, intermediate_size=100, num_hidden_layers=2,
                num_attention_heads=5, num_key_value_heads=1, head_dim=32, rms_norm_eps=1e-5,
                attention_bias=True, tie_word_embeddings=False, rope_parameters=rope(10000.0), **SHARED,
            ),
            mistakes={f"{name} bias": reset(f"{name}_proj.bias", 0.0) for name in "qvo"},
        ),
        # Biases in the MLP alone, in a model as small as can be.
        Spec(
            "llama-mlp-bias",
            LlamaConfig(
                vocab_size=130, hidden_size=32, intermediate_size=44, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5, mlp_bias=True,
                tie_word_embeddings=True, rope_parameters=rope(10000.0), **SHARED,
            ),
            dtype=torch.float16,
            mistakes={f"{name} bias": reset(f"{name}_proj.bias", 0.0) for name in ["gate", "up", "down"]},
        ),
        # Wavelengths are 6.3 … 353: one pair kept, two blended, five divided by the factor.
        Spec(
            "llama-llama3-rope",
            LlamaConfig(
                vocab_size=384, hidden_size=96, intermediate_size=100, num_hidden_layers=4,
                num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=1e-5,
                tie_word_embeddings=True,
                rope_parameters=rope(
                    100.0, rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                    high_freq_factor=4.0, original_max_position_embeddings=32,
                ),
                **SHARED,
            ),
            dtype=torch.bfloat16,
            form=4,
            legacy={
                "rope_theta": 100.0,
                "rope_scaling": {
                    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 32, "rope_type": "llama3",
                },
            },
            mistakes={
                "no scaling": set_rope(rope_type="default"),
                "factor": set_rope(factor=7.0),
                "low band": set_rope(low_freq_factor=1.3),
                "high band": set_rope(high_freq_factor=3.0),
                "original context": set_rope(original_max_position_embeddings=CONTEXT),
            },
        ),
        Spec(
            "llama-linear-rope",
            LlamaConfig(
                vocab_size=290, hidden_size=96, intermediate_size=90, num_hidden_layers=2,
                num_attention_heads=3, num_key_value_heads=1, rms_norm_eps=1e-5,
                tie_word_embeddings=True, rope_parameters=rope(1000.0, rope_type="linear", factor=4.0),
                **SHARED,
            ),
            mistakes={"no scaling": set_rope(rope_type="default"), "factor": set_rope(factor=2.0)},
        ),
        # The window is shorter than the prompt and than the longest candidate.
        Spec(
            "mistral",
            MistralConfig(
                vocab_size=333, hidden_size=48, intermediate_size=112, num_hidden_layers=2,
                num_attention_heads=3, num_key_value_heads=1, head_dim=80, rms_norm_eps=1e-5,
                tie_word_embeddings=False, rope_parameters=rope(10000.0), sliding_window=11, **SHARED,
            ),
            form=4,
            legacy={"rope_theta": 10000.0},
            mistakes={"no window": set_config(sliding_window=None), "off by one": set_config(sliding_window=12)},
        ),
        # As released checkpoints have it: a sliding_window that `use_sliding_window` switches off.
        Spec(
            "qwen2",
            Qwen2Config(
                vocab_size=301, hidden_size=96, intermediate_size=184, num_hidden_layers=3,
                num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=1e-6,
                tie_word_embeddings=True, rope_parameters=rope(1000000.0), **SHARED,
            ),
            dtype=torch.float16,
            form=4,
            legacy={
                "rope_theta": 1000000.0, "rope_scaling": None, "layer_types": ...,
                "sliding_window": 11, "use_sliding_window": False, "max_window_layers": 2,
            },
            mistakes={
                **{f"{name} bias": reset(f"{name}_proj.bias", 0.0) for name in "qv"},
                "window": set_config(sliding_window=11, layer_types=["full_attention"] * 2 + ["sliding_attention"]),
            },
        ),
        # The lower layers see everything, the upper ones a window.
        Spec(
            "qwen2-window",
            Qwen2Config(
                vocab_size=272, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-6,
                tie_word_embeddings=False, rope_parameters=rope(10000.0),
                use_sliding_window=True, sliding_window=6, max_window_layers=2, **SHARED,
            ),
            dtype=torch.bfloat16,
            mistakes={
                "no window": set_config(layer_types=["full_attention"] * 4),
                "all windows": set_config(layer_types=["sliding_attention"] * 4),
            },
        ),
        Spec(
            "qwen3",
            Qwen3Config(
                vocab_size=310, hidden_size=48, intermediate_size=90, num_hidden_layers=3,
                num_attention_heads=6, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6,
                tie_word_embeddings=True, rope_parameters=rope(1000000.0), **SHARED,
            ),
            mistakes={
                "no q norm weight": reset("q_norm.weight", 1.0),
                "no k norm weight": reset("k_norm.weight", 1.0),
                "rope_theta": set_rope(rope_theta=10000.0),
            },
        ),
        # Both caps bite, layers alternate from a window on; the scale is not 1/√head_dim. The
        # layers' kinds are not in the file: transformers 4.40 wrote none.
        Spec(
            "gemma2",
            Gemma2Config(
                vocab_size=288, hidden_size=96, intermediate_size=120, num_hidden_layers=4,
                num_attention_heads=3, num_key_value_heads=1, head_dim=40, rms_norm_eps=1e-6,
                query_pre_attn_scalar=24, attn_logit_softcapping=5.0, final_logit_softcapping=6.0,
                sliding_window=9, rope_parameters=rope(10000.0), **SHARED,
            ),
            dtype=torch.float16,
            form=4,
            legacy={"rope_theta": 10000.0, "layer_types": ..., "hidden_act": "gelu_pytorch_tanh"},
            mistakes={
                "no attention cap": set_config(attn_logit_softcapping=None),
                "no logit cap": set_config(final_logit_softcapping=None),
                "scale": set_config(query_pre_attn_scalar=40),
                "no window": set_config(layer_types=["full_attention"] * 4),
                "windows swapped": set_config(layer_types=["full_attention", "sliding_attention"] * 2),
                "activation": set_config(hidden_activation="silu"),
            },
        ),
        # Local and global layers each have their own theta; the global ones are scaled besides.
        Spec(
            "gemma3",
            Gemma3TextConfig(
                vocab_size=305, hidden_size=64, intermediate_size=90, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, head_dim=40, rms_norm_eps=1e-6,
                query_pre_attn_scalar=16, sliding_window=7,
                layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
                rope_parameters={
                    "sliding_attention": rope(300.0),
                    "full_attention": rope(20000.0, rope_type="linear", factor=8.0),
                },
                **SHARED,
            ),
            dtype=torch.bfloat16,
            mistakes={
                "local theta": set_rope("sliding_attention", rope_theta=20000.0),
                "global theta": set_rope("full_attention", rope_theta=300.0),
                "no global scaling": set_rope("full_attention", rope_type="default"),
                "no q norm weight": reset("q_norm.weight", 0.0),
                "no k norm weight": reset("k_norm.weight", 0.0),
                "window": set_config(sliding_window=8),
                "scale": set_config(query_pre_attn_scalar=40),
            },
        ),
        # The same family as transformers 4 wrote it: a pattern length, and a theta of its own name.
        Spec(
            "gemma3-pattern",
            Gemma3TextConfig(
                vocab_size=260, hidden_size=60, intermediate_size=90, num_hidden_layers=3,
                num_attention_heads=3, num_key_value_heads=3, head_dim=16, rms_norm_eps=1e-6,
                query_pre_attn_scalar=20, sliding_window=5, sliding_window_pattern=2,
                rope_parameters={
                    "sliding_attention": rope(100.0),
                    "full_attention": rope(5000.0, rope_type="linear", factor=2.0),
                },
                **SHARED,
            ),
            form=4,
            legacy={
                "rope_theta": 5000.0, "rope_local_base_freq": 100.0, "layer_types": ...,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "sliding_window_pattern": 2,
                "_sliding_window_pattern": ...,
            },
            mistakes={
                "pattern": set_config(layer_types=["sliding_attention"] * 3),
                "local theta": set_rope("sliding_attention", rope_theta=10000.0),
                "no global scaling": set_rope("full_attention", rope_type="default"),
            },
        ),
    ]
