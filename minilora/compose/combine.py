"""Several adapters -> one: their weighted sum, or what another method makes of them, module by module.

    minilora combine A:0.7 B:0.3 OUT --method svd --rank 16

Over PEFT folders (`combine`) and over the adapters in a model (`add_weighted_adapter`, PEFT's name). The
methods are the functions of arithmetic.py and sparsify.py. The order of the adapters changes no more than
roundings. A module that an adapter does not have counts as a change of 0. DoRA's magnitudes, biases and
modules saved in full are no ΔW = s B A: an adapter with one of them is refused. Stands in for PEFT's
add_weighted_adapter; leaves out its methods that prune A and B apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import Parameter, signature
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import to_device, to_host
from ..errors import InputError, MiniloraError, MismatchError, UnsupportedError, nearest, short
from ..formats.atomic import check_free, refuse_same
from ..layers import Factors, Param
from ..lora import LowRank, adapted, attach, check_name
from ..lora_files.contents import inherited
from ..methods.embedding import LowRankEmbedding
from ..model import Llama
from ..peft.config import peft_config
from ..peft.folder import Adapter, check_agreement, open_adapter, write_adapter
from ..spectra import quotient
from ..table import Table, counted, report
from .arithmetic import (
    Combined,
    Update,
    cat,
    check_rank,
    check_weights,
    kohya_linear,
    linear,
    peft_linear,
    svd,
)
from .sparsify import check_density, dare, dare_ties, magnitude, ties
from .truncate import ratio

METHODS: dict[str, Callable[..., Combined]] = {
    f.__name__: f for f in (linear, cat, svd, peft_linear, kohya_linear, magnitude, ties, dare, dare_ties)
}
SELECTORS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class Part:
    """One module of the result: its ranks, and its distance to the exact sum in Frobenius norms."""

    module: str
    shape: tuple[int, int]
    ranks: tuple[int, ...]  # of the adapters that have it
    rank: int
    norm: float  # |Σ w ΔW|
    residual: float  # |new - Σ w ΔW|
    cut: float  # what the rank leaves out of what the method gives


@report
@dataclass(frozen=True)
class Combination:
    """What `combine` or `add_weighted_adapter` made; prints as a table."""

    out: str
    weights: tuple[tuple[str, float], ...]
    method: str
    rows: tuple[Part, ...]
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """The size of the new factors."""
        return sum(row.rank * sum(row.shape) for row in self.rows)

    @property
    def relative(self) -> float:
        """The distance to the exact sum over all modules together, relative to its norm."""
        return ratio(self.rows, "residual")

    def data(self) -> dict[str, Any]:
        return asdict(self) | {"parameters": self.parameters, "relative": self.relative}

    def parts(self) -> list[str | Table]:
        rows = []
        for w in self.rows:
            lost = (f"{quotient(part, w.norm):.2e}" for part in (w.residual, w.cut))
            rows.append((w.module, f"{'+'.join(map(str, w.ranks))} -> {w.rank}", f"{w.norm:.2e}", *lost))
        terms = " ".join(f"{weight:+g} {name}" for name, weight in self.weights)
        return [
            Table(("module", "rank", "|Σ w ΔW|", "residual", "cut"), rows),
            f"{self.out}: {self.method} of {terms}",
            f"{self.parameters:,} parameters, residual {self.relative:.3e} of |Σ w ΔW|",
            *(f"note: {note}" for note in self.notes),
        ]


# ---- the methods


def check_options(method: str, rank: int | None, density: float | None, seed: int) -> None:
    """InputError unless the method is one of METHODS and takes, and has, these options."""
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"method is {short(method)}; {nearest(str(method), METHODS)}")
    takes = signature(METHODS[method]).parameters
    for name, value in (("rank", rank), ("density", density)):
        if value is not None and name not in takes:
            raise InputError(f"{name} is {short(value)}; expected none, as method {method!r} takes none")
        if value is None and name in takes and takes[name].default is Parameter.empty:
            raise InputError(f"{name} is missing; method {method!r} needs one")
    if rank is not None:
        check_rank(rank)
    if density is not None:
        check_density(density)
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise InputError(f"seed is {short(seed)}; expected an int, at least 0")


def results(
    updates: Mapping[str, Sequence[Update]],
    method: str,
    rank: int | None,
    density: float | None,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Factors, Part]]:
    """The new factors and the row of every module, by name, so that no other order decides what is drawn."""
    make, rng = METHODS[method], np.random.default_rng(seed)
    takes = signature(make).parameters
    shapes = {m: (change.B.shape[0], change.A.shape[1]) for m, ((_, change), *_) in updates.items()}
    ranks = {m: tuple(len(change.A) for _, change in weighted) for m, weighted in updates.items()}
    most = {m: min(shapes[m]) if "density" in takes else min(*shapes[m], sum(ranks[m])) for m in updates}
    if rank is not None:
        check_rank(rank, max(most.values()))
    for i, module in enumerate(sorted(updates)):
        options = {"rank": rank and min(rank, most[module]), "density": density, "rng": rng}
        try:
            made = make(updates[module], **{name: v for name, v in options.items() if name in takes})
        except MiniloraError as e:
            raise type(e)(f"{module}: {e}") from e
        k = len(made.factors.A)
        row = Part(module, shapes[module], ranks[module], k, made.norm, made.residual, made.cut)
        if progress:
            progress(i + 1, len(updates))
        yield made.factors, row


# ---- over folders


def combine(
    adapters: Mapping[str, float] | Sequence[tuple[Path | str, float]],
    out: Path | str,
    *,
    method: str = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Combination:
    """Write the combination of weighted PEFT folders, {"A": 0.7, "B": 0.3} or such pairs, as a new one.

    `method` is one of METHODS; `rank` is that of the result, lower where a module cannot have it; `density`
    and `seed` are for the methods that drop entries. The rows compare what was written with the exact sum.
    InputError for the adapters, weights or options; MismatchError for adapters of different bases or shapes;
    UnsupportedError for what has no sum; and whatever opening and writing raise.
    """
    given = pairs_of(adapters)
    check_weights([weight for _, weight in given])
    check_options(method, rank, density, seed)
    folders = [open_adapter(folder) for folder, _ in given]
    places = [os.path.realpath(folder.where) for folder in folders]
    if again := [str(folder.where) for i, folder in enumerate(folders) if places[i] in places[:i]]:
        what = "is given twice; expected each adapter once, with the sum of its weights"
        raise InputError(f"{again[0]}: {what}")
    for folder in folders:
        check_summable(folder)
    refuse_same(out, *(folder.where for folder in folders))
    check_free(out, overwrite)
    summed = [(folder, weight) for folder, (_, weight) in zip(folders, given, strict=True) if weight]
    base = check_together([folder for folder, _ in summed])
    updates: dict[str, list[Update]] = {}
    for folder, weight in summed:
        for module, pair in folder.pairs.items():
            A, B = folder.factors(module)
            updates.setdefault(module, []).append((weight, Factors(to_device(B), to_device(A), pair.scale)))
    like = {m: folder for folder, _ in summed for m in folder.pairs}  # any: all have the same names and form
    tensors, rows, sizes = {}, [], {}
    for new, row in results(updates, method, rank, density, seed, progress):
        folder = like[row.module]
        pair, shapes = folder.pairs[row.module], folder.tensors.shapes
        inner, outer = shapes[pair.A][1:], shapes[pair.B][2:]  # a convolution's have more axes
        tensors[pair.A] = to_host(new.A).reshape(row.rank, *inner)
        tensors[pair.B] = to_host(new.B).reshape(-1, row.rank, *outer)
        sizes[row.module] = row.rank, row.rank
        rows.append(row)
    config = peft_config(sizes, list(sizes)) | shared([folder for folder, _ in summed])
    wide = any(a.dtype == np.float64 for a in tensors.values())
    header = strings([folder for folder, _ in summed], list(sizes.values()))
    write_adapter(out, config, tensors, base, "float64" if wide else "float32", overwrite, header)
    notes = tuple(
        f"{folder.where}: {note}" for folder, _ in summed for note in notes_on(folder, lost=base is None)
    )
    weights = tuple((str(folder), float(weight)) for folder, weight in given)
    return Combination(str(out), weights, method, tuple(rows), notes)


def pairs_of(adapters: Any) -> list[tuple[Path | str, float]]:
    """The weighted folders as pairs; InputError for anything else."""
    given = adapters.items() if isinstance(adapters, Mapping) else adapters
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise InputError(f"the adapters are {short(given)}; expected their weights, such as {{'A': 0.7}}")
    pairs = list(given)
    for pair in pairs:
        right = isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str | os.PathLike)
        if not right:
            raise InputError(f"an adapter is given as {short(pair)}; expected a pair, such as ('A', 0.7)")
    return pairs


def check_summable(given: Adapter) -> None:
    """UnsupportedError for whatever the adapter has besides s B A; and as `check_agreement`."""
    check_agreement(given)
    for module, pair in given.pairs.items():
        for tensor in (*pair.vectors.values(), pair.bias):
            if tensor:
                what = f"acts beside the ΔW of {module}; only s B A can be summed"
                raise UnsupportedError(f"{given.where}: {tensor} {what}")
    for parameter, tensor in given.replaced.items():
        what = f"replaces {parameter}; only s B A can be summed"
        raise UnsupportedError(f"{given.where}: {tensor} {what}")


def check_together(folders: Sequence[Adapter]) -> str | None:
    """The fingerprints of the bases that all adapters fit; None if one adapter has none.

    MismatchError if two adapters are of different bases, shapes or layouts.
    """
    first, marked = folders[0], [folder for folder in folders if "base" in folder.made]
    common = marked[0].made["base"].split() if marked else []  # two, if it was trained beside 4 bits
    for folder in marked:
        common = [base for base in common if base in folder.made["base"].split()]
        if not common:
            where = f"{folder.where}: was trained on another base than {marked[0].where}"
            raise MismatchError(f"{where}: fingerprints differ")
    seen: dict[str, tuple[Adapter, tuple[Any, ...]]] = {}
    for folder in folders:
        if folder.settings.fan_in_fan_out != first.settings.fan_in_fan_out:
            what = f"fan_in_fan_out is {folder.settings.fan_in_fan_out}"
            raise MismatchError(f"{folder.where}: {what}; expected the same as in {first.where}")
        shapes = folder.tensors.shapes
        for module, pair in folder.pairs.items():
            form = pair.embedding, pair.shape, shapes[pair.A][1:]
            other, expected = seen.setdefault(module, (folder, form))
            if form != expected:
                what = f"has a ΔW of {form_words(*form)}; expected {form_words(*expected)}"
                raise MismatchError(f"{folder.where}: {module} {what}, as {other.where} has")
    return " ".join(common) if len(marked) == len(folders) else None


def notes_on(folder: Adapter, lost: bool) -> Iterator[str]:
    """Notes on an adapter: what is unusual in it, and what the sum leaves out."""
    yield from folder.notes
    if lost and "base" in folder.made:
        yield "the fingerprint of its base left out, as not all adapters have one"
    if copies := [pair.copy for pair in folder.pairs.values() if pair.copy]:
        yield f"{counted(len(copies), 'copy', 'copies')} of the base's weights left out, as {copies[0]}"


def form_words(embedding: bool, shape: tuple[int, int], window: tuple[int, ...]) -> str:
    """What kind of map a module's factors are for, in words."""
    kind = "an embedding" if embedding else "a convolution" if len(window) > 1 else "a linear map"
    return f"{kind}, {' x '.join(map(str, shape))}"


def shared(folders: Sequence[Adapter]) -> dict[str, Any]:
    """The fields on which all configs agree; and the first one's selectors, if all have the same modules."""
    configs = [folder.settings.fields for folder in folders]
    first = configs[0]
    alike = all(folder.pairs.keys() == folders[0].pairs.keys() for folder in folders)
    fields = {name: first.get(name) for name in SELECTORS} if alike else {}
    for name in ("base_model_name_or_path", "task_type"):
        if all(config.get(name) == first.get(name) for config in configs):
            fields[name] = first.get(name)
    return fields | {"fan_in_fan_out": folders[0].settings.fan_in_fan_out}


def strings(folders: Sequence[Adapter], sizes: Sequence[tuple[int, int]]) -> dict[str, str]:
    """The strings of the headers on which all agree, as far as they are true of the new r and alpha."""
    headers = [folder.tensors.metadata for folder in folders]
    alike = {k: text for k, text in headers[0].items() if all(other.get(k) == text for other in headers)}
    return inherited(alike, [(pair.r, pair.alpha) for f in folders for pair in f.pairs.values()], sizes)


# ---- in a model


def add_weighted_adapter(
    model: Llama,
    adapters: Mapping[str, float],
    name: str,
    *,
    method: str = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> Combination:
    """Add the combination of a model's adapters, {"a": 0.7, "b": 0.3}, as a new, active adapter.

    The options are those of `combine`. An error leaves the model as it was: InputError for the adapters,
    weights, options or a name in use, UnsupportedError for an adapter other than LoRA, StateError for a
    merged model.
    """
    check_weights([weight for _, weight in pairs_of(adapters)])
    check_options(method, rank, density, seed)
    layers = adapted(model)
    names = {n for layer in layers.values() for n in layer.adapters}
    for adapter in adapters:
        if adapter not in names:
            raise InputError(f"there is no adapter {short(adapter)}; {nearest(str(adapter), names)}")
    check_name(model, name)
    updates: dict[str, list[Update]] = {}
    kinds: dict[str, type] = {}
    for path, layer in layers.items():
        for adapter, weight in adapters.items():
            one: Any = layer.adapters.get(adapter)
            if one is None:
                continue
            if type(one) not in (LowRank, LowRankEmbedding):
                what = f"{adapter} is {type(one).__name__} at {path}"
                raise UnsupportedError(f"{what}; only LoRA's s B A can be summed")
            if weight:
                kinds[path] = type(one)
                updates.setdefault(path, []).append((weight, one.change(layer.base)))
    new, rows = {}, []
    for factors, row in results(updates, method, rank, density, seed):
        new[row.module] = kinds[row.module](Param(factors.A), Param(factors.B), 1.0)
        rows.append(row)
    attach(model, new, name)
    return Combination(name, tuple((a, float(w)) for a, w in adapters.items()), method, tuple(rows))
