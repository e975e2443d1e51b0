"""Drafting by a small local model with the same tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from client.drafting.base import Draft, common_prefix
from client.errors import InvalidInput

if TYPE_CHECKING:
    import torch

_CHUNK_TOKENS: Final = 256  # of context that are computed at once: bounds the memory that it takes
_CHUNK_TOKENS_WITH_LOGITS: Final = 16  # where a model can only give the logits of all of them


class ModelDrafter:
    """Continues greedily with a causal language model of transformers'.

    A token's grade is the probability that the model gives it, in tenths. The keys and values of what one call's
    context has in common with the next one's are kept.
    """

    name: Final = "model"
    grades: Final = 10

    def __init__(self, model: Any, *, vocabulary: int) -> None:
        """Take a model; it is used as it is, on its device.

        Args:
            model: of transformers', causal, in inference mode, with a key-value cache that can be cut.
            vocabulary: entries in the vocabulary of the model that is drafted for.

        Raises:
            InvalidInput: not a model that can draft for another of that vocabulary.
        """
        config = getattr(model, "config", None)
        has = getattr(config, "vocab_size", None)
        if not isinstance(has, int) or not callable(getattr(model, "forward", None)):
            raise InvalidInput(
                f"a drafting model is a causal language model of transformers', not {type(model).__name__}"
            )
        if has != vocabulary:
            raise InvalidInput(
                f"the drafting model has a vocabulary of {has} tokens, the model {vocabulary}: they must share a "
                f"tokenizer; give another drafting model, or none"
            )
        if getattr(config, "is_encoder_decoder", False):
            raise InvalidInput("the drafting model has an encoder: give a causal language model")
        self._model = model
        self._longest = getattr(config, "max_position_embeddings", None)
        self._can_skip_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache: Any = None
        self._ids: list[int] = []  # whose keys and values are in the cache

    def propose(self, ids: Sequence[int], count: int) -> Draft:
        """See ``Drafter``. Takes a step of the model per token, and one of all tokens that are new in ``ids``.

        Raises: what the model raises; the next call then begins anew.
        """
        import torch

        if isinstance(self._longest, int):
            count = min(count, self._longest - len(ids))
        if count < 1 or not ids:
            return Draft()
        tokens, grades = [], []
        with torch.inference_mode():
            fresh = self._keep_common(list(ids))
            for _ in range(count):
                chances = self._next_logits(fresh).float().softmax(dim=-1)  # [vocabulary]
                best = int(chances.argmax())
                tokens.append(best)
                grades.append(min(int(float(chances[best]) * self.grades), self.grades - 1))
                fresh = [best]
        return Draft(tokens=tuple(tokens), grades=tuple(grades))

    def _keep_common(self, ids: list[int]) -> list[int]:
        """Cut the cache to what it shares with ``ids``; what of them is still to be computed: at least the last."""
        from transformers import DynamicCache

        kept = min(common_prefix(self._ids, ids), len(ids) - 1)
        if self._cache is None or not kept:
            self._cache, kept = DynamicCache(), 0
        elif kept < len(self._ids):
            self._cache.crop(kept - len(self._ids))  # below 0: how many to take away
        self._ids = ids[:kept]
        return ids[kept:]

    def _next_logits(self, tokens: list[int]) -> torch.Tensor:
        """Run the model over the next tokens.

        Shapes:
            returns: [vocabulary], of what follows the last of them
        """
        import torch

        options = {"logits_to_keep": 1} if self._can_skip_logits else {}
        chunk = _CHUNK_TOKENS if self._can_skip_logits else _CHUNK_TOKENS_WITH_LOGITS
        cache, known = self._cache, self._ids
        self._cache, self._ids = None, []  # until it has gone well
        for start in range(0, len(tokens), chunk):
            part = torch.tensor([tokens[start : start + chunk]], device=self._model.device)  # [1, t]
            output = self._model(input_ids=part, past_key_values=cache, use_cache=True, **options)
        self._cache, self._ids = cache, known + tokens
        logits: torch.Tensor = output.logits[0, -1]  # [vocabulary]
        return logits
