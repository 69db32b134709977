"""Small random-weight models of every family, and what transformers computes with them.

    models.py write [NAME...]   make tests/golden/models/NAME: the model and its golden.safetensors
    models.py check [NAME...]   recompute the goldens from the committed models, write nothing

Needs the packages of requirements.txt (torch on the CPU is enough). The SmolLM2 golden needs the
default model's GGUF besides: `--smollm2 FILE`; without it, it is left as it is.

A model is built, stored the way its `Spec` says, and *loaded again from the folder* before anything
is computed, so the golden belongs to the committed files as transformers reads them.
"""

import argparse
import copy
import json
import shutil
import sys
import zlib
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import families
import gguf_files
import gguf_models
import golden
import smollm2
from families import Spec
from random_models import CONDITION, draw_sequences, randomise, verdict

ROOT = Path(__file__).resolve().parent.parent / "golden" / "models"


def write_config(spec: Spec, folder: Path) -> None:
    """config.json in the asked form, from the one that transformers has just written."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if spec.form == 4:
        config["torch_dtype"] = config.pop("dtype")
        del config["rope_parameters"]
        config["transformers_version"] = "4.46.0"
        for key, value in spec.legacy.items():
            config.pop(key, None)
            if value is not ...:
                config[key] = value
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def write(spec: Spec, folder: Path) -> None:
    for attempt in range(50):
        generator = torch.Generator().manual_seed(zlib.crc32(spec.name.encode()) + attempt)
        config = copy.deepcopy(spec.config)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(model, generator)
        sequences = draw_sequences(config.vocab_size, generator)

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        model.to(spec.dtype).save_pretrained(folder, max_shard_size=spec.shard)
        write_config(spec, folder)

        model, layers = load(folder), list(range(1, config.num_hidden_layers + 1))
        result = golden.compute(model, sequences, layers)
        reason = verdict(model, load(folder, torch.float64), result, sequences, spec.mistakes)
        if reason is None:
            save_file(golden.stored(result), folder / "golden.safetensors", golden.metadata())
            return
        print(f"  seed +{attempt}: {reason}")
    sys.exit(f"{spec.name}: no seed gives a usable model")


def sequences_of(stored: dict) -> golden.Sequences:
    def ids(name: str) -> list[int] | None:
        value = stored.get(f"{name}.input_ids")
        return None if value is None else value.tolist()

    count = len([name for name in stored if name.startswith("candidate.") and name.endswith(".input_ids")])
    candidates = [ids(f"candidate.{index}") for index in range(count)]
    return golden.Sequences(ids("prompt"), candidates, ids("full"), ids("single"), ids("single.candidate"))


def check(model, path: Path) -> None:
    """Holds a committed golden against this machine's transformers and the committed model."""
    kept = load_file(path)
    logits_of = [name.removesuffix(".logits") for name in kept if name.endswith(".logits")]
    fresh = golden.stored(golden.compute(model, sequences_of(kept), kept["layers"].tolist(), logits_of))
    if fresh.keys() != kept.keys():
        sys.exit(f"{path}: has other tensors than the script makes: {sorted(fresh.keys() ^ kept.keys())}")
    if not torch.equal(fresh["greedy.input_ids"], kept["greedy.input_ids"]):
        sys.exit(f"{path}: another greedy continuation")
    if (error := golden.difference(fresh, kept)) > CONDITION:
        sys.exit(f"{path}: differs by {error:.1e}")
    print(f"  agrees to {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["write", "check"])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only models whose name begins so")
    parser.add_argument("--smollm2", type=Path, metavar="FILE", help="SmolLM2-135M-Instruct.Q4_1.gguf")
    arguments = parser.parse_intermixed_args()

    def wanted(name: str) -> bool:
        return not arguments.names or any(name.startswith(prefix) for prefix in arguments.names)

    transformers.utils.logging.disable_progress_bar()
    for spec in filter(lambda spec: wanted(spec.name), families.specs()):
        print(spec.name)
        folder = ROOT / spec.name
        if arguments.action == "write":
            write(spec, folder)
        else:
            check(load(folder), folder / "golden.safetensors")
    for spec in filter(lambda spec: wanted(spec.name), gguf_models.specs()):
        print(spec.name)
        folder = ROOT / spec.name
        if arguments.action == "write":
            gguf_models.write(spec, folder)
        else:
            check(gguf_files.load(folder / "model.gguf", spec.config), folder / "golden.safetensors")
    if arguments.smollm2 and wanted("smollm2"):
        print("smollm2")
        path = ROOT / "smollm2" / "golden.safetensors"
        if arguments.action == "write":
            smollm2.write(arguments.smollm2, path)
        else:
            check(gguf_files.load(arguments.smollm2), path)


if __name__ == "__main__":
    main()
