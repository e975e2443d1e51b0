"""Steps that take long, and nodes that take long to open the session."""

from __future__ import annotations

from typing import Final

from client.core.actions import Ask
from client.core.chain import LOOK_S
from client.core.moves import Moves
from client.core.state import LATE_S, MIN_PATIENCE_S, LegState, Probe, Run

PATIENCE_FACTOR: Final = 4.0
PROBE_S: Final = 1.5  # for an answer to that
LONGEST_STEP_S: Final = 60.0
MORE_PATIENCE: Final = 1.5
OPEN_PATIENCE_S: Final = 2.5  # with a node that does not open the session, where others could take its place


class Patience(Moves):
    """How long is waited for whom."""

    def _note_seconds(self, seconds: float) -> None:
        """How long a decoded step took; what is usual follows, and how long to be patient."""
        self._took.append(seconds)
        usual = sorted(self._took)[int(0.99 * (len(self._took) - 1))]
        self._patience_s = max(MIN_PATIENCE_S, PATIENCE_FACTOR * usual)

    def _waits_for_legs(self) -> bool:
        """Whether something is on its way to a leg that has yet to be reached, for which there are other deadlines."""
        return any(leg.lost or not leg.is_open for run in self._runs.values() for leg in run.through)

    def _look_after(self, now: float) -> None:
        """Find out where a step is that takes long, and do without its node if others can take its place."""
        probe = self._probe
        if not self._runs or self._waits_for_legs():
            self._probe = None
            return
        if probe is None:
            if now >= self._moved_at + self._patience_s:  # summed up as in ``wakes_at``, or rounding has us wake again
                run = self._runs[min(self._runs)]
                self._probe = Probe(run=run, until=now + PROBE_S)
                self._actions.extend(Ask(leg=leg.key, run=run.number) for leg in run.through)
            return
        run = probe.run
        silent = [leg for leg in run.through if leg.key not in probe.states]
        if silent and now < probe.until:
            return
        self._probe, self._moved_at = None, now  # if nothing comes of it, we ask again
        if silent:
            self.failed(silent[0].key, "does not say where a step is", now)
            return
        late = next((leg for leg in run.through if probe.states[leg.key] != "done"), None)
        if late is None:  # the answer has been lost
            self._give_up_runs()
        elif probe.states[late.key] == "unseen":
            self._not_arrived(run, late, now)
        elif now - run.asked_at >= LONGEST_STEP_S or (self._should_be_quick(run) and self._is_replaceable(late, now)):
            self.failed(late.key, f"takes more than {now - run.asked_at:.1f} s for a step", now)
        else:
            self._look(now)  # perhaps somebody has come who could take its place

    def _hurry(self, now: float) -> None:
        """Do without nodes that do not open the session, where others could."""
        for leg in list(self.legs):
            if not leg.is_open and now >= leg.since + OPEN_PATIENCE_S and self._is_replaceable(leg, now):
                self.failed(leg.key, f"has not opened the session in {now - leg.since:.1f} s", now)
        for spare in [] if self._for_gain else list(self._spares):
            is_late = not spare.is_open and now >= spare.since + self._spare_patience_s
            if not (is_late or spare.lost or spare.silent):
                continue
            if self._is_replaceable(spare, now):
                self._spare_patience_s *= MORE_PATIENCE
                self.failed(spare.key, f"has not shown that it is there in {now - spare.since:.1f} s", now, blame=False)
                return  # all of them have been dropped
            if not self._looking and now >= self._look_at:  # perhaps somebody has come who could
                self._look(now)
                self._look_at = now + LOOK_S

    def _not_arrived(self, run: Run, leg: LegState, now: float) -> None:
        """What was sent to a leg has been lost on the way."""
        if leg is run.asked:
            leg.resets += 1
            if leg.resets > 2:
                self.failed(leg.key, "does not get what it is sent", now)
        else:
            self._unlink(run.through[run.through.index(leg) - 1], now)
        self._give_up_runs()

    def _should_be_quick(self, run: Run) -> bool:
        return run.end - run.position == 1 and bool(self._took)

    def _opening_deadlines(self) -> list[float]:
        """When something follows from nodes' not having opened the session."""
        legs = [leg.since for leg in self.legs if not leg.is_open]
        spares = [spare.since + self._spare_patience_s for spare in self._spares if not spare.is_open]
        return [since + patience for since in legs for patience in (LATE_S, OPEN_PATIENCE_S)] + spares
