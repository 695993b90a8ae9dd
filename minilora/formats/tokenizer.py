"""Text -> ids and back, by the tokenizer.json in a model's folder, or by our ASCII alphabet.

The package `tokenizers` (extra `tokenizers`) does byte-level BPE and everything else that a tokenizer.json
can hold. A folder without that file and with a vocabulary of 128 is one of ours: a character's id is its
code point. Leaves out chat templates (data/chat.py): a prompt is what the model should see; the names of
special tokens in it (`<|im_start|>`) mean those tokens. `start` holds the tokens that the file puts before a
text (BOS); the caller that begins a sequence adds them once. Tokens that the file puts after a text are left
out. A byte without a token in the vocabulary is dropped, as upstream (SmolLM2 has none for six control
characters).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Array, to_host
from ..errors import FormatError, InputError, StorageError, needed, short
from . import gguf
from .atomic import exists, read
from .safetensors import refuse_pointer

VOCAB = 128  # ASCII; of the ids below 32 only the newline, 10, ever occurs in a text
STRANGE = re.compile(r"[^\n -~]")  # a character outside the alphabet
PLAIN = dict(zip("‘’‚‛′“”„‟«»‐‑‒–—―−⁄øØłŁ", "'" * 5 + '"' * 6 + "-" * 7 + "/oOlL", strict=True))
PLAIN |= {"æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ß": "ss", "\t": "    ", "\ufeff": ""}


def encode(text: str) -> np.ndarray:
    """The ids (T,) uint8 of a text; InputError names the first character not in the alphabet."""
    if strange := STRANGE.search(text):
        raise InputError(
            f"character {strange.start()} of the text is {strange[0]!a}; "
            "expected printable ASCII and newlines (fold() converts a text)"
        )
    return np.frombuffer(text.encode("ascii"), np.uint8)


def decode(ids: Array) -> str:
    """The text of ids (T,), on host or device; an id outside the alphabet shows as U+FFFD."""
    codes = to_host(ids).astype(np.int64)
    known = (codes == ord("\n")) | ((codes >= ord(" ")) & (codes <= ord("~")))
    return "".join(map(chr, np.where(known, codes, 0xFFFD).tolist()))


def fold(text: str) -> str:
    """The nearest text in the alphabet: no accents, plain quotes, "?" for anything else."""
    import unicodedata

    def plain(strange: re.Match[str]) -> str:
        mark = unicodedata.category(strange[0]).startswith("M")
        return PLAIN.get(strange[0], "" if mark else "?")

    return STRANGE.sub(plain, unicodedata.normalize("NFKD", text.replace("\r\n", "\n")))


def lost(text: str, plain: str) -> int:
    """How many characters of a text became "?" when it was folded."""
    return plain.count("?") - text.count("?")


MOST_LOST = 0.05  # the largest share of characters outside the alphabet, unknown tokens or control characters
CONTROLS = re.compile(r"[\x01-\x08\x0e-\x1f\x7f]")
NO_TEXT = (  # kind, endings, first bytes
    ("a PDF", ".pdf", b"%PDF-"),
    ("an RTF document", ".rtf", rb"{\rtf"),
    ("a zip archive or an office document", ".zip .docx .xlsx .pptx .odt .ods .epub .npz", b"PK\3\4"),
    ("an office document", ".doc .xls .ppt", b"\xd0\xcf\x11\xe0"),
    ("a Parquet table", ".parquet", b"PAR1\x15"),
    ("an Arrow table", ".arrow .feather", b"ARROW1\0\0"),
    ("a database", ".db .sqlite .sqlite3", b"SQLite format 3\0"),
    ("gzip", ".gz .tgz", b"\x1f\x8b"),
    ("bzip2", ".bz2", b"BZh91AY&SY"),
    ("xz", ".xz", b"\xfd7zXZ"),
    ("zstd", ".zst", b"\x28\xb5\x2f\xfd"),
    ("a 7z archive", ".7z", b"7z\xbc\xaf"),
    ("a NumPy array", ".npy", b"\x93NUMPY"),
    ("HDF5", ".h5 .hdf5", b"\x89HDF"),
    ("a model's file", ".gguf .safetensors .pt .pth .onnx .pkl", b"GGUF\3"),
    ("a picture", ".png", b"\x89PNG"),
    ("a picture", ".jpg .jpeg", b"\xff\xd8\xff"),
    ("UTF-16", ".utf16", b"\xff\xfe"),
    ("UTF-16", ".utf16", b"\xfe\xff"),
)


def utf8(path: Path, data: bytes) -> str:
    """The text of a file's bytes without a byte order mark; FormatError says what it is if it is not text."""
    for kind, endings, start in NO_TEXT:
        if data.startswith(start) or path.suffix.lower() in endings.split():
            raise FormatError(f"{path}: is {kind}; expected a file of UTF-8 text")
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        raise FormatError(f"{path}: is not UTF-8 text: {e.reason} at byte {e.start}") from None
    if b"\0" in data:
        raise FormatError(f"{path}: is not text: NUL at byte {data.index(0)}")
    controls = len(CONTROLS.findall(text))
    if controls > MOST_LOST * len(text):
        raise FormatError(f"{path}: is not text: {controls / len(text):.1%} of it are control characters")
    return text


SURROGATE = re.compile("[\ud800-\udfff]")
FILES = (  # copied from a base to a model made from it
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
    unknown: int | None = None  # the id of the unknown token

    def begun(self, ids: np.ndarray) -> np.ndarray:
        """The ids (T,) with `start` before them, unless they begin with it already."""
        n = len(self.start)
        return ids if tuple(ids[:n].tolist()) == self.start else np.concatenate([self.start, ids])

    def learn(self, text: str) -> tuple[np.ndarray, int]:
        """The ids (T,) of any text, and how many of them stand for something unknown."""
        plain = fold(text) if self.fold else text
        ids = self.encode(plain)
        return ids, lost(text, plain) if self.fold else int(np.count_nonzero(ids == self.unknown))


ALPHABET = Tokenizer(encode, decode, fold=True)  # of the base that ships: an id is a code point


def tokenizer(where: Path, settings: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer of a model's folder or GGUF file; `settings` is its config.json.

    StorageError if it has none, FormatError if it is damaged or another model's, UnsupportedError if the
    package is missing.
    """
    if where.suffix == ".gguf":
        text, settings = gguf.tokenizer_json(where), gguf.special(where)
    elif exists(where / "tokenizer.json"):
        refuse_pointer(where / "tokenizer.json", raw := read(where / "tokenizer.json"))
        text = utf8(where / "tokenizer.json", raw)
    elif vocab_size == VOCAB:
        return ALPHABET
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

    def to_ids(text: str) -> np.ndarray:
        if half := SURROGATE.search(text):  # from bytes that were not UTF-8
            raise InputError(f"character {half.start()} of the text is {half[0]!a}; expected Unicode text")
        return np.array(bpe.encode(text, add_special_tokens=False).ids, np.int64)

    def to_text(ids: Any) -> str:
        return str(bpe.decode(np.asarray(ids).tolist(), skip_special_tokens=False))

    first = bpe.encode("a")
    start = takewhile(lambda pair: pair[1], zip(first.ids, first.special_tokens_mask, strict=True))
    unknown = getattr(bpe.model, "unk_token", None)
    return Tokenizer(
        to_ids,
        to_text,
        ends(where, settings.get("eos_token_id")),
        start=tuple(id for id, _ in start),
        unknown=None if unknown is None else bpe.token_to_id(unknown),
    )


class Growing:
    """The text of tokens as it grows; an incomplete character waits for its rest.

    Each piece is decoded together with the one before it, since a decoder may drop a space at the start or
    need several tokens for one character. So a token takes the same time however long the text is, as in the
    incremental decoding of vLLM.
    """

    def __init__(self, words: Tokenizer) -> None:
        self.words = words
        self.shown: list[int] = []  # the tokens of the last piece
        self.new: list[int] = []  # those whose text is not shown yet

    def add(self, token: int) -> str:
        """The text that a token completes, "" if that is none."""
        self.new.append(token)
        text = self.piece()
        if not text.endswith("\ufffd"):
            self.shown, self.new = self.new, []
            return text
        return ""

    def rest(self) -> str:
        """What is left at the end: an incomplete character."""
        return self.piece() if self.new else ""

    def piece(self) -> str:
        """The text of the new tokens, beside those before them."""
        before = self.words.decode(np.array(self.shown, int))
        return self.words.decode(np.array(self.shown + self.new))[len(before) :]


def stream(words: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens piece by piece, up to a stop token."""
    text = Growing(words)
    for token in takewhile(lambda token: token not in words.stops, tokens):
        if piece := text.add(token):
            yield piece
    if rest := text.rest():
        yield rest


def ends(where: Path, eos: Any) -> frozenset[int]:
    """eos_token_id, an int or a list of them, as a set."""
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise InputError(f"{where}: eos_token_id is {short(eos)}; expected an int or a list of ints")
    return frozenset(ids)
