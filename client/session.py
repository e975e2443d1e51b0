"""A session: one growing batch of sequences on a chain of nodes.

It keeps what it sent, so that a chain can be replaced: when a node fails, the session chooses another
chain without it, sends its history again in the same pieces, and goes on. The same pieces through the same
numerics give the same bits. A node whose connection breaks keeps what it has for a while: when it can be reached
in another way, or directly instead of through a relay, the session goes on there without sending anything again.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch
import trio

from client.errors import InvalidInput, MissingBlocks, SessionFailed
from client.routing import Hop, choose_chain
from compute.errors import BadInput
from compute.tensors import from_wire, to_wire
from net import errors
from net.host import Host
from net.identity import PeerId
from net.protocol import session as wire
from net.protocol.announcement import NodeAnnouncement
from net.rpc.framing import MAX_FRAME_BYTES, MAX_HEADER_BYTES, Message, Tensor
from net.rpc.lane import Lane
from net.swarm import Connection

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 8.0
STEP_TIMEOUT_S = 60.0
RESUME_S = 3.0  # for a node whose connection broke, before others are asked
MAX_REPLACEMENTS = 4  # chains tried for one step
BUSY_TRIES = 5
MAX_RETRY_AFTER_S = 10.0  # a node that wants to be left alone for longer is asked again all the same
# What a node may blame the caller for when a session is opened. Steps are checked here before they are sent, so that
# a node that refuses one is itself at fault.
CALLERS_FAULT = frozenset({"bad-input", "bad-value", "too-long"})

FindNodes = Callable[[], Awaitable[list[NodeAnnouncement]]]


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """What was sent in one step: where it starts, and the hidden states [b, t, d]."""

    position: int
    hidden: torch.Tensor

    @property
    def end(self) -> int:
        return self.position + self.hidden.shape[1]


@dataclass(kw_only=True, eq=False)
class _Leg:
    """A node of the chain, the stream to it, and what it calls the session."""

    node: NodeAnnouncement
    lane: Lane
    connection: Connection
    token: bytes | None = None


class Session:
    """See the module. Not for concurrent use; made by ``AsyncSwarm.session``.

    Attributes:
        chain: the hops in use; empty before the first step.
        position: tokens so far. ``rollback`` sets it back.
    """

    def __init__(self, host: Host, find_nodes: FindNodes, *, max_length: int | None = None) -> None:
        """Raises:
        TypeError, InvalidInput: ``max_length`` is no whole number, or not above 0.
        """
        if isinstance(max_length, bool) or not isinstance(max_length, int | None):
            raise TypeError(f"max_length is a number of tokens, not {type(max_length).__name__}")
        if max_length is not None and max_length < 1:
            raise InvalidInput(f"max_length is {max_length}: give a number of tokens above 0")
        self._host = host
        self._find_nodes = find_nodes
        self._requested_length = max_length
        self._legs: list[_Leg] = []
        self._failed: dict[PeerId, str] = {}  # who, and why
        self._may_forgive = True
        self._history: list[_Piece] = []
        self.chain: list[Hop] = []
        self.batch: int | None = None
        self.max_length = max_length or 0
        self.position = 0

    async def prepare(self, batch: int) -> None:
        """Open the chain for ``batch`` rows, if that has not been done. ``max_length`` is known afterwards.

        Raises:
            MissingBlocks: no chain.
            SessionFailed: nodes refuse.
            InvalidInput: the session has another number of rows.
        """
        if self.batch not in (None, batch):
            raise InvalidInput(f"the session has {self.batch} rows, not {batch}; open another with model.session()")
        self._may_forgive = True
        if not self._legs:
            await self._open_chain(batch)

    async def step(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run all blocks on the next tokens.

        Shapes:
            hidden: [b, t, d], fp32
            returns: [b, t, d]

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
        outputs = []
        for part in hidden.split(self._piece_tokens(hidden), dim=1):
            piece = _Piece(position=self.position, hidden=part.contiguous())
            outputs.append(await self._survive(piece))
            self._history.append(piece)
            self.position = piece.end
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]

    def rollback(self, position: int) -> None:
        """Forget all tokens from ``position`` on.

        Raises:
            InvalidInput: the session has fewer.
        """
        if not 0 <= position <= self.position:
            raise InvalidInput(f"cannot go back to {position}: the session has {self.position} tokens")
        kept = []
        for piece in self._history:
            if piece.end <= position:
                kept.append(piece)
            elif piece.position < position:
                kept.append(_Piece(position=piece.position, hidden=piece.hidden[:, : position - piece.position]))
        self._history = kept
        self.position = position

    async def aclose(self) -> None:
        """Free the session on its nodes."""
        legs, self._legs = self._legs, []
        for leg in legs:
            await leg.lane.aclose()

    # The chain

    async def _open_chain(self, batch: int) -> None:
        """Choose a chain, open the session on each of its nodes and send them the history.

        Another chain is tried when a node fails.
        """
        for attempt in range(MAX_REPLACEMENTS):
            chain = await self._choose()
            longest = min(wire.MAX_LENGTH, *(hop.node.max_length for hop in chain))
            self.max_length = min(longest, self._requested_length or longest)
            try:
                await self._open_hops(chain, batch)
                for earlier in self._history:
                    await self._through_chain(earlier)
            except errors.PeerFailed as error:
                logger.info("chain %d: %s", attempt, error)
                await self._give_up_on(error)
                continue
            except BaseException:  # refused or cancelled half-way: half a chain must not be taken for one
                with trio.CancelScope(shield=True):
                    await self.aclose()
                raise
            self.chain, self.batch = chain, batch
            return
        raise SessionFailed(
            f"{MAX_REPLACEMENTS} chains failed one after another, the last one for: {self._last_reason}; "
            f"the swarm may be overloaded: try again later"
        )

    async def _choose(self) -> list[Hop]:
        """A chain without the nodes that failed; when there is none, those get one more chance in each step.

        (A node may have ended the session because it was idle, or may have come back meanwhile.)
        """
        nodes = await self._find_nodes()
        try:
            return choose_chain(nodes, avoid=self._failed)
        except MissingBlocks:
            if not (self._failed and self._may_forgive):
                raise
        self._may_forgive = False
        self._failed.clear()
        return choose_chain(nodes)

    async def _open_hops(self, chain: list[Hop], batch: int) -> None:
        for hop in chain:
            request = wire.Open(
                digest=hop.node.digest, start=hop.start, end=hop.end, batch=batch, max_length=self.max_length
            )
            lane, connection = await self._open_lane(hop.node, OPEN_TIMEOUT_S)
            leg = _Leg(node=hop.node, lane=lane, connection=connection)
            self._legs.append(leg)
            answer = await self._call(lane, "open", Message(header=request.to_fields()), OPEN_TIMEOUT_S)
            try:
                leg.token = wire.read_token(answer.header) if "token" in answer.header else None
            except errors.RemoteProtocolError as error:
                raise errors.PeerFailed(lane.peer_id, f"opened a session with {error}") from error

    async def _open_lane(self, node: NodeAnnouncement, timeout_s: float) -> tuple[Lane, Connection]:
        """Raises:
        PeerFailed: no connection, or no stream on it.
        """
        try:
            with trio.fail_after(timeout_s):
                connection = await self._host.connect(node.peer_id, node.addresses)
                stream = await self._host.open_stream_over(connection, [wire.PROTOCOL_ID])
        except trio.TooSlowError as error:
            raise errors.PeerFailed(node.peer_id, f"no connection in {timeout_s:g} s") from error
        except errors.PeerFailed:
            raise
        except errors.NetError as error:
            raise errors.PeerFailed(node.peer_id, str(error)) from error
        return Lane(stream, node.peer_id), connection

    # Another way to the same nodes

    async def _resume(self, error: errors.PeerFailed) -> bool:
        """Whether a node whose connection broke, but which may be well, has the session again."""
        leg = next((leg for leg in self._legs if leg.lane.peer_id == error.peer_id), None)
        if (
            leg is None
            or leg.token is None
            or not isinstance(error.__cause__, errors.ConnectionLost | errors.StreamReset)
        ):
            return False
        with trio.move_on_after(RESUME_S):
            try:
                await self._move(leg, leg.node)
                return True
            except errors.PeerFailed as reason:
                logger.info("not resumed where it was: %s", reason)
            for node in await self._find_nodes():  # it may be somewhere else by now
                if node.peer_id == leg.node.peer_id and node.addresses != leg.node.addresses:
                    try:
                        await self._move(leg, node)
                        return True
                    except errors.PeerFailed as reason:
                        logger.info("not resumed at its new place: %s", reason)
        return False

    async def _leave_relays(self) -> None:
        """Move what goes through a relay, and need not any more."""
        for leg in self._legs:
            if leg.connection.relayed and leg.token is not None:
                best = self._host.swarm.connection(leg.lane.peer_id)
                if best is not None and not best.relayed:
                    try:
                        await self._move(leg, leg.node)
                    except errors.PeerFailed as error:
                        logger.info("goes on through the relay: %s", error)

    async def _move(self, leg: _Leg, node: NodeAnnouncement) -> None:
        """Go on with a node's session over another stream.

        Raises:
            PeerFailed: it cannot be had; the leg is as it was.
        """
        if leg.token is None:
            raise errors.PeerFailed(node.peer_id, "keeps no sessions")
        lane, connection = await self._open_lane(node, RESUME_S)
        try:
            await self._call(lane, "resume", Message(header={"token": leg.token}), RESUME_S)
        except BaseException:
            with trio.CancelScope(shield=True):
                await lane.aclose()
            raise
        old, leg.lane, leg.connection, leg.node = leg.lane, lane, connection, node
        await old.aclose()

    async def _give_up_on(self, error: errors.PeerFailed) -> None:
        if isinstance(error.peer_id, PeerId):
            self._failed[error.peer_id] = error.reason
        await self.aclose()

    @property
    def _last_reason(self) -> str:
        return next(reversed(self._failed.values()), "unknown")

    # Steps

    async def _survive(self, piece: _Piece) -> torch.Tensor:
        """One piece through the chain; through another one when a node fails."""
        for _ in range(MAX_REPLACEMENTS):
            try:
                if not self._legs:
                    await self._open_chain(piece.hidden.shape[0])
                await self._leave_relays()
                return await self._through_chain(piece)
            except errors.PeerFailed as error:
                if not await self._resume(error):
                    logger.warning("replacing a node: %s", error)
                    await self._give_up_on(error)
            except BaseException:  # refused or cancelled half-way: the hops may be at different positions
                with trio.CancelScope(shield=True):
                    await self.aclose()
                raise
        raise SessionFailed(
            f"{MAX_REPLACEMENTS} nodes failed during one step, the last one for: {self._last_reason}; try again later"
        )

    async def _through_chain(self, piece: _Piece) -> torch.Tensor:
        hidden = piece.hidden
        for leg in self._legs:
            lane = leg.lane
            dtype, shape, data = to_wire(hidden)
            message = Message(
                header={"position": piece.position}, tensors=[Tensor(dtype=dtype, shape=shape, data=data)]
            )
            answer = await self._call(lane, "step", message, STEP_TIMEOUT_S)
            hidden = self._read_hidden(lane, answer, piece.hidden)
        return hidden

    async def _call(self, lane: Lane, method: str, message: Message, timeout_s: float) -> Message:
        """A call whose refusals are sorted: ours, the node's for now, the node's for good."""
        why = ""
        for _ in range(BUSY_TRIES):
            try:
                return await lane.call(method, message, timeout_s=timeout_s)
            except errors.RpcError as error:
                if method == "open" and error.code in CALLERS_FAULT:
                    raise InvalidInput(error.message) from error
                if error.retry_after_s is None:
                    raise errors.PeerFailed(lane.peer_id, str(error)) from error
                why = error.message
                await trio.sleep(min(error.retry_after_s, MAX_RETRY_AFTER_S))
        raise errors.PeerFailed(lane.peer_id, f"put off {BUSY_TRIES} times in a row: {why}")

    def _read_hidden(self, lane: Lane, answer: Message, sent: torch.Tensor) -> torch.Tensor:
        """Never believe a node: shape, dtype and finiteness of what it returns."""
        if len(answer.tensors) != 1 or answer.tensors[0].shape != tuple(sent.shape):
            raise errors.PeerFailed(lane.peer_id, "answered a step with another shape")
        tensor = answer.tensors[0]
        try:
            hidden = from_wire(tensor.dtype, tensor.shape, tensor.data)
        except BadInput as error:
            raise errors.PeerFailed(lane.peer_id, f"answered a step with {error}") from error
        if hidden.dtype != sent.dtype or not torch.isfinite(hidden).all():
            raise errors.PeerFailed(lane.peer_id, "answered a step with values that are not finite or of another type")
        return hidden

    def _piece_tokens(self, hidden: torch.Tensor) -> int:
        """How many tokens fit into one message."""
        bytes_per_token = hidden.shape[0] * hidden.shape[2] * hidden.element_size()
        return max(1, (MAX_FRAME_BYTES - MAX_HEADER_BYTES) // bytes_per_token)
