"""A folder's tokenizer: ours without a file, else what the package `tokenizers` makes of tokenizer.json."""

import json
import os
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.errors import FormatError, InputError, MiniloraError, StorageError, UnsupportedError
from minilora.formats.tokenizer import VOCAB, Tokenizer, encode, stream, tokenizer

package = pytest.importorskip("tokenizers")

SIZE = 300  # of the model's vocabulary
END = "<|end|>"
printed = st.text("\n" + "".join(map(chr, range(32, 127))))


@pytest.fixture(scope="module")
def trained():
    """A byte-level BPE that the package trained itself."""
    bpe = package.Tokenizer(package.models.BPE())
    bpe.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = package.decoders.ByteLevel()
    alphabet = package.pre_tokenizers.ByteLevel.alphabet()
    trainer = package.trainers.BpeTrainer(
        vocab_size=SIZE - 20, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the cat sat on the mat and the dog sat too"] * 10, trainer)
    return bpe


@pytest.fixture(scope="module")
def words(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    trained.save(str(folder / "tokenizer.json"))
    return tokenizer(folder, {"eos_token_id": 0}, SIZE)


def refused(error, match, where, settings, size=SIZE):
    """One line that names the folder."""
    with pytest.raises(error, match=match) as e:
        tokenizer(where, settings, size)
    assert isinstance(e.value, MiniloraError)
    assert str(where) in str(e.value)
    assert len(str(e.value).splitlines()) == 1
    assert len(str(e.value)) < 600


# ---- ours


@given(text=printed)
def test_without_a_tokenizer_file_the_alphabet_is_used(text, tmp_path_factory):
    found = tokenizer(tmp_path_factory.getbasetemp(), {}, VOCAB)
    assert found.encode(text).tolist() == encode(text).tolist()
    assert found.decode(found.encode(text)) == text
    assert (found.stops, found.fold) == (frozenset(), True)


@pytest.mark.parametrize("size", [127, 129, 49152])
def test_another_vocabulary_size_needs_a_tokenizer_file(size, tmp_path):
    refused(StorageError, f"no tokenizer.json; expected one for a vocabulary of {size}", tmp_path, {}, size)


# ---- the package's


@given(text=st.text() | st.text("the cat sat dog<|end|>"))
def test_ids_match_the_package_and_decode_to_the_text(text, words, trained):
    ids = words.encode(text)
    assert (ids.dtype, ids.ndim) == (np.int64, 1)
    assert ids.tolist() == trained.encode(text).ids
    assert words.decode(ids) == words.decode(ids.tolist()) == text


def test_the_text_of_a_special_token_encodes_to_it(words):
    assert words.encode(f"the{END}the").tolist()[1:-1] == [0]
    assert words.decode([0]) == END
    assert words.fold is False


@given(text=st.text(), at=st.integers(0, 20))
def test_a_lone_surrogate_is_refused_by_its_position(text, at, words):
    with pytest.raises(InputError, match=f"character {len(text[:at])} of the text is '.udcff'"):
        words.encode(text[:at] + "\udcff" + text[at:])


def test_truncation_padding_and_templates_in_the_file_are_ignored(trained, words, tmp_path):
    """Cutting to a length, filling up to one, and tokens put before each text."""
    bpe = package.Tokenizer.from_str(trained.to_str())
    bpe.enable_truncation(3)
    bpe.enable_padding(length=50)
    bpe.post_processor = package.processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    bpe.save(str(tmp_path / "tokenizer.json"))
    text = "the cat sat on the mat"
    assert len(bpe.encode(text).ids) == 50
    assert tokenizer(tmp_path, {}, SIZE).encode(text).tolist() == words.encode(text).tolist()


@pytest.mark.parametrize(
    ("given", "stops"),
    [({}, set()), ({"eos_token_id": None}, set()), ({"eos_token_id": 0}, {0}), ({"eos_token_id": []}, set()),
     ({"eos_token_id": [2, 7, 2]}, {2, 7})],
)  # fmt: skip
def test_stop_tokens_come_from_the_config(given, stops, trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer(tmp_path, given, SIZE).stops == stops


@pytest.mark.parametrize("bad", ["2", 2.0, True, -1, [2, "7"], [2, None], {"a": 2}, [[2]], list("x" * 999)])
def test_an_eos_id_that_is_no_token_is_refused(bad, trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    refused(InputError, "eos_token_id is", tmp_path, {"eos_token_id": bad})


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    size = trained.get_vocab_size()
    assert tokenizer(tmp_path, {}, size)
    refused(FormatError, f"has an id {size - 1}; the model's are below {size - 1}", tmp_path, {}, size - 1)
    whole = json.loads(trained.to_str())
    whole["model"]["vocab"]["zebra"] = 10**6  # one id, far out
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    refused(FormatError, "has an id 1000000", tmp_path, {})


# ---- damage


DAMAGED = {
    "empty": b"", "no JSON": b"not JSON", "a list": b"[]", "an object": b"{}", "not UTF-8": b'{"a": "\xff"}',
    "NUL": b"{}\0", "deep": b"[" * 100_000, "no model": b'{"version": "1.0", "model": null}',
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_is_no_tokenizer_is_a_format_error(kind, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(DAMAGED[kind])
    refused(FormatError, "is not|cannot", tmp_path, {})


def test_every_prefix_is_refused(trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"), pretty=False)
    for cut in reversed(range(0, len(trained.to_str()), 7)):
        os.truncate(tmp_path / "tokenizer.json", cut)
        refused(FormatError, "is not|cannot", tmp_path, {})


@settings(max_examples=200)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), min_size=1, max_size=3))
def test_a_flipped_bit_is_refused_or_gives_another_tokenizer(flips, trained, tmp_path_factory):
    folder, raw = tmp_path_factory.mktemp("flip"), bytearray(trained.to_str().encode())
    for at, bit in flips:
        raw[at % len(raw)] ^= 1 << bit
    (folder / "tokenizer.json").write_bytes(raw)
    said = str(folder)
    try:
        found = tokenizer(folder, {}, SIZE)
        found.decode(found.encode("the cat é"))
    except MiniloraError as e:
        said = str(e)
    assert str(folder) in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_anything_but_a_regular_file_is_a_storage_error(kind, tmp_path):
    path = tmp_path / "tokenizer.json"
    os.mkfifo(path) if kind == "fifo" else path.mkdir()
    refused(StorageError, "not a regular file", tmp_path, {})


def test_without_the_package_one_line_says_how_to_get_it(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert tokenizer(tmp_path, {}, VOCAB).decode([97]) == "a"  # ours need it not
    trained.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedError) as e:
        tokenizer(tmp_path, {}, SIZE)
    assert str(e.value) == (
        'the package tokenizers is not installed; expected: pip install "minilora[tokenizers]"'
    )


# ---- text as it grows


@given(ids=st.lists(st.integers(0, SIZE - 21)))
def test_streaming_gives_the_text_up_to_the_stop_token(ids, words):
    parts, ended = list(stream(words, ids)), ids.index(0) if 0 in ids else len(ids)
    assert "".join(parts) == words.decode(ids[:ended])


@given(text=st.text())
def test_streaming_shows_no_partial_characters(text, words):
    parts = list(stream(words, words.encode(text)))
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


@given(ids=st.lists(st.integers(0, 4)))
def test_a_decoder_that_drops_the_first_space_is_asked_with_the_token_before(ids):
    """As those of sentencepiece: " of a text" is "of a text"."""
    pieces = (" a", " bc", "d", " ", " \ufffd")

    def decode(ids):
        return "".join(pieces[i] for i in ids).removeprefix(" ")

    assert "".join(stream(Tokenizer(None, decode), ids)) == decode(ids)


def test_a_token_takes_the_same_time_however_long_the_text_is():
    asked = []
    words = Tokenizer(None, lambda ids: asked.append(len(ids)) or "a" * len(ids))
    assert "".join(stream(words, range(50))) == "a" * 50
    assert max(asked) == 2
