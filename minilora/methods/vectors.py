"""Vectors alone: VeRA scales what random matrices make, (IA)³ scales what the base makes.

VeRA (Kopiczko et al. 2023, equation 2), A and B random, frozen and the same for all layers:

    y = x Wᵀ + b ∘ ((d ∘ (x Aᵀ)) Bᵀ)        ΔW = diag(b) B diag(d) A        d (r,), b (O,)

With U = X Aᵀ and G = B ∘ (dYᵀ U), (O, r), one product gives both gradients:

    db = G d        dd = Gᵀ b        dX = dY W + (d ∘ ((b ∘ dY) B)) A

(IA)³ (Liu et al. 2022, section 3.3) scales keys, values and the inner activations of the MLP:

    y = l ∘ (x Wᵀ + bias)        or, on the way in,        y = (l ∘ x) Wᵀ + bias

VeRA starts at b = 0 and (IA)³ at l = 1, which is the base; both can be merged. Stands in for PEFT's
tuners/vera and tuners/ia3; leaves out dropout and files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import Array, uniform, xp
from ..digests import of_arrays
from ..errors import ConfigError, check_float, check_int
from ..layers import Adapter, Factors, Linear, Need, Param
from ..model import after
from ..ops import Back, rows
from ..targets import check_targets, find_linears, names, resolve


@dataclass(eq=False)
class VeRA:
    """ΔW = diag(b) B diag(d) A beside a Linear, of whose I inputs and O outputs A and B may have more."""

    A: Array  # (r, I or more), random; no Param, since an adapter's are all trained
    B: Array  # (O or more, r)
    digest: str  # of A and B, by which a run that resumes knows them
    d: Param  # (r,)
    b: Param  # (O,)

    def __call__(self, base: Linear, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        A, B = self.matrices(base)
        d, b, shape = self.d, self.b, x.shape
        y, back_base = base(x, need)
        u = rows(x) @ A.T  # (M, r)
        y += (b.data * ((d.data * u) @ B.T)).reshape(y.shape)

        def back(dy: Array) -> Array:
            dy_ = rows(dy)
            G = B * (dy_.T @ u)  # (O, r)
            b.add_grad(G @ d.data)
            d.add_grad(b.data @ G)
            dx = back_base(dy)
            if need is Need.ALL:
                du = d.data * ((b.data * dy_) @ B)
                dx += (du @ A).reshape(shape)
            return dx

        return y, back

    def matrices(self, base: Linear) -> tuple[Array, Array]:
        """A (r, I) and B (O, r): as much of them as the base has inputs and outputs."""
        O, I = base.weight.shape  # noqa: E741
        return self.A[:, :I], self.B[:O]

    @property
    def low_rank(self) -> None:
        """There are no trained factors."""
        return None

    def change(self, base: Linear) -> Factors:
        """ΔW as its thin factors."""
        A, B = self.matrices(base)
        return Factors(self.b.data[:, None] * B, self.d.data[:, None] * A, 1.0)

    def merged(self, base: Linear) -> Linear:
        """A plain Linear with W + ΔW."""
        B, A, _ = self.change(base)
        return Linear(Param(base.weight.dense() + B @ A, trainable=False), base.bias)


@dataclass(frozen=True)
class VeraConfig:
    """What to adapt with VeRA, and how: `r` may be large, since only d (r,) and b (O,) are trained."""

    r: int = 256
    targets: str | re.Pattern[str] | Sequence[str] = "all-linear"
    d_initial: float = 0.1

    def __post_init__(self) -> None:
        check_int("r", self.r, 1)
        check_float("d_initial", self.d_initial, -math.inf, math.inf, open_low=True)
        if not self.d_initial:
            raise ConfigError("d_initial is 0; expected another number, since b is 0, too")
        check_targets(self.targets)

    def fresh(self, layers: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Adapter]:
        """Path -> a fresh adapter for every target; all share A and B, of the widest and the tallest.

        Their entries are U(-√(6/I), √(6/I)) for I columns (He et al. 2015; the paper's section 3.3).
        """
        weights = {path: layers[path].weight for path in find_linears(layers, self.targets)}
        first = next(iter(weights.values()))

        def draw(*shape: int) -> Array:
            return uniform(rng, shape, math.sqrt(6 / shape[1]), first.dtype)

        A = draw(self.r, max(W.shape[1] for W in weights.values()))
        B = draw(max(W.shape[0] for W in weights.values()), self.r)
        digest = of_arrays([("A", A), ("B", B)])
        return {
            path: VeRA(A, B, digest, Param(xp.full(self.r, self.d_initial, first.dtype)),
                       Param(xp.zeros(W.shape[0], first.dtype)))
            for path, W in weights.items()
        }  # fmt: skip


@dataclass(eq=False)
class ScaledOutputs:
    """W' = diag(l) W beside a Linear, whose bias is scaled, too: the scale of keys and values."""

    scale: Param  # l, (O,)

    def __call__(self, base: Linear, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        s = self.scale
        y, back_base = base(x, need)

        def back(dy: Array) -> Array:
            s.add_grad(xp.einsum("mo,mo->o", rows(dy), rows(y)))
            return back_base(s.data * dy)

        return s.data * y, back

    @property
    def low_rank(self) -> None:
        """There are no factors."""
        return None

    def change(self, base: Linear) -> Array:
        """W' - W, (O, I)."""
        return (self.scale.data - 1)[:, None] * base.weight.dense()

    def merged(self, base: Linear) -> Linear:
        """A plain Linear with diag(l) W and l ∘ bias."""
        s, b = self.scale.data, base.bias
        return Linear(
            Param(s[:, None] * base.weight.dense(), trainable=False),
            None if b is None else Param(s * b.data, trainable=False),
        )


@dataclass(eq=False)
class ScaledInputs:
    """W' = W diag(l) beside a Linear: the scale of the MLP's inner activations, on their way down."""

    scale: Param  # l, (I,)

    def __call__(self, base: Linear, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        s = self.scale
        need_z = after(need, self)
        y, back_base = base(s.data * x, need_z)

        def back(dy: Array) -> Array:
            dz = back_base(dy)
            if need_z is Need.ALL:
                s.add_grad(xp.einsum("mi,mi->i", rows(dz), rows(x)))
            return s.data * dz if need is Need.ALL else None

        return y, back

    @property
    def low_rank(self) -> None:
        """There are no factors."""
        return None

    def change(self, base: Linear) -> Array:
        """W' - W, (O, I)."""
        return base.weight.dense() * (self.scale.data - 1)

    def merged(self, base: Linear) -> Linear:
        """A plain Linear with W diag(l)."""
        return Linear(Param(base.weight.dense() * self.scale.data, trainable=False), base.bias)


@dataclass(frozen=True)
class IA3Config:
    """What to scale with (IA)³: the outputs of the `targets`, but the inputs of those in `feedforward`.

    Unless given, these are the targets called down_proj.
    """

    targets: str | re.Pattern[str] | Sequence[str] = ("k_proj", "v_proj", "down_proj")
    feedforward: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_targets(self.targets)
        if self.feedforward is not None:
            names("feedforward", self.feedforward)

    def fresh(self, layers: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Adapter]:
        """Path -> ones for every target; ConfigError if one of `feedforward` is no target."""
        targets = find_linears(layers, self.targets)
        inner = [path for path in targets if path.endswith("down_proj")]
        if self.feedforward is not None:
            inner = resolve("feedforward", names("feedforward", self.feedforward), list(layers))
        if other := sorted(set(inner) - set(targets)):
            raise ConfigError(f"feedforward: {other[0]} is no target; expected some of the targets")
        new: dict[str, Adapter] = {}
        for path in targets:
            O, I = layers[path].weight.shape  # noqa: E741
            kind, n = (ScaledInputs, I) if path in inner else (ScaledOutputs, O)
            new[path] = kind(Param(xp.ones(n, layers[path].weight.dtype)))
        return new
