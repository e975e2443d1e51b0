"""What is WebSocket's alone: the upgrade, frames that our own side never sends, and its addresses."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Event, Ping, Pong, Request, TextMessage

from net.addresses import Multiaddr, host_port, websocket_host_port
from net.errors import DialError
from net.host import open_host
from net.identity import Identity
from net.ping import ping_once
from net.transports import websocket
from net.transports.base import RawConnection
from net.transports.websocket import WebSocketTransport
from tests.net_helpers import receive_all, receive_count

ANYWHERE = Multiaddr("/ip4/127.0.0.1/tcp/0/ws")
PATIENCE_S = 10.0


class RawClient:
    """A WebSocket client that sends what it is told to."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.protocol = WSConnection(ConnectionType.CLIENT)

    async def send(self, *events: Event) -> None:
        await self.stream.send_all(b"".join(self.protocol.send(event) for event in events))

    async def events_until(self, kind: type[Event]) -> list[Event]:
        """What comes, with the first event of ``kind`` as the last."""
        found: list[Event] = []
        while True:
            for event in self.protocol.events():
                found.append(event)
                if isinstance(event, kind):
                    return found
            self.protocol.receive_data(await self.stream.receive_some() or None)


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[trio.SocketStream, trio.MemoryReceiveChannel[RawConnection]]]:
    """A TCP connection to a WebSocket listener, and the channel through which it hands over what it accepts."""
    arrivals, departures = trio.open_memory_channel[RawConnection](8)

    async def accept(raw: RawConnection) -> None:
        async with raw.stream:
            arrivals.send_nowait(raw)
            await trio.sleep_forever()

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            [bound] = await nursery.start(WebSocketTransport().listen, ANYWHERE, accept)
            where = websocket_host_port(bound)
            assert where is not None
            async with await trio.open_tcp_stream(*where) as stream:
                yield stream, departures
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def raw_client() -> AsyncIterator[tuple[RawClient, trio.abc.Stream]]:
    """A hand-driven client, and our listener's stream to it."""
    async with listening() as (stream, accepted):
        client = RawClient(stream)
        await client.send(Request(host="there", target="/"))
        await client.events_until(AcceptConnection)
        yield client, (await accepted.receive()).stream


@asynccontextmanager
async def tcp_server(answers: Sequence[bytes]) -> AsyncIterator[tuple[Multiaddr, trio.Event]]:
    """A server that answers anything with ``answers`` and waits for the end, which sets the event."""
    ended = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        for answer in answers:
            await stream.send_all(answer)
        while await stream.receive_some():
            pass
        ended.set()

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, serve, listeners)
            port = listeners[0].socket.getsockname()[1]
            yield Multiaddr(f"/ip4/127.0.0.1/tcp/{port}/ws"), ended
            nursery.cancel_scope.cancel()


# Frames


async def test_a_ping_is_answered_while_reading() -> None:
    async with raw_client() as (client, ours):
        await client.send(Ping(payload=b"?"), BytesMessage(data=b"data"))
        assert await ours.receive_some() == b"data"
        assert await client.events_until(Pong) == [Pong(payload=b"?")]


async def test_of_many_pings_the_latest_is_answered() -> None:
    async with raw_client() as (client, ours):
        await client.send(*(Ping(payload=b"%d" % number) for number in range(100)), BytesMessage(data=b"data"))
        assert await ours.receive_some() == b"data"
        await ours.aclose()
        pongs = [event for event in await client.events_until(CloseConnection) if isinstance(event, Pong)]
        assert pongs[-1] == Pong(payload=b"99")


async def test_a_pong_never_lands_inside_a_frame() -> None:
    data = random.Random(1).randbytes(20_000_000)
    async with raw_client() as (client, ours), trio.open_nursery() as nursery:
        nursery.start_soon(ours.send_all, data)
        await trio.testing.wait_all_tasks_blocked()  # the sender stands inside a frame: nobody reads
        await client.send(Ping(payload=b"?"), BytesMessage(data=b"x"))
        assert await ours.receive_some() == b"x"
        received = bytearray()
        pongs = 0
        while len(received) < len(data):
            for event in await client.events_until(BytesMessage):
                if isinstance(event, BytesMessage):
                    received += event.data
                else:
                    assert event == Pong(payload=b"?")
                    pongs += 1
        assert received == data
        assert pongs == 1


async def test_where_messages_end_means_nothing() -> None:
    async with raw_client() as (client, ours):
        await client.send(
            BytesMessage(data=b"on", message_finished=False),
            BytesMessage(data=b"e, ", message_finished=False),
            Ping(),
            BytesMessage(data=b"", message_finished=True),
            BytesMessage(data=b""),
            BytesMessage(data=b"two"),
            CloseConnection(code=1000),
        )
        assert await receive_all(ours) == b"one, two"


async def test_a_frame_without_end_is_handed_on_as_it_comes() -> None:
    async with raw_client() as (client, ours):
        await client.stream.send_all(b"\x82\xff" + (1 << 62).to_bytes(8, "big") + bytes(4) + b"the first bytes")
        assert await receive_count(ours, 15) == b"the first bytes"
        await client.stream.send_all(b" and more")
        assert await receive_count(ours, 9) == b" and more"


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(b"\x82\x01A", id="not masked"),
        pytest.param(b"\x83\x80\x00\x00\x00\x00", id="unknown kind"),
        pytest.param(b"\xc2\x80\x00\x00\x00\x00", id="reserved bit"),
        pytest.param(b"\x80\x80\x00\x00\x00\x00", id="continues nothing"),
        pytest.param(b"\x89\xfe\x00\x80\x00\x00\x00\x00", id="long ping"),
        pytest.param(b"\x88\x81\x00\x00\x00\x00\x00", id="close with half a code"),
    ],
)
async def test_nonsense_breaks_the_connection(frames: bytes) -> None:
    async with raw_client() as (client, ours):
        await client.stream.send_all(frames)
        with pytest.raises(trio.BrokenResourceError):
            await ours.receive_some()


async def test_text_breaks_the_connection() -> None:
    async with raw_client() as (client, ours):
        await client.send(BytesMessage(data=b"before"), TextMessage(data="hello"))
        assert await ours.receive_some() == b"before"
        with pytest.raises(trio.BrokenResourceError, match="text"):
            await ours.receive_some()


async def test_a_close_for_a_bad_reason_is_no_proper_end() -> None:
    async with raw_client() as (client, ours):
        await client.send(CloseConnection(code=1011, reason="out of order"))
        with pytest.raises(trio.BrokenResourceError, match="out of order"):
            await ours.receive_some()


async def test_a_cancelled_send_leaves_no_second_chance() -> None:
    async with raw_client() as (_, ours):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ours.send_all, bytes(20_000_000))
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        with pytest.raises(trio.BrokenResourceError, match="inside a frame"):
            await ours.send_all(b"more")


# The upgrade


async def test_data_right_behind_the_upgrade_is_not_lost() -> None:
    async def serve(stream: trio.SocketStream) -> None:
        protocol = WSConnection(ConnectionType.SERVER)
        protocol.receive_data(await stream.receive_some())
        assert isinstance(next(protocol.events()), Request)
        await stream.send_all(protocol.send(AcceptConnection()) + protocol.send(BytesMessage(data=b"early")))

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, serve, listeners)
            port = listeners[0].socket.getsockname()[1]
            raw = await WebSocketTransport().dial(Multiaddr(f"/ip4/127.0.0.1/tcp/{port}/ws"))
            async with raw.stream:
                assert await receive_count(raw.stream, 5) == b"early"
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", id="no upgrade"),
        pytest.param(b"\x13/multistream/1.0.0\n", id="no HTTP"),
        pytest.param(b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000, id="too long"),
    ],
)
async def test_a_listener_ends_what_is_no_websocket(words: bytes) -> None:
    async with listening() as (stream, accepted):
        try:
            await stream.send_all(words)
            assert await stream.receive_some() == b""
        except trio.BrokenResourceError:
            pass  # it had heard enough before all of it was sent
        with pytest.raises(trio.WouldBlock):
            accepted.receive_nowait()


async def test_a_listener_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "HANDSHAKE_S", 0.05)
    async with listening() as (stream, _):
        assert await stream.receive_some() == b""


async def test_a_listener_bounds_its_upgrades(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "MAX_HANDSHAKES", 0)
    async with listening() as (stream, _):
        assert await stream.receive_some() == b""


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "404"),
        (b"\x13/multistream/1.0.0\n", "no WebSocket"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", "no WebSocket"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, "no WebSocket"),
    ],
)
async def test_a_dial_to_something_else_says_so(words: bytes, reason: str) -> None:
    async with tcp_server([words]) as (address, _):
        with pytest.raises(DialError, match=reason):
            await WebSocketTransport().dial(address)


async def test_a_dial_cancelled_during_the_upgrade_leaves_nothing_open() -> None:
    async with tcp_server([]) as (address, ended):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(WebSocketTransport().dial, address)
                await trio.testing.wait_all_tasks_blocked(0.01)
                scope.cancel()
        await ended.wait()


# Hosts


async def test_a_host_on_all_interfaces_says_where_it_is() -> None:
    wildcard = Multiaddr("/ip4/0.0.0.0/tcp/0/ws")
    with trio.fail_after(PATIENCE_S):
        async with (
            open_host(Identity.generate(), listen=[wildcard]) as server,
            open_host(Identity.generate()) as client,
        ):
            assert [websocket_host_port(address) is not None for address in server.addresses]
            assert {str(address).split("/")[2] for address in server.addresses} >= {"127.0.0.1"}
            assert "0.0.0.0" not in " ".join(map(str, server.addresses))
            connection = await client.connect(server.peer_id, server.addresses[-1:])
            assert connection.remote == server.addresses[-1]
            assert await ping_once(client, server.peer_id) > 0


async def test_a_host_listens_on_tcp_and_websocket_side_by_side() -> None:
    listen = [Multiaddr("/ip4/127.0.0.1/tcp/0"), ANYWHERE]
    with trio.fail_after(PATIENCE_S):
        async with open_host(Identity.generate(), listen=listen) as server:
            assert [host_port(address) is not None for address in server.addresses] == [True, False]
            for address in server.addresses:
                async with open_host(Identity.generate()) as client:
                    connection = await client.connect(server.peer_id, [address])
                    assert connection.remote == address
