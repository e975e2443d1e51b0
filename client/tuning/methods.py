"""What can be trained, as a user says it: ``swarm.model(name, tuning=LoRA(rank=8))``, or several of them in a list.

Whatever is trained stays with the client. Of LoRA and deep prompts, which act inside blocks, nodes are told the numbers
with each training step, and with a session when it opens; they keep nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from client.errors import InvalidInput

if TYPE_CHECKING:
    from torch import nn

TARGETS: Final = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # a block's linear layers
MAX_RANK: Final = 256
MAX_TOKENS: Final = 1024
MAX_LABELS: Final = 10_000
MAX_ALPHA: Final = 1e6


@dataclass(frozen=True, kw_only=True)
class PromptTuning:
    """A soft prompt: some tokens before the text whose embeddings are trained. They stay on the client altogether.

    Attributes:
        tokens: How many; each takes a token's place in the model's context.
        text: Begin with this text's embeddings, repeated or cut; with those of words drawn at random if ``None``.
    """

    tokens: int = 16
    text: str | None = None

    def __init__(self, tokens: int = 16, *, text: str | None = None) -> None:
        _set(self, tokens=_whole("tokens", tokens, 1, MAX_TOKENS), text=text)
        if text is not None and not isinstance(text, str):
            raise TypeError(f"text is a str, not {type(text).__name__}")


@dataclass(frozen=True, kw_only=True)
class DeepPromptTuning:
    """A soft prompt, and something that is added to its hidden states before each block.

    Attributes:
        tokens: As of :class:`PromptTuning`.
        text: Likewise.
    """

    tokens: int = 16
    text: str | None = None

    def __init__(self, tokens: int = 16, *, text: str | None = None) -> None:
        _set(self, tokens=_whole("tokens", tokens, 1, MAX_TOKENS), text=text)
        if text is not None and not isinstance(text, str):
            raise TypeError(f"text is a str, not {type(text).__name__}")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank matrices beside linear layers of every block: ``y = W x + b + (alpha / rank) B A x``.

    Nodes apply them for this client alone. They see the matrices, as they see the hidden states.

    Attributes:
        rank: Of the matrices.
        alpha: How much they count, together with the rank; twice the rank if ``None``.
        targets: Beside which linear layers.

    Source: E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query_key_value",)

    def __init__(
        self, rank: int = 8, *, alpha: float | None = None, targets: Sequence[str] = ("query_key_value",)
    ) -> None:
        rank = _whole("rank", rank, 1, MAX_RANK)
        alpha = 2.0 * rank if alpha is None else _factor("alpha", alpha)
        if isinstance(targets, str):
            targets = (targets,)
        unknown = [target for target in targets if target not in TARGETS]
        if unknown or not targets:
            raise InvalidInput(f"LoRA's targets are some of {', '.join(TARGETS)}, not {list(targets)!r:.80}")
        _set(self, rank=rank, alpha=alpha, targets=tuple(target for target in TARGETS if target in targets))


@dataclass(frozen=True, kw_only=True)
class ClassificationHead:
    """A linear layer over what the last block gives for the last token, in the place of the model's own head.

    Attributes:
        labels: The classes' names.
    """

    labels: tuple[str, ...]

    def __init__(self, labels: int | Sequence[str]) -> None:
        if isinstance(labels, int):
            labels = [str(index) for index in range(_whole("labels", labels, 2, MAX_LABELS))]
        if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
            raise TypeError("labels are how many classes there are, or a list of their names, each a str")
        if not 2 <= len(labels) <= MAX_LABELS or len(set(labels)) != len(labels):
            raise InvalidInput(f"there are {len(labels)} labels: give 2 to {MAX_LABELS}, all different")
        _set(self, labels=tuple(labels))


@dataclass(frozen=True, kw_only=True)
class RegressionHead:
    """The same for numbers.

    Attributes:
        outputs: How many for each text.
    """

    outputs: int = 1

    def __init__(self, outputs: int = 1) -> None:
        _set(self, outputs=_whole("outputs", outputs, 1, MAX_LABELS))


@dataclass(frozen=True, kw_only=True)
class Between:
    """Modules of one's own between blocks; whole texts alone go through them, so that nothing can be generated.

    Attributes:
        modules: By the number of the block that each one comes before; they get and give hidden states [b, t, d].
    """

    modules: Mapping[int, nn.Module] = field(default_factory=dict)

    def __init__(self, modules: Mapping[int, nn.Module]) -> None:
        from torch import nn

        if not modules or not all(isinstance(module, nn.Module) for module in modules.values()):
            raise TypeError("modules between blocks are nn.Modules by the number of the block that they come before")
        _set(self, modules=dict(sorted((_whole("a block", block, 0, 2**20), each) for block, each in modules.items())))


LABELS: Final[Mapping[type, str]] = {
    PromptTuning: "prompt",
    DeepPromptTuning: "deep-prompt",
    LoRA: "lora",
    ClassificationHead: "head",
    RegressionHead: "head",
    Between: "between",
}
Method = PromptTuning | DeepPromptTuning | LoRA | ClassificationHead | RegressionHead | Between


def read_methods(given: object) -> tuple[Method, ...]:
    """What a user gave: one method, or several of different kinds.

    Raises:
        TypeError: something else.
        InvalidInput: none, or two of one kind.
    """
    methods = [given] if isinstance(given, Method) else given
    if not isinstance(methods, Sequence) or isinstance(methods, str):
        raise TypeError(f"tuning is a method such as LoRA(rank=8), or a list of them, not {type(given).__name__}")
    for method in methods:
        if not isinstance(method, Method):
            raise TypeError(f"tuning is a method such as LoRA(rank=8), not {type(method).__name__}")
    groups = ((PromptTuning, DeepPromptTuning), (LoRA,), (ClassificationHead, RegressionHead), (Between,))
    if not methods or any(sum(isinstance(method, kinds) for method in methods) > 1 for kinds in groups):
        raise InvalidInput("tuning takes one prompt, one LoRA, one head and one Between at most, and at least one")
    return tuple(methods)


def _set(method: object, **values: object) -> None:
    """Fill in a frozen dataclass."""
    for name, value in values.items():
        object.__setattr__(method, name, value)


def _whole(name: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a whole number, not {type(value).__name__}")
    if not least <= value <= most:
        raise InvalidInput(f"{name} is {value}: give {least} to {most}")
    return value


def _factor(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is a number, not {type(value).__name__}")
    if not 0 < value <= MAX_ALPHA:
        raise InvalidInput(f"{name} is {value}: give a number above 0, up to {MAX_ALPHA:g}")
    return float(value)
