"""An engine's bounds, and its counters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Final

from compute.scheduler import SchedulerSettings
from compute.slots import SlotSettings

_LEAST_SLOT_TOKENS: Final = 64  # below, growing costs more than it saves


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Bounds of an engine.

    Attributes:
        cache_tokens: Token slots for all sessions together; ``None`` for half of the free memory, or two
            thirds of GPUs'.
        max_batch: Most rows of a session.
        max_length_tokens: Most tokens a row of a session may ask for; BLOOM was trained on 2,048.
        max_sessions: Most open sessions; each costs a little even while it holds no cache.
        max_sessions_per_peer: Of one peer. A program that generates several texts at once has one for each; what
            they may hold is bounded by the share of the cache.
        max_waiting: Most steps that wait or run; one more fails at once, so that its client goes elsewhere.
        max_waiting_per_peer: Of one peer.
        chunk_tokens: A longer step runs in pieces of this many tokens, all rows together. This bounds the memory for
            scores, and the time until a cancelled step stops; measured, it costs nothing.
        cache_share: Of the cache, for one peer while others want in.
        lease_s: After so long without use a session may be ended for anybody's sake.
        keep_s: After so long it is ended.
        share_prefixes: Whether sessions of one peer that begin alike compute and hold the first chunks once.
        share_between_peers: Whether those of different peers do, too; see :class:`compute.slots.SlotSettings`.
        tuning_bytes: Most that all sessions' tunings take together; those that are the same count once.
        tuning_bytes_per_peer: Of one peer.
        threads: Threads that torch may use within a step, or ``None`` for torch's own choice.
    """

    cache_tokens: int | None = 16_384
    max_batch: int = 32
    max_length_tokens: int = 2048
    max_sessions: int = 256
    max_sessions_per_peer: int = 16
    max_waiting: int = 256
    max_waiting_per_peer: int = 32
    chunk_tokens: int = 256
    cache_share: float = 0.25
    lease_s: float = 60.0
    keep_s: float = 600.0
    share_prefixes: bool = True
    share_between_peers: bool = False
    tuning_bytes: int = 1 << 30
    tuning_bytes_per_peer: int = 1 << 28
    threads: int | None = None

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            ValueError: One is less than 1, or the scheduler or the cache cannot work with them.
        """
        for name, value in vars(self).items():
            if value is not None and type(value) is int and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.slots(self.cache_tokens or 1)
        self.scheduler()

    def slots(self, cache_tokens: int) -> SlotSettings:
        """Those of the cache."""
        lengths: list[int] = []
        while not lengths or lengths[-1] < self.max_length_tokens:
            lengths.append(min(self.max_length_tokens, 2 * lengths[-1] if lengths else _LEAST_SLOT_TOKENS))
        return SlotSettings(
            cache_tokens=cache_tokens,
            lengths=tuple(lengths),
            max_sessions=self.max_sessions,
            max_sessions_per_peer=self.max_sessions_per_peer,
            share=self.cache_share,
            lease_s=self.lease_s,
            keep_s=self.keep_s,
            share_between_peers=self.share_between_peers,
        )

    def scheduler(self) -> SchedulerSettings:
        """Those of the scheduler; chunks have one size, because kernels' bits may depend on it."""
        return SchedulerSettings(
            chunk_tokens=(self.chunk_tokens,),
            max_waiting=self.max_waiting,
            max_waiting_per_peer=self.max_waiting_per_peer,
        )


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine has done so far.

    Attributes:
        steps: Steps that succeeded.
        tokens: Tokens in them, rows counted apart.
        busy_s: Seconds spent on batches.
        lone_steps: Batches of one token through the whole span.
        lone_s: Seconds spent on these.
        waiting: Steps, and other jobs, that wait or run now.
        sessions: Sessions open now.
        cache_used_tokens: Cache slots taken now.
        cache_max_tokens: Cache slots in all.
    """

    steps: int
    tokens: int
    busy_s: float
    lone_steps: int
    lone_s: float
    waiting: int
    sessions: int
    cache_used_tokens: int
    cache_max_tokens: int


def total(stats: Iterable[EngineStats]) -> EngineStats:
    """All engines' together; those that none has are 0."""
    each = list(stats)
    return EngineStats(**{field.name: sum(getattr(one, field.name) for one in each) for field in fields(EngineStats)})
