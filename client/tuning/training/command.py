"""What ``raceme tune`` does, once its options are read and there is a swarm."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from client.errors import InvalidInput
from client.modules.description import Description
from client.modules.obtaining import is_path
from client.tuning.methods import (
    LABELS,
    Between,
    ClassificationHead,
    DeepPromptTuning,
    LoRA,
    Method,
    PromptTuning,
    RegressionHead,
)
from client.tuning.training.data import Examples, Row, classes_of, label_examples, pack, read_rows, split
from client.tuning.training.folder import write_module
from client.tuning.training.interrupts import terminable
from client.tuning.training.loop import Evaluation, Outcome, Training, TrainingInterrupted, TrainingSettings, evaluate
from client.tuning.training.shown import Shown
from net import console

if TYPE_CHECKING:
    from client.blocking import Swarm

LEARNING_RATES: Final = {"lora": 2e-3, "prompt": 3e-2, "deep-prompt": 3e-2, "head": 1e-2}
MAX_WARMUP_STEPS: Final = 100
FROZEN: Final = "frozen_held_out_loss"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to train, on what, and how.

    Attributes:
        model: As ``swarm.model`` takes it.
        out: The folder, which exists.
        held_out: A file; ``None`` for a share of the data.
        held_out_share: 0 for none.
        methods: By their names; empty with ``module``.
        module: What to train further.
        lora, prompt: Arguments of these methods.
        steps: In all; ``None`` for ``epochs``.
        warmup_steps, learning_rate, evaluate_every_steps: ``None`` for what fits.
        choices: Of nodes, for ``swarm.model``.
    """

    model: str
    out: Path
    data: Path
    methods: tuple[str, ...]
    module: str | None = None
    held_out: Path | None = None
    held_out_share: float = 0.1
    is_regression: bool = False
    max_length: int = 256
    lora: Mapping[str, Any] = field(default_factory=dict)
    prompt: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    epochs: int = 3
    warmup_steps: int | None = None
    learning_rate: float | None = None
    batch_size: int = 8
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    seed: int = 0
    evaluate_every_steps: int | None = None
    save_every_steps: int = 100
    choices: Mapping[str, Any] = field(default_factory=dict)

    def check_data(self) -> None:
        """Read all data files, if it is known what they should have.

        Raises:
            InvalidInput, OSError: as ``read``.
        """
        if self.module is None:
            training, _ = self.read(is_labelled="head" in self.methods)
            self.tuning(training)

    def read(self, *, is_labelled: bool) -> tuple[list[Row], list[Row]]:
        """What is trained on, and what is held out.

        Raises:
            InvalidInput: Lines that are not what they should be.
            OSError: A file cannot be read.
        """
        rows = read_rows(self.data, is_labelled=is_labelled)
        if self.held_out is not None:
            return rows, read_rows(self.held_out, is_labelled=is_labelled)
        if not self.held_out_share:
            return rows, []
        return split(rows, self.held_out_share, self.seed)

    def tuning(self, rows: Sequence[Row]) -> list[Method]:
        """The methods; ``rows`` have the labels of a head.

        Raises:
            InvalidInput, TypeError: Those that cannot be.
        """
        made: list[Method] = []
        for name in self.methods:
            if name == "lora":
                made.append(LoRA(**self.lora))
            elif name == "prompt":
                made.append(PromptTuning(**self.prompt))
            elif name == "deep-prompt":
                made.append(DeepPromptTuning(**self.prompt))
            else:
                made.append(RegressionHead() if self.is_regression else ClassificationHead(classes_of(rows)))
        return made

    def settings(self, methods: Sequence[str], examples: int) -> TrainingSettings:
        """How to train ``methods`` on so many examples."""
        steps = self.steps or self.epochs * -(-examples // self.batch_size)
        return TrainingSettings(
            steps=steps,
            learning_rate=self.learning_rate or min(LEARNING_RATES[name] for name in methods),
            batch_size=self.batch_size,
            warmup_steps=min(MAX_WARMUP_STEPS, steps // 20) if self.warmup_steps is None else self.warmup_steps,
            weight_decay=self.weight_decay,
            max_gradient_norm=self.max_gradient_norm,
            seed=self.seed,
            evaluate_every_steps=self.evaluate_every_steps or max(1, steps // 10),
            save_every_steps=self.save_every_steps,
        )


def tune(swarm: Swarm, task: Task, *, as_json: bool) -> int:
    """Train, and put what comes of it into the task's folder; say so.

    Returns:
        The command's exit status.

    Raises:
        ClientError, NetError: It cannot be done (any more).
        OSError: A file cannot be read, or what was trained cannot be written.
    """
    model, rows, held_out_rows = _load(swarm, task)
    methods = model.tuned.methods
    names = [LABELS[type(method)] for method in methods if not isinstance(method, Between)]
    if not names:
        raise InvalidInput("what the module has cannot be trained by this command: use swarm.model(..., module=)")
    with Shown(is_silent=as_json) as shown:
        examples = _examples(rows, task, model.tokenizer, _head(methods), task.data)
        held_out = _examples(held_out_rows, task, model.tokenizer, _head(methods), task.held_out or task.data)
        shown.say(_spell_data("training", task.data, examples))
        shown.say(_spell_data("held out", task.held_out or task.data, held_out))
        pad = _padding(model.tokenizer)
        marks = {
            "model": model.served.name,
            "digest": model.served.digest,
            **_marks(methods),
            "module": task.module,
            "data": examples.digest,
            "held_out": held_out.digest,
        }
        settings = task.settings(names, len(examples))
        training = Training(
            *(model, examples.examples, held_out.examples, settings, task.out), marks=marks, pad=pad, watcher=shown
        )
        if training.take_up():
            shown.say(f"going on after step {training.step}")
        if _head(methods) is None and len(held_out) and FROZEN not in training.notes:
            frozen = _evaluate_frozen(swarm, task, held_out, pad)
            training.notes[FROZEN] = frozen.loss
            shown.say(f"frozen model: held-out loss {frozen.loss:.4f}")
        try:
            with console.interruptible(), terminable():
                outcome = training.run()
        except TrainingInterrupted as error:
            shown.say_surely(f"{error}: the same command again goes on from there")
            return console.EXIT_INTERRUPTED
    told = _told(outcome, training.notes)
    description = Description(
        model=model.served.name,
        model_digest=model.served.digest,
        method="+".join(names),
        metrics={name: float(value) for name, value in told.items()},
        parent=model.parent or _parent(task.module),
    )
    write_module(model, task.out, description)
    if as_json:
        out = {"out": str(task.out), "model": model.served.name, "method": "+".join(names)}
        run = {"went_on_after": outcome.began_at, "tokens_per_s": outcome.tokens_per_s}
        console.print_json({**out, **told, **run})
    else:
        parameters = sum(parameter.numel() for parameter in model.tuned.parameters())
        _print(task, told, parameters=parameters, has_head=_head(methods) is not None)
    return 0


def _marks(methods: Sequence[Method]) -> dict[str, Any]:
    """What is trained, by the options that say so."""
    marks: dict[str, Any] = {"method": [LABELS[type(method)] for method in methods]}
    for method in methods:
        if isinstance(method, LoRA):
            marks |= {"rank": method.rank, "alpha": method.alpha, "targets": list(method.targets)}
        elif isinstance(method, PromptTuning | DeepPromptTuning):
            marks |= {"prompt_tokens": method.tokens, "prompt_text": method.text}
        elif isinstance(method, ClassificationHead):
            marks["labels"] = list(method.labels)
        elif isinstance(method, RegressionHead):
            marks["regression"] = method.outputs
    return marks


def _load(swarm: Swarm, task: Task) -> tuple[Any, list[Row], list[Row]]:
    """The model with what is to be trained, and the lines to train on and to evaluate with.

    Raises: as ``tune``.
    """
    torch.manual_seed(task.seed)  # for the first parameters
    if task.module is None:
        rows, held_out = task.read(is_labelled="head" in task.methods)
        return swarm.model(task.model, tuning=task.tuning(rows), **task.choices), rows, held_out
    model = swarm.model(task.model, module=task.module, **task.choices)
    rows, held_out = task.read(is_labelled=model.tuned is not None and _head(model.tuned.methods) is not None)
    return model, rows, held_out


def _head(methods: Sequence[Method]) -> ClassificationHead | RegressionHead | None:
    return next((method for method in methods if isinstance(method, ClassificationHead | RegressionHead)), None)


def _examples(
    rows: Sequence[Row], task: Task, tokenizer: Any, head: ClassificationHead | RegressionHead | None, path: Path
) -> Examples:
    if not rows:
        return Examples(examples=(), texts=0, tokens=0)

    def encode(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(texts, verbose=False).input_ids
        return ids

    if head is None:
        return pack(rows, encode, end=tokenizer.eos_token_id, length=task.max_length)
    classes = head.labels if isinstance(head, ClassificationHead) else None
    return label_examples(rows, encode, length=task.max_length, classes=classes, named=str(path))


def _padding(tokenizer: Any) -> int:
    """A token id that stands where nothing counts."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def _evaluate_frozen(swarm: Swarm, task: Task, held_out: Examples, pad: int) -> Evaluation:
    """How the model does without anything trained."""
    frozen = swarm.model(task.model, **task.choices)

    def run(*, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
        # Sessions take no padding behind the text; without a mask it is text whose logits nobody looks at.
        return frozen(input_ids=input_ids, labels=labels)

    return evaluate(run, held_out.examples, batch_size=task.batch_size, pad=pad)


def _parent(module: str | None) -> str | None:
    """The hash of the published module that a folder's was trained from, if that is what was trained further.

    Raises:
        ModuleError: the folder's description makes no sense.
    """
    description = Description.read(Path(module)) if module is not None and is_path(module) else None
    return None if description is None else description.parent


def _told(outcome: Outcome, notes: Mapping[str, Any]) -> dict[str, float | int]:
    """What was measured."""
    told = {
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "loss": outcome.loss,
        "held_out_loss": None if outcome.last is None else outcome.last.loss,
        "accuracy": None if outcome.last is None else outcome.last.accuracy,
        FROZEN: notes.get(FROZEN),
    }
    return {name: value for name, value in told.items() if value is not None}


def _spell_data(what: str, path: Path, examples: Examples) -> str:
    if not len(examples):
        return f"{what}: nothing"
    told = f"{what}: {examples.texts} texts of {path}, {examples.tokens} tokens, {len(examples)} examples"
    if examples.cut_tokens:
        told += f"; {examples.cut_texts} texts are too long, and {examples.cut_tokens} tokens of them are not used"
    return told


def _print(task: Task, told: Mapping[str, float], *, parameters: int, has_head: bool) -> None:
    if "held_out_loss" in told:
        text = f"held-out loss {told['held_out_loss']:.4f}"
        if FROZEN in told:
            gain = told[FROZEN] - told["held_out_loss"]
            text += f", {abs(gain):.4f} {'below' if gain >= 0 else 'above'} the frozen model's"
        if "accuracy" in told:
            text += f", {told['accuracy']:.1%} right"
        print(text)
    print(f"{task.out} holds what was trained: {parameters} parameters")
    name, folder = shlex.quote(task.model), shlex.quote(str(task.out.absolute()))
    if not has_head:  # which gives no tokens
        print(f"use it:      raceme generate --bootstrap ADDR --model {name} --module {folder} PROMPT")
    print(f"from Python: swarm.model({task.model!r}, module={str(task.out.absolute())!r})")
    print(f"share it:    raceme publish {folder} --name NAME --bootstrap ADDR")
    sys.stdout.flush()
