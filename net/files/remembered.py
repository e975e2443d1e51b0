"""Hashes of files on disk, remembered on disk, so that a large file is read once and not at every start.

A folder with a small file for each: a line of JSON ``{"path", "size", "mtime_ns", "root"}``, a newline, and the hashes
of the pieces. What does not fit the file as it is now, or itself, counts as nothing. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Final

from net.files.pieces import FileId, Hashes, hash_file
from net.replacing import replace_file

MAX_REMEMBERED: Final = 4096  # files; those that were not used for the longest time go first
logger = logging.getLogger(__name__)


class RememberedHashes:
    """The folder, which is made when there is something to remember. Several processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def hash(self, path: Path) -> Hashes:
        """The hashes of a file: remembered, if it has the same size and time of change as then.

        Raises:
            OSError: it cannot be read.
            ValueError: it is larger than any file may be.
        """
        mark = _mark(path)
        found = self._recall(path, mark)
        if found is None:
            found = hash_file(path)
            if _mark(path) == mark:  # nobody wrote meanwhile
                self.remember(path, found)
        return found

    def remember(self, path: Path, hashes: Hashes) -> None:
        """The file that lies there now has these hashes. What cannot be written is not remembered."""
        place = self._place(path)
        try:
            head = json.dumps(_mark(path) | {"root": str(hashes.file)})
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(place, head.encode() + b"\n" + hashes.joined)
            self._tidy()
        except OSError as error:
            logger.info("hashes of %s are not remembered: %s", path, error)

    def _recall(self, path: Path, mark: dict[str, object]) -> Hashes | None:
        place = self._place(path)
        try:
            head, _, joined = place.read_bytes().partition(b"\n")
            said = json.loads(head)
            if not isinstance(said, dict) or {name: said.get(name) for name in mark} != mark:
                return None
            found = Hashes(FileId(bytes.fromhex(said["root"]), said["size"]), joined)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        with contextlib.suppress(OSError):
            os.utime(place)  # used now
        return found

    def _place(self, path: Path) -> Path:
        return self._folder / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:40]

    def _tidy(self) -> None:
        places = list(self._folder.iterdir())
        if len(places) <= MAX_REMEMBERED:
            return
        dated = []
        for place in places:
            with contextlib.suppress(FileNotFoundError):  # another process did the same
                dated.append((place.stat().st_mtime_ns, place))
        for _, place in sorted(dated)[: len(dated) - MAX_REMEMBERED]:
            place.unlink(missing_ok=True)


def _mark(path: Path) -> dict[str, object]:
    """What shows that a file is still the one that it was."""
    status = path.stat()
    return {"path": str(path.resolve()), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
