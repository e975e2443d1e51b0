"""Which nodes are known to be silent, under virtual time."""

from __future__ import annotations

import math

import trio
from trio.testing import MockClock

from client.lifesigns import KEEP_S, LifeSigns
from net.addresses import parse
from net.host import open_host
from net.transports.memory import MemoryNetwork
from tests.mem.lines import Line, LineTransport
from tests.net_helpers import seeded


async def test_who_does_not_answer_is_missed_until_met_again(autojump_clock: MockClock) -> None:
    network, line, where = MemoryNetwork(), Line(), [parse("/memory/1")]
    async with (
        open_host(seeded(1), listen=where, transports=[LineTransport(network, line)]) as silent,
        open_host(seeded(2), listen=[parse("/memory/2")], transports=[network.transport()]) as well,
        open_host(seeded(3), transports=[network.transport()]) as host,
    ):
        peers = [silent.peer_id, well.peer_id, seeded(4).peer_id]
        await host.connect(silent.peer_id, where)
        await host.connect(well.peer_id, [parse("/memory/2")])
        signs = LifeSigns(host)
        line.cut()
        await trio.sleep(5)
        assert not signs.missed(peers)  # nobody was asked
        signs.ask(peers)
        assert not signs.missed(peers)  # nor had time to answer
        await trio.sleep(0.5)
        assert list(signs.missed(peers)) == [silent.peer_id]
        signs.ask(peers)  # again changes nothing
        await trio.sleep(1)
        assert host.swarm.connection(silent.peer_id) is None
        assert list(signs.missed(peers)) == [silent.peer_id]
        line.is_up = True
        await host.connect(silent.peer_id, where)
        assert not signs.missed(peers)


async def test_it_does_not_matter_for_long(autojump_clock: MockClock) -> None:
    network, line, where = MemoryNetwork(), Line(), [parse("/memory/1")]
    async with (
        open_host(seeded(1), listen=where, transports=[LineTransport(network, line)]) as silent,
        open_host(seeded(3), transports=[network.transport()]) as host,
    ):
        connection = await host.connect(silent.peer_id, where)
        await trio.sleep(1)
        assert connection.mux.doubt_at == math.inf
        signs = LifeSigns(host)
        line.stall()
        signs.ask([silent.peer_id])
        assert connection.mux.doubt_at < math.inf
        await trio.sleep(0.5 * KEEP_S)
        assert signs.missed([silent.peer_id])
        await trio.sleep(0.5 * KEEP_S)
        assert not signs.missed([silent.peer_id])


async def test_an_answer_ends_the_doubt(autojump_clock: MockClock) -> None:
    network, line, where = MemoryNetwork(), Line(), [parse("/memory/1")]
    async with (
        open_host(seeded(1), listen=where, transports=[LineTransport(network, line)]) as slow,
        open_host(seeded(3), transports=[network.transport()]) as host,
    ):
        connection = await host.connect(slow.peer_id, where)
        await trio.sleep(1)
        signs = LifeSigns(host)
        line.stall()
        signs.ask([slow.peer_id])
        await trio.sleep(0.7)
        assert signs.missed([slow.peer_id])
        line.resume()
        await trio.sleep(0.1)
        assert not signs.missed([slow.peer_id])
        assert connection.mux.doubt_at == math.inf
