"""What the swarm trains, on one machine: hooked into transformers' own model, whose autograd does the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from client.tuning.tuned import LAYERS, Tuned
from tests.checkpoints import make_model


def shake(tuned: nn.Module) -> None:
    """Away from where training begins: there, half of the gradients of LoRA are nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@contextmanager
def by_hand(model: Any, tuned: Tuned, *, once: bool = False) -> Iterator[None]:
    """What is trained inside of blocks, hooked into a model of transformers': its own autograd does the rest.

    Args:
        model: Without any of it.
        tuned: What to add.
        once: Deep prompts are for the first step alone: what comes after it goes on from a cache.
    """
    with ExitStack() as hooks:
        for number, block in enumerate(model.transformer.h):
            if tuned.form.prompts:

                def add(_: Any, args: tuple[Tensor, ...], number: int = number) -> tuple[Tensor, ...]:
                    p = tuned.form.prompts
                    hidden = args[0]
                    if once and hidden.shape[1] == 1:
                        return args
                    return (torch.cat([hidden[:, :p] + tuned.deep_prompts[number], hidden[:, p:]], dim=1), *args[1:])

                hooks.callback(block.register_forward_pre_hook(add).remove)
            for target in tuned.form.targets:
                down, up = (
                    tuned.get_parameter(f"transformer.h.{number}.{LAYERS[target]}.lora_{half}.weight") for half in "AB"
                )

                def beside(_: Any, args: Any, output: Tensor, a: Tensor = down, b: Tensor = up) -> Tensor:
                    together: Tensor = output + tuned.form.scale * (args[0] @ a.T @ b.T)
                    return together

                hooks.callback(block.get_submodule(LAYERS[target]).register_forward_hook(beside).remove)
            if str(number) in tuned.between:
                module = tuned.between[str(number)]

                def first(_: Any, args: tuple[Tensor, ...], module: nn.Module = module) -> tuple[Tensor, ...]:
                    return (module(args[0]), *args[1:])

                hooks.callback(block.register_forward_pre_hook(first).remove)
        if str(len(model.transformer.h)) in tuned.between:
            module = tuned.between[str(len(model.transformer.h))]
            hooks.callback(model.transformer.ln_f.register_forward_pre_hook(lambda _, args: (module(args[0]),)).remove)
        yield


def local_loss(tuned: Tuned, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """The loss that transformers' own model gives, rows one by one and without padding."""
    model = make_model()
    model.requires_grad_(False)
    losses, counts = [], []
    with by_hand(model, tuned):
        for row in range(len(ids)):
            text = ids[row][mask[row] != 0][None]  # [1, t]
            words = model.transformer.word_embeddings(text)  # [1, t, d]
            if tuned.prompt_tokens:
                words = torch.cat([tuned.prompt_embeddings[None], words], dim=1)  # [1, p + t, d]
            if tuned.score is not None:
                last = model.transformer(inputs_embeds=words).last_hidden_state[:, -1]  # [1, d]
                scores = tuned.score(last)
                if labels.is_floating_point():
                    losses.append(nn.functional.mse_loss(scores, labels[row][None]))
                else:
                    losses.append(nn.functional.cross_entropy(scores, labels[row][None]))
                counts.append(1)
                continue
            logits = model(inputs_embeds=words).logits[0, :-1]  # [p + t - 1, v]
            own = labels[row][mask[row] != 0][1:] if not tuned.prompt_tokens else labels[row][mask[row] != 0]
            logits = logits[-len(own) :]
            losses.append(nn.functional.cross_entropy(logits, own, reduction="sum"))
            counts.append(len(own))
    return torch.stack(losses).sum() / sum(counts)


def generate_locally(tuned: Tuned, ids: Tensor, *, seed: int | None = None, **options: Any) -> list[list[int]]:
    """What transformers' own model generates with a soft prompt before one text.

    Shapes:
        ids: [1, t]
    """
    model = make_model()
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad(), by_hand(model, tuned, once=True):
        words = model.transformer.word_embeddings(ids)  # [1, t, d]
        if not tuned.prompt_tokens:
            rows: list[list[int]] = model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()
            return rows
        words = torch.cat([tuned.prompt_embeddings[None], words], dim=1)  # [1, p + t, d]
        mask = torch.ones(1, words.shape[1], dtype=torch.int64)
        new: list[list[int]] = model.generate(inputs_embeds=words, attention_mask=mask, **options).tolist()
    return [[*ids[0].tolist(), *row] for row in new]
