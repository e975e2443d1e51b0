"""The loop and its checkpoints: whatever happens in between, a training gives the same bits."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from client.errors import InvalidInput, SessionFailed
from client.tuning.training.checkpoints import Checkpoint
from client.tuning.training.data import Example
from client.tuning.training.interrupts import held, terminable
from client.tuning.training.loop import (
    Evaluation,
    Pace,
    Training,
    TrainingFailed,
    TrainingInterrupted,
    TrainingSettings,
    Watcher,
)

VOCABULARY = 20
EXAMPLES = [Example(ids=tuple((3 * index + k * k) % VOCABULARY for k in range(6))) for index in range(22)]
HELD_OUT = [Example(ids=tuple((5 * index + k) % VOCABULARY for k in range(3 + index))) for index in range(5)]
SETTINGS = TrainingSettings(
    steps=12, batch_size=4, learning_rate=0.05, warmup_steps=3, evaluate_every_steps=5, save_every_steps=4
)


class Bigrams:
    """The smallest model that needs random numbers; ``before`` is called with the number of each call."""

    def __init__(self, before: Callable[[int], None] = lambda _: None, *, is_frozen: bool = False) -> None:
        torch.manual_seed(1)
        self.tuned = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Dropout(0.2), nn.Linear(8, VOCABULARY))
        self.calls = 0
        self.seen: list[bool] = []
        self._before = before

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        self.calls += 1
        self.seen.append(self.tuned.training)
        self._before(self.calls)
        logits = self.tuned(input_ids)  # [b, t, v]
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)

    def save_pretrained(self, folder: str) -> None:
        raise NotImplementedError


def training(
    folder: Path, model: Bigrams, settings: TrainingSettings = SETTINGS, watcher: Watcher | None = None, **marks: Any
) -> Training:
    made = Training(
        model, EXAMPLES, HELD_OUT, settings, folder, marks={"model": "bigrams", **marks}, pad=0, watcher=watcher
    )
    made.take_up()
    return made


def bits(model: Bigrams) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.tuned.state_dict().items()}


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The parameters and the curve of a training that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    model = Bigrams()
    training(folder, model).run()
    return bits(model), curve(folder)


def test_the_loss_falls_and_everything_is_told(tmp_path: Path) -> None:
    told: list[tuple[Any, ...]] = []

    class Listening(Watcher):
        def began(self, step: int, steps: int) -> None:
            told.append(("began", step, steps))

        def stepped(self, step: int, loss: float, pace: Pace) -> None:
            assert pace.tokens_per_s > 0
            assert pace.left_s is not None
            told.append(("stepped", step))

        def evaluated(self, step: int, evaluation: Evaluation) -> None:
            told.append(("evaluated", step))

        def saved(self, step: int) -> None:
            told.append(("saved", step))

    outcome = training(tmp_path, Bigrams(), watcher=Listening()).run()
    assert outcome.first is not None and outcome.last is not None
    assert outcome.last.loss < outcome.first.loss - 0.1
    assert outcome.last.accuracy is None
    assert (outcome.steps, outcome.began_at) == (12, 0)
    assert outcome.tokens == 6 * (22 + 22)  # two epochs of six steps
    assert told[0] == ("began", 0, 12)
    assert [step for kind, step, *_ in told if kind == "stepped"] == list(range(1, 13))
    assert [step for kind, step, *_ in told if kind == "evaluated"] == [0, 5, 10, 12]
    assert [step for kind, step, *_ in told if kind == "saved"] == [4, 8, 12]
    lines = curve(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert lines[-1]["held_out_loss"] == outcome.last.loss


def test_the_learning_rate_rises_and_falls() -> None:
    settings = TrainingSettings(steps=10, learning_rate=1.0, warmup_steps=4)
    rates = [settings.learning_rate_at(step) for step in range(10)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert TrainingSettings(steps=3, learning_rate=1.0).learning_rate_at(0) == 1.0
    assert TrainingSettings(steps=3, learning_rate=1.0, warmup_steps=9).learning_rate_at(2) == pytest.approx(0.3)


def test_dropout_is_on_while_training_alone(tmp_path: Path) -> None:
    model = Bigrams()
    training(tmp_path, model).run()
    expected = ["loss" in line for line in curve(tmp_path) for _ in range(1 if "loss" in line else 2)]
    assert model.seen == expected  # five held-out examples are two batches


@pytest.mark.parametrize("every", [1, 3, 100])
def test_evaluating_and_saving_change_nothing(
    every: int, tmp_path: Path, whole: tuple[dict[str, bytes], list[dict[str, Any]]]
) -> None:
    model = Bigrams()
    settings = TrainingSettings(**{**SETTINGS.marks, "evaluate_every_steps": every, "save_every_steps": every})
    training(tmp_path, model, settings).run()
    assert bits(model) == whole[0]
    assert [line for line in curve(tmp_path) if "loss" in line] == [line for line in whole[1] if "loss" in line]


@pytest.mark.parametrize("call", range(1, 21))
@pytest.mark.parametrize("how", ["interrupted", "failed", "killed"])
def test_a_training_that_is_broken_off_anywhere_goes_on_bit_for_bit(
    how: str, call: int, tmp_path: Path, whole: tuple[dict[str, bytes], list[dict[str, Any]]]
) -> None:
    class Killed(BaseException):
        """Nothing is saved of what this ends."""

    error, raised = {
        "interrupted": (KeyboardInterrupt(), TrainingInterrupted),
        "failed": (SessionFailed("no chain"), SessionFailed),
        "killed": (Killed(), Killed),
    }[how]

    def fail(number: int) -> None:
        if number == call:
            torch.rand(3)  # of a step that is not done
            raise error

    first = training(tmp_path, Bigrams(fail))
    with pytest.raises(raised):
        first.run()
    torch.rand(5)  # another process has other random numbers
    model = Bigrams()
    second = training(tmp_path, model)
    assert second.step == (first._saved or 0)
    if how != "killed":
        assert second.step == first.step
    assert second.run().began_at == (first._saved or 0)
    assert bits(model) == whole[0]
    assert curve(tmp_path) == whole[1]


def test_a_signal_in_the_middle_of_an_update_waits(
    tmp_path: Path, whole: tuple[dict[str, bytes], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Bigrams()
    first = training(tmp_path, model)
    step = torch.optim.AdamW.step
    count = 0

    def interrupted(self: torch.optim.AdamW, closure: None = None) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with terminable(), pytest.raises(TrainingInterrupted, match="after step 3"):
        first.run()
    again = Bigrams()
    training(tmp_path, again).run()
    assert bits(again) == whole[0]
    assert curve(tmp_path) == whole[1]


@pytest.mark.parametrize("when", ["before it is saved", "while it is saved"])
def test_a_second_signal_leaves_what_is_saved_whole(
    when: str,
    tmp_path: Path,
    whole: tuple[dict[str, bytes], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = Training._save_what_is_done
    sent = [signal.SIGINT]

    def send_once() -> None:
        if sent:
            os.kill(os.getpid(), sent.pop())

    def saving(self: Training) -> None:
        send_once()
        save(self)

    @contextmanager
    def late() -> Iterator[None]:
        if made.is_interrupted:
            send_once()  # before they are held
        with held():
            yield

    class Interrupted(Training):
        is_interrupted = False

        def _train_step(self) -> None:
            if self.step == 6:
                self.is_interrupted = True
                raise KeyboardInterrupt
            super()._train_step()

    made = Interrupted(Bigrams(), EXAMPLES, HELD_OUT, SETTINGS, tmp_path, marks={"model": "bigrams"}, pad=0)
    made.take_up()
    with monkeypatch.context() as patched:
        if when == "while it is saved":
            patched.setattr(Training, "_save_what_is_done", saving)
        else:
            patched.setattr("client.tuning.training.loop.held", late)
        with pytest.raises(TrainingInterrupted, match="after step 6, which is saved"):
            made.run()
    assert not sent
    model = Bigrams()
    again = training(tmp_path, model)
    assert again.step == 6
    again.run()
    assert bits(model) == whole[0]


def test_a_finished_training_has_nothing_left_to_do(
    tmp_path: Path, whole: tuple[dict[str, bytes], list[dict[str, Any]]]
) -> None:
    outcome = training(tmp_path, Bigrams()).run()
    model = Bigrams()
    again = training(tmp_path, model).run()
    assert model.calls == 0
    assert bits(model) == whole[0]
    assert (again.first, again.last, again.tokens, again.loss) == (
        *(outcome.first, outcome.last, outcome.tokens, outcome.loss),
    )
    assert again.tokens_per_s == 0


@pytest.mark.parametrize(
    ("settings", "marks", "told"),
    [
        ({"learning_rate": 0.01}, {}, r"\(--learning-rate: was 0.05, now 0.01\): give the same"),
        ({"seed": 5}, {}, r"--seed: was 0, now 5"),
        ({"steps": 13}, {}, r"--steps, or by --epochs: was 12, now 13"),
        ({}, {"model": "another"}, r"--model: was bigrams, now another"),
        ({"warmup_steps": 1}, {"rank": 3}, r"--rank: was not given, now 3; --warmup: was 3, now 1\)"),
        ({}, {"targets": ["dense", "query_key_value"]}, r"--targets: was not given, now dense, query_key_value\)"),
        ({}, {"data": "ab" * 32}, r"--data, by its digest: was not given, now abababababab\)"),
        ({}, {"labels": ["x" * 150] * 3}, r"the labels in --data: was not given, now x{150}, x{48}\.\.\.\)"),
    ],
)
def test_other_options_are_refused(settings: dict[str, Any], marks: dict[str, Any], told: str, tmp_path: Path) -> None:
    training(tmp_path, Bigrams()).run()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InvalidInput, match=told):
        Training(
            Bigrams(),
            EXAMPLES,
            HELD_OUT,
            TrainingSettings(**{**SETTINGS.marks, **settings}),
            tmp_path,
            marks={"model": "bigrams", **marks},
            pad=0,
        ).take_up()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_how_often_to_save_may_change(tmp_path: Path) -> None:
    def interrupt(number: int) -> None:
        if number == 9:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted):
        training(tmp_path, Bigrams(interrupt)).run()
    settings = TrainingSettings(**{**SETTINGS.marks, "evaluate_every_steps": 1, "save_every_steps": 1})
    assert training(tmp_path, Bigrams(), settings).step == 5


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    training(tmp_path, Bigrams()).run()
    model = Bigrams()
    model.tuned[2] = nn.Linear(8, VOCABULARY, bias=False)
    with pytest.raises(InvalidInput, match="other parameters"):
        training(tmp_path, model)


def test_a_loss_that_is_no_number_stops_before_it_does_harm(tmp_path: Path) -> None:
    model = Bigrams()
    made = training(tmp_path, model)

    def spoil(number: int) -> None:
        if number == 9:
            with torch.no_grad():
                model.tuned.get_parameter("2.weight")[0, 0] = float("nan")

    model._before = spoil
    with pytest.raises(TrainingFailed, match=r"step 6 is nan .* lower --learning-rate .* step 4, the last one saved"):
        made.run()
    assert Checkpoint.read(tmp_path / "checkpoint.safetensors").step == 4


@pytest.mark.parametrize("what", ["fsync", "write"])
def test_a_full_disk_leaves_the_last_checkpoint_intact(
    what: str,
    tmp_path: Path,
    whole: tuple[dict[str, bytes], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = training(tmp_path, Bigrams())
    real, count = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count > 2:  # of the first checkpoint: its file, its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patched:
        if what == "fsync":
            patched.setattr(os, "fsync", full)
        else:
            patched.setattr("client.tuning.training.curve.Curve.add", _full_after(9))
        with pytest.raises(TrainingFailed, match=r"No space left on device; the training stopped .* make room"):
            made.run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "log.jsonl"]
    assert Checkpoint.read(tmp_path / "checkpoint.safetensors").step == 4
    model = Bigrams()
    training(tmp_path, model).run()
    assert bits(model) == whole[0]
    assert curve(tmp_path) == whole[1]


def _full_after(lines: int) -> Callable[..., None]:
    from client.tuning.training.curve import Curve

    add, count = Curve.add, 0

    def full(self: Curve, **line: Any) -> None:
        nonlocal count
        count += 1
        if count > lines:
            with self._path.open("a") as file:
                file.write('{"step": 8, "lo')  # as much as there was room for
            raise OSError(errno.ENOSPC, "No space left on device", str(self._path))
        add(self, **line)

    return full


def test_what_a_killed_process_began_to_write_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.safetensors.abc.part").write_bytes(b"half")
    (tmp_path / "mine.part").write_bytes(b"kept")
    training(tmp_path, Bigrams())
    assert not (tmp_path / ".checkpoint.safetensors.abc.part").exists()
    assert (tmp_path / "mine.part").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no training"),
        (b"\x80\x04\x95pickle", "holds no training"),
        ({}, "none was saved in it"),
        ({"raceme": "[]"}, "none was saved in it"),
        ({"raceme": "{"}, "holds no training"),
        ({"raceme": json.dumps({"raceme-training": 2})}, "version 2"),
        ({"raceme": json.dumps({"raceme-training": 1, "step": -1, "marks": {}, "notes": {}})}, "where it is"),
        ({"raceme": json.dumps({"raceme-training": 1, "step": 1})}, "holds no training"),
        ({"raceme": json.dumps({"raceme-training": 1, "step": 1, "marks": {}, "notes": {}})}, "random numbers"),
    ],
)
def test_a_damaged_checkpoint_is_refused(content: bytes | dict[str, str], told: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file({"rng": torch.zeros(3)}, str(path), metadata=content or None)
    with pytest.raises(InvalidInput, match=told):
        training(tmp_path, Bigrams())


def test_signals_are_held_and_then_heard() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), held():
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ValueError, match="mine"), held():
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("mine")
