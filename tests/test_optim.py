"""AdamW is the algorithm of the paper; clipping bounds the norm; schedules have the stated shape."""

import math

import pytest
from helpers import EVERYTHING, batch, dtypes, gamma, seeds, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from library import np

from minilora.adapters import scales, set_scale
from minilora.errors import ConfigError, MismatchError, NonFiniteError
from minilora.layers import Param
from minilora.lora import inject
from minilora.methods.lora_config import LoraConfig
from minilora.optim import AdamW, Schedule, global_norm, lora_plus
from minilora.training import train
from minilora.tree import trained

SHAPES = {"q_proj.A": (3, 5), "q_proj.B": (4, 3), "norm.weight": (5,), "idle": (2,)}


def drawn(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {k: Param(rng.standard_normal(s).astype(dtype)) for k, s in SHAPES.items()}, rng


@settings(max_examples=20)
@given(seed=seeds, decay=st.sampled_from([0.0, 0.1]), clip=st.sampled_from([None, 0.5, 1e9]),
       ratio=st.sampled_from([1.0, 16.0]), beta=st.sampled_from([0.0, 0.9]))  # fmt: skip
def test_adamw_is_the_papers_algorithm(seed, decay, clip, ratio, beta):
    params, rng = drawn(seed)
    optimizer = AdamW(0.02, (beta, 0.95), 1e-6, weight_decay=decay, clip=clip, rate=lora_plus(ratio))
    plain = {k: p.data.astype(np.longdouble) for k, p in params.items()}
    mass = {k: np.abs(a) for k, a in plain.items()}  # the sum of all that is added up, without its signs
    m = dict.fromkeys(plain, np.longdouble(0))
    v, size = dict(m), dict(m)
    for t in range(1, 6):
        g = {k: rng.standard_normal(s) for k, s in SHAPES.items() if k != "idle"}
        for k in g:
            params[k].grad = g[k].copy()
        norm = math.sqrt(sum((a * a).sum() for a in g.values()))
        factor = 0.5 if t == 3 else 1.0
        # one sum of 32 squares
        assert abs(optimizer.step(params, factor * 0.02) - norm) <= gamma(32) * norm
        for k, a in g.items():
            a = a * (1 if clip is None else min(1, clip / norm))
            m[k], size[k] = beta * m[k] + (1 - beta) * a, beta * size[k] + (1 - beta) * np.abs(a)
            v[k] = 0.95 * v[k] + (1 - 0.95) * a * a
            rate = factor * 0.02 * (ratio if k.endswith("B") else 1)
            width = rate / (1 - beta**t) / (np.sqrt(v[k] / (1 - 0.95**t)) + 1e-6)
            plain[k] = plain[k] * (1 - rate * decay * (k != "norm.weight")) - width * m[k]
            mass[k] = mass[k] + width * size[k]
            assert params[k].grad is None
    for k, p in params.items():
        # a step rounds fewer than 20 times beside the norm (32), and 5 steps follow each other
        assert (np.abs(p.data - plain[k]) <= gamma(5 * (20 + 32)) * mass[k]).all(), k
    assert np.array_equal(params["idle"].data, drawn(seed)[0]["idle"].data)  # which never had a gradient


def test_without_gradient_and_decay_nothing_changes():
    params, _ = drawn(0, np.float32)
    for _ in range(3):
        for p in params.values():
            p.grad = np.zeros_like(p.data)
        AdamW(lr=0.1).step(params)
    before, _ = drawn(0, np.float32)
    assert all(np.array_equal(p.data, before[k].data) for k, p in params.items())


def test_a_rate_of_zero_changes_nothing():
    params, rng = drawn(0, np.float32)
    for p in params.values():
        p.grad = rng.standard_normal(p.data.shape).astype(np.float32)
    AdamW(lr=0.1, weight_decay=0.5).step(params, lr=0.0)
    before, _ = drawn(0, np.float32)
    assert all(np.array_equal(p.data, before[k].data) for k, p in params.items())


@given(seed=seeds, clip=st.sampled_from([1e-3, 1.0, 1e3]))
def test_clipping_keeps_the_direction_and_bounds_the_norm(seed, clip):
    params, rng = drawn(seed)
    g = {k: rng.standard_normal(s) for k, s in SHAPES.items()}
    for k, p in params.items():
        p.grad = g[k]
    norm = global_norm(params)
    optimizer = AdamW(clip=clip, betas=(0.0, 0.0))
    assert optimizer.step(params) == norm
    # with b1 = 0 the first moment is the clipped gradient; one product and one quotient round
    for k, m in optimizer.m.items():
        assert (np.abs(m - g[k] * min(1.0, clip / norm)) <= gamma(3) * np.abs(m)).all()
    total = math.sqrt(sum((m * m).sum() for m in optimizer.m.values()))
    assert total <= min(clip, norm) * (1 + gamma(2 * 34))  # two norms of 34 squares


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_parameters_are_updated_in_place_and_keep_their_dtype(dtype):
    params, rng = drawn(0, dtype)
    arrays = {k: p.data for k, p in params.items()}
    for p in params.values():
        p.grad = rng.standard_normal(p.data.shape).astype(dtype)
    optimizer = AdamW(weight_decay=0.1)
    optimizer.step(params)
    assert all(p.data is arrays[k] for k, p in params.items())
    assert {a.dtype for a in [*arrays.values(), *optimizer.state().values()]} == {np.dtype(dtype)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    params, _ = drawn(0)
    optimizer = AdamW(weight_decay=0.1)
    for p in params.values():
        p.grad = np.ones_like(p.data)
    params["q_proj.B"].grad[1, 1] = bad
    with pytest.raises(NonFiniteError, match=r"step 1.*q_proj\.B"):
        optimizer.step(params)
    assert all(np.array_equal(p.data, drawn(0)[0][k].data) for k, p in params.items())
    assert (optimizer.t, optimizer.m, optimizer.v) == (0, {}, {})


@given(seed=seeds, steps=st.integers(1, 4))
def test_state_and_load_are_inverse(seed, steps):
    (params, rng), (others, _) = drawn(seed), drawn(seed)
    one, two = AdamW(), AdamW()
    for step in range(2 * steps):
        g = {k: rng.standard_normal(s) for k, s in SHAPES.items()}
        for k, p in params.items():
            p.grad = g[k]
        one.step(params)
        if step == steps - 1:
            two.load(one.state(), one.t)
            for k, p in others.items():
                p.data[:] = params[k].data
        if step >= steps:
            for k, p in others.items():
                p.grad = g[k]
            two.step(others)
    assert all(np.array_equal(p.data, others[k].data) for k, p in params.items())
    assert one.t == two.t
    two.load(AdamW().state(), 0)  # of one that has made no step
    assert (two.t, two.m, two.v) == (0, {}, {})
    before = two.t, two.m, two.v
    for bad in ({"x": np.ones(2)}, {"m.x": np.ones(2)}, {"m.x": np.ones(2), "v.x": np.ones(3)}):
        with pytest.raises(MismatchError, match="x'"):
            two.load(bad, 1)
        assert all(a is b for a, b in zip(before, (two.t, two.m, two.v), strict=True))


@settings(max_examples=8)
@given(seed=seeds, p=st.integers(-3, 3), q=st.integers(-3, 3), dtype=dtypes)
def test_adam_is_invariant_to_moving_the_scale_into_the_factors(seed, p, q, dtype):
    """alpha / (pq), A times p, the rate of A times p and of B times q: the same training.

    Thinking Machines 2025, "LoRA Without Regret". Powers of two round nothing, so the losses are equal
    to the bit; eps is far below every gradient, so that it vanishes beside them.
    """

    def losses(p, q):
        model, rng = tiny(seed, dtype)
        inject(model, LoraConfig(r=3, alpha=6, targets=SOME), rng=rng)
        set_scale(model, {path: s / (p * q) for path, s in scales(model).items()})
        for path, a in trained(model).items():
            if path.endswith(".A"):
                a.data *= dtype(p)
        batches = [batch(rng) for _ in range(4)]
        optimizer = AdamW(lr=0.01, eps=1e-30, clip=None, rate=lambda path: q if path.endswith(".B") else p)
        return train(model, batches, optimizer, steps=4).loss

    assert losses(2.0**p, 2.0**q) == losses(1.0, 1.0)


@settings(max_examples=8)
@given(seed=seeds, p=st.integers(-3, 3), eps=st.sampled_from([1e-8, 1e-2]),
       clip=st.sampled_from([None, 1e-2]), decay=st.sampled_from([0.0, 0.5]), dtype=dtypes)  # fmt: skip
def test_with_both_factors_scaled_alike_eps_clipping_and_decay_are_scaled_with_them(
    seed, p, eps, clip, decay, dtype
):
    """alpha / p², A and both rates times p, eps, clip and decay / p: the same training, for every eps."""

    def losses(p):
        model, rng = tiny(seed, dtype)
        inject(model, LoraConfig(r=3, alpha=6 / p**2, targets=SOME), rng=rng)
        for path, a in trained(model).items():
            if path.endswith(".A"):
                a.data *= dtype(p)
        batches = [batch(rng) for _ in range(4)]
        optimizer = AdamW(0.01 * p, eps=eps / p, clip=clip and clip / p, weight_decay=decay / p)
        return train(model, batches, optimizer, steps=4).loss

    assert losses(2.0**p) == losses(1.0)


SOME = ["q_proj", "v_proj", "up_proj", "down_proj"]


def test_lora_plus_raises_the_rate_of_B_only():
    model, rng = tiny()
    inject(model, LoraConfig(r=2, targets=EVERYTHING), rng=rng)
    rate = lora_plus(16.0)
    assert {path.rpartition(".")[2]: rate(path) for path in trained(model)} == {"A": 1.0, "B": 16.0}


# ---- schedules


@given(steps=st.integers(1, 50), warm=st.floats(0, 1), kind=st.sampled_from(["cosine", "constant"]),
       final=st.floats(0, 1))  # fmt: skip
def test_a_schedule_warms_up_to_one_and_falls_to_its_final_value(steps, warm, kind, final):
    warmup = int(warm * steps)
    s = Schedule(steps, warmup, kind, final)
    values = [s(i) for i in range(steps + 3)]
    assert values[:warmup] == [(i + 1) / (warmup + 1) for i in range(warmup)]
    assert values[warmup] == (1.0 if kind == "constant" or warmup < steps else final)
    after = values[warmup:]
    assert after == sorted(after, reverse=True)
    assert all(0 < v <= 1 for v in values[:steps])  # every step that is made learns
    # cos is within an ulp of its value at pi
    assert abs(values[steps] - (1.0 if kind == "constant" else final)) <= gamma(4)


@pytest.mark.parametrize(
    "bad",
    [{"lr": 0}, {"lr": -1}, {"lr": math.nan}, {"lr": math.inf}, {"lr": "1"}, {"lr": None},
     {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"betas": (0.9, math.nan)}, {"eps": 0}, {"eps": -1.0},
     {"weight_decay": -0.1}, {"weight_decay": math.inf}, {"clip": 0}, {"clip": -1.0}, {"clip": math.nan},
     {"lr": True},
     {"betas": (0.9,)}, {"betas": 0.9}],
    ids=repr,
)  # fmt: skip
def test_invalid_optimizer_settings_are_refused(bad):
    with pytest.raises(ConfigError) as e:
        AdamW(**bad)
    assert next(iter(bad)) in str(e.value)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
    "bad",
    [{"steps": 0}, {"steps": -1}, {"steps": 2.0}, {"steps": True}, {"warmup": 6}, {"warmup": -1},
     {"warmup": 1.0}, {"kind": "linear"}, {"final": -0.1}, {"final": 1.1}, {"final": math.nan},
     {"final": 1 + 2**-52}],
    ids=repr,
)  # fmt: skip
def test_invalid_schedule_settings_are_refused(bad):
    with pytest.raises(ConfigError, match=str(next(iter(bad.values()))).replace(".", r"\.")):
        Schedule(**{"steps": 5} | bad)


def test_a_number_too_long_to_print_is_refused():
    with pytest.raises(ConfigError, match="final is"):
        Schedule(5, final=10**5000)


@pytest.mark.parametrize("ratio", [0, -1, math.nan, math.inf, "16"])
def test_an_invalid_ratio_is_refused(ratio):
    with pytest.raises(ConfigError, match="ratio"):
        lora_plus(ratio)


def test_the_defaults_are_the_papers_with_no_decay():
    """Kingma and Ba 2015, section 2; a rate of 1e-3 there, too."""
    usual = AdamW()
    assert (usual.lr, usual.betas, usual.eps, usual.weight_decay) == (1e-3, (0.9, 0.999), 1e-8, 0.0)


def test_by_default_lora_plus_is_16_times_as_fast_and_a_schedule_ends_at_zero():
    """16 is the ratio of Hayou et al. 2024 for language models."""
    assert lora_plus()("q_proj.adapters.default.B") == 16 * lora_plus()("q_proj.adapters.default.A") == 16
    assert Schedule(7)(7) == 0
