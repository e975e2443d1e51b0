"""Connections: dialling, accepting, keeping, ending.

A connection is a transport's byte stream, secured (Noise or TLS, agreed by multistream-select) and muxed
(Yamux), or one that came so from its transport (QUIC). Addresses of one peer are dialled side by side with
a short stagger, and the first that is fully up is used. Every budget is in ``limits.py``; every slot is freed
when its connection ends.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio

from net import errors, keeping, multistream
from net.addresses import Multiaddr
from net.identity import Identity, PeerId
from net.limits import ConnectionCounts, Limits
from net.mux.base import Muxer, Stream
from net.mux.core import YamuxSettings
from net.mux.driver import PROTOCOL_ID as YAMUX
from net.mux.driver import YamuxConnection
from net.nurseries import open_service_nursery
from net.security.base import SecureChannel, Security
from net.transports.base import Arrived, MuxedConnection, RawConnection, RunningTransport, Transport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Connection:
    """An authenticated connection to ``peer_id``."""

    peer_id: PeerId
    remote: Multiaddr
    local: Multiaddr | None
    security: str
    outbound: bool
    mux: Muxer
    since: float  # trio's time


@dataclass(kw_only=True, eq=False)
class _Dialling:
    """What those who want one peer at the same time share."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    tried: set[Multiaddr] = field(default_factory=set)
    failure: errors.NetError | None = None


OnStream = Callable[[Connection, Stream], Awaitable[None]]


class Swarm:
    """All connections of one identity, for as long as ``run`` runs."""

    def __init__(
        self,
        identity: Identity,
        *,
        transports: Sequence[Transport],
        securities: Sequence[Security],
        limits: Limits,
        on_stream: OnStream,
    ) -> None:
        self._identity = identity
        self._transports = tuple(transports)
        self._securities = {security.protocol_id: security for security in securities}
        self._limits = limits
        self._counts = ConnectionCounts(limits)
        self._on_stream = on_stream
        self._connections: dict[PeerId, list[Connection]] = {}
        self._dialling: dict[PeerId, _Dialling] = {}
        self._handshakes = 0
        # Connections outlive the call that dialled them, so they live here; open while ``run`` runs.
        self._nursery: trio.Nursery | None = None

    async def run(
        self,
        listen: Sequence[Multiaddr],
        *,
        task_status: trio.TaskStatus[list[Multiaddr]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen and carry connections until cancelled; ``started`` gets the addresses bound.

        Raises:
            AddressError: an address cannot be listened on.
        """
        async with open_service_nursery() as nursery:
            self._nursery = nursery
            try:
                for transport in self._transports:
                    if isinstance(transport, RunningTransport):
                        await nursery.start(transport.run)
                bound: list[Multiaddr] = []
                for address in listen:
                    transport = self._transport_for(address)
                    bound += await nursery.start(transport.listen, address, self._accept)
                task_status.started(bound)
                await trio.sleep_forever()
            finally:
                self._nursery = None

    # Looking

    def connection(self, peer_id: PeerId) -> Connection | None:
        """The connection to the peer that is used, if there is one."""
        alive = self._alive(peer_id)
        return keeping.preferred(alive, self._identity.peer_id) if alive else None

    def _alive(self, peer_id: PeerId) -> list[Connection]:
        return [entry for entry in self._connections.get(peer_id, ()) if not entry.mux.is_closed]

    @property
    def connections(self) -> list[Connection]:
        return [entry for entries in self._connections.values() for entry in entries]

    # Dialling

    async def dial(self, peer_id: PeerId, addresses: Sequence[Multiaddr]) -> Connection:
        """A connection to the peer: the one that is open, or a new one.

        Several callers that want the same peer share one dial, and its failure. Addresses are tried side by
        side, each for at most ``limits.dial_s``.

        Raises:
            DialError: no address led to the peer; the text has each one's reason.
            PeerIdMismatch: the only address belongs to somebody else.
            LimitExceeded: a budget of ours is used up.
            AddressError: no address is of a kind that can be dialled.
        Cancellation: leaves nothing open.
        """
        if peer_id == self._identity.peer_id:
            raise errors.DialError("that address is our own")
        dialling = self._dialling.setdefault(peer_id, _Dialling())
        try:
            async with dialling.lock:
                existing = self.connection(peer_id)
                if existing is not None:
                    return existing
                if dialling.failure is not None and dialling.tried.issuperset(addresses):
                    raise dialling.failure
                try:
                    return await self._race(peer_id, addresses)
                except errors.NetError as error:
                    dialling.failure = error
                    dialling.tried.update(addresses)
                    if self._dialling.get(peer_id) is dialling:
                        del self._dialling[peer_id]  # shared by those who wait already; who comes later tries again
                    raise
        finally:
            idle = not dialling.lock.statistics().tasks_waiting and not dialling.lock.locked()
            if idle and self._dialling.get(peer_id) is dialling:
                del self._dialling[peer_id]

    async def _race(self, peer_id: PeerId, addresses: Sequence[Multiaddr]) -> Connection:
        candidates = [address for address in dict.fromkeys(addresses) if self._can_dial(address)]
        if not candidates:
            offered = ", ".join(map(str, addresses)) or "none"
            raise errors.AddressError(f"peer {peer_id} has no address that can be dialled (known: {offered})")
        winner: Connection | None = None
        failures: list[errors.NetError] = []

        async with trio.open_nursery() as nursery:

            async def attempt(address: Multiaddr, failed: trio.Event) -> None:
                nonlocal winner
                try:
                    connection = await self._dial_one(peer_id, address)
                except errors.NetError as error:
                    failures.append(error)
                    failed.set()
                    return
                if winner is None:
                    winner = connection
                    nursery.cancel_scope.cancel()
                else:
                    connection.mux.close()

            for address in candidates:
                failed = trio.Event()
                nursery.start_soon(attempt, address, failed)
                with trio.move_on_after(self._limits.dial_stagger_s):
                    await failed.wait()
        if winner is not None:
            return winner
        if len(failures) == 1:
            raise failures[0]
        raise errors.DialError("; ".join(dict.fromkeys(str(failure) for failure in failures)))

    async def _dial_one(self, peer_id: PeerId, address: Multiaddr) -> Connection:
        if self._nursery is None:
            raise errors.LocalProtocolError("the swarm is not running")
        with trio.move_on_after(self._limits.dial_s):
            arrived = await self._transport_for(address).dial(address, peer_id)
            connection: Connection = await self._nursery.start(self._carry, arrived, peer_id)
            return connection
        raise errors.DialError(f"{address}: no answer within {self._limits.dial_s:g} s")

    async def _keep_one(self, peer_id: PeerId) -> None:
        """Close the connections with a peer that are not needed, each when nobody uses it any more."""
        while len(self._alive(peer_id)) > 1:
            await trio.sleep(keeping.SIMULTANEOUS_S)
            for connection in keeping.superfluous(self._alive(peer_id), self._identity.peer_id):
                connection.mux.close()

    def _can_dial(self, address: Multiaddr) -> bool:
        return any(transport.can_dial(address) for transport in self._transports)

    def _transport_for(self, address: Multiaddr) -> Transport:
        for transport in self._transports:
            if transport.can_dial(address):
                return transport
        raise errors.AddressError(f"no transport here speaks {address} (one looks like /ip4/0.0.0.0/tcp/4001)")

    # Accepting

    async def _accept(self, arrived: Arrived) -> None:
        """One inbound connection, from its first byte to its end: the boundary for what its peer does."""
        try:
            await self._carry(arrived, None)
        except errors.NetError as error:
            logger.debug("inbound connection from %s: %s", arrived.remote, error)
        except Exception:  # a bug of ours: loud, but it ends this connection alone
            logger.exception("the inbound connection from %s failed", arrived.remote)

    # Both

    async def _carry(
        self,
        arrived: Arrived,
        expected: PeerId | None,
        *,
        task_status: trio.TaskStatus[Connection] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Secure and mux one connection, where its transport has not, and carry it until it ends; always closes it."""
        try:
            with self._counts.connection(arrived.remote):
                if isinstance(arrived, MuxedConnection):
                    muxed = arrived
                    if expected is not None and muxed.peer_id != expected:
                        raise errors.PeerIdMismatch(expected, muxed.peer_id)
                else:
                    muxed = await self._upgrade(arrived, expected)
                with self._counts.peer(muxed.peer_id):
                    await self._carry_streams(muxed, expected is not None, task_status)
        finally:
            if isinstance(arrived, MuxedConnection):
                arrived.mux.close()
            else:
                await trio.aclose_forcefully(arrived.stream)

    async def _upgrade(self, raw: RawConnection, expected: PeerId | None) -> MuxedConnection:
        channel, security = await self._secure(raw, expected)
        settings = YamuxSettings(max_inbound_streams=self._limits.inbound_streams_per_connection)
        return MuxedConnection(
            mux=YamuxConnection(channel, client=expected is not None, settings=settings),
            peer_id=channel.remote_peer,
            security=security,
            local=raw.local,
            remote=raw.remote,
        )

    async def _secure(self, raw: RawConnection, expected: PeerId | None) -> tuple[SecureChannel, str]:
        if expected is None and self._handshakes >= self._limits.handshakes:
            raise errors.LimitExceeded(f"{self._handshakes} handshakes are under way, the most allowed")
        self._handshakes += 1
        try:
            with trio.fail_after(self._limits.handshake_s):
                if expected is not None:
                    name = await multistream.propose(raw.stream, list(self._securities))
                    channel = await self._securities[name].outbound(raw.stream, expected)
                    await multistream.propose(channel, [YAMUX])
                else:
                    name = await multistream.answer(raw.stream, self._securities)
                    channel = await self._securities[name].inbound(raw.stream)
                    await multistream.answer(channel, [YAMUX])
                return channel, name
        except trio.TooSlowError as error:
            raise errors.DialError(
                f"{raw.remote}: the handshake took longer than {self._limits.handshake_s:g} s"
            ) from error
        except errors.PeerIdMismatch:
            raise
        except errors.NetError as error:
            raise errors.DialError(f"{raw.remote}: {error}") from error
        finally:
            self._handshakes -= 1

    async def _carry_streams(
        self,
        muxed: MuxedConnection,
        outbound: bool,
        task_status: trio.TaskStatus[Connection],
    ) -> None:
        connection = Connection(
            peer_id=muxed.peer_id,
            remote=muxed.remote,
            local=muxed.local,
            security=muxed.security,
            outbound=outbound,
            mux=muxed.mux,
            since=trio.current_time(),
        )

        async def on_stream(stream: Stream) -> None:
            await self._on_stream(connection, stream)

        siblings = self._connections.setdefault(connection.peer_id, [])
        siblings.append(connection)
        if len(siblings) > 1 and self._nursery and keeping.decides(self._identity.peer_id, connection.peer_id):
            self._nursery.start_soon(self._keep_one, connection.peer_id)
        for idle in keeping.prunable(self.connections, self._limits, trio.current_time()):
            idle.mux.close()
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(connection.mux.run, on_stream)
                task_status.started(connection)
        finally:
            siblings.remove(connection)
            if not siblings:
                self._connections.pop(connection.peer_id, None)
