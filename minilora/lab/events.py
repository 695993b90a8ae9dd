"""A model's numbers -> what a page can draw: lists of a few digits, and a matrix as bytes."""

from __future__ import annotations

import base64
import functools
from typing import Any

import numpy as np

from .. import spectra
from ..adapters import pairs
from ..backend import to_host
from ..model import Llama

Event = dict[str, Any]  # "event" is its name; the rest goes to JSON


def numbers(values: Any) -> list[Any]:
    """Numbers of any shape as nested lists, with four significant digits."""
    a = np.asarray(values, np.float64)
    return np.array([float(f"{x:.4g}") for x in a.ravel()]).reshape(a.shape).tolist()


def matrix(a: np.ndarray) -> Event:
    """A matrix (O, I) as base64 of a byte for each entry, row by row: 128 is 0, 1 and 255 the largest."""
    largest = float(abs(a).max())
    levels = 128 + np.rint(127 * (a / largest if largest else a))
    data = base64.b64encode(levels.astype(np.uint8).tobytes()).decode()
    return {"rows": a.shape[0], "columns": a.shape[1], "largest": numbers(largest), "bytes": data}


def change(model: Llama, module: str) -> np.ndarray:
    """ΔW (O, I) of an adapted module; of an embedding its transpose, (D, V)."""
    pair = pairs(model)[module]
    return to_host(pair.scale * (pair.B.data @ pair.A.data))


@functools.cache
def noise_energy(shape: tuple[int, int], r: int) -> list[float]:
    """The energy curve of a random matrix of that shape and rank."""
    return numbers(spectra.energy(spectra.noise_spectrum(shape, np.random.default_rng(0), r)))
