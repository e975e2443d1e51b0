"""What we have seen of each peer ourselves: whether it did what it was asked to, and how fast. No stranger has a say.

A peer that fails is avoided for a second, for two when it fails again after that, and so on up to ten minutes; then it
is tried again. A success ends that and halves what comes next. Beside it, successes, failures and latencies are
counted, and all of it fades by half within an hour of the clock, whether or not anything happens.

On disk this is one JSON file, replaced as a whole:

    {"version": 1, "saved_at": float, "peers": {PeerId in base58: {
        "age_s": float,                             since the last success or failure, at which all counts are as given
        "successes": float, "failures": float,
        "delay_s": float, "avoided_s": float,       for how long it was avoided last, and still is
        "reason": str,                              of the last failure
        "latencies": {bucket: float}}}}             counts

``saved_at`` is Unix time, the only time that lasts; everything else is relative to it. When it is read, the time that
went by counts as nothing if the clock was set back, and as ``MAX_AWAY_S`` at most. What is out of bounds is a damaged
file: it is set aside and everything begins anew.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from net.identity import PeerId
from net.replacing import replace_file

__all__ = ["Reputation"]

logger = logging.getLogger(__name__)

VERSION: Final = 1
MAX_PEERS: Final = 4096  # the least recently seen go first
MAX_FILE_BYTES: Final = 8 * 2**20  # 2 KB for each
MAX_REASON_CHARACTERS: Final = 200
SAVE_EVERY_S: Final = 5.0
MAX_AWAY_S: Final = 30 * 24 * 3600.0
FIRST_DELAY_S: Final = 1.0
MAX_DELAY_S: Final = 600.0
HALF_LIFE_S: Final = 3600.0
MAX_COUNT: Final = 1e9

PRIOR_CHANCE: Final = 0.001  # that a stranger fails, believed as firmly as ...
PRIOR_WEIGHT: Final = 10.0  # ... so many attempts: one failure of a stranger makes it 9 %

# Latencies are counted in buckets, each reaching 2^(1/4) times as far as the one before: an error of 9 % either way.
LEAST_LATENCY_S: Final = 1e-4
BUCKETS_PER_OCTAVE: Final = 4
BUCKETS: Final = 84  # up to 209 s
LATENCY_MEMORY: Final = 200  # what came before so many counts a third: enough for the slowest one in a hundred
MIN_LATENCIES: Final = 8  # before anything is said about them

BASE58: Final = re.compile(r"[1-9A-HJ-NP-Za-km-z]{1,128}")


@dataclass(kw_only=True)
class _Entry:
    """One peer, at the last success or failure, ``at`` on our clock."""

    at: float
    successes: float = 0.0
    failures: float = 0.0
    delay_s: float = 0.0
    avoid_until: float = -math.inf
    reason: str = ""
    latencies: dict[int, float] = field(default_factory=dict)

    def fade(self, now: float) -> None:
        """Bring it to ``now``. What comes next fades from the moment on at which the peer is avoided no more."""
        self.delay_s *= _rest(now - max(self.at, self.avoid_until))
        rest = _rest(now - self.at)
        self.successes *= rest
        self.failures *= rest
        self.latencies = {bucket: count * rest for bucket, count in self.latencies.items() if count * rest > 1e-3}
        self.at = max(self.at, now)


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """Everything at one moment, ``at`` on our clock, for another thread to write."""

    entries: Mapping[PeerId, _Entry]
    at: float
    wall_at: float

    def spell(self) -> str:
        return json.dumps(
            {
                "version": VERSION,
                "saved_at": self.wall_at,
                "peers": {
                    peer_id.to_base58(): {
                        "age_s": max(0.0, self.at - entry.at),
                        "successes": entry.successes,
                        "failures": entry.failures,
                        "delay_s": entry.delay_s,
                        "avoided_s": max(0.0, entry.avoid_until - self.at),
                        "reason": entry.reason,
                        "latencies": {str(bucket): count for bucket, count in entry.latencies.items()},
                    }
                    for peer_id, entry in self.entries.items()
                },
            }
        )


class Reputation:
    """See the module. Not for several threads.

    Args:
        path: where it is kept; None to forget it. What lies there is read now.
        clock: seconds, rising, of this process.
        wall_clock: Unix time.
    """

    def __init__(
        self,
        path: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._clock = clock
        self._wall_clock = wall_clock
        self._entries: OrderedDict[PeerId, _Entry] = OrderedDict()  # the least recently seen first
        self._changed = False
        self._saved_at = -math.inf
        self._is_refused = False  # by the disk, the last time
        if path is not None:
            self._load(path)

    def __len__(self) -> int:
        return len(self._entries)

    # What happened

    def succeeded(self, peer_id: PeerId, latency_s: float | None = None) -> None:
        """The peer did what it was asked to.

        Args:
            peer_id: who.
            latency_s: how long that took; None where this says nothing about the next time. Give those of one kind:
                sessions give what a block took for a step of one token.
        """
        entry = self._seen(peer_id)
        entry.successes += 1.0
        entry.avoid_until = -math.inf
        entry.delay_s = entry.delay_s / 2 if entry.delay_s >= 2 * FIRST_DELAY_S else 0.0
        if latency_s is not None:
            rest = 1.0 - 1.0 / LATENCY_MEMORY
            entry.latencies = {bucket: count * rest for bucket, count in entry.latencies.items()}
            bucket = _bucket(latency_s)
            entry.latencies[bucket] = entry.latencies.get(bucket, 0.0) + 1.0

    def failed(self, peer_id: PeerId, reason: str) -> None:
        """The peer did not do what it was asked to, or wrongly, or not in time.

        It is avoided from now on. Several failures at once, of several sessions, make that no longer.
        """
        entry, now = self._seen(peer_id), self._clock()
        entry.failures += 1.0
        entry.reason = reason[:MAX_REASON_CHARACTERS]
        if now >= entry.avoid_until:
            entry.delay_s = min(max(FIRST_DELAY_S, 2 * entry.delay_s), MAX_DELAY_S)
            entry.avoid_until = now + entry.delay_s

    # What follows

    def avoid_until(self, peer_id: PeerId) -> float:
        """Until when the peer is to be avoided, on our clock; in the past if it is not."""
        entry = self._entries.get(peer_id)
        return -math.inf if entry is None else entry.avoid_until

    def avoided(self) -> dict[PeerId, str]:
        """Those that are avoided now, and what they did."""
        now = self._clock()
        return {peer: entry.reason for peer, entry in self._entries.items() if now < entry.avoid_until}

    def failure_chance(self, peer_id: PeerId) -> float:
        """How likely the next attempt fails, by those so far, the latest ones above all."""
        entry = self._entries.get(peer_id)
        if entry is None:
            return PRIOR_CHANCE
        rest = _rest(self._clock() - entry.at)
        attempts = rest * (entry.successes + entry.failures)
        return (rest * entry.failures + PRIOR_CHANCE * PRIOR_WEIGHT) / (attempts + PRIOR_WEIGHT)

    def latency_s(self, peer_id: PeerId, quantile: float) -> float | None:
        """What this share of the peer's answers took at most; None while hardly any are known.

        Args:
            peer_id: whose.
            quantile: 0.5 for the median, up to 1.
        """
        entry = self._entries.get(peer_id)
        if entry is None:
            return None
        total = sum(entry.latencies.values())
        if total * _rest(self._clock() - entry.at) < MIN_LATENCIES:
            return None
        below = 0.0
        for bucket in sorted(entry.latencies):
            below += entry.latencies[bucket]
            if below >= quantile * total:
                break
        return _latency(bucket)

    def _seen(self, peer_id: PeerId) -> _Entry:
        now = self._clock()
        entry = self._entries.setdefault(peer_id, _Entry(at=now))
        self._entries.move_to_end(peer_id)
        entry.fade(now)
        self._changed = True
        while len(self._entries) > MAX_PEERS:
            self._entries.popitem(last=False)
        return entry

    # What lasts

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what has changed every ``SAVE_EVERY_S``, until cancelled.

        Cancellation: keeps it once more.
        """
        task_status.started()
        try:
            while True:
                await trio.sleep(SAVE_EVERY_S)
                if self._path is not None and self._changed:
                    self._note(await trio.to_thread.run_sync(partial(_write, self._path, self._snapshot())))
        finally:
            self.save(at_once=True)

    def save(self, *, at_once: bool = False) -> bool:
        """Keep what has changed, unless that was done less than ``SAVE_EVERY_S`` ago; whoever has an event loop to
        care for lets ``run`` do it. A disk that does not take it is a warning.

        Args:
            at_once: however short a time ago.

        Returns: whether it was written.
        """
        too_early = self._clock() - self._saved_at < SAVE_EVERY_S and not at_once
        if self._path is None or not self._changed or too_early:
            return False
        self._note(_write(self._path, self._snapshot()))
        return not self._is_refused

    def _note(self, error: OSError | None) -> None:
        """What became of it. The disk is complained of once."""
        if error is not None and not self._is_refused:
            logger.warning("what is known of peers cannot be kept in %s: %s", self._path, error)
        self._is_refused = error is not None

    def _snapshot(self) -> _Snapshot:
        """What is known now, and is about to be written."""
        self._changed, self._saved_at = False, self._clock()
        entries = {peer: replace(entry, latencies=dict(entry.latencies)) for peer, entry in self._entries.items()}
        return _Snapshot(entries=entries, at=self._saved_at, wall_at=self._wall_clock())

    def _load(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("%s cannot be read, so that nothing is known of peers yet: %s", path, error)
            return
        try:
            self._entries = self._read(data)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            _set_aside(path, error)

    def _read(self, data: bytes) -> OrderedDict[PeerId, _Entry]:
        """Raises:
        ValueError, TypeError, KeyError, RecursionError: nothing that we have written.
        """
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
        content = json.loads(data)
        peers = content["peers"]
        if content["version"] != VERSION or not isinstance(peers, dict) or len(peers) > MAX_PEERS:
            raise ValueError("another version, or too many peers")
        now = self._clock()
        away_s = min(max(0.0, self._wall_clock() - _number(content, "saved_at", math.inf)), MAX_AWAY_S)
        entries = [(_read_peer(name), _read_entry(fields, now, away_s)) for name, fields in peers.items()]
        return OrderedDict(sorted(entries, key=lambda item: item[1].at))


def _rest(seconds: float) -> float:
    """What is left of one after so many seconds."""
    return float(0.5 ** (max(0.0, seconds) / HALF_LIFE_S))


def _bucket(latency_s: float) -> int:
    if not latency_s > LEAST_LATENCY_S:
        return 0
    return min(BUCKETS - 1, math.ceil(BUCKETS_PER_OCTAVE * math.log2(min(latency_s, 1e9) / LEAST_LATENCY_S)))


def _latency(bucket: int) -> float:
    """The longest that belongs into it."""
    return float(LEAST_LATENCY_S * 2.0 ** (bucket / BUCKETS_PER_OCTAVE))


def _read_peer(name: str) -> PeerId:
    """Raises:
    ValueError: no PeerId.
    """
    if not BASE58.fullmatch(name):
        raise ValueError(f"a peer called {name[:64]!r}")
    return PeerId.from_base58(name)


def _read_entry(fields: Mapping[str, Any], now: float, away_s: float) -> _Entry:
    """Raises:
    ValueError, TypeError, KeyError: out of bounds.
    """
    delay_s, avoided_s = _number(fields, "delay_s", MAX_DELAY_S), _number(fields, "avoided_s", MAX_DELAY_S)
    reason, latencies = fields["reason"], fields["latencies"]
    if not isinstance(reason, str) or len(reason) > MAX_REASON_CHARACTERS or not isinstance(latencies, dict):
        raise ValueError("a reason or latencies of another kind")
    counts = {_read_bucket(name): _number(latencies, name, MAX_COUNT) for name in latencies}
    left_s = avoided_s - away_s
    return _Entry(
        at=now - away_s - _number(fields, "age_s", math.inf),
        successes=_number(fields, "successes", MAX_COUNT),
        failures=_number(fields, "failures", MAX_COUNT),
        delay_s=delay_s,
        avoid_until=now + left_s if left_s > 0.0 else -math.inf,
        reason=reason,
        latencies=counts,
    )


def _read_bucket(name: str) -> int:
    if not name.isascii() or not name.isdecimal() or len(name) > 2 or int(name) >= BUCKETS:
        raise ValueError(f"a bucket called {name[:64]!r}")
    return int(name)


def _number(fields: Mapping[str, Any], name: str, most: float) -> float:
    """Raises:
    ValueError, TypeError, KeyError: none that is finite, 0 or more, and ``most`` at most.
    """
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {type(value).__name__}, expected a number")
    if not (0 <= value <= most and value < math.inf):
        raise ValueError(f"{name} is out of bounds")
    return float(value)


def _set_aside(path: Path, error: Exception) -> None:
    aside = path.with_name(path.name + ".damaged")
    try:
        path.replace(aside)
    except OSError as refusal:
        logger.warning("%s is damaged (%s) and not used; it cannot be moved away: %s", path, error, refusal)
    else:
        logger.warning("%s is damaged (%s); it is %s now, and nothing is known of peers yet", path, error, aside.name)


def _write(path: Path, snapshot: _Snapshot) -> OSError | None:
    """Put it there as a whole, or not at all; says why not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, snapshot.spell().encode())
    except OSError as error:
        return error
    return None
