"""Ids -> batches of windows: random ones to train on, fixed ones to measure on.

Stands in for a data loader; leaves out workers, streaming and epochs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import InputError, check_int

Ids = np.ndarray  # of one split: (T,) uint8
Batch = tuple[np.ndarray, np.ndarray]  # inputs and labels, both (N, T) int64


def windows(ids: Ids, starts: np.ndarray, length: int) -> Batch:
    """Inputs (N, T) that begin at `starts` (N,), and labels (N, T), the character after each of them."""
    cut = ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)
    return cut[:, :-1], cut[:, 1:]


def check_windows(ids: Ids, batch_size: int, length: int) -> None:
    """ConfigError for sizes below one, InputError if no window fits into the split."""
    check_int("batch_size", batch_size, 1)
    if len(ids) <= check_int("length", length, 1):
        raise InputError(f"the split has {len(ids)} characters; windows of {length} need {length + 1}")


def batches(ids: Ids, rng: np.random.Generator, batch_size: int, length: int) -> Iterator[Batch]:
    """Endless (inputs, labels), each (N, T) int64, at uniformly random places of a split.

    One draw of N integers per batch, so a saved state of `rng` resumes the stream. Errors as in
    `check_windows`.
    """
    check_windows(ids, batch_size, length)

    def draw() -> Iterator[Batch]:
        while True:
            yield windows(ids, rng.integers(len(ids) - length, size=batch_size), length)

    return draw()


def eval_batches(ids: Ids, batch_size: int, length: int, limit: int | None = None) -> list[Batch]:
    """Consecutive windows that do not overlap, always the same; the last batch may be smaller.

    A `limit` in characters takes fewer windows, at least one, spread evenly over the split.
    """
    check_windows(ids, batch_size, length)
    fit = (len(ids) - 1) // length
    count = fit if limit is None else min(fit, max(1, check_int("limit", limit, 1) // length))
    starts = np.arange(count) * fit // count * length
    return [windows(ids, starts[i : i + batch_size], length) for i in range(0, count, batch_size)]
