"""BLOOM's blocks, embeddings and head give what transformers gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BloomForCausalLM
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from compute.bloom import BloomBlock, BloomConfig, BloomSpan, alibi_bias, slopes
from compute.cache import KVCache
from compute.checkpoint import Checkpoint
from compute.errors import CheckpointError
from tests.checkpoints import VOCABULARY, make_checkpoint

MAX_ERROR = 1e-5
VARIANTS = [(4, 32, 3, False), (6, 48, 5, False), (6, 48, 3, True), (4, 32, 2, True)]
CONFIG = {"model_type": "bloom", "vocab_size": 9, "hidden_size": 8, "n_layer": 2, "n_head": 2}


def load(folder: Path) -> tuple[Checkpoint, BloomForCausalLM]:
    reference = BloomForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    reference.train(False)
    return Checkpoint.open(folder), reference


def random_ids(batch: int, tokens: int) -> Tensor:
    return torch.randint(4, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(5))


def new_cache(span: BloomSpan, batch: int, tokens: int) -> KVCache:
    return KVCache.alone(span, batch, tokens)


def step(span: BloomSpan, cache: KVCache, hidden: Tensor, position: int) -> Tensor:
    with torch.inference_mode():
        output: Tensor = span(hidden, cache, position)
    return output


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 14, 16, 25, 32, 112])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    assert torch.equal(slopes(heads), _get_alibi_slopes(heads, torch.device("cpu")))


def test_bias_is_relative_and_causal() -> None:
    bias = alibi_bias(torch.tensor([0.5]), position=1, tokens=2)
    expected = [[-0.5, 0.0, float("-inf")], [-1.0, -0.5, 0.0]]
    assert torch.equal(bias, torch.tensor(expected)[None, None])


def test_padding_is_seen_by_itself_alone() -> None:
    inf = float("inf")
    bias = alibi_bias(torch.tensor([0.5, 1.0]), position=1, tokens=3, pads=torch.tensor([0, 2, 3]))
    assert torch.equal(bias[:1], alibi_bias(torch.tensor([0.5, 1.0]), position=1, tokens=3))
    two = [[-inf, 0.0, -inf, -inf], [-inf, -inf, 0.0, -inf], [-inf, -inf, -0.5, 0.0]]
    three = [[-inf, 0.0, -inf, -inf], [-inf, -inf, 0.0, -inf], [-inf, -inf, -inf, 0.0]]
    assert torch.equal(bias[1:, 0], torch.tensor([two, three]))
    assert torch.equal(bias[:, 1], 2 * bias[:, 0])


@pytest.mark.parametrize(("heads", "hidden", "layers", "post_layernorm"), VARIANTS)
def test_whole_sequences_equal_transformers(
    tmp_path: Path, heads: int, hidden: int, layers: int, post_layernorm: bool
) -> None:
    folder = make_checkpoint(
        tmp_path, heads=heads, hidden=hidden, layers=layers, post_layernorm=post_layernorm, tokenizer=False
    )
    checkpoint, reference = load(folder)
    ids = random_ids(3, 11)
    with torch.no_grad():
        theirs = reference(ids, output_hidden_states=True)
        embedded = checkpoint.load_embeddings()(ids)
        assert error(embedded, theirs.hidden_states[0]) <= MAX_ERROR
        head, states = checkpoint.load_head(), embedded
        for index in range(layers):
            states = checkpoint.load_span(index, index + 1)(states)
            ours = head.ln_f(states) if index == layers - 1 else states
            assert error(ours, theirs.hidden_states[index + 1]) <= MAX_ERROR
        assert error(head(states), theirs.logits) <= MAX_ERROR


@pytest.mark.parametrize(("heads", "hidden", "layers", "post_layernorm"), VARIANTS)
def test_prefill_and_decode_equal_transformers_with_cache(
    tmp_path: Path, heads: int, hidden: int, layers: int, post_layernorm: bool
) -> None:
    folder = make_checkpoint(
        tmp_path, heads=heads, hidden=hidden, layers=layers, post_layernorm=post_layernorm, tokenizer=False
    )
    checkpoint, reference = load(folder)
    embeddings, head = checkpoint.load_embeddings(), checkpoint.load_head()
    span = checkpoint.load_span(0, layers)
    ids = random_ids(3, 12)
    cache = new_cache(span, 3, 12)
    past = None
    with torch.no_grad():
        for start, end in [(0, 7), *((i, i + 1) for i in range(7, 12))]:
            theirs = reference(ids[:, start:end], past_key_values=past, use_cache=True)
            past = theirs.past_key_values
            ours = head(step(span, cache, embeddings(ids[:, start:end]), start))
            assert error(ours, theirs.logits) <= MAX_ERROR


def test_two_spans_in_a_row_are_the_whole_model(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, tokenizer=False))
    hidden = checkpoint.load_embeddings()(random_ids(2, 6))
    whole = checkpoint.load_span(0, 5)(hidden)
    assert torch.equal(checkpoint.load_span(3, 5)(checkpoint.load_span(0, 3)(hidden)), whole)


def test_going_back_overwrites_what_was_there(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, tokenizer=False))
    span = checkpoint.load_span(1, 4)
    hidden = torch.randn(1, 6, 48, generator=torch.Generator().manual_seed(3))
    cache = new_cache(span, 1, 16)
    step(span, cache, hidden[:, :4], 0)
    first = step(span, cache, hidden[:, 4:], 4)
    step(span, cache, -hidden, 4)
    assert torch.equal(step(span, cache, hidden[:, 4:], 4), first)
    step(span, cache, -hidden, 2)
    step(span, cache, hidden[:, 2:4], 2)
    assert error(step(span, cache, hidden[:, 4:], 4), first) <= MAX_ERROR  # other chunks, other rounding


def test_gradients_of_a_whole_sequence_equal_transformers(tmp_path: Path) -> None:
    checkpoint, reference = load(make_checkpoint(tmp_path, layers=2, tokenizer=False))
    ids = random_ids(2, 5)
    embedded = checkpoint.load_embeddings()(ids)
    ours = embedded.clone().requires_grad_(True)
    checkpoint.load_head()(checkpoint.load_span(0, 2)(ours)).square().mean().backward()

    theirs: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        theirs.append(output)

    reference.transformer.word_embeddings_layernorm.register_forward_hook(keep)
    reference(ids).logits.square().mean().backward()
    assert ours.grad is not None and theirs[0].grad is not None
    assert error(ours.grad, theirs[0].grad) <= MAX_ERROR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, tokenizer=False))
    hidden = checkpoint.load_embeddings()(random_ids(2, 9))
    exact = checkpoint.load_span(0, 5)(hidden)
    rounded = checkpoint.load_span(0, 5, dtype)(hidden.to(dtype))
    assert rounded.dtype == dtype
    assert float((rounded.float() - exact).norm() / exact.norm()) < 0.03


def test_a_span_says_what_it_holds(tmp_path: Path) -> None:
    span = Checkpoint.open(make_checkpoint(tmp_path, tokenizer=False)).load_span(2, 5)
    assert (span.start, span.end, len(span), span.dtype) == (2, 5, 3, torch.float32)
    assert not any(parameter.requires_grad for parameter in span.parameters())
    assert sum(p.numel() for p in span.parameters()) == 3 * span.config.parameters_per_block
    with pytest.raises(ValueError, match="needs a cache"):
        span(torch.zeros(1, 1, 48), None, 3)
    with pytest.raises(ValueError, match="not within"):
        BloomSpan(span.config, 4, [BloomBlock(span.config), BloomBlock(span.config)])


@pytest.mark.parametrize(
    "spelling",
    [
        {"n_embed": 8, "hidden_size": None},
        {"num_hidden_layers": 2, "n_layer": None},
        {"num_attention_heads": 2, "n_head": None},
        {"n_embed": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    ],
)
def test_config_in_other_spellings(spelling: dict[str, object]) -> None:
    config = BloomConfig.from_json(CONFIG | spelling)
    assert (config.hidden_size, config.n_layer, config.n_head, config.head_dim) == (8, 2, 2, 4)


def test_config_reads_special_tokens() -> None:
    config = BloomConfig.from_json(CONFIG | {"bos_token_id": None, "eos_token_id": [2, 5], "pad_token_id": 3})
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, (2, 5), 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"hidden_size": 1 << 40}, "hidden_size is"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"n_head": 3}, "not a multiple"),
        ({"n_layer": "2"}, "n_layer is '2'"),
        ({"num_hidden_layers": 4}, "contradict"),
        ({"layer_norm_epsilon": "tiny"}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"pad_token_id": 9}, "pad_token_id is 9"),
    ],
)
def test_config_refuses(change: dict[str, object], says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        BloomConfig.from_json(CONFIG | change)
    assert "\n" not in str(caught.value)


def test_compute_imports_neither_transformers_nor_the_hub() -> None:
    """A server needs torch and safetensors only; transformers alone would cost it seconds to start."""
    program = (
        "import sys, compute.engine, compute.models, compute.tensors\n"
        "bad = {'transformers', 'bitsandbytes', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(', '.join(bad) or 0)"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
