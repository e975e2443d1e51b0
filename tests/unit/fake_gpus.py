"""GPUs for machines that have none: tensors that say that they are on one, and refuse to be mixed with others.

Their numbers are computed on the CPU, by the CPU's kernels, and so have its bits. What they catch is what is easily
forgotten where a span is on several GPUs: that something has to move along.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compute.bloom import BloomBlock, BloomSpan

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class OnGpu(torch.Tensor):
    """A tensor that says that it is on ``gpu``."""

    gpu: torch.device

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func == torch.Tensor.device.__get__:
            return args[0].gpu
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]  # a property, which is no bool
            return True
        gpu = common_device([args, kwargs], func)
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        for each in tensors(result):
            if isinstance(each, OnGpu):
                each.gpu = gpu
        return result


class FakeGpus(TorchFunctionMode):
    """While it lasts, tensors can be made on GPUs and sent there; of one thread."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cpu:
            return plain(args[0])
        if func is torch.Tensor.to:
            return to(*args, **kwargs)
        target = kwargs.get("device")
        if isinstance(target, torch.device) and target.type == "cuda":
            return on(func(*args, **kwargs | {"device": CPU}), target)
        return func(*args, **kwargs)


def to(
    tensor: Tensor,
    *args: Any,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    copy: bool = False,
    **_: Any,
) -> Tensor:
    """``Tensor.to``, for all devices."""
    for each in args:
        device = each if isinstance(each, (torch.device, str)) else device
        dtype = each if isinstance(each, torch.dtype) else dtype
    return on(tensor.to(dtype or tensor.dtype, copy=copy), torch.device(device or tensor.device))


def on(tensor: Tensor, device: torch.device) -> Tensor:
    """The same, on a device; a copy if it was on another one."""
    if tensor.device == device:
        return tensor
    if device.type == "cpu":
        return plain(tensor).clone()
    moved = plain(tensor).clone().as_subclass(OnGpu)
    moved.gpu = device
    return moved


def plain(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from tensors(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for each in values:
            yield from tensors(each)


def common_device(values: Any, func: Callable[..., Any]) -> torch.device:
    """That of all tensors but single numbers, which GPUs take from the CPU.

    Raises:
        RuntimeError: They are on several.
    """
    every = list(tensors(values))
    found = {each.gpu if isinstance(each, OnGpu) else CPU for each in every if isinstance(each, OnGpu) or each.dim()}
    if len(found) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {found}")
    return found.pop()


def send(block: BloomBlock, device: torch.device) -> BloomBlock:
    """``Module.to``, which refuses what changes a tensor's class."""
    for module in block.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(on(value.detach(), device), requires_grad=False))
    return block


@contextmanager
def fake_gpus() -> Iterator[None]:
    """With blocks that can be sent to GPUs, too."""
    with pytest.MonkeyPatch.context() as patch, FakeGpus():
        patch.setattr(BloomBlock, "to", send)
        yield


def on_gpus(span: BloomSpan, devices: Sequence[torch.device]) -> BloomSpan:
    """A copy of a span, each block on its device."""
    blocks = [copy.deepcopy(block).to(device) for block, device in zip(span.blocks, devices, strict=True)]
    return BloomSpan(span.config, span.start, blocks)  # type: ignore[arg-type]
