"""Which nodes a session takes: of what its user wants, what nodes announce, and what we know of them ourselves."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from client.choices import Choices
from client.errors import MissingBlocks
from client.lifesigns import LifeSigns
from client.nearness import Nearness
from client.pricing import NOTHING_MEASURED, step_s
from client.routing import Hop, Measurements, Wishes, as_they_are, better_chain, choose_chain, seconds_per_token
from client.session_core import Gap
from net.identity import PeerId
from net.protocol.announcement import NodeAnnouncement
from net.reputation import Reputation

logger = logging.getLogger(__name__)

LEAST_GAIN_S = 0.005  # for each token: round trips on one network differ by as much from one moment to the next
REOPEN_S = 0.5  # what it costs to open a session elsewhere, beside what it takes to compute again what there was:
PROMPT_SPEEDUP = 10.0  # a tenth of what it took token by token
UNHINDERED = 0.25  # of a node's steps: these have hardly waited for others'
TOO_SLOW, TOO_SLOW_S = 2.0, 0.005  # times what a node announces, and so much more for all of its blocks: it is believed
# no longer, but what was measured


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a session needs nodes for.

    Attributes:
        rows: Of it.
        tokens: That it has.
        expected: How many it will probably come to have; 0 if nobody has said.
        requested: How many it is to have room for; ``None`` for as many as there can be.
        max_length: How many it can get on the chain that it has.
        allows: Whether its hidden states may travel along these hops.
    """

    rows: int
    tokens: int
    expected: int
    requested: int | None
    max_length: int
    allows: Callable[[Sequence[Hop]], bool]


class Chooser:
    """Chooses among nodes for one session."""

    def __init__(
        self, choices: Choices, reputation: Reputation, life_signs: LifeSigns, nearness: Nearness | None = None
    ) -> None:
        """Args:
        choices: Which nodes may be used.
        reputation: What is known of nodes.
        life_signs: Knows which have not answered lately.
        nearness: Knows how far they are; by default all count as equally far.
        """
        self._choices = choices
        self._reputation = reputation
        self._life_signs = life_signs
        self._nearness = nearness

    def chain(self, gap: Gap, need: Need) -> list[Hop]:
        """The best hops there are, of nodes that have not failed others lately if there are enough of these, or that
        have at least not been silent.
        """
        wishes = replace(
            self._wishes(need), start=gap.start, end=gap.end, numerics=gap.numerics, before=gap.before, after=gap.after
        )
        nodes, measured = gap.nodes, self._measured(gap.nodes)
        silent = self._life_signs.missed(node.peer_id for node in nodes)
        for avoided in ({**self._reputation.avoided(), **silent}, silent):
            if avoided:
                with suppress(MissingBlocks):
                    return choose_chain(nodes, avoid={**avoided, **gap.avoid}, wishes=wishes, measured=measured)
        try:
            return choose_chain(nodes, avoid=gap.avoid, wishes=wishes, measured=measured)
        except MissingBlocks:
            if gap.numerics is not None or not self._choices.mixed_numerics:
                raise
        return _mixed_chain(nodes, gap.avoid, wishes, measured)

    def better(
        self, nodes: Sequence[NodeAnnouncement], old: Sequence[Hop], need: Need, *, avoid: Mapping[PeerId, str]
    ) -> list[Hop] | None:
        """Hops that are worth moving to, of nodes that have room for what the session is going to need."""
        wishes, own = self._wishes(need), {hop.node.peer_id for hop in old}
        roomy = [
            node
            for node in nodes
            if node.peer_id in own
            or (node.max_length >= need.max_length and node.cache_tokens_left >= wishes.cache_tokens)
        ]
        measured = self._measured(nodes)
        # What we have computed there ourselves is a part of what waits there, on average.
        others = {node.peer_id: max(0.0, node.waiting - 1.0) for node in nodes if node.peer_id in own}
        measured = replace(measured, waiting=others)
        token_s = seconds_per_token(as_they_are(old, nodes), measured=measured)
        left = need.expected - need.tokens
        wishes = replace(
            wishes,
            cache_tokens=0,  # the nodes in use have it already
            tokens_left=float(left) if left > 0 else wishes.tokens_left,
            replay_s=REOPEN_S + need.tokens * token_s / PROMPT_SPEEDUP,
        )
        avoided = {**self._reputation.avoided(), **avoid}
        found = better_chain(roomy, old, avoid=avoided, wishes=wishes, measured=measured)
        if found is not None and not need.allows(found):
            return None
        better_s = math.inf if found is None else seconds_per_token(found, measured=measured)
        if found is None or token_s - better_s < LEAST_GAIN_S:
            return None
        logger.info("moves to other nodes: %.0f ms for a token instead of %.0f", 1000 * better_s, 1000 * token_s)
        return found

    def _wishes(self, need: Need) -> Wishes:
        """What chains are wanted for."""
        tokens = max(need.tokens, need.requested or need.expected)
        return replace(self._choices.to_wishes(), cache_tokens=need.rows * tokens)

    def can_replace(self, hop: Hop, nodes: Sequence[NodeAnnouncement]) -> bool:
        """Whether others could compute what a node does."""
        wishes = replace(self._choices.to_wishes(), start=hop.start, end=hop.end)
        try:
            choose_chain(nodes, avoid={hop.node.peer_id: "lost"}, wishes=wishes)
        except MissingBlocks:
            return False
        return True

    def usable(self, nodes: Sequence[NodeAnnouncement]) -> list[NodeAnnouncement]:
        """Those that a chain may come to have."""
        avoided, wishes = self._reputation.avoided(), self._choices.to_wishes()
        return [node for node in nodes if node.peer_id not in avoided and wishes.permits_peer(node.peer_id)]

    def _measured(self, nodes: Sequence[NodeAnnouncement]) -> Measurements:
        """What we know of nodes ourselves."""
        peers = {node.peer_id for node in nodes}
        slow = {node.peer_id: seconds for node in nodes if (seconds := self._slower_s(node)) is not None}
        return Measurements(
            round_trips={} if self._nearness is None else self._nearness.round_trips(peers),
            step_s=slow,
            failure_chance={peer: self._reputation.failure_chance(peer) for peer in peers},
            relayed={} if self._nearness is None else self._nearness.relayed(peers),
        )

    def _slower_s(self, node: NodeAnnouncement) -> float | None:
        """What a block has taken there for us, where that is far more than the node announces. What is measured from
        here is never as exact as what is measured there, and must not speak for nodes that we do not know.
        """
        seconds = self._reputation.latency_s(node.peer_id, UNHINDERED)
        if seconds is None:
            return None
        announced = step_s(node, NOTHING_MEASURED)
        excess_s = (seconds - announced) * (node.end - node.start)
        return seconds if seconds > TOO_SLOW * announced and excess_s > TOO_SLOW_S else None


def _mixed_chain(
    nodes: Sequence[NodeAnnouncement], avoid: Mapping[PeerId, str], wishes: Wishes, measured: Measurements
) -> list[Hop]:
    """The best hops, whatever each node computes with.

    Raises:
        MissingBlocks: there are none.
    """
    alike = [replace(node, numerics=nodes[0].numerics) for node in nodes]
    own = {node.peer_id: node for node in nodes}
    found = choose_chain(alike, avoid=avoid, wishes=replace(wishes, before=None, after=None), measured=measured)
    return [replace(hop, node=own[hop.node.peer_id]) for hop in found]
