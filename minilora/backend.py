"""Which array library is in use, and the few things in which the two differ.

Numeric files write `xp.` where they would write `np.`; `use("cupy")` refills that one namespace, so
the same code runs on a GPU. Transfers between host and device are explicit (`to_device`, `to_host`);
random numbers are drawn on the host from the caller's generator, so both libraries see the same ones.
This is the only file that names CuPy. Stands in for the dispatchers of array-API layers; leaves out
every other array library.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import numpy as np

from .errors import ConfigError, nearest

Array = Any  # numpy.ndarray, or cupy.ndarray after use("cupy")
Chain = TypeVar("Chain", bound=Callable[..., Any])
Item = TypeVar("Item")
Result = TypeVar("Result")

xp: Any = types.SimpleNamespace()  # numpy's functions, or cupy's
name = "numpy"
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # read by BLAS when a process starts


def install(module: Any) -> None:
    """Fill `xp` with the functions of an array library."""
    xp.__dict__.clear()
    xp.__dict__.update({k: v for k, v in vars(module).items() if not k.startswith("__")})
    xp.__dict__.setdefault("fuse", lambda chain: chain)  # NumPy compiles nothing


def use(library: str) -> None:
    """Switch to "numpy" or "cupy" for arrays made from now on (also: MINILORA_BACKEND).

    ConfigError, with no switch made, when the library is unknown or cannot reach a GPU.
    """
    global name
    if library not in ("numpy", "cupy"):
        raise ConfigError(f"backend is {library!r}; {nearest(library, ['numpy', 'cupy'])}")
    module: Any = np
    if library == "cupy":
        try:
            module = importlib.import_module("cupy")
            module.cuda.runtime.getDeviceCount()
        except Exception as e:  # ImportError, or whatever the CUDA runtime raises without a device
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise ConfigError(f"backend 'cupy' is not available, numpy stays in use: {reason}") from e
    install(module)
    name = library


def on_host() -> bool:
    """Whether NumPy is the library in use."""
    return xp.ndarray is np.ndarray


def to_device(a: Any, dtype: Any = None) -> Array:
    """The same numbers as an array of the library in use."""
    return xp.asarray(a, dtype=dtype)


def to_host(a: Any) -> np.ndarray:
    """The same numbers as a NumPy array; also takes lists."""
    if isinstance(a, np.ndarray) or not isinstance(a, xp.ndarray):
        return np.asarray(a)
    return a.get()


def floats(*scalars: Any) -> list[float]:
    """Scalars as Python floats, copied to the host together: one transfer, one wait for the device."""
    return to_host(xp.stack([xp.asarray(s, dtype=xp.float64) for s in scalars])).tolist()


def fused(chain: Chain) -> Chain:
    """Decorate an elementwise chain of `xp`: one kernel if the library compiles (`cupy.fuse`).

    The chain takes arrays, scalars of their dtype (with a Python float the kernel would compute in
    float64) and None, all by position. Under NumPy it runs as written.
    """
    kernel = functools.cache(lambda fuse: fuse(chain))  # one per library

    @functools.wraps(chain)
    def call(*operands: Any) -> Any:
        return kernel(xp.fuse)(*operands)

    return cast(Chain, call)


def scatter_add(rows: int, ids: Array, values: Array) -> Array:
    """(rows, D): row i is the sum of values[m] (M, D) over all m with ids[m] (M,) equal to i.

    NumPy's `add.at` takes six times as long as sorting the ids and summing each run of equal ids.
    """
    out = xp.zeros((rows, values.shape[1]), values.dtype)
    if name == "cupy":  # CuPy has no reduceat; its add.at sums atomically, in any order
        xp.add.at(out, ids, values)
        return out
    order = xp.argsort(ids, kind="stable")
    ids = ids[order]
    first = xp.flatnonzero(xp.concatenate([xp.ones(1, bool), ids[1:] != ids[:-1]]))
    out[ids[first]] = xp.add.reduceat(values[order], first, axis=0)
    return out


def take_into(out: Array, table: Array, ids: Array, index: Array) -> None:
    """out[i] = table[ids[i]], with all ids in range; `index` is room for the ids as intp.

    NumPy converts other integers to intp first, and a new array for them costs more than the look-up.
    """
    if on_host():
        index = index[: len(ids)]
        index[...] = ids
        table.take(index, out=out, mode="clip")  # the mode "raise" fills a buffer first
    else:
        out[...] = table[ids]


def quiet_overflow() -> np.errstate:
    """A context where overflow is intended, or checked by other means (CuPy never warns about it)."""
    return np.errstate(over="ignore", invalid="ignore")


def normal(rng: np.random.Generator, shape: tuple[int, ...], std: float, dtype: Any) -> Array:
    """Independent N(0, std²), drawn on the host."""
    return to_device((std * rng.standard_normal(shape)).astype(dtype))


def uniform(rng: np.random.Generator, shape: tuple[int, ...], bound: float, dtype: Any) -> Array:
    """Independent U(-bound, bound), drawn on the host."""
    return to_device((bound * (2 * rng.random(shape) - 1)).astype(dtype))


def keep_memory() -> None:
    """Tell the C allocator to keep freed pages, where it has an option for that (glibc).

    Every step, or token, frees and allocates the same megabytes. If they go back to the system each time,
    page faults bring them back, which takes a third of a step's time.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-1, 1 << 30), (-2, 1 << 26), (-3, 1 << 30)):  # trim, top pad, mmap
            mallopt(option, value)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def blas_libraries() -> Any:
    """The BLAS libraries of this process, cached because the search takes a millisecond."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


@contextlib.contextmanager
def one_blas_thread() -> Iterator[bool]:
    """Hold BLAS to one thread within the context; yields whether that worked.

    For a BLAS that cannot be asked (Apple's Accelerate) the environment variables decide. Without
    threadpoolctl, as in a browser, whose NumPy has no BLAS, it does not work.
    """
    try:
        libraries = blas_libraries()
    except ImportError:
        yield False
        return
    with libraries.limit(limits=1):
        if libraries.lib_controllers:
            yield all(library.num_threads == 1 for library in libraries.lib_controllers)
        else:
            yield "1" in map(os.environ.get, THREADS)


def on_cores(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` with as many threads as cores and one BLAS thread in each, so that their number changes no bit.

    One after another on a GPU, and where BLAS cannot be held to one thread.
    """
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(one_blas_thread())
        if held and on_host() and (threads := cores()) > 1:
            from concurrent.futures import ThreadPoolExecutor

            yield from stack.enter_context(ThreadPoolExecutor(threads)).map(function, items)
        else:
            yield from map(function, items)


install(np)
if os.environ.get("MINILORA_BACKEND"):
    try:
        use(os.environ["MINILORA_BACKEND"])
    except ConfigError as e:  # NumPy stays in use
        print(f"minilora: MINILORA_BACKEND: {e}", file=sys.stderr)
