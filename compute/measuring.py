"""How fast a span is, run by nobody else meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from compute.bloom.block import BloomSpan
from compute.cache import KVCache
from compute.errors import EngineStopped

_WARMUP_STEPS: Final = 2  # the first steps also pay for memory and for the kernels' own set-up
_PROMPT_TOKENS: Final = 128  # enough that a token more costs what a token costs
_PROMPT_S: Final = 2.0  # of a span that takes longer, the first blocks speak for the others
_LEAST_S: Final = 1e-9


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a span does for one session.

    Attributes:
        decode_tokens_per_s: One token at a time, from the median step.
        prefill_tokens_per_s: In a prompt.
    """

    decode_tokens_per_s: float
    prefill_tokens_per_s: float


def measure(span: BloomSpan, steps: int, wanted: Callable[[], bool]) -> Speed:
    """Decode one row, one token at a time, and run a prompt, on a cache of its own.

    Args:
        span: What to run.
        steps: How many tokens to decode.
        wanted: Whether anybody still waits.

    Raises:
        EngineStopped: Nobody does.
    """
    total = steps + _WARMUP_STEPS
    cache = KVCache.alone(span, 1, max(total, _PROMPT_TOKENS))
    hidden = torch.randn(1, _PROMPT_TOKENS, span.config.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(device=span.device, dtype=span.dtype)  # [1, t, d]
    times_s: list[float] = []
    for position in range(total):
        _check(wanted)
        began = time.perf_counter()
        span.decode(hidden[:, :1], cache, position).cpu()  # [1, 1, d]
        times_s.append(time.perf_counter() - began)
    ordered = sorted(times_s[_WARMUP_STEPS:])
    return Speed(
        decode_tokens_per_s=1.0 / max(ordered[len(ordered) // 2], _LEAST_S),
        prefill_tokens_per_s=_PROMPT_TOKENS / max(_prompt_s(span, cache, hidden, wanted), _LEAST_S),
    )


def _prompt_s(span: BloomSpan, cache: KVCache, hidden: Tensor, wanted: Callable[[], bool]) -> float:
    """Seconds for a prompt through all blocks.

    Shapes:
        hidden: [1, t, d]
    """
    span(hidden, cache, 0, 0, 1).cpu()  # the first pays for memory
    began, took_s, blocks = time.perf_counter(), 0.0, 0
    while blocks < len(span) and took_s < _PROMPT_S:
        _check(wanted)
        hidden = span(hidden, cache, 0, blocks, blocks + 1)  # [1, t, d]
        hidden[:, -1:].cpu()  # waits until it is done
        blocks += 1
        took_s = time.perf_counter() - began
    return took_s * len(span) / blocks


def _check(wanted: Callable[[], bool]) -> None:
    if not wanted():
        raise EngineStopped("the engine has stopped, or nobody waits")
