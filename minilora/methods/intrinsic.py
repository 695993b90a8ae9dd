"""Training in a random subspace of all weights: the measure of intrinsic dimension.

    θ = θ0 + P z, P (D, d) random and fixed, z (d,) trained from 0        dz = Pᵀ dθ
    SAID: θ_i = θ0_i + λ_i (P z)_i, a scale λ_i for each weight i         dλ_i = <(P z)_i, dθ_i>
    Fastfood: P is a stack of blocks H G Π H B / (√D |g|), n x n, with n the power of two from d on

Li et al. 2018; Aghajanyan et al. 2020 (SAID, whose λ are counted in d); Le et al. 2013 (Fastfood). H is
Sylvester's Hadamard matrix, B = diag(±1), Π a permutation, G = diag(g) Gaussian. All columns of a block have
the same norm, and all its rows: those of P have norm 1 where n divides D, and norm 1 in the mean otherwise.
P z and Pᵀ g cost O(D log n) and memory for 3 D numbers, where a dense P takes d D. Stands in for intrinsic.py
of the paper's code, whose backward is not quite the adjoint. Leaves out Le's rescaling of rows, a projection
of its own for each weight, and the bound on generalisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import Array, normal, to_device, xp
from ..errors import ConfigError, StateError, check_int
from ..layers import Param
from ..lora import unmerged
from ..ops import Back
from ..tree import check_trainable, dtype_of, freeze, named_params, size

RADIX = 32  # the largest factor of a Hadamard matrix that is multiplied as a matrix

Projection = Callable[[Array], tuple[Array, Back]]  # z (d,) -> P z (D,), and back: g (D,) -> Pᵀ g (d,)


def sylvester(n: int, dtype: Any) -> Array:
    """The Hadamard matrix (n, n) of ±1, symmetric, n a power of two: entry (i, j) is (-1)^popcount(i & j)."""
    H = np.ones((1, 1))
    while len(H) < n:
        H = np.kron(H, np.array([[1, 1], [1, -1]]))
    return to_device(H, dtype)


def hadamard(x: Array) -> Array:
    """x H for every row of x (m, n), n a power of two, in O(m n log n): H is its own transpose.

    H of a b is the Kronecker product of those of a and b. Each round multiplies the last axis by one factor
    and moves it to the front, so after all rounds the axes are in their order again.
    """
    shape, n = x.shape, x.shape[1]
    left = n
    while left > 1:
        b = min(left, RADIX)
        x = x.reshape(-1, b) @ sylvester(b, x.real.dtype)
        x = x.reshape(-1, n // b, b).swapaxes(1, 2)
        left //= b
    return x.reshape(shape)


@dataclass(frozen=True, eq=False)
class Fastfood:
    """P (D, d) of structured noise, as its blocks: signs ±1, order and g (m, n); m n >= D, n >= d."""

    shape: tuple[int, int]  # D, d
    signs: Array  # of B, (m, n)
    order: Array  # of Π, (m n,): where each entry comes from, in its own block
    g: Array  # of G, over √D |g|, (m, n)

    def __call__(self, z: Array) -> tuple[Array, Back]:
        D, d = self.shape
        blocks = self.signs.shape
        x = xp.zeros(blocks[1], z.dtype)
        x[:d] = z
        y = hadamard(self.signs * x).reshape(-1)[self.order]
        y = hadamard(self.g * y.reshape(blocks)).reshape(-1)

        def back(dy: Array) -> Array:
            full = xp.zeros(y.shape, dy.dtype)
            full[:D] = dy
            moved = xp.empty_like(full)
            moved[self.order] = (self.g * hadamard(full.reshape(blocks))).reshape(-1)
            return (self.signs * hadamard(moved.reshape(blocks))).sum(0)[:d]

        return y[:D], back

    def __deepcopy__(self, memo: Any) -> Fastfood:
        return self  # nothing writes it


@dataclass(frozen=True, eq=False)
class Dense:
    """P (D, d) of Gaussian columns with norm 1, as it is: for small d."""

    P: Array

    def __call__(self, z: Array) -> tuple[Array, Back]:
        P = self.P

        def back(dy: Array) -> Array:
            return dy @ P

        return P @ z, back

    def __deepcopy__(self, memo: Any) -> Dense:
        return self


def fastfood(D: int, d: int, rng: np.random.Generator, dtype: Any = np.float32) -> Fastfood:
    """A random Fastfood P (D, d)."""
    n = 1 << (d - 1).bit_length()
    m = -(-D // n)
    signs = 2 * rng.integers(0, 2, (m, n)) - 1
    order = rng.permuted(np.arange(m * n).reshape(m, n), axis=1).reshape(-1)
    g = rng.standard_normal((m, n))
    g /= math.sqrt(D) * np.linalg.norm(g, axis=1, keepdims=True)
    return Fastfood((D, d), to_device(signs, dtype), to_device(order), to_device(g, dtype))


def dense(D: int, d: int, rng: np.random.Generator, dtype: Any = np.float32) -> Dense:
    """A random dense P (D, d)."""
    P = normal(rng, (D, d), 1.0, dtype)
    P /= xp.sqrt(xp.einsum("ij,ij->j", P, P))
    return Dense(P)


@dataclass(eq=False)
class Subspace:
    """A model at θ = θ0 + λ P z: what `train` and `evaluate` take, with z and λ as all that is trained.

    θ0 are the weights of `base`, which is frozen and never written.
    """

    base: Any
    z: Param  # (d,), or (d - k,) beside k scales
    scales: Param | None  # λ of SAID, (k,): one for each weight of the base, in their order
    project: Projection

    @property
    def config(self) -> Any:
        """That of the base."""
        return self.base.config

    def loss(self, ids: Array, labels: Array, train: bool = False) -> tuple[Array, Back]:
        """As the base's loss at θ; `back` adds to the gradients of z and λ."""
        model, back_model = self.moved(train)
        value, back_loss = model.loss(ids, labels, train)

        def back(d: Any = 1.0) -> None:
            back_loss(d)
            back_model()

        return value, back

    def moved(self, train: bool = False) -> tuple[Any, Callable[[], None]]:
        """A model of its own at θ, trained or frozen; and what takes its gradients back to z and λ."""
        z, scales, params = self.z, self.scales, list(named_params(self.base).values())
        change, back_change = self.project(z.data)  # P z, (D,)
        ends = np.cumsum([p.size for p in params])
        parts = [slice(end - p.size, end) for end, p in zip(ends.tolist(), params, strict=True)]
        factors = [1] * len(params) if scales is None else scales.data
        new: list[Any] = [
            Param(p.data + (c * change[part]).reshape(p.shape), train)
            for p, part, c in zip(params, parts, factors, strict=True)
        ]

        def back() -> None:
            grads = [p.grad.reshape(-1) for p in new]
            if scales is not None:
                scales.add_grad(xp.stack([xp.vdot(change[a], g) for a, g in zip(parts, grads, strict=True)]))
            z.add_grad(back_change(xp.concatenate([c * g for c, g in zip(factors, grads, strict=True)])))

        return deepcopy(self.base, {id(p): q for p, q in zip(params, new, strict=True)}), back


def subspace(
    model: Any,
    d: int,
    *,
    rng: np.random.Generator,
    scales: bool = False,
    draw: Callable[..., Projection] = fastfood,
) -> Subspace:
    """The model, frozen, in a random subspace of d dimensions; with `scales` (SAID) those are among the d.

    `draw(D, d, rng, dtype)` makes P: `fastfood` or `dense`. ConfigError for a d that is no int from 1, or
    with scales from one more than there are weights, to the number of parameters D; StateError for a model
    with adapters or packed weights.
    """
    if unmerged(model):
        raise StateError("the model has adapters; expected a plain one: fuse them, or load it again")
    params, D = named_params(model), size(model)
    check_trainable(params)
    k = len(params) if scales else 0
    if check_int("d", d, 1) <= k or d > D:
        raise ConfigError(f"d is {d}; expected {k + 1} to {D}, of which {k} are scales")
    freeze(model)
    dtype = dtype_of(model)
    return Subspace(
        model,
        Param(xp.zeros(d - k, dtype)),
        Param(xp.ones(k, dtype)) if k else None,
        draw(D, d - k, rng, dtype),
    )
