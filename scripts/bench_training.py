#!/usr/bin/env python3
"""Trains one ranker with `podium train` and with PyTorch, side by side, on synthetic features.

The shape is that of the paper's MBPP ranker: 374 groups of 100 candidates, hidden size 4096, bf16 on
disk, 20 passes. Both start with their own random weights, take the same steps (groups of a step,
candidates of a group, AdamW, the same schedule) and end with a loss on all groups that is computed
here, by the same code, from both rankers' files. Prints the seconds, the losses and the memory.
Multiply-adds are held against the machine's peak, as `podium bench` measures
it in the same round.

    scripts/bench_training.py --podium target/release/podium --folder /tmp/bench-training

Needs torch, numpy and safetensors.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
import train_ranker  # noqa: E402

CANDIDATES, HIDDEN_SIZE, LAYER = 100, 4096, 18


def make_collection(folder, groups, seed):
    """Features of noise, in which a direction says what is right."""
    (folder / "features").mkdir(parents=True)
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(HIDDEN_SIZE, generator=generator) / math.sqrt(HIDDEN_SIZE)
    labels = random.random((groups, CANDIDATES)) < 0.2
    candidates = torch.empty(groups * CANDIDATES, HIDDEN_SIZE, dtype=torch.bfloat16)
    for group in range(groups):
        x = torch.randn(CANDIDATES, HIDDEN_SIZE, generator=generator)
        x += 2 * torch.from_numpy(labels[group]).float()[:, None] * direction
        candidates[group * CANDIDATES : (group + 1) * CANDIDATES] = x.to(torch.bfloat16)
    prompts = torch.randn(groups, HIDDEN_SIZE, generator=generator).to(torch.bfloat16)
    tensors = {
        f"layer.{LAYER}.prompt": prompts,
        f"layer.{LAYER}.candidates": candidates,
        "offsets": torch.arange(groups + 1, dtype=torch.int64) * CANDIDATES,
    }
    save_file(tensors, folder / "features/00000.safetensors", metadata={"first_item": "0"})
    with open(folder / "candidates.jsonl", "w") as lines:
        for group in range(groups):
            line = {"id": str(group), "prompt": f"item {group}", "candidates": [""] * CANDIDATES}
            line["labels"] = labels[group].astype(int).tolist()
            lines.write(json.dumps(line) + "\n")
    info = {"format": 1, "task": "synthetic", "model": "none", "fingerprint": "none", "layers": 30}
    info |= {"hidden_size": HIDDEN_SIZE, "feature_layers": [LAYER], "dtype": "bf16", "items": groups}
    info |= {"n": CANDIDATES, "seed": seed, "sampling": {}, "data": "synthetic"}
    (folder / "collection.json").write_text(json.dumps(info))


def read_collection(folder):
    with safe_open(folder / "features/00000.safetensors", "pt") as file:
        prompts = file.get_tensor(f"layer.{LAYER}.prompt").float()
        candidates = file.get_tensor(f"layer.{LAYER}.candidates").float()
    lines = [json.loads(line) for line in open(folder / "candidates.jsonl")]
    labels = torch.tensor([line["labels"] for line in lines], dtype=torch.float32)
    return prompts, candidates.unflatten(0, (len(prompts), -1)), labels


def loss_of(config, weights, prompts, candidates, labels):
    scores = train_ranker.scores(config, weights, prompts, candidates)
    return -(labels / labels.sum(1, keepdim=True) * scores.log_softmax(1)).sum(1).mean()


def configuration(kind):
    config = {"hidden_size": HIDDEN_SIZE, "kind": kind, "projection_width": 64, "heads": 4}
    config |= {"feed_forward_width": 128, "relevance": "dot", "normalization": "standardized"}
    return config | {"extra_inputs": []}


def train_in_torch(folder, options):
    """The plain way: features widened and standardised once, then kept in memory."""
    started = time.monotonic()
    prompts, candidates, labels = read_collection(folder)
    config = configuration(options.kind)
    statistics = train_ranker.statistics_of(prompts, "prompt")
    statistics |= train_ranker.statistics_of(candidates.flatten(0, 1), "candidate")
    x_prompts = train_ranker.normalize(config, statistics, prompts, "prompt")
    x = train_ranker.normalize(config, statistics, candidates, "candidate")
    generator = torch.Generator().manual_seed(0)
    weights = train_ranker.initial_weights(config, generator)
    for tensor in weights.values():
        tensor.requires_grad_()
    decayed = [tensor for tensor in weights.values() if tensor.dim() == 2]
    others = [tensor for tensor in weights.values() if tensor.dim() != 2]
    parts = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(parts, lr=options.lr)
    steps = options.epochs * math.ceil(len(x) / options.batch)
    warm_up = max(1, steps // 10)

    def rate(step):
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * min(1, (step - warm_up) / max(1, steps - warm_up))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    read = time.monotonic() - started
    for _ in range(options.epochs):
        order = torch.randperm(len(x), generator=generator)
        for batch in order.split(options.batch):
            loss = loss_of(config, weights, x_prompts[batch], x[batch], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            schedule.step()
    seconds = time.monotonic() - started
    return {name: tensor.detach() for name, tensor in weights.items()} | statistics, seconds, read


def final_loss(folder, tensors, kind):
    prompts, candidates, labels = read_collection(folder)
    config = configuration(kind)
    with torch.no_grad():
        prompts = train_ranker.normalize(config, tensors, prompts, "prompt")
        candidates = train_ranker.normalize(config, tensors, candidates, "candidate")
        return loss_of(config, tensors, prompts, candidates, labels).item()


def run(command):
    """Standard output, seconds, seconds of all cores, and the largest resident memory in bytes."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    memory = 0
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                memory = max(memory, int(line.split()[1]) * 1024)
        time.sleep(0.02)
    seconds = time.monotonic() - started
    assert process.returncode == 0, f"{command} failed"
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = usage.ru_utime + usage.ru_stime
    cpu, run.before = cpu - run.before, cpu
    return process.stdout.read(), seconds, cpu, memory


run.before = 0.0


def fma_peak(podium, threads):
    """Multiply-adds that this machine can do, in operations a second, as `podium bench` measures them."""
    command = [podium, "bench", "--prompt-tokens", 16, "--n", 1, "--steps", 1, "--rounds", 1]
    command += ["--threads", threads, "--json"]
    report = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(report)["limits"]["fma_gflop_per_s"] * 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--podium", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kind", choices=["listwise", "pointwise"], default="listwise")
    parser.add_argument("--groups", type=int, default=374)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["podium", "torch"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = options.folder / "collection"
    if not data.exists():
        make_collection(data, options.groups, 0)
    features = (data / "features/00000.safetensors").stat().st_size
    print(f"{options.groups} groups x {CANDIDATES} x {HIDDEN_SIZE}, {options.epochs} passes, {features / 1e6:.0f} MB")
    # Forward and the projection's gradient, 2 operations a multiply-add; the block's share on top.
    rows = options.groups * (CANDIDATES + 1) * options.epochs
    block = 2 * 64 * 128 + (4 * 64 * 64 + 2 * (CANDIDATES + 1) * 64 if options.kind == "listwise" else 0)
    work = 2 * rows * (2 * HIDDEN_SIZE * 64 + 3 * block)
    output = options.folder / "ranker.safetensors"
    command = [options.podium, "train", data, "-o", output, "--kind", options.kind, "--loss", "listwise"]
    command += ["--epochs", options.epochs, "--batch", options.batch, "--group-size", CANDIDATES, "--dropout", 0]
    command += ["--validation", 0, "--learning-rate", options.lr, "--weight-decay", options.weight_decay]
    command += ["--extra-inputs", "none", "--threads", options.threads, "--json"]
    for _ in range(options.rounds):
        peak = fma_peak(options.podium, options.threads)
        if options.only != "torch":
            report, seconds, cpu, memory = run([*map(str, command)])
            with safe_open(output, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            loss = final_loss(data, tensors, options.kind)
            inside = json.loads(report)["seconds"]
            print(
                f"podium:  {seconds:.2f} s ({inside:.2f} s without start; {cpu:.2f} s on all cores), "
                f"{work / inside / 1e9:.0f} GFLOP/s of {peak / 1e9:.0f} ({work / inside / peak:.0%}), "
                f"loss {loss:.5f}, resident {memory / 1e6:.0f} MB ({memory / features:.2f} of the features)"
            )
        if options.only != "podium":
            before = time.process_time()
            tensors, seconds, read = train_in_torch(data, options)
            cpu = time.process_time() - before
            loss = final_loss(data, tensors, options.kind)
            print(
                f"PyTorch: {seconds:.2f} s ({read:.2f} s of it reading; {cpu:.2f} s on all cores), "
                f"{work / seconds / 1e9:.0f} GFLOP/s, {work / cpu / 1e9:.0f} a core, loss {loss:.5f}"
            )


if __name__ == "__main__":
    main()
