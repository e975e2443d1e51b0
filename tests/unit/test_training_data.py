"""What is trained on: lines, examples, batches, their order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.errors import InvalidInput
from client.tuning.training.data import (
    Example,
    Order,
    Row,
    classes_of,
    collate,
    label_examples,
    pack,
    read_rows,
    split,
)

DATA = Path(__file__).parents[1] / "data"


def words(texts: list[str]) -> list[list[int]]:
    """A token for each character."""
    return [[ord(character) for character in text] for text in texts]


def rows(*labels: str | float | None) -> list[Row]:
    return [Row(line=index + 1, text=f"text {index}", label=label) for index, label in enumerate(labels)]


def test_lines_are_read_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes('\ufeff{"text": "é", "label": "a"}\n\n  \n{"label": 2, "text": "b", "more": []}'.encode())
    assert read_rows(path, is_labelled=True) == [
        Row(line=1, text="é", label="a"),
        Row(line=4, text="b", label=2),
    ]


@pytest.mark.parametrize(
    ("line", "is_labelled", "told"),
    [
        (b"{", False, "line 2: it is not JSON"),
        (b'{"text": "\xff"}', False, "line 2: it is not UTF-8"),
        (b'"text"', False, 'line 2: it is not an object with "text"'),
        (b'{"txt": "a"}', False, 'line 2: it is not an object with "text"'),
        (b'{"text": ""}', False, "line 2: .* at least one character"),
        (b'{"text": 3}', False, "line 2: .* at least one character"),
        (rb'{"text": "\ud800"}', False, "line 2: .* surrogate"),
        (b'{"text": "a", "label": "b"}', False, "line 2: .* add --method head"),
        (b'{"text": "a"}', True, 'line 2: it has no "label"'),
        (b'{"text": "a", "label": null}', True, 'line 2: it has no "label"'),
        (b'{"text": "a", "label": true}', True, "line 2: .* a text or a number"),
        (b'{"text": "a", "label": [1]}', True, "line 2: .* a text or a number"),
        (b'{"text": "a", "label": ""}', True, "line 2: .* empty"),
        (b'{"text": "a", "label": NaN}', True, "line 2: .* not finite"),
        (b'{"text": "a", "label": 1e999}', True, "line 2: .* not finite"),
        (b"[" * 100_000, False, "line 2"),
    ],
)
def test_a_bad_line_is_named(line: bytes, is_labelled: bool, told: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = b'{"text": "a", "label": "x"}\n' if is_labelled else b'{"text": "a"}\n'
    path.write_bytes(good + line + b"\n" + good)
    with pytest.raises(InvalidInput, match=told):
        read_rows(path, is_labelled=is_labelled)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n")
    with pytest.raises(InvalidInput, match="is empty"):
        read_rows(path, is_labelled=False)


@given(st.lists(st.text(min_size=1), min_size=1, max_size=8), st.integers(2, 9), st.sampled_from([None, 7]))
def test_packing_foretells_every_token_but_the_first_once(texts: list[str], length: int, end: int | None) -> None:
    stream = [token for ids in words(texts) for token in (*ids, *([] if end is None else [end]))]
    if len(stream) < 2:
        with pytest.raises(InvalidInput, match="nothing to learn"):
            pack([Row(line=1, text=text) for text in texts], words, end=end, length=length)
        return
    made = pack([Row(line=1, text=text) for text in texts], words, end=end, length=length)
    assert made.tokens == len(stream)
    assert made.cut_tokens == 0
    assert [token for example in made.examples for token in example.ids[1:]] == stream[1:]
    assert all(2 <= len(example.ids) <= length for example in made.examples)
    assert all(len(example.ids) == length for example in made.examples[:-1])


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_each_epoch_takes_every_example_once(count: int, batch_size: int, seed: int) -> None:
    order, other = Order(count, batch_size, seed), Order(count, batch_size, seed)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.at(step) for step in steps]
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        epochs.append([index for batch in batches for index in batch])
        assert sorted(epochs[-1]) == list(range(count))
        assert [other.at(step) for step in reversed(steps)] == batches[::-1]  # whatever was asked for before
    if count > 9:
        assert len(set(map(tuple, epochs))) > 1


def test_the_order_stays_what_it_was() -> None:
    """It is part of what a checkpoint continues, across versions of everything."""
    assert [Order(5, 2, 7).at(step) for step in range(4)] == [[1, 4], [3, 2], [0], [4, 2]]


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 3))
def test_held_out_lines_are_others(count: int, share: float, seed: int) -> None:
    every = rows(*[None] * count)
    training, held_out = split(every, share, seed)
    assert training and held_out
    assert sorted([*training, *held_out], key=lambda row: row.line) == every
    assert split(every, share, seed) == (training, held_out)


def test_one_line_is_not_split() -> None:
    with pytest.raises(InvalidInput, match="--held-out"):
        split(rows(None), 0.5, 0)


def test_classes_are_named_in_order() -> None:
    assert classes_of(rows("b", "a", "b")) == ("a", "b")
    assert classes_of(rows(10, 9, 2.5, 9.0)) == ("2.5", "9", "10")
    with pytest.raises(InvalidInput, match="line 2: some labels are texts and some are numbers"):
        classes_of(rows("a", 1))
    with pytest.raises(InvalidInput, match="there are 1 different labels"):
        classes_of(rows("a", "a"))
    with pytest.raises(InvalidInput, match="--regression"):
        classes_of(rows(*range(1001)))


def test_long_texts_of_a_head_are_cut_and_counted() -> None:
    made = label_examples(rows("a", "b", "a"), words, length=5, classes=("a", "b"), named="f")
    assert [example.label for example in made.examples] == [0, 1, 0]
    assert [len(example.ids) for example in made.examples] == [5, 5, 5]
    assert (made.texts, made.tokens, made.cut_texts, made.cut_tokens) == (3, 18, 3, 3)
    with pytest.raises(InvalidInput, match="f, line 2: the label 'c' is not one that is trained"):
        label_examples(rows("a", "c"), words, length=5, classes=("a", "b"), named="f")
    with pytest.raises(InvalidInput, match="f, line 2: the label is no number"):
        label_examples(rows(1, "c"), words, length=5, classes=None, named="f")
    with pytest.raises(InvalidInput, match="f, line 1: the text has no tokens"):
        label_examples(rows(1), lambda texts: [[] for _ in texts], length=5, classes=None, named="f")


def test_batches_are_padded_on_the_right() -> None:
    batch = collate([Example(ids=(5, 6, 7)), Example(ids=(8, 9))], pad=3)
    assert batch.ids.tolist() == [[5, 6, 7], [8, 9, 3]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels.tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert (batch.targets, batch.tokens) == (3, 5)
    assert collate([Example(ids=(5,), label=1)], pad=3).labels.dtype == torch.int64
    assert collate([Example(ids=(5,), label=1.0)], pad=3).labels.dtype == torch.float32


def test_a_token_that_looks_like_padding_counts() -> None:
    assert collate([Example(ids=(5, 3, 3))], pad=3).labels.tolist() == [[-100, 3, 3]]


def test_the_digest_is_of_tokens_and_labels() -> None:
    one = label_examples(rows(1, 2), words, length=9, classes=None, named="f")
    two = label_examples(rows(1, 3), words, length=9, classes=None, named="f")
    cut = label_examples(rows(1, 2), words, length=4, classes=None, named="f")
    assert len({one.digest, two.digest, cut.digest}) == 3
    assert one.digest == label_examples(rows(1, 2), words, length=9, classes=None, named="g").digest


@pytest.mark.parametrize(("name", "is_labelled"), [("python-reference", False), ("sentences", True)])
def test_the_data_that_ship_are_small_and_good(name: str, is_labelled: bool) -> None:
    path = DATA / f"{name}.jsonl"
    assert path.stat().st_size < 300_000
    found = read_rows(path, is_labelled=is_labelled)
    assert len(found) > 100
    assert len({row.text for row in found}) == len(found), "a text that is there twice may be held out and trained on"
    if is_labelled:
        assert classes_of(found) == ("chronicles", "psalms", "python")
    assert all(set(json.loads(line)) <= {"text", "label"} for line in path.read_text("utf-8").splitlines())
