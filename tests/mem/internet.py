"""An internet of IPs and NATs in memory, under virtual time: transports for machines, public or behind a router.

A machine dials from the port where it listens, as hosts do that want to be met half-way.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from net import addresses
from net.addresses import Multiaddr
from net.errors import AddressError, DialError
from net.identity import PeerId
from net.transports.base import Accept, RawConnection
from net.transports.memory import memory_stream_pair

Where = tuple[str, int]


@dataclass(kw_only=True, eq=False)
class Router:
    """A NAT. ``forwards`` leads from an outer port to an inner endpoint, as a person or UPnP sets it."""

    ip: str
    symmetric: bool = False
    forwards: dict[int, Where] = field(default_factory=dict)
    _ports: itertools.count[int] = field(default_factory=lambda: itertools.count(30_000))
    _mapped: dict[Where, int] = field(default_factory=dict)

    def outer(self, inner: Where) -> Where:
        if self.symmetric:
            return self.ip, next(self._ports)
        return self.ip, self._mapped.setdefault(inner, next(self._ports))


class Internet:
    """All public endpoints. ``dials`` counts those that were dialled, whether or not anybody was there."""

    def __init__(self) -> None:
        self._listeners: dict[tuple[Router | None, str, int], tuple[Accept, trio.Nursery]] = {}
        self._routers: dict[str, Router] = {}
        self.dials: list[Where] = []

    def router(self, ip: str, *, symmetric: bool = False) -> Router:
        self._routers[ip] = router = Router(ip=ip, symmetric=symmetric)
        return router

    def machine(self, ip: str, behind: Router | None = None) -> Machine:
        return Machine(self, ip, behind)


class Machine:
    """The transport of one machine."""

    def __init__(self, internet: Internet, ip: str, behind: Router | None) -> None:
        self._internet = internet
        self._ports = itertools.count(50_000)
        self._listening: int | None = None
        self.shares_port = True  # dials go out from where it listens
        self.ip = ip
        self.behind = behind

    def can_dial(self, address: Multiaddr) -> bool:
        return addresses.host_port(address) is not None

    async def dial(self, address: Multiaddr, peer_id: PeerId | None = None) -> RawConnection:
        await trio.lowlevel.checkpoint()
        where = addresses.host_port(address)
        assert where is not None
        inner = self.ip, (self._listening if self.shares_port else None) or next(self._ports)
        found = self._find(where)
        if found is None:
            await trio.sleep(1)
            raise DialError(f"{address}: no answer")
        (accept, nursery), at, is_near = found
        seen = inner if self.behind is None or is_near else self.behind.outer(inner)
        ours, theirs = memory_stream_pair()
        nursery.start_soon(accept, RawConnection(stream=theirs, local=addresses.tcp(*at), remote=addresses.tcp(*seen)))
        return RawConnection(stream=ours, local=addresses.tcp(*inner), remote=address)

    def _find(self, where: Where) -> tuple[tuple[Accept, trio.Nursery], Where, bool] | None:
        internet = self._internet
        near = internet._listeners.get((self.behind, *where))
        if near is not None:
            return near, where, True
        internet.dials.append(where)
        router = internet._routers.get(where[0])
        if router is None:
            far = internet._listeners.get((None, *where))
            return None if far is None else (far, where, False)
        inner = router.forwards.get(where[1])
        if inner is None or router is self.behind:  # no hairpinning
            return None
        behind = internet._listeners.get((router, *inner))
        return None if behind is None else (behind, inner, False)

    async def listen(
        self,
        address: Multiaddr,
        accept: Accept,
        *,
        task_status: trio.TaskStatus[Sequence[Multiaddr]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        where = addresses.host_port(address)
        if where is None or where[0] != self.ip:
            raise AddressError(f"{address} is not here")
        key = (self.behind, *where)
        self._listening = where[1]
        async with trio.open_nursery() as nursery:
            self._internet._listeners[key] = accept, nursery
            try:
                task_status.started([address])
                await trio.sleep_forever()
            finally:
                del self._internet._listeners[key]
                self._listening = None
