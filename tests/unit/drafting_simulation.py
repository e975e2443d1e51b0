"""A chain of nodes, a caller and run-ahead speculation between them, on a virtual clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

from client.drafting.base import Drafter
from client.drafting.measures import size_of
from client.drafting.policy import DraftPolicy
from client.drafting.runahead import HandOut, RunAhead, Send, SetBack, WantDraft

Results = tuple[int, ...]
Text = Callable[[Sequence[int]], int]  # the true next token of a context


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Nodes in a row, each of which does one step at a time, in the order in which they come.

    Attributes:
        round_s: all ways together.
        hops: nodes.
        step_s: that a node computes for one token.
        token_s: for each further one.
        own_s: of the caller, between a result and its next question.
        jitter: part of a step's seconds, and of all ways', that they may take longer.
        pads: nodes compute as many tokens as the next larger size has.
    """

    round_s: float = 0.05
    hops: int = 1
    step_s: float = 0.01
    token_s: float = 0.0005
    own_s: float = 0.001
    jitter: float = 0.0
    pads: bool = True

    def step_seconds(self, tokens: int) -> float:
        size = size_of(tokens) if self.pads and tokens <= 32 else tokens
        return self.step_s + (size - 1) * self.token_s

    def plain_seconds(self, tokens: int) -> float:
        return tokens * ((self.round_s + self.hops * self.step_seconds(1)) * (1 + self.jitter / 2) + self.own_s)


def digests(ids: Sequence[int]) -> list[int]:
    """One number per token that depends on it and all before it."""
    found, last = [], 0
    for token in ids:
        last = hash((last, token))
        found.append(last)
    return found


class Nodes:
    """What a chain computes: the digest of each token's context, as far as it was told."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def compute(self, piece: Send) -> Results:
        assert piece.position <= len(self.ids), "a hole in the session"
        self.ids = [*self.ids[: piece.position], *piece.tokens]
        return tuple(digests(self.ids)[piece.position :])


@dataclass(kw_only=True)
class Outcome:
    """Of a run: seconds for the tokens after the prompt, and what was sent."""

    seconds: float
    ids: list[int]
    new: int
    sent_tokens: int
    sent_pieces: int
    slow_drafts: int
    plain_s: float

    @property
    def speed_up(self) -> float:
        return self.plain_s / self.seconds


@dataclass(kw_only=True)
class SlowDrafter:
    """A drafter that takes ``seconds`` per token."""

    drafter: Drafter
    seconds: float


@dataclass(kw_only=True)
class Simulation:
    chain: Chain
    text: Text
    prompt: list[int]
    new: int
    quick: Drafter | None = None
    slow: SlowDrafter | None = None
    seed: int = 0
    chains_after: dict[int, Chain] = field(default_factory=dict)  # number of tokens -> from then on

    def run(self) -> Outcome:
        slow = None if self.slow is None else self.slow.drafter
        drafters = [drafter for drafter in (self.quick, slow) if drafter is not None]
        policy = DraftPolicy({drafter.name: drafter.grades for drafter in drafters})
        core: RunAhead[Results] = RunAhead(
            policy,
            quick=self.quick,
            slow=None if slow is None else slow.name,
            limit=len(self.prompt) + self.new,
        )
        random, chain = Random(self.seed), self.chain
        nodes, ids, asked_at = Nodes(), list(self.prompt), 0
        free = [0.0] * chain.hops
        order, now, began, plain_s = count(), 0.0, 0.0, 0.0
        sent_tokens = sent_pieces = slow_drafts = 0
        last_at = 0.0  # when the last result will come
        events: list[tuple[float, int, str, Any]] = [(0.0, next(order), "ask", ids[:])]
        context = digests(ids)
        while events:
            now, _, kind, data = heapq.heappop(events)
            if kind == "ask":
                asked_at = len(ids) - len(data)
                actions = core.ask(asked_at, data, now)
            elif kind == "result":
                piece, payload = data
                actions = core.result(piece.number, payload, now)
            else:
                draft, seconds = data
                actions = core.drafted(draft, seconds, now)
            for action in actions:
                if isinstance(action, Send):
                    sent_tokens += len(action.tokens)
                    sent_pieces += 1
                    at = now + chain.round_s * random.random() * chain.jitter
                    for hop in range(chain.hops):
                        at = max(at + chain.round_s / (chain.hops + 1), free[hop])
                        at += chain.step_seconds(len(action.tokens)) * (1 + random.random() * chain.jitter)
                        free[hop] = at
                    at = last_at = max(at + chain.round_s / (chain.hops + 1), last_at)
                    heapq.heappush(events, (at, next(order), "result", (action, nodes.compute(action))))
                elif isinstance(action, WantDraft):
                    assert self.slow is not None
                    slow_drafts += 1
                    draft = self.slow.drafter.propose(action.ids, action.count)
                    seconds = self.slow.seconds * max(len(draft.tokens), 1)
                    heapq.heappush(events, (now + seconds, next(order), "draft", (draft, seconds)))
                elif isinstance(action, HandOut):
                    expected = tuple(context[asked_at:])
                    assert action.payload[action.start : action.stop] == expected, "another context's results"
                    if not began:
                        began = now
                    if len(ids) == len(self.prompt) + self.new:
                        return Outcome(
                            seconds=now - began,
                            ids=ids,
                            new=self.new,
                            sent_tokens=sent_tokens,
                            sent_pieces=sent_pieces,
                            slow_drafts=slow_drafts,
                            plain_s=plain_s,
                        )
                    chain = self.chains_after.get(len(ids) - len(self.prompt), chain)
                    plain_s += chain.plain_seconds(1)
                    ids.append(self.text(ids))
                    context.append(hash((context[-1], ids[-1])))
                    heapq.heappush(events, (now + chain.own_s, next(order), "ask", ids[-1:]))
                else:
                    assert isinstance(action, SetBack)
        raise AssertionError("the caller was left waiting")
