"""Quantised weights kept on disk, so that a node starts in seconds where quantising takes minutes.

A folder of ``.safetensors`` files, each one thing (a block), named by the digest of its key. A file's metadata are

    format    "raceme-kept-1"
    key       what it was made from and how: canonical JSON, compared as a whole
    source    digest of the weights that it was made from, as stored there
    content   SHA-256 over its tensors: name NUL dtype NUL shape NUL bytes, sorted by name

A file that says something else than is expected, or whose tensors are not what ``content`` says, is deleted and made
anew. Nothing is unpickled. Files appear by being renamed, whole. When they are more than the limit, those go first
that were not used for the longest time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compute.errors import CheckpointError
from compute.shards import check_header
from compute.tensors import tensor_bytes

FORMAT: Final = "raceme-kept-1"
DEFAULT_MAX_BYTES: Final = 200 << 30  # BLOOM-176B in nf4 is 97 GB
_ABANDONED_S: Final = 24 * 3600.0  # no file takes so long to write
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Kept:
    """What a file held.

    Attributes:
        tensors: By name; copies, the file may go.
        source: Digest of what they were made from.
    """

    tensors: dict[str, Tensor]
    source: str


class KeptWeights:
    """The folder. Several processes may use it at once."""

    def __init__(self, folder: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        """Name the folder, which is made when there is something to keep, and the most that all files may take.

        Raises:
            ValueError: ``max_bytes`` is negative.
        """
        if max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}, expected at least 0")
        self.folder = folder
        self.max_bytes = max_bytes

    def get(self, key: Mapping[str, object]) -> Kept | None:
        """What was kept under ``key``, if it is there and whole."""
        text = _canonical(key)
        path = self._path(text)
        try:
            check_header(path)
            kept = _read(path, text)
        except FileNotFoundError:
            return None
        except (CheckpointError, SafetensorError, OSError, ValueError) as exc:
            if path.exists():
                _log.warning("%s: not used, and made anew (%s)", path.name, exc)
                path.unlink(missing_ok=True)
            return None
        try:
            os.utime(path)  # used now
        except OSError as exc:
            _log.debug("%s: %s", path.name, exc)
        return kept

    def put(self, key: Mapping[str, object], tensors: Mapping[str, Tensor], source: str) -> None:
        """Keep tensors, if they fit; a full disk is no error, as there is always the checkpoint."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self.max_bytes:
            return
        text = _canonical(key)
        metadata = {"format": FORMAT, "key": text, "source": source, "content": content_digest(tensors)}
        path = self._path(text)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=path.stem + "-", suffix=".part", dir=self.folder)
            os.close(handle)
            part = Path(name)
            try:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, name, metadata=metadata)
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            self._make_room(path)
        except (OSError, SafetensorError) as exc:
            _log.warning("quantised weights are not kept: %s", exc)

    def _path(self, key: str) -> Path:
        return self.folder / (hashlib.sha256(key.encode("ascii")).hexdigest()[:40] + ".safetensors")

    def _make_room(self, newest: Path) -> None:
        """Delete what was used longest ago until the rest fits, and what was never finished."""
        for part in self.folder.glob("*.part"):
            if _age_s(part) > _ABANDONED_S:
                part.unlink(missing_ok=True)
        files: list[tuple[int, str, int, Path]] = []
        for path in self.folder.glob("*.safetensors"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process made room
                continue
            files.append((status.st_mtime_ns, path.name, status.st_size, path))
        total = sum(size for _, _, size, _ in files)
        for _, _, size, path in sorted(files):
            if total <= self.max_bytes:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """See ``content`` at the top of this file."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        kind = str(tensor.dtype).removeprefix("torch.")
        hasher.update(f"{name}\0{kind}\0{','.join(str(size) for size in tensor.shape)}\0".encode())
        hasher.update(tensor_bytes(tensor.detach().cpu().contiguous()))
    return hasher.hexdigest()


def _read(path: Path, key: str) -> Kept:
    """Raises:
    ValueError: the file says something else than is expected.
    """
    with safe_open(str(path), framework="pt", device="cpu") as file:
        metadata: dict[str, str] = file.metadata() or {}
        if metadata.get("format") != FORMAT or metadata.get("key") != key or "source" not in metadata:
            raise ValueError("made from something else")
        names: list[str] = list(file.keys())
        tensors: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in names}
    if content_digest(tensors) != metadata.get("content"):
        raise ValueError("damaged")
    return Kept(tensors, metadata["source"])


def _canonical(key: Mapping[str, object]) -> str:
    return json.dumps(key, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
