"""LoRA beside an embedding: ΔE = s (B A)ᵀ, seen by the lookup and by a tied head alike.

Here A starts at zero and B at random, as in loralib and PEFT: the first step moves only A.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..backend import Array, scatter_add
from ..layers import Embedding, Factors, Need, Param
from ..ops import Back, rows


@dataclass(eq=False)
class LowRankEmbedding:
    """ΔE = s (B A)ᵀ beside an Embedding E (V, D)."""

    A: Param  # (r, V)
    B: Param  # (D, r)
    scale: float  # s = alpha / r

    def __call__(self, base: Embedding, ids: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        A, B, s = self.A, self.B, self.scale
        y, back_base = base(ids, need)
        h = s * A.data.T[ids]  # (N, T, r)
        y += h @ B.data.T

        def back(dy: Array) -> None:
            dy_ = rows(dy)
            B.add_grad(dy_.T @ rows(h))  # dB = dYᵀ H
            dh = s * (dy_ @ B.data)  # (M, r)
            A.add_grad(scatter_add(A.data.shape[1], ids.reshape(-1), dh).T)
            back_base(dy)

        return y, back

    def attend(self, base: Embedding, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        """logits = x Eᵀ + s (x B) A."""
        A, B, s = self.A, self.B, self.scale
        y, back_base = base.attend(x, need)
        z = rows(x)
        h = s * (z @ B.data)  # (M, r)
        y += (h @ A.data).reshape(y.shape)

        def back(dy: Array) -> Array:
            dy_ = rows(dy)
            dh = s * (dy_ @ A.data.T)  # (M, r)
            A.add_grad(h.T @ dy_)  # dA = Hᵀ dY
            B.add_grad(z.T @ dh)  # dB = Xᵀ (s dY Aᵀ)
            dx = back_base(dy)
            return dx + (dh @ B.data.T).reshape(x.shape) if need is Need.ALL else dx

        return y, back

    @property
    def low_rank(self) -> LowRankEmbedding:
        """Itself."""
        return self

    def delta(self) -> Array:
        """ΔE = s (B A)ᵀ, (V, D)."""
        return self.scale * (self.B.data @ self.A.data).T

    def change(self, base: Embedding) -> Factors:
        """ΔE as its thin factors, transposed."""
        return Factors(self.B.data, self.A.data, self.scale)

    def merged(self, base: Embedding) -> Embedding:
        """A plain Embedding with E + ΔE."""
        return Embedding(Param(base.weight.dense() + self.delta(), trainable=False))
