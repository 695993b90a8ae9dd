"""The experiment with scales and learning rates: its laws are Adam's, its minima those of its curves."""

import copy
import math
from dataclasses import asdict, replace
from functools import partial
from itertools import product

import numpy as np
import pytest
from helpers import gamma

from minilora.adapters import scales
from minilora.data.batching import batches, eval_batches
from minilora.data.corpora import Corpus
from minilora.errors import ConfigError, FormatError
from minilora.experiments import harness, recipe, scale
from minilora.experiments.scale import SCALE, SCALINGS, Plan, Run, scale_of
from minilora.experiments.scale_figures import FULL, Arm, found, pictures, sentences, tables
from minilora.formats.checkpoint import History
from minilora.lora import inject
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config, llama
from minilora.optim import AdamW, Schedule, lora_plus
from minilora.training import evaluate, train
from minilora.tree import digest, freeze, named_params

TINY = Config(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=16)  # fmt: skip
PLAN = Plan(
    ranks=(1, 2, 4), middle=2, ratios=(4.0,), rates=(1e-2, 2e-2), full_rates=(1e-3,), steps=3, seeds=2,
    batch=2, test_windows=3, valid_windows=2,
)  # fmt: skip
WIDE = Plan(seeds=3)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Short windows, and the texts and the base of this file."""
    monkeypatch.setattr(recipe, "LENGTH", 16)
    monkeypatch.setattr(harness, "read_inputs", lambda base, targets: made())


def made():
    """A tiny base, frozen, and a text."""
    base = llama(TINY, np.random.default_rng(0))
    freeze(base)
    ids = np.random.default_rng(1).integers(60, 70, 3000).astype(np.uint8)
    return harness.Inputs("base", base, {"folio": Corpus("folio", "a text", *np.split(ids, [2000, 2500]))})


def cell(kind="final", **how):
    return Run(kind, **{"plan": PLAN, "rank": 2, "scale": 2.0, "rate": 1e-2, "seed": 3} | how)


def other_split(inputs, split):
    """The inputs with other letters in one split."""
    text = inputs.texts["folio"]
    return replace(inputs, texts={"folio": replace(text, **{split: getattr(text, split)[::-1] ^ 1})})


# ---- one run


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_scaling_is_the_configs_own(rank):
    """s of the adapters is that of LoraConfig with the alpha of the docstring; a root and four roundings."""
    configs = {
        "alpha / r": LoraConfig(rank, 2 * PLAN.middle),
        "alpha / √r": LoraConfig(rank, 2 * math.sqrt(PLAN.middle), rslora=True),
        "alpha = 2r": LoraConfig(rank, 2 * rank),
    }
    assert configs.keys() == SCALINGS.keys()
    for scaling, config in configs.items():
        usual = made().base
        inject(usual, config, rng=np.random.default_rng(0))
        ours = scale.prepared(cell(rank=rank, scale=scale_of(scaling, rank, PLAN)), made())
        assert scales(ours) == pytest.approx(scales(usual), rel=gamma(5), abs=0)
    assert {scale_of(scaling, PLAN.middle, PLAN) for scaling in SCALINGS} == {SCALE}


@pytest.mark.parametrize(
    ("one", "other"),
    [({"scale": 2.0, "ratio": 4.0}, {"scale": 8.0}),  # LoRA+ is a larger alpha
     ({"rank": 4, "scale": 1.0}, {"rank": 4, "scale": 0.5, "ratio": 2.0})],  # rsLoRA is a faster B, m = 1
    ids=["LoRA+", "rsLoRA"],
)  # fmt: skip
def test_a_faster_B_is_a_larger_scale(one, other, monkeypatch):
    """To the bit for powers of two, where eps is nothing and nothing is clipped; not with the same scale."""
    monkeypatch.setattr(scale, "AdamW", partial(AdamW, eps=1e-30, clip=None))
    ends = [scale.work(cell(**how), made())["test"] for how in (one, other, one | {"ratio": 1.0})]
    assert ends[0] == ends[1]
    assert (ends[0] != ends[2]) == ("ratio" in one)


def test_the_base_stays_as_it_was_and_all_weights_are_trained_only_with_rank_0():
    inputs = made()
    before = digest(inputs.base)
    base, full, lora = (
        scale.work(c, inputs) for c in (Run("base", PLAN), cell(rank=0, scale=0.0), cell())
    )  # fmt: skip
    assert digest(inputs.base) == before
    sizes = {path: p.data.shape for path, p in named_params(inputs.base).items()}
    assert base["parameters"] == 0
    assert full["parameters"] == sum(map(math.prod, sizes.values()))
    assert lora["parameters"] == sum(2 * sum(shape) for path, shape in sizes.items() if "_proj" in path)
    assert len({row["test"] for row in (base, full, lora)}) == 3


def test_test_text_chooses_no_rate_and_validation_text_measures_nothing():
    inputs = made()
    for kind, seen, unseen in (("search", "valid", "test"), ("final", "test", "valid")):
        row, same, other = (
            scale.work(cell(kind), x)
            for x in (inputs, other_split(inputs, unseen), other_split(inputs, seen))
        )
        assert row == same
        assert unseen not in row
        assert row[seen] != other[seen]


def test_a_run_follows_its_recipe():
    """By hand, with as many steps as a warm-up needs."""
    run, inputs = cell(plan=replace(PLAN, steps=40), ratio=4.0), made()
    text, model = inputs.texts["folio"], copy.deepcopy(inputs.base)
    inject(model, LoraConfig(2, 4), rng=np.random.default_rng([3, 0]))
    optimizer = AdamW(1e-2, betas=(0.9, 0.99), rate=lora_plus(4.0))
    train(
        model, batches(text.train, np.random.default_rng([3, 1]), 2, 16), optimizer,
        steps=40, schedule=Schedule(40, warmup=2),
    )  # fmt: skip
    assert scale.work(run, inputs)["test"] == evaluate(model, eval_batches(text.test, 16, 16, limit=48))


def test_runs_of_a_seed_see_the_same_batches(monkeypatch):
    seen = []

    def train(model, given, *_, **how):
        seen.append(next(given)[0])
        return History()

    monkeypatch.setattr(recipe, "train", train)
    for how in ({}, {"rank": 4}, {"rank": 0}, {"rate": 0.5}, {"seed": 4}):
        scale.learned(cell(**how), made())
    assert all((x == seen[0]).all() for x in seen[1:4])
    assert (seen[4] != seen[0]).any()


# ---- the grid


def optimum(rank, s, ratio):
    """The rate that crafted losses have their minimum at."""
    return 3e-3 if not rank else 9e-3 * (32 / (rank * s)) ** 0.6 / ratio


def crafted(run, inputs):
    """A row in no time, its loss a parabola over log rate with that minimum; on test, seeds differ."""
    c = asdict(run)
    row = {"id": run.id, "config": c, "source": "crafted", "status": "done", "parameters": 1}
    if run.kind == "base":
        return row | {"test": 2.0}
    rank, s, ratio = c["rank"], c["scale"], c["ratio"]
    loss = 1.5 + 0.1 / (rank or 100) + 0.01 * math.log2(run.rate / optimum(rank, s, ratio)) ** 2
    if run.kind == "search":
        return row | {"valid": loss}
    return row | {"test": loss + (0.1, 0.5, 0.2)[run.seed]}


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Crafted rows of the usual grid, with three seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "read_inputs", lambda base, targets: made())
        patch.setattr(scale, "prepared", lambda *_: None)
        patch.setattr(scale, "work", crafted)
        return scale.run(WIDE, tmp_path_factory.mktemp("grid"), jobs=1)


def keys():
    """Every arm of the usual grid."""
    lora = {(r, scale_of(s, r, WIDE), 1.0) for s, r in product(SCALINGS, WIDE.ranks)}
    return {FULL, *lora, *((WIDE.middle, SCALE, ratio) for ratio in WIDE.ratios)}


def test_the_minimum_of_every_arm_is_found(grid):
    """That of the parabola exactly, but for roundings; the best rate is the grid's nearest one, inside it."""
    arms = found(grid).arms
    assert arms.keys() == keys()
    assert len(keys()) == 1 + 3 * 5 - 2 + 2
    for key, arm in arms.items():
        assert arm.optimum == pytest.approx(optimum(*key), rel=1e-6)
        assert min(arm.curve) < arm.rate < max(arm.curve)
        nearest = min(arm.curve, key=lambda rate: abs(math.log(rate / optimum(*key))))
        assert arm.rate == nearest
        steps = np.diff(np.log2(sorted(arm.curve)))
        assert steps == pytest.approx(np.ones(len(steps)), abs=math.log2(1.05))  # a rate has two digits


def test_seeds_are_trained_at_the_arms_own_best_rate_and_at_the_middle_ranks(grid):
    f = found(grid)
    for key, arm in f.arms.items():
        both = key != FULL and key[2] == 1
        assert arm.tests.keys() == ({arm.rate, f.middle.rate} if both else {arm.rate})
        assert all(len(losses) == 3 for losses in arm.tests.values())
    finals = [row["config"]["seed"] for row in grid if row["config"]["kind"] == "final"]
    searches = [row["config"]["seed"] for row in grid if row["config"]["kind"] == "search"]
    assert set(finals) == {0, 1, 2}
    assert set(searches) == {harness.SEARCH_SEED}


def test_an_edge_is_left_at_most_so_often(tmp_path, monkeypatch):
    """Losses that fall with the rate: the search goes on to larger ones, then gives up."""
    monkeypatch.setattr(scale, "prepared", lambda *_: None)
    monkeypatch.setattr(scale, "work", lambda run, inputs: crafted(run, inputs) | (
        {"valid": -run.rate} if run.kind == "search" else {}))  # fmt: skip
    arms = found(scale.run(PLAN, tmp_path, jobs=1)).arms
    assert sorted(arms[FULL].curve) == pytest.approx([1e-3 * 2**i for i in range(1 + scale.EDGES)])
    for (rank, _, ratio), arm in arms.items():
        if rank:
            assert sorted(arm.curve) == pytest.approx(
                [1e-2 * 2**i / math.sqrt(ratio) for i in range(2 + scale.EDGES)]
            )
        assert arm.rate == arm.optimum == max(arm.curve)


def test_a_rate_at_which_a_search_diverged_is_never_the_best(tmp_path, monkeypatch):
    def work(run, inputs):
        row = crafted(run, inputs)
        lost = {k: v for k, v in row.items() if k not in ("valid", "test")} | {"status": "diverged"}
        return lost if run.rate > 5e-3 else row

    monkeypatch.setattr(scale, "prepared", lambda *_: None)
    monkeypatch.setattr(scale, "work", work)
    arms = found(scale.run(replace(PLAN, rates=(4e-3, 8e-3, 16e-3)), tmp_path, jobs=1)).arms
    assert {arm.rate for arm in arms.values()} <= {1e-3, 2e-3, 4e-3}
    assert all(np.isfinite(arm.best).all() for arm in arms.values())


# ---- reading


def median(key, rate):
    """Of the crafted test losses."""
    return 1.7 + 0.1 / (key[0] or 100) + 0.01 * math.log2(rate / optimum(*key)) ** 2


def test_numbers_of_a_scaling_are_those_of_the_losses(grid):
    f = found(grid)
    one = f.middle.rate
    for scaling in SCALINGS:
        arms = {r: (r, scale_of(scaling, r, WIDE), 1.0) for r in WIDE.ranks}
        assert f.scaled(scaling) == {r: f.arms[key] for r, key in arms.items()}
        cost = [median(key, one) - median(key, f.arms[key].rate) for key in arms.values()]
        assert f.cost(scaling) == pytest.approx(max(cost))
        more = median(arms[96], one) - median(arms[16], one)
        assert f.more(scaling) == pytest.approx(more)
        times = {r: optimum(*key) / optimum(*FULL) for r, key in arms.items()}
        assert f.times(scaling) == pytest.approx(times, rel=1e-6)
        high, low = (pick(times[r] for r in (4, 16, 64, 96)) for pick in (max, min))
        assert f.apart(scaling) == pytest.approx(high / low, rel=1e-6)


def test_tables_and_sentences_say_the_numbers(grid):
    f = found(grid)
    one, (grid_table, plus) = f.middle.rate, tables(grid)
    assert [line[0] for line in grid_table.rows] == [
        "all weights",
        *(s for s in SCALINGS for _ in WIDE.ranks),
    ]
    line = grid_table.rows[1 + 2 * 5 + 4]  # alpha = 2r at r = 96
    key = (96, 2.0, 1.0)
    best, at_one = (
        f"{median(key, rate):.3f} ({median(key, rate) - 0.1:.3f} to {median(key, rate) + 0.3:.3f})"
        for rate in (f.arms[key].rate, one)
    )
    times = f"{optimum(*key) / optimum(*FULL):.1f}"
    assert line == ("alpha = 2r", "96", "2", f"{f.arms[key].rate:g}", times, best, at_one)
    assert [row[:3] for row in plus.rows] == [
        (f"{q:g}", f"{a.rate:g}", f"{q * a.rate:g}") for q, a in f.plus.items()
    ]
    change = {q: float(np.median(a.best - f.middle.best)) for q, a in f.plus.items()}
    assert [row[4] for row in plus.rows] == [f"{x:+.3f} ({x:+.3f} to {x:+.3f})" for x in change.values()]
    more, cost, apart, times, best, faster = sentences(grid)
    order = "{} with alpha / r, {} with alpha / √r, {} with alpha = 2r."
    assert more.endswith(order.format(*(f"{f.more(s):+.3f}" for s in SCALINGS)))
    assert cost.endswith(order.format(*(f"{f.cost(s):.3f}" for s in SCALINGS)))
    assert apart.endswith(order.format(*(f"{f.apart(s):.2g}" for s in SCALINGS)))
    low, high = (f"{pick(f.times('alpha = 2r').values()):.2g}" for pick in (min, max))
    assert times.endswith(f"{low} to {high} times full fine-tuning's with alpha = 2r.")
    spread = max(
        max(x) - min(x)
        for x in ([float(np.median(f.scaled(s)[r].best)) for s in SCALINGS] for r in WIDE.ranks)
    )
    assert best.endswith(f"at most {spread:.3f} apart.")
    assert (
        faster
        == f"LoRA+ changes the loss by {change[4]:+.3f} at a ratio of 4, {change[16]:+.3f} at a ratio of 16."
    )


def test_a_minimum_without_two_neighbours_or_a_curve_is_the_best_rate():
    assert Arm({1.0: 3.0, 2.0: 2.0}, {}).optimum == 2.0
    assert Arm({1.0: 2.0, 2.0: 2.0, 4.0: 2.0}, {}).optimum == 1.0  # of equal ones, the smallest
    assert Arm({1.0: 3.0, 2.0: 2.0, 4.0: 3.0}, {}).optimum == pytest.approx(2.0)


def test_a_run_that_diverged_has_an_infinite_loss_and_is_no_point_of_a_curve(grid):
    f = found(grid)
    worst = max(rate for rate, _ in f.arms[FULL].curve.items())

    def lost(row):
        c = row["config"]
        search = c["kind"] == "search" and (c["rank"], c["rate"]) == (0, worst)
        final = c["kind"] == "final" and (c["rank"], c["seed"]) == (0, 1)
        keep = {k: v for k, v in row.items() if k not in ("valid", "test")}
        return keep | {"status": "diverged"} if search or final else row

    full = found([lost(row) for row in grid]).arms[FULL]
    assert full.curve.keys() == f.arms[FULL].curve.keys() - {worst}
    assert full.best[1] == math.inf
    assert np.isfinite(full.best[[0, 2]]).all()


def test_rows_without_a_seed_are_refused(grid):
    with pytest.raises(ConfigError, match="no seed was measured"):
        tables([row for row in grid if row["config"]["kind"] == "search"])


@pytest.mark.slow
def test_the_same_rows_give_the_same_figures(grid):
    drawn, again = pictures(grid), pictures(grid)
    assert drawn.keys() == {"rates", "one_rate", "lora_plus"}
    for name, picture in drawn.items():
        assert picture.encoded("svg") == again[name].encoded("svg")
        svg = picture.encoded("svg").decode()
        assert "nats" in svg
        assert "learning rate" in picture.says


# ---- rows


def test_a_finished_folder_is_read_not_run(tmp_path, monkeypatch):
    plan = replace(PLAN, seeds=1, ranks=(1, 2), ratios=(), rates=(1e-2,))
    monkeypatch.setattr(scale, "EDGES", 0)
    first = scale.run(plan, tmp_path, jobs=1)
    data = (tmp_path / "rows.jsonl").read_bytes()
    monkeypatch.setattr(scale, "work", None)
    assert scale.run(plan, tmp_path, jobs=1) == first
    assert (tmp_path / "rows.jsonl").read_bytes() == data
    assert harness.read_rows(tmp_path / "rows.jsonl", scale.FORM) == first


def test_a_rank_that_does_not_fit_is_refused_before_any_run(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "work", None)
    with pytest.raises(ConfigError, match="r is 5"):
        scale.run(replace(PLAN, ranks=(1, 2, 5)), tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("search", "valid", "low"), ("search", "test", 1.0), ("final", "valid", 1.0), ("final", "test", None),
     ("base", "parameters", -1), ("base", "status", "lost"), ("final", "more", 1)],
)  # fmt: skip
def test_a_row_that_no_run_writes_is_refused(kind, field, value, grid, tmp_path):
    row = next(row for row in grid if row["config"]["kind"] == kind) | {"versions": {}, field: value}
    (tmp_path / "rows.jsonl").write_bytes(harness.sealed(row))
    with pytest.raises(FormatError, match=f"line 1: row.*{field}"):
        harness.read_rows(tmp_path / "rows.jsonl", scale.FORM)


@pytest.mark.parametrize(
    "change",
    [{"ranks": (1, 4)}, {"ranks": (16,)}, {"ranks": (16, 4)}, {"ranks": (4, 16, 16)}, {"ranks": (0, 16)},
     {"rates": ()}, {"full_rates": ()}, {"ratios": (0,)}, {"rates": (-1e-3,)}, {"full_rates": (math.nan,)},
     {"steps": 0}, {"seeds": 1.5}, {"batch": 0}, {"test_windows": 0}, {"valid_windows": True}],
    ids=repr,
)  # fmt: skip
def test_an_empty_or_impossible_plan_is_refused(change):
    with pytest.raises(ConfigError):
        Plan(**change)
