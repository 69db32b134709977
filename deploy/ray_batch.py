#!/usr/bin/env python3
"""Best of N over a file of prompts, with Ray Data and one or more Podium servers.

    pip install "ray[data]"
    python ray_batch.py prompts.jsonl answers --url http://127.0.0.1:8000 --best-of 8 --ranker gcd

A line of the file is such as {"id": 1, "prompt": "Why is the sky blue?"}; further fields are kept.
`answers` becomes a folder of JSON lines with `answer`, `score` and `seed` beside them. A prompt's seed
depends on the prompt alone, so the same file gives the same answers, whoever computes them.
"""

import argparse
import hashlib
import json
import os
import time
import urllib.error
import urllib.request

import ray

ATTEMPTS = 6


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("prompts", help="JSON lines")
    parser.add_argument("answers", help="folder to write")
    parser.add_argument("--url", action="append", required=True, help="of a server; as often as there are servers")
    parser.add_argument("--best-of", type=int, default=8)
    parser.add_argument("--ranker", help="that chooses (default: the server's)")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--in-flight", type=int, default=8, help="prompts that a server has at a time")
    return parser.parse_args()


class Asker:
    """One line of prompts to the servers: as many of these run as prompts are in flight."""

    def __init__(self, urls: list, fields: dict):
        self.urls, self.fields = urls, fields
        self.headers = {"content-type": "application/json"}
        if key := os.environ.get("PODIUM_API_KEY"):
            self.headers["authorization"] = f"Bearer {key}"

    def __call__(self, row: dict) -> dict:
        digest = hashlib.sha256(row["prompt"].encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        body = {
            "messages": [{"role": "user", "content": row["prompt"]}],
            "seed": seed,
            "return_scores": True,
            **self.fields,
        }
        # The same prompt goes to the same server, which may have its prefix; the next one if that is gone.
        answer = self.ask(json.dumps(body).encode(), digest[4])
        choice = answer["choices"][0]
        return {**row, "answer": choice["message"]["content"], "score": choice["score"], "seed": seed}

    def ask(self, body: bytes, first: int) -> dict:
        for attempt in range(ATTEMPTS):
            url = self.urls[(first + attempt) % len(self.urls)]
            request = urllib.request.Request(f"{url}/v1/chat/completions", body, self.headers)
            try:
                with urllib.request.urlopen(request, timeout=600) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                # Full, or shutting down: try elsewhere, or later. Anything else is the request's fault.
                if error.code not in (429, 503) or attempt == ATTEMPTS - 1:
                    raise RuntimeError(f"{url}: {error.code} {error.read().decode()[:500]}") from None
                pause = float(error.headers.get("retry-after", 1))
            except OSError:
                if attempt == ATTEMPTS - 1:
                    raise
                pause = 1.0
            time.sleep(pause if len(self.urls) == 1 else pause / 4)
        raise AssertionError("the last attempt raises")


def main() -> None:
    options = arguments()
    fields = {"best_of": options.best_of, "max_tokens": options.max_tokens}
    if options.ranker:
        fields["ranker"] = options.ranker
    askers = options.in_flight * len(options.url)
    prompts = ray.data.read_json(options.prompts, file_extensions=None).repartition(askers)
    # They wait most of the time.
    answers = prompts.map(
        Asker,
        fn_constructor_args=[options.url, fields],
        compute=ray.data.ActorPoolStrategy(size=askers),
        num_cpus=0.01,
    )
    answers.write_json(options.answers)


if __name__ == "__main__":
    main()
