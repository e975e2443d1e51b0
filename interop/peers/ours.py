"""Our own host behind the interface of the foreign ones, for cases in which it plays their parts."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from interop.peers.base import ECHO, NO_RELAYING, PeerError, Relaying, Sight, answer_echo, listen_address, request_echo
from net.addresses import Multiaddr, PeerAddress, relayed_by
from net.dht.kademlia import Kademlia
from net.host import Host, open_host
from net.identity import Identity, PeerId
from net.ping import ping_once
from net.relay.server import RelayServer

OURS = "ours"


class OurDriver:
    name = OURS

    def fetch(self) -> None:
        """It is here."""

    @asynccontextmanager
    async def start(self, transport: str, security: str, relaying: Relaying = NO_RELAYING) -> AsyncIterator[OurPeer]:
        listen = [listen_address("tcp")]
        if relaying.through is not None:
            listen.append(relayed_by(relaying.through))
        async with open_host(Identity.generate(), listen=listen) as host, trio.open_nursery() as nursery:
            host.handle(ECHO, lambda _, stream: answer_echo(stream))
            if relaying.serves:
                await nursery.start(RelayServer(host).run)
            yield OurPeer(host)
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def start_finder(self) -> AsyncIterator[OurFinder]:
        async with (
            open_host(Identity.generate(), listen=[listen_address("tcp")]) as host,
            trio.open_nursery() as nursery,
        ):
            kademlia = Kademlia(host, server=True)
            await nursery.start(kademlia.run)
            yield OurFinder(kademlia)
            nursery.cancel_scope.cancel()


class OurPeer:
    def __init__(self, host: Host) -> None:
        self._host = host
        self.address = host.peer_addresses[0]

    async def echo(self, to: PeerAddress, count: int) -> float:
        if not (await self._host.connect(to.peer_id, [to.address])).relayed:
            raise PeerError("the connection does not go through the relay")
        async with self._host.stream(to.peer_id, [ECHO]) as stream:
            return await request_echo(stream, os.urandom(count))

    async def ping(self, to: PeerAddress) -> float:
        await self._host.connect(to.peer_id, [to.address])
        return await ping_once(self._host, to.peer_id)

    async def identify(self, to: PeerAddress) -> Sight:
        raise PeerError("not needed here")


class OurFinder:
    def __init__(self, kademlia: Kademlia) -> None:
        self._kademlia = kademlia
        self.address = kademlia.host.peer_addresses[0]

    async def join(self, to: PeerAddress) -> None:
        await self._kademlia.join([to])

    async def provide(self, multihash: bytes) -> None:
        if not await self._kademlia.provide(multihash):
            raise PeerError("we found nobody to tell")

    async def find_providers(self, multihash: bytes) -> Sequence[PeerId]:
        return [contact.peer_id for contact in await self._kademlia.find_providers(multihash)]

    async def find_peer(self, peer_id: PeerId) -> Sequence[Multiaddr]:
        contact = await self._kademlia.find_peer(peer_id)
        return () if contact is None else contact.addresses
