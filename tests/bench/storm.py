"""A storm of faults over relays and nodes: what happens to whom, and what it did to those who waited. No I/O.

A fault begins when the driver (``faults.py``) does its harm, and its effect ends when the member is good again: healed,
or restarted and announced. It is only ever done to a good member, and only if every block is still served by another
good node, and another relay is good: what nobody can survive is not asked for. A gap is the time from one token of a
generation to the next, from its beginning to its first token, or from its last token to its error.

A pause is a gap of more than ``PAUSE_S`` that overlaps the effect of at least one fault.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

PAUSE_S = 0.25
# The share of each kind, and the least and most seconds that it lasts; for those that end the process, until it is
# started again, which itself takes longer.
NODE_FAULTS = {
    "kill": (0.16, 0.0, 2.0),
    "leave": (0.08, 0.0, 1.0),
    "stop": (0.28, 1.0, 6.0),
    "slow": (0.20, 3.0, 8.0),
    "cut": (0.28, 2.0, 8.0),
}
RELAY_FAULTS = {"kill": (0.3, 0.0, 2.0), "stop": (0.3, 1.0, 6.0), "cut": (0.4, 2.0, 8.0)}
RELAY_SHARE = 0.08  # of faults


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Between two instants of one generation."""

    began_s: float
    ended_s: float
    after: int  # how many tokens it had

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s


@dataclass(kw_only=True, eq=False)
class Fault:
    """What was done to whom.

    Attributes:
        lasts_s: as drawn; the effect may take longer.
        began_s, ended_s: of the effect; None while it is not over.
    """

    kind: str
    member: str
    lasts_s: float
    began_s: float
    ended_s: float | None = None

    def overlaps(self, gap: Gap) -> bool:
        return self.began_s < gap.ended_s and (self.ended_s is None or gap.began_s < self.ended_s)


@dataclass(kw_only=True, eq=False)
class Member:
    """A relay (without a span) or a node, and whether it is good."""

    name: str
    span: tuple[int, int] | None
    is_good: bool = True


@dataclass(kw_only=True)
class Storm:
    """What comes next, from a seed, and what has been. Instants are all of one clock, that of the gaps."""

    members: Sequence[Member]
    blocks: int
    random: random.Random
    faults: list[Fault] = field(default_factory=list)

    def strike(self, now: float) -> Fault | None:
        """The next fault; its member is not good any more. None if no member can be spared now."""
        nodes, relays = self._spare(self._nodes), self._spare(self._relays)
        wants_relay = self.random.random() < RELAY_SHARE
        chosen = (relays or nodes) if wants_relay else (nodes or relays)
        if not chosen:
            return None
        member = self.random.choice(chosen)
        kinds = RELAY_FAULTS if member.span is None else NODE_FAULTS
        [kind] = self.random.choices(list(kinds), [share for share, _, _ in kinds.values()])
        lasts_s = self.random.uniform(*kinds[kind][1:])
        member.is_good = False
        fault = Fault(kind=kind, member=member.name, lasts_s=lasts_s, began_s=now)
        self.faults.append(fault)
        return fault

    def heal(self, fault: Fault, now: float) -> None:
        """The effect of a fault is over."""
        fault.ended_s = now
        next(member for member in self.members if member.name == fault.member).is_good = True

    @property
    def _nodes(self) -> list[Member]:
        return [member for member in self.members if member.span is not None]

    @property
    def _relays(self) -> list[Member]:
        return [member for member in self.members if member.span is None]

    def _spare(self, members: Sequence[Member]) -> list[Member]:
        """Those without which what they do is still done."""
        good = [member for member in members if member.is_good]
        return [one for one in good if self._suffice([other for other in good if other is not one])]

    def _suffice(self, members: Sequence[Member]) -> bool:
        if any(member.span is None for member in members):
            return True
        spans = [member.span for member in members if member.span is not None]
        return all(any(start <= block < end for start, end in spans) for block in range(self.blocks))


def pauses(gaps: Sequence[Gap], faults: Sequence[Fault]) -> list[Gap]:
    """See the module."""
    return [gap for gap in gaps if gap.seconds > PAUSE_S and any(fault.overlaps(gap) for fault in faults)]


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that so many percent of all do not exceed; 0 if there are none."""
    ordered = sorted(values)
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1] if ordered else 0.0


def unequal(expected: Sequence[int], found: Sequence[int], *, is_whole: bool) -> int:
    """How many tokens are wrong: at each place, and, of a generation that ended well, those missing or too many."""
    wrong = sum(one != other for one, other in zip(expected, found, strict=False))
    return wrong + (abs(len(expected) - len(found)) if is_whole else max(0, len(found) - len(expected)))
