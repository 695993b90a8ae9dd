"""The experiment with known ranks: what is planted has its rank, and nothing beats the known answer."""

import copy
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.data.batching import batches
from minilora.data.corpora import Corpus, permutation
from minilora.errors import ConfigError, FormatError
from minilora.experiments import harness, recipe
from minilora.experiments import known_rank as known
from minilora.experiments.known_figures import (
    NOTHING,
    elbow,
    left,
    levels,
    pictures,
    sentences,
    shown,
    spread,
    tables,
)  # fmt: skip
from minilora.experiments.known_rank import (
    DEPTHS,
    OWN,
    REVERSED,
    SITE,
    TASKS,
    Plan,
    Run,
    backwards,
    cut,
    divergence,
    planted,
    ranks,
)  # fmt: skip
from minilora.experiments.rank_sweep import TEXT
from minilora.experiments.reading import finals
from minilora.layers import Linear, Need
from minilora.lora import inject
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config, llama
from minilora.optim import AdamW, Schedule
from minilora.training import evaluate, train
from minilora.tree import digest, freeze, get, named_params, replica, trained, unfreeze
from minilora.tree import replace as put

TINY = Config(hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=2, max_position_embeddings=16)  # fmt: skip
PLAN = Plan(planted=(1, 2), seeds=2, steps=(60, 4, 5), batch=2, windows=3)
FEW = (0, 1, 3)  # ranks on reversed text
U = 2.0**-53


def text(name, swaps=0):
    """A text of a few letters, with letters exchanged."""
    ids = permutation(swaps)[np.random.default_rng(0).integers(97, 120, 3000)]
    return Corpus(name, f"text {name}", *np.split(ids.astype(np.uint8), [2000, 2500]))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(recipe, "LENGTH", 16)


def made():
    """A tiny base, frozen, and its texts."""
    base = llama(TINY, np.random.default_rng(0))
    freeze(base)
    texts = {OWN: text(OWN)} | {f"permuted:{k}": text(f"permuted:{k}", k) for k in PLAN.planted}
    return harness.Inputs("base", base, texts)


def cell(task, k=2, r=2, kind="final", lr=1e-2, plan=PLAN, seed=0):
    return Run(kind, plan, task, k, r, seed, lr)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """All rows of the tiny plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "LENGTH", 16)
        patch.setattr(known, "RATES", dict.fromkeys((*TASKS, REVERSED), (1e-3, 1e-2)))
        patch.setattr(known, "TEXT", replace(known.TEXT, full_rates=(1e-3, 1e-2)))
        patch.setattr(known, "DEPTHS", FEW)
        patch.setattr(known, "EDGES", 0)
        patch.setattr(harness, "read_inputs", lambda base, targets: made())
        return known.run(PLAN, tmp_path_factory.mktemp("rows"), jobs=1)


# ---- what is planted


@st.composite
def problems(draw):
    """A generator, sizes, k and Σ^1/2 with some conditioning."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    O, I = draw(st.integers(3, 9)), draw(st.integers(3, 9))  # noqa: E741
    k = draw(st.integers(1, min(O, I)))
    Q, _ = np.linalg.qr(rng.standard_normal((I, I)))
    return rng, O, k, (Q * np.geomspace(1, draw(st.sampled_from([1.0, 0.1, 1e-3])), I)) @ Q.T


@given(problems())
def test_the_planted_change_has_k_equal_values_where_inputs_are_white(problem):
    """σ of Δ Σ^1/2 are 1, k times. Δ comes from the inverse of Σ^1/2, which errs by cond u."""
    rng, O, k, root = problem  # noqa: E741
    S = np.linalg.svd(planted(rng, O, k, root) @ root, compute_uv=False)
    off = 64 * len(root) * U * np.linalg.cond(root)
    assert abs(S[:k] - 1).max() <= off
    assert (S[k:] <= off).all()


@given(problems(), st.integers(1, 9))
def test_no_change_of_that_rank_is_better_than_the_answer_cut_to_it(problem, r):
    rng, O, k, root = problem  # noqa: E741
    r = min(r, O, len(root))
    delta = planted(rng, O, k, root)
    best = np.linalg.norm((cut(delta, r, root) - delta) @ root)
    off = 64 * len(root) * U * np.linalg.cond(root)
    assert best**2 == pytest.approx(max(k - r, 0), abs=2 * k * off)
    B, A = rng.standard_normal((O, r)), rng.standard_normal((r, len(root)))
    near = cut(delta, r, root) + 0.1 * B @ A
    U_, S, Vt = np.linalg.svd(near)
    for other in (B @ A, (U_[:, :r] * S[:r]) @ Vt[:r]):
        assert np.linalg.norm((other - delta) @ root) >= best - off
    assert np.linalg.matrix_rank(cut(delta, r, root), tol=1e-6) <= r


@pytest.mark.parametrize(("k", "r"), [(4, 1), (4, 3), (4, 4), (2, 16)])
def test_lora_on_one_map_reaches_the_closed_form_to_a_thousandth(k, r):
    row = known.work(cell("map", k, r, plan=Plan(), lr=3e-2), made())
    assert row["best"] == pytest.approx(max(k - r, 0) / k, abs=1e-9)
    assert row["excess"] == pytest.approx(row["best"], abs=1e-3)
    assert len(row["spectrum"]) == r
    assert row["spectrum"][: min(k, r)] == pytest.approx([1.0] * min(k, r), abs=0.02)
    assert max(row["spectrum"][k:], default=0) < 0.02


# ---- the teacher


def test_the_covariance_is_that_of_what_the_map_reads():
    inputs = made()
    model, seen = replica(inputs.base), []

    class Spy(Linear):
        def __call__(self, x, need=Need.ALL):
            seen.append(x.reshape(-1, 16).astype(float))
            return super().__call__(x, need)

    put(model, SITE, Spy(get(model, SITE).weight))
    batches = recipe.windows(inputs.texts[OWN], "valid", PLAN.windows)
    for ids, _ in batches:
        model(ids)
    X = np.concatenate(seen)
    root = known.root_of(inputs.base, batches)
    assert np.allclose(root @ root, X.T @ X / len(X), rtol=0, atol=1e-12 * np.linalg.norm(X) ** 2 / len(X))
    assert np.allclose(root, root.T)
    assert np.linalg.eigvalsh(root).min() >= -1e-12 * np.linalg.norm(root)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_divergence_is_kl_per_token_and_its_gradient_by_differences(seed):
    rng = np.random.default_rng(seed)
    t, z = (rng.standard_normal((2, 3, 5)) for _ in range(2))
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (t, z))
    value, gradient = divergence(t.copy(), z.copy())
    assert value == pytest.approx((p * np.log(p / q)).sum() / 6, rel=1e-12)
    along, h = rng.standard_normal(z.shape), 1e-6
    up, down = (divergence(t.copy(), z + s * h * along)[0] for s in (1, -1))
    assert (gradient * along).sum() == pytest.approx((up - down) / (2 * h), rel=1e-6, abs=1e-9)
    assert divergence(z.copy(), z.copy())[0] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("task", ["teacher", "permutation"])
def test_excess_is_1_for_the_base_and_the_full_answer_has_none(task):
    inputs = made()
    before = digest(inputs.base)
    row = known.work(cell(task, lr=1e-12), inputs)
    assert digest(inputs.base) == before
    assert row["status"] == "done"
    assert row["excess"] == pytest.approx(1, abs=1e-3)
    assert row["best"] == pytest.approx(0, abs=1e-4)


def test_half_of_the_planted_change_closes_some_of_it_and_training_does():
    plan = replace(PLAN, steps=(60, 40, 60))
    assert 0.1 < known.work(cell("teacher", k=2, r=1, lr=1e-12), made())["best"] < 0.9
    assert known.work(cell("teacher", plan=plan, lr=1e-2), made())["excess"] < 0.9


# ---- reversed text


def test_reversed_text_is_the_text_backwards_split_by_split():
    text = made().texts[OWN]
    for split in ("train", "valid", "test"):
        assert (getattr(backwards(text), split) == getattr(text, split)[::-1]).all()


@pytest.mark.parametrize("rank", FEW)
def test_the_excess_is_over_the_base_on_the_same_letters_forwards(rank):
    """By hand, letter by letter; it is the base's if nothing is learned, and another if something is."""
    inputs = made()
    before = digest(inputs.base)
    row, trained = (known.work(cell(REVERSED, 0, rank, lr=lr), inputs) for lr in (1e-12, 1e-2))
    assert digest(inputs.base) == before
    letters = whole(inputs, "test")
    _, start, floor = row["losses"]
    assert start == pytest.approx(evaluate(inputs.base, [cut_off(letters)]), rel=1e-6)
    assert floor == pytest.approx(evaluate(inputs.base, [cut_off(letters[:, ::-1])]), rel=1e-6)
    assert start != floor
    assert row["excess"] == pytest.approx(1, abs=1e-3)
    assert trained["losses"][1:] == [start, floor]
    assert trained["losses"][0] != start
    assert trained["excess"] == (trained["losses"][0] - floor) / (start - floor)
    assert 1 <= trained["effective_rank"] <= (rank or 16)
    assert trained.keys() - row.keys() == set()
    assert trained.keys() >= known.LEARNED.keys()


def whole(inputs, split):
    """The windows of reversed text with their last letters (N, T + 1)."""
    windows = recipe.windows(backwards(inputs.texts[OWN]), split, PLAN.windows)
    return np.concatenate([np.concatenate([x, y[:, -1:]], 1) for x, y in windows])


def cut_off(letters):
    """Letters, and those that follow them."""
    return letters[:, :-1], letters[:, 1:]


@pytest.mark.parametrize("rank", [0, 2])
def test_reversed_text_is_learned_by_the_recipe(rank):
    """By hand: the base's text backwards, all linear maps or all weights, alpha 16."""
    inputs = made()
    text, model = backwards(inputs.texts[OWN]), copy.deepcopy(inputs.base)
    if rank:
        inject(model, LoraConfig(rank, 16, "all-linear"), rng=np.random.default_rng([4, rank]))
    else:
        unfreeze(model)
    drawn = batches(text.train, np.random.default_rng([4, 1]), PLAN.batch, 16)
    train(model, drawn, AdamW(1e-2, betas=(0.9, 0.99)), steps=5, schedule=Schedule(5), threads=1)
    row = known.work(cell(REVERSED, 0, rank, seed=4), inputs)
    assert row["losses"][0] == evaluate(model, recipe.windows(text, "test", PLAN.windows))


@pytest.mark.parametrize("rank", [0, 3])
def test_the_effective_rank_is_that_of_the_median_map(rank, monkeypatch):
    """Half of the maps change in one direction, half in three alike; the embedding does not count."""

    def learn(model, *_):
        for i, p in enumerate(p for path, p in trained(model).items() if path.endswith(".A")):
            p.data = np.eye(*p.data.shape, dtype=np.float32)
            p.data[1 if i < 7 else 3 :] = 0
        for p in (p for path, p in trained(model).items() if path.endswith(".B")):
            p.data = np.eye(*p.data.shape, dtype=np.float32)
        if not rank:
            maps = [p for path, p in named_params(model).items() if path.endswith("_proj.weight")]
            for i, p in enumerate([*maps, model.model.embed_tokens.weight]):
                change = np.eye(*p.data.shape, dtype=np.float32)
                change[1 if i < 7 else 3 :] = 0
                p.data = p.data + 10 * change

    monkeypatch.setattr(known, "learn", learn)
    row = known.work(cell(REVERSED, 0, rank), made())
    assert row["effective_rank"] == pytest.approx(2, abs=1e-3)


def test_the_committed_rows_stay_as_they_are_and_new_ones_follow(tmp_path, monkeypatch):
    """Every planted run of the default plan has the id that it had before there was reversed text."""
    file = Path(__file__).parents[2] / "figures/known-rank/rows.jsonl"
    rows = [row for row in harness.read_rows(file, known.FORM) if row["config"]["task"] != REVERSED]
    done = {row["id"]: row for row in rows}
    digests = dict(
        zip([OWN, *(f"permuted:{k}" for k in Plan().planted)], rows[0]["config"]["texts"], strict=True)
    )

    def read_inputs(base, targets):
        texts = {target: text(target) for target in targets}
        for target, one in texts.items():
            vars(one)["digest"] = digests[target]
        return harness.Inputs(base, made().base, texts)

    def work(run, inputs):
        if run.task != REVERSED:
            return {name: value for name, value in done[run.id].items() if name != "versions"}
        row = {
            "id": run.id,
            "config": asdict(run),
            "source": "",
            "status": "done",
            "valid": abs(run.lr - 2e-3),
        }
        if run.kind == "search":
            return row
        return row | {"excess": 0.5, "losses": [1.5, 2.0, 1.0], "effective_rank": 1.0}

    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(harness, "read_inputs", read_inputs)
    monkeypatch.setattr(known, "work", work)
    again = known.run(Plan(), tmp_path, jobs=1)
    assert [row | {"versions": None} for row in again[: len(rows)]] == [
        row | {"versions": None} for row in rows
    ]
    new = again[len(rows) :]
    assert {row["config"]["task"] for row in new} == {REVERSED}
    for r in DEPTHS:
        tried = [row["config"]["lr"] for row in new if row["config"]["rank"] == r]
        assert tuple(tried[:3]) == (TEXT.lora_rates if r else TEXT.full_rates)
    finals = [row["config"] for row in new if row["config"]["kind"] == "final"]
    assert [(c["rank"], c["seed"]) for c in finals] == [(r, seed) for r in DEPTHS for seed in range(5)]


# ---- splits and rates


def with_other(inputs, split):
    """The inputs with one split of every text reversed."""
    texts = {name: replace(t, **{split: getattr(t, split)[::-1]}) for name, t in inputs.texts.items()}
    return replace(inputs, texts=texts)


@pytest.mark.parametrize("task", ["teacher", "permutation", REVERSED])
def test_a_search_does_not_see_the_test_split_and_a_measurement_does(task):
    inputs, search = made(), cell(task, kind="search")
    row, unseen, other = (
        known.work(search, x) for x in (inputs, with_other(inputs, "test"), with_other(inputs, "valid"))
    )
    assert set(row) == {"id", "config", "source", "status", "valid"}
    assert row["valid"] == unseen["valid"] != other["valid"]
    final = cell(task)
    assert known.work(final, inputs)["excess"] != known.work(final, with_other(inputs, "test"))["excess"]


@pytest.mark.parametrize("task", ["teacher", "permutation", REVERSED])
def test_training_has_the_steps_and_the_batch_of_the_plan(task, monkeypatch):
    """And a window is trained on once drawn; those measured on are spread over the split."""
    seen, real = [], known.drawn

    def drawn(*how):
        for batch in real(*how):
            seen.append(batch[0].shape)
            yield batch

    monkeypatch.setattr(known, "drawn", drawn)
    run = cell(task, plan=replace(PLAN, steps=(1, 7, 9), batch=3))
    known.work(run, made())
    assert seen == [(3, 16)] * run.steps
    assert sum(len(ids) for ids, _ in recipe.windows(made().texts[OWN], "test", PLAN.windows)) == PLAN.windows


def test_a_search_takes_a_third_of_the_steps():
    assert [cell(task, kind="search").steps for task in (*TASKS, REVERSED)] == [20, 1, 1, 1]
    assert [cell(task).steps for task in (*TASKS, REVERSED)] == [60, 4, 5, 5]


def test_the_rate_of_each_cell_is_the_best_of_its_search(rows):
    def of(row):
        return tuple(row["config"][name] for name in ("task", "planted", "rank"))

    searches = [row for row in rows if row["config"]["kind"] == "search"]
    finals = [row for row in rows if row["config"]["kind"] == "final"]
    cells = [(task, k, r) for task in TASKS for k in PLAN.planted for r in ranks(k)]
    cells += [(REVERSED, 0, r) for r in FEW]
    assert [of(row) for row in searches[::2]] == cells
    assert [of(row) for row in finals[::2]] == cells
    for row in finals:
        tried = {r["config"]["lr"]: r["valid"] for r in searches if of(r) == of(row)}
        assert len(tried) == 2
        assert tried[row["config"]["lr"]] == min(tried.values())
    assert {row["config"]["seed"] for row in searches} == {harness.SEARCH_SEED}
    assert [row["config"]["seed"] for row in finals[:2]] == [0, 1]


def test_ranks_are_below_at_and_beyond_the_planted_one():
    assert ranks(1) == (1, 2, 16)
    assert ranks(4) == (2, 3, 4, 8, 16)
    assert ranks(8) == (4, 7, 8, 16)
    assert ranks(13) == (6, 12, 13, 16)


# ---- reading the rows


def row_of(task, k, r, excess, spectrum=(1.0,), best=0.0, seed=0, status="done"):
    config = {"kind": "final", "task": task, "planted": k, "rank": r, "seed": seed, "lr": 3e-3}
    return {"status": status, "config": config, "excess": excess, "best": best, "spectrum": list(spectrum)}


CRAFTED = [
    row_of("map", 2, 1, 0.5, best=0.4), row_of("map", 2, 2, 0.01),
    row_of("map", 2, 16, 0.0, (5, 4, 0.5, 0.4)),
    row_of("map", 4, 2, 0.01), row_of("map", 4, 4, 0.0), row_of("map", 4, 16, 0.0, (5, 4, 3, 0.01)),
    row_of("map", 2, 1, 0.0, best=0.4, seed=1), row_of("map", 2, 2, 0.03, seed=1),
    row_of("map", 2, 16, 0.0, (5, 0.1, 0.1), seed=1), row_of("map", 2, 1, 9.0, seed=2, status="diverged"),
]  # fmt: skip


def test_tables_and_sentences_by_hand():
    assert elbow(CRAFTED, "map", 2) == 2
    assert elbow(CRAFTED, "map", 4) == 2
    (table,) = tables(CRAFTED)
    assert table.rows[0] == ("map", "2", "1", "0.2500 (0.0000 to 0.5000)", "0.4000", "")
    assert table.rows[2][-1] == "1 of 2"
    assert len(table.rows) == 6
    assert sentences(CRAFTED) == [
        "map: nothing is left to gain from the planted rank on, and not before, for 1 of 2 ranks; "
        "the spectrum at r = 16 shows it in 1 of 3 runs."
    ]
    assert spread([3.0, 1.0, 2.0], ".4f") == "2.0000 (1.0000 to 3.0000)"


REVERSE = [
    row_of(REVERSED, 0, r, x, seed=i) | {"losses": [1.5 + x, 5.5, 1.5], "effective_rank": used}
    for r, used, some in ((0, 60.0, (0.1, 0.2)), (64, 32.0, (0.2, 0.3)), (1, 0.5, (0.5, 0.6)))
    for i, x in enumerate(some)
]  # fmt: skip


def test_reversed_text_is_read_by_hand():
    assert [(r, x.tolist()) for r, x in left(REVERSE).items()] == [
        (1, [0.5, 0.6]),
        (64, [0.2, 0.3]),
        (0, [0.1, 0.2]),
    ]
    assert left(CRAFTED) == {}
    assert levels(REVERSE) == (5.5, 1.5)
    both = [*CRAFTED, *REVERSE]
    planted, text = tables(both)
    assert planted.rows == tables(CRAFTED)[0].rows
    assert text.rows[0] == (
        "r = 1",
        "0.003",
        "2.050 (2.000 to 2.100)",
        "0.550 (0.500 to 0.600)",
        "0.5 (0.5 to 0.5)",
    )
    assert [row[0] for row in text.rows] == ["r = 1", "r = 64", "all weights"]
    assert "the base has 5.500, and 1.500 forwards" in text.caption
    assert sentences(both) == [
        *sentences(CRAFTED),
        "reversed text, on which the base has 5.50 nats and 1.50 forwards: what is left of the "
        "excess is 55% with r = 1, 25% with r = 64, 15% with all weights.",
    ]


def test_the_figure_of_reversed_text_is_drawn_if_it_was_tried():
    assert pictures(CRAFTED).keys() == {"elbows", "found"}
    drawn = pictures([*CRAFTED, *REVERSE])
    assert drawn.keys() == {"elbows", "found", "reversed"}
    for name in ("elbows", "found"):
        assert drawn[name].figure.get_suptitle() == pictures(CRAFTED)[name].figure.get_suptitle()
    (ax,) = drawn["reversed"].figure.axes
    lora, full = ax.lines
    assert lora.get_xydata() == pytest.approx(np.array([[1, 55], [64, 25]]))
    assert full.get_ydata() == pytest.approx([15, 15])
    assert "55% with r = 1, 25% with r = 64, 15% with all weights" in drawn["reversed"].figure.get_suptitle()


def test_rows_without_a_measurement_are_refused(rows):
    with pytest.raises(ConfigError, match="nothing was measured"):
        tables([row for row in rows if row["config"]["kind"] == "search"])


@pytest.mark.slow
def test_the_same_rows_give_the_same_figures(rows):
    drawn, again = pictures(rows), pictures(rows)
    assert drawn.keys() == {"elbows", "found", "reversed"}
    for name, picture in drawn.items():
        assert picture.encoded("svg") == again[name].encoded("svg")
        assert "rank" in picture.says


@pytest.mark.slow
def test_a_finished_folder_is_read_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "read_inputs", lambda base, targets: made())
    monkeypatch.setattr(known, "DEPTHS", FEW)
    plan = replace(PLAN, planted=(1,), seeds=1)
    first = known.run(plan, tmp_path, jobs=1)
    data = (tmp_path / "rows.jsonl").read_bytes()
    monkeypatch.setattr(known, "DO", {})
    assert known.run(plan, tmp_path, jobs=1) == first
    assert (tmp_path / "rows.jsonl").read_bytes() == data
    assert harness.read_rows(tmp_path / "rows.jsonl", known.FORM) == first


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("excess", "low"),
        ("best", None),
        ("spectrum", [-1.0]),
        ("status", "lost"),
        ("more", 1),
        ("losses", [1.0, 2.0]),
        ("effective_rank", -1.0),
    ],
)
def test_a_row_that_no_run_writes_is_refused(field, value, rows, tmp_path):
    (planted, *_), (text, *_) = (
        [
            row
            for row in rows
            if row["config"]["kind"] == "final" and (row["config"]["task"] == REVERSED) == is_text
        ]
        for is_text in (False, True)
    )
    row = (text if field in text and field not in planted else planted) | {field: value}
    (tmp_path / "rows.jsonl").write_bytes(harness.sealed(row))
    with pytest.raises(FormatError, match=f"line 1: row.*{field}"):
        harness.read_rows(tmp_path / "rows.jsonl", known.FORM)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": ()}, "grid is empty"), ({"planted": ()}, "grid is empty"), ({"seeds": 0}, "seeds"),
        ({"tasks": ("maps",)}, "no task 'maps'"), ({"steps": (1, 2)}, "expected 3, one for each task"),
        ({"planted": (0,)}, "planted"), ({"planted": (16,)}, "at most 15"), ({"steps": (1, 2, 0)}, "steps"),
    ],
)  # fmt: skip
def test_an_empty_or_impossible_plan_is_refused(change, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        Plan(**change)


def test_the_committed_students_have_found_a_teacher_of_this_strength():
    """All k singular values of Δ Σ^1/2 are SHIFT; those of a student that has learned it are near to it."""
    rows = harness.read_rows(Path(__file__).parents[2] / "figures/known-rank/rows.jsonl", known.FORM)
    students = [row for row in finals(rows) if row["config"]["task"] == "teacher"]
    done = [row for row in students if row["config"]["rank"] == row["config"]["planted"]]
    assert len(done) == 5 * len(Plan().planted)
    for row in done:
        S = np.array(row["spectrum"]) / known.SHIFT
        assert abs(np.median(S) - 1) < 0.01
        assert abs(S - 1).max() < NOTHING**0.5


def test_the_teacher_differs_in_the_middle_of_the_base_that_ships():
    assert f"model.layers.{Config().num_hidden_layers // 2}.self_attn.o_proj" == SITE


def test_the_rank_shown_is_that_of_each_seeds_spectrum():
    assert shown(CRAFTED, "map", 2) == [2, 1]
