"""Trained rows before the text: in every layer's keys and values, or in the input alone.

Prefix tuning (Li and Liang 2021, equation 3, without the reparametrisation of section 4.3), per layer:

    attention(q, [P_k; k], [P_v; v])        P_k, P_v (P, G*E)

The rows stand at no position: P_k is not turned. In PEFT the text begins at position P instead of 0, which is
the same with P_k turned back by P positions. Prompt tuning (Lester et al. 2021, section 2) trains rows of the
input, whose outputs are cut off again:

    h = [P_e; E[ids]]        P_e (P, D)        logits = head(norm(h)[P:])

Neither starts as the base, since attention has more to look at; neither can be merged. Both read P more
positions at inference, from the cache once it holds them. Stands in for PEFT's prefix and prompt tuning;
leaves out encoders, files and serving from slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import numpy as np

from ..backend import Array, normal, to_device, xp
from ..errors import UnsupportedError, check_int
from ..layers import Adapter, Layer, Need, Param, Table
from ..model import Attention, Cache, Turn
from ..ops import Back, attention, heads, unheads
from ..targets import resolve


@dataclass(eq=False)
class Prefix:
    """Keys and values before those of the text, in one layer's attention."""

    keys: Param  # (P, G*E)
    values: Param  # (P, G*E)

    def __call__(
        self, base: Attention, x: Array, need: Need, turn: Turn | None, cache: Cache | None = None
    ) -> tuple[Array, Back]:
        return base(x, need, turn, PrefixedCache(self, base.head_dim, cache, causal=turn is not None))

    @property
    def low_rank(self) -> None:
        """There are no factors."""
        return None

    def change(self, base: Attention) -> None:
        """None: no weight changes."""
        return None

    def merged(self, base: Attention) -> NoReturn:
        """UnsupportedError."""
        raise UnsupportedError("a prefix is no change of a weight and cannot be merged; use it as it is")


@dataclass(eq=False)
class PrefixedCache:
    """A cache that begins with a prefix: empty, or the text's own, which then keeps the prefix, too."""

    prefix: Prefix
    head_dim: int  # E
    cache: Cache | None
    causal: bool

    @property
    def seen(self) -> int:
        """How many positions it holds."""
        return self.cache.seen if self.cache else 0

    def attend(self, q: Array, k: Array, v: Array) -> tuple[Array, Back]:
        """The attention (N, H, T, E) of q over the prefix and the text; back gives (dq, dk, dv)."""
        attend = self.cache.attend if self.cache else partial(attention, causal=self.causal)
        if self.seen:
            return attend(q, k, v)
        keys, values, E = self.prefix.keys, self.prefix.values, self.head_dim
        P = len(keys.data)

        def prepend(rows: Param, x: Array) -> Array:
            before = xp.broadcast_to(heads(rows.data[None], E), (*x.shape[:2], P, E))
            return xp.concatenate([before, x], 2)  # (N, G, P + T, E)

        a, back_a = attend(q, prepend(keys, k), prepend(values, v))

        def back(da: Array) -> tuple[Array, Array, Array]:
            dq, dk, dv = back_a(da)
            for rows, d in ((keys, dk), (values, dv)):
                rows.add_grad(unheads(d[:, :, :P].sum(0, keepdims=True))[0])
            return dq, dk[:, :, P:], dv[:, :, P:]

        return a, back


@dataclass(frozen=True)
class PrefixTuningConfig:
    """Prefix tuning: so many rows before the keys and values of every layer, N(0, 0.2²) at first."""

    num_virtual_tokens: int = 16  # P

    def __post_init__(self) -> None:
        check_int("num_virtual_tokens", self.num_virtual_tokens, 1)

    def fresh(self, layers: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Adapter]:
        """Path of the attention -> a fresh prefix, for every layer; MismatchError if there is no k_proj."""
        new: dict[str, Any] = {}  # called like attention, not like a layer
        for path in resolve("prefix tuning", ["k_proj"], list(layers)):
            W = layers[path].weight
            keys, values = normal(rng, (2, self.num_virtual_tokens, W.shape[0]), 0.2, W.dtype)
            new[path.removesuffix(".k_proj")] = Prefix(Param(keys), Param(values))
        return new


@dataclass(eq=False)
class Prompt:
    """Rows before those of the text in the output of an embedding."""

    rows: Param  # (P, D)

    def __call__(self, base: Table, ids: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        rows = self.rows
        x, back_base = base(ids, need)
        before = xp.broadcast_to(rows.data, (len(ids), *rows.shape))
        P = len(rows.data)

        def back(dx: Array) -> None:
            rows.add_grad(dx[:, :P].sum(0))
            back_base(dx[:, P:])

        return xp.concatenate([before, x], 1), back  # (N, P + T, D)

    def attend(self, base: Table, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        """The logits under the base's table: a prompt's rows are no tokens."""
        return base.attend(x, need)

    @property
    def low_rank(self) -> None:
        """There are no factors."""
        return None

    def change(self, base: Table) -> None:
        """None: no weight changes."""
        return None

    def merged(self, base: Table) -> NoReturn:
        """UnsupportedError."""
        raise UnsupportedError("a prompt is no change of a weight and cannot be merged; use it as it is")


@dataclass(eq=False)
class WithoutPrompt:
    """A layer of the text alone: the first P rows of x are a prompt's, and get no output."""

    P: int

    def __call__(self, base: Layer, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        P, shape = self.P, x.shape
        if shape[1] == 1:  # the last position, which a cache asks for: the text's
            return base(x, need)
        y, back_base = base(x[:, P:], need)

        def back(dy: Array) -> Array:
            dx = xp.zeros(shape, dy.dtype)
            dx[:, P:] = back_base(dy)
            return dx

        return y, back

    @property
    def low_rank(self) -> None:
        """There are no factors."""
        return None

    def change(self, base: Layer) -> None:
        """None: no weight changes."""
        return None

    def merged(self, base: Layer) -> NoReturn:
        """UnsupportedError."""
        raise UnsupportedError("a prompt is no change of a weight and cannot be merged; use it as it is")


@dataclass(frozen=True)
class PromptTuningConfig:
    """Prompt tuning: so many rows before the text's, at first those of tokens drawn from the vocabulary.

    The draw is section 2.1's; a text of T tokens takes P + T positions.
    """

    num_virtual_tokens: int = 16  # P

    def __post_init__(self) -> None:
        check_int("num_virtual_tokens", self.num_virtual_tokens, 1)

    def fresh(self, layers: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Adapter]:
        """A fresh prompt at the embedding, and the cut at the last norm; MismatchError if one is missing."""
        P = self.num_virtual_tokens
        (table,) = resolve("prompt tuning", ["model.embed_tokens"], list(layers))
        (norm,) = resolve("prompt tuning", ["model.norm"], list(layers))
        E = layers[table].weight.dense()
        rows = E[to_device(rng.integers(0, len(E), P))]
        return {table: Prompt(Param(rows)), norm: WithoutPrompt(P)}
