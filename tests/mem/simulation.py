"""A swarm of hundreds of DHT servers in one process, on a virtual clock and seeded randomness: every run replays.

The DHT's service, table, look-ups, store and records are the real ones, signatures too. ``SimulatedHost`` and
``SimulatedLane`` stand for what lies below and is tested elsewhere: connections, security, muxer and streams. Messages
are encoded and decoded as on the wire, and take their time. Wall clocks read the virtual one.

What happens: servers come up, each announces itself; from then on, every minute a share of them leaves (half say
so, half fall silent) and as many join. A share is hostile: it hands out forged, foreign, older and garbled records
and contacts that do not exist, or says nothing. A client that stays and one that has just come look everybody up,
every ``probe_s``.
"""

from __future__ import annotations

import functools
import heapq
import math
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
from trio.testing import MockClock

from net import errors, records
from net.addresses import Multiaddr, PeerAddress
from net.dht import keys, service, wire
from net.dht.service import Dht
from net.dht.table import Contact, K
from net.host import Host
from net.identity import Identity, PeerId
from net.mux.base import Stream
from net.records import Record
from net.rpc import lane
from net.rpc.framing import Decoder, Message, encode
from net.swarm import Connection

KEY = keys.of_name("raceme/nodes/1")
KIND = "node"
EPOCH_S = 1_800_000_000  # what wall clocks read at the beginning
DIAL_S = 5.0  # until a dial to nobody is given up
LATENCY_S = (0.01, 0.1)  # one way; of each pair, between these
TICK_S = 0.01
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


# The network


class SimulatedNetwork:
    """Who is where, and a clock for what is on its way.

    Whatever arrives within one tick arrives at once: that saves most turns of the event loop. Who goes first then is
    the scheduler's choice, under the seed.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.hosts: dict[bytes, SimulatedHost] = {}  # by address
        self._count = 0
        self._ticks: list[int] = []  # a heap
        self._waiting: dict[int, dict[trio.lowlevel.Task, None]] = {}  # by tick
        self._next = trio.CancelScope()

    def new_address(self) -> Multiaddr:
        self._count += 1
        return Multiaddr(f"/ip4/51.{self._count >> 16}.{self._count >> 8 & 255}.{self._count & 255}/tcp/4001")

    async def wait(self, seconds: float) -> None:
        """Sleep, to the end of a tick."""
        tick = math.ceil((trio.current_time() + seconds) / TICK_S)
        task = trio.lowlevel.current_task()
        if tick not in self._waiting:
            self._waiting[tick] = {}
            heapq.heappush(self._ticks, tick)
            self._next.deadline = self._ticks[0] * TICK_S
        self._waiting[tick][task] = None

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._waiting[tick][task]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def run(self) -> None:
        """Wake those who wait, when it is time."""
        while True:
            with self._next:
                await trio.sleep_forever()
            while self._ticks and self._ticks[0] * TICK_S <= trio.current_time():
                for task in self._waiting.pop(heapq.heappop(self._ticks)):
                    trio.lowlevel.reschedule(task)
            self._next = trio.CancelScope(deadline=self._ticks[0] * TICK_S if self._ticks else math.inf)


# Hosts


class SimulatedHost:
    """As much of ``Host`` as the DHT uses."""

    def __init__(self, network: SimulatedNetwork, identity: Identity) -> None:
        self.network = network
        self.identity = identity
        self.peer_id = identity.peer_id
        self.address = network.new_address()
        self.addresses = [self.address]
        self.silent = False
        self.left = False
        self._handlers: dict[str, Callable[[Any, Any], Any]] = {}
        self._connected: dict[PeerId, tuple[SimulatedHost, float]] = {}
        self.swarm = SimpleNamespace(connection=lambda peer_id: None)  # nothing of it can be checked
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
            other = self.network.hosts.get(address.to_bytes())
            latency_s = self.network.rng.uniform(*LATENCY_S)
            if other is None or other.silent or self.silent:
                await self.network.wait(DIAL_S)
                failure = errors.DialError(f"{address}: no answer")
                continue
            await self.network.wait(4 * latency_s)
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
        await self.network.wait(2 * latency_s)
        if other.silent or self.silent:
            await trio.sleep_forever()
        if self.peer_id not in other._connected:
            raise errors.ConnectionLost("the connection ended")
        handler = other._handlers.get(protocols[0])
        if handler is None:
            raise errors.ProtocolNotSupported(protocols[0])
        stream = SimulatedStream(self, other, latency_s)
        await handler(SimpleNamespace(peer_id=self.peer_id, remote=self.address, now_at=self.address), stream)
        return stream

    def leave(self) -> None:
        """Close everything, as a process that ends does."""
        del self.network.hosts[self.address.to_bytes()]
        for other, _ in self._connected.values():
            other._connected.pop(self.peer_id, None)
        self.silent = self.left = True

    def die(self) -> None:
        """Fall silent, as a machine does that loses power."""
        self.silent = True


@dataclass(eq=False)
class SimulatedStream:
    """What a lane goes over: who calls whom, and what the other side answers to."""

    caller: SimulatedHost
    callee: SimulatedHost
    latency_s: float
    methods: Mapping[str, lane.Method] = field(default_factory=dict)
    idle_s: float = math.inf

    def reset(self) -> None:
        """Nothing was sent that must be undone."""


async def _serve_lane(
    stream: SimulatedStream, peer_id: PeerId, methods: Mapping[str, lane.Method], *, idle_s: float
) -> None:
    """``lane.serve``, without a task: ``SimulatedLane`` asks the methods itself."""
    stream.methods, stream.idle_s = methods, idle_s


class SimulatedLane:
    """``Lane``: messages are encoded, take their time, and are decoded; there is no stream below."""

    def __init__(self, stream: SimulatedStream, peer_id: PeerId) -> None:
        self.peer_id = peer_id
        self.is_busy = False
        self._stream = stream
        self._free = trio.lowlevel.ParkingLot()
        self._used_at = trio.current_time()
        self._over = False

    async def call(self, method: str, fields: Mapping[str, Any], *, timeout_s: float) -> Message:
        while self.is_busy:
            await self._free.park()
        idle = trio.current_time() - self._used_at > self._stream.idle_s
        if self._over or idle or self._stream.callee.left:
            raise errors.PeerFailed(self.peer_id, "the lane is over")
        self.is_busy = self._over = True
        try:
            (answer,) = Decoder().receive_data(await self._exchange(method, fields, timeout_s))
        finally:
            self.is_busy = False
            self._free.unpark_all()
        self._over = False
        self._used_at = trio.current_time()
        if "e" in answer.header:
            raise lane.read_refusal(answer.header)
        return answer

    async def _exchange(self, method: str, fields: Mapping[str, Any], timeout_s: float) -> bytes:
        stream = self._stream
        question = b"".join(encode(Message(header={**fields, "m": method})))
        await stream.caller.network.wait(stream.latency_s)
        if stream.callee.left:
            raise errors.PeerFailed(self.peer_id, "the connection ended")
        if stream.callee.silent or stream.caller.silent:
            await trio.sleep(timeout_s)
            raise errors.PeerFailed(self.peer_id, f"no answer in {timeout_s:g} s")
        (request,) = Decoder().receive_data(question)
        answer = b"".join(await lane._answer(request, stream.caller.peer_id, stream.methods))
        await stream.caller.network.wait(stream.latency_s)
        return answer

    async def aclose(self) -> None:
        self._over = True


# Those who lie


class HostileDht(Dht):
    """Joins and takes records as others do; what it answers is made up. All hostile ones work together."""

    swarm: SimulatedSwarm

    async def _serve(self, connection: Connection, stream: Stream) -> None:
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
    older: int = 0  # versions when another had been out for longer than publishing may take
    outdated_s: float = 0.0  # how long the next version had been signed, at most, when one was found
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
        self._nearest_bogus: dict[bytes, list[Contact]] = {}  # to each key that was asked for
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
                host = SimulatedHost(self.network, self.identity())
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
        if key not in self._nearest_bogus:
            place = int.from_bytes(key, "big")
            self._nearest_bogus[key] = sorted(self._bogus, key=lambda contact: contact.position ^ place)[: K - 4]
        friends = [n for n in self.nodes.values() if n.hostile and n.left_at is None]
        known = [
            Contact(peer_id=n.host.peer_id, addresses=(n.host.address,))
            for n in self.rng.sample(friends, min(4, len(friends)))
        ]
        return wire.write_contacts([*known, *self._nearest_bogus[key]])

    # What the clients see

    async def _probe(self, dht: Dht) -> None:
        began = trio.current_time()
        live = {
            peer_id
            for peer_id, node in self.nodes.items()
            if node.announced_at is not None and node.left_at is None and not node.leaving
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
            newer = [each.sequence for each in node.signed if each.sequence > record.sequence]
            if node.left_at is None and newer:
                out_s = began - (min(newer) / 1000 - EPOCH_S)
                self.outcome.outdated_s = max(self.outcome.outdated_s, out_s)
                self.outcome.older += out_s >= PUBLISH_S
        self.outcome.trace = hash((self.outcome.trace, round(now * 1e6), len(found), self.rng.getrandbits(32)))

    async def _new_client(self) -> None:
        async with trio.open_nursery() as nursery:
            host = SimulatedHost(self.network, self.identity())
            dht = Dht(cast(Host, host), server=False)
            await dht.join(self.bootstrap)
            await self._probe(dht)
            host.leave()
            nursery.cancel_scope.cancel()

    async def _probes(self) -> None:
        async with trio.open_nursery() as nursery:
            host = SimulatedHost(self.network, self.identity())
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
            nursery.start_soon(self.network.run)
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
        mock.patch.object(records, "sign", note),
        mock.patch.object(lane, "serve", _serve_lane),
        mock.patch.object(service, "Lane", SimulatedLane),
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
