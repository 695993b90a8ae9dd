"""`minilora train`: the user's text or examples, a checkpoint that goes on to the bit, a PEFT folder."""

import json
import os
import re

import numpy as np
import pytest
from helpers import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import minilora_, one_line

from minilora import cli, data, finetune
from minilora.adapters import load_adapter, open_adapter
from minilora.errors import (
    ConfigError,
    FormatError,
    InputError,
    MiniloraError,
    MismatchError,
    StorageError,
)
from minilora.files import BASE, load, read_json
from minilora.finetune import Recipe, examples, padded, texts
from minilora.layers import digest
from minilora.model import Config, generate, llama
from minilora.tokenizer import Tokenizer, stream
from minilora.train import evaluate

TINY = Config(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=32)  # fmt: skip
LETTERS = Tokenizer(data.encode, data.decode, frozenset({10}), fold=True)
TEXT = "The quality of mercy is not strained, it droppeth as the gentle rain.\n" * 60


@pytest.fixture
def base(tmp_path):
    """A small model of letters, saved."""
    from minilora.files import save_model

    save_model(llama(TINY, np.random.default_rng(0)), tmp_path / "base", "")
    return str(tmp_path / "base")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text(TEXT)
    return str(path)


def small(text, base, **how):
    usual = {"steps": 6, "batch": 2, "length": 16, "eval_every": 2, "eval_tokens": 64, "lr": 1e-2, "r": 2}
    return Recipe(text, base, **usual | how)


# ---- training


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_comes_out_and_the_base_stays(method, text, base, tmp_path):
    before = digest(load(base))
    told = []
    found = finetune.run(small(text, base, method=method), tmp_path / "a", told=lambda *x: told.append(x))
    assert digest(load(base)) == before
    assert [step for step, _ in told] == [0, 2, 4, 6]
    assert tuple(told) == found.evals
    assert found.after < found.before
    assert sorted(os.listdir(tmp_path)) == ["a", "base", "own.txt"]
    assert open_adapter(tmp_path / "a").settings.use_dora is (method == "dora")
    model = load(base)
    load_adapter(model, tmp_path / "a")
    _, held = texts(text)
    batches = data.eval_batches(data.encode(held), 8, 16, 64)
    # written in float32, as it was trained: the same numbers but for the path (beside W or through W + ΔW)
    assert abs(evaluate(model, batches) - found.after) < 1e-5
    labels = np.concatenate([y.ravel() for _, y in batches])
    assert found.characters == len(data.decode(labels)) / len(labels) == 1


def test_full_fine_tuning_makes_a_model(text, base, tmp_path):
    found = finetune.run(small(text, base, method="full", lr=1e-3), tmp_path / "m")
    model = load(tmp_path / "m")
    assert found.parameters == sum(p.size for p in arrays(model))
    assert digest(model) != digest(load(base))
    finetune.run(small(text, base, method="full", lr=1e-3, seed=1), tmp_path / "m", overwrite=True)
    assert digest(load(tmp_path / "m")) != digest(model)


def arrays(model):
    from minilora.layers import named_params

    return [p.data for p in named_params(model).values()]


class Stop(Exception):
    """A kill, as far as the training can tell."""


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_killed_run_goes_on_to_the_same_bytes(at, text, base, tmp_path):
    def stop(step, loss):
        if step == at:
            raise Stop

    finetune.run(small(text, base), tmp_path / "whole")
    with pytest.raises(Stop):
        finetune.run(small(text, base), tmp_path / "a", progress=stop)
    assert not (tmp_path / "a").exists()
    finetune.run(small(text, base), tmp_path / "a")
    for name in os.listdir(tmp_path / "whole"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_another_run_does_not_go_on_from_its_checkpoint(text, base, tmp_path):
    def stop(step, loss):
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        finetune.run(small(text, base), tmp_path / "a", progress=stop)
    with pytest.raises(MismatchError, match="recipe"):
        finetune.run(small(text, base, r=2, seed=1), tmp_path / "a")
    (tmp_path / "own.txt").write_text(TEXT.upper())
    with pytest.raises(MismatchError, match="text"):
        finetune.run(small(text, base), tmp_path / "a")


def test_a_folder_that_is_there_is_found_out_before_training(text, base, tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageError, match="is there already"):
        finetune.run(small(text, base), tmp_path / "a", progress=lambda *_: pytest.fail("trained"))


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        ({"method": "qlora"}, ConfigError, "method is 'qlora'; nearest: .*lora"),
        ({"steps": 0}, ConfigError, "steps"),
        ({"batch": True}, ConfigError, "batch"),
        ({"length": 1.5}, ConfigError, "length"),
        ({"lr": float("nan")}, ConfigError, "lr"),
        ({"lr": -1.0}, ConfigError, "lr"),
        ({"r": 0}, ConfigError, "r is 0"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"targets": ("q_porj",)}, MismatchError, "q_porj.*q_proj"),
        ({"data": "foli"}, InputError, "'foli'; expected a path or a name; nearest: 'folio'"),
        ({"base": "none"}, StorageError, "none"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused_before_training(how, error, match, text, base, tmp_path):
    with pytest.raises(error, match=match) as e:
        finetune.run(small(how.pop("data", text), how.pop("base", base), **how), tmp_path / "a")
    assert isinstance(e.value, MiniloraError)
    assert sorted(os.listdir(tmp_path)) == ["base", "own.txt"]


# ---- examples


def lines(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_the_prompt_has_no_loss(tmp_path):
    path = lines(tmp_path / "d.jsonl", [{"prompt": "ab", "completion": "cd"}, "", {"text": "xyz"}])
    rows = examples(path, LETTERS, 16)
    inputs, labels = padded(rows)
    assert data.decode(inputs[0][inputs[0] > 0]) == "abcd"
    assert labels.tolist() == [[-100, ord("c"), ord("d"), 10], [ord("y"), ord("z"), 10, -100]]


@settings(max_examples=30)
@given(seed=seeds, length=st.integers(4, 12))
def test_every_label_is_the_next_token_of_its_row(seed, length, tmp_path_factory):
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghij"))
    sizes = zip(rng.integers(1, 20, 5), rng.integers(0, length, 5), strict=True)
    rows = [{k: "".join(rng.choice(letters, n)) for k, n in zip(("prompt", "completion"), s, strict=True)}
            for s in sizes]  # fmt: skip
    found = examples(lines(tmp_path_factory.mktemp("e") / "d.jsonl", rows), LETTERS, length)
    inputs, labels = padded(found)
    assert inputs.shape == labels.shape == (5, max(len(ids) for ids, _ in found) - 1)
    assert inputs.shape[1] <= length
    for row, x, y in zip(rows, inputs, labels, strict=True):
        whole = row["prompt"] + row["completion"] + "\n"
        assert data.decode(y[y >= 0]) == row["completion"] + "\n"
        n = np.flatnonzero(y >= 0)[-1] + 1
        assert whole.endswith(data.decode(np.append(x[:n], 10)))  # of a long prompt, its end
        assert (y[: n - 1][y[: n - 1] >= 0] == x[1:n][y[: n - 1] >= 0]).all()


def test_examples_are_trained_on_and_measured(base, tmp_path):
    rows = [{"prompt": f"{i} times 2 is ", "completion": f"{2 * i}"} for i in range(40)]
    lines(tmp_path / "d.jsonl", rows)
    found = finetune.run(small(str(tmp_path / "d.jsonl"), base, steps=12), tmp_path / "a")
    assert found.after < found.before


@pytest.mark.parametrize(
    ("row", "error", "match"),
    [
        ("not JSON", FormatError, "line 2: is not JSON"),
        ("[" * 100_000, FormatError, "line 2: is not JSON"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', FormatError, "prompt.*given twice"),
        ([1], FormatError, "line 2: prompt is no string"),
        ({"prompt": "a"}, FormatError, "line 2: completion is no string"),
        ({"prompt": "a", "completion": 3}, FormatError, "line 2: completion"),
        ({"prompt": "", "completion": "b"}, InputError, "line 2: has no prompt"),
        ({"prompt": "a", "completion": "b" * 99}, InputError, "line 2: has too many .*: 100; .* at most 16"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_example_is_named(row, error, match, tmp_path):
    path = lines(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}, row])
    with pytest.raises(error, match=match) as e:
        examples(path, LETTERS, 16)
    assert str(path) in str(e.value)
    assert len(str(e.value)) < 400


@pytest.mark.parametrize("raw", [b"\xff\xfe", b'{"text": "a\0b"}'])
def test_a_file_that_is_no_text_is_refused(raw, tmp_path):
    (tmp_path / "d.jsonl").write_bytes(raw)
    with pytest.raises(FormatError):
        examples(tmp_path / "d.jsonl", LETTERS, 16)


WIDE = Tokenizer(lambda text: np.array([*map(ord, text)], np.int64), lambda ids: "".join(map(chr, ids)),
                 frozenset({10}))  # fmt: skip
odd = st.text("ab \u2028\u2029\x85\x0b\x0c\x1c\r\n\ufeffé", min_size=1, max_size=6)
pairs = st.lists(st.fixed_dictionaries({"prompt": odd, "completion": odd}), min_size=1, max_size=7)


def same(found, wanted):
    assert [(ids.tolist(), start) for ids, start in found] == wanted


@settings(max_examples=30)
@given(rows=pairs, raw=st.booleans(), end=st.sampled_from(["\n", "\r\n", "\n\n \n"]), mark=st.booleans(),
       at=st.integers(0, 7))  # fmt: skip
def test_examples_are_the_same_in_every_form_and_in_a_folder(rows, raw, end, mark, at, tmp_path_factory):
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
    assert said.endswith("; of 12 examples 8 cannot be used (2 x is not JSON, 2 x prompt is no string, "
                         "2 x has too many tokens to learn, ...)")  # fmt: skip
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"prompt": "a", "completion": "b"}', "is a JSON dict; expected an array of examples"),
        ('{"text": "a"}\n{"text": "b"}', "is not JSON: .*; expected an array .*jsonl"),
        ("", "is not JSON"),
        ('[{"text": "abc"}, {"text": 3}, {"text": "abc"}]', "item 2: text is no string.*of 3 examples 1 "),
        ('[{"text": "abc", "text": "abd"}]', "given twice"),
        ("[" * 100_000, "is not JSON"),
    ],
)  # fmt: skip
def test_an_array_that_is_none_is_refused(text, match, tmp_path):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(FormatError, match=match) as e:
        examples(tmp_path / "d.json", LETTERS, 16)
    assert str(e.value).startswith(str(tmp_path / "d.json"))
    assert len(str(e.value)) < 400


def test_an_example_that_has_no_ids_is_named_by_its_line(tmp_path):
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
def test_what_is_no_text_is_refused_by_name_before_training(name, base, tmp_path):
    path = tmp_path / name
    path.write_bytes(NO_TEXT[name])
    match = r"is not text|not text; expected a file of UTF-8|is not UTF-8 text"
    with pytest.raises(FormatError, match=match) as e:
        finetune.run(small(str(path), base), tmp_path / "a")
    assert str(path) in str(e.value)
    if name != "n.jsonl":
        with pytest.raises(FormatError) as again:
            data.corpus(str(path))
        assert str(again.value) == str(e.value)
    assert sorted(os.listdir(tmp_path)) == sorted(["base", name])


@pytest.mark.parametrize("name", ["a", "a.log", "a.org", "a.xyz", "A.TXT", "a.b.c", "a.tsv", "a.yaml"])
def test_any_ending_is_text_if_its_bytes_are(name, base, tmp_path):
    (tmp_path / name).write_text(TEXT)
    assert "".join(texts(str(tmp_path / name))) == TEXT.strip() + "\n\n"
    assert data.corpus(str(tmp_path / name)).digest == data.sha256((TEXT.strip() + "\n\n").encode())


@pytest.mark.parametrize("names", [("a.txt", "b.jsonl"), ("a.ndjson", "b.md"), ("a.json", "b.jsonl", "c.c")])
def test_a_folder_of_both_is_refused(names, base, tmp_path):
    (tmp_path / "d").mkdir()
    for name in names:
        (tmp_path / "d" / name).write_text("{}")
    for call in (lambda p: finetune.run(small(p, base), tmp_path / "a"), data.corpus):
        with pytest.raises(InputError, match=r"holds text \('\S+'\) and examples \('\S+'\); expected"):
            call(str(tmp_path / "d"))


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.ndjson", "d"])
def test_a_sweep_takes_no_examples(name, tmp_path):
    path = tmp_path / name
    if name == "d":
        path.mkdir()
    (path / "e.jsonl" if name == "d" else path).write_text('{"text": "abc"}\n' * 200)
    with pytest.raises(InputError, match="holds examples, by its ending; expected text"):
        data.corpus(str(path))


def test_json_beside_text_is_text(tmp_path):
    (tmp_path / "a.json").write_text('{"version": 3}')
    (tmp_path / "b.py").write_text("x = 1\n" * 300)
    assert data.own_text(tmp_path).startswith('{"version": 3}\n\nx = 1\n')


@settings(max_examples=25)
@given(lost=st.integers(60, 140), letter=st.sampled_from("漢Ω🙂\x07"))
def test_one_rule_says_for_train_and_sweep_how_much_of_a_text_may_be_lost(lost, letter, tmp_path_factory):
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

    words = Tokenizer(data.encode, data.decode, fold=True)
    assert refused(lambda: data.corpus(str(place / "a.txt"))) is (lost > 100)
    assert refused(lambda: finetune.encoded("a", data.own_text(place / "a.txt"), words)) is (lost > 100)
    assert refused(lambda: examples(place / "a.jsonl", words, 4000)) is (lost > 100)


def made(folder, model, single=None, **ids):
    """A tokenizer of the package's around a model, with a template if there is one."""
    package = pytest.importorskip("tokenizers")
    from minilora.tokenizer import tokenizer

    bpe = package.Tokenizer(model)
    bpe.pre_tokenizer = package.pre_tokenizers.Whitespace()
    bpe.add_special_tokens(list(ids))
    if single:
        special = [(name, bpe.token_to_id(name)) for name in ids]
        bpe.post_processor = package.processors.TemplateProcessing(single=single, special_tokens=special)
    bpe.save(str(folder / "tokenizer.json"))
    return tokenizer(folder, {}, 99)


def test_words_that_a_vocabulary_has_not_are_lost_text_too(tmp_path):
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
def test_a_sequence_begins_as_the_tokenizers_own_template_has_it_once(text, begins):
    words, n, package = begins
    joined = " ".join(text)
    begun = words.begun(words.encode(joined))
    theirs = package.encode(joined, add_special_tokens=True).ids
    assert len(words.start) == n
    if text[:1] != ["<s>"] or n != 1:
        assert begun.tolist() == theirs[: n + len(text)]
    assert words.begun(begun).tolist() == begun.tolist()
    assert words.encode(joined).tolist() == package.encode(joined, add_special_tokens=False).ids


def test_every_example_begins_once_and_keeps_its_beginning_when_its_prompt_is_cut(begins, tmp_path):
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


def test_a_whole_text_begins_once_and_its_windows_do_not(begins, monkeypatch):
    words, n, package = begins
    text = "a b c d e f g\n" * 40
    monkeypatch.setattr(finetune.pieces, "__defaults__", (30,))
    ids = finetune.encoded("x", text, words)
    assert ids.tolist() == package.encode(text, add_special_tokens=True).ids[: n + 280]
    assert np.isin(ids, [8, 9]).sum() == n


def test_generate_begins_as_training_does(base, monkeypatch, capsys):
    from minilora import files, model

    words = Tokenizer(data.encode, data.decode, start=(2, 3))
    seen = []
    real = model.generate
    monkeypatch.setattr(files, "tokenizer_of", lambda given: words)
    monkeypatch.setattr(model, "generate", lambda m, ids, *a, **k: seen.append(ids) or real(m, ids, *a, **k))
    assert cli.main(["generate", "ab", "--base", base, "--max-tokens", "1"]) == 0
    assert seen[0].tolist() == [[2, 3, ord("a"), ord("b")]]
    assert capsys.readouterr().out.startswith("ab")


def test_one_example_is_too_few(base, tmp_path):
    lines(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(InputError, match="has 1 examples"):
        finetune.run(small(str(tmp_path / "d.jsonl"), base), tmp_path / "a")


# ---- the streamed text


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=20), st.integers(1, 3))
def test_a_stream_is_the_text_whole_characters_at_a_time(text, n):
    """Tokens of n bytes cut characters anywhere."""
    raw = text.replace("\ufffd", "").encode()
    pieces = [raw[i : i + n] for i in range(0, len(raw), n)]

    def decode(ids):
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    found = list(stream(Tokenizer(None, decode, frozenset({99})), [*range(len(pieces)), 99, 0]))
    assert "".join(found) == raw.decode()
    assert not any("\ufffd" in piece for piece in found)


def test_what_is_cut_off_at_the_end_is_shown_as_such():
    decode = lambda ids: bytes(ids.tolist()).decode(errors="replace")  # noqa: E731
    assert list(stream(Tokenizer(None, decode), [0x61, 0xC3])) == ["a", "\ufffd"]


# ---- the commands


def test_train_generate_and_the_microscope_work_one_after_the_other(text, base, tmp_path):
    a, b, m, e = (tmp_path / name for name in ("a", "b", "m", "e"))
    how = ("--base", base, "--steps", "4", "--batch", "2", "--length", "16", "--lr", "1e-2")
    done = minilora_("train", "--data", text, "--out", a, *how, "--rank", "2", "--alpha", "4")
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    assert "step 0: held-out loss" in done.stderr
    seen = minilora_("inspect", a, "--base", base, "--json", "--out", tmp_path / "seen")
    assert seen.returncode == 0, seen.stderr
    assert json.loads(seen.stdout)["parameters"] == sum(
        2 * sum(w["shape"]) for w in json.loads(seen.stdout)["modules"]
    )
    assert {"report.html", "heat_map.png", "spectra.svg"} <= set(os.listdir(tmp_path / "seen"))
    assert minilora_("compress", a, b, "--rank", "1").returncode == 0
    merged = minilora_("merge", base, a, m)
    assert merged.returncode == 0, merged.stderr
    assert "rounding alone" in merged.stdout
    assert minilora_("extract", base, m, e, "--rank", "2").returncode == 0
    ways = (("--base", base, "--adapter", a), ("--base", base, "--adapter", a, "--merged"), ("--base", m))
    greedy = ("--temperature", "0", "--max-tokens", "9")
    said = [minilora_("generate", "The qual", *how, *greedy) for how in ways]
    assert len({done.stdout for done in said}) == 1
    assert said[0].stdout.startswith("The qual")
    assert len(said[0].stdout) == len("The qual") + 9 + 1
    assert "7 of 8 modules" in said[0].stderr


def test_generate_is_generate(base, capsys):
    cli.main(["generate", "mercy", "--base", base, "--max-tokens", "7", "--seed", "3", "--top-k", "5"])
    rng = np.random.default_rng(3)
    model = load(base)
    tokens = generate(model, data.encode("mercy")[None], 7, rng=rng, temperature=0.8, top_k=5)
    assert capsys.readouterr().out == "mercy" + data.decode(np.array([t[0] for t in tokens])) + "\n"


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["generate", "a", "--merged"], 2, "--adapter DIR"),
        (["generate", "é"], 2, "character 0"),
        (["generate", ""], 2, "expected"),
        (["inspect", "none"], 4, "adapter_config.json"),
        (["compress", "none", "out"], 2, "exactly one of them"),
        (["compress", "none", "out", "--rank", "1"], 4, "none"),
        (["extract", "base", "none", "out", "--energy", "2"], 2, "energy"),
        (["merge", "base", "none", "out", "--dtype", "int8"], 2, "int8.*nearest"),
        (["params", "llama-3-8"], 2, "llama-3-8b"),
        (["params", "llama-3-8b", "--targets", "qproj"], 2, "q_proj"),
        (["modules", "--targets", "qproj"], 2, "q_proj"),
        (["train", "--data", "none", "--out", "out"], 2, "expected a path or a name"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(arguments, code, match, capsys, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == code
    assert re.search(match, one_line(capsys))
    assert os.listdir(tmp_path) == []


def test_params_and_modules_print_tables_and_json(capsys):
    assert cli.main(["params", "llama-2-7b", "--rank", "16", "--targets", "all-linear"]) == 0
    assert "39,976,960 of 6,738,415,616" in capsys.readouterr().out
    assert cli.main(["params", "d=768,layers=12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 294_912
    assert cli.main(["modules", "--targets", "q_proj,lm_head", "--json"]) == 2
    capsys.readouterr()
    assert cli.main(["modules", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert sum(row["adapted"] for row in rows) == 7 * read_json(BASE / "config.json")["num_hidden_layers"]
