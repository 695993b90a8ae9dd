"""Which files `minilora train` reads as text and as examples, which it refuses, and the start tokens."""

import json
import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_finetune import LETTERS, TEXT, lines

from minilora import cli, decoding, finetune
from minilora.data import corpora, user_files
from minilora.data.examples import examples
from minilora.digests import of_bytes
from minilora.errors import FormatError, InputError
from minilora.finetune import Recipe, texts
from minilora.formats import huggingface
from minilora.formats.tokenizer import Tokenizer, decode, encode, tokenizer

WIDE = Tokenizer(lambda text: np.array([*map(ord, text)], np.int64), lambda ids: "".join(map(chr, ids)),
                 frozenset({10}))  # fmt: skip
odd = st.text("ab \u2028\u2029\x85\x0b\x0c\x1c\r\n\ufeffé", min_size=1, max_size=6)
pairs = st.lists(st.fixed_dictionaries({"prompt": odd, "completion": odd}), min_size=1, max_size=7)


def same(found, wanted):
    assert [(ids.tolist(), start) for ids, start in found] == wanted


@settings(max_examples=30)
@given(rows=pairs, raw=st.booleans(), end=st.sampled_from(["\n", "\r\n", "\n\n \n"]), mark=st.booleans(),
       at=st.integers(0, 7))  # fmt: skip
def test_examples_are_the_same_in_every_format_and_in_a_folder(rows, raw, end, mark, at, tmp_path_factory):
    """A line ends at a newline and nowhere else, whatever else of Unicode's ends of lines is in a string."""
    place = tmp_path_factory.mktemp("forms")
    wanted = [([*map(ord, r["prompt"] + r["completion"]), 10], len(r["prompt"])) for r in rows]
    lines = [json.dumps(row, ensure_ascii=not raw) + end for row in rows]
    begin = "\ufeff" * mark
    for name in ("a.jsonl", "a.ndjson", "A.JSONL"):
        (place / name).write_text(begin + "".join(lines), encoding="utf-8", newline="")
        same(examples(place / name, WIDE, 40), wanted)
    (place / "a.json").write_text(begin + json.dumps(rows, ensure_ascii=not raw), encoding="utf-8")
    same(examples(place / "a.json", WIDE, 40), wanted)
    (place / "sub").mkdir()
    for name, part in (("b.jsonl", lines[:at]), ("c.ndjson", lines[at:])):
        (place / "sub" / name).write_text(begin + "".join(part), encoding="utf-8", newline="")
    (place / "sub" / ".d.jsonl").write_text("hidden")
    (place / "sub" / "e.pdf").write_text("ignored")
    same(examples(place / "sub", WIDE, 40), wanted)


def test_all_bad_lines_are_counted_by_kind_and_the_first_is_named(tmp_path):
    good = {"prompt": "a", "completion": "b"}
    bad = ["no", {"prompt": 1}, good, {"prompt": "a", "completion": "b" * 50}, "{", good, good, {"text": 7},
           {"prompt": "a"}, "[]", {"prompt": "a", "completion": "b" * 60}]  # fmt: skip
    path = lines(tmp_path / "d.jsonl", [good, "", *bad])
    with pytest.raises(FormatError) as e:
        examples(path, LETTERS, 16)
    said = str(e.value)
    assert said.startswith(f"{path}: line 3: is not JSON: ")
    assert said.endswith("; of 12 examples 8 cannot be used (2 x is not JSON, 2 x prompt is not a string, "
                         "2 x has too many tokens to learn, ...)")  # fmt: skip
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"prompt": "a", "completion": "b"}', "is a JSON dict; expected an array of examples"),
        ('{"text": "a"}\n{"text": "b"}', "is not JSON: .*; expected an array .*jsonl"),
        ("", "is not JSON"),
        ('[{"text": "abc"}, {"text": 3}, {"text": "abc"}]', "item 2: text is not a string.*of 3 examples 1 "),
        ('[{"text": "abc", "text": "abd"}]', "given twice"),
        ("[" * 100_000, "is not JSON"),
    ],
)  # fmt: skip
def test_an_invalid_json_array_is_refused(text, match, tmp_path):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(FormatError, match=match) as e:
        examples(tmp_path / "d.json", LETTERS, 16)
    assert str(e.value).startswith(str(tmp_path / "d.json"))
    assert len(str(e.value)) < 400


def test_an_example_that_cannot_be_encoded_is_named_by_its_line(tmp_path):
    package = pytest.importorskip("tokenizers")
    words = made(tmp_path, package.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    path = lines(tmp_path / "d.jsonl", [{"text": "a b"}, '{"text": "\\ud800"}'])
    with pytest.raises(InputError, match="line 2: character 0 of the text is"):
        examples(path, words, 16)


# ---- what is no text

LONG = b"words " * 400
NO_TEXT = {
    "a.pdf": b"%PDF-1.4 " + LONG, "b.txt": b"%PDF-1.4 " + LONG, "c.docx": b"PK\3\4" + bytes(2000),
    "d.md": b"PK\3\4" + bytes(2000), "e.parquet": b"PAR1\x15" + LONG, "f": b"\x1f\x8b" + LONG, "g.zip": LONG,
    "h.RTF": LONG, "i.rtf": rb"{\rtf1 " + LONG, "j.txt": LONG.decode().encode("utf-16"), "k.txt": b"a\0",
    "l.txt": b"\1\2\3words " * 300, "m.log": b"\xff" * 2000, "n.jsonl": b"%PDF-1.4", "o.gguf": b"GGUF\3\0",
    "p.txt": b"\x89PNG\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", NO_TEXT)
def test_a_file_that_is_not_text_is_refused_before_training(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(NO_TEXT[name])
    match = r"is not text|; expected a file of UTF-8 text|is not UTF-8 text"
    with pytest.raises(FormatError, match=match) as e:
        finetune.run(Recipe(str(path)), tmp_path / "a")
    assert str(path) in str(e.value)
    if name != "n.jsonl":
        with pytest.raises(FormatError) as again:
            corpora.corpus(str(path))
        assert str(again.value) == str(e.value)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["a", "a.log", "a.org", "a.xyz", "A.TXT", "a.b.c", "a.tsv", "a.yaml"])
def test_any_suffix_is_text_if_its_bytes_are(name, tmp_path):
    (tmp_path / name).write_text(TEXT)
    assert "".join(texts(str(tmp_path / name))) == TEXT.strip() + "\n\n"
    assert corpora.corpus(str(tmp_path / name)).digest == of_bytes((TEXT.strip() + "\n\n").encode())


@pytest.mark.parametrize("names", [("a.txt", "b.jsonl"), ("a.ndjson", "b.md"), ("a.json", "b.jsonl", "c.c")])
def test_a_folder_of_texts_and_examples_is_refused(names, tmp_path):
    (tmp_path / "d").mkdir()
    for name in names:
        (tmp_path / "d" / name).write_text("{}")
    for call in (lambda p: finetune.run(Recipe(p), tmp_path / "a"), corpora.corpus):
        with pytest.raises(InputError, match=r"holds text \('\S+'\) and examples \('\S+'\); expected"):
            call(str(tmp_path / "d"))


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.ndjson", "d"])
def test_a_sweep_refuses_examples(name, tmp_path):
    path = tmp_path / name
    if name == "d":
        path.mkdir()
    (path / "e.jsonl" if name == "d" else path).write_text('{"text": "abc"}\n' * 200)
    with pytest.raises(InputError, match="holds examples, by its ending; expected text"):
        corpora.corpus(str(path))


def test_json_beside_text_is_text(tmp_path):
    (tmp_path / "a.json").write_text('{"version": 3}')
    (tmp_path / "b.py").write_text("x = 1\n" * 300)
    assert user_files.own_text(tmp_path).startswith('{"version": 3}\n\nx = 1\n')


@settings(max_examples=25)
@given(lost=st.integers(60, 140), letter=st.sampled_from("漢Ω🙂\x07"))
def test_train_and_sweep_share_the_limit_for_lost_characters(lost, letter, tmp_path_factory):
    """Of 2,000 characters 100 may be; a question mark that was there is not lost."""
    place = tmp_path_factory.mktemp("lost")
    text = ("a?" * 1000)[: 2000 - lost] + letter * lost
    (place / "a.txt").write_text(text)
    (place / "a.jsonl").write_text(json.dumps({"prompt": text[:700], "completion": text[700:]}) + "\n")

    def refused(call):
        try:
            call()
        except (InputError, FormatError) as e:
            return bool(re.search("is not in the base's alphabet; at most 5%|control characters", str(e)))
        return False

    words = Tokenizer(encode, decode, fold=True)
    assert refused(lambda: corpora.corpus(str(place / "a.txt"))) is (lost > 100)
    assert refused(lambda: finetune.encoded("a", user_files.own_text(place / "a.txt"), words)) is (lost > 100)
    assert refused(lambda: examples(place / "a.jsonl", words, 4000)) is (lost > 100)


def made(folder, model, single=None, **ids):
    """A tokenizer of the package's around a model, with a template if there is one."""
    package = pytest.importorskip("tokenizers")
    bpe = package.Tokenizer(model)
    bpe.pre_tokenizer = package.pre_tokenizers.Whitespace()
    bpe.add_special_tokens(list(ids))
    if single:
        special = [(name, bpe.token_to_id(name)) for name in ids]
        bpe.post_processor = package.processors.TemplateProcessing(single=single, special_tokens=special)
    bpe.save(str(folder / "tokenizer.json"))
    return tokenizer(folder, {}, 99)


def test_unknown_words_count_as_lost_text(tmp_path):
    package = pytest.importorskip("tokenizers")
    words = made(tmp_path, package.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    few, many = ("a b " * 30 + "c " * n for n in (3, 4))
    assert words.unknown == 2
    assert len(finetune.encoded("x", few, words)) == 63
    with pytest.raises(InputError, match=r"^x: 6\.2% of it is not in the base's alphabet; at most 5%"):
        finetune.encoded("x", many, words)
    path = lines(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b c"}] * 2)
    with pytest.raises(InputError, match=r"33\.3% of it"):
        examples(path, words, 16)


# ---- what a tokenizer puts before a text


@pytest.fixture(scope="module", params=[("<s> $A", 1), ("<s> <t> $A <t>", 2), ("$A <s>", 0)])
def begins(request, tmp_path_factory):
    """A tokenizer whose template begins a text, with how many tokens, and what the package makes of it."""
    package, (single, n) = pytest.importorskip("tokenizers"), request.param
    folder, vocabulary = tmp_path_factory.mktemp("begins"), {letter: i for i, letter in enumerate("abcdefgh")}
    words = made(folder, package.models.WordLevel(vocabulary, unk_token="h"), single, **{"<s>": 8, "<t>": 9})
    return words, n, package.Tokenizer.from_file(str(folder / "tokenizer.json"))


@given(text=st.lists(st.sampled_from([*"abcdefg", "<s>"]), max_size=12))
def test_a_sequence_begins_once_as_the_tokenizers_template_says(text, begins):
    words, n, package = begins
    joined = " ".join(text)
    begun = words.begun(words.encode(joined))
    theirs = package.encode(joined, add_special_tokens=True).ids
    assert len(words.start) == n
    if text[:1] != ["<s>"] or n != 1:
        assert begun.tolist() == theirs[: n + len(text)]
    assert words.begun(begun).tolist() == begun.tolist()
    assert words.encode(joined).tolist() == package.encode(joined, add_special_tokens=False).ids


def test_every_example_keeps_its_start_tokens_when_its_prompt_is_cut(begins, tmp_path):
    words, n, _ = begins
    start = list(words.start)
    rows = [{"prompt": "a b c d e f", "completion": "g a"}, {"text": "b c d"}]
    rows += [{"prompt": "<s> a", "completion": "b"}]
    rows += [{"prompt": "", "completion": "c"}] if n else []
    found = examples(lines(tmp_path / "d.jsonl", rows), words, 5)
    keep = 4 - n
    assert found[0][0].tolist() == start + [0, 1, 2, 3, 4, 5][6 - keep :] + [6, 0]
    assert found[0][1] == n + keep == 4
    whole, first = found[1][0].tolist(), max(1, n)
    assert (whole, found[1][1]) == ([*start, 1, 2, 3], first)
    assert found[2][0].tolist() == ([8, 0, 1] if n < 2 else [8, 9, 8, 0, 1])
    if n:
        assert (found[3][0].tolist(), found[3][1]) == ([*start, 2], n)
        with pytest.raises(InputError, match=f"too many tokens .*: 6; expected at most {6 - n}"):
            examples(lines(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "a b c d e f"}]), words, 5)


def test_a_text_has_start_tokens_once_and_its_windows_have_none(begins, monkeypatch):
    words, n, package = begins
    text = "a b c d e f g\n" * 40
    monkeypatch.setattr(finetune.pieces, "__defaults__", (30,))
    ids = finetune.encoded("x", text, words)
    assert ids.tolist() == package.encode(text, add_special_tokens=True).ids[: n + 280]
    assert np.isin(ids, [8, 9]).sum() == n


def test_generate_uses_the_same_start_tokens_as_training(monkeypatch, capsys):
    words = Tokenizer(encode, decode, start=(2, 3))
    seen = []
    real = decoding.generate
    monkeypatch.setattr(huggingface, "tokenizer_of", lambda given: words)
    monkeypatch.setattr(
        decoding, "generate", lambda m, ids, *a, **k: seen.append(ids) or real(m, ids, *a, **k)
    )
    assert cli.main(["generate", "ab", "--max-tokens", "1"]) == 0
    assert seen[0].tolist() == [[2, 3, ord("a"), ord("b")]]
    assert capsys.readouterr().out.startswith("ab")
