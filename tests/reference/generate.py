"""Holds an answer of `podium generate --json` against transformers.

    podium generate --n 4 --json "How many legs do three cats have?" > answer.json
    python tests/reference/generate.py SmolLM2-135M-Instruct.Q4_1.gguf answer.json

Computes the log-probability of every token that Podium wrote, with the file's dequantised weights in
float32, and compares the sums; where the strategy was greedy, each token must be the most probable.
Needs the packages of requirements.txt. Exit status 1 if anything differs.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

import gguf_files

# As in tests/golden.rs: 1e-4 of each token's log-probability, or absolute where that is small.
TOLERANCE = 1e-4


def prompt_ids(tokenizer, answer: dict) -> list[int]:
    """Token ids of the prompt: a chat, if the answer has its messages, else the text as it is."""
    if "messages" not in answer:
        return tokenizer(answer["prompt"])["input_ids"]
    text = tokenizer.apply_chat_template(answer["messages"], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def compare(model, prompt: list[int], candidate: dict, greedy: bool) -> bool:
    """Prints how one candidate compares, and tells whether it agrees."""
    tokens = candidate["token_ids"]
    if not tokens:
        print(f"candidate {candidate['index']}: empty")
        return candidate["cumulative_logprob"] == 0
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1].double(), dim=-1)
    chosen = logprobs[torch.arange(len(tokens)), torch.tensor(tokens)]
    error = abs(candidate["cumulative_logprob"] - chosen.sum().item())
    allowed = TOLERANCE * chosen.abs().clamp(min=1).sum().item()
    # A token that is not the most probable one may still be as probable to within the tolerance.
    behind = (logprobs.amax(dim=-1) - chosen).max().item() if greedy else 0.0
    agrees = error <= allowed and behind <= TOLERANCE
    print(
        f"candidate {candidate['index']}: {len(tokens)} tokens, log-probability "
        f"{candidate['cumulative_logprob']:.5f}, transformers {chosen.sum().item():.5f}, "
        f"off by {error:.1e} of {allowed:.1e}"
        + (f", behind the most probable by {behind:.1e}" if greedy else "")
        + ("" if agrees else "  <-- DIFFERS")
    )
    return agrees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a llama GGUF")
    parser.add_argument("answer", type=argparse.FileType(), nargs="?", default=sys.stdin, help="default: stdin")
    arguments = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    answer = json.load(arguments.answer)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model.parent, gguf_file=arguments.model.name)
    prompt = prompt_ids(tokenizer, answer)
    if len(prompt) != answer["usage"]["prompt_tokens"]:
        sys.exit(f"the prompt has {len(prompt)} tokens here, {answer['usage']['prompt_tokens']} there")
    model = gguf_files.load(arguments.model)
    greedy = answer["strategy"] == "greedy"
    if not all([compare(model, prompt, candidate, greedy) for candidate in answer["candidates"]]):
        sys.exit(1)


if __name__ == "__main__":
    main()
