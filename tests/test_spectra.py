"""The spectrum of a change from its thin factors is that of the dense matrix; what the rank measures mean."""

import math
import tracemalloc

import numpy
import pytest
from helpers import EVERYTHING, LINEARS, U, dtypes, gamma, seeds, tiny, tiny_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from library import np

from minilora.adapters import disabled
from minilora.backend import to_device
from minilora.errors import InputError, MismatchError
from minilora.layers import Linear, Param
from minilora.lora import LowRank, adapted, inject
from minilora.methods.embedding import LowRankEmbedding
from minilora.methods.full_copy import FullCopy
from minilora.methods.lora_config import LoraConfig
from minilora.spectra import (
    amplification,
    effective_rank,
    energy,
    intruder_threshold,
    intruders,
    noise_spectrum,
    participation_ratio,
    random_similarity,
    rank_at,
    rank_shown,
    similarity,
    singular_values,
    spectrum,
    spectrum_between,
    stable_rank,
    thin_svd,
    thin_values,
    top_vectors,
)  # fmt: skip
from minilora.tree import digest, named_params

MEASURES = (effective_rank, stable_rank, participation_ratio)
spectra_ = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40).map(lambda s: numpy.sort(s)[::-1])


@st.composite
def factors(draw, largest=40, beyond=0):
    """B (O, r) and A (r, I) of any shape with r <= min(O, I), or so many beyond that, and a scale."""
    m, n = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    r = draw(st.integers(1, min(m, n) + beyond))
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
def test_the_thin_spectrum_matches_the_dense_one(given_):
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


@given(given_=factors(beyond=8))
def test_thin_values_match_the_thin_svd_and_the_dense_matrix(given_):
    B, A, s = given_
    alone = to_device(thin_values(B, A, s))
    for s_ in (s, -s):
        assert np.array_equal(to_device(thin_values(B, A, s_)), alone)
    _, S, _ = thin_svd(B, A, s)
    whole = np.linalg.svd(dense(B, A, s), compute_uv=False)
    assert alone.shape == S.shape == (min(B.shape[1], *dense(B, A, s).shape),)
    assert (np.diff(alone) <= 0).all()
    assert np.abs(alone - S).max() <= rounding(B, A, s)
    assert np.abs(alone - whole[: len(alone)]).max() <= rounding(B, A, s)


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
        found = to_device(singular_values(kind(Param(A), Param(B), s).change(None)))
        delta = kind(Param(A.astype(np.float64)), Param(B.astype(np.float64)), s).delta()
        assert delta.shape == ((len(B), A.shape[1]) if kind is LowRank else (A.shape[1], len(B)))
        assert (found >= 0).all()
        assert np.abs(found - np.linalg.svd(delta, compute_uv=False)[: len(found)]).max() <= bound


def test_a_rank_above_the_shape_adds_no_values():
    rng = np.random.default_rng(0)
    B, A = rng.standard_normal((3, 8)), rng.standard_normal((8, 5))
    L, S, Rt = thin_svd(B, A)
    assert (L.shape, S.shape, Rt.shape) == ((3, 3), (3,), (3, 5))
    assert np.linalg.norm((L * S) @ Rt - B @ A) <= rounding(B, A, 1.0)


def test_the_thin_svd_never_forms_the_dense_change():
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
def test_the_spectrum_of_dora_is_of_its_whole_change(seed, r):
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


def test_the_spectrum_of_a_full_copy_is_of_copy_minus_base():
    how = LoraConfig(r=2, targets="q_proj", modules_to_save=["up_proj", "embed_tokens", "norm"])
    model, rng = tiny(0)
    inject(model, how, rng=rng)
    for p in named_params(model).values():
        if p.trainable:
            p.data = p.data + rng.standard_normal(p.data.shape)
    found = spectrum(model)
    copies = {k: x for k, x in adapted(model).items() if isinstance(x.adapters["default"], FullCopy)}
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


def test_the_spectrum_between_two_models_is_of_their_difference():
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
    with pytest.raises(MismatchError, match="different parameters"):
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
def test_rank_measures_are_scale_invariant(s, power):
    for measure in MEASURES:
        assert abs(measure(s * 2.0**power) - measure(s)) <= measure(s) * slack(len(s))
    assert numpy.array_equal(energy(s * 2.0**power), energy(s))


def test_the_effective_rank_weighs_by_values_not_squares():
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


@pytest.mark.parametrize("least", [5e-324, 1e-320, 1e-200])
def test_a_value_negligible_beside_the_first_counts_for_nothing(least):
    """Its share of the sum is 0 in floating point, and 0 log 0 is 0."""
    s = numpy.array([10.0, least])
    assert [measure(s) for measure in MEASURES] == [1.0] * 3
    assert rank_at(s, 1.0) == 1
    two = numpy.array([1.0, 1.0, least])  # half of the least number of all is 0
    assert [measure(two) for measure in MEASURES] == pytest.approx([2.0] * 3, rel=4 * 2.0**-53)


@pytest.mark.parametrize("size", [1.5e308, 1e-310, 5e-324])
def test_values_at_the_ends_of_the_range_of_floats_count_as_any_others(size):
    """Their sum would overflow."""
    for measure in MEASURES:
        assert measure(numpy.full(3, size)) == measure(numpy.ones(3))


@given(s=spectra_, share=st.floats(0.01, 1))
def test_energy_rises_to_one_and_rank_at_is_where_it_reaches_the_share(s, share):
    e = energy(s)
    assert (numpy.diff(e) >= 0).all()
    assert e[-1] == 1
    k = rank_at(s, share)
    assert 1 <= k <= len(s)
    near = len(s) * 2e-12  # rank_at lets a share of 1e-12 pass for rounding
    assert e[k - 1] >= share * (1 - near)
    assert k == 1 or e[k - 2] < share


@given(squares=st.lists(st.integers(1, 10**6), min_size=1, max_size=40), data=st.data())
def test_rank_at_is_exact_where_k_values_hold_exactly_the_share(squares, data):
    """Where rounding alone decides: cumulated roots' squares may lie below the quotient of the integers."""
    squares.sort(reverse=True)
    k = data.draw(st.integers(1, len(squares)))
    assert rank_at(numpy.sqrt(squares), sum(squares[:k]) / sum(squares)) == k


@pytest.mark.parametrize("share", [0, -1, 1.001, math.nan])
def test_an_invalid_share_is_refused(share):
    with pytest.raises(InputError, match="share"):
        rank_at(numpy.ones(3), share)


# ---- noise


SHAPES = [(64, 64), (128, 128), (256, 96), (96, 256), (600, 300)]


@pytest.mark.parametrize("rank", [None, 3])
def test_noise_is_the_mean_of_eight_draws_by_default(rank):
    usual, eight = (noise_spectrum((9, 7), numpy.random.default_rng(0), rank, *how) for how in ((), (8,)))
    assert numpy.array_equal(usual, eight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rank_measures_of_noise_match_their_closed_forms(shape):
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
def test_a_noise_spectrum_falls_and_has_norm_one_and_the_requested_rank(m, n, seed, data):
    r = data.draw(st.none() | st.integers(1, min(m, n)))
    s = noise_spectrum((m, n), numpy.random.default_rng(seed), rank=r, draws=1)
    assert s.shape == (r or min(m, n),)
    assert (numpy.diff(s) <= 0).all()
    assert abs((s * s).sum() - 1) <= gamma(2 * len(s) + 4)
    again = noise_spectrum((m, n), numpy.random.default_rng(seed), rank=r, draws=1)
    assert again.tobytes() == s.tobytes()


def test_dense_and_factored_singular_values_agree():
    rng = np.random.default_rng(0)
    B, A = rng.standard_normal((7, 2)), rng.standard_normal((2, 5))
    layer = LowRank(Param(A), Param(B), 0.5)
    base = Linear(Param(np.zeros((7, 5)), False))
    found = singular_values(layer.merged(base).weight.data)
    assert numpy.abs(found[:2] - singular_values(layer.change(base))).max() <= rounding(B, A, 0.5)
    assert (found[2:] <= rounding(B, A, 0.5)).all()


def test_energy_sums_squares():
    s = numpy.array([4.0, 3.0])
    assert energy(s).tolist() == [16 / 25, 1.0]
    assert rank_at(s, 0.6) == 1


# ---- two subspaces


@st.composite
def spans(draw, most=24):
    """Two orthonormal sets, U (D, k) and V (D, l), and the generator that goes on."""
    D = draw(st.integers(2, most))
    k, l = draw(st.integers(1, D)), draw(st.integers(1, D))  # noqa: E741
    rng = np.random.default_rng(draw(seeds))
    return orthonormal(rng, D, k), orthonormal(rng, D, l), rng


def orthonormal(rng, D, k):
    return np.linalg.qr(rng.standard_normal((D, k)))[0]


def near(X, Y):
    """How far phi may be off: every cosine is a sum of D terms of unit vectors, orthonormal to D k u."""
    (D, k), l = X.shape, Y.shape[1]  # noqa: E741
    return 8 * D * (k + l) * U


@given(spans())
def test_phi_matches_its_definition_by_projections(given_):
    """|U_iᵀ V_j|² is the trace of the product of both projections."""
    U, V, _ = given_
    phi = similarity(U, V)
    assert phi.shape == (U.shape[1], V.shape[1])
    for i in range(1, U.shape[1] + 1):
        for j in range(1, V.shape[1] + 1):
            P, Q = U[:, :i] @ U[:, :i].T, V[:, :j] @ V[:, :j].T
            assert abs(phi[i - 1, j - 1] - float((P * Q).sum()) / min(i, j)) <= near(U, V)


@given(spans())
def test_phi_lies_between_0_and_1_and_is_symmetric(given_):
    U, V, _ = given_
    phi, bound = similarity(U, V), near(U, V)
    assert (phi >= 0).all()
    assert (phi <= 1 + bound).all()
    assert numpy.abs(phi - similarity(V, U).T).max() <= bound


@given(spans())
def test_phi_is_1_for_equal_and_nested_spans(given_):
    U, _, rng = given_
    k = U.shape[1]
    turned = U @ orthonormal(rng, k, k)
    assert abs(similarity(U, turned)[-1, -1] - 1) <= near(U, U)
    inside = U @ orthonormal(rng, k, max(k // 2, 1))
    for phi in (similarity(U, inside)[-1], similarity(inside, U)[:, -1]):
        assert numpy.abs(phi - 1).max() <= near(U, U)
    assert numpy.abs(similarity(U, U).diagonal() - 1).max() <= near(U, U)


@given(spans(), st.data())
def test_phi_is_invariant_to_rotation_within_the_span(given_, data):
    U, V, rng = given_
    i, j = data.draw(st.integers(1, U.shape[1])), data.draw(st.integers(1, V.shape[1]))
    turned = [np.concatenate([X[:, :n] @ orthonormal(rng, n, n), X[:, n:]], 1) for X, n in ((U, i), (V, j))]
    before, after = similarity(U, V), similarity(*turned)
    assert numpy.abs(after[i - 1 :, j - 1 :] - before[i - 1 :, j - 1 :]).max() <= near(U, V)


@given(st.integers(1, 9), st.integers(1, 9), seeds)
def test_phi_is_0_for_orthogonal_spans(k, l, seed):  # noqa: E741
    both = orthonormal(np.random.default_rng(seed), k + l + 2, k + l)
    assert similarity(both[:, :k], both[:, k:]).max() <= near(both, both) ** 2


@pytest.mark.parametrize(("i", "j", "D"), [(1, 1, 5), (3, 3, 12), (2, 7, 20), (9, 4, 16), (6, 6, 6)])
def test_random_similarity_is_the_mean_over_random_subspaces(i, j, D):
    rng, draws = np.random.default_rng(0), 2000
    found = [similarity(orthonormal(rng, D, i), orthonormal(rng, D, j))[-1, -1] for _ in range(draws)]
    error = numpy.std(found, ddof=1) / math.sqrt(draws)
    assert abs(numpy.mean(found) - random_similarity(i, j, D)) <= 5 * error + 1e-12


# ---- a change against what it changes


def with_values(rng, m, n, s):
    """A matrix (m, n) with these singular values, and its vectors (m, k) and (n, k)."""
    L, R = orthonormal(rng, m, len(s)), orthonormal(rng, n, len(s))
    return (L * np.asarray(s)) @ R.T, L, R


@given(seeds, st.integers(2, 20), st.integers(2, 20), st.data())
def test_amplification_along_singular_directions_is_the_ratio_of_norms(seed, m, n, data):
    rng = np.random.default_rng(seed)
    s = [2.0**-i for i in range(min(m, n))]
    W, L, R = with_values(rng, m, n, s)
    start = data.draw(st.integers(0, len(s) - 1))
    r = data.draw(st.integers(1, len(s) - start))
    S = np.asarray([3.0 / (i + 1) for i in range(r)])
    factor, random = amplification(W, L[:, start : start + r], S, R[:, start : start + r].T)
    strength = math.sqrt(sum(9 / (i + 1) ** 2 for i in range(r)))
    along = math.sqrt(sum(x * x for x in s[start : start + r]))
    size = math.sqrt(sum(x * x for x in s))
    off = 8 * (m + n) * r * U * size / along  # the products err by that much of |W|
    assert abs(factor - strength / along) <= off * factor + 8 * U * factor
    assert abs(random - strength * math.sqrt(m * n) / (size * r)) <= (m * n + 8) * U * random


def test_random_amplification_is_the_mean_over_random_directions():
    (m, n, r), draws, rng = (11, 7, 3), 3000, np.random.default_rng(0)
    W, *_ = with_values(rng, m, n, [5.0, 2.0, 1.0, 0.1])
    S = np.asarray([2.0, 1.0, 0.5])
    squares = []
    for _ in range(draws):
        L, R = orthonormal(rng, m, r), orthonormal(rng, n, r)
        squares.append(float(((L.T @ W @ R) ** 2).sum()))
    error = numpy.std(squares, ddof=1) / math.sqrt(draws)
    wanted = float((S * S).sum()) / amplification(W, L, S, R.T)[1] ** 2
    assert abs(numpy.mean(squares) - wanted) <= 5 * error


def test_amplification_is_0_for_a_zero_change_and_infinite_for_a_zero_weight():
    rng = np.random.default_rng(0)
    W, L, R = with_values(rng, 5, 4, [2.0, 1.0])
    zero = np.zeros(2)
    assert amplification(W, L, zero, R.T) == (0, 0)
    assert amplification(0 * W, L, zero, R.T) == (0, 0)
    assert amplification(0 * W, L, zero + 1, R.T) == (math.inf, math.inf)


@given(seeds, st.integers(2, 20), st.integers(2, 20), st.integers(1, 12))
def test_a_zero_change_has_no_intruder(seed, m, n, k):
    rng = np.random.default_rng(seed)
    W, *_ = with_values(rng, m, n, [2.0**-i for i in range(min(m, n))])
    found = intruders(W, 0 * W, k)
    assert found.shape == (min(k, m, n),)
    assert numpy.abs(found - 1).max() <= 8 * (m + n) * U


@given(seeds, st.integers(4, 16), st.integers(3, 14), st.data())
def test_a_new_direction_is_one_intruder_at_its_index(seed, m, n, data):
    """W has rank q < min(O, I), and lambda v wᵀ lies beside it on both sides: the SVD of W + ΔW is known."""
    rng = np.random.default_rng(seed)
    q = data.draw(st.integers(1, min(m, n) - 1))
    at = data.draw(st.integers(0, q))
    L, R = orthonormal(rng, m, q + 1), orthonormal(rng, n, q + 1)
    s = [2.0**-i for i in range(q)]
    W = (L[:, :q] * np.asarray(s)) @ R[:, :q].T
    strength = [3.0, *(0.75 * x for x in s)][at]  # above the first, or between two
    delta = strength * L[:, q:] @ R[:, q:].T
    found = intruders(W, delta, q + 1)
    assert numpy.abs(numpy.delete(found, at) - 1).max() <= 1e-12 * 2**q
    before = np.linalg.svd(W, full_matrices=False)[0]  # those without strength are any beside the others
    assert abs(found[at] - float(abs(before.T @ L[:, q]).max())) <= 1e-12 * 2**q
    assert float(abs(before[:, :q].T @ L[:, q]).max()) <= 1e-12 * 2**q


def test_a_strong_random_direction_is_one_intruder_and_a_weak_one_none():
    m, n = 96, 64
    rng = np.random.default_rng(3)
    W, *_ = with_values(rng, m, n, [0.8**i for i in range(n)])
    v, w = orthonormal(rng, m, 1), orthonormal(rng, n, 1)
    threshold = intruder_threshold(m, n)
    for strength, count in ((3.0, 1), (0.001, 0), (0.0, 0)):
        found = intruders(W, strength * v @ w.T)
        assert found.shape == (10,)
        assert (found < threshold).sum() == count
    assert (intruders(W, 3.0 * v @ w.T) < threshold).argmax() == 0


def test_intruders_are_output_directions():
    rng = np.random.default_rng(0)
    W, L, _ = with_values(rng, 9, 6, [4.0, 2.0, 1.0])
    w = orthonormal(rng, 6, 6)[:, :1]
    same = intruders(W, 100 * L[:, :1] @ w.T, 1)  # a new input direction for an output of W
    assert abs(same[0] - 1) <= 1e-3


@pytest.mark.parametrize(("D", "n"), [(16, None), (24, 5), (64, 64), (96, 40)])
def test_one_random_vector_in_a_hundred_passes_the_threshold(D, n):
    """Whatever the orthonormal vectors are; both quantiles are of samples, so five standard errors."""
    rng, draws = numpy.random.default_rng(1), 4000
    basis = numpy.linalg.qr(rng.standard_normal((D, n or D)))[0]
    x = rng.standard_normal((draws, D))
    cosines = numpy.abs(x @ basis).max(1) / numpy.linalg.norm(x, axis=1)
    below = (cosines < intruder_threshold(D, n)).mean()
    assert abs(below - 0.99) <= 5 * math.sqrt(0.99 * 0.01 * (1 / draws + 1 / 1000))


def test_the_threshold_falls_with_the_dimension_and_rises_with_the_vectors():
    found = [intruder_threshold(D) for D in (8, 16, 64, 256, 768, 4096)]
    assert found == sorted(found, reverse=True)
    assert [round(x, 2) for x in found[2:]] == [0.46, 0.25, 0.16, 0.07]
    some = [intruder_threshold(64, n) for n in (1, 4, 16, 64)]
    assert some == sorted(some)
    assert some[-1] == intruder_threshold(64)
    half = intruder_threshold(16, share=0.5)
    assert 0.5 < half < intruder_threshold(16)  # more than half of all pass the bare 0.5


def test_the_threshold_needs_little_memory_even_for_a_head():
    tracemalloc.start()
    intruder_threshold(128_256, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # its 1000 vectors would be a gigabyte


@given(seeds, st.integers(2, 40), st.integers(2, 40), st.data())
def test_top_vectors_match_the_full_svd(seed, m, n, data):
    """Each falls by a half, the part beside k + 10 of them by 2^-10 and more, to the power of 13."""
    rng = np.random.default_rng(seed)
    W, *_ = with_values(rng, m, n, [2.0**-i for i in range(min(m, n, 12))])
    k = data.draw(st.integers(1, min(m, n, 12)))
    found = top_vectors(W, k)
    whole = np.linalg.svd(W, full_matrices=False)
    bound = 64 * (m + n) * U * 2.0**k  # a vector is off by rounding over its gap
    for vectors, exact in zip(found, (whole[0], whole[2].T), strict=True):
        assert vectors.shape == (len(exact), k)
        assert np.linalg.norm(vectors.T @ vectors - np.eye(k)) <= bound
        assert np.abs(np.abs((vectors * exact[:, :k]).sum(0)) - 1).max() <= bound
        assert abs(similarity(vectors, exact[:, :k])[-1, -1] - 1) <= bound
    L, R = found
    along = (L * (W @ R)).sum(0)
    assert np.abs(along - whole[1][:k]).max() <= bound  # the two sides belong together, with one sign


def test_top_vectors_need_a_gap_only_after_the_oversampled_ones():
    rng = np.random.default_rng(0)
    m, n, k = 300, 120, 6
    W, L, R = with_values(rng, m, n, [1 - 0.01 * i for i in range(k)] + [0.5] * (n - k))
    left, right = top_vectors(W, k)
    # (0.5 / 0.95)^13 = 2e-4 of a vector lies outside, and phi sees its square
    assert abs(similarity(left, L[:, :k])[-1, -1] - 1) <= 1e-5
    assert abs(similarity(right, R[:, :k])[-1, -1] - 1) <= 1e-5
    again = top_vectors(W, k)
    assert np.array_equal(left, again[0])
    assert np.array_equal(right, again[1])


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([3, 2.9, 2.8, 0.1, 0.09], 3), ([3, 0.5, 0.4], 1), ([0, 0, 0], 0),
        ([1, 1, 1e-5, 1e-12], 2),  # below a hundredth of the largest no fall counts
    ],
)  # fmt: skip
def test_the_rank_shown_is_where_the_spectrum_falls_most(values, rank):
    for size in (1e-200, 1, 1e200):
        assert rank_shown(size * numpy.array(values, float)) == rank
