"""How the loss went: a line of JSON for each step and for each evaluation, in the order of the steps.

    {"step": 12, "loss": 3.1, "learning_rate": 0.001, "tokens": 1024}
    {"step": 12, "held_out_loss": 3.3}                                       and "accuracy", of classes

The loss of step N is that of the parameters before it, on its own batch; N is from 1. What is held out is evaluated
with the parameters after step N; N is 0 for those at the beginning.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from net.replacing import replace_file


class Curve:
    """The file, which outlives a training that is taken up again."""

    def __init__(self, path: Path) -> None:
        """Begin with what the file has, if there is one."""
        self._path = path
        self.lines: list[dict[str, Any]] = _read(path) if path.exists() else []

    def cut(self, step: int) -> None:
        """Forget what came after a step, and what could not be read.

        Raises:
            OSError: It cannot be written; what was there is there still.
        """
        self.lines = [line for line in self.lines if line["step"] <= step]
        if self._path.exists():
            replace_file(self._path, "".join(map(_spell, self.lines)).encode())

    def add(self, **line: Any) -> None:
        """Write one line.

        Raises:
            OSError: It cannot be written.
        """
        self.lines.append(line)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_spell(line))

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """What was found after a step, if anything was."""
        return next((line for line in reversed(self.lines) if line["step"] == step and "held_out_loss" in line), None)


def _spell(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """Its lines, without those that a crash has cut off."""
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and type(line.get("step")) is int:
            found.append(line)
    return found
