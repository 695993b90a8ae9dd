"""Layers with parameters: Linear, RMSNorm, LayerNorm, Embedding; and the contract that every layer keeps.

For y = x Wᵀ + b the gradients are dW = dYᵀ X, db = sum of dY, dx = dY W. A frozen weight costs only
dx: its `back` is one line, and no closure holds x. Stands in for torch.nn's modules; leaves out
hooks, buffers and modes: a layer is a dataclass of parameters and layers, and its attribute path is its
name, which is Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from .backend import Array, scatter_add, to_device, xp
from .ops import Back, back_nothing, back_same, rms_norm, rows


class Need(Enum):
    """Which gradients a caller needs: of trained parameters alone, of x as well, or none (inference)."""

    NONE = auto()
    WEIGHTS = auto()
    ALL = auto()


class Layer(Protocol):
    """y, back = layer(x, need): the value, and the backward that takes dy and returns dx.

    `back` runs at most once. It adds to the gradient of every trained parameter, and returns dx if
    `need` is ALL; if `need` is NONE there is no gradient to ask for.
    """

    def __call__(self, x: Array, need: Need = Need.ALL, /) -> tuple[Array, Back]: ...


class Table(Layer, Protocol):
    """An embedding: a lookup, and the logits under the same table."""

    weight: Param  # (V, D)

    def attend(self, x: Array, need: Need = Need.ALL, /) -> tuple[Array, Back]: ...


class Param:
    """A weight, whether it is trained, and the gradient summed up so far (None: no gradient yet).

    `data` is stored, and `dense()` is the weight. Here they are one array; a packed weight stores fewer bits,
    decodes them anew at each `dense()`, and cannot be trained.
    """

    __slots__ = ("data", "grad", "trainable")
    packed = False

    def __init__(self, data: Any, trainable: bool = True) -> None:
        self.data, self.trainable = data, trainable
        self.grad: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.data.shape

    @property
    def size(self) -> int:
        """How many numbers the weight has."""
        return self.data.size

    @property
    def dtype(self) -> Any:
        """The dtype of the weight."""
        return self.data.dtype

    def dense(self) -> Array:
        """The weight as an array; a packed one is decoded here."""
        return self.data

    def add_grad(self, g: Array) -> None:
        """Add one contribution; a weight that is used twice receives two."""
        if self.grad is None:
            self.grad = g
        else:
            self.grad += g


class Pair(Protocol):
    """Trained factors A and B with ΔW = s B A (for an embedding, its transpose)."""

    A: Param
    B: Param
    scale: float


class Factors(NamedTuple):
    """ΔW = scale B A, thin: B (O, r) and A (r, I)."""

    B: Array
    A: Array
    scale: float


class Adapter(Protocol):
    """A change of a frozen layer: the contract of LowRank and of everything in methods/.

    An embedding's adapter also has `attend(base, x, need)`, as a Table has; that of attention also gets
    `turn` and `cache`.
    """

    def __call__(self, base: Any, x: Array, need: Need = Need.ALL, /) -> tuple[Array, Back]:
        """The changed layer's output and backward, as a Layer's; `base` is the layer that it changes."""

    def merged(self, base: Any, /) -> Layer:
        """A plain, frozen layer that does the same; UnsupportedError where there is none."""

    def change(self, base: Any, /) -> Factors | Array | None:
        """ΔW: thin factors if it is their product, else dense (O, I); None where there is no matrix."""

    @property
    def low_rank(self) -> Pair | None:
        """The factors A and B in it, if it has any."""


@runtime_checkable
class AdapterConfig(Protocol):
    """What to adapt, and how: it makes the adapters, so that nothing here knows their kinds."""

    def fresh(self, layers: Mapping[str, Any], rng: np.random.Generator, /) -> dict[str, Adapter]:
        """Path -> a fresh adapter, for those of a model's `layers` (path -> base layer) that get one."""


@dataclass(eq=False)
class Linear:
    """y = x Wᵀ + b: x (..., I) -> y (..., O)."""

    weight: Param  # (O, I)
    bias: Param | None = None  # (O,)

    def __call__(self, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        y = rows(x) @ self.weight.dense().T
        if self.bias is not None:
            y += self.bias.data
        return y.reshape(*x.shape[:-1], -1), self.backward(x, need)

    def backward(self, x: Array, need: Need) -> Back:
        """The backward without the value."""
        weight, bias = self.weight, self.bias
        back = self.back_to_x(x.shape) if need is Need.ALL else back_nothing
        if weight.trainable:
            back = self.back_to_weight(rows(x), back)
        if bias is not None and bias.trainable:
            back = self.back_to_bias(bias, back)
        return back

    def back_to_x(self, shape: tuple[int, ...]) -> Back:
        """dx = dY W."""
        weight = self.weight

        def back(dy: Array) -> Array:
            return (rows(dy) @ weight.dense()).reshape(shape)

        return back

    def back_to_weight(self, x: Array, then: Back) -> Back:
        """dW = dYᵀ X."""
        weight = self.weight

        def back(dy: Array) -> Array:
            weight.add_grad(rows(dy).T @ x)
            return then(dy)

        return back

    @staticmethod
    def back_to_bias(bias: Param, then: Back) -> Back:
        """db = the sum of dY over all rows."""

        def back(dy: Array) -> Array:
            bias.add_grad(rows(dy).sum(0))
            return then(dy)

        return back


@dataclass(eq=False)
class RMSNorm:
    """y = w * x / sqrt(mean(x²) + eps) over the last axis, of width D."""

    weight: Param  # (D,)
    eps: float = 1e-5

    def __call__(self, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        w = self.weight
        n, back_n = rms_norm(x, self.eps)

        def back_frozen(dy: Array) -> Array:
            return back_n(dy * w.data)

        def back_trained(dy: Array) -> Array:
            w.add_grad(xp.einsum("mi,mi->i", rows(dy), rows(n)))
            return back_n(dy * w.data)

        return n * w.data, back_trained if w.trainable else back_frozen


@dataclass(eq=False)
class LayerNorm:
    """y = w * (x - mean) / sqrt(var + eps) + b over the last axis (Ba et al. 2016)."""

    weight: Param  # (D,)
    bias: Param  # (D,)
    eps: float = 1e-5

    def __call__(self, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        w, b = self.weight, self.bias
        n, back_n = rms_norm(x - x.mean(-1, keepdims=True), self.eps)

        def back_x(dy: Array) -> Array:
            dc = back_n(dy * w.data)
            return dc - dc.mean(-1, keepdims=True)

        def back_w(dy: Array) -> Array:
            w.add_grad(xp.einsum("mi,mi->i", rows(dy), rows(n)))
            return back_x(dy)

        back = back_w if w.trainable else back_x
        return n * w.data + b.data, Linear.back_to_bias(b, back) if b.trainable else back


@dataclass(eq=False)
class Embedding:
    """A table E (V, D): ids (...) of ints -> rows E[ids] (..., D); as a tied head, x -> x Eᵀ."""

    weight: Param  # (V, D)

    def __call__(self, ids: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        weight = self.weight
        table = weight.dense()
        V, D = table.shape

        def back_trained(dy: Array) -> None:
            weight.add_grad(scatter_add(V, ids.reshape(-1), dy.reshape(-1, D)))

        return table[ids], back_trained if weight.trainable else back_nothing

    def attend(self, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        """The logits (..., V) of x (..., D) under the same table: the tied head."""
        return Linear(self.weight)(x, need)


@dataclass(eq=False)
class Dropout:
    """Zero each entry of x with probability p and scale the others by 1/(1-p), when training."""

    p: float
    rng: np.random.Generator

    def __call__(self, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        if need is Need.NONE or self.p == 0:
            return x, back_same
        keep = to_device((self.rng.random(x.shape) >= self.p) / (1 - self.p), x.real.dtype)

        def back(dy: Array) -> Array:
            return dy * keep

        return x * keep, back
