#!/usr/bin/env python3
"""Says which candidates are right, by reasoning-gym's own verifier.

Reads candidate lines that podium wrote (`id`, `prompt`, `candidates`, and whatever else) and the items
of scripts/make_task.py, joined by `id`; writes the lines with `answers` (the answer in each
candidate's text), `labels` (1 where the verifier gives full marks), `key`, `task` and `reference`.

    scripts/label_candidates.py data/gcd/train.jsonl generated.jsonl -o data/gcd/train/candidates.jsonl
"""

import argparse
import json
from pathlib import Path

import reasoning_gym


def extract_answer(text, stop):
    """The text up to the stop string, without space around it and the full stop after it."""
    return text.lstrip(" ").split(stop)[0].strip().rstrip(".").strip().lower()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("items", help="JSON lines of scripts/make_task.py")
    parser.add_argument("candidates", help="JSON lines of podium")
    parser.add_argument("-o", "--output", required=True)
    options = parser.parse_args()

    items = {item["id"]: item for item in map(json.loads, open(options.items))}
    verifiers = {task: reasoning_gym.create_dataset(task, size=1) for task in {i["task"] for i in items.values()}}
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    right = total = solvable = groups = 0
    with open(options.output, "w") as output:
        for line in map(json.loads, open(options.candidates)):
            item = items.get(line["id"])
            if item is None:
                raise SystemExit(f"{options.candidates}: id {line['id']} is not in {options.items}")
            verify = verifiers[item["task"]].score_answer
            answers = [extract_answer(text, item["stop"]) for text in line["candidates"]]
            labels = [int(verify(answer, {"answer": item["reference"]}) == 1.0) for answer in answers]
            line |= {name: item[name] for name in ("key", "task", "reference")}
            output.write(json.dumps({**line, "answers": answers, "labels": labels}) + "\n")
            right, total = right + sum(labels), total + len(labels)
            groups, solvable = groups + 1, solvable + any(labels)
    print(f"{options.output}: {groups} items, {solvable} with a right candidate; {right} of {total} candidates right")


if __name__ == "__main__":
    main()
