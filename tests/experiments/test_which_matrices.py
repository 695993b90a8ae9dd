"""The experiment with sets of matrices: a budget goes where it says, and the rows are read as they are."""

from dataclasses import replace

import numpy as np
import pytest

from minilora.data.corpora import Corpus
from minilora.errors import ConfigError, FormatError, InputError
from minilora.experiments import harness, rank_sweep, recipe, which_figures
from minilora.experiments import which_matrices as which
from minilora.experiments.which_figures import budgets, gains, losses, medians, pictures, sentences, tables
from minilora.experiments.which_matrices import QUICK, SETS, Plan
from minilora.model import Config, llama
from minilora.tree import digest, freeze, size, trained

TINY = Config(hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=4, max_position_embeddings=16)  # fmt: skip
PLAN = Plan(
    budgets=(260, 780), rates=(1e-2, 3e-2), full_rates=(1e-3, 3e-3), steps=2, search_steps=1, seeds=2,
    test_windows=3, valid_windows=2,
)  # fmt: skip
KINDS = {  # set -> the kinds of maps in it
    "Q": "q", "K": "k", "V": "v", "O": "o", "QV": "q v", "QKVO": "q k v o", "MLP": "gate up down",
    "all": "q k v o gate up down",
}  # fmt: skip
COSTS = {name: 2 * sum(32 + 4 * (kind in ("gate", "up", "down")) for kind in kinds.split())
         for name, kinds in KINDS.items()}  # of rank 1 in both blocks: 16 + 16, or 16 + 20  # fmt: skip


def text(name, seed):
    """A text of a few letters of its own."""
    ids = np.random.default_rng(seed).integers(60 + 5 * seed, 70 + 5 * seed, 3000).astype(np.uint8)
    return Corpus(name, f"text {name}", *np.split(ids, [2000, 2500]))


def made(base="base", targets=PLAN.targets):
    """A tiny base, frozen, and two texts."""
    model = llama(TINY, np.random.default_rng(0))
    freeze(model)
    return harness.Inputs("base", model, {name: text(name, i) for i, name in enumerate(targets)})


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Short windows, and inputs that are not read."""
    monkeypatch.setattr(recipe, "LENGTH", 16)
    monkeypatch.setattr(harness, "read_inputs", made)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """All rows of the tiny plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "LENGTH", 16)
        patch.setattr(harness, "read_inputs", made)
        return which.run(PLAN, tmp_path_factory.mktemp("rows"), jobs=1)


def finals(rows, text, name=None):
    """The measured rows of a set; of full fine-tuning if no set is named."""
    modules = list(SETS[name]) if name else []
    return [row for row in rows if (row["config"]["kind"], row["config"]["target"], row["config"]["modules"])
            == ("final", text, modules)]  # fmt: skip


# ---- what is run


def test_each_set_adapts_its_maps_and_no_others(rows):
    assert SETS.keys() == KINDS.keys()
    for name, kinds in KINDS.items():
        for row in finals(rows, "code", name):
            ends = [path.rpartition(".")[2].removesuffix("_proj") for path in row["spectra"]]
            assert sorted(ends) == sorted(2 * kinds.split())


def test_no_other_rank_is_nearer_to_the_budget(rows):
    for text in PLAN.targets:
        for name, cost in COSTS.items():
            sizes = sorted({row["parameters"] for row in finals(rows, text, name)})
            assert len(sizes) == 2
            for budget, parameters in zip(PLAN.budgets, sizes, strict=True):
                assert parameters % cost == 0
                assert abs(parameters - budget) <= cost / 2
            assert len(finals(rows, text, name)) == 2 * PLAN.seeds


def test_the_references_are_the_frozen_base_and_full_fine_tuning(rows):
    inputs = made()
    for text in PLAN.targets:
        assert [row["parameters"] for row in finals(rows, text)] == [size(inputs.base)] * PLAN.seeds
        (base,) = [row for row in rows if row["config"]["kind"] == "base" and row["config"]["target"] == text]
        assert (base["parameters"], base["base_digest"]) == (0, digest(inputs.base))


def test_the_rate_of_each_cell_is_the_best_of_its_search(rows):
    searches = [row for row in rows if row["config"]["kind"] == "search"]
    assert all(row["config"]["seed"] == harness.SEARCH_SEED for row in searches)
    assert all("test" not in row for row in searches)

    def cell(row):
        return tuple(str(row["config"][key]) for key in ("target", "method", "modules", "rank"))

    done = [row for row in rows if row["config"]["kind"] == "final"]
    assert len(done) == 2 * (1 + 2 * len(SETS)) * PLAN.seeds
    for row in done:
        tried = {other["config"]["lr"]: other["valid"] for other in searches if cell(other) == cell(row)}
        first = PLAN.full_rates if row["config"]["method"] == "full" else PLAN.rates
        assert set(first) < set(tried)  # one of two is at an edge
        assert tried[row["config"]["lr"]] == min(tried.values())


def test_a_run_is_one_of_the_rank_sweep(rows):
    """The same recipe, to the bit: all linear maps at r = 1."""
    inputs = made()
    row = next(row for row in finals(rows, "code", "all") if row["config"]["rank"] == 1)
    plan = rank_sweep.Plan(("code",), (1,), steps=2, search_steps=1, test_windows=3, valid_windows=2)
    (_, cell) = rank_sweep.grid(plan, inputs.texts)
    again = rank_sweep.work(replace(cell, lr=row["config"]["lr"], seed=row["config"]["seed"]), inputs)
    assert again["id"] == row["id"]
    assert again["test"] == row["test"]


def test_the_sets_of_the_default_plan_meet_the_budgets_as_the_plan_says(monkeypatch):
    """On the base that ships: within 13% of the small budget, within 4% of the large one."""
    from minilora.formats.huggingface import load

    base = load("base")
    monkeypatch.setattr(recipe, "LENGTH", 128)
    for cell in which.grid(Plan(), replace(made(), base=base)):
        if cell.method == "lora":
            parameters = size(trained(rank_sweep.prepared(cell, replace(made(), base=base))))
            assert min(abs(parameters / budget - 1) / most
                       for budget, most in zip(Plan().budgets, (0.13, 0.04), strict=True)) < 1  # fmt: skip
    for budget in QUICK["budgets"]:
        assert budget in Plan().budgets


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((100,), r"budgets 100 give QKVO the ranks 0; .* from 256 parameters"),
     ((260, 270), r"budgets 260, 270 give Q the ranks 4, 4; .* from 64 parameters"),
     ((260, 1100), r"r is 17 for model.layers.0.self_attn.q_proj")],
)  # fmt: skip
def test_a_budget_that_no_rank_meets_is_refused_before_any_run(sizes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_sweep, "work", None)
    with pytest.raises(ConfigError, match=message):
        which.run(replace(PLAN, budgets=sizes), tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [{"targets": ()}, {"budgets": ()}, {"rates": ()}, {"full_rates": ()}, {"steps": 0}, {"seeds": 1.5},
     {"rates": (0.0,)}, {"full_rates": (-1.0,)}, {"budgets": (0,)}, {"budgets": (9, 8)}, {"budgets": (9, 9)},
     {"targets": ("code", "code")}],
)  # fmt: skip
def test_an_empty_or_impossible_plan_is_refused(change):
    with pytest.raises(ConfigError):
        Plan(**change)


@pytest.mark.slow
def test_a_finished_folder_is_read_not_run(tmp_path, monkeypatch):
    plan = replace(PLAN, seeds=1, targets=("code",))
    first = which.run(plan, tmp_path, jobs=1)
    data = (tmp_path / "rows.jsonl").read_bytes()
    monkeypatch.setattr(rank_sweep, "train", None)
    assert which.run(plan, tmp_path, jobs=1) == first
    assert (tmp_path / "rows.jsonl").read_bytes() == data
    assert harness.read_rows(tmp_path / "rows.jsonl", which.FORM) == first


@pytest.mark.parametrize(("field", "value"), [("test", "low"), ("status", "lost"), ("more", 1)])
def test_a_row_that_no_run_writes_is_refused(field, value, rows, tmp_path):
    row = {k: v for k, v in rows[-1].items() if k != "sha256"} | {field: value}
    (tmp_path / "rows.jsonl").write_bytes(harness.sealed(row))
    with pytest.raises(FormatError, match=f"line 1: row.*{field}"):
        harness.read_rows(tmp_path / "rows.jsonl", which.FORM)


# ---- what the rows say


def crafted(text="code", more=None, seeds=3):
    """Rows of two budgets by hand: losses of 8 to 1, half less at the large budget, 10 seed² more.

    `more` is added at the large budget: set -> change.
    """
    rows = []

    def row(kind, method, modules, rank, seed, test, parameters, lr=0.5):
        config = {"kind": kind, "target": text, "method": method, "modules": list(modules), "rank": rank,
                  "seed": seed, "lr": lr}  # fmt: skip
        return {"config": config, "status": "done", "test": test, "parameters": parameters}

    rows.append(row("base", "none", (), 0, 0, 60.0, 0, 0.0))
    for seed in (2, 0, 1)[:seeds]:
        rows.append(row("final", "full", (), 0, seed, 10.0 * seed**2, 999, 0.125))
        for i, (name, modules) in enumerate(SETS.items()):
            for j, rank in enumerate((16 - i, 32 - i)):  # 32 before 16 would be the order of letters
                loss = 10.0 * seed**2 + 8 - i - 0.5 * j + (more or {}).get(name, 0) * j
                rows.append(row("final", "lora", modules, rank, seed, loss, 100 * (j + 1) + i))
    return rank_sweep.with_gaps(rows)


def test_budgets_are_told_apart_by_rank():
    small, large = budgets(crafted(), "code")
    assert list(small) == list(large) == list(SETS)
    assert {row["config"]["rank"] for row in small["QV"]} == {12}
    assert {row["config"]["rank"] for row in large["QV"]} == {28}
    assert losses(large["QV"]).tolist() == [43.5, 3.5, 13.5]


def test_medians_are_of_seeds_and_the_best_comes_first():
    small, large = budgets(crafted(more={"QV": -9}), "code")
    assert list(medians(small).items())[:2] == [("all", 11.0), ("MLP", 12.0)]
    assert list(medians(large).items())[:2] == [("QV", 4.5), ("all", 10.5)]


def test_gains_compare_the_same_seed():
    rows = crafted()
    assert [gains(one).tolist() for one in budgets(rows, "code")] == [[3.0, 3.0, 3.0]] * 2
    lost = [row | {"status": "diverged"} if (row["config"]["seed"], row["config"]["modules"])
            == (0, list(SETS["QV"])) else row for row in rows]  # fmt: skip
    assert [gains(one).tolist() for one in budgets(lost, "code")] == [[3.0, 3.0]] * 2
    better = crafted(more={"all": -1.0})
    assert which_figures.grown(budgets(better, "code")) == "+3.000, then +4.000"


def test_sentences_sort_the_medians_and_place_q_and_v():
    rows = crafted(more={"QV": -2.75}) + crafted("folio")
    first, small, large, gain, *others = sentences(rows)
    assert first == "Best: all on Python code; all on First Folio. QV is number 2 to 4 of 8."
    assert small == (
        "Python code, 100 to 107 parameters, best to worst: all +0.000, MLP +1.000, QKVO +2.000, QV +3.000, "
        "O +4.000, V +5.000, K +6.000, Q +7.000."
    )
    assert large.startswith("Python code, 200 to 207 parameters, best to worst: all +0.000, QV +0.250, MLP")
    assert gain == "Python code: all linear maps gain +3.000, then +0.250 nats on QV as the budget grows."
    assert len(others) == 3
    assert sentences(crafted(more={"MLP": -4}))[0] == (
        "Best: all, then MLP on Python code. QV is number 4 of 8."
    )


def test_tables_say_what_the_rows_say(rows):
    for text, table in zip(PLAN.targets, tables(rows), strict=True):
        assert len(table.rows) == 2 + 2 * len(SETS)
        assert [line[0] for line in table.rows] == ["frozen base", *SETS, *SETS, "full fine-tuning"]
        done = [row for row in finals(rows, text, "QV") if row["config"]["rank"] == 6]
        loss, config = [row["test"] for row in done], done[0]["config"]
        line = table.rows[1 + len(SETS) + list(SETS).index("QV")]
        assert line[1:5] == (
            "6", "768", f"{config['lr']:g}", f"{np.median(loss):.3f} ({min(loss):.3f} to {max(loss):.3f})",
        )  # fmt: skip
    (table,) = tables(crafted())
    assert table.rows[0] == ("frozen base", "", "0", "", "60.000", "")
    assert table.rows[8] == ("all", "9", "107", "0.5", "11.000 (1.000 to 41.000)", "113%")
    assert table.rows[-1] == ("full fine-tuning", "", "999", "0.125", "10.000 (0.000 to 40.000)", "115%")
    assert table.caption == "Python code: nats per character, median and range of 3 seeds"


def test_a_seed_that_diverged_is_left_out_and_a_set_without_any_is_missed():
    rows = crafted(seeds=2)
    for row in rows:
        if row["config"]["modules"] == list(SETS["K"]) and row["config"]["seed"] == 2:
            row["status"] = "diverged"
    assert losses(budgets(rows, "code")[0]["K"]).tolist() == [7.0]
    for row in rows:
        if row["config"]["modules"] == list(SETS["K"]) and row["config"]["rank"] == 15:
            row["status"] = "diverged"
    with pytest.raises(InputError, match="no finished run on code"):
        tables(rows)


def test_rows_without_references_are_refused():
    rows = [row for row in crafted() if row["config"]["method"] != "full"]
    with pytest.raises(InputError, match="no text has finished runs"):
        sentences(rows)


def test_the_figures_are_drawn_from_the_rows():
    """Every test loss is a point of its panel, at its set; gains are points at their budget."""
    rows = crafted("folio") + crafted(more={"QV": -2.75})
    drawn = pictures(rows)
    assert drawn.keys() == {"which_set", "all_against_qv"}
    for panel, text in zip(drawn["which_set"].figure.axes, ("folio", "code"), strict=True):
        points = {(x, round(y)) for line in panel.get_lines() for x, y in zip(*line.get_data(), strict=True)
                  if line.get_marker() in "os"}  # fmt: skip
        names = [label.get_text() for label in panel.get_yticklabels()]
        assert names == list(SETS)
        assert points == {(row["test"], list(SETS).index(name)) for name in SETS
                          for row in finals(rows, text, name)}  # fmt: skip
        lines = [line.get_xdata()[0] for line in panel.get_lines() if line.get_linestyle() in (":", "--")]
        assert lines == [60.0, 10.0]
    (panel,) = drawn["all_against_qv"].figure.axes
    gained = {(x, y) for line in panel.get_lines() for x, y in zip(*line.get_data(), strict=True)
              if line.get_marker() in ("o", "s")}  # fmt: skip
    assert gained == {(107, 3.0), (207, 3.0), (207, 0.25)}
    assert drawn["which_set"].figure.get_suptitle() == (
        "Which matrices should get the parameters?\n"
        "Best: all on First Folio; all on Python code. QV is number 2 to 4 of 8"
    )
    assert drawn["all_against_qv"].figure.get_suptitle() == (
        "Do all linear maps beat Q and V, above all at low rank?\n"
        "First Folio +3.000, then +3.000; Python code +3.000, then +0.250 nats"
    )
    assert "seed by seed" in drawn["all_against_qv"].says


@pytest.mark.slow
def test_the_same_rows_give_the_same_figures(rows):
    again = pictures(rows)
    for name, picture in pictures(rows).items():
        assert picture.encoded("svg") == again[name].encoded("svg")
        assert "nats" in picture.encoded("svg").decode()
