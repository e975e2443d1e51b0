"""Sessions whose nodes are lost from sight, under virtual time: nodes without a model, on lines that can be cut."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest
import torch
import trio
import trio.testing
from trio.testing import MockClock

from client.errors import ClientError, InvalidInput, MissingBlocks, SessionFailed
from client.session import Session
from net.addresses import parse
from net.errors import RpcError
from net.host import Host, open_host
from net.protocol import session as wire
from net.protocol.announcement import NodeAnnouncement
from net.reputation import Reputation
from net.transports.memory import MemoryNetwork
from tests.mem.fake_nodes import FakeNode
from tests.mem.lines import Line, LineTransport
from tests.net_helpers import seeded

HALVES = [(0, 2), (2, 4)]
HIDDEN = torch.ones(1, 3, 8)


@dataclass(kw_only=True, eq=False)
class World:
    host: Host
    network: MemoryNetwork
    nursery: trio.Nursery
    nodes: list[FakeNode] = field(default_factory=list)

    async def add(self, span: tuple[int, int]) -> FakeNode:
        number = len(self.nodes) + 1
        node = FakeNode(identity=seeded(number), span=span, port=number)
        self.nodes.append(node)
        await self.put(node)
        return node

    async def put(self, node: FakeNode) -> None:
        """Have it listen where it announces itself."""
        await self.nursery.start(self._run, node)

    async def _run(self, node: FakeNode, *, task_status: trio.TaskStatus[None]) -> None:
        async with AsyncExitStack() as stack:
            transport = LineTransport(self.network, node.line)
            where = [parse(f"/memory/{node.port}")]
            host = await stack.enter_async_context(open_host(node.identity, listen=where, transports=[transport]))
            host.handle(wire.PROTOCOL_ID, node.serve)
            task_status.started()
            await trio.sleep_forever()

    async def move(self, node: FakeNode, after_s: float = 0.0) -> None:
        """The node loses its connections without a word, and is elsewhere from some time later on."""
        node.line.cut()
        await trio.sleep(after_s)
        node.line, node.port = Line(), node.port + 100
        await self.put(node)

    async def find_nodes(self, *, fresh: bool = True) -> list[NodeAnnouncement]:
        await trio.lowlevel.checkpoint()
        return [node.offer for node in self.nodes]

    async def end_connections(self, node: FakeNode) -> None:
        for connection in self.host.swarm.connections:
            if connection.peer_id == node.peer_id:
                connection.mux.close()
                await connection.ended.wait()


@asynccontextmanager
async def new_world(*spans: tuple[int, int]) -> AsyncIterator[tuple[World, Session]]:
    """Nodes, and a session that has not begun."""
    network = MemoryNetwork()
    async with open_host(seeded(90), transports=[network.transport()]) as host, trio.open_nursery() as nursery:
        world = World(host=host, network=network, nursery=nursery)
        for span in spans:
            await world.add(span)
        session = Session(host, world.find_nodes, nursery, Reputation(None))
        yield world, session
        await session.aclose()
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def world_of(*spans: tuple[int, int]) -> AsyncIterator[tuple[World, Session]]:
    """Nodes, and a session that has made a step with the first ones."""
    async with new_world(*spans) as (world, session):
        assert torch.equal(await session.step(HIDDEN), HIDDEN)
        yield world, session


async def timed(session: Session) -> float:
    """Seconds that a step takes."""
    began = trio.current_time()
    assert torch.equal(await session.step(HIDDEN), HIDDEN)
    return trio.current_time() - began


async def test_the_first_step_is_sent_right_behind_the_question_whether_it_may_come(autojump_clock: MockClock) -> None:
    async with new_world((0, 4)) as (world, session):
        [node] = world.nodes
        node.open_s = 1.0
        began = trio.current_time()
        assert await timed(session) == pytest.approx(1, abs=0.1)
        assert node.arrivals == [("open", began), ("step", began)]
        assert node.calls == [("open", began), ("step", began + 1)]


async def test_a_node_too_busy_to_open_a_session_is_asked_again_and_then_given_the_step(
    autojump_clock: MockClock,
) -> None:
    async with new_world((0, 4)) as (world, session):
        [node] = world.nodes
        node.busy = [RpcError("busy", "later", 1.0), RpcError("busy", "later", 2.0)]
        assert await timed(session) == pytest.approx(3, abs=0.1)
        assert [method for method, _ in node.calls] == ["open", "open", "open", "step"]
        assert await timed(session) < 0.1
        assert node.count("step") == 2


async def test_a_node_that_is_too_busy_too_often_is_given_up(autojump_clock: MockClock) -> None:
    async with new_world((0, 4)) as (world, session):
        [node] = world.nodes
        node.busy = [RpcError("busy", "later", 1.0)] * 100
        with pytest.raises(ClientError, match="put off 5 times"):
            await session.step(HIDDEN)


async def test_what_is_too_much_for_a_node_is_the_callers_fault(autojump_clock: MockClock) -> None:
    async with new_world((0, 4)) as (world, session):
        [node] = world.nodes
        node.busy = [RpcError("too-long", "at most 100 tokens")]
        with pytest.raises(InvalidInput, match="at most 100 tokens"):
            await session.step(HIDDEN)
        assert await timed(session) < 0.1  # the next one may be


async def test_a_leg_not_at_work_is_resumed_while_another_one_computes(autojump_clock: MockClock) -> None:
    async with world_of(*HALVES) as (world, session):
        first, second = world.nodes
        first.step_s = 5.0

        async def lose() -> None:
            await trio.sleep(1)
            await world.end_connections(second)

        world.nursery.start_soon(lose)
        began = trio.current_time()
        assert await timed(session) == pytest.approx(5, abs=0.1)  # nobody waited for it
        [resumed_at] = [at for method, at in second.calls if method == "resume"]
        assert resumed_at - began == pytest.approx(1, abs=0.1)
        assert [node.count("open") for node in world.nodes] == [1, 1]
        assert [node.count("step") for node in world.nodes] == [2, 2]  # nothing was sent again


@pytest.mark.parametrize("at_work", [False, True])
async def test_a_node_that_comes_back_elsewhere_is_found_and_nothing_is_replayed(
    at_work: bool, autojump_clock: MockClock
) -> None:
    """Where it was, nobody answers any more: whoever asks there waits in vain."""
    async with world_of(*HALVES) as (world, session):
        first, second = world.nodes
        worker = second if at_work else first
        worker.step_s = 3.0
        world.nursery.start_soon(_after, 1.0, lambda: world.nursery.start_soon(world.move, second, 0.5))
        # Missed after 1.5 s, its announcement found after another one, and then perhaps its step once more.
        assert await timed(session) <= (1.0 + 1.5 + 1.25 + 3.0 if at_work else 3.0 + 1.0)
        assert [node.count("open") for node in world.nodes] == [1, 1]
        assert second.count("resume") == 1
        assert first.count("step") == 2
        assert second.count("step") == (3 if at_work else 2)  # the step that was cut off is asked for again
        assert [hop.node.peer_id for hop in session.chain] == [first.peer_id, second.peer_id]
        assert await timed(session) <= 3.1


async def _after(seconds: float, then: Callable[[], None]) -> None:
    await trio.sleep(seconds)
    then()


@pytest.mark.parametrize("vanishes_after_s", [0.2, 4.0])
async def test_a_node_at_work_that_vanishes_is_missed_soon(vanishes_after_s: float, autojump_clock: MockClock) -> None:
    """Whatever time its step may take."""
    async with world_of((0, 4), (0, 4)) as (world, session):
        used = next(node for node in world.nodes if node.count("open"))
        used.step_s = 30.0
        world.nursery.start_soon(_after, vanishes_after_s, used.line.cut)
        assert await timed(session) <= vanishes_after_s + 0.5 + 1.0 + 1.5 + 0.5  # a look, its answer, its return


async def test_a_node_that_does_not_come_back_is_replaced_soon_where_others_can(autojump_clock: MockClock) -> None:
    async with world_of((0, 4), (0, 4)) as (world, session):
        used = next(node for node in world.nodes if node.count("open"))
        other = next(node for node in world.nodes if node is not used)
        await trio.sleep(1)
        used.line.cut()
        await world.end_connections(used)
        assert await timed(session) <= 0.3  # nobody waits for the lost one when another one is there
        assert (other.count("open"), other.count("step")) == (1, 1)  # what was before, and this step with it


async def test_a_node_that_nobody_can_replace_is_waited_for_and_then_missed(autojump_clock: MockClock) -> None:
    async with world_of(*HALVES) as (world, session):
        lost = world.nodes[1]
        await trio.sleep(1)
        lost.line.cut()
        await world.end_connections(lost)
        began = trio.current_time()
        with pytest.raises(ClientError):
            await session.step(HIDDEN)
        assert 12 + 20 <= trio.current_time() - began <= 12 + 20 + 8.5  # and then tries to open it anew
        assert session.position == HIDDEN.shape[1]


async def test_a_node_that_starts_anew_after_a_while_is_given_the_session_again(autojump_clock: MockClock) -> None:
    """It was missed for longer than it would have kept the session, and nobody could take its place."""
    async with world_of(*HALVES) as (world, session):
        lost = world.nodes[1]
        world.nursery.start_soon(world.move, lost, 25.0)
        await trio.sleep(24)
        lost.held.clear()
        assert await timed(session) <= 12 + 8.5
        assert lost.count("open") == 2
        assert lost.count("step") == 3  # the history once more, and this step


async def test_a_node_that_keeps_failing_is_asked_less_and_less_often(autojump_clock: MockClock) -> None:
    async with world_of(*HALVES) as (world, session):
        bad = world.nodes[1]
        bad.refuses = RpcError("internal", "a bug")
        await trio.sleep(1)
        began = trio.current_time()
        with pytest.raises(MissingBlocks, match=r"blocks 2:4 .*a bug") as caught:
            await session.step(HIDDEN)
        assert caught.value.missing == [(2, 4)]
        assert trio.current_time() - began == pytest.approx(20, abs=1)
        asked = [at - began for method, at in bad.calls if method == "open" and at >= began]
        assert asked == pytest.approx([0, 0.5, 1.5, 3.5, 7.5, 11.5, 15.5, 19.5], abs=0.3)
        bad.refuses = None
        assert await timed(session) <= 4  # it is still to be left alone
        asked_at = trio.current_time()
        bad.refuses = RpcError("internal", "again")
        world.nursery.start_soon(_after, 0.2, lambda: setattr(bad, "refuses", None))
        assert await timed(session) <= 1  # a step that it did makes up for what was before
        assert trio.current_time() - asked_at <= 1


async def test_nodes_that_fail_from_the_beginning_are_not_waited_for_long(autojump_clock: MockClock) -> None:
    async with world_of((0, 4)) as (world, session):
        await session.aclose()
        world.nodes[0].refuses = RpcError("internal", "a bug")
        another = Session(world.host, world.find_nodes, world.nursery, Reputation(None))
        began = trio.current_time()
        with pytest.raises(MissingBlocks, match="a bug"):
            await another.step(HIDDEN)
        assert trio.current_time() - began == pytest.approx(4, abs=0.6)
        await another.aclose()


async def test_many_nodes_that_fail_are_not_all_tried(autojump_clock: MockClock) -> None:
    async with world_of(*[(0, 4)] * 12) as (world, session):
        for node in world.nodes:
            node.refuses = RpcError("internal", "a bug")
            node.step_s = 3.0
        with pytest.raises(SessionFailed, match=r"nodes failed one after another for 20 s.*a bug"):
            await session.step(HIDDEN)
        assert sum(node.count("open") for node in world.nodes) == 1 + 7


async def test_a_step_that_is_cancelled_during_a_move_leaves_the_session_with_one_stream(
    autojump_clock: MockClock,
) -> None:
    async with world_of((0, 4)) as (world, session):
        [node] = world.nodes
        node.resume_s = 0.5
        await world.end_connections(node)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.step, HIDDEN)
            await node.moving.wait()
            await trio.sleep(0.1)
            nursery.cancel_scope.cancel()
        assert (node.freed, len(node.held)) == (0, 1)
        assert await timed(session) <= 1
        assert (node.count("open"), node.count("resume")) == (1, 1)
        assert node.count("step") == 2  # the one that was cancelled had not been sent


async def test_a_session_that_is_closed_during_a_move_is_freed(autojump_clock: MockClock) -> None:
    """The node has given it to the new stream by then."""
    async with world_of((0, 4)) as (world, session):
        [node] = world.nodes
        node.resume_s = 0.5
        await world.end_connections(node)
        await node.moving.wait()
        await trio.sleep(0.1)
        await session.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert (node.freed, len(node.held)) == (1, 0)
        assert await timed(session) <= 1
        assert node.count("open") == 2


@pytest.mark.parametrize("later", range(4))
async def test_a_step_that_is_asked_for_while_the_session_is_closed_begins_it_anew(
    later: int, autojump_clock: MockClock
) -> None:
    async with world_of((0, 4)) as (world, session):
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                closing = trio.Event()

                async def close() -> None:
                    closing.set()
                    await session.aclose()

                nursery.start_soon(close)
                await closing.wait()
                for _ in range(later):
                    await trio.lowlevel.checkpoint()
                assert torch.equal(await session.step(HIDDEN), HIDDEN)
        assert world.nodes[0].count("open") == 2


async def test_a_node_that_has_forgotten_the_session_is_replaced_at_once(autojump_clock: MockClock) -> None:
    async with world_of((0, 4)) as (world, session):
        [node] = world.nodes
        node.held.clear()
        await world.end_connections(node)
        assert await timed(session) <= 1
        assert node.count("open") == 2
        assert node.count("step") == 2  # the history once more, and this step with it


async def test_a_node_that_puts_a_move_off_holds_up_no_cancellation(autojump_clock: MockClock) -> None:
    async with world_of((0, 4)) as (world, session):
        [node] = world.nodes
        node.puts_off = RpcError("busy", "later", 10.0)
        await world.end_connections(node)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.step, HIDDEN)
            await node.moving.wait()
            cancelled_at = trio.current_time()
            nursery.cancel_scope.cancel()
        assert trio.current_time() - cancelled_at <= 5


async def test_whoever_waits_is_told_why(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    async with world_of(*HALVES) as (world, session):
        lost = world.nodes[1]
        await trio.sleep(1)
        world.nursery.start_soon(world.move, lost, 1.0)
        assert await timed(session) <= 3
        assert not caplog.records  # it was soon over
        lost.line.cut()
        await world.end_connections(lost)
        with pytest.raises(ClientError):
            await session.step(HIDDEN)
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert told[0] == f"lost {lost.peer_id} (blocks 2:4); looking for it for 10 s"
        assert told[1].startswith("replacing a node: ")
        assert told[2].startswith("waiting for nodes: blocks 2:4 ")


async def test_another_node_is_asked_beside_one_that_does_not_open_the_session(autojump_clock: MockClock) -> None:
    """Whoever is there first is used; nobody is blamed."""
    async with new_world((0, 4), (0, 4), (0, 4)) as (world, session):
        for node in world.nodes:
            node.open_s = 30.0
        world.nodes[2].open_s = 0.0
        assert await timed(session) <= 0.8 + 0.8 + 0.1
        assert [hop.node.peer_id for hop in session.chain] == [world.nodes[2].peer_id]
        assert sum(node.count("open") for node in world.nodes) <= 3


async def test_a_node_that_is_silent_for_a_moment_keeps_the_session(autojump_clock: MockClock) -> None:
    async with world_of((0, 4), (0, 4)) as (world, session):
        used, other = sorted(world.nodes, key=lambda node: -node.count("open"))
        used.step_s, other.open_s = 2.0, 1.0
        world.nursery.start_soon(_after, 0.4, used.line.stall)
        world.nursery.start_soon(_after, 1.3, used.line.resume)
        assert await timed(session) == pytest.approx(2.0, abs=0.1)
        assert (used.count("open"), other.count("open")) == (1, 1)
        assert [hop.node.peer_id for hop in session.chain] == [used.peer_id]


async def test_nobody_else_is_asked_while_all_is_well(autojump_clock: MockClock) -> None:
    async with world_of((0, 4), (0, 4)) as (world, session):
        used, other = sorted(world.nodes, key=lambda node: -node.count("open"))
        used.step_s = 1.9
        for _ in range(3):
            assert await timed(session) == pytest.approx(1.9, abs=0.1)
        assert not other.arrivals
        assert not any(connection.peer_id == other.peer_id for connection in world.host.swarm.connections)
