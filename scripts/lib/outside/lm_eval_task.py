"""lm-eval against a server, on two tasks of this file, with no other network: its log-probabilities are
those of `podium score`.

    lm_eval_task.py PODIUM LM_EVAL FOLDER
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from servers import podium, post

# Answers with a space in front: where prompt and answer meet, tokens do not depend on what follows.
SUMS = [(a, b) for a in (3, 8, 12, 25) for b in (4, 9, 17)]
TASKS = {
    "podium_choice": """
task: podium_choice
output_type: multiple_choice
doc_to_text: "Question: What is {{a}} + {{b}}?\\nAnswer:"
doc_to_target: 0
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
""",
    "podium_write": """
task: podium_write
output_type: generate_until
doc_to_text: "Question: What is {{a}} + {{b}}?\\nAnswer:"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
  temperature: 0
metric_list:
  - metric: exact_match
""",
}
# A score attends to the prompt and to the candidate apart, an echoed prompt in one run: the sums are the same
# but for their order. With --exact that is float32's rounding; without it activations are rounded to 16 bits
# on the way, which the other order may turn the other way (2e-4 was seen).
TOLERANCE = 1e-4


def write_tasks(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"a": a, "b": b, "choices": [str(a + b), str(a + b + 1), str(a * b)]} for a, b in SUMS]
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.lstrip() + source)


def samples(folder: Path, task: str) -> list:
    [path] = folder.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored(binary: Path, port: int, folder: Path, found: list) -> list:
    """Log-probabilities of `podium score` for the same tokens: of each sample, of each choice."""
    file = folder / "candidates.jsonl"
    with file.open("w") as written:
        for sample in found:
            prompt, _ = sample["arguments"]["gen_args_0"].values()
            prompt_ids = tokens(port, prompt)
            whole = [tokens(port, "".join(arguments.values())) for arguments in sample["arguments"].values()]
            assert all(ids[: len(prompt_ids)] == prompt_ids for ids in whole)
            candidates = [ids[len(prompt_ids) :] for ids in whole]
            line = {"id": sample["doc_id"], "prompt_token_ids": prompt_ids, "candidate_token_ids": candidates}
            # The texts say nothing beside the tokens, but a line has them.
            line["candidates"] = [list(arguments.values())[1] for arguments in sample["arguments"].values()]
            written.write(json.dumps(line) + "\n")
    done = subprocess.run([binary, "score", file, "--logprobs", "--exact", "--threads", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [[sum(of_candidate) for of_candidate in line["token_logprobs"]] for line in lines]


def tokens(port: int, text: str) -> list:
    return post(port, "/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]


def main() -> None:
    binary, lm_eval, folder = map(Path, sys.argv[1:])
    write_tasks(folder / "tasks")
    with podium(binary, folder / "server.log", "--exact", "--threads", 1, "--served-model-name", "small") as (port, _):
        arguments = f"model=small,base_url=http://127.0.0.1:{port}/v1/completions,tokenizer_backend=auto,num_concurrent=4"
        command = [lm_eval, "run", "--model", "local-completions", "--model_args", arguments, "--tasks", ",".join(TASKS)]
        command += ["--include_path", folder / "tasks", "--log_samples", "--output_path", folder / "out"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
        with open(folder / "lm-eval.log", "w") as log:
            done = subprocess.run([str(part) for part in command], env=environment, stdout=log, stderr=log)
        assert done.returncode == 0, (folder / "lm-eval.log").read_text()[-3000:]
        chosen = samples(folder / "out", "podium_choice")
        ours = scored(binary, port, folder, chosen)
        worst, count = 0.0, 0
        for sample, of_choices in zip(chosen, ours):
            for response, logprob in zip(sample["resps"], of_choices):
                theirs = float(response[0][0])
                worst, count = max(worst, abs(theirs - logprob) / abs(logprob)), count + 1
        written = samples(folder / "out", "podium_write")
        assert all(sample["resps"][0][0] for sample in written)
    assert count == 3 * len(SUMS) and worst < TOLERANCE, (count, worst)
    accuracy = sum(sample["acc"] for sample in chosen) / len(chosen)
    print(
        f"lm-eval: {count} log-likelihoods, at most {worst:.1e} (relative) from `podium score`; "
        f"accuracy {accuracy:.2f}; {len(written)} answers written"
    )


if __name__ == "__main__":
    main()
