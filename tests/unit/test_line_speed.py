"""The speed of a line, from what its sender has to wait for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from net.rpc.line import LineSpeed, Waits

SLICE = 128 << 10


@dataclass
class Buffer:
    """What lies between a sender and a line: taken at once as long as it holds no more than so much."""

    bytes_per_s: float
    room: int
    now: float = 0.0
    held: float = 0.0

    def idle(self, seconds: float) -> None:
        self.now += seconds
        self.held = max(0.0, self.held - seconds * self.bytes_per_s)

    def send(self, waits: Waits, n_bytes: int) -> None:
        for start in range(0, n_bytes, SLICE):
            size, began = min(SLICE, n_bytes - start), self.now
            self.held += size
            self.idle(max(0.0, self.held - self.room) / self.bytes_per_s)
            waits.sent(size, began, self.now)


@given(
    speed=st.floats(1e4, 60e6),
    room=st.integers(0, 1 << 20),
    messages=st.lists(st.integers(1, 4 << 20), min_size=1, max_size=8),
    pause_s=st.floats(0.002, 10),
)
def test_what_is_measured_is_the_lines(speed: float, room: int, messages: list[int], pause_s: float) -> None:
    line = LineSpeed()
    waits, buffer = Waits(line), Buffer(speed, room)
    for size in messages:
        buffer.send(waits, size)
        buffer.idle(pause_s)
    known = line.bytes_per_s
    if max(messages) > room + 4 * SLICE:
        assert known is not None
    assert known is None or known == pytest.approx(speed, rel=1e-6)


def test_a_line_that_nobody_waits_for_is_not_known() -> None:
    line = LineSpeed()
    waits, buffer = Waits(line), Buffer(1e9, 1 << 20)
    for _ in range(100):
        buffer.send(waits, SLICE)
        buffer.idle(0.1)
    assert line.bytes_per_s is None


def test_a_line_that_changes_is_measured_anew() -> None:
    line = LineSpeed()
    waits, buffer = Waits(line), Buffer(1e6, 1 << 18)
    buffer.send(waits, 8 << 20)
    assert line.bytes_per_s == pytest.approx(1e6)
    buffer.bytes_per_s = 1e7
    buffer.send(waits, 16 << 20)
    assert line.bytes_per_s == pytest.approx(1e7, rel=0.05)


def test_streams_of_one_connection_add_up_what_they_know() -> None:
    line = LineSpeed()
    for speed in (1e6, 2e6):
        Buffer(speed, 0).send(Waits(line), 1 << 20)
    assert line.bytes_per_s is not None and 1e6 < line.bytes_per_s < 2e6
