"""What the readings of the experiments share: the measured rows, and numbers and texts in words."""

import math
from collections.abc import Sequence

import numpy as np

from ..errors import ConfigError
from ..table import drawn
from . import rank_reading
from .harness import Row

LEVEL = 0.9  # the share of a gap, or of a score, that is called enough


def finals(rows: Sequence[Row]) -> list[Row]:
    """The measured rows; ConfigError if there is none."""
    done = [row for row in rows if row["config"]["kind"] == "final" and row["status"] == "done"]
    if not done:
        raise ConfigError("nothing was measured; expected at least one row of kind 'final'")
    return done


def said(x: float, how: str) -> str:
    """A number in that format; what rounds to zero is not below it."""
    text = f"{x:{how}}"
    return text if any(c in "123456789" for c in text) or not np.isfinite(x) else f"{0.0:{how}}"


def spread(values: Sequence[float] | np.ndarray, how: str = ".3f") -> str:
    """The median, and the range of several values."""
    middle, low, high = (said(float(x), how) for x in (np.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def median_of(seeds: str) -> str:
    """What `spread` shows of so many seeds, "5 seeds"."""
    return "a single seed" if seeds == "1 seed" else f"median and range of {seeds}"


def title(text: str) -> str:
    """A text as a heading."""
    return drawn(rank_reading.title(text))


def crossing(sizes: Sequence[int], shares: np.ndarray) -> float:
    """Where the line through (log size, share) first reaches 90%; a loss above the start's closes nothing."""
    shares = shares.clip(0)
    for i, share in enumerate(shares):
        if share >= LEVEL:
            t = (LEVEL - shares[i - 1]) / (share - shares[i - 1]) if i else 1.0
            return float(sizes[i - 1] ** (1 - t) * sizes[i] ** t)
    return math.inf
