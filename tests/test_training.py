"""The loop: accumulation, checkpoints that go on to the bit, and refusals that leave the last good state."""

import contextlib
import itertools
import json
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
from helpers import (
    LINEARS,
    SIZES,
    assert_precision_scales,
    batch,
    gamma,
    gradients,
    same_bits,
    seeds,
    tiny,
    tiny_lora,
    unit,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from library import np
from safetensors.numpy import load, save

from minilora.backend import to_host
from minilora.errors import (
    ConfigError,
    FormatError,
    InputError,
    MiniloraError,
    MismatchError,
    NonFiniteError,
    StateError,
    StorageError,
)  # fmt: skip
from minilora.formats.atomic import read, write_atomic
from minilora.formats.checkpoint import History, load_checkpoint, save_checkpoint
from minilora.lora import inject, merge, unmerge
from minilora.methods.lora_config import LoraConfig
from minilora.model import Llama
from minilora.optim import AdamW, Schedule, lora_plus
from minilora.session import finished
from minilora.training import about, evaluate, train
from minilora.tree import digest, freeze, named_params, trained

STEPS = 6
SCHEDULE = Schedule(STEPS, warmup=1, final=0.1)
SHAPE = {"r": 3, "alpha": 7, "targets": LINEARS, "init": "both", "dropout": 0.3, "modules_to_save": ["norm"]}


class Run:
    """One training run from its seeds: model, generators, batches, optimizer."""

    def __init__(self, config=None, seed=4, base=0, dtype=np.float32, **optimizer):
        self.model, _ = tiny(base, dtype)
        self.rngs = {"batches": np.random.default_rng(seed), "dropout": np.random.default_rng(seed + 1)}
        inject(self.model, LoraConfig(**SHAPE | (config or {})), rng=self.rngs["dropout"])
        self.optimizer = AdamW(**{"lr": 0.02, "weight_decay": 0.1, "clip": 0.5} | optimizer)

    def batches(self):
        while True:
            yield batch(self.rngs["batches"])

    def train(self, steps=STEPS, **how):
        self.history = train(
            self.model, self.batches(), self.optimizer, steps=steps, schedule=SCHEDULE, accumulate=2,
            evaluate=lambda: evaluate(self.model, [batch(np.random.default_rng(9))]), eval_every=5,
            rngs=self.rngs, **how,
        )  # fmt: skip
        return self

    def about(self):
        return about(self.model, self.optimizer, SCHEDULE, 2)

    def load(self, path):
        return load_checkpoint(path, self.model, self.optimizer, self.rngs, self.about(), STEPS)

    def state(self):
        return (
            digest(self.model), self.history.loss, self.history.evals, self.optimizer.t,
            {k: a.tobytes() for k, a in sorted(self.optimizer.state().items())},
            {k: rng.bit_generator.state for k, rng in self.rngs.items()},
        )  # fmt: skip


class Stopped(Exception):
    """The process dies here."""


def stop_at(step):
    def progress(done, loss):
        if done == step:
            raise Stopped

    return progress


@pytest.fixture(scope="module")
def whole():
    return Run().train().state()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint after 3 of the steps."""
    path = tmp_path_factory.mktemp("saved") / "c.safetensors"
    with pytest.raises(Stopped):
        Run().train(checkpoint=path, checkpoint_every=3, progress=stop_at(3))
    return path


# ---- what the loop computes


@settings(max_examples=8)
@given(seed=seeds)
def test_accumulated_batches_equal_one_batch(seed):
    def both(dtype):
        model, rng = tiny_lora(seed, dtype)
        ids, labels = batch(rng, n=6, ignored=0.0)  # equal weight
        start = {k: p.data.copy() for k, p in trained(model).items()}
        result = []
        for parts in (1, 3):
            for k, p in trained(model).items():
                p.data = start[k].copy()
            pairs = list(zip(np.split(ids, parts), np.split(labels, parts), strict=True))
            # without the signs of Adam the first moment is the gradient
            optimizer = AdamW(betas=(0.0, 0.0), clip=None)
            train(model, pairs, optimizer, steps=1, accumulate=parts)
            result.append(np.concatenate([a.ravel() for k, a in sorted(optimizer.m.items())]))
        return result

    assert_precision_scales(both)


@settings(max_examples=10)
@given(seed=seeds, dtype=st.sampled_from([np.float32, np.float64]))
def test_evaluation_weighs_batches_by_their_labels(seed, dtype):
    model, rng = tiny(seed, dtype)  # without an adapter, which evaluate would fold: another rounding
    ids, labels = batch(rng, n=6, ignored=0.5)
    parts = list(zip(np.split(ids, [1, 3]), np.split(labels, [1, 3]), strict=True))
    parts = [(i, t) for i, t in parts if (t >= 0).any()]
    counts = [int((t >= 0).sum()) for _, t in parts]
    losses = [float(model.loss(*part)[0]) for part in parts]
    mean = sum(c * x for c, x in zip(counts, losses, strict=True)) / sum(counts)
    assert abs(evaluate(model, parts) - mean) <= gamma(2 * 5) * mean
    before = digest(model)
    evaluate(model, parts)
    assert digest(model) == before
    assert all(p.grad is None for p in named_params(model).values())


def test_a_run_lowers_the_loss_and_records_every_step():
    run = Run(dtype=np.float64, lr=0.02)
    fixed = batch(np.random.default_rng(3))
    seen = []
    history = train(
        run.model, [fixed] * 30, run.optimizer, steps=30, eval_every=7,
        evaluate=lambda: evaluate(run.model, [fixed]),
        progress=lambda step, loss: seen.append((step, loss)),
    )  # fmt: skip
    assert [step for step, _ in history.evals] == [0, 7, 14, 21, 28, 30]
    assert seen == list(enumerate(history.loss, 1))
    assert history.evals[-1][1] < history.evals[0][1]
    assert all(p.grad is None for p in named_params(run.model).values())


def test_train_updates_every_parameter_of_a_model_without_adapters():
    model, rng = tiny(0, np.float32)
    before = {k: p.data.copy() for k, p in named_params(model).items()}
    train(model, [batch(rng)] * 2, AdamW(lr=0.01), steps=2)
    assert not any(np.array_equal(p.data, before[k]) for k, p in named_params(model).items())


# ---- going on


@pytest.mark.parametrize("stop", range(1, STEPS + 1))
@pytest.mark.parametrize("every", [1, 2, 4])
def test_a_run_stopped_anywhere_resumes_to_the_same_bits(stop, every, whole, tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(Stopped):
        Run().train(checkpoint=path, checkpoint_every=every, progress=stop_at(stop))
    assert Run().train(checkpoint=path, checkpoint_every=every).state() == whole
    again = Run().train(checkpoint=path)  # a run that is done has nothing to do
    assert again.state() == whole


few = st.integers(1, 3)


@settings(max_examples=6)
@given(accumulate=few, stop=few, every=few, longer=st.integers(0, 2))
def test_a_run_over_a_list_of_batches_resumes_at_its_position(
    accumulate, stop, every, longer, tmp_path_factory
):
    """No generator knows how far the list was read: the steps that are done do, `accumulate` batches each."""
    path = tmp_path_factory.mktemp("list") / "c"
    pairs = [batch(np.random.default_rng(i)) for i in range(4 * accumulate + longer)]

    def run(**how):
        model, _ = tiny_lora(0, np.float32)
        history = train(model, pairs, AdamW(lr=0.02), steps=4, accumulate=accumulate, **how)
        return digest(model), history

    with pytest.raises(Stopped):
        run(checkpoint=path, checkpoint_every=every, progress=stop_at(stop))
    assert run(checkpoint=path, checkpoint_every=every) == run()


def test_a_checkpoint_does_not_change_the_run(whole, tmp_path):
    assert Run().train(checkpoint=tmp_path / "c", checkpoint_every=1).state() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_saving_and_loading_are_inverse(saved, tmp_path):
    run = Run(seed=5)
    history = run.load(saved)
    save_checkpoint(tmp_path / "c", run.model, run.optimizer, run.rngs, history, run.about())
    other = Run(seed=6)
    assert other.load(tmp_path / "c") == history
    run.history = other.history = history
    assert run.state() == other.state()


# ---- checkpoints that do not fit


OTHERS = {
    "base": {"base": 1},
    "dtype": {"dtype": np.float64},
    "rank": {"config": {"r": 2}},
    "targets": {"config": {"targets": "q_proj"}},
    "alpha": {"config": {"alpha": 8}},
    "lr": {"lr": 0.01},
    "betas": {"betas": (0.8, 0.999)},
    "the second beta": {"betas": (0.9, 0.99)},
    "eps": {"eps": 1e-6},
    "decay": {"weight_decay": 0.0},
    "clip": {"clip": None},
    "dropout": {"config": {"dropout": 0.2}},
    "the rate of a group": {"rate": lora_plus(4)},
    "what decays": {"decays": lambda path, p: True},
}


def attempt(run, path, error):
    """Loading fails with one line that names the file, and nothing of the run has changed."""
    run.history = History()
    before = run.state()
    with pytest.raises(error) as e:
        run.load(path)
    assert str(path) in str(e.value)
    assert len(str(e.value).splitlines()) == 1
    assert run.state() == before


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_run_is_refused(other, saved):
    attempt(Run(**OTHERS[other]), saved, MismatchError)


def test_a_checkpoint_records_every_optimizer_setting():
    tried = {name for how in OTHERS.values() for name in how}
    assert tried >= {f.name for f in fields(AdamW)} - {"t", "m", "v"}  # which the checkpoint holds itself


@pytest.mark.parametrize("other", [
    {"steps": STEPS + 1}, {"warmup": 2}, {"kind": "constant"}, {"final": 0.2}, {}, {"accumulate": 3},
], ids=str)  # fmt: skip
def test_a_checkpoint_of_another_schedule_or_accumulation_is_refused(other, saved):
    run, how = Run(), {"accumulate": 2} | other
    accumulate = how.pop("accumulate")
    schedule = replace(SCHEDULE, **how) if other else None
    with pytest.raises(MismatchError, match="accumulate" if accumulate == 3 else "schedule"):
        load_checkpoint(saved, run.model, run.optimizer, run.rngs,
                        about(run.model, run.optimizer, schedule, accumulate), STEPS)  # fmt: skip
    assert {f.name for f in fields(Schedule)} == {"steps", "warmup", "kind", "final"}


def test_a_checkpoint_with_other_generators_is_refused(saved):
    run = Run()
    del run.rngs["dropout"]
    attempt(run, saved, MismatchError)


def test_a_missing_checkpoint_is_a_storage_error(tmp_path):
    attempt(Run(), tmp_path / "none", StorageError)


@pytest.mark.parametrize("damage", ["prefix", "longer", "zeros", "text", "empty", "no metadata"])
def test_a_damaged_checkpoint_is_refused(damage, saved, tmp_path):
    data, path = read(saved), tmp_path / "c"
    header = int.from_bytes(data[:8], "little")
    cuts = [0, 7, 8, 9, 8 + header // 2, 8 + header - 1, 8 + header, 9 + header, len(data) - 1]
    plain = json.loads(data[8 : 8 + header])
    del plain["__metadata__"]
    bare = json.dumps(plain).encode()
    cases = {
        "prefix": [data[:n] for n in cuts], "longer": [data + b"\0", data + data],
        "zeros": [bytes(len(data))], "text": [b"{}" * 40], "empty": [b""],
        "no metadata": [len(bare).to_bytes(8, "little") + bare + data[8 + header :]],
    }  # fmt: skip
    run = Run()
    for case in cases[damage]:
        write_atomic(path, case)
        attempt(run, path, FormatError)


def altered(saved, path, meta=lambda m: m, tensors=lambda t: t):
    """A copy of the checkpoint with other metadata or arrays, well-formed otherwise."""
    data = read(saved)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = json.dumps(meta(json.loads(header["__metadata__"]["minilora"])))
    write_atomic(path, save(tensors(load(data)), metadata={"minilora": text}))
    return path


def without(key):
    return lambda m: {k: v for k, v in m.items() if k != key}


META = {
    "a list": lambda m: [1], "null": lambda m: None, "no digest": without("sha256"),
    "no rngs": without("rngs"), "no history": without("history"),
    "no run": without("run"), "another run": lambda m: m | {"run": m["run"] | {"base": "0"}},
    "rngs of text": lambda m: m | {"rngs": "x"},
    "an empty state": lambda m: m | {"rngs": m["rngs"] | {"batches": {}}},
    "another generator": lambda m: m | {"rngs": {k: {"bit_generator": "MT19937"} for k in m["rngs"]}},
    "step and history apart": lambda m: m | {"history": {"loss": [], "evals": []}},
    "a loss of text": lambda m: m | {"history": {"loss": ["x", "y", "z"], "evals": []}},
}  # fmt: skip


@pytest.mark.parametrize("change", META)
def test_a_checkpoint_with_wrong_metadata_is_refused_and_changes_nothing(change, saved, tmp_path):
    attempt(Run(), altered(saved, tmp_path / "c", META[change]), MiniloraError)


def test_a_copy_with_the_same_metadata_is_accepted(saved, tmp_path):
    run = Run()
    history = run.load(altered(saved, tmp_path / "c"))
    assert len(history.loss) == 3


def test_half_precision_is_restored_exactly(tmp_path):
    run = Run()
    params = trained(run.model)
    for p in params.values():
        p.data = (p.data + 0.1).astype(np.float16)
    saved = {k: to_host(p.data).tobytes() for k, p in params.items()}
    save_checkpoint(tmp_path / "c", run.model, run.optimizer, run.rngs, History([1.0]), run.about())
    for p in params.values():
        p.data[:] = 0
    run.load(tmp_path / "c")
    for k, p in params.items():
        assert p.data.dtype == np.float16
        assert to_host(p.data).tobytes() == saved[k]


@pytest.mark.parametrize("kind", ["m.", "v.", "p."])
def test_a_checkpoint_with_a_missing_array_is_refused(kind, saved, tmp_path):
    def drop(tensors):
        del tensors[next(k for k in sorted(tensors) if k.startswith(kind))]
        return tensors

    attempt(Run(), altered(saved, tmp_path / "c", tensors=drop), FormatError)


@pytest.mark.parametrize("kind", ["m.", "v.", "p."])
@pytest.mark.parametrize("other", ["dtype", "shape"])
def test_a_checkpoint_of_other_dtypes_or_shapes_is_refused(other, kind, saved, tmp_path):
    def turn(tensors):
        turned = {k: a.astype(np.float64) if other == "dtype" else a[None] for k, a in tensors.items()}
        return {k: turned[k] if k.startswith(kind) else a for k, a in tensors.items()}

    attempt(Run(), altered(saved, tmp_path / "c", tensors=turn), FormatError)


@settings(max_examples=60)
@given(data=st.data())
def test_a_flipped_bit_of_the_header_is_an_error_or_harmless(data, saved, tmp_path_factory):
    raw = bytearray(read(saved))
    at = data.draw(st.integers(0, 8 + int.from_bytes(raw[:8], "little") - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flip") / "c"
    write_atomic(path, bytes(raw))
    run = Run()
    with contextlib.suppress(MiniloraError):
        run.load(path)
    shutil.rmtree(path.parent)


# ---- what stops a run


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_at_the_last_good_step(bad, tmp_path):
    run, good = Run(), Run()
    good.train(steps=2)

    def poisoned():
        for step, pair in enumerate(run.batches()):
            if step == 5:  # the second batch of the third step
                run.model.model.embed_tokens.weight.data[:] = bad
            yield pair

    with np.errstate(invalid="ignore"), pytest.raises(NonFiniteError, match=r"step 3: the loss"):
        train(
            run.model, poisoned(), run.optimizer, steps=STEPS, schedule=SCHEDULE,
            accumulate=2, checkpoint=tmp_path / "c", checkpoint_every=1, rngs=run.rngs,
        )  # fmt: skip
    ours, theirs = ({k: p.data for k, p in trained(r.model).items()} for r in (run, good))
    assert same_bits(ours, theirs)
    assert all(p.grad is None for p in named_params(run.model).values())
    other = Run()
    assert len(other.load(tmp_path / "c").loss) == 2


def test_a_gradient_that_is_not_finite_updates_nothing(monkeypatch):
    run = Run()
    real = Llama.loss

    def loss(replica, ids, labels, train=False):
        value, back = real(replica, ids, labels, train)

        def poisoned(d=1.0):
            back(d)
            list(trained(replica).values())[-1].grad[...] = np.inf

        return value, poisoned

    monkeypatch.setattr(Llama, "loss", loss)
    before = digest(run.model)
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient of .* is not finite"):
        run.train(steps=1)
    assert digest(run.model) == before
    assert all(p.grad is None for p in named_params(run.model).values())


def test_options_are_given_by_name():
    run, rng = Run(), np.random.default_rng(0)
    with pytest.raises(TypeError):
        train(run.model, run.batches(), AdamW(), 1)
    with pytest.raises(TypeError):
        inject(run.model, LoraConfig(r=2), rng)


def test_training_without_parameters_or_batches_or_merged_is_refused():
    run, rng = Run(), np.random.default_rng(0)
    before = digest(run.model)
    with pytest.raises(InputError, match="ran out; expected 1 more for step 1"):
        train(run.model, [batch(rng)], AdamW(), steps=1, accumulate=2)
    with pytest.raises(InputError, match="ran out; expected 1 more for step 1"):
        train(run.model, [], AdamW(), steps=1)
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate(run.model, [])
    merge(run.model)
    with pytest.raises(StateError, match="merged"):
        train(run.model, run.batches(), AdamW(), steps=1)
    assert all(p.grad is None for p in named_params(run.model).values())
    base, _ = tiny()
    freeze(base)
    with pytest.raises(StateError, match="nothing is trainable"):
        train(base, run.batches(), AdamW(), steps=1)
    unmerge(run.model)
    assert digest(run.model) == before


def test_an_invalid_batch_leaves_no_gradient():
    run = Run()
    before = digest(run.model)
    bad = (np.full((1, 2), SIZES["vocab_size"]), np.zeros((1, 2), int))
    with pytest.raises(InputError, match="token id 11"):
        train(run.model, [next(run.batches()), bad], run.optimizer, steps=1, accumulate=2)
    assert digest(run.model) == before
    assert all(p.grad is None for p in named_params(run.model).values())


@pytest.mark.parametrize(
    "bad",
    [{"steps": 0}, {"steps": -1}, {"steps": 1.0}, {"steps": True}, {"accumulate": 0}, {"accumulate": 2.0},
     {"eval_every": 0}, {"eval_every": -1}, {"checkpoint_every": 0}, {"checkpoint_every": 1.5}],
    ids=repr,
)  # fmt: skip
def test_an_invalid_number_of_steps_is_refused(bad):
    run = Run()
    before = digest(run.model)
    with pytest.raises(ConfigError, match=next(iter(bad))):
        train(run.model, run.batches(), run.optimizer, **{"steps": 1} | bad)
    assert digest(run.model) == before


def test_the_loss_of_a_step_is_the_mean_of_its_batches():
    model, rng = tiny(0, np.float32)  # without an adapter, which train would fold: another rounding
    pairs = [batch(rng) for _ in range(2)]
    losses = [float(gradients(model, *pair)[0]) for pair in pairs]
    history = train(model, pairs, AdamW(), steps=1, accumulate=2)
    assert math.isclose(history.loss[0], sum(losses) / 2, rel_tol=2 * unit(np.float64))


@pytest.mark.parametrize("at", range(4))
def test_the_schedule_is_evaluated_at_the_current_step(at):
    model, rng = tiny_lora(0, np.float32)
    digests = [digest(model)]
    train(
        model, [batch(rng) for _ in range(4)], AdamW(), steps=4, schedule=lambda step: float(step == at),
        progress=lambda step, loss: digests.append(digest(model)),
    )  # fmt: skip
    assert [a != b for a, b in itertools.pairwise(digests)] == [step == at for step in range(4)]


@pytest.mark.parametrize("steps", [300, 301])  # small integers are one object each, large ones are not
def test_a_run_is_finished_when_its_checkpoint_has_all_its_steps_and_is_older(steps, tmp_path):
    path = tmp_path / "c.safetensors"
    said = {"history": {"loss": [1.0] * 300}, "run": {"recipe": {"steps": steps}}}
    path.write_bytes(save({"x": np.ones(1)}, metadata={"minilora": json.dumps(said)}))
    written = path.stat().st_mtime_ns
    assert [finished(path, written + more) for more in (-1, 0, 1)] == [False, steps == 300, steps == 300]
    path.write_bytes(b"no checkpoint")
    assert not finished(path, written + 10**18)


def test_a_history_prints_its_first_and_last_losses():
    assert str(History()) == "no steps"
    assert str(History([2.0])) == "1 step, loss 2.0000 -> 2.0000"
    assert str(History([3.0, 2.0], [(0, 3.5), (2, 1.25)])).splitlines() == [
        "2 steps, loss 3.0000 -> 2.0000", "step  evaluation", "0         3.5000", "2         1.2500",
    ]  # fmt: skip
    for n in (10, 11, 999):  # of many evaluations the first and the last
        said = str(History([1.0], [(step, float(step)) for step in range(n)])).splitlines()[2:]
        assert len(said) == min(n, 11)
        assert said[4].split() == ["4", "4.0000"]
        assert said[-1].split() == [str(n - 1), f"{n - 1}.0000"]
        assert ("..." in said) is (n > 10)


IDS = np.zeros((2, 5), np.int64)
NO_BATCHES = {
    "a text": ("To be", "'To be', a text or a path"),
    "a path": (Path("my.txt"), "'my.txt', a text or a path"),
    "ids": (IDS, r"one array of shape \(2, 5\)"), "one batch": ((IDS, IDS), "one batch"),
    "texts": (["To be"], "a list of str"), "arrays": ([IDS, IDS], r"a list of \w+"),
    "dicts": ([{"input_ids": [1]}], "a list of dict"), "a dict": ({"input_ids": IDS}, "of type dict"),
    "nothing": (None, "of type NoneType"), "a number": (3, "of type int"),
    "triples": ([(IDS, IDS, IDS)], "a list of tuple"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_BATCHES)
def test_invalid_batches_are_refused_with_how_to_make_them(kind):
    given, said = NO_BATCHES[kind]
    run = Run()
    before = digest(run.model)
    with pytest.raises(InputError, match=rf"^batches is {said}; expected \(ids, labels\) .* ml.batches\("):
        train(run.model, given, run.optimizer, steps=1)
    with pytest.raises(InputError, match=rf"^batches is {said}; expected .* ml.eval_batches\("):
        evaluate(run.model, given)
    assert digest(run.model) == before


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_batches_may_be_any_iterable_of_pairs(kind):
    run = Run()
    rng = np.random.default_rng(0)
    pairs = [batch(rng), list(batch(rng))]
    assert math.isfinite(evaluate(run.model, kind(pairs)))
    assert len(train(run.model, kind(pairs), run.optimizer, steps=2).loss) == 2
