"""What every transport is: three methods, and on success a byte stream, or a connection that needs nothing more."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import trio

from net.addresses import Multiaddr
from net.identity import PeerId
from net.mux.base import Muxer

if TYPE_CHECKING:
    from net.host import Host

__all__ = [
    "Accept",
    "Arrived",
    "HostedTransport",
    "MuxedConnection",
    "PunchingTransport",
    "RawConnection",
    "RawStream",
    "RebindingTransport",
    "RunningTransport",
    "TrafficLimit",
    "Transport",
]


@dataclass(frozen=True, kw_only=True)
class TrafficLimit:
    """What may pass over a connection before whoever carries it ends it. None: no limit."""

    bytes: int | None = None  # in each direction
    seconds: float | None = None


class RawStream(trio.abc.Stream):
    """A byte stream that can also send without waiting and receive without allocating.

    The first saves a turn of the event loop for each message, the second the page faults of fresh memory.
    """

    @abstractmethod
    def try_send(self, data: bytes | bytearray | memoryview) -> int:
        """Send what goes at once: how many bytes that was, perhaps 0. Not while ``send_all`` waits.

        Raises:
            trio.BrokenResourceError, trio.ClosedResourceError: as ``send_all``.
        """

    def limit_unsent(self, size: int | None) -> None:
        """Take no more while about ``size`` bytes wait for the network: what is sent next waits behind them.

        None takes the limit away. Where a transport cannot tell what waits, this does nothing.
        """

    def abandon(self) -> None:
        """The other side is gone: ``aclose`` is not to wait for its acknowledgements, and forgets the connection.

        Its end on this machine is then free for another connection to the same place. Where a transport keeps nothing
        after ``aclose`` anyway, this does nothing.
        """

    @abstractmethod
    async def receive_into(self, buffer: bytearray | memoryview) -> int:
        """As ``receive_some``, into ``buffer``: how many bytes came; 0 at the end."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RawConnection:
    """A byte stream that nobody has authenticated yet. Whoever gets it closes ``stream``."""

    stream: trio.abc.Stream
    local: Multiaddr | None
    remote: Multiaddr
    limit: TrafficLimit | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class MuxedConnection:
    """A connection whose transport has secured and muxed it already. Whoever gets it runs ``mux``.

    ``peer_id`` is authenticated; whether it is the one that was wanted is the caller's to check.
    """

    mux: Muxer
    peer_id: PeerId
    security: str
    local: Multiaddr | None
    remote: Multiaddr
    limit: TrafficLimit | None = None


Arrived = RawConnection | MuxedConnection
Accept = Callable[[Arrived], Awaitable[None]]


class Transport(Protocol):
    """A way to make and accept connections. Instances are given to a Host as a tuple; there is no registry."""

    def can_dial(self, address: Multiaddr) -> bool:
        """Whether ``address`` (without ``/p2p/...``) is of this transport's kind."""

    async def dial(self, address: Multiaddr, peer_id: PeerId | None = None) -> Arrived:
        """Connect. Waits as long as the network makes it wait: the caller sets the deadline.

        Args:
            address: where.
            peer_id: whom we want there, for transports that need to know.

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


@runtime_checkable
class RunningTransport(Transport, Protocol):
    """A transport with tasks of its own, which serve all its connections."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; the swarm starts it before it dials or listens."""


@runtime_checkable
class HostedTransport(Transport, Protocol):
    """A transport whose connections run over streams of the host's other connections."""

    def attach(self, host: Host) -> None:
        """Use this host. Called once, before it runs."""


@runtime_checkable
class RebindingTransport(Transport, Protocol):
    """A transport whose connections outlive a change of our address."""

    def rebind(self) -> None:
        """Our network has changed: go on from where we are now."""


@runtime_checkable
class PunchingTransport(Transport, Protocol):
    """A transport without simultaneous open: of two that want to meet, one dials and the other opens its NAT."""

    async def punch(self, address: Multiaddr) -> None:
        """Open our NAT for what ``address`` sends to the socket that we would dial it from, for some seconds.

        Raises:
            AddressError, DialError: as ``dial``.
        """
