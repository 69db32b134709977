#!/usr/bin/env python3
"""Writes tests/golden/ranker: small rankers with random weights, and their scores by PyTorch.

The files are written by scripts/train_ranker.py; the scores are computed apart from it, in float64,
with PyTorch's own modules (`nn.TransformerEncoderLayer`, `nn.LayerNorm`, `F.cosine_similarity`).

    python tests/reference/ranker.py        (torch 2.15, safetensors 0.8)
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import train_ranker  # noqa: E402

GOLDEN = ROOT / "tests/golden/ranker"
HIDDEN_SIZE, WIDTH, HEADS, FEED_FORWARD, CANDIDATES = 40, 32, 4, 48, 11
# The residual stream has a few coordinates of this size.
HUGE = {5: 1000.0, 23: -640.0}


def config(name, kind, normalization, extra_inputs, relevance=None):
    config = {
        "format_version": 1,
        "name": name,
        "kind": kind,
        "hidden_size": HIDDEN_SIZE,
        "layer": 18,
        "layers": 30,
        "feature_position": "last_token",
        "normalization": normalization,
        "extra_inputs": extra_inputs,
        "model_name": "golden",
        "model_fingerprint": "golden",
        "training": {"data": "random"},
    }
    if kind != "linear":
        config |= {"projection_width": WIDTH, "feed_forward_width": FEED_FORWARD, "relevance": relevance}
    if kind == "listwise":
        config["heads"] = HEADS
    return config


def block(w):
    """`nn.TransformerEncoderLayer` with a listwise ranker's weights."""
    gelu = lambda x: F.gelu(x, approximate="tanh")
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, FEED_FORWARD, dropout=0.0, activation=gelu, batch_first=True, norm_first=True
    )
    names = {
        "self_attn.in_proj": "attention.qkv",
        "self_attn.out_proj": "attention.output",
        "linear1": "feed_forward.up",
        "linear2": "feed_forward.down",
        "norm1": "attention.norm",
        "norm2": "feed_forward.norm",
    }
    state = {}
    for theirs, ours in names.items():
        joint = "_" if theirs.endswith("in_proj") else "."
        state[f"{theirs}{joint}weight"] = w[f"{ours}.weight"].t()
        state[f"{theirs}{joint}bias"] = w[f"{ours}.bias"]
    layer.load_state_dict(state)
    return layer.double().train()  # evaluation mode would take a fused path


def expected_scores(config, w, prompt, candidates, extra):
    if config["normalization"] == "standardized":
        if config["kind"] != "linear":
            prompt = (prompt - w["normalization.prompt.mean"]) / w["normalization.prompt.scale"]
        candidates = (candidates - w["normalization.candidate.mean"]) / w["normalization.candidate.scale"]
    elif config["normalization"] == "rms":
        prompt = F.rms_norm(prompt, (HIDDEN_SIZE,), eps=1e-6)
        candidates = F.rms_norm(candidates, (HIDDEN_SIZE,), eps=1e-6)
    if config["extra_inputs"]:
        extra = torch.stack([extra[name] for name in config["extra_inputs"]], 1)
        extra = (extra - w["normalization.extra.mean"]) / w["normalization.extra.scale"]
        candidates = torch.cat([candidates, extra], 1)
    if config["kind"] == "linear":
        return F.linear(candidates, w["linear.weight"][None], w["linear.bias"])[:, 0]
    prompt = torch.cat([prompt, prompt.new_zeros(len(config["extra_inputs"]))])
    x = F.linear(torch.cat([prompt[None], candidates]), w["projection.weight"].T)
    if config["kind"] == "listwise":
        x = block(w)(x[None])[0]
    else:
        normed = F.layer_norm(x, (WIDTH,), w["feed_forward.norm.weight"], w["feed_forward.norm.bias"])
        inner = F.gelu(F.linear(normed, w["feed_forward.up.weight"].T, w["feed_forward.up.bias"]), approximate="tanh")
        x = x + F.linear(inner, w["feed_forward.down.weight"].T, w["feed_forward.down.bias"])
    if config["relevance"] == "cosine":
        return F.cosine_similarity(x[:1], x[1:]) / w["relevance.temperature"]
    return x[1:] @ x[0] / WIDTH**0.5


@torch.no_grad()
def main():
    torch.manual_seed(20251021)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    features = torch.randn(CANDIDATES + 1, HIDDEN_SIZE)
    for coordinate, value in HUGE.items():
        features[:, coordinate] = value * (1 + 0.05 * features[:, coordinate])
    prompt, candidates = features[0], features[1:]
    extra = {"mean_logprob": -2 * torch.rand(CANDIDATES), "length": torch.randint(1, 40, (CANDIDATES,)).float()}
    cases = {"prompt": prompt.clone(), "candidates": candidates.clone(), **extra}
    for config_ in [
        config("listwise", "listwise", "standardized", ["mean_logprob"], "dot"),
        config("listwise_cosine", "listwise", "none", ["length", "mean_logprob"], "cosine"),
        config("pointwise", "pointwise", "rms", [], "cosine"),
        config("linear", "linear", "standardized", ["length"]),
    ]:
        name = config_["name"]
        weights = train_ranker.initial_weights(config_, torch.Generator().manual_seed(1))
        for key, tensor in weights.items():
            if tensor.dim() == 1 and key != "relevance.temperature":
                tensor += 0.3 * torch.randn_like(tensor)
        if config_["normalization"] == "standardized":
            for of in ["prompt", "candidate"] if config_["kind"] != "linear" else ["candidate"]:
                weights |= train_ranker.statistics_of(candidates + 0.1 * torch.randn_like(candidates), of)
        if config_["extra_inputs"]:
            stacked = torch.stack([extra[key] for key in config_["extra_inputs"]], 1)
            weights |= train_ranker.statistics_of(stacked, "extra")
        exact = {key: tensor.double() for key, tensor in weights.items()}
        extra64 = {key: tensor.double() for key, tensor in extra.items()}
        cases[f"scores.{name}"] = expected_scores(config_, exact, prompt.double(), candidates.double(), extra64).float()
        train_ranker.save_ranker(GOLDEN / f"{name}.safetensors", config_, weights)
    save_file(cases, GOLDEN / "cases.safetensors")


if __name__ == "__main__":
    main()
