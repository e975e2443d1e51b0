"""The local reference of a tuned model: transformers' own BLOOM, whole on this machine, with what is trained by hand.

It has the face of what ``swarm.model(name, tuning=...)`` gives, and begins with the same parameters after the same
``torch.manual_seed``: LoRA block by block, a prompt out of words, a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

TINY: Final = Path(__file__).parents[1] / "compute" / "models" / "bloom-tiny"
LAYERS: Final = {
    "query_key_value": "self_attention.query_key_value",
    "dense": "self_attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
}


class LocalTuned:
    """A model on this machine.

    Attributes:
        tuned: What is trained, under PEFT's names.
        dropout: Of what LoRA sees, to have training need random numbers.
    """

    def __init__(
        self,
        folder: Path = TINY,
        *,
        rank: int = 0,
        alpha: float | None = None,
        targets: Sequence[str] = ("query_key_value",),
        prompt: int = 0,
        is_deep: bool = False,
        outputs: int = 0,
        dropout: float = 0.0,
    ) -> None:
        from transformers import BloomForCausalLM

        self.model: Any = BloomForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.requires_grad_(False).eval()
        self.tuned = nn.Module()
        self.dropout = dropout
        self._rank, self._prompt = rank, prompt
        config, words = self.model.config, self.model.transformer.word_embeddings.weight  # [v, d]
        if prompt:
            chosen = words[torch.randint(words.shape[0], (prompt,))]  # [p, d]
            self.tuned.prompt_embeddings = nn.Parameter(chosen.clone())
        if is_deep:
            self.tuned.deep_prompts = nn.Parameter(torch.zeros(config.n_layer, prompt, config.hidden_size))
            for index, block in enumerate(self.model.transformer.h):
                block.register_forward_pre_hook(partial(self._add_deep, index))
        for index in range(config.n_layer if rank else 0):
            for target in (name for name in LAYERS if name in targets):
                self._put_lora(index, LAYERS[target], rank, alpha or 2 * rank)
        if outputs:
            self.tuned.score = nn.Linear(config.hidden_size, outputs, bias=False)
            nn.init.normal_(self.tuned.score.weight, std=0.02)

    def _put_lora(self, index: int, layer: str, rank: int, alpha: float) -> None:
        linear = self.model.transformer.h[index].get_submodule(layer)
        module: nn.Module = self.tuned
        for part in ("transformer", "h", str(index), *layer.split(".")):
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        down, up = nn.Linear(linear.in_features, rank, bias=False), nn.Linear(rank, linear.out_features, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        module.add_module("lora_A", down)
        module.add_module("lora_B", up)

        def add(_: nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor:
            seen = nn.functional.dropout(given[0], self.dropout, self.tuned.training)
            return output + alpha / rank * up(down(seen))  # type: ignore[no-any-return]

        linear.register_forward_hook(add)

    def _add_deep(self, index: int, _: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = given[0]  # [b, p + t, d]
        prompts = self.tuned.get_parameter("deep_prompts")[index]  # [p, d]
        added = nn.functional.pad(prompts, (0, 0, 0, hidden.shape[1] - self._prompt))  # [p + t, d]
        return (hidden + added, *given[1:])

    def __call__(self, *, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Any:
        """See ``client.tuning.training.loop.Trainable``; without a mask all is text."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = input_ids.shape[0]
        hidden = self.model.transformer.word_embeddings(input_ids)  # [b, t, d]
        if self._prompt:
            hidden = torch.cat([self.tuned.prompt_embeddings.expand(rows, -1, -1), hidden], dim=1)  # type: ignore[operator]
            attention_mask = torch.cat([attention_mask.new_ones(rows, self._prompt), attention_mask], dim=1)
        hidden = self.model.transformer(
            inputs_embeds=hidden, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state[:, self._prompt :]  # [b, t, d], after the last norm
        if not hasattr(self.tuned, "score"):
            logits = self.model.lm_head(hidden)  # [b, t, v]
            loss = self.model.loss_function(logits, labels, vocab_size=logits.shape[-1])
            return SimpleNamespace(loss=loss, logits=logits)
        places = torch.arange(input_ids.shape[1])
        last = (places * attention_mask[:, self._prompt :]).argmax(dim=1)  # [b]
        logits = self.tuned.score(hidden[torch.arange(rows), last])  # type: ignore[operator]  # [b, outputs]
        if labels.is_floating_point():
            return SimpleNamespace(loss=nn.functional.mse_loss(logits[:, 0], labels), logits=logits)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)

    def save_pretrained(self, folder: str) -> None:
        """Write what is trained."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tuned.state_dict().items()}
        save_file(tensors, str(Path(folder) / "adapter_model.safetensors"))
        (Path(folder) / "adapter_config.json").write_text("{}")


def tiny_tokenizer() -> Any:
    """That of bloom-tiny."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)
