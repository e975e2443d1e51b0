"""``raceme tune`` from its options to its folder, with transformers' own model in the place of a swarm."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import client
from client.cli import main
from client.errors import InvalidInput, MissingBlocks
from client.tuning.methods import ClassificationHead, DeepPromptTuning, LoRA, PromptTuning, RegressionHead
from client.tuning.training.folder import own_folder
from tests.tuned_locally import LocalTuned, tiny_tokenizer

DIGEST, PARENT = "ab" * 32, "cd" * 32
PEER = "12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X"
DATA = Path(__file__).parents[1] / "data"


class LocalSwarm:
    """Gives models that are whole on this machine; ``before`` is called with the number of each call of one."""

    def __init__(self) -> None:
        self.calls = 0
        self.asked: list[dict[str, Any]] = []
        self.before: Callable[[int], None] = lambda _: None

    def model(self, name: str, *, tuning: Any = (), module: str | None = None, **choices: Any) -> Any:
        self.asked.append({"name": name, "tuning": tuning, "module": module, **choices})
        methods = [LoRA(rank=2)] if module is not None else list(tuning)
        how: dict[str, Any] = {}
        for method in methods:
            if isinstance(method, LoRA):
                how |= {"rank": method.rank, "alpha": method.alpha, "targets": method.targets}
            elif isinstance(method, PromptTuning | DeepPromptTuning):
                how |= {"prompt": method.tokens, "is_deep": isinstance(method, DeepPromptTuning)}
            elif isinstance(method, ClassificationHead):
                how["outputs"] = len(method.labels)
            elif isinstance(method, RegressionHead):
                how["outputs"] = 1
        made = LocalTuned(**how)
        made.tuned.methods = methods  # type: ignore[assignment]
        made.served = SimpleNamespace(name=name, digest=DIGEST)  # type: ignore[attr-defined]
        made.parent = PARENT if module == "mine@cdcdcdcd" else None  # type: ignore[attr-defined]
        made.tokenizer = tiny_tokenizer()  # type: ignore[attr-defined]
        return _Counting(made, self)


class _Counting:
    def __init__(self, made: LocalTuned, swarm: LocalSwarm) -> None:
        self._made = made
        self._swarm = swarm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)

    def __call__(self, **given: Any) -> Any:
        self._swarm.calls += 1
        self._swarm.before(self._swarm.calls)
        return self._made(**given)


@pytest.fixture
def swarm(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalSwarm]:
    made = LocalSwarm()

    @contextmanager
    def connect(*_: Any, **__: Any) -> Iterator[LocalSwarm]:
        yield made

    monkeypatch.setattr(client, "connect", connect)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for one another, most of the time
    yield made
    torch.set_num_threads(threads)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Some short texts."""
    path = tmp_path / "texts.jsonl"
    lines = (DATA / "python-reference.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    path.write_text("".join(json.dumps({"text": json.loads(line)["text"][:300]}) + "\n" for line in lines))
    return path


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    path = tmp_path / "sentences.jsonl"
    path.write_text("\n".join((DATA / "sentences.jsonl").read_text(encoding="utf-8").splitlines()[:60]))
    return path


def tune(*arguments: str | Path, status: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["tune", "--bootstrap", "x", "--model", "bloom-tiny", *map(str, arguments)])
    assert ended.value.code == status


QUICK = ("--max-length", "24", "--batch-size", "4")


@pytest.mark.parametrize(
    ("options", "method", "names"),
    [
        (["--method", "lora", "--rank", "2", "--targets", "dense,query_key_value"], "lora", 32),
        (["--method", "prompt", "--prompt-tokens", "3"], "prompt", 1),
        (["--method", "deep-prompt", "--prompt-tokens", "3", "--learning-rate", "0.01"], "deep-prompt", 2),
    ],
)
def test_a_language_is_learnt(
    options: list[str],
    method: str,
    names: int,
    swarm: LocalSwarm,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "deep" / "out"
    tune("--data", texts, "--out", out, *options, *QUICK, "--steps", "12", "--json", "--block", PEER)
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == method
    assert (told["steps"], told["went_on_after"]) == (12, 0)
    assert told["held_out_loss"] < told["frozen_held_out_loss"]
    assert "accuracy" not in told
    assert [asked["tuning"] == () for asked in swarm.asked] == [False, True]
    assert all(asked["block"] == [PEER] for asked in swarm.asked)
    assert len(load_file(out / "adapter_model.safetensors")) == names
    described = json.loads((out / "raceme.json").read_text())
    assert (described["version"], described["model"], described["model_digest"]) == (1, "bloom-tiny", DIGEST)
    assert (described["method"], described["parent"]) == (method, None)
    assert described["metrics"]["held_out_loss"] == told["held_out_loss"]
    assert sorted(path.name for path in out.iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors", "checkpoint.safetensors", "log.jsonl", "raceme.json"),
    ]


def test_classes_are_learnt(
    swarm: LocalSwarm, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tune("--data", sentences, "--out", out, "--method", "head", *QUICK, "--epochs", "4", "--seed", "3")
    assert swarm.asked[0]["tuning"] == [ClassificationHead(("chronicles", "psalms", "python"))]
    assert len(swarm.asked) == 1, "no model is foretold words with"
    output, errors = capsys.readouterr()
    assert "% right" in output and f"raceme publish {out} --name NAME --bootstrap ADDR" in output
    assert "raceme generate" not in output, "a head gives no tokens"
    assert "are too long" in errors
    metrics = json.loads((out / "raceme.json").read_text())["metrics"]
    assert metrics["accuracy"] > 0.6
    assert metrics["steps"] == 4 * 14  # 54 sentences, four at a time


def test_amounts_are_learnt_beside_lora(swarm: LocalSwarm, tmp_path: Path) -> None:
    path, out = tmp_path / "amounts.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps({"text": "x" * (1 + n % 7), "label": n % 7 / 7}) + "\n" for n in range(40)))
    options = ("--method", "lora", "--method", "head", "--regression", "--steps", "20", "--learning-rate", "0.02")
    tune("--data", path, "--held-out", path, "--out", out, *options)
    assert swarm.asked[0]["tuning"] == [LoRA(), RegressionHead()]
    described = json.loads((out / "raceme.json").read_text())
    assert described["method"] == "lora+head"
    curve = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = [line["held_out_loss"] for line in curve if "held_out_loss" in line]
    assert found[-1] < found[0]


def test_what_was_interrupted_goes_on_bit_for_bit(
    swarm: LocalSwarm, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--data", texts, "--method", "lora", *QUICK, "--steps", "8", "--learning-rate", "0.003")
    tune(*options, "--out", tmp_path / "whole")

    def interrupt(number: int) -> None:
        if number == swarm_calls + 12:
            raise KeyboardInterrupt

    swarm_calls = swarm.calls
    swarm.before = interrupt
    torch.rand(7)
    tune(*options, "--out", tmp_path / "broken", status=130)
    assert "the same command again goes on" in capsys.readouterr().err
    assert not (tmp_path / "broken" / "raceme.json").exists()
    swarm.before = lambda _: None
    tune(*options, "--out", tmp_path / "broken", "--save-every", "1")
    assert "going on after step" in capsys.readouterr().err
    for name in ("adapter_model.safetensors", "checkpoint.safetensors", "log.jsonl", "raceme.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes(), name
    before = swarm.calls
    tune(*options, "--out", tmp_path / "broken", "--json")
    assert swarm.calls == before, "there is nothing left to do"
    tune(*options, "--out", tmp_path / "broken", "--seed", "1", status=1)
    errors = capsys.readouterr().err
    assert "--seed: was 0, now 1)" in errors and "another --out" in errors


def test_a_module_is_trained_further(swarm: LocalSwarm, texts: Path, tmp_path: Path) -> None:
    """Its lineage is kept, also through a folder that was not published."""
    first, second = tmp_path / "first", tmp_path / "second"
    tune("--data", texts, "--out", first, "--module", "mine@cdcdcdcd", *QUICK, "--steps", "2")
    assert swarm.asked[0]["module"] == "mine@cdcdcdcd"
    tune("--data", texts, "--out", second, "--module", first, *QUICK, "--steps", "2")
    for out in (first, second):
        described = json.loads((out / "raceme.json").read_text())
        assert (described["method"], described["parent"]) == ("lora", PARENT)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "--method (lora, prompt, deep-prompt, head) or --module"),
        (["--method", "lora", "--module", "a"], "--method begins anew, and --module"),
        (["--method", "prompt", "--rank", "3"], "--rank does nothing without --method lora"),
        (["--method", "lora", "--prompt-tokens", "3"], "--prompt-tokens does nothing without --method prompt"),
        (["--method", "lora", "--regression"], "--regression does nothing"),
        (["--method", "lora", "--held-out", "x", "--held-out-share", "0.2"], "give one of them"),
        (["--method", "lora", "--targets", "nothing"], "targets"),
        (["--method", "head"], 'line 1: it has no "label"'),
        (["--method", "lora", "--held-out", "/nowhere"], "/nowhere: No such file"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(
    options: list[str],
    told: str,
    swarm: LocalSwarm,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tune("--data", texts, "--out", tmp_path / "out", *options, status=1)
    assert told in capsys.readouterr().err
    assert not swarm.asked
    assert not (tmp_path / "out").exists()


def test_a_folder_is_for_one_training(tmp_path: Path) -> None:
    with own_folder(tmp_path / "out"), pytest.raises(InvalidInput, match="another process"):
        own_folder(tmp_path / "out").__enter__()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(InvalidInput, match=r"other files, such as letter\.txt"), own_folder(tmp_path / "other"):
        pass


def test_a_file_is_no_folder(swarm: LocalSwarm, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (texts, texts / "deep" / "er"):
        tune("--data", texts, "--out", out, "--method", "lora", status=1)
        told = f"{texts} is a file, but a training needs a folder: give a new one as --out"
        assert capsys.readouterr().err == f"raceme: error: {told}\n"
    assert not swarm.asked


def test_a_training_that_never_began_leaves_nothing(
    swarm: LocalSwarm, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: int) -> None:
        raise MissingBlocks("nobody serves blocks 0:8", [(0, 8)])

    (tmp_path / "mine").mkdir()
    swarm.before = fail  # the frozen model cannot be evaluated
    for out in ("deep/er", "mine/new", "mine"):
        tune("--data", texts, "--out", tmp_path / out, "--method", "lora", *QUICK, status=1)
        assert "blocks 0:8" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "texts.jsonl"]
    assert not list((tmp_path / "mine").iterdir())


def test_what_differs_is_named_by_its_options(
    swarm: LocalSwarm, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--data", texts, "--out", tmp_path / "out", "--steps", "1", *QUICK)
    tune(*common, "--method", "lora", "--rank", "2")
    capsys.readouterr()
    tune(*common, "--method", "lora", "--rank", "3", "--targets", "dense,query_key_value", status=1)
    assert (
        "(--rank: was 2, now 3; --alpha: was 4.0, now 6.0; --targets: was query_key_value, now query_key_value, dense)"
        in capsys.readouterr().err
    )
    tune(*common, "--method", "prompt", "--learning-rate", "0.5", status=1)
    assert "--method: was lora, now prompt; --prompt-tokens: was not given, now 16;" in capsys.readouterr().err
