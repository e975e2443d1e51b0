"""Who holds which modules: signed records of kind ``module``, under three keys for each module.

    raceme/module/1/hash/HASH       who holds this one
    raceme/module/1/name/NAME       who holds modules of this name, and which
    raceme/module/1/model/DIGEST    who holds modules that were trained on this model, and which

body = {
    "addresses": [bytes...],    multiaddrs, best first
    "modules": [bytes...],      HASH of each that is held and belongs under this key, 32 bytes; at most 256
}
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from net.addresses import Multiaddr
from net.dht import keys, wire
from net.errors import RecordError, RemoteProtocolError
from net.identity import PeerId
from net.modules.manifest import Manifest
from net.records import Record
from net.rpc import packing

KIND: Final = "module"
MAX_MODULES: Final = 256  # 9 KiB: far below what a record may have
HASH_BYTES: Final = 32


@dataclass(frozen=True)
class Holder:
    """Who has a module, and where they are reached."""

    peer_id: PeerId
    addresses: tuple[Multiaddr, ...]


def key_of_hash(module_hash: str) -> bytes:
    """Where those announce themselves that hold the module."""
    return keys.of_name(f"raceme/module/1/hash/{module_hash}")


def key_of_name(name: str) -> bytes:
    """Where those announce themselves that hold a module of this name."""
    return keys.of_name(f"raceme/module/1/name/{name}")


def key_of_model(digest: str) -> bytes:
    """Where those announce themselves that hold a module for this model."""
    return keys.of_name(f"raceme/module/1/model/{digest}")


def keys_of(manifest: Manifest) -> tuple[bytes, bytes, bytes]:
    """All keys under which it is announced."""
    return key_of_hash(manifest.hash), key_of_name(manifest.name), key_of_model(manifest.model_digest)


def write_body(addresses: Iterable[Multiaddr], hashes: Iterable[str]) -> dict[str, Any]:
    """What is announced under one key."""
    modules = [bytes.fromhex(each) for each in hashes]
    return {"addresses": wire.write_addresses(addresses), "modules": modules[:MAX_MODULES]}


def read_body(record: Record) -> tuple[Holder, list[str]]:
    """Who holds what.

    Raises:
        RecordError: fields that are missing, of the wrong kind, or out of bounds.
    """
    try:
        modules = packing.items(record.body, "modules", bytes, max_items=MAX_MODULES, max_length=HASH_BYTES)
        addresses = wire.read_addresses(record.body, "addresses")
    except RemoteProtocolError as error:
        raise RecordError(f"a malformed announcement of {record.peer_id}: {error}") from error
    if any(len(each) != HASH_BYTES for each in modules):
        raise RecordError(f"an announcement of {record.peer_id} with a hash that is not {HASH_BYTES} bytes")
    return Holder(record.peer_id, addresses), [each.hex() for each in modules]
