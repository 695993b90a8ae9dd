"""W + ΔW in one array, while the factors stay what they are: fewer operations where there are many rows.

    y = x (W + ΔW)ᵀ        dx = dY (W + ΔW)        dA and dB as ever, from the thin factors

A rewrite of a replica: LowRank adapters are swapped for Folded ones, and back. The function is the same, up
to rounding; deleting this file changes times and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..backend import Array
from ..layers import Linear, Need, Param
from ..lora import Adapted, LowRank
from ..methods.bias import WithBias
from ..ops import Back, rows
from ..tree import put, walk


@dataclass(eq=False)
class Folded:
    """A LowRank adapter whose W + ΔW is formed already."""

    adapter: LowRank
    weight: Param  # W + ΔW (O, I), frozen

    def __call__(self, base: Linear, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        return Linear(self.weight, base.bias)(x, Need.NONE)[0], self.backward(base, x, need)

    def backward(self, base: Linear, x: Array, need: Need) -> Back:
        """The backward without the value."""
        adapter, z = self.adapter, rows(x)  # (M, I)
        back_x = Linear(self.weight, base.bias).backward(x, need)

        def through_factors(dy: Array) -> Array:
            adapter.learn(rows(dy), adapter.scale * (z @ adapter.A.data.T), z)
            return back_x(dy)

        def through_G(dy: Array) -> Array:
            adapter.learn_from(rows(dy).T @ z)
            return back_x(dy)

        if need is Need.NONE:
            return back_x
        return through_G if through_weight(adapter, len(z)) else through_factors


class Place(NamedTuple):
    """The place of an active LowRank in a tree, and its base."""

    parent: Any
    name: str
    adapter: LowRank
    base: Linear


def places(model: Any) -> list[Place]:
    """The places of all active LowRank adapters without dropout on dense weights; merged layers have none."""
    out = []
    for _, layer in walk(model):
        if isinstance(layer, Adapted) and layer.active and layer.merged is None:
            parent: Any = layer.adapters
            name, adapter = layer.active, parent[layer.active]
            if isinstance(adapter, WithBias):
                parent, name, adapter = adapter, "adapter", adapter.adapter
            plain = isinstance(adapter, LowRank) and adapter.dropout is None
            if plain and not layer.base.weight.packed:  # else W + ΔW would keep the base decoded
                out.append(Place(parent, name, adapter, layer.base))
    return out


def pays(adapter: LowRank, M: int) -> bool:
    """Whether M rows are cheaper with W + ΔW, formed for them, than with W and the factors apart.

    Forming it costs 2 O I r operations, and the time of as many again to write and read O I numbers. It
    saves 2 M (O + I) r: H Bᵀ in the forward and (s dY B) A in the backward.
    """
    O, I = len(adapter.B.data), adapter.A.data.shape[1]  # noqa: E741
    return M * (O + I) > 2 * O * I


def through_weight(adapter: LowRank, M: int) -> bool:
    """Whether M rows give dA and dB with fewer operations through G = dYᵀ X, the gradient of W.

    That takes 2 M O I for G and 4 O I r for the two; H, dB, s dY B and dA take 4 M (O + I) r.
    """
    r, (O, I) = len(adapter.A.data), (len(adapter.B.data), adapter.A.data.shape[1])  # noqa: E741
    return M * O * I + 2 * O * I * r < 2 * M * (O + I) * r


@contextlib.contextmanager
def folded(replicas: Sequence[Sequence[Place]], M: int) -> Iterator[None]:
    """Within the context replicas of one model share each W + ΔW, formed once, where it pays for M rows.

    `replicas` holds the `places` of each. A and B must not change within the context.
    """
    swapped = [same for same in zip(*replicas, strict=True) if pays(same[0].adapter, M)]
    try:
        for same in swapped:
            weight = same[0].adapter.merged(same[0].base).weight
            for place in same:
                put(place.parent, place.name, Folded(place.adapter, weight))
        yield
    finally:
        for place in (place for same in swapped for place in same):
            put(place.parent, place.name, place.adapter)
