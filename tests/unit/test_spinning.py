"""Threads that have nothing to do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from compute.spinning import spin_briefly

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back, whatever happens to it here
        monkeypatch.delenv(name)


def test_threads_sleep_soon() -> None:
    spin_briefly()
    assert "OMP_WAIT_POLICY" not in os.environ
    assert (os.environ["GOMP_SPINCOUNT"], os.environ["KMP_BLOCKTIME"]) == ("1000", "1")


@pytest.mark.parametrize("name", NAMES)
def test_what_was_chosen_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "7")
    spin_briefly()
    assert {each: os.environ.get(each) for each in NAMES} == dict.fromkeys(NAMES) | {name: "7"}


def test_every_command_says_so_before_torch_is_there() -> None:
    code = (
        "import os, sys, compute.spinning as spinning\n"
        "spin = spinning.spin_briefly\n"
        "spinning.spin_briefly = lambda: (spin(), print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT']))\n"
        "from client.cli import main\n"
        "main(['--version'])\n"
    )
    plain = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "False 1000"
