"""Servers on this machine for the length of a test."""

import http.client
import json
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def request(port: int, method: str, path: str, body=None, headers: dict | None = None, timeout: float = 120):
    """Status, headers and text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read().decode()
    finally:
        connection.close()


def post(port: int, path: str, body: dict) -> dict:
    status, _, text = request(port, "POST", path, body)
    if status != 200:
        raise RuntimeError(f"{path}: {status} {text[:500]}")
    return json.loads(text)


@contextmanager
def process(command: list, log: Path, ready, patience: float = 120):
    """A process, from the moment at which `ready()` says that it answers to the end of the block."""
    with open(log, "wb") as written:
        started = subprocess.Popen([str(part) for part in command], stdout=written, stderr=written)
    try:
        deadline = time.monotonic() + patience
        while not ready():
            if started.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not come up; {log} ends with:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield started
    finally:
        if started.poll() is None:
            started.send_signal(signal.SIGTERM)
        try:
            started.wait(60)
        except subprocess.TimeoutExpired:
            started.kill()


def answers(port: int, path: str = "/health"):
    """Whether a server answers a GET with 200."""

    def ready() -> bool:
        try:
            return request(port, "GET", path, timeout=5)[0] == 200
        except OSError:
            return False

    return ready


@contextmanager
def podium(binary: Path, log: Path, *options, port: int | None = None):
    """`podium serve`; gives its port and its process."""
    port = port or free_port()
    command = [binary, "serve", "--port", port, *options]
    with process(command, log, answers(port)) as started:
        yield port, started
