"""Files that are replaced as a whole: whoever looks sees the old one or the new one, also after a crash."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

PART_SUFFIX: Final = ".part"  # of a file that is being written; its name begins with a dot
FOR_ALL: Final = 0o644


def replace_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Put data in place of a file, at once. Blocks.

    Args:
        path: Where; its folder is there.
        data: All of it.
        mode: Who may read it; by default its owner alone.

    Raises:
        OSError: It cannot be written; what was there is there still.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART_SUFFIX, dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(mode)
        part.replace(path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """So that new names in it outlive a loss of power.

    Raises:
        OSError: It cannot be read, or the disk refuses.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
