"""Hidden states of every block: in pieces, while nodes fail, and when they lie."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import trio

import client.core.chain
import client.session
import compute.serving
import net.rpc.framing
from client.errors import ClientError, InvalidInput
from compute.engine import EngineSettings
from compute.errors import BadInput
from net.errors import RemoteProtocolError
from net.protocol import session as wire
from net.rpc.framing import MAX_HEADER_BYTES, Message
from tests.mem.conftest import Reference
from tests.mem.swarms import RunningNode, blocking, swarm_of
from tests.mem.test_modes import check_states

TWO = [(0, 2), (2, 5)]
LONG = torch.arange(4, 84).reshape(2, 40)


def theirs(odd: Reference, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        states: tuple[torch.Tensor, ...] = odd.model(ids, output_hidden_states=True).hidden_states
    return states


def is_of(held: compute.serving.Held, node: RunningNode) -> bool:
    return held.serving is not None and held.serving in node.node._servings


async def test_they_come_in_as_many_messages_as_it_takes(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_per_token = 2 * 48 * 4
    monkeypatch.setattr(client.session, "MAX_FRAME_BYTES", MAX_HEADER_BYTES + 30 * bytes_per_token)
    async with swarm_of(odd.folder, TWO) as swarm:
        model: Any = await swarm.model(odd.folder)
        ours = await blocking(partial(model, LONG, output_hidden_states=True))
        check_states(ours.hidden_states, theirs(odd, LONG))
        assert [node.node.engine.stats.steps for node in swarm.nodes] == [4, 4]  # 10 tokens of 3 blocks in a message
        many = LONG.reshape(-1, 1).repeat(2, 1)[:31]
        with pytest.raises(InvalidInput, match=r"31 rows after each of a node's 3 blocks are more than .* give fewer"):
            await blocking(partial(model, many, output_hidden_states=True))


async def test_nodes_that_allow_little(odd: Reference) -> None:
    async with swarm_of() as swarm:
        engine = EngineSettings(threads=1, max_batch=2, max_length_tokens=42)
        for span in TWO:
            await swarm.add_node(odd.folder, span, engine=engine)
        model: Any = await swarm.model(odd.folder)
        ours = await blocking(partial(model, LONG, output_hidden_states=True))
        check_states(ours.hidden_states, theirs(odd, LONG))


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_a_node_dies_in_the_midst(odd: Reference, victim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.session, "MAX_FRAME_BYTES", MAX_HEADER_BYTES + 12 * 2 * 48 * 4)
    honest = compute.serving.Held._do
    spans = [(0, 1), (1, 3), (3, 5)]
    async with swarm_of(odd.folder, spans) as swarm:
        model: Any = await swarm.model(odd.folder)
        bad, counted, dying = swarm.nodes[victim], 0, trio.Event()

        async def do(self: compute.serving.Held, *args: Any) -> None:
            nonlocal counted
            if is_of(self, bad):
                counted += 1
                if counted == 4:
                    dying.set()
                if counted >= 4:
                    await trio.sleep_forever()
            await honest(self, *args)

        monkeypatch.setattr(compute.serving.Held, "_do", do)

        async def replace() -> None:
            await dying.wait()
            await swarm.add_node(odd.folder, (0, 5))
            await bad.die()

        def both() -> tuple[Any, Any, Any]:
            with model.session() as session:
                first = model(LONG[:, :9], past_key_values=session)
                second = model(LONG[:, 9:], past_key_values=session, output_hidden_states=True)
                return first, second, model(LONG[:, :1], past_key_values=session)

        with trio.fail_after(8):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(replace)
                _, ours, after = await blocking(both)
        check_states(ours.hidden_states, [state[:, 9:] for state in theirs(odd, LONG)])
        longer = torch.cat([LONG, LONG[:, :1]], dim=1)
        with torch.inference_mode():
            torch.testing.assert_close(after.logits, odd.model(longer).logits[:, -1:], atol=1e-4, rtol=1e-4)


def bad_answers() -> dict[str, Callable[[Message], Message]]:
    def tensor(message: Message, **changes: Any) -> Message:
        return Message(header={}, tensors=[dataclasses.replace(message.tensors[0], **changes)])

    def first_row_is(message: Message, value: float) -> Message:
        states = torch.frombuffer(bytearray(message.tensors[0].data), dtype=torch.float32).clone()
        states[0] = value
        return tensor(message, data=states.numpy().tobytes())

    return {
        "not-finite-in-the-first-block": lambda m: first_row_is(m, math.nan),
        "of-one-block-alone": lambda m: tensor(
            m, shape=(1, *m.tensors[0].shape[1:]), data=m.tensors[0].data[: m.tensors[0].n_bytes // 3]
        ),
        "nothing": lambda _: Message(header={}),
        "of-fewer-tokens": lambda m: tensor(m, shape=(3, 0, 48), data=b""),
        "unpushed": lambda m: Message(header={"unpushed": True}, tensors=m.tensors[:0]),
    }


@pytest.mark.parametrize("kind", bad_answers())
async def test_a_node_that_answers_nonsense_is_replaced(
    odd: Reference, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = compute.serving.Held.answer
    ids = LONG[:1, :6]
    async with swarm_of(odd.folder, [(0, 2), (2, 5), (2, 5)]) as swarm:
        model: Any = await swarm.model(odd.folder)
        bad: list[RunningNode] = []

        async def answer(self: compute.serving.Held, message: Message) -> None:
            if message.tensors and message.tensors[0].shape[0] == 3:
                if not bad:
                    bad.extend(node for node in swarm.nodes if is_of(self, node))
                if is_of(self, bad[0]):
                    wrong = bad_answers()[kind](message)
                    message = Message(header={**wrong.header, "id": self.running}, tensors=wrong.tensors)
            await honest(self, message)

        monkeypatch.setattr(compute.serving.Held, "answer", answer)
        with trio.fail_after(8):
            ours = await blocking(partial(model, ids, output_hidden_states=True))
        check_states(ours.hidden_states, theirs(odd, ids))
        assert len(bad) == 1
        assert swarm.client.reputation.failure_chance(bad[0].peer_id) > 0


def test_a_step_for_every_block_is_not_handed_on() -> None:
    asked = wire.Step(id=3, position=4, every=True)
    assert wire.Step.from_fields(asked.to_fields()) == asked
    for wrong in ({"push": 1}, {"every": 1}, {"every": "yes"}):
        with pytest.raises(RemoteProtocolError):
            wire.Step.from_fields({**asked.to_fields(), **wrong})


async def test_a_node_gives_no_more_than_a_message_holds(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []
    honest = compute.serving.Held._step_every

    async def step_every(self: compute.serving.Held, *args: Any) -> torch.Tensor:
        try:
            return await honest(self, *args)
        except BadInput as error:
            refused.append(error.code)
            raise

    monkeypatch.setattr(compute.serving.Held, "_step_every", step_every)
    async with swarm_of(odd.folder, [(0, 2), (2, 5)]) as swarm:
        model: Any = await swarm.model(odd.folder)
        with monkeypatch.context() as limited:
            limited.setattr(net.rpc.framing, "MAX_FRAME_BYTES", MAX_HEADER_BYTES + 12 * 3 * 48 * 4)
            limited.setattr(client.core.chain, "OPENING_WAIT_S", 0.1)
            with pytest.raises(ClientError, match="too-long"):
                await blocking(partial(model, LONG, output_hidden_states=True))
        assert refused
        assert set(refused) == {"too-long"}
        reputation = swarm.client.reputation
        assert all(reputation.failure_chance(node.peer_id) <= 0.05 for node in swarm.nodes)
        ours = await blocking(partial(model, LONG, output_hidden_states=True))
        check_states(ours.hidden_states, theirs(odd, LONG))
