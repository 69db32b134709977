"""The models that the peers are measured with: GGUF files that every engine here reads."""

import os
from pathlib import Path

import gguf
import numpy as np

# Random weights in the shape of real models; the vocabulary is that of SmolLM2, cut or filled up.
SHAPES = {
    "110m": dict(
        hidden_size=768, layers=12, heads=12, kv_heads=4, feed_forward=2048, vocab_size=32000, context=8192
    ),
    # Llama-3.2-1B's.
    "1b": dict(
        hidden_size=2048, layers=16, heads=32, kv_heads=8, feed_forward=8192, vocab_size=128256, context=8192
    ),
}
QUANTISED = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}


def file(name: str, form: str, smollm2: Path, folder: Path) -> Path:
    """The file of a model in a form ("f32", "f16", "bf16", "q8_0", "q4_0"; "q4_1" of SmolLM2), written where it is missing."""
    if name == "smollm2":
        if form != "q4_1":
            raise ValueError("SmolLM2 is there in Q4_1 only")
        return smollm2
    path = folder / f"llama-{name}-{form}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        write(partial, SHAPES[name], form, gguf.GGUFReader(smollm2))
        os.replace(partial, path)
    return path


def write(path: Path, shape: dict, form: str, vocabulary: gguf.GGUFReader) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    head_dim = shape["hidden_size"] // shape["heads"]
    writer.add_name(f"random Llama, {form}")
    writer.add_context_length(shape["context"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(shape["feed_forward"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_file_type(FILE_TYPES[form])
    add_vocabulary(writer, shape["vocab_size"], vocabulary)
    random = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        weights = (random.standard_normal((rows, columns), dtype=np.float32)) / np.sqrt(columns)
        kind = QUANTISED[form]
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(shape["hidden_size"], dtype=np.float32))

    hidden, kv, inner = shape["hidden_size"], shape["kv_heads"] * head_dim, shape["feed_forward"]
    matrix("token_embd.weight", shape["vocab_size"], hidden)
    norm("output_norm.weight")
    for layer in range(shape["layers"]):
        block = f"blk.{layer}."
        norm(block + "attn_norm.weight")
        matrix(block + "attn_q.weight", hidden, hidden)
        matrix(block + "attn_k.weight", kv, hidden)
        matrix(block + "attn_v.weight", kv, hidden)
        matrix(block + "attn_output.weight", hidden, hidden)
        norm(block + "ffn_norm.weight")
        matrix(block + "ffn_gate.weight", inner, hidden)
        matrix(block + "ffn_up.weight", inner, hidden)
        matrix(block + "ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter, size: int, reader: gguf.GGUFReader) -> None:
    """The first tokens of a byte-level vocabulary: its merges come in the order of its tokens."""

    def field(name: str) -> list:
        return reader.fields[f"tokenizer.ggml.{name}"].contents()

    tokens, kinds = field("tokens")[:size], field("token_type")[:size]
    known = set(tokens)
    merges = [merge for merge in field("merges") if merge.replace(" ", "") in known]
    missing = size - len(tokens)
    tokens += [f"<|filler_{i}|>" for i in range(missing)]
    kinds += [gguf.TokenType.CONTROL] * missing
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(field("pre"))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
