"""Any base in safetensors and an adapter -> the same files with W + ΔW, one tensor in memory at a time.

    W' = W + s B A     with magnitudes, of outputs or of inputs:     W' = m (W + s B A) / |W + s B A|

No model is built, so any architecture will do: names and shapes decide (places.py), and what does not fit is
an error. The sum is taken in float64, block by block. In float32 it could be off by (r + 3) 2^-24 of what is
summed, which is more than a float32 weight is rounded by. Stands in for PEFT's merge_and_unload, diffusers'
fuse_lora and kohya's merge_lora.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import one_blas_thread
from ..errors import InputError, NonFiniteError
from ..formats.atomic import check_free, make_folder, read_pieces, refuse_same, write_atomic, write_folder
from ..formats.huggingface import fingerprint, heads_in, read_json, weights
from ..formats.safetensors import CALLED, FLOATS, encoded, header_of, rewritten, values
from ..lora_files.contents import INPUTS, MAGNITUDE
from ..methods.dora import row_norms
from ..peft.folder import Adapter, open_adapter
from ..peft.loading import check_base
from ..spectra import quotient
from ..table import Table, counted, report
from .changes import Change, check_dtype, table_of
from .places import Part
from .plan import Base, Plan, opened, planned, without_factors

LIMIT = 40  # modules that a terminal shows
BLOCK = 1 << 15  # numbers that are added at a time
EXPORTS = (".h5", ".msgpack", ".onnx", ".gguf")  # a model in another form, in a folder of its own or not
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", *EXPORTS)
Progress = Callable[[int, int], None]


@report
@dataclass(frozen=True)
class MergeByName:
    """What `merge_by_name` wrote; prints as a table."""

    out: str
    dtype: str  # of the merged tensors
    rows: tuple[Change, ...]
    replaced: tuple[str, ...]  # tensors of the base that are now the adapter's
    relative: float  # |ΔW| / |W| over all merged modules
    lost: float  # of |ΔW| over all of them, by rounding
    notes: tuple[str, ...]

    def data(self) -> dict[str, Any]:
        return asdict(self)

    def parts(self) -> list[str | Table]:
        made: list[str | Table] = [table_of(self.rows[:LIMIT])]
        if (more := len(self.rows) - LIMIT) > 0:
            what = counted(more, "more module is", "more modules are")
            made.append(f"{what} not shown; --json has all")
        what = counted(len(self.rows), "module", "modules")
        made.append(f"{what}: |ΔW|/|W| is {self.relative:.2e}, and rounding loses {self.lost:.1e} of |ΔW|")
        if self.replaced:
            made.append(f"replaced: {', '.join(self.replaced)}")
        return [*made, f"{self.out}: written in {self.dtype}", *(f"note: {note}" for note in self.notes)]


@one_blas_thread()  # a block is too small for more
def merge_by_name(
    base: Path | str,
    adapter: Path | str,
    out: Path | str,
    *,
    dtype: str | None = None,
    force: bool = False,
    why: str = "",
    progress: Progress | None = None,
) -> MergeByName:
    """Write a base with W + ΔW in the form it has: a safetensors file, a model's folder or a pipeline's.

    Files, names, order and headers stay; a tensor that is not adapted is copied, unless `dtype` ("bfloat16",
    ...) is another than its own. `why` says in a note why no logits were compared. Memory: a tensor in
    float64, and the factors of a module. InputError for an unknown dtype or a name that is no such form's,
    NonFiniteError for a value too large for its dtype; others as in `planned` and `open_adapter`. Nothing is
    written then, but folders above a file may be new.
    """
    check_dtype(dtype)
    source, out = opened(base), Path(out)
    single = source.where.is_file()
    if (out.suffix == ".safetensors") != single:
        what = "a name that ends in .safetensors" if single else "the name of a folder"
        raise InputError(f"{out}: expected {what}, as that of the base")
    given = open_adapter(adapter, heads=None if single else heads_in(source.where))
    refuse_same(out, source.where, given.where)
    check_free(out)
    work = Work(given, source, planned(given, source), dtype, progress)
    if not force:
        check_base(given, lambda: fingerprint(weights(base)))
    notes = ["no logits were compared" + (f": {why}" if why else ""), *given.notes]
    if lacking := without_factors(given, source, work.plan):
        what = f"{counted(len(lacking), 'module', 'modules')} of its config, such as {lacking[0]}"
        notes.append(f"the adapter has no factors for {what}")
    if single:
        make_folder(out.parent)
        write_atomic(out, work.file(source.where))
    else:
        others, left = beside(source)
        if left:
            more = f" and {len(left) - 1} more" if left[1:] else ""
            first = left[0].relative_to(source.where)
            notes.append(f"left out, since it holds the weights in another form: {first}{more}")

        def fill(temp: Path) -> None:
            for path in (*source.files, *others):
                target = temp / path.relative_to(source.where)
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(target, work.file(path) if path in source.files else work.text(path, temp))

        write_folder(out, fill)
    return work.report(str(out), notes)


@dataclass
class Sums:
    """A module's change as far as it is known: sums of squares, and the largest entry."""

    change: float = 0.0
    base: float = 0.0
    lost: float = 0.0
    largest: float = 0.0

    def norms(self) -> tuple[float, float]:
        """|ΔW| / |W|, and what rounding loses of |ΔW|."""
        change, base, lost = map(math.sqrt, (self.change, self.base, self.lost))
        return quotient(change, base), quotient(lost, change)


@dataclass(frozen=True, eq=False)
class Work:
    """A plan as it is carried out: tensors are merged one after another as they are written."""

    given: Adapter
    source: Base
    plan: Plan
    dtype: str | None
    progress: Progress | None
    sums: dict[str, Sums] = field(default_factory=dict)  # by module
    done: list[str] = field(default_factory=list)  # merged tensors

    def kind(self, name: str) -> str:
        """The dtype in which a tensor is written: F32, ..."""
        own = self.source.tensors.dtypes[name]
        return CALLED[self.dtype] if self.dtype and own in FLOATS else own

    def file(self, path: Path) -> Iterator[bytes]:
        """The bytes of one of the base's tensor files, merged."""
        names, dtypes = self.source.files[path], self.source.tensors.dtypes
        new = {
            *self.plan.changes,
            *self.plan.replaced,
            *(n for n in names.values() if self.kind(n) != dtypes[n]),
        }
        kinds = {own: self.kind(name) for own, name in names.items() if name in new}
        return rewritten(path, kinds, lambda own: self.tensor(names[own]))

    def tensor(self, name: str) -> Iterator[bytes]:
        """The bytes of one tensor; NonFiniteError if its dtype cannot hold a value."""
        kind, parts, tensor = self.kind(name), self.plan.changes.get(name, []), self.plan.replaced.get(name)
        old = self.given.value(tensor) if tensor else self.source.tensors[name]
        new = np.empty(old.shape, FLOATS[kind])
        flat, written = old.reshape(-1), new.reshape(-1)
        if sum(part.of(old).size for _, part in parts) < old.size:  # else all of it is merged
            for some in blocks(old.size, BLOCK):
                written[some] = encoded(flat[some], kind)
                finite = np.isfinite(flat[some])
                self.check(name, kind, values(written[some], kind)[finite])
        for module, part in parts:
            self.add(module, part, old, new, kind)
        if parts:
            self.done.append(name)
            if self.progress:
                self.progress(len(self.done), len(self.plan.changes))
        yield from (written[some].tobytes() for some in blocks(old.size, BLOCK))

    def add(self, module: str, part: Part, old: np.ndarray, new: np.ndarray, kind: str) -> None:
        """Merge a module's rows into their place in a tensor, from `old` to `new`, block by block."""
        pair, sums = self.given.pairs[module], self.sums.setdefault(module, Sums())
        A, B = (half.astype(np.float64) for half in self.given.factors(module))
        m = {name: self.given.value(key).astype(np.float64).ravel() for name, key in pair.vectors.items()}
        rows = slice(part.first, part.first + part.rows)
        left, before, after = pair.scale * B[rows], part.of(old), part.of(new)
        some = list(blocks(part.rows, max(1, BLOCK // A.shape[1])))

        def summed(block: slice) -> tuple[np.ndarray, np.ndarray]:
            W = before[block].astype(np.float64)
            return W, left[block] @ A + W

        with np.errstate(all="ignore"):  # what is written is looked at
            if INPUTS in m:  # each scales the columns of its channel
                squares = sum((summed(block)[1] ** 2).sum(0) for block in some).reshape(len(m[INPUTS]), -1)
                columns = np.repeat(m[INPUTS] / np.sqrt(squares.sum(1)), squares.shape[1])
            for block in some:
                W, V = summed(block)
                if MAGNITUDE in m:
                    V = (m[MAGNITUDE][rows][block] / row_norms(V))[:, None] * V
                if INPUTS in m:
                    V = V * columns
                after[block] = coded = encoded(V, kind)
                rounded = values(coded, kind)
                self.check(part.key, kind, rounded)
                change = V - W
                sums.base += float(np.vdot(W, W))
                sums.change += float(np.vdot(change, change))
                sums.lost += float(np.sum((rounded - V) ** 2))
                sums.largest = max(sums.largest, float(abs(change).max()))

    def check(self, name: str, kind: str, written: np.ndarray) -> None:
        """NonFiniteError unless all is finite."""
        if not np.isfinite(written).all():
            what = f"not written: {name} has values that are not finite in {kind}"
            raise NonFiniteError(f"{self.source.where}: {what}")

    def text(self, path: Path, temp: Path) -> Iterator[bytes]:
        """The bytes of another file; a config and an index say the new dtype and size."""
        if self.dtype and path.name == "config.json":
            config = read_json(path)
            if said := {name: self.dtype for name in ("dtype", "torch_dtype") if name in config}:
                return iter([as_json(config | said)])
        if self.dtype and path in self.source.indices:
            index = read_json(path, limit=1 << 24)
            metadata, inside = index.get("metadata"), path.parent.relative_to(self.source.where)
            if isinstance(metadata, dict) and "total_size" in metadata:
                files = [temp / inside / name for name in {*index["weight_map"].values()}]
                ends = (max((p.end for p in header_of(file).places.values()), default=0) for file in files)
                return iter([as_json(index | {"metadata": metadata | {"total_size": sum(ends)}})])
        return read_pieces(path)

    def report(self, out: str, notes: list[str]) -> MergeByName:
        """What was written."""
        rows = [(module, self.sums[module]) for module in self.given.pairs]
        total = Sums(*(sum(getattr(s, part) for _, s in rows) for part in ("change", "base", "lost")))
        changes = [Change(module, s.largest, *s.norms()) for module, s in rows if s.change]
        kinds = {self.kind(name) for name in (*self.plan.changes, *self.plan.replaced)}
        dtype = ", ".join(name for name, kind in CALLED.items() if kind in kinds)
        return MergeByName(
            out, dtype, tuple(changes), tuple(self.plan.replaced), *total.norms(), tuple(notes)
        )


def as_json(value: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file, with the keys in their order."""
    return (json.dumps(value, indent=2) + "\n").encode()


def blocks(total: int, size: int) -> Iterator[slice]:
    """The parts of a range, of at most `size` each."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def beside(source: Base) -> tuple[list[Path], list[Path]]:
    """The other files in a base's folder: those to copy, and those with its weights in another form.

    A model in a folder of its own, which is not merged, is copied. Hidden files are neither.
    """
    copied: list[Path] = []
    left: list[Path] = []
    merged = {source.where, *(path.parent for path in source.files)}
    for folder, inside, files in os.walk(source.where):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        links = [name for name in inside if os.path.islink(os.path.join(folder, name))]  # refused when read
        for path in (Path(folder, name) for name in sorted((*files, *links)) if not name.startswith(".")):
            index = ".index." in path.name and path not in source.indices
            again = index or path.suffix in WEIGHTS if path.parent in merged else path.suffix in EXPORTS
            if path not in source.files:
                (left if again else copied).append(path)
    return copied, left
