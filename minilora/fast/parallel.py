"""The gradient of a batch from micro-batches that fit the cache, several at a time on threads.

    loss = sum of (n_i / n) loss_i,   n_i of the batch's n labels in micro-batch i; the gradient likewise

Llama.loss on a whole batch gives the same. Micro-batches need less memory, and NumPy releases the
interpreter's lock inside its functions, so threads keep as many cores busy if each call is long enough. Each
thread works on a replica: a model that shares every array with the first but not the gradients. The cut
depends on shapes alone and gradients are added in the order of the micro-batches, so the number of threads
changes no bit. Stands in for torch's data parallelism; leaves out processes and machines: a sweep spreads
whole runs over those.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

from ..backend import Array, cores, on_host, one_blas_thread, quiet_overflow, to_host, xp
from ..layers import Dropout
from ..tree import replica, trained, walk
from .folded import folded, places
from .recompute import recompute as wrap

MICRO_BATCH = 1 << 17  # numbers (tokens x width) at most; with shorter calls threads wait for the lock

Batch = tuple[Array, Array]  # ids (N, T) and labels (N, T)
Weighted = tuple[Array, Array, float]  # ids and labels of some rows, and their weight


def micro_batches(ids: Array, labels: Array, width: int) -> Iterator[Weighted]:
    """A batch cut by rows into equal micro-batches, each weighted by its share of the labels.

    A batch that is not a pair of equal shapes stays whole, and the model refuses it. On a GPU every batch
    stays whole, since many small calls are slow there.
    """
    shape: tuple[int, ...] = getattr(ids, "shape", ())
    if len(shape) != 2 or 0 in shape or shape != getattr(labels, "shape", ()) or not on_host():
        yield ids, labels, 1.0
        return
    counts = (to_host(labels) >= 0).sum(1)
    n = math.ceil(shape[0] / math.ceil(ids.size * width / MICRO_BATCH))
    for i in range(0, shape[0], n):
        part = slice(i, i + n)
        yield ids[part], labels[part], float(counts[part].sum() / max(counts.sum(), 1))


def add(total: Array | None, g: Array | None) -> Array | None:
    """Add one gradient; None means that the loss does not reach the parameter."""
    if total is None or g is None:
        return g if total is None else total
    total += g
    return total


@contextlib.contextmanager
def on_threads(
    model: Any, threads: int | None = None, recompute: str | None = None
) -> Iterator[Callable[[list[Batch]], Array]]:
    """Yields a function: batches -> their mean loss, on the device; it leaves the gradient in the parameters.

    `threads` None means one per core. Only one is used where BLAS cannot be held to one thread, on a GPU,
    and for a model with dropout, whose masks come from one generator in one order. `recompute` trades
    time for memory (recompute.py).
    """
    threads = cores() if threads is None else threads
    if not on_host() or any(isinstance(node, Dropout) for _, node in walk(model)):
        threads = 1
    with contextlib.ExitStack() as stack:
        if threads > 1 and not stack.enter_context(one_blas_thread()):
            threads = 1
        run_all: Callable[..., Iterator[Any]] = map
        if threads > 1:
            from concurrent.futures import ThreadPoolExecutor

            run_all = stack.enter_context(ThreadPoolExecutor(threads)).map
        replicas = [replica(model) for _ in range(threads)]
        params = list(trained(model).values())
        free: SimpleQueue[Any] = SimpleQueue()
        for copy in replicas:
            free.put((copy, list(trained(copy).values())))
            if recompute is not None:
                wrap(copy, recompute)
        adapters = [places(copy) for copy in replicas]

        def run(micro_batch: Weighted) -> tuple[Array, list[Array | None]]:
            copy, own = free.get()
            ids, labels, weight = micro_batch
            try:
                with quiet_overflow():  # threads do not inherit it
                    loss, back = copy.loss(ids, labels, train=True)
                    back(weight)
                return weight * xp.asarray(loss, dtype=xp.float64), [p.grad for p in own]
            finally:
                for p in own:
                    p.grad = None
                free.put((copy, own))

        def gradient(batches: list[Batch]) -> Array:
            each, width = 1 / len(batches), model.config.hidden_size
            cuts = (cut for batch in batches for cut in micro_batches(*batch, width))
            jobs = [(ids, labels, each * weight) for ids, labels, weight in cuts]
            M = sum(getattr(ids, "size", 0) for ids, *_ in jobs)  # the model refuses anything else
            with folded(adapters, M):
                results = (run_all if len(jobs) > 1 else map)(run, jobs)  # one is not worth a thread
                loss, grads = next(results)
                for more, others in results:
                    loss = loss + more
                    grads = [add(total, g) for total, g in zip(grads, others, strict=True)]
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            return loss

        yield gradient
