"""How long work takes, learned from what it took. No I/O, no torch.

A *pass* is one block run over some tokens. What is learned is seconds per pass, by kind of work and by bucket of
tokens, as an average in which the past fades. Decode batches are padded to their bucket and cost what the bucket
costs; all other work costs in proportion to its tokens, at its bucket's price.
"""

from __future__ import annotations

import enum
from typing import Final

WEIGHT: Final = 0.2  # of a new measurement; twenty of them forget the first
OUTLIER: Final = 4.0  # a measurement counts at most this many times the estimate: a suspended machine is no slow one


class Tier(enum.IntEnum):
    """Classes of work, the first before the next."""

    DECODE = 0
    PREFILL = 1
    TRAINING = 2


TIERS: Final = tuple(Tier)  # asking an enumeration for its members takes its time, and every step asks


class Kind(enum.Enum):
    """What a job does; the two halves of training take different times.

    Attributes:
        label: Its name, for people and metrics.
        tier: The class whose share of time it uses.
    """

    DECODE = ("decode", Tier.DECODE)
    PREFILL = ("prefill", Tier.PREFILL)
    FORWARD = ("forward", Tier.TRAINING)
    BACKWARD = ("backward", Tier.TRAINING)

    def __init__(self, label: str, tier: Tier) -> None:
        """Called by the enumeration for each member."""
        self.label = label
        self.tier = tier

    __hash__ = object.__hash__  # the enumeration's own goes through Python


class Estimates:
    """Measured times, and guesses from them where nothing was measured."""

    def __init__(self) -> None:
        self._pass_s: dict[Kind, dict[int, float]] = {kind: {} for kind in Kind}

    def learn(self, kind: Kind, tokens: int, passes: int, took_s: float) -> None:
        """Take note of ``passes`` passes over ``tokens`` tokens (the padded bucket, of a decode batch)."""
        bucket = _bucket(tokens)
        measured = took_s / passes * self._scale(kind, bucket, tokens)
        known = self._pass_s[kind]
        before = known.get(bucket)
        known[bucket] = measured if before is None else before + WEIGHT * (min(measured, OUTLIER * before) - before)

    def seconds(self, kind: Kind, tokens: int, passes: int) -> float | None:
        """What that will take; ``None`` while nothing of the kind was measured.

        From another bucket than the work's own, the guess is too high rather than too low: more tokens cost in
        proportion, fewer decode rows cost the same.
        """
        known = self._pass_s[kind]
        if not known:
            return None
        bucket = _bucket(tokens)
        nearest = min(known, key=lambda each: (abs(each.bit_length() - bucket.bit_length()), each))
        ratio = bucket / nearest
        if kind is Kind.DECODE:
            ratio = max(1.0, ratio)
        return known[nearest] * ratio * passes / self._scale(kind, bucket, tokens)

    @staticmethod
    def _scale(kind: Kind, bucket: int, tokens: int) -> float:
        return 1.0 if kind is Kind.DECODE else bucket / tokens


def _bucket(tokens: int) -> int:
    """The least power of two that holds them."""
    return 1 << (tokens - 1).bit_length()
