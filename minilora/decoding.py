"""Decoding with a cache of keys and values: each step reads one token and draws the next.

Stands in for transformers' generate; leaves out beams, penalties and batches of unequal length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import Array, keep_memory, quiet_overflow, to_device, to_host, xp
from .errors import InputError, short
from .model import Llama, Turn
from .ops import Back, attend_one, attention, back_nothing
from .tree import dtype_of


@dataclass(eq=False)
class KVCache:
    """Keys and values (N, G, S, E) of one layer, of which the first `seen` positions are filled."""

    k: Array
    v: Array
    seen: int = 0

    def attend(self, q: Array, k: Array, v: Array) -> tuple[Array, Back]:
        """Add the next T positions; return their attention (N, H, T, E) over themselves and all earlier.

        Where there are more keys than queries, a prefix stands before them: it gets room of its own.
        """
        if more := k.shape[2] - q.shape[2]:
            self.grow(more)
        start, self.seen = self.seen, self.seen + k.shape[2]
        self.k[:, :, start : self.seen] = k
        self.v[:, :, start : self.seen] = v
        k, v = self.k[:, :, : self.seen], self.v[:, :, : self.seen]
        return attend_one(q, k, v) if q.shape[2] == 1 else attention(q, k, v)[0], back_nothing

    def grow(self, more: int) -> None:
        """Room for more positions, while there is nothing in it."""
        N, G, S, E = self.k.shape
        self.k, self.v = xp.empty((2, N, G, S + more, E), self.k.dtype)


@dataclass(eq=False)
class Past:
    """The caches of N texts of up to S positions: 2 L N G S E numbers, and the rotary tables' 2 S H E.

    All of it is allocated once, and once more at the first step if rows stand before the text: appending
    would copy every key and value at every token, which takes as long as attention itself.
    """

    tables: Turn  # cos and sin (S, H*E)
    caches: list[KVCache]  # one per layer
    longer: Callable[[int], Turn]  # S -> tables
    seen: int = 0  # positions so far

    def new(self, x: Array, T: int) -> Array:
        """All of x (N, T or more, D) at first; then the last T rows, since the caches hold what is before.

        Rows before the text's, a prompt's, get room of their own.
        """
        if self.seen:
            return x[:, -T:]
        if more := x.shape[1] - T:
            self.tables = self.longer(len(self.tables[0]) + more)
            for cache in self.caches:
                cache.grow(more)
        return x

    def turn(self, T: int) -> Turn:
        """The tables of the next T positions."""
        cos, sin = self.tables
        start, self.seen = self.seen, self.seen + T
        return cos[start : self.seen], sin[start : self.seen]

    def last(self, x: Array) -> Array:
        """The last position alone, x (N, T, D) -> (N, 1, D): it gives the next token."""
        return x[:, -1:]


def past_of(model: Llama, N: int, S: int) -> Past:
    """Empty caches for N texts of at most S positions."""
    c = model.config
    dtype = dtype_of(model)
    shape = (c.num_hidden_layers, 2, N, c.num_key_value_heads, S, c.E)
    caches = [KVCache(k, v) for k, v in xp.empty(shape, dtype)]
    return Past(model.tables(S, dtype), caches, lambda S: model.tables(S, dtype))


def generate(
    model: Llama,
    ids: Array,
    max_new_tokens: int,
    *,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Iterator[np.ndarray]:
    """Continue the prompts ids (N, T), yielding the next token of each row (N,) one step at a time.

    Ids in, ids out; `complete` takes and returns text, and `encode` and `decode` convert between the
    two. Temperature 0 is greedy; top_k keeps the k likeliest tokens, top_p the fewest that hold that
    share of the probability (Holtzman et al. 2020). Keys and values are cached. InputError for a
    meaningless setting or a text longer than the model takes, which rows before it make known only at the
    first token.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    ids = model.check(ids)
    T, limit = ids.shape[1], model.config.max_position_embeddings
    if T + max_new_tokens > limit:
        raise InputError(f"{T} tokens and {max_new_tokens} new ones; the model takes at most {limit}")

    def tokens(ids: Array) -> Iterator[np.ndarray]:
        keep_memory()
        past = past_of(model, len(ids), T + max_new_tokens - 1)  # the last token is not read
        for _ in range(max_new_tokens):
            logits, _ = model.forward(ids, past=past)
            token = sample(to_host(logits[:, -1]).astype(np.float64), rng, temperature, top_k, top_p)
            yield token
            ids = to_device(token[:, None])

    return tokens(ids)  # a generator of its own, so that the checks above run at once


def check_sampling(max_new_tokens: Any, temperature: Any, top_k: Any, top_p: Any) -> None:
    """InputError for a setting of `generate` that has no meaning."""
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {short(max_new_tokens)}; expected an int, at least 1")
    if type(temperature) not in (int, float) or not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {short(temperature)}; expected a number, at least 0")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise InputError(f"top_k is {short(top_k)}; expected an int, at least 1")
    if type(top_p) not in (int, float) or not 0 < top_p <= 1:
        raise InputError(f"top_p is {short(top_p)}; expected a number in (0, 1]")


def sample(
    logits: np.ndarray, rng: np.random.Generator, temperature: float, top_k: int | None, top_p: float
) -> np.ndarray:
    """One token (N,) from each row of logits (N, V), on the host."""
    if temperature == 0:
        return logits.argmax(-1)
    order = np.argsort(-logits, axis=-1, kind="stable")
    z = np.take_along_axis(logits, order, -1)
    with quiet_overflow():  # to -inf, at a temperature near 0
        p = np.exp((z - z[:, :1]) / temperature)
    p /= p.sum(-1, keepdims=True)
    if top_k is not None:
        p[:, top_k:] = 0
    p[np.cumsum(p, -1) - p >= top_p * p.sum(-1, keepdims=True)] = 0  # likelier tokens hold the share already
    c = np.cumsum(p, -1)
    choice = (c < rng.random((len(p), 1)) * c[:, -1:]).sum(-1)
    return np.take_along_axis(order, choice[:, None], -1)[:, 0]
