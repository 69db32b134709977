"""What the measuring scripts write into docs/."""

import os
import re
import tempfile
from pathlib import Path


def processor() -> str:
    """The processor as the kernel names it, and what it has of what matters here."""
    text = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*:\s*(.*)", text)
    flags = set((re.search(r"flags\s*:\s*(.*)", text) or [None, ""])[1].split())
    known = [flag for flag in ["avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"] if flag in flags]
    return f"{name[1] if name else 'unknown processor'} ({', '.join(known)})"


def write_docs(page: Path, script: str, lines: list) -> None:
    """Puts the lines between a script's marks in a page."""
    begin, end = f"<!-- {script}: begin -->", f"<!-- {script}: end -->"
    head, rest = page.read_text().split(begin)
    text = head + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end)[1]
    with tempfile.NamedTemporaryFile("w", dir=page.parent, delete=False) as partial:
        partial.write(text)
        partial.flush()
        os.fsync(partial.fileno())
    os.chmod(partial.name, 0o644)
    os.replace(partial.name, page)
