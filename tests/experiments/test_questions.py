"""Every experiment by name: the committed rows are the whole grid, and a page says what they show."""

import json
from pathlib import Path

import numpy as np
import pytest

from minilora.data.corpora import Corpus
from minilora.errors import InputError, StorageError
from minilora.experiments import harness, rank_sweep
from minilora.experiments.questions import MODULES, measured, picture, question
from minilora.formats import huggingface

ROOT = Path(__file__).parents[2]
PAGES = {  # experiment -> its page in docs/
    "known-rank": "low_rank",
    "subspaces": "low_rank",
    "intrinsic-dimension": "low_rank",
    "which-matrices": "what_to_adapt",
    "scale": "what_to_adapt",
    "initialisation": "what_to_adapt",
    "rivals": "rivals",
    "size": "which_rank",
    "merging": "merging",
    "forgetting": "forgetting",
    "cost": "cost",
    "beyond-language": "beyond_language",
    "adding-adapters": "adding_adapters",
}
SEEDS = 5
REDONE = [  # experiment, the committed run that is done again (first or last), the loss that is compared
    *(
        (name, 0, "test")
        for name in ("which-matrices", "scale", "initialisation", "forgetting", "rivals", "size")
    ),
    ("known-rank", -1, "excess"),
    *((name, i, "test") for name in ("intrinsic-dimension", "beyond-language") for i in (0, -1)),
]


@pytest.fixture(scope="module", params=MODULES)
def experiment(request):
    """The name, its two modules, and the committed rows."""
    asks, _ = question(request.param)
    rows, reads = measured(request.param, ROOT / "figures")
    return request.param, asks, reads, rows


def test_the_committed_rows_are_those_of_the_default_plan(experiment, tmp_path, monkeypatch):
    """The whole grid again, each run looked up instead of done: the same runs in the same order."""
    _, asks, _, rows = experiment
    known = {row["id"]: row for row in rows}

    def digest(targets, i):
        """Of a text that was trained on, by the rows of its target or by its place."""
        for config in (row["config"] for row in rows):
            own = config.get("target", config.get("plan", {}).get("target")) == targets[i]
            texts = config.get("texts") or [config.get("text")]
            if len(texts) == len(targets) > 1:
                return texts[i]
            if own or (targets[i] == getattr(asks, "OWN", None) and len(texts) > 1):
                return texts[0 if own else -1]
        raise AssertionError(f"no row knows the text {targets[i]}")

    def read_inputs(path, targets):
        texts, targets = {}, list(targets)
        for i, target in enumerate(targets):
            splits = ((np.arange(n) % 100).astype(np.uint8) for n in (1 << 20, 1 << 17, 1 << 17))
            texts[target] = Corpus(target, rows[0]["source"], *splits)
            vars(texts[target])["digest"] = digest(targets, i)
        return harness.Inputs(path, huggingface.load(path), texts)

    def work(run, inputs):
        return {name: a for name, a in known[run.id].items() if name not in ("versions", "gap_closed")}

    monkeypatch.setattr(harness, "read_inputs", read_inputs)
    for module in (asks, rank_sweep):
        monkeypatch.setattr(module, "work", work, raising=False)
    again = asks.run(asks.Plan(), tmp_path, jobs=1)
    assert [row | {"versions": None} for row in again] == [row | {"versions": None} for row in rows]
    seeds = {}
    for row in rows:
        assert row["status"] == "done" or row["config"]["kind"] == "search"
        if row["config"]["kind"] == "final":
            seeds.setdefault(json.dumps(row["config"] | {"seed": 0}), []).append(row["config"]["seed"])
    few = getattr(asks.Plan(), "few_seeds", SEEDS)  # where a question takes fewer for some of its cells
    assert few >= 3
    assert {len(some) for some in seeds.values()} <= {SEEDS, few}
    assert all(sorted(some) == list(range(len(some))) for some in seeds.values())


def test_rows_and_pictures_are_those_of_the_folder_that_is_named(tmp_path):
    lines = (ROOT / "figures/size/rows.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "size").mkdir()
    (tmp_path / "size/rows.jsonl").write_bytes(b"".join(lines[1:]))
    rows, reads = measured("size", tmp_path)
    assert reads is question("size")[1]
    assert rows == measured("size", ROOT / "figures")[0][1:]
    for name in ("size/needed", "size/gap"):
        drawn = picture(name, ROOT / "figures").encoded("png")
        assert drawn == (ROOT / f"figures/{name}.png").read_bytes()
    with pytest.raises(StorageError, match="cost"):
        measured("cost", tmp_path)
    with pytest.raises(InputError, match="no experiment 'sise'; nearest: 'size'"):
        measured("sise", tmp_path)
    with pytest.raises(InputError, match="size has no picture 'need'; nearest: 'needed'"):
        picture("size/need", ROOT / "figures")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "i", "loss"), REDONE)
def test_a_committed_run_done_again_gives_its_row(name, i, loss, tmp_path, monkeypatch):
    """The same loss to the bit on the same machine, and on any nearer than other seeds are.

    So whatever a row depends on that its plan does not say is still what it was.
    """
    asks, _ = question(name)
    rows, _ = measured(name, ROOT / "figures")
    known = {row["id"]: row for row in rows}
    row = [row for row in rows if row["config"]["kind"] == "final"][i]
    home = rank_sweep if name == "which-matrices" else asks  # whose runs are the sweep's
    done, work = [], home.work

    def looked_up(run, inputs):
        if run.id == row["id"]:
            done.append(work(run, inputs))
        return {key: a for key, a in known[run.id].items() if key not in ("versions", "gap_closed")}

    monkeypatch.setattr(home, "work", looked_up)
    try:
        asks.run(asks.Plan(), tmp_path, jobs=1)
    except StorageError as e:  # no network for the texts
        pytest.skip(str(e))
    seeds = [a[loss] for a in rows if a["config"] | {"seed": 0} == row["config"] | {"seed": 0}]
    assert len(seeds) >= 3
    assert abs(done[0][loss] - row[loss]) < max(seeds) - min(seeds)


def test_a_page_says_what_the_rows_say(experiment, monkeypatch):
    """Every table and sentence to the letter, as docs/tables.py writes them, and every figure."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    from tables import PLACE, filled

    name, _, reads, rows = experiment
    page = (ROOT / f"docs/{PAGES[name]}.md").read_text(encoding="utf-8")
    assert filled(page) == page
    places = [match[3] for match in PLACE.finditer(page) if match[2] == name]
    assert sorted(places) == ["sentences", *(f"table {i + 1}" for i in range(len(reads.tables(rows))))]
    for drawn in reads.pictures(rows):
        assert f"](../figures/{name}/{drawn}.png)" in page
        assert (ROOT / f"figures/{name}/{drawn}.svg").is_file()
    assert f"minilora experiment {name} --out figures/{name}" in page
