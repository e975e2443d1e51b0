"""A connected TCP socket as a RawStream: one system call for a send that fits or for a receive."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from net.io import SingleUse, check_max_bytes
from net.transports.base import RawStream

T = TypeVar("T")
DEFAULT_RECEIVE_BYTES = 64 * 1024
DRAINED_RECEIVES = 64
NO_LIMIT = 2**31 - 1
# Linger for no time. What was not acknowledged would else be sent again and again, for minutes, and as long no dial
# from our port to the same place would be possible.
ABORT = struct.pack("ii", 1, 0)


class SocketStream(RawStream):
    """Takes the socket over from trio's stream, which must not be used afterwards."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._socket = socket.socket(fileno=stream.socket.detach())
        self._socket.setblocking(False)
        self._sending = SingleUse("sending on this socket")
        self._receiving = SingleUse("receiving from this socket")

    def limit_unsent(self, size: int | None) -> None:
        if sys.platform != "win32" and self._socket.fileno() != -1:
            limit = NO_LIMIT if size is None else size
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, limit)

    def abandon(self) -> None:
        if self._socket.fileno() != -1:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)

    def try_send(self, data: bytes | bytearray | memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._translated(error) from error

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with self._sending:
            await trio.lowlevel.checkpoint()
            view = memoryview(data).cast("B")
            while view or self._socket.fileno() == -1:
                view = view[self.try_send(view) :]
                if view:
                    await self._wait(trio.lowlevel.wait_writable)

    async def wait_send_all_might_not_block(self) -> None:
        with self._sending:
            await trio.lowlevel.checkpoint()
            await self._wait(trio.lowlevel.wait_writable)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        check_max_bytes(max_bytes)
        return await self._receive(lambda: self._socket.recv(max_bytes or DEFAULT_RECEIVE_BYTES))

    async def receive_into(self, buffer: bytearray | memoryview) -> int:
        return await self._receive(lambda: self._socket.recv_into(buffer))

    async def _receive(self, receive: Callable[[], T]) -> T:
        with self._receiving:
            await trio.lowlevel.checkpoint()  # first: who got the last bytes may answer before we look for more
            while True:
                try:
                    return receive()
                except BlockingIOError:
                    await self._wait(trio.lowlevel.wait_readable)
                except OSError as error:
                    raise self._translated(error) from error

    async def aclose(self) -> None:
        if self._socket.fileno() != -1:
            trio.lowlevel.notify_closing(self._socket)
            self._drain()
            self._socket.close()
        await trio.lowlevel.checkpoint()

    def _drain(self) -> None:
        """Say that we end, and take what has come: unread bytes would make the kernel break the connection, and the
        other side lose what it has not read yet."""
        scratch = bytearray(DEFAULT_RECEIVE_BYTES)
        try:
            self._socket.shutdown(socket.SHUT_WR)
            for _ in range(DRAINED_RECEIVES):
                if not self._socket.recv_into(scratch):
                    return
        except OSError:
            pass  # nothing more has come, or nobody is there

    async def _wait(self, wait: Callable[[socket.socket], Awaitable[None]]) -> None:
        if self._socket.fileno() == -1:
            raise trio.ClosedResourceError("this socket was closed here")
        await wait(self._socket)

    def _translated(self, error: OSError) -> Exception:
        if self._socket.fileno() == -1:
            return trio.ClosedResourceError("this socket was closed here")
        return trio.BrokenResourceError(f"socket connection broken: {error.strerror}")
