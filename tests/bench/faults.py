"""Generations in a storm: nodes and relays are killed, stopped, slowed down, cut off and restarted, one after another.

Six node processes serve bloom-tiny in fp32, every block on three of them, with spans that overlap; two relays are the
swarm's bootstrap nodes. Clients, processes of their own, generate greedily without a pause, from prompts of many
lengths to contexts of up to 512 tokens. Every token is compared with what transformers makes of the prompt on one
machine. All connections go through proxies (``links.py``), so that a node can be cut off in silence, both ways.

A fault is done to a good node alone, and only while every block has another good one (``storm.py``, which also says how
long each lasts): kill (SIGKILL, then restarted), leave (SIGTERM, then restarted), stop (SIGSTOP for 1 to 6 s), slow
(stopped for nine tenths of the time, for 3 to 8 s), cut (silence for 2 to 8 s). Its effect lasts until the node is
healed, or restarted and announced. A pause is a gap of more than 0.25 s between two tokens of a generation (or from its
beginning to the first token, or from the last one to its error or to a hang) that overlaps the effect of a fault.

faults; tokens; wrong-tokens: other than one machine's, or missing from a generation that ended well; hangs: no token
and no error for more than 30 s; pause-p99 and pause-max over all pauses; errors: generations that ended with an error
of ours, untyped-errors: with any other, or with the client's death; died: nodes that ended by themselves.
--seed gives the same faults again, as far as restarts take as long.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from net.nurseries import open_service_nursery
from tests.bench import report
from tests.bench.children import Child, ChildFailed, Family, family
from tests.bench.links import Links, Place
from tests.bench.prompts import MODEL, Alone, noise
from tests.bench.storm import Fault, Gap, Member, Storm, pauses, percentile, unequal

BLOCKS = 8
SPANS = ((0, 3), (0, 3), (3, 8), (3, 8), (0, 4), (4, 8))
RELAYS = 2
CONTEXT_TOKENS = 512
PLANS = 10
PROMPT_TOKENS = (1, 7, 16, 60, 130, 200, 300, 400, 448)
HANG_S = 30.0
SLOW_PERIOD_S, SLOW_SHARE = 0.1, 0.9
LEAVE_S = 10.0
STARTS = 3  # tries, for a node that does not come up in the midst of it
STATUS_S = 10.0
LOOK_S = 0.5
WORST = 5
FAULTS_PER_MINUTE = 20  # at least, or it is no storm


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A prompt, and what one machine makes of it."""

    ids: list[int]
    expected: list[int]


@dataclass(kw_only=True)
class Seen:
    """What clients met."""

    gaps: list[Gap] = field(default_factory=list)
    tokens: int = 0
    generations: int = 0
    wrong: int = 0
    hangs: int = 0
    died: int = 0
    typed: Counter[str] = field(default_factory=Counter)
    untyped: Counter[str] = field(default_factory=Counter)


def make_plans(seed: int) -> list[Plan]:
    """Prompts of random tokens: half of them to the full context, the others shorter."""
    alone = Alone()
    source = random.Random(f"plans {seed}")
    plans = []
    for number in range(PLANS):
        length = source.choice(PROMPT_TOKENS)
        new = CONTEXT_TOKENS - length if number % 2 else source.randint(16, min(160, CONTEXT_TOKENS - length))
        ids = noise(source, length)
        plans.append(Plan(ids=ids, expected=alone.generate(ids, new)))
    return plans


class Weather:
    """The storm's driver: members as processes, and what is done to them."""

    def __init__(self, children: Family, links: Links, storm: Storm, seen: Seen) -> None:
        self._children = children
        self._links = links
        self._storm = storm
        self._seen = seen
        self._places: dict[str, Place] = {}
        self._running: dict[str, Child] = {}
        self._healed = trio.Event()
        self.bootstrap: list[str] = []

    async def begin(self) -> None:
        """Bring all members up."""
        for member in self._storm.members:
            self._places[member.name] = await self._links.place(member.name)
        for member in self._storm.members:
            self._running[member.name] = self._start(member)
            if member.span is None:
                await self._children.started(self._running[member.name])
                self.bootstrap.append(str(self._running[member.name].ready["address"]))
        for member in self._storm.members:
            if member.span is not None:
                await self._children.started(self._running[member.name])

    def _start(self, member: Member) -> Child:
        place = self._places[member.name]
        others = [address for address in self.bootstrap if f"/tcp/{place.front}/" not in address]
        if member.span is None:
            return self._children.relay(member.name, bootstrap=others, place=place)
        span = f"{member.span[0]}:{member.span[1]}"
        return self._children.node(member.name, span, bootstrap=self.bootstrap, model=MODEL, place=place)

    async def _restart(self, member: Member) -> None:
        """Raises:
        ChildFailed: it does not come up.
        """
        await self._children.end(self._running[member.name])
        for tries_left in reversed(range(STARTS)):
            child = self._running[member.name] = self._start(member)
            try:
                await self._children.started(child)
                return
            except ChildFailed as error:
                report.progress(f"faults: {error}")
                await self._children.end(child)
                if not tries_left:
                    raise

    async def blow(self, *, per_minute: float, minutes: float, say: Callable[[str], None]) -> None:
        """Fault after fault until the time is over and all members are good again."""
        began = trio.current_time()
        async with open_service_nursery() as nursery:
            count = 0
            while (due := began + 60 * (count + self._storm.random.random()) / per_minute) < began + 60 * minutes:
                await trio.sleep_until(due)
                fault = self._storm.strike(time.monotonic())
                while fault is None:
                    self._healed = trio.Event()
                    await self._healed.wait()
                    fault = self._storm.strike(time.monotonic())
                count += 1
                say(f"{fault.kind} {fault.member} ({fault.lasts_s:.1f} s)")
                nursery.start_soon(self._suffer, fault)
            await trio.sleep_until(began + 60 * minutes)

    async def _suffer(self, fault: Fault) -> None:
        member = next(each for each in self._storm.members if each.name == fault.member)
        await FAULTS[fault.kind](self, member, fault.lasts_s)
        self._heal(fault)

    def _heal(self, fault: Fault) -> None:
        self._storm.heal(fault, time.monotonic())
        self._healed.set()

    async def _kill(self, member: Member, lasts_s: float) -> None:
        self._running[member.name].kill()
        await trio.sleep(lasts_s)
        await self._restart(member)

    async def _leave(self, member: Member, lasts_s: float) -> None:
        self._running[member.name].send(signal.SIGTERM)
        with trio.move_on_after(LEAVE_S):
            await self._running[member.name].ended()
        await trio.sleep(lasts_s)
        await self._restart(member)

    async def _stop(self, member: Member, lasts_s: float) -> None:
        self._running[member.name].send(signal.SIGSTOP)
        await trio.sleep(lasts_s)
        self._running[member.name].send(signal.SIGCONT)

    async def _slow(self, member: Member, lasts_s: float) -> None:
        child = self._running[member.name]
        until = trio.current_time() + lasts_s
        while trio.current_time() < until:
            child.send(signal.SIGSTOP)
            await trio.sleep(SLOW_PERIOD_S * SLOW_SHARE)
            child.send(signal.SIGCONT)
            await trio.sleep(SLOW_PERIOD_S * (1 - SLOW_SHARE))

    async def _cut(self, member: Member, lasts_s: float) -> None:
        self._places[member.name].cut()
        await trio.sleep(lasts_s)
        self._places[member.name].mend()

    async def watch(self) -> None:
        """Start members again that ended by themselves, and count them."""
        while True:
            await trio.sleep(LOOK_S)
            for member in self._storm.members:
                child = self._running[member.name]
                if member.is_good and child.has_ended:
                    self._seen.died += 1
                    report.progress(f"faults: {member.name} ended by itself: {child.last_words()}")
                    member.is_good = False
                    await self._restart(member)
                    member.is_good = True


FAULTS: dict[str, Callable[[Weather, Member, float], Awaitable[None]]] = {
    "kill": Weather._kill,
    "leave": Weather._leave,
    "stop": Weather._stop,
    "slow": Weather._slow,
    "cut": Weather._cut,
}


class Caller:
    """A client that generates without a pause, and is replaced when it hangs."""

    def __init__(self, name: str, children: Family, links: Links, weather: Weather, seen: Seen) -> None:
        self._name = name
        self._children = children
        self._links = links
        self._weather = weather
        self._seen = seen
        self._place: Place | None = None
        self._child: Child | None = None
        self._is_connected = False
        self._heard = trio.Event()
        self._waits: tuple[float, int] | None = None  # in a generation: since when, after how many tokens

    async def begin(self) -> None:
        self._place = self._place or await self._links.place(self._name, is_dialled=False)
        self._child = await self._children.started(self._children.client(self._name, place=self._place))
        self._is_connected = False

    async def run(self, plans: Sequence[Plan], source: random.Random) -> None:
        """Until cancelled."""
        while True:
            if self._child is None:
                await self.begin()
            try:
                with trio.fail_after(HANG_S) as patience:
                    if not self._is_connected:
                        await self._connect()
                    else:
                        await self._generate(source.choice(plans), patience)
            except trio.TooSlowError:
                self._seen.hangs += 1
                if self._waits is not None:
                    since, after = self._waits
                    self._seen.gaps.append(Gap(began_s=since, ended_s=time.monotonic(), after=after))
                report.progress(f"faults: {self._name} HANGS: nothing for {HANG_S:g} s")
                await self._end()
            except ChildFailed as error:
                self._seen.untyped["ended"] += 1
                report.progress(f"faults: {error}")
                await self._end()

    async def heard(self) -> None:
        """Wait until a gap that lasts is over: for the next token, error or hang."""
        await self._heard.wait()

    def _hear(self) -> None:
        self._heard.set()
        self._heard = trio.Event()

    async def _end(self) -> None:
        self._hear()
        self._waits = None
        child, self._child = self._child, None
        if child is not None:
            await self._children.end(child)

    async def _connect(self) -> None:
        if self._child is None:
            raise ChildFailed(f"{self._name} is not there")
        answer = await self._child.ask(do="connect", bootstrap=self._weather.bootstrap, model=MODEL)
        self._is_connected = "error" not in answer
        if not self._is_connected:
            self._note(answer["error"], "connecting")
            await trio.sleep(LOOK_S)

    async def _generate(self, plan: Plan, patience: trio.CancelScope) -> None:
        if self._child is None:
            raise ChildFailed(f"{self._name} is not there")
        await self._child.tell(do="generate", ids=plan.ids, new=len(plan.expected), options={}, stream=True)
        found: list[int] = []
        last = (await self._child.line())["began"]
        while True:
            self._waits = last, len(found)
            line = await self._child.line()
            patience.deadline = trio.current_time() + HANG_S
            self._hear()
            if "id" not in line:
                break
            self._seen.tokens += 1
            self._seen.gaps.append(Gap(began_s=last, ended_s=line["at"], after=len(found)))
            last = line["at"]
            found.append(line["id"])
        self._waits = None
        self._seen.generations += 1
        wrong = unequal(plan.expected, found, is_whole="error" not in line)
        if wrong:
            report.progress(f"faults: {self._name}: {wrong} WRONG of {len(found)} tokens (prompt {len(plan.ids)})")
        self._seen.wrong += wrong
        if "error" in line:
            self._seen.gaps.append(Gap(began_s=last, ended_s=line["ended"], after=len(found)))
            self._note(line["error"], f"after {len(found)} tokens")

    def _note(self, error: dict[str, Any], when: str) -> None:
        (self._seen.typed if error["typed"] else self._seen.untyped)[error["type"]] += 1
        report.progress(f"faults: {self._name}, {when}: {error['type']}: {error['text']}")


async def measure(options: argparse.Namespace) -> list[report.Figure]:
    report.progress("faults: one machine's tokens")
    plans = await trio.to_thread.run_sync(make_plans, options.seed)
    members = [Member(name=f"relay-{number}", span=None) for number in range(RELAYS)]
    members += [Member(name=f"node-{number}", span=span) for number, span in enumerate(SPANS)]
    storm, seen = Storm(members=members, blocks=BLOCKS, random=random.Random(options.seed)), Seen()
    async with family() as children, open_service_nursery() as nursery:
        links = Links(nursery)
        weather = Weather(children, links, storm, seen)
        report.progress(f"faults: starting {RELAYS} relays, {len(SPANS)} nodes and {options.clients} clients")
        await weather.begin()
        callers = [Caller(f"client-{n}", children, links, weather, seen) for n in range(options.clients)]
        for caller in callers:
            await caller.begin()
        began = time.monotonic()

        def say(text: str) -> None:
            if options.verbose:
                report.progress(f"{time.monotonic() - began:6.1f} s  {text}")

        nursery.start_soon(weather.watch)
        nursery.start_soon(_tell, storm, seen, began)
        for number, caller in enumerate(callers):
            nursery.start_soon(caller.run, plans, random.Random(f"caller {options.seed} {number}"))
        await weather.blow(per_minute=options.per_minute, minutes=options.minutes, say=say)
        async with open_service_nursery() as last:  # what is a gap when the storm ends counts in full
            for caller in callers:
                last.start_soon(caller.heard)
        nursery.cancel_scope.cancel()
    _tell_worst(storm, seen, began)
    return figures(storm, seen, options.minutes)


async def _tell(storm: Storm, seen: Seen, began: float) -> None:
    before = 0
    while True:
        await trio.sleep(STATUS_S)
        found = [gap.seconds for gap in pauses(seen.gaps, storm.faults)]
        report.progress(
            f"{time.monotonic() - began:6.0f} s: {len(storm.faults)} faults, {seen.tokens} tokens "
            f"({(seen.tokens - before) / STATUS_S:.0f}/s), wrong {seen.wrong}, hangs {seen.hangs}, errors "
            f"{seen.typed.total()}, others {seen.untyped.total()}, pauses {len(found)}: p99 "
            f"{percentile(found, 99):.1f} s, worst {max(found, default=0.0):.1f} s; not good: "
            f"{', '.join(member.name for member in storm.members if not member.is_good) or 'none'}"
        )
        before = seen.tokens


def _tell_worst(storm: Storm, seen: Seen, began: float) -> None:
    """The longest pauses, and during which faults they came."""
    for gap in sorted(pauses(seen.gaps, storm.faults), key=lambda gap: -gap.seconds)[:WORST]:
        during = [
            f"{fault.kind} {fault.member} ({fault.began_s - gap.began_s:+.1f} s)"
            for fault in storm.faults
            if fault.overlaps(gap)
        ]
        report.progress(
            f"faults: a pause of {gap.seconds:.1f} s at {gap.began_s - began:.1f} s, after {gap.after} tokens, "
            f"during {', '.join(during)}"
        )


def figures(storm: Storm, seen: Seen, minutes: float) -> list[report.Figure]:
    found = [gap.seconds for gap in pauses(seen.gaps, storm.faults)]

    def count(name: str, value: float, unit: str, *, better: str = "lower", goal: float | None = None) -> report.Figure:
        return report.figure(name, [float(value)], unit, better=better, goal=goal)

    return [
        count("faults", len(storm.faults), "faults", better="higher", goal=FAULTS_PER_MINUTE * minutes),
        count("tokens", seen.tokens, "tokens", better="higher"),
        count("generations", seen.generations, "generations", better="higher"),
        count("wrong-tokens", seen.wrong, "tokens", goal=0),
        count("hangs", seen.hangs, "hangs", goal=0),
        count("pauses", len(found), "pauses"),
        count("pause-median", percentile(found, 50), "s"),
        count("pause-p99", percentile(found, 99), "s", goal=5),
        count("pause-max", max(found, default=0.0), "s"),
        count("errors", seen.typed.total(), "errors"),
        count("untyped-errors", seen.untyped.total(), "errors", goal=0),
        count("died", seen.died, "nodes", goal=0),
    ]


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the storm lasts (default: 10)")
    parser.add_argument("--per-minute", type=float, default=24.0, help="faults (default: 24)")
    parser.add_argument("--clients", type=int, default=2, help="default: 2")
    parser.add_argument("--seed", type=int, default=0, help="of faults and prompts (default: 0)")
    parser.add_argument("--verbose", "-v", action="store_true", help="tell every fault on standard error")
    options = parser.parse_args()
    try:
        found = trio.run(partial(measure, options))
    except ChildFailed as error:
        sys.exit(f"faults: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    report.show("faults", found, as_json=options.json)


if __name__ == "__main__":
    main()
