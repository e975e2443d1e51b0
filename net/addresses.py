"""Multiaddrs as people write them, and what we read out of them."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

import ifaddr
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from net.errors import AddressError
from net.identity import PeerId

__all__ = [
    "Multiaddr",
    "PeerAddress",
    "beside",
    "host_port",
    "ip_group",
    "is_relayed",
    "parse",
    "parse_peer",
    "quic",
    "quic_host_port",
    "relay_of",
    "relayed_by",
    "spell_out",
    "tcp",
    "websocket_host_port",
]

EXAMPLE = "/ip4/203.0.113.7/tcp/4001/p2p/12D3Koo..."
MAX_ADDRESS_CHARACTERS = 1024
CIRCUIT = "/p2p-circuit"


@dataclass(frozen=True, kw_only=True)
class PeerAddress:
    """Where a peer is (``address``, without ``/p2p/...``) and who it is."""

    address: Multiaddr
    peer_id: PeerId

    def __str__(self) -> str:
        return f"{self.address}/p2p/{self.peer_id}"


def parse(text: str) -> Multiaddr:
    """Spaces around it, as copying brings along, do not matter.

    Raises:
        AddressError: the text is no multiaddr.
    """
    text = text.strip()
    if len(text) > MAX_ADDRESS_CHARACTERS:
        raise AddressError(f"address of {len(text)} characters: at most {MAX_ADDRESS_CHARACTERS} are read")
    try:
        address = Multiaddr(text)
        check(address)
        return address
    except (MultiaddrError, ValueError, TypeError, KeyError, IndexError) as error:
        raise AddressError(f"{text!r} is not a multiaddr (an address looks like {EXAMPLE})") from error


def parse_bytes(data: bytes) -> Multiaddr:
    """An address out of a peer's bytes.

    Raises:
        AddressError: they are none.
    """
    try:
        address = Multiaddr(data)
        check(address)
        return address
    except (MultiaddrError, ValueError, TypeError, KeyError, IndexError) as error:
        raise AddressError("bytes that are no multiaddr") from error


def check(address: Multiaddr) -> None:
    """See now what the library would find out later: it reads lazily, and takes what was cut short for zeros.

    Raises: whatever the library raises, or ValueError.
    """
    list(address.items())
    if Multiaddr(str(address)).to_bytes() != address.to_bytes():
        raise ValueError("written out and read again, it is another")


def parse_peer(text: str) -> PeerAddress:
    """Read an address that ends in ``/p2p/PEERID``.

    Raises:
        AddressError: no multiaddr, or it does not say which peer is meant.
    """
    whole = parse(text)
    peer_text = whole.get_peer_id()
    if peer_text is None:
        raise AddressError(f"{text!r} does not say which peer is there: it must end in /p2p/PEERID, as in {EXAMPLE}")
    return PeerAddress(
        address=whole.decapsulate_code(421),
        peer_id=PeerId.from_string(peer_text),
    )


def host_port(address: Multiaddr) -> tuple[str, int] | None:
    """The host and TCP port of ``/ip4|ip6|dns*/HOST/tcp/PORT``; None for anything else."""
    return _host_port(address, ["tcp"])


def websocket_host_port(address: Multiaddr) -> tuple[str, int] | None:
    """The host and TCP port of ``/ip4|ip6|dns*/HOST/tcp/PORT/ws``; None for anything else."""
    return _host_port(address, ["tcp", "ws"])


def quic_host_port(address: Multiaddr) -> tuple[str, int] | None:
    """The host and UDP port of ``/ip4|ip6|dns*/HOST/udp/PORT/quic-v1``; None for anything else."""
    return _host_port(address, ["udp", "quic-v1"])


def _host_port(address: Multiaddr, protocols: list[str]) -> tuple[str, int] | None:
    parts = [(protocol.name, value) for protocol, value in address.items()]
    if [name for name, _ in parts[1:]] != protocols:
        return None
    (kind, host), (_, port) = parts[:2]
    if kind not in ("ip4", "ip6", "dns", "dns4", "dns6") or host is None or port is None:
        return None
    return str(host), int(port)


def tcp(host: str, port: int) -> Multiaddr:
    """The multiaddr of a numeric host and a TCP port."""
    host = host.partition("%")[0]
    kind = "ip6" if ":" in host else "ip4"
    return Multiaddr(f"/{kind}/{host}/tcp/{port}")


def quic(host: str, port: int) -> Multiaddr:
    """The multiaddr of a numeric host and a UDP port that speaks QUIC v1."""
    host = host.partition("%")[0]
    kind = "ip6" if ":" in host else "ip4"
    return Multiaddr(f"/{kind}/{host}/udp/{port}/quic-v1")


def beside(address: Multiaddr, bound: Sequence[Multiaddr]) -> Multiaddr | None:
    """``address``, which leaves its UDP port open, with the number of a TCP port bound at the same IP.

    One number is easier to remember, and to forward through a router, than two. None: there is no such.
    """
    where = quic_host_port(address)
    if where is None or where[1] != 0:
        return None
    ports = [found[1] for found in map(host_port, bound) if found is not None and found[0] == where[0]]
    return quic(where[0], ports[0]) if ports else None


def ip_group(address: Multiaddr) -> str | None:
    """What one household can have many of: the IPv4 address or the IPv6 /56. None where limits do not apply.

    Loopback has no group: whoever is on this machine is not a stranger from one network.
    """
    for protocol, value in address.items():
        if protocol.name in ("ip4", "ip6"):
            ip = ipaddress.ip_address(str(value))
            if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
                ip = ip.ipv4_mapped
            if ip.is_loopback:
                return None
            prefix = 32 if ip.version == 4 else 56
            return str(ipaddress.ip_network(f"{ip}/{prefix}", strict=False))
    return None


def is_relayed(address: Multiaddr) -> bool:
    """Whether it leads through a relay: ``.../p2p/RELAY/p2p-circuit``."""
    return CIRCUIT in str(address)


def relayed_by(relay: PeerAddress) -> Multiaddr:
    """Where a relay's circuits begin, without ``/p2p/...`` of whom they lead to."""
    return Multiaddr(f"{relay}{CIRCUIT}")


def relay_of(address: Multiaddr) -> PeerAddress | None:
    """The relay that an address of ``relayed_by``'s form names; None for all else, a relay behind a relay included."""
    where, found, rest = str(address).partition(CIRCUIT)
    if not found or rest:
        return None
    try:
        return parse_peer(where)
    except AddressError:
        return None


def spell_out(address: Multiaddr) -> list[Multiaddr]:
    """An address that others can dial: ``0.0.0.0`` and ``::`` become this machine's own addresses.

    Public ones come first, loopback last.
    """
    text = str(address)
    kind, wildcard = ("ip6", "/ip6/::/") if text.startswith("/ip6/") else ("ip4", "/ip4/0.0.0.0/")
    if not text.startswith(wildcard):
        return [address]
    version = int(kind[-1])
    found: set[ipaddress.IPv4Address | ipaddress.IPv6Address] = set()
    for adapter in ifaddr.get_adapters():
        for entry in adapter.ips:
            ip = ipaddress.ip_address(entry.ip if isinstance(entry.ip, str) else entry.ip[0])
            if ip.version == version and not ip.is_link_local:
                found.add(ip)
    ordered = sorted(found, key=lambda ip: (ip.is_loopback, not ip.is_global, int(ip)))
    hosts = [str(ip) for ip in ordered] or ["127.0.0.1" if version == 4 else "::1"]
    return [Multiaddr(f"/{kind}/{host}/{text.removeprefix(wildcard)}") for host in hosts]
