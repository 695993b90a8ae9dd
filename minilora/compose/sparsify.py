"""Sparse updates: magnitude pruning, TIES and DARE, on the full ΔW of one module.

With a density d, weights w, and sums over the adapters:

    magnitude    Σ w T        T is ΔW where |ΔW| is among its int(d O I) largest entries, else 0
    dare         Σ w D        D = (m / d) ΔW, m ~ Bernoulli(d), so the mean of D is ΔW (Yu et al. 2023)
    ties         elect over T (Yadav et al. 2023): γ = +1 where Σ T >= 0, else -1; then the mean of w T
                 over the adapters whose T has the sign γ there, 0 where none has
    dare_ties    elect over D

A sparse matrix is not one of low rank: the result becomes factors again by an SVD, at `rank`, or at all the
rank that it has. As in PEFT the signs are elected before the weights act. Stands in for PEFT's
"magnitude_prune_svd", "ties_svd", "dare_linear_svd" and "dare_ties_svd"; leaves out its forms without "_svd",
which prune A and B apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..backend import Array, to_device, to_host, xp
from ..errors import InputError, NonFiniteError, short
from ..layers import Factors
from ..spectra import norm
from .arithmetic import Combined, Update, check_rank, checked, measured, split


def magnitude(updates: Sequence[Update], density: float, rank: int | None = None) -> Combined:
    """The sum of the updates, each without all but its largest entries.

    InputError for a density outside (0, 1], or a rank above the shape; others as `arithmetic.cat`.
    """
    updates = prepared(updates, density)
    whole = sum(w * largest(dense(change), density) for w, change in updates)
    return in_factors(updates, whole, rank)


def dare(
    updates: Sequence[Update], density: float, rng: np.random.Generator, rank: int | None = None
) -> Combined:
    """The sum of the updates, each with a share of its entries dropped at random and the others enlarged.

    Draws one number per entry, row by row, one adapter after the other. Errors as in `magnitude`.
    """
    updates = prepared(updates, density)
    whole = sum(w * dropped(dense(change), density, rng) for w, change in updates)
    return in_factors(updates, whole, rank)


def ties(updates: Sequence[Update], density: float, rank: int | None = None) -> Combined:
    """Trim, elect a sign per entry, and take the mean of those that agree. Errors as in `magnitude`."""
    updates = prepared(updates, density)
    return in_factors(updates, elected(updates, [largest(dense(x), density) for _, x in updates]), rank)


def dare_ties(
    updates: Sequence[Update], density: float, rng: np.random.Generator, rank: int | None = None
) -> Combined:
    """`ties` on entries dropped at random, as in `dare`, instead of trimmed ones."""
    updates = prepared(updates, density)
    return in_factors(updates, elected(updates, [dropped(dense(x), density, rng) for _, x in updates]), rank)


# ---- their parts


def prepared(updates: Sequence[Update], density: float) -> list[Update]:
    """The updates that count; InputError for a density outside (0, 1]."""
    check_density(density)
    return checked(updates)


def check_density(density: float) -> None:
    """InputError unless it is a share of entries to keep."""
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise InputError(f"density is {short(density)}; expected the share of entries to keep, in (0, 1]")


def dense(change: Factors) -> Array:
    """ΔW (O, I) in float64."""
    return change.scale * (change.B.astype(xp.float64) @ change.A.astype(xp.float64))


def largest(change: Array, density: float) -> Array:
    """ΔW with all but its int(density O I) largest entries 0; of equal ones the first are kept."""
    keep = int(density * change.size)
    if keep in (0, change.size):
        return change if keep else xp.zeros_like(change)
    entries = abs(change).reshape(-1)
    least = xp.partition(entries, change.size - keep)[change.size - keep]
    above, equal = entries > least, entries == least
    kept = above | (equal & (xp.cumsum(equal) <= keep - above.sum()))
    return change * kept.reshape(change.shape)


def dropped(change: Array, density: float, rng: np.random.Generator) -> Array:
    """ΔW with each entry kept with probability `density` and divided by it."""
    return change * to_device(rng.random(change.shape) < density) / density


def elected(updates: Sequence[Update], parts: Sequence[Array]) -> Array:
    """The mean of w T over the adapters whose T has the sign that most weight has; 0 where none has."""
    sign = xp.where(sum(parts) >= 0, 1.0, -1.0)
    agreeing = [xp.sign(part) == sign for part in parts]
    whole = sum(w * part * agrees for (w, _), part, agrees in zip(updates, parts, agreeing, strict=True))
    return whole / xp.maximum(sum(agrees.astype(xp.float64) for agrees in agreeing), 1.0)


def in_factors(updates: Sequence[Update], whole: Array, rank: int | None) -> Combined:
    """A matrix as factors of this rank, or of all its singular values that are more than rounding."""
    if not xp.isfinite(whole).all():
        raise NonFiniteError("the sum is not finite: its weights or factors are too large")
    U, S, Vt = xp.linalg.svd(whole, full_matrices=False)
    values = to_host(S)
    if rank is None:
        rank = max(int((values > max(whole.shape) * np.finfo(np.float64).eps * values[0]).sum()), 1)
    check_rank(rank, len(values))
    return measured(updates, *split(U, S, Vt, rank), cut=norm(values[rank:]))
