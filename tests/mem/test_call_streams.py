"""Training calls to nodes that fail, hang, lie or are busy, under virtual time: nodes without a model, on lines."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import trio
from trio.testing import MockClock

import client.tuning.call_stream
import client.tuning.calls
from client.errors import InvalidInput
from client.routing import Hop
from client.tuning.call_stream import CALL_S, PATIENCE_S, SILENCE_S
from client.tuning.calls import BUSY_S, RemoteCaller
from compute.bloom import BloomConfig
from compute.tuning import SpanTuning, TuningForm
from net.addresses import parse
from net.errors import PeerFailed, RpcError
from net.host import Host, open_host
from net.mux.base import Stream
from net.nurseries import open_service_nursery
from net.protocol import training as wire
from net.protocol.announcement import NodeAnnouncement, Numerics
from net.rpc import lane
from net.rpc.framing import Message, Tensor
from net.rpc.parcel_stream import ParcelStream
from net.rpc.parcels import NoRoom
from net.swarm import Connection
from net.transports.memory import MemoryNetwork
from tests.mem.lines import Line, LineTransport
from tests.net_helpers import seeded

WIDTH = 8
CONFIG = BloomConfig(vocab_size=32, hidden_size=WIDTH, n_layer=4, n_head=2)
FORM = TuningForm(rank=1, targets=("dense",))
HIDDEN = torch.arange(24.0).view(1, 3, WIDTH)
DIGEST = "d" * 64
Answer = Callable[[Message], Awaitable[Message | None]]


def tuning(seed: int = 0) -> SpanTuning:
    count = FORM.n_elements(CONFIG, 0, 4)
    return SpanTuning.from_flat(FORM, CONFIG, 0, 4, torch.randn(count, generator=torch.Generator().manual_seed(seed)))


@dataclass(kw_only=True, eq=False)
class FakeNode:
    """Gives back what came, unless it is told otherwise.

    Attributes:
        line: Its way into the network.
        asked: Methods, in the order in which they came.
        cancelled: Calls that it was told nobody wants.
        streams: How many were opened.
        call_s: How long a call takes.
        refusals: What it says instead, one after another.
        state: What it says about a call that it has; ``None``: nothing.
        does: What it does with the next calls instead of answering, one after another.
        keys: Of tunings that it has.
        stream: The last one.
        room: For how many bytes it has room, once; the call that they are not enough for is put off.
        on_bytes: Told what comes.
    """

    line: Line = field(default_factory=Line)
    asked: list[str] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    streams: int = 0
    call_s: float = 0.0
    refusals: list[RpcError] = field(default_factory=list)
    state: str | None = "running"
    has: set[int] = field(default_factory=set)
    does: list[Answer] = field(default_factory=list)
    keys: set[bytes] = field(default_factory=set)
    stream: Stream | None = None
    room: list[int] = field(default_factory=list)
    on_bytes: Callable[[int], None] = lambda _: None

    def count(self, method: str) -> int:
        return self.asked.count(method)

    async def serve(self, connection: Connection, stream: Stream) -> None:
        self.streams += 1
        self.stream = stream
        parcels = ParcelStream(stream, max_parcels=wire.MAX_CALLS, limit=lambda _: wire.MAX_CALL_BYTES, take=self._take)
        async with open_service_nursery() as nursery:
            nursery.start_soon(parcels.run)
            while (message := await parcels.receive()) is not None:
                if isinstance(message, NoRoom):
                    refusal = lane.refusal(RpcError("busy", "full", 1.0))
                    await parcels.send(Message(header={**refusal, "id": message.header["id"]}))
                    continue
                if message.header["m"] == "cancel" and parcels.is_coming(number := message.header["of"]):
                    parcels.drop(number)
                    refusal = lane.refusal(RpcError("cancelled", "it was cancelled"))
                    await parcels.send(Message(header={**refusal, "id": number}))
                self.has.add(message.header["id"])
                nursery.start_soon(self._answer, parcels, message)
            nursery.cancel_scope.cancel()

    def _take(self, count: int) -> bool:
        self.on_bytes(count)
        if not self.room:
            return True
        self.room[0] -= count
        if self.room[0] < 0:
            self.room.clear()
            return False
        return True

    async def _answer(self, parcels: ParcelStream, message: Message) -> None:
        method, number = message.header["m"], message.header["id"]
        self.asked.append(method)
        if method == "cancel":
            self.cancelled.append(message.header["of"])
            return
        if method == "where":
            if self.state is not None:
                state = self.state if message.header["of"] in self.has else "unseen"
                await parcels.send(Message(header={"id": number, "state": state}))
            return
        try:
            answer = await self._call(method, message)
        except RpcError as error:
            answer = Message(header=lane.refusal(error))
        if answer is not None:
            await parcels.send(Message(header={**answer.header, "id": number}, tensors=answer.tensors))
            self.has.discard(number)

    async def _call(self, method: str, message: Message) -> Message | None:
        if method == "tune":
            self.keys.add(message.header["key"])
            return Message(header={})
        await trio.sleep(self.call_s)
        if "key" in message.header and message.header["key"] not in self.keys:
            raise RpcError("no-tuning", "not here")
        if self.does:
            return await self.does.pop(0)(message)
        if self.refusals:
            raise self.refusals.pop(0)
        tensors = [message.tensors[-1]]
        if method == "backward" and "key" in message.header:
            count = FORM.n_elements(CONFIG, 0, 4)
            tensors.append(Tensor(dtype="f32", shape=(count,), data=bytes(4 * count)))
        return Message(header={}, tensors=tensors)


@dataclass(kw_only=True, eq=False)
class World:
    """A client and a node.

    Attributes:
        hop: All of the node's blocks.
    """

    node: FakeNode
    host: Host
    hop: Hop
    caller: RemoteCaller
    nursery: trio.Nursery

    async def forward(self, hidden: torch.Tensor = HIDDEN, tuning: SpanTuning | None = None) -> torch.Tensor:
        return await self.caller.forward(self.hop, DIGEST, hidden, tuning)

    async def fails(self, match: str) -> float:
        """How long it takes until a call fails like this."""
        began = trio.current_time()
        with pytest.raises(PeerFailed, match=match):
            await self.forward()
        return trio.current_time() - began


@asynccontextmanager
async def world(**settings: Any) -> AsyncIterator[World]:
    network, node = MemoryNetwork(), FakeNode(**settings)
    offer = NodeAnnouncement(
        peer_id=seeded(1).peer_id,
        addresses=(parse("/memory/1"),),
        model="some-bloom",
        digest=DIGEST,
        blocks=4,
        start=0,
        end=4,
        weights="0" * 64,
        numerics=Numerics(dtype="float32", quantization="none", backend="cpu"),
        decode_tokens_per_s=10.0,
        cache_tokens_left=1000,
        max_length=100,
        state="online",
        agent="test",
    )
    transport = LineTransport(network, node.line)
    async with (
        open_host(seeded(1), listen=[parse("/memory/1")], transports=[transport]) as far,
        open_host(seeded(90), transports=[network.transport()]) as host,
        open_service_nursery() as nursery,
    ):
        far.handle(wire.PROTOCOL_ID, node.serve)
        caller = RemoteCaller(host, nursery)
        yield World(node=node, host=host, hop=Hop(node=offer, start=0, end=4), caller=caller, nursery=nursery)
        nursery.cancel_scope.cancel()


# Calls that come to something


async def test_calls_go_over_one_stream(autojump_clock: MockClock) -> None:
    async with world() as it:
        for number in range(3):
            assert torch.equal(await it.forward(HIDDEN + number), HIDDEN + number)
        back, flat = await it.caller.backward(it.hop, DIGEST, HIDDEN, -HIDDEN, None)
        assert torch.equal(back, -HIDDEN)
        assert flat is None
        assert it.node.streams == 1


async def test_at_most_four_are_under_way_and_the_others_wait_for_their_turn(autojump_clock: MockClock) -> None:
    async with world(call_s=1.0) as it:
        began, ended = trio.current_time(), list[float]()

        async def ask() -> None:
            await it.forward()
            ended.append(trio.current_time() - began)

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask)
        assert ended == pytest.approx([1] * 4 + [2] * 4 + [3] * 2, abs=0.1)


async def test_a_slow_node_that_answers_for_itself_is_waited_for(autojump_clock: MockClock) -> None:
    async with world(call_s=60.0) as it:
        assert torch.equal(await it.forward(), HIDDEN)
        assert 2 <= it.node.count("where") <= 60 / PATIENCE_S
        asked = it.node.count("where")
        assert torch.equal(await it.forward(), HIDDEN)
        assert it.node.count("where") == asked  # that long is usual by now


async def test_a_busy_node_is_asked_again(autojump_clock: MockClock) -> None:
    async with world(refusals=[RpcError("busy", "later", 1.0), RpcError("out-of-cache", "later", 2.0)]) as it:
        began = trio.current_time()
        assert torch.equal(await it.forward(), HIDDEN)
        assert trio.current_time() - began == pytest.approx(3.0, abs=0.1)


async def test_a_connection_that_breaks_costs_a_call_one_more_try(autojump_clock: MockClock) -> None:
    async with world() as it:
        await it.forward()

        async def end(_: Message) -> None:
            for connection in it.host.swarm.connections:
                connection.mux.close()

        it.node.does = [end]
        assert torch.equal(await it.forward(), HIDDEN)
        assert it.node.streams == 2
        it.node.does = [end, end]
        assert await it.fails("connection") < 0.1
        assert torch.equal(await it.forward(), HIDDEN)  # the next one begins anew


async def test_an_idle_stream_that_the_node_ends_is_no_failure(autojump_clock: MockClock) -> None:
    async with world() as it:
        await it.forward()
        assert it.node.stream is not None
        await it.node.stream.aclose()
        await trio.sleep(1)
        assert torch.equal(await it.forward(), HIDDEN)
        assert it.node.streams == 2


# Tunings


async def test_a_tuning_is_sent_once_and_again_when_the_node_has_it_no_more(autojump_clock: MockClock) -> None:
    async with world() as it:
        mine = tuning()
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(it.forward, HIDDEN, mine)
        assert it.node.count("tune") == 1
        _, flat = await it.caller.backward(it.hop, DIGEST, HIDDEN, HIDDEN, mine)
        assert flat is not None and flat.shape == mine.flat().shape
        assert it.node.keys == {mine.key}
        it.node.keys.clear()
        await it.forward(HIDDEN, mine)
        assert it.node.count("tune") == 2
        await it.forward(HIDDEN, tuning(1))
        assert it.node.keys == {mine.key, tuning(1).key}


async def test_a_node_that_never_has_a_tuning_is_given_up(autojump_clock: MockClock) -> None:
    class Forgetful(set[bytes]):
        def add(self, key: bytes) -> None:
            pass

    async with world(keys=Forgetful()) as it:
        with pytest.raises(PeerFailed, match="no-tuning"):
            await it.forward(HIDDEN, tuning())
        assert it.node.count("tune") <= 5


async def test_what_the_node_says_to_a_tuning_is_what_its_calls_are_told(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world() as it:
        said, real = [RpcError("busy", "later", 2.0)], it.node._call

        async def call(method: str, message: Message) -> Message | None:
            if method == "tune" and said:
                raise said.pop()
            return await real(method, message)

        monkeypatch.setattr(it.node, "_call", call)
        began = trio.current_time()
        assert torch.equal(await it.forward(HIDDEN, tuning()), HIDDEN)
        assert trio.current_time() - began == pytest.approx(2.0, abs=0.1)
        said[:] = [RpcError("bad-value", "no such thing")]
        with pytest.raises(PeerFailed, match="no such thing"):
            await it.forward(HIDDEN, tuning(1))


# Calls that come to nothing


async def test_a_node_that_is_busy_for_too_long_is_given_up(autojump_clock: MockClock) -> None:
    async with world(refusals=[RpcError("busy", "later", 3.0)] * 100) as it:
        assert BUSY_S - 3 <= await it.fails("puts calls off") <= BUSY_S


@pytest.mark.parametrize(
    "code", ["wrong-span", "wrong-model", "stopped", "bad-shape", "not-finite", "internal", "busy"]
)
async def test_refused_for_good_is_the_nodes_failure(code: str, autojump_clock: MockClock) -> None:
    async with world(refusals=[RpcError(code, "no")]) as it:
        assert await it.fails(code) < 0.1
        assert torch.equal(await it.forward(), HIDDEN)
        assert it.node.streams == 1


async def test_too_long_is_the_callers_fault_unless_it_is_one_sequence(autojump_clock: MockClock) -> None:
    async with world(refusals=[RpcError("too-long", "at most 1")] * 2) as it:
        with pytest.raises(InvalidInput, match="at most 1"):
            await it.forward(HIDDEN.expand(2, -1, -1))
        await it.fails("too-long")  # of a length that the node announces


async def test_a_node_that_hangs_is_given_up_soon(autojump_clock: MockClock) -> None:
    async def hang(_: Message) -> None:
        return None

    async with world(state=None) as it:
        await it.forward()
        it.node.does = [hang]
        assert await it.fails("hangs") <= PATIENCE_S + SILENCE_S + 1.0
        assert it.node.streams == 1  # and is not tried again


async def test_others_calls_fail_with_it(autojump_clock: MockClock) -> None:
    async def hang(_: Message) -> None:
        return None

    async with world(state=None, does=[hang] * 4) as it, trio.open_nursery() as nursery:
        for _ in range(6):  # two of them wait for their turn
            nursery.start_soon(it.fails, "hangs")


async def test_a_node_that_has_lost_a_call_is_given_up(autojump_clock: MockClock) -> None:
    async with world(state="unseen", call_s=100.0) as it:
        assert await it.fails("lost a call") <= PATIENCE_S + 1.0


async def test_not_even_the_slowest_node_is_waited_for_without_end(autojump_clock: MockClock) -> None:
    async with world(call_s=math.inf) as it:
        assert CALL_S <= await it.fails("no answer") <= CALL_S + 1.0


async def test_a_line_that_is_cut_without_a_word_is_noticed(autojump_clock: MockClock) -> None:
    async with world(call_s=30.0) as it:
        it.node.call_s = 0.0
        await it.forward()
        it.node.call_s = 30.0

        async def cut() -> None:
            await trio.sleep(5)
            it.node.line.cut()

        it.nursery.start_soon(cut)
        took = await it.fails("connection")
        assert 5 < took <= 5 + 2 + 3 + 0.5  # noticed, and tried once more


async def test_a_node_that_cannot_be_reached(autojump_clock: MockClock) -> None:
    async with world() as it:
        it.node.line.cut()
        assert await it.fails("no answer") <= 8.5


# Answers that are wrong


def tensor_of(values: torch.Tensor) -> Tensor:
    data = values.contiguous().numpy().tobytes()
    return Tensor(dtype="u8", shape=(len(data),), data=data)


WRONG: dict[str, list[Tensor]] = {
    "nothing": [],
    "fewer tokens": [tensor_of(HIDDEN[:, :2])],
    "two": [tensor_of(HIDDEN[:, :1]), tensor_of(HIDDEN[:, 1:])],
    "another type": [Tensor(dtype="f32", shape=(24,), data=bytes(96))],
    "NaN": [tensor_of(HIDDEN * math.nan)],
    "infinity": [tensor_of(HIDDEN + math.inf)],
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_wrong_answers_are_the_nodes_failure(wrong: str, autojump_clock: MockClock) -> None:
    async def answer(_: Message) -> Message:
        return Message(header={}, tensors=WRONG[wrong])

    async with world(does=[answer]) as it:
        assert await it.fails("wrongly") < 0.1


@pytest.mark.parametrize("flat", [torch.zeros(3), torch.full((64,), math.nan)])
async def test_wrong_gradients_of_a_tuning_too(flat: torch.Tensor, autojump_clock: MockClock) -> None:
    async def answer(message: Message) -> Message:
        data = flat.numpy().tobytes()
        return Message(
            header={}, tensors=[message.tensors[-1], Tensor(dtype="f32", shape=tuple(flat.shape), data=data)]
        )

    assert FORM.n_elements(CONFIG, 0, 4) == 64
    async with world(does=[answer]) as it:
        with pytest.raises(PeerFailed, match="wrongly"):
            await it.caller.backward(it.hop, DIGEST, HIDDEN, HIDDEN, tuning())


@pytest.mark.parametrize("n_bytes", [1 << 10, 1 << 20])
async def test_an_answer_longer_than_it_may_be_is_not_read(n_bytes: int, autojump_clock: MockClock) -> None:
    async def answer(_: Message) -> Message:
        return Message(header={}, tensors=[Tensor(dtype="u8", shape=(n_bytes,), data=bytes(n_bytes))])

    async with world(does=[answer]) as it:
        await it.fails("at most 96|not 96")


async def test_answers_that_make_no_sense_end_the_stream(autojump_clock: MockClock) -> None:
    async with world() as it:
        for header in ({"e": 3}, {"e": "x" * 100}):

            async def answer(_: Message, header: dict[str, Any] = header) -> Message:
                return Message(header=header)

            it.node.does = [answer]
            await it.fails("without a reason")


async def test_answers_to_what_was_not_asked_end_the_stream(autojump_clock: MockClock) -> None:
    async with world() as it:
        await it.forward()
        node = it.node
        real = node._answer

        async def answer(parcels: ParcelStream, message: Message) -> None:
            await parcels.send(Message(header={"id": 999}))
            await real(parcels, message)

        node._answer = answer  # type: ignore[method-assign]
        await it.fails("not asked")


# What the caller does


async def test_whoever_goes_away_tells_the_node(autojump_clock: MockClock) -> None:
    async with world(call_s=5.0) as it:
        with trio.move_on_after(1):
            await it.forward()
        await trio.sleep(0.1)
        assert len(it.node.cancelled) == 1
        it.node.call_s = 0.0
        assert torch.equal(await it.forward(), HIDDEN)
        await trio.sleep(10)  # the first one's answer comes, and nobody minds
        assert torch.equal(await it.forward(), HIDDEN)
        assert it.node.streams == 1


async def test_whoever_goes_away_while_it_is_sent_sends_no_more(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.tuning.calls, "LONG_BYTES", math.inf)  # this clock does not wait for threads
    async with world() as it:
        await it.forward()
        came: list[int] = []
        it.node.on_bytes = came.append
        large = torch.ones(16, 100, 1024)  # 6.25 MiB
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.caller.forward, it.hop, DIGEST, large, None)
            while not came:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert torch.equal(await it.forward(), HIDDEN)
        assert sum(came) < large.numel() * 4
        assert (it.node.count("forward"), it.node.count("cancel")) == (2, 1)
        assert it.node.streams == 1


async def test_what_is_refused_while_it_is_sent_is_sent_no_further(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.tuning.calls, "LONG_BYTES", math.inf)  # this clock does not wait for threads
    async with world() as it:
        came: list[int] = []
        it.node.on_bytes, it.node.room = came.append, [1 << 20]
        large = torch.ones(16, 100, 1024)
        began = trio.current_time()
        assert torch.equal(await it.caller.forward(it.hop, DIGEST, large, None), large)
        assert trio.current_time() - began == pytest.approx(1.0, abs=0.1)  # as it was told
        assert (it.node.count("forward"), it.node.count("cancel")) == (1, 1)
        assert sum(came) < 2 * large.numel() * 4


async def test_whoever_goes_away_before_anything_is_sent_leaves_room_for_others(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hold(*_: object) -> None:
        await trio.sleep_forever()

    async with world() as it:
        await it.forward()
        [stream] = it.caller._streams.values()
        with monkeypatch.context() as patched, trio.move_on_after(1):
            patched.setattr(stream, "_hand_over", hold)  # others' calls are being sent
            async with trio.open_nursery() as nursery:
                for _ in range(wire.MAX_CALLS):
                    nursery.start_soon(it.forward)
        assert it.node.count("forward") == 1
        with trio.fail_after(1):
            assert torch.equal(await it.forward(), HIDDEN)
        await trio.sleep(1)
        assert not stream._calls
        assert it.node.streams == 1


async def test_a_long_answer_that_nobody_waits_for_leaves_nothing_behind(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.tuning.calls, "LONG_BYTES", math.inf)  # this clock does not wait for threads
    async with world() as it:

        async def answer(message: Message) -> Message:
            await trio.sleep(2)
            assert it.node.cancelled  # too late: it is about to be sent
            return Message(header={}, tensors=[message.tensors[-1]])

        it.node.does = [answer]
        with trio.move_on_after(1):
            await it.caller.forward(it.hop, DIGEST, torch.ones(4, 100, 1024), None)
        await trio.sleep(10)
        [stream] = it.caller._streams.values()
        assert not stream._calls
        assert torch.equal(await it.forward(), HIDDEN)
        assert it.node.streams == 1


async def test_a_node_that_hangs_is_noticed_though_nobody_waits_any_more(autojump_clock: MockClock) -> None:
    async def hang(_: Message) -> None:
        return None

    async with world(state=None, does=[hang] * wire.MAX_CALLS) as it:
        with trio.move_on_after(1):
            async with trio.open_nursery() as nursery:
                for _ in range(wire.MAX_CALLS):
                    nursery.start_soon(it.forward)
        assert await it.fails("hangs") <= SILENCE_S + 1.0
        assert torch.equal(await it.forward(), HIDDEN)


async def test_an_answer_that_takes_long_to_come_has_its_time(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.tuning.calls, "LONG_BYTES", math.inf)  # this clock does not wait for threads
    monkeypatch.setattr(client.tuning.call_stream, "CALL_S", 5.0)
    async with world() as it:
        it.node.line.bytes_per_s = 200_000
        large = torch.ones(8, 100, 1024)  # 3 MiB, which take 16 s
        assert torch.equal(await it.caller.forward(it.hop, DIGEST, large, None), large)


@pytest.mark.parametrize(
    "hidden",
    [
        HIDDEN[0],
        HIDDEN.to(torch.int64),
        HIDDEN[:, :0],
        HIDDEN * math.nan,
        torch.zeros(1, 101, WIDTH),  # longer than the node announces
        torch.zeros(257, 1, WIDTH),
        torch.zeros(200, 90, 4096).expand(200, 90, 4096),
    ],
    ids=["dimensions", "integers", "nothing", "NaN", "length", "rows", "bytes"],
)
async def test_input_that_nobody_can_compute_is_the_callers_fault(
    hidden: torch.Tensor, autojump_clock: MockClock
) -> None:
    async with world() as it:
        with pytest.raises(InvalidInput):
            await it.forward(hidden)
        assert not it.node.asked


async def test_tunings_that_are_not_for_these_blocks_or_not_finite_are_the_callers_fault(
    autojump_clock: MockClock,
) -> None:
    async with world() as it:
        with pytest.raises(InvalidInput, match="blocks"):
            await it.forward(HIDDEN, tuning().part(1, 3))
        broken = SpanTuning.from_flat(FORM, CONFIG, 0, 4, torch.full((64,), math.nan))
        with pytest.raises(InvalidInput, match="NaN"):
            await it.forward(HIDDEN, broken)
        with pytest.raises(InvalidInput, match="gradient"):
            await it.caller.backward(it.hop, DIGEST, HIDDEN, HIDDEN[:, :2], None)


async def test_a_caller_that_is_closed_fails_what_is_under_way(autojump_clock: MockClock) -> None:
    async with world(call_s=5.0) as it:

        async def close() -> None:
            await trio.sleep(1)
            it.caller.close()

        it.nursery.start_soon(close)
        assert await it.fails("closed here") == pytest.approx(1, abs=0.1)
        it.node.call_s = 0.0
        assert torch.equal(await it.forward(), HIDDEN)
