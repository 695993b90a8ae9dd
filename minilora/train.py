"""The loop: model + batches + optimizer -> history.

    for each batch: loss = gradient(batch); optimizer.step

Stands in for a trainer; leaves out callbacks, devices and distributed anything. Whatever is trainable is
trained, so LoRA and full fine-tuning are the same call. One checkpoint file holds all that is needed to
go on as if nothing had happened, to the bit.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .backend import floats, keep_memory, quiet_overflow, to_device, to_host
from .errors import (
    FormatError,
    InputError,
    MiniloraError,
    MismatchError,
    NonFiniteError,
    StateError,
    check_int,
)
from .lanes import Batch, lanes
from .layers import digest, named_params, settings, trained
from .optim import AdamW, Schedule, squared_norm
from .storage import discard, exists, locked, read, write_atomic
from .tensors import open_tensors

CHECKPOINT = "checkpoint.safetensors"  # its name in a folder of work


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
    identity: Mapping[str, Any] | None = None,
    threads: int | None = None,
) -> History:
    """Train what is trainable for `steps` updates; each averages `accumulate` batches of equal weight.

    `schedule(step)` is the factor on the learning rate (constant 1 unless given); `evaluate` runs before
    the first update, every `eval_every` and after the last. With a `checkpoint` path, the run continues
    from the file if it is there and keeps it up to date; `rngs` names the generators that the batches
    and the dropout draw from, whose states belong to it, and `identity` what else a run must share to
    go on (the data, say). `threads` compute the parts of a batch, one for each core unless given, and
    change no bit (lanes.py). StateError when nothing is trainable, InputError when the batches run out,
    NonFiniteError when loss or gradient is not finite: the parameters are then those of the last good
    step.
    """
    check_int("steps", steps, 1)
    check_int("accumulate", accumulate, 1)
    if threads is not None:
        check_int("threads", threads, 1)
    for name, every in (("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
        if every is not None:
            check_int(name, every, 1)
    params = trained(model)
    if not params:
        raise StateError("nothing is trainable; inject an adapter, or unfreeze the model")
    keep_memory()
    history, rngs = History(), rngs or {}
    run = about(model, optimizer, schedule, accumulate) | dict(identity or {})
    if checkpoint and exists(checkpoint):
        history = load_checkpoint(checkpoint, model, optimizer, rngs, run)
    done = len(history.loss)
    source = iter(batches)
    if not rngs:  # batches that no generator draws, a list say, are passed over as far as they were used
        source = islice(source, done * accumulate, None)
    if evaluate and not done:
        history.evals.append((0, evaluate()))
    with lanes(model, threads) as gradient:
        for step in range(done, steps):
            try:
                some = list(islice(source, accumulate))
                if len(some) < accumulate:
                    missing = accumulate - len(some)
                    raise InputError(f"the batches ran out; expected {missing} more for step {step + 1}")
                with quiet_overflow():  # a loss or gradient that is not finite is an error of its own
                    mean = gradient(some)
                    loss, square = floats(mean, squared_norm(params))  # all that a step brings to the host
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
    """Mean loss in nats per token over batches, each weighted by its count of labels."""
    total, count = 0.0, 0
    for ids, labels in batches:
        n = int((to_host(labels) >= 0).sum())
        total += float(model.loss(ids, labels)[0]) * n
        count += n
    if not count:
        raise InputError("there is nothing to evaluate; expected at least one label")
    return total / count


def about(
    model: Any, optimizer: AdamW, schedule: Callable[[int], float] | None, accumulate: int
) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on from, beside its trained parameters.

    A schedule that is no Schedule is not compared: a function does not say what it does.
    """
    import hashlib

    o = optimizer
    frozen = {path.replace(".", "/"): p for path, p in named_params(model).items() if not p.trainable}
    groups = {path: [o.rate(path), bool(o.decays(path, p))] for path, p in trained(model).items()}
    return {
        "base": digest(frozen),
        "model": hashlib.sha256(json.dumps(settings(model)).encode()).hexdigest(),
        "optimizer": [o.lr, *o.betas, o.eps, o.weight_decay, o.clip],
        "groups": hashlib.sha256(json.dumps(groups).encode()).hexdigest(),
        "schedule": repr(schedule) if isinstance(schedule, Schedule) else None,
        "accumulate": accumulate,
    }


def sealed(meta: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """The sha256 of a checkpoint's content."""
    import hashlib

    h = hashlib.sha256(json.dumps({k: v for k, v in meta.items() if k != "sha256"}).encode())
    for name, a in sorted(tensors.items()):
        h.update(f"{name} {a.shape} {a.dtype.str}\n".encode() + a.tobytes())
    return h.hexdigest()


@contextlib.contextmanager
def workshop(out: Path, kind: str) -> Iterator[Path]:
    """The path of a checkpoint, in a locked folder beside `out` that goes when the body has written `out`.

    After an error it stays for the next run, if a checkpoint is in it. LockedError if another process is
    at it.
    """
    work = folder_of_work(out, kind)
    try:
        with locked(work):
            yield work / CHECKPOINT
            discard(work, out)
    except BaseException:
        with contextlib.suppress(MiniloraError):  # the other error is the one to tell
            tidy(out, kind)
        raise


def tidy(out: Path, kind: str) -> None:
    """Remove the folder of a run's checkpoint from which no run goes on; what can go on stays.

    So it is if there is no checkpoint, or one that has all its steps and is older than `out`: the run died
    after it had written that.
    """
    work = folder_of_work(out, kind)
    if exists(work):
        with locked(work):
            spent = exists(out) and finished(work / CHECKPOINT, os.lstat(out).st_mtime_ns)
            if spent or not exists(work / CHECKPOINT):
                discard(work, out)


def finished(checkpoint: Path, written: int) -> bool:
    """Whether a run had made all its steps when something was written, at a time in nanoseconds."""
    try:
        meta = json.loads(open_tensors(checkpoint).metadata["minilora"])
        over = len(meta["history"]["loss"]) == meta["run"]["recipe"]["steps"]
    except (MiniloraError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return over and os.lstat(checkpoint).st_mtime_ns <= written


def folder_of_work(out: Path, kind: str) -> Path:
    """Where a run that makes `out` keeps its checkpoint."""
    return out.with_name(f".{out.name}.{kind}")


def save_checkpoint(
    path: Path | str,
    model: Any,
    optimizer: AdamW,
    rngs: Mapping[str, np.random.Generator],
    history: History,
    run: Mapping[str, Any],
) -> None:
    """All that a run needs to go on, in one safetensors file with its digest, complete or not there."""
    from safetensors.numpy import save

    tensors = {f"p.{k}": np.ascontiguousarray(to_host(p.data)) for k, p in trained(model).items()}
    tensors |= {k: np.ascontiguousarray(a) for k, a in optimizer.state().items()}
    meta = {
        "history": {"loss": history.loss, "evals": history.evals},
        "rngs": {name: rng.bit_generator.state for name, rng in rngs.items()},
        "run": dict(run),
    }
    meta["sha256"] = sealed(meta, tensors)
    write_atomic(path, save(tensors, metadata={"minilora": json.dumps(meta)}))


def load_checkpoint(
    path: Path | str,
    model: Any,
    optimizer: AdamW,
    rngs: Mapping[str, np.random.Generator],
    run: Mapping[str, Any],
) -> History:
    """Put model, optimizer and generators where the file's run was.

    FormatError if one bit of the file has changed, MismatchError if it was another run; nothing is
    changed then.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = read(path)
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        meta = json.loads(header["__metadata__"]["minilora"])
        if meta["sha256"] != sealed(meta, tensors):
            raise ValueError("its digest is another")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise FormatError(f"{path}: is no intact checkpoint of minilora: {str(e)[:120]}") from e
    params = trained(model)
    shapes = {f"p.{k}": (p.data.shape, p.data.dtype) for k, p in params.items()}
    found = {k: (a.shape, a.dtype) for k, a in tensors.items() if k.startswith("p.")}
    for k in sorted(shapes.keys() | found.keys()):
        if shapes.get(k) != found.get(k):
            raise MismatchError(f"{path}: {k[2:]} is {found.get(k)}; the model's is {shapes.get(k)}")
    now = json.loads(json.dumps(dict(run)))
    for k in now | meta["run"]:
        if now.get(k) != meta["run"].get(k):
            raise MismatchError(f"{path}: its run had {k} {meta['run'].get(k)}; this one has {now.get(k)}")
    if set(meta["rngs"]) != set(rngs):
        raise MismatchError(f"{path}: holds the generators {sorted(meta['rngs'])}; given are {sorted(rngs)}")
    for k, rng in rngs.items():
        kinds = [state["bit_generator"] for state in (meta["rngs"][k], rng.bit_generator.state)]
        if kinds[0] != kinds[1]:
            raise MismatchError(f"{path}: the generator {k} is a {kinds[0]}; given is a {kinds[1]}")
    for k, p in params.items():
        p.data[...] = to_device(tensors[f"p.{k}"])
    losses = meta["history"]["loss"]
    optimizer.load({k: a for k, a in tensors.items() if not k.startswith("p.")}, len(losses))
    for name, rng in rngs.items():
        rng.bit_generator.state = meta["rngs"][name]
    return History(losses, [(int(step), float(value)) for step, value in meta["history"]["evals"]])
