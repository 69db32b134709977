#!/usr/bin/env python3
"""Makes the tables and plots of docs/RANKER.md from stored collections.

    scripts/ranker_figures.py --data data --work data/figures

`--data` holds a folder for each task with the collections `train` and `test` (or `test` alone, for a task
that is only measured). Every ranker is trained by `podium train` and measured by `podium eval`; what was
done once is kept in `--work` and not done again until a collection changes, so a run that was stopped
goes on where it was. What a ranker is (layer, kind, loss, learning rate, width) is chosen by the accuracy on the part
of the training items that training itself holds out, never by test items. Tables go between the
markers in the document, plots beside it into `figures/`; the chosen rankers are
`WORK/<task>.safetensors`, and the one moved to a taste `WORK/mine/gcd_shortest.safetensors`.

Needs matplotlib, torch and safetensors.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from collection import Collection

ROOT = Path(__file__).resolve().parent.parent
SEEDS = [0, 1]
# What training does where nothing else is said.
DEFAULT = {"kind": "pointwise", "loss": "pointwise", "learning-rate": 0.001, "projection-width": 64}
STRATEGIES = ["majority", "mean log-probability", "self-certainty", "answer prior", "first"]


class Work:
    """Runs podium, and keeps what came of it."""

    def __init__(self, options):
        self.podium, self.folder, self.data = options.podium, options.work, options.data
        self.threads = options.threads
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, arguments, output=None):
        """The command's JSON; from the folder, where it has been run with the same arguments."""
        arguments = [*map(str, arguments)]
        name = hashlib.sha256("\0".join(arguments + [*map(contents, arguments)]).encode()).hexdigest()[:16]
        kept = self.folder / f"{arguments[0]}-{name}.json"
        made = self.folder / f"{name}.safetensors" if output else None
        if not kept.exists() or (made and not made.exists()):
            command = [self.podium, *arguments, "--threads", str(self.threads), "--json"]
            command += ["-o", made] if made else []
            done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            if done.returncode != 0:
                raise SystemExit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
            part = kept.with_suffix(".part")
            part.write_text(done.stdout)
            part.rename(kept)
            print(f"{' '.join(arguments)}", file=sys.stderr, flush=True)
        return json.loads(kept.read_text()), made

    def train(self, folders, recipe, seed=0, name=None):
        """A ranker's file, and its accuracy on the items that training held out."""
        arguments = ["train", *folders, "--seed", seed, "--name", name or "ranker"]
        for option, value in sorted(recipe.items()):
            arguments += [f"--{option}", value]
        report, made = self.run(arguments, output=True)
        return made, report["best"].get("validation_accuracy"), report

    def evaluate(self, folders, rankers, training=()):
        arguments = ["eval", *folders]
        arguments += ["--ranker", *rankers] if rankers else []
        arguments += ["--train", *training] if training else []
        return self.run(arguments)[0]

    def at(self, task, rankers):
        """Accuracy of rankers on a task's test items at N = 32 (or the whole pool, where it is smaller):
        name -> (mean, low, high)."""
        found = self.evaluate([self.data / task / "test"], rankers, [self.data / task / "train"])["collections"][0]
        index = at_32(found["n"])
        return {c["strategy"]: tuple(c[k][index] for k in ("accuracy", "low", "high")) for c in found["curves"]}

    def accuracy(self, task, ranker):
        return self.at(task, [ranker])["ranker"]


def contents(path):
    """Tells a collection from what stood there before it was gone on with; nothing for other arguments."""
    lines = Path(path) / "candidates.jsonl"
    return str(lines.stat().st_size) if lines.exists() else ""


def is_whole(folder):
    """Whether a collection is there and has all its items."""
    if not (folder / "collection.json").exists():
        return False
    with open(folder / "candidates.jsonl") as lines:
        return sum(1 for _ in lines) == json.loads((folder / "collection.json").read_text())["items"]


def at_32(ns):
    return ns.index(32) if 32 in ns else -1


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def interval(mean, low, high):
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def table(head, rows):
    lines = ["| " + " | ".join(map(str, head)) + " |", "| --- |" + " --- |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


# --- choosing -----------------------------------------------------------------------------------


def held_out(work, task, recipe):
    """Mean accuracy on held-out training items over the seeds, and the mean of the best passes."""
    train = work.data / task / "train"
    # Few items hold out too few: more seeds hold out others.
    seeds = SEEDS if Collection(train).info["items"] > 600 else range(4)
    runs = [work.train([train], recipe, seed) for seed in seeds]
    return mean(accuracy for _, accuracy, _ in runs), round(mean(run[2]["best"]["epoch"] for run in runs))


def search(work, task):
    """The recipes that do best on held-out items, one for each kind, found one choice after the other:
    the layer, the loss, the learning rate. Also everything that was tried on the way."""
    tried = {}

    def attempt(recipe):
        key = tuple(sorted(recipe.items()))
        if key not in tried:
            tried[key] = held_out(work, task, recipe)
        return tried[key][0]

    layers = Collection(work.data / task / "train").info["feature_layers"]
    best = {}
    for kind in ("pointwise", "listwise"):
        chosen = {**DEFAULT, "kind": kind, "loss": kind}
        for choices in [
            [{"layer": layer} for layer in layers],
            [{"loss": loss} for loss in ("pointwise", "listwise")],
            [{"learning-rate": rate} for rate in (0.0003, 0.001, 0.003)],
        ]:
            chosen = max([{**chosen, **choice} for choice in choices], key=attempt)
        best[kind] = chosen
    return best, tried


def choose(work, task):
    """For each kind and for the better of the two: the recipe, and the ranker that it makes of all
    training items, with nothing held out.

    Seeds hold out different items, so their accuracies say nothing of which ranker is the better one:
    none of them is kept.
    """
    best, tried = search(work, task)
    made = {}
    for kind, recipe in best.items():
        accuracy, passes = tried[tuple(sorted(recipe.items()))]
        final = {**recipe, "validation": 0, "epochs": passes}
        path, _, report = work.train([work.data / task / "train"], final, name=f"{task} {kind}")
        found = {"recipe": recipe, "passes": passes, "held_out": accuracy, "path": path, "report": report}
        made[kind] = {**found, "tried": len(tried)}
    better = max(made.values(), key=lambda found: found["held_out"])
    final = {**better["recipe"], "validation": 0, "epochs": better["passes"]}
    path = work.train([work.data / task / "train"], final, name=task)[0]
    shutil.copy(path, work.folder / f"{task}.safetensors")
    lines = Collection(work.data / task / "train").lines
    mixed = sum(len(set(line["labels"])) > 1 for line in lines)
    return {**better, "path": path, "kinds": made, "items": len(lines), "mixed": mixed}


# --- tables -------------------------------------------------------------------------------------


def chosen_table(work, chosen):
    rows = []
    for task, found in chosen.items():
        for kind, made in found["kinds"].items():
            recipe, report = made["recipe"], made["report"]
            shipped = "**" if recipe == found["recipe"] else ""
            counted = f"{found['items']}, {found['mixed']}"
            rows.append([f"`{task}`", counted, f"{shipped}{kind}, {recipe['loss']} loss{shipped}"])
            rows[-1] += [f"{recipe['layer']} of 30", recipe["learning-rate"], made["passes"], report["parameters"]]
            rows[-1] += [f"{made['held_out']:.3f}"]
    head = ["ranker", "training items, mixed ones", "kind", "layer", "learning rate", "passes", "parameters", "held out"]
    return table(head, rows)


def accuracy_tables(work, chosen, only_measured, figures):
    """All strategies of each task, and the plots."""
    text = []
    for task in [*chosen, *only_measured]:
        if task in chosen:
            found = chosen[task]
            train = [work.data / task / "train"]
            linear = work.train(train, {"layer": found["recipe"]["layer"], "kind": "linear"}, name="linear")[0]
            rankers = [found["path"], *(made["path"] for made in found["kinds"].values()), linear]
        else:
            found, train, rankers = {"path": None, "kinds": {}}, [], []
        measured = work.evaluate([work.data / task / "test"], rankers, train)["collections"][0]
        ns = measured["n"]
        at = [measured["n"].index(n) for n in ns]
        curves = {curve["strategy"]: curve for curve in measured["curves"]}
        shown = {"oracle": "oracle", task: "**chosen ranker**"}
        shown |= {f"majority weighted by {task}": "majority, weighted by it"}
        shown |= {f"{task} {kind}": f"best {kind}" for kind in found["kinds"]}
        shown |= {"linear": "linear, default options"}
        shown |= {name: name for name in STRATEGIES}
        shown["answer prior"] = "answer prior (control)"
        rows = []
        for name, label in shown.items():
            if name not in curves:
                continue
            curve = curves[name]
            cells = [f"{curve['accuracy'][i]:.3f}" for i in at[:-1]]
            cells.append(interval(*(curve[k][at[-1]] for k in ("accuracy", "low", "high"))))
            auc = curve.get("auc")
            rows.append([label, *cells, f"{auc:.3f}" if auc is not None else ""])
        text += [f"`{task}`, {measured['items']} test items:", table(["accuracy of the chosen one of N", *ns, "AUC"], rows)]
        gains = [
            f"over `{gain['over']}` {interval(*(gain[k][-1] for k in ('gain', 'low', 'high')))}"
            for gain in measured["gains"]
            if gain["ranker"] == task and gain["over"] != "self-certainty"
        ]
        if gains:
            text += [f"What the chosen ranker gains at N = {ns[-1]}, item by item: {', '.join(gains)}."]
        text += [f"![Accuracy over N, {task}](figures/{task}.svg)"]
        command = [work.podium, "eval", work.data / task / "test", "--plot", figures / f"{task}.svg"]
        command += ["--ranker", found["path"], "--train", *train] if train else []
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return "\n\n".join(text)


def layer_table(work, tasks, figures):
    rows, lines = [], {}
    for task in tasks:
        train = work.data / task / "train"
        layers = Collection(train).info["feature_layers"]
        row = {}
        for layer in layers:
            runs = [work.train([train], {**DEFAULT, "layer": layer}, seed) for seed in SEEDS]
            test = [work.accuracy(task, run[0]) for run in runs]
            row[layer] = (mean(run[1] for run in runs), mean(t[0] for t in test), [mean(x) for x in zip(*test)])
        lines[task] = row
        rows.append([f"`{task}`, held out", *(f"{row[layer][0]:.3f}" for layer in layers)])
        rows.append([f"`{task}`, test, N = 32 or all", *(interval(*row[layer][2]) for layer in layers)])
    axes, save = plot("Layer of the features", "layer (of 30)", "test accuracy, N = 32")
    for task, row in lines.items():
        x = sorted(row)
        axes.plot(x, [row[layer][1] for layer in x], marker="o", label=task)
        axes.fill_between(x, [row[l][2][1] for l in x], [row[l][2][2] for l in x], alpha=0.15)
    save(figures / "layers.svg")
    return table(["pointwise, default options, mean of two seeds", *layers], rows)


def kind_table(work, chosen):
    rows = []
    kinds = {
        "pointwise, its own loss": {"kind": "pointwise", "loss": "pointwise"},
        "pointwise, listwise loss": {"kind": "pointwise", "loss": "listwise"},
        "listwise, its own loss": {"kind": "listwise", "loss": "listwise"},
        "listwise, pointwise loss": {"kind": "listwise", "loss": "pointwise"},
        "linear, its own loss": {"kind": "linear", "loss": "pointwise"},
        "pointwise without `mean_logprob`": {"kind": "pointwise", "loss": "pointwise", "extra-inputs": "none"},
        "pointwise with `length` too": {"kind": "pointwise", "loss": "pointwise", "extra-inputs": "mean_logprob,length"},
        "pointwise, cosine": {"kind": "pointwise", "loss": "pointwise", "relevance": "cosine"},
        "pointwise, root-mean-square": {"kind": "pointwise", "loss": "pointwise", "normalization": "rms"},
    }
    for name, kind in kinds.items():
        cells = []
        for task, found in chosen.items():
            recipe = {**DEFAULT, "layer": found["recipe"]["layer"], **kind}
            if kind["kind"] == "linear":
                del recipe["projection-width"]
            runs = [work.train([work.data / task / "train"], recipe, seed)[0] for seed in SEEDS]
            cells.append(interval(*(mean(x) for x in zip(*(work.accuracy(task, run) for run in runs)))))
        rows.append([name, *cells])
    return table(["test accuracy, N = 32 or all, mean of two seeds", *(f"`{task}`" for task in chosen)], rows)


def size_table(work, chosen, tasks, figures):
    """Training on the first 75, 150, .. items. They are in random order."""
    rows, lines, all_sizes = [], {}, []
    for task in tasks:
        whole = Collection(work.data / task / "train")
        layer = chosen[task]["recipe"]["layer"]
        sizes = [n for n in (75, 150, 300, 600, 1200) if n < len(whole.lines)] + [len(whole.lines)]
        row = {}
        for size in sizes:
            folder = work.folder / f"{task}-{size}"
            if not (folder / "collection.json").exists():
                whole.write(folder, range(size), layers=[layer])
            runs = [work.train([folder], {**DEFAULT, "layer": layer}, seed)[0] for seed in SEEDS]
            row[size] = [mean(x) for x in zip(*(work.accuracy(task, run) for run in runs))]
        lines[task] = row
        all_sizes = sorted({*all_sizes, *sizes})
    for task, row in lines.items():
        rows.append([f"`{task}`", *(interval(*row[n]) if n in row else "" for n in all_sizes)])
    axes, save = plot("Training items", "items × 32 candidates", "test accuracy, N = 32")
    axes.set_xscale("log")
    for task, row in lines.items():
        axes.plot(list(row), [v[0] for v in row.values()], marker="o", label=task)
        axes.fill_between(list(row), [v[1] for v in row.values()], [v[2] for v in row.values()], alpha=0.15)
    axes.set_xticks(all_sizes, map(str, all_sizes))
    axes.minorticks_off()
    save(figures / "training-size.svg")
    return table(["training items", *all_sizes], rows)


def transfer_table(work, chosen):
    """Rankers in rows, test items in columns; the first candidate and the oracle below."""
    tests = [work.data / task / "test" for task in chosen]
    rankers = {task: found["path"] for task, found in chosen.items()}
    layer = sorted(found["recipe"]["layer"] for found in chosen.values())[len(chosen) // 2]
    trains = [work.data / task / "train" for task in chosen]
    rankers["all of them"] = work.train(trains, {**DEFAULT, "layer": layer}, name="all of them")[0]
    found = work.evaluate(tests, rankers.values(), trains)["collections"]
    rows = []
    shown = {name: f"trained on {'' if name == 'all of them' else '`'}{name}{'' if name == 'all of them' else '`'}" for name in rankers}
    shown |= {"first": "first candidate", "majority": "majority", "mean log-probability": "mean log-probability"}
    shown |= {"oracle": "oracle"}
    for name, label in shown.items():
        cells = []
        for collection in found:
            curve = next((c for c in collection["curves"] if c["strategy"] == name), None)
            at = at_32(collection["n"])
            cells.append(interval(*(curve[k][at] for k in ("accuracy", "low", "high"))) if curve else "")
        rows.append([label, *cells])
    return table(["accuracy, N = 32 or all", *(f"on `{task}`" for task in chosen)], rows)


def personal_table(work, chosen):
    command = [sys.executable, ROOT / "scripts/personal_ranker.py", "--podium", work.podium, "--json"]
    command += ["--ranker", work.folder / "gcd.safetensors", "-o", work.folder / "mine", "--name", "gcd_shortest"]
    command += ["--threads", work.threads]
    command += [work.data / "gcd_styles/train", work.data / "gcd_styles/test"]
    report = json.loads(subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True).stdout)
    ns, parts = report["n"], [f"{report['groups']} groups to learn from ({report['with_right']} with a right candidate), {report['items']} others:"]
    for what, title in [("wanted", "the wanted one"), ("right", "right at all")]:
        rows = []
        for name, row in report["measured"][what].items():
            cells = [f"{a:.3f}" for a in row["accuracy"]]
            cells[-1] = interval(row["accuracy"][-1], row["low"][-1], row["high"][-1])
            rows.append([name, *cells])
        parts.append(table([f"the chosen one of N is {title}", *ns], rows))
    return "\n\n".join(parts)


def torch_table(work, chosen, tasks):
    """The PyTorch trainer with the same options on the same data."""
    rows = []
    for task in tasks:
        train, test = work.data / task / "train", work.data / task / "test"
        layer = chosen[task]["recipe"]["layer"]
        for kind in ("pointwise", "listwise"):
            ours, theirs = [], []
            for seed in SEEDS:
                ours.append(work.train([train], {"kind": kind, "layer": layer}, seed)[0])
                output = work.folder / f"torch-{task}-{kind}-{layer}-{seed}.safetensors"
                if not output.exists():
                    command = [sys.executable, ROOT / "scripts/train_ranker.py", "--train", train, "--test", test]
                    command += ["--kind", kind, "--layer", layer, "--seed", seed, "--extra-inputs", "mean_logprob"]
                    command += ["--name", "ranker", "--threads", work.threads, "-o", output]
                    subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL)
                theirs.append(output)
            cells = [" ".join(f"{work.accuracy(task, path)[0]:.3f}" for path in paths) for paths in (ours, theirs)]
            rows.append([f"`{task}`, {kind}", *cells])
    return table(["test accuracy, N = pool, seeds 0 and 1", "`podium train`", "PyTorch"], rows)


def plot(title, x, y):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # The same figures make the same file.
    matplotlib.rcParams["svg.hashsalt"] = "podium"
    figure, axes = plt.subplots(figsize=(6.4, 4))
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)

    def save(path):
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)

    return axes, save


def insert(document, parts):
    """Puts each table between its markers."""
    text = document.read_text()
    for name, part in parts.items():
        begin, end = f"<!-- figures: {name} -->", "<!-- end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            print(f"{document} has no place for {name}:\n\n{part}\n")
        text = pattern.sub(lambda _: f"{begin}\n\n{part}\n\n{end}", text)
    document.write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--podium", default=ROOT / "target/release/podium")
    parser.add_argument("--document", type=Path, default=ROOT / "docs/RANKER.md")
    parser.add_argument("--tasks", nargs="+", help="only these [default: all in --data, but for gcd_styles]")
    parser.add_argument("--parts", nargs="+", help="only these tables [default: those that the document has]")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    work = Work(options)
    figures = options.document.parent / "figures"
    figures.mkdir(exist_ok=True)
    there = {path.parent.name for path in options.data.glob("*/test")} - {"gcd_styles"}
    tasks = options.tasks or sorted(there)
    tasks = [task for task in tasks if is_whole(work.data / task / "test")]
    learned = [task for task in tasks if is_whole(work.data / task / "train")]
    only_measured = [task for task in tasks if task not in learned]

    chosen = {task: choose(work, task) for task in learned}
    makers = {
        "chosen": lambda: chosen_table(work, chosen),
        "accuracy": lambda: accuracy_tables(work, chosen, only_measured, figures),
        "transfer": lambda: transfer_table(work, chosen),
        "layers": lambda: layer_table(work, learned, figures),
        "kinds": lambda: kind_table(work, chosen),
        "size": lambda: size_table(work, chosen, learned, figures),
        "personal": lambda: personal_table(work, chosen),
        "torch": lambda: torch_table(work, chosen, learned[:1]),
    }
    wanted = options.parts or re.findall("<!-- figures: (.*) -->", options.document.read_text())
    for name in [name for name in makers if name in wanted]:
        # Each as soon as it is made: a run that is stopped leaves what it has.
        insert(options.document, {name: makers[name]()})


if __name__ == "__main__":
    main()
