"""What benchmarks say: a goal that is missed by a hair is missed."""

from __future__ import annotations

import pytest

from tests.bench.report import figure, show


@pytest.mark.parametrize(
    ("value", "better", "met"),
    [(0.99899, "higher", False), (0.999, "higher", True), (0.99901, "lower", False), (0.999, "lower", True)],
)
def test_goals_are_compared_with_what_was_measured(value: float, better: str, met: bool) -> None:
    assert figure("found", [value], "of live", better=better, goal=0.999).is_met is met


def test_a_missed_goal_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show("swarm", [figure("found", [0.99899], "of live", better="higher", goal=0.999)], as_json=False)
    assert "0.99899" in (shown := capsys.readouterr().out)
    assert "MISSED" in shown
