"""What the tests of the lessons share: notebooks/build.py, the stored notebooks, and a process to run in."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed; the extra `test` has it")
for library in ("nbclient", "ipykernel"):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed; the extra `test` has it", allow_module_level=True)

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "notebooks" / "build.py"
spec = importlib.util.spec_from_file_location("notebooks_build", BUILD)
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def stored(name):
    path = BUILD.with_name(f"{name}.ipynb")
    assert path.exists(), f"{path.name} is not there; `python notebooks/build.py {name}` makes it"
    return nbformat.read(path, 4)


def run(*arguments, cwd=None, text=None):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, cwd=cwd, input=text)


title = build.title


def tagged(nb, *tags):
    return [cell for cell in nb.cells if {*tags} & {*build.tags_of(cell)}]


def numbered(part):
    """The name of the lesson whose name ends so; its number may change."""
    (name,) = (name for name in build.LESSONS if re.fullmatch(rf"\d+_{part}", name))
    return name
