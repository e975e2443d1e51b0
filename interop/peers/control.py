"""The control socket of go-libp2p's daemon: messages of p2pd.proto, as bytes and back.

Wire, on a unix socket: each message behind its length as a varint. One request for each connection; the answer says
OK or what is wrong. A request to open a stream turns its connection into that stream, one to the DHT that has many
answers sends them one after another.

Source: https://github.com/libp2p/go-libp2p-daemon/blob/master/specs/CONTROL.md
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import trio

from interop.peers.base import PeerError
from net.addresses import Multiaddr, PeerAddress
from net.identity import PeerId
from net.io import receive_exactly, send

MAX_MESSAGE_BYTES = 64 * 1024
MAX_ANSWERS = 64  # to one question to the DHT
P_UNIX = 400  # the multiaddr protocol

Fields = Mapping[int, Sequence[int | bytes]]

# Request.Type and the field that holds each request's body.
IDENTIFY, CONNECT, STREAM_OPEN, STREAM_HANDLER, DHT = 0, 1, 2, 3, 4
BODY_FIELD = {CONNECT: 2, STREAM_OPEN: 3, STREAM_HANDLER: 4, DHT: 5}
# DHTRequest.Type
FIND_PEER, FIND_PROVIDERS, PROVIDE = 0, 2, 8
DHT_END = 2  # DHTResponse.Type


class Control:
    """Asks the daemon that listens on the unix socket at ``path``."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    async def identify(self) -> tuple[PeerId, list[Multiaddr]]:
        """Who it is, and where."""
        fields, stream = await self.call(IDENTIFY)
        await trio.aclose_forcefully(stream)
        answer = decode(bytes_of(fields, 4))
        return PeerId(bytes_of(answer, 1)), [Multiaddr(raw) for raw in all_bytes_of(answer, 2)]

    async def connect(self, to: PeerAddress) -> None:
        """Have it dial somebody with whom it is not connected."""
        await self.ask(CONNECT, {1: [to.peer_id.to_bytes()], 2: [to.address.to_bytes()]})

    async def handle(self, protocol: str, socket_path: Path) -> None:
        """Have it pass inbound streams on to the unix socket there; each begins with a StreamInfo."""
        # Written by hand: py-multiaddr leaves out the path's leading slash, which go-multiaddr counts in.
        path = str(socket_path).encode()
        handler = varint(P_UNIX) + varint(len(path)) + path
        await self.ask(STREAM_HANDLER, {1: [handler], 2: [protocol.encode()], 3: [0]})

    async def open_stream(self, to: PeerId, protocol: str) -> trio.SocketStream:
        _, stream = await self.call(STREAM_OPEN, {1: [to.to_bytes()], 2: [protocol.encode()]})
        return stream

    async def ask_dht(self, type_: int, body: Fields, *, timeout_s: int) -> dict[PeerId, list[Multiaddr]]:
        """The peers that the DHT's answers name, and where they are."""
        fields, stream = await self.call(DHT, {1: [type_], **body, 7: [timeout_s]})
        async with stream:
            answers = [decode(bytes_of(fields, 5))]
            while type_ == FIND_PROVIDERS and len(answers) < MAX_ANSWERS:
                answer = decode(await receive(stream))
                if answer.get(1) == [DHT_END]:
                    break
                answers.append(answer)
        peers = [decode(raw) for answer in answers for raw in all_bytes_of(answer, 2)]
        return {PeerId(bytes_of(peer, 1)): [Multiaddr(raw) for raw in all_bytes_of(peer, 2)] for peer in peers}

    async def ask(self, type_: int, body: Fields) -> None:
        """A request whose answer says no more than whether it went well. Raises: as ``call``."""
        _, stream = await self.call(type_, body)
        await stream.aclose()

    async def call(self, type_: int, body: Fields | None = None) -> tuple[Fields, trio.SocketStream]:
        """The answer, and the connection that it came over.

        Raises:
            PeerError: the daemon says what is wrong.
            NetError, OSError: it is not there any more.
        """
        stream = await trio.open_unix_socket(self._path)
        try:
            request = encode({1: [type_]} if body is None else {1: [type_], BODY_FIELD[type_]: [encode(body)]})
            await send(stream, varint(len(request)) + request)
            fields = decode(await receive(stream))
            if fields[1][0] != 0:
                raise PeerError("p2pd: " + bytes_of(decode(bytes_of(fields, 2)), 1).decode(errors="replace"))
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return fields, stream


# Protobuf, as much of it as p2pd.proto uses: varints and bytes.


def encode(fields: Fields) -> bytes:
    out = bytearray()
    for number, values in fields.items():
        for value in values:
            if isinstance(value, int):
                out += varint(number << 3) + varint(value)
            else:
                out += varint(number << 3 | 2) + varint(len(value)) + value
    return bytes(out)


def decode(data: bytes) -> Fields:
    fields: dict[int, list[int | bytes]] = defaultdict(list)
    position = 0

    def number() -> int:
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
        key = number()
        value = number()
        if key & 7 == 2:
            fields[key >> 3].append(data[position : position + value])
            position += value
        elif key & 7 == 0:
            fields[key >> 3].append(value)
        else:
            raise PeerError(f"p2pd sent a field of wire type {key & 7}")
    return fields


def bytes_of(fields: Fields, number: int) -> bytes:
    values = fields.get(number) or [b""]
    return values[0] if isinstance(values[0], bytes) else b""


def all_bytes_of(fields: Fields, number: int) -> list[bytes]:
    return [value for value in fields.get(number, ()) if isinstance(value, bytes)]


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


async def receive(stream: trio.abc.Stream) -> bytes:
    length = shift = 0
    while True:
        byte = (await receive_exactly(stream, 1))[0]
        length |= (byte & 127) << shift
        shift += 7
        if length > MAX_MESSAGE_BYTES or shift > 21:
            raise PeerError(f"a message of {length} bytes or more")
        if byte < 128:
            return await receive_exactly(stream, length)
