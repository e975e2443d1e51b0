"""Sockets on the lab's machines, used from the lab's own process: what probes see with."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from interop.lab.machine import Machine

Endpoint = tuple[str, int]
MAX_DATAGRAM = 2048


def _open(machine: Machine, kind: socket.SocketKind, *, ipv6: bool) -> trio.socket.SocketType:
    made = trio.socket.from_stdlib_socket(machine.socket(socket.AF_INET6 if ipv6 else socket.AF_INET, kind))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if kind is socket.SOCK_STREAM:  # to listen where we dial from; for UDP it would share what arrives
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return made


class Udp:
    """A UDP socket that is bound to a port of its machine."""

    def __init__(self, machine: Machine, made: trio.socket.SocketType) -> None:
        self.machine = machine
        self._socket = made

    async def send(self, to: Endpoint, data: bytes = b"?") -> None:
        try:
            await self._socket.sendto(data, to)
        except OSError:  # what an earlier packet came back with
            return

    async def receive(self) -> tuple[bytes, Endpoint]:
        while True:
            try:
                data, source = await self._socket.recvfrom(MAX_DATAGRAM)
            except ConnectionError:  # what an earlier packet came back with
                continue
            return data, source[:2]

    async def heard(self, wait_s: float) -> list[Endpoint]:
        """Where packets came from in this time; a list, for they are counted too."""
        sources = []
        with trio.move_on_after(wait_s):
            while True:
                sources.append((await self.receive())[1])
        return sources

    async def hear(self, wait_s: float) -> Endpoint | None:
        """Where the next packet comes from; None if none comes."""
        with trio.move_on_after(wait_s):
            return (await self.receive())[1]
        return None


@asynccontextmanager
async def udp(machine: Machine, port: int, *, ipv6: bool = False) -> AsyncIterator[Udp]:
    with _open(machine, socket.SOCK_DGRAM, ipv6=ipv6) as made:
        await made.bind(("::" if ipv6 else "0.0.0.0", port))
        yield Udp(machine, made)


class Listener:
    """A TCP socket that accepts, and keeps what it accepted open."""

    def __init__(self, made: trio.socket.SocketType) -> None:
        self._socket = made
        self.accepted: list[trio.socket.SocketType] = []

    async def accept(self, wait_s: float) -> Endpoint | None:
        """Who dials next; None if nobody does."""
        with trio.move_on_after(wait_s):
            made, source = await self._socket.accept()
            self.accepted.append(made)
            host, port = source[:2]
            return host, port
        return None

    def close(self) -> None:
        for made in [self._socket, *self.accepted]:
            made.close()


@asynccontextmanager
async def listening(machine: Machine, port: int, *, ipv6: bool = False) -> AsyncIterator[Listener]:
    made = _open(machine, socket.SOCK_STREAM, ipv6=ipv6)
    await made.bind(("::" if ipv6 else "0.0.0.0", port))
    made.listen()
    listener = Listener(made)
    try:
        yield listener
    finally:
        listener.close()


@asynccontextmanager
async def dialled(
    machine: Machine, to: Endpoint, *, port: int = 0, wait_s: float = 1.0, ipv6: bool = False
) -> AsyncIterator[trio.socket.SocketType | None]:
    """A TCP connection from this port of the machine; None if it does not come about."""
    with _open(machine, socket.SOCK_STREAM, ipv6=ipv6) as made:
        await made.bind(("::" if ipv6 else "0.0.0.0", port))
        connected = False
        with trio.move_on_after(wait_s):
            try:
                await made.connect(to)
                connected = True
            except OSError:  # refused, or no way there
                pass
        yield made if connected else None
