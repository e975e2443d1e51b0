"""An engine on a device, and a span on two."""

from __future__ import annotations

import pytest
import torch
import trio
from torch import Tensor

from compute.bloom import BloomSpan
from compute.bloom.graphs import SpanGraphs, attach_graphs
from compute.engine import EngineSettings
from compute.linear import BACKENDS
from compute.models import find_checkpoint
from tests.gpu.test_spans import ROUNDED, TOLERANCE, error
from tests.unit.engines import running

WIDTH = 128  # of bloom-tiny
PROMPT, TOKENS = 40, 44


def normal(seed: int) -> Tensor:
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


async def served(span: BloomSpan) -> list[Tensor]:
    """What two sessions get, a prompt and then token by token, first alone and then together; and a gradient."""
    hidden, results = [normal(0), normal(1)], [list[Tensor](), list[Tensor]()]
    async with running(span, EngineSettings(cache_tokens=None)) as engine:
        sessions = [await engine.open_session(batch=1, max_length=TOKENS) for _ in range(2)]

        async def step(number: int, start: int, end: int) -> None:
            results[number].append(await engine.step(sessions[number], hidden[number][:, start:end], start))

        for number in range(2):
            await step(number, 0, PROMPT)
            await step(number, PROMPT, PROMPT + 1)
        for position in range(PROMPT + 1, TOKENS):
            async with trio.open_nursery() as nursery:
                for number in range(2):
                    nursery.start_soon(step, number, position, position + 1)
        gradient = (await engine.backward(normal(2), normal(3))).hidden
    return [*(torch.cat(each, dim=1) for each in results), gradient]


@pytest.mark.parametrize("linear", [None, *BACKENDS])
async def test_an_engine_serves_about_what_the_cpu_does(linear: str | None, device: torch.device) -> None:
    checkpoint = find_checkpoint("bloom-tiny")
    try:
        span = checkpoint.load_span(0, 8, linear=linear, device=device)
    except ValueError as refused:
        pytest.skip(str(refused))
    attach_graphs(span)
    expected = await served(checkpoint.load_span(0, 8))
    tolerance = 2 * TOLERANCE.get(linear or "fp32", 0) + (2 * ROUNDED if device.type == "cuda" else 0)
    for ours, theirs in zip(await served(span), expected, strict=True):
        assert error(ours, theirs) < tolerance
    recordable = device.type == "cuda" and linear != "llm-int8"
    assert len(span.graphs) == recordable
    for graphs in span.graphs:
        assert isinstance(graphs, SpanGraphs)
        assert {1, 2} <= set(graphs.recorded)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("linear", [None, "fp16", "bf16", "nf4"])
async def test_two_gpus_give_the_bits_of_one(linear: str | None) -> None:
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("needs two GPUs that are alike")
    checkpoint = find_checkpoint("bloom-tiny")
    one = checkpoint.load_span(0, 8, linear=linear, device="cuda:0")
    two = checkpoint.load_span(0, 8, linear=linear, device=["cuda:0", "cuda:1"])
    assert [device.index for device in two.devices] == [0, 1]
    for span in (one, two):
        attach_graphs(span)
    for ours, theirs in zip(await served(two), await served(one), strict=True):
        assert torch.equal(ours, theirs)
