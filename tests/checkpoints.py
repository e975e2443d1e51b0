"""Tiny BLOOM checkpoints with random weights, in every layout that Raceme reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

if TYPE_CHECKING:
    from transformers import BloomForCausalLM

VOCABULARY = 320
_TEXT = [
    "In the beginning was the word, and the word was with the stem.",
    "A raceme is a stem with many flowers, opening one after another.",
    "the quick brown fox jumps over the lazy dog 0123456789",
]


def make_model(
    *, layers: int = 5, heads: int = 6, hidden: int = 48, post_layernorm: bool = False, seed: int = 0
) -> BloomForCausalLM:
    """A transformers model in float32 whose weights, norms and biases are all random.

    The weights are larger than transformers' own, so that attention and its biases matter to the result.
    """
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        n_layer=layers,
        n_head=heads,
        apply_residual_connection_post_layernorm=post_layernorm,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    model = BloomForCausalLM(config)
    model.train(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "layernorm" in name or "ln_f" in name:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise * (0.1 if name.endswith("bias") else hidden**-0.5))
    return model


def make_checkpoint(
    folder: Path,
    *,
    layers: int = 5,
    heads: int = 6,
    hidden: int = 48,
    format: Literal["safetensors", "bin"] = "safetensors",
    prefix: bool = True,
    shards_of_blocks: int | None = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    post_layernorm: bool = False,
    tokenizer: bool = True,
) -> Path:
    """Save a model of :func:`make_model` and a tokenizer.

    Args:
        folder: Made if need be.
        layers: Blocks.
        heads: Attention heads.
        hidden: Width.
        format: Kind of file.
        prefix: Whether names begin with ``transformer.``.
        shards_of_blocks: Blocks in a shard. Shard 1 holds the embeddings alone, the last one also the last
            layer norm. ``None`` for a single file.
        seed: Of the weights.
        dtype: Of the weights.
        post_layernorm: ``apply_residual_connection_post_layernorm``.
        tokenizer: Whether to save one as well.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(layers=layers, heads=heads, hidden=hidden, post_layernorm=post_layernorm, seed=seed)
    model.config.save_pretrained(folder)
    state = {
        name if prefix else name.removeprefix("transformer."): tensor.to(dtype).clone()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    suffix, stem = ("safetensors", "model") if format == "safetensors" else ("bin", "pytorch_model")
    if shards_of_blocks is None:
        save_weights(folder / f"{stem}.{suffix}", state)
    else:
        groups = _shards(state, layers, shards_of_blocks)
        weight_map: dict[str, str] = {}
        for number, group in enumerate(groups, 1):
            file = f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}"
            save_weights(folder / file, group)
            weight_map |= dict.fromkeys(group, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    if tokenizer:
        save_tokenizer(folder)
    return folder


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write one file of weights, of the kind that its suffix says."""
    if path.suffix == ".safetensors":
        save_file(state, str(path), metadata={"format": "pt"})
    else:
        torch.save(state, path)


def save_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE on a few lines and save it the way transformers loads it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)


def _shards(state: dict[str, Tensor], layers: int, of_blocks: int) -> list[dict[str, Tensor]]:
    def block_of(name: str) -> int | None:
        parts = name.removeprefix("transformer.").split(".")
        return int(parts[1]) if parts[0] == "h" else None

    groups = [{name: tensor for name, tensor in state.items() if "word_embeddings" in name}]
    for start in range(0, layers, of_blocks):
        blocks = range(start, start + of_blocks)
        groups.append({name: tensor for name, tensor in state.items() if block_of(name) in blocks})
    groups[-1] |= {name: tensor for name, tensor in state.items() if "ln_f" in name}
    return groups
