"""README and docs/ are true: the program prints its numbers, and the tables match the rows."""

import contextlib
import io
import json
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from wings import PACKAGE, imports

from minilora.data import corpora
from minilora.errors import StorageError
from minilora.experiments.rank_report import HEAD, figure_names, lines
from minilora.experiments.rank_sweep import read_rows
from minilora.table import Table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def page(name):
    """A page of docs/."""
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def markdown(rows):
    """The results of a sweep as one table in Markdown for each target."""
    parts = []
    for target in figure_names(rows):
        parts.append(f"`{target}`\n\n{Table(HEAD, lines(rows, target)).markdown()}")
    return "\n\n".join(parts)


@pytest.fixture
def texts():
    """The texts that the program reads, if they can be fetched."""
    try:
        corpora.fetch_texts()
    except StorageError as e:
        pytest.skip(str(e))


def test_the_readme_program_prints_the_numbers_in_its_comments(texts, capsys):
    code = re.search(r"```python\n(import numpy.*?)```", README, re.S)[1]
    said = re.findall(r"^print\(.*?# (.*)$", code, re.M)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(said) == len(printed) == 5
    numbers = re.compile(r"[0-9.]+")
    for comment, line in zip(said, printed, strict=True):
        digits = len(comment.partition(".")[2].split()[0].rstrip("]")) if "." in comment else 0
        # other machines round otherwise, and a hundred steps carry that on: one unit of the last digit shown
        expected, got = (np.array([float(x) for x in numbers.findall(t)]) for t in (comment, line))
        assert np.abs(got - expected).max() <= 1.5 * 10.0**-digits, (comment, line)


def test_the_rank_table_matches_the_rows():
    assert markdown(read_rows(ROOT / "figures" / "rows.jsonl")) in page("which_rank")


def test_the_page_on_speed_has_the_rows_of_the_step(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import step

    of, said = step.processors(results("step")["rows"]), page("speed")
    assert of
    for name, rows in of.items():
        assert f"**{name}**\n\n{step.table(rows)}\n" in said
        assert step.raced(name, rows) in said
    last, rows = [(name, rows) for name, rows in of.items() if "selective" in rows[0]["ms"]][-1]
    assert f"on the {last}:\n\n{step.memory(rows)}\n" in said
    for text in step.recomputing(rows):
        assert text in said, text


@pytest.mark.parametrize("name", ["inference", "sweep", "step_parts", "gradient_order", "packed"])
def test_the_page_on_speed_names_the_processor_of_each_benchmark(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from common import brief

    assert re.search(rf"`python benchmarks/{name}.py`\W+{brief(results(name)['processor'])}\b", page("speed"))


def test_the_tables_of_four_bits_match_their_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import four_bits
    import merge_four_bits

    found, said = results("four_bits"), page("four_bits")
    for text in (four_bits.table(found), *four_bits.said(found)):
        assert text in said, text
    rows = results("merge_four_bits")["rows"]
    for text in (merge_four_bits.table(rows), *merge_four_bits.said(rows)):
        assert text in said, text


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 102


def test_ci_runs_the_commands_of_the_readme():
    """But for less output and a small grid."""
    job, proof, _lessons = re.findall(r"^python3 -m venv .*$", README, re.M)
    text = (ROOT / ".ci/run").read_text()
    said = [line.strip().replace(" -q", "").removesuffix(" --quick") for line in text.splitlines()]
    assert {job, proof} <= {*said}


def test_every_file_of_a_stage_is_there():
    for script in (".ci/run", "tests/elsewhere.sh"):
        named = re.findall(r"\b(?:tests|docs|benchmarks)/[\w/.]+\w", (ROOT / script).read_text())
        assert named
        assert [file for file in named if not (ROOT / file).exists()] == [], script


def test_the_reading_order_follows_the_imports():
    lesson = re.findall(r"\]\(minilora/(\w+)\.py\)", "\n".join(re.findall(r"^\d+\. .*$", README, re.M)))
    assert len(lesson) == len({*lesson}) >= 9
    for i, name in enumerate(lesson):
        later = {item.module for item in imports(PACKAGE / f"{name}.py") if item.ours} & {*lesson[i:]}
        assert not later, (name, later)


def test_the_quoted_line_is_in_lora_and_runs_in_the_program(texts):
    """By every micro-batch of every step, for each of the 21 maps, on whatever thread."""
    quoted = re.search(r"```python\n( +A\.add_grad.*)\n```", README)[1]
    file = ROOT / "minilora" / "lora.py"
    number = file.read_text().splitlines().index(quoted) + 1
    code = re.search(r"```python\n(import numpy.*?)```", README, re.S)[1]
    assert "steps=100" in code
    seen = []

    def trace(frame, event, arg):
        if frame.f_code.co_filename != str(file) or frame.f_code.co_name != "learn":
            return None if frame.f_code.co_name not in ("back", "run") else trace
        if event == "line" and frame.f_lineno == number:
            seen.append(threading.get_ident())
        return trace

    before = sys.gettrace()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code.replace("steps=100", "steps=2"), "README.md", "exec"), {})
    finally:
        sys.settrace(before)
        threading.settrace(None)
    assert len(seen) % 21 == 0
    assert len(seen) >= 2 * 21


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_numbers_of_inspect_match_its_benchmark():
    found = results("microscope")
    table, figures, dense = found["table"], found["figures"], found["dense"][-1]
    said = (
        f"{table['seconds']:.1f} s and {table['peak_MB']:.0f} MB for the table, {figures['seconds']:.1f} s "
        f"and {figures['peak_MB']:.0f} MB with figures and report; the spectrum from the thin factors "
        f"agrees with that of the dense ΔW to {dense['relative_difference']:.0e} and is "
        f"{dense['times_faster']:,.0f} times as fast to compute on {dense['shape'][0]} x {dense['shape'][1]}"
    )
    assert said in page("adapters"), said


def test_the_numbers_of_smollm2_match_its_benchmark():
    found = results("smollm2")
    before, after = found["nats_per_character"]
    said = (
        f"In {found['seconds'] / 60:.1f} minutes on two cores and {found['peak_GB']:.1f} GB its loss on the "
        f"held-out plays falls from {before:.2f} to {after:.2f} nats per character; the perplexity of a "
        f"modern paragraph rises from {found['before']['perplexity']:.1f} to "
        f"{found['after']['perplexity']:.1f}"
    )
    fine_tuning, adapters = page("fine_tuning"), page("adapters")
    assert said in fine_tuning, said
    none, _, count = found["inspect"]["intruders"].split()
    assert none == "0"
    assert f"Of the {int(count):,} leading directions of W + ΔW none is an intruder." in adapters
    assert found["inspect"]["summary"].replace("; of", ";\nof") in adapters
    for state in ("before", "after"):
        quoted = " ".join(found[state]["sampled"][1].split())
        assert quoted in " ".join(fine_tuning.replace("\n>", " ").split()), state
