"""Connections through a relay: ``.../p2p/RELAY/p2p-circuit``.

A circuit is a stream to the relay that the relay has joined to a stream to the other peer. It is a byte stream like any
other: the swarm secures and muxes it from end to end, so that the relay sees neither what is said nor in which
protocols. Listening is holding a reservation at the relay.

Source: https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio
from multiaddr.exceptions import Error as MultiaddrError

from net import addresses, errors
from net.addresses import Multiaddr, PeerAddress, relayed_by
from net.identity import PeerId
from net.io import SingleUse, check_max_bytes
from net.mux.base import Stream
from net.nurseries import open_service_nursery
from net.relay import vouchers, wire
from net.relay.wire import HopMessage, Status, StopMessage
from net.transports.base import Accept, Arrived, RawConnection, TrafficLimit

if TYPE_CHECKING:
    from net.host import Host
    from net.swarm import Connection

__all__ = ["CircuitStream", "CircuitTransport", "Reservation"]

logger = logging.getLogger(__name__)

ANSWER_S = 10.0  # of a relay to a RESERVE, and of a relay that asks us to take a circuit
MAX_ADDRESSES = 4  # of one relay that we announce
# Of a reservation. Clocks may differ by an hour: an end that has passed already, or nearly, is no end.
LEAST_LIFETIME_S, DEFAULT_LIFETIME_S, MAX_LIFETIME_S = 10.0, 120.0, 3600.0
RENEW_AFTER = 0.75  # of the lifetime
CHECK_S = 1.0  # between looks whether the relay still answers: without it nobody reaches us
RETRY_S, MAX_RETRY_S = 1.0, 60.0  # of a listener whose relay is gone

REASONS: dict[int, str] = {
    Status.RESERVATION_REFUSED: "the relay gives no reservation",
    Status.RESOURCE_LIMIT_EXCEEDED: "the relay has no room for another circuit",
    Status.PERMISSION_DENIED: "the relay does not permit it",
    Status.CONNECTION_FAILED: "the relay could not reach the peer",
    Status.NO_RESERVATION: "the peer has no reservation at the relay",
    Status.MALFORMED_MESSAGE: "the relay did not understand our message",
    Status.UNEXPECTED_MESSAGE: "the relay did not expect our message",
}


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """A relay's promise to carry circuits to us.

    Attributes:
        relay: whose.
        addresses: where we can be dialled through it, without our ``/p2p/...``.
        lifetime_s: from when it was made.
        limit: of each circuit, as far as the relay tells.
    """

    relay: PeerAddress
    addresses: tuple[Multiaddr, ...]
    lifetime_s: float
    limit: TrafficLimit | None


@dataclass(kw_only=True)
class _Listening:
    accept: Accept
    at: Multiaddr


class CircuitTransport:
    """Circuits over the connections of the host that it is attached to."""

    def __init__(self) -> None:
        self._host: Host | None = None
        self._listening: dict[PeerId, _Listening] = {}

    def attach(self, host: Host) -> None:
        if self._host is not None:
            raise errors.LocalProtocolError("this transport belongs to another host already")
        self._host = host
        host.swarm.kept.append(self._listening)  # the relays where we have reservations
        host.handle(wire.STOP, self._on_stop)

    @property
    def host(self) -> Host:
        if self._host is None:
            raise errors.LocalProtocolError("a circuit needs a host: give the transport to one")
        return self._host

    # Dialling

    def can_dial(self, address: Multiaddr) -> bool:
        return addresses.relay_of(address) is not None

    async def dial(self, address: Multiaddr, peer_id: PeerId | None = None) -> RawConnection:
        relay = _relay_of(address)
        if peer_id is None:
            raise errors.DialError(f"{address}: a relay has to be told which peer is wanted")
        try:
            stream = await self.host.open_stream(relay.peer_id, [wire.HOP], [relay.address])
        except errors.ProtocolNotSupported as error:
            raise errors.DialError(f"{address}: the peer there is no relay") from error
        except errors.NetError as error:
            raise errors.DialError(f"{address}: {error}") from error
        try:
            await wire.send_message(stream, HopMessage(type=HopMessage.CONNECT, peer=wire.peer(peer_id)))
            answer = await wire.receive_hop(stream)
            status = wire.status_of(answer)
            if status != Status.OK:
                raise errors.DialError(f"{address}: {_reason(status)}")
        except BaseException as error:
            stream.reset()
            if isinstance(error, errors.NetError) and not isinstance(error, errors.DialError):
                raise errors.DialError(f"{address}: {error}") from error
            raise
        limit = wire.read_limit(answer)
        return RawConnection(stream=CircuitStream(stream, limit), local=None, remote=address, limit=limit)

    # Listening

    async def listen(
        self,
        address: Multiaddr,
        accept: Accept,
        *,
        task_status: trio.TaskStatus[Sequence[Multiaddr]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Hold a reservation, and get another when it is lost, as often as it takes."""
        relay = _relay_of(address)
        pause_s = RETRY_S
        bound: Sequence[Multiaddr] = ()
        async with open_service_nursery() as nursery:  # of the circuits, which outlive a reservation

            async def accept_here(arrived: Arrived) -> None:
                ended = trio.Event()
                nursery.start_soon(_run_then_set, accept, arrived, ended)
                await ended.wait()

            while True:
                try:
                    async with open_service_nursery() as holding:
                        reservation = await holding.start(self.reserve, relay, accept_here)
                        pause_s = RETRY_S
                        if not bound:
                            bound = reservation.addresses[:1]
                            task_status.started(bound)
                except errors.NetError as error:
                    if not bound:
                        text = str(error)
                        raise errors.AddressError(
                            text if str(address) in text else f"cannot listen on {address}: {text}"
                        ) from error
                    logger.warning("%s: %s", address, error)
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_RETRY_S)

    async def reserve(
        self,
        relay: PeerAddress,
        accept: Accept,
        *,
        task_status: trio.TaskStatus[Reservation] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Hold a reservation at ``relay``, and give what comes through it to ``accept``, until cancelled.

        Raises:
            AddressError: this is done already.
            DialError: the relay cannot be reached.
            ProtocolNotSupported: it is no relay.
            ReservationRefused: it gives none, or one that is not to be believed.
            ConnectionLost, PeerFailed, StreamReset, RemoteProtocolError: it did, and does no more.
        """
        if relay.peer_id in self._listening:
            raise errors.AddressError(f"{relayed_by(relay)} is in use: circuits from there are accepted already")
        self._listening[relay.peer_id] = _Listening(accept=accept, at=relayed_by(relay))
        try:
            connection = await self._connect(relay)
            reservation = await self._request(relay, connection)
            self._listening[relay.peer_id].at = reservation.addresses[0]
            task_status.started(reservation)
            while True:
                with trio.move_on_after(RENEW_AFTER * reservation.lifetime_s):
                    await _wait_for_end(connection)
                connection = self._still_connected(relay, connection)
                reservation = await self._request(relay, connection)
        finally:
            del self._listening[relay.peer_id]

    async def _connect(self, relay: PeerAddress) -> Connection:
        connection = await self.host.connect(relay.peer_id, [relay.address])
        if connection.relayed:
            raise errors.DialError(f"{relay} is itself behind a relay")
        return connection

    def _still_connected(self, relay: PeerAddress, connection: Connection) -> Connection:
        """The same connection, or the one that stayed of two."""
        current = connection if not connection.ended.is_set() else self.host.swarm.connection(relay.peer_id)
        if current is None or current.relayed:
            raise errors.ConnectionLost(f"the connection to the relay {relay.peer_id} has ended")
        return current

    async def _request(self, relay: PeerAddress, connection: Connection) -> Reservation:
        with trio.move_on_after(ANSWER_S):
            stream = await self.host.open_stream_over(connection, [wire.HOP])
            try:
                await wire.send_message(stream, HopMessage(type=HopMessage.RESERVE))
                answer = await wire.receive_hop(stream)
            except BaseException:
                stream.reset()
                raise
            await stream.aclose()
            status = wire.status_of(answer)
            if status != Status.OK:
                raise errors.ReservationRefused(f"{relay.peer_id}: {_reason(status)}")
            where = connection.remote if connection.outbound else relay.address
            return _read_reservation(PeerAddress(address=where, peer_id=relay.peer_id), self.host.peer_id, answer)
        raise errors.PeerFailed(relay.peer_id, f"no answer to a request for a reservation in {ANSWER_S:g} s")

    async def _on_stop(self, connection: Connection, stream: Stream) -> None:
        """A relay brings a circuit. It is taken if we listen there; who comes through it, the swarm finds out."""
        with trio.fail_after(ANSWER_S):
            try:
                message = await wire.receive_stop(stream)
                wire.read_peer(message)
            except errors.RemoteProtocolError:
                await _answer_stop(stream, Status.MALFORMED_MESSAGE)
                raise
            listening = self._listening.get(connection.peer_id)
            if message.type != StopMessage.CONNECT:
                await _answer_stop(stream, Status.UNEXPECTED_MESSAGE)
                return
            if listening is None or connection.relayed:
                await _answer_stop(stream, Status.PERMISSION_DENIED)
                return
            await _answer_stop(stream, Status.OK)
        limit = wire.read_limit(message)
        circuit = CircuitStream(stream, limit)
        await listening.accept(RawConnection(stream=circuit, local=listening.at, remote=listening.at, limit=limit))


class CircuitStream(trio.abc.Stream):
    """A mux's stream as a connection: trio's errors, and an end that is an end in both directions.

    A relay's limit is kept from our side: instead of having a connection cut in the midst, sending more than the limit
    allows raises ``trio.BrokenResourceError``.
    """

    def __init__(self, stream: Stream, limit: TrafficLimit | None) -> None:
        self._stream = stream
        self._left_bytes = limit.bytes if limit is not None else None
        self._sending = SingleUse("sending on this circuit")
        self._receiving = SingleUse("receiving from this circuit")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._spend(len(data))
            try:
                await self._stream.send_all(data)
            except errors.NetError as error:
                raise trio.BrokenResourceError(str(error)) from error

    async def wait_send_all_might_not_block(self) -> None:
        with self._sending:
            await trio.lowlevel.checkpoint()
            try:
                await self._stream.send_all(b"")  # which waits for room, and knows of a close
            except errors.NetError:
                pass  # sending would tell at once

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        check_max_bytes(max_bytes)
        with self._receiving:
            await trio.lowlevel.checkpoint()
            try:
                return await self._stream.receive_some(max_bytes)
            except errors.NetError as error:
                raise trio.BrokenResourceError(str(error)) from error

    async def aclose(self) -> None:
        await self._stream.leave()

    def _spend(self, count: int) -> None:
        if self._left_bytes is not None:
            if count > self._left_bytes:
                raise trio.BrokenResourceError("the relay carries no more in this circuit")
            self._left_bytes -= count


async def _wait_for_end(connection: Connection) -> None:
    """Until the connection ends, which it does soon when nobody answers any more."""
    while not connection.ended.is_set():
        connection.mux.check()
        with trio.move_on_after(CHECK_S):
            await connection.ended.wait()


async def _run_then_set(accept: Accept, arrived: Arrived, ended: trio.Event) -> None:
    try:
        await accept(arrived)
    finally:
        ended.set()


def _relay_of(address: Multiaddr) -> PeerAddress:
    relay = addresses.relay_of(address)
    if relay is None:
        raise errors.AddressError(f"{address} is no address of a circuit (one looks like .../p2p/RELAY/p2p-circuit)")
    return relay


def _reason(status: int) -> str:
    """What an answer other than OK means."""
    return REASONS.get(status, f"the relay answered with status {status}")


async def _answer_stop(stream: Stream, status: Status) -> None:
    await wire.send_message(stream, StopMessage(type=StopMessage.STATUS, status=wire.write_status(status)))


def _read_reservation(relay: PeerAddress, me: PeerId, answer: Any) -> Reservation:
    """What the relay granted.

    Raises:
        ReservationRefused: there is a voucher, and it does not hold.
    """
    granted = answer.reservation
    if granted.voucher:  # rust-libp2p's relays give none
        try:
            vouchers.check(granted.voucher, relay=relay.peer_id, peer_id=me, now_s=time.time())
        except errors.RecordError as error:
            raise errors.ReservationRefused(f"{relay.peer_id}: {error}") from error
    remaining_s = granted.expire - time.time()
    return Reservation(
        relay=relay,
        addresses=_circuit_addresses(relay, granted.addrs),
        lifetime_s=min(remaining_s, MAX_LIFETIME_S) if remaining_s >= LEAST_LIFETIME_S else DEFAULT_LIFETIME_S,
        limit=wire.read_limit(answer),
    )


def _circuit_addresses(relay: PeerAddress, told: Iterable[bytes]) -> tuple[Multiaddr, ...]:
    """Where we have met the relay, then where it says that it is."""
    found = {relayed_by(relay): None}
    for raw in list(told)[: 4 * MAX_ADDRESSES]:
        try:
            where = addresses.parse_peer(str(Multiaddr(raw)))
        except (errors.AddressError, MultiaddrError, ValueError, TypeError):
            continue  # a kind that we do not know, or nonsense
        if where.peer_id == relay.peer_id and not addresses.is_relayed(where.address):
            found[relayed_by(where)] = None
    return tuple(found)[:MAX_ADDRESSES]
