"""A node behind a NAT whose network changes: how long until a stranger, who knows no more than the DHT, reaches it.

Its router is given another public address; the machine goes online by telephone, and comes home; its line is cut and
mended; one of its relays dies. Each time another stranger joins the swarm, looks for what the node announces, connects
and pings it, which counts as well.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack

import trio

from interop.lab.meetings import RTT_MS, known, serve
from interop.lab.namespaces import LabError
from interop.lab.network import Home, Host, PublicHost, internet
from interop.lab.nodes import Node, node
from interop.lab.probes import Finding

AGAIN_S = 5.0  # the longest that a node may be out of reach
GIVE_UP_S = 20.0
SETTLE_S = 8.0  # before a change
CUT_S = 12.0
RELAYS = 3
RUNS = 1
KINDS = ("port-restricted", "symmetric")
TRANSPORTS = ("tcp", "tcp+quic")


async def run(*, runs: int) -> AsyncGenerator[Finding, None]:
    """All findings about changes."""
    net = internet()
    relays = [net.host(f"relay-{number}", rtt_ms=RTT_MS) for number in range(RELAYS)]
    stranger = net.home("stranger", nat="port-restricted", rtt_ms=RTT_MS).host()
    homes = {kind: net.home(f"{kind}-home", nat=kind, rtt_ms=RTT_MS) for kind in KINDS}
    phones = {kind: net.home(f"{kind}-phone", nat=kind, rtt_ms=RTT_MS) for kind in KINDS}
    machines = {kind: homes[kind].host() for kind in KINDS}
    async with net.up():
        for kind in KINDS:
            for transports in TRANSPORTS:
                changing = _Changing(relays, stranger, machines[kind], homes[kind], phones[kind], transports)
                for name, change in changing.kinds.items():
                    yield await changing.finding(f"{kind}, {transports}: {name}", change, runs)


class _Changing:
    """One kind of node, and what is done to it."""

    def __init__(
        self,
        relays: Sequence[PublicHost],
        stranger: Host,
        machine: Host,
        home: Home,
        phone: Home,
        transports: str,
    ) -> None:
        self._relays = relays
        self._stranger = stranger
        self._machine, self._home, self._phone = machine, home, phone
        self._transports = transports
        self._serving: list[Node] = []
        self._places: list[str] = []
        self.kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "router's address": home.renumber,
            "to the telephone": self._go_online_elsewhere,
            "line mended": self._lose_and_mend,
            "relay killed": self._kill_a_relay,
        }

    async def finding(self, name: str, change: Callable[[], Awaitable[None]], runs: int) -> Finding:
        taken = [await self._measure(change) for _ in range(runs)]
        return Finding(
            name=name,
            expected=f"reached within {AGAIN_S:g} s",
            found=", ".join(f"{each:.1f} s" for each in taken),
            passed=max(taken) <= AGAIN_S,
            value=max(taken),
        )

    async def _measure(self, change: Callable[[], Awaitable[None]]) -> float:
        """Everybody starts afresh, so that nothing of one change helps the next."""
        async with AsyncExitStack() as stack:
            nodes = [await stack.enter_async_context(node(machine)) for machine in self._relays]
            self._places = places = []
            for each in nodes:
                await serve(each, self._transports)
                places += known(each, self._transports)
            self._serving = nodes
            self._there = there = await stack.enter_async_context(node(self._machine))
            self._asking = asking = await stack.enter_async_context(node(self._stranger))
            await there.start(self._transports, relay=places)
            await there.announce()
            await trio.sleep(SETTLE_S)
            await change()
            changed = trio.current_time()
            try:
                await asking.start(self._transports, relay=places, in_dht=False)
                await asking.reach(there, within_s=GIVE_UP_S)
                return trio.current_time() - changed
            except LabError:
                return float("inf")
            finally:
                if self._machine.home is not self._home:
                    await self._machine.move(self._home)

    async def _go_online_elsewhere(self) -> None:
        await self._machine.move(self._phone)

    async def _lose_and_mend(self) -> None:
        await self._home.cut()
        await trio.sleep(CUT_S)
        await self._home.mend()

    async def _kill_a_relay(self) -> None:
        """One at which the node has a reservation."""
        await self._asking.start(self._transports, relay=self._places, in_dht=False)
        announced = " ".join(await self._asking.find(self._there))
        await self._asking.stop()
        next(each for each in self._serving if each.peer_id in announced).process.kill()
