"""A swarm of hundreds of DHT servers in one process, on a virtual clock and seeded randomness: every run replays.

The DHT's service, table, look-ups, store, records and lanes are the real ones. Below them, where a host has
connections, security and a muxer, ``SimulatedHost`` has streams that hand bytes over after a latency; signatures
are real, and each is checked once per process. Wall clocks read the virtual one.

What happens: servers come up, each announces itself; from then on, every minute a share of them leaves (half say
so, half fall silent) and as many join. A share is hostile: it hands out forged, foreign, older and garbled records
and contacts that do not exist, or says nothing. A client that stays and one that has just come look everybody up,
every ``probe_s``.
"""

from __future__ import annotations

import functools
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import trio
from libp2p.peer.envelope import unmarshal_envelope
from trio.testing import MockClock

from net import errors, records
from net.addresses import Multiaddr, PeerAddress
from net.dht import keys, service, wire
from net.dht.service import Dht
from net.dht.table import Contact, K
from net.host import Host
from net.identity import Identity, PeerId
from net.mux.driver import YamuxStream
from net.records import Record
from net.rpc import lane
from net.rpc.framing import Message
from net.swarm import Connection

KEY = keys.of_name("raceme/nodes/1")
KIND = "node"
EPOCH_S = 1_800_000_000  # what wall clocks read at the beginning
DIAL_S = 5.0
PUBLISH_S = 20.0  # from signing an announcement until all who shall have it do
BOOTSTRAP = 3  # honest servers that never leave


@dataclass(frozen=True, kw_only=True)
class Scenario:
    nodes: int = 300
    minutes: float = 4.0
    churn: float = 0.1  # of the nodes, per minute, leaving, and as many joining
    hostile: float = 0.2  # of the nodes
    settle_s: float = 60.0  # before anybody leaves and anybody looks
    probe_s: float = 15.0


# Streams


class SimulatedStream(trio.abc.Stream):
    """One end. Bytes arrive after the latency, in order; nothing arrives at or from a host that is dead."""

    def __init__(self, host: SimulatedHost, latency_s: float) -> None:
        self._host = host
        self._latency_s = latency_s
        self._incoming: deque[tuple[float, bytes]] = deque()
        self._ended = self._reset = self._closed = False
        self._lot = trio.lowlevel.ParkingLot()
        self.other: SimulatedStream = self

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._closed:
            raise trio.ClosedResourceError
        if self._reset:
            raise errors.StreamReset("reset by the other side")
        if not self._host.silent:
            self.other._incoming.append((trio.current_time() + self._latency_s, bytes(data)))
            self.other._lot.unpark_all()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        while True:
            if self._closed:
                raise trio.ClosedResourceError
            if self._reset:
                raise errors.StreamReset("reset by the other side")
            if self._incoming:
                due, data = self._incoming[0]
                if due > trio.current_time():
                    await trio.sleep_until(due)
                    continue
                self._incoming.popleft()
                return data
            if self._ended:
                return b""
            await self._lot.park()

    def reset(self) -> None:
        self._closed = True
        self._lot.unpark_all()
        if not self._host.silent:
            self.other._reset = True
            self.other._lot.unpark_all()

    async def aclose(self) -> None:
        self._closed = True
        self._lot.unpark_all()
        if not self._host.silent:
            self.other._ended = True
            self.other._lot.unpark_all()
        await trio.lowlevel.checkpoint()


# Hosts


class SimulatedNetwork:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.hosts: dict[bytes, SimulatedHost] = {}  # by address
        self._count = 0

    def new_address(self) -> Multiaddr:
        self._count += 1
        return Multiaddr(f"/ip4/51.{self._count >> 16}.{self._count >> 8 & 255}.{self._count & 255}/tcp/4001")


class SimulatedHost:
    """As much of ``Host`` as the DHT uses."""

    def __init__(self, network: SimulatedNetwork, identity: Identity, nursery: trio.Nursery) -> None:
        self.identity = identity
        self.peer_id = identity.peer_id
        self.address = network.new_address()
        self.addresses = [self.address]
        self.nursery = nursery
        self.silent = False
        self._network = network
        self._handlers: dict[str, Callable[[Any, Any], Any]] = {}
        self._connected: dict[PeerId, tuple[SimulatedHost, float]] = {}
        self._streams: set[SimulatedStream] = set()
        network.hosts[self.address.to_bytes()] = self

    @property
    def peer_addresses(self) -> list[PeerAddress]:
        return [PeerAddress(address=self.address, peer_id=self.peer_id)]

    def handle(self, protocol_id: str, handler: Callable[[Any, Any], Any]) -> None:
        self._handlers[protocol_id] = handler

    async def connect(self, peer_id: PeerId, known: Iterable[Multiaddr] = ()) -> tuple[SimulatedHost, float]:
        if peer_id in self._connected:
            return self._connected[peer_id]
        failure = errors.DialError("no address is known")
        for address in known:
            other = self._network.hosts.get(address.to_bytes())
            latency_s = self._network.rng.uniform(0.01, 0.1)
            if other is None or other.silent or self.silent:
                await trio.sleep(DIAL_S)
                failure = errors.DialError(f"{address}: no answer")
                continue
            await trio.sleep(4 * latency_s)
            if other.peer_id != peer_id:
                failure = errors.PeerIdMismatch(peer_id, other.peer_id)
                continue
            self._connected[peer_id] = (other, latency_s)
            other._connected[self.peer_id] = (self, latency_s)
            return other, latency_s
        raise failure

    async def open_stream(
        self, peer_id: PeerId, protocols: Sequence[str], known: Iterable[Multiaddr] = ()
    ) -> SimulatedStream:
        other, latency_s = await self.connect(peer_id, known)
        await trio.sleep(2 * latency_s)
        handler = other._handlers.get(protocols[0])
        if other.silent or self.silent:
            await trio.sleep_forever()
        if self.peer_id not in other._connected:
            raise errors.ConnectionLost("the connection ended")
        if handler is None:
            raise errors.ProtocolNotSupported(protocols[0])
        mine, theirs = SimulatedStream(self, latency_s), SimulatedStream(other, latency_s)
        mine.other, theirs.other = theirs, mine
        self._streams.add(mine)
        other._streams.add(theirs)
        other.nursery.start_soon(other._serve, handler, self, theirs)
        return mine

    async def _serve(self, handler: Callable[[Any, Any], Any], caller: SimulatedHost, stream: SimulatedStream) -> None:
        try:
            await handler(SimpleNamespace(peer_id=caller.peer_id, remote=caller.address), stream)
            await stream.aclose()
        except (errors.NetError, trio.ClosedResourceError):
            stream.reset()
        finally:
            self._streams.discard(stream)

    def leave(self) -> None:
        """Close everything, as a process that ends does."""
        del self._network.hosts[self.address.to_bytes()]
        for other, _ in self._connected.values():
            other._connected.pop(self.peer_id, None)
        for stream in self._streams:
            stream.reset()
        self.silent = True

    def die(self) -> None:
        """Fall silent, as a machine does that loses power."""
        self.silent = True


# Those who lie


class HostileDht(Dht):
    """Joins and takes records as others do; what it answers is made up. All hostile ones work together."""

    swarm: SimulatedSwarm

    async def _serve(self, connection: Connection, stream: YamuxStream) -> None:
        world = self.swarm

        async def find(message: Message) -> Message:
            self._note_caller(connection, message)
            key = wire.read_key(message.header)
            held = world.lies(self.host.identity, key) if message.header.get("records") else []
            return Message(header={"peers": world.bogus_contacts(key), "records": held})

        async def store(message: Message) -> Message:
            self._note_caller(connection, message)
            world.stash(message.header["record"])
            return Message(header={})

        await lane.serve(stream, connection.peer_id, {"find": find, "store": store}, idle_s=120.0)


# The swarm


@dataclass(kw_only=True, eq=False)
class Node:
    host: SimulatedHost
    dht: Dht
    scope: trio.CancelScope
    hostile: bool
    leaving: bool = False
    left_at: float | None = None
    signed: list[Record] = field(default_factory=list)
    announced_at: float | None = None


@dataclass(kw_only=True)
class Outcome:
    """What the probes saw."""

    seed: int
    expected: int = 0
    found: int = 0
    dead_gone_s: float = 0.0
    withdrawn_gone_s: float = 0.0
    forged: int = 0
    older: int = 0
    finds: int = 0
    find_s: list[float] = field(default_factory=list)  # virtual
    wall_s: float = 0.0
    trace: int = 0  # the same for the same seed

    @property
    def found_share(self) -> float:
        return self.found / max(self.expected, 1)


class SimulatedSwarm:
    def __init__(self, seed: int, scenario: Scenario) -> None:
        self.scenario = scenario
        self.rng = random.Random(seed)
        self.network = SimulatedNetwork(self.rng)
        self.nodes: dict[PeerId, Node] = {}
        self.bootstrap: list[PeerAddress] = []
        self.outcome = Outcome(seed=seed)
        self._seed = seed
        self._numbers = iter(range(1 << 30))
        self._stashed: dict[PeerId, deque[bytes]] = {}
        self._bogus = [
            Contact(
                peer_id=PeerId(b"\x00\x24\x08\x01\x12\x20" + self.rng.randbytes(32)),
                addresses=(self.network.new_address(),),
            )
            for _ in range(500)
        ]
        self._nursery: trio.Nursery

    # Who is there

    def identity(self) -> Identity:
        return Identity.generate((self._seed << 64 | next(self._numbers)).to_bytes(32, "big"))

    async def add(self, *, hostile: bool) -> None:
        scope = trio.CancelScope()
        await self._nursery.start(self._live, scope, hostile)

    async def _live(self, scope: trio.CancelScope, hostile: bool, *, task_status: trio.TaskStatus[None]) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                host = SimulatedHost(self.network, self.identity(), nursery)
                dht = (HostileDht if hostile else Dht)(cast(Host, host), server=True)
                if isinstance(dht, HostileDht):
                    dht.swarm = self
                node = self.nodes[host.peer_id] = Node(host=host, dht=dht, scope=scope, hostile=hostile)
                if len(self.bootstrap) < BOOTSTRAP:
                    self.bootstrap += host.peer_addresses
                task_status.started()
                await dht.join(self.bootstrap)
                await nursery.start(dht.run)
                if not hostile:
                    await dht.announce(KEY, KIND, lambda: {"start": 0, "end": 1})
                    node.announced_at = trio.current_time()

    async def _depart(self, node: Node, *, clean: bool) -> None:
        node.leaving = True
        if clean:
            with trio.move_on_after(30):
                await node.dht.withdraw()
            node.host.leave()
        else:
            node.host.die()
        node.left_at = trio.current_time()
        node.scope.cancel()

    async def _churn(self) -> None:
        interval = 60 / (self.scenario.nodes * self.scenario.churn)
        stable = {peer.peer_id for peer in self.bootstrap}
        while True:
            await trio.sleep(self.rng.uniform(0.5, 1.5) * interval)
            leaving = self.rng.choice(
                [n for n in self.nodes.values() if not n.leaving and n.host.peer_id not in stable]
            )
            leaving.leaving = True
            self._nursery.start_soon(functools.partial(self._depart, leaving, clean=self.rng.random() < 0.5))
            await self.add(hostile=leaving.hostile)

    # What the hostile ones say

    def stash(self, envelope: bytes) -> None:
        record = records.verify(envelope)
        self._stashed.setdefault(record.peer_id, deque(maxlen=8)).append(envelope)

    def lies(self, liar: Identity, key: bytes) -> list[Any]:
        kind = self.rng.choice(["older", "older", "forged", "foreign", "garbage", "nothing"])
        match kind:
            case "older":
                subjects = self.rng.sample(list(self._stashed), min(60, len(self._stashed)))
                return [self.rng.choice(self._stashed[subject]) for subject in sorted(subjects, key=PeerId.to_bytes)]
            case "forged" if self._stashed:
                victim = self.rng.choice(list(self._stashed))
                own = records.sign(liar, KIND, {"start": 0, "end": 99}, key=key, ttl_s=120)
                other = bytearray(self._stashed[victim][-1])
                other[-1] ^= 1
                return [own.envelope.replace(own.peer_id.to_bytes(), victim.to_bytes()), bytes(other)]
            case "foreign":
                return [records.sign(liar, KIND, {"start": 0, "end": 99}, key=bytes(32), ttl_s=120).envelope]
            case "garbage":
                return [b"", self.rng.randbytes(100), 5] if self.rng.random() < 0.5 else [b"\x0a\x24" + bytes(40)]
            case _:
                return []

    def bogus_contacts(self, key: bytes) -> list[Any]:
        """Names that nobody has, the nearest of many; with some of our own among them."""
        place = int.from_bytes(key, "big")
        near = sorted(self._bogus, key=lambda contact: contact.position ^ place)[: K - 4]
        friends = [n for n in self.nodes.values() if n.hostile and n.left_at is None]
        known = [
            Contact(peer_id=n.host.peer_id, addresses=(n.host.address,))
            for n in self.rng.sample(friends, min(4, len(friends)))
        ]
        return wire.write_contacts([*known, *near])

    # What the clients see

    async def _probe(self, dht: Dht) -> None:
        began = trio.current_time()
        live = {
            peer_id
            for peer_id, node in self.nodes.items()
            if node.announced_at is not None and node.left_at is None and not node.leaving
        }
        # The newest version of each that has had time to be put where it belongs.
        settled = {
            peer_id: max((r.sequence for r in self.nodes[peer_id].signed if r.sequence <= until), default=0)
            for peer_id in live
            for until in [1000 * (EPOCH_S + began - PUBLISH_S)]
        }
        found = await dht.find(KEY, KIND)
        now = trio.current_time()
        self.outcome.finds += 1
        self.outcome.find_s.append(now - began)
        expected = {peer_id for peer_id in live if not self.nodes[peer_id].leaving}
        seen = {record.peer_id for record in found}
        self.outcome.expected += len(expected)
        self.outcome.found += len(expected & seen)
        for record in found:
            node = self.nodes.get(record.peer_id)
            if node is None or record.envelope not in {each.envelope for each in node.signed}:
                self.outcome.forged += 1
                continue
            if node.left_at is not None:
                if node.signed[-1].body.get("withdrawn"):
                    self.outcome.withdrawn_gone_s = max(self.outcome.withdrawn_gone_s, began - node.left_at)
                self.outcome.dead_gone_s = max(self.outcome.dead_gone_s, began - node.left_at)
            elif record.sequence < settled.get(record.peer_id, 0):
                self.outcome.older += 1
        self.outcome.trace = hash((self.outcome.trace, round(now * 1e6), len(found), self.rng.getrandbits(32)))

    async def _new_client(self) -> None:
        async with trio.open_nursery() as nursery:
            host = SimulatedHost(self.network, self.identity(), nursery)
            dht = Dht(cast(Host, host), server=False)
            await dht.join(self.bootstrap)
            await self._probe(dht)
            host.leave()
            nursery.cancel_scope.cancel()

    async def _probes(self) -> None:
        async with trio.open_nursery() as nursery:
            host = SimulatedHost(self.network, self.identity(), nursery)
            dht = Dht(cast(Host, host), server=False)
            await dht.join(self.bootstrap)
            await nursery.start(dht.run)
            while True:
                nursery.start_soon(self._new_client)
                await self._probe(dht)
                await trio.sleep(self.scenario.probe_s)

    async def run(self) -> Outcome:
        scenario = self.scenario
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            n_hostile = round(scenario.nodes * scenario.hostile)
            kinds = [False] * (scenario.nodes - n_hostile - BOOTSTRAP) + [True] * n_hostile
            self.rng.shuffle(kinds)
            for hostile in [False] * BOOTSTRAP + kinds:
                await self.add(hostile=hostile)
                await trio.sleep(scenario.settle_s / 2 / scenario.nodes)
            await trio.sleep(scenario.settle_s / 2)
            nursery.start_soon(self._churn)
            nursery.start_soon(self._probes)
            await trio.sleep(60 * scenario.minutes)
            nursery.cancel_scope.cancel()
        self.outcome.wall_s = time.perf_counter() - began
        return self.outcome


# Running one


class _CheckedOnce:
    """An envelope whose signature was checked when it was first seen."""

    def __init__(self, data: bytes) -> None:
        envelope = unmarshal_envelope(data)
        self.payload_type, self.raw_payload = envelope.payload_type, envelope.raw_payload
        self.public_key = envelope.public_key
        self._failure: Exception | None = None
        try:
            envelope.validate(records.DOMAIN)
        except Exception as error:
            self._failure = error

    def validate(self, domain: str) -> None:
        if self._failure is not None:
            raise self._failure


@contextmanager
def _virtual(swarm: SimulatedSwarm) -> Iterator[None]:
    """Wall clocks, randomness and the scheduler, all under the seed."""
    clock = SimpleNamespace(time=lambda: EPOCH_S + trio.current_time())
    sign = records.sign

    def note(identity: Identity, kind: str, body: Mapping[str, Any], **more: Any) -> Record:
        record = sign(identity, kind, body, **more)
        node = swarm.nodes.get(identity.peer_id)
        if node is not None and not node.hostile:
            node.signed.append(record)
        return record

    with (
        mock.patch("net.records.time", clock),
        mock.patch("net.identity.time", clock),
        mock.patch("net.records.unmarshal_envelope", functools.lru_cache(maxsize=50_000)(_CheckedOnce)),
        mock.patch.object(records, "sign", note),
        mock.patch.object(service, "time", clock),
        mock.patch.object(service, "random", swarm.rng),
        mock.patch.object(service, "os", SimpleNamespace(urandom=swarm.rng.randbytes)),
        mock.patch("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True),
        mock.patch("trio._core._run._r", random.Random(swarm._seed)),
    ):
        yield


def simulate(seed: int, scenario: Scenario) -> Outcome:
    """Run one swarm from its seed."""
    swarm = SimulatedSwarm(seed, scenario)
    with _virtual(swarm):
        return trio.run(swarm.run, clock=MockClock(autojump_threshold=0))
