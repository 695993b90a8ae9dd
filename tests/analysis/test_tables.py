"""What `inspect` shows: by kind, within 80 columns, several adapters, metadata, CSV and documented JSON."""

import csv
import dataclasses
import io
import itertools
import json
import math
import re
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from by_hand import write_peft
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_cases import FIXTURES

from minilora import cli
from minilora.analysis import inspect as microscope
from minilora.analysis import tables
from minilora.analysis.inspect import inspect, pictures, report_page, survey, view
from minilora.compose.truncate import compress
from minilora.errors import ConfigError, MismatchError
from minilora.lora_files.recognise import adapters_at
from minilora.table import Table, plain, printed

PATTERNS, QV = FIXTURES / "adapters/untied--patterns", FIXTURES / "adapters/untied--q-and-v"
DOCUMENT = (Path(__file__).parents[2] / "docs/adapters.md").read_text(encoding="utf-8")
BLOCKS = [f"unet.{side}_blocks.{i}.attentions.{j}.transformer_blocks.0"
          for side in ("down", "up") for i in range(2) for j in range(2)]  # fmt: skip
NAMES = [
    *(f"{block}.{kind}" for block in BLOCKS for kind in ("attn1.to_q", "attn2.to_out.0", "ff.net.0.proj")),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet.conv_in",
    *(f"text_encoder_2.text_model.encoder.layers.{i}.self_attn.q_proj" for i in range(3)),
]  # fmt: skip
IDLE = "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
METADATA = {
    "ss_network_dim": "4", "ss_network_args": '{"conv_dim": "4", "algo": "lora"}', "format": "pt",
    "modelspec.title": "a \x1b[31m title\n", "ss_tag_frequency": json.dumps({"a": {"b": 3}}) * 40,
    "deep": "[" * 100_000, "software": '{"name": "ai-toolkit", "version": 3}',
}  # fmt: skip


def image_lora(folder, seed=0, metadata=None, names=NAMES):
    """An adapter of an image model, the spectrum of each module another one."""
    rng = np.random.default_rng(seed)
    factors = {}
    for i, name in enumerate(names):
        O, I, r = 6 + i % 3, 9, 4 if i % 5 else 3  # noqa: E741
        fall = rng.uniform(0.2, 0.9) ** np.arange(r)
        A, B = rng.standard_normal((r, I)), rng.standard_normal((O, r)) * fall
        factors[name] = A, 0 * B if name == IDLE else B
    return write_peft(folder, factors, metadata=metadata)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_lora(tmp_path_factory.mktemp("image") / "sdxl", metadata=METADATA)


@pytest.fixture(scope="module")
def seen(folder):
    return inspect(folder)


@pytest.fixture
def run(capsys):
    """A command's exit code and what it printed."""

    def said(*arguments):
        code = cli.main(["inspect", *map(str, arguments)])
        return code, *capsys.readouterr()

    return said


# ---- by kind


def least_common(S, share):
    """The least rank at which all spectra together keep this share of their energy."""
    whole = sum((s**2).sum() for s in S)
    kept = (sum((s[:k] ** 2).sum() for s in S) for k in itertools.count(1))
    return next(k for k, part in enumerate(kept, 1) if part >= share * (1 - 1e-12) * whole)


def test_each_kind_has_the_numbers_of_its_modules(seen):
    kinds = seen.data()["kinds"]
    assert {(k["component"], k["kind"]) for k in kinds} == {(m.component, m.kind) for m in seen.modules}
    for found in kinds:
        some = [m for m in seen.modules if (m.component, m.kind) == (found["component"], found["kind"])]
        assert found["modules"] == len(some)
        assert (found["r_min"], found["r_max"]) == (min(m.r for m in some), max(m.r for m in some))
        assert found["parameters"] == sum(m.r * sum(m.shape) for m in some)
        assert found["norm"] == pytest.approx(math.sqrt(sum(m.norm**2 for m in some)), rel=1e-14)
        assert found["median_norm"] == median(m.norm for m in some)
        assert (found["effective"], found["noise"]) == (
            median(m.ranks.effective for m in some), median(m.noise.effective for m in some))  # fmt: skip
        assert found["at90"] == median(m.ranks.at90 for m in some)
        assert found["at99"] == median(m.ranks.at99 for m in some)
        assert found["suggested_rank"] == least_common([np.array(m.singular_values) for m in some], 0.99)


@pytest.mark.parametrize("name", ["patterns", "q-and-v", "image"])
def test_the_suggested_rank_is_what_compress_chooses(name, folder, tmp_path):
    given_ = folder if name == "image" else FIXTURES / f"adapters/untied--{name}"
    seen = inspect(given_)
    rows = compress(given_, tmp_path / "small", energy=0.99).rows
    longest = {m.module: len(m.singular_values) for m in seen.modules}
    assert {row.rank for row in rows} == {min(seen.suggested_rank, n) for n in longest.values()}
    for row in rows:
        assert row.rank == min(seen.suggested_rank, longest[row.module])
    assert f"suggested rank: {seen.suggested_rank}, " in str(seen)
    assert "(minilora compress --energy 0.99)" in " ".join(str(seen).split())


def test_modules_that_do_nothing_are_counted_and_named(seen):
    assert seen.idle == [IDLE]
    assert f"1 module does nothing: ΔW = 0, such as {IDLE}" in seen.notes
    assert not inspect(PATTERNS).idle


def test_the_report_begins_with_a_line_for_each_component_and_kind(seen):
    head, *lines = str(seen).partition("\ncount: ")[0].splitlines()
    assert head.split() == ["kind", "count", "r", "|ΔW|", "eff.", "rank", "90", "%", "99", "%", "keep"]
    assert [line.split()[0] for line in lines] == [
        "unet", "attn1.to_q", "attn2.to_out.0", "ff.net.0.proj", "conv_in", "text_encoder_2", "q_proj",
    ]  # fmt: skip
    counts = [int(line.split()[1]) for line in lines]
    assert counts == [26, 9, 8, 8, 1, 3, 3]
    assert [line.startswith("  ") for line in lines] == [False, *4 * [True], False, True]
    first = lines[-1].split()
    (q,) = [k for k in seen.data()["kinds"] if k["kind"] == "q_proj"]
    assert lines[0].split()[2] == "3-4"
    assert first[2:] == ["4", f"{q['median_norm']:.3g}", f"{q['effective']:.1f}", f"({q['noise']:.1f})",
                         f"{q['at90']:g}", f"{q['at99']:g}", str(q["suggested_rank"])]  # fmt: skip


def test_a_llamas_kinds_are_its_last_names_without_a_component():
    lines = str(inspect(PATTERNS)).partition("\ncount: ")[0].splitlines()[1:]
    assert {line.split()[0] for line in lines} == {m.module.split(".")[-1] for m in inspect(PATTERNS).modules}
    assert not any(line.startswith(" ") for line in lines)


# ---- 80 columns


def test_everything_fits_80_columns(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    other = image_lora(tmp_path / "other", 1)
    for seen in (inspect("sdxl"), inspect("sdxl", against=other),
                 inspect(PATTERNS, FIXTURES / "bases/untied", QV)):  # fmt: skip
        for line in printed(*view(seen, metadata=True)).splitlines():
            assert len(line) <= tables.WIDTH or " " not in line, line


@given(widths=st.lists(st.integers(1, 9), min_size=1, max_size=5), names=st.lists(st.text(max_size=90)))
def test_a_table_is_fitted_by_its_names_alone(widths, names):
    head, rows = ["name", *("x" * w for w in widths)], [["x" * w for w in widths] for _ in names]
    table = tables.fitted(names, head, rows)
    assert all(len(line) <= tables.WIDTH for line in table.lines())
    assert [list(row[1:]) for row in table.rows] == rows
    fits = tables.WIDTH - sum(w + 2 for w in widths)
    if all(len(name) <= fits for name in names if name.isprintable()) and all(map(str.isprintable, names)):
        assert [row[0] for row in table.rows] == names


@given(text=st.text(max_size=50), most=st.integers(3, 60))
def test_a_shortened_text_keeps_both_ends(text, most):
    found = tables.shortened(text, most)
    assert len(found) == min(len(text), most)
    start, middle, end = found.partition("…")
    assert found == text or (middle and text.startswith(start) and text.endswith(end) and start)


# ---- order and choice


KEYS = {
    "model": None, "name": lambda m: m.module, "norm": lambda m: -m.norm,
    "rank": lambda m: -m.ranks.effective, "at99": lambda m: -m.ranks.at99,
}  # fmt: skip


@pytest.mark.parametrize("sort", KEYS)
@pytest.mark.parametrize("limit", [1, 7, 29, 999])
def test_modules_are_sorted_and_those_not_shown_are_counted(sort, limit, folder, run):
    seen = inspect(folder, against=folder)
    wanted = sorted(seen.modules, key=KEYS[sort]) if KEYS[sort] else list(seen.modules)
    shown = [part for part in view(seen, sort, limit) if isinstance(part, Table) and part.head[0] == "module"]
    assert len(shown) == 2
    for table in shown:
        assert len(table.rows) == min(limit, 29)
    norms = [row[2] for row in shown[0].rows]
    assert norms == [f"{m.norm:.3g}" for m in wanted[:limit]]
    code, out, _ = run(folder, "--sort", sort, "--limit", limit)
    assert code == 0
    rest = 29 - min(limit, 29)
    left = re.findall(r"^(\d+) more modules? (?:is|are) not shown; --limit 29 shows all$", out, re.M)
    assert left == ([str(rest)] if rest else [])


def test_an_unknown_order_and_an_empty_limit_are_refused(seen):
    with pytest.raises(ConfigError, match=r"sort is 'nrom'; expected one of model, .*; nearest: 'norm'"):
        view(seen, "nrom")
    for limit in (0, -1, True):
        with pytest.raises(ConfigError, match=r"limit is .*; expected an int, at least 1"):
            view(seen, limit=limit)


@settings(max_examples=15)
@given(pattern=st.sampled_from(["*attn1*", "unet.*", "*.q_proj", "*[0-9].attn?.to_*", "unet.conv_in", "*"]))
def test_a_pattern_chooses_the_modules_that_are_read(pattern, folder):
    whole, seen = inspect(folder), inspect(folder, modules=pattern)
    wanted = [m for m in whole.modules if fnmatchcase(m.module, pattern)]
    assert list(seen.modules) == wanted
    assert seen.parameters == sum(m.r * sum(m.shape) for m in wanted)
    assert any("were not read" in note for note in seen.notes) is (len(wanted) < len(whole.modules))
    both = inspect(folder, against=folder, modules=pattern)
    assert [m.module for m in both.modules if m.other] == [m.module for m in wanted]
    assert not any("by only one of the two" in note for note in both.notes)


def test_a_pattern_that_matches_nothing_is_answered_with_the_nearest_names(folder, run):
    with pytest.raises(
        MismatchError, match=r"none of its 29 modules matches 'unet\.convin'; nearest: 'unet\.conv_in'"
    ):
        inspect(folder, modules="unet.convin")
    code, _, err = run(folder, "--modules", "unet.convin")
    assert (code, "nearest: 'unet.conv_in'" in err) == (2, True)


# ---- pictures


def test_text_encoders_have_pictures_of_their_own(folder):
    compared = inspect(folder, against=folder)
    drawn = pictures(compared)
    names = ["heat_map", "spectra", "similarity", "difference"]
    assert list(drawn) == [*names, *(f"{name}_text_encoder_2" for name in names)]
    assert "text_encoder" not in drawn["heat_map"].says
    for end, word in (("", "block"), ("_text_encoder_2", "layer")):
        for name in ("heat_map", "difference"):
            assert drawn[name + end].figure.axes[1].get_xlabel() == word
            assert f" by {word}; " in drawn[name + end].says
        assert f"all {word}s" in drawn[f"spectra{end}"].figure.get_suptitle()
    own, encoder = (drawn[name].figure.axes[1] for name in ("heat_map", "heat_map_text_encoder_2"))
    columns = [
        "down 0.0",
        "down 0.1",
        "down 1.0",
        "down 1.1",
        "mid 0",
        "up 0.0",
        "up 0.1",
        "up 1.0",
        "up 1.1",
    ]
    assert [t.get_text() for t in own.get_xticklabels()] == columns
    assert [t.get_text() for t in encoder.get_xticklabels()] == ["0", "1", "2"]
    grid = np.ma.filled(own.get_images()[0].get_array().astype(float), np.nan)
    row = [t.get_text() for t in own.get_yticklabels()].index("attn1.to_q")
    assert grid[row].tolist() == [m.norm for m in compared.modules if m.kind == "attn1.to_q"]


def test_names_without_dots_are_inspected_and_drawn(tmp_path):
    flat = [f"lora_unet_down_blocks_{i}_attentions_0_to_q" for i in range(3)]
    seen = inspect(image_lora(tmp_path / "flat", names=flat))
    assert [m.kind for m in seen.modules] == flat
    assert "</html>" in report_page(seen, pictures(seen))


# ---- metadata


def test_the_usual_metadata_are_shown_first_and_all_on_request(folder, run):
    said = run(folder)[1]
    for line in ("modelspec.title: a \\x1b[31m title\\n", "ss_network_dim: 4",
                 "ss_network_args: conv_dim=4, algo=lora", "software: name=ai-toolkit, version=3",
                 "2 more entries of metadata: --metadata shows all"):  # fmt: skip
        assert f"\n{line}\n" in said
    assert "ss_tag_frequency" not in said
    whole = run(folder, "--metadata")[1]
    order = re.findall(r"^([\w.]+): ", whole[whole.index("modelspec") :], re.M)
    assert order[:6] == ["modelspec.title", "ss_network_dim", "ss_network_args", "software", "deep", "format"]
    assert order[6] == "ss_tag_frequency"
    assert "more entries of metadata" not in whole
    (long,) = (line for line in whole.splitlines() if line.startswith("ss_tag_frequency"))
    assert (len(long), "…" in long) == (80, True)


def test_metadata_reach_programs_and_the_page_whole(folder, seen, run):
    assert json.loads(run(folder, "--json")[1])["metadata"] == METADATA
    page = report_page(seen, {})
    assert '<th scope="row">ss_network_dim</th><td>4</td>' in page
    assert "\\x1b[31m title" in page
    assert "\x1b" not in page
    assert '<th scope="row">format</th>' not in page
    assert "ss_" not in str(inspect(PATTERNS))


@given(metadata=st.dictionaries(st.text(max_size=99), st.text(max_size=200) | st.just("{}"), max_size=4))
def test_no_metadata_break_a_line(metadata):
    for every in (False, True):
        lines = list(tables.metadata_lines(metadata, every))
        assert all(line.isprintable() and len(line) <= tables.WIDTH for line in lines)
        assert len(lines) == len(metadata) or not every


# ---- for programs


def paths(value, at=""):
    """Where the plain values of a JSON text are, such as modules[].ranks.at90."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from paths(part, f"{at}.{'*' if at == 'metadata' else name}".lstrip("."))
    elif isinstance(value, list):
        for part in value:
            yield from paths(part, f"{at}[]")
    else:
        yield at


def test_every_field_of_the_json_is_documented_and_there(folder):
    documented = [name for row in re.findall(r"^\| (`[^|]*) \|", DOCUMENT, re.M)
                  for name in re.findall(r"`([\w.\[\]*]+)`", row)]  # fmt: skip
    compared = inspect(PATTERNS, FIXTURES / "bases/untied", QV)
    written = {path for seen in (inspect(folder), compared)
               for path in paths(json.loads(json.dumps(seen.data())))}  # fmt: skip
    assert sorted(documented) == sorted(written)


def columns(start):
    """The columns that a sentence of the document names."""
    (found,) = re.findall(re.escape(start) + r"[^`]*((?:`\w+`(?:, )?)+)\.", DOCUMENT)
    return re.findall(r"`(\w+)`", found)


def test_each_module_is_a_row_of_exact_numbers(folder, run):
    for arguments in ([folder], [PATTERNS, "--base", FIXTURES / "bases/untied", "--against", QV]):
        code, out, err = run(*arguments, "--csv")
        assert (code, err) == (0, "")
        read = list(csv.DictReader(io.StringIO(out)))
        assert list(read[0]) == columns("With `--csv` each module is a row")
        how = dict(zip(("base", "against"), arguments[2::2], strict=False))
        seen = inspect(arguments[0], **how)
        assert [row["module"] for row in read] == [m.module for m in seen.modules]
        for row, m in zip(read, seen.modules, strict=True):
            assert (row["component"], row["kind"], row["block"]) == (m.component, m.kind, m.block)
            assert (int(row["outputs"]), int(row["inputs"]), int(row["r"])) == (*m.shape, m.r)
            assert (float(row["alpha"]), float(row["scale"]), float(row["norm"])) == (
                m.alpha,
                m.scale,
                m.norm,
            )
            assert (float(row["s_1"]), float(row["s_r"])) == (m.singular_values[0], m.singular_values[-1])
            for name, value in dataclasses.asdict(m.ranks).items():
                assert float(row[name]) == value
                assert float(row[f"noise_{name}"]) == getattr(m.noise, name)
            for name in ("relative", "amplification", "random_amplification", "overlap", "random_overlap",
                         "intruders", "threshold"):  # fmt: skip
                assert row[name] == ("" if m.base is None else str(getattr(m.base, name)))
            for name, field in (("cosine", "cosine"), ("other_norm", "norm")):
                assert row[name] == ("" if m.other is None else str(getattr(m.other, field)))


@given(
    rows=st.lists(st.lists(st.text() | st.sampled_from([',"', "a\r\nb"]), min_size=3, max_size=3), min_size=1)
)
def test_csv_gives_back_any_text_escaped(rows):
    text = tables.csv_text([dict(zip("abc", row, strict=True)) for row in rows])
    assert list(csv.reader(text.splitlines())) == [["a", "b", "c"], *(list(map(plain, row)) for row in rows)]
    assert text.count("\n") == 1 + len(rows)


def test_the_norm_of_the_second_adapter_is_its_own(folder, tmp_path):
    other = image_lora(tmp_path / "other", 1)
    alone = {m.module: m.norm for m in inspect(other).modules}
    for m in inspect(folder, against=other).modules:
        assert m.other.norm == pytest.approx(alone[m.module], rel=1e-14)


# ---- several adapters


@pytest.fixture
def many(tmp_path, folder):
    """A folder of three adapters, of which one is damaged, and of things that are none."""
    image_lora(tmp_path / "many/checkpoint-500", 1)
    image_lora(tmp_path / "many/checkpoint-60", 2, names=NAMES[:5])
    (tmp_path / "many/broken").mkdir()
    (tmp_path / "many/broken/adapter_config.json").write_text("{}")
    (tmp_path / "many/logs").mkdir()
    (tmp_path / "many/notes.txt").write_text("none")
    (tmp_path / "many/model").mkdir()
    (tmp_path / "many/model/config.json").write_text("{}")
    (tmp_path / "many/model/model.safetensors").write_text("")
    return tmp_path / "many"


def test_a_folder_of_adapters_has_a_line_for_each_and_one_error_stops_none(many, run):
    names = ["broken", "checkpoint-60", "checkpoint-500"]
    assert adapters_at(many) == [many / name for name in names]
    code, out, err = run(many)
    assert (code, err) == (1, "")
    head, *lines = out.splitlines()
    assert head.split() == ["adapter", "count", "r", "params", "|ΔW|", "eff.", "rank", "99", "%", "keep"]
    assert [line.split()[0] for line in lines[:3]] == names
    assert "peft_type is None; expected 'LORA'" in lines[0]
    for name, line in zip(names[1:], lines[1:3], strict=True):
        g = microscope.group(inspect(many / name).modules)
        assert line.split() == [
            name, str(g.modules), f"{g.r_min}-{g.r_max}", tables.size(g.parameters), f"{g.norm:.3g}",
            f"{g.effective:.1f}", f"({g.noise:.1f})", f"{g.at99:g}", str(g.suggested_rank),
        ]  # fmt: skip
    good = [many / name for name in names[1:]]
    assert run(*good)[0] == 0
    assert run(*good)[1].splitlines()[:3] == [head, *lines[1:3]]


def test_several_adapters_are_rows_for_programs(many, run):
    code, out, _ = run(many, "--csv")
    assert code == 1
    read = list(csv.DictReader(io.StringIO(out)))
    assert list(read[0]) == columns("Of several adapters, `--json` has `adapters[]` and `--csv` a row each:")
    listed = json.loads(run(many, "--json")[1])["adapters"]
    for row, same in zip(read, listed, strict=True):
        assert row == {name: "" if value is None else str(value) for name, value in same.items()}
        if not same["error"]:
            whole = inspect(same["adapter"])
            assert same["norm"] == pytest.approx(whole.norm, rel=1e-14)
            assert same["suggested_rank"] == whole.suggested_rank
            assert same["parameters"] == whole.parameters
    assert [bool(row["error"]) for row in listed] == [True, False, False]


def test_a_pattern_and_progress_of_several(many):
    told = []
    seen = survey(adapters_at(many)[1:], "*attn1*", progress=lambda *at: told.append(at))
    assert told == [(1, 2), (2, 2)]
    assert [line.numbers.modules for line in seen.lines] == [2, 9]
    assert seen.failed == 0
    assert survey(adapters_at(many), "*q_proj*").failed == 2


def test_names_that_would_be_alike_are_shown_whole(many, tmp_path, run):
    image_lora(tmp_path / "more/checkpoint-60", 5)
    seen = survey([many / "checkpoint-60", tmp_path / "more/checkpoint-60"])
    one, two = (row.split()[0] for row in str(seen).splitlines()[1:3])
    assert one != two


def test_an_adapter_a_model_and_what_is_missing_are_no_folders_of_adapters(many, tmp_path, folder):
    for path in (
        folder,
        many / "model",
        tmp_path / "none",
        many / "notes.txt",
        many / "logs",
        many / "broken",
    ):
        assert adapters_at(path) == [path]
    (tmp_path / "files").mkdir()
    for name in ("b.safetensors", "a.gguf", "x.txt"):
        (tmp_path / "files" / name).write_text("")
    assert adapters_at(tmp_path / "files") == [tmp_path / "files" / n for n in ("a.gguf", "b.safetensors")]
    (tmp_path / "files/config.json").write_text("{}")  # of whatever made them
    assert len(adapters_at(tmp_path / "files")) == 2
    (tmp_path / "files/model.safetensors").write_text("")
    assert adapters_at(tmp_path / "files") == [tmp_path / "files"]


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_lora_weights.bin", "adapters.npz", "x.gguf"])
def test_a_folder_whose_lora_cannot_be_read_has_its_line(name, many):
    (many / "pickled").mkdir()
    (many / "pickled" / name).write_text("")
    assert many / "pickled" in adapters_at(many)
    assert adapters_at(many / "pickled") == [
        many / "pickled" / name if name == "x.gguf" else many / "pickled"
    ]
