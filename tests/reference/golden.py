"""What transformers says about one model: the numbers that tests/golden.rs compares with.

Every value comes from full forward passes without a key-value cache, in float32 on the CPU with
eager attention: no cache, no batching and no fused kernel that the tests are meant to check.

A golden is a safetensors file (all ids uint32, all else float32), where T is a sequence's length,
V the vocabulary, H the hidden size, and `layers` (uint32) lists the layers whose states are kept:

    prompt.input_ids [T]        prompt.logits [V]        prompt.features [layers, H]
    candidate.I.input_ids [T]   candidate.I.logits [V]   candidate.I.features [layers, H]
    candidate.I.logprobs [T]    natural log-probability of each token of the candidate, given the
                                prompt and the candidate's earlier tokens
    greedy.input_ids [24]       the most probable continuation of the prompt, end tokens ignored
    single.* , full.*           as prompt.*, for a prompt of one token and one that fills the context
    single.candidate.*          as candidate.*, behind the prompt of one token

Logits and features are those of the sequence's last token. The feature of layer l (counted from 1)
is what decoder layer l hands to the next one: no final norm, also where l is the last layer.
"""

from dataclasses import dataclass

import torch
import transformers

GREEDY_TOKENS = 24


@dataclass
class Sequences:
    """The token ids that a golden is computed for."""

    prompt: list[int]
    candidates: list[list[int]]
    full: list[int] | None = None  # a prompt as long as the model's context
    single: list[int] | None = None  # a prompt of one token, and a candidate behind it
    single_candidate: list[int] | None = None


def forward(model, ids: list[int], layers: list[int]):
    """Logits of every position [T, V], and the states after `layers` [layers, T, H]."""
    states = {}
    hooks = []
    for layer in layers:

        def keep(_module, _inputs, output, layer=layer):
            # A decoder layer returns its states, in older versions as the first of a tuple.
            states[layer] = (output[0] if isinstance(output, tuple) else output)[0].detach()

        # transformers' own `hidden_states[-1]` has the final norm applied; a hook sees it before.
        hooks.append(model.model.layers[layer - 1].register_forward_hook(keep))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, torch.stack([states[layer] for layer in layers])


def greedy(model, prompt: list[int], count: int) -> tuple[list[int], float]:
    """The most probable continuation, and the smallest lead (in logits) of a chosen token."""
    ids, lead = list(prompt), float("inf")
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        top = torch.topk(logits, 2)
        lead = min(lead, (top.values[0] - top.values[1]).item())
        ids.append(top.indices[0].item())
    return ids[len(prompt) :], lead


def compute(model, sequences: Sequences, layers: list[int], logits_of: list[str] | None = None) -> dict:
    """The golden's tensors. `logits_of` names the sequences whose logits are kept (None: all)."""
    out = {"layers": torch.tensor(layers, dtype=torch.int64)}

    def put(name: str, ids: list[int], prefix: list[int]):
        logits, states = forward(model, prefix + ids, layers)
        out[f"{name}.input_ids"] = torch.tensor(ids)
        out[f"{name}.features"] = states[:, -1]
        if logits_of is None or name in logits_of:
            out[f"{name}.logits"] = logits[-1]
        if prefix:
            logprobs = torch.log_softmax(logits.double(), dim=-1)
            rows = torch.arange(len(prefix) - 1, len(prefix) + len(ids) - 1)
            out[f"{name}.logprobs"] = logprobs[rows, torch.tensor(ids)]

    put("prompt", sequences.prompt, [])
    for index, candidate in enumerate(sequences.candidates):
        put(f"candidate.{index}", candidate, sequences.prompt)
    if sequences.single is not None:
        put("single", sequences.single, [])
        put("single.candidate", sequences.single_candidate, sequences.single)
    if sequences.full is not None:
        put("full", sequences.full, [])
    ids, lead = greedy(model, sequences.prompt, GREEDY_TOKENS)
    out["greedy.input_ids"] = torch.tensor(ids)
    out["greedy.lead"] = torch.tensor([lead])
    return out


def stored(golden: dict) -> dict:
    """The tensors in the types that the file has."""
    return {
        name: value.to(torch.uint32 if not value.is_floating_point() else torch.float32).contiguous()
        for name, value in golden.items()
        if name != "greedy.lead"
    }


def difference(ours: dict, theirs: dict) -> float:
    """The largest difference between two goldens, relative to each row's largest value."""
    worst = 0.0
    for name, value in theirs.items():
        if name.startswith("greedy.") or not value.is_floating_point():
            continue
        scale = value.double().abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
        worst = max(worst, ((ours[name].double() - value.double()).abs() / scale).max().item())
    return worst


def metadata(**facts: str) -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__, **facts}
