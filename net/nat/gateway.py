"""What a router that gives out ports can do, whichever protocol it speaks."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Protocol

from net.errors import NetError


class GatewayError(NetError):
    """The router refuses, or fails."""


class NoGateway(GatewayError):
    """No router answers."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """One of ours; ``transport`` is ``tcp`` or ``udp``."""

    transport: str
    number: int

    def __str__(self) -> str:
        return f"{self.number}/{self.transport}"


@dataclass(frozen=True, kw_only=True)
class Lease:
    """Where the router listens for us, and for how long. ``lifetime_s`` 0: for good."""

    ip: ipaddress.IPv4Address
    port: int
    lifetime_s: float


class Gateway(Protocol):
    """A router that was found."""

    @property
    def name(self) -> str:
        """Of its protocol."""

    async def map(self, port: Port, lifetime_s: float, *, external: int) -> Lease:
        """Make or renew a mapping to our ``port``; the outer one may differ from the ``external`` that we wish.

        Raises:
            GatewayError: no mapping.
        """

    async def unmap(self, port: Port, lease: Lease) -> None:
        """Raises:
        GatewayError: it may still be there, until its time is over.
        """
