"""ALiBi: attention scores fall linearly with the distance between two tokens, more steeply for some heads.

Source: Press, Smith, Lewis, "Train Short, Test Long", arXiv 2108.12409.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def slopes(n_head: int) -> Tensor:
    """The slope of each head, bit for bit those of transformers.

    For a power of two they are the geometric series ``2**(-8/n), 2**(-16/n), ...``. For any other number
    the series of the next lower power comes first, and every other member of the next higher one after it.

    Shapes:
        returns: [h], float32

    Raises:
        ValueError: ``n_head`` is less than 1.
    """
    if n_head < 1:
        raise ValueError(f"n_head is {n_head}, expected at least 1")
    lower = 2 ** math.floor(math.log2(n_head))
    values = _powers(lower, torch.arange(1, 1 + lower))  # [lower]
    if lower != n_head:
        rest = n_head - lower
        values = torch.cat([values, _powers(2 * lower, torch.arange(1, 1 + 2 * rest, 2))])  # [h]
    return values


def _powers(n_head: int, exponents: Tensor) -> Tensor:
    """The members ``exponents`` of the series for ``n_head`` heads, a power of two."""
    base = torch.full((), 2 ** (-(2 ** -(math.log2(n_head) - 3))), dtype=torch.float32)  # []
    return torch.pow(base, exponents.to(torch.int32))  # [n]


def alibi_bias(head_slopes: Tensor, position: int, tokens: int, pads: Tensor | None = None) -> Tensor:
    """What is added to the scores of ``tokens`` new queries that start at ``position``.

    In the relative form ``slope * (j - i)``, which differs from transformers' ``slope * j`` by a constant
    per row that softmax takes out: numbers stay small near the query, where precision counts. Keys after
    the query (``j > i``) get minus infinity, which makes attention causal.

    Args:
        head_slopes: What :func:`slopes` gave, on the device where attention runs.
        position: Index of the first query, in tokens.
        tokens: Number of queries.
        pads: How many tokens of padding each row begins with. No other token sees them, and they see themselves alone,
            so that softmax has something to go by. Distances are relative: nothing else changes.

    Shapes:
        head_slopes: [h]
        pads: [b], int64, on the device of ``head_slopes``
        returns: [1, h, t, position + t], float32; [b, h, t, position + t] with ``pads``
    """
    keys = torch.arange(position + tokens, device=head_slopes.device)  # [L]
    queries = keys[position:]  # [t]
    distance = keys[None, :] - queries[:, None]  # [t, L], j - i
    bias = head_slopes[:, None, None] * distance  # [h, t, L]
    if tokens > 1:
        bias = bias.masked_fill_(distance > 0, float("-inf"))  # [h, t, L]
    if pads is None:
        return bias[None]  # [1, h, t, L]
    unseen = (keys < pads[:, None])[:, None, :] & (distance != 0)  # [b, t, L]
    return bias.masked_fill(unseen[:, None], float("-inf"))  # [b, h, t, L]
