"""A module's tensors, read out of files that anybody may have written: bounded, of the names and shapes that are
expected, finite. Nothing in them is run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from client.modules.description import WEIGHTS_FILE
from compute.errors import CheckpointError
from compute.shards import open_shard
from net.errors import ModuleError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compute.shards import Shard

FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)
MAX_TOLD: Final = 3  # names in an error


def read_tensors(
    folder: Path, expected: Mapping[str, Sequence[int]], *, dtypes: Collection[torch.dtype] = FLOATS
) -> dict[str, Tensor]:
    """All tensors of a module's ``adapter_model.safetensors``, as stored; they have memory of their own.

    No more is read than is expected. The file's header is at most 1 MiB.

    Args:
        folder: the module's.
        expected: the shape of each tensor that there is to be; no other may be there.
        dtypes: of which each tensor's has to be one.

    Raises:
        ModuleError: the file is damaged, or holds something else, or a value that is not finite.
    """
    with _opened(folder) as weights:
        names = set(weights.names())
        if missing := expected.keys() - names:
            raise ModuleError(f"{WEIGHTS_FILE} lacks {_spell(missing)}")
        if extra := names - expected.keys():
            raise ModuleError(f"{WEIGHTS_FILE} holds {_spell(extra)}, which does not belong there")
        for name in sorted(expected):
            dtype, shape = weights.describe(name)
            if shape != tuple(expected[name]):
                raise ModuleError(f"{name:.200} has shape {list(shape)}, expected {list(expected[name])}")
            if dtype not in dtypes:
                allowed = ", ".join(str(each).removeprefix("torch.") for each in dtypes)
                raise ModuleError(f"{name:.200} has another dtype than {allowed}")
        return {name: _finite(name, weights.read(name)).clone() for name in expected}


def check_tensors(folder: Path) -> None:
    """That all of a module's tensors are floats and finite, whatever their names and shapes.

    Raises:
        ModuleError: they are not, or the file is damaged.
    """
    with _opened(folder) as weights:
        for name in weights.names():
            if weights.describe(name)[0] is None:
                raise ModuleError(f"{name:.200} is no tensor of floats of 16 or 32 bits")
            _finite(name, weights.read(name))


@contextmanager
def _opened(folder: Path) -> Iterator[Shard]:
    try:
        with open_shard(folder / WEIGHTS_FILE) as weights:
            yield weights
    except CheckpointError as error:
        raise ModuleError(str(error)) from error


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise ModuleError(f"{name:.200} holds values that are not finite")
    return tensor


def _spell(names: Collection[str]) -> str:
    told = ", ".join(f"{name:.200}" for name in sorted(names)[:MAX_TOLD])
    return told if len(names) <= MAX_TOLD else f"{told} and {len(names) - MAX_TOLD} more"
