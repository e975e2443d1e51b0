"""What a session's steps gave, kept by who gave it, so that a next node that takes another's place can have it again.

Hidden states of a token are some hundredths of its keys and values. Still, all sessions' together are bounded: a
session whose results find no room has none from then on, and its client computes them again.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

MAX_BYTES: Final = 256 << 20


class OutboxBudget:
    """Bytes that all outboxes of a span may take together."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.left = max_bytes


class Outbox:
    """Results of one session, from its first token on, or nothing."""

    def __init__(self, budget: OutboxBudget) -> None:
        self._budget = budget
        self._starts: list[int] = []
        self._results: list[Tensor] = []

    @property
    def end(self) -> int:
        """Tokens that it has, from the first one on."""
        return self._starts[-1] + self._results[-1].shape[1] if self._results else 0

    def add(self, position: int, result: Tensor, order: Sequence[int] | None = None) -> None:
        """Take what a step at ``position`` gave, in place of what there was from there on.

        After rows have changed places, what there was belongs to others: it is all forgotten.

        Shapes:
            result: [b, t, d]; not to be changed afterwards
        """
        if order is not None:
            self.clear()
        self.cut(position)
        if self.end != position:
            return  # something is missing in between
        size = result.numel() * result.element_size()
        if size > self._budget.left:
            self.clear()
            return
        self._budget.left -= size
        self._starts.append(position)
        self._results.append(result)

    def cut(self, position: int) -> None:
        """Forget all tokens from ``position`` on."""
        while self._results and self.end > position:
            start, last = self._starts.pop(), self._results.pop()
            self._budget.left += last.numel() * last.element_size()
            if start < position:
                kept = last[:, : position - start].clone()  # the rest is let go
                self._budget.left -= kept.numel() * kept.element_size()
                self._starts.append(start)
                self._results.append(kept)

    def get(self, position: int, end: int) -> Tensor | None:
        """The results of tokens ``[position, end)``; ``None`` if it has not all of them.

        Shapes:
            returns: [b, end - position, d]
        """
        if not 0 <= position < end <= self.end:
            return None
        parts = []
        for index in range(bisect.bisect_right(self._starts, position) - 1, len(self._starts)):
            start, result = self._starts[index], self._results[index]
            if start >= end:
                break
            parts.append(result[:, max(0, position - start) : end - start])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def clear(self) -> None:
        """Let everything go."""
        self._budget.left += sum(result.numel() * result.element_size() for result in self._results)
        self._starts.clear()
        self._results.clear()
