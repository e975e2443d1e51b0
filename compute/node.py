"""A compute node: a span of blocks, served to sessions and announced to the swarm.

Coming up: choose a span, announce it as ``joining``, look whether somebody chose the same at the same
time (the lower PeerId keeps it), load, look again, measure, announce as ``online``. Going: stop, withdraw.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import trio

from compute.bloom import BloomSpan
from compute.checkpoint import Checkpoint
from compute.engine import Engine, EngineSettings
from compute.errors import EngineError, Later
from compute.linear import BACKENDS
from compute.linear.kept import KeptWeights
from compute.metrics import Metrics
from compute.placement import choose_span
from compute.probe import probe
from compute.tensors import from_wire, to_wire
from net.dht import keys
from net.dht.service import Dht
from net.errors import RpcError
from net.host import Host
from net.identity import PeerId
from net.mux.base import Stream
from net.nurseries import open_service_nursery
from net.protocol import session as wire
from net.protocol.announcement import DIRECTORY, KIND, NodeAnnouncement, Numerics, read_all
from net.rpc import lane
from net.rpc.framing import Message, Tensor
from net.swarm import Connection
from net.version import VERSION

logger = logging.getLogger(__name__)

SESSION_IDLE_S = 600.0  # a session nobody uses
RETRY_AFTER_S = 1.0
PLACEMENT_ROUNDS = 5
MAX_LEFT_PER_PEER = 4  # sessions that wait to be resumed


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """What a node serves and how much.

    Attributes:
        span: blocks [start, end); None for what the swarm lacks most.
        max_blocks: the most to take when ``span`` is None.
        linear: backend of the linear layers, one of ``compute.linear.BACKENDS``; None for the one that the model's
            other nodes have, since a chain keeps to one, or for the first of them the fastest here.
        kept: where quantised weights are looked for and kept; None for nowhere.
        probed: where it is kept which backend is the fastest here; None for nowhere.
        resume_s: how long a session whose stream broke waits for its client to come back another way.
    """

    span: tuple[int, int] | None = None
    max_blocks: int | None = None
    linear: str | None = "fp32"
    kept: KeptWeights | None = None
    probed: Path | None = None
    resume_s: float = 15.0
    engine: EngineSettings = field(default_factory=EngineSettings)


class Node:
    """Serves blocks of one checkpoint on a host that has joined the DHT."""

    def __init__(
        self, host: Host, dht: Dht, checkpoint: Checkpoint, settings: NodeSettings, metrics: Metrics | None = None
    ) -> None:
        self._host = host
        self._dht = dht
        self._checkpoint = checkpoint
        self._settings = settings
        self._engine: Engine | None = None
        self._linear = settings.linear or ""
        self.metrics = metrics
        self.announcement: NodeAnnouncement | None = None
        self.held: dict[bytes, _Held] = {}  # sessions by token

    @property
    def stats(self) -> tuple[int, int]:
        """Open sessions, and tokens computed so far."""
        return (0, 0) if self._engine is None else (self._engine.stats.sessions, self._engine.stats.tokens)

    async def run(
        self,
        *,
        progress: Callable[[int, int], None] | None = None,
        task_status: trio.TaskStatus[NodeAnnouncement] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Load, announce, and serve until cancelled; ``started`` gets what was announced.

        Args:
            progress: called from another thread with (blocks loaded, blocks to load).

        Raises:
            CheckpointError: the span cannot be loaded.
        Cancellation: withdraws the announcement (at most two seconds), then frees everything.
        """
        try:
            span = await self._load(progress)
            engine = self._engine = Engine(span, self._settings.engine, self.metrics)
            if self.metrics is not None:
                self.metrics.read_from(lambda: engine.stats)
            async with open_service_nursery() as nursery:
                await nursery.start(engine.run)
                nursery.start_soon(self._sweep)
                speed = await engine.measure()
                self._host.handle(wire.PROTOCOL_ID, self._serve)
                self.announcement = self._offer(span.start, span.end, loaded=span, speed=speed)
                await self._announce()
                task_status.started(self.announcement)
        finally:
            with trio.move_on_after(2, shield=True):
                await self._dht.withdraw()

    # Which blocks

    async def _load(self, progress: Callable[[int, int], None] | None) -> BloomSpan:
        """Choose a span and load it; another one when it turns out to be somebody else's.

        (Who looked before we announced and announced after we had looked was not seen the first time.)
        """
        for _ in range(PLACEMENT_ROUNDS):
            start, end = await self._settle()
            load = partial(
                self._checkpoint.load_span,
                start,
                end,
                progress=progress,
                linear=self._linear,
                kept=self._settings.kept,
            )
            span = await trio.to_thread.run_sync(load, abandon_on_cancel=True)
            if self._settings.span is not None or not await self._is_taken(start, end):
                break
        return span

    async def _is_taken(self, start: int, end: int) -> bool:
        """Whether another node has the right to these very blocks, and there are others that are served less."""
        rivals = self._senior(await self._others(), (start, end))
        better = choose_span(self._checkpoint.n_blocks, end - start, rivals)
        return better != (start, end) and any((node.start, node.end) == (start, end) for node in rivals)

    def _senior(self, nodes: list[NodeAnnouncement], span: tuple[int, int]) -> list[NodeAnnouncement]:
        """Those whose choice stands: all but those that want ``span`` too, still join, and have a higher PeerId."""
        own = self._host.peer_id.to_bytes()
        return [
            node
            for node in nodes
            if node.state == "online" or node.peer_id.to_bytes() < own or (node.start, node.end) != span
        ]

    async def _settle(self) -> tuple[int, int]:
        """Choose a span such that nodes that come up together do not all choose the same."""
        others = await self._others()
        await self._choose_linear(others)
        if self._settings.span is not None:
            span = self._settings.span
            self.announcement = self._offer(*span)
            return span
        n_blocks = self._checkpoint.n_blocks
        length = self._settings.max_blocks or n_blocks
        span = choose_span(n_blocks, length, others)
        for _ in range(PLACEMENT_ROUNDS):
            self.announcement = self._offer(*span)
            await self._announce()
            seniors = self._senior(await self._others(), span)
            await self._choose_linear(self._first(seniors))
            better = choose_span(n_blocks, length, seniors)
            if better == span:
                break
            span = better
        return span

    def _first(self, nodes: list[NodeAnnouncement]) -> list[NodeAnnouncement]:
        """Those who are there before us: online, or with a lower PeerId."""
        own = self._host.peer_id.to_bytes()
        return [node for node in nodes if node.state == "online" or node.peer_id.to_bytes() < own]

    async def _choose_linear(self, others: list[NodeAnnouncement]) -> None:
        """The form of weights in which most blocks are served already; the fastest one here, if none is."""
        if self._settings.linear is not None:
            return
        blocks = Counter[str]()
        for node in others:
            name = linear_name(node.numerics)
            if name is not None:
                blocks[name] += node.end - node.start
        if blocks:
            self._linear = max(sorted(blocks), key=blocks.__getitem__)
        elif not self._linear:
            self._linear = await trio.to_thread.run_sync(self._probe, abandon_on_cancel=True)

    def _probe(self) -> str:
        threads = self._settings.engine.threads
        if threads is not None:
            torch.set_num_threads(threads)
        return probe(self._checkpoint.config, self._settings.probed).chosen

    async def _others(self) -> list[NodeAnnouncement]:
        records = await self._dht.find(keys.of_name(DIRECTORY), KIND)
        return [
            node
            for node in read_all(records)
            if node.digest == self._checkpoint.digest and node.peer_id != self._host.peer_id
        ]

    # What we say

    async def _announce(self) -> None:
        await self._dht.announce(keys.of_name(DIRECTORY), KIND, self._body)

    def _body(self) -> dict[str, object]:
        offer = self.announcement
        if offer is None:
            return {"withdrawn": True}
        if self._engine is not None:
            stats = self._engine.stats
            offer = replace(offer, cache_tokens_left=stats.cache_max_tokens - stats.cache_used_tokens)
        # Where and how we are reached is found out while we serve, and changes.
        offer = replace(offer, addresses=tuple(self._host.addresses), reachability=self._host.reachability)
        return offer.to_body()

    def _offer(self, start: int, end: int, *, loaded: BloomSpan | None = None, speed: float = 0.0) -> NodeAnnouncement:
        """What is announced: that we are about to load these blocks, or have ``loaded`` them."""
        if loaded is None:
            dtype, quantization, backend = "float32", "none" if self._linear == "fp32" else self._linear, "cpu"
        else:
            dtype, quantization, backend = loaded.numerics
        return NodeAnnouncement(
            peer_id=self._host.peer_id,
            addresses=tuple(self._host.addresses),
            model=self._checkpoint.name,
            digest=self._checkpoint.digest,
            blocks=self._checkpoint.n_blocks,
            start=start,
            end=end,
            weights="0" * 64 if loaded is None else loaded.digest,
            numerics=Numerics(dtype=dtype, quantization=quantization, backend=backend),
            decode_tokens_per_s=speed,
            cache_tokens_left=self._settings.engine.cache_tokens or 0,
            max_length=self._settings.engine.max_length_tokens,
            state="joining" if loaded is None else "online",
            agent=f"raceme/{VERSION}",
            reachability=self._host.reachability,
        )

    # What we answer

    async def _serve(self, connection: Connection, stream: Stream) -> None:
        session = _NodeSession(self, connection.peer_id)
        methods = {"open": session.open, "resume": session.resume, "step": session.step}
        broken = True  # by an error, or cancelled together with the connection to the relay that carries it
        try:
            await lane.serve(stream, connection.peer_id, methods, idle_s=SESSION_IDLE_S)
            broken = False
        finally:
            with trio.CancelScope(shield=True):
                await session.end(broken=broken)

    # Sessions

    async def keep(self, held: _Held) -> None:
        """Leave a session whose stream broke for ``resume_s``; of one peer's, the newest few."""
        held.holder = None
        held.left_at = trio.current_time()
        left = [each for each in self.held.values() if each.holder is None and each.peer_id == held.peer_id]
        for oldest in sorted(left, key=lambda each: each.left_at)[:-MAX_LEFT_PER_PEER]:
            await self.free(oldest)

    async def free(self, held: _Held) -> None:
        if self.held.pop(held.token, None) is not None:
            await self.engine.close_session(held.session_id)

    async def _sweep(self) -> None:
        """Free what nobody came back for."""
        while True:
            await trio.sleep(self._settings.resume_s / 4)
            for held in list(self.held.values()):
                if held.holder is None and trio.current_time() - held.left_at >= self._settings.resume_s:
                    await self.free(held)

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RpcError("busy", "the node is still loading", RETRY_AFTER_S)
        return self._engine

    def check_open(self, request: wire.Open) -> None:
        """Raises:
        RpcError: another model, or blocks that are not served here.
        """
        offer = self.announcement
        if offer is None or request.digest != offer.digest:
            raise RpcError("wrong-model", f"this node serves {offer.model if offer else 'nothing yet'}")
        if not offer.start <= request.start < request.end <= offer.end:
            raise RpcError("wrong-span", f"this node serves blocks {offer.start} to {offer.end}")


@dataclass(kw_only=True, eq=False)
class _Held:
    """A session that the engine has, and the stream that it belongs to; None while it waits to be resumed."""

    session_id: int
    peer_id: PeerId
    token: bytes
    holder: _NodeSession | None
    left_at: float = 0.0


class _NodeSession:
    """The node's side of one stream."""

    def __init__(self, node: Node, peer_id: PeerId) -> None:
        self._node = node
        self._peer_id = peer_id
        self._held: _Held | None = None

    async def open(self, message: Message) -> Message:
        if self._held is not None:
            raise RpcError("bad-input", "the session is open already")
        request = wire.Open.from_fields(message.header)
        self._node.check_open(request)
        engine = self._node.engine
        with _refusals(self._node.metrics):
            session_id = await engine.open_session(
                batch=request.batch,
                max_length=request.max_length,
                start=request.start,
                end=request.end,
                peer=self._peer_id,
            )
        token = secrets.token_bytes(wire.TOKEN_BYTES)
        self._held = _Held(session_id=session_id, peer_id=self._peer_id, token=token, holder=self)
        self._node.held[token] = self._held
        stats = engine.stats
        return Message(header={"cache_tokens_left": stats.cache_max_tokens - stats.cache_used_tokens, "token": token})

    async def resume(self, message: Message) -> Message:
        """Take over a session of the same peer from a stream that broke, or that the peer wants to leave."""
        if self._held is not None:
            raise RpcError("bad-input", "the session is open already")
        held = self._node.held.get(wire.read_token(message.header))
        if held is None or held.peer_id != self._peer_id:
            raise RpcError("no-session", "there is no such session (any more)")
        held.holder = self
        self._held = held
        return Message(header={})

    async def step(self, message: Message) -> Message:
        held = self._held
        if held is None:
            raise RpcError("bad-input", "no session is open on this stream")
        if held.holder is not self or held.token not in self._node.held:
            raise RpcError("no-session", "the session went on over another stream")
        if len(message.tensors) != 1:
            raise RpcError("bad-input", f"a step carries one tensor, not {len(message.tensors)}")
        position = wire.read_position(message.header)
        tensor = message.tensors[0]
        with _refusals(self._node.metrics):
            hidden = from_wire(tensor.dtype, tensor.shape, tensor.data)
            result = await self._node.engine.step(held.session_id, hidden, position)
        dtype, shape, data = to_wire(result)
        return Message(header={}, tensors=[Tensor(dtype=dtype, shape=shape, data=data)])

    async def end(self, *, broken: bool) -> None:
        """The stream is over; what broke may be resumed."""
        held = self._held
        if held is not None and held.holder is self:
            await (self._node.keep(held) if broken else self._node.free(held))


def linear_name(numerics: Numerics) -> str | None:
    """The backend of linear layers that computes like this; None if there is none here."""
    name = "fp32" if numerics.quantization == "none" else numerics.quantization
    is_ours = numerics.dtype == "float32" and numerics.backend.startswith("cpu") and name in BACKENDS
    return name if is_ours else None


@contextmanager
def _refusals(metrics: Metrics | None) -> Iterator[None]:
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
