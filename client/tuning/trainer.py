"""Whole batches through chains of nodes, forwards and back.

A batch is cut into parts of whole sequences, by its shape alone, so that its bits do not depend on who is there. Parts
are independent: they are spread over several chains, and follow one another through each. What goes into each hop is
kept here, so that a node that is lost costs its own hop of the parts that it had, and nothing else: others compute
these blocks, cut as they may be, from the same input. A gradient is counted when its part has come back through a
block, which is once: parts' gradients are put down by block, and added up in the order of the parts when all are there.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

import torch
import trio
from torch import Tensor

from client.choices import NO_CHOICES, Choices
from client.errors import InvalidInput, MissingBlocks, SessionFailed, UnknownModel
from client.legs import FindNodes
from client.pricing import NOTHING_MEASURED, Hop, Measurements, Wishes
from client.routing import choose_chain, spread
from client.tuning.calls import Caller
from compute.tuning import SpanTuning
from net import errors
from net.identity import PeerId
from net.protocol.announcement import NodeAnnouncement, Numerics
from net.reputation import Reputation

__all__ = ["Passed", "Trainer", "part_rows"]

logger = logging.getLogger(__name__)

PARTS: Final = 8  # of a batch, at least, if it has so many sequences: they follow one another through a chain
LEAST_TOKENS: Final = 256  # of a part, as far as sequences allow: fewer waste what loading weights costs
MOST_TOKENS: Final = 1024
MOST_ROWS: Final = 32  # that every node takes at once
PARTS_AT_NODE: Final = 3  # of ours, at once: one runs, one waits, one is on its way
PATIENCE_S: Final = 30.0  # for somebody to take over what nobody serves any more
AGAIN_S: Final = 0.25  # before the next look for somebody; twice as long each time, up to
MAX_AGAIN_S: Final = 2.0
OVERFLOWS: Final = frozenset({"bad-output", "not-finite"})
MAX_OVERFLOWS: Final = 3  # by one node, where there is no other
MAX_FAILURES: Final = 64  # of one part's way through one span, before it is given up

T = TypeVar("T")


def part_rows(rows: int, tokens: int) -> int:
    """How many sequences a part has, of a batch of ``rows`` sequences of ``tokens`` tokens."""
    wanted = min(max(rows * tokens // PARTS, LEAST_TOKENS), MOST_TOKENS)
    return max(1, min(rows, wanted // tokens, MOST_ROWS))


@dataclass(kw_only=True, eq=False)
class _Part:
    """Some sequences of a batch.

    Attributes:
        number: Its place among the parts.
        inputs: What went into each hop, by its first block: the hop, and hidden states [c, t, d].
        gradients: Of what is trained in each hop's blocks, by block, as they come.
    """

    number: int
    inputs: dict[int, tuple[Hop, Tensor]] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False)
class Passed:
    """What is kept of a batch on its way forward, for its way back.

    Attributes:
        start, end: Blocks [start, end).
        tuning: What was trained in them, as it was.
    """

    start: int
    end: int
    tuning: SpanTuning | None
    parts: list[_Part]


class Trainer:
    """See the module. For any number of batches at once; belongs to one event loop.

    Attributes:
        numerics: The class that all batches keep to, from the first one on.
    """

    def __init__(
        self,
        caller: Caller,
        find_nodes: FindNodes,
        reputation: Reputation,
        digest: str,
        *,
        choices: Choices = NO_CHOICES,
        measured: Callable[[Sequence[NodeAnnouncement]], Measurements] = lambda _: NOTHING_MEASURED,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Begin.

        Args:
            caller: Calls nodes.
            find_nodes: Who serves the model now; ``fresh=False`` for what is known without waiting.
            reputation: What is known of nodes; it learns from what happens here.
            digest: Of the model.
            choices: Which nodes may be used.
            measured: What is known of nodes beside what they announce.
            patience_s: For somebody to take over what nobody serves any more.
        """
        self._caller = caller
        self._find_nodes = find_nodes
        self._reputation = reputation
        self._digest = digest
        self._choices = choices
        self._measured = measured
        self._patience_s = patience_s
        self._limits: dict[PeerId, trio.CapacityLimiter] = {}
        self.numerics: Numerics | None = None

    async def forward(self, hidden: Tensor, start: int, end: int, tuning: SpanTuning | None) -> tuple[Tensor, Passed]:
        """Run blocks [start, end) on whole sequences.

        Args:
            hidden: Hidden states before block ``start``.
            start, end: Which blocks.
            tuning: What is trained in them.

        Shapes:
            hidden: [b, t, d]
            returns: [b, t, d], float32, and what :meth:`backward` needs

        Raises:
            InvalidInput: it cannot be computed.
            MissingBlocks, UnknownModel, SessionFailed: nobody can (any more), also after some patience.
        """
        pieces = hidden.split(part_rows(hidden.shape[0], hidden.shape[1]))  # [c, t, d] each
        chains = await self._chains(pieces, start, end)
        parts = [_Part(number=number) for number in range(len(pieces))]
        outputs: dict[int, Tensor] = {}

        async def run(part: _Part) -> None:
            outputs[part.number] = await self._through(part, pieces[part.number], chains[part.number], end, tuning)

        await _all([run(part) for part in parts])
        return torch.cat([outputs[part.number] for part in parts]), Passed(
            start=start, end=end, tuning=tuning, parts=parts
        )

    async def backward(self, passed: Passed, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of what went in, and of what is trained.

        Args:
            passed: From :meth:`forward`; it can be used once more after an error.
            gradient: With respect to what that gave.

        Shapes:
            gradient: [b, t, d]
            returns: [b, t, d], and [n], in the order of ``passed.tuning.flat()``; ``None`` without that

        Raises: as :meth:`forward`.
        """
        sizes = [part.inputs[passed.start][1].shape[0] for part in passed.parts]
        pieces = gradient.split(sizes)  # [c, t, d] each
        results: dict[int, Tensor] = {}

        async def run(part: _Part) -> None:
            part.gradients = {}
            upstream, at = pieces[part.number], passed.end
            while at > passed.start:
                begin = max(first for first in part.inputs if first < at)
                hop, hidden = part.inputs[begin]
                upstream = await self._back(part, hop, hidden, begin, at, upstream, passed.tuning)
                at = begin
            results[part.number] = upstream

        await _all([run(part) for part in passed.parts])
        hidden_gradient = torch.cat([results[part.number] for part in passed.parts])  # [b, t, d]
        return hidden_gradient, _summed(passed)

    # One part

    async def _through(
        self, part: _Part, hidden: Tensor, chain: Sequence[Hop], end: int, tuning: SpanTuning | None
    ) -> Tensor:
        """Forwards, up to block ``end``, along a chain as long as its nodes last; what goes into hops is kept."""
        ahead = list(chain)
        failures = _Failures(self._patience_s)
        while ahead:
            hop = ahead[0]
            try:
                output = await self._forward(hop, hidden, tuning)
            except errors.PeerFailed as error:
                self._note(hop, error)
                ahead = await self._instead(hop.start, end, failures.after(error))
                continue
            failures.forget()
            part.inputs[hop.start] = hop, hidden
            hidden = output
            ahead.pop(0)
        return hidden

    async def _back(
        self,
        part: _Part,
        hop: Hop,
        hidden: Tensor,
        start: int,
        end: int,
        gradient: Tensor,
        tuning: SpanTuning | None,
    ) -> Tensor:
        """Backwards from block ``end`` to ``start``, whose input is ``hidden``, by whoever can."""
        failures = _Failures(self._patience_s)
        chain = [replace(hop, start=start, end=end)]
        while True:
            try:
                if len(chain) == 1:
                    return await self._backward(part, chain[0], hidden, gradient, tuning)
            except errors.PeerFailed as error:
                self._note(chain[0], error)
                chain = await self._instead(start, end, failures.after(error))
                continue
            # Cut otherwise than on the way forward: what goes into the later hops is computed anew.
            again = _Part(number=part.number)
            await self._through(again, hidden, chain, end, tuning)
            at = end
            for begin in sorted(again.inputs, reverse=True):
                own_hop, own_hidden = again.inputs[begin]
                gradient = await self._back(part, own_hop, own_hidden, begin, at, gradient, tuning)
                at = begin
            return gradient

    async def _forward(self, hop: Hop, hidden: Tensor, tuning: SpanTuning | None) -> Tensor:
        async with self._limit(hop):
            output = await self._caller.forward(hop, self._digest, hidden, _of(tuning, hop))
        self._reputation.succeeded(hop.node.peer_id)
        return output

    async def _backward(
        self, part: _Part, hop: Hop, hidden: Tensor, gradient: Tensor, tuning: SpanTuning | None
    ) -> Tensor:
        own = _of(tuning, hop)
        async with self._limit(hop):
            given, flat = await self._caller.backward(hop, self._digest, hidden, gradient, own)
        self._reputation.succeeded(hop.node.peer_id)
        if own is not None and flat is not None:
            sizes = [own.part(block, block + 1).flat().numel() for block in range(hop.start, hop.end)]
            part.gradients |= dict(zip(range(hop.start, hop.end), flat.split(sizes), strict=True))
        return given

    def _limit(self, hop: Hop) -> trio.CapacityLimiter:
        return self._limits.setdefault(hop.node.peer_id, trio.CapacityLimiter(PARTS_AT_NODE))

    def _note(self, hop: Hop, error: errors.PeerFailed) -> None:
        self._reputation.failed(hop.node.peer_id, error.reason)
        logger.warning("blocks %d:%d are computed again elsewhere: %s", hop.start, hop.end, error)

    # Who does it

    async def _chains(self, pieces: Sequence[Tensor], start: int, end: int) -> list[Sequence[Hop]]:
        """A chain for each part, interleaved so that all are at work from the beginning."""
        c, t, d = pieces[0].shape
        wishes = replace(self._wishes(start, end), hidden_bytes=c * t * d * 4, work=float(c * t))
        shares = await self._found(
            lambda nodes, avoid: spread(nodes, len(pieces), avoid=avoid, wishes=wishes, measured=self._measured(nodes))
        )
        given = [0] * len(shares)
        chains: list[Sequence[Hop]] = []
        for _ in pieces:
            behind = [(count + 1) / share.batches for count, share in zip(given, shares, strict=True)]
            chosen = behind.index(min(behind))
            given[chosen] += 1
            chains.append(shares[chosen].chain)
        if self.numerics is None and chains[0]:
            self.numerics = chains[0][0].node.numerics
        return chains

    async def _instead(self, start: int, end: int, deadline: float) -> list[Hop]:
        """Who computes blocks [start, end) now that somebody has failed."""
        wishes = self._wishes(start, end)
        return await self._found(
            lambda nodes, avoid: choose_chain(nodes, avoid=avoid, wishes=wishes, measured=self._measured(nodes)),
            deadline,
        )

    def _wishes(self, start: int, end: int) -> Wishes:
        return replace(self._choices.to_wishes(), start=start, end=end, push=False, numerics=self.numerics)

    async def _found(
        self, choose: Callable[[list[NodeAnnouncement], Mapping[PeerId, str]], T], deadline: float | None = None
    ) -> T:
        """What is chosen of the nodes that serve, as soon as it can be.

        Args:
            choose: out of the nodes, but for those to avoid.
            deadline: until when to look after a failure, in the course of which those that failed are tried again,
                too; ``None`` before any.

        Raises:
            MissingBlocks, UnknownModel: there is nobody, also after some patience.
            NetError: nobody could be asked.
        """
        may_avoid_nobody = deadline is None
        deadline = trio.current_time() + self._patience_s if deadline is None else deadline
        delay_s, fresh = AGAIN_S, False
        while True:
            try:
                nodes = await self._find_nodes(fresh=fresh)
                try:
                    return choose(nodes, self._reputation.avoided())
                except MissingBlocks:
                    if not may_avoid_nobody:
                        raise
                return choose(nodes, {})
            except (MissingBlocks, UnknownModel, errors.NetError):
                if trio.current_time() >= deadline:
                    raise
            await trio.sleep(delay_s)
            delay_s, fresh, may_avoid_nobody = min(2 * delay_s, MAX_AGAIN_S), True, True


class _Failures:
    """Of one part in one place, one after another: nobody is tried for ever."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._count = 0
        self._since = 0.0
        self._overflows: list[object] = []  # who said so

    def after(self, error: errors.PeerFailed) -> float:
        """Until when to look for somebody else.

        Raises:
            InvalidInput: several say that the numbers overflow: it is not they who are to blame.
            SessionFailed: it has failed too often.
        """
        if not self._count:
            self._since = trio.current_time()
        self._count += 1
        if isinstance(error.__cause__, errors.RpcError) and error.__cause__.code in OVERFLOWS:
            self._overflows.append(error.peer_id)
            if len(set(self._overflows)) > 1 or len(self._overflows) >= MAX_OVERFLOWS:
                raise InvalidInput(
                    f"the blocks give NaN or infinity for these values, in {len(self._overflows)} tries: what is "
                    f"trained has diverged; take a lower learning rate, from a checkpoint before this"
                ) from error
        if self._count >= MAX_FAILURES:
            raise SessionFailed(f"given up after {self._count} failures, the last one of {error}") from error
        return self._since + self._patience_s

    def forget(self) -> None:
        """Somebody has done it."""
        self._count = 0


def _of(tuning: SpanTuning | None, hop: Hop) -> SpanTuning | None:
    return None if tuning is None else tuning.part(hop.start, hop.end)


def _summed(passed: Passed) -> Tensor | None:
    """Parts' gradients, added up in their order, block after block: [n]."""
    if passed.tuning is None:
        return None
    return torch.cat(
        [
            torch.stack([part.gradients[block] for part in passed.parts]).sum(dim=0)
            for block in range(passed.start, passed.end)
        ]
    )


async def _all(tasks: Sequence[Awaitable[None]]) -> None:
    """All of them at once; the first error ends the others."""
    failures: list[Exception] = []

    async def guarded(task: Awaitable[None], scope: trio.CancelScope) -> None:
        try:
            await task
        except Exception as error:  # noqa: BLE001  # raised below, without a group around it
            failures.append(error)
            scope.cancel()

    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(guarded, task, nursery.cancel_scope)
    if failures:
        raise failures[0]
