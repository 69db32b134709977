"""Small random-weight GGUF files: one for every tensor type, and one for every family.

Written with llama.cpp's own Python writer (`gguf`); the reference is transformers with the
dequantised weights. Q4_K, Q5_K and Q6_K can be read by the package but not made: there the blocks
are random bytes, with scales that give weights of a sane size.
"""

import copy
import shutil
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import golden
from families import CONTEXT, reset, rope, set_config, set_rope
from gguf_files import load, permute, permuted_heads, write_file
from random_models import draw_sequences, randomise, verdict


@dataclass
class Spec:
    """One GGUF file."""

    name: str
    type: Type
    config: PreTrainedConfig
    # The type of the output matrix, where it is another one (untied only).
    output_type: Type | None = None
    mistakes: dict[str, Callable] = field(default_factory=dict)


def keep_permuted(config, weights) -> None:
    """The query and key rows left in llama.cpp's order."""
    for name in weights:
        if heads := permuted_heads(name, config):
            weights[name] = torch.from_numpy(permute(weights[name].numpy(), heads))


SHARED = dict(
    vocab_size=300, max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=2, pad_token_id=None,
)


def llama(type: Type = Type.Q8_0, tied: bool = True, **scaling) -> LlamaConfig:
    shape = dict(hidden_size=96, intermediate_size=160, num_attention_heads=3, num_key_value_heads=1)
    if type.name.endswith("_K"):
        # Rows are whole blocks of 256 weights.
        shape = dict(hidden_size=256, intermediate_size=256, num_attention_heads=8, num_key_value_heads=2)
    return LlamaConfig(
        num_hidden_layers=2, rms_norm_eps=1e-5, tie_word_embeddings=tied,
        rope_parameters=rope(1000.0, **scaling), **shape, **SHARED,
    )


def specs() -> list[Spec]:
    types = [Type[name] for name in "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K".split()]
    shape = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    return [
        *[
            Spec(f"gguf-{type.name.lower().replace('_', '-')}", type, llama(type), mistakes={"order": keep_permuted})
            for type in types
        ],
        # As the usual mixes have it: the output matrix is finer than the rest.
        Spec("gguf-untied-mixed", Type.Q4_0, llama(tied=False), output_type=Type.Q8_0),
        # llama.cpp keeps llama3's scaling as a tensor of divisors.
        Spec(
            "gguf-llama3-rope",
            Type.Q8_0,
            llama(
                rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
            mistakes={"no scaling": set_rope(rope_type="default")},
        ),
        Spec(
            "gguf-linear-rope",
            Type.Q8_0,
            llama(rope_type="linear", factor=4.0),
            mistakes={"no scaling": set_rope(rope_type="default")},
        ),
        # Rows in Hugging Face's own order from here on.
        Spec(
            "gguf-qwen2",
            Type.Q8_0,
            Qwen2Config(
                num_hidden_layers=3, rms_norm_eps=1e-6, tie_word_embeddings=True,
                rope_parameters=rope(1000000.0), **shape, **SHARED,
            ),
            mistakes={"q bias": reset("q_proj.bias", 0.0), "v bias": reset("v_proj.bias", 0.0)},
        ),
        Spec(
            "gguf-qwen3",
            Type.Q8_0,
            Qwen3Config(
                num_hidden_layers=3, rms_norm_eps=1e-6, tie_word_embeddings=False, head_dim=32,
                rope_parameters=rope(1000000.0), **shape, **SHARED,
            ),
            mistakes={"no q norm weight": reset("q_norm.weight", 1.0)},
        ),
        # Norms hold the one that Hugging Face leaves out; layers alternate without saying so.
        Spec(
            "gguf-gemma2",
            Type.Q8_0,
            Gemma2Config(
                num_hidden_layers=4, rms_norm_eps=1e-6, head_dim=32, query_pre_attn_scalar=32,
                attn_logit_softcapping=5.0, final_logit_softcapping=6.0, sliding_window=9,
                rope_parameters=rope(10000.0), **shape, **SHARED,
            ),
            mistakes={
                "no attention cap": set_config(attn_logit_softcapping=None),
                "windows swapped": set_config(layer_types=["full_attention", "sliding_attention"] * 2),
            },
        ),
        # Every sixth layer is global, with a theta and a scaling of its own.
        Spec(
            "gguf-gemma3",
            Type.Q8_0,
            Gemma3TextConfig(
                num_hidden_layers=6, rms_norm_eps=1e-6, head_dim=32, query_pre_attn_scalar=32,
                sliding_window=7,
                rope_parameters={
                    "sliding_attention": rope(10000.0),
                    "full_attention": rope(1000000.0, rope_type="linear", factor=8.0),
                },
                **shape, **SHARED,
            ),
            mistakes={
                "no global scaling": set_rope("full_attention", rope_type="default"),
                "no window": set_config(layer_types=["full_attention"] * 6),
                "no k norm weight": reset("k_norm.weight", 0.0),
            },
        ),
    ]


def write(spec: Spec, folder: Path) -> None:
    for attempt in range(50):
        seed = zlib.crc32(spec.name.encode()) + attempt
        generator = torch.Generator().manual_seed(seed)
        config = copy.deepcopy(spec.config)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(model, generator)
        sequences = draw_sequences(config.vocab_size, generator)

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        path = folder / "model.gguf"
        write_file(path, model, spec.type, spec.output_type, np.random.default_rng(seed))

        model, layers = load(path, config), list(range(1, config.num_hidden_layers + 1))
        result = golden.compute(model, sequences, layers)
        reason = verdict(model, load(path, config, torch.float64), result, sequences, spec.mistakes)
        if reason is None:
            save_file(golden.stored(result), folder / "golden.safetensors", golden.metadata())
            return
        print(f"  seed +{attempt}: {reason}")
    sys.exit(f"{spec.name}: no seed gives a usable model")
