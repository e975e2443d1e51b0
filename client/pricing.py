"""What a chain costs: the expected seconds that one message, a token as a rule, takes through it. No I/O.

Nodes push their results on: from the client to the first node, from node to node, and from the last one back, half a
round trip each. To that comes, for every hop:

- ``OVERHEAD_S`` for reading, queueing and sending a message;
- the hop's blocks times what a block takes there, measured, else announced, and longer while steps of others wait;
- what makes a node a worse choice than its speed says: a relay on the way, hardly any cache left, blocks that it is
  about to leave, failures now and then. Each is expressed in seconds per token, so that all of it can be added up.

Between the client and a node, hidden states also take their bytes over the measured line. What a node's own line
carries is part of the speed that it announces.

Round trips that nobody has measured are guessed: ``CLIENT_RTT_S`` between the client and a node; between two nodes the
mean of theirs to the client, at most ``NODE_RTT_S``. Of what two nodes announce of each other the larger counts, so
that it takes two to pretend to be near; and where the client has measured both, they are at least half as far from
each other as the triangle inequality says (routes on the internet do break it, but seldom by more). Where nodes do not
push, or do not reach each other, the way leads through the client.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from net.identity import PeerId
from net.protocol.announcement import NodeAnnouncement, Numerics

CLIENT_RTT_S: Final = 0.05  # between a client and a node, not measured: two homes in one part of the world
NODE_RTT_S: Final = 0.05  # between two nodes, not measured: at most
OVERHEAD_S: Final = 0.001
# By how much a step takes longer for each one that waits or runs: they run together. Sixteen sessions get five times
# the tokens of one, which is 0.15 for each; and half a batch goes by before the next one begins.
WAITING: Final = 0.2
RELAY_S: Final = 0.01  # bytes that others pay for, and one more machine that can fail
SCARCE_CACHE_S: Final = 0.05  # where cache is left for the session, but not for twice as much
NO_CACHE_S: Final = 1.0  # where there is less than that: the node will refuse, or others have to go
LEAVING_S: Final = 0.02  # a node that announces that it moves: the session will have to leave it
FAILURE_S: Final = 5.0  # what a failed step costs: to notice, to choose anew, to replay
SLOWEST_TOKENS_PER_S: Final = 1e-3  # a node that announces less counts as this fast

Seconds = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Hop:
    """Blocks [start, end) on one node; all or part of what it serves."""

    node: NodeAnnouncement
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Pin:
    """Blocks [start, end) that only this peer may run."""

    start: int
    end: int
    peer_id: PeerId

    def __post_init__(self) -> None:
        """Raises:
        ValueError: no block is pinned.
        """
        if not 0 <= self.start < self.end:
            raise ValueError(f"a pin of blocks {self.start}:{self.end}, expected 0 <= start < end")


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a chain is wanted for.

    Attributes:
        start, end: Blocks [start, end) to cover; ``end`` is None for all that the model has. Less for who runs the
            first and last blocks itself, or replaces a part of a chain.
        before, after: Who hands the hidden states over, and who gets them; None for the client.
        numerics: The only class to use; None for any one.
        allowed: The only peers to use; None for all.
        blocked: Peers not to use.
        pinned: Who must run certain blocks. Pins must not overlap; what lies outside of the blocks does not count.
        push: Whether nodes hand results to each other, rather than through the client.
        hidden_bytes: Of one message, one way.
        work: How many steps of one token a message is worth in computing.
        cache_tokens: Cache that the session needs on each node, rows counted apart.
        tokens_left: How many more messages will be sent; what replacing costs is spread over them.
        kept: Hops of a running session whose nodes hold its state, exactly for these blocks.
        replay_s: What it takes to bring all blocks of the model to that state elsewhere; hops that are not among
            ``kept`` pay their share of it. Without ``kept`` it counts nothing: everybody would pay the same.
    """

    start: int = 0
    end: int | None = None
    before: NodeAnnouncement | None = None
    after: NodeAnnouncement | None = None
    numerics: Numerics | None = None
    allowed: frozenset[PeerId] | None = None
    blocked: frozenset[PeerId] = frozenset()
    pinned: tuple[Pin, ...] = ()
    push: bool = True
    hidden_bytes: int = 0
    work: float = 1.0
    cache_tokens: int = 0
    tokens_left: float = 128.0
    kept: tuple[Hop, ...] = ()
    replay_s: float = 0.0

    def __post_init__(self) -> None:
        """Raises:
        ValueError: no range of blocks, pins that overlap, or a number below 0 (``tokens_left``: below 1).
        """
        if self.start < 0 or (self.end is not None and self.end < self.start):
            raise ValueError(f"blocks {self.start}:{self.end}, expected 0 <= start <= end")
        if not (0 <= self.work < math.inf and 0 <= self.replay_s < math.inf and 1 <= self.tokens_left < math.inf):
            raise ValueError("work and replay_s are 0 or more, tokens_left 1 or more, and all of them finite")
        if self.hidden_bytes < 0 or self.cache_tokens < 0:
            raise ValueError("hidden_bytes and cache_tokens are 0 or more")
        pins = sorted(self.pinned, key=lambda pin: pin.start)
        for pin, following in itertools.pairwise(pins):
            if following.start < pin.end:
                raise ValueError(f"block {following.start} is pinned twice")

    def permits(self, node: NodeAnnouncement, block: int) -> bool:
        """Whether this node may run this block, as far as the lists of peers and the pins go."""
        return self.permits_peer(node.peer_id) and all(
            pin.peer_id == node.peer_id for pin in self.pinned if pin.start <= block < pin.end
        )

    def permits_peer(self, peer_id: PeerId) -> bool:
        """The same by the lists of peers alone."""
        return peer_id not in self.blocked and (self.allowed is None or peer_id in self.allowed)


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What the client has found out itself; it overrides what nodes announce. All in seconds, bytes per second, or
    without unit; finite and not negative.

    Attributes:
        round_trips: To a peer and back.
        step_s: What a block takes there for a step of one token, when nobody else is served.
        waiting: Steps of others that wait or run there, on average.
        bytes_per_s: Between the client and the peer.
        failure_chance: Of one step.
        relayed: Whether the client's connection goes through a relay.
        unreachable: Pairs of which the first cannot push to the second.
    """

    round_trips: Mapping[PeerId, float] = field(default_factory=dict)
    step_s: Mapping[PeerId, float] = field(default_factory=dict)
    waiting: Mapping[PeerId, float] = field(default_factory=dict)
    bytes_per_s: Mapping[PeerId, float] = field(default_factory=dict)
    failure_chance: Mapping[PeerId, float] = field(default_factory=dict)
    relayed: Mapping[PeerId, bool] = field(default_factory=dict)
    unreachable: frozenset[tuple[PeerId, PeerId]] = frozenset()


NO_WISHES: Final = Wishes()
NOTHING_MEASURED: Final = Measurements()


class Prices:
    """Of everything that a chain over some nodes can be made of.

    Attributes:
        enter: From who comes before the chain to each node.
        leave: From each node to who comes after.
        between: From each node [row] to each node [column]; nothing on one and the same.
        hop: For each node, whatever it runs.
        block: For each node and block.

    Shapes:
        enter, leave, hop, block: [n]
        between: [n, n]
    """

    def __init__(self, nodes: Sequence[NodeAnnouncement], wishes: Wishes, measured: Measurements) -> None:
        ends = [node for node in (wishes.before, wishes.after) if node is not None]
        ways, to_client = _ways([*nodes, *ends], wishes, measured)
        n = len(nodes)
        self.between: Seconds = ways[:n, :n]
        self.enter: Seconds = to_client[:n] if wishes.before is None else ways[n, :n]
        self.leave: Seconds = to_client[:n] if wishes.after is None else ways[:n, -1]
        self.hop: Seconds = np.array([_hop_s(node, wishes, measured) for node in nodes])
        self.block: Seconds = np.array([block_s(node, wishes, measured) for node in nodes])


def seconds_per_token(
    chain: Sequence[Hop], *, wishes: Wishes = NO_WISHES, measured: Measurements = NOTHING_MEASURED
) -> float:
    """What one message through a chain is expected to take, from the client (or who comes before) back to it.

    Of the wishes, those count that say between whom, how large and how much work a message is, and how much cache it
    takes; replaying is no part of it.
    """
    if not chain:
        return 0.0
    prices = Prices([hop.node for hop in chain], wishes, measured)
    each = np.array([hop.end - hop.start for hop in chain])
    pushed = np.diagonal(prices.between, offset=1).sum()
    return float(prices.enter[0] + pushed + prices.leave[-1] + prices.hop.sum() + (each * prices.block).sum())


def step_s(node: NodeAnnouncement, measured: Measurements) -> float:
    """What a step of one token takes for each block on a node that serves nobody else."""
    announced = 1.0 / (max(node.decode_tokens_per_s, SLOWEST_TOKENS_PER_S) * (node.end - node.start))
    return measured.step_s.get(node.peer_id, announced)


def block_s(node: NodeAnnouncement, wishes: Wishes, measured: Measurements) -> float:
    """What a message takes for each block on a node."""
    waiting = measured.waiting.get(node.peer_id, node.waiting)
    return step_s(node, measured) * wishes.work * (1.0 + WAITING * waiting)


def _hop_s(node: NodeAnnouncement, wishes: Wishes, measured: Measurements) -> float:
    seconds = OVERHEAD_S + FAILURE_S * measured.failure_chance.get(node.peer_id, 0.0)
    if measured.relayed.get(node.peer_id, node.reachability == "relay-only"):
        seconds += RELAY_S
    if node.next is not None:
        seconds += LEAVING_S
    needed, left = wishes.cache_tokens, min(node.cache_tokens_left, node.max_length)
    if left < needed:
        seconds += NO_CACHE_S
    if left < 2 * needed:
        seconds += SCARCE_CACHE_S * (2.0 - left / needed)
    return seconds


def _ways(points: Sequence[NodeAnnouncement], wishes: Wishes, measured: Measurements) -> tuple[Seconds, Seconds]:
    """From each node to each, and between each and the client.

    Shapes:
        returns: [n, n], [n]
    """
    peers = list(dict.fromkeys(point.peer_id for point in points))
    index = {peer: number for number, peer in enumerate(peers)}
    known = np.array([peer in measured.round_trips for peer in peers])
    far = np.array([measured.round_trips.get(peer, CLIENT_RTT_S) for peer in peers])
    line = np.array([wishes.hidden_bytes / max(measured.bytes_per_s.get(peer, math.inf), 1.0) for peer in peers])
    to_client = far / 2 + line

    announced = np.full((len(peers), len(peers)), np.nan)
    for point in points:
        for other, seconds in point.round_trips.items():
            if other in index:
                announced[index[point.peer_id], index[other]] = seconds
    announced = np.fmax(announced, announced.T)
    guessed = np.minimum((far[:, None] + far[None, :]) / 2, NODE_RTT_S)
    least = np.abs(far[:, None] - far[None, :]) / 2 * (known[:, None] & known[None, :])
    pushed = np.maximum(np.where(np.isnan(announced), guessed, announced), least) / 2

    through_client = to_client[:, None] + to_client[None, :] + OVERHEAD_S
    ways = pushed if wishes.push else through_client.copy()
    for sender, receiver in measured.unreachable:
        if sender in index and receiver in index:
            pair = index[sender], index[receiver]
            ways[pair] = through_client[pair]
    np.fill_diagonal(ways, 0.0)
    rows = np.array([index[point.peer_id] for point in points])
    return ways[np.ix_(rows, rows)], to_client[rows]
