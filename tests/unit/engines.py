"""Small spans and running engines, for tests."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
import trio
from torch import Tensor

from compute.bloom import BloomBlock, BloomConfig, BloomSpan, SpanCache, quantize
from compute.bloom.tuned import Tuning
from compute.engine import Engine, EngineSettings

CONFIG = BloomConfig(vocab_size=16, hidden_size=64, n_layer=3, n_head=4)


def make_span(seed: int = 0, linear: str | None = "fp32") -> BloomSpan:
    """Three blocks whose rows are independent, if ``linear`` is not None."""
    generator = torch.Generator().manual_seed(seed)
    span = BloomSpan(CONFIG, 0, [BloomBlock(CONFIG) for _ in range(3)]).requires_grad_(False)
    for parameter in span.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    if linear is not None:
        quantize(span, linear)
    return span


def hidden_states(batch: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed))


@asynccontextmanager
async def running(span: BloomSpan, settings: EngineSettings | None = None) -> AsyncIterator[Engine]:
    async with trio.open_nursery() as nursery:
        engine = Engine(span, settings)
        await nursery.start(engine.run)
        yield engine
        nursery.cancel_scope.cancel()


class GatedSpan(BloomSpan):
    """A span that waits for the test to open the gate before it runs anything; and says what it ran."""

    def __init__(self, inner: BloomSpan | None = None) -> None:
        super().__init__(CONFIG, 0, (inner or make_span()).blocks)  # type: ignore[arg-type]
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.batches: list[int] = []  # steps in each batch
        self.runs: list[tuple[int, int, int | None]] = []  # of lone steps: position, first block, block after the last

    def forward(
        self,
        hidden: Tensor,
        cache: SpanCache | None = None,
        position: int = 0,
        first: int = 0,
        last: int | None = None,
        tuning: Tuning | None = None,
    ) -> Tensor:
        self.runs.append((position, first, last))
        self._wait(1)
        return super().forward(hidden, cache, position, first, last, tuning)

    def together(self, steps: Any) -> Tensor:
        self._wait(len(steps))
        return super().together(steps)

    def _wait(self, steps: int) -> None:
        self.batches.append(steps)
        self.entered.release()
        if not self.gate.wait(20):
            raise TimeoutError("the test never opened the gate")

    async def wait_entered(self) -> None:
        await trio.to_thread.run_sync(self.entered.acquire)
