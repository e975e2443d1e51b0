"""What a drafter is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Tokens that may follow a context.

    Attributes:
        tokens: the drafted continuation; empty if there is none.
        grades: how sure the drafter is of each token should those before it be right: 0 (least) and up. What a grade
            is worth is measured; a higher one is presumed to be worth no less.
    """

    tokens: tuple[int, ...] = ()
    grades: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.grades):
            raise ValueError(f"{len(self.tokens)} tokens with {len(self.grades)} grades")


class Drafter(Protocol):
    """Guesses what follows. Not for concurrent use."""

    @property
    def name(self) -> str:
        """Apart from other drafters."""

    @property
    def grades(self) -> int:
        """How many grades there are."""

    def propose(self, ids: Sequence[int], count: int) -> Draft:
        """Draft what may follow ``ids``.

        Meant for calls in which ``ids`` differ little from those of the last: some tokens more at the end, or other
        ones. What the two have in common is not computed again.

        Args:
            ids: the context so far.
            count: tokens at most.
        """


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens at their beginning two contexts share; quick if these are most of them."""
    end = min(len(one), len(other))
    if one[:end] == other[:end]:
        return end
    start, block = 0, 256
    while one[start : start + block] == other[start : start + block]:
        start += block
    while one[start] == other[start]:
        start += 1
    return start
