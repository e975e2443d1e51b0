"""What a muxer is: many streams over one connection. Yamux makes one of a secure channel; QUIC is one by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from net.addresses import Multiaddr


class Stream(trio.abc.HalfCloseableStream):
    """One stream. At most one task sends and one receives at a time.

    Raises (from sending and receiving): ``errors.StreamReset`` when the peer reset it,
    ``errors.ConnectionLost`` when the connection ended under it, ``trio.ClosedResourceError`` when it was
    closed or reset here. An end that the peer meant is ``b""``.

    Cancellation: of ``send_all``, an unknown part was sent; of ``receive_some``, nothing is lost.
    """

    @abstractmethod
    async def receive_some(self, max_bytes: int | None = None) -> bytes: ...

    @abstractmethod
    def reset(self) -> None:
        """End both directions now; the peer learns that it was no proper end."""

    async def leave(self) -> None:
        """As ``aclose``, and the peer is to know: what it sends once our end has been sent is answered by a reset.

        So a closed socket answers. Where a muxer cannot tell, this is ``aclose``.
        """
        await self.aclose()

    def limit_window(self, size: int) -> None:
        """Let the peer have at most about ``size`` bytes on their way to us, where a muxer can tell. What it has been
        given already stays its own."""


class Muxer(Protocol):
    """Streams over one connection, for as long as ``run`` runs."""

    used_at: float  # trio's time when the last stream was opened, by either side

    @property
    def round_trip_s(self) -> float | None:
        """Smoothed; None before it was measured."""

    @property
    def doubt_at(self) -> float:
        """trio's time from which on the peer, which was asked by ``check``, is more likely gone than slow; infinity
        while it owes no answer. It stays when the connection ends for want of one.
        """

    @property
    def moved_to(self) -> Multiaddr | None:
        """Where the peer is now, if it has moved since the connection was made and has shown that it is there."""

    @property
    def open_streams(self) -> int: ...

    @property
    def is_closed(self) -> bool:
        """Whether it takes no new streams: closed, or about to be."""

    async def run(
        self,
        on_stream: Callable[[Stream], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Carry the streams until either side closes the connection; ``on_stream`` runs for each of the peer's.

        Always closes what is below and fails what is still open. ``on_stream`` must not raise.
        Cancellation: says goodbye for at most a second.
        """

    def open_stream(self) -> Stream:
        """A new stream. The peer may still refuse it, which then reads as a reset.

        Raises:
            LimitExceeded: too many are open.
            ConnectionLost: the connection is closed.
        """

    def check(self) -> None:
        """Have the peer show soon, within about a second, that it is there. If it does not, the connection ends."""

    def close(self) -> None:
        """Make ``run`` end; of a connection that nobody runs, free what it holds. Again is nothing."""
