"""msgpack and frames from strangers: what is refused, and that the rest comes through whole."""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from net.errors import LocalProtocolError, RemoteProtocolError
from net.rpc import framing, packing
from net.rpc.framing import ITEM_BYTES, MAX_FRAME_BYTES, Decoder, Message, Tensor, encode

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
HEADERS = st.dictionaries(st.text(max_size=8).filter(lambda name: name != "t"), VALUES, max_size=6)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    count = ITEM_BYTES[dtype]
    for size in shape:
        count *= size
    return Tensor(dtype=dtype, shape=shape, data=draw(st.binary(min_size=count, max_size=count)))


# packing


@given(HEADERS)
def test_maps_round_trip(fields: dict[str, Any]) -> None:
    assert packing.unpack(packing.pack(fields)) == fields


@given(st.binary(max_size=300))
def test_any_bytes_are_a_map_or_the_peers_fault(data: bytes) -> None:
    try:
        value = packing.unpack(data)
    except RemoteProtocolError:
        return
    assert all(isinstance(key, str) for key in value)


def test_large_bounded_bombs_are_the_peers_fault() -> None:
    for bomb in (
        b"\x81\xa1x\xdd" + struct.pack(">I", 2**32 - 1),  # a list that claims 4 G items
        b"\xdf" + struct.pack(">I", 2**32 - 1),  # a map that does
        b"\x81\xa1x\xdc" + struct.pack(">H", 1025) + bytes(1025),  # one item too many
        b"\x81\xa1x\xc6" + struct.pack(">I", 2**32 - 1),  # bytes that claim 4 GiB
        b"\x81\xa1x" + b"\x91" * 60_000 + b"\xc0",  # deep
        b"\x81\xa1x\xc7\x01\x05x",  # an extension type
        b"\x81\xa1x\xd6\xff\0\0\0\0",  # a timestamp
        packing.pack({str(n): n for n in range(65)}),
    ):
        with pytest.raises(RemoteProtocolError):
            packing.unpack(bomb)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        packing.pack({"a": 1}) + b"\xc0",
        packing.pack({"a": 1})[:-1],
        msgpack.packb([1]),
        msgpack.packb(1),
        msgpack.packb({1: 2}),
        msgpack.packb({b"a": 1}),
        b"\x81\xa2\xff\xfe\x01",  # a key that is not UTF-8
        packing.pack({"x": bytes(packing.MAX_BYTES)}),
    ],
)
def test_anything_but_one_whole_map_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        packing.unpack(data)


def test_many_items_within_the_bounds_are_read() -> None:
    fields = {"x": list(range(1024)), "y": {str(n): n for n in range(64)}}
    assert packing.unpack(packing.pack(fields)) == fields


@pytest.mark.parametrize(
    ("value", "kind"),
    [(None, int), (True, int), (1, bool), ("x", bytes), (b"x", str), (1.0, int), ({}, list)],
)
def test_a_field_of_another_type_is_refused(value: Any, kind: type) -> None:
    with pytest.raises(RemoteProtocolError, match="'name'"):
        packing.field({"name": value}, "name", kind)


def test_fields_have_bounds() -> None:
    assert packing.integer({"n": 3}, "n", 3, 3) == 3
    assert packing.number({"n": 3}, "n", 0, 5) == 3.0
    assert packing.items({"n": ["a", "bc"]}, "n", str, max_items=2, max_length=2) == ["a", "bc"]
    for broken in (2, 4, True, "3", None):
        with pytest.raises(RemoteProtocolError):
            packing.integer({"n": broken}, "n", 3, 3)
    for number in (-0.1, 5.1, float("nan"), float("inf"), True, "1"):
        with pytest.raises(RemoteProtocolError):
            packing.number({"n": number}, "n", 0, 5)
    for items in (["a"] * 3, ["abc"], [1], "ab"):
        with pytest.raises(RemoteProtocolError):
            packing.items({"n": items}, "n", str, max_items=2, max_length=2)


# framing


@settings(deadline=None)
@given(st.lists(st.tuples(HEADERS, st.lists(tensors(), max_size=3)), max_size=3), st.data())
def test_messages_round_trip_split_anywhere(
    content: list[tuple[dict[str, Any], list[Tensor]]], data: st.DataObject
) -> None:
    wire = b"".join(bytes(piece) for header, some in content for piece in encode(Message(header=header, tensors=some)))
    decoder = Decoder()
    messages: list[Message] = []
    position = 0
    while position < len(wire):
        count = data.draw(st.integers(1, len(wire) - position))
        messages += decoder.receive_data(wire[position : position + count])
        position += count
    assert not decoder.is_inside_message
    assert [message.header for message in messages] == [header for header, _ in content]
    for message, (_, some) in zip(messages, content, strict=True):
        assert [(t.dtype, t.shape, bytes(t.data)) for t in message.tensors] == [
            (t.dtype, t.shape, t.data) for t in some
        ]


@given(st.binary(max_size=200))
def test_any_frame_is_a_message_or_the_peers_fault(body: bytes) -> None:
    try:
        Decoder().receive_data(struct.pack(">I", len(body)) + body)
    except RemoteProtocolError:
        pass


def frame(fields: object, body: bytes = b"") -> bytes:
    header = bytes(msgpack.packb(fields))
    content = struct.pack(">H", len(header)) + header + body
    return struct.pack(">I", len(content)) + content


@pytest.mark.parametrize(
    "wire",
    [
        struct.pack(">I", 0),
        struct.pack(">I", 2) + b"\0\0",
        struct.pack(">I", MAX_FRAME_BYTES + 1),  # refused before its first byte comes
        struct.pack(">I", 2**32 - 1),
        struct.pack(">IH", 3, 2) + b"\x80",  # a header longer than its frame
        frame({}, b"trailing"),
        frame({"t": [["u8", [4]]]}, b"abc"),
        frame({"t": [["u8", [4]]]}, b"abcde"),
        frame({"t": [["u8", [-1]]]}),
        frame({"t": [["u8", [2**63]]]}),
        frame({"t": [["u8", [MAX_FRAME_BYTES] * 4]]}),
        frame({"t": [["u8", [1] * 5]]}, b"x"),
        frame({"t": [["u8", [True]]]}, b"x"),
        frame({"t": [["u8", [1.0]]]}, b"x"),
        frame({"t": [["f64", [1]]]}, bytes(8)),
        frame({"t": [["u8"]]}),
        frame({"t": [["u8", [0]]] * 9}),
        frame({"t": 5}),
        frame({"t": None}),
        frame({"t": "abc"}),
        frame({"t": {"u8": [1]}}),
        frame([1, 2]),
    ],
)
def test_frames_that_contradict_themselves_are_the_peers_fault(wire: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        Decoder().receive_data(wire)


def test_the_largest_frame_goes_and_one_byte_more_does_not() -> None:
    def message(count: int) -> Message:
        return Message(header={}, tensors=[Tensor(dtype="u8", shape=(count,), data=bytes(count))])

    overhead = sum(map(len, encode(message(MAX_FRAME_BYTES // 2)))) - MAX_FRAME_BYTES // 2
    largest = MAX_FRAME_BYTES + 4 - overhead
    (received,) = Decoder().receive_data(b"".join(encode(message(largest))))
    assert received.tensors[0].shape == (largest,)
    with pytest.raises(LocalProtocolError):
        encode(message(largest + 1))


@pytest.mark.parametrize(
    "message",
    [
        Message(header={"x": bytes(framing.MAX_HEADER_BYTES)}),
        Message(header={}, tensors=[Tensor(dtype="f32", shape=(2,), data=bytes(7))]),
        Message(header={}, tensors=[Tensor(dtype="u8", shape=(1,), data=b"x")] * 9),
    ],
)
def test_what_the_other_side_would_refuse_is_not_sent(message: Message) -> None:
    with pytest.raises(LocalProtocolError):
        encode(message)
