"""Keys and values of attention, in memory; who may have how much is said in ``compute/slots.py``.

A slot's memory is one piece per block and lives as long as the slot: a session that grows is given a longer one, into
which its tokens are copied. What was written is zeroed before it is let go. A session's tokens are in one slot, or,
when it began as another session did, the first in that one's and the rest in its own; attention then gets both put
together, which costs a copy of the keys and values per step, and gives the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from compute.bloom.block import BloomSpan

_OUTPUT_BYTES: Final = 4  # of an element of what a span gave, at most: it is as what came in


class SlotMemory:
    """Room for ``length`` tokens of ``rows`` rows in every block of a span.

    Not thread-safe: it belongs to the thread that runs the model.

    Attributes:
        layers: Keys and values by block, on the block's device, each [rows, h, length, hd]; none after :meth:`wipe`.
        outputs: What the span gave for the slot's tokens from ``[0, n)`` on, by ``n``, [rows, tokens of the last chunk,
            d]: whoever begins with a prefix needs its results, too.
        written: Tokens beyond which everything is zero.
    """

    def __init__(self, span: BloomSpan, rows: int, length: int) -> None:
        """Allocate, zeroed.

        Raises:
            RuntimeError: There is no memory, as torch says it.
        """
        self._shape = (rows, span.config.n_head, length, span.config.head_dim)
        self._dtype = span.dtype
        self.layers = [
            (self._zeros(device), self._zeros(device))
            for stage, device in zip(span.stages, span.devices, strict=True)
            for _ in stage
        ]
        self.outputs: dict[int, Tensor] = {}
        self.written = 0

    def _zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(self._shape, dtype=self._dtype, device=device)  # [rows, h, length, hd]

    def copy(self, source: SlotMemory, first: int, start: int, count: int, rows: Tensor | None = None) -> None:
        """Take tokens ``[first, first + count)`` of another slot over, to ``[start, start + count)``.

        Args:
            source: Of the same blocks.
            first: Where they are there.
            start: Where they go.
            count: How many.
            rows: Which row of the source each row is; the same ones if ``None``.

        Shapes:
            rows: [rows], int64, on any device
        """
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            rows = None if rows is None else rows.to(mine[0].device)
            for target, origin in zip(mine, theirs, strict=True):
                tokens = origin[:, :, first : first + count]  # [rows, h, count, hd]
                target[:, :, start : start + count] = tokens if rows is None else tokens.index_select(0, rows)
        self.written = max(self.written, start + count)

    def wipe(self) -> None:
        """Zero what was written, and let go."""
        for layer in self.layers:
            for part in layer:
                part[:, :, : self.written].zero_()
        self.layers = []
        self.outputs = {}


class KVCache:
    """A session's keys and values: what :class:`compute.bloom.block.SpanCache` asks for.

    Attributes:
        own: Where tokens from ``shared`` on are.
        source: Where those before are; they are only read.
        shared: How many those are.
        pads: How many tokens of padding each row begins with, [b], int64; ``None`` if none has any.
    """

    def __init__(
        self, own: SlotMemory, source: SlotMemory | None = None, shared: int = 0, pads: Tensor | None = None
    ) -> None:
        """Put memory together."""
        self.own = own
        self.source = source
        self.shared = shared
        self.pads = pads

    @classmethod
    def alone(cls, span: BloomSpan, rows: int, length: int, pads: Tensor | None = None) -> KVCache:
        """One with memory of its own.

        Raises:
            RuntimeError: There is no memory, as torch says it.
        """
        return cls(SlotMemory(span, rows, length), pads=pads)

    def extend(self, index: int, key: Tensor, value: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """See :class:`compute.bloom.block.SpanCache`."""
        keys, values = self.own.layers[index]  # [b, h, L, hd]
        start = position - self.shared
        end = start + key.shape[2]
        keys[:, :, start:end] = key  # [b, h, t, hd]
        values[:, :, start:end] = value  # [b, h, t, hd]
        self.own.written = max(self.own.written, end)
        if self.source is None:
            return keys[:, :, :end], values[:, :, :end]
        before_keys, before_values = self.source.layers[index]  # [b, h, L', hd]
        return (
            torch.cat((before_keys[:, :, : self.shared], keys[:, :, :end]), dim=2),  # [b, h, shared + end, hd]
            torch.cat((before_values[:, :, : self.shared], values[:, :, :end]), dim=2),
        )


def free_cache_tokens(span: BloomSpan, cache_bytes: Callable[[torch.device], int]) -> int:
    """How many tokens fit into what each device has for them; at least one.

    Keys and values lie with their blocks; in the CPU's memory there is once per token what the span gave for it, for
    those who begin alike.

    Args:
        span: Whose cache it is.
        cache_bytes: What a device has.
    """
    width = span.config.hidden_size
    token_bytes = Counter({torch.device("cpu"): width * _OUTPUT_BYTES})
    for stage, device in zip(span.stages, span.devices, strict=True):
        token_bytes[device] += 2 * len(stage) * width * span.dtype.itemsize
    return max(1, min(cache_bytes(device) // each for device, each in token_bytes.items()))
