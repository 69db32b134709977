"""Writes tests/golden/configs.json: configurations as transformers 4 and 5 write them, and what
transformers makes of each: sizes, windows, rotary frequencies, scales, names and shapes of tensors.

Run: python tests/reference/configs.py   (needs torch and transformers; made with 5.23)
"""

import copy
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

GOLDEN = Path(__file__).parent.parent / "golden" / "configs.json"

SMALL = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 4096,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}

# Name, the configuration as it stands in config.json.
CASES = {
    **{f"{family}, all defaults": {"model_type": family}
       for family in ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]},
    # As transformers 4 writes them.
    "llama 4, plain": {"model_type": "llama", "torch_dtype": "bfloat16", "rope_theta": 100000.0,
                       "rope_scaling": None, "tie_word_embeddings": True, "eos_token_id": 2},
    "llama 4, llama3": {"model_type": "llama", "head_dim": 64, "rope_theta": 500000.0,
                        "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama 4, llama3 without original context": {
        "model_type": "llama", "head_dim": 32, "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "llama 4, linear by its old name": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama 4, yarn": {"model_type": "llama", "head_dim": 128, "rope_scaling": {"rope_type": "yarn", **YARN}},
    "llama 4, yarn in full": {
        "model_type": "llama", "head_dim": 80, "rope_theta": 1000000.0,
        "rope_scaling": {"rope_type": "yarn", "attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0,
                         "truncate": False, **YARN}},
    "llama 4, biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": None},
    "mistral 4, no window": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1000000.0},
    "mistral 4, head_dim": {"model_type": "mistral", "sliding_window": 32, "head_dim": 24},
    "qwen2 4, plain": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1},
    "qwen2 4, windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64,
                         "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3 4, bias": {"model_type": "qwen3", "head_dim": 32, "attention_bias": True, "rope_theta": 1000000},
    "gemma2 4": {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 224, "sliding_window": 128,
                 "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 10000.0},
    "gemma2 4, no caps": {"model_type": "gemma2", "head_dim": 16, "attn_logit_softcapping": None,
                          "final_logit_softcapping": None, "attention_bias": True},
    "gemma3 4": {"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 64, "sliding_window_pattern": 2,
                 "rope_theta": 1000000, "rope_local_base_freq": 10000, "query_pre_attn_scalar": 168,
                 "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    # As transformers 5 writes them.
    "llama 5, llama3": {"model_type": "llama", "dtype": "bfloat16", "head_dim": 64,
                        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
    "llama 5, default": {"model_type": "llama", "dtype": "float32",
                         "rope_parameters": {"rope_type": "default", "rope_theta": 25000.0}},
    "qwen2 5, layer types": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64,
                             "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                             "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "gemma3 5": {"model_type": "gemma3_text", "head_dim": 32, "sliding_window": 64,
                 "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                 "final_logit_softcapping": 20.0,
                 "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2000000.0},
                                     "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0}}},
}


def expected(written: dict, with_tensors: bool) -> dict:
    fields = copy.deepcopy(written)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # Frequencies need real numbers.
    rotary = type(model.model.rotary_emb)(config)
    layers = []
    for layer in model.model.layers:
        attention = layer.self_attn
        if config.model_type == "mistral":
            window, kind = config.sliding_window, None
        else:
            window = getattr(attention, "sliding_window", None)
            kind = getattr(attention, "layer_type", None)
        prefix = f"{kind}_" if config.model_type == "gemma3_text" else ""
        layers.append({
            "window": window,
            "frequencies": getattr(rotary, prefix + "inv_freq").tolist(),
            "attention_factor": getattr(rotary, prefix + "attention_scaling"),
        })
    first = model.model.layers[0].self_attn
    result = {
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size, "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads,
        "head_dim": first.head_dim, "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps, "tie_word_embeddings": config.tie_word_embeddings,
        "attention_scale": first.scaling,
        "attention_softcap": getattr(config, "attn_logit_softcapping", None),
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
        "embedding_scale": getattr(model.model.embed_tokens, "scalar_embed_scale", 1.0),
        # Gemma's norms multiply by 1 + weight and start at zero; the others start at one.
        "norm_weight_plus_one": "Gemma" in type(model.model.norm).__name__,
        "gelu": "gelu" in str(type(model.model.layers[0].mlp.act_fn)).lower(),
        # All layers rotate alike, or there are two kinds: the first of each tells the rest.
        "attention": layers if with_tensors else [],
        "windows": [layer["window"] for layer in layers],
    }
    if with_tensors:
        # Tied: the output is the embedding's own storage, and the file does not hold it.
        result["tensors"] = {name: list(tensor.shape) for name, tensor in model.state_dict().items()
                             if not (name == "lm_head.weight" and config.tie_word_embeddings)}
    return result


def main() -> None:
    cases = []
    for name, config in CASES.items():
        small = "defaults" not in name
        written = {**SMALL, **config} if small else config
        cases.append({"name": name, "config": written, "expected": expected(written, small)})
    GOLDEN.write_text(json.dumps(cases, separators=(",", ":")).replace('{"name"', '\n{"name"') + "\n")


if __name__ == "__main__":
    main()
