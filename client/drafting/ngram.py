"""Drafting by look-up: where the last tokens stood before, what followed may follow again.

For every position the index holds where the 1, 2 and 4 tokens that end there ended before: chains of earlier
occurrences, the last one first, as compressors of the LZ77 family keep them. A match is looked for along the chain of
the longest of these and extended backwards; what followed it is copied, and copying goes on in the copy, so that a
loop of any period is drafted for as long as one likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from client.drafting.base import Draft, common_prefix

_ORDERS: Final = (4, 2, 1)  # tokens of an indexed n-gram; longest first
_MAX_MATCH: Final = 32  # tokens of context that are compared; more say nothing new
_MAX_CANDIDATES: Final = 16  # earlier occurrences that are compared: bounds the time of a call
_GRADE_STARTS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of match lengths
_GRADE_OF_LENGTH: Final = tuple(
    max(sum(start <= length for start in _GRADE_STARTS) - 1, 0) for length in range(_MAX_MATCH + 1)
)


class NgramDrafter:
    """Copies what followed the longest match of the last tokens; of equally long ones, the last.

    A token's grade is the length of the match that it would continue. A call takes microseconds for each token that
    was added or taken away, and some tens beside.
    """

    name: Final = "n-gram"
    grades: Final = len(_GRADE_STARTS)

    def __init__(self) -> None:
        """Begin with an empty context."""
        self._ids: list[int] = []
        self._last: dict[tuple[int, ...], int] = {}  # n-gram -> where its last occurrence ends
        self._before: tuple[list[int], ...] = tuple([] for _ in _ORDERS)  # [order][position]: the one before; -1: none

    def propose(self, ids: Sequence[int], count: int) -> Draft:
        """See ``Drafter``."""
        self._follow(ids)
        end, length = self._longest_match()
        if not length or count < 1:
            return Draft()
        tokens = self._ids[end + 1 : end + 1 + count]
        period = len(self._ids) - end - 1
        while len(tokens) < count:
            tokens.append(tokens[len(tokens) - period])
        grades = tuple(_GRADE_OF_LENGTH[min(length + i, _MAX_MATCH)] for i in range(count))
        return Draft(tokens=tuple(tokens), grades=grades)

    def _follow(self, ids: Sequence[int]) -> None:
        """Make ``ids`` the context."""
        ids = ids if isinstance(ids, list) else list(ids)
        kept = common_prefix(self._ids, ids)
        while len(self._ids) > kept:
            for order, before in zip(_ORDERS, self._before, strict=True):
                earlier = before.pop()
                if len(self._ids) < order:
                    continue
                if earlier < 0:
                    del self._last[tuple(self._ids[-order:])]
                else:
                    self._last[tuple(self._ids[-order:])] = earlier
            self._ids.pop()
        for position in range(kept, len(ids)):
            self._ids.append(ids[position])
            for order, before in zip(_ORDERS, self._before, strict=True):
                if position + 1 < order:
                    before.append(-1)
                    continue
                gram = tuple(self._ids[-order:])
                before.append(self._last.get(gram, -1))
                self._last[gram] = position

    def _longest_match(self) -> tuple[int, int]:
        """Where the best earlier occurrence of the context's end ends, and its length; length 0 if there is none."""
        ids, last = self._ids, len(self._ids) - 1
        best_end, best_length = -1, 0
        for order, before in zip(_ORDERS, self._before, strict=True):
            end = before[last] if ids else -1
            for _ in range(_MAX_CANDIDATES):
                if end < 0 or best_length == _MAX_MATCH:
                    break
                length = order
                while length < _MAX_MATCH and end >= length and ids[end - length] == ids[last - length]:
                    length += 1
                if length > best_length:
                    best_end, best_length = end, length
                end = before[end]
            if best_length:
                break
        return best_end, best_length
