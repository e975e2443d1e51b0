"""Which addresses are dialled because somebody says that a peer is there. No I/O.

Whoever has us dial must gain no way into networks that it cannot reach itself: it may name public addresses, those of
the network that it calls from, and, from this machine, any. All else is for us to know, from the peer itself. What came
through a WebSocket from this machine may have come through a proxy on it, from anywhere.

A network is what private addresses mean something in: loopback, link-local addresses, each block of private IPv4
addresses (RFC 1918) and shared ones (RFC 6598), each /48 of unique local IPv6 ones (RFC 4193). Of two homes with the
same block only one is that which the asker calls from without a NAT between, which is ours. An address through a relay
counts as its relay's; a name could mean anything.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

from net.addresses import Multiaddr, is_relayed, relay_of
from net.nat import endpoints

LOOPBACK: Final = "loopback"
PUBLIC: Final = "public"
_SHARED: Final = [
    ipaddress.ip_network(text) for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")
]
_UNIQUE_LOCAL: Final = ipaddress.ip_network("fc00::/7")


def network_of(address: Multiaddr) -> str | None:
    """Where an address means something; ``None`` for names, for what nobody can be reached at, and for relayed ones."""
    if is_relayed(address):
        return None
    endpoint = endpoints.read(address)
    if endpoint is None:
        kind = endpoints.shape(address)[0]
        return kind if kind == "memory" else None
    ip = endpoint.ip
    if ip.is_unspecified or ip.is_multicast:
        return None
    if ip.is_loopback:
        return LOOPBACK
    if ip.is_link_local:
        return f"link-local {ip.version}"
    for block in _SHARED:
        if ip.version == 4 and ip in block:
            return str(block)
    if ip.version == 6 and ip in _UNIQUE_LOCAL:
        return str(ipaddress.ip_network((ip, 48), strict=False))
    return PUBLIC if endpoint.is_public else None


def worth_dialling(addresses: Iterable[Multiaddr], asked_from: Multiaddr) -> list[Multiaddr]:
    """Those of ``addresses`` that somebody may have us dial who calls from ``asked_from``."""
    is_proxied = not {"ws", "wss"}.isdisjoint(endpoints.shape(asked_from))
    asker = None if is_proxied else network_of(asked_from)
    return [address for address in addresses if _may_name(asker, address)]


def _may_name(asker: str | None, address: Multiaddr) -> bool:
    if is_relayed(address):
        relay = relay_of(address)
        return relay is not None and _may_name(asker, relay.address)
    if asker == LOOPBACK:
        return True
    where = network_of(address)
    return where is not None and where in (PUBLIC, asker)
