"""Ctrl-C, and SIGTERM, kept away from what must not be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held() -> Iterator[None]:
    """Within, a signal that would raise KeyboardInterrupt waits for the end.

    Raises:
        KeyboardInterrupt: At the end, if one has come, and nothing else is being raised.
    """
    raising = [number for number in SIGNALS if signal.getsignal(number) is signal.default_int_handler]
    if not raising or threading.current_thread() is not threading.main_thread():
        yield
        return
    has_come = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal has_come
        has_come = True

    try:
        for number in raising:
            signal.signal(number, note)
        yield
    finally:
        for number in raising:
            signal.signal(number, signal.default_int_handler)
    if has_come:
        raise KeyboardInterrupt


@contextmanager
def terminable() -> Iterator[None]:
    """Within, SIGTERM raises KeyboardInterrupt as Ctrl-C does, for there is something to save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
