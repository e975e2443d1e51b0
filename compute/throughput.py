"""What a node is worth: measured at start, kept per configuration for a day, announced anew when it has changed."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from compute.outcomes import outcome_file

VERSION: Final = 1  # of the method; another one measures anew
MAX_AGE_S: Final = 24 * 3600.0  # machines stay as they are for longer, their lines may not
ELEMENT_BYTES: Final = 4  # of hidden states on the wire, in float32

FACTOR: Final = 1.3  # a speed that differs by more from what was announced has changed ...
NEAR: Final = 1.15  # ... until it is as near as that again
PATIENCE_S: Final = 60.0  # a change that lasts so long is one: a compilation or a backup is none, a hot CPU is
MEMORY_S: Final = 20.0  # what is older hardly counts
MAX_WEIGHT: Final = 0.2  # of a single value, however long nothing had been measured
OUTLIER: Final = 3.0  # a value counts at most so many times what is thought now; 3 ** 0.2 is less than FACTOR
MIN_VALUES: Final = 15  # while it lasts; the average has come from an eighth by then


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What was measured.

    Attributes:
        decode_tokens_per_s: Of one session, one token at a time, through the whole span.
        prefill_tokens_per_s: Of one long prompt, through the whole span.
        network_bytes_per_s: Of what came and went, over the time for both; ``None`` if there was nobody to measure
            with.
    """

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    network_bytes_per_s: float | None

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            ValueError: One is not finite, or not positive.
        """
        for name, value in vars(self).items():
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}, expected a positive number")

    def effective_tokens_per_s(self, hidden_size: int, element_bytes: int = ELEMENT_BYTES) -> float:
        """What to announce. Raises: as the function of this name."""
        return effective_tokens_per_s(self.decode_tokens_per_s, self.network_bytes_per_s, hidden_size, element_bytes)


def effective_tokens_per_s(
    decode_tokens_per_s: float,
    network_bytes_per_s: float | None,
    hidden_size: int,
    element_bytes: int = ELEMENT_BYTES,
) -> float:
    """How many tokens a node can serve per second: what it computes, or what its line carries if that is less.

    A token comes in and goes out as ``hidden_size`` elements.

    Args:
        decode_tokens_per_s: Computed.
        network_bytes_per_s: As in ``Throughput``; ``None`` counts as no limit.
        hidden_size: Of the model.
        element_bytes: Of the type that its activations have, in which they travel by default.

    Raises:
        ValueError: ``hidden_size`` is less than 1.
    """
    if hidden_size < 1:
        raise ValueError(f"hidden_size is {hidden_size}, expected at least 1")
    if network_bytes_per_s is None:
        return decode_tokens_per_s
    return min(decode_tokens_per_s, network_bytes_per_s / (2 * element_bytes * hidden_size))


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What decides a node's speed, beside the machine, torch and its threads.

    Attributes:
        model: Digest of the model.
        blocks: Length of the span.
        linear: Backend of the linear layers.
        threads: Those that the engine was told to use; ``None`` for torch's own choice.
        devices: Where the blocks are.
    """

    model: str
    blocks: int
    linear: str
    threads: int | None
    devices: tuple[str, ...] = ("cpu",)


async def throughput(
    configuration: Configuration,
    folder: Path | None,
    measure: Callable[[], Awaitable[Throughput]],
    *,
    clock: Callable[[], float] = time.time,
    max_age_s: float = MAX_AGE_S,
) -> Throughput:
    """Measure, or say what was measured before.

    An outcome without the network is not kept: the next start may have somebody to measure it with.

    Args:
        configuration: What is measured.
        folder: Where the outcome is kept; ``None`` to forget it.
        measure: Does the work.
        clock: Seconds since 1970, the same after a restart. When it was set back, everything is measured anew.
        max_age_s: What is older is measured anew.

    Raises: what ``measure`` raises.
    Cancellation: nothing is kept, or all of it.
    """
    if folder is None:
        return await measure()
    file = outcome_file(folder, "throughput", [VERSION, *asdict(configuration).values()])
    known = await trio.to_thread.run_sync(file.read, partial(_parse, now=clock(), max_age_s=max_age_s))
    if known is not None:
        return known
    outcome = await measure()
    if outcome.network_bytes_per_s is not None:
        await trio.to_thread.run_sync(file.write, {"measured_at": clock(), **asdict(outcome)})
    return outcome


def _parse(content: Mapping[str, Any], *, now: float, max_age_s: float) -> Throughput:
    """Raises:
    ValueError, KeyError, TypeError: That is too old, or nothing that we have written.
    """
    age_s = now - content["measured_at"]
    if not 0.0 <= age_s <= max_age_s:
        raise ValueError(f"measured {age_s:.0f} s ago")
    names = Throughput.__dataclass_fields__
    return Throughput(**{name: float(content[name]) for name in names})


class Drift:
    """Whether a speed is still what was announced. No I/O.

    Values are averaged as ratios (their logarithms), the past fades, and none counts for more than a little, so that
    an outlier alone never is a change. The average has to leave ``FACTOR`` either way and stay away, that is not come
    within ``NEAR`` again, for ``PATIENCE_S`` and ``MIN_VALUES`` values. Then it is what should be announced, unless the
    value at hand is near what was announced: the average may be what is left of something that is over.

    Attributes:
        announced: What was announced last.
    """

    def __init__(self, announced: float, now: float) -> None:
        """Begin with what is announced.

        Raises:
            ValueError: ``announced`` is not finite, or not positive.
        """
        self._average = _logarithm(announced)
        self.announced = announced
        self._seen_at = now
        self._away_since: float | None = None
        self._away_values = 0

    def observe(self, value: float, now: float) -> float | None:
        """Take note of a value, measured just now.

        Args:
            value: In the unit of what was announced.
            now: Seconds, on a clock that does not go back.

        Returns:
            What to announce, once it has changed, and from then on is taken for announced; ``None`` otherwise.

        Raises:
            ValueError: ``value`` is not finite, or not positive.
        """
        now_at, announced_at = _logarithm(value), math.log(self.announced)
        weight = min(MAX_WEIGHT, 1.0 - math.exp((self._seen_at - now) / MEMORY_S))
        most = math.log(OUTLIER)
        self._average += weight * max(-most, min(most, now_at - self._average))
        self._seen_at = now
        distance = abs(self._average - announced_at)
        if distance <= math.log(NEAR):
            self._away_since = None
        elif self._away_since is None and distance > math.log(FACTOR):
            self._away_since, self._away_values = now, 0
        if self._away_since is None:
            return None
        self._away_values += 1
        lasts = now - self._away_since >= PATIENCE_S and self._away_values >= MIN_VALUES
        if not lasts or abs(now_at - announced_at) <= math.log(NEAR):
            return None
        self.announced = math.exp(self._average)
        self._away_since = None
        return self.announced


def _logarithm(value: float) -> float:
    """Raises:
    ValueError: it has none that is finite.
    """
    if not 0.0 < value < math.inf:
        raise ValueError(f"a speed of {value!r}, expected a positive number")
    return math.log(value)
