"""What a user may say about which nodes compute: whom, whom not, who does which blocks, and which are computed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from client.errors import InvalidInput
from client.pricing import Pin, Wishes
from net import addresses, errors
from net.identity import PeerId

MAX_PEERS: Final = 10_000  # in one list
MAX_PEER_CHARACTERS: Final = 128


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Read and checked; made by :meth:`read`.

    Attributes:
        allow: The only peers to use; ``None`` for all.
        block: Peers not to use.
        pins: Who must compute certain blocks.
        mixed_numerics: Whether a chain may compute some blocks with other numerics than the rest, where it cannot be
            had otherwise.
        local_blocks: How many of the first blocks, and of the last ones, are computed here.
    """

    allow: frozenset[PeerId] | None = None
    block: frozenset[PeerId] = frozenset()
    pins: tuple[Pin, ...] = ()
    mixed_numerics: bool = False
    local_blocks: int = 0

    @classmethod
    def read(
        cls,
        n_blocks: int,
        *,
        allow: object = None,
        block: object = (),
        pins: object = None,
        mixed_numerics: object = False,
        local_blocks: object = 0,
    ) -> Choices:
        """What a user gave, for a model of so many blocks; see ``AsyncSwarm.model``.

        Raises:
            TypeError: something of another type.
            InvalidInput: what cannot be, and what to do about it.
        """
        if not isinstance(mixed_numerics, bool):
            raise TypeError(f"mixed_numerics is True or False, not {type(mixed_numerics).__name__}")
        if isinstance(local_blocks, bool) or not isinstance(local_blocks, int):
            raise TypeError(f"local_blocks is a number of blocks, not {type(local_blocks).__name__}")
        if local_blocks < 0 or 2 * local_blocks >= n_blocks:
            raise InvalidInput(
                f"local_blocks is {local_blocks}: give 0 to {(n_blocks - 1) // 2}, so that of the model's {n_blocks} "
                f"blocks at least one is left to nodes"
            )
        choices = cls(
            allow=None if allow is None else _peers("allow", allow),
            block=_peers("block", block),
            pins=_pins(pins, n_blocks),
            mixed_numerics=mixed_numerics,
            local_blocks=local_blocks,
        )
        choices._check()
        return choices

    def changed(
        self, n_blocks: int, *, allow: object = None, block: object = None, pins: object = None, mixed: object = None
    ) -> Choices:
        """The same but for what is not ``None``.

        Raises: as :meth:`read`.
        """
        given = {"allow": allow, "block": block, "pins": pins, "mixed_numerics": mixed}
        named = {name: value for name, value in given.items() if value is not None}
        read = Choices.read(n_blocks, **named)
        choices = replace(self, **{name: getattr(read, name) for name in named})
        choices._check()
        return choices

    def _check(self) -> None:
        if self.allow is not None and not self.allow:
            raise InvalidInput("allow names nobody: name at least one peer, or leave it out for all")
        if self.allow is not None and not self.allow - self.block:
            raise InvalidInput("all peers that are allowed are blocked, too: take one of them from the list of these")
        try:
            self.to_wishes()
        except ValueError as error:
            raise InvalidInput(f"{error}: give each block to one peer at most") from error
        for pin in self.pins:
            if not self.to_wishes().permits_peer(pin.peer_id):
                raise InvalidInput(
                    f"blocks {pin.start}:{pin.end} are pinned to {pin.peer_id}, which is not to be used: allow it, or "
                    f"pin them to somebody else"
                )

    def to_wishes(self) -> Wishes:
        """The part that concerns who is chosen."""
        return Wishes(allowed=self.allow, blocked=self.block, pinned=self.pins)


NO_CHOICES: Final = Choices()


def _peers(name: str, given: object) -> frozenset[PeerId]:
    if isinstance(given, str | bytes | Mapping | PeerId) or not isinstance(given, Iterable):
        raise TypeError(f"{name} is a list of PeerIds, not {type(given).__name__}")
    found: set[PeerId] = set()
    for each in given:
        found.add(read_peer(each))
        if len(found) > MAX_PEERS:
            raise InvalidInput(f"{name} names more than {MAX_PEERS} peers: leave some out")
    return frozenset(found)


def _pins(given: object, n_blocks: int) -> tuple[Pin, ...]:
    if given is None:
        return ()
    if not isinstance(given, Mapping):
        raise TypeError(f"pins is a mapping of (start, end) to a PeerId, not {type(given).__name__}")
    return tuple(_pin(span, peer, n_blocks) for span, peer in given.items())


def _pin(span: Any, peer: object, n_blocks: int) -> Pin:
    is_pair = isinstance(span, tuple) and len(span) == 2
    if not is_pair or any(isinstance(each, bool) or not isinstance(each, int) for each in span):
        raise TypeError(f"what is pinned is a pair of block numbers (start, end), not {span!r:.60}")
    start, end = span
    if not 0 <= start < end <= n_blocks:
        raise InvalidInput(f"blocks {start}:{end} cannot be pinned: the model has blocks 0:{n_blocks}")
    return Pin(start=start, end=end, peer_id=read_peer(peer))


def read_peer(given: object) -> PeerId:
    """A PeerId, or its text.

    Raises:
        TypeError: neither.
        InvalidInput: a text that is no PeerId.
    """
    if isinstance(given, PeerId):
        return given
    if not isinstance(given, str):
        raise TypeError(f"a PeerId is a str, not {type(given).__name__}")
    text = given.strip()
    try:
        if not 0 < len(text) <= MAX_PEER_CHARACTERS or "/" in text:
            raise ValueError("of another length")
        addresses.parse(f"/p2p/{text}")
        return PeerId.from_base58(text)
    except (errors.NetError, ValueError) as error:
        raise InvalidInput(f"{given!r:.80} is no PeerId: give what raceme status shows, such as 12D3Koo...") from error
