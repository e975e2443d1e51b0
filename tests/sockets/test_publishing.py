"""``raceme publish``, ``raceme modules`` and ``--pin``, as people use them: processes and files."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import client.cli
from client.modules.description import Description
from compute.models import find_checkpoint
from tests.modules import make_module
from tests.sockets.commands import LOOPBACK, run, started

HOME_ARGUMENTS = ("--listen", LOOPBACK, "--no-mdns", "--no-port-mapping")


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with started(tmp_path_factory.mktemp("relay"), "relay", *HOME_ARGUMENTS) as command:
        yield command.line()


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    """How a command ends that runs in this process: status, output, errors."""
    with pytest.raises(SystemExit) as ending:
        client.cli.main(arguments)
    told = capsys.readouterr()
    return ending.value.code, told.out, told.err


def test_a_module_outlives_its_publisher(relay: str, tmp_path: Path) -> None:
    digest = find_checkpoint("bloom-tiny").digest
    folder = make_module(tmp_path / "mine")
    Description(model="bloom-tiny", model_digest=digest, method="lora", metrics={"loss": 2.25}).write(folder)
    publish = (
        "publish",
        str(folder),
        "--name",
        "my-adapter",
        "--licence",
        "MIT",
        "--bootstrap",
        relay,
        *HOME_ARGUMENTS,
    )
    with started(tmp_path / "publisher", *publish) as publisher:
        reference = publisher.line()
        assert re.fullmatch(r"my-adapter@[0-9a-f]{64}", reference)
        listed = run(tmp_path / "user", "modules", "--bootstrap", relay, "--model", digest, "--json")
        assert (listed.status, listed.errors) == (0, "")
        (module,) = listed.json["modules"]
        assert (module["module"], module["licence"], module["metrics"]) == (reference, "MIT", {"loss": 2.25})
        assert (module["model_digest"], module["method"], module["parent"]) == (digest, "lora", None)
        assert len(module["holders"]) == 1

        pin = (
            "serve",
            "bloom-tiny",
            "--blocks",
            "0:1",
            "--threads",
            "1",
            "--bootstrap",
            relay,
            "--pin",
            reference[:20],
        )
        with started(tmp_path / "volunteer", *pin, *HOME_ARGUMENTS) as volunteer:
            volunteer.line()
            for _ in range(20):  # it is fetched while the node goes on
                listed = run(tmp_path / "user", "modules", "--bootstrap", relay, "--model", "bloom-tiny", "--json")
                if len(listed.json["modules"][0]["holders"]) == 2:
                    break
            outcome = publisher.end(signal.SIGINT)
            assert (outcome.status, outcome.output, outcome.errors) == (0, "", "")

            table = run(tmp_path / "user", "modules", "--bootstrap", relay, "--model", digest)
            assert (table.status, table.errors) == (0, "")
            row = rf"^ *{reference[:23]} +lora +loss 2\.25 +MIT +[\d.]+ kB +1 +{module['author']}"
            assert re.search(row, table.output, re.MULTILINE), table.output
            out = tmp_path / "out"
            get = ("modules", "--bootstrap", relay, "--get", reference, "--out", str(out))
            outcome = run(tmp_path / "user", *get)
            assert (outcome.status, outcome.output, outcome.errors) == (0, f"{reference} is in {out}\n", "")
            for name in ("adapter_config.json", "adapter_model.safetensors", "raceme.json"):
                assert (out / name).read_bytes() == (folder / name).read_bytes()
            again = run(tmp_path / "user", *get)
            assert (again.status, again.errors) == (1, f"raceme: error: {out} is there already: name a new folder\n")
            outcome = volunteer.end(signal.SIGTERM)
            assert (outcome.status, outcome.output) == (0, "")
            assert outcome.errors.startswith(f"\nraceme: note: {reference} is held: lora for bloom-tiny, 4 files of ")
    empty = run(tmp_path / "user", "modules", "--bootstrap", relay, "--model", digest)
    assert (empty.status, empty.output[:22]) == (0, "Nobody holds a module ")


def test_publishing_without_a_swarm(tmp_path: Path) -> None:
    folder = make_module(tmp_path / "mine")
    (folder / "optimizer.pt").write_bytes(b"")
    for name in ("checkpoint.safetensors", "log.jsonl"):  # what a training keeps there for itself
        (folder / name).write_bytes(b"")
    first = run(tmp_path, "publish", str(folder), "--name", "my-adapter", "--json")
    assert first.status == 0
    assert "not published, as no module has such files: optimizer.pt\n" in first.errors
    assert "nobody serves it yet: give --bootstrap ADDR" in first.errors
    assert (first.json["model"], first.json["method"], first.json["addresses"]) == ("bloom-tiny", "lora", [])
    assert sorted(os.listdir(first.json["folder"])) == sorted(
        ["README.md", "adapter_config.json", "adapter_model.safetensors", "raceme.json"]
    )
    second = run(tmp_path, "publish", str(folder), "--name", "my-adapter")
    assert (second.status, second.output) == (0, f"{first.json['module']}\n")


def test_what_cannot_be_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_module(tmp_path / "mine")
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (damaged / "adapter_model.safetensors").write_bytes(b"\x80\x04 pickle")
    for arguments, why in (
        ((str(tmp_path), "--name", "x"), "is no module: it has no adapter_config.json"),
        ((str(tmp_path / "nowhere"), "--name", "x"), "no such folder"),
        ((str(damaged), "--name", "x"), "adapter_model.safetensors: damaged"),
        ((str(folder), "--name", "../x"), "--name '../x': give up to 64"),
        ((str(folder), "--name", "x", "--licence", "\n"), "give an SPDX name"),
        ((str(folder), "--name", "x", "--model", "nobody-has-it"), "trained on nobody-has-it, which nobody serves"),
    ):
        status, output, errors = ended(capsys, "publish", *arguments)
        assert (status, output) == (1, "")
        assert errors.startswith("raceme: error: ")
        assert errors.count("\n") == 1
        assert why in errors


def test_pins_and_repositories_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, why in (
        (("serve", "bloom-tiny", "--bootstrap", "x", "--pin", "my-adapter"), "says no hash"),
        (("relay", "--pin", "../x@12345678"), "names no module"),
        (("publish", ".", "--name", "x", "--hub", "me"), "is not OWNER/NAME"),
        (("modules", "--bootstrap", "x"), "one of the arguments --model --get is required"),
    ):
        status, output, errors = ended(capsys, *arguments)
        assert (status, output) == (2, "")
        assert why in errors
    status, _, errors = ended(capsys, "modules", "--bootstrap", "x", "--get", "a@12345678")
    assert (status, errors) == (1, "raceme: error: --get NAME@HASH and --out DIR belong together\n")
