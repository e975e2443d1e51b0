"""What is printed while a model generates."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import compute
from client.streaming import TextPrinter

TEXT = "In the beginning — 起初 — was  a word:\nnaïve 🌱 seeds"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    (folder,) = {path.parent for path in Path(compute.__file__).parent.rglob("tokenizer.json")}
    return AutoTokenizer.from_pretrained(folder)


def test_every_character_is_printed_as_soon_as_it_is_whole(tokenizer: Any) -> None:
    out = io.StringIO()
    printer = TextPrinter(tokenizer, out)
    ids = tokenizer(TEXT).input_ids
    printer.put(torch.tensor([ids[:2]]))
    assert out.getvalue() == ""  # the prompt waits for the first token
    assert not printer.began
    for count, token in enumerate(ids[2:], start=3):
        printer.put(torch.tensor([token]))
        whole = tokenizer.decode(ids[:count], skip_special_tokens=True)
        assert out.getvalue() == whole.rstrip("\ufffd")
    assert printer.began
    printer.end()
    assert out.getvalue() == TEXT + "\n"


def test_a_character_that_was_not_finished_is_shown_for_what_it_is(tokenizer: Any) -> None:
    out = io.StringIO()
    printer = TextPrinter(tokenizer, out)
    ids = tokenizer("起").input_ids
    assert len(ids) > 1, "the test needs a character of several tokens"
    printer.put(torch.tensor(ids[:-1]))
    assert out.getvalue() == ""
    printer.end()
    assert out.getvalue() == tokenizer.decode(ids[:-1]) + "\n"
    assert "\ufffd" in out.getvalue()


def test_special_tokens_are_not_printed(tokenizer: Any) -> None:
    out = io.StringIO()
    printer = TextPrinter(tokenizer, out)
    printer.put(torch.tensor([*tokenizer("yes").input_ids, tokenizer.eos_token_id]))
    printer.end()
    assert out.getvalue() == "yes\n"


def test_what_is_known_already_is_not_printed(tokenizer: Any) -> None:
    out = io.StringIO()
    ids = tokenizer(TEXT).input_ids
    before = len(tokenizer("In").input_ids)
    printer = TextPrinter(tokenizer, out, skip=before)
    printer.put(torch.tensor([ids]))
    printer.end()
    assert out.getvalue() == TEXT.removeprefix(tokenizer.decode(ids[:before])) + "\n"
