"""Connections: dialling, accepting, keeping, ending.

A connection is a transport's byte stream, secured (Noise or TLS, agreed by multistream-select) and muxed
(Yamux), or one that came so from its transport (QUIC). Addresses of one peer are dialled side by side with
a short stagger, and the first that is fully up is used. Every budget is in ``limits.py``; every slot is freed
when its connection ends.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable, Container, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest

import trio

from net import errors, keeping, multistream
from net.addresses import Multiaddr, beside, is_relayed
from net.identity import Identity, PeerId
from net.limits import ConnectionCounts, Limits
from net.mux.base import Muxer, Stream
from net.mux.core import YamuxSettings
from net.mux.driver import PROTOCOL_ID as YAMUX
from net.mux.driver import YamuxConnection
from net.nat import endpoints
from net.nurseries import open_service_nursery
from net.rpc.line import LineSpeed
from net.security.base import SecureChannel, Security
from net.security.swarm_key import PrivateStream, SwarmKey
from net.transports.base import (
    Arrived,
    MuxedConnection,
    PunchingTransport,
    RawConnection,
    RebindingTransport,
    RunningTransport,
    TrafficLimit,
    Transport,
)

logger = logging.getLogger(__name__)

CIRCUITS_GOODBYE_S = 1.5  # what a muxer gives its own goodbye, and a little

PROPOSAL_PATIENCE_S = 0.05  # for a proposal that may have come along with the header of a simultaneous open
ROLE_PATIENCE_S = 1.0  # of a dialler that plays the listener, before it plays the dialler after all


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
    limit: TrafficLimit | None = None  # set by the relay that carries it
    line: LineSpeed = field(default_factory=LineSpeed)  # as far as our messages have shown it
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def now_at(self) -> Multiaddr:
        """``remote``, or where the peer has moved to since."""
        return self.mux.moved_to or self.remote

    @cached_property
    def relayed(self) -> bool:
        """Whether it goes through a relay."""
        return is_relayed(self.remote)


@dataclass(kw_only=True, eq=False)
class _Dialling:
    """What those who want one peer at the same time share."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    tried: set[Multiaddr] = field(default_factory=set)
    failure: errors.NetError | None = None


class _Role(enum.Enum):
    """Who proposes and speaks first. Of two that dial each other at once, one plays the listener; with peers that have
    it the other way round (go-libp2p before its issue 3171) both do so, or neither, and then one has to give in."""

    DIALLER = "dialler"
    LISTENER = "listener"
    PUNCHED_DIALLER = "dialler of two"
    PUNCHED_LISTENER = "dialler that plays the listener"


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
        swarm_key: SwarmKey | None = None,
    ) -> None:
        self.swarm_key = swarm_key
        self._identity = identity
        self._transports = tuple(transports)
        self._securities = {security.protocol_id: security for security in securities}
        self._limits = limits
        self._counts = ConnectionCounts(limits)
        self._on_stream = on_stream
        self._connections: dict[PeerId, list[Connection]] = {}
        self._dialling: dict[PeerId, _Dialling] = {}
        self._handshakes = 0
        # Peers whose connections are not let go for being idle. Whoever adds a collection bounds it.
        self.kept: list[Container[PeerId]] = []
        self.watchers: list[Callable[[Connection], None]] = []  # told of every new connection; must not raise
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
                    bound += await self._listen(nursery, address, bound)
                task_status.started(bound)
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def _listen(
        self, nursery: trio.Nursery, address: Multiaddr, bound: Sequence[Multiaddr]
    ) -> Sequence[Multiaddr]:
        transport = self._transport_for(address)
        same_number = beside(address, bound)
        if same_number is not None:
            try:
                found: Sequence[Multiaddr] = await nursery.start(transport.listen, same_number, self.accept)
                return found
            except errors.AddressError:
                pass  # somebody else has that number
        listened: Sequence[Multiaddr] = await nursery.start(transport.listen, address, self.accept)
        return listened

    async def leave_circuits(self) -> None:
        """End the connections through relays, for at most about a second: their goodbyes need those to the relays."""
        relayed = [each for each in self.connections if each.relayed]
        for each in relayed:
            each.mux.close()
        with trio.move_on_after(CIRCUITS_GOODBYE_S):
            for each in relayed:
                await each.ended.wait()

    # Looking

    def connection(self, peer_id: PeerId) -> Connection | None:
        """The connection to the peer that is used, if there is one."""
        alive = self._alive(peer_id)
        return keeping.preferred(alive, self._identity.peer_id) if alive else None

    def _alive(self, peer_id: PeerId) -> list[Connection]:
        return [entry for entry in self._connections.get(peer_id, ()) if not entry.mux.is_closed]

    @property
    def transports(self) -> Sequence[Transport]:
        return self._transports

    @property
    def connections(self) -> list[Connection]:
        return [entry for entries in self._connections.values() for entry in entries]

    def check(self) -> None:
        """Have every peer show soon that it is there: the network may have changed. Connections that are dead end."""
        for connection in self.connections:
            connection.mux.check()

    def network_changed(self) -> None:
        """We are somewhere else: what can move along does, and what cannot ends."""
        for transport in self._transports:
            if isinstance(transport, RebindingTransport):
                transport.rebind()
        self.check()

    # Dialling

    async def dial(self, peer_id: PeerId, addresses: Sequence[Multiaddr], *, at_once: bool = False) -> Connection:
        """A connection to the peer: the one that is open, or a new one.

        Several callers that want the same peer share one dial, and its failure. Addresses are tried side by
        side, each for at most ``limits.dial_s``; ``at_once`` gives no head start to those that promise more.

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
                    return await self._race(peer_id, addresses, at_once=at_once)
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

    async def _race(
        self,
        peer_id: PeerId,
        addresses: Sequence[Multiaddr],
        role: _Role = _Role.DIALLER,
        *,
        at_once: bool = False,
    ) -> Connection:
        candidates = [address for address in dict.fromkeys(addresses) if self.can_dial(address)]
        candidates.sort(key=is_relayed)
        if not candidates:
            offered = ", ".join(map(str, addresses)) or "none"
            raise errors.AddressError(f"peer {peer_id} has no address that can be dialled (known: {offered})")
        winner: Connection | None = None
        failures: list[errors.NetError] = []

        async with trio.open_nursery() as nursery:

            async def attempt(address: Multiaddr, failed: trio.Event) -> None:
                nonlocal winner
                try:
                    connection = await self._dial_one(peer_id, address, role)
                except errors.NetError as error:
                    failures.append(error)
                    failed.set()
                    return
                if winner is None:
                    winner = connection
                    nursery.cancel_scope.cancel()
                else:
                    connection.mux.close()

            for address, following in zip_longest(candidates, candidates[1:]):
                failed = trio.Event()
                nursery.start_soon(attempt, address, failed)
                pause_s = self._limits.dial_stagger_s
                if following is not None and is_relayed(following) and not is_relayed(address):
                    pause_s = self._limits.relay_delay_s
                with trio.move_on_after(0 if at_once else pause_s):
                    await failed.wait()
        if winner is not None:
            return winner
        if len(failures) == 1:
            raise failures[0]
        raise errors.DialError("; ".join(dict.fromkeys(str(failure) for failure in failures)))

    async def _dial_one(self, peer_id: PeerId, address: Multiaddr, role: _Role = _Role.DIALLER) -> Connection:
        if self._nursery is None:
            raise errors.LocalProtocolError("the swarm is not running")
        with trio.move_on_after(self._limits.dial_s):
            transport = self._transport_for(address)
            if role is _Role.PUNCHED_LISTENER and isinstance(transport, PunchingTransport):
                # The peer dials; if that has not come through by then, perhaps ours does: its NAT may let in what ours
                # sends, while ours sends from a port that it does not know.
                with trio.move_on_after(ROLE_PATIENCE_S):
                    await transport.punch(address)
            arrived: Arrived | None = None
            with trio.move_on_after(self._limits.dial_private_s if _is_private(address) else self._limits.dial_s):
                arrived = await transport.dial(address, peer_id)
            if arrived is None:
                raise errors.DialError(f"{address}: nobody answers at this private address")
            connection: Connection = await self._nursery.start(self._carry, arrived, peer_id, role)
            return connection
        raise errors.DialError(f"{address}: no answer within {self._limits.dial_s:g} s")

    async def punch(self, peer_id: PeerId, addresses: Sequence[Multiaddr], *, listener: bool) -> Connection:
        """Dial all ``addresses`` at once, as the peer dials us at this moment, whatever connections there are.

        Args:
            peer_id: whom.
            addresses: where it may be.
            listener: whether we play the listener, once both have dialled; the peer plays the other part.

        Raises: as ``dial``.
        Cancellation: leaves nothing open.
        """
        role = _Role.PUNCHED_LISTENER if listener else _Role.PUNCHED_DIALLER
        return await self._race(peer_id, addresses, role, at_once=True)

    async def _keep_one(self, peer_id: PeerId) -> None:
        """Close the connections with a peer that are not needed, each when nobody uses it any more."""
        while len(self._alive(peer_id)) > 1:
            await trio.sleep(keeping.SIMULTANEOUS_S)
            for connection in keeping.superfluous(self._alive(peer_id), self._identity.peer_id):
                connection.mux.close()

    def can_dial(self, address: Multiaddr) -> bool:
        """Whether one of our transports is for such addresses."""
        return any(transport.can_dial(address) for transport in self._transports)

    def _transport_for(self, address: Multiaddr) -> Transport:
        for transport in self._transports:
            if transport.can_dial(address):
                return transport
        raise errors.AddressError(f"no transport here speaks {address} (one looks like /ip4/0.0.0.0/tcp/4001)")

    # Accepting

    async def accept(self, arrived: Arrived) -> None:
        """One inbound connection, from its first byte to its end: the boundary for what its peer does."""
        try:
            await self._carry(arrived, None, _Role.LISTENER)
        except errors.NetError as error:
            logger.debug("inbound connection from %s: %s", arrived.remote, error)
        except Exception:  # a bug of ours: loud, but it ends this connection alone
            logger.exception("the inbound connection from %s failed", arrived.remote)

    # Both

    async def _carry(
        self,
        arrived: Arrived,
        expected: PeerId | None,
        role: _Role,
        *,
        task_status: trio.TaskStatus[Connection] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Secure and mux one connection, where its transport has not, and carry it until it ends; always closes it."""
        try:
            with self._counts.connection(arrived.remote):
                if isinstance(arrived, MuxedConnection):
                    muxed = arrived
                    if self.swarm_key is not None:
                        raise errors.DialError(f"{muxed.remote}: not under the swarm's key")
                    if expected is not None and muxed.peer_id != expected:
                        raise errors.PeerIdMismatch(expected, muxed.peer_id)
                    if role is not _Role.LISTENER:
                        role = _Role.DIALLER  # over QUIC there is nobody to give in
                else:
                    muxed, role = await self._upgrade(arrived, expected, role)
                with self._counts.peer(muxed.peer_id):
                    await self._carry_streams(muxed, role is _Role.DIALLER, task_status)
        finally:
            if isinstance(arrived, MuxedConnection):
                arrived.mux.close()
            else:
                await trio.aclose_forcefully(arrived.stream)

    async def _upgrade(self, raw: RawConnection, expected: PeerId | None, role: _Role) -> tuple[MuxedConnection, _Role]:
        if role is _Role.LISTENER and self._handshakes >= self._limits.handshakes:
            raise errors.LimitExceeded(f"{self._handshakes} handshakes are under way, the most allowed")
        self._handshakes += 1
        try:
            with trio.fail_after(self._limits.handshake_s):
                stream = raw.stream if self.swarm_key is None else PrivateStream(raw.stream, self.swarm_key)
                channel, security, role = await self._secure(stream, expected, role)
        except trio.TooSlowError as error:
            raise errors.DialError(
                f"{raw.remote}: the handshake took longer than {self._limits.handshake_s:g} s"
            ) from error
        except errors.PeerIdMismatch:
            raise
        except errors.NetError as error:
            if self.swarm_key is not None and isinstance(error, errors.RemoteProtocolError | errors.ConnectionLost):
                raise errors.DialError(
                    f"{raw.remote}: the peer seems to have another swarm key than this one, or none ({error})"
                ) from error
            raise errors.DialError(f"{raw.remote}: {error}") from error
        finally:
            self._handshakes -= 1
        settings = YamuxSettings(max_inbound_streams=self._limits.inbound_streams_per_connection)
        muxed = MuxedConnection(
            mux=YamuxConnection(channel, client=role is _Role.DIALLER, settings=settings),
            peer_id=channel.remote_peer,
            security=security,
            local=raw.local,
            remote=raw.remote,
            limit=raw.limit,
        )
        return muxed, role

    async def _secure(
        self, stream: trio.abc.Stream, expected: PeerId | None, role: _Role
    ) -> tuple[SecureChannel, str, _Role]:
        """The channel, its protocol, and the role that came of it."""
        names = list(self._securities)
        match role:
            case _Role.DIALLER:
                name = await multistream.propose(stream, names)
            case _Role.LISTENER:
                name = await multistream.answer(stream, names)
            case _Role.PUNCHED_DIALLER:
                # Who plays the dialler, too, proposes along with its header, and is left that part.
                name, proposed = await multistream.answer_or_propose(stream, names, PROPOSAL_PATIENCE_S)
                role = _Role.DIALLER if proposed else _Role.LISTENER
            case _Role.PUNCHED_LISTENER:
                # Should both wait, then not for equally long.
                first = expected is None or keeping.decides(self._identity.peer_id, expected)
                patience_s = ROLE_PATIENCE_S if first else 1.5 * ROLE_PATIENCE_S
                name, proposed = await multistream.answer_or_propose(stream, names, patience_s)
                role = _Role.DIALLER if proposed else _Role.LISTENER
        if role is _Role.DIALLER and expected is not None:
            channel = await self._securities[name].outbound(stream, expected)
            await multistream.propose(channel, [YAMUX])
        else:
            channel = await self._securities[name].inbound(stream)
            if expected is not None and channel.remote_peer != expected:
                raise errors.PeerIdMismatch(expected, channel.remote_peer)
            await multistream.answer(channel, [YAMUX])
        return channel, name, role

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
            limit=muxed.limit,
        )

        async def on_stream(stream: Stream) -> None:
            await self._on_stream(connection, stream)

        siblings = self._connections.setdefault(connection.peer_id, [])
        for sibling in siblings:  # who connects again may have lost the others
            sibling.mux.check()
        siblings.append(connection)
        if len(siblings) > 1 and self._nursery and keeping.decides(self._identity.peer_id, connection.peer_id):
            self._nursery.start_soon(self._keep_one, connection.peer_id)
        for idle in keeping.prunable(self.connections, self._limits, trio.current_time(), self.kept):
            idle.mux.close()
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(connection.mux.run, on_stream)
                task_status.started(connection)
                for watcher in self.watchers:
                    watcher(connection)
        finally:
            connection.ended.set()
            siblings.remove(connection)
            if not siblings:
                self._connections.pop(connection.peer_id, None)


def _is_private(address: Multiaddr) -> bool:
    """Whether it means something within one network alone."""
    endpoint = endpoints.read(address)
    return endpoint is not None and endpoint.is_private
