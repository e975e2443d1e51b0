"""The one place that runs the model.

torch blocks its thread for as long as a step takes, so a single thread of its own touches the model, its
caches and nothing else; the event loop hands it jobs and is woken with their results. Jobs run one at a
time, in the order in which they came::

    event loop                            engine thread
    step() -- checks shapes -- queue -->  skip if nobody waits any more
                                          check values, grow cache, run span, check values
    step() returns  <-- run_sync_soon --  result or error

A step that is cancelled while it waits is skipped; one that runs is stopped at the next chunk, and its
session is then as if it had gone back to the step's position.
"""

from __future__ import annotations

import functools
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import torch
import trio
from torch import Tensor

from compute.bloom.block import BloomSpan
from compute.cache import CacheBudget, KVCache
from compute.errors import BadInput, BadOutput, EngineBusy, EngineError, EngineStopped

T = TypeVar("T")
_log = logging.getLogger(__name__)
_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)
_MEASURE_WARMUP_STEPS: Final = 2  # the first steps also pay for memory and for the kernels' own set-up


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Bounds of an engine.

    Attributes:
        cache_tokens: Token slots for all sessions together.
        max_batch: Most rows of a session.
        max_length_tokens: Most tokens a row of a session may ask for; BLOOM was trained on 2,048.
        max_sessions: Most open sessions; each costs a little even while it holds no cache.
        max_waiting: Most steps that wait or run; one more fails at once, so that its client goes elsewhere.
        chunk_tokens: A longer step runs in pieces of this many tokens. This bounds the memory for scores,
            and the time until a cancelled step stops; measured, it costs nothing.
        threads: Threads that torch may use within a step, or ``None`` for torch's own choice.
    """

    cache_tokens: int = 16_384
    max_batch: int = 32
    max_length_tokens: int = 2048
    max_sessions: int = 256
    max_waiting: int = 64
    chunk_tokens: int = 256
    threads: int | None = None

    def __post_init__(self) -> None:
        """Check the bounds.

        Raises:
            ValueError: One is less than 1.
        """
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine has done so far.

    Attributes:
        steps: Steps that succeeded.
        tokens: Tokens in them, rows counted apart.
        busy_s: Seconds spent on jobs.
        waiting: Steps that wait or run now.
        sessions: Sessions open now.
        cache_used_tokens: Cache slots taken now.
        cache_max_tokens: Cache slots in all.
    """

    steps: int
    tokens: int
    busy_s: float
    waiting: int
    sessions: int
    cache_used_tokens: int
    cache_max_tokens: int


class _Abandoned(Exception):
    """Nobody waits for the running job any more."""


@dataclass(frozen=True, eq=False)
class _Session:
    """The blocks that a session runs, and its cache in them."""

    span: BloomSpan
    cache: KVCache


@dataclass(eq=False)
class _Job(Generic[T]):
    """Something for the engine's thread to do.

    Attributes:
        work: Runs in the thread.
        optional: Need not run once nobody waits; counts among the waiting.
        done: Set when it has ended, with ``result`` or ``error``.
        abandoned: Nobody waits. Set in the event loop, read in the thread.
        result: Holds what ``work`` returned.
        error: What it raised instead.
    """

    work: Callable[[], T]
    optional: bool
    done: trio.Event = field(default_factory=trio.Event)
    abandoned: bool = False
    result: list[T] = field(default_factory=list)
    error: BaseException | None = None


class Engine:
    """Runs a span for many sessions. Start it with ``nursery.start(engine.run)``.

    Methods belong to the event loop that runs :meth:`run`. Errors are :class:`EngineError`; after any of
    them the session is still open, and as if it had gone back to the step's position or not moved at all.
    """

    def __init__(self, span: BloomSpan, settings: EngineSettings | None = None) -> None:
        """Take a loaded span; from the start of :meth:`run` nobody else may run it."""
        self.span = span
        self.settings = settings or EngineSettings()
        self._budget = CacheBudget(self.settings.cache_tokens)
        self._sessions: dict[int, _Session] = {}
        self._ids = itertools.count(1)
        self._jobs: queue.SimpleQueue[_Job[object] | None] = queue.SimpleQueue()
        self._waiting = 0
        self._state = "new"  # new -> running -> stopping -> stopped
        self._token: trio.lowlevel.TrioToken | None = None
        self._thread_ended = trio.Event()
        self._pending: set[_Job[object]] = set()
        self._steps = 0
        self._tokens = 0
        self._busy_s = 0.0

    @property
    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        return EngineStats(
            steps=self._steps,
            tokens=self._tokens,
            busy_s=self._busy_s,
            waiting=self._waiting,
            sessions=len(self._sessions),
            cache_used_tokens=self._budget.used_tokens,
            cache_max_tokens=self._budget.max_tokens,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the engine's thread until cancelled. An engine runs once.

        Cancellation:
            Waiting steps fail with :class:`EngineStopped`. The chunk that runs is waited for, because
            torch cannot be interrupted; then the thread ends and the caches are freed.

        Raises:
            RuntimeError: The engine has run before.
        """
        if self._state != "new":
            raise RuntimeError(f"this engine is {self._state}; make another one")
        self._state = "running"
        self._token = trio.lowlevel.current_trio_token()
        threading.Thread(target=self._thread, name="raceme-engine", daemon=True).start()
        try:
            task_status.started()
            await trio.sleep_forever()
        finally:
            self._state = "stopping"
            self._jobs.put(None)
            with trio.CancelScope(shield=True):
                await self._thread_ended.wait()
            self._state = "stopped"
            for job in list(self._pending):
                if job.optional:
                    self._finish(job, EngineStopped("the engine has stopped"), 0.0)
                else:
                    job.result.append(job.work())
                    self._finish(job, None, 0.0)
            for session in self._sessions.values():
                session.cache.close()
            self._sessions.clear()

    async def open_session(
        self, *, batch: int, max_length: int, start: int | None = None, end: int | None = None
    ) -> int:
        """Open a session; its cache is taken as it grows.

        Args:
            batch: Rows of every step.
            max_length: Most tokens of a row.
            start: First block that the session runs, by its number in the model; the span's first if
                ``None``. Slots are counted in full even if a session runs only some blocks.
            end: Block after the last; the span's last if ``None``.

        Returns:
            The session's id.

        Raises:
            BadInput: ``bad-value``: an argument is no integer or less than 1, ``batch`` is more than the
                engine allows, or the blocks are not within the span; ``too-long``: ``max_length`` is more
                than the engine allows.
            EngineBusy: Too many sessions are open.
            EngineStopped: The engine does not run.
        """
        await trio.lowlevel.checkpoint()
        self._check_running()
        if not _is_integer(batch, 1, self.settings.max_batch):
            raise BadInput("bad-value", f"batch is {batch!r:.40}, expected 1 to {self.settings.max_batch}")
        if not _is_integer(max_length, 1):
            raise BadInput("bad-value", f"max_length is {max_length!r:.40}, expected at least 1")
        if max_length > self.settings.max_length_tokens:
            raise BadInput(
                "too-long", f"max_length is {max_length}, at most {self.settings.max_length_tokens} is served"
            )
        first = self.span.start if start is None else start
        last = self.span.end if end is None else end
        if not _is_integer(first, self.span.start) or not _is_integer(last, first + 1, self.span.end):
            raise BadInput(
                "bad-value",
                f"blocks {first!r:.40} to {last!r:.40} are not within {self.span.start} to {self.span.end}",
            )
        if len(self._sessions) >= self.settings.max_sessions:
            raise EngineBusy(f"{len(self._sessions)} sessions are open already")
        session = next(self._ids)
        part = self.span.part(first, last)
        cache = KVCache(part, self._budget, batch=batch, max_length=max_length)
        self._sessions[session] = _Session(part, cache)
        return session

    def session_length(self, session: int) -> int:
        """Tokens that a session has written, as of now.

        Raises:
            BadInput: ``no-session``.
        """
        return self._session(session).cache.length

    async def step(self, session: int, hidden: Tensor, position: int) -> Tensor:
        """Run the span on new tokens of a session, or again on old ones.

        Args:
            session: What :meth:`open_session` gave.
            hidden: Hidden states before the span, in float32, float16 or bfloat16. Do not change it
                until this returns.
            position: Index of the first token: 0 up to the session's length. What the session has from
                there on is replaced.

        Shapes:
            hidden: [b, t, d]
            returns: [b, t, d], in the dtype of ``hidden``, on the CPU; an inference tensor (no autograd)

        Raises:
            BadInput: ``no-session``; ``bad-dtype``; ``bad-shape``; ``bad-position``; ``too-long``;
                ``not-finite``: a row holds NaN or infinity.
            OutOfCache: There is no room for the tokens.
            EngineBusy: Too many steps wait.
            BadOutput: The result is not finite.
            EngineStopped: The engine does not run, or stopped meanwhile.

        Cancellation:
            The session's length is then either unchanged, ``position``, or ``position + t``; a step at
            ``position`` is right in each case.
        """
        self._check_running()
        opened = self._session(session)
        self._check_step(opened.cache, hidden, position)
        if self._waiting >= self.settings.max_waiting:
            raise EngineBusy(f"{self._waiting} steps wait already")

        def work() -> Tensor:
            return self._step(opened, hidden, position, job)

        job: _Job[Tensor] = _Job(work, optional=True)
        return await self._submit(job)

    async def close_session(self, session: int) -> None:
        """Free a session's cache, after the steps that wait already. An unknown session is no error.

        Cancellation:
            The session is closed all the same.
        """
        opened = self._sessions.pop(session, None)
        if opened is None or self._state != "running":
            await trio.lowlevel.checkpoint()
            return
        await self._submit(_Job(opened.cache.close, optional=False))

    async def measure(self, steps: int = 8) -> float:
        """Measure decoding: one row, one token at a time, on a cache of its own.

        Returns:
            Tokens per second, from the median step.

        Raises:
            ValueError: ``steps`` is less than 1 or more than 1,000.
            EngineBusy: Too many steps wait.
            EngineStopped: The engine does not run, or stopped meanwhile.
        """
        if not 1 <= steps <= 1000:
            raise ValueError(f"steps is {steps}, expected 1 to 1000")
        self._check_running()
        if self._waiting >= self.settings.max_waiting:
            raise EngineBusy(f"{self._waiting} steps wait already")

        def work() -> float:
            return self._measure(steps, job)

        job: _Job[float] = _Job(work, optional=True)
        return await self._submit(job)

    # In the event loop

    def _check_running(self) -> None:
        if self._state != "running":
            raise EngineStopped("the engine does not run")

    def _session(self, session: int) -> _Session:
        opened = self._sessions.get(session)
        if opened is None:
            raise BadInput("no-session", "no such session, or it is closed")
        return opened

    def _check_step(self, cache: KVCache, hidden: Tensor, position: int) -> None:
        """What can be said without looking at values, so that a bad request never waits."""
        if hidden.dtype not in _FLOATS:
            raise BadInput("bad-dtype", f"hidden states in {hidden.dtype}, expected 16 or 32 bit floats")
        width = self.span.config.hidden_size
        if hidden.dim() != 3 or hidden.shape[0] != cache.batch or hidden.shape[2] != width:
            raise BadInput(
                "bad-shape", f"hidden states have shape {list(hidden.shape)}, not [{cache.batch}, t, {width}]"
            )
        tokens = hidden.shape[1]
        if tokens < 1:
            raise BadInput("bad-shape", "a step needs at least one token")
        if not _is_integer(position, 0):
            raise BadInput("bad-position", f"position {position!r:.40}, expected an integer from 0")
        if position + tokens > cache.max_length:
            raise BadInput("too-long", f"{position} + {tokens} tokens are more than the session's {cache.max_length}")

    async def _submit(self, job: _Job[T]) -> T:
        """Queue a job and wait for it."""
        untyped: _Job[object] = job  # type: ignore[assignment]  # the queue holds jobs of every kind
        self._pending.add(untyped)
        self._waiting += job.optional
        self._jobs.put(untyped)
        try:
            await job.done.wait()
        except BaseException:
            job.abandoned = True
            raise
        if job.error is not None:
            raise job.error
        return job.result[0]

    def _finish(self, job: _Job[object], error: BaseException | None, took_s: float) -> None:
        """Take note of a job's end and wake who waits for it."""
        if job not in self._pending:
            return
        self._pending.discard(job)
        self._waiting -= job.optional
        self._busy_s += took_s
        job.error = error
        if job.abandoned and error is not None and not isinstance(error, (EngineError, _Abandoned)):
            _log.error("a step failed after its caller had gone", exc_info=error)
        job.done.set()

    # In the engine's thread

    def _thread(self) -> None:
        """Run jobs until told to stop."""
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None and self._state == "running":
                error: BaseException | None = None
                began = time.perf_counter()
                try:
                    if job.abandoned and job.optional:
                        raise _Abandoned
                    job.result.append(job.work())
                except BaseException as exc:  # noqa: BLE001  # handed over to whoever waits, who raises it
                    error = exc
                self._call(functools.partial(self._finish, job, error, time.perf_counter() - began))
        self._call(self._thread_ended.set)

    def _call(self, function: Callable[[], None]) -> None:
        """Have the event loop call ``function``; if the loop is gone, so is everyone who would care."""
        try:
            if self._token is not None:
                self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            _log.debug("the event loop ended before the engine")

    def _check_wanted(self, job: _Job[T]) -> None:
        if job.abandoned:
            raise _Abandoned
        if self._state != "running":
            raise EngineStopped("the engine has stopped")

    def _step(self, session: _Session, hidden: Tensor, position: int, job: _Job[Tensor]) -> Tensor:
        """One step, in chunks."""
        span, cache = session.span, session.cache
        b, t, _ = hidden.shape
        cache.check(position, t)
        bad = _bad_rows(hidden)
        if bad:
            raise BadInput("not-finite", f"NaN or infinity in row {bad[0]} ({len(bad)} of {b} rows)")
        cache.prepare(position, t)
        outputs: list[Tensor] = []
        for start in range(0, t, self.settings.chunk_tokens):
            self._check_wanted(job)
            chunk = hidden[:, start : start + self.settings.chunk_tokens]  # [b, c, d]
            chunk = chunk.to(device=span.device, dtype=span.dtype)  # [b, c, d]
            result: Tensor = span(chunk, cache, position + start)  # [b, c, d]
            outputs.append(result.to(device="cpu", dtype=hidden.dtype))  # [b, c, d]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)  # [b, t, d]
        bad = _bad_rows(output)
        if bad:
            raise BadOutput(f"the model gave NaN or infinity in row {bad[0]} ({len(bad)} of {b} rows)")
        cache.commit(position + t)
        self._steps += 1
        self._tokens += b * t
        return output

    def _measure(self, steps: int, job: _Job[float]) -> float:
        total = steps + _MEASURE_WARMUP_STEPS
        cache = KVCache(self.span, CacheBudget(total), batch=1, max_length=total)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 1, self.span.config.hidden_size, generator=generator)  # [1, 1, d]
        hidden = hidden.to(device=self.span.device, dtype=self.span.dtype)  # [1, 1, d]
        times_s: list[float] = []
        try:
            for position in range(total):
                self._check_wanted(job)
                began = time.perf_counter()
                cache.prepare(position, 1)
                self.span(hidden, cache, position).cpu()  # [1, 1, d]
                cache.commit(position + 1)
                times_s.append(time.perf_counter() - began)
        finally:
            cache.close()
        ordered = sorted(times_s[_MEASURE_WARMUP_STEPS:])
        return 1.0 / max(ordered[len(ordered) // 2], 1e-9)


def _bad_rows(hidden: Tensor) -> list[int]:
    """Rows that hold NaN or infinity.

    Shapes:
        hidden: [b, t, d]
    """
    finite = torch.isfinite(hidden).flatten(1).all(dim=1)  # [b]
    return [row for row, good in enumerate(finite.tolist()) if not good]


def _is_integer(value: object, least: int, most: int | None = None) -> bool:
    """Whether ``value`` is an integer (``True`` is none) within bounds; requests may hold anything."""
    return type(value) is int and value >= least and (most is None or value <= most)
