"""Unquantised weights: float32 packed for oneDNN on the CPU, and torch's own layers in any float for the rest."""

from __future__ import annotations

from typing import ClassVar, Final, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from compute.linear.base import FrozenLinear

# One row is a vector, for which oneDNN adds up in another order at some shapes. There it gets a second row that nobody
# wants, which costs 5 %: the time goes into reading the weights.
_LEAST_ROWS: Final = 2
_TRIED_ROWS: Final = 8
_PACKED_FOR_ROWS: Final = 16  # a hint on the layout; the numbers of rows that multiply well, not a bound


_vectors_agree: dict[tuple[int, int, int], bool] = {}


class Float32Linear(FrozenLinear):
    """float32 on the CPU, packed once: from two rows on faster than MKL, and the same bits for any number of rows.

    The first gradient packs the weights a second time, transposed: a node that trains needs twice the memory.
    """

    name = "fp32"
    kernel = "onednn"
    rows_independent = True
    weight_bits = 32

    def __init__(self, in_features: int, out_features: int, bias: Tensor, packed: Tensor) -> None:
        """Take packed weights."""
        super().__init__(in_features, out_features, bias)
        self._packed = packed  # opaque

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor) -> Self:
        """See :class:`FrozenLinear`."""
        with torch.no_grad():
            # Always a copy, though the library would leave some small matrices as they are.
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().clone(), _PACKED_FOR_ROWS)
        return cls(weight.shape[1], weight.shape[0], bias, packed)

    @property
    def weight_bytes(self) -> int:
        """See :class:`FrozenLinear`."""
        return 4 * self.in_features * self.out_features

    def multiply(self, x: Tensor) -> Tensor:
        """See :class:`FrozenLinear`."""
        rows = x.shape[0]
        if rows >= _LEAST_ROWS or self._vectors_agree():
            return self._product(x)  # [n, out]
        return self._product(x.expand(_LEAST_ROWS, -1).contiguous())[:rows]  # [n, out]

    def _product(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")  # [n, out]
        return product

    def _vectors_agree(self) -> bool:
        """Whether one row has the bits that it has beside others: tried out once for a shape and number of threads."""
        key = (self.out_features, self.in_features, torch.get_num_threads())
        known = _vectors_agree.get(key)
        if known is None:
            x = torch.randn(_TRIED_ROWS, self.in_features, generator=torch.Generator().manual_seed(0))  # [n, in]
            together = self._product(x)  # [n, out]
            known = all(torch.equal(self._product(x[i : i + 1])[0], together[i]) for i in range(_TRIED_ROWS))
            _vectors_agree[key] = known
        return known

    def multiply_back(self, gradient: Tensor) -> Tensor:
        """See :class:`FrozenLinear`."""
        return self.transposed(Float32Linear).multiply(gradient)  # [n, in]

    def dense(self) -> Tensor:
        """See :class:`FrozenLinear`."""
        packed = self._packed
        return packed.to_dense() if packed.is_mkldnn else packed  # [out, in]


class CastLinear(FrozenLinear):
    """torch's own multiplication, with weights and inputs converted to ``dtype``."""

    dtype: ClassVar[torch.dtype]

    def __init__(self, in_features: int, out_features: int, bias: Tensor, weight: Tensor) -> None:
        """Take converted weights."""
        super().__init__(in_features, out_features, bias)
        self._weight = weight  # [out, in]
        self._bias = bias.to(weight.dtype)  # [out]

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor) -> Self:
        """See :class:`FrozenLinear`."""
        converted = weight.detach().to(cls.dtype, copy=True)  # [out, in]
        if not bool(torch.isfinite(converted).all()):
            raise ValueError(f"weights that do not fit into {cls.name}; choose bf16 or fp32")
        return cls(weight.shape[1], weight.shape[0], bias, converted)

    @property
    def weight_bytes(self) -> int:
        """See :class:`FrozenLinear`."""
        return self._weight.element_size() * self.in_features * self.out_features

    def multiply(self, x: Tensor) -> Tensor:
        """See :class:`FrozenLinear`."""
        return F.linear(x.to(self.dtype), self._weight, self._bias).to(x.dtype)  # [n, out]

    def multiply_back(self, gradient: Tensor) -> Tensor:
        """See :class:`FrozenLinear`."""
        return (gradient.to(self.dtype) @ self._weight).to(gradient.dtype)  # [n, in]

    def dense(self) -> Tensor:
        """See :class:`FrozenLinear`."""
        return self._weight  # [out, in]


class BFloat16Linear(CastLinear):
    """bfloat16: half the memory, any range, three digits."""

    name = "bf16"
    dtype = torch.bfloat16
    weight_bits = 16


class CastFloat16Linear(CastLinear):
    """float16 for a GPU."""

    name = "fp16"
    dtype = torch.float16
    weight_bits = 16


class CastFloat32Linear(CastLinear):
    """float32 for a GPU."""

    name = "fp32"
    dtype = torch.float32
    weight_bits = 32
