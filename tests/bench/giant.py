"""Blocks of BLOOM-176B's shape with random weights: what they take in memory and time.

On the CPU, blocks are written as a checkpoint in bfloat16 and loaded from there as a node loads them, then served by an
engine: giant-load-s, giant-peak-GB (the process's resident memory, which counts mapped files, too), giant-weights-GB,
giant-prefill-ms-per-token, and giant-decode-vs-floor: a step of one row after 256 tokens over the time that reading the
weights and the cache takes at the bandwidth measured beside it. With --device cuda, blocks are made on the device one
after another, and steps of 1, 8 and 32 rows are measured, as graphs where these can be recorded: giant-decode-vs-floor,
giant-batch-8-vs-1, -32-vs-1.

The whole model on one card of 141 GB: --device cuda --linear nf4 --blocks 70. --scale makes blocks narrower, to try the
benchmark out.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import trio
from safetensors.torch import save_file
from torch import Tensor

from compute.bloom import BloomBlock, BloomConfig, BloomSpan, Step, quantize
from compute.bloom.graphs import attach_graphs
from compute.cache import KVCache
from compute.checkpoint import Checkpoint
from compute.engine import Engine, EngineSettings
from compute.linear import BACKENDS
from tests.bench import report

HIDDEN, HEADS = 14_336, 112
VOCABULARY = 16  # embeddings are the client's
CONTEXT_TOKENS = 256
PREFILL_TOKENS = 128
ROWS = (1, 8, 32)
STEPS = 8
HEADROOM = 1.3  # of the file's size that has to be free on the disk
GB = 1e9

GOALS: dict[str, tuple[str, float | None, str]] = {
    "giant-decode-vs-floor": ("x floor", 1.4, "lower"),
    "giant-decode-ms": ("ms", None, "lower"),
    "giant-batch-8-vs-1": ("x one row", 1.3, "lower"),
    "giant-batch-32-vs-1": ("x one row", None, "lower"),
    "giant-prefill-ms-per-token": ("ms", None, "lower"),
    "giant-load-s": ("s", None, "lower"),
    "giant-weights-GB": ("GB", None, "lower"),
    "giant-peak-GB": ("GB", None, "lower"),
    "bandwidth-GB-per-s": ("GB/s", None, "higher"),
}
ON_GPU_ALONE = {"giant-decode-vs-floor", "giant-batch-8-vs-1"}  # these have a goal there, and are figures elsewhere


def make_config(scale: float, blocks: int) -> BloomConfig:
    heads = max(1, round(HEADS * scale))
    return BloomConfig(vocab_size=VOCABULARY, hidden_size=heads * HIDDEN // HEADS, n_layer=blocks, n_head=heads)


def random_tensors(config: BloomConfig, seed: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A block's, by name; each made where and as it is to be."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in BloomBlock(config).state_dict().items()}
    generator = torch.Generator(device).manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        if "layernorm" in name:
            made[name] = torch.full(shape, float(name.endswith("weight")), device=device, dtype=dtype)
        else:
            noise = torch.empty(shape, device=device, dtype=dtype)
            made[name] = noise.normal_(generator=generator) * config.hidden_size**-0.5
    return made


def write_checkpoint(folder: Path, config: BloomConfig) -> None:
    """One file for each block, in bfloat16."""
    weight_map: dict[str, str] = {}
    for index in range(config.n_layer):
        tensors = random_tensors(config, index, "cpu", torch.bfloat16)
        named = {f"transformer.h.{index}.{name}": tensor for name, tensor in tensors.items()}
        file = f"block-{index}.safetensors"
        save_file(named, folder / file)
        weight_map |= dict.fromkeys(named, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    content = {
        "model_type": "bloom",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
    }
    (folder / "config.json").write_text(json.dumps(content))


def on_device(config: BloomConfig, linear: str) -> BloomSpan:
    """Blocks made on the GPU, one unquantised at a time; norms, biases and hidden states in bfloat16."""
    blocks = []
    for index in range(config.n_layer):
        with torch.device("meta"):
            block = BloomBlock(config)
        block.load_state_dict(random_tensors(config, index, "cuda", torch.bfloat16), strict=True, assign=True)
        block.requires_grad_(False).eval()
        quantize(block, linear)
        blocks.append(block)
        report.progress(f"giant: block {index + 1} of {config.n_layer}")
    span = BloomSpan(config, 0, blocks)
    attach_graphs(span)
    return span


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], object], device: str) -> float:
    wait_for(device)
    began = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - began


def bandwidth(device: str, size: int) -> float:
    """Bytes per second of reading."""
    buffer = torch.ones(size // 4, device=device)
    vector = torch.ones(4096, device=device)
    matrix = buffer[: buffer.numel() // 4096 * 4096].view(-1, 4096)
    return buffer.nbytes / min(min(timed(buffer.sum, device), timed(lambda: matrix @ vector, device)) for _ in range(5))


def weight_bytes(span: BloomSpan) -> int:
    return sum(layer.weight_bytes for layer in span.linears)


def floor_s(span: BloomSpan, rows: int, speed: float) -> float:
    cache = rows * len(span) * 2 * CONTEXT_TOKENS * span.config.hidden_size * span.dtype.itemsize
    return (weight_bytes(span) + cache) / speed


def decode_s(span: BloomSpan, rows: int, device: str) -> float:
    """Seconds of a step of so many rows after ``CONTEXT_TOKENS`` tokens: the median."""
    cache = KVCache.alone(span, rows, CONTEXT_TOKENS + 1)
    hidden = torch.randn(rows, 1, span.config.hidden_size).to(device=device, dtype=span.dtype)
    with torch.inference_mode():
        step = Step(hidden, cache, CONTEXT_TOKENS)
        times = [timed(lambda: span.together([step]), device) for _ in range(STEPS + 1)]
    return sorted(times[1:])[STEPS // 2]


async def serve(span: BloomSpan, note: Callable[[str, float], None]) -> None:
    """A prompt and some steps through an engine, as a client's."""
    async with trio.open_nursery() as nursery:
        engine = Engine(span, EngineSettings(cache_tokens=4096))
        await nursery.start(engine.run)
        session = await engine.open_session(batch=1, max_length=1024)
        prompt = torch.randn(1, PREFILL_TOKENS, span.config.hidden_size)
        began = time.perf_counter()
        await engine.step(session, prompt, 0)
        note("giant-prefill-ms-per-token", (time.perf_counter() - began) * 1e3 / PREFILL_TOKENS)
        for position in range(PREFILL_TOKENS, PREFILL_TOKENS + STEPS):
            await engine.step(session, prompt[:, :1], position)
        nursery.cancel_scope.cancel()


def measure_cpu(options: argparse.Namespace, note: Callable[[str, float], None]) -> None:
    config = make_config(options.scale, options.blocks)
    size = 2 * config.parameters_per_block * config.n_layer
    with tempfile.TemporaryDirectory(prefix="raceme-giant-", dir=options.dir) as name:
        if shutil.disk_usage(name).free < HEADROOM * size:
            sys.exit(f"{name} has no room for {size / GB:.1f} GB; name another folder with --dir")
        report.progress(f"giant: writing {size / GB:.1f} GB")
        write_checkpoint(Path(name), config)
        report.progress("giant: loading")
        began = time.perf_counter()
        span = Checkpoint.open(Path(name)).load_span(0, config.n_layer, linear=options.linear)
        note("giant-load-s", time.perf_counter() - began)
    note("giant-weights-GB", weight_bytes(span) / GB)
    note("giant-peak-GB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB)
    report.progress("giant: serving")
    for _ in range(options.runs):
        trio.run(serve, span, note)
        measure_steps(span, ROWS[:1], "cpu", note)


def measure_gpu(options: argparse.Namespace, note: Callable[[str, float], None]) -> None:
    config = make_config(options.scale, options.blocks)
    began = time.perf_counter()
    span = on_device(config, options.linear)
    note("giant-load-s", time.perf_counter() - began)
    note("giant-weights-GB", weight_bytes(span) / GB)
    note("giant-peak-GB", torch.cuda.max_memory_allocated() / GB)
    for _ in range(options.runs):
        measure_steps(span, ROWS, "cuda", note)


def measure_steps(span: BloomSpan, rows: Sequence[int], device: str, note: Callable[[str, float], None]) -> None:
    speed = bandwidth(device, min(2 << 30, max(64 << 20, weight_bytes(span))))
    seconds = {each: decode_s(span, each, device) for each in rows}
    note("bandwidth-GB-per-s", speed / GB)
    note("giant-decode-ms", seconds[1] * 1e3)
    note("giant-decode-vs-floor", seconds[1] / floor_s(span, 1, speed))
    for each in rows[1:]:
        note(f"giant-batch-{each}-vs-1", seconds[each] / seconds[1])


def main() -> None:
    parser: argparse.ArgumentParser = report.parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--linear", choices=BACKENDS, help="(default: fp16 on the CPU, nf4 on the GPU)")
    parser.add_argument("--blocks", type=int, default=1, help="how many (default: 1; the model has 70)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the width (default: 1)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--dir", help="where the checkpoint is written meanwhile (default: the temporary folder)")
    options = parser.parse_args()
    if not (0 < options.scale <= 1 and math.isfinite(options.scale) and options.blocks >= 1 and options.runs >= 1):
        parser.error("--scale is above 0 and at most 1; --blocks and --runs are at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use")
    options.linear = options.linear or ("fp16" if options.device == "cpu" else "nf4")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    values: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        values.setdefault(name, []).append(value)

    (measure_cpu if options.device == "cpu" else measure_gpu)(options, note)
    figures = []
    for name, (unit, goal, better) in GOALS.items():
        if name in values:
            wanted = None if options.device == "cpu" and name in ON_GPU_ALONE else goal
            figures.append(report.figure(name, values[name], unit, better=better, goal=wanted))
    report.show("giant", figures, as_json=options.json)


if __name__ == "__main__":
    main()
