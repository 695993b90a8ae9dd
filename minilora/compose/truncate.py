"""An adapter -> a smaller one: the best approximation of its ΔW at lower rank.

The best rank-k approximation of ΔW = U S Vᵀ keeps the first k singular values (Eckart and Young 1936):

    |ΔW - ΔW_k|² = sum of s_i² beyond k (Frobenius)        |ΔW - ΔW_k|_2 = s_{k+1}

An adapter's ΔW is never formed: QR of B and Aᵀ and the SVD of an r x r core give U, S and V (spectra.py).
Modules are cut one by one; only where a rank depends on the others are all spectra computed before.
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

from ..backend import on_cores, to_device, to_host
from ..errors import MismatchError, UnsupportedError
from ..formats.atomic import check_free, refuse_same
from ..formats.huggingface import heads_in
from ..layers import Factors
from ..lora_files.contents import inherited
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
from ..spectra import norm, quotient, thin_svd, thin_values
from ..table import Table, counted, report
from .arithmetic import distance, split
from .ranks import check_resize, choose, dynamic_rank


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
    base: Path | str | None = None,
    alpha: float | None = None,
    r: int | None = None,
    overwrite: bool = False,
) -> Compression:
    """Write the best approximation of an adapter at smaller rank; `choose` explains the ranks.

    `conv_rank` takes the place of `rank` in convolutions, 1 x 1 too. `dynamic` is a rule of kohya's
    resize_lora.py with its `param`: `dynamic_rank` explains it, and `minimum`. Beside it the two ranks are
    bounds. No module gets a rank beyond that of its factors, where kohya's script can add one of rounding.

    Biases, saved modules and DoRA's magnitudes are copied, under PEFT's names; tensors that no LoRA has are
    left out and noted. Of a header the strings stay that are true of the new file. `base` tells the heads of
    llama.cpp's and torchtune's files; `alpha` and `r` are as in `open_adapter`. The number of cores changes
    no bit. Memory: the new factors, and those of one module per core. ConfigError for the ranks, and whatever
    opening and writing raise.
    """
    check_resize(rank, energy, per_module, conv_rank, dynamic, param, minimum)
    heads = None if base is None else heads_in(base)
    given = open_adapter(adapter, alpha=alpha, r=r, heads=heads)
    if given.unread:
        raise MismatchError(f"{given.where}: {given.unread[0]}; a smaller file would lack it")
    if given.by_inputs:
        what = f"{given.by_inputs[0]} has a magnitude of each input"
        raise UnsupportedError(f"{given.where}: {what}, which a PEFT folder cannot hold")
    refuse_same(out, given.where)
    check_free(out, overwrite)
    config, omitted = corrected(given)
    costs, notes = {m: sum(pair.shape) for m, pair in given.pairs.items()}, given.all_notes
    flat = {m for m, pair in given.pairs.items() if len(given.tensors.shapes[pair.A]) == 2}
    if conv_rank and flat == given.pairs.keys():
        notes += ("no module is a convolution, so conv_rank changes nothing",)

    def thin(module: str) -> Factors:
        A, B = given.factors(module, np.float32)
        return Factors(to_device(B), to_device(A), given.pairs[module].scale)

    def choice(module: str, S: np.ndarray, minimum: bool) -> int:
        most = (rank if module in flat else conv_rank or rank) or len(S)
        if dynamic and param:
            return dynamic_rank(S / given.pairs[module].scale, dynamic, param, most, minimum)
        return choose({module: S}, costs, None if energy else most, energy, per_module)[module]

    chosen: dict[str, int] = {}
    if not dynamic and (energy is None) == per_module:  # a rank depends on the other modules
        spectra = on_cores(lambda module: thin_values(*thin(module)), given.pairs)
        chosen = choose(dict(zip(given.pairs, spectra, strict=True)), costs, rank, energy, per_module)

    def cut(module: str) -> tuple[Shrunk, bool, np.ndarray, np.ndarray]:
        U, S, Vt = thin_svd(*thin(module))
        values, pair = to_host(S), given.pairs[module]
        k = chosen.get(module) or choice(module, values, minimum)
        more = dynamic is not None and k > choice(module, values, True)
        B, A = (half.astype(np.float32) for half in split(U, S, Vt, k))
        row = shrunk(module, pair.shape, pair.r, values, k, distance(U, S, Vt, B, A))
        return row, more, to_host(B), to_host(A)

    omitted |= {name for pair in given.pairs.values() for name in (pair.A, pair.B)}
    tensors = {name: given.value(name) for name in given.tensors if name not in omitted}
    rows, spare = [], 0
    for row, more, B, A in on_cores(cut, given.pairs):
        pair, k = given.pairs[row.module], row.rank
        inner, outer = (given.tensors.shapes[name] for name in (pair.A, pair.B))  # a convolution's: > 2 axes
        tensors[pair.A], tensors[pair.B] = A.reshape(k, *inner[1:]), B.reshape(-1, k, *outer[2:])
        if (bias := f"{PREFIX}{row.module}.lora_B.bias") in tensors:  # the scale multiplies it, and is 1 now
            tensors[bias] = tensors[bias] * pair.scale
        rows.append(row)
        spare += more
    if spare:
        modules = f"{spare} of {counted(len(rows), 'module', 'modules')}"
        what = f"keeps one more than it needs in {modules}; `minimum` does not"
        notes += (f"{dynamic}, as in kohya's script, {what}",)
    sizes = peft_config({row.module: (row.rank, row.rank) for row in rows}, ())
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
        config[name] = sizes[name]
    header = inherited(
        given.tensors.metadata, [(pair.r, pair.alpha) for pair in given.pairs.values()],
        [(row.rank, row.rank) for row in rows],
    )  # fmt: skip
    write_adapter(out, config, tensors, given.made.get("base"), overwrite=overwrite, header=header)
    before = sum(pair.r * sum(pair.shape) for pair in given.pairs.values())
    smaller = sum(row.rank * costs[row.module] for row in rows)
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
