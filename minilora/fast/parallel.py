"""The gradient of a batch, from parts that fit the cache, several at a time on threads.

    loss = sum of (n_i / n) loss_i,        n_i of the batch's n labels in part i; the gradient likewise

Llama.loss on a whole batch means the same; parts mean less memory, and NumPy lets go of the interpreter's
lock inside its functions, so threads keep as many cores busy, if each call is long enough. A lane is a model
that shares every array with the first and has gradients of its own. The cut depends on shapes alone and
parts are added up in their order: the number of threads changes no bit. Stands in for torch's data
parallelism; leaves out processes and machines, over which a sweep spreads whole runs instead.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from queue import SimpleQueue
from typing import Any

from ..backend import Array, cores, on_host, one_blas_thread, quiet_overflow, to_host, xp
from ..layers import Dropout, Param
from ..lora import holding, low_ranks
from ..tree import named_params, trained, walk

PART = 1 << 17  # numbers (tokens x width) of a part at most: where calls are shorter, threads wait in turn

Batch = tuple[Array, Array]  # ids (N, T) and labels (N, T)
Part = tuple[Array, Array, float]  # the same of some rows, and their weight


def twin(model: Any) -> Any:
    """A model of the same arrays, with gradients of its own."""
    return deepcopy(model, {id(p): Param(p.data, p.trainable) for p in named_params(model).values()})


def parts(ids: Array, labels: Array, width: int) -> Iterator[Part]:
    """A batch cut by rows into equal parts of about PART numbers, each weighted by its share of the labels.

    What is no pair of equal shapes stays whole, for the model to refuse; so does all on a GPU, where
    many small calls are what costs.
    """
    shape: tuple[int, ...] = getattr(ids, "shape", ())
    if len(shape) != 2 or 0 in shape or shape != getattr(labels, "shape", ()) or not on_host():
        yield ids, labels, 1.0
        return
    counts = (to_host(labels) >= 0).sum(1)
    n = math.ceil(shape[0] / math.ceil(ids.size * width / PART))
    for i in range(0, shape[0], n):
        part = slice(i, i + n)
        yield ids[part], labels[part], float(counts[part].sum() / max(counts.sum(), 1))


def add(total: Array | None, g: Array | None) -> Array | None:
    """One gradient more; None is that of a parameter which the loss does not reach."""
    if total is None or g is None:
        return g if total is None else total
    total += g
    return total


@contextlib.contextmanager
def lanes(model: Any, threads: int | None = None) -> Iterator[Callable[[list[Batch]], Array]]:
    """A function: batches -> their mean loss, on the device, its gradient left in the model's parameters.

    `threads` None is one for each core. There is one only where BLAS cannot be held to a thread per lane,
    on a GPU, and for a model with dropout, whose masks come from one generator in one order.
    """
    from concurrent.futures import ThreadPoolExecutor

    threads = cores() if threads is None else threads
    if not on_host() or any(isinstance(node, Dropout) for _, node in walk(model)):
        threads = 1
    with contextlib.ExitStack() as stack:
        if threads > 1 and not stack.enter_context(one_blas_thread()):
            threads = 1
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        models = [model, *(twin(model) for _ in range(threads - 1))]
        adapters = list(zip(*map(low_ranks, models), strict=True))
        params_of = [list(trained(lane).values()) for lane in models]
        free: SimpleQueue[Any] = SimpleQueue()
        for lane in zip(models, params_of, strict=True):
            free.put(lane)

        def run(part: Part) -> tuple[Array, list[Array | None]]:
            lane, params = free.get()
            ids, labels, weight = part
            try:
                with quiet_overflow():  # threads do not inherit it
                    loss, back = lane.loss(ids, labels, train=True)
                    back(weight)
                return weight * xp.asarray(loss, dtype=xp.float64), [p.grad for p in params]
            finally:
                for p in params:
                    p.grad = None
                free.put((lane, params))

        def gradient(batches: list[Batch]) -> Array:
            each, width = 1 / len(batches), model.config.hidden_size
            jobs = [(ids, labels, each * w) for batch in batches for ids, labels, w in parts(*batch, width)]
            with contextlib.ExitStack() as held:
                M = sum(getattr(ids, "size", 0) for ids, *_ in jobs)  # what is no array, the model refuses
                for twins in adapters:
                    held.enter_context(holding(twins, M))
                results = pool.map(run, jobs) if threads > 1 else map(run, jobs)
                loss, grads = next(results)
                for more, others in results:
                    loss = loss + more
                    grads = [add(total, g) for total, g in zip(grads, others, strict=True)]
            for p, g in zip(params_of[0], grads, strict=True):
                p.grad = g
            return loss

        yield gradient
