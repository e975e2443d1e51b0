"""In which form hidden states travel, and what that costs.

Which form is fixed when a session opens, for it decides the session's tokens; whether bytes are compressed on the way
is not, for that decides nothing but the time. By default the form is the nodes' activation type, in which nothing is
lost (:func:`default_form`): what a node computes is in that type, and what it gets is converted to it first of all,
with the same rounding here as there. Of lossy forms, tokens also depend on where a chain is cut into hops.

Wire, of hidden states [b, t, d], all little-endian::

    float32 float16 bfloat16    b * t * d elements, row-major
    int8                        b * t * d levels of 8 bits, row-major; then, for each token and each 64 levels of it
                                (the last may be fewer), their scale as bfloat16. A value is level * scale

Beside them travels a map: empty, or ``{"codec": "shuffle-zstd"}`` if ``compute.compression`` made these bytes fewer.
How a message says which form it has, and of how many tokens, stands in ``net.protocol.session``.

A scale is the largest magnitude of its values / 127, rounded. bfloat16 has float32's range, which gradients need, and
adds 0.4 % to the error that a scale in float32 has; float16 would add nothing, and overflow. To encode what was decoded
to float32 gives the same bytes, so that passing it on loses nothing more.

Measured with bloom-tiny in four hops, held-out text (``tests/bench/forms.py``), MB of float32 values per second of one
thread of a server's CPU (x86-64 with AVX-512), messages of 256 tokens:

============  ==================  ==========  ===========  ===========  ==============  ==============
form          bytes an element    error       same argmax  nats added   encode, decode  compressed
============  ==================  ==========  ===========  ===========  ==============  ==============
float32       4.00 (3.16)         0           100 %        0            (a view), 9000  490, 1040
float16       2.00 (1.59)         1.7e-4      99.99 %      0.00001      1200, 6900      550, 1330
bfloat16      2.00 (1.29)         1.3e-3      99.8 %       0.00006      1280, 8800      420, 1310
int8          1.03 (0.90)         5.9e-3      99.1 %       0.0001       1270, 3000      530, 1040
============  ==================  ==========  ===========  ===========  ==============  ==============

In brackets: compressed; embeddings, of which a text repeats many, do much for that. Between blocks 0.85 is left of
float32 and float16, 0.69 of bfloat16, 0.94 of int8, which pays on lines up to about 45, 35, 60 and 6 MB/s.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from compute.compression import Bytes, CompressionChoice, Part, compress, decompress
from compute.errors import BadInput
from compute.tensors import from_wire, tensor_bytes, to_wire
from net.protocol import session as wire
from net.rpc import framing
from net.rpc.framing import MAX_FRAME_BYTES

BLOCK: Final = 64  # levels that share a scale
CODEC: Final = "shuffle-zstd"
MAX_PLAIN_BYTES: Final = MAX_FRAME_BYTES  # of a tensor, also before it was compressed
_TOP_LEVEL: Final = 127
_SCALE_BYTES: Final = 2
_TINY: Final = torch.finfo(torch.float32).tiny
_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)


class Form(enum.StrEnum):
    """How a hidden state becomes bytes; the value is its name on the wire."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"

    @classmethod
    def read(cls, name: object) -> Form:
        """The form that a peer or a person names.

        Raises:
            BadInput: ``bad-dtype``: there is none of that name.
        """
        for form in cls:
            if form == name:
                return form
        raise BadInput("bad-dtype", f"no form {name!r:.40} for hidden states; there are {', '.join(cls)}")

    def is_lossless(self, dtype: torch.dtype) -> bool:
        """Whether every value of ``dtype`` is left as it is."""
        return self is Form.FLOAT32 or _DTYPES.get(self) == dtype

    def n_bytes(self, shape: Sequence[int], limit: int = MAX_PLAIN_BYTES) -> int:
        """How many bytes hidden states of this shape take, not compressed.

        Raises:
            BadInput: ``bad-shape``: it is none of hidden states, or they would take more than ``limit``.
        """
        return sum(part.n_bytes for part in self.parts(shape, limit))

    def parts(self, shape: Sequence[int], limit: int = MAX_PLAIN_BYTES) -> Sequence[Part]:
        """What these bytes are made of. Raises: as :meth:`n_bytes`."""
        if (
            not isinstance(shape, (list, tuple))
            or len(shape) != 3
            or any(type(size) is not int or size < 1 for size in shape)
        ):
            raise BadInput("bad-shape", f"hidden states are [b, t, d], none of them 0, not {shape!r:.100}")
        return _parts(self, tuple(shape), limit)


@lru_cache(maxsize=64)  # most steps are alike
def _parts(form: Form, shape: tuple[int, ...], limit: int) -> Sequence[Part]:
    """Of a shape that has been checked."""
    count = math.prod(shape)
    if form is Form.INT8:
        parts = [Part(count, 1), Part(count // shape[2] * _blocks(shape[2]), _SCALE_BYTES)]
    else:
        parts = [Part(count, _DTYPES[form].itemsize)]
    if (size := sum(part.n_bytes for part in parts)) > limit:
        raise BadInput("bad-shape", f"hidden states of {size} bytes: at most {limit} travel in one piece")
    return parts


_DTYPES: Final = {Form.FLOAT32: torch.float32, Form.FLOAT16: torch.float16, Form.BFLOAT16: torch.bfloat16}


def default_form(dtype: str) -> Form:
    """The narrowest form in which nothing is lost between nodes that announce ``dtype`` as that of their numerics.

    It is the type of their activations, not of their weights: a node on the CPU with weights in fp16 or int8 announces
    float32. Of a type that is not known here, values travel as float32, which is what such a node has to take.
    """
    return next((form for form in _DTYPES if form == dtype), Form.FLOAT32)


def encode(
    hidden: Tensor, form: Form, *, compressed: bool = False, limit: int = MAX_PLAIN_BYTES
) -> tuple[dict[str, Any], Bytes]:
    """What travels beside the bytes, and the bytes. Without compression they may be a view: do not change ``hidden``.

    NaN and infinity stay what they are in floats, for those who check them to see.

    Args:
        hidden: Hidden states of 16 or 32 bit floats, on any device.
        form: The session's.
        compressed: Whether to compress; what does not get smaller that way is left as it is all the same.
        limit: How many bytes they may take, not compressed.

    Shapes:
        hidden: [b, t, d]

    Raises:
        BadInput: ``bad-dtype``; ``bad-shape``: as :meth:`Form.n_bytes`; ``bad-value``: finite values that are beyond
            the form's range; ``not-finite``: NaN or infinity, in int8, which has neither.
    """
    plain = _plain(hidden, form, limit)
    return _smaller(plain, compress(plain, form.parts(hidden.shape, limit))) if compressed else ({}, plain)


def decode(
    fields: Mapping[str, Any],
    data: Bytes,
    form: Form,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    limit: int = MAX_PLAIN_BYTES,
) -> Tensor:
    """Hidden states that a peer sent, in memory of their own. Sizes are checked before anything is allocated.

    Values may be NaN or infinite, also those of int8, by their size: whoever computes with them has to look.

    Args:
        fields: What came beside the bytes; other keys are others' affair.
        data: The bytes.
        form: The session's.
        shape: [b, t, d], of which b and d are the session's.
        dtype: What to convert to.
        limit: How many bytes they may take, not compressed.

    Shapes:
        returns: [b, t, d]

    Raises:
        BadInput: ``bad-shape``: as :meth:`Form.n_bytes`, or not as many bytes as that; ``bad-value``: an unknown codec,
            bytes that it cannot have made, or scales that are not finite.
    """
    parts = form.parts(shape, limit)
    expected = form.n_bytes(shape, limit)
    codec = fields.get("codec")
    if codec is not None:
        if codec != CODEC:
            raise BadInput("bad-value", f"codec {codec!r:.40} is not {CODEC}")
        if memoryview(data).nbytes >= expected:
            raise BadInput("bad-shape", f"{form} {list(shape)} compressed to not less than its {expected} bytes")
        data = decompress(data, parts)
    if memoryview(data).nbytes != expected:
        raise BadInput("bad-shape", f"{form} {list(shape)} takes {expected} bytes, not {memoryview(data).nbytes}")
    if form is Form.INT8:
        return _from_levels(memoryview(data), shape).to(dtype)
    return from_wire(_WIRE_NAMES[form], shape, data).to(dtype)


def _plain(hidden: Tensor, form: Form, limit: int = MAX_PLAIN_BYTES) -> memoryview:
    """The bytes, not compressed. Raises: as :func:`encode`."""
    if hidden.dtype not in _FLOATS:
        raise BadInput("bad-dtype", f"hidden states in {hidden.dtype}, expected 16 or 32 bit floats")
    form.n_bytes(hidden.shape, limit)
    if form is Form.INT8:
        levels, scales = _to_levels(hidden.detach())
        return memoryview(b"".join([tensor_bytes(levels), to_wire(scales)[2]]))
    cast = hidden.detach().to("cpu", _DTYPES[form])  # [b, t, d]
    if cast.dtype != hidden.dtype and not cast.isfinite().all() and (cast.isinf() & hidden.isfinite().cpu()).any():
        raise BadInput("bad-value", f"hidden states beyond the range of {form}; choose a form with a wider one")
    return to_wire(cast)[2]


def _smaller(plain: memoryview, compressed: bytes) -> tuple[dict[str, Any], Bytes]:
    return ({"codec": CODEC}, compressed) if len(compressed) < plain.nbytes else ({}, plain)


def _to_levels(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes: hidden [b, t, d]; returns levels [b, t, d] in int8, scales [b, t, n] in bfloat16."""
    b, t, d = hidden.shape
    largest = torch.finfo(hidden.dtype).max
    values = hidden.to("cpu", torch.float32)  # [b, t, d]
    blocks = _in_blocks(values)  # [b, t, n, 64]
    peak = blocks.abs().amax(dim=-1)  # [b, t, n]; NaN, too, shows here
    if not peak.isfinite().all():
        raise BadInput("not-finite", "NaN or infinity in hidden states, for which int8 has no levels")
    scales = (peak / _TOP_LEVEL).clamp_(min=_TINY).bfloat16()  # [b, t, n]
    # Next to the end of the range, what was rounded up might be beyond it. These are positive: the bits below are the
    # next smaller value.
    beyond = scales.float() * _TOP_LEVEL > largest
    scales = torch.where(beyond, (scales.view(torch.int16) - 1).view(torch.bfloat16), scales)
    levels = (blocks / scales.float()[..., None]).round_().clamp_(-_TOP_LEVEL, _TOP_LEVEL)  # [b, t, n, 64]
    return levels.to(torch.int8).view(b, t, -1)[..., :d].contiguous(), scales


def _from_levels(data: memoryview, shape: Sequence[int]) -> Tensor:
    """Shapes: returns [b, t, d], float32."""
    b, t, d = shape
    count = b * t * d
    scales = from_wire("bf16", (b, t, _blocks(d)), data[count:]).float()  # [b, t, n]
    if not scales.isfinite().all():
        raise BadInput("bad-value", "int8 hidden states with scales that are not finite")
    levels = torch.frombuffer(bytearray(data[:count]), dtype=torch.int8).view(b, t, d)
    blocks = _in_blocks(levels)  # [b, t, n, 64]
    return (blocks * scales[..., None]).view(b, t, -1)[..., :d].contiguous()


def _in_blocks(values: Tensor) -> Tensor:
    """Filled up with zeros. Shapes: values [b, t, d]; returns [b, t, n, 64], or [b, t, 1, d] if that is less."""
    b, t, d = values.shape
    block = min(BLOCK, d)
    return F.pad(values, (0, -d % block)).view(b, t, _blocks(d), block)


def _blocks(width: int) -> int:
    return -(-width // BLOCK)


_WIRE_NAMES: Final = {Form.FLOAT32: "f32", Form.FLOAT16: "f16", Form.BFLOAT16: "bf16"}


def from_message(fields: Mapping[str, Any], tensor: framing.Tensor, batch: int, width: int) -> tuple[Tensor, Form]:
    """Hidden states out of a message, always as float32, so that what is computed of them loses nothing; and the form
    that they had. As :func:`decode`, they may be anything but of another size.

    Args:
        fields: The message's.
        tensor: Its only one.
        batch: Rows of the session.
        width: Of its hidden states.

    Shapes:
        returns: [b, t, d]

    Raises:
        BadInput: as :func:`decode`; ``bad-dtype``: an unknown form, or no hidden states at all.
        RemoteProtocolError: bytes without a number of tokens.
    """
    form = _BY_WIRE_NAME.get(tensor.dtype)
    if form is not None:
        if tensor.shape[:1] != (batch,) or tensor.shape[2:] != (width,):
            raise BadInput("bad-shape", f"hidden states {list(tensor.shape)}, expected [{batch}, t, {width}]")
        return decode({}, tensor.data, form, tensor.shape, torch.float32), form
    if tensor.dtype != "u8":
        raise BadInput("bad-dtype", f"hidden states in {tensor.dtype!r:.40}")
    form = Form.read(fields.get("form"))
    return decode(fields, tensor.data, form, (batch, wire.read_tokens(fields), width), torch.float32), form


def _in_message(
    fields: dict[str, Any], data: Bytes, form: Form, shape: Sequence[int]
) -> tuple[dict[str, Any], framing.Tensor]:
    if form in _WIRE_NAMES and not fields:
        return {}, framing.Tensor(dtype=_WIRE_NAMES[form], shape=tuple(shape), data=data)
    said = {**fields, "form": str(form), "tokens": shape[1]}
    return said, framing.Tensor(dtype="u8", shape=(memoryview(data).nbytes,), data=data)


_BY_WIRE_NAME: Final = {name: form for form, name in _WIRE_NAMES.items()}


class Sender:
    """What one side of a session sends to the other: encoded, compressed where that pays, accounted for.

    Not for concurrent use.

    Attributes:
        form: The session's.
        account: What has been sent.
    """

    def __init__(
        self,
        form: Form,
        *,
        may_compress: bool,
        measures_error: bool = False,
        account: Account | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin.

        Args:
            form: The session's.
            may_compress: Whether the peer has said that it decompresses.
            measures_error: Whether to decode everything, to know what was lost.
            account: Of what has been sent, also by others in the same form; a new one by default.
            clock: Seconds that never go back.
        """
        self.form = form
        self.account = account or Account(form)
        self._measures_error = measures_error
        self._clock = clock
        self._choice = CompressionChoice(clock) if may_compress else None

    def alike(self, *, may_compress: bool) -> Sender:
        """One for another peer, which adds to the same account."""
        return Sender(
            self.form,
            may_compress=may_compress,
            measures_error=self._measures_error,
            account=self.account,
            clock=self._clock,
        )

    def encode(self, hidden: Tensor, link_bytes_per_s: float | None) -> tuple[dict[str, Any], Bytes]:
        """As the function of this name.

        Args:
            hidden: Hidden states.
            link_bytes_per_s: What was measured of the line to the peer, if anything was.

        Raises: as that.
        """
        choice = self._choice
        if choice is not None and choice.wants(self.form.n_bytes(hidden.shape), link_bytes_per_s):
            fields, data = self._compressed(hidden, choice)
        else:
            fields, data = encode(hidden, self.form)
        self.account.add(hidden.shape[0] * hidden.shape[1], memoryview(data).nbytes)
        if self._measures_error and not self.form.is_lossless(hidden.dtype):
            received = decode(fields, data, self.form, hidden.shape, torch.float32)
            self.account.add_error(hidden, received)
        return fields, data

    def message(self, hidden: Tensor, link_bytes_per_s: float | None) -> tuple[dict[str, Any], framing.Tensor]:
        """The same as a message's fields and its tensor."""
        return _in_message(*self.encode(hidden, link_bytes_per_s), self.form, hidden.shape)

    def _compressed(self, hidden: Tensor, choice: CompressionChoice) -> tuple[dict[str, Any], Bytes]:
        plain, parts = _plain(hidden, self.form), self.form.parts(hidden.shape)
        began = self._clock()
        data = compress(plain, parts)
        encode_s, decode_s = self._clock() - began, None
        if choice.wants_decode_time(plain.nbytes):
            began = self._clock()
            decompress(data, parts)
            decode_s = self._clock() - began
        choice.measured(plain.nbytes, len(data), encode_s, decode_s)
        return _smaller(plain, data)


class Account:
    """How many bytes tokens took on their way, and what was lost of them.

    Attributes:
        form: In which they were sent.
        tokens: How many, of all rows.
        sent_bytes: Of their hidden states.
    """

    def __init__(self, form: Form) -> None:
        """Begin with nothing."""
        self.form = form
        self.tokens = 0
        self.sent_bytes = 0
        self._off = 0.0
        self._size = 0.0

    def add(self, tokens: int, sent_bytes: int) -> None:
        """A message was sent."""
        self.tokens += tokens
        self.sent_bytes += sent_bytes

    def add_error(self, hidden: Tensor, received: Tensor) -> None:
        """What is decoded at the other end of a message. Shapes: both [b, t, d]."""
        values = hidden.detach().to("cpu", torch.float64)
        self._off += float((received.double() - values).square().sum())
        self._size += float(values.square().sum())

    @property
    def bytes_per_token(self) -> float:
        """The average; 0 before anything was sent."""
        return self.summary().bytes_per_token

    @property
    def relative_error(self) -> float | None:
        """Root mean square of what was lost, relative to that of the values; ``None`` if it was not measured."""
        return math.sqrt(self._off / self._size) if self._size else None

    def summary(self) -> wire.Sent:
        """What is said of it to others."""
        return wire.Sent(form=str(self.form), tokens=self.tokens, n_bytes=self.sent_bytes, error=self.relative_error)

    def __str__(self) -> str:
        """For people: ``int8, 132 bytes a token, error 0.66 %``."""
        return str(self.summary())
