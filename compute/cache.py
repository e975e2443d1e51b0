"""Keys and values of attention: one cache per session, and one budget for all of them.

A cache grows by need and doubles, so a session that asks for 2,048 tokens and writes 50 holds room for 64.
The budget counts token slots, ``batch * capacity``: the bytes of a slot are the same for every session of
a span. Positions are the client's: a step may start anywhere in ``[0, length]``, and what lay beyond is
overwritten, which is how a client goes back.
"""

from __future__ import annotations

import threading
from typing import Final

import torch
from torch import Tensor

from compute.bloom.block import BloomSpan
from compute.errors import BadInput, OutOfCache

MIN_CAPACITY_TOKENS: Final = 64  # the first growth of a session; below, growing costs more than it saves


class CacheBudget:
    """Token slots shared by all sessions of a span. Safe to use from several threads."""

    def __init__(self, max_tokens: int) -> None:
        """Set the bound.

        Args:
            max_tokens: Slots in all, a slot being one token of one row in every block of the span.

        Raises:
            ValueError: ``max_tokens`` is less than 1.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}, expected at least 1")
        self.max_tokens = max_tokens
        self._used_tokens = 0
        self._lock = threading.Lock()

    @property
    def used_tokens(self) -> int:
        """Slots that sessions hold."""
        return self._used_tokens

    @property
    def free_tokens(self) -> int:
        """Slots left."""
        return self.max_tokens - self._used_tokens

    def reserve(self, tokens: int) -> None:
        """Take slots, all or none.

        Raises:
            OutOfCache: Fewer are left.
            ValueError: ``tokens`` is negative.
        """
        if tokens < 0:
            raise ValueError(f"cannot reserve {tokens} slots")
        with self._lock:
            if tokens > self.max_tokens - self._used_tokens:
                raise OutOfCache(
                    f"{tokens} more cache slots are needed, {self.max_tokens - self._used_tokens} "
                    f"of {self.max_tokens} are free"
                )
            self._used_tokens += tokens

    def release(self, tokens: int) -> None:
        """Give slots back.

        Raises:
            ValueError: More than are held.
        """
        with self._lock:
            if not 0 <= tokens <= self._used_tokens:
                raise ValueError(f"cannot release {tokens} of {self._used_tokens} held slots")
            self._used_tokens -= tokens


class KVCache:
    """Keys and values of one session in every block of one span.

    A step is ``prepare(position, t)``, then the span's forward, then ``commit(position + t)``. If the
    forward fails, the cache is as if the session had gone back to ``position``.

    Not thread-safe: it belongs to the thread that runs the model.

    Attributes:
        batch: Rows.
        max_length: Most tokens of a row.
        length: Tokens written.
        capacity: Tokens that fit without growing.
    """

    def __init__(self, span: BloomSpan, budget: CacheBudget, *, batch: int, max_length: int) -> None:
        """Set the bounds; nothing is allocated yet.

        Raises:
            ValueError: ``batch`` or ``max_length`` is less than 1.
        """
        if batch < 1 or max_length < 1:
            raise ValueError(f"batch {batch} and max_length {max_length} must be at least 1")
        self.batch = batch
        self.max_length = max_length
        self.length = 0
        self.capacity = 0
        self._budget = budget
        self._blocks = len(span)
        self._heads = span.config.n_head
        self._head_dim = span.config.head_dim
        self._dtype = span.dtype
        self._device = span.device
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._closed = False

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of block ``index`` of the span.

        Shapes:
            returns: two of [b, h, capacity, hd]
        """
        return self._layers[index]

    def check(self, position: int, tokens: int) -> None:
        """Whether a step may start at ``position``, without changing anything.

        Raises:
            BadInput: ``bad-shape``: no token; ``bad-position``: it leaves a gap after what is written;
                ``too-long``: it ends after ``max_length``; ``no-session``: the cache is closed.
        """
        if self._closed:
            raise BadInput("no-session", "the session is closed")
        if tokens < 1:
            raise BadInput("bad-shape", "a step needs at least one token")
        if not 0 <= position <= self.length:
            raise BadInput("bad-position", f"a step at {position}, but the session has {self.length} tokens")
        if position + tokens > self.max_length:
            raise BadInput("too-long", f"{position} + {tokens} tokens are more than the session's {self.max_length}")

    def prepare(self, position: int, tokens: int) -> None:
        """Make room for ``tokens`` at ``position`` and forget what lay from there on.

        Raises:
            BadInput: As :meth:`check`.
            OutOfCache: There is no room; the cache is as before.
        """
        self.check(position, tokens)
        if position + tokens > self.capacity:
            self._grow(position + tokens)
        self.length = position

    def commit(self, length: int) -> None:
        """Say that everything up to ``length`` is written.

        Raises:
            ValueError: It is less than before, or more than there is room for.
        """
        if not self.length <= length <= self.capacity:
            raise ValueError(f"cannot commit {length} tokens: {self.length} before, room for {self.capacity}")
        self.length = length

    def close(self) -> None:
        """Give memory and slots back. Closing twice does no harm."""
        self._closed = True
        self._layers = []
        self._budget.release(self.batch * self.capacity)
        self.capacity = self.length = 0

    def _grow(self, needed: int) -> None:
        """Take slots and memory for ``needed`` tokens: twice as many as now, or just enough."""
        doubled = min(self.max_length, max(needed, 2 * self.capacity, MIN_CAPACITY_TOKENS))
        try:
            self._resize(doubled)
        except OutOfCache:
            if doubled == needed:
                raise
            self._resize(needed)

    def _resize(self, capacity: int) -> None:
        extra = self.batch * (capacity - self.capacity)
        self._budget.reserve(extra)
        try:
            if not self._layers:
                self._layers = [(self._slots(capacity), self._slots(capacity)) for _ in range(self._blocks)]
            else:
                # One block after another, so that only one is ever held twice. If this fails halfway, the
                # blocks before have more room than ``capacity`` says, which harms nobody.
                for index, (keys, values) in enumerate(self._layers):
                    self._layers[index] = (self._enlarged(keys, capacity), self._enlarged(values, capacity))
        except RuntimeError as exc:  # how torch reports that memory is out, on the CPU and on a GPU
            self._budget.release(extra)
            raise OutOfCache(f"no memory for a cache of {self.batch} x {capacity} tokens") from exc
        self.capacity = capacity

    def _slots(self, capacity: int) -> Tensor:
        shape = (self.batch, self._heads, capacity, self._head_dim)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)  # [b, h, L, hd]

    def _enlarged(self, old: Tensor, capacity: int) -> Tensor:
        new = self._slots(capacity)  # [b, h, L, hd]
        new[:, :, : self.length] = old[:, :, : self.length]  # [b, h, length, hd]
        return new
