"""How much work a forward pass is on any machine: its products of matrices are counted while it runs."""

from typing import Any, NamedTuple

import numpy as np

from ..model import Llama
from ..tree import named_params


class Work(NamedTuple):
    """Products of matrices, and the multiplications of numbers in them."""

    products: int
    multiplications: int


def work(model: Llama, ids: np.ndarray) -> Work:
    """The products of matrices in one forward pass of a model in NumPy over token ids (N, T).

    For the pass every parameter is an array that notes the products it takes part in, as does all that is
    computed from it.
    """
    products: list[int] = []  # multiplications in each

    class Counted(np.ndarray):
        def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
            inputs, out = map(plain, (inputs, options.pop("out", ())))
            if out:
                options["out"] = out
            result = getattr(ufunc, method)(*inputs, **options)
            if ufunc is np.matmul:
                products.append(result.size * inputs[0].shape[-1])
            return result.view(Counted) if isinstance(result, np.ndarray) else result

    def plain(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(v.view(np.ndarray) if isinstance(v, Counted) else v for v in values)

    params = list(named_params(model).values())
    before = [p.data for p in params]
    try:
        for p in params:
            p.data = p.data.view(Counted)
        model(ids)
    finally:
        for p, data in zip(params, before, strict=True):
            p.data = data
    return Work(len(products), sum(products))
