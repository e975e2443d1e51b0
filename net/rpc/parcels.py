"""Messages whose tensors are larger than a frame, several at once on one stream. No I/O.

A parcel is a message that is cut into others, so that nothing on the stream is long and small talk goes between.
Wire (``net.rpc.framing`` has the messages'):

    {"id", fields..., "p": [[dtype, [dimensions...]], ...]}     begins one: what it says, and what its tensors are
    {"piece": id, "at": offset} + u8 [n]                        the next bytes of these, one tensor after another

``id`` is the sender's number of it, which no other one has that has begun and not ended. Pieces come in order; those of
several parcels may alternate. A parcel ends with its last byte. Messages without ``p`` and ``piece`` are whole; they
carry their tensors themselves, if these are small.

Whoever receives says how many bytes a parcel may have before any is kept, and keeps no more than have come.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from net.errors import LocalProtocolError, RemoteProtocolError
from net.rpc import packing
from net.rpc.framing import ITEM_BYTES, MAX_DIMENSIONS, MAX_TENSORS, Message, Tensor

PIECE_BYTES: Final = 128 * 1024  # what small talk waits for; at a megabit a second, one second
MAX_PARCEL_BYTES: Final = 1 << 40  # for dimensions to be numbers at all; who receives has bounds of its own
MAX_NUMBER: Final = 2**53
MIN_BYTES_PER_S: Final = 1024  # once a parcel has begun: slower senders are cut off
FIRST_BYTES_S: Final = 5.0
LEAD_S: Final = 120.0  # who was quick may rest, but not for ever: what has come of a parcel takes room
PARCEL_S: Final = 1800.0  # for a whole one
_RESERVED: Final = frozenset({"p", "piece", "at", "t"})


def tensor_bytes(message: Message) -> int:
    """Of all tensors together."""
    return sum(tensor.n_bytes for tensor in message.tensors)


def cut(message: Message, piece_bytes: int = PIECE_BYTES) -> Iterator[Message]:
    """The messages that carry it; the message itself, if its tensors are no longer than a piece.

    Tensors' data is not copied, and must not change until the last message has been sent.

    Raises:
        LocalProtocolError: it has no number, or fields that are not its own.
    """
    if _RESERVED & message.header.keys():
        raise LocalProtocolError(f"fields of a parcel's own: {sorted(_RESERVED & message.header.keys())}")
    if tensor_bytes(message) <= piece_bytes:
        return iter([message])
    number = message.header.get("id")
    if type(number) is not int or not 0 < number <= MAX_NUMBER:
        raise LocalProtocolError(f"a parcel without a number: {number!r}")
    if len(message.tensors) > MAX_TENSORS:
        raise LocalProtocolError(f"{len(message.tensors)} tensors in a parcel: at most {MAX_TENSORS} are sent")
    return _cut(message, number, piece_bytes)


def _cut(message: Message, number: int, piece_bytes: int) -> Iterator[Message]:
    specs = [[tensor.dtype, list(tensor.shape)] for tensor in message.tensors]
    yield Message(header={**message.header, "p": specs})
    at = 0
    for tensor in message.tensors:
        data = memoryview(tensor.data).cast("B")
        for start in range(0, len(data), piece_bytes):
            part = data[start : start + piece_bytes]
            piece = Tensor(dtype="u8", shape=(len(part),), data=part)
            yield Message(header={"piece": number, "at": at}, tensors=[piece])
            at += len(part)


class Outgoing:
    """A parcel on its way out."""

    def __init__(self, messages: Iterator[Message], on_sent: Callable[[], None]) -> None:
        """Begin.

        Args:
            messages: Which carry it; not none.
            on_sent: Called once, when there is nothing left to be sent.
        """
        self._messages = messages
        self._next = next(messages, None)
        self._on_sent = on_sent

    def take(self) -> Message | None:
        """What comes next; not called again after the last one."""
        message, self._next = self._next, next(self._messages, None)
        return message

    def sent(self) -> bool:
        """What was taken has been sent; whether that was all."""
        if self._next is None:
            self._on_sent()
        return self._next is None


class Interleaver:
    """What is to be sent next of several parcels: a message of each in turn."""

    def __init__(self) -> None:
        self._turns: deque[Outgoing] = deque()
        self._current: Outgoing | None = None  # whose message is being sent

    def add(self, outgoing: Outgoing) -> None:
        """Have it sent, too."""
        self._turns.append(outgoing)

    def remove(self, outgoing: Outgoing) -> None:
        """Send no more of it; one that has been sent already is no error."""
        if outgoing in self._turns:
            self._turns.remove(outgoing)
        if outgoing is self._current:
            self._current = None

    def next_message(self) -> Message | None:
        """What comes next, once what came last has been sent; ``None``: nothing."""
        self.sent()
        if not self._turns:
            return None
        self._current = self._turns.popleft()
        return self._current.take()

    def sent(self) -> None:
        """What came last has been sent."""
        if self._current is not None and not self._current.sent():
            self._turns.append(self._current)
        self._current = None


@dataclass(frozen=True, kw_only=True)
class NoRoom:
    """There was no room for (the rest of) a parcel; what still comes of it is passed over.

    Attributes:
        header: Its fields.
    """

    header: Mapping[str, Any]


@dataclass(kw_only=True, eq=False)
class _Incoming:
    """A parcel that has begun; ``data`` is ``None`` if nobody wants it any more.

    Attributes:
        deadline: When more must have come.
        end: When all must have come.
    """

    header: dict[str, Any]
    specs: list[tuple[str, tuple[int, ...]]]
    size: int
    deadline: float
    end: float
    data: bytearray | None = field(default_factory=bytearray)
    received: int = 0

    def receive(self, count: int, now: float) -> None:
        """So many bytes have come."""
        self.received += count
        self.deadline = min(self.deadline + count / MIN_BYTES_PER_S, now + LEAD_S, self.end)


class Assembler:
    """Puts parcels together."""

    def __init__(
        self,
        *,
        max_parcels: int,
        limit: Callable[[Mapping[str, Any]], int],
        take: Callable[[int], bool] = lambda _: True,
        give_back: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Begin.

        Args:
            max_parcels: How many may have begun and not ended.
            limit: How many bytes of tensors a parcel with these fields may have; raises RemoteProtocolError where
                none is expected. Messages that are whole are not asked about.
            take: Asked before so many more bytes of tensors are kept. ``False``: there is no room.
            give_back: Told that so many bytes are kept no longer. Those of whole messages are not given back here.
        """
        self._max_parcels = max_parcels
        self._limit = limit
        self._take = take
        self._give_back = give_back
        self._open: dict[int, _Incoming] = {}

    @property
    def is_inside(self) -> bool:
        """Whether a parcel has begun and not ended."""
        return bool(self._open)

    @property
    def deadline(self) -> float:
        """When more must have come; infinite while no parcel has begun."""
        return min((parcel.deadline for parcel in self._open.values()), default=math.inf)

    def postpone(self, seconds: float) -> None:
        """So long nothing was read here: that is not the sender's fault."""
        for parcel in self._open.values():
            parcel.deadline += seconds
            parcel.end += seconds

    def is_coming(self, number: int) -> bool:
        """Whether this one has begun, not ended, and not been passed over."""
        return number in self._open and self._open[number].data is not None

    def drop(self, number: int) -> None:
        """The sender has given this one up, and sends no more of it; one that is not there is no error."""
        parcel = self._open.pop(number, None)
        if parcel is not None:
            self._discard(parcel)

    def receive(self, message: Message, now: float) -> Message | NoRoom | None:
        """Take a message from the stream.

        Args:
            message: The next one.
            now: In seconds of any clock that never goes back.

        Returns:
            A whole message; ``NoRoom``, once, for one that there is no room for; ``None`` while there is more to come.

        Raises:
            RemoteProtocolError: the sender does not keep to the rules.
        """
        if "piece" in message.header:
            return self._piece(message, now)
        if "p" in message.header:
            self._begin(message, now)
            return None
        size = tensor_bytes(message)
        return message if not size or self._take(size) else NoRoom(header=message.header)

    def _begin(self, message: Message, now: float) -> None:
        header = dict(message.header)
        number = packing.integer(header, "id", 1, MAX_NUMBER)
        specs = _read_specs(header.pop("p"))
        size = sum(_spec_bytes(spec) for spec in specs)
        if message.tensors or not size:
            raise RemoteProtocolError("the beginning of a parcel that is none")
        if number in self._open:
            raise RemoteProtocolError(f"parcel {number} begins twice")
        if len(self._open) >= self._max_parcels:
            raise RemoteProtocolError(f"more than {self._max_parcels} parcels at once")
        limit = self._limit(header)
        if size > limit:
            raise RemoteProtocolError(f"a parcel of {size} bytes: at most {limit} are read")
        self._open[number] = _Incoming(
            header=header, specs=specs, size=size, deadline=now + FIRST_BYTES_S, end=now + PARCEL_S
        )

    def _piece(self, message: Message, now: float) -> Message | NoRoom | None:
        number = packing.integer(message.header, "piece", 1, MAX_NUMBER)
        parcel = self._open.get(number)
        if parcel is None:
            raise RemoteProtocolError(f"a piece of parcel {number}, which has not begun")
        at = packing.integer(message.header, "at", 0, MAX_PARCEL_BYTES)
        if len(message.tensors) != 1 or message.tensors[0].dtype != "u8":
            raise RemoteProtocolError("a piece of a parcel that is none")
        data, count = message.tensors[0].data, message.tensors[0].n_bytes
        if at != parcel.received or not 0 < count <= parcel.size - at:
            has = f"{parcel.received} of {parcel.size}"
            raise RemoteProtocolError(f"bytes {at} to {at + count} of a parcel that has {has}")
        parcel.receive(count, now)
        is_whole = parcel.received == parcel.size
        if is_whole:
            del self._open[number]
        if parcel.data is None:
            return None
        if not self._take(count):
            self._discard(parcel)
            return NoRoom(header=parcel.header)
        parcel.data += data
        return parcel_message(parcel.header, parcel.specs, parcel.data) if is_whole else None

    def _discard(self, parcel: _Incoming) -> None:
        if parcel.data is not None:
            self._give_back(len(parcel.data))
            parcel.data = None


def parcel_message(header: Mapping[str, Any], specs: list[tuple[str, tuple[int, ...]]], data: bytearray) -> Message:
    """The message that was cut."""
    view, at, tensors = memoryview(data), 0, []
    for dtype, shape in specs:
        end = at + _spec_bytes((dtype, shape))
        tensors.append(Tensor(dtype=dtype, shape=shape, data=view[at:end]))
        at = end
    return Message(header=header, tensors=tensors)


def _spec_bytes(spec: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = spec
    return ITEM_BYTES[dtype] * math.prod(shape)


def _read_specs(specs: object) -> list[tuple[str, tuple[int, ...]]]:
    if not isinstance(specs, list) or len(specs) > MAX_TENSORS:
        raise RemoteProtocolError(f"tensors that are no list of at most {MAX_TENSORS}")
    return [_read_spec(spec) for spec in specs]


def _read_spec(spec: object) -> tuple[str, tuple[int, ...]]:
    match spec:
        case [str(dtype), list(shape)] if (
            dtype in ITEM_BYTES
            and len(shape) <= MAX_DIMENSIONS
            and all(type(size) is int and 0 <= size <= MAX_PARCEL_BYTES for size in shape)
        ):
            return dtype, tuple(shape)
    raise RemoteProtocolError("a tensor without a known dtype and shape")
