"""Activation checkpointing: a block keeps what enters its two halves and runs each again in the backward.

Trades time for memory (Chen et al. 2016): one more forward, without the last product of each half, whose
value is not needed again. The dropout generators are rewound, so the gradients are the same bits. A rewrite
of a replica: every block is wrapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..backend import Array
from ..layers import Dropout, Layer, Linear, Need
from ..lora import Adapted
from ..model import Block, Turn, after, residual
from ..ops import Back, back_nothing
from ..tree import replace, walk
from .folded import Folded


@dataclass(eq=False)
class Last:
    """The last linear map of a half: in the second run its value is not needed."""

    layer: Layer
    again: bool = False

    def __call__(self, x: Array, need: Need = Need.ALL) -> tuple[Any, Back]:
        return (0, self.backward(x, need)) if self.again else self.layer(x, need)

    def backward(self, x: Array, need: Need) -> Back:
        """The backward, without the value where that can be skipped."""
        layer = self.layer
        if isinstance(layer, Linear):
            return layer.backward(x, need)
        if isinstance(layer, Adapted) and layer.active and layer.merged is None:
            adapter = layer.adapters[layer.active]
            if isinstance(adapter, Folded):
                return adapter.backward(layer.base, x, need)
        return layer(x, need)[1]


@dataclass(eq=False)
class Recomputed:
    """A block that keeps only what enters its two halves; called like a block."""

    block: Block

    def __call__(
        self, x: Array, turn: Turn | None, need: Need = Need.ALL, cache: Any = None
    ) -> tuple[Array, Back]:
        block = self.block
        attention, mlp = block.self_attn, block.mlp
        last = within(attention).o_proj
        need_a = after(need, [block.input_layernorm, attention])
        x, back_a = half(block.input_layernorm, attention, last, x, need, turn, cache)
        x, back_m = half(block.post_attention_layernorm, mlp, mlp.down_proj, x, need_a)

        def back(dy: Array) -> Array:
            return back_a(back_m(dy))

        return x, back


def half(norm: Any, inner: Any, last: Any, x: Array, need: Need, *how: Any) -> tuple[Array, Back]:
    """x + inner(norm(x)), which runs again in the backward; `last` is its last map."""
    rngs = [node.rng.bit_generator for _, node in walk(inner) if isinstance(node, Dropout)]
    before = [rng.state for rng in rngs]
    y, back_once = residual(norm, inner, x, need, *how)
    if back_once is back_nothing:
        return y, back_nothing

    def back(dy: Array) -> Array:
        states = [rng.state for rng in rngs]
        for rng, state in zip(rngs, before, strict=True):  # the same dropout masks again
            rng.state = state
        last.again = True
        try:
            _, back_again = residual(norm, inner, x, need, *how)
        finally:
            last.again = False
            for rng, state in zip(rngs, states, strict=True):
                rng.state = state
        return back_again(dy)

    return y, back


def within(half: Any) -> Any:
    """A half of a block without what is put around it, a prefix say."""
    return half.base if isinstance(half, Adapted) else half


def recompute(model: Any) -> None:
    """Wrap every block of a replica."""
    for path, block in [(path, node) for path, node in walk(model) if isinstance(node, Block)]:
        attention = within(block.self_attn)
        attention.o_proj = Last(attention.o_proj)
        block.mlp.down_proj = Last(block.mlp.down_proj)
        replace(model, path, Recomputed(block))
