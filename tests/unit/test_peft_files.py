"""Trained parameters as PEFT's files, both ways."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from client.errors import InvalidInput
from client.tuning import (
    Between,
    ClassificationHead,
    DeepPromptTuning,
    LoRA,
    PromptTuning,
    RegressionHead,
    peft_files,
)
from client.tuning.methods import Method
from client.tuning.tuned import Tuned, n_elements
from compute.bloom import BloomConfig
from tests.checkpoints import make_model
from tests.one_machine import by_hand, shake

CONFIG = BloomConfig.from_json(make_model().config.to_dict())
IDS = torch.tensor([[40, 41, 90, 17, 200, 33, 12], [9, 8, 7, 6, 5, 4, 300]])
METHODS: dict[str, list[Method]] = {
    "prompt": [PromptTuning(3)],
    "deep-prompt": [DeepPromptTuning(3)],
    "lora": [LoRA(rank=3, alpha=5, targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"))],
    "lora-and-prompt": [LoRA(rank=2), PromptTuning(2)],
    "classes": [ClassificationHead(("no", "yes"))],
    "lora-and-classes": [LoRA(rank=2), ClassificationHead(("no", "yes"))],
    "lora-and-numbers": [LoRA(rank=2), RegressionHead(2)],
}


def make(methods: Sequence[Method]) -> Tuned:
    tuned = Tuned(CONFIG, methods, make_model().transformer.word_embeddings.weight)
    shake(tuned)
    return tuned


def written(methods: Sequence[Method], folder: Path) -> Tuned:
    tuned = make(methods)
    peft_files.write(tuned, folder, "made-bloom")
    return tuned


def change(folder: Path, **fields: Any) -> None:
    path = folder / peft_files.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_written_is_read_bit_for_bit(name: str, tmp_path: Path) -> None:
    tuned = written(METHODS[name], tmp_path)
    methods, base = peft_files.read_config(tmp_path)
    assert base == "made-bloom"
    assert [type(method) for method in methods] == [type(method) for method in METHODS[name]]
    other = Tuned(CONFIG, methods, make_model().transformer.word_embeddings.weight)
    peft_files.read_weights(other, tmp_path)
    assert other.digest() == tuned.digest()
    assert other.form == tuned.form
    whole = peft_files.read_tuned(CONFIG, make_model().transformer.word_embeddings.weight, tmp_path)
    assert whole.digest() == tuned.digest()
    assert n_elements(CONFIG, methods) == sum(values.numel() for values in tuned.state_dict().values())


def test_no_memory_is_taken_for_more_than_there_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_nothing(*_: object) -> Tuned:
        raise AssertionError("memory was taken")

    written(METHODS["lora"], tmp_path)
    change(tmp_path, r=256)
    monkeypatch.setattr(peft_files, "Tuned", make_nothing)
    with pytest.raises(InvalidInput, match="speaks of"):
        peft_files.read_tuned(CONFIG, make_model().transformer.word_embeddings.weight, tmp_path)
    (tmp_path / peft_files.WEIGHTS_FILE).unlink()
    with pytest.raises(InvalidInput, match="cannot be read"):
        peft_files.read_tuned(CONFIG, make_model().transformer.word_embeddings.weight, tmp_path)


def test_peft_reads_our_lora(tmp_path: Path) -> None:
    tuned = written(METHODS["lora"], tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_model(), str(tmp_path))
    model = make_model()
    with torch.no_grad(), by_hand(model, tuned):
        assert torch.allclose(theirs(IDS).logits, model(IDS).logits, atol=1e-5)
    assert not torch.allclose(theirs(IDS).logits, make_model()(IDS).logits, atol=1e-2)


def test_peft_reads_our_soft_prompt(tmp_path: Path) -> None:
    tuned = written(METHODS["prompt"], tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_model(), str(tmp_path))
    model = make_model()
    with torch.no_grad():
        words = model.transformer.word_embeddings(IDS)
        words = torch.cat([tuned.prompt_embeddings.expand(2, -1, -1), words], dim=1)
        assert torch.allclose(theirs(IDS).logits, model(inputs_embeds=words).logits, atol=1e-5)


@pytest.mark.parametrize("scale", ["usual", "rslora"])
def test_we_read_pefts_lora(tmp_path: Path, scale: str) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["dense_h_to_4h", "query_key_value"], use_rslora=scale == "rslora"
    )
    theirs = peft.get_peft_model(make_model(), config)
    shake(theirs)
    theirs.save_pretrained(str(tmp_path))
    (lora,), _ = peft_files.read_config(tmp_path)
    assert isinstance(lora, LoRA)
    assert (lora.rank, lora.targets) == (4, ("query_key_value", "dense_h_to_4h"))
    tuned = make([lora])
    peft_files.read_weights(tuned, tmp_path)
    model = theirs.unload()
    with torch.no_grad(), by_hand(model, tuned):
        found = model(IDS).logits
    with torch.no_grad():
        reference = peft.PeftModel.from_pretrained(model, str(tmp_path))(IDS).logits
    assert torch.allclose(found, reference, atol=1e-4)


def test_a_seed_gives_pefts_matrices() -> None:
    model, words = make_model(), make_model().transformer.word_embeddings.weight
    torch.manual_seed(5)
    tuned = Tuned(CONFIG, [LoRA(rank=4, targets=("dense", "query_key_value", "dense_4h_to_h"))], words)
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, target_modules=["query_key_value", "dense", "dense_4h_to_h"])
    theirs = peft.get_peft_model(model, config).state_dict()
    for name, values in tuned.state_dict().items():
        assert torch.equal(values, theirs[f"base_model.model.{name.removesuffix('.weight')}.default.weight"]), name


def test_we_read_pefts_soft_prompt(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(make_model(), peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    theirs.save_pretrained(str(tmp_path))
    methods, _ = peft_files.read_config(tmp_path)
    tuned = make(methods)
    peft_files.read_weights(tuned, tmp_path)
    expected = load_file(tmp_path / peft_files.WEIGHTS_FILE)["prompt_embeddings"]
    assert torch.equal(tuned.prompt_embeddings, expected)


def test_modules_of_ones_own_are_kept_without_being_run(tmp_path: Path) -> None:
    tuned = written([Between({2: nn.Linear(48, 48)})], tmp_path)
    assert peft_files.read_config(tmp_path)[0] == ()
    other = make([Between({2: nn.Linear(48, 48)})])
    peft_files.read_weights(other, tmp_path)
    assert other.digest() == tuned.digest()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"raceme": {"version": 9, "methods": []}}, "version 9"),
        ({"raceme": {"version": 1, "methods": [{"kind": "magic"}]}}, "magic"),
        ({"raceme": {"version": 1, "methods": [{"kind": "lora", "rank": 10**9, "alpha": 1, "targets": []}]}}, "rank"),
        ({"raceme": {"version": 1, "methods": 3}}, "damaged"),
        ({"raceme": None, "peft_type": "IA3"}, "IA3"),
        ({"raceme": None, "use_dora": True}, "use_dora"),
        ({"raceme": None, "rank_pattern": {"a": 1}}, "rank_pattern"),
        ({"raceme": None, "target_modules": "all-linear"}, "target_modules"),
        ({"raceme": None, "target_modules": ["attn"]}, "target_modules"),
        ({"raceme": None, "lora_alpha": "much"}, "lora_alpha"),
        ({"raceme": None, "r": True}, "rank"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_why(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    written([LoRA(rank=2)], tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(InvalidInput, match=why):
        peft_files.read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 10_000, b" " * (1 << 20) + b"{}"])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / peft_files.CONFIG_FILE).write_bytes(content)
    with pytest.raises(InvalidInput, match="adapter_config"):
        peft_files.read_config(tmp_path)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="adapter_config"):
        peft_files.read_config(tmp_path)
    tuned = written([LoRA(rank=2)], tmp_path)
    (tmp_path / peft_files.WEIGHTS_FILE).unlink()
    with pytest.raises(InvalidInput, match="adapter_model"):
        peft_files.read_weights(tuned, tmp_path)


@pytest.mark.parametrize("damage", ["missing", "more", "shape", "dtype", "nan", "cut"])
def test_numbers_that_do_not_fit_are_refused_and_nothing_is_taken(tmp_path: Path, damage: str) -> None:
    written([LoRA(rank=2)], tmp_path)
    path = tmp_path / peft_files.WEIGHTS_FILE
    tensors = load_file(path)
    first = sorted(tensors)[0]
    if damage == "missing":
        del tensors[first]
    elif damage == "more":
        tensors["base_model.model.more"] = torch.zeros(1)
    elif damage == "shape":
        tensors[first] = tensors[first][:1].clone()
    elif damage == "dtype":
        tensors[first] = tensors[first].int()
    elif damage == "nan":
        tensors[first][0, 0] = torch.nan
    save_file(tensors, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    tuned = make([LoRA(rank=2)])
    before = tuned.digest()
    with pytest.raises(InvalidInput, match="adapter_model"):
        peft_files.read_weights(tuned, tmp_path)
    assert tuned.digest() == before
