"""AutoNAT v2's client: have others dial our addresses, and keep what came of it.

A server is any peer at a public address that speaks the protocol. Each address is tried by up to three of them, of
different networks; ``verdicts`` says what follows and when to ask again. What proves a dial is the nonce alone: it
comes over a direct connection from a stranger, for servers dial back with another key.

Source: https://github.com/libp2p/specs/blob/master/autonat/autonat-v2.md
"""

from __future__ import annotations

import logging
import math
import random
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import trio

from net import delimited, errors
from net.addresses import Multiaddr, ip_group
from net.host import Host
from net.identity import PeerId
from net.io import send
from net.mux.base import Stream
from net.nat import endpoints, messages
from net.nat.dialback import DialBackSettings, serve_dial_back
from net.nat.messages import DialDataRequest, DialDataResponse, DialRequest, DialResponse
from net.nat.verdicts import WANTED, Verdicts
from net.swarm import Connection

logger = logging.getLogger(__name__)

MAX_DATA_REQUESTED_BYTES = 100_000  # the most that a server should ask for
MAX_SERVERS = 64  # that are remembered
AT_ONCE = 4  # addresses: a server serves 12 requests of a peer a minute
REQUEST_S = 45.0  # all of one request: more than any server should take
DIAL_BACK_S = 5.0  # for the nonce to come, once its stream is open; go-libp2p


@dataclass(kw_only=True, eq=False)
class _Pending:
    """A request under way, and how the dial-back came in."""

    arrived: bool = False
    local: Multiaddr | None = None


class AutoNat:
    """Both sides of the protocol on a host.

    Args:
        host: whose addresses are checked; it serves others as well.
        on_change: called when something new is known; must not raise.
        settings: of our server; ``allow_private`` holds for both sides.
    """

    def __init__(
        self,
        host: Host,
        *,
        on_change: Callable[[], None] = lambda: None,
        settings: DialBackSettings | None = None,
    ) -> None:
        self._host = host
        self._on_change = on_change
        self._settings = settings or DialBackSettings()
        self._pending: dict[int, _Pending] = {}
        self._servers: dict[PeerId, None] = {}
        self._wake = trio.Event()
        self.verdicts = Verdicts()
        self.rounds = 0  # of checks that somebody took part in
        serve_dial_back(host, self._settings)
        host.handle(messages.DIAL_BACK_PROTOCOL, self._on_dial_back)

    # What is to be checked, and by whom

    def watch(self, addresses: Iterable[Multiaddr]) -> None:
        """Check these from now on, the most important first, and no others."""
        before = self.verdicts.addresses
        self.verdicts.watch(addresses)
        if self.verdicts.addresses != before:
            self._wake.set()

    def recheck(self, addresses: Iterable[Multiaddr] | None = None) -> None:
        """Something has changed about these, or about all: check them anew."""
        self.verdicts.forget(addresses)
        self._wake.set()

    def met(self, connection: Connection, protocols: Iterable[str]) -> None:
        """A peer that speaks these ``protocols``: if it is of use as a server, remember it."""
        if messages.DIAL_REQUEST_PROTOCOL not in protocols:
            return
        if not self._can_judge(connection):
            return
        self._servers.pop(connection.peer_id, None)
        self._servers[connection.peer_id] = None
        while len(self._servers) > MAX_SERVERS:
            del self._servers[next(iter(self._servers))]
        self.verdicts.hasten(_network(connection), trio.current_time())
        self._wake.set()

    @property
    def servers(self) -> list[Connection]:
        """Connections to those who can be asked now, in no order."""
        known = [self._host.swarm.connection(peer_id) for peer_id in self._servers]
        connected = [connection for connection in known if connection is not None and self._can_judge(connection)]
        random.shuffle(connected)
        return connected

    def _can_judge(self, connection: Connection) -> bool:
        """Whether the peer is outside of our network, as far as can be seen; who is reached by a relay is nowhere."""
        return not connection.relayed and (self._settings.allow_private or endpoints.is_public(connection.remote))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Check what is due, until cancelled."""
        task_status.started()
        while True:
            self._wake = trio.Event()
            if self.servers:
                due_now = self.verdicts.due(trio.current_time())
                async with trio.open_nursery() as nursery:
                    for address in due_now[:AT_ONCE]:
                        nursery.start_soon(self._round, address)
            due = self.verdicts.next_due() if self.servers else math.inf
            with trio.move_on_at(due):
                await self._wake.wait()

    async def _round(self, address: Multiaddr) -> None:
        """Have as many servers as it takes try one address, those first that we have not asked yet."""
        asked, since = self.verdicts.asked(address), self.verdicts.begin(address)
        by_network = {_network(server): server for server in self.servers}
        fresh = [network for network in by_network if network not in asked]
        chosen = [*fresh, *(network for network in by_network if network in asked)][:WANTED]

        async def ask(network: str) -> None:
            try:
                found = await self.check(by_network[network], [address])
            except errors.NetError as error:
                logger.debug("AutoNAT: %s: %s", by_network[network].peer_id, error)
                return
            if found is not None:
                self.verdicts.told(address, network, found[1], since=since)

        async with trio.open_nursery() as nursery:
            for network in chosen:
                nursery.start_soon(ask, network)
        self.rounds += bool(chosen)
        self.verdicts.round_over(address, trio.current_time(), alone=len(fresh) <= WANTED, since=since)
        self._on_change()

    # One request

    async def check(self, server: Connection, addresses: Sequence[Multiaddr]) -> tuple[Multiaddr, bool] | None:
        """Have one server dial the first of ``addresses`` that it is willing to.

        Returns: which, and whether it was reached; None when the server tried none, or could not tell.

        Raises:
            RemoteProtocolError: it broke the protocol, or claims what did not happen.
            PeerFailed: no answer in ``REQUEST_S``.
            ProtocolNotSupported, ConnectionLost, StreamReset: there is no such server (any more).
        """
        nonce = secrets.randbits(64)
        pending = self._pending[nonce] = _Pending()
        try:
            stream = await self._host.open_stream_over(server, [messages.DIAL_REQUEST_PROTOCOL])
            try:
                with trio.move_on_after(REQUEST_S) as scope:
                    request = DialRequest(addresses=tuple(each.to_bytes() for each in addresses), nonce=nonce)
                    answer = await self._ask(stream, request)
                if scope.cancelled_caught:
                    raise errors.PeerFailed(server.peer_id, f"no answer to an AutoNAT request in {REQUEST_S:g} s")
            finally:
                stream.reset()
        finally:
            del self._pending[nonce]
        return self._understand(answer, addresses, pending)

    async def _ask(self, stream: Stream, request: DialRequest) -> DialResponse:
        await _send(stream, request)
        answer = messages.decode_answer(await _receive(stream))
        if isinstance(answer, DialDataRequest):
            if answer.index >= len(request.addresses) or answer.count > MAX_DATA_REQUESTED_BYTES:
                raise errors.RemoteProtocolError(f"an AutoNAT server asks for {answer.count} bytes")
            for sent in range(0, answer.count, messages.MAX_DATA_BYTES):
                count = min(messages.MAX_DATA_BYTES, answer.count - sent)
                await _send(stream, DialDataResponse(data=bytes(count)))
            answer = messages.decode(await _receive(stream), DialResponse)
        return answer

    @staticmethod
    def _understand(
        answer: DialResponse, addresses: Sequence[Multiaddr], pending: _Pending
    ) -> tuple[Multiaddr, bool] | None:
        if answer.status != messages.OK:
            return None
        if answer.index >= len(addresses):
            raise errors.RemoteProtocolError(f"an AutoNAT server dialled address {answer.index} of {len(addresses)}")
        address = addresses[answer.index]
        if answer.dialled == messages.DIAL_ERROR:
            return address, False
        # It says that it was here (OK), or nearly: what counts is whether the nonce came in, over such a transport.
        is_proven = pending.arrived and _alike(pending.local, address)
        if is_proven and answer.dialled in (messages.OK, messages.DIAL_BACK_ERROR):
            return address, True
        if answer.dialled == messages.OK:
            raise errors.RemoteProtocolError(f"an AutoNAT server claims to have reached {address}, and did not")
        return None

    async def _on_dial_back(self, connection: Connection, stream: Stream) -> None:
        with trio.fail_after(DIAL_BACK_S):
            data = await _receive(stream)
            pending = self._pending.get(messages.decode_dial_back(data))
            if pending is None:
                raise errors.RemoteProtocolError("a dial-back that nobody asked for")
            if connection.outbound or connection.relayed:
                raise errors.RemoteProtocolError("a dial-back over a connection that nobody dialled back")
            pending.arrived, pending.local = True, connection.local
            await send(stream, delimited.frame(messages.encode_dial_back_response()))


def _alike(local: Multiaddr | None, address: Multiaddr) -> bool:
    """Whether a connection that came in at ``local`` can have been to ``address``: NAT changes the rest, not this."""
    return local is None or endpoints.shape(local)[:2] == endpoints.shape(address)[:2]


def _network(server: Connection) -> str:
    return ip_group(server.remote) or str(server.peer_id)


async def _send(stream: Stream, message: messages.Message) -> None:
    await send(stream, delimited.frame(messages.encode(message)))


async def _receive(stream: Stream) -> bytes:
    return await delimited.receive(stream, messages.MAX_MESSAGE_BYTES, "an AutoNAT message")
