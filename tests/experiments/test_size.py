"""The experiment with the size of the base: every width is pretrained alike, and where 90% is reached."""

import copy
import math
import os
from dataclasses import asdict, replace

import numpy as np
import pytest

from minilora.data.batching import batches, eval_batches
from minilora.data.corpora import Corpus
from minilora.errors import ConfigError, FormatError
from minilora.experiments import harness, pretrain, recipe
from minilora.experiments import size as module
from minilora.experiments.size import OWN, Plan, Run
from minilora.experiments.size_figures import (
    Arm,
    found,
    needs,
    pictures,
    remains,
    sentences,
    tables,
    told,
)
from minilora.lora import inject
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config, llama
from minilora.optim import AdamW, Schedule
from minilora.training import evaluate, train
from minilora.tree import digest, freeze, named_params, trained, unfreeze

PLAN = Plan(
    widths=(8, 16), ranks=(1, 3), alpha=6.0, rates=(1e-2, 2e-2), full_rates=(3e-3,), pretraining=3, steps=4,
    search_steps=2, seeds=2, batch=2, test_windows=3, valid_windows=2,
)  # fmt: skip
WIDE = Plan(seeds=3)


def text(name, seed):
    ids = np.random.default_rng(seed).integers(60, 70, 3000).astype(np.uint8)
    return Corpus(name, f"source of {name}", *np.split(ids, [2000, 2500]))


TEXTS = {name: text(name, i) for i, name in enumerate(("folio", OWN))}


def shape(width):
    """Of a tiny base."""
    return Config(hidden_size=width, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
                  num_key_value_heads=1, max_position_embeddings=16)  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Short windows, tiny bases, and the texts of this file."""
    monkeypatch.setattr(recipe, "LENGTH", 16)
    monkeypatch.setattr(pretrain, "shape", shape)
    monkeypatch.setattr(harness, "read_inputs", lambda base, targets: made())
    pretrain.pretrained.cache_clear()
    yield
    pretrain.pretrained.cache_clear()


def made(**texts):
    """Two texts, and a base that nobody uses."""
    base = llama(shape(8), np.random.default_rng(9))
    freeze(base)
    return harness.Inputs("base", base, TEXTS | texts)


def cell(kind="final", **how):
    return Run(kind, **{"plan": PLAN, "width": 8, "rank": 3, "rate": 1e-2, "seed": 5} | how)


def other_split(split, target="folio"):
    """The inputs with other letters in one split."""
    one = TEXTS[target]
    return made(**{target: replace(one, **{split: getattr(one, split)[::-1] ^ 1})})


# ---- one run


def base_by_hand(width):
    """Random weights after three steps on the base's own text."""
    model = llama(shape(width), np.random.default_rng(0))
    own = batches(TEXTS[OWN].train, np.random.default_rng([0, 1]), 2, 16)
    train(model, own, AdamW(4e-3, betas=(0.9, 0.99), weight_decay=0.1), steps=3, schedule=Schedule(3))
    freeze(model)
    return model


def numbers(model):
    return sum(p.size for p in named_params(model).values())


@pytest.mark.parametrize("kind", ["search", "final"])
@pytest.mark.parametrize(("width", "rank"), [(8, 0), (8, 3), (16, 1)])
def test_a_run_follows_its_recipe(width, rank, kind):
    run = cell(kind, width=width, rank=rank)
    model, steps = base_by_hand(width), 2 if kind == "search" else 4
    if rank:
        inject(model, LoraConfig(rank, 6.0), rng=np.random.default_rng([5, 0]))
    else:
        unfreeze(model)
    windows = batches(TEXTS["folio"].train, np.random.default_rng([5, 1]), 2, 16)
    train(model, windows, AdamW(1e-2, betas=(0.9, 0.99)), steps=steps, schedule=Schedule(steps))
    split, count = ("valid", 32) if kind == "search" else ("test", 48)
    row = module.work(run, made())
    loss = evaluate(model, eval_batches(getattr(TEXTS["folio"], split), 16, 16, limit=count))
    assert {k: v for k, v in row.items() if k in ("valid", "test", "own")} == {split: loss}
    assert row["parameters"] == sum(p.size for p in trained(model).values())


def test_a_schedule_warms_up():
    """With as many steps as a warm-up needs, by hand."""
    run = cell(plan=replace(PLAN, steps=40), rank=0)
    model = copy.deepcopy(base_by_hand(8))
    unfreeze(model)
    windows = batches(TEXTS["folio"].train, np.random.default_rng([5, 1]), 2, 16)
    train(model, windows, AdamW(1e-2, betas=(0.9, 0.99)), steps=40, schedule=Schedule(40, warmup=2))
    assert module.work(run, made())["test"] == evaluate(model, eval_batches(TEXTS["folio"].test, 16, 16, 48))


def test_a_base_is_measured_as_it_is_on_both_texts():
    row, model = module.work(Run("base", PLAN, 16), made()), base_by_hand(16)
    for key, name in (("test", "folio"), ("own", OWN)):
        assert row[key] == evaluate(model, eval_batches(TEXTS[name].test, 16, 16, limit=48))
    assert row["parameters"] == numbers(model)
    assert row["source"] == "source of folio"


def test_a_base_is_pretrained_once_and_stays_as_it_is():
    inputs = made()
    one = module.pretrained(cell(), inputs)
    before = digest(one)
    for rank in (0, 1, 3):
        module.work(cell(rank=rank), inputs)
    assert module.pretrained(cell(seed=9, rank=1), inputs) is one
    assert digest(one) == before == digest(base_by_hand(8))
    assert not trained(one)


def test_test_text_chooses_no_rate_and_validation_text_measures_nothing():
    for kind, seen, unseen in (("search", "valid", "test"), ("final", "test", "valid")):
        row, same, other = (
            module.work(cell(kind), x) for x in (made(), other_split(unseen), other_split(seen))
        )
        assert row == same
        assert row[seen] != other[seen]


def test_the_own_text_is_pretrained_on_and_the_target_is_not():
    """Another training text of the target changes no base; another one of the base's own does."""
    row, same, other = (
        module.work(Run("base", PLAN, 8, texts=(str(i),)), x)["test"]
        for i, x in enumerate((made(), other_split("train"), other_split("train", OWN)))
    )
    assert row == same != other


def test_runs_of_a_seed_see_the_same_batches(monkeypatch):
    seen = []
    module.pretrained(cell(), made())  # before batches are looked at
    module.pretrained(cell(width=16), made())
    monkeypatch.setattr(module, "learn", lambda model, given, *_: seen.append(next(given)[0]))
    for how in ({}, {"rank": 0}, {"rank": 1}, {"rate": 0.5}, {"width": 16}, {"seed": 4}):
        module.learned(cell(**how), made())
    assert all((x == seen[0]).all() for x in seen[1:5])
    assert (seen[5] != seen[0]).any()


# ---- the grid


SLOPES = {32: 0.20, 64: 0.30, 128: 0.45}  # how fast the share grows with log2 of the rank, from 0.2 at r = 1


def share(width, rank):
    """What a rank closes of the gap; at the highest one more than full fine-tuning."""
    return 0.2 + SLOPES[width] * math.log2(rank) if rank else 1.0


def best_rate(run):
    """The rate that crafted losses have their minimum at; at r = 1 it is beyond the first edge."""
    return 64e-3 if run.rank == 1 else 8e-3 if run.rank else 2e-3


def crafted(run, inputs):
    """A row in no time."""
    row = {"id": run.id, "config": asdict(run), "source": "crafted", "status": "done"}
    row |= {"parameters": 100 * run.rank or 1000 * run.width}
    if run.kind == "base":
        return row | {"test": 2.0, "own": 1.5}
    if run.kind == "search":
        return row | {"valid": abs(math.log2(run.rate / best_rate(run)))}
    return row | {"test": 2.0 - 0.5 * share(run.width, run.rank) + (0.0, 0.01, -0.02)[run.seed]}


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Crafted rows of the usual grid, with three seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # no law here is about a power cut
        patch.setattr(harness, "read_inputs", lambda base, targets: made())
        patch.setattr(module, "work", crafted)
        return module.run(WIDE, tmp_path_factory.mktemp("grid"), jobs=1)


def test_every_width_is_trained_at_every_rank_with_every_seed_at_its_own_rate(grid):
    arms = found(grid)
    assert list(arms) == [32, 64, 128]
    for width, arm in arms.items():
        assert arm.width == width
        assert arm.ranks == [*WIDE.ranks]
        assert {len(losses) for losses in arm.losses.values()} == {3}
        assert arm.rates == {0: 2e-3, 1: 64e-3} | dict.fromkeys(WIDE.ranks[1:], 8e-3)
        assert arm.parameters == {0: 1000 * width} | {r: 100 * r for r in WIDE.ranks}
    for kind, seeds in (("search", {harness.SEARCH_SEED}), ("final", {0, 1, 2}), ("base", {0})):
        assert {row["config"]["seed"] for row in grid if row["config"]["kind"] == kind} == seeds
    assert {tuple(row["config"]["texts"]) for row in grid} == {(TEXTS["folio"].digest, TEXTS[OWN].digest)}


def test_an_edge_is_left_at_most_so_often(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(module, "work", lambda run, inputs: row_with_rate(run))
    rows = module.run(replace(PLAN, rates=(1.0, 2.0), full_rates=(1.0, 2.0)), tmp_path, jobs=1)
    assert {r["config"]["rate"] for r in rows if r["config"]["kind"] == "search"} == {1, 2, 4, 8, 16}
    assert {r["config"]["rate"] for r in rows if r["config"]["kind"] == "final"} == {16}


def row_with_rate(run):
    """A row whose loss falls with the rate."""
    row = {"id": run.id, "config": asdict(run), "source": "", "status": "done", "parameters": 1}
    kinds = {"base": {"test": 2.0, "own": 1.0}, "search": {"valid": -run.rate}, "final": {"test": 1.0}}
    return row | kinds[run.kind]


# ---- reading


def rank_of(width):
    """The rank that closes 90%, by the formula of the crafted rows."""
    return 2 ** (0.7 / SLOPES[width])


def test_the_rank_needed_is_that_of_the_crafted_rows(grid):
    """Between two ranks by a line over log r; the medians have no noise, a better seed needs less."""
    for width, arm in found(grid).items():
        assert arm.full == pytest.approx(1.5)
        assert arm.gap == pytest.approx(0.5)
        middle, worse, better = arm.needed()
        assert middle == pytest.approx(rank_of(width), rel=1e-6)
        assert better < middle < worse
        assert arm.share(4) == pytest.approx(share(width, 4) - np.array([0, 0.02, -0.04]))
        assert arm.left(4) == pytest.approx(0.5 * (1 - share(width, 4)) + np.array([0, 0.01, -0.02]))
        assert arm.cost == pytest.approx(rank_of(width) * 100 / (1000 * width))


def test_a_gap_is_to_the_median_seed_of_full_fine_tuning():
    base = {"test": 2.2, "config": {"width": 8}}
    arm = Arm(base, {0: np.array([1.0, 1.2, 9.0]), 1: np.array([1.4, math.inf, 1.2]), 4: np.full(3, 1.2)})
    assert arm.share(1) == pytest.approx([0.8, -math.inf, 1.0])
    assert arm.left(1) == pytest.approx([0.2, math.inf, 0.0])
    assert arm.needed() == pytest.approx([2, 4**0.9, 1])  # a run that diverged closed nothing


@pytest.mark.parametrize(
    ("r", "words"), [(math.inf, "more than 32"), (1.0, "at most 1"), (5.123, "5.1"), (11.6, "12")]
)
def test_a_rank_beyond_the_ones_that_were_tried_is_named_as_such(r, words):
    arm = Arm({"config": {"width": 32}}, {n: np.zeros(1) for n in (0, 1, 32)})
    assert told(arm, r) == words


def test_a_run_that_diverged_has_an_infinite_loss(grid):
    def lost(row):
        c = row["config"]
        if (c["kind"], c["width"], c["rank"], c["seed"]) == ("final", 64, 32, 1):
            return {k: v for k, v in row.items() if k not in ("test", "parameters")} | {"status": "diverged"}
        return row

    arm = found([lost(row) for row in grid])[64]
    assert arm.losses[32][1] == math.inf
    assert np.isfinite(arm.losses[32][[0, 2]]).all()
    assert arm.parameters[32] == 3200


def test_tables_and_sentences_say_the_numbers(grid):
    short, every = tables(grid)
    arms = found(grid)
    assert [line[0] for line in short.rows] == ["32", "64", "128"]
    low, high = (f"{pick(arms[64].needed()):.2g}" for pick in (min, max))
    needed = f"{rank_of(64):.2g} ({rank_of(64) / 64:.1%} of the width)"
    assert short.rows[1] == (
        "64", "64,000", "1.500", "2.000", "1.500 (1.480 to 1.510)", needed, f"{low} to {high}",
        f"{rank_of(64) / 640:.0%}",
    )  # fmt: skip
    assert [line[:2] for line in every.rows] == [
        (str(w), str(r) if r else "all weights") for w in WIDE.widths for r in (0, *WIDE.ranks)
    ]
    s = share(64, 4)
    loss = 2 - 0.5 * s
    assert every.rows[7 + 3] == (
        "64", "4", "400", "0.008", f"{loss:.3f} ({loss - 0.02:.3f} to {loss + 0.01:.3f})",
        f"{loss - 1.5:+.3f} ({loss - 1.52:+.3f} to {loss - 1.49:+.3f})",
        f"{s:.0%} ({s - 0.02:.0%} to {s + 0.04:.0%})",
    )  # fmt: skip
    rank, gains, left, closed = sentences(grid)
    assert rank.endswith("; ".join(f"{w} wide: {needs(arm)}" for w, arm in arms.items()) + ".")
    assert gains.endswith("32 wide: 0.500 nats; 64 wide: 0.500 nats; 128 wide: 0.500 nats.")
    assert remains(arms, 32) == "-0.100, -0.350, -0.725"
    assert left.endswith(
        "32, 64, 128: +0.400, +0.400, +0.400 nats at r = 1, -0.100, -0.350, -0.725 at r = 32."
    )
    assert closed == "As a share, r = 1 closes 20%, 20%, 20% of the gap."


def test_rows_without_a_seed_are_refused(grid):
    for lost in (0, 1):
        some = [
            row for row in grid
            if row["config"]["kind"] != "final" or bool(row["config"]["rank"]) != bool(lost)
        ]  # fmt: skip
        with pytest.raises(ConfigError, match="no trained seed"):
            tables(some)


@pytest.mark.slow
def test_the_same_rows_give_the_same_figures(grid):
    drawn, again = pictures(grid), pictures(grid)
    assert drawn.keys() == {"needed", "gap"}
    for name, picture in drawn.items():
        assert picture.encoded("svg") == again[name].encoded("svg")
        assert "First Folio" in picture.says
        assert ("90%" if name == "needed" else "nats") in picture.encoded("svg").decode()


# ---- rows


def test_a_finished_folder_is_read_not_run(tmp_path, monkeypatch):
    plan = replace(PLAN, widths=(8,), ranks=(1,), rates=(1e-2,), seeds=1)
    monkeypatch.setattr(module, "EDGES", 0)
    first = module.run(plan, tmp_path, jobs=1)
    data = (tmp_path / "rows.jsonl").read_bytes()
    monkeypatch.setattr(module, "work", None)
    assert module.run(plan, tmp_path, jobs=1) == first
    assert (tmp_path / "rows.jsonl").read_bytes() == data
    assert harness.read_rows(tmp_path / "rows.jsonl", module.FORM) == first


@pytest.mark.parametrize(
    ("change", "words"), [({"ranks": (1, 5)}, "r is 5"), ({"widths": (8, 15)}, "15")], ids=["rank", "width"]
)
def test_what_does_not_fit_is_refused_before_any_run(change, words, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "work", None)
    with pytest.raises(ConfigError, match=words):
        module.run(replace(PLAN, **change), tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("search", "valid", "low"), ("search", "test", 1.0), ("final", "own", 1.0), ("final", "test", None),
     ("base", "parameters", -1), ("base", "status", "lost"), ("final", "more", 1)],
)  # fmt: skip
def test_a_row_that_no_run_writes_is_refused(kind, field, value, grid, tmp_path):
    row = next(row for row in grid if row["config"]["kind"] == kind) | {"versions": {}, field: value}
    (tmp_path / "rows.jsonl").write_bytes(harness.sealed(row))
    with pytest.raises(FormatError, match=f"line 1: row.*{field}"):
        harness.read_rows(tmp_path / "rows.jsonl", module.FORM)


@pytest.mark.parametrize(
    "change",
    [{"widths": ()}, {"widths": (64, 32)}, {"ranks": (1, 1)}, {"ranks": (0, 1)}, {"ranks": (1.5,)},
     {"rates": ()}, {"full_rates": ()}, {"rates": (0,)}, {"full_rates": (math.nan,)}, {"alpha": 0},
     {"pretraining": 0}, {"steps": 0}, {"search_steps": 0}, {"seeds": 1.5}, {"batch": 0}, {"test_windows": 0},
     {"valid_windows": True}],
    ids=repr,
)  # fmt: skip
def test_an_empty_or_impossible_plan_is_refused(change):
    with pytest.raises(ConfigError):
        Plan(**change)
