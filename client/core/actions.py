"""What the core of a session sees of the world, and what it wants done. No I/O, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from client.routing import Hop
from net.identity import PeerId
from net.protocol.announcement import NodeAnnouncement, Numerics


class JournalView(Protocol):
    """What the core sees of a journal."""

    @property
    def end(self) -> int:
        """Tokens in it."""

    @property
    def version(self) -> int:
        """How many times rows have changed places."""

    @property
    def reordered_at(self) -> int:
        """Tokens that there were when rows last changed places."""

    def next_end(self, position: int) -> int:
        """Where a step from ``position`` on ends."""


# What is to be done


@dataclass(frozen=True, kw_only=True)
class FindNodes:
    """Look who serves the model; then :meth:`SessionCore.nodes_found` or ``nodes_missing``.

    Attributes:
        fresh: Whether what was found a moment ago will not do.
    """

    fresh: bool


@dataclass(frozen=True, kw_only=True)
class Open:
    """Open the session on a node; then ``opened`` or ``failed``."""

    leg: int
    hop: Hop


@dataclass(frozen=True, kw_only=True)
class Link:
    """Have a node reach the next one; then ``linked`` or ``not_linked``."""

    leg: int
    following: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Have a run begin at a node; then ``answered`` or ``refused``.

    Attributes:
        leg: Which node's.
        run: Its number.
        position, end: Which tokens.
        push: How many legs it is handed on to.
        keep: Of how many tokens, at the end, results are wanted here.
        with_order: Together with the order that rows have changed to.
    """

    leg: int
    run: int
    position: int
    end: int
    push: int
    keep: int
    with_order: bool = False


@dataclass(frozen=True, kw_only=True)
class Send(Piece):
    """Send a step.

    Attributes:
        payload: What is sent; ``None`` for the tokens as they are in the journal.
    """

    payload: Any = None


@dataclass(frozen=True, kw_only=True)
class Resend(Piece):
    """Have a node hand on what it gave before."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Ask a node where a run is; then ``placed``."""

    leg: int
    run: int


@dataclass(frozen=True, kw_only=True)
class Close:
    """Let a leg go."""

    leg: int


Action = FindNodes | Open | Link | Send | Resend | Ask | Close


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Blocks ``[start, end)`` that hops are wanted for.

    Attributes:
        nodes: Who there is.
        avoid: Who must not be chosen, and why.
        numerics: The class of all hops; any one if that is ``None``.
        before, after: Who computes what is next to them.
    """

    nodes: Sequence[NodeAnnouncement]
    start: int
    end: int
    avoid: Mapping[PeerId, str]
    numerics: Numerics | None = None
    before: NodeAnnouncement | None = None
    after: NodeAnnouncement | None = None


Choose = Callable[[Gap], list[Hop]]
"""How hops are chosen; it raises MissingBlocks if there are none."""


class Better(Protocol):
    """How a chain is found that is worth moving to."""

    def __call__(
        self, nodes: Sequence[NodeAnnouncement], old: Sequence[Hop], *, avoid: Mapping[PeerId, str]
    ) -> list[Hop] | None:
        """Hops over the same blocks as ``old``, in the same numerics, that are clearly better; ``None`` if there are
        none.
        """
