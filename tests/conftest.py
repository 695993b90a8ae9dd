"""One thread, derandomised hypothesis (HYPOTHESIS_PROFILE=nightly draws afresh), and the stand-in device."""

import os

for library in ("OPENBLAS", "OMP", "MKL"):  # before NumPy is imported: one thread, so one order of summation
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("ci", derandomize=True, max_examples=40, deadline=None, print_blob=True)
settings.register_profile("nightly", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def device():
    """Arrays live on the stand-in device for one test."""
    import numpy as np
    from device import namespace

    from minilora import backend

    backend.install(namespace)
    yield
    backend.install(np)
