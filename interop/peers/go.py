"""go-libp2p, through its daemon's control socket.

Wire, on a unix socket: messages of p2pd.proto, each behind its length as a varint. A request to open a
stream turns its connection into that stream; for an inbound stream the daemon connects to the unix socket
that the handler was registered with, and begins with a StreamInfo.

Source: https://github.com/libp2p/go-libp2p-daemon/blob/master/specs/CONTROL.md
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from libp2p.identity.identify.pb.identify_pb2 import Identify

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
from interop.peers.fetch import fetch_go
from net import identify, ping
from net.addresses import Multiaddr, PeerAddress
from net.errors import NetError
from net.identity import PeerId
from net.io import receive_exactly, send

MAX_MESSAGE_BYTES = 64 * 1024
P_UNIX = 400  # the multiaddr protocol
ORPHAN_LIFE = "10m"  # the daemon ends by itself, should this process be killed

Fields = Mapping[int, Sequence[int | bytes]]

# Request.Type and the field that holds each request's body.
IDENTIFY, CONNECT, STREAM_OPEN, STREAM_HANDLER = 0, 1, 2, 3
BODY_FIELD = {CONNECT: 2, STREAM_OPEN: 3, STREAM_HANDLER: 4}


class GoDriver:
    name = "go"

    def fetch(self) -> None:
        fetch_go()

    @asynccontextmanager
    async def start(self, transport: str, security: str, relaying: Relaying = NO_RELAYING) -> AsyncIterator[GoPeer]:
        with tempfile.TemporaryDirectory(prefix="raceme-") as name:
            folder = Path(name)
            command = [
                str(fetch_go()),
                f"-listen=/unix{folder}/control",
                f"-hostAddrs={listen_address(transport)}",
                f"-noise={str(security == 'noise').lower()}",
                f"-tls={str(security == 'tls').lower()}",
                *_relay_options(relaying),
                f"-idleTimeout={ORPHAN_LIFE}",
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
        self._control = str(folder / "control")
        self._handler = str(folder / "echo")

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
            message = Identify.FromString(await _receive(stream))
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
            fields, stream = await self._call(IDENTIFY)
            await trio.aclose_forcefully(stream)
            answer = _decode(_bytes(fields, 4))
            self.address = PeerAddress(
                address=Multiaddr(_bytes(answer, 2)).decapsulate_code(421),
                peer_id=PeerId(_bytes(answer, 1)),
            )
        if scope.cancelled_caught:
            raise PeerError(f"p2pd was not ready within {START_S:g} s")

    async def _serve_echo(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async def handle(stream: trio.SocketStream) -> None:
            async with stream:
                try:
                    await _receive(stream)  # StreamInfo: who asks
                    await answer_echo(stream)
                    # The daemon resets a stream whose handler has gone, and with QUIC what is still on its way is lost.
                    await stream.receive_some()
                except NetError:
                    pass  # the other end of this echo, the suite itself, tells what is missing

        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            await listening.bind(self._handler)
            listening.listen(16)
            # Written by hand: py-multiaddr leaves out the path's leading slash, which go-multiaddr counts in.
            path = self._handler.encode()
            handler = _varint(P_UNIX) + _varint(len(path)) + path
            await self._ask(STREAM_HANDLER, {1: [handler], 2: [ECHO.encode()], 3: [0]})
            task_status.started()
            await trio.serve_listeners(handle, [trio.SocketListener(listening)])

    @asynccontextmanager
    async def _stream(self, to: PeerAddress, protocol: str) -> AsyncIterator[trio.SocketStream]:
        who = to.peer_id.to_bytes()
        await self._ask(CONNECT, {1: [who], 2: [to.address.to_bytes()]})
        _, stream = await self._call(STREAM_OPEN, {1: [who], 2: [protocol.encode()]})
        async with stream:
            yield stream

    async def _ask(self, type_: int, body: Fields) -> None:
        _, stream = await self._call(type_, body)
        await stream.aclose()

    async def _call(self, type_: int, body: Fields | None = None) -> tuple[Fields, trio.SocketStream]:
        stream = await trio.open_unix_socket(self._control)
        try:
            request = _encode({1: [type_]} if body is None else {1: [type_], BODY_FIELD[type_]: [_encode(body)]})
            await send(stream, _varint(len(request)) + request)
            fields = _decode(await _receive(stream))
            if fields[1][0] != 0:
                raise PeerError("p2pd: " + _bytes(_decode(_bytes(fields, 2)), 1).decode(errors="replace"))
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return fields, stream


# Protobuf, as much of it as p2pd.proto uses: varints and bytes.


def _encode(fields: Fields) -> bytes:
    out = bytearray()
    for number, values in fields.items():
        for value in values:
            if isinstance(value, int):
                out += _varint(number << 3) + _varint(value)
            else:
                out += _varint(number << 3 | 2) + _varint(len(value)) + value
    return bytes(out)


def _decode(data: bytes) -> Fields:
    fields: dict[int, list[int | bytes]] = defaultdict(list)
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        key = varint()
        value = varint()
        if key & 7 == 2:
            fields[key >> 3].append(data[position : position + value])
            position += value
        elif key & 7 == 0:
            fields[key >> 3].append(value)
        else:
            raise PeerError(f"p2pd sent a field of wire type {key & 7}")
    return fields


def _bytes(fields: Fields, number: int) -> bytes:
    values = fields.get(number) or [b""]
    return values[0] if isinstance(values[0], bytes) else b""


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


async def _receive(stream: trio.abc.Stream) -> bytes:
    length = shift = 0
    while True:
        byte = (await receive_exactly(stream, 1))[0]
        length |= (byte & 127) << shift
        shift += 7
        if length > MAX_MESSAGE_BYTES or shift > 21:
            raise PeerError(f"a message of {length} bytes or more")
        if byte < 128:
            return await receive_exactly(stream, length)
