"""The experiment with added adapters: it measures what it says, on text that nothing was trained on."""

import copy
from dataclasses import replace

import numpy as np
import pytest

from minilora.data.batching import eval_batches
from minilora.data.corpora import Corpus
from minilora.errors import ConfigError, FormatError
from minilora.experiments import adding_adapters as adding
from minilora.experiments import harness, recipe
from minilora.experiments.adding_adapters import JOINT, METHODS, OWN, TIMES, Plan, Run, mixtures
from minilora.experiments.adding_figures import (
    along,
    finals,
    gains,
    kept,
    pictures,
    sentences,
    tables,
)
from minilora.formats.checkpoint import History
from minilora.lora import active, fuse, set_adapter
from minilora.model import Config, llama
from minilora.training import evaluate
from minilora.tree import digest, freeze, named_params

TINY = Config(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=16)  # fmt: skip
PLAN = Plan(
    rank=2, rates=(1e-2, 3e-2), steps=3, search_steps=2, seeds=2, batch=2, test_windows=3, valid_windows=2
)
TEXTS = (*PLAN.targets, OWN)
SCALES = (0.5, 1.0)


def text(name, seed):
    """A text of a few letters of its own."""
    ids = np.random.default_rng(seed).integers(60 + 5 * seed, 70 + 5 * seed, 3000).astype(np.uint8)
    return Corpus(name, f"text {name}", *np.split(ids, [2000, 2500]))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Short windows, two scales, one method; the rows have all methods."""
    monkeypatch.setattr(recipe, "LENGTH", 16)
    monkeypatch.setattr(adding, "SCALES", SCALES)
    monkeypatch.setattr(adding, "METHODS", {"linear": METHODS["linear"]})


def made():
    """A tiny base, frozen, and four texts."""
    base = llama(TINY, np.random.default_rng(0))
    freeze(base)
    return harness.Inputs("base", base, {name: text(name, i) for i, name in enumerate(TEXTS)})


def final(seed=0, rate=1e-2):
    return Run("final", PLAN, seed, tuple((name, rate) for name in (*PLAN.targets, JOINT)))


def other_split(inputs, split):
    """The inputs with one split of every text replaced by another text's letters."""
    texts = {name: replace(t, **{split: getattr(t, split)[::-1] ^ 1}) for name, t in inputs.texts.items()}
    return replace(inputs, texts=texts)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """All rows of the tiny plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "LENGTH", 16)
        patch.setattr(adding, "SCALES", SCALES)
        patch.setattr(harness, "read_inputs", lambda base, targets: made())
        return adding.run(PLAN, tmp_path_factory.mktemp("rows"), jobs=1)


def test_a_combination_is_the_base_with_the_sum_of_the_changes():
    """Measured again on a plain model with W + Σ w ΔW, from adapters that were trained alone."""
    inputs, run = made(), final()
    deltas = {}
    for name, rate in run.rates:
        model = copy.deepcopy(inputs.base)
        adding.learned(model, name, rate, run, inputs, PLAN.steps)
        deltas[name] = {path: adapter.delta() for path, adapter in active(model).items()}
    assert all(delta.any() for found in deltas.values() for delta in found.values())
    row = adding.work(run, inputs)

    def loss(weights, on, split="test", windows=3):
        model = copy.deepcopy(inputs.base)
        adding.learned(model, "x", 1e-9, replace(run), replace(inputs, texts={"x": inputs.texts["kjv"]}), 1)
        set_adapter(model, "x")
        fuse(model)
        plain, exact = named_params(model), named_params(inputs.base)
        for path, p in plain.items():
            p.data = exact[path].data.copy()
            for name, w in weights.items():
                if (delta := deltas[name].get(path.removesuffix(".weight"))) is not None:
                    p.data += np.float32(w) * delta
        return evaluate(model, eval_batches(getattr(inputs.texts[on], split), 16, 16, limit=windows * 16))

    expected = {"base": {}, JOINT: {JOINT: 1}} | mixtures(PLAN.targets)
    assert row["losses"].keys() == expected.keys()
    for name, weights in expected.items():
        assert row["losses"][name].keys() == set(TEXTS)
        for on in TEXTS:
            assert row["losses"][name][on] == pytest.approx(loss(weights, on), rel=1e-5), (name, on)
    for pair, path in row["paths"].items():
        one, other = pair.split(" to ")
        assert [t for t, _ in path] == list(TIMES)
        for t, found in path:
            assert found["kjv"] == pytest.approx(loss({one: 1 - t, other: t}, "kjv"), rel=1e-5)
    scale = row["methods"]["linear"]["scale"]
    valid = [sum(loss(dict.fromkeys(PLAN.targets, λ), on, "valid", 2) for on in PLAN.targets) for λ in SCALES]
    assert scale == SCALES[int(np.argmin(valid))]
    found = row["methods"]["linear"]["losses"]["code"]
    assert found == pytest.approx(loss(dict.fromkeys(PLAN.targets, scale), "code"), rel=1e-5)


def test_the_base_stays_as_it_was():
    inputs = made()
    before = digest(inputs.base)
    adding.work(final(), inputs)
    assert digest(inputs.base) == before


def test_test_text_decides_nothing_and_validation_text_only_the_scale():
    inputs = made()
    row, unseen, other = (
        adding.work(final(), x) for x in (inputs, other_split(inputs, "test"), other_split(inputs, "valid"))
    )
    assert row["losses"] == other["losses"]
    assert row["paths"] == other["paths"]
    assert row["losses"] != unseen["losses"]
    linear, again = row["methods"]["linear"], unseen["methods"]["linear"]
    assert linear["scale"] == again["scale"] in SCALES
    assert linear["residual"] == again["residual"]
    assert linear["losses"] != again["losses"]
    search = Run("search", PLAN, 0, (("kjv", 1e-2),))
    assert adding.work(search, inputs)["valid"] == adding.work(search, other_split(inputs, "test"))["valid"]
    assert adding.work(search, inputs)["valid"] != adding.work(search, other_split(inputs, "valid"))["valid"]


def test_only_scales_are_measured_on_validation_text(monkeypatch):
    splits, real = [], adding.losses

    def losses(model, run, inputs, split, texts):
        splits.append(split)
        return real(model, run, inputs, split, texts)

    monkeypatch.setattr(adding, "losses", losses)
    adding.work(final(), made())
    measured = 2 + len(mixtures(PLAN.targets)) + 3 * len(TIMES)  # joint and base, the map, three ways
    assert splits == ["test"] * measured + ["valid"] * len(SCALES) + ["test"]


def test_the_combinations_are_these():
    assert mixtures(("a", "b")) == {
        "a": {"a": 1}, "b": {"b": 1}, "a + b": {"a": 1, "b": 1}, "mean of all": {"a": 0.5, "b": 0.5},
        "- a": {"a": -1}, "- b": {"b": -1},
    }  # fmt: skip


def test_the_joint_adapter_sees_every_text_as_often(monkeypatch):
    seen = []

    def train(model, batches, optimizer, *, steps, **how):
        seen.extend(int(x.min()) // 5 for (x, _), _ in zip(batches, range(steps), strict=False))
        return History()

    monkeypatch.setattr(recipe, "train", train)
    model = copy.deepcopy(made().base)
    adding.learned(model, JOINT, 1e-2, final(), made(), 4)
    assert seen == [12, 13, 14] * 4  # 60, 65 and 70: folio, kjv, code in turn


def test_the_rate_of_each_adapter_is_the_best_of_its_search(rows):
    searches = [row for row in rows if row["config"]["kind"] == "search"]
    assert len(searches) == 4 * 2
    for row in finals(rows):
        for name, rate in row["config"]["rates"]:
            tried = {
                r["config"]["rates"][0][1]: r["valid"] for r in searches if r["config"]["rates"][0][0] == name
            }
            assert tried[rate] == min(tried.values())
    assert [row["config"]["seed"] for row in finals(rows)] == [0, 1]
    assert all(row["config"]["seed"] == harness.SEARCH_SEED for row in searches)


def test_tables_say_what_the_rows_say(rows):
    done = finals(rows)
    heat, methods = tables(rows)
    assert [line[0] for line in heat.rows] == [*mixtures(PLAN.targets), JOINT]
    assert [line[0] for line in methods.rows] == [*METHODS, JOINT, "mean of all"]
    g = [row["losses"]["- code"]["kjv"] - row["losses"]["base"]["kjv"] for row in done]
    line = next(line for line in heat.rows if line[0] == "- code")
    assert line[1 + TEXTS.index("kjv")] == f"{np.median(g):+.3f} ({min(g):+.3f} to {max(g):+.3f})"
    assert gains(done, "ties", ["code"])[1, 0] == (
        done[1]["methods"]["ties"]["losses"]["code"] - done[1]["losses"]["base"]["code"]
    )
    way = along(done, "folio", "code", "kjv")
    assert way.shape == (2, len(TIMES) + 2)
    assert (way[:, 0] == gains(done, "folio", ["kjv"])[:, 0]).all()
    assert (way[:, -1] == gains(done, "code", ["kjv"])[:, 0]).all()
    half = [dict(map(tuple, ((t, f["code"]) for t, f in row["paths"]["folio to code"])))[0.5] for row in done]
    share = (half - np.array([row["losses"]["base"]["code"] for row in done])) / gains(
        done, "code", ["code"]
    )[:, 0]
    assert kept(done, "folio", "code", "code") == pytest.approx(np.median(share))


def test_sentences_count_and_sort_the_medians():
    """Two texts, three seeds, all numbers by hand; the base has a loss of 2 on each text."""
    names = {"a + b": (1, -1), "mean of all": (-1, -2), "- a": (0.5, 3), "- b": (4, 0.25), JOINT: (-3, -3)}

    def on(more, seed):  # the middle one of three seeds is the median
        a, b = (2 + x + (seed - 1) * 10 for x in more)
        return {"a": a, "b": b, OWN: 2.125 + (seed - 1) * 10}

    def row(seed):
        methods = {name: {"losses": on((-i, -i), seed)} for i, name in enumerate(METHODS)}
        losses = {"base": {"a": 2, "b": 2, OWN: 2}} | {name: on(more, seed) for name, more in names.items()}
        plan = {"targets": ["a", "b"]}
        return {
            "status": "done",
            "config": {"kind": "final", "plan": plan},
            "losses": losses,
            "methods": methods,
        }

    order = ", ".join(f"{name} {-i:+.2f}" for i, name in reversed([*enumerate(METHODS)]))
    assert sentences([row(seed) for seed in range(3)]) == [
        "All adapters at weight 1 are worse than none on 1 of 2 texts; their mean is better than none on 2.",
        f"Best to worst: {order}; one adapter trained on all texts has -3.00.",
        "An adapter taken away adds to the loss on its text and on the base's own: a +0.50 and +0.12, "
        "b +0.25 and +0.12.",
    ]


@pytest.mark.slow
def test_the_same_rows_give_the_same_figures(rows):
    drawn, again = pictures(rows), pictures(rows)
    assert drawn.keys() == {"interpolation", "heat_map", "methods"}
    for name, picture in drawn.items():
        assert picture.encoded("svg") == again[name].encoded("svg")
        assert "seed" in picture.says
        svg = picture.encoded("svg").decode()
        assert "nats" in svg


@pytest.mark.slow
def test_a_finished_folder_is_read_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "read_inputs", lambda base, targets: made())
    plan = replace(PLAN, seeds=1, rates=(1e-2,))
    first = adding.run(plan, tmp_path, jobs=1)
    data = (tmp_path / "rows.jsonl").read_bytes()
    monkeypatch.setattr(adding, "learned", None)
    assert adding.run(plan, tmp_path, jobs=1) == first
    assert (tmp_path / "rows.jsonl").read_bytes() == data
    assert harness.read_rows(tmp_path / "rows.jsonl", adding.FORM) == first


@pytest.mark.parametrize(
    ("field", "value"),
    [("losses", {"base": {"kjv": "low"}}), ("paths", {"a to b": [[2, {}]]}), ("methods", {"ties": {}}),
     ("status", "lost"), ("more", 1), ("valid", 1.0)],
)  # fmt: skip
def test_a_row_that_no_run_writes_is_refused(field, value, rows, tmp_path):
    row = {k: v for k, v in rows[-1].items() if k != "sha256"} | {field: value}
    (tmp_path / "rows.jsonl").write_bytes(harness.sealed(row))
    with pytest.raises(FormatError, match=f"line 1: row.*{field}"):
        harness.read_rows(tmp_path / "rows.jsonl", adding.FORM)


@pytest.mark.parametrize(
    "change", [{"targets": ("kjv",)}, {"rates": ()}, {"steps": 0}, {"seeds": 1.5}, {"alpha": 0}]
)
def test_an_empty_or_impossible_plan_is_refused(change):
    with pytest.raises(ConfigError):
        Plan(**change)


def test_a_seed_that_diverged_is_left_out(rows):
    lost = [row | {"status": "diverged"} if row["config"]["seed"] == 1 else row for row in rows]
    assert [row["config"]["seed"] for row in finals(lost)] == [0]


def test_rows_without_a_seed_are_refused(rows):
    with pytest.raises(ConfigError, match="nothing was measured"):
        tables([row for row in rows if row["config"]["kind"] == "search"])
