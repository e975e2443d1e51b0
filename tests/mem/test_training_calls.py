"""Training calls from end to end: what comes back, and what nodes and lines can do to it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
import trio.testing

import compute.training
from client.routing import Hop
from client.tuning.calls import RemoteCaller
from compute.checkpoint import Checkpoint
from compute.engine import Engine
from compute.metrics import Metrics
from compute.room import Room
from compute.tensors import tensor_bytes
from compute.training import Training, Tunings
from compute.tuning import SpanTuning, TuningForm
from compute.wire_forms import Form
from net.addresses import parse
from net.errors import ConnectionLost, PeerFailed, StreamReset
from net.host import open_host
from net.identity import Identity
from net.mux.base import Stream
from net.nurseries import open_service_nursery
from net.protocol import training
from net.rpc.framing import Message, Tensor, encode
from net.rpc.messages import MessageStream
from net.rpc.parcel_stream import ParcelStream
from net.rpc.parcels import NoRoom, cut
from tests.checkpoints import make_checkpoint
from tests.mem.conftest import Reference
from tests.mem.swarms import ENGINE, RunningNode, TestSwarm, swarm_of, until
from tests.mem.test_moving import about_to_move, equal_speeds, served
from tests.mem.test_sessions import PROMPT, greedy
from tests.unit.tunings import ALL, BOTH, FORMS, QKV, make_tuning

__all__ = ["equal_speeds"]

WIDTH = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "some-bloom", layers=4)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hop_of(node: RunningNode, start: int | None = None, end: int | None = None) -> Hop:
    offer = node.offer
    return Hop(node=offer, start=offer.start if start is None else start, end=offer.end if end is None else end)


@asynccontextmanager
async def caller_of(swarm: TestSwarm, form: Form | None = None) -> AsyncIterator[RemoteCaller]:
    async with open_service_nursery() as nursery:
        yield RemoteCaller(swarm.client.host, nursery, form=form)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def clients_of(swarm: TestSwarm, count: int) -> AsyncIterator[list[RemoteCaller]]:
    """Callers of other clients than the swarm's."""
    async with AsyncExitStack() as stack:
        hosts = [
            await stack.enter_async_context(
                open_host(Identity.generate(), transports=(swarm.network.transport(),), listen=[parse("/memory/0")])
            )
            for _ in range(count)
        ]
        nursery = await stack.enter_async_context(open_service_nursery())
        yield [RemoteCaller(host, nursery) for host in hosts]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def engine_of(folder: Path, start: int, end: int) -> AsyncIterator[Engine]:
    """The same blocks on this machine."""
    span = Checkpoint.open(folder).load_span(start, end, linear="fp32")
    async with open_service_nursery() as nursery:
        engine = Engine(span, ENGINE)
        await nursery.start(engine.run)
        yield engine
        nursery.cancel_scope.cancel()


def tuning_of(folder: Path, form: TuningForm, start: int, end: int, seed: int = 0) -> SpanTuning:
    return make_tuning(form, seed, start=start, end=end, config=Checkpoint.open(folder).config)


async def fails(caller: RemoteCaller, node: RunningNode, match: str) -> None:
    """A call that comes to nothing."""
    with trio.fail_after(5), pytest.raises(PeerFailed, match=match or None):
        await caller.forward(hop_of(node), node.offer.digest, noise(1, 2, WIDTH), None)


class Gate:
    """Keeps a node's engine from beginning calls.

    Attributes:
        waiting: Calls that would begin.
        reached: There was one.
        opened: Set it, and they do.
    """

    def __init__(self, node: RunningNode) -> None:
        self.waiting = 0
        self.reached = trio.Event()
        self.opened = trio.Event()
        engine = node.node.engine
        real = engine.forward

        async def forward(*args: Any, **options: Any) -> torch.Tensor:
            self.waiting += 1
            self.reached.set()
            try:
                await self.opened.wait()
            finally:
                self.waiting -= 1
            return await real(*args, **options)

        engine.forward = forward  # type: ignore[method-assign]


def hidden_bytes(rows: int, tokens: int, fill: float = 1.0) -> Tensor:
    data = tensor_bytes(torch.full((rows, tokens, WIDTH), fill))
    return Tensor(dtype="u8", shape=(len(data),), data=data)


def flat_tensor(flat: torch.Tensor) -> Tensor:
    return Tensor(dtype="f32", shape=tuple(flat.shape), data=tensor_bytes(flat))


@dataclass(kw_only=True, eq=False)
class RawClient:
    """A stream of training calls to a swarm's only node, by hand.

    Attributes:
        training: The node's.
    """

    stream: Stream
    digest: str
    training: Training
    numbers: int = 100
    _messages: MessageStream = field(init=False)
    _parcels: ParcelStream = field(init=False)

    def __post_init__(self) -> None:
        self._messages = MessageStream(self.stream)
        self._parcels = ParcelStream(self.stream, max_parcels=8, limit=lambda _: 1 << 30)

    def work(self) -> dict[str, Any]:
        """A call forward of three tokens."""
        work = training.Work(digest=self.digest, start=0, end=4, rows=1, tokens=3)
        return {**work.to_fields(), "m": "forward"}

    async def send_plain(self, header: dict[str, Any], *tensors: Tensor) -> None:
        """One message, as it is."""
        await self._messages.send(encode(Message(header=header, tensors=tensors)))

    async def send(self, header: dict[str, Any], *tensors: Tensor) -> None:
        """A parcel."""
        for message in cut(Message(header=header, tensors=tensors)):
            await self._messages.send(encode(message))

    async def receive(self) -> Message:
        with trio.fail_after(5):
            message = await self._parcels.receive()
        assert message is not None and not isinstance(message, NoRoom)
        return message

    async def ask(self, header: dict[str, Any], *tensors: Tensor) -> Message:
        self.numbers += 1
        await self.send({**header, "id": self.numbers}, *tensors)
        answer = await self.receive()
        assert answer.header["id"] == self.numbers
        return answer

    async def where(self, number: int) -> str:
        answer = await self.ask({"m": "where", "of": number})
        state: str = answer.header["state"]
        return state


@asynccontextmanager
async def raw_client(swarm: TestSwarm) -> AsyncIterator[RawClient]:
    [node] = swarm.nodes
    host = swarm.client.host
    serve: Any = node.host._handlers[training.PROTOCOL_ID]
    stream = await host.open_stream(node.peer_id, [training.PROTOCOL_ID], node.offer.addresses)
    yield RawClient(stream=stream, digest=node.offer.digest, training=serve.__self__)
    await stream.aclose()


@pytest.mark.parametrize("blocks", [(0, 4), (1, 3)])
async def test_a_call_gives_what_its_blocks_give(folder: Path, blocks: tuple[int, int]) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, caller_of(swarm) as caller:
        [node] = swarm.nodes
        start, end = blocks
        hop, digest = hop_of(node, start, end), node.offer.digest
        hidden, gradient = noise(3, 7, WIDTH), noise(3, 7, WIDTH, seed=1)
        given = await caller.forward(hop, digest, hidden, None)
        back, flat = await caller.backward(hop, digest, hidden, gradient, None)
        assert flat is None
    async with engine_of(folder, start, end) as engine:
        assert torch.equal(given, await engine.forward(hidden))
        assert torch.equal(back, (await engine.backward(hidden, gradient)).hidden)


@pytest.mark.parametrize("form", FORMS)
async def test_a_call_with_a_tuning_gives_what_its_blocks_give_with_it(folder: Path, form: TuningForm) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, caller_of(swarm) as caller:
        [node] = swarm.nodes
        hop, digest = hop_of(node, 1, 4), node.offer.digest
        hidden, gradient = noise(3, 7, WIDTH), noise(3, 7, WIDTH, seed=1)
        tuning = tuning_of(folder, form, 1, 4)
        given = await caller.forward(hop, digest, hidden, tuning)
        back, flat = await caller.backward(hop, digest, hidden, gradient, tuning)
    async with engine_of(folder, 1, 4) as engine:
        assert torch.equal(given, await engine.forward(hidden, tuning=tuning))
        assert not torch.equal(given, await engine.forward(hidden))
        expected = await engine.backward(hidden, gradient, tuning=tuning)
        assert flat is not None and expected.tuning is not None
        assert torch.equal(back, expected.hidden)
        assert torch.equal(flat, expected.tuning)


@pytest.mark.parametrize(("form", "off"), [("float32", 0.0), ("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 5e-2)])
async def test_calls_in_every_form(folder: Path, form: str, off: float) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, caller_of(swarm, Form(form)) as caller:
        [node] = swarm.nodes
        hidden, gradient = noise(2, 70, WIDTH), noise(2, 70, WIDTH, seed=1)
        tuning = tuning_of(folder, BOTH, 0, 4)
        given = await caller.forward(hop_of(node), node.offer.digest, hidden.bfloat16().float(), tuning)
        back, flat = await caller.backward(hop_of(node), node.offer.digest, hidden, gradient, tuning)
    async with engine_of(folder, 0, 4) as engine:
        expected = await engine.backward(hidden, gradient, tuning=tuning)
        results = [(given, await engine.forward(hidden.bfloat16().float(), tuning=tuning)), (back, expected.hidden)]
    assert flat is not None and expected.tuning is not None
    for one, other in [*results, (flat, expected.tuning)]:
        assert one.dtype == torch.float32
        assert float((one - other).norm() / other.norm()) <= off


async def test_several_calls_at_once_get_their_own_answers(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, caller_of(swarm) as caller:
        [node] = swarm.nodes
        hop, digest = hop_of(node), node.offer.digest
        tunings = [None, tuning_of(folder, BOTH, 0, 4), tuning_of(folder, BOTH, 0, 4, seed=1)]
        given: dict[int, torch.Tensor] = {}

        async def ask(number: int) -> None:
            given[number] = await caller.forward(hop, digest, noise(2, 5, WIDTH, seed=number), tunings[number % 3])

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(ask, number)
        for number in range(12):
            hidden = noise(2, 5, WIDTH, seed=number)
            assert torch.equal(given[number], await node.node.engine.forward(hidden, tuning=tunings[number % 3]))


# Beside others


async def test_large_calls_while_a_session_generates(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 5)]) as swarm, caller_of(swarm) as caller:
        [node] = swarm.nodes
        hidden, gradient = noise(32, 256, WIDTH), noise(32, 256, WIDTH, seed=1)  # 1.5 MiB each
        results: list[torch.Tensor] = []

        async def train() -> None:
            results.append(await caller.forward(hop_of(node), node.offer.digest, hidden, None))
            back, _ = await caller.backward(hop_of(node), node.offer.digest, hidden, gradient, None)
            results.append(back)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(train)
            given = await swarm.generate(odd.folder, PROMPT, max_new_tokens=12, do_sample=False)
        assert given == greedy(odd.model, PROMPT, 12)
        async with engine_of(odd.folder, 0, 5) as engine:
            assert torch.equal(results[0], await engine.forward(hidden))
            assert torch.equal(results[1], (await engine.backward(hidden, gradient)).hidden)


async def test_two_clients_train_at_once(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, clients_of(swarm, 2) as callers:
        [node] = swarm.nodes
        given: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor | None]] = {}
        tunings = [tuning_of(folder, ALL, 0, 4, seed=number) for number in (1, 2)]

        async def train(client: int, number: int) -> None:
            hidden = noise(2, 9, WIDTH, seed=number)
            given[client, number] = await callers[client].backward(
                hop_of(node), node.offer.digest, hidden, -hidden, tunings[client]
            )

        async with trio.open_nursery() as nursery:
            for number in range(6):
                for client in (0, 1):
                    nursery.start_soon(train, client, number)
        async with engine_of(folder, 0, 4) as engine:
            for (client, number), (back, flat) in given.items():
                hidden = noise(2, 9, WIDTH, seed=number)
                alone = await engine.backward(hidden, -hidden, tuning=tunings[client])
                assert flat is not None and alone.tuning is not None
                assert torch.equal(back, alone.hidden)
                assert torch.equal(flat, alone.tuning)


# Nodes that go, pause and move


async def test_a_node_that_dies_in_the_middle_fails_the_call(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, caller_of(swarm) as caller:
        [node] = swarm.nodes
        gate = Gate(node)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, caller, node, "")
            await gate.reached.wait()
            await node.die()


async def test_a_node_that_pauses_fails_calls_and_takes_none_until_it_goes_on(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, caller_of(swarm) as caller:
        [node] = swarm.nodes
        gate = Gate(node)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, caller, node, "stopped")
            await gate.reached.wait()
            await node.node.pause("a game")
        await fails(caller, node, "paused")
        await node.node.resume("a game")
        gate.opened.set()
        assert (await caller.forward(hop_of(node), node.offer.digest, noise(1, 2, WIDTH), None)).shape == (1, 2, WIDTH)


async def test_a_node_that_leaves_finishes_calls_and_takes_no_more(folder: Path) -> None:
    async with swarm_of(folder) as swarm, caller_of(swarm) as caller:
        node = await swarm.add_node(folder, (0, 4), leave_s=5.0)
        gate, hidden = Gate(node), noise(1, 2, WIDTH)
        results: list[torch.Tensor] = []

        async def train() -> None:
            results.append(await caller.forward(hop_of(node), node.offer.digest, hidden, None))

        [serving] = node.node._servings
        async with trio.open_nursery() as nursery:
            nursery.start_soon(train)
            await gate.reached.wait()
            nursery.start_soon(node.leave)
            await until(lambda: serving._closed)
            await fails(caller, node, "serves other blocks")
            assert not results
            gate.opened.set()
        assert len(results) == 1


async def test_calls_go_on_with_the_old_blocks_while_a_node_moves(
    odd: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with about_to_move(odd) as (swarm, node, _), caller_of(swarm) as caller:
        gate, hidden, hop = Gate(node), noise(1, 2, WIDTH), hop_of(node, 2, 4)
        results: list[torch.Tensor] = []

        async def train() -> None:
            results.append(await caller.forward(hop, node.offer.digest, hidden, None))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(train)
            await gate.reached.wait()
            await swarm.nodes[0].leave()
            await until(lambda: served(node) == (0, 2))
            with pytest.raises(PeerFailed, match="wrong-span"):
                await caller.forward(hop, node.offer.digest, hidden, None)
            assert (await caller.forward(hop_of(node, 0, 2), node.offer.digest, hidden, None)).shape == hidden.shape
            assert len(node.node._servings) == 2
            gate.opened.set()
        async with engine_of(odd.folder, 2, 4) as engine:
            assert torch.equal(results[0], await engine.forward(hidden))
        await until(lambda: len(node.node._servings) == 1)


# Clients of any kind


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("unknown-method", {"m": "sideways"}),
        ("unknown-method", {"m": 3}),
        ("bad-input", {"rows": 0}),
        ("bad-input", {"rows": 257}),
        ("bad-input", {"tokens": "3"}),
        ("bad-input", {"start": 4}),
        ("bad-input", {"end": None}),
        ("bad-input", {"key": b"short"}),
        ("bad-input", {"form": "f" * 17}),
        ("bad-dtype", {"form": "float8"}),
        ("bad-shape", {"form": "float16"}),
        ("bad-shape", {"rows": 2}),
        ("too-long", {"rows": ENGINE.max_batch + 1}),  # found before what comes is decoded: that is of another shape
        ("too-long", {"tokens": ENGINE.max_length_tokens + 1}),
        ("wrong-model", {"digest": "0" * 64}),
        ("wrong-span", {"end": 5}),
        ("no-tuning", {"key": bytes(32)}),
        ("bad-input", {"m": "backward"}),
    ],
)
async def test_calls_that_make_no_sense_are_refused(folder: Path, code: str, change: dict[str, Any]) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client:
        answer = await client.ask({**client.work(), **change}, hidden_bytes(1, 3))
        assert answer.header["e"] == code
        answer = await client.ask(client.work(), hidden_bytes(1, 3))
        assert "e" not in answer.header


async def test_hidden_states_of_another_kind_are_refused(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client:
        floats = noise(1, 3, WIDTH)
        for code, tensors in [
            ("bad-input", []),
            ("bad-input", [hidden_bytes(1, 3)] * 2),
            ("bad-shape", [hidden_bytes(1, 4)]),
            ("bad-dtype", [Tensor(dtype="f32", shape=(1, 3, WIDTH), data=tensor_bytes(floats))]),
            ("not-finite", [hidden_bytes(1, 3, math.nan)]),
            ("too-long", [hidden_bytes(33, 3)]),
        ]:
            answer = await client.ask({**client.work(), **({"rows": 33} if code == "too-long" else {})}, *tensors)
            assert answer.header["e"] == code
        assert client.training.room.taken == 0


@pytest.mark.parametrize(
    ("code", "change", "size", "fill"),
    [
        ("bad-value", {"key": bytes(32)}, None, 0.0),
        ("bad-value", {"rank": 257}, None, 0.0),
        ("bad-value", {"targets": ["lm_head"]}, None, 0.0),
        ("bad-value", {"scale": math.nan}, None, 0.0),
        ("bad-value", {"targets": 3}, None, 0.0),
        ("bad-shape", {}, 5, 0.0),
        ("bad-shape", {"rank": 5}, None, 0.0),
        ("not-finite", {}, None, math.inf),
        ("bad-input", {"key": 3}, None, 0.0),
        ("wrong-span", {"end": 5}, None, 0.0),
        ("wrong-model", {"digest": "x"}, None, 0.0),
    ],
)
async def test_tunings_that_make_no_sense_are_refused(
    folder: Path, code: str, change: dict[str, Any], size: int | None, fill: float
) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client:
        tuning = tuning_of(folder, QKV, 0, 4)
        if fill:
            flat = torch.full_like(tuning.flat(), fill)
            tuning = SpanTuning.from_flat(QKV, Checkpoint.open(folder).config, 0, 4, flat)
        flat = tuning.flat()[:size]
        fields = {"m": "tune", "digest": client.digest, "start": 0, "end": 4, "key": tuning.key, **QKV.to_fields()}
        answer = await client.ask({**fields, **change}, flat_tensor(flat))
        assert answer.header["e"] == code
        answer = await client.ask({**client.work(), "key": tuning.key}, hidden_bytes(1, 3))
        assert answer.header["e"] == "no-tuning"
        assert client.training.room.taken == 0


async def test_a_tuning_is_of_its_own_blocks(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client:
        tuning = tuning_of(folder, QKV, 0, 4)
        fields = {"m": "tune", "digest": client.digest, "start": 0, "end": 4, "key": tuning.key, **QKV.to_fields()}
        assert "e" not in (await client.ask(fields, flat_tensor(tuning.flat()))).header
        answer = await client.ask({**client.work(), "key": tuning.key, "start": 1}, hidden_bytes(1, 3))
        assert answer.header["e"] == "bad-value"


async def test_a_call_may_follow_its_tuning_without_waiting(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client:
        tuning = tuning_of(folder, ALL, 0, 4)
        fields = {"m": "tune", "digest": client.digest, "start": 0, "end": 4, "key": tuning.key, **ALL.to_fields()}
        await client.send({**fields, "id": 1}, flat_tensor(tuning.flat()))
        await client.send({**client.work(), "key": tuning.key, "id": 2}, hidden_bytes(1, 3))
        answers = {answer.header["id"]: answer for answer in [await client.receive(), await client.receive()]}
        assert not any("e" in answer.header for answer in answers.values())
        [given] = answers[2].tensors
        hidden = torch.ones(1, 3, WIDTH)
        expected = await swarm.nodes[0].node.engine.forward(hidden, tuning=tuning)
        assert bytes(given.data) == bytes(tensor_bytes(expected))


async def test_a_stream_keeps_the_last_four_tunings(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, caller_of(swarm) as caller, raw_client(swarm) as client:
        tunings = [tuning_of(folder, QKV, 0, 4, seed=seed) for seed in range(5)]
        for tuning in tunings:
            fields = {"m": "tune", "digest": client.digest, "start": 0, "end": 4, "key": tuning.key, **QKV.to_fields()}
            await client.ask(fields, flat_tensor(tuning.flat()))
        said = [
            (await client.ask({**client.work(), "key": tuning.key}, hidden_bytes(1, 3))).header.get("e")
            for tuning in tunings
        ]
        assert said == ["no-tuning", None, None, None, None]
        [node] = swarm.nodes
        for _ in range(2):  # a caller with more of them sends what is gone again
            for tuning in tunings:
                hidden = noise(1, 3, WIDTH)
                given = await caller.forward(hop_of(node), node.offer.digest, hidden, tuning)
                assert torch.equal(given, await node.node.engine.forward(hidden, tuning=tuning))


async def test_parcels_that_are_too_large_end_the_stream(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client:
        await client.send_plain({**client.work(), "id": 1, "p": [["u8", [training.MAX_CALL_BYTES + 1]]]})
        with pytest.raises((StreamReset, ConnectionLost)):
            await client.receive()
        assert client.training.room.taken == 0


async def test_what_there_is_no_room_for_is_put_off(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client, clients_of(swarm, 1) as [other]:
        client.training.room = Room(400_000, 250_000)
        [node] = swarm.nodes
        await client.send({**client.work(), "id": 1, "rows": 8, "tokens": 200}, hidden_bytes(8, 200))  # 307,200
        answer = await client.receive()
        assert (answer.header["e"], answer.header["retry_after_s"]) == ("busy", 1.0)
        gate = Gate(node)
        await client.send({**client.work(), "id": 2, "tokens": 1000}, hidden_bytes(1, 1000))  # 192,000
        await gate.reached.wait()
        with trio.move_on_after(0.2):
            await other.forward(hop_of(node), client.digest, noise(6, 200, WIDTH), None)  # 230,400
            raise AssertionError("there was room")
        gate.opened.set()
        assert "e" not in (await client.receive()).header
        await other.forward(hop_of(node), client.digest, noise(6, 200, WIDTH), None)
        assert client.training.room.taken == 0


async def test_what_was_put_off_while_it_came_is_in_the_way_of_nothing(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client:
        client.training.room = Room(1 << 30, 1)
        piece = Tensor(dtype="u8", shape=(2,), data=bytes(2))
        for number in range(1, training.MAX_CALLS + 1):
            await client.send_plain({**client.work(), "id": number, "p": [["u8", [3 * WIDTH * 4]]]})
            await client.send_plain({"piece": number, "at": 0}, piece)
            assert (await client.receive()).header["e"] == "busy"
        client.training.room = Room(1 << 30, 1 << 30)
        small = hidden_bytes(1, 3)
        await client.send_plain({**client.work(), "id": 9, "p": [["u8", [small.n_bytes]]]})
        await client.send_plain({"piece": 9, "at": 0}, small)
        assert "e" not in (await client.receive()).header


async def test_the_gradient_of_a_tuning_is_held_as_what_is_asked_is(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client:
        tuning, three = tuning_of(folder, ALL, 0, 4), 3 * WIDTH * 4
        fields = {"m": "tune", "digest": client.digest, "start": 0, "end": 4, "key": tuning.key, **ALL.to_fields()}
        assert "e" not in (await client.ask(fields, flat_tensor(tuning.flat()))).header
        backward = {**client.work(), "m": "backward", "key": tuning.key}
        client.training.room = Room(1 << 30, tuning.n_bytes + three - 1)
        answer = await client.ask(backward, hidden_bytes(1, 3), hidden_bytes(1, 3))
        assert (answer.header["e"], answer.header["retry_after_s"]) == ("busy", 1.0)
        assert "e" not in (await client.ask({**backward, "m": "forward"}, hidden_bytes(1, 3))).header
        client.training.room = Room(1 << 30, tuning.n_bytes + three)
        answer = await client.ask(backward, hidden_bytes(1, 3), hidden_bytes(1, 3))
        assert [tensor.n_bytes for tensor in answer.tensors] == [three, tuning.n_bytes]
        assert client.training.room.taken == 0


async def test_an_answer_that_is_not_read_ends_the_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute.training, "ANSWER_S", 0.0)  # nobody reads as fast as that
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client:
        await client.send({**client.work(), "id": 1}, hidden_bytes(1, 3))
        with pytest.raises((StreamReset, ConnectionLost)):
            await client.receive()
        assert client.training.room.taken == 0


async def test_no_more_than_four_are_read(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client:
        gate = Gate(swarm.nodes[0])
        for number in range(1, 7):
            await client.send({**client.work(), "id": number}, hidden_bytes(1, 3))
        await until(lambda: gate.waiting == 4)
        await trio.testing.wait_all_tasks_blocked()
        assert gate.waiting == 4
        gate.opened.set()
        answers = [(await client.receive()).header for _ in range(6)]
        assert sorted(header["id"] for header in answers) == list(range(1, 7))
        assert not any("e" in header for header in answers)


async def test_where_a_call_is(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client:
        gate = Gate(swarm.nodes[0])
        await client.send({**client.work(), "id": 1}, hidden_bytes(1, 3))
        await client.send_plain({**client.work(), "id": 2, "p": [["u8", [3 * WIDTH * 4]]]})
        await gate.reached.wait()
        assert [await client.where(number) for number in (1, 2, 3)] == ["running", "waiting", "unseen"]
        gate.opened.set()
        assert (await client.receive()).header["id"] == 1
        await until(lambda: not client.training.room.taken)
        assert await client.where(1) == "unseen"


async def test_a_call_that_is_cancelled_is_answered_and_ends(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client:
        gate = Gate(swarm.nodes[0])
        await client.send({**client.work(), "id": 1}, hidden_bytes(1, 3))
        await client.send_plain({**client.work(), "id": 2, "p": [["u8", [3 * WIDTH * 4]]]})
        await client.send_plain({"piece": 2, "at": 0}, Tensor(dtype="u8", shape=(8,), data=bytes(8)))
        await gate.reached.wait()
        for number in (1, 2, 3):
            await client.send_plain({"m": "cancel", "id": 10 + number, "of": number})
        answers = [(await client.receive()).header for _ in range(2)]
        assert sorted((header["id"], header["e"]) for header in answers) == [(1, "cancelled"), (2, "cancelled")]
        assert gate.waiting == 0
        await client.send_plain({**client.work(), "id": 2, "p": [["u8", [3 * WIDTH * 4]]]})  # the number is free again
        assert await client.where(2) == "waiting"


async def test_whoever_goes_away_has_nothing_computed(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client:
        gate = Gate(swarm.nodes[0])
        for number in (1, 2):
            await client.send({**client.work(), "id": number}, hidden_bytes(1, 3))
        await until(lambda: gate.waiting == 2)
        await client.stream.aclose()
        await until(lambda: gate.waiting == 0)
        await until(lambda: client.training.room.taken == 0)
        assert not client.training.tunings._kept


async def test_small_questions_that_carry_much_leave_nothing_behind(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client:
        await client.send_plain({"m": "where", "id": 1, "of": 3}, hidden_bytes(4, 100))
        assert (await client.receive()).header["state"] == "unseen"
        assert client.training.room.taken == 0


async def test_refusals_are_counted(folder: Path) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, raw_client(swarm) as client:
        metrics = Metrics()
        client.training.node.metrics = metrics
        await client.ask({**client.work(), "key": bytes(32)}, hidden_bytes(1, 3))
        swarm.nodes[0].node._servings[0].metrics = metrics
        await client.ask(client.work(), hidden_bytes(1, 3, math.nan))
        assert 'raceme_errors_total{code="no-tuning"} 1.0' in metrics.text()
        assert 'raceme_errors_total{code="not-finite"} 1.0' in metrics.text()


# What a node holds


def test_room_is_for_all_and_for_each() -> None:
    room, [one, other] = Room(10, 6), [Identity.generate(bytes([n]) * 32).peer_id for n in (1, 2)]
    assert room.take(one, 6)
    assert not room.take(one, 1)
    assert not room.take(other, 5)
    assert room.take(other, 4)
    room.give_back(one, 6)
    assert room.take(other, 2)
    assert not room.take(other, 1)
    assert room.taken == 6


def test_where_tunings_are_too_large_those_who_have_most_lose_the_oldest(folder: Path) -> None:
    tuning, tunings = tuning_of(folder, QKV, 0, 1), Tunings(100)
    one, other, third = (Identity.generate(bytes([n]) * 32).peer_id for n in (1, 2, 3))
    for key, size in ((b"a", 30), (b"b", 30)):
        tunings.put("one", one, key, tuning, size)
    tunings.put("other", other, b"c", tuning, 35)
    assert tunings.get("one", b"a") is tuning
    tunings.put("other", other, b"d", tuning, 20)  # the other one has 55 now, the first one 60
    assert [tunings.get("one", key) is None for key in (b"a", b"b")] == [False, True]
    assert tunings.get("one", b"c") is None
    assert [tunings.get("other", key) is None for key in (b"c", b"d")] == [False, False]
    tunings.forget("other")
    tunings.forget("other")
    tunings.put("one", one, b"a", tuning, 70)
    tunings.put("one", one, b"b", tuning, 20)
    assert [tunings.get("one", key) for key in (b"a", b"b")] == [tuning, tuning]
    tunings.put("third", third, b"e", tuning, 100)
    assert [tunings.get("one", key) for key in (b"a", b"b")] == [None, None]
    assert tunings.get("third", b"e") is tuning  # what has just come is never what goes


def test_who_has_many_streams_has_no_more_room_for_tunings(folder: Path) -> None:
    tuning, tunings = tuning_of(folder, QKV, 0, 1), Tunings(100)
    one, other = (Identity.generate(bytes([n]) * 32).peer_id for n in (1, 2))
    tunings.put("mine", one, b"a", tuning, 40)
    for number in range(10):
        tunings.put(number, other, b"b", tuning, 20)
        assert tunings.get("mine", b"a") is tuning
    assert sum(tunings.get(number, b"b") is not None for number in range(10)) == 3
