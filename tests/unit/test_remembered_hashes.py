"""Hashes that are remembered on disk: used while the file is the same, never otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from net.files import remembered
from net.files.pieces import PIECE_BYTES, Hashes, hash_file
from net.files.remembered import RememberedHashes

DATA = bytes(PIECE_BYTES) + b"the rest"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were read."""
    found: list[Path] = []

    def counted(path: Path) -> Hashes:
        found.append(path)
        return hash_file(path)

    monkeypatch.setattr(remembered, "hash_file", counted)
    return found


def test_a_file_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    (tmp_path / "link").symlink_to(path)
    for each in (path, path, tmp_path / "link"):
        assert RememberedHashes(tmp_path / "hashes").hash(each) == Hashes.of_bytes(DATA)
    assert reads == [path]


@pytest.mark.parametrize("change", ["time", "size", "path"])
def test_what_has_changed_is_read_again(change: str, tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    hashes = RememberedHashes(tmp_path / "hashes")
    hashes.hash(path)
    times = path.stat()
    if change == "time":
        path.write_bytes(DATA[::-1])
        os.utime(path, ns=(0, times.st_mtime_ns + 1))
    elif change == "size":
        path.write_bytes(DATA + b"more")
        os.utime(path, ns=(0, times.st_mtime_ns))
    else:
        path = path.rename(tmp_path / "other")
    assert hashes.hash(path) == Hashes.of_bytes(path.read_bytes())
    assert len(reads) == 2


@given(at=st.integers(0, 300), put=st.binary(max_size=8))
def test_damaged_notes_are_worth_nothing(at: int, put: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("remembered")
    path = folder / "file"
    path.write_bytes(b"short")
    hashes = RememberedHashes(folder / "hashes")
    hashes.hash(path)
    [note] = (folder / "hashes").iterdir()
    data = note.read_bytes()
    note.write_bytes(data[:at] + put + data[at + len(put) :])
    assert hashes.hash(path) == Hashes.of_bytes(b"short")


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    (tmp_path / "hashes").write_bytes(b"in the way")
    assert RememberedHashes(tmp_path / "hashes").hash(tmp_path / "file") == Hashes.of_bytes(DATA)


def test_those_not_used_for_longest_go_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    monkeypatch.setattr(remembered, "MAX_REMEMBERED", 3)
    hashes = RememberedHashes(tmp_path / "hashes")
    paths = [tmp_path / f"file-{number}" for number in range(4)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]))
        hashes.hash(path)
        for note in (tmp_path / "hashes").iterdir():
            status = note.stat()
            os.utime(note, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))
    assert len(list((tmp_path / "hashes").iterdir())) == 3
    reads.clear()
    for path in reversed(paths):
        hashes.hash(path)
    assert reads == [paths[0]]
