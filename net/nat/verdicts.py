"""Which of our addresses can be reached from outside, out of what servers found. No I/O.

That a server reached us is proven by the nonce that it brought; that one did not is only its word. The word of a server
counts once per address, and the latest; the majority decides. One server is enough where there is no other.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from net.addresses import Multiaddr

# The specification suggests more than three servers; go-libp2p asks until three agree. Swarms may have one or two.
WANTED = 3
REACHABLE_S = 3600.0  # before what is certain is checked again, as go-libp2p does
UNSURE_S = 30.0  # before the next attempt while too few have answered, or they disagree; doubled each time
UNREACHABLE_S = 300.0  # doubled each time, up to an hour
MAX_PAUSE_S = 3600.0
MAX_ADDRESSES = 16
MAX_SERVERS = 16  # of each address


class Verdict(enum.Enum):
    REACHABLE = "reachable"
    UNREACHABLE = "unreachable"
    UNKNOWN = "unknown"


@dataclass(kw_only=True, eq=False)
class _Checks:
    by: OrderedDict[str, bool] = field(default_factory=OrderedDict)  # server's network: whether it reached us
    due: float = -math.inf
    rounds: int = 0  # that did not settle it


class Verdicts:
    """What is known of each address that is worth checking."""

    def __init__(self) -> None:
        self._checks: dict[Multiaddr, _Checks] = {}

    def watch(self, addresses: Iterable[Multiaddr]) -> None:
        """These are ours now, the most important first; what is known of others is forgotten."""
        wanted = list(dict.fromkeys(addresses))[:MAX_ADDRESSES]
        self._checks = {address: self._checks.get(address) or _Checks() for address in wanted}

    def forget(self, addresses: Iterable[Multiaddr] | None = None) -> None:
        """Something has changed about these, or about all: they are to be checked anew."""
        for address in list(self._checks) if addresses is None else addresses:
            if address in self._checks:
                self._checks[address] = _Checks()

    @property
    def addresses(self) -> list[Multiaddr]:
        return list(self._checks)

    def of(self, address: Multiaddr) -> Verdict:
        checks = self._checks.get(address)
        yes = 0 if checks is None else sum(checks.by.values())
        no = 0 if checks is None else len(checks.by) - yes
        if yes == no:
            return Verdict.UNKNOWN
        return Verdict.REACHABLE if yes > no else Verdict.UNREACHABLE

    def due(self, now: float) -> list[Multiaddr]:
        """The addresses to check now, the most important first."""
        return [address for address, checks in self._checks.items() if checks.due <= now]

    def next_due(self) -> float:
        return min((checks.due for checks in self._checks.values()), default=math.inf)

    def hasten(self, server: str, now: float) -> None:
        """A server of this network can be asked: what is not settled, and lacks its word, is due now."""
        for address, checks in self._checks.items():
            if self.of(address) is not Verdict.REACHABLE and len(checks.by) < WANTED and server not in checks.by:
                checks.due = min(checks.due, now)

    def asked(self, address: Multiaddr) -> set[str]:
        """The networks of those whose word on it we have."""
        return set(self._checks[address].by) if address in self._checks else set()

    def told(self, address: Multiaddr, server: str, reached: bool, *, since: object = None) -> None:
        """A server of this network (``addresses.ip_group``) tried it.

        Args:
            since: what ``begin`` gave before it did; what is older than a ``forget`` does not count.
        """
        checks = self._checks.get(address)
        if checks is None or since not in (None, checks):
            return
        checks.by[server] = reached
        checks.by.move_to_end(server)
        while len(checks.by) > MAX_SERVERS:
            checks.by.popitem(last=False)

    def begin(self, address: Multiaddr) -> object:
        """A round of questions begins; ``told`` and ``round_over`` want this."""
        return self._checks.get(address)

    def round_over(self, address: Multiaddr, now: float, *, alone: bool, since: object = None) -> None:
        """Everybody who could be asked was: decide when to ask again.

        Args:
            address: which was checked.
            now: the time.
            alone: nobody is left who could be asked and has not been, so that few words must do.
            since: as for ``told``.
        """
        checks = self._checks.get(address)
        if checks is None or since not in (None, checks):
            return
        verdict = self.of(address)
        settled = verdict is not Verdict.UNKNOWN and (alone or len(checks.by) >= WANTED)
        if verdict is Verdict.REACHABLE and settled:
            checks.rounds = 0
            checks.due = now + REACHABLE_S
            return
        first = UNREACHABLE_S if settled else UNSURE_S
        checks.due = now + min(MAX_PAUSE_S, first * 2 ** min(checks.rounds, 10))
        checks.rounds += 1
