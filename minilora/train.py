"""The loop: model + batches + optimizer -> history.

    for each batch: loss, back = model.loss(ids, labels); back(); optimizer.step

Stands in for a trainer; leaves out callbacks, devices and distributed anything. Whatever is trainable is
trained, so LoRA and full fine-tuning are the same call. One checkpoint file holds all that is needed to
go on as if nothing had happened, to the bit.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .backend import Array, keep_memory, to_device, to_host
from .errors import FormatError, InputError, MismatchError, NonFiniteError, StateError, check_int
from .layers import digest, named_params, trained
from .optim import AdamW
from .storage import read, write_atomic

Batch = tuple[Array, Array]  # ids (N, T) and labels (N, T)


@dataclass
class History:
    """The mean loss of every step, and the (step, value) of every evaluation."""

    loss: list[float] = field(default_factory=list)
    evals: list[tuple[int, float]] = field(default_factory=list)


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
) -> History:
    """Train what is trainable for `steps` updates; each averages `accumulate` batches of equal weight.

    `schedule(step)` is the factor on the learning rate (constant 1 unless given); `evaluate` runs before
    the first update, every `eval_every` and after the last. With a `checkpoint` path, the run continues
    from the file if it is there and keeps it up to date; `rngs` names the generators that the batches
    and the dropout draw from, whose states belong to it. StateError when nothing is trainable,
    InputError when the batches run out, NonFiniteError when loss or gradient is not finite: the
    parameters are then those of the last good step.
    """
    check_int("steps", steps, 1)
    check_int("accumulate", accumulate, 1)
    params = trained(model)
    if not params:
        raise StateError("nothing is trainable; inject an adapter, or unfreeze the model")
    keep_memory()
    history, rngs = History(), rngs or {}
    if checkpoint and Path(checkpoint).exists():
        history = load_checkpoint(checkpoint, model, optimizer, rngs)
    source = iter(batches)
    done = len(history.loss)
    if evaluate and not done:
        history.evals.append((0, evaluate()))
    for step in range(done, steps):
        loss = accumulated(model, islice(source, accumulate), accumulate)
        if not math.isfinite(loss):
            for p in params.values():
                p.grad = None
            raise NonFiniteError(
                f"step {step + 1}: the loss is {loss}; the parameters of step {step} are kept"
            )
        try:
            optimizer.step(params, optimizer.lr * (schedule(step) if schedule else 1.0))
        finally:
            for p in params.values():
                p.grad = None
        history.loss.append(loss)
        last = step + 1 == steps
        if evaluate and (last or (eval_every and (step + 1) % eval_every == 0)):
            history.evals.append((step + 1, evaluate()))
        if checkpoint and (last or (checkpoint_every and (step + 1) % checkpoint_every == 0)):
            save_checkpoint(checkpoint, model, optimizer, rngs, history)
        if progress:
            progress(step + 1, loss)
    return history


def accumulated(model: Any, batches: Iterator[Batch], count: int) -> float:
    """The mean loss over the micro-batches, its gradient summed up in the parameters."""
    total, seen = 0.0, 0
    for ids, labels in batches:
        loss, back = model.loss(ids, labels, train=True)
        total += float(loss)
        seen += 1
        if not math.isfinite(total):
            return total / count
        back(1.0 / count)
    if seen < count:
        raise InputError(f"the batches ran out; expected {count - seen} more for this step")
    return total / count


def evaluate(model: Any, batches: Iterable[Batch]) -> float:
    """Mean loss in nats per token over batches, each weighted by its count of labels."""
    total, count = 0.0, 0
    for ids, labels in batches:
        n = int((to_host(labels) >= 0).sum())
        total += float(model.loss(ids, labels)[0]) * n
        count += n
    if not count:
        raise InputError("there is nothing to evaluate; expected at least one label")
    return total / count


def save_checkpoint(
    path: Path | str, model: Any, optimizer: AdamW, rngs: Mapping[str, np.random.Generator], history: History
) -> None:
    """All that a run needs to go on, in one safetensors file, complete or not there."""
    from safetensors.numpy import save

    tensors = {f"p.{k}": np.ascontiguousarray(to_host(p.data)) for k, p in trained(model).items()}
    tensors |= {k: np.ascontiguousarray(a) for k, a in optimizer.state().items()}
    meta = {
        "step": len(history.loss),
        "history": {"loss": history.loss, "evals": history.evals},
        "rngs": {name: rng.bit_generator.state for name, rng in rngs.items()},
        "frozen": frozen_digest(model),
        "optimizer": settings(optimizer),
    }
    write_atomic(path, save(tensors, metadata={"minilora": json.dumps(meta)}))


def load_checkpoint(
    path: Path | str, model: Any, optimizer: AdamW, rngs: Mapping[str, np.random.Generator]
) -> History:
    """Put model, optimizer and generators where the file's run was; MismatchError if they do not fit."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = read(path)
    try:
        tensors = load(data)
        meta = json.loads(
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["minilora"]
        )
    except (SafetensorError, ValueError, KeyError) as e:
        raise FormatError(f"{path}: is no checkpoint of minilora: {e}") from e
    params = trained(model)
    if {f"p.{k}" for k in params} != {k for k in tensors if k.startswith("p.")}:
        raise MismatchError(f"{path}: holds other trained parameters than the model has")
    for k, p in params.items():
        if tensors[f"p.{k}"].shape != p.data.shape:
            raise MismatchError(
                f"{path}: {k} has shape {tensors[f'p.{k}'].shape}; the model's {p.data.shape}"
            )
    if meta["frozen"] != frozen_digest(model):
        raise MismatchError(f"{path}: was written over another base model")
    if meta["optimizer"] != settings(optimizer):
        raise MismatchError(f"{path}: was trained with {meta['optimizer']}; now it is {settings(optimizer)}")
    if set(meta["rngs"]) != set(rngs):
        raise MismatchError(f"{path}: holds the generators {sorted(meta['rngs'])}; given are {sorted(rngs)}")
    for k, p in params.items():
        p.data[...] = to_device(tensors[f"p.{k}"])
    optimizer.load({k: a for k, a in tensors.items() if not k.startswith("p.")}, meta["step"])
    for name, rng in rngs.items():
        rng.bit_generator.state = meta["rngs"][name]
    evals = [(int(step), float(value)) for step, value in meta["history"]["evals"]]
    return History(meta["history"]["loss"], evals)


def frozen_digest(model: Any) -> str:
    """What the run stands on: the digest of everything that is not trained."""
    return digest({path.replace(".", "/"): p for path, p in named_params(model).items() if not p.trainable})


def settings(optimizer: AdamW) -> dict[str, Any]:
    """The optimizer's numbers, which a resumed run must share."""
    o = optimizer
    return {"lr": o.lr, "betas": list(o.betas), "eps": o.eps, "decay": o.weight_decay, "clip": o.clip}
