"""Adapters as vectors: the sum of weighted updates, on ΔW = s B A and never on A and B apart.

    Σ w ΔW = Σ w s B A = [B_1 ... B_K] [w_1 s_1 A_1; ...; w_K s_K A_K]        rank at most Σ r

That is the exact sum, `cat`. B takes a power of two out of w s, so that both sides are about equally large
and neither overflows unless the sum does. Interpolation (weights 1 - t and t), task arithmetic and negation
(weight -1: forgetting) are choices of the weights (Ilharco et al. 2022). `svd` is the nearest update of a
given rank, from the thin factors. `peft_linear` adds the factors instead, as PEFT's "linear" and LoRAHub do;
a product of sums holds B_i A_j of every two adapters, so it is another update:

    (Σ √|w s| B) (Σ ±√|w s| A) = Σ_ij √|w_i s_i| ±√|w_j s_j| B_i A_j

Every result comes with its distance to the exact sum. Stands in for PEFT's add_weighted_adapter with "cat",
"svd" and "linear", and for kohya's merge_lora.py; leaves out the search for weights, and clamping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from ..backend import Array, floats, quiet_overflow, to_host, xp
from ..errors import InputError, MismatchError, NonFiniteError, short
from ..layers import Factors
from ..spectra import norm, quotient, thin_svd, thin_values

Update = tuple[float, Factors]  # w and s B A: together w s B A


@dataclass(frozen=True, eq=False)
class Combined:
    """A new update, and its distance to the exact sum; all in Frobenius norms."""

    factors: Factors  # scale 1, in the dtype of the operands
    norm: float  # |Σ w ΔW|
    residual: float  # |new - Σ w ΔW|, of the factors as they are rounded
    cut: float = 0.0  # what the rank leaves out of what the method gives: the least loss at that rank

    @property
    def relative(self) -> float:
        """The residual as a share of the sum's norm."""
        return quotient(self.residual, self.norm)


def cat(updates: Sequence[Update]) -> Combined:
    """The exact sum, of rank Σ r: the factors one beside the other. An update of weight 0 is left out.

    InputError for no updates or a weight that is not finite, MismatchError for two shapes, NonFiniteError.
    """
    updates = checked(updates)
    B, A, _ = total(updates)
    return measured(updates, B, A)


def svd(updates: Sequence[Update], rank: int) -> Combined:
    """The update of this rank that is nearest to the sum (Eckart and Young 1936); no dense ΔW is formed.

    InputError for a rank that the sum cannot have; others as `cat`.
    """
    updates = checked(updates)
    B, A, _ = total(updates)
    U, S, Vt = thin_svd(B, A)
    check_rank(rank, len(S))
    return measured(updates, *split(U, S, Vt, rank), cut=norm(to_host(S)[rank:]))


def linear(updates: Sequence[Update], rank: int | None = None) -> Combined:
    """The sum of the updates: `cat`, or `svd` if a rank is asked for."""
    return cat(updates) if rank is None else svd(updates, rank)


def peft_linear(updates: Sequence[Update]) -> Combined:
    """PEFT's "linear": the product of the summed factors, with the cross terms B_i A_j. Not the sum.

    The residual is the size of its error. InputError unless all ranks are equal; others as `cat`.
    """
    return of_sums(updates, "peft_linear", lambda w, s: math.sqrt(abs(w * s)))


def kohya_linear(updates: Sequence[Update]) -> Combined:
    """What merge_lora.py of kohya's sd-scripts makes of several files: as `peft_linear`, of squared weights.

    Both factors are multiplied by the weight, so one file of weight 1/2 is 1/4 of it: w |w| s B A. The
    residual is its distance to Σ w ΔW. Errors as `peft_linear`.
    """
    return of_sums(updates, "kohya_linear", lambda w, s: abs(w) * math.sqrt(abs(s)))


def of_sums(updates: Sequence[Update], name: str, root: Callable[[float, float], float]) -> Combined:
    """(Σ root B) (Σ ±root A), with the sign of w s once; InputError unless all ranks are equal."""
    updates = checked(updates)
    ranks = [len(change.A) for _, change in updates]
    if len({*ranks}) > 1:
        raise InputError(f"the ranks are {short(ranks)}; {name} adds factors: expected the same rank")
    B, A = xp.zeros(updates[0][1].B.shape), xp.zeros(updates[0][1].A.shape)
    with quiet_overflow():
        for w, change in updates:
            size = root(w, change.scale)
            B = B + size * change.B.astype(xp.float64)
            A = A + math.copysign(size, w * change.scale) * change.A.astype(xp.float64)
    return measured(updates, B, A)


# ---- what they share


def checked(updates: Sequence[Update]) -> list[Update]:
    """The updates that count: those whose weight is not 0; or the errors that `cat` names."""
    check_weights([w for w, _ in updates])
    counted = [(float(w), change) for w, change in updates if w]
    shapes = {(change.B.shape[0], change.A.shape[1]): None for _, change in counted}
    if len(shapes) > 1:
        one, other, *_ = shapes
        raise MismatchError(f"the updates are {one} and {other}; expected the same shape")
    return counted


def check_weights(weights: Sequence[float]) -> None:
    """InputError unless there are weights, all finite numbers, and not all 0."""
    for w in weights:
        if not is_finite(w):
            raise InputError(f"a weight is {short(w)}; expected a finite number")
    if not any(weights):
        what = "the weights are all 0" if weights else "there are no adapters"
        raise InputError(f"{what}; expected at least one with a weight that is not 0")


def is_finite(w: object) -> bool:
    """Whether it is a real number that a float can hold, which True is not."""
    try:
        return isinstance(w, Real) and not isinstance(w, bool) and math.isfinite(w)
    except OverflowError:  # an int of many digits
        return False


def check_rank(rank: int, most: float = math.inf) -> None:
    """InputError unless the rank is one that an update can have, `most` at most."""
    if isinstance(rank, bool) or not isinstance(rank, Integral) or not 1 <= rank <= most:
        up_to = f"from 1 to {most}, the most that it can be" if most < math.inf else "of at least 1"
        raise InputError(f"rank is {short(rank)}; expected an int {up_to}")


def total(updates: Sequence[Update]) -> Factors:
    """Σ w s B A as its thin factors in float64: B (O, Σ r), A (Σ r, I), scale 1; or NonFiniteError."""
    with quiet_overflow():
        sides = [balanced(w, change) for w, change in updates]
        B = xp.concatenate([B for B, _ in sides], axis=1)
        A = xp.concatenate([A for _, A in sides])
        check_finite(longest(B) * longest(A))
    return Factors(B, A, 1.0)


def balanced(w: float, change: Factors) -> tuple[Array, Array]:
    """B and A in float64 with the product w s B A, whose largest entries are alike within a factor of 8.

    w s = m 2^e. Powers of two are exact, so the only roundings are those of m and of m A.
    """
    (m, e), (n, f) = math.frexp(w), math.frexp(change.scale)
    B, A = change.B.astype(xp.float64), change.A.astype(xp.float64)
    (_, b), (_, a) = (math.frexp(float(abs(side).max())) for side in (B, A))
    half = (e + f + a - b) // 2
    return xp.ldexp(B, half), xp.ldexp(m * n * A, e + f - half)


def longest(a: Array) -> float:
    """An upper bound of |a|, Frobenius, without squares, which could overflow; NaN if an entry is."""
    return float(abs(a).max()) * math.sqrt(a.size)


def check_finite(bound: float) -> None:
    """NonFiniteError unless the bound of a sum is finite; LAPACK would print complaints about such a sum."""
    if not math.isfinite(bound):
        raise NonFiniteError("the sum is not finite: its weights or factors are too large")


def size(updates: Sequence[Update]) -> float:
    """|Σ w s B A|, Frobenius, from the thin factors; with a weight of -1 it is a distance."""
    return norm(thin_values(*total(updates)))


def split(U: Array, S: Array, Vt: Array, k: int) -> tuple[Array, Array]:
    """B (O, k) = U √S and A (k, I) = √S Vᵀ, whose product is the first k terms of U S Vᵀ."""
    root = S[:k] ** 0.5
    return U[:, :k] * root, root[:, None] * Vt[:k]


def distance(U: Array, S: Array, Vt: Array, B: Array, A: Array) -> float:
    """|U S Vᵀ - B A|, Frobenius, for orthonormal U and V, from products with them: no further QR.

    With X = Uᵀ B, Y = A V, B' = B - U X and A' = A - Y Vᵀ it has four parts, orthogonal to each other:

        U (S - X Y) Vᵀ - U X A' - B' Y Vᵀ - B' A'

    In float64 it is off by a few (O + I + r) u |B| |A|, as with a QR of the factors side by side.
    """
    half = math.frexp(float(S[0]))[1] // 2  # a power of two, so that no square underflows
    S, B, A = (xp.ldexp(x.astype(xp.float64), -n) for x, n in ((S, 2 * half), (B, half), (A, half)))
    X, Y = U.T @ B, A @ Vt.T
    B, A = B - U @ X, A - Y @ Vt
    squares = floats(*((part * part).sum() for part in (xp.diag(S) - X @ Y, X @ A, B @ Y)))
    last = float(((B.T @ B) * (A @ A.T)).sum())  # |B A|²
    return math.ldexp(math.sqrt(math.fsum((*squares, max(last, 0.0)))), 2 * half)


def measured(updates: Sequence[Update], B: Array, A: Array, cut: float = 0.0) -> Combined:
    """The result in the dtype of the operands, with its distance; NonFiniteError if that is too narrow."""
    dtype = np.result_type(*(part.dtype for _, change in updates for part in change[:2]))
    with quiet_overflow():
        new = Factors(B.astype(dtype), A.astype(dtype), 1.0)
    exact, residual = size(updates), size([*updates, (-1.0, new)])
    if not exact + residual <= float(np.finfo(dtype).max):  # which bounds |new|
        raise NonFiniteError(f"the sum is not finite in {dtype}: its weights or factors are too large")
    return Combined(new, exact, residual, cut)
