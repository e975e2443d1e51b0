"""The simulated internet as a picture: draw it, bring it up, then change it while programs run in it.

    net = lab.internet()
    relay = net.host("relay", rtt_ms=20)
    home = net.home(nat="port-restricted", rtt_ms=40)
    alice, carol = home.host("alice"), home.host("carol")
    async with net.up():
        async with alice.process(["raceme", "ping", address]) as ping: ...
        await home.line(loss=0.02, mbit=10)
        await home.renumber()

Drawing does nothing by itself; ``up`` builds all of it at once. What is drawn later is built by ``apply``.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from itertools import count
from typing import Any, TypedDict, Unpack

import trio

from interop.lab import namespaces, nat, plan
from interop.lab.asking import Asked
from interop.lab.machine import ROOT, Machine, ip, nft
from interop.lab.namespaces import LabError
from interop.lab.plan import Addresses, Line
from net.nurseries import open_service_nursery

COMMANDS_AT_ONCE = 4
LAN_DEVICE = "eth0"
DEFAULT_NAT = "port-restricted"


class LineOptions(TypedDict, total=False):
    """See ``plan.Line``; ``mbit`` stands for both rates."""

    rtt_ms: float
    mbit: float | None
    up_mbit: float | None
    down_mbit: float | None
    loss: float
    queue_ms: float


class OnLine:
    """What hangs on the core by an uplink: a public host, or the router of a home."""

    def __init__(self, net: Internet, name: str, options: LineOptions, *, ipv4: bool, ipv6: bool) -> None:
        self.net = net
        self.uplink = name
        self.state = Line().changed(**options)
        self.has_line = True
        self._families = {"ipv4": ipv4, "ipv6": ipv6}
        self.public = Addresses()

    def take_address(self) -> None:
        """The next public address that nobody has had."""
        self.public = plan.uplink_addresses(self.net.next_uplink(), **self._families)

    async def line(self, **changes: Unpack[LineOptions]) -> None:
        """Change delay, rate or loss. What is in flight already arrives as before."""
        await self._set(self.state.changed(**changes))

    async def cut(self) -> None:
        """Lose everything, both ways, without a word; no interface goes down."""
        await self._set(self.state.changed(is_up=False))

    async def mend(self) -> None:
        await self._set(self.state.changed(is_up=True))

    async def _set(self, line: Line) -> None:
        if not self.has_line:
            raise LabError(f"{self.uplink} hangs on another home, not on a line of its own")
        await self.net.core.ask(do="line", name=self.uplink, line=asdict(line))
        self.state = line

    async def _route(self) -> None:
        keys = [key.hex() for key in plan.route_keys(self.public)]
        await self.net.core.ask(do="routes", name=self.uplink, keys=keys)

    async def plug_in(self) -> None:
        """Make the device at the core, and lead the address there."""
        await self.net.core.ask(do="port", name=self.uplink, namespace=namespaces.path(self.uplink))
        await self._set(self.state)
        await self._route()


class Host(Machine):
    """A machine in a home. Its address is private, except for IPv6."""

    def __init__(self, home: Home, name: str) -> None:
        super().__init__(name)
        self.home = home

    async def move(self, home: Home) -> None:
        """Leave the home for another, as a laptop does for a telephone's network: all addresses change.

        Connections do not learn of it; their packets leave from the new address, or not at all.
        """
        await ip(self.name, plan.detach(LAN_DEVICE))
        self.home = home
        port = home.next_port()
        await ip(None, plan.cable(inside=self.name, device=LAN_DEVICE, router=home.name, port=port))
        await ip(home.name, plan.plug(port))
        await self.attach()

    async def attach(self) -> None:
        """Take an address of the home, the cable being there."""
        self.addresses = await self.home.attach(self, LAN_DEVICE)


class PublicHost(Machine, OnLine):
    """A machine on the internet without NAT or firewall."""

    def __init__(self, net: Internet, name: str, options: LineOptions, *, ipv4: bool, ipv6: bool) -> None:
        Machine.__init__(self, name)
        OnLine.__init__(self, net, name, options, ipv4=ipv4, ipv6=ipv6)

    async def attach(self) -> None:
        prefix6 = self.public.ipv6
        self.addresses = Addresses(ipv4=self.public.ipv4, ipv6=None if prefix6 is None else plan.within(prefix6, 1))
        await ip(self.name, plan.wan(self.public))

    async def renumber(self) -> None:
        """Another public address; the old one leads nowhere."""
        self.take_address()
        await ip(self.name, plan.clear(nat.WAN))
        await self._route()
        await self.attach()


class Home(OnLine):
    """A router with a NAT, what is behind it, and its uplink (unless it is within another home)."""

    def __init__(
        self,
        net: Internet,
        name: str,
        options: LineOptions,
        *,
        within: Home | None,
        kind: str | None,
        udp: bool,
        hairpin: bool,
        ipv6: bool,
    ) -> None:
        super().__init__(net, name, options, ipv4=kind is not None, ipv6=ipv6)
        self.name = name
        self.router = Machine(name)
        self.within = within
        self.has_line = within is None
        self.kind = kind
        self.rules = {"udp": udp, "hairpin": hairpin, "ipv6": ipv6}
        self.hosts: list[Host] = []
        self.network = plan.lan_network(0 if within is None else within.depth + 1)
        self.depth: int = 0 if within is None else within.depth + 1
        self._ports = 0
        self._leases: dict[str, int] = {}
        nat.ruleset(kind, **self.rules)  # complains while the picture is being drawn

    @property
    def address(self) -> str:
        """What the internet sees: the outermost router's public IPv4 address."""
        outermost = self
        while outermost.within is not None:
            outermost = outermost.within
        if outermost.public.ipv4 is None:
            raise LabError(f"{outermost.name} has no public IPv4 address (yet)")
        return outermost.public.ipv4

    def host(self, name: str | None = None) -> Host:
        """Draw another machine in this home."""
        host = Host(self, name or f"{self.name}-{len(self.hosts) + 1}")
        self.hosts.append(host)
        self.net.draw(host)
        return host

    def home(self, name: str | None = None, *, nat: str = DEFAULT_NAT, udp: bool = True, hairpin: bool = False) -> Home:
        """Draw a second level of NAT: a router whose uplink is a cable to this home's."""
        options = LineOptions()
        home = Home(self.net, self.net.name(name), options, within=self, kind=nat, udp=udp, hairpin=hairpin, ipv6=False)
        self.net.draw(home)
        return home

    def next_port(self) -> str:
        self._ports += 1
        return f"port{self._ports}"

    async def attach(self, machine: Machine, device: str) -> Addresses:
        """Give a machine an address here (always the same one), and this router as its way out."""
        prefix6 = self.public.ipv6
        number = self._leases.setdefault(machine.name, len(self._leases))
        addresses = plan.host_addresses(self.network, prefix6, number)
        ipv4 = self.kind is not None
        lines = plan.attach(device, addresses, network=self.network, prefix6=prefix6, ipv4=ipv4)
        await ip(machine.name, lines)
        return addresses if ipv4 else Addresses(ipv6=addresses.ipv6)

    async def build(self, ports: Iterable[str]) -> None:
        """Everything in the router, the cables being there."""
        forwarding = {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"}
        namespaces.set_sysctls(self.name, forwarding)
        lines = plan.lan(self.network, self.public.ipv6)
        lines += [line for port in ports for line in plan.plug(port)]
        if self.within is None:
            lines += plan.wan(self.public, routed6=True)
            self.router.addresses = Addresses(ipv4=self.public.ipv4)
        await ip(self.name, lines)
        if self.within is not None:
            self.router.addresses = await self.within.attach(self.router, nat.WAN)
        await self._load()

    async def change(self, *, nat: str | None = None, udp: bool | None = None, hairpin: bool | None = None) -> None:
        """Another NAT in place of this one. All mappings and connections are forgotten."""
        self.kind = nat or self.kind
        wanted = {"udp": udp, "hairpin": hairpin}
        self.rules |= {name: value for name, value in wanted.items() if value is not None}
        await self.forget()

    async def forget(self) -> None:
        """What switching the router off and on does: all mappings and connections are forgotten.

        Nothing passes meanwhile: the mapping of a connection that is about to be forgotten would be learnt again.
        """
        await nft(self.name, nat.ruleset(None))
        namespaces.forget_connections(self.name)
        await self._load()

    async def renumber(self) -> None:
        """Another public address, as after a provider's nightly cut. The router forgets all connections."""
        if self.within is not None:
            raise LabError(f"{self.name} is within {self.within.name}, which has the public address")
        old6 = self.public.ipv6
        self.take_address()
        await ip(self.name, plan.clear(nat.WAN))
        await self._route()
        await ip(self.name, plan.wan(self.public, routed6=True))
        self.router.addresses = Addresses(ipv4=self.public.ipv4)
        await self.forget()
        if old6 is not None and self.public.ipv6 is not None:
            await self._renumber6(old6, self.public.ipv6)

    async def _renumber6(self, old: str, new: str) -> None:
        await ip(self.name, plan.renumber_lan6(old, new))
        for host in self.hosts:
            await ip(host.name, plan.clear(LAN_DEVICE))
            await host.attach()

    async def _load(self) -> None:
        await nft(self.name, nat.ruleset(self.kind, **self.rules))


class Internet:
    """The picture, and what was built of it."""

    def __init__(self) -> None:
        self.core = Core()
        self._names: set[str] = set()
        self._uplinks = 0
        self._drawn: list[Host | PublicHost | Home] = []

    def host(
        self, name: str | None = None, *, ipv4: bool = True, ipv6: bool = False, **line: Unpack[LineOptions]
    ) -> PublicHost:
        """Draw a machine with a public address: a relay, a bootstrap node."""
        host = PublicHost(self, self.name(name, "host"), line, ipv4=ipv4, ipv6=ipv6)
        self.draw(host)
        return host

    def home(
        self,
        name: str | None = None,
        *,
        nat: str | None = DEFAULT_NAT,
        udp: bool = True,
        hairpin: bool = False,
        ipv6: bool = False,
        **line: Unpack[LineOptions],
    ) -> Home:
        """Draw a home. It is empty: draw machines into it with ``home.host()``.

        Args:
            name: of its router.
            nat: a name in ``nat.KINDS``; None for a home without IPv4.
            udp, hairpin, ipv6: as ``nat.ruleset``. IPv6 has a /64 and a firewall, and no NAT.
            line: see ``plan.Line``; 40 ms at both ends is 80 ms there and back.
        """
        name = self.name(name)
        home = Home(self, name, line, within=None, kind=nat, udp=udp, hairpin=hairpin, ipv6=ipv6)
        self.draw(home)
        return home

    def name(self, wanted: str | None, kind: str = "home") -> str:
        """``wanted``, or a name that is free."""
        return wanted or next(name for number in count(1) if (name := f"{kind}{number}") not in self._names)

    def draw(self, thing: Host | PublicHost | Home) -> None:
        if thing.name in self._names:
            raise LabError(f"two machines are called {thing.name}")
        self._names.add(thing.name)
        self._drawn.append(thing)

    def next_uplink(self) -> int:
        self._uplinks += 1
        return self._uplinks - 1

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Internet]:
        """The network as drawn, until the block ends.

        Raises:
            LabError: ``namespaces.enter`` has not been called, or something could not be built.
        """
        if not namespaces.is_inside():
            raise LabError("call namespaces.enter() first, before anything else runs")
        async with self.core.running():
            try:
                await self.apply()
                yield self
            finally:
                with trio.CancelScope(shield=True):
                    await ip(None, [f"netns del {name}" for name in sorted(self._names)], must=False)

    async def apply(self) -> None:
        """Build what has been drawn since the last time."""
        drawn, self._drawn = self._drawn, []
        cables, ports = self._cables(drawn)
        await ip(None, [*plan.namespaces([thing.name for thing in drawn]), *cables])
        for thing in drawn:
            namespaces.FOLDER.joinpath(thing.name).mkdir(exist_ok=True)
            if isinstance(thing, PublicHost) or (isinstance(thing, Home) and thing.within is None):
                thing.take_address()
                await thing.plug_in()
        homes = [thing for thing in drawn if isinstance(thing, Home)]
        for depth in sorted({home.depth for home in homes}):
            await _all([_building(home, ports.get(home.name, [])) for home in homes if home.depth == depth])
        for name, new in ports.items():
            if all(home.name != name for home in homes):
                await ip(name, [line for port in new for line in plan.plug(port)])
        await _all([thing.attach for thing in drawn if isinstance(thing, Host | PublicHost)])

    def _cables(self, drawn: Sequence[Host | PublicHost | Home]) -> tuple[list[str], dict[str, list[str]]]:
        """Commands that lay cables in homes, and the ports that each router gets."""
        lines: list[str] = []
        ports: dict[str, list[str]] = {}
        for thing in drawn:
            around = thing.home if isinstance(thing, Host) else thing.within if isinstance(thing, Home) else None
            if around is None:
                continue
            device = LAN_DEVICE if isinstance(thing, Host) else nat.WAN
            port = around.next_port()
            ports.setdefault(around.name, []).append(port)
            lines += plan.cable(inside=thing.name, device=device, router=around.name, port=port)
        return lines, ports

    async def counters(self) -> dict[str, dict[str, int]]:
        """Of every uplink: see ``core.Counters``."""
        return await self.core.ask(do="counters")


def internet() -> Internet:
    """An empty picture."""
    return Internet()


class Core:
    """The process that carries packets between uplinks."""

    def __init__(self) -> None:
        self._asked: Asked | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Until the block ends. With the process go all its devices."""
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "interop.lab.core"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )
        self._asked = Asked(process, "the core of the simulated internet")
        try:
            yield
        finally:
            self._asked = None
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    async def ask(self, **order: Any) -> dict[str, Any]:
        """Raises: LabError when it cannot, or is not there."""
        if self._asked is None:
            raise LabError("the network is not up")
        return await self._asked.ask(**order)


def _building(home: Home, ports: Sequence[str]) -> Callable[[], Awaitable[None]]:
    async def build() -> None:
        await home.build(ports)

    return build


async def _all(jobs: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run them, some at once."""
    slots = trio.Semaphore(COMMANDS_AT_ONCE)

    async def run(job: Callable[[], Awaitable[None]]) -> None:
        async with slots:
            await job()

    async with open_service_nursery() as nursery:
        for job in jobs:
            nursery.start_soon(run, job)
