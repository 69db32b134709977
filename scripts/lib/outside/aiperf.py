"""The load generator AIPerf, run to its end: plain streams, and best of 4. aiperf.py PODIUM AIPERF FOLDER"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from servers import podium

REQUESTS = 24
TOKENS = 32


def tokenizer(folder: Path) -> Path:
    """Any tokenizer: it wants one from a file, though the server counts the tokens."""
    folder.mkdir(parents=True)
    source = Path(__file__).parents[3] / "tests/golden/text/byte_level/tokenizer.json"
    shutil.copy(source, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def main() -> None:
    binary, aiperf, folder = map(Path, sys.argv[1:])
    prompts = folder / "prompts.jsonl"
    lines = [{"text": f"Give tip number {index} for a good night's sleep."} for index in range(8)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokens = tokenizer(folder / "tokenizer")
    with podium(binary, folder / "server.log", "--threads", 1, "--served-model-name", "small") as (port, _):
        for best_of in [1, 4]:
            out = folder / f"best-of-{best_of}"
            extra = {"best_of": best_of, "max_tokens": TOKENS, "min_tokens": TOKENS, "ignore_eos": True}
            command = [aiperf, "profile", "-m", "small", "--endpoint-type", "chat", "--streaming"]
            command += ["--url", f"http://127.0.0.1:{port}", "--tokenizer", tokens, "--use-server-token-count"]
            command += ["--input-file", prompts, "--custom-dataset-type", "single_turn", "--concurrency", 4]
            command += ["--request-count", REQUESTS, "--extra-inputs", json.dumps(extra), "--ui", "none"]
            command += ["--output-artifact-dir", out]
            with open(folder / f"best-of-{best_of}.log", "w") as log:
                done = subprocess.run([str(part) for part in command], stdout=log, stderr=log)
            assert done.returncode == 0, (folder / f"best-of-{best_of}.log").read_text()[-2000:]
            report = json.loads((out / "profile_export_aiperf.json").read_text())
            count, errors = report["request_count"]["avg"], report.get("error_request_count") or {"avg": 0}
            length = report["output_sequence_length"]["avg"]
            assert (count, errors["avg"], length) == (REQUESTS, 0, TOKENS * best_of), (count, errors, length)
            print(
                f"aiperf, best of {best_of}: {count:.0f} requests, none failed, "
                f"{report['output_token_throughput']['avg']:.0f} tokens/s, "
                f"first token {report['time_to_first_token']['avg']:.0f} ms"
            )


if __name__ == "__main__":
    main()
