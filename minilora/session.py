"""What long commands share: a folder of work with a checkpoint, training that goes on, a progress bar."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import MiniloraError
from .fast.parallel import Batch
from .formats.atomic import check_free, discard, exists, locked
from .formats.checkpoint import History
from .formats.safetensors import open_tensors
from .optim import AdamW, Schedule
from .training import train

CHECKPOINT = "checkpoint.safetensors"  # its name in a folder of work


class Recipe(Protocol):
    """What `fit` reads of a command's recipe, a frozen dataclass."""

    @property
    def steps(self) -> int:
        """Updates."""

    @property
    def batch(self) -> int:
        """Windows or examples in each."""

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises, at most all."""


def begin(out: Path | str, kind: str, overwrite: bool = False) -> Path:
    """Where a command will write, once a dead run's folder is cleared; StorageError if it is taken."""
    out = Path(out)
    tidy(out, kind)
    check_free(out, overwrite)
    return out


def fit(
    model: Any,
    batches: Iterable[Batch],
    optimizer: AdamW,
    recipe: Recipe,
    *,
    length: int,
    text: str,
    rng: np.random.Generator,
    saved: Path,
    every: int,
    measure: Callable[[], float] | None = None,
    progress: Callable[[int, float], None] | None = None,
    threads: int | None = None,
) -> tuple[History, float]:
    """Train by a recipe, on from the checkpoint `saved` if it is there: the history, and tokens per second.

    `rng` draws the batches, of windows of `length` tokens; `text` is the digest of what they are drawn from.
    A checkpoint is written `every` so many steps, after `measure()`, whose time does not count.
    """
    start, done = time.monotonic(), 0

    def evaluate() -> float:
        nonlocal start
        assert measure
        before = time.monotonic()
        value = measure()
        start += time.monotonic() - before
        return value

    def watch(step: int, loss: float) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(step, loss)

    history = train(
        model,
        batches,
        optimizer,
        steps=recipe.steps,
        schedule=Schedule(recipe.steps, warmup=min(recipe.warmup, recipe.steps)),
        evaluate=evaluate if measure else None,
        eval_every=every,
        checkpoint=saved,
        checkpoint_every=every,
        rngs={"batches": rng},
        identity={"text": text, "recipe": asdict(recipe)},  # type: ignore[call-overload]
        progress=watch,
        threads=threads,
    )
    return history, done * recipe.batch * length / (time.monotonic() - start)


@contextlib.contextmanager
def bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, if that is a terminal: called with what is done and what there is."""
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", disable=None, dynamic_ncols=True) as line:

        def show(done: int, known: int) -> None:
            line.total = known
            line.update(done - line.n)

        yield show


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
