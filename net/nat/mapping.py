"""Ports of the router kept open for us: asked for by PCP, NAT-PMP or UPnP, renewed, and given back on leaving.

No router, one that refuses, one that forgets: these are states, never errors. Nothing here holds up anything else.
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import trio

from net.nat.endpoints import Endpoint
from net.nat.gateway import Gateway, GatewayError, Lease, Port
from net.nat.pcp import find_pcp
from net.nat.upnp import find_upnp

logger = logging.getLogger(__name__)

MAX_DOUBLINGS = 16  # of a pause; more would leave what a float can hold, after three weeks of failures

FindGateway = Callable[[], Awaitable[Gateway]]


class MappingState(enum.Enum):
    OFF = "off"  # there is nothing to map, or nobody has asked for it
    SEARCHING = "searching"
    NO_ROUTER = "no router"  # that would map ports answers
    REFUSED = "refused"
    MAPPED = "mapped"
    INNER = "inner"  # mapped, but the router's own address is private: there is another NAT behind it


@dataclass(frozen=True, kw_only=True)
class MappingSettings:
    lifetime_s: float = 1200.0  # renewed at half of it; should we die, the router forgets us after so long
    least_renewal_s: float = 30.0
    patience_s: float = 20.0  # for one router and one port
    retry_s: float = 60.0  # after a failure, doubled each time; what is mapped is renewed in its time all the same
    most_retry_s: float = 1800.0
    leave_s: float = 2.0  # to give everything back
    max_ports: int = 8


class PortMapper:
    """Keeps the ports in ``wanted`` mapped while ``run`` runs.

    Args:
        finders: how routers are found; the first that is found is used.
        settings: figures.
    """

    def __init__(
        self,
        *,
        finders: Sequence[FindGateway] = (find_pcp, find_upnp),
        settings: MappingSettings | None = None,
    ) -> None:
        self._on_change: Callable[[], None] = lambda: None
        self._finders = finders
        self._settings = settings or MappingSettings()
        self._wanted: frozenset[Port] = frozenset()
        self._leases: dict[Port, Lease] = {}
        self._gateway: Gateway | None = None
        self._networks = 0  # that we have been in
        self._failures = 0  # in a row, in this one
        self._wake = trio.Event()
        self.state = MappingState.OFF
        self.problem = ""  # why not, in words

    @property
    def protocol(self) -> str:
        """Which the router speaks; empty before one is found."""
        return "" if self._gateway is None else self._gateway.name

    @property
    def mapped(self) -> dict[Port, Endpoint]:
        """Where the router listens for each of our ports."""
        return {
            port: Endpoint(ip=lease.ip, transport=port.transport, port=lease.port)
            for port, lease in self._leases.items()
        }

    def want(self, ports: Iterable[Port]) -> None:
        """Map these, and no others."""
        wanted = frozenset(sorted(ports, key=str)[: self._settings.max_ports])
        if wanted != self._wanted:
            self._wanted = wanted
            self._wake.set()

    def tell(self, on_change: Callable[[], None]) -> None:
        """Call this whenever state or mappings have changed; it must not raise."""
        self._on_change = on_change

    def network_changed(self) -> None:
        """Another router may be there: look for it."""
        self._networks += 1
        self._failures = 0
        self._gateway = None
        self._leases.clear()
        self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Find a router, map, renew, until cancelled. ``started`` comes at once.

        Cancellation: gives the ports back, for at most ``leave_s``.
        """
        task_status.started()
        try:
            while True:
                self._wake = trio.Event()
                is_good = await self._map_all(self._wanted)
                self._failures = 0 if is_good else self._failures + 1
                with trio.move_on_after(self._pause_s()):
                    await self._wake.wait()
        finally:
            with trio.move_on_after(self._settings.leave_s, shield=True):
                await self._unmap(list(self._leases))

    def _pause_s(self) -> float:
        settings = self._settings
        lifetimes = [lease.lifetime_s or settings.lifetime_s for lease in self._leases.values()]
        renewal_s = max(settings.least_renewal_s, min(lifetimes) / 2) if lifetimes else math.inf
        if not self._failures:
            return renewal_s
        retry_s = settings.retry_s * 2.0 ** min(self._failures - 1, MAX_DOUBLINGS)
        return min(renewal_s, settings.most_retry_s, retry_s)

    async def _map_all(self, wanted: frozenset[Port]) -> bool:
        """Whether there is nothing to try again soon. A network that changes meanwhile is for the next round."""
        network = self._networks
        await self._unmap([port for port in self._leases if port not in wanted])
        if not wanted:
            self._become(MappingState.OFF)
            return True
        gateway = self._gateway
        if gateway is None:
            self._become(MappingState.SEARCHING)
            gateway = await self._find()
            if network != self._networks:
                return True
            self._gateway = gateway
        if gateway is None:
            self._leases.clear()
            self._become(MappingState.NO_ROUTER, "no router here gives out ports (by UPnP, NAT-PMP or PCP)")
            return False
        problem = ""
        for port in sorted(wanted, key=str):
            lease = None
            try:
                lease = await self._map(gateway, port)
            except GatewayError as error:
                problem = f"port {port}: {error}"
            if network != self._networks:
                return True
            if lease is None:
                self._leases.pop(port, None)
            else:
                self._leases[port] = lease
        if not self._leases:
            self._gateway = None
            self._become(MappingState.REFUSED, problem)
        elif not any(endpoint.is_public for endpoint in self.mapped.values()):
            ip = next(iter(self._leases.values())).ip
            self._become(MappingState.INNER, f"the router's own address is {ip}, which is private as well")
        else:
            self._become(MappingState.MAPPED, problem)
        return not problem

    async def _map(self, gateway: Gateway, port: Port) -> Lease:
        """Raises:
        GatewayError: refused, or no answer in ``patience_s``.
        """
        before = self._leases.get(port)
        with trio.move_on_after(self._settings.patience_s):
            external = port.number if before is None else before.port
            return await gateway.map(port, self._settings.lifetime_s, external=external)
        raise GatewayError(f"no answer from the router in {self._settings.patience_s:g} s")

    async def _find(self) -> Gateway | None:
        for find in self._finders:
            with trio.move_on_after(self._settings.patience_s):
                try:
                    return await find()
                except GatewayError as error:
                    logger.debug("%s", error)
        return None

    async def _unmap(self, ports: Sequence[Port]) -> None:
        gateway = self._gateway

        async def unmap(port: Port, lease: Lease) -> None:
            try:
                with trio.move_on_after(self._settings.patience_s):
                    if gateway is not None:
                        await gateway.unmap(port, lease)
            except GatewayError as error:
                logger.debug("port %s could not be given back: %s", port, error)

        async with trio.open_nursery() as nursery:
            for port in ports:
                nursery.start_soon(unmap, port, self._leases.pop(port))

    def _become(self, state: MappingState, problem: str = "") -> None:
        if problem:
            logger.info("port mapping: %s", problem)
        self.state, self.problem = state, problem
        self._on_change()
