"""The decisions of a session: what is sent to whom, and what follows when somebody fails. No I/O, no tensors.

A session is a journal of tokens and a chain of legs, one for each node. The core knows how far each leg has come
(``tokens``: what it surely has; ``sent``: what is on its way to it), and makes those that lag behind catch up: a new
session, a step, a fail-over and a planned move are all the same to it. What a leg lacks comes from the journal (the
first leg), from the client's hands (a result that was answered here), from the leg before it, which keeps what it gave
(``resend``), or from there anew (``step`` again). Results are handed on from node to node where these are linked, and
by the client where they are not.

A *run* is one piece of the journal on its way through consecutive legs. Runs are numbered, numbers rise, and a node
drops what comes late: so a run that is given up can do no harm. Whenever somebody fails, all runs are given up, and
what they would have done is decided anew.

Drive it with events, and carry out what :meth:`SessionCore.advance` returns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Protocol

from client.errors import ClientError, MissingBlocks, SessionFailed, UnknownModel
from client.routing import Hop
from net.errors import NetError
from net.identity import PeerId
from net.protocol.announcement import NodeAnnouncement, Numerics
from net.protocol.session import MAX_AHEAD

MAX_RUNS: Final = MAX_AHEAD - 2
MIN_PATIENCE_S: Final = 2.0  # with a step, before nodes are asked where it is; or so many times what is usual:
PATIENCE_FACTOR: Final = 4.0
PROBE_S: Final = 1.5  # for an answer to that
LONGEST_STEP_S: Final = 60.0
WAIT_S: Final = 20.0  # of one request, for nodes that fail, while no others could take their place
OPENING_WAIT_S: Final = 4.0  # the same, while nothing has been computed that could be lost
AGAIN_S: Final = 0.5  # before the second try with a node that failed; twice as long before each further one, up to
MAX_AGAIN_S: Final = 4.0
LOOK_S: Final = 0.5  # before the next look at who is there
BULK_TOKENS: Final = 128  # pieces of so many wait for links, not to go back and forth through the client's own line
LINK_WAIT_S: Final = 1.5
RELINK_S: Final = 20.0  # before nodes that could not reach each other try again
MAX_PUT_OFF: Final = 5  # times in a row
MAX_RETRY_AFTER_S: Final = 10.0
LATE_S: Final = 0.8  # without the session having been opened on a node, before another one is asked beside it
SPARE_PATIENCE_S: Final = 0.8  # with such another one where there are more, so many times as long with each further one
MORE_PATIENCE: Final = 1.5
OPEN_PATIENCE_S: Final = 2.5  # with a node that does not open the session, where others could take its place
CURRENT_S: Final = 5.0  # for which what was found may be compared with the chain in use
MAX_SETTLED: Final = 10  # times as seldom as at first is looked for better chains, once that many moves have been made
FEEDING: Final = 4  # pieces at a time that a new leg is given while the old one is missed; else one after another
RESTED_S: Final = 1.0  # after which a node that failed is tried again before others are looked for
SPARE_LAG: Final = 32  # tokens that a new leg may lack when it takes the old one's place
_PRAISE_EVERY: Final = 8  # runs: whose nodes have done well
_NEVER: Final = float("inf")
_FROM_BEFORE: Final = frozenset({"bad-shape", "bad-dtype", "not-finite", "bad-input", "bad-value", "too-long"})


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
class _Run:
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
class _Probe:
    """Where nodes say that a run is."""

    run: _Run
    until: float
    states: dict[int, str] = field(default_factory=dict)


class SessionCore:
    """See the module. Times are seconds on any clock that does not go back.

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
        better_every_s: Callable[[], float] = lambda: _NEVER,
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
        self._found_at = -_NEVER
        self._actions: list[Action] = []
        self._runs: dict[int, _Run] = {}
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
        self._probe: _Probe | None = None
        self._unlinked: set[tuple[PeerId, PeerId]] = set()  # who must not hand on to whom
        self._took: deque[float] = deque(maxlen=200)  # seconds of steps that were decoded
        self._patience_s = MIN_PATIENCE_S

    # What is asked for

    def want_chain(self) -> None:
        """Have a chain; :attr:`ready` says when it is there."""
        self._begin()
        self._wants_chain = True

    def want(self, position: int) -> None:
        """Have the results of the journal's tokens from ``position`` on; :meth:`has` says when they are there.

        Where results are wanted already, these are wanted, too.
        """
        if self._wanted_from is None:
            self._begin()
            self._wanted_from = position
            self.outputs.clear()

    def took(self, position: int) -> None:
        """The results before ``position`` are not needed any more."""
        for start, (end, _) in list(self.outputs.items()):
            if end <= position:
                del self.outputs[start]
        if self._wanted_from is not None:
            self._wanted_from = max(self._wanted_from, position)
            if position >= self._journal.end:
                self._wanted_from = None

    def has(self, position: int, end: int) -> bool:
        """Whether the results of tokens ``[position, end)`` are in :attr:`outputs`."""
        return self._missing_from(position) >= end

    def stop(self) -> None:
        """What was asked for is not wanted any more; the chain stays."""
        self._wanted_from, self._wants_chain = None, False
        self._give_up_runs()

    def cut(self, position: int) -> None:
        """The journal goes only up to ``position`` now."""
        if self._runs:
            self._give_up_runs()
        for leg in (*self.legs, *self._spares):
            leg.tokens, leg.sent = min(leg.tokens, position), min(leg.sent, position)
        self._passing.clear()
        for start, (end, payload) in list(self.outputs.items()):
            if start >= position:
                del self.outputs[start]
            else:
                self.outputs[start] = min(end, position), payload
        if self._wanted_from is not None:
            self._wanted_from = min(self._wanted_from, position)

    def reordered(self) -> None:
        """Rows of the journal have changed places."""
        self._give_up_runs()
        self._passing.clear()

    def close(self) -> list[Action]:
        """Let everything go."""
        self._actions.extend(Close(leg=leg.key) for leg in (*self.legs, *self._spares))
        self.legs, self._spares, self._spares_for = [], [], []
        self.stop()
        return self._take_actions()

    @property
    def ready(self) -> bool:
        """Whether there is a whole chain. What is sent to a leg that is not open yet goes right behind the question."""
        return bool(self.legs) and not self._gaps()

    @property
    def done(self) -> bool:
        """Whether all results that were asked for are there."""
        return self._wanted_from is not None and self._missing_from(self._wanted_from) >= self._journal.end

    @property
    def busy(self) -> bool:
        """Whether something is on its way."""
        return bool(self._runs)

    def _begin(self) -> None:
        self.error = None
        self._gives_up_at, self._told = None, False
        self._look_at = 0.0

    # What happens

    def nodes_found(self, nodes: Sequence[NodeAnnouncement], now: float) -> None:
        """Who serves the model."""
        self._looking = False
        self._nodes = self._known = list(nodes)
        self._found_at = now
        self._last_block = nodes[0].blocks - self._own_blocks

    def nodes_missing(self, error: ClientError | NetError, now: float) -> None:
        """Nobody does, or nobody can be asked."""
        self._looking = False
        if self.ready:  # there is a chain, and what was looked for would have been a better one
            self._look_at = now + LOOK_S
            return
        self._no_chain(error, now)

    def opening(self, key: int, now: float) -> None:
        """A leg's session is not open yet, but its node is at it."""
        leg = self._find(key)
        if leg is not None:
            leg.since = now

    def opened(self, key: int, now: float) -> None:
        """A leg's session is open."""
        leg = self._find(key)
        if leg is not None:
            leg.is_open = True
            self._moved_at = now
            for run in self._runs.values():
                if leg in run.through:
                    run.asked_at = now

    def failed(self, key: int, reason: str, now: float, *, blame: bool = True) -> None:
        """A leg is lost, for good.

        Args:
            key: Which.
            reason: How.
            now: When.
            blame: Whether its node is avoided; else others are only preferred once.
        """
        leg = self._find(key)
        if leg is None:
            return
        peer = leg.peer_id
        before = self.failed_peers.pop(peer, None)
        delay_s = 0.0 if before is None else min(max(AGAIN_S, 2 * before.delay_s), MAX_AGAIN_S)
        self.failed_peers[peer] = Failure(reason=reason, at=now, again_at=now + delay_s, delay_s=delay_s)
        if blame:
            self.failures.append((peer, reason))
        if leg.is_open and blame:
            self.reports.append(f"replacing a node: peer {peer}: {reason}")
        self._drop(leg, now)

    def forbidden(self, key: int, error: ClientError) -> None:
        """A node does not open the session, and whoever asked for it is to blame."""
        leg = self._find(key)
        if leg is not None:
            self._drop(leg, 0.0)
            self.error = error
            self.stop()

    def expected(self, number: int, *, unpushed: bool) -> int | None:
        """Of how many tokens the results should come with an answer; ``None`` if the run has been given up."""
        run = self._runs.get(number)
        if run is None:
            return None
        return run.end - run.position if unpushed else run.keep

    def lost(self, key: int) -> None:
        """A leg's connection broke; its node is being looked for. ``interrupted`` or ``failed`` follows."""
        leg = self._find(key)
        if leg is not None:
            leg.lost = True
            self._look_at = 0.0

    def silent(self, key: int) -> None:
        """A leg's node has been asked to show that it is there, and has not yet. ``heard`` or ``lost`` follows."""
        leg = self._find(key)
        if leg is not None:
            leg.silent = True
            self._look_at = 0.0

    def heard(self, key: int, now: float) -> None:
        """It is there."""
        leg = self._find(key)
        if leg is not None and leg.silent:
            leg.silent = leg.has_no_spare = False
            self._keep(leg, now)

    def _keep(self, leg: LegState, now: float) -> None:
        """Do without another one in a leg's place, for it is there again."""
        if leg in self._spares_for and not self._for_gain and not leg.leaving:
            self._drop_spares()
            self._look_at = now + LOOK_S

    def interrupted(self, key: int, now: float) -> None:
        """A leg goes on over another stream; answers that were on their way are lost."""
        leg = self._find(key)
        if leg is None:
            return
        leg.lost = leg.silent = leg.has_no_spare = False
        # Whatever broke the way between it and us may have broken those between it and its neighbours, and they would
        # notice only when they do not hear of each other.
        leg.linked_to, leg.link_asked, leg.relink_at = None, None, now
        for each in self.legs:
            if each.linked_to == key:
                each.linked_to, each.relink_at = None, now
        self._keep(leg, now)
        if any(leg in run.through for run in self._runs.values()):
            self._give_up_runs()

    def leaving(self, key: int, now: float) -> None:
        """A leg's node will not serve for much longer."""
        leg = self._find(key)
        if leg is not None and not leg.leaving:
            leg.leaving = True
            self._look_at = 0.0

    def linked(self, key: int, following: int, now: float) -> None:
        """A leg's node can hand on to that of another leg."""
        leg, other = self._find(key), self._find(following)
        if leg is not None and leg.link_asked == following:
            leg.link_asked = None
            if other is not None and (leg.peer_id, other.peer_id) not in self._unlinked:
                leg.linked_to = following

    def not_linked(self, key: int, following: int, now: float) -> None:
        """It cannot."""
        leg = self._find(key)
        if leg is not None and following in (leg.link_asked, leg.linked_to):
            self._unlink(leg, now)

    def answered(self, key: int, number: int, payload: Any, now: float, *, unpushed: bool = False) -> None:
        """A leg has answered a run, with its result or without.

        Args:
            key: Which leg.
            number: Which run.
            payload: The result that came with it; ``None`` if none did.
            now: When.
            unpushed: Whether the result should have been handed on, and could not be.
        """
        run, leg = self._runs.get(number), self._find(key)
        if run is None or leg is None or leg not in run.through:
            return  # given up
        covered = run.legs[: run.legs.index(leg) + 1] if leg in run.legs else []
        is_last = leg is run.last
        if (not is_last and not unpushed) or (payload is None and (unpushed or run.keep)):
            self.failed(key, "answered a step without its result", now)
            return
        del self._runs[number]
        self._moved_at = now
        self._spare_patience_s = SPARE_PATIENCE_S
        for each in covered:
            each.tokens = max(each.tokens, run.end)
            each.put_off = each.resets = 0
            if self.failed_peers.pop(each.peer_id, None) is not None or run.number % _PRAISE_EVERY == 0:
                seconds = now - run.asked_at if run.is_alone and run.is_lone_step else None
                blocks = each.hop.end - each.hop.start
                self.successes.append(Success(leg=each.key, peer_id=each.peer_id, blocks=blocks, seconds=seconds))
        if is_last and run.source is None and run.end - run.position == 1 and leg is self.legs[-1]:
            self._note_seconds(now - run.asked_at)
        if not is_last:  # those behind it lack this piece, and all that comes after
            self._unlink(leg, now)
            self._give_up_runs()
        if payload is not None:
            self._place_result(run, leg, payload, run.position if unpushed else run.end - run.keep)
        if self._probe is not None and self._probe.run is run:
            self._probe = None

    def refused(
        self, key: int, number: int, code: str, why: str, now: float, *, retry_after_s: float | None = None
    ) -> None:
        """A leg has refused a run."""
        run, leg = self._runs.get(number), self._find(key)
        if leg is None:
            return
        if code == "no-session":
            self.failed(key, why, now, blame=False)
            return
        if run is None or leg not in run.through:
            return  # given up
        pushed = leg is not run.asked
        self._give_up_runs()
        if code == "no-history":
            leg.keeps = False
        elif retry_after_s is not None:
            leg.put_off += 1
            if leg.put_off > MAX_PUT_OFF:
                self.failed(key, f"put off {leg.put_off} times in a row: {why}", now)
            leg.hold_until = now + min(retry_after_s, MAX_RETRY_AFTER_S)
        elif code == "bad-position" and leg.resets < 2:
            leg.resets += 1
            leg.tokens = leg.sent = 0
        elif pushed and code in _FROM_BEFORE:
            # One of the two lies or is broken. The next time we hold in our hands what goes from one to the other.
            before = run.through[run.through.index(leg) - 1]
            self._unlinked.add((before.peer_id, leg.peer_id))
            self._unlink(before, now)
            self.failed(key, f"{code}: {why}", now, blame=False)
        else:
            self.failed(key, f"{code}: {why}", now)

    def placed(self, key: int, number: int, state: str, now: float) -> None:
        """A leg's node says where a run is: ``unseen``, ``waiting``, ``running``, ``done``."""
        probe = self._probe
        if probe is not None and probe.run.number == number:
            probe.states[key] = state

    # What follows

    def advance(self, now: float) -> list[Action]:
        """What is to be done now. Call it after every event, and at :meth:`wakes_at`."""
        if self.error is None and (self._wants_chain or self._wanted_from is not None):
            self._look_after(now)
            self._hurry(now)
            if self._gaps() or not self.legs:
                self._fill_gaps(now)
        if self.ready:
            self._wants_chain = False
            self._move(now)
            self._improve(now)
        if self.ready:
            self._link(now)
            if self._wanted_from is not None and self.error is None:
                self._flow(now)
        return self._take_actions()

    def wakes_at(self, now: float) -> float:
        """When :meth:`advance` has something to do even if nothing happens; infinity for never."""
        times = [leg.hold_until for leg in self.legs if leg.hold_until > now]
        links = (leg.link_asked_at + LINK_WAIT_S for leg in self.legs if leg.link_asked is not None)
        times.extend(time for time in links if time > now)
        if not self._looking and self._look_at > now:
            times.append(self._look_at)
        times.extend(time for time in self._opening_deadlines() if time > now)
        if self._probe is not None:
            times.append(self._probe.until)
        elif self._runs and not self._waits_for_legs():
            times.append(self._moved_at + self._patience_s)
        return max(now, min(times)) if times else _NEVER

    def _opening_deadlines(self) -> list[float]:
        """When something follows from nodes' not having opened the session."""
        legs = [leg.since for leg in self.legs if not leg.is_open]
        spares = [spare.since + self._spare_patience_s for spare in self._spares if not spare.is_open]
        return [since + patience for since in legs for patience in (LATE_S, OPEN_PATIENCE_S)] + spares

    # The chain

    def _gaps(self) -> list[tuple[int, int]]:
        gaps: list[tuple[int, int]] = []
        block = self._own_blocks
        for leg in self.legs:
            if leg.hop.start > block:
                gaps.append((block, leg.hop.start))
            block = leg.hop.end
        return [*gaps, (block, self._last_block)] if block < self._last_block else gaps

    def _fill_gaps(self, now: float) -> None:
        if self._nodes is None:
            self._look(now)
            return
        nodes, self._nodes = self._nodes, None
        avoid = self._going(now)
        kept: list[LegState] = []
        if not self._computed and not any(leg.is_open for leg in self.legs):
            kept, self.legs = self.legs, []  # nothing is lost if another class of numerics is better now
        try:
            chosen = [hop for start, end in self._gaps() for hop in self._choose_hops(nodes, start, end, avoid, now)]
        except (MissingBlocks, SessionFailed) as error:
            self.legs += kept
            self._no_chain(error, now)
            return
        self._wants_fresh = False
        if not self.legs:
            self.numerics = chosen[0].node.numerics
            if len(kinds := dict.fromkeys(str(hop.node.numerics) for hop in chosen)) > 1:
                self.reports.append(f"blocks are computed with different numerics: {', '.join(kinds)}")
        chosen_already = {_place(leg.hop): leg for leg in kept}
        for hop in chosen:
            if (leg := chosen_already.pop(_place(hop), None)) is not None:
                self.legs.append(leg)
            else:
                self._add(hop, self.legs, now)
        self._actions.extend(Close(leg=leg.key) for leg in chosen_already.values())
        if any(leg not in self.legs for leg in self._spares_for):
            self._drop_spares()
        self.legs.sort(key=lambda leg: leg.hop.start)

    def _going(self, now: float) -> dict[PeerId, str]:
        """Nodes of the chain that may be gone soon, or already."""
        going = {leg.peer_id: "is about to leave" for leg in self.legs if leg.leaving}
        return going | {leg.peer_id: "has not been heard of lately" for leg in self.legs if leg.is_missed(now)}

    def _failed(self, now: float, *, rested_s: float = _NEVER) -> dict[PeerId, str]:
        """Nodes that have failed so lately, or may not be tried again yet; all that have by default."""
        return {
            peer: each.reason
            for peer, each in self.failed_peers.items()
            if each.again_at > now or now - each.at < rested_s
        }

    def _choose_hops(
        self, nodes: list[NodeAnnouncement], start: int, end: int, avoid: Mapping[PeerId, str], now: float
    ) -> list[Hop]:
        """Hops over these blocks without the nodes that failed. While there are none, those are tried again, less and
        less often: they may have ended the session because it was idle, or come back.
        """
        out_of_patience = self._out_of_patience(now)
        try:
            hops = self._choose_class(nodes, start, end, {**avoid, **self._failed(now)})
        except MissingBlocks:
            if out_of_patience:
                raise
            if not self._wants_fresh:  # else perhaps somebody else has come since
                return self._choose_class(nodes, start, end, {**avoid, **self._failed(now, rested_s=RESTED_S)})
            return self._choose_class(nodes, start, end, self._failed(now, rested_s=0.0))
        if out_of_patience:
            last = next(reversed(self.failed_peers.values())).reason
            raise SessionFailed(
                f"nodes failed one after another for {self._patience_with_nodes_s:g} s, the last one for: {last}; the "
                f"swarm may be overloaded: try again later"
            )
        return hops

    def _choose_class(
        self, nodes: list[NodeAnnouncement], start: int, end: int, avoid: Mapping[PeerId, str], *, says: bool = True
    ) -> list[Hop]:
        """Hops of the session's class of numerics; of another only if the caller allows it, who hears of it."""
        before = next((leg.hop.node for leg in self.legs if leg.hop.end == start), None)
        after = next((leg.hop.node for leg in self.legs if leg.hop.start == end), None)
        keeps_to = self.numerics if self._computed or self.legs else None
        gap = Gap(nodes=nodes, start=start, end=end, avoid=avoid, numerics=keeps_to, before=before, after=after)
        try:
            return self._choose(gap)
        except MissingBlocks:
            if keeps_to is None or not self.mixed:
                raise
        hops = self._choose(replace(gap, numerics=None))
        if says:
            self.reports.append(
                f"blocks {start}:{end} are computed in {hops[0].node.numerics} from here on, not in {keeps_to}: no "
                f"other nodes are left"
            )
        return hops

    def _no_chain(self, error: ClientError | NetError, now: float) -> None:
        """There is no chain (any more): wait for one, at once an error where no node has failed."""
        if not self._wants_fresh:
            self._wants_fresh = True
            self._look(now)
            return
        waits = isinstance(error, MissingBlocks | UnknownModel | NetError) and bool(self.failed_peers)
        if not waits or self._out_of_patience(now):
            if self._wants_chain or self._wanted_from is not None:
                self.error = error
                self.stop()
            return
        if not self._told:
            self.reports.append(f"waiting for nodes: {error}")
            self._told = True
        self._look_at = now + LOOK_S

    @property
    def _computed(self) -> int:
        """Of how many tokens the results have been there: those to come have to be like them."""
        return self._journal.end if self._wanted_from is None else self._wanted_from

    @property
    def _patience_with_nodes_s(self) -> float:
        return WAIT_S if self._computed else OPENING_WAIT_S

    def _out_of_patience(self, now: float) -> bool:
        """Whether nodes have failed for too long in this request. Its first failure starts the clock."""
        if not self.failed_peers:
            return False
        if self._gives_up_at is None:
            self._gives_up_at = now + self._patience_with_nodes_s
        return now >= self._gives_up_at

    def _look(self, now: float) -> None:
        if not self._looking and now >= self._look_at:
            self._looking = True
            self._actions.append(FindNodes(fresh=self._wants_fresh))

    def _add(self, hop: Hop, legs: list[LegState], now: float) -> None:
        leg = LegState(key=self._next_key, hop=hop, version=self._journal.version, since=now)
        self._next_key += 1
        legs.append(leg)
        self._actions.append(Open(leg=leg.key, hop=hop))

    def _find(self, key: int) -> LegState | None:
        return next((leg for leg in (*self.legs, *self._spares) if leg.key == key), None)

    def _drop(self, leg: LegState, now: float) -> None:
        self._give_up_runs()
        if leg in self._spares:
            self._drop_spares()
            return
        if leg in self._spares_for:  # its time has come
            if not self._for_gain or all(spare.is_open for spare in self._spares):
                self._take_spares()
                return
            self._drop_spares()
        self._actions.append(Close(leg=leg.key))
        self.legs.remove(leg)
        for each in self.legs:
            if each.linked_to == leg.key:
                each.linked_to = None

    # Links

    def _link(self, now: float) -> None:
        if not self._push:
            return
        for leg, following in zip(self.legs, self.legs[1:], strict=False):
            if leg.linked_to is not None and leg.linked_to != following.key:
                leg.linked_to = None
            wanted = leg.linked_to is None and leg.link_asked != following.key
            wanted = wanted and (leg.unlinked_from != following.key or now >= leg.relink_at)
            if wanted and (leg.peer_id, following.peer_id) not in self._unlinked:
                leg.link_asked, leg.link_asked_at = following.key, now
                self._actions.append(Link(leg=leg.key, following=following.key))
                if not self._computed and _know_each_other(leg.hop.node, following.hop.node):
                    leg.linked_to = following.key  # the first steps need not wait for their saying so; later ones may

    def _unlink(self, leg: LegState, now: float) -> None:
        leg.linked_to = leg.link_asked = None
        behind = self.legs[self.legs.index(leg) + 1 :] if leg in self.legs else []
        leg.unlinked_from, leg.relink_at = (behind[0].key if behind else None), now + RELINK_S

    # Pieces

    def _flow(self, now: float) -> None:
        """Make every leg that lags behind go on."""
        again = True
        while again:
            again = False
            for index, leg in enumerate(self.legs):
                while leg.sent < self._journal.end and len(self._runs) < MAX_RUNS:
                    outcome = self._start(index, now)
                    again |= outcome is None
                    if not outcome:
                        break

        self._fetch_lost(now)

    def _fetch_lost(self, now: float) -> None:
        """Have results again that the last leg gave when they were not wanted here, or that were lost on the way."""
        last = self.legs[-1]
        if self._runs or self.done or self._wanted_from is None or last.tokens < self._journal.end:
            return
        position = self._missing_from(self._wanted_from)
        if last.keeps:
            self._fetch(last, position, self._journal.end, now)
        else:
            last.tokens = last.sent = position
            self._flow(now)

    def _missing_from(self, position: int) -> int:
        for start in sorted(self.outputs):
            end, _ = self.outputs[start]
            if start <= position < end:
                position = end
        return position

    def _start(self, index: int, now: float) -> bool | None:
        """Start a run at a leg; ``False`` if it has to wait, ``None`` if a leg before it has to go back first."""
        leg = self.legs[index]
        with_order = leg.version != self._journal.version
        if with_order and not self._may_reorder(leg):
            if self._in_flight(leg):
                return False
            leg.tokens = leg.sent = 0
            leg.version, leg.keeps, with_order = self._journal.version, True, False
        position = leg.sent
        source: LegState | None = None
        payload: Any = None
        if index == 0:
            end = self._journal.next_end(position)
        elif (leg.hop.start, position) in self._passing:
            end, payload = self._passing[leg.hop.start, position]
        else:
            before = self.legs[index - 1]
            if before.tokens <= position or before.version != self._journal.version:
                return False  # it will come
            if not before.keeps:
                if self._in_flight(before):
                    return False
                before.tokens = before.sent = 0
                before.keeps = True
                return None
            source, end = before, min(self._journal.next_end(position), before.tokens)
        if with_order and end != self._journal.end:
            return False
        waits_for_link = leg.link_asked is not None and leg.linked_to is None and now < leg.link_asked_at + LINK_WAIT_S
        if waits_for_link and end - position >= BULK_TOKENS:
            return False
        return self._begin_run(index, position, end, source, payload, now, with_order=with_order)

    def _begin_run(
        self,
        index: int,
        position: int,
        end: int,
        source: LegState | None,
        payload: Any,
        now: float,
        *,
        with_order: bool,
    ) -> bool:
        """Send a piece through a leg and those that it hands on to."""
        leg = self.legs[index]
        by_push = source is not None and source.linked_to == leg.key and not self.direct
        if source is not None and not by_push:
            return self._fetch(source, position, end, now)
        if not self._may_enter(leg, by_push=by_push, now=now):
            return False
        legs = [leg]
        for following in self.legs[index + 1 :]:
            alike = (following.version != self._journal.version) == with_order and (
                not with_order or self._may_reorder(following)
            )
            if (
                self.direct
                or legs[-1].linked_to != following.key
                or following.sent != position
                or not alike
                or not self._may_enter(following, by_push=True, now=now)
            ):
                break
            legs.append(following)
        keep = self._wanted(index + len(legs), position, end)
        number = self._new_run(position, end, legs, source, now, keep=keep)
        for each in legs:
            each.sent = end
            if with_order:
                each.version, each.keeps, each.tokens = self._journal.version, False, 0
        begin = partial(Send, payload=payload) if source is None else Resend
        self._actions.append(
            begin(
                leg=(source or leg).key,
                run=number,
                position=position,
                end=end,
                push=len(legs) - (source is None),
                keep=keep,
                with_order=with_order,
            )
        )
        return True

    def _wanted(self, index: int, position: int, end: int) -> int:
        """Of how many tokens, at the end, the hidden states before leg ``index`` are wanted here."""
        if index < len(self.legs):
            return end - position if self.legs[index].sent == position else 0
        if self._wanted_from is None or self._missing_from(max(position, self._wanted_from)) >= end:
            return 0
        return max(0, end - max(position, self._wanted_from))

    def _fetch(self, source: LegState, position: int, end: int, now: float) -> bool:
        """Have in our hands what a leg gave once."""
        if any(run.source is source and not run.legs and run.position == position for run in self._runs.values()):
            return False
        number = self._new_run(position, end, [], source, now, keep=end - position)
        self._actions.append(
            Resend(leg=source.key, run=number, position=position, end=end, push=0, keep=end - position)
        )
        return True

    def _may_reorder(self, leg: LegState) -> bool:
        """Whether all that a leg lacks is the newest step, for which rows change places."""
        at = self._journal.reordered_at
        return leg.version == self._journal.version - 1 and leg.tokens == leg.sent == at

    def _may_enter(self, leg: LegState, *, by_push: bool, now: float) -> bool:
        """Whether a run may come this way: not past another one that comes another way."""
        if leg.hold_until > now:
            return False
        return all(by_push == (run.legs[0] is not leg or run.source is not None) for run in self._in_flight(leg))

    def _in_flight(self, leg: LegState) -> list[_Run]:
        return [run for run in self._runs.values() if leg in run.legs]

    def _new_run(
        self, position: int, end: int, legs: list[LegState], source: LegState | None, now: float, *, keep: int
    ) -> int:
        number = self._next_run
        self._next_run += 1
        if not self._runs:
            self._moved_at = now
        self._runs[number] = _Run(
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

    def _place_result(self, run: _Run, leg: LegState, payload: Any, position: int) -> None:
        """Keep what was answered until it is fetched, or those that it is for have it."""
        if leg.hop.end == self._last_block:
            self.outputs[position] = run.end, payload
        elif position == run.position:
            self._passing[leg.hop.end, position] = run.end, payload

    def _forget_passed(self) -> None:
        legs = (*self.legs, *self._spares)
        for (block, position), (end, _) in list(self._passing.items()):
            waiting = [leg for leg in legs if leg.hop.start == block and leg.tokens < end]
            if not waiting and block not in {start for start, _ in self._gaps()}:
                del self._passing[block, position]

    # Steps that take long

    def _note_seconds(self, seconds: float) -> None:
        """How long a decoded step took; what is usual follows, and how long to be patient."""
        self._took.append(seconds)
        usual = sorted(self._took)[int(0.99 * (len(self._took) - 1))]
        self._patience_s = max(MIN_PATIENCE_S, PATIENCE_FACTOR * usual)

    def _waits_for_legs(self) -> bool:
        """Whether something is on its way to a leg that has yet to be reached, for which there are other deadlines."""
        return any(leg.lost or not leg.is_open for run in self._runs.values() for leg in run.through)

    def _look_after(self, now: float) -> None:
        """Find out where a step is that takes long, and do without its node if others can take its place."""
        probe = self._probe
        if not self._runs or self._waits_for_legs():
            self._probe = None
            return
        if probe is None:
            if now >= self._moved_at + self._patience_s:  # summed up as in ``wakes_at``, or rounding has us wake again
                run = self._runs[min(self._runs)]
                self._probe = _Probe(run=run, until=now + PROBE_S)
                self._actions.extend(Ask(leg=leg.key, run=run.number) for leg in run.through)
            return
        run = probe.run
        silent = [leg for leg in run.through if leg.key not in probe.states]
        if silent and now < probe.until:
            return
        self._probe, self._moved_at = None, now  # if nothing comes of it, we ask again
        if silent:
            self.failed(silent[0].key, "does not say where a step is", now)
            return
        late = next((leg for leg in run.through if probe.states[leg.key] != "done"), None)
        if late is None:  # the answer has been lost
            self._give_up_runs()
        elif probe.states[late.key] == "unseen":
            self._not_arrived(run, late, now)
        elif now - run.asked_at >= LONGEST_STEP_S or (self._should_be_quick(run) and self._is_replaceable(late, now)):
            self.failed(late.key, f"takes more than {now - run.asked_at:.1f} s for a step", now)
        else:
            self._look(now)  # perhaps somebody has come who could take its place

    def _hurry(self, now: float) -> None:
        """Do without nodes that do not open the session, where others could."""
        for leg in list(self.legs):
            if not leg.is_open and now >= leg.since + OPEN_PATIENCE_S and self._is_replaceable(leg, now):
                self.failed(leg.key, f"has not opened the session in {now - leg.since:.1f} s", now)
        for spare in [] if self._for_gain else list(self._spares):
            is_late = not spare.is_open and now >= spare.since + self._spare_patience_s
            if not (is_late or spare.lost or spare.silent):
                continue
            if self._is_replaceable(spare, now):
                self._spare_patience_s *= MORE_PATIENCE
                self.failed(spare.key, f"has not shown that it is there in {now - spare.since:.1f} s", now, blame=False)
                return  # all of them have been dropped
            if not self._looking and now >= self._look_at:  # perhaps somebody has come who could
                self._look(now)
                self._look_at = now + LOOK_S

    def _not_arrived(self, run: _Run, leg: LegState, now: float) -> None:
        """What was sent to a leg has been lost on the way."""
        if leg is run.asked:
            leg.resets += 1
            if leg.resets > 2:
                self.failed(leg.key, "does not get what it is sent", now)
        else:
            self._unlink(run.through[run.through.index(leg) - 1], now)
        self._give_up_runs()

    def _should_be_quick(self, run: _Run) -> bool:
        return run.end - run.position == 1 and bool(self._took)

    def _is_replaceable(self, leg: LegState, now: float) -> bool:
        avoid = {**self._failed(now, rested_s=RESTED_S), **self._going(now), leg.peer_id: "slow"}
        try:
            self._choose_class(self._known, leg.hop.start, leg.hop.end, avoid, says=False)
        except MissingBlocks:
            return False
        return True

    # Planned moves

    def _move(self, now: float) -> None:
        """Have another leg for one that is lost, or whose node is about to leave, before it has gone for good."""
        old = self._spares_for
        missed = [leg for leg in self.legs if leg.is_missed(now) and not leg.has_no_spare]
        leaving = [leg for leg in self.legs if leg.leaving and not leg.has_no_spare]
        needier = [leg for leg in (missed or (leaving if self._for_gain else [])) if leg not in old]
        if old and needier and not any(leg in missed for leg in old):
            self._drop_spares()
            old = []
        if not old:
            if missed or leaving:
                self._find_spares((missed or leaving)[0], now)
            return
        if not all(spare.is_open for spare in self._spares):
            return
        is_urgent = any(leg in missed for leg in old)
        is_fed = all(spare.tokens + SPARE_LAG >= self._journal.end for spare in self._spares)
        was_opened = self._for_gain or any(leg.is_open for leg in old)
        if not was_opened or (is_fed and (is_urgent or not self._runs)):
            self._give_up_runs()
            self._gains += self._for_gain
            self._take_spares()
        else:
            self._feed_spares(now, FEEDING if is_urgent else 1)

    def _improve(self, now: float) -> None:
        """While the session is at work, look now and then whether other hops have become clearly better, and have them
        opened beside the old ones. With every move it looks less often, so that nodes that are as good as each other do
        not have it go back and forth.
        """
        if self._better is None or self._wanted_from is None or self._spares_for:
            return
        if self._better_at is None:
            self._wait_for_better(now)
        if self._better_at is None or now < self._better_at or self._going(now):
            return
        if self._nodes is None or now > self._found_at + CURRENT_S:
            self._look(now)
            return
        nodes, self._nodes = self._nodes, None
        self._wait_for_better(now)
        if any(leg.hop.node.numerics != self.numerics for leg in self.legs):
            return  # it would go back to where nobody was left
        found = self._better(nodes, [leg.hop for leg in self.legs], avoid=self._failed(now))
        if found is not None:
            self._prepare_for(found, now)

    def _wait_for_better(self, now: float) -> None:
        self._better_at = now + self._better_every_s() * min(1 + self._gains, MAX_SETTLED)

    def _prepare_for(self, found: Sequence[Hop], now: float) -> None:
        """Have those hops opened that differ from the chain in use."""
        old, new = [_place(leg.hop) for leg in self.legs], [_place(hop) for hop in found]
        alike = 0
        while alike < min(len(old), len(new)) and old[alike] == new[alike]:
            alike += 1
        behind = 0
        while behind < min(len(old), len(new)) - alike and old[-1 - behind] == new[-1 - behind]:
            behind += 1
        replaced = self.legs[alike : len(old) - behind]
        if replaced:
            self._spares_for, self._for_gain = replaced, True
            for hop in found[alike : len(new) - behind]:
                self._add(hop, self._spares, now)

    def _find_spares(self, going: LegState, now: float) -> None:
        if self._nodes is None:
            self._look(now)
            return
        nodes, self._nodes = self._nodes, None
        start, end = going.hop.start, going.hop.end
        avoid = {**self._going(now), going.peer_id: "goes"}
        try:
            hops = self._choose_class(nodes, start, end, {**avoid, **self._failed(now)})
        except MissingBlocks:
            try:
                hops = self._choose_class(nodes, start, end, {**avoid, **self._failed(now, rested_s=RESTED_S)})
            except MissingBlocks:
                self._wants_fresh = True
                self._look_at = now + 2 * LOOK_S
                return
        self._wants_fresh = False
        self._spares_for, self._for_gain = [going], False
        for hop in hops:
            self._add(hop, self._spares, now)

    def _feed_spares(self, now: float, most: int) -> None:
        """Bring new legs up to where the others are, beside what else is going on; with so many pieces at a time."""
        index = self.legs.index(self._spares_for[0])
        for number, spare in enumerate(self._spares):
            if spare.version != self._journal.version:
                spare.tokens = spare.sent = 0
                spare.version = self._journal.version
            while spare.sent < self._journal.end and len(self._in_flight(spare)) < most and spare.hold_until <= now:
                position = spare.sent
                payload: Any = None
                if (spare.hop.start, position) in self._passing:
                    end, payload = self._passing[spare.hop.start, position]
                elif number or index:
                    break
                else:
                    end = self._journal.next_end(position)
                keep = 0 if number + 1 == len(self._spares) else end - position
                run = self._new_run(position, end, [spare], None, now, keep=keep)
                spare.sent = end
                self._actions.append(
                    Send(leg=spare.key, run=run, position=position, end=end, push=0, keep=keep, payload=payload)
                )
            if index and not number and not self._fetch_for(spare, self.legs[index - 1], most, now):
                return

    def _fetch_for(self, spare: LegState, before: LegState, most: int, now: float) -> bool:
        """Have in our hands what a new leg is to be given next. False: that cannot be, and nothing is prepared."""
        position = spare.sent
        if (
            position < self._journal.end and not before.keeps
        ):  # nothing is better than to wait until the old one is gone
            for leg in self._spares_for:
                leg.has_no_spare = not self._for_gain
            self._drop_spares()
            return False
        if before.lost or before.version != self._journal.version:
            return True
        for _ in range(most):
            if position >= before.tokens:
                break
            kept = self._passing.get((spare.hop.start, position))
            end = min(self._journal.next_end(position), before.tokens) if kept is None else kept[0]
            if kept is None:
                self._fetch(before, position, end, now)
            position = end
        return True

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

    def _take_actions(self) -> list[Action]:
        self._forget_passed()
        actions, self._actions = self._actions, []
        return actions


def _know_each_other(one: NodeAnnouncement, other: NodeAnnouncement) -> bool:
    """Whether one of two nodes has said how long the way to the other takes: it has gone it."""
    return other.peer_id in one.round_trips or one.peer_id in other.round_trips


def _place(hop: Hop) -> tuple[PeerId, int, int]:
    return hop.node.peer_id, hop.start, hop.end
