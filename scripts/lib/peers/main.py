"""Runs Podium and its peers in turn, and writes the table and the plot of docs/BENCHMARKS.md.

Engines alternate within a round; a ratio is taken within a round, against the best that a peer does in
the same class of weights. A round in which the machine's own limits moved by more than a
fifth against the round before is run again, three times at most.

Rounds are kept in a file as they are done. A run takes what is missing of the rounds that it was asked
for, so a long measurement can be had in pieces.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import engines
from page import processor, replace, write_docs

# Model, class of weights, forms.
CLASSES = [
    ("smollm2", "4 bit", ["q4_1"]),
    ("110m", "16 bit", ["bf16", "f16"]),
    ("110m", "8 bit", ["q8_0"]),
    ("110m", "4 bit", ["q4_0"]),
    ("110m", "32 bit", ["f32"]),
    ("1b", "16 bit", ["bf16", "f16"]),
    ("1b", "8 bit", ["q8_0"]),
    ("1b", "4 bit", ["q4_0"]),
]
TITLES = {"smollm2": "SmolLM2-135M", "110m": "Llama of 110M", "1b": "Llama of 1B"}
# Tokens that a candidate decodes: of the large model fewer tell as much.
STEPS = {"smollm2": 32, "110m": 32, "1b": 8}
TORCH_DTYPES = {"bf16": "bfloat16", "f32": "float32"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/peers",
        description="Podium beside llama.cpp and transformers, in turn, on one machine.",
        epilog="example: scripts/peers --models smollm2,110m --rounds 3 --no-torch",
    )
    parser.add_argument("--models", default="smollm2,110m,1b", help="of smollm2, 110m, 1b (default: all)")
    parser.add_argument("--classes", default="4,8,16", help="bits of the weights, of 4, 8, 16, 32 (default: 4,8,16)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--n", default="1,8,32,100", help="candidates (default: 1,8,32,100)")
    parser.add_argument("--prompt", default="512", help="tokens of the prompt, one or several (default: 512)")
    parser.add_argument("--steps", type=int, help="tokens a candidate decodes (default: 32, and 8 of the 1B model)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all")
    parser.add_argument(
        "--isa",
        choices=list(SECTIONS),
        default="native",
        help="avx2: all engines as on a processor with AVX2, FMA and F16C and nothing newer; "
        "avx-vnni: and with AVX-VNNI (default: native)",
    )
    parser.add_argument("--no-torch", action="store_true", help="leave transformers out")
    parser.add_argument(
        "--forms", help="only these of a class's forms, for every engine: bf16, f16, ... (default: all, the best counts)"
    )
    parser.add_argument("--slice", type=float, metavar="SECONDS", help="begin no round after that; run again to go on")
    parser.add_argument("--fresh", action="store_true", help="forget the rounds that were kept of what is measured now")
    parser.add_argument("--write-only", action="store_true", help="measure nothing: write the page from what is kept")
    for hidden in ["podium", "llama", "smollm2", "folder", "docs", "results"]:
        parser.add_argument(f"--{hidden}", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Results:
    """The rounds of every measurement, in a file that each round replaces."""

    def __init__(self, path: Path):
        self.path = path
        self.all = json.loads(path.read_text()) if path.exists() else []

    def of(self, key: dict) -> list:
        """The rounds of a measurement, to be added to."""
        found = next((one for one in self.all if one["key"] == key), None)
        if found is None:
            found = {"key": key, "rounds": []}
            self.all.append(found)
        return found["rounds"]

    def save(self) -> None:
        replace(self.path, json.dumps(self.all, indent=1))


def peers_of(options: argparse.Namespace, model: str, forms: list) -> dict:
    """Name of an engine to the function that runs one round of it."""
    # Wants packages that are installed for a measurement, and not for --help.
    import models

    isa = options.isa if options.isa != "native" else None
    found = {}
    for form in forms:
        path = models.file(model, form, options.smollm2, options.folder)
        found[f"podium {form}"] = lambda work, path=path: engines.podium(options.podium, path, work, isa)
        found[f"llama.cpp {form}"] = lambda work, path=path: engines.llama_cpp(options.llama, path, work)
        found[f"llama-bench {form}"] = lambda work, path=path: engines.llama_bench(options.llama, path, work)
        # Its weights are read in float32 and take four bytes each: no room for the large model.
        if form in TORCH_DTYPES and model != "1b" and not options.no_torch:
            found[f"transformers {form}"] = engines.Transformers(path, TORCH_DTYPES[form], options.threads, isa)
    return found


def limits_moved(before: dict, now: dict) -> bool:
    return any(abs(now[key] / before[key] - 1) > 0.2 for key in before)


def limits_of(one_round: dict) -> dict:
    return next(speeds["limits"] for speeds in one_round.values() if "limits" in speeds)


def measure(options: argparse.Namespace, results: Results, key: dict, forms: list, until: float) -> None:
    """Adds the rounds that are missing, each a dict of engine to its speeds."""
    rounds = results.of(key)
    if options.fresh:
        rounds.clear()
    if len(rounds) >= options.rounds or time.monotonic() > until:
        return
    say(f"{TITLES[key['model']]}, {key['weights']}, prompt of {key['prompt']}, {key['isa']}")
    peers = peers_of(options, key["model"], forms)
    steps = options.steps or STEPS[key["model"]]
    work = engines.Work(key["prompt"], steps, [int(n) for n in options.n.split(",")], options.threads)
    repeats = 0
    while len(rounds) < options.rounds and time.monotonic() < until:
        started = time.monotonic()
        speeds = {name: engine(work) for name, engine in peers.items()}
        limits = limits_of(speeds)
        before = limits_of(rounds[-1]) if rounds else limits
        if limits_moved(before, limits) and repeats < 3:
            repeats += 1
            say(f"  the machine's limits moved: {before} to {limits}; once more")
            continue
        # As it comes back from the file.
        rounds.append(json.loads(json.dumps(speeds)))
        results.save()
        say(f"  round {len(rounds)} of {options.rounds}, {time.monotonic() - started:.0f} s: {summary(rounds)}")


# Starts of a process that are timed, the model's file in the page cache and out of it.
STARTS = 5


def measure_starts(options: argparse.Namespace, results: Results, key: dict) -> None:
    """How soon a process with SmolLM2 writes its first token."""
    isa = key["isa"] if key["isa"] != "native" else None
    starts = {}
    for name in ["warm", "cold"]:
        one = [
            engines.first_token(options.podium, options.smollm2, options.threads, isa, name == "cold")
            for _ in range(STARTS + 1)
        ]
        # The first brings the program itself into memory.
        starts[name] = one[1:]
    rounds = results.of(key)
    rounds[:] = [starts]
    results.save()
    say(f"  {starts_line(starts)}")


def starts_line(starts: dict) -> str:
    def span(name: str) -> str:
        seconds = sorted(one["seconds"] for one in starts[name])
        return f"{seconds[0]:.2f} / **{statistics.median(seconds):.2f}** / {seconds[-1]:.2f} s"

    return (
        f"SmolLM2 writes its first token, and its process ends, {span('warm')} after it was started "
        f"(least / median / most of {STARTS}), {span('cold')} where the model's file is not in the page cache."
    )


def speed_of(speeds: dict, what) -> float | None:
    return speeds["prefill"] if what == "prefill" else speeds["decode"].get(what)


def best(one_round: dict, engine: str, what) -> float | None:
    """The highest speed of an engine's forms and programs; none where it was left out."""
    found = [speed_of(speeds, what) for name, speeds in one_round.items() if name.startswith(engine)]
    return max((speed for speed in found if speed), default=None)


def columns_of(rounds: list) -> list:
    decoded = next(speeds["decode"] for name, speeds in rounds[0].items() if name.startswith("podium"))
    return ["prefill", *decoded]


def ratios(rounds: list, peer: str, what) -> list:
    pairs = [(best(one, "podium", what), best(one, peer, what)) for one in rounds]
    return [podium / other for podium, other in pairs if podium and other]


def shares(rounds: list, what) -> list:
    """Podium's speed as percent of what the machine's limits allow."""
    found = []
    for one in rounds:
        of_forms = []
        for name, speeds in one.items():
            if name.startswith("podium"):
                bound = speeds["prefill_floor"] if what == "prefill" else speeds["floors"][what]
                of_forms.append(100 * speed_of(speeds, what) / bound)
        found.append(max(of_forms))
    return found


def summary(rounds: list) -> str:
    """The last round in a line: ratios to llama.cpp and shares of the limit."""
    last = rounds[-1:]
    parts = []
    for what in columns_of(rounds):
        ratio = ratios(last, "llama", what)
        parts.append(f"{what} {ratio[0]:.2f}" if ratio else str(what))
        parts[-1] += f" ({shares(last, what)[0]:.0f} %)"
    matmul = max(speeds["prefill_matmul"] for name, speeds in last[0].items() if name.startswith("podium"))
    return ", ".join(parts) + f"; matmuls of the prefill {100 * matmul:.0f} %"


def spread(values: list) -> str:
    if not values:
        return ""
    return f"{min(values):.2f} / **{statistics.median(values):.2f}** / {max(values):.2f}"


def median(values: list, unit: str = "") -> str:
    return f"{statistics.median(values):.0f}{unit}" if values else ""


def table(measured: list) -> list:
    """Lines of Markdown: of every measurement Podium's speed, its share of the limit, its ratios."""
    counts = ["1", "8", "32", "100"]
    lines = [
        "| model, weights, prompt | | prefill | " + " | ".join(f"N = {n}" for n in counts) + " |",
        "| --- | --- |" + " --- |" * (1 + len(counts)),
    ]
    for one in measured:
        key, rounds = one["key"], one["rounds"]

        def row(title: str, cells: list, name: str = "") -> None:
            lines.append(f"| {name} | {title} | " + " | ".join(cells) + " |")

        every = ["prefill", *counts]
        name = f"{TITLES[key['model']]}, {key['weights']}, {key['prompt']}"
        speeds = [[speed for r in rounds if (speed := best(r, "podium", what))] for what in every]
        row("tokens/s", [median(values) for values in speeds], name)
        known = columns_of(rounds)
        row("of the limit", [median(shares(rounds, w), " %") if w in known else "" for w in every])
        for peer, title in [("llama", "÷ llama.cpp"), ("transformers", "÷ transformers")]:
            found = [ratios(rounds, peer, what) for what in every]
            if any(found):
                row(title, [spread(values) for values in found])
    return lines


def limits_line(measured: list) -> str:
    limits = [limits_of(one) for part in measured for one in part["rounds"]]

    def span(key: str) -> str:
        values = [limit[key] for limit in limits]
        return f"{min(values):.0f} to {max(values):.0f}"

    return f"Limits in these rounds: read {span('read_gb_per_s')} GB/s, multiply-add {span('fma_gflop_per_s')} GFLOP/s."


def memory_lines(measured: list) -> list:
    """Peak memory beside weights and cache, and the matmuls of the prefill alone."""
    lines = [
        "| model, weights, prompt | weights, MB | keys and values, MB | peak, MB | beside them | "
        "matmuls of the prefill, of the multiply-add peak |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in measured:
        key = one["key"]
        name = f"{TITLES[key['model']]}, {key['weights']}, {key['prompt']}"
        last = one["rounds"][-1]
        form = next(form for form in last if form.startswith("podium"))
        memory = last[form]["memory"]
        needed = memory["model_bytes"] + memory["kv_bytes"]
        peak = memory["peak_bytes"] or 0
        matmul = [100 * round_[form]["prefill_matmul"] for round_ in one["rounds"]]
        lines.append(
            f"| {name} | {memory['model_bytes'] / 1e6:.0f} | {memory['kv_bytes'] / 1e6:.0f} | {peak / 1e6:.0f} "
            f"| {100 * (peak / needed - 1):.0f} % | {median(matmul)} % |"
        )
    return lines


def plot(path: Path, measured: list) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "podium"
    figure, axes = plt.subplots(1, len(measured), figsize=(4.2 * len(measured), 3.6), squeeze=False)
    for axis, one in zip(axes[0], measured):
        key, rounds = one["key"], one["rounds"]
        n = [int(count) for count in columns_of(rounds)[1:]]
        for name in rounds[0]:
            if name.startswith("llama-bench"):
                continue
            speeds = [statistics.median(one[name]["decode"][str(count)] for one in rounds) for count in n]
            axis.plot(n, speeds, marker="o", label=name, linewidth=2.5 if name.startswith("podium") else 1.2)
        title = f"{TITLES[key['model']]}, {key['weights']}"
        axis.set(title=title, xlabel="candidates N", xscale="log", yscale="log")
        axis.set_xticks(n, [str(count) for count in n])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("tokens/s of all candidates")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


SECTIONS = {
    "avx2": "### AVX2, FMA and F16C only, all engines",
    "avx-vnni": "### The same and AVX-VNNI, all engines",
    "native": "### All that the processor has",
}


def write_tables(docs: Path, results: Results) -> None:
    """Puts the tables between the marks of docs/BENCHMARKS.md."""
    lines = []
    order = {(model, weights): place for place, (model, weights, _) in enumerate(CLASSES)}
    for isa, title in SECTIONS.items():
        found = [one for one in results.all if one["key"]["isa"] == isa and one["rounds"]]
        measured = [one for one in found if one["key"]["weights"]]
        starts = [one["rounds"][0] for one in found if not one["key"]["weights"]]
        measured.sort(key=lambda one: (order[one["key"]["model"], one["key"]["weights"]], one["key"]["prompt"]))
        if not measured:
            continue
        key, counts = measured[0]["key"], {len(one["rounds"]) for one in measured}
        rounds = "-".join(map(str, sorted({min(counts), max(counts)})))
        about = f"{key['threads']} threads of {key['processor']}, {rounds} rounds; medians, of ratios least / **median** / most."
        lines += ["", title, "", about, "", *table(measured), "", limits_line(measured)]
        lines += ["", *memory_lines(measured), *(line for one in starts for line in ["", starts_line(one)])]
        figure = docs / "figures" / f"peers-{isa}.svg"
        plot(figure, [one for one in measured if one["key"]["prompt"] == measured[0]["key"]["prompt"]])
        lines += ["", f"![tokens per second over N, Podium and its peers](figures/{figure.name})"]
    write_docs(docs / "BENCHMARKS.md", "scripts/peers", lines[1:])


def main() -> None:
    options = arguments()
    results = Results(options.results)
    chosen = [
        (model, weights, forms)
        for model, weights, forms in CLASSES
        if model in options.models.split(",") and weights.split()[0] in options.classes.split(",")
    ]
    if not chosen:
        sys.exit("error: no model of --models has weights of --classes; see --help")
    until = time.monotonic() + (options.slice or float("inf"))
    for model, weights, forms in [] if options.write_only else chosen:
        if options.forms:
            forms = [form for form in forms if form in options.forms.split(",")] or forms
        for prompt in map(int, options.prompt.split(",")):
            key = dict(isa=options.isa, model=model, weights=weights, prompt=prompt)
            key |= dict(threads=options.threads, processor=processor())
            measure(options, results, key, forms, until)
        if model == "smollm2" and time.monotonic() < until:
            measure_starts(options, results, key | dict(weights=None, prompt=4))
    write_tables(options.docs, results)
    say(f"written: {options.docs / 'BENCHMARKS.md'}; every round: {options.results}")


if __name__ == "__main__":
    main()
