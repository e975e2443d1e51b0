"""A generation over three nodes, each behind another NAT, from a client behind a fourth; then again while the relay is
killed, and the nodes' uplinks and their routers' addresses change. Both give the tokens of one machine.

The commands are those that people use. The pause is the longest between two tokens that ``raceme generate`` prints.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from interop.lab.asking import first_line
from interop.lab.network import Home, Host, PublicHost, internet
from interop.lab.nodes import address
from interop.lab.probes import Finding, finding

RTT_MS = 50.0
PORT = 4001
PROMPT = "In the beginning"
TOKENS, LONG_TOKENS = 60, 320
SPANS = ("0:3", "3:6", "6:8")
FORM = ("--quantize", "fp32")  # or a node alone and those of the swarm might find another form the fastest
KINDS = ("full-cone", "port-restricted", "symmetric")
START_S = 60.0  # of one command
GENERATION_S = 480.0  # 320 tokens through three relays, and 18 pauses, take 260
SWITCHES = 18
BETWEEN_S = 5.0  # from one switch to the next
PAUSE_S = 5.0  # the longest that a user may see


@dataclass(kw_only=True)
class Printed:
    """What a generation printed, and when."""

    text: str = ""
    times: list[float] = field(default_factory=list)
    begun: trio.Event = field(default_factory=trio.Event)
    status: int | None = None

    @property
    def longest_pause_s(self) -> float:
        return max((after - before for before, after in zip(self.times, self.times[1:], strict=False)), default=0.0)


async def run() -> AsyncGenerator[Finding, None]:
    """All findings about generations."""
    net = internet()
    relays = [net.host(f"relay-{number}", rtt_ms=RTT_MS) for number in range(3)]
    homes = [net.home(f"{kind}-node", nat=kind, rtt_ms=RTT_MS) for kind in KINDS]
    phones = [net.home(f"{kind}-phone", nat=kind, rtt_ms=RTT_MS) for kind in KINDS]
    machines = [home.host() for home in homes]
    caller = net.home("caller", nat="port-restricted", rtt_ms=RTT_MS).host()
    async with net.up(), AsyncExitStack() as stack:
        expected, long = await _alone(caller)
        known: list[str] = []
        processes: list[trio.Process] = []
        for relay in relays:
            started = await stack.enter_async_context(_relay(relay, known))
            known.append(started[0])
            processes.append(started[1])
        for machine, span in zip(machines, SPANS, strict=True):
            await stack.enter_async_context(_node(machine, span, known))
        printed = Printed()
        await _generate(caller, known, printed, TOKENS)
        yield _same("behind NATs: one machine's tokens", expected, printed)
        yield finding("behind NATs: exit status", 0, printed.status)
        printed = Printed()
        switched: list[str] = []
        async with trio.open_nursery() as nursery:
            uplinks = [_Uplinks(*each) for each in zip(machines, homes, phones, strict=True)]
            nursery.start_soon(_disturb, uplinks, processes[-1], printed, switched)
            await _generate(caller, known, printed, LONG_TOKENS)
            nursery.cancel_scope.cancel()
        yield finding("uplinks switched, a relay killed: switches", SWITCHES, len(switched))
        yield _same("uplinks switched, a relay killed: one machine's tokens", long, printed)
        yield Finding(
            name="uplinks switched, a relay killed: longest pause",
            expected=f"at most {PAUSE_S:g} s",
            found=f"{printed.longest_pause_s:.1f} s",
            passed=printed.longest_pause_s <= PAUSE_S and printed.status == 0,
            value=printed.longest_pause_s,
        )


def _same(name: str, expected: str, printed: Printed) -> Finding:
    return Finding(
        name=name,
        expected=f"{len(expected)} characters",
        found=f"{len(printed.text)} characters, {'the same' if printed.text == expected else 'others'}",
        passed=bool(expected) and printed.text == expected,
    )


@dataclass(frozen=True)
class _Uplinks:
    """A machine, its home, and the telephone that it can go online with."""

    machine: Host
    home: Home
    phone: Home


async def _disturb(uplinks: Sequence[_Uplinks], relay: trio.Process, printed: Printed, switched: list[str]) -> None:
    """Once text comes, machine after machine gets another uplink or its router another address, and in the midst of it
    a relay ends."""
    await printed.begun.wait()
    for number in range(SWITCHES):
        await trio.sleep(BETWEEN_S)
        there = uplinks[number % len(uplinks)]
        if number // len(uplinks) % 2:
            await there.machine.move(there.phone if there.machine.home is there.home else there.home)
        else:
            await there.machine.home.renumber()
        switched.append(there.machine.name)
        if number == SWITCHES // 2:
            relay.kill()


async def _alone(machine: Host) -> list[str]:
    """What one machine makes of the prompt, once and at length: a node with all blocks beside its client."""
    listen = address("127.0.0.1", PORT)
    async with (
        machine.process(["raceme", "relay", "--json", "--listen", listen, "--until-eof"]) as relay,
    ):
        where = (await _up(relay))["address"]
        command = [
            "raceme",
            "serve",
            "bloom-tiny",
            "--blocks",
            "0:8",
            *FORM,
            "--bootstrap",
            where,
            "--listen",
            listen[:-4] + "0",
        ]
        async with machine.process([*command, "--json", "--until-eof"], stderr=subprocess.DEVNULL) as node:
            await _up(node)
            found = []
            for tokens in (TOKENS, LONG_TOKENS):
                printed = Printed()
                await _generate(machine, [where], printed, tokens)
                found.append(printed.text)
            return found


@asynccontextmanager
async def _relay(machine: PublicHost, known: Sequence[str]) -> AsyncIterator[tuple[str, trio.Process]]:
    bootstrap = [part for each in known for part in ("--bootstrap", each)]
    command = ["raceme", "relay", "--json", "--listen", address(machine.address, PORT), "--until-eof", *bootstrap]
    async with machine.process(command, stderr=subprocess.DEVNULL) as process:
        yield (await _up(process))["address"], process


@asynccontextmanager
async def _node(machine: Host, span: str, known: Sequence[str]) -> AsyncIterator[None]:
    bootstrap = [part for each in known for part in ("--bootstrap", each)]
    command = [
        "raceme",
        "serve",
        "bloom-tiny",
        "--blocks",
        span,
        *FORM,
        "--json",
        "--until-eof",
        "--no-port-mapping",
        *bootstrap,
    ]
    async with machine.process(command, stderr=subprocess.DEVNULL) as process:
        await _up(process)
        yield


async def _generate(machine: Host, known: Sequence[str], printed: Printed, tokens: int) -> None:
    bootstrap = [part for each in known for part in ("--bootstrap", each)]
    command = ["raceme", "generate", "--model", "bloom-tiny", "--max-new-tokens", str(tokens), *bootstrap, PROMPT]
    with trio.move_on_after(GENERATION_S):
        async with machine.process(command, stderr=subprocess.DEVNULL) as process:
            if process.stdout is not None:
                async for data in process.stdout:
                    printed.text += data.decode(errors="replace")
                    printed.times.append(trio.current_time())
                    printed.begun.set()
            printed.status = await process.wait()


async def _up(process: trio.Process) -> dict[str, Any]:
    with trio.fail_after(START_S):
        return await first_line(process)
