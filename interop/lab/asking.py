"""Processes that speak JSON: one that answers every line with one, as the core and our nodes do, and our commands."""

from __future__ import annotations

import json
from typing import Any

import trio

from interop.lab.namespaces import LabError


class Asked:
    """Our end of its standard input and output. One question at a time; others wait their turn."""

    def __init__(self, process: trio.Process, what: str) -> None:
        self.process = process
        self._what = what
        self._lock = trio.Lock()
        self._heard = b""

    async def ask(self, **order: Any) -> dict[str, Any]:
        """Have it do something.

        Raises:
            LabError: it could not (``{"error": ...}``), or has ended.
        Cancellation: the answer is then taken for that of the next question; end the process.
        """
        if self.process.stdin is None or self.process.stdout is None:
            raise LabError(f"{self._what} is not piped")
        async with self._lock:
            try:
                await self.process.stdin.send_all(json.dumps(order).encode() + b"\n")
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise LabError(f"{self._what} has ended") from error
            while b"\n" not in self._heard:
                heard = await self.process.stdout.receive_some()
                if not heard:
                    raise LabError(f"{self._what} has ended")
                self._heard += heard
            line, self._heard = self._heard.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise LabError(f"{self._what}: {answer['error']}")
        return answer


async def first_line(process: trio.Process) -> dict[str, Any]:
    """What a command with ``--json`` says once it is up.

    Raises:
        LabError: it ended before that.
    """
    heard = b""
    while b"\n" not in heard:
        data = b"" if process.stdout is None else await process.stdout.receive_some()
        if not data:
            raise LabError(f"{process.args!r:.200} has ended without a word")
        heard += data
    found: dict[str, Any] = json.loads(heard.split(b"\n")[0])
    return found
