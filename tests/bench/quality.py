"""What quantising costs in exactness: every backend of linear layers against float32, on bloom-tiny.

logits-error-*: of the logits, relative to their size. argmax-*: how often both would choose the same next token.
loss-added-*: nats a token, on text that the model was not trained on: the chapters that its training held out, if
--text names the file that compute/models/train_bloom_tiny.py was given or the program `bible` is installed; otherwise
on text that the float32 model itself draws, where the loss added is how far the two models' distributions are apart.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from compute.bloom import BloomSpan, Embeddings, Head
from compute.cache import KVCache
from compute.checkpoint import Checkpoint
from compute.linear import BACKENDS
from compute.models import find_checkpoint
from compute.models.train_bloom_tiny import CONTEXT_TOKENS, read_chapters
from tests.bench import report

END = 2  # </s>, after every chapter
WINDOWS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """How one backend did."""

    name: str
    error: float
    agreement: float
    loss: float
    added: float
    megabytes: float


class Model:
    """bloom-tiny with some linear layers."""

    def __init__(self, checkpoint: Checkpoint, linear: str) -> None:
        self.embeddings: Embeddings = checkpoint.load_embeddings()
        self.head: Head = checkpoint.load_head()
        self.span: BloomSpan = checkpoint.load_span(0, checkpoint.n_blocks, linear=linear)

    def logits(self, ids: Tensor) -> Tensor:
        """Shapes: ids [b, t]; returns [b, t, v]."""
        with torch.inference_mode():
            scores: Tensor = self.head(self.span(self.embeddings(ids)))
            return scores

    def draw(self, rows: int, tokens: int) -> Tensor:
        """Text of the model's own, at temperature 1: [rows, tokens]."""
        generator = torch.Generator().manual_seed(0)
        cache = KVCache.alone(self.span, rows, tokens)
        ids = torch.full((rows, 1), END)
        with torch.inference_mode():
            for position in range(tokens - 1):
                hidden = self.span(self.embeddings(ids[:, -1:]), cache, position)
                chances = self.head(hidden)[:, 0].softmax(dim=-1)  # [rows, v]
                ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
        return ids


def held_out(checkpoint: Checkpoint, text: Path | None, windows: int) -> tuple[Tensor, str]:
    """Token ids, [windows, context + 1], and what they are."""
    if text is None and (program := shutil.which("bible")) is not None:
        printed = subprocess.run(
            [program, "-f", "gen1:1-rev22:21"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / "kjv.txt"
            made.write_text(printed.stdout)
            return _windows(checkpoint, made, windows), "held-out chapters"
    if text is not None:
        return _windows(checkpoint, text, windows), "held-out chapters"
    return Model(checkpoint, "fp32").draw(windows, CONTEXT_TOKENS + 1), "text that the model drew"


def _windows(checkpoint: Checkpoint, text: Path, windows: int) -> Tensor:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint.file("tokenizer.json")))
    ids: list[int] = []
    for index, chapter in enumerate(read_chapters(text)):
        if index % 20 == 19:
            ids += [*tokenizer.encode(chapter).ids, END]
    usable = min(windows, (len(ids) - 1) // CONTEXT_TOKENS)
    return torch.tensor([ids[n * CONTEXT_TOKENS : (n + 1) * CONTEXT_TOKENS + 1] for n in range(usable)])


def measure(checkpoint: Checkpoint, ids: Tensor) -> list[Row]:
    exact_model = Model(checkpoint, "fp32")
    exact = [exact_model.logits(part[:, :-1]) for part in ids.split(WINDOWS_AT_ONCE)]
    rows: list[Row] = []
    for name in BACKENDS:
        report.progress(f"quality: {name}")
        model = Model(checkpoint, name)
        off = size = agree = loss = count = 0.0
        for part, expected in zip(ids.split(WINDOWS_AT_ONCE), exact, strict=True):
            scores = model.logits(part[:, :-1])  # [b, t, v]
            off += float((scores - expected).double().square().sum())
            size += float(expected.double().square().sum())
            agree += float((scores.argmax(dim=-1) == expected.argmax(dim=-1)).sum())
            loss += float(F.cross_entropy(scores.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
            count += part[:, 1:].numel()
        rows.append(
            Row(
                name=name,
                error=(off / size) ** 0.5,
                agreement=agree / count,
                loss=loss / count,
                added=loss / count - (rows[0].loss if rows else loss / count),
                megabytes=sum(layer.weight_bytes for layer in model.span.linears) / 1e6,
            )
        )
    return rows


def figures(rows: list[Row]) -> list[report.Figure]:
    made: list[report.Figure] = []
    for row in rows:
        made.append(report.figure(f"logits-error-{row.name}", [row.error], "relative", better="lower"))
        made.append(report.figure(f"argmax-{row.name}", [row.agreement], "of tokens", better="higher"))
        made.append(report.figure(f"loss-added-{row.name}", [row.added], "nats/token", better="lower"))
    return made


def main() -> None:
    parser: argparse.ArgumentParser = report.parser(__doc__)
    parser.add_argument("--text", type=Path, help="the text that bloom-tiny was trained on a part of")
    parser.add_argument("--windows", type=int, default=64, help=f"of {CONTEXT_TOKENS} tokens (default: 64)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = find_checkpoint("bloom-tiny")
    ids, what = held_out(checkpoint, options.text, options.windows)
    rows = measure(checkpoint, ids)
    if options.json:
        report.show("quality", figures(rows), as_json=True)
        return
    print(f"bloom-tiny, {ids[:, 1:].numel()} tokens of {what}")
    print(f"{'backend':<12} {'MB':>6} {'logits error':>13} {'same argmax':>12} {'loss':>8} {'added':>9}")
    for row in rows:
        print(
            f"{row.name:<12} {row.megabytes:>6.2f} {row.error:>13.2e} {row.agreement:>12.4f} "
            f"{row.loss:>8.4f} {row.added:>+9.5f}"
        )


if __name__ == "__main__":
    main()
