"""A host: an identity, its connections, and the protocols that it speaks.

    async with open_host(identity, listen=[parse("/ip4/127.0.0.1/tcp/0")]) as host:
        host.handle("/echo/1", echo)
        async with host.stream(peer, ["/echo/1"]) as stream: ...

A handler that fails costs its stream and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager

import trio

from net import addresses, errors, multistream
from net.addresses import Multiaddr, PeerAddress
from net.identity import Identity, PeerId
from net.limits import Limits
from net.multistream import LazyStream
from net.mux.base import Stream
from net.nurseries import open_service_nursery
from net.peerstore import Peerstore
from net.security.base import Security
from net.security.noise import NoiseSecurity
from net.security.swarm_key import SwarmKey
from net.security.tls import TlsSecurity
from net.swarm import Connection, Swarm
from net.transports.base import HostedTransport, Transport
from net.transports.circuit import CircuitTransport
from net.transports.quic import QuicTransport
from net.transports.tcp import TcpTransport
from net.transports.websocket import WebSocketTransport

__all__ = ["Handler", "Host", "open_host"]

logger = logging.getLogger(__name__)

Handler = Callable[[Connection, Stream], Awaitable[None]]


class Host:
    """See ``open_host``, which makes one."""

    def __init__(
        self,
        identity: Identity,
        *,
        transports: Sequence[Transport],
        securities: Sequence[Security],
        limits: Limits,
        swarm_key: SwarmKey | None = None,
    ) -> None:
        self.identity = identity
        self.peer_id: PeerId = identity.peer_id
        self.limits = limits
        self.peerstore = Peerstore()
        self.listening: list[Multiaddr] = []
        # What is told to others of the addresses below: everything, until ``net.nat.reachability`` knows better.
        self.review: Callable[[list[Multiaddr]], list[Multiaddr]] = list
        self.reachability = "unknown"  # a word of ``net.nat.reachability.Kind``, which keeps it up to date
        self.relayed: list[Multiaddr] = []  # where we have reservations, kept by ``net.relay.client``
        self._handlers: dict[str, Handler] = {}
        self.swarm = Swarm(
            identity,
            transports=transports,
            securities=securities,
            limits=limits,
            on_stream=self._on_stream,
            swarm_key=swarm_key,
        )

    @property
    def addresses(self) -> list[Multiaddr]:
        """Where others can dial us, best first, through relays last; without ``/p2p/...``."""
        return [*self.review(self.own_addresses), *self.relayed]

    @property
    def own_addresses(self) -> list[Multiaddr]:
        """Where this machine listens, wildcards spelled out, whoever can reach that."""
        return [spelled for bound in self.listening for spelled in addresses.spell_out(bound)]

    @property
    def peer_addresses(self) -> list[PeerAddress]:
        """The same with our PeerId: what one hands to a friend."""
        return [PeerAddress(address=address, peer_id=self.peer_id) for address in self.addresses]

    @property
    def protocols(self) -> list[str]:
        return sorted(self._handlers)

    def handle(self, protocol_id: str, handler: Handler) -> None:
        """Let ``handler(connection, stream)`` serve streams of ``protocol_id``. The stream is closed after it."""
        if protocol_id in self._handlers:
            raise errors.LocalProtocolError(f"{protocol_id} has a handler already")
        self._handlers[protocol_id] = handler

    def unhandle(self, protocol_id: str) -> None:
        """Do not speak it any more; streams that are being served go on."""
        self._handlers.pop(protocol_id, None)

    async def connect(self, peer_id: PeerId, known: Iterable[Multiaddr] = (), *, at_once: bool = False) -> Connection:
        """A connection to the peer, at ``known`` addresses or those in the peerstore; ``at_once`` as ``Swarm.dial``.

        Raises: as ``Swarm.dial``.
        """
        connection = self.swarm.connection(peer_id)
        if connection is None:
            connection = await self.swarm.dial(peer_id, [*known, *self.peerstore.addresses(peer_id)], at_once=at_once)
            if connection.outbound:
                self.peerstore.confirm(peer_id, connection.remote)
        return connection

    @asynccontextmanager
    async def stream(
        self, peer_id: PeerId, protocols: Sequence[str], known: Iterable[Multiaddr] = ()
    ) -> AsyncIterator[Stream]:
        """A stream to the peer that speaks the first of ``protocols`` it knows; closed at the end of the block,
        reset when the block raises.

        Raises:
            DialError, AddressError: no connection.
            ProtocolNotSupported: the peer speaks none of them.
            ConnectionLost, StreamReset, RemoteProtocolError: it broke while agreeing.
        """
        stream = await self.open_stream(peer_id, protocols, known)
        try:
            yield stream
        except BaseException:
            stream.reset()
            raise
        await stream.aclose()

    async def open_stream(self, peer_id: PeerId, protocols: Sequence[str], known: Iterable[Multiaddr] = ()) -> Stream:
        """As ``stream``, for those who keep it: the caller closes or resets it."""
        return await self.open_stream_over(await self.connect(peer_id, known), protocols)

    async def open_stream_over(self, connection: Connection, protocols: Sequence[str]) -> Stream:
        """As ``open_stream``, over this very connection, whatever others there are to its peer.

        Should the connection be dead, that is found out within about a second.
        """
        peer_id = connection.peer_id
        connection.mux.check()
        stream = connection.mux.open_stream()
        try:
            with trio.move_on_after(self.limits.negotiate_s) as scope:
                await multistream.propose(stream, protocols)
            if scope.cancelled_caught:
                raise errors.PeerFailed(peer_id, f"no answer to a new stream in {self.limits.negotiate_s:g} s")
        except BaseException:
            stream.reset()
            raise
        return stream

    async def open_lazily_over(self, connection: Connection, protocol: str) -> LazyStream:
        """As ``open_stream_over``, for a protocol that the peer is known to speak: without waiting for it to agree.
        Whether it has, is known by ``LazyStream.agree``, or when something is received.
        """
        connection.mux.check()
        stream = connection.mux.open_stream()
        try:
            return await multistream.LazyStream.propose(stream, protocol)
        except BaseException:
            stream.reset()
            raise

    async def _on_stream(self, connection: Connection, stream: Stream) -> None:
        """The boundary around everything that a peer can make a handler do."""
        try:
            with trio.fail_after(self.limits.negotiate_s):
                protocol = await multistream.answer(stream, self._handlers)
            handler = self._handlers.get(protocol)
            if handler is None:  # no longer since it was agreed on
                raise errors.ProtocolNotSupported(f"{protocol} is not spoken any more")
            await handler(connection, stream)
            await stream.aclose()
        except (errors.NetError, trio.TooSlowError, trio.ClosedResourceError) as error:
            logger.debug("stream from %s: %s", connection.peer_id, error)
            stream.reset()
        except trio.Cancelled:
            stream.reset()
            raise
        except Exception:  # a bug of ours: loud, but it ends this stream alone
            logger.exception("a handler failed on a stream from %s", connection.peer_id)
            stream.reset()


def _transports(identity: Identity, swarm_key: SwarmKey | None) -> Sequence[Transport]:
    quic = () if swarm_key is not None else (QuicTransport(identity),)
    return (TcpTransport(), WebSocketTransport(), *quic, CircuitTransport())


@asynccontextmanager
async def open_host(
    identity: Identity,
    *,
    listen: Sequence[Multiaddr] = (),
    transports: Sequence[Transport] | None = None,
    securities: Sequence[Security] | None = None,
    limits: Limits | None = None,
    swarm_key: SwarmKey | None = None,
) -> AsyncIterator[Host]:
    """A running host, until the block ends.

    Args:
        identity: who we are.
        listen: addresses to accept connections on; none for a host that only dials.
        transports: ways to connect; TCP, WebSocket, QUIC and relays by default.
        securities: secure channels in order of preference; Noise, then TLS by default. There is no plaintext.
        limits: budgets.
        swarm_key: for a private swarm: nobody without this key is heard. Without QUIC, which has no place for it.

    Raises:
        AddressError: an address cannot be listened on.
    """
    host = Host(
        identity,
        transports=_transports(identity, swarm_key) if transports is None else transports,
        securities=(NoiseSecurity(identity), TlsSecurity(identity)) if securities is None else securities,
        limits=limits or Limits(),
        swarm_key=swarm_key,
    )
    for transport in host.swarm.transports:
        if isinstance(transport, HostedTransport):
            transport.attach(host)
    from net.identify import serve_identify
    from net.ping import serve_ping

    serve_ping(host)
    serve_identify(host)
    async with open_service_nursery() as nursery:
        host.listening = await nursery.start(host.swarm.run, listen)
        yield host
        await host.swarm.leave_circuits()
        nursery.cancel_scope.cancel()
