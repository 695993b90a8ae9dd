"""Foreign text is shown as text: it cannot control a terminal, a figure or a page."""

import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import types
import typing
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_plotting import MERGED, make_rows, some_modules

import minilora
from minilora import cli, errors
from minilora.analysis import figures, report
from minilora.analysis.measures import BesideOther
from minilora.errors import MiniloraError
from minilora.experiments import merge_equivalence, rank_figures
from minilora.experiments.harness import sealed
from minilora.experiments.rank_report import figure_names, pictures, report_page, table
from minilora.formats import huggingface, tokenizer
from minilora.merging import llama as merging
from minilora.table import Table, counted, drawn, html, markup, plain, printed

PIECES = (
    "a", "B7", " ", ".", "é", "語", "😀", "$", "$x^$", "^", "_", "{", "}", "\\", "\\$", "%", "&", "&lt;", "<",
    ">", '"', "'", "<b>", "|", "</title>", "-->", 'id="', 'href="#', "url(#", "\x1b[2J", "\x1b]0;x\x07", "\0",
    "\n", "\r", "\t", "\x7f", "\x85", "\x9b", "\u2028", "\u202e", "\u2066", "\u200b", "\ufeff", "\ud800",
)  # fmt: skip
names = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
NASTY = ["a$x^$b", "_\x1b[2J\n\u202e\\$5 \udcff", '<i>&\'" id="y url(#z', "語"]  # each in another way


def calm(text):
    """What may reach a terminal."""
    return all(c == "\n" or c.isprintable() for c in text)


# ---- the functions


@given(text=st.text() | names)
def test_plain_text_is_printable_and_idempotent(text):
    made = plain(text)
    assert made.isprintable()
    assert plain(made) == made
    assert made == text or not text.isprintable()
    assert plain(text, keep="\n") == "\n".join(map(plain, text.split("\n")))
    assert "".join(map(plain, text)) == made  # so a stream may be cut anywhere


@given(text=names)
def test_escapes_can_be_decoded_again(text):
    """As Python writes it, unless the text has backslashes of its own."""
    if "\\" not in text:
        pieces = re.sub(r"[^\x00-\x7f]", lambda c: ascii(c[0])[1:-1], plain(text))
        assert pieces.encode("ascii").decode("unicode-escape") == text


rows_of_cells = st.lists(st.tuples(names, names, names), min_size=1, max_size=4)


@given(cells=rows_of_cells)
def test_a_table_has_one_line_per_row_and_aligned_columns(cells):
    lines = Table(cells[0], cells[1:]).lines()
    assert len(lines) == len(cells)
    assert all(line.isprintable() for line in lines)
    wide = max(len(plain(first)) for first, _, _ in cells)
    for line, (first, second, _) in zip(lines, cells, strict=True):
        assert line.startswith(plain(first).ljust(wide)[: len(line)])
        assert plain(second).strip() in line


@given(cells=rows_of_cells, caption=names)
def test_a_table_has_the_same_cells_in_text_and_html(cells, caption):
    table = Table(cells[0], cells[1:], caption)
    assert str(table).splitlines() == [plain(caption), *table.lines()]
    assert str(Table(cells[0], cells[1:])) == printed(table) == "\n".join(table.lines())
    read = Texts(table.html())
    assert read.of("caption") == [plain(caption)]
    assert read.of("th") == [*map(plain, cells[0]), *(plain(line[0]) for line in cells[1:])]
    assert read.of("td") == [plain(cell) for line in cells[1:] for cell in line[1:]]
    assert table._repr_html_() == table.html()
    assert "<caption>" not in Table(cells[0], cells[1:]).html()


@given(cells=rows_of_cells)
def test_a_markdown_table_has_exactly_its_cells(cells):
    made = Table(cells[0], cells[1:]).markdown().split("\n")
    assert made.pop(1) == "| --- | ---: | ---: |"
    for line, texts in zip(made, cells, strict=True):
        assert line.isprintable()
        found = re.split(r"(?<!\\)\|", line.removeprefix("|").removesuffix("|"))
        if not any(cell.endswith("\\") for cell in texts):
            assert [cell[1:-1].replace(r"\|", "|") for cell in found] == list(map(plain, texts))
    assert Table(cells[0], []).markdown("rll").split("\n")[1] == "| ---: | --- | --- |"


@given(cells=rows_of_cells, line=names)
def test_a_report_shows_the_same_in_a_notebook(cells, line):
    table = Table(cells[0], cells[1:])
    page = html(line, "", table, f"  {line}", line, table)
    assert calm(page)
    read = Texts(page)
    assert read.of("div") == [plain(line), f"  {plain(line)}\n{plain(line)}"]
    assert len(read.of("th")) == 2 * (2 + len(cells))
    assert printed(line, table) == "\n".join([plain(line), *table.lines()])


# ---- reports


def reports():
    """Every class of the package that prints as a text of its own."""
    for info in pkgutil.walk_packages(minilora.__path__, "minilora."):
        if not info.name.endswith("__main__"):
            for _, found in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
                if dataclasses.is_dataclass(found) and "__str__" in vars(found):
                    yield found


def build(kind, name):
    """A value of an annotated type in which every text is `name`."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind in (str, int, float, bool):
        return name if kind is str else kind(2)
    if origin in (types.UnionType, typing.Union):
        return build(parts[0], name)
    if origin in (Sequence, list):
        return (build(parts[0], name),) * 2
    if origin is tuple:
        return tuple(build(p, name) for p in ((parts[0],) * 2 if parts[-1] is ... else parts))
    if origin in (dict, Mapping):
        return {build(parts[0], name): build(parts[1], name)}
    hints = typing.get_type_hints(kind)
    return kind(**{field: build(hint, name) for field, hint in hints.items()})


REPORTS = sorted(set(reports()), key=lambda kind: kind.__qualname__)


def test_every_report_is_tested():
    named = {kind.__name__ for kind in REPORTS}
    assert named >= {"Attached", "Compression", "Counts", "Inspection", "Merge", "Outcome", "Report", "Tree"}
    shown = {kind.__name__ for kind in REPORTS if "_repr_html_" in vars(kind)}
    assert shown >= {
        "Attached",
        "Compression",
        "Counts",
        "History",
        "Inspection",
        "Merge",
        "Outcome",
        "Table",
        "Tree",
    }


@pytest.mark.parametrize("kind", REPORTS, ids=lambda kind: kind.__qualname__)
@settings(max_examples=25)
@given(name=names)
def test_no_name_in_a_report_breaks_a_line_or_controls_the_terminal(kind, name):
    said = str(build(kind, name))
    assert calm(said), ascii(said)
    if len(name) < 20:  # a note may be folded
        assert said.count("\n") == str(build(kind, "n" * len(plain(name)))).count("\n") or " " in name
    if "_repr_html_" not in vars(kind):
        return
    shown = build(kind, name)._repr_html_()
    assert calm(shown)
    assert set(Texts(shown).tags) <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "div"}


@pytest.mark.parametrize("kind", [c for c in vars(errors).values() if isinstance(c, type)
                                  and issubclass(c, MiniloraError)])  # fmt: skip
@given(name=names)
def test_every_error_is_one_plain_line(kind, name):
    assert str(kind(f"{name}: is no file")) == f"{plain(name)}: is no file"


# ---- figures


def shown(svg):
    """The texts in an SVG."""
    root = ET.fromstring(svg)
    return ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]


def seen(name):
    """A name as a figure shows it: of a path the last part."""
    return plain(Path(name).name or name)


def check_figures(name):
    rows = make_rows((f"./{name}",), ranks=(1, 2), seeds=1)
    picture = rank_figures.loss_against_rank(rows, f"./{name}")
    assert any(seen(f"./{name}").strip() in text for text in shown(picture.encoded("svg")))
    assert picture.encoded("png").startswith(b"\x89PNG")
    legend = shown(rank_figures.gap_against_parameters(rows).encoded("svg"))
    assert any(seen(f"./{name}").strip() in text for text in legend)


@pytest.mark.parametrize("name", NASTY)
def test_a_target_is_named_in_title_and_legend(name):
    check_figures(name)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(name=names)
def test_any_target_is_named_in_title_and_legend(name):
    check_figures(name)


def test_a_long_name_is_shortened_in_a_figure():
    assert len(drawn("x" * 300)) == len(drawn("x" * 61)) == 60
    assert drawn("x" * 60) == "x" * 60
    assert drawn("a" + "x" * 300 + "z")[::59] == "az"


def test_a_module_kind_is_named_in_every_figure():
    name = "_$x^$\x1b[2J\n"
    other = BesideOther(0.5, (0.5, 0.6), (0.4, 0.3), (0.1, 0.2), (0.1, 0.1), 2.0)
    modules = [dataclasses.replace(m, kind=name, other=other) for m in some_modules()]
    for draw in (figures.heat_map, figures.adapter_spectra, figures.subspaces, figures.difference):
        texts = [text.strip() for text in shown(draw(modules).encoded("svg"))]
        assert plain(name) in texts


def test_a_user_text_named_permuted_is_not_a_permutation():
    assert rank_figures.title("permuted:3") == "letter permutation, 3 swaps"
    assert rank_figures.title("permuted") == "letter permutation, 4 swaps"
    assert rank_figures.title("./permuted.txt") == "permuted.txt"
    assert rank_figures.title("./.") == "./."


@given(targets=st.lists(names | st.just("x" * 400), min_size=1, max_size=4, unique=True))
def test_figures_have_valid_distinct_file_names(targets):
    rows = [{"config": {"target": target}} for target in targets]
    made = list(figure_names(rows).values())
    assert len(set(made)) == len(targets)
    assert all(re.fullmatch("[A-Za-z0-9_]{0,110}", name) for name in made)


# ---- pages


class Texts(HTMLParser):
    """The texts of a page by the tag that holds them, and all attributes."""

    def __init__(self, page):
        super().__init__()
        self.open, self.found, self.attributes, self.tags = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.open.append((tag, []))

    def handle_data(self, data):
        if self.open:
            self.open[-1][1].append(data)

    def handle_endtag(self, tag):
        while self.open and (last := self.open.pop()):
            self.found.append((last[0], "".join(last[1])))
            if last[0] == tag:
                break

    def of(self, tag):
        return [text for t, text in self.found if t == tag]


@given(a=names, b=names, c=names, d=names)
def test_a_page_shows_its_text_escaped(a, b, c, d):
    pieces = [report.paragraph(b), Table([d, a], [[b, c]], c).html(), report.facts({a: b})]
    page = report.page(d, {a: pieces})
    assert calm(page)
    page.encode()
    read = Texts(page)
    assert read.of("title") == read.of("h1") == [plain(d)]
    assert read.of("h2") == [plain(a)]
    assert read.of("p") == [plain(b)]
    assert read.of("caption") == [plain(c)]
    assert read.of("th") == [plain(d), plain(a), plain(b)]
    assert read.of("td") == [plain(c)]
    assert read.of("pre") == [plain(f"{a}: {b}")]


def test_a_report_names_its_targets():
    name = f"{NASTY[2]}\x1b\n$"
    rows = make_rows((f"./{name}",), ranks=(1, 2), seeds=1)
    rows = [row | {"source": name} for row in rows]
    said = table(rows)
    assert calm(said)
    assert said.startswith(plain(f"./{name}") + "  (test loss")
    made = {k: p for k, p in pictures(rows).items() if k.startswith("loss") or k.startswith("gap")}
    page = report_page(rows, made)
    assert calm(page)
    page.encode()
    read = Texts(page)
    assert seen(f"./{name}") in read.of("h2")
    assert f"Text: {plain(name)}." in read.of("p")
    assert any(seen(f"./{name}") in text for text in read.of("figcaption"))
    assert any(seen(f"./{name}") in text for text in read.of("text"))
    ids = [value for key, value in read.attributes if key == "id"]
    assert len(ids) == len(set(ids))


@given(text=names)
def test_markup_is_safe_in_text_and_attributes(text):
    read = Texts(f'<p title="{markup(text)}">{markup(text)}</p>')
    assert read.of("p") == [plain(text)]
    assert read.attributes == [("title", plain(text))]
    assert read.tags == ["p"]


def test_a_figure_in_a_notebook_is_escaped_too():
    rows = make_rows(("./\x1b<b>",), ranks=(1,), seeds=1)
    assert calm(rank_figures.loss_against_rank(rows, "./\x1b<b>")._repr_html_())


def test_a_model_card_is_escaped():
    card = merging.card(types.SimpleNamespace(where=Path(NASTY[1])), Path(NASTY[1]))
    assert card.encode().count(b"\n") == 1
    assert calm(card)


# ---- the command line


NAME = "\x1b[31m\u202e$x^$ two\nlines \x7f\x9b <i>&'\udcff"


@pytest.fixture
def said(capsys):
    def run(*arguments):
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        assert calm(out), ascii(out)
        assert calm(err), ascii(err)
        return code, out, err

    return run


def test_no_file_name_controls_the_terminal(tmp_path, said):
    name, missing = NAME, tmp_path / NAME
    for arguments in (
        ["inspect", missing], ["inspect", missing, "--against", missing],
        ["compress", missing, missing, "--rank", 1],
        ["extract", missing, missing, missing, "--rank", 1], ["merge", missing, missing, missing],
        ["modules", missing], ["params", missing], ["params", name], ["figures", "--rows", missing],
        ["train", "--data", missing, "--out", missing],
        ["train", "--data", missing, "--out", missing, "--base", name],
        ["generate", "x", "--base", missing], ["generate", name, "--base", "base"],
        ["sweep", "--data", missing], ["sweep", "--targets", name], ["sweep", "--base", missing],
        ["pretrain", "--out", tmp_path / "no" / name, "--steps", 0],
        ["inspect", "x", "--base", name], [name], [f"--{name}"], ["data", name], ["sweep", "--ranks", name],
    ):  # fmt: skip
        code, _, err = said(*arguments)
        assert code in (2, 4), (arguments, err)
        assert len(err.splitlines()) == 1 or err.startswith("usage: ")


def test_no_name_of_several_adapters_controls_the_terminal(tmp_path, said):
    for form in ([], ["--csv"], ["--json"]):
        code, out, err = said("inspect", tmp_path / NAME, NAME, *form)
        assert (code, err) == (1, "")
        if form == ["--json"]:
            assert json.loads(out)["adapters"][1]["adapter"] == NAME
        else:
            assert plain(NAME) in out


def test_files_of_any_name_are_reported_escaped(tmp_path, said, monkeypatch):
    monkeypatch.setattr(merge_equivalence, "run", lambda: MERGED)
    rows, folder = tmp_path / NAME, tmp_path / f"out {NAME}"
    rows.write_bytes(b"".join(map(sealed, make_rows((f"./{NAME}",), ranks=(), seeds=1))) + b"damaged\n")
    code, out, err = said("figures", "--rows", rows, "--out", folder)
    assert code == 0
    assert out == f"figures: {plain(str(folder))}\n"
    assert plain(f"{rows}: line") in err
    (folder / "report.html").read_bytes().decode()
    model = tmp_path / f"model {NAME}"
    huggingface.save_model(huggingface.load(), model, "card")
    code, out, _ = said("modules", model)
    assert code == 0
    assert plain(str(model)) in out
    assert len(out.splitlines()) == len(said("modules", "base")[1].splitlines())


@settings(max_examples=20)
@given(pieces=st.lists(names, max_size=5))
def test_generated_text_cannot_control_the_terminal(pieces, tmp_path_factory):
    import contextlib
    import io

    stream, original = io.StringIO(), tokenizer.stream
    tokenizer.stream = lambda words, tokens: iter(pieces)
    try:
        with contextlib.redirect_stdout(stream):
            assert cli.main(["generate", "x"]) == 0
    finally:
        tokenizer.stream = original
    assert stream.getvalue() == "x" + "".join(plain(piece, keep="\n") for piece in pieces) + "\n"
    assert calm(stream.getvalue())


@example(1)
@example(2)
@given(n=st.integers(0, 10**6))
def test_only_one_is_singular(n):
    assert counted(n, "tensor is", "tensors are") == f"{n} " + ("tensor is" if n == 1 else "tensors are")
