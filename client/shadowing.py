"""Our package names are short; somebody else's ``net`` or ``compute`` may lie in front of ours. Then say so."""

from __future__ import annotations

import importlib.util
from pathlib import Path

OURS = ("net", "compute")


def check() -> None:
    """Refuse to go on when ``net`` or ``compute`` is not the one that belongs to this ``client``.

    Raises:
        ImportError: names the package that is in the way.
    """
    root = Path(__file__).resolve().parent.parent
    for name in OURS:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if origin != root / name / "__init__.py":
            raise ImportError(
                f"raceme's package {name!r} should be at {root / name}, but Python finds {origin or 'none'}: "
                f"another distribution is in the way; uninstall it, or install raceme in an environment of its own"
            )
