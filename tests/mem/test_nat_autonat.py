"""AutoNAT v2: both sides over an internet in memory, and servers and askers that cheat."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from net import delimited, errors
from net.addresses import Multiaddr, PeerAddress, parse, tcp
from net.host import Host, open_host
from net.identity import Identity
from net.io import send
from net.mux.base import Stream
from net.nat import messages
from net.nat.autonat import AutoNat
from net.nat.dialback import DialBackSettings, serve_dial_back
from net.nat.messages import DialDataRequest, DialDataResponse, DialRequest, DialResponse
from net.nat.verdicts import Verdict
from net.swarm import Connection
from tests.mem.internet import Internet, Machine
from tests.net_helpers import UNREADABLE_ADDRESS, seeded

SERVERS = ["44.1.0.1", "44.2.0.1", "44.3.0.1", "44.4.0.1"]
SECOND_IP = "45.9.0.9"


def dial_back(internet: Internet, ip: str, **changes: object) -> DialBackSettings:
    settings = DialBackSettings(transports=lambda: [internet.machine(ip)])
    return replace(settings, **changes)  # type: ignore[arg-type]


@asynccontextmanager
async def host_at(machine: Machine, identity: Identity, port: int = 4001) -> AsyncIterator[Host]:
    async with open_host(identity, listen=[tcp(machine.ip, port)], transports=[machine]) as host:
        yield host


@asynccontextmanager
async def asker_and_server(
    internet: Internet, asker: Machine, **changes: object
) -> AsyncIterator[tuple[Host, AutoNat, Host, Connection]]:
    """The asker's side of a connection with a server at ``SERVERS[0]``."""
    async with (
        host_at(internet.machine(SERVERS[0]), seeded(2)) as server,
        host_at(asker, seeded(1)) as host,
    ):
        serve_dial_back(server, dial_back(internet, SERVERS[0], **changes))
        client = AutoNat(host, settings=dial_back(internet, asker.ip))
        yield host, client, server, await host.connect(server.peer_id, server.addresses)


async def test_a_public_address_is_reached_from_another_port_by_a_stranger(autojump_clock: MockClock) -> None:
    internet = Internet()
    async with asker_and_server(internet, internet.machine("45.1.0.1")) as (host, client, server, connection):
        met: list[Connection] = []
        host.swarm.watchers.append(met.append)
        assert await client.check(connection, host.addresses) == (host.addresses[0], True)
        (back,) = met
        assert back.peer_id not in (host.peer_id, server.peer_id)
        assert back.remote != tcp(SERVERS[0], 4001)  # not from where the server listens
        assert back.mux.is_closed
        assert server.swarm.connections and not connection.mux.is_closed
        assert host.swarm.connection(server.peer_id) is connection


async def test_behind_a_nat_it_is_not_and_the_server_dials_what_was_asked_for_alone(autojump_clock: MockClock) -> None:
    internet = Internet()
    machine = internet.machine("192.168.1.10", internet.router("45.1.0.1"))
    async with asker_and_server(internet, machine) as (host, client, _, connection):
        internet.dials.clear()
        outer = tcp("45.1.0.1", 4001)
        assert await client.check(connection, [*host.addresses, outer, tcp("45.1.0.1", 9)]) == (outer, False)
        assert internet.dials == [("45.1.0.1", 4001)]


async def test_a_forwarded_port_is_reached(autojump_clock: MockClock) -> None:
    internet = Internet()
    router = internet.router("45.1.0.1")
    router.forwards[7000] = ("192.168.1.10", 4001)
    async with asker_and_server(internet, internet.machine("192.168.1.10", router)) as (_, client, _, connection):
        assert await client.check(connection, [tcp("45.1.0.1", 7000)]) == (tcp("45.1.0.1", 7000), True)


async def test_another_ip_than_the_askers_costs_data(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    paid: list[int] = []
    encode = messages.encode

    def counted(message: messages.Message) -> bytes:
        if isinstance(message, DialDataResponse):
            paid.append(len(message.data))
        return encode(message)

    monkeypatch.setattr(messages, "encode", counted)
    internet = Internet()
    async with asker_and_server(internet, internet.machine("45.1.0.1")) as (host, client, _, connection):
        assert await client.check(connection, host.addresses) == (host.addresses[0], True)
        assert paid == []
        assert await client.check(connection, [tcp(SECOND_IP, 4001)]) == (tcp(SECOND_IP, 4001), False)
        assert 30_000 <= sum(paid) <= 100_000
        assert max(paid) <= messages.MAX_DATA_BYTES


async def test_who_does_not_pay_has_nobody_dialled(autojump_clock: MockClock) -> None:
    internet = Internet()
    async with asker_and_server(internet, internet.machine("45.1.0.1")) as (host, _, _, connection):
        internet.dials.clear()
        for payment in ([bytes(4096)] * 7, [b""], []):
            stream = await host.open_stream_over(connection, [messages.DIAL_REQUEST_PROTOCOL])
            victim = DialRequest(addresses=(tcp(SECOND_IP, 22).to_bytes(),), nonce=1)
            await send(stream, delimited.frame(messages.encode(victim)))
            bill = messages.decode(await delimited.receive(stream, 8192, "an answer"), DialDataRequest)
            assert bill.count >= 30_000
            for part in payment:
                await send(stream, delimited.frame(messages.encode(DialDataResponse(data=part))))
            with pytest.raises((errors.NetError, trio.TooSlowError)), trio.fail_after(60):
                await delimited.receive(stream, 8192, "an answer")
            stream.reset()
        assert internet.dials == []


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/192.168.1.1/tcp/4001",
        "/ip4/127.0.0.1/tcp/4001",
        "/ip4/169.254.169.254/tcp/80",
        "/ip4/100.64.0.1/tcp/4001",
        "/ip4/224.0.0.1/tcp/4001",
        "/ip6/fe80::1/tcp/4001",
        "/ip6/::ffff:127.0.0.1/tcp/4001",
        "/dns4/localhost/tcp/4001",
        "/ip4/45.1.0.1/udp/4001/quic-v1",
        "/memory/1",
    ],
)
async def test_what_is_not_public_or_cannot_be_dialled_is_refused(autojump_clock: MockClock, text: str) -> None:
    internet = Internet()
    async with asker_and_server(internet, internet.machine("45.1.0.1")) as (_, client, _, connection):
        internet.dials.clear()
        assert await client.check(connection, [parse(text)]) is None
        assert internet.dials == []


async def test_a_relayed_address_is_refused(autojump_clock: MockClock) -> None:
    internet = Internet()
    async with asker_and_server(internet, internet.machine("45.1.0.1")) as (_, client, _, connection):
        internet.dials.clear()
        relay = PeerAddress(address=tcp("44.2.0.1", 4001), peer_id=seeded(9).peer_id)
        assert await client.check(connection, [Multiaddr(f"{relay}/p2p-circuit")]) is None
        assert internet.dials == []


async def test_who_asks_from_a_private_address_is_not_helped(autojump_clock: MockClock) -> None:
    internet = Internet()
    router = internet.router("45.1.0.1")
    router.forwards[4001] = ("192.168.1.10", 4001)
    neighbour = internet.machine("192.168.1.11", router)
    async with (
        host_at(neighbour, seeded(2)) as server,
        host_at(internet.machine("192.168.1.10", router), seeded(1)) as me,
    ):
        serve_dial_back(server, dial_back(internet, neighbour.ip))
        client = AutoNat(me)
        connection = await me.connect(server.peer_id, server.addresses)
        assert await client.check(connection, [tcp("45.1.0.1", 4001)]) is None
        client.met(connection, [messages.DIAL_REQUEST_PROTOCOL])
        assert client.servers == []  # and we would not ask it


async def test_too_many_requests_are_rejected_until_the_minute_is_over(autojump_clock: MockClock) -> None:
    internet = Internet()
    asker = internet.machine("45.1.0.1")
    async with asker_and_server(internet, asker, per_minute_and_peer=2) as (host, client, _, connection):
        found = [await client.check(connection, host.addresses) for _ in range(3)]
        assert found == [(host.addresses[0], True)] * 2 + [None]
        await trio.sleep(61)
        assert await client.check(connection, host.addresses) == (host.addresses[0], True)


# Servers that cheat


@asynccontextmanager
async def asker_of(answers: list[messages.Message]) -> AsyncIterator[tuple[AutoNat, Connection, list[Multiaddr]]]:
    """A server that says these things, whatever is asked, and dials nobody."""
    internet = Internet()

    async def answer(connection: Connection, stream: Stream) -> None:
        await delimited.receive(stream, 8192, "a request")
        for each in answers:
            await send(stream, delimited.frame(messages.encode(each)))

    async with (
        host_at(internet.machine(SERVERS[0]), seeded(2)) as server,
        host_at(internet.machine("45.1.0.1"), seeded(1)) as host,
    ):
        server.handle(messages.DIAL_REQUEST_PROTOCOL, answer)
        yield AutoNat(host), await host.connect(server.peer_id, server.addresses), host.addresses


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([DialResponse(status=messages.OK, index=0, dialled=messages.OK)], "claims to have reached"),
        ([DialResponse(status=messages.OK, index=5, dialled=messages.OK)], "dialled address 5 of 1"),
        ([DialDataRequest(index=0, count=10**9)], "asks for 1000000000 bytes"),
        ([DialDataRequest(index=7, count=30_000)], "asks for"),
        ([DialDataRequest(index=0, count=30_000)] * 2, "expected an AutoNAT DialResponse"),
        ([DialDataResponse(data=b"?")], "expected an AutoNAT server's answer"),
    ],
)
async def test_a_server_that_cheats_is_blamed(
    autojump_clock: MockClock, answers: list[messages.Message], words: str
) -> None:
    async with asker_of(answers) as (client, connection, own):
        with pytest.raises(errors.RemoteProtocolError, match=words):
            await client.check(connection, own)


@pytest.mark.parametrize(
    "answer",
    [
        DialResponse(status=messages.REJECTED),
        DialResponse(status=messages.INTERNAL_ERROR),
        DialResponse(status=299),
        DialResponse(status=messages.OK, dialled=messages.DIAL_BACK_ERROR),
        DialResponse(status=messages.OK, dialled=333),
    ],
)
async def test_an_answer_that_tells_nothing(autojump_clock: MockClock, answer: DialResponse) -> None:
    async with asker_of([answer]) as (client, connection, own):
        assert await client.check(connection, own) is None


async def test_a_silent_server_is_given_up(autojump_clock: MockClock) -> None:
    async with asker_of([]) as (client, connection, own):
        with pytest.raises((errors.PeerFailed, errors.ConnectionLost)):
            await client.check(connection, own)


async def test_a_dial_back_that_nobody_asked_for_is_refused(autojump_clock: MockClock) -> None:
    internet = Internet()
    async with host_at(internet.machine("45.1.0.1"), seeded(1)) as host:
        AutoNat(host)
        async with open_host(seeded(5), transports=[internet.machine(SECOND_IP)]) as stranger:
            connection = await stranger.connect(host.peer_id, host.addresses)
            stream = await stranger.open_stream_over(connection, [messages.DIAL_BACK_PROTOCOL])
            await send(stream, delimited.frame(messages.encode_dial_back(1)))
            with pytest.raises(errors.NetError):
                await delimited.receive(stream, 8192, "an answer")


# Several servers


async def test_the_majority_of_the_servers_decides_and_checks_are_repeated(autojump_clock: MockClock) -> None:
    internet = Internet()
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        me = await stack.enter_async_context(host_at(internet.machine("45.1.0.1"), seeded(1)))
        client = AutoNat(me, settings=dial_back(internet, "45.1.0.1"))
        client.watch(me.addresses)
        await nursery.start(client.run)
        assert client.verdicts.of(me.addresses[0]) is Verdict.UNKNOWN

        async def deny(connection: Connection, stream: Stream) -> None:
            await delimited.receive(stream, 8192, "a request")
            says = DialResponse(status=messages.OK, index=0, dialled=messages.DIAL_ERROR)
            await send(stream, delimited.frame(messages.encode(says)))

        for number, ip in enumerate(SERVERS[:3], start=2):
            server = await stack.enter_async_context(host_at(internet.machine(ip), seeded(number)))
            if number == 2:
                server.handle(messages.DIAL_REQUEST_PROTOCOL, deny)
            else:
                serve_dial_back(server, dial_back(internet, ip))
            connection = await me.connect(server.peer_id, server.addresses)
            client.met(connection, server.protocols)
            await trio.sleep(5)
            expected = [Verdict.UNREACHABLE, Verdict.UNKNOWN, Verdict.REACHABLE][number - 2]
            assert client.verdicts.of(me.addresses[0]) is expected
        rounds = client.rounds
        await trio.sleep(3500)
        assert client.rounds == rounds  # it is certain for an hour
        await trio.sleep(200)
        assert client.rounds == rounds + 1
        client.recheck()
        assert client.verdicts.of(me.addresses[0]) is Verdict.UNKNOWN
        await trio.sleep(5)
        assert client.verdicts.of(me.addresses[0]) is Verdict.REACHABLE
        nursery.cancel_scope.cancel()


# What is no proof


async def test_a_nonce_over_a_connection_of_ours_proves_nothing(autojump_clock: MockClock) -> None:
    """The server knows the nonce, and could tell it without having dialled anything."""
    internet = Internet()
    machine = internet.machine("192.168.1.10", internet.router("45.1.0.1"))
    async with (
        host_at(internet.machine(SERVERS[0]), seeded(2)) as server,
        host_at(machine, seeded(1)) as host,
    ):

        async def pretend(connection: Connection, stream: Stream) -> None:
            data = await delimited.receive(stream, 8192, "a request")
            nonce = messages.decode(data, DialRequest).nonce
            back = await server.open_stream_over(connection, [messages.DIAL_BACK_PROTOCOL])
            await send(back, delimited.frame(messages.encode_dial_back(nonce)))
            with suppress(errors.NetError):
                await delimited.receive(back, 8192, "an answer")
            says = DialResponse(status=messages.OK, index=0, dialled=messages.OK)
            await send(stream, delimited.frame(messages.encode(says)))

        server.handle(messages.DIAL_REQUEST_PROTOCOL, pretend)
        client = AutoNat(host, settings=dial_back(internet, "192.168.1.10"))
        connection = await host.connect(server.peer_id, server.addresses)
        with pytest.raises(errors.RemoteProtocolError, match="claims to have reached"):
            await client.check(connection, [tcp("45.1.0.1", 4001)])


async def test_a_dial_back_that_says_nothing_is_not_waited_for(autojump_clock: MockClock) -> None:
    internet = Internet()
    async with host_at(internet.machine("45.1.0.1"), seeded(1)) as host:
        AutoNat(host)
        async with open_host(seeded(5), transports=[internet.machine(SECOND_IP)]) as stranger:
            connection = await stranger.connect(host.peer_id, host.addresses)
            stream = await stranger.open_stream_over(connection, [messages.DIAL_BACK_PROTOCOL])
            with trio.fail_after(30), pytest.raises(errors.StreamReset):
                await stream.receive_some()


async def test_a_server_that_comes_again_and_again_makes_us_ask_nobody(autojump_clock: MockClock) -> None:
    """Its word we have. Who is new is another matter."""
    internet = Internet()
    machine = internet.machine("192.168.1.10", internet.router("45.1.0.1"))
    async with (
        asker_and_server(internet, machine) as (host, client, server, connection),
        host_at(internet.machine(SERVERS[1]), seeded(3)) as other,
        trio.open_nursery() as nursery,
    ):
        client.watch([tcp("45.1.0.1", 4001)])
        await nursery.start(client.run)
        client.met(connection, server.protocols)
        await trio.sleep(20)
        assert client.rounds == 1
        for _ in range(20):
            client.met(connection, server.protocols)
            await trio.sleep(5)
        assert client.rounds == 1
        serve_dial_back(other, dial_back(internet, SERVERS[1]))
        client.met(await host.connect(other.peer_id, other.addresses), other.protocols)
        await trio.sleep(20)
        assert client.rounds == 2
        nursery.cancel_scope.cancel()


async def test_bytes_that_only_look_like_an_address_are_refused(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The library writes this one out and reads it again, but cannot take it apart."""
    internet = Internet()
    async with asker_and_server(internet, internet.machine("45.1.0.1")) as (host, _, _, connection):
        stream = await host.open_stream_over(connection, [messages.DIAL_REQUEST_PROTOCOL])
        request = DialRequest(addresses=(UNREADABLE_ADDRESS,), nonce=1)
        await send(stream, delimited.frame(messages.encode(request)))
        answer = messages.decode(await delimited.receive(stream, 8192, "an answer"), DialResponse)
        assert answer.status == messages.REFUSED
        assert not caplog.records
        stream.reset()
