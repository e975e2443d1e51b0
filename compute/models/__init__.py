"""Finding a model by the name that a person gives: a shipped model, a folder, or one on the hub.

What is no path is no folder: ``bloom-tiny`` is the model that ships, whatever lies in the current folder, and
``./bloom-tiny`` is a folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from compute.checkpoint import Checkpoint, HubCheckpoint
from compute.errors import ModelNotFound

_SHIPPED_FOLDER: Final = Path(__file__).parent
_REPOSITORY: Final = re.compile(r"^[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}$", re.ASCII)


def shipped_models() -> list[str]:
    """Names of the models that come with Raceme, sorted."""
    return sorted(path.parent.name for path in _SHIPPED_FOLDER.glob("*/config.json"))


def is_folder(name_or_path: str) -> bool:
    """Whether a name is the path of a folder that exists: with a separator in it, or ``.`` or ``..``."""
    is_path = os.sep in name_or_path or name_or_path in (os.curdir, os.pardir)
    return is_path and Path(name_or_path).is_dir()


def find_checkpoint(name_or_path: str, *, allow_hub: bool = True) -> Checkpoint:
    """The checkpoint that goes by a name.

    Args:
        name_or_path: The name of a shipped model; else the path of an existing folder (see ``is_folder``); else
            ``owner/model`` on the Hugging Face hub, of which nothing is fetched yet.
        allow_hub: Whether the hub may be meant.

    Raises:
        CheckpointError: The folder is no checkpoint.
        ModelNotFound: Nothing goes by that name.
    """
    shipped = shipped_models()
    if name_or_path in shipped:
        return Checkpoint.open(_SHIPPED_FOLDER / name_or_path)
    if is_folder(name_or_path):
        return Checkpoint.open(Path(name_or_path))
    if allow_hub and _REPOSITORY.fullmatch(name_or_path):
        return HubCheckpoint(name_or_path)
    if name_or_path and Path(name_or_path).is_dir():
        raise ModelNotFound(
            f"no model {name_or_path!r:.100}; for the folder of that name here, write ./{name_or_path:.100}"
        )
    also = ", or a name like bigscience/bloom-560m" if allow_hub else ""
    raise ModelNotFound(
        f"no model {name_or_path!r:.100}; give one of the shipped models ({', '.join(shipped) or 'none'}), "
        f"the path of a checkpoint's folder{also}"
    )
