"""Whether others can reach this node, and how: what observers, AutoNAT servers and the router say, put together.

    PUBLIC      strangers can connect: the machine has a public address, or somebody forwards a port to it
    MAPPED      so they can, through a port that the router keeps open for us
    PUNCHABLE   they cannot, but both sides dialling at once gets through the NAT
    RELAY_ONLY  they cannot, and the NAT gives every peer another port: relays carry everything
    UNKNOWN     nobody has told yet, or nobody outside of this network is there to tell

What is announced: once one of the machine's own addresses is confirmed, public addresses alone, for whoever is near can
use these as well. Behind a NAT, addresses that were confirmed or mapped come first, and the private ones stay, behind
them: peers of the same network need those, where the router does not lead them back in. What was found unreachable is
left out when there is something better. While nothing is known, everything is announced.
"""

from __future__ import annotations

import enum
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import trio

from net import addresses, errors
from net.addresses import Multiaddr
from net.host import Host
from net.identify import identify_over
from net.nat import endpoints
from net.nat.autonat import AutoNat
from net.nat.dialback import DialBackSettings
from net.nat.endpoints import Endpoint, IpAddress
from net.nat.gateway import Port
from net.nat.mapping import PortMapper
from net.nat.observed import Mapping, ObservedAddresses
from net.nat.verdicts import Verdict
from net.swarm import Connection

logger = logging.getLogger(__name__)

RESERVATIONS = 2  # of relays, for who cannot be reached: one may go away


class Kind(enum.Enum):
    PUBLIC = "public"
    MAPPED = "mapped"
    PUNCHABLE = "punchable"
    RELAY_ONLY = "relay-only"
    UNKNOWN = "unknown"


WORDS = {
    Kind.PUBLIC: "others can connect to this node directly",
    Kind.MAPPED: "others can connect directly, through a port that the router keeps open for this node",
    Kind.PUNCHABLE: "others cannot connect by themselves, but through the NAT when both sides dial at once",
    Kind.RELAY_ONLY: "others cannot connect directly: relays carry everything",
    Kind.UNKNOWN: "nobody outside of this network has told yet whether others can connect",
}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that a judgement rests on.

    Attributes:
        own: where this machine listens.
        mapped: where the router listens for it, if that is a public address.
        outer_ips: where others see it.
        tcp, udp: how the NAT maps these.
        verdicts: what AutoNAT servers found, of every address worth a check.
        is_settled: whether they had time to find out.
    """

    own: Sequence[Multiaddr]
    mapped: Sequence[Multiaddr] = ()
    outer_ips: Sequence[IpAddress] = ()
    tcp: Mapping = Mapping.UNKNOWN
    udp: Mapping = Mapping.UNKNOWN
    verdicts: dict[Multiaddr, Verdict] = field(default_factory=dict)
    is_settled: bool = True

    def of(self, verdict: Verdict) -> list[Multiaddr]:
        return [address for address, found in self.verdicts.items() if found is verdict]


def judge(evidence: Evidence) -> Kind:
    """What follows."""
    reachable = evidence.of(Verdict.REACHABLE)
    if any(address not in evidence.mapped for address in reachable):
        return Kind.PUBLIC
    if any(evidence.verdicts.get(address) is not Verdict.UNREACHABLE for address in evidence.mapped):
        return Kind.MAPPED
    unreachable = evidence.of(Verdict.UNREACHABLE)
    own_ips = own_ip_set(evidence.own)
    is_behind_nat = any(ip not in own_ips for ip in evidence.outer_ips)
    if not unreachable and not (is_behind_nat and evidence.is_settled):
        return Kind.UNKNOWN
    kinds = {evidence.tcp, evidence.udp}
    if kinds & {Mapping.ENDPOINT_INDEPENDENT, Mapping.NONE}:  # the latter is a firewall: packets out make a way in
        return Kind.PUNCHABLE
    return Kind.RELAY_ONLY


def announced(evidence: Evidence) -> list[Multiaddr]:
    """What to tell others, best first. See the top of this file."""
    own = list(evidence.own)
    unreachable = set(evidence.of(Verdict.UNREACHABLE))
    confirmed = evidence.of(Verdict.REACHABLE)
    hoped = [address for address in evidence.mapped if address not in unreachable]
    outside = list(dict.fromkeys([*confirmed, *hoped]))
    if not outside:
        return own
    if any(address in own for address in confirmed):
        own = [address for address in own if endpoints.is_public(address)]
    kept = [address for address in own if address not in unreachable and not _is_loopback(address)]
    return list(dict.fromkeys([*outside, *kept]))


def own_ip_set(own: Collection[Multiaddr]) -> set[IpAddress]:
    found = (endpoints.read(address) for address in own)
    return {endpoint.ip for endpoint in found if endpoint is not None}


def _is_loopback(address: Multiaddr) -> bool:
    endpoint = endpoints.read(address)
    return endpoint is not None and endpoint.ip.is_loopback


@dataclass(frozen=True, kw_only=True)
class ReachabilitySettings:
    """Figures of the service.

    Attributes:
        look_s: between looks at this machine's own addresses.
        change_s: after a change of the network, until the connections that it has broken have ended.
        patience_s: for AutoNAT servers to find something out, before the lack of it means anything.
        identify_at_once: new peers that are asked at the same time where they see us.
        dial_back: of our AutoNAT server.
    """

    look_s: float = 1.0
    change_s: float = 3.0
    patience_s: float = 15.0
    identify_at_once: int = 8
    dial_back: DialBackSettings = field(default_factory=DialBackSettings)


class Reachability:
    """Finds out how its host can be reached, serves others that want to know the same, and says what is announced.

    Args:
        host: whose ``addresses`` follow from now on what is found here.
        mapper: asks the router for ports; None for no such thing.
        want: told how many relay reservations there should be, whenever that changes; must not raise.
        moved: told when the network has changed; must not raise.
        settings: figures.
    """

    def __init__(
        self,
        host: Host,
        *,
        mapper: PortMapper | None = None,
        want: Callable[[int], None] = lambda count: None,
        moved: Callable[[], None] = lambda: None,
        settings: ReachabilitySettings | None = None,
    ) -> None:
        self._host = host
        self._want = want
        self._moved = moved
        self._wanted: int | None = None
        self._settings = settings or ReachabilitySettings()
        self._observed = ObservedAddresses()
        self._sights: dict[Connection, tuple[str, Endpoint, Endpoint]] = {}
        self._own: list[Multiaddr] = []
        self._outer: dict[int, set[IpAddress]] = {}  # by version: where we are seen, as far as that holds since long
        self._changed_at = -math.inf
        self._seen_outside_at: float | None = None  # when anybody first saw us at a public address
        self._changed = trio.Event()
        self._evidence = Evidence(own=())
        self.mapper = mapper
        self.autonat = AutoNat(host, on_change=self._update, settings=self._settings.dial_back)
        self.kind = Kind.UNKNOWN
        if mapper is not None:
            mapper.tell(self._update)

    # What is known

    @property
    def evidence(self) -> Evidence:
        """What ``kind`` rests on."""
        return self._evidence

    @property
    def sights(self) -> list[Endpoint]:
        """Where others see us now, what most of them see first: also what too few see to be announced.

        Of a port that we do not listen on, nothing is told where we listen: nobody can be met there.
        """
        found = [endpoint for address in self._host.listening if (endpoint := endpoints.read(address)) is not None]
        listening = {(each.ip.version, each.transport, each.port) for each in found}
        kinds = {(version, transport) for version, transport, _ in listening}
        seen: Counter[Endpoint] = Counter()
        for connection, (_, local, where) in self._sights.items():
            kind = (local.ip.version, local.transport)
            if not connection.mux.is_closed and (kind not in kinds or (*kind, local.port) in listening):
                seen[where] += 1
        return [where for where, _ in seen.most_common()]

    async def wait_for_change(self) -> Kind:
        """The kind that comes next, or other evidence for the same."""
        await self._changed.wait()
        return self.kind

    async def wait_until(self, is_so: Callable[[Kind], bool]) -> Kind:
        """The first kind, from now on, for which ``is_so`` is true."""
        while not is_so(self.kind):
            await self.wait_for_change()
        return self.kind

    # Finding out

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch and ask until cancelled. ``started`` comes at once: nothing waits for what is found.

        Cancellation: the router gets its ports back, within the mapper's bound.
        """
        arrivals, comings = trio.open_memory_channel[Connection](self._host.limits.connections)

        def watch(connection: Connection) -> None:
            try:
                arrivals.send_nowait(connection)
            except trio.WouldBlock:
                logger.debug("too many new connections: %s is not asked where it sees us", connection.peer_id)

        self._host.swarm.watchers.append(watch)
        self._host.review = self._review
        try:
            async with trio.open_nursery() as nursery:
                for connection in self._host.swarm.connections:
                    watch(connection)
                nursery.start_soon(self._look, watch)
                nursery.start_soon(self.autonat.run)
                if self.mapper is not None:
                    nursery.start_soon(self.mapper.run)
                for _ in range(self._settings.identify_at_once):
                    nursery.start_soon(self._ask_each, comings)
                task_status.started()
        finally:
            self._host.swarm.watchers.remove(watch)
            self._host.review = list

    async def _look(self, ask: Callable[[Connection], None]) -> None:
        """Notice when this machine's addresses change, and forget what is old."""
        asked_at = self._changed_at
        while True:
            own = self._host.own_addresses
            if own != self._own:
                if self._own:
                    self._outer.clear()
                    self._start_over()
                self._own = own
            if self._is_seen_elsewhere():
                self._start_over()
            now = trio.current_time()
            if asked_at < self._changed_at <= now - self._settings.change_s:
                asked_at = now
                for connection in self._host.swarm.connections:
                    if connection not in self._sights:
                        ask(connection)
            for connection, sight in list(self._sights.items()):
                if connection.mux.is_closed:
                    del self._sights[connection]
                else:
                    self._observed.observe(*sight, now)
            self._observed.expire(now)
            self._update()
            await trio.sleep(self._settings.look_s)

    def _start_over(self) -> None:
        """The network has changed. What was known does not hold any more, and connections may lead nowhere."""
        logger.info("the network has changed: finding out again how this node can be reached")
        self._changed_at = trio.current_time()
        self._sights = {each: sight for each, sight in self._sights.items() if self._is_outer(sight[-1].ip)}
        self._observed.forget()
        for sight in self._sights.values():
            self._observed.observe(*sight, self._changed_at)
        self._seen_outside_at = None
        self.autonat.recheck()
        if self.mapper is not None:
            self.mapper.network_changed()
        self._host.swarm.network_changed()
        self._moved()

    async def _ask_each(self, comings: trio.MemoryReceiveChannel[Connection]) -> None:
        async for connection in comings:
            try:
                message = await identify_over(self._host, connection)
            except errors.NetError as error:
                logger.debug("%s does not identify itself: %s", connection.peer_id, error)
                continue
            self.autonat.met(connection, message.protocols)
            seen = endpoints.parse(message.observed_addr)
            if seen is not None:
                self._note(connection, seen)
            self._update()

    def _note(self, connection: Connection, seen: Multiaddr) -> None:
        observer = addresses.ip_group(connection.remote)
        where, local = endpoints.read(seen), None if connection.local is None else endpoints.read(connection.local)
        if observer is None or where is None or local is None:
            return
        now = trio.current_time()
        if endpoints.is_public(connection.remote) and self._observed.observe(observer, local, where, now):
            self._sights[connection] = (observer, local, where)
            logger.debug("%s sees our %s at %s", connection.peer_id, local, where)
            if self._seen_outside_at is None:
                self._seen_outside_at = now
            if self._is_seen_elsewhere():
                self._start_over()

    def _is_seen_elsewhere(self) -> bool:
        """Whether nobody sees us any more at any of the public IPs that we had: our router has been given another."""
        moved = False
        for version in (4, 6):
            live = {
                where.ip
                for connection, (_, _, where) in self._sights.items()
                if where.ip.version == version and not connection.mux.is_closed
            }
            before = self._outer.get(version, set())
            if live:
                moved |= bool(before) and live.isdisjoint(before)
                self._outer[version] = (before & live) or live  # who is behind a NAT with many is seen at some of them
        return moved

    def _is_outer(self, ip: IpAddress) -> bool:
        return ip in self._outer.get(ip.version, ())

    # Concluding

    def _update(self) -> None:
        if self.mapper is not None:
            self.mapper.want(self._ports_behind_nat())
        mapped = self._mapped()
        allows_private = self._settings.dial_back.allow_private
        own = [address for address in self._own if allows_private or endpoints.is_public(address)]
        self.autonat.watch([*own, *mapped, *self._observed_addresses(), *self._guesses()])
        if changed := set(mapped) ^ set(self._evidence.mapped):
            self.autonat.recheck(changed)  # a port that was guessed in vain may lead here now, or no longer
        verdicts = self.autonat.verdicts
        own_ips = own_ip_set(self._own)
        evidence = Evidence(
            own=self._own,
            mapped=mapped,
            outer_ips=self._observed.outer_ips(),
            tcp=self._observed.mapping("tcp", own_ips),
            udp=self._observed.mapping("udp", own_ips),
            verdicts={address: verdicts.of(address) for address in verdicts.addresses},
            is_settled=self._is_settled(),
        )
        kind = judge(evidence)
        if (evidence, kind) != (self._evidence, self.kind):
            self._evidence, self.kind = evidence, kind
            self._host.reachability = kind.value
            self._changed.set()
            self._changed = trio.Event()
        self._tell_relays()

    def _tell_relays(self) -> None:
        # Behind a NAT that was not asked for a port, who got in may be somebody to whom we had sent something: a
        # dial-back does not show that strangers get in, too, and until it comes nothing shows it.
        own_ips = own_ip_set(self._own)
        is_behind_nat = any(ip not in own_ips for ip in self._observed.outer_ips())
        if self.kind is Kind.UNKNOWN and not is_behind_nat and self._wanted:
            return  # after a change of the network: nothing has told yet that they are not needed any more
        hidden = self.kind in (Kind.PUNCHABLE, Kind.RELAY_ONLY) or (is_behind_nat and self.kind is not Kind.MAPPED)
        count = RESERVATIONS if hidden else 0
        if self._wanted is None or self._wanted != count:
            self._wanted = count
            self._want(count)

    def _is_settled(self) -> bool:
        since = self._seen_outside_at
        return since is not None and trio.current_time() - since >= self._settings.patience_s

    def _mapped(self) -> list[Multiaddr]:
        """Our listening addresses as they are outside of the router."""
        if self.mapper is None:
            return []
        found = []
        for address in self._host.listening:
            local = endpoints.read(address)
            port = None if local is None else Port(transport=local.transport, number=local.port)
            outer = None if port is None else self.mapper.mapped.get(port)
            if outer is not None and outer.is_public:
                found.append(endpoints.replaced(address, outer))
        return found

    def _ports_behind_nat(self) -> set[Port]:
        """What the router should let in: where we listen at private IPv4 addresses that are not this machine alone."""
        found = set()
        for address in self._own:
            local = endpoints.read(address)
            if local is not None and local.ip.version == 4 and local.ip.is_private and not local.ip.is_loopback:
                found.add(Port(transport=local.transport, number=local.port))
        return found

    def _observed_addresses(self) -> list[Multiaddr]:
        """Where enough others see what we listen on."""
        found = []
        for address in self._host.listening:
            local = endpoints.read(address)
            if local is not None:
                found += [endpoints.replaced(address, outer) for outer in self._observed.confirmed(local)]
        return found

    def _guesses(self) -> list[Multiaddr]:
        """Somebody may forward our very port to us. Worth a check, last of all, for the two outer IPs seen most."""
        own_ips = own_ip_set(self._own)
        found = []
        for ip in [ip for ip in self._observed.outer_ips() if ip not in own_ips][:2]:
            for address in self._host.listening:
                local = endpoints.read(address)
                if local is not None and local.ip.version == ip.version and not local.ip.is_loopback:
                    guess = Endpoint(ip=ip, transport=local.transport, port=local.port)
                    found.append(endpoints.replaced(address, guess))
        return found

    def _review(self, own: list[Multiaddr]) -> list[Multiaddr]:
        """``Host.review``."""
        return announced(self._evidence) if own == self._evidence.own else own
