"""Choosing linear layers: by exactness first, then by time, and the same again after a restart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from compute import probe as probe_module
from compute.bloom import BloomConfig
from compute.probe import Candidate, choose, probe

CONFIG = BloomConfig(vocab_size=16, hidden_size=64, n_layer=2, n_head=2)
FP32 = Candidate(name="fp32", error=1e-7, rows_agree=True, decode_s=2e-3, batch_s=5e-3)
FP16 = Candidate(name="fp16", error=2e-4, rows_agree=True, decode_s=1e-3, batch_s=4e-3)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "COLD_WEIGHTS", 1 << 16)


class Clock:
    """Every look costs as many seconds as it says."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return 0.5 * self.looks


def test_the_fastest_is_chosen() -> None:
    assert choose([FP32, FP16]) == "fp16"
    assert choose([FP32, replace(FP16, batch_s=7e-3)]) == "fp32"


def test_what_is_not_exact_is_not_chosen() -> None:
    assert choose([FP32, replace(FP16, error=2e-3)]) == "fp32"
    assert choose([FP32, replace(FP16, error=float("nan"))]) == "fp32"
    assert choose([]) == "fp32"


def test_rows_that_mix_are_the_last_resort() -> None:
    assert choose([FP32, replace(FP16, rows_agree=False)]) == "fp32"
    assert choose([replace(FP32, rows_agree=False), replace(FP16, rows_agree=False)]) == "fp16"


def test_every_candidate_is_tried() -> None:
    outcome = probe(CONFIG, None, clock=Clock())
    assert {each.name for each in outcome.candidates} == {"fp16", "fp32"}
    assert all(each.rows_agree and each.error < 1e-3 for each in outcome.candidates)
    assert outcome.chosen == "fp16"  # the first of two that are equally fast


def test_the_outcome_is_kept(tmp_path: Path) -> None:
    first = probe(CONFIG, tmp_path / "new", clock=Clock())
    (path,) = (tmp_path / "new").iterdir()
    clock = Clock()
    assert probe(CONFIG, tmp_path / "new", clock=clock) == first
    assert clock.looks == 0
    probe(replace(CONFIG, hidden_size=128, n_head=4), tmp_path / "new", clock=clock)
    assert clock.looks > 0
    assert len(list((tmp_path / "new").iterdir())) == 2
    assert path.exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"key": 1}', "chosen", "error"])
def test_a_damaged_outcome_is_measured_anew(tmp_path: Path, content: str) -> None:
    probe(CONFIG, tmp_path, clock=Clock())
    (path,) = tmp_path.iterdir()
    if content in ("chosen", "error"):
        known = json.loads(path.read_text())
        if content == "chosen":
            known["chosen"] = "nf4"
        else:
            known["candidates"][0]["error"] = 0.5
        content = json.dumps(known)
    path.write_text(content)
    clock = Clock()
    assert probe(CONFIG, tmp_path, clock=clock).chosen == "fp16"
    assert clock.looks > 0
    assert json.loads(path.read_text())["chosen"] == "fp16"


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert probe(CONFIG, tmp_path / "file", clock=Clock()).chosen == "fp16"


def test_a_missing_kernel_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("Didn't find engine for operation\nwith a stack")

    monkeypatch.setattr("compute.linear.packed.Float16Linear.pack", missing)
    outcome = probe(CONFIG, None, clock=Clock())
    assert outcome.chosen == "fp32"
    assert [each.name for each in outcome.candidates] == ["fp32"]
