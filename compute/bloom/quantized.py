"""Putting other linear layers into blocks, and taking them apart for the disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from compute.bloom.block import BloomBlock, BloomSpan
from compute.bloom.config import BloomConfig
from compute.linear import FrozenLinear, backend

LAYERS: Final = (
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)


def quantize(module: BloomBlock | BloomSpan, name: str) -> None:
    """Replace the linear layers by those of a backend, one after another; norms and attention stay as they are.

    Args:
        module: With layers as loaded. Weights that nobody else holds are freed layer by layer.
        name: One of :data:`compute.linear.BACKENDS`.

    Raises:
        ValueError: There is no such backend, or the layers have been replaced before, or the weights do not fit.
        RuntimeError: This machine lacks the kernel.
    """
    for block in module.blocks if isinstance(module, BloomSpan) else [module]:
        for path in LAYERS:
            layer = block.get_submodule(path)
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"the linear layers are {getattr(layer, 'name', 'others')} already")
            kind = backend(name, layer.weight.device)
            block.set_submodule(path, kind.pack(layer.weight.detach().float(), layer.bias.detach().float()))


def take_apart(block: BloomBlock) -> dict[str, Tensor]:
    """The tensors of a quantised block, by name.

    Raises:
        ValueError: It is not quantised.
        NotImplementedError: It is, in a form that is not kept.
    """
    tensors: dict[str, Tensor] = dict(block.state_dict())  # norms and biases
    for path in LAYERS:
        layer = block.get_submodule(path)
        if not isinstance(layer, FrozenLinear):
            raise ValueError("the block is not quantised")
        tensors |= {f"{path}:{name}": tensor for name, tensor in layer.tensors().items()}
    return tensors


def put_together(
    config: BloomConfig, name: str, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> BloomBlock:
    """The block that :func:`take_apart` took apart, on a device.

    Raises:
        KeyError: A tensor is missing.
        ValueError: One does not fit.
    """
    tensors = {key: tensor.to(device) for key, tensor in tensors.items()}
    with torch.device("meta"):
        block = BloomBlock(config)
    for path in LAYERS:
        plain = block.get_submodule(path)
        parts = {key.partition(":")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{path}:")}
        layer = backend(name, device).restore(parts, tensors[f"{path}.bias"])
        if not isinstance(plain, nn.Linear) or layer.dense_shape != (plain.out_features, plain.in_features):
            raise ValueError(f"{path} has another shape")
        block.set_submodule(path, layer)
    rest = {key: tensor for key, tensor in tensors.items() if ":" not in key}
    try:
        block.load_state_dict(rest, strict=True, assign=True)
    except RuntimeError as exc:
        raise ValueError(f"norms or biases that do not fit: {str(exc).splitlines()[0]}") from exc
    return block.requires_grad_(False).eval()
