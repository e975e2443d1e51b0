"""What is QUIC's alone, over real sockets: who is let in, one socket for everything, garbage, moving house."""

from __future__ import annotations

import datetime
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from net.addresses import Multiaddr, host_port, parse, quic_host_port
from net.errors import DialError, NetError, PeerIdMismatch
from net.host import Host, open_host
from net.identify import identify_over
from net.limits import Limits
from net.mux.base import Stream
from net.security.certificate import Credentials, make_credentials
from net.swarm import Connection
from net.transports.base import Arrived
from net.transports.quic import QuicTransport, endpoint
from net.transports.quic import transport as quic_transport
from net.transports.quic.connection import QuicConnection
from net.transports.quic.core import QuicCore, configure
from net.transports.quic.endpoint import Endpoint
from net.transports.quic.udp import UdpSocket
from net.transports.tcp import TcpTransport
from tests.net_helpers import receive_count, seeded

ANYWHERE = parse("/ip4/127.0.0.1/udp/0/quic-v1")
PATIENCE_S = 15.0
ECHO = "/echo/1"


async def echo(connection: Connection, stream: Stream) -> None:
    while part := await stream.receive_some():
        await stream.send_all(part)


@asynccontextmanager
async def quic_host(
    number: int, listen: Sequence[Multiaddr] = (ANYWHERE,), limits: Limits | None = None
) -> AsyncIterator[tuple[Host, QuicTransport]]:
    identity = seeded(number)
    transport = QuicTransport(identity)
    with trio.fail_after(PATIENCE_S):
        async with open_host(identity, listen=listen, transports=[transport], limits=limits) as host:
            host.handle(ECHO, echo)
            yield host, transport


async def echoed(host: Host, far: Host, data: bytes) -> bytes:
    async with host.stream(far.peer_id, [ECHO], far.addresses) as stream:
        await stream.send_all(data)
        return await receive_count(stream, len(data))


def udp_port(address: Multiaddr) -> int:
    where = quic_host_port(address)
    assert where is not None
    return where[1]


# Who is let in


def forged() -> Credentials:
    """A certificate of libp2p's form for one key, with another key's signature."""
    mine, theirs = make_credentials(seeded(8)), make_credentials(seeded(9))
    return Credentials(certificate=mine.certificate, key=theirs.key)


def nameless() -> Credentials:
    """A certificate that says nothing of libp2p."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(start).not_valid_after(start.replace(year=2100))
    return Credentials(certificate=builder.sign(key, hashes.SHA256()), key=key)


@pytest.mark.parametrize("credentials", [forged, nameless])
async def test_a_listener_with_a_wrong_certificate_is_refused(credentials: Callable[[], Credentials]) -> None:
    async with quic_host(1, ()) as (host, _), listening_with(credentials()) as address:
        with pytest.raises(DialError):
            await host.connect(seeded(8).peer_id, [address])
        assert host.swarm.connections == []


@asynccontextmanager
async def listening_with(credentials: Credentials) -> AsyncIterator[Multiaddr]:
    transport = QuicTransport(seeded(8))
    transport._credentials = credentials

    async def accept(arrived: Arrived) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        [address] = await nursery.start(transport.listen, ANYWHERE, accept)
        yield address
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("credentials", [forged, nameless, None])
async def test_a_dialler_with_a_wrong_certificate_or_none_is_refused(
    credentials: Callable[[], Credentials] | None,
) -> None:
    async with quic_host(1) as (host, _), trio.open_nursery() as nursery:
        with BareDialler(credentials() if credentials else nameless()) as caller:
            if credentials is None:
                caller._client.certificate = caller._client.private_key = None
            await nursery.start(caller.run)
            dialled = caller.dial(("127.0.0.1", udp_port(host.listening[0])))
            await dialled.ended.wait()
            assert isinstance(dialled.failure, NetError)
            assert host.swarm.connections == []
            nursery.cancel_scope.cancel()


class BareDialler:
    """A bare endpoint that dials with these credentials."""

    def __init__(self, credentials: Credentials) -> None:
        self._endpoint = Endpoint(UdpSocket(socket.AF_INET, "127.0.0.1", 0), credentials)

    def __enter__(self) -> Endpoint:
        return self._endpoint

    def __exit__(self, *_: object) -> None:
        self._endpoint.udp.close()


@pytest.mark.parametrize("protocols", [["h3"], None])
async def test_who_speaks_another_protocol_is_refused(protocols: list[str] | None) -> None:
    async with quic_host(1) as (host, _), trio.open_nursery() as nursery:
        with BareDialler(make_credentials(seeded(2))) as caller:
            caller._client.alpn_protocols = protocols
            await nursery.start(caller.run)
            dialled = caller.dial(("127.0.0.1", udp_port(host.listening[0])))
            await dialled.ended.wait()
            assert host.swarm.connections == []
            nursery.cancel_scope.cancel()


async def test_somebody_else_s_address_is_told() -> None:
    async with quic_host(1) as (far, _), quic_host(2, ()) as (near, _):
        with pytest.raises(PeerIdMismatch):
            await near.connect(seeded(3).peer_id, far.addresses)
        assert near.swarm.connections == []


# One socket


async def test_dials_and_punches_leave_from_where_we_listen() -> None:
    async with quic_host(1) as (far, _), quic_host(2) as (near, transport):
        await near.connect(far.peer_id, far.addresses)
        [seen] = far.swarm.connections
        assert seen.remote == near.listening[0]
        assert transport.local_port(far.addresses[0]) == udp_port(near.listening[0])
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as target:
            await target.bind(("127.0.0.1", 0))
            address = parse(f"/ip4/127.0.0.1/udp/{target.getsockname()[1]}/quic-v1")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(transport.punch, address)
                for _ in range(3):
                    data, who = await target.recvfrom(2000)
                    assert who[1] == udp_port(near.listening[0])
                    assert data[0] & 0xC0 == 0  # nobody takes it for QUIC
                nursery.cancel_scope.cancel()


async def test_a_host_that_only_dials_has_one_socket() -> None:
    async with quic_host(1) as (first, _), quic_host(2) as (second, _), quic_host(3, ()) as (near, _):
        for far in (first, second):
            await near.connect(far.peer_id, far.addresses)
        ports = {udp_port(connection.local) for connection in near.swarm.connections if connection.local}
        assert len(ports) == 1


async def test_both_kinds_of_port_have_one_number() -> None:
    identity = seeded(1)
    listen = [parse("/ip4/127.0.0.1/tcp/0"), ANYWHERE]
    async with open_host(identity, listen=listen, transports=[TcpTransport(), QuicTransport(identity)]) as host:
        over_tcp, over_quic = host.listening
        assert host_port(over_tcp) == quic_host_port(over_quic)


async def test_ipv6() -> None:
    try:
        async with quic_host(1, [parse("/ip6/::1/udp/0/quic-v1")]) as (far, _), quic_host(2, ()) as (near, _):
            assert await echoed(near, far, b"six") == b"six"
    except NetError as error:
        pytest.skip(f"no IPv6 here: {error}")


async def test_a_name_is_looked_up() -> None:
    async with quic_host(1) as (far, _), quic_host(2, ()) as (near, _):
        address = parse(f"/dns4/localhost/udp/{udp_port(far.listening[0])}/quic-v1")
        await near.connect(far.peer_id, [address])
        with pytest.raises(DialError):
            await near.connect(seeded(9).peer_id, [parse("/dns4/nowhere.invalid/udp/1/quic-v1")])


# Strangers


async def test_garbage_is_ignored() -> None:
    chance = random.Random(5)
    async with quic_host(1) as (far, _), quic_host(2, ()) as (near, _):
        await near.connect(far.peer_id, far.addresses)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.connect(("127.0.0.1", udp_port(far.listening[0])))
            for _ in range(300):
                data = bytearray(chance.randbytes(chance.choice([0, 1, 8, 20, 100, 1199, 1200, 1300])))
                if data and chance.random() < 0.7:  # what looks like the beginning of a connection
                    data[:6] = bytes([0xC0 | chance.randrange(64)]) + b"\0\0\0\1\x08"
                stranger.send(data)
        assert await echoed(near, far, b"still well") == b"still well"
        async with quic_host(3, ()) as (late, _):
            assert await echoed(late, far, b"and for others") == b"and for others"


async def test_another_version_is_told_of_ours() -> None:
    async with quic_host(1) as (far, _):
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            await stranger.bind(("127.0.0.1", 0))
            hello = b"\xc0\x0a\x0a\x0a\x0a\x08" + os.urandom(8) + b"\x08" + os.urandom(8) + bytes(1300)
            await stranger.sendto(hello, ("127.0.0.1", udp_port(far.listening[0])))
            answer = await stranger.recv(2000)
        assert answer[1:5] == bytes(4)
        assert answer.endswith(b"\0\0\0\1")
        assert len(answer) < len(hello)


async def test_in_a_crowd_newcomers_prove_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RETRY_FROM", 0)
    async with quic_host(1) as (far, _), quic_host(2, ()) as (near, _):
        assert await echoed(near, far, b"by way of a Retry") == b"by way of a Retry"


async def test_handshakes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_HANDSHAKES", 0)
    async with quic_host(1) as (far, _), quic_host(2, (), Limits(dial_s=0.2)) as (near, _):
        with pytest.raises(DialError, match="no answer"):
            await near.connect(far.peer_id, far.addresses)


# Moving house


async def test_a_stream_goes_on_when_our_socket_moves() -> None:
    data = random.Random(1).randbytes(3_000_000)
    async with quic_host(1) as (far, _), quic_host(2, ()) as (near, transport):
        async with near.stream(far.peer_id, [ECHO], far.addresses) as stream:
            before = transport.local_port(far.addresses[0])

            async def give() -> None:
                for start in range(0, len(data), 50_000):
                    await stream.send_all(data[start : start + 50_000])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(give)
                received = bytearray()
                for part in range(3):
                    received += await receive_count(stream, len(data) // 3)
                    if part < 2:
                        transport.rebind()
            assert bytes(received) == data
            assert transport.local_port(far.addresses[0]) != before
        assert len(near.swarm.connections) == len(far.swarm.connections) == 1


async def test_a_listener_that_moves_tells_those_it_dialled() -> None:
    async with quic_host(1) as (far, _), quic_host(2) as (near, transport):
        assert await echoed(near, far, b"before") == b"before"
        transport.rebind()
        assert await echoed(near, far, b"after") == b"after"
        assert await echoed(far, near, b"and back") == b"and back"


async def test_a_host_that_has_left_is_noticed_at_once() -> None:
    leave = trio.Event()

    async def serve(*, task_status: trio.TaskStatus[Host]) -> None:
        async with quic_host(1) as (host, _):
            task_status.started(host)
            await leave.wait()

    async with quic_host(2, ()) as (near, _), trio.open_nursery() as nursery:
        far = await nursery.start(serve)
        stream = await near.open_stream(far.peer_id, [ECHO], far.addresses)
        leave.set()
        with pytest.raises(NetError):
            await stream.receive_some()
        while near.swarm.connections:
            await trio.testing.wait_all_tasks_blocked()


def test_what_we_offer() -> None:
    settings = configure(make_credentials(seeded(1)), client=False)
    assert settings.alpn_protocols == ["libp2p"]
    assert settings.supported_versions == [1]


async def test_a_network_without_sockets_to_move_to_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with quic_host(1) as (far, _), quic_host(2, ()) as (near, transport):
        assert await echoed(near, far, b"before") == b"before"

        def fail(*_: object) -> UdpSocket:
            raise OSError(99, "Cannot assign requested address")

        monkeypatch.setattr(quic_transport, "UdpSocket", fail)
        transport.rebind()
        assert await echoed(near, far, b"after") == b"after"


# Crowds and bugs


async def test_a_crowd_that_comes_at_once_is_counted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came while the loop was busy elsewhere: a Retry for all but the first few."""
    monkeypatch.setattr(endpoint, "RETRY_FROM", 4)
    async with quic_host(1) as (far, _):
        where = ("127.0.0.1", udp_port(far.listening[0]))
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            await stranger.bind(("127.0.0.1", 0))
            for _ in range(12):
                core = QuicCore(configure(make_credentials(seeded(3)), client=True))
                core.connect(where, 0.0)
                for data, _ in core.datagrams_to_send(0.0):
                    stranger._sock.sendto(data, where)  # type: ignore[attr-defined]  # without a turn of the loop
            retries = 0
            while retries < 8:
                retries += (await stranger.recv(2000))[0] & 0xF0 == 0xF0


async def test_a_failure_of_one_connection_while_the_socket_was_full_is_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with quic_host(1) as (far, transport), quic_host(2, ()) as (near, _), quic_host(3, ()) as (other, _):
        stream = await near.open_stream(far.peer_id, [ECHO], far.addresses)
        await other.connect(far.peer_id, far.addresses)
        (inbound,) = (each for each in far.swarm.connections if each.peer_id == near.peer_id)
        (listening,) = transport._listening

        def fail(now: float) -> None:
            raise AssertionError("a bug of the library's")

        assert isinstance(inbound.mux, QuicConnection)
        monkeypatch.setattr(inbound.mux.core, "datagrams_to_send", fail)
        listening._waiting.append((b"\0", ("127.0.0.1", 9)))  # as if the socket had had no room
        listening._has_waiting.set()
        await inbound.ended.wait()
        assert await echoed(other, far, b"unharmed") == b"unharmed"
        assert [record.message for record in caplog.records] == ["a QUIC connection failed"]
        stream.reset()


async def test_one_network_cannot_have_all_handshakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who shows where it is and then says no more holds a place for ten seconds: only so many of one network may."""
    monkeypatch.setattr(endpoint, "RETRY_FROM", 0)
    monkeypatch.setattr(endpoint, "HANDSHAKES_PER_IP_GROUP", 2)
    monkeypatch.setattr(endpoint, "ip_group", lambda address: "one network")  # loopback counts as none
    async with quic_host(1) as (far, transport):
        where = ("127.0.0.1", udp_port(far.listening[0]))
        (listening,) = transport._listening
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            await stranger.bind(("127.0.0.1", 0))

            async def send(data: bytes) -> None:
                await stranger.sendto(data, where)

            for number in range(4):
                core = QuicCore(configure(make_credentials(seeded(3)), client=True))
                core.connect(where, 0.0)
                for data, _ in core.datagrams_to_send(0.0):
                    await send(data)
                while (answer := await stranger.recv(2000))[0] & 0xF0 != 0xF0:
                    pass  # to one before
                core.receive_datagram(answer, where, 0.0)
                for data, _ in core.datagrams_to_send(0.0):
                    await send(data)
                # Datagrams are looked at in their order: what this one asks for is answered after those above.
                await send(b"\xc0\x0a\x0a\x0a\x0a\x08" + bytes(8) + b"\x08" + os.urandom(8) + bytes(1300))
                while (await stranger.recv(2000))[1:5] != bytes(4):
                    pass
                assert listening._handshakes == min(number + 1, 2)


async def test_who_has_moved_is_known_where_it_is_now() -> None:
    """It is told so itself, and who counts it by its address counts it there."""
    async with quic_host(1) as (far, _), quic_host(2, ()) as (near, transport):
        connection = await near.connect(far.peer_id, far.addresses)
        [inbound] = far.swarm.connections
        assert inbound.now_at == inbound.remote
        assert connection.now_at == connection.remote == far.addresses[0]
        transport.rebind()
        moved = parse(f"/ip4/127.0.0.1/udp/{transport.local_port(far.addresses[0])}/quic-v1")
        while Multiaddr((await identify_over(near, connection)).observed_addr) != moved:
            await echoed(near, far, b"over the new path")
        assert inbound.now_at == moved != inbound.remote
        assert connection.now_at == connection.remote  # servers stay
