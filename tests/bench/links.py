"""Lines between the processes of a benchmark: round trips, rates and cuts, without root, on one machine.

In front of every process that others dial (its ``Place``) stands a proxy, and the process announces the proxy's address
instead of its own. Every connection so passes one proxy, that of the place dialled, which holds back what it is given
for half a round trip in each direction. Every process dials from a loopback address of its own: the proxy sees between
which two places a connection lies, and a place that is cut off hears from nobody and is heard by nobody, over the
connections that it made as over those that it took. Nothing is said to anybody about a cut; what was sent meanwhile
arrives when it is mended, as what TCP repeats would.

A rate holds for each direction of each place, of what is dialled there. There are no packets: nothing is lost, and
connections have no slow start. What the proxy adds to a round trip by itself ``measure_round_trip_s`` tells. UDP does
not pass: processes listen on TCP alone. Linux, for its many loopback addresses.
"""

from __future__ import annotations

import math
import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from net.nurseries import open_service_nursery

CHUNK_BYTES = 64 * 1024
RATED_CHUNK_BYTES = 4 * 1024  # where there is a rate: what comes later must not wait for long behind it
WAITING_CHUNKS = 1024  # of one direction of one connection on their way; who sends more waits
BACKLOG = 128
LOOPBACK = "127.0.0.1"
MAX_PLACES = 200
PROBES = 20
PROBE_BYTES = 256
SETTLE_PROBES = 3  # before those that count


@dataclass(eq=False)
class Line:
    """One direction of a place: when what is sent now arrives. No I/O.

    Attributes:
        delay_s: one way.
        bytes_per_s: None for no limit.
    """

    delay_s: float = 0.0
    bytes_per_s: float | None = None
    _free_at: float = -math.inf

    def due(self, now: float, size: int) -> float:
        """Send ``size`` bytes; returns when the last of them arrives."""
        if self.bytes_per_s is None:
            return now + self.delay_s
        self._free_at = max(now, self._free_at) + size / self.bytes_per_s
        return self._free_at + self.delay_s

    @property
    def chunk_bytes(self) -> int:
        return CHUNK_BYTES if self.bytes_per_s is None else RATED_CHUNK_BYTES


@dataclass(eq=False)
class Place:
    """A process, as the lines see it.

    Attributes:
        source: the loopback address that it dials from, and listens at.
        port: where it listens.
        front: the port of the proxy before it, at ``127.0.0.1``.
        to, back: the two directions of what is dialled here.
    """

    name: str
    source: str
    port: int = 0
    front: int = 0
    to: Line = field(default_factory=Line)
    back: Line = field(default_factory=Line)
    _mended: trio.Event | None = None

    @property
    def listen(self) -> str:
        """The multiaddr for ``--listen``."""
        return f"/ip4/{self.source}/tcp/{self.port}"

    @property
    def announced(self) -> str:
        """The multiaddr at which others dial it."""
        return f"/ip4/{LOOPBACK}/tcp/{self.front}"

    @property
    def is_cut(self) -> bool:
        return self._mended is not None

    def cut(self) -> None:
        """Let nothing pass any more, in silence."""
        if self._mended is None:
            self._mended = trio.Event()

    def mend(self) -> None:
        """Let everything pass, also what has waited."""
        if self._mended is not None:
            self._mended.set()
            self._mended = None

    async def passable(self) -> None:
        """Wait while it is cut off."""
        while self._mended is not None:
            await self._mended.wait()


class Links:
    """All places of a benchmark. Proxies run in ``nursery``.

    Args:
        nursery: whoever cancels it ends them.
        rtt_s: of a round trip between any two places.
        bytes_per_s: of each direction of each place; None for no limit.
    """

    def __init__(self, nursery: trio.Nursery, *, rtt_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        self._nursery = nursery
        self._places: dict[str, Place] = {}  # by source
        self._rtt_s = rtt_s
        self._bytes_per_s = bytes_per_s

    def set(self, *, rtt_s: float, bytes_per_s: float | None = None) -> None:
        """Another round trip and rate, for all places; what is on its way arrives as before."""
        self._rtt_s, self._bytes_per_s = rtt_s, bytes_per_s
        for place in self._places.values():
            for line in (place.to, place.back):
                line.delay_s, line.bytes_per_s = rtt_s / 2, bytes_per_s

    async def place(self, name: str, *, is_dialled: bool = True) -> Place:
        """A place for another process, with a proxy before it if others dial it."""
        if len(self._places) == MAX_PLACES:
            raise ValueError(f"at most {MAX_PLACES} places")
        place = Place(name=name, source=f"127.77.0.{len(self._places) + 1}")
        self._places[place.source] = place
        self.set(rtt_s=self._rtt_s, bytes_per_s=self._bytes_per_s)
        if is_dialled:
            place.port = _free_port(place.source)
            listeners = await trio.open_tcp_listeners(0, host=LOOPBACK, backlog=BACKLOG)
            place.front = listeners[0].socket.getsockname()[1]

            async def serve(stream: trio.SocketStream) -> None:
                await self._connect(place, stream)

            self._nursery.start_soon(trio.serve_listeners, serve, listeners)
        return place

    async def _connect(self, place: Place, stream: trio.SocketStream) -> None:
        """Carry one connection until it ends at either side."""
        async with stream:
            try:
                dialler = self._places.get(stream.socket.getpeername()[0])
                ends = [place] if dialler is None else [place, dialler]
                await _passable(ends)
                other = await trio.open_tcp_stream(place.source, place.port)
            except OSError:
                return  # who dialled has gone, or nobody listens; the connection ends, as it would if nobody had
            async with other, open_service_nursery() as nursery:
                nursery.start_soon(_carry_or_cancel, stream, other, place.to, ends, nursery.cancel_scope)
                nursery.start_soon(_carry_or_cancel, other, stream, place.back, ends, nursery.cancel_scope)


async def _carry_or_cancel(
    source: trio.SocketStream, sink: trio.SocketStream, line: Line, ends: Sequence[Place], both: trio.CancelScope
) -> None:
    try:
        await carry(source, sink, line, ends)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        both.cancel()


async def carry(
    source: trio.abc.ReceiveStream, sink: trio.abc.HalfCloseableStream, line: Line, ends: Sequence[Place]
) -> None:
    """Carry one direction of a connection to its end, as late as ``line`` has it, and never while an end is cut off.

    Raises:
        BrokenResourceError: the connection broke; at ``source``, as late as the rest arrives.
    """
    sending, waiting = trio.open_memory_channel[tuple[float, bytes | None]](WAITING_CHUNKS)

    async def take() -> None:
        async with sending:
            data: bytes | None = b"-"
            while data:
                try:
                    data = bytes(await source.receive_some(line.chunk_bytes))
                except trio.BrokenResourceError:
                    data = None
                await sending.send((line.due(trio.current_time(), len(data or b"")), data))

    async with open_service_nursery() as nursery:
        nursery.start_soon(take)
        async for due, data in waiting:
            await trio.sleep_until(due)
            await _passable(ends)
            if data is None:
                break
            if data:
                await sink.send_all(data)
            else:
                await sink.send_eof()
        else:
            return
        nursery.cancel_scope.cancel()
    raise trio.BrokenResourceError("at its other end")


async def _passable(ends: Sequence[Place]) -> None:
    while any(end.is_cut for end in ends):
        for end in ends:
            await end.passable()


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


async def measure_round_trip_s(links: Links) -> list[float]:
    """Round trips of a small message, as the lines are now, each measured at a place of its own.

    A message goes to a place and its echo comes back, with all that the proxy adds.
    """
    place = await links.place("probe")
    found = []
    async with open_service_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(place.port, host=place.source)

        async def echo(stream: trio.SocketStream) -> None:
            async for data in stream:
                await stream.send_all(data)

        nursery.start_soon(trio.serve_listeners, echo, listeners)
        async with await trio.open_tcp_stream(LOOPBACK, place.front) as stream:
            for _ in range(SETTLE_PROBES + PROBES):
                began = trio.current_time()
                await stream.send_all(bytes(PROBE_BYTES))
                left = PROBE_BYTES
                while left:
                    left -= len(await stream.receive_some(left)) or left
                found.append(trio.current_time() - began)
        nursery.cancel_scope.cancel()
    return found[SETTLE_PROBES:]


def median_ms(times_s: Sequence[float]) -> float:
    return 1000 * statistics.median(times_s)
