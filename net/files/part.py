"""A file on its way to disk. Everything here blocks: call it in threads.

It grows as ``NAME.part`` beside its target, every piece at its place, and becomes the target by being renamed once it
is whole and on the disk. Who fetches it again later finds out by the pieces' hashes which of them are there; nothing
else need be remembered. A lock on it keeps others, in this process or another one, from doing the same at once.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from pathlib import Path
from typing import Final

from net.errors import StorageError
from net.files.pieces import PIECE_BYTES, Hashes, hash_file
from net.replacing import sync_folder

LEFT_BYTES: Final = 16 << 20  # of the disk, for others


class Part:
    """See the module. Made by :meth:`open`."""

    def __init__(self, target: Path, path: Path, fd: int) -> None:
        self._target = target
        self._path = path
        self._fd = fd

    @classmethod
    def open(cls, target: Path) -> Part | None:
        """Take hold of what there is, or begin; ``None`` while somebody else holds it.

        Raises:
            StorageError: the folder cannot be written to.
        """
        path = target.with_name(target.name + ".part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _refused(path, error) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise StorageError(f"{path}: no regular file; move it away")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = os.path.samestat(os.fstat(fd), path.stat())
        except (BlockingIOError, FileNotFoundError):  # or whoever held it has renamed it
            is_there = False
        except BaseException:
            os.close(fd)
            raise
        if not is_there:
            os.close(fd)
            return None
        return cls(target, path, fd)

    def find_whole(self, size: int) -> Hashes | None:
        """The hashes of the target, if there is one of that size."""
        try:
            status = self._target.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size != size:
                return None
            return hash_file(self._target)
        except OSError:
            return None  # it is replaced

    def survey(self, hashes: Hashes) -> set[int]:
        """Which pieces are here already.

        Raises:
            StorageError: it cannot be read, or the disk has no room for the rest.
        """
        file = hashes.file
        found: set[int] = set()
        try:
            there = os.fstat(self._fd).st_size
            for index in range(min(file.n_pieces, -(-there // PIECE_BYTES))):
                if hashes.fits(index, os.pread(self._fd, PIECE_BYTES, index * PIECE_BYTES)):
                    found.add(index)
            missing = file.size - sum(file.piece_bytes(index) for index in found)
            free = shutil.disk_usage(self._target.parent).free
        except OSError as error:
            raise _refused(self._path, error) from error
        if missing + LEFT_BYTES > free:
            raise StorageError(
                f"{self._target}: {missing} bytes are to come, but the disk has {free} left; make room and try again"
            )
        return found

    def put(self, hashes: Hashes, index: int, data: bytes | memoryview) -> bool:
        """Write a piece, if these are its bytes; false if they are not.

        Raises:
            StorageError: the disk takes no more; what was written stays good.
        """
        if not hashes.fits(index, data):
            return False
        try:
            view, at = memoryview(data), index * PIECE_BYTES
            while view:
                written = os.pwrite(self._fd, view, at)
                view, at = view[written:], at + written
        except OSError as error:
            raise _refused(self._path, error) from error
        return True

    def finish(self, size: int) -> None:
        """All pieces are there: make it the target, which is replaced.

        Raises:
            StorageError: the disk refuses; all pieces stay.
        """
        try:
            os.ftruncate(self._fd, size)  # what was there before may have been longer
            os.fsync(self._fd)
            self._path.replace(self._target)
            sync_folder(self._target.parent)
        except OSError as error:
            raise _refused(self._target, error) from error

    def discard(self) -> None:
        """Nothing of it is of use: it goes when it is closed."""
        os.ftruncate(self._fd, 0)

    def close(self) -> None:
        """Let others have it, unless there is nothing in it."""
        try:
            status = os.fstat(self._fd)
            if not status.st_size and os.path.samestat(status, self._path.stat()):  # not if it is the target now
                self._path.unlink()
        except FileNotFoundError:
            pass  # renamed
        finally:
            os.close(self._fd)


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path}: {error.strerror or error}; check disk and permissions, then try again: what has come is kept"
    )
