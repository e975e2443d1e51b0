"""The loop: batches, loss, AdamW, evaluations, checkpoints. It knows nothing of where the model computes.

A training is a function of its settings, its examples and the parameters at its beginning: the order of examples
depends on the seed and the epoch, random numbers are part of a checkpoint, and evaluations leave no trace. So one that
was interrupted, wherever that was, and taken up again gives the bits of one that was not.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from client.errors import ClientError, InvalidInput
from client.tuning.training.checkpoints import Checkpoint, remove_parts
from client.tuning.training.curve import Curve
from client.tuning.training.data import Batch, Example, Order, collate
from client.tuning.training.interrupts import held

CHECKPOINT_FILE: Final = "checkpoint.safetensors"
CURVE_FILE: Final = "log.jsonl"
RECENT_STEPS: Final = 20  # that speed is told of
MAX_SPELLED_CHARACTERS: Final = 200  # of what an option was, and is: of many labels, the first
SPELLED_DIGITS: Final = 12
OPTIONS: Final = {  # the marks that are called otherwise than the options that say them
    "digest": "the model's digest",
    "data": "--data, by its digest",
    "held_out": "what is held out, by its digest",
    "labels": "the labels in --data",
    "steps": "--steps, or by --epochs",
    "warmup_steps": "--warmup",
}
HEX_DIGEST: Final = re.compile("[0-9a-f]{64}")

logger = logging.getLogger(__name__)


class TrainingFailed(ClientError):
    """The training cannot go on."""


class TrainingInterrupted(ClientError):
    """Ctrl-C; what has been done is saved.

    Attributes:
        step: How many steps have been done.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted after step {step}, which is saved")
        self.step = step


class Output(Protocol):
    """What a model gives.

    Attributes:
        loss: The mean over all that is foretold in the batch, a scalar.
        logits: For each class, if there are classes.
    """

    loss: Tensor
    logits: Tensor


class Trainable(Protocol):
    """What can be evaluated: called as transformers' models are, with labels.

    Shapes:
        input_ids, attention_mask: [b, t]; padding is on the right
        labels: [b, t], -100 where nothing is foretold; or [b], for a head
    """

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Output: ...


class Tunable(Trainable, Protocol):
    """What can be trained.

    Attributes:
        tuned: Has the parameters that are trained, and nothing else.
    """

    @property
    def tuned(self) -> nn.Module: ...

    def save_pretrained(self, folder: str) -> None:
        """Write what is trained into a folder."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train.

    Attributes:
        steps: In all.
        learning_rate: The highest one: it rises to it in ``warmup_steps`` steps, and falls to zero at the end.
        max_gradient_norm: Larger gradients, all parameters' together, are made this long.
        evaluate_every_steps, save_every_steps: How often; also at the end.
    """

    steps: int
    learning_rate: float
    batch_size: int = 8
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    seed: int = 0
    evaluate_every_steps: int = 50
    save_every_steps: int = 100

    @property
    def marks(self) -> dict[str, Any]:
        """Those that the result depends on."""
        return {name: value for name, value in asdict(self).items() if not name.endswith("_every_steps")}

    def learning_rate_at(self, step: int) -> float:
        """That of a step, from 0."""
        rising = (step + 1) / (self.warmup_steps + 1)
        falling = (self.steps - step) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * min(1.0, rising, falling)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well held-out examples are foretold.

    Attributes:
        loss: Mean over all that is foretold, in nats, or squared error.
        accuracy: The share of classes that are right; ``None`` where there are none.
    """

    loss: float
    accuracy: float | None = None

    @property
    def line(self) -> dict[str, float]:
        """As the curve has it."""
        return {"held_out_loss": self.loss} | ({} if self.accuracy is None else {"accuracy": self.accuracy})


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast it goes.

    Attributes:
        tokens_per_s: Of the last steps; evaluations do not count. 0 before the first.
        left_s: What is left will take about so long; ``None`` before the first step.
    """

    tokens_per_s: float
    left_s: float | None


class Watcher:
    """Who is told how it goes. This one keeps silent."""

    def began(self, step: int, steps: int) -> None:
        """So many of so many steps are done already."""

    def stepped(self, step: int, loss: float, pace: Pace) -> None:
        """One more step is done."""

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """What is held out was evaluated."""

    def saved(self, step: int) -> None:
        """A checkpoint was written."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a training.

    Attributes:
        steps: In all.
        began_at: How many of them were done before.
        loss: Of the last step.
        first, last: Evaluations at the beginning and at the end; ``None`` if nothing is held out.
        tokens: That were trained on, over all steps; those of an epoch count again in the next.
        tokens_per_s: Of this run's steps; 0 if there was nothing left to do.
    """

    steps: int
    began_at: int
    loss: float | None
    first: Evaluation | None
    last: Evaluation | None
    tokens: int
    tokens_per_s: float


def evaluate(model: Trainable, examples: Sequence[Example], *, batch_size: int, pad: int) -> Evaluation:
    """Foretell examples in order.

    Raises: what the model raises.
    """
    total, right, targets = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size], pad)
            output = _run(model, batch)
            total += float(output.loss.detach()) * batch.targets
            targets += batch.targets
            if _is_classes(batch):
                right += int((output.logits.argmax(dim=-1) == batch.labels).sum())
    accuracy = right / targets if _is_classes(batch) else None
    return Evaluation(loss=total / targets, accuracy=accuracy)


def _run(model: Trainable, batch: Batch) -> Output:
    return model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels)


def _is_classes(batch: Batch) -> bool:
    return batch.labels.dim() == 1 and not batch.labels.is_floating_point()


class Training:
    """One training in its folder: ``take_up()``, then ``run()``.

    Whoever makes it sees to it that nobody else writes into the folder.
    """

    def __init__(
        self,
        model: Tunable,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        settings: TrainingSettings,
        folder: Path,
        *,
        marks: Mapping[str, Any],
        pad: int,
        watcher: Watcher | None = None,
    ) -> None:
        """Take what there is; nothing is read or written yet.

        Args:
            model: To be trained.
            examples: At least one.
            held_out: Those to evaluate with; may be empty.
            settings: How.
            folder: Exists.
            marks: What else the result depends on, as JSON has it: the model, the data.
            pad: Token id of padding.
            watcher: Is told.
        """
        self._model = model
        self._examples = examples
        self._held_out = held_out
        self._settings = settings
        self._marks = {**marks, **settings.marks}
        self._pad = pad
        self._watcher = watcher or Watcher()
        self._path = folder / CHECKPOINT_FILE
        self._curve = Curve(folder / CURVE_FILE)
        self._folder = folder
        self._parameters = [parameter for parameter in model.tuned.parameters() if parameter.requires_grad]
        # One tensor after another, whose order of additions is always the same.
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=False
        )
        self._order = Order(len(examples), settings.batch_size, settings.seed)
        self._step = self._began_at = 0
        self._saved: int | None = None
        self._rng = torch.get_rng_state()
        self._notes: dict[str, Any] = {"tokens": 0}
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS)
        self._evaluation_s = 0.0
        self._run = (0, 0.0)  # tokens and seconds of this run's steps

    @property
    def step(self) -> int:
        """How many steps have been done."""
        return self._step

    @property
    def notes(self) -> dict[str, Any]:
        """What goes into each checkpoint besides, as JSON has it; may be added to."""
        return self._notes

    def take_up(self) -> bool:
        """Go on from the folder's checkpoint, if there is one.

        Raises:
            InvalidInput: It is one of another training; the text says what differs.
            OSError: It cannot be read.
        """
        remove_parts(self._folder)
        has_checkpoint = self._path.exists()
        if has_checkpoint:
            checkpoint = Checkpoint.read(self._path)
            self._check(checkpoint.marks)
            checkpoint.restore(self._model.tuned, self._optimizer)
            self._rng = checkpoint.rng
            torch.set_rng_state(self._rng)
            self._notes = dict(checkpoint.notes)
            self._step = self._began_at = self._saved = checkpoint.step
        self._curve.cut(self._step if has_checkpoint else -1)
        return has_checkpoint

    def _check(self, marks: Mapping[str, Any]) -> None:
        ours: dict[str, Any] = self._marks
        differing = [name for name in ours | dict(marks) if marks.get(name) != ours.get(name)]
        if differing:
            told = "; ".join(
                f"{_option(name)}: was {_spell(marks.get(name))}, now {_spell(ours.get(name))}" for name in differing
            )
            raise InvalidInput(
                f"{self._folder} holds a training that began with other options ({told}): "
                f"give the same ones to go on with it, or another --out to begin anew"
            )

    def run(self) -> Outcome:
        """Train to the end.

        Returns:
            What came of it; the last checkpoint is written then.

        Raises:
            TrainingInterrupted: Ctrl-C; a checkpoint is written.
            TrainingFailed: The loss is no number, or the disk is full; the last checkpoint is as it was.
            ClientError: What the model raises; a checkpoint is written.
        """
        self._watcher.began(self._step, self._settings.steps)
        try:
            self._train()
        except KeyboardInterrupt:
            while self._saved != self._step:
                with suppress(KeyboardInterrupt), held():  # who presses Ctrl-C again means the same
                    self._save_what_is_done()
            raise TrainingInterrupted(self._step) from None
        except OSError as error:
            raise TrainingFailed(
                f"{error.filename or self._folder}: {error.strerror or error}; the training stopped after step "
                f"{self._step}, the checkpoint is that of step {self._saved or 0}: make room and run the same again"
            ) from error
        except TrainingFailed:
            raise
        except ClientError:
            with held():
                self._save_what_is_done()
            raise
        return self._outcome()

    def _train(self) -> None:
        settings = self._settings
        while True:
            is_last = self._step == settings.steps
            if is_last or self._step % settings.evaluate_every_steps == 0:
                self._evaluate()
            if is_last or (self._step and self._step % settings.save_every_steps == 0):
                self._save()
            if is_last:
                return
            self._train_step()

    def _train_step(self) -> None:
        began = time.perf_counter()
        batch = collate([self._examples[index] for index in self._order.at(self._step)], self._pad)
        torch.set_rng_state(self._rng)
        self._model.tuned.train()
        self._optimizer.zero_grad()
        output = _run(self._model, batch)
        loss = output.loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, self._settings.max_gradient_norm, foreach=False)
        value = float(loss.detach())
        if not math.isfinite(value) or not bool(norm.isfinite()):
            raise TrainingFailed(
                f"the loss of step {self._step + 1} is {value:g} and its gradient's length {float(norm):g}: lower "
                f"--learning-rate and begin anew, or go on from step {self._saved or 0}, the last one saved"
            )
        learning_rate = self._settings.learning_rate_at(self._step)
        with held():  # from here on it is done, as a whole
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            self._rng = torch.get_rng_state()
            self._step += 1
            self._notes["tokens"] += batch.tokens
            self._notes["loss"] = value
            self._curve.add(step=self._step, loss=value, learning_rate=learning_rate, tokens=batch.tokens)
        seconds = time.perf_counter() - began
        self._recent.append((batch.tokens, seconds))
        self._run = (self._run[0] + batch.tokens, self._run[1] + seconds)
        self._watcher.stepped(self._step, value, self._pace())

    def _pace(self) -> Pace:
        settings = self._settings
        tokens, seconds = (sum(column) for column in zip(*self._recent, strict=True))
        left = settings.steps - self._step
        evaluations = math.ceil(left / settings.evaluate_every_steps) if self._held_out else 0
        left_s = left * seconds / len(self._recent) + evaluations * self._evaluation_s
        return Pace(tokens_per_s=tokens / seconds, left_s=left_s)

    def _evaluate(self) -> None:
        if not self._held_out or self._curve.evaluation(self._step) is not None:
            return
        began = time.perf_counter()
        self._model.tuned.eval()
        found = evaluate(self._model, self._held_out, batch_size=self._settings.batch_size, pad=self._pad)
        self._evaluation_s = time.perf_counter() - began
        with held():
            self._curve.add(step=self._step, **found.line)
        self._watcher.evaluated(self._step, found)

    def _save(self) -> None:
        """Raises:
        OSError: it cannot be written; the last one is there still.
        """
        if self._saved == self._step:
            return
        with held():
            checkpoint = Checkpoint.of(
                *(self._model.tuned, self._optimizer, self._rng),
                step=self._step,
                marks=self._marks,
                notes=self._notes,
            )
            checkpoint.write(self._path)
            self._saved = self._step
        self._watcher.saved(self._step)

    def _save_what_is_done(self) -> None:
        """Raises:
        TrainingFailed: it cannot be saved.
        """
        try:
            self._save()
        except OSError as error:
            raise TrainingFailed(
                f"{error.filename or self._path}: {error.strerror or error}; step {self._step} could not be saved, "
                f"the checkpoint is that of step {self._saved or 0}"
            ) from error

    def _outcome(self) -> Outcome:
        tokens, seconds = self._run
        return Outcome(
            steps=self._step,
            began_at=self._began_at,
            loss=self._notes.get("loss"),
            first=self._evaluation(0),
            last=self._evaluation(self._step),
            tokens=self._notes["tokens"],
            tokens_per_s=tokens / seconds if seconds else 0.0,
        )

    def _evaluation(self, step: int) -> Evaluation | None:
        line = self._curve.evaluation(step)
        return None if line is None else Evaluation(loss=line["held_out_loss"], accuracy=line.get("accuracy"))


def _option(mark: str) -> str:
    return OPTIONS.get(mark) or f"--{mark.replace('_', '-')}"


def _spell(value: Any) -> str:
    """What a mark says, for people."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else "not given" if value is None else str(value)
    if HEX_DIGEST.fullmatch(text):
        return text[:SPELLED_DIGITS]
    return text if len(text) <= MAX_SPELLED_CHARACTERS else f"{text[:MAX_SPELLED_CHARACTERS]}..."
