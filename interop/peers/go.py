"""go-libp2p, as its daemon ``p2pd``, which ``control.py`` talks to."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from libp2p.identity.identify.pb.identify_pb2 import Identify

from interop.peers import control
from interop.peers.base import (
    ECHO,
    NO_RELAYING,
    START_S,
    PeerError,
    Relaying,
    Sight,
    answer_echo,
    listen_address,
    program,
    request_echo,
)
from interop.peers.control import Control
from interop.peers.fetch import fetch_go
from net import identify, ping
from net.addresses import Multiaddr, PeerAddress
from net.errors import NetError
from net.identity import PeerId
from net.io import receive_exactly, send

ORPHAN_LIFE = "10m"  # the daemon ends by itself, should this process be killed
DHT_S = 10  # for one of the DHT's answers
CID = b"\x01\x55"  # what makes a multihash one: version 1, raw bytes


class GoDriver:
    name = "go"

    def fetch(self) -> None:
        fetch_go()

    @asynccontextmanager
    async def start(self, transport: str, security: str, relaying: Relaying = NO_RELAYING) -> AsyncIterator[GoPeer]:
        options = [
            f"-noise={str(security == 'noise').lower()}",
            f"-tls={str(security == 'tls').lower()}",
            *_relay_options(relaying),
        ]
        async with daemon(str(listen_address(transport)), options) as peer:
            yield peer

    @asynccontextmanager
    async def start_finder(self) -> AsyncIterator[GoPeer]:
        async with daemon(str(listen_address("tcp")), ["-dhtServer"]) as peer:
            yield peer


@asynccontextmanager
async def daemon(listen: str, options: Sequence[str], *, within: Sequence[str] = ()) -> AsyncIterator[GoPeer]:
    """A running daemon.

    Args:
        listen: addresses, with commas between them.
        options: of its command line.
        within: how the command line begins, for one that is to run somewhere else.
    """
    with tempfile.TemporaryDirectory(prefix="raceme-") as name:
        folder = Path(name)
        command = [
            *within,
            str(fetch_go()),
            f"-listen=/unix{folder}/control",
            f"-hostAddrs={listen}",
            f"-idleTimeout={ORPHAN_LIFE}",
            *options,
        ]
        async with program(command) as process, trio.open_nursery() as nursery:
            peer = GoPeer(folder)
            await peer._start(process)
            await nursery.start(peer._serve_echo)
            yield peer
            nursery.cancel_scope.cancel()


def _relay_options(relaying: Relaying) -> list[str]:
    """It serves only if it believes that it is public, and reserves only if it believes that it is not."""
    options = [
        f"-relay={str(relaying != NO_RELAYING).lower()}",
        f"-relayService={str(relaying.serves).lower()}",
    ]
    if relaying.serves:
        options.append("-forceReachabilityPublic")
    if relaying.through is not None:
        options += ["-dht", "-autoRelay", "-relayDiscovery=false", f"-trustedRelays={relaying.through}"]
        options.append("-forceReachabilityPrivate")
    return options


class GoPeer:
    address: PeerAddress

    def __init__(self, folder: Path) -> None:
        self.control = Control(folder / "control")
        self._handler = folder / "echo"

    async def echo(self, to: PeerAddress, count: int) -> float:
        async with self._stream(to, ECHO) as stream:
            return await request_echo(stream, os.urandom(count))

    async def ping(self, to: PeerAddress) -> float:
        async with self._stream(to, ping.PROTOCOL_ID) as stream:
            data = os.urandom(ping.PING_BYTES)
            start = trio.current_time()
            await send(stream, data)
            if await receive_exactly(stream, len(data)) != data:
                raise PeerError("other bytes came back")
            return trio.current_time() - start

    async def identify(self, to: PeerAddress) -> Sight:
        async with self._stream(to, identify.PROTOCOL_ID) as stream:
            message = Identify.FromString(await control.receive(stream))
        return Sight(
            peer=str(to.peer_id),  # the daemon has compared it with the key that it met
            addresses=[str(Multiaddr(raw)) for raw in message.listen_addrs],
            observed=str(Multiaddr(message.observed_addr)) if message.observed_addr else None,
            protocols=list(message.protocols),
            agent=message.agent_version,
            version=message.protocol_version,
        )

    async def _start(self, process: trio.Process) -> None:
        """Wait for the daemon's words, then ask who and where it is."""
        if process.stdout is None:
            raise PeerError("p2pd has no output")
        with trio.move_on_after(START_S) as scope:
            said = b""
            while b"Peer Addrs:\n/" not in said:
                part = await process.stdout.receive_some()
                if not part:
                    raise PeerError(f"p2pd ended at once: {said.decode(errors='replace').strip()}")
                said += part
            peer_id, addresses = await self.control.identify()
            self.address = PeerAddress(address=addresses[0].decapsulate_code(421), peer_id=peer_id)
        if scope.cancelled_caught:
            raise PeerError(f"p2pd was not ready within {START_S:g} s")

    async def _serve_echo(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async def handle(stream: trio.SocketStream) -> None:
            async with stream:
                try:
                    await control.receive(stream)  # StreamInfo: who asks
                    await answer_echo(stream)
                    # The daemon resets a stream whose handler has gone, and with QUIC what is still on its way is lost.
                    await stream.receive_some()
                except NetError:
                    pass  # the other end of this echo, the suite itself, tells what is missing

        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            await listening.bind(str(self._handler))
            listening.listen(16)
            await self.control.handle(ECHO, self._handler)
            task_status.started()
            await trio.serve_listeners(handle, [trio.SocketListener(listening)])

    @asynccontextmanager
    async def _stream(self, to: PeerAddress, protocol: str) -> AsyncIterator[trio.SocketStream]:
        await self.control.connect(to)
        async with await self.control.open_stream(to.peer_id, protocol) as stream:
            yield stream

    # The DHT, if it is in it

    async def join(self, to: PeerAddress) -> None:
        await self.control.connect(to)

    async def provide(self, multihash: bytes) -> None:
        await self.control.ask_dht(control.PROVIDE, {3: [CID + multihash]}, timeout_s=DHT_S)

    async def find_providers(self, multihash: bytes) -> Sequence[PeerId]:
        return list(await self.control.ask_dht(control.FIND_PROVIDERS, {3: [CID + multihash], 6: [8]}, timeout_s=DHT_S))

    async def find_peer(self, peer_id: PeerId) -> Sequence[Multiaddr]:
        found = await self.control.ask_dht(control.FIND_PEER, {2: [peer_id.to_bytes()]}, timeout_s=DHT_S)
        return found.get(peer_id, [])
