"""The experiment with forgetting: what is measured is what it says, and two fronts are read at one loss."""

import copy
import math
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
from helpers import gamma

from minilora.data.batching import batches, eval_batches
from minilora.data.corpora import Corpus
from minilora.errors import ConfigError, FormatError
from minilora.experiments import forgetting, harness, recipe
from minilora.experiments.forgetting import Plan, Run, changes, intruding, turned
from minilora.experiments.forgetting_figures import found, noise, pictures, sentences, tables, up_to, where
from minilora.lora import inject, merge
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config, llama
from minilora.optim import AdamW, Schedule
from minilora.spectra import effective_rank, energy, intruder_threshold, intruders, spectrum
from minilora.training import evaluate, train
from minilora.tree import digest, freeze, named_params, unfreeze

TINY = Config(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=16)  # fmt: skip
PLAN = Plan(
    targets=("folio",), ranks=(1, 2), rates=(1e-2, 2e-2), full_rates=(1e-3,), steps=3, seeds=2, batch=2,
    test_windows=3, valid_windows=2,
)  # fmt: skip
WIDE = Plan(seeds=3)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Short windows, and the texts and the base of this file."""
    monkeypatch.setattr(recipe, "LENGTH", 16)
    monkeypatch.setattr(harness, "read_inputs", lambda base, texts: made(texts))


def made(texts=("folio", "shakespeare")):
    """A tiny base, frozen, and texts that are not alike."""
    base = llama(TINY, np.random.default_rng(0))
    freeze(base)
    corpora = {}
    for i, name in enumerate(texts):
        ids = np.random.default_rng(i).integers(60 + 10 * i, 70 + 10 * i, 3000).astype(np.uint8)
        corpora[name] = Corpus(name, f"text {i}", *np.split(ids, [2000, 2500]))
    return harness.Inputs("base", base, corpora)


def cell(kind="final", **how):
    return Run(kind, **{"plan": PLAN, "target": "folio", "rank": 2, "rate": 1e-2, "seed": 3} | how)


def altered(inputs, text, split):
    """The inputs with other letters in one split of one text."""
    other = replace(inputs.texts[text], **{split: getattr(inputs.texts[text], split)[::-1] ^ 1})
    return replace(inputs, texts=inputs.texts | {text: other})


# ---- one run


SPLITS = {"base": ("valid", "test"), "search": ("valid",), "front": ("test",), "final": ("test",)}


@pytest.mark.parametrize("kind", SPLITS)
def test_a_run_measures_its_splits_of_both_texts_and_trains_on_the_target_alone(kind):
    inputs = made()
    run = cell(kind)
    row = forgetting.work(run, inputs)
    names = {"target": SPLITS[kind], "own": [f"own_{split}" for split in SPLITS[kind]]}
    assert {key for key in row if "valid" in key or "test" in key} == {*names["target"], *names["own"]}
    for text, split in product(("folio", "shakespeare"), ("train", "valid", "test")):
        other = forgetting.work(run, altered(inputs, text, split))
        differ = {key for key in row if row[key] != other[key]}
        name = split if text == "folio" else f"own_{split}"
        if split == "train":
            assert bool(differ) == (text == "folio" and kind != "base")
        else:
            assert differ == ({name} if split in SPLITS[kind] else set())


def test_the_base_stays_as_it_was_and_all_weights_are_trained_only_with_rank_0():
    inputs = made()
    before = digest(inputs.base)
    base, full, lora = (
        forgetting.work(c, inputs) for c in (cell("base", rank=0, rate=0.0), cell(rank=0), cell())
    )
    assert digest(inputs.base) == before
    sizes = {path: p.data.shape for path, p in named_params(inputs.base).items()}
    assert base["parameters"] == 0
    assert full["parameters"] == sum(map(math.prod, sizes.values()))
    assert lora["parameters"] == sum(2 * sum(shape) for path, shape in sizes.items() if "_proj" in path)
    assert len({row["test"] for row in (base, full, lora)}) == 3


def tuned(run, inputs):
    """The model of a run by hand."""
    model, plan = copy.deepcopy(inputs.base), run.plan
    if run.rank:
        inject(
            model,
            LoraConfig(run.rank, alpha=2 * run.rank),
            rng=np.random.default_rng([run.seed, 0]),
        )
    else:
        unfreeze(model)
    train(
        model, batches(inputs.texts["folio"].train, np.random.default_rng([run.seed, 1]), plan.batch, 16),
        AdamW(run.rate, betas=(0.9, 0.99)), steps=plan.steps, schedule=Schedule(plan.steps, warmup=2),
    )  # fmt: skip
    return model


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_run_follows_its_recipe(rank):
    """By hand, with as many steps as a warm-up needs."""
    inputs, run = made(), cell(plan=replace(PLAN, steps=40), rank=rank)
    model, row = tuned(run, inputs), forgetting.work(run, inputs)
    for key, text in (("test", "folio"), ("own_test", "shakespeare")):
        assert row[key] == evaluate(model, eval_batches(inputs.texts[text].test, 16, 16, limit=48))
    values = spectrum(model) if rank else None
    assert len(row["maps"]) == 7
    if rank:
        merge(model)
    for path, kept in row["maps"].items():
        W = named_params(inputs.base)[f"{path}.weight"].data.astype(np.float64)
        if rank:  # ΔW is read back from float32 weights: it is off by half a unit of them
            s, off = values[path], np.finfo(np.float32).eps * np.linalg.norm(W)
            assert kept["effective_rank"] < rank + 100 * off / s.sum()
        else:
            s, off = np.linalg.svd(named_params(model)[f"{path}.weight"].data - W, compute_uv=False), 1e-12
        assert kept["shape"] == list(W.shape)
        assert kept["size"] == pytest.approx(np.linalg.norm(s) / np.linalg.norm(W), rel=0, abs=2 * off)
        share = energy(s)[[k - 1 for k in (1, 2, 4, 8) if k <= len(s)]]
        assert kept["energy"][: len(share)] == pytest.approx(share, rel=0, abs=1e-4)
        assert len(kept["energy"]) == min(W.shape).bit_length()


def test_runs_of_a_seed_see_the_same_batches(monkeypatch):
    seen = []
    monkeypatch.setattr(forgetting, "learn", lambda model, given, *_: seen.append(next(given)[0]))
    for how in ({}, {"rank": 1}, {"rank": 0}, {"rate": 0.5}, {"kind": "front"}, {"seed": 4}):
        forgetting.learned(cell(**how), made())
    assert all((x == seen[0]).all() for x in seen[1:5])
    assert (seen[5] != seen[0]).any()


# ---- ΔW


def test_nothing_changed_is_no_intruder_and_has_no_rank():
    base = made().base
    for kept in changes(base, base, np.random.default_rng(0)).values():
        assert (kept["size"], kept["effective_rank"], kept["intruders"], kept["random"]) == (0, 0, 0, 0)


def test_a_strong_new_direction_is_an_intruder_and_one_along_the_first_of_w_is_none():
    """By hand: one singular vector of W + ΔW is at 45 degrees to two of W, or it is W's own."""
    D, rng = 200, np.random.default_rng(0)
    W = np.diag(1 + np.arange(D)[::-1] / D)
    v = np.ones((D, 1)) / math.sqrt(D)  # no nearer than 0.07 to any of W's, the identity
    assert intruder_threshold(D, D) > 1 / math.sqrt(D)
    w = rng.standard_normal((1, D))
    assert intruding(W, 100 * v @ w / np.linalg.norm(w)) == 1
    own = np.zeros((D, D))
    own[0, 0] = 100
    assert intruding(W, own) == 0
    assert intruding(W, 0 * W) == 0


def test_intruders_are_counted_below_the_threshold_of_outputs_among_the_first_ten():
    others = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        W, delta = rng.standard_normal((40, 20)), 2 * rng.standard_normal((40, 20))
        cosines = intruders(W, delta, 20)
        below = cosines < intruder_threshold(40, 20)
        assert intruding(W, delta) == below[:10].sum()
        of_all, of_inputs = below.sum(), (cosines[:10] < intruder_threshold(20)).sum()
        others.append((of_all != below[:10].sum(), of_inputs != below[:10].sum()))
    assert np.array(others).any(0).all()  # both ways to be wrong would have been seen


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_a_turned_change_has_the_same_singular_values_in_other_directions(shape):
    s = np.array([3.0, 2.0, 0.5, 0.0])
    one, other = (turned(s, shape, np.random.default_rng(seed)) for seed in (0, 1))
    for X in (one, other):
        assert X.shape == shape
        values = np.linalg.svd(X, compute_uv=False)
        assert values == pytest.approx(np.append(s, [0.0] * (min(shape) - 4)), abs=gamma(100) * 3)
    assert np.abs(one - other).max() > 0.1


def test_the_random_change_is_drawn_from_the_given_generator():
    inputs = made()
    tuned = copy.deepcopy(inputs.base)
    unfreeze(tuned)
    rng = np.random.default_rng(5)
    for p in named_params(tuned).values():
        p.data = (p.data + 0.5 * rng.standard_normal(p.data.shape)).astype(np.float32)
    maps = [changes(tuned, inputs.base, np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3)]
    assert maps[0] == maps[1]
    counts = {tuple(kept["random"] for kept in each.values()) for each in maps}
    assert len(counts) > 1
    assert len({tuple(kept["intruders"] for kept in each.values()) for each in maps}) == 1


# ---- the grid

OPTIMA = {0: 1e-3, 1: 1.6e-2, 4: 8e-3, 16: 8e-3, 64: 4e-3}
BASE = (2.5, 1.6)  # the base's losses
SLOPES = {0: 0.5, 1: 0.1, 4: 0.3, 16: 0.6, 64: 0.4}  # nats forgotten for each nat learned
MAPS = {
    "a": ([96, 96], 1),
    "b": ([256, 96], 3),
    "c": ([96, 256], 0),
}  # path -> shape, and intruders with r = 1


def lowest(target, rank):
    """The crafted loss at the best rate; on the folio all weights are in the middle, on code first."""
    return {"folio": 1.5, "code": 1.8}[target] + {0: 0.03, 1: 0.4, 4: 0.1, 16: 0.05, 64: 0.0}[rank] + (
        0.04 if target == "code" and rank else 0.0)  # fmt: skip


def crafted(run, inputs):
    """A row in no time: a parabola over log rate, and forgetting in proportion to learning; seeds differ."""
    row = {"id": run.id, "config": asdict(run), "source": "crafted", "status": "done", "parameters": 1}
    if run.kind == "base":
        return row | dict(zip(("valid", "own_valid"), BASE, strict=True)) | dict(
            zip(("test", "own_test"), BASE, strict=True))  # fmt: skip
    loss = lowest(run.target, run.rank) + 0.02 * math.log2(run.rate / OPTIMA[run.rank]) ** 2
    if run.kind == "search":
        return row | {"valid": loss, "own_valid": BASE[1] + run.rate}
    loss += (0.01, 0.05, 0.02)[run.seed]
    row |= {"test": loss, "own_test": BASE[1] + SLOPES[run.rank] * (BASE[0] - loss)}
    if run.kind == "final":
        row["maps"] = {path: crafted_map(run, *MAPS[path]) for path in MAPS}
    return row


def crafted_map(run, shape, most):
    """A map with fewer intruders the larger the rank is."""
    share = [round(min(1.0, k / (run.rank or 96)), 4) for k in (1, 2, 4, 8, 16, 32, 64)]
    rank = run.rank * 0.75 or 48.0 + 10 * run.seed
    n = most + run.seed if run.rank == 1 else run.seed * (run.rank == 4)
    return {
        "shape": shape,
        "size": 0.1,
        "effective_rank": rank,
        "energy": share,
        "intruders": n,
        "random": most,
    }


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Crafted rows of the usual grid, with three seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "read_inputs", lambda base, texts: made(texts))
        patch.setattr(forgetting, "prepared", lambda *_: None)
        patch.setattr(forgetting, "work", crafted)
        return forgetting.run(WIDE, tmp_path_factory.mktemp("grid"), jobs=1)


def test_each_seed_is_trained_at_the_best_rate_and_at_all_lower_ones(grid):
    f = found(grid)
    assert f.arms.keys() == set(product(("folio", "code"), (0, 1, 4, 16, 64)))
    for (_, rank), arm in f.arms.items():
        starts = WIDE.rates if rank else WIDE.full_rates
        assert arm.search.keys() == set(starts)
        assert arm.rate == OPTIMA[rank]
        assert arm.tests.keys() == {rate for rate in starts if rate <= OPTIMA[rank]}
        assert all(len(seeds) == 3 for seeds in arm.tests.values())
    seeds, kinds = {}, {}
    for row in grid:
        c = row["config"]
        seeds.setdefault(c["kind"], set()).add(c["seed"])
        if c["kind"] in ("front", "final"):
            kinds.setdefault(c["kind"], set()).add(c["rate"] == OPTIMA[c["rank"]])
        assert ("maps" in row) == (c["kind"] == "final")
        assert c["texts"] == [text.digest for text in made((*WIDE.targets, WIDE.own)).texts.values()]
    assert seeds == {"base": {0}, "search": {harness.SEARCH_SEED}, "front": {0, 1, 2}, "final": {0, 1, 2}}
    assert kinds == {"front": {False}, "final": {True}}


def test_rates_beyond_an_edge_are_part_of_the_front(tmp_path, monkeypatch):
    """Losses that fall with the rate: all starts and extensions are lower than the best, and are trained."""
    monkeypatch.setattr(forgetting, "prepared", lambda *_: None)
    monkeypatch.setitem(OPTIMA, 0, 1.0)
    monkeypatch.setattr(forgetting, "work", crafted)
    arm = found(forgetting.run(replace(WIDE, targets=("folio",), ranks=(4,)), tmp_path, jobs=1)).arms[
        "folio", 0
    ]
    assert sorted(arm.search) == [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
    assert arm.tests.keys() == arm.search.keys()
    assert arm.rate == 3.2e-2


# ---- reading


def test_ends_are_test_losses_at_the_best_rate_less_the_bases(grid):
    f = found(grid)
    for target, rank in f.arms:
        loss = lowest(target, rank) + np.array([0.01, 0.05, 0.02])
        assert f.ends(target, rank)[:, 0] == pytest.approx(loss - BASE[0])
        assert f.ends(target, rank)[:, 1] == pytest.approx(SLOPES[rank] * (BASE[0] - loss))


def test_two_fronts_are_read_at_the_loss_of_the_lesser_learner(grid):
    """Each forgets in proportion to what it has learned, so both are read exactly."""
    f = found(grid)
    for target, rank in product(WIDE.targets, WIDE.ranks):
        most = max(lowest(target, r) for r in (rank, 0)) + np.array([0.01, 0.05, 0.02])
        expected = np.outer(BASE[0] - most, [SLOPES[rank], SLOPES[0]])
        assert f.equal(target, rank) == pytest.approx(expected)
        row = WIDE.ranks.index(rank)
        assert f.less(target, "equal")[row] == pytest.approx(expected[:, 0] - expected[:, 1])
        for i, key in enumerate(("learned", "forgotten")):
            over = f.ends(target, rank) - f.ends(target, 0)
            assert f.less(target, key)[row] == pytest.approx(over[:, i])


def test_a_front_leaves_out_what_learns_no_more_than_a_lower_rate(grid):
    """By hand: of four rates the third learns less than the second, and the last one diverged."""
    f = found(grid)
    tests = {
        1e-4: (2.4, 1.7),
        2e-4: (2.0, 1.9),
        4e-4: (2.2, 5.0),
        8e-4: (1.8, 2.2),
        1.6e-3: (math.inf, math.inf),
    }
    f.arms["folio", 0].tests = {rate: [losses] * 3 for rate, losses in tests.items()}
    front = f.front("folio", 0, 1)
    assert front == pytest.approx(np.array([(0, 0), (-0.1, 0.1), (-0.5, 0.3), (-0.7, 0.6)]))
    f.arms["folio", 0].search = {8e-4: (1.0, 1.0)}
    level = lowest("folio", 1) + 0.05  # of r = 1 with seed 1, half way between the last two points
    assert level == pytest.approx(1.95)
    assert f.equal("folio", 1)[1, 1] == pytest.approx(0.3 + 0.3 * (2.0 - level) / 0.2)


def test_up_to_which_rank_something_is_so_for_all_seeds_and_all_lower_ranks():
    for so, n in (([1, 1, 1], 3), ([1, 0, 1], 1), ([0, 1, 1], 0), ([1, 1, 0], 2)):
        assert up_to(np.array([[True, bool(x)] for x in so])) == n


def test_it_is_said_up_to_which_rank(grid):
    f = found(grid)
    assert where(f, "learned") == "First Folio up to r = 16, Python code at every rank"
    less_so = np.sign(f.less("folio", "forgotten")).tolist()
    assert less_so == [[-1] * 3, [-1] * 3, [1] * 3, [-1] * 3]
    assert where(f, "forgotten") == "First Folio up to r = 4, Python code up to r = 4"
    assert where(f, "equal") == "First Folio up to r = 4, Python code up to r = 4"
    f.arms["folio", 0].tests[1e-3] = [(0.0, 0.0)] * 3
    assert where(f, "forgotten").startswith("First Folio at no rank, ")


def test_intruders_are_a_share_of_the_first_vectors_of_all_maps(grid):
    f = found(grid)
    assert f.intruders("code", 1) == pytest.approx(np.array([4, 7, 10]) / 30)
    assert f.intruders("code", 4) == pytest.approx(np.array([0, 3, 6]) / 30)
    assert f.intruders("folio", 64, "random") == pytest.approx(np.array([4, 4, 4]) / 30)


def test_the_effective_rank_is_beside_that_of_noise_of_its_rank(grid):
    f = found(grid)
    null = sorted(effective_rank(noise(*shape)) for shape, _ in MAPS.values())
    assert f.of_noise("folio", 0) == pytest.approx(np.array([48, 58, 68]) / null[1])
    assert len(noise(96, 256)) == 96
    assert len(noise(96, 256, 4)) == 4
    null = sorted(effective_rank(noise(*shape, 64)) for shape, _ in MAPS.values())
    assert f.of_noise("folio", 64) == pytest.approx(np.full(3, 48 / null[1]))


def test_tables_and_sentences_say_the_numbers(grid):
    f = found(grid)
    losses, maps = tables(grid)
    assert [row[:3] for row in losses.rows[:2]] == [
        ("First Folio", "all weights", "0.001"), ("First Folio", "r = 1", "0.016")
    ]  # fmt: skip
    learned = lowest("folio", 1) + np.array([0.01, 0.05, 0.02])
    said = f"{learned[2]:.3f} ({learned[0]:.3f} to {learned[1]:.3f})"
    gone = SLOPES[1] * (BASE[0] - learned)
    own = f"{gone[2]:+.3f} ({gone[1]:+.3f} to {gone[0]:+.3f})"
    full = f"{5 * gone[2]:+.3f} ({5 * gone[1]:+.3f} to {5 * gone[0]:+.3f})"
    assert losses.rows[1][3:] == (said, own, own, full)
    assert maps.rows[1][2:4] == ("23% (13% to 33%)", "13% (13% to 13%)")
    assert maps.rows[0][4] == "58.0 (48.0 to 68.0)"
    assert maps.rows[0][6] == "0.10 (0.10 to 0.10)"
    assert len(losses.rows) == len(maps.rows) == 2 * 5
    for i, key in enumerate(("learned", "forgotten", "equal")):
        medians = zip(WIDE.ranks, np.median(f.less("code", key), 1), strict=True)
        said = ", ".join(f"{x:+.3f} at r = {r}" for r, x in medians)
        assert sentences(grid)[i].endswith(f"Python code {said}.")
        assert where(f, key) in sentences(grid)[i]
    assert "First Folio 23% with r = 1, 10% with r = 4" in sentences(grid)[3]
    over = np.median(f.of_noise("code", 0))
    assert sentences(grid)[4].endswith(f"Python code 58, {over:.2f} of noise's.")


def lost(row):
    keep = {k: v for k, v in row.items() if k not in ("valid", "test", "own_valid", "own_test", "maps")}
    return keep | {"status": "diverged", "error": "not a number"}


def test_a_run_that_diverged_has_infinite_losses_and_no_maps(grid):
    def changed(row):
        c = row["config"]
        return lost(row) if c["kind"] == "final" and (c["rank"], c["seed"]) == (4, 1) else row

    f = found([changed(row) for row in grid])
    ends = f.ends("folio", 4)
    assert np.isinf(ends[1]).all()
    assert np.isfinite(ends[[0, 2]]).all()
    assert len(f.intruders("folio", 4)) == 2
    assert f.less("folio", "forgotten")[1, 1] == math.inf
    assert not f.less("folio", "equal")[1, 1] < 0


def test_a_rate_at_which_a_search_diverged_is_never_the_best(grid):
    def changed(row):
        c = row["config"]
        return lost(row) if c["kind"] == "search" and c["rate"] == 3.2e-2 else row

    arms = found([changed(row) for row in grid]).arms
    assert all(3.2e-2 not in arm.search for arm in arms.values())


def test_rows_without_a_seed_are_refused(grid):
    for rows in ([row for row in grid if row["config"]["kind"] == "search"], []):
        with pytest.raises(ConfigError, match="measured with no seed"):
            tables(rows)


@pytest.mark.slow
def test_the_same_rows_give_the_same_figures(grid):
    one, again = pictures(grid), pictures(grid)
    assert one.keys() == {"fronts", "less", "intruders", "spectrum"}
    for name, picture in one.items():
        assert picture.encoded("svg") == again[name].encoded("svg")
        svg = picture.encoded("svg").decode()
        assert "First Folio" in svg
        assert "?" in svg
        assert "First Folio" in picture.says


# ---- rows


def test_a_finished_folder_is_read_not_run(tmp_path, monkeypatch):
    plan = replace(PLAN, seeds=1, ranks=(1,), rates=(1e-2,))
    monkeypatch.setattr(forgetting, "EDGES", 0)
    first = forgetting.run(plan, tmp_path, jobs=1)
    data = (tmp_path / "rows.jsonl").read_bytes()
    monkeypatch.setattr(forgetting, "work", None)
    assert forgetting.run(plan, tmp_path, jobs=1) == first
    assert (tmp_path / "rows.jsonl").read_bytes() == data
    assert harness.read_rows(tmp_path / "rows.jsonl", forgetting.FORM) == first


def test_a_rank_that_does_not_fit_is_refused_before_any_run(tmp_path, monkeypatch):
    monkeypatch.setattr(forgetting, "work", None)
    with pytest.raises(ConfigError, match="r is 5"):
        forgetting.run(replace(PLAN, ranks=(1, 5)), tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("search", "valid", "low"), ("search", "test", 1.0), ("front", "own_test", None), ("front", "maps", {}),
     ("base", "parameters", -1), ("final", "valid", 1.0), ("final", "maps", {"a": {}}),
     ("base", "status", "lost")],
)  # fmt: skip
def test_a_row_that_no_run_writes_is_refused(kind, field, value, grid, tmp_path):
    row = next(row for row in grid if row["config"]["kind"] == kind) | {"versions": {}, field: value}
    (tmp_path / "rows.jsonl").write_bytes(harness.sealed(row))
    with pytest.raises(FormatError, match=f"line 1: row.*{field}"):
        harness.read_rows(tmp_path / "rows.jsonl", forgetting.FORM)


@pytest.mark.parametrize(
    "change",
    [{"ranks": ()}, {"ranks": (4, 1)}, {"ranks": (4, 4)}, {"ranks": (0, 4)}, {"targets": ()}, {"rates": ()},
     {"targets": ("folio", "folio")}, {"targets": ("folio", "shakespeare")}, {"own": "code"},
     {"full_rates": ()}, {"rates": (-1e-3,)}, {"full_rates": (math.nan,)}, {"steps": 0}, {"seeds": 1.5},
     {"batch": 0}, {"test_windows": 0}, {"valid_windows": True}],
    ids=repr,
)  # fmt: skip
def test_an_empty_or_impossible_plan_is_refused(change):
    with pytest.raises(ConfigError):
        Plan(**change)
