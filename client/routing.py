"""Chains of nodes that together cover a model. No I/O.

A chain is chosen by what a token through it is expected to take (``pricing.py``), which rewards few hops on fat nodes
where round trips rule and many hops on fast ones where computing does.

The search goes block by block and keeps, for each node, the cheapest way to have computed everything so far with that
node at work: the node either goes on with the next block or hands over to another one. That is exact, since prices add
up along a chain. For m nodes and n blocks it takes n m^2 additions and comparisons, done by numpy for each block at
once, among those nodes alone that serve the block before or the block itself; each class of numerics is searched apart.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from client.errors import MissingBlocks
from client.pricing import (
    NO_WISHES,
    NOTHING_MEASURED,
    OVERHEAD_S,
    Hop,
    Measurements,
    Pin,
    Prices,
    Wishes,
    block_s,
    seconds_per_token,
    step_s,
)
from net.identity import PeerId
from net.protocol.announcement import NodeAnnouncement, Numerics

__all__ = [
    "Hop",
    "Measurements",
    "Pin",
    "Share",
    "Wishes",
    "as_they_are",
    "better_chain",
    "choose_chain",
    "fill",
    "is_clearly_better",
    "runs_without",
    "seconds_per_token",
    "spell_runs",
    "spread",
]

MARGIN: Final = 0.2  # a chain is clearly better that takes so much less: measurements are not that exact
MAX_CHAINS: Final = 8  # that batches are spread over
MAX_SEARCHES: Final = 16  # for them

Rows = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class Share:
    """So many of the batches go through this chain."""

    chain: list[Hop]
    batches: int


def choose_chain(
    nodes: Iterable[NodeAnnouncement],
    *,
    avoid: Mapping[PeerId, str] | None = None,
    wishes: Wishes = NO_WISHES,
    measured: Measurements = NOTHING_MEASURED,
) -> list[Hop]:
    """The chain through which a token is expected to be the fastest.

    All hops compute with the same numerics. The order of the nodes does not matter; of equally good chains always the
    same one is chosen. A node may have several hops, with others' in between.

    Args:
        nodes: those that serve one model; at least one.
        avoid: peers that failed a moment ago, and how.
        wishes: which blocks, through whom, and for what.
        measured: what is known of peers beside what they announce.

    Raises:
        MissingBlocks: some block is served by none of them, or by none that may be used.
    """
    offered = sorted(nodes, key=lambda node: (node.peer_id.to_bytes(), node.start, node.end))
    failed = avoid or {}
    found = _best(
        [node for node in offered if node.peer_id not in failed and wishes.permits_peer(node.peer_id)],
        _within(wishes, offered[0]),
        measured,
    )
    if found is None:
        raise _explain(offered, failed, _within(wishes, offered[0]))
    return found


def fill(
    nodes: Iterable[NodeAnnouncement],
    start: int,
    end: int,
    *,
    before: NodeAnnouncement | None,
    after: NodeAnnouncement | None,
    avoid: Mapping[PeerId, str] | None = None,
    wishes: Wishes = NO_WISHES,
    measured: Measurements = NOTHING_MEASURED,
) -> list[Hop]:
    """The best hops for blocks [start, end) of a chain whose other hops stay.

    Args:
        nodes: as in ``choose_chain``.
        start, end: the gap; those of ``wishes`` do not count.
        before, after: the nodes on either side of it, None for the client. The hops get their numerics.
        avoid, wishes, measured: as in ``choose_chain``.

    Raises:
        MissingBlocks: as ``choose_chain``.
    """
    beside = before or after
    numerics = wishes.numerics if beside is None else beside.numerics
    gap = replace(wishes, start=start, end=end, before=before, after=after, numerics=numerics)
    return choose_chain(nodes, avoid=avoid, wishes=gap, measured=measured)


# Replacing a chain


def is_clearly_better(
    new: Sequence[Hop],
    old: Sequence[Hop],
    *,
    wishes: Wishes = NO_WISHES,
    measured: Measurements = NOTHING_MEASURED,
) -> bool:
    """Whether a running session should move from one chain to another: a token takes less by ``MARGIN``, and the
    tokens to come save more than the replay costs for those hops that the old chain does not have.

    Args:
        new, old: both over the same blocks, with what their nodes announce now.
        wishes: ``tokens_left`` and ``replay_s``, beside what prices depend on. ``kept`` does not count.
        measured: as in ``choose_chain``.
    """
    new_s = seconds_per_token(new, wishes=wishes, measured=measured)
    old_s = seconds_per_token(old, wishes=wishes, measured=measured)
    held = {_place(hop) for hop in old}
    replayed = sum((hop.end - hop.start) / hop.node.blocks for hop in new if _place(hop) not in held)
    return new_s < (1.0 - MARGIN) * old_s and (old_s - new_s) * wishes.tokens_left > wishes.replay_s * replayed


def better_chain(
    nodes: Iterable[NodeAnnouncement],
    old: Sequence[Hop],
    *,
    avoid: Mapping[PeerId, str] | None = None,
    wishes: Wishes = NO_WISHES,
    measured: Measurements = NOTHING_MEASURED,
) -> list[Hop] | None:
    """A chain that is clearly better than the one that a session runs on; None if there is none.

    A node of the old chain that is announced no more counts as what it was when the chain was chosen: one look-up may
    have missed it. One that has moved counts as one that is about to leave.

    Args:
        nodes: who serves the model now.
        old: the chain in use, at least one hop.
        avoid, wishes, measured: as in ``choose_chain``. ``kept`` is taken from ``old``, and so are the numerics.
    """
    offered = list(nodes)
    current = as_they_are(old, offered)
    listed = dict.fromkeys([*offered, *(hop.node for hop in current)])
    going_on = replace(wishes, kept=tuple(current), numerics=old[0].node.numerics)
    try:
        new = choose_chain(listed, avoid=avoid, wishes=going_on, measured=measured)
    except MissingBlocks:
        return None
    return new if is_clearly_better(new, current, wishes=going_on, measured=measured) else None


def as_they_are(old: Sequence[Hop], nodes: Iterable[NodeAnnouncement]) -> list[Hop]:
    """The hops of a chain with what their nodes announce now, as in :func:`better_chain`."""
    now = {node.peer_id: node for node in nodes}
    return [replace(hop, node=_as_it_is(hop, now.get(hop.node.peer_id))) for hop in old]


def _as_it_is(hop: Hop, now: NodeAnnouncement | None) -> NodeAnnouncement:
    if now is None:
        return hop.node
    if now.start <= hop.start and hop.end <= now.end and now.numerics == hop.node.numerics:
        return now
    return replace(hop.node, next=(now.start, now.end))


def _place(hop: Hop) -> tuple[PeerId, int, int]:
    return hop.node.peer_id, hop.start, hop.end


# Many batches


def spread(
    nodes: Iterable[NodeAnnouncement],
    batches: int,
    *,
    avoid: Mapping[PeerId, str] | None = None,
    wishes: Wishes = NO_WISHES,
    measured: Measurements = NOTHING_MEASURED,
) -> list[Share]:
    """Chains for many independent batches, forward or backward, and how many each gets so that the last ends soonest.

    Chains are found one after another, each as if those nodes that others go through were slower by as much; all have
    the same numerics. A batch follows another through a chain without waiting for its end, so that what n batches take
    is the way of one and n - 1 times the work of the chain's busiest node, whose work for other chains counts, too.

    Args:
        nodes: as in ``choose_chain``.
        batches: how many, at least 0. ``wishes.hidden_bytes`` and ``wishes.work`` are those of one.
        avoid, wishes, measured: as in ``choose_chain``.

    Returns: at most ``MAX_CHAINS`` shares of at least one batch each, the largest first; none of no batches.

    Raises:
        ValueError: less than 0 batches.
        MissingBlocks: as ``choose_chain``.
    """
    if batches < 0:
        raise ValueError(f"{batches} batches cannot be spread")
    if not batches:
        return []
    offered = list(nodes)
    chains: list[list[Hop]] = []
    uses = Counter[PeerId]()
    for _ in range(min(batches, MAX_SEARCHES)):
        slower = {node.peer_id: step_s(node, measured) * (1 + uses[node.peer_id]) for node in offered}
        chain = choose_chain(offered, avoid=avoid, wishes=wishes, measured=replace(measured, step_s=slower))
        if chain not in chains:
            chains.append(chain)
        if len(chains) == MAX_CHAINS or not chain:
            break
        uses.update({hop.node.peer_id for hop in chain})
        wishes = replace(wishes, numerics=chain[0].node.numerics)
    counts = _share_out(chains, batches, wishes, measured)
    shares = [Share(chain=chain, batches=count) for chain, count in zip(chains, counts, strict=True) if count]
    return sorted(shares, key=lambda share: -share.batches)


def _share_out(chains: Sequence[Sequence[Hop]], batches: int, wishes: Wishes, measured: Measurements) -> list[int]:
    """One batch after another to where it is over first."""
    alone = [seconds_per_token(chain, wishes=wishes, measured=measured) for chain in chains]
    works = [_work(chain, wishes, measured) for chain in chains]
    busy: defaultdict[PeerId, float] = defaultdict(float)
    counts = [0] * len(chains)
    for _ in range(batches):
        ends = [
            way_s + max((busy[peer] for peer in work), default=0.0) for way_s, work in zip(alone, works, strict=True)
        ]
        chosen = ends.index(min(ends))
        counts[chosen] += 1
        for peer, seconds in works[chosen].items():
            busy[peer] += seconds
    return counts


def _work(chain: Sequence[Hop], wishes: Wishes, measured: Measurements) -> dict[PeerId, float]:
    """For how long one batch keeps each peer busy."""
    work: dict[PeerId, float] = {}
    for hop in chain:
        seconds = OVERHEAD_S + (hop.end - hop.start) * block_s(hop.node, wishes, measured)
        work[hop.node.peer_id] = work.get(hop.node.peer_id, 0.0) + seconds
    return work


# What is not served


def runs_without(n_blocks: int, nodes: Iterable[NodeAnnouncement]) -> list[tuple[int, int]]:
    """The runs of blocks [start, end) that none of ``nodes`` serves."""
    served = {block for node in nodes for block in range(node.start, node.end)}
    return _runs(0, n_blocks, lambda block: block not in served)


def spell_runs(runs: Sequence[tuple[int, int]]) -> str:
    """``[(0, 3), (5, 6)]`` as ``0:3, 5:6``, the form that ``raceme serve --blocks`` takes."""
    return ", ".join(f"{start}:{end}" for start, end in runs)


def _runs(first: int, last: int, is_in: Callable[[int], bool]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for block in filter(is_in, range(first, last)):
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs


# The search


def _within(wishes: Wishes, node: NodeAnnouncement) -> Wishes:
    """The same with blocks that this model has."""
    end = node.blocks if wishes.end is None else min(wishes.end, node.blocks)
    return replace(wishes, start=min(wishes.start, end), end=end)


def _classes(nodes: Iterable[NodeAnnouncement]) -> list[Numerics]:
    return sorted({node.numerics for node in nodes}, key=lambda each: (each.dtype, each.quantization, each.backend))


def _best(nodes: Sequence[NodeAnnouncement], wishes: Wishes, measured: Measurements) -> list[Hop] | None:
    """The cheapest chain of all classes of numerics that are wanted."""
    if wishes.start == wishes.end:
        return []
    found = [
        chain
        for numerics in _classes(nodes)
        if wishes.numerics in (None, numerics)
        and (chain := _cheapest([node for node in nodes if node.numerics == numerics], wishes, measured)) is not None
    ]
    return min(found, key=lambda each: each[0])[1] if found else None


def _cheapest(
    nodes: Sequence[NodeAnnouncement], wishes: Wishes, measured: Measurements
) -> tuple[float, list[Hop]] | None:
    """See the module; its seconds and its hops.

    A candidate is a node, or a hop that is kept: the same node, but for all of the hop's blocks or none of them.
    """
    first, last = wishes.start, wishes.end or 0
    length = last - first
    prices = Prices(nodes, wishes, measured)
    kept = _kept_rows(nodes, wishes)
    rows = np.array([*range(len(nodes)), *(row for row, _, _ in kept)])
    starts = np.array([*(node.start for node in nodes), *(start for _, start, _ in kept)])
    ends = np.array([*(node.end for node in nodes), *(end for _, _, end in kept)])
    is_kept = np.arange(len(rows)) >= len(nodes)

    enter, leave, hop_s = prices.enter[rows], prices.leave[rows], prices.hop[rows]
    replay_s = wishes.replay_s / nodes[0].blocks / wishes.tokens_left if wishes.kept else 0.0
    each_s = prices.block[rows] + np.where(is_kept, 0.0, replay_s)

    cost = np.full(len(rows), np.inf)  # of everything before this block, with each candidate at work
    came = np.full((length, len(rows)), -1)  # who handed a block over to whom; -1 for nobody
    for offset in range(length):
        block = first + offset
        serves = (starts <= block) & (block < ends) & _pinned_rows(nodes, wishes, block)[rows]
        enters = np.flatnonzero(serves & (~is_kept | (starts == block)))
        stays = np.where(serves, cost, np.inf)
        if offset == 0:
            stays[enters] = enter[enters] + hop_s[enters]
        else:
            leaves = np.flatnonzero(np.isfinite(cost) & (~is_kept | (ends == block)))
            if len(leaves) and len(enters):
                ways = prices.between[np.ix_(rows[leaves], rows[enters])].T + cost[leaves]
                chosen = ways.argmin(axis=1)
                handed = ways[np.arange(len(enters)), chosen] + hop_s[enters]
                better = handed < stays[enters]
                came[offset, enters[better]] = leaves[chosen[better]]
                stays[enters] = np.minimum(stays[enters], handed)
        cost = stays + each_s
    total = np.where(~is_kept | (ends == last), cost + leave, np.inf)
    at = int(total.argmin())
    if not np.isfinite(total[at]):
        return None
    return float(total[at]), _trace([nodes[row] for row in rows], came, at, first, last)


def _trace(candidates: Sequence[NodeAnnouncement], came: Rows, at: int, first: int, last: int) -> list[Hop]:
    """The chain that ends with candidate ``at``, followed back.

    Shapes:
        came: [last - first, candidates]
    """
    chain: list[Hop] = []
    end = last
    for block in range(last - 1, first, -1):
        if came[block - first, at] >= 0:
            chain.append(Hop(node=candidates[at], start=block, end=end))
            at, end = int(came[block - first, at]), block
    chain.append(Hop(node=candidates[at], start=first, end=end))
    return chain[::-1]


def _kept_rows(nodes: Sequence[NodeAnnouncement], wishes: Wishes) -> list[tuple[int, int, int]]:
    """Which nodes hold state for which blocks, as far as these are wanted and still served."""
    return [
        (row, hop.start, hop.end)
        for hop in wishes.kept
        if wishes.start <= hop.start and hop.end <= (wishes.end or 0)
        for row, node in enumerate(nodes)
        if node.peer_id == hop.node.peer_id and node.start <= hop.start and hop.end <= node.end
    ]


def _pinned_rows(nodes: Sequence[NodeAnnouncement], wishes: Wishes, block: int) -> Rows:
    """Which nodes the pins leave for a block."""
    for pin in wishes.pinned:
        if pin.start <= block < pin.end:
            return np.array([node.peer_id == pin.peer_id for node in nodes])
    return np.full(len(nodes), True)


def _explain(offered: Sequence[NodeAnnouncement], failed: Mapping[PeerId, str], wishes: Wishes) -> MissingBlocks:
    """Why there is no chain: the first reason that leaves some block to nobody."""
    model, first, last = offered[0].model, wishes.start, wishes.end or 0

    def runs(nodes: Iterable[NodeAnnouncement], wished: Wishes = NO_WISHES) -> list[tuple[int, int]]:
        each = list(nodes)
        return _runs(
            first, last, lambda b: not any(node.start <= b < node.end and wished.permits(node, b) for node in each)
        )

    if unserved := runs(offered):
        return MissingBlocks(
            f"nobody serves blocks {spell_runs(unserved)} of {model}; start a node with: "
            f"raceme serve {model} --blocks {spell_runs(unserved[:1])} --bootstrap ADDR",
            unserved,
        )
    if refused := runs(offered, wishes):
        return MissingBlocks(
            f"blocks {spell_runs(refused)} of {model} are served by peers alone that are not to be used: allow other "
            f"peers, or pin these blocks to none",
            refused,
        )
    if silent := runs((node for node in offered if node.peer_id not in failed), wishes):
        start, end = silent[0]
        culprit = next(n.peer_id for n in offered if n.start <= start < n.end and wishes.permits(n, start))
        return MissingBlocks(
            f"blocks {spell_runs(silent)} of {model} are announced, but the nodes that serve them fail "
            f"({culprit}: {failed[culprit]}); wait for them, or start another with: raceme serve {model} "
            f"--blocks {spell_runs([(start, end)])} --bootstrap ADDR",
            silent,
        )
    if wishes.numerics is not None:
        usable = (node for node in offered if node.peer_id not in failed and node.numerics == wishes.numerics)
        other = runs(usable, wishes)
        return MissingBlocks(
            f"blocks {spell_runs(other)} of {model} are served, but not with the numerics of the other hops "
            f"({wishes.numerics})",
            other,
        )
    return MissingBlocks(
        f"the nodes that serve {model} compute with different numerics, and none of these covers all blocks", []
    )
