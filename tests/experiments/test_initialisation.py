"""The experiment with starts: what each one is, what it can learn at first, and the reading of the rows."""

import copy
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from minilora.adapters import pairs
from minilora.data.batching import batches, eval_batches
from minilora.data.corpora import Corpus
from minilora.errors import ConfigError, FormatError
from minilora.experiments import harness, initialisation, recipe
from minilora.experiments.initialisation import FULL, PLAIN, STARTS, STUCK, TAKEN_OFF, USUAL, Plan, Run
from minilora.experiments.initialisation_figures import found, pictures, sentences, tables
from minilora.lora import active, adapted, inject
from minilora.methods.lora_config import LoraConfig
from minilora.methods.starts import Started, lora_ga, olora, pissa, weight_gradients
from minilora.model import Config, llama
from minilora.optim import AdamW, Schedule
from minilora.training import evaluate, train
from minilora.tree import digest, freeze, named_params

TINY = Config(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=16)  # fmt: skip
PLAN = Plan(
    rank=2, alpha=5.0, rates=(1e-2, 2e-2), full_rates=(1e-3,), steps=3, seeds=2, batch=2, test_windows=3,
    valid_windows=2,
)  # fmt: skip
WIDE = Plan(rank=2, seeds=3)
ZERO = (USUAL, "B zero (Gaussian A)", "A zero", STUCK)  # ΔW = s B A is zero at the start


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


def cell(start=USUAL, kind="final", **how):
    return Run(kind, **{"plan": PLAN, "start": start, "rate": 1e-2, "seed": 3} | how)


def first_batch(inputs, draw=1):
    """The first batch of the seed 3."""
    return next(batches(inputs.texts["folio"].train, np.random.default_rng([3, draw]), 2, 16))


def factors(model):
    """Path -> A, B and s."""
    return {path: (pair.A.data, pair.B.data, pair.scale) for path, pair in pairs(model).items()}


# ---- the starts


@pytest.mark.parametrize(("start", "init"), [(USUAL, "kaiming"), ("B zero (Gaussian A)", "gaussian")])
def test_the_usual_starts_are_the_configs(start, init):
    by_hand = made().base
    inject(by_hand, LoraConfig(2, 5.0, init=init), rng=np.random.default_rng([3, 0]))
    assert digest(initialisation.prepared(cell(start), made())) == digest(by_hand)


@pytest.mark.parametrize(("start", "A_drawn", "B_drawn"), [
    (USUAL, True, False), ("B zero (Gaussian A)", True, False), ("A zero", False, True),
    (STUCK, False, False), ("both random", True, True),
])  # fmt: skip
def test_a_factor_is_zero_or_drawn_within_its_bound(start, A_drawn, B_drawn):
    found = factors(initialisation.prepared(cell(start), made()))
    assert len(found) == 7
    for A, B, s in found.values():
        assert s == 5.0 / 2
        assert (A.all(), B.all()) == (A_drawn, B_drawn)
        assert (A.any(), B.any()) == (A_drawn, B_drawn)
        assert abs(B).max() <= 1 / math.sqrt(2)
        assert abs(A).max() <= 1 / math.sqrt(A.shape[1]) or "Gaussian" in start
        assert A.dtype == B.dtype == np.float32
    drawn = [a for A, B, _ in found.values() for a, so in ((A, A_drawn), (B, B_drawn)) if so]
    assert len({a.tobytes() for a in drawn}) == len(drawn)
    if B_drawn:
        assert max(abs(B).max() for _, B, _ in found.values()) > 0.6  # of 0.71


def test_starts_that_are_taken_off_are_those_of_their_names():
    inputs = made()
    gradient = weight_gradients(inputs.base, *first_batch(inputs, 2))
    by_hand = {"PiSSA": pissa, "OLoRA": olora, "LoRA-GA": lora_ga(gradient)}
    for name, start in by_hand.items():
        model = initialisation.prepared(cell(name), inputs)
        for path, layer in adapted(model).items():
            adapter, W = active(model)[path], layer.base.weight.data.astype(np.float64)
            assert isinstance(adapter, Started)
            B, A = (a.astype(np.float32) for a in start(path, W, 2, 2.5))
            assert np.array_equal(adapter.low_rank.B.data, B)
            assert np.array_equal(adapter.low_rank.A.data, A)
            assert np.array_equal(adapter.B0, B)
            assert np.array_equal(adapter.A0, A)


def test_random_directions_have_pissas_singular_values_in_their_own():
    ours, theirs, other = (
        initialisation.prepared(cell(name, seed=seed), made())
        for name, seed in (("random directions", 3), ("PiSSA", 3), ("random directions", 4))
    )
    for path, (A, B, s) in factors(ours).items():
        A_, B_, _ = factors(theirs)[path]
        assert np.linalg.svd(s * B @ A)[1][:2] == pytest.approx(np.linalg.svd(s * B_ @ A_)[1][:2], rel=1e-5)
        for part, part_, third in ((B, B_, factors(other)[path][1]), (A.T, A_.T, factors(other)[path][0].T)):
            assert np.abs(part.T @ part - part_.T @ part_).max() < 1e-5 * np.abs(part_.T @ part_).max()
            assert not np.allclose(part, part_)
            assert not np.allclose(part, third)


@pytest.fixture(scope="module")
def seeds():
    """What one seed of every start measures, and the base; the rates are so small that nothing diverges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "LENGTH", 16)
        base = initialisation.work(Run("base", PLAN), made())["test"]
        return base, {start: initialisation.work(cell(start), made()) for start in (*STARTS, FULL)}


def test_only_both_random_starts_away_from_the_base(seeds):
    base, rows = seeds
    for start in ZERO:
        assert rows[start]["start"] == base
    for start in TAKEN_OFF:
        assert rows[start]["start"] == pytest.approx(base, abs=1e-5)
    assert rows[FULL]["start"] == base
    assert abs(rows["both random"]["start"] - base) > 0.01


def test_what_has_a_gradient_at_first_is_what_stands_beside_a_factor_that_is_not_zero(seeds):
    _, rows = seeds
    for start in STARTS:
        norms = rows[start]["gradients"]
        assert (norms["A"] > 0) == (start not in (USUAL, "B zero (Gaussian A)", STUCK)), start
        assert (norms["B"] > 0) == (start not in ("A zero", STUCK)), start
    assert rows[FULL]["gradients"] == {}


def test_gradients_are_those_of_the_first_batch():
    """By hand: of all maps together, each factor for itself."""
    inputs = made()
    model = initialisation.prepared(cell("both random"), inputs)
    _, back = model.loss(*first_batch(inputs), train=True)
    back()
    for name in "AB":
        squares = [
            (p.grad.astype(float) ** 2).sum()
            for path, p in named_params(model).items()
            if path.endswith(f".{name}")
        ]
        row = initialisation.work(cell("both random"), inputs)
        assert row["gradients"][name] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


def test_both_zero_is_stuck_at_the_base_and_tells_its_loss_on_every_batch(seeds):
    base, rows = seeds
    row, inputs = rows[STUCK], made()
    assert row["test"] == row["start"] == base
    given = batches(inputs.texts["folio"].train, np.random.default_rng([3, 1]), 2, 16)
    assert row["losses"] == [pytest.approx(evaluate(inputs.base, [next(given)]), rel=1e-6) for _ in range(3)]
    for start in set(STARTS) - {STUCK}:
        assert rows[start]["test"] != rows[start]["start"]
        assert len(rows[start]["losses"]) == 3
        assert rows[start]["losses"][0] == pytest.approx(row["losses"][0], rel=1e-5) or start == "both random"


# ---- one run


def test_the_base_stays_as_it_was_and_all_weights_are_trained_only_where_it_says_so(seeds):
    inputs = made()
    before = digest(inputs.base)
    for start in ("LoRA-GA", FULL):
        initialisation.work(cell(start), inputs)
    assert digest(inputs.base) == before
    sizes = {path: p.data.shape for path, p in named_params(inputs.base).items()}
    lora = sum(2 * sum(shape) for path, shape in sizes.items() if "_proj" in path)
    for start, row in seeds[1].items():
        assert row["parameters"] == (sum(map(math.prod, sizes.values())) if start == FULL else lora)


def test_test_text_chooses_no_rate_and_validation_text_measures_nothing():
    inputs = made()

    def other(split):
        text = inputs.texts["folio"]
        changed = replace(text, **{split: getattr(text, split)[::-1] ^ 1})
        return replace(inputs, texts={"folio": changed})

    for kind, seen, unseen in (("search", "valid", "test"), ("final", "test", "valid")):
        row, same, changed = (
            initialisation.work(cell(kind=kind), x) for x in (inputs, other(unseen), other(seen))
        )
        assert row == same
        assert unseen not in row
        assert row[seen] != changed[seen]


@pytest.mark.parametrize("start", [USUAL, FULL])
def test_a_run_follows_its_recipe(start):
    """By hand, with as many steps as a warm-up needs."""
    run, inputs = cell(start, plan=replace(PLAN, steps=40)), made()
    text, model = inputs.texts["folio"], copy.deepcopy(inputs.base)
    if start == FULL:
        freeze(model, keep=lambda path: True)
    else:
        inject(model, LoraConfig(2, 5.0), rng=np.random.default_rng([3, 0]))
    losses = train(
        model, batches(text.train, np.random.default_rng([3, 1]), 2, 16), AdamW(1e-2, betas=(0.9, 0.99)),
        steps=40, schedule=Schedule(40, warmup=2),
    ).loss  # fmt: skip
    row = initialisation.work(run, inputs)
    assert row["losses"] == losses
    assert row["test"] == evaluate(model, eval_batches(text.test, 16, 16, limit=48))


def test_runs_of_a_seed_see_the_same_batches(monkeypatch):
    seen = []
    monkeypatch.setattr(
        initialisation, "learn", lambda model, given, *_: seen.append(next(given)[0]) or [1.0]
    )
    for start, how in (
        (USUAL, {}),
        ("LoRA-GA", {}),
        (FULL, {}),
        (STUCK, {"rate": 0.5}),
        (USUAL, {"seed": 4}),
    ):
        initialisation.work(cell(start, **how), made())
    assert all((x == seen[0]).all() for x in seen[1:4])
    assert (seen[4] != seen[0]).any()


# ---- the grid

LOSSES = {start: 1.5 + 0.01 * i for i, start in enumerate((FULL, *STARTS))}  # at the best rate
RATES = {start: 4e-3 * 2 ** (i % 3 - 1) for i, start in enumerate((FULL, *STARTS))}


def crafted(run, inputs):
    """A row in no time, its loss a parabola over log rate with that minimum; on test, seeds differ."""
    c = asdict(run)
    row = {"id": run.id, "config": c, "source": "crafted", "status": "done"}
    if run.kind == "base":
        return row | {"test": 2.0}
    far = math.log2(run.rate / RATES[run.start]) ** 2 if run.start != STUCK else 0.0
    loss = LOSSES[run.start] + 0.01 * far
    if run.kind == "search":
        return row | {"valid": loss, "parameters": 1}
    more = (0.0, 0.4, 0.1)[run.seed] * (run.start != USUAL)
    path = [1.0 + run.seed, *(loss - 0.001 * step + more for step in range(run.plan.steps - 1))]
    return row | {
        "start": {"both random": 5.0 + run.seed, "PiSSA": 2.0 + 1e-7 * run.seed}.get(run.start, 2.0),
        "gradients": {} if run.start == FULL else {"A": 0.25 * run.seed, "B": 0.5 + run.seed},
        "losses": path, "test": 2.0 if run.start == STUCK else loss + more, "parameters": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Crafted rows of the usual grid, with three seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "read_inputs", lambda base, targets: made())
        patch.setattr(initialisation, "prepared", lambda *_: None)
        patch.setattr(initialisation, "work", crafted)
        return initialisation.run(WIDE, tmp_path_factory.mktemp("grid"), jobs=1)


def configs(grid, kind):
    return [row["config"] for row in grid if row["config"]["kind"] == kind]


def test_seeds_are_trained_at_the_starts_own_best_rate_and_at_the_usual_ones(grid):
    arms = found(grid).arms
    assert arms.keys() == {*STARTS, FULL}
    for start, arm in arms.items():
        assert arm.rate == (RATES[USUAL] if start == STUCK else RATES[start])
        usual = set() if start == FULL else {RATES[USUAL]}
        assert arm.tests.keys() == {arm.rate} | usual
        assert all(len(losses) == 3 for losses in arm.tests.values())
    assert {c["seed"] for c in configs(grid, "final")} == {0, 1, 2}
    assert {c["seed"] for c in configs(grid, "search")} == {harness.SEARCH_SEED}
    assert {c["start"] for c in configs(grid, "search")} == {*STARTS, FULL} - {STUCK}  # which no rate moves
    assert len(configs(grid, "base")) == 1


def test_an_edge_is_left_at_most_so_often(tmp_path, monkeypatch):
    """Losses that fall with the rate: the search goes on to larger ones, then gives up."""
    monkeypatch.setattr(initialisation, "prepared", lambda *_: None)
    monkeypatch.setattr(initialisation, "work", lambda run, inputs: crafted(run, inputs) | (
        {"valid": -run.rate} if run.kind == "search" else {}))  # fmt: skip
    rows = initialisation.run(PLAN, tmp_path, jobs=1)
    tried = {start: [] for start in (*STARTS, FULL)}
    for c in configs(rows, "search"):
        tried[c["start"]].append(c["rate"])
    assert tried.pop(STUCK) == []
    assert sorted(tried.pop(FULL)) == pytest.approx([1e-3 * 2**i for i in range(1 + initialisation.EDGES)])
    for rates in tried.values():
        assert sorted(rates) == pytest.approx([1e-2 * 2**i for i in range(2 + initialisation.EDGES)])


# ---- reading


def middle(start, rate):
    """The median of the crafted test losses."""
    far = math.log2(rate / RATES[start]) ** 2
    return LOSSES[start] + 0.01 * far + 0.1 * (start != USUAL)


def test_numbers_are_those_of_the_rows(grid):
    f = found(grid)
    assert (f.base, f.plan) == (2.0, WIDE)
    for start in ("PiSSA", "A zero"):
        expected = middle(start, RATES[start]) - middle(USUAL, RATES[USUAL])
        assert float(np.median(f.change(start))) == pytest.approx(expected)
        assert f.change(start) == pytest.approx(np.array([0.0, 0.4, 0.1]) + expected - 0.1)
        one = middle(start, RATES[USUAL]) - middle(USUAL, RATES[USUAL])
        assert float(np.median(f.change_at_one_rate(start))) == pytest.approx(one)
        # 38 of 150 steps; the first loss is the same for all, the others differ as the test losses do
        assert f.early(start) == pytest.approx(expected * 37 / 38)
    assert f.away("PiSSA") == pytest.approx(2e-7)
    assert f.away("both random") == 5.0
    assert f.away("OLoRA") == 0
    assert f.gradients("OLoRA") == {"A": 0.5, "B": 2.5}
    path = f.path("OLoRA")
    assert path.shape == (3, 150)
    assert path[:, 0] == pytest.approx(np.zeros(3))
    assert path[:, 1:] == pytest.approx(np.full((3, 149), LOSSES["OLoRA"] - LOSSES[STUCK]))


def test_seeds_are_compared_with_the_same_seed_of_the_base_whatever_their_order(grid):
    backwards = sorted(grid, key=lambda row: -row["config"]["seed"] if row["config"]["start"] == STUCK else 0)
    assert np.array_equal(found(backwards).path("PiSSA"), found(grid).path("PiSSA"))


def test_the_table_and_the_sentences_say_the_numbers(grid):
    f, (table,) = found(grid), tables(grid)
    assert [line[0] for line in table.rows] == [*STARTS, FULL]
    line = table.rows[STARTS.index("PiSSA")]
    assert line[:5] == ("PiSSA", "2.0e-07", "5.0e-01", "2.5e+00", f"{RATES['PiSSA']:g}")
    best = middle("PiSSA", RATES["PiSSA"])
    assert line[5] == f"{best:.3f} ({best - 0.1:.3f} to {best + 0.3:.3f})"
    assert line[6].startswith(f"{np.median(f.change('PiSSA')):+.3f} (")
    assert line[7].startswith(f"{np.median(f.change_at_one_rate('PiSSA')):+.3f} (")
    assert table.rows[STARTS.index(STUCK)][4] == ""
    said = sentences(grid)
    assert said[0].startswith("With both factors at zero |dA| is 0.5 and |dB| 2.5: the loss stays within 0 ")
    assert said[1].endswith(" A zero, both zero, OLoRA, LoRA-GA, random directions.")
    assert said[2] == "The starts taken off begin within 2e-07 of it, both random 5.00 off."
    assert f"A zero {RATES['A zero']:g}, both random {RATES['both random']:g}, PiSSA" in said[3]
    for sentence, number in ((said[5], f.change), (said[6], f.change_at_one_rate), (said[7], f.early)):
        assert ", ".join(f"{s} {np.median(number(s)):+.3f}" for s in TAKEN_OFF) in sentence
    assert f"A zero {np.median(f.change('A zero')):+.3f}" in said[4]


def test_a_seed_that_diverged_has_an_infinite_loss_and_no_path(grid):
    def lost(row):
        c = row["config"]
        keep = ("id", "config", "source")
        gone = (c["kind"], c["start"], c["seed"]) == ("final", "PiSSA", 1)
        return {k: row[k] for k in keep} | {"status": "diverged", "error": "it"} if gone else row

    f = found([lost(row) for row in grid])
    assert f.arms["PiSSA"].best[1] == math.inf
    assert np.isfinite(f.arms["PiSSA"].best[[0, 2]]).all()
    assert len(f.path("PiSSA")) == 2
    without = [row for row in grid if row["config"]["start"] != "OLoRA" or row["config"]["kind"] != "final"]
    with pytest.raises(ConfigError, match="OLoRA has no finished seed"):
        tables(without)


@pytest.mark.slow
def test_the_same_rows_give_the_same_figures(grid):
    drawn, again = pictures(grid), pictures(grid)
    assert drawn.keys() == {"starts", "first_steps"}
    for name, picture in drawn.items():
        svg = picture.encoded("svg")
        assert svg == again[name].encoded("svg")
        assert "nats" in svg.decode()
    f = found(grid)
    for name in ("starts", "first_steps"):
        assert "LoRA-GA" in drawn[name].says
    assert f"PiSSA {np.median(f.change('PiSSA')):+.3f}" in drawn["starts"].says
    assert f"PiSSA {f.early('PiSSA'):+.3f}" in drawn["first_steps"].says
    for start in STARTS:
        assert all(start in picture.encoded("svg").decode() for picture in drawn.values())


# ---- rows


def test_a_finished_folder_is_read_not_run(tmp_path, monkeypatch):
    plan = replace(PLAN, seeds=1, rates=(1e-2,))
    monkeypatch.setattr(initialisation, "EDGES", 0)
    first = initialisation.run(plan, tmp_path, jobs=1)
    data = (tmp_path / "rows.jsonl").read_bytes()
    monkeypatch.setattr(initialisation, "work", None)
    assert initialisation.run(plan, tmp_path, jobs=1) == first
    assert (tmp_path / "rows.jsonl").read_bytes() == data
    assert harness.read_rows(tmp_path / "rows.jsonl", initialisation.FORM) == first
    assert len(tables(first)[0].rows) == 10


@pytest.mark.parametrize(("rank", "match"), [(5, "r is 5"), (3, "r is 3 .* LoRA-GA takes at most 2")])
def test_a_rank_that_does_not_fit_is_refused_before_any_run(rank, match, tmp_path, monkeypatch):
    monkeypatch.setattr(initialisation, "work", None)
    with pytest.raises(ConfigError, match=match):
        initialisation.run(replace(PLAN, rank=rank), tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("search", "valid", "low"), ("search", "test", 1.0), ("final", "valid", 1.0), ("final", "test", None),
     ("final", "losses", []), ("final", "gradients", {"A": -1.0}), ("final", "start", "there"),
     ("base", "parameters", 1), ("base", "status", "lost"), ("final", "more", 1)],
)  # fmt: skip
def test_a_row_that_no_run_writes_is_refused(kind, field, value, grid, tmp_path):
    row = next(row for row in grid if row["config"]["kind"] == kind) | {"versions": {}, field: value}
    (tmp_path / "rows.jsonl").write_bytes(harness.sealed(row))
    with pytest.raises(FormatError, match=f"line 1: row.*{field}"):
        harness.read_rows(tmp_path / "rows.jsonl", initialisation.FORM)


@pytest.mark.parametrize(
    "change",
    [{"rank": 0}, {"alpha": 0.0}, {"alpha": math.inf}, {"rates": ()}, {"full_rates": ()}, {"rates": (-1e-3,)},
     {"full_rates": (math.nan,)}, {"steps": 0}, {"seeds": 1.5}, {"batch": 0}, {"test_windows": 0},
     {"valid_windows": True}],
    ids=repr,
)  # fmt: skip
def test_an_empty_or_impossible_plan_is_refused(change):
    with pytest.raises(ConfigError):
        Plan(**change)


def test_every_start_has_a_name_of_its_own():
    assert len({*STARTS, FULL}) == len(STARTS) + 1 == 10
    assert (*PLAIN, *TAKEN_OFF) == STARTS
