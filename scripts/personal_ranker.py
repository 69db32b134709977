#!/usr/bin/env python3
"""Moves a ranker to one user's taste: 50 labelled groups, no model, under a second.

The user here is a rule, so that it can be measured: of the right answers, the shortest one is wanted.
Two collections of scripts/make_task.py's gcd_styles are labelled by it, one to learn from and one of
other items to measure on:

    scripts/personal_ranker.py --ranker models/gcd.safetensors \\
        data/gcd_styles/train data/gcd_styles/test -o data/mine

It prints how often the chosen one of N is the wanted one, and how often it is right at all, before and
after, and for a ranker that has only the 50 groups. Needs torch and safetensors.
"""

import argparse
import json
import subprocess
from pathlib import Path

from collection import Collection


def wanted(line):
    """1 for the shortest of the right candidates (all that are as short), 0 for the others."""
    right = [len(text.strip()) for text, label in zip(line["candidates"], line["labels"]) if label == 1]
    taste = [int(y == 1 and len(t.strip()) == min(right)) for t, y in zip(line["candidates"], line["labels"])]
    return {**line, "labels": taste}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", help="collection to label and learn from")
    parser.add_argument("test", help="collection of other items")
    parser.add_argument("--ranker", required=True, help="file of the ranker to begin with")
    parser.add_argument("--name", default="mine", help="what the user's ranker and its task are called")
    parser.add_argument("--podium", default="target/release/podium")
    parser.add_argument("--groups", type=int, default=50, help="groups to label")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", required=True, type=Path, help="folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    def podium(*arguments):
        command = [options.podium, *map(str, arguments), "--threads", str(options.threads), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    train, test = Collection(options.train), Collection(options.test)
    labelled = list(range(min(options.groups, len(train.lines))))
    # Where nothing is right, all that is said is that nothing is wanted.
    useful = sum(1 in train.lines[item]["labels"] for item in labelled)
    mine, theirs = options.output / "labelled", options.output / "test"
    train.write(mine, labelled, wanted, name=options.name)
    test.write(theirs, range(len(test.lines)), wanted, name=options.name)

    # All groups are learned from; the number of epochs is fixed, for nothing is left to choose it by.
    recipe = ["--epochs", options.epochs, "--learning-rate", options.learning_rate, "--validation", 0]
    moved, alone = options.output / f"{options.name}.safetensors", options.output / "alone.safetensors"
    moving = podium("train", mine, "-o", moved, "--name", options.name, "--init", options.ranker, *recipe)
    podium("train", mine, "-o", alone, "--name", "alone", *recipe)

    report = {"groups": len(labelled), "with_right": useful, "seconds": moving["seconds"], "epochs": options.epochs, "measured": {}}
    for what, folder in [("wanted", theirs), ("right", options.test)]:
        (found,) = podium("eval", folder, "--ranker", options.ranker, moved, alone)["collections"]
        curves = {curve["strategy"]: curve for curve in found["curves"]}
        # The oracle is the first curve, the first ranker the second.
        before = found["curves"][1]["strategy"]
        rows = {"first": "first candidate", "mean log-probability": "mean log-probability", before: "before"}
        rows |= {options.name: "after", "alone": "from the groups alone", "oracle": "oracle"}
        report["items"], report["n"] = found["items"], found["n"]
        report["measured"][what] = {
            shown: {key: curves[name][key] for key in ("accuracy", "low", "high")} for name, shown in rows.items()
        }
    if options.json:
        print(json.dumps(report))
        return
    print(f"{report['groups']} groups ({useful} with a right candidate), {report['epochs']} passes, {report['seconds']:.2f} s; {report['items']} other items")
    for what, rows in report["measured"].items():
        print(f"\n| the chosen one of N is {what} | {' | '.join(map(str, report['n']))} |")
        print("| --- |" + " --- |" * len(report["n"]))
        for name, row in rows.items():
            print(f"| {name} | {' | '.join(f'{a:.3f}' for a in row['accuracy'])} |")


if __name__ == "__main__":
    main()
