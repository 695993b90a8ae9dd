"""A user's files: text or examples, or an error that says what else a file is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError
from ..formats.atomic import listed, named, read
from ..formats.tokenizer import MOST_LOST, utf8

TEXT = {".txt", ".md", ".rst", ".py", ".c", ".h", ".js", ".html", ".tex", ".csv", ".json"}
EXAMPLES = {".jsonl", ".ndjson", ".json"}  # a .json outside a folder of text holds examples
LEAST = 1000  # characters of a user's text


def own_text(path: Path) -> str:
    """The text of a user's file or folder, at least LEAST characters.

    StorageError, FormatError or InputError if it cannot be read, is not text, is too short or holds examples.
    """
    examples, files = source(path)
    if examples:
        raise InputError(f"{path}: holds examples, by its ending; expected text (examples are for train)")
    text = joined(map(text_of, files))
    if len(text) < LEAST:
        raise InputError(f"{path}: has {len(text)} characters of text; expected at least {LEAST}")
    return text


def check_lost(where: Path | str, count: int, whole: int) -> None:
    """InputError if more than MOST_LOST of a text is outside the alphabet or vocabulary."""
    if count > MOST_LOST * whole:
        raise InputError(
            f"{where}: {count / whole:.1%} of it is not in the base's alphabet; at most {MOST_LOST:.0%} may"
        )


def source(path: Path) -> tuple[bool, list[Path]]:
    """Whether a user's file or folder holds examples, and its files, in order of name.

    A file holds examples if its ending is in EXAMPLES, else text. A folder with a text file holds text,
    its .json files too; without one it holds examples. InputError if text is beside .jsonl or .ndjson, or if
    there is no such file.
    """
    if not os.path.isdir(path):
        return path.suffix.lower() in EXAMPLES, [path]
    files = [path / name for name in listed(path, TEXT | EXAMPLES)]
    texts = [file for file in files if file.suffix.lower() not in EXAMPLES]
    lines = [file for file in files if file.suffix.lower() in EXAMPLES - TEXT]
    if not files:
        raise InputError(f"{path}: has no text files; expected some that end in {', '.join(sorted(TEXT))}")
    if texts and lines:
        names = f"text ({texts[0].name!a}) and examples ({lines[0].name!a})"
        raise InputError(f"{path}: holds {names}; expected a folder of one kind")
    return not texts, files


def text_of(path: Path) -> str:
    """The text of a file; errors as in `read` and `utf8`."""
    return utf8(path, read(named(path)))


def joined(texts: Iterable[str]) -> str:
    """Texts concatenated, each with an empty line after it."""
    return "".join(text.strip() + "\n\n" for text in texts if text.strip())
