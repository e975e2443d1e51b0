"""A session: one growing batch of sequences on a chain of nodes.

It keeps what it sent (``journal.py``), so that nodes can be replaced: what to do about whatever happens is decided
without I/O (``session_core.py``), and carried out here, on a stream to each node (``legs.py``). The same pieces through
the same numerics give the same bits. A node that is only lost from sight is found again.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
import trio

from client import session_core as core
from client.choices import NO_CHOICES, Choices
from client.errors import ClientError, InvalidInput, MissingBlocks, UnknownModel
from client.journal import DECODE_TOKENS, Journal
from client.legs import FindNodes, Leg
from client.nearness import Nearness
from client.pricing import NOTHING_MEASURED, OVERHEAD_S, step_s
from client.routing import Hop, Measurements, Wishes, as_they_are, better_chain, choose_chain, seconds_per_token
from client.session_core import SessionCore
from compute.errors import BadInput
from compute.tensors import from_wire, to_wire
from net import errors
from net.host import Host
from net.identity import PeerId
from net.protocol import session as wire
from net.protocol.announcement import NodeAnnouncement, Numerics
from net.reputation import Reputation
from net.rpc import lane
from net.rpc.framing import MAX_FRAME_BYTES, MAX_HEADER_BYTES, Message, Tensor

logger = logging.getLogger(__name__)

BETTER_EVERY_S = 20.0, 30.0  # between looks whether other nodes have become better, at random
LEAST_GAIN_S = 0.005  # for each token: round trips on one network differ by as much from one moment to the next
REOPEN_S = 0.5  # what it costs to open a session elsewhere, beside what it takes to compute again what there was:
PROMPT_SPEEDUP = 10.0  # a tenth of what it took token by token
UNHINDERED = 0.25  # of a node's steps: these have hardly waited for others'
TOO_SLOW, TOO_SLOW_S = 2.0, 0.005  # times what a node announces, and so much more for all of its blocks: it is believed
# no longer, but what was measured
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
        nearness: Nearness | None = None,
        choices: Choices = NO_CHOICES,
    ) -> None:
        """Begin without a chain.

        Args:
            host: dials.
            find_nodes: who serves the model now.
            nursery: in which the session lives, from its first use until ``aclose``.
            reputation: what is known of nodes; it learns from what happens here.
            max_length: tokens to make room for; as many as the nodes allow by default.
            nearness: knows how far nodes are; by default all count as equally far.
            choices: which nodes may be used, and which blocks whoever uses the session computes before and after it.

        Raises:
            TypeError, InvalidInput: ``max_length`` is no whole number, or not above 0.
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
        self._nearness = nearness
        self._choices = choices
        self._journal = Journal()
        self._order: tuple[int, ...] = ()
        self._width = 0  # of hidden states
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
        """Open the chain for ``batch`` rows, if that has not been done. ``max_length`` is known afterwards.

        Raises:
            MissingBlocks, UnknownModel: no chain.
            SessionFailed: nodes refuse.
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
                await self.aclose()
                self.batch = None
            raise

    async def step(
        self, hidden: torch.Tensor, order: Sequence[int] | None = None, *, keep: int | None = None
    ) -> torch.Tensor:
        """Run all blocks on the next tokens.

        Args:
            hidden: their hidden states.
            order: for beam search: row ``i`` goes on from what row ``order[i]`` had.
            keep: of how many tokens, at the end, results are wanted; of all by default.

        Shapes:
            hidden: [b, t, d], fp32
            returns: [b, t or keep, d]

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
        if not torch.isfinite(hidden).all():
            raise InvalidInput("hidden states that are not finite: the embeddings of this checkpoint are damaged")
        position = self.position
        try:
            kept = min(keep or hidden.shape[1], hidden.shape[1])
            end = await self.begin(hidden, order, keep=kept)
            return await self.result(end - kept, end)
        except BaseException:
            self.stop()
            self.rollback(position)
            raise

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
            self._core = SessionCore(
                self._journal,
                self._choose,
                better=self._find_better,
                better_every_s=lambda: random.uniform(*BETTER_EVERY_S),
                own_blocks=self._choices.local_blocks,
            )
            self._core.mixed = self._choices.mixed_numerics
            self._scope, self._ended, self._bug = trio.CancelScope(), trio.Event(), None
            self._nursery = await self._parent.start(self._run)
        return self._core

    async def _run(self, *, task_status: trio.TaskStatus[trio.Nursery]) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._keep_time)
                    task_status.started(nursery)
        except Exception as error:  # noqa: BLE001  # raised by who waits: the swarm has other sessions
            self._bug = error
        finally:
            self._ended.set()
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
            self._journal.merge = not backend.endswith("-mixing")
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
                leg = self._legs[key] = Leg(key, hop, self._host, self._find_nodes, self)
                nursery.start_soon(leg.run, self._request(hop))
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
        hidden = action.payload
        if hidden is None:
            hidden = self._journal.get(action.position, action.end)
        dtype, shape, data = to_wire(hidden)
        message = Message(
            header={**self._fields(action), "m": "step"}, tensors=[Tensor(dtype=dtype, shape=shape, data=data)]
        )
        self._legs[action.leg].send(message)

    def _fields(self, action: core.Send | core.Resend) -> Mapping[str, object]:
        return wire.Step(
            id=action.run,
            position=action.position,
            push=action.push,
            keep=action.keep,
            order=self._order if action.with_order else None,
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
        )

    async def _find(self, fresh: bool) -> None:
        session = self._core
        try:
            nodes = await self._find_nodes(fresh=fresh)
        except (MissingBlocks, UnknownModel, errors.NetError) as error:
            found: list[NodeAnnouncement] | ClientError | errors.NetError = error
        else:
            found = [node for node in nodes if node.max_length > self._journal.end] or nodes
        if session is None or session is not self._core:
            return
        if isinstance(found, list):
            session.nodes_found(found, trio.current_time())
            if self._nearness is not None:
                self._nearness.look_at(self._usable(found))
        else:
            session.nodes_missing(found, trio.current_time())
        self._go_on()

    def _choose(
        self,
        nodes: Sequence[NodeAnnouncement],
        start: int,
        end: int,
        *,
        avoid: Mapping[PeerId, str],
        numerics: Numerics | None,
        before: NodeAnnouncement | None,
        after: NodeAnnouncement | None,
    ) -> list[Hop]:
        """The best hops there are, of nodes that have not failed others lately if there are enough of these."""
        wishes = replace(self._wishes(), start=start, end=end, numerics=numerics, before=before, after=after)
        measured = self._measured(nodes)
        avoided = self._reputation.avoided()
        if avoided:
            with suppress(MissingBlocks):
                return choose_chain(nodes, avoid={**avoided, **avoid}, wishes=wishes, measured=measured)
        try:
            return choose_chain(nodes, avoid=avoid, wishes=wishes, measured=measured)
        except MissingBlocks:
            if numerics is not None or not self._choices.mixed_numerics:
                raise
        return _mixed_chain(nodes, avoid, wishes, measured)

    def _find_better(
        self, nodes: Sequence[NodeAnnouncement], old: Sequence[Hop], *, avoid: Mapping[PeerId, str]
    ) -> list[Hop] | None:
        """Hops that are worth moving to, of nodes that have room for what the session is going to need."""
        wishes, own = self._wishes(), {hop.node.peer_id for hop in old}
        roomy = [
            node
            for node in nodes
            if node.peer_id in own
            or (node.max_length >= self.max_length and node.cache_tokens_left >= wishes.cache_tokens)
        ]
        measured = self._measured(nodes)
        # What we have computed there ourselves is a part of what waits there, on average.
        others = {node.peer_id: max(0.0, node.waiting - 1.0) for node in nodes if node.peer_id in own}
        measured = replace(measured, waiting=others)
        token_s = seconds_per_token(as_they_are(old, nodes), measured=measured)
        left = self.expected - self._journal.end
        wishes = replace(
            wishes,
            cache_tokens=0,  # the nodes in use have it already
            tokens_left=float(left) if left > 0 else wishes.tokens_left,
            replay_s=REOPEN_S + self._journal.end * token_s / PROMPT_SPEEDUP,
        )
        avoided = {**self._reputation.avoided(), **avoid}
        found = better_chain(roomy, old, avoid=avoided, wishes=wishes, measured=measured)
        better_s = math.inf if found is None else seconds_per_token(found, measured=measured)
        if found is None or token_s - better_s < LEAST_GAIN_S:
            return None
        logger.info("moves to other nodes: %.0f ms for a token instead of %.0f", 1000 * better_s, 1000 * token_s)
        return found

    def _wishes(self) -> Wishes:
        """What chains are wanted for."""
        tokens = max(self._journal.end, self._requested_length or self.expected)
        return replace(self._choices.to_wishes(), cache_tokens=(self.batch or 1) * tokens)

    def _usable(self, nodes: Sequence[NodeAnnouncement]) -> list[NodeAnnouncement]:
        """Those that a chain may come to have."""
        avoided, wishes = self._reputation.avoided(), self._choices.to_wishes()
        return [node for node in nodes if node.peer_id not in avoided and wishes.permits_peer(node.peer_id)]

    def _measured(self, nodes: Sequence[NodeAnnouncement]) -> Measurements:
        """What we know of nodes ourselves."""
        peers = {node.peer_id for node in nodes}
        slow = {node.peer_id: seconds for node in nodes if (seconds := self._slower_s(node)) is not None}
        return Measurements(
            round_trips={} if self._nearness is None else self._nearness.round_trips(peers),
            step_s=slow,
            failure_chance={peer: self._reputation.failure_chance(peer) for peer in peers},
            relayed={} if self._nearness is None else self._nearness.relayed(peers),
        )

    def _slower_s(self, node: NodeAnnouncement) -> float | None:
        """What a block has taken there for us, where that is far more than the node announces. What is measured from
        here is never as exact as what is measured there, and must not speak for nodes that we do not know.
        """
        seconds = self._reputation.latency_s(node.peer_id, UNHINDERED)
        if seconds is None:
            return None
        announced = step_s(node, NOTHING_MEASURED)
        excess_s = (seconds - announced) * (node.end - node.start)
        return seconds if seconds > TOO_SLOW * announced and excess_s > TOO_SLOW_S else None

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

    def leg_failed(self, leg: Leg, error: errors.PeerFailed) -> None:
        with self._event(leg) as session:
            if session is not None:
                session.failed(leg.key, error.reason, trio.current_time())

    def leg_refused(self, leg: Leg, error: InvalidInput) -> None:
        with self._event(leg) as session:
            if session is not None:
                session.forbidden(leg.key, error)

    def leg_lost(self, leg: Leg) -> None:
        with self._event(leg) as session:
            if session is not None:
                session.lost(leg.key)

    def leg_replaceable(self, leg: Leg, nodes: list[NodeAnnouncement]) -> bool:
        wishes = replace(self._choices.to_wishes(), start=leg.hop.start, end=leg.hop.end)
        try:
            choose_chain(nodes, avoid={leg.hop.node.peer_id: "lost"}, wishes=wishes)
        except MissingBlocks:
            return False
        return True

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
                session.refused(
                    leg.key, number, refused.code, refused.message, now, retry_after_s=refused.retry_after_s
                )
                return
            unpushed = message.header.get("unpushed") is True
            tokens = session.expected(number, unpushed=unpushed)
            if tokens is None:
                return
            try:
                hidden = self._read_hidden(message, tokens)
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
                session.not_linked(leg.key, trio.current_time())

    def leg_placed(self, leg: Leg, number: int, state: str) -> None:
        with self._event(leg) as session:
            if session is not None:
                session.placed(leg.key, number, state, trio.current_time())

    def _read_hidden(self, message: Message, tokens: int) -> torch.Tensor | None:
        """Never believe a node: shape, dtype and finiteness of what it returns.

        Raises:
            RemoteProtocolError: they are not what they should be.
        """
        if not message.tensors:
            return None
        if len(message.tensors) != 1:
            raise errors.RemoteProtocolError(f"{len(message.tensors)} tensors")
        tensor = message.tensors[0]
        if tensor.shape != (self.batch, tokens, self._width):
            raise errors.RemoteProtocolError("another shape")
        try:
            hidden = from_wire(tensor.dtype, tensor.shape, tensor.data)
        except BadInput as error:
            raise errors.RemoteProtocolError(str(error)) from error
        if hidden.dtype != torch.float32 or not torch.isfinite(hidden).all():
            raise errors.RemoteProtocolError("values that are not finite or of another type")
        return hidden

    def _piece_tokens(self, hidden: torch.Tensor) -> int:
        """How many tokens are sent in one message: a chunk of a prompt, if that fits."""
        rows, tokens, width = hidden.shape
        fitting = max(1, (MAX_FRAME_BYTES - MAX_HEADER_BYTES) // (rows * width * hidden.element_size()))
        return min(fitting, tokens if rows * tokens <= DECODE_TOKENS else max(1, CHUNK_TOKENS // rows))


def _gathered(outputs: Mapping[int, tuple[int, torch.Tensor]], position: int, end: int) -> torch.Tensor:
    """The results of tokens ``[position, end)`` out of pieces that may overlap: [b, end - position, d]."""
    parts = []
    for start in sorted(outputs):
        stop, hidden = outputs[start]
        if start <= position < stop:
            parts.append(hidden[:, position - start : end - start])
            position = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _mixed_chain(
    nodes: Sequence[NodeAnnouncement], avoid: Mapping[PeerId, str], wishes: Wishes, measured: Measurements
) -> list[Hop]:
    """The best hops, whatever each node computes with.

    Raises:
        MissingBlocks: there are none.
    """
    alike = [replace(node, numerics=nodes[0].numerics) for node in nodes]
    own = {node.peer_id: node for node in nodes}
    found = choose_chain(alike, avoid=avoid, wishes=replace(wishes, before=None, after=None), measured=measured)
    return [replace(hop, node=own[hop.node.peer_id]) for hop in found]
