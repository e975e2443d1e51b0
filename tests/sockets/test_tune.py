"""``raceme tune`` as a process, on nodes that are processes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.sockets.commands import LOOPBACK, run, started

DATA = Path(__file__).parents[1] / "data" / "python-reference.jsonl"
MODULE = ("adapter_config.json", "adapter_model.safetensors", "raceme.json")


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a swarm with two nodes of bloom-tiny."""
    home = tmp_path_factory.mktemp("tune")
    with ExitStack() as processes:
        address = processes.enter_context(started(home / "relay", "relay", "--listen", LOOPBACK)).line()
        common = ("--bootstrap", address, "--listen", LOOPBACK, "--threads", "1", "--quantize", "fp32", "--json")
        for span in ("0:3", "3:8"):
            node = processes.enter_context(started(home / span[0], "serve", "bloom-tiny", "--blocks", span, *common))
            node.json()
        yield address


def test_ctrl_c_saves_and_the_same_command_goes_on_bit_for_bit(relay: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(DATA.read_text(encoding="utf-8").splitlines(keepends=True)[:10]), encoding="utf-8")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common = (
        *("tune", "--bootstrap", relay, "--model", "bloom-tiny", "--data", str(texts), "--method", "lora"),
        *("--steps", "12", "--max-length", "48", "--batch-size", "4", "--evaluate-every", "2", "--out"),
    )
    outcome = run(tmp_path, *common, str(whole), "--json", timeout_s=90)
    assert (outcome.status, outcome.errors) == (0, "")
    told = outcome.json
    assert told["held_out_loss"] < told["frozen_held_out_loss"]
    with started(tmp_path, *common, str(broken)) as command:
        while not (line := command.error_line()).startswith("step 4:"):
            assert line, "it has ended"
        outcome = command.end(signal.SIGINT, timeout_s=20)
    assert outcome.status == 130
    assert "which is saved: the same command again goes on from there" in outcome.errors
    assert not (broken / "raceme.json").exists()
    outcome = run(tmp_path, *common, str(broken), timeout_s=90)
    assert outcome.status == 0, outcome.errors
    assert "going on after step" in outcome.errors
    assert f"raceme publish {broken}" in outcome.output
    for name in (*MODULE, "checkpoint.safetensors", "log.jsonl"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.loads((whole / "raceme.json").read_text())["metrics"]["held_out_loss"] == told["held_out_loss"]
