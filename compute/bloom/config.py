"""The architecture of a BLOOM model, read from the ``config.json`` of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from compute.errors import CheckpointError

# Upper bounds on what a config.json may ask for. BLOOM-176B is 250,880 x 14,336, 70 blocks, 112 heads; a
# wrong file must end in an error and not in an allocation, and eight times that leaves room to grow.
MAX_VOCAB_SIZE: Final = 1 << 21
MAX_HIDDEN_SIZE: Final = 1 << 17
MAX_BLOCKS: Final = 1024
MAX_HEADS: Final = 1024


@dataclass(frozen=True, kw_only=True)
class BloomConfig:
    """What decides the shapes and the arithmetic of a BLOOM model, and the ids of its special tokens.

    Dropout (training only) and ``pretraining_tp``/``slow_but_exact`` (another order of summation for the
    same sums) are left out on purpose.

    Attributes:
        vocab_size: Rows of the embedding, in tokens.
        hidden_size: Width of a hidden state.
        n_layer: Number of blocks.
        n_head: Attention heads of a block.
        layer_norm_epsilon: Added to the variance in every layer norm.
        apply_residual_connection_post_layernorm: The residual is the layer norm's output, not its input.
        tie_word_embeddings: The head multiplies with the embedding matrix.
        bos_token_id: Begins a text, or ``None``.
        eos_token_id: Ends a text: one id, several, or ``None``.
        pad_token_id: Fills short rows, or ``None``.
    """

    vocab_size: int
    hidden_size: int
    n_layer: int
    n_head: int
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.n_head

    @property
    def parameters_per_block(self) -> int:
        """Number of parameters of one block: four matrices with their biases and two layer norms."""
        return self.weights_per_block + 13 * self.hidden_size

    @property
    def weights_per_block(self) -> int:
        """Of these, those in matrices."""
        return 12 * self.hidden_size**2

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> BloomConfig:
        """Read the content of a ``config.json``, in any of the spellings that Hugging Face has used.

        Raises:
            CheckpointError: It is not BLOOM, or a value is missing, contradictory or out of bounds.
        """
        if data.get("model_type") != "bloom":
            raise CheckpointError(
                f"config.json: model_type is {data.get('model_type')!r:.40}, not 'bloom'; choose a BLOOM checkpoint"
            )
        vocab_size = _integer(data, ("vocab_size",), MAX_VOCAB_SIZE)
        hidden_size = _integer(data, ("hidden_size", "n_embed"), MAX_HIDDEN_SIZE)
        n_layer = _integer(data, ("n_layer", "num_hidden_layers"), MAX_BLOCKS)
        n_head = _integer(data, ("n_head", "num_attention_heads"), MAX_HEADS)
        if hidden_size % n_head:
            raise CheckpointError(
                f"config.json: hidden_size {hidden_size} is not a multiple of n_head {n_head}; "
                "get the checkpoint's config.json again"
            )
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            n_layer=n_layer,
            n_head=n_head,
            layer_norm_epsilon=_epsilon(data),
            apply_residual_connection_post_layernorm=_boolean(data, "apply_residual_connection_post_layernorm", False),
            tie_word_embeddings=_boolean(data, "tie_word_embeddings", True),
            bos_token_id=_token(data, "bos_token_id", 1, vocab_size),
            eos_token_id=_tokens(data, "eos_token_id", 2, vocab_size),
            pad_token_id=_token(data, "pad_token_id", None, vocab_size),
        )


def _integer(data: Mapping[str, object], names: tuple[str, ...], largest: int) -> int:
    """The value under any of ``names``, which must agree where several are given."""
    given = {name: data[name] for name in names if data.get(name) is not None}
    if not given:
        raise CheckpointError(f"config.json: {names[0]} is missing; get the checkpoint's config.json again")
    for name, value in given.items():
        if type(value) is not int or not 1 <= value <= largest:
            raise CheckpointError(f"config.json: {name} is {value!r:.40}, expected an integer 1 to {largest}")
    values = [value for value in given.values() if isinstance(value, int)]
    if len(set(values)) > 1:
        raise CheckpointError(f"config.json: {' and '.join(given)} contradict each other; keep one of them")
    return values[0]


def _epsilon(data: Mapping[str, object]) -> float:
    value = data.get("layer_norm_epsilon", 1e-5)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise CheckpointError(f"config.json: layer_norm_epsilon is {value!r:.40}, expected between 0 and 1")
    return float(value)


def _boolean(data: Mapping[str, object], name: str, default: bool) -> bool:
    value = data.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} is {value!r:.40}, expected true or false")
    return value


def _token(data: Mapping[str, object], name: str, default: int | None, vocab_size: int) -> int | None:
    value = data.get(name, default)
    if value is None:
        return None
    if type(value) is not int or (name in data and not 0 <= value < vocab_size):
        raise CheckpointError(f"config.json: {name} is {value!r:.40}, expected an id below {vocab_size}")
    return value


def _tokens(
    data: Mapping[str, object], name: str, default: int | None, vocab_size: int
) -> int | tuple[int, ...] | None:
    value = data.get(name, default)
    if not isinstance(value, list):
        return _token(data, name, default, vocab_size)
    ids = [_token({name: item}, name, None, vocab_size) for item in value]
    return tuple(item for item in ids if item is not None)
