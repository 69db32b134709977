"""Small random-weight GGUF files, one for every tensor type, and their reference.

The files are written with llama.cpp's own Python writer (`gguf`), in the way that its
`convert_hf_to_gguf.py` does it: the rows of the query and key projections are permuted, so that the
halves which Hugging Face rotates lie beside each other, and norms stay in F32. The reference is
transformers with the dequantised weights, permuted back.

Q4_K, Q5_K and Q6_K can be read by the package but not made. There the blocks are random bytes, with
scales that give weights of a sane size.
"""

import shutil
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import golden
from families import CONTEXT, rope
from random_models import draw_sequences, randomise, verdict

# Weights whose rows are permuted, and the number of heads that they have.
PERMUTED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass
class Spec:
    """One GGUF file."""

    name: str
    type: Type
    rope: str = "default"  # default, linear or llama3
    tied: bool = True
    # The type of the output matrix, where it is another one (untied only).
    output_type: Type | None = None


def specs() -> list[Spec]:
    types = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K".split()
    return [Spec(f"gguf-{name.lower().replace('_', '-')}", Type[name]) for name in types] + [
        # llama.cpp keeps llama3's scaling as a tensor of divisors, and linear scaling as metadata.
        Spec("gguf-llama3-rope", Type.Q8_0, rope="llama3"),
        Spec("gguf-linear-rope", Type.Q8_0, rope="linear"),
        # As the usual mixes have it: the output matrix is finer than the rest.
        Spec("gguf-untied-mixed", Type.Q4_0, tied=False, output_type=Type.Q8_0),
    ]


def config_of(spec: Spec) -> LlamaConfig:
    shape = dict(hidden_size=96, intermediate_size=160, num_attention_heads=3, num_key_value_heads=1)
    if spec.type.name.endswith("_K"):
        # Rows are whole blocks of 256 weights.
        shape = dict(hidden_size=256, intermediate_size=256, num_attention_heads=8, num_key_value_heads=2)
    scaling = {
        "default": {},
        "linear": dict(rope_type="linear", factor=4.0),
        "llama3": dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    }[spec.rope]
    return LlamaConfig(
        vocab_size=300, num_hidden_layers=2, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2, pad_token_id=None, tie_word_embeddings=spec.tied,
        rope_parameters=rope(1000.0, **scaling), **shape,
    )


def gguf_name(name: str) -> str:
    """What llama.cpp calls the weight that transformers calls `name`."""
    if name in (top := {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }):
        return top[name]
    layer, part = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[part.removesuffix('.weight')]}.weight"


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's order to llama.cpp's: row i of a head's first half goes to row 2i, of its second to 2i + 1."""
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


def encode(name: str, weight: np.ndarray, type: Type, config: LlamaConfig, random: np.random.Generator):
    """A weight in Hugging Face's order to a tensor of the file: its data, and its type there."""
    part = name.split(".")[-2]
    if part.endswith("norm"):
        return weight, Type.F32
    if part in PERMUTED:
        weight = permute(weight, getattr(config, PERMUTED[part]))
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
    assert 1.0 in out and rope["factor"] in out and len(set(out)) > 2, "all three bands must occur"
    return np.array(out, dtype=np.float32)


def write_file(spec: Spec, path: Path, model, random: np.random.Generator) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(spec.name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if spec.rope == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    if spec.rope == "llama3":
        writer.add_tensor("rope_freqs.weight", divisors(config))
    # A byte-level vocabulary without merges: enough for a reader that insists on a tokenizer.
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
    for name, parameter in model.named_parameters():
        name = gguf_name(name)
        type = spec.output_type if name == "output.weight" and spec.output_type else spec.type
        data, type = encode(name, parameter.detach().numpy(), type, config, random)
        writer.add_tensor(name, data, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A llama GGUF as a transformers model with dequantised weights."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def value(key: str, default=None):
        field = reader.get_field(key)
        return default if field is None else field.contents()

    theta = value("llama.rope.freq_base", 10000.0)
    rope = {"rope_type": "default", "rope_theta": theta}
    if value("llama.rope.scaling.type") == "linear":
        rope = {"rope_type": "linear", "rope_theta": theta, "factor": value("llama.rope.scaling.factor")}
    config = LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        tie_word_embeddings="output.weight" not in tensors,
        rope_parameters=rope,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager", dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        tensor = tensors[gguf_name(name)]
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in PERMUTED:
            weight = unpermute(weight, getattr(config, PERMUTED[part]))
        parameter.data.copy_(torch.from_numpy(weight.copy()).reshape(parameter.shape))
    if "rope_freqs.weight" in tensors:
        model.model.rotary_emb.inv_freq /= torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
    return model


def mistakes(spec: Spec) -> dict:
    """The wrong readings of a file that its golden must show."""

    def unpermuted(config, weights):
        for name in weights:
            if (part := gguf_name(name).split(".")[-2]) in PERMUTED:
                heads = getattr(config, PERMUTED[part])
                weights[name] = torch.from_numpy(permute(weights[name].numpy(), heads))

    if spec.rope == "llama3":
        # A model made from config and weights alone knows nothing of the divisors.
        return {"rope_freqs ignored": lambda _config, _weights: None}
    if spec.rope == "linear":
        return {"no scaling": lambda config, _weights: config.rope_parameters.update(rope_type="default")}
    return {"rows not permuted back": unpermuted}


def write(spec: Spec, folder: Path) -> None:
    for attempt in range(50):
        seed = zlib.crc32(spec.name.encode()) + attempt
        generator = torch.Generator().manual_seed(seed)
        config = config_of(spec)
        model = LlamaForCausalLM(config)
        randomise(model, generator)
        sequences = draw_sequences(config.vocab_size, generator)

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        path = folder / "model.gguf"
        write_file(spec, path, model, np.random.default_rng(seed))

        model = load(path)
        if spec.rope == "llama3":
            # transformers' own llama3 scaling is the reference for the tensor of divisors.
            ours = LlamaForCausalLM._from_config(config_of(spec)).model.rotary_emb.inv_freq
            torch.testing.assert_close(model.model.rotary_emb.inv_freq, ours, rtol=1e-6, atol=0)
        result = golden.compute(model, sequences, [1, 2])
        reason = verdict(model, load(path, torch.float64), result, sequences, mistakes(spec))
        if reason is None:
            save_file(golden.stored(result), folder / "golden.safetensors", golden.metadata())
            return
        print(f"  seed +{attempt}: {reason}")
    sys.exit(f"{spec.name}: no seed gives a usable model")
