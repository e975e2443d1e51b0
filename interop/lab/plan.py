"""The plumbing of the simulated internet as text for ``ip -batch``; nothing here needs root.

    core (a process) ===TUN=== wan0 [router of a home] lan0 ---veth--- eth0 [host]
                     ===TUN=== wan0 [public host]                --- wan0 [router of a home inside the home]

Every box is a network namespace. Addresses look public to those who ask (``ipaddress.is_global``), and no two
uplinks share an IPv4 /16 or an IPv6 /48, so that limits per network do not join what is apart. Homes all use
192.168.1.0/24, as homes do: a private address that a peer tells leads somewhere else, or nowhere.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, replace

from interop.lab.nat import LAN, WAN

# bbr hides loss, and cubic cannot be made a namespace's default unless the first one allows it; routes can name it.
CONGESTION = "congctl cubic"
FIRST_HOST = 10
MAX_HOSTS = 200
MAX_UPLINKS = 500


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Of one interface. ``ipv6`` is a network for an uplink (routed to it), an address for a host."""

    ipv4: str | None = None
    ipv6: str | None = None


def uplink_addresses(number: int, *, ipv4: bool = True, ipv6: bool = False) -> Addresses:
    """The public addresses of the ``number``-th uplink, from 0.

    Raises:
        ValueError: there are too many.
    """
    if not 0 <= number < MAX_UPLINKS:
        raise ValueError(f"at most {MAX_UPLINKS} uplinks have addresses")
    return Addresses(
        ipv4=f"{77 + number // 250}.{number % 250 + 1}.0.1" if ipv4 else None,
        ipv6=f"2a00:{number + 1:x}:0:1::/64" if ipv6 else None,
    )


def within(network: str, number: int) -> str:
    """The ``number``-th address of a network, without the prefix length."""
    return str(ipaddress.ip_network(network)[number])


def lan_network(depth: int) -> str:
    """What homes use inside; ``depth`` is how many other homes lie around."""
    return f"192.168.{depth + 1}.0/24"


def route_keys(addresses: Addresses) -> list[bytes]:
    """What the core finds an uplink by: its IPv4 address, and the first half of its IPv6 addresses."""
    keys = []
    if addresses.ipv4 is not None:
        keys.append(ipaddress.ip_address(addresses.ipv4).packed)
    if addresses.ipv6 is not None:
        keys.append(ipaddress.ip_network(addresses.ipv6).network_address.packed[:8])
    return keys


def namespaces(names: Sequence[str]) -> list[str]:
    return [f"netns add {name}" for name in names]


def cable(*, inside: str, device: str, router: str, port: str) -> list[str]:
    """From ``device`` of a machine to a port of the router's switch. Run it outside of both."""
    return [f"link add name {device} netns {inside} type veth peer name {port} netns {router}"]


def plug(port: str) -> list[str]:
    """In the router: join a cable's end to the switch."""
    return [f"link set {port} addrgenmode none master {LAN} up"]


def lan(network: str, prefix6: str | None = None) -> list[str]:
    """In a router: the switch and the router's own address on it. ``prefix6`` is the home's /64."""
    lines = [
        "link set lo up",
        f"link add {LAN} type bridge",
        f"link set {LAN} addrgenmode none up",
        f"addr add {within(network, 1)}/{network.split('/')[1]} dev {LAN}",
    ]
    if prefix6 is not None:
        lines.append(f"addr add {within(prefix6, 1)}/64 dev {LAN} nodad")
    return lines


def renumber_lan6(old: str, new: str) -> list[str]:
    """In a router: another /64, as a provider hands out from time to time."""
    return [f"addr del {within(old, 1)}/64 dev {LAN}", f"addr add {within(new, 1)}/64 dev {LAN} nodad"]


def wan(addresses: Addresses, *, routed6: bool = False) -> list[str]:
    """At the end of an uplink: addresses and default routes.

    Args:
        addresses: of the uplink.
        routed6: the IPv6 network belongs to what is behind, not to this machine.
    """
    lines = ["link set lo up", f"link set {WAN} addrgenmode none up"]
    if addresses.ipv4 is not None:
        lines.append(f"addr add {addresses.ipv4}/32 dev {WAN}")
        lines.append(f"route add default dev {WAN} {CONGESTION}")
    if addresses.ipv6 is not None:
        if not routed6:
            lines.append(f"addr add {within(addresses.ipv6, 1)}/128 dev {WAN} nodad")
        lines.append(f"route add ::/0 dev {WAN} {CONGESTION}")
    return lines


def clear(device: str) -> list[str]:
    """Take all addresses from a device. Down, for only that removes all routes too."""
    return [f"link set {device} down", f"addr flush dev {device}"]


def host_addresses(network: str, prefix6: str | None, number: int) -> Addresses:
    """Of the ``number``-th machine of a home, from 0.

    Raises:
        ValueError: the home is full.
    """
    if not 0 <= number < MAX_HOSTS:
        raise ValueError(f"at most {MAX_HOSTS} machines in a home")
    return Addresses(
        ipv4=within(network, FIRST_HOST + number),
        ipv6=None if prefix6 is None else within(prefix6, FIRST_HOST + number),
    )


def attach(device: str, addresses: Addresses, *, network: str, prefix6: str | None, ipv4: bool = True) -> list[str]:
    """In a machine of a home: its addresses, and the router as the way out."""
    lines = ["link set lo up", f"link set {device} addrgenmode none up"]
    if addresses.ipv4 is not None and ipv4:
        lines.append(f"addr add {addresses.ipv4}/{network.split('/')[1]} dev {device}")
        lines.append(f"route add default via {within(network, 1)} dev {device} {CONGESTION}")
    if addresses.ipv6 is not None and prefix6 is not None:
        lines.append(f"addr add {addresses.ipv6}/64 dev {device} nodad")
        lines.append(f"route add ::/0 via {within(prefix6, 1)} dev {device} {CONGESTION}")
    return lines


def detach(device: str) -> list[str]:
    """In a machine of a home: pull the cable out; both its ends vanish."""
    return [f"link del {device}"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """What an uplink does to packets.

    Attributes:
        rtt_ms: what it adds to a round trip, half each way. Between two machines their uplinks' add up.
        up_mbit, down_mbit: None for no limit.
        loss: the share of packets lost, each way.
        queue_ms: how long a packet can wait for its turn before a limit; what would wait longer is dropped.
        is_up: False loses everything, in silence, as a cut cable behind the router does.
    """

    rtt_ms: float = 0.0
    up_mbit: float | None = None
    down_mbit: float | None = None
    loss: float = 0.0
    queue_ms: float = 50.0
    is_up: bool = True

    def __post_init__(self) -> None:
        if self.rtt_ms < 0 or self.queue_ms <= 0 or not 0 <= self.loss <= 1:
            raise ValueError(f"no line is like that: {self}")
        if any(rate is not None and rate <= 0 for rate in (self.up_mbit, self.down_mbit)):
            raise ValueError(f"a rate is more than nothing: {self}")

    def changed(self, **changes: float | bool | None) -> Line:
        """Another line. ``mbit`` stands for both rates."""
        if "mbit" in changes:
            both = changes.pop("mbit")
            changes = {"up_mbit": both, "down_mbit": both, **changes}
        return replace(self, **changes)  # type: ignore[arg-type]  # the names are checked by replace
