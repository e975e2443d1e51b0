"""Training through the swarm: the gradients and losses of one machine, whatever is trained and whoever computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.tuning import (
    Between,
    ClassificationHead,
    DeepPromptTuning,
    LoRA,
    PromptTuning,
    RegressionHead,
)
from client.tuning.tuned import Tuned
from tests.checkpoints import make_checkpoint
from tests.mem.swarms import Span, blocking, swarm_of
from tests.one_machine import local_loss, shake

CHAINS: dict[str, list[Span]] = {
    "one-node": [(0, 5)],
    "two-nodes": [(0, 2), (2, 5)],
    "three-nodes": [(0, 1), (1, 4), (4, 5)],
    "parallel-chains": [(0, 5), (0, 2), (2, 5), (0, 5)],
}
METHODS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: PromptTuning(3),
    "deep-prompt": lambda: DeepPromptTuning(3),
    "lora": lambda: LoRA(rank=3, targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
    "lora-and-prompt": lambda: [LoRA(rank=2, alpha=5), PromptTuning(2)],
    "lora-and-deep-prompt": lambda: [LoRA(rank=2), DeepPromptTuning(2)],
    "between": lambda: Between({2: nn.Linear(48, 48), 5: nn.LayerNorm(48)}),
    "classes": lambda: ClassificationHead(("no", "yes", "perhaps")),
    "lora-and-classes": lambda: [LoRA(rank=2), ClassificationHead(3)],
    "prompt-and-numbers": lambda: [PromptTuning(2), RegressionHead(2)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tuning") / "made-bloom")


def batch(seed: int = 0, rows: int = 6, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask with padding on either side, labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 320, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 6:] = 0
    mask[2, :1] = 0
    mask[2, 7:] = 0
    return ids, mask, ids.masked_fill(mask == 0, -100)


def labels_for(tuned: Tuned, labels: Tensor) -> Tensor:
    """Those that its head wants."""
    generator = torch.Generator().manual_seed(3)
    if tuned.find(ClassificationHead) is not None:
        return torch.randint(0, 3, (len(labels),), generator=generator)
    if tuned.find(RegressionHead) is not None:
        return torch.randn(len(labels), 2, generator=generator)
    return labels


def gradients(loss: Tensor, tuned: Tuned) -> dict[str, Tensor]:
    names = [name for name, _ in tuned.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(tuned.parameters())), strict=True))


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("method", METHODS)
async def test_gradients_are_those_of_one_machine(folder: Path, method: str, chain: str) -> None:
    async with swarm_of(folder, CHAINS[chain]) as swarm:
        model = await swarm.client.model(str(folder), tuning=METHODS[method]())
        tuned = model.tuned
        assert tuned is not None
        shake(tuned)
        ids, mask, labels = batch()
        labels = labels_for(tuned, labels)
        loss = await blocking(lambda: model(input_ids=ids, attention_mask=mask, labels=labels).loss)
        found = await blocking(functools.partial(gradients, loss, tuned))
    expected_loss = local_loss(tuned, ids, mask, labels)
    expected = gradients(expected_loss, tuned)
    assert torch.allclose(loss, expected_loss, rtol=1e-5)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
