"""Functions without weights: each returns its value and `back`, the way home for the gradient.

    y, back = op(x)        back(dy) -> dx, of the shape of x; to be called at most once

A `back` may overwrite what its forward kept, for nobody else holds it. Softmax p = exp(x - max) / sum
has dx = p * (dp - sum(dp * p)); cross-entropy after softmax has dlogits = (p - onehot) / count.
Stands in for the autograd of torch.nn.functional. All functions follow the dtype of their operands and
are analytic where they are smooth, so that a complex step measures their derivative to the last digits.
"""

import math
import types
from collections.abc import Callable
from typing import Any

from .backend import Array, quiet_overflow, xp

Back = Callable[..., Any]

IGNORE = -100  # the label that counts for nothing, as in PyTorch


def rows(x: Array) -> Array:
    """(..., I) as a matrix of M rows (M, I)."""
    return x.reshape(-1, x.shape[-1])


def softmax(x: Array) -> tuple[Array, Back]:
    """exp(x) / sum(exp(x)) over the last axis, safe against overflow."""
    p = _softmax_(x - x.real.max(-1, keepdims=True))

    def back(dp: Array) -> Array:
        return _softmax_back_(p, dp.copy())

    return p, back


def _softmax_(z: Array) -> Array:
    """The softmax of z <= 0, written over z."""
    xp.exp(z, out=z)
    z /= z.sum(-1, keepdims=True)
    return z


def _softmax_back_(p: Array, dp: Array) -> Array:
    """p * (dp - sum(dp * p)), written over dp."""
    dp -= xp.einsum("...i,...i->...", dp, p)[..., None]
    dp *= p
    return dp


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)); an exp that overflows gives the right 0 and says nothing."""
    y = -x
    with quiet_overflow():
        xp.exp(y, out=y)
    y += 1
    return xp.reciprocal(y, out=y)


def silu(x: Array) -> tuple[Array, Back]:
    """x * sigmoid(x)."""
    s = sigmoid(x)

    def back(dy: Array) -> Array:
        return dy * (s * (1 + x * (1 - s)))

    return x * s, back


def swiglu(gate: Array, up: Array) -> tuple[Array, Back]:
    """silu(gate) * up (Shazeer 2020): all three (..., F); back gives (dgate, dup)."""
    s = sigmoid(gate)
    a = gate * s

    def back(dy: Array) -> tuple[Array, Array]:
        # silu' = s (1 + gate (1 - s)) = s + a - s a
        dup = dy * a
        dgate = s - s * a
        dgate += a
        dgate *= up
        dgate *= dy
        return dgate, dup

    return a * up, back


def gelu(x: Array) -> tuple[Array, Back]:
    """0.5 x (1 + tanh(c (x + 0.044715 x³))), c = sqrt(2/pi) (Hendrycks and Gimpel 2016)."""
    c = math.sqrt(2 / math.pi)
    t = xp.tanh(c * (x + 0.044715 * x * x * x))

    def back(dy: Array) -> Array:
        return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x))

    return 0.5 * x * (1 + t), back


def rms_norm(x: Array, eps: float) -> tuple[Array, Back]:
    """x / sqrt(mean(x²) + eps) over the last axis (Zhang and Sennrich 2019); x (..., D)."""
    rms = xp.sqrt(xp.einsum("...i,...i->...", x, x)[..., None] / x.shape[-1] + eps)
    y = x / rms

    def back(dy: Array) -> Array:
        # dx = (dy - y mean(dy * y)) / rms
        dx = y * (xp.einsum("...i,...i->...", dy, y)[..., None] / -x.shape[-1])
        dx += dy
        dx /= rms
        return dx

    return y, back


def rope_tables(positions: Array, heads: int, width: int, theta: float, dtype: Any) -> tuple[Array, Array]:
    """cos and signed sin (T, H*E) of position * theta^(-2j/E), j < E/2, for H heads (Su et al. 2021).

    Each head has its cosines twice, and its sines first with a minus: as `rope` wants them.
    """
    inverse = theta ** (xp.arange(width // 2) * (-2.0 / width))
    angle = positions[:, None] * inverse  # float64 until the end: large positions lose no digits
    cos, sin = xp.cos(angle), xp.sin(angle)
    tables = xp.tile(cos, 2 * heads), xp.tile(xp.concatenate([-sin, sin], 1), heads)
    return tables[0].astype(dtype), tables[1].astype(dtype)


def rope(x: Array, cos: Array, sin: Array, width: int) -> tuple[Array, Back]:
    """Turn the pairs (j, j + E/2) of each head in x (N, T, H*E) by the angles of the tables.

    [a, b] -> [a, b] * cos + [b, a] * [-sin, sin], Hugging Face's half-split. Three long passes over
    memory and one that swaps the halves: heads, of E numbers, are too short to loop over.
    """
    N, T, W = x.shape
    cos, sin = cos[:, :W], sin[:, :W]  # fewer heads, where keys have fewer

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


def attention(q: Array, k: Array, v: Array) -> tuple[Array, Back]:
    """Causal softmax(q kᵀ / sqrt(E)) v (Vaswani et al. 2017), grouped queries (Ainslie et al. 2023).

    q (N, H, T, E); k, v (N, G, S, E), where head h reads group h // (H/G) and the T queries are the
    last of the S positions. Returns (N, H, T, E); back gives (dq, dk, dv).
    """
    N, H, T, E = q.shape
    G, S = k.shape[1:3]
    scale = 1 / math.sqrt(E)
    q = q.reshape(N, G, H // G, T, E) * scale
    k, v = k[:, :, None], v[:, :, None]  # (N, G, 1, S, E)
    scores = q @ k.swapaxes(-1, -2)  # (N, G, H/G, T, S)
    if T > 1:
        future = xp.arange(S) > xp.arange(S - T, S)[:, None]
        scores += xp.where(future, -math.inf, 0.0).astype(scores.real.dtype)
    scores -= scores.real.max(-1, keepdims=True)
    p = _softmax_(scores)
    y = (p @ v).reshape(N, H, T, E)

    def back(dy: Array) -> tuple[Array, Array, Array]:
        dy = dy.reshape(N, G, H // G, T, E)
        dv = p.swapaxes(-1, -2) @ dy  # (N, G, H/G, S, E)
        ds = _softmax_back_(p, dy @ v.swapaxes(-1, -2))
        dq = ds @ k
        dq *= scale
        dk = ds.swapaxes(-1, -2) @ q  # q carries the scale
        return dq.reshape(N, H, T, E), dk.sum(2), dv.sum(2)

    return y, back


def dropout(x: Array, keep: Array) -> tuple[Array, Back]:
    """x * keep, where the mask `keep` of x's shape holds 0 and 1/(1-p)."""

    def back(dy: Array) -> Array:
        return dy * keep

    return x * keep, back


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Back]:
    """Mean over labels of -log softmax(logits)[label], in nats; a label of -100 counts for nothing.

    logits (..., V), labels (...) of ints. back(d) takes the scalar's gradient. With no label that
    counts, the loss and its gradient are 0.
    """
    z, labels = rows(logits), labels.reshape(-1)
    counted = labels != IGNORE
    count = max(int(counted.sum()), 1)
    at = (xp.arange(len(labels)), xp.where(counted, labels, 0))
    z = z - z.real.max(-1, keepdims=True)
    target = z[at]
    p = xp.exp(z, out=z)
    total = p.sum(-1)
    loss = (xp.where(counted, xp.log(total) - target, 0)).sum() / count

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

    Only what closures hold counts; a parameter belongs to its layer.
    """
    found: dict[str, Array] = {}

    def look(name: str, value: Any) -> None:
        if isinstance(value, xp.ndarray):
            if not any(value is other for other in found.values()):
                found[name] = value
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                look(f"{name}.{i}", item)
        elif isinstance(value, types.FunctionType) and value.__closure__:
            for var, cell in zip(value.__code__.co_freevars, value.__closure__, strict=True):
                look(f"{name}.{var}" if name else var, cell.cell_contents)

    look("", back)
    return found
