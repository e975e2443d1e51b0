"""TCP: ``/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT``."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import trio

from net import addresses
from net.addresses import Multiaddr
from net.errors import AddressError, DialError
from net.identity import PeerId
from net.transports.base import Accept, RawConnection
from net.transports.socket_stream import SocketStream

BACKLOG = 1024


class TcpTransport:
    """Plain TCP sockets, opened by trio (which sets TCP_NODELAY)."""

    def can_dial(self, address: Multiaddr) -> bool:
        return addresses.host_port(address) is not None

    async def dial(self, address: Multiaddr, peer_id: PeerId | None = None) -> RawConnection:
        stream = await connect(address, *_host_port(address))
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
            task_status.started(bound)


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
