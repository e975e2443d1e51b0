"""Which blocks a node should serve: those that the swarm lacks most, and when to move there. No I/O.

A move is worth its while when it raises the swarm's coverage, sorted from the worst block on, by more than a margin
where it first differs, and leaves no block behind that would be as badly off. With a margin of (1 + e) / (1 - e), no
error of e in measured speeds, fresh for every look, has anybody move to and fro: what such a move gains on the worst
block that it goes to, it has gained by the true speeds as well, and so every move raises the true sorted coverage,
which cannot go on for ever. (Of all that the move touches, the worst was at t and nothing is at t * margin or less
any more, by speeds that are off by e at most; so by the true ones everything it touches is above what the worst was.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Final

from net.identity import PeerId
from net.protocol.announcement import NodeAnnouncement

MARGIN: Final = 1.25  # lets measured speeds be off by 11 % either way
_LEAST_SPEED: Final = 1.0  # of a node that has measured nothing yet: it is more than none


def coverage(n_blocks: int, nodes: Iterable[NodeAnnouncement]) -> list[float]:
    """How much each block is served: the sum of its nodes' measured speeds, at least 1 for each.

    A node that moves counts where it moves to.
    """
    total = [0.0] * n_blocks
    for node in nodes:
        start, end = node.next or (node.start, node.end)
        for block in range(start, min(end, n_blocks)):
            total[block] += max(node.decode_tokens_per_s, _LEAST_SPEED)
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


def better_span(
    n_blocks: int,
    current: tuple[int, int],
    length: int,
    speed: float,
    others: Sequence[NodeAnnouncement],
    *,
    margin: float = MARGIN,
    barred: Collection[tuple[int, int]] = (),
) -> tuple[int, int] | None:
    """Where a node that serves ``current`` should move to; ``None`` if it should stay.

    Of all good moves (see above) that which gives the best sorted coverage; of equal ones the nearest, then the first
    in the model. No move leaves a block that nobody else serves now and goes on serving.

    Args:
        n_blocks: of the whole model.
        current: blocks [start, end) that the node serves.
        length: how many it would take; more than there are means all.
        speed: what it announces, tokens per second.
        others: the other nodes that serve this model or are about to; those that move count where they move to.
        margin: how much better, at least 1.
        barred: where it cannot go.
    """
    length = max(1, min(length, n_blocks))
    swarm = _Swarm(n_blocks, others)
    spans = ((start, start + length) for start in range(n_blocks - length + 1))
    good = [
        (after, -abs(span[0] - current[0]), -span[0], span)
        for span in spans
        if span not in barred and (after := swarm.after_move(current, span, speed, margin)) is not None
    ]
    return max(good)[-1] if good else None


def keeps_move(
    n_blocks: int,
    current: tuple[int, int],
    target: tuple[int, int],
    speed: float,
    own: PeerId,
    others: Sequence[NodeAnnouncement],
    *,
    margin: float = MARGIN,
) -> bool:
    """Whether a node that has announced ``target`` should go on, now that it looks again.

    Of those that would move or join at the same time, the lower PeerId goes first: it takes the others' intentions for
    undone, and they take its own for done. So the first of them always goes, and none leaves a block because another
    has yet to come, or while another leaves it as well.

    Args:
        n_blocks, current, speed, others, margin: as for ``better_span``.
        target: blocks [start, end) that it is about to load, or has loaded but not announced as served.
        own: the node's.
    """
    before_us = [standing for node in others if (standing := _as_it_stands(node, own)) is not None]
    return _Swarm(n_blocks, before_us).after_move(current, target, speed, margin) is not None


def _as_it_stands(node: NodeAnnouncement, own: PeerId) -> NodeAnnouncement | None:
    """What another node counts for when we look again: without its intentions, should it come after us."""
    if node.peer_id.to_bytes() < own.to_bytes():
        return node
    return replace(node, next=None) if node.state == "online" else None


class _Swarm:
    """What the other nodes serve.

    Attributes:
        served: how much of each block, once all have moved and joined.
        stays: whether somebody serves the block now, and goes on.
    """

    def __init__(self, n_blocks: int, others: Sequence[NodeAnnouncement]) -> None:
        self.served = coverage(n_blocks, others)
        self.stays = [False] * n_blocks
        for node in others:
            start, end = node.next or (node.start, node.end)
            if node.state == "online":
                for block in range(max(start, node.start), min(end, node.end, n_blocks)):
                    self.stays[block] = True

    def after_move(
        self, current: tuple[int, int], target: tuple[int, int], speed: float, margin: float
    ) -> list[float] | None:
        """The sorted coverage with us at ``target`` instead of ``current``; ``None`` unless the move is good."""
        left = [block for block in range(*current) if not target[0] <= block < target[1]]
        if not all(self.stays[block] for block in left):
            return None
        before, after = self._with_us(current, speed), self._with_us(target, speed)
        worst = next(((old, new) for old, new in zip(before, after, strict=True) if old != new), None)
        if worst is None:
            return None
        old, new = worst
        is_good = new > margin * old and all(self.served[block] > margin * old for block in left)
        return after if is_good else None

    def _with_us(self, span: tuple[int, int], speed: float) -> list[float]:
        ours = max(speed, _LEAST_SPEED)
        return sorted(served + ours * (span[0] <= block < span[1]) for block, served in enumerate(self.served))
