"""The one form in which all benchmarks speak."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured value: the median over ``runs``, with the least and the most.

    Attributes:
        goal: None for a figure that is only reported.
        better: ``higher`` or ``lower``.
    """

    name: str
    value: float
    unit: str
    goal: float | None
    better: str
    runs: int
    min: float
    max: float

    @property
    def is_met(self) -> bool:
        return self.goal is None or (self.value >= self.goal if self.better == "higher" else self.value <= self.goal)


def figure(name: str, values: Sequence[float], unit: str, *, better: str, goal: float | None = None) -> Figure:
    return Figure(
        name=name,
        value=statistics.median(values),
        unit=unit,
        goal=goal,
        better=better,
        runs=len(values),
        min=min(values),
        max=max(values),
    )


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="one JSON object on standard output and nothing else")
    made.add_argument("--runs", type=int, default=5, help="how often each figure is measured (default: 5)")
    return made


def machine() -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def show(bench: str, figures: Sequence[Figure], *, as_json: bool, missing: Mapping[str, str] | None = None) -> None:
    """Print the figures, for a program or for people.

    Args:
        bench: its name.
        figures: what was measured.
        as_json: one object.
        missing: what could not be measured, and why; as ``"missing": {NAME: WHY}`` in the object, if there is any.
    """
    if as_json:
        told: dict[str, Any] = {"bench": bench, "machine": machine(), "figures": [asdict(entry) for entry in figures]}
        print(json.dumps(told | ({"missing": dict(missing)} if missing else {})), flush=True)
        return
    width = max((len(name) for name in (*(entry.name for entry in figures), *(missing or ()))), default=0)
    for entry in figures:
        if entry.goal is None:
            verdict = ""
        else:
            sign = ">=" if entry.better == "higher" else "<="
            verdict = f"goal {sign} {entry.goal:g}: {'met' if entry.is_met else 'MISSED'}"
        spread = f"({entry.min:g} to {entry.max:g}, {entry.runs} runs)"
        print(f"{entry.name:<{width}}  {entry.value:>9g} {entry.unit:<16} {spread:<32} {verdict}")
    for name, why in (missing or {}).items():
        print(f"{name:<{width}}  {'missing':>9} {why}")


def progress(text: str) -> None:
    """What is being measured, on standard error."""
    print(text, file=sys.stderr, flush=True)
