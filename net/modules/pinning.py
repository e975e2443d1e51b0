"""``--pin``: what a relay or a node is told to hold for others."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Final

from net import console

if TYPE_CHECKING:
    import trio

    from net.dht.service import Dht
    from net.files.server import FileServer
    from net.host import Host
    from net.modules.manifest import Reference

MAX_MODULE_MB: Final = 1_000_000


def add_pins(parser: argparse.ArgumentParser) -> None:
    """The options that ``start_pins`` reads."""
    parser.add_argument(
        "--pin",
        metavar="NAME@HASH",
        type=_pinned,
        action="append",
        default=[],
        help="hold this published module for others, also when its publisher is gone; may be repeated",
    )
    parser.add_argument(
        "--max-module-mb",
        type=console.whole(1, MAX_MODULE_MB),
        default=1024,
        metavar="N",
        help="the largest module to hold (default: 1024)",
    )


def _pinned(text: str) -> Reference:
    from net.errors import ModuleError
    from net.modules.manifest import Reference

    try:
        reference = Reference.read(text)
    except ModuleError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not reference.hash_prefix:
        raise argparse.ArgumentTypeError(f"{text!r} says no hash: a pin is of one module, whoever else takes its name")
    return reference


def start_pins(options: argparse.Namespace, host: Host, dht: Dht, files: FileServer, nursery: trio.Nursery) -> None:
    """Hold what is pinned, as soon as it can be had; notes on standard error say that it is, or is not yet."""
    from net.modules.service import ModuleService, ModuleSettings
    from net.modules.store import MODULES_FOLDER, ModuleStore

    console.tell_warnings("net.modules.service", least=logging.INFO)
    console.tell_warnings("net.modules.store")
    store = ModuleStore(console.data_folder() / MODULES_FOLDER, max_bytes=options.max_module_mb << 20)
    pinned = dict.fromkeys(options.pin)
    service = ModuleService(host, dht, store, files, ModuleSettings(max_held=max(len(pinned), ModuleSettings.max_held)))
    for reference in pinned:
        nursery.start_soon(service.pin, reference)
