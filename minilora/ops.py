"""Functions without weights: each returns its value and `back`, its backward.

    y, back = op(x)        back(dy) -> dx, of the shape of x; call it at most once

A `back` may overwrite the arrays that its forward kept: nothing else holds them.
Softmax p = exp(x - max) / sum has dx = p * (dp - sum(dp * p)); cross-entropy after softmax has
dlogits = (p - onehot) / count. Stands in for the autograd of torch.nn.functional. All functions follow the
dtype of their operands and are analytic where they are smooth, so that a complex step measures their
derivative to the last digits.
"""

import math
import types
from collections.abc import Callable
from typing import Any

from .backend import Array, fused, quiet_overflow, xp

Back = Callable[..., Any]

IGNORE = -100  # the label to ignore, as in PyTorch


def back_same(dy: Array) -> Array:
    """dx = dy: the backward of a layer that returns x itself."""
    return dy


def back_nothing(dy: Array) -> None:
    """The backward where no gradient is needed."""


def rows(x: Array) -> Array:
    """(..., I) as a matrix of M rows (M, I)."""
    return x.reshape(-1, x.shape[-1])


def softmax(x: Array) -> tuple[Array, Back]:
    """exp(x) / sum(exp(x)) over the last axis, safe against overflow."""
    p = x - x.real.max(-1, keepdims=True)
    xp.exp(p, out=p)
    p /= p.sum(-1, keepdims=True)

    def back(dp: Array) -> Array:
        return p * (dp - xp.einsum("...i,...i->...", dp, p)[..., None])

    return p, back


def swiglu(gate: Array, up: Array) -> tuple[Array, Back]:
    """silu(gate) * up, with silu(g) = g / (1 + exp(-g)) (Shazeer 2020).

    All three are (..., F); back gives (dgate, dup).
    """
    t, a, y = _swiglu(gate, up)

    def back(dy: Array) -> tuple[Array, Array]:
        return _swiglu_back(dy, up, t, a)

    return y, back


@fused
def _swiglu(gate: Array, up: Array) -> tuple[Array, Array, Array]:
    """t = 1 + exp(-gate), a = silu(gate) = gate / t, and a * up; where exp overflows, a is rightly 0."""
    t = -gate
    with quiet_overflow():
        xp.exp(t, out=t)
    t += 1
    a = gate / t
    return t, a, a * up


@fused
def _swiglu_back(dy: Array, up: Array, t: Array, a: Array) -> tuple[Array, Array]:
    """(dgate, dup), where the derivative of silu is (1 - a) / t + a."""
    dup = dy * a
    dgate = 1 - a
    dgate /= t
    dgate += a
    dgate *= up
    dgate *= dy
    return dgate, dup


def gelu(x: Array) -> tuple[Array, Back]:
    """0.5 x (1 + tanh(c (x + 0.044715 x³))), c = sqrt(2/pi) (Hendrycks and Gimpel 2016)."""
    c = math.sqrt(2 / math.pi)
    t = xp.tanh(c * (x + 0.044715 * x * x * x))

    def back(dy: Array) -> Array:
        return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x))

    return 0.5 * x * (1 + t), back


def rms_norm(x: Array, eps: float) -> tuple[Array, Back]:
    """x / sqrt(mean(x²) + eps) over the last axis (Zhang and Sennrich 2019); x (..., D)."""
    D = x.shape[-1]
    rms = xp.sqrt(xp.einsum("...i,...i->...", x, x)[..., None] / D + eps)
    y = x / rms

    def back(dy: Array) -> Array:
        # dx = (dy - y mean(dy * y)) / rms
        dx = y * (xp.einsum("...i,...i->...", dy, y)[..., None] / -D)
        dx += dy
        dx /= rms
        return dx

    return y, back


def rope_frequencies(width: int, theta: float) -> Array:
    """theta^(-2j/E), j < E/2: the angle by which each pair of a head turns per position (Su et al. 2021)."""
    return theta ** (xp.arange(width // 2) * (-2.0 / width))


def rope_tables(positions: Array, heads: int, inverse: Array, dtype: Any) -> tuple[Array, Array]:
    """cos and signed sin (T, H*E) of position * frequency (E/2,), for H heads.

    Each head has its cosines twice, and its sines first negated, then as they are: the layout of `rope`.
    """
    angle = positions[:, None] * inverse  # float64 until the end: large positions lose no digits
    cos, sin = xp.cos(angle), xp.sin(angle)
    signed = xp.concatenate([-sin, sin], 1)
    return xp.tile(cos, 2 * heads).astype(dtype), xp.tile(signed, heads).astype(dtype)


def rope(x: Array, cos: Array, sin: Array, width: int) -> tuple[Array, Back]:
    """Turn the pairs (j, j + E/2) of each head in x (N, T, H*E) by the angles of the tables.

    cos and sin are (T, H*E), or (N, T, H*E) where every row is at a position of its own.

    [a, b] -> [a, b] * cos + [b, a] * [-sin, sin], Hugging Face's half-split. Three long passes over
    memory and one that swaps the halves: heads, of E numbers, are too short to loop over.
    """
    N, T, W = x.shape
    cos, sin = cos[..., :W], sin[..., :W]  # keys may have fewer heads

    def turn(x: Array, sin: Array) -> Array:
        swapped = x.reshape(N, T, W // width, 2, width // 2)[..., ::-1, :].reshape(N, T, W)
        y = x * cos
        y += swapped * sin
        return y

    def back(dy: Array) -> Array:
        return turn(dy, -sin)  # the inverse of a rotation is its transpose

    return turn(x, sin), back


def heads(x: Array, width: int) -> Array:
    """(N, T, H*E) as (N, H, T, E); a view."""
    N, T, _ = x.shape
    return x.reshape(N, T, -1, width).transpose(0, 2, 1, 3)


def unheads(x: Array) -> Array:
    """(N, H, T, E) as (N, T, H*E); the inverse of `heads`."""
    N, _, T, _ = x.shape
    return x.transpose(0, 2, 1, 3).reshape(N, T, -1)


TILE = 64  # queries per step of attention: few, to skip masked keys; many, for long products


def attention(
    q: Array, k: Array, v: Array, tile: int = TILE, causal: bool = True, keep: bool = True
) -> tuple[Array, Back]:
    """Causal softmax(q kᵀ / sqrt(E)) v (Vaswani et al. 2017), grouped queries (Ainslie et al. 2023).

    q (N, H, T, E); k, v (N, G, S, E), where head h reads group h // (H/G) and the T queries are the
    last of the S positions; if not `causal`, every query sees all S. Returns (N, H, T, E); back gives
    (dq, dk, dv).

    Queries go in tiles of `tile`, each against the keys up to its last position, which skips up to half of
    the products and exponentials. With e = exp(scores) the sums l = e 1 come out of the product e [v, 1],
    and y = e v / l: no pass divides e. In the backward, with dy' = dy / l,

        dv = eᵀ dy'        ds = e * (dy' vᵀ - δ)        δ = sum(dy' * y) over E = sum(p * dp) over S

    where [dy', -δ] [v, 1]ᵀ is one product (δ as in FlashAttention: Dao et al. 2022, appendix B). If not
    `keep`, only each row's largest score is kept, and the backward computes e again, as FlashAttention does.
    """
    N, H, T, E = q.shape
    G, S = k.shape[1:3]
    scale = 1 / math.sqrt(E)
    q = (q * scale).reshape(N, G, H // G, T, E)
    k, v = k[:, :, None], v[:, :, None]  # (N, G, 1, S, E)
    v = xp.concatenate([v, xp.ones_like(v[..., :1])], -1)  # [v, 1]
    shape, order = (N, T, G, H // G, E + 1), (0, 2, 3, 1, 4)  # in memory, heads of one position together
    z = xp.empty(shape, q.dtype).transpose(order)  # [e v, e 1]

    def exponentials(of: slice, seen: int, m: Array = None) -> tuple[Array, Array]:
        e = q[..., of, :] @ k[..., :seen, :].swapaxes(-1, -2)
        if causal and (t := of.stop - of.start) > 1:
            future = xp.arange(t) > xp.arange(t)[:, None]
            e[..., seen - t :] += xp.where(future, -math.inf, 0.0).astype(e.real.dtype)
        m = e.real.max(-1, keepdims=True) if m is None else m
        e -= m
        return xp.exp(e, out=e), m

    tiles = []
    for start in range(0, T, tile):
        of = slice(start, min(start + tile, T))
        seen = S - T + of.stop if causal else S
        e, m = exponentials(of, seen)
        xp.matmul(e, v[..., :seen, :], out=z[..., of, :])
        tiles.append((of, seen, e if keep else m))
    l = z[..., E:].copy()  # noqa: E741
    y = xp.empty((N, T, G, H // G, E), q.dtype).transpose(order)
    xp.divide(z[..., :E], l, out=y)

    def back(dy: Array) -> tuple[Array, Array, Array]:
        d, dq = xp.empty(shape, q.dtype).transpose(order), xp.empty_like(q)  # d = [dy', -δ]
        xp.divide(dy.reshape(y.shape), l, out=d[..., :E])
        d[..., E] = xp.einsum("...i,...i->...", d[..., :E], y)
        d[..., E] *= -1
        dk: Array = None
        dv: Array = None
        while tiles:  # the last tile first: it sees all keys
            of, seen, kept = tiles.pop()
            e = kept if keep else exponentials(of, seen, kept)[0]
            dv = _add(dv, seen, e.swapaxes(-1, -2) @ d[..., of, :E])
            e *= d[..., of, :] @ v[..., :seen, :].swapaxes(-1, -2)  # now ds
            xp.matmul(e, k[..., :seen, :], out=dq[..., of, :])
            dk = _add(dk, seen, e.swapaxes(-1, -2) @ q[..., of, :])  # q carries the scale
        dq *= scale
        return dq.reshape(N, H, T, E), dk.sum(2), dv.sum(2)

    return y.reshape(N, H, T, E), back


def _add(total: Array, seen: int, part: Array) -> Array:
    """Add the gradient of the first `seen` keys to that of all."""
    if total is None:
        return part
    total[..., :seen, :] += part
    return total


def attend_one(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """`attention` of a single query (T = 1), the newest, without backward.

    The H/G heads that read one group take the place of the T queries: one product for all of them. `mask`
    (N, 1, 1, S) is added to the scores: 0, or -inf where a shorter row has no key. There exp is 0, and a
    finite value times 0 changes no sum.
    """
    N, G, _, E = k.shape
    scores = (q.reshape(N, G, -1, E) / math.sqrt(E)) @ k.swapaxes(-1, -2)  # (N, G, H/G, S)
    if mask is not None:
        scores += mask
    return (softmax(scores)[0] @ v).reshape(q.shape)


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Back]:
    """Mean over labels of -log softmax(logits)[label], in nats; a label of -100 is ignored.

    logits (..., V), labels (...) of ints. back(d) takes the scalar's gradient. If every label is
    ignored, the loss and its gradient are 0.
    """
    z, labels = rows(logits), labels.reshape(-1)
    counted = labels != IGNORE
    count = xp.maximum(counted.sum(), 1)  # stays on the device
    at = (xp.arange(len(labels)), xp.where(counted, labels, 0))
    z = z - z.real.max(-1, keepdims=True)
    target = z[at]
    p = xp.exp(z, out=z)
    total = p.sum(-1)
    loss = xp.where(counted, xp.log(total) - target, 0).sum()
    loss = loss / count.astype(loss.real.dtype)

    def back(d: Any = 1.0) -> Array:
        # (p / total - onehot) / count, and 0 where the label is ignored
        weight = xp.where(counted, d / count, 0).astype(p.dtype)
        dz = p
        dz *= (weight / total)[:, None]
        dz[at] -= weight
        return dz.reshape(logits.shape)

    return loss, back


def saved(back: Back) -> dict[str, Array]:
    """The arrays that a `back` keeps alive, by the name of the variable that holds each.

    Only arrays in closures count; a parameter belongs to its layer.
    """
    arrays: dict[str, Array] = {}

    def look(name: str, value: Any) -> None:
        if isinstance(value, xp.ndarray):
            if not any(value is other for other in arrays.values()):
                arrays[name] = value
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                look(f"{name}.{i}", item)
        elif isinstance(value, types.FunctionType) and value.__closure__:
            for var, cell in zip(value.__code__.co_freevars, value.__closure__, strict=True):
                look(f"{name}.{var}" if name else var, cell.cell_contents)

    look("", back)
    return arrays
