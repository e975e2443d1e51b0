"""Modules that others have published, or that lie in a folder: found, fetched, checked.

A module's folder is a Hugging Face style one: ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT writes
them, and ``raceme.json``, which says what they were trained on:

    {"version": 1, "model": "bloom-tiny", "model_digest": hex, "method": "lora", "metrics": {"loss": 2.1},
     "parent": HASH of the published module from which training began, or null}

Folders without it are taken as well: what they fit is then for their shapes to show.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from net.errors import ModuleError
from net.modules import manifest as manifests
from net.modules.finding import Check, FoundModule, Progress, ambiguous
from net.modules.manifest import Manifest, Reference
from net.modules.store import StoredModule, check_files
from net.replacing import FOR_ALL, replace_file

if TYPE_CHECKING:
    from client.swarm import AsyncSwarm

__all__ = ["Description", "FoundModule", "ObtainedModule", "is_path", "obtain", "read_json"]

logger = logging.getLogger(__name__)

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
DESCRIPTION_FILE: Final = "raceme.json"
VERSION: Final = 1
MAX_JSON_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ObtainedModule:
    """A module that is here and has been checked.

    Attributes:
        folder: with its files; nobody else's to change.
        manifest: of a published one, ``None`` of a folder. Its ``hash`` is the parent of what is trained from it.
    """

    folder: Path
    manifest: Manifest | None


@dataclass(frozen=True, kw_only=True)
class Description:
    """What ``raceme.json`` says of a module.

    Attributes:
        model, model_digest: what it was trained on.
        method: such as "lora".
        metrics: what was measured.
        parent: HASH of the published module from which training began.
    """

    model: str
    model_digest: str
    method: str
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    parent: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Description | None:
        """That of a folder; ``None`` if it has none.

        Raises:
            ModuleError: it makes no sense.
        """
        path = folder / DESCRIPTION_FILE
        if not path.exists():
            return None
        fields = read_json(path)
        if fields.get("version") != VERSION:
            raise ModuleError(f"{path}: of version {str(fields.get('version'))[:20]}, not {VERSION}")
        metrics = fields.get("metrics", {})
        if not isinstance(metrics, dict) or not all(_is_number(value) for value in metrics.values()):
            raise ModuleError(f"{path}: its metrics are no finite numbers by name")
        parent = fields.get("parent")
        return cls(
            model=_text(path, fields, "model", manifests.MODEL),
            model_digest=_text(path, fields, "model_digest", manifests.HASH),
            method=_text(path, fields, "method", manifests.METHOD),
            metrics={name: float(value) for name, value in metrics.items()},
            parent=None if parent is None else _text(path, fields, "parent", manifests.HASH),
        )

    def write(self, folder: Path) -> None:
        """Put it into a folder, in place of what is there.

        Raises:
            OSError: it cannot be written; what was there is there still.
        """
        fields = {
            "version": VERSION,
            "model": self.model,
            "model_digest": self.model_digest,
            "method": self.method,
            "metrics": dict(self.metrics),
            "parent": self.parent,
        }
        text = json.dumps(fields, indent=2, allow_nan=False) + "\n"
        replace_file(folder / DESCRIPTION_FILE, text.encode(), mode=FOR_ALL)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a file that anybody may have written.

    Raises:
        ModuleError: it is missing, too large, or something else.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ModuleError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(data)
    except OSError as error:
        raise ModuleError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModuleError(f"{path}: no JSON") from error
    if not isinstance(value, dict):
        raise ModuleError(f"{path}: no JSON object")
    return value


def is_path(module: str | PathLike[str]) -> bool:
    """Whether a folder is meant, and no published module: as with models' names, a path has a separator in it."""
    return not isinstance(module, str) or os.sep in module or module in (os.curdir, os.pardir)


async def obtain(
    swarm: AsyncSwarm,
    module: str | PathLike[str],
    model_digest: str | None,
    *,
    check: Check | None = None,
    progress: Progress | None = None,
) -> ObtainedModule:
    """A module for a model, fetched from its holders unless it is here.

    Args:
        swarm: through which it is found; its ``module_store`` keeps it.
        module: ``NAME@HASH`` (at least 8 digits), ``NAME`` if there is but one, or the path of a folder.
        model_digest: of the model that it is for; ``None`` for whichever.
        check: called in another thread with the folder; what it refuses, by raising, is not kept.
        progress: called with bytes of the module that have come, and of all.

    Raises:
        ModuleError: it cannot be had, is not what its author signed, or is for another model.
        Exception: whatever ``check`` raises.
    """
    if is_path(module):
        folder = Path(module)
        await trio.to_thread.run_sync(_check_folder, folder, model_digest, check)
        return ObtainedModule(folder=folder, manifest=None)
    reference = Reference.read(str(module))
    here = await trio.to_thread.run_sync(swarm.module_store.matching, reference)
    found = await _find(swarm, reference, [each.manifest for each in here])
    _check_model(here[0].manifest if found is None else found.manifest, model_digest)
    if found is None:
        if await trio.to_thread.run_sync(_is_whole, here[0]):
            if check is not None:
                await trio.to_thread.run_sync(check, here[0].folder)
            return ObtainedModule(folder=here[0].folder, manifest=here[0].manifest)
        found = await _replace_damaged(swarm, here[0])
    kept = await swarm.module_finder.fetch(found, swarm.module_store, check=check, progress=progress)
    return ObtainedModule(folder=kept.folder, manifest=kept.manifest)


async def _replace_damaged(swarm: AsyncSwarm, damaged: StoredModule) -> FoundModule:
    """Who has a module whose files here are damaged; these are moved out of the way.

    Raises:
        ModuleError: nobody has it; or the damaged one cannot be moved.
    """
    manifest, place = damaged.manifest, damaged.folder.parent
    try:
        found = await swarm.module_finder.resolve(Reference(name=manifest.name, hash_prefix=manifest.hash))
        moved = await trio.to_thread.run_sync(swarm.module_store.set_aside, manifest.hash)
    except ModuleError as error:
        raise ModuleError(f"{place} was damaged, or changed, and it cannot be fetched again: {error}") from error
    except OSError as error:
        raise ModuleError(f"{place} was damaged, or changed; delete it ({error.strerror or error})") from error
    logger.warning("%s was damaged, or changed; it is fetched again, and what was there is in %s", manifest, moved)
    return found


def _is_whole(module: StoredModule) -> bool:
    """Whether its files are still what its author signed.

    Raises:
        ModuleError: one cannot be read.
    """
    try:
        check_files(module.manifest, module.folder)
    except ModuleError:
        return False
    except OSError as error:
        raise ModuleError(f"{module.folder}: {error.strerror or error}") from error
    return True


async def _find(swarm: AsyncSwarm, reference: Reference, here: Sequence[Manifest]) -> FoundModule | None:
    """Who has the one that is meant; ``None``: it is the only one in ``here``.

    Raises:
        ModuleError: nobody has it, or several may be meant.
    """
    if not here:
        try:
            return await swarm.module_finder.resolve(reference)
        except ModuleError as error:
            if reference.hash_prefix or not await trio.to_thread.run_sync(Path(reference.name).is_dir):
                raise
            raise ModuleError(f"{error}; for the folder of that name here, write ./{reference.name}") from error
    candidates = {each.hash: each for each in here}
    if not reference.hash_prefix:  # others may have another one of that name
        candidates |= {each.manifest.hash: each.manifest for each in await swarm.module_finder.named(reference.name)}
    if len(candidates) > 1:
        raise ModuleError(ambiguous(reference, candidates.values()))
    return None


def _check_folder(folder: Path, model_digest: str | None, check: Check | None) -> None:
    """Raises:
    ModuleError: it is no module's, or another model's.
    """
    if not folder.is_dir():
        raise ModuleError(f"{folder}: no such folder")
    for name in manifests.REQUIRED:
        if not (folder / name).is_file():
            raise ModuleError(f"{folder} is no module: it has no {name}")
    description = Description.read(folder)
    if description is not None and model_digest not in (None, description.model_digest):
        raise ModuleError(_other_model(str(folder), description.model, description.model_digest, model_digest))
    if check is not None:
        check(folder)


def _check_model(manifest: Manifest, model_digest: str | None) -> None:
    """Raises:
    ModuleError: it is for another model.
    """
    if model_digest not in (None, manifest.model_digest):
        what = f"{manifest.name}@{manifest.hash[:12]}"
        raise ModuleError(_other_model(what, manifest.model, manifest.model_digest, model_digest))


def _other_model(what: str, model: str, digest: str, wanted: str | None) -> str:
    trained_on = f"{model} with digest {digest[:12]}"
    return f"{what} was trained on {trained_on}, but this model has {str(wanted)[:12]}: it cannot be used"


def _text(path: Path, fields: Mapping[str, Any], name: str, pattern: Any) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ModuleError(f"{path}: its {name!r} is {str(value)[:80]!r}, which is not of the form expected")
    return value


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= manifests.MAX_METRIC
