"""Weights of 16 and 8 bits for the CPU, packed for torch's quantised kernels; activations stay float32.

Relative error against float32 on random weights: fp16 1.5e-4, int8 7e-3. (torch's own dynamic int8 has one scale for
all rows of a batch: 1.5e-2, and what one session sends would change what another one gets.)
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any, Final, Self

import torch
from torch import Tensor

from compute.linear.base import FrozenLinear

_LARGEST_FLOAT16: Final = 65504.0


class Float16Linear(FrozenLinear):
    """Weights in float16, multiplied in float32: half the memory to read, which is what decoding waits for.

    The kernel multiplies one way only, and torch takes 25 ns a weight to unpack. The first gradient therefore packs the
    weights a second time, transposed, and they stay: a node that trains needs twice the memory.
    """

    name = "fp16"
    kernel = "fbgemm"
    rows_independent = True
    weight_bits = 16

    def __init__(self, in_features: int, out_features: int, bias: Tensor, packed: Any) -> None:
        """Take packed weights."""
        super().__init__(in_features, out_features, bias)
        self._packed = packed  # a LinearPackedParamsBase

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor) -> Self:
        """See :class:`FrozenLinear`."""
        if float(weight.abs().max()) > _LARGEST_FLOAT16:
            raise ValueError("weights that do not fit into fp16; choose bf16 or fp32")
        packed = torch.ops.quantized.linear_prepack_fp16(weight.detach(), bias.detach())
        return cls(weight.shape[1], weight.shape[0], bias, packed)

    @property
    def weight_bytes(self) -> int:
        """See :class:`FrozenLinear`."""
        return 2 * self.in_features * self.out_features

    def multiply(self, x: Tensor) -> Tensor:
        """See :class:`FrozenLinear`."""
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)  # [n, out]
        return product

    def multiply_back(self, gradient: Tensor) -> Tensor:
        """See :class:`FrozenLinear`."""
        return self.transposed(Float16Linear).multiply(gradient)  # [n, in]

    def dense(self) -> Tensor:
        """See :class:`FrozenLinear`."""
        weight: Tensor = torch.ops.quantized.linear_unpack_fp16(self._packed)[0]  # [out, in]
        return weight


class Int8Linear(FrozenLinear):
    """Weights in int8 with a scale per output, activations in int8 with a scale per row, sums exact.

    Gradients need three times the memory: see :class:`Float16Linear`.
    """

    name = "int8"
    kernel = "torch"
    rows_independent = True
    is_kept = True
    weight_bits = 8

    def __init__(self, in_features: int, out_features: int, bias: Tensor, packed: Any) -> None:
        """Take packed weights."""
        super().__init__(in_features, out_features, bias)
        self._packed = packed  # a LinearPackedParamsBase
        self._largest = _largest_level()

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor) -> Self:
        """See :class:`FrozenLinear`."""
        weight = weight.detach()
        scale = (weight.abs().amax(dim=1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)  # [out]
        levels = (weight / scale[:, None]).round_().to(torch.int8)  # [out, in]
        return cls.restore({"levels": levels, "scale": scale}, bias)

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`FrozenLinear`."""
        quantized, _ = torch.ops.quantized.linear_unpack(self._packed)
        return {"levels": quantized.int_repr(), "scale": quantized.q_per_channel_scales().float()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], bias: Tensor) -> Self:
        """See :class:`FrozenLinear`."""
        levels, scale = tensors["levels"], tensors["scale"]  # [out, in], [out]
        if levels.dtype != torch.int8 or levels.dim() != 2 or scale.shape != (levels.shape[0],):
            raise ValueError("int8 levels and scales that do not fit together")
        return cls(levels.shape[1], levels.shape[0], bias, _pack_levels(levels, scale))

    @property
    def weight_bytes(self) -> int:
        """See :class:`FrozenLinear`."""
        return self.in_features * self.out_features + 4 * self.out_features

    def multiply(self, x: Tensor) -> Tensor:
        """See :class:`FrozenLinear`."""
        scale = (x.abs().amax(dim=1, keepdim=True) / self._largest).clamp_(min=1e-30)  # [n, 1]
        sums = _multiply_levels(x / scale, self._packed)  # [n, out]
        return torch.addcmul(self.bias, sums, scale)  # [n, out]

    def multiply_back(self, gradient: Tensor) -> Tensor:
        """See :class:`FrozenLinear`; with weights in float16, which are far more exact than these are."""
        return self.transposed(Float16Linear).multiply(gradient)  # [n, in]

    def dense(self) -> Tensor:
        """See :class:`FrozenLinear`."""
        quantized, _ = torch.ops.quantized.linear_unpack(self._packed)
        weight: Tensor = quantized.dequantize()  # [out, in]
        return weight


def _pack_levels(levels: Tensor, scale: Tensor) -> Any:
    """Shapes: levels [out, in], int8; scale [out]."""
    zero = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():  # quantised tensors as such will go; the layers stay, and this is their door
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch._make_per_channel_quantized_tensor(levels, scale.double(), zero, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


def _multiply_levels(levels: Tensor, packed: Any) -> Tensor:
    """Round to whole numbers, which fit into bytes around 128, and multiply.

    Shapes:
        levels: [n, in]
        returns: [n, out]
    """
    sums: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(levels, 1.0, 128, packed)
    return sums  # [n, out]


@functools.cache
def _largest_level() -> int:
    """127, or 63 where the kernel adds two products in 16 bits, which is how CPUs without VNNI do it: 255 * 127 twice
    is too much there, and the sum would be cut silently.
    """
    ones = torch.full((64, 64), 127, dtype=torch.int8)
    packed = _pack_levels(ones, torch.ones(64))
    expected = 127.0 * 127 * 64
    return 127 if bool((_multiply_levels(torch.full((1, 64), 127.0), packed) == expected).all()) else 63
