"""LoRA: learn a change of rank r beside a frozen weight (Hu et al. 2021, section 4.1).

    y = x Wᵀ + s (x Aᵀ) Bᵀ        W (O, I) frozen, A (r, I), B (O, r), s = alpha / r

With H = s X Aᵀ and the incoming gradient dY the chain rule gives, for the rows X (M, I),

    dB = dYᵀ H        dA = (s dY B)ᵀ X        dX = dY W + (s dY B) A

B starts at zero, so the first step moves only B. Stands in for PEFT's tuners/lora (12,000 lines); leaves
out convolutions and hot-swapping. An adapter wraps any layer of a tree; a LoraConfig says which, and how.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .backend import Array, xp
from .errors import ConfigError, InputError, MismatchError, NonFiniteError, StateError, nearest, short
from .layers import Adapter, AdapterConfig, Dropout, Factors, Layer, Linear, Need, Param
from .ops import Back, back_same, rows
from .table import Table, report
from .targets import with_head
from .tree import children, freeze, named_params, replace, size, walk


@dataclass(eq=False)
class LowRank:
    """ΔW = s B A beside a Linear: the adapter of the paper."""

    A: Param  # (r, I)
    B: Param  # (O, r)
    scale: float  # s = alpha / r
    dropout: Dropout | None = None  # on the input of A

    def __call__(self, base: Linear, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        A, B, s = self.A, self.B, self.scale
        y, back_base = base(x, need)
        z, back_drop = self.dropout(x, need) if self.dropout else (x, back_same)
        z, shape = rows(z), x.shape  # (M, I)
        h = s * (z @ A.data.T)  # (M, r)
        y += (h @ B.data.T).reshape(y.shape)

        def back(dy: Array) -> Array:
            dh = self.learn(rows(dy), h, z)
            dx = back_base(dy)
            if need is Need.ALL:
                dx += back_drop((dh @ A.data).reshape(shape))
            return dx

        return y, back

    def learn(self, dy: Array, h: Array, z: Array) -> Array:
        """Add dB and dA, for rows dY (M, O), H (M, r) and X (M, I); return s dY B (M, r)."""
        A, B, s = self.A, self.B, self.scale
        dh = s * (dy @ B.data)
        B.add_grad(dy.T @ h)  # dB = dYᵀ H
        A.add_grad(dh.T @ z)  # dA = (s dY B)ᵀ X
        return dh

    def learn_from(self, G: Array) -> None:
        """Add the same dB and dA from G = dYᵀ X (O, I), the gradient of W: dB = s G Aᵀ, dA = s Bᵀ G."""
        A, B, s = self.A, self.B, self.scale
        B.add_grad(G @ (s * A.data).T)
        A.add_grad((s * B.data).T @ G)

    @property
    def low_rank(self) -> LowRank:
        """Itself: it has the factors."""
        return self

    def delta(self) -> Array:
        """ΔW = s B A, (O, I)."""
        return (self.scale * self.B.data) @ self.A.data

    def change(self, base: Linear) -> Factors:
        """ΔW as its thin factors."""
        return Factors(self.B.data, self.A.data, self.scale)

    def merged(self, base: Linear) -> Linear:
        """A plain Linear with W + ΔW."""
        W = self.delta()
        W += base.weight.dense()
        return Linear(Param(W, trainable=False), base.bias)


@dataclass(eq=False)
class Adapted:
    """A frozen layer with named adapters, of which one or none is active; perhaps merged."""

    base: Any
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    merged: Any = None  # a plain layer next to the base, which is never written

    def __call__(self, x: Array, need: Need = Need.ALL, *how: Any) -> tuple[Array, Back]:
        if self.active is None or self.merged is not None:
            return self.plain(need)(x, need, *how)
        return self.adapters[self.active](self.base, x, need, *how)

    def attend(self, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        """The logits (..., V) of x (..., D): the layer as a tied head."""
        if self.active is None or self.merged is not None:
            return self.plain(need).attend(x, need)
        adapter: Any = self.adapters[self.active]  # an embedding's, which has `attend`
        return adapter.attend(self.base, x, need)

    def plain(self, need: Need) -> Any:
        """The merged layer, or the base; StateError if a merged layer is to be trained."""
        if self.merged is not None and need is not Need.NONE:
            raise StateError("a merged model cannot be trained; unmerge it first")
        return self.base if self.merged is None else self.merged


@dataclass(frozen=True)
class Row:
    """One adapted module: its path, weight shape, rank, scale, kind of adapter and trained parameters."""

    module: str
    shape: tuple[int, ...]
    r: int | None  # None where there are no factors
    scale: float | None
    kind: str
    parameters: int


@report
@dataclass(frozen=True)
class Report:
    """The result of `inject`; prints as a table."""

    rows: tuple[Row, ...]
    base_parameters: int

    @property
    def parameters(self) -> int:
        """All trained parameters."""
        return sum(row.parameters for row in self.rows)

    @property
    def share(self) -> float:
        """Trained parameters divided by those of the base."""
        return self.parameters / self.base_parameters

    def parts(self) -> tuple[Table, str]:
        """The table, and a line with the trained share of all parameters."""
        cells = [
            (w.module, " x ".join(map(str, w.shape)), w.kind,
             *((str(w.r), f"{w.scale:.4g}") if w.r else ("", "")), f"{w.parameters:,}")
            for w in self.rows
        ]  # fmt: skip
        total = f"{self.parameters:,} of {self.base_parameters:,} parameters are trained ({self.share:.2%})"
        return Table(("module", "shape", "adapter", "r", "scale", "parameters"), cells), total


def row_of(path: str, base: Any, adapter: Adapter) -> Row:
    """The report's row for one adapter."""
    pair = adapter.low_rank
    r, scale = (len(pair.A.data), pair.scale) if pair else (None, None)
    weight = next(iter(named_params(base).values()))  # of attention, that of q_proj
    return Row(path, tuple(weight.shape), r, scale, type(adapter).__name__, size(adapter))


def owners(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, layer) of every layer that owns parameters or is adapted; no adapter is in its path."""
    for name, child in children(tree):
        at = f"{path}.{name}" if path else name
        if isinstance(child, Adapted):
            yield at, child
            yield from owners(child.base, at)  # of an adapted attention, its maps
        elif owns(child):
            yield at, child
        else:
            yield from owners(child, at)


def owns(layer: Any) -> bool:
    """Whether it has parameters of its own, as attention has not."""
    return any(isinstance(p, Param) for _, p in children(layer))


def bases(model: Any) -> dict[str, Any]:
    """Path -> layer, without its adapters, of every layer that owns parameters."""
    plain = ((path, layer.base if isinstance(layer, Adapted) else layer) for path, layer in owners(model))
    return {path: layer for path, layer in plain if owns(layer)}


def untie(model: Any) -> None:
    """Make a tied head a separate layer on the same table, as PEFT does when one of the two is adapted."""
    if isinstance(model.model.embed_tokens, Adapted):
        raise StateError("the head is tied to an embedding that has adapters; start from a fresh model")
    model.lm_head = Linear(model.model.embed_tokens.weight)


def inject(model: Any, config: AdapterConfig, *, rng: np.random.Generator, name: str = "default") -> Report:
    """Freeze the model and put a fresh, active adapter beside every target.

    The base is only read. `rng` draws A and, later, the dropout masks. A tied head that is adapted is untied,
    as in PEFT. An error leaves the model as it was: ConfigError for no config or a rank that does not fit,
    MismatchError for a name that matches nothing, InputError for a name in use, StateError for a merged
    model, a tied head whose embedding is already adapted, or an adapter inside of another.
    """
    if isinstance(config, type) or not isinstance(config, AdapterConfig):
        raise ConfigError(f"config is {short(config)}; expected an adapter config, ml.LoraConfig(r=8)")
    check_name(model, name)
    layers = with_head(model, bases(model))
    new = config.fresh(layers, rng)
    check_apart(new, unmerged(model))
    nodes = dict(walk(model)) | layers
    result = Report(tuple(row_of(path, nodes[path], a) for path, a in new.items()), size(layers))
    if "lm_head" in new and model.lm_head is None:
        untie(model)
    attach(model, new, name)
    return result


def check_name(model: Any, name: str) -> None:
    """InputError or StateError unless the model can take an adapter of that name."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name) or name == "__base__":
        raise InputError(f"adapter name is {short(name)}; expected letters, digits, -, _ (not __base__)")
    if any(name in layer.adapters for layer in unmerged(model).values()):
        raise InputError(f"adapter {name!r} is there already; expected a new name")


def check_apart(new: Mapping[str, Adapter], adapted: Mapping[str, Adapted]) -> None:
    """StateError if an adapter would stand inside of another, or around it."""
    for path in new:
        for other in adapted:
            if path.startswith(f"{other}.") or other.startswith(f"{path}."):
                raise StateError(f"{path} cannot be adapted beside {other}; start from a fresh model")


def attach(model: Any, new: Mapping[str, Adapter], name: str) -> None:
    """Put adapters (path -> adapter) next to their layers, under one name, and activate it."""
    layers = dict(walk(model))
    for path, adapter in new.items():
        layer = layers[path]
        if not isinstance(layer, Adapted):
            layer = Adapted(layer)
            replace(model, path, layer)
        layer.adapters[name] = adapter
    set_adapter(model, name)


def adapted(model: Any) -> dict[str, Adapted]:
    """Path -> Adapted of all adapted layers; StateError if there is none."""
    layers = {path: layer for path, layer in owners(model) if isinstance(layer, Adapted)}
    if not layers:
        raise StateError("the model has no adapter; inject one first")
    return layers


def unmerged(model: Any) -> dict[str, Adapted]:
    """Path -> Adapted of all adapted layers, if any; StateError if an adapter is merged."""
    layers = {path: layer for path, layer in owners(model) if isinstance(layer, Adapted)}
    if any(layer.merged is not None for layer in layers.values()):
        raise StateError("the model is merged; unmerge it first")
    return layers


def active(model: Any) -> dict[str, Adapter]:
    """Path -> active adapter of every adapted layer that has one."""
    return {path: layer.adapters[layer.active] for path, layer in adapted(model).items() if layer.active}


def known(model: Any, name: str) -> dict[str, Adapted]:
    """`unmerged`, if an adapter has that name; else MismatchError."""
    names = {n for layer in adapted(model).values() for n in layer.adapters}
    if name not in names:
        raise MismatchError(f"there is no adapter {name!r}; {nearest(name, names)}")
    return unmerged(model)


def set_adapter(model: Any, name: str) -> None:
    """Activate one adapter and train it alone; MismatchError if none has that name, StateError if merged."""
    layers = known(model, name)
    freeze(model)
    for layer in layers.values():
        layer.active = name if name in layer.adapters else None
        if layer.active:
            freeze(layer.adapters[name], keep=lambda _: True)


def merged_layers(model: Any) -> dict[str, Layer]:
    """Path -> base and active adapter as one plain layer; NonFiniteError names one that is not finite."""
    plain, layers = {}, adapted(model)
    with np.errstate(all="ignore"):
        for path, adapter in active(model).items():
            plain[path] = adapter.merged(layers[path].base)
            for name, p in named_params(plain[path]).items():
                if not xp.isfinite(p.dense()).all():
                    raise NonFiniteError(f"{path}.{name} is not finite with ΔW; nothing was merged")
    return plain


def merge(model: Any) -> None:
    """Compute W + ΔW once for every adapted layer, so that the adapter costs nothing (section 4.1).

    The base keeps its weights. StateError if it is merged already; NonFiniteError, or UnsupportedError for an
    adapter that no weight can hold (a bottleneck, a prefix), leaves the model unmerged.
    """
    layers = unmerged(model)
    for path, plain in merged_layers(model).items():
        layers[path].merged = plain


def unmerge(model: Any) -> None:
    """Drop the merged weights: the base is unchanged, bit for bit. StateError if nothing is merged."""
    layers = adapted(model).values()
    if all(layer.merged is None for layer in layers):
        raise StateError("the model is not merged")
    for layer in layers:
        layer.merged = None


def fuse(model: Any) -> None:
    """Make the model a plain one with W + ΔW in its layers and no adapters; errors as in `merge`."""
    plain = merged_layers(model)
    for path, layer in adapted(model).items():
        replace(model, path, plain.get(path, layer.base))
