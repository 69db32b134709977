"""/openapi.json is valid, and requests made from it, good and bad, get no answer that it does not know and
no 5xx. openapi.py PODIUM BIN FOLDER     (BIN: with openapi-spec-validator and schemathesis)"""

import re
import subprocess
import sys
from pathlib import Path

from servers import podium, request

CHECKS = ["not_a_server_error", "status_code_conformance", "content_type_conformance"]
CHECKS += ["unsupported_method", "allow_header_conformance", "ignored_auth"]
SECONDS = 60


def main() -> None:
    binary, tools, folder = map(Path, sys.argv[1:])
    options = ["--threads", 1, "--max-tokens", 8, "--max-candidates", 4, "--ranker", "gcd"]
    for key in [None, "secret"]:
        keys = ["--api-key", key] if key else []
        with podium(binary, folder / "server.log", *options, *keys) as (port, _):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            document = folder / "openapi.json"
            document.write_text(request(port, "GET", "/openapi.json", headers=headers)[2])
            subprocess.run([tools / "openapi-spec-validator", document], check=True)
            command = [tools / "schemathesis", "run", document, "--url", f"http://127.0.0.1:{port}"]
            command += ["--max-time", SECONDS, "--phases", "coverage,fuzzing", "--checks", ",".join(CHECKS)]
            command += ["--continue-on-failure", "--request-timeout", 30, "--report-dir", folder]
            command += ["-H", f"Authorization: Bearer {key}"] if key else []
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder)
            (folder / "schemathesis.log").write_text(done.stdout + done.stderr)
            assert done.returncode == 0, done.stdout[-4000:]
            # It is as healthy as before.
            assert request(port, "GET", "/health")[0] == 200
            cases = re.search(r"(\d+) generated", done.stdout)
            print(f"openapi.json: valid; {cases[1]} requests made from it, {'with' if key else 'without'} a key")


if __name__ == "__main__":
    main()
