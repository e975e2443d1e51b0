"""What is known of drafters and of the chain of nodes, from what was seen of them. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

SIZES: Final = (1, 2, 4, 8, 16, 32)  # tokens of a step that nodes pad to
_ADOPTED: Final = 0.2  # of a new measurement
_PER_TOKEN: Final = 0.05  # of a step of one token, that each further one is presumed to cost
_OCCUPIED: Final = 0.5  # of a step's seconds, in which it is presumed to keep the next one waiting
_WAITED: Final = 1.1  # times the seconds that a step takes alone: it was kept waiting by others
_OTHERWISE: Final = 1.5  # times slower or quicker: steps are not what they were


class Acceptance:
    """How often one drafter's guesses came true, lately, by their grade."""

    def __init__(self, grades: int, *, memory: float) -> None:
        """Begin without any trust.

        Args:
            grades: how many there are.
            memory: what a guess of a grade counts after the next one of that grade, between 0 and 1.
        """
        self._memory = memory
        self._hits = [0.0] * grades
        self._tries = [0.0] * grades
        self._chances = [0.0] * grades
        self._all_hits = self._all_tries = 0.0

    def observe(self, grade: int, hit: bool) -> None:
        """A guess of ``grade`` was right or wrong."""
        self._hits[grade] = self._hits[grade] * self._memory + hit
        self._tries[grade] = self._tries[grade] * self._memory + 1
        self._all_hits = self._all_hits * self._memory + hit
        self._all_tries = self._all_tries * self._memory + 1
        below = 0.0
        for index, (hits, tries) in enumerate(zip(self._hits, self._tries, strict=True)):
            below = (hits + 2 * below) / (tries + 2)  # what is not known of a grade, the next lower one says
            self._chances[index] = below

    def chances(self, grades: Sequence[int]) -> list[float]:
        """For each token of a draft, that it is right if those before it are."""
        return [self._chances[grade] for grade in grades]

    @property
    def mean(self) -> float:
        """Over all grades as they come."""
        return self._all_hits / (self._all_tries + 2)

    @property
    def tries(self) -> float:
        """How many guesses the mean is made of; old ones count less."""
        return self._all_tries


class StepCosts:
    """Seconds that steps take through the chain, by how many tokens they have."""

    def __init__(self) -> None:
        """Begin without any knowledge."""
        self._alone: dict[int, float] = {}  # by size
        self._occupied: dict[int, float] = {}  # by size: the part in which the next step is kept waiting
        self._largest = 0  # size that was seen

    @property
    def is_known(self) -> bool:
        """Whether a step of one token was measured, to which all others compare."""
        return 1 in self._alone

    @property
    def single(self) -> float:
        """Seconds of a step of one token; known only if ``is_known``."""
        return self._alone[1]

    @property
    def next_size(self) -> int:
        """The largest that should be tried: the one after the largest that was seen."""
        return next((size for size in SIZES if size > self._largest), SIZES[-1])

    def alone(self, tokens: int) -> float:
        """Seconds of a step with nothing else under way, at least those of a single token."""
        size = size_of(tokens)
        if size in self._alone:
            return max(self._alone[size], self.single)
        lower = max(known for known in self._alone if known < size)
        slope = self.single * _PER_TOKEN
        if lower > 1:
            slope = max((self._alone[lower] - self.single) / (lower - 1), 0.0)
        return max(self._alone[lower], self.single) + slope * (size - lower)

    def behind(self, tokens: int, *, presumed: float = _OCCUPIED) -> float:
        """Seconds after the step before it, if it was sent well before that one came back.

        Args:
            tokens: how many it has.
            presumed: the part of its seconds that this is while nothing is known.
        """
        size = size_of(tokens)
        nearest = min(self._occupied, key=lambda known: abs(SIZES.index(known) - SIZES.index(size)), default=None)
        return self.alone(tokens) * (presumed if nearest is None else self._occupied[nearest])

    def observe_alone(self, tokens: int, seconds: float) -> None:
        """A step with nothing else under way took so long.

        What it says of the chain's load as a whole, it says of steps of other sizes, too.
        """
        size = size_of(tokens)
        self._largest = max(self._largest, size)
        before = self._alone.get(size)
        if before is None or before <= 0:
            self._alone[size] = seconds
            return
        change = min(max(seconds / before, 0.5), 2.0) ** _ADOPTED
        self._alone = {known: value * change for known, value in self._alone.items()}

    def observe_behind(self, tokens: int, seconds: float, spacing: float) -> None:
        """A step that was sent behind others came back after ``seconds``, ``spacing`` after the one before it."""
        alone = self.alone(tokens)
        if alone <= 0:
            return
        share = min(spacing / alone, 1.0)
        size = size_of(tokens)
        self._largest = max(self._largest, size)
        before = self._occupied.get(size, self.behind(tokens) / alone)
        if seconds > _WAITED * alone or share < before:  # else the spacing is only that of sending
            self._occupied[size] = before + _ADOPTED * (share - before)


class Balance:
    """What speculation has saved and cost against doing without, so that its losses can be kept within an allowance.

    All in seconds. Losses that gains of long ago would have to make up for are not allowed: what is saved is kept up
    to a bound. Where steps have become so much slower or quicker that it was counted with wrong ones, the count begins
    anew.
    """

    def __init__(self, *, first_steps: float, share: float, most_steps: float) -> None:
        """Args:
        first_steps: the allowance to begin with, in steps of one token.
        share: what each token adds to it, in such steps.
        most_steps: the most that is kept, in such steps.
        """
        self._first_steps = first_steps
        self._share = share
        self._most_steps = most_steps
        self._left = 0.0
        self._single = 0.0  # when the count began

    def left(self, single: float) -> float:
        """What may be lost now. ``single``: seconds of a step of one token."""
        if not self._single / _OTHERWISE <= single <= self._single * _OTHERWISE:
            self._left, self._single = self._first_steps * single, single
        return self._left

    def observe(self, saved: float, single: float) -> None:
        """A token has come, ``saved`` seconds earlier than it would have without."""
        self._left = min(self.left(single) + self._share * single + saved, self._most_steps * single)


def size_of(tokens: int) -> int:
    """The size that a step of so many tokens is padded to."""
    return next((size for size in SIZES if tokens <= size), SIZES[-1])
