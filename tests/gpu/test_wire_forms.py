"""Hidden states that are sent in a device's activation type are those that it would have made of them itself."""

from __future__ import annotations

import pytest
import torch

from compute.tensors import to_wire
from compute.wire_forms import Form, decode, default_form, encode


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_rounding_here_is_rounding_there(device: torch.device, name: str) -> None:
    kind, form = (
        {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name],
        default_form(name),
    )
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 64, 128, generator=generator) * torch.logspace(-44, 4, 128)  # subnormal ones, too
    # Half-way between two values, which is where ways to round differ.
    values = torch.cat([values, values.to(kind).float() * (1 + 2.0**-8), values.to(kind).float() * (1 + 2.0**-11)])
    fields, data = encode(values, form)
    received = decode(fields, data, form, values.shape, kind)
    there = values.to(device=device, dtype=kind)
    assert bytes(to_wire(received)[2]) == bytes(to_wire(there)[2])
    assert encode(there, form) == encode(values, form)


def test_int8_is_made_of_what_lies_on_a_device(device: torch.device) -> None:
    values = torch.randn(1, 8, 100, generator=torch.Generator().manual_seed(0))
    assert encode(values.to(device), Form.INT8) == encode(values, Form.INT8)
