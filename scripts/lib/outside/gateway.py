"""Two workers behind the gateway `smg`, cache-aware: best of N goes through by the model's name, and when
one worker is killed no request fails that was not on it.

    gateway.py PODIUM SMG FOLDER
"""

import json
import sys
import threading
import time
from pathlib import Path

from servers import free_port, podium, post, process, request

# The gateway takes the first name that a worker lists for its model's only one.
NAME = "small:best-of-4:gcd"


def gateway_command(smg: Path, port: int, metrics: int, workers: list) -> list:
    """As deploy/README.md has it."""
    command = [smg, "launch", "--host", "127.0.0.1", "--port", port, "--policy", "cache_aware"]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", metrics]
    command += ["--health-check-interval-secs", 2, "--health-failure-threshold", 1]
    return command + ["--worker-urls", *(f"http://127.0.0.1:{port}" for port in workers)]


def chat(index: int, stream: bool = False, **fields) -> dict:
    # Prompts in four families, each with a beginning of its own for the gateway to recognise.
    family = index % 4
    prompt = f"Story {family}: " + f"word{family} " * 30 + f"Question {index}?"
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 12,
        "seed": index,
        "stream": stream,
        **fields,
    }


def routes_to(gateway: int):
    """Whether a gateway has found its workers."""

    def ready() -> bool:
        try:
            return request(gateway, "POST", "/v1/chat/completions", chat(0, max_tokens=1), timeout=10)[0] == 200
        except OSError:
            return False

    return ready


def answered(port: int) -> int:
    """Chats that a worker has answered."""
    _, _, text = request(port, "GET", "/metrics")
    lines = [line for line in text.splitlines() if line.startswith("podium_http_requests_total")]
    return sum(int(float(line.split()[-1])) for line in lines if "/v1/chat/completions" in line and '"200"' in line)


def passes_through(gateway: int, workers: list) -> None:
    results, before = {}, [answered(port) for port in workers]

    def ask(index: int) -> None:
        results[index] = post(gateway, "/v1/chat/completions", chat(index))

    threads = [threading.Thread(target=ask, args=[index]) for index in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(24):
        answer = results[index]
        assert answer["podium"]["best_of"] == 4 and answer["podium"]["ranker"] == "gcd", answer["podium"]
        assert answer["usage"]["completion_tokens"] > 12, answer["usage"]
        # Behind the gateway or not: the same.
        direct = post(workers[index % 2], "/v1/chat/completions", chat(index))
        assert direct["choices"] == answer["choices"], index
    shares = [answered(port) - 12 - asked for port, asked in zip(workers, before)]
    assert all(share > 0 for share in shares) and sum(shares) == 24, shares
    # And what a request says itself goes through too.
    assert post(gateway, "/v1/chat/completions", chat(0, best_of=2))["podium"]["best_of"] == 2
    print(f"24 best-of-4 requests by model name: all as asked, shared {shares[0]} and {shares[1]}")


def wait_for(condition) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def survives(gateway: int, workers: list, processes: list, logs: list) -> None:
    outcomes, killed = {}, threading.Event()
    done = threading.Event()

    def client(first: int) -> None:
        index = first
        while not done.is_set():
            stream = index % 2 == 0
            name = f"kill-{index}"
            before = not killed.is_set()
            try:
                headers = {"x-request-id": name}
                status, _, text = request(gateway, "POST", "/v1/chat/completions", chat(index, stream), headers)
                # A stream that broke off behind the gateway ends with an error event.
                whole = status == 200 and '"finish_reason"' in text and '"error"' not in text
                whole = whole and (not stream or text.rstrip().endswith("[DONE]"))
                outcomes[name] = (whole, before, f"{status} {text[-300:]}")
            except OSError as error:
                outcomes[name] = (False, before, repr(error))
            index += 8

    clients = [threading.Thread(target=client, args=[index]) for index in range(8)]
    for thread in clients:
        thread.start()
    wait_for(lambda: len(outcomes) >= 8)
    load = json.loads(request(workers[1], "GET", "/load")[2])
    processes[1].kill()
    killed.set()
    wait_for(lambda: sum(ok and not before for ok, before, _ in list(outcomes.values())) >= 24)
    done.set()
    for thread in clients:
        thread.join()
    failed = {name: outcome for name, outcome in outcomes.items() if not outcome[0]}
    for name, (_, before, what) in failed.items():
        # It was sent before the kill, and no other worker had it.
        assert before and name not in logs[0].read_text(), f"{name} failed: {what}"
    good = len(outcomes) - len(failed)
    after = sum(ok and not before for ok, before, _ in outcomes.values())
    print(
        f"one worker killed with {load['server_load']} requests on it: {good} of {len(outcomes)} requests whole "
        f"({after} of them sent after it), {len(failed)} failed, all of them on that worker"
    )
    assert len(failed) <= load["server_load"] + 1, failed


def main() -> None:
    binary, smg, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / "worker-0.log", folder / "worker-1.log"]
    options = ["--served-model-name", NAME, "--threads", 1]
    with podium(binary, logs[0], *options) as (first, one), podium(binary, logs[1], *options) as (second, two):
        gateway, metrics = free_port(), free_port()
        command = gateway_command(smg, gateway, metrics, [first, second])
        with process(command, folder / "smg.log", routes_to(gateway)):
            passes_through(gateway, [first, second])
            survives(gateway, [first, second], [one, two], logs)


if __name__ == "__main__":
    main()
