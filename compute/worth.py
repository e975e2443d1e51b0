"""What a node announces as its speed: measured on its engine and its line, and watched."""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Final

import torch
import trio

from compute.checkpoint import Checkpoint
from compute.devices import default_dtype
from compute.engine import Engine
from compute.node_settings import NodeSettings
from compute.throughput import Configuration, Drift, Throughput, effective_tokens_per_s, throughput
from net.dht.service import Dht
from net.errors import NetError
from net.host import Host
from net.perf import measure_bytes_per_s

logger = logging.getLogger(__name__)

LINES: Final = 3  # peers with whom ours is measured
LINES_S: Final = 15.0  # for all of them
DRIFT_EVERY_S: Final = 5.0
TICK_S: Final = 1e-9  # no step takes less


class Worth:
    """Of one node, whatever span of the same length it serves.

    Attributes:
        speed: What was measured, or ``None`` before :meth:`find`.
    """

    def __init__(self, host: Host, dht: Dht, checkpoint: Checkpoint, settings: NodeSettings) -> None:
        self.speed: Throughput | None = None
        self._host = host
        self._dht = dht
        self._checkpoint = checkpoint
        self._settings = settings
        self._linear: str | None = None  # of which ``speed`` is

    @property
    def tokens_per_s(self) -> float:
        """What to announce; 0 before anything was measured."""
        return 0.0 if self.speed is None else self.speed.effective_tokens_per_s(*self._element)

    @property
    def _element(self) -> tuple[int, int]:
        """How many elements a token's hidden state has, and how many bytes each."""
        return self._checkpoint.config.hidden_size, default_dtype(self._settings.devices[0]).itemsize

    @property
    def line_bytes_per_s(self) -> float | None:
        """What our line carries to the best of some peers; ``None`` while that has not been measured."""
        return None if self.speed is None else self.speed.network_bytes_per_s

    async def find(self, engine: Engine, linear: str) -> None:
        """Measure, or remember, unless that has been done for this form.

        Args:
            engine: Runs, and serves nobody yet.
            linear: Backend of its linear layers.
        """
        if linear == self._linear:
            return
        configuration = Configuration(
            model=self._checkpoint.digest,
            blocks=len(engine.span),
            linear=linear,
            threads=self._settings.engine.threads,
            devices=tuple(_describe(device) for device in self._settings.devices),
        )
        self.speed = await throughput(configuration, self._settings.probed, partial(self._measure, engine))
        self._linear = linear

    async def _measure(self, engine: Engine) -> Throughput:
        speed = await engine.measure()
        line = await self._measure_line(speed.decode_tokens_per_s) if self._settings.measure_line else None
        return Throughput(
            decode_tokens_per_s=speed.decode_tokens_per_s,
            prefill_tokens_per_s=speed.prefill_tokens_per_s,
            network_bytes_per_s=line,
        )

    async def _measure_line(self, tokens_per_s: float) -> float | None:
        """Bytes per second to the best of a few peers; the first that is fast enough for so many tokens will do."""
        contacts = self._dht.table.contacts
        best: float | None = None
        with trio.move_on_after(LINES_S):
            for contact in random.sample(contacts, min(LINES, len(contacts))):
                try:
                    await self._host.connect(contact.peer_id, contact.addresses)
                    found = await measure_bytes_per_s(self._host, contact.peer_id, timeout_s=LINES_S / LINES)
                except NetError as error:
                    logger.info("no line measured with %s: %s", contact.peer_id, error)
                    continue
                best = max(best or 0.0, found)
                if effective_tokens_per_s(tokens_per_s, best, *self._element) == tokens_per_s:
                    break
        return best

    async def watch(self, engine: Callable[[], Engine | None], changed: Callable[[float], Awaitable[None]]) -> None:
        """Say what to announce whenever lone steps have become faster or slower for good, until cancelled.

        Args:
            engine: The one that serves, which may be another one each time; ``None`` while there is none.
            changed: Gets it.
        """
        if self.speed is None:
            return
        drift = Drift(self.speed.decode_tokens_per_s, trio.current_time())
        seen, steps, took_s = None, 0, 0.0  # the engine without holding it, for it holds the blocks
        while True:
            await trio.sleep(DRIFT_EVERY_S)
            current = engine()
            if current is None:
                continue
            if seen is None or seen() is not current:
                seen, steps, took_s = weakref.ref(current), 0, 0.0
            now = current.stats
            del current
            if now.lone_steps == steps:
                continue
            value = (now.lone_steps - steps) / max(now.lone_s - took_s, TICK_S)
            steps, took_s = now.lone_steps, now.lone_s
            found = drift.observe(value, trio.current_time())
            if found is not None:
                logger.info("lone steps: %.1f tokens/s now", found)
                self.speed = replace(self.speed, decode_tokens_per_s=found)
                await changed(self.tokens_per_s)


def _describe(device: torch.device) -> str:
    """Which one it is: another may have its number after a restart."""
    if device.type != "cuda":
        return str(device)
    known = torch.cuda.get_device_properties(device)
    return f"{device} {known.name} {known.total_memory}"
