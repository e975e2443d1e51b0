"""Announcements that nobody signed, for what has no I/O."""

from __future__ import annotations

from net.addresses import parse
from net.identity import Identity, PeerId
from net.protocol.announcement import NodeAnnouncement, Numerics

FULL = Numerics(dtype="float32", quantization="none", backend="cpu")
INT8 = Numerics(dtype="float32", quantization="int8", backend="cpu")
_PEERS = [Identity.generate(bytes([number]) * 32).peer_id for number in range(16)]


def peer(number: int) -> PeerId:
    """One of sixteen peers, always the same."""
    return _PEERS[number]


def node(
    number: int,
    start: int,
    end: int,
    *,
    blocks: int = 8,
    speed: float = 10.0,
    numerics: Numerics = FULL,
    state: str = "online",
    cache: int = 1000,
    reachability: str = "unknown",
    next: tuple[int, int] | None = None,
    round_trips: dict[int, float] | None = None,
    waiting: float = 0.0,
) -> NodeAnnouncement:
    """What peer ``number`` says that it serves."""
    return NodeAnnouncement(
        peer_id=peer(number),
        addresses=(parse(f"/memory/{number + 1}"),),
        model="some-bloom",
        digest="d" * 64,
        blocks=blocks,
        start=start,
        end=end,
        weights="0" * 64,
        numerics=numerics,
        decode_tokens_per_s=speed,
        cache_tokens_left=cache,
        max_length=100,
        state=state,
        agent="test",
        reachability=reachability,
        next=next,
        round_trips={peer(other): seconds for other, seconds in (round_trips or {}).items()},
        waiting=waiting,
    )
