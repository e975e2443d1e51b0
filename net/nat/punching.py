"""Direct Connection Upgrade through Relay: two peers behind NATs that have a relayed connection dial each other at
the same moment, so that each NAT takes the other's packets for answers.

The side that the relayed connection came in to starts: CONNECT both ways, each with the addresses where others see it,
which measures the round trip; then SYNC, at whose arrival the peer dials, while we do so half a round trip after
sending it. On TCP that is a simultaneous open, in which the peer plays the dialler and we the listener; on QUIC the
peer dials, and we open our NAT with packets that mean nothing.

Whoever has public addresses of its own, behind a firewall alone, tells these as well: over IPv6 there is no need that
anybody has seen them. Two that are seen at one IP may be neighbours, whose router perhaps does not lead them back in:
who answers tells its private addresses, too, and these are dialled as they are.

Three tries follow one after another; a relayed connection that stays gets another one now and then, for routers are
switched on again and machines that were busy have time.

Source: https://github.com/libp2p/specs/blob/master/relay/DCUtR.md
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence

import trio
from google.protobuf.message import DecodeError
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch

from net import delimited, errors
from net.addresses import Multiaddr, is_relayed
from net.host import Host
from net.identity import PeerId
from net.io import send
from net.mux.base import Stream
from net.nat import endpoints
from net.nat.sighting import RelaySights
from net.swarm import Connection

logger = logging.getLogger(__name__)

PROTOCOL_ID = "/libp2p/dcutr"
MAX_MESSAGE_BYTES = 4096  # the specification's
MAX_ADDRESSES = 8  # of a peer's that are dialled at once; ours
TRIES = 3  # go-libp2p's; one after another
AGAIN_S, MAX_AGAIN_S = 30.0, 600.0  # before another try; twice as long before each further one, up to that
MESSAGE_S = 10.0  # for the peer's next message
MAX_ROUND_TRIP_S = 4.0  # a peer that claims more is not waited for
PUNCH_S = 5.0  # one try's dials
DOUBT_S = 3.0  # for a direct connection to end that may be dead: the swarm has it checked
PAUSE_S = 0.5  # before the next try
UNLIKE_S = 1.0  # the same, while both are seen at addresses of different kinds: relays are being asked for more


class _Unlike(errors.DialError):
    """Ours and theirs have no kind of address in common."""


class HolePuncher:
    """Turns relayed connections into direct ones, for as long as ``run`` runs.

    Args:
        host: whose connections.
        addresses: where others see what the host listens on.
        can_meet: whether an address may lead across two NATs; all others are left out, ours and theirs.
    """

    def __init__(
        self,
        host: Host,
        addresses: Callable[[], Iterable[Multiaddr]],
        *,
        can_meet: Callable[[Multiaddr], bool] = endpoints.is_public,
    ) -> None:
        self._host = host
        self._addresses = addresses
        self._can_meet = can_meet
        self._relay_sights = RelaySights(host, can_meet)
        self.tries = 0  # that this side began
        self.successes = 0

    def network_changed(self) -> None:
        """Whatever relays have told of where they see us, they see us elsewhere now."""
        self._relay_sights.forget()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer those who want to punch, and start where it is ours to start, until cancelled."""
        arrivals, comings = trio.open_memory_channel[Connection](self._host.limits.connections)

        def watch(connection: Connection) -> None:
            if connection.relayed:
                try:
                    arrivals.send_nowait(connection)
                except trio.WouldBlock:
                    logger.debug("too many relayed connections: none is made direct with %s", connection.peer_id)

        self._host.handle(PROTOCOL_ID, self._answer)
        self._host.swarm.watchers.append(watch)
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                async for connection in comings:
                    nursery.start_soon(self._relay_sights.look, connection, self._ours())
                    if not connection.outbound:
                        nursery.start_soon(self._start, connection)
        finally:
            self._host.swarm.watchers.remove(watch)
            self._host.unhandle(PROTOCOL_ID)

    # The side that the relayed connection came in to

    async def _start(self, connection: Connection) -> None:
        for number in itertools.count(1):
            await self._doubt(connection.peer_id)
            if self._is_direct(connection.peer_id) or connection.mux.is_closed:
                return
            self.tries += 1
            try:
                await self._try(connection, is_last=number >= TRIES)
            except errors.ProtocolNotSupported:
                return
            except _Unlike:
                pause_s = UNLIKE_S
            except (errors.NetError, trio.TooSlowError) as error:
                logger.debug("hole punching with %s, try %d: %s", connection.peer_id, number, error)
                pause_s = PAUSE_S if number < TRIES else min(AGAIN_S * 2 ** min(number - TRIES, 8), MAX_AGAIN_S)
            else:
                self.successes += 1
                logger.info("%s is reached directly now, at try %d", connection.peer_id, number)
                return
            with trio.move_on_after(pause_s):
                await connection.ended.wait()

    async def _try(self, connection: Connection, *, is_last: bool) -> None:
        stream = await self._host.open_stream_over(connection, [PROTOCOL_ID])
        try:
            began = trio.current_time()
            await send(stream, self._message(HolePunch.CONNECT))
            theirs = await self._receive(stream, HolePunch.CONNECT)
            round_trip_s = trio.current_time() - began
            if not theirs:
                raise errors.DialError(f"{connection.peer_id} knows no address where others see it")
            if not is_last and not _is_alike(self._usable(self._ours()), self._usable(theirs)):
                raise _Unlike(f"{connection.peer_id} and we have been seen at addresses of different kinds")
            if round_trip_s > MAX_ROUND_TRIP_S:
                raise errors.DialError(f"{connection.peer_id} took {round_trip_s:.1f} s to answer")
            await send(stream, self._message(HolePunch.SYNC))
            await trio.sleep(round_trip_s / 2)
            await self._punch(connection.peer_id, theirs, listener=True)
        finally:
            stream.reset()

    # The side that dialled the relayed connection

    async def _answer(self, connection: Connection, stream: Stream) -> None:
        if not connection.relayed:
            raise errors.RemoteProtocolError("hole punching over a connection that is direct")
        theirs = await self._receive(stream, HolePunch.CONNECT)
        await send(stream, self._message(HolePunch.CONNECT, theirs))
        await self._receive(stream, HolePunch.SYNC)
        if theirs and not self._is_direct(connection.peer_id):
            await self._punch(connection.peer_id, theirs, listener=False)

    # Both

    async def _punch(self, peer_id: PeerId, theirs: Sequence[Multiaddr], *, listener: bool) -> None:
        """Raises: DialError: there is no direct connection in the end, whoever's dial would have made it."""
        arrived = trio.Event()

        def watch(connection: Connection) -> None:
            if connection.peer_id == peer_id and not connection.relayed:
                arrived.set()

        self._host.swarm.watchers.append(watch)
        try:
            with trio.move_on_after(PUNCH_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._dial, peer_id, self._usable(theirs), listener)
                    if self._are_neighbours(theirs):
                        nursery.start_soon(self._dial, peer_id, _private(theirs), False)
                    if not self._is_direct(peer_id):
                        await arrived.wait()
                    nursery.cancel_scope.cancel()
        finally:
            self._host.swarm.watchers.remove(watch)
        if not self._is_direct(peer_id):
            raise errors.DialError(f"no direct way to {peer_id} at {', '.join(map(str, theirs))}")

    async def _dial(self, peer_id: PeerId, theirs: Sequence[Multiaddr], listener: bool) -> None:
        try:
            await self._host.swarm.punch(peer_id, theirs, listener=listener)
        except errors.NetError as error:
            logger.debug("our dial of %s failed: %s", peer_id, error)  # the peer's may still come in

    async def _doubt(self, peer_id: PeerId) -> None:
        """Who comes through a relay though there is a direct connection may have lost that: wait for its end."""
        direct = self._host.swarm.connection(peer_id)
        if direct is not None and not direct.relayed:
            with trio.move_on_after(DOUBT_S):
                await direct.ended.wait()

    def _is_direct(self, peer_id: PeerId) -> bool:
        connection = self._host.swarm.connection(peer_id)
        return connection is not None and not connection.relayed

    def _ours(self) -> list[Multiaddr]:
        """Where others may reach us, what most of them have seen first."""
        return [*self._addresses(), *self._relay_sights.addresses, *self._host.own_addresses]

    def _message(self, kind: HolePunch.Type.ValueType, theirs: Sequence[Multiaddr] = ()) -> bytes:
        ours = self._usable(self._ours()) if kind == HolePunch.CONNECT else []
        if self._are_neighbours(theirs):
            ours += _private(self._host.own_addresses)
        message = HolePunch(type=kind, ObsAddrs=[address.to_bytes() for address in ours])
        return delimited.frame(message.SerializeToString())

    async def _receive(self, stream: Stream, kind: HolePunch.Type.ValueType) -> list[Multiaddr]:
        """The addresses in the peer's next message, which is to be of ``kind``."""
        with trio.fail_after(MESSAGE_S):
            data = await delimited.receive(stream, MAX_MESSAGE_BYTES, "a hole-punching message")
        message = HolePunch()
        try:
            message.ParseFromString(data)
        except DecodeError as error:
            raise errors.RemoteProtocolError("a hole-punching message that is no protobuf") from error
        if message.type != kind:
            raise errors.RemoteProtocolError(f"a hole-punching message of type {message.type} instead of {kind}")
        parsed = (endpoints.parse(data) for data in message.ObsAddrs[: 4 * MAX_ADDRESSES])
        found = [address for address in parsed if address is not None]
        return [*self._usable(found), *(_private(found) if self._are_neighbours(found) else ())]

    def _usable(self, addresses: Iterable[Multiaddr]) -> list[Multiaddr]:
        direct = [each for each in addresses if not is_relayed(each) and self._can_meet(each)]
        return list(dict.fromkeys(direct))[:MAX_ADDRESSES]

    def _are_neighbours(self, theirs: Iterable[Multiaddr]) -> bool:
        """Whether they are seen where we are seen: behind the same NAT, or perhaps the same provider's."""
        return bool(_ips(self._usable(self._ours())) & _ips(self._usable(theirs)))


def _is_alike(ours: Iterable[Multiaddr], theirs: Iterable[Multiaddr]) -> bool:
    return not {endpoints.shape(each) for each in ours}.isdisjoint(endpoints.shape(each) for each in theirs)


def _ips(addresses: Iterable[Multiaddr]) -> set[endpoints.IpAddress]:
    return {endpoint.ip for endpoint in map(endpoints.read, addresses) if endpoint is not None}


def _private(addresses: Iterable[Multiaddr]) -> list[Multiaddr]:
    """Those that mean something within one network alone."""
    found = [each for each in dict.fromkeys(addresses) if (endpoint := endpoints.read(each)) and endpoint.is_private]
    return found[:MAX_ADDRESSES]
