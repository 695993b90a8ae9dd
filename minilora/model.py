"""The Llama architecture (Touvron et al. 2023), forward and backward by hand.

    h = E[ids];  per block  h += attention(norm(h));  h += mlp(norm(h));  logits = norm(h) Eᵀ or Wᵀ

Attribute paths are Hugging Face's names (`model.layers.0.self_attn.q_proj.weight`), so a checkpoint
needs no mapping table. Stands in for transformers' modeling_llama.py; leaves out padding masks, other
attention kernels and distributed layers. A layer knows nothing of LoRA: `inject` replaces it in the tree
from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .backend import Array, normal, to_device, to_host, xp
from .errors import ConfigError, InputError, StateError, check_float, check_int, short
from .layers import Embedding, Layer, Linear, Need, Param, RMSNorm, Table
from .ops import (
    IGNORE,
    Back,
    attention,
    back_nothing,
    back_same,
    cross_entropy,
    heads,
    rope,
    rope_frequencies,
    rope_tables,
    swiglu,
    unheads,
)
from .table import settings
from .tree import outline, trains


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the slow rotary frequencies, with config.json's names.

    A pair with a wavelength above L / low turns `factor` times slower, one below L / high turns as before,
    and in between the two are mixed; L is original_max_position_embeddings.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    rope_type: str = "llama3"

    def __post_init__(self) -> None:
        if self.rope_type != "llama3":
            raise ConfigError(f"rope_type is {self.rope_type!r}; expected 'llama3'")
        check_float("factor", self.factor, 1, math.inf)
        check_float("low_freq_factor", self.low_freq_factor, 0, math.inf, open_low=True)
        check_float("high_freq_factor", self.high_freq_factor, self.low_freq_factor, math.inf, open_low=True)
        check_int("original_max_position_embeddings", self.original_max_position_embeddings, 1)

    def __call__(self, inverse: Array) -> Array:
        """The frequencies (E/2,) after stretching."""
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = self.original_max_position_embeddings * inverse / (2 * math.pi)  # within L positions
        t = xp.clip((turns - low) / (high - low), 0, 1)
        return (1 - t) * inverse / self.factor + t * inverse


@dataclass(frozen=True)
class Config:
    """The shape of a Llama, with the names of Hugging Face's config.json. ConfigError if it is impossible."""

    vocab_size: int = 128  # V
    hidden_size: int = 96  # D
    intermediate_size: int = 256  # F
    num_hidden_layers: int = 3  # L
    num_attention_heads: int = 4  # H
    num_key_value_heads: int = 4  # G, a divisor of H
    head_dim: int | None = None  # E, D / H unless given
    max_position_embeddings: int = 512  # the longest T
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        D, H, G = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            check_int(name, getattr(self, name), 1)
        for name in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings"):
            check_int(name, getattr(self, name), 1)
        if H % G:
            raise ConfigError(f"num_key_value_heads is {G}; expected a divisor of {H} attention heads")
        if self.head_dim is None and D % H:
            raise ConfigError(f"num_attention_heads is {H}; expected a divisor of hidden_size {D}")
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected True or False")
        if self.head_dim is not None:
            check_int("head_dim", self.head_dim, 2)
        if self.E < 2 or self.E % 2:
            raise ConfigError(f"head_dim is {self.E}; expected an even number, at least 2 (rotary pairs)")
        check_float("rms_norm_eps", self.rms_norm_eps, 0, 1, open_low=True)
        check_float("rope_theta", self.rope_theta, 0, math.inf, open_low=True)
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ConfigError(f"rope_scaling is {short(self.rope_scaling)}; expected a RopeScaling or None")

    @property
    def E(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def _repr_html_(self) -> str:
        return settings(self).html()


Turn = tuple[Array, Array]  # rope's cos and sin (T, H*E) of T positions


class Cache(Protocol):
    """Keys and values of earlier positions, in one layer (decoding.py)."""

    @property
    def seen(self) -> int:
        """How many positions it holds."""

    def attend(self, q: Array, k: Array, v: Array) -> tuple[Array, Back]:
        """The attention (N, H, T, E) of the next positions over themselves and all earlier ones."""


class Past(Protocol):
    """The caches of all layers, and the rotary tables of the next positions."""

    @property
    def caches(self) -> Sequence[Cache]:
        """One for each layer."""

    def new(self, x: Array, T: int) -> Array:
        """Of the embedding's result x for T ids, what the caches do not hold yet."""

    def turn(self, T: int) -> Turn:
        """The tables of the next T positions."""

    def last(self, x: Array) -> Array:
        """The rows and positions of the blocks' result x (N, T, D) that get logits."""


def after(need: Need, layer: Any) -> Need:
    """The need of the layers after `layer`: once something in it is trained, they must return dx, too."""
    return Need.ALL if need is Need.WEIGHTS and trains(layer) else need


@dataclass(eq=False)
class Attention:
    """Causal self-attention with rotary positions: x (N, T, D) -> (N, T, D).

    Without a `turn` tokens have no order, as the patches of an image: none is turned, and each sees all.
    """

    head_dim: int  # E
    q_proj: Layer  # (H*E, D)
    k_proj: Layer  # (G*E, D)
    v_proj: Layer  # (G*E, D)
    o_proj: Layer  # (D, H*E)

    def __call__(
        self, x: Array, need: Need, turn: Turn | None, cache: Cache | None = None
    ) -> tuple[Array, Back]:
        q, back_q = self.q_proj(x, need)
        k, back_k = self.k_proj(x, need)
        v, back_v = self.v_proj(x, need)
        q, unturn_q = rope(q, *turn, self.head_dim) if turn else (q, back_same)
        k, unturn_k = rope(k, *turn, self.head_dim) if turn else (k, back_same)
        q, k, v = (heads(x, self.head_dim) for x in (q, k, v))  # (N, H or G, T, E)
        a, back_a = cache.attend(q, k, v) if cache else attention(q, k, v, causal=turn is not None)
        need_a = after(need, [self.q_proj, self.k_proj, self.v_proj, cache])
        y, back_o = self.o_proj(unheads(a), need_a)
        if need_a is not Need.ALL:
            return y, back_o

        def back(dy: Array) -> Array:
            dq, dk, dv = back_a(heads(back_o(dy), self.head_dim))
            dv = back_v(unheads(dv))
            dk = back_k(unturn_k(unheads(dk)))
            dq = back_q(unturn_q(unheads(dq)))
            return dq + dk + dv if need is Need.ALL else None

        return y, back


@dataclass(eq=False)
class MLP:
    """The gated feed-forward half: down(silu(gate(x)) * up(x)), x (N, T, D) -> (N, T, D)."""

    gate_proj: Layer  # (F, D)
    up_proj: Layer  # (F, D)
    down_proj: Layer  # (D, F)

    def __call__(self, x: Array, need: Need = Need.ALL) -> tuple[Array, Back]:
        g, back_g = self.gate_proj(x, need)
        u, back_u = self.up_proj(x, need)
        h, back_h = swiglu(g, u)
        need_h = after(need, [self.gate_proj, self.up_proj])
        y, back_d = self.down_proj(h, need_h)
        if need_h is not Need.ALL:
            return y, back_d

        def back(dy: Array) -> Array:
            dg, du = back_h(back_d(dy))
            du = back_u(du)
            dg = back_g(dg)
            return dg + du if need is Need.ALL else None

        return y, back


@dataclass(eq=False)
class Block:
    """x += self_attn(norm(x)); x += mlp(norm(x)); x (N, T, D)."""

    input_layernorm: Layer  # (D,)
    self_attn: Attention
    post_attention_layernorm: Layer  # (D,)
    mlp: MLP

    def __call__(
        self, x: Array, turn: Turn | None, need: Need = Need.ALL, cache: Cache | None = None
    ) -> tuple[Array, Back]:
        need_a = after(need, [self.input_layernorm, self.self_attn])
        x, back_a = residual(self.input_layernorm, self.self_attn, x, need, turn, cache)
        x, back_m = residual(self.post_attention_layernorm, self.mlp, x, need_a)

        def back(dy: Array) -> Array:
            return back_a(back_m(dy))

        return x, back


def residual(
    norm: Layer, half: Callable[..., tuple[Array, Back]], x: Array, need: Need, *how: Any
) -> tuple[Array, Back]:
    """x + half(norm(x)): one half of a block, attention or MLP."""
    need_n = after(need, norm)
    n, back_n = norm(x, need)
    y, back_half = half(n, need_n, *how)
    if after(need_n, half) is not Need.ALL:
        return x + y, back_nothing

    def back(dy: Array) -> Array:
        d = back_half(dy)
        if need_n is Need.ALL:
            d = back_n(d)
        return dy + d if need is Need.ALL else None

    return x + y, back


@dataclass(eq=False)
class Decoder:
    """The stack between tokens and head."""

    embed_tokens: Table  # (V, D)
    layers: list[Block]
    norm: Layer  # (D,)


@dataclass(eq=False)
class Llama:
    """ids (N, T) of ints -> logits (N, T, V). With lm_head None the head is the embedding table."""

    config: Config
    model: Decoder
    lm_head: Layer | None = None  # (V, D)

    def __repr__(self) -> str:
        return outline(self)

    def __call__(self, ids: Array, train: bool = False) -> tuple[Array, Back]:
        """Logits (N, T, V), and when training the `back` that takes their gradient.

        InputError for ids that are not a 2-D array of ints in [0, V), or longer than the model takes.
        """
        return self.forward(self.check(ids), train)

    def forward(self, ids: Array, train: bool = False, past: Past | None = None) -> tuple[Array, Back]:
        """As `__call__`, for ids that are checked and on the device.

        With a `past` the ids continue it, and only what `past.last` returns gets logits.
        """
        decoder = self.model
        need = Need.WEIGHTS if train else Need.NONE
        backs: list[Back] = []

        x, back = decoder.embed_tokens(ids, need)
        if (need := after(need, decoder.embed_tokens)) is Need.ALL:
            backs.append(back)
        if past:
            x = past.new(x, ids.shape[1])
        T = x.shape[1]  # more than the ids where the embedding puts rows before them
        turn = past.turn(T) if past else self.tables(T, x.real.dtype)
        for i, block in enumerate(decoder.layers):
            x, back = block(x, turn, need, past.caches[i] if past else None)
            if (need := after(need, block)) is Need.ALL:
                backs.append(back)
        if past:
            x = past.last(x)
        x, back = decoder.norm(x, need)
        if (need := after(need, decoder.norm)) is Need.ALL:
            backs.append(back)
        head = decoder.embed_tokens.attend if self.lm_head is None else self.lm_head
        logits, back_head = head(x, need)

        def back_all(dlogits: Array) -> None:
            d = back_head(dlogits)
            while backs:
                d = backs.pop()(d)  # frees the arrays that the layer kept

        return logits, back_all if train else back_untrained

    def loss(self, ids: Array, labels: Array, train: bool = False) -> tuple[Array, Back]:
        """Mean cross-entropy in nats per token; labels (N, T), -100 to ignore. back() means back(1).

        InputError for labels of another shape or outside the vocabulary.
        """
        labels = self.check_labels(ids, labels)
        logits, back_logits = self(ids, train)
        value, back_loss = cross_entropy(logits, labels)

        def back(d: Any = 1.0) -> None:
            back_logits(back_loss(d))

        return value, back

    def tables(self, positions: int, dtype: Any) -> Turn:
        """Rope's cos and sin (positions, H*E), from 0 on; InputError for more than the model takes."""
        c = self.config
        if positions > c.max_position_embeddings:
            raise InputError(f"{positions} positions; the model takes at most {c.max_position_embeddings}")
        inverse = rope_frequencies(c.E, c.rope_theta)
        inverse = c.rope_scaling(inverse) if c.rope_scaling else inverse
        return rope_tables(xp.arange(positions), c.num_attention_heads, inverse, dtype)

    def check(self, ids: Array) -> Array:
        """The ids on the device, or InputError."""
        ids = host_ints("token ids", ids)
        limit = self.config.max_position_embeddings
        if ids.ndim != 2 or 0 in ids.shape:
            raise InputError(f"token ids have shape {ids.shape}; expected (N, T), both at least 1")
        if ids.shape[1] > limit:
            raise InputError(f"{ids.shape[1]} tokens; the model takes at most {limit}")
        check_range("token id", ids, self.config.vocab_size)
        return to_device(ids)

    def check_labels(self, ids: Array, labels: Array) -> Array:
        """The labels on the device, or InputError."""
        labels = host_ints("labels", labels)
        if labels.shape != to_host(ids).shape:
            raise InputError(f"labels have shape {labels.shape}; expected the ids' {to_host(ids).shape}")
        check_range("label", labels[labels != IGNORE], self.config.vocab_size)
        return to_device(labels)


def back_untrained(dlogits: Array) -> None:
    """The backward of a model that was called without train=True: a StateError."""
    raise StateError("no gradient: the model was called without train=True")


def host_ints(what: str, values: Any) -> np.ndarray:
    """The values as an int64 array on the host, or InputError."""
    try:
        host = to_host(values)
    except ValueError as e:
        raise InputError(f"{what} are ragged; expected rows of equal length") from e
    if host.dtype.kind not in "iu":
        raise InputError(f"{what} have dtype {host.dtype}; expected ints")
    return host.astype(np.int64, copy=False)


def check_range(what: str, values: np.ndarray, V: int) -> None:
    """InputError naming the first value outside [0, V)."""
    outside = values[(values < 0) | (values >= V)]
    if outside.size:
        raise InputError(f"{what} {outside[0]}; expected 0 to {V - 1}")


def llama(config: Config, rng: np.random.Generator, dtype: Any = np.float32) -> Llama:
    """A fresh model with W ~ N(0, 1/inputs).

    In each block the two maps that write to the residual stream are scaled by 1/sqrt(2L). The embedding is
    N(0, 1/D), so that a tied head starts with logits of order one.
    """
    return build(config, drawing(rng, dtype), dtype)


def drawing(rng: np.random.Generator, dtype: Any) -> Callable[[tuple[int, int], float], Array]:
    """draw(shape, gain): a matrix with W ~ N(0, 1/inputs), times the gain."""

    def draw(shape: tuple[int, int], gain: float) -> Array:
        W = normal(rng, shape, 1 / math.sqrt(shape[1]), dtype)
        W *= gain
        return W

    return draw


def blank(config: Config, dtype: Any = np.float32) -> Llama:
    """A model of that shape to fill: every matrix is a view of a single zero, whatever its size."""
    zero = xp.zeros((), dtype)
    return build(config, lambda shape, gain: xp.broadcast_to(zero, shape), dtype)


def build(config: Config, draw: Callable[[tuple[int, int], float], Array], dtype: Any) -> Llama:
    """The tree of layers, with matrices from draw(shape, gain); norms are one, biases zero."""
    shape = config.vocab_size, config.hidden_size
    table = Embedding(Param(draw(shape, 1.0)))
    decoder = Decoder(table, blocks(config, draw, dtype), norm(config, dtype))
    return Llama(config, decoder, None if config.tie_word_embeddings else Linear(Param(draw(shape, 1.0))))


def norm(config: Config, dtype: Any) -> RMSNorm:
    """A fresh norm of the width D."""
    return RMSNorm(Param(xp.ones(config.hidden_size, dtype)), config.rms_norm_eps)


def blocks(config: Config, draw: Callable[[tuple[int, int], float], Array], dtype: Any) -> list[Block]:
    """The L blocks, as in `build`."""
    c = config
    D, F, E = c.hidden_size, c.intermediate_size, c.E
    H, G = c.num_attention_heads, c.num_key_value_heads
    a, m = c.attention_bias, c.mlp_bias
    out = 1 / math.sqrt(2 * c.num_hidden_layers)

    def project(outputs: int, inputs: int, bias: bool, gain: float = 1.0) -> Linear:
        W = draw((outputs, inputs), gain)
        return Linear(Param(W), Param(xp.zeros(outputs, dtype)) if bias else None)

    def block() -> Block:
        attn = Attention(
            E, project(H * E, D, a), project(G * E, D, a), project(G * E, D, a), project(D, H * E, a, out)
        )
        mlp = MLP(project(F, D, m), project(F, D, m), project(D, F, m, out))
        return Block(norm(c, dtype), attn, norm(c, dtype), mlp)

    return [block() for _ in range(c.num_hidden_layers)]
