"""An adapter -> what it really does, module by module; several adapters -> one line each.

Only factors are read, one module at a time, so any LoRA of any architecture works. The numbers (measures.py)
leave out DoRA's magnitudes, biases and saved modules; notes say so. Notes also list where config and file, or
adapter and base, disagree: looking at an adapter does not require settling that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backend import on_cores
from ..errors import MiniloraError, MismatchError, UnsupportedError, check_int, nearest
from ..formats.huggingface import heads_in, weights
from ..formats.safetensors import Tensors
from ..merging.places import Names, Place, misfit, places, weight_of
from ..peft.folder import Adapter, open_adapter
from ..peft.kinds import KINDS
from ..table import Table, counted, report
from . import tables as tabled
from .measures import ENERGY, Group, Module, group, look
from .names import order, place

if TYPE_CHECKING:
    from .plotting import Picture

WHOLE = 2048  # all singular vectors of W are computed if its smaller side is at most this
LIMIT = 40  # modules that a terminal shows
ASKED = (  # what a page answers
    "What was asked: which rank does this adapter really use, module by module, and which would be enough?"
)
FIRST = ("ΔW and rank r", "effective rank", "noise", "energy", "singular values")
TABLED = ("stable rank", "at 90 %, at 99 %")
BESIDE_BASE = ("amplifies", "overlap", "intruders")


@report
@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; prints as a table."""

    adapter: str
    base: str | None
    against: str | None
    modules: tuple[Module, ...]
    parameters: int
    notes: tuple[str, ...]
    metadata: Mapping[str, str]  # of the file

    @property
    def norm(self) -> float:
        """|ΔW| over all modules together."""
        return math.hypot(*(m.norm for m in self.modules))

    @property
    def needed(self) -> int:
        """Parameters that would hold 99 % of the energy of each module."""
        return sum(max(m.ranks.at99, 1) * sum(m.shape) for m in self.modules)

    @property
    def suggested_rank(self) -> int:
        """The least rank for all modules that keeps 99 % of the whole's energy, as `compress` chooses it."""
        return group(self.modules).suggested_rank

    @property
    def idle(self) -> list[str]:
        """The modules that do nothing: ΔW = 0."""
        return [m.module for m in self.modules if not m.norm]

    def data(self) -> dict[str, Any]:
        kinds = [
            {"component": component, "kind": kind} | asdict(group(some))
            for component, found in tabled.groups(self.modules).items()
            for kind, some in found.items()
        ]
        return asdict(self) | {
            "norm": self.norm, "parameters_at_99": self.needed, "suggested_rank": self.suggested_rank,
            "idle": self.idle, "kinds": kinds,
        }  # fmt: skip

    def parts(self) -> list[str | Table]:
        return view(self)

    def summary(self) -> str:
        """The whole adapter in one line."""
        r = sum(m.r for m in self.modules)
        at99 = sum(m.ranks.at99 for m in self.modules)
        effective = math.fsum(m.ranks.effective for m in self.modules)
        noise = math.fsum(m.noise.effective for m in self.modules)
        what = counted(len(self.modules), "module", "modules")
        return (
            f"{self.adapter}: {what}, {self.parameters:,} parameters, |ΔW| {self.norm:.4g}; "
            f"of {r} ranks {effective:.0f} are effective (noise: {noise:.0f}), {at99} "
            f"hold 99 % of each module's energy, in {self.needed / self.parameters:.0%} of the parameters"
        )

    def suggestion(self) -> str:
        """The suggested rank, and by which rule."""
        return (
            f"suggested rank: {self.suggested_rank}, the least that, common to all modules, keeps "
            f"{100 * ENERGY:g} % of |ΔW|² (minilora compress --energy {ENERGY})"
        )


def inspect(
    adapter: Path | str,
    base: Path | str | None = None,
    against: Path | str | None = None,
    *,
    modules: str = "*",
    alpha: float | None = None,
    r: int | None = None,
    whole: int = WHOLE,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Measure an adapter's folder, also `against` another and a `base` (any checkpoint with its modules).

    Only `modules` whose names match this pattern (as in fnmatch) are read; MismatchError if none does.
    Modules that the base lacks, or has in another shape, are noted and not compared; at least one must match.
    `alpha` and `r` are as in `open_adapter`.
    Memory: the factors of one module per core; with a base, the factors and the weight of one module.
    Intruders are computed if the smaller side of the weight is at most `whole`. StorageError, FormatError,
    ConfigError, UnsupportedError, MismatchError or NonFiniteError name file and module.
    """
    heads = None if base is None else heads_in(base)
    opening = partial(open_adapter, alpha=alpha, r=r, heads=heads)
    opened = opening(adapter)
    given = selected(opened, modules)
    if not given.pairs:
        what = f"none of its {len(opened.pairs)} modules matches {modules!r}"
        raise MismatchError(f"{adapter}: {what}; {nearest(modules, opened.pairs)}")
    other = None if against is None else selected(opening(against), modules)
    tensors = None if base is None else weights(base)
    found = {} if tensors is None else compared(given, tensors)
    common = given.pairs.keys() & other.pairs.keys() if other else set()
    if other and not common:
        near = nearest(next(iter(given.pairs)), other.pairs)
        raise MismatchError(f"{against}: adapts no module of {adapter}; {near}")
    measured: list[Module] = []

    def one(name: str) -> Module:
        W = weight_of(tensors, found[name]) if tensors is not None and name in found else None
        return look(given, name, W, other if name in common else None, whole)

    each = on_cores if base is None else map  # a thin QR is too small for BLAS threads
    for module in each(one, given.pairs):
        measured.append(module)
        if progress:
            progress(len(measured), len(given.pairs))
    measured.sort(key=lambda m: order(place(m.module)))
    notes = [*given.all_notes, *(tensors.notes if tensors else ())]
    for kind in KINDS:
        if kind.flag in given.settings.flags:
            notes.append(f"{kind.adapter.__name__}: the numbers are those of B A alone; {kind.besides}")
    if given.by_inputs:
        what = "its magnitudes also scale the columns of W + ΔW"
        notes.append(f"DoRA: the numbers are those of B A alone; {what}")
    if replaced := len(given.replaced) + sum(pair.bias is not None for pair in given.pairs.values()):
        what = counted(replaced, "parameter is", "parameters are")
        notes.append(f"{what} replaced in full, not in the numbers")
    if other:
        if alone := given.pairs.keys() ^ other.pairs.keys():
            what = counted(len(alone), "module is", "modules are")
            notes.append(f"{what} adapted by only one of the two, such as {min(alone)}")
        notes += [f"{against}: {note}" for note in other.all_notes]
    if tensors is not None and (apart := [name for name in given.pairs if name not in found]):
        what = counted(len(apart), "module is", "modules are")
        notes.append(f"{what} not in the base, or in another shape, such as {apart[0]}")
    if any(m.base and m.base.intruders is None for m in measured):
        notes.append(f"intruders were not computed where both sides are larger than {whole}")
    if idle := [m.module for m in measured if not m.norm]:
        notes.append(f"{counted(len(idle), 'module does', 'modules do')} nothing: ΔW = 0, such as {idle[0]}")
    if left := len(opened.pairs) - len(given.pairs):
        notes.append(f"{counted(left, 'module does', 'modules do')} not match {modules!r} and were not read")
    parameters = sum(pair.r * sum(pair.shape) for pair in given.pairs.values())
    return Inspection(
        str(adapter), None if base is None else str(base), None if against is None else str(against),
        tuple(measured), parameters, tuple(notes), given.tensors.metadata,
    )  # fmt: skip


def compared(given: Adapter, base: Tensors) -> dict[str, Place]:
    """Module -> its place in a base, where there is one.

    MismatchError if no module has one; UnsupportedError if the adapter numbers its layers unlike the base.
    """
    if beside := [field for field in given.settings.beside if field.startswith("layer_replication")]:
        raise UnsupportedError(f"{given.where}: {beside[0]}; the base numbers its layers differently")
    if found := places(given, names := Names(base)):
        return found
    raise misfit(given, names, next(iter(given.pairs)))


def selected(adapter: Adapter, pattern: str) -> Adapter:
    """The adapter with only the modules whose names match."""
    pairs = {name: pair for name, pair in adapter.pairs.items() if fnmatchcase(name, pattern)}
    return replace(adapter, pairs=pairs)


# ---- what is shown


def view(
    seen: Inspection, sort: str = "model", limit: int = LIMIT, metadata: bool = False
) -> list[str | Table]:
    """The report for a terminal: by kind, then at most `limit` modules in the order `sort`, then the rest.

    ConfigError if there is no such order, or if `limit` is less than 1.
    """
    check_int("limit", limit, 1)
    shown = tabled.ordered(seen.modules, sort)[:limit]
    parts: list[str | Table] = [
        tabled.by_kind(seen.modules),
        *tabled.wrapped(f"{tabled.LEGEND} |ΔW|: the median."),
        "",
    ]
    for table in tabled.narrow(shown, seen.base is not None, seen.against is not None):
        parts += [table, ""]
    if rest := len(seen.modules) - len(shown):
        what = counted(rest, "more module is", "more modules are")
        parts += [f"{what} not shown; --limit {len(seen.modules)} shows all", ""]
    if lines := list(tabled.metadata_lines(seen.metadata, metadata)):
        parts += [*lines, ""]
    for line in (seen.summary(), seen.suggestion(), *(f"note: {note}" for note in seen.notes)):
        parts += tabled.wrapped(line)
    return parts


def tables(seen: Inspection) -> Iterator[Table]:
    """The tables of all modules with all their numbers."""
    return tabled.wide(seen.modules, seen.base, seen.against)


def rows(seen: Inspection) -> list[dict[str, Any]]:
    """A row of numbers for each module, for CSV."""
    return [tabled.record(m) for m in seen.modules]


def pictures(seen: Inspection) -> dict[str, Picture]:
    """The figures of an inspection by name; those of further components end with the component's name."""
    from . import figures

    drawn: dict[str, Picture] = {}
    for i, component in enumerate(dict.fromkeys(m.component for m in seen.modules)):
        end = f"_{component or 'others'}" if i else ""
        some = [m for m in seen.modules if m.component == component]
        drawn |= {f"heat_map{end}": figures.heat_map(some), f"spectra{end}": figures.adapter_spectra(some)}
        if compared := [m for m in some if m.other]:
            drawn[f"similarity{end}"] = figures.subspaces(compared)
            drawn[f"difference{end}"] = figures.difference(compared)
    return drawn


def report_page(seen: Inspection, drawn: Mapping[str, Picture]) -> str:
    """The whole inspection as one HTML page."""
    from . import report as pages

    whole = group(seen.modules)
    answer = (
        f"In the median module ΔW uses {whole.effective:.1f} of {tabled.span(whole)} directions in effect; "
        f"noise of the same rank would use {whole.noise:.1f}."
    )
    told = (ASKED, answer, f"The {seen.suggestion()}.", f"{seen.summary()}.")
    sections = {"The answer": [*map(pages.paragraph, told), pages.terms(*FIRST)]}
    if drawn:
        compared = [pages.terms("φ(i), phi", "cosine")] if seen.against else []
        sections["Figures"] = [*compared, *(pages.drawing(name, p) for name, p in drawn.items())]
    for table, terms in zip(tables(seen), (TABLED, *[BESIDE_BASE] * bool(seen.base), ()), strict=False):
        sections[table.caption] = [*([pages.terms(*terms)] if terms else []), pages.boxed(table)]
    if seen.notes:
        sections["Notes"] = [pages.points([f"{note}." for note in seen.notes])]
    if entries := sorted(item for item in seen.metadata.items() if item[0] not in tabled.OURS):
        table = Table(("entry", "value"), entries, "Metadata of the file")
        sections[table.caption] = [pages.boxed(table)]
    made = {"adapter": seen.adapter, "base": seen.base, "against": seen.against}
    sections["How this was made"] = [pages.facts({name: path for name, path in made.items() if path})]
    return pages.page("An adapter under the microscope", sections)


# ---- several adapters


@dataclass(frozen=True)
class Line:
    """One of several adapters: its numbers, or why it has none."""

    adapter: str
    numbers: Group | None
    error: str | None


@report
@dataclass(frozen=True)
class Survey:
    """Several adapters; prints a line for each."""

    lines: tuple[Line, ...]

    @property
    def failed(self) -> int:
        """How many could not be read."""
        return sum(line.numbers is None for line in self.lines)

    def data(self) -> dict[str, Any]:
        return {"adapters": self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        """A row of numbers for each adapter, None where they are not known."""
        return [
            {"adapter": line.adapter}
            | {field.name: getattr(line.numbers, field.name, None) for field in fields(Group)}
            | {"error": line.error}
            for line in self.lines
        ]

    def parts(self) -> list[str | Table]:
        names = [Path(line.adapter).name for line in self.lines]
        if len({*names}) < len(names):
            names = [line.adapter for line in self.lines]
        head, *rows = tabled.survey(names, [line.numbers for line in self.lines]).lines()
        shown = [
            row if line.error is None else f"{row}  {line.error.removeprefix(f'{line.adapter}: ')}"
            for row, line in zip(rows, self.lines, strict=True)
        ]
        return [head, *shown, *tabled.wrapped(tabled.LEGEND)]


def survey(
    adapters: Sequence[Path | str],
    modules: str = "*",
    alpha: float | None = None,
    r: int | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Inspect several adapters one after another; what is wrong with one stands in its line."""
    lines = []
    for adapter in adapters:
        try:
            seen = inspect(adapter, modules=modules, alpha=alpha, r=r)
            lines.append(Line(str(adapter), group(seen.modules), None))
        except MiniloraError as e:
            lines.append(Line(str(adapter), None, str(e)))
        if progress:
            progress(len(lines), len(adapters))
    return Survey(tuple(lines))
