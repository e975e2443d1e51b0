"""AutoNAT v2's server: dial somebody back and say whether that went well.

Each dial-back is made by a host of its own, with another key, from a port where nobody listens: the asker's NAT has no
mapping for it, no open connection is used for it, and neither side's connections are disturbed by it. The asker knows
it by the nonce alone. To have somebody else's machine dialled costs the asker more bytes than it costs the victim.

Source: https://github.com/libp2p/specs/blob/master/autonat/autonat-v2.md; figures without another source are
go-libp2p's.
"""

from __future__ import annotations

import logging
import random
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import trio

from net import delimited, errors
from net.addresses import Multiaddr, ip_group, is_relayed
from net.host import Host, open_host
from net.identity import Identity, PeerId
from net.io import send
from net.mux.base import Stream
from net.nat import endpoints, messages
from net.nat.messages import DialDataRequest, DialDataResponse, DialRequest, DialResponse
from net.swarm import Connection
from net.transports.base import Transport

logger = logging.getLogger(__name__)

MAX_ADDRESSES = 50  # of a request that are looked at


@dataclass(frozen=True, kw_only=True)
class DialBackSettings:
    """What askers may cost us.

    Attributes:
        allow_private: dial, and answer, addresses that are not public: for tests, and swarms within one network.
        transports: those that dial back, made anew each time; None for the usual ones.
    """

    per_minute: int = 60
    per_minute_and_peer: int = 12  # also for all peers of one IP group together
    with_data_per_minute: int = 12
    at_once: int = 16  # ours
    least_data_bytes: int = 30_000
    most_data_bytes: int = 100_000
    victim_pause_s: float = 3.0  # at most, drawn by lot, before another IP than the asker's is dialled
    stream_s: float = 30.0  # one request; ours (15 s there)
    dial_s: float = 10.0
    deliver_s: float = 5.0
    allow_private: bool = False
    transports: Callable[[], Sequence[Transport]] | None = None


class RateLimiter:
    """Requests of the last minute: in all, of one asker, and those that had to be paid for. No I/O."""

    WINDOW_S = 60.0

    def __init__(self, settings: DialBackSettings) -> None:
        self._settings = settings
        self._requests: deque[tuple[float, tuple[str, ...], bool]] = deque()
        self._of: Counter[str] = Counter()
        self._paid = 0

    def accept(self, askers: Iterable[str], now: float, *, paid: bool) -> bool:
        """Whether a request may be served; if so, it is counted. ``askers`` are all the names that the asker has."""
        settings, names = self._settings, tuple(askers)
        self._expire(now)
        if len(self._requests) >= settings.per_minute or (paid and self._paid >= settings.with_data_per_minute):
            return False
        if any(self._of[name] >= settings.per_minute_and_peer for name in names):
            return False
        self._requests.append((now, names, paid))
        self._of.update(names)
        self._paid += paid
        return True

    def _expire(self, now: float) -> None:
        while self._requests and now - self._requests[0][0] >= self.WINDOW_S:
            _, names, paid = self._requests.popleft()
            self._paid -= paid
            self._of.subtract(names)
            for name in names:
                if not self._of[name]:
                    del self._of[name]


def serve_dial_back(host: Host, settings: DialBackSettings | None = None) -> None:
    """Let others ask ``host`` to dial them."""
    server = _Server(host, settings or DialBackSettings())
    host.handle(messages.DIAL_REQUEST_PROTOCOL, server.answer)


class _Server:
    def __init__(self, host: Host, settings: DialBackSettings) -> None:
        self._host = host
        self._settings = settings
        self._limiter = RateLimiter(settings)
        self._busy = 0

    async def answer(self, connection: Connection, stream: Stream) -> None:
        with trio.fail_after(self._settings.stream_s):
            data = await delimited.receive(stream, messages.MAX_MESSAGE_BYTES, "an AutoNAT message")
            request = messages.decode(data, DialRequest)
            await _send(stream, await self._serve(connection, stream, request))

    async def _serve(self, connection: Connection, stream: Stream, request: DialRequest) -> DialResponse:
        settings = self._settings
        chosen = self._choose(connection, request)
        if chosen is None:
            return DialResponse(status=messages.REFUSED)
        index, address = chosen
        paid = not same_ip(connection.now_at, address)
        askers = {str(connection.peer_id), ip_group(connection.now_at) or str(connection.peer_id)}
        if self._busy >= settings.at_once or not self._limiter.accept(askers, trio.current_time(), paid=paid):
            return DialResponse(status=messages.REJECTED)
        self._busy += 1
        try:
            if paid:
                await self._collect(stream, index)
                await trio.sleep(random.uniform(0, settings.victim_pause_s))
            dialled = await self._dial_back(connection.peer_id, address, request.nonce)
        finally:
            self._busy -= 1
        return DialResponse(status=messages.OK, index=index, dialled=dialled)

    def _choose(self, connection: Connection, request: DialRequest) -> tuple[int, Multiaddr] | None:
        """The first address that we are willing to dial: a plain, public one of a family that we have.

        Who is in our own network is not helped: what we can reach says nothing about what others can.
        """
        private = self._settings.allow_private
        if not private and not endpoints.is_public(connection.remote):
            return None
        for index, data in enumerate(request.addresses[:MAX_ADDRESSES]):
            address = endpoints.parse(data)
            if address is None or is_relayed(address) or not self._host.swarm.can_dial(address):
                continue
            endpoint = endpoints.read(address)
            if private or (endpoint is not None and endpoint.is_public and has_route(endpoint.ip.version)):
                return index, address
        return None

    async def _collect(self, stream: Stream, index: int) -> None:
        """Raises:
        RemoteProtocolError, ConnectionLost, StreamReset: the asker does not pay.
        """
        settings = self._settings
        left = random.randint(settings.least_data_bytes, settings.most_data_bytes)
        await _send(stream, DialDataRequest(index=index, count=left))
        while left > 0:
            data = await delimited.receive(stream, messages.MAX_MESSAGE_BYTES, "an AutoNAT message")
            part = messages.decode(data, DialDataResponse)
            if not part.data:
                raise errors.RemoteProtocolError("an AutoNAT message that was to carry data carries none")
            left -= len(part.data)

    async def _dial_back(self, peer_id: PeerId, address: Multiaddr, nonce: int) -> int:
        """What to report."""
        transports = None if self._settings.transports is None else self._settings.transports()
        limits, swarm_key = self._host.limits, self._host.swarm.swarm_key
        async with open_host(Identity.generate(), transports=transports, limits=limits, swarm_key=swarm_key) as dialler:
            dialled = messages.DIAL_ERROR
            with trio.move_on_after(self._settings.dial_s):
                try:
                    connection = await dialler.swarm.dial(peer_id, [address])
                    dialled = messages.DIAL_BACK_ERROR
                    with trio.fail_after(self._settings.deliver_s):
                        await _deliver(dialler, connection, nonce)
                    dialled = messages.OK
                except (errors.NetError, trio.TooSlowError) as error:
                    logger.debug("dialling %s back at %s: %s", peer_id, address, error)
        return dialled


async def _deliver(dialler: Host, connection: Connection, nonce: int) -> None:
    stream = await dialler.open_stream_over(connection, [messages.DIAL_BACK_PROTOCOL])
    try:
        await send(stream, delimited.frame(messages.encode_dial_back(nonce)))
        await stream.send_eof()
        data = await delimited.receive(stream, messages.MAX_MESSAGE_BYTES, "an AutoNAT message")
        messages.check_dial_back_response(data)
    finally:
        stream.reset()


async def _send(stream: Stream, message: messages.Message) -> None:
    await send(stream, delimited.frame(messages.encode(message)))


def same_ip(one: Multiaddr, other: Multiaddr) -> bool:
    """Whether both have an IP, and the same."""
    first, second = endpoints.read(one), endpoints.read(other)
    return first is not None and second is not None and first.ip == second.ip


def has_route(version: int) -> bool:
    """Whether this machine can send to the internet over IPv4, or over IPv6. Nothing is sent."""
    family, target = (socket.AF_INET, "192.0.2.1") if version == 4 else (socket.AF_INET6, "2001:db8::1")
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
    except OSError:
        return False
    return True
