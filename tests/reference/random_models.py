"""Random weights, and what makes a model with random weights worth comparing with.

Before a model is kept, it must show that

  * float32 and float64 agree to well below the tests' tolerance (the model is well conditioned);
  * the greedy continuation is decided by clear leads, is not one token over and over, and does not
    meet the end token;
  * every mistake that its spec names (a setting ignored, a bias dropped) changes the outputs by far
    more than the tolerance (the tests would see that mistake).
"""

import copy
from typing import Callable

import torch

import golden
from families import CONTEXT

# tests/golden.rs allows 1e-4. The reference itself must be far better than that, and a mistake far worse.
CONDITION = 1e-5
VISIBLE = 1e-2
# The least lead of a greedy token over the next best, in logits whose scale is about 3.
LEAD = 5e-3


def randomise(model, generator: torch.Generator) -> None:
    """Weights at which every part of the model matters, and none drowns another."""
    config = model.config
    gemma = config.model_type.startswith("gemma")
    tied = config.tie_word_embeddings

    def normal(shape):
        return torch.randn(shape, generator=generator)

    # What the attention and the MLP add to the residual stream is several times the embeddings'
    # size: tied, these would otherwise predict the last token again for ever.
    gains = {"q_proj": 1.8, "k_proj": 1.8, "v_proj": 1.5, "down_proj": 2.0, "lm_head": 3.0}
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith("norm.weight"):
            # Gemma stores the distance from 1.
            value = 0.25 * normal(parameter.shape) + (0.0 if gemma else 1.0)
            if name == "model.norm.weight" and tied:
                value += 2.0
        elif name.endswith("embed_tokens.weight"):
            # Gemma multiplies embeddings by √hidden_size.
            scale = 0.35 / config.hidden_size**0.5 if gemma else 0.15 if tied else 0.4
            value = scale * normal(parameter.shape)
        elif name.endswith(".bias"):
            value = 0.4 * normal(parameter.shape)
        else:
            value = gains.get(name.split(".")[-2], 1.0) / parameter.shape[-1] ** 0.5 * normal(parameter.shape)
        parameter.data.copy_(value)


def draw_sequences(vocab_size: int, generator: torch.Generator) -> golden.Sequences:
    def ids(length: int) -> list[int]:
        return torch.randint(0, vocab_size, (length,), generator=generator).tolist()

    candidates = [ids(1), ids(2), ids(17), ids(40)]
    candidates[3][:5] = candidates[2][:5]  # two candidates that begin alike, then part
    return golden.Sequences(ids(37), candidates, full=ids(CONTEXT), single=ids(1), single_candidate=ids(9))


def with_mistake(model, edit: Callable):
    """The same weights under a config (or weights) with one mistake."""
    config = copy.deepcopy(model.config)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    edit(config, weights)
    tied = torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    config.tie_word_embeddings = tied
    wrong = type(model)._from_config(config, attn_implementation="eager").eval()
    wrong.load_state_dict(weights)
    return wrong


def verdict(model, double, result: dict, sequences: golden.Sequences, mistakes: dict) -> str | None:
    """Why this model is no good as a reference, or None; `double` is the model in float64."""
    layers = result["layers"].tolist()
    if (lead := result["greedy.lead"].item()) < LEAD:
        return f"a greedy token leads by only {lead:.1e}"
    if (distinct := len(set(result["greedy.input_ids"].tolist()))) < 6:
        return f"the greedy continuation has only {distinct} different tokens"
    ends = model.generation_config.eos_token_id
    if set(result["greedy.input_ids"].tolist()) & {ends}:
        return "the greedy continuation meets the end token"
    exact = golden.compute(double, sequences, layers)
    if (error := golden.difference(result, exact)) > CONDITION:
        return f"float32 and float64 differ by {error:.1e}"
    shown = {}
    for mistake, edit in mistakes.items():
        wrong = golden.compute(with_mistake(model, edit), sequences, layers)
        shown[mistake] = golden.difference(wrong, result)
        if shown[mistake] < VISIBLE:
            return f"'{mistake}' changes the outputs by only {shown[mistake]:.1e}"
    print(f"  float32 error {error:.1e}; greedy lead {lead:.1e}; mistakes show by", end=" ")
    print(", ".join(f"{name} {value:.2f}" for name, value in shown.items()))
    return None
