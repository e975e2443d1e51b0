"""The folder that a training writes: its checkpoint, its curve, and in the end a module that can be published.

checkpoint.safetensors   see ``checkpoints.py``
log.jsonl                see ``curve.py``
adapter_config.json, adapter_model.safetensors     as PEFT writes them
raceme.json              what was trained on what, and how well
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from client.errors import InvalidInput
from client.modules.description import DESCRIPTION_FILE, Description
from client.tuning.training.loop import CHECKPOINT_FILE, CURVE_FILE, Tunable
from net.replacing import PART_SUFFIX


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make a folder if need be, and keep other processes out until the end. If nothing has come into it by then, it and
    those above it that were made for it are no more.

    Raises:
        InvalidInput: Something else is in it, or somebody else; or it is no folder.
        OSError: It cannot be made.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    handle = _open(folder)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InvalidInput(f"another process is training in {folder}: wait, or give another --out") from error
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if names and not names & {CHECKPOINT_FILE, CURVE_FILE}:
            raise InvalidInput(f"{folder} holds other files, such as {min(names)}: give a new folder as --out")
        try:
            yield
        finally:
            with suppress(OSError):  # something is in it
                for path in new:
                    path.rmdir()
    finally:
        os.close(handle)


def _open(folder: Path) -> int:
    """Raises:
    InvalidInput: it, or one above it, is no folder.
    OSError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder, os.O_RDONLY)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(path for path in (folder, *folder.parents) if path.exists())
        raise InvalidInput(f"{file} is a file, but a training needs a folder: give a new one as --out") from error


def write_module(model: Tunable, folder: Path, description: Description) -> None:
    """Put what was trained into the training's folder; what describes it comes last.

    Args:
        model: Has it.
        folder: The training's.
        description: What to say of it.

    Raises:
        OSError: It cannot be written.
    """
    made = Path(tempfile.mkdtemp(prefix=".module.", suffix=PART_SUFFIX, dir=folder))
    try:
        model.save_pretrained(str(made))
        description.write(made)
        for path in sorted(made.iterdir(), key=lambda path: (path.name == DESCRIPTION_FILE, path.name)):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(made, ignore_errors=True)
