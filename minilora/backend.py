"""Which array library is in use, and the few things in which the two differ.

Numeric files write `xp.` where they would write `np.`; `use("cupy")` refills that one namespace, so
the same code runs on a GPU. Moves between host and device are explicit (`to_device`, `to_host`), and
random numbers are drawn on the host from the caller's generator, so both libraries see the same ones.
This is the only file that names CuPy. Stands in for the dispatchers of array-API layers; leaves out
every other array library.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from typing import Any

import numpy as np

from .errors import ConfigError, nearest

Array = Any  # numpy.ndarray, or cupy.ndarray after use("cupy")

xp: Any = types.SimpleNamespace()  # numpy's functions, or cupy's
name = "numpy"


def install(module: Any) -> None:
    """Fill `xp` with the functions of an array library."""
    xp.__dict__.clear()
    xp.__dict__.update({k: v for k, v in vars(module).items() if not k.startswith("__")})


def use(library: str) -> None:
    """Switch to "numpy" or "cupy" for arrays made from now on (also: MINILORA_BACKEND).

    ConfigError, with NumPy left in use, when the library is unknown or cannot reach a GPU.
    """
    global name
    if library not in ("numpy", "cupy"):
        raise ConfigError(f"backend is {library!r}; {nearest(library, ['numpy', 'cupy'])}")
    module: Any = np
    if library == "cupy":
        import importlib

        try:
            module = importlib.import_module("cupy")
            module.cuda.runtime.getDeviceCount()
        except Exception as e:  # ImportError, or whatever the CUDA runtime raises without a device
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise ConfigError(f"backend 'cupy' is not to be had, numpy stays in use: {reason}") from e
    install(module)
    name = library


def to_device(a: Any, dtype: Any = None) -> Array:
    """The same numbers as an array of the library in use."""
    return xp.asarray(a, dtype=dtype)


def to_host(a: Any) -> np.ndarray:
    """The same numbers as a NumPy array; lists are taken too."""
    if isinstance(a, np.ndarray) or not isinstance(a, xp.ndarray):
        return np.asarray(a)
    host: np.ndarray = a.get()
    return host


def scatter_add(rows: int, ids: Array, values: Array) -> Array:
    """(rows, D) whose row i is the sum of all values[m] (M, D) with ids[m] (M,) equal to i.

    NumPy's `add.at` takes six times as long as sorting the ids and summing each run of equal ones.
    """
    out = xp.zeros((rows, values.shape[1]), values.dtype)
    if name == "cupy":  # which has no reduceat; its add.at sums atomically, in any order
        xp.add.at(out, ids, values)
        return out
    order = xp.argsort(ids, kind="stable")
    ids = ids[order]
    first = xp.flatnonzero(xp.concatenate([xp.ones(1, bool), ids[1:] != ids[:-1]]))
    out[ids[first]] = xp.add.reduceat(values[order], first, axis=0)
    return out


def quiet_overflow() -> np.errstate:
    """A context in which overflow is meant, or looked for by other means (CuPy never speaks of any)."""
    return np.errstate(over="ignore", invalid="ignore")


def normal(rng: np.random.Generator, shape: tuple[int, ...], std: float, dtype: Any) -> Array:
    """Independent N(0, std²), drawn on the host."""
    return to_device((std * rng.standard_normal(shape)).astype(dtype))


def uniform(rng: np.random.Generator, shape: tuple[int, ...], bound: float, dtype: Any) -> Array:
    """Independent U(-bound, bound), drawn on the host."""
    return to_device((bound * (2 * rng.random(shape) - 1)).astype(dtype))


def keep_memory() -> None:
    """Ask the C allocator to keep freed pages, where it can be asked (glibc).

    A step frees and takes the same megabytes again and again; given back to the system each time, they
    come back as page faults, a third of a step's time.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-1, 1 << 30), (-2, 1 << 26), (-3, 1 << 30)):  # trim, top pad, mmap
            mallopt(option, value)


install(np)
if os.environ.get("MINILORA_BACKEND"):
    try:
        use(os.environ["MINILORA_BACKEND"])
    except ConfigError as e:  # NumPy stays in use
        print(f"minilora: MINILORA_BACKEND: {e}", file=sys.stderr)
