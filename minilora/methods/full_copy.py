"""A full copy of a layer, trained in its place beside LoRA: PEFT's modules_to_save."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from ..backend import Array
from ..layers import Need
from ..ops import Back
from ..tree import freeze, unpack


@dataclass(eq=False)
class FullCopy:
    """A layer of the same kind as the base, all of it trained."""

    layer: Any

    @classmethod
    def of(cls, base: Any) -> FullCopy:
        """A fresh copy of a layer, whose packed weights are decoded once."""
        layer = deepcopy(base)
        unpack(layer)
        return cls(layer)

    def __call__(self, base: Any, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        return self.layer(x, need)

    def attend(self, base: Any, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        """The copy as a tied head."""
        return self.layer.attend(x, need)

    @property
    def low_rank(self) -> None:
        """There are no factors."""
        return None

    def change(self, base: Any) -> Array | None:
        """W' - W of a matrix; None for a norm."""
        W = base.weight.dense()
        return self.layer.weight.dense() - W if W.ndim == 2 else None

    def merged(self, base: Any) -> Any:
        """A frozen copy of the copy."""
        layer = deepcopy(self.layer)
        freeze(layer)
        return layer
