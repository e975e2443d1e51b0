"""Files as pieces: roots, hashes, and who is asked for what."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from net.errors import RemoteProtocolError
from net.files.pieces import MAX_FILE_BYTES, PIECE_BYTES, FileId, Hashes, Wanted, hash_file

SIZES = [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES]


def content(size: int) -> bytes:
    return (b"0123456789abcdef-" * (size // 17 + 1))[:size]


@pytest.mark.parametrize("size", SIZES)
def test_the_root_is_what_the_format_says(size: int, tmp_path: Path) -> None:
    data = content(size)
    joined = b"".join(hashlib.sha256(data[at : at + 2**20]).digest() for at in range(0, size, 2**20))
    root = hashlib.sha256(b"raceme-file:" + size.to_bytes(8, "big") + joined).digest()
    (tmp_path / "file").write_bytes(data)
    hashes = hash_file(tmp_path / "file")
    assert hashes == Hashes.of_bytes(data) == Hashes(FileId(root, size), joined)
    assert hashes.file.n_pieces == len(joined) // 32
    assert sum(hashes.file.piece_bytes(index) for index in range(hashes.file.n_pieces)) == size
    assert str(hashes.file) == root.hex()


@given(st.binary(max_size=200), st.integers(0, 250), st.binary(max_size=3))
def test_hashes_that_are_not_the_files_are_refused(joined: bytes, at: int, put: bytes) -> None:
    hashes = Hashes.of(len(joined) // 32 * PIECE_BYTES, joined[: len(joined) // 32 * 32])
    changed = hashes.joined[:at] + put + hashes.joined[at + len(put) :]
    if changed != hashes.joined:
        with pytest.raises(ValueError, match="do not make up"):
            Hashes(hashes.file, changed)


@given(st.sampled_from(SIZES[1:]), st.data())
def test_a_piece_fits_its_own_place_alone(size: int, data: st.DataObject) -> None:
    whole = content(size)
    hashes = Hashes.of_bytes(whole)
    index = data.draw(st.integers(0, hashes.file.n_pieces - 1))
    piece = whole[index * PIECE_BYTES : (index + 1) * PIECE_BYTES]
    assert hashes.fits(index, piece)
    at = data.draw(st.integers(0, len(piece) - 1))
    flipped = piece[:at] + bytes([piece[at] ^ (1 << data.draw(st.integers(0, 7)))]) + piece[at + 1 :]
    for wrong in (flipped, piece[:-1], piece + b"\0", b""):
        assert not hashes.fits(index, wrong)


@given(st.binary() | st.none() | st.text() | st.integers(), st.integers() | st.none() | st.booleans() | st.floats())
def test_what_peers_say_of_files(root: object, size: object) -> None:
    is_good = isinstance(root, bytes) and len(root) == 32 and type(size) is int and 0 <= size <= MAX_FILE_BYTES
    try:
        assert FileId.read(root, size) == FileId(root, size)  # type: ignore[arg-type]
        assert is_good
    except RemoteProtocolError:
        assert not is_good


def test_no_such_file_can_be() -> None:
    for root, size in ((b"", 0), (bytes(31), 0), (bytes(32), -1), (bytes(32), MAX_FILE_BYTES + 1)):
        with pytest.raises(ValueError, match="expected"):
            FileId(root, size)
    with pytest.raises(IndexError):
        FileId(bytes(32), PIECE_BYTES).piece_bytes(1)


def test_pieces_are_asked_of_one_holder_until_all_are_under_way() -> None:
    wanted = Wanted(4, have={1})
    assert [wanted.take("a"), wanted.take("b"), wanted.take("a")] == [0, 2, 3]
    assert wanted.take("a") == 2  # the only one that it is not asked for
    assert wanted.take("b") == 0  # of those asked of one holder alone, the longest under way
    assert wanted.take("a") is None
    assert wanted.finish(2)
    assert not wanted.finish(2)
    wanted.give_up(2, "b")  # nothing
    wanted.give_up(0, "a")
    wanted.give_up(3, "a")
    assert wanted.take("c") == 3  # nobody's
    assert wanted.take("c") == 0  # b's alone
    assert wanted.left == 2


class WantedMachine(RuleBasedStateMachine):
    """Holders that take, send and give up in any order."""

    @initialize(n=st.integers(0, 12), have=st.sets(st.integers(0, 11)))
    def begin(self, n: int, have: set[int]) -> None:
        self.wanted = Wanted(n, have)
        self.missing = set(range(n)) - have
        self.asked: set[tuple[int, int]] = set()

    @rule(holder=st.integers(0, 2))
    def take(self, holder: int) -> None:
        asked = {index for index, _ in self.asked}
        index = self.wanted.take(holder)
        if index is None:
            assert all((each, holder) in self.asked for each in self.missing)
            return
        assert index in self.missing
        assert (index, holder) not in self.asked
        assert index not in asked or self.missing <= asked  # twice only when nothing else is left
        self.asked.add((index, holder))

    @rule(data=st.data(), arrives=st.booleans())
    def end(self, data: st.DataObject, arrives: bool) -> None:
        if not self.asked:
            return
        index, holder = data.draw(st.sampled_from(sorted(self.asked)))
        if arrives:
            assert self.wanted.finish(index) == (index in self.missing)
            self.missing.discard(index)
        self.wanted.give_up(index, holder)
        self.asked.discard((index, holder))

    @invariant()
    def counts(self) -> None:
        if hasattr(self, "wanted"):
            assert self.wanted.left == len(self.missing)


TestWanted = WantedMachine.TestCase
