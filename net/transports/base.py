"""What every transport is: three methods, and a byte stream on success."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from net.addresses import Multiaddr

__all__ = ["Accept", "RawConnection", "Transport"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RawConnection:
    """A byte stream that nobody has authenticated yet. Whoever gets it closes ``stream``."""

    stream: trio.abc.Stream
    local: Multiaddr | None
    remote: Multiaddr


Accept = Callable[[RawConnection], Awaitable[None]]


class Transport(Protocol):
    """A way to make and accept connections. Instances are given to a Host as a tuple; there is no registry."""

    def can_dial(self, address: Multiaddr) -> bool:
        """Whether ``address`` (without ``/p2p/...``) is of this transport's kind."""

    async def dial(self, address: Multiaddr) -> RawConnection:
        """Connect. Waits as long as the network makes it wait: the caller sets the deadline.

        Raises:
            DialError: refused, unreachable, or no such host.
        Cancellation: leaves nothing open.
        """

    async def listen(
        self,
        address: Multiaddr,
        accept: Accept,
        *,
        task_status: trio.TaskStatus[Sequence[Multiaddr]],
    ) -> None:
        """Accept connections until cancelled; ``started`` gets the addresses really bound.

        ``accept`` runs as a task for each connection and must not raise.

        Raises:
            AddressError: the address cannot be listened on (in use, not ours, not permitted).
        """
