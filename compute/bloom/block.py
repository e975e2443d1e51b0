"""BLOOM's transformer block, and a span of consecutive blocks.

Names of modules and parameters are those of transformers, so a checkpoint loads with ``strict=True``. The
arithmetic is also transformers', to rounding: attention goes through torch's fused kernel, and keys and
values are written into memory that exists already and is not concatenated anew for every token.

Linear layers come as ``nn.Linear``, whose names a checkpoint knows; ``compute.bloom.quantized`` puts others in
their place. Steps of several sessions run together (:meth:`BloomSpan.steps`) such that linear layers see all rows
at once and attention each session by itself: a session's bits are then those that it would have alone, if its linear
layers' rows are independent.

Where they are, attention takes the tokens of a short step one by one (:data:`SINGLY_TOKENS`), in the shapes that it has
in a step of one token, because kernels add up in another order for several queries: a step of some tokens then has the
bits of as many steps of one.

The blocks of a span may lie on several GPUs, in stages of consecutive ones: hidden states move along, and a block's
keys and values lie where the block does.

With a cache, run under ``torch.inference_mode`` or ``torch.no_grad``: the cache is written in place.
Without one, gradients flow to the input and to parameters that require them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compute.bloom.alibi import alibi_bias, slopes
from compute.bloom.config import BloomConfig
from compute.bloom.gelu import gelu
from compute.bloom.segments import EagerSegments, Graphs, Segments, TunedSegments
from compute.bloom.tuned import Additions, BatchTuning, TunedRows, Tuning
from compute.linear import FrozenLinear

SINGLY_TOKENS: Final = 32  # of all rows: up to so many rows are independent, and a decode step has no more


class SpanCache(Protocol):
    """Keys and values that a span writes and reads; :class:`compute.cache.KVCache` is one."""

    @property
    def pads(self) -> Tensor | None:
        """How many tokens of padding each row begins with: [b], int64, on any device; ``None`` if none has any."""

    def extend(self, index: int, key: Tensor, value: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Write new tokens' keys and values in the span's block ``index``, counted from the span's start.

        Args:
            index: Which block.
            key: Of tokens from ``position`` on, for which there is room.
            value: Likewise.
            position: Index of the first token.

        Shapes:
            key, value: [b, h, t, hd]
            returns: keys and values of all tokens up to these, two of [b, h, position + t, hd]
        """


@dataclass(frozen=True, eq=False)
class Step:
    """Some new tokens of one session.

    Attributes:
        hidden: Their hidden states, [b, t, d].
        cache: The session's keys and values, with room for ``position + t`` tokens.
        position: Index of the first token.
        tuning: What is added for this session within these blocks.
    """

    hidden: Tensor
    cache: SpanCache
    position: int
    tuning: Tuning | None = None


class BloomAttention(nn.Module):
    """Multi-head attention with ALiBi: the part of a block that looks at other tokens."""

    def __init__(self, config: BloomConfig) -> None:
        """Make the layers, on whatever device is torch's default."""
        super().__init__()
        self.n_head = config.n_head
        self.head_dim = config.head_dim
        self.query_key_value: nn.Module = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense: nn.Module = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden: Tensor,
        bias: Tensor,
        cache: SpanCache | None,
        index: int,
        position: int,
        added: Additions | None = None,
    ) -> Tensor:
        """Attend; see :meth:`BloomBlock.forward` for the arguments."""
        fused: Tensor = self.query_key_value(hidden)  # [b, t, 3d]
        if added is not None:
            fused = added.add("query_key_value", hidden, fused)  # [b, t, 3d]
        merged = self.attend(fused, bias, cache, index, position)  # [b, t, d]
        output: Tensor = self.dense(merged)  # [b, t, d]
        return output if added is None else added.add("dense", merged, output)  # [b, t, d]

    def attend(self, fused: Tensor, bias: Tensor, cache: SpanCache | None, index: int, position: int) -> Tensor:
        """What lies between the two linear layers; each row by itself, and of a short step each token.

        Shapes:
            fused: [b, t, 3d]
            returns: [b, t, d]
        """
        b, t, _ = fused.shape
        singly = cache is not None and 1 < t <= SINGLY_TOKENS // b and self._rows_independent
        fused = fused.view(b, t, self.n_head, 3, self.head_dim).permute(3, 0, 2, 1, 4)  # [3, b, h, t, hd]
        query, key, value = fused.unbind(0)  # 3 x [b, h, t, hd]
        if cache is not None:
            key, value = cache.extend(index, key, value, position)  # [b, h, L, hd]
        if singly:
            context = _one_by_one(query, key, value, bias)  # [b, h, t, hd]
        else:
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)  # [b, h, t, hd]
        return context.transpose(1, 2).reshape(b, t, self.n_head * self.head_dim)  # [b, t, d]

    @property
    def _rows_independent(self) -> bool:
        """Whether it makes a difference how attention adds up: elsewhere linear layers do as they like in any case."""
        return isinstance(self.query_key_value, FrozenLinear) and self.query_key_value.rows_independent


class BloomMLP(nn.Module):
    """The part of a block that treats every token by itself."""

    def __init__(self, config: BloomConfig) -> None:
        """Make the layers, on whatever device is torch's default."""
        super().__init__()
        self.dense_h_to_4h: nn.Module = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h: nn.Module = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, added: Additions | None = None) -> Tensor:
        """Widen, bend, narrow.

        Shapes:
            hidden: [..., d]
            returns: [..., d]
        """
        wide: Tensor = self.dense_h_to_4h(hidden)  # [..., 4d]
        if added is not None:
            wide = added.add("dense_h_to_4h", hidden, wide)  # [..., 4d]
        wide = gelu(wide)  # [..., 4d]
        output: Tensor = self.dense_4h_to_h(wide)  # [..., d]
        return output if added is None else added.add("dense_4h_to_h", wide, output)  # [..., d]


class BloomBlock(nn.Module):
    """One transformer block of BLOOM."""

    def __init__(self, config: BloomConfig) -> None:
        """Make the layers, on whatever device is torch's default."""
        super().__init__()
        self.post_layernorm_residual = config.apply_residual_connection_post_layernorm
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attention = BloomAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = BloomMLP(config)

    def forward(
        self,
        hidden: Tensor,
        bias: Tensor,
        cache: SpanCache | None = None,
        index: int = 0,
        position: int = 0,
        added: Additions | None = None,
    ) -> Tensor:
        """Run the block on ``t`` new tokens.

        Args:
            hidden: The tokens' hidden states.
            bias: ``alibi_bias(slopes, position, t, cache.pads)``, the same for every block of a step.
            cache: Where keys and values of ``[position, position + t)`` are written, and those before read.
                ``None``, together with position 0, for a whole sequence.
            index: This block's index in the cache.
            position: Index of the first new token.
            added: What is added to the results of linear layers.

        Shapes:
            hidden: [b, t, d]
            bias: [1, h, t, position + t] or [b, h, t, position + t]
            returns: [b, t, d]
        """
        normed: Tensor = self.input_layernorm(hidden)  # [b, t, d]
        residual = normed if self.post_layernorm_residual else hidden  # [b, t, d]
        hidden = self.self_attention(normed, bias, cache, index, position, added) + residual  # [b, t, d]
        return self._finish(hidden, added)  # [b, t, d]

    def enter(self, hidden: Tensor, added: Additions | None = None) -> tuple[Tensor, Tensor]:
        """What comes before attention; tokens do not see each other.

        Shapes:
            hidden: [n, d]
            returns: the residual, [n, d], and what attention is made from, [n, 3d]
        """
        normed: Tensor = self.input_layernorm(hidden)  # [n, d]
        fused: Tensor = self.self_attention.query_key_value(normed)  # [n, 3d]
        if added is not None:
            fused = added.add("query_key_value", normed, fused)  # [n, 3d]
        return normed if self.post_layernorm_residual else hidden, fused

    def leave(self, merged: Tensor, residual: Tensor, added: Additions | None = None) -> Tensor:
        """What comes after attention; tokens do not see each other.

        Shapes:
            merged: [n, d], what attention gave
            residual: [n, d]
            returns: [n, d]
        """
        output: Tensor = self.self_attention.dense(merged)  # [n, d]
        if added is not None:
            output = added.add("dense", merged, output)  # [n, d]
        return self._finish(output + residual, added)  # [n, d]

    def _finish(self, hidden: Tensor, added: Additions | None) -> Tensor:
        """What comes after attention: [..., d] to [..., d]."""
        normed: Tensor = self.post_attention_layernorm(hidden)  # [..., d]
        residual = normed if self.post_layernorm_residual else hidden  # [..., d]
        output: Tensor = self.mlp(normed, added) + residual  # [..., d]
        return output


@dataclass(frozen=True, eq=False)
class _Part:
    """A step's rows among those of all steps, from ``start`` on, and its bias, on the device of one stage."""

    step: Step
    start: int
    b: int
    t: int
    bias: Tensor


def span_digest(block_digests: Iterable[str]) -> str:
    """The digest of a span: SHA-256 over its blocks' digests, in hexadecimal, one after another."""
    return hashlib.sha256("".join(block_digests).encode("ascii")).hexdigest()


class BloomSpan(nn.Module):
    """Blocks ``[start, end)`` of a model, run one after another.

    Attributes:
        config: The model's architecture.
        start: Index of the first block.
        end: Index after the last block.
        block_digests: Digest of each block's weights as stored; empty when they come from no checkpoint.
        digest: Digest of the span's weights, or ``""``.
        stages: Consecutive blocks on one device, counted from the span's start; one after another, all blocks.
        graphs: What :meth:`together` runs instead of single kernels, for the numbers of rows that they are made for:
            one for each of ``stages``, or none.
    """

    def __init__(
        self,
        config: BloomConfig,
        start: int,
        blocks: Iterable[BloomBlock],
        *,
        block_digests: tuple[str, ...] = (),
        digest: str = "",
    ) -> None:
        """Join blocks that exist.

        Raises:
            ValueError: There is no block, or the span is not within the model.
        """
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.config = config
        self.start = start
        self.end = start + len(self.blocks)
        if not 0 <= start < self.end <= config.n_layer:
            raise ValueError(f"span [{start}, {self.end}) is not within the model's {config.n_layer} blocks")
        self.block_digests = block_digests
        self.digest = digest
        # No buffers: the slopes stay float32 whatever the weights are converted to, and are wanted on several devices.
        own = slopes(config.n_head)  # [h]
        self._slopes = {own.device: own}
        self.stages = _stages([_device(block) for block in self.blocks])
        self.graphs: Sequence[Graphs] = ()

    def __len__(self) -> int:
        """Number of blocks."""
        return self.end - self.start

    def part(self, start: int, end: int) -> BloomSpan:
        """Blocks ``[start, end)`` of this span, sharing its weights; this span itself if these are all.

        Raises:
            ValueError: They are not within this span.
        """
        if (start, end) == (self.start, self.end):
            return self
        if not self.start <= start < end <= self.end:
            raise ValueError(f"[{start}, {end}) is not within the span [{self.start}, {self.end})")
        chosen = slice(start - self.start, end - self.start)
        blocks = self._listed()[chosen]
        digests = self.block_digests[chosen]
        return BloomSpan(
            self.config, start, blocks, block_digests=digests, digest=span_digest(digests) if digests else ""
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of norms and biases, and so of hidden states and cache; linear layers may hold others."""
        return next(self.parameters()).dtype

    @property
    def linears(self) -> list[FrozenLinear]:
        """The linear layers, if they have been replaced (``compute.bloom.quantized``)."""
        return [module for module in self.modules() if isinstance(module, FrozenLinear)]

    @property
    def rows_independent(self) -> bool:
        """Whether a row's result has the same bits alone and beside any others, up to 32 rows in all."""
        linears = self.linears
        return bool(linears) and all(layer.rows_independent for layer in linears)

    @property
    def numerics(self) -> tuple[str, str, str]:
        """What decides the bits of a result besides weights and input: dtype, quantisation, and who multiplies.

        The last one ends in ``-mixing`` where a row's bits depend on the rows beside it.
        """
        dtype, where = str(self.dtype).removeprefix("torch."), self.device.type
        linears = self.linears
        if not linears:
            return dtype, "none", where
        kinds = sorted({(layer.name, layer.kernel) for layer in linears})
        name, kernel = ("+".join(parts) for parts in zip(*kinds, strict=True))
        mixing = "" if self.rows_independent else "-mixing"
        return dtype, "none" if name == "fp32" else name, f"{where}-{kernel}{mixing}"

    @property
    def device(self) -> torch.device:
        """Where the first block is, and hidden states must be; results are where the last block is."""
        return _device(self.blocks[0])

    @property
    def devices(self) -> list[torch.device]:
        """Where each of :attr:`stages` is; keys and values of its blocks must be there, too."""
        return [_device(self.blocks[stage.start]) for stage in self.stages]

    def place(self, hidden: Tensor, index: int) -> Tensor:
        """What is on the device of any block, on that of block ``index``, counted from the span's start.

        Shapes:
            hidden: [...]
            returns: [...]
        """
        return hidden if len(self.stages) == 1 else hidden.to(_device(self.blocks[index]))

    def forward(
        self,
        hidden: Tensor,
        cache: SpanCache | None = None,
        position: int = 0,
        first: int = 0,
        last: int | None = None,
        tuning: Tuning | None = None,
    ) -> Tensor:
        """Run blocks on ``t`` new tokens: all of them, or one part after another.

        With a cache, and if :attr:`rows_independent`, up to :data:`SINGLY_TOKENS` tokens, rows counted apart, have the
        bits that they have one after another, and so has what is written into the cache.

        Args:
            hidden: Hidden states before block ``start + first``.
            cache: Keys and values, with room for ``position + t`` tokens; ``None`` for a whole sequence.
            position: Index of the first new token; 0 without a cache.
            first: First block to run, counted from the span's start.
            last: Block after the last; the span's end if ``None``.
            tuning: What is added within these blocks at least.

        Shapes:
            hidden: [b, t, d]
            returns: [b, t, d], hidden states before block ``start + last``

        Raises:
            ValueError: ``position`` is not 0 though there is no cache.
        """
        if cache is None and position:
            raise ValueError("a position other than 0 needs a cache")
        last = len(self) if last is None else last
        for stage in self.stages:
            begin, end = max(first, stage.start), min(last, stage.stop)
            if begin < end:
                hidden = self.place(hidden, begin)  # [b, t, d]
                bias = self._bias(position, hidden.shape[1], hidden, cache)  # [1 or b, h, t, L]
                for index in range(begin, end):
                    if tuning is None:
                        hidden = self.blocks[index](hidden, bias, cache, index, position)  # [b, t, d]
                    else:
                        hidden = self.tuned(index, hidden, bias, cache, position, tuning)  # [b, t, d]
        return hidden

    def tuned(
        self, index: int, hidden: Tensor, bias: Tensor, cache: SpanCache | None, position: int, tuning: Tuning
    ) -> Tensor:
        """Run block ``index``, counted from the span's start, with what is added; see :meth:`BloomBlock.forward`.

        Shapes:
            hidden: [b, t, d]
            returns: [b, t, d]
        """
        block = tuning.block(self.start + index, hidden.device)
        hidden = block.begin(hidden, position, None if cache is None else cache.pads)  # [b, t, d]
        output: Tensor = self.blocks[index](hidden, bias, cache, index, position, block)  # [b, t, d]
        return output

    def decode(self, hidden: Tensor, cache: SpanCache, position: int, tuning: Tuning | None = None) -> Tensor:
        """Run every block on a session's next few tokens, from graphs if there are any.

        Shapes:
            hidden: [b, t, d]
            returns: [b, t, d]
        """
        if self.graphs:
            return self.steps([Step(hidden, cache, position, tuning)])[0]
        output: Tensor = self(hidden, cache, position, 0, None, tuning)
        return output

    def steps(self, steps: Sequence[Step]) -> list[Tensor]:
        """Run every block on new tokens of several sessions, whose positions may all differ.

        Each session's result, and what is written into its cache, has the same bits as by :meth:`forward` alone, if
        :attr:`rows_independent` and the steps have not more rows together than that says.

        Shapes:
            returns: one [b, t, d] for every step
        """
        rows = self.together(steps)  # [n, d]
        shapes = [step.hidden.shape for step in steps]
        pieces = rows.split([shape[0] * shape[1] for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def together(self, steps: Sequence[Step]) -> Tensor:
        """The same in one piece.

        Shapes:
            returns: [n, d], the tokens of all steps, row by row, one step after another
        """
        width = self.config.hidden_size
        rows = torch.cat([step.hidden.reshape(-1, width) for step in steps])  # [n, d]
        for number, stage in enumerate(self.stages):
            rows = self._through(number, self.place(rows, stage.start), steps)  # [n, d]
        return rows

    def _through(self, number: int, rows: Tensor, steps: Sequence[Step]) -> Tensor:
        """Take all steps' rows through a stage, on whose device they are.

        Shapes:
            rows: [n, d]
            returns: [n, d]
        """
        stage = self.stages[number]
        blocks = self._listed()[stage.start : stage.stop]
        parts = self._parts(steps, rows)
        segments = self._segments(number, blocks, parts, rows)
        fused = segments.begin(rows)  # [n, 3d]
        for index, block in enumerate(blocks):
            merged = segments.room  # [n, d]
            for part in parts:
                mine = slice(part.start, part.start + part.b * part.t)
                own = fused[mine].view(part.b, part.t, -1)  # [b, t, 3d]
                context = block.self_attention.attend(
                    own, part.bias, part.step.cache, stage.start + index, part.step.position
                )  # [b, t, d]
                merged[mine] = context.view(part.b * part.t, -1)  # [b * t, d]
            fused = segments.go_on(index)  # [n, 3d]; after the last block [n, d]
        return fused

    def _parts(self, steps: Sequence[Step], rows: Tensor) -> list[_Part]:
        """What each step is among all steps' rows, which are on the device where it is about to run: [n, d]."""
        parts: list[_Part] = []
        start = 0
        for step in steps:
            b, t, _ = step.hidden.shape
            bias = self._bias(step.position, t, rows, step.cache)  # [1 or b, h, t, L]
            parts.append(_Part(step=step, start=start, b=b, t=t, bias=bias))
            start += b * t
        return parts

    def _segments(self, number: int, blocks: Sequence[BloomBlock], parts: Sequence[_Part], rows: Tensor) -> Segments:
        """What a stage runs for these rows, [n, d]: from graphs, unless something is added for anybody."""
        if any(part.step.tuning is not None for part in parts):
            first = self.start + self.stages[number].start
            numbers = range(first, first + len(blocks))
            return TunedSegments(blocks, [_added(parts, number, rows.device) for number in numbers])
        found = self.graphs[number].segments(len(rows)) if self.graphs else None
        return EagerSegments(blocks) if found is None else found

    def _listed(self) -> list[BloomBlock]:
        return [block for block in self.blocks if isinstance(block, BloomBlock)]

    def bias(self, hidden: Tensor, position: int) -> Tensor:
        """What blocks add to the scores of a step's tokens, on the device of ``hidden``; see :func:`alibi_bias`.

        Shapes:
            hidden: [b, t, d]
            returns: [1, h, t, position + t]
        """
        return self._bias(position, hidden.shape[1], hidden, None)  # [1, h, t, L]

    def _bias(self, position: int, tokens: int, like: Tensor, cache: SpanCache | None) -> Tensor:
        """The same for a number of tokens, on the device of any tensor, with the padding that the cache's rows have.

        Shapes:
            returns: [1, h, t, position + t]; [b, h, t, position + t] with padding
        """
        pads = None if cache is None or cache.pads is None else cache.pads.to(like.device)  # [b]
        known = self._slopes.get(like.device)
        if known is None:
            known = self._slopes[like.device] = next(iter(self._slopes.values())).to(like.device)  # [h]
        bias = alibi_bias(known, position, tokens, pads)  # [1 or b, h, t, L]
        # A GPU's fused kernels want one dtype for all. Rounded, what is relative is exact where it is near.
        return bias.to(like.dtype) if like.is_cuda else bias


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention of each query by itself, over the keys up to its own.

    Shapes:
        query: [b, h, t, hd]
        key, value: [b, h, L, hd]
        bias: [1 or b, h, t, L]
        returns: [b, h, t, hd]
    """
    t, length = query.shape[2], key.shape[2]
    contexts = [
        F.scaled_dot_product_attention(
            query[:, :, index : index + 1],
            key[:, :, :end],
            value[:, :, :end],
            attn_mask=bias[:, :, index : index + 1, :end],
        )  # [b, h, 1, hd]
        for index, end in enumerate(range(length - t + 1, length + 1))
    ]
    return torch.cat(contexts, dim=2)  # [b, h, t, hd]


def _added(parts: Sequence[_Part], number: int, device: torch.device) -> BatchTuning:
    """What steps add within a block, by its number in the model."""
    tuned = [(part, part.step.tuning) for part in parts]
    return BatchTuning(
        [
            TunedRows(
                rows=slice(part.start, part.start + part.b * part.t),
                shape=(part.b, part.t),
                position=part.step.position,
                pads=part.step.cache.pads,
                block=tuning.block(number, device),
            )
            for part, tuning in tuned
            if tuning is not None
        ]
    )


def _device(block: nn.Module) -> torch.device:
    return next(block.parameters()).device


def _stages(devices: Sequence[torch.device]) -> tuple[range, ...]:
    """Consecutive blocks on one device, by the device of each."""
    cuts = [index for index in range(1, len(devices)) if devices[index] != devices[index - 1]]
    return tuple(range(*pair) for pair in itertools.pairwise([0, *cuts, len(devices)]))
