"""What is added within blocks for one user, without touching their weights: low-rank matrices and prompts.

A linear layer ``y = W x + bias`` becomes ``y = W x + bias + B (scale * (A x))`` (LoRA), and the first tokens get
something added before a block (deep prompts). Both are in float32, whatever the block is in, and their results are
rounded to what the block is in.

Source: Hu et al., "LoRA", arXiv 2106.09685; Liu et al., "P-Tuning v2", arXiv 2110.07602.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Additions(Protocol):
    """What a block asks while it runs."""

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """The result of a linear layer, with what is added.

        Args:
            name: The layer's, without those of the modules around it.
            x: What it got.
            y: What it gave.

        Shapes:
            x: [..., in]
            y: [..., out]
            returns: [..., out]
        """


class Tuning(Protocol):
    """Additions to each block of a span: :class:`compute.tuning.SpanTuning` and what is made of it."""

    def block(self, number: int, device: torch.device) -> BlockTuning:
        """Those of a block, by its number in the model, where the block is."""


class LowRank(Protocol):
    """``B (scale * (A x))``."""

    def __call__(self, x: Tensor) -> Tensor:
        """Shapes:
        x: [..., in], any float
        returns: [..., out], float32
        """


@dataclass(frozen=True, eq=False)
class Matrices:
    """``A`` and ``B`` as they are; gradients flow to them.

    Shapes:
        a: [rank, in], float32
        b: [out, rank], float32
    """

    a: Tensor
    b: Tensor
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        """See :class:`LowRank`."""
        return F.linear(F.linear(x.to(self.a.dtype), self.a) * self.scale, self.b)  # [..., out]


@dataclass(frozen=True, eq=False)
class BlockTuning:
    """Additions to one block, the same for all rows.

    Attributes:
        prompts: What the first ``p`` tokens get before the block, [p, d], float32; ``None`` if nothing.
        low_rank: By the names of linear layers.
    """

    prompts: Tensor | None = None
    low_rank: Mapping[str, LowRank] = field(default_factory=dict)

    def begin(self, hidden: Tensor, position: int, pads: Tensor | None) -> Tensor:
        """Tokens as they go into the block.

        Args:
            hidden: As they would go without.
            position: Index of the first one.
            pads: How many tokens of padding each row begins with, which are not counted; ``None`` if none has any.

        Shapes:
            hidden: [b, t, d]
            pads: [b], int64, on any device
            returns: [b, t, d]
        """
        if self.prompts is None:
            return hidden
        count, tokens = len(self.prompts), hidden.shape[1]
        if pads is None:
            if position >= count:
                return hidden
            mine = self.prompts[position : position + tokens]  # [c, d]
            first = (hidden[:, : len(mine)] + mine).to(hidden.dtype)  # [b, c, d]
            return first if len(mine) == tokens else torch.cat([first, hidden[:, len(mine) :]], dim=1)  # [b, t, d]
        if position >= count + int(pads.max()):
            return hidden
        places = torch.arange(position, position + tokens) - pads.cpu()[:, None]  # [b, t]
        rows, columns = ((places >= 0) & (places < count)).nonzero(as_tuple=True)  # 2 x [m]
        mine = self.prompts[places[rows, columns].to(hidden.device)]  # [m, d]
        where = rows.to(hidden.device), columns.to(hidden.device)
        return hidden.index_put(where, (hidden[where] + mine).to(hidden.dtype))  # [b, t, d]

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`Additions`."""
        low_rank = self.low_rank.get(name)
        return y if low_rank is None else y + low_rank(x).to(y.dtype)  # [..., out]


@dataclass(frozen=True, eq=False)
class TunedRows:
    """A step's rows among those of all steps, and what is added to them.

    Attributes:
        rows: Which ones.
        shape: How many rows and tokens they are: b, t.
        position: Index of the first token.
        pads: As for :meth:`BlockTuning.begin`.
        block: What is added.
    """

    rows: slice
    shape: tuple[int, int]
    position: int
    pads: Tensor | None
    block: BlockTuning


class BatchTuning:
    """Additions to one block, other ones for each of several steps; without gradients."""

    def __init__(self, parts: Sequence[TunedRows]) -> None:
        """Take those of steps that have any."""
        self._parts = parts

    def begin(self, hidden: Tensor) -> Tensor:
        """All steps' tokens as they go into the block; may be written into ``hidden``.

        Shapes:
            hidden: [n, d]
            returns: [n, d]
        """
        for part in self._parts:
            before = hidden[part.rows].view(*part.shape, -1)  # [b, t, d]
            after = part.block.begin(before, part.position, part.pads)  # [b, t, d]
            if after is not before:
                before.copy_(after)
        return hidden

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`Additions`; written into ``y``."""
        for part in self._parts:
            low_rank = part.block.low_rank.get(name)
            if low_rank is not None:
                y[part.rows] += low_rank(x[part.rows]).to(y.dtype)  # [m, out]
        return y
