"""Linear layers: near float32, exact backwards, and the same bits whatever shares the batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compute.bloom.gelu import gelu
from compute.linear import BACKENDS, FrozenLinear, backend, rows_agree
from compute.linear.bits import Nf4Linear

# Relative errors of a product on normally distributed weights, and twice that for good measure.
MAX_ERROR = {
    "fp32": 1e-6,
    "fp16": 4e-4,
    "bf16": 6e-3,
    "int8": 1.5e-2,
    "nf4": 0.13,
    "nf4-double": 0.13,
    "llm-int8": 1.5e-2,
}
INDEPENDENT = ["fp32", "fp16", "int8"]
SHAPES = [(384, 128), (128, 512), (192, 48), (256, 1024)]  # out, in


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(name: str, out: int = 384, width: int = 128) -> tuple[FrozenLinear, Tensor, Tensor]:
    weight, bias = normal(out, width, seed=1) * width**-0.5, normal(out, seed=2)
    return backend(name).pack(weight, bias), weight, bias


def error(ours: Tensor, exact: Tensor) -> float:
    assert ours.shape == exact.shape
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_products_are_near_float32(name: str, shape: tuple[int, int]) -> None:
    layer, weight, bias = make(name, *shape)
    x = normal(2, 5, shape[1], seed=3)
    before = x.clone()
    product = layer(x)
    assert product.dtype == torch.float32
    assert error(product, F.linear(x, weight, bias)) <= MAX_ERROR[name]
    assert torch.equal(x, before)
    with torch.inference_mode():
        assert torch.equal(layer(x), product)
    assert (layer.out_features, layer.in_features) == shape == layer.dense_shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_are_those_of_the_weights_that_the_layer_stands_for(name: str, shape: tuple[int, int]) -> None:
    layer, weight, _ = make(name, *shape)
    x = normal(2, 5, shape[1], seed=3).requires_grad_(True)
    upstream = normal(2, 5, shape[0], seed=4)
    layer(x).backward(upstream)
    assert x.grad is not None
    assert error(x.grad, upstream @ layer.dense().float()) <= {"bf16": 6e-3, "int8": 4e-4}.get(name, 1e-6)
    assert error(x.grad, upstream @ weight) <= 2 * MAX_ERROR[name]
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_gradients_are_the_slopes_of_the_product(name: str) -> None:
    layer, _, _ = make(name, 32, 16)
    x, along, upstream = normal(1, 16, seed=3), normal(1, 16, seed=5), normal(1, 32, seed=4)
    x.requires_grad_(True)
    layer(x).backward(upstream)
    with torch.no_grad():  # the layer is linear: a long stride loses no accuracy
        slope = ((layer(x + 8 * along) - layer(x - 8 * along)) * upstream).sum().double() / 16
    assert x.grad is not None
    assert abs(float(slope) - float((x.grad * along).sum())) <= 1e-4 * float(x.grad.norm() * along.norm())


@pytest.mark.parametrize("name", BACKENDS)
def test_weights_are_copied(name: str) -> None:
    weight, bias = normal(64, 64, seed=1), normal(64, seed=2)
    layer = backend(name).pack(weight, bias)
    x = normal(3, 64, seed=3)
    before = layer(x)
    weight.zero_()
    assert torch.equal(layer(x), before)


def test_weight_bytes_are_what_a_step_reads() -> None:
    sizes = {name: make(name, 1024, 1024)[0].weight_bytes / 2**20 for name in BACKENDS}
    assert (sizes["fp32"], sizes["fp16"], sizes["bf16"]) == (4, 2, 2)
    assert 1 < sizes["int8"] < 1.01 and 1 < sizes["llm-int8"] < 1.01
    assert sizes["nf4"] == 0.5 + 4 / 64 and 0.51 < sizes["nf4-double"] < 0.52


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", INDEPENDENT)
def test_rows_keep_their_bits_in_any_number(name: str, shape: tuple[int, int], threads: int) -> None:
    torch.set_num_threads(threads)
    layer, _, _ = make(name, *shape)
    assert layer.rows_independent
    x = normal(32, shape[1], seed=3)
    alone = torch.cat([layer(x[row : row + 1]) for row in range(32)])
    for rows in range(1, 33):
        assert torch.equal(layer(x[:rows]), alone[:rows])
        assert torch.equal(layer(x[-rows:]), alone[-rows:])
    assert rows_agree(layer)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_gradients_of_rows_keep_their_bits_too(name: str) -> None:
    layer, _, _ = make(name)
    upstream = normal(16, 384, seed=4)
    whole = layer.multiply_back(upstream)
    assert torch.equal(torch.cat([layer.multiply_back(row[None]) for row in upstream]), whole)
    assert [type(module) for module in layer.modules()] == [type(layer)]


LAYERS = {name: make(name, 256, 128)[0] for name in INDEPENDENT}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(INDEPENDENT),
    rows=st.lists(st.integers(0, 39), min_size=1, max_size=32),
    scales=st.lists(st.sampled_from([1e-6, 1.0, 300.0]), min_size=40, max_size=40),
)
def test_rows_keep_their_bits_in_any_mix(name: str, rows: list[int], scales: list[float]) -> None:
    layer = LAYERS[name]
    x = normal(40, 128, seed=3) * torch.tensor(scales)[:, None]
    mixed = layer(x[rows])
    for place, row in enumerate(rows):
        assert torch.equal(mixed[place], layer(x[row : row + 1])[0])


@pytest.mark.parametrize("name", INDEPENDENT)
def test_what_is_not_finite_stays_in_its_row(name: str) -> None:
    layer, _, _ = make(name)
    x = normal(4, 128, seed=3)
    expected = layer(x)
    x[1, 7], x[2, 9] = float("nan"), float("inf")
    product = layer(x)
    assert torch.equal(product[[0, 3]], expected[[0, 3]])
    assert not torch.isfinite(product[1]).any() and not torch.isfinite(product[2]).all()


def test_zeros_give_the_bias() -> None:
    for name in BACKENDS:
        layer, _, bias = make(name)
        assert error(layer(torch.zeros(2, 128)), bias.expand(2, -1)) <= 3e-3


def test_mixing_rows_is_noticed() -> None:
    class Mixing(type(make("fp32")[0])):  # type: ignore[misc]  # a class made on the spot
        def multiply(self, x: Tensor) -> Tensor:
            return super().multiply(x) + x.mean()  # type: ignore[no-any-return]

    _, weight, bias = make("fp32")
    assert not rows_agree(Mixing.pack(weight, bias))
    assert not backend("llm-int8").rows_independent


@pytest.mark.parametrize("rows", [1, 2, 7, 32, 130])
@pytest.mark.parametrize("shape", [(384, 128), (128, 512), (1000, 1024), (4096, 1024)], ids=str)
@pytest.mark.parametrize("double", [False, True])
def test_nf4_has_the_bits_of_bitsandbytes(shape: tuple[int, int], rows: int, double: bool) -> None:
    import bitsandbytes

    layer, weight, bias = make("nf4-double" if double else "nf4", *shape)
    x = normal(rows, shape[1], seed=3)
    quantized, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double, quant_type="nf4"
    )
    assert torch.equal(layer(x), bitsandbytes.matmul_4bit(x, quantized, quant_state=state, bias=bias))


def test_nf4_is_right_where_rows_end_within_a_block() -> None:
    layer, weight, _ = make("nf4", 192, 48)
    assert error(layer.dense(), weight) < 0.1


@pytest.mark.parametrize("name", [name for name in BACKENDS if backend(name).is_kept])
def test_kept_tensors_give_the_same_bits(name: str) -> None:
    layer, _, bias = make(name)
    x = normal(3, 128, seed=3)
    again = type(layer).restore(layer.tensors(), bias)
    assert torch.equal(again(x), layer(x))
    assert again.dense_shape == layer.dense_shape
    with pytest.raises(KeyError):
        type(layer).restore({}, bias)
    broken = {key: tensor[:-1] for key, tensor in layer.tensors().items()}
    with pytest.raises(ValueError, match="do not fit together"):
        type(layer).restore(broken | {"scale": layer.tensors().get("scale", torch.empty(0))}, bias)


def test_what_is_not_kept_says_so() -> None:
    layer, _, bias = make("fp16")
    with pytest.raises(NotImplementedError, match="not kept"):
        layer.tensors()
    with pytest.raises(NotImplementedError, match="not kept"):
        type(layer).restore({}, bias)


def test_weights_that_do_not_fit_are_refused() -> None:
    weight, bias = normal(64, 64), normal(64)
    weight[3, 3] = 1e6
    with pytest.raises(ValueError, match="do not fit into fp16"):
        backend("fp16").pack(weight, bias)
    assert torch.isfinite(backend("bf16").pack(weight, bias)(normal(1, 64))).all()


def test_unknown_backends_are_named() -> None:
    with pytest.raises(ValueError, match="'fp8' on cpu; there are fp32, fp16"):
        backend("fp8")
    assert backend("fp16", "cuda") is not backend("fp16", "cpu")
    assert backend("nf4", "cuda") is Nf4Linear


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [4096, 16_384, 57_344, 192, 40])
def test_gelu_has_the_same_bits_at_every_place(width: int, threads: int) -> None:
    torch.set_num_threads(threads)
    x = normal(17, width, seed=6)
    alone = torch.cat([gelu(x[row : row + 1].clone()) for row in range(17)])
    for rows in (2, 5, 16, 17):
        assert torch.equal(gelu(x[-rows:].clone()), alone[-rows:])
    assert error(alone, F.gelu(x, approximate="tanh")) < 1e-6


def test_gelu_has_gradients() -> None:
    x = normal(3, 192).requires_grad_(True)
    gelu(x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_weights_take_about_as_many_bits_as_is_said(name: str) -> None:
    layer, weight, _ = make(name, 1024, 512)
    assert layer.weight_bits == pytest.approx(8 * layer.weight_bytes / weight.numel(), rel=0.01)
