"""The experiment with subspaces: it compares the directions it says, of adapters that share no draw."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data.corpora import Corpus
from minilora.errors import ConfigError, FormatError
from minilora.experiments import harness, recipe, subspaces
from minilora.experiments.subspace_figures import (
    KEYS,
    alone,
    beyond,
    finals,
    gained,
    maps,
    overlap,
    phi,
    pictures,
    sentences,
    shared,
    short,
    spread,
    tables,
    threshold,
    weights,
    width,
)
from minilora.experiments.subspaces import PAIRS, SIDES, Plan, Run, counts
from minilora.formats.checkpoint import History
from minilora.lora import active
from minilora.model import Config, llama
from minilora.spectra import random_similarity, similarity
from minilora.tree import digest, freeze, get

TINY = Config(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=16)  # fmt: skip
PLAN = Plan(ranks=(1, 2, 4), rates=(1e-2, 3e-2), steps=3, search_steps=2, seeds=2, batch=2,
            test_windows=3, valid_windows=2)  # fmt: skip
MAPS = 2 * 7
PATH = "model.layers.1.mlp.down_proj"


def text(name, seed):
    """A text of a few letters of its own."""
    ids = np.random.default_rng(seed).integers(60 + 5 * seed, 70 + 5 * seed, 3000).astype(np.uint8)
    return Corpus(name, f"text {name}", *np.split(ids, [2000, 2500]))


def made():
    """A tiny base, frozen, and two texts."""
    base = llama(TINY, np.random.default_rng(0))
    freeze(base)
    return harness.Inputs("base", base, {name: text(name, i) for i, name in enumerate(("folio", "kjv"))})


@pytest.fixture(autouse=True)
def windows(monkeypatch):
    """Short windows."""
    monkeypatch.setattr(recipe, "LENGTH", 16)


def final(seed=0):
    return Run("final", PLAN, seed, tuple((rank, 1e-2) for rank in PLAN.ranks))


def other_split(inputs, name, split):
    """The inputs with one split of one text replaced by other letters."""
    changed = replace(inputs.texts[name], **{split: getattr(inputs.texts[name], split)[::-1] ^ 1})
    return replace(inputs, texts=inputs.texts | {name: changed})


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """All rows of the tiny plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "LENGTH", 16)
        patch.setattr(harness, "read_inputs", lambda base, targets: made())
        return subspaces.run(PLAN, tmp_path_factory.mktemp("rows"), jobs=1)


def frame(rng, D, k):
    """The first k of random orthonormal directions (D, k)."""
    return np.linalg.qr(rng.standard_normal((D, k)))[0]


def dense(adapter):
    """ΔW (O, I) in float64."""
    return adapter.scale * adapter.B.data.astype(np.float64) @ adapter.A.data.astype(np.float64)


# ---- what is measured


def test_the_overlaps_are_those_of_dense_matrices():
    """φ by its definition, from singular vectors of A and ΔW as they are; |.|_F² of unit vectors is a sum."""
    inputs, run = made(), final()
    row = subspaces.work(run, inputs)
    large = subspaces.learned(run, inputs, 4, PLAN.steps)
    others = {
        "ranks": subspaces.learned(run, inputs, 2, PLAN.steps),
        "seeds": subspaces.learned(run, inputs, 4, PLAN.steps, "folio", 1),
        "texts": subspaces.learned(run, inputs, 4, PLAN.steps, "kjv", 2),
    }
    assert row["similarity"].keys() == others.keys() == set(PAIRS)

    def vectors(model, path):
        A = active(model)[path].A.data.astype(np.float64)
        U, _, Vt = np.linalg.svd(dense(active(model)[path]))
        return {"A": np.linalg.svd(A)[2].T, "right": Vt.T, "left": U}

    for pair, model in others.items():
        assert len(row["similarity"][pair]) == MAPS
        one, other = vectors(model, PATH), vectors(large, PATH)
        for side in SIDES:
            found = row["similarity"][pair][PATH][side]
            assert len(found) == (2 if pair == "ranks" else 3)
            for a, i in enumerate(counts(2 if pair == "ranks" else 4)):
                for b, j in enumerate((1, 2, 4)):
                    square = sum(
                        (one[side][:, m] @ other[side][:, n]) ** 2 for m in range(i) for n in range(j)
                    )
                    assert abs(found[a][b] - square / min(i, j)) <= 0.5001e-4, (pair, side, i, j)  # digits


def test_the_amplification_is_that_of_dense_matrices():
    inputs, run = made(), final()
    row = subspaces.work(run, inputs)
    assert row["weights"].keys() == {"1", "2", "4"}
    assert row["shapes"][PATH] == [8, 12]
    for rank in PLAN.ranks:
        adapter = active(subspaces.learned(run, inputs, rank, PLAN.steps))[PATH]
        delta, W = dense(adapter), get(inputs.base, f"{PATH}.weight").data.astype(np.float64)
        U, _, Vt = np.linalg.svd(delta)
        along = np.linalg.norm(U[:, :rank].T @ W @ Vt[:rank].T)
        own = math.sqrt(sum(np.linalg.svd(W)[1][:rank] ** 2))
        change, whole = np.linalg.norm(delta), np.linalg.norm(W)
        expected = {
            "factor": change / along, "emphasis": along / own,
            "random": change / (whole * rank / math.sqrt(8 * 12)),
        }  # fmt: skip
        assert row["weights"][str(rank)][PATH] == pytest.approx(expected, rel=1e-10)
        assert expected["emphasis"] < 1


def test_the_losses_are_those_of_each_rank(monkeypatch):
    inputs, run = made(), final()
    row = subspaces.work(run, inputs)
    assert [*row["losses"]] == ["base", "1", "2", "4"]
    for rank in PLAN.ranks:
        model = subspaces.learned(run, inputs, rank, PLAN.steps)
        assert row["losses"][str(rank)] == subspaces.loss(model, run, inputs, "test")
    assert row["losses"]["base"] == subspaces.loss(inputs.base, run, inputs, "test")
    assert len({*row["losses"].values()}) == 4


# ---- by which draws


def test_no_two_adapters_of_a_seed_start_alike_and_ranks_see_the_same_batches(monkeypatch):
    """A rank that took the first rows of another's A would share directions before the first step."""
    starts, seen = [], []

    def train(model, batches, optimizer, *, steps, **how):
        starts.append({path: adapter.A.data.copy() for path, adapter in active(model).items()})
        seen.append(np.concatenate([x for (x, _), _ in zip(batches, range(steps), strict=False)]).tobytes())
        return History()

    monkeypatch.setattr(recipe, "train", train)
    for seed in (0, 1):
        subspaces.measured(final(seed), made())
    one, two = seen[:5], seen[5:]
    assert one[0] == one[1] == one[2]  # of all ranks
    assert len({*one, *two}) == 6  # of the ranks, the other draw and the other text
    numbers = np.concatenate([a.ravel() for start in starts for a in start.values()])
    assert (
        len(np.unique(numbers)) > 0.999 * numbers.size
    )  # two of 4,000 in float32 may meet, two rows may not


def test_the_base_stays_as_it_was():
    inputs = made()
    before = digest(inputs.base)
    subspaces.work(final(), inputs)
    assert digest(inputs.base) == before


def test_only_train_splits_are_trained_on_and_test_text_decides_nothing():
    inputs = made()
    row = subspaces.work(final(), inputs)
    measured = ("losses", "similarity", "weights")

    def differ(name, split):
        other = subspaces.work(final(), other_split(inputs, name, split))
        return {key for key in measured if other[key] != row[key]}

    assert differ("folio", "test") == {"losses"}
    assert not any(
        differ(name, split) for name, split in (("folio", "valid"), ("kjv", "valid"), ("kjv", "test"))
    )
    assert differ("folio", "train") == {*measured}
    other = subspaces.work(final(), other_split(inputs, "kjv", "train"))
    assert [pair for pair in PAIRS if other["similarity"][pair] != row["similarity"][pair]] == ["texts"]
    search = Run("search", PLAN, 0, ((2, 1e-2),))
    valid, unseen, changed = (
        subspaces.work(search, x)["valid"]
        for x in (inputs, other_split(inputs, "folio", "test"), other_split(inputs, "folio", "valid"))
    )
    assert valid == unseen != changed


def test_the_rate_of_each_rank_is_the_best_of_its_search(rows):
    searches = [row for row in rows if row["config"]["kind"] == "search"]
    assert len(searches) == 3 * 2
    for row in finals(rows):
        for rank, rate in row["config"]["rates"]:
            tried = {
                r["config"]["rates"][0][1]: r["valid"] for r in searches if r["config"]["rates"][0][0] == rank
            }
            assert tried[rate] == min(tried.values())
    assert [row["config"]["seed"] for row in finals(rows)] == [0, 1]
    assert all(row["config"]["seed"] == harness.SEARCH_SEED for row in searches)


# ---- how it is read


@given(st.integers(0, 2**32 - 1), st.integers(8, 20), st.integers(1, 8), st.integers(1, 8))
def test_directions_alone_are_squared_cosines_with_the_others_first_ones(seed, D, k, r):
    rng = np.random.default_rng(seed)
    U, V = frame(rng, D, k), frame(rng, D, r)
    at = [np.array(counts(n)) - 1 for n in (k, r)]
    found = alone(similarity(U, V)[np.ix_(*at)])
    assert found.shape == (min(len(at[0]), len(at[1])),)
    for share, i in zip(found, counts(min(k, r)), strict=True):
        mine = [sum((U[:, m] @ V[:, n]) ** 2 for n in range(i)) for m in range(i // 2, i)]
        assert share == pytest.approx(np.mean(mine), abs=1e-12)


def test_counts_are_the_powers_of_two_up_to_a_rank():
    assert [counts(r) for r in (1, 2, 3, 4, 63, 64)] == [
        [1], [1, 2], [1, 2], [1, 2, 4], [1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16, 32, 64],
    ]  # fmt: skip


def test_beyond_chance_is_0_for_random_directions_and_1_for_the_same():
    """Where the directions fill the space, all are the same by chance: 0."""
    D, at = 16, np.array(counts(16)) - 1
    rng = np.random.default_rng(0)
    found = np.array([similarity(frame(rng, D, 16), np.eye(D))[np.ix_(at, at)] for _ in range(400)])
    for share in (np.diagonal(found, 0, 1, 2), alone(found)):
        b = beyond(share, D)
        assert (abs(b.mean(0)) <= 5 * b.std(0) / math.sqrt(400)).all()
        assert (abs(b[:, -1]) < 1e-12).all()
    assert beyond(np.ones(5), D) == pytest.approx([1, 1, 1, 1, 0])
    assert beyond(np.full((2, 3), 0.5), D)[1, 2] == pytest.approx((0.5 - 4 / 16) / (1 - 4 / 16))


def test_one_of_a_hundred_random_pairs_is_above_the_threshold():
    rng, at = np.random.default_rng(1), np.array(counts(8)) - 1
    found = np.array(
        [alone(similarity(frame(rng, 24, 8), frame(rng, 24, 8))[np.ix_(at, at)]) for _ in range(2000)]
    )
    above = (found > threshold(24, 4)).mean(0)
    # of 500 draws the 99 % quantile has a true level of 0.99 +- 0.0045; of 2000 the share +- 0.0022: 5 sigma
    assert (abs(above - 0.01) < 5 * math.hypot(0.0045, 0.0022)).all()
    assert (above > 0).all()
    assert (threshold(24, 4) > [random_similarity(i, i, 24) for i in counts(8)]).all()


def crafted(seed, shares=(1.0, 1.0, 0.0), factor=(2.0, 0.5)):
    """A row of four maps in R^1000; `shares` of directions 1, 2 and 3 to 4 lie in the other's first ones.

    Its numbers are those of the middle one of three seeds, and a little more or less for the others.
    """
    a, b, c = shares
    x = [[a, a, a], [a, (a + b) / 2, (a + b) / 2], [a, (a + b) / 2, (a + b + 2 * c) / 4]]
    paths = [f"model.layers.{n}.self_attn.{kind}_proj" for n in (0, 1) for kind in "vq"]
    plan = {"ranks": [1, 2, 4]}
    more = (seed - 1) / 8
    weights = {
        rank: {p: {"factor": f + m + more, "random": 3.0 + m + more, "emphasis": 0.25}
               for m, p in enumerate(paths)}
        for rank, f in zip("14", factor, strict=True)
    }  # fmt: skip
    sides = {"A": x, "right": x, "left": np.zeros((3, 3)).tolist()}
    similar = {pair: dict.fromkeys(paths, sides) for pair in ("seeds", "texts")}
    similar["ranks"] = {p: {side: found[:2] for side, found in sides.items()} for p in paths}
    return {
        "status": "done", "config": {"kind": "final", "plan": plan, "seed": seed},
        "losses": {"base": 3.0, "1": 2.5, "2": 2.0 - more, "4": 1.0},
        "shapes": {p: [2000, 1000] for p in paths}, "weights": weights,
        "similarity": similar,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shares", "n"), [((1, 1, 1), 4), ((1, 1, 0), 2), ((1, 0, 1), 1), ((0, 1, 1), 0), ((0.2, 0.3, 0.002), 2)]
)
def test_directions_are_shared_up_to_the_first_octave_that_chance_explains(shares, n):
    done = [crafted(seed, shares) for seed in range(3)]
    assert shared(done, "seeds").tolist() == [n] * 4
    assert shared(done, "ranks").tolist() == [min(n, 2)] * 4
    assert shared(done, "seeds", "left").tolist() == [0] * 4
    one = crafted(3, (0, 0, 0))
    assert shared([*done, one], "seeds").tolist() == [0] * 4  # every seed must


def test_numbers_are_read_from_where_they_stand():
    done = [crafted(seed, (0.5, 0.25, 0)) for seed in range(3)]
    assert maps(done) == [f"model.layers.{n}.self_attn.{kind}_proj" for kind in "qv" for n in (0, 1)]
    assert [short(path) for path in maps(done)] == ["q_proj 0", "q_proj 1", "v_proj 0", "v_proj 1"]
    assert [width(done[0], maps(done)[0], side) for side in SIDES] == [1000, 1000, 2000]
    assert phi(done, "ranks", maps(done)[0], "A").shape == (3, 2, 3)
    assert overlap(done, "seeds", "A").shape == (4, 3, 3)
    assert overlap(done, "seeds", "A")[0, 0] == pytest.approx(
        [(0.5 - 0.001) / 0.999, (0.375 - 0.002) / 0.998, (0.1875 - 0.004) / 0.996]
    )
    assert weights(done, 1, "factor")[1].tolist() == [3, 5, 2, 4]  # v and q of layer 0, then of 1
    assert gained(done) == pytest.approx([(1 - 1 / 8) / 2, 0.5, (1 + 1 / 8) / 2])


def test_sentences_are_medians_over_maps_and_seeds():
    assert sentences([crafted(seed) for seed in range(3)]) == [
        "The first directions of r = 2 and 4 overlap by 1.00 beyond chance; r = 2 reaches 50% of the gain of "
        "r = 4.",
        "Two seeds share 2 of 4 directions, the first by 1.00 beyond chance; two texts share 2, the first by "
        "1.00.",
        "Along its directions ΔW is 3.5 times as strong as W at r = 1 (random ones: 4.5), 2 times at r = 4 "
        "(4.5); W has 0.25 and 0.25 there of what it has along its own first ones.",
    ]


def test_tables_say_what_the_rows_say(rows):
    done = finals(rows)
    similar, amplified = tables(rows)
    assert [line[0] for line in similar.rows] == [
        f"{name}: {side}"
        for name in ("r = 2 and 4", "two seeds, r = 4", "two texts, r = 4")
        for side in ("A", "right", "left")
    ]
    found = np.median([
        [(row["similarity"]["seeds"][p]["A"][1][1] - 2 / (12 if "down" in p else 8))
         / (1 - 2 / (12 if "down" in p else 8)) for p in row["shapes"]] for row in done
    ], 0)  # fmt: skip
    assert similar.rows[3][2] == f"{np.median(found):.2f} ({found.min():.2f} to {found.max():.2f})"
    assert similar.rows[0][3] == ""  # r = 2 has no first 4
    assert len(amplified.rows) == MAPS
    assert all(len(line) == len(table.head) for table in (similar, amplified) for line in table.rows)
    line = next(line for line in amplified.rows if line[0] == "down_proj 1")
    values = np.array([row["weights"]["4"][PATH]["random"] for row in done])
    assert line[1 + len(KEYS) + KEYS.index("random")] == spread(values, ".2f")
    assert amplified.head[1 + len(KEYS) + KEYS.index("random")] == "r = 4: random"


@pytest.mark.slow
def test_the_same_rows_give_the_same_figures(rows):
    drawn, again = pictures(rows), pictures(rows)
    assert drawn.keys() == {"ranks", "seeds", "directions", "amplification"}
    for name, picture in drawn.items():
        assert picture.encoded("svg") == again[name].encoded("svg")
        assert "2 seeds" in picture.says
    heat = drawn["ranks"].encoded("svg").decode()
    assert all(name in heat for name in ("q_proj 0", "v_proj 0", "random in 8 dimensions", "first i, r = 2"))
    middle = np.median(
        [row["similarity"]["ranks"]["model.layers.0.self_attn.v_proj"]["A"][0][1] for row in finals(rows)]
    )
    assert f"{middle:.2f}" in heat
    assert "the paper's 21.5" in drawn["amplification"].encoded("svg").decode()


# ---- rows and plans


@pytest.mark.slow
def test_a_finished_folder_is_read_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "read_inputs", lambda base, targets: made())
    plan = replace(PLAN, seeds=1, rates=(1e-2,))
    first = subspaces.run(plan, tmp_path, jobs=1)
    data = (tmp_path / "rows.jsonl").read_bytes()
    monkeypatch.setattr(subspaces, "learned", None)
    assert subspaces.run(plan, tmp_path, jobs=1) == first
    assert (tmp_path / "rows.jsonl").read_bytes() == data
    assert harness.read_rows(tmp_path / "rows.jsonl", subspaces.FORM) == first


@pytest.mark.parametrize(
    ("field", "value"),
    [("losses", {"base": "low"}), ("shapes", {"a": [2]}), ("similarity", {"ranks": {}}),
     ("similarity", {pair: {"a": {side: [[1.1]] for side in SIDES}} for pair in PAIRS}),
     ("weights", {"1": {"a": {"factor": 1.0}}}), ("status", "lost"), ("more", 1), ("valid", 1.0)],
)  # fmt: skip
def test_a_row_that_no_run_writes_is_refused(field, value, rows, tmp_path):
    row = copy.deepcopy(rows[-1]) | {field: value}
    (tmp_path / "rows.jsonl").write_bytes(harness.sealed(row))
    with pytest.raises(FormatError, match=f"line 1: row.*{field}"):
        harness.read_rows(tmp_path / "rows.jsonl", subspaces.FORM)


@pytest.mark.parametrize(
    "change", [{"other": "folio"}, {"ranks": (8,)}, {"ranks": (8, 4)}, {"ranks": (4, 4)}, {"ranks": (0, 4)},
               {"rates": ()}, {"rates": (0.0,)}, {"steps": 0}, {"seeds": 1.5}, {"alpha": 0}]
)  # fmt: skip
def test_an_impossible_plan_is_refused(change):
    with pytest.raises(ConfigError):
        Plan(**change)


def test_a_seed_that_diverged_is_left_out(rows):
    lost = [row | {"status": "diverged"} if row["config"]["seed"] == 1 else row for row in rows]
    assert [row["config"]["seed"] for row in finals(lost)] == [0]
    assert "1 seed:" in tables(lost)[0].caption
