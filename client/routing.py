"""Chains of nodes that together cover a model. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from client.errors import MissingBlocks
from net.identity import PeerId
from net.protocol.announcement import NodeAnnouncement, Numerics


@dataclass(frozen=True, kw_only=True)
class Hop:
    """Blocks [start, end) on one node; all or part of what it serves."""

    node: NodeAnnouncement
    start: int
    end: int


def choose_chain(nodes: Iterable[NodeAnnouncement], *, avoid: Mapping[PeerId, str] | None = None) -> list[Hop]:
    """The best chain over the whole model: fewest hops, then the least time for a token.

    All hops compute with the same numerics.

    Args:
        nodes: those that serve one model; at least one.
        avoid: peers that failed a moment ago, and how.

    Raises:
        MissingBlocks: some block is served by none of them.
    """
    offered = list(nodes)
    failed = avoid or {}
    usable = [node for node in offered if node.peer_id not in failed]
    chains = [
        chain
        for numerics in _classes(usable)
        if (chain := _cheapest([node for node in usable if node.numerics == numerics])) is not None
    ]
    if chains:
        return min(chains, key=_cost)
    raise _explain(offered, failed)


def runs_without(n_blocks: int, nodes: Iterable[NodeAnnouncement]) -> list[tuple[int, int]]:
    """The runs of blocks [start, end) that none of ``nodes`` serves."""
    served = {block for node in nodes for block in range(node.start, node.end)}
    runs: list[tuple[int, int]] = []
    for block in range(n_blocks):
        if block in served:
            continue
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs


def spell_runs(runs: Sequence[tuple[int, int]]) -> str:
    """``[(0, 3), (5, 6)]`` as ``0:3, 5:6``, the form that ``raceme serve --blocks`` takes."""
    return ", ".join(f"{start}:{end}" for start, end in runs)


def _classes(nodes: Iterable[NodeAnnouncement]) -> list[Numerics]:
    return sorted({node.numerics for node in nodes}, key=str)


def _cheapest(nodes: Sequence[NodeAnnouncement]) -> list[Hop] | None:
    """Dynamic programming over block boundaries: the best chain up to each."""
    if not nodes:
        return None
    n_blocks = nodes[0].blocks
    best: list[list[Hop] | None] = [[], *[None] * n_blocks]
    for end in range(1, n_blocks + 1):
        candidates = [
            [*chain, Hop(node=node, start=start, end=end)]
            for node in nodes
            if node.start < end <= node.end
            for start in range(node.start, end)
            if (chain := best[start]) is not None
        ]
        best[end] = min(candidates, key=_cost, default=None)
    return best[n_blocks]


def _cost(chain: Sequence[Hop]) -> tuple[int, float]:
    seconds = sum(
        (hop.end - hop.start) / (hop.node.end - hop.node.start) / max(hop.node.decode_tokens_per_s, 1e-3)
        for hop in chain
    )
    return len(chain), seconds


def _explain(offered: Sequence[NodeAnnouncement], failed: Mapping[PeerId, str]) -> MissingBlocks:
    first = offered[0]
    usable = [node for node in offered if node.peer_id not in failed]
    unserved = runs_without(first.blocks, offered)
    if unserved:
        return MissingBlocks(
            f"nobody serves blocks {spell_runs(unserved)} of {first.model}; start a node with: "
            f"raceme serve {first.model} --blocks {spell_runs(unserved[:1])} --bootstrap ADDR",
            unserved,
        )
    silent = runs_without(first.blocks, usable)
    if silent:
        start, end = silent[0]
        culprit = next(node.peer_id for node in offered if node.start < end and start < node.end)
        return MissingBlocks(
            f"blocks {spell_runs(silent)} of {first.model} are announced, but the nodes that serve them fail "
            f"({culprit}: {failed[culprit]}); wait for them, or start another with: raceme serve {first.model} "
            f"--blocks {spell_runs(silent[:1])} --bootstrap ADDR",
            silent,
        )
    return MissingBlocks(
        f"the nodes that serve {first.model} compute with different numerics, and none of these covers all blocks", []
    )
