"""What commands tell people beside their output."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator

import pytest

from net import console

PART = "some.part.of.raceme"


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    root, part = logging.getLogger(), logging.getLogger(PART)
    before = root.level
    yield
    root.setLevel(before)
    part.handlers.clear()
    part.propagate = True


@pytest.mark.parametrize("level", [logging.ERROR, logging.DEBUG])
def test_warnings_are_notes_unless_the_log_is_shown(level: int, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger().setLevel(level)
    console.tell_warnings(PART)
    below = logging.getLogger(f"{PART}.below")
    below.info("nothing to worry about")
    below.warning("looking for %s", "somebody")
    expected = "\nraceme: note: looking for somebody\n" if level == logging.ERROR else ""
    assert capsys.readouterr() == ("", expected)


def test_notes_may_be_of_less_than_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger().setLevel(logging.ERROR)
    console.tell_warnings(PART, least=logging.INFO)
    logging.getLogger(PART).info("it is here")
    logging.getLogger(PART).debug("at last")
    assert capsys.readouterr() == ("", "\nraceme: note: it is here\n")


@pytest.mark.parametrize(
    ("read", "good", "bad", "wanted"),
    [
        (console.number(0, 2), ["0", "2", "1e-3"], ["-1e-9", "2.1"], "a number from 0 to 2"),
        (console.number(0, 2, is_above=True), ["2", "1e-9"], ["0", "3"], "a number above 0, at most 2"),
        (console.number(0, 1, is_below=True), ["0", "0.999"], ["1", "-0.1"], "a number from 0, below 1"),
    ],
)
def test_numbers_within_bounds(read: Callable[[str], float], good: list[str], bad: list[str], wanted: str) -> None:
    assert [read(text) for text in good] == [float(text) for text in good]
    for text in (*bad, "nan", "inf", "", "much"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text!r} is not {wanted}"):
            read(text)
