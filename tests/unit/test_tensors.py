"""Tensors go over the wire unchanged, and what is not a tensor is refused before memory is taken."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compute.errors import BadInput
from compute.tensors import WIRE_DTYPES, from_wire, tensor_bytes, to_wire

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(shape=SHAPES, name=st.sampled_from(sorted(WIRE_DTYPES)))
def test_round_trip(shape: tuple[int, ...], name: str) -> None:
    tensor = (torch.arange(int(torch.Size(shape).numel())) * 3 - 7).reshape(shape).to(WIRE_DTYPES[name])
    dtype, sent_shape, data = to_wire(tensor)
    back = from_wire(dtype, sent_shape, memoryview(bytes(data)))
    assert (dtype, sent_shape, back.dtype) == (name, shape, tensor.dtype)
    assert torch.equal(back, tensor)


def test_bytes_are_little_endian() -> None:
    assert bytes(to_wire(torch.tensor([1.0, -2.0]))[2]) == bytes.fromhex("0000803f000000c0")
    assert bytes(to_wire(torch.tensor([1.0], dtype=torch.bfloat16))[2]) == bytes.fromhex("803f")
    assert bytes(to_wire(torch.tensor([258]))[2]) == bytes.fromhex("0201000000000000")


def test_sending_copies_nothing_and_keeps_the_memory_alive() -> None:
    tensor = torch.arange(64, dtype=torch.float32)
    data = to_wire(tensor)[2]
    tensor[0] = 5.0
    assert data[:4] == torch.tensor([5.0]).view(torch.uint8).numpy().tobytes()
    assert data.readonly
    expected = bytes(data)
    del tensor
    gc.collect()
    torch.full((64,), 9.0)
    assert bytes(data) == expected


def test_sending_takes_any_strides() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).t()
    dtype, shape, data = to_wire(tensor)
    assert torch.equal(from_wire(dtype, shape, data), tensor)


def test_a_gradient_is_no_obstacle() -> None:
    assert to_wire(torch.ones(2, requires_grad=True))[1] == (2,)


def test_received_memory_is_ones_own_and_writable() -> None:
    data = bytearray(8)
    tensor = from_wire("f32", (2,), data)
    data[:] = b"\xff" * 8
    tensor += 1
    assert tensor.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("dtype", "shape", "size", "code"),
    [
        ("f64", (1,), 8, "bad-dtype"),
        (["f32"], (1,), 4, "bad-dtype"),
        ("f32", (2,), 7, "bad-shape"),
        ("f32", (2,), 9, "bad-shape"),
        ("f32", (-1, -2), 8, "bad-shape"),
        ("f32", (True,), 4, "bad-shape"),
        ("f32", (1.0,), 4, "bad-shape"),
        ("f32", (1,) * 9, 4, "bad-shape"),
        ("f32", 1, 4, "bad-shape"),
        ("bf16", (1 << 60, 1 << 60), 4, "bad-shape"),
        ("i64", (), 0, "bad-shape"),
    ],
)
def test_nonsense_is_refused(dtype: str, shape: tuple[int, ...], size: int, code: str) -> None:
    with pytest.raises(BadInput) as caught:
        from_wire(dtype, shape, bytes(size))
    assert caught.value.code == code


def test_a_dtype_without_a_name_is_refused() -> None:
    with pytest.raises(BadInput, match="float64") as caught:
        to_wire(torch.zeros(1, dtype=torch.float64))
    assert caught.value.code == "bad-dtype"


def test_only_plain_memory_is_viewed() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        tensor_bytes(torch.zeros(2, 3).t())
