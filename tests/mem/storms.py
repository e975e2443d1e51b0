"""The fault storm of ``tests/bench/faults.py`` under virtual time: nodes without a model, faults from a seed or a list.

Six nodes serve eight blocks, every block on three of them. One client generates without a pause, one session after
another. Members are killed, told to leave, stopped, slowed down and cut off; what a look-up of announcements takes,
and what a node takes to start again, are the settings'. All hidden states are ones, so that only time is looked at.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import torch
import trio

from client.directory import Directory
from client.lifesigns import LifeSigns
from client.nearness import Nearness
from client.session import Session
from net.addresses import parse
from net.dht.service import DhtSettings
from net.host import Host, open_host
from net.nurseries import open_service_nursery
from net.protocol import session as wire
from net.protocol.announcement import NodeAnnouncement
from net.reputation import Reputation
from net.rpc.framing import Message
from net.transports.memory import MemoryNetwork
from tests.bench.storm import Fault, Gap, Member, Storm
from tests.mem.fake_nodes import FakeNode
from tests.mem.lines import LineTransport
from tests.net_helpers import seeded

BLOCKS = 8
SPANS = ((0, 3), (0, 3), (3, 8), (3, 8), (0, 4), (4, 8))
RELAYS = 2
CONTEXT_TOKENS = 512
PROMPT_TOKENS = (1, 7, 60, 200, 300, 448)
WIDTH = 4
STEP_S = 0.04
SECONDS_PER_TOKEN = 0.0005  # of a prompt, or of what is computed again
STARTS_S = 3.0  # a node, until it is announced again
LEAVES_S = 2.0  # a node that has been told to end
LOOK_UP_S = 0.1  # for announcements, while all are well
SLOW_PERIOD_S, SLOW_SHARE = 0.1, 0.9


@dataclass(frozen=True, kw_only=True)
class Blow:
    """What is done to whom, when, and for how long (a process that ends: until it is started again)."""

    at: float
    kind: str
    member: str
    lasts_s: float = 6.0


@dataclass(kw_only=True, eq=False)
class StormNode(FakeNode):
    """A node that takes longer for more tokens, and says what it announces as of eight blocks."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    is_announced: bool = True
    tokens_per_s: float = 10.0

    @property
    def offer(self) -> NodeAnnouncement:
        return replace(
            super().offer,
            blocks=BLOCKS,
            max_length=1000,
            cache_tokens_left=100_000,
            decode_tokens_per_s=self.tokens_per_s,
        )

    async def work(self, tokens: int) -> None:
        await trio.sleep(STEP_S + tokens * SECONDS_PER_TOKEN)


class StormWorld:
    """All members, and what happens to them."""

    def __init__(self, nursery: trio.Nursery, seed: int) -> None:
        self._nursery = nursery
        self._network = MemoryNetwork()
        self._healed = trio.Event()
        members = [Member(name=f"relay-{number}", span=None) for number in range(RELAYS)]
        members += [Member(name=f"node-{number}", span=span) for number, span in enumerate(SPANS)]
        self.storm = Storm(members=members, blocks=BLOCKS, random=random.Random(seed))
        self.nodes: dict[str, StormNode] = {}
        for number, span in enumerate(SPANS):
            self.nodes[f"node-{number}"] = StormNode(identity=seeded(number + 1), span=span, port=number + 1)

    async def begin(self) -> None:
        for node in self.nodes.values():
            await self._nursery.start(self._run, node)

    async def _run(self, node: StormNode, *, task_status: trio.TaskStatus[None]) -> None:
        with node.scope:
            async with AsyncExitStack() as stack:
                transport = LineTransport(self._network, node.line)
                where = [parse(f"/memory/{node.port}")]
                host = await stack.enter_async_context(open_host(node.identity, listen=where, transports=[transport]))
                host.handle(wire.PROTOCOL_ID, node.serve)
                task_status.started()
                await trio.sleep_forever()

    def prefer(self, names: Sequence[str]) -> None:
        """Have these nodes chosen before all others, the first ones above all."""
        for rank, name in enumerate(reversed(list(dict.fromkeys(names)))):
            self.nodes[name].tokens_per_s = 12.0 + 2.0 * rank

    def client_transport(self) -> LineTransport:
        return LineTransport(self._network)

    async def look_up(self) -> list[NodeAnnouncement]:
        """What is announced; those who hold the announcements are asked, and those that are silent are waited for."""
        bad = sum(not member.is_good for member in self.storm.members)
        await trio.sleep(LOOK_UP_S if not bad else LOOK_UP_S + DhtSettings().slow_s / 2)
        return [node.offer for node in self.nodes.values() if node.is_announced]

    async def suffer(self, fault: Fault) -> None:
        """All of a fault, until its member is good again."""
        if fault.member not in self.nodes:
            await trio.sleep(fault.lasts_s)
        else:
            await getattr(self, f"_{fault.kind}")(self.nodes[fault.member], fault.lasts_s)
        self.storm.heal(fault, trio.current_time())
        self._healed.set()

    async def _kill(self, node: StormNode, lasts_s: float) -> None:
        node.scope.cancel()
        await trio.sleep(lasts_s)
        await self._restart(node)

    async def _restart(self, node: StormNode) -> None:
        await trio.sleep(STARTS_S)
        node.scope = trio.CancelScope()
        node.held.clear()
        await self._nursery.start(self._run, node)
        node.is_announced = True

    async def _leave(self, node: StormNode, lasts_s: float) -> None:
        node.is_announced = False
        await node.tell(Message(header={"leaving": LEAVES_S}))
        await trio.sleep(LEAVES_S)
        await self._kill(node, lasts_s)

    async def _stop(self, node: StormNode, lasts_s: float) -> None:
        node.line.stall()
        await trio.sleep(lasts_s)
        node.line.resume()

    _cut = _stop

    async def _slow(self, node: StormNode, lasts_s: float) -> None:
        until = trio.current_time() + lasts_s
        while trio.current_time() < until:
            await self._stop(node, SLOW_PERIOD_S * SLOW_SHARE)
            await trio.sleep(SLOW_PERIOD_S * (1 - SLOW_SHARE))

    async def blow(self, *, per_minute: float, minutes: float) -> None:
        """Faults from the seed."""
        began, count = trio.current_time(), 0
        while (due := began + 60 * (count + self.storm.random.random()) / per_minute) < began + 60 * minutes:
            await trio.sleep_until(due)
            while (fault := self.storm.strike(trio.current_time())) is None:
                self._healed = trio.Event()
                await self._healed.wait()
            count += 1
            self._nursery.start_soon(self.suffer, fault)
        await trio.sleep_until(began + 60 * minutes)

    async def follow(self, blows: Sequence[Blow], began: float) -> None:
        """These faults."""
        for blow in sorted(blows, key=lambda blow: blow.at):
            await trio.sleep_until(began + blow.at)
            now = trio.current_time()
            fault = Fault(kind=blow.kind, member=blow.member, lasts_s=blow.lasts_s, began_s=now)
            self.storm.faults.append(fault)
            next(each for each in self.storm.members if each.name == blow.member).is_good = False
            self._nursery.start_soon(self.suffer, fault)


class Caller:
    """Who generates without a pause.

    Attributes:
        gaps: between tokens, or from a generation's beginning to its first token.
        errors: of generations that ended so.
    """

    def __init__(self, host: Host, world: StormWorld, nursery: trio.Nursery, seed: int) -> None:
        self._host = host
        self._nursery = nursery
        self._random = random.Random(seed)
        self._directory = Directory(world.look_up, nursery)
        self._reputation = Reputation(None, trio.current_time)
        self._nearness = Nearness(host, nursery)
        self._life_signs = LifeSigns(host)
        self.gaps: list[Gap] = []
        self.errors: list[Exception] = []
        self.session: Session | None = None

    async def generate(self, prompt: int, tokens: int) -> None:
        """One generation; its gaps are noted."""
        session = self.session = Session(
            self._host,
            self._directory.nodes,
            self._nursery,
            self._reputation,
            nearness=self._nearness,
            life_signs=self._life_signs,
        )
        began, count = trio.current_time(), prompt
        try:
            for after in range(tokens):
                hidden = torch.ones(1, count, WIDTH)
                assert torch.equal(await session.step(hidden, keep=1), hidden[:, :1])
                now, count = trio.current_time(), 1
                self.gaps.append(Gap(began_s=began, ended_s=now, after=after))
                began = now
        finally:
            await session.aclose()

    async def run(self) -> None:
        """One after another until cancelled."""
        while True:
            prompt = self._random.choice(PROMPT_TOKENS)
            tokens = self._random.choice([self._random.randint(16, 64), CONTEXT_TOKENS - prompt])
            began = trio.current_time()
            try:
                await self.generate(prompt, tokens)
            except Exception as error:
                self.errors.append(error)
                self.gaps.append(Gap(began_s=began, ended_s=trio.current_time(), after=0))
                await trio.sleep(0.5)


@asynccontextmanager
async def storm_of(seed: int) -> AsyncIterator[tuple[StormWorld, Caller]]:
    """Everybody well, and a client who has yet to generate."""
    async with open_service_nursery() as nursery:
        world = StormWorld(nursery, seed)
        await world.begin()
        async with open_host(seeded(90), transports=[world.client_transport()]) as host:
            yield world, Caller(host, world, nursery, seed)
            nursery.cancel_scope.cancel()
