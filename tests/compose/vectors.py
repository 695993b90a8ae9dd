"""Weighted updates for the tests of arithmetic.py and sparsify.py, and their sums without the package."""

import math

import numpy as np
from by_hand import U64
from helpers import unit
from hypothesis import strategies as st

from minilora.backend import to_device, to_host
from minilora.compose.arithmetic import cat, linear, peft_linear, svd
from minilora.compose.sparsify import dare, dare_ties, magnitude, ties
from minilora.layers import Factors

weights = st.floats(-3, 3).map(lambda w: round(w, 2))
ALL = {  # every method, so that it drops nothing
    "cat": lambda updates: cat(updates),
    "linear": lambda updates: linear(updates),
    "svd": lambda updates: svd(updates, most(updates)),
    "peft_linear": lambda updates: peft_linear(updates),
    "magnitude": lambda updates: magnitude(updates, 1.0),
    "ties": lambda updates: ties(updates, 1),
    "dare": lambda updates: dare(updates, 1.0, np.random.default_rng(0)),
    "dare_ties": lambda updates: dare_ties(updates, 1.0, np.random.default_rng(0)),
}
SUMS = ("cat", "linear", "svd", "magnitude", "dare")  # which are then the exact sum


def most(updates):
    """The largest rank that the sum can have."""
    O, I = updates[0][1].B.shape[0], updates[0][1].A.shape[1]  # noqa: E741
    return min(O, I, sum(len(change.A) for w, change in updates if w))


def of(B, A, scale):
    """Factors of host arrays."""
    return Factors(to_device(B), to_device(A), scale)


@st.composite
def weighted(draw, least=1, equal=False, dtype=None):
    """Updates of one shape, of several ranks, some beyond the shape; scales alpha / r and alpha / sqrt(r)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    O, I = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))  # noqa: E741
    dtype = dtype or draw(st.sampled_from([np.float32, np.float64]))
    common, found = draw(st.integers(1, 5)), []
    for _ in range(draw(st.integers(least, 4))):
        r, alpha = common if equal else draw(st.integers(1, 5)), draw(st.sampled_from([1, 7, 16.5]))
        scale = alpha / (math.sqrt(r) if draw(st.booleans()) else r)
        B, A = rng.standard_normal((O, r)).astype(dtype), rng.standard_normal((r, I)).astype(dtype)
        found.append((draw(weights), of(B, A, scale)))
    if not any(w for w, _ in found):
        found[0] = 1.0, found[0][1]
    return found


@st.composite
def whole(draw, equal=False):
    """The same of integers: no product or sum is rounded."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    O, I, found = draw(st.integers(1, 9)), draw(st.integers(1, 9)), []  # noqa: E741
    dtype, common = draw(st.sampled_from([np.float32, np.float64])), draw(st.integers(1, 5))
    for _ in range(draw(st.integers(1, 4))):
        r = common if equal else draw(st.integers(1, 5))
        B, A = (rng.integers(-8, 9, size).astype(dtype) for size in ((O, r), (r, I)))
        found.append((draw(st.sampled_from([1, -1, 4, -9])), of(B, A, draw(st.sampled_from([1.0, 4.0])))))
    return found


def exact(change, wide=np.longdouble):
    """s B A in a wide type."""
    return wide(change.scale) * (to_host(change.B).astype(wide) @ to_host(change.A).astype(wide))


def summed(updates):
    """The sum of the weighted updates in the widest type."""
    return sum(np.longdouble(w) * exact(change) for w, change in updates)


def sized(updates):
    """The sum of |w s| |B| |A|, entry by entry: what roundings are relative to."""
    return sum(abs(w * x.scale) * (abs(to_host(x.B)).astype(float) @ abs(to_host(x.A))) for w, x in updates)


STAGES = 5  # two QR factorizations, their product, its SVD, and what is cut off as no more than rounding


def crossed(updates, density=1.0):
    """(Σ √|w s| |B|) (Σ √|w s| |A|) / density: no method's update is longer, nor are its factors' columns.

    Its terms are those of peft_linear, and among them are those of the sum. An entry that DARE keeps grows
    by 1 / density. Made of the operands alone, so a wrong result cannot widen the bounds below.
    """
    roots = [math.sqrt(abs(w * x.scale)) for w, x in updates]
    B, A = (sum(c * np.linalg.norm(to_host(x[i])) for c, (_, x) in zip(roots, updates, strict=True))
            for i in (0, 1))  # fmt: skip
    return B * A / density


def terms(updates):
    """√k, for the most singular values k of a result: their sum is at most √k times its norm."""
    return math.sqrt(min(updates[0][1].B.shape[0], updates[0][1].A.shape[1]))


def rounding(updates, density=1.0):
    """What float64 may make of a sum, a new update, or their distance, Frobenius.

    Each of the STAGES errs by (O + I + R + 2) u times the columns' |b_j| |a_j|, summed (`bound64`); R counts
    the ranks of both, and both are at most `crossed` long.
    """
    (O, I), R = exact(updates[0][1]).shape, sum(len(x.A) for _, x in updates)  # noqa: E741
    stage = (O + I + R + min(O, I) + 2) * U64
    return STAGES * stage * 2 * terms(updates) * crossed(updates, density)


def halved(updates, u, density=1.0):
    """What rounding U √S and √S Vᵀ, or B and A, to a dtype adds: (2u + u²) of their columns (`bound32`)."""
    return (2 * u + u * u) * terms(updates) * crossed(updates, density)


def slack(updates, density=1.0, u=None):
    """What float64 and then the dtype of the result may make of an update, Frobenius."""
    u = u or unit(np.result_type(*(x.A.dtype for _, x in updates)))
    return rounding(updates, density) + halved(updates, u, density)
