"""Which blocks a node should serve: those that the swarm lacks most. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from net.protocol.announcement import NodeAnnouncement


def coverage(n_blocks: int, nodes: Iterable[NodeAnnouncement]) -> list[float]:
    """How much each block is served: the sum of its nodes' measured speeds, at least 1 for each."""
    total = [0.0] * n_blocks
    for node in nodes:
        for block in range(node.start, min(node.end, n_blocks)):
            total[block] += max(node.decode_tokens_per_s, 1.0)
    return total


def choose_span(n_blocks: int, length: int, nodes: Sequence[NodeAnnouncement]) -> tuple[int, int]:
    """The ``length`` consecutive blocks that are served least.

    Compared by their worst block first, then the next worst, and so on; the first in the model on a tie.

    Args:
        n_blocks: of the whole model.
        length: how many to take; more than there are means all.
        nodes: others that serve this model or are about to.
    """
    length = max(1, min(length, n_blocks))
    served = coverage(n_blocks, nodes)
    start = min(range(n_blocks - length + 1), key=lambda s: (sorted(served[s : s + length]), s))
    return start, start + length
