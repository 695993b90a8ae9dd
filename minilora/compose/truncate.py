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
from ..errors import MismatchError, UnsupportedError
from ..formats.atomic import check_free, refuse_same
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
from ..spectra import norm, quotient, thin_svd
from ..table import Table, report
from .arithmetic import size, split
from .ranks import by_rule, check_resize, choose


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


# ---- one adapter, smaller


def compress(
    adapter: Path | str,
    out: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    per_module: bool = False,
    conv_rank: int | None = None,
    dynamic: str | None = None,
    param: float | None = None,
    minimum: bool = False,
    overwrite: bool = False,
) -> Compression:
    """Write the best approximation of an adapter at smaller rank; `choose` explains the ranks.

    `conv_rank` takes the place of `rank` in convolutions, 1 x 1 too. `dynamic` is a rule of kohya's
    resize_lora.py with its `param`: `dynamic_rank` explains it, and `minimum`. Beside it the two ranks are
    bounds. No module gets a rank beyond that of its factors, where kohya's script can add one of rounding.

    Biases, saved modules and DoRA's magnitudes are copied, under PEFT's names; tensors that no LoRA has are
    left out and noted. ConfigError for the ranks, and whatever opening and writing raise.
    """
    check_resize(rank, energy, per_module, conv_rank, dynamic, param, minimum)
    given = open_adapter(adapter)
    if given.unread:
        raise MismatchError(f"{given.where}: {given.unread[0]}; a smaller file would lack it")
    if given.by_inputs:
        what = f"{given.by_inputs[0]} has a magnitude of each input"
        raise UnsupportedError(f"{given.where}: {what}, which a PEFT folder cannot hold")
    refuse_same(out, given.where)
    check_free(out, overwrite)
    config, omitted = corrected(given)
    parts = {}
    for module, pair in given.pairs.items():
        A, B = given.factors(module, np.float32)
        parts[module] = (A, B, *map(to_host, thin_svd(to_device(B), to_device(A), pair.scale)))
    costs = {m: sum(pair.shape) for m, pair in given.pairs.items()}
    spectra, notes = {m: S for m, (*_, S, _) in parts.items()}, given.all_notes
    caps = {m: min(rank or len(S), len(S)) for m, S in spectra.items()}
    if conv_rank:
        flat = {m for m, pair in given.pairs.items() if len(given.tensors.shapes[pair.A]) == 2}
        caps |= {m: min(conv_rank, len(S)) for m, S in spectra.items() if m not in flat}
        if flat == caps.keys():
            notes += ("no module is a convolution, so conv_rank changes nothing",)
    if dynamic and param:
        plain = {m: S / given.pairs[m].scale for m, S in spectra.items()}
        chosen, said = by_rule(plain, caps, dynamic, param, minimum)
        notes += said
    else:
        chosen = caps if conv_rank else choose(spectra, costs, rank, energy, per_module)
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
    return Compression(str(out), tuple(rows), smaller, before, {}, notes)


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
