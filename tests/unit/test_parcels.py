"""Parcels: what is cut comes together again, whatever goes between; strangers cannot make us keep what they like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from net.errors import LocalProtocolError, RemoteProtocolError
from net.rpc.framing import Decoder, Message, Tensor, encode
from net.rpc.parcels import (
    FIRST_BYTES_S,
    LEAD_S,
    MIN_BYTES_PER_S,
    PARCEL_S,
    PIECE_BYTES,
    Assembler,
    Interleaver,
    NoRoom,
    Outgoing,
    cut,
    tensor_bytes,
)

PIECE = 16
LIMIT = 4096


def tensor(*shape: int, dtype: str = "u8", fill: int = 7) -> Tensor:
    size = {"u8": 1, "f32": 4, "bf16": 2}[dtype] * math.prod(shape)
    return Tensor(dtype=dtype, shape=shape, data=bytes((fill + each) % 256 for each in range(size)))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(["u8", "f32", "bf16"]))
    shape = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    return tensor(*shape, dtype=dtype, fill=draw(st.integers(0, 255)))


MESSAGES = st.lists(st.lists(tensors(), max_size=3), max_size=5)


def assembler(max_parcels: int = 8, limit: int = LIMIT, **options: Any) -> Assembler:
    return Assembler(max_parcels=max_parcels, limit=lambda _: limit, **options)


def on_the_wire(message: Message) -> Message:
    [arrived] = Decoder().receive_data(b"".join(bytes(piece) for piece in encode(message)))
    return arrived


def plain(message: Message) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], bytes]]]:
    return dict(message.header), [(each.dtype, tuple(each.shape), bytes(each.data)) for each in message.tensors]


def interleaved(messages: Sequence[Message]) -> list[Message]:
    interleaver, sent = Interleaver(), []
    for message in messages:
        interleaver.add(Outgoing(cut(message, PIECE), lambda: None))
    while (message_ := interleaver.next_message()) is not None:
        sent.append(message_)
    return sent


@given(MESSAGES)
def test_what_is_cut_comes_together(many: list[list[Tensor]]) -> None:
    messages = [Message(header={"id": number, "x": number}, tensors=each) for number, each in enumerate(many, 1)]
    held = 0

    def take(count: int) -> bool:
        nonlocal held
        held += count
        return True

    whole = assembler(take=take)
    arrived = [whole.receive(on_the_wire(message), 0.0) for message in interleaved(messages)]
    given_ = [message for message in arrived if isinstance(message, Message)]
    assert sorted(map(plain, given_), key=lambda each: each[0]["id"]) == [plain(message) for message in messages]
    assert held == sum(map(tensor_bytes, messages))
    assert not whole.is_inside
    assert whole.deadline == math.inf


def test_long_ones_do_not_keep_short_ones_waiting() -> None:
    long, other = (Message(header={"id": number}, tensors=[tensor(10 * PIECE)]) for number in (1, 2))
    short = Message(header={"id": 3})
    sent = [message.header.get("piece", message.header.get("id")) for message in interleaved([long, other, short])]
    assert sent == [1, 2, 3, *[1, 2] * 10]


def test_whoever_hands_them_over_is_told_when_the_last_one_has_been_sent() -> None:
    interleaver, sent = Interleaver(), list[int]()
    for number, count in ((1, 2), (2, 1)):
        message = Message(header={"id": number}, tensors=[tensor(count * PIECE + 1)])
        interleaver.add(Outgoing(cut(message, PIECE), lambda number=number: sent.append(number)))  # type: ignore[misc]
    order = []
    while interleaver.next_message() is not None:
        order.append(list(sent))
        interleaver.sent()
    assert order == [[], [], [], [], [], [], [2]]  # two beginnings, then pieces in turn
    assert sent == [2, 1]


def test_what_is_removed_is_sent_no_further() -> None:
    interleaver = Interleaver()
    outgoing = Outgoing(cut(Message(header={"id": 1}, tensors=[tensor(3 * PIECE)]), PIECE), lambda: None)
    interleaver.add(outgoing)
    assert interleaver.next_message() is not None
    interleaver.remove(outgoing)
    interleaver.remove(outgoing)
    assert interleaver.next_message() is None


def test_pieces_are_what_goes_on_the_wire_at_once() -> None:
    data = bytes(3 * PIECE_BYTES + 5)
    message = Message(header={"id": 1}, tensors=[Tensor(dtype="u8", shape=(len(data),), data=data)])
    sizes = [tensor_bytes(each) for each in cut(message)]
    assert sizes == [0, PIECE_BYTES, PIECE_BYTES, PIECE_BYTES, 5]


@pytest.mark.parametrize("header", [{}, {"id": 0}, {"id": True}, {"id": "1"}, {"id": 2**53 + 1}, {"id": 1, "p": []}])
def test_what_cannot_be_a_parcel_is_our_own_fault(header: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError):
        list(cut(Message(header=header, tensors=[tensor(2 * PIECE)]), PIECE))


# From strangers


def begin(number: object, *specs: object) -> Message:
    return Message(header={"id": number, "p": list(specs)})


def piece(number: object, at: object, *given_: Tensor) -> Message:
    return Message(header={"piece": number, "at": at}, tensors=given_)


U8 = ["u8", [8]]
EIGHT, NINE = tensor(8), tensor(9)


@pytest.mark.parametrize(
    "messages",
    [
        [piece(1, 0, EIGHT)],  # has not begun
        [begin(1, U8), begin(1, U8)],
        [begin(1, U8), begin(2, U8), begin(3, U8)],  # too many
        [begin(1, U8), piece(1, 1, EIGHT)],
        [begin(1, U8), piece(1, 0, NINE)],
        [begin(1, U8), piece(1, 0, EIGHT), piece(1, 8, EIGHT)],
        [begin(1, U8), piece(1, 0, tensor(0))],
        [begin(1, U8), piece(1, 0)],
        [begin(1, U8), piece(1, 0, EIGHT, EIGHT)],
        [begin(1, U8), piece(1, 0, tensor(2, dtype="f32"))],
        [begin(1, U8), piece(1, "0", EIGHT)],
        [begin(1, U8), piece("1", 0, EIGHT)],
        [begin(0, U8)],
        [begin("1", U8)],
        [begin(1)],
        [begin(1, ["u8", [0]])],
        [begin(1, ["u8", [8, 2**39]])],
        [begin(1, *[["u8", [1000]]] * 5)],  # more than the limit, together
        [begin(1, ["u8", [2**50]])],
        [begin(1, ["u8", [-1]])],
        [begin(1, ["u8", [1, 1, 1, 1, 1]])],
        [begin(1, ["i1", [8]])],
        [begin(1, *[U8] * 9)],
        [Message(header={"id": 1, "p": 3})],
        [Message(header={"id": 1, "p": [U8]}, tensors=[EIGHT])],
    ],
)
def test_rules_that_are_broken_are_the_senders_fault(messages: list[Message]) -> None:
    whole = assembler(max_parcels=2)
    with pytest.raises(RemoteProtocolError):
        for message in messages:
            whole.receive(message, 0.0)


STRANGE = st.one_of(
    st.builds(begin, st.integers(0, 3), st.tuples(st.just("u8"), st.lists(st.integers(0, 40), max_size=2)).map(list)),
    st.builds(piece, st.integers(0, 3), st.sampled_from([0, 8, 16, 24]), st.integers(0, 40).map(tensor)),
    st.builds(lambda size: Message(header={"id": 1}, tensors=[tensor(size)]), st.integers(0, 40)),
    st.integers(0, 3),  # given up
)


@given(st.lists(STRANGE, max_size=40), st.integers(0, 100))
def test_no_more_is_held_than_there_is_room_for_and_all_of_it_is_accounted_for(
    messages: list[Message | int], room: int
) -> None:
    held = given_out = 0

    def take(count: int) -> bool:
        nonlocal held
        if held + count > room:
            return False
        held += count
        return True

    def give_back(count: int) -> None:
        nonlocal held
        held -= count

    whole = assembler(max_parcels=2, limit=30, take=take, give_back=give_back)
    for message in messages:
        if isinstance(message, int):
            whole.drop(message)
            continue
        try:
            result = whole.receive(message, 0.0)
        except RemoteProtocolError:
            continue  # whoever reads would end the stream
        if isinstance(result, Message):
            given_out += tensor_bytes(result)
    assert 0 <= held <= room
    for number in range(4):
        whole.drop(number)
    assert held == given_out
    assert not whole.is_inside


def test_what_there_is_no_room_for_is_passed_over_and_the_rest_goes_on() -> None:
    held = 0

    def take(count: int) -> bool:
        nonlocal held
        fits = held + count <= 12
        held += count if fits else 0
        return fits

    def give_back(count: int) -> None:
        nonlocal held
        held -= count

    whole = assembler(take=take, give_back=give_back)
    for message in (begin(1, ["u8", [16]]), begin(2, ["u8", [4]]), piece(1, 0, EIGHT)):
        assert whole.receive(message, 0.0) is None
    assert whole.is_coming(1)
    refused = whole.receive(piece(1, 8, tensor(6)), 0.0)
    assert isinstance(refused, NoRoom)
    assert refused.header == {"id": 1}
    assert not whole.is_coming(1)
    assert held == 0
    assert whole.receive(piece(1, 14, tensor(2)), 0.0) is None  # its end
    arrived = whole.receive(piece(2, 0, tensor(4)), 0.0)
    assert isinstance(arrived, Message)
    assert isinstance(whole.receive(Message(header={"id": 3}, tensors=[NINE]), 0.0), NoRoom)


def test_whoever_begins_one_must_go_on_at_a_decent_pace() -> None:
    whole = assembler()
    whole.receive(begin(1, ["u8", [3000]]), 10.0)
    assert whole.deadline == 10 + FIRST_BYTES_S
    whole.receive(piece(1, 0, tensor(2048)), 12.0)
    assert whole.deadline == 10 + FIRST_BYTES_S + 2048 / MIN_BYTES_PER_S
    whole.postpone(30.0)  # we did not read
    assert whole.deadline == 40 + FIRST_BYTES_S + 2048 / MIN_BYTES_PER_S
    whole.receive(begin(2, U8), 44.0)
    assert whole.deadline == 40 + FIRST_BYTES_S + 2048 / MIN_BYTES_PER_S
    whole.drop(1)
    assert whole.deadline == 44 + FIRST_BYTES_S


def test_whoever_was_quick_may_not_rest_for_ever() -> None:
    much = 2000 * MIN_BYTES_PER_S
    whole = assembler(limit=3 * much)
    whole.receive(begin(1, ["u8", [3 * much]]), 0.0)
    whole.receive(piece(1, 0, tensor(much)), 1.0)
    assert whole.deadline == 1 + LEAD_S
    whole.receive(piece(1, much, tensor(1)), LEAD_S)  # next to nothing
    assert whole.deadline == 1 + LEAD_S + 1 / MIN_BYTES_PER_S
    whole.receive(piece(1, much + 1, tensor(much)), PARCEL_S - 1)
    assert whole.deadline == PARCEL_S
