"""The laws' `np`: NumPy's names on the library under test, MINILORA_TEST_BACKEND=numpy, standin or cupy.

    from library import np

With NumPy it is NumPy. Otherwise every array that a law makes or draws lies on the device and the law's own
arithmetic is done there, so the package is handed what CuPy would hand it. Where a law is about the host (a
user's list, a file, a sampled token) it imports numpy by its name.
"""

import os
import sys
import types

import device
import numpy

from minilora import backend

LIBRARY = os.environ.get("MINILORA_TEST_BACKEND", "numpy")


def use(library):
    """Switch minilora to the library, and return its namespace."""
    if library == "standin":
        backend.install(device.namespace)
    else:
        backend.use(library)
    return backend.xp


class Draws(numpy.random.Generator):
    """The same numbers on the device for a law, and on the host for the package, which draws there."""


def drawn(name):
    def draw(self, *args, **kwargs):
        numbers = getattr(super(Draws, self), name)(*args, **kwargs)
        by_package = sys._getframe(1).f_globals["__name__"].startswith("minilora")
        return numbers if by_package or numpy.isscalar(numbers) else backend.to_device(numbers)

    return draw


for name in ("integers", "permutation", "random", "standard_normal"):
    setattr(Draws, name, drawn(name))


def names(library):
    """NumPy's names, the library's own where it has them; a generator's draws lie on the device."""
    np = types.SimpleNamespace(**{k: v for k, v in vars(numpy).items() if k[0] != "_"} | vars(library))
    np.random = types.SimpleNamespace(default_rng=lambda seed: Draws(numpy.random.PCG64(seed)))
    np.errstate = numpy.errstate
    if LIBRARY == "cupy":
        np.longdouble = np.float64  # which is the widest that a GPU has
    return np


xp = use(LIBRARY)
np = numpy if LIBRARY == "numpy" else names(xp)
