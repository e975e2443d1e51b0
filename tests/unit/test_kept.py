"""Quantised weights on disk: found again, checked, bounded, never half there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compute import checkpoint as checkpoint_module
from compute.checkpoint import Checkpoint
from compute.linear.kept import KeptWeights, content_digest
from tests.checkpoints import make_checkpoint

SOURCE = "5" * 64


def tensors(seed: int = 0, size: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(-127, 128, (size, 16), generator=generator).to(torch.int8)
    return {"levels": levels, "scale": torch.randn(size, generator=generator)}


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def use(path: Path, when: int) -> None:
    os.utime(path, ns=(when, when))


def test_what_was_put_is_found(tmp_path: Path) -> None:
    kept = KeptWeights(tmp_path / "kept")
    assert kept.get({"block": 1}) is None
    kept.put({"block": 1}, tensors(), SOURCE)
    found = kept.get({"block": 1})
    assert found is not None and found.source == SOURCE
    assert found.tensors.keys() == tensors().keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors().items())
    assert kept.get({"block": 2}) is None
    (path,) = files(kept.folder)
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata()["content"] == content_digest(tensors())
        assert file.metadata()["source"] == SOURCE


def test_what_was_found_outlives_its_file(tmp_path: Path) -> None:
    kept = KeptWeights(tmp_path)
    kept.put({"block": 1}, tensors(), SOURCE)
    found = kept.get({"block": 1})
    assert found is not None
    (path,) = files(tmp_path)
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(found.tensors["scale"], tensors()["scale"])


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "no header", "other key", "other format", "huge header"])
def test_damaged_files_are_deleted(tmp_path: Path, damage: str) -> None:
    kept = KeptWeights(tmp_path)
    kept.put({"block": 1}, tensors(), SOURCE)
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[-5] ^= 1
    elif damage == "cut":
        content = content[:-5]
    elif damage == "empty":
        content = bytearray()
    elif damage == "no header":
        content[8:40] = bytes(32)
    elif damage == "huge header":
        content[:8] = b"\xff" * 8
    path.write_bytes(content)
    if damage.startswith("other"):
        metadata = {"format": "raceme-kept-1", "key": '{"block":1}', "source": SOURCE}
        metadata |= {"key": '{"block":2}'} if damage == "other key" else {"format": "raceme-kept-0"}
        save_file(tensors(), str(path), metadata=metadata | {"content": content_digest(tensors())})
    assert kept.get({"block": 1}) is None
    assert files(tmp_path) == []
    kept.put({"block": 1}, tensors(), SOURCE)
    assert kept.get({"block": 1}) is not None


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    size = 0
    kept = KeptWeights(tmp_path)
    for block in range(3):
        kept.put({"block": block}, tensors(block), SOURCE)
    for age, path in enumerate(files(tmp_path)):
        use(path, 10**18 + age * 10**9)
        size = path.stat().st_size
    kept.get({"block": 0})  # now the latest
    latest = max(files(tmp_path), key=lambda path: path.stat().st_mtime_ns)
    assert latest.stat().st_mtime_ns > 10**18 + 10**10
    tight = KeptWeights(tmp_path, max_bytes=2 * size + size // 2)
    tight.put({"block": 9}, tensors(9), SOURCE)
    assert len(files(tmp_path)) == 2
    assert tight.get({"block": 0}) is not None and tight.get({"block": 9}) is not None


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    kept = KeptWeights(tmp_path / "kept", max_bytes=100)
    kept.put({"block": 1}, tensors(), SOURCE)
    assert not kept.folder.exists()
    with pytest.raises(ValueError, match="at least 0"):
        KeptWeights(tmp_path, max_bytes=-1)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file")
    kept = KeptWeights(tmp_path / "kept")
    kept.put({"block": 1}, tensors(), SOURCE)
    assert kept.get({"block": 1}) is None


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptWeights(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compute.linear.kept.save_file", full)
    kept.put({"block": 1}, tensors(), SOURCE)
    assert files(tmp_path) == []


def test_parts_that_nobody_finished_go(tmp_path: Path) -> None:
    old, new = tmp_path / "a-1.part", tmp_path / "b-1.part"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    use(old, 10**18)
    KeptWeights(tmp_path).put({"block": 1}, tensors(), SOURCE)
    assert not old.exists() and new.exists()


@pytest.mark.parametrize("linear", ["int8", "nf4-double"])
def test_a_second_load_quantises_nothing(tmp_path: Path, linear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model", tokenizer=False, hidden=192))
    kept = KeptWeights(tmp_path / "kept")
    first = checkpoint.load_span(1, 4, linear=linear, kept=kept)
    assert len(files(kept.folder)) == 3

    def never(*_: object) -> None:
        raise AssertionError("read or quantised again")

    monkeypatch.setattr(checkpoint_module, "quantize", never)
    monkeypatch.setattr(Checkpoint, "_read_block", never)
    second = checkpoint.load_span(1, 4, linear=linear, kept=kept)
    hidden = torch.randn(1, 5, 192, generator=torch.Generator().manual_seed(0))
    assert torch.equal(second(hidden), first(hidden))
    assert (second.digest, second.block_digests) == (first.digest, first.block_digests)
    assert not any(parameter.requires_grad for parameter in second.parameters())


def test_other_weights_are_quantised_anew(tmp_path: Path) -> None:
    kept = KeptWeights(tmp_path / "kept")
    first = Checkpoint.open(make_checkpoint(tmp_path / "model", tokenizer=False, seed=1))
    old = first.load_span(0, 1, linear="int8", kept=kept)
    second = Checkpoint.open(make_checkpoint(tmp_path / "model", tokenizer=False, seed=2))
    new = second.load_span(0, 1, linear="int8", kept=kept)
    assert old.digest != new.digest
    hidden = torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(old(hidden), new(hidden))


def test_what_is_quick_to_pack_is_not_kept(tmp_path: Path) -> None:
    kept = KeptWeights(tmp_path / "kept")
    Checkpoint.open(make_checkpoint(tmp_path / "model", tokenizer=False)).load_span(0, 1, linear="fp16", kept=kept)
    assert not kept.folder.exists()
