"""Sparse updates: magnitude pruning, TIES and DARE, on the full ΔW of one module.

With a density d, weights w, and sums over the adapters:

    magnitude    Σ w T        T is ΔW where |ΔW| is among its int(d O I) largest entries, else 0
    dare         Σ w D        D = (m / d) ΔW, m ~ Bernoulli(d), so the mean of D is ΔW (Yu et al. 2023)
    ties         elect over T (Yadav et al. 2023): γ = +1 where Σ T >= 0, else -1; then the mean of w T
                 over the adapters whose T has the sign γ there, 0 where none has
    dare_ties    elect over D

A sparse matrix is not one of low rank: the result becomes factors again by an SVD, at `rank`, or at all the
rank that it has. As in PEFT the signs are elected before the weights act. Stands in for PEFT's
"magnitude_prune_svd", "ties_svd", "dare_linear_svd" and "dare_ties_svd"; leaves out its forms without
"_svd", which prune A and B apart.

The adapters act in the order of their digests. So the order in which they are named changes no bit, not even
with `dare`. Two equal adapters draw one after the other, and so drop different entries.

Memory: the dense ΔW and its SVD, in float64; for the methods of TIES all K of them, and K masks. An embedding
of 128,000 tokens of width 4,096 takes 4 GB for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real

import numpy as np

from ..backend import Array, quiet_overflow, to_device, to_host, xp
from ..digests import of_arrays
from ..errors import InputError, short
from ..layers import Factors
from ..spectra import norm
from .arithmetic import Combined, Update, check_finite, check_rank, checked, longest, measured, split


def magnitude(updates: Sequence[Update], density: float, rank: int | None = None) -> Combined:
    """The sum of the updates, each without all but its largest entries.

    InputError for a density outside (0, 1] or that keeps no entry, or for a rank above the shape; others as
    `arithmetic.cat`.
    """
    updates, density = prepared(updates, density)
    return in_factors(updates, added(updates, (largest(dense(x), density) for _, x in updates)), rank)


def dare(
    updates: Sequence[Update], density: float, rng: np.random.Generator, rank: int | None = None
) -> Combined:
    """The sum of the updates, each with a share of its entries dropped at random and the others enlarged.

    Draws one number per entry, row by row, one adapter after the other, in the order of their digests.
    Errors as in `magnitude`.
    """
    updates, density = prepared(updates, density)
    return in_factors(updates, added(updates, (dropped(dense(x), density, rng) for _, x in updates)), rank)


def ties(updates: Sequence[Update], density: float, rank: int | None = None) -> Combined:
    """Trim, elect a sign per entry, take the mean of the entries that have it. Errors as in `magnitude`."""
    updates, density = prepared(updates, density)
    return in_factors(updates, elected(updates, [largest(dense(x), density) for _, x in updates]), rank)


def dare_ties(
    updates: Sequence[Update], density: float, rng: np.random.Generator, rank: int | None = None
) -> Combined:
    """`ties`, with entries dropped at random as in `dare` instead of trimmed."""
    updates, density = prepared(updates, density)
    return in_factors(updates, elected(updates, [dropped(dense(x), density, rng) for _, x in updates]), rank)


# ---- their parts


def prepared(updates: Sequence[Update], density: float) -> tuple[list[Update], float]:
    """The updates that count, in order, and the density; InputError if it keeps no entry."""
    check_density(density)
    updates, share = checked(updates), float(density)
    O, I = updates[0][1].B.shape[0], updates[0][1].A.shape[1]  # noqa: E741
    if not int(share * (O * I)):  # as in `largest`: share * O * I may round to more
        raise InputError(f"density is {short(density)}; expected one that keeps an entry of {O * I:,}")
    return sorted(updates, key=settled), share


def settled(update: Update) -> tuple[str, float, float]:
    """The key that orders updates: the digest of their numbers, in any dtype; then scale and weight."""
    w, change = update
    return of_arrays([("B", change.B), ("A", change.A)], np.float64), change.scale, w


def check_density(density: float) -> None:
    """InputError unless it is a share of entries to keep."""
    if isinstance(density, bool) or not isinstance(density, Real) or not 0 < density <= 1:
        raise InputError(f"density is {short(density)}; expected the share of entries to keep, in (0, 1]")


def dense(change: Factors) -> Array:
    """ΔW (O, I) in float64; NonFiniteError if it is not finite."""
    with quiet_overflow():
        whole = change.scale * (change.B.astype(xp.float64) @ change.A.astype(xp.float64))
    check_finite(longest(whole))
    return whole


def added(updates: Sequence[Update], parts: Iterable[Array]) -> Array:
    """Σ w T, one part at a time."""
    with quiet_overflow():
        return sum(w * part for (w, _), part in zip(updates, parts, strict=True))


def largest(change: Array, density: float) -> Array:
    """ΔW with all but its int(density O I) largest entries 0; of equal ones the first are kept."""
    keep = int(density * change.size)
    if keep == change.size:
        return change
    entries = abs(change).reshape(-1)
    least = xp.partition(entries, change.size - keep)[change.size - keep]
    above, equal = entries > least, entries == least
    kept = above | (equal & (xp.cumsum(equal) <= keep - above.sum()))
    return change * kept.reshape(change.shape)


def dropped(change: Array, density: float, rng: np.random.Generator) -> Array:
    """ΔW with each entry kept with probability `density` and divided by it."""
    with quiet_overflow():
        return change * to_device(rng.random(change.shape) < density) / density


def elected(updates: Sequence[Update], parts: Sequence[Array]) -> Array:
    """The mean of w T over the adapters whose T has the sign of Σ T, + where that is 0; 0 where none has."""
    with quiet_overflow():
        sign = xp.where(sum(parts) >= 0, 1.0, -1.0)
    agreeing = [xp.sign(part) == sign for part in parts]
    whole = added(updates, (part * agrees for part, agrees in zip(parts, agreeing, strict=True)))
    return whole / xp.maximum(sum(agrees.astype(xp.float64) for agrees in agreeing), 1.0)


def in_factors(updates: Sequence[Update], whole: Array, rank: int | None) -> Combined:
    """A matrix as factors of this rank, or of all its singular values that are more than rounding."""
    check_finite(longest(whole))
    U, S, Vt = xp.linalg.svd(whole, full_matrices=False)
    values = to_host(S)
    if rank is None:
        rank = max(int((values > max(whole.shape) * np.finfo(np.float64).eps * values[0]).sum()), 1)
    check_rank(rank, len(values))
    return measured(updates, *split(U, S, Vt, rank), cut=norm(values[rank:]))
