"""The best path between two nodes where things are less simple than one NAT at each end.

UDP dropped on its way out; two levels of NAT; two hosts behind one NAT; IPv6 behind firewalls, alone or beside IPv4
that cannot be punched. For each there is a best path, and that is claimed of every attempt: direct, over what, or
relayed where nothing else can be had (``nat.can_punch``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import cached_property

import trio

from interop.lab import nat
from interop.lab.machine import Machine
from interop.lab.meetings import RTT_MS, Introduction, announced, by_relay, known, meet, serve
from interop.lab.network import Host, Internet, internet
from interop.lab.nodes import Node, Reached, node
from interop.lab.probes import Finding
from net import addresses
from net.nat import endpoints
from tests.bench.report import Figure, figure

RUNS = 3
AT_ONCE = 4
BOTH = "tcp+quic"
BOTH6 = "tcp6+quic6"
ALL = f"{BOTH}+{BOTH6}"
RELAYED = "relayed"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Two machines, and the best way from one to the other.

    Attributes:
        listens: what both nodes listen on; names in ``nodes.ADDRESSES``, joined by ``+``.
        relay_at: where both know the relay, in the same words.
        introduced: how the caller knows of the callee.
        best: words of ``way``, all of which are claimed.
    """

    name: str
    caller: Machine
    callee: Machine
    listens: str
    relay_at: str
    introduced: Introduction = announced
    best: str


Group = Callable[[Internet], list[Scenario]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All attempts at one scenario."""

    scenario: Scenario
    attempts: Sequence[Reached]

    @property
    def seconds(self) -> list[float]:
        """Until a direct connection, where there was one."""
        return [each.seconds for each in self.attempts if each.seconds is not None]

    @property
    def why(self) -> str | None:
        """One of the reasons that were given, if an attempt did not go well."""
        return next((f"{self.scenario.name}: {each.why}" for each in self.attempts if each.why is not None), None)

    @cached_property
    def finding(self) -> Finding:
        best = set(self.scenario.best.split())
        ways = [way(each) for each in self.attempts]
        found = ", ".join(f"{count} x {words}" for words, count in Counter(ways).items())
        mean_s = sum(self.seconds) / len(self.seconds) if self.seconds else None
        return Finding(
            name=self.scenario.name,
            expected=f"{len(ways)} x {self.scenario.best}",
            found=found if mean_s is None else f"{found}, {mean_s:.2f} s",
            passed=all(best <= set(words.split()) for words in ways),
            value=mean_s,
        )


def way(reached: Reached) -> str:
    """The path in words, such as ``direct private ipv4 tcp``."""
    if not reached.connected:
        return "nothing"
    if not reached.direct or reached.remote is None:
        return RELAYED
    endpoint = endpoints.read(addresses.parse(reached.remote))
    if endpoint is None:
        return f"direct {reached.remote}"
    private = "private " if endpoint.ip.is_private else ""
    return f"direct {private}ipv{endpoint.ip.version} {'quic' if endpoint.transport == 'udp' else 'tcp'}"


async def run(*, runs: int, groups: Sequence[Group] = ()) -> AsyncGenerator[Outcome, None]:
    """Scenarios as they end, each tried ``runs`` times: those that ``groups`` draw, or all."""
    for group in groups or (udp_blocked, two_levels, one_nat, ipv6):
        net = internet()
        relay_host = net.host("relay", rtt_ms=RTT_MS, ipv6=True)
        scenarios = group(net)
        async with net.up(), node(relay_host) as relay:
            await serve(relay, ALL)
            for first in range(0, len(scenarios), AT_ONCE):
                for outcome in await _at_once(scenarios[first : first + AT_ONCE], relay, runs):
                    yield outcome


async def _at_once(scenarios: Sequence[Scenario], relay: Node, runs: int) -> list[Outcome]:
    made: dict[str, Outcome] = {}

    async def attempt(scenario: Scenario) -> None:
        at = known(relay, scenario.relay_at)
        async with AsyncExitStack() as stack:
            caller = await stack.enter_async_context(node(scenario.caller))
            callee = await stack.enter_async_context(node(scenario.callee))
            attempts = [
                await meet(caller, callee, scenario.listens, at, introduced=scenario.introduced, in_dht=False)
                for _ in range(runs)
            ]
        made[scenario.name] = Outcome(scenario=scenario, attempts=attempts)

    async with trio.open_nursery() as nursery:
        for scenario in scenarios:
            nursery.start_soon(attempt, scenario)
    return [made[scenario.name] for scenario in scenarios]


def figures(outcomes: Sequence[Outcome]) -> list[Figure]:
    """Counts are of the attempts at each scenario; ``seconds`` are until the connection was direct."""
    found = []
    for outcome in outcomes:
        name, attempts = outcome.scenario.name.replace(" ", "-"), outcome.attempts
        unit, most = f"of {len(attempts)}", len(attempts)
        connected = float(sum(each.connected for each in attempts))
        direct = float(sum(each.direct for each in attempts))
        goal = None if outcome.scenario.best == RELAYED else most
        found.append(figure(f"{name}-connected", [connected], unit, better="higher", goal=most))
        found.append(figure(f"{name}-direct", [direct], unit, better="higher", goal=goal))
        if outcome.seconds:
            found.append(figure(f"{name}-seconds", outcome.seconds, "s", better="lower"))
    return found


# The scenarios


def udp_blocked(net: Internet) -> list[Scenario]:
    """Nodes that listen on TCP and QUIC; what the relay is known by first must not decide."""
    office = net.home("office", udp=False, rtt_ms=RTT_MS).host()
    plain = net.home("plain", rtt_ms=RTT_MS).host()
    public = net.host("public", rtt_ms=RTT_MS)
    found = [
        Scenario(
            name=f"udp blocked to public, relay by {relay_at}",
            caller=office,
            callee=public,
            listens=BOTH,
            relay_at=relay_at,
            best="direct ipv4 tcp",
        )
        for relay_at in ("tcp", "quic+tcp")
    ]
    for relay_at in ("tcp", "quic+tcp"):
        for caller, callee, name in (
            (office, plain, "udp blocked to port-restricted"),
            (plain, office, "port-restricted to udp blocked"),
        ):
            found.append(
                Scenario(
                    name=f"{name}, relay by {relay_at}",
                    caller=caller,
                    callee=callee,
                    listens=BOTH,
                    relay_at=relay_at,
                    best="direct ipv4 tcp",
                )
            )
    return found


def two_levels(net: Internet) -> list[Scenario]:
    """A home's port-restricted router behind a carrier's; together as strict as the stricter one."""
    single = {
        kind: net.home(f"single-{kind}", nat=kind, rtt_ms=RTT_MS).host() for kind in ("full-cone", "port-restricted")
    }
    double: dict[str, tuple[Host, Host]] = {}
    for outer in ("port-restricted", "symmetric"):
        carriers = [net.home(f"carrier{number}-{outer}", nat=outer, rtt_ms=RTT_MS) for number in (1, 2)]
        one, other = (carrier.home(nat="port-restricted").host() for carrier in carriers)
        double[outer] = one, other
    found = []
    for outer, (one, other) in double.items():
        ours = nat.nested("port-restricted", outer)
        ends: list[tuple[str, Host, str]] = [(kind, host, kind) for kind, host in single.items()]
        ends.append(("the same", other, ours))
        for name, callee, theirs in ends:
            for transport in ("tcp", "quic"):
                found.append(
                    Scenario(
                        name=f"within {outer} to {name}, {transport}",
                        caller=one,
                        callee=callee,
                        listens=transport,
                        relay_at=transport,
                        best="direct ipv4" if nat.can_punch(ours, theirs) else RELAYED,
                    )
                )
    return found


def one_nat(net: Internet) -> list[Scenario]:
    """Neighbours, whose router does not lead back what they send to its outer side."""
    homes = {kind: net.home(kind, nat=kind, rtt_ms=RTT_MS) for kind in ("port-restricted", "symmetric")}
    hosts = {kind: (home.host(), home.host()) for kind, home in homes.items()}
    ways: list[tuple[str, Introduction]] = [("announced", announced), ("known by the relay", by_relay)]
    return [
        Scenario(
            name=f"one {kind} NAT, {way}, {listens}",
            caller=caller,
            callee=callee,
            listens=listens,
            relay_at=listens,
            introduced=introduced,
            best="direct private",
        )
        for way, introduced in ways
        for listens in ("tcp", "quic", BOTH)
        for kind, (caller, callee) in hosts.items()  # last: a relay takes but 8 connections from one address
    ]


def ipv6(net: Internet) -> list[Scenario]:
    """Firewalls that let nothing in, at both ends or at one; then beside IPv4 behind NATs that cannot be punched."""
    alone = [net.home(f"six{n}", nat=None, ipv6=True, rtt_ms=RTT_MS).host() for n in (1, 2)]
    dual = [net.home(f"dual{n}", nat="symmetric", ipv6=True, rtt_ms=RTT_MS).host() for n in (1, 2)]
    public = net.host("public6", ipv4=False, ipv6=True, rtt_ms=RTT_MS)
    found = []
    for listens in ("tcp6", "quic6", BOTH6):
        for name, callee in (("firewalled", alone[1]), ("public", public)):
            found.append(
                Scenario(
                    name=f"ipv6 firewalled to {name}, {listens}",
                    caller=alone[0],
                    callee=callee,
                    listens=listens,
                    relay_at=listens,
                    best="direct ipv6",
                )
            )
    for listens, relay_at in (("tcp+tcp6", "tcp"), ("quic+quic6", "quic"), (ALL, "tcp"), (ALL, ALL)):
        found.append(
            Scenario(
                name=f"ipv6 beside symmetric, {_named(listens)}, relay by {_named(relay_at)}",
                caller=dual[0],
                callee=dual[1],
                listens=listens,
                relay_at=relay_at,
                best="direct ipv6",
            )
        )
    return found


def _named(transports: str) -> str:
    return "all" if transports == ALL else transports
