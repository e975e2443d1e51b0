"""Whole sequences at once, without a session: what training does, and what it is measured by.

Rows may have padding on either side. Blocks get them with what there is of padding behind the text, where nothing sees
it, and the soft prompt in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast

from client.errors import InvalidInput
from client.tuning.heads import check_head_labels, head_loss
from client.tuning.remote import RemoteBlocks
from client.tuning.tuned import Tuned
from compute.bloom import Embeddings, Head

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

    from client.models.bloom import DistributedBloomForCausalLM

IGNORED = -100  # as a label: none counts there


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Where the text of each row is.

    Attributes:
        starts: Tokens of padding before it, [b].
        lengths: Tokens of text, at least one, [b].
        tokens: Of each row, padding and all.
    """

    starts: Tensor
    lengths: Tensor
    tokens: int

    @classmethod
    def read(cls, mask: Tensor | None, rows: int, tokens: int) -> Rows:
        """Of an attention mask; all is text without one.

        Shapes:
            mask: [b, t], 0 for padding

        Raises:
            InvalidInput: another shape, a row without text, or padding within the text.
        """
        if mask is None:
            return cls(starts=torch.zeros(rows, dtype=torch.int64), lengths=torch.full((rows,), tokens), tokens=tokens)
        if mask.shape != (rows, tokens):
            raise InvalidInput(f"an attention mask of shape {list(mask.shape)}, not [{rows}, {tokens}] as input_ids")
        is_text = (mask != 0).cpu()  # [b, t]
        lengths = is_text.sum(dim=1)  # [b]
        starts = is_text.int().argmax(dim=1)  # [b]
        place = torch.arange(tokens)
        expected = (place >= starts[:, None]) & (place < (starts + lengths)[:, None])  # [b, t]
        if not lengths.all() or not torch.equal(expected, is_text):
            raise InvalidInput("each row of an attention mask is ones without a gap, with zeros before or behind them")
        return cls(starts=starts, lengths=lengths, tokens=tokens)

    @property
    def has_padding(self) -> bool:
        """Whether any row has."""
        return bool((self.lengths < self.tokens).any())

    def to_front(self, values: Tensor) -> Tensor:
        """With the padding of each row behind its text.

        Shapes:
            values: [b, t] or [b, t, d]
            returns: the same
        """
        return self._moved(values, self.starts)

    def back(self, values: Tensor) -> Tensor:
        """The other way round."""
        return self._moved(values, self.tokens - self.starts)

    def _moved(self, values: Tensor, by: Tensor) -> Tensor:
        if not self.starts.any():
            return values
        index = (torch.arange(self.tokens) + by[:, None]) % self.tokens  # [b, t]
        index = index.to(values.device)
        return values.gather(1, index if values.dim() == 2 else index[..., None].expand_as(values))


def forward_whole(
    model: DistributedBloomForCausalLM,
    tuned: Tuned,
    ids: Tensor,
    rows: Rows,
    labels: Tensor | None,
    logits_to_keep: int | Tensor,
    num_items_in_batch: int | Tensor | None,
) -> ModelOutput:
    """What a model's ``forward`` gives of whole texts, with gradients.

    Args:
        model: with ``tuned`` within it.
        tuned: what is trained.
        ids: the tokens.
        rows: where the texts are.
        labels, logits_to_keep, num_items_in_batch: as of the model's ``forward``.

    Shapes:
        ids: [b, t]
        labels: [b, t], or those of a head
        logits: [b, t or kept, vocabulary], or [b, outputs] of a head

    Raises:
        InvalidInput: no loss can be computed with such labels.
        others: as ``RemoteBlocks.run``.
    """
    if tuned.score is not None:
        check_head_labels(tuned, labels, ids.shape[0])
        last = last_tokens(run_whole(ids, rows, model.embeddings, model.head, model.blocks), rows)  # [b, d]
        scores = tuned.score(last)  # [b, outputs]
        loss = None if labels is None else head_loss(tuned, scores, labels)
        return SequenceClassifierOutputWithPast(loss=loss, logits=scores)
    if labels is not None:
        check_labels(labels, ids, model.config.vocab_size)
    hidden = run_whole(ids, rows, model.embeddings, model.head, model.blocks)  # [b, p + t, d]
    if labels is None and isinstance(logits_to_keep, int) and logits_to_keep and not rows.has_padding:
        hidden = hidden[:, -logits_to_keep:]
    logits = model.head.lm_head(hidden)  # [b, p + t, vocabulary]
    loss = None
    if labels is not None:
        loss = model.loss_function(  # transformers' own
            logits,
            labels_in_place(labels, rows, tuned.prompt_tokens),
            vocab_size=model.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
        )
    logits = rows.back(logits[:, -ids.shape[1] :])  # [b, t, vocabulary]
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return CausalLMOutputWithPast(loss=loss, logits=logits[:, kept])


def check_labels(labels: Tensor, ids: Tensor, vocabulary: int, logits_to_keep: int | Tensor = 0) -> None:
    """Raises:
    InvalidInput: no loss of next tokens can be computed with these labels, or with so few logits.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != ids.shape:
        raise InvalidInput(f"labels are token ids as an integer tensor of input_ids' shape, {list(ids.shape)}")
    if not isinstance(logits_to_keep, int) or logits_to_keep:
        raise InvalidInput("the loss needs all logits: leave logits_to_keep out")
    counted = labels[labels != IGNORED]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < vocabulary:
        raise InvalidInput(f"labels must lie in 0 to {vocabulary - 1}, or be {IGNORED}")


def run_whole(ids: Tensor, rows: Rows, embeddings: Embeddings, head: Head, blocks: RemoteBlocks) -> Tensor:
    """Hidden states after the last norm, of the soft prompt and each row's text, with padding behind.

    Shapes:
        ids: [b, t]
        returns: [b, p + t, d]

    Raises: as ``RemoteBlocks.run``.
    """
    tuned = blocks.tuned
    words = embeddings.word_embeddings(rows.to_front(ids))  # [b, t, d]
    if tuned is not None and tuned.prompt_tokens:
        prompt = tuned.prompt_embeddings.to(words.dtype).expand(ids.shape[0], -1, -1)  # [b, p, d]
        words = torch.cat([prompt, words], dim=1)  # [b, p + t, d]
    hidden = embeddings.word_embeddings_layernorm(words)  # [b, p + t, d]
    between = {} if tuned is None else dict(tuned.between.items())
    at = 0
    for end in sorted({*map(int, between), len(blocks)}):
        if at < end:
            hidden = blocks.run(hidden, at, end)  # [b, p + t, d]
        if str(end) in between:
            hidden = between[str(end)](hidden)  # [b, p + t, d]
        at = end
    last: Tensor = head.ln_f(hidden)  # [b, p + t, d]
    return last


def labels_in_place(labels: Tensor, rows: Rows, prompt_tokens: int) -> Tensor:
    """Labels beside what ``run_whole`` gives: none for the soft prompt.

    Shapes:
        labels: [b, t]
        returns: [b, p + t]
    """
    return F.pad(rows.to_front(labels.long()), (prompt_tokens, 0), value=IGNORED)


def last_tokens(hidden: Tensor, rows: Rows) -> Tensor:
    """Of each row's last token of text.

    Shapes:
        hidden: [b, p + t, d]
        returns: [b, d]
    """
    places = (hidden.shape[1] - rows.tokens + rows.lengths - 1).to(hidden.device)  # [b]
    return hidden[torch.arange(len(places), device=hidden.device), places]
