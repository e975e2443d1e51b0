"""What every secure channel promises, run for each of them; and that plaintext is refused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from OpenSSL import SSL

from net import errors, multistream
from net.host import open_host
from net.identity import Identity
from net.mux.driver import PROTOCOL_ID as YAMUX
from net.security.base import MAX_RECORD_BYTES, RECORD_BYTES, SecureChannel, Security
from net.security.noise import NoiseSecurity
from net.security.tls import TlsSecurity
from net.transports.memory import MemoryNetwork
from tests.net_helpers import MEMORY_ANY, Tap, memory_hosts, receive_all, receive_count, seeded

ALICE, BOB, EVE = seeded(11), seeded(12), seeded(13)
MAKERS: list[Callable[[Identity], Security]] = [NoiseSecurity, TlsSecurity]


@pytest.fixture(params=MAKERS, ids=["noise", "tls"])
def make(request: pytest.FixtureRequest) -> Callable[[Identity], Security]:
    maker: Callable[[Identity], Security] = request.param
    return maker


async def shake(
    make: Callable[[Identity], Security],
    near: trio.abc.Stream,
    far: trio.abc.Stream,
) -> tuple[SecureChannel, SecureChannel]:
    """Alice dials Bob."""
    channels: dict[str, SecureChannel] = {}
    async with trio.open_nursery() as nursery:

        async def dial() -> None:
            channels["alice"] = await make(ALICE).outbound(near, BOB.peer_id)

        nursery.start_soon(dial)
        channels["bob"] = await make(BOB).inbound(far)
    return channels["alice"], channels["bob"]


async def pair(make: Callable[[Identity], Security]) -> tuple[SecureChannel, SecureChannel]:
    return await shake(make, *trio.testing.memory_stream_pair())


async def test_each_knows_the_other(make: Callable[[Identity], Security]) -> None:
    alice, bob = await pair(make)
    assert (alice.remote_peer, bob.remote_peer) == (BOB.peer_id, ALICE.peer_id)


@pytest.mark.parametrize("size", [1, RECORD_BYTES - 1, RECORD_BYTES, RECORD_BYTES + 1, 3_000_000])
async def test_echo(make: Callable[[Identity], Security], size: int) -> None:
    alice, bob = await pair(make)
    data = bytes(range(251)) * (size // 251) + bytes(size % 251)
    await alice.send_all(data)
    assert await receive_count(bob, size) == data
    await bob.send_all(memoryview(data))
    assert await receive_count(alice, size) == data


async def test_sending_nothing_is_nothing(make: Callable[[Identity], Security]) -> None:
    alice, bob = await pair(make)
    await alice.send_all(b"")
    await alice.send_all(b"something")
    assert await receive_count(bob, 9) == b"something"


async def test_both_may_send_much_at_once(make: Callable[[Identity], Security]) -> None:
    near, far = trio.testing.lockstep_stream_pair()  # wires that hold nothing
    done = []

    async def side(handshake: Callable[[], Awaitable[SecureChannel]]) -> None:
        channel = await handshake()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.send_all, bytes(1_000_000))
            done.append(await receive_count(channel, 1_000_000))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side, lambda: make(ALICE).outbound(near, BOB.peer_id))
            nursery.start_soon(side, lambda: make(BOB).inbound(far))
    assert done == [bytes(1_000_000)] * 2


async def test_what_crosses_the_wire_is_not_the_text(make: Callable[[Identity], Security]) -> None:
    near, far = trio.testing.memory_stream_pair()
    wire = bytearray()

    def watch(_: int, data: bytes) -> bytes:
        wire.extend(data)
        return data

    alice, bob = await shake(make, Tap(near, watch), far)
    await alice.send_all(b"the quick brown fox")
    assert await receive_count(bob, 19) == b"the quick brown fox"
    assert wire and b"quick" not in wire


async def test_somebody_else_at_the_address_is_named(make: Callable[[Identity], Security]) -> None:
    near, far = trio.testing.memory_stream_pair()

    async def listen() -> None:
        try:
            await make(BOB).inbound(far)
        except errors.NetError:
            pass  # the dialler may hang up on it

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        with pytest.raises(errors.PeerIdMismatch) as caught:
            await make(ALICE).outbound(near, EVE.peer_id)
        await near.aclose()
    assert caught.value.actual == BOB.peer_id
    assert caught.value.expected == EVE.peer_id
    assert str(BOB.peer_id) in str(caught.value)


async def test_a_tampered_byte_breaks_the_channel(make: Callable[[Identity], Security]) -> None:
    near, far = trio.testing.memory_stream_pair()
    tampering = False

    def tamper(_: int, data: bytes) -> bytes:
        return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:] if tampering else data

    alice, bob = await shake(make, Tap(near, tamper), far)
    await alice.send_all(b"as it was")
    assert await receive_count(bob, 9) == b"as it was"
    tampering = True
    await alice.send_all(b"as it was")
    with pytest.raises(trio.BrokenResourceError):
        await bob.receive_some()


async def test_what_came_before_a_tampered_byte_is_delivered(make: Callable[[Identity], Security]) -> None:
    near, far = trio.testing.memory_stream_pair()
    tampering = False

    def tamper(_: int, data: bytes) -> bytes:
        return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:] if tampering else data

    alice, bob = await shake(make, Tap(near, tamper), far)
    await alice.send_all(b"as it was")
    tampering = True
    await alice.send_all(b"as it was")
    assert b"".join(await bob.receive_batch()) == b"as it was"
    with pytest.raises(trio.BrokenResourceError):
        await bob.receive_batch()


async def test_a_batch_is_all_that_has_come_up_to_what_is_read_at_a_time(make: Callable[[Identity], Security]) -> None:
    alice, bob = await pair(make)
    for _ in range(3):
        await alice.send_all(bytes(100_000))
    assert sum(map(len, await bob.receive_batch())) == 300_000
    bob.limit_waiting(unsent_bytes=None, read_bytes=1)
    for _ in range(3):
        await alice.send_all(bytes(100_000))
    sizes: list[int] = []
    while sum(sizes) < 300_000:
        sizes.append(sum(map(len, await bob.receive_batch())))
    assert max(sizes) <= 3 * MAX_RECORD_BYTES  # two that are read, and what was left of one


async def test_pieces_of_any_sizes_are_one_run_of_bytes(make: Callable[[Identity], Security]) -> None:
    alice, bob = await pair(make)
    pieces = [
        bytes([number]) * size for number, size in enumerate([12, RECORD_BYTES - 12, RECORD_BYTES, 1, 200_000, 0, 7])
    ]
    alice.put([pieces[0], bytearray(pieces[1]), *(memoryview(piece) for piece in pieces[2:])])
    await alice.flush()
    await alice.aclose()
    assert await receive_all(bob) == b"".join(pieces)


async def test_a_repeated_record_breaks_the_channel(make: Callable[[Identity], Security]) -> None:
    near, far = trio.testing.memory_stream_pair()
    repeating = False

    def repeat(_: int, data: bytes) -> bytes:
        return data * 2 if repeating else data

    alice, bob = await shake(make, Tap(near, repeat), far)
    repeating = True
    await alice.send_all(b"pay one coin")
    assert await receive_count(bob, 12) == b"pay one coin"
    with pytest.raises(trio.BrokenResourceError):
        await bob.receive_some()


async def test_an_end_inside_a_record_is_no_end(make: Callable[[Identity], Security]) -> None:
    near, far = trio.testing.memory_stream_pair()
    cutting = False

    def cut(_: int, data: bytes) -> bytes:
        return data[:-1] if cutting else data

    alice, bob = await shake(make, Tap(near, cut), far)
    cutting = True
    await alice.send_all(b"not all of it")
    await near.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await bob.receive_some()


async def test_closing_is_an_end(make: Callable[[Identity], Security]) -> None:
    alice, bob = await pair(make)
    await alice.send_all(b"goodbye")
    await alice.aclose()
    assert await receive_all(bob) == b"goodbye"


@pytest.mark.parametrize("garbage", [bytes(200), b"\xff" * 200, b"GET / HTTP/1.1\r\n\r\n" + bytes(40_000)])
@pytest.mark.parametrize("listening", [True, False])
async def test_a_garbage_handshake_is_the_peers_fault(
    make: Callable[[Identity], Security], garbage: bytes, listening: bool
) -> None:
    near, far = trio.testing.memory_stream_pair()
    await far.send_all(garbage)
    await far.send_eof()
    with pytest.raises((errors.RemoteProtocolError, errors.ConnectionLost)) as caught:
        await (make(ALICE).inbound(near) if listening else make(ALICE).outbound(near, BOB.peer_id))
    if garbage.startswith(b"\xff") and make is TlsSecurity:
        assert isinstance(caught.value, errors.RemoteProtocolError)


async def test_a_handshake_cut_short_is_a_lost_connection(make: Callable[[Identity], Security]) -> None:
    near, far = trio.testing.memory_stream_pair()
    await far.aclose()
    with pytest.raises(errors.ConnectionLost):
        await make(ALICE).inbound(near)


async def test_a_tampered_handshake_fails_on_one_side_at_least(make: Callable[[Identity], Security]) -> None:
    near, far = trio.testing.memory_stream_pair()
    outcome: list[object] = []

    async def side(what: Callable[[], object]) -> None:
        try:
            outcome.append(await what())  # type: ignore[misc]
        except errors.NetError as error:
            outcome.append(error)
            await near.aclose()
            await far.aclose()

    tapped = Tap(near, lambda index, data: data[:-1] + bytes([data[-1] ^ 1]) if index == 1 else data)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(side, lambda: make(ALICE).outbound(tapped, BOB.peer_id))
        nursery.start_soon(side, lambda: make(BOB).inbound(far))
    assert any(isinstance(each, errors.NetError) for each in outcome)


async def test_a_certificate_that_cannot_be_read_is_the_peers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(self: object, **_: object) -> None:
        raise ValueError("invalid version")

    monkeypatch.setattr(SSL.Connection, "get_peer_certificate", unreadable)
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:

        async def listen() -> None:
            with pytest.raises(errors.RemoteProtocolError, match="certificate"):
                await TlsSecurity(BOB).inbound(far)

        nursery.start_soon(listen)
        with pytest.raises(errors.RemoteProtocolError, match="certificate"):
            await TlsSecurity(ALICE).outbound(near, BOB.peer_id)


# Plaintext


class Plaintext:
    """A peer that offers ``/plaintext/2.0.0`` and nothing else."""

    protocol_id = "/plaintext/2.0.0"


async def test_a_dialler_that_only_speaks_plaintext_is_refused() -> None:
    network = MemoryNetwork()
    async with memory_hosts(1, network=network) as (host,):
        raw = await network.transport().dial(host.addresses[0])
        with pytest.raises((errors.ProtocolNotSupported, errors.ConnectionLost)):
            await multistream.propose(raw.stream, [Plaintext.protocol_id])
        await raw.stream.aclose()
        assert host.swarm.connections == []


async def test_a_listener_that_only_speaks_plaintext_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    network = MemoryNetwork()
    agreed: list[str] = []

    async def accept(raw: object) -> None:
        stream = raw.stream  # type: ignore[attr-defined]
        try:
            agreed.append(await multistream.answer(stream, {Plaintext.protocol_id, YAMUX}))
        except errors.NetError:
            pass

    async with trio.open_nursery() as nursery, open_host(ALICE, transports=[network.transport()]) as host:
        (address,) = await nursery.start(network.transport().listen, MEMORY_ANY, accept)
        with pytest.raises(errors.DialError, match=r"none of /noise, /tls/1\.0\.0"):
            await host.connect(BOB.peer_id, [address])
        nursery.cancel_scope.cancel()
    assert agreed == []


@pytest.mark.parametrize("name", ["/noise", "/tls/1.0.0"])
async def test_two_hosts_agree_on_what_both_have(name: str) -> None:
    makers: dict[str, Callable[[Identity], Security]] = {"/noise": NoiseSecurity, "/tls/1.0.0": TlsSecurity}
    async with memory_hosts(2, securities=lambda identity: [makers[name](identity)]) as (one, two):
        connection = await one.connect(two.peer_id, two.addresses)
        assert connection.security == name
