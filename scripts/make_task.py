#!/usr/bin/env python3
"""Makes a task of best-of-N items out of the Python package reasoning-gym (0.1.25).

Writes `train.jsonl` and `test.jsonl`: one item a line with `id`, `key` (what the item is about: equal
keys are the same question), `prompt` (four solved examples, then the question, as plain text to be
continued), `reference` (the right answer), `stop` and `task`. No key occurs twice, in one file or
across them, and the solved examples are in neither.

    scripts/make_task.py gcd --train 600 --test 200 -o data/gcd

Then let podium write candidates for each item, and label them with scripts/label_candidates.py.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

import reasoning_gym

TASKS = {
    "gcd": dict(min_numbers=2, max_numbers=2, min_value=1, max_value=60),
    "family_relationships": {},
}
SOLVED_EXAMPLES = 4
STOP = "\n"
# Entries that are looked at before a task counts as used up.
STREAM = 100_000


def key_of(task, entry):
    """What the item is about: for gcd the unordered pair, for others the question."""
    if task == "gcd":
        return "gcd " + " ".join(map(str, sorted(entry["metadata"]["numbers"])))
    return " ".join(entry["question"].split())


def entries(task, seed):
    """Entries of fresh keys, in reasoning-gym's order."""
    # reasoning-gym makes entry i from seed + i, so one data set is a stream of its own.
    dataset = reasoning_gym.create_dataset(task, seed=seed, size=STREAM, **TASKS[task])
    seen = set()
    for index in range(len(dataset)):
        entry = dataset[index]
        key = key_of(task, entry)
        if key not in seen:
            seen.add(key)
            yield key, entry


def question_text(entry):
    return f"Question: {' '.join(entry['question'].split())}\nAnswer:"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--train", type=int, default=600, help="items")
    parser.add_argument("--test", type=int, default=200, help="items")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", required=True, help="folder")
    options = parser.parse_args()

    stream = entries(options.task, options.seed)
    solved = []
    for key, entry in stream:
        # Examples with four different answers; whatever was passed over is not used at all.
        if all(entry["answer"] != other["answer"] for other in solved):
            solved.append(entry)
        if len(solved) == SOLVED_EXAMPLES:
            break
    examples = "".join(f"{question_text(entry)} {entry['answer']}\n\n" for entry in solved)

    # A task may have few questions (1830 pairs for gcd): as they are used up, what is still fresh drifts
    # (to pairs without a common divisor). So all items are drawn first and split at random. The first
    # one is a test item whatever the seed of the split: a demonstration can rely on it.
    pool = list(itertools.islice(stream, options.test + options.train))
    if len(pool) < options.test + options.train:
        raise SystemExit(f"{options.task} has only {len(pool)} fresh items among {STREAM}")
    rest = pool[1:]
    random.Random(options.seed).shuffle(rest)
    pool[1:] = rest

    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    for split, chosen in [("test", pool[: options.test]), ("train", pool[options.test :])]:
        with open(folder / f"{split}.jsonl", "w") as file:
            for number, (key, entry) in enumerate(chosen):
                item = {"id": f"{options.task}-{split}-{number}", "key": key, "task": options.task}
                item |= {"prompt": examples + question_text(entry), "reference": entry["answer"], "stop": STOP}
                file.write(json.dumps(item) + "\n")
        print(f"{folder / f'{split}.jsonl'}: {len(chosen)} items")


if __name__ == "__main__":
    main()
