"""What a block costs: against the memory's bandwidth, against transformers, against bitsandbytes; all in one run.

decode-*-vs-floor: a step of one row after 256 tokens, over the time that reading the weights and the cache takes at the
bandwidth measured beside it (a sum over as many bytes, or a product with a vector, whichever is faster). More blocks
than a processor's caches hold are run in turn, as in a model; weights and what is read beside them are in huge pages,
as a node has its weights. decode-560m-fp32-vs-transformers: the same step, packed float32 against transformers' blocks
with its cache.
backward-vs-forward: gradients of 128 tokens with the forward recomputed, as a node does it, over the forward alone.
overhead-ms-per-block: a step at hidden size 64, where there is next to nothing to compute. prefill-chunked: 1,024
tokens in chunks of 256 over the same at once. nf4-vs-bitsandbytes: the library's time for one row of 7b1's widest layer
over ours, same bits (-560m: of 560m's, whose weights written out just fit into what malloc hands back without asking
the system); -bf16: its other path, which rounds activations to bfloat16, where the processor has that.

batch-16-gain: tokens a second of sixteen sessions of 32 to 480 tokens on one engine, which step at once, over those of
one with 256, in the form of weights that a node takes here; step-p95-16-vs-1: the 95th percentile of the steps of
sixteen over that of one.
loop-latency-p99-ms: by how much the event loop is late beside sixteen sessions, prefill and backward, all without a
pause. engine-overhead-ms: what a step of a lone session takes beyond the model.

Random weights in the shapes of bloom-560m and bloom-7b1; --scale makes all shapes smaller, to try the benchmark out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import torch
import trio
from torch import Tensor, nn

from compute.batch import Work
from compute.bloom import BloomBlock, BloomConfig, BloomSpan, quantize
from compute.cache import KVCache
from compute.engine import Engine, EngineSettings
from compute.estimates import Kind
from compute.huge_pages import use_huge_pages
from compute.linear import backend
from compute.probe import probe
from tests.bench import report

CONTEXT_TOKENS = 256
STEPS = 6  # of a run; the median counts
TRAIN_TOKENS = 128
MANY = 16  # sessions
PREFILL_TOKENS = 1024
CHUNK_TOKENS = 256
COLD_BYTES = 600 << 20  # of weights run in turn

GOALS: dict[str, tuple[str, float | None, str]] = {
    "decode-560m-fp16-vs-floor": ("x floor", 1.3, "lower"),
    "decode-7b1-fp16-vs-floor": ("x floor", 1.3, "lower"),
    "decode-560m-fp32-vs-transformers": ("x transformers", 1.0, "lower"),
    "backward-vs-forward": ("x forward", 2.2, "lower"),
    "backward-vs-forward-fp32": ("x forward", None, "lower"),
    "overhead-ms-per-block": ("ms", 0.25, "lower"),
    "prefill-chunked": ("x unchunked", 1.15, "lower"),
    "nf4-vs-bitsandbytes": ("x faster", 4.0, "higher"),
    "nf4-vs-bitsandbytes-560m": ("x faster", None, "higher"),
    "nf4-vs-bitsandbytes-bf16": ("x faster", None, "higher"),
    "nf4-vs-bitsandbytes-bf16-560m": ("x faster", None, "higher"),
    "batch-16-gain": ("x tokens/s of one", 4.0, "higher"),
    "step-p95-16-vs-1": ("x p95 of one", 4.5, "lower"),
    "loop-latency-p99-ms": ("ms", 20.0, "lower"),
    "engine-overhead-ms": ("ms", None, "lower"),
    "decode-560m-fp16-ms-per-block": ("ms", None, "lower"),
    "decode-560m-fp32-ms-per-block": ("ms", None, "lower"),
    "decode-7b1-fp16-ms-per-block": ("ms", None, "lower"),
    "bandwidth-GB-per-s": ("GB/s", None, "higher"),
}
SHAPES = {"560m": (1024, 16), "7b1": (4096, 32)}  # hidden size, heads


def make_config(name: str, blocks: int, scale: float) -> BloomConfig:
    hidden, heads = SHAPES[name]
    hidden = max(64, int(hidden * scale) // (4 * heads) * 4 * heads)
    return BloomConfig(vocab_size=16, hidden_size=hidden, n_layer=blocks, n_head=heads)


def make_block(config: BloomConfig, seed: int = 0) -> BloomBlock:
    """One with random weights."""
    generator = torch.Generator().manual_seed(seed)
    block = BloomBlock(config).requires_grad_(False).eval()
    for name, parameter in block.named_parameters():
        if "layernorm" not in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * config.hidden_size**-0.5)
    return block


def make_span(name: str, linear: str, scale: float, blocks: int | None = None) -> BloomSpan:
    """Enough blocks to fill ``COLD_BYTES``, one unquantised at a time; in huge pages, as a node has them."""
    each = 12 * make_config(name, 1, scale).hidden_size ** 2 * {"fp32": 4, "fp16": 2}[linear]
    blocks = blocks or max(2, min(24, round(COLD_BYTES * scale / each)))
    config = make_config(name, blocks, scale)
    made = []
    for seed in range(blocks):
        block = make_block(config, seed)
        quantize(block, linear)
        made.append(block)
    use_huge_pages()
    return BloomSpan(config, 0, made)


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Decoding:
    """A span with a session of 256 tokens."""

    def __init__(self, span: BloomSpan) -> None:
        self.span = span
        self.length = CONTEXT_TOKENS
        self.cache = KVCache.alone(span, 1, CONTEXT_TOKENS + 1)
        with torch.inference_mode():
            for index, layer in enumerate(self.cache.own.layers):
                for part in layer:
                    part.normal_(generator=torch.Generator().manual_seed(index))
        self.hidden = normal(1, 1, span.config.hidden_size)

    def step(self) -> None:
        """Always the same one, so that every run has the same work."""
        with torch.inference_mode():
            self.span(self.hidden, self.cache, self.length)

    @property
    def bytes_read(self) -> int:
        weights = sum(layer.weight_bytes for layer in self.span.linears)
        return weights + len(self.span) * 2 * self.length * self.span.config.hidden_size * 4


def floor_of(decoding: Decoding, buffer: Tensor) -> tuple[float, float]:
    """Seconds that one step's bytes take to be read, and bytes per second."""
    matrix, vector = buffer[: buffer.numel() // 4096 * 4096].view(-1, 4096), torch.ones(4096)
    seconds = min(min(timed(lambda: buffer.sum()), timed(lambda: matrix @ vector)) for _ in range(3))
    return decoding.bytes_read / (buffer.nbytes / seconds), buffer.nbytes / seconds


class Theirs:
    """transformers' blocks with the weights of ours and their own cache of 256 tokens."""

    def __init__(self, config: BloomConfig, blocks: int) -> None:
        from transformers import BloomConfig as TheirConfig
        from transformers import BloomModel, DynamicCache

        made = TheirConfig(
            vocab_size=16, hidden_size=config.hidden_size, n_layer=blocks, n_head=config.n_head, use_cache=True
        )
        self.model = BloomModel(made).eval().requires_grad_(False)
        for seed, block in enumerate(self.model.h):
            block.load_state_dict(make_block(config, seed).state_dict())
        self.cache = DynamicCache(config=made)
        for index in range(blocks):
            shape = (1, config.n_head, CONTEXT_TOKENS, config.head_dim)
            self.cache.update(normal(*shape), normal(*shape), index)
        self.hidden = normal(1, 1, config.hidden_size)
        self.model.word_embeddings_layernorm = nn.Identity()
        self.model.ln_f = nn.Identity()

    def step(self) -> None:
        with torch.inference_mode():
            self.model(inputs_embeds=self.hidden, past_key_values=self.cache, use_cache=True)


def measure_decode(note: Callable[[str, float], None], name: str, scale: float, runs: int) -> None:
    decoding = Decoding(make_span(name, "fp16", scale))
    buffer = torch.ones(decoding.bytes_read // 4)
    use_huge_pages()  # the floor is no higher than it could be
    decoding.step()
    for _ in range(runs):
        floor_s, bandwidth = floor_of(decoding, buffer)
        took_s = median([timed(decoding.step) for _ in range(STEPS)])
        after_s, _ = floor_of(decoding, buffer)
        note(f"decode-{name}-fp16-vs-floor", took_s / min(floor_s, after_s))
        note(f"decode-{name}-fp16-ms-per-block", took_s / len(decoding.span) * 1e3)
        if name == "560m":
            note("bandwidth-GB-per-s", bandwidth / 1e9)


def measure_against_transformers(note: Callable[[str, float], None], scale: float, runs: int) -> None:
    span = make_span("560m", "fp32", scale)
    ours, theirs = Decoding(span), Theirs(span.config, len(span))
    ours.step()
    theirs.step()
    for _ in range(runs):
        pairs = [(timed(ours.step), timed(theirs.step)) for _ in range(STEPS)]
        mine = median([pair[0] for pair in pairs])
        note("decode-560m-fp32-vs-transformers", mine / median([pair[1] for pair in pairs]))
        note("decode-560m-fp32-ms-per-block", mine / len(span) * 1e3)


def measure_backward(note: Callable[[str, float], None], scale: float, runs: int) -> None:
    for figure, linear in (("backward-vs-forward", "fp16"), ("backward-vs-forward-fp32", "fp32")):
        span = make_span("560m", linear, scale, blocks=3)
        hidden = normal(1, TRAIN_TOKENS, span.config.hidden_size)
        upstream = torch.ones_like(hidden)

        def forward(span: BloomSpan = span, hidden: Tensor = hidden) -> None:
            with torch.inference_mode():
                span(hidden)

        def backward(span: BloomSpan = span, hidden: Tensor = hidden, upstream: Tensor = upstream) -> None:
            leaf = hidden.clone().requires_grad_(True)
            span(leaf).backward(upstream)

        forward()
        backward()
        for _ in range(runs):
            pairs = [(timed(backward), timed(forward)) for _ in range(STEPS)]
            note(figure, median([pair[0] for pair in pairs]) / median([pair[1] for pair in pairs]))


def measure_overhead(note: Callable[[str, float], None], runs: int) -> None:
    config = BloomConfig(vocab_size=16, hidden_size=64, n_layer=24, n_head=4)
    span = BloomSpan(config, 0, [make_block(config, seed) for seed in range(24)])
    quantize(span, "fp16")
    decoding = Decoding(span)
    decoding.step()
    for _ in range(runs):
        note("overhead-ms-per-block", median([timed(decoding.step) for _ in range(20)]) / len(span) * 1e3)


class Sessions:
    """Sessions on an engine, which have some tokens each (zeros, which take as long as any), and step at once."""

    def __init__(self, engine: Engine, lengths: Sequence[int]) -> None:
        self.engine = engine
        self.lengths = lengths
        self.hidden = normal(1, 1, engine.span.config.hidden_size)
        self.keys: list[int] = []

    async def open(self) -> None:
        for number, length in enumerate(self.lengths):
            key = await self.engine.open_session(batch=1, max_length=2048, peer=number)
            slots, now = self.engine._slots, trio.current_time()
            change = slots.reserve(key, 0, length, now)
            self.engine._follow(change, Work(kind=Kind.DECODE, span=self.engine.span, hidden=self.hidden))
            slots.commit(key, length, now)
            self.keys.append(key)

    async def step(self, steps: int) -> tuple[float, list[float]]:
        """Each session's steps one after another, all sessions at once: seconds in all, and of each step."""
        took_s: list[float] = []

        async def talk(key: int, length: int) -> None:
            for _ in range(steps):  # always the same one, so that every run has the same work
                began = time.perf_counter()
                await self.engine.step(key, self.hidden, length)
                took_s.append(time.perf_counter() - began)

        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for key, length in zip(self.keys, self.lengths, strict=True):
                nursery.start_soon(talk, key, length)
        return time.perf_counter() - began, took_s


async def loop_latency(seconds: float) -> list[float]:
    """By how much the event loop is late, every millisecond."""
    late: list[float] = []
    ends = time.perf_counter() + seconds
    while (now := time.perf_counter()) < ends:
        await trio.sleep(0.001)
        late.append(time.perf_counter() - now - 0.001)
    return late


async def measure_engine(note: Callable[[str, float], None], scale: float, runs: int) -> None:
    """Sixteen sessions of ragged lengths against one; and the loop beside steps, prefill and training."""
    span = make_span("560m", probe(make_config("560m", 1, scale), None).chosen, scale)
    least = CONTEXT_TOKENS // 8
    lengths = [least + round(2 * (CONTEXT_TOKENS - least) * number / (MANY - 1)) for number in range(MANY)]
    async with trio.open_nursery() as nursery:
        engine = Engine(span, EngineSettings(cache_tokens=1 << 16))
        await nursery.start(engine.run)
        one, many = Sessions(engine, [CONTEXT_TOKENS]), Sessions(engine, lengths)
        for sessions in (one, many):
            await sessions.open()
            await sessions.step(2)
        for _ in range(runs):
            (lone_s, lone_steps), (all_s, all_steps) = await one.step(4 * STEPS), await many.step(STEPS)
            note("batch-16-gain", (MANY * STEPS / all_s) / (4 * STEPS / lone_s))
            note("step-p95-16-vs-1", percentile(all_steps, 0.95) / percentile(lone_steps, 0.95))

        async def load(work: Callable[[], Awaitable[object]]) -> None:
            while True:
                await work()

        prompt = normal(1, 1024, span.config.hidden_size)
        prefills = await engine.open_session(batch=1, max_length=1024, peer="prefill")
        async with trio.open_nursery() as loads:
            loads.start_soon(load, partial(many.step, 1))
            loads.start_soon(load, partial(engine.step, prefills, prompt, 0))
            loads.start_soon(load, partial(engine.backward, prompt[:, :128], prompt[:, :128], peer="training"))
            await trio.sleep(1.0)
            for _ in range(runs):
                note("loop-latency-p99-ms", percentile(await loop_latency(3.0), 0.99) * 1e3)
            loads.cancel_scope.cancel()
        nursery.cancel_scope.cancel()


async def measure_engine_overhead(note: Callable[[str, float], None], runs: int) -> None:
    """What a step of a lone session takes beyond the model, where that takes next to nothing."""
    config = BloomConfig(vocab_size=16, hidden_size=64, n_layer=1, n_head=4)
    span = BloomSpan(config, 0, [make_block(config)])
    quantize(span, "fp16")
    async with trio.open_nursery() as nursery:
        engine = Engine(span)
        await nursery.start(engine.run)
        lone = Sessions(engine, [CONTEXT_TOKENS])
        await lone.open()
        await lone.step(100)
        for _ in range(runs):
            before = engine.stats.busy_s
            _, steps = await lone.step(300)
            note("engine-overhead-ms", (median(steps) - (engine.stats.busy_s - before) / 300) * 1e3)
        nursery.cancel_scope.cancel()


def measure_prefill(note: Callable[[str, float], None], scale: float, runs: int) -> None:
    span = make_span("560m", "fp16", scale, blocks=2)
    hidden = normal(1, PREFILL_TOKENS, span.config.hidden_size)

    def prefill(chunk: int) -> None:
        cache = KVCache.alone(span, 1, PREFILL_TOKENS)
        with torch.inference_mode():
            for start in range(0, PREFILL_TOKENS, chunk):
                span(hidden[:, start : start + chunk], cache, start)

    prefill(CHUNK_TOKENS)
    prefill(PREFILL_TOKENS)
    for _ in range(runs):
        pairs = [(timed(lambda: prefill(CHUNK_TOKENS)), timed(lambda: prefill(PREFILL_TOKENS))) for _ in range(3)]
        note("prefill-chunked", median([pair[0] for pair in pairs]) / median([pair[1] for pair in pairs]))


def measure_nf4(note: Callable[[str, float], None], shape: str, scale: float, runs: int) -> None:
    """The widest layer of a block."""
    config = make_config(shape, 1, scale)
    width, wide = config.hidden_size, 4 * config.hidden_size
    weight, bias, x = normal(wide, width), normal(wide), normal(1, width)
    layer = backend("nf4").pack(weight, bias)
    import bitsandbytes  # by now without what it says on some processors

    suffix = "" if shape == "7b1" else f"-{shape}"
    quantized, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    module: Any = bitsandbytes.nn.Linear4bit(width, wide, quant_type="nf4", compress_statistics=False)
    module.load_state_dict({"weight": weight, "bias": bias})
    module = module.to("cpu").eval().requires_grad_(False)

    def ours() -> None:
        with torch.inference_mode():
            layer(x)

    def theirs() -> None:
        with torch.inference_mode():
            bitsandbytes.matmul_4bit(x, quantized, quant_state=state, bias=bias)

    def other() -> None:
        with torch.no_grad():
            module(x)

    has_other = bitsandbytes.functional.has_avx512bf16()
    ours()
    theirs()
    if has_other:
        other()
    for _ in range(runs):
        trios = [(timed(ours), timed(theirs), timed(other) if has_other else 0.0) for _ in range(15)]
        mine = median([trio[0] for trio in trios])
        note(f"nf4-vs-bitsandbytes{suffix}", median([trio[1] for trio in trios]) / mine)
        if has_other:
            note(f"nf4-vs-bitsandbytes-bf16{suffix}", median([trio[2] for trio in trios]) / mine)


def measure(scale: float, runs: int) -> list[report.Figure]:
    values: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        values.setdefault(name, []).append(value)

    with torch.no_grad():
        for name in SHAPES:
            report.progress(f"compute: decode {name}")
            measure_decode(note, name, scale, runs)
        report.progress("compute: decode against transformers")
        measure_against_transformers(note, scale, runs)
    report.progress("compute: backward")
    measure_backward(note, scale, runs)
    with torch.no_grad():
        report.progress("compute: sessions on an engine")
        trio.run(measure_engine, note, scale, runs)
        report.progress("compute: overhead, prefill, nf4")
        trio.run(measure_engine_overhead, note, runs)
        measure_overhead(note, runs)
        measure_prefill(note, scale, runs)
        for name in SHAPES:
            measure_nf4(note, name, scale, runs)
    return [
        report.figure(name, values[name], unit, better=better, goal=goal)
        for name, (unit, goal, better) in GOALS.items()
        if name in values
    ]


def main() -> None:
    parser: argparse.ArgumentParser = report.parser(__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of the shapes' widths (default: 1)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    report.show("compute", measure(options.scale, options.runs), as_json=options.json)


if __name__ == "__main__":
    main()
