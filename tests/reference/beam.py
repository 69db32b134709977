"""Writes tests/golden/beam.json: what transformers' beam search finds with models of tests/golden/models.

    beam.py --smollm2 FILE      FILE: SmolLM2-135M-Instruct.Q4_1.gguf

Needs the packages of requirements.txt. A case is a model, a prompt, the end tokens, a number of beams
n and a length limit; its answer is all n sequences of `generate(num_beams=n, do_sample=False,
length_penalty=1.0, early_stopping=False, num_return_sequences=n)` in float32, best first, the end
token left out, and each one's mean log-probability, the end token counted.

End tokens are chosen among those that the model likes to write, so that answers end at different
lengths. A case is kept only if noise of 1e-4 on every log-probability, ten times as much as two
implementations in float32 are apart, changes none of its sequences.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

import gguf_files

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
MODELS = ["llama-untied", "qwen3", "gemma2", "mistral", "gguf-q4-k"]
BEAMS = [2, 4, 7]
NOISE = 1e-4
SMOLLM2_PROMPTS = [
    "The capital of France",
    "<|im_start|>user\nName three animals that lay eggs.<|im_end|>\n<|im_start|>assistant\n",
]


class Noise(LogitsProcessor):
    """Adds the same noise to the same place of the same step every time it is made."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, _input_ids, scores):
        return scores + NOISE * (2 * torch.rand(scores.shape, generator=self.generator) - 1)


def search(model, prompt: list[int], ends: list[int], n: int, limit: int, noise: int | None = None):
    """Sequences with their end tokens, best first, and their scores."""
    out = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        num_beams=n, num_return_sequences=n, max_new_tokens=limit, do_sample=False, length_penalty=1.0,
        early_stopping=False, eos_token_id=ends, pad_token_id=ends[0], output_scores=True,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([] if noise is None else [Noise(noise)]),
    )
    sequences = []
    for sequence in out.sequences[:, len(prompt) :].tolist():
        end = next((place for place, token in enumerate(sequence) if token in ends), limit)
        sequences.append(sequence[: end + 1])
    return sequences, out.sequences_scores.tolist()


def case(model, name: str, prompt: list[int], ends: list[int], n: int, limit: int) -> dict | None:
    """One case, or None if its beams are too close to tell apart."""
    sequences, scores = search(model, prompt, ends, n, limit)
    if any(search(model, prompt, ends, n, limit, noise)[0] != sequences for noise in range(3)):
        return None
    return {
        "model": name, "prompt": prompt, "end_tokens": ends, "n": n, "max_tokens": limit,
        "sequences": [[token for token in sequence if token not in ends] for sequence in sequences],
        "ended": [sequence[-1] if sequence[-1] in ends else None for sequence in sequences],
        "mean_logprobs": [round(score, 7) for score in scores],
    }


def end_tokens(model, prompt: list[int], limit: int, count: int) -> list[list[int]]:
    """Sets of end tokens to try: likely ones, so that answers end at different lengths."""
    if count > 2:
        # At the first step most of the best continuations end, but for the very best.
        with torch.no_grad():
            ranked = model(torch.tensor([prompt])).logits[0, -1].argsort(descending=True).tolist()
        return [sorted(ranked[best : best + count]) for best in range(1, 6)]
    never = model.config.vocab_size - 1
    sequences, _ = search(model, prompt, [never], 7, limit)
    beams: dict[int, int] = {}
    for sequence in sequences:
        for token in set(sequence):
            beams[token] = beams.get(token, 0) + 1
    likely = sorted(beams, key=lambda token: (-beams[token], token))
    return [sorted(ends) for ends in zip(*(likely[skip:] for skip in range(count)))]


def variety(found: dict) -> int:
    """How much of the search a case shows: answers that end, that do not, and at how many lengths."""
    lengths = {len(sequence) for sequence in found["sequences"]}
    ended = sum(end is not None for end in found["ended"])
    return len(lengths) + 2 * (0 < ended < found["n"]) + 2 * ([] in found["sequences"])


def settled(found: dict) -> bool:
    """Whether the search was over before the length limit: n answers ended, and no beam was better."""
    longest = max(len(sequence) for sequence in found["sequences"])
    return None not in found["ended"] and longest + 2 < found["max_tokens"]


def cases_of(model, name: str, prompt: list[int], limit: int, ends: int, most_tried: int) -> list[dict]:
    """For each number of beams the most various case, and one that is over early, where there are such.

    Each has so many end tokens.
    """
    tries = end_tokens(model, prompt, limit, ends)[:most_tried]
    kept = []
    for n in BEAMS:
        found = [made for ends in tries if (made := case(model, name, prompt, ends, n, limit))]
        found = [made for made in found if any(end is not None for end in made["ended"])]
        early = [made for made in found if settled(made)]
        chosen = sorted(found, key=variety)[-1:] + early[:1]
        for made in chosen if len(chosen) == 2 and chosen[0] is not chosen[1] else chosen[:1]:
            kept.append(made)
            lengths = [len(sequence) for sequence in made["sequences"]]
            print(f"  {len(prompt)} tokens, {n} beams, end tokens {made['end_tokens']}: lengths {lengths}", flush=True)
    assert kept, f"{name}: no end token gives a clear search"
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, metavar="FILE", required=True)
    file = parser.parse_args().smollm2
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()

    cases = []
    for name in MODELS:
        print(name)
        folder = GOLDEN / "models" / name
        if (gguf := folder / "model.gguf").exists():
            model = gguf_files.load(gguf)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        known = load_file(folder / "golden.safetensors")
        prompts = [known[f"{part}.input_ids"].tolist() for part in ["prompt", "single", "candidate.2"]]
        for prompt, limit, ends in zip(prompts, [24, 20, 12], [1, 1, 2]):
            cases += cases_of(model, name, prompt, limit, ends, most_tried=6)
        cases += cases_of(model, name, prompts[0], 12, ends=10, most_tried=6)
    print("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = gguf_files.load(file)
    for text, ends in zip(SMOLLM2_PROMPTS, [1, 2]):
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        cases += cases_of(model, "smollm2", prompt, 16, ends, most_tried=3)

    (GOLDEN / "beam.json").write_text(
        json.dumps(
            {"transformers": transformers.__version__, "torch": torch.__version__, "cases": cases},
            separators=(",", ":"),
        ).replace('{"model"', '\n{"model"') + "\n"
    )


if __name__ == "__main__":
    main()
