"""What users train within blocks: its form, its parts, and gradients that are those of transformers."""

from __future__ import annotations

import hashlib
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compute.bloom import BloomConfig, BloomSpan, quantize
from compute.bloom.tuned import BlockTuning
from compute.checkpoint import Checkpoint
from compute.engine import EngineSettings
from compute.errors import BadInput
from compute.tuning import MAX_PROMPTS, MAX_RANK, TARGETS, SpanTuning, TuningForm, tuning_key
from tests.checkpoints import make_checkpoint, make_model
from tests.unit.engines import CONFIG, hidden_states, make_span, running
from tests.unit.tunings import ALL, BOTH, FORMS, PROMPTS, QKV, make_tuning

MAX_ERROR = 1e-5  # relative: what has been set as the goal
LAYERS, HIDDEN = 3, 48


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative, of the whole tensor."""
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


# Forms

forms = st.builds(
    lambda rank, scale, targets, prompts: TuningForm(
        rank=rank if targets else 0,
        scale=scale,
        targets=tuple(name for name in TARGETS if name in targets),
        prompts=prompts,
    ),
    st.integers(1, MAX_RANK),
    st.floats(-100, 100),
    st.sets(st.sampled_from(TARGETS)),
    st.integers(0, MAX_PROMPTS),
)


@given(forms, st.integers(0, 2), st.integers(1, 3))
def test_a_form_says_how_much_there_is(form: TuningForm, start: int, count: int) -> None:
    config = BloomConfig(vocab_size=8, hidden_size=8, n_layer=5, n_head=2)
    shapes = form.shapes(config, start, start + count)
    assert form.n_elements(config, start, start + count) == sum(torch.Size(shape).numel() for _, shape in shapes)
    assert len(dict(shapes)) == len(shapes) == count * (bool(form.prompts) + 2 * len(form.targets))
    assert TuningForm.from_fields(form.to_fields() | {"id": 3}) == form


@given(
    st.dictionaries(
        st.sampled_from(["rank", "scale", "targets", "prompts"]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.sampled_from(["", "3", "dense"])
        | st.lists(st.sampled_from(TARGETS) | st.integers() | st.lists(st.none()), max_size=5),
    )
)
def test_anything_else_is_refused_in_one_way(fields: dict[str, Any]) -> None:
    try:
        form = TuningForm.from_fields(fields)
    except BadInput as refused:
        assert refused.code == "bad-value"
    else:
        assert TuningForm.from_fields(form.to_fields()) == form
        assert form.rank <= MAX_RANK and form.prompts <= MAX_PROMPTS


@pytest.mark.parametrize(
    "values",
    [
        {"rank": MAX_RANK + 1, "targets": TARGETS},
        {"rank": -1, "targets": TARGETS},
        {"rank": 2},
        {"targets": TARGETS},
        {"rank": 2, "targets": ("dense", "query_key_value")},
        {"rank": 2, "targets": ("dense", "dense")},
        {"rank": 2, "targets": ("lm_head",)},
        {"prompts": MAX_PROMPTS + 1},
        {"prompts": True},
        {"scale": float("nan")},
        {"scale": float("inf")},
    ],
)
def test_forms_have_bounds(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rank|targets|prompts|scale"):
        TuningForm(**values)


# Tensors


def test_in_one_piece_it_is_as_written() -> None:
    form = TuningForm(rank=2, scale=2.0, targets=("query_key_value", "dense_4h_to_h"), prompts=3)
    d = CONFIG.hidden_size
    shapes = form.shapes(CONFIG, 1, 3)
    assert shapes[:6] == [
        ("prompts.1", (3, d)),
        ("lora.1.query_key_value.a", (2, d)),
        ("lora.1.query_key_value.b", (3 * d, 2)),
        ("lora.1.dense_4h_to_h.a", (2, 4 * d)),
        ("lora.1.dense_4h_to_h.b", (d, 2)),
        ("prompts.2", (3, d)),
    ]
    tuning = make_tuning(form, start=1)
    assert list(tuning.tensors) == [name for name, _ in shapes]
    assert torch.equal(SpanTuning.from_flat(form, CONFIG, 1, 3, tuning.flat()).flat(), tuning.flat())
    assert torch.equal(tuning.flat()[: 3 * d].view(3, d), tuning.tensors["prompts.1"])
    middle = tuning.part(2, 3)
    assert torch.equal(middle.flat(), tuning.flat()[len(tuning.flat()) // 2 :])
    assert tuning.part(1, 3) is tuning
    for start, end in ((0, 3), (1, 4), (2, 2)):
        with pytest.raises(ValueError, match="not within"):
            tuning.part(start, end)


def test_a_key_names_form_blocks_and_numbers() -> None:
    tuning = make_tuning(BOTH)
    others = [
        make_tuning(BOTH, seed=1),
        make_tuning(BOTH, end=2),
        make_tuning(TuningForm(rank=2, scale=1.0, targets=BOTH.targets, prompts=3)),
        SpanTuning.from_flat(BOTH, CONFIG, 0, 2, tuning.part(1, 3).flat()),
        tuning.part(1, 3),
    ]
    assert len({each.key for each in (tuning, *others)}) == 6
    assert make_tuning(BOTH).key == tuning.key
    numbers = tuning.flat().numpy().astype("<f4").tobytes()
    assert tuning_key(BOTH, 0, 3, [numbers[:5], numbers[5:]]) == tuning.key
    told = b"raceme-tuning:2:0x1.8000000000000p+0:dense,dense_4h_to_h:3:0:3:"
    assert tuning.key == hashlib.sha256(told + numbers).digest()


def test_what_does_not_fit_is_refused() -> None:
    count = QKV.n_elements(CONFIG, 0, 3)
    for flat, start, end, code in (
        (torch.zeros(count + 1), 0, 3, "bad-shape"),
        (torch.zeros(1, count), 0, 3, "bad-shape"),
        (torch.zeros(count, dtype=torch.float64), 0, 3, "bad-dtype"),
        (torch.zeros(count), 1, 4, "bad-value"),
        (torch.zeros(0), 2, 2, "bad-value"),
    ):
        with pytest.raises(BadInput) as caught:
            SpanTuning.from_flat(QKV, CONFIG, start, end, flat)
        assert caught.value.code == code
    good = dict(make_tuning(QKV).tensors)
    for tensors in (
        {name: tensor for name, tensor in good.items() if not name.startswith("lora.1")},
        good | {"prompts.0": torch.zeros(1)},
        good | {"lora.0.query_key_value.a": torch.zeros(4, CONFIG.hidden_size, dtype=torch.bfloat16)},
    ):
        with pytest.raises(ValueError, match=r"tuning of|expected float32"):
            SpanTuning(QKV, 0, 3, tensors)
    assert SpanTuning.from_flat(TuningForm(), CONFIG, 0, 3, torch.zeros(0)).flat().shape == (0,)


# Prompts


@given(
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 6),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_prompts_are_where_they_are_in_one_step(
    rows: int, tokens: int, count: int, cuts: list[int], random: random.Random, padded: bool
) -> None:
    pads = torch.tensor([random.randrange(tokens) for _ in range(rows)]) if padded else None
    hidden = torch.randn(rows, tokens, 4, generator=torch.Generator().manual_seed(1))
    prompts = torch.randn(count, 4, generator=torch.Generator().manual_seed(2))
    expected = hidden.clone()
    for row in range(rows):
        first = 0 if pads is None else int(pads[row])
        for place in range(min(count, tokens - first)):
            expected[row, first + place] += prompts[place]
    block = BlockTuning(prompts)
    assert torch.equal(block.begin(hidden, 0, pads), expected)
    pieces: list[Tensor] = []
    start = 0
    while start < tokens:
        end = min(tokens, start + cuts[len(pieces) % len(cuts)])
        pieces.append(block.begin(hidden[:, start:end], start, pads))
        start = end
    assert torch.equal(torch.cat(pieces, dim=1), expected)


# Gradients


class Reference:
    """The blocks of a transformers model in float64, with matrices and prompts put in by hand."""

    def __init__(self, tuning: SpanTuning, post_layernorm: bool) -> None:
        self.model = make_model(layers=LAYERS, hidden=HIDDEN, post_layernorm=post_layernorm).double()
        self.leaves = {name: tensor.double().requires_grad_(True) for name, tensor in tuning.tensors.items()}
        form = tuning.form
        for number in range(tuning.start, tuning.end):
            block = self.model.transformer.h[number]
            if form.prompts:
                block.register_forward_pre_hook(partial(self._prompted, self.leaves[f"prompts.{number}"]))
            for target in form.targets:
                layer = getattr(block.mlp if "h_to" in target else block.self_attention, target)
                assert isinstance(layer, nn.Linear)
                a, b = (self.leaves[f"lora.{number}.{target}.{side}"] for side in "ab")
                layer.register_forward_hook(partial(self._adapted, a, b, form.scale))

    @staticmethod
    def _prompted(prompts: Tensor, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = given[0].clone()
        first = hidden[:, : len(prompts)]
        hidden[:, : len(prompts)] = first + prompts[: first.shape[1]]
        return (hidden, *given[1:])

    @staticmethod
    def _adapted(
        a: Tensor, b: Tensor, scale: float, module: nn.Module, given: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        return output + scale * (given[0] @ a.t() @ b.t())

    def run(self, hidden: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, gradient of the input, gradient of the tuning in one piece."""
        leaf = hidden.double().requires_grad_(True)
        outputs: list[Tensor] = []
        transformer = self.model.transformer
        transformer.word_embeddings_layernorm.register_forward_hook(lambda *_: leaf)
        transformer.ln_f.register_forward_pre_hook(lambda _, given: outputs.append(given[0]))
        transformer(torch.zeros(hidden.shape[:2], dtype=torch.int64))
        outputs[0].backward(upstream.double())
        assert leaf.grad is not None
        gradients = [each.grad.reshape(-1) for each in self.leaves.values() if each.grad is not None]
        return outputs[0].detach(), leaf.grad, torch.cat(gradients)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("linear", [None, "fp32"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("post_layernorm", [False, True])
async def test_gradients_are_those_of_transformers(
    tmp_path: Path, form: TuningForm, linear: str | None, post_layernorm: bool
) -> None:
    folder = make_checkpoint(tmp_path, layers=LAYERS, hidden=HIDDEN, post_layernorm=post_layernorm, tokenizer=False)
    span = Checkpoint.open(folder).load_span(0, LAYERS)
    if linear is not None:
        quantize(span, linear)
    config = span.config
    tuning = make_tuning(form, config=config, size=0.1)  # larger ones magnify every rounding
    hidden, upstream = normal(3, 9, HIDDEN), normal(3, 9, HIDDEN, seed=2)
    expected, input_gradient, tuning_gradient = Reference(tuning, post_layernorm).run(hidden, upstream)

    leaf = hidden.clone().requires_grad_(True)
    leaves = {name: tensor.clone().requires_grad_(True) for name, tensor in tuning.tensors.items()}
    output = span(leaf, tuning=SpanTuning(form, 0, LAYERS, leaves))
    output.backward(upstream)
    assert leaf.grad is not None
    assert error(output.detach(), expected) < MAX_ERROR
    assert error(leaf.grad, input_gradient) < MAX_ERROR
    flat = torch.cat([each.grad.reshape(-1) for each in leaves.values() if each.grad is not None])
    assert error(flat, tuning_gradient) < MAX_ERROR

    async with running(span, EngineSettings(chunk_tokens=18)) as engine:  # two sequences, and one
        given = await engine.forward(hidden, tuning=tuning)
        gradients = await engine.backward(hidden, upstream, tuning=tuning)
    assert error(given, expected) < MAX_ERROR
    assert error(gradients.hidden, input_gradient) < MAX_ERROR
    assert gradients.tuning is not None and gradients.tuning.dtype == torch.float32
    assert error(gradients.tuning, tuning_gradient) < MAX_ERROR
    ours = SpanTuning.from_flat(form, config, 0, LAYERS, gradients.tuning).tensors
    theirs = SpanTuning.from_flat(form, config, 0, LAYERS, tuning_gradient.float()).tensors
    assert all(error(ours[name], theirs[name]) < MAX_ERROR for name in ours)


@pytest.mark.parametrize("tokens", [1, 4])
async def test_prompts_longer_than_the_text(tokens: int) -> None:
    span, tuning = make_span(), make_tuning(PROMPTS)
    hidden, upstream = hidden_states(2, tokens), hidden_states(2, tokens, seed=2)
    async with running(span) as engine:
        gradients = await engine.backward(hidden, upstream, tuning=tuning)
    assert gradients.tuning is not None
    parts = SpanTuning.from_flat(PROMPTS, CONFIG, 0, 3, gradients.tuning).tensors
    assert all(not each[tokens:].any() and each[:tokens].all() for each in parts.values())
    torch.testing.assert_close(parts["prompts.0"][:tokens], gradients.hidden.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
async def test_parts_one_after_another_are_the_whole(form: TuningForm) -> None:
    tuning, hidden, upstream = make_tuning(form), hidden_states(2, 7), hidden_states(2, 7, seed=2)
    async with running(make_span()) as engine:
        whole = await engine.backward(hidden, upstream, tuning=tuning)
        expected = await engine.forward(hidden, tuning=tuning)
        between = await engine.forward(hidden, end=1, tuning=tuning)  # a tuning of more blocks than are asked for
        assert torch.equal(await engine.forward(between, start=1, tuning=tuning.part(1, 3)), expected)
        second = await engine.backward(between, upstream, start=1, tuning=tuning.part(1, 3))
        first = await engine.backward(hidden, second.hidden, end=1, tuning=tuning)
    assert torch.equal(first.hidden, whole.hidden)
    assert first.tuning is not None and second.tuning is not None and whole.tuning is not None
    assert torch.equal(torch.cat([first.tuning, second.tuning]), whole.tuning)


async def test_without_one_there_is_no_gradient_of_one_and_nothing_is_the_same_as_none() -> None:
    hidden, upstream = hidden_states(2, 7), hidden_states(2, 7, seed=2)
    nothing = SpanTuning.from_flat(TuningForm(), CONFIG, 0, 3, torch.zeros(0))
    async with running(make_span()) as engine:
        plain = await engine.backward(hidden, upstream)
        empty = await engine.backward(hidden, upstream, tuning=nothing)
        zero = await engine.forward(hidden, tuning=make_tuning(ALL, size=0.0))
        assert torch.equal(zero, await engine.forward(hidden))
    assert plain.tuning is None and empty.tuning is not None and empty.tuning.shape == (0,)
    assert torch.equal(plain.hidden, empty.hidden)


async def test_the_weights_stay_as_they_are() -> None:
    span = make_span(linear=None)
    before = {name: each.clone() for name, each in span.state_dict().items()}
    tuning, hidden, upstream = make_tuning(ALL), hidden_states(2, 7), hidden_states(2, 7, seed=2)
    numbers = tuning.flat()
    async with running(span) as engine:
        for _ in range(2):
            await engine.forward(hidden, tuning=tuning)
            await engine.backward(hidden, upstream, tuning=tuning)
    assert all(torch.equal(each, before[name]) for name, each in span.state_dict().items())
    assert all(each.grad is None and not each.requires_grad for each in span.parameters())
    assert torch.equal(tuning.flat(), numbers)
    assert all(each.grad is None and not each.requires_grad for each in tuning.tensors.values())


async def test_several_users_at_once_get_the_bits_that_they_get_alone() -> None:
    cases = [
        (hidden_states(3, 30, seed=10 + k), hidden_states(3, 30, seed=20 + k), make_tuning(form, seed=k))
        for k, form in enumerate([*FORMS, QKV, QKV])
    ]
    settings = EngineSettings(chunk_tokens=60)
    async with running(make_span(), settings) as engine:
        alone = [await engine.backward(hidden, upstream, tuning=tuning) for hidden, upstream, tuning in cases]
    together: dict[int, Any] = {}
    session_outputs: list[Tensor] = []
    async with running(make_span(), settings) as engine, trio.open_nursery() as nursery:

        async def train(number: int) -> None:
            hidden, upstream, tuning = cases[number]
            with torch.inference_mode():  # what comes from the engine itself is of this kind
                copy = SpanTuning.from_flat(tuning.form, CONFIG, 0, 3, tuning.flat())
            together[number] = await engine.backward(hidden, upstream, peer=number, tuning=copy)

        async def generate() -> None:
            session = await engine.open_session(batch=1, max_length=40)
            for position in range(20):
                session_outputs.append(await engine.step(session, hidden_states(1, 1, seed=position), position))

        for number in range(len(cases)):
            nursery.start_soon(train, number)
        nursery.start_soon(generate)
    for number, expected in enumerate(alone):
        assert expected.tuning is not None
        assert torch.equal(together[number].hidden, expected.hidden)
        assert torch.equal(together[number].tuning, expected.tuning)
    assert len(session_outputs) == 20


async def test_bad_tunings_are_refused_and_nothing_is_left() -> None:
    hidden = hidden_states(2, 4)
    wide = BloomConfig(vocab_size=16, hidden_size=128, n_layer=3, n_head=4)
    long = BloomConfig(vocab_size=16, hidden_size=64, n_layer=5, n_head=4)
    bad = make_tuning(BOTH).flat()
    bad[-1] = float("nan")
    cases: list[tuple[SpanTuning, dict[str, int], str]] = [
        (make_tuning(QKV, config=wide), {}, "bad-shape"),
        (make_tuning(QKV, end=5, config=long), {}, "bad-value"),
        (make_tuning(QKV, end=2), {}, "bad-value"),
        (make_tuning(QKV, start=1), {"end": 2}, "bad-value"),
        (SpanTuning.from_flat(BOTH, CONFIG, 0, 3, bad), {}, "not-finite"),
    ]
    async with running(make_span()) as engine:
        good = await engine.forward(hidden, tuning=make_tuning(BOTH))
        for tuning, blocks, code in cases:
            for call in (partial(engine.forward, hidden), partial(engine.backward, hidden, hidden)):
                with pytest.raises(BadInput) as caught:
                    await call(**blocks, tuning=tuning)
                assert caught.value.code == code
        # What is wrong beside the blocks that are asked for is nobody's business.
        await engine.forward(hidden, end=2, tuning=cases[-1][0])
        assert engine.stats.waiting == 0
        assert torch.equal(await engine.forward(hidden, tuning=make_tuning(BOTH)), good)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
async def test_hidden_states_in_half_precision(dtype: torch.dtype) -> None:
    hidden, upstream, tuning = hidden_states(2, 7), hidden_states(2, 7, seed=2), make_tuning(BOTH)
    async with running(make_span()) as engine:
        exact = await engine.backward(hidden, upstream, tuning=tuning)
        rounded = await engine.backward(hidden.to(dtype), upstream.to(dtype), tuning=tuning)
    assert rounded.hidden.dtype == dtype
    assert exact.tuning is not None and rounded.tuning is not None and rounded.tuning.dtype == torch.float32
    assert error(rounded.tuning, exact.tuning) < 0.05


async def test_blocks_in_half_precision_take_a_tuning_in_float32() -> None:
    span: BloomSpan = make_span(linear=None)
    hidden, tuning = hidden_states(2, 7), make_tuning(BOTH)
    exact = span(hidden, tuning=tuning)
    half = span.to(torch.bfloat16)(hidden.to(torch.bfloat16), tuning=tuning)
    assert half.dtype == torch.bfloat16
    assert error(half, exact) < 0.05
