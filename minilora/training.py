"""The loop: model + batches + optimizer -> history.

    for each batch: loss = gradient(batch); optimizer.step

Stands in for a trainer; leaves out callbacks, devices and distributed training. `train` trains every
trainable parameter, so LoRA and full fine-tuning are the same call. One checkpoint file holds all that a run
needs to resume bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from .backend import floats, keep_memory, quiet_overflow, to_host, xp
from .digests import of_json
from .errors import InputError, NonFiniteError, StateError, UnsupportedError, check_int, short
from .fast.folded import folded, places
from .fast.parallel import Batch, on_threads
from .fast.recompute import check_recompute
from .formats.atomic import exists
from .formats.checkpoint import GENERATORS, History, load_checkpoint, save_checkpoint
from .optim import AdamW, Schedule, squared_norm
from .tree import digest, named_params, replica, settings, trained


def train(
    model: Any,
    batches: Iterable[Batch],
    optimizer: AdamW,
    *,
    steps: int,
    schedule: Callable[[int], float] | None = None,
    accumulate: int = 1,
    evaluate: Callable[[], float] | None = None,
    eval_every: int | None = None,
    progress: Callable[[int, float], None] | None = None,
    checkpoint: Path | str | None = None,
    checkpoint_every: int | None = None,
    rngs: Mapping[str, np.random.Generator] | None = None,
    identity: Mapping[str, Any] | None = None,
    threads: int | None = None,
    recompute: str | None = None,
) -> History:
    """Train all trainable parameters for `steps` updates; each averages `accumulate` batches of equal weight.

    `schedule(step)` is the factor on the learning rate (default: 1); `evaluate` runs before the first update,
    every `eval_every` updates and after the last. With a `checkpoint` path, the run resumes from the file if
    it exists and keeps it up to date. `rngs` names the generators of batches and dropout, whose states the
    file holds; `identity` is what else a resumed run must share (the data, say). `threads` compute
    micro-batches (default: one per core); `recompute` saves memory: "selective" computes attention's
    exponentials, the MLP's norm and SwiGLU again in the backward, "full" all but the inputs of a block's two
    halves. Neither changes a bit of the result (fast/). ConfigError for another `recompute`, StateError when
    nothing is trainable, InputError when the batches run out, NonFiniteError when loss or gradient is not
    finite: the parameters are then those of the last good step.
    """
    check_batches(batches, "ml.batches(ml.encode(text), rng, batch_size, length)")
    check_int("steps", steps, 1)
    check_int("accumulate", accumulate, 1)
    optional = {"threads": threads, "eval_every": eval_every, "checkpoint_every": checkpoint_every}
    for what, number in optional.items():
        if number is not None:
            check_int(what, number, 1)
    check_recompute(recompute)
    params = trained(model)
    if not params:
        raise StateError("nothing is trainable; inject an adapter, or unfreeze the model")
    keep_memory()
    history, rngs = History(), rngs or {}
    run = about(model, optimizer, schedule, accumulate) | dict(identity or {})
    for name, rng in rngs.items() if checkpoint else ():
        if (kind := type(rng.bit_generator).__name__) not in GENERATORS:
            raise UnsupportedError(
                f"the generator {name} is a {kind}; a checkpoint needs {' or '.join(GENERATORS)}"
            )
    if checkpoint and exists(checkpoint):
        history = load_checkpoint(checkpoint, model, optimizer, rngs, run, steps)
    done = len(history.loss)
    source = iter(batches)
    if not rngs:  # batches that no generator draws, a list say: skip those already used
        source = islice(source, done * accumulate, None)
    if evaluate and not done:
        history.evals.append((0, evaluate()))
    with on_threads(model, threads, recompute) as gradient:
        for step in range(done, steps):
            try:
                group = list(islice(source, accumulate))
                if len(group) < accumulate:
                    missing = accumulate - len(group)
                    raise InputError(f"the batches ran out; expected {missing} more for step {step + 1}")
                with quiet_overflow():  # a loss or gradient that is not finite raises below
                    mean = gradient(group)
                    loss, square = floats(mean, squared_norm(params))  # a step's only copy to the host
                    if not math.isfinite(loss):
                        raise NonFiniteError(f"step {step + 1}: the loss is {loss}; step {step} is kept")
                    lr = optimizer.lr * (schedule(step) if schedule else 1.0)
                    optimizer.step(params, lr, math.sqrt(square))
            finally:
                for p in params.values():
                    p.grad = None
            history.loss.append(loss)
            last = step + 1 == steps
            if evaluate and (last or (eval_every and (step + 1) % eval_every == 0)):
                history.evals.append((step + 1, evaluate()))
            if checkpoint and (last or (checkpoint_every and (step + 1) % checkpoint_every == 0)):
                save_checkpoint(checkpoint, model, optimizer, rngs, history, run)
            if progress:
                progress(step + 1, loss)
    return history


def evaluate(model: Any, batches: Iterable[Batch]) -> float:
    """Mean loss in nats per token over batches, each weighted by its count of labels.

    InputError if there is no label.
    """
    check_batches(batches, "ml.eval_batches(ml.encode(text), batch_size, length)")
    total, count = 0.0, 0
    copy = replica(model)
    adapters = places(copy)
    for M, group in groupby(batches, lambda batch: getattr(batch[0], "size", 0)):
        with folded([adapters], M):
            for ids, labels in group:
                host = to_host(labels)
                n = int((host >= 0).sum()) if host.dtype.kind in "iu" else len(host)  # noise is all counted
                total += float(copy.loss(ids, labels)[0]) * n
                count += n
    if not count:
        raise InputError("nothing to evaluate: the batches have no label; expected at least one")
    return total / count


def check_batches(batches: Any, how: str) -> None:
    """InputError, saying `how` to make batches, for common mistakes: a text, its path, an array of ids."""
    first = batches[0] if isinstance(batches, list | tuple) and batches else None
    pair = isinstance(first, list | tuple) and len(first) == 2
    kind = ""
    if isinstance(batches, str | Path):
        kind = f"{short(str(batches))}, a text or a path"
    elif isinstance(batches, np.ndarray | xp.ndarray):
        kind = f"one array of shape {batches.shape}"
    elif isinstance(first, np.ndarray | xp.ndarray) and isinstance(batches, tuple):
        kind = "one batch"
    elif isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        kind = f"of type {type(batches).__name__}"
    elif first is not None and not pair:
        kind = f"a {type(batches).__name__} of {type(first).__name__}"
    if kind:
        raise InputError(f"batches is {kind}; expected (ids, labels) pairs, such as {how}")


def about(
    model: Any, optimizer: AdamW, schedule: Callable[[int], float] | None, accumulate: int
) -> dict[str, Any]:
    """The settings that a resumed run must share with the run it continues, besides the trained parameters.

    Of schedules only a Schedule is compared: another function does not say what it does.
    """
    o = optimizer
    frozen = {path.replace(".", "/"): p for path, p in named_params(model).items() if not p.trainable}
    groups = {path: [o.rate(path), bool(o.decays(path, p))] for path, p in trained(model).items()}
    return {
        "base": digest(frozen),
        "model": of_json(settings(model)),
        "optimizer": [o.lr, *o.betas, o.eps, o.weight_decay, o.clip],
        "groups": of_json(groups),
        "schedule": repr(schedule) if isinstance(schedule, Schedule) else None,
        "accumulate": accumulate,
    }
