"""Folders that are modules, for tests of publishing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from net.identity import Identity
from net.modules import manifest as manifests
from net.modules.manifest import Manifest
from net.modules.store import describe_files

DIGEST = "ab" * 32


def make_module(folder: Path, *, seed: int = 0, rank: int = 2, blocks: int = 2, width: int = 8) -> Path:
    """Random LoRA of ``query_key_value``, as PEFT writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for block in range(blocks):
        stem = f"base_model.model.transformer.h.{block}.self_attention.query_key_value"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(3 * width, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "bloom-tiny",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["query_key_value"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def shapes(*, rank: int = 2, blocks: int = 2, width: int = 8) -> dict[str, tuple[int, ...]]:
    """What ``make_module`` writes."""
    stems = [f"base_model.model.transformer.h.{block}.self_attention.query_key_value" for block in range(blocks)]
    found: dict[str, tuple[int, ...]] = {}
    for stem in stems:
        found |= {f"{stem}.lora_A.weight": (rank, width), f"{stem}.lora_B.weight": (3 * width, rank)}
    return found


def sign(author: Identity, folder: Path, **fields: Any) -> Manifest:
    """A manifest of what is in ``folder``."""
    usual: Mapping[str, Any] = {
        "name": "my-adapter",
        "model": "bloom-tiny",
        "model_digest": DIGEST,
        "method": "lora",
        "licence": "Apache-2.0",
        "metrics": {"loss": 2.5},
        "created_s": 1_700_000_000,
    }
    return manifests.make(author, **{"files": describe_files(folder)[0], **usual, **fields})
