"""The simulated internet without root: when its core delivers what, its addresses, and its rules as text."""

from __future__ import annotations

import ipaddress
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interop.lab import nat, plan
from interop.lab.core import Port, Star
from interop.lab.network import internet
from interop.lab.nodes import Reached
from interop.lab.paths import way
from interop.lab.plan import Line


class Pair:
    """Two uplinks on a star, and what comes out of it."""

    def __init__(self, one: Line, other: Line, seed: int = 0) -> None:
        self.star = Star(random.Random(seed))
        self.addresses = [plan.uplink_addresses(number, ipv6=True) for number in range(2)]
        self.one, self.other = self._port("one", one, 0), self._port("other", other, 1)

    def _port(self, name: str, line: Line, number: int) -> Port:
        port = self.star.add(name, number)
        port.set(line)
        self.star.route(name, plan.route_keys(self.addresses[number]))
        return port

    def packet(self, size: int = 1250, number: int = 1) -> bytes:
        address = ipaddress.ip_address(str(self.addresses[number].ipv4)).packed
        return (bytes([0x45]) + bytes(15) + address).ljust(size, b".")

    def arrivals(self, now: float = 0.0) -> list[float]:
        """Until nothing is under way any more: when packets came out."""
        found = []
        while (wait_s := self.star.wait_s(now)) < 3600:
            now += wait_s
            found += [now] * len(self.star.due(now + 1e-9))
        return found


def test_each_line_adds_half_its_round_trip() -> None:
    pair = Pair(Line(rtt_ms=40), Line(rtt_ms=100))
    pair.star.offer(pair.one, pair.packet(), 0.0)
    assert pair.star.due(0.0699) == []
    assert pair.star.due(0.0701) == [(pair.other, pair.packet())]


def test_ipv6_is_routed_by_the_home_not_the_host() -> None:
    pair = Pair(Line(), Line())
    address = ipaddress.ip_address(plan.within(str(pair.addresses[1].ipv6), 12)).packed
    pair.star.offer(pair.one, bytes([0x60]) + bytes(23) + address, 0.0)
    assert [port for port, _ in pair.star.due(0.0)] == [pair.other]


def test_an_address_that_was_given_up_leads_nowhere() -> None:
    pair = Pair(Line(), Line())
    old = pair.packet()
    pair.star.route("other", plan.route_keys(plan.uplink_addresses(7)))
    pair.star.offer(pair.one, old, 0.0)
    assert pair.star.due(1.0) == []
    assert pair.one.counters.unroutable == 1


@pytest.mark.parametrize(
    ("one", "other"), [(Line(up_mbit=10, queue_ms=1000), Line()), (Line(), Line(down_mbit=10, queue_ms=1000))]
)
def test_a_rate_spaces_packets(one: Line, other: Line) -> None:
    pair = Pair(one, other)
    for _ in range(20):
        pair.star.offer(pair.one, pair.packet(1250), 0.0)
    assert pair.arrivals() == pytest.approx([0.001 * (number + 1) for number in range(20)])  # 10 kbit at 10 Mbit/s


@pytest.mark.parametrize(
    ("one", "other"), [(Line(up_mbit=10, queue_ms=5), Line()), (Line(), Line(down_mbit=10, queue_ms=5))]
)
def test_what_would_wait_longer_than_the_queue_is_dropped(one: Line, other: Line) -> None:
    pair = Pair(one, other)
    for _ in range(20):
        pair.star.offer(pair.one, pair.packet(1250), 0.0)
    assert 5 <= len(pair.arrivals()) <= 6
    assert pair.one.counters.overflowed + pair.other.counters.overflowed >= 14


def test_loss_counts_on_both_lines_and_a_cut_line_loses_all() -> None:
    pair = Pair(Line(loss=0.1), Line(loss=0.1))
    for _ in range(10_000):
        pair.star.offer(pair.one, pair.packet(20), 0.0)
    assert len(pair.star.due(0.0)) == pytest.approx(8100, abs=160)
    pair.other.set(Line(is_up=False))
    pair.star.offer(pair.one, pair.packet(), 0.0)
    assert pair.star.due(1.0) == []


@given(st.lists(st.tuples(st.floats(0, 0.01), st.integers(20, 1500)), max_size=50), st.integers(1, 100))
def test_a_line_keeps_the_order_and_never_beats_its_rate(offers: list[tuple[float, int]], mbit: int) -> None:
    pair = Pair(Line(rtt_ms=10, up_mbit=mbit, queue_ms=1e6), Line(rtt_ms=6, down_mbit=2 * mbit, queue_ms=1e6))
    now = 0.0
    for gap_s, size in offers:
        now += gap_s
        pair.star.offer(pair.one, pair.packet(size), now)
    last_at, arrived = 0.008, []
    at = 0.0
    while (wait_s := pair.star.wait_s(at)) < 3600:
        at += wait_s
        for _, packet in pair.star.due(at + 1e-9):
            assert at >= last_at + len(packet) * 8e-6 / (2 * mbit) - 1e-6
            last_at = at
            arrived.append(len(packet))
    assert arrived == [size for _, size in offers]


def test_thirteen_of_sixteen_pairs_can_punch() -> None:
    hopeless = [(one, other) for one in nat.KINDS for other in nat.KINDS if not nat.can_punch(one, other)]
    assert sorted(hopeless) == [
        ("port-restricted", "symmetric"),
        ("symmetric", "port-restricted"),
        ("symmetric", "symmetric"),
    ]


@pytest.mark.parametrize(
    ("inner", "outer", "together"),
    [
        ("full-cone", "full-cone", "full-cone"),
        ("port-restricted", "full-cone", "port-restricted"),
        ("port-restricted", "symmetric", "symmetric"),
        ("symmetric", "address-restricted", "symmetric"),
    ],
)
def test_two_levels_are_as_strict_as_the_stricter_one(inner: str, outer: str, together: str) -> None:
    assert nat.nested(inner, outer) == nat.nested(outer, inner) == together


@pytest.mark.parametrize(
    ("remote", "words"),
    [
        ("/ip4/77.1.0.1/tcp/4001", "direct ipv4 tcp"),
        ("/ip4/192.168.1.11/udp/4001/quic-v1", "direct private ipv4 quic"),
        ("/ip6/2a00:1:0:1::a/udp/4001/quic-v1", "direct ipv6 quic"),
    ],
)
def test_a_path_is_told_in_words(remote: str, words: str) -> None:
    assert way(Reached(connected=True, direct=True, remote=remote)) == words
    assert way(Reached(connected=True, direct=False, remote=remote)) == "relayed"
    assert way(Reached(connected=False, direct=False)) == "nothing"


def test_only_filters_that_know_strangers_let_them_in() -> None:
    admitting = {
        kind: [line.strip() for line in nat.ruleset(kind).splitlines() if 'iifname "wan0"' in line and "dnat" in line]
        for kind in nat.KINDS
    }
    assert all("contacted" not in rule for rule in admitting["full-cone"])
    assert admitting["full-cone"]
    assert all("ip saddr @" in rule for rule in admitting["address-restricted"])
    assert admitting["address-restricted"]
    assert admitting["port-restricted"] == admitting["symmetric"] == []


def test_a_ruleset_replaces_the_old_one_whole() -> None:
    text = nat.ruleset("full-cone", hairpin=True, udp=False)
    assert text.startswith("flush ruleset\n")
    assert text.count("{") == text.count("}")
    assert "meta l4proto udp drop" in text


@pytest.mark.parametrize(("kind", "hairpin"), [("cone", False), ("symmetric", True), (None, True)])
def test_a_home_that_cannot_be_is_refused_while_drawing(kind: str | None, hairpin: bool) -> None:
    with pytest.raises(ValueError, match=r"NAT|hairpin"):
        internet().home(nat=kind, hairpin=hairpin)


def test_uplinks_look_public_and_share_no_network() -> None:
    uplinks = [plan.uplink_addresses(number, ipv6=True) for number in range(plan.MAX_UPLINKS)]
    fours = [ipaddress.ip_address(str(uplink.ipv4)) for uplink in uplinks]
    sixes = [ipaddress.ip_network(str(uplink.ipv6)) for uplink in uplinks]
    assert all(address.is_global for address in fours)
    assert all(network[1].is_global for network in sixes)
    assert len({address.packed[:2] for address in fours}) == plan.MAX_UPLINKS
    assert len({network.network_address.packed[:6] for network in sixes}) == plan.MAX_UPLINKS


def test_homes_within_homes_have_networks_of_their_own() -> None:
    outer = internet().home()
    inner = outer.home()
    assert {outer.network, inner.network, inner.home().network} == {
        "192.168.1.0/24",
        "192.168.2.0/24",
        "192.168.3.0/24",
    }
