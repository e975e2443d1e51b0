"""Modules on disk, by hash. Every one that is put here is whole, and what its manifest says.

    FOLDER/HASH/manifest    the signed envelope
    FOLDER/HASH/files/      what the manifest names, and nothing else: a Hugging Face style folder

A module is put together in a folder beside the others, checked there, and takes its place by one renaming: whatever
ends a program meanwhile, there is either the whole module or none. What was never finished is cleared away later. What
has been damaged since is found out by reading it (``take_up``), and moved to ``HASH.damaged-...``: nothing is deleted.
Several processes may use one store.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from net.errors import ModuleDamaged, ModuleError
from net.files.pieces import Hashes, hash_file
from net.modules import manifest as manifests
from net.modules.manifest import Manifest, ModuleFile, Reference

__all__ = ["ModuleStore", "StoredModule", "describe_files"]

logger = logging.getLogger(__name__)

MODULES_FOLDER: Final = "modules"  # in the data folder, by default
MAX_MODULE_BYTES: Final = 1 << 30  # of one module, by default: adapters are a few megabytes
MAX_MODULES: Final = 4096  # that are looked through
_MANIFEST: Final = "manifest"
_FILES: Final = "files"
_PART_PREFIX: Final = ".part-"
_ABANDONED_S: Final = 24 * 3600.0  # no module takes so long to come


@dataclass(frozen=True, kw_only=True)
class StoredModule:
    """A module that is here.

    Attributes:
        folder: with its files.
    """

    manifest: Manifest
    folder: Path


class ModuleStore:
    """The folder. Everything blocks on the disk: call it from another thread than trio's where files may be large."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_MODULE_BYTES) -> None:
        """Name the folder, which is made when there is something to keep.

        Args:
            folder: nobody else's.
            max_bytes: of all files of one module.
        """
        self.folder = folder
        self.max_bytes = max_bytes

    def get(self, module_hash: str) -> StoredModule | None:
        """The module of this hash (64 digits), if it is here.

        What somebody has changed on disk meanwhile, as far as its manifest or the sizes of its files show it, is not;
        nor is what cannot be read. Before its files are used, they are to be read: see ``take_up``.
        """
        place = self.folder / module_hash
        if not manifests.HASH.fullmatch(module_hash):
            return None
        try:
            if not place.is_dir():
                return None
            with (place / _MANIFEST).open("rb") as file:
                data = file.read(manifests.MAX_ENVELOPE_BYTES + 1)
            manifest = manifests.verify(data, expected_hash=module_hash)
            _check_sizes(manifest, place / _FILES)
        except (OSError, ModuleError) as error:
            logger.warning("%s is not used: %s; mend or delete it", place, error)
            return None
        return StoredModule(manifest=manifest, folder=place / _FILES)

    def take_up(self, module_hash: str) -> StoredModule | None:
        """The module of this hash, all of whose files were read and are what its author signed.

        One that was damaged is moved aside, and is here no more: it can come again.

        Raises:
            OSError: a file cannot be read, or the damaged module cannot be moved.
        """
        module = self.get(module_hash)
        if module is None:
            return None
        try:
            check_files(module.manifest, module.folder)
        except ModuleDamaged as error:
            moved = self.set_aside(module_hash)
            logger.warning("%s is not used, and lies in %s now: %s", module.manifest, moved, error)
            return None
        return module

    def all(self) -> list[StoredModule]:
        """Every module that is here and can be read, the oldest first."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.folder) if manifests.HASH.fullmatch(entry.name))
        except FileNotFoundError:
            return []
        except OSError as error:
            logger.warning("%s: no module here is used: %s", self.folder, error.strerror or error)
            return []
        found = [self.get(name) for name in names[:MAX_MODULES]]
        return sorted(
            (module for module in found if module is not None),
            key=lambda each: (each.manifest.created_s, each.manifest.hash),
        )

    def matching(self, reference: Reference) -> list[StoredModule]:
        """Those that may be meant."""
        return [module for module in self.all() if reference.matches(module.manifest)]

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """``begin``, and after the block ``end``, whatever happens.

        Raises: as ``begin``.
        """
        staged = self.begin()
        try:
            yield staged
        finally:
            self.end(staged)

    def begin(self) -> Path:
        """An empty folder for a module's files: for ``keep``, and ``end``.

        Raises:
            OSError: it cannot be made.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear_abandoned()
        files = Path(tempfile.mkdtemp(prefix=_PART_PREFIX, dir=self.folder)) / _FILES
        files.mkdir()
        return files

    def end(self, staged: Path) -> None:
        """Delete a folder of ``begin``, unless it was kept."""
        shutil.rmtree(staged.parent, ignore_errors=True)

    def keep(self, manifest: Manifest, staged: Path) -> StoredModule:
        """Take over what lies in ``staged``, a folder of ``begin``. A module that is here, and whole, stays as it is.

        Raises:
            ModuleError: the files are not what the manifest says, or larger than is kept here.
            OSError: the disk is full, or refuses.
        """
        if (known := self.take_up(manifest.hash)) is not None:
            return known
        self.check_size(manifest)
        check_files(manifest, staged)
        for file in manifest.files:
            _sync(staged / file.name)
        proof = staged.parent / _MANIFEST
        proof.write_bytes(manifest.envelope)
        _sync(proof)
        staged.parent.chmod(0o755)  # temporary folders are their owner's alone
        place = self.folder / manifest.hash
        for _ in range(2):
            try:
                staged.parent.rename(place)
            except OSError:
                if not place.exists():
                    raise
                if (known := self.take_up(manifest.hash)) is not None:
                    return known  # another process was faster
                if place.exists():
                    self.set_aside(manifest.hash)
            else:
                return StoredModule(manifest=manifest, folder=place / _FILES)
        raise ModuleError(f"{place} is in the way: move it aside")

    def set_aside(self, module_hash: str) -> Path:
        """Move away what has the name of a module and is none, or is damaged; gives where it is now.

        Raises:
            OSError: it cannot be moved.
        """
        place = self.folder / module_hash
        target = Path(tempfile.mkdtemp(prefix=f"{module_hash}.damaged-", dir=self.folder))
        target.rmdir()  # no file could take its place
        return place.rename(target)

    def copy_in(self, manifest: Manifest, files: Mapping[str, Path]) -> StoredModule:
        """Keep copies of files under the manifest's names.

        Raises: as ``keep``, and KeyError: one that the manifest names is missing.
        """
        with self.staging() as staged:
            for file in manifest.files:
                shutil.copyfile(files[file.name], staged / file.name)
            return self.keep(manifest, staged)

    def check_size(self, manifest: Manifest) -> None:
        """Raises:
        ModuleError: it is larger than is kept here.
        """
        if manifest.total_bytes > self.max_bytes:
            raise ModuleError(
                f"{manifest.name}@{manifest.hash[:12]} is {manifest.total_bytes} bytes: at most {self.max_bytes} are "
                f"taken"
            )

    def _clear_abandoned(self) -> None:
        for part in self.folder.glob(_PART_PREFIX + "*"):
            try:
                age_s = time.time() - part.stat().st_mtime
            except FileNotFoundError:
                continue
            if age_s > _ABANDONED_S:
                shutil.rmtree(part, ignore_errors=True)


def describe_files(folder: Path, *, leave_out: Collection[str] = frozenset()) -> tuple[list[ModuleFile], list[str]]:
    """What a manifest says of the files in a folder, and the names of what no module may have, which is left out.

    Args:
        folder: a module's.
        leave_out: files that are nobody else's business; they are named nowhere.

    Raises:
        ModuleError: the folder is no module's.
        OSError: a file cannot be read.
    """
    if not folder.is_dir():
        raise ModuleError(f"{folder}: no such folder")
    entries = sorted(
        entry for entry in folder.iterdir() if not entry.name.startswith(".") and entry.name not in leave_out
    )
    taken = [entry for entry in entries if manifests.FILE_NAME.fullmatch(entry.name) and entry.is_file()]
    for name in manifests.REQUIRED:
        if name not in {entry.name for entry in taken}:
            raise ModuleError(f"{folder} is no module: it has no {name}")
    if len(taken) > manifests.MAX_FILES:
        raise ModuleError(f"{folder} holds {len(taken)} files: a module has at most {manifests.MAX_FILES}")
    described = [
        ModuleFile(name=entry.name, size=entry.stat().st_size, root=hash_file(entry).file.root) for entry in taken
    ]
    return described, [entry.name for entry in entries if entry not in taken]


def check_files(manifest: Manifest, folder: Path) -> list[Hashes]:
    """Read all files in ``folder``, and give their hashes, in the manifest's order.

    Raises:
        ModuleDamaged: they are not those of the manifest, to the byte.
        OSError: one cannot be read.
    """
    _check_sizes(manifest, folder)
    found = []
    for file in manifest.files:
        hashes = hash_file(folder / file.name)
        if hashes.file.root != file.root:
            raise ModuleDamaged(
                f"{file.name} is not what the manifest of {manifest.name} says: it was damaged, or changed"
            )
        found.append(hashes)
    return found


def _check_sizes(manifest: Manifest, folder: Path) -> None:
    """Raises:
    ModuleDamaged: other files than the manifest names, or of other sizes.
    """
    there = {
        entry.name: entry.stat(follow_symlinks=False).st_size
        for entry in os.scandir(folder)
        if entry.is_file(follow_symlinks=False)
    }
    named = {file.name: file.size for file in manifest.files}
    for name in sorted(named.keys() | there.keys()):
        if name not in there:
            raise ModuleDamaged(f"{name} of {manifest.name} is missing")
        if name not in named:
            raise ModuleDamaged(f"{name} is not named in the manifest of {manifest.name}")
        if there[name] != named[name]:
            raise ModuleDamaged(
                f"{name} has {there[name]} bytes, but the manifest of {manifest.name} says {named[name]}"
            )


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
