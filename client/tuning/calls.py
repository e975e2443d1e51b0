"""Training calls: whole sequences through the blocks of one node, forwards and back.

A call is a unit of work that leaves nothing behind on the node, so that a call that failed is made again elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from client.routing import Hop

if TYPE_CHECKING:
    from compute.tuning import SpanTuning


class Caller(Protocol):
    """Who has nodes run whole sequences."""

    async def forward(self, hop: Hop, digest: str, hidden: Tensor, tuning: SpanTuning | None) -> Tensor:
        """What the hop's blocks make of whole sequences.

        Args:
            hop: Which blocks, and who runs them.
            digest: Of the model.
            hidden: Hidden states before the first of these blocks; 16 or 32 bit floats on the CPU, without padding.
            tuning: What is trained inside of these very blocks.

        Shapes:
            hidden: [b, t, d]
            returns: [b, t, d], float32

        Raises:
            PeerFailed: the node cannot be relied on: lost, hung, wrong answer, refused for good, busy for too long.
            InvalidInput: the input cannot be computed anywhere.
        Cancellation: the node does not go on with what it has not begun.
        """

    async def backward(
        self, hop: Hop, digest: str, hidden: Tensor, gradient: Tensor, tuning: SpanTuning | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of what :meth:`forward` was given; the node runs the way forward again.

        Args:
            hop: Which blocks, and who runs them.
            digest: Of the model.
            hidden: What :meth:`forward` was given.
            gradient: With respect to what it returned.
            tuning: What :meth:`forward` was given.

        Shapes:
            hidden, gradient: [b, t, d]
            returns: [b, t, d], float32: with respect to ``hidden``; and [n], float32, in the order of
                ``tuning.flat()``: with respect to the tuning, ``None`` without one

        Raises:
            PeerFailed, InvalidInput: as :meth:`forward`.
        Cancellation: as :meth:`forward`.
        """
