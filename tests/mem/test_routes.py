"""Which nodes sessions use: those that are near, quick and wanted; and that they move when better ones come."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

import client.core.chain
import client.directory
import client.session
from client.errors import InvalidInput, MissingBlocks
from client.models.cache import SessionCache
from client.swarm import AsyncSwarm
from net.identity import Identity, PeerId
from net.protocol.announcement import NodeAnnouncement
from tests.mem.conftest import Reference
from tests.mem.swarms import TestSwarm, blocking, generate, swarm_of, until
from tests.mem.test_sessions import OTHER, PROMPT, StopsAfter, greedy


async def test_nodes_are_looked_at_while_a_session_runs(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 5), (0, 5), (0, 5)]) as swarm:
        model = await swarm.model(odd.folder)
        assert await blocking(lambda: greedy(model, PROMPT, 4)) == greedy(odd.model, PROMPT, 4)
        peers = {node.peer_id for node in swarm.nodes}
        nearness = swarm.client._nearness
        await until(lambda: nearness.round_trips(peers).keys() == peers)
        assert all(0 < seconds < 5 for seconds in nearness.round_trips(peers).values())
        assert nearness.relayed(peers) == dict.fromkeys(peers, False)


async def test_a_node_that_is_far_slower_than_it_says_is_not_believed(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 5), (0, 5)]) as swarm:
        liar, honest = (node.peer_id for node in swarm.nodes)
        for _ in range(20):
            swarm.client.reputation.succeeded(liar, 0.5)
            swarm.client.reputation.succeeded(honest, 1e-4)
        model = await swarm.model(odd.folder)

        def route() -> list[tuple[str, int, int]]:
            with model.session() as session:
                assert greedy(model, PROMPT, 4, session=session) == greedy(odd.model, PROMPT, 4)
                return session.route

        for _ in range(3):
            assert await blocking(route) == [(str(honest), 0, 5)]


class Routes:
    """A streamer that notes the route at each token."""

    def __init__(self, session: SessionCache, routes: list[list[tuple[str, int, int]]]) -> None:
        self._session = session
        self._routes = routes

    def put(self, value: torch.Tensor) -> None:
        if self._session.route:  # not before the prompt
            self._routes.append(self._session.route)

    def end(self) -> None:
        """The last token has been put."""


class Waits(torch.nn.Module):
    """Embeddings that hold a generation up until a condition is met, from some call on."""

    def __init__(self, embeddings: torch.nn.Module, calls: int, met: trio.Event) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.calls = calls
        self.met = met

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls -= 1
        if self.calls < 0:
            trio.from_thread.run(self.met.wait)
        output: torch.Tensor = self.embeddings(ids)
        return output


def announce_speed(swarm: TestSwarm, speeds: dict[PeerId, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the client read other speeds than nodes announce."""
    look_up = swarm.client._directory._look_up

    async def look_up_changed() -> list[NodeAnnouncement]:
        found = await look_up()
        return [dataclasses.replace(n, decode_tokens_per_s=speeds.get(n.peer_id, 1000.0)) for n in found]

    monkeypatch.setattr(swarm.client._directory, "_look_up", look_up_changed)


@pytest.mark.parametrize("spans", [[(0, 5)], [(0, 2), (2, 5)], [(0, 1), (1, 3), (3, 5)]])
async def test_a_session_moves_to_a_much_faster_node(
    odd: Reference, spans: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.session, "BETTER_EVERY_S", (0.02, 0.02))
    monkeypatch.setattr(client.directory, "RECENT_S", 0.0)
    async with swarm_of(odd.folder, spans) as swarm:
        slow = [node.peer_id for node in swarm.nodes]
        announce_speed(swarm, dict.fromkeys(slow, 0.5), monkeypatch)
        model = await swarm.model(odd.folder)
        expected = greedy(odd.model, PROMPT, 60)
        routes: list[list[tuple[str, int, int]]] = []
        there = trio.Event()
        model.embeddings = Waits(model.embeddings, 6, there)  # type: ignore[assignment]

        def session_of_all() -> list[list[int]]:
            with model.session() as session:
                streamer: Any = Routes(session, routes)
                return greedy(model, PROMPT, 60, session=session, streamer=streamer)

        async def add() -> None:
            await swarm.add_node(odd.folder, (1, 5))
            there.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(add)
            assert await blocking(session_of_all) == expected
        assert {peer for peer, _, _ in routes[0]} <= {str(peer) for peer in slow}
        assert routes[-1][-1] == (str(swarm.nodes[-1].peer_id), 1, 5)
        assert routes[-1][0][1:] == (0, 1)
        assert len(dict.fromkeys(map(tuple, routes))) == 2  # one move
        await until(lambda: [node.sessions for node in swarm.nodes] == [0] * len(swarm.nodes))


async def test_a_session_stays_where_others_are_no_better(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.session, "BETTER_EVERY_S", (0.02, 0.02))
    monkeypatch.setattr(client.directory, "RECENT_S", 0.0)
    async with swarm_of(odd.folder, [(0, 2), (2, 5), (0, 2), (2, 5), (0, 5)]) as swarm:
        announce_speed(swarm, {node.peer_id: 20.0 + number for number, node in enumerate(swarm.nodes)}, monkeypatch)
        model = await swarm.model(odd.folder)
        routes: list[list[tuple[str, int, int]]] = []

        def session_of_all() -> list[list[int]]:
            with model.session() as session:
                streamer: Any = Routes(session, routes)
                return greedy(model, PROMPT, 40, session=session, streamer=streamer)

        assert await blocking(session_of_all) == greedy(odd.model, PROMPT, 40)
        assert len(dict.fromkeys(map(tuple, routes))) == 1


async def routes_of(swarm: TestSwarm, odd: Reference, **options: Any) -> list[tuple[str, int, int]]:
    """The chain of a session of a model with these options, which gives the right tokens."""
    model = await swarm.client.model(str(odd.folder), **options)

    def route() -> list[tuple[str, int, int]]:
        with model.session() as session:
            assert greedy(model, PROMPT, 5, session=session) == greedy(odd.model, PROMPT, 5)
            return session.route

    return await blocking(route)


async def test_who_is_to_be_used(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 5), (0, 5), (0, 5)]) as swarm:
        one, two, three = (str(node.peer_id) for node in swarm.nodes)
        assert await routes_of(swarm, odd, allow=[two]) == [(two, 0, 5)]
        assert await routes_of(swarm, odd, block=[one, swarm.nodes[1].peer_id]) == [(three, 0, 5)]
        pins = {(1, 2): one, (4, 5): three}
        chain = await routes_of(swarm, odd, pins=pins)
        assert {peer for peer, start, end in chain if start <= 1 < end} == {one}
        assert {peer for peer, start, end in chain if start <= 4 < end} == {three}
        model = await swarm.client.model(str(odd.folder), block=[one])

        def others() -> None:
            with model.session(allow=[three]) as session:
                session.prepare(1)
                assert session.route == [(three, 0, 5)]
            with model.session(block=[], allow=[one]) as session:
                session.prepare(1)
                assert session.route == [(one, 0, 5)]
            nobody = str(Identity.generate(bytes(32)).peer_id)
            with (
                pytest.raises(MissingBlocks, match="blocks 0:5 of odd-bloom are served by peers alone that are not"),
                model.session(allow=[nobody]) as session,
            ):
                session.prepare(1)
            with pytest.raises(InvalidInput, match="is no PeerId"):
                model.session(allow=["me"])

        await blocking(others)


async def test_a_blocked_node_replaces_nobody(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.core.chain, "WAIT_S", 0.5)
    async with swarm_of(odd.folder, [(0, 5), (0, 5)]) as swarm:
        used, blocked = swarm.nodes
        model = await swarm.client.model(str(odd.folder), block=[blocked.peer_id])
        streamer = StopsAfter(3, lambda: trio.from_thread.run(used.die))
        with pytest.raises(MissingBlocks):
            await blocking(lambda: greedy(model, PROMPT, 8, streamer=streamer))
        assert blocked.sessions == 0


async def test_numerics_are_mixed_only_where_that_was_said(odd: Reference, caplog: pytest.LogCaptureFixture) -> None:
    async with swarm_of(odd.folder) as swarm:
        await swarm.add_node(odd.folder, (0, 2), linear="fp32")
        await swarm.add_node(odd.folder, (2, 5), linear="int8")
        model = await swarm.model(odd.folder)
        with pytest.raises(MissingBlocks, match="different numerics"):
            await blocking(lambda: greedy(model, PROMPT, 3))

        def mixed() -> int:
            with model.session(mixed_numerics=True) as session:
                return len(greedy(model, PROMPT, 3, session=session)[0]) - PROMPT.shape[1]

        assert await blocking(mixed) == 3
        assert "blocks are computed with different numerics: float32, float32/int8" in caplog.text


# Blocks that are computed here

SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "seed": 5}
BEAMS: dict[str, Any] = {"do_sample": False, "num_beams": 3}


@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED, BEAMS, {**SAMPLED, "num_return_sequences": 2}])
@pytest.mark.parametrize(("local_blocks", "spans"), [(1, [(1, 4)]), (2, [(0, 2), (1, 5)]), (1, [(0, 2), (2, 5)])])
async def test_first_and_last_blocks_here(
    odd: Reference, local_blocks: int, spans: list[tuple[int, int]], options: dict[str, Any]
) -> None:
    async with swarm_of(odd.folder, spans) as swarm:
        model = await swarm.client.model(str(odd.folder), local_blocks=local_blocks)
        ours = await blocking(lambda: generate(model, PROMPT, max_new_tokens=80, **options))
        assert ours == generate(odd.model, PROMPT, max_new_tokens=80, **options)


async def test_a_session_with_blocks_here_goes_back_and_on(odd: Reference) -> None:
    ids = torch.randint(3, 300, (1, 600), generator=torch.Generator().manual_seed(3))
    async with swarm_of(odd.folder, [(0, 3), (3, 5)]) as swarm:
        model = await swarm.client.model(str(odd.folder), local_blocks=1)

        def back_and_on() -> None:
            with model.session() as session:
                assert [(start, end) for _, start, end in session.route] == []
                for prompt in (PROMPT, PROMPT[:, :4], OTHER, ids):
                    assert greedy(model, prompt, 5, session=session) == greedy(odd.model, prompt, 5)
                assert [(start, end) for _, start, end in session.route] == [(1, 3), (3, 4)]
                session.position = 3
                expected = greedy(odd.model, ids, 5)
                assert greedy(model, ids, 3, session=session) == greedy(odd.model, ids, 3)
                with pytest.raises(InvalidInput, match="the session has 1 rows, not 2"):
                    model(torch.cat([PROMPT, PROMPT]), past_key_values=session)
                assert greedy(model, ids, 5, session=session) == expected

        await blocking(back_and_on)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
        batch = torch.cat([PROMPT, PROMPT.flip(1)])
        assert await blocking(lambda: greedy(model, batch, 6, attention_mask=mask)) == greedy(
            odd.model, batch, 6, attention_mask=mask
        )
        logits = await blocking(lambda: model(batch, attention_mask=mask).logits)
        with torch.inference_mode():
            theirs = odd.model(batch, attention_mask=mask).logits
        assert torch.allclose(logits[1], theirs[1], atol=1e-4)


@pytest.mark.parametrize("options", [{"do_sample": False}, SAMPLED])
async def test_drafts_with_blocks_here(tiny: Reference, options: dict[str, Any]) -> None:
    ids = torch.tensor([[11, 12, 13, 14, 15, 16, 17] * 6])
    async with swarm_of(tiny.folder, [(2, 4), (4, 6)]) as swarm:
        model = await swarm.client.model(str(tiny.folder), local_blocks=2)
        expected = generate(tiny.model, ids, max_new_tokens=60, **options)
        assert await blocking(lambda: generate(model, ids, max_new_tokens=60, draft="auto", **options)) == expected
        drafted = await blocking(lambda: generate(model, ids, max_new_tokens=60, draft=tiny.model, **options))
        assert drafted == expected


async def test_blocks_here_and_nodes_that_die(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 5), (0, 5)]) as swarm:
        first, second = swarm.nodes
        model = await swarm.client.model(str(odd.folder), local_blocks=1)

        def replaced() -> None:
            with model.session() as session:
                session.prepare(1)
                [(peer, _, _)] = session.route
                used, other = (first, second) if peer == str(first.peer_id) else (second, first)
                streamer = StopsAfter(4, lambda: trio.from_thread.run(used.die))
                ours = greedy(model, PROMPT, 9, session=session, streamer=streamer)
                assert ours == greedy(odd.model, PROMPT, 9)
                assert session.route == [(str(other.peer_id), 1, 4)]

        await blocking(replaced)


async def test_hidden_states_of_blocks_here(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(1, 3), (3, 4)]) as swarm:
        model = await swarm.client.model(str(odd.folder), local_blocks=1)
        ids = torch.randint(3, 300, (2, 160), generator=torch.Generator().manual_seed(4))
        ours = await blocking(lambda: model(ids, output_hidden_states=True).hidden_states)
        with torch.inference_mode():
            theirs = odd.model(ids, output_hidden_states=True).hidden_states
        assert len(ours) == len(theirs) == 6
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one, other, atol=1e-5 * float(other.abs().max()))


async def test_forks_and_saved_sessions_with_blocks_here(odd: Reference, tmp_path: Path) -> None:
    async with swarm_of(odd.folder, [(0, 3), (3, 5)]) as swarm:
        model = await swarm.client.model(str(odd.folder), local_blocks=1)

        def three() -> None:
            with model.session() as trunk:
                first = torch.tensor(greedy(model, PROMPT, 5, session=trunk))
                trunk.save(tmp_path / "saved")
                with trunk.fork() as branch, model.load_session(tmp_path / "saved") as loaded:
                    for each in (branch, loaded, trunk):
                        assert torch.equal(each.ids, first)
                        assert greedy(model, first, 5, session=each) == greedy(odd.model, PROMPT, 10)

        await blocking(three)


async def test_blocks_here_are_too_many(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 5)]) as swarm:
        with pytest.raises(InvalidInput, match="local_blocks is 3: give 0 to 2"):
            await swarm.client.model(str(odd.folder), local_blocks=3)


async def test_a_model_reaches_out_to_the_nodes_that_it_may_use(
    odd: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their connections are there when the first session needs them."""
    reached: list[tuple[int, int]] = []

    async def connect(_: AsyncSwarm, node: NodeAnnouncement) -> None:
        reached.append((node.start, node.end))
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(AsyncSwarm, "_try_to_connect", connect)
    async with swarm_of(odd.folder, [(0, 2), (2, 5), (0, 5)]) as swarm:
        await swarm.client.model(str(odd.folder), block=[str(swarm.nodes[2].peer_id)])
        await until(lambda: len(reached) == 2)
        assert sorted(reached) == [(0, 2), (2, 5)]
