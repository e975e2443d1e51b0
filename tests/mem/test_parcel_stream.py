"""Parcels over a stream: who is too slow, who is kept waiting, and what is left of those that were given up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from net.errors import ConnectionLost, LocalProtocolError, RemoteProtocolError
from net.mux.base import Stream
from net.nurseries import open_service_nursery
from net.rpc.framing import Message, Tensor, encode
from net.rpc.messages import MessageStream
from net.rpc.parcel_stream import ParcelStream
from net.rpc.parcels import PIECE_BYTES, NoRoom
from tests.net_helpers import mux_pair

LARGE = 3_000_000


def parcel(number: int, size: int) -> Message:
    return Message(header={"id": number}, tensors=[Tensor(dtype="u8", shape=(size,), data=bytes(size))])


def piece(number: int, at: int, size: int) -> Message:
    tensor = Tensor(dtype="u8", shape=(size,), data=bytes(size))
    return Message(header={"piece": number, "at": at}, tensors=[tensor])


def parcels_of(stream: Stream) -> ParcelStream:
    return ParcelStream(stream, max_parcels=4, limit=lambda _: 1 << 30)


@asynccontextmanager
async def streams(far: Callable[[Stream], Awaitable[None]]) -> AsyncIterator[Stream]:
    """A stream whose other end somebody has."""
    async with mux_pair(far) as (client, _):
        yield client.open_stream()


async def test_parcels_alternate_and_small_ones_overtake(autojump_clock: MockClock) -> None:
    async def far(stream: Stream) -> None:
        parcels = parcels_of(stream)
        async with open_service_nursery() as nursery:
            nursery.start_soon(parcels.run)
            order = list[int]()

            async def send(number: int, size: int) -> None:
                await parcels.send(parcel(number, size))
                order.append(number)

            async with trio.open_nursery() as senders:
                for number, size in ((1, LARGE), (2, LARGE // 2), (3, 10)):
                    senders.start_soon(send, number, size)
            assert order == [3, 2, 1]
            await parcels.receive()
            nursery.cancel_scope.cancel()

    async with streams(far) as stream:
        parcels = parcels_of(stream)
        await MessageStream(stream).send(encode(Message(header={})))
        arrived = [await parcels.receive() for _ in range(3)]
        assert [each.header["id"] for each in arrived if isinstance(each, Message)] == [3, 2, 1]


async def test_a_parcel_that_stops_is_cut_off(autojump_clock: MockClock) -> None:
    async def far(stream: Stream) -> None:
        messages = MessageStream(stream)
        await messages.send(encode(Message(header={"id": 1, "p": [["u8", [4096]]]})))
        await messages.send(encode(piece(1, 0, 2048)))
        while True:  # it has other things to say
            await messages.send(encode(Message(header={"id": 2})))
            await trio.sleep(1)

    async with streams(far) as stream:
        await MessageStream(stream).send(encode(Message(header={})))
        parcels, began = parcels_of(stream), trio.current_time()
        with pytest.raises(RemoteProtocolError, match="too slowly"):
            while True:
                await parcels.receive()
        assert trio.current_time() - began == pytest.approx(5 + 2, abs=0.1)


async def test_time_in_which_nobody_reads_is_not_held_against_the_sender(autojump_clock: MockClock) -> None:
    async def far(stream: Stream) -> None:
        messages = MessageStream(stream)
        await messages.send(encode(Message(header={"id": 1, "p": [["u8", [8]]]})))
        await messages.send(encode(Message(header={"id": 2})))
        await messages.receive()
        await trio.sleep(4)
        await messages.send(encode(piece(1, 0, 8)))
        await messages.receive()

    async with streams(far) as stream:
        messages, parcels = MessageStream(stream), parcels_of(stream)
        await messages.send(encode(Message(header={})))
        assert isinstance(await parcels.receive(), Message)
        await trio.sleep(60)
        await messages.send(encode(Message(header={})))
        whole = await parcels.receive()
        assert isinstance(whole, Message)
        assert whole.header == {"id": 1}


async def test_a_stream_that_ends_inside_a_parcel_was_cut(autojump_clock: MockClock) -> None:
    async def far(stream: Stream) -> None:
        await MessageStream(stream).send(encode(Message(header={"id": 1, "p": [["u8", [8]]]})))
        await stream.aclose()

    async with streams(far) as stream:
        await MessageStream(stream).send(encode(Message(header={})))
        with pytest.raises(ConnectionLost, match="inside a parcel"):
            await parcels_of(stream).receive()


async def test_whoever_does_not_read_is_cut_off(autojump_clock: MockClock) -> None:
    async def far(stream: Stream) -> None:
        await trio.sleep_forever()

    async with streams(far) as stream:
        parcels, began = parcels_of(stream), trio.current_time()
        with pytest.raises(RemoteProtocolError, match="read slower"):
            async with open_service_nursery() as nursery:
                nursery.start_soon(parcels.run)
                await parcels.send(parcel(1, LARGE))
        assert trio.current_time() - began == pytest.approx(5 + PIECE_BYTES / 1024, abs=1)


async def test_whoever_gives_up_sending_leaves_the_stream_of_use(autojump_clock: MockClock) -> None:
    came = trio.Event()

    def take(_: int) -> bool:
        came.set()
        return True

    async def far(stream: Stream) -> None:
        parcels = ParcelStream(stream, max_parcels=4, limit=lambda _: 1 << 30, take=take)
        while (message := await parcels.receive()) is not None:
            assert not isinstance(message, NoRoom)
            if "drop" in message.header:
                assert parcels.is_coming(message.header["drop"])
                parcels.drop(message.header["drop"])
                assert not parcels.is_coming(message.header["drop"])
            await MessageStream(stream).send(encode(Message(header=message.header)))

    async with streams(far) as stream, open_service_nursery() as nursery:
        parcels = parcels_of(stream)
        nursery.start_soon(parcels.run)
        async with trio.open_nursery() as sender:
            sender.start_soon(parcels.send, parcel(2, LARGE))
            await came.wait()
            sender.cancel_scope.cancel()
        await parcels.send(Message(header={"id": 3, "drop": 2}))
        answer = await parcels.receive()
        assert isinstance(answer, Message)
        assert answer.header["id"] == 3
        with pytest.raises(LocalProtocolError):
            await parcels.send(Message(header={"id": 4, "x": bytes(100_000)}))
        await parcels.send(parcel(2, LARGE))
        answer = await parcels.receive()
        assert isinstance(answer, Message)
        assert answer.header["id"] == 2
        nursery.cancel_scope.cancel()
