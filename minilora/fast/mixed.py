"""One batch, many adapters: each row names its own, over one base that all rows share.

    y_n = x_n Wᵀ + s (x_n Aᵀ) Bᵀ        with A, B, s of row n's adapter; y_n = x_n Wᵀ for a row without one

A rewrite of a replica: its linear maps become Mixed, and its blocks stay what they are. Three computations
give the same values. `loop`: one adapter after the other, base and all, through the contract `Adapter`; the
oracle. `segments`: the rows sorted by adapter, two products for each (SGMV). `gathered`: the factors of every
row in one stack, two batched products for all (BGMV); a stack for each set of ranks, so that nothing is
padded. SGMV and BGMV are Punica's (Chen et al. 2023, arXiv:2310.18547); rows of mixed ranks are S-LoRA's
(Sheng et al. 2023, arXiv:2311.03285). Leaves out their paged memory and tensor parallelism.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from ..backend import Array, xp
from ..errors import (
    ConfigError,
    InputError,
    MismatchError,
    StateError,
    UnsupportedError,
    check_int,
    nearest,
    short,
)
from ..layers import Adapter, Linear, Need, Param, Table
from ..lora import LowRank, bases, unmerged
from ..model import Llama
from ..ops import Back, back_nothing, back_same, rows
from ..targets import find_targets, with_head
from ..tree import freeze, named_params, replace, replica, trains

Adapters = Mapping[str, Adapter]  # path -> the change of the layer there: what one row has
Layout = tuple[tuple[str, int, Any, Any], ...]  # at every path: path, rank, dtype of A, dtype of B
Compute = Callable[["Mixed", Array, Need], tuple[Array, Back]]  # layer, x (N, T, I), need -> y (N, T, O)

FEW = 8  # rows with the same adapters, at most, for a slot each

is_trained = attrgetter("trainable")


class Segment(NamedTuple):
    """The rows of a batch that have the same adapters; None: those without."""

    adapters: Adapters | None
    rows: Any  # a slice if they are neighbours, else an array of ints


def index(numbers: Sequence[int]) -> Any:
    """Row numbers as a slice, which copies nothing, if they are neighbours in order."""
    first = numbers[0]
    if list(numbers) == list(range(first, first + len(numbers))):
        return slice(first, first + len(numbers))
    return xp.asarray(numbers)


def loop(layer: Mixed, x: Array, need: Need) -> tuple[Array, Back]:
    """Each adapter alone, with the base and its own rows: K base products for K adapters."""
    parts = []
    for adapters, at in layer.batch.segments:
        adapter = adapters.get(layer.path) if adapters else None
        y, back_own = adapter(layer.base, x[at], need) if adapter else layer.base(x[at], need)
        parts.append((at, y, back_own, adapter))
    first = parts[0][1]
    y = xp.empty((*x.shape[:-1], first.shape[-1]), first.dtype)
    for at, own, *_ in parts:
        y[at] = own

    def back(dy: Array) -> Array:
        dx = xp.empty(x.shape, dy.dtype) if need is Need.ALL else None
        for at, _, back_own, adapter in parts:
            d = back_own(dy[at])
            if dx is not None:
                dx[at] = d
            if not trains(adapter):
                freeze(adapter)  # which has no gradient then
        return dx

    return y, back


def segments(layer: Mixed, x: Array, need: Need) -> tuple[Array, Back]:
    """The base once, then two products for each adapter and its rows: SGMV."""
    return add_segments(layer, layer.batch.segments, x, need, *layer.base(x, need))


def add_segments(
    layer: Mixed, parts: Sequence[Segment], x: Array, need: Need, y: Array, back_base: Back
) -> tuple[Array, Back]:
    """Add the terms of these adapters to y, in place: one product for all rows of a segment.

    In the invariant mode it is one for each row, with A and Bᵀ laid out as in a stack: BLAS sums in the same
    order.
    """
    kept = []
    flat, layout = (same, xp.ascontiguousarray) if layer.batch.invariant else (rows, same)
    for adapters, at in parts:
        adapter: Any = adapters.get(layer.path) if adapters else None
        if adapter is None:
            continue
        z, back_drop = adapter.dropout(x[at], need) if adapter.dropout else (x[at], back_same)
        h = float(adapter.scale) * (flat(z) @ layout(adapter.A.data).T)  # (n T, r), or (n, T, r)
        add_at(y, at, (h @ layout(adapter.B.data.T)).reshape(*z.shape[:-1], -1))
        if need is not Need.NONE:
            kept.append((adapter, at, rows(h), rows(z), back_drop))
    if not kept:
        return y, back_base

    def back(dy: Array) -> Array:
        dx = back_base(dy)
        for adapter, at, h, z, back_drop in kept:
            if trains(adapter):
                dh = adapter.learn(rows(dy[at]), h, z)
            else:
                dh = float(adapter.scale) * (rows(dy[at]) @ adapter.B.data)
            if need is Need.ALL:
                add_at(dx, at, back_drop((dh @ adapter.A.data).reshape(-1, *dx.shape[1:])))
        return dx

    return y, back


def add_at(y: Array, at: Any, term: Array) -> None:
    """y[at] += term; for a slice in the view alone, which Python would write back once more."""
    part = y[at]
    part += term
    if not isinstance(at, slice):
        y[at] = part


def same(x: Array) -> Array:
    """The array itself."""
    return x


def gathered(layer: Mixed, x: Array, need: Need) -> tuple[Array, Back]:
    """The base once, then two batched products for each stack: BGMV.

    Only frozen adapters of FEW rows are stacked, each a text of its own. A stack is a copy: what is trained
    would change beside it, and for many rows it is dearer than a segment. The others go by `segments`, and so
    do all where a gradient is needed.
    """
    if need is not Need.NONE:
        return segments(layer, x, need)
    y, back = layer.base(x, need)
    for stack in layer.batch.stacked():
        if layer.path in stack.views:
            A, B, s = stack.views[layer.path]  # (n, I, r), (n, r, O), (n, 1, 1)
            h = x[stack.rows] @ A
            add_at(y, stack.rows, (s.astype(h.dtype, copy=False) * h) @ B)
    return add_segments(layer, layer.batch.unstacked, x, need, y, back)


def by_phase(layer: Mixed, x: Array, need: Need) -> tuple[Array, Back]:
    """`gathered` where each row has one token (decoding), else `segments`."""
    return (gathered if x.shape[1] == 1 else segments)(layer, x, need)


@dataclass(eq=False)
class Mixed:
    """A Linear of which each row has its own adapter, or none."""

    base: Any  # a Linear, or a RowByRow
    path: str
    batch: MixedBatch
    compute: Compute
    trained: list[Adapter] = field(default_factory=list)  # by which the tree knows that something is trained

    def __call__(self, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        return self.compute(self, x, need)


@dataclass(eq=False)
class RowByRow:
    """A frozen Linear as one product for each row of the batch: a row's bits do not depend on the others."""

    weight: Param  # (O, I)
    bias: Param | None

    def __call__(self, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        weight = self.weight
        y = x @ weight.dense().T  # (N, T, I) (I, O)
        if self.bias is not None:
            y += self.bias.data

        def back(dy: Array) -> Array:
            return dy @ weight.dense()

        return y, back if need is Need.ALL else back_nothing


@dataclass(eq=False)
class Counted:
    """A table that refuses ids before anything is computed, unless the batch names as many rows."""

    weight: Param  # the table (V, D)
    base: Table
    batch: MixedBatch

    def __call__(self, ids: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        self.batch.check(len(ids))
        return self.base(ids, need)


@dataclass(eq=False)
class Member:
    """Adapters as they were when they were checked: if they change, another Member takes its place."""

    adapters: Adapters
    items: list[tuple[str, Adapter]]
    layout: Layout
    params: list[Param]
    trained: bool

    def current(self) -> bool:
        """Whether the mapping still has these adapters, trained or frozen as before."""
        return list(self.adapters.items()) == self.items and any(map(is_trained, self.params)) is self.trained


class Stack:
    """The factors of frozen adapters of one layout, one slot for each row, in one array for each path.

    A slot keeps what it has from one batch to the next; only rows that are new are copied. There are fewer
    than four slots for each row.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.slots: list[Member | None] = []  # None: nothing that is whole
        self.arrays: dict[str, tuple[Array, ...]] = {}  # path -> A (slots, r, I), B (slots, r, O), s
        self.rows: Any = None
        self.views: dict[str, tuple[Array, ...]] = {}  # path -> A (n, I, r), B (n, r, O), s of `rows`

    def fill(self, rows: Sequence[tuple[int, Member]]) -> None:
        """Give every row (its number, its member) a slot: one that has the member already, or a new copy."""
        n = len(rows)
        if not n <= len(self.slots) < 4 * n:
            self.resize(n, rows[0][1].adapters)
        free: dict[Member | None, list[int]] = {}  # member -> its slots
        for k, member in enumerate(self.slots[:n]):
            free.setdefault(member, []).append(k)
        order, new = {}, []  # slot -> number of its row
        for number, member in rows:
            if have := free.get(member):
                order[have.pop(0)] = number
            else:
                new.append((number, member))
        for k in range(n):
            if k not in order:
                order[k], member = new.pop(0)
                self.slots[k] = None  # until all is copied
                self.copy(k, member.adapters)
                self.slots[k] = member
        self.slots[n:] = [None] * (len(self.slots) - n)
        self.rows = index([order[k] for k in range(n)])
        self.views = {path: (A[:n].swapaxes(1, 2), B[:n], s[:n]) for path, (A, B, s) in self.arrays.items()}

    def resize(self, n: int, like: Adapters) -> None:
        """Make room for n slots, in a power of two; all of them are empty then."""
        self.slots, self.arrays, self.views = [], {}, {}  # their memory first
        room, arrays = 1 << (n - 1).bit_length(), {}
        for path, r, *dtypes in self.layout:
            pair: Any = like[path]
            shapes = (room, r, pair.A.data.shape[1]), (room, r, len(pair.B.data)), (room, 1, 1)
            arrays[path] = tuple(map(xp.empty, shapes, [*dtypes, float]))
        self.arrays, self.slots = arrays, [None] * room

    def copy(self, slot: int, adapters: Adapters) -> None:
        """Copy A, Bᵀ and s of every path into a slot."""
        for path, (A, B, s) in self.arrays.items():
            pair: Any = adapters[path]
            A[slot], B[slot], s[slot] = pair.A.data, pair.B.data.T, pair.scale


class MixedBatch:
    """Which adapters the rows of the next forward have. Not for two threads at once.

    It keeps the adapters of the last batch and, in stacks, fewer than four copies of the factors of each row
    that was stacked last.
    """

    def __init__(
        self, model: Llama, shapes: Mapping[str, tuple[int, int]], kinds: bool, invariant: bool
    ) -> None:
        self.model, self.shapes, self.kinds, self.invariant = model, shapes, kinds, invariant
        self.layers: dict[str, Mixed] = {}
        self.N: int | None = None
        self.members: dict[int, Member] = {}  # by the id of their adapters
        self.order: Any = None  # the member of each row, and those of texts of several rows
        self.segments: list[Segment] = []
        self.unstacked: list[Segment] = []  # of those, the ones that no stack takes
        self.stacks: dict[Layout, Stack] = {}
        self.fresh: dict[Layout, list[tuple[int, Member]]] | None = None  # rows that no stack has yet

    @contextlib.contextmanager
    def rows(
        self, adapters: Sequence[Adapters | str | None], lengths: Sequence[int] | None = None
    ) -> Iterator[None]:
        """Within the context row n of every forward has adapters[n]: path -> adapter, a name, or None.

        None is the base alone; a name is that of adapters injected in the model, found and stacked anew in
        each call. With `lengths` adapters[n] has lengths[n] rows, one after the other: the tokens of a text,
        which no stack takes. Rows that have the same object are computed together. Stacks copy frozen
        adapters: if arrays of a mapping have changed since the last call, pass a new one, `dict(adapters)`.

        Refused before anything is changed: InputError for an unknown name or another number of lengths,
        ConfigError for a length below 1, MismatchError for a path that is no target or factors that do not
        fit there, UnsupportedError for a kind that cannot be mixed, StateError for names in a merged model or
        within another `rows`.
        """
        if self.N is not None:
            raise StateError("the batch has its rows already; leave its context first")
        if not len(adapters):
            raise InputError("no rows; expected a mapping, a name or None for each row of ids")
        for a in {id(a): a for a in adapters}.values():
            if not isinstance(a, Mapping | str | None):
                expected = "a mapping from paths to adapters, a name or None"
                raise InputError(f"a row has {short(a)}; expected {expected}")
        counts = [1] * len(adapters) if lengths is None else [check_int("a length", n, 1) for n in lengths]
        if len(counts) != len(adapters):
            raise InputError(f"{len(counts)} lengths, {len(adapters)} adapters; expected one for each")
        names = dict.fromkeys(a for a in adapters if isinstance(a, str))
        found = {name: named(self.model, name) for name in names}
        own = [(found[a] if isinstance(a, str) else a) or None for a in adapters]
        distinct = {id(a): a for a in own if a}
        self.members = {k: self.checked(a) for k, a in distinct.items()}
        texts = [(self.members.get(id(a)), count) for a, count in zip(own, counts, strict=True)]
        rows = [member for member, count in texts for _ in range(count)]
        if (order := (rows, {member for member, count in texts if count > 1})) != self.order:
            self.order = None
            self.arrange(*order)
            self.order = order
        trained = [member.adapters for member in self.members.values() if member.trained]
        try:
            self.N = len(rows)
            for path, layer in self.layers.items():
                layer.trained = [some[path] for some in trained if path in some]
            yield
        finally:
            self.N = None
            for layer in self.layers.values():
                layer.trained = []

    def arrange(self, rows: Sequence[Member | None], several: Container[Member | None]) -> None:
        """Sort the rows by their adapters, and these into what is stacked and what is not."""
        places: dict[Member | None, list[int]] = {}
        for n, member in enumerate(rows):
            places.setdefault(member, []).append(n)
        self.segments, self.unstacked, self.fresh = [], [], {}
        for member, numbers in places.items():
            part = Segment(member.adapters if member else None, index(numbers))
            self.segments.append(part)
            if member is None:
                continue
            if member.trained or member in several or len(numbers) > FEW:
                self.unstacked.append(part)
            else:
                self.fresh.setdefault(member.layout, []).extend((n, member) for n in numbers)

    def stacked(self) -> list[Stack]:
        """The stacks that hold the rows, filled when they are first asked for."""
        if self.fresh is not None:
            self.stacks = {layout: self.stacks.get(layout) or Stack(layout) for layout in self.fresh}
            for layout, rows in self.fresh.items():
                self.stacks[layout].fill(sorted(rows, key=itemgetter(0)))
            self.fresh = None
        return list(self.stacks.values())

    def checked(self, adapters: Adapters) -> Member:
        """The last batch's member with these adapters, if they are what they were, or a new one."""
        member = self.members.get(id(adapters))
        return member if member and member.current() else self.member(adapters)

    def member(self, adapters: Adapters) -> Member:
        """Check that every adapter can be applied at its path."""
        layout: list[tuple[str, int, Any, Any]] = []
        params: list[Param] = []
        for path, adapter in adapters.items():
            if not (self.kinds or isinstance(adapter, LowRank)):
                kind = type(adapter).__name__
                raise UnsupportedError(
                    f"{path}: a {kind} cannot be mixed; expected a LowRank, or compute=loop"
                )
            if path not in self.shapes:
                raise MismatchError(f"{path!r} is no target of the mixed model; {nearest(path, self.shapes)}")
            if not isinstance(adapter, LowRank):
                params += named_params(adapter).values()
                continue
            (O, I), A, B = self.shapes[path], adapter.A.data, adapter.B.data  # noqa: E741
            if A.ndim != 2 or (*B.shape, *A.shape) != (O, len(A), len(A), I):
                raise MismatchError(f"{path}: A is {A.shape}, B {B.shape}; expected (r, {I}) and ({O}, r)")
            layout.append((path, len(A), A.dtype, B.dtype))
            params += adapter.A, adapter.B
        trained = any(map(is_trained, params))
        return Member(adapters, list(adapters.items()), tuple(layout), params, trained)

    def check(self, N: int) -> None:
        """InputError unless N rows are named; StateError outside of `rows`."""
        if self.N is None:
            raise StateError("no row has a name; expected a forward within batch.rows([...])")
        if self.N != N:
            raise InputError(f"{N} rows of ids, {self.N} adapters; expected one for each row, or None")


def mixed(
    model: Llama, targets: Any = None, *, compute: Compute = by_phase, invariant: bool = False
) -> tuple[Llama, MixedBatch]:
    """A frozen replica of the model's base whose linear maps take one adapter for each row, and its batch.

        replica, batch = mixed(model)
        with batch.rows([adapters, None, "a name"]):  # one for each row of ids
            logits, back = replica(ids)

    `targets` are names, paths or a regex as in LoraConfig, if not every linear map. With `invariant` every
    product of the forward is one for each row, so that a row's logits have the same bits whoever shares its
    batch, unless dropout draws; `loop` cannot do that. StateError for a merged model.
    """
    unmerged(model)
    if invariant and compute is loop:
        raise ConfigError("compute is loop, which has products of several rows; expected another one")
    layers = with_head(model, bases(model))
    paths = list(layers) if targets is None else find_targets(layers, targets)
    for path in paths:
        if targets is not None and not isinstance(layers[path], Linear):
            raise UnsupportedError(f"{path} is no linear map; expected targets that are")
    shapes = {path: layers[path].weight.shape for path in paths if isinstance(layers[path], Linear)}
    batch = MixedBatch(model, shapes, compute is loop, invariant)
    copy = replica(model)
    if copy.lm_head is None:
        copy.lm_head = Linear(bases(copy)["model.embed_tokens"].weight)
    for path, base in bases(copy).items():
        layer = RowByRow(base.weight, base.bias) if invariant and isinstance(base, Linear) else base
        if path in shapes:
            layer = batch.layers[path] = Mixed(layer, path, batch, compute)
        replace(copy, path, layer)
    freeze(copy)
    table = copy.model.embed_tokens
    counted: Any = Counted(table.weight, table, batch)  # no whole Table: the head is a layer of its own
    copy.model.embed_tokens = counted
    return copy, batch


def named(model: Any, name: str) -> Adapters:
    """The adapters that are injected in the model under a name; InputError if there are none."""
    layers = unmerged(model)
    names = {n for layer in layers.values() for n in layer.adapters}
    if name not in names:
        raise InputError(f"there is no adapter {short(name)}; {nearest(name, names)}")
    return {path: layer.adapters[name] for path, layer in layers.items() if name in layer.adapters}
