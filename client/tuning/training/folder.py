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
from contextlib import contextmanager
from pathlib import Path

from client.errors import InvalidInput
from client.modules.description import DESCRIPTION_FILE, Description
from client.tuning.training.loop import CHECKPOINT_FILE, CURVE_FILE, Tunable
from net.replacing import PART_SUFFIX


@contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Make a folder if need be, and keep other processes out until the end.

    Raises:
        InvalidInput: Something else is in it, or somebody else.
        OSError: It cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InvalidInput(f"another process is training in {folder}: wait, or give another --out") from error
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if names and not names & {CHECKPOINT_FILE, CURVE_FILE}:
            raise InvalidInput(f"{folder} holds other files, such as {min(names)}: give a new folder as --out")
        yield
    finally:
        os.close(handle)


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
