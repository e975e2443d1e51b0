"""Blocks that the client computes itself: the first and the last ones of a model.

Nodes then get neither embeddings nor what the last block gives, but hidden states from within the model. Numerics are
fp32 on the CPU, with the bits that a node with ``--quantize fp32`` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from client.errors import InvalidInput
from client.journal import DECODE_TOKENS
from compute.bloom import BloomSpan
from compute.cache import KVCache, SlotMemory
from compute.checkpoint import Checkpoint

LINEAR: Final = "fp32"
CHUNK_TOKENS: Final = 256  # of all rows: what nodes compute of a prompt at a time
FIRST_TOKENS: Final = 64  # of a cache, which doubles when it is full


@dataclass(frozen=True, kw_only=True)
class LocalBlocks:
    """The weights of the first and of the last blocks."""

    first: BloomSpan
    last: BloomSpan

    @classmethod
    def load(cls, checkpoint: Checkpoint, count: int) -> LocalBlocks:
        """``count`` blocks at either end.

        Raises:
            CheckpointError: as ``Checkpoint.load_span``.
            InvalidInput: this machine cannot compute them.
        """
        n_blocks = checkpoint.n_blocks
        try:
            return cls(
                first=checkpoint.load_span(0, count, linear=LINEAR),
                last=checkpoint.load_span(n_blocks - count, n_blocks, linear=LINEAR),
            )
        except RuntimeError as error:
            raise InvalidInput(
                f"this machine cannot compute blocks itself ({error}): leave local_blocks out"
            ) from error

    def session(self) -> LocalSession:
        """For one session, which begins empty."""
        return LocalSession(first=LocalSpan(self.first), last=LocalSpan(self.last))


@dataclass(frozen=True, kw_only=True)
class LocalSession:
    """What one session has of them. ``first`` and ``last`` may be used by different threads."""

    first: LocalSpan
    last: LocalSpan


class LocalSpan:
    """Some blocks with one session's keys and values. Not for several threads at once.

    Going back needs no word: tokens from ``position`` on are forgotten by computing others there.
    """

    def __init__(self, span: BloomSpan) -> None:
        """Begin empty."""
        self._span = span
        self._cache: KVCache | None = None
        self._shape = (0, 0)  # rows and tokens that there is room for

    def run(
        self,
        hidden: Tensor,
        position: int,
        *,
        order: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        every_block: bool = False,
    ) -> Tensor:
        """Compute the tokens from ``position`` on.

        Args:
            hidden: Before the first of these blocks.
            position: Tokens before them.
            order: Row ``i`` goes on from what row ``order[i]`` had.
            pads: With how many tokens of padding each row begins.
            every_block: Return what each of ``n`` blocks gives.

        Shapes:
            hidden: [b, t, d], fp32
            returns: [b, t, d]; [n, b, t, d] with ``every_block``
        """
        with torch.inference_mode():
            rows, tokens, _ = hidden.shape
            cache = self._with_room(rows, position, position + tokens, order)
            cache.pads = None if pads is None else torch.tensor(list(pads), dtype=torch.int64)  # [b]
            at_once = tokens if rows * tokens <= DECODE_TOKENS else max(1, CHUNK_TOKENS // rows)
            parts = []
            for part in hidden.split(at_once, dim=1):
                if every_block:
                    parts.append(self._each_block(part, cache, position))  # [n, b, at_once, d]
                else:
                    parts.append(self._span(part, cache, position))  # [b, at_once, d]
                position += part.shape[1]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def _each_block(self, hidden: Tensor, cache: KVCache, position: int) -> Tensor:
        """Shapes:
        hidden: [b, t, d]
        returns: [n, b, t, d]
        """
        states = []
        for index in range(len(self._span)):
            hidden = self._span(hidden, cache, position, index, index + 1)  # [b, t, d]
            states.append(hidden)
        return torch.stack(states)

    def _with_room(self, rows: int, position: int, end: int, order: Sequence[int] | None) -> KVCache:
        had_rows, length = self._shape
        if self._cache is not None and had_rows == rows and end <= length and order is None:
            return self._cache
        if end > length or had_rows != rows:
            length = max(end, FIRST_TOKENS if had_rows != rows else 2 * length)
        memory = SlotMemory(self._span, rows, length)
        if self._cache is not None and had_rows == rows:
            places = None if order is None else torch.tensor(list(order), dtype=torch.int64)  # [b]
            memory.copy(self._cache.own, 0, 0, position, places)
        self._cache, self._shape = KVCache(memory), (rows, length)
        return self._cache
