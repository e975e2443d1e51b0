"""libp2p's own Kademlia on a host: finds peers and who provides a piece of content, among nodes of every kind.

Beside ``service.py``, which is Raceme's own DHT of signed records: what lies here is what others' nodes understand. A
key is the multihash of the content. That somebody provides it is that peer's word; where it is may be anybody's.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import trio

from net import errors
from net.addresses import PeerAddress
from net.dht import kademlia_wire as wire
from net.dht.backoff import Backoff
from net.dht.kademlia_wire import Message, Type
from net.dht.lookup import Lookup
from net.dht.providers import ProviderStore
from net.dht.table import Contact, K, RoutingTable
from net.dht.walking import walk
from net.host import Host
from net.identify import identify_over
from net.identity import PeerId
from net.mux.base import Stream
from net.swarm import Connection

logger = logging.getLogger(__name__)

SHA_256 = b"\x12\x20"  # how a multihash of that kind begins


@dataclass(frozen=True, kw_only=True)
class KademliaSettings:
    query_s: float = 5.0  # one question to one peer
    patience_s: float = 0.5  # see ``lookup``
    slow_s: float = 2.0
    backoff_s: float = 60.0  # before a server that others named and that did not answer is asked again
    paths: int = 3
    refresh_s: float = 300.0  # between refreshes of the table: our neighbours and a random place in turn
    provide_s: float = 22 * 3600.0  # between renewals; the specification's
    idle_s: float = 60.0  # a stream that asks nothing is closed
    identify_at_once: int = 4  # new peers that are asked at the same time whether they are servers
    max_provided: int = 1024  # our own keys; others keep no more of one peer's either


class Kademlia:
    """Args:
    host: whose connections are used.
    server: whether we answer others. Servers must be reachable; clients only ask.
    """

    def __init__(self, host: Host, *, server: bool, settings: KademliaSettings | None = None) -> None:
        self.host = host
        self.settings = settings or KademliaSettings()
        self.table = RoutingTable(host.peer_id)
        self.providers = ProviderStore()
        self._server = server
        self._backoff = Backoff(self.settings.backoff_s)
        self._bootstrap: list[PeerAddress] = []
        self._provided: dict[bytes, float] = {}  # when each is to be told again
        if server:
            host.handle(wire.PROTOCOL_ID, self._serve)

    # Coming and going

    async def join(self, bootstrap: Iterable[PeerAddress]) -> None:
        """Find our neighbours through servers that are known.

        Raises:
            DialError: not one of them answers; the text says why for each.
        """
        self._bootstrap = [peer for peer in bootstrap if peer.peer_id != self.host.peer_id]
        await self._meet_bootstrap()
        await self.lookup(self.host.peer_id.to_bytes())

    async def _meet_bootstrap(self) -> None:
        failures: list[str] = []

        async def meet(peer: PeerAddress) -> None:
            contact = Contact(peer_id=peer.peer_id, addresses=(peer.address,))
            try:
                await self._ask(contact, Message(type=Type.FIND_NODE, key=self.host.peer_id.to_bytes()))
            except errors.NetError as error:
                failures.append(str(error))

        async with trio.open_nursery() as nursery:
            for peer in self._bootstrap:
                nursery.start_soon(meet, peer)
        if failures and len(failures) == len(self._bootstrap):
            raise errors.DialError(f"no bootstrap node speaks {wire.PROTOCOL_ID}: {'; '.join(failures)}")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Get to know servers that connect, refresh the table and renew what we provide, until cancelled."""
        arrivals, comings = trio.open_memory_channel[Connection](self.host.limits.connections)

        def watch(connection: Connection) -> None:
            try:
                arrivals.send_nowait(connection)
            except trio.WouldBlock:
                logger.debug("too many new connections: %s is not asked what it speaks", connection.peer_id)

        self.host.swarm.watchers.append(watch)
        try:
            async with trio.open_nursery() as nursery:
                for connection in self.host.swarm.connections:
                    watch(connection)
                for _ in range(self.settings.identify_at_once):
                    nursery.start_soon(self._meet_each, comings)
                nursery.start_soon(self._refresh)
                task_status.started()
        finally:
            self.host.swarm.watchers.remove(watch)

    async def _meet_each(self, comings: trio.MemoryReceiveChannel[Connection]) -> None:
        async for connection in comings:
            try:
                message = await identify_over(self.host, connection)
            except errors.NetError as error:
                logger.debug("%s does not identify itself: %s", connection.peer_id, error)
                continue
            addresses = wire.read_addresses(message.listen_addrs, connection.peer_id, self.host.swarm.can_dial)
            self.host.peerstore.hear(connection.peer_id, addresses)
            if wire.PROTOCOL_ID in message.protocols:
                contact = Contact(peer_id=connection.peer_id, addresses=addresses, seen_at=connection.now_at)
                self._backoff.forgive(connection.peer_id)
                self.table.add(contact)

    async def _refresh(self) -> None:
        for near_us in itertools.cycle((True, False)):
            await trio.sleep(self.settings.refresh_s * random.uniform(0.8, 1.2))
            now = trio.current_time()
            self.providers.expire(now)
            if not len(self.table):
                try:
                    await self._meet_bootstrap()
                except errors.DialError as error:
                    logger.warning("cannot reach any known peer: %s", error)
            await self.lookup(self.host.peer_id.to_bytes() if near_us else SHA_256 + os.urandom(32))
            for key in [key for key, due in self._provided.items() if due <= now]:
                if key in self._provided:  # not withdrawn while others were renewed
                    await self._tell(key)

    # Content

    async def provide(self, key: bytes) -> int:
        """Say that we have what is under ``key``, now and every ``provide_s`` while ``run`` runs.

        Returns: how many servers were told; they do not answer.

        Raises:
            LocalProtocolError: that is no key.
            LimitExceeded: we provide too much already.
        """
        _check_key(key)
        if key not in self._provided and len(self._provided) >= self.settings.max_provided:
            raise errors.LimitExceeded(f"{self.settings.max_provided} keys are provided, the most allowed")
        return await self._tell(key)

    def withdraw(self, key: bytes) -> None:
        """Do not say it again. Others forget it by and by: the protocol has no word for it."""
        self._provided.pop(key, None)
        self.providers.drop(key, self.host.peer_id)

    async def _tell(self, key: bytes) -> int:
        now = trio.current_time()
        self._provided[key] = now + self.settings.provide_s
        us = self._us()
        if self._server:
            try:
                self.providers.put(key, us, now)
            except errors.RecordError as error:
                logger.debug("our own word is not kept here: %s", error)
        told = 0

        async def tell(contact: Contact) -> None:
            nonlocal told
            try:
                with trio.fail_after(self.settings.query_s):
                    async with self.host.stream(contact.peer_id, [wire.PROTOCOL_ID], contact.addresses) as stream:
                        await wire.send_message(stream, Message(type=Type.ADD_PROVIDER, key=key, providers=(us,)))
                told += 1
            except (errors.NetError, trio.TooSlowError) as error:
                logger.debug("%s was not told what we provide: %s", contact.peer_id, error)

        async with trio.open_nursery() as nursery:
            for contact in await self.lookup(key):
                nursery.start_soon(tell, contact)
        return told

    async def find_providers(self, key: bytes, *, count: int = K) -> list[Contact]:
        """Up to ``count`` peers that say they have what is under ``key``. Some may be known without an address.

        One server's answer makes up no more than a share of them, unless others know none: who invents providers does
        not end the search.

        Raises:
            LocalProtocolError: that is no key.
        """
        _check_key(key)
        share = -(-count // self.settings.paths)
        found = {each.peer_id: each for each in self.providers.get(key, trio.current_time())}
        spare: dict[PeerId, Contact] = {}

        def take(answer: Message) -> None:
            new = 0
            for each in answer.providers:
                if each.peer_id in found:
                    if each.addresses and not found[each.peer_id].addresses:
                        found[each.peer_id] = each
                elif new < share:
                    found[each.peer_id] = each
                    new += 1
                else:
                    spare.setdefault(each.peer_id, each)

        if len(found) < count:
            await self._walk(Message(type=Type.GET_PROVIDERS, key=key), take, is_enough=lambda: len(found) >= count)
        everybody = found | {peer_id: each for peer_id, each in spare.items() if peer_id not in found}
        return [each for peer_id, each in everybody.items() if peer_id != self.host.peer_id][:count]

    # Peers

    async def lookup(self, key: bytes) -> list[Contact]:
        """The servers nearest to where ``key`` lies that answer, nearest first, at most K. It may be a peer's id."""
        return (await self._walk(Message(type=Type.FIND_NODE, key=key))).closest

    async def find_peer(self, peer_id: PeerId) -> Contact | None:
        """Where others say that the peer is; None when nobody knows."""
        found: list[Contact] = []

        def take(answer: Message) -> None:
            found.extend(each for each in answer.closer if each.peer_id == peer_id and each.addresses)

        await self._walk(Message(type=Type.FIND_NODE, key=peer_id.to_bytes()), take, is_enough=lambda: bool(found))
        return found[0] if found else None

    # Asking others

    async def _walk(
        self,
        question: Message,
        take: Callable[[Message], None] = lambda answer: None,
        *,
        is_enough: Callable[[], bool] = lambda: False,
    ) -> Lookup:
        settings, target = self.settings, wire.place_of(question.key)
        lookup = Lookup(
            self.host.peer_id,
            target,
            self.table.closest(target),
            paths=settings.paths,
            patience_s=settings.patience_s,
            slow_s=settings.slow_s,
        )

        async def ask(contact: Contact) -> Iterable[Contact]:
            answer = await self._ask(contact, question)
            take(answer)
            now = trio.current_time()
            return [each for each in answer.closer if each.addresses and not self._backoff.holds(each, now)]

        await walk(lookup, ask, note_silence=self._note_silence, look_s=settings.patience_s, is_enough=is_enough)
        return lookup

    def _note_silence(self, contact: Contact) -> None:
        self.table.failed(contact.peer_id)
        if contact.peer_id not in self.table:
            self._backoff.note(contact, trio.current_time())

    async def _ask(self, contact: Contact, question: Message) -> Message:
        """One question to one server, which is in the table afterwards.

        Raises:
            PeerFailed: no answer in ``query_s``.
            NetError: it cannot be reached, or answers something else.
        """
        can_dial = self.host.swarm.can_dial
        with trio.move_on_after(self.settings.query_s):
            async with self.host.stream(contact.peer_id, [wire.PROTOCOL_ID], contact.addresses) as stream:
                await wire.send_message(stream, question)
                answer = await wire.receive_message(stream, wire.MAX_ANSWER_BYTES, can_dial)
            if answer.type is not question.type:
                raise errors.RemoteProtocolError(f"{question.type.name} was answered by {answer.type.name}")
            self._backoff.forgive(contact.peer_id)
            self.table.add(contact)
            return answer
        raise errors.PeerFailed(contact.peer_id, f"no answer in {self.settings.query_s:g} s")

    # Answering others

    async def _serve(self, connection: Connection, stream: Stream) -> None:
        while True:
            try:
                with trio.move_on_after(self.settings.idle_s) as idle:
                    request = await wire.receive_message(stream, wire.MAX_REQUEST_BYTES, self.host.swarm.can_dial)
            except errors.ConnectionLost:
                return  # it has nothing more to ask
            if idle.cancelled_caught:
                return
            if not request.key and request.type is not Type.PING:
                raise errors.RemoteProtocolError(f"{request.type.name} without a key")
            if request.type is Type.ADD_PROVIDER:
                self._take_word(connection, request)
            else:
                with trio.fail_after(self.settings.query_s):  # for the asker to read it
                    await wire.send_message(stream, self._answer(connection.peer_id, request))

    def _take_word(self, connection: Connection, request: Message) -> None:
        """Keep what the sender says of itself; what it says of others is passed over."""
        for each in request.providers:
            if each.peer_id == connection.peer_id:
                contact = Contact(peer_id=each.peer_id, addresses=each.addresses, seen_at=connection.now_at)
                try:
                    self.providers.put(request.key, contact, trio.current_time())
                except errors.RecordError as error:
                    logger.debug("%s is not kept as a provider: %s", each.peer_id, error)
                return
        logger.debug("%s names providers, and is none of them", connection.peer_id)

    def _answer(self, asker: PeerId, request: Message) -> Message:
        match request.type:
            case Type.FIND_NODE:
                return Message(type=request.type, key=request.key, closer=self._nearest(asker, request.key))
            case Type.GET_PROVIDERS:
                held = self.providers.get(request.key, trio.current_time())
                told = random.sample(held, min(len(held), wire.MAX_PROVIDERS))
                closer = self._nearest(asker, request.key)
                return Message(type=request.type, key=request.key, closer=closer, providers=tuple(told))
            case _:
                return Message(type=request.type)

    def _nearest(self, asker: PeerId, key: bytes) -> tuple[Contact, ...]:
        """What we know nearest to the key, but for the asker; first the peer itself whose id it is."""
        nearest = [each for each in self.table.closest(wire.place_of(key), K + 1) if each.peer_id != asker]
        named = self._named(key)
        if named is not None:
            nearest = [named, *(each for each in nearest if each.peer_id != named.peer_id)]
        return tuple(nearest[:K])

    def _named(self, key: bytes) -> Contact | None:
        """Where the peer is whose id this is, if it is us or somebody connected."""
        peer_id = PeerId(key)
        if peer_id == self.host.peer_id:
            return self._us()
        addresses = self.host.peerstore.addresses(peer_id)
        if self.host.swarm.connection(peer_id) is None or not addresses:
            return None
        return Contact(peer_id=peer_id, addresses=tuple(addresses))

    def _us(self) -> Contact:
        return Contact(peer_id=self.host.peer_id, addresses=tuple(self.host.addresses))


def _check_key(key: bytes) -> None:
    if not 0 < len(key) <= wire.MAX_KEY_BYTES:
        raise errors.LocalProtocolError(f"a key of {len(key)} bytes: a multihash has at most {wire.MAX_KEY_BYTES}")
