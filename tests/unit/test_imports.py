"""Which floor may import what, read from the sources; each rule with its reason."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Rule:
    package: str
    forbidden: tuple[str, ...]
    reason: str
    allowed: tuple[tuple[str, str, str], ...] = ()  # file, module, why


RULES = [
    Rule(
        package="net",
        forbidden=("compute", "client"),
        reason="dependencies run one way: the networking floor serves the others and knows neither",
    ),
    Rule(
        package="net",
        forbidden=("torch", "transformers", "bitsandbytes", "safetensors"),
        reason="a relay runs on a machine without torch, and starts at once",
    ),
    Rule(package="compute", forbidden=("client",), reason="a server must not depend on those that call it"),
    Rule(
        package="compute",
        forbidden=("libp2p",),
        reason="net alone wraps the library: its defects are mended in one place",
    ),
    Rule(
        package="client",
        forbidden=("libp2p",),
        reason="net alone wraps the library: its defects are mended in one place",
    ),
    Rule(
        package="client",
        forbidden=("compute.node", "compute.engine", "compute.cli"),
        reason="a client may run blocks itself, but never carries the server",
        allowed=(("client/cli.py", "compute.cli", "one command, raceme, registers the commands of every floor"),),
    ),
]


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, at any depth; ``from a import b`` names ``a`` and ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def breaches(rule: Rule) -> list[str]:
    found = []
    for path in sorted((ROOT / rule.package).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for module in sorted(imports(path)):
            for forbidden in rule.forbidden:
                is_forbidden = module == forbidden or module.startswith(forbidden + ".")
                if is_forbidden and not any(name == file and forbidden == what for file, what, _ in rule.allowed):
                    found.append(f"{name} imports {module}: {rule.reason}")
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.package}-not-{rule.forbidden[0]}")
def test_floors_keep_to_their_rules(rule: Rule) -> None:
    assert list((ROOT / rule.package).rglob("*.py")), f"nothing to check under {rule.package}"
    assert not breaches(rule)


def test_the_reader_sees_imports_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "net" / "deep").mkdir(parents=True)
    source = "import torch.nn\ndef f():\n    from client import x\n    from . import y\n    from ..z import w\n"
    (tmp_path / "net" / "deep" / "m.py").write_text(source)
    expected = {"torch.nn", "client", "client.x", "net.deep", "net.deep.y", "net.z", "net.z.w"}
    assert imports(tmp_path / "net" / "deep" / "m.py") == expected
    assert len(breaches(RULES[0])) == 2  # client and client.x
    assert len(breaches(RULES[1])) == 1


@pytest.mark.parametrize(
    ("module", "unwanted", "reason"),
    [
        (
            "client",
            ["torch", "transformers", "bitsandbytes"],
            "connecting needs no model: these are loaded when one is asked for",
        ),
        (
            "client.drafting.model",
            ["torch", "transformers", "bitsandbytes"],
            "speculation's cores are bookkeeping; only who drafts with a model loads one",
        ),
        ("net.host", ["torch", "transformers", "bitsandbytes", "compute", "client"], "a relay has none of them"),
    ],
)
def test_importing_stays_light(module: str, unwanted: list[str], reason: str) -> None:
    script = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set(json.loads(done.stdout))
    assert module in loaded
    assert not loaded & set(unwanted), reason
