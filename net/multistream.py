r"""multistream-select 1.0: the two ends of a stream agree on a protocol.

Wire: each message is an unsigned varint length, the text, and ``\n`` (counted in the length). Both
sides open with ``/multistream/1.0.0``; the dialler proposes, the listener echoes or answers ``na``.
The dialler sends its header and first proposal together, which costs one round trip, not two.

Source: https://github.com/multiformats/multistream-select
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import trio

from net.errors import ProtocolNotSupported, RemoteProtocolError
from net.io import receive_exactly, send

HEADER = "/multistream/1.0.0"
MAX_MESSAGE_BYTES = 1024
MAX_PROPOSALS = 16


async def propose(stream: trio.abc.Stream, protocols: Sequence[str]) -> str:
    """The dialler's side: the first of ``protocols`` that the listener takes.

    Raises:
        ProtocolNotSupported: it takes none.
        RemoteProtocolError: it does not speak multistream-select.
        ConnectionLost: the stream ended first.
    """
    await send(stream, _message(HEADER) + _message(protocols[0]))
    await _receive_header(stream)
    return await _try_each(stream, protocols, sent=1)


async def _try_each(stream: trio.abc.Stream, protocols: Sequence[str], *, sent: int) -> str:
    """The first of ``protocols`` that is echoed; ``sent`` of them are on their way."""
    for index, protocol in enumerate(protocols):
        if index >= sent:
            await send(stream, _message(protocol))
        answer = await _receive(stream)
        if answer == protocol:
            return protocol
        if answer != "na":
            raise RemoteProtocolError(f"asked for {protocol}, got {answer!r}")
    raise ProtocolNotSupported(f"the peer speaks none of {', '.join(protocols)}")


async def answer(stream: trio.abc.Stream, protocols: Collection[str]) -> str:
    """The listener's side: the first proposal that is one of ``protocols``.

    Raises:
        ProtocolNotSupported: the dialler ran out of proposals, or of our patience.
        RemoteProtocolError: it does not speak multistream-select.
        ConnectionLost: the stream ended first.
    """
    await send(stream, _message(HEADER))
    await _receive_header(stream)
    return await _answer_each(stream, protocols, b"")


async def answer_or_propose(stream: trio.abc.Stream, protocols: Sequence[str], patience_s: float) -> tuple[str, bool]:
    """The listener's side, where the other may take itself for the listener, too: after ``patience_s`` without a
    proposal, we propose. What was agreed, and whether we proposed it.

    Raises: as ``propose`` and ``answer``.
    """
    await send(stream, _message(HEADER))
    await _receive_header(stream)
    beginning = b""
    with trio.move_on_after(patience_s):
        beginning = await receive_exactly(stream, 1)
    if beginning:
        return await _answer_each(stream, protocols, beginning), False
    return await _try_each(stream, protocols, sent=0), True


async def _answer_each(stream: trio.abc.Stream, protocols: Collection[str], beginning: bytes) -> str:
    """``beginning`` is what has been read of the first proposal."""
    for _ in range(MAX_PROPOSALS):
        proposal = await _receive(stream, beginning=beginning)
        beginning = b""
        if proposal in protocols:
            await send(stream, _message(proposal))
            return proposal
        await send(stream, _message("na"))
    raise ProtocolNotSupported(f"none of {MAX_PROPOSALS} proposed protocols is spoken here")


def _message(text: str) -> bytes:
    data = text.encode() + b"\n"
    length = len(data)
    return (bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])) + data


async def _receive_header(stream: trio.abc.Stream) -> None:
    """The first message tells whether this is libp2p at all. A length too great is no header: nothing more is awaited
    from a server of another kind, which may say little and then wait.
    """
    try:
        header = await _receive(stream, len(_message(HEADER)) - 1)
        if header != HEADER:
            raise RemoteProtocolError(f"expected {HEADER}, got {header!r}")
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"something other than a libp2p node is there: {error}") from error


async def _receive(stream: trio.abc.Stream, max_bytes: int = MAX_MESSAGE_BYTES, beginning: bytes = b"") -> str:
    length = (beginning or await receive_exactly(stream, 1))[0]
    if length >= 128:
        length = length & 127 | (await receive_exactly(stream, 1))[0] << 7
    if not 0 < length <= max_bytes:
        raise RemoteProtocolError(f"a multistream message of {length} bytes")
    data = await receive_exactly(stream, length)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RemoteProtocolError("a multistream message that is not UTF-8") from error
    if not text.endswith("\n"):
        raise RemoteProtocolError("a multistream message without its newline")
    return text[:-1]
