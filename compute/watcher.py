"""Who is told what an engine does: ``compute/metrics.py``, or a test."""

from __future__ import annotations

from typing import Protocol

from compute.estimates import Kind


class Watcher(Protocol):
    """Who is told what an engine does."""

    def batch_done(self, kind: Kind, rows: int, took_s: float) -> None:
        """A batch has run: so many tokens, side by side."""

    def job_done(self, kind: Kind, tokens: int, waited_s: float, took_s: float) -> None:
        """A step, or half of a training step, has succeeded.

        Args:
            kind: What it was.
            tokens: In it, rows counted apart.
            waited_s: Until its first piece ran.
            took_s: From when it was asked for until it was over.
        """
