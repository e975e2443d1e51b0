"""Models whose files come from peers and go to peers.

What a peer gives is what the manifest says, byte by byte; that the manifest is of the model that nodes announce is
checked by the model's digest, before any weights are fetched. Whose word is taken for the manifest itself is the user's
to say: ``NAME@DIGEST`` takes that one alone; else it is what most of the model's nodes offer.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final, Protocol, TypeVar

import trio

from compute.bloom.config import BloomConfig
from compute.checkpoint import Checkpoint, PeerCheckpoint
from compute.errors import CheckpointError, ModelNotFound
from compute.sources import PeerSource
from net.errors import NetError, StorageError
from net.files.manifest import ModelManifest
from net.files.models import Offer, PeerModels
from net.files.pieces import FileId, Hashes
from net.files.remembered import RememberedHashes
from net.files.server import FileServer

logger = logging.getLogger(__name__)

KEEP_AGAIN_S: Final = 300.0
MAX_TRIED: Final = 8  # offers of one name: anybody can make some, and each takes a fetch or two
_SPARE_BYTES: Final = 16 << 20  # of a file of weights, beside them
_WIDEST_BYTES: Final = 4  # of a weight

T = TypeVar("T")


class Call(Protocol):
    """Runs an asynchronous function in its event loop, from a thread that waits for it."""

    def __call__(self, function: Callable[..., Awaitable[T]], /, *args: object) -> T: ...


def find_at_peers(models: PeerModels, name: str, pin: str | None, call: Call) -> PeerCheckpoint:
    """The checkpoint that peers offer under a name; its config and index are fetched, and nothing else yet. Blocks.

    Args:
        models: Gets files.
        name: As announced.
        pin: The first digits of the manifest's root or the model's digest; ``None`` for what most nodes offer.
        call: Runs the methods of ``models``.

    Raises:
        ModelNotFound: Nobody offers it.
        CheckpointError: What is offered is no such model, or cannot be had.
    """
    try:
        offers = call(models.offers, name, pin)
        others = [] if offers or pin is None else call(models.offers, name)
    except NetError as exc:
        raise CheckpointError(f"{name}: {exc}") from exc
    if not offers:
        raise ModelNotFound(_spell_lack(name, pin, others))
    if pin is not None and len({_pinned(offer, pin) for offer in offers}) > 1:
        raise CheckpointError(f"{name}@{pin}: several are offered that begin so; give more digits of the one you mean")
    problems: list[str] = []
    for offer in offers[:MAX_TRIED]:  # those first that most nodes make
        try:
            checkpoint = _open(offer, models, call)
        except StorageError as exc:
            raise CheckpointError(f"{name}: {exc}") from exc
        except (NetError, CheckpointError) as exc:
            logger.info("files of %s that %d nodes offer are of no use: %s", name, len(offer.nodes), exc)
            problems.append(str(exc))
            continue
        if pin is None or not str(offer.manifest).startswith(pin):  # a model's digest says nothing of weights
            logger.warning(
                "the files of %s are those that %s; to take these and no others the next time, say %s@%s",
                name,
                _spell_majority(offer, offers),
                name,
                offer.short,
            )
        return checkpoint
    raise CheckpointError(_spell_useless(name, offers, problems))


async def find_at_peers_from_trio(models: PeerModels, name: str, pin: str | None) -> PeerCheckpoint:
    """:func:`find_at_peers` in a thread, for nodes: also serves the model's files that are here. More are then fetched
    from any thread that trio has started.

    Cancellation: what is being fetched is given up; what has come stays.
    """
    find = partial(find_at_peers, models, name, pin, trio.from_thread.run)
    checkpoint = await trio.to_thread.run_sync(find, abandon_on_cancel=True)
    await models.serve_found(checkpoint.manifest)
    return checkpoint


def _open(offer: Offer, models: PeerModels, call: Call) -> PeerCheckpoint:
    """Raises:
    NetError, CheckpointError: it is of no use.
    """
    manifest = call(models.manifest, offer)

    def get(name: str) -> Path:
        return call(models.file, offer.manifest, manifest, name)

    label = f"{offer.model}@{str(offer.manifest)[:12]}"
    checkpoint = PeerCheckpoint(PeerSource(label, manifest.files, get), offer.model, offer.manifest)
    _check_sizes(checkpoint.config, manifest, label)
    if checkpoint.digest != manifest.digest:
        raise CheckpointError(f"{label}: config and weights are not those of the model that nodes announce")
    return checkpoint


def _check_sizes(config: BloomConfig, manifest: ModelManifest, label: str) -> None:
    """Before any weights are fetched: that they cannot be larger than such a model's are."""
    embeddings = 2 * (config.vocab_size + 2) * config.hidden_size  # the head's may be others
    most = _WIDEST_BYTES * (embeddings + config.n_layer * config.parameters_per_block) + _SPARE_BYTES
    weights = sum(file.size for name, file in manifest.files.items() if name.endswith(".safetensors"))
    if weights > most:
        raise CheckpointError(f"{label}: {weights} bytes of weights, but such a model has {most} at most")


def _pinned(offer: Offer, pin: str) -> object:
    return offer.manifest if str(offer.manifest).startswith(pin) else offer.digest


def _spell_majority(offer: Offer, offers: list[Offer]) -> str:
    if len(offers) == 1:
        return "its nodes offer"
    return f"{len(offer.nodes)} of {sum(len(each.nodes) for each in offers)} nodes offer"


def _spell_useless(name: str, offers: list[Offer], problems: list[str]) -> str:
    if len(problems) == len(offers):
        return f"{name}: the files that nodes offer are of no use ({problems[0]}); ask who runs them"
    left = ", ".join(f"{name}@{offer.short}" for offer in offers[len(problems) :][:3])
    return (
        f"{name}: nodes offer {len(offers)} different sets of files under this name, and the {len(problems)} that most "
        f"of them offer are of no use ({problems[0]}); say which one you mean, such as {left}"
    )


def _spell_lack(name: str, pin: str | None, others: list[Offer]) -> str:
    if not others:
        return f"no node of the swarm gives the files of a model {name!r:.100}"
    known = ", ".join(f"{name}@{offer.short}" for offer in others[:3])
    return f"no node of the swarm gives files of {name} that begin with {pin}; there is {known}"


# What we give


def read_manifest(
    checkpoint: Checkpoint, remembered: RememberedHashes
) -> tuple[ModelManifest, dict[Path, Hashes]] | None:
    """The manifest of a checkpoint all of whose files are here, and their hashes; ``None`` if they are not, or weights
    are no safetensors. Blocks, for as long as reading all files takes, the first time.

    Raises:
        CheckpointError: See :class:`Checkpoint`.
        OSError: A file cannot be read.
    """
    files = checkpoint.files_at_hand()
    if files is None:
        return None
    hashes = {name: remembered.hash(path) for name, path in files.items()}
    manifest = ModelManifest(
        name=checkpoint.name, digest=checkpoint.digest, files={name: each.file for name, each in hashes.items()}
    )
    return manifest, {path: hashes[name] for name, path in files.items()}


async def share(checkpoint: Checkpoint, server: FileServer, remembered: RememberedHashes) -> FileId | None:
    """Serve a checkpoint's files to peers; the manifest that is to be announced, or ``None`` if not all are here.

    Of a checkpoint from peers, files are served as they come.

    Cancellation: some of the files may be served, but nobody is told of them.
    """
    if isinstance(checkpoint, PeerCheckpoint):
        return checkpoint.manifest
    read = partial(read_manifest, checkpoint, remembered)
    try:
        found = await trio.to_thread.run_sync(read, abandon_on_cancel=True)
        if found is None:
            return None
        manifest, hashes = found
        data = manifest.to_bytes()
        for path, each in hashes.items():
            await server.add_known(each, path)
    except (CheckpointError, NetError, OSError, ValueError) as error:
        logger.warning("the files of %s are not given to peers: %s", checkpoint.name, error)
        return None
    return server.add_bytes(data)


async def keep_for_clients(checkpoint: Checkpoint) -> None:
    """Get what clients need of a checkpoint from peers, though its node does not, so that it can be had for as long as
    the model is served, whoever brought it. Tries until it has come, and ends; others' checkpoints need nothing.

    Cancellation: what has come stays.
    """
    if not isinstance(checkpoint, PeerCheckpoint):
        return

    def get() -> None:
        for name in checkpoint.files_for_clients():
            checkpoint.find_file(name)

    while True:
        try:
            await trio.to_thread.run_sync(get, abandon_on_cancel=True)
        except CheckpointError as error:
            logger.info("what clients need is not here yet: %s", error)
        else:
            return
        await trio.sleep(KEEP_AGAIN_S)


def fits_pin(checkpoint: Checkpoint, pin: str, remembered: RememberedHashes) -> bool:
    """Whether a checkpoint that is here is the one that a digest's first digits name; may read all files.

    Raises: as :func:`read_manifest`.
    """
    if checkpoint.digest.startswith(pin):
        return True
    found = read_manifest(checkpoint, remembered)
    return found is not None and str(found[0].file_id).startswith(pin)
