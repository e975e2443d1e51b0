"""What transformers takes for a key-value cache, when keys and values lie on the nodes."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from client.errors import ClientError, InvalidInput, SwarmClosed
from client.portal import Portal

if TYPE_CHECKING:
    from client.session import Session


class SessionCache:
    """A session's blocking face. Pass it to ``generate(session=...)``; it keeps its tokens between calls.

    Attributes:
        is_compileable: read by transformers; never true.
    """

    is_compileable = False

    def __init__(self, session: Session, portal: Portal) -> None:
        self._session = session
        self._portal = portal
        self._closed = False
        self._ids: torch.Tensor | None = None  # [b, t] of what was computed; at least ``position`` long

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens whose keys and values the nodes hold (the name is transformers')."""
        return self._session.position

    @property
    def position(self) -> int:
        """Tokens so far. Set it back to forget the last ones."""
        return self._session.position

    @position.setter
    def position(self, position: int) -> None:
        self._session.rollback(position)

    def crop(self, max_length: int) -> None:
        """Forget all but the first ``max_length`` tokens; below 0, that many at the end (transformers' name)."""
        self._session.rollback(max_length if max_length >= 0 else self._session.position + max_length)

    @property
    def route(self) -> list[tuple[str, int, int]]:
        """(PeerId, first block, end block) of each hop in use."""
        return [(str(hop.node.peer_id), hop.start, hop.end) for hop in self._session.chain]

    def prepare(self, batch: int, tokens: int = 0) -> int:
        """Open the session for ``batch`` rows; returns how many tokens fit.

        Args:
            batch: rows.
            tokens: how many the caller is going to need.

        Raises:
            InvalidInput: ``tokens`` do not fit.
            Others: as ``Session.prepare``.
        """
        self._check_open()
        self._portal.call(self._session.prepare, batch)
        room = self._session.max_length
        if tokens > room:
            raise InvalidInput(
                f"prompt and new tokens make {tokens + 1} tokens; the nodes on the chain allow {room + 1} ({room} in "
                f"the session, and the last one, which is never sent): shorten the prompt or ask for fewer new tokens"
            )
        return room

    def keep_prefix(self, ids: torch.Tensor) -> None:
        """Go back to where ``ids`` and the session's tokens part, and at least before the last of ``ids``, whose
        logits are wanted.

        Shapes:
            ids: [b, t]
        """
        shared = min(self.position, ids.shape[1] - 1)
        if self._ids is None or self._ids.shape[0] != ids.shape[0]:
            return  # nothing yet, or another number of rows, which the session refuses itself
        same = (self._ids[:, :shared] == ids[:, :shared]).all(dim=0)  # [shared]
        self._session.rollback(shared if bool(same.all()) else int(same.int().argmin()))

    def step(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """All blocks on the next tokens.

        Shapes:
            hidden: [b, t, d]
            ids: [b, t], of which these are the embeddings
            returns: [b, t, d]
        Raises: as ``Session.step``.
        """
        self._check_open()
        before = self.position
        output = self._portal.call(self._session.step, hidden)
        kept = ids if self._ids is None or not before else torch.cat([self._ids[:, :before], ids], dim=1)
        self._ids = kept  # [b, position]
        return output

    def _check_open(self) -> None:
        if self._closed:
            raise ClientError("the session is closed: open another with model.session()")

    def close(self) -> None:
        """Free the session on its nodes, if the swarm's end has not done so. It cannot be used afterwards."""
        self._closed = True
        with suppress(SwarmClosed):
            self._portal.call(self._session.aclose)

    def __enter__(self) -> SessionCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
