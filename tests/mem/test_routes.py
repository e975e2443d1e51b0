"""Which nodes sessions use: those that are near, quick and wanted; and that they move when better ones come."""

from __future__ import annotations

from tests.mem.conftest import Reference
from tests.mem.swarms import blocking, swarm_of, until
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
