"""A packed run is the run alone: losses, adapters and moments; and nothing else is touched."""

import numpy as np
import pytest
from device import DeviceArray
from helpers import assert_precision_scales, batch, same_bits, seeds, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.errors import (
    ConfigError,
    InputError,
    MismatchError,
    NonFiniteError,
    StateError,
    UnsupportedError,
)
from minilora.fast.mixed import RowByRow
from minilora.fast.packed import PackedRun, train_packed
from minilora.lora import active, inject, merge, set_adapter
from minilora.methods.lora_config import LoraConfig
from minilora.optim import AdamW, Schedule
from minilora.training import train
from minilora.tree import named_params, replica

CONFIGS = {
    "a": LoraConfig(r=2, alpha=7, init="both"),
    "b": LoraConfig(r=5, alpha=3, targets=["q_proj", "down_proj"], rslora=True),
    "c": LoraConfig(r=2, alpha=1, targets=["lm_head", "v_proj"], init="both"),
    "d": LoraConfig(r=1, alpha=4, targets="all-linear", layers_to_transform=[1], rank_pattern={"v_proj": 3}),
}
NAMES = list(CONFIGS)
STEPS, T = 3, 4


def several(seed, dtype=np.float64, names=NAMES, **how):
    """A model with the adapters of these names, each drawn by a generator of its own."""
    model, _ = tiny(seed, dtype, **how)
    for name in names:
        inject(model, CONFIGS[name], rng=np.random.default_rng(ord(name)), name=name)
    return model


def copied(model):
    """A copy that shares no array."""
    copy = replica(model)
    for p in named_params(copy).values():
        p.data = p.data.copy()
    return copy


def trained_of(model, name):
    return [p for path, p in named_params(model).items() if f".{name}." in path]


def run_of(name):
    """A run whose batches, count of rows, rates and clipping are its own; a large eps conditions it well."""
    k, rng = NAMES.index(name), np.random.default_rng(7 + ord(name))
    batches = [batch(rng, n=1 + k, t=T) for _ in range(STEPS)]
    optimizer = AdamW(lr=0.02 * (k + 1), eps=0.1, clip=(1.0, None, 0.05, 0.3)[k], weight_decay=0.1 * k)
    return PackedRun(batches, optimizer, Schedule(STEPS, warmup=k % 2) if k else None)


def arrays(model, name):
    return {path: p.data.copy() for path, p in named_params(model).items() if f".{name}." in path}


def flat(*parts):
    """All numbers of arrays, and of dicts of arrays, in one."""
    some = (list(part.values()) if isinstance(part, dict) else [part] for part in parts)
    return np.concatenate([np.ravel(a) for part in some for a in part])


@settings(max_examples=5)
@given(seed=seeds, names=st.permutations(NAMES).flatmap(lambda p: st.integers(1, 4).map(lambda n: p[:n])))
def test_packed_runs_are_the_runs_alone(seed, names):
    """Against `train`, run by run: losses, both moments and the adapters, after a few steps."""

    def both(dtype):
        model = several(seed, dtype, tie_word_embeddings=False)
        alone, packed = copied(model), copied(model)
        runs = {name: run_of(name) for name in names}
        losses = train_packed(packed, runs, steps=STEPS)
        parts = [[], []]
        for name in names:
            run = run_of(name)
            set_adapter(alone, name)
            history = train(alone, run.batches, run.optimizer, steps=STEPS, schedule=run.schedule)
            parts[0] += [np.array(losses[name]), arrays(packed, name), runs[name].optimizer.state()]
            parts[1] += [np.array(history.loss), arrays(alone, name), run.optimizer.state()]
            assert runs[name].optimizer.state().keys() == run.optimizer.state().keys()
            assert runs[name].optimizer.t == STEPS
        for one in parts:
            yield flat(*one).astype(dtype)

    assert_precision_scales(both)


@settings(max_examples=5)
@given(seed=seeds, names=st.permutations(NAMES), dtype=st.sampled_from([np.float32, np.float64]))
def test_an_invariant_run_has_the_same_bits_whatever_is_packed_beside_it(seed, names, dtype):
    model = several(seed, dtype, tie_word_embeddings=False, hidden_size=50)
    packed = copied(model)
    runs = {name: run_of(name) for name in names}
    losses = train_packed(packed, runs, steps=STEPS, invariant=True)
    for name in names:
        alone, run = copied(model), run_of(name)
        history = train_packed(alone, {name: run}, steps=STEPS, invariant=True)
        assert history[name] == losses[name]
        assert same_bits(arrays(alone, name), arrays(packed, name))
        assert same_bits(run.optimizer.state(), runs[name].optimizer.state())


@pytest.mark.parametrize("invariant", [True, False])
def test_only_an_invariant_run_takes_the_rows_of_the_base_one_by_one(invariant, monkeypatch):
    """Whatever the processor: some round a row alone and a row in company alike."""
    seen, call = [], RowByRow.__call__
    monkeypatch.setattr(RowByRow, "__call__", lambda *args: seen.append(args) or call(*args))
    train_packed(several(0), {name: run_of(name) for name in "ab"}, steps=1, invariant=invariant)
    assert bool(seen) is invariant


def test_the_base_and_other_adapters_are_not_touched():
    model = several(0, tie_word_embeddings=False)
    set_adapter(model, "b")
    before = {path: p.data.copy() for path, p in named_params(model).items()}
    flags, chosen = [p.trainable for p in named_params(model).values()], active(model)
    train_packed(model, {name: run_of(name) for name in "ca"}, steps=STEPS)
    after = named_params(model)
    for path, p in after.items():
        moved = ".a." in path or ".c." in path
        assert np.array_equal(p.data, before[path]) is not moved, path
        assert p.grad is None
    assert [p.trainable for p in after.values()] == flags
    assert active(model) == chosen


def test_a_step_makes_one_transfer_whatever_the_number_of_runs(device):
    model = several(0, np.float32, tie_word_embeddings=False)
    counts = []
    runs = {name: run_of(name) for name in NAMES}
    train_packed(model, runs, steps=STEPS, progress=lambda *_: counts.append(DeviceArray.transfers))
    assert np.diff(counts).tolist() == [1] * (STEPS - 1)


def test_packed_training_is_the_same_on_the_device(request):
    def life():
        model = several(1, np.float32, tie_word_embeddings=False)
        runs = {name: run_of(name) for name in NAMES}
        losses = train_packed(model, runs, steps=STEPS)
        losses = np.array(list(losses.values()))
        return [losses, *(a for run in runs.values() for a in run.optimizer.state().values())]

    host = life()
    request.getfixturevalue("device")
    for a, b in zip(host, life(), strict=True):
        assert np.array_equal(a, b)


def test_progress_is_told_every_loss():
    told, model = [], several(0, names="ab")
    runs = {name: run_of(name) for name in "ab"}
    losses = train_packed(model, runs, steps=2, progress=lambda *step: told.append(step))
    assert told == [(k + 1, {name: losses[name][k] for name in "ab"}) for k in range(2)]


def test_what_cannot_be_packed_is_refused_and_changes_nothing():
    model = several(0, tie_word_embeddings=False)
    inject(model, LoraConfig(r=2, dora=True), rng=np.random.default_rng(0), name="dora")
    set_adapter(model, "b")
    before = {path: (p.data.copy(), p.trainable) for path, p in named_params(model).items()}
    chosen = active(model)
    a, twice = run_of("a"), AdamW()
    short = PackedRun([batch(np.random.default_rng(0), n=2, t=T + 1)] * 3, AdamW())
    wrong = PackedRun([(np.zeros((1, T), int), np.full((1, T), 99))], AdamW())
    one = iter(a.batches)
    for runs, error, said in (
        ({"a": a, "bb": run_of("b")}, MismatchError, "no adapter 'bb'; nearest: 'b'"),
        ({"a": run_of("a"), "dora": run_of("b")}, UnsupportedError, "a DoRA cannot be mixed"),
        ({"a": run_of("a"), "b": short}, InputError, "the batch of 'b' has 5 tokens a row; expected 4"),
        ({"a": run_of("a"), "b": wrong}, InputError, "label 99; expected 0 to 10"),
        ({"a": PackedRun([], AdamW())}, InputError, "the batches of 'a' ran out"),
        ({"a": PackedRun("text", AdamW())}, InputError, "the batches of 'a' have 't'; expected"),
        ({"a": PackedRun(7, AdamW())}, InputError, "the batches of 'a' are 7; expected"),
        (
            {"a": PackedRun(a.batches, twice), "b": PackedRun(a.batches, twice)},
            InputError,
            "share an optimizer",
        ),
        (
            {"a": PackedRun(one, AdamW()), "b": PackedRun(one, AdamW())},
            InputError,
            "share an iterator of batches",
        ),
        ({}, InputError, "no runs"),
    ):
        with pytest.raises(error, match=said):
            train_packed(model, runs, steps=1)
    with pytest.raises(ConfigError, match="steps is 0"):
        train_packed(model, {"a": run_of("a")}, steps=0)
    with pytest.raises(ZeroDivisionError):  # after the gradients, before any adapter moves
        train_packed(model, {"a": run_of("a"), "b": PackedRun(run_of("b").batches, twice, broken)}, steps=1)
    assert twice.t == 0
    merge(model)
    with pytest.raises(StateError, match="merged"):
        train_packed(model, {"a": run_of("a")}, steps=1)
    assert active(model) == chosen
    assert all(np.array_equal(p.data, before[path][0]) and p.trainable == before[path][1] and p.grad is None
               for path, p in named_params(model).items() if path in before)  # fmt: skip


def broken(step):
    """A schedule that fails."""
    return 1 / step


def test_runs_that_share_a_generator_of_masks_are_refused():
    """What one draws would change the other's masks; the layers of one run do share theirs."""

    def model(*rngs):
        made, _ = tiny(0)
        for name, rng in zip("ab", rngs, strict=True):
            inject(made, LoraConfig(r=2, dropout=0.3, init="both"), rng=rng, name=name)
        return made

    rng = np.random.default_rng(0)
    runs = {name: run_of(name) for name in "ab"}
    for other in (rng, np.random.Generator(rng.bit_generator)):
        with pytest.raises(InputError, match="two runs share a generator of dropout masks"):
            train_packed(model(rng, other), runs, steps=1)
    own = [np.random.default_rng(k) for k in range(2)]
    losses = train_packed(model(*own), runs, steps=2, invariant=True)
    again = [np.random.default_rng(k) for k in range(2)]
    alone = train_packed(model(*again), {"b": run_of("b")}, steps=2, invariant=True)
    assert losses["b"] == alone["b"]


def test_a_run_that_diverges_is_named_and_every_run_keeps_its_last_good_step():
    model = several(0, names="ab")
    good = copied(model)
    train_packed(good, {name: run_of(name) for name in "ab"}, steps=1)
    runs = {name: run_of(name) for name in "ab"}

    def spoil(step, losses):
        for p in trained_of(model, "b"):
            saved.append((p, p.data.copy()))
            p.data = p.data * np.nan

    saved = []
    with pytest.raises(NonFiniteError, match="'b', step 2: the loss is not finite"):
        train_packed(model, runs, steps=3, progress=spoil)
    for p, data in saved:
        p.data = data
    assert all(same_bits(arrays(model, name), arrays(good, name)) for name in "ab")
    assert [run.optimizer.t for run in runs.values()] == [1, 1]
    assert all(p.grad is None for p in named_params(model).values())
