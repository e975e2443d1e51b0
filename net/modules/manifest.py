"""A module's manifest: what an author says of files that were trained on top of a model. No I/O.

It travels in libp2p's signed envelope, under a domain of its own. Its payload is msgpack:

    {
        "v": 1,
        "name": str,                        as in NAME; whoever wants this very module says NAME@HASH
        "model": str, "model_digest": hex,  what it was trained on, as nodes announce it
        "method": str,                      such as "lora"
        "files": [[name, size, root]...],   at most 16; ``net.files`` says what a root is
        "metrics": {str: float},            what the author measured, at most 32
        "licence": str,                     an SPDX expression, or as near to one as the author came
        "parent": hex?,                     HASH of the module from which training began
        "author": bytes,                    PeerId of the key that signs; not of a host
        "created": int                      Unix seconds, by the author's clock
    }

HASH is the hex SHA-256 of the payload. Files have plain names, and suffixes of what is read as data alone: a name
cannot leave its folder, nor be one of something that could be run or unpickled.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from libp2p.peer.envelope import Envelope, make_unsigned, unmarshal_envelope

from net.errors import ModuleError, RemoteProtocolError
from net.identity import Identity, PeerId
from net.rpc import packing

__all__ = ["Manifest", "ModuleFile", "Reference", "make", "verify"]

DOMAIN: Final = "raceme-module"
PAYLOAD_TYPE: Final = b"/raceme/module"
VERSION: Final = 1
MAX_ENVELOPE_BYTES: Final = 8 * 1024  # 16 files and 32 metrics need 6 KiB
MAX_FILES: Final = 16
MAX_FILE_BYTES: Final = 1 << 40  # of a single one; how much is fetched is for who fetches to say
MAX_METRICS: Final = 32
MAX_METRIC: Final = 1e300
ROOT_BYTES: Final = 32
HASH_DIGITS: Final = 64
LEAST_DIGITS: Final = 8  # of a HASH that is cut short
REQUIRED: Final = ("adapter_config.json", "adapter_model.safetensors")
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MODEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,95}")  # as in nodes' announcements
METHOD: Final = re.compile(r"[a-z][a-z0-9+._-]{0,47}")
FILE_NAME: Final = re.compile(
    r"(?=.{1,96}\Z)[A-Za-z0-9][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*\.(?:json|md|safetensors|txt)"
)
METRIC: Final = re.compile(r"[A-Za-z][A-Za-z0-9._/-]{0,47}")
LICENCE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+() -]{0,63}")
HASH: Final = re.compile(rf"[0-9a-f]{{{HASH_DIGITS}}}")
_REFERENCE: Final = re.compile(rf"({NAME.pattern})(?:@([0-9a-fA-F]{{{LEAST_DIGITS},{HASH_DIGITS}}}))?")


@dataclass(frozen=True, kw_only=True)
class ModuleFile:
    """One of a module's files.

    Attributes:
        name: without a folder.
        size: bytes.
        root: what ``net.files`` knows it by: 32 bytes.
    """

    name: str
    size: int
    root: bytes


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest whose signature has been checked, beside the bytes that prove it.

    Attributes:
        hash: HASH, 64 hex digits.
        model_digest: of the model that it was trained on, hex.
        parent: HASH of the module that it was trained from.
        author: who signed it.
        created_s: Unix time.
        envelope: what is passed on.
    """

    name: str
    hash: str
    model: str
    model_digest: str
    method: str
    files: tuple[ModuleFile, ...]
    metrics: Mapping[str, float] = field(hash=False)
    licence: str
    parent: str | None
    author: PeerId
    created_s: int
    envelope: bytes

    @property
    def total_bytes(self) -> int:
        """What its files take together."""
        return sum(file.size for file in self.files)

    def __str__(self) -> str:
        return f"{self.name}@{self.hash}"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """``NAME`` or ``NAME@HASH``, as a person writes it.

    Attributes:
        hash_prefix: at least 8 digits of a HASH, lower case; or empty, for whichever there is.
    """

    name: str
    hash_prefix: str

    @classmethod
    def read(cls, text: str) -> Reference:
        """Raises:
        ModuleError: it is neither.
        """
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise ModuleError(
                f"{text!r:.200} names no module: it is NAME or NAME@HASH, with at least {LEAST_DIGITS} digits of the "
                f"hash, as in my-adapter@1f0c35aa"
            )
        return cls(name=match[1], hash_prefix=(match[2] or "").lower())

    def matches(self, manifest: Manifest) -> bool:
        """Whether that module may be meant."""
        return manifest.name == self.name and manifest.hash.startswith(self.hash_prefix)

    def __str__(self) -> str:
        return f"{self.name}@{self.hash_prefix}" if self.hash_prefix else self.name


def make(
    identity: Identity,
    *,
    name: str,
    model: str,
    model_digest: str,
    method: str,
    files: Iterable[ModuleFile],
    licence: str,
    metrics: Mapping[str, float] | None = None,
    parent: str | None = None,
    created_s: int | None = None,
) -> Manifest:
    """A new manifest, signed by its author ``identity``.

    Raises:
        ModuleError: a field that nobody would accept; the text says which.
    """
    fields = {
        "v": VERSION,
        "name": name,
        "model": model,
        "model_digest": model_digest,
        "method": method,
        "files": [[file.name, file.size, file.root] for file in files],
        "metrics": {key: float(value) for key, value in (metrics or {}).items()},
        "licence": licence,
        "parent": parent,
        "author": identity.peer_id.to_bytes(),
        "created": int(time.time()) if created_s is None else created_s,
    }
    try:
        _read(fields, "", b"")
    except RemoteProtocolError as error:
        raise ModuleError(f"a manifest that nobody would accept: {error}") from error
    payload = packing.pack(fields)
    envelope = Envelope(
        public_key=identity.key_pair.public_key,
        payload_type=PAYLOAD_TYPE,
        raw_payload=payload,
        signature=identity.sign(make_unsigned(DOMAIN, PAYLOAD_TYPE, payload)),
    )
    return verify(envelope.marshal_envelope())


def verify(data: bytes, *, expected_hash: str | None = None) -> Manifest:
    """Check an envelope and read its manifest.

    Args:
        data: the envelope.
        expected_hash: of the module that was asked for; None for whichever it is.

    Raises:
        ModuleError: too large, malformed, out of bounds, badly signed, signed by another than its author, or
            another module's.
    """
    if len(data) > MAX_ENVELOPE_BYTES:
        raise ModuleError(f"a manifest of {len(data)} bytes: at most {MAX_ENVELOPE_BYTES} are read")
    try:
        envelope = unmarshal_envelope(data)
        envelope.validate(DOMAIN)
    except Exception as error:  # protobuf's, the library's and the key type's own errors
        raise ModuleError(f"a manifest without a valid signature: {error}") from error
    if envelope.payload_type != PAYLOAD_TYPE:
        raise ModuleError("an envelope that holds no manifest")
    payload = bytes(envelope.raw_payload)
    digest = hashlib.sha256(payload).hexdigest()
    if expected_hash is not None and digest != expected_hash:
        raise ModuleError(f"the manifest of module {digest[:12]}, not of {expected_hash[:12]}")
    try:
        manifest = _read(packing.unpack(payload), digest, data)
    except RemoteProtocolError as error:
        raise ModuleError(f"a malformed manifest: {error}") from error
    if PeerId.from_pubkey(envelope.public_key) != manifest.author:
        raise ModuleError(f"a manifest of {manifest.author} that somebody else signed")
    return manifest


def _read(fields: Mapping[str, Any], digest: str, envelope: bytes) -> Manifest:
    """Raises:
    RemoteProtocolError: fields that are missing, of the wrong kind, or out of bounds.
    """
    if fields.get("v") != VERSION:
        raise RemoteProtocolError(f"version {str(fields.get('v'))[:20]}, not {VERSION}")
    return Manifest(
        name=_matching(fields, "name", NAME),
        hash=digest,
        model=_matching(fields, "model", MODEL),
        model_digest=_matching(fields, "model_digest", HASH),
        method=_matching(fields, "method", METHOD),
        files=_files(fields),
        metrics=_metrics(fields),
        licence=_matching(fields, "licence", LICENCE),
        parent=None if fields.get("parent") is None else _matching(fields, "parent", HASH),
        author=PeerId(packing.field(fields, "author", bytes, max_length=64)),
        created_s=packing.integer(fields, "created", 0, 2**40),
        envelope=envelope,
    )


def _files(fields: Mapping[str, Any]) -> tuple[ModuleFile, ...]:
    files: list[ModuleFile] = []
    for item in packing.field(fields, "files", list, max_length=MAX_FILES):
        match item:
            case [str(name), int(size), bytes(root)] if type(size) is int and len(root) == ROOT_BYTES:
                if not FILE_NAME.fullmatch(name):
                    raise RemoteProtocolError(f"a file called {name!r:.100}, which no module may have")
                if not 0 <= size <= MAX_FILE_BYTES:
                    raise RemoteProtocolError(f"{name} is {size} bytes, which is out of bounds")
                files.append(ModuleFile(name=name, size=size, root=root))
            case _:
                raise RemoteProtocolError("a file that is not [name, size, root]")
    names = {file.name.lower() for file in files}  # some file systems do not tell the cases apart
    if len(names) < len(files):
        raise RemoteProtocolError("two files of one name")
    for name in REQUIRED:
        if name not in {file.name for file in files}:
            raise RemoteProtocolError(f"no {name} among its files")
    return tuple(files)


def _metrics(fields: Mapping[str, Any]) -> Mapping[str, float]:
    named = packing.field(fields, "metrics", dict, max_length=MAX_METRICS)
    for name in named:
        if not isinstance(name, str) or not METRIC.fullmatch(name):
            raise RemoteProtocolError(f"a metric called {name!r:.100}")
    return MappingProxyType({name: packing.number(named, name, -MAX_METRIC, MAX_METRIC) for name in named})


def _matching(fields: Mapping[str, Any], name: str, pattern: re.Pattern[str]) -> str:
    text = packing.field(fields, name, str, max_length=128)
    if not pattern.fullmatch(text):
        raise RemoteProtocolError(f"{name!r} is {text!r}, which is not of the form expected")
    return text
