"""What is trained on: lines of JSON, examples, batches in an order that seed and epoch alone decide.

A data file has one object a line: ``{"text": TEXT}`` to learn the language, ``{"text": TEXT, "label": LABEL}`` for a
head. Labels are texts, or numbers. Other names in the object are no concern of ours; empty lines are skipped.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from client.errors import InvalidInput

MAX_LABELS: Final = 1000  # more classes than that are numbers to be foretold, or a mistake
NO_LABEL: Final = -100  # transformers' and torch's: counts for nothing

Encode = Callable[[list[str]], list[list[int]]]
"""Texts to token ids."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a data file.

    Attributes:
        line: Its number, from 1.
        label: As the file has it; ``None`` if there is none.
    """

    line: int
    text: str
    label: str | int | float | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """Some tokens that go through the model together.

    Attributes:
        ids: Token ids.
        label: A class or a number to be foretold; ``None`` to foretell each token by those before it.
    """

    ids: tuple[int, ...]
    label: int | float | None = None


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A data file as examples.

    Attributes:
        texts: Of how many texts they are.
        tokens: Of these texts, together.
        cut_texts: How many did not fit into an example.
        cut_tokens: What is not used of them.
    """

    examples: tuple[Example, ...]
    texts: int
    tokens: int
    cut_texts: int = 0
    cut_tokens: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all examples in order."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(struct.pack(f"<I{len(example.ids)}I", len(example.ids), *example.ids))
            digest.update(repr(example.label).encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples as tensors, padded on the right.

    Attributes:
        targets: How many values are foretold in it: what the mean of its loss is over.
        tokens: Without padding.

    Shapes:
        ids, mask: [b, t], int64
        labels: [b, t], int64 for the language; [b], int64 for classes, float32 for numbers
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    targets: int
    tokens: int


def read_rows(path: Path, *, is_labelled: bool) -> list[Row]:
    """All lines of a data file.

    Args:
        path: Of the file, UTF-8.
        is_labelled: Whether each line must have a label; else none may have one.

    Raises:
        InvalidInput: A line that is not what it should be, by its number.
        OSError: The file cannot be read.
    """
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(_read_row(number, line, is_labelled=is_labelled))
            except (ValueError, RecursionError) as error:
                raise InvalidInput(f"{path}, line {number}: {_spell(error)}") from error
    if not rows:
        raise InvalidInput(f'{path} is empty: give one {{"text": ...}} a line')
    return rows


def _spell(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f'it is not JSON ({error.msg} at character {error.pos + 1}); a line is like {{"text": "..."}}'
    return str(error) or "it cannot be read"


def _read_row(number: int, line: bytes, *, is_labelled: bool) -> Row:
    """Raises:
    ValueError: what is wrong with the line.
    """
    content = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    if not isinstance(content, dict) or "text" not in content:
        raise ValueError('it is not an object with "text", like {"text": "..."}')
    text, label = content["text"], content.get("label")
    if not isinstance(text, str) or not text:
        raise ValueError('"text" is not a text of at least one character')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError('"text" has half of a surrogate pair, which is no character') from None
    if not is_labelled:
        if label is not None:
            raise ValueError('it has a "label", which only a head can learn: add --method head, or leave labels out')
        return Row(line=number, text=text)
    if label is None:
        raise ValueError('it has no "label", which a head learns')
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise ValueError(f'"label" is {json.dumps(label):.40}: give a text or a number')
    if isinstance(label, str) and not label:
        raise ValueError('"label" is empty')
    if isinstance(label, float) and not math.isfinite(label):
        raise ValueError(f'"label" is {label}, which is not finite')
    return Row(line=number, text=text, label=label)


def split(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Keep some lines back, by chance, at least one; both parts keep their order.

    Args:
        rows: All lines.
        share: How many of them, above 0 and below 1.
        seed: Of chance.

    Raises:
        InvalidInput: There is one line only.
    """
    if len(rows) < 2:
        raise InvalidInput(
            "one text cannot be split into training and held-out texts: name a file with --held-out, or "
            "evaluate with nothing, --held-out-share 0"
        )
    count = min(len(rows) - 1, max(1, round(share * len(rows))))
    chosen = set(random.Random(f"held-out {seed}").sample(range(len(rows)), count))
    return (
        [row for index, row in enumerate(rows) if index not in chosen],
        [row for index, row in enumerate(rows) if index in chosen],
    )


def pack(rows: Sequence[Row], encode: Encode, *, end: int | None, length: int) -> Examples:
    """Examples to learn the language from: all texts one after another, cut into equal lengths.

    Each example begins with the token that ended the one before, so that every token but the very first is foretold
    once. The last one is shorter.

    Args:
        rows: The texts.
        encode: Tokens of texts.
        end: What stands behind each text, if the model has such a token.
        length: Tokens of an example, at least 2.

    Raises:
        InvalidInput: There is nothing to foretell.
    """
    stream: list[int] = []
    for ids in encode([row.text for row in rows]):
        stream += ids if end is None else [*ids, end]
    if len(stream) < 2:
        raise InvalidInput("the texts have less than two tokens together: there is nothing to learn")
    starts = range(0, len(stream) - 1, length - 1)
    examples = tuple(Example(ids=tuple(stream[start : start + length])) for start in starts)
    return Examples(examples=examples, texts=len(rows), tokens=len(stream))


def classes_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The names of all classes: texts in the order of the alphabet, numbers in their own.

    Raises:
        InvalidInput: Less than two, or more than there can be.
    """
    found = {row.label for row in rows}
    texts = sorted(label for label in found if isinstance(label, str))
    numbers = sorted(label for label in found if isinstance(label, int | float))
    if texts and numbers:
        line = next(row.line for row in rows if isinstance(row.label, str) is not isinstance(rows[0].label, str))
        raise InvalidInput(f"line {line}: some labels are texts and some are numbers: let all be of one kind")
    names = tuple(texts or [_class_name(number) for number in numbers])
    if not 2 <= len(names) <= MAX_LABELS:
        hint = " (or add --regression, if they are amounts)" if numbers else ""
        raise InvalidInput(f"there are {len(names)} different labels: give 2 to {MAX_LABELS}{hint}")
    return names


def _class_name(label: str | float | None) -> str:
    return label if isinstance(label, str) else f"{label:.17g}"


def label_examples(
    rows: Sequence[Row], encode: Encode, *, length: int, classes: Sequence[str] | None, named: str
) -> Examples:
    """Examples for a head: each text is one, cut at its end if it is too long.

    Args:
        rows: Texts and labels.
        encode: Tokens of texts.
        length: At most so many tokens of a text.
        classes: Their names; ``None`` if labels are numbers to be foretold.
        named: What the rows come from, for errors.

    Raises:
        InvalidInput: A label that there is not, a text without tokens; by its line.
    """
    places = {name: index for index, name in enumerate(classes or ())}
    made, tokens, cut_texts, cut_tokens = [], 0, 0, 0
    for row, ids in zip(rows, encode([row.text for row in rows]), strict=True):
        if not ids:
            raise InvalidInput(f"{named}, line {row.line}: the text has no tokens")
        label: int | float
        if classes is None:
            if row.label is None or isinstance(row.label, str):
                raise InvalidInput(f"{named}, line {row.line}: the label is no number, which --regression needs")
            label = float(row.label)
        elif (name := _class_name(row.label)) in places:
            label = places[name]
        else:
            raise InvalidInput(f"{named}, line {row.line}: the label {name!r:.60} is not one that is trained")
        tokens += len(ids)
        cut_texts += len(ids) > length
        cut_tokens += max(0, len(ids) - length)
        made.append(Example(ids=tuple(ids[:length]), label=label))
    return Examples(examples=tuple(made), texts=len(rows), tokens=tokens, cut_texts=cut_texts, cut_tokens=cut_tokens)


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Make a batch of them.

    Args:
        examples: At least one; all for the language, all for classes, or all for numbers.
        pad: Token id of padding.
    """
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad)  # [b, t]
    mask = torch.zeros_like(ids)  # [b, t]
    for index, example in enumerate(examples):
        ids[index, : len(example.ids)] = torch.tensor(example.ids)
        mask[index, : len(example.ids)] = 1
    tokens = int(mask.sum())
    if examples[0].label is None:
        labels = ids.masked_fill(mask == 0, NO_LABEL)  # [b, t]
        labels[:, 0] = NO_LABEL  # a soft prompt stands before it, but would not be asked for what follows it later on
        return Batch(ids=ids, mask=mask, labels=labels, targets=tokens - len(examples), tokens=tokens)
    labels = torch.tensor([example.label for example in examples])  # [b]; whole numbers are int64
    return Batch(ids=ids, mask=mask, labels=labels, targets=len(examples), tokens=tokens)


class Order:
    """Which examples a step takes: all of them once in each epoch, shuffled by seed and epoch alone."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        """Args:
        count: Examples.
        batch_size: Of a step; the last step of an epoch may have fewer.
        seed: Of chance.
        """
        self._count = count
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._shuffled: list[int] = []

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self._count / self._batch_size)

    def at(self, step: int) -> list[int]:
        """The examples of a step, from 0."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._shuffled = epoch, list(range(self._count))
            random.Random(f"order {self._seed} {epoch}").shuffle(self._shuffled)
        return self._shuffled[number * self._batch_size : (number + 1) * self._batch_size]
