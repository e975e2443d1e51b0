"""The lines of ``tests/bench/links.py``: when bytes arrive, and when none do."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from tests.bench.links import Line, Place, carry


def test_a_line_delays_and_takes_its_time() -> None:
    assert Line(delay_s=0.5).due(10.0, 1_000_000) == 10.5
    rated = Line(delay_s=0.5, bytes_per_s=1000.0)
    assert rated.due(10.0, 500) == 11.0
    assert rated.due(10.0, 500) == 11.5  # behind what was sent before
    assert rated.due(20.0, 500) == 21.0


class Carried:
    """One direction of a connection, from ``source`` to ``sink``."""

    def __init__(self, line: Line, ends: Sequence[Place] = ()) -> None:
        self.source, inner = memory_stream_pair()
        outer, self.sink = memory_stream_pair()
        self._run = (inner, outer, line, ends)

    async def run(self) -> None:
        await carry(*self._run)


async def test_bytes_arrive_late_and_in_order(autojump_clock: MockClock) -> None:
    ours = Carried(Line(delay_s=0.5))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.run)
        began = trio.current_time()
        await ours.source.send_all(b"one")
        await trio.sleep(0.2)
        await ours.source.send_all(b"two")
        assert await ours.sink.receive_some() == b"one"
        assert trio.current_time() - began == pytest.approx(0.5)
        assert await ours.sink.receive_some() == b"two"
        assert trio.current_time() - began == pytest.approx(0.7)
        await ours.source.send_eof()
        assert await ours.sink.receive_some() == b""
        assert trio.current_time() - began == pytest.approx(1.2)


async def test_nothing_passes_a_cut_and_everything_once_it_is_mended(autojump_clock: MockClock) -> None:
    ends = [Place(name=name, source="127.77.0.1") for name in ("near", "far")]
    ours = Carried(Line(delay_s=0.5), ends)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.run)
        await ours.source.send_all(b"one")
        for end in ends:
            end.cut()
        await ours.source.send_eof()
        for end in ends:
            with trio.move_on_after(60) as patience:
                await ours.sink.receive_some()
            assert patience.cancelled_caught
            end.mend()
        assert await ours.sink.receive_some() == b"one"
        assert await ours.sink.receive_some() == b""


class Breaking(trio.abc.ReceiveStream):
    """Gives a few bytes, then breaks."""

    def __init__(self) -> None:
        self._left = [b"one"]

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self._left:
            raise trio.BrokenResourceError
        return self._left.pop()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_a_broken_connection_breaks_as_late_as_bytes_arrive(autojump_clock: MockClock) -> None:
    outer, sink = memory_stream_pair()
    began = trio.current_time()
    with pytest.raises(trio.BrokenResourceError):
        await carry(Breaking(), outer, Line(delay_s=0.5), [])
    assert trio.current_time() - began == pytest.approx(0.5)
    assert await sink.receive_some() == b"one"
