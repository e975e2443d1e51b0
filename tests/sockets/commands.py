"""``raceme`` as processes of their own, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
START_S = 40.0
STOP_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a process ended."""

    status: int
    output: str
    errors: str

    @property
    def json(self) -> Any:
        """The one object on standard output."""
        [line] = self.output.splitlines()
        return json.loads(line)


class Command:
    """A running ``raceme``."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self._popen = popen
        self.pid = popen.pid

    def line(self) -> str:
        """The next line of standard output, without its end."""
        line = self._read_line(self._popen.stdout)
        assert line.endswith("\n"), self.end()
        return line[:-1]

    def _read_line(self, stream: IO[str] | None) -> str:
        timer = threading.Timer(START_S, self._popen.kill)
        timer.daemon = True
        try:
            timer.start()
            assert stream is not None
            return stream.readline()
        finally:
            timer.cancel()

    def json(self) -> Any:
        return json.loads(self.line())

    def error_line(self) -> str:
        """The next line of standard error, without its end."""
        return self._read_line(self._popen.stderr).rstrip("\n")

    def send(self, number: signal.Signals) -> None:
        """Send a signal, and go on."""
        self._popen.send_signal(number)

    def note(self) -> str:
        """The next note on standard error, without what notes begin with."""
        lines = [self._read_line(self._popen.stderr) for _ in range(2)]
        assert lines[0] == "\n", lines
        assert lines[1].startswith("raceme: note: "), lines
        return lines[1].removeprefix("raceme: note: ").rstrip("\n")

    def end(self, by: signal.Signals | None = None, *, timeout_s: float = STOP_S, stdin: str | None = None) -> Outcome:
        """Send a signal, if any, and wait for the end."""
        if by is not None:
            self._popen.send_signal(by)
        output, errors = self._popen.communicate(stdin, timeout=timeout_s)
        return Outcome(status=self._popen.returncode, output=output, errors=errors)

    def kill(self) -> None:
        self._popen.kill()
        self._popen.communicate()


@contextmanager
def started(home: Path, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[Command]:
    """``raceme ARGUMENTS``, with ``env`` added to the environment; killed at the end of the block if still there."""
    popen = subprocess.Popen(
        [sys.executable, "-m", "client", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RACEME_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(env or {})},
    )
    command = Command(popen)
    try:
        yield command
    finally:
        if popen.poll() is None:
            command.kill()


def run(
    home: Path, *arguments: str, stdin: str = "", timeout_s: float = 60.0, env: Mapping[str, str] | None = None
) -> Outcome:
    """``raceme ARGUMENTS`` to its end."""
    with started(home, *arguments, env=env) as command:
        return command.end(timeout_s=timeout_s, stdin=stdin)
