"""What the thread does that runs the model: batches of steps, with the memory that they need.

The event loop decides (``compute/engine.py``) and hands over a :class:`Plan`; the thread follows it and says of each
piece whether it went well. A piece that fails takes nobody along: when a batch fails as a whole, its pieces run again
one by one, which writes the same keys and values again, and only who fails alone has failed.

Backward runs as twice as many passes as there are blocks: the first half runs them forward and keeps each one's input,
the second half runs them again, from the last to the first, with gradients.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from compute.bloom.block import BloomSpan, Step
from compute.cache import KVCache, SlotMemory
from compute.errors import BadInput, BadOutput, OutOfCache
from compute.estimates import Kind
from compute.slots import Change, Place, Slot
from compute.tuning import ServedTuning, SpanTuning, check_finite

_log = logging.getLogger(__name__)
# How torch says that memory is out on the CPU, where it has no error of its own for it.
_NO_MEMORY: Final = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


class OutOfMemory(OutOfCache):
    """There was no memory for this step, even alone."""


@dataclass(eq=False, kw_only=True)
class Work:
    """One job, as the thread sees it; while a piece of it runs, the thread's alone.

    Attributes:
        kind: What to do.
        span: The blocks.
        hidden: What comes in, on the CPU in any float: [b, t, d]; without tokens that a prefix covers.
        position: Of its first token.
        gradient: For backward: that of the output, [b, t, d].
        tuning: For training: what is added within these blocks, and no others.
        added: For a session: what is added within these blocks.
        order: For a session whose rows change places: which row each one was before, [b].
        pads: How many tokens of padding each row begins with, [b]; ``None`` if none has any.
        every_block: The result is what each block gives.
        place: Where the session's tokens are; ``None`` without a session.
        prefix: Tokens before ``position`` that another session has, whose results belong to these.
        kept_chunk: The results of chunks of so many tokens stay with the slot, for who begins alike; 0: none.
        outputs: Results so far, in the dtype of ``hidden``: [b, c, d] each, or [c, t, d] without a session. Of every
            block: one [n, b, t, d], for all of them.
        between: What goes from one pass to the next; for backward the inputs of blocks, the last one's last.
        upstream: For backward: the gradient so far.
        tuning_gradient: For backward with a tuning: that of the sequences so far, in one piece, [n], float32.
    """

    kind: Kind
    span: BloomSpan
    hidden: Tensor
    position: int = 0
    gradient: Tensor | None = None
    tuning: SpanTuning | None = None
    added: ServedTuning | None = None
    order: Tensor | None = None
    pads: Tensor | None = None
    every_block: bool = False
    place: Place | None = None
    prefix: int = 0
    kept_chunk: int = 0
    outputs: list[Tensor] = field(default_factory=list)
    between: list[Tensor] = field(default_factory=list)
    upstream: Tensor | None = None
    tuning_gradient: Tensor | None = None

    @property
    def passes(self) -> int:
        """Through which its tokens go."""
        return len(self.span) * (2 if self.kind is Kind.BACKWARD else 1)

    @property
    def is_plain(self) -> bool:
        """Nothing is asked for beside what the blocks give in the end."""
        return not self.every_block and self.added is None

    @property
    def dim(self) -> int:
        """The dimension of ``hidden`` that is cut into pieces: sequences for training, else tokens."""
        return 0 if self.place is None else 1

    def result(self) -> Tensor:
        """All outputs: [b, t, d], or [n, b, t, d] of every block."""
        return self.outputs[0] if len(self.outputs) == 1 else torch.cat(self.outputs, dim=self.dim)


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Units ``[start, stop)`` of a work through passes ``[first, last)``; a decode step is one unit."""

    work: Work
    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What to do next.

    Attributes:
        changes: Of memory, in order; each with the work that needs it, if that is granted a slot.
        pieces: To run at once: decode steps of the same blocks, or one of another kind.
    """

    changes: Sequence[tuple[Change, Work | None]]
    pieces: Sequence[Piece]


class Runner:
    """Runs plans. All of it belongs to one thread, under ``torch.inference_mode``."""

    def __init__(self) -> None:
        """Begin without memory."""
        self._memory: dict[Slot, SlotMemory] = {}

    def run(self, plan: Plan) -> list[Exception | None]:
        """Follow a plan.

        Returns:
            What went wrong with each piece: :class:`BadInput` or :class:`BadOutput` for values that are not finite,
            :class:`OutOfMemory`, or a bug.
        """
        errors: dict[Work, Exception] = {}
        for change, work in plan.changes:
            error = self._change(change, work)
            if error is not None and work is not None:
                errors[work] = error
        pieces = [piece for piece in plan.pieces if piece.work not in errors]
        outcomes = self._run(pieces)
        errors |= {piece.work: error for piece, error in zip(pieces, outcomes, strict=True) if error is not None}
        return [errors.get(piece.work) for piece in plan.pieces]

    def kept(self, slot: Slot, start: int, stop: int) -> Tensor:
        """What whole chunks of tokens ``[start, stop)`` gave, which a slot has kept.

        Shapes:
            returns: [b, stop - start, d]
        """
        outputs = self._memory[slot].outputs
        return torch.cat([outputs[end] for end in sorted(outputs) if start < end <= stop], dim=1)

    def served(self, tuning: SpanTuning, span: BloomSpan) -> ServedTuning:
        """What is added for a session.

        Raises:
            BadInput: ``not-finite``.
            OutOfMemory: There is no memory for it.
        """
        try:
            return ServedTuning(tuning, span)
        except Exception as exc:
            raise _named(exc) from exc

    def clear(self) -> None:
        """Let all memory go."""
        for slot in list(self._memory):
            self._wipe(slot)

    # Memory

    def _change(self, change: Change, work: Work | None) -> Exception | None:
        for slot in change.freed:
            self._wipe(slot)
        error: Exception | None = None
        if change.granted is not None and work is not None:
            try:
                self._memory[change.granted] = self._filled(change.granted, change, work)
            except Exception as exc:  # noqa: BLE001  # whoever waits for the step raises it
                error = _named(exc)
        for slot in change.left:
            self._wipe(slot)
        return error

    def _filled(self, slot: Slot, change: Change, work: Work) -> SlotMemory:
        memory = SlotMemory(work.span, slot.rows, slot.length)
        for copy in change.copies:
            source, count = self._memory[copy.source], copy.stop - copy.start
            first, start = copy.start - copy.source_first, copy.start - copy.target_first
            memory.copy(source, first, start, count, work.order)
            if copy.source in change.left and work.order is None and not start:  # its prefixes move along
                memory.outputs = {end: output for end, output in source.outputs.items() if end <= copy.stop}
        return memory

    def _wipe(self, slot: Slot) -> None:
        memory = self._memory.pop(slot, None)  # None: there was no memory for it
        if memory is not None:
            memory.wipe()

    def _cache(self, work: Work) -> KVCache | None:
        place = work.place
        if place is None or place.slot is None:
            return None
        source = None if place.shared_slot is None else self._memory[place.shared_slot]
        return KVCache(self._memory[place.slot], source, place.shared, work.pads)

    # Pieces

    def _run(self, pieces: list[Piece]) -> list[Exception | None]:
        if len(pieces) > 1:
            try:
                return self._together(pieces)
            except Exception as exc:  # noqa: BLE001  # who is to blame is found out one by one
                _log.info("a batch of %d failed, and runs again one by one: %s", len(pieces), exc)
        return [self._alone(piece) for piece in pieces]

    def _together(self, pieces: list[Piece]) -> list[Exception | None]:
        """Decode steps in one pass; those with bad values are left out, which changes nothing for the others."""
        span = pieces[0].work.span
        errors: dict[Work, Exception] = {}
        steps: dict[Work, Step] = {}
        for piece in pieces:
            work = piece.work
            hidden = work.hidden.to(device=span.device, dtype=span.dtype)  # [b, t, d]
            cache = self._cache(work)
            if cache is None:
                raise ValueError("a decode step without a cache")
            steps[work] = Step(hidden, cache, work.position, work.added)
        if not _finite(torch.cat([step.hidden.flatten(0, 1) for step in steps.values()])):
            errors |= {work: _bad_input(step.hidden) for work, step in steps.items() if not _finite(step.hidden)}
            steps = {work: step for work, step in steps.items() if work not in errors}
        if steps:
            rows = span.together(list(steps.values()))  # [n, d]
            good = _finite(rows)
            rows = rows.cpu()
            sizes = [step.hidden.shape[0] * step.hidden.shape[1] for step in steps.values()]
            for work, part in zip(steps, rows.split(sizes), strict=True):
                if good or _finite(part):
                    work.outputs = [part.view(work.hidden.shape).to(work.hidden.dtype)]  # [b, t, d]
                else:
                    errors[work] = _bad_output(part.view(work.hidden.shape))
        return [errors.get(piece.work) for piece in pieces]

    def _alone(self, piece: Piece) -> Exception | None:
        work = piece.work
        try:
            if piece.start == 0 and piece.first == 0:
                self._begin(work)
            if work.kind is Kind.BACKWARD:
                with torch.inference_mode(False):
                    _backward(piece)
            else:
                self._forward(piece)
        except Exception as exc:  # noqa: BLE001  # whoever waits for the step raises it
            return _named(exc)
        return None

    def _begin(self, work: Work) -> None:
        """Look at all values that came, before anything is computed, and fetch what the prefix gave."""
        for values in (work.hidden, work.gradient):
            if values is not None and not _finite(values):
                raise _bad_input(values)
        if work.tuning is not None:
            check_finite(work.tuning)
        work.outputs = []
        if work.prefix and work.place is not None and work.place.shared_slot is not None:
            kept = self._memory[work.place.shared_slot].outputs
            work.outputs += [kept[end] for end in sorted(kept) if work.position - work.prefix < end <= work.position]
        if work.every_block:
            work.outputs = [work.hidden.new_empty(len(work.span), *work.hidden.shape)]  # [n, b, t, d]

    def _forward(self, piece: Piece) -> None:
        work, span = piece.work, piece.work.span
        if piece.first == 0:
            part = work.hidden  # [b, t, d]
            if work.kind is not Kind.DECODE:
                part = part.narrow(work.dim, piece.start, piece.stop - piece.start)  # [b, c, d] or [c, t, d]
            hidden = part.to(device=span.device, dtype=span.dtype)
        else:
            hidden = work.between.pop()
        cache = self._cache(work)
        position = 0 if cache is None else work.position + piece.start
        if work.every_block:
            hidden = _each_block(piece, hidden, cache, position)  # [b, c, d]
        elif work.kind is Kind.DECODE and cache is not None:
            hidden = span.decode(hidden, cache, position, work.added)  # [b, t, d]
        else:
            tuning = work.tuning if cache is None else work.added
            hidden = span(hidden, cache, position, piece.first, piece.last, tuning)  # [b, c, d] or [c, t, d]
        if piece.last < len(span):
            work.between.append(hidden)
            return
        if work.every_block:
            return
        if not _finite(hidden):
            raise _bad_output(hidden)
        output = hidden.to(device="cpu", dtype=work.hidden.dtype)
        work.outputs.append(output)
        if cache is not None and work.kept_chunk == piece.stop - piece.start:
            cache.own.outputs[work.position + piece.stop] = output


def _each_block(piece: Piece, hidden: Tensor, cache: KVCache | None, position: int) -> Tensor:
    """A part of the way forward block by block, what each gives being a result.

    Shapes:
        hidden: [b, c, d]
        returns: [b, c, d]
    """
    work = piece.work
    (outputs,) = work.outputs  # [n, b, t, d]
    for index in range(piece.first, piece.last):
        hidden = work.span(hidden, cache, position, index, index + 1, work.added)  # [b, c, d]
        if not _finite(hidden):
            raise _bad_output(hidden)
        part = outputs[index].narrow(1, position - work.position, hidden.shape[1])  # [b, c, d]
        part.copy_(hidden.to(device="cpu", dtype=outputs.dtype))
    return hidden


def _backward(piece: Piece) -> None:
    """A part of the way forward, back, or both, of some sequences."""
    work, span = piece.work, piece.work.span
    count, blocks = piece.stop - piece.start, len(span)
    if work.gradient is None:
        raise ValueError("backward needs a gradient")
    if piece.first == 0:
        part = work.hidden.narrow(0, piece.start, count)  # [c, t, d]
        work.between = [part.to(device=span.device, dtype=span.dtype, copy=True)]
        if work.tuning is not None and piece.start == 0:
            work.tuning_gradient = torch.zeros(sum(tensor.numel() for tensor in work.tuning.tensors.values()))  # [n]
    biases: dict[torch.device, Tensor] = {}

    def run(index: int, hidden: Tensor, tuning: SpanTuning | None) -> Tensor:
        """[c, t, d], on the block's device, to [c, t, d]."""
        if hidden.device not in biases:
            biases[hidden.device] = span.bias(hidden, 0)  # [1, h, t, t]
        bias = biases[hidden.device]
        if tuning is not None:
            return span.tuned(index, hidden, bias, None, 0, tuning)
        output: Tensor = span.blocks[index](hidden, bias)
        return output

    for index in range(piece.first, min(piece.last, blocks)):  # the last entry is the input of block ``index``
        if index < blocks - 1:
            with torch.no_grad():
                output = run(index, work.between[-1], work.tuning)  # [c, t, d]
                work.between.append(span.place(output, index + 1))  # [c, t, d]
    for number in range(max(piece.first, blocks), piece.last):
        if number == blocks:
            part = work.gradient.narrow(0, piece.start, count)  # [c, t, d]
            work.upstream = part.to(device=span.device, dtype=span.dtype, copy=True)
        if work.upstream is None:
            raise ValueError("backward cannot begin halfway")
        index = 2 * blocks - 1 - number
        leaf = work.between.pop().requires_grad_(True)  # [c, t, d]
        tuning = None if work.tuning is None else work.tuning.leaves(span.start + index)
        with torch.enable_grad():
            output = run(index, leaf, tuning)  # [c, t, d]
            leaves = [leaf] if tuning is None else [leaf, *tuning.tensors.values()]
            work.upstream, *others = torch.autograd.grad(output, leaves, span.place(work.upstream, index))
        _add_up(work, index, others)
    if piece.last == 2 * blocks and work.upstream is not None:
        if not _finite(work.upstream):
            raise _bad_output(work.upstream)
        if work.tuning_gradient is not None and not _finite(work.tuning_gradient):
            raise BadOutput("the model gave NaN or infinity in the gradient of the tuning")
        work.outputs.append(work.upstream.to(device="cpu", dtype=work.hidden.dtype))


def _add_up(work: Work, index: int, gradients: Sequence[Tensor]) -> None:
    """Add some sequences' gradients of a block's tuning to those before: always the same sequences in the same order,
    hence the same bits.
    """
    if work.tuning_gradient is None or not gradients:
        return
    flat = torch.cat([each.reshape(-1) for each in gradients])  # [n of a block]
    work.tuning_gradient.narrow(0, index * len(flat), len(flat)).add_(flat)


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _bad_input(values: Tensor) -> BadInput:
    return BadInput("not-finite", f"NaN or infinity in {_bad_rows(values)} of the input")


def _bad_output(values: Tensor) -> BadOutput:
    return BadOutput(f"the model gave NaN or infinity in {_bad_rows(values)}")


def _bad_rows(values: Tensor) -> str:
    """Which rows hold NaN or infinity, for people.

    Shapes:
        values: [b, t, d]
    """
    finite = torch.isfinite(values).flatten(1).all(dim=1).tolist()  # [b]
    bad = [row for row, good in enumerate(finite) if not good]
    return f"row {bad[0]} ({len(bad)} of {len(finite)} rows)"


def _named(error: Exception) -> Exception:
    """The same error, or what it is when torch says in other words that memory is out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    ):
        traceback.clear_frames(error.__traceback__)  # they hold what the step had made so far
        torch.cuda.empty_cache()  # torch keeps what was let go in pieces that may fit nobody else
        told = OutOfMemory("the node has no memory for this step")
        told.__cause__ = error
        return told
    return error
