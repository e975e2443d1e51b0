"""Errors of the compute floor, by who can act on them.

* :class:`CheckpointError`: the weights cannot be used; the person who chose them can act.
* :class:`EngineError`: a request was not served. ``code`` is a short word that goes over the wire, so
  that a client can tell "send it elsewhere" (``busy``, ``out-of-cache``) from "never send this again".
"""

from __future__ import annotations

from typing import ClassVar


class CheckpointError(Exception):
    """A checkpoint cannot be used. The message is one line: the cause, and what to do about it."""


class ModelNotFound(CheckpointError):
    """No checkpoint goes by that name, neither as a folder nor as a shipped or published model."""


class EngineError(Exception):
    """The engine did not serve a request. ``code`` names the reason for programs."""

    code: str = "engine-error"


class BadInput(EngineError):
    """The request itself is wrong; the same request fails everywhere.

    After ``not-finite`` the session is over, too; ``no-session`` may also mean that it was ended for others' sake.

    Attributes:
        code: One of :attr:`CODES`.
    """

    CODES: ClassVar[frozenset[str]] = frozenset(
        {"bad-shape", "bad-dtype", "bad-position", "bad-value", "too-long", "not-finite", "no-session"}
    )

    def __init__(self, code: str, message: str) -> None:
        """Make the error.

        Raises:
            ValueError: ``code`` is not one of :attr:`CODES`.
        """
        if code not in self.CODES:
            raise ValueError(f"unknown code {code!r}")
        super().__init__(message)
        self.code = code


class Later(EngineError):
    """Not now: another node, or a later time, may do.

    Attributes:
        retry_after_s: When to come again.
    """

    retry_after_s: float = 1.0


class OutOfCache(Later):
    """The memory set aside for attention caches is taken."""

    code = "out-of-cache"


class EngineBusy(Later):
    """Too many requests wait already."""

    code = "busy"


class EngineStopped(EngineError):
    """The engine is not running (any more)."""

    code = "stopped"


class BadOutput(EngineError):
    """The model gave NaN or infinity for finite input: its weights or numerics are at fault. The session is over."""

    code = "bad-output"
