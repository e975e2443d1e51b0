"""Modules that others have published, or that lie in a folder: found, fetched, checked."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from client.modules.description import Description
from net.errors import ModuleError
from net.modules import manifest as manifests
from net.modules.finding import Check, FoundModule, Progress, ambiguous
from net.modules.manifest import Manifest, Reference
from net.modules.store import StoredModule, check_files

if TYPE_CHECKING:
    from client.swarm import AsyncSwarm

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ObtainedModule:
    """A module that is here and has been checked.

    Attributes:
        folder: with its files; nobody else's to change.
        manifest: of a published one, ``None`` of a folder. Its ``hash`` is the parent of what is trained from it.
    """

    folder: Path
    manifest: Manifest | None


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
