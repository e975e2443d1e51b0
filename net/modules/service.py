"""Holding modules for others: their manifests and files are served, and who holds them is announced."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import trio

from net import errors
from net.dht.service import Dht
from net.errors import ModuleDamaged, ModuleError
from net.files.pieces import FileId
from net.files.server import FileServer
from net.host import Host
from net.modules import announcement, wire
from net.modules.finding import ModuleFinder
from net.modules.manifest import Manifest, Reference
from net.modules.store import ModuleStore, StoredModule, check_files
from net.mux.base import Stream
from net.swarm import Connection

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModuleSettings:
    """How modules are held. Figures are our own.

    Attributes:
        max_held: Each is announced under two keys of its own, to twenty servers, every half a minute.
        retry_s: Before a module that could not be had is tried again; then twice as long, and so on,
        max_retry_s: up to this.
    """

    max_held: int = 64
    retry_s: float = 30.0
    max_retry_s: float = 1800.0


class ModuleService:
    """What a host holds."""

    def __init__(
        self, host: Host, dht: Dht, store: ModuleStore, files: FileServer, settings: ModuleSettings | None = None
    ) -> None:
        """Serve on ``host`` from now on. Whoever runs the DHT withdraws what is announced.

        Args:
            host: answers.
            dht: announces and finds.
            store: from which modules are served, and in which those are kept that are fetched.
            files: serves their files; others may use it, too.
            settings: how many, and how often what cannot be had is tried again.
        """
        self._host = host
        self._dht = dht
        self._store = store
        self._files = files
        self._settings = settings or ModuleSettings()
        self._held: dict[str, Manifest] = {}
        self._losses: dict[str, trio.Event] = {}  # for each that is held: it is not any more
        self.finder = ModuleFinder(host, dht)
        host.handle(wire.PROTOCOL_ID, self._serve)

    @property
    def held(self) -> list[Manifest]:
        """The modules that are served."""
        return list(self._held.values())

    async def serve(self, module: StoredModule) -> None:
        """Serve a module of the store, and announce it, as long as the host and the DHT run; unless one of its files
        turns out to be damaged when it is read.

        Raises:
            ModuleDamaged: its files were changed.
            ModuleError, StorageError: they cannot be read, or too many modules are held.
        """
        manifest = module.manifest
        if manifest.hash not in self._held and len(self._held) >= self._settings.max_held:
            raise ModuleError(f"{len(self._held)} modules are held here, the most allowed")
        try:
            hashes = await trio.to_thread.run_sync(check_files, manifest, module.folder)
        except OSError as error:
            raise ModuleError(f"{module.folder}: {error.strerror or error}") from error
        self._held[manifest.hash] = manifest  # by now: a file may turn out to be damaged before all are served
        self._losses.setdefault(manifest.hash, trio.Event())
        try:
            for file, known in zip(manifest.files, hashes, strict=True):
                await self._files.add_known(known, module.folder / file.name, self._lose)
        except errors.StorageError:
            self._forget(manifest)
            raise
        async with trio.open_nursery() as nursery:
            for key in announcement.keys_of(manifest):
                nursery.start_soon(self._announce, key)

    async def hold(self, reference: Reference) -> StoredModule:
        """Have the module here, fetched from others if need be, also in place of a damaged one, and serve it.

        Raises:
            ModuleError: it cannot be had, or must not be used.
        """
        here = await trio.to_thread.run_sync(self._store.matching, reference)
        if len(here) == 1 and reference.hash_prefix:
            try:
                await self.serve(here[0])
            except ModuleDamaged as error:
                await self._set_aside(here[0], error)
            else:
                return here[0]
        module = await self.finder.fetch(await self.finder.resolve(reference), self._store)
        await self.serve(module)
        return module

    async def _set_aside(self, damaged: StoredModule, why: ModuleDamaged) -> None:
        """Raises:
        ModuleError: it cannot be moved.
        """
        try:
            moved = await trio.to_thread.run_sync(self._store.set_aside, damaged.manifest.hash)
        except OSError as error:
            raise ModuleError(f"{damaged.folder}: {why}; delete it ({error.strerror or error})") from error
        logger.warning("%s is not held as it was here, and lies in %s now: %s", damaged.manifest, moved, why)

    async def pin(self, reference: Reference) -> None:
        """The same, tried until it succeeds, for whoever has the module may be away for now; and again whenever what is
        held turns out to be damaged.
        """
        wait_s = self._settings.retry_s
        while True:
            try:
                module = await self.hold(reference)
            except errors.NetError as error:
                logger.warning("%s is not held yet, and tried again in %.0f s: %s", reference, wait_s, error)
            else:
                logger.info("%s is held: %s", module.manifest, _spell(module.manifest))
                if (loss := self._losses.get(module.manifest.hash)) is not None:
                    await loss.wait()
                wait_s = self._settings.retry_s
            await trio.sleep(wait_s)
            wait_s = min(2 * wait_s, self._settings.max_retry_s)

    def _lose(self, file: FileId) -> None:
        """A file is served no more: nor are the modules that it belongs to, whose next announcements leave them out."""
        for manifest in self.held:
            if any((each.root, each.size) == (file.root, file.size) for each in manifest.files):
                logger.warning("%s is not held any more: a file of it was damaged, or changed", manifest)
                self._forget(manifest)

    def _forget(self, manifest: Manifest) -> None:
        self._held.pop(manifest.hash, None)
        if (loss := self._losses.pop(manifest.hash, None)) is not None:
            loss.set()

    async def _announce(self, key: bytes) -> None:
        """Once it has been said it is said again every half a minute, so a failure is no end."""

        def body() -> Mapping[str, Any]:
            hashes = [each.hash for each in self._held.values() if key in announcement.keys_of(each)]
            return announcement.write_body(self._host.addresses, hashes)

        try:
            await self._dht.announce(key, announcement.KIND, body)
        except errors.NetError as error:
            logger.warning("not announced now: %s", error)

    async def _serve(self, connection: Connection, stream: Stream) -> None:
        await wire.serve(connection, stream, self._held.get)


def _spell(manifest: Manifest) -> str:
    """What it is."""
    n = len(manifest.files)
    return f"{manifest.method} for {manifest.model}, {n} files of {manifest.total_bytes} bytes, by {manifest.author}"
