"""Small files of what was measured: whole, or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compute.outcomes import OutcomeFile, outcome_file


def test_what_was_written_is_read(tmp_path: Path) -> None:
    file = outcome_file(tmp_path / "new", "probe", [1, "x"])
    assert file.read(dict) is None
    file.write({"value": 1})
    file.write({"value": 2})
    assert file.read(lambda content: content["value"]) == 2
    assert list((tmp_path / "new").iterdir()) == [file.path]


def test_each_kind_configuration_and_number_of_threads_has_its_own(tmp_path: Path) -> None:
    files = [outcome_file(tmp_path, "probe", 1), outcome_file(tmp_path, "speed", 1), outcome_file(tmp_path, "probe", 2)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        files.append(outcome_file(tmp_path, "probe", 1))
    finally:
        torch.set_num_threads(threads)
    assert len({file.path for file in files}) == 4
    assert outcome_file(tmp_path, "probe", 1) == files[0]


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError])
def test_what_is_not_believed_is_as_good_as_none(tmp_path: Path, error: type[Exception]) -> None:
    def parse(content: object) -> object:
        raise error("no")

    file = outcome_file(tmp_path, "probe", 1)
    file.write({})
    assert file.read(parse) is None
    assert OutcomeFile(file.path, "another").read(dict) is None


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    file = outcome_file(tmp_path, "probe", 1)
    file.path.mkdir()
    file.write({})
    assert file.read(dict) is None
    assert list(tmp_path.iterdir()) == [file.path]
    file.path.rmdir()
    with pytest.raises(TypeError):
        file.write({"value": object()})
    assert list(tmp_path.iterdir()) == []
