"""The swarm as a client sees it, for trio. ``client.blocking`` is the same for everybody else."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from client.choices import NO_CHOICES, Choices
from client.directory import Directory
from client.errors import InvalidInput, MissingBlocks, UnknownModel
from client.lifesigns import LifeSigns
from client.modules.obtaining import ObtainedModule, obtain
from client.nearness import Nearness
from client.pricing import Measurements
from client.routing import Wishes, choose_chain, runs_without
from net import addresses, console, errors
from net.dht import keys
from net.dht.service import Dht
from net.files.models import HASHES_FOLDER, MODELS_FOLDER, FileProgress, PeerModels
from net.files.remembered import RememberedHashes
from net.host import Host, open_host
from net.identity import Identity, PeerId
from net.modules.finding import FoundModule, ModuleFinder
from net.modules.store import MODULES_FOLDER, ModuleStore
from net.nurseries import open_service_nursery
from net.ping import ping_once
from net.presence import run_presence
from net.protocol.announcement import DIRECTORY, HEX_DIGEST, KIND, NodeAnnouncement, read_all
from net.reputation import Reputation
from net.security.swarm_key import SwarmKey

if TYPE_CHECKING:
    from client.legs import FindNodes
    from client.models.bloom import DistributedBloomForCausalLM
    from client.session import Session
    from client.tuning.methods import Method
    from client.tuning.trainer import Trainer
    from compute.tuning import SpanTuning

PROBE_S = 2.0
REACH_S = 8.0
REPUTATION_FILE = "reputation.json"  # in the folder where keys are

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model and who serves it.

    Attributes:
        name: what most of its nodes call it.
        digest: which model; nodes with another digest serve another one, whatever its name.
        n_blocks: of the whole model.
        nodes: what its nodes announce, by their first block.
    """

    name: str
    digest: str
    n_blocks: int
    nodes: tuple[NodeAnnouncement, ...]

    @property
    def names(self) -> frozenset[str]:
        """What its nodes call it: the same files may go by another name elsewhere, as copies of a folder do."""
        return frozenset(node.model for node in self.nodes)

    @property
    def placement(self) -> list[list[PeerId]]:
        """For each block, the peers that serve it."""
        return [[n.peer_id for n in self.nodes if n.start <= block < n.end] for block in range(self.n_blocks)]

    @property
    def missing(self) -> list[tuple[int, int]]:
        """The runs of blocks [start, end) that nobody serves."""
        return runs_without(self.n_blocks, self.nodes)


def usual_name(nodes: Sequence[NodeAnnouncement]) -> str:
    """What most of a model's nodes call it; of names that are as frequent, the first in the alphabet."""
    counts = Counter(node.model for node in nodes)
    return min(counts, key=lambda name: (-counts[name], name))


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A node as we reach it.

    Attributes:
        round_trip_s: measured now; None when it does not answer.
        problem: why not; empty when it does.
    """

    announcement: NodeAnnouncement
    round_trip_s: float | None
    problem: str


class AsyncSwarm:
    """Made by ``open_swarm``; all methods belong to its event loop.

    Attributes:
        module_finder: finds modules that others have published.
        module_store: keeps those that are fetched.
    """

    def __init__(
        self,
        host: Host,
        dht: Dht,
        nursery: trio.Nursery,
        reputation: Reputation | None = None,
        *,
        home: Path | None = None,
    ) -> None:
        """Take what is running.

        Args:
            host: dials.
            dht: finds.
            nursery: in which sessions live.
            reputation: what is known of nodes; whoever gives it keeps it. By default one that begins empty and is
                forgotten.
            home: where models' files and modules that others have given are kept; by default, where the command
                ``raceme`` does.
        """
        self.host = host
        self._home = console.data_folder() if home is None else home
        self.module_finder = ModuleFinder(host, dht, on_failure=self._blame)
        self.module_store = ModuleStore(self._home / MODULES_FOLDER)
        self.reputation = Reputation(None, trio.current_time) if reputation is None else reputation
        self._nursery = nursery
        self._nearness = Nearness(host, nursery)
        self._life_signs = LifeSigns(host)
        self._directory = Directory(self._look_up, nursery)
        self._dht = dht
        self._token = trio.lowlevel.current_trio_token()

    async def nodes(self, *, fresh: bool = True) -> list[NodeAnnouncement]:
        """What all nodes announce that serve now.

        Args:
            fresh: false where what was found in the last minute will do, and must not be waited for.
        """
        return await self._directory.nodes(fresh=fresh)

    async def _look_up(self) -> list[NodeAnnouncement]:
        records = await self._dht.find(keys.of_name(DIRECTORY), KIND)
        return [node for node in read_all(records) if node.state == "online"]

    async def models(self) -> list[ServedModel]:
        """What is being served, block by block."""
        # A digest belongs to one number of blocks; who announces another one serves something else.
        by_identity: dict[tuple[str, int], list[NodeAnnouncement]] = {}
        for node in await self.nodes():
            by_identity.setdefault((node.digest, node.blocks), []).append(node)
        return [
            ServedModel(
                name=usual_name(nodes),
                digest=digest,
                n_blocks=n_blocks,
                nodes=tuple(sorted(nodes, key=lambda node: (node.start, node.end, node.peer_id.to_bytes()))),
            )
            for (digest, n_blocks), nodes in sorted(
                by_identity.items(), key=lambda item: (usual_name(item[1]), item[0])
            )
        ]

    async def modules(self, model: str) -> list[FoundModule]:
        """The modules that somebody has for a model, the oldest first.

        Args:
            model: its name, as served, or its digest (64 hex digits).

        Raises:
            UnknownModel: nobody serves a model of this name.
        """
        digests = (
            {model} if HEX_DIGEST.fullmatch(model) else {m.digest for m in await self.models() if model in m.names}
        )
        if not digests:
            raise UnknownModel(f"nobody serves {model} now; name the model's digest to find its modules all the same")
        found = [each for digest in sorted(digests) for each in await self.module_finder.for_model(digest)]
        return sorted(found, key=lambda each: (each.manifest.created_s, each.manifest.hash))

    async def get_module(self, module: str) -> ObtainedModule:
        """A module that somebody has published, whatever model it is for, fetched unless it is here.

        Args:
            module: ``NAME@HASH``, or ``NAME`` if there is but one.

        Raises:
            net.errors.ModuleError: it cannot be had, or is not what its author signed.
        """
        return await obtain(self, module, None)

    async def peers(self) -> list[Peer]:
        """The nodes, each with a round trip measured now."""
        found: list[Peer] = []
        async with trio.open_nursery() as nursery:
            for node in await self.nodes():
                nursery.start_soon(self._probe, node, found)
        return sorted(found, key=lambda peer: (peer.announcement.model, peer.announcement.start))

    async def session(
        self,
        model: ServedModel,
        *,
        max_length: int | None = None,
        wire: str = "auto",
        measures_error: bool = False,
        accepts: Callable[[NodeAnnouncement], bool] = lambda _: True,
        choices: Choices = NO_CHOICES,
        tuning: SpanTuning | None = None,
    ) -> Session:
        """A session over all blocks of a model; opened at its first step.

        Args:
            model: which.
            max_length: reserve for this many tokens; as many as the nodes allow by default.
            wire: in which form hidden states travel: "auto" for the nodes' activation type, in which nothing is lost;
                "bf16" or "int8" for fewer bytes, and not quite the same values.
            measures_error: find out what is lost on the way, for ``traffic``; that takes time.
            accepts: false for nodes that must not be used.
            choices: which nodes to use; blocks that are computed here are the caller's.
            tuning: what is added within all blocks that nodes compute, for this session alone.

        Raises:
            TypeError, InvalidInput: ``max_length`` is no whole number above 0, there is no such ``wire``, or the tuning
                lacks blocks or holds NaN or infinity.
        """
        from client.session import Session

        if tuning is not None:
            await trio.to_thread.run_sync(_check_tuning, tuning, model.n_blocks, choices.local_blocks)
        return Session(
            self.host,
            self._finder(model, accepts),
            self._nursery,
            self.reputation,
            max_length=max_length,
            wire_form=wire,
            measures_error=measures_error,
            nearness=self._nearness,
            life_signs=self._life_signs,
            choices=choices,
            tuning=tuning,
        )

    async def trainer(
        self,
        model: ServedModel,
        *,
        accepts: Callable[[NodeAnnouncement], bool] = lambda _: True,
        choices: Choices = NO_CHOICES,
    ) -> Trainer:
        """Who has whole batches computed, forwards and back.

        Args:
            model: which.
            accepts, choices: as for a session.
        """
        from client.tuning.calls import RemoteCaller
        from client.tuning.trainer import Trainer

        return Trainer(
            RemoteCaller(self.host, self._nursery),
            self._finder(model, accepts),
            self.reputation,
            model.digest,
            choices=choices,
            measured=self._measured,
        )

    def _measured(self, nodes: Sequence[NodeAnnouncement]) -> Measurements:
        """What we know of nodes ourselves."""
        peers = {node.peer_id for node in nodes}
        return Measurements(
            round_trips=self._nearness.round_trips(peers),
            failure_chance={peer: self.reputation.failure_chance(peer) for peer in peers},
            relayed=self._nearness.relayed(peers),
        )

    def _finder(self, model: ServedModel, accepts: Callable[[NodeAnnouncement], bool]) -> FindNodes:
        """Finds the nodes of a model that may be used."""

        async def find(*, fresh: bool = True) -> list[NodeAnnouncement]:
            nodes = [n for n in await self.nodes(fresh=fresh) if (n.digest, n.blocks) == (model.digest, model.n_blocks)]
            if not nodes:
                raise UnknownModel(
                    f"nobody serves {model.name} any more; start nodes with: raceme serve {model.name} --bootstrap ADDR"
                )
            accepted = [node for node in nodes if accepts(node)]
            if not accepted:
                raise UnknownModel(
                    f"the nodes that serve {model.name} hold other weights than the files here: take the same "
                    f"checkpoint on both sides"
                )
            return accepted

        return find

    def peer_models(
        self, permits: Callable[[NodeAnnouncement], bool], progress: FileProgress | None = None
    ) -> PeerModels:
        """What gets models' files from nodes.

        Args:
            permits: false for nodes that must not be asked.
            progress: told how far files are.
        """

        async def find_nodes() -> list[NodeAnnouncement]:
            return [node for node in await self.nodes(fresh=False) if permits(node)]

        return PeerModels(
            self.host,
            find_nodes,
            self._home / MODELS_FOLDER,
            RememberedHashes(self._home / HASHES_FOLDER),
            progress=progress,
            on_failure=self._blame,
        )

    def _blame(self, failure: errors.PeerFailed) -> None:
        """For a file or a module that it lied about; whoever is away, or has it no more, is not blamed for that."""
        if isinstance(failure, errors.PeerLied) and isinstance(failure.peer_id, PeerId):
            self.reputation.failed(failure.peer_id, failure.reason)

    async def model(
        self,
        name: str,
        *,
        allow: Iterable[str | PeerId] | None = None,
        block: Iterable[str | PeerId] = (),
        pins: Mapping[tuple[int, int], str | PeerId] | None = None,
        mixed_numerics: bool = False,
        local_blocks: int = 0,
        tuning: Method | Sequence[Method] | None = None,
        module: str | PathLike[str] | None = None,
        progress: FileProgress | None = None,
    ) -> DistributedBloomForCausalLM:
        """A model of the swarm, as a transformers ``GenerationMixin`` with its ``.tokenizer``.

        Its methods block: within trio, call them with ``trio.to_thread.run_sync``.

        Args:
            name: as served; or the path of a checkpoint's folder, with a / in it. The client holds embeddings and head
                itself: if they are not on this machine, nodes that serve the model give their files, which are kept.
                ``NAME@DIGEST`` takes the model, or the files, whose digest begins so, and no others.
            allow: the only peers to use, by PeerId; all by default.
            block: peers not to use.
            pins: who must compute certain blocks: ``{(start, end): PeerId}``.
            mixed_numerics: whether a chain may compute some blocks with other numerics than the rest where it cannot be
                had otherwise (a warning says so): the tokens are then those of no one machine.
            local_blocks: compute so many of the first blocks, and of the last ones, here, in fp32 on the CPU. Nodes
                then see hidden states from within the model alone. Where they compute with other numerics, the tokens
                are those of blocks that are mixed so.
            tuning: what to train: a method of ``client.tuning`` such as ``LoRA(rank=8)``, or several in a list. Its
                parameters are ``model.tuned.parameters()``.
            module: what was trained before, to be used or trained further: the folder that ``save_pretrained`` or PEFT
                wrote, or what somebody has published: ``NAME@HASH``, or ``NAME`` if there is but one. Whoever has it
                sends it; what is not as its author signed it, or does not fit, is refused.
            progress: called in the thread of the swarm's event loop, which is another than the caller's of a blocking
                swarm, with (name, bytes that are here, bytes in all) of files that nodes give.

        Raises:
            UnknownModel: nobody serves it, under this name or with these files; or its files are not on this machine
                and nobody gives them.
            TypeError, InvalidInput: options that cannot be, and what to do.
        """
        from client.models.loading import load
        from client.portal import Portal

        served = await self.models()
        chosen = partial(
            load,
            allow=allow,
            block=block,
            pins=pins,
            mixed_numerics=mixed_numerics,
            local_blocks=local_blocks,
            tuning=tuning,
            module=module,
            progress=progress,
        )
        model = await trio.to_thread.run_sync(chosen, name, served, self, Portal(self._token))
        self._nursery.start_soon(self._reach_out, model.served.nodes, model.wishes)
        return model

    async def _reach_out(self, nodes: Sequence[NodeAnnouncement], wishes: Wishes) -> None:
        """Connect to those that a session will probably go through: its first token then need not wait for that."""
        try:
            chain = choose_chain(nodes, wishes=wishes)
        except MissingBlocks:
            return
        async with trio.open_nursery() as nursery:
            for hop in chain:
                nursery.start_soon(self._try_to_connect, hop.node)

    async def _try_to_connect(self, node: NodeAnnouncement) -> None:
        try:
            with trio.move_on_after(REACH_S):
                await self.host.connect(node.peer_id, node.addresses)
        except errors.NetError as error:
            logger.info("not connected to %s yet: %s", node.peer_id, error)

    async def _probe(self, node: NodeAnnouncement, found: list[Peer]) -> None:
        round_trip_s: float | None = None
        problem = ""
        with trio.move_on_after(PROBE_S) as scope:
            try:
                await self.host.connect(node.peer_id, node.addresses)
                round_trip_s = await ping_once(self.host, node.peer_id, timeout_s=PROBE_S)
            except errors.NetError as error:
                problem = str(error)
        if scope.cancelled_caught:
            problem = f"no answer in {PROBE_S:g} s"
        found.append(Peer(announcement=node, round_trip_s=round_trip_s, problem=problem))


@asynccontextmanager
async def open_swarm(
    bootstrap: str | Sequence[str],
    *,
    timeout_s: float = 10.0,
    swarm_key: str | PathLike[str] | None = None,
    home: str | PathLike[str] | None = None,
    remember: bool = True,
) -> AsyncIterator[AsyncSwarm]:
    """See ``client.open_swarm``."""
    texts = _spelled(bootstrap)
    _check_timeout(timeout_s)
    peers = [addresses.parse_peer(text) for text in texts]
    key = None if swarm_key is None else SwarmKey.load(Path(swarm_key))
    folder = _home_folder(home)
    kept_at = folder / REPUTATION_FILE if _read_truth("remember", remember) else None
    reputation = await trio.to_thread.run_sync(Reputation, kept_at)  # reads it
    async with open_host(Identity.generate(), swarm_key=key) as host, open_service_nursery() as nursery:
        dht = Dht(host, server=False)
        with trio.move_on_after(timeout_s) as scope:
            await dht.join(peers)
        if scope.cancelled_caught:
            raise errors.DialError(f"no node of the swarm answered within {timeout_s:g} s at {', '.join(texts)}")
        await nursery.start(dht.run)
        await nursery.start(partial(run_presence, host, dht, bootstrap=peers, is_server=False))
        await nursery.start(reputation.run)
        yield AsyncSwarm(host, dht, nursery, reputation, home=folder)
        nursery.cancel_scope.cancel()


def _spelled(bootstrap: object) -> list[str]:
    """Raises:
    TypeError: neither an address nor several.
    AddressError: none at all.
    """
    texts = [bootstrap] if isinstance(bootstrap, str) else bootstrap
    if isinstance(texts, bytes | Mapping) or not isinstance(texts, Iterable):
        raise TypeError(f"bootstrap is an address or a list of addresses, each a str, not {type(bootstrap).__name__}")
    found = []
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"bootstrap is a list of addresses, each a str, but one is {type(text).__name__}")
        found.append(text)
    if not found:
        raise errors.AddressError("no address to start from")
    return found


def _home_folder(home: object) -> Path:
    """Raises:
    TypeError: no path.
    """
    if not isinstance(home, str | PathLike | None):
        raise TypeError(f"home is the path of a folder, not {type(home).__name__}")
    return console.data_folder() if home is None else Path(home)


def _read_truth(name: str, value: object) -> bool:
    """Raises:
    TypeError: no truth value.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {type(value).__name__}")
    return value


def _check_timeout(timeout_s: object) -> None:
    """Raises:
    TypeError: no number.
    InvalidInput: not above 0.
    """
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
        raise TypeError(f"timeout_s is a number of seconds, not {type(timeout_s).__name__}")
    if not timeout_s > 0:
        raise InvalidInput(f"timeout_s is {timeout_s}: give a number of seconds above 0")


def _check_tuning(tuning: SpanTuning, n_blocks: int, own_blocks: int) -> None:
    """Raises:
    InvalidInput: it lacks blocks that nodes compute, or holds NaN or infinity.
    """
    from compute.errors import BadInput
    from compute.tuning import check_finite

    if not tuning.start <= own_blocks < n_blocks - own_blocks <= tuning.end:
        raise InvalidInput(
            f"a tuning of blocks {tuning.start} to {tuning.end}: give one of blocks {own_blocks} to "
            f"{n_blocks - own_blocks}, which nodes compute"
        )
    try:
        check_finite(tuning)
    except BadInput as error:
        raise InvalidInput(str(error)) from error
