"""Run-ahead speculation through real nodes: the same tokens, whatever is drafted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trio

import client.drafting.runner
from client.drafting.policy import DraftPolicy
from client.errors import InvalidInput
from tests.mem.conftest import Reference
from tests.mem.swarms import blocking, generate, swarm_of

SPANS = [(0, 3), (3, 5), (5, 8)]
PROMPTS = {
    "repetitive": torch.tensor([[11, 12, 13, 14, 15, 16, 17] * 6]),
    "any": torch.tensor([[40, 41, 90, 17, 200, 33, 12]]),
}


class SteadyPolicy(DraftPolicy):
    """Is told that steps take what they would through the internet, so that a busy machine does not change its mind."""

    def observe_alone(self, tokens: int, seconds: float) -> None:
        super().observe_alone(tokens, 0.02 + 0.0005 * tokens)

    def observe_own(self, seconds: float) -> None:
        super().observe_own(0.0)

    def observe_wait(self, seconds: float, *, plain: bool) -> None:
        super().observe_wait(0.02, plain=plain)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7, "seed": 5}])
async def test_drafted_tokens_are_those_of_one_machine(
    tiny: Reference, prompt: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.drafting.runner, "DraftPolicy", SteadyPolicy)
    ids = PROMPTS[prompt]
    async with swarm_of(tiny.folder, SPANS) as swarm:
        model = await swarm.model(tiny.folder)
        expected = generate(tiny.model, ids, max_new_tokens=60, **options)
        ours = await blocking(lambda: generate(model, ids, max_new_tokens=60, draft="auto", **options))
        assert ours == expected
        steps = [node.node.engine.stats.steps for node in swarm.nodes]
        if prompt == "repetitive" and not options["do_sample"]:
            assert max(steps) < 60  # several tokens in a step


async def test_a_model_of_ones_own_drafts(tiny: Reference) -> None:
    ids = PROMPTS["any"]
    async with swarm_of(tiny.folder, SPANS) as swarm:
        model = await swarm.model(tiny.folder)
        ours = await blocking(lambda: generate(model, ids, max_new_tokens=40, do_sample=False, draft=tiny.model))
        assert ours == generate(tiny.model, ids, max_new_tokens=40, do_sample=False)


async def test_a_session_goes_on_after_drafting(tiny: Reference) -> None:
    ids = PROMPTS["repetitive"]
    async with swarm_of(tiny.folder, SPANS) as swarm:
        model = await swarm.model(tiny.folder)

        def in_pieces() -> list[list[int]]:
            with model.session() as session:
                grown = ids
                for draft in ("auto", None, "auto"):
                    rows = generate(model, grown, max_new_tokens=15, do_sample=False, session=session, draft=draft)
                    grown = torch.tensor(rows)
                    assert session.position == grown.shape[1] - 1
                found: list[list[int]] = grown.tolist()
            return found

        assert await blocking(in_pieces) == generate(tiny.model, ids, max_new_tokens=45, do_sample=False)


async def test_drafting_outlives_a_node(tiny: Reference) -> None:
    ids = PROMPTS["repetitive"]
    async with swarm_of(tiny.folder, SPANS) as swarm:
        model = await swarm.model(tiny.folder)
        await swarm.add_node(tiny.folder, (3, 5))

        def in_the_midst() -> list[list[int]]:
            with model.session() as session:
                first = torch.tensor(generate(model, ids, max_new_tokens=10, do_sample=False, session=session))
                used = {peer for peer, _, _ in session.route}
                victim = next(n for n in swarm.nodes if n.offer.start == 3 and str(n.peer_id) in used)
                trio.from_thread.run(victim.die)
                return generate(model, first, max_new_tokens=30, do_sample=False, session=session, draft="auto")

        assert await blocking(in_the_midst) == generate(tiny.model, ids, max_new_tokens=40, do_sample=False)


async def test_what_cannot_draft(tiny: Reference) -> None:
    async with swarm_of(tiny.folder, [(0, 8)]) as swarm:
        model = await swarm.model(tiny.folder)
        with pytest.raises(InvalidInput, match="draft is None"):
            await blocking(lambda: generate(model, PROMPTS["any"], max_new_tokens=3, draft="always"))
        two = PROMPTS["any"].repeat(2, 1)
        rows = await blocking(lambda: generate(model, two, max_new_tokens=5, do_sample=False, draft="auto"))
        assert rows == generate(tiny.model, two, max_new_tokens=5, do_sample=False)
