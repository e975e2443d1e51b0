"""The two ends of a BLOOM model, which clients keep: token ids to hidden states, hidden states to logits."""

from __future__ import annotations

from torch import Tensor, nn

from compute.bloom.config import BloomConfig


class Embeddings(nn.Module):
    """Word embeddings and the layer norm after them: what comes before block 0."""

    def __init__(self, config: BloomConfig) -> None:
        """Make the layers, on whatever device is torch's default."""
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.word_embeddings_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, ids: Tensor) -> Tensor:
        """Look the tokens up.

        Shapes:
            ids: [b, t], int64
            returns: [b, t, d]
        """
        hidden: Tensor = self.word_embeddings_layernorm(self.word_embeddings(ids))  # [b, t, d]
        return hidden


class Head(nn.Module):
    """The last layer norm and the matrix that scores every word: what comes after the last block."""

    def __init__(self, config: BloomConfig) -> None:
        """Make the layers, on whatever device is torch's default."""
        super().__init__()
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Score the next token.

        Shapes:
            hidden: [b, t, d]
            returns: [b, t, v], logits
        """
        logits: Tensor = self.lm_head(self.ln_f(hidden))  # [b, t, v]
        return logits
