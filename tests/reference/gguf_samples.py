"""Writes tests/golden/tiny-llama.gguf and tests/golden/tiny-gemma3.gguf with the reference writer,
as llama.cpp's convert_hf_to_gguf.py would from Hugging Face models whose weights follow a formula:
number i of the tensor that is number s in sorted order of canonical names is

    ((7919 i + 104729 s) mod 2003 - 1001) / 1024

so the tests know what must come out.

Run: python tests/reference/gguf_samples.py   (needs gguf and numpy)
"""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.quants import quantize

GOLDEN = Path(__file__).parent.parent / "golden"

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}
SANDWICH = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm"}


def gguf_name(name: str, names: dict[str, str]) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        layer, module = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{names[module]}.{kind}"
    return f"{names[stem]}.{kind}"


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    tensors = {}
    for s, name in enumerate(sorted(shapes)):
        i = np.arange(np.prod(shapes[name]), dtype=np.int64)
        values = ((7919 * i + 104729 * s) % 2003 - 1001) / 1024
        tensors[name] = values.astype(np.float32).reshape(shapes[name])
    return tensors


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of convert_hf_to_gguf.py."""
    return (weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
            .swapaxes(1, 2).reshape(weight.shape))


def add(writer: GGUFWriter, name: str, tensor: np.ndarray, dtype: GGMLQuantizationType) -> None:
    writer.add_tensor(name, quantize(np.ascontiguousarray(tensor), dtype), raw_dtype=dtype)


def tokenizer(writer: GGUFWriter, vocab: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{i}é>" for i in range(vocab)])
    writer.add_token_types([1] * (vocab - 2) + [3] * 2)
    writer.add_token_scores([-0.5 * i for i in range(vocab)])
    writer.add_add_bos_token(True)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)


def llama() -> None:
    hidden, inner, heads, kv_heads, head_dim, vocab, layers = 32, 32, 4, 2, 8, 16, 2
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,),
              "lm_head.weight": (vocab, hidden)}
    for layer in range(layers):
        for module, shape in {
            "self_attn.q_proj.weight": (heads * head_dim, hidden), "self_attn.q_proj.bias": (heads * head_dim,),
            "self_attn.k_proj.weight": (kv_heads * head_dim, hidden), "self_attn.k_proj.bias": (kv_heads * head_dim,),
            "self_attn.v_proj.weight": (kv_heads * head_dim, hidden), "self_attn.v_proj.bias": (kv_heads * head_dim,),
            "self_attn.o_proj.weight": (hidden, heads * head_dim),
            "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
        }.items():
            shapes[f"model.layers.{layer}.{module}"] = shape
    writer = GGUFWriter(GOLDEN / "tiny-llama.gguf", "llama")
    writer.add_name("Tiny Llama")
    writer.add_custom_alignment(64)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    tokenizer(writer, vocab)
    add(writer, "rope_freqs.weight", np.array([1.0, 1.0, 2.5, 8.0], dtype=np.float32), GGMLQuantizationType.F32)
    for name, tensor in weights(shapes).items():
        dtype = GGMLQuantizationType.F32 if tensor.ndim == 1 else GGMLQuantizationType.F16
        if ".q_proj." in name:
            tensor = permute(tensor, heads)
        if ".k_proj." in name:
            tensor = permute(tensor, kv_heads)
        if name.endswith("1.self_attn.q_proj.weight"):
            dtype = GGMLQuantizationType.Q8_0
        add(writer, gguf_name(name, NAMES), tensor, dtype)
    finish(writer)


def gemma3() -> None:
    # Seven layers: the sixth is the first that sees everything.
    hidden, inner, heads, kv_heads, head_dim, vocab, layers = 32, 32, 2, 1, 16, 16, 7
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        for module, shape in {
            "self_attn.q_proj.weight": (heads * head_dim, hidden),
            "self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
            "self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
            "self_attn.o_proj.weight": (hidden, heads * head_dim),
            "self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,),
            "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
            "pre_feedforward_layernorm.weight": (hidden,), "post_feedforward_layernorm.weight": (hidden,),
        }.items():
            shapes[f"model.layers.{layer}.{module}"] = shape
    writer = GGUFWriter(GOLDEN / "tiny-gemma3.gguf", "gemma3")
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1000000.0)
    writer.add_sliding_window(4)
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)
    tokenizer(writer, vocab)
    quantized = [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q5_0,
                 GGMLQuantizationType.Q5_1, GGMLQuantizationType.Q8_0]
    for s, (name, tensor) in enumerate(weights(shapes).items()):
        if name.endswith("norm.weight"):
            tensor = tensor + 1
        dtype = GGMLQuantizationType.F32 if tensor.ndim == 1 else quantized[s % len(quantized)]
        add(writer, gguf_name(name, {**NAMES, **SANDWICH}), tensor, dtype)
    finish(writer)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    llama()
    gemma3()
