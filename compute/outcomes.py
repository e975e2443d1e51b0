"""What was measured, kept per configuration as small JSON files, so that a node is the same after every restart.

A file holds ``{"key": ..., ...}`` and is named by the digest of its key: whatever may change the outcome. One that is
damaged, or that says something else than is expected, is as good as none. Files appear by being renamed, whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from net.replacing import replace_file

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutcomeFile:
    """One file.

    Attributes:
        path: Where it is, or will be.
        key: What it is for, compared as a whole.
    """

    path: Path
    key: str

    def read(self, parse: Callable[[Mapping[str, Any]], T]) -> T | None:
        """What ``parse`` makes of the content; ``None`` when there is none that can be used.

        Args:
            parse: Raises ``ValueError``, ``KeyError`` or ``TypeError`` for what it does not believe.
        """
        try:
            content = json.loads(self.path.read_bytes())
            if content["key"] != self.key:
                raise ValueError("of another configuration")
            return parse(content)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as exc:
            _log.info("%s: not used, and measured anew (%s)", self.path, exc)
            return None

    def write(self, content: Mapping[str, Any]) -> None:
        """Keep it in place of what was kept before; a folder that cannot be written is no error.

        Args:
            content: Whatever JSON holds, by names other than ``key``.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, json.dumps({"key": self.key, **content}).encode())
        except OSError as exc:
            _log.info("%s: not kept (%s)", self.path, exc)


def outcome_file(folder: Path, kind: str, configuration: object) -> OutcomeFile:
    """The file of one kind of measurement, for one configuration on this machine.

    Args:
        folder: Made when there is something to keep.
        kind: The first word of the file's name.
        configuration: Beside the machine, torch and its threads: whatever JSON holds.
    """
    key = json.dumps([torch.__version__, _machine(), configuration])
    return OutcomeFile(folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json", key)


def _machine() -> list[object]:
    return [platform.machine(), _processor(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), "")
    except OSError:
        return platform.processor()
