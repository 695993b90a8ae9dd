"""Text -> ids and back, as the model's folder says: its tokenizer.json, or the alphabet of data.py.

Byte-level BPE and all else that a tokenizer.json can hold is done by the package `tokenizers` (extra
`tokenizers`). A folder without that file and with a vocabulary of 128 is one of ours: a character's id
is its code point. Leaves out chat templates: a prompt is given as the model should see it, and the names
of special tokens in it (`<|im_start|>`) mean those tokens. Tokens that the file puts before a text (BOS) are
`start`: who begins a sequence adds them, once; what it puts after one is left out. A byte for which the
vocabulary has no token is dropped, as upstream (SmolLM2 has none for six control characters).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from ..data import corpora
from ..errors import FormatError, InputError, StorageError, needed, short
from . import gguf
from .atomic import exists, read
from .safetensors import refuse_pointer

SURROGATE = re.compile("[\ud800-\udfff]")
FILES = (  # what is copied beside a model that is made from another
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    """encode: text -> ids (T,) of ints; decode: ids -> text; the ids that end a text."""

    encode: Callable[[str], np.ndarray]
    decode: Callable[[Any], str]
    stops: frozenset[int] = frozenset()
    fold: bool = False  # whether text must be folded into the alphabet first
    start: tuple[int, ...] = ()  # the ids that stand before a text, once
    unknown: int | None = None  # the id of what the vocabulary has not

    def begun(self, ids: np.ndarray) -> np.ndarray:
        """The ids (T,) of a text as a sequence begins, with `start` before them unless it is there."""
        n = len(self.start)
        return ids if tuple(ids[:n].tolist()) == self.start else np.concatenate([self.start, ids])

    def learn(self, text: str) -> tuple[np.ndarray, int]:
        """The ids (T,) of any text, and how many of them stand for what has none."""
        plain = corpora.fold(text) if self.fold else text
        ids = self.encode(plain)
        lost = corpora.lost(text, plain) if self.fold else int(np.count_nonzero(ids == self.unknown))
        return ids, lost


def tokenizer(where: Path, settings: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer of a model's folder or GGUF file; `settings` is its config.json.

    StorageError if it has none, FormatError if it is damaged or another model's, UnsupportedError if the
    package is missing.
    """
    if where.suffix == ".gguf":
        text, settings = gguf.tokenizer_json(where), gguf.special(where)
    elif exists(where / "tokenizer.json"):
        refuse_pointer(where / "tokenizer.json", raw := read(where / "tokenizer.json"))
        text = corpora.utf8(where / "tokenizer.json", raw)
    elif vocab_size == corpora.VOCAB:
        return Tokenizer(corpora.encode, corpora.decode, fold=True)
    else:
        raise StorageError(f"{where}: has no tokenizer.json; expected one for a vocabulary of {vocab_size}")
    package = needed("tokenizers", "tokenizers")
    try:
        bpe = package.Tokenizer.from_str(text)
    except Exception as e:  # the package raises no narrower class
        raise FormatError(f"{where}: its tokenizer cannot be read: {short(str(e))}") from e
    if (last := max(bpe.get_vocab().values(), default=0)) >= vocab_size:
        raise FormatError(f"{where}: its tokenizer has an id {last}; the model's are below {vocab_size}")
    bpe.no_truncation()  # a file may ask for either
    bpe.no_padding()

    def encode(text: str) -> np.ndarray:
        if half := SURROGATE.search(text):  # of bytes that were no UTF-8
            raise InputError(f"character {half.start()} of the text is {half[0]!a}; expected Unicode text")
        return np.array(bpe.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(ids: Any) -> str:
        return str(bpe.decode(np.asarray(ids).tolist(), skip_special_tokens=False))

    first = bpe.encode("a")
    start = takewhile(lambda pair: pair[1], zip(first.ids, first.special_tokens_mask, strict=True))
    unknown = getattr(bpe.model, "unk_token", None)
    return Tokenizer(
        encode,
        decode,
        ends(where, settings.get("eos_token_id")),
        start=tuple(id for id, _ in start),
        unknown=None if unknown is None else bpe.token_to_id(unknown),
    )


def stream(words: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as it grows, up to one that ends it; what is half a character waits for the rest."""
    ids: list[int] = []
    shown = 0
    for token in tokens:
        if token in words.stops:
            break
        ids.append(token)
        text = words.decode(np.array(ids))
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    rest = words.decode(np.array(ids))[shown:] if ids else ""
    if rest:
        yield rest


def ends(where: Path, given: Any) -> frozenset[int]:
    """eos_token_id, an int or a list of them, as a set."""
    listed = [] if given is None else given if isinstance(given, list) else [given]
    if not all(type(i) is int and i >= 0 for i in listed):
        raise InputError(f"{where}: eos_token_id is {short(given)}; expected an int or a list of ints")
    return frozenset(listed)
