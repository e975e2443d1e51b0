"""Calls over a stream: answers, refusals, deadlines, and what ends a lane."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from net import errors
from net.mux.base import Stream
from net.rpc import lane
from net.rpc.framing import Message, Tensor, encode
from net.rpc.lane import Lane, Method
from tests.net_helpers import mux_pair, receive_count, seeded

SERVER, CLIENT = seeded(1).peer_id, seeded(2).peer_id


async def add(request: Message) -> Message:
    return Message(header={"sum": request.header["a"] + request.header["b"]}, tensors=request.tensors)


async def busy(_: Message) -> Message:
    raise errors.RpcError("busy", "come back later", 2.5)


async def confused(_: Message) -> Message:
    raise errors.RemoteProtocolError("'x' is missing")


async def buggy(_: Message) -> Message:
    raise ZeroDivisionError("secret detail")


async def too_large(_: Message) -> Message:
    return Message(header={"x": bytes(100_000)})


async def unpackable(_: Message) -> Message:
    return Message(header={"x": object()})


async def hang(_: Message) -> Message:
    await trio.sleep_forever()
    raise AssertionError


METHODS: dict[str, Method] = {
    "add": add,
    "busy": busy,
    "confused": confused,
    "buggy": buggy,
    "too_large": too_large,
    "unpackable": unpackable,
    "hang": hang,
}


class Server:
    """What ``lane.serve`` made of each stream."""

    def __init__(self) -> None:
        self.ended: list[errors.NetError | None] = []

    async def __call__(self, stream: Stream) -> None:
        try:
            await lane.serve(stream, CLIENT, METHODS, idle_s=60)
        except errors.NetError as error:
            self.ended.append(error)
            stream.reset()
        else:
            self.ended.append(None)
            await stream.aclose()


@asynccontextmanager
async def calling(
    server: Callable[[Stream], Awaitable[None]] | None = None,
) -> AsyncIterator[tuple[Lane, Stream]]:
    async with mux_pair(server or Server()) as (client, _):
        stream = client.open_stream()
        async with Lane(stream, SERVER) as calls:
            yield calls, stream


async def still_good(calls: Lane) -> None:
    assert (await calls.call("add", {"a": 1, "b": 2}, timeout_s=5)).header == {"sum": 3}


async def test_calls_are_answered_in_order(autojump_clock: MockClock) -> None:
    async with calling() as (calls, _):
        tensor = Tensor(dtype="f32", shape=(2, 300_000), data=bytes(2_400_000))
        for number in range(3):
            request = Message(header={"a": number, "b": 1}, tensors=[tensor])
            answer = await calls.call("add", request, timeout_s=5)
            assert answer.header == {"sum": number + 1}
            assert [(t.dtype, t.shape, bytes(t.data)) for t in answer.tensors] == [("f32", (2, 300_000), tensor.data)]


async def test_concurrent_calls_wait_for_one_another(autojump_clock: MockClock) -> None:
    async with calling() as (calls, _):
        sums: list[int] = []

        async def one(number: int) -> None:
            sums.append((await calls.call("add", {"a": number, "b": 0}, timeout_s=5)).header["sum"])

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(one, number)
        assert sorted(sums) == list(range(20))


@pytest.mark.parametrize(
    ("method", "code", "retry_after_s"),
    [
        ("busy", "busy", 2.5),
        ("confused", "bad-input", None),
        ("nothing", "unknown-method", None),
        ("buggy", "internal", None),
        ("too_large", "internal", None),
        ("unpackable", "internal", None),
    ],
)
async def test_a_refusal_keeps_the_lane(
    method: str, code: str, retry_after_s: float | None, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with calling() as (calls, _):
        with caplog.at_level(logging.ERROR), pytest.raises(errors.RpcError) as caught:
            await calls.call(method, {}, timeout_s=5)
        assert (caught.value.code, caught.value.retry_after_s) == (code, retry_after_s)
        assert "secret" not in str(caught.value)
        assert bool(caplog.records) is (code == "internal")  # a bug of ours is loud, nothing else is
        await still_good(calls)


async def test_a_call_that_cannot_be_sent_keeps_the_lane(autojump_clock: MockClock) -> None:
    async with calling() as (calls, _):
        with pytest.raises(errors.LocalProtocolError):
            await calls.call("add", {"x": bytes(100_000)}, timeout_s=5)
        await still_good(calls)


async def test_no_answer_in_time_names_the_peer_and_ends_the_lane(autojump_clock: MockClock) -> None:
    async with calling() as (calls, _):
        began = trio.current_time()
        with pytest.raises(errors.PeerFailed, match="in 3 s") as caught:
            await calls.call("hang", {}, timeout_s=3)
        assert trio.current_time() - began == pytest.approx(3)
        assert caught.value.peer_id == SERVER
        with pytest.raises(errors.PeerFailed, match="the lane is over"):
            await calls.call("add", {"a": 1, "b": 2}, timeout_s=3)


async def test_a_cancelled_call_ends_the_lane_on_both_sides(autojump_clock: MockClock) -> None:
    server = Server()
    async with calling(server) as (calls, _):
        with trio.move_on_after(1) as scope:
            await calls.call("hang", {}, timeout_s=5)
        assert scope.cancelled_caught
        with pytest.raises(errors.PeerFailed, match="broken off"):
            await calls.call("add", {"a": 1, "b": 2}, timeout_s=5)


async def test_cancelled_before_its_turn_a_call_costs_nothing(autojump_clock: MockClock) -> None:
    async with calling() as (calls, _), trio.open_nursery() as nursery:

        async def slow() -> None:
            with pytest.raises(errors.PeerFailed):
                await calls.call("hang", {}, timeout_s=5)

        nursery.start_soon(slow)
        await trio.testing.wait_all_tasks_blocked()
        assert calls.is_busy
        with trio.move_on_after(1) as scope:
            await calls.call("add", {"a": 1, "b": 2}, timeout_s=5)
        assert scope.cancelled_caught
        assert calls._broken is not None and "broken off" in str(calls._broken)  # the first call's mark, not ours


async def answering(stream: Stream, wire: bytes) -> None:
    await stream.receive_some()
    await stream.send_all(wire)
    await stream.aclose()


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (b"", "ended the lane"),
        (b"\0\0", "ended inside a message"),
        (b"\xff\xff\xff\xff", "at most"),
        (b"".join(encode(Message(header={"e": 5}))), "without a readable reason"),
        (b"".join(encode(Message(header={"e": "busy", "retry_after_s": 1e9}))), "without a readable reason"),
        (b"".join(encode(Message(header={"e": "busy", "retry_after_s": float("nan")}))), "without a readable reason"),
        (b"\0\0\0\x09\0\x04\x81\xa1t\x05abc", "tensors"),
    ],
)
async def test_whatever_else_comes_back_is_the_peers_failure(
    wire: bytes, reason: str, autojump_clock: MockClock
) -> None:
    async def server(stream: Stream) -> None:
        await answering(stream, wire)

    async with calling(server) as (calls, _):
        with pytest.raises(errors.PeerFailed, match=reason) as caught:
            await calls.call("add", {"a": 1, "b": 2}, timeout_s=5)
        assert caught.value.peer_id == SERVER


async def test_a_refusals_text_is_made_fit_to_print(autojump_clock: MockClock) -> None:
    fields: dict[str, Any] = {"e": "busy", "why": "\x1b[31mred\n" + "x" * 1000}

    async def server(stream: Stream) -> None:
        await answering(stream, b"".join(encode(Message(header=fields))))

    async with calling(server) as (calls, _):
        with pytest.raises(errors.RpcError) as caught:
            await calls.call("add", {}, timeout_s=5)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) <= 500


async def test_a_reset_mid_call_is_the_peers_failure(autojump_clock: MockClock) -> None:
    async def server(stream: Stream) -> None:
        await stream.receive_some()
        stream.reset()

    async with calling(server) as (calls, _):
        with pytest.raises(errors.PeerFailed, match="reset by the other side"):
            await calls.call("add", {"a": 1, "b": 2}, timeout_s=5)


async def test_a_closed_lane_ends_its_server(autojump_clock: MockClock) -> None:
    server = Server()
    async with mux_pair(server) as (client, _):
        async with Lane(client.open_stream(), SERVER) as calls:
            await still_good(calls)
        await trio.testing.wait_all_tasks_blocked()
        assert server.ended == [None]
        with pytest.raises(errors.PeerFailed, match="closed here"):
            await calls.call("add", {"a": 1, "b": 2}, timeout_s=5)


async def test_an_idle_lane_is_ended_by_its_server(autojump_clock: MockClock) -> None:
    server = Server()
    async with calling(server) as (calls, _):
        await still_good(calls)
        await trio.sleep(59)
        await still_good(calls)
        await trio.sleep(61)
        assert server.ended == [None]
        with pytest.raises(errors.PeerFailed, match="ended the lane"):
            await calls.call("add", {"a": 1, "b": 2}, timeout_s=5)


async def test_a_slow_sender_is_cut_off(autojump_clock: MockClock) -> None:
    server = Server()
    async with mux_pair(server) as (client, _):
        stream = client.open_stream()
        wire = b"".join(encode(Message(header={"m": "add", "a": 1, "b": 2})))
        began = trio.current_time()
        with pytest.raises(errors.StreamReset):
            for byte in wire:
                await stream.send_all(bytes([byte]))
                await trio.sleep(1)
        assert trio.current_time() - began <= 7
        (ended,) = server.ended
        assert isinstance(ended, errors.RemoteProtocolError)
        assert "slower" in str(ended)


async def test_a_sender_at_a_decent_pace_is_not_cut_off(autojump_clock: MockClock) -> None:
    async with mux_pair(Server()) as (client, _):
        stream = client.open_stream()
        tensor = Tensor(dtype="u8", shape=(40_000,), data=bytes(40_000))
        wire = b"".join(encode(Message(header={"m": "add", "a": 1, "b": 2}, tensors=[tensor])))
        for start in range(0, len(wire), 2000):
            await stream.send_all(wire[start : start + 2000])
            await trio.sleep(1.5)
        await receive_count(stream, 40_000)


async def test_a_client_that_never_reads_its_answers_is_cut_off(autojump_clock: MockClock) -> None:
    server = Server()
    async with mux_pair(server) as (client, _):
        stream = client.open_stream()
        tensor = Tensor(dtype="u8", shape=(1_000_000,), data=bytes(1_000_000))
        for piece in encode(Message(header={"m": "add", "a": 1, "b": 2}, tensors=[tensor])):
            await stream.send_all(piece)
        await trio.sleep(2000)
        (ended,) = server.ended
        assert "read slower" in str(ended)


async def test_the_end_inside_a_request_is_a_broken_stream(autojump_clock: MockClock) -> None:
    server = Server()
    async with mux_pair(server) as (client, _):
        stream = client.open_stream()
        await stream.send_all(b"\0\0\0")
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        (ended,) = server.ended
        assert isinstance(ended, errors.ConnectionLost)
