"""Text as it comes: every token is shown at once, not only whole words."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tokenizers.decoders import DecodeStream
from transformers.generation.streamers import BaseStreamer


class TextPrinter(BaseStreamer):  # type: ignore[misc]  # transformers has no types here
    """A streamer for ``generate`` that prints the prompt and what follows, a character as soon as it is whole; the
    prompt together with the first token, for there may be none.

    Args:
        tokenizer: the model's, a fast one.
        out: where to.
        skip: tokens at the beginning of the prompt that are not printed.
    """

    def __init__(self, tokenizer: Any, out: TextIO | None = None, *, skip: int = 0) -> None:
        self._tokenizer = tokenizer
        self._out = out or sys.stdout
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._printed = 0  # characters, or about to be, or not to be at all
        self._held: str | None = None  # the prompt
        self._skip = skip

    def put(self, value: Any) -> None:
        """Take the next token ids, of one row; the prompt first."""
        if self._ids and self._held is not None:
            self._show(self._held)
            self._held = None
        elif not self._ids:
            self._held = ""
        for token in value.flatten().tolist():
            self._ids.append(token)
            self._print(self._stream.step(self._tokenizer.backend_tokenizer, token) or "")

    def end(self) -> None:
        """Print what is left of a character that was not finished, and end the line."""
        if self._held is not None:
            self._show(self._held)
            self._held = None
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        self._print(text[self._printed :])
        print(file=self._out, flush=True)

    @property
    def began(self) -> bool:
        """Whether anything has been printed."""
        return self._printed > 0 and self._held is None

    def _print(self, text: str) -> None:
        self._printed += len(text)
        if text and len(self._ids) > self._skip:
            if self._held is None:
                self._show(text)
            else:
                self._held += text

    def _show(self, text: str) -> None:
        print(text, end="", file=self._out, flush=True)
