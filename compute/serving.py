"""Sessions of one loaded span: who asks for steps, who gets the results, and what waits for its client to come back.

A node that moves has two of these for a while: the new one, and the one that its sessions still hold. A session's
steps come from its client (``compute/talking.py``) and, handed on, from the node before it; a task of its own does
them in the order of their numbers and hands the results on, or answers.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol, TypeVar

import trio
from torch import Tensor

from compute.bloom import BloomSpan
from compute.engine import Engine, EngineSettings
from compute.errors import BadInput, EngineError, EngineStopped, Later
from compute.metrics import Metrics
from compute.outbox import Outbox, OutboxBudget
from compute.pushing import PushLink
from compute.room import Room
from compute.tuning import SpanTuning
from compute.wire_forms import CODEC, Form, Sender, from_message
from net.errors import NetError, RemoteProtocolError, RpcError
from net.identity import PeerId
from net.nurseries import open_service_nursery
from net.protocol import session as wire
from net.rpc import framing, lane
from net.rpc.framing import Message

__all__ = ["Ask", "Held", "Holder", "Serving", "Wanted"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

LONG_ELEMENTS: Final = 1 << 16  # of hidden states that are converted in a thread: that takes about 100 us
MAX_LEFT_PER_PEER: Final = 4  # sessions that wait to be resumed
LINKING_S: Final = 1.5  # for a node that a step is to be handed on to, and that is about to be reached


class Wanted(Protocol):
    """Which blocks, of which model, somebody asks for."""

    @property
    def digest(self) -> str:
        """Of the model."""

    @property
    def start(self) -> int:
        """The first block."""

    @property
    def end(self) -> int:
        """The block behind the last one."""


class Holder(Protocol):
    """The stream that a session belongs to, towards its client."""

    @property
    def bytes_per_s(self) -> float | None:
        """Of the line to the client, if it has been slow enough to be noticed."""

    async def send(self, message: Message) -> None:
        """Tell the client; a stream that is gone is no error."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ask:
    """A step to do, or the results of earlier ones to hand on again.

    Attributes:
        step: Where, and what becomes of the result.
        fields: The message's.
        tensors: The hidden states as they came; not looked at yet.
        end: Of what is to be handed on again; ``None`` for a step.
    """

    step: wire.Step
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[framing.Tensor, ...] = ()
    end: int | None = None


@dataclass(kw_only=True, eq=False)
class Held:
    """A session.

    Attributes:
        serving: Whose; ``None`` once it is over, for whoever has an idle stream must not hold a span in memory.
        holder: The stream that it belongs to; ``None`` while it waits to be resumed.
        batch: Its rows.
        sender: Makes what its client is sent.
        push_token: Who knows it may hand steps on to this session.
        link: The next node, if the client has named one that we have reached.
        linking: Set when it is known whether the one that was named last can be reached; ``None`` before one was.
        seen: The highest number of a step that was begun.
        recent: The numbers of what has ended, the last ones.
        n_blocks: That its steps go through.
    """

    serving: Serving | None
    session_id: int
    n_blocks: int
    peer_id: PeerId
    token: bytes
    push_token: bytes
    outbox: Outbox
    holder: Holder | None
    batch: int
    sender: Sender
    link: PushLink | None = None
    linking: trio.Event | None = None
    left_at: float = 0.0
    seen: int = 0
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=4 * wire.MAX_AHEAD))
    running: int = 0
    waiting: set[int] = field(default_factory=set)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def __post_init__(self) -> None:
        self._inbox, self._outlet = trio.open_memory_channel[Ask](wire.MAX_AHEAD)

    async def ask(self, ask: Ask) -> None:
        """Have it done after what waits already; too much of that is waited for.

        Raises:
            RpcError: ``no-session``: it is over.
        """
        self.waiting.add(ask.step.id)
        try:
            await self._inbox.send(ask)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise session_over() from error

    def where(self, number: int) -> str:
        """How far a step has come: ``unseen``, ``waiting``, ``running`` or ``done``."""
        if number in self.waiting:
            return "waiting"
        if number == self.running:
            return "running"
        return "done" if number in self.recent else "unseen"

    async def answer(self, message: Message) -> None:
        """Tell the client; if it is not there, it will ask again."""
        if self.holder is not None:
            await self.holder.send(message)

    async def work(self) -> None:
        """Do what is asked for, one after another, until the session is over."""
        with self.scope, self._outlet:
            async for ask in self._outlet:
                self.waiting.discard(ask.step.id)
                serving = self.serving
                if serving is None:
                    return
                if ask.end is None:
                    if ask.step.id <= self.seen:
                        continue  # the client has done without it
                    self.seen = ask.step.id
                self.running = ask.step.id
                refusal = await self._try(ask, serving)
                if refusal is not None:
                    await self.answer(Message(header={**lane.refusal(refusal), "id": ask.step.id}))
                self.running = 0
                self.recent.append(ask.step.id)

    async def _try(self, ask: Ask, serving: Serving) -> RpcError | None:
        """What the client is told if it goes wrong."""
        try:
            await self._do(ask, serving)
        except RpcError as error:
            return error
        except RemoteProtocolError as error:
            return RpcError("bad-input", str(error))
        except Exception:
            logger.exception("a step failed for %s", self.peer_id)
            return RpcError("internal", "the node failed at this step; its log says why")
        return None

    async def _do(self, ask: Ask, serving: Serving) -> None:
        step = ask.step
        if ask.end is None:
            if len(ask.tensors) != 1:
                raise RpcError("bad-input", f"a step carries one tensor, not {len(ask.tensors)}")
            width = serving.span.config.hidden_size
            with refusals(serving.metrics):
                hidden, _ = await converted(
                    lambda: from_message(ask.fields, ask.tensors[0], self.batch, width), ask.tensors[0]
                )
                if step.every:
                    states = await self._step_every(hidden, step, serving)  # [n, b, t, d]
                    given, result = states[-1], states.flatten(0, 1)  # [n * b, t, d]
                else:
                    given = result = await serving.engine.step(self.session_id, hidden, step.position, step.order)
            self.outbox.add(step.position, given, step.order)
        else:
            kept = self.outbox.get(step.position, ask.end)
            if kept is None:
                raise RpcError("no-history", "what these steps gave has not been kept here")
            result = kept
        await self._deliver(step, result, serving)

    async def _step_every(self, hidden: Tensor, step: wire.Step, serving: Serving) -> Tensor:
        """What every block gives.

        Shapes:
            hidden: [b, t, d]
            returns: [n, b, t, d]

        Raises:
            BadInput: ``too-long``: it does not fit into a message.
            EngineError: as ``Engine.step``.
        """
        size = self.n_blocks * hidden.numel() * hidden.element_size()
        if size > framing.MAX_FRAME_BYTES - framing.MAX_HEADER_BYTES:
            raise BadInput("too-long", f"{self.n_blocks} blocks give {size} bytes for these tokens: send fewer at once")
        return await serving.engine.step(self.session_id, hidden, step.position, step.order, every_block=True)

    async def _deliver(self, step: wire.Step, result: Tensor, serving: Serving) -> None:
        """Hand a result on, or tell the client."""
        unpushed = False
        if step.push:
            link = await self._reached()
            if link is not None:
                following = replace(step, push=step.push - 1)
                fields, tensor = await serving.prepare(link.sender, result, link.bytes_per_s)
                try:
                    await link.send(Message(header={**following.to_fields(), **fields}, tensors=[tensor]))
                    return
                except NetError as error:
                    logger.info("cannot hand on to %s: %s", link.peer_id, error)
            self.link = None
            unpushed = True
        header: dict[str, object] = {"id": step.id}
        if unpushed:
            header["unpushed"] = True
        if not unpushed:
            result = result[:, max(0, result.shape[1] - step.keep) :]
        if not result.shape[1] or self.holder is None:
            await self.answer(Message(header=header))
            return
        fields, tensor = await serving.prepare(self.sender, result, self.holder.bytes_per_s)
        await self.answer(Message(header={**header, **fields}, tensors=[tensor]))

    async def _reached(self) -> PushLink | None:
        """The next node, if it is reached soon."""
        if (self.link is None or self.link.is_over) and self.linking is not None:
            with trio.move_on_after(LINKING_S):
                await self.linking.wait()
        return None if self.link is None or self.link.is_over else self.link


class Serving:
    """A span, its engine and its sessions.

    Attributes:
        span: The blocks.
        engine: Runs them, while :meth:`run` does.
        held: Sessions by token.
        calls: The scopes of training calls under way.
        room: For what sessions are to add, while it comes.
    """

    def __init__(
        self,
        span: BloomSpan,
        settings: EngineSettings,
        *,
        resume_s: float,
        metrics: Metrics | None,
        line_bytes_per_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Take a loaded span.

        Args:
            span: Nobody else may run it from now on.
            settings: Of the engine.
            resume_s: How long a session whose stream broke waits for its client to come back another way.
            metrics: Where what is refused is counted.
            line_bytes_per_s: What our own line carries, as far as that was measured; no way is faster.
        """
        self.span = span
        self.engine = Engine(span, settings, metrics)
        self.metrics = metrics
        self.held: dict[bytes, Held] = {}
        self.calls: set[trio.CancelScope] = set()
        self.room = Room(settings.tuning_bytes, settings.tuning_bytes_per_peer)
        self._line_bytes_per_s = line_bytes_per_s
        self._by_push_token: dict[bytes, Held] = {}
        self._outboxes = OutboxBudget()
        self._resume_s = resume_s
        self._empty = trio.Event()
        self._scope = trio.CancelScope()
        self._closed = False  # no session is opened any more
        self._ended = trio.Event()
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the engine until cancelled or stopped."""
        try:
            with self._scope:
                async with open_service_nursery() as nursery:
                    await nursery.start(self.engine.run)
                    nursery.start_soon(self._sweep)
                    self._nursery = nursery
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            self._nursery = None
            self._ended.set()

    async def drain(self, patience_s: float) -> None:
        """Open none any more, tell the sessions, wait for them and for training calls to end, at most so long, free
        those that are left, and stop.

        Returns when the engine's thread has ended.

        Cancellation: what is left goes on.
        """
        self._closed = True
        if not self.is_idle and patience_s:
            self._empty = trio.Event()
            with trio.move_on_after(patience_s):
                await self.tell(Message(header={"leaving": patience_s}))
                await self._empty.wait()
        await self.free_all()
        self._scope.cancel()
        await self._ended.wait()

    async def tell(self, message: Message) -> None:
        """Say something to the clients of all sessions."""
        async with trio.open_nursery() as nursery:
            for held in self.held.values():
                nursery.start_soon(held.answer, message)

    def start_soon(self, function: Callable[..., object], *args: object) -> None:
        """Run a task for as long as the engine runs.

        Raises:
            RpcError: it does not.
        """
        if self._nursery is None:
            raise RpcError("busy", "the node serves other blocks now")
        self._nursery.start_soon(function, *args)  # type: ignore[arg-type]

    async def open(self, request: wire.Open, peer_id: PeerId, holder: Holder, tuning: SpanTuning | None = None) -> Held:
        """Open a session for a stream, with what it adds.

        Raises:
            EngineError: as ``Engine.open_session``; also when :meth:`drain` has begun, or for an unknown form.
            RpcError: ``bad-value``: another session has this push token.
        """
        form = Form.read(request.form)
        if request.push_token in self._by_push_token:
            raise RpcError("bad-value", "another session has this push token: choose another at random")
        session_id = await self.engine.open_session(
            batch=request.batch,
            max_length=request.max_length,
            start=request.start,
            end=request.end,
            peer=peer_id,
            pads=request.pads,
            tuning=tuning,
        )
        if self._closed:
            await self.engine.close_session(session_id)
            raise EngineStopped("the node serves other blocks now")
        held = Held(
            serving=self,
            session_id=session_id,
            n_blocks=request.end - request.start,
            peer_id=peer_id,
            token=secrets.token_bytes(wire.TOKEN_BYTES),
            push_token=request.push_token,
            outbox=Outbox(self._outboxes),
            holder=holder,
            batch=request.batch,
            sender=Sender(form, may_compress=CODEC in request.codecs, measures_error=request.measures),
        )
        self.held[held.token] = self._by_push_token[held.push_token] = held
        self.start_soon(held.work)
        return held

    @property
    def is_idle(self) -> bool:
        """Whether there is neither a session nor a training call."""
        return not self.held and not self.calls

    @contextmanager
    def call(self, scope: trio.CancelScope) -> Iterator[None]:
        """A training call: :meth:`drain` waits for it, and :meth:`free_all` cancels ``scope``.

        Raises:
            EngineStopped: :meth:`drain` has begun.
        """
        if self._closed:
            raise EngineStopped("the node serves other blocks now")
        self.calls.add(scope)
        try:
            yield
        finally:
            self.calls.discard(scope)
            if self.is_idle:
                self._empty.set()

    async def prepare(
        self, sender: Sender, hidden: Tensor, bytes_per_s: float | None
    ) -> tuple[Mapping[str, Any], framing.Tensor]:
        """A message's fields and tensor.

        Args:
            sender: Of the session, or of its link.
            hidden: What it is to carry.
            bytes_per_s: What was measured of the line to who gets it.

        Raises:
            RpcError: ``bad-value``: the session's form has no room for these values.
        """
        known = [speed for speed in (bytes_per_s, self._line_bytes_per_s()) if speed is not None]
        with refusals(self.metrics):
            return await converted(lambda: sender.message(hidden, min(known, default=None)), hidden)

    def find_pushed(self, push_token: bytes) -> Held | None:
        """The session that who has this token may hand steps on to."""
        return self._by_push_token.get(push_token)

    async def keep(self, held: Held) -> None:
        """Leave a session whose stream broke for ``resume_s``; of one peer's, the newest few."""
        held.holder = None
        held.left_at = trio.current_time()
        left = [each for each in self.held.values() if each.holder is None and each.peer_id == held.peer_id]
        for oldest in sorted(left, key=lambda each: each.left_at)[:-MAX_LEFT_PER_PEER]:
            await self.free(oldest)

    async def free(self, held: Held) -> None:
        """End a session, if it has not ended yet."""
        if self.held.pop(held.token, None) is not None:
            await self._close(held)

    async def free_all(self) -> None:
        """End all sessions, none of which does another step, and all training calls."""
        for scope in self.calls:
            scope.cancel()
        ending, self.held = list(self.held.values()), {}
        for held in ending:
            held.serving = None
        async with trio.open_nursery() as nursery:
            for held in ending:
                nursery.start_soon(self._close, held)

    async def _close(self, held: Held) -> None:
        held.serving = None
        self._by_push_token.pop(held.push_token, None)
        held.scope.cancel()
        held.outbox.clear()
        if held.link is not None:
            held.link.end()
        if held.holder is not None:  # it may be idle, and would learn of it only by its next step
            await held.holder.send(Message(header={"leaving": 0}))
        await self.engine.close_session(held.session_id)
        if self.is_idle:
            self._empty.set()

    async def _sweep(self) -> None:
        """Free what nobody came back for."""
        while True:
            await trio.sleep(self._resume_s / 4)
            for held in list(self.held.values()):
                if held.holder is None and trio.current_time() - held.left_at >= self._resume_s:
                    await self.free(held)


@contextmanager
def refusals(metrics: Metrics | None) -> Iterator[None]:
    """Turns the engine's errors into answers, and counts them."""
    try:
        yield
    except Exception as error:
        if metrics is not None:
            metrics.refused(error.code if isinstance(error, EngineError) else "internal")
        if not isinstance(error, EngineError):
            raise
        retry = error.retry_after_s if isinstance(error, Later) else None
        raise RpcError(error.code, str(error), retry) from error


def session_over() -> RpcError:
    """What is said of a session that is not there any more."""
    return RpcError("no-session", "the session has ended here, or went on over another stream")


async def converted(convert: Callable[[], T], values: Tensor | framing.Tensor) -> T:
    """Have many values converted in a thread, for others wait for this one."""
    count = values.numel() if isinstance(values, Tensor) else memoryview(values.data).nbytes
    if count < LONG_ELEMENTS:
        return convert()
    return await trio.to_thread.run_sync(convert)
