"""GGUF files of transformers models, and back: what llama.cpp's `convert_hf_to_gguf.py` does.

Of the llama family the rows of the query and key projections are permuted, so that the halves which
Hugging Face rotates lie beside each other. Of the Gemma family a one is added to the norms' weights.
Norms and biases stay in F32.
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

ARCHITECTURES = {"gemma3_text": "gemma3"}

TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def is_gemma(config: PreTrainedConfig) -> bool:
    return config.model_type.startswith("gemma")


def gguf_name(name: str, config: PreTrainedConfig) -> str:
    """What llama.cpp calls the weight or bias that transformers calls `name`."""
    module, kind = name.rsplit(".", 1)
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    layer, part = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{(GEMMA_NAMES if is_gemma(config) else NAMES)[part]}.{kind}"


def permuted_heads(name: str, config: PreTrainedConfig) -> int | None:
    """How many heads' rows are permuted in the weight that transformers calls `name`."""
    if config.model_type != "llama":
        return None
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else None


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half goes to row 2i of the head, row i of its second half to 2i + 1."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def random_k_blocks(type: Type, shape: tuple[int, int], scale: float, random: np.random.Generator) -> np.ndarray:
    """Blocks of random bytes, [rows, bytes of a row], for weights of mean 0 and deviation `scale`."""
    block, size = gguf.GGML_QUANT_SIZES[type]
    count = shape[0] * shape[1] // block
    data = random.integers(0, 256, (count, size), dtype=np.uint8)

    def put(offset: int, values: np.ndarray):
        data[:, offset : offset + 2] = values.astype("<f2").view(np.uint8).reshape(count, 2)

    spread = random.uniform(0.7, 1.3, count)
    if type == Type.Q6_K:
        # d · scale · (q - 32) with scale in -128 … 127, q in 0 … 63: deviation 74 · 18.5; d comes last.
        put(size - 2, spread * scale / (74 * 18.5))
    else:
        # d · scale · q - dmin · minimum, scale and minimum in 0 … 63, q in 0 … top. With
        # dmin = d · top / 2 the means cancel; scales of 6 bits have mean 31.5 and square mean 1344.
        top = 15 if type == Type.Q4_K else 31
        deviation = np.sqrt(1344 * (top * (2 * top + 1) / 6 + top * top / 4) - 2 * (31.5 * top / 2) ** 2)
        put(0, spread * scale / deviation)
        put(2, spread * scale / deviation * top / 2)
    return data.reshape(shape[0], -1)


def encode(name: str, weight: np.ndarray, type: Type, config: PreTrainedConfig, random: np.random.Generator):
    """A transformers weight as a tensor of the file: its data, and its type there."""
    if weight.ndim == 1:
        return (weight + 1 if is_gemma(config) and name.endswith("norm.weight") else weight), Type.F32
    if heads := permuted_heads(name, config):
        weight = permute(weight, heads)
    if type in (Type.Q4_K, Type.Q5_K, Type.Q6_K):
        return random_k_blocks(type, weight.shape, float(weight.std()), random), type
    return gguf.quants.quantize(weight, type), type


def divisors(config: LlamaConfig) -> np.ndarray:
    """llama3's scaling as llama.cpp's converter writes it: what each pair's frequency is divided by."""
    rope = config.rope_parameters
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    out = []
    for pair in range(config.head_dim // 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * pair / config.head_dim)
        if wavelength < high:
            out.append(1.0)
        elif wavelength > low:
            out.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            out.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    assert 1.0 in out and rope["factor"] in out and len(set(out)) > 2, "not all three bands occur"
    return np.array(out, dtype=np.float32)


def write_metadata(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    if config.model_type == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
    if config.model_type == "qwen3" or is_gemma(config):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if is_gemma(config):
        writer.add_sliding_window(config.sliding_window)
        # The scale of the attention has no key: llama.cpp takes it to be 1/√head_dim.
        assert config.query_pre_attn_scalar == config.head_dim
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "gemma3_text":
        # Neither have the local layers' theta and the pattern of layers.
        assert rope["sliding_attention"]["rope_theta"] == 10000.0
        assert config.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * (config.num_hidden_layers // 6)
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", divisors(config))


def write_tokenizer(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    """A byte-level vocabulary without merges: enough for a reader that insists on a tokenizer."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    alphabet = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    alphabet += [chr(256 + code) for code in range(256 - len(alphabet))]
    tokens = ["<unk>", "<s>", "</s>"] + alphabet
    tokens += [f"<unused{index}>" for index in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 256
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * (config.vocab_size - len(kinds)))
    writer.add_token_merges([])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)


def write_file(path: Path, model, type: Type, output_type: Type | None, random: np.random.Generator) -> None:
    """Stores a transformers model with matrices of `type`, an untied output matrix of `output_type`."""
    config = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(config.model_type, config.model_type))
    writer.add_name(path.parent.name)
    write_metadata(writer, config)
    write_tokenizer(writer, config)
    for name, parameter in model.named_parameters():
        wanted = output_type if name == "lm_head.weight" and output_type else type
        data, stored = encode(name, parameter.detach().numpy(), wanted, config, random)
        writer.add_tensor(gguf_name(name, config), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_config(reader: gguf.GGUFReader) -> LlamaConfig:
    """The configuration of a llama file without rope scaling, from its metadata."""

    def value(key: str):
        return reader.get_field(key).contents()

    assert value("general.architecture") == "llama" and reader.get_field("llama.rope.scaling.type") is None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in tensors,
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
    )


def load(path: Path, config: PreTrainedConfig | None = None, dtype: torch.dtype = torch.float32):
    """A GGUF file's dequantised weights in a transformers model; without `config`, that of the file."""
    reader = gguf.GGUFReader(path)
    config = config or llama_config(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        tensor = tensors.pop(gguf_name(name, config))
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if is_gemma(config) and name.endswith("norm.weight"):
            weight = weight - 1
        if heads := permuted_heads(name, config):
            weight = unpermute(weight, heads)
        parameter.data.copy_(torch.from_numpy(weight.copy()).reshape(parameter.shape))
    tensors.pop("rope_freqs.weight", None)
    assert not tensors, f"{path} has tensors that the model lacks: {sorted(tensors)}"
    return model
