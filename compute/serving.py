"""Sessions of one loaded span: the streams that hold them, and what waits for its client to come back.

A node that moves has two of these for a while: the new one, and the one that its sessions still hold.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from compute.bloom import BloomSpan
from compute.engine import Engine, EngineSettings
from compute.errors import EngineError, EngineStopped, Later
from compute.metrics import Metrics
from compute.tensors import from_wire, to_wire
from net.errors import RpcError
from net.identity import PeerId
from net.mux.base import Stream
from net.nurseries import open_service_nursery
from net.protocol import session as wire
from net.rpc import lane
from net.rpc.framing import Message, Tensor

SESSION_IDLE_S: Final = 600.0  # a session nobody uses
MAX_LEFT_PER_PEER: Final = 4  # sessions that wait to be resumed


@dataclass(kw_only=True, eq=False)
class Held:
    """A session.

    Attributes:
        serving: Whose; ``None`` once it is over, for whoever has an idle stream must not hold a span in memory.
        holder: The stream that it belongs to; ``None`` while it waits to be resumed.
    """

    serving: Serving | None
    session_id: int
    peer_id: PeerId
    token: bytes
    holder: NodeSession | None
    left_at: float = 0.0


class Serving:
    """A span, its engine and its sessions.

    Attributes:
        span: The blocks.
        engine: Runs them, while :meth:`run` does.
        held: Sessions by token.
    """

    def __init__(self, span: BloomSpan, settings: EngineSettings, *, resume_s: float, metrics: Metrics | None) -> None:
        """Take a loaded span.

        Args:
            span: Nobody else may run it from now on.
            settings: Of the engine.
            resume_s: How long a session whose stream broke waits for its client to come back another way.
            metrics: Where what is refused is counted.
        """
        self.span = span
        self.engine = Engine(span, settings, metrics)
        self.metrics = metrics
        self.held: dict[bytes, Held] = {}
        self._resume_s = resume_s
        self._empty = trio.Event()
        self._scope = trio.CancelScope()
        self._closed = False  # no session is opened any more
        self._ended = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the engine until cancelled or stopped."""
        try:
            with self._scope:
                async with open_service_nursery() as nursery:
                    await nursery.start(self.engine.run)
                    nursery.start_soon(self._sweep)
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            self._ended.set()

    async def drain(self, patience_s: float) -> None:
        """Open none any more, wait for the sessions to end, at most so long, free those that are left, and stop.

        Returns when the engine's thread has ended.

        Cancellation: what is left goes on.
        """
        self._closed = True
        if self.held:
            self._empty = trio.Event()
            with trio.move_on_after(patience_s):
                await self._empty.wait()
        await self.free_all()
        self._scope.cancel()
        await self._ended.wait()

    async def open(self, request: wire.Open, peer_id: PeerId, holder: NodeSession) -> Held:
        """Open a session for a stream.

        Raises:
            EngineError: as ``Engine.open_session``; also when :meth:`drain` has begun.
        """
        session_id = await self.engine.open_session(
            batch=request.batch, max_length=request.max_length, start=request.start, end=request.end, peer=peer_id
        )
        if self._closed:
            await self.engine.close_session(session_id)
            raise EngineStopped("the node serves other blocks now")
        token = secrets.token_bytes(wire.TOKEN_BYTES)
        held = Held(serving=self, session_id=session_id, peer_id=peer_id, token=token, holder=holder)
        self.held[token] = held
        return held

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
        """End all sessions, none of which does another step."""
        ending, self.held = list(self.held.values()), {}
        for held in ending:
            held.serving = None
        async with trio.open_nursery() as nursery:
            for held in ending:
                nursery.start_soon(self._close, held)

    async def _close(self, held: Held) -> None:
        held.serving = None
        await self.engine.close_session(held.session_id)
        if not self.held:
            self._empty.set()

    async def _sweep(self) -> None:
        """Free what nobody came back for."""
        while True:
            await trio.sleep(self._resume_s / 4)
            for held in list(self.held.values()):
                if held.holder is None and trio.current_time() - held.left_at >= self._resume_s:
                    await self.free(held)


class Node(Protocol):
    """Who has servings; :class:`compute.node.Node`."""

    def serving_for(self, request: wire.Open) -> Serving:
        """Raises:
        RpcError: another model, blocks that are not served here, or nothing is served now.
        """

    def find_held(self, token: bytes) -> Held | None:
        """A session, wherever it is."""


class NodeSession:
    """The node's side of one stream."""

    def __init__(self, node: Node, peer_id: PeerId, metrics: Metrics | None) -> None:
        self._node = node
        self._peer_id = peer_id
        self._metrics = metrics
        self._held: Held | None = None

    async def serve(self, stream: Stream) -> None:
        """Answer until the stream ends."""
        methods = {"open": self.open, "resume": self.resume, "step": self.step}
        broken = True  # by an error, or cancelled together with the connection to the relay that carries it
        try:
            await lane.serve(stream, self._peer_id, methods, idle_s=SESSION_IDLE_S)
            broken = False
        finally:
            with trio.CancelScope(shield=True):
                await self._end(broken=broken)

    async def open(self, message: Message) -> Message:
        """Begin a session."""
        if self._held is not None:
            raise RpcError("bad-input", "the session is open already")
        request = wire.Open.from_fields(message.header)
        serving = self._node.serving_for(request)
        with refusals(self._metrics):
            held = self._held = await serving.open(request, self._peer_id, self)
        stats = serving.engine.stats
        left = stats.cache_max_tokens - stats.cache_used_tokens
        return Message(header={"cache_tokens_left": left, "token": held.token})

    async def resume(self, message: Message) -> Message:
        """Take over a session of the same peer from a stream that broke, or that the peer wants to leave."""
        if self._held is not None:
            raise RpcError("bad-input", "the session is open already")
        held = self._node.find_held(wire.read_token(message.header))
        if held is None or held.peer_id != self._peer_id:
            raise RpcError("no-session", "there is no such session (any more)")
        held.holder = self
        self._held = held
        return Message(header={})

    async def step(self, message: Message) -> Message:
        """Run the next tokens."""
        held = self._held
        if held is None:
            raise RpcError("bad-input", "no session is open on this stream")
        serving = held.serving
        if held.holder is not self or serving is None:
            raise RpcError(
                "no-session", "the session has ended here, for the node pauses or moves, or went on over another stream"
            )
        if len(message.tensors) != 1:
            raise RpcError("bad-input", f"a step carries one tensor, not {len(message.tensors)}")
        position = wire.read_position(message.header)
        tensor = message.tensors[0]
        with refusals(self._metrics):
            hidden = from_wire(tensor.dtype, tensor.shape, tensor.data)
            result = await serving.engine.step(held.session_id, hidden, position)
        dtype, shape, data = to_wire(result)
        return Message(header={}, tensors=[Tensor(dtype=dtype, shape=shape, data=data)])

    async def _end(self, *, broken: bool) -> None:
        """The stream is over; what broke may be resumed."""
        held = self._held
        if held is not None and held.holder is self and held.serving is not None:
            await (held.serving.keep(held) if broken else held.serving.free(held))


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
