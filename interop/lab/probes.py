"""Every NAT is held to what it claims, with packets.

Mapping (RFC 4787, 4.1): one inner socket speaks to two ports of one host and to another host; do they see the same
outer endpoint? Filtering (section 5): the inner socket has spoken to one endpoint; who else can send to it? For TCP
the same with connections (RFC 5382). Punching: both learn their outer endpoints from a third host and then dial
each other's at the same moment.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import trio

from interop.lab import nat
from interop.lab.endpoints import Endpoint, Udp, dialled, listening, udp
from interop.lab.machine import Machine
from interop.lab.network import Home, Host, Internet, PublicHost, internet

RTT_MS = 10.0
HEAR_S = 0.4  # 20 round trips of this network
PUNCH_S = 1.5  # one SYN may be lost to bad timing and come again after a second
FIRST, SECOND = 3001, 3002
PROTOCOLS = ("udp", "tcp")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one probe saw. ``value`` is its figure, where it has one."""

    name: str
    expected: str
    found: str
    passed: bool
    value: float | None = None


def finding(name: str, expected: object, found: object) -> Finding:
    return Finding(name=name, expected=str(expected), found=str(found), passed=expected == found)


async def run() -> AsyncGenerator[Finding, None]:
    """All findings about NATs."""
    for group in (_kinds, _punching, _special, _changes):
        net = internet()
        for one in await group(net):
            yield one


async def _kinds(net: Internet) -> list[Finding]:
    """Mapping and filtering of each kind, for UDP and TCP; and that two hosts do not share a mapping."""
    observers = [net.host("observer1", rtt_ms=RTT_MS), net.host("observer2", rtt_ms=RTT_MS)]
    homes = {kind: net.home(kind, nat=kind, rtt_ms=RTT_MS) for kind in nat.KINDS}
    hosts = {kind: home.host() for kind, home in homes.items()}
    others = {kind: home.host() for kind, home in homes.items()}
    found = []
    async with net.up():
        for kind, behaviour in nat.KINDS.items():
            host = hosts[kind]
            mappings = (await udp_mapping(host, observers), await tcp_mapping(host, observers))
            filterings = (await udp_filtering(host, observers), await tcp_filtering(host, observers))
            for protocol, mapping, filtering in zip(PROTOCOLS, mappings, filterings, strict=True):
                found.append(finding(f"{kind} {protocol} mapping", behaviour.mapping, mapping))
                found.append(finding(f"{kind} {protocol} filtering", behaviour.filtering, filtering))
            shared = await shared_port(host, others[kind], observers)
            found.append(finding(f"{kind} two hosts, one port", f"apart, {behaviour.mapping}", shared))
    return found


async def udp_mapping(host: Machine, observers: Sequence[PublicHost], port: int = 5000) -> str:
    """In the words of RFC 4787."""
    async with (
        udp(host, port) as inner,
        udp(observers[0], FIRST) as one,
        udp(observers[0], SECOND) as two,
        udp(observers[1], FIRST) as three,
    ):
        return await _mapping(inner, [one, two, three])


async def _mapping(inner: Udp, outside: Sequence[Udp]) -> str:
    """``outside``: two sockets of one host, and one of another."""
    seen = []
    for observer, port in zip(outside, (FIRST, SECOND, FIRST), strict=True):
        await inner.send((observer.machine.address, port))
        seen.append(await observer.hear(HEAR_S))
    return _dependence(seen)


def _dependence(seen: Sequence[Endpoint | None]) -> str:
    first, other_port, other_host = seen
    if None in seen:
        return "blocked"
    if first == other_port == other_host:
        return nat.INDEPENDENT
    return nat.ADDRESS if first == other_port else nat.ADDRESS_AND_PORT


async def tcp_mapping(host: Machine, observers: Sequence[PublicHost], port: int = 5000) -> str:
    seen = []
    async with AsyncExitStack() as stack:
        for observer, there in ((observers[0], FIRST), (observers[0], SECOND), (observers[1], FIRST)):
            listener = await stack.enter_async_context(listening(observer, there))
            await stack.enter_async_context(dialled(host, (observer.address, there), port=port))
            seen.append(await listener.accept(HEAR_S))
    return _dependence(seen)


async def udp_filtering(host: Machine, observers: Sequence[PublicHost], port: int = 5001) -> str:
    async with (
        udp(host, port) as inner,
        udp(observers[0], FIRST) as contacted,
        udp(observers[0], SECOND) as same_host,
        udp(observers[1], FIRST) as stranger,
    ):
        await inner.send((observers[0].address, FIRST))
        outer = await contacted.hear(HEAR_S)
        if outer is None:
            return "blocked"
        for sender in (stranger, same_host, contacted):
            await sender.send(outer)
        heard = await inner.heard(HEAR_S)
    if (observers[0].address, FIRST) not in heard:
        return "no answer comes in"
    return _filtering((observers[0].address, SECOND) in heard, (observers[1].address, FIRST) in heard)


def _filtering(same_host: bool, stranger: bool) -> str:
    if stranger:
        return nat.INDEPENDENT if same_host else "strangers only"
    return nat.ADDRESS if same_host else nat.ADDRESS_AND_PORT


async def tcp_filtering(host: Machine, observers: Sequence[PublicHost], port: int = 5001) -> str:
    async with (
        listening(host, port),
        listening(observers[0], FIRST) as contacted,
        dialled(host, (observers[0].address, FIRST), port=port),
    ):
        outer = await contacted.accept(HEAR_S)
        if outer is None:
            return "blocked"
        async with (
            dialled(observers[1], outer, wait_s=HEAR_S) as stranger,
            dialled(observers[0], outer, wait_s=HEAR_S) as same_host,
        ):
            return _filtering(same_host is not None, stranger is not None)


async def shared_port(one: Machine, other: Machine, observers: Sequence[PublicHost], port: int = 5002) -> str:
    """Two hosts behind one NAT use the same port: are their outer endpoints apart, and how is the second mapped?"""
    async with (
        udp(one, port) as first,
        udp(other, port) as second,
        udp(observers[0], FIRST) as here,
        udp(observers[0], SECOND) as here_too,
        udp(observers[1], FIRST) as there,
    ):
        await first.send((observers[0].address, FIRST))
        taken = await here.hear(HEAR_S)
        await second.send((observers[0].address, FIRST))
        given = await here.hear(HEAR_S)
        mapping = await _mapping(second, [here, here_too, there])
    return f"{'apart' if taken != given else 'SHARED'}, {mapping}"


async def _punching(net: Internet) -> list[Finding]:
    """All 16 ordered pairs of kinds, for UDP and TCP: 13 can meet."""
    observer = net.host("observer", rtt_ms=RTT_MS)
    left = {kind: net.home(f"{kind}-left", nat=kind, rtt_ms=RTT_MS).host() for kind in nat.KINDS}
    right = {kind: net.home(f"{kind}-right", nat=kind, rtt_ms=RTT_MS).host() for kind in nat.KINDS}
    pairs = [(one, other) for one in nat.KINDS for other in nat.KINDS]
    met: dict[tuple[str, tuple[str, str]], str] = {}
    async with net.up(), trio.open_nursery() as nursery:
        for number, (one, other) in enumerate(pairs):
            for protocol, punch in PUNCHES.items():
                hosts = (left[one], right[other])
                nursery.start_soon(_keep, met, (protocol, (one, other)), punch, *hosts, observer, 6000 + number)
    return [
        finding(f"punching {protocol} {pair[0]} - {pair[1]}", _word(nat.can_punch(*pair)), met[protocol, pair])
        for protocol in PROTOCOLS
        for pair in pairs
    ]


Punch = Callable[[Machine, Machine, PublicHost, int], Awaitable[bool]]


async def _keep(
    met: dict[tuple[str, tuple[str, str]], str],
    key: tuple[str, tuple[str, str]],
    punch: Punch,
    one: Machine,
    other: Machine,
    observer: PublicHost,
    port: int,
) -> None:
    met[key] = _word(await punch(one, other, observer, port))


def _word(met: bool) -> str:
    return "direct" if met else "no way"


async def punch_udp(one: Machine, other: Machine, observer: PublicHost, port: int) -> bool:
    """Whether two hosts that send to each other's outer endpoint hear each other."""
    async with udp(observer, port) as rendezvous, udp(one, port) as left, udp(other, port) as right:
        outer = []
        for inner in (left, right):
            await inner.send((observer.address, port))
            outer.append(await rendezvous.hear(HEAR_S))
        if outer[0] is None or outer[1] is None:
            return False
        answered: list[bool] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_hail, left, outer[1], answered)
            nursery.start_soon(_hail, right, outer[0], answered)
        return len(answered) == 2


async def _hail(inner: Udp, peer: Endpoint, answered: list[bool]) -> None:
    """Call, and answer whoever calls where the call came from; until the peer's answer to ours has come."""
    with trio.move_on_after(PUNCH_S):
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                for _ in range(5):
                    await inner.send(peer, b"call")
                    await trio.sleep(0.1)

            nursery.start_soon(call)
            while True:
                data, source = await inner.receive()
                if data == b"answer":
                    break
                await inner.send(source, b"answer")
            answered.append(True)
            with trio.move_on_after(HEAR_S):  # the peer may still need our answer
                while True:
                    _, source = await inner.receive()
                    await inner.send(source, b"answer")
            nursery.cancel_scope.cancel()


async def punch_tcp(one: Machine, other: Machine, observer: PublicHost, port: int) -> bool:
    """Whether two hosts that dial each other's outer endpoint, from the port that they listen on, connect."""
    async with AsyncExitStack() as stack:
        rendezvous = await stack.enter_async_context(listening(observer, port))
        outer = []
        for machine in (one, other):
            await stack.enter_async_context(listening(machine, port))
            await stack.enter_async_context(dialled(machine, (observer.address, port), port=port))
            outer.append(await rendezvous.accept(HEAR_S))
        if outer[0] is None or outer[1] is None:
            return False
        return await _dial_both((one, outer[1]), (other, outer[0]), port)


async def _dial_both(
    first: tuple[Machine, Endpoint], second: tuple[Machine, Endpoint], port: int, *, ipv6: bool = False
) -> bool:
    """Whether one of two dials at the same moment succeeds."""
    met: list[bool] = []

    async def dial(machine: Machine, peer: Endpoint) -> None:
        async with dialled(machine, peer, port=port, wait_s=PUNCH_S, ipv6=ipv6) as connection:
            if connection is not None:
                met.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dial, *first)
        nursery.start_soon(dial, *second)
    return bool(met)


PUNCHES: dict[str, Punch] = {"udp": punch_udp, "tcp": punch_tcp}


async def _special(net: Internet) -> list[Finding]:
    """Hairpinning, UDP blocked, two levels of NAT, IPv6 behind a firewall."""
    observers = [net.host(f"observer{n}", rtt_ms=RTT_MS, ipv6=True) for n in (1, 2)]
    hairpins = {
        (kind, hairpin): _two_hosts(net, f"{kind}-{hairpin}", kind, hairpin == "with")
        for kind, behaviour in nat.KINDS.items()
        for hairpin in ("with", "without")
        if behaviour.mapping == nat.INDEPENDENT
    }
    office = net.home("office", udp=False, rtt_ms=RTT_MS).host()
    carrier = net.home("carrier", nat="full-cone", rtt_ms=RTT_MS)
    inner = carrier.home("inner", nat="port-restricted").host()
    plain = net.home("plain", rtt_ms=RTT_MS).host()
    six = [net.home(f"six{n}", nat=None, ipv6=True, rtt_ms=RTT_MS).host() for n in (1, 2)]
    async with net.up():
        found: list[Finding] = []
        met: dict[tuple[str, tuple[str, str]], str] = {}
        cases = [(protocol, case) for case in hairpins for protocol in PROTOCOLS]
        async with trio.open_nursery() as nursery:
            for port, (protocol, case) in enumerate(cases, 7000):
                nursery.start_soon(_keep, met, (protocol, case), PUNCHES[protocol], *hairpins[case], observers[0], port)
        for protocol, (kind, hairpin) in cases:
            name = f"{kind} {protocol} {hairpin} hairpin, same home"
            found.append(finding(name, _word(hairpin == "with"), met[protocol, (kind, hairpin)]))
        found.append(finding("udp blocked: udp", "blocked", await udp_mapping(office, observers)))
        found.append(finding("udp blocked: tcp", nat.INDEPENDENT, await tcp_mapping(office, observers)))
        found += await _double(inner, plain, observers)
        found += await _firewall(six, observers)
    return found


def _two_hosts(net: Internet, name: str, kind: str, hairpin: bool) -> tuple[Host, Host]:
    home = net.home(name, nat=kind, hairpin=hairpin, rtt_ms=RTT_MS)
    return home.host(), home.host()


async def _double(inner: Host, plain: Host, observers: Sequence[PublicHost]) -> list[Finding]:
    """Port-restricted within full-cone: as open as the stricter of both."""
    return [
        finding("two levels udp mapping", nat.INDEPENDENT, await udp_mapping(inner, observers)),
        finding("two levels udp filtering", nat.ADDRESS_AND_PORT, await udp_filtering(inner, observers)),
        finding("two levels tcp mapping", nat.INDEPENDENT, await tcp_mapping(inner, observers)),
        finding("two levels tcp filtering", nat.ADDRESS_AND_PORT, await tcp_filtering(inner, observers)),
        finding("two levels punching udp", "direct", _word(await punch_udp(inner, plain, observers[0], 7100))),
        finding("two levels punching tcp", "direct", _word(await punch_tcp(inner, plain, observers[0], 7100))),
    ]


async def _firewall(six: Sequence[Host], observers: Sequence[PublicHost]) -> list[Finding]:
    """IPv6: outer and inner address are one; nothing comes in unasked, and two that ask at once meet."""
    one, other = six
    here, there = str(one.addresses.ipv6), str(other.addresses.ipv6)
    stranger = str(observers[0].addresses.ipv6)
    async with udp(one, 7200, ipv6=True) as left, udp(observers[0], FIRST, ipv6=True) as outside:
        await outside.send((here, 7200))
        unasked = await left.hear(HEAR_S)
        await left.send((stranger, FIRST))
        seen = await outside.hear(HEAR_S)
    async with udp(one, 7201, ipv6=True) as left, udp(other, 7201, ipv6=True) as right:
        answered: list[bool] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_hail, left, (there, 7201), answered)
            nursery.start_soon(_hail, right, (here, 7201), answered)
    async with (
        listening(one, 7202, ipv6=True),
        dialled(observers[0], (here, 7202), wait_s=HEAR_S, ipv6=True) as connection,
    ):
        dialled_in = connection is not None
    met = await _dial_both((one, (there, 7203)), (other, (here, 7203)), 7203, ipv6=True)
    return [
        finding("ipv6 unasked udp", None, unasked),
        finding("ipv6 unasked tcp", False, dialled_in),
        finding("ipv6 outer endpoint", (here, 7200), seen),
        finding("ipv6 punching udp", "direct", _word(len(answered) == 2)),
        finding("ipv6 punching tcp", "direct", _word(met)),
    ]


async def _changes(net: Internet) -> list[Finding]:
    """A new public address, another router, another kind of NAT, a machine that comes later: while packets flow."""
    observers = [net.host(f"observer{n}", rtt_ms=RTT_MS, ipv6=True) for n in (1, 2)]
    home = net.home("home", nat="full-cone", rtt_ms=RTT_MS, ipv6=True)
    elsewhere = net.home("elsewhere", rtt_ms=RTT_MS)
    host = home.host()
    async with net.up():
        found = await _renumbered(home, host, observers[0])
        async with udp(host, 8000) as inner, udp(observers[0], FIRST) as outside:
            await host.move(elsewhere)
            await inner.send((observers[0].address, FIRST))
            found.append(finding("moved: seen from", (elsewhere.address, 8000), await outside.hear(HEAR_S)))
            await observers[0].renumber()
            await inner.send((observers[0].address, FIRST))
            found.append(finding("public host renumbered: hears", True, await outside.hear(HEAR_S) is not None))
        late = home.host()
        await net.apply()
        for kind in ("symmetric", "full-cone"):
            await home.change(nat=kind)
            mapping = await udp_mapping(late, observers, port=8100)
            found.append(finding(f"changed to {kind}, machine come later", nat.KINDS[kind].mapping, mapping))
    return found


async def _renumbered(home: Home, host: Host, observer: PublicHost) -> list[Finding]:
    """The old mappings are gone, and both families work from new addresses."""
    old6 = host.addresses.ipv6
    async with udp(host, 8000) as inner, udp(host, 8002) as busy, udp(observer, FIRST) as outside:
        await inner.send((observer.address, FIRST))
        before = await outside.hear(HEAR_S)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_flood, busy, (observer.address, FIRST + 1))
            await home.renumber()
            nursery.cancel_scope.cancel()
        if before is not None:
            await outside.send(before)
        stale = await inner.hear(HEAR_S)
        await inner.send((observer.address, FIRST))
        renumbered = await outside.hear(HEAR_S)
        await busy.send((observer.address, FIRST))
        seen_busy = await outside.hear(HEAR_S)
    async with udp(host, 8001, ipv6=True) as inner, udp(observer, FIRST, ipv6=True) as outside:
        await inner.send((str(observer.addresses.ipv6), FIRST))
        seen6 = await outside.hear(HEAR_S)
    return [
        finding("renumbered: old endpoint", None, stale),
        finding("renumbered: seen from", (home.address, 8000), renumbered),
        finding("renumbered while it sends: seen from", (home.address, 8002), seen_busy),
        finding("renumbered: IPv6 seen from", (host.addresses.ipv6, 8001), seen6),
        finding("renumbered: all is new", True, before != renumbered and old6 != host.addresses.ipv6),
    ]


async def _flood(sender: Udp, to: Endpoint) -> None:
    """Send without pause, until cancelled."""
    while True:
        await sender.send(to)
