"""Matrices -> numbers: the singular values of a change ΔW, and how many of them matter.

ΔW = s B A is never formed. With the thin QR factorizations B = Q R and Aᵀ = P T,

    ΔW = Q (s R Tᵀ) Pᵀ        so its singular values are those of the r x r core s R Tᵀ.

A spectrum means nothing without that of noise next to it: a Gaussian n x n matrix has a participation
ratio of n/2 and an effective rank of 0.8 n. The same holds for the overlap of two subspaces, the
amplification and the intruders, so each has its null next to it. All numbers are computed in float64.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from .backend import Array, to_host, xp
from .errors import InputError, MismatchError
from .layers import Factors
from .lora import active, adapted
from .tree import named_params


def thin_svd(B: Array, A: Array, scale: float = 1.0) -> tuple[Array, Array, Array]:
    """U (O, k), S (k,), Vᵀ (k, I) of s B A in float64, from the factors B (O, r) and A (r, I).

    k is the least of O, I and r; the work is O(r k (O + I)), the memory O(r (O + I)), however large r is.
    """
    Q, R = xp.linalg.qr(B.astype(xp.float64, order="F"))  # by columns, as LAPACK takes it
    P, T = xp.linalg.qr(A.T.astype(xp.float64, order="F"))
    U, S, Vt = xp.linalg.svd(scale * (R @ T.T), full_matrices=False)
    return Q @ U, S, Vt @ P.T


def thin_values(B: Array, A: Array, scale: float = 1.0) -> np.ndarray:
    """The singular values (k,) alone, for which Q and P need not be formed."""
    R = xp.linalg.qr(B.astype(xp.float64, order="F"), mode="r")
    T = xp.linalg.qr(A.T.astype(xp.float64, order="F"), mode="r")
    return to_host(xp.linalg.svd(scale * (R @ T.T), compute_uv=False))


def singular_values(change: Factors | Array) -> np.ndarray:
    """The singular values of ΔW, largest first, from its thin factors or a dense matrix."""
    if isinstance(change, Factors):
        return thin_values(*change)
    return to_host(xp.linalg.svd(change.astype(xp.float64), compute_uv=False))


def spectrum(model: Any) -> dict[str, np.ndarray]:
    """Path -> singular values of ΔW for every adapted matrix: thin for LoRA, dense for the others.

    StateError if the model has no adapter.
    """
    layers = adapted(model)
    changes = {path: adapter.change(layers[path].base) for path, adapter in active(model).items()}
    return {path: singular_values(change) for path, change in changes.items() if change is not None}


def spectrum_between(base: Any, tuned: Any) -> dict[str, np.ndarray]:
    """Path of the layer -> singular values of W_tuned - W_base for every matrix of two plain models.

    MismatchError if their names differ.
    """
    before, after = named_params(base), named_params(tuned)
    if before.keys() != after.keys():
        raise MismatchError("the two models have different parameters; expected the same names")
    return {
        path.removesuffix(".weight"): singular_values(after[path].dense() - p.dense())
        for path, p in before.items()
        if len(p.shape) == 2
    }


def norm(s: np.ndarray) -> float:
    """The Frobenius norm |ΔW| from its singular values, whose squares may underflow float64."""
    return math.hypot(*s.tolist())


def relative(s: np.ndarray) -> np.ndarray:
    """Singular values over the largest, so that their squares do not underflow; zeros stay."""
    return s / s.max() if s.any() else s


def effective_rank(s: np.ndarray) -> float:
    """exp(-sum p ln p) with p = s / sum s (Roy and Vetterli 2007); 0 for the zero matrix."""
    s = relative(s)
    total = s.sum()
    p = s / total if total > 0 else s[:0]
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum())) if p.size else 0.0


def stable_rank(s: np.ndarray) -> float:
    """sum s² / max s²; 0 for the zero matrix."""
    return float((relative(s) ** 2).sum())


def participation_ratio(s: np.ndarray) -> float:
    """(sum s²)² / sum s⁴; 0 for the zero matrix."""
    e = relative(s) ** 2
    return float(e.sum() ** 2 / (e * e).sum()) if s.any() else 0.0


def energy(s: np.ndarray) -> np.ndarray:
    """The share of sum s² in the first 1, 2, ... singular values."""
    e = np.cumsum(relative(s) ** 2)
    return e / e[-1] if s.any() else np.zeros_like(s)


def rank_at(s: np.ndarray, share: float) -> int:
    """How many singular values hold `share` of the energy, 0 < share <= 1."""
    if not 0 < share <= 1:
        raise InputError(f"share is {share!r}; expected a number in (0, 1]")
    return int((energy(s) < share * (1 - 1e-12)).sum()) + 1 if s.any() else 0


def rank_shown(s: np.ndarray, floor: float = 1e-2) -> int:
    """The rank after which a spectrum of at least two falls by the largest factor; 0 for the zero matrix.

    Values below `floor` times the largest count as that.
    """
    s = np.maximum(relative(s), floor)
    return 1 + int(np.argmax(s[:-1] / s[1:])) if s.max() == 1 else 0


def noise_spectrum(
    shape: tuple[int, int], rng: np.random.Generator, rank: int | None = None, draws: int = 8
) -> np.ndarray:
    """The mean spectrum of pure noise with Frobenius norm 1: a Gaussian (m, n), or a product of rank r.

    A flat spectrum looks like this: it is no sign of learning.
    """
    m, n = shape
    total = 0.0
    for _ in range(draws):
        if rank is None:
            s = singular_values(xp.asarray(rng.standard_normal((m, n))))
        else:
            B, A = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
            s = thin_values(xp.asarray(B), xp.asarray(A))
        total = total + s / np.sqrt((s * s).sum())
    return np.asarray(total) / draws


# ---- two subspaces, and a change against its base


def similarity(U: Array, V: Array) -> np.ndarray:
    """phi(i, j) = |U_iᵀ V_j|² / min(i, j) for the first i and j of two orthonormal sets, (k, l).

    1 if the smaller span lies in the larger, 0 if they are orthogonal (Hu et al. 2021, section 7.2; their
    appendix G prints 1 - d² / p wrongly as (1 - d²) / p). U (D, k) and V (D, l).
    """
    cosines = to_host(U.T @ V) ** 2
    i, j = (np.arange(1, n + 1) for n in cosines.shape)
    return cosines.cumsum(0).cumsum(1) / np.minimum(i[:, None], j)


def random_similarity(i: int, j: int, D: int) -> float:
    """The mean of phi(i, j) for random subspaces of R^D: max(i, j) / D, not small where D is small."""
    return max(i, j) / D


def amplification(W: Array, U: Array, S: Array, Vt: Array) -> tuple[float, float]:
    """|ΔW| / |Uᵀ W V|: how much stronger ΔW is than W along ΔW's directions, and along random ones.

    U (O, r), S (r,), Vᵀ (r, I) are those of ΔW (Hu et al. 2021, section 7.3 and definition H.4). Along
    random directions |Uᵀ W V| is |W| r / sqrt(O I).
    """
    change = norm(to_host(S))
    along = float(xp.linalg.norm(U.T @ W @ Vt.T))
    random = float(xp.linalg.norm(W)) * len(S) / math.sqrt(W.shape[0] * W.shape[1])
    return quotient(change, along), quotient(change, random)


def quotient(a: float, b: float) -> float:
    """a / b of two norms: 0 where a is 0, infinite where only b is 0."""
    return a / b if b else math.inf if a else 0.0


def intruders(W: Array, delta: Array, k: int = 10) -> np.ndarray:
    """max |cos| (k,) of each of the first k left singular vectors of W + ΔW with all those of W.

    A vector that resembles none of the base's is an intruder (Shuttleworth et al. 2024). The
    threshold depends on the dimension: `intruder_threshold`.
    """
    before = xp.linalg.svd(W, full_matrices=False)[0]
    after = xp.linalg.svd(W + delta, full_matrices=False)[0][:, :k]
    return to_host(abs(after.T @ before).max(1))


@functools.cache
def intruder_threshold(D: int, n: int | None = None, share: float = 0.99, draws: int = 1000) -> float:
    """The `share` quantile of max |cos| of a random unit vector of R^D with n orthonormal ones.

    With D = 16 more than half of all random vectors exceed the paper's fixed 0.5. For D = 64, 256,
    768, 4096 this is 0.46, 0.25, 0.16, 0.07: a vector below it resembles the base no more than chance does.
    """
    rng = np.random.default_rng(0)
    n = D if n is None else n

    def one() -> float:  # outside the n only the length counts; a head has D = 100,000
        x = rng.standard_normal(n)
        rest = rng.chisquare(D - n) if n < D else 0.0
        return float(abs(x).max() / math.sqrt(x @ x + rest))

    return float(np.quantile([one() for _ in range(draws)], share))


def top_vectors(W: Array, k: int, rounds: int = 6) -> tuple[Array, Array]:
    """The first k left (O, k) and right (I, k) singular vectors of W, by subspace iteration.

    With 10 spare directions and 6 rounds the error of a vector falls as (s_{k+11} / s_i)^13 (Halko et al.
    2011, section 4.5): accurate enough for an overlap, and far cheaper than a full decomposition.
    """
    rng = np.random.default_rng(0)
    n = min(k + 10, *W.shape)
    Q = xp.linalg.qr(W @ xp.asarray(rng.standard_normal((W.shape[1], n)), dtype=W.dtype))[0]
    for _ in range(rounds):
        Q = xp.linalg.qr(W @ xp.linalg.qr(W.T @ Q)[0])[0]
    U, _, Vt = xp.linalg.svd(Q.T @ W, full_matrices=False)
    return (Q @ U)[:, :k], Vt[:k].T
