"""What reachability is concluded from: observations, verdicts, bytes of messages and of routers. No I/O."""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from net.addresses import Multiaddr, parse, tcp
from net.errors import NetError, RemoteProtocolError
from net.nat import endpoints, messages, pcp
from net.nat.dialback import DialBackSettings, RateLimiter
from net.nat.endpoints import Endpoint
from net.nat.gateway import GatewayError, Port
from net.nat.messages import DialDataRequest, DialDataResponse, DialRequest, DialResponse
from net.nat.observed import MAX_OBSERVERS, MAX_PORTS, OBSERVATION_S, Mapping, ObservedAddresses
from net.nat.reachability import Evidence, Kind, announced, judge
from net.nat.verdicts import MAX_PAUSE_S, REACHABLE_S, UNREACHABLE_S, UNSURE_S, Verdict, Verdicts
from net.protocol.announcement import NodeAnnouncement
from tests.unit import announcements


def at(ip: str, port: int = 4001, transport: str = "tcp") -> Endpoint:
    return Endpoint(ip=ipaddress.ip_address(ip), transport=transport, port=port)


# Endpoints


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/ip4/45.1.0.1/tcp/4001", at("45.1.0.1")),
        ("/ip4/45.1.0.1/tcp/4001/ws", at("45.1.0.1")),
        ("/ip6/2a00:1::1/udp/4001/quic-v1", at("2a00:1::1", transport="udp")),
        ("/ip6/::ffff:45.1.0.1/tcp/1", at("45.1.0.1", 1)),
        ("/dns4/example.org/tcp/4001", None),
        ("/memory/1", None),
        (f"/ip4/45.1.0.1/tcp/4001/p2p/{'12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA'}/p2p-circuit", None),
    ],
)
def test_endpoints_of_addresses(text: str, expected: Endpoint | None) -> None:
    assert endpoints.read(parse(text)) == expected


def test_an_endpoint_is_put_into_an_address() -> None:
    assert endpoints.replaced(parse("/ip4/0.0.0.0/tcp/1/ws"), at("45.1.0.1")) == parse("/ip4/45.1.0.1/tcp/4001/ws")
    assert endpoints.replaced(parse("/ip4/10.0.0.1/tcp/1"), at("45.1.0.1")) == parse("/ip4/45.1.0.1/tcp/4001")


@given(st.binary(max_size=40))
def test_no_bytes_of_a_peer_break_the_reading_of_addresses(data: bytes) -> None:
    address = endpoints.parse(data)
    if address is not None:
        endpoints.read(address)


# Observations


def test_an_address_counts_when_two_networks_see_it() -> None:
    observed = ObservedAddresses()
    local, outer = at("192.168.1.10"), at("45.1.0.1", 30000)
    for _ in range(5):
        assert observed.observe("44.1.0.1/32", local, outer, 0.0)
    assert observed.confirmed(local) == []
    observed.observe("44.2.0.1/32", at("192.168.1.99"), outer, 0.0)  # another IP of ours, the same port
    assert observed.confirmed(local) == [outer]
    assert observed.confirmed(at("192.168.1.10", 4002)) == []
    assert observed.outer_ips() == [outer.ip]
    observed.forget()
    assert observed.confirmed(local) == []


@pytest.mark.parametrize(
    "seen", [at("192.168.1.1"), at("127.0.0.1"), at("100.64.0.1"), at("2a00:1::1"), at("45.1.0.1", transport="udp")]
)
def test_what_is_private_or_contradicts_itself_is_not_heard(seen: Endpoint) -> None:
    observed = ObservedAddresses()
    assert not observed.observe("44.1.0.1/32", at("192.168.1.10"), seen, 0.0)
    assert observed.outer_ips() == []


def test_observations_grow_old_unless_they_are_renewed() -> None:
    observed = ObservedAddresses()
    for observer, now in (("a", 0.0), ("b", 0.0), ("a", 1000.0), ("c", 1000.0)):
        observed.observe(observer, at("192.168.1.10"), at("45.1.0.1"), now)
    observed.expire(OBSERVATION_S)
    assert observed.confirmed(at("192.168.1.10")) == [at("45.1.0.1")]  # a and c
    observed.expire(OBSERVATION_S + 1000)
    assert observed.outer_ips() == []


def mapping_of(*seen: Endpoint, own: str = "192.168.1.10") -> Mapping:
    observed = ObservedAddresses()
    for number, where in enumerate(seen):
        observed.observe(f"network {number}", at(own), where, 0.0)
    return observed.mapping("tcp", {ipaddress.ip_address(own)})


def test_the_kind_of_the_nat() -> None:
    one, other, third = (at("45.1.0.1", port) for port in (30000, 30001, 30002))
    assert mapping_of() is Mapping.UNKNOWN
    assert mapping_of(one) is Mapping.UNKNOWN
    assert mapping_of(one, one) is Mapping.ENDPOINT_INDEPENDENT
    assert mapping_of(one, other) is Mapping.ADDRESS_DEPENDENT
    assert mapping_of(one, other, third) is Mapping.ADDRESS_DEPENDENT
    assert mapping_of(one, one, one, other) is Mapping.ENDPOINT_INDEPENDENT  # one liar
    assert mapping_of(at("45.1.0.1"), at("45.1.0.1"), own="45.1.0.1") is Mapping.NONE


def test_tcp_and_udp_are_told_apart() -> None:
    observed = ObservedAddresses()
    for number in range(3):
        observed.observe(str(number), at("192.168.1.10"), at("45.1.0.1", 30000 + number), 0.0)
        observed.observe(str(number), at("192.168.1.10", transport="udp"), at("45.1.0.1", 5, "udp"), 0.0)
    assert observed.mapping("tcp", ()) is Mapping.ADDRESS_DEPENDENT
    assert observed.mapping("udp", ()) is Mapping.ENDPOINT_INDEPENDENT


def test_what_is_remembered_of_observers_is_bounded() -> None:
    observed = ObservedAddresses()
    for number in range(1000):
        observed.observe(f"network {number}", at("10.0.0.1", 1 + number % 200), at("45.1.0.1", 1 + number), 0.0)
        observed.observe(f"network {number}", at("10.0.0.1", 65000), at("45.1.0.1", 1 + number), 0.0)
    assert len(observed._ports) <= MAX_PORTS
    assert all(len(entry.by) <= MAX_OBSERVERS for entry in observed._ports.values())


# Verdicts


HERE = tcp("45.1.0.1", 4001)


def test_the_majority_decides_and_the_last_word_of_each_counts() -> None:
    verdicts = Verdicts()
    verdicts.watch([HERE])
    steps = [("a", True, "reachable"), ("b", False, "unknown"), ("c", False, "unreachable"), ("b", True, "reachable")]
    for server, reached, expected in steps:
        verdicts.told(HERE, server, reached)
        assert verdicts.of(HERE).value == expected
    since = verdicts.begin(HERE)
    verdicts.forget([HERE])
    verdicts.told(HERE, "a", True, since=since)  # it was tried before
    assert verdicts.of(HERE) is Verdict.UNKNOWN
    verdicts.told(tcp("45.1.0.1", 9), "a", True)
    assert verdicts.of(tcp("45.1.0.1", 9)) is Verdict.UNKNOWN  # nobody asked


def test_when_to_ask_again() -> None:
    verdicts = Verdicts()
    verdicts.watch([HERE])
    assert verdicts.due(0.0) == [HERE]
    now, pauses = 0.0, []
    for _ in range(12):
        verdicts.round_over(HERE, now, alone=True)  # nobody could tell
        pauses.append(verdicts.next_due() - now)
        now = verdicts.next_due()
    assert pauses[:3] == [UNSURE_S, 2 * UNSURE_S, 4 * UNSURE_S]
    assert pauses[-1] == MAX_PAUSE_S
    verdicts.watch([])
    verdicts.watch([HERE])
    verdicts.told(HERE, "a", False)
    verdicts.round_over(HERE, 0.0, alone=True)
    assert verdicts.next_due() == UNREACHABLE_S
    verdicts.hasten("a", 10.0)  # it has been asked
    assert verdicts.due(10.0) == []
    verdicts.hasten("b", 10.0)  # somebody else can be asked
    assert verdicts.due(10.0) == [HERE]
    verdicts.told(HERE, "a", True)
    verdicts.round_over(HERE, 10.0, alone=True)
    assert verdicts.next_due() == 10.0 + REACHABLE_S
    verdicts.forget()
    assert verdicts.of(HERE) is Verdict.UNKNOWN
    assert verdicts.due(0.0) == [HERE]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3), st.booleans()), max_size=200))
def test_the_server_never_serves_more_than_its_minute_allows(requests: list[tuple[int, int, bool]]) -> None:
    settings = DialBackSettings(per_minute=10, per_minute_and_peer=4, with_data_per_minute=3)
    limiter, now, served = RateLimiter(settings), 0.0, []
    for pause, peer, paid in requests:
        now += pause
        if limiter.accept({f"peer {peer}", "one network" if peer < 2 else f"network {peer}"}, now, paid=paid):
            served.append((now, peer, paid))
        recent = [each for each in served if now - each[0] < 60]
        assert len(recent) <= 10
        assert sum(paid for _, _, paid in recent) <= 3
        assert sum(peer < 2 for _, peer, _ in recent) <= 4
        assert len(limiter._of) <= 2 * len(recent)


# Judging

PRIVATE, OUTER, LOOPBACK = tcp("192.168.1.10", 4001), tcp("45.1.0.1", 30000), tcp("127.0.0.1", 4001)
YES, NO, UNSURE = Verdict.REACHABLE, Verdict.UNREACHABLE, Verdict.UNKNOWN
OUTER_IPS = [ipaddress.ip_address("45.1.0.1")]


@pytest.mark.parametrize(
    ("evidence", "kind"),
    [
        (Evidence(own=[LOOPBACK]), Kind.UNKNOWN),
        (Evidence(own=[HERE]), Kind.UNKNOWN),
        (Evidence(own=[HERE], verdicts={HERE: UNSURE}, outer_ips=OUTER_IPS), Kind.UNKNOWN),
        (Evidence(own=[HERE], verdicts={HERE: YES}), Kind.PUBLIC),
        (Evidence(own=[PRIVATE], verdicts={OUTER: YES}), Kind.PUBLIC),  # somebody forwards a port
        (Evidence(own=[PRIVATE], mapped=[OUTER], verdicts={OUTER: YES}), Kind.MAPPED),
        (Evidence(own=[PRIVATE], mapped=[OUTER]), Kind.MAPPED),  # nobody can check it
        (Evidence(own=[PRIVATE], mapped=[OUTER], verdicts={OUTER: NO}), Kind.RELAY_ONLY),  # two NATs
        (Evidence(own=[HERE], verdicts={HERE: NO}, tcp=Mapping.NONE), Kind.PUNCHABLE),  # a firewall
        (Evidence(own=[PRIVATE], outer_ips=OUTER_IPS), Kind.RELAY_ONLY),
        (Evidence(own=[PRIVATE], outer_ips=OUTER_IPS, is_settled=False), Kind.UNKNOWN),
        (Evidence(own=[PRIVATE], outer_ips=OUTER_IPS, tcp=Mapping.ADDRESS_DEPENDENT), Kind.RELAY_ONLY),
        (Evidence(own=[PRIVATE], outer_ips=OUTER_IPS, tcp=Mapping.ENDPOINT_INDEPENDENT), Kind.PUNCHABLE),
        (
            Evidence(
                own=[PRIVATE],
                outer_ips=OUTER_IPS,
                tcp=Mapping.ADDRESS_DEPENDENT,
                udp=Mapping.ENDPOINT_INDEPENDENT,
                verdicts={OUTER: NO},
            ),
            Kind.PUNCHABLE,
        ),
    ],
)
def test_what_follows_from_the_evidence(evidence: Evidence, kind: Kind) -> None:
    assert judge(evidence) is kind


V6 = parse("/ip6/2a00:1::1/tcp/4001")


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        (Evidence(own=[PRIVATE, LOOPBACK]), [PRIVATE, LOOPBACK]),  # nothing is known
        (Evidence(own=[HERE, PRIVATE, LOOPBACK], verdicts={HERE: YES}), [HERE]),
        (Evidence(own=[HERE, V6, PRIVATE], verdicts={HERE: YES, V6: NO}), [HERE]),
        (Evidence(own=[HERE, V6, PRIVATE], verdicts={HERE: YES, V6: UNSURE}), [HERE, V6]),
        (Evidence(own=[PRIVATE, LOOPBACK], mapped=[OUTER], verdicts={OUTER: YES}), [OUTER, PRIVATE]),
        (Evidence(own=[PRIVATE, LOOPBACK], mapped=[OUTER]), [OUTER, PRIVATE]),
        (Evidence(own=[PRIVATE, LOOPBACK], mapped=[OUTER], verdicts={OUTER: NO}), [PRIVATE, LOOPBACK]),
    ],
)
def test_what_is_announced(evidence: Evidence, expected: list[Multiaddr]) -> None:
    assert announced(evidence) == expected


# AutoNAT's messages

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
MESSAGES = st.one_of(
    st.builds(DialRequest, addresses=st.lists(st.binary(max_size=40), max_size=5).map(tuple), nonce=u64),
    st.builds(DialResponse, status=u32, index=u32, dialled=u32),
    st.builds(DialDataRequest, index=u32, count=u64),
    st.builds(DialDataResponse, data=st.binary(max_size=4096)),
)


@given(MESSAGES)
def test_messages_come_back_as_they_were(message: messages.Message) -> None:
    assert messages.decode(messages.encode(message), type(message)) == message


@given(st.binary(max_size=100))
def test_other_bytes_are_a_protocol_error_or_a_message(data: bytes) -> None:
    for kind in (DialRequest, DialResponse):
        try:
            messages.decode(data, kind)
        except RemoteProtocolError:
            continue
    try:
        messages.decode_answer(data)
        messages.decode_dial_back(data)
        messages.check_dial_back_response(data)
    except RemoteProtocolError:
        pass


def test_the_bytes_are_those_of_the_specification() -> None:
    """Written by hand from the definitions: a tag is number << 3 | wire type."""
    request = DialRequest(addresses=(b"\x04\x7f\0\0\1",), nonce=0x0807060504030201)
    assert messages.encode(request).hex() == "0a10" + "0a05047f000001" + "110102030405060708"
    assert messages.encode(DialResponse(status=200, index=1, dialled=101)).hex() == "1207" + "08c801" + "1001" + "1865"
    assert messages.encode(DialDataRequest(index=1, count=30_000)).hex() == "1a06" + "0801" + "10b0ea01"
    assert messages.encode(DialDataResponse(data=b"ab")).hex() == "2204" + "0a026162"
    assert messages.encode_dial_back(1).hex() == "09" + "01" + "00" * 7
    assert messages.encode_dial_back_response() == b""


# Routers' bytes

NONCE = bytes(range(12))
CLIENT = ipaddress.IPv4Address("192.168.1.10")
TCP = Port(transport="tcp", number=4001)


def pcp_answer(*, result: int = 0, nonce: bytes = NONCE, port: int = 4001, lifetime: int = 120) -> bytes:
    header = struct.pack("!BBBBII12x", 2, 129, 0, result, lifetime, 7)
    outer = bytes(10) + b"\xff\xff" + bytes([45, 1, 0, 1])
    return header + struct.pack("!12sB3xHH16s", nonce, 6, port, 7000, outer)


def test_a_pcp_mapping() -> None:
    request = pcp.pcp_map_request(TCP, NONCE, 1200, client=CLIENT, external=4001)
    assert len(request) == 60
    assert request[:8].hex() == "02010000000004b0"
    assert request[8:24].hex() == "00" * 10 + "ffff" + "c0a8010a"
    assert request[24:].hex() == NONCE.hex() + "06000000" + "0fa1" * 2 + "00" * 10 + "ffff" + "00000000"
    lease = pcp.read_pcp_map(pcp_answer(), TCP, NONCE)
    assert (str(lease.ip), lease.port, lease.lifetime_s) == ("45.1.0.1", 7000, 120.0)
    with pytest.raises(GatewayError, match="PCP result 2"):
        pcp.read_pcp_map(pcp_answer(result=2), TCP, NONCE)
    for other in (pcp_answer(nonce=bytes(12)), pcp_answer(port=1), b"", b"\2\x81"):
        with pytest.raises(pcp._NotOurs):
            pcp.read_pcp_map(other, TCP, NONCE)
    with pytest.raises(pcp._OtherVersion):
        pcp.read_pcp_map(bytes.fromhex("0081000100000007"), TCP, NONCE)


def test_a_natpmp_mapping() -> None:
    assert pcp.natpmp_map_request(TCP, 1200, external=4001).hex() == "00020000" + "0fa1" * 2 + "000004b0"
    good = struct.pack("!BBHIHHI", 0, 130, 0, 7, 4001, 7000, 120)
    assert pcp.read_natpmp_map(good, TCP) == (7000, 120)
    assert str(pcp.read_natpmp_ip(struct.pack("!BBHI4B", 0, 128, 0, 7, 45, 1, 0, 1))) == "45.1.0.1"
    with pytest.raises(GatewayError, match="NAT-PMP result 3"):
        pcp.read_natpmp_ip(struct.pack("!BBHI", 0, 128, 3, 7))
    with pytest.raises(pcp._NotOurs):
        pcp.read_natpmp_map(good, Port(transport="udp", number=4001))


@given(st.binary(max_size=80))
def test_no_datagram_of_a_router_breaks_us(data: bytes) -> None:
    for read in (
        lambda: pcp.read_pcp_map(data, TCP, NONCE),
        lambda: pcp.read_natpmp_map(data, TCP),
        lambda: pcp.read_natpmp_ip(data),
    ):
        try:
            read()
        except (NetError, pcp._NotOurs):
            pass


def test_the_default_gateway() -> None:
    table = (
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
        "wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n"
        "eth0\t00000000\tFE01A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
        "eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0\n"
    )
    assert str(pcp.default_gateway(table)) == "192.168.1.254"
    assert pcp.default_gateway(table.splitlines()[0]) is None


# What a node says of itself


@pytest.mark.parametrize("word", [kind.value for kind in Kind])
def test_every_kind_can_be_announced_and_its_lack_is_unknown(word: str) -> None:
    offer = replace(announcements.node(1, 0, 4), reachability=word)
    body = offer.to_body()
    assert NodeAnnouncement._parse(offer.peer_id, body).reachability == word
    assert NodeAnnouncement._parse(offer.peer_id, {**body, "reachability": "unknown"}).reachability == "unknown"
    del body["reachability"]
    assert NodeAnnouncement._parse(offer.peer_id, body).reachability == "unknown"
    for bad in ("Public", "", 1, None, "x" * 1000):
        with pytest.raises(RemoteProtocolError):
            NodeAnnouncement._parse(offer.peer_id, {**body, "reachability": bad})
