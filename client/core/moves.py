"""Legs that are opened and fed beside others: for those that are missed or about to leave, and for better ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from client.core.actions import Send
from client.core.chain import LOOK_S, RESTED_S
from client.core.flow import Flow
from client.core.state import LegState, place
from client.errors import MissingBlocks
from client.routing import Hop

CURRENT_S: Final = 5.0  # for which what was found may be compared with the chain in use
MAX_SETTLED: Final = 10  # times as seldom as at first is looked for better chains, once that many moves have been made
FEEDING: Final = 4  # pieces at a time that a new leg is given while the old one is missed; else one after another
SPARE_LAG: Final = 32  # tokens that a new leg may lack when it takes the old one's place


class Moves(Flow):
    """Other legs, prepared beside those in use."""

    def _move(self, now: float) -> None:
        """Have another leg for one that is lost, or whose node is about to leave, before it has gone for good."""
        old = self._spares_for
        missed = [leg for leg in self.legs if leg.is_missed(now) and not leg.has_no_spare]
        leaving = [leg for leg in self.legs if leg.leaving and not leg.has_no_spare]
        needier = [leg for leg in (missed or (leaving if self._for_gain else [])) if leg not in old]
        if old and needier and not any(leg in missed for leg in old):
            self._drop_spares()
            old = []
        if not old:
            if missed or leaving:
                self._find_spares((missed or leaving)[0], now)
            return
        if not all(spare.is_open for spare in self._spares):
            return
        is_urgent = any(leg in missed for leg in old)
        is_fed = all(spare.tokens + SPARE_LAG >= self._journal.end for spare in self._spares)
        was_opened = self._for_gain or any(leg.is_open for leg in old)
        if not was_opened or (is_fed and (is_urgent or not self._runs)):
            self._give_up_runs()
            self._gains += self._for_gain
            self._take_spares()
        else:
            self._feed_spares(now, FEEDING if is_urgent else 1)

    def _improve(self, now: float) -> None:
        """While the session is at work, look now and then whether other hops have become clearly better, and have them
        opened beside the old ones. With every move it looks less often, so that nodes that are as good as each other do
        not have it go back and forth.
        """
        if self._better is None or self._wanted_from is None or self._spares_for:
            return
        if self._better_at is None:
            self._wait_for_better(now)
        if self._better_at is None or now < self._better_at or self._going(now):
            return
        if self._nodes is None or now > self._found_at + CURRENT_S:
            self._look(now)
            return
        nodes, self._nodes = self._nodes, None
        self._wait_for_better(now)
        if any(leg.hop.node.numerics != self.numerics for leg in self.legs):
            return  # it would go back to where nobody was left
        found = self._better(nodes, [leg.hop for leg in self.legs], avoid=self._failed(now))
        if found is not None:
            self._prepare_for(found, now)

    def _wait_for_better(self, now: float) -> None:
        self._better_at = now + self._better_every_s() * min(1 + self._gains, MAX_SETTLED)

    def _prepare_for(self, found: Sequence[Hop], now: float) -> None:
        """Have those hops opened that differ from the chain in use."""
        old, new = [place(leg.hop) for leg in self.legs], [place(hop) for hop in found]
        alike = 0
        while alike < min(len(old), len(new)) and old[alike] == new[alike]:
            alike += 1
        behind = 0
        while behind < min(len(old), len(new)) - alike and old[-1 - behind] == new[-1 - behind]:
            behind += 1
        replaced = self.legs[alike : len(old) - behind]
        if replaced:
            self._spares_for, self._for_gain = replaced, True
            for hop in found[alike : len(new) - behind]:
                self._add(hop, self._spares, now)

    def _find_spares(self, going: LegState, now: float) -> None:
        if self._nodes is None:
            self._look(now)
            return
        nodes, self._nodes = self._nodes, None
        start, end = going.hop.start, going.hop.end
        avoid = {**self._going(now), going.peer_id: "goes"}
        try:
            hops = self._choose_class(nodes, start, end, {**avoid, **self._failed(now)})
        except MissingBlocks:
            try:
                hops = self._choose_class(nodes, start, end, {**avoid, **self._failed(now, rested_s=RESTED_S)})
            except MissingBlocks:
                self._wants_fresh = True
                self._look_at = now + 2 * LOOK_S
                return
        self._wants_fresh = False
        self._spares_for, self._for_gain = [going], False
        for hop in hops:
            self._add(hop, self._spares, now)

    def _feed_spares(self, now: float, most: int) -> None:
        """Bring new legs up to where the others are, beside what else is going on; with so many pieces at a time."""
        index = self.legs.index(self._spares_for[0])
        for number, spare in enumerate(self._spares):
            if spare.version != self._journal.version:
                spare.tokens = spare.sent = 0
                spare.version = self._journal.version
            while spare.sent < self._journal.end and len(self._in_flight(spare)) < most and spare.hold_until <= now:
                position = spare.sent
                payload: Any = None
                if (spare.hop.start, position) in self._passing:
                    end, payload = self._passing[spare.hop.start, position]
                elif number or index:
                    break
                else:
                    end = self._journal.next_end(position)
                keep = 0 if number + 1 == len(self._spares) else end - position
                run = self._new_run(position, end, [spare], None, now, keep=keep)
                spare.sent = end
                self._actions.append(
                    Send(leg=spare.key, run=run, position=position, end=end, push=0, keep=keep, payload=payload)
                )
            if index and not number and not self._fetch_for(spare, self.legs[index - 1], most, now):
                return

    def _fetch_for(self, spare: LegState, before: LegState, most: int, now: float) -> bool:
        """Have in our hands what a new leg is to be given next. False: that cannot be, and nothing is prepared."""
        position = spare.sent
        if (
            position < self._journal.end and not before.keeps
        ):  # nothing is better than to wait until the old one is gone
            for leg in self._spares_for:
                leg.has_no_spare = not self._for_gain
            self._drop_spares()
            return False
        if before.lost or before.version != self._journal.version:
            return True
        for _ in range(most):
            if position >= before.tokens:
                break
            kept = self._passing.get((spare.hop.start, position))
            end = min(self._journal.next_end(position), before.tokens) if kept is None else kept[0]
            if kept is None:
                self._fetch(before, position, end, now)
            position = end
        return True
