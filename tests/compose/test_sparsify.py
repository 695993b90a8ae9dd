"""Pruning, TIES and DARE act on the full ΔW as slow loops over its entries do, and say what they change."""

import math
from fractions import Fraction

import numpy as np
import pytest
from helpers import seeds
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from library import LIBRARY
from test_arithmetic import bits, product
from vectors import exact, of, rounding, slack, summed, weighted, whole

from minilora.backend import to_device, to_host
from minilora.compose.sparsify import dare, dare_ties, dropped, elected, largest, magnitude, settled, ties
from minilora.errors import InputError

densities = st.sampled_from([1.0, 0.9, 0.5, 0.3, 0.1, 1])
MAKE = {
    "magnitude": lambda updates, d, seed, rank=None: magnitude(updates, d, rank),
    "ties": lambda updates, d, seed, rank=None: ties(updates, d, rank),
    "dare": lambda updates, d, seed, rank=None: dare(updates, d, np.random.default_rng(seed), rank),
    "dare_ties": lambda updates, d, seed, rank=None: dare_ties(updates, d, np.random.default_rng(seed), rank),
}


def entries(updates):
    """How many entries ΔW has."""
    return updates[0][1].B.shape[0] * updates[0][1].A.shape[1]


# ---- the oracle: entry by entry, in plain Python


def kept_by_hand(M, density):
    """The int(density n) largest entries, the first of equal ones first; the others are 0."""
    flat = [float(x) for row in M for x in row]
    order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))
    keep = set(order[: int(density * len(flat))])
    return [x if i in keep else 0.0 for i, x in enumerate(flat)]


def drawn_by_hand(M, density, rng):
    """Each entry in turn, with a number of its own."""
    return [float(x) / density if rng.random() < density else 0.0 for row in M for x in row]


def elected_by_hand(parts, weights):
    """The weighted mean of the entries with the sign of the sum; + if it is 0."""
    found = []
    for entries in zip(*parts, strict=True):
        sign = 1 if sum(map(Fraction, entries)) >= 0 else -1
        agreeing = [Fraction(w) * Fraction(x) for w, x in zip(weights, entries, strict=True) if x * sign > 0]
        found.append(float(sum(agreeing) / len(agreeing)) if agreeing else 0.0)
    return found


def by_hand(method, updates, density, seed):
    """The matrix that a method makes; the adapters act in the order of their digests."""
    counted = [(w, exact(x, float)) for w, x in sorted(updates, key=settled) if w]
    weights, rng = [w for w, _ in counted], np.random.default_rng(seed)
    if "dare" in method:
        parts = [drawn_by_hand(M, density, rng) for _, M in counted]
    else:
        parts = [kept_by_hand(M, density) for _, M in counted]
    if "ties" in method:
        found = elected_by_hand(parts, weights)
    else:
        columns = zip(*parts, strict=True)
        found = [sum(w * x for w, x in zip(weights, column, strict=True)) for column in columns]
    return np.array(found).reshape(counted[0][1].shape)


@pytest.mark.parametrize("method", MAKE)
@settings(max_examples=30)
@given(updates=whole(), density=densities, seed=seeds)
def test_integers_are_pruned_and_elected_as_by_hand(method, updates, density, seed):
    """Among integers many entries are equal in size and many sums are 0: what counts then is settled, too."""
    assume(int(density * entries(updates)))
    made, expected = MAKE[method](updates, density, seed), by_hand(method, updates, density, seed)
    off = slack(updates, density)
    assert np.linalg.norm(product(made).astype(float) - expected) <= off
    lost = np.linalg.norm(expected - summed(updates).astype(float))
    assert abs(made.residual - lost) <= off + rounding(updates, density)  # of the update, and as measured
    assert made.cut <= rounding(updates, density)


@pytest.mark.parametrize("method", MAKE)
@settings(max_examples=20)
@given(updates=weighted(), density=densities, seed=seeds, rank=st.integers(1, 9))
def test_any_numbers_are_pruned_and_elected_as_by_hand(method, updates, density, seed, rank):
    """Cut at a rank, the result is as near to the method's matrix as Eckart and Young say."""
    assume(int(density * entries(updates)))
    expected = by_hand(method, updates, density, seed)
    rank = min(rank, *expected.shape)
    made = MAKE[method](updates, density, seed, rank)
    off = slack(updates, density)
    tail = np.linalg.norm(np.linalg.svd(expected, compute_uv=False)[rank:])
    assert len(made.factors.A) == rank
    assert abs(made.cut - tail) <= off
    assert tail - off <= np.linalg.norm(product(made).astype(float) - expected) <= tail + off


# ---- the parts, to the bit


@given(updates=whole(), density=densities)
def test_exactly_the_largest_entries_are_kept(updates, density):
    assume(int(density * entries(updates)))
    M = exact(updates[0][1], float)
    kept = to_host(largest(to_device(M), density))
    assert kept.ravel().tolist() == kept_by_hand(M, density)
    assert np.count_nonzero(kept) <= int(density * M.size)


def test_the_number_of_entries_is_rounded_down():
    """As PEFT does: int(density n), and 0.29 x 100 is below 29."""
    M = to_device(np.arange(1.0, 101).reshape(4, 25))
    assert [np.count_nonzero(to_host(largest(M, d))) for d in (0.29, 0.3, 0.01, 1)] == [28, 30, 1, 100]


@given(updates=whole())
def test_signs_are_elected_as_by_hand(updates):
    parts = [exact(x, float) for _, x in updates]
    found = to_host(elected(updates, [to_device(M) for M in parts]))
    expected = elected_by_hand([M.ravel().tolist() for M in parts], [w for w, _ in updates])
    assert found.ravel().tolist() == expected


def test_signs_are_elected_before_the_weights_act():
    """As in PEFT. A weight moves the mean, not the vote; and an entry of 0 does not count in the mean."""
    updates = [
        (w, of(np.array([[x]]), np.ones((1, 1)), 1.0)) for w, x in ((0.1, 3.0), (10.0, -2.0), (1.0, 0.0))
    ]
    assert to_host(ties(updates, 1.0).factors.B * ties(updates, 1.0).factors.A) == pytest.approx(0.1 * 3)
    assert to_host(dare_ties(updates, 1, np.random.default_rng(0)).factors.B) ** 2 == pytest.approx(0.1 * 3)


@given(updates=weighted())
def test_ties_of_one_adapter_at_density_1_is_the_identity(updates):
    one = [(1.0, updates[0][1])]
    dense = to_host(elected(one, [to_device(exact(one[0][1], float))]))
    assert (dense == exact(one[0][1], float)).all()
    made = ties(one, 1.0)
    assert np.linalg.norm((product(made) - summed(one)).astype(float)) <= slack(one)


# ---- chance


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_the_mean_of_dare_over_seeds_is_the_sum(density):
    """Within 5 standard errors: an entry x varies by x² (1 - d) / d, and adapters draw alone."""
    rng, n = np.random.default_rng(0), 2000
    updates = [(w, of(rng.standard_normal((5, 2)), rng.standard_normal((2, 4)), 1.5)) for w in (0.7, -0.3)]
    parts = [exact(x, float) for _, x in updates]
    total = np.zeros((5, 4))
    for seed in range(n):
        draws = np.random.default_rng(seed)
        kept = [to_host(dropped(to_device(M), density, draws)) for M in parts]
        total += sum(w * M for (w, _), M in zip(updates, kept, strict=True))
    variance = sum(w**2 * M**2 for (w, _), M in zip(updates, parts, strict=True)) * (1 - density) / density
    assert (abs(total / n - summed(updates).astype(float)) <= 5 * np.sqrt(variance / n)).all()
    assert (abs(total / n - summed(updates).astype(float)) >= 0.01 * np.sqrt(variance / n)).mean() > 0.9


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_a_seed_settles_what_is_dropped(method):
    rng = np.random.default_rng(0)
    updates = [(1.0, of(rng.standard_normal((5, 2)), rng.standard_normal((2, 4)), 1.0)) for _ in range(2)]
    one, again, other = (product(MAKE[method](updates, 0.5, seed)) for seed in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).any()


@pytest.mark.parametrize("method", MAKE)
@settings(max_examples=15)
@given(updates=weighted(least=2), density=densities, seed=seeds, twice=st.booleans())
def test_no_order_of_the_adapters_changes_a_bit(method, updates, density, seed, twice):
    """Even if two adapters are equal, with the same weight or another."""
    assume(int(density * entries(updates)))
    updates = [*updates, (-0.5, updates[0][1])] if twice else updates
    one = MAKE[method](updates, density, seed)
    for order in (updates[::-1], [*updates[1:], updates[0]]):
        other = MAKE[method](order, density, seed)
        assert bits(one) == bits(other)
        assert (one.norm, one.residual, one.cut) == (other.norm, other.residual, other.cut)


@pytest.mark.parametrize("seed", range(6))
def test_the_numbers_of_an_adapter_decide_what_it_draws_and_not_its_weight_or_dtype(seed):
    """So an interpolation keeps the same entries all along. Here each adapter has columns of its own."""
    rng = np.random.default_rng(seed)
    parts = [(rng.integers(1, 9, (6, 3)), rng.integers(1, 9, (3, 8)) * own) for own in np.eye(2).repeat(4, 1)]

    def kept(weights, dtype):
        typed = [of(B.astype(dtype), A.astype(dtype), 1.0) for B, A in parts]
        updates = list(zip(weights, typed, strict=True))
        return abs(product(dare(updates, 0.5, np.random.default_rng(1)))) > slack(updates, 0.5)

    first = kept((1.0, 0.5), np.float64)
    assert 0 < first[:, :4].sum() < 24 > first[:, 4:].sum() > 0
    for weights in ((0.25, 0.75), (-3.0, 2.0)):
        for dtype in (np.float32, np.float64):
            assert (kept(weights, dtype) == first).all()


def test_two_equal_adapters_draw_one_after_the_other():
    rng = np.random.default_rng(0)
    B, A = rng.integers(1, 9, (6, 3)).astype(float), rng.integers(1, 9, (3, 8)).astype(float)
    same = [(1.0, of(B, A, 1.0))] * 2
    times = product(dare(same, 0.5, np.random.default_rng(1))) / summed(same)
    assert {round(float(x), 6) for x in times.ravel()} == {0.0, 1.0, 2.0}  # kept by none, by one, by both


# ---- ranks and refusals


@settings(max_examples=20)
@given(updates=weighted())
def test_without_a_rank_there_is_as_much_as_the_result_has(updates):
    one = [(1.0, updates[0][1])]
    true = np.linalg.matrix_rank(exact(one[0][1], float))
    assert len(magnitude(one, 1.0).factors.A) == true
    nothing = magnitude([(1.0, of(np.zeros((3, 2)), np.ones((2, 4)), 1.0))], 0.5)
    assert (len(nothing.factors.A), nothing.norm, nothing.residual, nothing.cut) == (1, 0, 0, 0)


@pytest.mark.parametrize("method", MAKE)
@pytest.mark.parametrize("density", [0, -0.1, 1.0001, math.nan, math.inf, True, "0.5", None])
def test_a_density_outside_of_0_to_1_is_refused(method, density):
    updates = [(1.0, of(np.ones((3, 2)), np.ones((2, 4)), 1.0))]
    message = r"density is .*; expected the share of entries to keep, in \(0, 1\]"
    with pytest.raises(InputError, match=message):
        MAKE[method](updates, density, 0)


@pytest.mark.parametrize("method", MAKE)
@pytest.mark.parametrize(("density", "O", "I"), [(1e-9, 3, 4), (0.08, 3, 4), (1 / 49, 7, 7)])
def test_a_density_that_keeps_no_entry_is_refused(method, density, O, I):  # noqa: E741
    """1 / 49 x 49 is below 1, though 1 / 49 x 7 x 7 is not."""
    updates = [(1.0, of(np.ones((O, 2)), np.ones((2, I)), 1.0))]
    message = rf"density is {density}; expected one that keeps an entry of {O * I}"
    with pytest.raises(InputError, match=message):
        MAKE[method](updates, density, 0)


@pytest.mark.parametrize("method", MAKE)
def test_numbers_of_any_kind_are_densities(method):
    """In float16 there is no number as large as that of the entries to keep."""
    updates = [(1.0, of(np.arange(2.0**15)[:, None], np.ones((1, 3)), 1.0))]
    expected = bits(MAKE[method](updates, 0.75, 0, 2))
    for density in (np.float16(0.75), np.float32(0.75), np.float64(0.75), Fraction(3, 4)):
        assert bits(MAKE[method](updates, density, 0, 2)) == expected


@pytest.mark.parametrize("method", MAKE)
@pytest.mark.parametrize("rank", [0, -1, 4, 1.0])
def test_a_rank_above_the_shape_is_refused(method, rank):
    updates = [(1.0, of(np.ones((3, 2)), np.ones((2, 4)), 1.0))]
    with pytest.raises(InputError, match=r"rank is .*; expected an int from 1 to 3"):
        MAKE[method](updates, 0.5, 0, rank)


@pytest.mark.skipif(LIBRARY != "numpy", reason="compares the stand-in with NumPy")
@pytest.mark.parametrize("method", MAKE)
def test_the_device_prunes_the_same_entries(method, request):
    rng = np.random.default_rng(0)
    parts = [(rng.standard_normal((7, 3)), rng.standard_normal((3, 5))) for _ in range(3)]

    def run():
        made = MAKE[method]([(1.0, of(B, A, 0.7)) for B, A in parts], 0.4, 5, 2)
        return [to_host(a).tobytes() for a in made.factors[:2]], made.norm, made.residual, made.cut

    host = run()
    request.getfixturevalue("device")
    assert run() == host


def test_what_a_method_gives_and_what_the_rank_leaves_out_are_two_numbers():
    rng = np.random.default_rng(0)
    updates = [(1.0, of(rng.standard_normal((9, 3)), rng.standard_normal((3, 8)), 1.0))]
    full, cut = magnitude(updates, 0.5), magnitude(updates, 0.5, 2)
    assert full.cut <= rounding(updates)
    assert 0 < cut.cut < cut.residual
    assert full.residual < cut.residual <= full.residual + cut.cut + rounding(updates)
