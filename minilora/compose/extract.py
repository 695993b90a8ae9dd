"""The LoRA nearest to the difference of two checkpoints, one matrix in memory at a time.

Stands in for mergekit's extract_lora and kohya's extract_lora_from_models.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import to_device, to_host, xp
from ..errors import InputError, MismatchError, NonFiniteError, check_float, nearest
from ..formats.atomic import check_free, refuse_same
from ..formats.huggingface import fingerprint, located, transposed, weights
from ..formats.safetensors import Tensors, stored
from ..peft.config import peft_config, targets
from ..peft.folder import PREFIX, Adapter, open_adapter, write_adapter
from ..table import counted
from ..targets import LAYER
from .arithmetic import split
from .ranks import check_choice, check_share, choose
from .truncate import Compression, shrunk

TABLES = ("lm_head", "wte", "wpe", "shared", "relative_attention_bias")  # and any name with "embed" in it


def extract(
    base: Path | str,
    tuned: Path | str,
    out: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    per_module: bool = False,
    min_diff: float = 0.0,
    clamp_quantile: float = 1.0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Compression:
    """Write the LoRA nearest to the difference of two checkpoints, one matrix in memory at a time.

    Every 2-D weight that differs becomes a module, except embeddings and heads. Those, norms and biases are
    listed with the norm of their change; so are the tensors that only one checkpoint has, without a norm.
    `choose` explains the ranks. Where a module's rank depends on the other modules, its difference is
    decomposed twice. The residuals are measured on the written file.

    `min_diff`: a map of which no entry differs by more is left out, and counted in a note. (kohya's script
    asks this of the text encoder as a whole.) `clamp_quantile`: below 1 the factors are clamped, as `clamped`
    explains; the result is no longer the nearest, and the residual beside the optimum tells what that costs.

    ConfigError for an option; MismatchError if a map has two shapes or nothing can be compared; InputError if
    one checkpoint is only the other, rounded to fewer bits, or a clamp would leave nothing.
    """
    check_choice(rank, energy)
    check_float("min_diff", min_diff, 0, math.inf)
    check_share("clamp_quantile", clamp_quantile)
    refuse_same(out, located(base), located(tuned))
    check_free(out, overwrite)
    before, after = weights(base), weights(tuned)
    names, notes = comparable(before, after)
    notes = [*dict.fromkeys((*before.notes, *after.notes)), *notes]
    maps = {name.removesuffix(".weight"): name for name in names if is_map(name, before.shapes[name])}
    turned = {module: bool(transposed(before.shapes, module)) for module in maps}
    alone = (energy is not None) == per_module  # a module's rank does not depend on the others
    left: dict[str, float] = {}
    parts: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}  # U and Vᵀ as far as needed, S whole
    rounded = Counter[str]()
    small: list[float] = []  # |change| of maps that differ by too little
    for i, name in enumerate(names):
        change, kind = difference(before, after, name)
        module = name.removesuffix(".weight")
        if kind:
            rounded[kind] += 1
        elif module in maps and abs(change).max(initial=0) > min_diff:
            U, S, Vt = decomposed(change.T if turned[module] else change)
            k = choose({module: S}, {module: 1}, rank, energy, per_module)[module] if alone else 0
            parts[module] = (U[:, :k].copy(), S, Vt[:k].copy())
        elif change.any() and module in maps:
            small.append(float(np.linalg.norm(change)))
        elif change.any():
            left[name] = float(np.linalg.norm(change))
        if progress:
            progress(i + 1, len(names))
    fewer = ", ".join(
        f"{counted(n, 'tensor differs', 'tensors differ')} only by rounding to {kind}"
        for kind, n in rounded.items()
    )
    if fewer and not parts:
        raise InputError(f"{base} and {tuned}: {fewer}; there is nothing else to extract")
    if not parts:
        more = f" by more than {min_diff:g}" if min_diff else ""
        raise MismatchError(f"{base} and {tuned}: no linear map differs{more}; there is nothing to extract")
    if fewer:
        notes.append(f"left out: {fewer}")
    if small:
        few = counted(len(small), "map differs", "maps differ")
        notes.append(
            f"left out: {few} by {min_diff:g} at most in each entry, |change| {math.hypot(*small):.3g}"
        )
    flag = any(turned[module] for module in parts)
    if others := [module for module in parts if turned[module] != flag]:
        left |= {maps[module]: float(np.linalg.norm(parts.pop(module)[1])) for module in others}
        notes.append(f"{others[0]} is not a Conv1D and left out: fan_in_fan_out is for all modules or none")
    spectra = {m: S for m, (_, S, _) in parts.items()}
    costs = {m: sum(before.shapes[f"{m}.weight"]) for m in parts}
    chosen = choose(spectra, costs, rank, energy, per_module)
    tensors: dict[str, np.ndarray] = {}
    for module, (U, S, Vt) in parts.items():
        k = chosen[module]
        if U.shape[1] < k:
            change, _ = difference(before, after, f"{module}.weight")
            U, S, Vt = decomposed(change.T if flag else change)
        B, A = split(U, S, Vt, k)
        if clamp_quantile < 1:
            B, A = clamped(*upright(U[:, :k] * S[:k], Vt[:k]), clamp_quantile, module)
        for half, factor in (("A", A), ("B", B)):
            tensors[f"{PREFIX}{module}.lora_{half}.weight"] = factor.astype(np.float32)
    if clamp_quantile < 1:
        notes.append(
            f"the factors are clamped at their {clamp_quantile:g} quantile, so more than the optimum is lost"
        )
    modules = [name.removesuffix(".weight") for name in before.shapes]
    config = peft_config({m: (k, k) for m, k in chosen.items()}, targets(modules, set(parts)))
    config |= {"base_model_name_or_path": str(base), "fan_in_fan_out": flag}
    write_adapter(out, config, tensors, fingerprint(before), overwrite=overwrite)
    written, rows = open_adapter(out), []
    for module, S in spectra.items():
        change, _ = difference(before, after, f"{module}.weight")
        lost = float(np.linalg.norm(change - applied(written, module)))
        rows.append(shrunk(module, written.pairs[module].shape, None, S, chosen[module], lost))
    spent = sum(k * costs[m] for m, k in chosen.items())
    return Compression(str(out), tuple(rows), spent, None, left, tuple(notes))


def clamped(B: np.ndarray, A: np.ndarray, quantile: float, module: str) -> tuple[np.ndarray, np.ndarray]:
    """B (O, k) and A (k, I) clamped to plus and minus the quantile of all their entries, signs and all.

    As in kohya's extract_lora_from_models.py, where B = U S and A = Vᵀ. Their product is no longer the
    nearest: not even a change of rank k is recovered. InputError if the quantile is not positive.
    """
    bound = float(np.quantile(np.concatenate([B.ravel(), A.ravel()]), quantile))
    if bound <= 0:
        raise InputError(
            f"{module}: the {quantile:g} quantile of its factors is {bound:.3g}; expected a clamp_quantile "
            "nearer 1, at which it is positive"
        )
    return B.clip(-bound, bound), A.clip(-bound, bound)


def upright(B: np.ndarray, A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """B and A with the same product, of whose i-th column and row the largest entry of all is positive.

    Signs of singular vectors come in pairs, as LAPACK likes them, and a clamp depends on them. kohya's script
    takes them as they come.
    """
    both = np.concatenate([B, A.T])
    signs = np.sign(np.take_along_axis(both, abs(both).argmax(0)[None], 0))
    return B * signs, A * signs.T


def applied(given: Adapter, module: str) -> np.ndarray:
    """ΔW of a module in float64, in the layout of its weight: (O, I), or (I, O) with fan_in_fan_out."""
    pair = given.pairs[module]
    A, B = (given.value(name).astype(np.float64) for name in (pair.A, pair.B))
    change: np.ndarray = pair.scale * (B @ A)
    return change.T if given.settings.fan_in_fan_out else change


def comparable(before: Tensors, after: Tensors) -> tuple[list[str], list[str]]:
    """The tensors in both checkpoints, and notes on those in only one or with two shapes."""
    names = [name for name in before if name in after]
    if not names:
        first = next(iter(before), "")
        raise MismatchError(f"{after.where}: has no tensor of {before.where}; {nearest(first, after)}")
    notes = []
    for own, other in ((before, after), (after, before)):
        alone = [name for name in own if name not in other]
        for name in alone:
            if LAYER.match(name) and is_map(name, own.shapes[name]):
                raise MismatchError(
                    f"{own.where}: has {name}, which {other.where} lacks; {nearest(name, other)}"
                )
        if alone:
            some = ", ".join(f"{name} {own.shapes[name]}" for name in alone[:3])
            more = f" and {len(alone) - 3} more" if alone[3:] else ""
            notes.append(f"only {own.where} has {some}{more}")
    for name in names:
        old, new = before.shapes[name], after.shapes[name]
        if old != new and is_map(name, old):
            raise MismatchError(f"{after.where}: {name} has shape {new}; the base's is {old}")
        if old != new:
            notes.append(f"{name} is {old} in the base and {new} in the other; their common part is compared")
    return names, notes


def decomposed(change: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The thin SVD of a difference: U, S and Vᵀ."""
    U, S, Vt = xp.linalg.svd(to_device(change), full_matrices=False)
    return to_host(U), to_host(S), to_host(Vt)


def is_map(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is the weight of a linear map between hidden states."""
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    return kind == "weight" and len(shape) == 2 and "embed" not in last and last not in TABLES


def difference(before: Tensors, after: Tensors, name: str) -> tuple[np.ndarray, str]:
    """tuned - base of one parameter in float64, and the dtype if it is only rounding to it, else "".

    For a table that has grown: the difference of the rows that both have.
    """
    one, two = before[name], after[name]
    if one.ndim != two.ndim:  # there is nothing to compare
        return np.zeros(0), ""
    both = tuple(slice(min(sizes)) for sizes in zip(one.shape, two.shape, strict=True))
    one, two = one[both], two[both]
    with np.errstate(invalid="ignore"):
        change = two.astype(np.float64) - one
    if not np.linalg.norm(change) <= float(np.finfo(np.float32).max):
        raise NonFiniteError(f"{after.where}: {name} minus the base's is not finite in float32")
    return change, rounding(one, two) if change.any() else ""


def rounding(one: np.ndarray, two: np.ndarray) -> str:
    """The dtype such that rounding one of two arrays to it gives the other; "" if there is none."""
    for kind in ("float32", "bfloat16", "float16"):
        for wide, narrow in ((one, two), (two, one)):
            first = slice(1000)  # these decide nearly every case
            same = np.array_equal(stored(wide.flat[first], kind), narrow.flat[first])
            if same and np.array_equal(stored(wide, kind), narrow):
                return kind
    return ""
