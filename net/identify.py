"""``/ipfs/id/1.0.0``: who we are, what we speak, where we listen, and where we see the asker.

Source: https://github.com/libp2p/specs/blob/master/identify/README.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from google.protobuf.message import DecodeError
from libp2p.crypto.serialization import deserialize_public_key
from libp2p.identity.identify.pb.identify_pb2 import Identify

import net.version
from net import delimited, errors
from net.identity import PeerId
from net.io import send
from net.mux.base import Stream
from net.swarm import Connection

if TYPE_CHECKING:
    from net.host import Host

PROTOCOL_ID = "/ipfs/id/1.0.0"
PROTOCOL_VERSION = "ipfs/0.1.0"
MAX_MESSAGE_BYTES = 8 * 1024  # go-libp2p
IDENTIFY_S = 5.0  # go-libp2p


def serve_identify(host: Host) -> None:
    async def answer(connection: Connection, stream: Stream) -> None:
        message = Identify(
            protocol_version=PROTOCOL_VERSION,
            agent_version=f"raceme/{net.version.VERSION}",
            public_key=host.identity.key_pair.public_key.serialize(),
            listen_addrs=[address.to_bytes() for address in host.addresses],
            observed_addr=connection.now_at.to_bytes(),
            protocols=host.protocols,
        ).SerializeToString()
        await send(stream, delimited.frame(message))

    host.handle(PROTOCOL_ID, answer)


async def identify(host: Host, peer_id: PeerId) -> Identify:
    """What a connected peer says of itself. Its words, not facts: only the public key is checked.

    Raises:
        RemoteProtocolError: the message is too long, no message, or another peer's key.
        PeerFailed: no message in ``IDENTIFY_S``.
        DialError, ConnectionLost, StreamReset: there is no connection (any more).
    """
    return await identify_over(host, await host.connect(peer_id))


async def identify_over(host: Host, connection: Connection) -> Identify:
    """As ``identify``, over this very connection: where the peer sees us belongs to its ends."""
    peer_id = connection.peer_id
    stream = await host.open_stream_over(connection, [PROTOCOL_ID])
    try:
        with trio.move_on_after(IDENTIFY_S) as scope:
            data = await delimited.receive(stream, MAX_MESSAGE_BYTES, "an identify message")
        if scope.cancelled_caught:
            raise errors.PeerFailed(peer_id, f"did not identify itself in {IDENTIFY_S:g} s")
    except BaseException:
        stream.reset()
        raise
    await stream.aclose()
    message = Identify()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise errors.RemoteProtocolError("an identify message that is no protobuf") from error
    try:
        owner = PeerId.from_pubkey(deserialize_public_key(message.public_key))
    except Exception as error:  # the library raises many types for bytes that are no key
        raise errors.RemoteProtocolError("an identify message without a readable public key") from error
    if owner != peer_id:
        raise errors.RemoteProtocolError(f"{peer_id} identified itself with the key of {owner}")
    return message
