"""What a client trains inside of blocks that others serve: matrices of low rank, and prompts before each block.

Nodes apply it for its owner alone, keep none of it, and give its gradients back; their own weights never change. It is
float32, whatever a node computes in. In one piece, as it travels and as its gradients do, it is one flat vector: block
after block, and in each ``prompts.{block}`` [p, d] if there are any, then for each target, in the order of
:data:`TARGETS`, ``lora.{block}.{target}.a`` [rank, in] and ``lora.{block}.{target}.b`` [out, rank]. Blocks have their
numbers in the model.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from compute.bloom.block import BloomSpan
from compute.bloom.config import BloomConfig
from compute.bloom.tuned import BlockTuning, LowRank, Matrices
from compute.errors import BadInput
from compute.linear import FrozenLinear
from compute.linear.plain import Float32Linear
from compute.tensors import to_wire

TARGETS: Final = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
# Width of each one's input and output, in hidden sizes.
_WIDTHS: Final = {"query_key_value": (1, 3), "dense": (1, 1), "dense_h_to_4h": (1, 4), "dense_4h_to_h": (4, 1)}
MAX_RANK: Final = 256  # beyond, as much would travel and be multiplied as the layers themselves
MAX_PROMPTS: Final = 1024  # half of what BLOOM was trained on
MAX_SCALE: Final = 65536.0  # alpha is some times the rank at most; what is more overflows sooner or later


@dataclass(frozen=True, kw_only=True)
class TuningForm:
    """What there is, without the numbers.

    Attributes:
        rank: Of the matrices; 0 if there are none.
        scale: What ``B A`` is multiplied with: alpha / rank.
        targets: Linear layers of each block that have matrices, in the order of :data:`TARGETS`.
        prompts: Tokens at the beginning that get something added before each block; 0 if none do.
    """

    rank: int = 0
    scale: float = 1.0
    targets: tuple[str, ...] = ()
    prompts: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: One is out of bounds, or there are targets without a rank or the other way round.
        """
        for name, value, most in (("rank", self.rank, MAX_RANK), ("prompts", self.prompts, MAX_PROMPTS)):
            if type(value) is not int or not 0 <= value <= most:
                raise ValueError(f"{name} is {value!r:.40}, expected 0 to {most}")
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)) or not abs(self.scale) <= MAX_SCALE:
            raise ValueError(f"scale is {self.scale!r:.40}, expected a number up to {MAX_SCALE:g}")
        if self.targets != tuple(name for name in TARGETS if name in self.targets):
            raise ValueError(f"targets are {self.targets!r:.100}, expected some of {', '.join(TARGETS)}, in this order")
        if bool(self.rank) != bool(self.targets):
            raise ValueError(f"a rank of {self.rank} for {len(self.targets)} targets")

    def shapes(self, config: BloomConfig, start: int, end: int) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors for blocks ``[start, end)``, in the order in which they travel."""
        width = config.hidden_size
        shapes: list[tuple[str, tuple[int, ...]]] = []
        for block in range(start, end):
            if self.prompts:
                shapes.append((f"prompts.{block}", (self.prompts, width)))
            for target in self.targets:
                taken, given = _WIDTHS[target]
                shapes.append((f"lora.{block}.{target}.a", (self.rank, taken * width)))
                shapes.append((f"lora.{block}.{target}.b", (given * width, self.rank)))
        return shapes

    def n_elements(self, config: BloomConfig, start: int, end: int) -> int:
        """Numbers for blocks ``[start, end)``; every block has as many."""
        each = self.rank * sum(sum(_WIDTHS[target]) for target in self.targets) + self.prompts
        return (end - start) * each * config.hidden_size

    def to_fields(self) -> dict[str, object]:
        """For the wire."""
        return {"rank": self.rank, "scale": float(self.scale), "targets": list(self.targets), "prompts": self.prompts}

    @classmethod
    def from_fields(cls, fields: Mapping[str, object]) -> TuningForm:
        """Out of fields of a message that may hold anything; what is missing is none, and other fields are left alone.

        Raises:
            BadInput: ``bad-value``.
        """
        rank, scale = fields.get("rank", 0), fields.get("scale", 1.0)
        targets, prompts = fields.get("targets", []), fields.get("prompts", 0)
        if type(rank) is not int or type(prompts) is not int or type(scale) not in (int, float):
            raise BadInput("bad-value", "a tuning's rank and prompts are integers, and its scale is a number")
        if not isinstance(targets, (list, tuple)) or not all(isinstance(name, str) for name in targets):
            raise BadInput("bad-value", "a tuning's targets are a list of names")
        try:
            return cls(rank=rank, scale=float(scale), targets=tuple(targets), prompts=prompts)  # type: ignore[arg-type]
        except (ValueError, OverflowError) as error:
            raise BadInput("bad-value", str(error)) from error


class SpanTuning:
    """What is added to blocks ``[start, end)`` of a model, by one owner. Immutable; do not change its tensors, either.

    Attributes:
        form: What there is.
        start: First block.
        end: Block after the last.
        tensors: By name, float32, in the order in which they travel.
    """

    def __init__(self, form: TuningForm, start: int, end: int, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors together; gradients flow to those that want any.

        Raises:
            ValueError: There is no block, names are missing or unknown, or a tensor is not float32.
        """
        self.form = form
        self.start = start
        self.end = end
        if not 0 <= start < end:
            raise ValueError(f"[{start}, {end}) are no blocks")
        names = _names(form, start, end)
        if set(tensors) != set(names):
            raise ValueError(f"a tuning of {len(names)} tensors, not {sorted(set(tensors) ^ set(names))!r:.100}")
        wrong = next((name for name in names if tensors[name].dtype != torch.float32), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is {tensors[wrong].dtype}, expected float32")
        self.tensors: Mapping[str, Tensor] = MappingProxyType({name: tensors[name] for name in names})

    @classmethod
    def from_flat(cls, form: TuningForm, config: BloomConfig, start: int, end: int, flat: Tensor) -> SpanTuning:
        """Out of one piece, whose memory it shares.

        Shapes:
            flat: [n], float32

        Raises:
            BadInput: ``bad-value``: these are no blocks of the model; ``bad-dtype``; ``bad-shape``.
        """
        if not 0 <= start < end <= config.n_layer:
            raise BadInput("bad-value", f"[{start}, {end}) are no blocks of a model that has {config.n_layer}")
        if flat.dtype != torch.float32:
            raise BadInput("bad-dtype", f"a tuning in {flat.dtype}, expected float32")
        count = form.n_elements(config, start, end)
        if flat.shape != (count,):
            raise BadInput("bad-shape", f"a tuning of shape {list(flat.shape)}, expected [{count}]")
        shapes = form.shapes(config, start, end)
        pieces = flat.split([math.prod(shape) for _, shape in shapes]) if shapes else ()
        tensors = {name: piece.view(shape) for (name, shape), piece in zip(shapes, pieces, strict=True)}
        return cls(form, start, end, tensors)

    def flat(self) -> Tensor:
        """In one piece, a copy; gradients flow.

        Shapes:
            returns: [n], float32
        """
        tensors = [tensor.reshape(-1) for tensor in self.tensors.values()]
        return torch.cat(tensors) if tensors else torch.zeros(0)  # [n]

    def part(self, start: int, end: int) -> SpanTuning:
        """That of blocks ``[start, end)`` alone, sharing memory; itself if these are all.

        Raises:
            ValueError: They are not within it.
        """
        if (start, end) == (self.start, self.end):
            return self
        if not self.start <= start < end <= self.end:
            raise ValueError(f"[{start}, {end}) is not within the tuning of [{self.start}, {self.end})")
        return SpanTuning(self.form, start, end, {name: self.tensors[name] for name in _names(self.form, start, end)})

    @functools.cached_property
    def key(self) -> bytes:
        """SHA-256 of what it is and all of its numbers: 32 bytes that name it."""
        return tuning_key(self.form, self.start, self.end, [to_wire(each)[2] for each in self.tensors.values()])

    @property
    def n_bytes(self) -> int:
        """Of its numbers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def check(self, config: BloomConfig) -> None:
        """Whether it fits a model. Values are not looked at.

        Raises:
            BadInput: ``bad-value``: the model has no such blocks; ``bad-shape``.
        """
        if self.end > config.n_layer:
            raise BadInput("bad-value", f"a tuning of [{self.start}, {self.end}) for {config.n_layer} blocks")
        for name, shape in self.form.shapes(config, self.start, self.end):
            if self.tensors[name].shape != shape:
                raise BadInput("bad-shape", f"{name} is {list(self.tensors[name].shape)}, expected {list(shape)}")

    def block_tensors(self, number: int) -> list[Tensor]:
        """Those of one block, in order."""
        return [self.tensors[name] for name in _names(self.form, number, number + 1)]

    def leaves(self, number: int) -> SpanTuning:
        """That of one block, with tensors of its own that want gradients; to be made outside of inference mode."""
        mine = self.part(number, number + 1)
        copies = {name: tensor.detach().clone().requires_grad_(True) for name, tensor in mine.tensors.items()}
        return SpanTuning(self.form, number, number + 1, copies)

    def block(self, number: int, device: torch.device) -> BlockTuning:
        """See :class:`compute.bloom.tuned.Tuning`; gradients flow to the tensors."""
        return block_tuning(self.form, [tensor.to(device) for tensor in self.block_tensors(number)])


class ServedTuning:
    """What is added for a session, in the form that is best for many small steps: on the CPU, a row has the same bits
    alone and beside any others, up to 32 rows. On GPUs it is where the blocks are.

    Attributes:
        key: As of :class:`SpanTuning`.
        n_bytes: Of its numbers.
    """

    def __init__(self, tuning: SpanTuning, span: BloomSpan) -> None:
        """Copy what is added within a span's blocks.

        Raises:
            BadInput: ``not-finite``.
            RuntimeError: There is no memory, as torch says it.
        """
        check_finite(tuning)
        self.key = tuning.key
        self.n_bytes = tuning.n_bytes
        self._blocks = {
            span.start + index: _serve(tuning, span.start + index, device)
            for stage, device in zip(span.stages, span.devices, strict=True)
            for index in stage
        }

    def block(self, number: int, device: torch.device) -> BlockTuning:
        """See :class:`compute.bloom.tuned.Tuning`."""
        return self._blocks[number]


@dataclass(frozen=True, eq=False)
class _Packed:
    """``A`` and ``B`` as linear layers whose rows are independent; see :class:`compute.bloom.tuned.LowRank`."""

    a: FrozenLinear
    b: FrozenLinear
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        output: Tensor = self.b(self.a(x.float()) * self.scale)  # [..., out]
        return output


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradients:
    """What a call back through blocks gives.

    Attributes:
        hidden: With respect to what came in, [b, t, d], in its dtype.
        tuning: With respect to the tuning of these blocks, in one piece, all sequences together: [n], float32; ``None``
            without one.
    """

    hidden: Tensor
    tuning: Tensor | None = None


def block_tuning(form: TuningForm, tensors: Sequence[Tensor]) -> BlockTuning:
    """Additions to one block, out of its tensors in order."""
    rest = list(tensors)
    prompts = rest.pop(0) if form.prompts else None
    pairs = zip(form.targets, rest[::2], rest[1::2], strict=True)
    return BlockTuning(prompts, {target: Matrices(a, b, form.scale) for target, a, b in pairs})


def check_finite(tuning: SpanTuning) -> None:
    """Look at all values.

    Raises:
        BadInput: ``not-finite``.
    """
    for name, tensor in tuning.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BadInput("not-finite", f"NaN or infinity in {name} of the tuning")


def _serve(tuning: SpanTuning, number: int, device: torch.device) -> BlockTuning:
    copies = [tensor.detach().to(device, copy=True) for tensor in tuning.block_tensors(number)]
    block = block_tuning(tuning.form, copies)
    if device.type != "cpu":
        return block
    packed: dict[str, LowRank] = {
        target: _Packed(_pack(matrices.a), _pack(matrices.b), matrices.scale)
        for target, matrices in block.low_rank.items()
        if isinstance(matrices, Matrices)
    }
    return BlockTuning(block.prompts, packed)


def _pack(matrix: Tensor) -> FrozenLinear:
    return Float32Linear.pack(matrix, matrix.new_zeros(len(matrix)))


def tuning_key(form: TuningForm, start: int, end: int, pieces: Sequence[memoryview | bytes]) -> bytes:
    """What names a tuning: SHA-256 of its form, its blocks and its numbers as they travel (float32, little-endian).

    Args:
        form: What there is.
        start: First block.
        end: Block after the last.
        pieces: The numbers; how they are cut makes no difference.
    """
    told = f"raceme-tuning:{form.rank}:{float(form.scale).hex()}:{','.join(form.targets)}:{form.prompts}:{start}:{end}:"
    digest = hashlib.sha256(told.encode("ascii"))
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def _names(form: TuningForm, start: int, end: int) -> list[str]:
    """Of all tensors, in the order in which they travel."""
    names: list[str] = []
    for block in range(start, end):
        names += [f"prompts.{block}"] * bool(form.prompts)
        names += [f"lora.{block}.{target}.{side}" for target in form.targets for side in "ab"]
    return names
