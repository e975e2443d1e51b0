"""What can go wrong for a user of a swarm. Each text is one line: the cause, and what to do."""

from __future__ import annotations


class ClientError(Exception):
    """Base of this floor's errors."""


class SwarmClosed(ClientError):
    """``close()`` was called, or the swarm's block has ended."""


class UnknownModel(ClientError):
    """Nobody serves the model, or its files are not on this machine."""


class MissingBlocks(ClientError):
    """No chain of nodes covers the model.

    Attributes:
        missing: the runs of blocks, [start, end), that nobody serves or nobody reachable does.
    """

    def __init__(self, message: str, missing: list[tuple[int, int]]) -> None:
        super().__init__(message)
        self.missing = missing


class InvalidInput(ClientError, ValueError):
    """The caller's input cannot be computed; no node is to blame and nothing is retried."""


class SessionFailed(ClientError):
    """A session could not be carried on, with any chain there is."""
