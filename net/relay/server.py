"""A relay: gives reservations, and joins two streams into a circuit when a peer asks for another that holds one.

What passes is forwarded as it comes, in turns that are fair between users (``fairness.py``); nothing is kept but what
waits for its turn or for the other side, which is bounded by the windows of the two streams. An end passes on as an
end, a reset as a reset.

Source: https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import trio

from net import errors
from net.addresses import Multiaddr, PeerAddress, ip_group, is_relayed
from net.host import Host
from net.identity import PeerId
from net.mux.base import Stream
from net.nurseries import open_service_nursery
from net.relay import vouchers, wire
from net.relay.reservations import Circuit, Refused, RelayLimits, Reservations
from net.relay.turns import Turns
from net.relay.wire import HopMessage, Status, StopMessage
from net.swarm import Connection

logger = logging.getLogger(__name__)

REQUEST_S = 10.0  # for a request to come, once its stream is open
STOP_S = 10.0  # for the target to take a circuit; go-libp2p gives it 30
RETURN_S = 2.5  # for who has lost its connection to come back: its network may have changed
SWEEP_S = 5.0  # between looks for peers with reservations that have left
PIECE_BYTES = 64 * 1024  # forwarded at a turn, about a record
MAX_ADDRESSES = 16  # told to those who reserve


@dataclass(kw_only=True)
class Traffic:
    """What has been forwarded since the relay was started."""

    bytes_in: int = 0
    bytes_out: int = 0
    circuits: int = 0  # opened


class RelayServer:
    """Serves on ``host`` while ``run`` runs.

    Args:
        host: a public one, or nobody will find the way.
        limits: budgets.
    """

    def __init__(self, host: Host, limits: RelayLimits | None = None) -> None:
        self.host = host
        self.limits = limits or RelayLimits()
        self.traffic = Traffic()
        self._reservations = Reservations(self.limits)
        self._scopes: set[trio.CancelScope] = set()  # of circuits
        self._missed: dict[PeerId, float] = {}  # who has a reservation and no connection, since when
        self._turns: Turns | None = None  # while it runs

    @property
    def reservations(self) -> int:
        return len(self._reservations.peers)

    @property
    def circuits(self) -> int:
        return self._reservations.circuits

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Relay until cancelled. Then reservations end, and circuits are reset."""
        self._turns = Turns(self.limits.bytes_per_s)
        self.host.handle(wire.HOP, self._serve)
        self.host.swarm.kept.append(self._reservations)
        try:
            async with open_service_nursery() as nursery:
                nursery.start_soon(self._turns.run)
                nursery.start_soon(self._sweep)
                task_status.started()
        finally:
            self.host.unhandle(wire.HOP)
            self.host.swarm.kept.remove(self._reservations)
            self._turns = None
            self._reservations.clear()
            for scope in self._scopes:
                scope.cancel()

    async def _sweep(self) -> None:
        """Take reservations back from those who left: without a connection they are good for nothing."""
        while True:
            await trio.sleep(SWEEP_S)
            self._forget_the_gone()

    def _forget_the_gone(self) -> None:
        now = trio.current_time()
        self._reservations.expire(now)
        gone = [each for each in self._reservations.peers if self._direct_connection(each) is None]
        self._missed = {each: self._missed.get(each, now) for each in gone}
        for peer_id, since in self._missed.items():
            if now - since >= RETURN_S:
                self._reservations.drop(peer_id)

    def _direct_connection(self, peer_id: PeerId) -> Connection | None:
        connection = self.host.swarm.connection(peer_id)
        return None if connection is None or connection.relayed else connection

    # Requests

    async def _serve(self, connection: Connection, stream: Stream) -> None:
        try:
            with trio.fail_after(REQUEST_S):
                message = await wire.receive_hop(stream)
            if connection.relayed:
                raise Refused(Status.PERMISSION_DENIED, "asked for through another relay")
            if message.type == HopMessage.RESERVE and message.HasField("type"):
                await self._reserve(connection, stream)
            elif message.type == HopMessage.CONNECT:
                await self._connect(connection, stream, wire.read_peer(message))
            else:
                raise Refused(Status.UNEXPECTED_MESSAGE, "a message that asks for nothing")
        except Refused as refused:
            logger.debug("%s is refused: %s", connection.peer_id, refused)
            await _answer(stream, refused.status)
        except errors.RemoteProtocolError:
            await _answer(stream, Status.MALFORMED_MESSAGE)
            raise

    async def _reserve(self, connection: Connection, stream: Stream) -> None:
        if self._turns is None:
            raise Refused(Status.RESERVATION_REFUSED, "the relay is not running any more")
        now = trio.current_time()
        self._forget_the_gone()
        peer_id = connection.peer_id
        expires_at = self._reservations.reserve(peer_id, ip_group(connection.now_at), now)
        expires_s = int(time.time() + expires_at - now)
        reservation = wire.Reservation(
            expire=expires_s,
            addrs=self._addresses(),
            voucher=vouchers.issue(self.host.identity, peer_id, expires_s),
        )
        limit = wire.write_limit(self.limits.circuit_limit)
        await _answer(stream, Status.OK, reservation=reservation, limit=limit)

    def _addresses(self) -> list[bytes]:
        """Where we are, with our peer id, as reservations tell it."""
        direct = [each for each in self.host.addresses if not is_relayed(each)][:MAX_ADDRESSES]
        us = [PeerAddress(address=each, peer_id=self.host.peer_id) for each in direct]
        return [Multiaddr(str(each)).to_bytes() for each in us]

    # Circuits

    async def _connect(self, connection: Connection, near: Stream, target: PeerId) -> None:
        self._forget_the_gone()
        source = connection.peer_id
        slot = self._reservations.open_circuit(source, target, ip_group(connection.now_at), trio.current_time())
        try:
            with trio.CancelScope() as scope:
                self._scopes.add(scope)
                far = await self._open_far(slot)
                try:
                    limit = wire.write_limit(self.limits.circuit_limit)
                    await _answer(near, Status.OK, limit=limit)
                    self.traffic.circuits += 1
                    await _Circuit(self, near, far, user=source).run()
                except BaseException:
                    far.reset()  # otherwise it has ended, and what it has yet to send is on its way
                    raise
            if scope.cancelled_caught:
                near.reset()
        finally:
            self._scopes.discard(scope)
            self._reservations.close_circuit(slot)

    async def _open_far(self, slot: Circuit) -> Stream:
        """A stream to the target that has taken the circuit.

        Raises:
            Refused: it has not.
        """
        message = StopMessage(
            type=StopMessage.CONNECT,
            peer=wire.peer(slot.source),
            limit=wire.write_limit(self.limits.circuit_limit),
        )
        try:
            with trio.fail_after(STOP_S):
                return await self._stop_at_newest(slot.target, message)
        except Refused:
            raise
        except (errors.NetError, trio.TooSlowError) as error:
            raise Refused(Status.CONNECTION_FAILED, f"{slot.target} does not take it: {error}") from error

    async def _stop_at_newest(self, target: PeerId, message: StopMessage) -> Stream:
        """Ask the target; again, should it connect anew meanwhile: then the connection before may be dead."""
        while True:
            connection = self._direct_connection(target)
            with trio.CancelScope() as scope, self._watched(target, scope):
                if connection is None:
                    await trio.sleep(RETURN_S)
                    raise Refused(Status.NO_RESERVATION, f"{target} is gone")
                connection.mux.check()
                try:
                    return await self._stop(connection, message)
                except errors.ConnectionLost:
                    if not connection.mux.is_closed:
                        raise

    @contextmanager
    def _watched(self, peer_id: PeerId, scope: trio.CancelScope) -> Iterator[None]:
        """Cancel the scope when the peer connects."""

        def watch(connection: Connection) -> None:
            if connection.peer_id == peer_id and not connection.relayed:
                scope.cancel()

        self.host.swarm.watchers.append(watch)
        try:
            yield
        finally:
            self.host.swarm.watchers.remove(watch)

    async def _stop(self, connection: Connection, message: StopMessage) -> Stream:
        far = await self.host.open_stream_over(connection, [wire.STOP])
        try:
            await wire.send_message(far, message)
            status = wire.status_of(await wire.receive_stop(far))
            if status != Status.OK:
                raise Refused(Status.CONNECTION_FAILED, f"{connection.peer_id} says {status}")
        except BaseException:
            far.reset()
            raise
        return far

    @property
    def turns(self) -> Turns:
        if self._turns is None:
            raise errors.LocalProtocolError("the relay is not running")
        return self._turns


class _Circuit:
    """Two streams, and what passes between them until both directions have ended."""

    def __init__(self, server: RelayServer, near: Stream, far: Stream, *, user: Hashable) -> None:
        self._limits = server.limits
        self._traffic = server.traffic
        self._turns = server.turns
        self._near, self._far = near, far
        self._user = user
        self._told_end: set[Stream] = set()  # who has been sent all that there was for it
        self._moved_at = trio.current_time()

    async def run(self) -> None:
        for stream in (self._near, self._far):
            stream.limit_window(self._limits.circuit_window_bytes)
        limit = self._limits.circuit_limit
        with trio.move_on_after((limit and limit.seconds) or math.inf):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, nursery.cancel_scope)
                async with trio.open_nursery() as directions:
                    directions.start_soon(self._carry, self._near, self._far)
                    directions.start_soon(self._carry, self._far, self._near)
                nursery.cancel_scope.cancel()
        for stream in (self._near, self._far):
            if stream in self._told_end:
                await stream.leave()  # the other side may be gone: who sends to it is to know
            else:
                stream.reset()

    async def _carry(self, source: Stream, sink: Stream) -> None:
        """Forward one direction until its end, or until one of the streams fails."""
        limit = self._limits.circuit_limit
        left = math.inf if limit is None or limit.bytes is None else limit.bytes
        while True:
            try:
                data = await source.receive_some(PIECE_BYTES)
            except (errors.NetError, trio.ClosedResourceError):
                sink.reset()
                return
            if not data:
                break
            self._moved(len(data), 0)
            left -= len(data)
            if left < 0:
                source.reset()
                sink.reset()
                return
            await self._turns.take(self._user, len(data))
            try:
                await sink.send_all(data)
            except (errors.NetError, trio.ClosedResourceError):
                return  # the other direction reads what the sink still has to say, and finds the same
            self._moved(0, len(data))
        self._told_end.add(sink)
        await sink.send_eof()

    def _moved(self, came: int, went: int) -> None:
        self._traffic.bytes_in += came
        self._traffic.bytes_out += went
        self._moved_at = trio.current_time()

    async def _watch(self, scope: trio.CancelScope) -> None:
        """End the circuit when nothing has passed for long: one side may be stuck, and the other gone unnoticed."""
        while True:
            idle_at = self._moved_at + self._limits.circuit_idle_s
            if idle_at <= trio.current_time():
                scope.cancel()
                return
            await trio.sleep_until(idle_at)


async def _answer(stream: Stream, status: Status, **fields: Any) -> None:
    await wire.send_message(stream, HopMessage(type=HopMessage.STATUS, status=wire.write_status(status), **fields))
