"""The DHT on a host: answers as a server, looks things up, keeps our announcements alive."""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from net import errors, records
from net.addresses import Multiaddr, PeerAddress
from net.dht import keys, wire
from net.dht.backoff import Backoff
from net.dht.gathering import Gathering
from net.dht.lookup import Lookup
from net.dht.store import MAX_RECORDS_PER_KEY, RecordStore
from net.dht.table import Contact, K, RoutingTable, closest
from net.dht.walking import walk
from net.host import Host
from net.identity import PeerId
from net.mux.base import Stream
from net.records import Record
from net.rpc import lane, packing
from net.rpc.framing import Message
from net.rpc.lane import Lane
from net.swarm import Connection

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DhtSettings:
    query_s: float = 5.0  # one call to one peer
    patience_s: float = 0.5  # a look-up asks others in the stead of who has not answered by then,
    slow_s: float = 2.0  # and goes on without its answer, if others have answered; half of it, if many have
    backoff_s: float = 60.0  # before a server that others named and that did not answer is asked again
    paths: int = 3  # of a look-up, disjoint: made-up contacts that spoil one leave the others
    pages_s: float = 15.0  # all pages of one peer's records; what came by then counts
    other_bootstrap_s: float = 0.5  # for the other bootstrap nodes once one has answered
    refresh_s: float = 60.0  # between refreshes of the table: our neighbours and a random place in turn
    announce_s: float = 30.0  # between renewals of an announcement
    holders_s: float = 45.0  # renewals go to those that took it last and whom we know; then they are looked up anew
    ttl_s: int = 120  # of an announcement
    idle_s: float = 120.0  # a stream that asks nothing is closed
    max_lanes: int = 128  # streams kept open to servers, beside those in use


@dataclass(kw_only=True, eq=False)
class _Announced:
    """What we say under a key, and who holds it."""

    kind: str
    body: Callable[[], Mapping[str, Any]]
    holders: list[Contact] = field(default_factory=list)
    look_up_at: float = -math.inf


class Dht:
    """Kademlia over a host.

    Args:
        host: whose connections are used.
        server: whether we answer others. Servers must be reachable; clients only ask.
    """

    def __init__(self, host: Host, *, server: bool, settings: DhtSettings | None = None) -> None:
        self.host = host
        self.settings = settings or DhtSettings()
        self.table = RoutingTable(host.peer_id)
        self.store = RecordStore()
        self._server = server
        self._bootstrap: list[PeerAddress] = []
        self._lanes: dict[PeerId, Lane] = {}
        self._announced: dict[bytes, _Announced] = {}
        self._due = trio.Event()  # they are to be renewed
        self._backoff = Backoff(self.settings.backoff_s)
        self.stale_by_s: deque[float] = deque(maxlen=64)  # how far others' clocks were ahead, where it was too much
        if server:
            host.handle(wire.PROTOCOL_ID, self._serve)

    # Coming and going

    async def join(self, bootstrap: Iterable[PeerAddress]) -> None:
        """Connect to known servers and find our neighbours through them. None given: we are the first.

        Raises:
            DialError, AddressError: not one of them could be reached; the text says why for each.
        """
        self._bootstrap = [peer for peer in bootstrap if peer.peer_id != self.host.peer_id]
        await self._meet_bootstrap()
        await self.lookup(keys.of_peer(self.host.peer_id))

    async def _meet_bootstrap(self) -> None:
        failures: list[errors.NetError] = []

        async with trio.open_nursery() as nursery:

            async def meet(peer_id: PeerId, addresses: Sequence[Multiaddr]) -> None:
                contact = Contact(peer_id=peer_id, addresses=tuple(addresses))
                try:
                    await self.host.connect(peer_id, addresses)
                    await self._find(contact, keys.of_peer(self.host.peer_id), want_records=False)
                except errors.NetError as error:
                    failures.append(error)
                else:
                    self.table.add(contact)
                    self._backoff.forgive(contact.peer_id)
                    # One is enough to begin with; silent ones must not hold us up.
                    nursery.cancel_scope.deadline = trio.current_time() + self.settings.other_bootstrap_s

            known: dict[PeerId, list[Multiaddr]] = {}
            for peer in self._bootstrap:
                known.setdefault(peer.peer_id, []).append(peer.address)
            for peer_id, addresses in known.items():
                nursery.start_soon(meet, peer_id, addresses)
        if failures and len(failures) == len(known):
            if len(failures) == 1 and type(failures[0]) is not errors.DialError:
                raise failures[0]
            reasons = "; ".join(dict.fromkeys(map(str, failures)))
            raise errors.DialError(f"no bootstrap node answers ({reasons}): is one running there?")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Refresh the table and renew announcements until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._refresh)
            nursery.start_soon(self._renew)
            task_status.started()

    async def _refresh(self) -> None:
        for near_us in itertools.cycle((True, False)):
            await trio.sleep(self.settings.refresh_s * random.uniform(0.8, 1.2))
            try:
                if not len(self.table):
                    await self._meet_bootstrap()
                await self.lookup(keys.of_peer(self.host.peer_id) if near_us else os.urandom(keys.KEY_BYTES))
            except errors.NetError as error:
                logger.warning("cannot reach any known peer: %s", error)
            self.store.expire(trio.current_time())

    async def _renew(self) -> None:
        while True:
            with trio.move_on_after(self.settings.announce_s * random.uniform(0.9, 1.1)):
                await self._due.wait()
            self._due = trio.Event()
            for key in list(self._announced):
                if key not in self._announced:
                    continue  # withdrawn while another was renewed
                try:
                    await self._publish(key)
                except errors.NetError as error:
                    logger.warning("an announcement could not be renewed: %s", error)

    # Changes

    def network_changed(self) -> None:
        """Whoever could not be reached before may be reached now."""
        self._backoff.clear()
        self.renew()

    def renew(self) -> None:
        """Announce again, now."""
        self._due.set()

    # Announcing

    async def announce(self, key: bytes, kind: str, body: Callable[[], Mapping[str, Any]]) -> int:
        """Sign what ``body()`` says and put it under ``key``, now and every ``announce_s`` until withdrawn.

        Returns: how many servers took it (this node's own store not counted).
        """
        self._announced[key] = _Announced(kind=kind, body=body)
        return await self._publish(key)

    async def withdraw(self, *of: bytes) -> None:
        """Take back what was announced under these keys; everything without any."""
        announced = [(key, self._announced.pop(key)) for key in of or list(self._announced) if key in self._announced]
        async with trio.open_nursery() as nursery:
            for key, each in announced:
                nursery.start_soon(self._take_back, key, each)

    async def _take_back(self, key: bytes, announced: _Announced) -> None:
        record = self._sign(key, announced.kind, {"withdrawn": True})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give, announced.holders, key, record)
            told = {contact.peer_id for contact in announced.holders}
            nearest = (await self._walk(key, None)).closest  # who should hold it by now
            nursery.start_soon(self._give, [each for each in nearest if each.peer_id not in told], key, record)

    async def _publish(self, key: bytes) -> int:
        announced = self._announced[key]
        record = self._sign(key, announced.kind, announced.body())
        now = trio.current_time()
        if now < announced.look_up_at and len(announced.holders) == K:
            nearest = closest(key, [*announced.holders, *self.table.contacts])
            taken = await self._give(nearest, key, record)
            if 2 * len(taken) > K:
                return len(taken)
        announced.look_up_at = now + self.settings.holders_s
        nearest = (await self._walk(key, None)).closest
        if self._announced.get(key) is announced:  # not withdrawn meanwhile
            announced.holders = await self._give(nearest, key, record)
        return len(announced.holders)

    def _sign(self, key: bytes, kind: str, body: Mapping[str, Any]) -> Record:
        """A new record of ours, which lies in our own store from now on."""
        record = records.sign(self.host.identity, kind, body, key=key, ttl_s=self.settings.ttl_s)
        if self._server:
            self.store.put(key, record, trio.current_time())
        return record

    async def _give(self, holders: Iterable[Contact], key: bytes, record: Record) -> list[Contact]:
        """Those of ``holders`` that took it."""
        taken: list[Contact] = []

        async def give(contact: Contact) -> None:
            try:
                await self._call(contact, "store", {"key": key, "record": record.envelope})
                taken.append(contact)
            except errors.NetError as error:
                logger.debug("%s did not take a record: %s", contact.peer_id, error)

        async with trio.open_nursery() as nursery:
            for contact in holders:
                nursery.start_soon(give, contact)
        return taken

    # Looking up

    async def lookup(self, target: bytes) -> list[Contact]:
        """The servers nearest to ``target`` that answer, nearest first, at most K."""
        return (await self._walk(target, None)).closest

    async def find(self, key: bytes, kind: str) -> list[Record]:
        """Every record of ``kind`` under ``key`` that a server near it holds: the newest of each subject.

        ``gathering`` says which are believed.
        """
        gathering = Gathering(kind)
        lookup = await self._walk(key, gathering)
        nearest = [contact.peer_id for contact in lookup.closest]
        if self._server:
            nearest.append(self.host.peer_id)
            for record in self.store.get_all(key, trio.current_time()):
                gathering.take(self.host.peer_id, record)
        return gathering.believed(nearest, time.time())

    async def _walk(self, target: bytes, gathering: Gathering | None) -> Lookup:
        settings = self.settings
        lookup = Lookup(
            self.host.peer_id,
            target,
            self.table.closest(target),
            paths=settings.paths,
            patience_s=settings.patience_s,
            slow_s=settings.slow_s,
        )

        async def ask(contact: Contact) -> list[Contact]:
            closer, held = await self._find(contact, target, want_records=gathering is not None)
            for record in held:
                if gathering is not None:
                    gathering.take(contact.peer_id, record)
            self._backoff.forgive(contact.peer_id)
            self.table.add(contact)
            now = trio.current_time()
            return [each for each in closer if not self._backoff.holds(each, now)]

        await walk(lookup, ask, note_silence=self._note_silence, look_s=settings.patience_s)
        return lookup

    def _note_silence(self, contact: Contact) -> None:
        self.table.failed(contact.peer_id)
        if contact.peer_id not in self.table:
            self._backoff.note(contact, trio.current_time())

    async def _find(self, contact: Contact, target: bytes, *, want_records: bool) -> tuple[list[Contact], list[Record]]:
        answer = await self._call(contact, "find", {"key": target, "records": want_records, "after": b""})
        closer = wire.read_contacts(answer.header)
        held = self._read_page(contact, answer, target)
        after = b""
        with trio.move_on_after(self.settings.pages_s):
            # A page must bring us further, and a hostile server's pages end where an honest one's would.
            while answer.header.get("more") and held and held[-1].peer_id.to_bytes() > after:
                if len(held) >= MAX_RECORDS_PER_KEY:
                    break
                after = held[-1].peer_id.to_bytes()
                answer = await self._call(contact, "find", {"key": target, "records": True, "after": after})
                held += self._read_page(contact, answer, target)
        return closer, held

    def _read_page(self, contact: Contact, answer: Message, target: bytes) -> list[Record]:
        held = []
        for envelope in packing.field(answer.header, "records", list):
            try:
                held.append(records.verify(packing.field({"r": envelope}, "r", bytes), key=target))
            except errors.RecordError as error:
                if isinstance(error, errors.StaleRecord):
                    self.stale_by_s.append(error.ahead_s)
                logger.debug("%s passed on %s", contact.peer_id, error)
        return held

    # Calling others

    async def _call(self, contact: Contact, method: str, fields: Mapping[str, Any]) -> Message:
        if self._server:
            fields = {**fields, "from": wire.write_addresses(self.host.addresses)}
        with trio.move_on_after(self.settings.query_s):
            existing = self._lanes.get(contact.peer_id)
            if existing is not None:
                if (connection := self.host.swarm.connection(contact.peer_id)) is not None:
                    connection.mux.check()  # it may be dead since we asked last
                try:
                    return await existing.call(method, fields, timeout_s=self.settings.query_s)
                except errors.PeerFailed:
                    self._drop_lane(contact.peer_id, existing)  # idle streams are closed: try a new one
            new = await self._open_lane(contact)
            try:
                return await new.call(method, fields, timeout_s=self.settings.query_s)
            except errors.PeerFailed:
                self._drop_lane(contact.peer_id, new)
                raise
        raise errors.PeerFailed(contact.peer_id, f"no answer in {self.settings.query_s:g} s")

    async def _open_lane(self, contact: Contact) -> Lane:
        stream = await self.host.open_stream(contact.peer_id, [wire.PROTOCOL_ID], contact.addresses)
        other = self._lanes.get(contact.peer_id)
        if other is not None:  # opened meanwhile by another call, which may be using it
            stream.reset()
            return other
        new = self._lanes[contact.peer_id] = Lane(stream, contact.peer_id)
        idle = [each for each in self._lanes.values() if each is not new and not each.is_busy]
        for old in idle[: max(0, len(self._lanes) - self.settings.max_lanes)]:
            self._drop_lane(old.peer_id, old)
            await old.aclose()
        return new

    def _drop_lane(self, peer_id: PeerId, dead: Lane) -> None:
        if self._lanes.get(peer_id) is dead:
            del self._lanes[peer_id]

    # Answering others

    async def _serve(self, connection: Connection, stream: Stream) -> None:
        async def find(message: Message) -> Message:
            self._note_caller(connection, message)
            key = wire.read_key(message.header)
            answer: dict[str, Any] = {"peers": wire.write_contacts(self.table.closest(key, K)), "records": []}
            if message.header.get("records"):
                after = packing.field(message.header, "after", bytes, max_length=wire.MAX_PEER_ID_BYTES)
                self._add_records(answer, key, after)
            return Message(header=answer)

        async def store(message: Message) -> Message:
            self._note_caller(connection, message)
            key = wire.read_key(message.header)
            try:
                record = records.verify(packing.field(message.header, "record", bytes), key=key)
                self.store.put(key, record, trio.current_time())
            except errors.RecordError as error:
                raise errors.RpcError("bad-record", str(error)) from error
            return Message(header={})

        await lane.serve(stream, connection.peer_id, {"find": find, "store": store}, idle_s=self.settings.idle_s)

    def _add_records(self, answer: dict[str, Any], key: bytes, after: bytes) -> None:
        held = sorted(self.store.get_all(key, trio.current_time()), key=lambda record: record.peer_id.to_bytes())
        size = 0
        for record in held:
            if record.peer_id.to_bytes() <= after:
                continue
            size += len(record.envelope)
            if size > wire.MAX_ANSWER_RECORD_BYTES and answer["records"]:
                answer["more"] = True
                return
            answer["records"].append(record.envelope)

    def _note_caller(self, connection: Connection, message: Message) -> None:
        if "from" in message.header:
            claimed = wire.read_addresses(message.header, "from")
            self.table.add(Contact(peer_id=connection.peer_id, addresses=claimed, seen_at=connection.now_at))
            self._backoff.forgive(connection.peer_id)
