"""Which nodes sessions use: those that are near, quick and wanted; and that they move when better ones come."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import trio

import client.directory
import client.session
from client.models.cache import SessionCache
from net.identity import PeerId
from net.protocol.announcement import NodeAnnouncement
from tests.mem.conftest import Reference
from tests.mem.swarms import TestSwarm, blocking, swarm_of, until
from tests.mem.test_sessions import PROMPT, greedy


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
    monkeypatch.setattr(client.session, "BETTER_EVERY_S", (0.0, 0.0))
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
    monkeypatch.setattr(client.session, "BETTER_EVERY_S", (0.0, 0.0))
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
