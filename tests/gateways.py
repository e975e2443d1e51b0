"""How tests give a port mapper its router."""

from __future__ import annotations

import trio

from net.nat.gateway import Gateway, NoGateway
from net.nat.mapping import FindGateway


def found(gateway: Gateway) -> FindGateway:
    """One that is there."""

    async def find() -> Gateway:
        await trio.lowlevel.checkpoint()
        return gateway

    return find


async def nothing() -> Gateway:
    """None."""
    raise NoGateway("nobody is there")
