"""One UDP socket, and all QUIC connections over it: those that were dialled from it and those that it accepted.

Datagrams belong to the connection whose id they name (RFC 9000, section 5.2). What names none begins a new
connection, if this endpoint listens, or is dropped; nothing is answered that an unknown sender could aim at
somebody else, but for a Retry and a version negotiation, which are smaller than what asked for them.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import trio
from aioquic._buffer import Buffer
from aioquic.quic.packet import (
    QuicPacketType,
    QuicProtocolVersion,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.retry import QuicRetryTokenHandler

from net import addresses, errors
from net.addresses import ip_group
from net.security.certificate import Credentials
from net.transports.quic.connection import GOODBYE_S, QuicConnection
from net.transports.quic.core import BASE_DATAGRAM_BYTES, CID_BYTES, QuicCore, configure
from net.transports.quic.udp import Address, UdpSocket

logger = logging.getLogger(__name__)

MAX_HANDSHAKES = 128  # inbound, whose peer is not known yet
RETRY_FROM = 32  # of them, from where a newcomer proves its address first
HANDSHAKES_PER_IP_GROUP = 8  # of those who have, as connections are counted
HANDSHAKE_S = 10.0
TURN_DATAGRAMS = 128  # before others have their turn
MAX_WAITING_DATAGRAMS = 4096  # for the socket; more are dropped, as networks do
MAX_REMEMBERED = 1024  # ids of connections of which the peer may not know yet that they are over
TIMES_REPEATED = 3  # a bound: two that are both over must not answer each other for ever
LONG_HEADER, FIXED_BIT = 0x80, 0x40


class OnConnection(Protocol):
    def __call__(self, connection: QuicConnection, address: Address, /) -> Awaitable[None]: ...


class Endpoint:
    """See the module; ``run`` carries it, and closes the socket.

    Args:
        udp: a bound socket, which it takes over.
        credentials: what our side shows.
        accept: called as a task with each authenticated inbound connection; None to accept none.
    """

    def __init__(self, udp: UdpSocket, credentials: Credentials, accept: OnConnection | None = None) -> None:
        self.udp = udp
        self._client = configure(credentials, client=True)
        self._server = configure(credentials, client=False)
        self._accept = accept
        self._connections: dict[QuicConnection, set[bytes]] = {}
        self._by_id: dict[bytes, QuicConnection] = {}
        self._dialling: dict[QuicConnection, Address] = {}
        self._handshakes = 0
        self._by_group: Counter[str | None] = Counter()  # None: the address is not proven, or loopback
        self._retry = QuicRetryTokenHandler()
        self._last_words: OrderedDict[bytes, list[bytes]] = OrderedDict()  # by id, of connections that are over
        self._waiting: deque[tuple[bytes, Address]] = deque()  # for the socket
        self._has_waiting = trio.Event()
        self._tasks: trio.Nursery | None = None
        self._accepting: trio.Nursery | None = None
        self._changed = trio.lowlevel.ParkingLot()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry all connections until cancelled; then they say goodbye, for a little longer than a second."""
        carriers = trio.CancelScope(shield=True)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._carry, carriers)
                self._accepting = nursery
                task_status.started()
                try:
                    await trio.sleep_forever()
                finally:
                    self._accepting = None
                    await self._say_goodbye()
                    carriers.cancel()
        finally:
            self.udp.close()

    async def _carry(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                self._tasks = nursery
                nursery.start_soon(self._receive)
                nursery.start_soon(self._flush)
                task_status.started()
        self._tasks = None

    async def _say_goodbye(self) -> None:
        for connection in list(self._connections):
            self._guard(connection, connection.close)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.5 * GOODBYE_S):
            while self._connections:
                await self._changed.park()
        for connection in list(self._connections):
            connection.end(errors.ConnectionLost("the connection was closed"))

    def dial(self, address: Address) -> QuicConnection:
        """Begin a connection; wait for its ``established``.

        Raises:
            ConnectionLost: the endpoint does not run (any more).
        """
        if self._tasks is None or self._accepting is None:
            raise errors.ConnectionLost("the socket is closed")
        core = QuicCore(self._client)
        connection = self._add(core, [core.host_cid])
        self._dialling[connection] = address
        connection.connect(address)
        return connection

    def rebind(self, udp: UdpSocket) -> None:
        """Go on over another socket: connections that we dialled move along, those that we accepted are lost."""
        old, self.udp = self.udp, udp
        trio.lowlevel.notify_closing(old.socket)
        old.close()
        self.move()

    def move(self) -> None:
        """Let the peers know that we are to be found elsewhere, by a datagram from there."""
        for connection in list(self._connections):
            self._guard(connection, connection.move)

    def punch(self, data: bytes, address: Address) -> None:
        """Send what no QUIC endpoint takes for a packet."""
        self.udp.send([data], address)

    # What connections call

    def can_send(self) -> bool:
        return not self._waiting

    def send(self, connection: QuicConnection, datagrams: Sequence[tuple[bytes, Address]]) -> None:
        if self._waiting:
            room = MAX_WAITING_DATAGRAMS - len(self._waiting)
            self._waiting.extend(datagrams[: max(room, 0)])
            return
        at = 0
        while at < len(datagrams):
            address, end = datagrams[at][1], at + 1
            while end < len(datagrams) and datagrams[end][1] == address:
                end += 1
            sent = self.udp.send([data for data, _ in datagrams[at:end]], address)
            at += sent
            if at < end:
                self._waiting.extend(datagrams[at:])
                self._has_waiting.set()
                return

    def add_id(self, connection: QuicConnection, connection_id: bytes) -> None:
        self._connections[connection].add(connection_id)
        self._by_id[connection_id] = connection

    def drop_id(self, connection_id: bytes) -> None:
        connection = self._by_id.pop(connection_id, None)
        if connection is not None:
            self._connections[connection].discard(connection_id)

    def forget(self, connection: QuicConnection, last_words: bytes | None) -> None:
        for connection_id in self._connections.pop(connection, ()):
            self._by_id.pop(connection_id, None)
            if last_words is not None:
                self._last_words[connection_id] = [last_words] * TIMES_REPEATED
        while len(self._last_words) > MAX_REMEMBERED:
            self._last_words.popitem(last=False)
        self._dialling.pop(connection, None)
        self._changed.unpark_all()

    def _add(self, core: QuicCore, ids: Sequence[bytes]) -> QuicConnection:
        if self._tasks is None:
            raise errors.ConnectionLost("the socket is closed")
        connection = QuicConnection(core, self)
        self._connections[connection] = set()
        for connection_id in ids:
            self.add_id(connection, connection_id)
        self._tasks.start_soon(self._keep_time, connection)
        return connection

    async def _keep_time(self, connection: QuicConnection) -> None:
        while not connection.ended.is_set():
            try:
                await connection.keep_time()
            except Exception:  # a bug of ours or of the library's: loud, but it ends this connection alone
                logger.exception("a QUIC connection failed")
                connection.end(errors.ConnectionLost("the connection failed"))

    # The socket

    async def _receive(self) -> None:
        while True:
            udp = self.udp
            try:
                await trio.lowlevel.wait_readable(udp.socket)
            except trio.ClosedResourceError:
                continue  # we have another one
            count = 0
            touched: dict[QuicConnection, None] = {}
            while count < TURN_DATAGRAMS:
                try:
                    datagrams, address = udp.receive()
                except OSError:  # nothing more, or something that we sent did not arrive
                    self._take_errors()
                    break
                count += len(datagrams)
                touched |= dict.fromkeys(self._dispatch(datagrams, address))
            for connection in touched:  # once for all that has come
                self._guard(connection, connection.transmit)

    def _take_errors(self) -> None:
        """Nobody listens where somebody is dialled: no need to wait for the deadline. Only then is it believed."""
        for why, address in self.udp.errors():
            for connection, dialled in list(self._dialling.items()):
                if dialled[:2] == address[:2] and not connection.established.is_set():
                    connection.end(errors.DialError(why))

    async def _flush(self) -> None:
        """Send what the socket had no room for."""
        while True:
            while self._waiting:
                data, address = self._waiting[0]
                if self.udp.send([data], address):
                    self._waiting.popleft()
                    continue
                try:
                    await trio.lowlevel.wait_writable(self.udp.socket)
                except trio.ClosedResourceError:
                    await trio.lowlevel.checkpoint()  # we have another one
            for connection in list(self._connections):
                self._guard(connection, connection.transmit)
            if not self._waiting:
                self._has_waiting = trio.Event()
                await self._has_waiting.wait()

    def _dispatch(self, datagrams: list[bytes], address: Address) -> Iterator[QuicConnection]:
        """Give a run of datagrams to whom it belongs, nearly always one connection, which then may have to answer."""
        at = 0
        while at < len(datagrams):
            name, end = _connection_id(datagrams[at]), at + 1
            while end < len(datagrams) and _connection_id(datagrams[end]) == name:
                end += 1
            connection = self._by_id.get(name) if name is not None else None
            if connection is None and name is not None:
                connection = self._meet(datagrams[at], name, address)
            if connection is not None:
                self._guard(connection, partial(connection.receive, datagrams[at:end], address))
                if connection.core.has_begun or connection.core.is_client:
                    yield connection
                else:
                    connection.end(errors.RemoteProtocolError("the first datagram made no sense"))
            at = end

    def _guard(self, connection: QuicConnection, work: Callable[[], None]) -> None:
        """The boundary around everything that a peer's bytes can make the library do."""
        try:
            work()
        except Exception:  # a bug of ours or of the library's: loud, but it ends this connection alone
            logger.exception("a QUIC connection failed")
            connection.end(errors.ConnectionLost("the connection failed"))

    # Newcomers

    def _meet(self, datagram: bytes, name: bytes, address: Address) -> QuicConnection | None:
        """A connection for the first datagram of a newcomer, if that is what it is."""
        if name in self._last_words:
            if self._last_words[name]:
                self.udp.send([self._last_words[name].pop()], address)  # they were lost, or met the peer's own
            return None
        if self._accept is None or self._accepting is None or len(datagram) < BASE_DATAGRAM_BYTES:
            return None
        try:
            header = pull_quic_header(Buffer(data=datagram), host_cid_length=CID_BYTES)
        except ValueError:
            return None
        if header.packet_type is QuicPacketType.VERSION_NEGOTIATION or header.version is None:
            return None
        if header.version != QuicProtocolVersion.VERSION_1:
            versions: list[int] = [QuicProtocolVersion.VERSION_1]
            answer = encode_quic_version_negotiation(
                source_cid=header.destination_cid, destination_cid=header.source_cid, supported_versions=versions
            )
            self.udp.send([answer], address)
            return None
        if header.packet_type is not QuicPacketType.INITIAL or self._handshakes >= MAX_HANDSHAKES:
            return None
        original, retried = header.destination_cid, None
        if header.token:
            try:
                original = self._retry.validate_token(
                    address=address, destination_cid=original, token=header.token, now=trio.current_time()
                )
                retried = header.destination_cid
            except ValueError:
                pass  # of another time, or another server: as good as none
        if retried is None and self._handshakes >= RETRY_FROM:
            self._ask_again(header.destination_cid, header.source_cid, address)
            return None
        group = None if retried is None else ip_group(addresses.quic(*address[:2]))
        if group is not None and self._by_group[group] >= HANDSHAKES_PER_IP_GROUP:
            return None
        core = QuicCore(self._server, original_destination_connection_id=original, retry_source_connection_id=retried)
        connection = self._add(core, [core.host_cid, name])
        self._handshakes += 1  # at once: a turn of the loop may bring many more
        self._by_group[group] += 1
        self._accepting.start_soon(self._shake_hands, connection, address, group)
        return connection

    def _ask_again(self, destination: bytes, source: bytes, address: Address) -> None:
        """Have the sender prove that it is where it says, before we remember anything of it."""
        name = os.urandom(CID_BYTES)
        token = self._retry.create_token(
            address=address,
            original_destination_connection_id=destination,
            retry_source_connection_id=name,
            now=trio.current_time(),
        )
        answer = encode_quic_retry(
            version=QuicProtocolVersion.VERSION_1,
            source_cid=name,
            destination_cid=source,
            original_destination_cid=destination,
            retry_token=token,
        )
        self.udp.send([answer], address)

    async def _shake_hands(self, connection: QuicConnection, address: Address, group: str | None) -> None:
        """One inbound connection, from its first datagram to its end."""
        try:
            with trio.move_on_after(HANDSHAKE_S):
                await connection.established.wait()
        finally:
            self._handshakes -= 1
            self._by_group -= Counter([group])  # which drops what has come to nothing
            if connection.peer_id is None:
                why = errors.DialError(f"the handshake took longer than {HANDSHAKE_S:g} s")
                self._guard(connection, partial(connection.leave, why))
        if connection.peer_id is not None and not connection.ended.is_set() and self._accept is not None:
            await self._accept(connection, address)
        elif connection.failure is not None:
            logger.debug("inbound connection from %s: %s", address[:2], connection.failure)


def _connection_id(datagram: bytes) -> bytes | None:
    """Whose datagram it is, by its header; None if it is no QUIC packet (RFC 8999, section 5)."""
    if len(datagram) < CID_BYTES + 1:
        return None
    first = datagram[0]
    if first & LONG_HEADER:
        length = datagram[5]
        return datagram[6 : 6 + length] if length <= 20 and len(datagram) >= 6 + length else None
    return datagram[1 : 1 + CID_BYTES] if first & FIXED_BIT else None
