"""The DHT on hosts in memory: announcing, finding, expiry, and servers that lie."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from net import errors, records
from net.addresses import Multiaddr, PeerAddress, parse
from net.dht import keys, wire
from net.dht.gathering import Gathering
from net.dht.lookup import Lookup
from net.dht.service import Dht, DhtSettings
from net.dht.table import Contact
from net.host import Host, open_host
from net.identity import Identity, PeerId
from net.mux.base import Stream
from net.records import Record
from net.rpc import lane
from net.rpc.framing import Message
from net.rpc.lane import Method
from net.swarm import Connection
from net.transports.base import RawConnection
from net.transports.memory import MemoryNetwork, MemoryTransport
from tests.net_helpers import MEMORY_ANY, UNREADABLE_ADDRESS, memory_hosts, seeded

KEY = keys.of_name("raceme/test")
KIND = "node"


def body() -> Mapping[str, Any]:
    return {"model": "bloom"}


async def joined(hosts: list[Host], *, settings: DhtSettings | None = None) -> list[Dht]:
    """Servers that have all met the first."""
    dhts: list[Dht] = []
    for host in hosts:
        dht = Dht(host, server=True, settings=settings)
        await dht.join(hosts[0].peer_addresses if dhts else [])
        dhts.append(dht)
    return dhts


@asynccontextmanager
async def client_of(server: Host, network: MemoryNetwork, number: int = 900) -> AsyncIterator[Dht]:
    async with open_host(seeded(number), transports=[network.transport()]) as host:
        dht = Dht(host, server=False)
        await dht.join(server.peer_addresses)
        yield dht


def subjects(found: list[Record]) -> set[str]:
    return {str(record.peer_id) for record in found}


async def test_thirty_hosts_find_what_one_announces_until_it_is_withdrawn(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(30, network=network) as hosts:
        dhts = await joined(hosts)
        assert min(len(dht.table) for dht in dhts) >= 10
        taken = await dhts[7].announce(KEY, KIND, body)
        assert taken == 20
        for dht in dhts:
            (record,) = await dht.find(KEY, KIND)
            assert (record.peer_id, record.body) == (hosts[7].peer_id, body())
            assert await dht.find(KEY, "another kind") == []
        async with client_of(hosts[3], network) as client:
            assert subjects(await client.find(KEY, KIND)) == {str(hosts[7].peer_id)}
            await dhts[7].withdraw()
            assert await client.find(KEY, KIND) == []
        holders = sorted(hosts, key=lambda host: keys.distance(keys.of_peer(host.peer_id), KEY))[:20]
        for host, dht in zip(hosts, dhts, strict=True):
            assert dht.store.get(KEY, trio.current_time()) == []
            assert (KEY in dht.store._keys) or host not in holders


async def test_a_look_up_over_hosts_finds_the_closest(autojump_clock: MockClock) -> None:
    async with memory_hosts(30) as hosts:
        dhts = await joined(hosts)
        target = keys.of_name("anything")
        others = [host.peer_id for host in hosts[1:]]
        expected = sorted(others, key=lambda peer_id: keys.distance(keys.of_peer(peer_id), target))[:20]
        assert [contact.peer_id for contact in await dhts[0].lookup(target)] == expected


async def test_what_nobody_renews_expires(autojump_clock: MockClock) -> None:
    async with memory_hosts(3) as hosts:
        dhts = await joined(hosts)
        await dhts[1].announce(KEY, KIND, body)
        await trio.sleep(119)
        assert len(await dhts[2].find(KEY, KIND)) == 1
        await trio.sleep(2)
        assert await dhts[2].find(KEY, KIND) == []


async def test_what_is_renewed_stays_until_withdrawn(autojump_clock: MockClock) -> None:
    async with memory_hosts(3) as hosts, trio.open_nursery() as nursery:
        dhts = await joined(hosts)
        tokens = iter(range(100))
        await dhts[1].announce(KEY, KIND, lambda: {"left": next(tokens)})
        for dht in dhts:
            await nursery.start(dht.run)
        (first,) = await dhts[2].find(KEY, KIND)
        await trio.sleep(600)
        (later,) = await dhts[2].find(KEY, KIND)
        assert later.sequence > first.sequence
        assert later.body["left"] >= 15
        await dhts[1].withdraw()
        assert await dhts[2].find(KEY, KIND) == []
        await trio.sleep(300)
        assert await dhts[2].find(KEY, KIND) == []
        nursery.cancel_scope.cancel()


async def test_withdrawing_while_renewing_ends_nothing_else(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as hosts, trio.open_nursery() as nursery:
        dhts = await joined(hosts)
        other = keys.of_name("another")

        def withdraw_now() -> Mapping[str, Any]:
            if trio.current_time() > began:
                dhts[1]._announced.clear()  # as ``withdraw`` does, in the middle of a round
            return body()

        began = trio.current_time()
        await dhts[1].announce(KEY, KIND, withdraw_now)
        await dhts[1].announce(other, KIND, body)
        await nursery.start(dhts[1].run)
        await trio.sleep(120)
        assert dhts[1]._announced == {}
        nursery.cancel_scope.cancel()


class Counting(Dht):
    """Counts its look-ups, and remembers whom it asked for anything."""

    def __init__(self, host: Host, *, server: bool = True) -> None:
        super().__init__(host, server=server)
        self.walks = 0
        self.called: list[tuple[PeerId, str]] = []

    async def _walk(self, target: bytes, gathering: Gathering | None) -> Lookup:
        self.walks += 1
        return await super()._walk(target, gathering)

    async def _call(self, contact: Contact, method: str, fields: Mapping[str, Any]) -> Message:
        self.called.append((contact.peer_id, method))
        return await super()._call(contact, method, fields)


async def test_renewals_go_to_those_who_took_the_last_and_to_nearer_newcomers(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(23, network=network) as hosts:
        dhts = await joined(hosts[:22])
        dht = Counting(hosts[22])
        await dht.join(hosts[0].peer_addresses)
        assert await dht.announce(KEY, KIND, body) == 20
        # Somebody comes whom the announcer hears of, and who is nearer than the others.
        near = min((seeded(n) for n in range(300, 400)), key=lambda i: keys.distance(keys.of_peer(i.peer_id), KEY))
        async with open_host(near, listen=[MEMORY_ANY], transports=[network.transport()]) as newcomer:
            late = Dht(newcomer, server=True)
            await late.join(hosts[0].peer_addresses)
            dht.table.add(Contact(peer_id=newcomer.peer_id, addresses=tuple(newcomer.addresses)))
            walks = dht.walks
            await trio.sleep(30)
            assert await dht._publish(KEY) == 20
            assert dht.walks == walks
            (held,) = late.store.get(KEY, trio.current_time())
            assert held.sequence == dht.store.get(KEY, trio.current_time())[0].sequence
            await trio.sleep(30)
            assert await dht._publish(KEY) == 20
            assert dht.walks == walks + 1  # after two renewals at the latest, they are looked up anew
        assert len(dhts[3].store.get(KEY, trio.current_time())) <= 1


async def test_holders_that_have_gone_are_replaced_at_once(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(20, network=network) as hosts, AsyncExitStack() as leaving:
        dht = Counting(hosts[0])
        await dht.join([])
        for host in hosts[1:]:
            await Dht(host, server=True).join(hosts[0].peer_addresses)
        gone = [
            await leaving.enter_async_context(
                open_host(seeded(400 + n), listen=[MEMORY_ANY], transports=[network.transport()])
            )
            for n in range(20)
        ]
        for host in gone:
            await Dht(host, server=True).join(hosts[0].peer_addresses)
        await dht.announce(KEY, KIND, body)
        announced = dht._announced[KEY]
        announced.holders = [Contact(peer_id=h.peer_id, addresses=tuple(h.addresses)) for h in gone]
        await leaving.aclose()
        walks = dht.walks
        assert await dht._publish(KEY) >= 10
        assert dht.walks == walks + 1
        assert {contact.peer_id for contact in announced.holders}.isdisjoint({host.peer_id for host in gone})


async def test_where_few_hold_it_every_renewal_looks_for_more(autojump_clock: MockClock) -> None:
    async with memory_hosts(3) as hosts:
        dhts = await joined(hosts[:2])
        assert await dhts[1].announce(KEY, KIND, body) == 1
        await Dht(hosts[2], server=True).join(hosts[0].peer_addresses)
        assert await dhts[1]._publish(KEY) == 2


async def test_a_withdrawal_reaches_those_who_held_it_before(autojump_clock: MockClock) -> None:
    async with memory_hosts(4) as hosts:
        dhts = await joined(hosts)
        assert await dhts[1].announce(KEY, KIND, body) == 3
        for peer in (hosts[2], hosts[3]):  # no look-up of ours leads there any more
            dhts[1].table.remove(peer.peer_id)
        dhts[0].table.remove(hosts[3].peer_id)
        dhts[2].table.remove(hosts[3].peer_id)
        await dhts[1].withdraw()
        assert dhts[3].store.get(KEY, trio.current_time()) == []
        assert len(dhts[3].store.get_all(KEY, trio.current_time())) == 1


async def test_what_is_withdrawn_during_its_renewal_is_not_given_out_any_more(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as hosts:
        dhts = await joined(hosts)
        walk = dhts[1]._walk

        async def slow_walk(target: bytes, gathering: Gathering | None) -> Lookup:
            lookup = await walk(target, gathering)
            await trio.sleep(1)
            return lookup

        dhts[1]._walk = slow_walk  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dhts[1].announce, KEY, KIND, body)
            await trio.sleep(0.5)
            nursery.start_soon(dhts[1].withdraw)
        for dht in dhts:
            (held,) = dht.store.get_all(KEY, trio.current_time())
            assert held.body == {"withdrawn": True}


async def test_names_that_nobody_answers_to_are_tried_once_and_again_a_minute_later(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with (
        memory_hosts(1, network=network) as (host,),
        open_host(seeded(900), transports=[network.transport()]) as us,
    ):
        liar = Liar(host)
        made_up = [
            Contact(peer_id=seeded(500 + n).peer_id, addresses=(parse(f"/memory/{n + 1000}"),)) for n in range(5)
        ]
        liar.answer([], wire.write_contacts(made_up))
        dht = Counting(us, server=False)
        await dht.join(host.peer_addresses)
        names = {contact.peer_id for contact in made_up}
        asked = [peer_id for peer_id, _ in dht.called if peer_id in names]
        assert sorted(asked, key=str) == sorted(names, key=str)
        await dht.lookup(KEY)
        assert len([peer_id for peer_id, _ in dht.called if peer_id in names]) == 5
        await trio.sleep(61)
        await dht.lookup(KEY)
        assert len([peer_id for peer_id, _ in dht.called if peer_id in names]) == 10


async def test_a_silent_address_of_a_bootstrap_node_does_not_hold_up_its_others(autojump_clock: MockClock) -> None:
    class Sometimes(MemoryTransport):
        async def dial(self, address: Multiaddr, peer_id: PeerId | None = None) -> RawConnection:
            if address in silent:
                await trio.sleep_forever()
            return await super().dial(address, peer_id)

    network = MemoryNetwork()
    silent = [parse(f"/memory/{777 + number}") for number in range(7)]
    async with memory_hosts(1, network=network) as (server,):
        Dht(server, server=True)
        async with open_host(seeded(900), transports=[Sometimes(network)]) as host:
            began = trio.current_time()
            [there] = server.peer_addresses
            nowhere = [dataclasses.replace(there, address=address) for address in silent]
            await Dht(host, server=False).join([*nowhere, there])
            assert trio.current_time() - began < 1


async def test_in_another_network_those_that_did_not_answer_are_asked_again_and_we_announce_at_once(
    autojump_clock: MockClock,
) -> None:
    async with memory_hosts(2) as hosts, trio.open_nursery() as nursery:
        dhts = await joined(hosts)
        await dhts[1].announce(KEY, KIND, body)
        (before,) = await dhts[0].find(KEY, KIND)
        await nursery.start(dhts[1].run)
        await trio.testing.wait_all_tasks_blocked()
        silent = Contact(peer_id=seeded(77).peer_id, addresses=(parse("/memory/777"),))
        dhts[1]._backoff.note(silent, trio.current_time())
        dhts[1].network_changed()
        await trio.testing.wait_all_tasks_blocked()
        assert not dhts[1]._backoff.holds(silent, trio.current_time())
        (after,) = await dhts[0].find(KEY, KIND)
        assert after.sequence > before.sequence
        nursery.cancel_scope.cancel()


async def test_what_changes_while_it_is_renewed_is_renewed_once_more(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with memory_hosts(2) as hosts, trio.open_nursery() as nursery:
        dhts = await joined(hosts)
        where = ["here"]
        await dhts[1].announce(KEY, KIND, lambda: {"at": where[0]})
        give = dhts[1]._give

        async def slowly(*args: Any) -> list[Contact]:
            await trio.sleep(1)
            return await give(*args)

        monkeypatch.setattr(dhts[1], "_give", slowly)
        await nursery.start(dhts[1].run)
        await trio.testing.wait_all_tasks_blocked()
        for place in ("there", "elsewhere"):
            where[0] = place
            dhts[1].renew()
            await trio.sleep(0.5)
        await trio.sleep(2)
        (found,) = await dhts[0].find(KEY, KIND)
        assert found.body == {"at": "elsewhere"}
        nursery.cancel_scope.cancel()


async def test_a_server_that_died_is_passed_over_and_forgotten(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(5, network=network) as hosts:
        dhts = await joined(hosts)
        async with open_host(seeded(800), listen=[MEMORY_ANY], transports=[network.transport()]) as dying:
            gone = Contact(peer_id=dying.peer_id, addresses=tuple(dying.addresses))
        dhts[1].table.add(gone)
        for _ in range(2):
            assert gone.peer_id not in {contact.peer_id for contact in await dhts[1].lookup(KEY)}
        assert gone.peer_id not in dhts[1].table
        await dhts[2].announce(KEY, KIND, body)
        assert len(await dhts[1].find(KEY, KIND)) == 1


async def test_clients_never_get_into_a_table(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(3, network=network) as hosts:
        dhts = await joined(hosts)
        async with client_of(hosts[0], network) as client:
            await client.announce(KEY, KIND, body)
            assert len(await dhts[1].find(KEY, KIND)) == 1
            assert all(client.host.peer_id not in dht.table for dht in dhts)
            assert wire.PROTOCOL_ID not in client.host.protocols


async def test_joining_through_nobody_reachable_says_so(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as (one, two):
        dead = PeerAddress(address=one.addresses[0], peer_id=seeded(700).peer_id)
        with pytest.raises(errors.PeerIdMismatch):
            await Dht(two, server=True).join([dead])
        dht = Dht(one, server=True)
        await dht.join(one.peer_addresses)  # ourselves alone: we are the first
        assert len(dht.table) == 0


async def test_one_good_way_in_is_enough(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as hosts:
        await joined(hosts[:1])
        dead = PeerAddress(address=hosts[0].addresses[0], peer_id=seeded(700).peer_id)
        dht = Dht(hosts[1], server=True)
        await dht.join([dead, *hosts[0].peer_addresses])
        assert hosts[0].peer_id in dht.table


async def test_more_records_than_one_answer_holds_come_in_pages(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(2, network=network) as hosts:
        dhts = await joined(hosts)
        announced = [
            records.sign(seeded(1000 + number), KIND, {"x": bytes(1000)}, key=KEY, ttl_s=120) for number in range(150)
        ]
        for record in announced:
            dhts[0].store.put(KEY, record, trio.current_time())
        async with client_of(hosts[0], network) as client:
            assert subjects(await client.find(KEY, KIND)) == subjects(announced)


async def test_a_record_too_large_for_an_answer_is_refused_and_spoils_nothing(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(2, network=network) as hosts:
        dhts = await joined(hosts)
        async with client_of(hosts[0], network) as client:
            assert await client.announce(KEY, KIND, lambda: {"x": bytes(60_000)}) == 0
            await dhts[1].announce(KEY, KIND, body)
            assert subjects(await client.find(KEY, KIND)) == {str(hosts[1].peer_id)}
            assert await client.announce(KEY, KIND, lambda: {"x": bytes(39_000)}) == 2
            assert len(await client.find(KEY, KIND)) == 2


async def test_concurrent_calls_to_one_server_all_come_through(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(1, network=network) as hosts:
        await joined(hosts)
        async with client_of(hosts[0], network) as client:
            client._lanes.clear()
            taken: list[int] = []

            async def announce(number: int) -> None:
                taken.append(await client.announce(keys.of_name(str(number)), KIND, body))

            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(announce, number)
            assert taken == [1] * 10
            assert len(client._lanes) == 1


async def test_idle_lanes_are_closed_when_there_are_too_many(autojump_clock: MockClock) -> None:
    async with memory_hosts(8) as hosts:
        dhts = await joined(hosts, settings=DhtSettings(max_lanes=3))
        dht = dhts[0]
        await dht.lookup(KEY)
        lanes = dict(dht._lanes)
        assert len(lanes) == 7  # all in use at once: a call is never cut off for the bound
        newcomer = Contact(peer_id=hosts[7].peer_id, addresses=tuple(hosts[7].addresses))
        dht._drop_lane(newcomer.peer_id, lanes[newcomer.peer_id])
        await dht._find(newcomer, KEY, want_records=False)
        assert len(dht._lanes) == 3
        assert newcomer.peer_id in dht._lanes
        await trio.testing.wait_all_tasks_blocked()
        ended = [lane for peer_id, lane in lanes.items() if peer_id not in dht._lanes]
        with pytest.raises(errors.PeerFailed, match="closed here"):
            await ended[0].call("find", {}, timeout_s=1)


# Servers that lie


class Liar:
    """A DHT server whose answers are made up: the only one that its victim knows."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.methods: dict[str, Method] = {}
        host.handle(wire.PROTOCOL_ID, self._serve)

    async def _serve(self, connection: Connection, stream: Stream) -> None:
        await lane.serve(stream, connection.peer_id, self.methods, idle_s=1000)

    def answer(self, held: list[Any], peers: list[Any] | None = None, **more: Any) -> None:
        async def find(_: Message) -> Message:
            return Message(header={"peers": peers or [], "records": held, **more})

        self.methods["find"] = find


@asynccontextmanager
async def lied_to() -> AsyncIterator[tuple[Liar, Dht]]:
    network = MemoryNetwork()
    async with memory_hosts(1, network=network) as (host,):
        liar = Liar(host)
        liar.answer([])
        async with client_of(host, network) as dht:
            yield liar, dht


def forged(victim: Identity, signer: Identity) -> bytes:
    good = records.sign(victim, KIND, body(), key=KEY, ttl_s=120)
    own = records.sign(signer, KIND, body(), key=KEY, ttl_s=120)
    return own.envelope.replace(own.peer_id.to_bytes(), good.peer_id.to_bytes())


async def test_forged_records_are_ignored_and_good_ones_among_them_are_not(autojump_clock: MockClock) -> None:
    async with lied_to() as (liar, dht):
        good = records.sign(seeded(5), KIND, body(), key=KEY, ttl_s=120)
        spoilt = bytearray(records.sign(seeded(6), KIND, body(), key=KEY, ttl_s=120).envelope)
        spoilt[-1] ^= 1
        liar.answer([b"", b"garbage", forged(seeded(7), seeded(8)), bytes(spoilt), good.envelope])
        assert subjects(await dht.find(KEY, KIND)) == {str(good.peer_id)}


async def test_an_older_record_never_wins(autojump_clock: MockClock) -> None:
    async with lied_to() as (liar, dht):
        identity = seeded(5)
        old, new = (records.sign(identity, KIND, {"n": n}, key=KEY, ttl_s=120) for n in range(2))
        for held in ([old, new], [new, old]):
            liar.answer([record.envelope for record in held])
            (found,) = await dht.find(KEY, KIND)
            assert found.body == {"n": 1}


async def test_an_older_record_handed_out_after_a_withdrawal_is_void(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(3, network=network) as hosts:
        dhts = await joined(hosts[:2])
        liar = Liar(hosts[2])
        dhts[0].table.add(Contact(peer_id=liar.host.peer_id, addresses=tuple(liar.host.addresses)))
        await dhts[1].announce(KEY, KIND, body)
        (old,) = dhts[0].store.get(KEY, trio.current_time())
        liar.answer([old.envelope])
        async with client_of(hosts[0], network) as client:
            assert len(await client.find(KEY, KIND)) == 1
            await dhts[1].withdraw()
            assert await client.find(KEY, KIND) == []
            assert await dhts[0].find(KEY, KIND) == []


async def test_one_server_cannot_keep_a_record_alive_that_all_others_forgot(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = MemoryNetwork()
    async with memory_hosts(4, network=network) as hosts:
        dhts = await joined(hosts[:3])
        liar = Liar(hosts[3])
        dhts[0].table.add(Contact(peer_id=liar.host.peer_id, addresses=tuple(liar.host.addresses)))
        now, began = time.time(), trio.current_time()
        monkeypatch.setattr("net.dht.service.time", SimpleNamespace(time=lambda: now + trio.current_time() - began))
        await dhts[1].announce(KEY, KIND, body)
        (old,) = dhts[0].store.get(KEY, trio.current_time())
        liar.answer([old.envelope])
        async with client_of(hosts[0], network) as client:
            await trio.sleep(110)
            assert len(await client.find(KEY, KIND)) == 1
            await trio.sleep(12)
            assert await client.find(KEY, KIND) == []


async def test_a_clock_that_is_half_an_hour_wrong_hides_nobody(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with memory_hosts(3) as hosts:
        dhts = await joined(hosts)
        await dhts[1].announce(KEY, KIND, body)
        for wrong_s in (-1800, 1800):
            clock = SimpleNamespace(time=lambda wrong_s=wrong_s: time.time() + wrong_s)
            monkeypatch.setattr("net.dht.service.time", clock)
            assert len(await dhts[2].find(KEY, KIND)) == 1


async def test_a_look_up_does_not_wait_for_the_silent_where_enough_answer(autojump_clock: MockClock) -> None:
    async with memory_hosts(14) as hosts:
        dhts = await joined(hosts[:12])
        hung = [Liar(host) for host in hosts[12:]]

        async def hang(_: Message) -> Message:
            await trio.sleep_forever()
            raise AssertionError

        contacts = [Contact(peer_id=each.host.peer_id, addresses=tuple(each.host.addresses)) for each in hung]
        for liar, contact in zip(hung, contacts, strict=True):
            liar.methods["find"] = hang
            assert dhts[0].table.add(contact)
        began = trio.current_time()
        found = await dhts[0].lookup(KEY)
        assert len(found) == 11
        assert trio.current_time() - began <= dhts[0].settings.slow_s + 0.1
        await dhts[0].lookup(KEY)
        assert all(contact.peer_id not in dhts[0].table for contact in contacts)


async def test_a_record_of_another_kind_hides_nothing(autojump_clock: MockClock) -> None:
    async with lied_to() as (liar, dht):
        identity = seeded(5)
        wanted = records.sign(identity, KIND, body(), key=KEY, ttl_s=120)
        newer = records.sign(identity, "another kind", body(), key=KEY, ttl_s=120)
        liar.answer([wanted.envelope, newer.envelope])
        assert [record.envelope for record in await dht.find(KEY, KIND)] == [wanted.envelope]


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"peers": [], "records": 5},
        {"peers": [], "records": [5]},
        {"peers": 5, "records": []},
        {"peers": [[b"id", [b"\xff"]]], "records": []},
        {"peers": [[seeded(77).peer_id.to_bytes(), [UNREADABLE_ADDRESS]]], "records": []},
        {"peers": [], "records": [], "more": True},
    ],
)
async def test_malformed_answers_cost_the_liar_its_place_at_most(
    header: dict[str, Any], autojump_clock: MockClock
) -> None:
    async with lied_to() as (liar, dht):

        async def find(_: Message) -> Message:
            return Message(header=header)

        liar.methods["find"] = find
        assert await dht.find(KEY, KIND) == []
        assert await dht.find(KEY, KIND) == []


async def test_a_server_whose_pages_never_end_is_left(autojump_clock: MockClock) -> None:
    identities = sorted((seeded(2000 + n) for n in range(400)), key=lambda identity: identity.peer_id.to_bytes())
    pages = iter(identities)
    asked = 0

    async with lied_to() as (liar, dht):

        async def find(_: Message) -> Message:
            nonlocal asked
            asked += 1
            await trio.sleep(1)
            record = records.sign(next(pages), KIND, body(), key=KEY, ttl_s=120)
            return Message(header={"peers": [], "records": [record.envelope], "more": True})

        liar.methods["find"] = find
        began = trio.current_time()
        found = await dht.find(KEY, KIND)
        assert trio.current_time() - began <= dht.settings.query_s + dht.settings.pages_s
        assert 10 <= len(found) <= asked


async def test_a_server_that_repeats_its_page_is_left(autojump_clock: MockClock) -> None:
    async with lied_to() as (liar, dht):
        record = records.sign(seeded(5), KIND, body(), key=KEY, ttl_s=120)
        liar.answer([record.envelope], more=True)
        with trio.fail_after(1):
            assert len(await dht.find(KEY, KIND)) == 1


async def test_a_server_that_hangs_is_left_in_time(autojump_clock: MockClock) -> None:
    async with lied_to() as (liar, dht):

        async def hang(_: Message) -> Message:
            await trio.sleep_forever()
            raise AssertionError

        liar.methods["find"] = hang
        began = trio.current_time()
        assert await dht.find(KEY, KIND) == []
        assert trio.current_time() - began <= dht.settings.query_s


@pytest.mark.parametrize("bad", ["forged", "stale", "garbage", "no key"])
async def test_servers_take_no_bad_records(bad: str, autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(1, network=network) as hosts:
        (server,) = await joined(hosts)
        async with client_of(hosts[0], network) as client:
            identity = seeded(5)
            old, new = (records.sign(identity, KIND, {"n": n}, key=KEY, ttl_s=120) for n in range(2))
            contact = Contact(peer_id=hosts[0].peer_id, addresses=tuple(hosts[0].addresses))
            await client._call(contact, "store", {"key": KEY, "record": new.envelope})
            envelope = {
                "forged": forged(seeded(7), seeded(8)),
                "stale": old.envelope,
                "garbage": b"garbage",
                "no key": new.envelope,
            }[bad]
            with pytest.raises(errors.RpcError) as caught:
                await client._call(contact, "store", {"key": b"" if bad == "no key" else KEY, "record": envelope})
            assert caught.value.code == ("bad-input" if bad == "no key" else "bad-record")
            held = server.store.get(KEY, trio.current_time())
            assert [record.envelope for record in held] == [new.envelope]
