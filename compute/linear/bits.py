"""bitsandbytes' formats: nf4, with and without quantised scales, and LLM.int8.

The library is imported when a layer is made: importing it takes seconds. On the CPU, its 4-bit multiplication writes
all weights out in float32 and reads them again; here they are written out a few rows at a time, into what the CPU's
cache holds, for the same bits. (On CPUs with bfloat16 instructions the library has another path of its own, for layers
out of training: faster, but it rounds the activations to bfloat16. This is not that one.)
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar, Final, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from compute.linear.base import FrozenLinear

_BLOCK: Final = 64  # weights that share a scale
_SCALES_BLOCK: Final = 256  # scales that share a scale
_CHUNK_WEIGHTS: Final = 1 << 19  # 2 MiB in float32; measured: half or twice as many take 3 to 10 % longer
_CHUNK_ROWS: Final = 64  # a multiple of this many rows is a multiple of a block, whatever a row's length


@functools.cache
def _library() -> ModuleType:
    # On some CPUs the library warns that it lacks a kernel (which would be fetched from the hub), one we do not use.
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        library = importlib.import_module("bitsandbytes")
    finally:
        log.setLevel(level)
    return library


class Nf4Linear(FrozenLinear):
    """4 bits a weight, levels placed for normally distributed weights, a scale for every 64.

    Source: Dettmers et al., "QLoRA", arXiv 2305.14314.
    """

    name = "nf4"
    kernel = "bitsandbytes"
    is_kept = True
    weight_bits = 4.5
    is_double: ClassVar[bool] = False

    def __init__(self, in_features: int, out_features: int, bias: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Take quantised weights."""
        super().__init__(in_features, out_features, bias)
        _library()
        self._tensors = dict(tensors)

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor) -> Self:
        """See :class:`FrozenLinear`."""
        quantized, state = _library().functional.quantize_4bit(
            weight.detach().contiguous(), blocksize=_BLOCK, compress_statistics=cls.is_double, quant_type="nf4"
        )
        tensors = {"packed": quantized.reshape(-1), "absmax": state.absmax}
        if cls.is_double:
            tensors |= {
                "absmax_scale": state.state2.absmax,
                "absmax_code": state.state2.code.clone(),
                "absmax_offset": state.offset.reshape(1),
            }
        return cls(weight.shape[1], weight.shape[0], bias, tensors)

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`FrozenLinear`."""
        return dict(self._tensors)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], bias: Tensor) -> Self:
        """See :class:`FrozenLinear`."""
        packed, absmax = tensors["packed"], tensors["absmax"]
        out_features = len(bias)
        in_features, rest = divmod(2 * packed.numel(), out_features)
        if packed.dtype != torch.uint8 or rest or absmax.numel() != -(-2 * packed.numel() // _BLOCK):
            raise ValueError("nf4 weights and scales that do not fit together")
        if cls.is_double:
            scales, code, offset = (tensors[f"absmax_{name}"] for name in ("scale", "code", "offset"))
            if scales.numel() != -(-absmax.numel() // _SCALES_BLOCK) or code.numel() != 256 or offset.numel() != 1:
                raise ValueError("nf4 scales that do not fit together")
        return cls(in_features, out_features, bias, tensors)

    @property
    def weight_bytes(self) -> int:
        """See :class:`FrozenLinear`."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def multiply(self, x: Tensor) -> Tensor:
        """See :class:`FrozenLinear`."""
        if x.is_cuda:
            return self._multiply_fused(x)
        absmax = self._absmax()  # [out * in / 64]
        product = x.new_empty(x.shape[0], self.out_features)  # [n, out]
        rows = self._chunk_rows()
        for start in range(0, self.out_features, rows):
            end = min(start + rows, self.out_features)
            weight = self._written_out(start, end, absmax, x.dtype)  # [r, in]
            product[:, start:end] = F.linear(x, weight, self.bias[start:end].to(x.dtype))  # [n, r]
        return product

    def multiply_back(self, gradient: Tensor) -> Tensor:
        """See :class:`FrozenLinear`."""
        absmax = self._absmax()  # [out * in / 64]
        total = gradient.new_zeros(gradient.shape[0], self.in_features)  # [n, in]
        rows = self._chunk_rows()
        for start in range(0, self.out_features, rows):
            end = min(start + rows, self.out_features)
            total.addmm_(gradient[:, start:end], self._written_out(start, end, absmax, gradient.dtype))  # [n, in]
        return total

    def dense(self) -> Tensor:
        """See :class:`FrozenLinear`."""
        return self._written_out(0, self.out_features, self._absmax(), torch.float32)  # [out, in]

    def _chunk_rows(self) -> int:
        return max(_CHUNK_ROWS, _CHUNK_WEIGHTS // self.in_features // _CHUNK_ROWS * _CHUNK_ROWS)

    def _absmax(self) -> Tensor:
        """The scales in float32: [out * in / 64]."""
        absmax = self._tensors["absmax"]
        if not self.is_double:
            return absmax
        scale, code = self._tensors["absmax_scale"], self._tensors["absmax_code"]
        decoded = torch.ops.bitsandbytes.dequantize_blockwise(absmax, scale, code, _SCALES_BLOCK, torch.float32)
        total: Tensor = decoded + self._tensors["absmax_offset"]
        return total

    def _written_out(self, start: int, end: int, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """Weights of the outputs ``[start, end)``, ``start`` being a multiple of 64: [end - start, in]."""
        first, last = start * self.in_features, end * self.in_features
        # The library takes every row to begin a new block, and is wrong where it does not.
        shape = (end - start, self.in_features) if self.in_features % _BLOCK == 0 else (1, last - first)
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self._tensors["packed"][first // 2 : -(-last // 2)],
            absmax[first // _BLOCK : -(-last // _BLOCK)],
            _BLOCK,
            "nf4",
            shape,
            dtype,
        )
        return weight.view(end - start, self.in_features)  # [r, in]

    def _multiply_fused(self, x: Tensor) -> Tensor:
        """The library's own kernel for a GPU, which reads the weights as they are."""
        tensors, nested = self._tensors, {}
        if self.is_double:
            nested = {
                "absmax_8bit": tensors["absmax"],
                "absmax_code": tensors["absmax_code"],
                "absmax_offset": tensors["absmax_offset"].reshape(()),
            }
        product: Tensor = torch.ops.bitsandbytes.gemm_4bit(
            x,
            tensors["packed"].view(-1, 1),
            (self.out_features, self.in_features),
            tensors["absmax_scale"] if self.is_double else tensors["absmax"],
            _BLOCK,
            "nf4",
            bias=self.bias.to(x.dtype),
            **nested,
        )
        return product  # [n, out]


class DoubleNf4Linear(Nf4Linear):
    """nf4 whose scales are themselves quantised: 4.1 bits a weight instead of 4.5."""

    name = "nf4-double"
    weight_bits = 4.13
    is_double = True


class LlmInt8Linear(FrozenLinear):
    """int8 with the columns that hold outliers in float16. These columns are found over the whole batch, so that one
    row's outliers change the others' numbers.

    Source: Dettmers et al., "LLM.int8()", arXiv 2208.07339.
    """

    name = "llm-int8"
    kernel = "bitsandbytes"
    is_kept = True
    is_recordable = False
    weight_bits = 8
    threshold: ClassVar[float] = 6.0

    def __init__(self, in_features: int, out_features: int, bias: Tensor, levels: Tensor, scale: Tensor) -> None:
        """Take quantised weights."""
        super().__init__(in_features, out_features, bias)
        self._levels = levels  # [out, in], int8
        self._scale = scale  # [out], the largest weight of each
        self._bias = bias.half()  # [out]
        self._state: Any = _library().MatmulLtState()
        self._state.threshold = self.threshold
        self._state.has_fp16_weights = False
        self._state.CB, self._state.SCB = levels, scale

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor) -> Self:
        """See :class:`FrozenLinear`."""
        levels, scale, _ = _library().functional.int8_vectorwise_quant(weight.detach().half())
        return cls.restore({"levels": levels, "scale": scale}, bias)

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`FrozenLinear`."""
        return {"levels": self._levels, "scale": self._scale}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], bias: Tensor) -> Self:
        """See :class:`FrozenLinear`."""
        levels, scale = tensors["levels"], tensors["scale"]
        if levels.dtype != torch.int8 or levels.dim() != 2 or scale.shape != (levels.shape[0],):
            raise ValueError("int8 levels and scales that do not fit together")
        return cls(levels.shape[1], levels.shape[0], bias, levels, scale)

    @property
    def weight_bytes(self) -> int:
        """See :class:`FrozenLinear`."""
        return self._levels.nbytes + self._scale.nbytes

    def multiply(self, x: Tensor) -> Tensor:
        """See :class:`FrozenLinear`."""
        halved = x.to(torch.float16, copy=True)  # [n, in]; the library clears outliers in it and puts them back
        product: Tensor = _library().matmul(halved, self._levels, bias=self._bias, state=self._state)
        return product.to(x.dtype)  # [n, out]

    def dense(self) -> Tensor:
        """See :class:`FrozenLinear`."""
        return self._levels.float() * (self._scale.float() / 127)[:, None]  # [out, in]
