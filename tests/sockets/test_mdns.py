"""Peers that find each other by multicast DNS, and what their records may hold."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from net import mdns
from net.addresses import PeerAddress, parse, tcp
from net.host import open_host
from net.mdns import Mdns
from tests.net_helpers import seeded

NEAR = PeerAddress(address=tcp("192.168.1.10", 4001), peer_id=seeded(1).peer_id)


def test_txt_records_are_strings_behind_their_lengths() -> None:
    data = mdns.write_txt([NEAR])
    assert data == bytes([len(data) - 1]) + b"dnsaddr=" + str(NEAR).encode()
    assert mdns.read_txt(data) == [NEAR]
    others = b"\x03a=b" + b"\x0cdnsaddr=/ip4" + b"\x09dnsaddr=\xff"
    assert mdns.read_txt(others + data) == [NEAR]
    assert len(mdns.read_txt(data * 100)) == mdns.MAX_ADDRESSES
    local = PeerAddress(address=parse("/ip4/127.0.0.1/tcp/1"), peer_id=NEAR.peer_id)
    assert mdns.read_txt(mdns.write_txt([local])) == []


@given(st.binary(max_size=300))
def test_no_record_breaks_the_reading(data: bytes) -> None:
    mdns.read_txt(data)


async def test_two_hosts_of_one_network_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is this machine's loopback, whose addresses count as near here."""
    monkeypatch.setattr(mdns, "is_near", lambda address: True)
    listen = [tcp("127.0.0.1", 0)]
    async with (
        open_host(seeded(1), listen=listen) as one,
        open_host(seeded(2), listen=listen) as two,
        trio.open_nursery() as nursery,
    ):
        send, receive = trio.open_memory_channel[PeerAddress](8)
        await nursery.start(Mdns(one, interfaces=["127.0.0.1"]).run)
        await nursery.start(Mdns(two, interfaces=["127.0.0.1"], on_peer=send.send_nowait).run)
        with trio.fail_after(20):
            async for peer in receive:
                if peer.peer_id == one.peer_id:
                    break
        assert two.peerstore.addresses(one.peer_id) == one.addresses
        await two.connect(one.peer_id)
        nursery.cancel_scope.cancel()
