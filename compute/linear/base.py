"""What all linear layers have in common: frozen weights, gradients with respect to the input alone.

Whether a row of the result depends on the rows beside it is a matter of the kernel: with another number of rows
most kernels add up in another order. Measured with torch 2.13 on a CPU with AVX-512 and AMX, 1 to 3 threads, inputs of
128 to 4,096 features; rows = 1..32 and 33..256; the sets are those of which every row keeps its bits:

===================================  =====================================================================
kernel                               numbers of rows that give the same bits
===================================  =====================================================================
F.linear fp32 (MKL)                  {1}, {2..5} or {2..15}, the rest: by shape and threads
F.linear fp32, weights transposed    {1}, {2..128}, {200..}; with three threads {1}, {2..16}, {17..}
oneDNN packed fp32                   {1}, {2..256}; for some shapes {1..256}
fbgemm packed fp16                   {1..256}
oneDNN int8, scale per row           {1..256}: integers add up exactly in any order
F.linear bf16 (oneDNN, AMX)          {1..32}; above, not even rows at other places of one batch
layer norm, attention per session    {1..256}; attention with 1..16 rows
gelu, tanh                           {1..256} with 1 or 2 threads, not with 3: see compute/bloom/gelu.py
===================================  =====================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor, nn

CHECKED_ROWS: Final = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32)  # where the kernels above were seen to change


class FrozenLinear(nn.Module, ABC):
    """``y = x W^T + b`` with weights that never change, in whatever form the kernel wants them.

    Attributes:
        name: What people call the backend, as in ``--quantize``.
        kernel: Who multiplies; a part of what is announced.
        rows_independent: A row's result has the same bits alone and beside any others, up to 32 rows.
        is_kept: Quantising takes long enough to keep the result on disk.
        is_recordable: A CUDA graph can play it back: what it does depends on no values.
        weight_bits: Of a weight in this form, its part of the scales included; about, for estimates.
        in_features: Width of the input.
        out_features: Width of the output.
    """

    name: ClassVar[str]
    kernel: ClassVar[str] = "torch"
    rows_independent: ClassVar[bool] = False
    is_kept: ClassVar[bool] = False
    is_recordable: ClassVar[bool] = True
    weight_bits: ClassVar[float]

    bias: nn.Parameter

    def __init__(self, in_features: int, out_features: int, bias: Tensor) -> None:
        """Note the shape and keep the bias."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)  # [out]
        self._transposed: list[FrozenLinear] = []  # in a list, so that it is no submodule

    @classmethod
    @abstractmethod
    def pack(cls, weight: Tensor, bias: Tensor) -> Self:
        """A layer with these weights, which are copied; the bias is shared.

        Shapes:
            weight: [out, in], float32
            bias: [out], float32

        Raises:
            ValueError: They do not fit into this form.
            RuntimeError: This machine or this build of torch lacks the kernel.
        """

    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`restore` needs besides the bias; only for those that are kept."""
        raise NotImplementedError(f"{self.name} weights are not kept")

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], bias: Tensor) -> Self:
        """The layer whose :meth:`tensors` these are, bit for bit.

        Raises:
            KeyError: One is missing.
            ValueError: One has a wrong shape or dtype.
        """
        raise NotImplementedError(f"{cls.name} weights are not kept")

    @property
    def dense_shape(self) -> tuple[int, int]:
        """Shape of the weights: (out, in)."""
        return self.out_features, self.in_features

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes that a step reads: the weights in this form, without the bias."""

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """The product, without a graph.

        Shapes:
            x: [n, in]
            returns: [n, out], of x's dtype
        """

    @abstractmethod
    def dense(self) -> Tensor:
        """The weights that the layer stands for, made anew: [out, in], floats."""

    def multiply_back(self, gradient: Tensor) -> Tensor:
        """The gradient with respect to the input.

        Shapes:
            gradient: [n, out]
            returns: [n, in], of the gradient's dtype
        """
        return gradient @ self.dense().to(gradient.dtype)  # [n, in]

    def transposed(self, kind: type[FrozenLinear]) -> FrozenLinear:
        """A layer with the weights transposed and no bias, for gradients; made once, and kept."""
        if not self._transposed:
            weight = self.dense().float().t().contiguous()  # [in, out]
            self._transposed.append(kind.pack(weight, weight.new_zeros(self.in_features)))
        return self._transposed[0]

    def forward(self, x: Tensor) -> Tensor:
        """Multiply.

        Shapes:
            x: [..., in]
            returns: [..., out], of x's dtype
        """
        rows = x.reshape(-1, self.in_features)  # [n, in]
        if rows.requires_grad and torch.is_grad_enabled():
            product: Tensor = _Frozen.apply(rows, self)  # type: ignore[no-untyped-call]  # so in torch; [n, out]
        else:
            product = self.multiply(rows)  # [n, out]
        return product.view(*x.shape[:-1], self.out_features)  # [..., out]

    def extra_repr(self) -> str:
        """For people."""
        return f"{self.name}, in_features={self.in_features}, out_features={self.out_features}"


class _Frozen(torch.autograd.Function):
    """Ties ``multiply`` and ``multiply_back`` together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(x.detach())  # [n, out]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer: FrozenLinear = ctx.layer
        return layer.multiply_back(gradient), None  # [n, in]


def rows_agree(layer: FrozenLinear, *, seed: int = 0) -> bool:
    """Whether rows keep their bits on this machine, for the numbers of rows where kernels are known to change."""
    generator = torch.Generator().manual_seed(seed)
    device = layer.bias.device
    x = torch.randn(max(CHECKED_ROWS), layer.in_features, generator=generator).to(device)  # [n, in]
    with torch.inference_mode():
        alone = torch.cat([layer.multiply(x[row : row + 1]) for row in range(len(x))])  # [n, out]
        return all(
            torch.equal(layer.multiply(x[-rows:]), alone[-rows:])
            and torch.equal(layer.multiply(x[:rows]), alone[:rows])
            for rows in CHECKED_ROWS
        )
