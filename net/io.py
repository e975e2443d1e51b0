"""Small helpers over trio streams that several protocols need."""

from __future__ import annotations

import operator

import trio

from net.errors import ConnectionLost


class SingleUse:
    """``with`` it around what one task at a time may do: trio's rule for the two directions of a stream.

    Raises (on entering): ``trio.BusyResourceError`` when another task is inside.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._busy = False

    def __enter__(self) -> None:
        if self._busy:
            raise trio.BusyResourceError(f"another task is {self._what}")
        self._busy = True

    def __exit__(self, *_: object) -> None:
        self._busy = False


def check_max_bytes(max_bytes: int | None) -> None:
    """What trio asks of ``receive_some``'s argument.

    Raises:
        ValueError, TypeError: it is no positive integer.
    """
    if max_bytes is not None and operator.index(max_bytes) < 1:
        raise ValueError("max_bytes must be at least 1")


async def receive_exactly(stream: trio.abc.ReceiveStream, count: int) -> bytes:
    """Read ``count`` bytes, no more and no less.

    Raises:
        ConnectionLost: the stream ended or broke before that.
    """
    parts = bytearray()
    while len(parts) < count:
        try:
            part = await stream.receive_some(count - len(parts))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost("the connection broke") from error
        if not part:
            raise ConnectionLost("the connection was closed by the other side")
        parts += part
    return bytes(parts)


async def send(stream: trio.abc.SendStream, data: bytes) -> None:
    """``send_all`` with this floor's errors.

    Raises:
        ConnectionLost: the other side is gone.
    """
    try:
        await stream.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise ConnectionLost("the connection broke") from error
