"""``raceme tune``: its options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from client import options as ours
from net import console

METHODS = ("lora", "prompt", "deep-prompt", "head")
MAX_STEPS = 10_000_000
MAX_BATCH = 4096
LARGEST = 1e6

above_zero = console.number(0, LARGEST, is_above=True)


def add_tune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    tune = commands.add_parser(
        "tune",
        help="train on top of a model of the swarm",
        description="Train what is yours (LoRA, a soft prompt, a head) on top of a model whose blocks are on the nodes "
        "and never change. DIR gets checkpoints, the loss curve, and in the end a module in PEFT's format. Ctrl-C "
        "saves a checkpoint; the same command again goes on from the last one, with the bits of a training that was "
        "never interrupted.",
    )
    console.add_bootstrap(tune)
    tune.add_argument(
        "--model", required=True, metavar="NAME", help="as served, or the path of its checkpoint's folder"
    )
    tune.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to put what comes of it")
    console.add_swarm_key(tune)
    _add_data(tune)
    _add_methods(tune)
    _add_training(tune)
    ours.add_choices(tune)
    console.add_json(tune, "what came of it")
    console.add_common(tune)
    tune.set_defaults(run=run_tune)


def _add_data(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FILE",
        help='a line of JSON for each text: {"text": "..."}, and "label" beside it (a text or a number) for a head',
    )
    data.add_argument(
        "--held-out", type=Path, metavar="FILE", help="texts to evaluate with (default: a share of the data)"
    )
    data.add_argument(
        "--held-out-share",
        type=console.number(0, 1, is_below=True),
        metavar="P",
        help="evaluate with this share of the data, and do not train on it; 0 for none (default: 0.1)",
    )
    data.add_argument("--regression", action="store_true", help="labels are amounts to be foretold, not classes")
    data.add_argument(
        "--max-length",
        type=console.whole(2, ours.MAX_TOKENS),
        default=256,
        metavar="N",
        help="tokens of an example. Texts are put one after another and cut into examples; for a head, each text is "
        "an example, and what is longer is cut off (default: 256)",
    )


def _add_methods(parser: argparse.ArgumentParser) -> None:
    methods = parser.add_argument_group("what is trained")
    methods.add_argument(
        "--method",
        action="append",
        choices=METHODS,
        help="needed without --module; may be repeated: a head goes with any of the others",
    )
    methods.add_argument(
        "--module",
        metavar="MODULE",
        help="train this one further, instead of --method: NAME@HASH, or its folder (with a / in it: ./my-adapter)",
    )
    methods.add_argument("--rank", type=console.whole(1, 256), metavar="N", help="of LoRA (default: 8)")
    methods.add_argument("--alpha", type=above_zero, metavar="X", help="of LoRA (default: twice the rank)")
    methods.add_argument(
        "--targets",
        type=lambda text: tuple(text.split(",")),
        metavar="NAMES",
        help="layers that LoRA goes beside, with commas: query_key_value, dense, dense_h_to_4h, dense_4h_to_h "
        "(default: query_key_value)",
    )
    methods.add_argument("--prompt-tokens", type=console.whole(1, 1024), metavar="N", help="of a prompt (default: 16)")
    methods.add_argument(
        "--prompt-text", type=console.utf8, metavar="TEXT", help="what a prompt begins as (default: words by chance)"
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("how it is trained")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--steps", type=console.whole(1, MAX_STEPS), metavar="N", help="in all")
    length.add_argument(
        "--epochs", type=console.whole(1, MAX_STEPS), metavar="N", help="how often to go through the data (default: 3)"
    )
    training.add_argument(
        "--batch-size", type=console.whole(1, MAX_BATCH), default=8, metavar="N", help="examples of a step (default: 8)"
    )
    training.add_argument(
        "--learning-rate",
        type=above_zero,
        metavar="X",
        help="the highest; it falls to zero at the end (default: 0.002 for LoRA, 0.03 for prompts, 0.01 for a "
        "head; the least of those for several)",
    )
    training.add_argument(
        "--warmup",
        type=console.whole(0, MAX_STEPS),
        metavar="N",
        help="steps in which the learning rate rises (default: one in twenty, up to 100)",
    )
    training.add_argument(
        "--weight-decay", type=console.number(0, LARGEST), default=0.0, metavar="X", help="of AdamW (default: 0)"
    )
    training.add_argument(
        "--max-gradient-norm",
        type=above_zero,
        default=1.0,
        metavar="X",
        help="gradients that are longer are made this long (default: 1)",
    )
    training.add_argument(
        "--seed",
        type=ours.seed,
        default=0,
        metavar="N",
        help="of the order of examples, what is held out, and first parameters (default: 0)",
    )
    training.add_argument(
        "--evaluate-every",
        type=console.whole(1, MAX_STEPS),
        metavar="N",
        help="steps; also at the beginning and at the end (default: a tenth of all)",
    )
    training.add_argument(
        "--save-every",
        type=console.whole(1, MAX_STEPS),
        default=100,
        metavar="N",
        help="steps; also at the end, and when it is interrupted (default: 100)",
    )


def _check(options: argparse.Namespace) -> None:
    """Raises:
    UserError: options that do nothing, or too few.
    """
    if options.method is not None and options.module is not None:
        raise console.UserError(
            "--method begins anew, and --module trains further what is there, in the same way: give one of them"
        )
    if options.method is None and options.module is None:
        raise console.UserError(f"say what to train, with --method ({', '.join(METHODS)}) or --module")
    methods = set(options.method or ())
    needs = {
        "rank": ("lora",),
        "alpha": ("lora",),
        "targets": ("lora",),
        "prompt_tokens": ("prompt", "deep-prompt"),
        "prompt_text": ("prompt", "deep-prompt"),
    }
    for name, those in needs.items():
        if getattr(options, name) is not None and not methods & set(those):
            option = name.replace("_", "-")
            raise console.UserError(f"--{option} does nothing without --method {' or '.join(those)}: leave it out")
    if options.regression and "head" not in methods:
        raise console.UserError("--regression does nothing without --method head: leave it out")
    if options.held_out is not None and options.held_out_share is not None:
        raise console.UserError("--held-out and --held-out-share say two things: give one of them")


def run_tune(options: argparse.Namespace) -> int:
    _check(options)
    choices = ours.read_choices(options)
    console.tell_warnings("client")
    from client.tuning.training.command import Task, tune
    from client.tuning.training.folder import own_folder

    task = Task(
        model=options.model,
        out=options.out,
        data=options.data,
        held_out=options.held_out,
        held_out_share=0.1 if options.held_out_share is None else options.held_out_share,
        is_regression=options.regression,
        max_length=options.max_length,
        methods=tuple(dict.fromkeys(options.method or ())),
        module=options.module,
        lora={name: getattr(options, name) for name in ("rank", "alpha", "targets") if getattr(options, name)},
        prompt=_prompt(options),
        steps=options.steps,
        epochs=options.epochs or 3,
        warmup_steps=options.warmup,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        weight_decay=options.weight_decay,
        max_gradient_norm=options.max_gradient_norm,
        seed=options.seed,
        evaluate_every_steps=options.evaluate_every,
        save_every_steps=options.save_every,
        choices=choices,
    )
    task.check_data()  # what can be said without the swarm is said at once
    with own_folder(options.out), ours.connect(options) as swarm:
        return tune(swarm, task, as_json=options.json)


def _prompt(options: argparse.Namespace) -> dict[str, Any]:
    given = {"tokens": options.prompt_tokens, "text": options.prompt_text}
    return {name: value for name, value in given.items() if value is not None}
