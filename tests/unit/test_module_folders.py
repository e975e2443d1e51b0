"""From folders to modules and back: what is read of files that anybody may have written, cards, uploads."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from client.modules.card import spell_card
from client.modules.description import Description, read_json
from client.modules.folders import describe, export, sign_folder, upload
from client.modules.obtaining import is_path
from client.modules.tensors import MAX_TOLD, check_tensors, read_tensors
from compute.models import find_checkpoint
from net.errors import ModuleError
from net.modules.manifest import Manifest
from net.modules.store import ModuleStore, StoredModule
from tests.modules import DIGEST, make_module, shapes
from tests.net_helpers import seeded

AUTHOR = seeded(1)
DESCRIPTION = Description(model="bloom-tiny", model_digest=DIGEST, method="lora", metrics={"loss": 2.25})
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_module(tmp_path / "mine")


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Write the weights again, with other tensors under these names; ``None`` leaves one out."""
    stored = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file({name: each for name, each in {**stored, **tensors}.items() if each is not None}, folder / WEIGHTS)


# Weights


def test_tensors_that_are_as_expected(folder: Path) -> None:
    tensors = read_tensors(folder, shapes())
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes()
    stored = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)
    (folder / WEIGHTS).write_bytes(b"\0" * (folder / WEIGHTS).stat().st_size)  # what was read is not the file's
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value: float, folder: Path) -> None:
    name = next(iter(shapes()))
    change(folder, **{name: torch.full(shapes()[name], value)})
    for read in (lambda: read_tensors(folder, shapes()), lambda: check_tensors(folder)):
        with pytest.raises(ModuleError, match=r"lora_A\.weight holds values that are not finite"):
            read()


def test_other_tensors_than_expected_are_refused(folder: Path) -> None:
    name = next(iter(shapes()))
    with pytest.raises(ModuleError, match=r"has shape \[2, 8\], expected \[4, 8\]"):
        read_tensors(folder, shapes(rank=4))
    with pytest.raises(ModuleError, match=f"lacks .*and {2 * 5 - MAX_TOLD} more"):
        read_tensors(folder, shapes(blocks=7))
    with pytest.raises(ModuleError, match="does not belong there"):
        read_tensors(folder, shapes(blocks=1))
    with pytest.raises(ModuleError, match="another dtype than float16, bfloat16"):
        read_tensors(folder, shapes(), dtypes=(torch.float16, torch.bfloat16))
    change(folder, **{name: torch.zeros(shapes()[name], dtype=torch.int64)})
    with pytest.raises(ModuleError, match="another dtype"):
        read_tensors(folder, shapes())
    with pytest.raises(ModuleError, match="no tensor of floats"):
        check_tensors(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_taken(dtype: torch.dtype, folder: Path) -> None:
    change(folder, **{name: torch.ones(shape, dtype=dtype) for name, shape in shapes().items()})
    check_tensors(folder)
    assert {tensor.dtype for tensor in read_tensors(folder, shapes()).values()} == {dtype}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", (1 << 20) + 1) + b" " * 100,
        struct.pack("<Q", 2) + b"{}" + b"\0" * 8,
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 8) + b"\x80\x04pickle",
        b'(cos\nsystem\n(S"true"\ntR.',
    ],
)
def test_damaged_files_are_refused(data: bytes, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(ModuleError, match=WEIGHTS):
        read_tensors(folder, shapes())
    with pytest.raises(ModuleError, match=WEIGHTS):
        check_tensors(folder)


def test_offsets_beyond_the_file_are_refused(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 4 << 30]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ModuleError, match="damaged"):
        read_tensors(folder, {"a": (1 << 30,)})


# Descriptions


def test_a_description_is_written_and_read(folder: Path) -> None:
    assert Description.read(folder) is None
    for description in (DESCRIPTION, Description(model="a/b", model_digest=DIGEST, method="prompt", parent="cd" * 32)):
        description.write(folder)
        assert Description.read(folder) == description
        assert describe(folder, model=None, served={}) == description
    assert describe(folder, model="c", served={}).model == "c"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        "{}",
        '{"version": 1}',
        json.dumps({"version": 1, "model": "../x", "model_digest": DIGEST, "method": "lora"}),
        json.dumps({"version": 1, "model": "x", "model_digest": "ab", "method": "lora"}),
        json.dumps({"version": 1, "model": "x", "model_digest": DIGEST, "method": 3}),
        json.dumps({"version": 1, "model": "x", "model_digest": DIGEST, "method": "lora", "metrics": {"a": "b"}}),
        json.dumps(
            {"version": 1, "model": "x", "model_digest": DIGEST, "method": "lora", "metrics": {"a": float("nan")}}
        ),
        json.dumps({"version": 1, "model": "x", "model_digest": DIGEST, "method": "lora", "metrics": {"a": 10**400}}),
        json.dumps({"version": 1, "model": "x", "model_digest": DIGEST, "method": "lora", "parent": "x"}),
        " " * ((1 << 20) + 1),
        "\ud800",
    ],
)
def test_descriptions_that_make_no_sense_are_refused(text: str, folder: Path) -> None:
    (folder / "raceme.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModuleError, match=r"raceme\.json"):
        Description.read(folder)


def test_a_folder_of_peft_is_described_by_its_configuration(folder: Path) -> None:
    served = {"bloom-tiny": {DIGEST}}
    assert describe(folder, model=None, served=served) == Description(
        model="bloom-tiny", model_digest=DIGEST, method="lora"
    )
    shipped = find_checkpoint("bloom-tiny").digest
    assert describe(folder, model=None, served={}).model_digest == shipped
    path = str(find_checkpoint("bloom-tiny").file("config.json").parent)
    assert describe(folder, model=path, served={}) == Description(
        model="bloom-tiny", model_digest=shipped, method="lora"
    )
    with pytest.raises(ModuleError, match="is served with digests abababababab, cdcdcdcdcdcd"):
        describe(folder, model=None, served={"bloom-tiny": {DIGEST, "cd" * 32}})
    with pytest.raises(ModuleError, match="trained on no-such-model, which nobody serves"):
        describe(folder, model="no-such-model", served=served)


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "prompt-tuning"),
        (
            {"peft_type": "RACEME", "raceme": {"methods": [{"kind": "lora"}, {"kind": "classification"}]}},
            "lora+classification",
        ),
        ({"peft_type": "LORA", "raceme": {"methods": "all"}}, "lora"),
        ({}, None),
        ({"peft_type": "<script>"}, None),
        ({"raceme": {"methods": [{"kind": 7}]}}, None),
    ],
)
def test_methods(fields: dict[str, Any], method: str | None, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "m", **fields}))
    if method is None:
        with pytest.raises(ModuleError, match="how the module was trained"):
            describe(folder, model=None, served={"m": {DIGEST}})
    else:
        assert describe(folder, model=None, served={"m": {DIGEST}}).method == method


def test_a_configuration_that_names_no_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ModuleError, match="--model NAME"):
        describe(folder, model=None, served={})


# Signing


def signed(store: ModuleStore, folder: Path, **fields: Any) -> StoredModule:
    usual: dict[str, Any] = {"name": "my-adapter", "description": DESCRIPTION, "licence": "Apache-2.0"}
    return sign_folder(store, folder, fields.pop("author", AUTHOR), **{**usual, **fields})


def test_a_signed_folder_is_a_module(folder: Path, tmp_path: Path) -> None:
    store = ModuleStore(tmp_path / "modules")
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoint").mkdir()
    module = signed(store, folder)
    assert sorted(os.listdir(module.folder)) == sorted(
        ["README.md", "adapter_config.json", WEIGHTS, "notes.txt", "raceme.json"]
    )
    assert Description.read(module.folder) == DESCRIPTION
    manifest = module.manifest
    assert (manifest.model, manifest.model_digest, manifest.method) == ("bloom-tiny", DIGEST, "lora")
    assert (dict(manifest.metrics), manifest.licence, manifest.author) == ({"loss": 2.25}, "Apache-2.0", AUTHOR.peer_id)
    assert (module.folder / "README.md").read_text() == spell_card("my-adapter", DESCRIPTION, "Apache-2.0")
    assert not (folder / "README.md").exists()  # what is somebody's stays as it is


def test_the_same_again_has_the_same_hash(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ModuleStore(tmp_path / "modules")
    first = signed(store, folder)
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    assert signed(store, folder) == first
    others: list[Manifest] = [
        signed(store, folder, licence="MIT").manifest,
        signed(store, folder, author=seeded(2)).manifest,
        signed(store, make_module(tmp_path / "other", seed=1)).manifest,
    ]
    assert len({first.manifest.hash, *(each.hash for each in others)}) == 4
    assert len(os.listdir(store.folder)) == 4
    parent = Description(model="bloom-tiny", model_digest=DIGEST, method="lora", parent=first.manifest.hash)
    assert signed(store, folder, description=parent).manifest.parent == first.manifest.hash


def test_one_that_was_damaged_can_be_signed_again(folder: Path, tmp_path: Path) -> None:
    store = ModuleStore(tmp_path / "modules")
    module = signed(store, folder)
    (module.folder / WEIGHTS).write_bytes(bytes((module.folder / WEIGHTS).stat().st_size))
    assert signed(store, folder) == module
    assert (module.folder / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_a_card_of_ones_own_is_kept(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("# Mine")
    module = signed(ModuleStore(tmp_path / "modules"), folder)
    assert (module.folder / "README.md").read_text() == "# Mine"


def test_nothing_is_kept_of_what_cannot_be_signed(folder: Path, tmp_path: Path) -> None:
    store = ModuleStore(tmp_path / "modules", max_bytes=100)
    with pytest.raises(ModuleError, match="at most 100"):
        signed(store, folder)
    with pytest.raises(ModuleError, match="nobody would accept"):
        signed(store, folder, name="../x")
    for number in range(13):
        (folder / f"{number}.txt").write_text("")
    with pytest.raises(ModuleError, match="holds 15 files"):
        signed(store, folder)
    assert not store.folder.exists() or os.listdir(store.folder) == []


def test_a_card_is_what_the_hub_reads() -> None:
    yaml = pytest.importorskip("yaml")
    description = Description(
        model="bigscience/bloom-560m", model_digest=DIGEST, method="lora", metrics={"loss": 2.0}, parent="cd" * 32
    )
    card = spell_card("my-adapter", description, "Apache-2.0")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "bigscience/bloom-560m",
        "license": "apache-2.0",
        "library_name": "peft",
        "tags": ["raceme"],
    }
    for told in ("# my-adapter", "cd" * 32, "| loss | 2 |", DIGEST):
        assert told in text


# Out again


def test_export(folder: Path, tmp_path: Path) -> None:
    module = signed(ModuleStore(tmp_path / "modules"), folder)
    target = tmp_path / "out" / "mine"
    export(module.folder, target)
    assert (target / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert Description.read(target) == DESCRIPTION  # and in again
    assert signed(ModuleStore(tmp_path / "modules"), target) == module
    with pytest.raises(ModuleError, match="is there already"):
        export(module.folder, target)


class FakeApi:
    """What ``upload`` uses of the hub."""

    calls: list[tuple[str, dict[str, Any]]]
    failure: Exception | None = None

    def create_repo(self, repository: str, **options: Any) -> str:
        if self.failure is not None:
            raise self.failure
        self.calls.append((repository, options))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


def test_upload(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [], raising=False)
    module = signed(ModuleStore(tmp_path / "modules"), folder)
    assert upload(module, "me/my-adapter") == "https://huggingface.co/me/my-adapter"
    assert FakeApi.calls == [
        ("me/my-adapter", {"exist_ok": True}),
        (
            "upload",
            {"repo_id": "me/my-adapter", "folder_path": module.folder, "commit_message": str(module.manifest)},
        ),
    ]
    monkeypatch.setattr(FakeApi, "failure", OSError("401 Client Error\nmore"))
    with pytest.raises(ModuleError, match=r"cannot be uploaded to \(401 Client Error\); log in with: hf auth login"):
        upload(module, "me/my-adapter")


# Small things


def test_paths_and_references() -> None:
    assert is_path("./mine")
    assert is_path("/tmp/mine")
    assert is_path("..")
    assert is_path(Path("mine"))
    assert not is_path("mine")
    assert not is_path("mine@12345678")


def test_json_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match="No such file"):
        read_json(tmp_path / "nothing.json")
