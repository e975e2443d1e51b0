"""``/ipfs/ping/1.0.0``: 32 random bytes there and back, as often as the dialler likes.

Source: https://github.com/libp2p/specs/blob/master/ping/ping.md
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

import trio

from net import errors
from net.identity import PeerId
from net.io import receive_exactly, send
from net.mux.base import Stream
from net.swarm import Connection

if TYPE_CHECKING:
    from net.host import Host

PROTOCOL_ID = "/ipfs/ping/1.0.0"
PING_BYTES = 32
IDLE_S = 60.0


def serve_ping(host: Host) -> None:
    host.handle(PROTOCOL_ID, _answer)


async def _answer(connection: Connection, stream: Stream) -> None:
    while True:
        with trio.move_on_after(IDLE_S) as scope:
            data = await stream.receive_some(PING_BYTES)
            if not data:
                return
            if len(data) < PING_BYTES:
                data += await receive_exactly(stream, PING_BYTES - len(data))
            await send(stream, data)
        if scope.cancelled_caught:
            return


async def ping(host: Host, peer_id: PeerId, *, timeout_s: float = 5.0) -> AsyncGenerator[float, None]:
    """Round trips in seconds, one for each value asked for.

    Raises:
        PeerFailed: no answer in ``timeout_s``, or a wrong one.
        DialError, ConnectionLost: there is no connection (any more).
    """
    async with host.stream(peer_id, [PROTOCOL_ID]) as stream:
        while True:
            data = os.urandom(PING_BYTES)
            start = trio.current_time()
            with trio.move_on_after(timeout_s) as scope:
                await send(stream, data)
                answer = await receive_exactly(stream, PING_BYTES)
            if scope.cancelled_caught:
                raise errors.PeerFailed(peer_id, f"no answer to a ping in {timeout_s:g} s")
            if answer != data:
                raise errors.PeerFailed(peer_id, "answered a ping with other bytes")
            yield trio.current_time() - start


async def ping_once(host: Host, peer_id: PeerId, *, timeout_s: float = 5.0) -> float:
    """One round trip in seconds. Raises: as ``ping``."""
    async with aclosing(ping(host, peer_id, timeout_s=timeout_s)) as round_trips:
        return await anext(round_trips)
