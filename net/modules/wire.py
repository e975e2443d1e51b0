"""``/raceme/modules/1``: manifests, asked of those who hold modules; their files go by ``net.files``.

Calls over RPC:

    manifests  {"of": [HASH, 32 bytes...]} -> {"manifests": [envelope, or empty where it is not held...]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from net.errors import RemoteProtocolError
from net.modules.announcement import HASH_BYTES
from net.modules.manifest import MAX_ENVELOPE_BYTES, Manifest
from net.mux.base import Stream
from net.rpc import lane, packing
from net.rpc.framing import Message
from net.rpc.lane import Lane
from net.swarm import Connection

PROTOCOL_ID: Final = "/raceme/modules/1"
MAX_ASKED: Final = 7  # manifests in an answer, whose header is less than 64 KiB
IDLE_S: Final = 30.0


async def ask(where: Lane, hashes: Sequence[str], *, timeout_s: float) -> list[bytes]:
    """The envelopes of at most ``MAX_ASKED`` modules, as they came: whether they are what they should be is not known.

    Raises:
        PeerFailed, RpcError, RemoteProtocolError: as ``Lane.call``; or an answer that makes no sense.
    """
    wanted = [bytes.fromhex(each) for each in hashes]
    answer = await where.call("manifests", {"of": wanted}, timeout_s=timeout_s)
    given = packing.items(answer.header, "manifests", bytes, max_items=MAX_ASKED, max_length=MAX_ENVELOPE_BYTES)
    if len(given) != len(wanted):
        raise RemoteProtocolError(f"{len(given)} manifests where {len(wanted)} were asked for")
    return given


def read_asked(fields: Mapping[str, Any]) -> list[str]:
    """Raises:
    RemoteProtocolError: not what can be asked for.
    """
    wanted = packing.items(fields, "of", bytes, max_items=MAX_ASKED, max_length=HASH_BYTES)
    if any(len(each) != HASH_BYTES for each in wanted):
        raise RemoteProtocolError(f"a hash that is not {HASH_BYTES} bytes")
    return [each.hex() for each in wanted]


async def serve(connection: Connection, stream: Stream, held: Callable[[str], Manifest | None]) -> None:
    """Answer calls on a stream with what is ``held``.

    Raises: as ``lane.serve``.
    """

    async def manifests(message: Message) -> Message:
        found = [held(each) for each in read_asked(message.header)]
        return Message(header={"manifests": [b"" if each is None else each.envelope for each in found]})

    await lane.serve(stream, connection.peer_id, {"manifests": manifests}, idle_s=IDLE_S)
