"""Writes tests/golden/dequantize.safetensors: random blocks of every GGUF format that Podium reads,
and their values by the reference implementation (gguf.quants.dequantize).

Run: python tests/reference/dequantize.py   (needs gguf, numpy, safetensors)
"""

from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent.parent / "golden" / "dequantize.safetensors"

# Byte offsets of the float16 scales in a block.
SCALES = {
    "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}
# Ordinary scales, both zeros, the smallest subnormal, the largest subnormal, the smallest normal,
# the largest finite number, and what a damaged file may hold.
EXTREMES = np.array(
    [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0x7E00], dtype=np.uint16
)


def blocks_of(name: str, rng: np.random.Generator) -> np.ndarray:
    block_len, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    count = len(EXTREMES) + (6 if block_len == 32 else 2)
    blocks = rng.integers(0, 256, (count, block_bytes), dtype=np.uint8)
    for offset in SCALES[name]:
        scales = rng.normal(0, 0.1, count).astype(np.float16).view(np.uint16)
        scales[: len(EXTREMES)] = rng.permutation(EXTREMES)
        blocks[:, offset : offset + 2] = scales.reshape(-1, 1).view(np.uint8)
    return blocks


def main() -> None:
    rng = np.random.default_rng(20250607)
    tensors = {}
    for name in SCALES:
        blocks = blocks_of(name, rng)
        tensors[f"{name}.blocks"] = blocks
        with np.errstate(invalid="ignore", over="ignore"):
            tensors[f"{name}.values"] = dequantize(blocks, GGMLQuantizationType[name])
    # The plain formats: random bit patterns, so subnormals, infinities and NaNs are among them.
    for name, width in {"F32": 4, "F16": 2, "BF16": 2}.items():
        blocks = rng.integers(0, 256, (1, 512 * width), dtype=np.uint8)
        tensors[f"{name}.blocks"] = blocks
        with np.errstate(invalid="ignore"):
            tensors[f"{name}.values"] = np.ascontiguousarray(dequantize(blocks, GGMLQuantizationType[name]))
    save_file(tensors, GOLDEN)


if __name__ == "__main__":
    main()
