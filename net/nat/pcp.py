"""Asking a router for ports by PCP, or by NAT-PMP where it knows no more: two small datagrams each.

Written here, for the libraries that there are for Python do NAT-PMP alone and lean on the abandoned ``netifaces``.

Wire, big-endian, over UDP to the gateway's port 5351. PCP (RFC 6887), for MAP, both ways:

    version=2 | R(1) opcode=1(7) | 16 bits reserved, in answers 8 reserved and 8 result | lifetime 32
    | client's IP 128, in answers epoch 32 and 96 reserved
    | nonce 96 | protocol 8 | reserved 24 | internal port 16 | external port 16 | external IP 128

NAT-PMP (RFC 6886):

    version=0 opcode=0                                                      -> 0 128 result 16 epoch 32 IP 32
    version=0 opcode=1|2 reserved 16 internal 16 external 16 lifetime 32    -> 0 op+128 result 16 epoch 32
                                                                               internal 16 external 16 lifetime 32
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import trio

from net.nat.gateway import GatewayError, Lease, NoGateway, Port

SERVER_PORT = 5351
PROTOCOL_NUMBERS = {"tcp": 6, "udp": 17}
NATPMP_OPCODES = {"udp": 1, "tcp": 2}
UNSUPPORTED_VERSION = 1  # a result of both protocols
PCP_HEADER = struct.Struct("!BBBBI")
PCP_MAP = struct.Struct("!12sB3xHH16s")
NATPMP_ANSWER = struct.Struct("!BBHI")
PCP_MAP_BYTES = 60
TRIES_S = (0.25, 0.5, 1.0)  # RFC 6886, section 3.1, doubles from 250 ms nine times: two minutes, which nobody has
SECRET = os.urandom(32)
ROUTES = Path("/proc/net/route")

T = TypeVar("T")


class _OtherVersion(GatewayError):
    """The router answers in another version of the protocol."""

    def __init__(self) -> None:
        super().__init__("the router answers in another version of the protocol")


class _NotOurs(Exception):
    """A datagram that answers something else, or nothing."""


# Bytes


def pcp_map_request(
    port: Port, nonce: bytes, lifetime_s: int, *, client: ipaddress.IPv4Address, external: int
) -> bytes:
    """``lifetime_s`` 0 takes the mapping away; ``external`` is only a wish."""
    anything = _mapped(ipaddress.IPv4Address(0))
    body = PCP_MAP.pack(nonce, PROTOCOL_NUMBERS[port.transport], port.number, external, anything)
    return PCP_HEADER.pack(2, 1, 0, 0, lifetime_s) + _mapped(client) + body


def read_pcp_map(data: bytes, port: Port, nonce: bytes) -> Lease:
    """What the router granted.

    Raises:
        GatewayError: it refused.
        _OtherVersion: it does not speak PCP.
        _NotOurs: the datagram belongs to something else.
    """
    if len(data) >= 4 and data[0] != 2:
        raise _OtherVersion
    if len(data) < PCP_MAP_BYTES:
        if len(data) >= 24 and data[1] == 129 and data[3]:
            raise GatewayError(f"the router refuses (PCP result {data[3]})")
        raise _NotOurs
    _, opcode, _, result, lifetime = PCP_HEADER.unpack_from(data)
    their_nonce, protocol, internal, external, ip = PCP_MAP.unpack_from(data, 24)
    asked = (nonce, PROTOCOL_NUMBERS[port.transport], port.number)
    if opcode != 129 or (their_nonce, protocol, internal) != asked:
        raise _NotOurs
    if result == UNSUPPORTED_VERSION:
        raise _OtherVersion
    if result:
        raise GatewayError(f"the router refuses (PCP result {result})")
    outer = ipaddress.IPv6Address(ip).ipv4_mapped
    if outer is None:
        raise GatewayError("the router gave an IPv6 address for an IPv4 port")
    return Lease(ip=outer, port=external, lifetime_s=float(lifetime))


def natpmp_map_request(port: Port, lifetime_s: int, *, external: int) -> bytes:
    return struct.pack("!BBHHHI", 0, NATPMP_OPCODES[port.transport], 0, port.number, external, lifetime_s)


def read_natpmp_map(data: bytes, port: Port) -> tuple[int, int]:
    """External port and lifetime. Raises: as ``read_pcp_map``."""
    _check_natpmp(data, NATPMP_OPCODES[port.transport], 16)
    internal, external, lifetime = struct.unpack_from("!HHI", data, 8)
    if internal != port.number:
        raise _NotOurs
    return external, lifetime


def read_natpmp_ip(data: bytes) -> ipaddress.IPv4Address:
    """Raises: as ``read_pcp_map``."""
    _check_natpmp(data, 0, 12)
    return ipaddress.IPv4Address(data[8:12])


def _check_natpmp(data: bytes, opcode: int, least: int) -> None:
    if len(data) < NATPMP_ANSWER.size - 4:
        raise _NotOurs
    if data[0] != 0:
        raise _OtherVersion
    if data[1] != opcode + 128:
        raise _NotOurs
    if result := int.from_bytes(data[2:4], "big"):
        raise GatewayError(f"the router refuses (NAT-PMP result {result})")
    if len(data) < least:
        raise _NotOurs


def _mapped(ip: ipaddress.IPv4Address) -> bytes:
    return bytes(10) + b"\xff\xff" + ip.packed


def default_gateway(routes: str) -> ipaddress.IPv4Address | None:
    """The gateway of the best default route in the text of ``/proc/net/route``."""
    found = []
    for line in routes.splitlines()[1:]:
        columns = line.split()
        if len(columns) >= 8 and columns[1] == columns[7] == "00000000" and int(columns[3], 16) & 2:  # RTF_GATEWAY
            found.append((int(columns[6]), struct.unpack("=I", struct.pack("!I", int(columns[2], 16)))[0]))
    return ipaddress.IPv4Address(min(found)[1]) if found else None


# The router


@dataclass(kw_only=True, eq=False)
class PcpGateway:
    """A router that speaks PCP or NAT-PMP."""

    router: ipaddress.IPv4Address
    is_pcp: bool
    server_port: int = SERVER_PORT

    @property
    def name(self) -> str:
        return "PCP" if self.is_pcp else "NAT-PMP"

    async def map(self, port: Port, lifetime_s: float, *, external: int) -> Lease:
        if self.is_pcp:
            return await self._pcp(port, int(lifetime_s), external=external)
        ip = await self.external_ip()
        request = natpmp_map_request(port, int(lifetime_s), external=external)
        number, granted_s = await self._ask(lambda _: request, lambda data: read_natpmp_map(data, port))
        return Lease(ip=ip, port=number, lifetime_s=float(granted_s))

    async def unmap(self, port: Port, lease: Lease) -> None:
        if self.is_pcp:
            await self._pcp(port, 0, external=0)
        else:
            request = natpmp_map_request(port, 0, external=0)
            await self._ask(lambda _: request, lambda data: read_natpmp_map(data, port))

    async def external_ip(self) -> ipaddress.IPv4Address:
        """By NAT-PMP."""
        return await self._ask(lambda _: b"\0\0", read_natpmp_ip)

    async def _pcp(self, port: Port, lifetime_s: int, *, external: int) -> Lease:
        # The same for as long as we live: a mapping is renewed and removed by who made it (RFC 6887, section 11.3).
        nonce = hashlib.sha256(SECRET + str(port).encode()).digest()[:12]
        return await self._ask(
            lambda client: pcp_map_request(port, nonce, lifetime_s, client=client, external=external),
            lambda data: read_pcp_map(data, port, nonce),
        )

    async def _ask(self, request: Callable[[ipaddress.IPv4Address], bytes], read: Callable[[bytes], T]) -> T:
        """Send until an answer makes sense.

        Raises:
            NoGateway: nobody answers.
            GatewayError: the router refuses.
            _OtherVersion: it speaks the other protocol.
        """
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
            try:
                await channel.connect((str(self.router), self.server_port))
                client = ipaddress.IPv4Address(channel.getsockname()[0])
                for patience_s in TRIES_S:
                    await channel.send(request(client))
                    with trio.move_on_after(patience_s):
                        while True:
                            try:
                                return read(await channel.recv(1100))  # the longest PCP datagram
                            except _NotOurs:
                                continue
            except OSError as error:  # refused: no such service there
                raise NoGateway(f"{self.router} does not answer to PCP or NAT-PMP") from error
        raise NoGateway(f"{self.router} does not answer to PCP or NAT-PMP")


async def find_pcp() -> PcpGateway:
    """The default gateway, if it answers.

    Raises:
        NoGateway: it does not, or there is none. (Which one it is, only Linux tells us.)
    """
    try:
        router = default_gateway(await trio.Path(ROUTES).read_text())
    except (OSError, ValueError):
        router = None
    if router is None:
        raise NoGateway("there is no default gateway")
    return await speaks(router)


async def speaks(router: ipaddress.IPv4Address, server_port: int = SERVER_PORT) -> PcpGateway:
    """What this router understands. Asked by taking away a mapping that nobody has: nothing is left behind.

    Raises:
        NoGateway: neither of the two.
    """
    newer = PcpGateway(router=router, is_pcp=True, server_port=server_port)
    try:
        await newer._pcp(Port(transport="udp", number=9), 0, external=0)
        return newer
    except _OtherVersion:
        pass
    except NoGateway:
        raise
    except GatewayError:
        return newer  # it refused, in PCP: it may grant something else
    older = PcpGateway(router=router, is_pcp=False, server_port=server_port)
    try:
        await older.external_ip()
    except _OtherVersion as error:
        raise NoGateway(f"{router} speaks neither PCP nor NAT-PMP") from error
    return older
