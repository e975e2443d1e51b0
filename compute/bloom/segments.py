"""What lies between the attentions of blocks, for all rows of a batch at once; here run kernel by kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from compute.bloom.tuned import BatchTuning

if TYPE_CHECKING:
    from compute.bloom.block import BloomBlock


class Segments(Protocol):
    """What lies between the attentions of consecutive blocks: first what comes before the first one (:meth:`begin`),
    then for each block what comes after its attention and before the next one's (:meth:`go_on`).
    """

    def begin(self, hidden: Tensor) -> Tensor:
        """Shapes:
        hidden: [n, d]
        returns: [n, 3d], what the first block's attention is made from; it holds until the next call
        """

    @property
    def room(self) -> Tensor:
        """Where attention's result is to be written: [n, d]."""

    def go_on(self, index: int) -> Tensor:
        """Shapes:
        returns: [n, 3d] for the block after ``index``, counted from the first one; after the last one, [n, d]
        """


class Graphs(Protocol):
    """Segments of a stage, made beforehand: ``compute.bloom.graphs``."""

    def segments(self, rows: int) -> Segments | None:
        """Those for so many rows; ``None`` where there are none."""


class EagerSegments:
    """Segments run kernel by kernel."""

    def __init__(self, blocks: Sequence[BloomBlock]) -> None:
        """Take consecutive blocks on one device."""
        self._blocks = blocks
        self._residual = self._room = torch.empty(0)

    @property
    def room(self) -> Tensor:
        """See :class:`Segments`."""
        return self._room

    def begin(self, hidden: Tensor) -> Tensor:
        """See :class:`Segments`."""
        self._room = torch.empty_like(hidden)  # [n, d]
        self._residual, fused = self._blocks[0].enter(hidden)
        return fused  # [n, 3d]

    def go_on(self, index: int) -> Tensor:
        """See :class:`Segments`."""
        hidden = self._blocks[index].leave(self._room, self._residual)  # [n, d]
        if index + 1 == len(self._blocks):
            return hidden
        self._residual, fused = self._blocks[index + 1].enter(hidden)
        return fused  # [n, 3d]


class TunedSegments:
    """Segments with what is added for some of the rows, run kernel by kernel."""

    def __init__(self, blocks: Sequence[BloomBlock], added: Sequence[BatchTuning]) -> None:
        """Take consecutive blocks on one device, and what is added to each."""
        self._blocks = blocks
        self._added = added
        self._residual = self._room = torch.empty(0)

    @property
    def room(self) -> Tensor:
        """See :class:`Segments`."""
        return self._room

    def begin(self, hidden: Tensor) -> Tensor:
        """See :class:`Segments`; ``hidden`` may be written into."""
        self._room = torch.empty_like(hidden)  # [n, d]
        return self._enter(0, hidden)  # [n, 3d]

    def go_on(self, index: int) -> Tensor:
        """See :class:`Segments`."""
        hidden = self._blocks[index].leave(self._room, self._residual, self._added[index])  # [n, d]
        return hidden if index + 1 == len(self._blocks) else self._enter(index + 1, hidden)  # [n, d] or [n, 3d]

    def _enter(self, index: int, hidden: Tensor) -> Tensor:
        """Shapes:
        hidden: [n, d]
        returns: [n, 3d]
        """
        added = self._added[index]
        self._residual, fused = self._blocks[index].enter(added.begin(hidden), added)
        return fused
