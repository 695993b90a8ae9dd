"""LoRA that starts at factors of W or of its gradient: PiSSA, OLoRA, LoRA-GA. The start is taken off again.

    y = x Wᵀ + s (x Aᵀ) Bᵀ - s (x A₀ᵀ) B₀ᵀ        ΔW = s (B A - B₀ A₀): zero at the start, of rank 2r at most

    PiSSA      s B₀ A₀ = U S Vᵀ, the r largest singular values of W; each factor has √(S / s)
    OLoRA      B₀ A₀ = Q R, the first r columns and rows of the QR factorization of W
    LoRA-GA    A₀ = c V₁ᵀ and B₀ = c U₂, the first r right and the next r left singular vectors of the
               gradient of W; c = O^¼ / √γ, O the outputs of W

Meng et al. 2024; Büyükakyüz 2024; Wang et al. 2024. Stands in for these values of PEFT's init_lora_weights,
which write W - s B₀ A₀ over W. Here W is only read, and `as_lora` makes the plain LoRA that belongs beside
it. Leaves out randomized decompositions and LoRA-GA's other directions and scales. (PEFT multiplies its B₀ by
the gradient's singular values, too, which the paper does not.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import Array, xp
from ..digests import of_arrays
from ..errors import ConfigError, MismatchError, nearest
from ..layers import Adapter, Factors, Linear, Need, Param
from ..lora import LowRank, adapted, bases, unmerged
from ..ops import Back, rows
from ..tree import freeze, replica
from .lora_config import LoraConfig

# (path, W (O, I), r, s) -> B₀ (O, r) and A₀ (r, I)
Start = Callable[[str, Array, int, float], tuple[Array, Array]]


@dataclass(eq=False)
class Started:
    """ΔW = s (B A - B₀ A₀) beside a Linear: A and B are trained, B₀ and A₀ are what they were at first."""

    low_rank: LowRank
    B0: Array  # (O, r); no Param, since an adapter's are all trained
    A0: Array  # (r, I)
    digest: str  # of B₀ and A₀, by which a run that resumes knows its start

    def __call__(self, base: Linear, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        A0, B0, s = self.A0, self.B0, self.low_rank.scale
        y, back_low_rank = self.low_rank(base, x, need)
        y -= (s * (rows(x) @ A0.T) @ B0.T).reshape(y.shape)

        def back(dy: Array) -> Array:
            dx = back_low_rank(dy)
            if need is Need.ALL:
                dx -= (s * (rows(dy) @ B0) @ A0).reshape(x.shape)
            return dx

        return y, back

    def plain(self) -> LowRank:
        """A LowRank of rank 2r with the same ΔW = s [B, -B₀] [A; A₀]."""
        pair = self.low_rank
        B, A = xp.concatenate([pair.B.data, -self.B0], 1), xp.concatenate([pair.A.data, self.A0])
        return LowRank(Param(A), Param(B), pair.scale)

    def change(self, base: Linear) -> Factors:
        """ΔW as its thin factors, of rank 2r."""
        return self.plain().change(base)

    def merged(self, base: Linear) -> Linear:
        """A plain Linear with W + ΔW."""
        return self.plain().merged(base)


@dataclass(frozen=True)
class StartConfig:
    """A LoRA that starts where `start` says: StartConfig(LoraConfig(r=8), pissa)."""

    config: LoraConfig
    start: Start

    def fresh(self, layers: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Adapter]:
        """Path -> a fresh adapter for every target; ConfigError unless all are LoRA on linear maps."""
        new: dict[str, Adapter] = {}
        for path, adapter in self.config.fresh(layers, rng).items():
            if not isinstance(adapter, LowRank):
                raise ConfigError(
                    f"the adapter of {path} is {type(adapter).__name__}; expected LoRA on linear maps alone"
                )
            W, (A, B) = layers[path].weight, (adapter.A, adapter.B)
            start = self.start(path, W.dense().astype(xp.float64), len(A.data), adapter.scale)
            B0, A0 = (factor.astype(W.dtype) for factor in start)
            B.data, A.data = B0.copy(), A0.copy()
            new[path] = Started(adapter, B0, A0, of_arrays([("B0", B0), ("A0", A0)]))
        return new


def pissa(path: str, W: Array, r: int, s: float) -> tuple[Array, Array]:
    """The principal part of W, half of each singular value in each factor (Meng et al. 2024)."""
    U, S, Vt = xp.linalg.svd(W, full_matrices=False)
    root = xp.sqrt(S[:r] / s)
    return U[:, :r] * root, root[:, None] * Vt[:r]


def olora(path: str, W: Array, r: int, s: float) -> tuple[Array, Array]:
    """Orthonormal columns that span the first r of W, and their coefficients (Büyükakyüz 2024)."""
    Q, R = xp.linalg.qr(W)
    return Q[:, :r], R[:r]


def lora_ga(gradients: Mapping[str, Array], gamma: float = 16.0) -> Start:
    """The start for these gradients (path -> (O, I)) of W, whose first step is most like theirs.

    Wang et al. 2024, section 3, with s = alpha / sqrt(r). The start raises MismatchError for a path without
    a gradient, and ConfigError if 2r is more than O or I.
    """

    def start(path: str, W: Array, r: int, s: float) -> tuple[Array, Array]:
        if path not in gradients:
            raise MismatchError(f"{path} has no gradient; {nearest(path, gradients)}")
        if 2 * r > min(W.shape):
            raise ConfigError(
                f"r is {r} for {path} of shape {W.shape}; LoRA-GA takes at most {min(W.shape) // 2}"
            )
        U, _, Vt = xp.linalg.svd(gradients[path].astype(xp.float64), full_matrices=False)
        c = len(W) ** 0.25 / math.sqrt(gamma)
        return c * U[:, r : 2 * r], c * Vt[:r]

    return start


def weight_gradients(model: Any, ids: Array, labels: Array) -> dict[str, Array]:
    """Path -> the gradient (O, I) of every linear map's weight for one batch; the model stays as it is.

    All gradients are held at once. Errors as in `Llama.loss`.
    """
    model = replica(model)
    freeze(model)
    maps = {path: layer for path, layer in bases(model).items() if isinstance(layer, Linear)}
    for layer in maps.values():
        layer.weight.trainable = True
    _, back = model.loss(ids, labels, train=True)
    back()
    return {path: layer.weight.grad for path, layer in maps.items() if layer.weight.grad is not None}


def as_lora(model: Any) -> None:
    """Make every active Started adapter a plain LoRA of rank 2r with the same ΔW: to save, not to train.

    The half that is taken off would be trained, too. StateError if the model has no adapter, or is merged.
    """
    adapted(model)
    for layer in unmerged(model).values():
        name = layer.active
        if name and isinstance(adapter := layer.adapters[name], Started):
            layer.adapters[name] = adapter.plain()
