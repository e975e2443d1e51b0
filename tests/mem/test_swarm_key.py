"""A private swarm: who has its key, and who has not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from nacl.secret import SecretBox
from trio.testing import MockClock, memory_stream_pair

from net import errors
from net.host import open_host
from net.ping import ping_once
from net.security.swarm_key import HEADER, NONCE_BYTES, PrivateStream, SwarmKey, _cipher
from net.transports.memory import MemoryNetwork
from tests.net_helpers import MEMORY_ANY, receive_count, seeded

OURS, OTHER = SwarmKey(bytes(range(32))), SwarmKey(bytes(32))


@pytest.mark.parametrize(("key", "joins"), [(OURS, True), (OTHER, False), (None, False)])
@pytest.mark.parametrize("inside", [True, False])
async def test_only_who_has_the_key_gets_in(
    autojump_clock: MockClock, key: SwarmKey | None, joins: bool, inside: bool
) -> None:
    network = MemoryNetwork()
    keys = (OURS, key) if inside else (key, OURS)
    async with (
        open_host(seeded(1), listen=[MEMORY_ANY], transports=[network.transport()], swarm_key=keys[0]) as one,
        open_host(seeded(2), listen=[MEMORY_ANY], transports=[network.transport()], swarm_key=keys[1]) as two,
    ):
        if joins:
            await two.connect(one.peer_id, one.addresses)
            assert await ping_once(two, one.peer_id) >= 0
        else:
            with pytest.raises(errors.DialError) as caught:
                await two.connect(one.peer_id, one.addresses)
            if keys[1] is not None and "no answer" not in str(caught.value):
                assert "another swarm key" in str(caught.value)
            assert one.swarm.connections == two.swarm.connections == []


async def test_without_a_key_nothing_of_a_private_swarm_can_be_read() -> None:
    near, far = memory_stream_pair()
    sender, receiver = PrivateStream(near, OURS), PrivateStream(far, OURS)
    await sender.send_all(b"first")
    await sender.send_all(b"second")
    assert await receive_count(receiver, 11) == b"firstsecond"
    await sender.send_all(b"third")
    assert await far.receive_some() != b"third"


async def test_the_end_before_the_nonce_is_an_end() -> None:
    near, far = memory_stream_pair()
    await near.send_all(b"short")
    await near.aclose()
    assert await PrivateStream(far, OURS).receive_some() == b""


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=24, max_size=24), st.lists(st.binary(), max_size=5))
def test_the_cipher_is_xsalsa20(key: bytes, nonce: bytes, parts: list[bytes]) -> None:
    """NaCl's box is XSalsa20 from its 32nd byte on."""
    assert len(nonce) == NONCE_BYTES
    cipher = _cipher(SwarmKey(key), nonce)
    cipher.encrypt(bytes(32))
    expected = SecretBox(key).encrypt(b"".join(parts), nonce).ciphertext[16:]
    assert b"".join(cipher.encrypt(part) for part in parts) == expected


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "swarm.key"
    secret = os.urandom(32)
    path.write_text(f"{HEADER}\n/base16/\n{secret.hex()}\n")
    assert SwarmKey.load(path) == SwarmKey(secret)
    assert secret.hex() not in repr(SwarmKey.load(path))
    for text in (
        "",
        HEADER,
        f"{HEADER}\n/base16/\n00\n",
        f"{HEADER}\n/base16/\n{'zz' * 32}\n",
        "/key/x/\n" * 3,
        "\xff",
    ):
        path.write_text(text)
        with pytest.raises(errors.IdentityError, match="no swarm key"):
            SwarmKey.load(path)
    with pytest.raises(errors.IdentityError, match="make one with"):
        SwarmKey.load(tmp_path / "missing")


async def test_many_small_and_large_sends_arrive_as_they_were(autojump_clock: MockClock) -> None:
    near, far = memory_stream_pair()
    sender, receiver = PrivateStream(near, OURS), PrivateStream(far, OURS)
    parts = [os.urandom(size) for size in (0, 1, 23, 24, 25, 64, 65, 100_000, 1)]
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for part in parts:
                await sender.send_all(part)

        nursery.start_soon(send)
        assert await receive_count(receiver, sum(map(len, parts))) == b"".join(parts)


async def test_reading_keeps_to_the_rules_of_streams() -> None:
    one, other = (PrivateStream(end, OURS) for end in memory_stream_pair())
    await one.send_all(b"some bytes")
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="max_bytes"):
            await other.receive_some(wrong)
    assert await other.receive_some(4) == b"some"
    with pytest.raises(ValueError, match="max_bytes"):
        await other.receive_some(0)
