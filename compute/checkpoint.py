"""A span of blocks, the embeddings or the head out of a Hugging Face checkpoint, without the rest of it.

Layouts: ``model.safetensors`` or ``pytorch_model.bin``, each alone or in shards with an ``.index.json``.
Only the files that hold what is asked for are opened, and with :class:`HubCheckpoint` only they are
downloaded. Tensor names may or may not begin with ``transformer.``; here they never do.

Digests (lower-case hexadecimal SHA-256):

* of the model: canonical JSON of ``{"config": ..., "tensors": [[name, file], ...]}``, names sorted.
  It says which model and which layout this is, and a node that holds a few shards can compute it. It says
  nothing about the weights.
* of a block: for each of its tensors, sorted by name, ``name NUL dtype NUL shape NUL`` (the shape as
  ``2,3``) and the bytes as stored. Conversion to another dtype does not change it.
* of a span: its blocks' digests (64 characters each), one after another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from compute.bloom.block import BloomBlock, BloomSpan, span_digest
from compute.bloom.config import BloomConfig
from compute.bloom.head import Embeddings, Head
from compute.bloom.quantized import put_together, quantize, take_apart
from compute.devices import default_dtype, split_blocks
from compute.errors import CheckpointError
from compute.linear import backend
from compute.linear.kept import KeptWeights
from compute.memory import free_bytes
from compute.shards import Shard, open_shard
from compute.sources import FolderSource, HubSource, PeerSource, Source
from compute.tensors import tensor_bytes
from net.files.pieces import FileId

MAX_JSON_BYTES: Final = 64 << 20  # BLOOM-176B's index is 60 KB; a file far larger is not an index
FINITE_CHECK_ELEMENTS: Final = 1 << 24  # isfinite makes a mask; in pieces it takes 16 MiB at most

_BLOCK_NAME: Final = re.compile(r"^(?:transformer\.)?h\.(\d+)\.(.+)$")
_PLAIN_NAME: Final = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}$")
OPTIONAL_FILES: Final = (  # beside config.json and the weights
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_LAYOUTS: Final = (  # index first: where a repository has both, shards mean less to download
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
_WORD_EMBEDDINGS: Final = "word_embeddings.weight"
_HEX_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Device = torch.device | str
M = TypeVar("M", bound=nn.Module)


class Checkpoint:
    """A BLOOM checkpoint. Nothing is read before it is needed.

    Every method and property raises :class:`CheckpointError` where a file or a value is missing or wrong;
    the message is one line that names it and says what to do.
    """

    def __init__(self, source: Source, name: str) -> None:
        """Take files from ``source``; ``name`` is what the model is called among nodes."""
        self._source = source
        self._name = name

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """The checkpoint in a folder, named like the folder.

        Raises:
            CheckpointError: There is no such folder, or no config.json in it.
        """
        checkpoint = cls(FolderSource(folder), folder.resolve().name)
        checkpoint.file("config.json")
        return checkpoint

    @property
    def name(self) -> str:
        """The model's name: that of the folder, or of the repository without its owner."""
        return self._name

    @property
    def label(self) -> str:
        """Where it comes from, for people: the folder's path, or the repository."""
        return self._source.label

    @property
    def n_blocks(self) -> int:
        """Number of blocks of the whole model."""
        return self.config.n_layer

    def find_file(self, name: str) -> Path | None:
        """The local path of a file, or ``None`` if the checkpoint has none of that name.

        Raises:
            CheckpointError: The name is not a plain file name, or the source cannot be reached.
        """
        if not _PLAIN_NAME.fullmatch(name):
            raise CheckpointError(
                f"{self.label}: {name!r:.80} is not a plain file name; do not use this checkpoint unless you trust it"
            )
        return self._source.find(name)

    def file(self, name: str) -> Path:
        """The local path of a file, fetched first if need be.

        Raises:
            CheckpointError: As :meth:`find_file`, or the file is missing.
        """
        path = self.find_file(name)
        if path is None:
            raise CheckpointError(f"{self.label}: {name} is missing; get the file, or the whole checkpoint, again")
        return path

    @cached_property
    def config(self) -> BloomConfig:
        """The architecture, from config.json."""
        return BloomConfig.from_json(self._json("config.json"))

    @cached_property
    def digest(self) -> str:
        """The model's digest; see the top of this file."""
        tensors = sorted((name, file) for name, (_, file) in self._tensors.items())
        content = {"config": dataclasses.asdict(self.config), "tensors": tensors}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def files_at_hand(self) -> dict[str, Path] | None:
        """Every file that it is made of, by name, if all of them are here, and weights are safetensors; else None.

        Raises:
            CheckpointError: See the class.
        """
        weights = {file for _, file in self._tensors.values()}
        if not self._source.is_local or not all(file.endswith(".safetensors") for file in weights):
            return None
        index = _LAYOUTS[0][0]
        needed = {"config.json", *weights}
        found = {name: self.find_file(name) for name in (*sorted(needed), index, *OPTIONAL_FILES)}
        if any(found[name] is None for name in needed):
            return None
        return {name: path for name, path in found.items() if path is not None}

    def files_for_clients(self) -> list[str]:
        """Names of what clients need beside config and index, where there are such files: all but blocks.

        Raises:
            CheckpointError: See the class.
        """
        weights = {file for name, (_, file) in self._tensors.items() if not name.startswith("h.")}
        return [*OPTIONAL_FILES, *sorted(weights)]

    def block_digest(self, index: int) -> str:
        """The digest of one block's weights as stored; reads the block.

        Raises:
            CheckpointError: See the class.
            ValueError: There is no such block.
        """
        return self._read_block(index, torch.float32, {})[1]

    def block_digests_at_hand(self, max_bytes: int) -> tuple[str, ...] | None:
        """The digest of every block, if all their files are here and not more than ``max_bytes``; else None.

        Raises:
            CheckpointError: See the class.
        """
        if not self._source.is_local:
            return None
        files = set().union(*(self._files_of(f"h.{index}.") for index in range(self.n_blocks)))
        paths = [self.find_file(name) for name in files]
        if any(path is None for path in paths) or sum(path.stat().st_size for path in paths if path) > max_bytes:
            return None
        return tuple(self.block_digest(index) for index in range(self.n_blocks))

    def block(self, index: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The state dict of one block, converted to ``dtype``.

        Raises:
            CheckpointError: See the class.
            ValueError: There is no such block.
        """
        return self._read_block(index, dtype, {})[0]

    def load_span(
        self,
        start: int,
        end: int,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
        *,
        linear: str | None = None,
        kept: KeptWeights | None = None,
        device: Device | Sequence[Device] = "cpu",
    ) -> BloomSpan:
        """Blocks ``[start, end)``, with the digests of their weights.

        Weights are copied: the files may be changed or deleted afterwards. With ``linear``, one block at most is in
        memory unquantised.

        Args:
            start: Index of the first block.
            end: Index after the last block.
            dtype: What weights are converted to; ``None`` for float32 on the CPU and bfloat16 on GPUs.
            progress: Called with (blocks loaded, blocks in all), first with 0 and last with all.
            linear: Backend of the linear layers (:data:`compute.linear.BACKENDS`), on the CPU with float32 for the
                rest; ``None`` for plain layers in ``dtype``.
            kept: Where quantised weights are looked for and kept, for backends whose weights are worth it.
            device: Where the blocks are to be; they are quantised there, one after another. Several GPUs get
                consecutive blocks each, by how much memory they have.

        Raises:
            CheckpointError: See the class; also, that the weights do not fit into the backend's form, or into the
                memory of GPUs.
            ValueError: The span is empty or not within the model, there is no such backend, on the CPU it comes
                together with another dtype than float32, or several devices are not different GPUs.
            RuntimeError: This machine lacks the backend's kernel.
        """
        devices = _as_devices(device)
        dtype = dtype or default_dtype(devices[0])
        if linear is not None:
            if dtype != torch.float32 and devices[0].type == "cpu":
                raise ValueError(f"linear layers {linear} come with float32, not with {dtype}")
            kept = kept if backend(linear, devices[0]).is_kept else None
        if not 0 <= start < end <= self.n_blocks:
            raise ValueError(f"span [{start}, {end}) is not within the {self.n_blocks} blocks of {self.name}")
        places = self._places(end - start, devices, dtype, linear)
        report = progress or (lambda done, total: None)
        report(0, end - start)
        blocks: list[BloomBlock] = []
        digests: list[str] = []
        with contextlib.ExitStack() as stack:
            shards: dict[str, Shard] = {}
            for index, place in zip(range(start, end), places, strict=True):
                key = {"linear": linear, "dtype": str(dtype), "device": place.type}
                with self._fitting(index, place):
                    block, digest = self._find_kept(index, key, kept, place) if linear and kept else (None, "")
                    if block is None:
                        self._open_shards(self._files_of(f"h.{index}."), shards, stack)
                        block, digest = self._make_block(index, dtype, shards, place)
                        if linear is not None:
                            self._quantize(block, index, linear, kept, key, digest)
                blocks.append(block)
                digests.append(digest)
                report(len(blocks), end - start)
        return BloomSpan(self.config, start, blocks, block_digests=tuple(digests), digest=span_digest(digests))

    def block_bytes(self, linear: str | None, device: torch.device, dtype: torch.dtype | None = None) -> int:
        """About how much memory a block takes, in the form that :meth:`load_span` gives it.

        Raises:
            ValueError: There is no such backend.
        """
        config, dtype = self.config, dtype or default_dtype(device)
        bits = 8 * dtype.itemsize if linear is None else backend(linear, device).weight_bits
        rest = config.parameters_per_block - config.weights_per_block
        return int(config.weights_per_block * bits / 8) + rest * dtype.itemsize

    def _places(
        self, n_blocks: int, devices: Sequence[torch.device], dtype: torch.dtype, linear: str | None
    ) -> list[torch.device]:
        """The device of each block of a span."""
        if devices[0].type == "cpu":  # what does not fit there is the system's affair
            return [devices[0]] * n_blocks
        try:
            block_bytes = self.block_bytes(linear, devices[0], dtype)
            pieces = split_blocks(n_blocks, [free_bytes(each) for each in devices], block_bytes)
        except ValueError as exc:
            raise CheckpointError(f"{self.label}: {exc}") from exc
        return [each for each, (first, last) in zip(devices, pieces, strict=True) for _ in range(first, last)]

    @contextlib.contextmanager
    def _fitting(self, index: int, device: torch.device) -> Iterator[None]:
        """Says in our words that a GPU has no memory for a block."""
        try:
            yield
        except torch.OutOfMemoryError as exc:
            raise CheckpointError(
                f"{self.label}: block {index} does not fit into what is left of the memory of {device}; serve fewer "
                "blocks, or in a smaller form"
            ) from exc

    def _make_block(
        self, index: int, dtype: torch.dtype, shards: dict[str, Shard], device: torch.device
    ) -> tuple[BloomBlock, str]:
        """A block as stored, and its digest."""
        state, digest = self._read_block(index, dtype, shards)
        with torch.device("meta"):
            block = BloomBlock(self.config)
        return _assign(block, state).to(device), digest

    def load_embeddings(self, dtype: torch.dtype = torch.float32) -> Embeddings:
        """Word embeddings and their layer norm.

        Raises:
            CheckpointError: See the class.
        """
        with torch.device("meta"):
            module = Embeddings(self.config)
        return _assign(module, self._read({name: name for name in module.state_dict()}, module, dtype))

    def load_head(self, dtype: torch.dtype = torch.float32, embeddings: Embeddings | None = None) -> Head:
        """The last layer norm and the output matrix.

        With tied weights, which is how BLOOM comes, the matrix is that of the embeddings, whether or not
        the checkpoint also has an ``lm_head.weight``.

        Args:
            dtype: What weights are converted to.
            embeddings: Loaded in the same dtype; a tied matrix is then shared and not read again.

        Raises:
            CheckpointError: See the class.
        """
        with torch.device("meta"):
            module = Head(self.config)
        names = {name: name for name in module.state_dict()}
        shared: dict[str, Tensor] = {}
        if self.config.tie_word_embeddings:
            names["lm_head.weight"] = _WORD_EMBEDDINGS
            if embeddings is not None and embeddings.word_embeddings.weight.dtype == dtype:
                del names["lm_head.weight"]
                shared["lm_head.weight"] = embeddings.word_embeddings.weight.detach()
        return _assign(module, self._read(names, module, dtype) | shared)

    @cached_property
    def _tensors(self) -> dict[str, tuple[str, str]]:
        """Name without ``transformer.`` -> (name in the file, the file's name)."""
        for index_name, single_name in _LAYOUTS:
            if self.find_file(index_name) is not None:
                pairs = self._read_index(index_name)
                break
            path = self.find_file(single_name)
            if path is not None:
                with open_shard(path) as shard:
                    pairs = [(name, single_name) for name in shard.names()]
                break
        else:
            known = ", ".join(name for pair in _LAYOUTS for name in pair)
            raise CheckpointError(f"{self.label}: no weights; get one of {known}")
        tensors: dict[str, tuple[str, str]] = {}
        for stored, file in pairs:
            name = stored.removeprefix("transformer.")
            if name in tensors:
                raise CheckpointError(f"{self.label}: {name} is there twice; get the checkpoint again")
            tensors[name] = (stored, file)
        return tensors

    def _read_index(self, index_name: str) -> list[tuple[str, str]]:
        weight_map = self._json(index_name).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.label}: {index_name} has no weight_map; get the file again")
        suffix = ".safetensors" if "safetensors" in index_name else ".bin"
        pairs: list[tuple[str, str]] = []
        for stored, file in weight_map.items():
            if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file) or not file.endswith(suffix):
                raise CheckpointError(
                    f"{self.label}: {index_name} puts {stored:.80} into {file!r:.80}, "
                    f"which is no plain *{suffix} name; "
                    "do not use this checkpoint unless you trust it"
                )
            pairs.append((stored, file))
        return pairs

    def _json(self, name: str) -> dict[str, object]:
        """A JSON object out of a file of bounded size."""
        path = self.file(name)
        try:
            if path.stat().st_size > MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES} bytes; get the file again")
            content: object = json.loads(path.read_bytes())
        except OSError as exc:
            raise CheckpointError(f"{path}: cannot be read ({exc.strerror}); check its permissions") from exc
        except (ValueError, RecursionError) as exc:
            raise CheckpointError(f"{path}: not JSON ({str(exc)[:160]}); get the file again") from exc
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: not a JSON object; get the file again")
        return content

    def _find_kept(
        self, index: int, form: Mapping[str, object], kept: KeptWeights, device: torch.device
    ) -> tuple[BloomBlock | None, str]:
        """A block that was kept, and the digest of what it was made from."""
        found = kept.get(self._kept_key(index, form))
        if found is None or not _HEX_DIGEST.fullmatch(found.source):
            return None, ""
        try:
            return put_together(self.config, str(form["linear"]), found.tensors, device), found.source
        except (KeyError, ValueError) as exc:
            _log.warning("block %d of %s: what was kept does not fit, and is made anew (%s)", index, self.name, exc)
            return None, ""

    def _quantize(
        self,
        block: BloomBlock,
        index: int,
        linear: str,
        kept: KeptWeights | None,
        form: Mapping[str, object],
        digest: str,
    ) -> None:
        try:
            quantize(block, linear)
        except ValueError as exc:
            raise CheckpointError(f"{self.label}: block {index} has {exc}") from exc
        if kept is not None:
            kept.put(self._kept_key(index, form), take_apart(block), digest)

    def _kept_key(self, index: int, form: Mapping[str, object]) -> dict[str, object]:
        """What decides a quantised block; reading the weights themselves is what keeping them saves."""
        files = []
        for file in sorted(self._files_of(f"h.{index}.")):
            status = self.file(file).stat()
            files.append([file, status.st_size, status.st_mtime_ns])
        return {"model": self.digest, "block": index, **form, "files": files}

    def _files_of(self, prefix: str) -> set[str]:
        return {file for name, (_, file) in self._tensors.items() if name.startswith(prefix)}

    def _open_shards(self, files: set[str], shards: dict[str, Shard], stack: contextlib.ExitStack) -> dict[str, Shard]:
        """Open what is not open yet; ``stack`` closes it."""
        for file in sorted(files - shards.keys()):
            shards[file] = stack.enter_context(open_shard(self.file(file)))
        return shards

    def _read_block(self, index: int, dtype: torch.dtype, shards: dict[str, Shard]) -> tuple[dict[str, Tensor], str]:
        """State dict and digest of one block."""
        if not 0 <= index < self.n_blocks:
            raise ValueError(f"no block {index}: {self.name} has {self.n_blocks}")
        with torch.device("meta"):
            block = BloomBlock(self.config)
        prefix = f"h.{index}."
        names = {local: prefix + local for local in block.state_dict()}
        for name in self._tensors:
            match = _BLOCK_NAME.match(name)
            if match and int(match[1]) == index and match[2] not in names:
                raise CheckpointError(f"{self.label}: unknown tensor {name:.80}; get a plain BLOOM checkpoint")
        hasher = hashlib.sha256()
        state = self._read(names, block, dtype, shards=shards, hasher=hasher)
        return state, hasher.hexdigest()

    def _read(
        self,
        names: Mapping[str, str],
        module: nn.Module,
        dtype: torch.dtype,
        *,
        shards: dict[str, Shard] | None = None,
        hasher: hashlib._Hash | None = None,
    ) -> dict[str, Tensor]:
        """Tensors for a module.

        Args:
            names: Name in the module -> name in the checkpoint.
            module: Says which shapes are right.
            dtype: What to convert to.
            shards: Files that are open already.
            hasher: Gets every tensor as stored, in the order of the checkpoint's names.
        """
        shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        state: dict[str, Tensor] = {}
        missing = sorted(name for name in names.values() if name not in self._tensors)
        if missing:
            raise CheckpointError(f"{self.label}: tensor {missing[0]} is missing; get the checkpoint again")
        with contextlib.ExitStack() as stack:
            files = {self._tensors[name][1] for name in names.values()}
            opened = self._open_shards(files, {} if shards is None else dict(shards), stack)
            for local, name in sorted(names.items(), key=lambda item: item[1]):
                stored_name, file = self._tensors[name]
                stored = self._stored(opened[file], stored_name, file, shapes[local])
                if hasher is not None:
                    shape = ",".join(str(size) for size in stored.shape)
                    kind = str(stored.dtype).removeprefix("torch.")
                    hasher.update(f"{name}\0{kind}\0{shape}\0".encode())
                    hasher.update(tensor_bytes(stored))
                state[local] = self._converted(stored, name, file, dtype)
        return state

    def _stored(self, shard: Shard, name: str, file: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor as stored, its shape and dtype checked before it is read."""
        try:
            dtype, found = shard.describe(name)
        except KeyError:
            raise CheckpointError(
                f"{self.label}: {file} does not hold {name}, though the index says so; get the file again"
            ) from None
        if found != shape:
            raise CheckpointError(
                f"{self.label}: {name} has shape {list(found)}, config.json asks for {list(shape)}; "
                "get config.json and weights of the same model"
            )
        if dtype is None:
            raise CheckpointError(
                f"{self.label}: {name} is not float16, bfloat16 or float32; get an unquantised checkpoint"
            )
        return shard.read(name)

    def _converted(self, stored: Tensor, name: str, file: str, dtype: torch.dtype) -> Tensor:
        """A copy in ``dtype``, every element finite."""
        tensor = stored.to(dtype, copy=True)
        if _finite(tensor):
            return tensor
        if _finite(stored):
            raise CheckpointError(f"{self.label}: {name} does not fit into {dtype}; choose bfloat16 or float32")
        raise CheckpointError(f"{self.label}: {name} in {file} holds NaN or infinity; get the file again")


class HubCheckpoint(Checkpoint):
    """A checkpoint on the Hugging Face hub; each file is downloaded when it is first needed."""

    def __init__(self, repository: str, revision: str | None = None) -> None:
        """Name a repository, ``owner/model``, and if wanted a branch, tag or commit."""
        super().__init__(HubSource(repository, revision), repository.rsplit("/", 1)[-1])


class PeerCheckpoint(Checkpoint):
    """A checkpoint whose files peers hold.

    Attributes:
        manifest: By which they are known.
    """

    def __init__(self, source: PeerSource, name: str, manifest: FileId) -> None:
        """Take files from ``source``."""
        super().__init__(source, name)
        self.manifest = manifest


def _as_devices(device: Device | Sequence[Device]) -> tuple[torch.device, ...]:
    """One device, or several GPUs."""
    names = (device,) if isinstance(device, (str, torch.device)) else tuple(device)
    devices = tuple(torch.device(name) for name in names)
    alike = {each.type for each in devices}
    if not devices or len(alike) > 1 or len(set(devices)) < len(devices):
        raise ValueError(f"a span cannot be on {', '.join(map(str, devices)) or 'no device'}")
    return devices


def _finite(tensor: Tensor) -> bool:
    flat = tensor.reshape(-1)  # [n]
    starts = range(0, flat.numel(), FINITE_CHECK_ELEMENTS)
    return all(bool(torch.isfinite(flat[start : start + FINITE_CHECK_ELEMENTS]).all()) for start in starts)


def _assign(module: M, state: Mapping[str, Tensor]) -> M:
    """Give a module made on ``meta`` its weights, frozen."""
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval()
