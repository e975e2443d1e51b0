"""The parameters that a client trains, as torch modules, under the names that PEFT gives them.

They are made in a fixed order from torch's own random numbers: ``torch.manual_seed`` before makes them repeatable.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from client.errors import InvalidInput
from client.tuning.methods import (
    LABELS,
    Between,
    ClassificationHead,
    DeepPromptTuning,
    LoRA,
    Method,
    PromptTuning,
    RegressionHead,
)
from compute.bloom import BloomConfig
from compute.tensors import tensor_bytes
from compute.tuning import SpanTuning, TuningForm

M = TypeVar("M")

LAYERS = {
    "query_key_value": "self_attention.query_key_value",
    "dense": "self_attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
}
PROMPT = "prompt_embeddings"
DEEP_PROMPTS = "deep_prompts"


class Tuned(nn.Module):
    """See the module. Its state dict has these names, of which there is what the methods have::

        prompt_embeddings [p, d]                                       before the layer norm of the embeddings
        deep_prompts [n, p, d]                                         for each of the model's n blocks
        transformer.h.I.self_attention.query_key_value.lora_A.weight   [r, in]; likewise lora_B.weight, [out, r]
        score.weight [labels, d]
        between.I....                                                  whatever a module of one's own has

    Attributes:
        methods: What it is for.
        form: Of what nodes are told; nothing in it if they are told nothing.
        score: The head, or ``None``.
        between: By block.
    """

    def __init__(
        self, config: BloomConfig, methods: Sequence[Method], words: Tensor, starts: Sequence[int] = ()
    ) -> None:
        """Make them.

        Args:
            config: The model's.
            methods: As ``read_methods`` gives them.
            words: The model's word embeddings.
            starts: Token ids that a soft prompt begins as, if its method has a text.

        Shapes:
            words: [vocabulary, d]

        Raises:
            InvalidInput: Methods that do not fit the model.
        """
        super().__init__()
        self.config = config
        self.methods = tuple(methods)
        prompt, lora = self.prompt, self.find(LoRA)
        self.form = _form_of(methods)
        if prompt is not None:
            self.prompt_embeddings = nn.Parameter(_first_prompt(prompt.tokens, words, starts))  # [p, d]
        if isinstance(prompt, DeepPromptTuning):
            self.deep_prompts = nn.Parameter(torch.zeros(config.n_layer, prompt.tokens, config.hidden_size))
        shapes = dict(self.form.shapes(config, 0, config.n_layer))
        for block in range(config.n_layer if lora is not None else 0):
            for target in self.form.targets:
                # In PEFT's order of random numbers, so that the same seed gives the same matrices.
                rank, in_features = shapes[f"lora.{block}.{target}.a"]
                down = nn.Linear(in_features, rank, bias=False)  # [r, in]
                up = nn.Linear(rank, shapes[f"lora.{block}.{target}.b"][0], bias=False)  # [out, r]
                nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
                nn.init.zeros_(up.weight)
                beside = self._below(f"transformer.h.{block}.{LAYERS[target]}")
                beside.add_module("lora_A", down)
                beside.add_module("lora_B", up)
        outputs = self.n_outputs
        self.score = None if not outputs else nn.Linear(config.hidden_size, outputs, bias=False)
        if self.score is not None:
            nn.init.normal_(self.score.weight, std=0.02)
        modules = self.find(Between)
        between = {} if modules is None else dict(modules.modules)
        if between and max(between) > config.n_layer:
            raise InvalidInput(f"a module before block {max(between)}: the model has {config.n_layer} blocks")
        self.between = nn.ModuleDict({str(block): module for block, module in between.items()})

    def find(self, kind: type[M]) -> M | None:
        """The method of a kind, if there is one."""
        return next((method for method in self.methods if isinstance(method, kind)), None)

    @property
    def prompt(self) -> PromptTuning | DeepPromptTuning | None:
        """The method with a soft prompt."""
        return self.find(PromptTuning) or self.find(DeepPromptTuning)

    @property
    def head(self) -> ClassificationHead | RegressionHead | None:
        """The method with a head of its own."""
        return self.find(ClassificationHead) or self.find(RegressionHead)

    @property
    def label(self) -> str:
        """What it is called, as in ``lora+head``."""
        return "+".join(LABELS[type(method)] for method in self.methods)

    @property
    def n_outputs(self) -> int:
        """Of the head; 0 without one."""
        return _outputs_of(self.head)

    @property
    def prompt_tokens(self) -> int:
        """Of the soft prompt; 0 without one."""
        return 0 if self.prompt is None else self.prompt.tokens

    @property
    def cuts(self) -> list[int]:
        """The blocks that modules come before, rising."""
        return sorted(int(block) for block in self.between)

    def named(self, start: int, end: int) -> list[Tensor]:
        """What nodes are told of blocks [start, end), in the order of :meth:`TuningForm.shapes`."""
        tensors: list[Tensor] = []
        for block in range(start, end):
            if self.form.prompts:
                tensors.append(self.deep_prompts[block])  # [p, d]
            for target in self.form.targets:
                tensors += [self.get_parameter(lora_name(block, target, half)) for half in "ab"]
        return tensors

    def of_span(self, start: int, end: int) -> SpanTuning | None:
        """The same as nodes get it, as it is now; ``None`` if there is nothing."""
        tensors = self.named(start, end)
        if not tensors:
            return None
        flat = torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])  # [n]
        return SpanTuning.from_flat(self.form, self.config, start, end, flat)

    def digest(self) -> str:
        """Of all numbers as they are, in hexadecimal."""
        hasher = hashlib.sha256()
        for name, values in self.state_dict().items():
            hasher.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
            hasher.update(tensor_bytes(values.detach().cpu().contiguous()))
        return hasher.hexdigest()

    def __iter__(self) -> Iterator[nn.Parameter]:
        """All that is trained."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def _below(self, name: str) -> nn.Module:
        """The module of a name with dots, made if need be."""
        module: nn.Module = self
        for part in name.split("."):
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        return module


def n_elements(config: BloomConfig, methods: Sequence[Method]) -> int:
    """How many numbers there are of methods, but for modules of one's own."""
    inside = _form_of(methods).n_elements(config, 0, config.n_layer)
    tokens = sum(each.tokens for each in methods if isinstance(each, PromptTuning | DeepPromptTuning))
    outputs = sum(_outputs_of(each) for each in methods if isinstance(each, ClassificationHead | RegressionHead))
    return inside + (tokens + outputs) * config.hidden_size


def _form_of(methods: Sequence[Method]) -> TuningForm:
    """What nodes are told of methods."""
    lora = next((each for each in methods if isinstance(each, LoRA)), None)
    return TuningForm(
        rank=0 if lora is None else lora.rank,
        scale=1.0 if lora is None else lora.alpha / lora.rank,
        targets=() if lora is None else lora.targets,
        prompts=next((each.tokens for each in methods if isinstance(each, DeepPromptTuning)), 0),
    )


def _outputs_of(head: ClassificationHead | RegressionHead | None) -> int:
    if head is None:
        return 0
    return len(head.labels) if isinstance(head, ClassificationHead) else head.outputs


def lora_name(block: int, target: str, half: str) -> str:
    """What PEFT calls a matrix; ``half`` is ``a`` or ``b``."""
    return f"transformer.h.{block}.{LAYERS[target]}.lora_{half.upper()}.weight"


def _first_prompt(tokens: int, words: Tensor, starts: Sequence[int]) -> Tensor:
    """Embeddings to begin with: of these tokens, repeated or cut, or of words drawn at random.

    Shapes:
        words: [vocabulary, d]
        returns: [tokens, d]
    """
    if starts:
        ids = torch.tensor([starts[index % len(starts)] for index in range(tokens)])  # [tokens]
    else:
        ids = torch.randint(words.shape[0], (tokens,))  # [tokens]
    return words.detach()[ids].float().clone()
