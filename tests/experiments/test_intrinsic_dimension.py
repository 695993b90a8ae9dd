"""The experiment with random subspaces: what is trained from which start, and where 90% is reached."""

import copy
import functools
import math
import os
from dataclasses import asdict, replace

import numpy as np
import pytest

from minilora.data import digits as data
from minilora.data.batching import batches, eval_batches
from minilora.data.corpora import Corpus
from minilora.data.digits import Digits, Images
from minilora.errors import ConfigError, FormatError, NonFiniteError, UnsupportedError
from minilora.experiments import harness, pretrain, recipe
from minilora.experiments import intrinsic_dimension as module
from minilora.experiments import intrinsic_tasks as tasks
from minilora.experiments.intrinsic_dimension import BASE, OWN, Plan, Run
from minilora.experiments.intrinsic_figures import LI, Arm, Result, found, pictures, sentences, tables
from minilora.experiments.intrinsic_tasks import DIGITS, DIMS
from minilora.experiments.reading import crossing
from minilora.lora import fuse, inject
from minilora.methods.intrinsic import subspace
from minilora.methods.lora_config import LoraConfig
from minilora.model import Config, llama
from minilora.optim import AdamW, Schedule
from minilora.spectra import effective_rank, noise_spectrum
from minilora.training import evaluate, train
from minilora.tree import digest, freeze, named_params, trained, unfreeze
from minilora.vision.vit import vit

TINY = Config(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=16)  # fmt: skip
PLAN = Plan(
    targets=("folio", "kjv"), dims=(30, 200), ranks=(1, 3), widths=(8, 16), pretraining=(2, 3),
    rates=(0.5, 1.0), steps=4, search_steps=2, seeds=2, few_seeds=1, batch=2, test_windows=3, valid_windows=2,
)  # fmt: skip
WIDE = Plan(seeds=3, few_seeds=2)
METHODS = [("full", 0), ("subspace", 30), ("said", 30), ("lora", 3)]


def text(name, seed):
    ids = np.random.default_rng(seed).integers(60, 70, 3000).astype(np.uint8)
    return Corpus(name, f"source of {name}", *np.split(ids, [2000, 2500]))


def images(seed, n):
    rng = np.random.default_rng(seed)
    return Images(rng.uniform(-1, 1, (n, 64)).astype(np.float32), rng.integers(10, size=n))


SEEN = Digits(images(0, 40), images(1, 20), images(2, 30), "source of digits")
TEXTS = {name: text(name, i) for i, name in enumerate(("folio", "kjv", OWN))}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Short windows, and the texts, the images and the bases of this file."""
    monkeypatch.setattr(recipe, "LENGTH", 16)
    monkeypatch.setattr(harness, "read_inputs", lambda base, targets: made())
    monkeypatch.setattr(tasks, "SHAPE", replace(TINY, num_key_value_heads=2))
    monkeypatch.setattr(module, "DIMS", (20, 50))
    monkeypatch.setattr(module, "digits", lambda: SEEN)
    monkeypatch.setattr(module, "random_vit", functools.cache(tasks.random_vit.__wrapped__))


def made():
    """A tiny base, frozen, and three texts."""
    base = llama(TINY, np.random.default_rng(0))
    freeze(base)
    return harness.Inputs("base", base, dict(TEXTS))


def cell(kind="final", **how):
    usual = {"plan": PLAN, "target": "folio", "method": "subspace", "size": 30, "rate": 0.5, "seed": 3}
    return Run(kind, **usual | how)


def other_split(inputs, split, target="folio"):
    """The inputs with other letters in one split."""
    one = inputs.texts[target]
    changed = replace(one, **{split: getattr(one, split)[::-1] ^ 1})
    return replace(inputs, texts=inputs.texts | {target: changed})


# ---- one run


def trained_by_hand(run, model):
    """The plain model after the run, path -> ΔW of its linear maps, and how many numbers were trained."""
    before = {path: p.data.copy() for path, p in named_params(model).items()}
    rng = np.random.default_rng([run.seed, 0])
    if run.method == "full":
        unfreeze(model)
    elif run.method == "lora":
        inject(model, LoraConfig(run.size, 2 * run.size), rng=rng)
    else:
        model = subspace(model, run.size, rng=rng, scales=run.method == "said")
    count = sum(p.size for p in trained(model).values())
    steps = run.plan.search_steps if run.kind == "search" else run.plan.steps
    train(
        model, batches(TEXTS[run.target].train, np.random.default_rng([run.seed, 1]), run.plan.batch, 16),
        AdamW(run.rate / math.sqrt(count), betas=(0.9, 0.99)), steps=steps, schedule=Schedule(steps),
    )  # fmt: skip
    plain = model
    if run.method == "lora":
        plain = copy.deepcopy(model)
        fuse(plain)
    elif run.method != "full":
        plain = model.moved()[0]
    after = named_params(plain)
    return plain, {k: after[k].data - a for k, a in before.items() if "_proj" in k}, count


@pytest.mark.parametrize("kind", ["search", "final"])
@pytest.mark.parametrize("how", METHODS)
def test_a_run_follows_its_recipe(how, kind):
    run, inputs = cell(kind, method=how[0], size=how[1]), made()
    row = module.work(run, inputs)
    plain, changes, count = trained_by_hand(run, copy.deepcopy(inputs.base))
    assert row["parameters"] == count
    if kind == "search":
        valid = evaluate(plain, eval_batches(TEXTS["folio"].valid, 16, 16, limit=32))
        assert row["valid"] == pytest.approx(valid, rel=1e-6)
        assert "test" not in row
        return
    windows = eval_batches(TEXTS["folio"].test, 16, 16, limit=48)
    assert row["test"] == pytest.approx(evaluate(plain, windows), rel=1e-6)
    right = [
        int((plain(ids)[0][i].argmax(-1) == y).sum()) for ids, labels in windows for i, y in enumerate(labels)
    ]
    assert row["accuracy"] == sum(right) / 48
    ranks = [effective_rank(np.linalg.svd(dW.astype(float))[1]) / min(dW.shape) for dW in changes.values()]
    assert len(ranks) == 7
    assert row["rank"] == pytest.approx(np.median(ranks), rel=1e-3)  # fused in float32
    assert not any(p.size == count for p in named_params(inputs.base).values())


def test_a_start_is_measured_as_it_is():
    row = module.work(cell("start", method="full", size=0), made())
    base = made().base
    windows = eval_batches(TEXTS["folio"].test, 16, 16, limit=48)
    assert row["test"] == evaluate(base, windows)
    assert row["parameters"] == sum(p.size for p in named_params(base).values())
    rng = np.random.default_rng(0)
    shapes = [p.data.shape for path, p in named_params(base).items() if "_proj" in path]
    noise = [effective_rank(noise_spectrum(some, rng, draws=1)) / min(some) for some in shapes]
    assert row["rank"] == np.median(noise)


def test_accuracy_counts_the_likeliest_next_characters_of_the_windows():
    """A model that expects the next letter of the alphabet, on text in which it comes seven times of ten."""
    rng = np.random.default_rng(0)
    ids = (60 + np.cumsum(np.where(rng.random(1000) < 0.7, 1, 2)) % 40).astype(np.uint8)
    one = Corpus("", "", ids[:0], ids[:0], ids)
    at = [16 * (i * 62 // 3) + j for i in range(3) for j in range(16)]  # 62 windows fit
    right = np.mean([ids[i + 1] == ids[i] + 1 for i in at])
    text = tasks.Text(one, 2, {"test": 3})
    assert text.accuracy(lambda x: (np.eye(128)[x + 1],)) == right
    assert 0.5 < right < 0.9


def test_starts_are_pretrained_once_and_stay_as_they_are():
    inputs = made()
    run = cell(width=8, pretrained=3)
    one = module.start(run, inputs)
    before = digest(one), digest(inputs.base)
    for method, size in METHODS:
        module.work(replace(run, method=method, size=size), inputs)
        module.work(replace(run, width=BASE, pretrained=0, method=method, size=size), inputs)
    assert module.start(run, inputs) is one
    assert (digest(one), digest(inputs.base)) == before
    assert not trained(one)
    assert module.start(replace(run, width=BASE), inputs) is inputs.base
    model = llama(Config(hidden_size=8, intermediate_size=21), np.random.default_rng(0))
    assert digest(model) == digest(module.start(replace(run, pretrained=0), inputs))
    text = batches(TEXTS[OWN].train, np.random.default_rng([0, 1]), 2, 16)
    train(model, text, AdamW(4e-3, betas=(0.9, 0.99), weight_decay=0.1), steps=3, schedule=Schedule(3))
    assert digest(model) == digest(one)


def test_the_shape_of_the_base_is_that_of_its_width():
    assert pretrain.shape(96) == Config()


def test_test_text_chooses_no_rate_and_validation_text_measures_nothing():
    inputs = made()
    for kind, seen, unseen in (("search", "valid", "test"), ("final", "test", "valid")):
        row, same, other = (
            module.work(cell(kind), x)
            for x in (inputs, other_split(inputs, unseen), other_split(inputs, seen))
        )
        assert row == same
        assert row[seen] != other[seen]


def test_runs_of_a_seed_see_the_same_batches_and_draw_their_own_P(monkeypatch):
    seen, z = [], []

    def learn(model, given, optimizer, steps):
        seen.append(next(given)[0])
        z.append(model.project(np.ones_like(model.z.data))[0] if hasattr(model, "z") else None)

    monkeypatch.setattr(module, "learn", learn)
    for how in ({}, {"method": "full", "size": 0}, {"rate": 1.0}, {"method": "lora", "size": 1}, {"seed": 4}):
        module.learned(cell(**how), made())
    assert all((x == seen[0]).all() for x in seen[1:4])
    assert (seen[4] != seen[0]).any()
    assert (z[2] == z[0]).all()
    assert (z[4] != z[0]).any()


# ---- digits


def written(kind="final", **how):
    return cell(kind, **{"target": DIGITS, "width": 8, "size": 20} | how)


@pytest.mark.parametrize("kind", ["search", "final"])
@pytest.mark.parametrize("how", METHODS[:2])
def test_digits_are_learned_from_random_weights_by_their_recipe(how, kind):
    run, inputs = written(kind, method=how[0], size=how[1]), made()
    row = module.work(run, inputs)
    model = vit(replace(TINY, num_key_value_heads=2), np.random.default_rng(0))
    before = copy.deepcopy(model)
    if run.method == "subspace":
        model = subspace(model, 30, rng=np.random.default_rng([3, 0]))
    count = sum(p.size for p in trained(model).values())
    rng, steps = np.random.default_rng([3, 1]), 5 * {"search": 2, "final": 4}[kind]
    drawn = (rng.integers(40, size=32) for _ in range(steps))
    train(
        model, ((SEEN.train.pixels[i], SEEN.train.labels[i]) for i in drawn),
        AdamW(0.5 / math.sqrt(count), betas=(0.9, 0.99)), steps=steps,
        schedule=Schedule(steps, warmup=steps // 20),
    )  # fmt: skip
    plain = model.moved()[0] if run.method == "subspace" else model
    assert row["source"] == "source of digits"
    assert row["parameters"] == count
    if kind == "search":
        assert row["valid"] == float(plain.loss(SEEN.valid.pixels, SEEN.valid.labels)[0])
        assert "test" not in row
        return
    assert row["test"] == float(plain.loss(SEEN.test.pixels, SEEN.test.labels)[0])
    logits, right = plain(SEEN.test.pixels)[0], 0
    for scores, digit in zip(logits, SEEN.test.labels, strict=True):
        right += scores[digit] == scores.max()
    assert row["accuracy"] == right / 30
    old, new = named_params(before), named_params(plain)
    changes = [new[path].data - old[path].data for path in old if "_proj" in path]
    ranks = [effective_rank(np.linalg.svd(dW.astype(float))[1]) / min(dW.shape) for dW in changes]
    assert len(ranks) == 7
    assert row["rank"] == pytest.approx(np.median(ranks), rel=1e-3)
    assert digest(module.start(run, inputs)) == digest(before)


def test_the_start_of_digits_is_one_model_measured_as_it_is():
    row, model = module.work(written("start", method="full", size=0), made()), tasks.random_vit.__wrapped__()
    assert row["test"] == float(model.loss(SEEN.test.pixels, SEEN.test.labels)[0])
    assert row["parameters"] == sum(p.size for p in named_params(model).values())
    assert not trained(model)
    assert module.start(written(), made()) is module.start(written(seed=4, method="full"), made())


def test_test_digits_choose_no_rate_and_validation_digits_measure_nothing(monkeypatch):
    for kind, seen, unseen in (("search", "valid", "test"), ("final", "test", "valid")):
        rows = []
        for split in (None, unseen, seen, "train"):
            some = replace(SEEN, **{split: images(9, 25)}) if split else SEEN
            monkeypatch.setattr(module, "digits", lambda some=some: some)
            rows.append(module.work(written(kind), made()))
        row, same, *others = rows
        assert row == same
        assert all(row[seen] != other[seen] for other in others)


def test_digits_of_a_seed_come_in_the_same_batches():
    some, same, other = (
        next(tasks.Images(SEEN).drawn(np.random.default_rng([seed, 1])))[0] for seed in (3, 3, 4)
    )
    assert (some == same).all()
    assert (some != other).any()


def test_a_loss_of_digits_that_is_no_number_is_refused():
    model = tasks.random_vit.__wrapped__()
    model.classifier.weight.data[0] = np.nan
    with pytest.raises(NonFiniteError, match="valid of digits is nan"):
        tasks.Images(SEEN).loss(model, "valid")


def test_without_the_extra_nothing_is_run(tmp_path, monkeypatch):
    """Not even what needs no digits: the folder would hold half of the rows, and look whole."""

    def missing(name):
        return None

    data.digits.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", missing)
    monkeypatch.setattr(module, "digits", data.digits)
    monkeypatch.setattr(module, "work", None)
    with pytest.raises(UnsupportedError, match=r"minilora\[vision\]"):
        module.run(PLAN, tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


def test_digits_have_the_vit_of_beyond_language_and_less_d_than_its_weights():
    from minilora.experiments.beyond_tasks import SHAPE

    assert SHAPE.hidden_size == 48
    assert max(DIMS) < sum(p.size for p in named_params(vit(SHAPE, np.random.default_rng(0))).values())


# ---- the grid


def crafted(run, inputs):
    """A row in no time; the share that d closes grows with log d, from random weights twice as fast."""
    c = asdict(run)
    row = {"id": run.id, "config": c, "source": "crafted", "status": "done"}
    total = 344_736 * (run.width or 96) // 96
    start = 5.0 if run.width == 96 and not run.pretrained else 2.0
    if run.kind == "start":
        return row | {"test": start, "accuracy": 0.46 if run.width == BASE else 0.1, "rank": 0.81,
                      "parameters": total}  # fmt: skip
    number = {"full": total, "lora": 5472 * run.size}.get(run.method, run.size)
    if run.kind == "search":
        return row | {"valid": abs(math.log2(run.rate / 2)), "parameters": number}
    share = 1.0 if run.method == "full" else min(0.99, (2 - (run.width == BASE)) * math.log(number) / 11)
    loss = start - (share + (run.seed - 1) * 0.01) * 0.4
    rank = {"full": 0.6, "lora": run.size / 96}.get(run.method, 0.8)
    accuracy = 0.5 * share ** (1 + (run.target == DIGITS))
    return row | {"test": loss - 0.02 * (run.method == "lora"), "accuracy": accuracy, "rank": rank,
                  "parameters": number}  # fmt: skip


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Crafted rows of the usual grid, with three seeds, and two of the other starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # no law here is about a power cut
        patch.setattr(harness, "read_inputs", lambda base, targets: real())
        patch.setattr(module, "prepared", lambda *_: None)
        patch.setattr(module, "digits", lambda: SEEN)
        patch.setattr(module, "work", crafted)
        return module.run(WIDE, tmp_path_factory.mktemp("grid"), jobs=1)


def real():
    """Inputs whose base has the shape of the one that ships."""
    base = llama(Config(), np.random.default_rng(0))
    freeze(base)
    return harness.Inputs("base", base, dict(TEXTS))


def test_every_start_is_trained_by_its_methods_with_its_seeds(grid):
    f = found(grid)
    folio = [(BASE, 0), (96, 0), (96, 60), (96, 600), (32, 600), (56, 600)]
    others = [("kjv", BASE, 0), ("kjv", 96, 0), (DIGITS, 48, 0)]
    assert list(f.arms) == [("folio", *some) for some in folio] + others
    for (target, width, steps), arm in f.arms.items():
        dims = [d for d in WIDE.dims if d < (41088 if width == 32 else 10**6)]
        dims = DIMS if target == DIGITS else dims
        sizes = [("full", 0), *(("subspace", d) for d in dims)]
        if (target, width) == ("folio", BASE):
            sizes += [*(("said", d) for d in dims), *(("lora", r) for r in WIDE.ranks)]
        assert [*arm.results] == sizes
        assert {len(result.loss) for result in arm.results.values()} == {2 if steps else 3}
    for kind, seeds in (("search", {harness.SEARCH_SEED}), ("final", {0, 1, 2}), ("start", {0})):
        assert {row["config"]["seed"] for row in grid if row["config"]["kind"] == kind} == seeds
    assert {row["config"]["rate"] for row in grid if row["config"]["kind"] == "final"} == {2.0}
    digests = {row["config"]["target"]: tuple(row["config"]["texts"]) for row in grid}
    texts = {name: (TEXTS[name].digest, TEXTS[OWN].digest) for name in ("folio", "kjv")}
    assert digests == texts | {DIGITS: ()}
    of_digits = [row["config"]["target"] == DIGITS for row in grid]
    assert of_digits == sorted(of_digits)  # their rows follow all others


def test_the_usual_dims_are_the_parameters_of_the_usual_ranks():
    model = real().base
    for r, d in zip(WIDE.ranks, WIDE.dims[-3:], strict=True):
        copied = copy.deepcopy(model)
        inject(copied, LoraConfig(r), rng=np.random.default_rng(0))
        assert sum(p.size for p in trained(copied).values()) == d


def test_an_edge_is_left_at_most_so_often(tmp_path, monkeypatch):
    def work(run, inputs):
        return crafted(run, inputs) | ({"valid": -run.rate} if run.kind == "search" else {})

    monkeypatch.setattr(module, "work", work)
    rows = module.run(PLAN, tmp_path, jobs=1)
    assert {row["config"]["rate"] for row in rows if row["config"]["kind"] == "search"} == {0.5, 1, 2, 4, 8}
    assert {row["config"]["rate"] for row in rows if row["config"]["kind"] == "final"} == {8}


# ---- reading


@pytest.mark.parametrize(
    ("shares", "d"),
    [([0.9, 0.95, 1.0], 4), ([0.1, 0.9, 1.0], 16), ([0.7, 1.1, 1.0], 8), ([0.5, 0.6, 0.89], math.inf),
     ([0.95, 0.2, 0.1], 4), ([0.1, 0.0, 0.9], 64), ([0.1, 0.7, 1.1], 32)],
)  # fmt: skip
def test_90_percent_is_crossed_on_a_line_over_log_d(shares, d):
    assert crossing([4, 16, 64], np.array(shares)) == pytest.approx(d)


def test_shares_are_those_of_the_median_of_full_training():
    full = Result(100, np.array([1.0, 1.2, 9.0]), np.array([0.5, 0.4, 0.1]), np.zeros(3))
    some = Result(10, np.array([1.4, math.inf, 1.2]), np.array([0.36, 0.0, 0.44]), np.zeros(3))
    more = Result(40, np.array([1.2, 1.2, 1.2]), np.array([0.4, 0.4, 0.4]), np.zeros(3))
    arm = Arm({"test": 2.2, "accuracy": 0.3, "parameters": 100},
              {("full", 0): full, ("subspace", 10): some, ("subspace", 40): more})  # fmt: skip
    assert arm.share(some, "loss") == pytest.approx([0.8, -math.inf, 1.0])
    assert arm.share(some, "accuracy") == pytest.approx([0.9, 0.0, 1.1])
    assert arm.d90() == pytest.approx([20, 10 * 4**0.9, 10])  # a run that diverged closed nothing
    assert arm.d90("accuracy") == pytest.approx([10, 10 * 4**0.9, 10])
    arm.start["accuracy"] = 0.37
    assert arm.d90("accuracy").tolist() == [0, 0, 0]


def base_dimension():
    """Of the crafted rows: log d = 9.9 on the base, by the formula."""
    return math.exp(0.9 * 11)


def test_d90_and_the_pairs_are_those_of_the_crafted_rows(grid):
    f = found(grid)
    assert np.median(f.base().d90()) == pytest.approx(base_dimension(), rel=1e-6)
    assert np.median(f.base("kjv").d90()) == pytest.approx(base_dimension(), rel=1e-6)
    assert (f.base().d90("accuracy") == 0).all()
    assert np.median(f.random().d90("accuracy")) == 342
    assert [(lora.parameters, other.parameters) for lora, other in f.pairs()] == [
        (d, d) for d in WIDE.dims[-3:]
    ]
    for lora, other in f.pairs():
        assert lora.loss == pytest.approx(other.loss - 0.02, abs=1e-9)
    assert f.wide().keys() == {32, 56, 96}
    assert f.wide()[56] is f.arms["folio", 56, 600]
    assert list(f.trained()) == ["random weights", "after 60 steps", "after 600 steps", "the base"]
    assert f.trained()["after 60 steps"] is f.arms["folio", 96, 60]


def test_d90_of_digits_is_that_of_the_crafted_rows(grid):
    """The share is 2 log d / 11, 0.88 at 128 and 0.99 at 256; that of the accuracy is its square."""
    arm = found(grid).digits()
    low, high = 14 * math.log(2) / 11, 0.99
    middle = (0.9 - low**2) / (high**2 - low**2)
    assert arm.start["parameters"] == 172368
    assert np.median(arm.d90("accuracy")) == pytest.approx(128 * 2**middle, rel=1e-6)
    assert np.median(arm.d90()) == pytest.approx(128 * 2 ** ((0.9 - low) / (high - low)), rel=1e-6)
    with pytest.raises(ConfigError, match="no row is of digits"):
        found([row for row in grid if row["config"]["target"] != DIGITS]).digits()


def test_tables_and_sentences_say_the_numbers(grid):
    dims, every = tables(grid)
    d = f"{float(f'{base_dimension():.3g}'):,.0f} ({100 * base_dimension() / 344736:.2g}%)"
    assert dims.rows[0] == ("folio", "the base", "344,736", d, "0")
    assert [row[1] for row in dims.rows[:6]] == [
        "the base", "96 wide, random", "96 wide, 60 steps", "96 wide, 600 steps", "32 wide, 600 steps",
        "56 wide, 600 steps",
    ]  # fmt: skip
    assert every.rows[0] == ("folio", "the base", "none", "0", "2.000", "", "0.460", "")
    assert every.rows[1] == (
        "folio", "the base", "full", "344,736", "1.600 (1.596 to 1.604)", "1.00 (0.99 to 1.01)",
        "0.500 (0.500 to 0.500)", "0.600",
    )  # fmt: skip
    assert sum(row[2].startswith("LoRA, r = ") for row in every.rows) == 3
    assert dims.rows[-1] == (DIGITS, "48 wide, random", "172,368", "144 (0.083%)", "194 (0.11%)")
    first, second, ranks, lora, scales, widths, written = sentences(grid)
    assert first.startswith(f"On folio, 90% of the loss gap takes {d} from the base, at most 342 (0.099%)")
    assert first.endswith("90% of the accuracy 0 and at most 342 (0.099%).")
    assert second.startswith("On kjv")
    assert ranks == (
        "At d = 342 ΔW has 0.80 of the largest effective rank; noise has 0.81, full training 0.60."
    )
    assert lora.endswith("+0.020 nats with 5,472, +0.020 nats with 21,888, +0.020 nats with 87,552.")
    assert scales.endswith(f"it takes {d}.")
    assert widths.count(";") == 2
    assert written.startswith(
        "Digits from scratch take 194 (0.11%) for 90% of full training's accuracy, 50.0%"
    )
    assert "and 144 (0.083%) for 90% of the loss gap" in written
    assert written.endswith(f" {LI}, which is not tested here.")


def test_the_number_of_li_et_al_is_of_their_network():
    """Dense layers of 784, 200, 200 and 10."""
    D = sum(n * (1 + m) for m, n in ((784, 200), (200, 200), (200, 10)))
    assert D == 199_210
    assert f"MNIST took 750 of {D:,} ({100 * 750 / D:.2f}%)" in LI


def test_a_dimension_that_no_d_reaches_is_named_as_such(grid):
    low = [
        row | {"test": 1.9} if row["config"]["method"] == "subspace" and "test" in row else row
        for row in grid
    ]
    assert tables(low)[0].rows[0][3] == "more than 87,552"
    assert tables(low)[0].rows[4][3] == "more than 21,888"  # 32 wide


def test_a_run_that_diverged_closes_nothing(grid):
    def lost(row):
        c = row["config"]
        if (c["kind"], c["method"], c["seed"], c["width"]) == ("final", "subspace", 1, BASE):
            keep = {k: v for k, v in row.items() if k not in ("test", "accuracy", "rank", "parameters")}
            return keep | {"status": "diverged"}
        return row

    arm = found([lost(row) for row in grid]).base()
    assert math.isinf(arm.d90()[1])
    assert np.isfinite(arm.d90()[[0, 2]]).all()
    assert arm.results["subspace", 342].accuracy[1] == 0
    assert [*arm.curve("subspace")] == [*WIDE.dims]


def test_rows_without_a_seed_are_refused(grid):
    with pytest.raises(ConfigError, match="no trained seed"):
        tables([row for row in grid if row["config"]["kind"] != "final"])


@pytest.mark.slow
def test_the_same_rows_give_the_same_figures(grid):
    drawn, again = pictures(grid), pictures(grid)
    assert drawn.keys() == {"starts", "rank", "sizes", "digits"}
    for name, picture in drawn.items():
        assert picture.encoded("svg") == again[name].encoded("svg")
        assert ("digits" if name == "digits" else "folio") in picture.says


# ---- rows


def test_a_finished_folder_is_read_not_run(tmp_path, monkeypatch):
    plan = replace(PLAN, targets=("folio",), dims=(30,), ranks=(1,), widths=(8,), pretraining=(2,),
                   rates=(1.0,), seeds=1)  # fmt: skip
    monkeypatch.setattr(module, "EDGES", 0)
    first = module.run(plan, tmp_path, jobs=1)
    data = (tmp_path / "rows.jsonl").read_bytes()
    monkeypatch.setattr(module, "work", None)
    assert module.run(plan, tmp_path, jobs=1) == first
    assert (tmp_path / "rows.jsonl").read_bytes() == data
    assert harness.read_rows(tmp_path / "rows.jsonl", module.FORM) == first


@pytest.mark.parametrize(
    ("change", "match"),
    [({"ranks": (9,)}, "r is 9"), ({"dims": (5,)}, "d is 5"), ({"widths": (10,)}, "10")],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_any_run(change, match, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "work", None)
    with pytest.raises(ConfigError, match=match):
        module.run(replace(PLAN, **change), tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("search", "valid", "low"), ("search", "test", 1.0), ("final", "valid", 1.0), ("final", "accuracy", 1.1),
     ("start", "parameters", -1), ("start", "rank", None), ("final", "rank", 1.5), ("start", "more", 1)],
)  # fmt: skip
def test_a_row_that_no_run_writes_is_refused(kind, field, value, grid, tmp_path):
    row = next(row for row in grid if row["config"]["kind"] == kind) | {"versions": {}, field: value}
    (tmp_path / "rows.jsonl").write_bytes(harness.sealed(row))
    with pytest.raises(FormatError, match=f"line 1: row.*{field}"):
        harness.read_rows(tmp_path / "rows.jsonl", module.FORM)


@pytest.mark.parametrize(
    "change",
    [{"targets": ()}, {"targets": ("folio", "folio")}, {"dims": ()}, {"dims": (9, 3)}, {"dims": (0,)},
     {"ranks": (0,)}, {"widths": (16, 8)}, {"pretraining": (0,)}, {"rates": (0.0,)}, {"rates": ()},
     {"rates": (math.inf,)}, {"steps": 0}, {"search_steps": 0}, {"seeds": 1.5}, {"few_seeds": 0},
     {"batch": 0}, {"test_windows": 0}, {"valid_windows": True}],
    ids=repr,
)  # fmt: skip
def test_an_empty_or_impossible_plan_is_refused(change):
    with pytest.raises(ConfigError):
        Plan(**change)
