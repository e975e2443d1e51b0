"""The commands, as people and programs use them: processes, signals, streams, exit statuses."""

from __future__ import annotations

import io
import json
import os
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import client.cli
import client.commands
from client.tuning import LoRA, peft_files
from client.tuning.tuned import Tuned
from compute.models import find_checkpoint
from net.identity import Identity
from net.protocol import announcement, session
from tests.checkpoints import make_checkpoint
from tests.one_machine import shake
from tests.sockets.commands import LOOPBACK, Command, run, started

PROMPT = "In the beginning"


def tiny_tokens(prompt: str, new: int) -> list[int]:
    """What transformers makes of the prompt with bloom-tiny."""
    from transformers import AutoTokenizer, BloomForCausalLM

    folder = find_checkpoint("bloom-tiny").file("config.json").parent
    model = BloomForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    tokens: list[int] = rows[0].tolist()
    return tokens


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    """Processes that live as long as this file's tests."""
    with ExitStack() as processes:
        yield processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def relay(stack: ExitStack, folder: Path) -> str:
    """A relay's address."""
    command = stack.enter_context(started(folder / "relay", "relay", "--listen", LOOPBACK))
    return command.line()


@pytest.fixture(scope="module")
def nodes(stack: ExitStack, folder: Path, relay: str) -> list[dict[str, Any]]:
    """bloom-tiny on three nodes that chose their blocks themselves, started at once."""
    common = ("serve", "bloom-tiny", "--max-blocks", "3", "--bootstrap", relay, "--listen", LOOPBACK, "--threads", "1")
    commands = [stack.enter_context(started(folder / f"node-{n}", *common, "--json")) for n in range(3)]
    return [command.json() for command in commands]


@pytest.fixture(scope="module")
def some_bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "some-bloom")


@pytest.fixture(scope="module")
def lonely(stack: ExitStack, folder: Path, relay: str, some_bloom: Path) -> Command:
    """A node with a part of another model, and a short limit."""
    command = stack.enter_context(
        started(
            folder / "lonely",
            *("serve", str(some_bloom), "--blocks", "1:3", "--bootstrap", relay, "--listen", LOOPBACK, "--json"),
        )
    )
    command.json()
    return command


# Relay and identity


def test_relay_prints_its_address_first_and_alone(tmp_path: Path) -> None:
    key = tmp_path / "keys" / "relay.key"
    with started(tmp_path, "relay", "--listen", LOOPBACK, "--identity", str(key)) as command:
        address = command.line()
        match = re.fullmatch(r"/ip4/127\.0\.0\.1/tcp/(\d+)/p2p/(12D3Koo\w+)", address)
        assert match is not None
        with socket.create_connection(("127.0.0.1", int(match[1])), timeout=5):
            pass  # it is really there
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        taken = run(tmp_path, "relay", "--listen", LOOPBACK, "--identity", str(key))
        assert taken.status == 1
        assert re.fullmatch(r"raceme: error: identity \S+ is in use by another process.*--identity\n", taken.errors)
        busy = run(tmp_path, "relay", "--listen", f"/ip4/127.0.0.1/tcp/{match[1]}")
        assert busy.status == 1
        assert re.fullmatch(rf"raceme: error: .*{match[1]}.*in use.*\n", busy.errors)
        outcome = command.end(signal.SIGINT)
        assert (outcome.status, outcome.output, outcome.errors) == (0, "", "")
    with started(tmp_path, "relay", "--listen", LOOPBACK, "--identity", str(key), "--json") as command:
        answer = command.json()
        assert answer["peer_id"] == match[2]
        assert answer["address"] == answer["addresses"][0]
        assert answer["address"].endswith(f"/p2p/{match[2]}")
        outcome = command.end(signal.SIGTERM)
        assert (outcome.status, outcome.output, outcome.errors) == (0, "", "")


@pytest.mark.parametrize("command", ["relay", "serve"])
def test_ending_with_the_program_that_started_it(command: str, relay: str, tmp_path: Path) -> None:
    arguments = ("relay", "--listen", LOOPBACK) if command == "relay" else serve(relay, "bloom-tiny")
    with started(tmp_path, *arguments, "--until-eof") as running:
        running.line()
        outcome = running.end()  # closes its standard input
    assert (outcome.status, outcome.output, outcome.errors) == (0, "", "")


# Serving


def test_nodes_that_start_together_cover_the_model(
    relay: str, nodes: list[dict[str, Any]], lonely: Command, tmp_path: Path
) -> None:
    assert {block for node in nodes for block in range(node["start"], node["end"])} == set(range(8))
    status = run(tmp_path, "status", "--bootstrap", relay, "--json")
    assert (status.status, status.errors) == (0, "")
    models = {model["name"]: model for model in status.json["models"]}
    tiny, other = models["bloom-tiny"], models["some-bloom"]
    assert (tiny["name"], tiny["blocks"], tiny["complete"], tiny["missing"]) == ("bloom-tiny", 8, True, [])
    assert {n["peer_id"] for n in tiny["nodes"]} == {n["peer_id"] for n in nodes}  # some may have moved by now
    assert all(0 < n["round_trip_ms"] < 5000 and n["problem"] == "" for n in tiny["nodes"])
    assert (other["name"], other["complete"], other["missing"]) == ("some-bloom", False, [[0, 1], [3, 5]])


def test_status_for_people(relay: str, nodes: list[dict[str, Any]], lonely: Command, tmp_path: Path) -> None:
    outcome = run(tmp_path, "status", "--bootstrap", relay)
    assert (outcome.status, outcome.errors) == (0, "")
    for node in nodes:  # some may have moved by now
        assert re.search(rf"^ *\d:\d +[.#]{{8}} +{node['peer_id']} ", outcome.output, re.MULTILINE), outcome.output
    assert "Missing: blocks 0:1, 3:5." in outcome.output


def test_status_on_a_terminal_of_80_columns(
    relay: str, nodes: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("net.console.is_terminal", lambda stream: True)
    with pytest.raises(SystemExit):
        client.cli.main(("status", "--bootstrap", f" {relay} "))
    output = capsys.readouterr().out
    # Another test's node may have gone a moment ago: a sentence that names a peer is not the table's.
    table = [line for line in output.splitlines() if not re.match(r"\w{46,}: ", line)]
    assert max(map(len, table)) <= 80
    rows = re.findall(r"^ *(\d):(\d) +([.#]{8}) +(\w+) +unknown +\d+ tokens/s +[\d.]+ ms *$", output, re.MULTILINE)
    for node in nodes:  # some may have moved since they said what they serve
        [(first, end, bar, peer)] = [row for row in rows if node["peer_id"].startswith(row[3])]
        assert bar == "." * int(first) + "#" * (int(end) - int(first)) + "." * (8 - int(end))
        width = len(peer)
        for start in range(0, len(node["peer_id"]), width):  # folded, not cut
            assert node["peer_id"][start : start + width] in output


def test_doctor_in_a_swarm_on_this_machine(relay: str, tmp_path: Path) -> None:
    common = ("doctor", "--no-port-mapping", "--listen", LOOPBACK)
    outcome = run(tmp_path, *common, "--bootstrap", relay, "--json")
    assert outcome.errors == ""
    checks = {check["name"]: check for check in outcome.json["checks"]}
    assert checks["ports"]["state"] == checks["bootstrap"]["state"] == "ok"
    assert checks["from outside"]["text"].startswith("unknown: ")
    assert {checks["models kept"]["state"], checks["modules kept"]["state"]} == {"ok"}
    assert outcome.status == (0 if outcome.json["ok"] else 1)
    nobody = relay.replace(relay[-8:], "22222222")
    outcome = run(tmp_path, *common, "--bootstrap", nobody)
    assert outcome.status == 1
    assert "BAD  bootstrap: " in outcome.output
    assert "     check that the node runs" in outcome.output


def test_a_private_swarm_keeps_others_out(tmp_path: Path) -> None:
    ours, other = tmp_path / "ours.key", tmp_path / "other.key"
    for path, digits in ((ours, "0f"), (other, "f0")):
        path.write_text(f"/key/swarm/psk/1.0.0/\n/base16/\n{digits * 32}\n")
    private = ("relay", "--swarm-key", str(ours), "--listen", LOOPBACK, "--no-port-mapping")
    with started(tmp_path / "home", *private) as command:
        address = command.line()
        outcome = run(tmp_path, "status", "--swarm-key", str(ours), "--bootstrap", address)
        assert (outcome.status, outcome.errors) == (0, "")
        outcome = run(tmp_path, "ping", "--swarm-key", str(other), "--count", "1", address)
        assert outcome.status == 1
        assert "another swarm key" in outcome.errors
        outcome = run(tmp_path, "ping", "--count", "1", address)
        assert outcome.status == 1
    outcome = run(tmp_path, "ping", "--swarm-key", str(tmp_path / "none"), address)
    assert outcome.status == 1
    assert "make one with" in outcome.errors


def test_a_node_that_is_told_to_go_withdraws(relay: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def status() -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            client.cli.main(("status", "--bootstrap", relay, "--json"))
        assert caught.value.code == 0
        return capsys.readouterr().out

    arguments = ("serve", "bloom-tiny", "--blocks", "2:5", "--bootstrap", relay, "--listen", LOOPBACK)
    with started(tmp_path / "home", *arguments) as command:
        line = command.line()
        match = re.fullmatch(
            r"serving blocks 2:5 of 8 of bloom-tiny as (\w+) at (\S+) \(these blocks alone: \d+ tokens/s\); .*", line
        )
        assert match is not None, line
        assert match[2].endswith(f"/p2p/{match[1]}")
        assert match[1] in status()
        outcome = command.end(signal.SIGTERM)
        assert (outcome.status, outcome.output, outcome.errors) == (0, "", "")
    assert match[1] not in status()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there are no such signals")
def test_a_signal_pauses_a_node_and_the_next_one_ends_that(
    relay: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def is_announced() -> bool:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            client.cli.main(("status", "--bootstrap", relay, "--json"))
        assert caught.value.code == 0
        return str(offer["peer_id"]) in capsys.readouterr().out

    with started(tmp_path / "home", *serve(relay, "bloom-tiny", "--blocks", "2:5", "--json")) as command:
        offer = command.json()
        assert offer["cache_tokens"] > 0
        assert is_announced()
        command.send(signal.SIGUSR1)
        assert command.note() == "paused: SIGUSR1 (once more ends that)"
        assert not is_announced()
        command.send(signal.SIGUSR1)
        assert command.note().startswith("goes on")
        assert is_announced()
        outcome = command.end(signal.SIGTERM)
        assert (outcome.status, outcome.output, outcome.errors) == (0, "", "")


# Generating


def test_generate_streams_what_transformers_gives(
    relay: str, nodes: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    expected = tiny_tokens(PROMPT, 24)
    common = ("generate", "--bootstrap", relay, "--model", "bloom-tiny", "--max-new-tokens", "24")
    as_json = run(tmp_path, *common, "--json", "-", stdin=PROMPT + "\n")
    assert (as_json.status, as_json.errors) == (0, "")
    answer = as_json.json
    assert answer["ids"] == expected
    assert answer["new_tokens"] == 24
    assert answer["tokens_per_s"] > 0
    assert {hop["peer_id"] for hop in answer["route"]} <= {node["peer_id"] for node in nodes}
    assert [answer["route"][0]["start"], answer["route"][-1]["end"]] == [0, 8]

    tokenizer = AutoTokenizer.from_pretrained(find_checkpoint("bloom-tiny").file("config.json").parent)
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert answer["text"] == text
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        client.cli.main((*common, PROMPT))
    assert caught.value.code == 0
    assert capsys.readouterr() == (text + "\n", "")


def test_generate_with_a_module(relay: str, nodes: list[dict[str, Any]], tmp_path: Path) -> None:
    config = find_checkpoint("bloom-tiny").config
    words = torch.zeros(config.vocab_size, config.hidden_size)
    torch.manual_seed(0)
    tuned = Tuned(config, [LoRA(rank=2, alpha=200)], words)  # enough to be noticed in a few tokens
    shake(tuned)
    peft_files.write(tuned, tmp_path / "mine", "bloom-tiny")
    common = ("generate", "--bootstrap", relay, "--model", "bloom-tiny", "--max-new-tokens", "4", PROMPT)
    plain, other = run(tmp_path, *common), run(tmp_path, *common, "--module", str(tmp_path / "mine"))
    assert (plain.status, other.status, other.errors) == (0, 0, "")
    assert other.output.startswith(PROMPT) and other.output != plain.output
    missing = run(tmp_path, *common, "--module", "./nowhere")
    assert (missing.status, missing.errors) == (1, "raceme: error: nowhere: no such folder\n")


def test_generate_goes_on_where_a_session_left_off(
    relay: str,
    nodes: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    failing: Raceme,
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(find_checkpoint("bloom-tiny").file("config.json").parent)
    expected = tiny_tokens(PROMPT, 24)
    file = tmp_path / "story"
    common = ("generate", "--bootstrap", relay, "--model", "bloom-tiny", "--max-new-tokens", "12")
    session = ("--session", str(file))
    assert "the prompt is empty" in failing(*common, "", *session)
    assert run(tmp_path, *common, "--json", PROMPT, *session).json["ids"] == expected[:-12]
    saved = file.read_bytes()
    as_json = run(tmp_path, *common, "--json", "", *session)
    assert (as_json.status, as_json.errors) == (0, "")
    assert as_json.json["ids"] == expected
    assert as_json.json["new_tokens"] == 12

    file.write_bytes(saved)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        client.cli.main((*common, "", *session))
    assert caught.value.code == 0
    text, before = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (expected, expected[:-12]))
    assert capsys.readouterr() == (text.removeprefix(before) + "\n", "")

    file.write_text("{}")
    assert "holds no session that can be taken up" in failing(*common, "", *session)
    assert f"cannot read {tmp_path}: Is a directory" in failing(*common, "", "--session", str(tmp_path))
    assert "no folder that can be written to" in failing(*common, "x", "--session", str(tmp_path / "nowhere" / "x"))
    assert file.read_text() == "{}"


def test_demo_for_programs(tmp_path: Path) -> None:
    outcome = run(tmp_path, "demo", "--json", "--max-new-tokens", "16")
    assert outcome.status == 0, outcome.errors
    answer = outcome.json
    assert answer["same_tokens"] is True
    assert answer["ids"] == tiny_tokens(PROMPT, 16)
    assert [(hop["start"], hop["end"]) for hop in answer["route"]] == [(0, 3), (3, 6), (6, 8)]
    assert processes_with(str(tmp_path)) == []


def test_a_terminal_that_knows_ascii_alone(relay: str, nodes: list[dict[str, Any]], tmp_path: Path) -> None:
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    command = ("generate", "--bootstrap", relay, "--model", "bloom-tiny", "--max-new-tokens", "2", "Th\u00e9 \u201cend")
    outcome = run(tmp_path, *command, env=env)
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output.startswith("Th? ?end")


def test_demo_interrupted_leaves_nothing_behind(tmp_path: Path) -> None:
    with started(tmp_path, "demo", env={"TMPDIR": str(tmp_path)}) as command:
        assert command.line().startswith("Starting a relay and 3 compute nodes")
        assert command.line().startswith("  relay")
        assert command.line().startswith("  node")
        children = children_of(command.pid)
        assert len(children) == 4
        outcome = command.end(signal.SIGINT, timeout_s=15)
    assert (outcome.status, outcome.errors) == (130, "Stopping ...\n")
    assert [child for child in children if Path(f"/proc/{child}").exists()] == []
    assert list(tmp_path.glob("raceme-demo-*")) == []


def test_demo_killed_leaves_no_process_behind_and_no_folder_for_long(tmp_path: Path) -> None:
    env = {"TMPDIR": str(tmp_path)}
    with started(tmp_path, "demo", env=env) as command:
        for expected in ("Starting", "  relay", "  node"):
            assert command.line().startswith(expected)
        ends = [os.pidfd_open(child) for child in children_of(command.pid)]
        assert len(ends) == 4
        command.kill()
        for end in ends:
            assert select.select([end], [], [], 15)[0], "a child lives on"
            os.close(end)
    [left] = tmp_path.glob("raceme-demo-*")
    with started(tmp_path, "demo", env=env) as command:
        command.line()
        [ours] = tmp_path.glob("raceme-demo-*")
        assert ours != left
        with started(tmp_path, "demo", env=env) as another:  # which leaves that of the one that runs
            another.line()
            assert ours in tmp_path.glob("raceme-demo-*")
            assert another.end(signal.SIGTERM).status == 128 + signal.SIGTERM
        assert command.end(signal.SIGINT).status == 130
    assert list(tmp_path.glob("raceme-demo-*")) == []


def test_what_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "client", "--version"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=30
        )
    assert (done.returncode, done.stderr) == (1, "raceme: error: No space left on device\n")


def test_ctrl_c_while_modules_are_imported(tmp_path: Path) -> None:
    """torch makes nothing of an exception that comes while it imports numpy, and goes on without."""
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    arguments = ("serve", "bloom-tiny", "--bootstrap", f"{LOOPBACK}/p2p/{Identity.generate().peer_id}")
    outcome = run(tmp_path, *arguments, env={"PYTHONPATH": str(tmp_path)})
    assert (outcome.status, outcome.output, outcome.errors) == (-signal.SIGINT, "", "")


def test_ctrl_c_while_a_model_is_loaded(relay: str, tmp_path: Path) -> None:
    """The thread that loads is left to itself, and must not break the end of the process."""
    script = """
import os, signal
import torch
import client.cli
from compute.checkpoint import Checkpoint
def load(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    while True:
        torch.zeros(1000).sum().item()
Checkpoint.load_span = load
client.cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *serve(relay, "bloom-tiny")],
        env={**os.environ, "RACEME_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_ctrl_c_before_anything_has_begun(tmp_path: Path) -> None:
    script = """
import os, signal, client.cli
client.cli.build_parser = lambda: os.kill(os.getpid(), signal.SIGINT)
client.cli.main(("demo",))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def processes_with(text: str) -> list[int]:
    """Processes that have ``text`` in their environment."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if text.encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
        except OSError:
            continue  # it has just ended, or is not ours
    return found


# Failures: one line, the cause and what to do, soon


Raceme = Callable[..., str]


@pytest.fixture
def failing(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Raceme:
    """Runs a command in this process (importing takes a process seconds); returns its one line of complaint."""
    monkeypatch.setenv("RACEME_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def fail(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            client.cli.main(arguments)
        output, errors = capsys.readouterr()
        assert caught.value.code == 1
        assert output == ""
        [line] = errors.splitlines()
        assert line.startswith("raceme: error: ")
        assert "bug" not in line
        return line.removeprefix("raceme: error: ")

    return fail


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nobody listens on, and that nobody else can get."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def generate(bootstrap: str, model: str, prompt: str = PROMPT) -> tuple[str, ...]:
    return ("generate", "--bootstrap", bootstrap, "--model", model, "--max-new-tokens", "8", prompt)


def serve(bootstrap: str, model: str, *more: str) -> tuple[str, ...]:
    return ("serve", model, "--bootstrap", bootstrap, "--listen", LOOPBACK, *more)


@pytest.mark.parametrize(
    "command", [("status",), ("generate", "--model", "m", "p"), ("serve", "bloom-tiny"), ("relay",)]
)
def test_bootstraps_that_cannot_be_right(
    failing: Raceme, relay: str, closed_port: int, command: tuple[str, ...]
) -> None:
    peer_id = relay.rpartition("/")[2]
    stranger = str(Identity.generate().peer_id)
    listen = ("--listen", LOOPBACK) if command[0] in ("relay", "serve") else ()
    for bootstrap, complaint in {
        "nonsense": "'nonsense' is not a multiaddr (an address looks like /ip4/",
        "127.0.0.1:4001": "'127.0.0.1:4001' is not a multiaddr",
        relay.partition("/p2p/")[0]: "does not say which peer is there: it must end in /p2p/PEERID",
        f"/ip4/127.0.0.1/tcp/{closed_port}/p2p/{peer_id}": f"/ip4/127.0.0.1/tcp/{closed_port}",
        relay.replace(peer_id, stranger): f"the peer that answered is {peer_id}, not {stranger}: check the address",
        f"/ip4/127.0.0.1/udp/1/p2p/{peer_id}": "no address that can be dialled",
        relay.replace(peer_id, "12D3KooNonsense"): "12D3KooNonsense",
    }.items():
        assert complaint in failing(*command, *listen, "--bootstrap", bootstrap)


def test_a_bootstrap_that_never_answers(tmp_path: Path) -> None:
    """As processes, side by side: importing counts as well."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}"
        bootstrap = ("--bootstrap", f"{where}/p2p/{Identity.generate().peer_id}")
        with (
            started(tmp_path, "status", *bootstrap) as status,
            started(tmp_path, "serve", "bloom-tiny", *bootstrap) as serving,
        ):
            outcomes = [status.end(timeout_s=30), serving.end(timeout_s=30)]
    for outcome in outcomes:
        assert (outcome.status, outcome.output) == (1, "")
        assert re.fullmatch(rf"raceme: error: .*{where}.*no answer within .*\n", outcome.errors), outcome.errors


def test_models_that_cannot_be_had(
    failing: Raceme, relay: str, nodes: list[dict[str, Any]], lonely: Command, some_bloom: Path, tmp_path: Path
) -> None:
    assert re.fullmatch(
        "nobody serves no-such; served are: bloom-tiny, .*some-bloom", failing(*generate(relay, "no-such"))
    )
    line = failing(*generate(relay, str(some_bloom)))
    assert line.startswith("nobody serves blocks 0:1, 3:5 of some-bloom; start a node with: raceme serve some-bloom")
    assert "no model 'no-such'; give one of the shipped models (bloom-tiny)" in failing(*serve(relay, "no-such"))
    assert "--blocks 4:9: bloom-tiny has blocks 0:8" in failing(*serve(relay, "bloom-tiny", "--blocks", "4:9"))
    assert "--device 'tpu' names no devices" in failing(*serve(relay, "bloom-tiny", "--device", "tpu"))
    without_gpu = serve(relay, "bloom-tiny", "--device", "cpu", "--pause-when-gpu-busy")
    assert "--pause-when-gpu-busy: the node uses no GPU; leave it out" in failing(*without_gpu)


def test_damaged_checkpoints(failing: Raceme, relay: str, some_bloom: Path, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        return Path(shutil.copytree(some_bloom, tmp_path / name))

    missing = damaged("missing-bloom")
    shard = "model-00003-of-00004.safetensors"
    (missing / shard).unlink()
    assert f"{shard} is missing" in failing(*serve(relay, str(missing)))
    truncated = damaged("truncated-bloom")
    (truncated / shard).write_bytes((truncated / shard).read_bytes()[:-100])
    assert shard in failing(*serve(relay, str(truncated)))
    assert shard in failing(*serve(relay, str(truncated), "--blocks", "2:3"))
    other = damaged("gpt-2")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert "model_type is 'gpt2', not 'bloom'" in failing(*serve(relay, str(other)))
    (other / "config.json").unlink()
    assert "config.json is missing" in failing(*serve(relay, str(other)))


def test_prompts_that_cannot_be_continued(
    failing: Raceme, stack: ExitStack, folder: Path, relay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "the prompt is empty" in failing(*generate(relay, "bloom-tiny", ""))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    assert "the prompt is empty" in failing(*generate(relay, "bloom-tiny", "-"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"In \xff")))
    assert "what standard input gives is not UTF-8 text" in failing(*generate(relay, "bloom-tiny", "-"))
    monkeypatch.setattr("sys.stdin", None)
    assert "standard input is closed" in failing(*generate(relay, "bloom-tiny", "-"))
    assert "--seed does nothing without sampling" in failing(*generate(relay, "bloom-tiny"), "--seed", "1")
    short = make_checkpoint(folder / "short-bloom", layers=1)
    node = stack.enter_context(started(folder / "short", *serve(relay, str(short), "--max-length", "20", "--json")))
    assert node.json()["end"] == 1
    line = failing(*generate(relay, str(short), PROMPT * 10))
    assert re.fullmatch(
        r"prompt and new tokens make \d+ tokens; the nodes on the chain allow 21 \(20 in the session, .*\): shorten .*",
        line,
    )


@pytest.mark.parametrize(
    ("given", "prompt"), [("In", "In"), ("In\n", "In"), ("In\r\n", "In"), ("In\n\n", "In\n"), ("\nIn ", "\nIn ")]
)
def test_a_prompt_on_standard_input_loses_one_newline(given: str, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    assert client.commands._read_prompt() == prompt


def test_identities_that_cannot_be_used(failing: Raceme, relay: str, tmp_path: Path) -> None:
    key = tmp_path / "some.key"
    key.write_text("no key at all, but a text")
    key.chmod(0o600)
    command = ("relay", "--listen", LOOPBACK, "--identity", str(key))
    assert "is not a libp2p Ed25519 private key" in failing(*command)
    key.chmod(0o644)
    assert f"can be read by others; run: chmod 600 {key}" in failing(*command)
    assert "is in use by another process" not in failing(*command)
    key.chmod(0o600)
    key.write_bytes(b"")
    assert f"identity {key} is empty; put the key back, or delete the file" in failing(*command)


def test_listening_where_one_cannot(failing: Raceme, relay: str) -> None:
    port = relay.split("/")[4]
    for command in (("relay",), ("serve", "bloom-tiny", "--bootstrap", relay)):
        assert "in use" in failing(*command, "--listen", f"/ip4/127.0.0.1/tcp/{port}")
        assert "nonsense" in failing(*command, "--listen", "nonsense")
        assert "/udp/" in failing(*command, "--listen", "/ip4/127.0.0.1/udp/4001")
        assert "leave /p2p/... out, as in --listen /ip4/127.0.0.1/tcp/" in failing(*command, "--listen", relay)
        assert "192.0.2.1" in failing(*command, "--listen", "/ip4/192.0.2.1/tcp/0")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("no-such-command",),
        ("generate",),
        ("serve", "bloom-tiny", "--bootstrap", "x", "--blocks", "4"),
        ("serve", "bloom-tiny", "--bootstrap", "x", "--blocks", "4:4"),
        ("serve", "bloom-tiny", "--bootstrap", "x", "--max-blocks", "0"),
        ("serve", "bloom-tiny", "--bootstrap", "x", "--threads", "-1"),
        ("serve", "bloom-tiny", "--bootstrap", "x", "--blocks", "0:4", "--max-blocks", "4"),
        ("generate", "--bootstrap", "x", "--model", "m", "In \udcff"),
        ("demo", "--prompt", "In \udcff"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        client.cli.main(arguments)
    assert caught.value.code == 2
    output, errors = capsys.readouterr()
    assert "usage: raceme" in output + errors


@pytest.mark.parametrize("command", ["demo", "relay", "serve", "generate", "status", "ping"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        client.cli.main((command, "--help"))
    assert caught.value.code == 0
    assert f"usage: raceme {command}" in capsys.readouterr().out


FEW = ["0", "-1", "many", "1.5", "\u00b2", "9" * 5000]  # and what is not a number of anything
NUMBERS: dict[tuple[str, str], list[str]] = {
    ("generate", "--max-new-tokens"): [*FEW, "1048577"],
    ("generate", "--temperature"): ["0", "-1", "nan", "inf", "hot", "1e-300", "1e300"],
    ("generate", "--top-p"): ["0", "1.5", "-0.1", "nan"],
    ("generate", "--top-k"): [*FEW, "1048577"],
    ("generate", "--repetition-penalty"): ["0", "-2", "1e-300", "1e300"],
    ("generate", "--seed"): ["-1", "9223372036854775808", "x"],
    ("generate", "--local-blocks"): ["-1", "513", "x"],
    ("serve", "--cache-tokens"): [*FEW, "1073741825"],
    ("serve", "--max-length"): [*FEW, str(session.MAX_LENGTH + 1)],
    ("serve", "--max-blocks"): [*FEW, str(announcement.MAX_BLOCKS + 1)],
    ("serve", "--threads"): [*FEW, "257"],
    ("ping", "--count"): FEW,
}


@pytest.mark.parametrize(("command", "option"), NUMBERS)
def test_numbers_that_make_no_sense(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {
        "generate": generate("anywhere", "bloom-tiny"),
        "serve": serve("anywhere", "bloom-tiny"),
        "ping": ("ping", "anywhere"),
    }
    for value in NUMBERS[command, option]:
        with pytest.raises(SystemExit) as caught:
            client.cli.main((*whole[command], f"{option}={value}"))
        assert caught.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"raceme {command}: error: argument {option}: {value!r:.60} is not a ")
        assert len(last) < 200


def test_the_largest_numbers_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ("--max-length", str(session.MAX_LENGTH), "--max-blocks", str(announcement.MAX_BLOCKS))
    with pytest.raises(SystemExit) as caught:
        client.cli.main((*serve("anywhere", "bloom-tiny"), *numbers, "--threads", "0256"))
    assert caught.value.code == 1
    assert "'anywhere' is not a multiaddr" in capsys.readouterr().err


def test_a_folder_whose_name_nobody_would_believe(
    failing: Raceme, relay: str, some_bloom: Path, tmp_path: Path
) -> None:
    for name in ("my model", "Bl\u00fcte", "\udcff", "_x"):
        folder = Path(shutil.copytree(some_bloom, tmp_path / name))
        assert "cannot be a model's name in a swarm: rename the folder" in failing(*serve(relay, str(folder)))


def test_drafted_text_is_the_same(relay: str, nodes: list[dict[str, Any]], tmp_path: Path) -> None:
    outcome = run(tmp_path, *generate(relay, "bloom-tiny"), "--max-new-tokens", "24", "--draft", "auto", "--json")
    assert outcome.status == 0
    assert outcome.json["ids"] == tiny_tokens(PROMPT, 24)


@pytest.mark.parametrize(
    ("wire", "taken"),
    [
        ("auto", "float32, 512 bytes a token"),
        ("bf16", r"bfloat16, 256 bytes a token, error 0\.\d+ %"),
        ("int8", r"int8, 132 bytes a token, error 0\.\d+ %"),
    ],
)
def test_verbose_says_what_hidden_states_take(
    relay: str, nodes: list[dict[str, Any]], tmp_path: Path, wire: str, taken: str
) -> None:
    outcome = run(tmp_path, *generate(relay, "bloom-tiny"), "--wire", wire, "--verbose", "--json")
    assert outcome.status == 0
    assert wire != "auto" or outcome.json["ids"] == tiny_tokens(PROMPT, 8)
    for hop in outcome.json["route"]:
        line = rf"blocks {hop['start']}:{hop['end']} at {hop['peer_id']}: in: {taken}, out: {taken}"
        assert re.search(line, outcome.errors), outcome.errors[-2000:]


def test_nodes_that_are_named_and_blocks_that_are_computed_here(
    relay: str, nodes: list[dict[str, Any]], tmp_path: Path, failing: Raceme
) -> None:
    command = (*generate(relay, "bloom-tiny"), "--max-new-tokens", "24")
    peers = [node["peer_id"] for node in nodes]
    allowed = [option for peer in peers for option in ("--allow", peer)]
    pinned = f"{nodes[0]['start']}:{nodes[0]['start'] + 1}={peers[0]}"
    outcome = run(tmp_path, *command, "--json", *allowed, "--pin", pinned, "--local-blocks", "1")
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.json["ids"] == tiny_tokens(PROMPT, 24)
    assert [outcome.json["route"][0]["start"], outcome.json["route"][-1]["end"]] == [1, 7]
    blocked = [option for peer in peers for option in ("--block", peer)]
    assert "are served by peers alone that are not to be used" in failing(*command, *blocked)
    assert "local_blocks is 4: give 0 to 3" in failing(*command, "--local-blocks", "4")
    assert "twice" in failing(*command, "--pin", f"0:1={peers[0]}", "--pin", f"0:1={peers[0]}")


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--allow", "me", "'me' is no PeerId: give what raceme status shows"),
        ("--block", "\udcff", "is no PeerId"),
        ("--pin", "0-4=me", "is not START:END=PEER, such as 0:4=12D3Koo..."),
        ("--pin", "0:4=me", "'me' is no PeerId"),
    ],
)
def test_peers_that_are_none(option: str, value: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        client.cli.main((*generate("anywhere", "bloom-tiny"), option, value))
    assert caught.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_sampling_can_be_repeated(relay: str, nodes: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    def sampled(*options: str) -> list[int]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            client.cli.main((*generate(relay, "bloom-tiny"), "--json", *options))
        assert caught.value.code == 0
        ids: list[int] = json.loads(capsys.readouterr().out)["ids"]
        return ids

    warm = ("--temperature", "1.5", "--top-k", "50", "--top-p", "0.99", "--repetition-penalty", "1.1")
    assert sampled(*warm, "--seed", "1") == sampled(*warm, "--seed", "1")
    assert sampled(*warm, "--seed", "1") != sampled(*warm, "--seed", "2")


def test_verbose_shows_the_traceback(tmp_path: Path) -> None:
    outcome = run(tmp_path, "status", "--bootstrap", "nonsense", "--verbose")
    assert outcome.status == 1
    assert "Traceback (most recent call last)" in outcome.errors
    assert outcome.errors.splitlines()[-1].startswith("raceme: error: 'nonsense' is not a multiaddr")
    quiet = run(tmp_path, "status", "--bootstrap", "nonsense")
    assert (quiet.status, len(quiet.errors.splitlines())) == (1, 1)
    nothing = run(tmp_path)
    assert nothing.status == 2
    assert "usage: raceme" in nothing.output


def test_a_node_killed_while_idle(
    failing: Raceme, relay: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_checkpoint(folder / "killed-bloom", layers=2, seed=5)
    arguments = generate(relay, str(model))
    with (
        started(folder / "first", *serve(relay, str(model), "--blocks", "0:1", "--json")) as first,
        started(folder / "second", *serve(relay, str(model), "--blocks", "1:2", "--json")) as second,
    ):
        assert [first.json()["start"], second.json()["start"]] == [0, 1]
        second.kill()
        line = failing(*arguments)
        assert "blocks 1:2 of killed-bloom are announced, but the nodes that serve them fail" in line
        assert "raceme serve killed-bloom --blocks 1:2" in line
        with started(folder / "third", *serve(relay, str(model), "--blocks", "1:2", "--json")) as third:
            third.json()
            capsys.readouterr()
            with pytest.raises(SystemExit) as caught:
                client.cli.main((*arguments, "--json"))
            assert caught.value.code == 0
            output, errors = capsys.readouterr()
            assert json.loads(output)["new_tokens"] == 8
            assert errors == ""
