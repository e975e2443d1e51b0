"""A process that runs blocks forwards and back as it is told: on nodes, or itself, with as many threads as it is given.

``python -m tests.bench.training THREADS``. Orders come as lines of JSON on standard input, and each is answered with
one line; once everything has been imported, ``{"up": true}`` comes by itself. A step is the way forward of ROWS x
TOKENS hidden states, always the same, and the way back of a gradient; its answer is ``{"took_s": S, "sum": X}``, where
X is the sum of the gradient's magnitudes.

- ``{"do": "connect", "bootstrap": [ADDRESS], "model": NAME}``, then ``{"do": "remote", "rows": N, "tokens": N}``:
  through nodes.
- ``{"do": "load", "folder": FOLDER}``, then ``{"do": "local", "rows": N, "tokens": N, "at_once": N}``: here, as nodes
  do it, so many sequences at once. Nothing is kept but what goes in: the way back runs the way forward again, keeps
  what goes into each block, and then takes one block after another.
- ``{"do": "load_theirs", "folder": FOLDER}``, then ``{"do": "theirs", "rows": N, "tokens": N}``: transformers' own
  blocks with everything kept.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import client
import client.models.loading
import client.session  # what connecting and training would else import
from client.tuning import PromptTuning
from compute.bloom import BloomSpan
from compute.checkpoint import Checkpoint
from compute.huge_pages import use_huge_pages

if TYPE_CHECKING:
    from client.blocking import Swarm


class Trainer:
    """What orders work on."""

    def __init__(self) -> None:
        self._swarm: Swarm | None = None
        self._blocks: Any = None
        self._span: BloomSpan | None = None
        self._theirs: Any = None
        self._width = 0

    def connect(self, bootstrap: list[str], model: str) -> None:
        self._swarm = client.connect(bootstrap, remember=False)
        found = self._swarm.model(model, tuning=PromptTuning(1))
        self._blocks, self._width = found.blocks[:], found.config.hidden_size
        say()

    def remote(self, rows: int, tokens: int) -> None:
        def step(hidden: Tensor, gradient: Tensor) -> Tensor:
            leaf = hidden.requires_grad_(True)  # [b, t, d]
            self._blocks(leaf).backward(gradient)
            return leaf.grad  # type: ignore[return-value]

        self._answer(step, rows, tokens)

    def load(self, folder: str) -> None:
        checkpoint = Checkpoint.open(Path(folder))
        self._span = checkpoint.load_span(0, checkpoint.n_blocks, linear="fp32")
        self._width = self._span.config.hidden_size
        use_huge_pages()  # as a node has them
        say()

    def local(self, rows: int, tokens: int, at_once: int) -> None:
        if (span := self._span) is None:
            raise RuntimeError("load first")

        def step(hidden: Tensor, gradient: Tensor) -> Tensor:
            with torch.inference_mode():
                for part in hidden.split(at_once):
                    span(part)
            pairs = zip(hidden.split(at_once), gradient.split(at_once), strict=True)
            return torch.cat([_back(span, part, upstream) for part, upstream in pairs])  # [b, t, d]

        self._answer(step, rows, tokens)

    def load_theirs(self, folder: str) -> None:
        from transformers import BloomModel

        self._theirs = BloomModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self._theirs.word_embeddings_layernorm = nn.Identity()
        self._theirs.ln_f = nn.Identity()
        self._width = self._theirs.config.hidden_size
        say()

    def theirs(self, rows: int, tokens: int) -> None:
        def step(hidden: Tensor, gradient: Tensor) -> Tensor:
            leaf = hidden.requires_grad_(True)  # [b, t, d]
            self._theirs(inputs_embeds=leaf, use_cache=False).last_hidden_state.backward(gradient)
            return leaf.grad  # type: ignore[return-value]

        self._answer(step, rows, tokens)

    def _answer(self, step: Callable[[Tensor, Tensor], Tensor], rows: int, tokens: int) -> None:
        shape = (rows, tokens, self._width)
        hidden, gradient = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
        began = time.perf_counter()
        found = step(hidden, gradient)
        say(took_s=time.perf_counter() - began, sum=float(found.abs().sum()))


def _back(span: BloomSpan, hidden: Tensor, gradient: Tensor) -> Tensor:
    """As a node's way back.

    Shapes:
        hidden, gradient: [b, t, d]
        returns: [b, t, d]
    """
    bias = span.bias(hidden, 0)  # [1, h, t, t]
    inputs = [hidden]
    with torch.no_grad():
        for block in span.blocks[:-1]:
            inputs.append(block(inputs[-1], bias))  # [b, t, d]
    for block in reversed(span.blocks):
        leaf = inputs.pop().detach().requires_grad_(True)  # [b, t, d]
        (gradient,) = torch.autograd.grad(block(leaf, bias), [leaf], gradient)  # [b, t, d]
    return gradient


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    say(up=True)
    ours = Trainer()
    for line in sys.stdin:
        order = json.loads(line)
        getattr(ours, order.pop("do"))(**order)


if __name__ == "__main__":
    main()
