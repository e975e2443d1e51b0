"""A module's folder, and what it says of itself.

It is a Hugging Face style one: ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT writes them, and
``raceme.json``, which says what they were trained on:

    {"version": 1, "model": "bloom-tiny", "model_digest": hex, "method": "lora", "metrics": {"loss": 2.1},
     "parent": HASH of the published module from which training began, or null}

Folders without it are taken as well: what they fit is then for their shapes to show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from net.errors import ModuleError
from net.modules import manifest as manifests
from net.replacing import FOR_ALL, replace_file

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
DESCRIPTION_FILE: Final = "raceme.json"
VERSION: Final = 1
MAX_JSON_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Description:
    """What ``raceme.json`` says of a module.

    Attributes:
        model, model_digest: what it was trained on.
        method: such as "lora".
        metrics: what was measured.
        parent: HASH of the published module from which training began.
    """

    model: str
    model_digest: str
    method: str
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    parent: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Description | None:
        """That of a folder; ``None`` if it has none.

        Raises:
            ModuleError: it makes no sense.
        """
        path = folder / DESCRIPTION_FILE
        if not path.exists():
            return None
        fields = read_json(path)
        if fields.get("version") != VERSION:
            raise ModuleError(f"{path}: of version {str(fields.get('version'))[:20]}, not {VERSION}")
        metrics = fields.get("metrics", {})
        if not isinstance(metrics, dict) or not all(_is_number(value) for value in metrics.values()):
            raise ModuleError(f"{path}: its metrics are no finite numbers by name")
        parent = fields.get("parent")
        return cls(
            model=_text(path, fields, "model", manifests.MODEL),
            model_digest=_text(path, fields, "model_digest", manifests.HASH),
            method=_text(path, fields, "method", manifests.METHOD),
            metrics={name: float(value) for name, value in metrics.items()},
            parent=None if parent is None else _text(path, fields, "parent", manifests.HASH),
        )

    def write(self, folder: Path) -> None:
        """Put it into a folder, in place of what is there.

        Raises:
            OSError: it cannot be written; what was there is there still.
        """
        fields = {
            "version": VERSION,
            "model": self.model,
            "model_digest": self.model_digest,
            "method": self.method,
            "metrics": dict(self.metrics),
            "parent": self.parent,
        }
        text = json.dumps(fields, indent=2, allow_nan=False) + "\n"
        replace_file(folder / DESCRIPTION_FILE, text.encode(), mode=FOR_ALL)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a file that anybody may have written.

    Raises:
        ModuleError: it is missing, too large, or something else.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ModuleError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(data)
    except OSError as error:
        raise ModuleError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModuleError(f"{path}: no JSON") from error
    if not isinstance(value, dict):
        raise ModuleError(f"{path}: no JSON object")
    return value


def _text(path: Path, fields: Mapping[str, Any], name: str, pattern: Any) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ModuleError(f"{path}: its {name!r} is {str(value)[:80]!r}, which is not of the form expected")
    return value


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= manifests.MAX_METRIC
