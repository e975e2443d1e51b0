"""In which forms the hidden states of a session travel, and what that takes. No I/O.

By default each node gets and gives them in its activation type (``compute.wire_forms``), in which nothing is lost,
whichever nodes there are. A form in which something is lost is asked for; it is used where the chain was cut into hops
when the session's first tokens were sent, and there alone. So nodes are only replaced within these cuts, and what is
handed on where a new one has been made within them loses nothing: tokens do not depend on who fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from client.errors import InvalidInput
from client.routing import Hop
from client.session_core import Choose, Gap
from compute.wire_forms import Form, default_form
from net.protocol.announcement import NodeAnnouncement
from net.protocol.session import Sent

CHOICES: Final[Mapping[str, Form | None]] = {"auto": None, "bf16": Form.BFLOAT16, "int8": Form.INT8}


@dataclass(frozen=True, kw_only=True)
class HopTraffic:
    """What has been sent to and by one node of a session.

    Attributes:
        hop: Which.
        to: What it was sent, by the client or the node before it; ``None`` if nobody has said.
        back: What it has sent, to the node behind it or the client; ``None`` if it has not said.
    """

    hop: Hop
    to: Sent | None
    back: Sent | None

    def __str__(self) -> str:
        """For people."""
        ways = ", ".join(f"{way} {sent or 'unknown'}" for way, sent in (("in:", self.to), ("out:", self.back)))
        return f"blocks {self.hop.start}:{self.hop.end} at {self.hop.node.peer_id}: {ways}"


def read_choice(wire: str) -> Form | None:
    """The form that is asked for; ``None`` for each node's own.

    Raises:
        InvalidInput: there is no such choice.
    """
    if not isinstance(wire, str) or wire not in CHOICES:
        raise InvalidInput(f"wire is {wire!r:.40}: give one of {', '.join(CHOICES)}")
    return CHOICES[wire]


class SessionForms:
    """See the module."""

    def __init__(self, wire: str = "auto") -> None:
        """Begin without cuts.

        Args:
            wire: "auto", "bf16" or "int8".

        Raises:
            InvalidInput: something else.
        """
        self.asked = read_choice(wire)
        self._cuts: frozenset[int] | None = None  # once something has been sent

    def settle(self, hops: Iterable[Hop]) -> None:
        """The first tokens are about to be sent to this chain; later calls change nothing."""
        if self._cuts is None:
            self._cuts = frozenset(block for hop in hops for block in (hop.start, hop.end))

    def into(self, hop: Hop) -> Form:
        """In which form a hop is sent hidden states."""
        return self._at(hop.start, hop.node)

    def out_of(self, hop: Hop) -> Form:
        """In which form it sends them on."""
        return self._at(hop.end, hop.node)

    def _at(self, block: int, node: NodeAnnouncement) -> Form:
        if self.asked is not None and (self._cuts is None or block in self._cuts):
            return self.asked
        return default_form(node.numerics.dtype)

    def allow(self, hops: Iterable[Hop]) -> bool:
        """Whether values are the same with these hops: whether they are cut where the first ones were."""
        if self.asked is None or self._cuts is None:
            return True
        return self._cuts <= {block for hop in hops for block in (hop.start, hop.end)}

    def within_cuts(self, choose: Choose) -> Choose:
        """Choose so that no hop reaches over a cut."""

        def chosen(gap: Gap) -> list[Hop]:
            known = () if self.asked is None else self._cuts or ()
            cuts = sorted(cut for cut in known if gap.start < cut < gap.end)
            hops: list[Hop] = []
            for first, last in zip([gap.start, *cuts], [*cuts, gap.end], strict=True):
                part = replace(
                    gap,
                    start=first,
                    end=last,
                    numerics=hops[0].node.numerics if hops else gap.numerics,
                    before=hops[-1].node if hops else gap.before,
                    after=gap.after if last == gap.end else None,
                )
                hops += choose(part)
            return hops

        return chosen
