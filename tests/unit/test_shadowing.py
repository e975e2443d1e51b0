"""Another distribution's ``net`` or ``compute`` in front of ours: say so, instead of failing somewhere inside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import client

ROOT = Path(client.__file__).resolve().parent.parent
CONNECT = "import client; client.connect('/ip4/127.0.0.1/tcp/1/p2p/x')"
OPEN_SWARM = "import client; client.open_swarm('/ip4/127.0.0.1/tcp/1/p2p/x')"
COMMAND = "import sys; sys.argv = ['raceme', 'status', '--bootstrap', 'x']; import client.cli; client.cli.main()"


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` with ``path`` in front of everything; started elsewhere, so that our folder is not the first."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=path[0],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))},
        capture_output=True,
        text=True,
        timeout=30,
    )


def shadow(folder: Path, name: str, kind: str) -> Path:
    """Make something else that is called ``name``; returns the file in the way."""
    if kind == "module":
        file = folder / f"{name}.py"
    else:
        file = folder / name / "__init__.py"
        file.parent.mkdir()
    file.write_text("")
    return file


@pytest.mark.parametrize("name", ["net", "compute"])
@pytest.mark.parametrize("kind", ["package", "module"])
def test_the_command_says_who_is_in_the_way(tmp_path: Path, name: str, kind: str) -> None:
    file = shadow(tmp_path, name, kind)
    outcome = python(COMMAND, tmp_path)
    assert outcome.returncode == 1
    assert outcome.stdout == ""
    [line] = outcome.stderr.splitlines()
    assert line.startswith(f"raceme: error: raceme's package '{name}' should be at {ROOT / name}, ")
    assert str(file) in line
    assert "uninstall it" in line


@pytest.mark.parametrize("code", [CONNECT, OPEN_SWARM])
def test_the_library_raises_import_error(tmp_path: Path, code: str) -> None:
    file = shadow(tmp_path, "net", "package")
    outcome = python(code, tmp_path)
    assert outcome.returncode == 1
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("ImportError: raceme's package 'net' should be at ")
    assert str(file) in last


def test_a_namespace_package_does_not_shadow(tmp_path: Path) -> None:
    """A folder without ``__init__.py`` loses against a package, wherever it is."""
    (tmp_path / "net").mkdir()
    assert "AddressError" in python(CONNECT, tmp_path).stderr


def test_nothing_in_the_way(tmp_path: Path) -> None:
    assert "is not a multiaddr" in python(COMMAND, tmp_path).stderr
