"""Nodes die in the middle of training, and not a bit of what is trained differs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

from client.pricing import Hop
from client.tuning import DeepPromptTuning, LoRA
from client.tuning.calls import Caller
from client.tuning.tuned import Tuned
from compute.tuning import SpanTuning
from tests.checkpoints import make_checkpoint
from tests.mem.swarms import Span, TestSwarm, blocking, swarm_of

STEPS, KILLS = 200, 100
SPANS: list[Span] = [(0, 2), (2, 3), (0, 3), (1, 3), (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("faults") / "made-bloom", layers=3, heads=2, hidden=16)


class Killer:
    """A caller whose calls, some of them, kill the node that they are made to; another one comes in its place.

    Attributes:
        owed: How many nodes are to die.
        spared: So many calls come before the next death.
        kills: How many have died.
    """

    def __init__(self, caller: Caller, swarm: TestSwarm, folder: Path) -> None:
        self._caller = caller
        self._swarm = swarm
        self._folder = folder
        self.owed = self.spared = self.kills = 0

    async def _maybe_kill(self, hop: Hop) -> None:
        if not self.owed:
            return
        self.spared -= 1
        node = next((each for each in self._swarm.nodes if each.peer_id == hop.node.peer_id), None)
        if self.spared > 0 or node is None:  # one that is dead already
            return
        self._swarm.nodes.remove(node)
        self.owed -= 1
        self.kills += 1
        self._swarm.nursery.start_soon(self._replace, node, (node.offer.start, node.offer.end))

    async def _replace(self, node: Any, span: Span) -> None:
        await node.die()
        await self._swarm.add_node(self._folder, span)

    async def forward(self, hop: Hop, digest: str, hidden: Tensor, tuning: SpanTuning | None) -> Tensor:
        await self._maybe_kill(hop)
        return await self._caller.forward(hop, digest, hidden, tuning)

    async def backward(
        self, hop: Hop, digest: str, hidden: Tensor, gradient: Tensor, tuning: SpanTuning | None
    ) -> tuple[Tensor, Tensor | None]:
        await self._maybe_kill(hop)
        return await self._caller.backward(hop, digest, hidden, gradient, tuning)


async def train(folder: Path, spans: list[Span], *, is_deadly: bool) -> tuple[str, list[float]]:
    """The digest of what is trained, and the losses on the way."""
    async with swarm_of(folder, spans) as swarm:
        torch.manual_seed(1)
        model = await swarm.client.model(str(folder), tuning=[LoRA(rank=2), DeepPromptTuning(2)])
        tuned = model.tuned
        assert isinstance(tuned, Tuned)
        trainer = await blocking(lambda: model.blocks.trainer)
        trainer._caller = killer = Killer(trainer._caller, swarm, folder)
        optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(2)

        def step() -> float:
            ids = torch.randint(4, 320, (4, 80), generator=generator)  # two parts
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        losses, chance = [], random.Random(3)
        for number in range(STEPS):
            if is_deadly and not number % 2:
                killer.owed, killer.spared = killer.owed + 1, chance.randrange(6)
            with trio.fail_after(60):
                losses.append(await blocking(step))
        assert killer.kills + killer.owed == (KILLS if is_deadly else 0)
        assert killer.owed <= 1
        return tuned.digest(), losses


async def test_a_death_every_second_step_changes_no_bit(folder: Path) -> None:
    expected, losses = await train(folder, [(0, 3)], is_deadly=False)
    assert losses[-1] < losses[0]
    digest, others = await train(folder, SPANS, is_deadly=True)
    assert others == losses
    assert digest == expected
