"""What a session's steps gave, as long as there is room for it."""

from __future__ import annotations

import torch

from compute.outbox import Outbox, OutboxBudget


def result(first: int, count: int) -> torch.Tensor:
    return torch.arange(first, first + count, dtype=torch.float32).view(1, count, 1)


def test_it_gives_what_it_was_given() -> None:
    outbox = Outbox(OutboxBudget())
    outbox.add(0, result(0, 10))
    outbox.add(10, result(10, 1))
    outbox.add(11, result(11, 1))
    assert outbox.end == 12
    got = outbox.get(8, 12)
    assert got is not None
    assert torch.equal(got, result(8, 4))
    assert outbox.get(8, 13) is None
    assert outbox.get(5, 5) is None


def test_a_step_replaces_what_was_behind_it() -> None:
    outbox = Outbox(OutboxBudget())
    outbox.add(0, result(0, 10))
    outbox.add(4, result(100, 2))
    got = outbox.get(0, 6)
    assert got is not None
    assert got.flatten().tolist() == [0, 1, 2, 3, 100, 101]
    assert outbox.end == 6


def test_a_gap_is_not_bridged() -> None:
    outbox = Outbox(OutboxBudget())
    outbox.add(5, result(5, 3))
    assert outbox.end == 0
    assert outbox.get(5, 8) is None


def test_rows_that_change_places_take_everything_along() -> None:
    outbox = Outbox(OutboxBudget())
    outbox.add(0, result(0, 10))
    outbox.add(10, result(10, 1), order=[0])
    assert outbox.end == 0
    outbox.add(0, result(0, 3))  # sent again from the beginning
    assert outbox.end == 3


def test_all_together_have_a_budget() -> None:
    budget = OutboxBudget(max_bytes=100)
    one, two = Outbox(budget), Outbox(budget)
    one.add(0, result(0, 20))  # 80 bytes
    two.add(0, result(0, 6))
    assert (one.end, two.end) == (20, 0)
    one.cut(10)
    assert budget.left == 60
    two.add(0, result(0, 6))
    assert two.end == 6
    one.clear()
    two.clear()
    assert budget.left == 100
