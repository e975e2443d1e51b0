"""libp2p's own Kademlia on hosts in memory: providers, peers, renewal, and servers and askers that lie."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from net import delimited, errors
from net.addresses import parse
from net.dht import kademlia_wire as wire
from net.dht.kademlia import Kademlia, KademliaSettings
from net.dht.kademlia_wire import Message, Type
from net.dht.providers import ProviderStore
from net.dht.table import Contact, K
from net.host import Host, open_host
from net.io import send
from net.mux.base import Stream
from net.swarm import Connection
from net.transports.memory import MemoryNetwork
from tests.net_helpers import memory_hosts, seeded

KEY = b"\x12\x20" + hashlib.sha256(b"something").digest()
Ask = Callable[[Message], Awaitable[Message]]


async def servers(hosts: Sequence[Host], settings: KademliaSettings | None = None) -> list[Kademlia]:
    """Those that have all met the first."""
    made: list[Kademlia] = []
    for host in hosts:
        kademlia = Kademlia(host, server=True, settings=settings)
        await kademlia.join(hosts[0].peer_addresses if made else [])
        made.append(kademlia)
    for each in made[1:]:
        made[0].table.add(contact(each.host))
    return made


def contact(host: Host) -> Contact:
    return Contact(peer_id=host.peer_id, addresses=tuple(host.addresses))


@asynccontextmanager
async def client_of(server: Host, network: MemoryNetwork, number: int = 900) -> AsyncIterator[Kademlia]:
    async with open_host(seeded(number), transports=[network.transport()]) as host:
        kademlia = Kademlia(host, server=False)
        await kademlia.join(server.peer_addresses)
        yield kademlia


async def test_who_provides_something_is_found_by_those_who_never_met_it(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(8, network=network) as hosts:
        made = await servers(hosts)
        async with client_of(hosts[0], network) as client:
            assert await client.find_providers(KEY) == []
            assert await made[3].provide(KEY) == 7
            assert await made[5].provide(KEY) == 7
            found = {each.peer_id: each.addresses for each in await client.find_providers(KEY)}
            assert found == {host.peer_id: tuple(host.addresses) for host in (hosts[3], hosts[5])}
            assert len(await client.find_providers(KEY, count=1)) == 1
            async with client.host.stream(hosts[3].peer_id, ["/ipfs/ping/1.0.0"], found[hosts[3].peer_id]):
                pass


async def test_a_client_provides_too_and_is_not_asked(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(3, network=network) as hosts:
        made = await servers(hosts)
        async with client_of(hosts[0], network) as client:
            assert await client.provide(KEY) == 3
            assert [each.peer_id for each in await made[2].find_providers(KEY)] == [client.host.peer_id]
            assert all(client.host.peer_id not in each.table for each in made)


async def test_peers_are_found_where_they_are(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(6, network=network) as hosts:
        await servers(hosts)
        async with client_of(hosts[0], network) as client:
            assert await client.find_peer(hosts[4].peer_id) == contact(hosts[4])
            assert await client.find_peer(hosts[0].peer_id) == contact(hosts[0])
            assert await client.find_peer(seeded(77).peer_id) is None


async def test_what_is_provided_is_told_again_and_forgotten_when_it_is_not(autojump_clock: MockClock) -> None:
    settings = KademliaSettings(provide_s=100.0, refresh_s=10.0)
    network = MemoryNetwork()
    async with memory_hosts(2, network=network) as hosts, trio.open_nursery() as nursery:
        server, giver = await servers(hosts, settings)
        server.providers = ProviderStore(ttl_s=150.0)
        await nursery.start(giver.run)
        await giver.provide(KEY)
        async with client_of(hosts[0], network) as client:
            await trio.sleep(1000)
            assert [each.peer_id for each in await client.find_providers(KEY)] == [hosts[1].peer_id]
            giver.withdraw(KEY)
            await trio.sleep(151)
            assert await client.find_providers(KEY) == []
        nursery.cancel_scope.cancel()


async def test_servers_that_connect_are_met_and_clients_are_not(autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(2, network=network) as hosts, trio.open_nursery() as nursery:
        first, second = (Kademlia(host, server=True) for host in hosts)
        await nursery.start(first.run)
        async with client_of(hosts[0], network) as client:
            await hosts[1].connect(hosts[0].peer_id, hosts[0].addresses)
            await trio.sleep(1)
            assert [each.peer_id for each in first.table.contacts] == [hosts[1].peer_id]
            assert not second.table.contacts  # it does not run
            found = await client.find_peer(hosts[1].peer_id)
            assert found is not None and found.addresses == tuple(hosts[1].addresses)
        nursery.cancel_scope.cancel()


async def test_no_more_is_provided_than_others_keep(autojump_clock: MockClock) -> None:
    async with memory_hosts(1) as hosts:
        [kademlia] = await servers(hosts, KademliaSettings(max_provided=1))
        assert await kademlia.provide(KEY) == 0
        assert await kademlia.provide(KEY) == 0
        with pytest.raises(errors.LimitExceeded):
            await kademlia.provide(KEY + b"!")
        for wrong in (b"", bytes(81)):
            with pytest.raises(errors.LocalProtocolError):
                await kademlia.provide(wrong)
            with pytest.raises(errors.LocalProtocolError):
                await kademlia.find_providers(wrong)


@asynccontextmanager
async def asking(server: Host, asker: Host) -> AsyncIterator[Ask]:
    """Questions to a server, one after another on one stream."""
    async with asker.stream(server.peer_id, [wire.PROTOCOL_ID], server.addresses) as stream:

        async def ask(message: Message) -> Message:
            await wire.send_message(stream, message)
            return await wire.receive_message(stream, wire.MAX_ANSWER_BYTES, asker.swarm.can_dial)

        yield ask


async def test_nobody_speaks_for_another(autojump_clock: MockClock) -> None:
    async with memory_hosts(3) as hosts:
        [server] = await servers(hosts[:1])
        liar, victim = hosts[1:]
        async with liar.stream(hosts[0].peer_id, [wire.PROTOCOL_ID], hosts[0].addresses) as stream:
            claim = Message(type=Type.ADD_PROVIDER, key=KEY, providers=(contact(victim),))
            await wire.send_message(stream, claim)
            both = Message(type=Type.ADD_PROVIDER, key=KEY + b"2", providers=(contact(victim), contact(liar)))
            await wire.send_message(stream, both)
        await trio.sleep(1)
        assert server.providers.get(KEY, trio.current_time()) == []
        assert [each.peer_id for each in server.providers.get(KEY + b"2", trio.current_time())] == [liar.peer_id]


async def test_questions_on_one_stream_are_answered_in_turn(autojump_clock: MockClock) -> None:
    async with memory_hosts(3) as hosts:
        made = await servers(hosts)
        async with asking(hosts[0], hosts[1]) as ask:
            assert (await ask(Message(type=Type.PING))).type is Type.PING
            near = await ask(Message(type=Type.FIND_NODE, key=hosts[0].peer_id.to_bytes()))
            assert near.closer[0] == contact(hosts[0])  # go-libp2p asks that of everybody whom it meets
            assert hosts[1].peer_id not in [each.peer_id for each in near.closer[1:]]
            made[0].providers.put(KEY, contact(hosts[2]), trio.current_time())
            held = await ask(Message(type=Type.GET_PROVIDERS, key=KEY))
            assert held.providers == (contact(hosts[2]),)
            assert [each.peer_id for each in held.closer] == [hosts[2].peer_id]


@pytest.mark.parametrize(
    "data",
    [
        delimited.frame(b"\xff\xff\xff"),
        delimited.frame(wire.encode(Message(type=Type.FIND_NODE))),
        delimited.frame(bytes(wire.MAX_REQUEST_BYTES + 1)),
    ],
    ids=["no protobuf", "no key", "too long"],
)
async def test_a_bad_question_costs_its_stream_alone(data: bytes, autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as hosts:
        await servers(hosts[:1])
        async with hosts[1].stream(hosts[0].peer_id, [wire.PROTOCOL_ID], hosts[0].addresses) as stream:
            await send(stream, data)
            with pytest.raises(errors.NetError):
                await wire.receive_message(stream, 100, hosts[1].swarm.can_dial)
            async with asking(hosts[0], hosts[1]) as ask:
                await ask(Message(type=Type.PING))


async def test_a_stream_that_asks_nothing_is_closed(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as hosts:
        [server] = await servers(hosts[:1])
        async with hosts[1].stream(hosts[0].peer_id, [wire.PROTOCOL_ID], hosts[0].addresses) as stream:
            with trio.fail_after(server.settings.idle_s + 1):
                assert await stream.receive_some() == b""


Handler = Callable[[Connection, Stream], Awaitable[None]]


async def silent(_: Connection, stream: Stream) -> None:
    await trio.sleep_forever()


async def of_another_kind(_: Connection, stream: Stream) -> None:
    await wire.send_message(stream, Message(type=Type.PING))


async def without_end(_: Connection, stream: Stream) -> None:
    while True:
        await send(stream, b"\xff" * 1000)


async def generous(_: Connection, stream: Stream) -> None:
    """More providers than anybody asks for, none of which is there."""
    everybody = tuple(Contact(peer_id=seeded(2000 + number).peer_id, addresses=()) for number in range(50))
    await wire.send_message(stream, Message(type=Type.GET_PROVIDERS, providers=everybody))


async def inventive(_: Connection, stream: Stream) -> None:
    """Ever new servers, none of which is there."""
    closer = tuple(
        Contact(peer_id=seeded(1000 + number).peer_id, addresses=(parse(f"/memory/{5000 + number}"),))
        for number in range(20)
    )
    await wire.send_message(stream, Message(type=Type.GET_PROVIDERS, closer=closer))


@pytest.mark.parametrize("handler", [silent, of_another_kind, without_end, generous, inventive])
async def test_a_server_that_misbehaves_hides_nothing(handler: Handler, autojump_clock: MockClock) -> None:
    network = MemoryNetwork()
    async with memory_hosts(3, network=network) as hosts, AsyncExitStack() as stack:
        made = await servers(hosts)
        await made[1].provide(KEY)
        bad = await stack.enter_async_context(
            open_host(seeded(800), listen=[parse("/memory/800")], transports=[network.transport()])
        )
        bad.handle(wire.PROTOCOL_ID, handler)
        made[2].table.add(contact(bad))
        made[2].providers.drop(KEY, hosts[1].peer_id)
        with trio.fail_after(20):
            found = await made[2].find_providers(KEY)
        assert hosts[1].peer_id in [each.peer_id for each in found]
        assert len(found) == (K if handler is generous else 1)


async def test_who_lost_everybody_asks_the_bootstrap_nodes_again(autojump_clock: MockClock) -> None:
    settings = KademliaSettings(refresh_s=10.0)
    async with memory_hosts(2) as hosts, trio.open_nursery() as nursery:
        _, second = await servers(hosts, settings)
        await nursery.start(second.run)
        await trio.sleep(1)  # it has met those with whom it is connected already
        second.table.remove(hosts[0].peer_id)
        await trio.sleep(15)
        assert hosts[0].peer_id in second.table
        nursery.cancel_scope.cancel()


async def test_joining_nobody_says_why(autojump_clock: MockClock) -> None:
    async with memory_hosts(2) as hosts:
        kademlia = Kademlia(hosts[1], server=True)
        with pytest.raises(errors.DialError, match="/ipfs/kad"):
            await kademlia.join(hosts[0].peer_addresses)
        await kademlia.join([])
