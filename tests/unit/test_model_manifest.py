"""Manifests of models' files: what is taken, and what never is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from net.errors import LocalProtocolError, RemoteProtocolError
from net.files.manifest import JSON_BYTES, MAX_MANIFEST_BYTES, ModelManifest
from net.files.pieces import MAX_FILE_BYTES, FileId, Hashes

ROOT = bytes(range(32))
FILES = {
    "config.json": FileId(ROOT, 700),
    "model-00001-of-00001.safetensors": FileId(ROOT, 1 << 30),
    "tokenizer.json": FileId(ROOT, JSON_BYTES["tokenizer.json"]),
}
MANIFEST = ModelManifest(name="some-bloom", digest="0123456789abcdef" * 4, files=FILES)
FIELDS: dict[str, Any] = msgpack.unpackb(MANIFEST.to_bytes())


def test_it_is_read_as_it_was_written() -> None:
    assert ModelManifest.from_bytes(MANIFEST.to_bytes()) == MANIFEST
    assert MANIFEST.file_id == Hashes.of_bytes(MANIFEST.to_bytes()).file
    turned = replace(MANIFEST, files=dict(reversed(FILES.items())))
    assert turned.to_bytes() == MANIFEST.to_bytes()  # whoever has the same files makes the same


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "..",
        "/etc/passwd",
        "folder/model.safetensors",
        "folder\\model.safetensors",
        "model.safetensors/..",
        ".safetensors",
        ".hidden.safetensors",
        "model.safetensors\n",
        "model.safetensors\0",
        "m\u00f6del.safetensors",
        "a" * 300 + ".safetensors",
        "model.bin",
        "pytorch_model.bin",
        "model.SAFETENSORS",
        "code.py",
        "other.json",
        "manifest",
        "CONFIG.JSON",
        "model.safetensors.part",
        "",
    ],
)
def test_names_that_are_never_taken(name: str) -> None:
    with pytest.raises(LocalProtocolError, match="no name of a file"):
        replace(MANIFEST, files={**FILES, name: FileId(ROOT, 1)}).to_bytes()
    with pytest.raises(RemoteProtocolError):
        ModelManifest.from_bytes(msgpack.packb({**FIELDS, "files": sorted([*FIELDS["files"], [name, 1, ROOT]])}))


@pytest.mark.parametrize(
    "bad",
    [
        {"v": 2},
        {"v": None},
        {"name": ""},
        {"name": "../x"},
        {"name": "x" * 97},
        {"name": 1},
        {"digest": "0" * 63},
        {"digest": "G" * 64},
        {"files": []},
        {"files": {}},
        {"files": FIELDS["files"][1:]},  # no config.json
        {"files": [*FIELDS["files"], FIELDS["files"][0]]},
        {"files": FIELDS["files"][::-1]},
        {"files": [["config.json", 1]]},
        {"files": [["config.json", 1, ROOT, 1]]},
        {"files": [["config.json", JSON_BYTES["config.json"] + 1, ROOT]]},
        {"files": [["config.json", -1, ROOT]]},
        {"files": [["config.json", True, ROOT]]},
        {"files": [["config.json", 1, ROOT[1:]]]},
        {"files": [[b"config.json", 1, ROOT]]},
        {"files": [["config.json", 1, ROOT], ["model.safetensors", MAX_FILE_BYTES + 1, ROOT]]},
        {"files": [["config.json", 1, ROOT], "model.safetensors"]},
    ],
    ids=str,
)
def test_what_is_no_manifest(bad: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        ModelManifest.from_bytes(msgpack.packb({**FIELDS, **bad}))


@given(st.binary(max_size=400), st.integers(0, 400))
def test_any_bytes_are_refused_or_read(data: bytes, at: int) -> None:
    good = MANIFEST.to_bytes()
    for each in (data, good[:at] + data + good[at + len(data) :]):
        try:
            read = ModelManifest.from_bytes(each)
        except RemoteProtocolError:
            continue
        assert ModelManifest.from_bytes(read.to_bytes()) == read


def test_too_many_files_are_not_told_of() -> None:
    many = {f"model-{number:05d}.safetensors": FileId(ROOT, 1) for number in range(1100)}
    with pytest.raises(LocalProtocolError, match="cannot be told of"):
        replace(MANIFEST, files={**FILES, **many}).to_bytes()
    as_bloom = {f"model-{number:05d}-of-00072.safetensors": FileId(ROOT, 1 << 32) for number in range(1, 73)}
    assert len(replace(MANIFEST, files={**FILES, **as_bloom}).to_bytes()) < MAX_MANIFEST_BYTES / 8
