"""A sum of adapters is the sum of their ΔW at any rank, scale and order; others say how far off they are."""

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from by_hand import U64
from helpers import U, gamma, seeds, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from library import LIBRARY
from vectors import ALL, SUMS, exact, most, of, rounding, sized, slack, summed, weighted, whole

from minilora.backend import to_device, to_host
from minilora.compose.arithmetic import (
    Combined,
    cat,
    distance,
    kohya_linear,
    linear,
    peft_linear,
    size,
    split,
    svd,
)
from minilora.compose.sparsify import magnitude
from minilora.errors import InputError, MismatchError, NonFiniteError
from minilora.layers import Factors
from minilora.spectra import thin_svd

CROSSED = {"peft_linear": peft_linear, "kohya_linear": kohya_linear}


def product(made, wide=np.longdouble):
    """B A of a result, which has scale 1."""
    assert made.factors.scale == 1
    return exact(made.factors, wide)


def bits(made):
    """The bytes of both factors."""
    return [to_host(a).tobytes() for a in made.factors[:2]]


# ---- the exact sum


@given(updates=weighted())
def test_cat_is_the_sum_within_its_bound(updates):
    """Three roundings, of m, of m A, and to the dtype; and the bound of both products where computed.

    Of a result in float32 the two roundings in float64 count as one more.
    """
    made, size = cat(updates), sized(updates)
    counted = [(w, x) for w, x in updates if w]
    R, K, r = sum(len(x.A) for _, x in counted), len(counted), max(len(x.A) for _, x in counted)
    dtype = to_host(made.factors.A).dtype
    u = unit(dtype)
    assert to_host(made.factors.A).shape == (R, size.shape[1])
    assert to_host(made.factors.B).shape == (size.shape[0], R)
    off = (gamma(3 if u == U else 2, u) + gamma(R + 2, 2.0**-63)) * size
    assert (abs(product(made) - summed(updates)) <= off).all()
    apart = sum(dtype.type(w * x.scale) * (to_host(x.B) @ to_host(x.A)) for w, x in counted)
    together = to_host(made.factors.B) @ to_host(made.factors.A)
    assert (abs(together - apart) <= (gamma(R + 3, u) + gamma(r + K + 1, u)) * size).all()


@given(updates=whole())
def test_sums_of_integers_are_exact_in_any_order(updates):
    expected = summed(updates)
    for order in permutations(updates[:3]):
        order = [*order, *updates[3:]]
        assert (product(cat(order)) == expected).all()
        assert (to_host(cat(order).factors.B) @ to_host(cat(order).factors.A) == expected).all()


@given(updates=whole(equal=True))
def test_the_cross_terms_of_integers_are_exact(updates):
    """Every root of |w s| is an integer here."""
    made = peft_linear(updates)
    roots = [math.isqrt(int(abs(w * x.scale))) for w, x in updates]
    signs = [1 if w > 0 else -1 for w, _ in updates]
    expected = sum(
        roots[i] * signs[j] * roots[j] * (to_host(updates[i][1].B) @ to_host(updates[j][1].A))
        for i in range(len(updates))
        for j in range(len(updates))
    )
    assert (product(made) == expected).all()


@pytest.mark.parametrize("method", ALL)
@settings(max_examples=12)
@given(updates=weighted(), weight=st.sampled_from([1.0, 1, -1.0, 0.3, -2.5]))
def test_one_adapter_is_itself_times_its_weight(method, updates, weight):
    """For any scale: alpha is not r, and rsLoRA. In any method that drops nothing."""
    one = [(weight, updates[0][1])]
    made = ALL[method](one)
    assert np.linalg.norm((product(made) - summed(one)).astype(float)) <= slack(one)
    assert made.residual <= slack(one)


@pytest.mark.parametrize("method", ALL)
@settings(max_examples=12)
@given(updates=weighted(equal=True), at=st.integers(0, 4), weight=st.sampled_from([0.0, 0, -0.0]))
def test_an_adapter_of_weight_0_is_absent(method, updates, at, weight):
    updates = [(w or 1.0, x) for w, x in updates]
    more = [*updates[:at], (weight, updates[0][1]), *updates[at:]]
    one, other = ALL[method](updates), ALL[method](more)
    assert bits(one) == bits(other)
    assert (one.norm, one.residual, one.cut) == (other.norm, other.residual, other.cut)


@pytest.mark.parametrize("method", ALL)
@settings(max_examples=12)
@given(updates=weighted(equal=True))
def test_the_order_of_adapters_does_not_matter(method, updates):
    """Within the rounding of both; where entries are dropped, see test_sparsify.py, to the bit."""
    one, other = ALL[method](updates), ALL[method](updates[::-1])
    assert np.linalg.norm((product(one) - product(other)).astype(float)) <= 2 * slack(updates)
    if method not in ("cat", "linear", "svd", *CROSSED):
        assert bits(one) == bits(other)


@pytest.mark.parametrize("method", SUMS)
@settings(max_examples=12)
@given(updates=weighted())
def test_a_method_that_drops_nothing_is_the_sum(method, updates):
    made = ALL[method](updates)
    assert np.linalg.norm((product(made) - summed(updates)).astype(float)) <= slack(updates)


@given(updates=weighted(least=2))
def test_negation_takes_an_adapter_away(updates):
    (_, one), (_, other) = updates[:2]
    back = cat([(1.0, cat([(1.0, one), (1.0, other)]).factors), (-1.0, other)])
    u, r = unit(to_host(one.A).dtype), len(one.A) + 2 * len(other.A)
    each = gamma(3, u) + gamma(r + 2, 2.0**-63)  # three roundings of each A, and the product in a wide type
    bound = each * (sized([(1.0, one)]) + 2 * sized([(1.0, other)]))  # the factors of cat need none again
    assert (abs(product(back) - exact(one)) <= bound).all()


# ---- what every result says of itself


@pytest.mark.parametrize("method", ALL)
@settings(max_examples=12)
@given(updates=weighted(equal=True))
def test_norm_and_residual_are_those_of_the_dense_matrices(method, updates):
    made, expected = ALL[method](updates), summed(updates).astype(float)
    lost = np.linalg.norm(product(made).astype(float) - expected)
    assert abs(made.norm - np.linalg.norm(expected)) <= rounding(updates)
    assert abs(made.residual - lost) <= rounding(updates)  # of the factors as they are: no dtype in it
    assert made.relative == (made.residual / made.norm if made.norm else math.inf if made.residual else 0)


@pytest.mark.parametrize("method", ALL)
@settings(max_examples=12)
@given(updates=weighted(equal=True))
def test_the_dtype_follows_and_the_operands_stay(method, updates):
    before = [(to_host(x.B).tobytes(), to_host(x.A).tobytes()) for _, x in updates]
    made = ALL[method](updates)
    assert made.factors.A.dtype == made.factors.B.dtype == updates[0][1].A.dtype
    assert [(to_host(x.B).tobytes(), to_host(x.A).tobytes()) for _, x in updates] == before
    for mine in made.factors[:2]:
        assert not any(np.shares_memory(to_host(mine), to_host(a)) for _, x in updates for a in x[:2])


@settings(max_examples=20)
@given(updates=weighted(dtype=np.float32))
def test_of_two_dtypes_the_wider_counts(updates):
    O, I = exact(updates[0][1]).shape  # noqa: E741
    assert cat([*updates, (1.0, of(np.ones((O, 1)), np.ones((1, I)), 1.0))]).factors.A.dtype == np.float64


# ---- the nearest of a rank


@given(updates=weighted(), rank=st.integers(1, 9))
def test_svd_loses_no_more_than_eckart_and_young_say(updates, rank):
    rank = min(rank, most(updates))
    made, M = svd(updates, rank), summed(updates).astype(float)
    S = np.linalg.svd(M, compute_uv=False)
    tail = np.linalg.norm(S[rank:])
    assert len(made.factors.A) == rank
    assert abs(made.cut - tail) <= rounding(updates)
    assert tail - slack(updates) <= made.residual <= tail + slack(updates)
    assert abs(made.residual - np.linalg.norm(M - product(made).astype(float))) <= slack(updates)


@given(updates=weighted(equal=True), seed=seeds)
def test_no_other_update_of_that_rank_is_nearer(updates, seed):
    rank, rng = len(updates[0][1].A), np.random.default_rng(seed)
    rank = min(rank, most(updates))
    best, M = svd(updates, rank), summed(updates).astype(float)
    loss = slack(updates)
    assert best.residual <= magnitude(updates, 0.5 if M.size > 1 else 1, rank).residual + loss
    if rank == len(updates[0][1].A):
        assert best.residual <= peft_linear(updates).residual + loss
    Q = np.linalg.qr(rng.standard_normal((len(M), rank)))[0]
    near = np.linalg.qr(np.linalg.svd(M)[0][:, :rank] + 0.1 * Q)[0]
    for X in (Q, near):
        assert best.residual <= np.linalg.norm(M - X @ (X.T @ M)) + loss


@given(updates=weighted(least=2))
def test_linear_is_cat_or_svd(updates):
    rank = most(updates)
    for one, other in ((linear(updates), cat(updates)), (linear(updates, rank), svd(updates, rank))):
        assert bits(one) == bits(other)


# ---- what PEFT and kohya's scripts call a sum of adapters


@pytest.mark.parametrize("method", CROSSED)
@given(updates=weighted(equal=True))
def test_the_product_of_sums_is_the_double_sum_with_its_cross_terms(method, updates):
    counted = [(w, x) for w, x in updates if w]

    def root(w, x):
        w, s = np.longdouble(abs(w)), np.longdouble(abs(x.scale))
        return np.sqrt(w * s) if method == "peft_linear" else w * np.sqrt(s)

    expected, scale = np.longdouble(0), np.longdouble(0)
    for w, x in counted:
        for v, y in counted:
            both = root(w, x) * root(v, y)
            term = both * math.copysign(1, v) * (to_host(x.B).astype(np.longdouble) @ to_host(y.A))
            expected = expected + term
            scale = scale + both * (abs(to_host(x.B)).astype(float) @ abs(to_host(y.A)))
    made = CROSSED[method](updates)
    u = unit(to_host(made.factors.A).dtype)
    K, r = len(counted), len(to_host(made.factors.A))
    sides = gamma(2 * (K + 2), U)  # of each side: a root and a product, at most 2; times B; K - 1 sums
    wide = gamma(r + K * K + 8, 2.0**-63)  # this oracle
    bound = (2 * u + u * u + sides + wide) * (1 + gamma(2, u)) * scale  # 2u: both are rounded to the dtype
    assert (abs(product(made) - expected) <= bound).all()
    cross = np.linalg.norm((expected - summed(updates)).astype(float))  # what it gets wrong
    assert abs(made.residual - cross) <= np.linalg.norm(bound.astype(float)) + rounding(updates)


def test_half_of_one_adapter_is_a_quarter_in_kohyas_arithmetic():
    (one,) = [of(np.ones((3, 2)), np.ones((2, 4)), 2.0)]
    assert np.allclose(product(kohya_linear([(0.5, one)])), 0.25 * 2.0 * 2 * np.ones((3, 4)), rtol=4 * U)
    assert kohya_linear([(1.0, one)]).relative <= 8 * U


def test_peft_linear_is_far_from_the_sum_of_random_adapters():
    """About as far as the sum is long, and no nearer for wide matrices: cross terms do not average out."""
    rng = np.random.default_rng(0)
    for D in (64, 256):
        pairs = [of(rng.standard_normal((D, 4)), rng.standard_normal((4, D)), 2.0) for _ in range(2)]
        assert 0.8 < peft_linear([(0.5, pair) for pair in pairs]).relative < 1.2


# ---- on the device, and refusals


@pytest.mark.skipif(LIBRARY != "numpy", reason="compares the stand-in with NumPy")
@pytest.mark.parametrize("method", ALL)
def test_the_device_computes_the_same_bits(method, request):
    rng = np.random.default_rng(0)
    parts = [(rng.standard_normal((7, 3)), rng.standard_normal((3, 5))) for _ in range(3)]

    def run():
        made = ALL[method]([(w, of(B, A, 0.7)) for w, (B, A) in zip((0.5, -1, 2), parts, strict=True)])
        return bits(made), made.norm, made.residual, made.cut

    host = run()
    request.getfixturevalue("device")
    assert run() == host


def pair(O=4, I=3, r=2, size=1.0, dtype=np.float32):  # noqa: E741
    return of(np.full((O, r), size, dtype), np.full((r, I), size, dtype), 1.0)


@pytest.mark.parametrize(
    ("updates", "error", "message"),
    [
        ([], InputError, "there are no adapters; expected at least one with a weight that is not 0"),
        ([(0.0, pair()), (0, pair())], InputError, "the weights are all 0; expected at least one"),
        ([(math.nan, pair())], InputError, "a weight is nan; expected a finite number"),
        ([(1.0, pair()), (math.inf, pair())], InputError, "a weight is inf; expected a finite number"),
        ([(10**400, pair())], InputError, "a weight is 1000"),
        ([(True, pair())], InputError, "a weight is True; expected a finite number"),
        ([("1", pair())], InputError, "a weight is '1'; expected a finite number"),
        ([(1.0, pair(4)), (1.0, pair(5))], MismatchError, r"the updates are \(4, 3\) and \(5, 3\); expected"),
        ([(1.0, pair(I=3)), (1.0, pair(I=4))], MismatchError, r"are \(4, 3\) and \(4, 4\); expected the"),
        ([(1.0, pair(size=1e20))], NonFiniteError, "the sum is not finite in float32"),
        ([(1.0, pair(size=math.nan))], NonFiniteError, "the sum is not finite"),
        ([(1e300, pair(size=1e20))], NonFiniteError, "the sum is not finite"),
        ([(1.0, pair(size=1e200, dtype=np.float64))], NonFiniteError, "the sum is not finite"),
        ([(1e200, pair(size=1e75, dtype=np.float64))] * 2, NonFiniteError, "the sum is not finite"),
        ([(1.0, pair(size=-math.inf))], NonFiniteError, "the sum is not finite"),
    ],
)
@pytest.mark.parametrize("method", ALL)
def test_what_has_no_sum_is_refused(method, updates, error, message):
    with pytest.raises(error, match=message):
        ALL[method](updates) if method != "svd" else svd(updates, 1)


def test_cross_terms_too_large_for_their_dtype_are_refused():
    """The entries of the sum are 4, those of B_1 A_2 are 2e50, and all factors are within float32."""
    B, A = np.ones((4, 2), np.float32), np.ones((2, 3), np.float32)
    large, small = np.float32(1e25), np.float32(1e-25)
    updates = [(1.0, of(B * large, A * small, 1.0)), (1.0, of(B * small, A * large, 1.0))]
    assert math.isfinite(cat(updates).norm)
    with pytest.raises(NonFiniteError, match="the sum is not finite in float32"):
        peft_linear(updates)


def test_lapack_is_not_asked_about_what_is_not_finite(capfd):
    """It would print of an "illegal value"."""
    for large in (pair(size=1e200, dtype=np.float64), pair(size=math.nan)):
        for measure in (size, ALL["svd"], ALL["magnitude"]):
            with pytest.raises(NonFiniteError):
                measure([(1.0, large), (-1.0, large)])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", ALL)
@settings(max_examples=12)
@given(
    updates=weighted(equal=True, dtype=np.float32),
    shift=st.tuples(*[st.integers(-100, 100)] * 2),
)
def test_a_weight_makes_up_for_factors_of_any_size(method, updates, shift):
    """Powers of two on w, A and B whose product is 1 change nothing: no side overflows, or rounds to 0."""
    a, b = shift
    moved = [
        (w * 2.0 ** -(a + b), of(np.ldexp(to_host(x.B), b), np.ldexp(to_host(x.A), a), x.scale))
        for w, x in updates
    ]
    one, other = product(ALL[method](updates)), product(ALL[method](moved))
    assert np.linalg.norm((one - other).astype(float)) <= 2 * slack(updates)


def test_both_sides_of_a_sum_are_alike():
    """Else one of them overflows float32, or rounds to 0.

    m n is in [1/4, 1), the largest entries are in [1/2, 1) 2^b and 2^a, and `half` is rounded down: so the
    ratio of the two sides is between 1/8 and 4.
    """
    for w, a, b in ((1e30, 1e10, 1e-30), (1e-30, 1e-18, 1.0), (1e30, 1e30, 1e-30), (2.0, 3.0, 5.0)):
        change = of(np.full((4, 2), b, np.float32), np.full((2, 3), a, np.float32), 1.0)
        made = cat([(w, change)])
        assert made.relative <= gamma(3, 2.0**-24)
        assert 1 / 8 <= abs(to_host(made.factors.A)).max() / abs(to_host(made.factors.B)).max() <= 4


@pytest.mark.parametrize("method", ALL)
def test_numbers_of_any_kind_are_weights(method):
    """NumPy's scalars, and fractions."""
    for weight in (np.float32(0.5), np.float64(0.5), np.int64(2), Fraction(1, 2), np.float16(2)):
        one, other = (ALL[method]([(w, pair(dtype=np.float32))]) for w in (weight, float(weight)))
        assert bits(one) == bits(other)
        assert type(one.norm) is type(one.residual) is float
    assert len(svd([(1, pair())], np.int64(1)).factors.A) == 1


@pytest.mark.parametrize("rank", [0, -1, 4, 5, 2.0, True, "2", None])
def test_a_rank_that_the_sum_cannot_have_is_refused(rank):
    with pytest.raises(InputError, match=r"rank is .*; expected an int from 1 to 3, the most that it can be"):
        svd([(1.0, pair(4, 5, 2)), (1.0, pair(4, 5, 1))], rank)  # 3 = 2 + 1
    with pytest.raises(InputError, match="from 1 to 3"):
        svd([(1.0, pair(4, 3, 2)), (1.0, pair(4, 3, 2))], rank)  # 3 inputs


@pytest.mark.parametrize("method", CROSSED)
def test_sums_of_factors_need_equal_ranks(method):
    with pytest.raises(InputError, match=rf"the ranks are \[2, 3\]; {method} adds factors: expected the"):
        CROSSED[method]([(1.0, pair(r=2)), (1.0, pair(r=3))])
    assert isinstance(CROSSED[method]([(1.0, pair(r=2)), (0.0, pair(r=3))]), Combined)  # which is absent


def test_a_distance_is_a_sum_with_weight_minus_1():
    rng = np.random.default_rng(0)
    one = of(rng.standard_normal((5, 2)), rng.standard_normal((2, 4)), 3.0)
    other = of(rng.standard_normal((5, 3)), rng.standard_normal((3, 4)), 0.5)
    both = [(1.0, one), (-1.0, other)]
    assert abs(size(both) - np.linalg.norm((exact(one) - exact(other)).astype(float))) <= rounding(both)
    assert size([(1.0, one), (-1.0, Factors(one.B * one.scale, one.A, 1.0))]) <= rounding([(1.0, one)] * 2)


@st.composite
def cut(draw):
    """U, S and Vᵀ of an update of any size, and factors: all of it or less, rounded, or quite others."""
    (_, x), rng = draw(weighted())[0], np.random.default_rng(draw(seeds))
    decomposed = thin_svd(x.B, x.A, x.scale * 2.0 ** draw(st.integers(-900, 900)))
    S = to_host(decomposed[1])
    B, A = map(to_host, split(*decomposed, draw(st.integers(1, len(S)))))
    off = 2.0 ** -draw(st.sampled_from([0, 11, 24, 53, 70]))
    return decomposed, *(side * (1 + off * rng.uniform(-1, 1, side.shape)) for side in (B, A))


@given(drawn=cut())
def test_a_distance_in_the_bases_of_the_change_is_the_dense_one(drawn):
    """Each of six products errs by (O + I + k + l + 2) u |B||A| or as much of U S Vᵀ: X, Y, B', A' and the
    parts; and so does taking U and V for orthonormal. A sum of squares errs in its last part by the root.
    """
    (U, S, Vt), B, A = drawn
    found = distance(U, S, Vt, to_device(B), to_device(A))
    U, S, Vt = map(to_host, (U, S, Vt))
    top, wide = math.sqrt(S[0]), np.longdouble
    B, A = B / wide(top), A / wide(top)
    dense = (U.astype(wide) * (S / wide(top) ** 2)) @ Vt - B @ A
    n = len(B) + A.shape[1] + len(S) + len(A) + 2
    size = float(S.sum() / S[0] + np.linalg.norm(B.astype(float)) * np.linalg.norm(A.astype(float)))
    beyond = [float(np.sqrt((x * x).sum())) for x in (B - U @ (U.T @ B), A - A @ Vt.T @ Vt)]
    bound = 8 * n * U64 * size + 2 * math.sqrt(n * U64) * math.prod(beyond)
    assert abs(found / S[0] - float(np.sqrt((dense * dense).sum()))) <= bound
