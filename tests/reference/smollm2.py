"""The golden of the default model, SmolLM2-135M-Instruct, from its Q4_1 GGUF."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import gguf_files
import golden

PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the greatest common divisor of 84 and 36? Explain in one or two "
    "sentences.<|im_end|>\n<|im_start|>assistant\n"
)
CANDIDATES = [
    "12",
    "The greatest common divisor of 84 and 36 is 12, because 84 = 12 · 7 and 36 = 12 · 3.",
    "The greatest common divisor of 84 and 36 is 6. It divides both numbers without a remainder.",
    "Let us use Euclid's algorithm.\n\n1. 84 = 2 × 36 + 12\n2. 36 = 3 × 12 + 0\n\n"
    "The last remainder that is not zero is 12.\n\n```python\nimport math\n\nprint(math.gcd(84, 36))  # 12\n```",
    "Größter gemeinsamer Teiler: 12. Наибольший общий делитель: 12. 最大公约数是 12。",
]
LAYERS = [6, 18, 24, 30]
# A row of logits is 49152 numbers: three of them are enough.
LOGITS_OF = ["prompt", "candidate.1", "candidate.3"]


def write(gguf_file: Path, path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)

    def ids(text: str) -> list[int]:
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(encoded) == text, f"{text!r} does not survive the tokenizer"
        return encoded

    sequences = golden.Sequences(ids(PROMPT), [ids(candidate) for candidate in CANDIDATES])
    model = gguf_files.load(gguf_file)
    result = golden.compute(model, sequences, LAYERS, LOGITS_OF)

    # transformers reads GGUF files too, and puts the permuted rows back with code of its own.
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    error = golden.difference(golden.compute(theirs, sequences, LAYERS, LOGITS_OF), result)
    assert error < 1e-6, f"transformers' own GGUF reader differs by {error:.1e}"
    del theirs
    exact = golden.compute(model.double(), sequences, LAYERS, LOGITS_OF)
    print(f"  float32 error {golden.difference(result, exact):.1e}; greedy lead {result['greedy.lead'].item():.1e}")
    print(f"  greedy: {tokenizer.decode(result['greedy.input_ids'])!r}")

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(golden.stored(result), path, golden.metadata(prompt=PROMPT, model=gguf_file.name))
