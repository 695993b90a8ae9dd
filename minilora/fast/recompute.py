"""Activation checkpointing: what a block does not keep, it computes again in the backward.

Trades time for memory. "full": a block keeps what enters its two halves and runs each again, without the last
product of each half, whose value is not needed again (Chen et al. 2016). "selective": it keeps the results of
its products with weights, and computes what is cheap again: attention's e = exp(scores), the MLP's norm and
SwiGLU (after Korthikanti et al. 2022, who take attention alone). The dropout generators are rewound, so the
gradients are the same bits. A rewrite of a replica: every block is wrapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..backend import Array, xp
from ..errors import ConfigError, short
from ..layers import Dropout, Layer, Linear, Need
from ..lora import Adapted, LowRank
from ..model import Block, Turn, after, residual
from ..ops import Back, attention, back_nothing
from ..tree import replace, walk
from .folded import Folded

HOW = ("selective", "full")


@dataclass(eq=False)
class Known:
    """A linear map whose value in the second run is known, or not needed."""

    layer: Layer
    keep: bool = False  # the first run's value for the second
    value: Any = 0  # 0 stands for a value that nobody reads
    again: bool = False

    def __call__(self, x: Array, need: Need = Need.ALL) -> tuple[Any, Back]:
        if self.again:
            return self.value, self.backward(x, need)
        y, back = self.layer(x, need)
        if self.keep:
            self.value = y
        return y, back

    def backward(self, x: Array, need: Need) -> Back:
        """The backward, without the value where that can be skipped."""
        layer = self.layer
        if isinstance(layer, Linear):
            return layer.backward(x, need)
        if isinstance(layer, Adapted) and layer.active and layer.merged is None:
            adapter = layer.adapters[layer.active]
            if isinstance(adapter, Folded):
                return adapter.backward(layer.base, x, need)
            if isinstance(adapter, LowRank) and isinstance(layer.base, Linear):
                return adapter(Unset(layer.base.weight, layer.base.bias), x, need)[1]
        return layer(x, need)[1]


class Unset(Linear):
    """A Linear without its product, for an adapter that runs for the sake of its backward."""

    def __call__(self, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        return xp.zeros((*x.shape[:-1], self.weight.shape[0]), x.dtype), self.backward(x, need)


@dataclass(eq=False)
class WithoutExponentials:
    """A cache that holds nothing; its attention does not keep the exponentials."""

    causal: bool
    seen: int = 0

    def attend(self, q: Array, k: Array, v: Array) -> tuple[Array, Back]:
        """The attention (N, H, T, E), as in a block without a cache."""
        return attention(q, k, v, causal=self.causal, keep=False)


@dataclass(eq=False)
class Recomputed:
    """A block that keeps less; called like a block."""

    block: Block
    how: str  # one of HOW

    def __call__(
        self, x: Array, turn: Turn | None, need: Need = Need.ALL, cache: Any = None
    ) -> tuple[Array, Back]:
        block = self.block
        run = half if self.how == "full" else residual
        if self.how == "selective":
            cache = cache or WithoutExponentials(turn is not None)
        need_a = after(need, [block.input_layernorm, block.self_attn])
        x, back_a = run(block.input_layernorm, block.self_attn, x, need, turn, cache)
        x, back_m = half(block.post_attention_layernorm, block.mlp, x, need_a)

        def back(dy: Array) -> Array:
            return back_a(back_m(dy))

        return x, back


def half(norm: Any, inner: Any, x: Array, need: Need, *how: Any) -> tuple[Array, Back]:
    """x + inner(norm(x)), which runs again in the backward."""
    nodes = [node for _, node in walk(inner)]
    rngs = [node.rng.bit_generator for node in nodes if isinstance(node, Dropout)]
    maps = [node for node in nodes if isinstance(node, Known)]
    before = [rng.state for rng in rngs]
    try:
        y, back_once = residual(norm, inner, x, need, *how)
    finally:
        values = [forget(known) for known in maps]
    if back_once is back_nothing:
        return y, back_nothing

    def back(dy: Array) -> Array:
        states = [rng.state for rng in rngs]
        for rng, state in zip(rngs, before, strict=True):  # the same dropout masks again
            rng.state = state
        for known in reversed(maps):
            known.again, known.value = True, values.pop()
        try:
            _, back_again = residual(norm, inner, x, need, *how)
        finally:
            for known in maps:
                forget(known)
            for rng, state in zip(rngs, states, strict=True):
                rng.state = state
        return back_again(dy)

    return y, back


def forget(known: Known) -> Any:
    """The value of a map, which is then as it was before it ran."""
    value, known.value, known.again = known.value, 0, False
    return value


def within(half: Any) -> Any:
    """A half of a block without what is put around it, a prefix say."""
    return half.base if isinstance(half, Adapted) else half


def check_recompute(how: str | None) -> None:
    """ConfigError unless it is one of HOW, or None."""
    if how is not None and how not in HOW:
        raise ConfigError(f"recompute is {short(how)}; expected 'selective', 'full' or None")


def recompute(model: Any, how: str) -> None:
    """Wrap every block of a replica, in one of the ways of HOW."""
    for path, block in [(path, node) for path, node in walk(model) if isinstance(node, Block)]:
        mlp = block.mlp
        if how == "full":
            attention = within(block.self_attn)
            attention.o_proj = Known(attention.o_proj)
        else:
            mlp.gate_proj, mlp.up_proj = Known(mlp.gate_proj, True), Known(mlp.up_proj, True)
        mlp.down_proj = Known(mlp.down_proj)
        replace(model, path, Recomputed(block, how))
