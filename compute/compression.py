"""Bytes of floats made fewer without loss: byte shuffle, then Zstandard; and when that is worth its time.

Wire: one Zstandard frame that states the size of its content, with no dictionary. The content are the planes of each
part of a message, one after another: the first bytes of all elements, then all second bytes, and so on. Where a plane
begins, the frame begins a new block, for a block is coded with the statistics of its own bytes, and those of exponents
and mantissas differ. Without that, the shuffle gains nothing for messages of less than 128 KiB: 64 KiB of bfloat16
from between blocks of bloom-tiny become 0.69 of that, 0.78 with the shuffle alone, and 0.78 with neither. Who reads
need not know: any frame with that content is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import zstandard

from compute.errors import BadInput

Bytes = memoryview | bytes | bytearray

LEVEL: Final = 1  # 3 takes longer and gains nothing: what can be gained lies in single bytes, not in repetition
MAX_WINDOW_BYTES: Final = 8 << 20

MIN_BYTES: Final = 4096  # less is one packet or a few, and the codec's fixed cost (30 us) is most of its time
MAX_BYTES_PER_S: Final = 1e9  # of a line; no codec of ours pays on a faster one, so that none is tried
MARGIN: Final = 0.02  # of the time that the plain bytes take, at least, must be won
FIRST_AGAIN_S: Final = 1.0  # after what did not pay was tried; twice as long before each further try, up to
MAX_AGAIN_S: Final = 64.0
MEMORY_S: Final = 5.0  # what is older hardly counts
MIN_WEIGHT: Final = 0.2  # of a new value, however soon after the last one it comes


@dataclass(frozen=True)
class Part:
    """A run of elements of one width.

    Attributes:
        count: How many.
        item_bytes: Of each.
    """

    count: int
    item_bytes: int

    @property
    def n_bytes(self) -> int:
        return self.count * self.item_bytes


def compress(data: Bytes, parts: Sequence[Part]) -> bytes:
    """What :func:`decompress` reads. It may be longer than ``data``.

    Raises:
        ValueError: The parts are not as long as the data.
    """
    plain = np.frombuffer(data, np.uint8)
    if plain.size != sum(part.n_bytes for part in parts):
        raise ValueError(f"{plain.size} bytes, of parts of {[part.n_bytes for part in parts]}")
    frame = zstandard.ZstdCompressor(level=LEVEL).compressobj(size=plain.size)
    pieces: list[bytes] = []
    start = 0
    for part in parts:
        items = plain[start : start + part.n_bytes].reshape(part.count, part.item_bytes)
        for index in range(part.item_bytes):
            plane = np.ascontiguousarray(items[:, index])
            pieces += [frame.compress(plane.data), frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
        start += part.n_bytes
    pieces.append(frame.flush())
    return b"".join(pieces)


def decompress(data: Bytes, parts: Sequence[Part]) -> memoryview:
    """What was compressed, in new memory. No more is ever allocated than the parts say, and a window.

    A frame is read into memory of the size that it states, once that is known to be the size expected: that, and not
    ``max_output_size``, which the library heeds only for frames that state none, is what stops bombs.

    Raises:
        BadInput: ``bad-value``: no frame, one of another size or with a larger window, a damaged one, or more than one.
    """
    expected = sum(part.n_bytes for part in parts)
    try:
        stated = zstandard.get_frame_parameters(data)
        if stated.content_size != expected or stated.window_size > MAX_WINDOW_BYTES:
            raise BadInput("bad-value", f"a compressed tensor that does not state that it has {expected} bytes")
        content = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompress(
            data, read_across_frames=False, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise BadInput("bad-value", f"a compressed tensor that cannot be read: {error}") from error
    if len(content) != expected:  # a frame to be skipped, of the size expected, gives nothing
        raise BadInput("bad-value", f"a compressed tensor of {len(content)} bytes, not {expected}")
    shuffled, plain = np.frombuffer(content, np.uint8), np.empty(expected, np.uint8)
    start = 0
    for part in parts:
        items = plain[start : start + part.n_bytes].reshape(part.count, part.item_bytes)
        for index in range(part.item_bytes):  # three times as fast as all at once
            items[:, index] = shuffled[start : start + part.count]
            start += part.count
    return plain.data


@dataclass(eq=False)
class _Figures:
    """What is known of messages of about one size; times are seconds for a plain byte."""

    again_at: float
    again_s: float = FIRST_AGAIN_S
    measured_at: float = -math.inf
    ratio: float = 0.0
    encode: float = 0.0
    decode: float = 0.0
    decoded_at: float = -math.inf


class CompressionChoice:
    """Whether the next message to a peer is worth compressing: whether it is there sooner. No I/O.

    Messages of about one size (within four times) are judged by what compressing others like them has brought. Where it
    pays, each message tells more; where it does not, one is compressed now and then to see whether it does by now. The
    peer is taken to decompress as fast as we do.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """Take a clock: seconds that never go back."""
        self._clock = clock
        self._known: dict[int, _Figures] = {}  # by size class, of which there are few: frames are bounded

    def wants(self, n_bytes: int, link_bytes_per_s: float | None) -> bool:
        """Whether to compress; then :meth:`measured` is told how it went.

        Args:
            n_bytes: Of the message, plain.
            link_bytes_per_s: What was measured of the line to the peer; ``None`` if nothing was, and then nothing is
                compressed.
        """
        if n_bytes < MIN_BYTES or link_bytes_per_s is None or not 0.0 < link_bytes_per_s < MAX_BYTES_PER_S:
            return False
        now = self._clock()
        figures = self._known.setdefault(_size_class(n_bytes), _Figures(again_at=now))
        if math.isfinite(figures.measured_at) and _pays(figures, link_bytes_per_s):
            figures.again_at, figures.again_s = now + FIRST_AGAIN_S, FIRST_AGAIN_S
            return True
        if now < figures.again_at:
            return False
        figures.again_at = now + figures.again_s
        figures.again_s = min(2 * figures.again_s, MAX_AGAIN_S)
        return True

    def wants_decode_time(self, n_bytes: int) -> bool:
        """Whether to decompress what was just compressed, for its time: the first such message, and rarely later."""
        figures = self._known.get(_size_class(n_bytes))
        return figures is not None and self._clock() >= figures.decoded_at + MAX_AGAIN_S

    def measured(self, n_bytes: int, compressed_bytes: int, encode_s: float, decode_s: float | None = None) -> None:
        """How compressing a message went.

        Args:
            n_bytes: Of it, plain; more than 0.
            compressed_bytes: Of what came of it, even if that is more and was not sent.
            encode_s: How long that took.
            decode_s: How long it took to undo it, if that was measured.
        """
        now = self._clock()
        figures = self._known.setdefault(_size_class(n_bytes), _Figures(again_at=now))
        weight = max(MIN_WEIGHT, 1.0 - math.exp((figures.measured_at - now) / MEMORY_S))  # of the first one: 1
        figures.ratio += weight * (compressed_bytes / n_bytes - figures.ratio)
        figures.encode += weight * (encode_s / n_bytes - figures.encode)
        figures.measured_at = now
        if decode_s is not None:
            figures.decode, figures.decoded_at = decode_s / n_bytes, now


def _size_class(n_bytes: int) -> int:
    return n_bytes.bit_length() // 2


def _pays(figures: _Figures, link_bytes_per_s: float) -> bool:
    won = (1.0 - figures.ratio - MARGIN) / link_bytes_per_s  # seconds for a plain byte
    return won > figures.encode + figures.decode
