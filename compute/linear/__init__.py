"""Linear layers with frozen weights, in every form that a node can serve: one interface, several kernels."""

from __future__ import annotations

import torch

from compute.linear.base import CHECKED_ROWS, FrozenLinear, rows_agree
from compute.linear.bits import DoubleNf4Linear, LlmInt8Linear, Nf4Linear
from compute.linear.packed import Float16Linear, Int8Linear
from compute.linear.plain import BFloat16Linear, CastFloat16Linear, CastFloat32Linear, Float32Linear

__all__ = ["BACKENDS", "CHECKED_ROWS", "FrozenLinear", "backend", "rows_agree"]

_ON_CPU: tuple[type[FrozenLinear], ...] = (
    Float32Linear,
    Float16Linear,
    BFloat16Linear,
    Int8Linear,
    Nf4Linear,
    DoubleNf4Linear,
    LlmInt8Linear,
)
_ON_GPU: tuple[type[FrozenLinear], ...] = (
    CastFloat32Linear,
    CastFloat16Linear,
    BFloat16Linear,
    Nf4Linear,
    DoubleNf4Linear,
    LlmInt8Linear,
)
BACKENDS: tuple[str, ...] = tuple(kind.name for kind in _ON_CPU)


def backend(name: str, device: torch.device | str = "cpu") -> type[FrozenLinear]:
    """The kind of layer that goes by a name on a device.

    Raises:
        ValueError: There is none; the message names those that there are.
    """
    kinds = {kind.name: kind for kind in (_ON_CPU if torch.device(device).type == "cpu" else _ON_GPU)}
    if name not in kinds:
        raise ValueError(f"no linear layers {name!r:.40} on {device}; there are {', '.join(kinds)}")
    return kinds[name]
