"""The transport: sockets, one for each address that is listened on, from which we also dial and punch."""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import random
import socket
from collections.abc import Sequence

import trio

from net import addresses
from net.addresses import Multiaddr
from net.errors import AddressError, DialError, LocalProtocolError
from net.identity import Identity, PeerId
from net.security.certificate import make_credentials
from net.transports.base import Accept, MuxedConnection
from net.transports.quic.connection import QuicConnection
from net.transports.quic.endpoint import LONG_HEADER, Endpoint
from net.transports.quic.udp import Address, UdpSocket, source

logger = logging.getLogger(__name__)

SECURITY = "/tls/1.0.0"
PUNCH_BYTES = 64
PUNCH_BETWEEN_S = (0.010, 0.200)  # DCUtR's specification
PUNCH_S = 5.0
ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


class QuicTransport:
    """QUIC v1 for one identity. ``run`` must run before it dials without listening.

    Where it listens, it also dials from: the NAT's mapping of that socket is the one that peers see and can be
    told, which hole punching needs. A host that only dials gets one socket of each family.
    """

    def __init__(self, identity: Identity) -> None:
        self._credentials = make_credentials(identity)
        self._listening: list[Endpoint] = []
        self._dialling: dict[socket.AddressFamily, Endpoint] = {}
        self._nursery: trio.Nursery | None = None
        self._opening = trio.Lock()

    def can_dial(self, address: Multiaddr) -> bool:
        return addresses.quic_host_port(address) is not None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry what is dialled from sockets that nobody listens on, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None
                self._dialling.clear()

    async def dial(self, address: Multiaddr, peer_id: PeerId | None = None) -> MuxedConnection:
        family, target = await _resolve(address)
        endpoint = await self._endpoint(family, target, address)
        try:
            local = addresses.quic(source(family, target), endpoint.udp.address[1])
        except OSError as error:
            raise DialError(f"{address}: {_reason(error)}") from error
        connection = endpoint.dial(target)
        try:
            await connection.established.wait()
        except BaseException:
            connection.leave(DialError("given up"))
            raise
        if connection.failure is not None or connection.peer_id is None:
            raise DialError(f"{address}: {connection.failure}") from connection.failure
        return MuxedConnection(
            mux=connection, peer_id=connection.peer_id, security=SECURITY, local=local, remote=address
        )

    async def listen(
        self,
        address: Multiaddr,
        accept: Accept,
        *,
        task_status: trio.TaskStatus[Sequence[Multiaddr]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        family, (host, port, *_) = await _resolve(address, listening=True)
        try:
            udp = UdpSocket(family, host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressError(
                    f"UDP port {port} of {host} is in use by another program; choose another with --listen "
                    f"(port 0 takes any free one)"
                ) from error
            raise AddressError(f"cannot listen on {address}: {_reason(error)}") from error
        bound = addresses.quic(*udp.address[:2])

        async def arrived(connection: QuicConnection, remote: Address) -> None:
            if connection.peer_id is not None:
                await accept(
                    MuxedConnection(
                        mux=connection,
                        peer_id=connection.peer_id,
                        security=SECURITY,
                        local=_local(udp, family, remote),
                        remote=addresses.quic(*remote[:2]),
                    )
                )

        endpoint = Endpoint(udp, self._credentials, arrived)
        async with trio.open_nursery() as nursery:
            await nursery.start(endpoint.run)
            self._listening.append(endpoint)
            try:
                task_status.started([bound])
                await trio.sleep_forever()
            finally:
                self._listening.remove(endpoint)

    async def punch(self, address: Multiaddr) -> None:
        """Open our NAT for ``address``: send it datagrams of random bytes, from the socket that we would dial it from.

        At random times, as DCUtR says, until cancelled (when the peer's connection has come) or for ``PUNCH_S``.

        Raises:
            AddressError, DialError: as ``dial``, which never waits for these.
        Source: https://github.com/libp2p/specs/blob/master/relay/DCUtR.md
        """
        family, target = await _resolve(address)
        endpoint = await self._endpoint(family, target, address)
        with trio.move_on_after(PUNCH_S):
            while True:
                data = bytearray(os.urandom(PUNCH_BYTES))
                data[0] &= LONG_HEADER - 1 >> 1  # neither a long header nor a short one
                endpoint.punch(bytes(data), target)
                await trio.sleep(random.uniform(*PUNCH_BETWEEN_S))

    def local_port(self, address: Multiaddr) -> int | None:
        """The port that ``dial(address)`` comes from, before NATs; None if that socket does not exist yet."""
        where = addresses.quic_host_port(address)
        if where is None:
            return None
        family = socket.AF_INET6 if ":" in where[0] else socket.AF_INET
        endpoint = self._existing(family, (where[0], where[1]))
        return None if endpoint is None else int(endpoint.udp.address[1])

    def rebind(self) -> None:
        """Our network has changed: go on from where we are now.

        Sockets that only dial are replaced. Those that listen keep their port, which peers know; what was dialled
        from them tells its peers where it now comes from. Streams go on either way.
        """
        for family, endpoint in self._dialling.items():
            try:
                udp = UdpSocket(family, ANY[family], 0)
            except OSError as error:  # this network may lack a whole family
                logger.debug("no other UDP socket: %s", _reason(error))
                endpoint.move()
            else:
                endpoint.rebind(udp)
        for endpoint in self._listening:
            endpoint.move()

    # Sockets to dial from

    async def _endpoint(self, family: socket.AddressFamily, target: Address, address: Multiaddr) -> Endpoint:
        async with self._opening:
            found = self._existing(family, target)
            if found is not None:
                return found
            if self._nursery is None:
                raise LocalProtocolError("the QUIC transport is not running")
            try:
                endpoint = Endpoint(UdpSocket(family, ANY[family], 0), self._credentials)
            except OSError as error:
                raise DialError(f"{address}: {_reason(error)}") from error
            await self._nursery.start(endpoint.run)
            self._dialling[family] = endpoint
            return endpoint

    def _existing(self, family: socket.AddressFamily, target: Address) -> Endpoint | None:
        for endpoint in self._listening:
            if endpoint.udp.family == family:
                host = ipaddress.ip_address(str(endpoint.udp.address[0]).partition("%")[0])
                if host.is_unspecified or host.is_loopback == _is_loopback(target):
                    return endpoint
        return self._dialling.get(family)


async def _resolve(address: Multiaddr, *, listening: bool = False) -> tuple[socket.AddressFamily, Address]:
    """The socket address of a multiaddr.

    Raises:
        AddressError: it is no QUIC address.
        DialError: no such host.
    """
    where = addresses.quic_host_port(address)
    if where is None:
        raise AddressError(f"{address} is no QUIC address (one looks like /ip4/0.0.0.0/udp/4001/quic-v1)")
    kind = next(iter(address.items()))[0].name
    families = {"dns4": socket.AF_INET, "ip4": socket.AF_INET, "dns6": socket.AF_INET6, "ip6": socket.AF_INET6}
    family = families.get(kind, socket.AF_UNSPEC)
    try:
        found = await trio.socket.getaddrinfo(*where, family=family, type=socket.SOCK_DGRAM)
    except OSError as error:
        if listening:
            raise AddressError(f"cannot listen on {address}: {_reason(error)}") from error
        raise DialError(f"{address}: {_reason(error)}") from error
    return found[0][0], found[0][4]


def _is_loopback(target: Address) -> bool:
    return ipaddress.ip_address(str(target[0]).partition("%")[0]).is_loopback


def _local(udp: UdpSocket, family: socket.AddressFamily, remote: Address) -> Multiaddr:
    host, port = udp.address[:2]
    if ipaddress.ip_address(str(host).partition("%")[0]).is_unspecified:
        try:
            host = source(family, remote)
        except OSError:
            pass  # the way there has gone; the wildcard is all that is known
    return addresses.quic(str(host), int(port))


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
