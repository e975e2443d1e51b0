"""One file of weights: a ``.safetensors`` or a ``.bin``, opened so that single tensors can be read.

``.bin`` files are pickles. They are read with ``weights_only=True``, which builds tensors and plain
containers and nothing else, and only from files that the person who runs this program chose; what comes
from other peers never gets here.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compute.errors import CheckpointError

# A header is about 120 bytes a tensor; BLOOM-176B in one file would need 100 KiB.
MAX_HEADER_BYTES: Final = 1 << 20
_DTYPES: Final = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_FETCH_AGAIN: Final = "get the file again"


class Shard(Protocol):
    """An open file of weights. Names are those in the file."""

    def names(self) -> list[str]:
        """Names of all tensors."""

    def describe(self, name: str) -> tuple[torch.dtype | None, tuple[int, ...]]:
        """Dtype (``None`` if it is not a float of 16 or 32 bits) and shape, without reading the tensor.

        Raises:
            KeyError: There is no such tensor.
        """

    def read(self, name: str) -> Tensor:
        """The tensor as stored, perhaps a view into the mapped file.

        Raises:
            CheckpointError: The file is damaged.
            KeyError: There is no such tensor.
        """


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[Shard]:
    """Open a file of weights by its suffix; memory is mapped, not read.

    Raises:
        CheckpointError: It is damaged, cut short, or of another kind.
    """
    if path.suffix == ".safetensors":
        check_header(path)
        try:
            opened = safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as exc:
            cause = _line(exc)
            raise CheckpointError(f"{path.name}: damaged or cut short ({cause}); {_FETCH_AGAIN}") from exc
        with opened as file:
            yield SafetensorsShard(path.name, file)
    else:
        yield BinShard(path)


class SafetensorsShard:
    """An open ``.safetensors`` file."""

    def __init__(self, file_name: str, file: safe_open) -> None:
        """Wrap an open file."""
        self._file_name = file_name
        self._file = file
        self._names: list[str] = list(file.keys())  # type: ignore[no-untyped-call]  # so in its stub
        self._known = frozenset(self._names)

    def names(self) -> list[str]:
        """See :class:`Shard`."""
        return self._names

    def describe(self, name: str) -> tuple[torch.dtype | None, tuple[int, ...]]:
        """See :class:`Shard`."""
        if name not in self._known:
            raise KeyError(name)
        part = self._file.get_slice(name)  # type: ignore[no-untyped-call]  # so in its stub
        return _DTYPES.get(part.get_dtype()), tuple(part.get_shape())

    def read(self, name: str) -> Tensor:
        """See :class:`Shard`."""
        if name not in self._known:
            raise KeyError(name)
        try:
            tensor: Tensor = self._file.get_tensor(name)  # type: ignore[no-untyped-call]  # so in its stub
        except (SafetensorError, OSError) as exc:
            raise CheckpointError(f"{self._file_name}: {name} cannot be read ({_line(exc)}); {_FETCH_AGAIN}") from exc
        return tensor


class BinShard:
    """An open ``.bin`` file (``torch.save`` of a state dict)."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            CheckpointError: It is damaged, cut short, or holds something other than tensors.
        """
        _check_archive(path)
        try:
            content: object = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as exc:  # its text is a page on how to load the file all the same
            raise CheckpointError(
                f"{path.name}: holds something other than tensors, which is not loaded because it could run code; "
                f"use the safetensors form of the checkpoint"
            ) from exc
        except (RuntimeError, OSError, EOFError, ValueError, KeyError) as exc:
            raise CheckpointError(
                f"{path.name}: damaged, cut short, or no plain file of weights ({_line(exc)}); "
                f"{_FETCH_AGAIN}, or use the safetensors form of the checkpoint"
            ) from exc
        if not isinstance(content, dict):
            raise CheckpointError(f"{path.name}: holds no tensors by name; {_FETCH_AGAIN}")
        self._tensors: dict[str, Tensor] = {}
        for name, value in content.items():
            if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
                raise CheckpointError(f"{path.name}: {name!r:.80} is no tensor; {_FETCH_AGAIN}")
            self._tensors[name] = value

    def names(self) -> list[str]:
        """See :class:`Shard`."""
        return list(self._tensors)

    def describe(self, name: str) -> tuple[torch.dtype | None, tuple[int, ...]]:
        """See :class:`Shard`."""
        tensor = self._tensors[name]
        return (tensor.dtype if tensor.dtype in _DTYPES.values() else None), tuple(tensor.shape)

    def read(self, name: str) -> Tensor:
        """See :class:`Shard`."""
        return self._tensors[name].detach().contiguous()


def check_header(path: Path) -> None:
    """Refuse a header that is too long before the library reads it."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as exc:
        raise CheckpointError(f"{path.name}: cannot be read ({_line(exc)}); {_FETCH_AGAIN}") from exc
    if len(start) < 8:
        raise CheckpointError(f"{path.name}: damaged or cut short (no header); {_FETCH_AGAIN}")
    length = struct.unpack("<Q", start)[0]
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path.name}: damaged (a header of {length} bytes, at most {MAX_HEADER_BYTES}); {_FETCH_AGAIN}"
        )


def _check_archive(path: Path) -> None:
    """Refuse what is no zip archive, of which the library says something else."""
    try:
        with path.open("rb") as file:
            is_archive = zipfile.is_zipfile(file)
    except OSError as exc:
        raise CheckpointError(f"{path.name}: cannot be read ({_line(exc)}); {_FETCH_AGAIN}") from exc
    if not is_archive:
        raise CheckpointError(
            f"{path.name}: damaged, cut short, or not written by torch.save since PyTorch 1.6; "
            f"{_FETCH_AGAIN}, or use the safetensors form of the checkpoint"
        )


def _line(exc: BaseException) -> str:
    """The first sentence of an error's text, short enough for one line of ours."""
    lines = str(exc).strip().splitlines()
    return re.split(r"(?<=\w)\. ", lines[0])[0][:160] if lines else type(exc).__name__
