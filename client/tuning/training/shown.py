"""How a training looks at a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from client.tuning.training.loop import Evaluation, Pace, Watcher
from net import console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Shown(Watcher):
    """A bar where a person sees it, and a line on standard error for each evaluation.

    A context manager; the bar is there within.
    """

    def __init__(self, *, is_silent: bool = False) -> None:
        """``is_silent``: nothing but the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._is_silent = is_silent
        self._bar: Progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TextColumn("{task.fields[told]}"),
            console=Console(stderr=True, highlight=False),
            disable=not console.is_terminal(sys.stderr),
        )
        self._task: TaskID = self._bar.add_task("train", total=None, told="")
        self._loss = ""
        self._held_out = ""

    def __enter__(self) -> Shown:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self._is_silent:
            self.say_surely(text)

    def say_surely(self, text: str) -> None:
        """The same, even if this is to be silent."""
        if sys.stderr is not None:
            self._bar.console.print(text, markup=False, soft_wrap=True)

    def began(self, step: int, steps: int) -> None:
        self._bar.update(self._task, completed=step, total=steps)

    def stepped(self, step: int, loss: float, pace: Pace) -> None:
        self._loss = f"loss {loss:.3f}"
        speed = f"{pace.tokens_per_s:.0f} tokens/s"
        left = "" if pace.left_s is None else f"{spell_time(pace.left_s)} left"
        told = ", ".join(part for part in (self._loss, self._held_out, speed, left) if part)
        self._bar.update(self._task, completed=step, told=told)

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self._held_out = f"held-out {evaluation.loss:.3f}"
        parts = [f"step {step}: held-out loss {evaluation.loss:.4f}"]
        if evaluation.accuracy is not None:
            parts.append(f"{evaluation.accuracy:.1%} right")
        if self._loss:
            parts.append(self._loss)
        self.say(", ".join(parts))


def spell_time(seconds: float) -> str:
    """Such as ``1:02:03`` or ``2:03``."""
    whole = time.gmtime(min(max(0.0, seconds), 86_399))
    if seconds >= 86_400:
        return f"{seconds / 86_400:.1f} days"
    return time.strftime("%-H:%M:%S" if seconds >= 3600 else "%-M:%S", whole)
