"""WebSocket: ``/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT/ws``, for peers and paths that let nothing else through.

Wire: an HTTP/1.1 upgrade of ``/`` without subprotocol or extension, then binary messages whose payloads,
one after the other, are the byte stream; where one message ends means nothing. Ours are of at most
``FRAME_BYTES``; a peer's may be of any size, for they are handed on as they arrive. A ping is answered
(the latest, when several came at once), text ends the connection, and so does a close frame: one with an
ordinary code reads as the end, every other end as a broken connection.

There is no TLS around it (``/tls/ws``): the secure channel inside authenticates the peer.

Source: RFC 6455; https://github.com/libp2p/specs/tree/master/websockets
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import trio
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    RejectConnection,
    Request,
    TextMessage,
)
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import ProtocolError

from net import addresses
from net.addresses import Multiaddr
from net.errors import AddressError, DialError
from net.identity import PeerId
from net.io import SingleUse, check_max_bytes
from net.nurseries import open_service_nursery
from net.transports.base import Accept, RawConnection
from net.transports.socket_stream import SocketStream
from net.transports.tcp import TcpTransport, connect, local_address

FRAME_BYTES = 64 * 1024
RECEIVE_BYTES = 64 * 1024
HANDSHAKE_RECEIVE_BYTES = 4096
HANDSHAKE_S = 10.0  # of a listener; a dialler's caller sets the deadline
MAX_HANDSHAKES = 128  # upgrades under way at one listener: connections that no other budget counts yet
GOODBYE_S = 1.0
ORDINARY = (CloseReason.NORMAL_CLOSURE, CloseReason.GOING_AWAY, CloseReason.NO_STATUS_RCVD)
SUFFIX = Multiaddr("/ws")


class WebSocketTransport:
    """WebSockets over TCP."""

    def can_dial(self, address: Multiaddr) -> bool:
        return addresses.websocket_host_port(address) is not None

    async def dial(self, address: Multiaddr, peer_id: PeerId | None = None) -> RawConnection:
        host, port = _host_port(address)
        connected = await connect(address, host, port)
        local = local_address(connected).encapsulate(SUFFIX)
        tcp = SocketStream(connected)
        opening = Request(host=f"[{host}]:{port}" if ":" in host else f"{host}:{port}", target="/")
        try:
            stream = await _handshake(tcp, opening)
        except BaseException as error:
            await trio.aclose_forcefully(tcp)
            if isinstance(error, (ProtocolError, trio.BrokenResourceError)):
                raise DialError(f"{address}: no WebSocket there ({error})") from error
            raise
        return RawConnection(stream=stream, local=local, remote=address)

    async def listen(
        self,
        address: Multiaddr,
        accept: Accept,
        *,
        task_status: trio.TaskStatus[Sequence[Multiaddr]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        _host_port(address)
        handshakes = 0

        async def upgrade(raw: RawConnection) -> None:
            nonlocal handshakes
            if handshakes >= MAX_HANDSHAKES:
                await trio.aclose_forcefully(raw.stream)
                return
            handshakes += 1
            try:
                stream = await _answer(raw.stream)
            finally:
                handshakes -= 1
            if stream is not None:
                local = None if raw.local is None else raw.local.encapsulate(SUFFIX)
                await accept(RawConnection(stream=stream, local=local, remote=raw.remote.encapsulate(SUFFIX)))

        async with open_service_nursery() as nursery:
            bound = await nursery.start(TcpTransport().listen, address.decapsulate(SUFFIX), upgrade)
            task_status.started([tcp.encapsulate(SUFFIX) for tcp in bound])


class WebSocketStream(trio.abc.Stream):
    """The byte stream inside an open WebSocket. One task may send while another receives.

    Cancellation: of ``receive_some``, nothing is lost; of ``send_all``, the connection may have been left
    inside a frame, and then sends no more (``trio.BrokenResourceError``).
    """

    def __init__(self, stream: trio.abc.Stream, protocol: WSConnection) -> None:
        self._stream = stream
        self._protocol = protocol
        self._received: deque[bytes] = deque()
        self._ended = False  # the peer said goodbye properly
        self._broken: str | None = None
        self._closed = False
        self._torn = False  # a frame is on its way, or was when its sender was cancelled
        self._pong = b""
        self._wire = trio.Lock()
        self._sending = SingleUse("sending on this WebSocket")
        self._receiving = SingleUse("receiving from this WebSocket")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_open()
            view = memoryview(data).cast("B")
            for start in range(0, len(view), FRAME_BYTES):
                try:
                    frame = self._protocol.send(BytesMessage(data=bytes(view[start : start + FRAME_BYTES])))
                except ProtocolError as error:
                    raise trio.BrokenResourceError("the WebSocket is closing") from error
                await self._transmit(frame)

    async def wait_send_all_might_not_block(self) -> None:
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_open()
            await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        check_max_bytes(max_bytes)
        with self._receiving:
            await trio.lowlevel.checkpoint()
            self._check_open()
            self._take_events()
            while not self._received:
                if self._ended:
                    return b""
                if self._broken is not None:
                    raise trio.BrokenResourceError(self._broken)
                data = await self._stream.receive_some(RECEIVE_BYTES)
                if data:
                    self._protocol.receive_data(bytes(data))
                    self._take_events()
                    await self._answer_ping()
                else:
                    self._broken = "the connection ended without the WebSocket's close frame"
            part = self._received.popleft()
            if max_bytes is not None and len(part) > max_bytes:
                self._received.appendleft(part[max_bytes:])
                part = part[:max_bytes]
            return part

    async def aclose(self) -> None:
        """Say goodbye for at most a second, and close; the peer's goodbye is not awaited."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        try:
            if not self._torn:
                with trio.move_on_after(GOODBYE_S):
                    await self._stream.send_all(self._protocol.send(CloseConnection(code=CloseReason.NORMAL_CLOSURE)))
        except (ProtocolError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the other side is gone: there is nobody to say goodbye to
        finally:
            await self._stream.aclose()

    def _take_events(self) -> None:
        for event in self._protocol.events():
            if isinstance(event, BytesMessage):
                if event.data:
                    self._received.append(bytes(event.data))
            elif isinstance(event, Ping):
                self._pong = self._protocol.send(event.response())
            elif isinstance(event, TextMessage):
                self._broken = "the peer sent text over the WebSocket"
                return
            elif isinstance(event, CloseConnection):
                # The library reports the peer's nonsense as a close, too, but then does not change its state.
                proper = self._protocol.state is ConnectionState.REMOTE_CLOSING and event.code in ORDINARY
                self._ended = proper
                self._broken = None if proper else f"the WebSocket was closed: {event.reason or event.code}"
                return

    async def _answer_ping(self) -> None:
        """Send a waiting pong, unless a sender is at work and will."""
        if self._pong and not self._wire.locked():
            frame, self._pong = self._pong, b""
            try:
                await self._transmit(frame)
            except trio.BrokenResourceError:
                pass  # reading on tells

    async def _transmit(self, frame: bytes) -> None:
        async with self._wire:
            while frame:
                if self._torn:
                    raise trio.BrokenResourceError("a cancelled send left the WebSocket inside a frame")
                self._torn = True
                await self._stream.send_all(frame)
                self._torn = False
                frame, self._pong = self._pong, b""

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this WebSocket was closed here")


async def _answer(stream: trio.abc.Stream) -> WebSocketStream | None:
    """The listener's side of the upgrade; None, and ``stream`` closed, when it comes to nothing."""
    try:
        with trio.fail_after(HANDSHAKE_S):
            return await _handshake(stream, None)
    except (ProtocolError, trio.BrokenResourceError, trio.TooSlowError):
        await trio.aclose_forcefully(stream)
        return None  # whoever came speaks no WebSocket, or has left: nobody to tell
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


async def _handshake(stream: trio.abc.Stream, opening: Request | None) -> WebSocketStream:
    """Upgrade: as the dialler with an ``opening``, as the listener without.

    The library bounds the size of what it reads (16 KiB of HTTP headers).

    Raises:
        wsproto.utilities.ProtocolError: the other side speaks no WebSocket, or refuses.
        trio.BrokenResourceError: it has left.
    """
    protocol = WSConnection(ConnectionType.SERVER if opening is None else ConnectionType.CLIENT)
    if opening is not None:
        await stream.send_all(protocol.send(opening))
    while True:
        data = await stream.receive_some(HANDSHAKE_RECEIVE_BYTES)
        if not data:
            raise trio.BrokenResourceError("it closed the connection")
        protocol.receive_data(bytes(data))
        event = next(protocol.events(), None)
        if isinstance(event, Request):
            await stream.send_all(protocol.send(AcceptConnection()))
        if isinstance(event, (Request, AcceptConnection)):
            return WebSocketStream(stream, protocol)
        if event is not None:
            raise ProtocolError(_refusal(event))


def _refusal(event: Event) -> str:
    return f"it answered HTTP status {event.status_code}" if isinstance(event, RejectConnection) else "it answered no"


def _host_port(address: Multiaddr) -> tuple[str, int]:
    where = addresses.websocket_host_port(address)
    if where is None:
        raise AddressError(f"{address} is no WebSocket address (one looks like /ip4/0.0.0.0/tcp/4002/ws)")
    return where
