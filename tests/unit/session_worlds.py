"""A world for the core of sessions: nodes that compute, hand on, fail and lie in wait, without I/O and without time.

A token's hidden state before block b is ``(b, prefix)``, where ``prefix`` names all tokens up to it. A node gives the
right state only if all that it has been given before is right: one piece that is missing, late, doubled or of another
row, and what comes out is ``WRONG`` from there on.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from client import session_core as core
from client.errors import MissingBlocks
from client.routing import Hop
from client.session_core import SessionCore
from net.addresses import parse
from net.identity import PeerId
from net.protocol.announcement import NodeAnnouncement, Numerics
from tests.net_helpers import seeded

BLOCKS = 4
WRONG = (-1, -1)
KINDS = ("die", "hang", "interrupt", "refuse", "forget", "lose", "unlink", "leave", "silent", "slow", "back")
State = tuple[int, int]
PEERS = [seeded(number).peer_id for number in range(1, 13)]


def offer(peer: PeerId, start: int, end: int, backend: str = "cpu") -> NodeAnnouncement:
    return NodeAnnouncement(
        peer_id=peer,
        addresses=(parse("/memory/1"),),
        model="some-bloom",
        digest="d" * 64,
        blocks=BLOCKS,
        start=start,
        end=end,
        weights="0" * 64,
        numerics=Numerics(dtype="float32", quantization="none", backend=backend),
        decode_tokens_per_s=10.0,
        cache_tokens_left=1000,
        max_length=100,
        state="online",
        agent="test",
    )


class Prefixes:
    """Names for sequences of tokens, each known by its parent and its last token."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, int], int] = {}
        self.parent: dict[int, int] = {}

    def after(self, parent: int, token: int) -> int:
        name = self._names.setdefault((parent, token), len(self._names) + 1)
        self.parent[name] = parent
        return name


class ListJournal:
    """As ``client.journal.Journal``, of states instead of tensors: one list of rows for each token."""

    def __init__(self, rows: int, prefixes: Prefixes) -> None:
        self.rows = rows
        self.version = 0
        self.reordered_at = 0
        self._prefixes = prefixes
        self.tokens: list[tuple[State, ...]] = []
        self.starts: list[int] = []  # of prompts, which are sent as they were; decoded steps may be put together
        self.order: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return len(self.tokens)

    def add(self, chosen: Sequence[Sequence[int]]) -> None:
        """For each new token, what it is in each row."""
        if len(chosen) > 1:
            self.starts.append(self.end)
        for tokens in chosen:
            last = [prefix for _, prefix in self.tokens[-1]] if self.tokens else [0] * self.rows
            self.tokens.append(tuple((0, self._prefixes.after(p, t)) for p, t in zip(last, tokens, strict=True)))
        if len(chosen) > 1:
            self.starts.append(self.end)

    def reorder(self, order: Sequence[int]) -> None:
        self.tokens = [tuple(token[row] for row in order) for token in self.tokens]
        self.version += 1
        self.reordered_at = self.end
        self.order = tuple(order)

    def cut(self, position: int) -> None:
        del self.tokens[position:]
        self.starts = [start for start in self.starts if start < position]

    def next_end(self, position: int) -> int:
        later = [start for start in self.starts if start > position]
        return min([position + 4, self.end, *later])

    def get(self, position: int, end: int) -> list[tuple[State, ...]]:
        return self.tokens[position:end]


@dataclass(eq=False)
class SimSession:
    """A session on a node."""

    start: int
    end: int
    cells: list[tuple[State, ...]] = field(default_factory=list)
    outbox: list[tuple[State, ...]] = field(default_factory=list)
    keeps: bool = True
    seen: int = 0
    done: set[int] = field(default_factory=set)
    next: int | None = None  # the leg that it hands on to
    gone: bool = False
    hangs: bool = False
    is_open: bool = False


@dataclass(eq=False)
class SimNode:
    offer: NodeAnnouncement
    up: bool = True


class World:
    """Carries out what a core wants, in any order that a network could."""

    def __init__(
        self,
        seed: int,
        *,
        rows: int = 1,
        spans: Sequence[tuple[int, int]] = (),
        push: bool = True,
        moves: bool = False,
    ) -> None:
        self.random = random.Random(seed)
        self.prefixes = Prefixes()
        self.journal = ListJournal(rows, self.prefixes)
        chance = random.Random(seed)
        self.nodes = [
            SimNode(replace(offer(PEERS[index], *span), round_trips=dict.fromkeys(chance.sample(PEERS, 4), 0.01)))
            for index, span in enumerate(spans)
        ]
        self.core = SessionCore(
            self.journal,
            self._choose,
            push=push,
            better=self._better if moves else None,
            better_every_s=lambda: self.random.random() * 0.1,
        )
        self.now = 0.0
        self.sessions: dict[int, SimSession] = {}
        self.peers: dict[int, PeerId] = {}
        self.closed: set[int] = set()
        # What is on its way, in order for each way: to a leg from the client (key), from a leg to another (key, key).
        self.ways: dict[Any, deque[Any]] = {}
        self.faults = 0
        self.finds = 0

    def node(self, peer: PeerId) -> SimNode:
        return next(node for node in self.nodes if node.offer.peer_id == peer)

    def _choose(self, gap: core.Gap) -> list[Hop]:
        """Any hops."""
        usable = [n for n in gap.nodes if n.peer_id not in gap.avoid and gap.numerics in (None, n.numerics)]
        if gap.numerics is None and usable:
            usable = [n for n in usable if n.numerics == usable[0].numerics]
        hops: list[Hop] = []
        block, end = gap.start, gap.end
        while block < end:
            here = [n for n in usable if n.start <= block < n.end]
            if not here:
                raise MissingBlocks(f"nobody serves {block}", [(block, end)])
            node = self.random.choice(here)
            stop = self.random.randint(block + 1, min(end, node.end))
            hops.append(Hop(node=node, start=block, end=stop))
            block = stop
        return hops

    def _better(
        self, nodes: Sequence[NodeAnnouncement], old: Sequence[Hop], *, avoid: Mapping[PeerId, str]
    ) -> list[Hop] | None:
        """Now and then any other hops."""
        numerics = old[0].node.numerics
        if self.random.random() < 0.3:
            return None
        try:
            return self._choose(core.Gap(nodes=nodes, start=0, end=BLOCKS, avoid=avoid, numerics=numerics))
        except MissingBlocks:
            return None

    # The world goes on

    def act(self) -> None:
        """Carry out what the core wants now."""
        for action in self.core.advance(self.now):
            match action:
                case core.FindNodes():
                    self.finds += 1
                    self._way("find").append(action)
                case core.Open(leg=leg):
                    self.peers[leg] = action.hop.node.peer_id
                    self.sessions[leg] = SimSession(action.hop.start, action.hop.end)
                    self._way(leg).append(action)
                case core.Close(leg=leg):
                    assert leg not in self.closed
                    self.closed.add(leg)
                    self.sessions[leg].gone = True
                case core.Send(leg=leg):
                    payload = action.payload
                    if payload is None:
                        payload = self.journal.get(action.position, action.end)
                    assert len(payload) == action.end - action.position
                    order = self.journal.order if action.with_order else None
                    self._way(leg).append((action, list(payload), order))
                case core.Resend(leg=leg):
                    self._way(leg).append((action, self.journal.order if action.with_order else None))
                case core.Link(leg=leg) | core.Ask(leg=leg):
                    self._way(leg).append(action)

    def _way(self, key: Any) -> deque[Any]:
        return self.ways.setdefault(key, deque())

    def step(self) -> bool:
        """Let one thing happen; false if nothing is on its way."""
        open_ways = [key for key, way in self.ways.items() if way]
        if not open_ways:
            return False
        key = self.random.choice(open_ways)
        thing = self.ways[key].popleft()
        self.now += self.random.random() * 0.01
        if isinstance(thing, tuple) and thing and thing[0] == "told":
            _, event, *arguments = thing
            event(*arguments, self.now)
        elif isinstance(thing, core.FindNodes):
            self.core.nodes_found([node.offer for node in self.nodes if node.up], self.now)
        else:
            self._at_node(key, thing)
        self.act()
        return True

    def tell(self, leg: int, event: Any, *arguments: Any) -> None:
        """Something is on its way from a leg's node to the client."""
        self._way(("told", leg)).append(("told", event, *arguments))

    def _at_node(self, key: Any, thing: Any) -> None:
        leg = key[1] if isinstance(key, tuple) else key
        session, node = self.sessions[leg], self.node(self.peers[leg])
        if session.hangs:  # the stream's own deadlines
            if isinstance(thing, core.Open):
                self.tell(leg, self.core.failed, leg, "no answer")
            elif isinstance(thing, core.Link):
                self.tell(leg, self.core.not_linked, leg, thing.following)
            return
        if not node.up or session.gone:
            if not isinstance(key, tuple) and not session.gone:
                self.tell(leg, self.core.failed, leg, "gone")
            return
        if not session.is_open:
            self._open(leg, session, thing)
            return
        match thing:
            case core.Link(following=following):
                other = self.sessions.get(following)
                if other is None or other.gone or self.random.random() < 0.1:
                    self.tell(leg, self.core.not_linked, leg, following)
                else:
                    session.next = following
                    self.tell(leg, self.core.linked, leg, following)
            case core.Ask(run=run):
                waits = any(isinstance(each, tuple) and each[0].run == run for each in self._way(leg))
                state = "done" if run in session.done else "waiting" if waits else "unseen"
                self.tell(leg, self.core.placed, leg, run, state)
            case (core.Resend(run=run, position=position, end=end, push=push, keep=keep), order):
                session.done.add(run)
                if not session.keeps or end > len(session.outbox):
                    self.tell(leg, self._refuse, leg, run, "no-history")
                else:
                    self._deliver(leg, run, position, session.outbox[position:end], push, keep, order)
            case (core.Send() as send, payload, order):
                self._compute(leg, send.run, send.position, payload, send.push, send.keep, order)
            case (int() as run, position, payload, push, keep, order):
                self._compute(leg, run, position, payload, push, keep, order)

    def _open(self, leg: int, session: SimSession, thing: Any) -> None:
        """What comes before the session is open is refused; a node may put off opening it."""
        if isinstance(thing, tuple):
            if not isinstance(thing[0], int):  # else another node's; that stream waits, or ends
                self.tell(leg, self._refuse, leg, thing[0].run, "bad-input")
        elif isinstance(thing, core.Link):
            self.tell(leg, self.core.not_linked, leg, thing.following)
        elif isinstance(thing, core.Open) and self.random.random() < 0.1:
            self.tell(leg, self._put_off, leg, thing)
        elif isinstance(thing, core.Open):
            session.is_open = True
            self.tell(leg, self.core.opened, leg)

    def _put_off(self, leg: int, action: core.Open, now: float) -> None:
        self._way(leg).append(action)
        self.core.interrupted(leg, now)

    def _refuse(self, leg: int, run: int, code: str, now: float) -> None:
        self.core.refused(leg, run, code, "why", now)

    def _compute(
        self,
        leg: int,
        run: int,
        position: int,
        payload: list[tuple[State, ...]],
        push: int,
        keep: int,
        order: tuple[int, ...] | None,
    ) -> None:
        session = self.sessions[leg]
        if run <= session.seen:
            return
        session.seen = run
        session.done.add(run)
        if position > len(session.cells):
            self.tell(leg, self._refuse, leg, run, "bad-position")
            return
        del session.cells[position:]
        del session.outbox[position:]
        if order is not None:
            session.cells = [tuple(cell[row] for row in order) for cell in session.cells]
            session.outbox = []
            session.keeps = False
        if position == 0:
            session.keeps = True
        for token in payload:
            session.cells.append(token)
            result = tuple(self._state(session, row) for row in range(len(token)))
            if session.keeps:
                session.outbox.append(result)
            last = result
            payload = [*payload[: len(payload)], last][1:]
        self._deliver(leg, run, position, payload, push, keep, order)

    def _state(self, session: SimSession, row: int) -> State:
        """What comes out for the last token: right only if it and its parent are what they should be."""
        block, prefix = session.cells[-1][row]
        if block != session.start:
            return WRONG
        parent = self.prefixes.parent[prefix]
        before = session.cells[-2][row][1] if len(session.cells) > 1 else 0
        right = parent == before and all(cell[row][0] == session.start for cell in session.cells)
        return (session.end, prefix) if right else WRONG

    def _deliver(
        self,
        leg: int,
        run: int,
        position: int,
        result: list[tuple[State, ...]],
        push: int,
        keep: int,
        order: tuple[int, ...] | None,
    ) -> None:
        session = self.sessions[leg]
        unpushed = False
        if push:
            following = session.next
            if following is not None and self.random.random() > 0.02:
                self._way((leg, following)).append((run, position, result, push - 1, keep, order))
                return
            unpushed, session.next = True, None
        payload = result if unpushed else result[len(result) - min(keep, len(result)) :] or None
        self.tell(leg, self._answer, leg, run, payload, unpushed)

    def _answer(self, leg: int, run: int, payload: Any, unpushed: bool, now: float) -> None:
        self.core.answered(leg, run, payload, now, unpushed=unpushed)

    # Faults

    def fault(self) -> None:
        """Something bad, of a random kind."""
        self.faults += 1
        legs = [leg for leg, session in self.sessions.items() if not session.gone]
        kind = self.random.choice(KINDS)
        if kind == "back":
            for node in self.nodes:
                node.up = True
            return
        if not legs:
            return
        leg = self.random.choice(legs)
        session = self.sessions[leg]
        if kind == "die":
            node = self.node(self.peers[leg])
            node.up = False
            for other in legs:
                if self.peers[other] == node.offer.peer_id:
                    self.sessions[other].gone = True
                    self.ways.pop(("told", other), None)
                    if self.random.random() < 0.5:
                        self.core.lost(other)
                        self.tell(other, self._pass)
                    self.tell(other, self.core.failed, other, "died")
        elif kind == "hang":
            session.hangs = True
        elif kind == "interrupt":  # what was on its way both ways is lost
            self.ways.pop(leg, None)
            self.ways.pop(("told", leg), None)
            self.core.lost(leg)
            self.tell(leg, self.core.interrupted, leg)
            if not any(each.key == leg and each.is_open for each in self.core.legs):
                self.tell(leg, self.core.failed, leg, "not opened")
        elif kind == "refuse":
            runs = list(self.core._runs)
            if runs:
                code = self.random.choice(["not-finite", "no-session", "internal", "busy"])
                run = self.random.choice(runs)
                if code == "busy":
                    self.core.refused(leg, run, code, "later", self.now, retry_after_s=0.1)
                else:
                    self.core.refused(leg, run, code, "why", self.now)
        elif kind == "forget":
            session.keeps, session.outbox = False, []
        elif kind == "lose":  # a stream between two nodes breaks
            between = [key for key, way in self.ways.items() if isinstance(key, tuple) and key[0] != "told" and way]
            if between:
                key = self.random.choice(between)
                self.ways[key].clear()
                self.sessions[key[0]].next = None
        elif kind == "unlink":
            session.next = None
        elif kind == "leave":
            self.tell(leg, self.core.leaving, leg)
        elif kind == "silent":
            self.core.silent(leg)
            self.tell(leg, self._pass)
            self.tell(leg, self.core.heard, leg)
        elif kind == "slow":  # whoever has not opened the session yet is late
            self._pass(self.now)
        self.act()

    def _pass(self, now: float) -> None:
        """Some time goes by."""
        self.now += self.random.random()

    # What a user does

    def run_until_done(self, fault_chance: float = 0.0, max_faults: int = 0) -> Exception | None:
        """Go on until what was asked for is there; the error, if it cannot be."""
        self.act()
        for _ in range(20_000):
            if self.core.done:
                return None
            if self.core.error is not None:
                return self.core.error
            if self.faults < max_faults and self.random.random() < fault_chance:
                self.fault()
            if not self.step() and self.core.error is None and not self.core.done:
                wakes = self.core.wakes_at(self.now)
                if wakes == float("inf"):
                    raise AssertionError("the core waits for nothing, for ever")
                self.now = max(self.now + 1e-6, wakes)
                self.act()
        raise AssertionError("no end")

    def check(self, position: int) -> None:
        """Whether the results from there on are those of one machine."""
        found: list[tuple[State, ...]] = []
        at = position
        for start in sorted(self.core.outputs):
            end, payload = self.core.outputs[start]
            if start <= at < end:
                found += payload[at - start :]
                at = end
        expected = [tuple((BLOCKS, prefix) for _, prefix in token) for token in self.journal.tokens[position:]]
        assert found == expected
