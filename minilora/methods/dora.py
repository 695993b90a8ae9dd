"""DoRA: a direction that LoRA moves, and a magnitude for each output (Liu et al. 2024, equation 5).

    W' = m V / |V| with V = W + ΔW, one norm |V| per output row; m (O,) starts at |W|

With z = x Vᵀ and g = m / |V|, y = g z + b. The gradient through |V| is exact; `detach` leaves it out, as
the paper's section 4.3 and PEFT do. Beside a packed W, V is not kept but formed again for the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..backend import Array, xp
from ..layers import Linear, Need, Param
from ..lora import LowRank
from ..ops import Back, rows


@dataclass(eq=False)
class DoRA:
    """W' = m V / |V| beside a Linear, with V = W + ΔW."""

    low_rank: LowRank
    magnitude: Param  # m (O,)
    detach: bool = False

    def __call__(self, base: Linear, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        A, B, s, m = self.low_rank.A, self.low_rank.B, self.low_rank.scale, self.magnitude
        V = self.direction(base)  # (O, I)
        kept = None if base.weight.packed else V  # else each layer would keep its base decoded
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
            V = self.direction(base) if kept is None else kept
            self.low_rank.learn(dz, h, x_)
            if not self.detach:  # d|V| = -m dm / |V|, and the gradient of |V| is V / |V|
                dV = (-g * dm / n)[:, None] * V
                B.add_grad(s * (dV @ A.data.T))
                A.add_grad(s * (B.data.T @ dV))
            return (dz @ V).reshape(x.shape) if need is Need.ALL else None

        y = y.reshape(*x.shape[:-1], -1)
        return y, Linear.back_to_bias(bias, back) if bias is not None and bias.trainable else back

    def direction(self, base: Linear) -> Array:
        """V = W + ΔW, (O, I)."""
        return base.weight.dense() + self.low_rank.delta()

    def change(self, base: Linear) -> Array:
        """W' - W, (O, I): of full rank, since each row is scaled separately."""
        return self.merged(base).weight.dense() - base.weight.dense()

    def merged(self, base: Linear) -> Linear:
        """A plain Linear with m V / |V|."""
        V = self.direction(base)
        return Linear(Param((self.magnitude.data / row_norms(V))[:, None] * V, False), base.bias)


def row_norms(V: Array) -> Array:
    """The Euclidean norm (O,) of each row of V (O, I)."""
    return xp.sqrt(xp.einsum("oi,oi->o", V, V))
