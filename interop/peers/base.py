"""What the suite asks of a foreign peer, and how its program is kept on a leash.

The echo protocol, ``ECHO``: 8 bytes, big-endian, say how many bytes follow; the answer is those bytes, sent
while they come. It needs no half-close, which not every peer's control interface can pass on.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import trio

from net.addresses import Multiaddr, PeerAddress
from net.errors import RemoteProtocolError
from net.identity import PeerId
from net.io import receive_exactly, send

__all__ = [
    "ECHO",
    "Driver",
    "Finder",
    "Peer",
    "PeerError",
    "Relaying",
    "Sight",
    "answer_echo",
    "program",
    "request_echo",
]

ECHO = "/raceme-interop/echo/1"
QUIC = "/ip4/127.0.0.1/udp/0/quic-v1"
PIECE_BYTES = 64 * 1024
START_S = 30.0
STOP_S = 5.0


class PeerError(Exception):
    """The foreign peer reported a failure, or its program did not do as it should."""


@dataclass(frozen=True, kw_only=True)
class Relaying:
    """What a peer has to do with relays. ``through``: where it holds a reservation, if it does."""

    serves: bool = False
    dials: bool = False
    through: PeerAddress | None = None


NO_RELAYING = Relaying()


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What identify told the foreign peer of us."""

    peer: str
    addresses: Sequence[str]
    observed: str | None
    protocols: Sequence[str]
    agent: str
    version: str


class Peer(Protocol):
    """A running foreign peer that listens at ``address`` and serves ``ECHO``, ping and identify."""

    address: PeerAddress

    async def echo(self, to: PeerAddress, count: int) -> float:
        """Dial us and have ``count`` random bytes echoed; seconds. Raises: PeerError."""

    async def ping(self, to: PeerAddress) -> float:
        """Ping us, seconds. Raises: PeerError."""

    async def identify(self, to: PeerAddress) -> Sight:
        """Ask us who we are. Raises: PeerError."""


class Finder(Protocol):
    """A running peer that is a server of libp2p's Kademlia. Each method raises PeerError, or NetError if it is ours."""

    address: PeerAddress

    async def join(self, to: PeerAddress) -> None:
        """Get to know a server."""

    async def provide(self, multihash: bytes) -> None:
        """Tell others that the content is here."""

    async def find_providers(self, multihash: bytes) -> Sequence[PeerId]:
        """Who has it."""

    async def find_peer(self, peer_id: PeerId) -> Sequence[Multiaddr]:
        """Where it is; nothing when nobody knows."""


class Driver(Protocol):
    """One implementation."""

    name: str

    def fetch(self) -> None:
        """Make sure that it is here; may take minutes. Raises: FetchError."""

    def start(
        self, transport: str, security: str, relaying: Relaying = NO_RELAYING
    ) -> AbstractAsyncContextManager[Peer]:
        """Run a peer that knows this transport (``tcp``, ``ws``, ``quic``) and security (``noise``, ``tls``) alone."""

    def start_finder(self) -> AbstractAsyncContextManager[Finder]:
        """Run a server of Kademlia, over TCP and Noise."""


def listen_address(transport: str) -> Multiaddr:
    """A free port of this machine's loopback."""
    return Multiaddr({"tcp": "/ip4/127.0.0.1/tcp/0", "ws": "/ip4/127.0.0.1/tcp/0/ws", "quic": QUIC}[transport])


@asynccontextmanager
async def program(command: Sequence[str]) -> AsyncIterator[trio.Process]:
    """A process with pipes for standard input and output, ended with the block: asked first, then killed."""
    process = await trio.lowlevel.open_process(
        list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    await pipe.aclose()
            if process.poll() is None:
                process.terminate()
            with trio.move_on_after(STOP_S):
                await process.wait()
            if process.poll() is None:
                process.kill()
                await process.wait()


async def answer_echo(stream: trio.abc.Stream) -> None:
    """The listener's side of ``ECHO``. Raises: NetError."""
    left = int.from_bytes(await receive_exactly(stream, 8), "big")
    while left:
        part = await stream.receive_some(min(left, PIECE_BYTES))
        if not part:
            raise RemoteProtocolError(f"{left} bytes of the echo never came")
        await send(stream, bytes(part))
        left -= len(part)


async def request_echo(stream: trio.abc.Stream, data: bytes) -> float:
    """The dialler's side of ``ECHO``: seconds from the first byte sent to the last received.

    Raises:
        RemoteProtocolError: other bytes came back.
        NetError: the stream broke.
    """
    start = trio.current_time()

    async def give() -> None:
        await send(stream, len(data).to_bytes(8, "big"))
        for at in range(0, len(data), PIECE_BYTES):
            await send(stream, data[at : at + PIECE_BYTES])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give)
        received = await receive_exactly(stream, len(data))
    seconds = trio.current_time() - start
    if received != data:
        raise RemoteProtocolError("the echo came back changed")
    return seconds
