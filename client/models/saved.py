"""A session's history as a file: token ids, not what nodes computed of them, so that another process can go on.

JSON, version 1::

    {"raceme-session": 1, "model", "digest", "weights", "blocks", "tuning", "position", "pads", "ids"}

``ids`` has a list for each row, all of one length; the first ``position`` tokens of each were computed, and ``pads``
says how many of these are padding, or is null. ``weights`` is the digest of all blocks, or null where it is not known;
``tuning`` that of what was trained, if any was.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from client.errors import InvalidInput
from net.protocol.session import MAX_BATCH, MAX_LENGTH
from net.replacing import replace_file

VERSION: Final = 1
MAX_FILE_BYTES: Final = 64 << 20  # ten million tokens
_MARK: Final = "raceme-session"


@dataclass(frozen=True, kw_only=True)
class ModelMark:
    """Which model a session is of.

    Attributes:
        model: its name, for people.
        digest: of the tensors that there are.
        weights: of what is in its blocks; ``None`` if that is not known.
        blocks: how many there are.
        tuning: digest of what was trained, as it was; ``None`` if nothing was.
    """

    model: str
    digest: str
    weights: str | None
    blocks: int
    tuning: str | None = None

    def check(self, found: ModelMark) -> None:
        """Raises:
        InvalidInput: what was found is another model, as far as can be told.
        """
        is_same = (self.digest, self.blocks) == (found.digest, found.blocks)
        if not is_same or (None not in (self.weights, found.weights) and self.weights != found.weights):
            raise InvalidInput(
                f"the session was saved with another model ({found.model}, digest {found.digest[:12]}) than this one "
                f"({self.model}, digest {self.digest[:12]}): take the model that it was saved with"
            )
        if self.tuning != found.tuning:
            raise InvalidInput("the session was saved with other trained parameters than the model has: load those")


@dataclass(frozen=True, kw_only=True)
class SavedSession:
    """What a file says.

    Attributes:
        mark: of which model.
        ids: [rows][tokens].
        position: tokens of each row that were computed.
        pads: with how many tokens of padding each row begins.
    """

    mark: ModelMark
    ids: list[list[int]]
    position: int
    pads: tuple[int, ...] | None

    def write(self, path: Path) -> None:
        """Put it in place of what is there, at once, readable to its owner alone.

        Raises:
            InvalidInput: it is too long for a file.
            OSError: the file cannot be written; what was there is there still.
        """
        content = {_MARK: VERSION, **asdict(self.mark), "position": self.position, "pads": self.pads, "ids": self.ids}
        data = json.dumps(content, separators=(",", ":")).encode()
        if len(data) > MAX_FILE_BYTES:
            raise InvalidInput(f"the session takes {len(data)} bytes; at most {MAX_FILE_BYTES} are saved")
        replace_file(path, data)

    @classmethod
    def read(cls, path: Path) -> SavedSession:
        """Raises:
        InvalidInput: no session is in it, or one of another version.
        OSError: it cannot be read.
        """
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        try:
            if len(data) > MAX_FILE_BYTES:
                raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
            return cls._parse(json.loads(data))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidInput(f"{path} holds no session that can be taken up: {error}") from error

    @classmethod
    def _parse(cls, content: Any) -> SavedSession:
        """Raises:
        ValueError, KeyError, TypeError: not what :meth:`write` writes.
        """
        if not isinstance(content, dict) or _MARK not in content:
            raise ValueError("no session was saved in it")
        if content[_MARK] != VERSION:
            raise ValueError(f"version {content[_MARK]!r:.20}, not {VERSION}: take the raceme that saved it")
        ids = content["ids"]
        if not isinstance(ids, list) or not 1 <= len(ids) <= MAX_BATCH:
            raise ValueError(f"not 1 to {MAX_BATCH} rows")
        if not all(isinstance(row, list) and len(row) == len(ids[0]) <= MAX_LENGTH for row in ids):
            raise ValueError(f"rows that are not of one length up to {MAX_LENGTH}")
        if not all(type(token) is int and 0 <= token < 2**31 for row in ids for token in row):
            raise ValueError("ids that are no token ids")
        position = _whole(content, "position", len(ids[0]))
        pads = content["pads"]
        if pads is not None:
            if not isinstance(pads, list) or len(pads) != len(ids):
                raise ValueError("not a padding for each row")
            if not all(type(pad) is int and 0 <= pad < max(1, position) for pad in pads):
                raise ValueError("padding that is longer than the session")
        mark = ModelMark(
            model=_text(content, "model"),
            digest=_text(content, "digest"),
            weights=None if content["weights"] is None else _text(content, "weights"),
            blocks=_whole(content, "blocks", 2**16),
            tuning=None if content.get("tuning") is None else _text(content, "tuning"),
        )
        return cls(mark=mark, ids=ids, position=position, pads=None if pads is None else tuple(pads))


def _whole(content: dict[str, Any], name: str, most: int) -> int:
    value = content[name]
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name!r} is not a whole number from 0 to {most}")
    return value


def _text(content: dict[str, Any], name: str) -> str:
    value = content[name]
    if not isinstance(value, str) or len(value) > 256:
        raise ValueError(f"{name!r} is no text of at most 256 characters")
    return value
