"""Every committed figure can be read from the back row, and is what its rows draw."""

import importlib
import json
from pathlib import Path

import matplotlib
import pytest
from legible import faults

from minilora.analysis.plotting import Picture
from minilora.experiments import rank_figures, rank_report, rank_sweep
from minilora.experiments.questions import MODULES, measured

ROOT = Path(__file__).parents[2]
FIGURES, RESULTS = ROOT / "figures", ROOT / "benchmarks/results"
BENCHMARKS = ("serving", "step", "four_bits", "merge_four_bits", "methods", "inference", "smollm2_ranks")


def sweeps():
    rows = rank_sweep.read_rows(FIGURES / "rows.jsonl")
    merged = json.loads((FIGURES / "merge_equivalence.json").read_text())
    return {"merge_equivalence": rank_figures.merge_equivalence(merged), **rank_report.pictures(rows)}


def asked(name):
    rows, reads = measured(name, FIGURES)
    return {f"{name}/{figure}": picture for figure, picture in reads.pictures(rows).items()}


def measured_in_benchmarks(name, monkeypatch):
    """What a benchmark draws from its rows."""
    drawn = {}
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(Picture, "save", lambda picture, folder, name: drawn.update({name: picture}))
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "RESULTS", Path("/nowhere"))
    monkeypatch.setattr(Path, "write_text", lambda *args, **how: None)
    found = json.loads((RESULTS / f"{name}.json").read_text())
    made = module.draw(found if name == "four_bits" else found["rows"])
    return drawn or {name: made}


def same(name, picture, folder):
    """Whether a committed figure is this one, if the same matplotlib drew it."""
    made = json.loads((FIGURES / "MANIFEST.json").read_text())["matplotlib"]
    return made != matplotlib.__version__ or (folder / f"{name}.png").read_bytes() == picture.encoded("png")


@pytest.mark.parametrize("name", ["the sweep", *MODULES])
def test_a_committed_figure_can_be_read_and_is_what_its_rows_draw(name):
    pictures = sweeps() if name == "the sweep" else asked(name)
    assert pictures
    for figure, picture in pictures.items():
        assert same(figure, picture, FIGURES), f"{figure}: drawn anew it is another one"
        assert not faults(picture.figure), figure


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmarks_figure_can_be_read_and_is_what_its_rows_draw(name, monkeypatch):
    for figure, picture in measured_in_benchmarks(name, monkeypatch).items():
        assert same(figure, picture, RESULTS), f"{figure}: drawn anew it is another one"
        assert not faults(picture.figure), figure
