"""What every block gave for some tokens, put together out of what the nodes on the chain answer."""

from __future__ import annotations

import torch
from torch import Tensor

from client.errors import SessionFailed


class EveryBlock:
    """Results of all blocks of a model, for tokens from ``position`` on. Pieces may come twice, and in any order."""

    def __init__(self, position: int) -> None:
        self.position = position
        self._found: dict[int, dict[int, Tensor]] = {}  # by block and first token: [b, t, d]

    def take(self, block: int, position: int, states: Tensor) -> None:
        """What blocks from ``block`` on gave for tokens from ``position`` on.

        Shapes:
            states: [n, b, t, d]
        """
        for number, state in enumerate(states, start=block):
            self._found.setdefault(number, {})[position] = state

    def gathered(self, blocks: range, end: int) -> Tensor:
        """All results of these blocks for the tokens before ``end``.

        Shapes:
            returns: [n, b, end - position, d]

        Raises:
            SessionFailed: some are missing.
        """
        return torch.stack([self._row(block, end) for block in blocks])

    def _row(self, block: int, end: int) -> Tensor:
        parts, at = [], self.position
        for start, state in sorted(self._found.get(block, {}).items()):
            stop = start + state.shape[1]
            if start <= at < min(stop, end):
                parts.append(state[:, at - start : end - start])
                at = min(stop, end)
        if at != end:
            raise SessionFailed(f"hidden states after block {block} are missing from token {at} on")
        return torch.cat(parts, dim=1)  # [b, end - position, d]
