"""What the measuring scripts write into docs/."""

import os
import re
import tempfile
from pathlib import Path


def processor() -> str:
    """The processor as the kernel names it, and what it has of what matters here."""
    text = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*:\s*(.*)", text)
    family = re.search(r"cpu family\s*:\s*(.*)\nmodel\s*:\s*(.*)", text)
    flags = set((re.search(r"flags\s*:\s*(.*)", text) or [None, ""])[1].split())
    known = [flag for flag in ["avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"] if flag in flags]
    numbers = f", family {family[1]} model {family[2]}" if family else ""
    return f"{name[1] if name else 'unknown processor'}{numbers} ({', '.join(known)})"


def replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as partial:
        partial.write(text)
        partial.flush()
        os.fsync(partial.fileno())
    os.chmod(partial.name, 0o644)
    os.replace(partial.name, path)


def write_docs(page: Path, script: str, lines: list) -> None:
    """Puts the lines between a script's marks in a page."""
    begin, end = f"<!-- {script}: begin -->", f"<!-- {script}: end -->"
    head, rest = page.read_text().split(begin)
    replace(page, head + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end)[1])
