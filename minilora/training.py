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
    UnsupportedError,
    check_int,
    short,
)
from .fast.parallel import Batch, lanes
from .formats.atomic import discard, exists, locked, read, write_atomic
from .formats.forms import anything, named, number, one, real, record, several, text, tuple_of, whole, wrong
from .formats.safetensors import open_tensors, unique
from .layers import digest, named_params, settings, trained
from .optim import AdamW, Schedule, squared_norm

CHECKPOINT = "checkpoint.safetensors"  # its name in a folder of work
GENERATORS = ("PCG64", "PCG64DXSM")  # whose states are numbers; default_rng's is the first
STATE = {"state": whole(high=2**128 - 1), "inc": whole(high=2**128 - 1)}
META = record({  # what a checkpoint says beside its arrays
    "history": record({
        "loss": several(number(), least=1),
        "evals": several(tuple_of(whole(), real)),  # a user's measure may be infinite
    }),
    "rngs": named(record({
        "bit_generator": one(*GENERATORS),
        "state": record(STATE),
        "has_uint32": whole(high=1),
        "uinteger": whole(high=2**32 - 1),
    })),
    "run": named(anything),  # compared with that of the run, whole
    "sha256": text,
})  # fmt: skip


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
    for name, rng in rngs.items() if checkpoint else ():
        if (kind := type(rng.bit_generator).__name__) not in GENERATORS:
            raise UnsupportedError(f"the generator {name} is a {kind}; a checkpoint holds {GENERATORS[0]}")
    if checkpoint and exists(checkpoint):
        history = load_checkpoint(checkpoint, model, optimizer, rngs, run, steps)
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

    params, state = trained(model), optimizer.state()
    tensors = {f"p.{k}": to_host(p.data) for k, p in params.items()}
    for name in [f"{part}.{k}" for k in params for part in "mv"]:  # what had no gradient yet has moments of 0
        tensors[name] = state.get(name, np.zeros_like(tensors[f"p{name[1:]}"]))
    tensors = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
    meta = {
        "history": {"loss": history.loss, "evals": [(step, float(value)) for step, value in history.evals]},
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
    steps: int,
) -> History:
    """Put model, optimizer and generators where the file's run was, after at most `steps`.

    FormatError if one bit of the file has changed, or if it says what no run can; MismatchError if it was
    another run. All of it is checked before anything is changed.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    params = trained(model)
    data = read(path, 3 * sum(p.data.nbytes for p in params.values()) + (1 << 26))
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        meta = json.loads(header["__metadata__"]["minilora"], object_pairs_hook=unique)
        if meta["sha256"] != sealed(meta, tensors):
            raise ValueError("its digest is another")
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise FormatError(f"{path}: is no intact checkpoint of minilora: {str(e)[:120]}") from e
    META(f"{path}: meta", meta)
    check_run(path, meta, run, rngs, steps)
    expected = {f"{part}.{k}": (p.data.shape, p.data.dtype) for k, p in params.items() for part in "pmv"}
    held = {k: (a.shape, a.dtype) for k, a in tensors.items()}
    for k in sorted(expected.keys() | held.keys()):
        if expected.get(k) != held.get(k):
            raise MismatchError(f"{path}: {short(k)} is {held.get(k)}; the model's is {expected.get(k)}")
        if not np.isfinite(tensors[k]).all() or (k[0] == "v" and (tensors[k] < 0).any()):
            raise FormatError(f"{path}: {k} has values that no run has: not finite, or a square below 0")

    history = History(meta["history"]["loss"], [(step, value) for step, value in meta["history"]["evals"]])
    moments = {k: a for k, a in tensors.items() if not k.startswith("p.")}
    optimizer.load(moments, len(history.loss))
    for k, p in params.items():
        p.data[...] = to_device(tensors[f"p.{k}"])
    for name, rng in rngs.items():
        rng.bit_generator.state = meta["rngs"][name]
    return history


def check_run(
    path: Path | str,
    meta: Mapping[str, Any],
    run: Mapping[str, Any],
    rngs: Mapping[str, np.random.Generator],
    steps: int,
) -> None:
    """MismatchError unless a checkpoint's run is this one, and has not gone beyond it."""

    def same(a: Any, b: Any) -> bool:
        return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)  # true is not 1 there

    for k in dict(run) | meta["run"]:
        was, now = meta["run"].get(k), run.get(k)
        if (k in run) != (k in meta["run"]) or not same(was, now):
            raise MismatchError(f"{path}: its run had {short(k)} {short(was)}; this one has {short(now)}")
    if meta["rngs"].keys() != rngs.keys():
        held, given = (short(sorted(names)) for names in (meta["rngs"], rngs))
        raise MismatchError(f"{path}: holds the generators {held}; given are {given}")
    for k, rng in rngs.items():
        kinds = [state["bit_generator"] for state in (meta["rngs"][k], rng.bit_generator.state)]
        if kinds[0] != kinds[1]:
            raise MismatchError(f"{path}: the generator {k} is a {kinds[0]}; given is a {kinds[1]}")
    done = len(meta["history"]["loss"])
    if done > steps:
        raise MismatchError(f"{path}: is after step {done}; the run has {steps}")
    measured = [step for step, _ in meta["history"]["evals"]]
    if measured != sorted(set(measured)) or (measured and measured[-1] > done):
        raise wrong(f"{path}: meta.history.evals", measured, f"rising steps, up to {done}")
