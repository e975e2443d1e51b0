"""What a compute node announces: a signed record of kind ``node`` under the key of all nodes.

body = {
    "addresses": [bytes...],            multiaddrs, best first
    "model": str, "digest": hex,        its name and the digest of its config and weight map
    "blocks": int,                      how many the whole model has
    "start": int, "end": int,           the span served, [start, end)
    "weights": hex,                     digest of the span's weights as stored
    "numerics": [dtype, quantization, backend]
    "decode_tokens_per_s": float,       measured, batch 1
    "cache_tokens_left": int, "max_length": int,
    "agent": str,
    "reachability": str?                public, mapped, punchable, relay-only, unknown (which is what its lack means)
    "next": [int, int]?                 the span [start, end) that the node moves to: loads now, and will serve instead
    "round_trips": {bytes: float}?      to nodes before and behind it in chains, by PeerId, in seconds; at most 32
    "codecs": [str...]?                 which the node can undo; none if missing
    "waiting": float?                   steps that wait or run there, on average over the last half minute; 0 if missing
    "files": [bytes, int]?              root and size of the manifest of the model's files: it serves some or all
}
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from net.addresses import Multiaddr
from net.dht import wire
from net.errors import RecordError, RemoteProtocolError
from net.files.pieces import FileId
from net.identity import PeerId
from net.records import Record
from net.rpc import packing

__all__ = ["DIRECTORY", "KIND", "NodeAnnouncement", "Numerics", "read_all"]

logger = logging.getLogger(__name__)

KIND = "node"
DIRECTORY = "raceme/nodes/1"
MAX_BLOCKS = 1024
MAX_NAME_CHARACTERS = 96
MAX_ROUND_TRIPS = 32  # 50 bytes each: records of less than 4 KiB have their signatures checked once alone
MAX_ROUND_TRIP_S = 60.0
MAX_WAITING = 1e4
MAX_CODECS = 8
MAX_CODEC_CHARACTERS = 16
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
STATE = re.compile(r"joining|online")
REACHABILITY = re.compile(r"public|mapped|punchable|relay-only|unknown")
HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """What decides the bits of a result besides weights and input. Sessions keep to one class."""

    dtype: str
    quantization: str
    backend: str

    def __str__(self) -> str:
        return self.dtype if self.quantization == "none" else f"{self.dtype}/{self.quantization}"


@dataclass(frozen=True, kw_only=True)
class NodeAnnouncement:
    """One node's offer, read from a verified record or to be signed.

    Attributes:
        round_trips: to other nodes, in seconds; the first ``MAX_ROUND_TRIPS`` are announced.
        waiting: steps that wait or run, on average.
        codecs: for hidden states that it is sent.
        files: the manifest of the model's files, if it serves them.
    """

    peer_id: PeerId
    addresses: tuple[Multiaddr, ...]
    model: str
    digest: str
    blocks: int
    start: int
    end: int
    weights: str
    numerics: Numerics
    decode_tokens_per_s: float
    cache_tokens_left: int
    max_length: int
    state: str
    agent: str
    reachability: str = "unknown"
    next: tuple[int, int] | None = None
    round_trips: Mapping[PeerId, float] = field(default_factory=dict, hash=False)
    waiting: float = 0.0
    codecs: tuple[str, ...] = ()
    files: FileId | None = None

    def to_body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "addresses": wire.write_addresses(self.addresses),
            "model": self.model,
            "digest": self.digest,
            "blocks": self.blocks,
            "start": self.start,
            "end": self.end,
            "weights": self.weights,
            "numerics": [self.numerics.dtype, self.numerics.quantization, self.numerics.backend],
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "cache_tokens_left": self.cache_tokens_left,
            "max_length": self.max_length,
            "state": self.state,
            "agent": self.agent,
            "reachability": self.reachability,
        }
        if self.next is not None:
            body["next"] = list(self.next)
        if self.round_trips:
            named = itertools.islice(self.round_trips.items(), MAX_ROUND_TRIPS)
            body["round_trips"] = {peer.to_bytes(): seconds for peer, seconds in named}
        if self.waiting:
            body["waiting"] = self.waiting
        if self.codecs:
            body["codecs"] = list(self.codecs)
        if self.files is not None:
            body["files"] = [self.files.root, self.files.size]
        return body

    @classmethod
    def from_record(cls, record: Record) -> NodeAnnouncement:
        """Raises:
        RecordError: fields that are missing, of the wrong kind, or out of bounds.
        """
        try:
            return cls._parse(record.peer_id, record.body)
        except RemoteProtocolError as error:
            raise RecordError(f"a malformed announcement of {record.peer_id}: {error}") from error

    @classmethod
    def _parse(cls, peer_id: PeerId, body: Mapping[str, Any]) -> NodeAnnouncement:
        blocks = packing.integer(body, "blocks", 1, MAX_BLOCKS)
        end = packing.integer(body, "end", 1, blocks)
        numerics = packing.items(body, "numerics", str, max_items=3, max_length=32)
        if len(numerics) != 3:
            raise RemoteProtocolError("'numerics' is not [dtype, quantization, backend]")
        return cls(
            peer_id=peer_id,
            addresses=wire.read_addresses(body, "addresses"),
            model=_matching(body, "model", NAME, MAX_NAME_CHARACTERS),
            digest=_matching(body, "digest", HEX_DIGEST, 64),
            blocks=blocks,
            start=packing.integer(body, "start", 0, end - 1),
            end=end,
            weights=_matching(body, "weights", HEX_DIGEST, 64),
            numerics=Numerics(dtype=numerics[0], quantization=numerics[1], backend=numerics[2]),
            decode_tokens_per_s=packing.number(body, "decode_tokens_per_s", 0.0, 1e9),
            cache_tokens_left=packing.integer(body, "cache_tokens_left", 0, 2**40),
            max_length=packing.integer(body, "max_length", 1, 2**30),
            state=_matching(body, "state", STATE, 16),
            agent=packing.field(body, "agent", str, max_length=64),
            reachability=_matching({"reachability": "unknown", **body}, "reachability", REACHABILITY, 16),
            next=_next(body, blocks) if "next" in body else None,
            round_trips=_round_trips(body) if "round_trips" in body else {},
            waiting=packing.number({"waiting": 0.0, **body}, "waiting", 0.0, MAX_WAITING),
            codecs=read_codecs(body),
            files=_files(body) if "files" in body else None,
        )


def read_codecs(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Raises:
    RemoteProtocolError: too many, or no names.
    """
    named = {"codecs": [], **fields}
    return tuple(packing.items(named, "codecs", str, max_items=MAX_CODECS, max_length=MAX_CODEC_CHARACTERS))


def _round_trips(body: Mapping[str, Any]) -> dict[PeerId, float]:
    named = packing.field(body, "round_trips", dict, max_length=MAX_ROUND_TRIPS)
    found: dict[PeerId, float] = {}
    for peer_id, seconds in named.items():
        if not isinstance(peer_id, bytes) or not 0 < len(peer_id) <= wire.MAX_PEER_ID_BYTES:
            raise RemoteProtocolError("'round_trips' has a key that is no PeerId")
        found[PeerId(peer_id)] = packing.number({"round_trips": seconds}, "round_trips", 0.0, MAX_ROUND_TRIP_S)
    return found


def _next(body: Mapping[str, Any], blocks: int) -> tuple[int, int]:
    span = packing.field(body, "next", list, max_length=2)
    if len(span) != 2:
        raise RemoteProtocolError("'next' is not [start, end]")
    end = packing.integer({"next": span[1]}, "next", 1, blocks)
    return packing.integer({"next": span[0]}, "next", 0, end - 1), end


def _files(body: Mapping[str, Any]) -> FileId:
    pair = packing.field(body, "files", list, max_length=2)
    if len(pair) != 2:
        raise RemoteProtocolError("'files' is not [root, size]")
    return FileId.read(*pair)


def _matching(body: Mapping[str, Any], name: str, pattern: re.Pattern[str], max_length: int) -> str:
    text = packing.field(body, name, str, max_length=max_length)
    if not pattern.fullmatch(text):
        raise RemoteProtocolError(f"{name!r} is {text!r}, which is not of the form expected")
    return text


def read_all(records: Iterable[Record]) -> list[NodeAnnouncement]:
    """Those records that make sense; the others are left out, with a line in the log."""
    announcements = []
    for record in records:
        try:
            announcements.append(NodeAnnouncement.from_record(record))
        except RecordError as error:
            logger.debug("%s", error)
    return announcements
