"""What the README says is so: its program prints its numbers, its table is that of the rows."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from minilora.data import corpora
from minilora.errors import StorageError
from minilora.experiments.rank_sweep import HEAD, lines, read_rows, summary
from minilora.table import Table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def markdown(rows):
    """The results of a sweep as one table in Markdown for each target."""
    parts = []
    for target in dict.fromkeys(line["target"] for line in summary(rows)):
        parts.append(f"`{target}`\n\n{Table(HEAD, lines(rows, target)).markdown()}")
    return "\n\n".join(parts)


def test_the_program_prints_what_its_comments_say(capsys):
    try:
        corpora.fetch_texts()
    except StorageError as e:
        pytest.skip(str(e))
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


def test_the_table_is_that_of_the_rows():
    assert markdown(read_rows(ROOT / "figures" / "rows.jsonl")) in README


def test_the_table_of_the_step_is_that_of_its_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import step

    rows = json.loads((ROOT / "benchmarks" / "results" / "step.json").read_text())["rows"]
    assert step.table(rows) in README


def test_the_quoted_line_stands_in_lora():
    quoted = re.search(r"```python\n( +A\.add_grad.*)\n```", README)[1]
    assert quoted in (ROOT / "minilora" / "lora.py").read_text().splitlines()


def test_every_file_and_picture_that_is_named_is_there_and_every_module_is_named():
    for path in re.findall(r"\]\(((?!https?:)[^)]+)\)", README):
        assert (ROOT / path).exists(), path
    for module in (ROOT / "minilora").glob("*.py"):
        assert module.name.startswith("__") or f"minilora/{module.name}" in README, module.name


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_figures_of_the_microscope_are_those_of_its_benchmark():
    found = results("microscope")
    table, figures, dense = found["table"], found["figures"], found["dense"][-1]
    said = (
        f"{table['seconds']:.1f} s and {table['peak_MB']:.0f} MB for the table, {figures['seconds']:.1f} s "
        f"and {figures['peak_MB']:.0f} MB with figures and report; a spectrum from the thin factors is that "
        f"of the dense ΔW to {dense['relative_difference']:.0e} and {dense['times_faster']:,.0f} times as "
        f"fast to get on {dense['shape'][0]} x {dense['shape'][1]}"
    )
    assert said in README, said


def test_the_figures_of_smollm2_are_those_of_its_benchmark():
    found = results("smollm2")
    before, after = found["nats_per_character"]
    said = (
        f"In {found['seconds'] / 60:.1f} minutes on two cores and {found['peak_GB']:.1f} GB its loss on the "
        f"held-out plays falls from {before:.2f} to {after:.2f} nats per character; the perplexity of a "
        f"modern paragraph rises from {found['before']['perplexity']:.1f} to "
        f"{found['after']['perplexity']:.1f}"
    )
    assert said in README, said
    none, _, count = found["inspect"]["intruders"].split()
    assert none == "0"
    assert f"Of the {int(count):,} leading directions of W + ΔW none is an intruder." in README
    assert found["inspect"]["summary"].replace("; of", ";\nof") in README
    for state in ("before", "after"):
        quoted = " ".join(found[state]["sampled"][1].split())
        assert quoted in " ".join(README.replace("\n>", " ").split()), state
