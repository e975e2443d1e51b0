"""What the files of a model are: a small file itself, by whose root a model is named, down to the last byte.

    msgpack {"v": 1, "name": str, "digest": hex, "files": [[name, size, root], ...]}       sorted by name

``name`` and ``digest`` are those that nodes announce. Whoever has the same files makes the same manifest. Names are
plain, of weights as ``.safetensors`` or of one of the few JSON files that belong to a model, whose sizes are bounded;
anything else is no manifest, so that nothing else ever comes from a peer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from net.errors import LocalProtocolError, RemoteProtocolError
from net.files.pieces import FileId, Hashes
from net.protocol.announcement import HEX_DIGEST, MAX_NAME_CHARACTERS, NAME
from net.rpc import packing

VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = packing.MAX_BYTES
JSON_BYTES: Final[Mapping[str, int]] = {  # the most that each may have
    "config.json": 1 << 20,
    "generation_config.json": 1 << 20,
    "model.safetensors.index.json": 16 << 20,
    "special_tokens_map.json": 1 << 20,
    "tokenizer.json": 64 << 20,  # BLOOM's has 14 MB
    "tokenizer_config.json": 4 << 20,
}
_WEIGHTS: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors")


@dataclass(frozen=True, kw_only=True)
class ModelManifest:
    """The files of a model.

    Attributes:
        name, digest: as announced.
        files: by name.
    """

    name: str
    digest: str
    files: Mapping[str, FileId]

    def to_bytes(self) -> bytes:
        """As it is served.

        Raises:
            LocalProtocolError: nobody would take it.
        """
        files = [[name, file.size, file.root] for name, file in sorted(self.files.items())]
        data = packing.pack({"v": VERSION, "name": self.name, "digest": self.digest, "files": files})
        try:
            ModelManifest.from_bytes(data)
        except RemoteProtocolError as error:
            raise LocalProtocolError(f"files that cannot be told of: {error}") from error
        return data

    @property
    def file_id(self) -> FileId:
        """Its own."""
        return Hashes.of_bytes(self.to_bytes()).file

    @classmethod
    def from_bytes(cls, data: bytes) -> ModelManifest:
        """What a peer gave.

        Raises:
            RemoteProtocolError: no manifest.
        """
        fields = packing.unpack(data)
        packing.integer(fields, "v", VERSION, VERSION)
        name = packing.field(fields, "name", str, max_length=MAX_NAME_CHARACTERS)
        digest = packing.field(fields, "digest", str, max_length=64)
        if not NAME.fullmatch(name) or not HEX_DIGEST.fullmatch(digest):
            raise RemoteProtocolError("a manifest without a model's name and digest")
        entries = packing.items(fields, "files", list, max_items=packing.MAX_ITEMS, max_length=3)
        files = dict(_read_entry(entry) for entry in entries)
        if len(files) < len(entries) or list(files) != sorted(files):
            raise RemoteProtocolError("a manifest that names files twice, or in no order")
        if "config.json" not in files:
            raise RemoteProtocolError("a manifest without config.json")
        return cls(name=name, digest=digest, files=files)


def _read_entry(entry: list[Any]) -> tuple[str, FileId]:
    if len(entry) != 3 or not isinstance(entry[0], str):
        raise RemoteProtocolError("a manifest with a file that is not [name, size, root]")
    name, size, root = entry
    file = FileId.read(root, size)
    if name in JSON_BYTES:
        if file.size > JSON_BYTES[name]:
            raise RemoteProtocolError(f"{name} of {file.size} bytes: at most {JSON_BYTES[name]} are taken")
    elif not _WEIGHTS.fullmatch(name):
        raise RemoteProtocolError(f"{name!r:.80} is no name of a file that belongs to a model")
    return name, file
