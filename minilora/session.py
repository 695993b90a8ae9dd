"""A long command's folder of work, with the checkpoint from which a killed run goes on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import MiniloraError
from .formats.atomic import discard, exists, locked
from .formats.safetensors import open_tensors

CHECKPOINT = "checkpoint.safetensors"  # its name in a folder of work


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
