"""TCP: ``/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT``.

All dials go out from one port, that of the listener if there is one: a NAT then maps that port, others see and tell
the address at which we may be reached, and two that dial each other at once meet there (simultaneous open).
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import trio

from net import addresses
from net.addresses import Multiaddr
from net.errors import AddressError, DialError
from net.identity import PeerId
from net.transports.base import Accept, RawConnection
from net.transports.socket_stream import SocketStream

BACKLOG = 1024
PORT_TAKEN = (errno.EADDRNOTAVAIL, errno.EADDRINUSE)  # by a connection of ours to the same place; by somebody else


class TcpTransport:
    """Plain TCP sockets with TCP_NODELAY, as trio opens them."""

    def __init__(self) -> None:
        self._listening: dict[socket.AddressFamily, tuple[str, int]] = {}  # where others than this machine may come in
        self._dialled_from: dict[socket.AddressFamily, tuple[str, int]] = {}  # by who does not listen

    def can_dial(self, address: Multiaddr) -> bool:
        return addresses.host_port(address) is not None

    async def dial(self, address: Multiaddr, peer_id: PeerId | None = None) -> RawConnection:
        host, port = _host_port(address)
        stream = await self._dial_from_own_port(address, host, port) or await connect(address, host, port)
        local = local_address(stream)
        return RawConnection(stream=SocketStream(stream), local=local, remote=address)

    async def listen(
        self,
        address: Multiaddr,
        accept: Accept,
        *,
        task_status: trio.TaskStatus[Sequence[Multiaddr]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        host, port = _host_port(address)
        try:
            listeners = await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
            for listener in listeners:
                _share_port(listener.socket)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressError(
                    f"port {port} of {host} is in use by another program; choose another with --listen "
                    f"(port 0 takes any free one)"
                ) from error
            raise AddressError(f"cannot listen on {address}: {_reason(error)}") from error

        async def handle(stream: trio.SocketStream) -> None:
            try:
                peer = stream.socket.getpeername()
            except OSError:  # gone before we looked
                await trio.aclose_forcefully(stream)
                return
            local, remote = local_address(stream), addresses.tcp(peer[0], peer[1])
            await accept(RawConnection(stream=SocketStream(stream), local=local, remote=remote))

        bound = [addresses.tcp(*listener.socket.getsockname()[:2]) for listener in listeners]
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, handle, listeners)
            with self._dialling_from(listeners):
                task_status.started(bound)
                await trio.sleep_forever()

    @contextmanager
    def _dialling_from(self, listeners: Sequence[trio.SocketListener]) -> Iterator[None]:
        """Let dials go out from where these listen, unless that is this machine alone."""
        found = {listener.socket.family: listener.socket.getsockname()[:2] for listener in listeners}
        ours = {family: at for family, at in found.items() if not _is_this_machine(at[0])}
        self._listening |= ours
        try:
            yield
        finally:
            for family, at in ours.items():
                if self._listening.get(family) == at:
                    del self._listening[family]

    async def _dial_from_own_port(self, address: Multiaddr, host: str, port: int) -> trio.SocketStream | None:
        """None where that cannot be: a connection from that port goes there already, or there is this machine."""
        try:
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            return None  # dialled without, it tells what is wrong
        family, _, _, _, where = found[0]
        if _is_this_machine(str(where[0])):
            return None
        ours = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._bind(ours)
            made = trio.socket.from_stdlib_socket(ours)
            await made.connect(where)
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError) and (error.errno in PORT_TAKEN or len(found) > 1):
                if error.errno == errno.EADDRINUSE:
                    self._dialled_from.pop(family, None)
                return None
            if isinstance(error, OSError):
                raise DialError(f"{address}: {_reason(error)}") from error
            raise
        return trio.SocketStream(made)

    def _bind(self, ours: socket.socket) -> None:
        """To where we listen, or else to where all dials go out from: the first one takes any free port.

        Without a checkpoint: dials that begin at the same time are to have the same port.
        """
        family = ours.family
        anywhere = "::" if family is socket.AF_INET6 else "0.0.0.0"
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _share_port(ours)
        ours.bind(self._listening.get(family) or self._dialled_from.get(family, (anywhere, 0)))
        self._dialled_from[family] = (anywhere, ours.getsockname()[1])


def _is_this_machine(ip: str) -> bool:
    return ipaddress.ip_address(ip).is_loopback


def _share_port(own: trio.socket.SocketType | socket.socket) -> None:
    """Let other sockets of ours use its port. Set after binding, it lets nobody else take the port unnoticed."""
    if sys.platform != "win32":
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


async def connect(address: Multiaddr, host: str, port: int) -> trio.SocketStream:
    """Connect to ``host``, on behalf of ``address``.

    Raises:
        DialError: refused, unreachable, or no such host; the text names ``address``.
    Cancellation: leaves nothing open.
    """
    try:
        return await trio.open_tcp_stream(host, port)
    except OSError as error:
        raise DialError(f"{address}: {_reason(error)}") from error


def local_address(stream: trio.SocketStream) -> Multiaddr:
    """The end of a connection that is on this machine."""
    host, port = stream.socket.getsockname()[:2]
    return addresses.tcp(host, port)


def _host_port(address: Multiaddr) -> tuple[str, int]:
    where = addresses.host_port(address)
    if where is None:
        raise AddressError(f"{address} is no TCP address (one looks like /ip4/0.0.0.0/tcp/4001)")
    return where


def _reason(error: OSError) -> str:
    """The kernel's words for what went wrong, without trio's wrapping."""
    inner: BaseException = error
    while isinstance(inner.__cause__, OSError):
        inner = inner.__cause__
    if isinstance(inner.__cause__, BaseExceptionGroup):
        inner = inner.__cause__.exceptions[0]
    text = inner.strerror if isinstance(inner, OSError) and inner.strerror else str(inner)
    return text.rpartition(": ")[2].lower()  # trio puts the address before the reason
