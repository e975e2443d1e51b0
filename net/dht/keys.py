"""Where things lie: 256-bit keys, and how far apart they are."""

from __future__ import annotations

import hashlib

from net.identity import PeerId

KEY_BITS = 256
KEY_BYTES = KEY_BITS // 8


def of_name(name: str) -> bytes:
    """The key of a name such as ``raceme/models``."""
    return hashlib.sha256(b"raceme-key:" + name.encode()).digest()


def of_peer(peer_id: PeerId) -> bytes:
    """Where a peer is, as in libp2p's Kademlia: SHA-256 of its id."""
    return hashlib.sha256(peer_id.to_bytes()).digest()


def distance(a: bytes, b: bytes) -> int:
    return int.from_bytes(a, "big") ^ int.from_bytes(b, "big")


def common_prefix(a: bytes, b: bytes) -> int:
    """How many leading bits are the same: the bucket of one in the table of the other."""
    return KEY_BITS - distance(a, b).bit_length()
