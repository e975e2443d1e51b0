"""What a file is to peers: its pieces, their hashes, and who is to send which. Nothing here touches the network.

A file is cut into pieces of ``PIECE_BYTES``, the last one shorter. Its root, by which everybody knows it, is

    SHA-256 of  b"raceme-file:"  size (8 bytes, big-endian)  SHA-256 of each piece, one after another

so that whoever knows root and size can check the list of hashes, and with that list each piece by itself.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from net.errors import RemoteProtocolError

PIECE_BYTES: Final = 1 << 20
HASH_BYTES: Final = 32
MAX_FILE_BYTES: Final = 1 << 40  # whose hashes are 32 MiB
_DOMAIN: Final = b"raceme-file:"


@dataclass(frozen=True)
class FileId:
    """Which file: its root (32 bytes) and its size.

    Raises:
        ValueError: no such root or size can be.
    """

    root: bytes
    size: int

    def __post_init__(self) -> None:
        if len(self.root) != HASH_BYTES:
            raise ValueError(f"a root of {len(self.root)} bytes, expected {HASH_BYTES}")
        if not 0 <= self.size <= MAX_FILE_BYTES:
            raise ValueError(f"a file of {self.size} bytes, expected 0 to {MAX_FILE_BYTES}")

    @classmethod
    def read(cls, root: object, size: object) -> FileId:
        """What a peer says.

        Raises:
            RemoteProtocolError: it cannot be.
        """
        if not isinstance(root, bytes) or len(root) != HASH_BYTES:
            raise RemoteProtocolError(f"a file's root that is not {HASH_BYTES} bytes")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_FILE_BYTES:
            raise RemoteProtocolError(f"a file's size that is not in 0 to {MAX_FILE_BYTES}")
        return cls(root, size)

    @property
    def n_pieces(self) -> int:
        return -(-self.size // PIECE_BYTES)

    def piece_bytes(self, index: int) -> int:
        """The size of a piece.

        Raises:
            IndexError: there is none.
        """
        if not 0 <= index < self.n_pieces:
            raise IndexError(f"no piece {index}: there are {self.n_pieces}")
        return min(PIECE_BYTES, self.size - index * PIECE_BYTES)

    def __str__(self) -> str:
        return self.root.hex()


@dataclass(frozen=True)
class Hashes:
    """A file and the hashes of its pieces, one after another, which make up its root.

    Raises:
        ValueError: they do not.
    """

    file: FileId
    joined: bytes

    def __post_init__(self) -> None:
        if len(self.joined) != self.file.n_pieces * HASH_BYTES or _root(self.file.size, self.joined) != self.file.root:
            raise ValueError("hashes that do not make up the file's root")

    @classmethod
    def of(cls, size: int, joined: bytes) -> Hashes:
        """Those of a file of so many bytes, whose root follows."""
        return cls(FileId(_root(size, joined), size), joined)

    @classmethod
    def of_bytes(cls, data: bytes) -> Hashes:
        """Those of a file that holds ``data``."""
        pieces = range(0, len(data), PIECE_BYTES)
        return cls.of(len(data), b"".join(digest(data[start : start + PIECE_BYTES]) for start in pieces))

    def fits(self, index: int, data: bytes | memoryview) -> bool:
        """Whether these are the bytes of a piece."""
        start = index * HASH_BYTES
        return len(data) == self.file.piece_bytes(index) and digest(data) == self.joined[start : start + HASH_BYTES]


def digest(data: bytes | memoryview) -> bytes:
    """SHA-256."""
    return hashlib.sha256(data).digest()


def hash_file(path: Path) -> Hashes:
    """The hashes of a file on disk; reads it once.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than any file may be.
    """
    with path.open("rb") as file:
        hashes = list(_hash_pieces(file))
        return Hashes.of(file.tell(), b"".join(hashes))


def _hash_pieces(file: BinaryIO) -> Iterator[bytes]:
    while data := file.read(PIECE_BYTES):
        yield digest(data)


def _root(size: int, joined: bytes) -> bytes:
    return hashlib.sha256(_DOMAIN + size.to_bytes(8, "big") + joined).digest()


class Wanted:
    """Which pieces are still to come, and who has been asked for which.

    Every piece is asked of one holder, in order. When all that are left are under way, they are asked of others as
    well, those first that the fewest were asked for, and of these the one under way for the longest: so nobody who is
    slow decides when it ends.
    """

    def __init__(self, n_pieces: int, have: Collection[int] = ()) -> None:
        """All pieces but those that are here."""
        self._free = sorted(set(range(n_pieces)) - set(have))  # a heap
        self._asked: dict[int, list[Hashable]] = {}  # by piece, the longest under way first
        self.left = len(self._free)

    def take(self, holder: Hashable) -> int | None:
        """The piece to ask this holder for next; ``None`` if there is none for it now."""
        if self._free:
            index = heapq.heappop(self._free)
            self._asked[index] = [holder]
            return index
        others = [index for index, holders in self._asked.items() if holder not in holders]
        if not others:
            return None
        index = min(others, key=lambda index: len(self._asked[index]))
        self._asked[index].append(holder)
        return index

    def finish(self, index: int) -> bool:
        """A piece has come, and is right; false if it had come before."""
        if self._asked.pop(index, None) is None:
            return False
        self.left -= 1
        return True

    def give_up(self, index: int, holder: Hashable) -> None:
        """A holder that was asked for it will not send it. Nothing if the piece has come."""
        holders = self._asked.get(index)
        if holders is None or holder not in holders:
            return
        holders.remove(holder)
        if not holders:
            del self._asked[index]
            heapq.heappush(self._free, index)
