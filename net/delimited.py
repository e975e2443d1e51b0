"""Messages behind their length as an unsigned varint, as most of libp2p's protocols have them.

Source: https://github.com/multiformats/unsigned-varint
"""

from __future__ import annotations

import trio

from net.errors import RemoteProtocolError
from net.io import receive_exactly

MAX_LENGTH_BITS = 21  # no protocol here has messages of more than 2 MiB


def frame(message: bytes) -> bytes:
    """The message with its length before it."""
    length = bytearray()
    left = len(message)
    while left >= 128:
        length.append(left & 127 | 128)
        left >>= 7
    length.append(left)
    return bytes(length) + message


async def receive(stream: trio.abc.ReceiveStream, max_bytes: int, what: str) -> bytes:
    """The next message. Nothing is read behind it.

    Args:
        stream: where from.
        max_bytes: the longest that is read.
        what: how errors call it, as in "an identify message".

    Raises:
        RemoteProtocolError: it is longer.
        ConnectionLost, StreamReset: the stream ended first.
    """
    length = shift = 0
    while True:
        byte = (await receive_exactly(stream, 1))[0]
        length |= (byte & 127) << shift
        shift += 7
        if length > max_bytes or shift > MAX_LENGTH_BITS:
            raise RemoteProtocolError(f"{what} of more than {max_bytes} bytes")
        if byte < 128:
            return await receive_exactly(stream, length)
