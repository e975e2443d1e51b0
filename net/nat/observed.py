"""Where others see us, out of what many peers say: our outer addresses, and what kind of NAT there is. No I/O.

Each observation says: towards this observer, what we sent from this port of ours came from there. One observer may lie
or be misled, so that an address counts when observers of several networks saw it. What differs between observers
tells how the NAT maps (RFC 4787, section 4.1): one outer port for all is an endpoint-independent mapping, through
which peers can be met; another for each is address-dependent ("symmetric").
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

from net.nat.endpoints import Endpoint, IpAddress

# go-libp2p waits for four observers, which small swarms do not have. Here an address that two networks have seen is
# only a candidate: AutoNAT checks it before it is announced, so that two liars cost us one check.
CONFIRMATIONS = 2
OBSERVATION_S = 1800.0  # go-libp2p forgets after 40 minutes; renewed while the connection lives
MAX_PORTS = 32  # of ours that are watched; a host listens on few, and dials from few when it shares them
MAX_OBSERVERS = 64  # of each port


class Mapping(enum.Enum):
    """How the NAT between us and the others maps, as far as is known."""

    NONE = "none"  # others see us where we are
    ENDPOINT_INDEPENDENT = "endpoint-independent"
    ADDRESS_DEPENDENT = "address-dependent"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class _Port:
    """A port of ours. IPs are left out: which one is used is the kernel's affair, and 0.0.0.0 has them all."""

    version: int
    transport: str
    port: int


@dataclass(kw_only=True)
class _Seen:
    by: OrderedDict[str, tuple[Endpoint, float]] = field(default_factory=OrderedDict)  # observer's network: where, when


class ObservedAddresses:
    """What observers said lately."""

    def __init__(self, *, confirmations: int = CONFIRMATIONS) -> None:
        self._confirmations = confirmations
        self._ports: OrderedDict[_Port, _Seen] = OrderedDict()

    def observe(self, observer: str, local: Endpoint, seen: Endpoint, now: float) -> bool:
        """Somebody at the network ``observer`` (as ``addresses.ip_group`` names it) sees our ``local`` at ``seen``.

        Private addresses are no news, nor is what contradicts itself (another family or transport).

        Returns: whether that was heard.
        """
        if not seen.is_public or (seen.ip.version, seen.transport) != (local.ip.version, local.transport):
            return False
        port = _Port(version=local.ip.version, transport=local.transport, port=local.port)
        entry = self._ports.setdefault(port, _Seen())
        self._ports.move_to_end(port)
        entry.by[observer] = (seen, now)
        entry.by.move_to_end(observer)
        while len(entry.by) > MAX_OBSERVERS:
            entry.by.popitem(last=False)
        while len(self._ports) > MAX_PORTS:
            self._ports.popitem(last=False)
        return True

    def expire(self, now: float) -> None:
        """Forget what is older than ``OBSERVATION_S``."""
        for port, entry in list(self._ports.items()):
            for observer, (_, at) in list(entry.by.items()):
                if now - at >= OBSERVATION_S:
                    del entry.by[observer]
            if not entry.by:
                del self._ports[port]

    def forget(self) -> None:
        """The network has changed: nothing of it holds any more."""
        self._ports.clear()

    def confirmed(self, local: Endpoint) -> list[Endpoint]:
        """Where enough observers see this port of ours, those with most observers first."""
        return [seen for seen, count in self._counted(local) if count >= self._confirmations]

    def outer_ips(self) -> list[IpAddress]:
        """The public IPs that anybody saw, whatever the port, those with most observers first."""
        observers: dict[IpAddress, set[str]] = {}
        for entry in self._ports.values():
            for observer, (seen, _) in entry.by.items():
                observers.setdefault(seen.ip, set()).add(observer)
        return sorted(observers, key=lambda ip: (-len(observers[ip]), int(ip)))

    def mapping(self, transport: str, own: Collection[IpAddress]) -> Mapping:
        """What the observations of ``tcp`` or ``udp`` ports tell.

        Args:
            transport: which.
            own: the IPs of this machine; who is seen at one of them is behind no NAT.
        """
        kinds = set()
        for port, entry in self._ports.items():
            seen = [where for where, _ in entry.by.values()]
            if port.transport != transport:
                continue
            if all(where.ip in own and where.port == port.port for where in seen):
                kinds.add(Mapping.NONE)
            elif len(seen) >= self._confirmations:
                kinds.add(self._compared(seen))
        for kind in (Mapping.ADDRESS_DEPENDENT, Mapping.ENDPOINT_INDEPENDENT, Mapping.NONE):
            if kind in kinds:
                return kind
        return Mapping.UNKNOWN

    def _compared(self, seen: list[Endpoint]) -> Mapping:
        """One outer endpoint that enough observers agree on outweighs a few that say otherwise: they may lie, or it
        may have changed; most of them elsewhere is a NAT that maps for each anew."""
        most = max(seen.count(where) for where in set(seen))
        if most >= self._confirmations and 2 * most > len(seen):
            return Mapping.ENDPOINT_INDEPENDENT
        return Mapping.ADDRESS_DEPENDENT if 2 * most <= len(seen) or most == 1 else Mapping.UNKNOWN

    def _counted(self, local: Endpoint) -> list[tuple[Endpoint, int]]:
        entry = self._ports.get(_Port(version=local.ip.version, transport=local.transport, port=local.port))
        if entry is None:
            return []
        seen = [where for where, _ in entry.by.values()]
        return sorted(((where, seen.count(where)) for where in dict.fromkeys(seen)), key=lambda item: -item[1])
