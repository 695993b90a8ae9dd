"""The spectrum of a change from its thin factors is that of the dense matrix; what the rank measures mean."""

import math
import tracemalloc

import numpy
import pytest
from helpers import EVERYTHING, LINEARS, U, dtypes, gamma, seeds, tiny, tiny_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from library import np

from minilora.backend import to_device
from minilora.errors import InputError, MismatchError
from minilora.layers import Linear, Param, digest, named_params
from minilora.lora import LoraConfig, LowRank, LowRankEmbedding, Replacement, adapted, disabled, inject
from minilora.spectra import (
    effective_rank,
    energy,
    noise_spectrum,
    participation_ratio,
    rank_at,
    singular_values,
    spectrum,
    spectrum_between,
    stable_rank,
    thin_svd,
)  # fmt: skip

MEASURES = (effective_rank, stable_rank, participation_ratio)
spectra_ = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40).map(lambda s: numpy.sort(s)[::-1])


@st.composite
def factors(draw, largest=40):
    """B (O, r) and A (r, I) of any shape with r <= min(O, I), and a scale."""
    m, n = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    r = draw(st.integers(1, min(m, n)))
    rng, dtype = np.random.default_rng(draw(seeds)), draw(dtypes)
    B, A = rng.standard_normal((m, r)).astype(dtype), rng.standard_normal((r, n)).astype(dtype)
    return B, A, draw(st.sampled_from([0.25, 1.0, 2.0, 16.0]))


def rounding(B, A, s):
    """(m + n + r + 2) u s |B||A| in Frobenius norms: reliability.md, N6.

    Both sides compute in float64, to which the factors are widened exactly. QR and SVD are backward
    stable in B and A each, so it is the product of the norms that counts, not the norm of the product.
    """
    (m, r), n = B.shape, A.shape[1]
    norms = np.linalg.norm(B.astype(float)) * np.linalg.norm(A.astype(float))
    return (m + n + r + 2) * U * abs(s) * float(norms)


def dense(B, A, s):
    return s * (B.astype(np.float64) @ A.astype(np.float64))


# ---- thin is dense


@given(given_=factors())
def test_the_thin_spectrum_is_the_dense_one(given_):
    B, A, s = given_
    thin = thin_svd(B, A, s)[1]
    whole = np.linalg.svd(dense(B, A, s), compute_uv=False)
    bound = rounding(B, A, s)
    assert thin.dtype == np.float64
    assert thin.shape == (min(B.shape[1], *dense(B, A, s).shape),)
    assert np.isfinite(thin).all()
    assert (np.diff(thin) <= 0).all()
    assert np.abs(thin - whole[: len(thin)]).max() <= bound
    assert (whole[len(thin) :] <= bound).all()


@given(given_=factors())
def test_the_thin_factors_are_orthonormal_and_reassemble_the_change(given_):
    B, A, s = given_
    L, S, Rt = thin_svd(B, A, s)
    (m, r), n = B.shape, A.shape[1]
    assert np.linalg.norm((L * S) @ Rt - dense(B, A, s)) <= rounding(B, A, s)
    # each of the two products of orthonormal factors: m + r or n + r terms in r² entries
    for Q in (L, Rt.T):
        assert np.linalg.norm(Q.T @ Q - np.eye(len(S))) <= (m + n + r + 2) * r * U


@given(given_=factors(), negative=st.booleans())
def test_an_adapter_has_the_spectrum_of_its_delta(given_, negative):
    B, A, s = given_
    s = -s if negative else s  # a scale may be turned round: singular values are not negative
    bound = rounding(B, A, s)
    for kind in (LowRank, LowRankEmbedding):
        found = to_device(singular_values(kind(Param(A), Param(B), s)))
        delta = kind(Param(A.astype(np.float64)), Param(B.astype(np.float64)), s).delta()
        assert delta.shape == ((len(B), A.shape[1]) if kind is LowRank else (A.shape[1], len(B)))
        assert (found >= 0).all()
        assert np.abs(found - np.linalg.svd(delta, compute_uv=False)[: len(found)]).max() <= bound


def test_a_rank_above_the_shape_gives_no_more_values_than_the_shape_has():
    rng = np.random.default_rng(0)
    B, A = rng.standard_normal((3, 8)), rng.standard_normal((8, 5))
    L, S, Rt = thin_svd(B, A)
    assert (L.shape, S.shape, Rt.shape) == ((3, 3), (3,), (3, 5))
    assert np.linalg.norm((L * S) @ Rt - B @ A) <= rounding(B, A, 1.0)


def test_the_thin_svd_never_forms_the_change():
    n, r = 4000, 4
    rng = np.random.default_rng(0)
    B, A = rng.standard_normal((n, r)), rng.standard_normal((r, n))
    tracemalloc.start()
    thin_svd(B, A)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 8 * r * (n + n)  # twenty copies of both factors; ΔW alone would be 500
    assert 20 * r * (n + n) < n * n


# ---- models


@settings(max_examples=10)
@given(seed=seeds, dtype=dtypes, r=st.integers(1, 8))
def test_the_spectrum_of_a_model_has_every_adapted_matrix(seed, dtype, r):
    model, _ = tiny_lora(seed, dtype, r=r)
    before = digest(model)
    found = spectrum(model)
    assert digest(model) == before
    assert found.keys() == adapted(model).keys()
    for path, layer in adapted(model).items():
        a = layer.adapters["default"]
        A, B = a.A.data, a.B.data
        assert found[path].shape == (r,)
        whole = np.linalg.svd(dense(B, A, a.scale), compute_uv=False)[:r]
        assert np.abs(to_device(found[path]) - whole).max() <= rounding(B, A, a.scale)


@settings(max_examples=10)
@given(seed=seeds, r=st.integers(1, 8))
def test_the_spectrum_of_dora_is_that_of_its_whole_change(seed, r):
    model, _ = tiny_lora(seed, config=LoraConfig(r=r, alpha=7, targets=LINEARS, init="both", dora=True))
    found = spectrum(model)
    assert found.keys() == adapted(model).keys()
    for path, layer in adapted(model).items():
        W, a = layer.base.weight.data, layer.adapters["default"]
        V = W + dense(a.low_rank.B.data, a.low_rank.A.data, a.low_rank.scale)
        new = (a.magnitude.data / np.linalg.norm(V, axis=1))[:, None] * V
        (m, n), s = W.shape, np.linalg.svd(new - W, compute_uv=False)
        assert found[path].shape == (min(m, n),)
        # the norm of n terms, the product of r, five roundings more, twice; and both SVDs
        assert np.abs(to_device(found[path]) - s).max() <= 2 * (m + 2 * n + r + 5) * U * (
            np.linalg.norm(new) + np.linalg.norm(W) + np.linalg.norm(V - W)
        )


def test_the_spectrum_of_a_replacement_is_that_of_copy_minus_base():
    how = LoraConfig(r=2, targets="q_proj", modules_to_save=["up_proj", "embed_tokens", "norm"])
    model, rng = tiny(0)
    inject(model, how, rng=rng)
    for p in named_params(model).values():
        if p.trainable:
            p.data = p.data + rng.standard_normal(p.data.shape)
    found = spectrum(model)
    copies = {k: x for k, x in adapted(model).items() if isinstance(x.adapters["default"], Replacement)}
    matrices = {k for k, x in copies.items() if x.base.weight.data.ndim == 2}
    assert matrices == {k for k in found if k.endswith(("up_proj", "embed_tokens"))}
    assert set(found) == matrices | {k for k in adapted(model) if k.endswith("q_proj")}
    for path in matrices:
        change = copies[path].adapters["default"].layer.weight.data - copies[path].base.weight.data
        whole = np.linalg.svd(change, compute_uv=False)
        bound = (sum(change.shape) + 2) * U * np.linalg.norm(change)
        assert np.abs(to_device(found[path]) - whole).max() <= bound


def test_a_fresh_adapter_has_the_zero_spectrum_and_a_disabled_one_has_none():
    model, rng = tiny(0)
    inject(model, LoraConfig(r=3, targets=EVERYTHING), rng=rng)
    found = spectrum(model)
    assert found
    assert not any(s.any() for s in found.values())
    with disabled(model):
        assert spectrum(model) == {}


def test_the_spectrum_between_two_models_is_that_of_their_difference():
    (base, _), (tuned, rng) = tiny(3), tiny(3)
    added = {}
    for path, p in named_params(tuned).items():
        if p.data.ndim == 2:
            added[path.removesuffix(".weight")] = (p.data + rng.standard_normal(p.data.shape)) - p.data
            p.data = p.data + added[path.removesuffix(".weight")]
    found = spectrum_between(base, tuned)
    assert found.keys() == added.keys()
    for path, change in added.items():
        whole = np.linalg.svd(change, compute_uv=False)
        size = np.linalg.norm(named_params(tuned)[path + ".weight"].data)  # one rounding of the sum more
        bound = (sum(change.shape) + 2) * U * (np.linalg.norm(change) + size)
        assert np.abs(to_device(found[path]) - whole).max() <= bound
    with pytest.raises(MismatchError, match="other parameters"):
        spectrum_between(base, tiny(3, num_hidden_layers=1)[0])


# ---- what the measures mean, on the host


def slack(k):
    """Relative error of the three measures of k values: 2k + 8 roundings, and exp turns |H| into it."""
    return gamma(2 * k + 8) * (2 + math.log(k))


@given(s=spectra_)
def test_every_measure_lies_between_one_and_the_rank(s):
    for measure in MEASURES:
        assert 1 - slack(len(s)) <= measure(s) <= len(s) * (1 + slack(len(s)))
    assert stable_rank(s) <= participation_ratio(s) * (1 + 2 * slack(len(s)))  # sum s⁴ <= max s² sum s²


@given(k=st.integers(1, 100), size=st.floats(1e-6, 1e6), zeros=st.integers(0, 5))
def test_k_equal_singular_values_count_k(k, size, zeros):
    s = numpy.array([size] * k + [0.0] * zeros)
    for measure in MEASURES:
        assert abs(measure(s) - k) <= k * slack(k)
    assert rank_at(s, 1.0) == k


@given(s=spectra_, power=st.integers(-60, 60))
def test_no_measure_depends_on_the_scale(s, power):
    for measure in MEASURES:
        assert abs(measure(s * 2.0**power) - measure(s)) <= measure(s) * slack(len(s))
    assert numpy.array_equal(energy(s * 2.0**power), energy(s))


def test_the_effective_rank_weighs_by_values_not_by_their_squares():
    s = numpy.array([3.0, 1.0])

    def entropy(p):
        return -sum(x * math.log(x) for x in p)

    assert math.isclose(effective_rank(s), math.exp(entropy([0.75, 0.25])), rel_tol=slack(2))
    assert not math.isclose(effective_rank(s), math.exp(entropy([0.9, 0.1])), rel_tol=0.1)
    assert math.isclose(stable_rank(s), 10 / 9, rel_tol=slack(2))
    assert math.isclose(participation_ratio(s), 100 / 82, rel_tol=slack(2))


@pytest.mark.parametrize("n", [0, 1, 5])
def test_the_zero_matrix_has_rank_zero(n):
    s = numpy.zeros(n)
    assert [measure(s) for measure in MEASURES] == [0.0] * 3
    assert rank_at(s, 0.5) == 0
    assert energy(s).shape == (n,)
    assert not energy(s).any()


@given(s=spectra_, share=st.floats(0.01, 1))
def test_energy_rises_to_one_and_rank_at_is_where_it_passes(s, share):
    e = energy(s)
    assert (numpy.diff(e) >= 0).all()
    assert e[-1] == 1
    k = rank_at(s, share)
    assert 1 <= k <= len(s)
    near = len(s) * 2e-12  # rank_at lets a share of 1e-12 pass for rounding
    assert e[k - 1] >= share * (1 - near)
    assert k == 1 or e[k - 2] < share


@pytest.mark.parametrize("share", [0, -1, 1.001, math.nan])
def test_a_share_without_meaning_is_refused(share):
    with pytest.raises(InputError, match="share"):
        rank_at(numpy.ones(3), share)


# ---- noise


SHAPES = [(64, 64), (128, 128), (256, 96), (96, 256), (600, 300)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_has_the_measures_of_the_closed_forms(shape):
    (m, n), draws = shape, 12
    rng = numpy.random.default_rng(1)
    found = numpy.array([[f(noise_spectrum(shape, rng, draws=1)) for f in MEASURES] for _ in range(draws)])
    mean, error = found.mean(0), found.std(0, ddof=1) / math.sqrt(draws)
    print(shape, mean, error)
    effective, stable, participation = mean
    # E|G|⁴ = mn (mn + 2) and E tr (GGᵀ)² = mn (m + n + 1); their ratio is off by 1/mn of itself. Five
    # standard errors of the mean: by chance once in millions.
    exact = (m * n + 2) / (m + n + 1)
    assert abs(participation - exact) <= 5 * error[2] + exact / (m * n)
    assert abs(exact - m * n / (m + n)) <= exact / (m + n)
    # the largest value lies below its limit: facts.md has 4 to 9 % at n = 64 to 128, less above
    limit = m * n / (math.sqrt(m) + math.sqrt(n)) ** 2
    assert limit - 5 * error[1] <= stable <= 1.09 * limit + 5 * error[1]
    if m == n:
        assert 0.80 * n - 5 * error[0] <= effective <= 0.81 * n + 5 * error[0]


@settings(max_examples=10)
@given(m=st.integers(2, 30), n=st.integers(2, 30), seed=seeds, data=st.data())
def test_noise_falls_has_norm_one_and_the_wanted_rank(m, n, seed, data):
    r = data.draw(st.none() | st.integers(1, min(m, n)))
    s = noise_spectrum((m, n), numpy.random.default_rng(seed), rank=r, draws=1)
    assert s.shape == (r or min(m, n),)
    assert (numpy.diff(s) <= 0).all()
    assert abs((s * s).sum() - 1) <= gamma(2 * len(s) + 4)
    again = noise_spectrum((m, n), numpy.random.default_rng(seed), rank=r, draws=1)
    assert again.tobytes() == s.tobytes()


def test_a_dense_change_and_a_plain_layer_agree():
    rng = np.random.default_rng(0)
    B, A = rng.standard_normal((7, 2)), rng.standard_normal((2, 5))
    layer = LowRank(Param(A), Param(B), 0.5)
    base = Linear(Param(np.zeros((7, 5)), False))
    found = singular_values(layer.fold(base).weight.data)
    assert numpy.abs(found[:2] - singular_values(layer)).max() <= rounding(B, A, 0.5)
    assert (found[2:] <= rounding(B, A, 0.5)).all()


def test_energy_is_of_squares():
    s = numpy.array([4.0, 3.0])
    assert energy(s).tolist() == [16 / 25, 1.0]
    assert rank_at(s, 0.6) == 1
