"""What the core of a session knows: its legs, what is on its way to them, what they have given."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from client.core.actions import Action, Better, Choose, Close, FindNodes, JournalView, Open
from client.routing import Hop
from net.identity import PeerId
from net.protocol.announcement import NodeAnnouncement, Numerics

MIN_PATIENCE_S: Final = 2.0  # with a step, before nodes are asked where it is; or so many times what is usual:
RELINK_S: Final = 20.0  # before nodes that could not reach each other try again
LATE_S: Final = 0.8  # without the session having been opened on a node, before another one is asked beside it
SPARE_PATIENCE_S: Final = 0.8  # with such another one where there are more, so many times as long with each further one
NEVER: Final = float("inf")


@dataclass(kw_only=True, eq=False)
class LegState:
    """A node of the chain, as the core sees it.

    Attributes:
        key: Its number; never used again.
        hop: Which node, which blocks.
        since: When it was chosen.
        is_open: Whether the session is open there.
        tokens: That it surely has.
        sent: That it has or that are on their way.
        version: The order of rows that its tokens have.
        keeps: Whether it may still have what its steps gave.
        linked_to: The leg that it hands on to.
        link_asked: The one that its node has been asked to reach.
        unlinked_from: The one that it cannot hand on to, until ``relink_at``.
        leaving: Whether it has said that it will not serve for much longer.
        lost: Whether it is being looked for.
        silent: Whether it has not shown for a while that it is there, though it was asked to.
        has_no_spare: Whether nothing can be prepared for when it has gone.
    """

    key: int
    hop: Hop
    since: float
    is_open: bool = False
    tokens: int = 0
    sent: int = 0
    version: int = 0
    keeps: bool = True
    linked_to: int | None = None
    link_asked: int | None = None
    link_asked_at: float = 0.0
    unlinked_from: int | None = None
    relink_at: float = 0.0
    leaving: bool = False
    lost: bool = False
    silent: bool = False
    has_no_spare: bool = False
    put_off: int = 0
    hold_until: float = 0.0
    resets: int = 0

    @property
    def peer_id(self) -> PeerId:
        return self.hop.node.peer_id

    def is_missed(self, now: float) -> bool:
        """Whether it may be gone: another one is prepared, and whoever is there first goes on."""
        return self.lost or self.silent or (not self.is_open and now >= self.since + LATE_S)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a node is avoided, since when, when it may be tried again if nobody else can be, and how long that was put
    off.
    """

    reason: str
    at: float
    again_at: float
    delay_s: float


@dataclass(frozen=True, kw_only=True)
class Success:
    """A node did what it was asked to.

    Attributes:
        leg: Which.
        seconds: From asking to the answer, way included, where that says how fast this node is: for a step of one token
            that went through it alone, while nothing else of the session was under way. Else ``None``.
    """

    leg: int
    peer_id: PeerId
    blocks: int
    seconds: float | None


@dataclass(kw_only=True, eq=False)
class Run:
    """A piece on its way.

    Attributes:
        legs: Those that compute it, in order; none if it is only fetched from ``source``.
        source: Who has its hidden states already and hands them on; ``None`` for the client.
        keep: How many tokens' results, at its end, are wanted here.
        is_alone: Whether nothing else was under way when it was sent.
    """

    number: int
    position: int
    end: int
    legs: list[LegState]
    source: LegState | None
    keep: int
    asked_at: float
    is_alone: bool

    @property
    def asked(self) -> LegState:
        """Who got the question."""
        return self.source or self.legs[0]

    @property
    def last(self) -> LegState:
        """Who answers it."""
        return self.legs[-1] if self.legs else self.asked

    @property
    def is_lone_step(self) -> bool:
        """Whether it is one token through one node, from the client and back."""
        return self.end - self.position == 1 and self.source is None and len(self.legs) == 1

    @property
    def through(self) -> list[LegState]:
        """All that have to do with it."""
        return self.legs if self.source is None else [self.source, *self.legs]


@dataclass(kw_only=True)
class Probe:
    """Where nodes say that a run is."""

    run: Run
    until: float
    states: dict[int, str] = field(default_factory=dict)


class State:
    """What a core knows. Times are seconds on any clock that does not go back.

    Attributes:
        legs: The chain, by blocks; there may be gaps in it.
        error: Why the request that was made last cannot be done; until the next one.
        outputs: Results of the model for tokens ``[position, end)`` that were asked for.
        numerics: The class that the session keeps to.
        reports: What a user should hear about, in order; taken by the driver.
        failures: Who has failed, and how; successes: who has done well again since. Taken by the driver.
    """

    def __init__(
        self,
        journal: JournalView,
        choose: Choose,
        *,
        push: bool = True,
        better: Better | None = None,
        better_every_s: Callable[[], float] = lambda: NEVER,
        own_blocks: int = 0,
    ) -> None:
        """Begin without a chain.

        Args:
            journal: What is to be computed; it changes only between events.
            choose: Gives hops over some blocks.
            push: Whether nodes hand on to each other.
            better: Gives hops to move to while the session is at work; ``None`` to stay with those that do.
            better_every_s: For how long not to look for such hops; asked anew each time.
            own_blocks: How many of the first blocks, and of the last ones, nobody needs to serve.
        """
        self.legs: list[LegState] = []
        self.error: Exception | None = None
        self.outputs: dict[int, tuple[int, Any]] = {}
        self.numerics: Numerics | None = None
        self.reports: list[str] = []
        self.failures: list[tuple[PeerId, str]] = []
        self.successes: list[Success] = []
        self.failed_peers: dict[PeerId, Failure] = {}  # until they do a step
        self.direct = False  # whether every leg answers here, and nothing is handed on
        self.mixed = False  # whether another class of numerics may be taken where none of the same is left
        self._journal = journal
        self._own_blocks = own_blocks
        self._last_block = 0  # after the last one that is served; 0 until nodes have been found
        self._choose = choose
        self._push = push
        self._spares: list[LegState] = []
        self._spares_for: list[LegState] = []  # neighbours, in order
        self._spare_patience_s = SPARE_PATIENCE_S
        self._for_gain = False  # whether the spares are better, and nothing is the matter with those that they replace
        self._better = better
        self._better_every_s = better_every_s
        self._better_at: float | None = None  # when to look next
        self._gains = 0  # moves to better hops
        self._found_at = -NEVER
        self._actions: list[Action] = []
        self._runs: dict[int, Run] = {}
        self._passing: dict[tuple[int, int], tuple[int, Any]] = {}  # by block and position: end and hidden states
        self._next_key = 1
        self._next_run = 1
        self._wanted_from: int | None = None
        self._wants_chain = False
        self._nodes: list[NodeAnnouncement] | None = None  # as just found
        self._known: list[NodeAnnouncement] = []  # as found the last time
        self._looking = False
        self._wants_fresh = False
        self._look_at = 0.0
        self._gives_up_at: float | None = None
        self._told = False
        self._moved_at = 0.0  # when something last came of a run
        self._probe: Probe | None = None
        self._unlinked: set[tuple[PeerId, PeerId]] = set()  # who must not hand on to whom
        self._took: deque[float] = deque(maxlen=200)  # seconds of steps that were decoded
        self._patience_s = MIN_PATIENCE_S

    @property
    def _computed(self) -> int:
        """Of how many tokens the results have been there: those to come have to be like them."""
        return self._journal.end if self._wanted_from is None else self._wanted_from

    def _find(self, key: int) -> LegState | None:
        return next((leg for leg in (*self.legs, *self._spares) if leg.key == key), None)

    def _add(self, hop: Hop, legs: list[LegState], now: float) -> None:
        leg = LegState(key=self._next_key, hop=hop, version=self._journal.version, since=now)
        self._next_key += 1
        legs.append(leg)
        self._actions.append(Open(leg=leg.key, hop=hop))

    def _look(self, now: float) -> None:
        if not self._looking and now >= self._look_at:
            self._looking = True
            self._actions.append(FindNodes(fresh=self._wants_fresh))

    def _missing_from(self, position: int) -> int:
        for start in sorted(self.outputs):
            end, _ = self.outputs[start]
            if start <= position < end:
                position = end
        return position

    def _in_flight(self, leg: LegState) -> list[Run]:
        return [run for run in self._runs.values() if leg in run.legs]

    def _new_run(
        self, position: int, end: int, legs: list[LegState], source: LegState | None, now: float, *, keep: int
    ) -> int:
        number = self._next_run
        self._next_run += 1
        if not self._runs:
            self._moved_at = now
        self._runs[number] = Run(
            number=number,
            position=position,
            end=end,
            legs=legs,
            source=source,
            keep=keep,
            asked_at=now,
            is_alone=not self._runs,
        )
        return number

    def _give_up_runs(self) -> None:
        self._runs.clear()
        self._probe = None
        for leg in (*self.legs, *self._spares):
            leg.sent = leg.tokens

    def _take_spares(self) -> None:
        old = self._spares_for
        index = self.legs.index(old[0])
        self.legs[index : index + len(old)] = self._spares
        self._spares, self._spares_for = [], []
        self._actions.extend(Close(leg=leg.key) for leg in old)
        keys = {leg.key for leg in old}
        for each in self.legs:
            if each.linked_to in keys:
                each.linked_to = None

    def _drop_spares(self) -> None:
        self._actions.extend(Close(leg=spare.key) for spare in self._spares)
        for number, run in list(self._runs.items()):
            if any(leg in self._spares for leg in run.legs):  # nobody else has a part in it
                del self._runs[number]
        if self._probe is not None and self._probe.run.number not in self._runs:
            self._probe = None
        self._spares, self._spares_for = [], []

    def _unlink(self, leg: LegState, now: float) -> None:
        leg.linked_to = leg.link_asked = None
        behind = self.legs[self.legs.index(leg) + 1 :] if leg in self.legs else []
        leg.unlinked_from, leg.relink_at = (behind[0].key if behind else None), now + RELINK_S


def place(hop: Hop) -> tuple[PeerId, int, int]:
    return hop.node.peer_id, hop.start, hop.end
