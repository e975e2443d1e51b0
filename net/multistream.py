r"""multistream-select 1.0: the two ends of a stream agree on a protocol.

Wire: each message is an unsigned varint length, the text, and ``\n`` (counted in the length). Both
sides open with ``/multistream/1.0.0``; the dialler proposes, the listener echoes or answers ``na``.
The dialler sends its header and first proposal together, which costs one round trip, not two; and none if it goes on
without waiting for the answer (lazy negotiation, as go-libp2p does where it knows what the other speaks).

Source: https://github.com/multiformats/multistream-select
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import trio

from net.errors import ConnectionLost, ProtocolNotSupported, RemoteProtocolError
from net.io import check_max_bytes, receive_exactly, send
from net.mux.base import Stream

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


class LazyStream(Stream):
    """A stream whose protocol has been proposed, and that is used as if it had been agreed on.

    What is received tells: the first time, it raises as ``propose`` does where the peer has not agreed.
    """

    def __init__(self, stream: Stream, protocol: str) -> None:
        self._stream = stream
        self._protocol = protocol
        self._agreed = False
        self._received = b""

    @classmethod
    async def propose(cls, stream: Stream, protocol: str) -> LazyStream:
        """Send the proposal.

        Raises:
            ConnectionLost: the stream ended first.
        """
        await send(stream, _message(HEADER) + _message(protocol))
        return cls(stream, protocol)

    async def agree(self) -> None:
        """Wait until the peer has agreed.

        Raises: as ``propose``.
        Cancellation: nothing is lost.
        """
        while not self._agreed:
            data = await self._stream.receive_some()
            if not data:
                raise ConnectionLost("the stream ended before a protocol was agreed on")
            self._received += data
            self._look_at_answer()

    def _look_at_answer(self) -> None:
        """Raises:
        ProtocolNotSupported, RemoteProtocolError: the peer does not agree.
        """
        received = self._received
        for answer in (self._protocol, "na"):
            expected = _message(HEADER) + _message(answer)
            if received.startswith(expected):
                if answer == "na":
                    raise ProtocolNotSupported(f"the peer speaks none of {self._protocol}")
                self._agreed, self._received = True, received[len(expected) :]
                return
            if expected.startswith(received):
                return  # there is more to come
        raise RemoteProtocolError(f"asked for {self._protocol}, got {received[:64]!r}")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        check_max_bytes(max_bytes)
        if not self._agreed:
            await self.agree()
        if not self._received:
            return await self._stream.receive_some(max_bytes)
        count = len(self._received) if max_bytes is None else max_bytes
        data, self._received = self._received[:count], self._received[count:]
        await trio.lowlevel.checkpoint()
        return data

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def reset(self) -> None:
        self._stream.reset()

    async def leave(self) -> None:
        await self._stream.leave()

    def limit_window(self, size: int) -> None:
        self._stream.limit_window(size)


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
