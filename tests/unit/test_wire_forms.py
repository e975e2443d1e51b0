"""Hidden states arrive as they were sent, or as near as their form says; what nobody can have sent is refused."""

from __future__ import annotations

import itertools
import math
import random
import struct
import tracemalloc
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compute.checkpoint import Checkpoint
from compute.compression import Bytes, CompressionChoice
from compute.errors import BadInput
from compute.models import find_checkpoint
from compute.tensors import to_wire
from compute.wire_forms import (
    BLOCK,
    CODEC,
    MAX_PLAIN_BYTES,
    Account,
    Form,
    Sender,
    decode,
    default_form,
    encode,
    from_message,
)
from net.errors import RemoteProtocolError
from net.rpc import framing
from net.rpc.framing import ITEM_BYTES

DTYPES = {Form.FLOAT32: torch.float32, Form.FLOAT16: torch.float16, Form.BFLOAT16: torch.bfloat16}
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3 * BLOCK))
PACKED = {"codec": CODEC}
SHAPE = (1, 256, 64)  # 64 KiB in float32


def noise(shape: tuple[int, ...], seed: int = 0, size: float = 3.0) -> Tensor:
    """Values as hidden states have them: [b, t, d]."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def there_and_back(hidden: Tensor, form: Form, *, compressed: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    fields, data = encode(hidden, form, compressed=compressed)
    return decode(fields, bytes(data), form, tuple(hidden.shape), dtype or hidden.dtype)


def refused(
    fields: dict[str, Any], data: Bytes, form: Form = Form.FLOAT32, shape: Any = SHAPE, match: str | None = None
) -> BadInput:
    with pytest.raises(BadInput, match=match) as caught:
        decode(fields, data, form, shape, torch.float32)
    return caught.value


# Forms


@given(shape=SHAPES, form=st.sampled_from(sorted(DTYPES)), compressed=st.booleans(), data=st.data())
def test_floats_arrive_as_the_bits_they_were(
    shape: tuple[int, int, int], form: Form, compressed: bool, data: st.DataObject
) -> None:
    kind = DTYPES[form]
    size = math.prod(shape) * kind.itemsize
    # Few different bytes, so that compression has something to do; all of them, NaN and infinity included, are values.
    content = data.draw(st.binary(min_size=1, max_size=16)) * size
    hidden = torch.frombuffer(bytearray(content[:size]), dtype=torch.uint8).view(kind).view(shape)
    fields, sent = encode(hidden, form, compressed=compressed)
    assert memoryview(sent).nbytes <= form.n_bytes(shape) == size
    back = decode(fields, bytes(sent), form, shape, kind)
    assert bytes(to_wire(back)[2]) == content[:size]


@given(shape=SHAPES, seed=st.integers(0, 1000), exponent=st.integers(-30, 30), compressed=st.booleans())
def test_int8_is_within_half_a_level_and_encodes_to_the_same_bytes_again(
    shape: tuple[int, int, int], seed: int, exponent: int, compressed: bool
) -> None:
    hidden = noise(shape, seed, 10.0**exponent)
    fields, data = encode(hidden, Form.INT8, compressed=compressed)
    back = decode(fields, data, Form.INT8, shape, torch.float32)
    assert encode(back, Form.INT8, compressed=compressed) == (fields, data)
    for part, found in zip(hidden.split(BLOCK, dim=-1), back.split(BLOCK, dim=-1), strict=True):
        level = part.abs().amax(dim=-1, keepdim=True) / 127 * (1 + 2**-8)
        assert ((part - found).abs() <= level / 2 * (1 + 2**-7)).all()


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
@pytest.mark.parametrize("part", [1.0, 0.999, 0.7, 0.501])
def test_int8_reaches_to_the_ends_of_the_range(dtype: torch.dtype, part: float) -> None:
    largest = torch.finfo(dtype).max
    hidden = torch.tensor([[[largest * part, -largest * part, 0.0, 1.0]]]).to(dtype)
    back = there_and_back(hidden, Form.INT8)
    assert back.isfinite().all()
    assert torch.allclose(back, hidden, rtol=2**-7, atol=float(hidden[0, 0, 0].float()) / 254 * 1.01)


def test_int8_of_next_to_nothing_is_nothing() -> None:
    hidden = torch.tensor([[[0.0, 1e-40, -1e-38]]])
    assert (there_and_back(hidden, Form.INT8) - hidden).abs().max() <= torch.finfo(torch.float32).tiny / 2


def test_the_bytes_of_int8() -> None:
    hidden = torch.cat([torch.full((64,), 127.0), torch.tensor([-254.0, 2.0])]).view(1, 1, 66)
    fields, data = encode(hidden, Form.INT8)
    assert (fields, bytes(data)) == ({}, b"\x7f" * 64 + b"\x81\x01" + bytes.fromhex("803f") + bytes.fromhex("0040"))
    assert Form.INT8.n_bytes((2, 3, 66)) == 2 * 3 * (66 + 2 * 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_what_is_not_finite_stays_so_or_is_refused(value: float, dtype: torch.dtype) -> None:
    hidden = noise((1, 2, 70)).to(dtype)
    hidden[0, 1, 69] = value
    for form in DTYPES:
        back = there_and_back(hidden, form)
        assert torch.equal(back.isfinite(), hidden.isfinite())
    with pytest.raises(BadInput, match="NaN or infinity") as caught:
        encode(hidden, Form.INT8)
    assert caught.value.code == "not-finite"


def test_what_a_form_has_no_room_for_is_refused() -> None:
    hidden = noise((1, 1, 4))
    hidden[0, 0, 2] = 70_000.0
    with pytest.raises(BadInput, match="beyond the range of float16") as caught:
        encode(hidden, Form.FLOAT16)
    assert caught.value.code == "bad-value"
    assert torch.equal(there_and_back(hidden.bfloat16(), Form.FLOAT32), hidden.bfloat16())


def test_only_hidden_states_travel() -> None:
    with pytest.raises(BadInput, match="float64"):
        encode(torch.zeros(1, 1, 1, dtype=torch.float64), Form.FLOAT32)
    for shape in ((1, 1), (1, 0, 4), (1, 1, 1, 1), (1, MAX_PLAIN_BYTES // 4 + 1, 1)):
        with pytest.raises(BadInput) as caught:
            encode(torch.zeros(shape), Form.FLOAT32)
        assert caught.value.code == "bad-shape"


def test_strides_and_gradients_are_no_obstacle() -> None:
    hidden = noise((2, 3, 80)).requires_grad_(True).transpose(0, 1)
    for form in Form:
        assert torch.allclose(there_and_back(hidden, form, compressed=True), hidden, rtol=0.01, atol=0.1)


def test_received_memory_is_ones_own_and_writable() -> None:
    for form in Form:
        for compressed in (False, True):
            fields, data = encode(torch.full(SHAPE, 127.0), form, compressed=compressed)
            received = bytearray(data)
            back = decode(fields, received, form, SHAPE, torch.float32)
            received[:] = b"\xff" * len(received)
            back += 1
            assert bool((back == 128).all())


def test_forms_have_names() -> None:
    assert [Form.read(str(form)) for form in Form] == list(Form)
    for name in ("fp32", "", None, 8, ["int8"], "x" * 1000):
        with pytest.raises(BadInput, match="no form"):
            Form.read(name)


# What is lost by default: nothing


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_default_form_loses_nothing(dtype: str) -> None:
    form = default_form(dtype)
    assert form == dtype
    assert form.is_lossless(DTYPES[form])
    values = noise((2, 3, 128)).to(DTYPES[form])  # what a node gives
    assert torch.equal(there_and_back(values, form), values)
    embeddings = noise((2, 3, 128))  # what a client sends first; the node converts it, or it has been
    assert torch.equal(there_and_back(embeddings, form, dtype=DTYPES[form]), embeddings.to(DTYPES[form]))


def test_a_type_that_is_not_known_travels_as_float32() -> None:
    assert default_form("float8_e4m3fn") is Form.FLOAT32
    assert all(Form.FLOAT32.is_lossless(dtype) for dtype in DTYPES.values())
    assert not any(Form.INT8.is_lossless(dtype) for dtype in DTYPES.values())
    assert not Form.BFLOAT16.is_lossless(torch.float16)


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return find_checkpoint("bloom-tiny")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_chain_gives_the_bits_of_one_machine(tiny: Checkpoint, dtype: str) -> None:
    form, kind = default_form(dtype), DTYPES[Form(dtype)]
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        hidden = embedded = tiny.load_embeddings()(ids)  # [1, t, d], float32
        for start in range(0, tiny.n_blocks, 4):
            span = tiny.load_span(start, start + 4, dtype=kind, linear=None)
            received = there_and_back(hidden, form, compressed=True, dtype=span.dtype)
            hidden = there_and_back(span(received), form, dtype=torch.float32)
        whole = tiny.load_span(0, tiny.n_blocks, dtype=kind, linear=None)(embedded.to(kind))
    assert torch.equal(hidden, whole.float())


@pytest.mark.parametrize("linear", ["fp16", "int8", "bf16"])
def test_activations_are_float32_whatever_the_weights_on_the_cpu(tiny: Checkpoint, linear: str) -> None:
    span = tiny.load_span(0, 1, linear=linear)
    assert default_form(span.numerics[0]) is Form.FLOAT32
    assert default_form(span.numerics[0]).is_lossless(span.dtype)


# Hostile bytes


@given(data=st.binary(max_size=300), form=st.sampled_from(list(Form)), codec=st.sampled_from([None, CODEC]))
def test_any_bytes_are_read_or_refused(data: bytes, form: Form, codec: str | None) -> None:
    try:
        back = decode({} if codec is None else {"codec": codec}, data, form, (1, 2, 40), torch.float32)
    except BadInput:
        return
    assert (back.shape, back.dtype) == ((1, 2, 40), torch.float32)


@given(place=st.integers(0, 10_000), value=st.integers(0, 255), form=st.sampled_from(list(Form)))
def test_a_changed_byte_gives_hidden_states_or_is_refused(place: int, value: int, form: Form) -> None:
    fields, data = encode(noise((1, 16, 64)), form, compressed=True)
    changed = bytearray(data)
    changed[place % len(changed)] = value
    try:
        back = decode(fields, changed, form, (1, 16, 64), torch.float32)
    except BadInput:
        return
    assert back.shape == (1, 16, 64)


def frame(stated_bytes: int, blocks: list[bytes], *, window: int | None = None) -> bytes:
    """A frame that states the size of its content; a window of ``1 << (10 + window)``, or none but the content."""
    descriptor = 0b11_000000 | (0b100000 if window is None else 0)
    head = struct.pack("<IB", 0xFD2FB528, descriptor) + (b"" if window is None else bytes([window << 3]))
    return head + struct.pack("<Q", stated_bytes) + b"".join(blocks)


def run(length: int, *, last: bool = False) -> bytes:
    """A block of ``length`` zeros, in 4 bytes."""
    return struct.pack("<I", length << 3 | 0b010 | last)[:3] + b"\0"


def test_frames_made_by_hand_are_frames() -> None:
    blocks = [run(32_768), run(32_768, last=True)]
    for window in (None, 10):
        back = decode(PACKED, frame(65_536, blocks, window=window), Form.FLOAT32, SHAPE, torch.float32)
        assert torch.equal(back, torch.zeros(SHAPE))


BOMB = zstandard.ZstdCompressor(level=19).compress(bytes(64 << 20))  # 2 KB that are 64 MiB
UNSTATED = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(65_536))
GOOD = frame(65_536, [run(32_768), run(32_768, last=True)])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(BOMB, id="64 MiB"),
        pytest.param(UNSTATED, id="no size stated"),
        pytest.param(frame(1 << 40, [run(1, last=True)]), id="1 TiB stated"),
        pytest.param(frame(65_536, [run(65_536)] * 10_000 + [run(0, last=True)]), id="more than stated"),
        pytest.param(frame(65_536, [run(1 << 17)] * 10_000 + [run(0, last=True)], window=10), id="in larger blocks"),
        pytest.param(frame(65_536, [run(0)] * 10_000 + [run(0, last=True)]), id="empty blocks"),
        pytest.param(frame(65_536, [run(4096, last=True)]), id="less than stated"),
        pytest.param(frame(65_536, [run(65_536, last=True)], window=20), id="a window of 1 GiB"),
        pytest.param(frame(65_536, [run(65_536)], window=20), id="the same, cut off"),
        pytest.param(GOOD[:-1], id="cut off"),
        pytest.param(GOOD[:7], id="cut off in the header"),
        pytest.param(b"", id="nothing"),
        pytest.param(GOOD + b"\0", id="a byte behind"),
        pytest.param(GOOD + GOOD, id="two frames"),
        pytest.param(struct.pack("<II", 0x184D2A50, 65_536) + bytes(60_000), id="to be skipped"),
        pytest.param(b"\x28\xb5\x2f\xfd" + b"\xff" * 40, id="nonsense"),
    ],
)
def test_bombs_and_forgeries_are_refused_cheaply(data: bytes) -> None:
    tracemalloc.start()
    try:
        error = refused(PACKED, data, match="compressed tensor")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert error.code == "bad-value"
    assert peak < 1 << 20


def test_what_compression_has_made_longer_is_refused() -> None:
    data = zstandard.ZstdCompressor().compress(random.Random(0).randbytes(65_536))
    assert refused(PACKED, data, match="not less").code == "bad-shape"


@pytest.mark.parametrize("codec", ["zstd", "", 1, b"shuffle-zstd", ["shuffle-zstd"], {}, False])
def test_an_unknown_codec_is_refused(codec: object) -> None:
    assert refused({"codec": codec}, bytes(65_536), match="codec").code == "bad-value"


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("off", [-1, 1])
def test_another_number_of_bytes_is_refused(form: Form, off: int) -> None:
    assert refused({}, bytes(form.n_bytes(SHAPE) + off), form, match="takes").code == "bad-shape"


@pytest.mark.parametrize(
    "shape", [(1, 2), (1, 2, 3, 4), (0, 1, 1), (1, -1, 1), (1, 1.0, 1), (True, 1, 1), 7, "abc", (1 << 60,) * 3]
)
@pytest.mark.parametrize("fields", [{}, PACKED])
def test_a_shape_that_is_none_is_refused(shape: object, fields: dict[str, Any]) -> None:
    for form in Form:
        assert refused(fields, GOOD, form, shape).code == "bad-shape"


def test_no_frame_stands_for_more_than_a_message_holds() -> None:
    tokens = MAX_PLAIN_BYTES // (4 * 64) + 1
    bomb = zstandard.ZstdCompressor().compress(bytes(tokens * 64 * 4))
    assert refused(PACKED, bomb, shape=(1, tokens, 64), match="at most").code == "bad-shape"


@pytest.mark.parametrize("scale", ["807f", "80ff", "c07f"])  # infinity, minus infinity, NaN
def test_scales_are_finite(scale: str) -> None:
    data = bytes(64) + bytes.fromhex(scale)
    assert refused({}, data, Form.INT8, (1, 1, 64), match="scales").code == "bad-value"


def test_what_a_scale_makes_infinite_is_seen_to_be() -> None:
    data = b"\x7f" * 64 + bytes.fromhex("7f7f")
    assert not decode({}, data, Form.INT8, (1, 1, 64), torch.float32).isfinite().any()


# Compression


def test_a_block_for_each_plane_is_what_the_shuffle_needs() -> None:
    hidden = noise((1, 64, 64)).bfloat16()  # 8 KiB
    fields, data = encode(hidden, Form.BFLOAT16, compressed=True)
    assert fields == PACKED
    plain = bytes(to_wire(hidden)[2])
    shuffled = plain[::2] + plain[1::2]
    assert len(data) < 0.9 * len(zstandard.ZstdCompressor(level=1).compress(shuffled))


def test_what_does_not_get_smaller_is_left() -> None:
    hidden = torch.randint(-(2**31), 2**31, (1, 4, 64), dtype=torch.int32).view(torch.float32)
    assert encode(hidden, Form.FLOAT32, compressed=True)[0] == {}
    assert torch.equal(
        there_and_back(hidden, Form.FLOAT32, compressed=True).view(torch.int32), hidden.view(torch.int32)
    )


# Whether to compress, on a clock that stands still


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Peer:
    """Sends messages and tells the choice what compressing them took."""

    def __init__(self, *, ratio: float = 0.8, encode: float = 500e6, decode: float = 1e9) -> None:
        self.clock = Clock()
        self.choice = CompressionChoice(self.clock)
        self.ratio, self.encode, self.decode = ratio, encode, decode
        self.decoded = 0

    def send(self, n_bytes: int, link: float | None) -> bool:
        if not self.choice.wants(n_bytes, link):
            return False
        decode_s = None
        if self.choice.wants_decode_time(n_bytes):
            self.decoded += 1
            decode_s = n_bytes / self.decode
        self.choice.measured(n_bytes, int(n_bytes * self.ratio), n_bytes / self.encode, decode_s)
        return True

    def count(self, seconds: int, n_bytes: int, link: float | None) -> int:
        """How many of a message each second are compressed."""
        sent = 0
        for _ in range(seconds):
            self.clock.now += 1.0
            sent += self.send(n_bytes, link)
        return sent


PIECE = 1 << 20


def test_compression_is_for_lines_slower_than_the_codec() -> None:
    # 0.18 of the bytes are won (0.2, less what is not worth it) at 1/500 + 1/1000 us a byte: up to 60 MB/s it pays.
    peer = Peer()
    assert peer.count(100, PIECE, 50e6) == 100
    assert peer.count(3600, PIECE, 70e6) < 70
    assert peer.count(100, PIECE, 59e6) == 100


def test_nothing_is_compressed_without_a_reason() -> None:
    peer = Peer()
    assert peer.count(100, PIECE, None) == 0
    assert peer.count(100, PIECE, 0.0) == 0
    assert peer.count(100, PIECE, math.nan) == 0
    assert peer.count(100, PIECE, 2e9) == 0
    assert peer.count(100, 4 * 128, 1e3) == 0  # a token of bloom-tiny, even over a modem


def test_a_try_that_does_not_pay_is_repeated_more_and_more_rarely() -> None:
    peer = Peer(ratio=1.0)
    tried = []
    for second in range(1000):
        if peer.send(PIECE, 1e6):
            tried.append(second)
        peer.clock.now += 1.0
    gaps = [later - sooner for sooner, later in itertools.pairwise(tried)]
    assert gaps[:7] == [1, 2, 4, 8, 16, 32, 64]
    assert set(gaps[7:]) == {64}


def test_a_first_try_on_a_cold_machine_is_forgotten() -> None:
    peer = Peer(encode=5e6)
    assert peer.send(PIECE, 20e6)
    peer.encode = 500e6
    peer.count(30, PIECE, 20e6)
    assert peer.count(10, PIECE, 20e6) == 10


def test_changes_are_noticed() -> None:
    peer = Peer()
    assert peer.count(60, PIECE, 20e6) == 60
    peer.encode = 20e6  # somebody else wants the processor
    peer.count(10, PIECE, 20e6)
    assert peer.count(600, PIECE, 20e6) < 20
    assert peer.count(10, PIECE, 1e6) == 10  # a slower line is no reason to try anything: what is known is enough
    peer.encode = 500e6
    peer.count(128, PIECE, 20e6)
    assert peer.count(10, PIECE, 20e6) == 10


def test_sizes_are_judged_by_themselves() -> None:
    peer = Peer()
    assert peer.count(10, PIECE, 20e6) == 10
    peer.encode = 10e6  # so slow are small ones
    assert peer.count(600, 8192, 20e6) < 20
    peer.encode = 500e6
    assert peer.count(10, PIECE, 20e6) == 10


def test_decompression_is_timed_rarely() -> None:
    peer = Peer()
    assert peer.count(640, PIECE, 20e6) == 640
    assert peer.decoded == 10


def test_a_slow_peer_is_taken_into_account() -> None:
    peer = Peer(decode=10e6)
    peer.count(1, PIECE, 20e6)
    assert peer.count(600, PIECE, 20e6) < 20


# What one side of a session sends


class SteppingClock(Clock):
    """Each look takes a millisecond."""

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def test_a_sender_compresses_where_it_pays() -> None:
    hidden = noise((1, 256, 128)).bfloat16()  # 64 KiB; a ms each for the codec's two ways
    for link, may_compress, expected in ((1e6, True, PACKED), (1e6, False, {}), (50e6, True, {})):
        sender = Sender(Form.BFLOAT16, may_compress=may_compress, clock=SteppingClock())
        for _ in range(3):
            fields, data = sender.encode(hidden, link)
            assert torch.equal(decode(fields, data, Form.BFLOAT16, hidden.shape, torch.bfloat16), hidden)
        assert fields == expected
        assert sender.account.tokens == 3 * 256
        assert (sender.account.bytes_per_token < 256) is (sender.account.sent_bytes < 3 * 65_536)


def test_an_account_says_what_was_lost() -> None:
    sender = Sender(Form.INT8, may_compress=False, measures_error=True)
    assert (sender.account.bytes_per_token, sender.account.relative_error) == (0.0, None)
    hidden = noise((2, 8, 128))
    sender.encode(hidden, None)
    sender.encode(8 * hidden, None)
    error = sender.account.relative_error
    assert error is not None
    received = there_and_back(hidden, Form.INT8)
    assert error == pytest.approx(float((received - hidden).norm() / hidden.norm()), rel=1e-5)
    assert sender.account.bytes_per_token == 128 + 4
    assert str(sender.account) == f"int8, 132 bytes a token, error {100 * error:.2g} %"


def test_an_account_of_what_loses_nothing_says_nothing_of_it() -> None:
    sender = Sender(Form.BFLOAT16, may_compress=False, measures_error=True)
    sender.encode(noise((1, 4, 128)).bfloat16(), None)
    assert sender.account.relative_error is None
    assert str(sender.account) == "bfloat16, 256 bytes a token"
    assert str(Account(Form.INT8)) == "int8, 0 bytes a token"


def test_a_sender_refuses_what_the_form_does() -> None:
    sender = Sender(Form.INT8, may_compress=True)
    with pytest.raises(BadInput, match="NaN"):
        sender.encode(torch.full((1, 8, 4096), math.nan), 1e3)
    with pytest.raises(BadInput, match="\\[b, t, d\\]"):
        sender.encode(torch.zeros(1, 4), 1e3)
    assert sender.account.tokens == 0


# In messages


@given(shape=SHAPES, form=st.sampled_from(list(Form)), seed=st.integers(0, 100))
def test_a_message_says_what_it_carries(shape: tuple[int, int, int], form: Form, seed: int) -> None:
    hidden = noise(shape, seed)
    sender = Sender(form, may_compress=False)
    fields, tensor = sender.message(hidden, None)
    back, found = from_message(fields, tensor, shape[0], shape[2])
    assert (found, back.dtype) == (form, torch.float32)
    assert torch.equal(back, there_and_back(hidden, form))
    assert sender.message(back, None) == (fields, tensor)  # whoever passes it on changes nothing
    assert bool(fields) == (form is Form.INT8)


@given(shape=SHAPES, form=st.sampled_from(list(Form)), cut=st.integers(0, 5), seed=st.integers(0, 100))
def test_a_token_is_the_same_beside_any_others(shape: tuple[int, int, int], form: Form, cut: int, seed: int) -> None:
    hidden = noise(shape, seed)
    whole = there_and_back(hidden, form)
    parts = [part for part in (hidden[:, :cut], hidden[:, cut:]) if part.shape[1]]
    assert torch.equal(torch.cat([there_and_back(part, form) for part in parts], dim=1), whole)
    assert torch.equal(there_and_back(hidden.flip(0), form), whole.flip(0))


def test_a_sender_compresses_in_messages_where_that_pays() -> None:
    hidden = torch.zeros(SHAPE)
    for form in Form:
        fields, tensor = Sender(form, may_compress=True).message(hidden, 1e5)
        assert fields == {"codec": CODEC, "form": str(form), "tokens": 256}
        assert tensor.dtype == "u8" and tensor.n_bytes < form.n_bytes(SHAPE)
        assert torch.equal(from_message(fields, tensor, 1, 64)[0], hidden)
        plain, _ = from_message(*Sender(form, may_compress=True).message(hidden, None), 1, 64)
        assert torch.equal(plain, hidden)
        fields, tensor = Sender(form, may_compress=False).message(hidden, 1e5)
        assert "codec" not in fields and tensor.n_bytes == form.n_bytes(SHAPE)


def test_senders_alike_share_an_account() -> None:
    first = Sender(Form.INT8, may_compress=True, measures_error=True)
    second = first.alike(may_compress=False)
    for sender in (first, second):
        sender.message(noise((1, 2, 64)), 1e5)
    assert first.account is second.account
    assert (first.account.summary().tokens, first.account.summary().n_bytes) == (4, 4 * 66)
    assert second.account.relative_error is not None


@given(
    data=st.binary(max_size=300),
    dtype=st.sampled_from(sorted(ITEM_BYTES)),
    form=st.one_of(st.sampled_from(list(Form)), st.text(max_size=9), st.none()),
    tokens=st.one_of(st.integers(-2, 40), st.just(2**20), st.none()),
    codec=st.sampled_from([None, CODEC, "lzma"]),
)
def test_any_message_is_read_or_refused(data: bytes, dtype: str, form: Any, tokens: Any, codec: Any) -> None:
    shape = (len(data) // ITEM_BYTES[dtype],) if dtype == "u8" else (1, len(data) // ITEM_BYTES[dtype] // 4, 4)
    tensor = framing.Tensor(dtype=dtype, shape=shape, data=data[: math.prod(shape) * ITEM_BYTES[dtype]])
    fields = {
        name: value for name, value in (("form", form), ("tokens", tokens), ("codec", codec)) if value is not None
    }
    try:
        back, found = from_message(fields, tensor, 1, 4)
    except (BadInput, RemoteProtocolError):
        return
    assert back.shape[::2] == (1, 4) and back.dtype == torch.float32
    assert found in Form


def test_messages_of_another_shape_are_refused() -> None:
    for shape in ((1, 2, 5), (2, 2, 4), (1, 4), (4,), (), (1, 2, 4, 1)):
        tensor = framing.Tensor(dtype="f32", shape=shape, data=bytes(4 * math.prod(shape)))
        with pytest.raises(BadInput) as caught:
            from_message({}, tensor, 1, 4)
        assert caught.value.code == "bad-shape"
    with pytest.raises(BadInput, match="i64"):
        from_message({}, framing.Tensor(dtype="i64", shape=(1, 1, 4), data=bytes(32)), 1, 4)
