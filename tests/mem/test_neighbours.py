"""How near a node's neighbours are, and how much waits at it: measured, and announced."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import torch
import trio
import trio.testing
from trio.testing import MockClock

from compute.neighbours import EVERY_S, FIRST_AFTER_S, JITTER, MOST, ROUND_S, Neighbours, Waiting, beside
from net import ping
from net.errors import DialError
from net.host import Host
from net.identity import PeerId
from net.io import receive_exactly, send
from net.mux.base import Stream
from net.protocol.announcement import NodeAnnouncement
from net.swarm import Connection
from tests.mem.conftest import Reference
from tests.mem.swarms import swarm_of
from tests.net_helpers import memory_hosts
from tests.unit.announcements import node

Answer = Callable[[Connection, Stream], Awaitable[None]]


def answer_after(*delays_s: float) -> Answer:
    """Pings take so long, the last one over and over."""

    async def answer(_: Connection, stream: Stream) -> None:
        left = list(delays_s)
        while True:
            data = await receive_exactly(stream, ping.PING_BYTES)
            await trio.sleep(left.pop(0) if len(left) > 1 else left[0])
            await send(stream, data)

    return answer


def serve_pings(host: Host, answer: Answer) -> None:
    host.unhandle(ping.PROTOCOL_ID)
    host.handle(ping.PROTOCOL_ID, answer)


def offer_of(host: Host, start: int, end: int) -> NodeAnnouncement:
    return replace(node(1, start, end), peer_id=host.peer_id, addresses=tuple(host.addresses))


def neighbours_of(host: Host, nodes: list[NodeAnnouncement], span: tuple[int, int] | None = (0, 4)) -> Neighbours:
    async def find() -> list[NodeAnnouncement]:
        await trio.lowlevel.checkpoint()
        return nodes

    return Neighbours(host, find, lambda: span)


def test_who_is_next_to_a_span() -> None:
    offered = [
        node(1, 0, 3),
        node(2, 0, 2),
        node(3, 2, 3),
        node(4, 3, 6),  # the very same blocks, and none beside
        node(5, 4, 6),
        node(6, 6, 8),
        node(7, 5, 7),
        node(8, 7, 8),
        node(9, 0, 8),
        node(10, 6, 8, state="joining"),
    ]
    numbers = {offer.peer_id: number for number, offer in enumerate(offered, 1)}
    assert [numbers[each.peer_id] for each in beside((3, 6), offered)] == [1, 3, 6, 7, 9]
    assert beside((0, 8), offered) == []


async def test_the_shortest_of_some_pings_counts(autojump_clock: MockClock) -> None:
    async with memory_hosts(3) as (own, one, other):
        serve_pings(one, answer_after(0.3, 0.1, 0.2))
        serve_pings(other, answer_after(0.02))
        neighbours = neighbours_of(own, [offer_of(one, 4, 8), offer_of(other, 2, 6)])
        await neighbours.measure()
        assert neighbours.round_trips == pytest.approx({one.peer_id: 0.1, other.peer_id: 0.02})


async def test_later_ones_count_half(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as (own, one):
        serve_pings(one, answer_after(0.1))
        neighbours = neighbours_of(own, [offer_of(one, 4, 8)])
        await neighbours.measure()
        serve_pings(one, answer_after(0.3))
        await neighbours.measure()
        assert neighbours.round_trips == pytest.approx({one.peer_id: 0.2})
        await neighbours.measure()
        assert neighbours.round_trips == pytest.approx({one.peer_id: 0.25})


async def test_who_does_not_answer_or_is_not_beside_us_is_forgotten(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with memory_hosts(3) as (own, one, other):
        nodes = [offer_of(one, 4, 8), offer_of(other, 4, 8)]
        neighbours = neighbours_of(own, nodes)
        await neighbours.measure()
        assert set(neighbours.round_trips) == {one.peer_id, other.peer_id}
        serve_pings(one, answer_after(1e6))
        with caplog.at_level(logging.INFO):
            began = trio.current_time()
            await neighbours.measure()
            assert trio.current_time() - began <= ROUND_S
        assert set(neighbours.round_trips) == {other.peer_id}
        assert [record.levelno for record in caplog.records if "round trip" in record.message] == [logging.INFO]
        nodes[1] = offer_of(other, 0, 4)
        await neighbours.measure()
        assert neighbours.round_trips == {}


async def test_without_blocks_there_are_no_neighbours(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as (own, one):
        neighbours = neighbours_of(own, [offer_of(one, 4, 8)], None)
        await neighbours.measure()
        assert neighbours.round_trips == {}


async def test_a_few_are_measured_and_mostly_the_nearest(autojump_clock: MockClock) -> None:
    async with memory_hosts(13) as hosts:
        for number, host in enumerate(hosts[1:]):
            serve_pings(host, answer_after(0.01 * (number + 1)))
        neighbours = neighbours_of(hosts[0], [offer_of(host, 4, 8) for host in hosts[1:]])
        seen: set[PeerId] = set()
        for _ in range(40):
            await neighbours.measure()
            assert len(neighbours.round_trips) == MOST
            seen.update(neighbours.round_trips)
        assert len(seen) == 12  # everybody has had a chance
        assert {host.peer_id for host in hosts[1:6]} <= set(neighbours.round_trips)


async def test_they_are_measured_soon_and_then_now_and_then(autojump_clock: MockClock) -> None:
    random.seed(1)
    times: list[float] = []
    told: list[float] = []
    async with memory_hosts(3) as (own, one, other):
        nodes = [offer_of(one, 4, 8)]

        async def find() -> list[NodeAnnouncement]:
            await trio.lowlevel.checkpoint()
            times.append(trio.current_time())
            if len(times) == 2:
                raise DialError("nobody")
            if len(times) == 4:
                nodes.append(offer_of(other, 4, 8))
            return nodes

        neighbours = Neighbours(own, find, lambda: (0, 4))
        began = trio.current_time()
        with trio.move_on_after(5 * EVERY_S):
            await neighbours.watch(lambda: told.append(trio.current_time()))
    assert times[0] - began <= FIRST_AFTER_S * (1 + JITTER)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(EVERY_S * (1 - JITTER) <= pause <= EVERY_S * (1 + JITTER) + 1 for pause in pauses)
    assert told == pytest.approx([times[0], times[3]])


def test_how_much_waits() -> None:
    waiting = Waiting(lambda: 0)
    assert waiting.average == 0.0
    for _ in range(300):
        waiting.note(4, 1.0)
    assert waiting.average == 4.0
    for _ in range(30):
        waiting.note(0, 1.0)
    assert waiting.average == pytest.approx(4 / 2.718, abs=0.05)
    for _ in range(300):
        waiting.note(0, 1.0)
    assert waiting.average == 0.0


async def test_how_much_waits_is_counted_all_the_time(autojump_clock: MockClock) -> None:
    waiting = Waiting(lambda: 3)
    with trio.move_on_after(300):
        await waiting.watch()
    assert waiting.average == 3.0


async def test_a_node_announces_how_near_its_neighbours_are(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compute.neighbours.FIRST_AFTER_S", 0.05)
    async with swarm_of(odd.folder, [(0, 3), (3, 5), (1, 2)]) as swarm:
        first, last, within = (running.peer_id for running in swarm.nodes)
        with trio.fail_after(10):
            while True:
                offers = {offer.peer_id: offer for offer in await swarm.client.nodes()}
                found = {peer: set(offer.round_trips) for peer, offer in offers.items()}
                if found == {first: {last}, last: {first}, within: {first}}:
                    break
                for running in swarm.nodes:
                    await running.node._neighbours.measure()
                    await running.node._announce()
        assert all(0 < seconds < 5 for offer in offers.values() for seconds in offer.round_trips.values())
        node_ = swarm.nodes[0].node
        session = await node_.engine.open_session(batch=1, max_length=8)
        await node_.engine.step(session, torch.zeros(1, 8, 48), 0)
        node_._waiting.note(8, 1e3)
        await node_._announce()
        offers = {offer.peer_id: offer for offer in await swarm.client.nodes()}
        assert 4.0 < offers[first].waiting <= 8.0  # it is counted on meanwhile
        await node_.pause("a test")
        await node_._neighbours.measure()
        assert node_._neighbours.round_trips == {}
