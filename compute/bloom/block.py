"""BLOOM's transformer block, and a span of consecutive blocks.

Names of modules and parameters are those of transformers, so a checkpoint loads with ``strict=True``. The
arithmetic is also transformers', to rounding: attention goes through torch's fused kernel, and keys and
values are written into memory that exists already and is not concatenated anew for every token.

With a cache, run under ``torch.inference_mode`` or ``torch.no_grad``: the cache is written in place.
Without one, gradients flow to the input and to parameters that require them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compute.bloom.alibi import alibi_bias, slopes
from compute.bloom.config import BloomConfig


class SpanCache(Protocol):
    """Keys and values that a span writes and reads; :class:`compute.cache.KVCache` is one."""

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the span's block ``index``, counted from the span's start.

        Shapes:
            returns: two of [b, h, L, hd], with room for every token up to the end of the step
        """


class BloomAttention(nn.Module):
    """Multi-head attention with ALiBi: the part of a block that looks at other tokens."""

    def __init__(self, config: BloomConfig) -> None:
        """Make the layers, on whatever device is torch's default."""
        super().__init__()
        self.n_head = config.n_head
        self.head_dim = config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden: Tensor, bias: Tensor, keys: Tensor | None, values: Tensor | None, position: int
    ) -> Tensor:
        """Attend; see :meth:`BloomBlock.forward` for the arguments."""
        b, t, d = hidden.shape
        fused: Tensor = self.query_key_value(hidden)  # [b, t, 3d]
        fused = fused.view(b, t, self.n_head, 3, self.head_dim).permute(3, 0, 2, 1, 4)  # [3, b, h, t, hd]
        query, key, value = fused.unbind(0)  # 3 x [b, h, t, hd]
        if keys is not None and values is not None:
            end = position + t
            keys[:, :, position:end] = key  # [b, h, t, hd]
            values[:, :, position:end] = value  # [b, h, t, hd]
            key, value = keys[:, :, :end], values[:, :, :end]  # [b, h, L, hd]
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)  # [b, h, t, hd]
        merged = context.transpose(1, 2).reshape(b, t, d)  # [b, t, d]
        output: Tensor = self.dense(merged)  # [b, t, d]
        return output


class BloomMLP(nn.Module):
    """The part of a block that treats every token by itself."""

    def __init__(self, config: BloomConfig) -> None:
        """Make the layers, on whatever device is torch's default."""
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Widen, bend, narrow.

        Shapes:
            hidden: [b, t, d]
            returns: [b, t, d]
        """
        wide = F.gelu(self.dense_h_to_4h(hidden), approximate="tanh")  # [b, t, 4d]
        output: Tensor = self.dense_4h_to_h(wide)  # [b, t, d]
        return output


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
        keys: Tensor | None = None,
        values: Tensor | None = None,
        position: int = 0,
    ) -> Tensor:
        """Run the block on ``t`` new tokens.

        Args:
            hidden: The tokens' hidden states.
            bias: ``alibi_bias(slopes, position, t)``, the same for every block of a step.
            keys: This block's cache. Rows ``[position, position + t)`` are written, rows ``[0, position)``
                read. ``None``, together with ``values`` and position 0, for a whole sequence.
            values: Likewise.
            position: Index of the first new token.

        Shapes:
            hidden: [b, t, d]
            bias: [1, h, t, position + t]
            keys, values: [b, h, L, hd] with L >= position + t
            returns: [b, t, d]
        """
        normed: Tensor = self.input_layernorm(hidden)  # [b, t, d]
        residual = normed if self.post_layernorm_residual else hidden  # [b, t, d]
        hidden = self.self_attention(normed, bias, keys, values, position) + residual  # [b, t, d]
        normed = self.post_attention_layernorm(hidden)  # [b, t, d]
        residual = normed if self.post_layernorm_residual else hidden  # [b, t, d]
        output: Tensor = self.mlp(normed) + residual  # [b, t, d]
        return output


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
        # Not a buffer: the slopes stay float32 whatever the weights are converted to.
        self._slopes = slopes(config.n_head)  # [h]

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
        blocks = [block for block in self.blocks[chosen] if isinstance(block, BloomBlock)]
        digests = self.block_digests[chosen]
        return BloomSpan(
            self.config, start, blocks, block_digests=digests, digest=span_digest(digests) if digests else ""
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and so of hidden states and cache."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are, and hidden states and cache must be."""
        return next(self.parameters()).device

    def forward(self, hidden: Tensor, cache: SpanCache | None = None, position: int = 0) -> Tensor:
        """Run every block on ``t`` new tokens.

        Args:
            hidden: Hidden states before block ``start``.
            cache: Keys and values, with room for ``position + t`` tokens; ``None`` for a whole sequence.
            position: Index of the first new token; 0 without a cache.

        Shapes:
            hidden: [b, t, d]
            returns: [b, t, d], hidden states before block ``end``

        Raises:
            ValueError: ``position`` is not 0 though there is no cache.
        """
        if cache is None and position:
            raise ValueError("a position other than 0 needs a cache")
        if self._slopes.device != hidden.device:
            self._slopes = self._slopes.to(hidden.device)  # [h]
        bias = alibi_bias(self._slopes, position, hidden.shape[1])  # [1, h, t, L]
        for index, block in enumerate(self.blocks):
            keys, values = (None, None) if cache is None else cache.layer(index)  # [b, h, L, hd]
            hidden = block(hidden, bias, keys, values, position)  # [b, t, d]
        return hidden
