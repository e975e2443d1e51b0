"""Checkpoints and transformers' own models of them, made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from compute.models import find_checkpoint
from tests.checkpoints import make_checkpoint


@dataclass(frozen=True)
class Reference:
    """A checkpoint and what transformers makes of it."""

    folder: Path
    model: Any

    @property
    def n_blocks(self) -> int:
        return int(self.model.config.n_layer)


def reference(folder: Path) -> Reference:
    from transformers import BloomForCausalLM

    model = BloomForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Reference(folder, model.eval())


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Five blocks of six heads, a shard for two blocks, names with ``transformer.``."""
    return reference(make_checkpoint(tmp_path_factory.mktemp("models") / "odd-bloom"))


@pytest.fixture(scope="session")
def tiny() -> Reference:
    """The model that ships."""
    return reference(find_checkpoint("bloom-tiny").file("config.json").parent)
