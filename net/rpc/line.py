"""How many bytes per second a line takes, from what we have to wait for anyway. No I/O.

Whoever sends more than what lies between it and the line can hold (buffers, windows) has to wait. Each time that a wait
ends, these are as full as they were when the last one did: so what was sent in between is what has left them, and
that in so many seconds. A sender that had nothing to send meanwhile may have let them run empty, which says nothing.
"""

from __future__ import annotations

import math
from typing import Final

WAITED_S: Final = 0.001  # for less, we had to wait for turns of the event loop, not for the line
LEAST_BYTES: Final = 64 * 1024  # between two waits, to say something
MEMORY_BYTES: Final = 2 << 20  # what was sent before so many hardly counts


class LineSpeed:
    """Of one connection; see the module. Streams that send at once have their shares of it."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0

    @property
    def bytes_per_s(self) -> float | None:
        """What one stream gets; ``None`` while nobody has had to wait."""
        return self._bytes / self._seconds if self._seconds else None

    def add(self, n_bytes: int, seconds: float) -> None:
        """So much left in so long a time."""
        kept = math.exp(-n_bytes / MEMORY_BYTES)
        self._bytes = kept * self._bytes + n_bytes
        self._seconds = kept * self._seconds + seconds


class Waits:
    """Those of one stream's sender, which make its line's speed."""

    def __init__(self, line: LineSpeed) -> None:
        self._line = line
        self._since = math.nan  # when the last wait ended, if the sender has been busy since
        self._bytes = 0  # sent since
        self._ended = -math.inf  # when the sender last was

    def sent(self, n_bytes: int, began: float, ended: float) -> None:
        """Some bytes were handed over, from ``began`` to ``ended``, in seconds of any clock that never goes back."""
        if began - self._ended >= WAITED_S:
            self._since = math.nan
        self._ended = ended
        self._bytes += n_bytes
        if ended - began < WAITED_S:
            return
        if not math.isnan(self._since):
            if self._bytes < LEAST_BYTES:
                return
            self._line.add(self._bytes, ended - self._since)
        self._since, self._bytes = ended, 0
