"""A compute node: a span of blocks, served to sessions and announced to the swarm.

Coming up: choose a span, announce it as ``joining``, look whether somebody chose the same at the same
time (the lower PeerId keeps it), load, measure, look again, announce as ``online``. Staying: announce anew when the
speed has changed, and move when the swarm lacks other blocks more: announce where to, look again, load beside the old
span, look again, announce the new one, and let the old one go when its sessions have ended. Going: stop, withdraw.
"""

from __future__ import annotations

import gc
import logging
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import astuple, replace
from typing import Final

import torch
import trio

from compute.bloom import BloomSpan
from compute.bloom.graphs import attach_graphs
from compute.checkpoint import Checkpoint
from compute.devices import count_fitting, default_dtype
from compute.engine import Engine
from compute.engine_settings import total
from compute.errors import CheckpointError
from compute.huge_pages import use_huge_pages
from compute.linear import BACKENDS
from compute.memory import free_bytes
from compute.metrics import Metrics
from compute.neighbours import Neighbours, Waiting
from compute.node_settings import NodeSettings
from compute.placement import better_span, choose_span, coverage, keeps_move
from compute.probe import probe
from compute.serving import Held, Serving, Wanted
from compute.talking import ClientTalk, serve_pushes
from compute.training import Training
from compute.wire_forms import CODEC
from compute.worth import Worth
from net.dht import keys
from net.dht.service import Dht
from net.errors import NetError, RpcError
from net.files.pieces import FileId
from net.host import Host
from net.identity import PeerId
from net.mux.base import Stream
from net.nurseries import open_service_nursery
from net.perf import serve_perf
from net.protocol import session as wire
from net.protocol import training
from net.protocol.announcement import DIRECTORY, KIND, NodeAnnouncement, Numerics, read_all
from net.swarm import Connection
from net.version import VERSION

logger = logging.getLogger(__name__)

RETRY_AFTER_S: Final = 1.0  # while the node loads
BARRED_S: Final = 3600.0  # before blocks that could not be loaded are tried again
PLACEMENT_ROUNDS: Final = 5
GPU_LINEAR: Final = "nf4"  # the most blocks; a step of few rows reads a quarter of what bfloat16 does
JITTER: Final = 0.25  # either way, so that nodes that came together do not look together


class Node:
    """Serves blocks of one checkpoint on a host that has joined the DHT."""

    def __init__(
        self,
        host: Host,
        dht: Dht,
        checkpoint: Checkpoint,
        settings: NodeSettings,
        metrics: Metrics | None = None,
        share: Callable[[], Awaitable[FileId | None]] | None = None,
    ) -> None:
        """Nothing runs yet.

        Args:
            host, dht: ours.
            checkpoint: of which blocks are served.
            settings: how.
            metrics: get figures.
            share: serves the checkpoint's files to peers, and gives the manifest by which they are announced, if any.
        """
        self._host = host
        self._dht = dht
        self._checkpoint = checkpoint
        self._settings = settings
        self._serving: Serving | None = None
        self._leaving: list[Serving] = []
        self._linear = settings.linear or ""
        self._length = 0  # of spans that we choose
        self._first: frozenset[PeerId] = frozenset()  # who was online before us
        self._worth = Worth(host, dht, checkpoint, settings)
        self._neighbours = Neighbours(host, self._others_alike, self._served_span)
        self._waiting = Waiting(lambda: total(serving.engine.stats for serving in self._servings).waiting)
        self._pauses: set[str] = set()
        self._resumed = trio.Event()
        self._stay_until = -math.inf
        self.opened = trio.Event()
        self._barred: dict[tuple[int, int], float] = {}  # spans that could not be loaded, and until when
        self._share = share
        self._files: FileId | None = None
        self.metrics = metrics
        self.announcement: NodeAnnouncement | None = None

    @property
    def stats(self) -> tuple[int, int]:
        """Open sessions, and tokens computed so far by the engines that run."""
        stats = total(serving.engine.stats for serving in self._servings)
        return stats.sessions, stats.tokens

    @property
    def engine(self) -> Engine:
        """That of the blocks that are announced.

        Raises:
            RpcError: none has been loaded yet.
        """
        if self._serving is None:
            raise RpcError("busy", "the node is still loading", RETRY_AFTER_S)
        return self._serving.engine

    async def run(
        self,
        *,
        progress: Callable[[int, int], None] | None = None,
        task_status: trio.TaskStatus[NodeAnnouncement] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Load, announce, and serve until cancelled; ``started`` gets what was announced.

        Args:
            progress: called from another thread with (blocks loaded, blocks to load), at the start alone.

        Raises:
            CheckpointError: the span cannot be loaded.
        Cancellation: withdraws the announcement (at most two seconds), lets sessions go elsewhere (``leave_s``), then
            frees everything.
        """
        try:
            async with open_service_nursery() as outer:
                scope = trio.CancelScope()
                outer.start_soon(self._hold, scope)
                with scope:
                    await self._serve_until_cancelled(scope, progress, task_status)
                outer.cancel_scope.cancel()
        finally:
            with trio.move_on_after(2, shield=True):
                await self._dht.withdraw()

    async def _serve_until_cancelled(
        self,
        scope: trio.CancelScope,
        progress: Callable[[int, int], None] | None,
        task_status: trio.TaskStatus[NodeAnnouncement],
    ) -> None:
        async with open_service_nursery() as nursery:
            serve_perf(self._host)
            self._host.handle(wire.PROTOCOL_ID, self._serve)
            self._host.handle(wire.PUSH_PROTOCOL_ID, self._serve_pushes)
            self._host.handle(training.PROTOCOL_ID, Training(self).serve)
            if self.metrics is not None:
                self.metrics.read_from(lambda: total(serving.engine.stats for serving in self._servings))
            await self._come_up(nursery, progress)
            scope.shield = True  # from now on there may be sessions
            task_status.started(self._offer_loaded(self.engine))
            nursery.start_soon(self._worth.watch, self._current_engine, self._announce_speed)
            nursery.start_soon(self._neighbours.watch, self._dht.renew)
            nursery.start_soon(self._waiting.watch)
            nursery.start_soon(self._share_files)
            if self._settings.span is None and self._length < self._checkpoint.n_blocks:
                nursery.start_soon(self._look_around, nursery)

    async def _share_files(self) -> None:
        if self._share is not None:
            self._files = await self._share()
            await self._announce()

    async def _hold(self, scope: trio.CancelScope) -> None:
        """When the node is cancelled, give sessions the time to go elsewhere before what serves them is."""
        try:
            await trio.sleep_forever()
        finally:
            if scope.shield and not all(serving.is_idle for serving in self._servings) and self._settings.leave_s:
                with trio.move_on_after(self._settings.leave_s + 2, shield=True):
                    await self._dht.withdraw()
                    async with trio.open_nursery() as nursery:
                        for serving in self._servings:
                            nursery.start_soon(serving.drain, self._settings.leave_s)
            scope.cancel()

    @property
    def _servings(self) -> list[Serving]:
        serving = self._serving  # once: metrics are read in another thread
        return [*([] if serving is None else [serving]), *self._leaving]

    async def _start(self, span: BloomSpan, nursery: trio.Nursery, *, cache_tokens: int | None = None) -> Serving:
        settings = self._settings.engine
        if cache_tokens is not None:
            settings = replace(settings, cache_tokens=cache_tokens)
        serving = Serving(
            span,
            settings,
            resume_s=self._settings.resume_s,
            metrics=self.metrics,
            line_bytes_per_s=lambda: self._worth.line_bytes_per_s,
        )
        await nursery.start(serving.run)
        return serving

    # Pausing

    async def pause(self, why: str) -> None:
        """Serve nobody until each pause has been ended: withdraw, and end all sessions, whose clients go elsewhere.

        Weights stay in memory. A second pause for the same reason is none.
        """
        was_paused = bool(self._pauses)
        self._pauses.add(why)
        if was_paused:
            return
        self._resumed = trio.Event()
        async with trio.open_nursery() as nursery:
            for serving in self._servings:
                nursery.start_soon(serving.free_all)
            nursery.start_soon(self._dht.withdraw, keys.of_name(DIRECTORY))  # not what else is held here
        logger.warning("paused: %s", why)

    async def resume(self, why: str) -> None:
        """End a pause; one that there is not is no error."""
        if why not in self._pauses:
            return
        self._pauses.remove(why)
        if not self._pauses:
            self._resumed.set()
            await self._announce()
            logger.warning("goes on: paused no longer")

    @property
    def paused(self) -> bool:
        """Whether nobody is served."""
        return bool(self._pauses)

    # Which blocks, at the start

    async def _come_up(self, nursery: trio.Nursery, progress: Callable[[int, int], None] | None) -> None:
        """Choose a span, load it, measure, and announce that it is served; another one when it turns out to be somebody
        else's.

        Who comes up does not see who has looked but not announced, so everybody looks again after each announcement.
        Of two that want the same, the one that announced first has gone online before the other one's first look, and
        stands; or else it sees the other one in its last look, and the lower PeerId stands.
        """
        for rounds_left in reversed(range(PLACEMENT_ROUNDS)):
            start, end = await self._settle()
            serving = await self._start(await self._load_blocks(start, end, progress), nursery)
            await self._worth.find(serving.engine, self._linear)
            if not rounds_left or await self._may_stay(start, end):
                self._serving = serving
                self.announcement = self._offer_loaded(serving.engine)
                await self._announce()
                if not rounds_left or await self._may_stay(start, end):
                    return
                self._serving = None
            await serving.drain(0)
            del serving  # before others are loaded

    async def _load_blocks(self, start: int, end: int, progress: Callable[[int, int], None] | None = None) -> BloomSpan:
        def load() -> BloomSpan:
            span = self._checkpoint.load_span(
                start,
                end,
                progress=progress,
                linear=self._linear,
                kept=self._settings.kept,
                device=self._settings.devices,
            )
            attach_graphs(span)
            if span.device.type == "cpu":
                use_huge_pages()
            return span

        return await trio.to_thread.run_sync(load, abandon_on_cancel=True)

    async def _may_stay(self, start: int, end: int) -> bool:
        """Whether these blocks are ours to serve: not if the others have agreed upon another form of weights meanwhile,
        or another node has the right to these very blocks, and there are others that are served less.
        """
        others = await self._others()
        stand = self._standing(others)
        if self._serving is None:
            self._first = frozenset(node.peer_id for node in others if node.state == "online")
        loaded = self._linear
        await self._choose_linear(stand)
        if self._linear != loaded:
            self._length = 0  # as many as fit in the new form
            return False
        if self._settings.span is not None:
            return True
        rivals = self._alike(self._standing(others, beside=(start, end)))
        better = choose_span(self._checkpoint.n_blocks, end - start, rivals)
        return better == (start, end) or all((node.start, node.end) != (start, end) for node in rivals)

    def _standing(
        self, nodes: list[NodeAnnouncement], *, beside: tuple[int, int] | None = None
    ) -> list[NodeAnnouncement]:
        """Those whose choice stands, so that ours has to go by it: who was online before us, and lower PeerIds; with
        ``beside``, also whoever wants other blocks.
        """
        own = self._host.peer_id.to_bytes()
        return [
            node
            for node in nodes
            if node.peer_id.to_bytes() < own
            or (node.state == "online" and (self._serving is None or node.peer_id in self._first))
            or (beside is not None and (node.start, node.end) != beside)
        ]

    async def _settle(self) -> tuple[int, int]:
        """Choose a span such that nodes that come up together do not all choose the same."""
        others = await self._others()
        await self._choose_linear(others)
        others = self._alike(others)
        self._length = self._length or self._choose_length()  # once: later there is less memory free
        if self._settings.span is not None:
            span = self._settings.span
            self.announcement = self._offer(*span)
            return span
        n_blocks = self._checkpoint.n_blocks
        span = choose_span(n_blocks, self._length, others)
        for _ in range(PLACEMENT_ROUNDS):
            self.announcement = self._offer(*span)
            await self._announce()
            others = await self._others()
            announced = self._linear
            await self._choose_linear(self._standing(others))
            better = choose_span(n_blocks, self._length, self._alike(self._standing(others, beside=span)))
            if better == span and announced == self._linear:  # else others would take us for another class
                break
            span = better
        return span

    def _choose_length(self) -> int:
        """How many blocks to serve, where it is ours to choose."""
        length = self._settings.max_blocks
        if length is None:
            devices = self._settings.devices
            block_bytes = self._checkpoint.block_bytes(self._linear, devices[0])
            length = count_fitting([free_bytes(device) for device in devices], block_bytes)
        return min(length, self._checkpoint.n_blocks)

    async def _choose_linear(self, others: list[NodeAnnouncement]) -> None:
        """The form of weights in which most blocks are served already; where none are, that of the lowest PeerId; the
        fastest one here, if there is nobody.
        """
        if self._settings.linear is not None:
            return
        blocks, joining = Counter[str](), dict[bytes, str]()
        for node in others:
            name = linear_name(node.numerics, self._settings.devices[0])
            if name is None:
                continue
            if node.state == "online":
                blocks[name] += node.end - node.start
            else:
                joining[node.peer_id.to_bytes()] = name
        if blocks:
            self._linear = max(sorted(blocks), key=blocks.__getitem__)
        elif joining:
            self._linear = joining[min(joining)]
        elif not self._linear:
            self._linear = await trio.to_thread.run_sync(self._probe, abandon_on_cancel=True)

    def _probe(self) -> str:
        if self._settings.devices[0].type != "cpu":
            return GPU_LINEAR
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

    # Which blocks, later

    async def _look_around(self, nursery: trio.Nursery) -> None:
        """Move whenever the swarm lacks other blocks more."""
        while True:
            await trio.sleep(self._settings.look_s * random.uniform(1 - JITTER, 1 + JITTER))
            if not self._pauses and not self._leaving:
                await self._move_if_better(nursery)

    async def _move_if_better(self, nursery: trio.Nursery) -> None:
        """Look, and look again whenever others may have seen what we intend, before it is done."""
        old, others = self._serving, self._alike(await self._others())
        if old is None:
            return
        n_blocks, here = self._checkpoint.n_blocks, (old.span.start, old.span.end)
        now = trio.current_time()
        barred = {span for span, until in self._barred.items() if until > now}
        if now < self._stay_until and all(coverage(n_blocks, [*others, self._offer(*here)])):
            return
        target = better_span(n_blocks, here, self._length, self._worth.tokens_per_s, others, barred=barred)
        if target is None:
            return
        await self._intend(target)
        if await self._may_go(here, target):
            logger.info("moves from blocks %d:%d to %d:%d", *here, *target)
            self._stay_until = now + self._settings.stay_s
            if _fits_beside(old, target):
                await self._move_beside(old, target, nursery)
            else:
                self._leaving.append(old)
                del old
                await self._move_after(here, target, nursery)
        await self._intend(None)

    async def _move_beside(self, old: Serving, target: tuple[int, int], nursery: trio.Nursery) -> None:
        """Load the new blocks while the old ones are served; stay if that fails, or is no good any more."""
        span = await self._try_to_load(*target)
        if span is None or not await self._may_go((old.span.start, old.span.end), target):
            return
        try:
            # As much cache as before: what is free now is not what will be.
            serving = await self._start(span, nursery, cache_tokens=old.engine.stats.cache_max_tokens)
        except RuntimeError as error:  # a GPU's
            self._bar(target, error)
            return
        self._serving = serving
        self._leaving.append(old)
        nursery.start_soon(self._let_go)
        self.announcement = self._offer_loaded(self._serving.engine)

    async def _move_after(self, here: tuple[int, int], target: tuple[int, int], nursery: trio.Nursery) -> None:
        """Let the old blocks go first, where memory does not hold both. Others serve them, or it would be no good move:
        sessions can go there.
        """
        self._serving = None
        self.announcement = self._offer(*target)
        await self._announce()
        await self._let_go()
        while self._pauses:
            await self._resumed.wait()
        span = await self._try_to_load(*target) or await self._load_blocks(*here)
        self._serving = await self._start(span, nursery)
        self.announcement = self._offer_loaded(self._serving.engine)

    async def _try_to_load(self, start: int, end: int) -> BloomSpan | None:
        try:
            return await self._load_blocks(start, end)
        except (CheckpointError, MemoryError, RuntimeError, OSError, ValueError) as error:  # torch: RuntimeError
            self._bar((start, end), error)
            return None

    def _bar(self, span: tuple[int, int], error: Exception) -> None:
        """Not to be tried again soon."""
        logger.warning("blocks %d:%d cannot be served, and the node stays where it was: %s", *span, error)
        self._barred[span] = trio.current_time() + BARRED_S

    async def _may_go(self, here: tuple[int, int], target: tuple[int, int]) -> bool:
        own, others = self._host.peer_id, self._alike(await self._others())
        n_blocks, speed = self._checkpoint.n_blocks, self._worth.tokens_per_s
        return not self._pauses and keeps_move(n_blocks, here, target, speed, own, others)

    def _alike(self, nodes: list[NodeAnnouncement]) -> list[NodeAnnouncement]:
        """Those that a chain could go through together with us, or that are about to load such blocks."""
        ours = None if self._serving is None else self._serving.span.numerics
        return [
            node
            for node in nodes
            if (ours is not None and astuple(node.numerics) == ours)
            or (
                (ours is None or node.state == "joining")
                and linear_name(node.numerics, self._settings.devices[0]) == self._linear
            )
        ]

    async def _intend(self, target: tuple[int, int] | None) -> None:
        """Announce where we are about to move."""
        if self.announcement is not None:
            self.announcement = replace(self.announcement, next=target)
            await self._announce()

    async def _let_go(self) -> None:
        """Have the sessions of what we leave end, and its memory free."""
        for old in self._leaving:
            await old.drain(self._settings.drain_s)
        self._leaving.clear()
        del old
        await trio.to_thread.run_sync(gc.collect)

    # What we say

    def _current_engine(self) -> Engine | None:
        return None if self._serving is None else self._serving.engine

    def _served_span(self) -> tuple[int, int] | None:
        if self._serving is None or self._pauses:
            return None
        return self._serving.span.start, self._serving.span.end

    async def _others_alike(self) -> list[NodeAnnouncement]:
        return self._alike(await self._others())

    async def _announce_speed(self, tokens_per_s: float) -> None:
        if self.announcement is not None:
            self.announcement = replace(self.announcement, decode_tokens_per_s=tokens_per_s)
            await self._announce()

    async def _announce(self) -> None:
        """Once it has been said it is said again every half a minute, so a failure is no end."""
        if self._pauses:
            return
        try:
            await self._dht.announce(keys.of_name(DIRECTORY), KIND, self._body)
        except NetError as error:
            logger.warning("not announced now: %s", error)

    def _body(self) -> dict[str, object]:
        offer = self.announcement
        if offer is None:
            return {"withdrawn": True}
        if self._serving is not None:
            stats = self._serving.engine.stats
            offer = replace(offer, cache_tokens_left=stats.cache_max_tokens - stats.cache_used_tokens)
        # Where and how we are reached is found out while we serve, and changes.
        offer = replace(offer, addresses=tuple(self._host.addresses), reachability=self._host.reachability)
        offer = replace(offer, files=self._files)
        return replace(offer, round_trips=self._neighbours.round_trips, waiting=self._waiting.average).to_body()

    def _offer(self, start: int, end: int) -> NodeAnnouncement:
        """What is announced: that we are about to load these blocks."""
        return NodeAnnouncement(
            peer_id=self._host.peer_id,
            addresses=tuple(self._host.addresses),
            model=self._checkpoint.name,
            digest=self._checkpoint.digest,
            blocks=self._checkpoint.n_blocks,
            start=start,
            end=end,
            weights="0" * 64,
            numerics=Numerics(
                dtype=str(default_dtype(self._settings.devices[0])).removeprefix("torch."),
                quantization="none" if self._linear == "fp32" else self._linear,
                backend=self._settings.devices[0].type,
            ),
            decode_tokens_per_s=self._worth.tokens_per_s,
            cache_tokens_left=self._settings.engine.cache_tokens or 0,
            max_length=self._settings.engine.max_length_tokens,
            state="joining",
            agent=f"raceme/{VERSION}",
            reachability=self._host.reachability,
            codecs=(CODEC,),
        )

    def _offer_loaded(self, engine: Engine) -> NodeAnnouncement:
        """That we have loaded them, and serve."""
        span, stats = engine.span, engine.stats
        dtype, quantization, backend = span.numerics
        return replace(
            self._offer(span.start, span.end),
            weights=span.digest,
            numerics=Numerics(dtype=dtype, quantization=quantization, backend=backend),
            cache_tokens_left=stats.cache_max_tokens - stats.cache_used_tokens,
            state="online",
        )

    # What we answer

    async def _serve(self, connection: Connection, stream: Stream) -> None:
        await ClientTalk(self, self._host, connection, stream).serve()

    async def _serve_pushes(self, _: Connection, stream: Stream) -> None:
        await serve_pushes(stream, self)

    def serving_for(self, request: Wanted) -> Serving:
        """Who opens a session, or does a training call, that is asked for.

        Raises:
            RpcError: another model, blocks that are not served here, or nothing is served now.
        """
        offer = self.announcement
        if offer is None or self._serving is None:
            raise RpcError("busy", "the node is still loading", RETRY_AFTER_S)
        if self._pauses:
            raise RpcError("busy", "the node is paused")  # for how long nobody knows: others are to be asked
        if request.digest != offer.digest:
            raise RpcError("wrong-model", f"this node serves {offer.model}")
        span = self._serving.span
        if not span.start <= request.start < request.end <= span.end:
            raise RpcError("wrong-span", f"this node serves blocks {span.start} to {span.end}")
        return self._serving

    def find_held(self, token: bytes) -> Held | None:
        """A session that a stream holds, or held a moment ago; ``None`` if it has ended."""
        return next((serving.held[token] for serving in self._servings if token in serving.held), None)

    def find_pushed(self, push_token: bytes) -> Held | None:
        """The session that who has this token may hand steps on to."""
        found = (serving.find_pushed(push_token) for serving in self._servings)
        return next((held for held in found if held is not None), None)


def _fits_beside(old: Serving, target: tuple[int, int]) -> bool:
    """Whether memory holds blocks ``[start, end)`` as well as those that are loaded, and what their cache may grow to.

    One more block than there are: it is there unquantised while it is loaded.
    """
    span, stats, config = old.span, old.engine.stats, old.span.config
    each = sum(layer.weight_bytes for layer in span.linears) // len(span)
    token_bytes = 2 * len(span) * config.hidden_size * span.dtype.itemsize
    cache = (stats.cache_max_tokens - stats.cache_used_tokens) * token_bytes
    needed = (target[1] - target[0]) * each + config.parameters_per_block * span.dtype.itemsize + cache
    devices = set(span.devices)
    return all(free_bytes(device) >= needed / len(devices) for device in devices)


def linear_name(numerics: Numerics, device: torch.device) -> str | None:
    """The backend of linear layers that computes like this on such a device; None if there is none."""
    name = "fp32" if numerics.quantization == "none" else numerics.quantization
    dtype = str(default_dtype(device)).removeprefix("torch.")
    is_ours = numerics.dtype == dtype and numerics.backend.partition("-")[0] == device.type and name in BACKENDS
    return name if is_ours else None
