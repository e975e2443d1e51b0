"""Peers of the same network, found by multicast DNS through zeroconf, which has threads of its own.

Each node is an instance of the service ``_p2p._udp.local`` under a name that means nothing; its TXT record holds
``dnsaddr=/ip4/.../p2p/PEERID`` once for each address. What is heard is hearsay: it goes to the peerstore, and who is
there is seen when somebody dials. So peers behind one router meet directly, whatever the router does.

Source: https://github.com/libp2p/specs/blob/master/discovery/mdns.md
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import trio

from net.addresses import Multiaddr, PeerAddress, parse_peer
from net.errors import AddressError
from net.host import Host
from net.nat import endpoints

logger = logging.getLogger(__name__)

SERVICE = "_p2p._udp.local."
PREFIX = b"dnsaddr="
MAX_STRING_BYTES = 255  # of a TXT record's string
MAX_ADDRESSES = 16  # of one answer
MAX_NAMES = 256  # that wait to be looked into; more are passed over
LOOK_S = 10.0  # between looks at this machine's own addresses
RESOLVE_MS = 3000
LEAVE_S = 2.0  # to say good-bye


def write_txt(addresses: Iterable[PeerAddress]) -> bytes:
    """The TXT record: strings, each behind its length."""
    strings = [PREFIX + str(address).encode() for address in addresses]
    return b"".join(bytes([len(each)]) + each for each in strings[:MAX_ADDRESSES] if len(each) <= MAX_STRING_BYTES)


def read_txt(data: bytes) -> list[PeerAddress]:
    """The addresses in somebody's TXT record that can be of this network; all else is left out."""
    found: list[PeerAddress] = []
    position = 0
    while position < len(data) and len(found) < MAX_ADDRESSES:
        length = data[position]
        string = data[position + 1 : position + 1 + length]
        position += 1 + length
        if not string.startswith(PREFIX):
            continue
        try:
            peer = parse_peer(string[len(PREFIX) :].decode("ascii"))
        except (AddressError, ValueError):
            continue
        if is_near(peer.address):
            found.append(peer)
    return found


def is_near(address: Multiaddr) -> bool:
    """Whether peers of the same network can mean the same by it."""
    endpoint = endpoints.read(address)
    return endpoint is not None and not (endpoint.ip.is_loopback or endpoint.ip.is_unspecified)


class _Refused(Exception):
    """By zeroconf, or by the network."""


class Mdns:
    """Announces the host in its network, and tells the host who else is there.

    Args:
        host: whose peerstore hears of others.
        interfaces: the IPs of those to use; all by default.
        on_peer: told of each address as well; must not raise.
    """

    def __init__(
        self,
        host: Host,
        *,
        interfaces: Sequence[str] | None = None,
        on_peer: Callable[[PeerAddress], None] = lambda peer: None,
    ) -> None:
        self._host = host
        self._interfaces = interfaces
        self._on_peer = on_peer
        self._name = f"{secrets.token_hex(16)}.{SERVICE}"  # 32 characters or more, says the specification

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. ``started`` comes at once; a network without multicast is only logged.

        Cancellation: says good-bye, for at most ``LEAVE_S``.
        """
        task_status.started()
        while not self._near():  # noqa: ASYNC110  nobody tells when a machine gets an address
            await trio.sleep(LOOK_S)
        try:
            responder = await trio.to_thread.run_sync(self._open)
        except (OSError, RuntimeError) as error:  # the latter when no interface will do
            logger.warning("peers of this network cannot be looked for by mDNS: %s", error)
            return
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._announce, responder)
                nursery.start_soon(self._browse, responder)
        finally:
            with trio.move_on_after(LEAVE_S, shield=True):
                await trio.to_thread.run_sync(responder.close, abandon_on_cancel=True)

    def _near(self) -> list[PeerAddress]:
        own = self._host.own_addresses
        return [PeerAddress(address=each, peer_id=self._host.peer_id) for each in own if is_near(each)]

    def _open(self) -> Any:
        import zeroconf

        return zeroconf.Zeroconf(interfaces=self._interfaces or zeroconf.InterfaceChoice.All)

    async def _announce(self, responder: Any) -> None:
        """Under the name for as long as we live; anew when the addresses change, and until it has worked."""
        import zeroconf

        told: list[PeerAddress] = []
        is_known = False
        while True:
            near = self._near()
            if near != told:
                where = [endpoint for each in near if (endpoint := endpoints.read(each.address)) is not None]
                info = zeroconf.ServiceInfo(
                    SERVICE,
                    self._name,
                    port=where[0].port if where else 1,
                    addresses=list(dict.fromkeys(endpoint.ip.packed for endpoint in where)),
                    properties=write_txt(near),
                    server=self._name,
                )
                try:
                    await self._call(responder.update_service if is_known else responder.register_service, info)
                    is_known, told = True, near
                except _Refused as refused:  # what took too long may have been done after all
                    is_known = is_known or isinstance(refused.__cause__, zeroconf.ServiceNameAlreadyRegistered)
                    logger.debug("mDNS: %s", refused)
            await trio.sleep(LOOK_S)

    async def _browse(self, responder: Any) -> None:
        from zeroconf import ServiceBrowser, ServiceStateChange

        names, coming = trio.open_memory_channel[str](MAX_NAMES)
        token = trio.lowlevel.current_trio_token()

        def heard(name: str) -> None:
            try:
                names.send_nowait(name)
            except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # more than we look into, or we are leaving

        def changed(zeroconf: Any, service_type: str, name: str, state_change: ServiceStateChange) -> None:
            if state_change is ServiceStateChange.Removed:
                return  # nobody would answer
            try:
                token.run_sync_soon(heard, name)
            except trio.RunFinishedError:
                pass  # everything ends

        ServiceBrowser(responder, SERVICE, handlers=[changed])  # ends with the responder
        async for name in coming:
            if name != self._name:
                await self._look_into(responder, name)

    async def _look_into(self, responder: Any, name: str) -> None:
        try:
            info = await self._call(responder.get_service_info, SERVICE, name, RESOLVE_MS)
        except _Refused as refused:
            logger.debug("mDNS: %r: %s", name, refused)
            return
        for peer in read_txt(info.text or b"") if info is not None else ():
            if peer.peer_id != self._host.peer_id:
                self._host.peerstore.hear(peer.peer_id, [peer.address])
                self._on_peer(peer)

    async def _call(self, call: Callable[..., Any], *arguments: object) -> Any:
        """What zeroconf answers.

        Raises:
            _Refused: it does not, or the network lets it not.
        """
        import zeroconf

        try:
            return await trio.to_thread.run_sync(call, *arguments, abandon_on_cancel=True)
        except (zeroconf.Error, OSError) as error:
            raise _Refused(str(error) or type(error).__name__) from error
