"""What a session has sent, cut and put together again."""

from __future__ import annotations

import random

import pytest
import torch

from client.journal import DECODE_TOKENS, Journal


def numbered(first: int, count: int, rows: int = 1) -> torch.Tensor:
    """[rows, count, 2]: each token has its number, and that of its row."""
    tokens = torch.arange(first, first + count).repeat(rows, 1)
    return torch.stack([tokens, torch.arange(rows)[:, None].expand(rows, count)], dim=2)


def test_prompts_are_cut_as_they_were_and_decoded_tokens_are_put_together() -> None:
    journal = Journal()
    journal.add(numbered(0, 256))
    journal.add(numbered(256, 44))
    for token in range(300, 340):
        journal.add(numbered(token, 1))
    assert [journal.next_end(at) for at in (0, 256, 300, 332, 310)] == [256, 300, 332, 340, 340]
    assert torch.equal(journal.get(290, 335), numbered(290, 45))
    journal.merge = False
    assert journal.next_end(300) == 301


def test_rows_together_make_no_more_than_what_is_decoded() -> None:
    journal = Journal()
    for token in range(40):
        journal.add(numbered(token, 1, rows=5))
    assert journal.next_end(3) == 3 + DECODE_TOKENS // 5


def test_cutting() -> None:
    journal = Journal()
    journal.add(numbered(0, 50))
    journal.add(numbered(50, 1))
    journal.cut(20)
    assert (journal.end, journal.next_end(0)) == (20, 20)
    journal.add(numbered(20, 3))
    assert torch.equal(journal.get(0, 23), numbered(0, 23))
    journal.cut(0)
    assert journal.end == 0


@pytest.mark.parametrize("seed", range(20))
def test_rows_that_change_places(seed: int) -> None:
    """As if everything had been copied at once."""
    chance = random.Random(seed)
    journal, rows = Journal(), 3
    plain = torch.zeros(rows, 0, 2, dtype=torch.int64)
    for _ in range(30):
        kind = chance.random()
        if kind < 0.2 and journal.end:
            position = chance.randrange(journal.end)
            journal.cut(position)
            plain = plain[:, :position]
        elif kind < 0.5 and journal.end:
            order = [chance.randrange(rows) for _ in range(rows)]
            journal.reorder(order)
            plain = plain[order]
            assert journal.reordered_at == journal.end
        hidden = torch.randint(
            1000, (rows, chance.choice([1, 1, 2, 20]), 2), generator=torch.Generator().manual_seed(seed)
        )
        journal.add(hidden)
        plain = torch.cat([plain, hidden], dim=1)
        assert torch.equal(journal.get(0, journal.end), plain)
        position = chance.randrange(journal.end)
        end = journal.next_end(position)
        assert position < end <= journal.end
        assert torch.equal(journal.get(position, end), plain[:, position:end])
