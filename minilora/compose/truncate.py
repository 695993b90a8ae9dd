"""Adapters -> adapter: a smaller one of the same ΔW, or one from the difference of two checkpoints.

The best approximation of rank k of ΔW = U S Vᵀ keeps the first k singular values (Eckart and Young 1936):

    |ΔW - ΔW_k|² = sum of s_i² beyond k (Frobenius)        |ΔW - ΔW_k|_2 = s_{k+1}

An adapter's ΔW is never formed: QR of B and Aᵀ and the SVD of an r x r core give U, S and V (spectra.py).
What is written is B = U sqrt(S), A = sqrt(S) Vᵀ with scale 1, and read again to state the residual that it
really has. Stands in for mergekit's extraction and PEFT's rank reduction; combining several adapters is not
here yet.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import to_device, to_host, xp
from ..errors import ConfigError, InputError, MismatchError, NonFiniteError, check_float, check_int, nearest
from ..formats.atomic import check_free
from ..formats.huggingface import fingerprint, located, transposed, weights
from ..formats.safetensors import Tensors, stored
from ..lora import LAYER
from ..peft.config import peft_config, read_fields, targets
from ..peft.folder import (
    PREFIX,
    Adapter,
    about_targets,
    change_norm,
    is_table,
    open_adapter,
    saves,
    unlisted,
    unsaid,
    write_adapter,
)
from ..peft.recognise import CONFIG
from ..spectra import norm, quotient, rank_at, thin_svd, thin_values
from ..table import aligned, counted, printed

TABLES = ("lm_head", "wte", "wpe", "shared", "relative_attention_bias")  # beside what is called embed...
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Shrunk:
    """One module: its rank before and after, |ΔW|, and what is lost beside the least that must be."""

    module: str
    shape: tuple[int, int]
    r: int | None  # None where ΔW is the difference of two checkpoints
    rank: int
    norm: float  # |ΔW|, Frobenius
    residual: float  # |ΔW - ΔW_k| of what was written
    optimum: float  # Eckart and Young's: the root of the sum of s_i² beyond the rank
    spectral: float  # the largest singular value left out, their optimum in the spectral norm


@dataclass(frozen=True)
class Compression:
    """What `compress` or `extract` wrote; prints as a table."""

    out: str
    rows: tuple[Shrunk, ...]
    parameters: int
    before: int | None  # parameters of the adapter that was compressed
    left: Mapping[str, float]  # what no LoRA on linear maps holds: parameter -> |change|
    notes: tuple[str, ...] = ()  # what else was left aside

    @property
    def residual(self) -> float:
        """What is lost over all modules together, relative to |ΔW|."""
        return ratio(self.rows, "residual")

    @property
    def optimum(self) -> float:
        """The least that must be lost with these ranks, relative to |ΔW|."""
        return ratio(self.rows, "optimum")

    def data(self) -> dict[str, Any]:
        """The same as JSON holds it."""
        return asdict(self) | {"residual": self.residual, "optimum": self.optimum}

    def __str__(self) -> str:
        rows = []
        for w in self.rows:
            rank = f"{w.r} -> {w.rank}" if w.r else str(w.rank)
            lost = (part / w.norm if w.norm else 0.0 for part in (w.residual, w.optimum))
            rows.append((w.module, rank, *(f"{x:.2e}" for x in (w.norm, *lost))))
        of = f" of {self.before:,}" if self.before else ""
        lines = [
            *aligned([("module", "rank", "|ΔW|", "residual", "optimum"), *rows]),
            f"{self.out}: {self.parameters:,}{of} parameters, residual {self.residual:.3e} of |ΔW|, "
            f"Eckart-Young optimum {self.optimum:.3e}",
        ]
        if self.left:
            lines.append("not in it, for a LoRA on linear maps cannot hold it:")
            lines += [f"  {name}  |change| {norm:.3g}" for name, norm in self.left.items()]
        return printed(*lines, *(f"note: {note}" for note in self.notes))


def ratio(rows: Sequence[Shrunk], part: str) -> float:
    """The root of the sum of squares of a part, relative to that of |ΔW|."""
    lost, whole = (math.hypot(*(getattr(row, name) for row in rows)) for name in (part, "norm"))
    return quotient(lost, whole)


def split(U: np.ndarray, S: np.ndarray, Vt: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """A (k, I) and B (O, k) in float32 with B A the first k terms of U S Vᵀ."""
    root = np.sqrt(S[:k])
    return (root[:, None] * Vt[:k]).astype(np.float32), (U[:, :k] * root).astype(np.float32)


def left_over(B: np.ndarray, A: np.ndarray, s: float, Bk: np.ndarray, Ak: np.ndarray) -> float:
    """|s B A - Bk Ak|, Frobenius, from the thin factors of the difference: [s B, -Bk] [A; Ak]."""
    both = np.hstack([s * B.astype(np.float64), -Bk.astype(np.float64)])
    return norm(thin_values(to_device(both), to_device(np.vstack([A, Ak]))))


def tail(S: np.ndarray, k: int) -> float:
    """The root of the sum of s_i² beyond k."""
    return norm(S[k:])


# ---- which ranks


def check_choice(rank: int | None, energy: float | None) -> None:
    """ConfigError unless one of the two is given, and has a meaning."""
    if (rank is None) == (energy is None):
        raise ConfigError("rank and energy are two ways to choose; expected exactly one of them")
    if rank is not None:
        check_int("rank", rank, 1)
    elif not check_float("energy", energy, 0, 1.0000001, open_low=True) <= 1:
        raise ConfigError(f"energy is {energy}; expected a share in (0, 1]")


def choose(
    spectra: Mapping[str, np.ndarray],
    costs: Mapping[str, int],
    rank: int | None,
    energy: float | None,
    per_module: bool,
) -> dict[str, int]:
    """The rank of every module, at least 1 each.

    A rank: the same for all; per module, the budget of that rank spent where a singular value brings most
    energy for its O + I parameters, unless the same for all keeps more. An energy: the least common rank that
    keeps this share of the whole; per module, the least that keeps this share of each.

    What the budget keeps is never less than with the same rank for all, and less than the most that it could
    keep by no more than the energy of the first value that did not fit: to fill a budget to the last
    parameter is a knapsack problem. Where all modules cost the same it is the most.
    """
    check_choice(rank, energy)
    largest = max((float(S.max()) for S in spectra.values()), default=0.0) or 1.0
    spectra = {m: S / largest for m, S in spectra.items()}  # whose squares are no less than they should be
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
    for _, module in sorted(worth, key=lambda item: -item[0]):  # falling within each module, so in order
        if spent + costs[module] <= budget:
            chosen[module] += 1
            spent += costs[module]
    # where a wide module's value did not fit any more, what is left is spent on narrow ones: it may be less
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
    """Write the best approximation of an adapter of smaller rank; see `choose` for the ranks.

    What is no low-rank pair (biases, saved modules, DoRA's magnitudes) is copied, under PEFT's names; what
    is none of a LoRA's is left aside and told. ConfigError, and what opening and writing raise.
    """
    check_choice(rank, energy)
    given = open_adapter(adapter)
    refuse_same(given.where, out)
    check_free(out, overwrite)
    config, left_aside = told(given)
    found = {}
    for module, pair in given.pairs.items():
        A, B = given.factors(module)
        if change_norm(A, B, pair.scale) > LARGEST:
            raise NonFiniteError(
                f"{given.where}: the ΔW of {module} is not finite: its factors are too large"
            )
        found[module] = (A, B, *map(to_host, thin_svd(to_device(B), to_device(A), pair.scale)))
    spectra = {m: parts[3] for m, parts in found.items()}
    costs = {m: sum(given.pairs[m].shape) for m in found}
    chosen = choose(spectra, costs, rank, energy, per_module)
    factors = {name for pair in given.pairs.values() for name in (pair.A, pair.B)}
    tensors = {
        name: given.value(name) for name in given.tensors if name not in factors and name not in left_aside
    }
    rows = []
    for module, (A, B, U, S, Vt) in found.items():
        pair, k = given.pairs[module], chosen[module]
        Ak, Bk = split(U, S, Vt, k)
        lost = left_over(B, A, pair.scale, Bk, Ak)
        inner, outer = (
            given.tensors.shapes[name] for name in (pair.A, pair.B)
        )  # of a convolution, with more
        tensors[pair.A], tensors[pair.B] = Ak.reshape(k, *inner[1:]), Bk.reshape(-1, k, *outer[2:])
        spectral = float(S[k]) if k < len(S) else 0.0
        rows.append(Shrunk(module, pair.shape, pair.r, k, norm(S), lost, tail(S, k), spectral))
        if (
            bias := f"{PREFIX}{module}.lora_B.bias"
        ) in tensors:  # which the scale multiplies, and that is 1 now
            tensors[bias] = tensors[bias] * pair.scale
    sizes = peft_config({m: (k, k) for m, k in chosen.items()}, ())
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"):
        config[name] = sizes[name]
    write_adapter(out, config, tensors, given.made.get("base"), overwrite=overwrite)
    before = sum(pair.r * sum(pair.shape) for pair in given.pairs.values())
    smaller = sum(k * costs[m] for m, k in chosen.items())
    return Compression(str(out), tuple(rows), smaller, before, {}, given.said)


def told(given: Adapter) -> tuple[dict[str, Any], set[str]]:
    """The config of an adapter, true of its file, and the tensors that no config can mean.

    MismatchError where only some of the modules have magnitudes, which PEFT has no form for.
    """
    config, settings = read_fields(given.where / CONFIG), given.settings
    doras = {bool(pair.magnitude) for pair in given.pairs.values()}
    if len(doras) > 1:
        raise MismatchError(f"{given.where}: some modules have a lora_magnitude_vector and others not")
    if settings.use_dora not in doras:
        config["use_dora"] = not settings.use_dora
    entries = settings.modules_to_save
    there = [entry for entry in entries if any(saves(entry, name) for name in given.replaced)]
    others = [name for name in unlisted(given) if not is_table(name)]
    more = {name.removesuffix(".weight") for name in others if name.endswith(".weight")} - given.pairs.keys()
    if there != list(entries) or more:
        config["modules_to_save"] = [*there, *sorted(more)] or None
    left_aside = {given.replaced[name] for name in others if name.rpartition(".")[0] not in more}
    left_aside |= set(unsaid(given))
    if settings.bias == "none":
        left_aside |= {pair.bias for pair in given.pairs.values() if pair.bias}
    kept = {parameter: key for parameter, key in given.replaced.items() if key not in left_aside}
    if isinstance(settings.target_modules, str) or list(about_targets(replace(given, replaced=kept))):
        config |= {"target_modules": sorted(given.pairs), "exclude_modules": None}
        config |= {"layers_to_transform": None, "layers_pattern": None}
    return config, left_aside


def refuse_same(source: Path, out: Path | str) -> None:
    """InputError if the output is the input, inside it or around it."""
    out, source = Path(out).resolve(), Path(source).resolve()
    if out == source or source in out.parents or out in source.parents:
        raise InputError(f"{out}: is the input, inside it or around it; expected another folder")


# ---- two checkpoints


def extract(
    base: Path | str,
    tuned: Path | str,
    out: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    per_module: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Compression:
    """Write the LoRA nearest to the difference of two checkpoints, one matrix in memory at a time.

    Every 2-D weight that differs is a module, but for embeddings and heads; those, norms and biases are
    listed with the norm of their change, and what only one of the two has is listed, too. See `choose` for
    the ranks; where a module's follows from those of the others, its difference is decomposed twice. The
    residuals are those of the file, read again. MismatchError if a map has two shapes or nothing can be
    compared, InputError if one checkpoint is but the other in fewer bits.
    """
    check_choice(rank, energy)
    for source in (base, tuned):
        refuse_same(located(source), out)
    check_free(out, overwrite)
    before, after = weights(base), weights(tuned)
    names, notes = comparable(before, after)
    notes = [*dict.fromkeys((*before.notes, *after.notes)), *notes]
    maps = {name.removesuffix(".weight"): name for name in names if is_map(name, before.shapes[name])}
    turned = {module: bool(transposed(before.shapes, module)) for module in maps}
    left: dict[str, float] = {}
    found: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    rounded = Counter[str]()
    for i, name in enumerate(names):
        change, kind = difference(before, after, name)
        module = name.removesuffix(".weight")
        if kind:
            rounded[kind] += 1
        elif change.any() and module in maps:
            U, S, Vt = decomposed(change.T if turned[module] else change)
            k = known(S, rank, energy, per_module)
            found[module] = (U[:, :k].copy(), S, Vt[:k].copy())
        elif change.any():
            left[name] = float(np.linalg.norm(change))
        if progress:
            progress(i + 1, len(names))
    fewer = ", ".join(
        f"{counted(n, 'tensor differs', 'tensors differ')} by nothing but rounding to {kind}"
        for kind, n in rounded.items()
    )
    if not found:
        if fewer:
            raise InputError(f"{base} and {tuned}: {fewer}; there is nothing else to extract")
        raise MismatchError(f"{base} and {tuned}: no linear map differs; there is nothing to extract")
    if fewer:
        notes.append(f"{fewer} and are left out")
    flag = any(turned[module] for module in found)
    if others := [module for module in found if turned[module] != flag]:
        left |= {maps[module]: float(np.linalg.norm(found.pop(module)[1])) for module in others}
        notes.append(f"{others[0]} is no Conv1D and left out: fan_in_fan_out is for all modules or none")
    spectra = {m: S for m, (_, S, _) in found.items()}
    costs = {m: sum(before.shapes[f"{m}.weight"]) for m in found}
    chosen = choose(spectra, costs, rank, energy, per_module)
    tensors: dict[str, np.ndarray] = {}
    for module, (U, S, Vt) in found.items():
        k = chosen[module]
        if U.shape[1] < k:
            change, _ = difference(before, after, f"{module}.weight")
            U, S, Vt = decomposed(change.T if flag else change)
        A, B = split(U, S, Vt, k)
        at = f"{PREFIX}{module}.lora_"
        tensors |= {f"{at}A.weight": A, f"{at}B.weight": B}
    modules = [name.removesuffix(".weight") for name in before.shapes]
    config = peft_config({m: (k, k) for m, k in chosen.items()}, targets(modules, set(found)))
    config |= {"base_model_name_or_path": str(base), "fan_in_fan_out": flag}
    write_adapter(out, config, tensors, fingerprint(before), overwrite=overwrite)
    written, rows = open_adapter(out), []
    for module, S in spectra.items():
        k, shape = chosen[module], written.pairs[module].shape
        change, _ = difference(before, after, f"{module}.weight")
        lost = float(np.linalg.norm(change - applied(written, module)))
        spectral = float(S[k]) if k < len(S) else 0.0
        rows.append(Shrunk(module, shape, None, k, float(np.linalg.norm(S)), lost, tail(S, k), spectral))
    spent = sum(k * costs[m] for m, k in chosen.items())
    return Compression(str(out), tuple(rows), spent, None, left, tuple(notes))


def applied(given: Adapter, module: str) -> np.ndarray:
    """What a reader adds to a module's weight, as that lies: ΔW in float64, turned by fan_in_fan_out."""
    A, B = (factor.astype(np.float64) for factor in given.factors(module))
    change: np.ndarray = given.pairs[module].scale * (B @ A)
    return change.T if given.settings.fan_in_fan_out else change


def comparable(before: Tensors, after: Tensors) -> tuple[list[str], list[str]]:
    """The tensors that both checkpoints have, and notes on those that one has, or has of another shape."""
    names = [name for name in before if name in after]
    if not names:
        first = next(iter(before), "")
        raise MismatchError(f"{after.where}: has no tensor of {before.where}; {nearest(first, after)}")
    notes = []
    for own, other in ((before, after), (after, before)):
        alone = [name for name in own if name not in other]
        for name in alone:
            if LAYER.match(name) and is_map(name, own.shapes[name]):
                raise MismatchError(f"{own.where}: has {name}, the other has not; {nearest(name, other)}")
        if alone:
            some = ", ".join(f"{name} {own.shapes[name]}" for name in alone[:3])
            more = f" and {len(alone) - 3} more" if alone[3:] else ""
            notes.append(f"only {own.where} has {some}{more}")
    for name in names:
        old, new = before.shapes[name], after.shapes[name]
        if old != new and is_map(name, old):
            raise MismatchError(f"{after.where}: {name} has shape {new}; the base's is {old}")
        if old != new:
            notes.append(f"{name} is {old} in the base and {new} in the other; compared is what both have")
    return names, notes


def decomposed(change: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, S and Vᵀ of a difference."""
    U, S, Vt = xp.linalg.svd(to_device(change), full_matrices=False)
    return to_host(U), to_host(S), to_host(Vt)


def known(S: np.ndarray, rank: int | None, energy: float | None, per_module: bool) -> int:
    """The rank of a module by itself; 0 where it is known only from all of them."""
    if energy is None:
        return 0 if per_module else min(rank or 1, len(S))
    return max(rank_at(S, energy), 1) if per_module else 0


def is_map(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the weight of a linear map between hidden states."""
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    return kind == "weight" and len(shape) == 2 and "embed" not in last and last not in TABLES


def difference(before: Tensors, after: Tensors, name: str) -> tuple[np.ndarray, str]:
    """tuned - base of one parameter in float64, and the dtype if it is but rounding to that, else "".

    Where a table has grown, of the rows that both have.
    """
    one, two = before[name], after[name]
    if one.ndim != two.ndim:  # nothing can be compared
        return np.zeros(0), ""
    both = tuple(slice(min(sizes)) for sizes in zip(one.shape, two.shape, strict=True))
    one, two = one[both], two[both]
    with np.errstate(invalid="ignore"):
        change = two.astype(np.float64) - one
    if not np.linalg.norm(change) <= LARGEST:
        raise NonFiniteError(f"{after.where}: {name} minus the base's is not finite in float32")
    return change, rounding(one, two) if change.any() else ""


def rounding(one: np.ndarray, two: np.ndarray) -> str:
    """The dtype in which one of two arrays is but the other, written and read again; "" if in none."""
    for kind in ("float32", "bfloat16", "float16"):
        for wide, narrow in ((one, two), (two, one)):
            first = slice(1000)  # which tell in nearly every case
            same = np.array_equal(stored(wide.flat[first], kind), narrow.flat[first])
            if same and np.array_equal(stored(wide, kind), narrow):
                return kind
    return ""
