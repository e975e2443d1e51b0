"""From a folder to a published module and back: described, signed, kept; copied out, uploaded to Hugging Face's hub."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from client.modules.card import CARD_FILE, spell_card
from client.modules.description import CONFIG_FILE, DESCRIPTION_FILE, Description, read_json
from net.errors import ModuleError
from net.identity import Identity
from net.modules import manifest as manifests
from net.modules.manifest import Manifest, Reference
from net.modules.store import ModuleStore, StoredModule, describe_files

TRAINING_FILES: Final = frozenset({"checkpoint.safetensors", "log.jsonl"})  # a training's own, not the module's
MAX_KINDS: Final = 8  # of methods in one module


def describe(folder: Path, *, model: str | None, served: Mapping[str, Collection[str]]) -> Description:
    """What a module was trained on and how: as its ``raceme.json`` says, else as PEFT's configuration does.

    Args:
        folder: the module's.
        model: the model's name, if somebody says it who knows better.
        served: digests of the models that are served, by name.

    Raises:
        ModuleError: it cannot be found out; what to do.
    """
    description = Description.read(folder)
    if description is not None:
        return description if model is None else replace(description, model=model)
    config = read_json(folder / CONFIG_FILE)
    named = config.get("base_model_name_or_path") if model is None else model
    if not isinstance(named, str) or not named:
        raise ModuleError(f"{folder} does not say on which model it was trained: name it with --model NAME")
    name, digest = _identify(named, served)
    return Description(model=name, model_digest=digest, method=_method(folder, config))


def _identify(named: str, served: Mapping[str, Collection[str]]) -> tuple[str, str]:
    """A model's name and digest.

    Raises:
        ModuleError: nobody serves it, and it is not here; or several models go by that name.
    """
    digests = sorted(served.get(named, ()))
    if len(digests) > 1:
        told = ", ".join(digest[:12] for digest in digests)
        raise ModuleError(f"{named} is served with digests {told}: give the path of its checkpoint, --model ./FOLDER")
    if digests:
        return named, digests[0]
    from compute.errors import CheckpointError
    from compute.models import find_checkpoint

    try:
        checkpoint = find_checkpoint(named, allow_hub=False)
        return checkpoint.name, checkpoint.digest
    except CheckpointError as error:
        raise ModuleError(
            f"the module was trained on {named:.100}, which nobody serves and is not here either: name the model as it "
            f"is served, --model NAME, or the folder of its checkpoint"
        ) from error


def _method(folder: Path, config: Mapping[str, Any]) -> str:
    """What ``raceme tune`` or PEFT have trained.

    Raises:
        ModuleError: nobody knows.
    """
    own = config.get("raceme")
    kinds = own.get("methods") if isinstance(own, dict) else None
    if isinstance(kinds, list) and 0 < len(kinds) <= MAX_KINDS and all(isinstance(kind, dict) for kind in kinds):
        method = "+".join(str(kind.get("kind")) for kind in kinds)
    else:
        method = str(config.get("peft_type", "")).lower().replace("_", "-")
    if not manifests.METHOD.fullmatch(method):
        raise ModuleError(f"{folder / CONFIG_FILE} does not say how the module was trained ({method!r:.60})")
    return method


def sign_folder(
    store: ModuleStore, folder: Path, author: Identity, *, name: str, description: Description, licence: str
) -> StoredModule:
    """Keep a copy of a module's folder in the store, signed. The same again is the same module, with the same hash.

    A model card is made where there is none; ``raceme.json`` is what ``description`` says.

    Args:
        store: keeps it.
        folder: what is published of it, ``describe_files`` says, less ``TRAINING_FILES``.
        author: signs.
        name, description, licence: what is said of it.

    Raises:
        ModuleError: it is no module, or too large, or nobody would accept what is said of it.
        OSError: a file cannot be read or written.
    """
    files, _ = describe_files(folder, leave_out=TRAINING_FILES)
    names = {file.name for file in files}
    if len(names | {CARD_FILE, DESCRIPTION_FILE}) > manifests.MAX_FILES:
        raise ModuleError(
            f"{folder} holds {len(names)} files: with its card, a module has {manifests.MAX_FILES} at most"
        )
    with store.staging() as staged:
        for file in files:
            shutil.copyfile(folder / file.name, staged / file.name)
        description.write(staged)
        if CARD_FILE not in names:
            (staged / CARD_FILE).write_text(spell_card(name, description, licence))
        manifest = manifests.make(
            author,
            name=name,
            model=description.model,
            model_digest=description.model_digest,
            method=description.method,
            files=describe_files(staged)[0],
            licence=licence,
            metrics=description.metrics,
            parent=description.parent,
        )
        for known in store.matching(Reference(name=name, hash_prefix="")):
            if _timeless(known.manifest) == _timeless(manifest):
                return store.keep(known.manifest, staged)  # in place of the known one, if that was damaged
        return store.keep(manifest, staged)


def _timeless(manifest: Manifest) -> Manifest:
    return replace(manifest, hash="", created_s=0, envelope=b"")


def export(module: Path, target: Path) -> None:
    """Copy a module's folder to where its owner may change it: a new folder, in the form that PEFT and the hub know.

    Raises:
        ModuleError: something is there already.
        OSError: it cannot be written.
    """
    try:
        shutil.copytree(module, target)
    except FileExistsError as error:
        raise ModuleError(f"{target} is there already: name a new folder") from error


def upload(module: StoredModule, repository: str) -> str:
    """Put a module into a repository on the Hugging Face hub, which is made if need be; gives its address.

    Raises:
        ModuleError: it cannot be done; why.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ModuleError("huggingface_hub is not installed; run: pip install huggingface_hub") from error
    try:
        api = HfApi()
        address = str(api.create_repo(repository, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=module.folder, commit_message=str(module.manifest))
    except (OSError, HFValidationError) as error:  # OSError is the base of the hub's HTTP errors
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModuleError(f"{repository} cannot be uploaded to ({cause[:160]}); log in with: hf auth login") from error
    return address
