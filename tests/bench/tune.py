"""Training through two node processes on this machine: how fast, and what comes of it.

throughput: 8 x 128 tokens forwards and back through blocks of bloom-560m's shape in fp32, on two nodes, each with half
of the blocks, against the same computation on one machine, in turn; the weights are frozen on both sides, and each of
these processes may use two threads. The same computation: nothing is kept between the ways forward and back
(``training.py``). -vs-transformers is against transformers' blocks with everything kept. Values are tokens per second
over the reference's; train-cpu-vs-local is the processor time of both nodes and the client over the reference's, which
what else runs on the machine disturbs less.

loss: ``raceme tune`` on bloom-tiny, with tests/data. loss-drop-* is by how many nats per token held-out text is
foretold better than by the frozen model, after so many steps; accuracy-head the share of held-out sentences that are
told apart. A seed has its own held-out part, order, and first parameters; there are as many as runs, up to three.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio

from tests.bench import report
from tests.bench.children import Child, ChildFailed, Family, family, swarm

ROWS, TOKENS = 8, 128
HIDDEN, HEADS, BLOCKS = 1024, 16, 24
AT_ONCE = ROWS  # sequences on one machine: all are quickest there, by 4 % over two
THREADS = 2
STEP_S = 300.0  # for one answer
TUNE_S = 600.0
SAME = 1e-3  # by how much sums of gradients may differ, of two ways to compute them
DATA = Path(__file__).parents[1] / "data"
SEEDS = 3
TINY_SPANS = ("0:4", "4:8")
TASKS: dict[str, tuple[str, ...]] = {
    "loss-drop-prompt": ("--data", "python-reference.jsonl", "--method", "prompt", "--prompt-tokens", "16"),
    "loss-drop-lora": ("--data", "python-reference.jsonl", "--method", "lora", "--rank", "8"),
    "accuracy-head": ("--data", "sentences.jsonl", "--method", "head"),
}

GOALS: dict[str, tuple[str, float | None, str]] = {
    "train-throughput-vs-local": ("x local", 0.85, "higher"),
    "train-throughput-vs-transformers": ("x transformers", None, "higher"),
    "train-cpu-vs-local": ("x local", None, "lower"),
    "train-tokens-per-s": ("tokens/s", None, "higher"),
    "loss-drop-prompt": ("nats", 0.3, "higher"),
    "loss-drop-lora": ("nats", 0.5, "higher"),
    "accuracy-head": ("of all", 0.9, "higher"),
}


class Bench:
    """What the parts share."""

    def __init__(self, children: Family, options: argparse.Namespace) -> None:
        self.children = children
        self.runs: int = options.runs
        self.blocks: int = options.blocks
        self.steps: int = options.steps
        self.found: dict[str, list[float]] = {}

    def note(self, name: str, value: float) -> None:
        self.found.setdefault(name, []).append(value)


async def ask(child: Child, **order: Any) -> dict[str, Any]:
    with trio.fail_after(STEP_S):
        return await child.ask(**order)


async def throughput(bench: Bench) -> None:
    report.progress(f"tune: making a model of {bench.blocks} blocks")
    folder = str(await trio.to_thread.run_sync(_make_model, bench))
    half = bench.blocks // 2
    spans = (f"0:{half}", f"{half}:{bench.blocks}")
    children, size = bench.children, {"rows": ROWS, "tokens": TOKENS}
    options = ("--quantize", "fp32", "--threads", str(THREADS))
    async with swarm(children, spans, model=folder, prefix="wide-", options=options) as (address, nodes):
        ours, local, theirs = [
            await children.started(children.start(name, "tests.bench.training", str(threads)))
            for name, threads in (("ours", 1), ("local", THREADS), ("theirs", THREADS))
        ]
        await ask(ours, do="connect", bootstrap=[address], model=folder)
        await ask(local, do="load", folder=folder)
        await ask(theirs, do="load_theirs", folder=folder)
        for run in range(1 + bench.runs):
            report.progress(f"tune: throughput, run {run}")
            cpu_s = [_cpu_s([ours, *nodes]), _cpu_s([local])]
            mine = await ask(ours, do="remote", **size)
            alone = await ask(local, do="local", at_once=AT_ONCE, **size)
            cpu_s = [_cpu_s([ours, *nodes]) - cpu_s[0], _cpu_s([local]) - cpu_s[1]]
            kept = await ask(theirs, do="theirs", **size)
            for other in (alone, kept):
                if abs(other["sum"] / mine["sum"] - 1) > SAME:
                    raise ChildFailed(f"gradients differ: {mine['sum']:g} through nodes, {other['sum']:g} here")
            if run:  # the first one warms up
                bench.note("train-throughput-vs-local", alone["took_s"] / mine["took_s"])
                bench.note("train-throughput-vs-transformers", kept["took_s"] / mine["took_s"])
                bench.note("train-cpu-vs-local", cpu_s[0] / cpu_s[1])
                bench.note("train-tokens-per-s", ROWS * TOKENS / mine["took_s"])
        for child in (ours, local, theirs):
            await children.end(child)


def _cpu_s(children: Sequence[Child]) -> float:
    return sum(child.cpu_s for child in children)


def _make_model(bench: Bench) -> object:
    import torch

    from tests.checkpoints import make_checkpoint

    folder = bench.children.folder / "wide"
    return make_checkpoint(
        folder, layers=bench.blocks, heads=HEADS, hidden=HIDDEN, shards_of_blocks=4, dtype=torch.bfloat16
    )


async def loss(bench: Bench) -> None:
    async with swarm(bench.children, TINY_SPANS, prefix="tiny-") as (address, _):
        for seed in range(min(bench.runs, SEEDS)):
            for name, (_, data, *options) in TASKS.items():
                report.progress(f"tune: {name}, seed {seed}")
                out = bench.children.folder / f"{name}-{seed}"
                child = bench.children.start(
                    *(f"{name}-{seed}-tune", "client", "tune", "--bootstrap", address, "--model", "bloom-tiny"),
                    *("--data", str(DATA / data), "--out", str(out), *options, "--max-length", str(TOKENS), "--json"),
                    *("--seed", str(seed), "--steps", str(bench.steps), "--evaluate-every", str(bench.steps)),
                )
                with trio.fail_after(TUNE_S):
                    told = await child.line()
                await bench.children.end(child)
                bench.note(name, _value(told))
                if json.loads((out / "raceme.json").read_text())["metrics"]["held_out_loss"] != told["held_out_loss"]:
                    raise ChildFailed(f"{name}: the module's metrics are others than those that were told")


def _value(told: dict[str, Any]) -> float:
    if "accuracy" in told:
        return float(told["accuracy"])
    return float(told["frozen_held_out_loss"] - told["held_out_loss"])


PARTS: dict[str, Callable[[Bench], Awaitable[None]]] = {"throughput": throughput, "loss": loss}


async def measure(options: argparse.Namespace) -> Bench:
    async with family() as children:
        bench = Bench(children, options)
        for name in options.only or PARTS:
            await PARTS[name](bench)
    return bench


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--only", action="append", choices=sorted(PARTS), help="this part alone; may be repeated")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"of the model for throughput (default: {BLOCKS})")
    parser.add_argument("--steps", type=int, default=100, help="of each training (default: 100)")
    options = parser.parse_args()
    try:
        bench = trio.run(partial(measure, options))
    except (ChildFailed, trio.TooSlowError) as error:
        sys.exit(f"tune: {error or 'no answer in time'}")
    except KeyboardInterrupt:
        sys.exit(130)
    figures = [
        report.figure(name, bench.found[name], unit, better=better, goal=goal)
        for name, (unit, goal, better) in GOALS.items()
        if name in bench.found
    ]
    report.show("tune", figures, as_json=options.json)


if __name__ == "__main__":
    main()
