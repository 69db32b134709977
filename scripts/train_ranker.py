#!/usr/bin/env python3
"""Trains a ranker in PyTorch: the reference that other trainers are held against.

Reads collections, the folders that `podium collect` writes, and writes a ranker's file and its
best-of-N accuracy on test items whose `key` (or prompt) does not occur in training. `podium train`
does the same, faster; this is for whoever wants to change the method. docs/RANKER.md has the formulas
and the file format.

    scripts/train_ranker.py --train data/gcd/train --test data/gcd/test --kind pointwise \\
        --extra-inputs mean_logprob -o gcd.safetensors

Needs torch, numpy and safetensors.
"""

import argparse
import json
import math
import os
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from collection import Collection
from safetensors.torch import save

MAX_PARAMETERS = 500_000


# ---------------------------------------------------------------- the ranker


def tensor_shapes(config):
    """Learned tensors by name; matrices are [inputs, outputs]."""
    inputs = config["hidden_size"] + len(config["extra_inputs"])
    if config["kind"] == "linear":
        return {"linear.weight": [inputs], "linear.bias": [1]}
    w, f = config["projection_width"], config["feed_forward_width"]
    shapes = {"projection.weight": [inputs, w]}
    if config["kind"] == "listwise":
        shapes |= {"attention.norm.weight": [w], "attention.norm.bias": [w]}
        shapes |= {"attention.qkv.weight": [w, 3 * w], "attention.qkv.bias": [3 * w]}
        shapes |= {"attention.output.weight": [w, w], "attention.output.bias": [w]}
    shapes |= {"feed_forward.norm.weight": [w], "feed_forward.norm.bias": [w]}
    shapes |= {"feed_forward.up.weight": [w, f], "feed_forward.up.bias": [f]}
    shapes |= {"feed_forward.down.weight": [f, w], "feed_forward.down.bias": [w]}
    if config["relevance"] == "cosine":
        shapes["relevance.temperature"] = [1]
    return shapes


def initial_weights(config, generator):
    weights = {}
    for name, shape in tensor_shapes(config).items():
        if name == "relevance.temperature":
            weights[name] = torch.full(shape, 0.1)
        elif name.endswith("norm.weight"):
            weights[name] = torch.ones(shape)
        elif name.endswith(".bias") or name == "linear.weight":
            weights[name] = torch.zeros(shape)
        else:
            weights[name] = torch.randn(shape, generator=generator) / math.sqrt(shape[0])
    return weights


def normalize(config, statistics, x, of):
    """Features as they enter the projection."""
    if config["normalization"] == "rms":
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    if config["normalization"] == "standardized":
        return (x - statistics[f"normalization.{of}.mean"]) / statistics[f"normalization.{of}.scale"]
    return x


def scores(config, weights, prompt, candidates):
    """Scores [B, N] of normalised features: prompt [B, d], candidates [B, N, d + extra inputs]."""
    if config["kind"] == "linear":
        return candidates @ weights["linear.weight"] + weights["linear.bias"]
    width = config["projection_width"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    prompt = F.pad(prompt, (0, len(config["extra_inputs"])))
    x = torch.cat([prompt[:, None], candidates], 1) @ weights["projection.weight"]
    if config["kind"] == "listwise":
        heads = lambda t: t.unflatten(-1, (config["heads"], -1)).transpose(1, 2)
        q, k, v = (heads(t) for t in linear(norm(x, "attention.norm"), "attention.qkv").chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(attended, "attention.output")
    inner = F.gelu(linear(norm(x, "feed_forward.norm"), "feed_forward.up"), approximate="tanh")
    x = x + linear(inner, "feed_forward.down")
    prompt, candidates = x[:, :1], x[:, 1:]
    if config["relevance"] == "cosine":
        return F.cosine_similarity(prompt, candidates, -1) / weights["relevance.temperature"]
    return (prompt * candidates).sum(-1) / math.sqrt(width)


def save_ranker(path, config, tensors):
    """Writes the file whole or not at all."""
    parameters = sum(t.numel() for name, t in tensors.items() if not name.startswith("normalization."))
    assert parameters < MAX_PARAMETERS, f"{parameters} parameters; a ranker has fewer than {MAX_PARAMETERS}"
    tensors = {name: t.detach().float().contiguous() for name, t in tensors.items()}
    part = Path(f"{path}.part")
    part.write_bytes(save(tensors, metadata={"podium.ranker": json.dumps(config)}))
    os.replace(part, path)


# ---------------------------------------------------------------- data


class Group:
    """One item: its prompt's feature, its candidates' features, labels and numbers."""

    def __init__(self, line, prompt, candidates, extra_inputs):
        self.id = line["id"]
        self.key = line.get("key") or json.dumps(line.get("prompt") or line.get("messages"))
        self.prompt, self.candidates = prompt, candidates
        self.labels = torch.tensor(line["labels"], dtype=torch.float32)
        assert len(self.labels) == len(candidates), f"{self.id}: {len(self.labels)} labels, {len(candidates)} features"
        self.extra = torch.tensor([line[name] for name in extra_inputs]).T.reshape(len(candidates), -1).float()
        self.mean_logprob, self.answers = line.get("mean_logprob"), line.get("answers")
        # Where no candidate has an answer, answers mean nothing.
        if self.answers and not any(self.answers):
            self.answers = None


def read(folders, layer, extra_inputs):
    """Groups of all folders with the features after one layer (default: of those that were collected
    the one closest to 0.6 of the way up), and what the folders say of the model."""
    groups, about = [], {}
    for collection in map(Collection, folders):
        info = collection.info
        layer = layer or min(info["feature_layers"], key=lambda l: abs(l - round(0.6 * info["layers"])))
        model = {name: info[name] for name in ("model", "fingerprint", "layers", "hidden_size")}
        assert not about or model.items() <= about.items(), f"{collection.folder}: made by another model"
        about = {**model, "task": info["task"], "layer": layer}
        for line, (prompt, candidates) in zip(collection.lines, collection.features(layer)):
            groups.append(Group(line, prompt.float(), candidates.float(), extra_inputs))
    return groups, about


def statistics_of(x, name):
    scale = x.std(0, unbiased=False)
    # A coordinate that never changes says nothing: it becomes zero.
    constant = scale <= 1e-6 * x.abs().amax(0).clamp(min=1e-3)
    return {f"normalization.{name}.mean": x.mean(0), f"normalization.{name}.scale": scale.masked_fill(constant, 1.0)}


def prepare(config, statistics, groups):
    """Normalises every group once, before training."""
    for group in groups:
        group.x_prompt = group.prompt
        if config["kind"] != "linear":
            group.x_prompt = normalize(config, statistics, group.prompt, "prompt")
        group.x = normalize(config, statistics, group.candidates, "candidate")
        if config["extra_inputs"]:
            extra = (group.extra - statistics["normalization.extra.mean"]) / statistics["normalization.extra.scale"]
            group.x = torch.cat([group.x, extra], 1)


# ---------------------------------------------------------------- training


def train(config, groups, validation, options):
    """AdamW on groups of random candidates; returns the weights that did best on validation."""
    generator = torch.Generator().manual_seed(options.seed)
    weights = initial_weights(config, generator)
    # Under binary cross-entropy it carries how rare right answers are. Ranking does not need it.
    offset = torch.zeros(1)
    learned = [*weights.values(), offset]
    for tensor in learned:
        tensor.requires_grad_()
    if options.loss == "listwise":
        groups = [group for group in groups if 0 < group.labels.sum() < len(group.labels)]
    decayed = [tensor for name, tensor in weights.items() if tensor.dim() == 2 or name == "linear.weight"]
    others = [tensor for tensor in learned if all(tensor is not other for other in decayed)]
    parts = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(parts, lr=options.lr)
    steps = options.epochs * math.ceil(len(groups) / options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps, pct_start=0.1)
    best, best_weights, best_epoch = -1.0, None, 0
    for epoch in range(options.epochs):
        order = torch.randperm(len(groups), generator=generator).tolist()
        for start in range(0, len(order), options.batch):
            batch = [groups[i] for i in order[start : start + options.batch]]
            n = int(torch.randint(options.min_candidates, options.max_candidates + 1, (1,), generator=generator))
            n = min(n, *(len(group.labels) for group in batch)) if len(batch) > 1 else min(n, len(batch[0].labels))
            chosen = [torch.randperm(len(group.labels), generator=generator)[:n] for group in batch]
            prompt = torch.stack([group.x_prompt for group in batch])
            x = F.dropout(torch.stack([group.x[i] for group, i in zip(batch, chosen)]), options.dropout)
            labels = torch.stack([group.labels[i] for group, i in zip(batch, chosen)])
            found = scores(config, weights, prompt, x)
            if options.loss == "listwise":
                total = labels.sum(1, keepdim=True)
                useful = ((total > 0) & (total < n))[:, 0]
                if not useful.any():
                    continue
                loss = -(labels / total.clamp(min=1e-6) * found.log_softmax(1)).sum(1)[useful].mean()
            else:
                loss = F.binary_cross_entropy_with_logits(found + offset, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                if "relevance.temperature" in weights:
                    weights["relevance.temperature"].clamp_(min=0.01)
        accuracy = validate(config, weights, validation)
        if accuracy > best:
            best, best_epoch = accuracy, epoch
            best_weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, validation {accuracy:.4f}, best {best:.4f}", flush=True)
        if epoch - best_epoch >= options.patience:
            break
    return best_weights, {"validation_accuracy": best, "best_epoch": best_epoch + 1}


@torch.no_grad()
def score_groups(config, weights, groups):
    return [scores(config, weights, g.x_prompt[None], g.x[None])[0].numpy() for g in groups]


def validate(config, weights, groups):
    """Best-of-n accuracy, averaged over n = 2, 4, .. : smoother than that of the whole pool alone."""
    ns = powers_of_two(min(len(group.labels) for group in groups))[1:] or [1]
    found = score_groups(config, weights, groups)
    return float(np.mean([best_of(s, g.labels.numpy(), ns) for s, g in zip(found, groups)]))


# ---------------------------------------------------------------- evaluation


def powers_of_two(pool):
    """1, 2, 4, .. and the pool's size."""
    return [1 << i for i in range(pool.bit_length()) if 1 << i < pool] + [pool]


def best_of(score, labels, ns):
    """Expected label of the best-scored of n candidates drawn from the pool, without bias: the
    candidate with r others below it is the best of C(r, n - 1) of the C(N, n) subsets. Equal scores
    share their labels."""
    pool = len(labels)
    order = np.argsort(score, kind="stable")
    labels, score = np.asarray(labels, float)[order], np.asarray(score)[order]
    for value in np.unique(score):
        labels[score == value] = labels[score == value].mean()
    return [sum(math.comb(r, n - 1) * labels[r] for r in range(pool)) / math.comb(pool, n) for n in ns]


def oracle(labels, ns):
    wrong, pool = int((np.asarray(labels) < 0.5).sum()), len(labels)
    return [1 - math.comb(wrong, n) / math.comb(pool, n) for n in ns]


def majority(answers, labels, ns, random, samples=100):
    """Label of the most frequent answer (the first to come among equals), over random subsets."""
    total = np.zeros(len(ns))
    for _ in range(samples):
        order = random.permutation(len(labels))
        for i, n in enumerate(ns):
            counts = Counter(answers[c] for c in order[:n] if answers[c])
            # Equal counts stay in the order of their first occurrence.
            winner = max(counts, key=counts.get, default=None)
            total[i] += labels[next(c for c in order[:n] if winner is None or answers[c] == winner)]
    # The majority of one is that one; no need to sample.
    return [float(np.mean(labels)) if n == 1 else t / samples for n, t in zip(ns, total.tolist())]


def answer_prior(groups):
    """How often each answer's text was right in training, drawn to the mean where it is rare."""
    right, count = defaultdict(float), Counter()
    for group in groups:
        for answer, label in zip(group.answers, group.labels.tolist()):
            right[answer] += label
            count[answer] += 1
    mean = sum(right.values()) / max(1, sum(count.values()))
    return lambda answer: (right.get(answer, 0.0) + mean) / (count[answer] + 1)


def evaluate(config, weights, training, test, seed):
    """Accuracy of every strategy for each N, with 95 % bootstrap intervals over the items."""
    pool = min(len(group.labels) for group in test)
    ns = powers_of_two(pool)
    random = np.random.default_rng(seed)
    labels = [group.labels.numpy() for group in test]
    found = score_groups(config, weights, test)
    table = {"oracle": [oracle(y, ns) for y in labels]}
    table["first"] = [[float(y.mean())] * len(ns) for y in labels]
    if all(group.answers for group in test):
        table["majority"] = [majority(g.answers, y, ns, random) for g, y in zip(test, labels)]
    if all(group.mean_logprob for group in test):
        table["mean log-probability"] = [best_of(g.mean_logprob, y, ns) for g, y in zip(test, labels)]
    if all(group.answers for group in test + training):
        prior = answer_prior(training)
        table["answer prior (control)"] = [best_of([*map(prior, g.answers)], y, ns) for g, y in zip(test, labels)]
    table["ranker"] = [best_of(s, y, ns) for s, y in zip(found, labels)]
    resampled = random.integers(0, len(test), (2000, len(test)))
    strategies = {}
    for name, rows in table.items():
        rows = np.array(rows)
        low, high = np.percentile(rows[resampled].mean(1), [2.5, 97.5], axis=0)
        mean = rows.mean(0)
        strategies[name] = {"accuracy": mean.tolist(), "low": low.tolist(), "high": high.tolist()}
    return {"n": ns, "items": len(test), "strategies": strategies}


def markdown(metrics):
    lines = ["| accuracy of the chosen one of N | " + " | ".join(map(str, metrics["n"])) + " |"]
    lines.append("| --- |" + " --- |" * len(metrics["n"]))
    for name, s in metrics["strategies"].items():
        cells = [f"{a:.3f} [{l:.3f}, {h:.3f}]" for a, l, h in zip(s["accuracy"], s["low"], s["high"])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", nargs="+", required=True, help="folders of training items")
    add("--test", nargs="+", required=True, help="folders of test items")
    add("-o", "--output", required=True, help="the ranker's file; metrics go beside it as .json")
    add("--name", help="default: the file's stem")
    add("--task", help="default: the collection's")
    add("--layer", type=int, help="default: the collected one closest to 0.6 of the way up")
    add("--kind", choices=["listwise", "pointwise", "linear"], default="pointwise")
    add("--loss", choices=["listwise", "binary"], help="default: listwise for that kind, else binary")
    add("--extra-inputs", nargs="*", choices=["mean_logprob", "length"], default=[])
    add("--normalization", choices=["none", "rms", "standardized"], default="standardized")
    add("--relevance", choices=["dot", "cosine"], default="dot")
    add("--projection-width", type=int, default=64)
    add("--heads", type=int, default=4)
    add("--feed-forward-width", type=int, default=128)
    add("--epochs", type=int, default=60)
    add("--patience", type=int, default=20, help="epochs without a better validation accuracy")
    add("--batch", type=int, default=16, help="groups a step")
    add("--min-candidates", type=int, default=8)
    add("--max-candidates", type=int, default=32)
    add("--lr", type=float, default=1e-3)
    add("--weight-decay", type=float, default=1.0, help="of matrices")
    add("--dropout", type=float, default=0.5, help="of normalised candidate features")
    add("--validation", type=float, default=0.15, help="part of the training items")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1, help="steps are small: more gain little")
    return parser.parse_args()


def main():
    options = arguments()
    options.loss = options.loss or ("listwise" if options.kind == "listwise" else "binary")
    torch.set_num_threads(options.threads)
    training, about = read(options.train, options.layer, options.extra_inputs)
    test, _ = read(options.test, about["layer"], options.extra_inputs)

    config = {
        "format_version": 1,
        "name": options.name or Path(options.output).stem,
        "kind": options.kind,
        "task": options.task or about["task"],
        "hidden_size": about["hidden_size"],
        "layer": about["layer"],
        "layers": about["layers"],
        "feature_position": "last_token",
        "normalization": options.normalization,
        "extra_inputs": options.extra_inputs,
        "model_name": about["model"],
        "model_fingerprint": about["fingerprint"],
    }
    if options.kind != "linear":
        for field in ("projection_width", "feed_forward_width", "relevance"):
            config[field] = getattr(options, field)
    if options.kind == "listwise":
        config["heads"] = options.heads

    keys = {group.key for group in training}
    fresh = [group for group in test if group.key not in keys]
    print(f"{len(training)} training items; {len(fresh)} test items, {len(test) - len(fresh)} more are in training")
    assert fresh, "every test item occurs in training"
    # Items of one key stay on one side of the split.
    shuffled = np.random.default_rng(options.seed).permutation(sorted(keys))
    held_out = set(shuffled[: math.ceil(len(keys) * options.validation)])
    validation = [group for group in training if group.key in held_out]
    fitted = [group for group in training if group.key not in held_out]

    statistics = {}
    if options.normalization == "standardized":
        if options.kind != "linear":
            statistics |= statistics_of(torch.stack([group.prompt for group in fitted]), "prompt")
        statistics |= statistics_of(torch.cat([group.candidates for group in fitted]), "candidate")
    if options.extra_inputs:
        statistics |= statistics_of(torch.cat([group.extra for group in fitted]), "extra")
    prepare(config, statistics, training + fresh)

    started = time.monotonic()
    torch.manual_seed(options.seed)
    weights, result = train(config, fitted, validation, options)
    seconds = time.monotonic() - started
    metrics = {**evaluate(config, weights, fitted, fresh, options.seed), **result}
    recipe = ["train", "loss", "epochs", "batch", "min_candidates", "max_candidates", "lr", "weight_decay"]
    recipe += ["dropout", "validation", "seed", "patience"]
    config["training"] = {name: getattr(options, name) for name in recipe}
    config["training"] |= {"items": len(fitted), "validation_items": len(validation), "seconds": round(seconds, 1)}
    config["metrics"] = metrics
    save_ranker(options.output, config, weights | statistics)
    Path(options.output).with_suffix(".json").write_text(json.dumps(config, indent=1) + "\n")
    parameters = sum(tensor.numel() for tensor in weights.values())
    print(f"\n{options.kind}, {parameters} parameters, trained in {seconds:.0f} s, {len(fresh)} test items\n")
    print(markdown(metrics))


if __name__ == "__main__":
    main()
