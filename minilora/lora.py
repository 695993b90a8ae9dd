"""LoRA: learn a change of rank r beside a frozen weight (Hu et al. 2021, section 4.1).

    y = x Wᵀ + s (x Aᵀ) Bᵀ        W (O, I) frozen, A (r, I), B (O, r), s = alpha / r

With H = s X Aᵀ and the incoming gradient dY the chain rule gives, for the rows X (M, I),

    dB = dYᵀ H        dA = (s dY B)ᵀ X        dX = dY W + (s dY B) A

B starts at zero, so the first step moves only B. Stands in for PEFT's tuners/lora (12,000 lines);
leaves out quantized and convolution variants, hot-swapping and the other initialisations. A layer here
knows nothing of the transformer: an adapter is put around any Linear or Embedding of a tree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .backend import Array, normal, scatter_add, uniform, xp
from .errors import (
    ConfigError,
    InputError,
    MismatchError,
    NonFiniteError,
    StateError,
    check_float,
    check_int,
    nearest,
    short,
)
from .layers import Dropout, Embedding, Linear, Param, Wanted
from .ops import Back, rows
from .table import printed
from .tree import children, freeze, named_params, replace


@dataclass(eq=False)
class LowRank:
    """ΔW = s B A beside a Linear: the adapter of the paper."""

    A: Param  # (r, I)
    B: Param  # (O, r)
    scale: float  # s = alpha / r
    dropout: Dropout | None = None  # of what A reads
    held: Array | None = None  # W + ΔW (O, I), while `holding` says that A and B stay what they are

    def __call__(self, base: Linear, x: Array, dx: Wanted = True) -> tuple[Array, Back]:
        W = self.whole(base, x)
        if W is None:
            return self.beside(base, x, dx)
        return Linear(Param(W, trainable=False), base.bias)(x, None)[0], self.folded(base, W, x, dx)

    def beside(self, base: Linear, x: Array, dx: Wanted = True) -> tuple[Array, Back]:
        """The adapter as the paper draws it, on a path of its own."""
        A, B, s = self.A, self.B, self.scale
        y, back_base = base(x, dx)
        z, back_drop = self.dropout(x, dx) if self.dropout else (x, None)
        z, shape = rows(z), x.shape  # (M, I)
        h = s * (z @ A.data.T)  # (M, r)
        y += (h @ B.data.T).reshape(y.shape)

        def back(dy: Array) -> Array:
            dy_ = rows(dy)
            dh = s * (dy_ @ B.data)  # (M, r)
            B.add_grad(dy_.T @ h)  # dB = dYᵀ H
            A.add_grad(dh.T @ z)  # dA = (s dY B)ᵀ X
            d = back_base(dy)
            if dx:
                dz = (dh @ A.data).reshape(shape)
                d += back_drop(dz) if back_drop else dz
            return d

        return y, back

    def delta(self) -> Array:
        """ΔW = s B A, (O, I)."""
        return (self.scale * self.B.data) @ self.A.data

    def fold(self, base: Linear) -> Linear:
        """A plain Linear with W + ΔW."""
        W = self.delta()
        W += base.weight.dense()
        return Linear(Param(W, trainable=False), base.bias)

    def whole(self, base: Linear, x: Array) -> Array | None:
        """W + ΔW (O, I) if it is held, or if forming it pays for the rows of x."""
        if self.held is None and self.pays(len(rows(x))):
            return self.fold(base).weight.data
        return self.held

    def pays(self, M: int) -> bool:
        """Whether M rows are cheaper through W + ΔW, formed for them, than beside W.

        2 O I r operations, and as many again in time for writing and reading O I numbers, save
        2 M (O + I) r: those of H Bᵀ on the way there and of (s dY B) A on the way back.
        """
        O, I = len(self.B.data), self.A.data.shape[1]  # noqa: E741
        return self.dropout is None and M * (O + I) > 2 * O * I

    def folded(self, base: Linear, W: Array, x: Array, dx: Wanted) -> Back:
        """The way back through W + ΔW, of which dA and dB need nothing: they stay thin."""
        A, B, s, bias = self.A, self.B, self.scale, base.bias
        z, shape = rows(x), x.shape  # (M, I)

        def back(dy: Array) -> Array:
            dy_ = rows(dy)
            B.add_grad(dy_.T @ (s * (z @ A.data.T)))
            A.add_grad((s * (dy_ @ B.data)).T @ z)
            return (dy_ @ W).reshape(shape) if dx else None

        return Linear.back_to_bias(bias, back) if bias is not None and bias.trainable else back

    def back(self, base: Linear, x: Array, dx: Wanted) -> Back:
        """The way back alone."""
        W = self.whole(base, x)
        return self.beside(base, x, dx)[1] if W is None else self.folded(base, W, x, dx)


@dataclass(eq=False)
class LowRankEmbedding:
    """ΔE = s (B A)ᵀ beside an Embedding E (V, D), seen by the lookup and by a tied head alike.

    Here A starts at zero and B at random, as in loralib and PEFT: the first step moves only A.
    """

    A: Param  # (r, V)
    B: Param  # (D, r)
    scale: float  # s = alpha / r

    def __call__(self, base: Embedding, ids: Array, dx: Wanted = True) -> tuple[Array, Back]:
        A, B, s = self.A, self.B, self.scale
        y, back_base = base(ids, dx)
        h = s * A.data.T[ids]  # (N, T, r)
        y += h @ B.data.T

        def back(dy: Array) -> None:
            dy_ = rows(dy)
            B.add_grad(dy_.T @ rows(h))  # dB = dYᵀ H
            dh = s * (dy_ @ B.data)  # (M, r)
            A.add_grad(scatter_add(A.data.shape[1], ids.reshape(-1), dh).T)
            back_base(dy)

        return y, back

    def attend(self, base: Embedding, x: Array, dx: Wanted = True) -> tuple[Array, Back]:
        """logits = x Eᵀ + s (x B) A."""
        A, B, s = self.A, self.B, self.scale
        y, back_base = base.attend(x, dx)
        z = rows(x)
        h = s * (z @ B.data)  # (M, r)
        y += (h @ A.data).reshape(y.shape)

        def back(dy: Array) -> Array:
            dy_ = rows(dy)
            dh = s * (dy_ @ A.data.T)  # (M, r)
            A.add_grad(h.T @ dy_)  # dA = Hᵀ dY
            B.add_grad(z.T @ dh)  # dB = Xᵀ (s dY Aᵀ)
            return back_base(dy) + (dh @ B.data.T).reshape(x.shape) if dx else back_base(dy)

        return y, back

    def delta(self) -> Array:
        """ΔE = s (B A)ᵀ, (V, D)."""
        return self.scale * (self.B.data @ self.A.data).T

    def fold(self, base: Embedding) -> Embedding:
        """A plain Embedding with E + ΔE."""
        return Embedding(Param(base.weight.dense() + self.delta(), trainable=False))


@dataclass(eq=False)
class DoRA:
    """W' = m V / |V| with V = W + ΔW, one norm |V| per output row (Liu et al. 2024, equation 5).

    With z = x Vᵀ and g = m / |V|, y = g z + b. The gradient through |V| is exact; `detach` leaves it
    out, as the paper's section 4.3 and PEFT do.
    """

    low_rank: LowRank
    magnitude: Param  # m (O,), starts at |W|
    detach: bool = False

    def __call__(self, base: Linear, x: Array, dx: Wanted = True) -> tuple[Array, Back]:
        A, B, s, m = self.low_rank.A, self.low_rank.B, self.low_rank.scale, self.magnitude
        V = base.weight.dense() + self.low_rank.delta()  # (O, I)
        n, bias = row_norms(V), base.bias
        g = m.data / n
        x_ = rows(x)
        h = s * (x_ @ A.data.T)  # (M, r)
        z = x_ @ V.T  # (M, O)
        y = g * z
        if bias is not None:
            y += bias.data

        def back(dy: Array) -> Array:
            dy_ = rows(dy)
            dm = xp.einsum("mo,mo->o", dy_, z) / n
            m.add_grad(dm)
            dz = g * dy_
            dB = dz.T @ h
            dA = (s * (dz @ B.data)).T @ x_
            if not self.detach:  # d|V| = -m dm / |V|, and |V| pulls along V / |V|
                dV = (-g * dm / n)[:, None] * V
                dB += s * (dV @ A.data.T)
                dA += s * (B.data.T @ dV)
            B.add_grad(dB)
            A.add_grad(dA)
            return (dz @ V).reshape(x.shape) if dx else None

        y = y.reshape(*x.shape[:-1], -1)
        return y, Linear.back_to_bias(bias, back) if bias is not None and bias.trainable else back

    def back(self, base: Linear, x: Array, dx: Wanted) -> Back:
        """The way back alone; the value is a part of dm."""
        return self(base, x, dx)[1]

    def fold(self, base: Linear) -> Linear:
        """A plain Linear with m V / |V|."""
        V = base.weight.dense() + self.low_rank.delta()
        return Linear(Param((self.magnitude.data / row_norms(V))[:, None] * V, False), base.bias)


def row_norms(V: Array) -> Array:
    """The Euclidean norm (O,) of each row of V (O, I)."""
    return xp.sqrt(xp.einsum("oi,oi->o", V, V))


@dataclass(eq=False)
class WithBias:
    """A bias b (O,) in the place of the base's, beside a low-rank adapter or alone: PEFT's `bias`."""

    adapter: LowRank | DoRA | None
    bias: Param  # (O,)

    def over(self, base: Linear) -> Linear:
        """The base with this bias."""
        return Linear(base.weight, self.bias)

    def __call__(self, base: Linear, x: Array, dx: Wanted = True) -> tuple[Array, Back]:
        base = self.over(base)
        return self.adapter(base, x, dx) if self.adapter else base(x, dx)

    def back(self, base: Linear, x: Array, dx: Wanted) -> Back:
        """The way back alone."""
        base = self.over(base)
        return self.adapter.back(base, x, dx) if self.adapter else base.back(x, dx)

    def fold(self, base: Linear) -> Linear:
        """A plain Linear with a copy of the bias."""
        weight = self.adapter.fold(base).weight if self.adapter else base.weight
        return Linear(weight, Param(self.bias.data.copy(), trainable=False))


@dataclass(eq=False)
class Replacement:
    """A full copy of a layer, trained in its place beside LoRA: PEFT's modules_to_save."""

    layer: Any

    def __call__(self, base: Any, x: Array, dx: Wanted = True) -> tuple[Array, Back]:
        return self.layer(x, dx)

    def back(self, base: Linear, x: Array, dx: Wanted) -> Back:
        """The way back alone, of a Linear."""
        back: Back = self.layer.back(x, dx)
        return back

    def attend(self, base: Embedding, x: Array, dx: Wanted = True) -> tuple[Array, Back]:
        """The copy as a tied head."""
        return self.layer.attend(x, dx)

    def fold(self, base: Any) -> Any:
        """A frozen copy of the copy."""
        layer = deepcopy(self.layer)
        freeze(layer)
        return layer


@dataclass(eq=False)
class Adapted:
    """A frozen layer with named adapters, of which one or none is active; perhaps merged."""

    base: Any
    adapters: dict[str, Any] = field(default_factory=dict)
    active: str | None = None
    merged: Any = None  # a plain layer beside the base, never written into it

    def __call__(self, x: Array, dx: Wanted = True) -> tuple[Array, Back]:
        if self.merged is not None:
            return self.frozen(dx)(x, dx)
        if self.active is None:
            return self.base(x, dx)
        return self.adapters[self.active](self.base, x, dx)

    def back(self, x: Array, dx: Wanted) -> Back:
        """The way back alone, of a Linear."""
        if self.active is None:
            return self.base.back(x, dx)
        return self.adapters[self.active].back(self.base, x, dx)

    def attend(self, x: Array, dx: Wanted = True) -> tuple[Array, Back]:
        """The layer as a tied head."""
        if self.merged is not None:
            return self.frozen(dx).attend(x, dx)
        if self.active is None:
            return self.base.attend(x, dx)
        return self.adapters[self.active].attend(self.base, x, dx)

    def frozen(self, dx: Wanted) -> Any:
        """The merged layer, which cannot be trained."""
        if dx is not None:
            raise StateError("a merged model cannot be trained; unmerge it first")
        return self.merged


@dataclass(frozen=True)
class LoraConfig:
    """What to adapt, and how. Every entry of `targets` and the like must match something.

    A name matches a module whose path is that name or ends with "." and that name. s = alpha / r, or
    alpha / sqrt(r) with `rslora` (Kalajdzievski 2023). What is excluded wins over what is named.
    """

    r: int = 8
    alpha: float = 8
    targets: str | re.Pattern[str] | Sequence[str] = "all-linear"  # all but lm_head; a compiled regex
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # name -> r where it differs
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: Sequence[str] = ()
    layers_to_transform: Sequence[int] | None = None  # of the targets, only those in these layers
    bias: str = "none"  # "lora_only": the biases of the targets are trained too; "all": all biases
    modules_to_save: Sequence[str] = ()  # trained in full beside LoRA: norms, embedding, head
    rslora: bool = False
    dropout: float = 0.0  # of what A reads; an embedding's lookup has none
    init: str = "kaiming"  # A ~ U(-1/sqrt(I), 1/sqrt(I)); "gaussian" N(0, 1/r²); "both": B random too
    dora: bool = False
    detach: bool = False  # DoRA's norm as a constant on the way back

    def __post_init__(self) -> None:
        check_int("r", self.r, 1)
        check_float("alpha", self.alpha, 0, math.inf, open_low=True)
        check_float("dropout", self.dropout, 0, 1)
        for what in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, what), Mapping):
                raise ConfigError(f"{what} is {getattr(self, what)!r}; expected a mapping from names")
        for name, r in self.rank_pattern.items():
            check_int(f"rank_pattern[{name!r}]", r, 1)
        for name, alpha in self.alpha_pattern.items():
            check_float(f"alpha_pattern[{name!r}]", alpha, 0, math.inf, open_low=True)
        for flag in ("rslora", "dora", "detach"):
            if type(getattr(self, flag)) is not bool:
                raise ConfigError(f"{flag} is {getattr(self, flag)!r}; expected True or False")
        if self.init not in ("kaiming", "gaussian", "both"):
            raise ConfigError(f"init is {self.init!r}; {nearest(str(self.init), INITS)}")
        if self.dora and self.dropout:
            raise ConfigError("dropout with dora is not offered; expected dropout 0")
        if not isinstance(self.targets, re.Pattern):
            names("targets", self.targets)
            if not self.targets:
                raise ConfigError(f"targets is {self.targets!r}; expected at least one name")
        names("modules_to_save", self.modules_to_save)
        names("exclude_modules", self.exclude_modules)
        if self.bias not in BIASES:
            raise ConfigError(f"bias is {short(self.bias)}; {nearest(str(self.bias), BIASES)}")
        if self.layers_to_transform is not None:
            if not isinstance(self.layers_to_transform, list | tuple | range) or not self.layers_to_transform:
                given = short(self.layers_to_transform)
                raise ConfigError(f"layers_to_transform is {given}; expected a list of layer numbers")
            for number in self.layers_to_transform:
                check_int("layers_to_transform", number, 0)


BIASES = ("none", "lora_only", "all")
LAYER = re.compile(r"(?:.*?\.)?[^.]+\.([0-9]+)\.")  # the number in model.layers.3.self_attn.q_proj
INITS = ("kaiming", "gaussian", "both")


def names(what: str, value: object) -> list[str]:
    """A name or a list of names as a list, or ConfigError."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list | tuple | set | frozenset):
        raise ConfigError(f"{what} is {value!r}; expected a name or a list of names")
    for name in listed:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{what} has the entry {name!r}; expected a name")
    return list(listed)


@dataclass(frozen=True)
class Row:
    """One adapted module: its path, weight shape, rank, alpha, scale and trained parameters."""

    module: str
    shape: tuple[int, ...]
    r: int | None  # None where the module is trained in full
    alpha: float | None
    scale: float | None
    parameters: int


@dataclass(frozen=True)
class Report:
    """What `inject` did; prints as a table."""

    rows: tuple[Row, ...]
    base_parameters: int

    @property
    def parameters(self) -> int:
        """All trained parameters."""
        return sum(row.parameters for row in self.rows)

    @property
    def share(self) -> float:
        """Trained parameters over those of the base."""
        return self.parameters / self.base_parameters

    def __str__(self) -> str:
        width = max(len(row.module) for row in self.rows)
        head = f"{'shape':>12}  {'r':>4}  {'alpha':>6}  {'scale':>8}  {'parameters':>10}"
        lines = [f"{'module':{width}}  {head}"]
        for w in self.rows:
            shape = " x ".join(map(str, w.shape))
            how = f"{w.r:4}  {w.alpha:6g}  {w.scale:8.4g}" if w.r else f"{'in full':>22}"
            lines.append(f"{w.module:{width}}  {shape:>12}  {how}  {w.parameters:10,}")
        total = f"{self.parameters:,} of {self.base_parameters:,} parameters are trained ({self.share:.2%})"
        return printed(*lines, total)


def sites(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The (path, layer) of all layers that own parameters, adapted ones as a whole."""
    for name, part in children(tree):
        at = f"{path}.{name}" if path else name
        if isinstance(part, Adapted) or any(isinstance(p, Param) for _, p in children(part)):
            yield at, part
        else:
            yield from sites(part, at)


def with_head(model: Any, layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers, and for a tied head the one that it becomes when it is adapted: a Linear on the table."""
    if getattr(model, "lm_head", model) is not None:  # it has its own, or is no language model
        return dict(layers)
    return {**layers, "lm_head": Linear(base_of(layers["model.embed_tokens"]).weight)}


def base_of(layer: Any) -> Any:
    """The layer beneath its adapters, if there are any."""
    return layer.base if isinstance(layer, Adapted) else layer


def matches(entry: str, path: str) -> bool:
    """Whether a name means the module at `path`."""
    return path == entry or path.endswith("." + entry)


def resolve(what: str, entries: Sequence[str], among: Sequence[str]) -> list[str]:
    """The paths that the entries mean, in the order of the model; MismatchError for an idle entry."""
    for entry in entries:
        if not any(matches(entry, path) for path in among):
            known = {path.rpartition(".")[2] for path in among} | (set(among) if "." in entry else set())
            raise MismatchError(f"{what}: {entry!r} matches no module; {nearest(entry, known)}")
    return [path for path in among if any(matches(entry, path) for entry in entries)]


def find_targets(layers: Mapping[str, Any], config: LoraConfig) -> list[str]:
    """The paths of all modules that get a low-rank adapter."""
    adaptable = [p for p, layer in layers.items() if isinstance(base_of(layer), Linear | Embedding)]
    linears = [p for p in adaptable if isinstance(base_of(layers[p]), Linear)]
    targets, excluded = config.targets, names("exclude_modules", config.exclude_modules)
    if isinstance(targets, str) and targets == "all-linear":
        saved = names("modules_to_save", config.modules_to_save)
        found = [p for p in linears if not matches("lm_head", p) and not any(matches(m, p) for m in saved)]
    elif isinstance(targets, re.Pattern):
        found = [p for p in adaptable if targets.fullmatch(p)]
        if not found:
            some = ", ".join(adaptable[:3])
            raise MismatchError(f"targets: {targets.pattern!r} matches no module; there are {some}, ...")
    else:
        found = resolve("targets", names("targets", targets), adaptable)
    out = set(resolve("exclude_modules", excluded, list(layers)))
    kept = [p for p in found if p not in out and in_layers(p, config.layers_to_transform, found)]
    if not kept:
        raise ConfigError("exclude_modules and layers_to_transform leave none of the targets")
    return kept


def in_layers(path: str, wanted: Sequence[int] | None, among: Sequence[str]) -> bool:
    """Whether a module lies in one of the wanted layers, each of which must be there; None: in any."""
    if wanted is None:
        return True
    numbers = {int(found[1]) for p in among if (found := LAYER.match(p))}
    if missing := sorted(set(wanted) - numbers):
        given, known = short(missing[0]), short(sorted(numbers))
        raise ConfigError(f"layers_to_transform has {given}; expected some of {known}")
    found = LAYER.match(path)
    return bool(found) and int(found[1]) in wanted  # type: ignore[index]


def pick(path: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """The value of the first pattern entry that means this path."""
    return next((value for entry, value in pattern.items() if matches(entry, path)), default)


def low_rank(
    path: str, base: Any, config: LoraConfig, rng: np.random.Generator
) -> tuple[LowRank | LowRankEmbedding | DoRA, Row]:
    """A fresh adapter for one layer, and its row of the report."""
    r, alpha = pick(path, config.rank_pattern, config.r), pick(path, config.alpha_pattern, config.alpha)
    W = base.weight.dense()
    O, I = W.shape if isinstance(base, Linear) else W.shape[::-1]  # noqa: E741
    if r > min(O, I):
        raise ConfigError(f"r is {r} for {path} of shape {W.shape}; expected at most {min(O, I)}")
    scale = alpha / (math.sqrt(r) if config.rslora else r)

    def draw(shape: tuple[int, int], kind: str) -> Param:
        if kind == "zero":
            return Param(xp.zeros(shape, W.dtype))
        if kind == "kaiming":
            return Param(uniform(rng, shape, 1 / math.sqrt(shape[1]), W.dtype))
        return Param(normal(rng, shape, 1.0 if kind == "unit" else 1 / r, W.dtype))

    adapter: LowRank | LowRankEmbedding | DoRA
    if isinstance(base, Embedding):
        A = draw((r, I), "gaussian" if config.init == "both" else "zero")
        adapter = LowRankEmbedding(A, draw((O, r), "unit"), scale)
        if config.dora:
            raise ConfigError(f"dora is for linear maps; {path} is an embedding")
    else:
        A = draw((r, I), "gaussian" if config.init == "both" else config.init)
        B = draw((O, r), "gaussian" if config.init == "both" else "zero")
        drop = Dropout(config.dropout, rng) if config.dropout else None
        adapter = LowRank(A, B, scale, drop)
        if config.dora:
            adapter = DoRA(adapter, Param(row_norms(W)), config.detach)
    return adapter, Row(path, W.shape, r, float(alpha), scale, size(adapter))


def size(tree: Any) -> int:
    """The number of parameters in a tree."""
    return sum(p.data.size for p in named_params(tree).values())


def open_for(model: Any, name: str) -> dict[str, Any]:
    """Path -> layer of a model that can take an adapter of that name; InputError or StateError if not."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name) or name == "__base__":
        raise InputError(f"adapter name is {short(name)}; expected letters, digits, -, _; not __base__")
    layers = dict(sites(model))
    if any(isinstance(x, Adapted) and name in x.adapters for x in layers.values()):
        raise InputError(f"adapter {name!r} is there already; expected a new name")
    if any(isinstance(x, Adapted) and x.merged is not None for x in layers.values()):
        raise StateError("the model is merged; unmerge it first")
    return layers


def inject(model: Any, config: LoraConfig, *, rng: np.random.Generator, name: str = "default") -> Report:
    """Freeze the model and put a fresh, active adapter beside every target.

    The base is only ever read. `rng` draws A and, later, the dropout masks. A tied head that is adapted
    becomes a layer of its own on the same table, as in PEFT. ConfigError, MismatchError, InputError or
    StateError, with the model as it was, for a rank that does not fit, a name that matches nothing, an
    adapter name in use, or a tied head whose embedding is adapted already.
    """
    layers = with_head(model, open_for(model, name))
    targets = find_targets(layers, config)
    saved = resolve("modules_to_save", names("modules_to_save", config.modules_to_save), list(layers))
    if both := sorted(set(targets) & set(saved)):
        raise ConfigError(f"{both[0]} is in targets and in modules_to_save; expected one of the two")
    for what in ("rank_pattern", "alpha_pattern"):
        resolve(what, list(getattr(config, what)), targets)

    new: dict[str, Any] = {}
    table = []
    for path in targets:
        base = base_of(layers[path])
        new[path], row = low_rank(path, base, config, rng)
        if config.bias != "none" and isinstance(base, Linear) and base.bias is not None:
            new[path] = WithBias(new[path], Param(base.bias.data.copy()))
            row = dataclasses.replace(row, parameters=size(new[path]))
        table.append(row)
    for path, layer in layers.items():
        base = base_of(layer)
        if path in saved:
            new[path] = Replacement(deepcopy(base))
            table.append(Row(path, tuple(base.weight.dense().shape), None, None, None, size(new[path])))
        elif config.bias == "all" and path not in new and isinstance(base, Linear) and base.bias is not None:
            new[path] = WithBias(None, Param(base.bias.data.copy()))
            table.append(Row(f"{path}.bias", tuple(base.bias.data.shape), None, None, None, size(new[path])))

    base_parameters = size({path: base_of(layer) for path, layer in layers.items()})  # a shared one once
    if "lm_head" in new and model.lm_head is None:
        if isinstance(layers["model.embed_tokens"], Adapted):
            raise StateError("the head is tied to an embedding that has adapters; inject into a fresh model")
        replace(model, "lm_head", layers["lm_head"])
    attach(model, new, name)
    return Report(tuple(table), base_parameters)


def attach(model: Any, new: Mapping[str, Any], name: str) -> None:
    """Put adapters (path -> adapter) beside their layers, under one name, and make it the active one."""
    layers = dict(sites(model))
    for path, adapter in new.items():
        layer = layers[path]
        if not isinstance(layer, Adapted):
            layer = Adapted(layer)
            replace(model, path, layer)
        layer.adapters[name] = adapter
    set_adapter(model, name)


def adapted(model: Any) -> dict[str, Adapted]:
    """Path -> Adapted of all adapted layers; StateError if there is none."""
    found = {path: layer for path, layer in sites(model) if isinstance(layer, Adapted)}
    if not found:
        raise StateError("the model has no adapter; inject one first")
    return found


def set_adapter(model: Any, name: str) -> None:
    """Make one adapter the active and the only trained one; MismatchError if there is none such."""
    layers = adapted(model).values()
    known = {n for layer in layers for n in layer.adapters}
    if name not in known:
        raise MismatchError(f"there is no adapter {name!r}; {nearest(name, known)}")
    if any(layer.merged is not None for layer in layers):
        raise StateError("the model is merged; unmerge it before switching")
    freeze(model)
    for layer in layers:
        layer.active = name if name in layer.adapters else None
        if layer.active:
            freeze(layer.adapters[name], keep=lambda _: True)


def low_ranks(model: Any) -> list[tuple[Linear, LowRank]]:
    """Every active LowRank of a model, with the base beside which it stands."""
    layers = [layer for _, layer in sites(model) if isinstance(layer, Adapted)]
    found = [(layer.base, unbiased(layer.adapters[layer.active])) for layer in layers if layer.active]
    return [(base, adapter) for base, adapter in found if isinstance(adapter, LowRank)]


def unbiased(adapter: Any) -> Any:
    """What stands beside a bias of its own, if there is one."""
    return adapter.adapter if isinstance(adapter, WithBias) else adapter


@contextlib.contextmanager
def holding(twins: Sequence[tuple[Linear, LowRank]], M: int) -> Iterator[None]:
    """Within the context twins of one adapter share W + ΔW, formed once, if it pays for M rows.

    A and B must not change meanwhile: the context is that of one gradient.
    """
    base, adapter = twins[0]
    W = adapter.fold(base).weight.data if adapter.pays(M) else None
    for _, twin in twins:
        twin.held = W
    try:
        yield
    finally:
        for _, twin in twins:
            twin.held = None


@contextlib.contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Within the context the model is its base, to the bit."""
    layers = adapted(model).values()
    before = [(layer.active, layer.merged) for layer in layers]
    for layer in layers:
        layer.active = layer.merged = None
    try:
        yield
    finally:
        for layer, (active, merged) in zip(layers, before, strict=True):
            layer.active, layer.merged = active, merged


def set_scale(model: Any, scale: float | Mapping[str, float]) -> None:
    """Set s of the active low-rank adapters: one number, or path -> number as `scales` returns it."""
    current = scales(model)
    wanted = scale if isinstance(scale, Mapping) else dict.fromkeys(current, scale)
    for path, s in wanted.items():
        if path not in current:
            raise MismatchError(f"{path!r} has no active low-rank adapter; {nearest(path, current)}")
        if type(s) not in (int, float) or not math.isfinite(s):
            raise ConfigError(f"scale of {path} is {s!r}; expected a finite number")
    layers = adapted(model)
    if any(layer.merged is not None for layer in layers.values()):
        raise StateError("the model is merged; unmerge it before scaling")
    for path, s in wanted.items():
        factors(layers[path]).scale = float(s)  # type: ignore[union-attr]


def scales(model: Any) -> dict[str, float]:
    """Path -> s of the active low-rank adapters."""
    return {path: f.scale for path, layer in adapted(model).items() if (f := factors(layer))}


def factors(layer: Adapted) -> LowRank | LowRankEmbedding | None:
    """The low-rank factors of the active adapter, DoRA's too; None without any."""
    adapter = unbiased(layer.adapters[layer.active]) if layer.active else None
    adapter = adapter.low_rank if isinstance(adapter, DoRA) else adapter
    return adapter if isinstance(adapter, LowRank | LowRankEmbedding) else None


def folded(model: Any) -> dict[str, Any]:
    """Path -> the plain layer that base and active adapter make; NonFiniteError names a bad one."""
    plain = {}
    with np.errstate(all="ignore"):
        for path, layer in adapted(model).items():
            if layer.active:
                plain[path] = layer.adapters[layer.active].fold(layer.base)
                for name, p in named_params(plain[path]).items():
                    if not xp.isfinite(p.data).all():
                        raise NonFiniteError(f"{path}.{name} is not finite with ΔW; nothing was merged")
    return plain


def merge(model: Any) -> None:
    """Compute W + ΔW once for every adapted layer, so that the adapter costs nothing (section 4.1).

    All or nothing: NonFiniteError leaves the model unmerged. The base stays as it is, beside.
    """
    layers = adapted(model)
    if any(layer.merged is not None for layer in layers.values()):
        raise StateError("the model is merged already; unmerge it first")
    for path, plain in folded(model).items():
        layers[path].merged = plain


def unmerge(model: Any) -> None:
    """Drop the merged weights: the base is what it was, to the bit."""
    layers = adapted(model).values()
    if all(layer.merged is None for layer in layers):
        raise StateError("the model is not merged")
    for layer in layers:
        layer.merged = None


def fuse(model: Any) -> None:
    """Make the model a plain one with W + ΔW in its layers; the adapters are gone from it."""
    layers = adapted(model)
    plain = folded(model)
    for path, layer in layers.items():
        replace(model, path, plain.get(path, layer.base))


def remove(model: Any, name: str) -> None:
    """Take an adapter away; a layer that has none left is the plain base layer again."""
    layers = adapted(model)
    if not any(name in layer.adapters for layer in layers.values()):
        known = {n for layer in layers.values() for n in layer.adapters}
        raise MismatchError(f"there is no adapter {name!r}; {nearest(name, known)}")
    if any(layer.merged is not None for layer in layers.values()):
        raise StateError("the model is merged; unmerge it first")
    for path, layer in layers.items():
        layer.adapters.pop(name, None)
        layer.active = None if layer.active == name else layer.active
        if not layer.adapters:
            replace(model, path, layer.base)
