"""``/perf/1.0.0``: how many bytes per second there are between us and a peer.

    client    u64 big endian: bytes that it wants back; any number of bytes; end
    server    as many bytes as were wanted; end

The specification would not have it served to strangers, who may ask for 2^64 bytes. Ours is: nodes measure their lines
with whoever is there. So it is bounded: a few megabytes each way, few streams at once and a minute, bytes a minute and
bytes a second for all together, and nothing at all through relays, whose bytes are others'. What is over a bound is
answered by a reset, and another peer may be asked.

Source: https://github.com/libp2p/specs/blob/master/perf/perf.md
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from net import errors
from net.identity import PeerId
from net.io import receive_exactly, send
from net.mux.base import Stream
from net.relay.fairness import Bucket
from net.swarm import Connection

if TYPE_CHECKING:
    from net.host import Host

PROTOCOL_ID: Final = "/perf/1.0.0"
MAX_BYTES: Final = 4 << 20  # each way, a stream
SIZES_BYTES: Final = (64 << 10, 512 << 10, MAX_BYTES)  # each way; a larger one where the one before took no time
LONG_ENOUGH_S: Final = 0.5  # of a transfer, to say something of the line
PIECE_BYTES: Final = 64 * 1024
BURST_S: Final = 0.005  # of the rate at once: timers are not finer than a millisecond or so
MINUTE_S: Final = 60.0
TICK_S: Final = 1e-6  # no transfer takes less
_FILLER: Final = random.Random(0).randbytes(PIECE_BYTES)  # which no line compresses


@dataclass(frozen=True, kw_only=True)
class PerfLimits:
    """What a server gives. Figures are our own.

    Attributes:
        max_bytes: Each way, a stream.
        streams: At once, of all peers; one of each.
        streams_per_minute: Of all peers.
        streams_per_peer_per_minute: Two measurements.
        bytes_per_minute: Sent to all peers: what a slow line can spare, and three measurements.
        bytes_per_s: Sent and received together, of all peers. Faster lines are measured as this fast.
        stream_s: From its first byte to its last.
    """

    max_bytes: int = MAX_BYTES
    streams: int = 2
    streams_per_minute: int = 18
    streams_per_peer_per_minute: int = 6
    bytes_per_minute: int = 16 << 20
    bytes_per_s: float = 64 << 20
    stream_s: float = 30.0


class PerfBudget:
    """Who has had how much within the last minute. No I/O. Holds at most ``streams_per_minute`` entries."""

    def __init__(self, limits: PerfLimits) -> None:
        self._limits = limits
        self._open: set[PeerId] = set()
        self._begun: deque[tuple[float, PeerId]] = deque()
        self._promised: deque[tuple[float, int]] = deque()  # bytes; at most one entry a stream

    @contextmanager
    def stream(self, peer_id: PeerId, now: float) -> Iterator[None]:
        """Hold one of the places. A stream that was refused does not count.

        Raises:
            LimitExceeded: none is left, or none for this peer.
        """
        limits = self._limits
        while self._begun and self._begun[0][0] <= now - MINUTE_S:
            self._begun.popleft()
        if peer_id in self._open or len(self._open) >= limits.streams:
            raise errors.LimitExceeded(f"{len(self._open)} measurements are going on")
        if len(self._begun) >= limits.streams_per_minute:
            raise errors.LimitExceeded(f"{len(self._begun)} measurements within a minute, the most allowed")
        if sum(each == peer_id for _, each in self._begun) >= limits.streams_per_peer_per_minute:
            raise errors.LimitExceeded(f"{peer_id} has had its measurements for this minute")
        self._begun.append((now, peer_id))
        self._open.add(peer_id)
        try:
            yield
        finally:
            self._open.remove(peer_id)

    def promise(self, count: int, now: float) -> None:
        """Set aside ``count`` bytes to be sent, once in a stream.

        Raises:
            LimitExceeded: so many are not given to anybody, or not any more this minute.
        """
        limits = self._limits
        while self._promised and self._promised[0][0] <= now - MINUTE_S:
            self._promised.popleft()
        if count > limits.max_bytes:
            raise errors.LimitExceeded(f"{count} bytes are wanted, at most {limits.max_bytes} are sent")
        if sum(each for _, each in self._promised) + count > limits.bytes_per_minute:
            raise errors.LimitExceeded("enough was sent to measure lines for this minute")
        self._promised.append((now, count))


def serve_perf(host: Host, limits: PerfLimits | None = None) -> None:
    """Let peers measure their lines to us. Call it where trio runs."""
    host.handle(PROTOCOL_ID, _Server(limits or PerfLimits(), trio.current_time()).answer)


class _Server:
    def __init__(self, limits: PerfLimits, now: float) -> None:
        self._limits = limits
        self._budget = PerfBudget(limits)
        self._bucket = Bucket(limits.bytes_per_s, BURST_S, now)

    async def answer(self, connection: Connection, stream: Stream) -> None:
        """Serve one stream.

        Raises:
            LimitExceeded, RemoteProtocolError: the peer is over a bound.
            ConnectionLost, StreamReset: it has left.
            trio.TooSlowError: it takes too long.
        """
        if connection.relayed:
            raise errors.LimitExceeded("lines through relays are not measured")
        stream.limit_window(self._limits.max_bytes)
        with self._budget.stream(connection.peer_id, trio.current_time()), trio.fail_after(self._limits.stream_s):
            wanted = int.from_bytes(await receive_exactly(stream, 8), "big")
            self._budget.promise(wanted, trio.current_time())
            await self._receive(stream)
            await self._send(stream, wanted)

    async def _receive(self, stream: Stream) -> None:
        left = self._limits.max_bytes
        while data := await stream.receive_some(PIECE_BYTES):
            left -= len(data)
            if left < 0:
                raise errors.RemoteProtocolError(f"more than {self._limits.max_bytes} bytes to measure a line")
            await self._pace(len(data))

    async def _send(self, stream: Stream, count: int) -> None:
        for size in _pieces(count):
            await self._pace(size)
            await send(stream, _FILLER[:size])

    async def _pace(self, size: int) -> None:
        """Wait for as long as that takes, behind what others began before. Cancellation: it is spent all the same."""
        now = trio.current_time()
        self._bucket.spend(size, now)
        await trio.sleep_until(self._bucket.ready_at(now))


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What went to a peer and came back, one after the other, and the seconds for both."""

    sent_bytes: int
    received_bytes: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        """Both ways together, over the time for both. It includes a round trip, and a connection's slow start."""
        return (self.sent_bytes + self.received_bytes) / max(self.seconds, TICK_S)


async def transfer(
    host: Host, peer_id: PeerId, *, send_bytes: int, receive_bytes: int, timeout_s: float = 20.0
) -> Transfer:
    """Send so many bytes to the peer, and get so many back.

    Raises:
        PeerFailed: it refuses, breaks off, takes longer than ``timeout_s``, or sends another number of bytes.
        ProtocolNotSupported: it does not measure.
        DialError, ConnectionLost: there is no connection (any more), or one through a relay alone.
        ValueError: a size is negative, or does not fit into 64 bits.
    Cancellation: the stream is reset.
    """
    if not 0 <= send_bytes < 2**64 or not 0 <= receive_bytes < 2**64:
        raise ValueError(f"{send_bytes} and {receive_bytes} bytes, expected 0 to 2^64 - 1 each")
    connection = await host.connect(peer_id)
    if connection.relayed:
        raise errors.DialError(f"{peer_id} is reached through a relay alone: its line is not measured")
    try:
        stream = await host.open_stream_over(connection, [PROTOCOL_ID])
        try:
            with trio.move_on_after(timeout_s) as scope:
                seconds = await _exchange(stream, peer_id, send_bytes, receive_bytes)
            if scope.cancelled_caught:
                raise errors.PeerFailed(peer_id, f"{send_bytes} + {receive_bytes} bytes took more than {timeout_s:g} s")
        except BaseException:
            stream.reset()
            raise
        await stream.aclose()
    except errors.StreamReset as error:
        raise errors.PeerFailed(peer_id, "does not measure its line now, or broke off") from error
    return Transfer(sent_bytes=send_bytes, received_bytes=receive_bytes, seconds=seconds)


async def _exchange(stream: Stream, peer_id: PeerId, send_bytes: int, receive_bytes: int) -> float:
    """Seconds until the last byte was here, or the end of the answer where there is none."""
    began = trio.current_time()
    await send(stream, receive_bytes.to_bytes(8, "big"))
    for size in _pieces(send_bytes):
        await send(stream, _FILLER[:size])
    await stream.send_eof()
    left, took_s = receive_bytes, None
    while data := await stream.receive_some(PIECE_BYTES):
        left -= len(data)
        if left < 0:
            raise errors.PeerFailed(peer_id, f"sent more than the {receive_bytes} bytes that were asked for")
        if left == 0:
            took_s = trio.current_time() - began
    if left > 0:
        raise errors.PeerFailed(peer_id, f"sent {left} bytes less than the {receive_bytes} that were asked for")
    return trio.current_time() - began if took_s is None else took_s


def _pieces(count: int) -> Iterator[int]:
    """Sizes that make up ``count``."""
    while count > 0:
        yield min(count, PIECE_BYTES)
        count -= PIECE_BYTES


async def measure_bytes_per_s(host: Host, peer_id: PeerId, *, timeout_s: float = 20.0) -> float:
    """How many bytes per second go to the peer and come from it, over the time for both.

    A few kilobytes first; more, up to ``MAX_BYTES`` each way, as long as that takes too little time to tell.

    Args:
        host: Ours.
        peer_id: Whose line, or ours if that is the slower one; better a peer that is not in the same network.
        timeout_s: For each transfer; what is slower than the first in it is not measured.

    Raises: as ``transfer``, of the first; what a later one fails with leaves the one before standing.
    Cancellation: the stream is reset.
    """
    result = await transfer(host, peer_id, send_bytes=SIZES_BYTES[0], receive_bytes=SIZES_BYTES[0], timeout_s=timeout_s)
    for size in SIZES_BYTES[1:]:
        if result.seconds >= LONG_ENOUGH_S:
            break
        try:
            result = await transfer(host, peer_id, send_bytes=size, receive_bytes=size, timeout_s=timeout_s)
        except errors.NetError:
            break
    return result.bytes_per_s
