"""Quantised spans: near float32, sessions that keep their bits, and one block at most in memory unquantised."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compute import checkpoint as checkpoint_module
from compute.bloom import BloomBlock, BloomSpan, Step, quantize
from compute.bloom.quantized import LAYERS, put_together, take_apart
from compute.cache import KVCache
from compute.checkpoint import Checkpoint
from compute.errors import CheckpointError
from compute.linear import BACKENDS, backend
from compute.models import find_checkpoint
from tests.checkpoints import make_checkpoint, save_weights

INDEPENDENT = ["fp32", "fp16", "int8"]
WIDTH = 128  # of bloom-tiny


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(start: int = 0, end: int = 8, linear: str | None = None) -> BloomSpan:
    return find_checkpoint("bloom-tiny").load_span(start, end, linear=linear)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "bound"),
    [("fp32", 1e-5), ("fp16", 1e-3), ("bf16", 2e-2), ("int8", 5e-2), ("nf4", 0.3), ("nf4-double", 0.3)],
)
def test_a_quantised_span_stays_near_float32(name: str, bound: float) -> None:
    hidden = find_checkpoint("bloom-tiny").load_embeddings()(torch.arange(100, 140)[None])
    exact = tiny()(hidden)
    ours = tiny(linear=name)(hidden)
    assert float((ours - exact).norm() / exact.norm()) <= bound


def test_every_backend_can_serve() -> None:
    for name in BACKENDS:
        span = tiny(2, 4, name)
        assert {layer.name for layer in span.linears} == {name} and len(span.linears) == 8
        assert (span.dtype, span.device.type, len(span.digest)) == (torch.float32, "cpu", 64)
        assert torch.isfinite(span(normal(1, 3, WIDTH))).all()
        assert span.rows_independent == backend(name).rows_independent
        assert not any(parameter.requires_grad for parameter in span.parameters())


def test_numerics_say_who_multiplies_and_whether_rows_mix() -> None:
    assert tiny(0, 1).numerics == ("float32", "none", "cpu")
    assert tiny(0, 1, "fp32").numerics == ("float32", "none", "cpu-onednn")
    assert tiny(0, 1, "fp16").numerics == ("float32", "fp16", "cpu-fbgemm")
    assert tiny(0, 1, "llm-int8").numerics == ("float32", "llm-int8", "cpu-bitsandbytes-mixing")
    assert not tiny(0, 1).rows_independent  # MKL adds up in another order for one row


def test_the_digest_is_that_of_the_weights_as_stored() -> None:
    assert tiny(2, 4, "fp16").digest == tiny(2, 4).digest


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "nf4"])
def test_gradients_pass_a_quantised_span(name: str) -> None:
    exact, ours = normal(2, 5, WIDTH, seed=2).requires_grad_(True), normal(2, 5, WIDTH, seed=2).requires_grad_(True)
    tiny(2, 4)(exact).square().mean().backward()
    tiny(2, 4, name)(ours).square().mean().backward()
    assert exact.grad is not None and ours.grad is not None
    bound = {"fp32": 1e-5, "fp16": 2e-3, "int8": 5e-2, "nf4": 0.5}[name]
    assert float((ours.grad - exact.grad).norm() / exact.grad.norm()) <= bound


SPANS = {name: tiny(3, 5, name) for name in INDEPENDENT}


def fill(span: BloomSpan, batch: int, tokens: int, seed: int) -> KVCache:
    """A session that has had some tokens."""
    cache = KVCache.alone(span, batch, 64)
    if tokens:
        with torch.inference_mode():
            span(normal(batch, tokens, WIDTH, seed=seed), cache, 0)
    return cache


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(INDEPENDENT),
    sessions=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 40), st.integers(1, 3)), min_size=1, max_size=6),
)
def test_a_session_has_its_bits_whoever_shares_the_step(name: str, sessions: list[tuple[int, int, int]]) -> None:
    """Sessions of (rows, tokens before, new tokens), alone and together."""
    span = SPANS[name]
    alone, steps, caches = [], [], []
    for number, (batch, tokens, new) in enumerate(sessions):
        hidden = normal(batch, new, WIDTH, seed=100 + number)
        lone, shared = (fill(span, batch, tokens, number) for _ in range(2))
        with torch.inference_mode():
            alone.append(span(hidden, lone, tokens))
        steps.append(Step(hidden, shared, tokens))
        caches.append((lone, shared, tokens + new))
    with torch.inference_mode():
        together = span.steps(steps)
    for expected, ours in zip(alone, together, strict=True):
        assert torch.equal(ours, expected)
    for lone, shared, end in caches:
        for index in range(len(span)):
            for expected, ours in zip(lone.own.layers[index], shared.own.layers[index], strict=True):
                assert torch.equal(ours[:, :, :end], expected[:, :, :end])


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(INDEPENDENT), rows=st.integers(2, 16), tokens=st.integers(0, 40))
def test_a_row_of_a_session_has_its_bits_alone(name: str, rows: int, tokens: int) -> None:
    span, steps = SPANS[name], normal(rows, tokens + 1, WIDTH, seed=7)
    outputs = []
    for chosen in (slice(0, rows), slice(0, 1), slice(rows - 1, rows)):
        cache = KVCache.alone(span, len(steps[chosen]), 64)
        with torch.inference_mode():
            for position in range(tokens + 1):
                output = span(steps[chosen, position : position + 1], cache, position)
        outputs.append(output)
    whole, first, last = outputs
    assert torch.equal(whole[:1], first) and torch.equal(whole[-1:], last)


def test_one_block_at_most_is_unquantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, tokenizer=False))
    alive: list[int] = []

    def layers() -> list[nn.Linear]:
        gc.collect()
        return [each for each in gc.get_objects() if type(each) is nn.Linear and not each.weight.is_meta]

    others = layers()  # of other tests; kept, so that their places are not given to new ones

    def watched(block: BloomBlock, name: str) -> None:
        known = {id(each) for each in others}
        alive.append(sum(id(each) not in known for each in layers()))
        quantize(block, name)

    monkeypatch.setattr(checkpoint_module, "quantize", watched)
    checkpoint.load_span(0, 5, linear="fp16")
    assert alive == [4] * 5


def test_taken_apart_and_put_together() -> None:
    span = tiny(0, 1, "int8")
    (block,) = span.blocks
    assert isinstance(block, BloomBlock)
    tensors = take_apart(block)
    again = BloomSpan(span.config, 0, [put_together(span.config, "int8", tensors)])
    hidden = normal(1, 4, WIDTH)
    assert torch.equal(again(hidden), span(hidden))
    with pytest.raises(ValueError, match="do not fit"):
        put_together(span.config, "int8", tensors | {"extra.weight": torch.zeros(1)})
    with pytest.raises(KeyError):
        put_together(span.config, "int8", {})
    other = {key: tensors[key] for key in tensors}
    for part in ("levels", "scale"):
        other[f"{LAYERS[0]}:{part}"] = tensors[f"{LAYERS[1]}:{part}"]
    with pytest.raises(ValueError, match="another shape"):
        put_together(span.config, "int8", other)
    with pytest.raises(ValueError, match="not quantised"):
        take_apart(BloomBlock(span.config))


def test_what_is_quantised_is_not_quantised_again() -> None:
    span = tiny(0, 1, "fp16")
    with pytest.raises(ValueError, match="fp16 already"):
        quantize(span, "int8")


def test_what_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, tokenizer=False, shards_of_blocks=None))
    with pytest.raises(ValueError, match="no linear layers 'fp8'"):
        checkpoint.load_span(0, 1, linear="fp8")
    with pytest.raises(ValueError, match="not with torch"):
        checkpoint.load_span(0, 1, torch.bfloat16, linear="fp16")
    from safetensors.torch import load_file

    state = load_file(tmp_path / "model.safetensors")
    state["transformer.h.1.mlp.dense_h_to_4h.weight"][0, 0] = 1e6
    save_weights(tmp_path / "model.safetensors", state)
    with pytest.raises(CheckpointError, match="block 1 has weights that do not fit into fp16"):
        checkpoint.load_span(0, 2, linear="fp16")
