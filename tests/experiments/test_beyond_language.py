"""The experiment beyond language: what each task shows, which run trains what, and what the rows say."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from minilora.data import digits as data
from minilora.data.digits import Images, digits
from minilora.errors import ConfigError, FormatError, NonFiniteError, UnsupportedError
from minilora.experiments import beyond_language as beyond
from minilora.experiments import beyond_tasks as tasks
from minilora.experiments import harness
from minilora.experiments.beyond_figures import compared, found, pictures, sentences, tables
from minilora.experiments.beyond_language import Plan, Run
from minilora.experiments.beyond_tasks import CLASSIFIED, DRAWN, NEW, OLD
from minilora.lora import active
from minilora.methods.full_copy import FullCopy
from minilora.model import Config, llama
from minilora.optim import AdamW
from minilora.spectra import spectrum_between
from minilora.tree import digest, freeze, named_params, trained
from minilora.vision.diffusion import signal

SHAPE = Config(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
               num_key_value_heads=2)  # fmt: skip
PLAN = Plan(
    ranks=(2, 3, 6), planted=(1, 3), rates=(1e-2, 2e-2), full_rates=(1e-3,), permuted_rates=(3e-2,),
    pretraining=4, drawing_pretraining=5, steps=3, permuted_steps=6, drawing_steps=2, seeds=2, batch=7,
    samples=16,
)  # fmt: skip
WIDE = Plan(seeds=3)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiny bases, a short diffusion, and nothing of the texts."""
    monkeypatch.setattr(tasks, "SHAPE", SHAPE)
    monkeypatch.setattr(tasks, "TIMES", 5)
    monkeypatch.setattr(tasks, "pretrained", cached(tasks.pretrained.__wrapped__))
    monkeypatch.setattr(harness, "read_inputs", lambda base, targets: texts())


bases = {}


def cached(make):
    """One cache for this file, beside that of the package."""

    def pretrained(*key):
        if key not in bases:
            bases[key] = make(*key)
        return bases[key]

    return pretrained


def texts():
    base = llama(SHAPE, np.random.default_rng(0))
    freeze(base)
    return harness.Inputs("base", base, {})


def cell(task, kind="final", **how):
    return Run(
        kind, **{"plan": PLAN, "task": task, "method": "lora", "rank": 2, "rate": 1e-2, "seed": 3} | how
    )


TASKS = (*CLASSIFIED, "permuted:1", "permuted:3", DRAWN)

# ---- what is seen


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_task_shows_changed_pixels_of_one_split(task, split):
    """Of its digits only; each image once, by its pixels."""
    base = beyond.base_of(cell(task))
    some, plain = tasks.seen(task, split, base), getattr(digits(), split)
    shown = plain.of(NEW if task in ("5 to 9", DRAWN) else OLD)
    images = shown.pixels.reshape(-1, 8, 8)
    if task == "inverted":
        images = -images
    if task == "rotated":
        images = images.transpose(0, 2, 1)[:, ::-1]
    if "permuted" in task:
        images = images.copy()
        a, b, c, d = (images[:, i::2, j::2].copy() for i in (0, 1) for j in (0, 1))
        if task == "permuted:1":
            images[:, ::2, ::2], images[:, ::2, 1::2] = b, a
        else:
            images[:, ::2, ::2], images[:, ::2, 1::2] = d, a
            images[:, 1::2, ::2], images[:, 1::2, 1::2] = b, c
    assert np.array_equal(some.pixels, images.reshape(-1, 64))
    labels = base(shown.pixels)[0] if "permuted" in task else shown.labels
    assert np.array_equal(some.labels, labels)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_permutation_has_the_rank_of_its_name_and_a_known_answer(k):
    task = f"permuted:{k}"
    P = np.eye(4)[tasks.order(k)]
    assert np.linalg.matrix_rank(P - np.eye(4)) == k
    base = beyond.base_of(cell(task))
    answer = tasks.known(base, task)
    logits = answer(tasks.seen(task, "test", base).pixels)[0]
    plain = base(digits().test.of(OLD).pixels)[0]
    assert np.allclose(logits, plain, rtol=0, atol=1e-5 * abs(plain).max())
    S = spectrum_between(base, answer)
    assert (S["encoder.patch_embedding"] > 1e-6).sum() == k
    assert not any(s.any() for path, s in S.items() if path != "encoder.patch_embedding")
    row = beyond.measured(replace(cell(task), kind="known", method="", rank=0))
    assert row["test"] < 1e-9 < beyond.measured(replace(cell(task), kind="base"))["test"]
    assert row["share"] == 1
    assert row["parameters"] == 0


def test_bases_see_only_old_digits_to_train_on(monkeypatch):
    seen = []
    real = tasks.drawn

    def drawn(model, images, rng, batch):
        seen.append(images)
        return real(model, images, rng, batch)

    monkeypatch.setattr(tasks, "drawn", drawn)
    for draws in (False, True):
        model = tasks.pretrained.__closure__[0].cell_contents(draws, 2, 3)
        assert not trained(model)
    for images in seen:
        assert np.array_equal(images.pixels, digits().train.of(OLD).pixels)
    assert len(seen) == 2


@pytest.mark.parametrize("task", TASKS)
def test_test_images_choose_no_rate_and_validation_images_measure_nothing(task, monkeypatch):
    """Other pixels in a split change what is measured on it, and nothing else."""
    whole = digits()

    def row(kind, split=None):
        changed = (
            replace(
                whole, **{split: Images(0.9 * getattr(whole, split).pixels, getattr(whole, split).labels)}
            )
            if split
            else whole
        )
        monkeypatch.setattr(tasks, "digits", lambda: changed)
        return beyond.measured(cell(task, kind))

    beyond.base_of(cell(task))  # of the images as they are
    for kind, seen, unseen in (("search", "valid", "test"), ("final", "test", "valid")):
        one = row(kind)
        assert row(kind, unseen) == one
        assert unseen not in one
        assert row(kind, seen)[seen] != one[seen]
        assert row(kind, "train")[seen] != one[seen]


# ---- one run


@pytest.mark.parametrize("task", TASKS)
def test_each_way_to_adapt_trains_what_it_says(task):
    base = beyond.base_of(cell(task))
    shapes = {path.removesuffix(".weight"): p.shape for path, p in named_params(base).items()}
    model = beyond.prepared(cell(task, rank=6))
    adapters = active(model)
    low = {path for path, adapter in adapters.items() if not isinstance(adapter, FullCopy)}
    maps = {path for path in shapes if path.endswith(("_proj", "patch_embedding", "output"))}
    assert low == ({"encoder.patch_embedding"} if "permuted" in task else maps)
    assert adapters.keys() - low == ({"classifier"} if task in CLASSIFIED else set())
    for path in low:
        pair = adapters[path].low_rank
        assert len(pair.A.data) == min(6, *shapes[path])
        assert pair.scale == beyond.SCALE
    if "permuted" not in task:
        full = beyond.prepared(cell(task, method="full", rank=0))
        assert trained(full).keys() == named_params(base).keys()
    if task in CLASSIFIED:
        assert trained(beyond.prepared(cell(task, method="head", rank=0))).keys() == {"classifier.weight"}


@pytest.mark.parametrize("task", TASKS)
def test_the_base_stays_as_it_was_and_what_is_trained_moves(task):
    base = beyond.base_of(cell(task))
    before = digest(base)
    rows = [beyond.work(replace(cell(task), kind=kind), texts()) for kind in ("base", "search", "final")]
    assert digest(base) == before
    assert [row["status"] for row in rows] == ["done"] * 3
    assert rows[0]["parameters"] == 0 < rows[1]["parameters"] == rows[2]["parameters"]
    assert rows[0]["test"] != rows[2]["test"]
    assert all("scikit-learn" in row["source"] for row in rows)
    for row in rows:
        json.dumps(row, allow_nan=False)
        beyond.FORM.check("row", {k: v for k, v in row.items()} | {"versions": {}})


def test_permuted_pixels_are_trained_on_the_mean_square_of_logits():
    """The second step by hand."""
    run = cell("permuted:3", plan=replace(PLAN, permuted_steps=2))
    base = beyond.base_of(run)
    one = beyond.learned(run)
    model, rng = beyond.prepared(run), np.random.default_rng([3, 1])
    images, optimizer = tasks.seen("permuted:3", "train", base), AdamW(1e-2, betas=(0.9, 0.99))
    for factor in (1.0, 0.5):  # of a cosine over two steps
        i = rng.integers(len(images.labels), size=7)
        logits, back = model(images.pixels[i], train=True)
        back((2 / logits.size) * (logits - images.labels[i]))
        optimizer.step(trained(model), 1e-2 * factor)
    assert digest(model) == digest(one)


def test_a_drawing_is_new_if_the_nearest_training_image_is():
    train = digits().train
    for some, share in ((NEW, 1.0), (OLD, 0.0)):
        assert tasks.new(train.of(some).pixels[:20] * np.float32(0.98)) == share
    both = np.concatenate([train.of(NEW).pixels[:3], train.of(OLD).pixels[:1]])
    assert tasks.new(both) == 0.75


def test_drawings_are_compared_in_greys_with_the_share_that_is_new():
    train = digits().train
    old, mixed = (
        np.concatenate([train.of(some).pixels[:8] for some in two]) for two in ((OLD, OLD), (OLD, NEW))
    )
    picture = compared({"before": old, "after": mixed})
    axes = picture.figure.axes
    assert [ax.get_title() for ax in axes] == ["before: 0%", "after: 50%"]
    assert picture.says.endswith("from 5 to 9: before 0%, after 50%.")
    for ax, some in zip(axes, (old, mixed), strict=True):
        sheet = np.asarray(ax.get_images()[0].get_array())
        assert sheet.shape == (50, 30)
        assert np.allclose(sheet[1:9, 11:19], (some[1].reshape(8, 8) + 1) * 8)


def test_drawings_are_kept_as_greys_in_their_order(monkeypatch):
    """Those of the base by its seed; 15 of all that are counted."""
    drawn = np.linspace(-1, 1, 16 * 64).reshape(16, 64)
    given = []
    monkeypatch.setattr(
        beyond, "sample", lambda model, count, rng: given.append(rng.random()) or drawn[:count]
    )
    row = beyond.measured(cell(DRAWN, "base"))
    assert given == [np.random.default_rng([3, 2]).random()]
    assert row["samples"] == [round((x + 1) * 8) for x in drawn[:15].ravel().tolist()]
    assert row["share"] == tasks.new(drawn)
    assert set(row["samples"]) == set(range(16))


def test_the_loss_of_drawings_is_measured_with_the_same_noise():
    """By hand: four draws for each image, from one seed."""
    base = beyond.base_of(cell(DRAWN))
    images, rng, some = digits().test.of(NEW), np.random.default_rng(0), []
    for _ in range(4):
        time = rng.integers(1, 6, len(images.labels))
        noise = rng.standard_normal(images.pixels.shape)
        a = signal(5)[time][:, None]
        noisy = (np.sqrt(a) * images.pixels + np.sqrt(1 - a) * noise).astype(np.float32)
        guess = base(tasks.add_noise.__globals__["Noisy"](noisy, time))[0]
        some.append(float(((guess - noise.astype(np.float32)) ** 2).mean()))
    assert tasks.loss(base, DRAWN, "test", base) == pytest.approx(np.mean(some), rel=1e-5)


def test_a_loss_that_is_no_number_is_a_diverged_run(monkeypatch):
    monkeypatch.setattr(tasks, "square", lambda *_: (math.nan, 0.0))
    with pytest.raises(NonFiniteError, match="valid"):
        tasks.loss(
            beyond.base_of(cell("permuted:1")), "permuted:1", "valid", beyond.base_of(cell("permuted:1"))
        )
    row = beyond.work(Run("base", PLAN, "permuted:1"), texts())
    assert row["status"] == "diverged"
    assert "test" in row["error"]


def test_a_spectrum_is_relative_and_the_median_of_the_maps_in_blocks():
    full = beyond.measured(cell("rotated", method="full", rank=0))["spectrum"]
    lora = beyond.measured(cell("rotated"))["spectrum"]
    patch = beyond.measured(cell("permuted:3", rank=4))["spectrum"]
    assert (len(full), len(lora), len(patch)) == (8, 2, 4)
    for s in (full, lora, patch):
        assert s[0] == 1
        assert sorted(s, reverse=True) == s
    base = beyond.base_of(cell("rotated"))
    S = spectrum_between(base, beyond.learned(cell("rotated", method="full", rank=0)))
    some = [s[:8] / s[0] for path, s in S.items() if path.startswith("encoder.layers.0.")]
    assert len(some) == 7
    assert full == pytest.approx(np.median([np.pad(s, (0, 8 - len(s))) for s in some], 0), rel=1e-3, abs=1e-4)
    assert beyond.measured(cell("rotated", method="head", rank=0))["spectrum"] == []


# ---- the grid


LEVEL = {"5 to 9": 0.9, "inverted": 0.8, "rotated": 0.7, DRAWN: 0.6}


def share(task, method, rank):
    """What crafted rows are right in: the head alone half of all weights, LoRA nearer with each rank."""
    if tasks.planted(task):
        return 1.0 if rank >= tasks.planted(task) else 0.5
    high = LEVEL[task]
    return {"full": high, "head": high / 2, "lora": high * (1 - 0.25 / max(rank, 1)), "": 0.1}[method]


def crafted(run, inputs):
    """A row in no time, with its best rate in the middle of those to try, and two seeds to its sides."""
    c = asdict(run)
    row = {"id": run.id, "config": c, "source": "crafted", "status": "done", "parameters": 1}
    k, best = tasks.planted(run.task), run.plan.how(run.task, run.method == "full")[1][1]
    loss = 2.0 if run.kind == "base" else 1e-3 if k and run.rank >= k else 1.0
    if run.kind == "known":
        loss = 2e-12 * k
    if run.kind == "search":
        return row | {"valid": math.log(run.rate / best) ** 2}
    spectrum = [1.0] * k + [0.002] * (4 - k) if k else [1.0] * 3
    spectrum = [] if run.method in ("", "head") else spectrum[: run.rank or None]
    s = share(run.task, run.method, run.rank) + (0.0, 0.02, -0.02)[run.seed] * (run.kind == "final")
    samples = [(7 * i + run.seed) % 17 for i in range(15 * 64)] if run.task == DRAWN else []
    return row | {"test": loss, "share": min(s, 1.0), "spectrum": spectrum, "samples": samples}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Crafted rows of the usual grid, with three seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "read_inputs", lambda base, targets: texts())
        patch.setattr(beyond, "work", crafted)
        return beyond.run(WIDE, tmp_path_factory.mktemp("grid"), jobs=1)


def test_the_grid_is_every_task_by_every_way(rows):
    arms = found(rows).arms
    classified = {
        (t, m, r)
        for t in CLASSIFIED
        for m, r in (("full", 0), ("head", 0), *(("lora", r) for r in WIDE.ranks))
    }
    permuted = {(f"permuted:{k}", "lora", r) for k in (1, 2, 3) for r in (1, 2, 3, 4)}
    drawn = {(DRAWN, "full", 0), *((DRAWN, "lora", r) for r in (1, 4, 16))}
    assert arms.keys() == classified | permuted | drawn
    kinds = [row["config"]["kind"] for row in rows]
    assert kinds.count("base") == 7
    assert kinds.count("known") == 3
    assert kinds.count("search") == 3 * len(arms)
    assert kinds.count("final") == 3 * len(arms)
    for (task, method, _), some in arms.items():
        assert [row["config"]["seed"] for row in some] == [0, 1, 2]
        steps, rates = WIDE.how(task, method == "full")
        assert {row["config"]["rate"] for row in some} == {rates[1]}
        assert steps == (
            WIDE.permuted_steps if "permuted" in task else WIDE.drawing_steps if task == DRAWN else WIDE.steps
        )
    assert {row["config"]["seed"] for row in rows if row["config"]["kind"] == "search"} == {
        harness.SEARCH_SEED
    }


def test_without_scikit_learn_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "digits_file", lambda: (_ for _ in ()).throw(UnsupportedError("vision")))
    monkeypatch.setattr(beyond, "digits", data.digits.__wrapped__)
    with pytest.raises(UnsupportedError):
        beyond.run(PLAN, tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_is_read_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(beyond, "work", crafted)
    first = beyond.run(WIDE, tmp_path, jobs=1)
    lines = (tmp_path / "rows.jsonl").read_bytes()
    monkeypatch.setattr(beyond, "work", None)
    assert beyond.run(WIDE, tmp_path, jobs=1) == first
    assert (tmp_path / "rows.jsonl").read_bytes() == lines
    assert harness.read_rows(tmp_path / "rows.jsonl", beyond.FORM) == first


# ---- reading


def test_the_way_from_the_head_alone_to_all_weights(rows):
    f = found(rows)
    for task in CLASSIFIED:
        assert f.floor(task) == pytest.approx(LEVEL[task] / 2)
        for r in WIDE.ranks:
            assert f.closed(task, r) == pytest.approx(1 - 0.5 / r)
    assert f.floor(DRAWN) == 0.1
    assert f.closed(DRAWN, 4) == pytest.approx((0.6 * (1 - 0.25 / 4) - 0.1) / 0.5)


def test_an_elbow_is_the_first_rank_that_leaves_nothing_and_the_spectrum_shows_it(rows):
    f = found(rows)
    for k in (1, 2, 3):
        assert f.elbow(f"permuted:{k}") == k
        assert f.shown(f"permuted:{k}") == [k] * 3
        assert f.excess(f"permuted:{k}", 4) == pytest.approx([0.0005] * 3)
    lost = [
        row | ({"test": 1.0} if row["config"]["task"] == "permuted:2" and "test" in row else {})
        for row in rows
    ]
    assert found(lost).elbow("permuted:2") is None


def test_tables_and_sentences_say_the_numbers(rows):
    adapted, permuted = tables(rows)
    assert len(adapted.rows) == 3 * 8 + 5
    assert adapted.rows[0][:2] == ("digits 5 to 9", "the base")
    line = next(row for row in adapted.rows if row[:2] == ("inverted pixels", "LoRA, r = 4"))
    assert line[2:5] == ("1", "0.008", "0.750 (0.730 to 0.770)")
    assert len(permuted.rows) == 12
    assert permuted.rows[1] == ("permuted:1", "2", "0.0005 (0.0005 to 0.0005)", "1.000 (0.980 to 1.000)", "")
    assert [row[4] for row in permuted.rows if row[1] == "4"] == ["3", "3", "3"]
    way, drawn, elbow, rank = sentences(rows)
    assert "50% at r = 1 and 97% at 16 (inverted pixels)" in way
    assert drawn == (
        "Of the drawings 10% show a digit from 5 to 9 before; after LoRA 45% at r = 1, 56% at r = 4, "
        "59% at r = 16; with all weights 60%."
    )
    assert "for 3 of 3" in elbow
    assert "in 9 of 9 runs" in elbow
    assert "The known ΔW leaves at most 3e-12 of the loss." in elbow
    assert "noise in a square map has 81%" in rank


def test_rows_without_a_seed_are_refused(rows):
    with pytest.raises(ConfigError, match="nothing was measured"):
        tables([row for row in rows if row["config"]["kind"] != "final"])


@pytest.mark.slow
def test_the_same_rows_give_the_same_figures(rows):
    one, again = pictures(rows), pictures(rows)
    assert one.keys() == {"ranks", "drawings", "spectra"}
    for name, picture in one.items():
        assert picture.encoded("svg") == again[name].encoded("svg")
        assert "?" in picture.encoded("svg").decode()
        assert len(picture.says) > 80


# ---- rows


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("search", "valid", "low"), ("search", "test", 1.0), ("final", "share", 1.1), ("final", "samples", [17]),
     ("base", "parameters", -1), ("known", "spectrum", [-1.0]), ("base", "status", "lost"),
     ("final", "more", 1)],
)  # fmt: skip
def test_a_row_that_no_run_writes_is_refused(kind, field, value, rows, tmp_path):
    row = next(row for row in rows if row["config"]["kind"] == kind) | {"versions": {}, field: value}
    (tmp_path / "rows.jsonl").write_bytes(harness.sealed(row))
    with pytest.raises(FormatError, match=f"line 1: row.*{field}"):
        harness.read_rows(tmp_path / "rows.jsonl", beyond.FORM)


@pytest.mark.parametrize(
    "change",
    [{"ranks": ()}, {"ranks": (4, 1)}, {"ranks": (1, 1)}, {"ranks": (0, 1)}, {"planted": (4,)},
     {"planted": ()}, {"rates": (0.0,)}, {"full_rates": ()}, {"permuted_rates": (math.nan,)}, {"steps": 0},
     {"seeds": 1.5}, {"batch": 0}, {"samples": 14}, {"pretraining": True}, {"drawing_pretraining": 0},
     {"permuted_steps": 0}, {"drawing_steps": 0}],
    ids=repr,
)  # fmt: skip
def test_an_empty_or_impossible_plan_is_refused(change):
    with pytest.raises(ConfigError):
        Plan(**change)
