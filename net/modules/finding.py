"""Finding modules through the DHT, by hash, by name and by base model, and fetching them."""

from __future__ import annotations

import logging
import random
import shutil
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from net import errors
from net.dht.service import Dht
from net.errors import ModuleError
from net.files.fetch import fetch
from net.files.pieces import FileId
from net.host import Host
from net.modules import announcement, wire
from net.modules import manifest as manifests
from net.modules.announcement import Holder
from net.modules.manifest import HASH_DIGITS, Manifest, Reference
from net.modules.store import ModuleStore, StoredModule
from net.rpc.lane import Lane

__all__ = ["Check", "FoundModule", "ModuleFinder", "Progress"]

logger = logging.getLogger(__name__)

MAX_LISTED: Final = 512  # modules that are looked at under one key: those first that most hold
MAX_LINEAGE: Final = 32
TRIES: Final = 4  # holders that are asked for a manifest, one after another; several at once where few are wanted
ASKED_AT_ONCE: Final = 16
ASK_S: Final = 8.0  # connecting included

Check = Callable[[Path], None]  # of a folder with a module's files, before it is kept; raises to refuse
Progress = Callable[[int, int], None]  # bytes of the module that are here, and of all


@dataclass(frozen=True, kw_only=True)
class FoundModule:
    """A module that others have.

    Attributes:
        holders: who say so; never empty.
    """

    manifest: Manifest
    holders: tuple[Holder, ...]


class ModuleFinder:
    """Asks; holds nothing."""

    def __init__(self, host: Host, dht: Dht, *, on_failure: Callable[[errors.PeerFailed], None] | None = None) -> None:
        """Take what is running.

        Args:
            host: asks.
            dht: knows whom.
            on_failure: told of holders that failed, whether or not others gave what was wanted.
        """
        self._host = host
        self._dht = dht
        self._on_failure = on_failure

    async def by_hash(self, module_hash: str) -> FoundModule | None:
        """The module of this hash (64 hex digits), if anybody has it."""
        found = await self._look_up(announcement.key_of_hash(module_hash), lambda _: True, module_hash)
        return found[0] if found else None

    async def named(self, name: str, hash_prefix: str = "") -> list[FoundModule]:
        """Every module of this name whose hash begins so, whoever its author is, the oldest first."""
        return await self._look_up(announcement.key_of_name(name), lambda each: each.name == name, hash_prefix)

    async def for_model(self, digest: str) -> list[FoundModule]:
        """Every module that was trained on the model of this digest, the oldest first."""
        return await self._look_up(announcement.key_of_model(digest), lambda each: each.model_digest == digest)

    async def resolve(self, reference: Reference) -> FoundModule:
        """The one module that is meant.

        Raises:
            ModuleError: nobody has it, or several may be meant, which the text lists.
        """
        if len(reference.hash_prefix) == HASH_DIGITS:
            whole = await self.by_hash(reference.hash_prefix)
            if whole is not None and whole.manifest.name != reference.name:
                raise ModuleError(f"the module of that hash is {whole.manifest}, not {reference.name}")
            found = [] if whole is None else [whole]
        else:
            found = await self.named(reference.name, reference.hash_prefix)
        if not found:
            raise ModuleError(f"nobody has the module {reference} now: its publisher may be gone, and nobody pins it")
        if len(found) > 1:
            raise ModuleError(ambiguous(reference, [each.manifest for each in found]))
        return found[0]

    async def lineage(self, manifest: Manifest) -> list[Manifest]:
        """From which module it was trained, that one from which, and so on, as far as anybody has them; at most 32."""
        ancestors: list[Manifest] = []
        parent = manifest.parent
        while parent is not None and len(ancestors) < MAX_LINEAGE:  # no circle can be made of hashes
            found = await self.by_hash(parent)
            if found is None:
                break
            ancestors.append(found.manifest)
            parent = found.manifest.parent
        return ancestors

    async def fetch(
        self,
        found: FoundModule,
        store: ModuleStore,
        *,
        check: Check | None = None,
        progress: Progress | None = None,
    ) -> StoredModule:
        """Have the module in ``store``, fetched from its holders unless it is there, whole.

        Args:
            found: which one, and who has it.
            store: keeps it.
            check: called in another thread with the module's folder; before it is kept, if it was not here.
            progress: called with bytes that have come, and of all.

        Raises:
            ModuleError: it is too large, cannot be had, or is not what its manifest says.
            Exception: whatever ``check`` raises.
        Cancellation: nothing is kept.
        """
        manifest = found.manifest
        try:
            known = await trio.to_thread.run_sync(store.take_up, manifest.hash)
        except OSError as error:
            raise ModuleError(f"{store.folder / manifest.hash}: {error.strerror or error}") from error
        if known is not None:
            if check is not None:
                await trio.to_thread.run_sync(check, known.folder)
            return known
        store.check_size(manifest)
        try:
            async with _staging(store) as staged:
                await trio.to_thread.run_sync(_check_room, manifest, staged)
                done = 0
                for file in manifest.files:

                    def tell(here: int, _: int, before: int = done) -> None:
                        if progress is not None:
                            progress(before + here, manifest.total_bytes)

                    target, file_id = staged / file.name, FileId(file.root, file.size)
                    await fetch(self._host, file_id, found.holders, target, progress=tell, on_failure=self._on_failure)
                    done += file.size
                if check is not None:
                    await trio.to_thread.run_sync(check, staged)
                return await trio.to_thread.run_sync(store.keep, manifest, staged)
        except (errors.FetchFailed, errors.StorageError) as error:
            raise ModuleError(f"{manifest.name}@{manifest.hash[:12]} cannot be had: {error}") from error
        except OSError as error:
            raise ModuleError(f"{store.folder}: nothing can be kept there: {error.strerror or error}") from error

    # Looking up

    async def _look_up(
        self, key: bytes, belongs: Callable[[Manifest], bool], hash_prefix: str = ""
    ) -> list[FoundModule]:
        """What is announced under a key. Anybody can announce anything there: who knows more says it here, and what
        else there is pushes nothing out.
        """
        holders: dict[str, list[Holder]] = defaultdict(list)
        for record in await self._dht.find(key, announcement.KIND):
            if record.peer_id == self._host.peer_id:
                continue  # we need not ask ourselves
            try:
                holder, hashes = announcement.read_body(record)
            except errors.RecordError as error:
                logger.debug("%s", error)
                continue
            for module_hash in dict.fromkeys(hashes):
                if module_hash.startswith(hash_prefix):
                    holders[module_hash].append(holder)
        listed = sorted(holders, key=lambda each: (-len(holders[each]), each))[:MAX_LISTED]
        known = await self._manifests({each: holders[each] for each in listed})
        found = [
            FoundModule(manifest=manifest, holders=tuple(holders[manifest.hash]))
            for manifest in known.values()
            if belongs(manifest)
        ]
        return sorted(found, key=lambda each: (each.manifest.created_s, each.manifest.hash))

    async def _manifests(self, holders: Mapping[str, Sequence[Holder]]) -> dict[str, Manifest]:
        """Those manifests that one of some holders, taken at random, gives: more of them, where few are wanted."""
        known: dict[str, Manifest] = {}
        at_once = max(1, ASKED_AT_ONCE // max(1, len(holders)))
        untried = {each: random.sample(of, min(len(of), TRIES * at_once)) for each, of in holders.items()}
        limit = trio.CapacityLimiter(ASKED_AT_ONCE)
        for _ in range(TRIES):
            asked: dict[Holder, list[str]] = defaultdict(list)
            for module_hash, left in untried.items():
                if module_hash not in known:
                    for holder in left[:at_once]:
                        asked[holder].append(module_hash)
                    del left[:at_once]
            async with trio.open_nursery() as nursery:
                for holder, hashes in asked.items():
                    nursery.start_soon(self._ask, holder, hashes, known, limit)
        return known

    async def _ask(
        self, holder: Holder, hashes: Sequence[str], known: dict[str, Manifest], limit: trio.CapacityLimiter
    ) -> None:
        """The boundary around one holder: whatever it does, the others are asked."""
        async with limit:
            with trio.move_on_after(ASK_S) as scope:
                try:
                    await self._ask_all(holder, hashes, known)
                except errors.NetError as error:
                    logger.debug("%s has no manifests for us: %s", holder.peer_id, error)
                    if self._on_failure is not None and isinstance(error, errors.PeerFailed):
                        self._on_failure(error)
            if scope.cancelled_caught:
                logger.debug("%s gave no manifests in %g s", holder.peer_id, ASK_S)

    async def _ask_all(self, holder: Holder, hashes: Sequence[str], known: dict[str, Manifest]) -> None:
        """Raises:
        PeerLied: it sends what cannot be these manifests.
        NetError: it cannot be asked.
        """
        stream = await self._host.open_stream(holder.peer_id, [wire.PROTOCOL_ID], holder.addresses)
        async with Lane(stream, holder.peer_id) as where:
            for start in range(0, len(hashes), wire.MAX_ASKED):
                wanted = hashes[start : start + wire.MAX_ASKED]
                try:
                    given = await wire.ask(where, wanted, timeout_s=ASK_S)
                    for module_hash, envelope in zip(wanted, given, strict=True):
                        if envelope:
                            known[module_hash] = manifests.verify(envelope, expected_hash=module_hash)
                except (errors.RemoteProtocolError, ModuleError) as error:
                    raise errors.PeerLied(holder.peer_id, f"sent {error}") from error


def ambiguous(reference: Reference, candidates: Iterable[Manifest]) -> str:
    """What to tell somebody who has to choose."""
    lines = [
        f"{each.name}@{each.hash[:12]} (of {time.strftime('%Y-%m-%d', time.gmtime(each.created_s))} by {each.author})"
        for each in candidates
    ]
    return f"{reference} may be any of {len(lines)} modules; say which, with its hash: {', '.join(lines[:8])}"


@asynccontextmanager
async def _staging(store: ModuleStore) -> AsyncIterator[Path]:
    """``ModuleStore.staging``, whose work is done in threads, and to its end."""
    staged = await trio.to_thread.run_sync(store.begin)
    try:
        yield staged
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(store.end, staged)


def _check_room(manifest: Manifest, where: Path) -> None:
    """Raises:
    ModuleError: the disk has no room for it.
    """
    free = shutil.disk_usage(where).free
    if manifest.total_bytes > free:
        what = f"{manifest.name}@{manifest.hash[:12]} is {manifest.total_bytes} bytes"
        raise ModuleError(f"{what}, but the disk of {where.parent.parent} has {free} left")
