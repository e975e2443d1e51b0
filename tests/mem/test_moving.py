"""Nodes move to where they are needed more, pause, and say what they are worth."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
import trio

import compute.engine
import compute.node
import compute.worth
from compute.bloom import BloomSpan
from compute.checkpoint import Checkpoint
from compute.engine import Engine, EngineSettings
from compute.errors import CheckpointError
from compute.measuring import Speed
from compute.serving import refusals
from compute.tensors import from_wire, to_wire
from compute.thread import ModelThread
from net.dht import keys
from net.errors import DialError, RecordError, RpcError
from net.host import Host, open_host
from net.identity import Identity, PeerId
from net.mux.base import Stream
from net.protocol import session as wire
from net.protocol.announcement import DIRECTORY, KIND, NodeAnnouncement, read_all
from net.rpc.framing import Message, Tensor, encode
from net.rpc.lane import read_refusal
from net.rpc.messages import MessageStream
from tests.mem.conftest import Reference
from tests.mem.swarms import RunningNode, TestSwarm, swarm_of, until
from tests.mem.test_sessions import PROMPT, StopsAfter, greedy

IDENTITIES = sorted((Identity.generate(bytes([n]) * 32) for n in range(1, 4)), key=lambda i: i.peer_id.to_bytes())
QUICK: dict[str, Any] = {"max_blocks": 2, "look_s": 0.02}
HIDDEN = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(1))  # [1, t, d]


@pytest.fixture(autouse=True)
def equal_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes measure the same."""

    async def measure(self: Engine, steps: int = 8) -> Speed:
        return Speed(decode_tokens_per_s=100.0, prefill_tokens_per_s=1000.0)

    monkeypatch.setattr(Engine, "measure", measure)


def served(node: RunningNode) -> tuple[int, int]:
    offer = node.node.announcement
    assert offer is not None
    return offer.start, offer.end


async def announced(witness: RunningNode, node: RunningNode) -> NodeAnnouncement | None:
    """What a node says, as others hear it."""
    records = await witness.dht.find(keys.of_name(DIRECTORY), KIND)
    return next((each for each in read_all(records) if each.peer_id == node.peer_id), None)


class Opened:
    """A session with one node."""

    def __init__(self, stream: Stream, digest: str) -> None:
        self._messages = MessageStream(stream)
        self._digest = digest
        self._asked = 0
        self.position = 0
        self.notices: list[Message] = []

    async def open(self, start: int, end: int) -> None:
        request = wire.Open(digest=self._digest, start=start, end=end, batch=1, max_length=64)
        await self._ask("open", request.to_fields())

    async def step(self, hidden: torch.Tensor) -> torch.Tensor:
        dtype, shape, data = to_wire(hidden)
        fields = wire.Step(id=1, position=self.position).to_fields()
        answer = await self._ask("step", fields, Tensor(dtype=dtype, shape=shape, data=data))
        self.position += hidden.shape[1]
        [tensor] = answer.tensors
        return from_wire(tensor.dtype, tensor.shape, tensor.data)

    async def _ask(self, method: str, fields: Mapping[str, Any], *tensors: Tensor) -> Message:
        self._asked += 1
        question = Message(header={**fields, "m": method, "id": self._asked}, tensors=tensors)
        await self._messages.send(encode(question))
        with trio.fail_after(5):
            while (answer := await self._messages.receive()) is not None:
                if answer.header.get("id") == self._asked:
                    if "e" in answer.header:
                        raise read_refusal(answer.header)
                    return answer
                self.notices.append(answer)
        raise AssertionError("the node ended the stream")


class Nobody:
    """A client that hears nothing."""

    bytes_per_s = None

    async def send(self, message: Message) -> None:
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def session_with(swarm: TestSwarm, node: RunningNode) -> AsyncIterator[Opened]:
    async with open_host(Identity.generate(), transports=[swarm.network.transport()]) as host:
        stream = await host.open_stream(node.peer_id, [wire.PROTOCOL_ID], node.host.addresses)
        yield Opened(stream, node.offer.digest)
        await stream.aclose()


@asynccontextmanager
async def about_to_move(odd: Reference, **settings: Any) -> AsyncIterator[tuple[TestSwarm, RunningNode, RunningNode]]:
    """A swarm whose second node may choose, and has chosen blocks 2:4; it will be needed for 0:2 when the first goes.

    Yields: the swarm, the node that may choose, and the one that stays.
    """
    async with swarm_of(odd.folder, [(0, 2)]) as swarm:
        node = await swarm.add_node(odd.folder, **{**QUICK, **settings})
        stays = await swarm.add_node(odd.folder, (2, 5))
        assert served(node) == (2, 4)
        yield swarm, node, stays


async def test_a_node_moves_to_where_nobody_serves(odd: Reference) -> None:
    async with about_to_move(odd) as (swarm, node, stays):
        await swarm.nodes[0].leave()
        await until(lambda: served(node) == (0, 2))
        offer = await announced(stays, node)
        assert offer is not None
        assert (offer.start, offer.end, offer.state, offer.next) == (0, 2, "online", None)
        assert offer.weights == Checkpoint.open(odd.folder).load_span(0, 2).digest
        assert await swarm.generate(odd.folder, PROMPT, max_new_tokens=6, do_sample=False) == greedy(
            odd.model, PROMPT, 6
        )


async def test_sessions_stay_with_the_old_blocks_until_they_end(odd: Reference) -> None:
    span = Checkpoint.open(odd.folder).load_span(2, 4, linear="fp32")
    with torch.inference_mode():
        whole = span(torch.cat([HIDDEN, HIDDEN], dim=1))  # [1, 2t, d]
    async with about_to_move(odd) as (swarm, node, _), session_with(swarm, node) as session:
        await session.open(2, 4)
        first = await session.step(HIDDEN)
        await swarm.nodes[0].leave()
        await until(lambda: served(node) == (0, 2))
        assert (node.sessions, len(node.node._servings)) == (1, 2)
        second = await session.step(HIDDEN)
        torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
        async with session_with(swarm, node) as late:
            with pytest.raises(RpcError, match="serves blocks 0 to 2"):
                await late.open(2, 4)
            await late.open(0, 2)
            await late.step(HIDDEN)
            assert node.sessions == 2
        await until(lambda: node.sessions == 1)
        assert len(node.node._servings) == 2


async def test_the_old_blocks_go_with_their_last_session(odd: Reference) -> None:
    async with about_to_move(odd) as (swarm, node, _):
        async with session_with(swarm, node) as session:
            await session.open(2, 4)
            await swarm.nodes[0].leave()
            await until(lambda: served(node) == (0, 2))
            await trio.testing.wait_all_tasks_blocked()
            assert len(node.node._servings) == 2
        await until(lambda: len(node.node._servings) == 1)
        assert node.sessions == 0


async def test_sessions_are_not_waited_for_for_ever(odd: Reference) -> None:
    async with about_to_move(odd, drain_s=0.05) as (swarm, node, _), session_with(swarm, node) as session:
        await session.open(2, 4)
        await session.step(HIDDEN)
        await swarm.nodes[0].leave()
        await until(lambda: served(node) == (0, 2) and len(node.node._servings) == 1)
        with pytest.raises(RpcError, match="has ended here") as caught:
            await session.step(HIDDEN)
        assert caught.value.code == "no-session"


async def test_of_two_that_could_move_one_goes(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 2), (2, 5)]) as swarm:
        first = await swarm.add_node(odd.folder, identity=IDENTITIES[0], **QUICK)
        second = await swarm.add_node(odd.folder, identity=IDENTITIES[1], **QUICK)
        third = await swarm.add_node(odd.folder, (3, 5))
        movers = [node for node in (first, second) if served(node) != (0, 2)]
        looks: dict[PeerId, int] = {node.peer_id: 0 for node in swarm.nodes}  # neighbours are looked for, too
        others = compute.node.Node._others

        async def counted(self: compute.node.Node) -> list[NodeAnnouncement]:
            looks[self._host.peer_id] += 1
            return await others(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compute.node.Node, "_others", counted)
            await swarm.nodes[0].leave()
            await until(lambda: any(served(node) == (0, 2) for node in (first, second)))
            seen = dict(looks)
            await until(lambda: all(looks[node.peer_id] >= seen[node.peer_id] + 10 for node in (first, second)))
        assert movers
        spans = [served(node) for node in (first, second, swarm.nodes[1], third)]
        assert {block for start, end in spans for block in range(start, end)} == set(range(5))
        assert all(node.node.announcement is not None and node.node.announcement.next is None for node in movers)


async def test_a_node_stays_when_it_cannot_load(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    async with about_to_move(odd) as (swarm, node, stays):
        tried = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def fails(*_: Any, **__: Any) -> None:
            trio.from_thread.run_sync(tried.set, trio_token=token)
            raise CheckpointError("shard 2 is missing")

        monkeypatch.setattr(Checkpoint, "load_span", fails)
        async with session_with(swarm, node) as session:
            await session.open(2, 4)
            await swarm.nodes[0].leave()
            with trio.fail_after(5):
                await tried.wait()
            await session.step(HIDDEN)
        await still_there(node, stays)


async def test_where_memory_does_not_hold_both_the_old_blocks_go_first(
    odd: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans: list[weakref.ref[BloomSpan]] = []
    load = Checkpoint.load_span

    def loads(self: Checkpoint, *args: Any, **options: Any) -> BloomSpan:
        assert not any(span() for span in spans)  # even if the old engine takes its time
        span = load(self, *args, **options)
        spans.append(weakref.ref(span))
        return span

    stop = ModelThread.stop

    async def stops_late(self: ModelThread) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(0.2)
        await stop(self)

    async with about_to_move(odd, drain_s=0.05) as (swarm, node, _):
        monkeypatch.setattr(compute.node, "free_bytes", lambda _: 0)
        monkeypatch.setattr(ModelThread, "stop", stops_late)
        serving = node.node._serving
        assert serving is not None
        spans.append(weakref.ref(serving.span))
        del serving
        monkeypatch.setattr(Checkpoint, "load_span", loads)
        async with session_with(swarm, node) as session, session_with(swarm, node) as late:
            await session.open(2, 4)
            await session.step(HIDDEN)
            await swarm.nodes[0].leave()
            await until(lambda: len(spans) == 2 and served(node) == (0, 2) and bool(node.node._servings))
            with pytest.raises(RpcError, match="has ended here"):
                await session.step(HIDDEN)
            await until(lambda: node.node.announcement is not None and node.node.announcement.state == "online")
            await late.open(0, 2)
            await late.step(HIDDEN)


async def test_a_node_that_let_its_blocks_go_takes_them_again(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    load, tried = Checkpoint.load_span, list[int]()

    def fails_elsewhere(self: Checkpoint, start: int, end: int, **options: Any) -> BloomSpan:
        tried.append(start)
        if start == 0:
            raise CheckpointError("shard 1 is missing")
        return load(self, start, end, **options)

    async with about_to_move(odd) as (swarm, node, stays):
        monkeypatch.setattr(compute.node, "free_bytes", lambda _: 0)
        monkeypatch.setattr(Checkpoint, "load_span", fails_elsewhere)
        await swarm.nodes[0].leave()
        await until(lambda: tried[:2] == [0, 2])
        await still_there(node, stays)


async def test_sessions_are_opened_here_or_there_but_not_in_between(odd: Reference) -> None:
    """Nobody gets a session of an engine that stops."""
    refused, stop = list[str](), trio.Event()
    async with about_to_move(odd) as (swarm, node, _):

        async def open_and_close() -> None:
            request = wire.Open(digest=node.offer.digest, start=2, end=4, batch=1, max_length=64)
            while not stop.is_set():
                try:
                    serving = node.node.serving_for(request)
                    with refusals(None):
                        held = await serving.open(request, swarm.client.host.peer_id, Nobody())
                except RpcError as error:
                    refused.append(error.code)
                else:
                    assert serving.engine._state == "running"
                    await serving.free(held)
                await trio.sleep(0.001)  # leaves the interpreter to the threads that load and stop

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(open_and_close)
            await swarm.nodes[0].leave()
            await until(lambda: "wrong-span" in refused and len(node.node._servings) == 1)
            stop.set()
    assert set(refused) <= {"wrong-span", "stopped"}
    assert refused.count("stopped") <= 4  # those that were about to be opened at that very moment


async def test_blocks_that_cannot_be_loaded_are_not_tried_again_soon(
    odd: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, tried = Checkpoint.load_span, list[int]()

    def fails_elsewhere(self: Checkpoint, start: int, end: int, **options: Any) -> BloomSpan:
        tried.append(start)
        if start < 2:
            raise CheckpointError("shard 1 is missing")
        return load(self, start, end, **options)

    async with about_to_move(odd, stay_s=0.0) as (swarm, node, _):
        monkeypatch.setattr(Checkpoint, "load_span", fails_elsewhere)
        looks = 0
        others = node.node._others

        async def counted() -> list[NodeAnnouncement]:
            nonlocal looks
            looks += 1
            return await others()

        node.node._others = counted  # type: ignore[method-assign]
        await swarm.nodes[0].leave()
        await until(lambda: len(tried) == 2)
        before = looks
        await until(lambda: looks > before + 10)
        assert sorted(tried) == [0, 1]


async def test_an_engine_that_does_not_start_changes_nothing(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: ModelThread) -> None:
        raise RuntimeError("CUDA error: out of memory")

    async with about_to_move(odd) as (swarm, node, stays):
        monkeypatch.setattr(ModelThread, "start", fails)
        async with session_with(swarm, node) as session:
            await session.open(2, 4)
            await swarm.nodes[0].leave()
            await until(lambda: bool(node.node._barred))
            await session.step(HIDDEN)
        await still_there(node, stays)


async def test_the_cache_stays_as_large_as_it_was(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineSettings(threads=1, cache_tokens=None)
    async with about_to_move(odd, engine=engine) as (swarm, node, _):
        before = node.node.engine.stats.cache_max_tokens
        monkeypatch.setattr(compute.engine, "cache_bytes", lambda _: 1)
        await swarm.nodes[0].leave()
        await until(lambda: served(node) == (0, 2))
        assert node.node.engine.stats.cache_max_tokens == before


async def test_only_those_count_with_whom_a_chain_can_go_on(odd: Reference) -> None:
    """Another class of numerics for the same blocks does not let a node go, nor fill a gap."""
    async with swarm_of(odd.folder, [(2, 5)]) as swarm:
        node = await swarm.add_node(odd.folder, **QUICK)
        assert served(node) == (0, 2)
        await swarm.add_node(odd.folder, (0, 2), linear="fp16")
        others = await node.node._others()
        assert {(each.start, each.end) for each in others} == {(2, 5), (0, 2)}
        assert [(each.start, each.end) for each in node.node._alike(others)] == [(2, 5)]
        await swarm.add_node(odd.folder, (2, 5), linear="fp16")
        late = await swarm.add_node(odd.folder, linear="fp16", **QUICK)
        await swarm.nodes[0].leave()
        late_span = served(late)
        assert late_span in ((0, 2), (2, 4))
        for _ in range(20):
            await trio.sleep(0.01)
        assert served(node) == (0, 2)  # 2:5 has nobody of its own class, but neither would 0:2


async def test_a_node_that_has_moved_stays_unless_blocks_have_nobody(odd: Reference) -> None:
    async with about_to_move(odd) as (swarm, node, _):
        await swarm.nodes[0].leave()
        await until(lambda: served(node) == (0, 2) and len(node.node._servings) == 1)
        back = await swarm.add_node(odd.folder, (0, 2))
        await swarm.add_node(odd.folder, (0, 2))
        for _ in range(20):
            await trio.sleep(0.01)
        assert served(node) == (0, 2)  # though 2:5 is served by one alone, and 0:2 by three
        await swarm.nodes[2].leave()
        await until(lambda: served(node) in ((2, 4), (3, 5)))
        assert served(back) == (0, 2)


async def still_there(node: RunningNode, witness: RunningNode) -> None:
    """It has taken its word back, and serves what it did."""
    node.node._settings = dataclasses.replace(node.node._settings, look_s=60.0)
    offer = await announced(witness, node)
    with trio.fail_after(5):
        while offer is None or offer.next is not None or offer.state != "online":
            await trio.sleep(0.002)
            offer = await announced(witness, node)
    assert (offer.start, offer.end, offer.state) == (2, 4, "online")
    assert len(node.node._servings) == 1


async def test_who_was_told_which_blocks_stays(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 2), (2, 5)]) as swarm:
        node = await swarm.add_node(odd.folder, (2, 4), look_s=0.001)
        await swarm.nodes[0].leave()
        for _ in range(20):
            await trio.sleep(0.001)
        assert served(node) == (2, 4)


# Pausing


async def test_a_paused_node_serves_nobody_until_every_pause_is_over(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 5), (0, 5)]) as swarm:
        node, other = swarm.nodes
        async with session_with(swarm, node) as session, session_with(swarm, node) as late:
            await session.open(0, 5)
            await session.step(HIDDEN)
            await node.node.pause("a game")
            await node.node.pause("a game")
            await node.node.pause("its user")
            assert (node.node.paused, node.sessions, node.cached_tokens) == (True, 0, 0)
            assert await announced(other, node) is None
            with pytest.raises(RpcError, match="has ended here"):
                await session.step(HIDDEN)
            with pytest.raises(RpcError, match="paused") as caught:
                await late.open(0, 5)
            assert (caught.value.code, caught.value.retry_after_s) == ("busy", None)
            await node.node.resume("a game")
            await node.node.resume("a game")
            assert node.node.paused
            assert await announced(other, node) is None
            await node.node.resume("its user")
            assert not node.node.paused
            assert await announced(other, node) is not None
            await late.open(0, 5)
            await late.step(HIDDEN)


async def test_a_pause_is_at_once(odd: Reference) -> None:
    """Whatever its neighbours in the DHT take."""
    async with swarm_of(odd.folder, [(0, 5)]) as swarm, trio.open_nursery() as nursery:
        [node] = swarm.nodes
        gate = trio.Event()

        async def wait(*_: bytes) -> None:
            await gate.wait()

        node.dht.withdraw = wait  # type: ignore[method-assign]
        async with session_with(swarm, node) as session:
            await session.open(0, 5)
            nursery.start_soon(node.node.pause, "a game")
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(RpcError, match="has ended here"):
                await session.step(HIDDEN)
        gate.set()


async def test_a_paused_node_loads_nothing(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = list[int]()
    load = Checkpoint.load_span

    def notes(self: Checkpoint, start: int, end: int, **options: Any) -> BloomSpan:
        loaded.append(start)
        return load(self, start, end, **options)

    async with about_to_move(odd) as (swarm, node, _):
        monkeypatch.setattr(Checkpoint, "load_span", notes)
        intend, intended = node.node._intend, trio.Event()

        async def then_pause(target: tuple[int, int] | None) -> None:
            await intend(target)
            if target is not None and not intended.is_set():
                await node.node.pause("a game")
                intended.set()

        node.node._intend = then_pause  # type: ignore[method-assign]
        await swarm.nodes[0].leave()
        with trio.fail_after(5):
            await intended.wait()
        for _ in range(20):
            await trio.sleep(0.01)
        assert loaded == []
        await node.node.resume("a game")
        await until(lambda: served(node) == (0, 2))


async def test_a_node_that_cannot_announce_goes_on(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    async with swarm_of(odd.folder, [(0, 5)]) as swarm:
        [node] = swarm.nodes

        async def full(*_: Any) -> int:
            raise RecordError("1024 records lie under this key")

        await node.node.pause("its user")
        monkeypatch.setattr(node.dht, "announce", full)
        await node.node.resume("its user")
        async with session_with(swarm, node) as session:
            await session.open(0, 5)
            await session.step(HIDDEN)


async def test_a_pause_changes_no_token(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 5)]) as swarm:
        [node] = swarm.nodes

        async def pause() -> None:
            await swarm.add_node(odd.folder, (0, 5))
            await node.node.pause("its user")

        streamer = StopsAfter(3, lambda: trio.from_thread.run(pause))
        ours = await swarm.generate(odd.folder, PROMPT, max_new_tokens=8, do_sample=False, streamer=streamer)
        assert ours == greedy(odd.model, PROMPT, 8)
        assert swarm.nodes[1].node.stats[1] > 0


# What a node is worth


async def test_a_slow_line_is_what_a_node_is_worth(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[PeerId] = []

    async def measure(_: Host, peer_id: PeerId, *, timeout_s: float) -> float:
        assert 3 * timeout_s <= 15
        measured.append(peer_id)
        if len(measured) == 1:
            raise DialError("nobody there")
        return 3840.0

    monkeypatch.setattr(compute.worth, "measure_bytes_per_s", measure)
    async with swarm_of(odd.folder, [(0, 5), (0, 5)]) as swarm:
        node = await swarm.add_node(odd.folder, (0, 5), measure_line=True)
        assert node.offer.decode_tokens_per_s == 3840 / (8 * 48)
        assert len(measured) == len(set(measured)) == 3


async def test_the_line_is_measured_with_who_is_there(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 5)]) as swarm:
        node = await swarm.add_node(odd.folder, (0, 5), measure_line=True)
        assert node.offer.decode_tokens_per_s == 100.0
        speed = node.node._worth.speed
        assert speed is not None
        assert speed.network_bytes_per_s is not None


async def test_a_speed_that_drifts_is_announced_anew(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    values: list[float] = []

    class Jumpy:
        def __init__(self, announced: float, now: float) -> None:
            assert announced == 100.0

        def observe(self, value: float, now: float) -> float | None:
            values.append(value)
            return 42.0

    monkeypatch.setattr(compute.worth, "Drift", Jumpy)
    monkeypatch.setattr(compute.worth, "DRIFT_EVERY_S", 0.002)
    async with swarm_of(odd.folder, [(0, 5), (0, 5)]) as swarm:
        node, other = swarm.nodes
        async with session_with(swarm, node) as session:
            await session.open(0, 5)
            await session.step(HIDDEN[:, :1])
            await until(lambda: node.node.announcement is not None and node.node.announcement.decode_tokens_per_s == 42)
        offer = await announced(other, node)
        assert offer is not None
        assert offer.decode_tokens_per_s == 42.0
        assert len(values) == 1
        assert values[0] > 0
