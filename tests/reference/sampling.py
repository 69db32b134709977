"""Writes tests/golden/sampling.json: which tokens transformers keeps, and with what probability.

The processors and their order are those that `generate` itself builds. Needs torch and
transformers (made with 5.23); run from anywhere: python tests/reference/sampling.py

Cases on the border of top-p, where float32 rounding decides, are left out, and so are borders
between equal tokens, where transformers takes what its sort happens to put last.
"""

import itertools
import json
import pathlib

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
import transformers

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "sampling.json"


def rows():
    """Random logits on a grid of 1/64, which JSON holds exactly; the last row is full of ties."""
    generator = torch.Generator().manual_seed(20251)
    for vocab_size, scale in [(40, 1.0), (97, 3.0), (160, 6.0)]:
        logits = torch.randn(vocab_size, generator=generator) * scale - 1.0
        yield (logits * 64).round() / 64
    yield (torch.randn(64, generator=generator) * 2).round()


def is_borderline(scores, top_p):
    """Whether rounding, or the order of equal tokens, decides what top-p keeps."""
    if top_p == 1.0:
        return False
    ordered, _ = scores.double().sort(descending=True)
    mass = ordered.softmax(-1).cumsum(-1)
    last = int((mass < top_p).sum())
    tied = last + 1 < len(ordered) and ordered[last] == ordered[last + 1]
    return bool(tied or (mass - top_p).abs().min() < 1e-5)


def main():
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    logits = list(rows())
    cases = []
    grid = itertools.product(
        range(len(logits)), [1.0, 1.3, 0.8], [1.0, 0.7, 1.5], [0, 1, 5, 20], [1.0, 0.9, 0.5], [0.0, 0.1]
    )
    for number, (row, penalty, temperature, top_k, top_p, min_p) in enumerate(grid):
        # A third of the grid: every pair of values still meets.
        if number % 3 != (row + top_k) % 3:
            continue
        config = GenerationConfig(
            do_sample=True,
            repetition_penalty=penalty,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p if min_p > 0 else None,
            pad_token_id=0,
            eos_token_id=0,
            num_beams=1,
        )
        # The model fills in what is None; no end token is needed here.
        processors = model._get_logits_processor(
            config, input_ids_seq_length=4, logits_processor=None, device="cpu"
        )
        seen = [3, 1, 3, 17, 30, 17] if penalty != 1.0 else []
        scores = logits[row][None].clone()
        borderline = False
        for processor in processors:
            if type(processor).__name__ == "TopPLogitsWarper":
                borderline = is_borderline(scores[0], top_p)
            scores = processor(torch.tensor([seen], dtype=torch.long), scores)
        if borderline:
            continue
        probabilities = scores[0].double().softmax(-1)
        kept = probabilities.nonzero()[:, 0].tolist()
        cases.append(
            {
                "row": row,
                "seen": seen,
                "repetition_penalty": penalty,
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "min_p": min_p,
                "kept": kept,
                "probabilities": [float(f"{probabilities[token]:.9g}") for token in kept],
            }
        )
    golden = {
        "made_with": f"transformers {transformers.__version__}",
        "rows": [row.tolist() for row in logits],
        "cases": cases,
    }
    text = json.dumps(golden).replace('{"row"', '\n{"row"')
    GOLDEN.write_text(text + "\n")
    print(f"{len(cases)} cases, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
