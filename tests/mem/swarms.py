"""A whole swarm in one trio loop: a relay, nodes and a client, over the memory transport."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import trio

from client.models.bloom import DistributedBloomForCausalLM
from client.swarm import AsyncSwarm
from compute.checkpoint import Checkpoint
from compute.engine import EngineSettings
from compute.node import Node
from compute.node_settings import NodeSettings
from compute.peer_models import find_at_peers_from_trio, keep_for_clients, share
from net.addresses import PeerAddress, parse
from net.dht import keys
from net.dht.service import Dht
from net.files.models import HASHES_FOLDER, MODELS_FOLDER, PeerModels, split_pin
from net.files.remembered import RememberedHashes
from net.files.server import FileServer
from net.host import Host, open_host
from net.identity import Identity, PeerId
from net.nurseries import open_service_nursery
from net.protocol.announcement import DIRECTORY, KIND, NodeAnnouncement, read_all
from net.transports.memory import MemoryNetwork

T = TypeVar("T")
Span = tuple[int, int]
ENGINE = EngineSettings(threads=1)


@dataclass(eq=False, kw_only=True)
class RunningNode:
    """A node of the test's swarm."""

    node: Node
    dht: Dht
    host: Host
    offer: NodeAnnouncement
    _service: trio.CancelScope
    _whole: trio.CancelScope
    _served: trio.Event
    _ended: trio.Event

    @property
    def peer_id(self) -> PeerId:
        return self.host.peer_id

    @property
    def sessions(self) -> int:
        return self.node.stats[0]

    @property
    def tokens(self) -> list[bytes]:
        """By which its sessions can be resumed."""
        return [token for serving in self.node._servings for token in serving.held]

    @property
    def cached_tokens(self) -> int:
        stats = self.node.engine.stats
        return stats.cache_used_tokens

    async def leave(self) -> None:
        """End as SIGTERM would: the announcement is withdrawn."""
        self._service.cancel()
        await self._served.wait()
        self._whole.cancel()
        await self._ended.wait()

    async def die(self) -> None:
        """End as SIGKILL would: connections break, the announcement stays."""

        async def nothing(*_: bytes) -> None:
            """Nobody has the time to withdraw."""

        self.dht.withdraw = nothing  # type: ignore[method-assign]
        await self.leave()


@dataclass(eq=False, kw_only=True)
class TestSwarm:
    """What a test holds in its hands.

    Attributes:
        client: the swarm as a client sees it.
        nodes: in the order of their spans.
    """

    __test__ = False

    client: AsyncSwarm
    network: MemoryNetwork
    bootstrap: PeerAddress
    nursery: trio.Nursery
    nodes: list[RunningNode] = field(default_factory=list)

    async def add_node(
        self,
        checkpoint: Checkpoint | Path | str,
        span: Span | None = None,
        *,
        identity: Identity | None = None,
        max_blocks: int | None = None,
        engine: EngineSettings = ENGINE,
        home: Path | None = None,
        **settings: Any,
    ) -> RunningNode:
        """Start a node and wait until it serves.

        Args:
            checkpoint: of which it serves blocks; a name for one whose files peers give.
            span, max_blocks, engine, settings: see ``NodeSettings``.
            identity: who it is.
            home: where it keeps things; with one, it gives files to others.
        """
        if isinstance(checkpoint, Path):
            checkpoint = Checkpoint.open(checkpoint)
        settings = {"resume_s": 0.2, "leave_s": 0.0, "measure_line": False, **settings}
        node: RunningNode = await self.nursery.start(
            _run_node,
            self.network,
            self.bootstrap,
            checkpoint,
            NodeSettings(span=span, max_blocks=max_blocks, engine=engine, **settings),
            identity or Identity.generate(),
            home,
        )
        self.nodes.append(node)
        return node

    @asynccontextmanager
    async def another_client(self) -> AsyncIterator[AsyncSwarm]:
        """Another program, on another machine."""
        async with (
            open_host(Identity.generate(), transports=(self.network.transport(),)) as host,
            open_service_nursery() as nursery,
        ):
            dht = Dht(host, server=False)
            await dht.join([self.bootstrap])
            yield AsyncSwarm(host, dht, nursery)
            nursery.cancel_scope.cancel()

    async def model(self, folder: Path) -> DistributedBloomForCausalLM:
        return await self.client.model(str(folder))

    async def generate(self, folder: Path, ids: torch.Tensor, **options: Any) -> list[list[int]]:
        """What the swarm's model makes of ``ids``."""
        model = await self.model(folder)
        return await blocking(lambda: generate(model, ids, **options))


async def blocking(function: Callable[[], T]) -> T:
    """Run code that blocks, as users of trio do."""
    return await trio.to_thread.run_sync(function)


def generate(model: Any, ids: torch.Tensor, *, seed: int | None = None, **options: Any) -> list[list[int]]:
    """``model.generate`` from a seed, as lists; the same call for theirs and ours."""
    if seed is not None:
        torch.manual_seed(seed)
    options.setdefault("attention_mask", torch.ones_like(ids))
    rows: list[list[int]] = model.generate(ids, **options).tolist()
    return rows


async def until(condition: Callable[[], bool], *, timeout_s: float = 5.0) -> None:
    """Wait for something that another task or thread is about to do; fails if it does not."""
    with trio.fail_after(timeout_s):
        while not condition():  # noqa: ASYNC110  what is waited for happens in another thread, or has no event
            await trio.sleep(0.002)


async def _run_node(
    network: MemoryNetwork,
    bootstrap: PeerAddress,
    checkpoint: Checkpoint | str,
    settings: NodeSettings,
    identity: Identity,
    home: Path | None,
    *,
    task_status: trio.TaskStatus[RunningNode],
) -> None:
    served, ended = trio.Event(), trio.Event()
    try:
        with trio.CancelScope() as whole:
            async with open_host(identity, listen=[parse("/memory/0")], transports=(network.transport(),)) as host:
                dht = Dht(host, server=True)
                await dht.join([bootstrap])
                async with trio.open_nursery() as nursery:
                    await nursery.start(dht.run)
                    sharing = None
                    if home is not None:
                        remembered, server = RememberedHashes(home / HASHES_FOLDER), FileServer(host)
                        if isinstance(checkpoint, str):
                            models = PeerModels(
                                host, partial(_find_nodes, dht), home / MODELS_FOLDER, remembered, server=server
                            )
                            checkpoint = await find_at_peers_from_trio(models, *split_pin(checkpoint))
                        sharing = partial(share, checkpoint, server, remembered)
                    assert isinstance(checkpoint, Checkpoint)
                    node = Node(host, dht, checkpoint, settings, share=sharing)
                    running = RunningNode(
                        node=node,
                        dht=dht,
                        host=host,
                        offer=await nursery.start(node.run),
                        _service=nursery.cancel_scope,
                        _whole=whole,
                        _served=served,
                        _ended=ended,
                    )
                    nursery.start_soon(keep_for_clients, checkpoint)
                    task_status.started(running)
                served.set()
    finally:
        served.set()
        ended.set()


async def _find_nodes(dht: Dht) -> list[NodeAnnouncement]:
    return read_all(await dht.find(keys.of_name(DIRECTORY), KIND))


@asynccontextmanager
async def swarm_of(
    folder: Path | None = None, spans: Sequence[Span] = (), *, home: Path | None = None
) -> AsyncIterator[TestSwarm]:
    """A relay, a client, and a node of the checkpoint in ``folder`` for each of ``spans``.

    With ``home``, the client keeps things there, in ``client``, and nodes give files to others.
    """
    torch.set_num_threads(1)
    network = MemoryNetwork()
    async with (
        open_host(Identity.generate(), listen=[parse("/memory/0")], transports=(network.transport(),)) as relay,
        trio.open_nursery() as nursery,
    ):
        relay_dht = Dht(relay, server=True)
        await relay_dht.join([])
        async with (
            open_host(Identity.generate(), transports=(network.transport(),)) as host,
            open_service_nursery() as sessions,
        ):
            dht = Dht(host, server=False)
            bootstrap = relay.peer_addresses[0]
            await dht.join([bootstrap])
            swarm = TestSwarm(
                client=AsyncSwarm(host, dht, sessions, home=None if home is None else home / "client"),
                network=network,
                bootstrap=bootstrap,
                nursery=nursery,
            )
            checkpoint = None if folder is None else Checkpoint.open(folder)
            for number, span in enumerate(spans):
                assert checkpoint is not None
                await swarm.add_node(checkpoint, span, home=None if home is None else home / f"node-{number}")
            yield swarm
            sessions.cancel_scope.cancel()
        nursery.cancel_scope.cancel()
