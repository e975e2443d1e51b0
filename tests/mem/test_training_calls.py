"""Training calls from end to end: what comes back, and what nodes and lines can do to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
import trio

from client.routing import Hop
from client.tuning.calls import RemoteCaller
from compute.checkpoint import Checkpoint
from compute.tuning import SpanTuning
from net.nurseries import open_service_nursery
from tests.checkpoints import make_checkpoint
from tests.mem.swarms import RunningNode, TestSwarm, swarm_of
from tests.unit.tunings import BOTH, FORMS, make_tuning

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
async def caller_of(swarm: TestSwarm) -> AsyncIterator[RemoteCaller]:
    async with open_service_nursery() as nursery:
        yield RemoteCaller(swarm.client.host, nursery)
        nursery.cancel_scope.cancel()


def tuning_of(folder: Path, form: object, start: int, end: int, seed: int = 0) -> SpanTuning:
    config = Checkpoint.open(folder).config
    return make_tuning(form, seed, start=start, end=end, config=config)  # type: ignore[arg-type]


@pytest.mark.parametrize("blocks", [(0, 4), (1, 3)])
async def test_a_call_gives_what_its_blocks_give(folder: Path, blocks: tuple[int, int]) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, caller_of(swarm) as caller:
        [node] = swarm.nodes
        start, end = blocks
        hop, digest = hop_of(node, start, end), node.offer.digest
        hidden, gradient = noise(3, 7, WIDTH), noise(3, 7, WIDTH, seed=1)
        given = await caller.forward(hop, digest, hidden, None)
        assert torch.equal(given, await node.node.engine.forward(hidden, start=start, end=end))
        back, flat = await caller.backward(hop, digest, hidden, gradient, None)
        expected = await node.node.engine.backward(hidden, gradient, start=start, end=end)
        assert torch.equal(back, expected.hidden)
        assert flat is None


@pytest.mark.parametrize("form", FORMS)
async def test_a_call_with_a_tuning_gives_what_its_blocks_give_with_it(folder: Path, form: object) -> None:
    async with swarm_of(folder, [(0, 4)]) as swarm, caller_of(swarm) as caller:
        [node] = swarm.nodes
        hop, digest = hop_of(node, 1, 4), node.offer.digest
        hidden, gradient = noise(3, 7, WIDTH), noise(3, 7, WIDTH, seed=1)
        tuning = tuning_of(folder, form, 1, 4)
        given = await caller.forward(hop, digest, hidden, tuning)
        plain = await node.node.engine.forward(hidden, start=1, end=4)
        assert torch.equal(given, await node.node.engine.forward(hidden, start=1, end=4, tuning=tuning))
        assert not torch.equal(given, plain)
        back, flat = await caller.backward(hop, digest, hidden, gradient, tuning)
        expected = await node.node.engine.backward(hidden, gradient, start=1, end=4, tuning=tuning)
        assert flat is not None and expected.tuning is not None
        assert torch.equal(back, expected.hidden)
        assert torch.equal(flat, expected.tuning)


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
