"""Messages of libp2p's own Kademlia, ``/ipfs/kad/1.0.0``, as bytes and back.

Wire: each message behind its length as a varint; as many on one stream as the asker likes, each answered in turn by one
of the same type, except for ADD_PROVIDER, which has no answer.

    message Message {
      Type type = 1;     // PUT_VALUE = 0, GET_VALUE = 1, ADD_PROVIDER = 2, GET_PROVIDERS = 3, FIND_NODE = 4, PING = 5
      bytes key = 2;     // the content's multihash, or the peer's id; its place is the SHA-256 of it
      Record record = 3; // of values
      repeated Peer closerPeers = 8; repeated Peer providerPeers = 9; }
    message Peer { bytes id = 1; repeated bytes addrs = 2; Connection connection = 3; }

Values are not kept: what Raceme says lies signed in its own DHT.

Source: https://github.com/libp2p/specs/blob/master/kad-dht/README.md
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import trio
from google.protobuf.message import DecodeError
from libp2p.kad_dht.pb import kademlia_pb2

from net import delimited, errors
from net.addresses import Multiaddr
from net.dht.table import Contact, K
from net.dht.wire import MAX_ADDRESS_BYTES, MAX_ADDRESSES, MAX_PEER_ID_BYTES, read_address, write_addresses
from net.identity import PeerId
from net.io import send

PROTOCOL_ID = "/ipfs/kad/1.0.0"
MAX_KEY_BYTES = 80  # go-libp2p's
MAX_REQUEST_BYTES = 16 * 1024  # one peer and its addresses
MAX_ANSWER_BYTES = 256 * 1024  # peers of others, who tell every address that they have
MAX_PROVIDERS = 32  # in one answer; so that a key in demand leaves room for the addresses of each
MAX_ADDRESSES_READ = 64  # of one peer; those that we cannot dial are passed over

CanDial = Callable[[Multiaddr], bool]


class Type(enum.IntEnum):
    ADD_PROVIDER = 2
    GET_PROVIDERS = 3
    FIND_NODE = 4
    PING = 5


@dataclass(frozen=True, kw_only=True)
class Message:
    """Attributes:
    key: answers may leave it out, as go-libp2p's do.
    closer: servers nearer to the key.
    providers: who has what is under the key; in ADD_PROVIDER the sender, if it is honest.
    """

    type: Type
    key: bytes = b""
    closer: tuple[Contact, ...] = ()
    providers: tuple[Contact, ...] = ()


def place_of(key: bytes) -> bytes:
    """Where it lies. For a peer's id, where the peer is."""
    return hashlib.sha256(key).digest()


def encode(message: Message) -> bytes:
    return bytes(
        kademlia_pb2.Message(
            type=message.type.name,
            key=message.key,
            closerPeers=map(_write_peer, message.closer),
            providerPeers=map(_write_peer, message.providers),
        ).SerializeToString()
    )


def decode(data: bytes, can_dial: CanDial) -> Message:
    """What the message says, as far as it is of use: addresses that are none, or not for us, are left out.

    Raises:
        RemoteProtocolError: it is none, or not of a type that is spoken here.
    """
    raw = kademlia_pb2.Message()
    try:
        raw.ParseFromString(data)
        kind = Type(raw.type)
    except DecodeError as error:
        raise errors.RemoteProtocolError("a Kademlia message that is no protobuf") from error
    except ValueError as error:
        raise errors.RemoteProtocolError(f"a Kademlia message of type {raw.type}, which is not spoken here") from error
    if len(raw.key) > MAX_KEY_BYTES:
        raise errors.RemoteProtocolError(f"a key of {len(raw.key)} bytes")
    return Message(
        type=kind,
        key=bytes(raw.key),
        closer=tuple(_read_peer(each, can_dial) for each in islice(raw.closerPeers, K)),
        providers=tuple(_read_peer(each, can_dial) for each in islice(raw.providerPeers, MAX_PROVIDERS)),
    )


async def send_message(stream: trio.abc.SendStream, message: Message) -> None:
    """Raises: ConnectionLost, StreamReset."""
    await send(stream, delimited.frame(encode(message)))


async def receive_message(stream: trio.abc.ReceiveStream, max_bytes: int, can_dial: CanDial) -> Message:
    """The next message.

    Raises:
        RemoteProtocolError: as ``decode``, or it is too long.
        ConnectionLost, StreamReset: the stream ended first.
    """
    return decode(await delimited.receive(stream, max_bytes, "a Kademlia message"), can_dial)


def _write_peer(contact: Contact) -> kademlia_pb2.Message.Peer:
    return kademlia_pb2.Message.Peer(id=contact.peer_id.to_bytes(), addrs=write_addresses(contact.addresses))


def _read_peer(raw: kademlia_pb2.Message.Peer, can_dial: CanDial) -> Contact:
    if not 0 < len(raw.id) <= MAX_PEER_ID_BYTES:
        raise errors.RemoteProtocolError(f"a peer id of {len(raw.id)} bytes")
    peer_id = PeerId(bytes(raw.id))
    return Contact(peer_id=peer_id, addresses=read_addresses(raw.addrs, peer_id, can_dial))


def read_addresses(raw: Iterable[bytes], peer_id: PeerId, can_dial: CanDial) -> tuple[Multiaddr, ...]:
    """Where a peer says that it is, as far as we can dial that; without its own id at the end."""
    return tuple(islice(_usable(raw, peer_id, can_dial), MAX_ADDRESSES))


def _usable(raw: Iterable[bytes], peer_id: PeerId, can_dial: CanDial) -> Iterable[Multiaddr]:
    suffix = f"/p2p/{peer_id}"
    for data in islice(raw, MAX_ADDRESSES_READ):
        if not 0 < len(data) <= MAX_ADDRESS_BYTES + len(suffix):
            continue
        try:
            address = read_address(bytes(data))
        except errors.RemoteProtocolError:
            continue  # a transport that the library does not know, say
        if str(address).endswith(suffix):
            address = Multiaddr(str(address).removesuffix(suffix))
        if can_dial(address):
            yield address
