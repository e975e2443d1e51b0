"""Which addresses we dial because a client says that a node is there."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from net.addresses import parse, tcp
from net.hearsay import network_of, worth_dialling

PUBLIC = "/ip4/93.184.216.34/tcp/4001"
RELAY = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
INNER = [
    "/ip4/127.0.0.1/tcp/22",
    "/ip4/10.1.2.3/tcp/4001",
    "/ip4/172.20.0.1/tcp/4001",
    "/ip4/192.168.1.1/tcp/80",
    "/ip4/100.64.3.4/tcp/4001",
    "/ip4/169.254.169.254/tcp/80",
    "/ip6/::1/tcp/22",
    "/ip6/fe80::1/tcp/4001",
    "/ip6/fd00:1:2::3/tcp/4001",
    "/memory/1",
]


def heeded(asker: str, *named: str) -> list[str]:
    return [str(address) for address in worth_dialling(map(parse, named), parse(asker))]


@pytest.mark.parametrize(
    "asker", [PUBLIC, f"{PUBLIC}/p2p/{RELAY}/p2p-circuit", "/ip4/127.0.0.1/tcp/9/ws", "/ip4/192.168.1.9/tcp/9/ws"]
)
def test_who_is_elsewhere_may_name_public_addresses_alone(asker: str) -> None:
    for inner in INNER:
        assert not heeded(asker, inner, f"{inner}/p2p/{RELAY}/p2p-circuit")
    names = ["/dns4/router.home/tcp/80", "/dns/example.com/tcp/4001"]
    nowhere = ["/ip4/0.0.0.0/tcp/22", "/ip4/224.0.0.1/udp/9/quic-v1", "/ip4/255.255.255.255/tcp/1", "/ip6/::/tcp/22"]
    disguised = ["/ip6/::ffff:192.168.1.1/tcp/80", "/ip6/::ffff:127.0.0.1/tcp/80"]
    assert not heeded(asker, *names, *nowhere, *disguised)
    public = [PUBLIC, "/ip6/2606:2800:220:1::1/udp/4001/quic-v1", f"{PUBLIC}/p2p/{RELAY}/p2p-circuit"]
    assert heeded(asker, *public) == public


@pytest.mark.parametrize(
    ("asker", "same", "other"),
    [
        ("/ip4/192.168.1.9/tcp/9", "/ip4/192.168.7.1/tcp/4001", "/ip4/10.0.0.1/tcp/4001"),
        ("/ip4/10.9.9.9/tcp/9", "/ip4/10.0.0.1/udp/4001/quic-v1", "/ip4/127.0.0.1/tcp/22"),
        ("/ip4/100.64.0.1/tcp/9", "/ip4/100.100.0.1/tcp/4001", "/ip4/192.168.7.1/tcp/4001"),
        ("/ip6/fd00:1:2::9/tcp/9", "/ip6/fd00:1:2:3::1/tcp/4001", "/ip6/fd00:1:3::1/tcp/4001"),
        ("/ip6/::ffff:192.168.1.9/tcp/9", "/ip4/192.168.1.8/tcp/4001", "/ip6/::1/tcp/22"),
        ("/memory/1", "/memory/2", "/ip4/127.0.0.1/tcp/22"),
    ],
)
def test_who_is_in_a_network_may_name_addresses_in_it(asker: str, same: str, other: str) -> None:
    assert heeded(asker, same, other, PUBLIC) == [same, PUBLIC]


@pytest.mark.parametrize("asker", ["/ip4/127.0.0.1/tcp/9", "/ip6/::1/udp/9/quic-v1"])
def test_who_is_on_this_machine_may_name_any(asker: str) -> None:
    assert heeded(asker, *INNER, PUBLIC) == [*INNER, PUBLIC]


@given(asker=st.ip_addresses(), named=st.ip_addresses())
def test_nobody_gains_a_network(asker: ipaddress.IPv4Address, named: ipaddress.IPv4Address) -> None:
    where, there = tcp(str(asker), 9), tcp(str(named), 4001)
    if worth_dialling([there], where) and network_of(where) != "loopback":
        assert network_of(there) in ("public", network_of(where))
        assert not named.is_loopback
