"""Sessions that add something of their own within others' blocks: uploaded, used, uploaded again after a failure."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

import client.legs
from client.errors import InvalidInput, MissingBlocks
from client.models.cache import SessionCache
from client.session import Session
from compute.checkpoint import Checkpoint
from compute.engine import EngineSettings
from compute.talking import ClientTalk
from compute.tensors import to_wire
from compute.tuning import TARGETS, SpanTuning, TuningForm
from net.errors import RpcError
from net.protocol import session as wire
from net.rpc import lane
from net.rpc.framing import Message
from net.rpc.framing import Tensor as WireTensor
from tests.mem.conftest import Reference
from tests.mem.swarms import RunningNode, TestSwarm, blocking, generate, swarm_of, until

PROMPT = torch.tensor([[40, 41, 90, 17, 200, 33, 12]])
TWO = [(0, 2), (2, 5)]
THREE = [(0, 2), (2, 3), (3, 5)]
NEW = 12
LORA = TuningForm(rank=4, scale=2.0, targets=("query_key_value", "dense_4h_to_h"))
BOTH = TuningForm(rank=3, scale=1.0, targets=TARGETS, prompts=9)  # more prompts than PROMPT has tokens
PROMPTS = TuningForm(prompts=4)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that every tuning comes in several."""
    monkeypatch.setattr(client.legs, "TUNING_PIECE", 300)


def make_tuning(folder: Path, form: TuningForm, seed: int = 1) -> SpanTuning:
    config = Checkpoint.open(folder).config
    count = form.n_elements(config, 0, config.n_layer)
    flat = (0.2 if form.rank else 2.0) * torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return SpanTuning.from_flat(form, config, 0, config.n_layer, flat)


@torch.inference_mode()
def expected(folder: Path, tuning: SpanTuning | None, ids: Tensor = PROMPT, new: int = NEW) -> list[list[int]]:
    """What one machine generates that has all blocks, without any cache."""
    checkpoint = Checkpoint.open(folder)
    embeddings, head = checkpoint.load_embeddings(), checkpoint.load_head()
    span = checkpoint.load_span(0, checkpoint.config.n_layer)
    for _ in range(new):
        logits = head(span(embeddings(ids), tuning=tuning)[:, -1:])  # [b, 1, v]
        ids = torch.cat([ids, logits.argmax(dim=-1)], dim=1)  # [b, t + 1]
    rows: list[list[int]] = ids.tolist()
    return rows


def tuned(model: Any, tuning: SpanTuning | None) -> SessionCache:
    """A session of a model."""
    make = partial(model._swarm.session, model.served, choices=model._choices, tuning=tuning)
    return SessionCache(make, model._portal, model._mark)


async def generated(model: Any, tuning: SpanTuning | None, **options: Any) -> list[list[int]]:
    def run() -> list[list[int]]:
        with tuned(model, tuning) as session:
            options.setdefault("pad_token_id", 3)
            return generate(model, PROMPT, session=session, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)

    return await blocking(run)


@asynccontextmanager
async def stepping(swarm: TestSwarm, folder: Path, tuning: SpanTuning | None, **options: Any) -> AsyncIterator[Session]:
    """A session without a model around it."""
    [served] = await swarm.client.models()
    session = await swarm.client.session(served, tuning=tuning, **options)
    try:
        yield session
    finally:
        await session.aclose()


def hidden_states(tokens: int, seed: int = 5) -> Tensor:
    return torch.randn(1, tokens, 48, generator=torch.Generator().manual_seed(seed))


async def steps(session: Session, hidden: Tensor, cuts: list[int]) -> Tensor:
    """Its results, from cut to cut."""
    given = [await session.step(part) for part in hidden.tensor_split(cuts, dim=1)]
    return torch.cat(given, dim=1)


@pytest.mark.parametrize("form", [LORA, PROMPTS, BOTH])
@pytest.mark.parametrize("spans", [[(0, 5)], TWO, THREE])
async def test_tokens_are_those_of_one_machine(odd: Reference, form: TuningForm, spans: list[tuple[int, int]]) -> None:
    tuning = make_tuning(odd.folder, form)
    want = expected(odd.folder, tuning)
    assert want != expected(odd.folder, None)
    async with swarm_of(odd.folder, spans) as swarm:
        model = await swarm.model(odd.folder)
        assert await generated(model, tuning) == want
        assert await generated(model, None) == expected(odd.folder, None)
        await until(lambda: not any(node.sessions for node in swarm.nodes))
        for node in swarm.nodes:
            assert not node.node.engine._tunings()
            assert all(not serving.room.taken for serving in node.node._servings)


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_a_node_that_dies_is_replaced_by_one_that_is_sent_the_same(odd: Reference, victim: int) -> None:
    tuning = make_tuning(odd.folder, BOTH)
    hidden = hidden_states(50)
    cuts = [6, 7, 8, 40, 41, 45]
    async with swarm_of(odd.folder, THREE) as swarm:
        async with stepping(swarm, odd.folder, tuning) as session:
            want = await steps(session, hidden, cuts)
        async with stepping(swarm, odd.folder, None) as session:
            assert not torch.allclose(await steps(session, hidden, cuts), want, rtol=0.01, atol=0.01)
        async with stepping(swarm, odd.folder, tuning) as session:
            first = await steps(session, hidden[:, :41], cuts[:4])
            await swarm.add_node(odd.folder, THREE[victim])
            await swarm.nodes[victim].die()
            rest = await steps(session, hidden[:, 41:], [4])
            assert torch.equal(torch.cat([first, rest], dim=1), want)
            assert swarm.nodes[3].sessions == 1


async def test_several_clients_at_once_each_get_what_they_get_alone(odd: Reference) -> None:
    tunings = [make_tuning(odd.folder, BOTH), make_tuning(odd.folder, LORA, seed=2), None]
    alone = [expected(odd.folder, each) for each in tunings]
    assert len({str(each) for each in alone}) == 3
    given: dict[int, list[list[int]]] = {}
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)

        async def run(number: int) -> None:
            given[number] = await generated(model, tunings[number])

        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(run, number)
            assert [given[number] for number in range(3)] == alone


async def test_a_connection_that_breaks_needs_no_second_upload(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning, hidden = make_tuning(odd.folder, LORA), hidden_states(9)
    sent: list[str] = []
    asking = client.legs.Leg._asking

    def noted(leg: Any, method: str, *args: Any) -> Any:
        sent.append(method)
        return asking(leg, method, *args)

    monkeypatch.setattr(client.legs.Leg, "_asking", noted)
    async with swarm_of(odd.folder, TWO) as swarm:
        [first, _] = swarm.nodes
        async with stepping(swarm, odd.folder, tuning) as session:
            want = await steps(session, hidden, [5])
        async with stepping(swarm, odd.folder, tuning) as session:
            given = [await session.step(hidden[:, :5])]
            before = sent.count("tune")
            connection = swarm.client.host.swarm.connection(first.peer_id)
            assert connection is not None
            connection.mux.close()
            given.append(await session.step(hidden[:, 5:]))
        assert torch.equal(torch.cat(given, dim=1), want)
        assert before and sent.count("tune") == before


async def test_a_node_without_room_for_it_is_asked_again(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compute.upload.RETRY_AFTER_S", 0.05)
    tuning, hidden = make_tuning(odd.folder, LORA), hidden_states(3)
    taken: list[bool] = []
    async with swarm_of() as swarm:
        engine = EngineSettings(threads=1, tuning_bytes=tuning.n_bytes)
        node = await swarm.add_node(odd.folder, (0, 5), engine=engine)
        room = node.node._servings[0].room
        assert room.take("another", 4000)
        take = room.take

        def noted(peer: Any, count: int) -> bool:
            taken.append(take(peer, count))
            if not taken[-1] and taken.count(False) == 2:
                room.give_back("another", 4000)
            return taken[-1]

        monkeypatch.setattr(room, "take", noted)

        async with stepping(swarm, odd.folder, tuning) as session:
            await session.step(hidden)
        assert not room.taken and taken.count(False) == 2


async def test_a_node_that_does_not_take_it_is_replaced(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.legs, "TUNING_PIECE_S", 0.2)
    hung: list[object] = []
    take = ClientTalk._tune

    async def tune(talk: ClientTalk, message: Message) -> Message:
        """The first node that is asked reads no more."""
        if not hung or talk._node is hung[0]:
            hung.append(talk._node)
            await trio.sleep_forever()
        return await take(talk, message)

    monkeypatch.setattr(ClientTalk, "_tune", tune)
    tuning = make_tuning(odd.folder, LORA)
    async with swarm_of(odd.folder, [(0, 5), (0, 5)]) as swarm:
        model = await swarm.model(odd.folder)
        assert await generated(model, tuning) == expected(odd.folder, tuning)
    assert hung


async def test_more_than_nodes_take_is_the_callers_to_change(odd: Reference) -> None:
    tuning = make_tuning(odd.folder, BOTH)
    engine = EngineSettings(threads=1, tuning_bytes_per_peer=1000)
    async with swarm_of() as swarm:
        await swarm.add_node(odd.folder, (0, 5), engine=engine)
        async with stepping(swarm, odd.folder, tuning) as session:
            with pytest.raises((InvalidInput, MissingBlocks), match="tuning of"):
                await session.step(hidden_states(3))


async def test_bad_tunings_are_refused_before_anything_is_sent(odd: Reference) -> None:
    config = Checkpoint.open(odd.folder).config
    bad = make_tuning(odd.folder, LORA).flat()
    bad[3] = float("nan")
    async with swarm_of(odd.folder, TWO) as swarm:
        [served] = await swarm.client.models()
        for tuning, says in (
            (make_tuning(odd.folder, LORA).part(0, 4), "give one of blocks 0 to 5"),
            (SpanTuning.from_flat(LORA, config, 0, 5, bad), "NaN or infinity"),
        ):
            with pytest.raises(InvalidInput, match=says):
                await swarm.client.session(served, tuning=tuning)


# What nodes answer to those who ask wrongly


class Stranger:
    """Asks a node whatever it likes."""

    def __init__(self, node: RunningNode, opened: lane.Lane) -> None:
        self._node = node
        self._lane = opened
        self._number = 0

    async def ask(self, method: str, tensors: list[Tensor] | None = None, **fields: Any) -> str:
        """What is said: nothing, or the code of a refusal."""
        self._number += 1
        header = {"id": self._number, "digest": self._node.offer.digest, "start": 0, "end": 5, **fields}
        carried = [
            WireTensor(dtype=dtype, shape=shape, data=data) for dtype, shape, data in map(to_wire, tensors or [])
        ]
        try:
            await self._lane.call(method, Message(header=header, tensors=carried), timeout_s=5)
        except RpcError as refused:
            return refused.code
        return ""

    async def open(self, **fields: Any) -> str:
        request = wire.Open(digest=self._node.offer.digest, start=0, end=5, batch=1, max_length=8, tuned=True)
        return await self.ask("open", **{**request.to_fields(), **fields})


async def test_what_makes_no_sense_is_refused_and_nothing_is_kept(odd: Reference) -> None:
    tuning = make_tuning(odd.folder, LORA)
    flat, form = tuning.flat(), LORA.to_fields()
    async with swarm_of(odd.folder, [(0, 5)]) as swarm:
        [node] = swarm.nodes
        room = node.node._servings[0].room

        def held() -> int:
            return room.taken

        stream = await swarm.client.host.open_stream(node.peer_id, [wire.PROTOCOL_ID], node.offer.addresses)
        async with lane.Lane(stream, node.peer_id) as opened:
            stranger = Stranger(node, opened)
            assert await stranger.open() == "bad-input"  # nothing has come
            bad = flat.clone()
            bad[-1] = float("inf")
            cases: list[tuple[list[Tensor], dict[str, Any], str]] = [
                ([flat[:9]], {"at": 9}, "bad-input"),
                ([flat[:9]], {"at": -1}, "bad-input"),
                ([flat[:9]], {"at": 0, "end": 6}, "wrong-span"),
                ([flat[:9]], {"at": 0, "digest": "x"}, "wrong-model"),
                ([flat[:9]], {"at": 0, "rank": 300}, "bad-value"),
                ([flat[:9]], {"at": 0, "scale": "2"}, "bad-value"),
                ([flat[:9]], {"at": 0, "targets": ["dense", "dense"]}, "bad-value"),
                ([flat[:9].double().to(torch.float16)], {"at": 0}, "bad-dtype"),
                ([flat[:9], flat[:9]], {"at": 0}, "bad-dtype"),
                ([], {"at": 0}, "bad-dtype"),
                ([flat[:9].view(1, 9)], {"at": 0}, "bad-shape"),
                ([torch.cat([flat, flat[:1]])], {"at": 0}, "bad-shape"),
            ]
            for tensors, fields, code in cases:
                assert await stranger.ask("tune", tensors, **{**form, **fields}) == code, fields
                assert not held()
            assert not await stranger.ask("tune", [flat[:9]], at=0, **form)
            assert held() == 36
            assert await stranger.ask("tune", [flat[9:12]], at=10, **form) == "bad-value"  # a gap
            assert not held()
            assert not await stranger.ask("tune", [flat[:9]], at=0, **form)
            assert await stranger.ask("tune", [flat[9:12]], at=9, **form | {"scale": 1.0}) == "bad-value"
            assert not await stranger.ask("tune", [flat[:9]], at=0, **form)
            assert await stranger.open() == "bad-shape"  # it has not come whole
            assert not await stranger.ask("tune", [bad], at=0, **form)
            assert await stranger.open() == "not-finite"
            assert not await stranger.ask("tune", [flat], at=0, **form)
            assert await stranger.open(end=4) == "bad-input"  # it is of other blocks
            assert (held(), node.sessions) == (0, 0)
            assert not await stranger.ask("tune", [flat], at=0, **form)
            assert not await stranger.open()
            assert (held(), node.sessions) == (0, 1)
            assert await stranger.ask("tune", [flat], at=0, **form) == "bad-input"  # it is open
        stream = await swarm.client.host.open_stream(node.peer_id, [wire.PROTOCOL_ID], node.offer.addresses)
        async with lane.Lane(stream, node.peer_id) as opened:
            assert not await Stranger(node, opened).ask("tune", [flat[:9]], at=0, **form)
            assert held() == 36
        await until(lambda: not held())
        model = await swarm.model(odd.folder)
        assert await generated(model, tuning) == expected(odd.folder, tuning)
