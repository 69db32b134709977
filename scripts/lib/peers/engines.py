"""The engines, each as one function: one round of one model, its speeds in tokens per second.

A round gives {"prefill": tokens/s, "decode": {n: tokens/s of all n together}}: a prompt is prefilled
once, then n candidates decode some steps behind it.
"""

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Work:
    prompt: int
    steps: int
    n: list
    threads: int


def run(command: list, environment: dict | None = None) -> str:
    """What a command prints."""
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (environment or {}))
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def podium(binary: Path, model: Path, work: Work, isa: str | None) -> dict:
    n = ",".join(map(str, work.n))
    command = [binary, "bench", "--json", "--rounds", 1, "--model", model, "--threads", work.threads, "--n", n]
    command += ["--prompt-tokens", work.prompt, "--steps", work.steps]
    report = json.loads(run(command, {"PODIUM_ISA": isa or ""}))
    rows = {row["n"]: row for row in report["decode"]}
    return {
        "prefill": report["prefill"]["tokens_per_s"],
        "decode": {n: row["tokens_per_s"] for n, row in rows.items()},
        "limits": report["limits"],
        "memory": report["memory"],
        "floors": {n: floor(row, report["limits"]) for n, row in rows.items()},
        "prefill_floor": floor(report["prefill"], report["limits"]),
        "prefill_matmul": report["prefill"]["matmul_share_of_fma_peak"],
        "read": {n: row["share_of_read_bandwidth"] for n, row in rows.items()},
    }


def first_token(binary: Path, model: Path, threads: int, isa: str | None, cold: bool) -> dict:
    """Seconds from the start of a process to the end of one that has written its first token, and its
    peak of resident memory; with the model's file out of the page cache where `cold`."""
    if cold:
        with open(model, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [binary, "generate", "--raw", "--n", "1", "--select", "first", "--max-tokens", "1"]
    command += ["--model", model, "--threads", threads, "Once upon a time"]
    started = time.perf_counter()
    child = subprocess.Popen(
        [str(part) for part in command],
        env=os.environ | {"PODIUM_ISA": isa or ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        raise RuntimeError(f"{command} ended with {status}")
    return {"seconds": time.perf_counter() - started, "peak_bytes": usage.ru_maxrss << 10}


def floor(row: dict, limits: dict) -> float:
    """Tokens per second that the machine's limits allow: bytes at the read bandwidth or multiply-adds
    at the float32 peak, whichever takes longer."""
    longest = max(
        row["gb_per_s"] / limits["read_gb_per_s"],
        row["gflop_per_s"] / limits["fma_gflop_per_s"],
    )
    return row["tokens_per_s"] / longest


def json_lines(command: list) -> list:
    """What a command prints as lines of JSON, between others."""
    return [json.loads(line) for line in run(command).splitlines() if line.startswith("{")]


def llama_cpp(folder: Path, model: Path, work: Work) -> dict:
    """llama-batched-bench with a shared prompt in one unified cache; it draws no tokens."""
    context = work.prompt + max(work.n) * work.steps + 256
    command = [folder / "llama-batched-bench", "-m", model, "-c", context, "-b", 2048, "-ub", 512]
    command += ["-npp", work.prompt, "-ntg", work.steps, "-npl", ",".join(map(str, work.n)), "-pps", "-kvu"]
    command += ["-t", work.threads, "--output-format", "jsonl"]
    rows = json_lines(command)
    return {
        "prefill": max(row["speed_pp"] for row in rows),
        "decode": {row["pl"]: row["speed_tg"] for row in rows},
    }


def llama_bench(folder: Path, model: Path, work: Work) -> dict:
    """llama-bench: the prefill, and one sequence behind the same prompt."""
    command = [folder / "llama-bench", "-m", model, "-t", work.threads, "-r", 1, "-o", "jsonl"]

    def speed(*tests) -> float:
        return json_lines([*command, *tests])[0]["avg_ts"]

    return {
        "prefill": speed("-p", work.prompt, "-n", 0),
        "decode": {1: speed("-p", 0, "-n", work.steps, "-d", work.prompt)},
    }


class Transformers:
    """transformers on the CPU: the prompt prefilled once, its cache copied N times, as `generate` does."""

    def __init__(self, model: Path, dtype: str, threads: int, isa: str | None):
        if isa:
            # Before torch is imported, which is when it looks.
            newest = {"avx2": "AVX2", "avx-vnni": "AVX2_VNNI"}[isa]
            os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": newest}
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            model.parent, gguf_file=model.name, dtype=getattr(torch, dtype)
        ).eval()

    def __call__(self, work: Work) -> dict:
        from transformers import DynamicCache

        torch = self.torch
        speeds = {"prefill": 0.0, "decode": {}}
        with torch.inference_mode():
            prompt = (torch.arange(work.prompt) * 31 % self.model.config.vocab_size)[None]
            for n in work.n:
                cache = DynamicCache(config=self.model.config)
                started = time.perf_counter()
                self.model(prompt, past_key_values=cache, logits_to_keep=1)
                seconds = time.perf_counter() - started
                speeds["prefill"] = max(speeds["prefill"], work.prompt / seconds)
                cache.batch_repeat_interleave(n)
                tokens = torch.ones(n, 1, dtype=torch.long)
                # A step at a hundred candidates takes a second: fewer of them tell as much.
                steps = max(4, work.steps // 4)
                started = time.perf_counter()
                for _ in range(steps):
                    logits = self.model(tokens, past_key_values=cache).logits
                    tokens = logits[:, -1].argmax(-1, keepdim=True)
                speeds["decode"][n] = n * steps / (time.perf_counter() - started)
        return speeds
