"""All that a training run needs to resume bit for bit, in one safetensors file with its digest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import to_device, to_host
from ..digests import of_arrays
from ..errors import FormatError, MismatchError, StorageError, short
from ..optim import AdamW
from ..table import Table, counted, report
from ..tree import trained
from .atomic import stamp_of, write_atomic
from .forms import anything, named, number, one, real, record, several, text, tuple_of, whole, wrong
from .safetensors import FLOATS, layout, open_tensors, unique

FEW = 5  # evaluations shown from either end of a history
GENERATORS = ("PCG64", "PCG64DXSM")  # their states are numbers; default_rng uses the first
STATE = {"state": whole(high=2**128 - 1), "inc": whole(high=2**128 - 1)}
META = record({  # the metadata of a checkpoint
    "history": record({
        "loss": several(number(), least=1),
        "evals": several(tuple_of(whole(), real)),  # a user's metric may be infinite
    }),
    "rngs": named(record({
        "bit_generator": one(*GENERATORS),
        "state": record(STATE),
        "has_uint32": whole(high=1),
        "uinteger": whole(high=2**32 - 1),
    })),
    "run": named(anything),  # compared as a whole with the current run's
    "sha256": text,
})  # fmt: skip


@report
@dataclass
class History:
    """The mean loss of every step, and the (step, value) of every evaluation; prints as a short table."""

    loss: list[float] = field(default_factory=list)
    evals: list[tuple[int, float]] = field(default_factory=list)

    def parts(self) -> list[str | Table]:
        """A line and a table; of many evaluations, the first and last few."""
        if not self.loss:
            return ["no steps"]
        rows = [(str(step), f"{value:.4f}") for step, value in self.evals]
        if len(rows) > 2 * FEW:
            rows = [*rows[:FEW], ("...", ""), *rows[-FEW:]]
        steps = counted(len(self.loss), "step", "steps")
        line = f"{steps}, loss {self.loss[0]:.4f} -> {self.loss[-1]:.4f}"
        return [line, Table(("step", "evaluation"), rows)] if rows else [line]


def sealed(meta: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> str:
    """The sha256 of a checkpoint's content."""
    head = json.dumps({k: v for k, v in meta.items() if k != "sha256"})
    return of_arrays(sorted(tensors.items()), before=head.encode())


def save_checkpoint(
    path: Path | str,
    model: Any,
    optimizer: AdamW,
    rngs: Mapping[str, np.random.Generator],
    history: History,
    run: Mapping[str, Any],
) -> None:
    """Write all that a run needs to resume to one safetensors file with its digest, whole or not at all."""
    params, state = trained(model), optimizer.state()
    tensors = {f"p.{k}": to_host(p.data) for k, p in params.items()}
    for name in [f"{part}.{k}" for k in params for part in "mv"]:  # without a gradient so far, moments are 0
        tensors[name] = state.get(name, np.zeros_like(tensors[f"p{name[1:]}"]))
    meta = {
        "history": {"loss": history.loss, "evals": [(step, float(value)) for step, value in history.evals]},
        "rngs": {name: rng.bit_generator.state for name, rng in rngs.items()},
        "run": dict(run),
    }
    meta["sha256"] = sealed(meta, tensors)
    write_atomic(path, layout(tensors, metadata={"minilora": json.dumps(meta)}))


def load_checkpoint(
    path: Path | str,
    model: Any,
    optimizer: AdamW,
    rngs: Mapping[str, np.random.Generator],
    run: Mapping[str, Any],
    steps: int,
) -> History:
    """Restore model, optimizer and generators from a file, and return the history, of at most `steps`.

    FormatError if one bit of the file has changed or if its content is impossible; MismatchError if it is
    another run's; StorageError if it is too large. Everything is checked before anything is changed.
    """
    params = trained(model)
    most = 3 * sum(p.data.nbytes for p in params.values()) + (1 << 26)
    if (size := stamp_of(path).size) > most:
        raise StorageError(f"{path}: has {size} bytes; at most {most} are read")
    try:
        file = open_tensors(path)
        tensors = {name: np.asarray(a, FLOATS[file.dtypes[name]]) for name, a in file.items()}
        meta = json.loads(file.metadata["minilora"], object_pairs_hook=unique)
        if meta["sha256"] != sealed(meta, tensors):
            raise ValueError("its sha256 differs")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise FormatError(f"{path}: is not an intact checkpoint of minilora: {str(e)[:120]}") from e
    META(f"{path}: meta", meta)
    check_run(path, meta, run, rngs, steps)
    expected = {f"{part}.{k}": (p.data.shape, p.data.dtype) for k, p in params.items() for part in "pmv"}
    held = {k: (a.shape, a.dtype) for k, a in tensors.items()}
    for k in sorted(expected.keys() | held.keys()):
        if expected.get(k) != held.get(k):
            raise MismatchError(f"{path}: {short(k)} is {held.get(k)}; the model's is {expected.get(k)}")
        if not np.isfinite(tensors[k]).all() or (k[0] == "v" and (tensors[k] < 0).any()):
            raise FormatError(f"{path}: {k} has impossible values: not finite, or a mean square below 0")

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
    """MismatchError unless a checkpoint is from this run and not beyond its `steps`."""

    def same(a: Any, b: Any) -> bool:
        return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)  # in JSON, true is not 1

    for k in dict(run) | meta["run"]:
        was, now = meta["run"].get(k), run.get(k)
        if (k in run) != (k in meta["run"]) or not same(was, now):
            raise MismatchError(f"{path}: its run had {short(k)} {short(was)}; this one has {short(now)}")
    if meta["rngs"].keys() != rngs.keys():
        held, own = (short(sorted(names)) for names in (meta["rngs"], rngs))
        raise MismatchError(f"{path}: has the generators {held}; this run has {own}")
    for k, rng in rngs.items():
        kinds = [state["bit_generator"] for state in (meta["rngs"][k], rng.bit_generator.state)]
        if kinds[0] != kinds[1]:
            raise MismatchError(f"{path}: the generator {k} is a {kinds[0]}; this run's is a {kinds[1]}")
    done = len(meta["history"]["loss"])
    if done > steps:
        raise MismatchError(f"{path}: is after step {done}; the run has {steps} steps")
    measured = [step for step, _ in meta["history"]["evals"]]
    if measured != sorted(set(measured)) or (measured and measured[-1] > done):
        raise wrong(f"{path}: meta.history.evals", measured, f"increasing steps up to {done}")
