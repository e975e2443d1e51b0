"""A session: one growing batch of sequences on a chain of nodes.

It keeps what it sent (``journal.py``), so that nodes can be replaced: what to do about whatever happens is decided
without I/O (``session_core.py``), and carried out here, on a stream to each node (``legs.py``). The same pieces through
the same numerics give the same bits. A node that is only lost from sight is found again.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import trio

from client import session_core as core
from client.choices import NO_CHOICES, Choices
from client.choosing import Chooser, Need
from client.errors import ClientError, InvalidInput, MissingBlocks, UnknownModel
from client.every_block import EveryBlock
from client.forms import HopTraffic, SessionForms
from client.journal import DECODE_TOKENS, Journal
from client.legs import FindNodes, Leg
from client.lifesigns import LifeSigns
from client.nearness import Nearness
from client.pricing import OVERHEAD_S
from client.routing import Hop
from client.session_core import SessionCore
from compute.errors import BadInput
from compute.tuning import SpanTuning
from compute.wire_forms import CODEC, from_message
from net import errors
from net.host import Host
from net.identity import PeerId
from net.protocol import session as wire
from net.protocol.announcement import NodeAnnouncement
from net.reputation import Reputation
from net.rpc import lane
from net.rpc.framing import MAX_FRAME_BYTES, MAX_HEADER_BYTES, Message

logger = logging.getLogger(__name__)

BETTER_EVERY_S = 20.0, 30.0  # between looks whether other nodes have become better, at random
CHUNK_TOKENS = 256  # of all rows: nodes compute prompts in such chunks, so pieces of that size lose nothing


class Session:
    """See the module. Not for concurrent use; made by ``AsyncSwarm.session``.

    Attributes:
        max_length: how many tokens it can get; known once there is a chain.
        position: tokens so far. ``rollback`` sets it back.
        pads: with how many tokens of padding each row begins; set it before the first step.
        expected: how many tokens it will probably come to have; 0 if nobody has said.
    """

    def __init__(
        self,
        host: Host,
        find_nodes: FindNodes,
        nursery: trio.Nursery,
        reputation: Reputation,
        *,
        max_length: int | None = None,
        wire_form: str = "auto",
        measures_error: bool = False,
        nearness: Nearness | None = None,
        life_signs: LifeSigns | None = None,
        choices: Choices = NO_CHOICES,
        tuning: SpanTuning | None = None,
    ) -> None:
        """Begin without a chain.

        Args:
            host: dials.
            find_nodes: who serves the model now.
            nursery: in which the session lives, from its first use until ``aclose``.
            reputation: what is known of nodes; it learns from what happens here.
            max_length: tokens to make room for; as many as the nodes allow by default.
            wire_form: in which form hidden states travel: see ``AsyncSwarm.session``.
            measures_error: whether to find out what is lost on the way, which takes time.
            nearness: knows how far nodes are; by default all count as equally far.
            life_signs: knows which nodes have not answered lately; its own by default.
            choices: which nodes may be used, and which blocks whoever uses the session computes before and after it.
            tuning: what is added within all blocks of the session, for it alone. Each node is sent its part before it
                opens the session, a replacement, too.

        Raises:
            TypeError, InvalidInput: ``max_length`` is no whole number, or not above 0; no such form.
        """
        if isinstance(max_length, bool) or not isinstance(max_length, int | None):
            raise TypeError(f"max_length is a number of tokens, not {type(max_length).__name__}")
        if max_length is not None and max_length < 1:
            raise InvalidInput(f"max_length is {max_length}: give a number of tokens above 0")
        self._host = host
        self._find_nodes = find_nodes
        self._parent = nursery
        self._reputation = reputation
        self._requested_length = max_length
        self._forms = SessionForms(wire_form)
        self._measures = measures_error and self._forms.asked is not None
        self._nearness = nearness
        self._life_signs = life_signs or LifeSigns(host)
        self._others: list[PeerId] = []  # nodes that may take others' places
        self._choices = choices
        self._chooser = Chooser(choices, reputation, self._life_signs, nearness)
        self._tuning = tuning
        self._journal = Journal()
        self._order: tuple[int, ...] = ()
        self._width = 0  # of hidden states
        self._every: EveryBlock | None = None  # while results of every block are wanted
        self._every_runs: dict[int, tuple[int, int]] = {}  # by number: which leg was asked, from which token on
        self._longest_hop = 1  # blocks, of all nodes that could be on the chain
        self._core: SessionCore | None = None
        self._legs: dict[int, Leg] = {}
        self._nursery: trio.Nursery | None = None
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._timer = trio.CancelScope()
        self._changed = trio.Event()
        self._bug: BaseException | None = None
        self.batch: int | None = None
        self.pads: tuple[int, ...] | None = None
        self.max_length = max_length or 0
        self.position = 0
        self.expected = 0

    @property
    def chain(self) -> list[Hop]:
        """The hops in use; empty before the first step."""
        return [] if self._core is None else [leg.hop for leg in self._core.legs]

    async def prepare(self, batch: int) -> None:
        """Choose a chain for ``batch`` rows, if that has not been done. ``max_length`` is known afterwards.

        Raises:
            MissingBlocks, UnknownModel: no chain.
            InvalidInput: the session has another number of rows.
        """
        if self.batch not in (None, batch):
            raise InvalidInput(f"the session has {self.batch} rows, not {batch}; open another with model.session()")
        if self._core is not None and self._core.ready:
            return
        self.batch = batch
        try:
            session = await self._awake()
            session.want_chain()
            await self._until(lambda: session.ready)
        except BaseException:
            if not self.position:
                await self._forget_rows()
            raise

    async def _forget_rows(self) -> None:
        """Have a session that has not begun."""
        await self.aclose()
        self.batch = None

    async def step(
        self,
        hidden: torch.Tensor,
        order: Sequence[int] | None = None,
        *,
        keep: int | None = None,
        every_block: bool = False,
    ) -> torch.Tensor:
        """Run all blocks on the next tokens.

        Args:
            hidden: their hidden states.
            order: for beam search: row ``i`` goes on from what row ``order[i]`` had.
            keep: of how many tokens, at the end, results are wanted; of all by default.
            every_block: return what each of the model's ``n`` blocks gives, for all tokens. It takes a round trip to
                each node, and as many times the data.

        Shapes:
            hidden: [b, t, d], fp32
            returns: [b, t or keep, d]; [n, b, t, d] with ``every_block``

        Raises:
            InvalidInput: more tokens than the nodes allow, or values that are not finite.
            MissingBlocks, SessionFailed: no chain can be had (any more); what was there before the step is kept.
        Cancellation: the session can go on from the same position.
        """
        await self.prepare(hidden.shape[0])
        if self.position + hidden.shape[1] > self.max_length:
            raise InvalidInput(
                f"{self.position + hidden.shape[1]} tokens are more than the {self.max_length} that the nodes on the "
                f"chain allow; shorten the prompt or ask for fewer new tokens"
            )
        _check_finite(hidden)
        position = self.position
        try:
            if every_block:
                return await self._step_every(hidden, order)
            kept = min(keep or hidden.shape[1], hidden.shape[1])
            end = await self.begin(hidden, order, keep=kept)
            return await self.result(end - kept, end)
        except BaseException as error:
            self.stop()
            self.rollback(position)
            if isinstance(error, InvalidInput) and not position:  # perhaps nodes do not take so many rows
                await self._forget_rows()
            raise

    async def _step_every(self, hidden: torch.Tensor, order: Sequence[int] | None) -> torch.Tensor:
        """Shapes:
        returns: [n, b, t, d]
        """
        session, position = await self._awake(), self.position
        token_bytes = self._longest_hop * hidden[:, :1].numel() * hidden.element_size()
        if token_bytes > MAX_FRAME_BYTES - MAX_HEADER_BYTES:
            raise InvalidInput(
                f"hidden states of a token in {hidden.shape[0]} rows after each of a node's {self._longest_hop} blocks "
                f"are more than the {MAX_FRAME_BYTES} bytes of a message: give fewer rows at once"
            )
        self._every = EveryBlock(position)
        self._every_runs = {
            run: asked for run, asked in self._every_runs.items() if session.expected(run, unpushed=True) is not None
        }
        # What is computed again must not be put together with what was before: it would not fit into a message.
        self._journal.merge, session.direct = False, True
        try:
            end = await self.begin(hidden, order)
            await self.result(position, end)
            return self._every.gathered(range(self.chain[0].start, self.chain[-1].end), end)
        finally:
            self._every, session.direct = None, False

    async def begin(self, hidden: torch.Tensor, order: Sequence[int] | None = None, *, keep: int | None = None) -> int:
        """Send the next tokens, whose values and number have been checked, without waiting for what they give.

        Returns:
            where they end: ``result`` has what they give.
        """
        session, position = await self._awake(), self.position
        if (
            order is not None
            and self.pads is not None
            and any(self.pads[old] != pad for old, pad in zip(order, self.pads, strict=True))
        ):
            raise InvalidInput("rows with different padding cannot change places")
        if order is not None and list(order) != list(range(hidden.shape[0])):
            self._order = tuple(order)
            self._journal.reorder(order)
            session.reordered()
        self._width = hidden.shape[2]
        for part in hidden.split(self._piece_tokens(hidden), dim=1):
            self._journal.add(part.contiguous())
        self.position = self._journal.end
        session.want(position if keep is None else self.position - keep)
        self._go_on()
        return self.position

    async def result(self, position: int, end: int) -> torch.Tensor:
        """What tokens ``[position, end)`` gave, once: what lies before ``end`` is forgotten.

        Shapes:
            returns: [b, end - position, d]

        Raises: as ``step``; the session is then as it was before these tokens only after ``rollback``.
        """
        session = await self._awake()
        await self._until(lambda: session.has(position, end))
        found = _gathered(session.outputs, position, end)
        session.took(end)
        return found

    def take_history(self, other: Session, position: int) -> None:
        """Begin with another session's first tokens. Nodes get them with the next step.

        Raises:
            InvalidInput: the session has begun, or the other has fewer tokens.
        """
        if not 0 <= position <= other.position:
            raise InvalidInput(f"the other session has {other.position} tokens, not {position}")
        self._check_new()
        if other.batch is not None:
            self._journal, self._width = other._journal.copy(), other._width
            self._journal.cut(position)
            self.batch, self.pads, self.position = other.batch, other.pads, position

    def restore(self, hidden: torch.Tensor, pads: Sequence[int] | None) -> None:
        """Begin with tokens whose hidden states are these. Nodes get them with the next step.

        Shapes:
            hidden: [b, t, d], fp32

        Raises:
            InvalidInput: the session has begun, or values are not finite.
        """
        self._check_new()
        _check_finite(hidden)
        self.batch, self._width = hidden.shape[0], hidden.shape[2]
        self.pads = None if pads is None else tuple(pads)
        for part in hidden.split(self._piece_tokens(hidden), dim=1):
            self._journal.add(part.contiguous())
        self.position = self._journal.end

    def _check_new(self) -> None:
        if self.batch is not None or self.position or self._core is not None:
            raise InvalidInput("the session has begun: open another with model.session()")

    def stop(self) -> None:
        """Wait for nothing any more."""
        if self._core is not None:
            self._core.stop()

    def rollback(self, position: int) -> None:
        """Forget all tokens from ``position`` on.

        Raises:
            InvalidInput: the session has fewer.
        """
        if not 0 <= position <= self.position:
            raise InvalidInput(f"cannot go back to {position}: the session has {self.position} tokens")
        self._journal.cut(position)
        if self._core is not None:
            self._core.cut(position)
        self.position = position

    async def traffic(self) -> list[HopTraffic]:
        """What the hidden states of the session have taken so far, hop by hop, as the nodes say; within seconds."""
        legs = [] if self._core is None else [self._legs[leg.key] for leg in self._core.legs]
        said: dict[int, wire.Sent | None] = {}

        async def ask(leg: Leg) -> None:
            said[leg.key] = await leg.ask_sent()

        async with trio.open_nursery() as nursery:
            for leg in legs:
                nursery.start_soon(ask, leg)
        hops: list[HopTraffic] = []
        for leg in legs:
            handed_on = hops[-1].back if hops else None
            sent = leg.account.summary() if leg.account.tokens else None
            hops.append(HopTraffic(hop=leg.hop, to=handed_on or sent, back=said[leg.key]))
        return hops

    async def aclose(self) -> None:
        """Free the session on its nodes. What it has computed can be computed again by the next step."""
        if self._core is None:
            return
        session, self._core = self._core, None
        session.close()
        self._legs.clear()
        self._scope.cancel()
        await self._ended.wait()

    def start_soon(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        """Run a task for as long as the session is open.

        Raises:
            ClientError: it is not.
        """
        if self._nursery is None or self._core is None:
            raise ClientError("the session is not open")
        self._nursery.start_soon(function, *args)

    # The session's own task

    async def _awake(self) -> SessionCore:
        """The core, with a task that looks after it."""
        if self._core is None:
            self._core = session = SessionCore(
                self._journal,
                self._forms.within_cuts(lambda gap: self._chooser.chain(gap, self._need())),
                better=self._find_better,
                better_every_s=lambda: random.uniform(*BETTER_EVERY_S),
                own_blocks=self._choices.local_blocks,
            )
            session.mixed = self._choices.mixed_numerics
            self._scope, self._ended, self._bug, self._nursery = trio.CancelScope(), trio.Event(), None, None
            try:
                self._nursery = await self._parent.start(self._run, self._scope, self._ended)
            except BaseException:
                if self._core is session:
                    self._core = None
                raise
        return self._core

    async def _run(
        self, scope: trio.CancelScope, ended: trio.Event, *, task_status: trio.TaskStatus[trio.Nursery]
    ) -> None:
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._keep_time)
                    task_status.started(nursery)
        except Exception as error:  # noqa: BLE001  # raised by who waits: the swarm has other sessions
            self._bug = error
        finally:
            ended.set()
            self._changed.set()

    async def _keep_time(self) -> None:
        while True:
            with trio.CancelScope(deadline=self._timer.deadline) as self._timer:
                await trio.sleep_forever()
            self._go_on()

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Go on until something is so.

        Raises:
            ClientError, NetError: it cannot be.
        """
        session = self._core
        while session is not None:
            self._go_on()
            if self._bug is not None:
                raise self._bug
            if condition():
                return
            if session.error is not None:
                raise session.error
            self._changed = trio.Event()
            await self._changed.wait()
            if self._core is not session:
                raise ClientError("the session was closed meanwhile")

    # What the core wants

    def _go_on(self) -> None:
        """Carry out what follows from what has happened."""
        session, nursery = self._core, self._nursery
        if session is None or nursery is None:
            return
        now = trio.current_time()
        for action in session.advance(now):
            self._carry_out(action, nursery)
        for peer_id, reason in session.failures:
            self._reputation.failed(peer_id, reason)
        for success in session.successes:
            self._reputation.succeeded(success.peer_id, self._block_s(success))
        session.failures.clear()
        session.successes.clear()
        for report in session.reports:
            logger.warning("%s", report)
        session.reports.clear()
        for leg in self._legs.values():
            leg.set_idle(not session.busy)
        self._timer.deadline = session.wakes_at(now)
        if session.ready:
            longest = min(wire.MAX_LENGTH, *(leg.hop.node.max_length for leg in session.legs))
            self.max_length = min(longest, self._requested_length or longest)
            # Where a row's bits depend on what is computed beside it, only the same steps give the same bits again.
            backend = session.legs[0].hop.node.numerics.backend
            self._journal.merge = not backend.endswith("-mixing") and self._every is None
        self._changed.set()

    def _block_s(self, success: core.Success) -> float | None:
        """What a block took, without the way; ``None`` where that is not known."""
        leg = self._legs.get(success.leg)
        round_trip_s = None if leg is None else leg.round_trip_s
        if success.seconds is None or round_trip_s is None:
            return None
        return max(0.0, success.seconds - round_trip_s - OVERHEAD_S) / success.blocks

    def _carry_out(self, action: core.Action, nursery: trio.Nursery) -> None:
        match action:
            case core.FindNodes(fresh=fresh):
                nursery.start_soon(self._find, fresh)
            case core.Open(leg=key, hop=hop):
                form = self._forms.into(hop)
                part = None if self._tuning is None else self._tuning.part(hop.start, hop.end)
                leg = Leg(key, hop, self._request(hop), self._host, self._find_nodes, self, form, part)
                self._legs[key] = leg
                nursery.start_soon(leg.run)
            case core.Close(leg=key):
                self._legs.pop(key).end()
            case core.Link(leg=key, following=following):
                self._legs[key].link(self._legs[following])
            case core.Ask(leg=key, run=run):
                self._legs[key].ask_where(run)
            case core.Send():
                self._send(action)
            case core.Resend():
                fields = self._fields(action)
                self._legs[action.leg].send(Message(header={**fields, "m": "resend", "end": action.end}))

    def _send(self, action: core.Send) -> None:
        if self._core is not None:
            self._forms.settle(leg.hop for leg in self._core.legs)
        hidden = action.payload
        if hidden is None:
            hidden = self._journal.get(action.position, action.end)
        leg = self._legs[action.leg]
        try:
            leg.send_hidden(hidden, {**self._fields(action), "m": "step"})
        except BadInput as error:
            if self._core is not None:
                self._core.forbidden(leg.key, InvalidInput(str(error)))

    def _fields(self, action: core.Piece) -> Mapping[str, object]:
        every = self._every is not None and isinstance(action, core.Send) and action.end > self._every.position
        if every:
            self._every_runs[action.run] = action.leg, action.position
        return wire.Step(
            id=action.run,
            position=action.position,
            push=action.push,
            keep=action.end - action.position if every else action.keep,
            order=self._order if action.with_order else None,
            every=every,
        ).to_fields()

    def _request(self, hop: Hop) -> wire.Open:
        longest = min(wire.MAX_LENGTH, hop.node.max_length)
        return wire.Open(
            digest=hop.node.digest,
            start=hop.start,
            end=hop.end,
            batch=self.batch or 1,
            max_length=min(longest, self._requested_length or longest),
            pads=self.pads,
            form=str(self._forms.out_of(hop)),
            codecs=(CODEC,),
            measures=self._measures,
            tuned=self._tuning is not None,
        )

    async def _find(self, fresh: bool) -> None:
        session = self._core
        try:
            nodes = await self._find_nodes(fresh=fresh)
        except (MissingBlocks, UnknownModel, errors.NetError) as error:
            found: list[NodeAnnouncement] | ClientError | errors.NetError = error
        else:
            found = [node for node in nodes if node.max_length > self._journal.end] or nodes
            self._longest_hop = max(node.end - node.start for node in found)
        if session is None or session is not self._core:
            return
        if isinstance(found, list):
            session.nodes_found(found, trio.current_time())
            usable = self._chooser.usable(found)
            self._others = [node.peer_id for node in usable]
            if self._nearness is not None:
                self._nearness.look_at(usable)
        else:
            session.nodes_missing(found, trio.current_time())
        self._go_on()

    def _find_better(
        self, nodes: Sequence[NodeAnnouncement], old: Sequence[Hop], *, avoid: Mapping[PeerId, str]
    ) -> list[Hop] | None:
        return self._chooser.better(nodes, old, self._need(), avoid=avoid)

    def _need(self) -> Need:
        return Need(
            rows=self.batch or 1,
            tokens=self._journal.end,
            expected=self.expected,
            requested=self._requested_length,
            max_length=self.max_length,
            allows=self._forms.allow,
        )

    # What happens to legs

    @contextmanager
    def _event(self, leg: Leg) -> Iterator[SessionCore | None]:
        """The core, if the leg is one of its own still; what follows is carried out."""
        is_ours = self._legs.get(leg.key) is leg
        yield self._core if is_ours else None
        if is_ours:
            self._go_on()

    def leg_opened(self, leg: Leg) -> None:
        with self._event(leg) as session:
            if session is not None:
                session.opened(leg.key, trio.current_time())

    def leg_uploading(self, leg: Leg) -> None:
        with self._event(leg) as session:
            if session is not None:
                session.opening(leg.key, trio.current_time())

    def leg_failed(self, leg: Leg, error: errors.PeerFailed) -> None:
        with self._event(leg) as session:
            if session is not None:
                self._life_signs.ask(self._others)
                session.failed(leg.key, error.reason, trio.current_time())

    def leg_refused(self, leg: Leg, error: InvalidInput) -> None:
        with self._event(leg) as session:
            if session is not None:
                session.forbidden(leg.key, error)

    def leg_lost(self, leg: Leg) -> None:
        with self._event(leg) as session:
            if session is not None:
                self._life_signs.ask(self._others)
                session.lost(leg.key)

    def leg_silent(self, leg: Leg) -> None:
        with self._event(leg) as session:
            if session is not None:
                self._life_signs.ask(self._others)
                session.silent(leg.key)

    def leg_heard(self, leg: Leg) -> None:
        with self._event(leg) as session:
            if session is not None:
                session.heard(leg.key, trio.current_time())

    def leg_replaceable(self, leg: Leg, nodes: list[NodeAnnouncement]) -> bool:
        return self._chooser.can_replace(leg.hop, nodes)

    def leg_interrupted(self, leg: Leg) -> None:
        with self._event(leg) as session:
            if session is not None:
                session.interrupted(leg.key, trio.current_time())

    def leg_leaving(self, leg: Leg, seconds: float) -> None:
        with self._event(leg) as session:
            if session is not None and seconds > 0:
                session.leaving(leg.key, trio.current_time())
            elif session is not None:
                session.failed(leg.key, "serves the session no longer", trio.current_time(), blame=False)

    def leg_answered(self, leg: Leg, number: int, message: Message) -> None:
        with self._event(leg) as session:
            if session is None:
                return
            now = trio.current_time()
            if "e" in message.header:
                refused = lane.read_refusal(message.header)
                if refused.code == "too-long" and number in self._every_runs:  # others have fewer blocks
                    session.failed(leg.key, f"{refused.code}: {refused.message}", now, blame=False)
                    return
                session.refused(
                    leg.key, number, refused.code, refused.message, now, retry_after_s=refused.retry_after_s
                )
                return
            asked, position = self._every_runs.get(number, (0, 0))
            unpushed = message.header.get("unpushed") is True and not asked
            tokens = session.expected(number, unpushed=unpushed or asked > 0)
            if tokens is None or asked not in (0, leg.key):
                return
            try:
                if not asked:
                    hidden = self._read_hidden(message, tokens, leg)
                else:
                    keep = session.expected(number, unpushed=False)
                    hidden = self._read_every(message, leg, position, tokens, keep)
            except errors.RemoteProtocolError as error:
                session.failed(leg.key, f"answered a step with {error}", now)
            else:
                session.answered(leg.key, number, hidden, now, unpushed=unpushed)

    def leg_linked(self, leg: Leg, following: int, error: errors.RpcError | None) -> None:
        with self._event(leg) as session:
            if session is not None and error is None:
                session.linked(leg.key, following, trio.current_time())
            elif session is not None:
                logger.info("%s hands nothing on: %s", leg.hop.node.peer_id, error)
                session.not_linked(leg.key, following, trio.current_time())

    def leg_placed(self, leg: Leg, number: int, state: str) -> None:
        with self._event(leg) as session:
            if session is not None:
                session.placed(leg.key, number, state, trio.current_time())

    def _read_every(
        self, message: Message, leg: Leg, position: int, tokens: int, keep: int | None
    ) -> torch.Tensor | None:
        """Take what every block gave; returned is what the last one gave for the last ``keep`` tokens.

        Raises:
            RemoteProtocolError: it is not what it should be.
        """
        start, blocks = leg.hop.start, leg.hop.end - leg.hop.start
        hidden = self._read_hidden(message, tokens, leg, blocks)
        if hidden is None:
            raise errors.RemoteProtocolError("nothing")
        states = hidden.unflatten(0, (blocks, -1))  # [n, b, t, d]
        if self._every is not None:
            self._every.take(start, position, states)
        return states[-1][:, tokens - keep :].contiguous() if keep else None

    def _read_hidden(self, message: Message, tokens: int, leg: Leg, blocks: int = 1) -> torch.Tensor | None:
        """Never believe a node: form, shape and finiteness of what it returns.

        Args:
            message: the answer.
            tokens: that there should be.
            leg: whose answer it is.
            blocks: whose results there should be, along the rows.

        Shapes:
            returns: [blocks * b, tokens, d]

        Raises:
            RemoteProtocolError: they are not what they should be.
        """
        if not message.tensors:
            return None
        if len(message.tensors) != 1:
            raise errors.RemoteProtocolError(f"{len(message.tensors)} tensors")
        try:
            hidden, form = from_message(message.header, message.tensors[0], blocks * (self.batch or 1), self._width)
        except BadInput as error:
            raise errors.RemoteProtocolError(str(error)) from error
        if hidden.shape[1] != tokens:
            raise errors.RemoteProtocolError("another shape")
        if form != leg.request.form:
            raise errors.RemoteProtocolError(f"values in {form}")
        # Whoever is next may take them in a form with less room.
        if not torch.isfinite(hidden.to(torch.bfloat16)).all():
            raise errors.RemoteProtocolError("values that are not finite")
        return hidden

    def _piece_tokens(self, hidden: torch.Tensor) -> int:
        """How many tokens are sent in one message: a chunk of a prompt, if that fits."""
        rows, tokens, width = hidden.shape
        fitting = max(1, (MAX_FRAME_BYTES - MAX_HEADER_BYTES) // (rows * width * hidden.element_size()))
        if self._every is not None:  # as many come back of every block, and nodes compute no more than for training
            fitting = max(1, min(fitting, self.max_length) // self._longest_hop)
        return min(fitting, tokens if rows * tokens <= DECODE_TOKENS else max(1, CHUNK_TOKENS // rows))


def _check_finite(hidden: torch.Tensor) -> None:
    """Raises:
    InvalidInput: some values are not.
    """
    if not torch.isfinite(hidden).all():
        raise InvalidInput("hidden states that are not finite: the embeddings of this checkpoint are damaged")


def _gathered(outputs: Mapping[int, tuple[int, torch.Tensor]], position: int, end: int) -> torch.Tensor:
    """The results of tokens ``[position, end)`` out of pieces that may overlap: [b, end - position, d]."""
    parts = []
    for start in sorted(outputs):
        stop, hidden = outputs[start]
        if start <= position < stop:
            parts.append(hidden[:, position - start : end - start])
            position = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
