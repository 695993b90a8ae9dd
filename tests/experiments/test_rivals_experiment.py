"""The experiment with LoRA's rivals: equal parameters are equal, and its numbers are those of the losses."""

import copy
import functools
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from minilora.data.batching import batches, eval_batches
from minilora.data.corpora import Corpus
from minilora.errors import ConfigError, FormatError, UnsupportedError
from minilora.experiments import harness, recipe, rivals
from minilora.experiments.rivals import CONFIGS, FULL, LARGEST, LORA, METHODS, RANKED, SIZED, Plan, Run
from minilora.experiments.rivals_figures import UNMERGED, found, pictures, sentences, tables
from minilora.formats.checkpoint import History
from minilora.lora import inject, merge
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config, llama
from minilora.optim import AdamW, Schedule
from minilora.training import evaluate, train
from minilora.tree import digest, freeze, named_params, size, trained

TINY = Config(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=60)  # fmt: skip
PLAN = Plan(others=(1, 3), steps=3, seeds=2, few_seeds=1, batch=2, test_windows=3, valid_windows=2)
WIDE = Plan(seeds=3, few_seeds=2)
GRIDS = [(method, 2 if method in RANKED | SIZED else 0) for method in METHODS]
GRIDS += [(method, r) for r in (1, 4, 16) for method in LARGEST if r <= LARGEST[method]]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Short windows, and the texts and the base of this file."""
    for module in (recipe, rivals):
        monkeypatch.setattr(module, "LENGTH", 16)
    monkeypatch.setattr(harness, "read_inputs", lambda base, targets: made())


def made(config=TINY):
    """A tiny base, frozen, and a text."""
    base = llama(config, np.random.default_rng(0))
    freeze(base)
    ids = np.random.default_rng(1).integers(60, 70, 3000).astype(np.uint8)
    return harness.Inputs("base", base, {"folio": Corpus("folio", "a text", *np.split(ids, [2000, 2500]))})


def cell(kind="final", **how):
    return Run(kind, **{"plan": PLAN, "method": LORA, "rank": 2, "n": 2, "rate": 1e-2, "seed": 3} | how)


def other_split(inputs, split):
    """The inputs with other letters in one split."""
    text = inputs.texts["folio"]
    return replace(inputs, texts={"folio": replace(text, **{split: getattr(text, split)[::-1] ^ 1})})


def ready(method, n):
    return rivals.prepared(method, n, made().base, np.random.default_rng(0))


@functools.cache
def shapes():
    return {path: p.data.shape for path, p in named_params(made().base).items()}


# ---- sizes


def by_hand(method, n):
    """The count of a method's parameters on TINY, from the papers' formulas."""
    D, F, G = 8, 12, 4
    linear = [(O, I) for path, (O, I) in ((p, s) for p, s in shapes().items() if "_proj" in p)]  # noqa: E741
    r_all = n * sum(map(sum, linear))
    outputs = sum(O for O, _ in linear)  # noqa: E741
    return {
        FULL: sum(map(math.prod, shapes().values())),
        LORA: r_all,
        "DoRA": r_all + outputs,
        "LoRA, norms, embedding": r_all + 3 * D + math.prod(shapes()["model.embed_tokens.weight"]),
        "VeRA": outputs + 7 * n,
        "bottleneck, Houlsby": 2 * (2 * n * D + n + D),
        "bottleneck, Pfeiffer": 2 * n * D + n + D,
        "prefix": 2 * n * G,
        "prompt": n * D,
        "(IA)³": 2 * G + F,
        "norms": 3 * D,
        "biases": outputs,
    }[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_as_many_parameters_as_its_paper_says(method):
    for n in (1, 3) if method in RANKED | SIZED else (0,):
        assert size(trained(ready(method, n))) == by_hand(method, n)


@pytest.mark.parametrize("method", SIZED)
@pytest.mark.parametrize("rank", [1, 4])
def test_no_other_size_is_nearer_to_loras(method, rank):
    base = made(replace(TINY, max_position_embeddings=99)).base
    n, goal = rivals.nearest_size(method, rank, base), by_hand(LORA, rank)
    off = {k: abs(by_hand(method, k) - goal) for k in range(1, 100)}
    assert off[n] == min(off.values())


@pytest.mark.parametrize("method", METHODS)
def test_only_rows_before_the_text_change_a_logit_before_training(method):
    base, ids = made().base, np.arange(60, 70)[None]
    model = rivals.prepared(method, 2, base, np.random.default_rng(0))
    same = np.array_equal(model(ids)[0], base(ids)[0])
    assert same == (method not in ("prefix", "prompt"))


@pytest.mark.parametrize("method", METHODS)
def test_no_run_writes_into_the_base(method):
    inputs, before = made(), digest(made().base)
    row = rivals.work(cell(method=method, n=2), inputs)
    assert digest(inputs.base) == before
    assert row["test"] != rivals.work(Run("base", PLAN), inputs)["test"]


def test_norms_and_biases_are_those_of_every_layer():
    assert [*trained(ready("norms", 0))] == [path for path in shapes() if "norm" in path]
    linear = [path for path in shapes() if "_proj" in path]
    assert [*trained(ready("biases", 0))] == [path.replace(".weight", ".bias") for path in linear]


@pytest.mark.parametrize("method", CONFIGS)
def test_what_cannot_be_merged_is_shown_so(method):
    model = ready(method, 2)
    if method in UNMERGED:
        with pytest.raises(UnsupportedError):
            merge(model)
    else:
        merge(model)


# ---- one run


def test_test_text_chooses_no_rate_and_validation_text_measures_nothing():
    inputs = made()
    for kind, seen, unseen in (("search", "valid", "test"), ("final", "test", "valid")):
        row, same, other = (
            rivals.work(cell(kind), x)
            for x in (inputs, other_split(inputs, unseen), other_split(inputs, seen))
        )
        assert row == same
        assert unseen not in row
        assert row[seen] != other[seen]


def test_a_run_follows_its_recipe():
    """By hand, with as many steps as a warm-up needs."""
    run, inputs = cell(plan=replace(PLAN, steps=40)), made()
    text, model = inputs.texts["folio"], copy.deepcopy(inputs.base)
    inject(model, LoraConfig(2, 4), rng=np.random.default_rng([3, 0]))
    train(
        model, batches(text.train, np.random.default_rng([3, 1]), 2, 16), AdamW(1e-2, betas=(0.9, 0.99)),
        steps=40, schedule=Schedule(40, warmup=2),
    )  # fmt: skip
    assert rivals.work(run, inputs)["test"] == evaluate(model, eval_batches(text.test, 16, 16, limit=48))


def test_all_methods_see_the_same_batches_of_a_seed(monkeypatch):
    seen = []

    def train(model, given, *_, **how):
        seen.append(next(given)[0])
        return History()

    monkeypatch.setattr(recipe, "train", train)
    for method in METHODS:
        rivals.learned(cell(method=method), made())
    rivals.learned(cell(seed=4), made())
    assert all((x == seen[0]).all() for x in seen[:-1])
    assert (seen[-1] != seen[0]).any()


# ---- the grid


def optimum(method, rank):
    """The rate that crafted losses have their minimum at: in the middle of the start, or beyond it."""
    return 0.07 if (method, rank) == (LORA, 1) else sorted(rivals.RATES.get(method, rivals.USUAL))[1]


def height(method, rank):
    """The crafted loss at the best rate: LoRA's falls with its rank, a prompt's rises."""
    falls = {16: 0.1, 4: 0.15, 2: 0.3, 1: 0.5, 0: 0.7}[rank]
    return {FULL: 1.4, "prompt": 2.3 - falls}.get(method, 1.5 + falls + 0.01 * METHODS.index(method))


def crafted(run, inputs):
    """A row in no time, its loss a parabola over log rate with that minimum; on test, seeds differ."""
    row = {"id": run.id, "config": asdict(run), "source": "crafted", "status": "done", "parameters": 0}
    if run.kind == "base":
        return row | {"test": 2.5}
    row["parameters"] = 1000 * run.n or {FULL: 90000, "norms": 100, "biases": 300}.get(run.method, 200)
    if run.method in SIZED:
        row["parameters"] = 1000 * run.rank + 1
    if run.method in RANKED and run.method != LORA:
        row["parameters"] += 1000
    loss = height(run.method, run.rank) + 0.01 * math.log2(run.rate / optimum(run.method, run.rank)) ** 2
    return row | ({"valid": loss} if run.kind == "search" else {"test": loss + (0.1, 0.5, 0.2)[run.seed]})


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Crafted rows of the usual grid, with three seeds, or two where it takes few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "read_inputs", lambda base, targets: made())
        size = {method: (lambda r: r) if method in RANKED else (lambda r: r and 7) for method in METHODS}
        patch.setattr(rivals, "nearest_size", lambda method, rank, base: size[method](rank))
        patch.setattr(rivals, "work", crafted)
        return rivals.run(WIDE, tmp_path_factory.mktemp("grid"), jobs=1)


def test_every_method_is_searched_and_trained_at_its_best_rate(grid):
    f = found(grid)
    assert f.arms.keys() == set(GRIDS)
    assert len(GRIDS) == 12 + 6 + 5 + 4
    for (method, rank), arm in f.arms.items():
        nearest = min(arm.curve, key=lambda rate: abs(math.log(rate / optimum(method, rank))))
        assert arm.rate == nearest
        assert min(arm.curve) < arm.rate < max(arm.curve)
        assert set(rivals.RATES.get(method, rivals.USUAL)) <= set(arm.curve)
        assert arm.tests.keys() == {arm.rate}
        assert len(arm.best) == (2 if rank in WIDE.others else 3)
    for kind, seeds in (("search", {harness.SEARCH_SEED}), ("final", {0, 1, 2})):
        assert {row["config"]["seed"] for row in grid if row["config"]["kind"] == kind} == seeds


def test_an_edge_is_left_at_most_so_often(tmp_path, monkeypatch):
    """Losses that fall with the rate: the search goes on to larger ones, then gives up."""
    monkeypatch.setattr(rivals, "work", lambda run, inputs: crafted(run, inputs) | (
        {"valid": -run.rate} if run.kind == "search" else {}))  # fmt: skip
    arms = found(rivals.run(replace(PLAN, methods=(FULL, LORA), others=()), tmp_path, jobs=1)).arms
    for method in (FULL, LORA):
        arm, (*_, last) = arms[method, 2 * (method == LORA)], rivals.RATES.get(method, rivals.USUAL)
        assert arm.rate == max(arm.curve) == pytest.approx(last * 2**rivals.EDGES, rel=0.02)  # two digits


# ---- reading


def test_numbers_of_a_method_are_those_of_the_losses(grid):
    f = found(grid)
    losses = {}
    for row in grid:
        if row["config"]["kind"] == "final":
            losses.setdefault((row["config"]["method"], row["config"]["rank"]), []).append(row["test"])
    medians = {key: float(np.median(some)) for key, some in losses.items()}
    for method in METHODS:
        key = f.key(method)
        assert key == (method, 2 if method in RANKED | SIZED else 0)
        assert f.loss(key) == medians[key]
        change = np.subtract(losses[key], losses[LORA, 2])
        assert f.change(method) == pytest.approx(change)
        assert f.closed(key) == pytest.approx((2.5 - medians[key]) / (2.5 - medians[FULL, 0]))
    assert f.change("DoRA", 4) == pytest.approx(np.subtract(losses["DoRA", 4], losses[LORA, 4]))
    assert f.ordered() == sorted(METHODS, key=lambda m: medians[f.key(m)])
    assert set(f.alike()) == {*SIZED}  # 2,001 parameters beside 2,000; DoRA has 3,000
    assert f.alike() == [m for m in f.ordered() if m in SIZED]
    assert f.curve(LORA) == [(LORA, r) for r in (1, 2, 4, 16)]
    assert f.several() == [*LARGEST]
    assert f.rises("prompt") == pytest.approx(medians["prompt", 4] - medians["prompt", 1])
    assert f.rises("prompt") > 0 > f.rises("prefix")


def test_loras_loss_with_as_many_parameters_lies_between_its_ranks(grid):
    """On the line over the log of the count; nowhere beyond its smallest and its largest rank."""
    f = found(grid)
    a, b = (f.loss((LORA, r)) for r in (2, 4))
    part = math.log(3000 / 2000) / math.log(2)
    assert f.above(("DoRA", 2)) == pytest.approx(f.loss(("DoRA", 2)) - (a + part * (b - a)))
    assert all(f.above((LORA, r)) == pytest.approx(0) for r in (1, 2, 4, 16))
    assert math.isnan(f.above(("norms", 0)))
    counts = {key: (n, 18000 if key == ("DoRA", 16) else count) for key, (n, count) in f.sizes.items()}
    assert math.isnan(replace(f, sizes=counts).above(("DoRA", 16)))
    assert f.above(("DoRA", 16)) == pytest.approx(f.loss(("DoRA", 16)) - f.loss((LORA, 16)))  # 17,000: near


def test_tables_and_sentences_say_the_numbers(grid):
    f = found(grid)
    whole, curves = tables(grid)
    assert [line[0] for line in whole.rows] == f.ordered()
    (line,) = (line for line in whole.rows if line[0] == "DoRA")
    low, middle, high = (pick(f.arms["DoRA", 2].best) for pick in (min, np.median, max))
    change = np.median(f.change("DoRA"))
    assert line == (
        "DoRA", "2", "3,000", "0.008", f"{middle:.3f} ({low:.3f} to {high:.3f})",
        f"{change:+.3f} ({change:+.3f} to {change:+.3f})", f"{f.above(('DoRA', 2)):+.3f}",
        f"{f.closed(f.key('DoRA')):.0%}",
    )  # fmt: skip
    (norms,) = (line for line in whole.rows if line[0] == "norms")
    assert (norms[1], norms[6]) == ("", "")
    assert [line[:3] for line in curves.rows if line[0] == "prompt"] == [
        ("prompt", "7", f"{1000 * r + 1:,}") for r in (1, 2, 4)
    ]
    lora, alike, single, falls, rises, beside, dora, vera = sentences(grid)
    assert f" closes {f.closed(f.key(LORA)):.0%} of the gap" in lora
    assert lora.endswith("with 2.2% of its parameters.")
    assert alike.endswith("; ".join(f"{m} {np.median(f.change(m)):+.3f}" for m in f.alike()) + ".")
    assert f"Against LoRA with as many parameters: DoRA {f.above(('DoRA', 2)):+.3f}; " in beside
    assert dora.endswith("; ".join(f"{r} {np.median(f.change('DoRA', r)):+.3f}" for r in (1, 2, 4, 16)) + ".")
    assert f"norms {f.closed(f.key('norms')):.0%} with 100 parameters" in single
    assert f"prefix {f.loss(('prefix', 16)) - f.loss(('prefix', 1)):+.3f}" in falls
    assert rises == f"Where more parameters raise the loss: prompt {f.rises('prompt'):+.3f}."
    less = f.loss(("VeRA", 1)) - f.loss((LORA, 16))
    assert vera == f"VeRA with 1,001 parameters against LoRA with 16,000: {less:+.3f}."


def test_a_seed_that_diverged_has_an_infinite_loss(grid):
    def lost(row):
        c = row["config"]
        keep = {k: v for k, v in row.items() if k != "test"}
        gone = (c["kind"], c["method"], c["seed"]) == ("final", "norms", 1)
        return keep | {"status": "diverged"} if gone else row

    f = found([lost(row) for row in grid])
    assert f.arms["norms", 0].best[1] == math.inf
    assert np.isfinite(f.arms["norms", 0].best[[0, 2]]).all()


@pytest.mark.parametrize("kind", ["search", "final"])
def test_a_method_without_a_search_or_a_seed_is_refused(kind, grid):
    some = [row for row in grid if (row["config"]["kind"], row["config"]["method"]) != (kind, "norms")]
    with pytest.raises(ConfigError, match="norms has no finished search or no seed"):
        tables(some)


@pytest.mark.slow
def test_the_same_rows_give_the_same_figures(grid):
    drawn, again = pictures(grid), pictures(grid)
    assert drawn.keys() == {"rivals", "parameters"}
    for name, picture in drawn.items():
        assert picture.encoded("svg") == again[name].encoded("svg")
        assert "nats" in picture.encoded("svg").decode()
        assert all(method in picture.encoded("svg").decode() for method in METHODS)


# ---- rows


def test_a_finished_folder_is_read_not_run(tmp_path, monkeypatch):
    plan = replace(PLAN, methods=(FULL, LORA, "prefix"), others=(1,), seeds=1)
    monkeypatch.setattr(rivals, "EDGES", 0)
    first = rivals.run(plan, tmp_path, jobs=1)
    data = (tmp_path / "rows.jsonl").read_bytes()
    monkeypatch.setattr(rivals, "work", None)
    assert rivals.run(plan, tmp_path, jobs=1) == first
    assert (tmp_path / "rows.jsonl").read_bytes() == data
    assert harness.read_rows(tmp_path / "rows.jsonl", rivals.FORM) == first
    assert len(sentences(first)) == 5  # neither DoRA nor VeRA


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"others": (5,), "methods": (FULL, LORA)}, "r is 5"),
        ({"rank": 4}, "so many parameters are 58 rows; a window leaves 44"),
    ],
    ids=str,
)
def test_a_rank_or_a_prompt_that_does_not_fit_is_refused_before_any_run(change, match, tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "work", None)
    with pytest.raises(ConfigError, match=match):
        rivals.run(replace(PLAN, **change), tmp_path / "out", jobs=1)
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
        harness.read_rows(tmp_path / "rows.jsonl", rivals.FORM)


@pytest.mark.parametrize(
    "change",
    [{"methods": (FULL, LORA, "dora")}, {"methods": (FULL, "DoRA")}, {"methods": (LORA,)}, {"rank": 0},
     {"others": (0,)}, {"others": (1, 1)}, {"others": (2, 4)}, {"steps": 0}, {"seeds": 1.5},
     {"few_seeds": 0}, {"batch": 0}, {"test_windows": 0}, {"valid_windows": True}],
    ids=repr,
)  # fmt: skip
def test_an_empty_or_impossible_plan_is_refused(change):
    with pytest.raises(ConfigError):
        Plan(**change)
