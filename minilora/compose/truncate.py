"""An adapter -> a smaller one: the best approximation of its ΔW at lower rank.

The best rank-k approximation of ΔW = U S Vᵀ keeps the first k singular values (Eckart and Young 1936):

    |ΔW - ΔW_k|² = sum of s_i² beyond k (Frobenius)        |ΔW - ΔW_k|_2 = s_{k+1}

An adapter's ΔW is never formed: QR of B and Aᵀ and the SVD of an r x r core give U, S and V (spectra.py).
The file holds B = U sqrt(S) and A = sqrt(S) Vᵀ in float32 with scale 1; the residual is measured on these
float32 factors. Stands in for mergekit's and PEFT's rank reduction; combine.py combines several adapters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import to_device, to_host
from ..errors import ConfigError, InputError, MismatchError, check_int, short
from ..formats.atomic import check_free
from ..layers import Factors
from ..peft.config import peft_config
from ..peft.folder import (
    PREFIX,
    Adapter,
    about_targets,
    open_adapter,
    saves,
    unlisted,
    unmentioned,
    write_adapter,
)
from ..peft.kinds import KINDS
from ..spectra import norm, quotient, rank_at, thin_svd
from ..table import Table, report
from .arithmetic import size, split


@dataclass(frozen=True)
class Shrunk:
    """One module: its rank before and after, |ΔW|, the loss, and the least possible loss at that rank."""

    module: str
    shape: tuple[int, int]
    r: int | None  # None where ΔW is the difference of two checkpoints
    rank: int
    norm: float  # |ΔW|, Frobenius
    residual: float  # |ΔW - ΔW_k| of what was written
    optimum: float  # Eckart and Young's: the root of the sum of s_i² beyond the rank
    spectral: float  # the largest singular value left out, their optimum in the spectral norm


@report
@dataclass(frozen=True)
class Compression:
    """What `compress` or `extract` wrote; prints as a table."""

    out: str
    rows: tuple[Shrunk, ...]
    parameters: int
    before: int | None  # parameters of the adapter that was compressed
    left: Mapping[str, float]  # parameter -> |change| where no LoRA on linear maps can hold it
    notes: tuple[str, ...] = ()  # on everything else that was left out

    @property
    def residual(self) -> float:
        """The loss over all modules together, relative to |ΔW|."""
        return ratio(self.rows, "residual")

    @property
    def optimum(self) -> float:
        """The least possible loss at these ranks, relative to |ΔW|."""
        return ratio(self.rows, "optimum")

    def data(self) -> dict[str, Any]:
        return asdict(self) | {"residual": self.residual, "optimum": self.optimum}

    def parts(self) -> list[str | Table]:
        rows = []
        for w in self.rows:
            rank = f"{w.r} -> {w.rank}" if w.r else str(w.rank)
            lost = (part / w.norm if w.norm else 0.0 for part in (w.residual, w.optimum))
            rows.append((w.module, rank, *(f"{x:.2e}" for x in (w.norm, *lost))))
        of = f" of {self.before:,}" if self.before else ""
        parts: list[str | Table] = [
            Table(("module", "rank", "|ΔW|", "residual", "optimum"), rows),
            f"{self.out}: {self.parameters:,}{of} parameters, residual {self.residual:.3e} of |ΔW|, "
            f"Eckart-Young optimum {self.optimum:.3e}",
        ]
        if self.left:
            parts.append("left out, as a LoRA on linear maps cannot hold it:")
            parts += [f"  {name}  |change| {norm:.3g}" for name, norm in self.left.items()]
        return [*parts, *(f"note: {note}" for note in self.notes)]


def shrunk(
    module: str, shape: tuple[int, int], r: int | None, S: np.ndarray, rank: int, residual: float
) -> Shrunk:
    """The row of a module whose singular values S were cut after `rank` of them."""
    spectral = float(S[rank]) if rank < len(S) else 0.0
    return Shrunk(module, shape, r, rank, norm(S), residual, norm(S[rank:]), spectral)


def ratio(rows: Sequence[Any], part: str) -> float:
    """The root of the sum of squares of one field over the rows, relative to that of the norms."""
    lost, whole = (math.hypot(*(getattr(row, name) for row in rows)) for name in (part, "norm"))
    return quotient(lost, whole)


# ---- which ranks


def check_choice(rank: int | None, energy: float | None) -> None:
    """ConfigError unless exactly one of the two is given, and is valid."""
    if (rank is None) == (energy is None):
        raise ConfigError("rank and energy are two ways to choose; expected exactly one of them")
    if rank is not None:
        check_int("rank", rank, 1)
    elif type(energy) not in (int, float) or not 0 < (energy or 0) <= 1:
        raise ConfigError(f"energy is {short(energy)}; expected a number in (0, 1]")


def choose(
    spectra: Mapping[str, np.ndarray],
    costs: Mapping[str, int],
    rank: int | None,
    energy: float | None,
    per_module: bool,
) -> dict[str, int]:
    """The rank of every module, at least 1 each.

    `rank`: the same for all modules. With `per_module`, the parameters that this rank costs are a budget. It
    is spent on the singular values that bring the most energy for their O + I parameters, unless the same
    rank for all keeps more. `energy`: the least common rank that keeps this share of the whole; with
    `per_module`, each module's least rank that keeps this share of it.

    The budget never keeps less energy than the same rank for all. It falls short of the most that it could
    keep by at most the energy of the first value that did not fit: filling a budget to the last parameter
    is a knapsack problem. Where all modules cost the same, it keeps the most.
    """
    largest = max((float(S.max()) for S in spectra.values()), default=0.0) or 1.0
    spectra = {m: S / largest for m, S in spectra.items()}  # so that squares do not underflow
    if energy is not None and per_module:
        return {m: max(rank_at(S, energy), 1) for m, S in spectra.items()}
    if energy is not None:
        squares = [np.pad(S * S, (0, max(map(len, spectra.values())) - len(S))) for S in spectra.values()]
        total = np.sqrt(np.sum(squares, 0))
        rank = max(rank_at(total, energy), 1)
    common = {m: min(rank or 1, len(S)) for m, S in spectra.items()}
    if not per_module:
        return common
    budget = (rank or 1) * sum(costs.values())
    worth = [(S[i] ** 2 / costs[m], m) for m, S in spectra.items() for i in range(1, len(S)) if S[i] > 0]
    chosen = dict.fromkeys(spectra, 1)
    spent = sum(costs.values())
    for _, module in sorted(worth, key=lambda item: -item[0]):  # values fall within a module, so in order
        if spent + costs[module] <= budget:
            chosen[module] += 1
            spent += costs[module]
    # once a wide module's value no longer fits, narrow modules get the rest, which may keep less
    return max(chosen, common, key=lambda ks: math.fsum(sum(S[: ks[m]] ** 2) for m, S in spectra.items()))


# ---- one adapter, smaller


def compress(
    adapter: Path | str,
    out: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    per_module: bool = False,
    overwrite: bool = False,
) -> Compression:
    """Write the best approximation of an adapter at smaller rank; `choose` explains the ranks.

    Biases, saved modules and DoRA's magnitudes are copied, under PEFT's names; tensors that no LoRA has are
    left out and noted. ConfigError for the ranks, and whatever opening and writing raise.
    """
    check_choice(rank, energy)
    given = open_adapter(adapter)
    refuse_same(out, given.where)
    check_free(out, overwrite)
    config, omitted = corrected(given)
    parts = {}
    for module, pair in given.pairs.items():
        A, B = given.factors(module, np.float32)
        parts[module] = (A, B, *map(to_host, thin_svd(to_device(B), to_device(A), pair.scale)))
    costs = {m: sum(pair.shape) for m, pair in given.pairs.items()}
    chosen = choose({m: S for m, (*_, S, _) in parts.items()}, costs, rank, energy, per_module)
    omitted |= {name for pair in given.pairs.values() for name in (pair.A, pair.B)}
    tensors = {name: given.value(name) for name in given.tensors if name not in omitted}
    rows = []
    for module, (A, B, U, S, Vt) in parts.items():
        pair, k = given.pairs[module], chosen[module]
        Bk, Ak = (half.astype(np.float32) for half in split(U, S, Vt, k))
        old = Factors(to_device(B), to_device(A), pair.scale)
        lost = size([(1.0, old), (-1.0, Factors(to_device(Bk), to_device(Ak), 1.0))])
        rows.append(shrunk(module, pair.shape, pair.r, S, k, lost))
        inner, outer = (given.tensors.shapes[name] for name in (pair.A, pair.B))  # a convolution's: > 2 axes
        tensors[pair.A], tensors[pair.B] = Ak.reshape(k, *inner[1:]), Bk.reshape(-1, k, *outer[2:])
        if (bias := f"{PREFIX}{module}.lora_B.bias") in tensors:  # the scale multiplies it, and is 1 now
            tensors[bias] = tensors[bias] * pair.scale
    sizes = peft_config({m: (k, k) for m, k in chosen.items()}, ())
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
        config[name] = sizes[name]
    write_adapter(out, config, tensors, given.made.get("base"), overwrite=overwrite)
    before = sum(pair.r * sum(pair.shape) for pair in given.pairs.values())
    smaller = sum(k * costs[m] for m, k in chosen.items())
    return Compression(str(out), tuple(rows), smaller, before, {}, given.all_notes)


def corrected(given: Adapter) -> tuple[dict[str, Any], set[str]]:
    """The config of an adapter, corrected to match its file, and the tensors that no config can describe.

    MismatchError if only some modules have magnitudes: PEFT has no form for that.
    """
    settings = given.settings
    config = dict(settings.fields)
    for kind in KINDS:
        states = {kind.vector in pair.vectors for pair in given.pairs.values()}
        if len(states) > 1:
            raise MismatchError(f"{given.where}: some modules have a {kind.vector} and others do not")
        if (kind.flag in settings.flags) not in states:
            config[kind.flag] = kind.flag not in settings.flags
    entries = settings.modules_to_save
    there = [entry for entry in entries if any(saves(entry, name) for name in given.replaced)]
    _, others = unlisted(given)
    more = {name.removesuffix(".weight") for name in others if name.endswith(".weight")} - given.pairs.keys()
    if there != list(entries) or more:
        config["modules_to_save"] = [*there, *sorted(more)] or None
    omitted = {given.replaced[name] for name in others if name.rpartition(".")[0] not in more}
    omitted |= set(unmentioned(given))
    if settings.bias == "none":
        omitted |= {pair.bias for pair in given.pairs.values() if pair.bias}
    kept = {parameter: key for parameter, key in given.replaced.items() if key not in omitted}
    if isinstance(settings.target_modules, str) or list(about_targets(replace(given, replaced=kept))):
        config |= {"target_modules": sorted(given.pairs), "exclude_modules": None}
        config |= {"layers_to_transform": None, "layers_pattern": None}
    return config, omitted


def refuse_same(out: Path | str, *sources: Path) -> None:
    """InputError if the output is an input, inside it or around it."""
    out = Path(out).resolve()
    if any(out == s or s in out.parents or out in s.parents for s in (path.resolve() for path in sources)):
        raise InputError(f"{out}: is the input, lies in it or contains it; expected another folder")
