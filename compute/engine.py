"""The one place that runs the model, for many sessions at once.

torch blocks its thread for as long as a batch takes, so a single thread of its own touches the model, its caches and
nothing else. The event loop decides what it does: who runs next (``compute/scheduler.py``), who holds the cache
(``compute/slots.py``), and hands it one plan at a time (``compute/batch.py``)::

    event loop                                            engine thread
    step() -- checks shapes -- scheduler.submit
    dispatch: next_batch, slots.reserve -- plan -->       memory, finite in, run the span, finite out
    step() returns <-- scheduler.done, slots.commit --    outcome of each piece

A plan is made when the thread is free and somebody waits: after all tasks that are ready now have had their turn, and
never later. Decode steps of up to 32 tokens, rows counted apart, run together; a longer step runs in chunks of a fixed
size, so that its bits do not depend on what else there is to do; forward and backward run in the gaps.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio
from torch import Tensor

from compute.batch import OutOfMemory, Piece, Plan, Runner, Work
from compute.bloom.block import BloomSpan
from compute.cache import free_cache_tokens
from compute.engine_settings import EngineSettings, EngineStats
from compute.errors import BadInput, BadOutput, EngineBusy, EngineError, EngineStopped
from compute.estimates import Kind
from compute.measuring import Speed, measure
from compute.memory import cache_bytes
from compute.requests import check_hidden, is_integer, read_order, read_pads
from compute.scheduler import Batch, Job, Scheduler, Slice, State, Ticket
from compute.slots import Change, NoRoom, Slots
from compute.tensors import tensor_bytes
from compute.thread import ModelThread
from compute.tuning import Gradients, ServedTuning, SpanTuning
from compute.watcher import Watcher
from net.nurseries import open_service_nursery

__all__ = ["Engine", "EngineSettings", "EngineStats", "Gradients"]

_log = logging.getLogger(__name__)
_EXPIRE_S: Final = 5.0  # between looks for sessions that nobody uses


@dataclass(eq=False, kw_only=True)
class _Session:
    """An open session.

    Attributes:
        padding: How many tokens of padding each row begins with, by :meth:`Engine.open_session`, [b], or ``None``.
        pads: The same after rows have changed places.
        added: What is added within its blocks.
        waiting: Steps that wait or run.
        asked: Steps that have been asked for.
        hashed: Its first tokens, as far as they came in whole chunks one after another, and their digest so far.
        closing: It takes no new steps, and ends after those.
        closed: Set when it has ended.
    """

    key: int
    peer: Hashable
    span: BloomSpan
    rows: int
    max_length: int
    padding: Tensor | None = None
    pads: Tensor | None = None
    added: ServedTuning | None = None
    waiting: int = 0
    asked: int = 0
    hashed: tuple[int, hashlib._Hash] | None = None
    closing: bool = False
    closed: trio.Event = field(default_factory=trio.Event)

    @property
    def blocks(self) -> tuple[int, int]:
        """Only steps of the same ones share a batch."""
        return self.span.start, self.span.end

    def pads_for(self, work: Work) -> Tensor | None:
        """Those of a step: padding moves along with its row, and rows that begin anew begin as they did at first."""
        pads = self.padding if work.position == work.prefix else self.pads  # [b]
        return pads if pads is None or work.order is None else pads[work.order]  # [b]


@dataclass(eq=False, kw_only=True)
class _Request:
    """A job and who waits for it.

    Attributes:
        reserved: Its session is within this step.
        prefixes: Digests of the step's first tokens, to be offered to others.
        began_at: When its first piece was handed over.
        done: Set when it is over; ``error`` is ``None`` if ``work`` has the result.
    """

    work: Work
    session: _Session | None = None
    reserved: bool = False
    prefixes: Sequence[tuple[int, bytes]] = ()
    done: trio.Event = field(default_factory=trio.Event)
    error: BaseException | None = None
    asked_at: float = field(default_factory=trio.current_time)
    began_at: float | None = None


class Engine:
    """Runs a span for many sessions. Start it with ``nursery.start(engine.run)``.

    Methods belong to the event loop that runs :meth:`run`. Errors are :class:`EngineError`. After NaN or infinity, in
    or out, and when there is no memory even for a step alone, its session is over, and no other is touched. After any
    other error it is open, and has what it had, or what lay before the step's position.

    On the CPU, with linear layers whose rows are independent (fp32, fp16, int8), a step of up to 32 tokens, rows
    counted apart, has the bits of as many steps of one token, in its result and in what it leaves behind: single steps
    can be replayed in runs, and drafts looked at, with the same tokens exactly.
    """

    def __init__(self, span: BloomSpan, settings: EngineSettings | None = None, watcher: Watcher | None = None) -> None:
        """Take a loaded span; from the start of :meth:`run` nobody else may run it."""
        self.span = span
        self._watcher = watcher
        self.settings = settings or EngineSettings()
        cache_tokens = self.settings.cache_tokens or free_cache_tokens(span, cache_bytes)
        self._slots = Slots(self.settings.slots(cache_tokens))
        self._scheduler = Scheduler(self.settings.scheduler())
        self._parts = {(span.start, span.end): span}
        self._sessions: dict[int, _Session] = {}
        self._closing: dict[int, _Session] = {}
        self._requests: dict[Ticket, _Request] = {}
        self._making: list[tuple[Hashable, SpanTuning]] = []  # for sessions of peers that are not open yet
        self._keys = itertools.count(1)
        self._state = "new"  # new -> running -> stopping -> stopped
        # To the thread and back
        self._changes: list[tuple[Change, Work | None]] = []
        self._is_running_plan = False
        self._bug: BaseException | None = None
        self._wake = trio.Event()
        self._runner = Runner()
        self._thread = ModelThread(self.settings.threads, self._runner.clear, span.devices)
        self._steps = 0
        self._tokens = 0
        self._busy_s = 0.0
        self._lone_steps = 0
        self._lone_s = 0.0

    @property
    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        return EngineStats(
            steps=self._steps,
            tokens=self._tokens,
            busy_s=self._busy_s,
            lone_steps=self._lone_steps,
            lone_s=self._lone_s,
            waiting=len(self._requests) + self._thread.calls,
            sessions=len(self._sessions),
            cache_used_tokens=self._slots.used_tokens,
            cache_max_tokens=self._slots.settings.cache_tokens,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the engine's thread until cancelled. An engine runs once.

        Cancellation:
            Waiting steps fail with :class:`EngineStopped`. The batch that runs is waited for, because
            torch cannot be interrupted; then the thread ends and the caches are freed.

        Raises:
            RuntimeError: The engine has run before.
        """
        if self._state != "new":
            raise RuntimeError(f"this engine is {self._state}; make another one")
        self._state = "running"
        self._thread.start()
        try:
            async with open_service_nursery() as nursery:
                nursery.start_soon(self._expire)
                task_status.started()
                await self._dispatch()
        finally:
            self._state = "stopping"
            await self._thread.stop()
            self._state = "stopped"
            self._stop()

    async def open_session(
        self,
        *,
        batch: int,
        max_length: int,
        start: int | None = None,
        end: int | None = None,
        peer: Hashable = None,
        pads: Sequence[int] | None = None,
        tuning: SpanTuning | None = None,
    ) -> int:
        """Open a session; its cache is taken as it grows.

        A row with padding gives what it gives without, to rounding: kernels add up in another order. What it gives for
        its padding is finite and means nothing.

        Args:
            batch: Rows of every step.
            max_length: Most tokens of a row.
            start: First block that the session runs, by its number in the model; the span's first if
                ``None``. Slots are counted in full even if a session runs only some blocks.
            end: Block after the last; the span's last if ``None``.
            peer: On whose account; ``None`` is a peer like any other.
            pads: How many tokens of padding each row begins with, which no other token sees; none if ``None``. They
                move along when rows change places, and a step at position 0 begins with these again.
            tuning: What is added within these blocks, and within others perhaps, for this session alone. Its prompts
                are for each row's first tokens after the padding. It is copied.

        Returns:
            The session's id.

        Raises:
            BadInput: ``bad-value``: an argument is no integer or less than 1, ``batch`` is more than the
                engine allows, the blocks are not within the span, or ``pads`` are not one number from 0 and
                below ``max_length`` for each row; ``too-long``: ``max_length`` is more
                than the engine allows, or a token of each row more than the whole cache; or the tuning, than a peer
                may have. As in :meth:`forward` for what else can be wrong with a tuning.
            EngineBusy: Too many sessions are open, of this peer or in all, and none has been idle for long; or what
                they add takes too much memory together.
            OutOfCache: There is no memory for the tuning.
            EngineStopped: The engine does not run.
        """
        await trio.lowlevel.checkpoint()
        self._check_running()
        if not is_integer(batch, 1, self.settings.max_batch):
            raise BadInput("bad-value", f"batch is {batch!r:.40}, expected 1 to {self.settings.max_batch}")
        if not is_integer(max_length, 1):
            raise BadInput("bad-value", f"max_length is {max_length!r:.40}, expected at least 1")
        if max_length > self.settings.max_length_tokens:
            raise BadInput(
                "too-long", f"max_length is {max_length}, at most {self.settings.max_length_tokens} is served"
            )
        padding = read_pads(pads, batch, max_length)
        span = self._part(start, end)
        added = None
        if tuning is not None:
            added = await self._added(self._tuning_of(tuning, span), span, peer)
            self._check_running()
        key = next(self._keys)
        try:
            change = self._slots.open(
                key, peer, rows=batch, max_length=max_length, now=trio.current_time(), group=(span.start, span.end)
            )
        except NoRoom as refused:
            busy = EngineBusy(str(refused))
            busy.retry_after_s = refused.retry_after_s
            raise busy from refused
        self._follow(change)
        self._sessions[key] = _Session(
            key=key, peer=peer, span=span, rows=batch, max_length=max_length, padding=padding, added=added
        )
        return key

    def session_length(self, session: int) -> int:
        """Tokens that a session has written, as of now.

        Raises:
            BadInput: ``no-session``.
        """
        return self._slots.place(self._session(session).key).length

    async def step(
        self,
        session: int,
        hidden: Tensor,
        position: int,
        order: Sequence[int] | None = None,
        *,
        every_block: bool = False,
    ) -> Tensor:
        """Run the span on new tokens of a session, or again on old ones.

        Args:
            session: What :meth:`open_session` gave.
            hidden: Hidden states before the span, in float32, float16 or bfloat16. Do not change it
                until this returns.
            position: Index of the first token: 0 up to the session's length. What the session has from
                there on is replaced.
            order: For beam search: row ``i`` goes on from what row ``order[i]`` had; each from its own if ``None``.
            every_block: Return what each of the session's ``n`` blocks gives; the last is what the step gives without,
                with the same bits where rows are independent. It shares neither a batch nor a prefix, and is slower.

        Shapes:
            hidden: [b, t, d]
            returns: [b, t, d], in the dtype of ``hidden``, on the CPU; an inference tensor (no autograd);
                [n, b, t, d] with ``every_block``

        Raises:
            BadInput: ``no-session``, which it also is when it was ended to make room; ``bad-dtype``; ``bad-shape``;
                ``bad-position``; ``bad-value``: no order of rows; ``too-long``, which is also a result of
                ``every_block`` with more tokens, blocks and rows counted apart, than ``max_batch`` rows of
                ``max_length_tokens``; ``not-finite``: a row holds NaN or infinity, and the session is over.
            OutOfCache: There is no room for the tokens; or no memory for the step, and the session is over.
            EngineBusy: Too many steps wait.
            BadOutput: The result is not finite, and the session is over.
            EngineStopped: The engine does not run, or stopped meanwhile.

        Cancellation:
            A step that waits is taken out, and one that runs is rolled back: the session's length is then either
            unchanged or ``position``, and a step at ``position`` is right in each case. So it is after an error,
            except that a session whose rows were to change places has forgotten everything: its length is 0.
        """
        self._check_running()
        opened = self._session(session)
        self._check_step(opened, hidden, position)
        places = None if order is None else read_order(order, opened.rows)
        rows, tokens = hidden.shape[:2]
        if every_block:
            self._check_every_block(opened, rows * tokens)
        fits = rows * tokens <= self._scheduler.settings.buckets[-1]
        kind = Kind.DECODE if fits else Kind.PREFILL
        prefixes: list[tuple[int, bytes]] = []
        shared = 0
        shares = self.settings.share_prefixes and not every_block
        hashed, opened.hashed = opened.hashed, None
        opened.asked += 1
        if not fits and places is None and shares:
            prefixes = await self._digests(opened, hidden, position, hashed)
            shared = self._begin_with(opened, prefixes, position)
            if shared == tokens:
                opened.pads = opened.padding
                return await self._kept(opened, position, rows, tokens)
            if position + shared and self._slots.place(opened.key).shared:
                prefixes = []  # others can begin with those that it began with itself
        work = Work(
            kind=kind,
            span=opened.span,
            hidden=hidden[:, shared:],
            position=position + shared,
            added=opened.added,
            order=places,
            every_block=every_block,
            prefix=shared,
            kept_chunk=self._chunk(opened) if prefixes else 0,
        )
        request = _Request(work=work, session=opened, prefixes=prefixes)
        job = Job(
            peer=opened.peer,
            session=opened.key,
            kind=kind,
            units=1 if fits else tokens - shared,
            unit_tokens=rows * tokens if fits else rows,
            passes=work.passes,
            group=(opened.key if every_block else None, *opened.blocks),
        )
        try:
            await self._submit(job, request)
        except EngineBusy:
            if shared:
                self._undo(opened, work)
            raise
        return work.result()

    async def forward(
        self,
        hidden: Tensor,
        *,
        peer: Hashable = None,
        start: int | None = None,
        end: int | None = None,
        tuning: SpanTuning | None = None,
    ) -> Tensor:
        """Run whole sequences, and keep nothing: half of a training step.

        Args:
            hidden: Hidden states before block ``start``; as in :meth:`step`.
            peer: On whose account.
            start: As in :meth:`open_session`.
            end: Likewise.
            tuning: What is added within these blocks, and within others perhaps. Do not change it until this returns.

        Shapes:
            hidden: [b, t, d]
            returns: [b, t, d]

        Raises:
            BadInput, EngineBusy, BadOutput, EngineStopped: As :meth:`step`. ``bad-value`` is also a tuning of other
                blocks, ``bad-shape`` one of another model, ``not-finite`` one with NaN or infinity.
            OutOfCache: There is no memory.

        Cancellation:
            What runs is finished and dropped.
        """
        return (await self._train(Kind.FORWARD, hidden, None, peer, start, end, tuning)).result()

    async def backward(
        self,
        hidden: Tensor,
        gradient: Tensor,
        *,
        peer: Hashable = None,
        start: int | None = None,
        end: int | None = None,
        tuning: SpanTuning | None = None,
    ) -> Gradients:
        """The gradients with respect to the input and the tuning; the way forward is run again.

        The same call gives the same bits, whatever else there is to do: how many sequences run at once depends on
        their number and length alone.

        Args:
            hidden: What :meth:`forward` was given.
            gradient: With respect to what it returned, in the same dtype.
            peer: On whose account.
            start: As in :meth:`open_session`.
            end: Likewise.
            tuning: As in :meth:`forward`.

        Shapes:
            hidden, gradient: [b, t, d]

        Raises:
            BadInput, EngineBusy, BadOutput, EngineStopped: As :meth:`forward`.
            OutOfCache: There is no memory.

        Cancellation:
            What runs is finished and dropped.
        """
        work = await self._train(Kind.BACKWARD, hidden, gradient, peer, start, end, tuning)
        return Gradients(hidden=work.result(), tuning=work.tuning_gradient)

    def check_sequences(self, rows: int, tokens: int) -> None:
        """Whether :meth:`forward` and :meth:`backward` take so many sequences of so many tokens.

        Raises:
            BadInput: ``too-long``: they do not.
        """
        if rows > self.settings.max_batch or tokens > self.settings.max_length_tokens:
            most = f"{self.settings.max_batch} sequences of {self.settings.max_length_tokens} tokens"
            raise BadInput("too-long", f"{rows} sequences of {tokens} tokens, at most {most} are served")

    async def close_session(self, session: int) -> None:
        """Free a session's cache, after the steps that wait already. An unknown session is no error.

        Cancellation:
            The session is closed all the same.
        """
        opened = self._sessions.pop(session, None)
        if opened is None or self._state != "running":
            await trio.lowlevel.checkpoint()
            return
        opened.closing = True
        self._closing[session] = opened
        self._close_if_idle(opened)
        await opened.closed.wait()

    async def measure(self, steps: int = 8) -> Speed:
        """Measure how fast one row is decoded, ``steps`` tokens, and a prompt run. What waits is kept waiting.

        Raises:
            ValueError: ``steps`` is less than 1 or more than 1,000.
            EngineBusy: Too many steps wait.
            EngineStopped: The engine does not run, or stopped meanwhile.
        """
        if not 1 <= steps <= 1000:
            raise ValueError(f"steps is {steps}, expected 1 to 1000")
        self._check_running()
        if self.stats.waiting >= self.settings.max_waiting:
            raise EngineBusy(f"{self.stats.waiting} steps wait already")
        return await self._thread.run(lambda wanted: measure(self.span, steps, wanted))

    # What is asked for

    def _check_running(self) -> None:
        if self._state != "running":
            raise EngineStopped("the engine does not run")

    def _session(self, session: int) -> _Session:
        opened = self._sessions.get(session)
        if opened is None:
            raise BadInput("no-session", "no such session, or it is over: closed, failed, or ended to make room")
        return opened

    def _part(self, start: int | None, end: int | None) -> BloomSpan:
        first = self.span.start if start is None else start
        last = self.span.end if end is None else end
        if not is_integer(first, self.span.start) or not is_integer(last, first + 1, self.span.end):
            raise BadInput(
                "bad-value",
                f"blocks {first!r:.40} to {last!r:.40} are not within {self.span.start} to {self.span.end}",
            )
        if (first, last) not in self._parts:
            self._parts[first, last] = self.span.part(first, last)
        return self._parts[first, last]

    def _check_step(self, opened: _Session, hidden: Tensor, position: int) -> None:
        check_hidden(hidden, opened.rows, self.span.config.hidden_size)
        tokens = hidden.shape[1]
        if not is_integer(position, 0):
            raise BadInput("bad-position", f"position {position!r:.40}, expected an integer from 0")
        if position + tokens > opened.max_length:
            raise BadInput("too-long", f"{position} + {tokens} tokens are more than the session's {opened.max_length}")
        if not opened.waiting and position > (length := self._slots.place(opened.key).length):
            raise BadInput("bad-position", f"a step at {position}, but the session has {length} tokens")

    def _check_every_block(self, opened: _Session, tokens: int) -> None:
        """Whether the result takes no more memory than that of a training step."""
        most = self.settings.max_batch * self.settings.max_length_tokens
        if tokens * len(opened.span) > most:
            raise BadInput("too-long", f"{tokens} tokens after {len(opened.span)} blocks each; at most {most} in all")

    async def _train(
        self,
        kind: Kind,
        hidden: Tensor,
        gradient: Tensor | None,
        peer: Hashable,
        start: int | None,
        end: int | None,
        tuning: SpanTuning | None,
    ) -> Work:
        self._check_running()
        span = self._part(start, end)
        check_hidden(hidden, None, self.span.config.hidden_size)
        rows, tokens = hidden.shape[:2]
        self.check_sequences(rows, tokens)
        if gradient is not None and (gradient.shape, gradient.dtype) != (hidden.shape, hidden.dtype):
            raise BadInput("bad-shape", f"a gradient of shape {list(gradient.shape)} for {list(hidden.shape)}")
        mine = None if tuning is None else self._tuning_of(tuning, span)
        work = Work(kind=kind, span=span, hidden=hidden, gradient=gradient, tuning=mine)
        job = Job(peer=peer, session=object(), kind=kind, units=rows, unit_tokens=tokens, passes=work.passes)
        await self._submit(job, _Request(work=work))
        return work

    def _tuning_of(self, tuning: SpanTuning, span: BloomSpan) -> SpanTuning:
        """What is added within a span's blocks."""
        tuning.check(self.span.config)
        if not tuning.start <= span.start < span.end <= tuning.end:
            blocks = f"[{tuning.start}, {tuning.end}) for [{span.start}, {span.end})"
            raise BadInput("bad-value", f"a tuning of blocks {blocks}")
        return tuning.part(span.start, span.end)

    async def _added(self, tuning: SpanTuning, span: BloomSpan, peer: Hashable) -> ServedTuning:
        """A tuning of a span's blocks, for sessions; once for all that have the same."""
        key = await trio.to_thread.run_sync(lambda: tuning.key)
        theirs = {each.key: each.n_bytes for each in self._tunings(peer).values()}
        theirs |= {made.key: made.n_bytes for whose, made in self._making if whose == peer}
        known, making = self._tunings(), sum(made.n_bytes for _, made in self._making)
        share, most = self.settings.tuning_bytes_per_peer, self.settings.tuning_bytes
        if tuning.n_bytes > share:
            raise BadInput("too-long", f"a tuning of {tuning.n_bytes} bytes, at most {share} are served")
        if key not in theirs and sum(theirs.values()) + tuning.n_bytes > share:
            raise EngineBusy(f"what your sessions add is more than {share} bytes together")
        if key in known:
            return known[key]
        if sum(each.n_bytes for each in known.values()) + making + tuning.n_bytes > most:
            raise EngineBusy(f"what sessions add is more than {most} bytes together")
        mine = (peer, tuning)
        self._making.append(mine)
        try:
            return await self._thread.run(lambda _: self._runner.served(tuning, span))
        finally:
            self._making.remove(mine)

    def _tunings(self, *peers: Hashable) -> dict[bytes, ServedTuning]:
        """What open sessions add, by key; those of some peers, or of all."""
        sessions = [*self._sessions.values(), *self._closing.values()]
        return {
            each.added.key: each.added
            for each in sessions
            if each.added is not None and (not peers or each.peer in peers)
        }

    # Prefixes

    async def _digests(
        self, opened: _Session, hidden: Tensor, position: int, hashed: tuple[int, hashlib._Hash] | None
    ) -> list[tuple[int, bytes]]:
        """Digests of all of a session's tokens up to the end of each whole chunk of a step, by these ends.

        There are none unless all that lies before the step came in whole chunks, too.
        """
        chunk, asked = self._chunk(opened), opened.asked
        if hidden.shape[1] < chunk or (position and (hashed is None or hashed[0] != position)):
            return []

        def digests() -> tuple[list[tuple[int, bytes]], hashlib._Hash]:
            if position and hashed is not None:
                hasher = hashed[1].copy()
            else:
                pads = None if opened.padding is None else opened.padding.tolist()
                added = None if opened.added is None else opened.added.key.hex()
                hasher = hashlib.sha256(f"{hidden.dtype} {opened.rows} {chunk} {pads} {added}".encode())
            found: list[tuple[int, bytes]] = []
            for end in range(chunk, hidden.shape[1] + 1, chunk):
                hasher.update(tensor_bytes(hidden[:, end - chunk : end].cpu().contiguous()))
                found.append((position + end, hasher.digest()))
            return found, hasher

        found, hasher = await trio.to_thread.run_sync(digests, abandon_on_cancel=True)
        if opened.asked == asked:  # else other tokens may come in their place
            opened.hashed = found[-1][0], hasher
        return found

    def _chunk(self, opened: _Session) -> int:
        """Tokens of a row in a chunk."""
        return max(1, self.settings.chunk_tokens // opened.rows)

    def _begin_with(self, opened: _Session, prefixes: Sequence[tuple[int, bytes]], position: int) -> int:
        """How many tokens of a step at ``position`` another session has; this one reads them there from now on."""
        self._check_running()
        if not prefixes or self._session(opened.key).waiting:
            return 0
        place = self._slots.place(opened.key)
        if place.slot is not None or not place.shared == place.length == position:
            return 0
        return self._slots.begin_with(opened.key, prefixes, trio.current_time()) - position

    async def _kept(self, opened: _Session, position: int, rows: int, tokens: int) -> Tensor:
        """What a step gives that another session has done as a whole."""
        slot = self._slots.place(opened.key).shared_slot
        if slot is None:
            raise ValueError("a step that is shared, with nobody")
        result = await self._thread.run(lambda _: self._runner.kept(slot, position, position + tokens))
        self._steps += 1
        self._tokens += rows * tokens
        return result

    # From the request to the plan

    async def _submit(self, job: Job, request: _Request) -> None:
        """Queue a job and wait until it is over.

        Raises:
            EngineBusy: Too much waits.
        """
        ticket = self._scheduler.submit(job, trio.current_time())
        self._requests[ticket] = request
        if request.session is not None:
            request.session.waiting += 1
        if len(self._sessions) == 1:  # nobody else can be about to ask
            self._hand_over()
        else:
            self._wake.set()
        try:
            await request.done.wait()
        except BaseException:
            if self._scheduler.cancel(ticket):
                self._end(ticket, None)
            elif ticket.state is State.FINISHED and not ticket.unwanted:  # at this very moment
                self._roll_back(request)
            raise
        if request.error is not None:
            raise request.error

    async def _dispatch(self) -> None:
        """Hand over what is next, whenever there is something new: when all who are ready have had their turn."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            if self._bug is not None:
                raise self._bug
            self._hand_over()

    async def _expire(self) -> None:
        """End sessions that nobody uses."""
        while True:
            await trio.sleep(_EXPIRE_S)
            self._follow(self._slots.expire(trio.current_time()))

    def _hand_over(self) -> None:
        """Give the thread something to do, if it is free and there is anything."""
        while self._state == "running" and not self._is_running_plan:
            now = trio.current_time()
            batch = self._scheduler.next_batch(now)
            if batch is not None:
                batch = self._prepare(batch, now)  # None: what was next turned out impossible
                if batch is not None:
                    self._send(batch, [self._piece(each, now) for each in batch.slices])
            elif self._changes:
                self._send(None, [])
            else:
                return

    def _prepare(self, batch: Batch, now: float) -> Batch | None:
        """Have room for a batch; without those that there is none for."""
        failed = {each.ticket: error for each in batch.slices if (error := self._reserve(each.ticket, now)) is not None}
        if failed:
            rest = self._scheduler.withdraw(batch, failed)
            for ticket, error in failed.items():
                self._end(ticket, error)
            return rest
        return batch

    def _piece(self, each: Slice, now: float) -> Piece:
        request = self._requests[each.ticket]
        if request.began_at is None:
            request.began_at = now
        work = request.work
        return Piece(work=work, start=each.start, stop=each.stop, first=each.first_pass, last=each.last_pass)

    def _reserve(self, ticket: Ticket, now: float) -> EngineError | None:
        """Have room for a step that is about to begin; what is wrong with it, if anything is."""
        request = self._requests[ticket]
        session, work = request.session, request.work
        if session is None or request.reserved:
            return None
        anew = work.order is not None
        try:
            change = self._slots.reserve(session.key, work.position, work.hidden.shape[1], now, anew=anew)
        except NoRoom as refused:
            self._follow(refused.change)
            return refused
        except BadInput as wrong:
            return wrong
        self._follow(change, work)
        work.place = self._slots.place(session.key)
        work.pads = session.pads_for(work)
        request.reserved = True
        return None

    def _send(self, batch: Batch | None, pieces: list[Piece]) -> None:
        plan = Plan(changes=self._changes, pieces=pieces)
        self._changes = []
        self._is_running_plan = True
        self._thread.put(functools.partial(self._run_plan, batch, plan))

    # From the outcome to the result

    def _plan_ended(self, batch: Batch | None, outcomes: list[Exception | None], took_s: float) -> None:
        self._is_running_plan = False
        if batch is None:
            return
        self._busy_s += took_s
        first = batch.slices[0]
        is_lone = batch.kind is Kind.DECODE and batch.rows == 1 and first.work == len(self.span)
        if is_lone and self._requests[first.ticket].work.is_plain:
            self._lone_steps += 1
            self._lone_s += took_s
        if self._watcher is not None:
            self._watcher.batch_done(batch.kind, batch.rows, took_s)
        errors = {each.ticket: error for each, error in zip(batch.slices, outcomes, strict=True) if error is not None}
        for ticket in self._scheduler.done(batch, took_s, trio.current_time(), errors.keys()):
            self._end(ticket, errors.get(ticket))

    def _end(self, ticket: Ticket, error: Exception | None) -> None:
        """A job is over: finished, failed, or not wanted any more."""
        request = self._requests.pop(ticket)
        request.error = error
        work, session = request.work, request.session
        work.added = None  # an error would keep it
        finished = ticket.state is State.FINISHED and not ticket.unwanted
        if session is not None:
            session.waiting -= 1
            if request.reserved:
                self._end_step(session, request, finished=finished)
            if finished:
                self._steps += 1
                self._tokens += ticket.job.units * ticket.job.unit_tokens + work.prefix * session.rows
            if _ends_session(error):
                self._forget(session.key)
                self._follow(self._slots.close(session.key))
            elif not finished and (work.prefix or (work.order is not None and request.reserved)):
                self._undo(session, work)  # it has more than the caller knows, or nobody knows the order of its rows
            self._close_if_idle(session)
        if finished and self._watcher is not None and request.began_at is not None:
            waited_s, took_s = request.began_at - request.asked_at, trio.current_time() - request.asked_at
            self._watcher.job_done(work.kind, ticket.job.units * ticket.job.unit_tokens, waited_s, took_s)
        if ticket.unwanted and error is not None and not isinstance(error, EngineError):
            _log.error("a step failed after its caller had gone", exc_info=error)
        request.done.set()

    def _end_step(self, session: _Session, request: _Request, *, finished: bool) -> None:
        now, work = trio.current_time(), request.work
        end = work.position + work.hidden.shape[1]
        if finished:
            session.pads = work.pads
            change = self._slots.commit(session.key, end, now)
            if session.key not in change.ended:
                for tokens, digest in request.prefixes:
                    self._slots.offer(session.key, tokens, digest)
        else:
            change = self._slots.abort(session.key, now)
        self._follow(change)

    def _roll_back(self, request: _Request) -> None:
        """Nobody gets the result of a step that is over; unless the session has another one already."""
        session, work = request.session, request.work
        if session is None or session.waiting or session.key not in self._sessions:
            return
        self._undo(session, work)

    def _undo(self, session: _Session, work: Work) -> None:
        """Have a session as it was before a step, as far as that is known; the step is over."""
        if session.key not in self._sessions and session.key not in self._closing:
            return
        begins, now = work.position - work.prefix, trio.current_time()
        if work.order is not None or (work.prefix and not begins):
            self._follow(self._slots.reset(session.key, now))
        else:
            self._slots.set_back(session.key, begins, now)

    def _follow(self, change: Change, work: Work | None = None) -> None:
        """Have the thread do to memory what the books say, and forget sessions that are gone."""
        if change.freed or change.left or change.granted is not None:
            self._changes.append((change, work))
            self._wake.set()
        for key in change.ended:
            if isinstance(key, int):
                self._forget(key)

    def _forget(self, key: int) -> None:
        """A session is gone, and so is what it waits for."""
        session = self._sessions.pop(key, None) or self._closing.pop(key, None)
        if session is None:
            return
        for ticket in self._scheduler.forget_session(key):
            self._end(ticket, BadInput("no-session", "the session was ended to make room, or after an earlier step"))
        session.closing = True
        session.added = None
        session.closed.set()

    def _close_if_idle(self, session: _Session) -> None:
        if session.closing and not session.waiting and self._closing.pop(session.key, None) is not None:
            self._follow(self._slots.close(session.key))
            session.added = None
            session.closed.set()

    def _stop(self) -> None:
        """Nothing runs any more."""
        for ticket in list(self._requests):
            self._scheduler.cancel(ticket)
            self._end(ticket, EngineStopped("the engine has stopped"))
        for session in [*self._sessions.values(), *self._closing.values()]:
            self._slots.close(session.key)
            session.closed.set()
        self._sessions.clear()
        self._closing.clear()

    # In the engine's thread

    def _run_plan(self, batch: Batch | None, plan: Plan) -> None:
        began = time.perf_counter()
        outcomes = self._runner.run(plan)
        took_s = time.perf_counter() - began
        self._thread.tell(functools.partial(self._note, functools.partial(self._plan_ended, batch, outcomes, took_s)))

    # Back in the event loop

    def _note(self, function: Callable[[], None]) -> None:
        """Take note of what has ended, and hand over what is next; a bug in here ends :meth:`run`, not the loop."""
        try:
            function()
            self._hand_over()
        except BaseException as exc:  # noqa: BLE001  # raised by the dispatcher
            self._bug = exc
            self._wake.set()


def _ends_session(error: BaseException | None) -> bool:
    return isinstance(error, (BadOutput, OutOfMemory)) or (isinstance(error, BadInput) and error.code == "not-finite")
