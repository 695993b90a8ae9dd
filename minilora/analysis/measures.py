"""One module of an adapter -> its numbers: its spectrum, and what noise would show in its place.

    |ΔW|, singular values s_i, effective rank exp(H(s / sum s)), stable rank |ΔW|² / s_1², rank at 90 and 99 %

With the base: |ΔW| / |W|, how much ΔW amplifies its directions (Hu et al. 2021, section 7.3), intruder
dimensions (Shuttleworth et al. 2024) and the overlap with W's top directions. With a second adapter: their
common subspace, phi. Every number that chance can produce comes with chance's value.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from .. import spectra
from ..backend import Array, to_device, to_host
from ..compose.ranks import choose
from ..errors import MismatchError, NonFiniteError
from ..peft.folder import Adapter
from ..spectra import norm, quotient, rank_at, similarity
from ..targets import LAYER
from .names import place

FIRST = 10  # singular vectors of W + ΔW checked for intruders
ENERGY = 0.99  # the share of |ΔW|² that a suggested rank keeps


@dataclass(frozen=True)
class Ranks:
    """How many directions a spectrum has, by four measures."""

    effective: float
    stable: float
    at90: int  # singular values that hold 90 % of the energy
    at99: int


@dataclass(frozen=True)
class BesideBase:
    """A ΔW compared with its W."""

    relative: float  # |ΔW| / |W|
    amplification: float
    random_amplification: float  # along random directions
    overlap: float  # phi(k, k) of the first k left singular vectors of ΔW and W, k the true rank of ΔW
    random_overlap: float
    intruders: int | None  # among the first 10 of W + ΔW; None where W is too large to decompose
    cosines: tuple[float, ...]  # max |cos| of each of them with W's
    threshold: float  # below which a vector resembles W no more than 99 % of random ones


@dataclass(frozen=True)
class BesideOther:
    """A ΔW compared with another adapter's of the same module."""

    cosine: float  # <ΔW_1, ΔW_2> / (|ΔW_1| |ΔW_2|)
    inputs: tuple[float, ...]  # phi(i, i) of right singular vectors, up to the lesser true rank
    outputs: tuple[float, ...]  # phi(i, i) of left ones
    random_inputs: tuple[float, ...]
    random_outputs: tuple[float, ...]
    norm: float  # |ΔW_2|


@dataclass(frozen=True)
class Module:
    """The numbers of one adapted module."""

    module: str
    component: str  # these three as names.place has them
    kind: str
    block: str
    layer: int | None  # the first number within its name
    shape: tuple[int, int]  # (O, I)
    r: int
    alpha: float
    scale: float
    norm: float  # |ΔW|, Frobenius
    singular_values: tuple[float, ...]
    ranks: Ranks
    noise: Ranks  # of a product of two Gaussian factors of the same shapes
    base: BesideBase | None = None
    other: BesideOther | None = None


@dataclass(frozen=True)
class Group:
    """Several modules together: those of a kind, or of a whole adapter."""

    modules: int
    r_min: int
    r_max: int
    parameters: int
    norm: float  # |ΔW| over all of them
    median_norm: float  # medians over the modules, here and below
    effective: float
    noise: float
    at90: float
    at99: float
    suggested_rank: int  # the least for all of them that keeps 99 % of the energy, as `compress` chooses it


def group(modules: Sequence[Module]) -> Group:
    """The numbers of at least one module, together."""
    norms, ranks, noise = ([getattr(m, part) for m in modules] for part in ("norm", "ranks", "noise"))
    chosen = choose({m.module: np.array(m.singular_values) for m in modules}, {}, None, ENERGY, False)
    return Group(
        len(modules), min(m.r for m in modules), max(m.r for m in modules),
        sum(m.r * sum(m.shape) for m in modules), math.hypot(*norms), median(norms),
        median(n.effective for n in ranks), median(n.effective for n in noise),
        median(n.at90 for n in ranks), median(n.at99 for n in ranks), max(chosen.values()),
    )  # fmt: skip


def look(given: Adapter, name: str, W: np.ndarray | None, other: Adapter | None, whole: int) -> Module:
    """The numbers of one module; singular vectors are computed only for a comparison."""
    pair = given.pairs[name]
    if W is None and other is None:
        S = spectra.thin_values(*thin(given, name))
    else:
        parts = spectra.thin_svd(*thin(given, name))
        S = to_host(parts[1])
    number = LAYER.match(name)
    return Module(
        name, *place(name), int(number[1]) if number else None, pair.shape, pair.r, pair.alpha,
        pair.scale, norm(S), tuple(S.tolist()), ranks(S), noise(pair.shape, pair.r),
        None if W is None else beside_base(given, name, W, *directions(*parts), whole),
        None if other is None else beside_other(*directions(*parts), other, name),
    )  # fmt: skip


def thin(given: Adapter, name: str) -> tuple[Array, Array, float]:
    """B (O, r), A (r, I) and scale s of a module on the device; NonFiniteError if its ΔW is not finite."""
    A, B = given.factors(name)
    return to_device(B), to_device(A), given.pairs[name].scale


def directions(U: Array, S: Array, Vt: Array) -> tuple[Array, Array, Array]:
    """U, S and Vᵀ without the arbitrary directions that carry no energy; for ΔW = 0, one zero direction."""
    k = max(rank_at(to_host(S), 1.0), 1)
    some = S[:k] > 0
    return U[:, :k] * some, S[:k], Vt[:k] * some[:, None]


def ranks(S: np.ndarray) -> Ranks:
    """The four measures of a spectrum."""
    return Ranks(spectra.effective_rank(S), spectra.stable_rank(S), rank_at(S, 0.9), rank_at(S, 0.99))


@functools.cache
def noise(shape: tuple[int, int], r: int) -> Ranks:
    """The four measures of noise: B A with Gaussian factors, the mean spectrum of four draws."""
    return ranks(spectra.noise_spectrum(shape, np.random.default_rng(0), r, draws=4))


def beside_base(given: Adapter, name: str, W: Array, U: Array, S: Array, Vt: Array, whole: int) -> BesideBase:
    """ΔW = U S Vᵀ compared with W (O, I)."""
    size = float(np.linalg.norm(W))
    if not math.isfinite(size):
        raise NonFiniteError(f"{given.where}: the base's {name}.weight has values that are not finite")
    W, k = to_device(W), len(S)
    top, _ = spectra.top_vectors(W, k)
    factor, random = spectra.amplification(W, U, S, Vt)
    cosines = spectra.intruders(W, (U * S) @ Vt, FIRST) if min(W.shape) <= whole else np.zeros(0)
    threshold = spectra.intruder_threshold(W.shape[0], min(W.shape))
    return BesideBase(
        quotient(norm(to_host(S)), size), factor, random, float(similarity(U, top)[-1, -1]),
        spectra.random_similarity(k, k, len(W)), int((cosines < threshold).sum()) if cosines.size else None,
        tuple(cosines.tolist()), threshold,
    )  # fmt: skip


def beside_other(U: Array, S: Array, Vt: Array, other: Adapter, name: str) -> BesideOther:
    """ΔW = U S Vᵀ compared with another adapter's."""
    O, I = len(U), Vt.shape[1]  # noqa: E741
    if (shape := other.pairs[name].shape) != (O, I):
        raise MismatchError(f"{other.where}: {name} is {shape}; the first adapter's is {O, I}")
    parts = spectra.thin_svd(*thin(other, name))
    U2, S2, Vt2 = directions(*parts)
    s, s2 = (spectra.relative(to_host(x)) for x in (S, S2))
    inner = float((to_host((U.T @ U2) * (Vt @ Vt2.T)) * s[:, None] * s2).sum())
    n = range(1, min(len(S), len(S2)) + 1)
    by_inputs, by_outputs = (tuple(spectra.random_similarity(i, i, D) for i in n) for D in (I, O))
    return BesideOther(
        quotient(inner, norm(s) * norm(s2)),
        tuple(np.diag(similarity(Vt.T, Vt2.T)).tolist()),
        tuple(np.diag(similarity(U, U2)).tolist()),
        by_inputs,
        by_outputs,
        norm(to_host(parts[1])),
    )
