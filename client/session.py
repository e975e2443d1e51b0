"""A session: one growing batch of sequences on a chain of nodes.

It keeps what it sent, so that a chain can be replaced: when a node fails, the session chooses another
chain without it, sends its history again in the same pieces, and goes on. The same pieces through the same
numerics give the same bits. A node that is only lost from sight is found again (``legs.py``).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import torch
import trio

from client.errors import InvalidInput, MissingBlocks, SessionFailed, UnknownModel
from client.legs import FindNodes, Leg
from client.routing import Hop, choose_chain
from compute.errors import BadInput
from compute.tensors import from_wire, to_wire
from net import errors
from net.host import Host
from net.identity import PeerId
from net.protocol import session as wire
from net.protocol.announcement import NodeAnnouncement
from net.rpc.framing import MAX_FRAME_BYTES, MAX_HEADER_BYTES, Message, Tensor

logger = logging.getLogger(__name__)

STEP_TIMEOUT_S = 60.0
WAIT_S = 20.0  # of one step, for nodes that fail, while no others could take their place
OPENING_WAIT_S = 4.0  # the same, while nothing has been computed that could be lost
AGAIN_S = 0.5  # before the second try with a node that failed; twice as long before each further one, up to
MAX_AGAIN_S = 4.0
LOOK_S = 0.5  # before the next look at who is there


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """Why a node is avoided, when it may be tried again if nobody else can be, and how long that was put off."""

    reason: str
    again_at: float
    delay_s: float


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """What was sent in one step: where it starts, and the hidden states [b, t, d]."""

    position: int
    hidden: torch.Tensor

    @property
    def end(self) -> int:
        return self.position + self.hidden.shape[1]


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
        self._legs: list[Leg] = []
        self._failed: dict[PeerId, _Failure] = {}  # until they do a step
        self._gives_up_at: float | None = None  # set by the first failure in a step
        self._told = False  # in this step, that nodes are waited for
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
        self._gives_up_at, self._told = None, False
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
            await leg.aclose()

    # The chain

    async def _open_chain(self, batch: int) -> None:
        """Choose a chain, open the session on each of its nodes and send them the history.

        Another chain is tried when a node fails.
        """
        while True:
            chain = await self._choose()
            longest = min(wire.MAX_LENGTH, *(hop.node.max_length for hop in chain))
            self.max_length = min(longest, self._requested_length or longest)
            try:
                await self._open_hops(chain, batch)
                for earlier in self._history:
                    await self._through_chain(earlier)
            except errors.PeerFailed as error:
                logger.info("no chain: %s", error)
                await self._give_up_on(error)
                continue
            except BaseException:  # refused or cancelled half-way: half a chain must not be taken for one
                with trio.CancelScope(shield=True):
                    await self.aclose()
                raise
            self.chain, self.batch = chain, batch
            return

    async def _choose(self) -> list[Hop]:
        """A chain without the nodes that failed. While there is none, those are tried again, less and less often: they
        may have ended the session because it was idle, or come back.

        Raises:
            MissingBlocks, UnknownModel, NetError: there is no chain, and has been none for ``WAIT_S``; at once where
                no node has failed.
            SessionFailed: one node after another has failed for so long.
        """
        while True:
            try:
                return self._choose_from(await self._find_nodes())
            except (MissingBlocks, UnknownModel, errors.NetError) as error:
                if not self._failed or self._out_of_patience():
                    raise
                if not self._told:
                    logger.warning("waiting for nodes: %s", error)
                self._told = True
            await trio.sleep(LOOK_S)

    def _choose_from(self, nodes: list[NodeAnnouncement]) -> list[Hop]:
        try:
            chain = choose_chain(nodes, avoid={peer: failure.reason for peer, failure in self._failed.items()})
        except MissingBlocks:
            if self._out_of_patience():
                raise
            now = trio.current_time()
            not_yet = {peer: failure.reason for peer, failure in self._failed.items() if failure.again_at > now}
            return choose_chain(nodes, avoid=not_yet)
        if self._out_of_patience():
            last = next(reversed(self._failed.values())).reason
            raise SessionFailed(
                f"nodes failed one after another for {self._patience_s:g} s, the last one for: {last}; the swarm may "
                f"be overloaded: try again later"
            )
        return chain

    @property
    def _patience_s(self) -> float:
        return WAIT_S if self._history else OPENING_WAIT_S

    def _out_of_patience(self) -> bool:
        """Whether nodes have failed for too long in this step. Its first failure starts the clock."""
        if not self._failed:
            return False
        if self._gives_up_at is None:
            self._gives_up_at = trio.current_time() + self._patience_s
        return trio.current_time() >= self._gives_up_at

    async def _open_hops(self, chain: list[Hop], batch: int) -> None:
        self._legs = [Leg(self._host, hop, self._find_nodes) for hop in chain]
        async with _open_legs_nursery() as nursery:
            for leg in self._legs:
                nursery.start_soon(partial(leg.open, batch=batch, max_length=self.max_length))

    async def _give_up_on(self, error: errors.PeerFailed) -> None:
        if isinstance(error.peer_id, PeerId):
            before = self._failed.pop(error.peer_id, None)
            delay_s = 0.0 if before is None else min(max(AGAIN_S, 2 * before.delay_s), MAX_AGAIN_S)
            self._failed[error.peer_id] = _Failure(
                reason=error.reason, again_at=trio.current_time() + delay_s, delay_s=delay_s
            )
        await self.aclose()

    # Steps

    async def _survive(self, piece: _Piece) -> torch.Tensor:
        """One piece through the chain; through another one when a node fails."""
        while True:
            try:
                if not self._legs:
                    await self._open_chain(piece.hidden.shape[0])
                hidden = await self._attended(piece)
            except errors.PeerFailed as error:
                logger.warning("replacing a node: %s", error)
                await self._give_up_on(error)
                continue
            except BaseException:  # refused or cancelled half-way: the hops may be at different positions
                with trio.CancelScope(shield=True):
                    await self.aclose()
                raise
            for hop in self.chain:
                self._failed.pop(hop.node.peer_id, None)
            return hidden

    async def _attended(self, piece: _Piece) -> torch.Tensor:
        """The same, while somebody watches over all nodes: those that are not at work may be lost meanwhile."""
        async with _open_legs_nursery() as nursery:
            for leg in self._legs:
                nursery.start_soon(leg.keep)
            hidden = await self._through_chain(piece)
            nursery.cancel_scope.cancel()
        return hidden

    async def _through_chain(self, piece: _Piece) -> torch.Tensor:
        hidden = piece.hidden
        for leg in self._legs:
            dtype, shape, data = to_wire(hidden)
            message = Message(
                header={"position": piece.position}, tensors=[Tensor(dtype=dtype, shape=shape, data=data)]
            )
            answer = await leg.call("step", message, STEP_TIMEOUT_S)
            hidden = self._read_hidden(leg.hop.node.peer_id, answer, piece.hidden)
        return hidden

    def _read_hidden(self, peer_id: PeerId, answer: Message, sent: torch.Tensor) -> torch.Tensor:
        """Never believe a node: shape, dtype and finiteness of what it returns."""
        if len(answer.tensors) != 1 or answer.tensors[0].shape != tuple(sent.shape):
            raise errors.PeerFailed(peer_id, "answered a step with another shape")
        tensor = answer.tensors[0]
        try:
            hidden = from_wire(tensor.dtype, tensor.shape, tensor.data)
        except BadInput as error:
            raise errors.PeerFailed(peer_id, f"answered a step with {error}") from error
        if hidden.dtype != sent.dtype or not torch.isfinite(hidden).all():
            raise errors.PeerFailed(peer_id, "answered a step with values that are not finite or of another type")
        return hidden

    def _piece_tokens(self, hidden: torch.Tensor) -> int:
        """How many tokens fit into one message."""
        bytes_per_token = hidden.shape[0] * hidden.shape[2] * hidden.element_size()
        return max(1, (MAX_FRAME_BYTES - MAX_HEADER_BYTES) // bytes_per_token)


@asynccontextmanager
async def _open_legs_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery of tasks that each look after a node.

    Raises: what is no node's failure, if there is such a thing, or one of their failures.
    """
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        failures, others = group.split(errors.PeerFailed)
        found: BaseException | None = others or failures
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        raise (found or group) from (found and found.__cause__)
