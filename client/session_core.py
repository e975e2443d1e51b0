"""The decisions of a session: what is sent to whom, and what follows when somebody fails. No I/O, no tensors.

A session is a journal of tokens and a chain of legs, one for each node. The core knows how far each leg has come
(``tokens``: what it surely has; ``sent``: what is on its way to it), and makes those that lag behind catch up: a new
session, a step, a fail-over and a planned move are all the same to it. What a leg lacks comes from the journal (the
first leg), from the client's hands (a result that was answered here), from the leg before it, which keeps what it gave
(``resend``), or from there anew (``step`` again). Results are handed on from node to node where these are linked, and
by the client where they are not.

A *run* is one piece of the journal on its way through consecutive legs. Runs are numbered, numbers rise, and a node
drops what comes late: so a run that is given up can do no harm. Whenever somebody fails, all runs are given up, and
what they would have done is decided anew.

Drive it with events, and carry out what :meth:`SessionCore.advance` returns. Events stand here; what follows from them
stands in the layers below, each of which knows only those under it: ``client/core``: ``patience`` (who takes too long),
``moves`` (legs beside others), ``flow`` (links and pieces), ``chain`` (who serves what), ``state``, ``actions``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from client.core.actions import (
    Action,
    Ask,
    Better,
    Choose,
    Close,
    FindNodes,
    Gap,
    JournalView,
    Link,
    Open,
    Piece,
    Resend,
    Send,
)
from client.core.chain import LOOK_S
from client.core.flow import LINK_WAIT_S
from client.core.patience import Patience
from client.core.state import NEVER, SPARE_PATIENCE_S, LegState, Success
from client.errors import ClientError
from net.errors import NetError
from net.protocol.announcement import NodeAnnouncement

__all__ = [
    "Action",
    "Ask",
    "Better",
    "Choose",
    "Close",
    "FindNodes",
    "Gap",
    "JournalView",
    "LegState",
    "Link",
    "Open",
    "Piece",
    "Resend",
    "Send",
    "SessionCore",
    "Success",
]


MAX_PUT_OFF: Final = 5  # times in a row
MAX_RETRY_AFTER_S: Final = 10.0
PRAISE_EVERY: Final = 8  # runs: whose nodes have done well
FROM_BEFORE: Final = frozenset({"bad-shape", "bad-dtype", "not-finite", "bad-input", "bad-value", "too-long"})


class SessionCore(Patience):
    """See the module. Times are seconds on any clock that does not go back."""

    # What is asked for

    def want_chain(self) -> None:
        """Have a chain; :attr:`ready` says when it is there."""
        self._begin()
        self._wants_chain = True

    def want(self, position: int) -> None:
        """Have the results of the journal's tokens from ``position`` on; :meth:`has` says when they are there.

        Where results are wanted already, these are wanted, too.
        """
        if self._wanted_from is None:
            self._begin()
            self._wanted_from = position
            self.outputs.clear()

    def took(self, position: int) -> None:
        """The results before ``position`` are not needed any more."""
        for start, (end, _) in list(self.outputs.items()):
            if end <= position:
                del self.outputs[start]
        if self._wanted_from is not None:
            self._wanted_from = max(self._wanted_from, position)
            if position >= self._journal.end:
                self._wanted_from = None

    def has(self, position: int, end: int) -> bool:
        """Whether the results of tokens ``[position, end)`` are in :attr:`outputs`."""
        return self._missing_from(position) >= end

    def cut(self, position: int) -> None:
        """The journal goes only up to ``position`` now."""
        if self._runs:
            self._give_up_runs()
        for leg in (*self.legs, *self._spares):
            leg.tokens, leg.sent = min(leg.tokens, position), min(leg.sent, position)
        self._passing.clear()
        for start, (end, payload) in list(self.outputs.items()):
            if start >= position:
                del self.outputs[start]
            else:
                self.outputs[start] = min(end, position), payload
        if self._wanted_from is not None:
            self._wanted_from = min(self._wanted_from, position)

    def reordered(self) -> None:
        """Rows of the journal have changed places."""
        self._give_up_runs()
        self._passing.clear()

    def close(self) -> list[Action]:
        """Let everything go."""
        self._actions.extend(Close(leg=leg.key) for leg in (*self.legs, *self._spares))
        self.legs, self._spares, self._spares_for = [], [], []
        self.stop()
        return self._take_actions()

    @property
    def busy(self) -> bool:
        """Whether something is on its way."""
        return bool(self._runs)

    def _begin(self) -> None:
        self.error = None
        self._gives_up_at, self._told = None, False
        self._look_at = 0.0

    # What happens

    def nodes_found(self, nodes: Sequence[NodeAnnouncement], now: float) -> None:
        """Who serves the model."""
        self._looking = False
        self._nodes = self._known = list(nodes)
        self._found_at = now
        self._last_block = nodes[0].blocks - self._own_blocks

    def nodes_missing(self, error: ClientError | NetError, now: float) -> None:
        """Nobody does, or nobody can be asked."""
        self._looking = False
        if self.ready:  # there is a chain, and what was looked for would have been a better one
            self._look_at = now + LOOK_S
            return
        self._no_chain(error, now)

    def opening(self, key: int, now: float) -> None:
        """A leg's session is not open yet, but its node is at it."""
        leg = self._find(key)
        if leg is not None:
            leg.since = now

    def opened(self, key: int, now: float) -> None:
        """A leg's session is open."""
        leg = self._find(key)
        if leg is not None:
            leg.is_open = True
            self._moved_at = now
            for run in self._runs.values():
                if leg in run.through:
                    run.asked_at = now

    def forbidden(self, key: int, error: ClientError) -> None:
        """A node does not open the session, and whoever asked for it is to blame."""
        leg = self._find(key)
        if leg is not None:
            self._drop(leg, 0.0)
            self.error = error
            self.stop()

    def expected(self, number: int, *, unpushed: bool) -> int | None:
        """Of how many tokens the results should come with an answer; ``None`` if the run has been given up."""
        run = self._runs.get(number)
        if run is None:
            return None
        return run.end - run.position if unpushed else run.keep

    def lost(self, key: int) -> None:
        """A leg's connection broke; its node is being looked for. ``interrupted`` or ``failed`` follows."""
        leg = self._find(key)
        if leg is not None:
            leg.lost = True
            self._look_at = 0.0

    def silent(self, key: int) -> None:
        """A leg's node has been asked to show that it is there, and has not yet. ``heard`` or ``lost`` follows."""
        leg = self._find(key)
        if leg is not None:
            leg.silent = True
            self._look_at = 0.0

    def heard(self, key: int, now: float) -> None:
        """It is there."""
        leg = self._find(key)
        if leg is not None and leg.silent:
            leg.silent = leg.has_no_spare = False
            self._keep(leg, now)

    def _keep(self, leg: LegState, now: float) -> None:
        """Do without another one in a leg's place, for it is there again."""
        if leg in self._spares_for and not self._for_gain and not leg.leaving:
            self._drop_spares()
            self._look_at = now + LOOK_S

    def interrupted(self, key: int, now: float) -> None:
        """A leg goes on over another stream; answers that were on their way are lost."""
        leg = self._find(key)
        if leg is None:
            return
        leg.lost = leg.silent = leg.has_no_spare = False
        # Whatever broke the way between it and us may have broken those between it and its neighbours, and they would
        # notice only when they do not hear of each other.
        leg.linked_to, leg.link_asked, leg.relink_at = None, None, now
        for each in self.legs:
            if each.linked_to == key:
                each.linked_to, each.relink_at = None, now
        self._keep(leg, now)
        if any(leg in run.through for run in self._runs.values()):
            self._give_up_runs()

    def leaving(self, key: int, now: float) -> None:
        """A leg's node will not serve for much longer."""
        leg = self._find(key)
        if leg is not None and not leg.leaving:
            leg.leaving = True
            self._look_at = 0.0

    def linked(self, key: int, following: int, now: float) -> None:
        """A leg's node can hand on to that of another leg."""
        leg, other = self._find(key), self._find(following)
        if leg is not None and leg.link_asked == following:
            leg.link_asked = None
            if other is not None and (leg.peer_id, other.peer_id) not in self._unlinked:
                leg.linked_to = following

    def not_linked(self, key: int, following: int, now: float) -> None:
        """It cannot."""
        leg = self._find(key)
        if leg is not None and following in (leg.link_asked, leg.linked_to):
            self._unlink(leg, now)

    def answered(self, key: int, number: int, payload: Any, now: float, *, unpushed: bool = False) -> None:
        """A leg has answered a run, with its result or without.

        Args:
            key: Which leg.
            number: Which run.
            payload: The result that came with it; ``None`` if none did.
            now: When.
            unpushed: Whether the result should have been handed on, and could not be.
        """
        run, leg = self._runs.get(number), self._find(key)
        if run is None or leg is None or leg not in run.through:
            return  # given up
        covered = run.legs[: run.legs.index(leg) + 1] if leg in run.legs else []
        is_last = leg is run.last
        if (not is_last and not unpushed) or (payload is None and (unpushed or run.keep)):
            self.failed(key, "answered a step without its result", now)
            return
        del self._runs[number]
        self._moved_at = now
        self._spare_patience_s = SPARE_PATIENCE_S
        for each in covered:
            each.tokens = max(each.tokens, run.end)
            each.put_off = each.resets = 0
            if self.failed_peers.pop(each.peer_id, None) is not None or run.number % PRAISE_EVERY == 0:
                seconds = now - run.asked_at if run.is_alone and run.is_lone_step else None
                blocks = each.hop.end - each.hop.start
                self.successes.append(Success(leg=each.key, peer_id=each.peer_id, blocks=blocks, seconds=seconds))
        if is_last and run.source is None and run.end - run.position == 1 and leg is self.legs[-1]:
            self._note_seconds(now - run.asked_at)
        if not is_last:  # those behind it lack this piece, and all that comes after
            self._unlink(leg, now)
            self._give_up_runs()
        if payload is not None:
            self._place_result(run, leg, payload, run.position if unpushed else run.end - run.keep)
        if self._probe is not None and self._probe.run is run:
            self._probe = None

    def refused(
        self, key: int, number: int, code: str, why: str, now: float, *, retry_after_s: float | None = None
    ) -> None:
        """A leg has refused a run."""
        run, leg = self._runs.get(number), self._find(key)
        if leg is None:
            return
        if code == "no-session":
            self.failed(key, why, now, blame=False)
            return
        if run is None or leg not in run.through:
            return  # given up
        pushed = leg is not run.asked
        self._give_up_runs()
        if code == "no-history":
            leg.keeps = False
        elif retry_after_s is not None:
            leg.put_off += 1
            if leg.put_off > MAX_PUT_OFF:
                self.failed(key, f"put off {leg.put_off} times in a row: {why}", now)
            leg.hold_until = now + min(retry_after_s, MAX_RETRY_AFTER_S)
        elif code == "bad-position" and leg.resets < 2:
            leg.resets += 1
            leg.tokens = leg.sent = 0
        elif pushed and code in FROM_BEFORE:
            # One of the two lies or is broken. The next time we hold in our hands what goes from one to the other.
            before = run.through[run.through.index(leg) - 1]
            self._unlinked.add((before.peer_id, leg.peer_id))
            self._unlink(before, now)
            self.failed(key, f"{code}: {why}", now, blame=False)
        else:
            self.failed(key, f"{code}: {why}", now)

    def placed(self, key: int, number: int, state: str, now: float) -> None:
        """A leg's node says where a run is: ``unseen``, ``waiting``, ``running``, ``done``."""
        probe = self._probe
        if probe is not None and probe.run.number == number:
            probe.states[key] = state

    # What follows

    def advance(self, now: float) -> list[Action]:
        """What is to be done now. Call it after every event, and at :meth:`wakes_at`."""
        if self.error is None and (self._wants_chain or self._wanted_from is not None):
            self._look_after(now)
            self._hurry(now)
            if self._gaps() or not self.legs:
                self._fill_gaps(now)
        if self.ready:
            self._wants_chain = False
            self._move(now)
            self._improve(now)
        if self.ready:
            self._link(now)
            if self._wanted_from is not None and self.error is None:
                self._flow(now)
        return self._take_actions()

    def wakes_at(self, now: float) -> float:
        """When :meth:`advance` has something to do even if nothing happens; infinity for never."""
        times = [leg.hold_until for leg in self.legs if leg.hold_until > now]
        links = (leg.link_asked_at + LINK_WAIT_S for leg in self.legs if leg.link_asked is not None)
        times.extend(time for time in links if time > now)
        if not self._looking and self._look_at > now:
            times.append(self._look_at)
        times.extend(time for time in self._opening_deadlines() if time > now)
        if self._probe is not None:
            times.append(self._probe.until)
        elif self._runs and not self._waits_for_legs():
            times.append(self._moved_at + self._patience_s)
        return max(now, min(times)) if times else NEVER

    def _take_actions(self) -> list[Action]:
        self._forget_passed()
        actions, self._actions = self._actions, []
        return actions
