"""Generation with bloom-tiny in fp32 through node processes on this machine, by clients that are processes, too.

hops: one greedy stream through 1, 2 and 3 nodes, and through transformers' own model in this process. ms-per-hop is the
slope of the milliseconds per token over 0, 1, 2 and 3 nodes, ms-per-further-hop that over 1, 2 and 3; cpu-ms-per-hop
and cpu-ms-per-further-hop are the same for the processor time of client, nodes and relay together.

ready: in a new process, all imports done, ready-s is connect() and model(); first-token-ms the first token of the first
session, next-session-ms that of the second.

clients: eight clients at once through two nodes; clients-8-gain is their tokens per second over one's alone.

links: three nodes, and 5, 50 and 100 ms of round trip between any two processes (``links.py``). rtt-50-vs-bound is the
bound over what a token takes: the bound is (hops + 1) / 2 round trips, as measured through the proxies, and what a
token takes through proxies without delay. first-token-round-trips and next-session-round-trips are what a session's
first token takes beyond what it takes without delay, in round trips of 50 ms; both connect() in the delay.

draft: at 50 ms, generate(draft="auto") over generate(draft=None), with a prompt whose continuation repeats itself, and
with one where the simplest drafts are wrong as often as can be had.

prefill: a model of three blocks with hidden size 1,024, a node for each, lines of 20 Mbit/s, a prompt of 1,024 tokens.
prefill-20mbit-gain is the time of four transfers of its hidden states in fp32 one after another, and of computing them
(the first token's as measured without a rate), over the time to the first token.

link-extra-ms is what a proxy adds to a round trip of 0 ms. wrong-tokens are those of all parts but the last that one
machine does not give. What generate() does not offer (yet) is missing, and not measured.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, TypeVar

import trio

from net.nurseries import open_service_nursery
from tests.bench import report
from tests.bench.children import Child, ChildFailed, Family, family, swarm
from tests.bench.links import Links, measure_round_trip_s
from tests.bench.prompts import MODEL, Alone, misleading, noise, repetitive
from tests.bench.storm import unequal

T = TypeVar("T")
SPANS = {1: ("0:8",), 2: ("0:4", "4:8"), 3: ("0:3", "3:6", "6:8")}
HOPS = 3
PROMPT_TOKENS = 8
HOPS_TOKENS = 128
CLIENTS, CLIENTS_TOKENS = 8, 96
RTTS_MS, RTT_TOKENS = (5, 50, 100), 24
DRAFT_RTT_S, DRAFT_TOKENS = 0.05, 48
HIDDEN, HEADS, BLOCKS, PREFILL_TOKENS = 1024, 16, 3, 1024
PREFILL_VOCABULARY = 320  # of tests.checkpoints
PREFILL_BYTES_PER_S = 20e6 / 8
FP32_BYTES = 4
STEP_S = 180.0  # for one answer of a client

GOALS: dict[str, tuple[str, float | None, str]] = {
    "ms-per-hop": ("ms", 1.5, "lower"),
    "ms-per-further-hop": ("ms", None, "lower"),
    "cpu-ms-per-hop": ("ms", 2.0, "lower"),
    "cpu-ms-per-further-hop": ("ms", None, "lower"),
    **{f"steps-per-s-{hops}-hops": ("tokens/s", None, "higher") for hops in (0, *SPANS)},
    "ready-s": ("s", 2.0, "lower"),
    "first-token-ms": ("ms", None, "lower"),
    "next-session-ms": ("ms", None, "lower"),
    "one-client-per-s": ("tokens/s", None, "higher"),
    "clients-8-gain": ("x one", 4.0, "higher"),
    "link-extra-ms": ("ms", None, "lower"),
    "rtt-5-vs-bound": ("of the bound", None, "higher"),
    "rtt-50-vs-bound": ("of the bound", 0.9, "higher"),
    "rtt-100-vs-bound": ("of the bound", None, "higher"),
    "first-token-round-trips": ("round trips", None, "lower"),
    "next-session-round-trips": ("round trips", None, "lower"),
    "draft-gain-repetitive": ("x without", 3.0, "higher"),
    "draft-gain-adversarial": ("x without", 0.97, "higher"),
    "prefill-s": ("s", None, "lower"),
    "prefill-20mbit-gain": ("x fp32 in turn", 2.0, "higher"),
    "wrong-tokens": ("tokens", 0.0, "lower"),
}


class Refused(Exception):
    """generate() does not take an option (yet)."""


class Bench:
    """What the parts share: children, swarms that are kept, what was found."""

    def __init__(self, children: Family, stack: AsyncExitStack, links: Links, runs: int) -> None:
        self.children = children
        self.links = links
        self.runs = runs
        self.random = random.Random("generate")
        self.found: dict[str, list[float]] = {"wrong-tokens": [0.0]}
        self.missing: dict[str, str] = {}
        self._stack = stack
        self._swarms: dict[tuple[int, bool], tuple[str, list[Child]]] = {}
        self._alone: Alone | None = None

    def note(self, name: str, *values: float) -> None:
        self.found.setdefault(name, []).extend(values)

    async def alone(self) -> Alone:
        """The model on this machine, loaded once."""
        if self._alone is None:
            self._alone = await trio.to_thread.run_sync(Alone)
        return self._alone

    async def swarm(self, hops: int, *, is_linked: bool = False) -> tuple[str, list[Child]]:
        """So many nodes of bloom-tiny, started once."""
        key = hops, is_linked
        if key not in self._swarms:
            report.progress(f"generate: starting {hops} nodes{' behind links' if is_linked else ''}")
            prefix = f"{hops}-linked-" if is_linked else f"{hops}-"
            made = swarm(self.children, SPANS[hops], prefix=prefix, links=self.links if is_linked else None)
            self._swarms[key] = await self._stack.enter_async_context(made)
        return self._swarms[key]

    async def client(self, name: str, address: str, *, model: str = MODEL, is_linked: bool = False) -> Child:
        """A client that has connected; ``end`` it with ``children.end``."""
        place = await self.links.place(name, is_dialled=False) if is_linked else None
        child = await self.children.started(self.children.client(name, place=place))
        await connect(child, address, model)
        return child

    async def check(self, ids: Sequence[int], found: Sequence[int]) -> None:
        """Compare with one machine's tokens."""
        alone = await self.alone()
        expected = await trio.to_thread.run_sync(alone.generate, ids, len(found))
        wrong = unequal(expected, found, is_whole=True)
        if wrong:
            report.progress(f"generate: {wrong} WRONG of {len(found)} tokens")
        self.found["wrong-tokens"][0] += wrong


async def at_once(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Await all of them together; what they return, in order."""
    found: dict[int, T] = {}

    async def call(number: int) -> None:
        found[number] = await calls[number]()

    async with open_service_nursery() as nursery:
        for number in range(len(calls)):
            nursery.start_soon(call, number)
    return [found[number] for number in range(len(calls))]


async def connect(child: Child, address: str, model: str = MODEL) -> float:
    """Returns: seconds to connect and to have the model.

    Raises:
        ChildFailed: it could not.
    """
    with trio.fail_after(STEP_S):
        answer = await child.ask(do="connect", bootstrap=[address], model=model)
    if "error" in answer:
        raise ChildFailed(f"{child.name} cannot connect: {answer['error']['text']}")
    return float(answer["connect_s"] + answer["model_s"])


async def generate(child: Child, ids: Sequence[int], new: int, **options: Any) -> dict[str, Any]:
    """Raises:
    Refused: generate() does not know one of the options.
    ChildFailed: it raised something else.
    """
    with trio.fail_after(STEP_S):
        answer = await child.ask(do="generate", ids=list(ids), new=new, options=options)
    if "error" in answer:
        text = f"{answer['error']['type']}: {answer['error']['text']}"
        if answer["error"]["type"] in ("ValueError", "TypeError", "InvalidInput") and any(
            f"'{name}'" in text or f"{name} " in text for name in options
        ):
            raise Refused(f"generate() does not take {', '.join(options)}")
        raise ChildFailed(f"{child.name}: {text}")
    return answer


def per_token_s(answer: dict[str, Any]) -> float:
    """From the first token to the last, per token."""
    times = answer["times"]
    return float((times[-1] - times[0]) / (len(times) - 1))


def slope(values: Sequence[float]) -> float:
    """Least squares, over 0, 1, 2, ..."""
    middle = (len(values) - 1) / 2
    return sum((x - middle) * y for x, y in enumerate(values)) / sum((x - middle) ** 2 for x in range(len(values)))


async def hops(bench: Bench) -> None:
    alone = await bench.alone()
    swarms: dict[int, tuple[str, list[Child]]] = {}
    clients: dict[int, Child] = {}

    async def begin(count: int) -> None:
        swarms[count] = await bench.swarm(count)
        clients[count] = await bench.client(f"{count}-client", swarms[count][0])
        await generate(clients[count], noise(bench.random, PROMPT_TOKENS), PROMPT_TOKENS)  # warm

    await at_once([partial(begin, count) for count in SPANS])
    for run in range(bench.runs):
        report.progress(f"generate: hops, run {run + 1}")
        ids = noise(bench.random, PROMPT_TOKENS)
        cpu, began = time.process_time(), time.monotonic()
        expected = await trio.to_thread.run_sync(alone.generate, ids, HOPS_TOKENS)
        ms = [1000 * (time.monotonic() - began) / len(expected)]
        cpu_ms = [1000 * (time.process_time() - cpu) / len(expected)]
        for count, client in sorted(clients.items()):
            involved = [*swarms[count][1], client]
            cpu = sum(child.cpu_s for child in involved)
            answer = await generate(client, ids, HOPS_TOKENS)
            cpu_ms.append(1000 * (sum(child.cpu_s for child in involved) - cpu) / len(answer["times"]))
            ms.append(1000 * per_token_s(answer))
            await bench.check(ids, answer["ids"])
        for prefix, values in (("", ms), ("cpu-", cpu_ms)):
            bench.note(f"{prefix}ms-per-hop", slope(values))
            bench.note(f"{prefix}ms-per-further-hop", slope(values[1:]))
        for count, value in enumerate(ms):
            bench.note(f"steps-per-s-{count}-hops", 1000 / value)
    for client in clients.values():
        await bench.children.end(client)


async def ready(bench: Bench) -> None:
    address, _ = await bench.swarm(HOPS)
    for run in range(bench.runs):
        report.progress(f"generate: ready, run {run + 1}")
        client = await bench.children.started(bench.children.client("ready"))
        bench.note("ready-s", await connect(client, address))
        for name in ("first-token-ms", "next-session-ms"):
            bench.note(name, 1000 * await _first_token_s(bench, client))
        await bench.children.end(client)


async def _first_token_s(bench: Bench, client: Child) -> float:
    answer = await generate(client, noise(bench.random, PROMPT_TOKENS), 1)
    return float(answer["times"][0] - answer["began"])


async def clients(bench: Bench) -> None:
    address, _ = await bench.swarm(2)
    report.progress(f"generate: starting {CLIENTS} clients")
    callers = await at_once([partial(bench.client, f"client-{number}", address) for number in range(CLIENTS)])
    prompts = [noise(bench.random, PROMPT_TOKENS) for _ in callers]
    solo = []
    for caller, ids in zip(callers, prompts, strict=True):
        solo.append(await generate(caller, ids, CLIENTS_TOKENS))
        await bench.check(ids, solo[-1]["ids"])
    for run in range(bench.runs):
        report.progress(f"generate: clients, run {run + 1}")
        one = await generate(callers[run % CLIENTS], prompts[run % CLIENTS], CLIENTS_TOKENS)
        alone_per_s = len(one["ids"]) / (one["ended"] - one["began"])
        answers = await at_once(
            [partial(generate, caller, ids, CLIENTS_TOKENS) for caller, ids in zip(callers, prompts, strict=True)]
        )
        for answer, before in zip(answers, solo, strict=True):
            bench.found["wrong-tokens"][0] += unequal(before["ids"], answer["ids"], is_whole=True)
        tokens = sum(len(answer["ids"]) for answer in answers)
        seconds = max(answer["ended"] for answer in answers) - min(answer["began"] for answer in answers)
        bench.note("one-client-per-s", alone_per_s)
        bench.note("clients-8-gain", tokens / seconds / alone_per_s)
    for caller in callers:
        await bench.children.end(caller)


async def links(bench: Bench) -> None:
    bench.links.set(rtt_s=0)
    bench.note("link-extra-ms", *(1000 * each for each in await measure_round_trip_s(bench.links)))
    rtt_s = {0: 0.0}
    for rtt_ms in RTTS_MS:
        bench.links.set(rtt_s=rtt_ms / 1000)
        rtt_s[rtt_ms] = statistics.median(await measure_round_trip_s(bench.links))
    bench.links.set(rtt_s=0)
    address, _ = await bench.swarm(HOPS, is_linked=True)
    client = await bench.client("linked", address, is_linked=True)
    for run in range(bench.runs):
        report.progress(f"generate: links, run {run + 1}")
        ids = noise(bench.random, PROMPT_TOKENS)
        compute_s = 0.0
        firsts: dict[tuple[str, int], float] = {}
        for rtt_ms, measured_s in rtt_s.items():
            bench.links.set(rtt_s=rtt_ms / 1000)
            await connect(client, address)
            for name in ("first-token", "next-session"):
                firsts[name, rtt_ms] = await _first_token_s(bench, client)
            answer = await generate(client, ids, RTT_TOKENS)
            await bench.check(ids, answer["ids"])
            if not rtt_ms:
                compute_s = per_token_s(answer)
                continue
            bound_s = (HOPS + 1) / 2 * measured_s + compute_s
            bench.note(f"rtt-{rtt_ms}-vs-bound", bound_s / per_token_s(answer))
        for name in ("first-token", "next-session"):
            bench.note(f"{name}-round-trips", (firsts[name, 50] - firsts[name, 0]) / rtt_s[50])
    bench.links.set(rtt_s=0)
    await bench.children.end(client)


async def draft(bench: Bench) -> None:
    names = ("draft-gain-repetitive", "draft-gain-adversarial")
    bench.links.set(rtt_s=0)
    address, _ = await bench.swarm(HOPS, is_linked=True)
    client = await bench.client("drafting", address, is_linked=True)
    try:
        await generate(client, noise(bench.random, PROMPT_TOKENS), 2, draft="auto")
    except Refused as error:
        bench.missing |= dict.fromkeys(names, str(error))
        return
    finally:
        await bench.children.end(client)
    alone = await bench.alone()
    client = await bench.client("drafting", address, is_linked=True)
    bench.links.set(rtt_s=DRAFT_RTT_S)
    for name, make in zip(names, (repetitive, misleading), strict=True):
        report.progress(f"generate: {name}")
        ids = await trio.to_thread.run_sync(make, alone, DRAFT_TOKENS)
        for _ in range(bench.runs):
            plain = await generate(client, ids, DRAFT_TOKENS, draft=None)
            drafted = await generate(client, ids, DRAFT_TOKENS, draft="auto")
            for answer in (plain, drafted):
                await bench.check(ids, answer["ids"])
            bench.note(name, (plain["ended"] - plain["began"]) / (drafted["ended"] - drafted["began"]))
    bench.links.set(rtt_s=0)
    await bench.children.end(client)


async def prefill(bench: Bench) -> None:
    report.progress("generate: making a model of hidden size 1,024")
    folder = str(await trio.to_thread.run_sync(_make_wide, bench))
    spans = [f"{block}:{block + 1}" for block in range(BLOCKS)]
    bench.links.set(rtt_s=0)
    transfers_s = (BLOCKS + 1) * PREFILL_TOKENS * HIDDEN * FP32_BYTES / PREFILL_BYTES_PER_S
    async with swarm(bench.children, spans, links=bench.links, model=folder, prefix="wide-") as (address, _):
        client = await bench.client("wide-client", address, model=folder, is_linked=True)
        for run in range(1 + bench.runs):
            seconds = []
            for rate in (None, PREFILL_BYTES_PER_S):
                report.progress(f"generate: prefill, run {run}{'' if rate else ', without a rate'}")
                bench.links.set(rtt_s=0, bytes_per_s=rate)
                ids = [bench.random.randrange(4, PREFILL_VOCABULARY) for _ in range(PREFILL_TOKENS)]
                answer = await generate(client, ids, 1)
                seconds.append(answer["times"][0] - answer["began"])
            if run:  # the first one warms up
                bench.note("prefill-s", seconds[1])
                bench.note("prefill-20mbit-gain", (transfers_s + seconds[0]) / seconds[1])
        bench.links.set(rtt_s=0)
        await bench.children.end(client)


def _make_wide(bench: Bench) -> object:
    from tests.checkpoints import make_checkpoint

    return make_checkpoint(bench.children.folder / "wide", layers=BLOCKS, heads=HEADS, hidden=HIDDEN)


PARTS: dict[str, Callable[[Bench], Awaitable[None]]] = {
    "hops": hops,
    "ready": ready,
    "clients": clients,
    "links": links,
    "draft": draft,
    "prefill": prefill,
}


async def measure(options: argparse.Namespace) -> Bench:
    async with family() as children, open_service_nursery() as nursery:
        async with AsyncExitStack() as stack:
            bench = Bench(children, stack, Links(nursery), options.runs)
            for name in options.only or PARTS:
                await PARTS[name](bench)
        nursery.cancel_scope.cancel()
    return bench


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--only", action="append", choices=sorted(PARTS), help="this part alone; may be repeated")
    options = parser.parse_args()
    try:
        bench = trio.run(partial(measure, options))
    except (ChildFailed, trio.TooSlowError) as error:
        sys.exit(f"generate: {error or f'no answer in {STEP_S:g} s'}")
    except KeyboardInterrupt:
        sys.exit(130)
    figures = [
        report.figure(name, bench.found[name], unit, better=better, goal=goal)
        for name, (unit, goal, better) in GOALS.items()
        if name in bench.found
    ]
    report.show("generate", figures, as_json=options.json, missing=bench.missing)


if __name__ == "__main__":
    main()
