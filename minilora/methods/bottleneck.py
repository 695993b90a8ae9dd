"""The bottleneck adapter: a small network of its own behind a linear map (Houlsby et al. 2019, section 2.1).

    y' = y + f(y Dᵀ + c) Uᵀ + e        y = x Wᵀ, D (m, O), U (O, m), f the gelu, m much less than O

Behind the last map of attention and that of the MLP it is Houlsby's; behind the MLP's alone, Pfeiffer's
(Pfeiffer et al. 2020), with half as many parameters. U, c and e start at zero, which is the base. f is not
linear, so no weight holds it: it can't be merged, and costs its time at inference, too. Stands in for
AdapterHub's adapters; leaves out their norms, parallel forms and files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ..backend import Array, uniform, xp
from ..errors import UnsupportedError, check_int
from ..layers import Adapter, Linear, Need, Param
from ..model import after
from ..ops import Back, gelu
from ..targets import check_targets, find_linears

HOULSBY, PFEIFFER = ("o_proj", "down_proj"), ("down_proj",)


@dataclass(eq=False)
class Bottleneck:
    """y + up(gelu(down(y))) on the output y of a Linear."""

    down: Linear  # (m, O)
    up: Linear  # (O, m)

    def __call__(self, base: Linear, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        y, back_base = base(x, need)
        h, back_down = self.down(y, need)
        a, back_a = gelu(h)  # (..., m)
        need_a = after(need, self.down)
        z, back_up = self.up(a, need_a)

        def back(dy: Array) -> Array:
            if need_a is not Need.ALL:  # it is frozen, and so is all before it
                return None
            d = back_down(back_a(back_up(dy)))
            return back_base(dy + d) if need is Need.ALL else None

        return y + z, back

    @property
    def low_rank(self) -> None:
        """There are no factors of a ΔW."""
        return None

    def change(self, base: Linear) -> None:
        """None: what it does is no matrix."""
        return None

    def merged(self, base: Linear) -> NoReturn:
        """UnsupportedError."""
        raise UnsupportedError("a bottleneck adapter is not linear and cannot be merged; use it as it is")


@dataclass(frozen=True)
class BottleneckConfig:
    """A bottleneck of `width` m behind every target: HOULSBY's or PFEIFFER's, or any linear maps."""

    width: int = 16
    targets: str | re.Pattern[str] | Sequence[str] = HOULSBY

    def __post_init__(self) -> None:
        check_int("width", self.width, 1)
        check_targets(self.targets)

    def fresh(self, layers: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Adapter]:
        """Path -> a fresh adapter for every target, with D ~ U(-1/√O, 1/√O) and zeros."""
        new: dict[str, Adapter] = {}
        for path in find_linears(layers, self.targets):
            W, m = layers[path].weight, self.width
            O = W.shape[0]  # noqa: E741
            D = uniform(rng, (m, O), 1 / math.sqrt(O), W.dtype)
            c, U, e = (xp.zeros(shape, W.dtype) for shape in (m, (O, m), O))
            new[path] = Bottleneck(Linear(Param(D), Param(c)), Linear(Param(U), Param(e)))
        return new
