"""Prompts for bloom-tiny, and what one machine makes of them: transformers' own model in fp32, greedily."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BloomForCausalLM

MODEL = "bloom-tiny"
VOCABULARY = 2048
SPECIAL_TOKENS = 4
DRAFT_TOKENS = 4
CANDIDATES = 48
ALPHABET = 8  # tokens of which a misleading prompt is made


class Alone:
    """The model on this machine."""

    def __init__(self) -> None:
        import torch
        from transformers import BloomForCausalLM
        from transformers.utils import logging

        from compute.models import find_checkpoint

        logging.disable_progress_bar()
        torch.set_num_threads(1)
        folder = find_checkpoint(MODEL).file("config.json").parent
        self._model: BloomForCausalLM = BloomForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(self, ids: Sequence[int], new: int) -> list[int]:
        """The new tokens; fewer if the text ends."""
        import torch

        prompt = torch.tensor([list(ids)])
        with torch.inference_mode():
            output = self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new
            )
        found: list[int] = output[0, len(ids) :].tolist()
        return found


def noise(source: random.Random, length: int) -> list[int]:
    """Random tokens."""
    return [source.randrange(SPECIAL_TOKENS, VOCABULARY) for _ in range(length)]


def looked_up(context: Sequence[int]) -> list[int]:
    """What followed the last two tokens where they came before, or the last one: the simplest draft there is."""
    for size in (2, 1):
        end = list(context[-size:])
        for start in range(len(context) - size - 1, -1, -1):
            if list(context[start : start + size]) == end:
                return list(context[start + size : start + size + DRAFT_TOKENS])
    return []


def tokens_per_round(ids: Sequence[int], new: Sequence[int]) -> float:
    """How many tokens a round of such drafts gives, with ``new`` after the prompt ``ids``; 1 if none is ever right."""
    done = rounds = 0
    while done < len(new):
        draft = looked_up([*ids, *new[:done]])
        for guess, token in zip(draft, new[done:], strict=False):
            if guess != token:
                break
            done += 1
        done += 1
        rounds += 1
    return len(new) / max(1, rounds)


def repetitive(alone: Alone, new: int) -> list[int]:
    """The prompt whose continuation foretells itself best, of many that are random tokens and what the model has
    already made of them."""
    source = random.Random("repetitive")
    starts = [noise(source, 16) for _ in range(CANDIDATES)]
    found = [[*ids, *alone.generate(ids, new)] for ids in starts]
    return max(found, key=lambda ids: tokens_per_round(ids, alone.generate(ids, new)))


def misleading(alone: Alone, new: int) -> list[int]:
    """The prompt whose continuation foretells itself worst, of many in which each token comes often, with ever other
    tokens behind it."""
    source = random.Random("misleading")
    found = []
    for _ in range(CANDIDATES):
        some = noise(source, ALPHABET)
        found.append([source.choice(some) for _ in range(8 * ALPHABET)])
    return min(found, key=lambda ids: tokens_per_round(ids, alone.generate(ids, new)))
