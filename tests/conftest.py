"""One thread, derandomised hypothesis (HYPOTHESIS_PROFILE=nightly draws afresh), and the library under test.

MINILORA_TEST_BACKEND=standin or cupy runs the suite on that library, see library.py.
"""

import os
from pathlib import Path

for library in ("OPENBLAS", "OMP", "MKL"):  # before NumPy is imported: one thread, so one order of summation
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")
os.fsync = lambda fd: (
    os.fstat(fd) and None
)  # no test's files must outlast a power failure; tests of the calls replace it

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from library import LIBRARY, use  # noqa: E402

settings.register_profile("ci", derandomize=True, max_examples=40, deadline=None, print_blob=True)
settings.register_profile("few", settings.get_profile("ci"), max_examples=5)
settings.register_profile("nightly", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

TESTS = Path(__file__).parent
collect_ignore = ["main_paths.py"]  # a program, which would run
CORE = ("test_ops.py", "test_layers.py", "test_model.py", "test_lora.py", "test_optim.py")  # files or folders
CORE_FILES = {file for name in CORE for file in (TESTS / name, *(TESTS / name).glob("test_*.py"))}


def pytest_ignore_collect(collection_path, config):
    """`pytest -m quick` reads the core's files alone: the others take longer to import than these to run."""
    if config.option.markexpr == "quick" and collection_path.suffix == ".py":
        return collection_path not in CORE_FILES or None
    return None


def pytest_collection_modifyitems(items):
    """`-m quick` means the core's laws, but for those that take long."""
    for item in items:
        if item.path in CORE_FILES and not any(item.get_closest_marker(name) for name in ("slow", "parity")):
            item.add_marker("quick")


@pytest.fixture
def device():
    """Arrays live on the stand-in device for one test."""
    use("standin")
    yield
    use(LIBRARY)


@pytest.fixture(scope="session")
def browser():
    """Chromium, or a reason to go without; with MINILORA_LAB=FOLDER that is an error."""
    import driven

    if driven.LACKS and "MINILORA_LAB" not in os.environ:
        pytest.skip(f"{driven.LACKS} is not here")
    pytest.importorskip("playwright")
    assert not driven.LACKS
    with driven.chromium() as browser:
        yield browser
