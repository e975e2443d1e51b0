"""A span on several GPUs gives the bits of one, and everything is where it belongs: on GPUs that are not there."""

from __future__ import annotations

import gc
import itertools
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from compute import checkpoint as checkpoint_module
from compute.batch import Piece, Plan, Runner, Work
from compute.bloom import BloomBlock, BloomSpan, Step
from compute.bloom import graphs as graphs_module
from compute.bloom.graphs import Record, Replay, SpanGraphs, attach_graphs
from compute.cache import KVCache, SlotMemory, free_cache_tokens
from compute.errors import CheckpointError
from compute.estimates import Kind
from compute.linear import backend
from compute.models import find_checkpoint
from compute.slots import Change, Copy, Place, Slot
from tests.unit.engines import hidden_states, make_span
from tests.unit.fake_gpus import CPU, FIRST, SECOND, fake_gpus, on_gpus

SPLITS = [(FIRST, SECOND, SECOND), (FIRST, FIRST, SECOND), (SECOND, FIRST, SECOND)]


@pytest.fixture(autouse=True)
def gpus() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with fake_gpus():
        yield
    torch.set_num_threads(before)


def play_again(function: Replay) -> Replay:
    function()
    return function


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """For which GPUs recorders were made, whose recordings run again as they are."""
    made: list[torch.device] = []

    def recorder(device: torch.device) -> Record:
        made.append(device)
        return play_again

    monkeypatch.setattr(graphs_module, "cuda_recorder", recorder)
    return made


def sessions(span: BloomSpan, lengths: Sequence[int]) -> list[Step]:
    """With so many tokens each, about to have another one."""
    steps = []
    for number, length in enumerate(lengths):
        cache = KVCache.alone(span, 2, 64)
        hidden = hidden_states(2, length + 1, seed=number).to(span.device)
        if length:
            span(hidden[:, :length], cache)
        steps.append(Step(hidden[:, length:], cache, length))
    return steps


def same_cache(one: SlotMemory, other: SlotMemory) -> bool:
    return all(
        torch.equal(mine.cpu(), theirs.cpu())
        for layers in zip(one.layers, other.layers, strict=True)
        for mine, theirs in zip(*layers, strict=True)
    )


# Spans


def test_stages_are_runs_of_blocks_on_one_device() -> None:
    span = on_gpus(make_span(linear=None), SPLITS[0])
    assert (span.stages, span.devices) == ((range(1), range(1, 3)), [FIRST, SECOND])
    assert (span.device, span.numerics) == (FIRST, ("float32", "none", "cuda"))
    part = span.part(1, 3)
    assert (part.stages, part.device) == ((range(2),), SECOND)
    assert make_span().stages == (range(3),)


@pytest.mark.parametrize("devices", SPLITS)
@torch.inference_mode()
def test_steps_one_by_one_and_together_have_the_bits_of_one_device(devices: tuple[torch.device, ...]) -> None:
    one = make_span(linear=None)
    several = on_gpus(one, devices)
    lengths = [0, 3, 17]
    ours, expected = sessions(several, lengths), sessions(one, lengths)
    for mine, theirs in zip(ours, expected, strict=True):
        assert same_cache(mine.cache.own, theirs.cache.own)  # type: ignore[attr-defined]  # KVCache
    for output, exact in zip(several.steps(ours), one.steps(expected), strict=True):
        assert output.device == devices[-1]
        assert torch.equal(output.cpu(), exact)
    for mine, theirs in zip(ours, expected, strict=True):
        output = several(mine.hidden, mine.cache, mine.position)
        assert torch.equal(output.cpu(), one(theirs.hidden, theirs.cache, theirs.position))


@torch.inference_mode()
def test_some_blocks_after_others_move_along() -> None:
    one = make_span(linear=None)
    several = on_gpus(one, SPLITS[0])
    hidden = hidden_states(2, 9)
    expected = one(hidden, KVCache.alone(one, 2, 64))
    for cuts in ([0, 1, 3], [0, 2, 3], [0, 1, 2, 3]):
        cache, between = KVCache.alone(several, 2, 64), hidden.to(FIRST)
        for first, last in itertools.pairwise(cuts):
            between = several(between, cache, 0, first, last)
        assert torch.equal(between.cpu(), expected)


def test_gradients_go_back_over_all_devices() -> None:
    one = make_span(linear=None)
    several = on_gpus(one, SPLITS[0])
    ours, expected = hidden_states(2, 5).requires_grad_(True), hidden_states(2, 5).requires_grad_(True)
    several(ours.to(FIRST)).square().sum().backward()
    one(expected).square().sum().backward()
    assert ours.grad is not None and expected.grad is not None
    assert torch.equal(ours.grad, expected.grad)


# Caches


@torch.inference_mode()
def test_keys_and_values_lie_with_their_blocks_wherever_they_are_copied() -> None:
    one = make_span(linear=None)
    several = on_gpus(one, SPLITS[1])
    copies: list[SlotMemory] = []
    for span in (one, several):
        (step,) = sessions(span, [7])
        longer = SlotMemory(span, 2, 128)
        longer.copy(step.cache.own, 0, 0, 7, torch.tensor([1, 0]))  # type: ignore[attr-defined]  # KVCache
        copies.append(longer)
    assert same_cache(*copies)
    assert [part.device for layer in copies[1].layers for part in layer] == [FIRST] * 4 + [SECOND] * 2
    parts = [part for layer in copies[1].layers for part in layer]
    copies[1].wipe()
    assert not any(part.any() for part in parts)


@torch.inference_mode()
def test_a_shared_beginning_is_read_on_every_device() -> None:
    one = make_span(linear=None)
    outputs = []
    for span in (one, on_gpus(one, SPLITS[0])):
        hidden = hidden_states(2, 12).to(span.device)
        first = KVCache.alone(span, 2, 32)
        span(hidden[:, :6], first)
        outputs.append(span(hidden[:, 6:], KVCache(SlotMemory(span, 2, 16), first.own, 6), 6).cpu())
    assert torch.equal(*outputs)


def test_the_tightest_device_bounds_the_cache() -> None:
    span = on_gpus(make_span(linear=None), SPLITS[0])  # one block and two
    block_bytes, output_bytes = 2 * 64 * 4, 64 * 4  # of a token
    room = {FIRST: 100 * block_bytes, SECOND: 120 * block_bytes, CPU: 1000 * output_bytes}
    assert free_cache_tokens(span, room.__getitem__) == 60
    room[FIRST] = 50 * block_bytes
    assert free_cache_tokens(span, room.__getitem__) == 50
    room[CPU] = 40 * output_bytes  # what beginnings gave is kept there
    assert free_cache_tokens(span, room.__getitem__) == 40


# What the engine's thread does


@torch.inference_mode()
def follow(runner: Runner, work: Work, cuts: Sequence[int], changes: Sequence[tuple[Change, Work | None]] = ()) -> None:
    units = work.hidden.shape[work.dim]
    for number, (first, last) in enumerate(itertools.pairwise(cuts)):
        piece = Piece(work=work, start=0, stop=units, first=first, last=last)
        plan = Plan(changes=changes if not number else (), pieces=[piece])
        assert runner.run(plan) == [None]


@pytest.mark.parametrize("cuts", [[0, 6], [0, 1, 2, 3, 4, 5, 6], [0, 2, 4, 6]])
def test_training_has_the_bits_of_one_device(cuts: list[int]) -> None:
    one = make_span(linear=None)
    results = []
    for span in (one, on_gpus(one, SPLITS[0]), on_gpus(one, SPLITS[2])):
        work = Work(kind=Kind.BACKWARD, span=span, hidden=hidden_states(2, 5), gradient=hidden_states(2, 5, seed=2))
        follow(Runner(), work, cuts)
        forward = Work(kind=Kind.FORWARD, span=span, hidden=hidden_states(2, 5))
        follow(Runner(), forward, [0, 2, 3])
        results.append((work.result(), forward.result()))
    for ours in results[1:]:
        for mine, expected in zip(ours, results[0], strict=True):
            assert torch.equal(mine, expected)


def test_a_session_that_grows_has_the_bits_of_one_device() -> None:
    one = make_span(linear=None)
    results = []
    for span in (one, on_gpus(one, SPLITS[0])):
        runner, hidden = Runner(), hidden_states(2, 10)
        short, long = Slot(rows=2, length=8, index=0), Slot(rows=2, length=16, index=0)
        granted = Change(granted=short)
        grown = Change(
            granted=long,
            copies=(Copy(source=short, source_first=0, target_first=0, start=0, stop=8),),
            left=(short,),
        )
        outputs = []
        for kind, change, slot, start, end in [
            (Kind.PREFILL, granted, short, 0, 8),
            (Kind.DECODE, grown, long, 8, 9),
            (Kind.DECODE, Change(), long, 9, 10),
        ]:
            place = Place(shared_slot=None, shared=0, slot=slot, length=start)
            work = Work(kind=kind, span=span, hidden=hidden[:, start:end], position=start, place=place)
            follow(runner, work, [0, 3], [(change, work)])
            outputs.append(work.result())
        results.append(torch.cat(outputs, dim=1))
    assert torch.equal(*results)


# Graphs


@torch.inference_mode()
def test_each_gpu_has_graphs_of_its_own_blocks(recorders: list[torch.device]) -> None:
    one = make_span(linear=None)
    several = on_gpus(one, SPLITS[0])
    expected = one.steps(sessions(one, [3, 8]))
    attach_graphs(several)
    assert recorders == [FIRST, SECOND]
    for _ in range(2):  # recorded, and played back over what was there
        for ours, theirs in zip(several.steps(sessions(several, [3, 8])), expected, strict=True):
            assert torch.equal(ours.cpu(), theirs)
    for made in several.graphs:
        assert isinstance(made, SpanGraphs)
        assert made.recorded == [4]


def test_a_lone_decode_step_is_played_back() -> None:
    one = make_span()
    hidden = hidden_states(1, 6)
    results = []
    for graphs in ([], [SpanGraphs(one, play_again)]):
        one.graphs = graphs
        runner, slot, outputs = Runner(), Slot(rows=1, length=16, index=0), []
        for kind, start, end in [(Kind.PREFILL, 0, 4), (Kind.DECODE, 4, 5), (Kind.DECODE, 5, 6)]:
            place = Place(shared_slot=None, shared=0, slot=slot, length=start)
            work = Work(kind=kind, span=one, hidden=hidden[:, start:end], position=start, place=place)
            follow(runner, work, [0, 3], [] if start else [(Change(granted=slot), work)])
            outputs.append(work.result())
        results.append(torch.cat(outputs, dim=1))
        assert [made.recorded for made in graphs] == [[1] for _ in graphs]
    assert torch.equal(*results)


def test_no_graphs_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    span = make_span()
    with caplog.at_level(logging.INFO):
        attach_graphs(span)
    assert span.graphs == ()
    assert "blocks 0:3 run without graphs, which are for GPUs" in caplog.text


def test_no_graphs_of_what_cannot_be_recorded(recorders: list[torch.device], caplog: pytest.LogCaptureFixture) -> None:
    span = on_gpus(make_span(linear=None), SPLITS[0])
    weight = torch.zeros(64, 64)
    span.blocks[2].set_submodule("self_attention.dense", backend("llm-int8").pack(weight, torch.zeros(64)))
    with caplog.at_level(logging.INFO):
        attach_graphs(span)
    assert span.graphs == ()
    assert "blocks 0:3 run without graphs: llm-int8 layers cannot be recorded" in caplog.text


@torch.inference_mode()
def test_a_span_that_nobody_serves_is_gone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is gigabytes; whoever looks for garbage comes too late."""
    monkeypatch.setattr(graphs_module, "cuda_recorder", lambda device: lambda function: lambda: None)
    span = on_gpus(make_span(linear=None), [FIRST] * 3)
    attach_graphs(span)
    span.steps(sessions(span, [3]))
    blocks = [weakref.ref(block) for block in span.blocks]
    gc.disable()
    try:
        del span
        assert not any(block() for block in blocks)
    finally:
        gc.enable()


def test_graphs_are_of_one_device() -> None:
    with pytest.raises(ValueError, match="graphs for each"):
        SpanGraphs(on_gpus(make_span(linear=None), SPLITS[0]), play_again)


# Loading


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, int]:
    """Bytes that are free on each device."""
    known = {FIRST: 1 << 30, SECOND: 1 << 30}
    monkeypatch.setattr(checkpoint_module, "free_bytes", known.__getitem__)
    return known


def test_a_checkpoint_is_loaded_onto_several_gpus(free: dict[torch.device, int]) -> None:
    checkpoint = find_checkpoint("bloom-tiny")
    span = checkpoint.load_span(1, 7, torch.float32, device=["cuda:0", SECOND])
    assert (span.stages, span.devices) == ((range(3), range(3, 6)), [FIRST, SECOND])
    one = checkpoint.load_span(1, 7)
    hidden = torch.randn(1, 4, span.config.hidden_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(span(hidden.to(FIRST)).cpu(), one(hidden))
    assert span.digest == one.digest


def test_on_gpus_the_rest_is_bfloat16(free: dict[torch.device, int]) -> None:
    checkpoint = find_checkpoint("bloom-tiny")
    span = checkpoint.load_span(0, 1, device=SECOND)
    assert (span.device, span.numerics) == (SECOND, ("bfloat16", "none", "cuda"))
    quantised = checkpoint.load_span(0, 1, device=FIRST, linear="bf16")
    assert quantised.numerics == ("bfloat16", "bf16", "cuda-torch-mixing")
    assert checkpoint.load_span(0, 1).dtype == torch.float32


def test_blocks_go_where_there_is_memory(free: dict[torch.device, int]) -> None:
    checkpoint = find_checkpoint("bloom-tiny")
    weights, rest = 12 * 128 * 128, 13 * 128
    both = (FIRST, SECOND)
    free[FIRST] = 3 * (2 * weights + 2 * rest)  # three blocks in bfloat16
    free[SECOND] = 3 * free[FIRST]
    assert checkpoint.load_span(0, 8, device=both).stages == (range(2), range(2, 8))
    free[SECOND] = free[FIRST]
    assert checkpoint.load_span(0, 6, device=both).stages == (range(3), range(3, 6))
    with pytest.raises(CheckpointError, match=r"bloom-tiny: 7 blocks of .* do not fit into the .* serve fewer"):
        checkpoint.load_span(0, 7, device=both)
    assert len(checkpoint.load_span(0, 6, device=both, linear="bf16").linears) == 6 * 4
    with pytest.raises(CheckpointError, match="do not fit"):
        checkpoint.load_span(0, 6, device=both, linear="fp32")


def test_a_gpu_that_has_less_memory_than_it_said(
    free: dict[torch.device, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(block: BloomBlock, device: torch.device) -> BloomBlock:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BloomBlock, "to", send)
    with pytest.raises(CheckpointError, match="block 2 does not fit into what is left of the memory of cuda:1; serve"):
        find_checkpoint("bloom-tiny").load_span(2, 3, device=SECOND)


@pytest.mark.parametrize("devices", [[], ["cpu", "cuda:0"], ["cpu", "cpu"], ["cuda:0", "cuda:0"]])
def test_devices_that_do_not_go_together(devices: list[Any]) -> None:
    with pytest.raises(ValueError, match="a span cannot be on"):
        find_checkpoint("bloom-tiny").load_span(0, 2, device=devices)


# The fakes themselves


def test_tensors_of_several_gpus_are_not_mixed() -> None:
    one: Tensor = torch.zeros(2, device=FIRST)
    with pytest.raises(RuntimeError, match="same device"):
        one + torch.zeros(2, device=SECOND)
    with pytest.raises(RuntimeError, match="same device"):
        one.copy_(torch.zeros(2)).add_(torch.zeros(2))
