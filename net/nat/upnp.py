"""Asking a router for ports by UPnP (IGD), through miniupnpc, which works in threads.

miniupnpc raises plain ``Exception`` with the router's words; these are told apart here by what they say.
"""

from __future__ import annotations

import ipaddress
import logging
import random
from collections.abc import Callable
from typing import Any, TypeVar

import trio

from net.nat.gateway import GatewayError, Lease, NoGateway, Port

logger = logging.getLogger(__name__)

DISCOVERY_MS = 2000  # how long routers may take to answer the multicast; UPnP's MX
DESCRIPTION = "raceme"
OTHER_PORTS = range(20_000, 60_000)
OTHER_TRIES = 3
ONLY_PERMANENT = "OnlyPermanentLeasesSupported"  # UPnP error 725
CONFLICT = "ConflictInMappingEntry"  # 718: another machine has this outer port

T = TypeVar("T")


class UpnpGateway:
    """A router that speaks UPnP. ``device`` is miniupnpc's, with a router selected."""

    name = "UPnP"

    def __init__(self, device: Any) -> None:
        self._device = device
        self._turn = trio.Lock()  # the library's object serves one call at a time

    async def map(self, port: Port, lifetime_s: float, *, external: int) -> Lease:
        async with self._turn:
            return await _in_thread(lambda: self._map(port, int(lifetime_s), external))

    async def unmap(self, port: Port, lease: Lease) -> None:
        async with self._turn:
            await _in_thread(lambda: self._device.deleteportmapping(lease.port, port.transport.upper()))

    def _map(self, port: Port, lifetime_s: int, external: int) -> Lease:
        # First of all: should the router not know it, then nothing is mapped that nobody would give back.
        ip = ipaddress.IPv4Address(self._device.externalipaddress())
        for number in [external, *random.sample(OTHER_PORTS, OTHER_TRIES)]:
            try:
                granted_s = self._add(port, number, lifetime_s)
            except Exception as error:
                if CONFLICT not in str(error):
                    raise
                logger.debug("UPnP: outer port %d is somebody else's", number)
            else:
                return Lease(ip=ip, port=number, lifetime_s=float(granted_s))
        raise GatewayError("the router's ports that were tried are all in use")

    def _add(self, port: Port, number: int, lifetime_s: int) -> int:
        """The lifetime granted."""
        what = (number, port.transport.upper(), self._device.lanaddr, port.number, DESCRIPTION, "")
        try:
            self._device.addportmapping(*what, lifetime_s)
        except Exception as error:
            if ONLY_PERMANENT not in str(error):
                raise
            self._device.addportmapping(*what, 0)  # older routers; it is removed when we leave
            return 0
        return lifetime_s


async def find_upnp() -> UpnpGateway:
    """The router of this network, if it speaks UPnP.

    Raises:
        NoGateway: none answers, or none is connected to the internet.
    """
    return UpnpGateway(await _in_thread(_discover))


def _discover() -> Any:
    import miniupnpc

    device = miniupnpc.UPnP()
    device.discoverdelay = DISCOVERY_MS
    try:
        if not device.discover():
            raise NoGateway("no router answers to UPnP")
        device.selectigd()
    except NoGateway:
        raise
    except Exception as error:
        raise NoGateway(f"no router answers to UPnP ({error})") from error
    return device


async def _in_thread(call: Callable[[], T]) -> T:
    """Cancellation: at once; the thread ends by itself when the router answers, or miniupnpc's patience ends."""
    try:
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True)
    except GatewayError:
        raise
    except Exception as error:
        raise GatewayError(f"the router refuses ({error})") from error
