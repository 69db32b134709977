"""podium serve under load: held against one offline batch of the same work, and against llama-server.

Every client sends requests one after another, each a prompt of its own (random tokens, so that nothing
is found in a cache) with N candidates of a fixed number of tokens. Speed is tokens of all candidates
over the time from the first request to the last answer, prefill included.

The offline batch is computed from what `podium bench` measures in the same round, without engine and
server: prefill at the mean length of the prompts, decoding at clients x N candidates.
"""

import argparse
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import engines
from page import processor, write_docs

# llama-server's defaults, the same for both.
SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
# Token ids below these are special in the default model.
FIRST_TOKEN, LAST_TOKEN = 100, 40_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/peers-serve", description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=8, help="that send at a time (default: 8)")
    parser.add_argument("--n", type=int, default=8, help="candidates of a request (default: 8)")
    parser.add_argument("--requests", type=int, default=3, help="of each client (default: 3)")
    parser.add_argument("--prompt", default="16,64,128,256,384,512,640,768", help="lengths of prompts, in turn")
    parser.add_argument("--tokens", type=int, default=128, help="of each candidate (default: 128)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all")
    parser.add_argument("--json", type=Path, help="also write every round's figures here, and add to those there")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/SERVING.md")
    for hidden in ["podium", "llama", "model", "docs"]:
        parser.add_argument(f"--{hidden}", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


@contextmanager
def running(command: list, port: int):
    """A server, from the moment at which it answers."""
    log = tempfile.TemporaryFile()
    server = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
    try:
        for _ in range(600):
            if server.poll() is not None:
                log.seek(0)
                raise RuntimeError(f"{command[0]} ended:\n{log.read().decode()[-2000:]}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{command[0]} does not answer")
        yield
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def load(port: int, options: argparse.Namespace, extra: dict, seed: int) -> dict:
    """Speed of a server under all clients."""
    lengths = [int(length) for length in options.prompt.split(",")]
    tokens, problems, latencies = [0] * options.clients, [], []

    def client(index: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        for number in range(options.requests):
            # Each client goes through the lengths from a place of its own.
            length = lengths[(index + 3 * number) % len(lengths)]
            draw = random.Random(f"{seed} {index} {number}")
            body = {
                "prompt": [draw.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)],
                "max_tokens": options.tokens,
                "ignore_eos": True,
                "seed": index * 1000 + number,
                "n": options.n,
                **SAMPLING,
                **extra,
            }
            started = time.perf_counter()
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            text = response.read()
            latencies.append(time.perf_counter() - started)
            if response.status != 200:
                problems.append(text[:300])
                return
            answer = json.loads(text)
            # llama-server's usage is of one choice; with `length`, all have as many tokens as they may.
            ends = [choice["finish_reason"] for choice in answer["choices"]]
            if ends != ["length"] * options.n:
                problems.append(f"choices that end by {ends}")
                return
            tokens[index] += options.n * options.tokens

    threads = [threading.Thread(target=client, args=[index]) for index in range(options.clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if problems:
        raise RuntimeError(f"{len(problems)} clients failed, such as: {problems[0]}")
    return {"tokens_per_s": sum(tokens) / seconds, "request_s": statistics.median(latencies)}


def podium_serve(options: argparse.Namespace, seed: int) -> dict:
    port = free_port()
    command = [options.podium, "serve", "--model", options.model, "--port", port, "--threads", options.threads]
    with running(command, port):
        # A ranker would choose among the same candidates: all come back here, as from the peer.
        return load(port, options, {"best_of": options.n}, seed)


def llama_server(options: argparse.Namespace, seed: int) -> dict:
    """Each slot with a cache of its own: in a unified one every query looks at the cells of all slots,
    which is less than half as fast on this work."""
    port = free_port()
    slots = options.clients * options.n
    longest = max(map(int, options.prompt.split(",")))
    context = slots * (longest + options.tokens + 32)
    command = [options.llama / "llama-server", "-m", options.model, "--port", port, "-t", options.threads]
    command += ["-np", slots, "-no-kvu", "-c", context, "-b", 2048, "-ub", 512]
    command += ["--cache-ram", 0]
    with running(command, port):
        return load(port, options, {}, seed)


def offline(options: argparse.Namespace) -> dict:
    lengths = [int(length) for length in options.prompt.split(",")]
    # The mean over the requests as the clients send them.
    sent = [
        lengths[(client + 3 * number) % len(lengths)]
        for client in range(options.clients)
        for number in range(options.requests)
    ]
    prompt = round(statistics.mean(sent))
    candidates = options.clients * options.n
    work = engines.Work(prompt, options.tokens, [candidates], options.threads)
    speeds = engines.podium(options.podium, options.model, work, isa=None)
    prefill_s = sum(sent) / speeds["prefill"]
    tokens = len(sent) * options.n * options.tokens
    decode_s = tokens / speeds["decode"][candidates]
    return {
        "tokens_per_s": tokens / (prefill_s + decode_s),
        "decode_tokens_per_s": speeds["decode"][candidates],
        "prefill_tokens_per_s": speeds["prefill"],
        "prompt": prompt,
    }


def cell(values: list, digits: int) -> str:
    return f"{min(values):.{digits}f} / **{statistics.median(values):.{digits}f}** / {max(values):.{digits}f}"


def table(options: argparse.Namespace, rounds: list) -> list:
    def speeds(name: str) -> list:
        return [one[name]["tokens_per_s"] for one in rounds]

    def ratios(other: str) -> list:
        return [one["podium serve"]["tokens_per_s"] / one[other]["tokens_per_s"] for one in rounds]

    prompts = sorted(map(int, options.prompt.split(",")))
    return [
        f"{time.strftime('%Y-%m-%d')}, {options.threads} threads of {processor()}, {options.model.stem}; "
        f"{options.clients} clients, {options.requests} requests each, prompts of {prompts[0]} to {prompts[-1]} tokens, "
        f"{options.n} candidates of {options.tokens} tokens; {len(rounds)} rounds, least / median / most:",
        "",
        "| | tokens/s of all candidates, prefill included |",
        "| --- | --- |",
        f"| `podium serve` | {cell(speeds('podium serve'), 0)} |",
        f"| offline batch of the same work (`podium bench`) | {cell(speeds('offline'), 0)} |",
        f"| `llama-server`, {options.clients * options.n} slots | {cell(speeds('llama-server'), 0)} |",
        f"| **Podium ÷ offline** | {cell(ratios('offline'), 2)} |",
        f"| **Podium ÷ llama-server** | {cell(ratios('llama-server'), 2)} |",
    ]


def main() -> None:
    options = arguments()
    rounds = []
    if options.json and options.json.exists():
        rounds = json.loads(options.json.read_text())
    for number in range(options.rounds):
        started = time.monotonic()
        seed = len(rounds)
        one = {}
        for name, run in [
            ("podium serve", lambda: podium_serve(options, seed)),
            ("offline", lambda: offline(options)),
            ("llama-server", lambda: llama_server(options, seed)),
        ]:
            one[name] = run()
            print(f"  {name}: {one[name]['tokens_per_s']:.0f} tokens/s", file=sys.stderr, flush=True)
        rounds.append(one)
        print(f"round {number + 1} of {options.rounds}, {time.monotonic() - started:.0f} s", file=sys.stderr)
        if options.json:
            options.json.write_text(json.dumps(rounds, indent=1))
    lines = table(options, rounds)
    print("\n".join(lines))
    if options.write_docs:
        write_docs(options.docs / "SERVING.md", "scripts/peers-serve", lines)


if __name__ == "__main__":
    main()
