"""Blocks of the swarm as torch modules: gradients go through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from client.errors import InvalidInput
from client.portal import Portal
from client.tuning.trainer import Passed, Trainer
from client.tuning.tuned import Tuned

__all__ = ["RemoteBlocks", "RemoteSpan"]


class RemoteBlocks:
    """All of a model's blocks: ``blocks[2:5]`` are some of them, as a module. Their weights never change.

    ``blocks[:4]``, a module of one's own and ``blocks[4:]`` make a model with something of one's own in it.
    """

    def __init__(self, n_blocks: int, width: int, tuned: Tuned | None, trainer: Callable[[], Trainer], portal: Portal):
        """Begin.

        Args:
            n_blocks: How many there are.
            width: Of hidden states.
            tuned: What is trained inside them.
            trainer: Makes who calls nodes, when it is needed.
            portal: To where that lives.
        """
        self.width = width
        self.tuned = tuned
        self._n_blocks = n_blocks
        self._make = trainer
        self._trainer: Trainer | None = None
        self._portal = portal

    def __len__(self) -> int:
        return self._n_blocks

    def __getitem__(self, which: slice) -> RemoteSpan:
        """Consecutive blocks.

        Raises:
            TypeError: no slice.
            InvalidInput: no blocks, or not consecutive ones.
        """
        if not isinstance(which, slice):
            raise TypeError(f"blocks[start:end] gives blocks, not blocks[{which!r:.40}]")
        start, end, step = which.indices(self._n_blocks)
        if step != 1 or start >= end:
            raise InvalidInput(f"blocks[{which.start}:{which.stop}] are none: the model has blocks 0:{self._n_blocks}")
        return RemoteSpan(self, start, end)

    @property
    def trainer(self) -> Trainer:
        """Who calls nodes."""
        if self._trainer is None:
            self._trainer = self._make()
        return self._trainer

    def run(self, hidden: Tensor, start: int, end: int) -> Tensor:
        """Blocks [start, end) on whole sequences, with gradients for what goes in and for what is trained inside.

        Shapes:
            hidden: [b, t, d]
            returns: [b, t, d]

        Raises:
            InvalidInput, MissingBlocks, UnknownModel, SessionFailed: as ``Trainer.forward``; also on the way back.
        """
        if hidden.dim() != 3 or hidden.shape[2] != self.width or not hidden.is_floating_point() or not hidden.numel():
            raise InvalidInput(f"hidden states are [batch, tokens, {self.width}], not {list(hidden.shape)}")
        if not torch.isfinite(hidden).all():
            raise InvalidInput("hidden states hold NaN or infinity")
        tensors = [] if self.tuned is None else self.tuned.named(start, end)
        output: Tensor = _Run.apply(self, start, end, hidden, *tensors)  # type: ignore[no-untyped-call]  # so in torch
        return output

    def forward(self, hidden: Tensor, start: int, end: int) -> tuple[Tensor, Passed]:
        """Without gradients; see :class:`Trainer`."""
        tuning = None if self.tuned is None else self.tuned.of_span(start, end)
        trainer = self.trainer
        return self._portal.call(trainer.forward, hidden.detach().float().cpu().contiguous(), start, end, tuning)

    def backward(self, passed: Passed, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :class:`Trainer`."""
        return self._portal.call(self.trainer.backward, passed, gradient.detach().float().cpu().contiguous())

    def __reduce__(self) -> NoReturn:
        raise TypeError("blocks of a swarm cannot be pickled: connect again where they are needed")


class RemoteSpan(nn.Module):
    """Consecutive blocks of the swarm. No parameters of its own: nodes' weights are frozen."""

    def __init__(self, blocks: RemoteBlocks, start: int, end: int) -> None:
        """Blocks [start, end)."""
        super().__init__()
        self._blocks = blocks
        self.start = start
        self.end = end

    def forward(self, hidden: Tensor) -> Tensor:
        """See :meth:`RemoteBlocks.run`."""
        return self._blocks.run(hidden, self.start, self.end)

    def extra_repr(self) -> str:
        return f"{self.start}:{self.end}"


class _Run(torch.autograd.Function):
    """Ties the way forward and the way back together."""

    @staticmethod
    def forward(ctx: Any, blocks: RemoteBlocks, start: int, end: int, hidden: Tensor, *tensors: Tensor) -> Tensor:
        output, ctx.passed = blocks.forward(hidden, start, end)
        ctx.blocks, ctx.like, ctx.shapes = blocks, (hidden.dtype, hidden.device), [each.shape for each in tensors]
        ctx.dtypes = [each.dtype for each in tensors]
        return output.to(*ctx.like[::-1])  # [b, t, d]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, flat = ctx.blocks.backward(ctx.passed, gradient)
        parts = [] if flat is None else flat.split([shape.numel() for shape in ctx.shapes])
        trained = [part.view(shape).to(dtype) for part, shape, dtype in zip(parts, ctx.shapes, ctx.dtypes, strict=True)]
        dtype, device = ctx.like
        return None, None, None, hidden.to(device, dtype), *trained
