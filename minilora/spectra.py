"""Matrices -> numbers: the singular values of a change ΔW, and how many of them matter.

ΔW = s B A is never formed. With the thin QR factorizations B = Q R and Aᵀ = P T,

    ΔW = Q (s R Tᵀ) Pᵀ        so its singular values are those of the r x r core s R Tᵀ.

A spectrum means nothing without that of noise beside it: a Gaussian n x n matrix has a participation
ratio of n/2 and an effective rank of 0.8 n. All numbers are computed in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .backend import Array, to_host, xp
from .errors import InputError, MismatchError
from .layers import named_params
from .lora import LowRank, LowRankEmbedding, adapted, unbiased


def thin_svd(B: Array, A: Array, scale: float = 1.0) -> tuple[Array, Array, Array]:
    """U (O, k), S (k,), Vᵀ (k, I) of s B A in float64, from the factors B (O, r) and A (r, I).

    k is the least of O, I and r; the work is O(r² (O + I)).
    """
    Q, R = xp.linalg.qr(B.astype(xp.float64))
    P, T = xp.linalg.qr(A.T.astype(xp.float64))
    U, S, Vt = xp.linalg.svd(scale * (R @ T.T), full_matrices=False)
    return Q @ U, S, Vt @ P.T


def singular_values(change: LowRank | LowRankEmbedding | Array) -> np.ndarray:
    """The singular values of an adapter's ΔW (from its factors) or of a dense one, falling."""
    if isinstance(change, LowRank | LowRankEmbedding):
        return to_host(thin_svd(change.B.data, change.A.data, change.scale)[1])
    return to_host(xp.linalg.svd(change.astype(xp.float64), compute_uv=False))


def spectrum(model: Any) -> dict[str, np.ndarray]:
    """Path -> singular values of ΔW for every adapted matrix: thin for LoRA, dense for the others."""
    found = {}
    for path, layer in adapted(model).items():
        adapter = unbiased(layer.adapters[layer.active]) if layer.active else None
        if isinstance(adapter, LowRank | LowRankEmbedding):
            found[path] = singular_values(adapter)
        elif adapter is not None and layer.base.weight.dense().ndim == 2:
            found[path] = singular_values(adapter.fold(layer.base).weight.data - layer.base.weight.dense())
    return found


def spectrum_between(base: Any, tuned: Any) -> dict[str, np.ndarray]:
    """Path of the layer -> singular values of W_tuned - W_base for every matrix of two plain models."""
    before, after = named_params(base), named_params(tuned)
    if before.keys() != after.keys():
        raise MismatchError("the two models have other parameters; expected the same names")
    return {
        path.removesuffix(".weight"): singular_values(after[path].dense() - p.dense())
        for path, p in before.items()
        if p.dense().ndim == 2
    }


def effective_rank(s: np.ndarray) -> float:
    """exp(-sum p ln p) with p = s / sum s (Roy and Vetterli 2007); 0 for the zero matrix."""
    total = s.sum()
    p = s[s > 0] / total if total > 0 else s[:0]
    return float(np.exp(-(p * np.log(p)).sum())) if p.size else 0.0


def stable_rank(s: np.ndarray) -> float:
    """sum s² / max s²; 0 for the zero matrix."""
    return float((s * s).sum() / (s * s).max()) if s.any() else 0.0


def participation_ratio(s: np.ndarray) -> float:
    """(sum s²)² / sum s⁴; 0 for the zero matrix."""
    e = s * s
    return float(e.sum() ** 2 / (e * e).sum()) if s.any() else 0.0


def energy(s: np.ndarray) -> np.ndarray:
    """The share of sum s² in the first 1, 2, ... singular values."""
    e = np.cumsum(s * s)
    return e / e[-1] if e.size and e[-1] > 0 else np.zeros_like(s)


def rank_at(s: np.ndarray, share: float) -> int:
    """How many singular values hold `share` of the energy, 0 < share <= 1."""
    if not 0 < share <= 1:
        raise InputError(f"share is {share!r}; expected a number in (0, 1]")
    return int((energy(s) < share * (1 - 1e-12)).sum()) + 1 if s.any() else 0


def noise_spectrum(
    shape: tuple[int, int], rng: np.random.Generator, rank: int | None = None, draws: int = 8
) -> np.ndarray:
    """The mean spectrum of pure noise with Frobenius norm 1: a Gaussian (m, n), or a product of rank r.

    What a flat spectrum looks like: not a sign of anything learned.
    """
    m, n = shape
    total = 0.0
    for _ in range(draws):
        if rank is None:
            s = singular_values(xp.asarray(rng.standard_normal((m, n))))
        else:
            B, A = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
            s = to_host(thin_svd(xp.asarray(B), xp.asarray(A))[1])
        total = total + s / np.sqrt((s * s).sum())
    return np.asarray(total) / draws
