"""What users train, for tests."""

from __future__ import annotations

import torch

from compute.bloom import BloomConfig
from compute.tuning import TARGETS, SpanTuning, TuningForm
from tests.unit.engines import CONFIG

QKV = TuningForm(rank=4, scale=2.0, targets=("query_key_value",))
ALL = TuningForm(rank=3, scale=0.5, targets=TARGETS)
PROMPTS = TuningForm(prompts=5)
BOTH = TuningForm(rank=2, scale=1.5, targets=("dense", "dense_4h_to_h"), prompts=3)
FORMS = [QKV, ALL, PROMPTS, BOTH]


def make_tuning(
    form: TuningForm, seed: int = 0, *, start: int = 0, end: int = 3, config: BloomConfig = CONFIG, size: float = 0.3
) -> SpanTuning:
    """A random one, whose matrices are both other than zero."""
    count = form.n_elements(config, start, end)
    flat = size * torch.randn(count, generator=torch.Generator().manual_seed(seed))  # [n]
    return SpanTuning.from_flat(form, config, start, end, flat)
