"""Other processes of a benchmark, told what to do on standard input and ended with it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

GOODBYE_S = 5.0


@contextlib.contextmanager
def another(module: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """``python -m module words...``, until the block ends."""
    command = [sys.executable, "-m", module, *words]
    popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield popen
    finally:
        if popen.stdin is not None:
            popen.stdin.close()
        try:
            popen.wait(GOODBYE_S)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
