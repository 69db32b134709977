"""Runs Podium and its peers in turn, and writes the table and the plot of docs/BENCHMARKS.md.

Engines alternate within a round; a ratio is taken within a round, against the best that a peer does in
the same class of weights. A round in which the machine's own limits moved by more than a
fifth against the round before is run again, three times at most.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import engines
import models
from page import processor, write_docs

# Model, class of weights, forms.
CLASSES = [
    ("smollm2", "4 bit", ["q4_1"]),
    ("110m", "16 bit", ["bf16", "f16"]),
    ("110m", "8 bit", ["q8_0"]),
    ("110m", "32 bit", ["f32"]),
    ("1b", "16 bit", ["bf16", "f16"]),
    ("1b", "8 bit", ["q8_0"]),
]
TITLES = {"smollm2": "SmolLM2-135M", "110m": "random Llama of 110M", "1b": "random Llama of 1B (Llama-3.2-1B's shape)"}
TORCH_DTYPES = {"bf16": "bfloat16", "f32": "float32"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/peers",
        description="Podium beside llama.cpp and transformers, in turn, on one machine.",
        epilog="example: scripts/peers --models smollm2,110m --rounds 3 --no-torch",
    )
    parser.add_argument("--models", default="smollm2,110m,1b", help="of smollm2, 110m, 1b (default: all)")
    parser.add_argument("--classes", default="4,8,16,32", help="bits of the weights (default: 4,8,16,32)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--n", default="1,8,32,100", help="candidates (default: 1,8,32,100)")
    parser.add_argument("--prompt", default="512", help="tokens of the prompt, one or several (default: 512)")
    parser.add_argument("--steps", type=int, default=32, help="tokens a candidate decodes (default: 32)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all")
    parser.add_argument("--no-torch", action="store_true", help="leave transformers out")
    parser.add_argument("--json", type=Path, help="also write every round's figures here")
    for hidden in ["podium", "llama", "smollm2", "folder", "docs"]:
        parser.add_argument(f"--{hidden}", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def peers_of(options: argparse.Namespace, model: str, forms: list) -> dict:
    """Name of an engine to the function that runs one round of it."""
    found = {}
    for form in forms:
        path = models.file(model, form, options.smollm2, options.folder)
        found[f"podium {form}"] = lambda work, path=path: engines.podium(options.podium, path, work)
        found[f"llama.cpp {form}"] = lambda work, path=path: engines.llama_cpp(options.llama, path, work)
        found[f"llama-bench {form}"] = lambda work, path=path: engines.llama_bench(options.llama, path, work)
        # Its weights are read in float32 and take four bytes each: no room for the large model.
        if form in TORCH_DTYPES and model != "1b" and not options.no_torch:
            found[f"transformers {form}"] = engines.Transformers(path, TORCH_DTYPES[form], options.threads)
    return found


def limits_moved(before: dict, now: dict) -> bool:
    return any(abs(now[key] / before[key] - 1) > 0.2 for key in before)


def measure(options: argparse.Namespace, model: str, forms: list, prompt: int) -> list:
    """The rounds, each a dict of engine to its speeds."""
    peers = peers_of(options, model, forms)
    work = engines.Work(prompt, options.steps, [int(n) for n in options.n.split(",")], options.threads)
    rounds, repeats, before = [], 0, None
    while len(rounds) < options.rounds:
        started = time.monotonic()
        speeds = {name: engine(work) for name, engine in peers.items()}
        limits = next(speed["limits"] for speed in speeds.values() if "limits" in speed)
        if before and limits_moved(before, limits) and repeats < 3:
            repeats += 1
            say(f"  the machine's limits moved: {before} to {limits}; once more")
        else:
            rounds.append(speeds)
        before = limits
        say(f"  {model}, prompt {prompt}: round {len(rounds)} of {options.rounds}, {time.monotonic() - started:.0f} s")
    return rounds


def speed_of(speeds: dict, what) -> float | None:
    return speeds["prefill"] if what == "prefill" else speeds["decode"].get(what)


def best(one_round: dict, engine: str, what) -> float | None:
    """The highest speed of an engine's forms and programs; none where it was left out."""
    found = [speed_of(speeds, what) for name, speeds in one_round.items() if name.startswith(engine)]
    return max((speed for speed in found if speed), default=None)


def spread(values: list, digits: int) -> str:
    return f"{min(values):.{digits}f} / **{statistics.median(values):.{digits}f}** / {max(values):.{digits}f}"


def table(rounds: list, n: list, prompt: int) -> list:
    """Lines of Markdown: speeds of every engine (medians), then ratios and shares of the floor."""
    columns = ["prefill", *n]
    head = [f"prefill {prompt}", *(f"N = {count}" for count in n)]
    lines = ["| tokens/s | " + " | ".join(head) + " |", "| --- |" + " --- |" * len(head)]

    def row(title: str, cells: list) -> None:
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    for name in rounds[0]:
        cells = []
        for what in columns:
            found = [speed for one in rounds if (speed := speed_of(one[name], what))]
            cells.append(f"{statistics.median(found):.0f}" if found else "")
        row(name, cells)
    for peer, title in [("llama", "llama.cpp"), ("transformers", "transformers")]:
        if best(rounds[0], peer, "prefill"):
            ratios = [[best(one, "podium", what) / best(one, peer, what) for one in rounds] for what in columns]
            row(f"**Podium ÷ {title}** (least / median / most)", [spread(values, 2) for values in ratios])

    def share(one: dict, what) -> float:
        shares = []
        for name, speeds in one.items():
            if name.startswith("podium"):
                bound = speeds["prefill_floor"] if what == "prefill" else speeds["floors"][what]
                shares.append(speed_of(speeds, what) / bound)
        return 100 * max(shares)

    row("share of the machine's limit, %", [spread([share(one, what) for one in rounds], 0) for what in columns])
    return lines


def limits_line(rounds: list) -> str:
    limits = [speeds["limits"] for one in rounds for speeds in one.values() if "limits" in speeds]

    def span(key: str) -> str:
        values = [limit[key] for limit in limits]
        return f"{min(values):.0f} to {max(values):.0f}"

    return f"Limits in these rounds: read {span('read_gb_per_s')} GB/s, multiply-add {span('fma_gflop_per_s')} GFLOP/s."


def plot(path: Path, sections: list, n: list) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "podium"
    figure, axes = plt.subplots(1, len(sections), figsize=(4.2 * len(sections), 3.6), squeeze=False)
    for axis, (title, rounds) in zip(axes[0], sections):
        for name in rounds[0]:
            if name.startswith("llama-bench"):
                continue
            speeds = [statistics.median(one[name]["decode"][count] for one in rounds) for count in n]
            axis.plot(n, speeds, marker="o", label=name, linewidth=2.5 if name.startswith("podium") else 1.2)
        axis.set(title=title, xlabel="candidates N", xscale="log", yscale="log")
        axis.set_xticks(n, [str(count) for count in n])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("tokens/s of all candidates")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    options = arguments()
    n = [int(count) for count in options.n.split(",")]
    chosen = [
        (model, bits, forms)
        for model, bits, forms in CLASSES
        if model in options.models.split(",") and bits.split()[0] in options.classes.split(",")
    ]
    if not chosen:
        sys.exit("error: no model of --models has weights of --classes; see --help")
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {options.threads} threads of {processor()}, {options.rounds} rounds; medians.",
    ]
    sections, everything = [], []
    for model, bits, forms in chosen:
        for prompt in map(int, options.prompt.split(",")):
            say(f"{TITLES[model]}, {bits}, prompt of {prompt}")
            rounds = measure(options, model, forms, prompt)
            everything.append(dict(model=model, weights=bits, prompt=prompt, rounds=rounds))
            part = table(rounds, n, prompt)
            lines += ["", f"### {TITLES[model]}, weights of {bits}", "", *part, "", limits_line(rounds)]
            sections.append((f"{TITLES[model].split(' (')[0]}, {bits}", rounds))
            print("\n".join(part), flush=True)
            if options.json:
                options.json.write_text(json.dumps(everything, indent=1))
    plot(options.docs / "figures" / "peers.svg", sections, n)
    lines += ["", "![tokens per second over N, Podium and its peers](figures/peers.svg)"]
    write_docs(options.docs / "BENCHMARKS.md", "scripts/peers", lines)
    say(f"written: {options.docs / 'BENCHMARKS.md'}")


if __name__ == "__main__":
    main()
