"""Every pairing of our host with a foreign peer, one after another, each on fresh hosts.

A case: one peer, one transport, one security, one direction. In it, started by the side that dials: an echo
(every byte compared), a ping, an identify, and a dial with the wrong peer id, which must fail. When we dial,
also: a protocol that the peer does not speak, many streams at once, and an echo after more silence than our
keepalive takes for death. The foreign peer knows that transport and that security alone; ours knows all, and
what was agreed is checked.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import trio

from interop.peers.base import ECHO, Driver, Peer, PeerError, answer_echo, listen_address, request_echo
from interop.peers.fetch import FetchError
from net import addresses, errors, identify, ping
from net.addresses import Multiaddr, PeerAddress
from net.host import Host, open_host
from net.identity import Identity, PeerId
from net.mux.core import YamuxSettings
from net.swarm import Connection

STACKS = (("tcp", "noise"), ("tcp", "tls"), ("ws", "noise"), ("ws", "tls"), ("quic", "tls"))
DIRECTIONS = ("we dial", "they dial")
CASE_S = 60.0
SETTLE_S = 2.0
STREAMS = 16
STREAM_BYTES = 100_000
SILENCE_S = YamuxSettings().dead_after_s + 1.0
KINDS: dict[str, Callable[[Multiaddr], object]] = {
    "tcp": addresses.host_port,
    "ws": addresses.websocket_host_port,
    "quic": addresses.quic_host_port,
}
WORDS = {"noise": "/noise", "tls": "/tls/1.0.0"}


class Mismatch(Exception):
    """Both sides were content, and yet it is not what was asked for."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One case. ``failure`` and ``cannot`` are None when everything in it went well.

    Attributes:
        failure: what went wrong.
        cannot: why it cannot go well, and how that showed: the foreign peer is not able to, or this machine.
        took: what there was after ``took_s``.
    """

    peer: str
    transport: str
    security: str
    direction: str
    failure: str | None = None
    cannot: str | None = None
    echo_s: float | None = None
    ping_s: float | None = None
    took_s: float | None = None
    took: str = ""

    @property
    def name(self) -> str:
        return f"{self.peer}-{self.transport}-{self.security}-{self.direction.replace(' ', '-')}"

    @property
    def verdict(self) -> str:
        if self.failure is not None:
            return f"FAILED: {self.failure}"
        if self.cannot is not None:
            return f"cannot: {self.cannot}"
        return "ok" if self.took_s is None else f"ok, {self.took} after {self.took_s:.2g} s"


async def run(drivers: Sequence[Driver], *, echo_bytes: int) -> AsyncGenerator[Result, None]:
    """Results as they come. A case that fails does not stop the others."""
    for driver in drivers:
        try:
            await trio.to_thread.run_sync(driver.fetch)
            missing = None
        except FetchError as error:
            missing = str(error)
        for transport, security in STACKS:
            for direction in DIRECTIONS:
                case = (driver.name, transport, security, direction)
                yield _failed(case, missing) if missing else await _run_case(driver, case, echo_bytes)


async def _run_case(driver: Driver, case: tuple[str, str, str, str], echo_bytes: int) -> Result:
    name, transport, security, direction = case
    failure: str | None = None
    echo_s = ping_s = 0.0
    try:
        with trio.fail_after(CASE_S):
            async with driver.start(transport, security) as peer, _our_host(transport) as host:
                if direction == "we dial":
                    silence = security == "noise" or transport == "quic"
                    echo_s, ping_s = await _we_dial(peer, host, echo_bytes, silence=silence)
                else:
                    echo_s, ping_s = await _they_dial(peer, host, echo_bytes)
                _check_connections(host.swarm.connections, transport, security, direction)
    except* (errors.NetError, PeerError, Mismatch, OSError) as group:
        failure = "; ".join(reasons(group))
    except* trio.TooSlowError:
        failure = f"not done within {CASE_S:g} s"
    if failure is not None:
        return _failed(case, failure)
    return Result(peer=name, transport=transport, security=security, direction=direction, echo_s=echo_s, ping_s=ping_s)


def _failed(case: tuple[str, str, str, str], failure: str) -> Result:
    name, transport, security, direction = case
    return Result(peer=name, transport=transport, security=security, direction=direction, failure=failure)


@asynccontextmanager
async def _our_host(transport: str) -> AsyncIterator[Host]:
    async with open_host(Identity.generate(), listen=[listen_address(transport)]) as host:
        host.handle(ECHO, lambda _, stream: answer_echo(stream))
        yield host


async def _we_dial(peer: Peer, host: Host, echo_bytes: int, *, silence: bool) -> tuple[float, float]:
    who, where = peer.address.peer_id, peer.address.address
    await host.connect(who, [where])
    async with host.stream(who, [ECHO]) as stream:
        echo_s = await request_echo(stream, os.urandom(echo_bytes))
    async with aclosing(ping.ping(host, who)) as round_trips:
        ping_s = min([await anext(round_trips) for _ in range(3)])
    message = await identify.identify(host, who)
    _expect("the echo among its protocols", ECHO, message.protocols)
    _expect("its address", where, map(_address, message.listen_addrs))
    ours = [connection.local for connection in host.swarm.connections]
    _expect("where it sees us", _address(message.observed_addr), ours)
    await _check_refusals(peer, host)
    await _check_many_streams(host, who)
    if silence:  # once for each transport is enough
        await trio.sleep(SILENCE_S)
        await _echo_once(host, who)
    return echo_s, ping_s


async def _they_dial(peer: Peer, host: Host, echo_bytes: int) -> tuple[float, float]:
    us = host.peer_addresses[0]
    echo_s = await peer.echo(us, echo_bytes)
    ping_s = min([await peer.ping(us) for _ in range(3)])
    sight = await peer.identify(us)
    _expect("our peer id", sight.peer, [str(host.peer_id)])
    _expect("our address", sight.addresses[0] if sight.addresses else "", [str(us.address)])
    _expect("where we see it", sight.observed, [str(each.remote) for each in host.swarm.connections])
    _expect("our protocols", sorted(sight.protocols), [host.protocols])
    _expect("our name", sight.agent.split("/")[0], ["raceme"])
    try:
        await peer.ping(PeerAddress(address=us.address, peer_id=_somebody_else()))
    except PeerError:
        with trio.move_on_after(SETTLE_S):  # over QUIC, a dialler can only refuse us when we have let it in
            while len(host.swarm.connections) > 1:  # noqa: ASYNC110  # nothing tells
                await trio.sleep(0.05)
        return echo_s, ping_s
    raise Mismatch("a dial to us with another's peer id went well")


async def _check_refusals(peer: Peer, host: Host) -> None:
    try:
        async with host.stream(peer.address.peer_id, ["/raceme-interop/unheard-of/1", "/raceme-interop/nor-this/1"]):
            raise Mismatch("a protocol that nobody speaks was agreed on")
    except errors.ProtocolNotSupported:
        pass
    async with host.stream(peer.address.peer_id, ["/raceme-interop/unheard-of/1", ECHO]) as stream:
        await request_echo(stream, b"the second choice")
    try:
        await host.connect(_somebody_else(), [peer.address.address])
    except errors.PeerIdMismatch as error:
        _expect("who answered a dial to somebody else", error.actual, [peer.address.peer_id])
    else:
        raise Mismatch("a dial with another's peer id went well")


async def _check_many_streams(host: Host, who: PeerId) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(STREAMS):
            nursery.start_soon(_echo_once, host, who)


async def _echo_once(host: Host, who: PeerId) -> None:
    async with host.stream(who, [ECHO]) as stream:
        await request_echo(stream, os.urandom(STREAM_BYTES))


def _somebody_else() -> PeerId:
    return Identity.generate().peer_id


def _check_connections(found: Sequence[Connection], transport: str, security: str, direction: str) -> None:
    _expect("the number of connections", len(found), [1])
    _expect("the security", found[0].security, [WORDS[security]])
    _expect("who dialled", found[0].outbound, [direction == "we dial"])
    _expect("the transport", KINDS[transport](found[0].remote) is not None, [True])


def _expect(what: str, value: object, options: Iterable[object]) -> None:
    options = list(options)
    if value not in options:
        raise Mismatch(f"{what}: {value} instead of {', '.join(map(str, options)) or 'anything'}")


def _address(data: bytes) -> Multiaddr:
    return Multiaddr(data).decapsulate_code(421)


def reasons(error: BaseException) -> list[str]:
    """Of a group, each one's text."""
    if isinstance(error, BaseExceptionGroup):
        return [reason for inner in error.exceptions for reason in reasons(inner)]
    return [f"{type(error).__name__}: {error}"]
