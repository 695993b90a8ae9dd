"""A KV cache of R slots: each holds one text, at a position of its own; texts join and leave between steps.

    row m of a step is one token, at position p of slot n:    y = softmax(q k[n, :p+1]ᵀ / sqrt(E)) v[n, :p+1]

A step's M tokens, of prompts and of running texts alike, are M rows of T = 1: every linear map sees all of
them in one product, and only attention asks which belong to one text (the selective batching of Orca, Yu et
al. 2022). Single tokens attend together: shorter texts are padded with masked positions, whose weights are
exact zeros, over values that are zero. Several tokens of one text attend as a causal tile. Keeps to `Past`
and `Cache` of model.py; blocks are unchanged. Leaves out pages (vLLM's PagedAttention, Kwon et al. 2023): a
slot has room for S positions from the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, to_device, xp
from ..errors import UnsupportedError
from ..fast.mixed import index
from ..model import Llama, Turn
from ..ops import Back, attend_one, attention, back_nothing
from ..tree import dtype_of

Part = Callable[[Array, Array, Array], Array]  # q (M, H, 1, E), a layer's k and v (R, G, S, E) -> as q


class Span(NamedTuple):
    """`length` tokens of the text in a slot, from position `start` on."""

    slot: int
    start: int
    length: int


@dataclass(eq=False)
class LayerSlots:
    """The cache of one layer for the tokens of one step."""

    k: Array  # (R, G, S, E)
    v: Array
    slots: Array  # (M,)
    positions: Array  # (M,)
    parts: Sequence[tuple[Any, Part]]  # some of the rows, and their attention

    @property
    def seen(self) -> int:
        """UnsupportedError: each token's text is at a position of its own."""
        raise UnsupportedError("prefix tuning cannot be served from slots; use generate")

    def attend(self, q: Array, k: Array, v: Array) -> tuple[Array, Back]:
        """Add the step's keys and values; return each token's attention (M, H, 1, E) over its own text."""
        self.k[self.slots, :, self.positions] = k[:, :, 0]
        self.v[self.slots, :, self.positions] = v[:, :, 0]
        if len(self.parts) == 1:
            return self.parts[0][1](q, self.k, self.v), back_nothing
        y = xp.empty(q.shape, q.dtype)
        for rows, part in self.parts:
            y[rows] = part(q[rows], self.k, self.v)
        return y, back_nothing


@dataclass(eq=False)
class Step:
    """The past of the M tokens of one step: a `Past`."""

    tables: Turn  # cos and sin (M, 1, H*E)
    caches: list[LayerSlots]
    rows: Array | None  # that get logits; None: all

    def new(self, x: Array, T: int) -> Array:
        """x (M, 1, D); UnsupportedError if rows stand before each token."""
        if x.shape[1] != T:
            raise UnsupportedError("prompt tuning cannot be served from slots; use generate")
        return x

    def turn(self, T: int) -> Turn:
        """The tables of the M tokens."""
        return self.tables

    def last(self, x: Array) -> Array:
        """Of x (M, 1, D), the rows that get logits."""
        return x if self.rows is None else x[self.rows]


@dataclass(eq=False)
class Slots:
    """Keys and values of R texts of at most S positions: 2 L R G S E numbers, allocated once.

    From position `filled` on, each slot is zero.
    """

    tables: Turn  # cos and sin (S, H*E)
    k: Array  # (L, R, G, S, E)
    v: Array
    filled: np.ndarray  # (R,) ints, on the host

    def step(self, spans: Sequence[Span], alone: bool = False, rows: Array | None = None) -> Step:
        """The past for ids (M, 1), the tokens of these spans one after another, with one span per slot.

        With `alone` every token attends by itself, so that its attention has the same bits whoever shares the
        step and however its text is cut into spans. Only `rows` get logits; None: all.
        """
        for span in spans:
            self.filled[span.slot] = max(self.filled[span.slot], span.start + span.length)
        slots = np.repeat([s.slot for s in spans], [s.length for s in spans])
        positions = np.concatenate([np.arange(s.start, s.start + s.length) for s in spans])
        if alone:
            stops = enumerate(zip(slots.tolist(), (positions + 1).tolist(), strict=True))
            parts = [(slice(m, m + 1), one(slot, stop)) for m, (slot, stop) in stops]
        else:
            parts = cut(spans, self.k.dtype)
        at = to_device(slots), to_device(positions)
        cos, sin = (table[at[1]][:, None] for table in self.tables)
        layers = zip(self.k, self.v, strict=True)
        return Step((cos, sin), [LayerSlots(k, v, *at, parts) for k, v in layers], rows)

    def clear(self, slot: int) -> None:
        """Forget the text in a slot: not even a NaN of it reaches the next one."""
        filled = self.filled[slot]
        self.k[:, slot, :, :filled] = self.v[:, slot, :, :filled] = 0
        self.filled[slot] = 0


def slots_of(model: Llama, R: int, S: int) -> Slots:
    """Empty slots for R texts of at most S positions."""
    c = model.config
    dtype = dtype_of(model)
    k, v = xp.zeros((2, c.num_hidden_layers, R, c.num_key_value_heads, S, c.E), dtype)
    return Slots(model.tables(S, dtype), k, v, np.zeros(R, int))


def cut(spans: Sequence[Span], dtype: Any) -> list[tuple[Any, Part]]:
    """The rows of a step and their attention: single tokens together, each longer span by itself."""
    parts: list[tuple[Any, Part]] = []
    single, at, m = [], [], 0
    for span in spans:
        if span.length == 1:
            single.append(span)
            at.append(m)
        else:
            parts.append((slice(m, m + span.length), causal(span.slot, span.start + span.length)))
        m += span.length
    if single:
        parts.append((index(at), together(single, dtype)))
    return parts


def one(slot: int, stop: int) -> Part:
    """The attention of a single token over the first `stop` positions of its slot."""

    def part(q: Array, k: Array, v: Array) -> Array:
        return attend_one(q, k[slot : slot + 1, :, :stop], v[slot : slot + 1, :, :stop])

    return part


def causal(slot: int, stop: int) -> Part:
    """The attention of a span whose last token is the one before position `stop`."""

    def part(q: Array, k: Array, v: Array) -> Array:
        q = q.transpose(2, 1, 0, 3)  # (1, H, t, E)
        y, _ = attention(q, k[slot : slot + 1, :, :stop], v[slot : slot + 1, :, :stop])
        return y.transpose(2, 1, 0, 3)

    return part


def together(spans: Sequence[Span], dtype: Any) -> Part:
    """The attention of single tokens, computed for all slots up to the last one of theirs.

    A slot among these without a token here attends over one position, and the result is dropped.
    """
    slots = np.array([span.slot for span in spans])
    lengths = np.ones(slots.max() + 1, int)
    lengths[slots] = [span.start + 1 for span in spans]
    n, S = len(lengths), int(lengths.max())
    mask = to_device(np.where(np.arange(S) < lengths[:, None], 0, -math.inf)[:, None, None], dtype)
    dense, where = np.array_equal(slots, np.arange(n)), to_device(slots)

    def part(q: Array, k: Array, v: Array) -> Array:
        if dense:
            return attend_one(q, k[:n, :, :S], v[:n, :, :S], mask)
        every = xp.zeros((n, *q.shape[1:]), q.dtype)
        every[where] = q
        return attend_one(every, k[:n, :, :S], v[:n, :, :S], mask)[where]

    return part
