"""Batches through chains: cut by shape alone, counted once, whoever fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from client.errors import InvalidInput, MissingBlocks, SessionFailed
from client.pricing import Hop
from client.tuning.trainer import Passed, Trainer, part_rows
from compute.bloom import BloomConfig
from compute.tuning import SpanTuning, TuningForm
from net import errors
from net.identity import PeerId
from net.protocol.announcement import NodeAnnouncement
from net.reputation import Reputation
from tests.unit.announcements import node

BLOCKS, WIDTH = 6, 8
CONFIG = BloomConfig.from_json(
    {"model_type": "bloom", "n_layer": BLOCKS, "hidden_size": WIDTH, "n_head": 2, "vocab_size": 16}
)
FORM = TuningForm(prompts=2)
WEIGHTS = torch.randn(BLOCKS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5


def block(number: int, hidden: Tensor, prompt: Tensor) -> Tensor:
    """Something in the place of a block: [c, t, d] to [c, t, d]."""
    hidden = torch.cat([hidden[:, :2] + prompt, hidden[:, 2:]], dim=1)
    return hidden + torch.tanh(hidden @ WEIGHTS[number])


@dataclass(eq=False)
class FakeCaller:
    """Nodes that compute here; ``fails`` says which calls do not come back."""

    fails: Callable[[Hop, str], bool] = lambda hop, what: False
    calls: list[tuple[str, PeerId, int, int, int]] = field(default_factory=list)

    async def _turn(self, hop: Hop, what: str, rows: int) -> None:
        await trio.lowlevel.checkpoint()
        self.calls.append((what, hop.node.peer_id, hop.start, hop.end, rows))
        if self.fails(hop, what):
            raise errors.PeerFailed(hop.node.peer_id, "fell over")

    def _run(self, hop: Hop, hidden: Tensor, prompts: list[Tensor]) -> Tensor:
        for number in range(hop.start, hop.end):
            hidden = block(number, hidden, prompts[number - hop.start])
        return hidden

    async def forward(self, hop: Hop, digest: str, hidden: Tensor, tuning: SpanTuning | None) -> Tensor:
        await self._turn(hop, "forward", hidden.shape[0])
        assert tuning is not None
        assert (tuning.start, tuning.end) == (hop.start, hop.end)
        return self._run(hop, hidden, [tuning.block_tensors(number)[0] for number in range(hop.start, hop.end)])

    async def backward(
        self, hop: Hop, digest: str, hidden: Tensor, gradient: Tensor, tuning: SpanTuning | None
    ) -> tuple[Tensor, Tensor | None]:
        await self._turn(hop, "backward", hidden.shape[0])
        assert tuning is not None
        leaf = hidden.clone().requires_grad_(True)
        prompts = [tuning.block_tensors(n)[0].clone().requires_grad_(True) for n in range(hop.start, hop.end)]
        upstream = gradient
        states = [leaf]
        with torch.enable_grad():
            for number in range(hop.start, hop.end):  # block by block, so that bits do not depend on cuts
                states.append(block(number, states[-1].detach().requires_grad_(True), prompts[number - hop.start]))
        given: list[Tensor] = []
        for number in reversed(range(hop.start, hop.end)):
            own = states[number - hop.start].detach().requires_grad_(True)
            with torch.enable_grad():
                output = block(number, own, prompts[number - hop.start])
            upstream, of_prompt = torch.autograd.grad(output, [own, prompts[number - hop.start]], upstream)
            given.insert(0, of_prompt)
        return upstream, torch.cat([each.reshape(-1) for each in given])


def nodes(*spans: tuple[int, int]) -> list[NodeAnnouncement]:
    return [node(number, start, end, blocks=BLOCKS) for number, (start, end) in enumerate(spans)]


def make(caller: FakeCaller, served: list[NodeAnnouncement], *, patience_s: float = 30.0) -> Trainer:
    async def find(*, fresh: bool = True) -> list[NodeAnnouncement]:
        await trio.lowlevel.checkpoint()
        return served

    return Trainer(caller, find, Reputation(None, trio.current_time), "0" * 64, patience_s=patience_s)


def inputs(rows: int, tokens: int = 100) -> tuple[Tensor, SpanTuning, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    flat = torch.randn(FORM.n_elements(CONFIG, 0, BLOCKS), generator=generator)
    return (
        torch.randn(rows, tokens, WIDTH, generator=generator),
        SpanTuning.from_flat(FORM, CONFIG, 0, BLOCKS, flat),
        torch.randn(rows, tokens, WIDTH, generator=generator),
    )


def run(trainer: Trainer, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and both gradients, on a clock that jumps."""
    hidden, tuning, gradient = inputs(rows)

    async def main() -> tuple[Tensor, Tensor, Tensor]:
        output, passed = await trainer.forward(hidden, 0, BLOCKS, tuning)
        back, flat = await trainer.backward(passed, gradient)
        assert flat is not None
        return output, back, flat

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_gradients_are_those_of_one_machine() -> None:
    hidden, tuning, gradient = inputs(9)
    leaf, prompts = hidden.clone().requires_grad_(True), tuning.flat().requires_grad_(True)
    state = leaf
    for number, prompt in enumerate(prompts.view(BLOCKS, 2, WIDTH)):
        state = block(number, state, prompt)
    back, flat = torch.autograd.grad(state, [leaf, prompts], gradient)
    found = run(make(FakeCaller(), nodes((0, 3), (3, 6), (0, 6))), 9)
    for one, other in zip(found, (state, back, flat), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_chains_of_other_nodes_give_the_same_bits() -> None:
    alone = run(make(FakeCaller(), nodes((0, 6))), 9)
    for spans in ([(0, 2), (2, 6)], [(0, 3), (3, 6), (0, 3), (3, 6)], [(0, 1), (0, 6), (1, 5), (5, 6)]):
        assert equal(run(make(FakeCaller(), nodes(*spans)), 9), alone)


def test_a_batch_is_spread_over_parallel_chains() -> None:
    caller = FakeCaller()
    run(make(caller, nodes((0, 6), (0, 6))), 16)
    forwards = [peer for what, peer, *_ in caller.calls if what == "forward"]
    assert len(set(forwards)) == 2
    assert min(forwards.count(peer) for peer in set(forwards)) >= 2


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    spans=st.lists(st.sampled_from([(0, 6), (0, 3), (3, 6), (0, 2), (2, 4), (4, 6), (1, 5)]), max_size=4),
    failing=st.lists(st.integers(0, 60), max_size=12),
)
def test_failures_change_no_bit_and_nothing_is_counted_twice(
    rows: int, spans: list[tuple[int, int]], failing: list[int]
) -> None:
    counter = iter(range(10_000))
    served = nodes(*spans, (0, 6))
    faulty = FakeCaller(lambda hop, what: next(counter) in failing)
    assert equal(run(make(faulty, served), rows), run(make(FakeCaller(), nodes((0, 6))), rows))


def test_a_node_that_is_lost_on_the_way_back_costs_its_own_hop_alone() -> None:
    first, second, spare = nodes((0, 3), (3, 6), (2, 6))
    down = {second.peer_id}
    caller = FakeCaller(lambda hop, what: what == "backward" and hop.node.peer_id in down)
    hidden, tuning, gradient = inputs(1)

    async def main() -> None:
        served = [first, second]
        trainer = make(caller, served)
        _, passed = await trainer.forward(hidden, 0, BLOCKS, tuning)
        served.append(spare)
        caller.calls.clear()
        await trainer.backward(passed, gradient)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert [(what, peer, start, end) for what, peer, start, end, _ in caller.calls] == [
        ("backward", second.peer_id, 3, 6),
        ("backward", spare.peer_id, 3, 6),
        ("backward", first.peer_id, 0, 3),
    ]


def test_what_nobody_serves_any_more_is_waited_for_and_then_named() -> None:
    first, second = nodes((0, 3), (3, 6))
    gone = FakeCaller(lambda hop, what: hop.node.peer_id == second.peer_id)
    hidden, tuning, _ = inputs(1)

    async def main() -> None:
        with pytest.raises((MissingBlocks, SessionFailed)):
            await make(gone, [first, second], patience_s=5).forward(hidden, 0, BLOCKS, tuning)
        assert 5 <= trio.current_time() < 30
        served = [first]
        trainer = make(FakeCaller(), served, patience_s=5)

        async def come_back() -> None:
            await trio.sleep(2)
            served.append(second)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(come_back)
            await trainer.forward(hidden, 0, BLOCKS, tuning)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_callers_fault_is_not_tried_again_and_blames_nobody() -> None:
    class Strict(FakeCaller):
        async def forward(self, hop: Hop, digest: str, hidden: Tensor, tuning: SpanTuning | None) -> Tensor:
            await super().forward(hop, digest, hidden, tuning)
            raise InvalidInput("too long")

    caller = Strict()
    trainer = make(caller, nodes((0, 6)))
    hidden, tuning, _ = inputs(1)

    async def main() -> None:
        with pytest.raises(InvalidInput, match="too long"):
            await trainer.forward(hidden, 0, BLOCKS, tuning)

    trio.run(main)
    assert len(caller.calls) == 1


@pytest.mark.parametrize(("spans", "tries"), [([(0, 6)], 3), ([(0, 6), (0, 6)], 2)])
def test_numbers_that_overflow_are_the_callers_after_some_tries(spans: list[tuple[int, int]], tries: int) -> None:
    class Overflowing(FakeCaller):
        async def forward(self, hop: Hop, digest: str, hidden: Tensor, tuning: SpanTuning | None) -> Tensor:
            await super().forward(hop, digest, hidden, tuning)
            refused = errors.RpcError("bad-output", "the model gave NaN")
            raise errors.PeerFailed(hop.node.peer_id, str(refused)) from refused

    caller = Overflowing()
    trainer = make(caller, nodes(*spans))
    hidden, tuning, _ = inputs(1)

    async def main() -> None:
        with pytest.raises(InvalidInput, match="diverged"):
            await trainer.forward(hidden, 0, BLOCKS, tuning)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert len(caller.calls) == tries


def test_all_batches_keep_to_one_class_of_numerics() -> None:
    one, other = nodes((0, 6), (0, 6))
    other = replace(other, numerics=replace(other.numerics, quantization="nf4"), decode_tokens_per_s=1e6)
    hidden, tuning, _ = inputs(1)
    served = [one]

    async def main() -> tuple[Passed, FakeCaller]:
        caller = FakeCaller()
        trainer = make(caller, served)
        await trainer.forward(hidden, 0, BLOCKS, tuning)
        served.append(other)
        _, passed = await trainer.forward(hidden, 0, BLOCKS, tuning)
        return passed, caller

    _, caller = trio.run(main)
    assert {peer for _, peer, *_ in caller.calls} == {one.peer_id}


@pytest.mark.parametrize(
    ("rows", "tokens", "expected"),
    [(8, 128, 2), (1, 5, 1), (64, 16, 16), (16, 2048, 1), (256, 4, 32), (256, 128, 8), (256, 1, 32)],
)
def test_how_a_batch_is_cut_depends_on_its_shape_alone(rows: int, tokens: int, expected: int) -> None:
    assert part_rows(rows, tokens) == expected
