"""Links from node to node, and pieces of the journal on their way through them."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

from client.core.actions import Link, Resend, Send
from client.core.chain import Chain
from client.core.state import LegState, Run
from net.protocol.announcement import NodeAnnouncement
from net.protocol.session import MAX_AHEAD

MAX_RUNS: Final = MAX_AHEAD - 2
BULK_TOKENS: Final = 128  # pieces of so many wait for links, not to go back and forth through the client's own line
LINK_WAIT_S: Final = 1.5


class Flow(Chain):
    """What is sent to whom."""

    @property
    def done(self) -> bool:
        """Whether all results that were asked for are there."""
        return self._wanted_from is not None and self._missing_from(self._wanted_from) >= self._journal.end

    def _link(self, now: float) -> None:
        if not self._push:
            return
        for leg, following in zip(self.legs, self.legs[1:], strict=False):
            if leg.linked_to is not None and leg.linked_to != following.key:
                leg.linked_to = None
            wanted = leg.linked_to is None and leg.link_asked != following.key
            wanted = wanted and (leg.unlinked_from != following.key or now >= leg.relink_at)
            if wanted and (leg.peer_id, following.peer_id) not in self._unlinked:
                leg.link_asked, leg.link_asked_at = following.key, now
                self._actions.append(Link(leg=leg.key, following=following.key))
                if not self._computed and _know_each_other(leg.hop.node, following.hop.node):
                    leg.linked_to = following.key  # the first steps need not wait for their saying so; later ones may

    def _flow(self, now: float) -> None:
        """Make every leg that lags behind go on."""
        again = True
        while again:
            again = False
            for index, leg in enumerate(self.legs):
                while leg.sent < self._journal.end and len(self._runs) < MAX_RUNS:
                    outcome = self._start(index, now)
                    again |= outcome is None
                    if not outcome:
                        break

        self._fetch_lost(now)

    def _fetch_lost(self, now: float) -> None:
        """Have results again that the last leg gave when they were not wanted here, or that were lost on the way."""
        last = self.legs[-1]
        if self._runs or self.done or self._wanted_from is None or last.tokens < self._journal.end:
            return
        position = self._missing_from(self._wanted_from)
        if last.keeps:
            self._fetch(last, position, self._journal.end, now)
        else:
            last.tokens = last.sent = position
            self._flow(now)

    def _start(self, index: int, now: float) -> bool | None:
        """Start a run at a leg; ``False`` if it has to wait, ``None`` if a leg before it has to go back first."""
        leg = self.legs[index]
        with_order = leg.version != self._journal.version
        if with_order and not self._may_reorder(leg):
            if self._in_flight(leg):
                return False
            leg.tokens = leg.sent = 0
            leg.version, leg.keeps, with_order = self._journal.version, True, False
        position = leg.sent
        source: LegState | None = None
        payload: Any = None
        if index == 0:
            end = self._journal.next_end(position)
        elif (leg.hop.start, position) in self._passing:
            end, payload = self._passing[leg.hop.start, position]
        else:
            before = self.legs[index - 1]
            if before.tokens <= position or before.version != self._journal.version:
                return False  # it will come
            if not before.keeps:
                if self._in_flight(before):
                    return False
                before.tokens = before.sent = 0
                before.keeps = True
                return None
            source, end = before, min(self._journal.next_end(position), before.tokens)
        if with_order and end != self._journal.end:
            return False
        waits_for_link = leg.link_asked is not None and leg.linked_to is None and now < leg.link_asked_at + LINK_WAIT_S
        if waits_for_link and end - position >= BULK_TOKENS:
            return False
        return self._begin_run(index, position, end, source, payload, now, with_order=with_order)

    def _begin_run(
        self,
        index: int,
        position: int,
        end: int,
        source: LegState | None,
        payload: Any,
        now: float,
        *,
        with_order: bool,
    ) -> bool:
        """Send a piece through a leg and those that it hands on to."""
        leg = self.legs[index]
        by_push = source is not None and source.linked_to == leg.key and not self.direct
        if source is not None and not by_push:
            return self._fetch(source, position, end, now)
        if not self._may_enter(leg, by_push=by_push, now=now):
            return False
        legs = [leg]
        for following in self.legs[index + 1 :]:
            alike = (following.version != self._journal.version) == with_order and (
                not with_order or self._may_reorder(following)
            )
            if (
                self.direct
                or legs[-1].linked_to != following.key
                or following.sent != position
                or not alike
                or not self._may_enter(following, by_push=True, now=now)
            ):
                break
            legs.append(following)
        keep = self._wanted(index + len(legs), position, end)
        number = self._new_run(position, end, legs, source, now, keep=keep)
        for each in legs:
            each.sent = end
            if with_order:
                each.version, each.keeps, each.tokens = self._journal.version, False, 0
        begin = partial(Send, payload=payload) if source is None else Resend
        self._actions.append(
            begin(
                leg=(source or leg).key,
                run=number,
                position=position,
                end=end,
                push=len(legs) - (source is None),
                keep=keep,
                with_order=with_order,
            )
        )
        return True

    def _wanted(self, index: int, position: int, end: int) -> int:
        """Of how many tokens, at the end, the hidden states before leg ``index`` are wanted here."""
        if index < len(self.legs):
            return end - position if self.legs[index].sent == position else 0
        if self._wanted_from is None or self._missing_from(max(position, self._wanted_from)) >= end:
            return 0
        return max(0, end - max(position, self._wanted_from))

    def _fetch(self, source: LegState, position: int, end: int, now: float) -> bool:
        """Have in our hands what a leg gave once."""
        if any(run.source is source and not run.legs and run.position == position for run in self._runs.values()):
            return False
        number = self._new_run(position, end, [], source, now, keep=end - position)
        self._actions.append(
            Resend(leg=source.key, run=number, position=position, end=end, push=0, keep=end - position)
        )
        return True

    def _may_reorder(self, leg: LegState) -> bool:
        """Whether all that a leg lacks is the newest step, for which rows change places."""
        at = self._journal.reordered_at
        return leg.version == self._journal.version - 1 and leg.tokens == leg.sent == at

    def _may_enter(self, leg: LegState, *, by_push: bool, now: float) -> bool:
        """Whether a run may come this way: not past another one that comes another way."""
        if leg.hold_until > now:
            return False
        return all(by_push == (run.legs[0] is not leg or run.source is not None) for run in self._in_flight(leg))

    def _place_result(self, run: Run, leg: LegState, payload: Any, position: int) -> None:
        """Keep what was answered until it is fetched, or those that it is for have it."""
        if leg.hop.end == self._last_block:
            self.outputs[position] = run.end, payload
        elif position == run.position:
            self._passing[leg.hop.end, position] = run.end, payload

    def _forget_passed(self) -> None:
        legs = (*self.legs, *self._spares)
        for (block, position), (end, _) in list(self._passing.items()):
            waiting = [leg for leg in legs if leg.hop.start == block and leg.tokens < end]
            if not waiting and block not in {start for start, _ in self._gaps()}:
                del self._passing[block, position]


def _know_each_other(one: NodeAnnouncement, other: NodeAnnouncement) -> bool:
    """Whether one of two nodes has said how long the way to the other takes: it has gone it."""
    return other.peer_id in one.round_trips or one.peer_id in other.round_trips
