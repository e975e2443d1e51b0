"""Whole sequences at once, without a session: what training does, and what it is measured by.

Rows may have padding on either side. Blocks get them with what there is of padding behind the text, where nothing sees
it, and the soft prompt in front.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from client.errors import InvalidInput
from client.tuning.remote import RemoteBlocks
from compute.bloom import Embeddings, Head

IGNORED = -100


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
