"""The browser of the tests that drive one.

They are skipped where there is no Chromium, no Playwright or no Pyodide; with MINILORA_LAB=FOLDER, an error.
"""

import os

import driven
import pytest

THERE = {"Chromium": bool(driven.CHROMIUM), str(driven.ASSETS): (driven.ASSETS / "axe.min.js").exists()}
LACKS = [name for name, there in THERE.items() if not there]


@pytest.fixture(scope="session")
def browser():
    if LACKS and "MINILORA_LAB" not in os.environ:
        pytest.skip(f"{LACKS} is not here")
    pytest.importorskip("playwright")
    assert not LACKS
    with driven.chromium() as browser:
        yield browser
