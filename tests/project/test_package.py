"""What a user installs: light to import, typed, complete by name, and of one version."""

import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import minilora

ROOT = Path(__file__).parents[2]
PACKAGE = Path(minilora.__file__).parent


def python(code, **env):
    command = [sys.executable, "-c", code]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | env
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=env).stdout


def test_importing_costs_little_more_than_numpy(tmp_path):
    """At most half of NumPy's own time: the shortest of each, since load only makes them longer."""

    def seconds(module):
        """The processor time of an import in a fresh process, its byte code being there."""
        code = f"import time; t = time.process_time(); import {module}; print(time.process_time() - t)"
        return float(python(code, PYTHONPYCACHEPREFIX=str(tmp_path)))

    seconds("minilora"), seconds("numpy")
    ours, theirs = map(min, zip(*((seconds("minilora"), seconds("numpy")) for _ in range(7)), strict=True))
    more = ours / theirs - 1
    print(f"import minilora: {more:.0%} beyond NumPy's {1000 * theirs:.0f} ms")
    assert more < 0.5


def test_help_starts_quickly():
    """A quarter of a second beyond an interpreter with NumPy: the median of pairs, in processor time."""

    def seconds(*arguments):
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_utime + used.ru_stime

    pairs = [(seconds("-m", "minilora", "--help"), seconds("-c", "import numpy")) for _ in range(5)]
    more = statistics.median(ours - theirs for ours, theirs in pairs)
    print(f"minilora --help: {1000 * more:.0f} ms beyond NumPy")
    assert more < 0.25


HEAVY = ("matplotlib", "tqdm", "safetensors", "cupy", "torch", "distributed", "multiprocessing", "unittest",
         "http", "ssl")  # fmt: skip


@pytest.mark.parametrize("module", ["minilora", "minilora.cli"])
def test_importing_loads_no_library_but_numpy(module):
    found = set(python(f"import sys, {module}; print(*sys.modules)").split())
    assert not found & set(HEAVY)
    before = set(python("import sys, numpy; print(*sys.modules)").split())
    print(sorted(name for name in found - before if "." not in name))


def test_importing_prints_nothing_and_draws_no_random_numbers():
    state = "np.random.get_state()[1].sum()"
    assert python(f"import numpy as np; a = {state}; import minilora; print(a == {state})") == "True\n"


POOR = """
import os, sys, types, _thread
for name in ("subprocess", "multiprocessing", "_multiprocessing", "_posixsubprocess", "threadpoolctl", "tqdm",
             "matplotlib"):
    sys.modules[name] = None
for name in ("fcntl", "resource"):  # which JupyterLite has, but nothing is in them
    sys.modules[name] = types.ModuleType(name)

def refused(*given, **how):
    raise RuntimeError("there are no threads and no processes here")

_thread.start_new_thread = os.fork = os.posix_spawn = refused
import threading
threading._start_new_thread = refused
import numpy
numpy.show_config = lambda mode: {"Build Dependencies": {"blas": {"name": "auto"}}}  # of no version
cores = int(sys.argv[2])
os.sched_getaffinity = lambda pid: set(range(cores))
exec(open(sys.argv[1]).read())
"""


@pytest.mark.parametrize("cores", [1, 2])
def test_everything_works_without_locks_threads_and_processes(cores, tmp_path):
    """As in a browser, where tests/lab/test_browser.py runs the same program."""
    command = [sys.executable, "-W", "error", "-c", POOR, str(ROOT / "tests/main_paths.py"), str(cores)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "jobs is 2; this platform has no processes; expected 1\n"
    assert sorted(os.listdir(tmp_path)) == [
        "a",
        "b",
        "c.safetensors",
        "e",
        "f",
        "long.txt",
        "m",
        "n",
        "own.txt",
        "s",
        "t",
    ]


def test_every_public_name_exists_and_is_documented():
    assert len(set(minilora.__all__)) == len(minilora.__all__)
    assert minilora.__all__ == sorted(minilora.__all__)
    for name in minilora.__all__:
        assert getattr(minilora, name).__doc__, name


def test_the_package_is_typed_and_has_its_data():
    assert (PACKAGE / "py.typed").exists()
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (PACKAGE / "base" / name).exists()
    assert (PACKAGE / "data/requirements-data.txt").exists()


def test_all_versions_agree():
    assert re.fullmatch(r"\d+\.\d+\.\d+", minilora.__version__)
    citation = ROOT / "CITATION.cff"
    if citation.exists():
        assert re.findall(r"^version:\s*[\"']?([^\"'\s]+)", citation.read_text(), re.M) == [
            minilora.__version__
        ]
    try:
        installed = importlib.metadata.version("minilora")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == minilora.__version__


def test_the_command_runs_the_module():
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"minilora": "minilora.__main__:main"}
    done = subprocess.run([sys.executable, "-m", "minilora", "--version"], capture_output=True, text=True,
                          check=True, cwd=ROOT)  # fmt: skip
    assert done.stdout == f"minilora {minilora.__version__}\n"
    assert done.stderr == ""
