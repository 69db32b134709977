"""deploy/ray_batch.py over a file, with two servers of which one is stopped meanwhile.

    ray_batch.py PODIUM PYTHON FOLDER     (PYTHON: of an environment with ray[data])
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from servers import podium, post

PROMPTS = 40


def main() -> None:
    binary, python, folder = map(Path, sys.argv[1:])
    prompts = folder / "prompts.jsonl"
    lines = [{"id": index, "prompt": f"Name {index} things that are green."} for index in range(PROMPTS)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--threads", 1, "--ranker", "gcd"]
    with podium(binary, folder / "one.log", *options) as (one, _), podium(binary, folder / "two.log", *options) as (two, second):
        script = Path(__file__).parents[3] / "deploy/ray_batch.py"
        command = [python, script, prompts, folder / "answers", "--best-of", 4, "--max-tokens", 16, "--in-flight", 2]
        command += ["--url", f"http://127.0.0.1:{one}", "--url", f"http://127.0.0.1:{two}"]
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
        drained = threading.Event()

        def drain() -> None:
            # Once it has answered something: it finishes what it has, and refuses the rest.
            while "/v1/chat/completions" not in (folder / "two.log").read_text() and not drained.wait(0.2):
                pass
            second.send_signal(signal.SIGTERM)

        watcher = threading.Thread(target=drain)
        watcher.start()
        with open(folder / "ray.log", "w") as log:
            done = subprocess.run([str(part) for part in command], env=environment, stdout=log, stderr=log)
        drained.set()
        watcher.join()
        assert done.returncode == 0, (folder / "ray.log").read_text()[-3000:]
        answers = [json.loads(line) for path in (folder / "answers").glob("*.json") for line in path.read_text().splitlines()]
        assert sorted(answer["id"] for answer in answers) == list(range(PROMPTS))
        for answer in answers:
            body = {
                "messages": [{"role": "user", "content": answer["prompt"]}],
                "best_of": 4,
                "max_tokens": 16,
                "seed": answer["seed"],
            }
            direct = post(one, "/v1/chat/completions", body)
            assert direct["choices"][0]["message"]["content"] == answer["answer"], answer
        print(f"ray: {PROMPTS} prompts, best of 4, two servers of which one was stopped: every answer, and the same as alone")


if __name__ == "__main__":
    main()
