"""Spans on a device: every form of weights, graphs, sessions together."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from compute.bloom import BloomSpan, Step, quantize
from compute.bloom.graphs import ROWS, Record, Replay, SpanGraphs, cuda_recorder
from compute.cache import KVCache
from compute.linear import BACKENDS
from tests.unit.engines import hidden_states, make_span

# Of the output, relative to float32 without quantisation: some three times what was measured.
TOLERANCE = {
    "fp32": 1e-5,
    "fp16": 2e-3,
    "bf16": 2e-2,
    "int8": 3e-2,
    "nf4": 0.3,
    "nf4-double": 0.3,
    "llm-int8": 3e-2,
}
ROUNDED = 2e-2  # more, where hidden states are bfloat16
LENGTHS = [0, 1, 5, 17, 40]


def on_device(linear: str | None, device: torch.device, dtype: torch.dtype, seed: int = 0) -> BloomSpan:
    span = make_span(seed, linear=None).to(device=device, dtype=dtype)
    if linear is not None:
        try:
            quantize(span, linear)
        except ValueError as error:
            pytest.skip(str(error))
    return span


def record_for(device: torch.device) -> Record:
    """On the CPU, what is recorded is run again as it is."""
    if device.type == "cuda":
        return cuda_recorder(device)

    def record(function: Replay) -> Replay:
        function()
        return function

    return record


def sessions(span: BloomSpan, lengths: Sequence[int]) -> list[Step]:
    """Some with so many tokens, each about to have another one."""
    steps = []
    for number, length in enumerate(lengths):
        cache = KVCache.alone(span, 1, 64)
        hidden = hidden_states(1, length + 1, seed=number).to(device=span.device, dtype=span.dtype)
        with torch.inference_mode():
            if length:
                span(hidden[:, :length], cache, 0)
        steps.append(Step(hidden[:, length:], cache, length))
    return steps


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float().cpu() - expected).norm() / expected.norm())


def check_same(span: BloomSpan, found: Tensor, expected: Tensor) -> None:
    """Bit for bit, where the span says so."""
    assert torch.equal(found, expected) if span.rows_independent else error(found, expected.float().cpu()) < 5e-2


@pytest.mark.parametrize("linear", BACKENDS)
def test_every_form_of_weights_gives_about_the_same(linear: str, device: torch.device, dtype: torch.dtype) -> None:
    expected = make_span(linear=None)(hidden_states(2, 9))
    found = on_device(linear, device, dtype)(hidden_states(2, 9).to(device=device, dtype=dtype))
    assert found.device.type == device.type
    assert error(found, expected) < TOLERANCE[linear] + (ROUNDED if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("linear", BACKENDS)
def test_gradients_are_those_of_the_dense_weights(linear: str, device: torch.device, dtype: torch.dtype) -> None:
    span = on_device(linear, device, dtype)
    for layer in span.linears:
        gradient = torch.randn(5, layer.out_features, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        expected = gradient.float().cpu() @ layer.dense().float().cpu()
        assert error(layer.multiply_back(gradient), expected) < 1e-2


@pytest.mark.parametrize("linear", BACKENDS)
def test_sessions_together_give_what_each_gives_alone(linear: str, device: torch.device, dtype: torch.dtype) -> None:
    span = on_device(linear, device, dtype)
    with torch.inference_mode():
        alone = [span(step.hidden, step.cache, step.position) for step in sessions(span, LENGTHS)]
        together = span.steps(sessions(span, LENGTHS))
    for ours, expected in zip(together, alone, strict=True):
        check_same(span, ours, expected)


@pytest.mark.parametrize("linear", [name for name in BACKENDS if name != "llm-int8"])
def test_graphs_give_what_single_kernels_give(linear: str, device: torch.device, dtype: torch.dtype) -> None:
    span = on_device(linear, device, dtype)
    graphs = SpanGraphs(span, record_for(device))
    with torch.inference_mode():
        for count in (1, 2, 3, 5):
            expected = span.steps(sessions(span, LENGTHS[:count]))
            span.graphs = [graphs]
            for _ in range(2):  # recorded, and played back over what was there
                found = span.steps(sessions(span, LENGTHS[:count]))
                for ours, theirs in zip(found, expected, strict=True):
                    check_same(span, ours, theirs)
            span.graphs = []
    assert graphs.recorded == [1, 2, 4, 8]


def test_results_are_not_overwritten_by_the_next_step(device: torch.device, dtype: torch.dtype) -> None:
    span = on_device("fp16", device, dtype)
    span.graphs = [SpanGraphs(span, record_for(device))]
    with torch.inference_mode():
        first = span.together(sessions(span, [3]))
        kept = first.clone()
        span.together(sessions(span, [7]))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("linear", [name for name in BACKENDS if name != "llm-int8"])
def test_several_tokens_and_padding(linear: str, device: torch.device, dtype: torch.dtype) -> None:
    """In chunks and in short steps, from graphs and without: about what each row gives alone, without its padding."""
    span = on_device(linear, device, dtype)
    near = 1e-5 if linear == "fp32" and dtype == torch.float32 else 5e-2
    pads, hidden = [0, 3, 18], hidden_states(3, 28).to(device=device, dtype=dtype)
    for graphs in ([], [SpanGraphs(span, record_for(device))]):
        span.graphs = graphs
        cache = KVCache.alone(span, 3, 64, torch.tensor(pads))
        with torch.inference_mode():
            parts = [span(hidden[:, :20], cache, 0)]
            parts += [span.decode(hidden[:, start:end], cache, start) for start, end in ((20, 21), (21, 28))]
            found = torch.cat(parts, dim=1)
            assert bool(torch.isfinite(found).all())
            for row, pad in enumerate(pads):
                alone = span(hidden[row : row + 1, pad:])
                assert error(found[row : row + 1, pad:], alone.float().cpu()) < near


def test_more_rows_than_there_are_graphs_for_run_kernel_by_kernel(device: torch.device, dtype: torch.dtype) -> None:
    span = on_device("fp16", device, dtype)
    graphs = SpanGraphs(span, record_for(device))
    span.graphs = [graphs]
    cache = KVCache.alone(span, 1, 64)
    with torch.inference_mode():
        span.together([Step(hidden_states(1, ROWS[-1] + 1).to(device, dtype), cache, 0)])
    assert graphs.recorded == []


def test_what_cannot_be_recorded_runs_kernel_by_kernel(device: torch.device, dtype: torch.dtype) -> None:
    calls = []

    def fail(function: Replay) -> Replay:
        calls.append(function)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    span = on_device("fp16", device, dtype)
    with torch.inference_mode():
        expected = span.together(sessions(span, LENGTHS))
        span.graphs = [SpanGraphs(span, fail)]
        for _ in range(2):
            assert torch.equal(span.together(sessions(span, LENGTHS)), expected)
    assert len(calls) == 1  # not tried again and again


def test_what_depends_on_values_is_not_recorded(device: torch.device, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="llm-int8 layers cannot be recorded"):
        SpanGraphs(on_device("llm-int8", device, dtype), record_for(device))


def test_a_checkpoint_is_loaded_onto_the_device(device: torch.device, dtype: torch.dtype) -> None:
    from compute.models import find_checkpoint

    checkpoint = find_checkpoint("bloom-tiny")
    span = checkpoint.load_span(0, 2, linear="nf4", device=device)
    assert (span.device.type, span.dtype) == (device.type, dtype)
    hidden = torch.randn(1, 4, span.config.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = checkpoint.load_span(0, 2)(hidden)
    assert error(span(hidden.to(device, dtype)), expected) < TOLERANCE["nf4"]
