"""What commands tell people beside their output."""

from __future__ import annotations

import logging
from collections.abc import Iterator

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
