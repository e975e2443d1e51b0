"""An address as NATs and firewalls see it: an IP, TCP or UDP, and a port. What is above does not matter to them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from multiaddr.exceptions import Error as MultiaddrError

from net.addresses import Multiaddr, parse_bytes
from net.errors import AddressError

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """``transport`` is ``tcp`` or ``udp``."""

    ip: IpAddress
    transport: str
    port: int

    @property
    def is_public(self) -> bool:
        return self.ip.is_global and not self.ip.is_multicast

    @property
    def is_private(self) -> bool:
        """Whether it means something within one network alone, but to all of that."""
        ip = self.ip
        return ip.is_private and not (ip.is_loopback or ip.is_link_local or ip.is_unspecified)

    def __str__(self) -> str:
        host = f"[{self.ip}]" if self.ip.version == 6 else str(self.ip)
        return f"{host}:{self.port}/{self.transport}"


def parse(data: bytes) -> Multiaddr | None:
    """An address out of a peer's bytes; None when they are none."""
    try:
        return parse_bytes(data)
    except AddressError:
        return None


def read(address: Multiaddr) -> Endpoint | None:
    """The endpoint of ``/ip4|ip6/IP/tcp|udp/PORT...``; None for names, relayed addresses and other kinds."""
    try:
        parts = [(protocol.name, value) for protocol, value in address.items()]
        if len(parts) < 2 or any(name == "p2p-circuit" for name, _ in parts):
            return None
        (kind, host), (transport, port) = parts[:2]
        if kind not in ("ip4", "ip6") or transport not in ("tcp", "udp") or host is None or port is None:
            return None
        ip = ipaddress.ip_address(str(host))
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        return Endpoint(ip=ip, transport=transport, port=int(port))
    except (MultiaddrError, ValueError, KeyError):  # bytes that are no address, which the library reads lazily
        return None


def is_public(address: Multiaddr) -> bool:
    """Whether it is an IP address that anybody on the internet could mean the same by."""
    endpoint = read(address)
    return endpoint is not None and endpoint.is_public


def replaced(address: Multiaddr, endpoint: Endpoint) -> Multiaddr:
    """``address``, of which ``read`` finds an endpoint, with another IP and port: ``/ws`` and the like stay."""
    rest = str(address).split("/", 5)[5:]
    text = f"/ip{endpoint.ip.version}/{endpoint.ip}/{endpoint.transport}/{endpoint.port}"
    return Multiaddr("/".join([text, *rest]))


def shape(address: Multiaddr) -> tuple[str, ...]:
    """Which protocols it is made of, such as ``("ip4", "tcp", "ws")``."""
    return tuple(protocol.name for protocol, _ in address.items())
