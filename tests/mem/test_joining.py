"""Nodes come, choose, announce, load and go."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import Any

import pytest
import torch
import trio

import compute.node
from compute.checkpoint import Checkpoint
from compute.errors import CheckpointError
from compute.node import Node
from compute.node_settings import NodeSettings
from compute.probe import Probe
from net.dht import keys
from net.dht.service import Dht
from net.errors import RpcError
from net.host import open_host
from net.identity import Identity
from net.protocol.announcement import DIRECTORY, KIND, NodeAnnouncement, read_all
from tests.mem.conftest import Reference
from tests.mem.swarms import ENGINE, RunningNode, TestSwarm, swarm_of

IDENTITIES = sorted((Identity.generate(bytes([n]) * 32) for n in range(1, 6)), key=lambda i: i.peer_id.to_bytes())


def covered(swarm: TestSwarm) -> set[int]:
    return {block for node in swarm.nodes for block in range(node.offer.start, node.offer.end)}


async def announced(swarm: TestSwarm) -> list[NodeAnnouncement]:
    """Everything in the directory, whatever its state."""
    records = await swarm.nodes[0].dht.find(keys.of_name(DIRECTORY), KIND) if swarm.nodes else []
    return read_all(records)


async def test_what_a_node_announces(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(1, 3)]) as swarm:
        checkpoint = Checkpoint.open(odd.folder)
        [served] = await swarm.client.models()
        [offer] = served.nodes
        assert (offer.model, offer.digest, offer.blocks) == ("odd-bloom", checkpoint.digest, 5)
        assert (offer.start, offer.end, offer.state) == (1, 3, "online")
        assert offer.weights == checkpoint.load_span(1, 3).digest
        assert (str(offer.numerics), offer.max_length) == ("float32", 2048)
        assert offer.cache_tokens_left == 16_384
        assert offer.decode_tokens_per_s > 0
        assert offer.peer_id == swarm.nodes[0].peer_id
        session = await swarm.nodes[0].node.engine.open_session(batch=1, max_length=8)
        await swarm.nodes[0].node.engine.step(session, torch.zeros(1, 8, 48), 0)
        await swarm.nodes[0].node._announce()
        [served] = await swarm.client.models()
        assert served.nodes[0].cache_tokens_left < 16_384


async def test_one_after_another(odd: Reference) -> None:
    async with swarm_of() as swarm:
        chosen = []
        for _ in range(3):
            node = await swarm.add_node(odd.folder, max_blocks=2)
            chosen.append((node.offer.start, node.offer.end))
        assert chosen == [(0, 2), (2, 4), (3, 5)]  # the last one: block 4, and the one beside it
        assert {offer.state for offer in await announced(swarm)} == {"online"}


async def test_no_limit_takes_all(odd: Reference) -> None:
    async with swarm_of() as swarm:
        node = await swarm.add_node(odd.folder)
        assert (node.offer.start, node.offer.end) == (0, 5)


async def test_a_node_that_goes_is_replaced_by_the_next(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 2), (2, 4), (4, 5)]) as swarm:
        await swarm.nodes[1].leave()
        node = await swarm.add_node(odd.folder, max_blocks=2)
        assert (node.offer.start, node.offer.end) == (2, 4)


async def test_other_models_do_not_count(odd: Reference, tiny: Reference) -> None:
    async with swarm_of(tiny.folder, [(0, 8)]) as swarm:
        node = await swarm.add_node(odd.folder, max_blocks=3)
        assert (node.offer.start, node.offer.end) == (0, 3)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
async def test_all_at_once(odd: Reference, order: tuple[int, ...]) -> None:
    """Whatever their PeerIds, nodes that come up together cover the model."""
    async with swarm_of() as swarm:
        async with trio.open_nursery() as nursery:
            for n in order:
                nursery.start_soon(partial(swarm.add_node, odd.folder, identity=IDENTITIES[n], max_blocks=2))
        assert covered(swarm) == set(range(5))


@pytest.mark.parametrize("forms", [("fp16", "fp32", "fp32"), ("fp32", "fp16", "fp32"), ("fp32", "fp32", "fp16")])
async def test_nodes_that_find_another_form_faster_agree(
    odd: Reference, forms: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has probed before it saw the others; a chain needs one form."""
    found = iter(forms)
    monkeypatch.setattr(compute.node, "probe", lambda *_: Probe(chosen=next(found), candidates=()))
    async with swarm_of() as swarm:
        async with trio.open_nursery() as nursery:
            for n in range(3):
                nursery.start_soon(
                    partial(swarm.add_node, odd.folder, identity=IDENTITIES[n], max_blocks=2, linear=None)
                )
        assert covered(swarm) == set(range(5))
        assert len({node.offer.numerics for node in swarm.nodes}) == 1


class Gate:
    """Holds one node's calls of a method until the test lets it on."""

    def __init__(self) -> None:
        self.reached = trio.Event()
        self.open = trio.Event()

    async def __call__(self) -> None:
        self.reached.set()
        await self.open.wait()


@pytest.mark.parametrize("junior_first", [True, False])
async def test_two_that_chose_before_they_saw_each_other(
    odd: Reference, junior_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has looked but not announced while the other announces, looks and begins to load."""
    senior, junior = IDENTITIES[0], IDENTITIES[1]
    slow, quick = (senior, junior) if junior_first else (junior, senior)
    gate = Gate()
    announce = Node._announce

    announced_by_slow = trio.Event()

    async def late(self: Node) -> None:
        if self._host.peer_id == slow.peer_id:
            await gate()
        await announce(self)
        if self._host.peer_id == slow.peer_id:
            announced_by_slow.set()

    monkeypatch.setattr(Node, "_announce", late)
    async with swarm_of() as swarm:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: swarm.add_node(odd.folder, identity=slow, max_blocks=3))
            await gate.reached.wait()
            settle = Node._settle

            async def settled(self: Node) -> tuple[int, int]:
                span = await settle(self)
                if self._host.peer_id == quick.peer_id:
                    gate.open.set()
                    await announced_by_slow.wait()
                return span

            monkeypatch.setattr(Node, "_settle", settled)
            nursery.start_soon(lambda: swarm.add_node(odd.folder, identity=quick, max_blocks=3))
        assert covered(swarm) == set(range(5))


async def test_a_joining_node_is_not_used(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    settle = Node._settle

    async def slowly(self: Node) -> tuple[int, int]:
        span = await settle(self)
        await gate()
        return span

    monkeypatch.setattr(Node, "_settle", slowly)
    async with swarm_of() as swarm, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: swarm.add_node(odd.folder))
        await gate.reached.wait()
        assert await swarm.client.models() == []
        gate.open.set()


async def test_a_node_that_cannot_load_takes_its_word_back(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise CheckpointError("shard 2 is missing")

    async with (
        swarm_of(odd.folder, [(0, 1)]) as swarm,
        open_host(Identity.generate(), transports=(swarm.network.transport(),)) as host,
    ):
        monkeypatch.setattr(Checkpoint, "load_span", fails)
        dht = Dht(host, server=True)
        await dht.join([swarm.bootstrap])
        broken = Node(host, dht, Checkpoint.open(odd.folder), NodeSettings(engine=ENGINE))
        with pytest.raises(CheckpointError, match="shard 2"):
            await broken.run()
        assert broken.stats == (0, 0)
        assert [offer.peer_id for offer in await announced(swarm)] == [swarm.nodes[0].peer_id]


async def test_leaving_withdraws_and_frees(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 5), (0, 5)]) as swarm:
        stays, goes = swarm.nodes
        session = await goes.node.engine.open_session(batch=1, max_length=4)
        await goes.node.engine.step(session, torch.zeros(1, 4, 48), 0)
        with trio.fail_after(5):
            await goes.leave()
        assert [offer.peer_id for offer in await announced(swarm)] == [stays.peer_id]
        assert goes.node.stats[0] == 0


async def test_announcements_are_renewed(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 5)]) as swarm:
        [node] = swarm.nodes
        node.node.announcement = dataclasses.replace(node.offer, decode_tokens_per_s=123.0)
        before = await newest(node)
        await node.dht._publish(keys.of_name(DIRECTORY))  # what happens every ``announce_s``
        after = await newest(node)
        assert after > before
        [served] = await swarm.client.models()
        assert served.nodes[0].decode_tokens_per_s == 123.0


async def newest(node: RunningNode) -> int:
    [record] = await node.dht.find(keys.of_name(DIRECTORY), KIND)
    return record.sequence


async def test_a_node_busy_with_loading_says_so(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 5)]) as swarm:
        [node] = swarm.nodes
        idle = Node(node.host, node.dht, Checkpoint.open(odd.folder), NodeSettings())
        with pytest.raises(RpcError, match="still loading") as caught:
            _ = idle.engine
        assert (caught.value.code, caught.value.retry_after_s) == ("busy", 1.0)
