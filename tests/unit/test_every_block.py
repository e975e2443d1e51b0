"""Results of all blocks, put together out of pieces in any order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.errors import SessionFailed
from client.every_block import EveryBlock

BLOCKS, TOKENS = 4, 9
ALL = torch.arange(BLOCKS * 2 * TOKENS * 3.0).reshape(BLOCKS, 2, TOKENS, 3)


def piece(first: int, last: int, start: int, stop: int) -> tuple[int, int, torch.Tensor]:
    """Of blocks and tokens, both with their ends, as a node may give it."""
    return first, start, ALL[first : last + 1, :, start : stop + 1]


spans = st.lists(st.integers(0, BLOCKS - 1), min_size=2, max_size=2).map(sorted)
tokens = st.lists(st.integers(0, TOKENS - 1), min_size=2, max_size=2).map(sorted)
pieces = st.tuples(spans, tokens).map(lambda each: piece(*each[0], *each[1]))


@given(given_pieces=st.lists(pieces, max_size=12), position=st.integers(0, TOKENS - 1), end=st.integers(1, TOKENS))
def test_all_or_an_error(given_pieces: list[tuple[int, int, torch.Tensor]], position: int, end: int) -> None:
    found, covered = EveryBlock(position), torch.zeros(BLOCKS, TOKENS, dtype=torch.bool)
    latest: dict[tuple[int, int], int] = {}
    for block, start, states in given_pieces:
        found.take(block, start, states)
        for number in range(block, block + len(states)):
            latest[number, start] = start + states.shape[2]
    for (number, start), stop in latest.items():
        covered[number, start:stop] = True
    if end <= position:
        return
    if bool(covered[:, position:end].all()):
        assert torch.equal(found.gathered(range(BLOCKS), end), ALL[:, :, position:end])
    else:
        with pytest.raises(SessionFailed, match="hidden states after block"):
            found.gathered(range(BLOCKS), end)
