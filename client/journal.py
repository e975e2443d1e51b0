"""What a session has sent: the hidden states of its tokens, and how they were cut, so that it can be sent again.

Steps that were decoded may be sent again together, up to 32 tokens of all rows: nodes give them the same bits. What was
a prompt is cut again as it was. When rows change places, so do those of all that was before; nothing is copied until it
is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

DECODE_TOKENS: Final = 32  # of all rows: steps up to here are decoded, longer ones are prompts


@dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """Hidden states [b, t, d] of tokens from ``position`` on, in the order of rows at the time (``version``)."""

    position: int
    hidden: Tensor
    version: int

    @property
    def end(self) -> int:
        return self.position + self.hidden.shape[1]


class Journal:
    """See the module.

    Attributes:
        rows: Of every piece; 0 before the first one.
        reordered_at: Tokens that there were when rows last changed places.
    """

    def __init__(self, *, merge: bool = True) -> None:
        """Begin empty.

        Args:
            merge: Whether decoded steps may be sent again together.
        """
        self.rows = 0
        self.merge = merge
        self.reordered_at = 0
        self._pieces: list[_Piece] = []
        self._orders: list[Tensor] = []

    def copy(self) -> Journal:
        """Another one with the same tokens, cut as these were; hidden states are shared, and nobody changes them."""
        other = Journal(merge=self.merge)
        other.rows, other.reordered_at = self.rows, self.reordered_at
        other._pieces, other._orders = list(self._pieces), list(self._orders)
        return other

    @property
    def version(self) -> int:
        """How many times rows have changed places."""
        return len(self._orders)

    @property
    def end(self) -> int:
        """Tokens in it."""
        return self._pieces[-1].end if self._pieces else 0

    def add(self, hidden: Tensor) -> None:
        """The next tokens.

        Shapes:
            hidden: [b, t, d]; not to be changed afterwards
        """
        self.rows = hidden.shape[0]
        self._pieces.append(_Piece(position=self.end, hidden=hidden, version=self.version))

    def reorder(self, order: Sequence[int]) -> None:
        """Row ``i`` goes on from what row ``order[i]`` had."""
        self.reordered_at = self.end
        self._orders.append(torch.tensor(list(order), dtype=torch.int64))  # [b]

    def cut(self, position: int) -> None:
        """Forget all tokens from ``position`` on."""
        while self._pieces and self._pieces[-1].end > position:
            last = self._pieces.pop()
            if last.position < position:
                hidden = last.hidden[:, : position - last.position]
                self._pieces.append(_Piece(position=last.position, hidden=hidden, version=last.version))

    def next_end(self, position: int) -> int:
        """Where a step from ``position`` on ends, when it is sent again."""
        index = self._index(position)
        piece = self._pieces[index]
        end = piece.end
        if self.merge and self._is_decoded(piece):
            most = position + max(1, DECODE_TOKENS // self.rows)
            while end < most and index + 1 < len(self._pieces) and self._is_decoded(self._pieces[index + 1]):
                index += 1
                end = self._pieces[index].end
            end = min(end, most)
        return end

    def get(self, position: int, end: int) -> Tensor:
        """Hidden states of tokens ``[position, end)``, of the rows as they are now.

        Shapes:
            returns: [b, end - position, d]
        """
        parts = []
        for piece in self._pieces[self._index(position) :]:
            if piece.position >= end:
                break
            part = piece.hidden[:, max(0, position - piece.position) : end - piece.position]
            rows = self._rows_since(piece.version)
            parts.append(part if rows is None else part[rows])
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).contiguous()

    def _index(self, position: int) -> int:
        low, high = 0, len(self._pieces) - 1
        while low < high:  # the last one that begins at or before it
            middle = (low + high + 1) // 2
            if self._pieces[middle].position <= position:
                low = middle
            else:
                high = middle - 1
        return low

    def _is_decoded(self, piece: _Piece) -> bool:
        return piece.hidden.shape[0] * piece.hidden.shape[1] <= DECODE_TOKENS

    def _rows_since(self, version: int) -> Tensor | None:
        """Which rows, by their places then, the rows are now; ``None`` if they have kept their places."""
        rows: Tensor | None = None
        for order in reversed(self._orders[version:]):
            rows = order if rows is None else order[rows]
        return rows
