"""The chain: choosing nodes for blocks that nobody has, and what follows when one fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from client.core.actions import Close, Gap
from client.core.state import NEVER, Failure, LegState, State, place
from client.errors import ClientError, MissingBlocks, SessionFailed, UnknownModel
from client.routing import Hop
from net.errors import NetError
from net.identity import PeerId
from net.protocol.announcement import NodeAnnouncement

WAIT_S: Final = 20.0  # of one request, for nodes that fail, while no others could take their place
OPENING_WAIT_S: Final = 4.0  # the same, while nothing has been computed that could be lost
AGAIN_S: Final = 0.5  # before the second try with a node that failed; twice as long before each further one, up to
MAX_AGAIN_S: Final = 4.0
LOOK_S: Final = 0.5  # before the next look at who is there
RESTED_S: Final = 1.0  # after which a node that failed is tried again before others are looked for


class Chain(State):
    """Who serves which blocks, and who is chosen in place of whom."""

    def stop(self) -> None:
        """What was asked for is not wanted any more; the chain stays."""
        self._wanted_from, self._wants_chain = None, False
        self._give_up_runs()

    @property
    def ready(self) -> bool:
        """Whether there is a whole chain. What is sent to a leg that is not open yet goes right behind the question."""
        return bool(self.legs) and not self._gaps()

    def failed(self, key: int, reason: str, now: float, *, blame: bool = True) -> None:
        """A leg is lost, for good.

        Args:
            key: Which.
            reason: How.
            now: When.
            blame: Whether its node is avoided; else others are only preferred once.
        """
        leg = self._find(key)
        if leg is None:
            return
        peer = leg.peer_id
        before = self.failed_peers.pop(peer, None)
        delay_s = 0.0 if before is None else min(max(AGAIN_S, 2 * before.delay_s), MAX_AGAIN_S)
        self.failed_peers[peer] = Failure(reason=reason, at=now, again_at=now + delay_s, delay_s=delay_s)
        if blame:
            self.failures.append((peer, reason))
        if leg.is_open and blame:
            self.reports.append(f"replacing a node: peer {peer}: {reason}")
        self._drop(leg, now)

    def _gaps(self) -> list[tuple[int, int]]:
        gaps: list[tuple[int, int]] = []
        block = self._own_blocks
        for leg in self.legs:
            if leg.hop.start > block:
                gaps.append((block, leg.hop.start))
            block = leg.hop.end
        return [*gaps, (block, self._last_block)] if block < self._last_block else gaps

    def _fill_gaps(self, now: float) -> None:
        if self._nodes is None:
            self._look(now)
            return
        nodes, self._nodes = self._nodes, None
        avoid = self._going(now)
        kept: list[LegState] = []
        if not self._computed and not any(leg.is_open for leg in self.legs):
            kept, self.legs = self.legs, []  # nothing is lost if another class of numerics is better now
        try:
            chosen = [hop for start, end in self._gaps() for hop in self._choose_hops(nodes, start, end, avoid, now)]
        except (MissingBlocks, SessionFailed) as error:
            self.legs += kept
            self._no_chain(error, now)
            return
        self._wants_fresh = False
        if not self.legs:
            self.numerics = chosen[0].node.numerics
            if len(kinds := dict.fromkeys(str(hop.node.numerics) for hop in chosen)) > 1:
                self.reports.append(f"blocks are computed with different numerics: {', '.join(kinds)}")
        chosen_already = {place(leg.hop): leg for leg in kept}
        for hop in chosen:
            if (leg := chosen_already.pop(place(hop), None)) is not None:
                self.legs.append(leg)
            else:
                self._add(hop, self.legs, now)
        self._actions.extend(Close(leg=leg.key) for leg in chosen_already.values())
        if any(leg not in self.legs for leg in self._spares_for):
            self._drop_spares()
        self.legs.sort(key=lambda leg: leg.hop.start)

    def _going(self, now: float) -> dict[PeerId, str]:
        """Nodes of the chain that may be gone soon, or already."""
        going = {leg.peer_id: "is about to leave" for leg in self.legs if leg.leaving}
        return going | {leg.peer_id: "has not been heard of lately" for leg in self.legs if leg.is_missed(now)}

    def _failed(self, now: float, *, rested_s: float = NEVER) -> dict[PeerId, str]:
        """Nodes that have failed so lately, or may not be tried again yet; all that have by default."""
        return {
            peer: each.reason
            for peer, each in self.failed_peers.items()
            if each.again_at > now or now - each.at < rested_s
        }

    def _choose_hops(
        self, nodes: list[NodeAnnouncement], start: int, end: int, avoid: Mapping[PeerId, str], now: float
    ) -> list[Hop]:
        """Hops over these blocks without the nodes that failed. While there are none, those are tried again, less and
        less often: they may have ended the session because it was idle, or come back.
        """
        out_of_patience = self._out_of_patience(now)
        try:
            hops = self._choose_class(nodes, start, end, {**avoid, **self._failed(now)})
        except MissingBlocks:
            if out_of_patience:
                raise
            if not self._wants_fresh:  # else perhaps somebody else has come since
                return self._choose_class(nodes, start, end, {**avoid, **self._failed(now, rested_s=RESTED_S)})
            return self._choose_class(nodes, start, end, self._failed(now, rested_s=0.0))
        if out_of_patience:
            last = next(reversed(self.failed_peers.values())).reason
            raise SessionFailed(
                f"nodes failed one after another for {self._patience_with_nodes_s:g} s, the last one for: {last}; the "
                f"swarm may be overloaded: try again later"
            )
        return hops

    def _choose_class(
        self, nodes: list[NodeAnnouncement], start: int, end: int, avoid: Mapping[PeerId, str], *, says: bool = True
    ) -> list[Hop]:
        """Hops of the session's class of numerics; of another only if the caller allows it, who hears of it."""
        before = next((leg.hop.node for leg in self.legs if leg.hop.end == start), None)
        after = next((leg.hop.node for leg in self.legs if leg.hop.start == end), None)
        keeps_to = self.numerics if self._computed or self.legs else None
        gap = Gap(nodes=nodes, start=start, end=end, avoid=avoid, numerics=keeps_to, before=before, after=after)
        try:
            return self._choose(gap)
        except MissingBlocks:
            if keeps_to is None or not self.mixed:
                raise
        hops = self._choose(replace(gap, numerics=None))
        if says:
            self.reports.append(
                f"blocks {start}:{end} are computed in {hops[0].node.numerics} from here on, not in {keeps_to}: no "
                f"other nodes are left"
            )
        return hops

    def _no_chain(self, error: ClientError | NetError, now: float) -> None:
        """There is no chain (any more): wait for one, at once an error where no node has failed."""
        if not self._wants_fresh:
            self._wants_fresh = True
            self._look(now)
            return
        waits = isinstance(error, MissingBlocks | UnknownModel | NetError) and bool(self.failed_peers)
        if not waits or self._out_of_patience(now):
            if self._wants_chain or self._wanted_from is not None:
                self.error = error
                self.stop()
            return
        if not self._told:
            self.reports.append(f"waiting for nodes: {error}")
            self._told = True
        self._look_at = now + LOOK_S

    @property
    def _patience_with_nodes_s(self) -> float:
        return WAIT_S if self._computed else OPENING_WAIT_S

    def _out_of_patience(self, now: float) -> bool:
        """Whether nodes have failed for too long in this request. Its first failure starts the clock."""
        if not self.failed_peers:
            return False
        if self._gives_up_at is None:
            self._gives_up_at = now + self._patience_with_nodes_s
        return now >= self._gives_up_at

    def _drop(self, leg: LegState, now: float) -> None:
        self._give_up_runs()
        if leg in self._spares:
            self._drop_spares()
            return
        if leg in self._spares_for:  # its time has come
            if not self._for_gain or all(spare.is_open for spare in self._spares):
                self._take_spares()
                return
            self._drop_spares()
        self._actions.append(Close(leg=leg.key))
        self.legs.remove(leg)
        for each in self.legs:
            if each.linked_to == leg.key:
                each.linked_to = None

    def _is_replaceable(self, leg: LegState, now: float) -> bool:
        avoid = {**self._failed(now, rested_s=RESTED_S), **self._going(now), leg.peer_id: "slow"}
        try:
            self._choose_class(self._known, leg.hop.start, leg.hop.end, avoid, says=False)
        except MissingBlocks:
            return False
        return True
