"""When speculation pays: which drafts to send, how much of them, and how far to run ahead. No I/O, no clock.

The measure is tokens per second over the long run. Where that is R, a second is worth R tokens; so a draft is
lengthened while the tokens that it will probably add are more than R times the seconds that it adds to the step, and a
piece is sent before the verdict on those before it while what that probably saves is more than what it probably costs
if it is not wanted: the corrected step waits behind it.

Nothing is sent before a drafter has shown itself: its guesses are compared with the tokens that come, which costs
nothing. And what is lost is counted (``Balance``): a draft that could lose more than the allowance is not sent,
whatever its chances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Final

from client.drafting.measures import SIZES, Acceptance, Balance, StepCosts

_STAKE: Final = 0.5  # of the allowance, that may be lost at once


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """Bounds of speculation.

    Attributes:
        max_tokens: of one piece. Up to 32, a step has the bits of as many steps of one token.
        max_depth: pieces under way whose verdict is open.
        least_chance: of a token to be asked for; others are not sent, to spare the nodes.
        memory: what a guess counts after the next one like it.
        allowance_steps: what may be lost at the beginning, in steps of one token.
        allowance_share: what may be lost in the long run, as a part of what doing without takes.
        balance_steps: how much of what was saved may be lost again.
        probe_tokens: guesses of a slow drafter that decide whether it is any good.
        least_pause_tokens: after a probe that it failed, until the next; twice as long after each further one, up to
        most_pause_tokens: this.
    """

    max_tokens: int = SIZES[-1]
    max_depth: int = 4
    least_chance: float = 0.15
    memory: float = 0.98
    allowance_steps: float = 0.5
    allowance_share: float = 0.01
    balance_steps: float = 8.0
    probe_tokens: int = 8
    least_pause_tokens: int = 16
    most_pause_tokens: int = 256


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How many tokens of a draft to send, and what that is worth, in tokens; 0 and 0 for none."""

    count: int = 0
    worth: float = 0.0


NOTHING = Choice()


class DraftPolicy:
    """Decides from what it is told. Seconds are those of any steady clock.

    Use one for as long as a chain of nodes and its drafters last.
    """

    def __init__(self, drafters: dict[str, int], *, settings: PolicySettings | None = None) -> None:
        """Begin without any knowledge.

        Args:
            drafters: their names, and how many grades each has.
            settings: bounds.
        """
        self.settings = settings or PolicySettings()
        self._acceptance = {name: Acceptance(grades, memory=self.settings.memory) for name, grades in drafters.items()}
        self._draft_seconds: dict[str, float] = {}  # per token
        self._pauses = {name: _Pause(self.settings) for name in drafters}
        self.forget_costs()

    # What was seen

    def forget_costs(self) -> None:
        """The chain is another one: what was measured of the old one counts no more; drafters' worth does."""
        self._costs = StepCosts()
        self._balance = Balance(
            first_steps=self.settings.allowance_steps,
            share=self.settings.allowance_share,
            most_steps=self.settings.balance_steps,
        )
        self._own_s = 0.0  # of the caller, between a token's result and its asking for the next one
        self._wait_s: float | None = None  # mean, for a token's result

    def observe_guess(self, drafter: str, grade: int, hit: bool) -> None:
        """A guess was right or wrong, sent or not. Only those count before which all of the draft was right."""
        self._acceptance[drafter].observe(grade, hit)
        self._pauses[drafter].observe(useful=self._is_useful(drafter))

    def observe_draft(self, drafter: str, tokens: int, seconds: float) -> None:
        """Drafting took so long, for so many tokens."""
        if tokens:
            before = self._draft_seconds.get(drafter)
            sample = seconds / tokens
            self._draft_seconds[drafter] = sample if before is None else before + 0.2 * (sample - before)

    def observe_alone(self, tokens: int, seconds: float) -> None:
        """A piece that was sent with nothing under way came back after so long."""
        self._costs.observe_alone(tokens, seconds)

    def observe_behind(self, tokens: int, seconds: float, spacing: float) -> None:
        """A piece that was sent behind others came back after ``seconds``, ``spacing`` after the one before it."""
        if self._costs.is_known:
            self._costs.observe_behind(tokens, seconds, spacing)

    def observe_own(self, seconds: float) -> None:
        """The caller asked for its next token so long after it was given the last one."""
        self._own_s += 0.2 * (seconds - self._own_s)

    def observe_wait(self, seconds: float, *, plain: bool) -> None:
        """The caller waited so long for a token's result. ``plain``: as it would have without any speculation."""
        for pause in self._pauses.values():
            pause.tokens += 1
        if not self._costs.is_known:
            return
        single = self._costs.single
        self._balance.observe(0.0 if plain else single - seconds, single)
        before = single if self._wait_s is None else self._wait_s
        self._wait_s = before + (seconds - before) / 64

    # What to do

    def chances(self, drafter: str, grades: Sequence[int]) -> list[float]:
        """For each token of a draft, that it is right if those before it are."""
        return self._acceptance[drafter].chances(grades)

    def appended(self, chances: Sequence[float]) -> Choice:
        """How many drafted tokens to append to the one that is asked for.

        Args:
            chances: of the draft's tokens.
        """
        if not self._costs.is_known:
            return NOTHING
        reached = self._reached(chances, 1.0, self._most_tokens - 1)
        single, left = self._costs.single, self._balance.left(self._costs.single)
        best, expected = NOTHING, [0.0, *accumulate(reached)]
        for count in _counts(len(reached), beside=1):
            extra_s = self._costs.alone(1 + count) - single
            worth = expected[count] - self._rate * extra_s
            if extra_s <= left * _STAKE and worth > best.worth:
                best = Choice(count=count, worth=worth)
        return best

    def ahead(self, chances: Sequence[float], *, chance: float, verdict_s: float | None, last_s: float) -> Choice:
        """How many drafted tokens to send now, before it is known whether those before them were right.

        Args:
            chances: of the draft's tokens.
            chance: that all tokens under way before them are right.
            verdict_s: until the next result is here; ``None`` if all are, and the caller is about to ask.
            last_s: until the last result of all that is under way is here; below 0 if there is none.
        """
        if not self._costs.is_known:
            return NOTHING
        reached = self._reached(chances, chance, self._most_tokens)
        best, expected = NOTHING, [0.0, *accumulate(reached)]
        if not reached:
            return best
        verdict_s = self._own_s if verdict_s is None else verdict_s
        single, asked, left = self._costs.single, reached[0], self._balance.left(self._costs.single)
        for count in _counts(len(reached), beside=0):
            alone, behind = self._costs.alone(count), self._costs.behind(count)
            worth = expected[count] - asked * self._rate * (alone - single)
            now_s = max(alone, last_s + behind)
            saved_s = max(verdict_s + alone, last_s + behind) - now_s
            corrected_s = verdict_s + single
            busy_s = self._costs.behind(1)
            delay_s = max(corrected_s, now_s + busy_s) - max(corrected_s, last_s + busy_s)
            at_worst_s = max(alone, last_s + self._costs.behind(count, presumed=1.0)) + busy_s - corrected_s
            pays = asked * saved_s > (1 - asked) * delay_s
            if pays and at_worst_s <= left * _STAKE and worth > best.worth:
                best = Choice(count=count, worth=worth)
        return best

    def wanted(self, drafter: str, *, chance: float, rival: float) -> int:
        """How many tokens to have drafted by a drafter that takes its time; 0 to leave it alone.

        A drafter that is no good is tried again now and then.

        Args:
            drafter: its name.
            chance: that all tokens under way are right.
            rival: the chance of the next token of what other drafters have at hand; 0 if they have nothing.
        """
        if not self._costs.is_known:
            return 0
        acceptance, mean = self._acceptance[drafter], self._acceptance[drafter].mean
        if acceptance.tries < self.settings.probe_tokens or not self._is_useful(drafter):
            return int(self._pauses[drafter].is_over)
        if rival >= mean or chance * mean < self.settings.least_chance:
            return 0
        per_token = self._draft_seconds.get(drafter, 0.0)
        in_time = int(self._costs.behind(1) / per_token) if per_token > 0 else self.settings.max_tokens
        run = 2.0 / max(1.0 - mean, 1 / self.settings.max_tokens)  # twice as many as will probably be right
        return max(1, min(in_time, int(run), self.settings.max_tokens))

    def arrival_s(self, tokens: int, *, last_s: float) -> float | None:
        """Until a piece that is sent now is back; ``None`` if nobody knows."""
        if not self._costs.is_known or tokens > SIZES[-1]:
            return None
        return max(self._costs.alone(tokens), last_s + self._costs.behind(tokens))

    def _is_useful(self, drafter: str) -> bool:
        """Whether it is right often enough, and faster than the nodes."""
        per_token = self._draft_seconds.get(drafter, 0.0)
        in_time = not self._costs.is_known or per_token < self._costs.single + self._own_s
        return in_time and self._acceptance[drafter].mean >= self.settings.least_chance

    @property
    def _most_tokens(self) -> int:
        """Of a piece: what larger steps cost is found out one size at a time."""
        return min(self.settings.max_tokens, self._costs.next_size)

    @property
    def _rate(self) -> float:
        """Tokens per second in the long run, at least those of doing without."""
        single = self._costs.single
        wait = single if self._wait_s is None else min(self._wait_s, single)
        return 1.0 / max(wait + self._own_s, 1e-6)

    def _reached(self, chances: Sequence[float], chance: float, most: int) -> list[float]:
        """For each token that may be sent, that it will be asked for."""
        reached = list(accumulate(chances[:most], mul, initial=chance))[1:]
        return [value for value in reached if value >= self.settings.least_chance]


class _Pause:
    """When a slow drafter is tried: a few guesses at a time, and less often the longer it is no good."""

    def __init__(self, settings: PolicySettings) -> None:
        self.tokens = 0  # that the caller was given
        self._settings = settings
        self._until = 0
        self._pause = settings.least_pause_tokens
        self._guesses = 0

    @property
    def is_over(self) -> bool:
        return self.tokens >= self._until

    def observe(self, *, useful: bool) -> None:
        self._guesses += 1
        if self._guesses < self._settings.probe_tokens:
            return
        self._guesses = 0
        if useful:
            self._pause = self._settings.least_pause_tokens
        else:
            self._until = self.tokens + self._pause
            self._pause = min(2 * self._pause, self._settings.most_pause_tokens)


def _counts(most: int, *, beside: int) -> list[int]:
    """Lengths worth considering: those that fill a size that nodes pad to, with ``beside`` other tokens, and all."""
    return sorted({size - beside for size in SIZES if 0 < size - beside < most} | ({most} if most else set()))
