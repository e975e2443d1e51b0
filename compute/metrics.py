"""What a node does, in figures for Prometheus: ``raceme serve --metrics HOST:PORT``, under ``/metrics``.

Counters and histograms are filled by the engine (:class:`compute.watcher.Watcher`) and by the node (refusals); gauges
are read when they are asked for. The endpoint has a thread of its own, since the library serves so; it is meant for the
node's owner, and hears one address only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, start_http_server
from prometheus_client.core import GaugeMetricFamily

from compute.estimates import Kind

if TYPE_CHECKING:
    from compute.engine_settings import EngineStats

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """A node's figures; a :class:`compute.watcher.Watcher`."""

    def __init__(self) -> None:
        """Begin at zero, in a registry of its own."""
        self.registry = CollectorRegistry()
        registry = self.registry
        self._tokens = Counter("raceme_tokens", "Tokens computed, rows counted apart.", ["kind"], registry=registry)
        self._jobs = Counter("raceme_steps", "Steps that succeeded.", ["kind"], registry=registry)
        self._rows = Histogram("raceme_batch_rows", "Tokens in a batch.", ["kind"], registry=registry, buckets=_ROWS)
        self._batches = Histogram(
            "raceme_batch_seconds", "What a batch took.", ["kind"], registry=registry, buckets=_SECONDS
        )
        self._waits = Histogram(
            "raceme_queue_seconds", "From a step's arrival until it ran.", ["kind"], registry=registry, buckets=_SECONDS
        )
        self._steps = Histogram(
            "raceme_step_seconds", "From a step's arrival to its result.", ["kind"], registry=registry, buckets=_SECONDS
        )
        self._errors = Counter("raceme_errors", "Requests that were refused or failed.", ["code"], registry=registry)

    def batch_done(self, kind: Kind, rows: int, took_s: float) -> None:
        """See :class:`compute.watcher.Watcher`."""
        self._rows.labels(kind.label).observe(rows)
        self._batches.labels(kind.label).observe(took_s)

    def job_done(self, kind: Kind, tokens: int, waited_s: float, took_s: float) -> None:
        """See :class:`compute.watcher.Watcher`."""
        self._jobs.labels(kind.label).inc()
        self._tokens.labels(kind.label).inc(tokens)
        self._waits.labels(kind.label).observe(waited_s)
        self._steps.labels(kind.label).observe(took_s)

    def refused(self, code: str) -> None:
        """A request was refused, or failed; ``code`` is one of those that go over the wire."""
        self._errors.labels(code).inc()

    def read_from(self, stats: Callable[[], EngineStats]) -> None:
        """Where the gauges come from."""
        self.registry.register(_Gauges(stats))

    def text(self) -> str:
        """What the endpoint says now."""
        return generate_latest(self.registry).decode()

    @asynccontextmanager
    async def served(self, host: str, port: int) -> AsyncIterator[int]:
        """Have the figures served over HTTP.

        Yields:
            The port.

        Raises:
            OSError: The address cannot be had.
        """
        server, thread = start_http_server(port, addr=host, registry=self.registry)
        try:
            yield server.server_port
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(server.shutdown)  # takes up to half a second
                await trio.to_thread.run_sync(thread.join)
            server.server_close()


class _Gauges:
    """Reads an engine when it is asked."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """What Prometheus' registry calls."""
        now = self._stats()
        for name, about, value in (
            ("raceme_sessions", "Open sessions.", now.sessions),
            ("raceme_waiting", "Steps that wait or run.", now.waiting),
            ("raceme_cache_used_tokens", "Cache slots taken.", now.cache_used_tokens),
            ("raceme_cache_max_tokens", "Cache slots in all.", now.cache_max_tokens),
            ("raceme_busy_seconds", "Time spent on batches.", now.busy_s),
        ):
            yield GaugeMetricFamily(name, about, value=value)
