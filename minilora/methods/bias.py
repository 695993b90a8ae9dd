"""A bias that is trained in the place of the base's, beside another adapter or alone: PEFT's `bias`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..backend import Array, xp
from ..layers import Adapter, Linear, Need, Pair, Param
from ..ops import Back


@dataclass(eq=False)
class WithBias:
    """A bias b (O,) in the place of the base's."""

    adapter: Adapter | None
    bias: Param  # (O,)

    def __call__(self, base: Linear, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        base = Linear(base.weight, self.bias)
        return self.adapter(base, x, need) if self.adapter else base(x, need)

    @property
    def low_rank(self) -> Pair | None:
        """The factors of the other adapter, if there is one."""
        return self.adapter.low_rank if self.adapter else None

    def change(self, base: Linear) -> Any:
        """ΔW (O, I) of the other adapter; zeros if there is none."""
        return self.adapter.change(base) if self.adapter else xp.zeros(base.weight.shape, base.weight.dtype)

    def merged(self, base: Linear) -> Linear:
        """A plain, frozen Linear with a copy of the bias."""
        weight = self.adapter.merged(base).weight if self.adapter else base.weight  # type: ignore[attr-defined]
        return Linear(weight, Param(self.bias.data.copy(), trainable=False))
