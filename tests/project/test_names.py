"""A name means what is built in, and who has something of that name in the working folder is told."""

from pathlib import Path

import pytest

from minilora import cli
from minilora.data import corpora
from minilora.errors import InputError
from minilora.finetune import texts
from minilora.formats import huggingface


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("sweep", ["base"]), ("sweep --base ./base", []), ("sweep --data folio", ["base", "folio"]),
        ("sweep --base mine --data folio --data permuted:3 --data mine", ["folio", "permuted:3"]),
        ("train --data folio --out a", ["base", "folio"]),
        ("train --data smollm2 --out a --base smollm2", ["smollm2"]),
        ("train --data ./folio --out base --base mine", []), ("generate base --base ./base", []),
        ("generate folio", ["base"]), ("inspect base --base base", ["base"]),
        ("extract base smollm2 a --rank 1", ["base", "smollm2"]), ("merge base a b", ["base"]),
        ("modules", ["base"]), ("params mine", []),
        ("params llama-3-8b", ["llama-3-8b"]), ("compress base smollm2 --rank 1", []), ("figures", []),
        ("inspect a --base kjv", []), ("train --data kjv --out a", ["base"]),
    ],
)  # fmt: skip
def test_a_name_that_hides_a_local_file_is_reported(line, names, tmp_path, monkeypatch, capsys):
    """Every name that means something built in, and nothing else; kjv is not here, so nothing hides it."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "smollm2", "folio", "permuted:3", "mine", "llama-3-8b"):
        (tmp_path / name).mkdir()
    cli.note_shadowed(cli.parser().parse_args(line.split()))
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        f"minilora: {name} is the built-in one; for the one in this folder type ./{name}" for name in names
    ]


def test_only_the_name_of_a_text_is_looked_up_among_texts(tmp_path, monkeypatch, capsys):
    """There is no permuted:14, but a base may be called so."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "permuted:14").mkdir()
    cli.note_shadowed(cli.parser().parse_args(["modules", "permuted:14"]))
    assert capsys.readouterr() == ("", "")


def test_a_hidden_file_is_reported_before_a_command_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-2-7b").write_text("no config")
    assert cli.main(["params", "llama-2-7b"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("minilora: llama-2-7b is the built-in one; ")
    assert said.err.endswith(" type ./llama-2-7b\n")
    assert "of 6,738,415,616" in said.out
    assert cli.main(["params", "./llama-2-7b"]) == 2
    assert "is not a JSON object" in capsys.readouterr().err


def test_a_built_in_name_and_a_path_are_distinct(tmp_path, monkeypatch):
    """What is said above is so: the name wins, and ./ is the way to what lies here."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "stdlib"):
        (tmp_path / name).write_text("a path")
    assert huggingface.located("base") == huggingface.BASE
    assert (
        huggingface.located("./base")
        == huggingface.located(tmp_path / "base").relative_to(tmp_path)
        == Path("base")
    )
    monkeypatch.setattr(huggingface, "smollm2", lambda: Path("fetched"))
    assert [huggingface.located(name) == Path(name) for name in (*huggingface.NAMES, "mine")] == [
        False,
        False,
        True,
    ]
    monkeypatch.setattr(corpora, "stdlib_text", lambda: "Words of the library. " * 100)
    assert corpora.corpus("stdlib").source == corpora.stdlib_source()
    with pytest.raises(InputError, match="has 8 characters of text"):
        corpora.corpus("./stdlib")
    assert texts("stdlib")[0].startswith("Words")
    with pytest.raises(InputError, match="has 8 characters of text"):
        texts("./stdlib")
