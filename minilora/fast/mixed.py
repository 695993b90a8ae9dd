"""One batch, many adapters: each row has its own, over one base that all share.

    y_n = x_n Wᵀ + s (x_n Aᵀ) Bᵀ        with A, B, s of row n; the first term alone if it has none

W is the same for all rows, so x Wᵀ stays one product. For the rest there are three computations of one value.
`loop`: one adapter after the other, each with its rows, base and all; it takes every kind of adapter.
`gathered`: a stack of every row's factors, padded to the highest rank, and two batched products (BGMV).
`segments`: the rows sorted by adapter, and two products for each (SGMV); no rank costs more than its own.

A rewrite of a replica; blocks are unchanged. Punica (Chen et al. 2023, arXiv:2310.18547) has both kernels,
S-LoRA (Sheng et al. 2023, arXiv:2311.03285) those for mixed ranks. Leaves out their memory pools and tensor
parallelism.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..backend import Array, xp
from ..errors import InputError, MismatchError, StateError, UnsupportedError, nearest, short
from ..layers import Adapter, Linear, Need, Table
from ..lora import Adapted, LowRank, adapted, bases, owners
from ..model import Llama
from ..ops import Back, back_same, rows
from ..targets import find_targets
from ..tree import replace
from ..tree import replica as replica_of

Entry = Mapping[str, Adapter] | None  # path -> the adapter of a row there; None: the base alone
Apply = Callable[[Linear, Array, Need], tuple[Array, Back]]  # base, x (N, T, I), need -> y (N, T, O), back
Compute = Callable[[Sequence[Any]], Apply]  # one layer's adapter of each row -> what applies them


class Segment(NamedTuple):
    """The rows of a batch that have one adapter."""

    adapter: Any
    rows: Any  # a slice if they are neighbours, else an array of ints


def sorted_rows(adapters: Sequence[Any]) -> list[Segment]:
    """The rows of each adapter, in the order of its first row; those without one are a segment of None."""
    places: dict[int, tuple[Any, list[int]]] = {}
    for n, adapter in enumerate(adapters):
        places.setdefault(id(adapter), (adapter, []))[1].append(n)
    return [Segment(adapter, index(n)) for adapter, n in places.values()]


def index(n: Sequence[int]) -> Any:
    """Row numbers as a slice, which copies nothing, if they are neighbours."""
    return slice(n[0], n[-1] + 1) if n[-1] - n[0] + 1 == len(n) else xp.asarray(n)


def loop(adapters: Sequence[Adapter | None]) -> Apply:
    """One adapter after the other, each on the base and its own rows."""
    parts = sorted_rows(adapters)

    def apply(base: Linear, x: Array, need: Need) -> tuple[Array, Back]:
        done = [part.adapter(base, x[part.rows], need) if part.adapter else base(x[part.rows], need)
                for part in parts]  # fmt: skip
        y = xp.empty((*x.shape[:-1], done[0][0].shape[-1]), done[0][0].dtype)
        for part, (own, _) in zip(parts, done, strict=True):
            y[part.rows] = own

        def back(dy: Array) -> Array:
            dx = xp.empty(x.shape, dy.dtype) if need is Need.ALL else None
            for part, (_, back_own) in zip(parts, done, strict=True):
                d = back_own(dy[part.rows])
                if dx is not None:
                    dx[part.rows] = d
            return dx

        return y, back

    return apply


def segments(adapters: Sequence[LowRank | None]) -> Apply:
    """SGMV: the base once, then two products for each adapter and its rows."""
    parts = [part for part in sorted_rows(adapters) if part.adapter]

    def apply(base: Linear, x: Array, need: Need) -> tuple[Array, Back]:
        y, back_base = base(x, need)
        kept = []
        for part in parts:
            A, B, s, dropout = part.adapter.A, part.adapter.B, part.adapter.scale, part.adapter.dropout
            z = x[part.rows]  # (n, T, I)
            z, back_drop = dropout(z, need) if dropout else (z, back_same)
            h = s * (rows(z) @ A.data.T)  # (n T, r)
            y[part.rows] += (h @ B.data.T).reshape(*z.shape[:-1], -1)
            if need is not Need.NONE:
                kept.append((part, h, z, back_drop))

        def back(dy: Array) -> Array:
            dx = back_base(dy)
            for part, h, z, back_drop in kept:
                dh = part.adapter.learn(rows(dy[part.rows]), h, rows(z))
                if need is Need.ALL:
                    dx[part.rows] += back_drop((dh @ part.adapter.A.data).reshape(z.shape))
            return dx

        return y, back if kept else back_base

    return apply


def gathered(adapters: Sequence[LowRank | None]) -> Apply:
    """BGMV: the base once, then two batched products with a stack of every row's factors.

    Ranks below the highest R are padded with zeros. The backward is that of `segments`.
    """
    named_rows = [n for n, adapter in enumerate(adapters) if adapter]
    own = [adapter for adapter in adapters if adapter]
    if not own:
        return segments(adapters)
    at, by_segment = index(named_rows), segments(adapters)
    R = max(len(adapter.A.data) for adapter in own)
    A = xp.zeros((len(own), R, own[0].A.data.shape[1]), own[0].A.data.dtype)  # (n, R, I)
    B = xp.zeros((len(own), R, len(own[0].B.data)), own[0].B.data.dtype)  # (n, R, O)
    for k, adapter in enumerate(own):
        A[k, : len(adapter.A.data)] = adapter.A.data
        B[k, : len(adapter.A.data)] = adapter.scale * adapter.B.data.T

    def apply(base: Linear, x: Array, need: Need) -> tuple[Array, Back]:
        if need is not Need.NONE:
            return by_segment(base, x, need)
        y, back = base(x, need)
        y[at] += (x[at] @ A.swapaxes(1, 2)) @ B
        return y, back

    return apply


@dataclass(eq=False)
class Mixed:
    """A Linear of which each row has its own adapter, or none."""

    base: Linear
    compute: Compute
    adapters: list[Any] = field(default_factory=list)  # one for each row
    apply: Any = None  # what `compute` made of them

    def __call__(self, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        return self.apply(self.base, x, need)


@dataclass(eq=False)
class Counted:
    """The table of a mixed model: refuses ids whose rows are not those of the batch, before anything else."""

    base: Table
    batch: Batch

    def __call__(self, ids: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        self.batch.check(len(ids))
        return self.base(ids, need)

    def attend(self, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        """The logits (..., V) of x (..., D): a tied head."""
        return self.base.attend(x, need)


class Batch:
    """Which adapter each row of the next forward has."""

    def __init__(self, layers: Mapping[str, Mixed]) -> None:
        self.layers = layers
        self.entries: Sequence[Entry] | None = None

    @contextlib.contextmanager
    def rows(self, entries: Sequence[Entry]) -> Iterator[None]:
        """Within the context the N rows of every forward have these adapters: path -> adapter, or None.

        An adapter that several rows have is one object. MismatchError for a path that is no target or factors
        that do not fit the layer, UnsupportedError for a kind that cannot be mixed; then nothing is changed.
        """
        for entry in {id(entry): entry for entry in entries if entry}.values():
            self.fits(entry)
        for path, layer in self.layers.items():
            layer.adapters = [entry.get(path) if entry else None for entry in entries]
            layer.apply = layer.compute(layer.adapters)
        self.entries = entries
        try:
            yield
        finally:
            self.entries = None

    def fits(self, entry: Mapping[str, Adapter]) -> None:
        """MismatchError or UnsupportedError unless every adapter can be applied at its path."""
        for path, adapter in entry.items():
            if path not in self.layers:
                raise MismatchError(f"{path!r} is no target of this batch; {nearest(path, self.layers)}")
            layer = self.layers[path]
            if layer.compute is loop:
                continue
            if not isinstance(adapter, LowRank):
                kind = type(adapter).__name__
                raise UnsupportedError(f"{path}: {kind} cannot be mixed; expected LowRank, or compute=loop")
            O, I = layer.base.weight.dense().shape  # noqa: E741
            A, B = adapter.A.data.shape, adapter.B.data.shape
            if A[1:] != (I,) or (O, A[0]) != B:
                raise MismatchError(f"{path}: A is {A} and B {B}; expected (r, {I}) and ({O}, r)")

    def check(self, N: int) -> None:
        """InputError unless a forward of N rows is what the batch names; StateError outside `rows`."""
        if self.entries is None:
            raise StateError("no row has an adapter yet; expected a call within batch.rows([...])")
        if len(self.entries) != N:
            raise InputError(f"{N} rows of ids, {len(self.entries)} rows with adapters; expected as many")


def mixed(model: Llama, targets: Any = "all-linear", compute: Compute = segments) -> tuple[Llama, Batch]:
    """A replica of the model whose `targets` take one adapter for each row, and the batch that says which.

        replica, batch = mixed(model)
        with batch.rows([{path: adapter}, None, ...]):  # one entry for each row of ids
            logits, back = replica.forward(ids)

    The replica shares every array with the model; adapters that are injected in the model have no effect
    (`named` makes entries of them). `targets` are names, paths or a regex as in LoraConfig; `compute` is
    `segments`, `gathered` or `loop`. StateError if the model is merged.
    """
    refuse_merged(model)
    layers = bases(model)
    paths = find_targets(layers, targets)
    if wrong := [path for path in paths if not isinstance(layers[path], Linear)]:
        raise UnsupportedError(f"{wrong[0]} is an embedding; expected linear maps as targets")
    copy = replica_of(model)
    targeted: dict[str, Mixed] = {}
    for path, layer in list(owners(copy)):
        base = layer.base if isinstance(layer, Adapted) else layer
        if path in paths:
            targeted[path] = base = Mixed(base, compute)
        replace(copy, path, base)
    batch = Batch(targeted)
    copy.model.embed_tokens = Counted(copy.model.embed_tokens, batch)
    return copy, batch


def refuse_merged(model: Any) -> None:
    """StateError if adapters are merged."""
    if any(isinstance(layer, Adapted) and layer.merged is not None for _, layer in owners(model)):
        raise StateError("the model is merged; unmerge it before a mixed batch")


def named(model: Any, names: Sequence[str | None]) -> list[Entry]:
    """The entries of rows that name adapters injected in `model`; None is the base.

    InputError for a name that no adapter has, StateError if the model is merged.
    """
    refuse_merged(model)
    layers = adapted(model)
    known = {name for layer in layers.values() for name in layer.adapters}
    for name in names:
        if name is not None and name not in known:
            raise InputError(f"there is no adapter {short(name)}; {nearest(str(name), known)}")
    entries: dict[str | None, Entry] = {
        name: {path: layer.adapters[name] for path, layer in layers.items() if name in layer.adapters}
        for name in known & set(names)
    }
    return [entries.get(name) for name in names]
