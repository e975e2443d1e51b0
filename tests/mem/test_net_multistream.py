"""Agreeing on a protocol, with peers that do not play by the rules."""

from __future__ import annotations

import itertools
from typing import cast

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from net import errors, multistream
from net.multistream import HEADER, MAX_MESSAGE_BYTES, MAX_PROPOSALS
from net.mux.base import Stream
from net.ping import ping_once
from net.swarm import Connection
from tests.net_helpers import memory_hosts, receive_all, receive_count


def message(text: bytes) -> bytes:
    data = text + b"\n"
    return (bytes([len(data)]) if len(data) < 128 else bytes([len(data) & 127 | 128, len(data) >> 7])) + data


GREETING = message(HEADER.encode())

BROKEN = {
    "not UTF-8": b"\x05\xff\xfe\xfd\xfc\n",
    "no newline": b"\x03abc",
    "empty": b"\0",
    "too long": bytes([(MAX_MESSAGE_BYTES + 1) & 127 | 128, (MAX_MESSAGE_BYTES + 1) >> 7]),
    "length without end": b"\xff" * 10,
    "another protocol": message(b"/multistream/2.0.0"),
    "http": b"GET / HTTP/1.1\r\nHost: " + b"x" * 100,
}


async def agree(proposals: list[str], spoken: set[str]) -> tuple[str, str]:
    near, far = trio.testing.memory_stream_pair()
    answered: list[str] = []

    async with trio.open_nursery() as nursery:

        async def answer() -> None:
            answered.append(await multistream.answer(far, spoken))

        nursery.start_soon(answer)
        proposed = await multistream.propose(near, proposals)
    return proposed, answered[0]


async def test_the_first_proposal_that_both_speak_is_taken() -> None:
    assert await agree(["/a"], {"/a", "/b"}) == ("/a", "/a")
    assert await agree(["/x", "/y", "/b", "/a"], {"/a", "/b"}) == ("/b", "/b")
    long = "/" + "x" * 500
    assert await agree([long], {long}) == (long, long)


async def test_no_common_protocol_says_so() -> None:
    near, far = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:

        async def answer() -> None:
            with pytest.raises(errors.ConnectionLost):
                await multistream.answer(far, {"/a"})

        nursery.start_soon(answer)
        with pytest.raises(errors.ProtocolNotSupported, match="none of /x, /y"):
            await multistream.propose(near, ["/x", "/y"])
        await near.aclose()


async def test_the_listener_answers_na_as_often_as_its_patience_lasts() -> None:
    near, far = trio.testing.memory_stream_pair()
    await near.send_all(GREETING + message(b"/nope") * MAX_PROPOSALS + message(b"/a"))
    with pytest.raises(errors.ProtocolNotSupported, match=str(MAX_PROPOSALS)):
        await multistream.answer(far, {"/a"})
    await far.send_eof()
    assert await receive_all(near) == GREETING + message(b"na") * MAX_PROPOSALS


@pytest.mark.parametrize("wire", BROKEN.values(), ids=list(BROKEN))
@pytest.mark.parametrize("greeted", [False, True])
async def test_broken_messages_are_the_peers_fault(wire: bytes, greeted: bool) -> None:
    for listening in (True, False):
        if listening and greeted and wire == BROKEN["another protocol"]:
            continue  # a proposal like others: na
        near, far = trio.testing.memory_stream_pair()
        await near.send_all((GREETING if greeted else b"") + wire)
        await near.send_eof()
        with pytest.raises(errors.RemoteProtocolError):
            await (multistream.answer(far, {"/a"}) if listening else multistream.propose(far, ["/a"]))


STRANGERS = {
    "a web server": b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" + b"x" * 100,
    "a shell": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a mail server": b"220 mail.example.org ESMTP\r\n",
    "TLS": b"\x15\x03\x01\x00\x02\x02\x46",
    "another version": message(b"/multistream/2.0.0"),
}


@pytest.mark.parametrize("wire", STRANGERS.values(), ids=list(STRANGERS))
async def test_who_does_not_speak_libp2p_is_told_at_once(wire: bytes) -> None:
    """Also a server that says less than its first byte, read as a length, promises, and then waits."""
    near, far = trio.testing.memory_stream_pair()
    await near.send_all(wire)
    with pytest.raises(errors.RemoteProtocolError, match="something other than a libp2p node is there: "):
        await multistream.propose(far, ["/a"])


@settings(deadline=None)
@given(st.binary(max_size=300), st.booleans(), st.booleans())
def test_any_bytes_end_in_one_of_our_errors(wire: bytes, greeted: bool, listening: bool) -> None:
    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        await near.send_all((GREETING if greeted else b"") + wire)
        await near.send_eof()
        with pytest.raises((errors.RemoteProtocolError, errors.ConnectionLost, errors.ProtocolNotSupported)):
            await (multistream.answer(far, {"/never"}) if listening else multistream.propose(far, ["/never"]))

    trio.run(main)


@pytest.mark.parametrize("wire", BROKEN.values(), ids=list(BROKEN))
async def test_a_broken_stream_costs_itself_alone(wire: bytes, autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as (one, two):
        connection = await one.connect(two.peer_id, two.addresses)
        stream = connection.mux.open_stream()
        await stream.send_all(wire)
        await stream.send_eof()
        with pytest.raises(errors.StreamReset):
            await receive_all(stream)
        assert await ping_once(one, two.peer_id) >= 0
        assert one.swarm.connection(two.peer_id) is connection


async def test_a_stream_that_agrees_on_nothing_is_reset_in_time(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as (one, two):
        connection = await one.connect(two.peer_id, two.addresses)
        stream = connection.mux.open_stream()
        await stream.send_all(GREETING[:5])
        began = trio.current_time()
        with pytest.raises(errors.StreamReset):
            await receive_all(stream)
        assert trio.current_time() - began == pytest.approx(two.limits.negotiate_s, abs=0.1)


# Lazy negotiation


async def lazily(wire: bytes, cuts: list[int], *, max_bytes: int | None = None) -> bytes:
    """What is received where the other side says ``wire``, in parts."""
    near, far = trio.testing.memory_stream_pair()
    stream = await multistream.LazyStream.propose(cast(Stream, near), "/a/1")
    await stream.send_all(b"behind")
    parts = [wire[start:stop] for start, stop in itertools.pairwise([0, *sorted(cuts), len(wire)])]
    received = b""
    async with trio.open_nursery() as nursery:

        async def say() -> None:
            for part in parts:
                if part:
                    await far.send_all(part)
            await far.send_eof()

        nursery.start_soon(say)
        while data := await stream.receive_some(max_bytes):
            received += data
        nursery.cancel_scope.cancel()
    expected = GREETING + message(b"/a/1") + b"behind"
    assert await receive_count(far, len(expected)) == expected
    return received


@settings(deadline=None)
@given(data=st.binary(max_size=40), cuts=st.lists(st.integers(0, 80), max_size=6), count=st.none() | st.integers(1, 9))
def test_lazily_proposed_streams_begin_where_the_answer_ends(data: bytes, cuts: list[int], count: int | None) -> None:
    wire = GREETING + message(b"/a/1") + data
    cuts = [min(cut, len(wire)) for cut in cuts]

    async def check() -> None:
        assert await lazily(wire, cuts, max_bytes=count) == data

    trio.run(check)


@pytest.mark.parametrize(
    ("wire", "error"),
    [
        (GREETING + message(b"na"), errors.ProtocolNotSupported),
        (GREETING + message(b"/a/2"), errors.RemoteProtocolError),
        (b"HTTP/1.1 400 Bad Request\r\n", errors.RemoteProtocolError),
        (GREETING[:5], errors.ConnectionLost),
        (b"", errors.ConnectionLost),
    ],
)
async def test_who_does_not_agree_is_found_out_by_who_reads(wire: bytes, error: type[Exception]) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await lazily(wire, [3])
    assert [type(each) for each in caught.value.exceptions] == [error]


async def test_nothing_is_lost_when_waiting_for_agreement_is_cancelled(autojump_clock: MockClock) -> None:
    near, far = trio.testing.memory_stream_pair()
    stream = await multistream.LazyStream.propose(cast(Stream, near), "/a/1")
    await far.send_all(GREETING[:7])
    with trio.move_on_after(1):
        await stream.receive_some()
    await far.send_all(GREETING[7:] + message(b"/a/1") + b"first")
    await stream.agree()
    assert await stream.receive_some(3) == b"fir"
    assert await stream.receive_some() == b"st"


async def test_lazily_opened_streams_of_hosts() -> None:
    async with memory_hosts(2) as (one, other):
        said: list[bytes] = []

        async def handler(_: Connection, stream: Stream) -> None:
            said.append(await receive_all(stream))
            await stream.send_all(b"heard")

        other.handle("/echo/1", handler)
        connection = await one.connect(other.peer_id, other.addresses)
        stream = await one.open_lazily_over(connection, "/echo/1")
        await stream.send_all(b"hello")
        await stream.send_eof()
        assert await receive_all(stream) == b"heard"
        await stream.aclose()
        assert said == [b"hello"]
        unknown = await one.open_lazily_over(connection, "/unknown/1")
        with pytest.raises(errors.ProtocolNotSupported, match="/unknown/1"):
            await unknown.agree()
        unknown.reset()
