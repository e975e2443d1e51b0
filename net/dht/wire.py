"""The DHT's messages, over RPC on ``/raceme/kad/1.0.0``.

Every call carries ``"from"``: the caller's own addresses if it is a server, else nothing. Calls:

    find   {"key", "records": bool, "after": bytes?} -> {"peers": [[id, [addresses]]...], "records": [envelopes]}
    store  {"key", "record": envelope}              -> {}

``records`` come in the order of their subjects' ids, as many as fit; ``"more"`` says that there are others,
to be asked for with ``after``, the last id seen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from net.addresses import Multiaddr, parse_bytes
from net.dht.keys import KEY_BYTES
from net.dht.store import MAX_RECORD_BYTES
from net.dht.table import Contact, K
from net.errors import AddressError, RemoteProtocolError
from net.identity import PeerId
from net.rpc import packing

PROTOCOL_ID = "/raceme/kad/1.0.0"
MAX_ADDRESSES = 8
MAX_ADDRESS_BYTES = 128
MAX_PEER_ID_BYTES = 64
REMEMBERED = 4096  # addresses and contacts, read once: every answer names the same twenty again
MAX_ANSWER_RECORD_BYTES = MAX_RECORD_BYTES  # in one page


def write_addresses(addresses: Iterable[Multiaddr]) -> list[bytes]:
    return [address.to_bytes() for address in addresses][:MAX_ADDRESSES]


def write_contacts(contacts: Sequence[Contact]) -> list[Any]:
    return [[contact.peer_id.to_bytes(), write_addresses(contact.addresses)] for contact in contacts]


def read_addresses(fields: Mapping[str, Any], name: str) -> tuple[Multiaddr, ...]:
    raw = packing.items(fields, name, bytes, max_items=MAX_ADDRESSES, max_length=MAX_ADDRESS_BYTES)
    return tuple(map(read_address, raw))


@functools.lru_cache(maxsize=REMEMBERED)
def read_address(data: bytes) -> Multiaddr:
    """Raises: RemoteProtocolError: they are the bytes of no address."""
    try:
        return parse_bytes(data)
    except AddressError as error:
        raise RemoteProtocolError(str(error)) from error


@functools.lru_cache(maxsize=REMEMBERED)
def _contact(peer_id: bytes, addresses: tuple[bytes, ...]) -> Contact:
    if not 0 < len(peer_id) <= MAX_PEER_ID_BYTES:
        raise RemoteProtocolError(f"a peer id of {len(peer_id)} bytes")
    return Contact(peer_id=PeerId(peer_id), addresses=read_addresses({"a": list(addresses)}, "a"))


def read_contacts(fields: Mapping[str, Any]) -> list[Contact]:
    contacts = []
    for pair in packing.field(fields, "peers", list, max_length=K):
        match pair:
            case [bytes(peer_id), list(raw)] if all(type(each) is bytes for each in raw):
                contacts.append(_contact(peer_id, tuple(raw)))
            case _:
                raise RemoteProtocolError("a peer that is not [id, addresses]")
    return contacts


def read_key(fields: Mapping[str, Any]) -> bytes:
    key = packing.field(fields, "key", bytes)
    if len(key) != KEY_BYTES:
        raise RemoteProtocolError(f"a key of {len(key)} bytes, not {KEY_BYTES}")
    return key
