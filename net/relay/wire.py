"""Circuit relay v2's messages, as bytes and back.

Wire: each message behind its length as a varint, at most 4 KiB. ``HopMessage`` goes between a client and a relay on
``/libp2p/circuit/relay/0.2.0/hop``, ``StopMessage`` between a relay and the target of a circuit on
``/libp2p/circuit/relay/0.2.0/stop``. After a status of OK to a CONNECT, the stream is the circuit.

    message HopMessage  { Type type = 1;  // RESERVE = 0, CONNECT = 1, STATUS = 2
                          Peer peer = 2; Reservation reservation = 3; Limit limit = 4; Status status = 5; }
    message StopMessage { Type type = 1;  // CONNECT = 0, STATUS = 1
                          Peer peer = 2; Limit limit = 3; Status status = 4; }
    message Peer        { bytes id = 1; repeated bytes addrs = 2; }
    message Reservation { uint64 expire = 1; repeated bytes addrs = 2; bytes voucher = 3; }
    message Limit       { uint32 duration = 1; uint64 data = 2; }  // seconds; bytes in each direction; 0: none

Source: https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md
"""

from __future__ import annotations

import enum
from typing import Any

from google.protobuf.message import DecodeError, Message
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, Reservation, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as Peer

from net import delimited
from net.errors import RemoteProtocolError
from net.identity import PeerId
from net.io import send
from net.mux.base import Stream
from net.transports.base import TrafficLimit

__all__ = [
    "HOP",
    "STOP",
    "HopMessage",
    "Reservation",
    "Status",
    "StopMessage",
    "peer",
    "read_limit",
    "read_peer",
    "receive_hop",
    "receive_stop",
    "send_message",
    "status_of",
    "write_limit",
    "write_status",
]

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"
MAX_MESSAGE_BYTES = 4096  # go-libp2p
MAX_PEER_ID_BYTES = 64


class Status(enum.IntEnum):
    """What a relay or a target answers."""

    UNUSED = 0
    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


async def send_message(stream: Stream, message: Any) -> None:
    """Raises: ConnectionLost, StreamReset."""
    await send(stream, delimited.frame(message.SerializeToString()))


async def receive_hop(stream: Stream) -> Any:
    """The next ``HopMessage``; nothing is read behind it.

    Raises:
        RemoteProtocolError: it is too long, or none.
        ConnectionLost, StreamReset: the stream ended first.
    """
    return await _receive(stream, HopMessage())


async def receive_stop(stream: Stream) -> Any:
    """The next ``StopMessage``. Raises: as ``receive_hop``."""
    return await _receive(stream, StopMessage())


async def _receive(stream: Stream, message: Message) -> Message:
    data = await delimited.receive(stream, MAX_MESSAGE_BYTES, "a relay's message")
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise RemoteProtocolError("a relay's message that is no protobuf") from error
    return message


def peer(peer_id: PeerId) -> Any:
    return Peer(id=peer_id.to_bytes())


def read_peer(message: Any) -> PeerId:
    """Whom a CONNECT names.

    Raises:
        RemoteProtocolError: nobody.
    """
    raw = message.peer.id
    if not 0 < len(raw) <= MAX_PEER_ID_BYTES:
        raise RemoteProtocolError(f"a peer id of {len(raw)} bytes")
    return PeerId(raw)


def status_of(message: Any) -> int:
    """A status that is none of the above comes out as its number.

    Raises:
        RemoteProtocolError: the message carries none.
    """
    is_status = message.type == (HopMessage.STATUS if isinstance(message, HopMessage) else StopMessage.STATUS)
    if not is_status or not message.HasField("status"):
        raise RemoteProtocolError("another message where a status was due")
    return int(message.status)


def write_status(status: Status) -> Any:
    """As protobuf's generated code wants it."""
    return int(status)


def write_limit(limit: TrafficLimit | None) -> Any:
    """None stays None: a circuit without the field has no limit."""
    return None if limit is None else Limit(duration=int(limit.seconds or 0), data=limit.bytes or 0)


def read_limit(message: Any) -> TrafficLimit | None:
    """What a message says of its circuit's limits; None when it has none."""
    if not message.HasField("limit") or not (message.limit.duration or message.limit.data):
        return None
    return TrafficLimit(bytes=message.limit.data or None, seconds=message.limit.duration or None)
