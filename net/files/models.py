"""Models' files from the nodes that have them: which there are, and how they come into a folder here.

The folder has one of its own for each manifest, named by its root: ``ROOT/manifest`` and the files. What lies there is
used if it is what the manifest says, and fetched again if not.
"""

from __future__ import annotations

import logging
import random
import re
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from net import errors
from net.errors import PeerFailed
from net.files.fetch import fetch
from net.files.manifest import MAX_MANIFEST_BYTES, ModelManifest
from net.files.pieces import FileId, Hashes
from net.files.remembered import RememberedHashes
from net.files.server import FileServer
from net.host import Host
from net.identity import PeerId
from net.protocol.announcement import MAX_NAME_CHARACTERS, NAME, NodeAnnouncement

logger = logging.getLogger(__name__)

MODELS_FOLDER: Final = "models"  # in the folder where what lasts is kept
HASHES_FOLDER: Final = "hashes"
LEAST_PIN_DIGITS: Final = 8
SAID_DIGITS: Final = 32
OFFERED_S: Final = 15.0  # for nodes that serve a model to have read its files and say that they give them
LOOK_S: Final = 1.0
_PINNED: Final = re.compile(rf"([A-Za-z0-9][A-Za-z0-9._\-]*)@([0-9a-fA-F]{{{LEAST_PIN_DIGITS},64}})", re.ASCII)

FileProgress = Callable[[str, int, int], None]  # the file's name, bytes that are here, bytes in all


def may_be_served(name: str) -> bool:
    """Whether a model could be announced under a name, rather than lie at a path or on the Hugging Face hub."""
    return len(name) <= MAX_NAME_CHARACTERS and "/" not in name and NAME.fullmatch(name) is not None


def split_pin(name: str) -> tuple[str, str | None]:
    """``NAME@DIGEST`` as its parts; a name without a digest is a name."""
    match = _PINNED.fullmatch(name)
    return (name, None) if match is None else (match[1], match[2].lower())


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A model's files that nodes say they have, or parts of them.

    Attributes:
        manifest: Which files.
        model, digest: Whose, as announced.
        nodes: Who.
    """

    manifest: FileId
    model: str
    digest: str
    nodes: tuple[NodeAnnouncement, ...]

    @property
    def short(self) -> str:
        """What people are to pin: so many digits of the manifest's root that nobody can find another file for them."""
        return str(self.manifest)[:SAID_DIGITS]

    def fits(self, pin: str) -> bool:
        """Whether a digest's first digits are those of these files, or of the model."""
        return str(self.manifest).startswith(pin) or self.digest.startswith(pin)


def offers_of(nodes: Sequence[NodeAnnouncement], name: str, pin: str | None = None) -> list[Offer]:
    """What files of the model ``name`` nodes offer, the one first that most of them do.

    Args:
        nodes: What is announced.
        name: Of the model.
        pin: The first digits of the manifest's root or of the model's digest; ``None`` for any.
    """
    found: dict[tuple[FileId, str], list[NodeAnnouncement]] = {}
    for node in nodes:
        if node.model == name and node.files is not None:
            found.setdefault((node.files, node.digest), []).append(node)
    offers = [
        Offer(manifest=manifest, model=name, digest=digest, nodes=tuple(those))
        for (manifest, digest), those in found.items()
    ]
    if pin is not None:
        offers = [offer for offer in offers if offer.fits(pin)]
        named = [offer for offer in offers if str(offer.manifest).startswith(pin)]
        if len(pin) >= SAID_DIGITS and named:  # which nobody can imitate; a model's digest anybody can say
            offers = named
    return sorted(
        offers,
        key=lambda offer: (-len(offer.nodes), offer.manifest.root, offer.digest),
    )


class PeerModels:
    """Gets them. All methods belong to the host's event loop."""

    def __init__(
        self,
        host: Host,
        find_nodes: Callable[[], Awaitable[Sequence[NodeAnnouncement]]],
        folder: Path,
        remembered: RememberedHashes,
        *,
        server: FileServer | None = None,
        progress: FileProgress | None = None,
        on_failure: Callable[[PeerFailed], None] | None = None,
    ) -> None:
        """Nothing is asked yet.

        Args:
            host: Ours.
            find_nodes: What is announced now, of nodes that may be asked.
            folder: Where files go.
            remembered: Knows which of them are what they should be.
            server: Serves to others what has come.
            progress: Told how far files are.
            on_failure: Told of peers that failed.
        """
        self._host = host
        self._find_nodes = find_nodes
        self._folder = folder
        self.remembered = remembered
        self._server = server
        self._progress = progress
        self._on_failure = on_failure
        self._manifests: dict[FileId, ModelManifest] = {}

    async def offers(self, name: str, pin: str | None = None) -> list[Offer]:
        """As :func:`offers_of`. Where nodes serve the model and offer no files yet, they are given a while to.

        Raises:
            NetError: nobody could be asked.
        """
        deadline = trio.current_time() + OFFERED_S
        while True:
            nodes = await self._find_nodes()
            found = offers_of(nodes, name, pin)
            is_reading = any(node.model == name and node.files is None for node in nodes)
            if found or not is_reading or trio.current_time() >= deadline:
                return found
            await trio.sleep(LOOK_S)

    async def manifest(self, offer: Offer) -> ModelManifest:
        """What the files are.

        Raises:
            FetchFailed, StorageError: it cannot be had.
            RemoteProtocolError: it is none, or another model's than is announced.
        """
        target = self._folder / str(offer.manifest) / "manifest"
        hashes = await fetch(
            self._host, offer.manifest, offer.nodes, target, max_bytes=MAX_MANIFEST_BYTES, on_failure=self._on_failure
        )
        try:
            data = await trio.to_thread.run_sync(target.read_bytes)
        except OSError as error:
            raise errors.StorageError(f"{target}: cannot be read ({error.strerror})") from error
        try:
            manifest = ModelManifest.from_bytes(data)
            if (manifest.name, manifest.digest) != (offer.model, offer.digest):
                raise errors.RemoteProtocolError(f"the files offered as {offer.model} are another model's")
        except errors.RemoteProtocolError:
            await trio.to_thread.run_sync(partial(target.unlink, missing_ok=True))
            raise
        self._manifests[offer.manifest] = manifest
        if self._server is not None:
            await self._server.add_known(hashes, target)
        return manifest

    async def file(self, manifest_id: FileId, manifest: ModelManifest, name: str) -> Path:
        """Where one of its files lies, fetched first if it is not there.

        Raises:
            FetchFailed, StorageError: it cannot be had.
            KeyError: there is no such file.
        """
        file = manifest.files[name]
        target = self._folder / str(manifest_id) / name
        hashes = await trio.to_thread.run_sync(self._find, target, file)
        if hashes is None:
            hashes = await self._fetch(manifest_id, file, target)
            await trio.to_thread.run_sync(self.remembered.remember, target, hashes)
        if self._server is not None:
            await self._server.add_known(hashes, target)
        return target

    async def serve_found(self, manifest_id: FileId) -> None:
        """Serve what has come of these files before. The manifest has been fetched by this object."""
        if self._server is None:
            return
        folder = self._folder / str(manifest_id)
        for name, file in self._manifests[manifest_id].files.items():
            hashes = await trio.to_thread.run_sync(self._find, folder / name, file, abandon_on_cancel=True)
            if hashes is not None:
                await self._server.add_known(hashes, folder / name)

    def _find(self, target: Path, file: FileId) -> Hashes | None:
        """The hashes of what lies there, if it is that file."""
        try:
            status = target.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size != file.size:
                return None
            hashes = self.remembered.hash(target)
        except OSError:
            return None
        return hashes if hashes.file == file else None

    async def _fetch(self, manifest_id: FileId, file: FileId, target: Path) -> Hashes:
        """From those who offer it now; when all of them fail, from those who have come meanwhile."""
        progress = None if self._progress is None else partial(self._progress, target.name)
        tried: set[PeerId] = set()
        while True:
            nodes = await self._find_nodes()
            holders = [node for node in nodes if node.files == manifest_id and node.peer_id != self._host.peer_id]
            random.shuffle(holders)  # so that not everybody asks the same ones
            is_last = tried.issuperset(holder.peer_id for holder in holders)
            tried.update(holder.peer_id for holder in holders)
            try:
                return await fetch(self._host, file, holders, target, progress=progress, on_failure=self._on_failure)
            except errors.FetchFailed:
                if is_last:
                    raise
