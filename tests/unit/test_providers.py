"""The store of providers, and Kademlia's messages: bounds, expiry, and bytes from anybody."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.kad_dht.pb import kademlia_pb2

from net import errors
from net.addresses import Multiaddr, parse
from net.dht import kademlia_wire as wire
from net.dht import providers
from net.dht.kademlia_wire import Message, Type
from net.dht.providers import MAX_PER_KEY, MAX_PER_KEY_AND_GROUP, MAX_PER_PROVIDER, ProviderStore
from net.dht.table import Contact, K
from net.dht.wire import MAX_ADDRESSES
from net.identity import PeerId


def peer(number: int) -> PeerId:
    return PeerId(b"\x12\x20" + hashlib.sha256(b"%d" % number).digest())


def key(number: int) -> bytes:
    return b"\x12\x20" + hashlib.sha256(b"key %d" % number).digest()


def provider(number: int, *, network: int | None = None) -> Contact:
    """Each in a network of its own, unless one is named."""
    network = number if network is None else network
    where = parse(f"/ip4/{20 + network // 250}.{network % 250}.0.1/tcp/4001")
    return Contact(peer_id=peer(number), addresses=(where,), seen_at=where)


def test_who_renews_stays_and_who_does_not_goes() -> None:
    store = ProviderStore(ttl_s=10.0)
    store.put(key(1), provider(1), now=0.0)
    store.put(key(1), provider(2), now=0.0)
    store.put(key(1), provider(1), now=6.0)
    assert [each.peer_id for each in store.get(key(1), now=9.0)] == [peer(2), peer(1)]
    assert [each.peer_id for each in store.get(key(1), now=10.0)] == [peer(1)]
    store.expire(10.0)
    assert len(store) == 1
    store.expire(16.0)
    assert (len(store), store.get(key(1), now=16.0)) == (0, [])


def test_a_renewal_brings_the_new_address() -> None:
    store = ProviderStore()
    store.put(key(1), provider(1, network=1), now=0.0)
    store.put(key(1), provider(1, network=2), now=1.0)
    assert store.get(key(1), now=2.0) == [provider(1, network=2)]


def test_a_full_key_takes_no_newcomer_and_keeps_those_who_renew() -> None:
    store = ProviderStore()
    for number in range(MAX_PER_KEY):
        store.put(key(1), provider(number), now=0.0)
    with pytest.raises(errors.RecordError, match="the most kept"):
        store.put(key(1), provider(MAX_PER_KEY), now=1.0)
    store.put(key(1), provider(0), now=1.0)
    store.put(key(2), provider(MAX_PER_KEY), now=1.0)
    assert len(store) == MAX_PER_KEY + 1


def test_one_network_does_not_fill_a_key() -> None:
    store = ProviderStore()
    for number in range(MAX_PER_KEY_AND_GROUP):
        store.put(key(1), provider(number, network=1), now=0.0)
    with pytest.raises(errors.RecordError, match="the most kept"):
        store.put(key(1), provider(100, network=1), now=0.0)
    store.put(key(1), provider(0, network=1), now=0.0)
    store.put(key(1), provider(101, network=2), now=0.0)


def test_one_peer_does_not_fill_the_store() -> None:
    store = ProviderStore(ttl_s=10.0)
    for number in range(MAX_PER_PROVIDER):
        store.put(key(number), provider(1), now=0.0)
    with pytest.raises(errors.RecordError, match="the most kept"):
        store.put(key(MAX_PER_PROVIDER), provider(1), now=0.0)
    store.drop(key(0), peer(1))
    store.drop(key(0), peer(1))
    store.put(key(MAX_PER_PROVIDER), provider(1), now=0.0)
    store.put(key(0), provider(1), now=10.0)  # all others have expired
    assert len(store) == 1


def test_the_store_has_an_end() -> None:
    store = ProviderStore(max_entries=2)
    store.put(key(1), provider(1), now=0.0)
    store.put(key(2), provider(2), now=0.0)
    with pytest.raises(errors.RecordError, match="the most allowed"):
        store.put(key(3), provider(3), now=0.0)
    store.put(key(3), provider(3), now=providers.TTL_S)


puts = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.floats(0, 10)), max_size=60)


@given(puts=puts)
def test_what_is_counted_is_what_is_there(puts: list[tuple[int, int, float]]) -> None:
    store, now = ProviderStore(ttl_s=15.0, max_entries=12), 0.0
    for where, who, pause in puts:
        now += pause
        try:
            store.put(key(where), provider(who), now)
        except errors.RecordError:
            assert len(store) == 12
        assert len(store) == sum(len(store.get(key(number), now)) for number in range(6)) <= 12


def anywhere(address: Multiaddr) -> bool:
    return True


def test_messages_come_back_as_they_were() -> None:
    for kind in Type:
        contacts = tuple(Contact(peer_id=peer(n), addresses=provider(n).addresses) for n in range(3))
        message = Message(type=kind, key=key(1), closer=contacts, providers=contacts[:1])
        assert wire.decode(wire.encode(message), anywhere) == message


def test_addresses_that_are_of_no_use_are_passed_over() -> None:
    us = peer(1)
    good = parse("/ip4/1.2.3.4/tcp/1")
    named = Multiaddr(f"/ip4/1.2.3.4/tcp/2/p2p/{us}")
    relayed = Multiaddr(f"/ip4/1.2.3.4/tcp/3/p2p/{peer(2)}/p2p-circuit")
    raw = [
        b"",
        b"\xff\xff",
        bytes(1000),
        parse("/ip4/9.9.9.9/tcp/9").to_bytes(),
        *(each.to_bytes() for each in (good, named, relayed)),
    ]

    def can_dial(address: Multiaddr) -> bool:
        return "9.9.9.9" not in str(address)

    assert wire.read_addresses(raw, us, can_dial) == (good, parse("/ip4/1.2.3.4/tcp/2"), relayed)


def test_only_so_many_peers_and_addresses_are_read() -> None:
    many = [parse(f"/ip4/1.2.3.4/tcp/{port}").to_bytes() for port in range(1, 100)]
    peers = [kademlia_pb2.Message.Peer(id=peer(number).to_bytes(), addrs=many) for number in range(100)]
    raw = kademlia_pb2.Message(type="GET_PROVIDERS", key=key(1), closerPeers=peers, providerPeers=peers)
    message = wire.decode(raw.SerializeToString(), anywhere)
    assert (len(message.closer), len(message.providers)) == (K, wire.MAX_PROVIDERS)
    assert {len(each.addresses) for each in (*message.closer, *message.providers)} == {MAX_ADDRESSES}


@pytest.mark.parametrize(
    "raw",
    [
        kademlia_pb2.Message(type="GET_VALUE", key=key(1)),
        kademlia_pb2.Message(type="FIND_NODE", key=bytes(wire.MAX_KEY_BYTES + 1)),
        kademlia_pb2.Message(type="FIND_NODE", closerPeers=[kademlia_pb2.Message.Peer(id=b"")]),
        kademlia_pb2.Message(type="FIND_NODE", closerPeers=[kademlia_pb2.Message.Peer(id=bytes(65))]),
    ],
    ids=["a value", "a long key", "nobody", "a long id"],
)
def test_what_is_not_spoken_here_is_refused(raw: kademlia_pb2.Message) -> None:
    with pytest.raises(errors.RemoteProtocolError):
        wire.decode(raw.SerializeToString(), anywhere)


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_message_or_an_error_of_the_peers(data: bytes) -> None:
    try:
        message = wire.decode(data, anywhere)
    except errors.RemoteProtocolError:
        return
    assert len(message.key) <= wire.MAX_KEY_BYTES
