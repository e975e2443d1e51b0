"""What each kind of NAT does, as an nftables ruleset: text in, text out; nothing here needs root.

The kinds have the names of RFC 3489, by which people know them; what they do is said in the terms of RFC 4787
(UDP) and RFC 5382 (TCP):

    kind                mapping                       filtering
    full-cone           endpoint-independent          endpoint-independent
    address-restricted  endpoint-independent          address-dependent
    port-restricted     endpoint-independent          address-and-port-dependent
    symmetric           address-and-port-dependent    address-and-port-dependent

Linux's own masquerade keeps the source port when it is free, which is an endpoint-independent mapping only as
long as one host alone uses that port. So the rules remember in maps which outer endpoint an inner one was given
(``PROTO_outer``), use it for whatever that endpoint sends next, and never give it to another. The way back
(``PROTO_inner``) serves the filters that let strangers in, and hairpinning.

Mappings of UDP last 2 minutes without traffic (RFC 4787, REQ-5), of TCP an hour. What comes unasked is dropped
in silence (RFC 5382, REQ-4: a refusal would end a simultaneous open).
"""

from __future__ import annotations

from dataclasses import dataclass

WAN = "wan0"
LAN = "lan0"
MAPPING_LIFE = {"udp": "2m", "tcp": "1h"}
MAX_MAPPINGS = 65535

INDEPENDENT = "endpoint-independent"
ADDRESS = "address-dependent"
ADDRESS_AND_PORT = "address-and-port-dependent"


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """In the terms of RFC 4787, sections 4.1 and 5."""

    mapping: str
    filtering: str


KINDS = {
    "full-cone": Behaviour(mapping=INDEPENDENT, filtering=INDEPENDENT),
    "address-restricted": Behaviour(mapping=INDEPENDENT, filtering=ADDRESS),
    "port-restricted": Behaviour(mapping=INDEPENDENT, filtering=ADDRESS_AND_PORT),
    "symmetric": Behaviour(mapping=ADDRESS_AND_PORT, filtering=ADDRESS_AND_PORT),
}


def can_punch(one: str, other: str) -> bool:
    """Whether two hosts behind such NATs can meet without guessing ports: in 13 of the 16 ordered pairs.

    A symmetric NAT shows its peer a port that nobody could foresee. That works only when the other's filter
    does not look at ports.
    """
    for here, there in ((one, other), (other, one)):
        if KINDS[here].mapping != INDEPENDENT and KINDS[there].filtering == ADDRESS_AND_PORT:
            return False
    return True


def nested(inner: str, outer: str) -> str:
    """The kind that two levels of NAT make together: ``KINDS`` has the stricter after the more open."""
    return max(inner, outer, key=list(KINDS).index)


def ruleset(kind: str | None, *, udp: bool = True, hairpin: bool = False, ipv6: bool = False) -> str:
    """The whole ruleset of a router between ``lan0`` and ``wan0``; loading it forgets all mappings.

    Args:
        kind: one of ``KINDS``; None for a router without IPv4.
        udp: False to drop all UDP, as some offices do.
        hairpin: whether a host can reach another behind the same NAT by its outer endpoint, from its own outer
            endpoint (RFC 4787, REQ-9). The filters do not apply to such packets. Not for symmetric NATs.
        ipv6: let IPv6 through without NAT, new connections from inside only; without this it is dropped.

    Raises:
        ValueError: there is no such kind, or it cannot hairpin.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"no NAT is called {kind!r}: there are {', '.join(KINDS)}")
    if hairpin and (kind is None or KINDS[kind].mapping != INDEPENDENT):
        raise ValueError("hairpinning needs a NAT with endpoint-independent mapping")
    tables = [_firewall(udp=udp, ipv4=kind is not None, ipv6=ipv6)]
    if kind is not None:
        tables.append(_nat(KINDS[kind], hairpin=hairpin))
    return "\n".join(["flush ruleset", *tables, ""])


def _firewall(*, udp: bool, ipv4: bool, ipv6: bool) -> str:
    closed = [] if udp else ["meta l4proto udp drop"]
    closed += [f"meta nfproto {family} drop" for family, wanted in (("ipv4", ipv4), ("ipv6", ipv6)) if not wanted]
    forward = [*closed, "ct state established,related accept", f'iifname "{LAN}" accept', "ct status dnat accept"]
    arriving = ["ct state established,related accept", f'iifname != "{WAN}" accept']
    return _block(
        "table inet firewall",
        _chain("forward", "type filter hook forward priority filter; policy drop;", forward),
        _chain("input", "type filter hook input priority filter; policy drop;", arriving),
    )


def _nat(behaviour: Behaviour, *, hairpin: bool) -> str:
    if behaviour.mapping != INDEPENDENT:
        rules = [f'oifname "{WAN}" masquerade fully-random']
        return _block("table ip nat", _chain("out", "type nat hook postrouting priority srcnat;", rules))
    protocols = ("udp", "tcp")
    leaving = [rule for protocol in protocols for rule in _translate(protocol, hairpin=hairpin)]
    learned = [rule for protocol in protocols for rule in _learn(protocol, hairpin=hairpin)]
    coming = [rule for protocol in protocols for rule in _admit(protocol, behaviour.filtering, hairpin=hairpin)]
    return _block(
        "table ip nat",
        *(text for protocol in protocols for text in _memory(protocol)),
        _chain("out", "type nat hook postrouting priority srcnat;", [*leaving, f'oifname "{WAN}" masquerade']),
        # NAT has been done where this chain is: it sees both the endpoint that was given and the original one
        _chain("learn", "type filter hook postrouting priority srcnat + 50;", learned),
        _chain("in", "type nat hook prerouting priority dstnat;", coming),
    )


def _memory(protocol: str) -> list[str]:
    options = f"flags dynamic,timeout; size {MAX_MAPPINGS}; timeout {MAPPING_LIFE[protocol]};"
    endpoint = "ipv4_addr . inet_service"
    return [
        f"map {protocol}_outer {{ type {endpoint} : {endpoint}; {options} }}",
        f"map {protocol}_inner {{ type inet_service : {endpoint}; {options} }}",
        f"set {protocol}_taken {{ type inet_service; {options} }}",
        f"set {protocol}_contacted {{ type inet_service . ipv4_addr; {options} }}",
    ]


def _sides(*, hairpin: bool) -> list[str]:
    """Packets that need an outer source: those that leave, and those that turn round within the router."""
    return [f'oifname "{WAN}"', *([f'iifname "{LAN}" oifname "{LAN}" ct status dnat'] if hairpin else [])]


def _translate(protocol: str, *, hairpin: bool) -> list[str]:
    rules = []
    for side in _sides(hairpin=hairpin):
        rules += [
            f"{side} snat ip to ip saddr . {protocol} sport map @{protocol}_outer",
            f"{side} {protocol} sport @{protocol}_taken masquerade to :32768-60999 fully-random",
        ]
    return rules


def _learn(protocol: str, *, hairpin: bool) -> list[str]:
    inner = "ct original ip saddr . ct original proto-src"
    rules = []
    for side in _sides(hairpin=hairpin):
        new = f"{side} ct direction original meta l4proto {protocol}"
        rules += [
            f"{new} update @{protocol}_outer {{ {inner} : ip saddr . {protocol} sport }}",
            f"{new} update @{protocol}_inner {{ {protocol} sport : {inner} }}",
            f"{new} update @{protocol}_taken {{ {protocol} sport }}",
            f"{new} update @{protocol}_contacted {{ {protocol} sport . ip daddr }}",
        ]
    return rules


def _admit(protocol: str, filtering: str, *, hairpin: bool) -> list[str]:
    to_inner = f"dnat ip to {protocol} dport map @{protocol}_inner"
    rules = []
    if filtering == INDEPENDENT:
        rules.append(f'iifname "{WAN}" {to_inner}')
    if filtering == ADDRESS:
        rules.append(f'iifname "{WAN}" {protocol} dport . ip saddr @{protocol}_contacted {to_inner}')
    if hairpin:
        rules.append(f'iifname "{LAN}" fib daddr type local {to_inner}')
    return rules


def _block(head: str, *parts: str) -> str:
    inside = "\n".join(f"  {line}" for part in parts for line in part.split("\n"))
    return f"{head} {{\n{inside}\n}}"


def _chain(name: str, head: str, rules: list[str]) -> str:
    return _block(f"chain {name}", head, *rules)
