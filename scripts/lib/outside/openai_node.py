"""openai_node.mjs against a server: openai_node.py PODIUM NODE_MODULES_PARENT FOLDER"""

import subprocess
import sys
from pathlib import Path

from servers import podium


def main() -> None:
    binary, modules, folder = map(Path, sys.argv[1:])
    with podium(binary, folder / "server.log", "--threads", 1, "--served-model-name", "small") as (port, _):
        script = Path(__file__).with_name("openai_node.mjs")
        subprocess.run(["node", script, modules, f"http://127.0.0.1:{port}/v1"], check=True)


if __name__ == "__main__":
    main()
