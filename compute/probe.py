"""Which linear layers are the fastest on this machine that are exact enough: tried out, in about a second.

On one CPU packed fp16 is twice as fast as anything else, on the next one it is slower than float32; nothing but trying
says so. What came out is kept per configuration (machine, torch, threads, width of the model) as a small JSON file, so
that a node has the same numerics after every restart.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from compute.bloom.config import BloomConfig
from compute.linear import FrozenLinear, backend, rows_agree
from compute.outcomes import outcome_file

CANDIDATES: Final = ("fp16", "fp32")  # the others are not exact enough, and are for who asks for them
MAX_ERROR: Final = 1e-3  # of a product on random weights: fp16 has 1.5e-4, bf16 2.6e-3, int8 7e-3
MAX_WEIGHTS: Final = 1 << 24  # of the matrix tried out; larger ones take longer in proportion
COLD_WEIGHTS: Final = 1 << 24  # of its copies together: more than near caches hold, as a model is
BATCH_ROWS: Final = 16
VERSION: Final = 1  # of the method; another one measures anew
_TIMES: Final = 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """How a backend did.

    Attributes:
        name: The backend's.
        error: Of a product, relative to float32.
        rows_agree: Rows have the same bits alone and beside others.
        decode_s: Seconds for one row.
        batch_s: Seconds for 16 rows.
    """

    name: str
    error: float
    rows_agree: bool
    decode_s: float
    batch_s: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was chosen, and from what."""

    chosen: str
    candidates: tuple[Candidate, ...]


def choose(candidates: Sequence[Candidate], max_error: float = MAX_ERROR) -> str:
    """The fastest, one row and sixteen counted alike, of those that are exact enough; float32 if none is.

    One whose rows depend on each other is taken only where all do.
    """
    exact = [each for each in candidates if each.error <= max_error]
    usable = [each for each in exact if each.rows_agree] or exact
    return min(usable, key=lambda each: each.decode_s + each.batch_s, default=_FLOAT32).name


_FLOAT32: Final = Candidate(name="fp32", error=0.0, rows_agree=True, decode_s=0.0, batch_s=0.0)


def probe(
    config: BloomConfig,
    folder: Path | None,
    *,
    names: Sequence[str] = CANDIDATES,
    clock: Callable[[], float] = time.perf_counter,
) -> Probe:
    """Choose, or say what was chosen before.

    Args:
        config: Of the model to be served.
        folder: Where the outcome is kept; ``None`` to forget it.
        names: What to choose from.
        clock: Seconds.
    """
    file = None if folder is None else outcome_file(folder, "probe", [VERSION, config.hidden_size, list(names)])
    if file is not None and (known := file.read(_parse)) is not None:
        return known
    candidates = tuple(each for name in names if (each := _try_out(name, config, clock)) is not None)
    outcome = Probe(chosen=choose(candidates), candidates=candidates)
    if file is not None:
        file.write({"chosen": outcome.chosen, "candidates": [asdict(each) for each in outcome.candidates]})
    return outcome


def _parse(content: Mapping[str, Any]) -> Probe:
    """Raises:
    ValueError, KeyError, TypeError: That is nothing that we have written.
    """
    candidates = tuple(Candidate(**each) for each in content["candidates"])
    if content["chosen"] != choose(candidates):
        raise ValueError("another backend was chosen than is the fastest")
    return Probe(chosen=content["chosen"], candidates=candidates)


def _try_out(name: str, config: BloomConfig, clock: Callable[[], float]) -> Candidate | None:
    """Measure one backend on the shape of the widest layer; None if this machine lacks it."""
    width = config.hidden_size
    out = max(1, min(4 * width, MAX_WEIGHTS // width))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, width, generator=generator) * width**-0.5  # [out, in]
    bias = torch.randn(out, generator=generator)  # [out]
    x = torch.randn(BATCH_ROWS, width, generator=generator)  # [16, in]
    kind = backend(name)
    try:
        with torch.inference_mode():
            layers = [kind.pack(weight, bias) for _ in range(max(1, COLD_WEIGHTS // weight.numel()))]
            expected = x.double() @ weight.double().t() + bias  # [16, out]
            error = float((layers[0].multiply(x) - expected).norm() / expected.norm())
            decode_s, batch_s = (_time(layers, x[:rows], clock) for rows in (1, BATCH_ROWS))
            agree = rows_agree(layers[0])
    except RuntimeError as exc:  # how torch says that a kernel is not there
        _log.info("no %s on this machine: %s", name, str(exc).splitlines()[0])
        return None
    return Candidate(name=name, error=error, rows_agree=agree, decode_s=decode_s, batch_s=batch_s)


def _time(layers: Sequence[FrozenLinear], x: Tensor, clock: Callable[[], float]) -> float:
    """Seconds for one product: the least of several rounds over all layers."""
    rounds: list[float] = []
    for _ in range(_TIMES + 1):  # the first also sets the kernel up, and is hardly ever the least
        began = clock()
        for layer in layers:
            layer.multiply(x)  # [n, out]
        rounds.append((clock() - began) / len(layers))
    return min(rounds)
