"""What hidden states cost on their way in each form, and what is lost: bloom-tiny, cut into four hops, as a session.

bytes-per-element-*: as sent, and with -zstd byte-shuffled and compressed (compute/compression.py); -one-block: the same
in one frame that does not begin a block with each plane; -unshuffled: neither. encode-*, decode-*: MB of float32 values
per second of one thread's own time, of what all hops of prompts send (256 tokens a message), and of single tokens.
error-*: of all that is sent, relative to its size. argmax-* and loss-added-*: as tests/bench/quality.py, for a client
that passes on what the hops send, from float32 nodes; on the same text.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import zstandard
from torch import Tensor

from compute.compression import LEVEL
from compute.models import find_checkpoint
from compute.models.train_bloom_tiny import CONTEXT_TOKENS
from compute.wire_forms import Account, Form, decode, encode
from tests.bench import report
from tests.bench.quality import Model, held_out

HOPS = 4
MOST_TIMED = 32  # messages


def session(model: Model, ids: Tensor, form: Form, account: Account) -> tuple[Tensor, list[Tensor]]:
    """Text through the hops, all that is sent in a form.

    Shapes:
        ids: [b, t]
        returns: logits [b, t, v]; what was sent, each [b, t, d]
    """
    per_hop = -(-len(model.span) // HOPS)
    sent: list[Tensor] = []

    def send(hidden: Tensor) -> Tensor:
        sent.append(hidden)
        fields, data = encode(hidden, form)
        received = decode(fields, data, form, hidden.shape, torch.float32)
        account.add(hidden.shape[0] * hidden.shape[1], memoryview(data).nbytes)
        account.add_error(hidden, received)
        return received

    with torch.inference_mode():
        hidden = model.embeddings(ids)
        for first in range(0, len(model.span), per_hop):
            hidden = send(model.span(send(hidden), None, 0, first, min(first + per_hop, len(model.span))))
        return model.head(hidden), sent


def quality(model: Model, ids: Tensor) -> list[report.Figure]:
    figures: list[report.Figure] = []
    exact: list[Tensor] = []
    least = 0.0
    for form in Form:
        report.progress(f"forms: what is lost in {form}")
        account, agree, loss, count = Account(form), 0.0, 0.0, 0
        for number, row in enumerate(ids.split(1)):
            scores, _ = session(model, row[:, :-1], form, account)
            if form is Form.FLOAT32:
                exact.append(scores)
            agree += float((scores.argmax(dim=-1) == exact[number].argmax(dim=-1)).sum())
            loss += float(F.cross_entropy(scores.flatten(0, 1), row[:, 1:].flatten(), reduction="sum"))
            count += row[:, 1:].numel()
        if form is Form.FLOAT32:
            least = loss
        figures += [
            report.figure(f"error-{form}", [account.relative_error or 0.0], "relative", better="lower"),
            report.figure(f"argmax-{form}", [agree / count], "of tokens", better="higher"),
            report.figure(f"loss-added-{form}", [(loss - least) / count], "nats/token", better="lower"),
        ]
    return figures


def sizes(form: Form, messages: list[Tensor]) -> list[report.Figure]:
    elements = sum(hidden.numel() for hidden in messages)
    totals = dict.fromkeys(("", "-zstd", "-one-block", "-unshuffled"), 0)
    codec = zstandard.ZstdCompressor(level=LEVEL)
    for hidden in messages:
        plain = np.frombuffer(encode(hidden, form)[1], np.uint8)
        start, planes = 0, []
        for part in form.parts(hidden.shape):
            planes.append(plain[start : start + part.n_bytes].reshape(part.count, part.item_bytes).T.tobytes())
            start += part.n_bytes
        totals[""] += plain.nbytes
        totals["-zstd"] += memoryview(encode(hidden, form, compressed=True)[1]).nbytes
        totals["-one-block"] += len(codec.compress(b"".join(planes)))
        totals["-unshuffled"] += len(codec.compress(plain.data))
    return [
        report.figure(f"bytes-per-element-{form}{name}", [total / elements], "bytes", better="lower")
        for name, total in totals.items()
    ]


def speeds(form: Form, messages: list[Tensor], name: str, runs: int) -> list[report.Figure]:
    figures: list[report.Figure] = []
    megabytes = 4 * sum(hidden.numel() for hidden in messages) / 1e6
    for suffix, compressed in (("", False), ("-zstd", True)):
        coded = [encode(hidden, form, compressed=compressed) for hidden in messages]

        def write(compressed: bool = compressed) -> None:
            for hidden in messages:
                encode(hidden, form, compressed=compressed)

        def read(coded: list[tuple[dict[str, object], memoryview | bytes | bytearray]] = coded) -> None:
            for hidden, (fields, data) in zip(messages, coded, strict=True):
                decode(fields, data, form, hidden.shape, torch.float32)

        for verb, work in (("encode", write), ("decode", read)):
            values = [megabytes / _seconds(work) for _ in range(runs)]
            figures.append(report.figure(f"{verb}-{form}{suffix}-{name}", values, "MB/s of values", better="higher"))
    return figures


def _seconds(work: Callable[[], None]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def main() -> None:
    parser: argparse.ArgumentParser = report.parser(__doc__)
    parser.add_argument("--text", type=Path, help="the text that bloom-tiny was trained on a part of")
    parser.add_argument("--windows", type=int, default=64, help=f"of {CONTEXT_TOKENS} tokens (default: 64)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = find_checkpoint("bloom-tiny")
    ids, what = held_out(checkpoint, options.text, options.windows)
    model = Model(checkpoint, "fp32")
    report.progress(f"forms: {ids[:, 1:].numel()} tokens of {what}")
    figures = quality(model, ids)
    prompts: list[Tensor] = []
    for row in ids.split(1):
        prompts += session(model, row[:, :-1], Form.FLOAT32, Account(Form.FLOAT32))[1]
    timed = prompts[:MOST_TIMED]
    tokens = [hidden[:, -1:].contiguous() for hidden in timed]
    for form in Form:
        report.progress(f"forms: size and speed of {form}")
        figures += sizes(form, prompts)
        figures += speeds(form, timed, "prompt", options.runs)
        figures += speeds(form, tokens, "token", options.runs)
    report.show("forms", figures, as_json=options.json)


if __name__ == "__main__":
    main()
