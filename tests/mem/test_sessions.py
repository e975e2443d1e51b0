"""Sessions: what they keep, what they refuse, and what they survive."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
import trio.testing

import client.core.chain
import client.core.patience
import client.core.state
import client.legs
import client.session
import compute.serving
import compute.talking
from client.errors import ClientError, InvalidInput, MissingBlocks, UnknownModel
from client.models.cache import SessionCache
from client.swarm import AsyncSwarm
from compute.checkpoint import Checkpoint
from compute.engine import Engine, EngineSettings
from compute.pushing import PushLink
from compute.talking import MAX_LINKS
from compute.tensors import to_wire
from compute.wire_forms import Form, Sender
from net.addresses import Multiaddr, parse
from net.dht.service import Dht
from net.errors import RpcError
from net.host import open_host
from net.identity import Identity, PeerId
from net.protocol import session as wire
from net.rpc import lane
from net.rpc.framing import MAX_FRAME_BYTES, MAX_HEADER_BYTES, Message, Tensor, encode
from net.rpc.messages import MessageStream
from net.swarm import Connection
from tests.checkpoints import make_checkpoint
from tests.mem.conftest import Reference
from tests.mem.swarms import RunningNode, TestSwarm, blocking, generate, swarm_of, until
from tests.net_helpers import seeded

PROMPT = torch.tensor([[40, 41, 90, 17, 200, 33, 12]])
OTHER = torch.tensor([[7, 77, 177, 277, 5]])
TWO = [(0, 2), (2, 5)]
LONE = {"push": 0, "keep": 9}  # of a step whose result the client wants


def greedy(model: Any, ids: torch.Tensor, new: int, **options: Any) -> list[list[int]]:
    return generate(model, ids, max_new_tokens=new, do_sample=False, **options)


# What is kept


async def test_a_session_keeps_its_tokens_between_calls(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)
        expected = greedy(odd.model, PROMPT, 15)

        def in_three_calls() -> list[list[int]]:
            with model.session() as session:
                ids = PROMPT
                for new in (5, 4, 6):
                    ids = torch.tensor(greedy(model, ids, new, session=session))
                    assert session.position == ids.shape[1] - 1
                rows: list[list[int]] = ids.tolist()
                return rows

        assert await blocking(in_three_calls) == expected
        computed = [node.node.stats[1] for node in swarm.nodes]
        assert computed == [PROMPT.shape[1] + 15 - 1] * 2  # no token was computed twice


async def test_a_session_goes_back(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)

        def back_and_again() -> None:
            with model.session() as session:
                first = greedy(model, PROMPT, 6, session=session)
                session.position = 4
                assert session.position == 4
                assert greedy(model, PROMPT, 6, session=session) == first
                changed = PROMPT.clone()
                changed[0, 4:] = torch.tensor([3, 2, 1])
                session.position = 4
                assert greedy(model, changed, 6, session=session) == greedy(odd.model, changed, 6)
                session.crop(-3)
                assert session.position == PROMPT.shape[1] + 6 - 1 - 3
                assert greedy(model, PROMPT[:, :5], 3, session=session) == greedy(odd.model, PROMPT[:, :5], 3)
                with pytest.raises(InvalidInput, match="cannot go back to 99"):
                    session.position = 99
                with pytest.raises(InvalidInput, match="cannot go back to -1"):
                    session.position = -1

        await blocking(back_and_again)


async def test_a_session_computes_again_only_what_differs(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)

        def changed_prompts() -> None:
            with model.session() as session:
                greedy(model, PROMPT, 6, session=session)
                changed = PROMPT.clone()
                changed[0, 4:] = torch.tensor([3, 2, 1])
                session.keep_prefix(changed)
                assert session.position == 4
                assert greedy(model, changed, 6, session=session) == greedy(odd.model, changed, 6)
                session.keep_prefix(changed[:, :3])
                assert session.position == 2  # the last token is computed again, for its logits
                assert greedy(model, OTHER, 3, session=session) == greedy(odd.model, OTHER, 3)

        await blocking(changed_prompts)


async def test_sessions_that_begin_alike_share_it_on_every_node(odd: Reference) -> None:
    ids = torch.randint(3, 300, (1, 600), generator=torch.Generator().manual_seed(3))
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)

        def both() -> None:
            with model.session() as one, model.session() as two:
                for session in (one, two):
                    assert greedy(model, ids, 3, session=session) == greedy(odd.model, ids, 3)

        async def shared() -> list[int]:
            engines = [serving.engine for node in swarm.nodes for serving in node.node._servings]
            return [max(engine._slots.place(key).shared for key in engine._sessions) for engine in engines]

        def in_the_midst() -> list[int]:
            with model.session() as one, model.session() as two:
                greedy(model, ids, 3, session=one)
                greedy(model, ids, 3, session=two)
                found: list[int] = trio.from_thread.run(shared)
            return found

        await blocking(both)
        assert await blocking(in_the_midst) == [512, 512]


async def test_two_sessions_do_not_disturb_each_other(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)

        def interleaved() -> None:
            with model.session() as one, model.session() as two:
                a, b = PROMPT, OTHER
                for _ in range(4):
                    a = torch.tensor(greedy(model, a, 2, session=one))
                    b = torch.tensor(greedy(model, b, 3, session=two))
                assert a.tolist() == greedy(odd.model, PROMPT, 8)
                assert b.tolist() == greedy(odd.model, OTHER, 12)

        await blocking(interleaved)


async def test_clients_at_once(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)
        prompts = [PROMPT + n for n in range(6)]
        results: dict[int, list[list[int]]] = {}

        async def one(n: int) -> None:
            results[n] = await blocking(lambda: greedy(model, prompts[n], 10))

        async with trio.open_nursery() as nursery:
            for n in range(6):
                nursery.start_soon(one, n)
        assert results == {n: greedy(odd.model, prompts[n], 10) for n in range(6)}
        await until(lambda: all(node.sessions == 0 for node in swarm.nodes))


async def test_a_long_prompt_travels_in_several_messages(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(4, 104)[None]
    bytes_per_token = 48 * 4
    monkeypatch.setattr(client.session, "MAX_FRAME_BYTES", MAX_HEADER_BYTES + 30 * bytes_per_token)
    async with swarm_of(odd.folder, TWO) as swarm:
        assert await swarm.generate(odd.folder, ids, max_new_tokens=5, do_sample=False) == greedy(odd.model, ids, 5)
        assert [node.node.engine.stats.steps for node in swarm.nodes] == [4 + 4, 4 + 4]  # 30 + 30 + 30 + 10, then 4


async def test_a_step_that_fills_a_message_to_the_brim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens as ``_piece_tokens`` allows, and one more, at the real limit of a frame."""
    monkeypatch.setattr(client.session, "CHUNK_TOKENS", 1 << 20)
    folder = make_checkpoint(tmp_path / "wide", layers=1, heads=2, hidden=512, tokenizer=False)
    most = (MAX_FRAME_BYTES - MAX_HEADER_BYTES) // (512 * 4)
    async with swarm_of() as swarm:
        node = await swarm.add_node(folder, (0, 1), engine=EngineSettings(threads=1, max_length_tokens=4096))
        session = await swarm.client.session((await swarm.client.models())[0])
        result = await session.step(torch.zeros(1, most + 1, 512))
        assert result.shape == (1, most + 1, 512)
        assert node.node.engine.stats.steps == 2
        await session.aclose()


async def test_close_frees_the_nodes(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)
        session: SessionCache = await blocking(model.session)
        assert [node.sessions for node in swarm.nodes] == [0, 0]  # opened at the first step
        await blocking(lambda: greedy(model, PROMPT, 4, session=session))
        assert [node.sessions for node in swarm.nodes] == [1, 1]
        assert all(node.cached_tokens > 0 for node in swarm.nodes)
        assert [hop[1:] for hop in session.route] == TWO
        await blocking(session.close)
        await until(lambda: all(node.sessions == 0 and node.cached_tokens == 0 for node in swarm.nodes))


async def test_a_client_that_goes_frees_the_nodes(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        async with (
            open_host(Identity.generate(), transports=(swarm.network.transport(),)) as host,
            trio.open_nursery() as nursery,
        ):
            dht = Dht(host, server=False)
            await dht.join([swarm.bootstrap])
            model = await AsyncSwarm(host, dht, nursery).model(str(odd.folder))
            session = await blocking(model.session)
            await blocking(lambda: greedy(model, PROMPT, 4, session=session))
            assert [node.sessions for node in swarm.nodes] == [1, 1]
            for connection in host.swarm.connections:
                connection.mux.close()
            nursery.cancel_scope.cancel()
        await until(lambda: all(node.sessions == 0 and node.cached_tokens == 0 for node in swarm.nodes))


# Another way to the same node


def steps(swarm: TestSwarm) -> list[int]:
    return [node.node.engine.stats.steps for node in swarm.nodes]


async def resumable(swarm: TestSwarm, odd: Reference) -> tuple[Any, SessionCache, list[list[int]]]:
    """A model, and a session of it with four tokens generated."""
    for span in TWO:
        await swarm.add_node(odd.folder, span, resume_s=60)
    model = await swarm.model(odd.folder)
    session: SessionCache = await blocking(model.session)
    return model, session, await blocking(lambda: greedy(model, PROMPT, 4, session=session))


async def test_a_session_goes_on_after_its_connections_broke(odd: Reference) -> None:
    async with swarm_of() as swarm:
        model, session, ids = await resumable(swarm, odd)
        before = steps(swarm)
        for number in range(3):
            for connection in swarm.client.host.swarm.connections:
                connection.mux.close()
            ids = await blocking(lambda: greedy(model, torch.tensor(ids), 2, session=session))  # noqa: B023
            assert ids == greedy(odd.model, PROMPT, 6 + 2 * number)
        # At most the step that met the broken connection was computed twice; nothing was sent again.
        assert all(after - earlier <= 3 * 3 for after, earlier in zip(steps(swarm), before, strict=True))
        assert [node.sessions for node in swarm.nodes] == [1, 1]
        await blocking(session.close)
        await until(lambda: all(node.sessions == 0 for node in swarm.nodes))


async def test_a_session_leaves_the_relay_when_there_is_a_direct_way(odd: Reference) -> None:
    async with swarm_of() as swarm:
        model, session, ids = await resumable(swarm, odd)
        host, node = swarm.client.host, swarm.nodes[0]
        before = steps(swarm)
        relayed = host.swarm.connection(node.peer_id)
        assert relayed is not None
        vars(relayed)["relayed"] = True  # as if it were
        streams = relayed.mux.open_streams
        direct = await host.swarm.punch(node.peer_id, node.host.addresses, listener=False)
        assert host.swarm.connection(node.peer_id) is direct
        ids = await blocking(lambda: greedy(model, torch.tensor(ids), 2, session=session))
        assert ids == greedy(odd.model, PROMPT, 6)
        assert [after - earlier for after, earlier in zip(steps(swarm), before, strict=True)] == [2, 2]
        assert relayed.mux.open_streams < streams
        assert direct.mux.open_streams >= 1
        await blocking(session.close)


async def test_a_session_outlives_its_connection_in_the_midst_of_a_step(
    odd: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What serves it is cancelled with the connection, as it is when a relay that carries it goes away."""
    honest = Engine.step
    entered, gate = trio.Event(), trio.Event()

    async def slow(self: Engine, *args: Any) -> torch.Tensor:
        entered.set()
        await gate.wait()
        return await honest(self, *args)

    async with swarm_of() as swarm:
        node = await swarm.add_node(odd.folder, (0, 5), resume_s=60)
        session = await swarm.client.session((await swarm.client.models())[0])
        hidden = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(1))
        before = await session.step(hidden)
        monkeypatch.setattr(Engine, "step", slow)
        results: list[torch.Tensor] = []

        async def again() -> None:
            session.rollback(0)
            results.append(await session.step(hidden))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(again)
            await entered.wait()
            [token] = node.tokens
            for connection in node.host.swarm.connections:
                if connection.peer_id == swarm.client.host.peer_id:
                    connection.mux.close()
                    await connection.ended.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert node.tokens == [token]
            gate.set()
        assert torch.equal(results[0], before)
        assert node.tokens == [token]  # resumed, not opened anew
        await session.aclose()
        await until(lambda: node.sessions == 0)


async def test_nobody_else_can_resume_a_session(odd: Reference) -> None:
    async with swarm_of() as swarm:
        _, session, _ = await resumable(swarm, odd)
        node = swarm.nodes[0]
        [token] = node.tokens
        async with open_host(Identity.generate(), transports=[swarm.network.transport()]) as thief:
            stream = await thief.open_stream(node.peer_id, [wire.PROTOCOL_ID], node.host.addresses)
            async with lane.Lane(stream, node.peer_id) as stolen_lane:
                for stolen in (token, bytes(16)):
                    with pytest.raises(RpcError, match="no such session"):
                        await stolen_lane.call("resume", {"id": 1, "token": stolen}, timeout_s=5)
                with pytest.raises(RpcError, match="token of 3 bytes"):
                    await stolen_lane.call("resume", {"id": 1, "token": b"abc"}, timeout_s=5)
        assert node.sessions == 1
        await blocking(session.close)


async def test_sessions_that_wait_to_be_resumed_are_few(odd: Reference) -> None:
    async with swarm_of() as swarm:
        node = await swarm.add_node(odd.folder, (0, 5), resume_s=60)
        model = await swarm.model(odd.folder)
        sessions: list[SessionCache] = [
            await blocking(model.session) for _ in range(compute.serving.MAX_LEFT_PER_PEER + 2)
        ]
        for session in sessions:
            await blocking(lambda: greedy(model, PROMPT, 1, session=session))  # noqa: B023
        assert node.sessions == compute.serving.MAX_LEFT_PER_PEER + 2
        for connection in swarm.client.host.swarm.connections:
            connection.mux.close()
        await until(lambda: node.sessions == compute.serving.MAX_LEFT_PER_PEER)


async def test_room_may_be_reserved(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)

        def with_room_for_twelve() -> None:
            with model.session(max_length=12) as session:
                assert session.prepare(1) == 12
                greedy(model, PROMPT, 5, session=session)
                with pytest.raises(InvalidInput, match="allow 13"):
                    greedy(model, PROMPT, 7, session=session)

        await blocking(with_room_for_twelve)


# What is refused


async def test_inputs_that_cannot_be_computed(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)
        padded = torch.ones_like(ROWS)
        padded[1, 2] = 0
        refusals: list[tuple[str, Callable[[], Any]]] = [
            ("prompt is empty", lambda: greedy(model, torch.zeros(1, 0, dtype=torch.long), 3)),
            ("integer tensor of shape", lambda: model.generate(max_new_tokens=3)),
            ("integer tensor of shape", lambda: model.generate([[1, 2, 3]], max_new_tokens=3)),  # type: ignore[arg-type]
            ("integer tensor of shape", lambda: model.generate(torch.ones(1, 3), max_new_tokens=3)),
            ("integer tensor of shape", lambda: model.generate(torch.tensor([1, 2, 3]), max_new_tokens=3)),
            ("padding_side", lambda: greedy(model, ROWS, 3, attention_mask=padded)),
            ("0 to 319", lambda: greedy(model, PROMPT + 300, 3)),
            ("0 to 319", lambda: greedy(model, PROMPT - 100, 3)),
            ("at least one token", lambda: model(torch.zeros(1, 0, dtype=torch.long))),
            ("at least one token", lambda: model(None)),
            ("the nodes on the chain allow 2049", lambda: greedy(model, PROMPT, 2048)),
            ("the nodes on the chain allow 2049", lambda: greedy(model, PROMPT.repeat(1, 400), 1)),
            ("2100 tokens are more than the 2048", lambda: model(torch.ones(1, 2100, dtype=torch.long))),
            ("expected 1 to 32", lambda: greedy(model, PROMPT.repeat(33, 1), 3)),
            ("at most|256", lambda: greedy(model, PROMPT.repeat(300, 1), 3)),
        ]
        for message, call in refusals:
            with pytest.raises(InvalidInput, match=message) as caught:
                await blocking(call)
            assert "\n" not in str(caught.value), message
        await until(lambda: all(node.sessions == 0 for node in swarm.nodes))
        # and the model is still good for what can be computed
        assert await blocking(lambda: greedy(model, PROMPT, 3)) == greedy(odd.model, PROMPT, 3)


ROWS = torch.tensor([[40, 41, 90, 17], [9, 8, 7, 6]])


async def test_a_refused_call_leaves_the_session_usable(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)

        def refused_then_used() -> None:
            with model.session() as session:
                with pytest.raises(InvalidInput, match="expected 1 to 32"):
                    greedy(model, PROMPT.repeat(33, 1), 3, session=session)
                first = greedy(model, PROMPT, 3, session=session)
                assert first == greedy(odd.model, PROMPT, 3)
                with pytest.raises(InvalidInput, match="1 rows, not 2"):
                    greedy(model, PROMPT.repeat(2, 1), 3, session=session)
                with pytest.raises(InvalidInput, match="0 to 319"):
                    greedy(model, torch.cat([torch.tensor(first), torch.tensor([[999]])], 1), 3, session=session)
                assert greedy(model, torch.tensor(first), 3, session=session) == greedy(odd.model, PROMPT, 6)

        await blocking(refused_then_used)


async def test_a_model_nobody_serves(odd: Reference, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other-bloom", layers=4)
    same_name = make_checkpoint(tmp_path / odd.folder.name, layers=3)
    async with swarm_of() as swarm:
        with pytest.raises(UnknownModel, match="serves no model at all"):
            await swarm.client.model("bloom-tiny")
        await swarm.add_node(odd.folder, (0, 5))
        for name in ("bloom-tiny", "no-such", "../no-such", "/no/such", str(other)):
            with pytest.raises(UnknownModel, match=f"nobody serves .*served are: {odd.folder.name}"):
                await swarm.client.model(name)
        with pytest.raises(UnknownModel, match=r"not on this machine.*name the folder"):
            await swarm.client.model(odd.folder.name)
        with pytest.raises(UnknownModel, match="different models"):
            await swarm.client.model(str(same_name))


async def test_blocks_that_nobody_serves(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 1), (2, 4)]) as swarm:
        [served] = await swarm.client.models()
        assert (served.n_blocks, served.missing) == (5, [(1, 2), (4, 5)])
        assert [len(peers) for peers in served.placement] == [1, 0, 1, 1, 0]
        with pytest.raises(MissingBlocks, match=r"blocks 1:2, 4:5 of odd-bloom.*raceme serve") as caught:
            await swarm.generate(odd.folder, PROMPT, max_new_tokens=3)
        assert caught.value.missing == [(1, 2), (4, 5)]
        for span in ((1, 2), (4, 5)):
            await swarm.add_node(odd.folder, span)
        assert await swarm.generate(odd.folder, PROMPT, max_new_tokens=3, do_sample=False) == greedy(
            odd.model, PROMPT, 3
        )


async def test_a_model_that_is_no_longer_served(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 5)]) as swarm:
        model = await swarm.model(odd.folder)
        await swarm.nodes[0].leave()
        with pytest.raises(UnknownModel, match="nobody serves odd-bloom any more"):
            await blocking(lambda: greedy(model, PROMPT, 3))
        assert await swarm.client.models() == []


async def test_announcements_that_lie_about_the_number_of_blocks(odd: Reference) -> None:
    """A digest belongs to one number of blocks: a node that says another serves nothing that we know."""
    async with swarm_of(odd.folder, TWO) as swarm:
        for blocks, end in ((1, 1), (8, 8)):
            liar = await swarm.add_node(odd.folder, (0, 1))
            liar.node.announcement = dataclasses.replace(liar.offer, blocks=blocks, end=end)
            await liar.node._announce()
        assert await swarm.generate(odd.folder, PROMPT, max_new_tokens=6, do_sample=False) == greedy(
            odd.model, PROMPT, 6
        )


async def test_a_caller_in_the_event_loop_is_told_what_to_do(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)
        with pytest.raises(ClientError, match=r"inside trio, use .*trio\.to_thread\.run_sync"):
            greedy(model, PROMPT, 3)


# What is survived


class StopsAfter(torch.nn.Module):
    """A streamer (by its methods) that calls a function when it has seen some tokens."""

    def __init__(self, tokens: int, then: Callable[[], None]) -> None:
        super().__init__()
        self._left = tokens + 1  # the prompt is the first thing that is put
        self._then = then

    def put(self, value: torch.Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            self._then()

    def end(self) -> None:
        """Nothing to do."""


async def broken_off(swarm: TestSwarm, folder: Path, then: Callable[[], Awaitable[None]], ids: Any = PROMPT) -> Any:
    """Generate 12 tokens; ``then`` is awaited between the fifth and the sixth."""
    model = await swarm.model(folder)
    streamer = StopsAfter(5, lambda: trio.from_thread.run(then))
    return await blocking(lambda: greedy(model, ids, 12, streamer=streamer))


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_node_that_dies_is_replaced(odd: Reference, victim: int) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        chosen = swarm.nodes[victim]

        async def replace() -> None:
            await swarm.add_node(odd.folder, TWO[victim])
            await chosen.die()

        assert await broken_off(swarm, odd.folder, replace) == greedy(odd.model, PROMPT, 12)


async def test_sampling_goes_on_as_if_nothing_had_happened(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)

        async def replace() -> None:
            await swarm.add_node(odd.folder, (0, 5))
            await swarm.nodes[0].die()
            await swarm.nodes[1].die()

        streamer_of = {"new": StopsAfter(5, lambda: trio.from_thread.run(replace))}
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.2, "seed": 11}
        ours = await blocking(lambda: generate(model, PROMPT, streamer=streamer_of["new"], **options))
        assert ours == generate(odd.model, PROMPT, **options)


async def test_a_node_that_leaves_is_replaced(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:

        async def replace() -> None:
            await swarm.add_node(odd.folder, (1, 5))
            await swarm.nodes[1].leave()

        assert await broken_off(swarm, odd.folder, replace) == greedy(odd.model, PROMPT, 12)


@pytest.mark.parametrize("victim", [0, 1, 2])
async def test_a_node_that_ends_lets_its_sessions_go_elsewhere_first(
    odd: Reference, victim: int, caplog: pytest.LogCaptureFixture
) -> None:
    spans = [(0, 2), (2, 4), (4, 5)]
    async with swarm_of() as swarm:
        for span in spans:
            await swarm.add_node(odd.folder, span, leave_s=5.0)
        leaves = swarm.nodes[victim]

        async def replace() -> None:
            await swarm.add_node(odd.folder, spans[victim])
            with trio.fail_after(4):  # not all the time that there is
                await leaves.leave()

        assert await broken_off(swarm, odd.folder, replace) == greedy(odd.model, PROMPT, 12)
    assert not [record for record in caplog.records if record.name.startswith("client")]  # nothing had to be replaced


async def test_nodes_hand_on_to_each_other(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 2), (2, 4), (4, 5)]) as swarm:
        session = await swarm.client.session((await swarm.client.models())[0])
        hidden = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(1))
        await session.step(hidden)
        await until(lambda: session._core is not None and all(leg.linked_to for leg in session._core.legs[:-1]))
        sent: list[object] = []
        for leg in session._legs.values():
            monitored(leg, sent)
        for _ in range(5):
            await session.step(hidden)
        assert len(sent) == 5  # one message for each step, to the first node
        for serving in (serving for node in swarm.nodes[:1] for serving in node.node._servings):
            for held in serving.held.values():
                assert held.link is not None
                held.link.end()
        first = await session.step(hidden)  # from hand to hand, as nobody can hand on any more
        assert len(sent) > 6
        session.rollback(session.position - 1)
        assert torch.equal(await session.step(hidden), first)
        await session.aclose()


def monitored(leg: client.legs.Leg, sent: list[object]) -> None:
    honest = leg.send

    def send(message: Message) -> None:
        sent.append(message)
        honest(message)

    leg.send = send  # type: ignore[method-assign]


async def test_a_dead_node_that_nobody_replaces(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.legs, "RETURN_S", 1.0)
    monkeypatch.setattr(client.core.chain, "WAIT_S", 1.0)
    async with swarm_of(odd.folder, TWO) as swarm:
        with (
            trio.fail_after(10),
            pytest.raises(
                MissingBlocks, match=r"blocks 2:5 of odd-bloom are announced, but the nodes that serve them fail"
            ) as e,
        ):
            await broken_off(swarm, odd.folder, swarm.nodes[1].die)
        assert e.value.missing == [(2, 5)]
        assert "raceme serve" in str(e.value)


async def test_a_session_outlives_a_failure_when_the_node_comes_back(
    odd: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.legs, "RETURN_S", 1.0)
    monkeypatch.setattr(client.core.chain, "WAIT_S", 1.0)
    identity = Identity.generate(b"\x07" * 32)
    async with swarm_of(odd.folder, [(0, 2)]) as swarm:
        node = await swarm.add_node(odd.folder, (2, 5), identity=identity)
        model = await swarm.model(odd.folder)
        session = await blocking(model.session)
        first = torch.tensor(await blocking(lambda: greedy(model, PROMPT, 4, session=session)))
        await node.die()
        with pytest.raises(MissingBlocks):
            await blocking(lambda: greedy(model, first, 4, session=session))
        await swarm.add_node(odd.folder, (2, 5), identity=identity)
        assert await blocking(lambda: greedy(model, first, 4, session=session)) == greedy(odd.model, PROMPT, 8)
        await blocking(session.close)


async def test_a_session_that_the_node_dropped_as_idle(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute.talking, "SESSION_IDLE_S", 0.3)
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)
        session = await blocking(model.session)
        first = torch.tensor(await blocking(lambda: greedy(model, PROMPT, 4, session=session)))
        await until(lambda: all(node.sessions == 0 for node in swarm.nodes))
        monkeypatch.setattr(compute.talking, "SESSION_IDLE_S", 60.0)
        assert await blocking(lambda: greedy(model, first, 4, session=session)) == greedy(odd.model, PROMPT, 8)
        await blocking(session.close)


def bad_answers() -> dict[str, Callable[[Message], Message]]:
    def tensor(message: Message, **changes: Any) -> Message:
        return Message(header={}, tensors=[dataclasses.replace(message.tensors[0], **changes)])

    def values(message: Message, value: float) -> Message:
        shape = message.tensors[0].shape
        data = torch.full(shape, value).numpy().tobytes()
        return tensor(message, data=data)

    def refuse(code: str, retry_after_s: float | None = None) -> Callable[[Message], Message]:
        def raise_it(_: Message) -> Message:
            raise RpcError(code, "so there", retry_after_s)

        return raise_it

    return {
        "nan": lambda m: values(m, math.nan),
        "infinity": lambda m: values(m, -math.inf),
        "too-short": lambda m: tensor(m, shape=(1, 0, 48), data=b""),
        "flat": lambda m: tensor(m, shape=(math.prod(m.tensors[0].shape),)),
        "no-tensor": lambda _: Message(header={}),
        "two-tensors": lambda m: Message(header={}, tensors=[m.tensors[0]] * 2),
        "half": lambda m: tensor(m, dtype="f16", data=bytes(m.tensors[0].n_bytes // 2)),
        "bytes": lambda m: tensor(m, dtype="u8", data=bytes(math.prod(m.tensors[0].shape))),
        "stopped": refuse("stopped"),
        "internal": refuse("internal"),
        "unknown-code": refuse("never-heard-of"),
        "bad-output": refuse("bad-output"),
        "no-session": refuse("no-session"),
        "retry-before-now": refuse("busy", -1.0),
        "error-that-is-no-text": lambda _: Message(header={"e": 7}),
        "error-map": lambda _: Message(header={"e": {"e": "e"}, "why": ["?"]}),
    }


def is_of(held: compute.serving.Held, node: RunningNode) -> bool:
    return held.serving is not None and held.serving in node.node._servings


@pytest.mark.parametrize("kind", bad_answers())
async def test_a_node_that_answers_nonsense_is_replaced(
    odd: Reference, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bad = bad_answers()[kind]
    honest = compute.serving.Held.answer
    async with swarm_of(odd.folder, TWO) as swarm:
        bad = swarm.nodes[1]

        async def answer(self: compute.serving.Held, message: Message) -> None:
            if turned and "id" in message.header and is_of(self, bad):
                try:
                    message = make_bad(message)
                except RpcError as error:
                    message = Message(header=lane.refusal(error))
                message = Message(header={**message.header, "id": self.running}, tensors=message.tensors)
            await honest(self, message)

        turned: list[bool] = []
        monkeypatch.setattr(compute.serving.Held, "answer", answer)

        async def turn() -> None:
            turned.append(True)
            await swarm.add_node(odd.folder, (2, 5))

        with trio.fail_after(8):
            assert await broken_off(swarm, odd.folder, turn) == greedy(odd.model, PROMPT, 12)


@pytest.mark.parametrize("victim", [0, 1])
async def test_a_node_that_does_not_answer_is_replaced(
    odd: Reference, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layer in (client.core.state, client.core.patience):
        monkeypatch.setattr(layer, "MIN_PATIENCE_S", 0.3)
    honest = compute.serving.Held._do
    async with swarm_of(odd.folder, TWO) as swarm:
        bad = swarm.nodes[victim]
        silent: list[bool] = []

        async def do(self: compute.serving.Held, *args: Any) -> None:
            if silent and is_of(self, bad):
                await trio.sleep_forever()
            await honest(self, *args)

        monkeypatch.setattr(compute.serving.Held, "_do", do)

        async def silence() -> None:
            silent.append(True)
            await swarm.add_node(odd.folder, TWO[victim])

        with trio.fail_after(8):
            assert await broken_off(swarm, odd.folder, silence) == greedy(odd.model, PROMPT, 12)


@pytest.mark.parametrize("what", ["open", "step"])
async def test_a_busy_node_is_asked_again(odd: Reference, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method = {"open": (compute.talking.ClientTalk, "_open"), "step": (compute.serving.Held, "_do")}[what]
    honest = getattr(owner, method)
    refusals = [RpcError("busy", "come again", 0.01), RpcError("out-of-cache", "come again", 0.0)]

    async def busy(*args: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return await honest(*args)

    monkeypatch.setattr(owner, method, busy)
    async with swarm_of(odd.folder, TWO) as swarm:
        assert await swarm.generate(odd.folder, PROMPT, max_new_tokens=5, do_sample=False) == greedy(
            odd.model, PROMPT, 5
        )
        assert refusals == []


async def test_a_node_that_stays_busy_is_given_up(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy(*_: Any) -> None:
        raise RpcError("out-of-cache", "no room left", 0.001)

    monkeypatch.setattr(client.core.chain, "OPENING_WAIT_S", 1.0)
    async with swarm_of(odd.folder, TWO) as swarm:
        monkeypatch.setattr(compute.serving.Held, "_do", busy)
        with trio.fail_after(8), pytest.raises(MissingBlocks) as caught:
            await swarm.generate(odd.folder, PROMPT, max_new_tokens=5)
        assert "no room left" in str(caught.value)  # what the node said, not only that it failed
        await until(lambda: all(node.sessions == 0 for node in swarm.nodes))


async def test_all_nodes_fail_one_after_another(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any) -> None:
        raise RpcError("internal", "a bug")

    monkeypatch.setattr(client.core.chain, "OPENING_WAIT_S", 1.0)
    async with swarm_of(odd.folder, [(0, 5)] * 6) as swarm:
        monkeypatch.setattr(compute.serving.Held, "_do", broken)
        with trio.fail_after(8), pytest.raises(MissingBlocks, match=r"blocks 0:5.*a bug"):
            await swarm.generate(odd.folder, PROMPT, max_new_tokens=5)
        await until(lambda: all(node.sessions == 0 for node in swarm.nodes))


async def test_a_cancelled_step_can_be_done_again(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Engine.step
    entered, gate = trio.Event(), trio.Event()

    async def slow(self: Engine, *args: Any) -> torch.Tensor:
        entered.set()
        await gate.wait()
        return await honest(self, *args)

    async with swarm_of(odd.folder, TWO) as swarm:
        session = await swarm.client.session((await swarm.client.models())[0])
        hidden = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(1))
        before = await session.step(hidden)
        monkeypatch.setattr(Engine, "step", slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.step, hidden)
            await entered.wait()
            nursery.cancel_scope.cancel()
        gate.set()
        assert session.position == 4
        session.rollback(0)
        assert torch.equal(await session.step(hidden), before)
        await session.aclose()
        await until(lambda: all(node.sessions == 0 for node in swarm.nodes))


# What nodes answer to those who ask wrongly


async def refusal(swarm: TestSwarm, node: RunningNode, *calls: tuple[str, Message]) -> tuple[str, str]:
    """The last call's refusal."""
    stream = await swarm.client.host.open_stream(node.peer_id, [wire.PROTOCOL_ID], node.offer.addresses)
    async with lane.Lane(stream, node.peer_id) as opened:
        numbered = [
            (method, Message(header={"id": number, **message.header}, tensors=message.tensors))
            for number, (method, message) in enumerate(calls, 1)
        ]
        for method, message in numbered[:-1]:
            await opened.call(method, message, timeout_s=5)
        with pytest.raises(RpcError) as caught:
            await opened.call(*numbered[-1], timeout_s=5)
    return caught.value.code, caught.value.message


async def test_who_hands_on_may_come_before_the_session_is_opened(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 5)]) as swarm:
        [node] = swarm.nodes
        host, hidden = swarm.client.host, torch.randn(1, 3, 48)
        request = wire.Open(digest=node.offer.digest, start=0, end=5, batch=1, max_length=8)
        link = wire.Link(peer_id=node.peer_id, addresses=node.offer.addresses, token=request.push_token)
        pushing = await PushLink.open(host, link, Sender(Form.FLOAT32, may_compress=False))
        dtype, shape, data = to_wire(hidden)
        step = wire.Step(id=7, position=0).to_fields()
        await pushing.send(Message(header=step, tensors=[Tensor(dtype=dtype, shape=shape, data=data)]))
        stream = await host.open_stream(node.peer_id, [wire.PROTOCOL_ID], node.offer.addresses)
        messages = MessageStream(stream)
        await messages.send(encode(Message(header={"m": "open", "id": 1, **request.to_fields()})))
        with trio.fail_after(5):
            answers = [await messages.receive(), await messages.receive()]
        assert [None if each is None else each.header["id"] for each in answers] == [1, 7]
        pushing.end()
        await stream.aclose()


async def test_a_client_has_a_node_dial_few_and_only_where_it_may(
    odd: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarm_of(odd.folder, [(0, 5)]) as swarm:
        [node] = swarm.nodes
        dialled: list[tuple[str, ...]] = []

        async def connect(peer_id: PeerId, known: Sequence[Multiaddr] = (), **_: Any) -> Connection:
            dialled.append(tuple(map(str, known)))
            await trio.sleep_forever()
            raise AssertionError

        monkeypatch.setattr(node.host, "connect", connect)
        request = wire.Open(digest=node.offer.digest, start=0, end=5, batch=1, max_length=8)
        stream = await swarm.client.host.open_stream(node.peer_id, [wire.PROTOCOL_ID], node.offer.addresses)
        messages = MessageStream(stream)
        named = tuple(
            map(parse, ["/ip4/127.0.0.1/tcp/22", "/ip4/192.168.1.1/tcp/80", "/memory/77", "/dns/router/tcp/80"])
        )
        link = wire.Link(peer_id=seeded(77).peer_id, addresses=named, token=request.push_token)
        asked = [{"m": "open", **request.to_fields()}, *[{"m": "link", **link.to_fields()}] * (MAX_LINKS + 2)]
        answers: list[tuple[int, str]] = []
        for number, fields in enumerate(asked, 1):
            await messages.send(encode(Message(header={"id": number, **fields})))
        with trio.fail_after(5):
            while len(answers) < len(asked) - 1:  # the last link that was taken is still being made
                answer = await messages.receive()
                assert answer is not None
                answers.append((answer.header["id"], answer.header.get("e", "")))
        codes = dict(answers)
        assert codes.pop(1) == ""
        assert [codes.pop(MAX_LINKS + 2), codes.pop(MAX_LINKS + 3)] == ["busy", "busy"]
        assert set(codes.values()) == {"unreachable"}, "only the last one is to be reached"
        assert set(dialled) == {("/memory/77",)}
        await stream.aclose()


async def test_who_hands_on_to_nobody_is_let_go(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute.talking, "PUSH_WAIT_S", 0.05)
    async with swarm_of(odd.folder, [(0, 5)]) as swarm:
        [node] = swarm.nodes
        link = wire.Link(peer_id=node.peer_id, addresses=node.offer.addresses, token=os.urandom(wire.TOKEN_BYTES))
        pushing = await PushLink.open(swarm.client.host, link, Sender(Form.FLOAT32, may_compress=False))
        with trio.fail_after(5):
            await pushing.watch()
        assert pushing.is_over


async def test_what_a_node_refuses(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(1, 4)]) as swarm:
        [node] = swarm.nodes

        def ask(**changes: Any) -> tuple[str, Message]:
            fields = {"digest": node.offer.digest, "start": 1, "end": 4, "batch": 1, "max_length": 8}
            return "open", Message(header={**fields, "push_token": os.urandom(wire.TOKEN_BYTES), **changes})

        def step(position: Any, *shape: int, dtype: str = "f32", size: int = 4) -> tuple[str, Message]:
            tensor = Tensor(dtype=dtype, shape=shape, data=bytes(math.prod(shape) * size))
            return "step", Message(header={"position": position, **LONE}, tensors=[tensor])

        async def code(*calls: tuple[str, Message]) -> str:
            return (await refusal(swarm, node, *calls))[0]

        assert await code(ask(digest="0" * 64)) == "wrong-model"
        assert await code(ask(start=0)) == "wrong-span"
        assert await code(ask(end=5)) == "wrong-span"
        assert await code(ask(batch=0)) == "bad-input"
        assert await code(ask(batch=33)) == "bad-value"
        assert await code(ask(max_length=4096)) == "too-long"
        assert await code(ask(max_length=True)) == "bad-input"
        assert await code(ask(), ask()) == "bad-input"
        assert await code(ask(push_token=b"short")) == "bad-input"
        token = os.urandom(wire.TOKEN_BYTES)
        stream = await swarm.client.host.open_stream(node.peer_id, [wire.PROTOCOL_ID], node.offer.addresses)
        async with lane.Lane(stream, node.peer_id) as first:
            method, message = ask(push_token=token)
            await first.call(method, Message(header={"id": 1, **message.header}), timeout_s=5)
            assert await code(ask(push_token=token)) == "bad-value"
        assert await code(step(0, 1, 1, 48)) == "bad-input"
        assert await code(ask(), step(0, 1, 1, 47)) == "bad-shape"
        assert await code(ask(), step(0, 2, 1, 48)) == "bad-shape"
        assert await code(ask(), step(0, 1, 0, 48)) == "bad-shape"
        assert await code(ask(), step(0, 1, 9, 48)) == "too-long"
        assert await code(ask(), step(1, 1, 1, 48)) == "bad-position"
        assert await code(ask(), step(-1, 1, 1, 48)) == "bad-input"
        assert await code(ask(), step("0", 1, 1, 48)) == "bad-input"
        assert await code(ask(), step(0, 1, 1, 48, dtype="i64", size=8)) == "bad-dtype"
        assert await code(ask(), step(0, 1, 1, 48, dtype="u8", size=1)) == "bad-dtype"
        assert await code(ask(), ("step", Message(header={"position": 0, **LONE}))) == "bad-input"
        assert await code(("no-such-method", Message(header={}))) == "unknown-method"
        nan = Tensor(dtype="f32", shape=(1, 1, 48), data=torch.full((48,), math.nan).numpy().tobytes())
        assert await code(ask(), ("step", Message(header={"position": 0, **LONE}, tensors=[nan]))) == "not-finite"
        await until(lambda: node.sessions == 0)


async def test_other_weights_under_the_same_names_are_refused(odd: Reference, tmp_path: Path) -> None:
    """The digest of a model says which tensors there are; the digest of its weights, what is in them."""
    other = make_checkpoint(tmp_path / odd.folder.name, layers=5, heads=6, hidden=48, seed=99)
    assert Checkpoint.open(other).digest == Checkpoint.open(odd.folder).digest
    async with swarm_of(other, TWO) as swarm:
        model = await swarm.model(odd.folder)
        with pytest.raises(UnknownModel, match="hold other weights than the files here"):
            await blocking(lambda: greedy(model, PROMPT, 2))


@pytest.mark.parametrize("use_cache", [None, False, True])
async def test_a_session_of_the_model_that_ships_gives_what_one_call_gives(
    tiny: Reference, use_cache: bool | None
) -> None:
    """Whatever a generation config says of caches: the session is the cache."""
    options: dict[str, Any] = {} if use_cache is None else {"use_cache": use_cache}
    async with swarm_of(tiny.folder, [(0, 3), (3, 8)]) as swarm:
        model = await swarm.model(tiny.folder)

        def in_pieces() -> None:
            ids = PROMPT
            with model.session() as session:
                for count in (5, 5, 6):
                    ids = model.generate(
                        ids,
                        session=session,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=count,
                        do_sample=False,
                        **options,
                    )
            assert ids.tolist() == greedy(tiny.model, PROMPT, 16)

        await blocking(in_pieces)
        assert [node.node.engine.stats.tokens for node in swarm.nodes] == [PROMPT.shape[1] + 15] * 2


async def test_a_closed_session_stays_closed(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)

        def use_after_close() -> None:
            with model.session() as session:
                greedy(model, PROMPT, 2, session=session)
            with pytest.raises(ClientError, match="the session is closed"):
                greedy(model, PROMPT, 2, session=session)

        await blocking(use_after_close)
        await until(lambda: all(node.sessions == 0 for node in swarm.nodes))
