"""Does merging change what the model says? The observed difference and a derived bound.

With unit roundoff u, a product of inner dimension k errs by at most g(k) = k u / (1 - k u) times the
product of the absolute values (Higham, Accuracy and Stability, 3.1). The unmerged
y = fl(W x) + fl(s B (A x)) and the merged y = fl(W + s B A) x are each within
g(n+1) |W||x| + g(n+r+2) |s||B||A||x| of the exact value, so their difference is within twice that.
"""

from typing import Any

import numpy as np

from ..backend import to_device, to_host
from ..layers import Linear, Need, Param
from ..lora import Adapted, LowRank, merge

Row = dict[str, Any]


def merge_bound(
    W: np.ndarray, A: np.ndarray, B: np.ndarray, s: float, X: np.ndarray, dtype: Any
) -> np.ndarray:
    """The bound (M, O) on the difference between merged and unmerged outputs, for rows X (M, I).

    Evaluated in a wider type. The last term is for underflow; it matters only near the smallest numbers.
    """
    info = np.finfo(dtype)
    wide = np.float64 if np.dtype(dtype) == np.float32 else np.longdouble
    u, tiny = wide(info.eps) / 2, wide(info.smallest_subnormal)
    W, A, B, X = (np.abs(v).astype(wide) for v in (W, A, B, X))
    size = wide(abs(np.dtype(dtype).type(s)))
    r, n = A.shape

    def g(k: int) -> Any:
        return k * u / (1 - k * u)

    factors, x = B.sum(1)[None, :], X.sum(1, keepdims=True)
    underflow = 2 * tiny * (n + 2 + size * (r + n * factors) + (size * r + 1) * x)
    return 2 * (g(n + 1) * (X @ W.T) + g(n + r + 2) * size * ((X @ A.T) @ B.T)) + underflow


def run(seed: int = 0, rank: int = 8, draws: int = 5) -> list[Row]:
    """A row per dtype and width: the largest difference in `draws` maps, and its bound, relative to |y|."""
    rows = []
    for dtype in (np.float32, np.float64):
        for n in (16, 32, 64, 128, 256, 512, 1024, 2048):
            rng = np.random.default_rng([seed, n])
            largest = np.max([one(rng, n, rank, dtype) for _ in range(draws)], axis=0).tolist()
            row = {"dtype": np.dtype(dtype).name, "inputs": n, "rank": rank, "draws": draws}
            rows.append(row | dict(zip(("difference", "bound", "ratio"), largest, strict=True)))
    return rows


def one(rng: np.random.Generator, n: int, rank: int, dtype: Any) -> tuple[float, float, float]:
    """For one random map: difference and bound relative to the largest output, and their largest ratio."""

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(dtype)

    W, A, B, X = draw(n // 2, n), draw(rank, n), draw(n // 2, rank), draw(9, n)
    low_rank = LowRank(Param(to_device(A)), Param(to_device(B)), 2.0)
    layer = Adapted(Linear(Param(to_device(W), False)), {"a": low_rank}, "a")

    def output() -> np.ndarray:
        return to_host(layer(to_device(X), Need.NONE)[0]).astype(np.longdouble)

    apart = output()
    merge({"layer": layer})
    difference = np.abs(output() - apart)
    bound = merge_bound(W, A, B, 2.0, X, dtype)
    top = np.abs(apart).max()
    return float(difference.max() / top), float(bound.max() / top), float((difference / bound).max())
