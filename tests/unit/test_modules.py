"""Manifests of modules, and the folder in which modules are kept."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.peer.envelope import Envelope, make_unsigned, unmarshal_envelope

from net import records
from net.errors import ModuleError
from net.identity import Identity
from net.modules import manifest as manifests
from net.modules.manifest import Manifest, ModuleFile, Reference
from net.modules.store import ModuleStore, check_files, describe_files
from net.rpc import packing
from tests.modules import DIGEST, make_module, sign
from tests.net_helpers import seeded

AUTHOR = seeded(1)
FILES = [
    ModuleFile(name="adapter_config.json", size=10, root=b"\x01" * 32),
    ModuleFile(name="adapter_model.safetensors", size=20, root=b"\x02" * 32),
]


def made(author: Identity = AUTHOR, **fields: Any) -> Manifest:
    usual: dict[str, Any] = {
        "name": "my-adapter",
        "model": "bloom-tiny",
        "model_digest": DIGEST,
        "method": "lora",
        "files": FILES,
        "licence": "MIT OR Apache-2.0",
        "metrics": {"eval/loss": 2.5},
        "created_s": 1_700_000_000,
    }
    return manifests.make(author, **{**usual, **fields})


def sealed(change: dict[str, Any], *, by: Identity = AUTHOR, domain: str = manifests.DOMAIN) -> bytes:
    """An envelope of somebody who does not check what they sign."""
    fields = {
        "v": 1,
        "name": "my-adapter",
        "model": "bloom-tiny",
        "model_digest": DIGEST,
        "method": "lora",
        "files": [[file.name, file.size, file.root] for file in FILES],
        "metrics": {},
        "licence": "MIT",
        "parent": None,
        "author": AUTHOR.peer_id.to_bytes(),
        "created": 0,
    }
    payload = packing.pack({**fields, **change})
    signature = by.sign(make_unsigned(domain, manifests.PAYLOAD_TYPE, payload))
    envelope = Envelope(
        public_key=by.key_pair.public_key,
        payload_type=manifests.PAYLOAD_TYPE,
        raw_payload=payload,
        signature=signature,
    )
    return bytes(envelope.marshal_envelope())


# Manifests


def test_a_manifest_is_what_was_signed() -> None:
    parent = "cd" * 32
    manifest = made(parent=parent)
    again = manifests.verify(manifest.envelope, expected_hash=manifest.hash)
    assert again == manifest
    assert (again.name, again.model, again.model_digest, again.method) == ("my-adapter", "bloom-tiny", DIGEST, "lora")
    assert (again.files, again.total_bytes, dict(again.metrics)) == (tuple(FILES), 30, {"eval/loss": 2.5})
    assert (again.parent, again.author, again.licence) == (parent, AUTHOR.peer_id, "MIT OR Apache-2.0")
    assert str(again) == f"my-adapter@{again.hash}"
    assert hashlib.sha256(_payload(manifest.envelope)).hexdigest() == manifest.hash


def _payload(envelope: bytes) -> bytes:
    payload: bytes = unmarshal_envelope(envelope).raw_payload
    return payload


def test_every_field_makes_another_hash() -> None:
    files = [FILES[0], ModuleFile(name="adapter_model.safetensors", size=20, root=b"\x03" * 32)]
    others = [
        made(name="other"),
        made(files=files),
        made(parent="cd" * 32),
        made(metrics={}),
        made(author=seeded(2)),
        made(created_s=1),
    ]
    assert len({made().hash, *(other.hash for other in others)}) == 7


def test_a_forged_signature_is_refused() -> None:
    with pytest.raises(ModuleError, match="somebody else signed"):
        manifests.verify(sealed({}, by=seeded(2)))  # their key, our name
    stolen = made()
    theirs = Envelope(
        public_key=AUTHOR.key_pair.public_key,
        payload_type=manifests.PAYLOAD_TYPE,
        raw_payload=_payload(stolen.envelope),
        signature=seeded(2).sign(make_unsigned(manifests.DOMAIN, manifests.PAYLOAD_TYPE, _payload(stolen.envelope))),
    ).marshal_envelope()
    with pytest.raises(ModuleError, match="without a valid signature"):
        manifests.verify(theirs)
    with pytest.raises(ModuleError, match="without a valid signature"):
        manifests.verify(sealed({}, domain=records.DOMAIN))  # a signature made for something else
    with pytest.raises(ModuleError, match="not of"):
        manifests.verify(stolen.envelope, expected_hash="00" * 32)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"v": 2}, "version"),
        ({"name": "../x"}, "'name'"),
        ({"name": "a@b"}, "'name'"),
        ({"name": "a\n"}, "'name'"),
        ({"name": ""}, "'name'"),
        ({"name": "a" * 65}, "'name'"),
        ({"model": "../x"}, "'model'"),
        ({"model_digest": "AB" * 32}, "'model_digest'"),
        ({"method": "LoRA!"}, "'method'"),
        ({"licence": ""}, "'licence'"),
        ({"licence": "x" * 65}, "'licence'"),
        ({"licence": "a\x1b[2J"}, "'licence'"),
        ({"parent": "me"}, "'parent'"),
        ({"author": b"x" * 65}, "'author'"),
        ({"created": -1}, "'created'"),
        ({"metrics": {"loss": float("nan")}}, "'loss'"),
        ({"metrics": {"loss": float("inf")}}, "'loss'"),
        ({"metrics": {"loss": "low"}}, "'loss'"),
        ({"metrics": {"a b": 1.0}}, "a metric"),
        ({"metrics": {f"m{n}": 1.0 for n in range(33)}}, "'metrics'"),
        ({"files": []}, "adapter_config.json"),
        ({"files": [["adapter_config.json", 1, b"r" * 32]]}, "adapter_model.safetensors"),
        ({"files": [[f"{n}.json", 1, b"r" * 32] for n in range(17)]}, "'files'"),
    ],
)
def test_fields_out_of_bounds_are_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ModuleError, match=f"malformed manifest.*{why}"):
        manifests.verify(sealed(change))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../adapter_config.json",
            "..",
            "a/b.json",
            "a\\b.json",
            "/etc/passwd.txt",
            "a..json",
            ".hidden.json",
            "a.py",
        ),
        *("a.bin", "a.json.pkl", "a", "", "a.json\n", "a\0.json", "C:a.json", "a" * 97 + ".json", "\u0430.json"),
    ],
)
def test_files_of_other_names_are_refused(name: str) -> None:
    extra = [[file.name, file.size, file.root] for file in FILES] + [[name, 1, b"r" * 32]]
    with pytest.raises(ModuleError, match="a file called"):
        manifests.verify(sealed({"files": extra}))


@pytest.mark.parametrize(
    "item",
    [
        ["a.json", 1, b"short"],
        ["a.json", -1, b"r" * 32],
        ["a.json", True, b"r" * 32],
        ["a.json", 2**41, b"r" * 32],
        "a",
    ],
)
def test_files_that_cannot_be_are_refused(item: Any) -> None:
    extra = [[file.name, file.size, file.root] for file in FILES] + [item]
    with pytest.raises(ModuleError, match="malformed"):
        manifests.verify(sealed({"files": extra}))


def test_two_files_of_one_name_are_refused() -> None:
    twice = [[file.name, file.size, file.root] for file in FILES] + [["Adapter_Config.json", 1, b"r" * 32]]
    with pytest.raises(ModuleError, match="two files"):
        manifests.verify(sealed({"files": twice}))


def test_nothing_is_signed_that_would_be_refused() -> None:
    for wrong in ({"name": "a/b"}, {"licence": "\ud800"}, {"metrics": {"x": float("nan")}}, {"files": FILES * 9}):
        with pytest.raises(ModuleError, match="nobody would accept"):
            made(**wrong)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ModuleError):
        manifests.verify(data)


@given(st.integers(0, len(made().envelope) - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed(position: int, change: int) -> None:
    whole = made()
    data = bytearray(whole.envelope)
    data[position] ^= change
    with pytest.raises(ModuleError):
        manifests.verify(bytes(data), expected_hash=whole.hash)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
names = ["v", "name", "model", "model_digest", "method", "files", "metrics", "licence", "parent", "author", "created"]


@given(st.dictionaries(st.sampled_from(names), anything, min_size=1))
def test_whatever_is_signed_is_a_manifest_or_refused(change: dict[str, Any]) -> None:
    try:
        manifest = manifests.verify(sealed(change))
    except ModuleError as error:
        assert "\n" not in str(error)
    else:
        assert manifest.author == AUTHOR.peer_id
        assert all(manifests.FILE_NAME.fullmatch(file.name) for file in manifest.files)
        assert manifests.NAME.fullmatch(manifest.name)


def test_too_much_is_not_even_parsed() -> None:
    with pytest.raises(ModuleError, match="at most 8192"):
        manifests.verify(b"\0" * 8193)
    most = made(
        files=[*FILES, *(ModuleFile(name=f"{'f' * 88}{n}.json", size=2**40, root=b"r" * 32) for n in range(10, 24))],
        metrics={f"{'m' * 46}{n}": 1e300 for n in range(10, 42)},
    )
    assert manifests.verify(most.envelope) == most  # what may be, fits


# References


def test_references() -> None:
    manifest = made()
    assert Reference.read("my-adapter").matches(manifest)
    assert Reference.read(f"my-adapter@{manifest.hash}").matches(manifest)
    assert Reference.read(f"my-adapter@{manifest.hash[:8].upper()}").matches(manifest)
    assert not Reference.read("my-adapter@00000000").matches(manifest)
    assert not Reference.read(f"other@{manifest.hash}").matches(manifest)
    for wrong in ("", "a@b", "a@1234567", "../a", f"a@{'0' * 65}", "a b", "@12345678", "a@12345678\n"):
        with pytest.raises(ModuleError, match="names no module"):
            Reference.read(wrong)


# The store


def test_what_is_kept_is_whole(tmp_path: Path) -> None:
    folder = make_module(tmp_path / "mine")
    (folder / ".cache").mkdir()
    (folder / "training_args.bin").write_bytes(b"pickle")
    files, left_out = describe_files(folder)
    assert [file.name for file in files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert left_out == ["training_args.bin"]
    manifest = sign(AUTHOR, folder)
    store = ModuleStore(tmp_path / "modules")
    assert store.all() == []
    kept = store.copy_in(manifest, {file.name: folder / file.name for file in files})
    assert kept.manifest == manifest
    for file in files:
        assert (kept.folder / file.name).read_bytes() == (folder / file.name).read_bytes()
    other = ModuleStore(tmp_path / "modules")
    assert other.get(manifest.hash) == kept
    assert other.all() == [kept] == other.matching(Reference.read(f"my-adapter@{manifest.hash[:9]}"))
    assert other.matching(Reference.read("another")) == []
    assert store.copy_in(manifest, {file.name: folder / file.name for file in files}) == kept  # again
    assert os.listdir(tmp_path / "modules") == [manifest.hash]


@pytest.mark.parametrize("what", ["byte", "size", "missing", "extra"])
def test_nothing_is_kept_of_a_module_that_is_not_what_was_signed(what: str, tmp_path: Path) -> None:
    folder = make_module(tmp_path / "mine")
    manifest = sign(AUTHOR, folder)
    store = ModuleStore(tmp_path / "modules")
    with pytest.raises(ModuleError, match=r"adapter_model|extra"), store.staging() as staged:
        make_module(staged)
        weights = staged / "adapter_model.safetensors"
        data = bytearray(weights.read_bytes())
        if what == "byte":
            data[-1] ^= 1
            weights.write_bytes(data)
        elif what == "size":
            weights.write_bytes(bytes(data) + b"\0")
        elif what == "missing":
            weights.unlink()
        else:
            (staged / "extra.json").write_text("{}")
        store.keep(manifest, staged)
    assert os.listdir(tmp_path / "modules") == []
    assert store.get(manifest.hash) is None


def test_an_oversize_module_is_refused(tmp_path: Path) -> None:
    folder = make_module(tmp_path / "mine")
    manifest = sign(AUTHOR, folder)
    store = ModuleStore(tmp_path / "modules", max_bytes=manifest.total_bytes - 1)
    with pytest.raises(ModuleError, match=f"is {manifest.total_bytes} bytes: at most"):
        store.copy_in(manifest, {file.name: folder / file.name for file in manifest.files})
    assert os.listdir(tmp_path / "modules") == []


def test_what_was_changed_on_disk_is_not_used(tmp_path: Path) -> None:
    folder = make_module(tmp_path / "mine")
    manifest = sign(AUTHOR, folder)
    paths = {file.name: folder / file.name for file in manifest.files}
    store = ModuleStore(tmp_path / "modules")
    kept = store.copy_in(manifest, paths)
    weights = kept.folder / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ModuleError, match="damaged, or changed"):
        check_files(manifest, kept.folder)
    weights.write_bytes(data[:-1])
    assert store.get(manifest.hash) is None
    assert store.all() == []
    again = store.copy_in(manifest, paths)  # the damaged one is out of the way
    check_files(manifest, again.folder)
    assert store.get("../../etc") is None


def test_one_that_was_damaged_is_moved_aside_when_it_is_taken_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_module(tmp_path / "mine")
    manifest = sign(AUTHOR, folder)
    paths = {file.name: folder / file.name for file in manifest.files}
    store = ModuleStore(tmp_path / "modules")
    for count in (1, 2, 3):
        kept = store.copy_in(manifest, paths)  # in place of a damaged one
        check_files(manifest, kept.folder)
        assert store.take_up(manifest.hash) == kept
        assert len(os.listdir(store.folder)) == count
        weights = kept.folder / "adapter_model.safetensors"
        weights.write_bytes(bytes(weights.stat().st_size))
    assert store.take_up(manifest.hash) is None
    assert "adapter_model.safetensors is not what the manifest" in caplog.messages[-1]
    assert store.get(manifest.hash) is None


def test_a_file_in_a_modules_place_is_moved_aside(tmp_path: Path) -> None:
    folder = make_module(tmp_path / "mine")
    manifest = sign(AUTHOR, folder)
    store = ModuleStore(tmp_path / "modules")
    store.folder.mkdir()
    (store.folder / manifest.hash).write_text("somebody's")
    kept = store.copy_in(manifest, {file.name: folder / file.name for file in manifest.files})
    assert store.take_up(manifest.hash) == kept
    assert [path.read_text() for path in store.folder.glob("*.damaged-*")] == ["somebody's"]


def test_what_cannot_be_read_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = ModuleStore(tmp_path / "modules")
    kept = []
    for seed in (0, 1):
        folder = make_module(tmp_path / str(seed), seed=seed)
        manifest = sign(AUTHOR, folder)
        kept.append(store.copy_in(manifest, {file.name: folder / file.name for file in manifest.files}))
    locked, stat = kept[0].folder.parent, Path.stat

    def refuse(path: Path, **options: Any) -> os.stat_result:
        if path == locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    assert store.all() == kept[1:]
    assert [f"{locked} is not used: " in message for message in caplog.messages] == [True]
    (tmp_path / "no-folder").write_text("")
    assert ModuleStore(tmp_path / "no-folder").all() == []
    assert "no module here is used" in caplog.messages[-1]


def test_folders_that_are_no_modules(tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match="no such folder"):
        describe_files(tmp_path / "nowhere")
    with pytest.raises(ModuleError, match=r"is no module: it has no adapter_config\.json"):
        describe_files(tmp_path)
    folder = make_module(tmp_path / "much")
    for number in range(15):
        (folder / f"{number}.json").write_text("{}")
    with pytest.raises(ModuleError, match="17 files"):
        describe_files(folder)
    folder = make_module(tmp_path / "link")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()
    with pytest.raises(ModuleError, match=r"it has no adapter_model\.safetensors"):
        describe_files(folder)


def test_links_in_what_came_are_no_files(tmp_path: Path) -> None:
    folder = make_module(tmp_path / "mine")
    manifest = sign(AUTHOR, folder)
    store = ModuleStore(tmp_path / "modules")
    with (
        pytest.raises(ModuleError, match=r"adapter_model\.safetensors of my-adapter is missing"),
        store.staging() as staged,
    ):
        (staged / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
        (staged / "adapter_model.safetensors").symlink_to(folder / "adapter_model.safetensors")
        store.keep(manifest, staged)


def test_what_was_never_finished_is_cleared_away(tmp_path: Path) -> None:
    store = ModuleStore(tmp_path)
    for name, age_s in (("old", 2 * 86400), ("new", 60)):
        part = tmp_path / f".part-{name}"
        part.mkdir()
        then = part.stat().st_mtime - age_s
        os.utime(part, (then, then))
    with store.staging() as staged:
        assert staged.is_dir()
        assert not (tmp_path / ".part-old").exists()
        assert (tmp_path / ".part-new").exists()
    assert os.listdir(tmp_path) == [".part-new"]
