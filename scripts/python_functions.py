"""Small Python functions to be written, with tests: what scripts/make_task.py calls `python_functions`.

Each takes a list, keeps some of its elements, changes them, and makes one thing of them: "Return the
sum of the squares of the even numbers in the list." Description, reference and tests come of the same
three choices. A *shape* is the choices without their numbers and letters: functions of one shape differ
in a constant.
"""

import itertools
import random

# What is kept: (words before, words after "numbers", condition on x, constants it takes)
NUMBER_FILTERS = [
    ("", "", None, None),
    ("even ", "", "x % 2 == 0", None),
    ("odd ", "", "x % 2 == 1", None),
    ("positive ", "", "x > 0", None),
    ("negative ", "", "x < 0", None),
    ("", " greater than {k}", "x > {k}", range(2, 21)),
    ("", " less than {k}", "x < {k}", range(2, 21)),
    ("", " divisible by {k}", "x % {k} == 0", range(3, 10)),
    ("", " whose square is greater than {k}", "x * x > {k}", (10, 50, 100, 200)),
]
# What is made of each: (words, expression)
NUMBER_MAPS = [
    ("", "x"),
    ("squares of the ", "x * x"),
    ("cubes of the ", "x ** 3"),
    ("absolute values of the ", "abs(x)"),
    ("doubles of the ", "2 * x"),
    ("halves of the ", "x / 2"),
    ("last digits of the ", "abs(x) % 10"),
]
NUMBER_REDUCTIONS = [
    ("the sum of the ", "sum({})"),
    ("the list of the ", "[{}]"),
    ("the sorted list of the ", "sorted({})"),
    ("the largest of the ", "max({})"),
    ("the smallest of the ", "min({})"),
    ("the number of different ", "len(set({}))"),
    ("the average of the ", "sum([{}]) / len([{}])"),
]
WORD_FILTERS = [
    ("", "", None, None),
    ("", " longer than {k} letters", "len(x) > {k}", range(2, 8)),
    ("", " shorter than {k} letters", "len(x) < {k}", range(3, 9)),
    ("", " that start with '{k}'", "x.startswith('{k}')", "abcdefgmprst"),
    ("", " that end with '{k}'", "x.endswith('{k}')", "adegklnrst"),
    ("", " that contain '{k}'", "'{k}' in x", "abcdeghilmnoprst"),
    ("", " that are palindromes", "x == x[::-1]", None),
]
WORD_MAPS = [
    ("", "x"),
    ("lengths of the ", "len(x)"),
    ("first letters of the ", "x[0]"),
    ("last letters of the ", "x[-1]"),
    ("upper case forms of the ", "x.upper()"),
    ("reversed forms of the ", "x[::-1]"),
]
WORD_REDUCTIONS = [
    ("the list of the ", "[{}]"),
    ("the sorted list of the ", "sorted({})"),
    ("the set of the ", "set({})"),
    ("the number of different ", "len(set({}))"),
    ("the string made by joining with commas the ", "','.join({})"),
]
TESTS = 8
# Functions that are solved in front of every item, each of other choices than the ones before.
EXAMPLES = 8


def source(description, parameters):
    return f'def solve({parameters}):\n    """{description}"""\n    return'


def functions(noun, filters, maps, reductions):
    """(shape, description, expression over `noun`)"""
    for (before, after, condition, constants), (mapped, element), (made, reduction) in itertools.product(
        filters, maps, reductions
    ):
        for k in constants or [None]:
            what = f"{made}{mapped}{before}{noun}{after}".replace("{k}", str(k))
            kept = f" if {condition.replace('{k}', str(k))}" if condition else ""
            generator = f"{element} for x in {noun}{kept}"
            description = f"Return {what} in the list."
            yield (noun, made, mapped, before, after), description, reduction.format(generator, generator)


def inputs(noun, description, random):
    """Lists to call a function with; the last ones hold little."""
    letters = "abcdeghilmnoprst"
    for test in range(TESTS):
        size = random.randint(4, 9)
        if noun == "numbers":
            yield [random.randint(-25, 30) for _ in range(size)]
        else:
            words = ["".join(random.choices(letters, k=random.randint(1, 8))) for _ in range(size)]
            # Words like these do not come about by chance.
            words[:2] = [w + w[::-1] for w in words[:2]] if test % 2 else words[:2]
            for quoted in description.split("'")[1::2]:
                words[-2:] = [quoted + words[-2], words[-1] + quoted]
            random.shuffle(words)
            yield words


def tests(noun, description, expression, seed):
    """Assertions; none, where the words make no function that can be told from a constant."""
    asserted, rest = [], random.Random(f"{seed} {description}")
    solve = eval(f"lambda {noun}: {expression}")
    for given in inputs(noun, description, rest):
        try:
            result = solve(given)
        except (ValueError, ZeroDivisionError, TypeError):
            # Of an empty list there is no largest and no average, and numbers are not joined.
            continue
        asserted.append(f"    assert candidate({given!r}) == {result!r}")
    tells = len(asserted) >= TESTS // 2 and len({test.split(" == ")[1] for test in asserted}) > 1
    return asserted if tells else []


def items(seed):
    """(key, shape, fields) of all functions in random order."""
    everything = [("numbers", f) for f in functions("numbers", NUMBER_FILTERS, NUMBER_MAPS, NUMBER_REDUCTIONS)]
    everything += [("words", f) for f in functions("words", WORD_FILTERS, WORD_MAPS, WORD_REDUCTIONS)]
    random.Random(seed).shuffle(everything)
    everything = [(noun, *function, tests(noun, *function[1:], seed)) for noun, function in everything]
    everything = [item for item in everything if item[-1]]
    examples = []
    for noun, shape, description, expression, _ in everything:
        known = [choice for example in examples for choice in example[1][1:]]
        if len(examples) < EXAMPLES and not any(choice in known for choice in shape[1:] if choice):
            examples.append((noun, shape, description, expression))
    head = "\n\n".join(f"{source(about, noun)} {body}" for noun, _, about, body in examples)
    # What has the shape of an example is not asked.
    shown = {shape for _, shape, _, _ in examples}
    for noun, shape, description, _, asserted in everything:
        if shape not in shown:
            yield description, " ".join(shape), {
                "prompt": f"{head}\n\n{source(description, noun)}",
                "test": "def check(candidate):\n" + "\n".join(asserted) + "\n",
                "entry_point": "solve",
                "stop": "\n",
            }
