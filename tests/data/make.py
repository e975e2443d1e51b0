"""Make the data files of this folder; see README.md for what they are.

apt-get install bible-kjv
bible -f 'gen1:1-rev22:21' </dev/null > kjv.txt
python -m tests.data.make --bible kjv.txt              # with Python 3.11, whose documentation the files have
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

HERE = Path(__file__).parent
# Chapters of the language reference that share no text with one another.
CHAPTERS = (
    *("assert", "assignment", "calls", "comparisons", "compound", "customization", "execmodel", "import"),
    *("numeric-types", "objects", "operator-summary", "raise", "strings", "typesmapping", "typesseq"),
)
PASSAGE_CHARACTERS = 1200
PARTS = {"psalms": ("Psa",), "chronicles": ("1Chr", "2Chr")}
OF_EACH = 300


def passages(text: str) -> Iterator[str]:
    """Paragraphs, joined up to about a length."""
    held = ""
    for paragraph in re.split(r"\n\n+", text):
        held += paragraph.rstrip() + "\n\n"
        if len(held) >= PASSAGE_CHARACTERS:
            yield held.strip("\n") + "\n"
            held = ""
    if held.strip():
        yield held.strip("\n") + "\n"


def sentences(text: str) -> Iterator[str]:
    """Sentences of prose, each on one line."""
    for paragraph in re.split(r"\n\n+", text):
        if paragraph.startswith(" ") or "::=" in paragraph or "**" in paragraph or "==" in paragraph:
            continue
        yield from re.findall(r"[A-Z][^.]{40,220}\.(?=\s|$)", " ".join(paragraph.split()))


def write(path: Path, lines: Iterable[dict[str, str]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    print(f"{path.name}: {text.count(chr(10))} lines, {len(text.encode())} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bible", type=Path, required=True, help="what `bible -f gen1:1-rev22:21` prints")
    options = parser.parse_args()
    chance = random.Random("data")
    write(HERE / "python-reference.jsonl", ({"text": text} for name in CHAPTERS for text in passages(topics[name])))
    verses = [line.split(" ", 1) for line in options.bible.read_text(encoding="utf-8").splitlines() if " " in line]
    found = {
        label: [text for place, text in verses if re.match(r"\d?[A-Za-z]+", place)[0] in books]  # type: ignore[index]
        for label, books in PARTS.items()
    }
    found["python"] = [text for name in CHAPTERS for text in sentences(topics[name])]
    lines = [
        {"text": text, "label": label}
        for label, texts in found.items()
        for text in chance.sample(sorted(set(texts)), OF_EACH)
    ]
    chance.shuffle(lines)
    write(HERE / "sentences.jsonl", lines)


if __name__ == "__main__":
    main()
