"""A training through the swarm has the loss curve of the same training on one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from client.tuning import ClassificationHead, LoRA, PromptTuning
from client.tuning.training.data import Examples, classes_of, label_examples, pack, read_rows, split
from client.tuning.training.loop import Outcome, Training, TrainingSettings, Tunable
from tests.mem.swarms import blocking, swarm_of
from tests.tuned_locally import TINY, LocalTuned, tiny_tokenizer

DATA = Path(__file__).parents[1] / "data"
SPANS = [(0, 3), (3, 8)]


def encode(texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tiny_tokenizer()(texts).input_ids
    return ids


def examples(name: str, length: int) -> tuple[Examples, Examples]:
    """To train on, and held out."""
    is_labelled = name == "sentences"
    parts = split(read_rows(DATA / f"{name}.jsonl", is_labelled=is_labelled), 0.1, 0)
    if not is_labelled:
        made = [pack(rows, encode, end=2, length=length) for rows in parts]
    else:
        classes = classes_of(parts[0])
        made = [label_examples(rows, encode, length=length, classes=classes, named=name) for rows in parts]
    return made[0], made[1]


def train(model: Tunable, parts: tuple[Examples, Examples], settings: TrainingSettings, folder: Path) -> Outcome:
    folder.mkdir()
    held_out = parts[1].examples[:16]
    training = Training(model, parts[0].examples, held_out, settings, folder, marks={}, pad=3)
    training.take_up()
    return training.run()


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("held_out_loss")) for line in lines]


@pytest.mark.parametrize(
    ("method", "how", "name", "learning_rate"),
    [
        (LoRA(rank=4), {"rank": 4}, "python-reference", 2e-3),
        (PromptTuning(8), {"prompt": 8}, "python-reference", 3e-2),
        (ClassificationHead(("chronicles", "psalms", "python")), {"outputs": 3}, "sentences", 1e-2),
    ],
    ids=["lora", "prompt", "head"],
)
async def test_the_loss_curve_is_that_of_one_machine(
    method: Any, how: dict[str, Any], name: str, learning_rate: float, tmp_path: Path
) -> None:
    settings = TrainingSettings(steps=10, learning_rate=learning_rate, batch_size=4, evaluate_every_steps=5)
    parts = examples(name, 32)
    async with swarm_of(TINY, SPANS) as swarm:
        torch.manual_seed(0)
        model = await swarm.client.model(str(TINY), tuning=method)
        found = await blocking(lambda: train(model, parts, settings, tmp_path / "swarm"))
    torch.manual_seed(0)
    local = LocalTuned(**how)
    assert model.tuned is not None
    assert local.tuned.state_dict().keys() == model.tuned.state_dict().keys()
    expected = await blocking(lambda: train(local, parts, settings, tmp_path / "local"))
    assert losses(tmp_path / "swarm") == pytest.approx(losses(tmp_path / "local"), rel=1e-5)
    assert found.first is not None and found.last is not None and expected.last is not None
    assert found.last.loss < found.first.loss
    assert found.last.accuracy == expected.last.accuracy
