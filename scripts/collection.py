"""Reads and writes collections, the folders that `podium collect` makes (src/tasks/collection/mod.rs)."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


class Collection:
    """`info`: collection.json; `lines`: candidates.jsonl."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.info = json.loads((self.folder / "collection.json").read_text())
        with open(self.folder / "candidates.jsonl") as file:
            self.lines = [json.loads(line) for line in file]
        wanted = self.info["items"]
        assert len(self.lines) == wanted, f"{folder}: {len(self.lines)} of {wanted} items: go on collecting"

    def features(self, layer):
        """For each item its prompt's state [d] and its candidates' [n, d], as they are stored."""
        has = self.info["feature_layers"]
        assert layer in has, f"{self.folder}: features of layers {has}, not {layer}"
        found = []
        for shard in sorted((self.folder / "features").glob("*.safetensors")):
            with safe_open(shard, "pt") as file:
                prompts = file.get_tensor(f"layer.{layer}.prompt")
                candidates = file.get_tensor(f"layer.{layer}.candidates")
                offsets = file.get_tensor("offsets").tolist()
            found += [(p, candidates[a:b]) for p, a, b in zip(prompts, offsets, offsets[1:])]
        assert len(found) == len(self.lines), f"{self.folder}: features of {len(found)} items, {len(self.lines)} lines"
        return found

    def write(self, folder, items, change=lambda line: line, name=None, layers=None):
        """Some of the items as a collection of their own, in one shard; `change` may relabel a line."""
        folder = Path(folder)
        (folder / "features").mkdir(parents=True, exist_ok=True)
        layers = layers or self.info["feature_layers"]
        offsets, tensors = [0], {}
        for item in items:
            offsets.append(offsets[-1] + len(self.lines[item]["labels"]))
        tensors["offsets"] = torch.tensor(offsets, dtype=torch.int64)
        for layer in layers:
            features = self.features(layer)
            tensors[f"layer.{layer}.prompt"] = torch.stack([features[item][0] for item in items])
            tensors[f"layer.{layer}.candidates"] = torch.cat([features[item][1] for item in items])
        save_file(tensors, folder / "features/00000.safetensors", metadata={"first_item": "0"})
        with open(folder / "candidates.jsonl", "w") as file:
            for item in items:
                file.write(json.dumps(change(self.lines[item])) + "\n")
        info = {**self.info, "items": len(items), "feature_layers": layers}
        info["task"] = name or info["task"]
        (folder / "collection.json").write_text(json.dumps(info) + "\n")
