"""Prompts with completions: rows of a JSON file -> padded batches, whose prompts have no loss."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError, InputError, MiniloraError, short
from ..formats.safetensors import unique
from ..formats.tokenizer import Tokenizer
from ..ops import IGNORE
from . import user_files
from .batching import Batch

Example = tuple[np.ndarray, int]  # ids, and the index where the loss begins


def examples(path: Path, words: Tokenizer, length: int) -> list[Example]:
    """The examples of a file of JSON lines or a JSON array, or of a folder of such files in order of name.

    A prompt that is too long keeps its end. Each example begins with the tokenizer's start tokens and ends
    with a stop token, if it has any. FormatError or InputError counts the examples that cannot be used and
    names the first; InputError if too much of their text is lost.
    """
    rows: list[Example] = []
    bad: list[tuple[str, MiniloraError]] = []
    lost = 0
    for where, row in (entry for file in user_files.source(path)[1] for entry in entries(file)):
        try:
            parts = [words.learn(text) for text in strings(row())]
            rows.append(example([ids for ids, _ in parts], words, length))
            lost += sum(count for _, count in parts)
        except MiniloraError as e:
            bad.append((where, e))
    if bad:
        where, first = bad[0]
        kinds = Counter(re.split("[:;]", str(e))[0] for _, e in bad).most_common()
        count = ", ".join(f"{n} x {kind}" for kind, n in kinds[:3]) + ", ..." * (len(kinds) > 3)
        whole = len(rows) + len(bad)
        raise type(first)(f"{where}: {first}; of {whole} examples {len(bad)} cannot be used ({count})")
    user_files.check_lost(path, lost, sum(len(ids) for ids, _ in rows))
    return rows


def entries(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The place of each example in a file, a line or an item of the array, and a function that reads it."""
    text = user_files.text_of(path)
    if path.suffix.lower() != ".json":
        for number, line in enumerate(text.split("\n"), 1):  # only there: U+2028 may be in a string
            if line.strip():
                yield f"{path}: line {number}", partial(parsed, line)
        return
    try:
        items = parsed(text)
    except FormatError as e:
        raise FormatError(f"{path}: {e}; expected an array (of lines with one example each: .jsonl)") from e
    if type(items) is not list:
        raise FormatError(f"{path}: is a JSON {type(items).__name__}; expected an array of examples")
    for number, item in enumerate(items, 1):
        yield f"{path}: item {number}", [item].pop


def parsed(text: str) -> Any:
    """The value of a JSON text; FormatError if it is invalid or gives a key twice."""
    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise FormatError(f"is not JSON: {short(str(e))}") from e


def strings(row: Any) -> list[str]:
    """The prompt and completion of an example, or its text alone; FormatError if it has neither."""
    fields = row if type(row) is dict else {}
    keys = ("text",) if "text" in fields else ("prompt", "completion")
    for key in keys:
        if type(fields.get(key)) is not str:
            raise FormatError(f"{key} is not a string; expected prompt and completion, or text")
    return [fields[key] for key in keys]


def example(parts: Sequence[np.ndarray], words: Tokenizer, length: int) -> Example:
    """The ids of a prompt and its completion, or of a text, learnt from its first token on; InputError."""
    n = max(1, len(words.start))  # so many tokens at least have no loss
    begun = words.begun(parts[0])
    prompt, answer = (begun, parts[1]) if len(parts) == 2 else (begun[:n], begun[n:])
    answer = np.concatenate([answer, sorted(words.stops)[:1]]).astype(np.int64)
    room = length + 1 - len(answer)
    if not len(answer):
        raise InputError("has no token to learn; expected one or more")
    if room < n:
        raise InputError(f"has too many tokens to learn: {len(answer)}; expected at most {length + 1 - n}")
    if not len(prompt):
        raise InputError("has no prompt; expected at least one token of it")
    start, rest = np.split(prompt, [len(words.start)])
    prompt = np.concatenate([start, rest[max(0, len(rest) + len(start) - room) :]])
    return np.concatenate([prompt, answer]).astype(np.int64), len(prompt)


def padded(rows: Sequence[Example]) -> Batch:
    """Inputs and labels (N, T) int64 of examples; prompts and padding have no loss."""
    T = max(len(ids) for ids, _ in rows) - 1
    inputs = np.zeros((len(rows), T), np.int64)
    labels = np.full((len(rows), T), IGNORE, np.int64)
    for i, (ids, start) in enumerate(rows):
        inputs[i, : len(ids) - 1] = ids[:-1]
        labels[i, start - 1 : len(ids) - 1] = ids[start:]
    return inputs, labels


def draws(rows: Sequence[Example], rng: np.random.Generator, batch: int) -> Iterator[Batch]:
    """Endless batches of random examples, one draw of integers each, so a saved `rng` resumes the stream."""
    while True:
        yield padded([rows[i] for i in rng.integers(len(rows), size=batch)])
