"""Shared by long commands: a work folder with a checkpoint, training that resumes, a progress bar."""

from __future__ import annotations

import contextlib
import json
import os
import sys
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

CHECKPOINT = "checkpoint.safetensors"  # its name in a work folder
DELAY = 0.01  # seconds; a bar that is done before is not shown


class Recipe(Protocol):
    """The fields that `fit` reads of a command's recipe, a frozen dataclass."""

    @property
    def steps(self) -> int:
        """Number of updates."""

    @property
    def batch(self) -> int:
        """Windows or examples per update."""

    @property
    def warmup(self) -> int:
        """Steps over which the learning rate rises, at most all."""


def begin(out: Path | str, kind: str, overwrite: bool = False) -> Path:
    """Clear a dead run's folder and return the path to write; StorageError if it is taken."""
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
    """Train by a recipe, from the checkpoint `saved` if it exists; returns history and tokens per second.

    `rng` draws the batches, of windows of `length` tokens; `text` is the digest of the text they come from.
    A checkpoint is written every `every` steps, after `measure()`, whose time does not count.
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
    """A progress bar on stderr, if that is a terminal; call it with the count done and the total.

    It appears with the first call. What is printed meanwhile stands above it.
    """
    from tqdm import tqdm

    with tqdm(unit=f" {unit}", disable=None, dynamic_ncols=True, delay=DELAY) as line:

        def show(done: int, known: int) -> None:
            line.total = known
            line.update(done - line.n)

        if line.disable:
            yield show
            return
        out, err = (Above(stream, line) for stream in (sys.stdout, sys.stderr))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                yield show
            finally:
                out.end()
                err.end()


class Above:
    """A stream on the terminal of a progress bar: its lines are written whole, above the bar."""

    def __init__(self, stream: Any, bar: Any) -> None:
        self.stream, self.bar, self.begun = stream, bar, ""

    def write(self, text: str) -> int:
        """Write the lines that are complete, and keep the last one until it is."""
        whole, end, self.begun = (self.begun + text).rpartition("\n")
        if end:
            self.bar.clear()
            self.stream.write(whole + end)
            self.stream.flush()
            if self.bar.n:
                self.bar.refresh()
        return len(text)

    def end(self) -> None:
        """Write what is left, as a line."""
        if self.begun:
            self.write("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def workshop(out: Path, kind: str) -> Iterator[Path]:
    """A checkpoint's path, in a locked folder next to `out` that is removed once the body has written `out`.

    After an error the folder stays for the next run, if it holds a checkpoint. LockedError if another process
    is using it.
    """
    work = folder_of_work(out, kind)
    try:
        with locked(work):
            yield work / CHECKPOINT
            discard(work, out)
    except BaseException:
        with contextlib.suppress(MiniloraError):  # the first error is the one to report
            tidy(out, kind)
        raise


def tidy(out: Path, kind: str) -> None:
    """Remove a work folder that no run can resume from; keep it if one can.

    None can if there is no checkpoint, or one that has all its steps and is older than `out`: that run died
    after it had written `out`.
    """
    work = folder_of_work(out, kind)
    if exists(work):
        with locked(work):
            spent = exists(out) and finished(work / CHECKPOINT, os.lstat(out).st_mtime_ns)
            if spent or not exists(work / CHECKPOINT):
                discard(work, out)


def finished(checkpoint: Path, written: int) -> bool:
    """Whether a run had done all its steps by the time `written`, in nanoseconds."""
    try:
        meta = json.loads(open_tensors(checkpoint).metadata["minilora"])
        over = len(meta["history"]["loss"]) == meta["run"]["recipe"]["steps"]
    except (MiniloraError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return over and os.lstat(checkpoint).st_mtime_ns <= written


def folder_of_work(out: Path, kind: str) -> Path:
    """The folder where a run that makes `out` keeps its checkpoint."""
    return out.with_name(f".{out.name}.{kind}")
