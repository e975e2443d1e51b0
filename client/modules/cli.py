"""``raceme publish``, ``raceme modules``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from net import console

if TYPE_CHECKING:
    from client.blocking import Swarm
    from net.dht.service import Dht
    from net.host import Host
    from net.modules.finding import FoundModule
    from net.modules.manifest import Manifest
    from net.modules.store import ModuleStore, StoredModule

DEFAULT_LISTEN = ("/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1")
CONNECT_TIMEOUT_S = 8.0
WITHDRAW_S = 2.0
PIPE_COLUMNS = 160
SHOWN_DIGITS = 12  # of a HASH
AUTHOR_FILE = "author.key"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def add_publish(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    publish = commands.add_parser(
        "publish",
        help="share a trained module",
        description="Sign a module (a folder with adapter_config.json and adapter_model.safetensors, in PEFT's format) "
        "and serve it to the swarm under NAME@HASH, until Ctrl-C. Other nodes hold it, too, that were "
        "started with --pin NAME@HASH. Without --bootstrap it is signed and kept, and served by nobody yet.",
    )
    publish.add_argument("folder", type=Path, metavar="DIR")
    publish.add_argument(
        "--name", required=True, help="what the module is to be called: letters, digits, '.', '_', '-'"
    )
    publish.add_argument(
        "--licence",
        default="unknown",
        metavar="L",
        help="under which it may be used, such as Apache-2.0 (default: unknown)",
    )
    publish.add_argument(
        "--bootstrap", metavar="ADDR", action="append", default=[], help="a node of the swarm; may be repeated"
    )
    publish.add_argument(
        "--model", metavar="NAME", help="the model that it was trained on (default: as the folder's files say)"
    )
    publish.add_argument(
        "--author",
        type=Path,
        metavar="FILE",
        help=f"the key that signs; made if missing (default: {AUTHOR_FILE} in the data folder)",
    )
    publish.add_argument(
        "--hub",
        type=_repository,
        metavar="OWNER/NAME",
        help="upload it to this repository on the Hugging Face hub as well, as whoever 'hf auth login' says",
    )
    console.add_node(publish, DEFAULT_LISTEN, ", any free port")
    console.add_json(publish, "what is published")
    console.add_common(publish)
    publish.set_defaults(run=run_publish)


def add_modules(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    modules = commands.add_parser(
        "modules",
        help="show which modules there are for a model, or fetch one",
        description="Show the modules that somebody in the swarm holds for a model; or fetch one to a folder.",
    )
    console.add_bootstrap(modules)
    what = modules.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="NAME", help="the model's name, as served, or its digest (64 hex digits)")
    what.add_argument("--get", metavar="NAME@HASH", help="fetch this module to the folder that --out names")
    modules.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="with --get: a new folder, in the form that PEFT and the Hugging Face hub know",
    )
    console.add_swarm_key(modules)
    console.add_json(modules, "what there is")
    console.add_common(modules)
    modules.set_defaults(run=run_modules)


def _repository(text: str) -> str:
    if not REPOSITORY.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r:.120} is not OWNER/NAME, such as me/my-adapter")
    return text


# Publishing


def run_publish(options: argparse.Namespace) -> int:
    import trio

    from client.modules.folders import TRAINING_FILES
    from net.dht.service import Dht
    from net.files.server import FileServer
    from net.modules.manifest import LICENCE, NAME
    from net.modules.service import ModuleService
    from net.modules.store import describe_files
    from net.nurseries import open_service_nursery

    if not NAME.fullmatch(options.name):
        raise console.UserError(f"--name {options.name!r:.80}: give up to 64 of A-Z, a-z, 0-9, '.', '_' and '-'")
    if not LICENCE.fullmatch(options.licence):
        raise console.UserError(f"--licence {options.licence!r:.80}: give an SPDX name, such as Apache-2.0")
    # What is wrong is said before anything takes time.
    _, left_out = describe_files(options.folder, leave_out=TRAINING_FILES)
    from client.modules.tensors import check_tensors  # torch, which takes seconds

    check_tensors(options.folder)
    if left_out:
        _note(f"not published, as no module has such files: {', '.join(left_out):.300}")
    if not options.bootstrap:
        module = _prepare(options, {})
        _tell(module, [], as_json=options.json)
        _note("nobody serves it yet: give --bootstrap ADDR")
        return 0
    console.tell_warnings("net.modules.service")
    bootstrap = console.bootstrap_addresses(options)

    async def publish(host: Host) -> None:
        dht = Dht(host, server=True)
        async with open_service_nursery() as nursery:
            await console.start_presence(options, host, dht, bootstrap, nursery)
            await dht.join(bootstrap)
            module = await trio.to_thread.run_sync(_prepare, options, await _served_digests(dht))
            try:
                await ModuleService(host, dht, _store(), FileServer(host)).serve(module)
                _tell(module, [str(address) for address in host.peer_addresses], as_json=options.json)
                await dht.run()
            finally:
                with trio.move_on_after(WITHDRAW_S, shield=True):
                    await dht.withdraw()

    listen, identity = console.listen_addresses(options), console.node_identity(options, "publish")
    key = console.swarm_key(options)
    console.run_host(publish, identity, listen=listen, until_eof=options.until_eof, swarm_key=key)
    return 0


def _store() -> ModuleStore:
    from net.modules.store import MODULES_FOLDER, ModuleStore

    return ModuleStore(console.data_folder() / MODULES_FOLDER)


def _prepare(options: argparse.Namespace, served: Mapping[str, Collection[str]]) -> StoredModule:
    """Sign the folder; upload it, if that is wanted."""
    from client.modules.folders import describe, sign_folder, upload
    from net.identity import Identity

    description = describe(options.folder, model=options.model, served=served)
    author = Identity.load(console.data_folder() / AUTHOR_FILE if options.author is None else options.author)
    try:
        module = sign_folder(
            _store(),
            options.folder,
            author,
            name=options.name,
            description=description,
            licence=options.licence,
        )
    finally:
        author.close()
    if options.hub is not None:
        _note(f"uploaded to {upload(module, options.hub)}")
    return module


async def _served_digests(dht: Dht) -> dict[str, set[str]]:
    """Those of the models that are served, by name."""
    from net.dht import keys
    from net.protocol.announcement import DIRECTORY, KIND, read_all

    digests: dict[str, set[str]] = {}
    for node in read_all(await dht.find(keys.of_name(DIRECTORY), KIND)):
        digests.setdefault(node.model, set()).add(node.digest)
    return digests


def _tell(module: StoredModule, addresses: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        console.print_json({**_manifest_json(module.manifest), "folder": str(module.folder), "addresses": addresses})
    else:
        print(module.manifest, flush=True)


def _note(text: str) -> None:
    print(f"raceme: note: {text}", file=sys.stderr, flush=True)


# Listing


def run_modules(options: argparse.Namespace) -> int:
    import client

    if (options.get is None) != (options.out is None):
        raise console.UserError("--get NAME@HASH and --out DIR belong together")
    with client.connect(options.bootstrap, timeout_s=CONNECT_TIMEOUT_S, swarm_key=options.swarm_key) as swarm:
        if options.get is not None:
            return _get(swarm, options)
        found = swarm.modules(options.model)
    if options.json:
        console.print_json({"modules": [_found_json(each) for each in found]})
    elif found:
        _print_table(found)
    else:
        print(
            f"Nobody holds a module for {options.model}. "
            f"Share one with: raceme publish DIR --name NAME --bootstrap ADDR"
        )
    return 0


def _get(swarm: Swarm, options: argparse.Namespace) -> int:
    from client.modules.folders import export
    from client.modules.obtaining import is_path

    if is_path(options.get):
        raise console.UserError(f"--get {options.get}: a published module is NAME@HASH")
    module = swarm.get_module(options.get)
    export(module.folder, options.out)
    if options.json and module.manifest is not None:
        console.print_json({**_manifest_json(module.manifest), "folder": str(options.out)})
    else:
        print(f"{module.manifest} is in {options.out}")
    return 0


def _manifest_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "module": str(manifest),
        "name": manifest.name,
        "hash": manifest.hash,
        "model": manifest.model,
        "model_digest": manifest.model_digest,
        "method": manifest.method,
        "metrics": dict(manifest.metrics),
        "licence": manifest.licence,
        "parent": manifest.parent,
        "author": str(manifest.author),
        "created": manifest.created_s,
        "size": manifest.total_bytes,
        "files": [{"name": file.name, "size": file.size, "root": file.root.hex()} for file in manifest.files],
    }


def _found_json(found: FoundModule) -> dict[str, Any]:
    holders = [
        {"peer_id": str(holder.peer_id), "addresses": [str(address) for address in holder.addresses]}
        for holder in found.holders
    ]
    return {**_manifest_json(found.manifest), "holders": holders}


def _print_table(found: Sequence[FoundModule]) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    table = Table(box=None)
    for heading in ("module", "method", "metrics", "licence", "size", "holders", "trained from", "author"):
        justify: Literal["left", "right"] = "right" if heading in ("size", "holders") else "left"
        table.add_column(heading, justify=justify, no_wrap=heading == "module", overflow="fold")
    for each in found:
        manifest = each.manifest
        table.add_row(
            f"{manifest.name}@{manifest.hash[:SHOWN_DIGITS]}",
            manifest.method,
            ", ".join(f"{name} {value:g}" for name, value in sorted(manifest.metrics.items())),
            manifest.licence,
            decimal(manifest.total_bytes),
            str(len(each.holders)),
            "" if manifest.parent is None else manifest.parent[:SHOWN_DIGITS],
            str(manifest.author),
        )
    Console(width=None if console.is_terminal(sys.stdout) else PIPE_COLUMNS).print(table)
