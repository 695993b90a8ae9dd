"""Train many adapters in one pass: a packed batch, each group of whose rows trains an adapter of its own.

    dA_k, dB_k = the gradient of loss_k, the mean over the rows of run k: one forward and backward for all k

Every run has its own batches, optimizer and schedule. The base is frozen and shared, and no row reaches the
adapter of another run, so the result is that of the runs one by one: up to rounding, or to the bit if no
product has rows of two runs (`invariant`, mixed.py). It saves calls, which are launches on a GPU, but no
operations: a processor gains only if batches are tiny (benchmarks/packed.py). Stands in for mLoRA's BatchLoRA
(Ye et al. 2023, arXiv:2312.02515); leaves out its pipelines and its scheduler of jobs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..backend import Array, floats, keep_memory, quiet_overflow, xp
from ..errors import InputError, NonFiniteError, check_int, short
from ..layers import Dropout, Param
from ..lora import set_adapter, unmerged
from ..model import Llama
from ..ops import cross_entropy
from ..optim import AdamW, squared_norm
from ..tree import named_params, trained, walk
from .mixed import mixed, named, segments
from .parallel import Batch


@dataclass(eq=False)
class PackedRun:
    """How one of the adapters is trained: its batches, its optimizer, the factor on its learning rate."""

    batches: Iterable[Batch]  # ids (n, T) and labels (n, T), of one T for all runs
    optimizer: AdamW
    schedule: Callable[[int], float] | None = None


def train_packed(
    model: Llama,
    runs: Mapping[str, PackedRun],
    *,
    steps: int,
    invariant: bool = False,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, list[float]]:
    """Train adapters that are injected in the model, name -> run, together for `steps` updates of each.

    Returns the losses of every step, by name. Ranks, scales, targets and counts of rows may differ. With
    `invariant` a run has the same bits whatever is packed beside it, which takes longer. Afterwards the same
    adapter is active as before. MismatchError for a name that no adapter has, UnsupportedError for a kind
    that cannot be mixed, InputError for batches that run out or differ in length and for runs that share an
    optimizer, batches or a generator of dropout masks, StateError for a merged model, NonFiniteError when a
    loss or gradient is not finite: all parameters are then those of the last good step.
    """
    check_int("steps", steps, 1)
    if not runs:
        raise InputError("no runs; expected a PackedRun for each adapter to train, by name")
    for name, run in runs.items():
        if not isinstance(run.batches, Iterable):
            raise InputError(
                f"the batches of {name!r} are {short(run.batches)}; expected (ids, labels) pairs"
            )
    sources = {name: iter(run.batches) for name, run in runs.items()}
    refuse_shared("an optimizer", [[run.optimizer] for run in runs.values()])
    refuse_shared("an iterator of batches", [[source] for source in sources.values()])
    keep_memory()
    history: dict[str, list[float]] = {name: [] for name in runs}
    with all_trained(model, runs) as params:
        replica, batch = mixed(model, compute=segments, invariant=invariant)
        entries = {name: named(model, name) for name in runs}
        for adapters in entries.values():
            batch.checked(adapters)
        refuse_shared("a generator of dropout masks", map(generators, entries.values()))
        for step in range(steps):
            ids, labels = pack(replica, {name: next(source, None) for name, source in sources.items()}, step)
            try:
                with batch.rows([entries[name] for name in runs for _ in labels[name]]), quiet_overflow():
                    losses = gradients(replica, ids, labels)
                    squares = [squared_norm(params[name]) for name in runs]
                    values = floats(*losses, *squares)  # a step's only copy to the host
                found = dict(zip(runs, zip(values, values[len(runs) :], strict=False), strict=True))
                for name, (loss, square) in found.items():
                    if not math.isfinite(loss + square):
                        what = "gradient" if math.isfinite(loss) else "loss"
                        raise NonFiniteError(f"{name!r}, step {step + 1}: the {what} is not finite")
                rates = {
                    name: run.optimizer.lr * (run.schedule(step) if run.schedule else 1.0)
                    for name, run in runs.items()
                }
                for name, run in runs.items():
                    run.optimizer.step(params[name], rates[name], math.sqrt(found[name][1]))
                    history[name].append(found[name][0])
            finally:
                for p in (p for some in params.values() for p in some.values()):
                    p.grad = None
            if progress:
                progress(step + 1, {name: loss for name, (loss, _) in found.items()})
    return history


def refuse_shared(what: str, objects: Iterable[Iterable[Any]]) -> None:
    """InputError if two runs have the same object among theirs."""
    each = [{id(one) for one in some} for some in objects]
    if sum(map(len, each)) > len(set().union(*each)):
        raise InputError(f"two runs share {what}; expected one for each")


def generators(tree: Any) -> list[Any]:
    """The generators of a tree's dropout masks."""
    return [node.rng.bit_generator for _, node in walk(tree) if isinstance(node, Dropout)]


def pack(model: Llama, batches: Mapping[str, Batch | None], step: int) -> tuple[Array, dict[str, Array]]:
    """The ids of all runs below each other, and each run's labels; InputError if they cannot be packed."""
    parts, labels = [], {}
    for name, batch in batches.items():
        if batch is None:
            raise InputError(f"the batches of {name!r} ran out; expected one more for step {step + 1}")
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InputError(f"the batches of {name!r} have {short(batch)}; expected (ids, labels) pairs")
        parts.append(model.check(batch[0]))
        labels[name] = model.check_labels(*batch)
        if (T := parts[-1].shape[1]) != (first := parts[0].shape[1]):
            raise InputError(f"the batch of {name!r} has {T} tokens a row; expected {first}, as the others")
    return xp.concatenate(parts), labels


def gradients(model: Llama, ids: Array, labels: Mapping[str, Array]) -> list[Array]:
    """The loss of every run; its gradient is left in the run's adapter."""
    logits, back = model.forward(ids, train=True)
    losses, dlogits, start = [], xp.empty_like(logits), 0
    for own in labels.values():
        at = slice(start, start := start + len(own))
        loss, back_loss = cross_entropy(logits[at], own)
        dlogits[at] = back_loss()
        losses.append(loss)
    back(dlogits)
    return losses


@contextlib.contextmanager
def all_trained(model: Llama, names: Iterable[str]) -> Iterator[dict[str, dict[str, Param]]]:
    """Within the context the adapters of these names are trained; yields the parameters of each, by path."""
    activated = [(layer, layer.active) for layer in unmerged(model).values()]
    flags = [(p, p.trainable) for p in named_params(model).values()]
    try:
        params = {}
        for name in names:
            set_adapter(model, name)
            params[name] = trained(model)
        for p in (p for some in params.values() for p in some.values()):
            p.trainable = True
        yield params
    finally:
        for p, trainable in flags:
            p.trainable = trainable
        for layer, active in activated:
            layer.active = active
