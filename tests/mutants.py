"""Seeded bugs: each is put alone into a copy of the package, and the tests must turn red.

A suite that nothing can turn red proves nothing, so every law the tests claim to check is broken here
once, the way a tired programmer would break it. A bug that survives is a missing test.

    python tests/mutants.py [NAME ...] [--jobs 2]

The bugs are those of seeded_bugs.py. Which test saw a mutant stands in witnesses.json. It is asked first, and
all tests of the mutant's files only if it does not see the mutant any more. What is asked must be green in
the unchanged copy. One line per mutant: the first test that fails, or SURVIVED. Exit 1 if one survives, no
longer fits the source, or breaks more than it should (a module that cannot even be imported proves nothing).
test_mutants.py keeps the table in step with the source.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from seeded_bugs import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
WITNESSES = ROOT / "tests/witnesses.json"  # mutant -> "ops::test_name[3]", of tests/test_ops.py
FILES = {
    file.stem.removeprefix("test_"): str(file.relative_to(ROOT)) for file in ROOT.glob("tests/**/test_*.py")
}
LIMIT = 150  # seconds for one mutant
FORKS = multiprocessing.get_context("forkserver")  # a run is a fork of a process that has imported all this
FORKS.set_forkserver_preload(
    ["numpy", "pytest", "hypothesis", "matplotlib.pyplot", "safetensors.numpy", "tqdm"]
)
# No witnesses: tests that kill processes take long, and what they kill may turn them red without any mutant;
# and a copy is no checkout from which a wheel can be built.
UNFIT = "interrupted or second_sweep or worker or installed_package"
READ = (
    "figures/**/*.json*",
    "README.md",
    "figures/**/*.png",
    "figures/**/*.safetensors",
    "figures/**/*.svg",
    "docs/*.md",
    "docs/*.py",
    "benchmarks/*.py",
    "benchmarks/results/*",
    "notebooks/*.*",
    "notebooks/src/*.py",
    "notebooks/solutions/*.md",
)  # by tests
NO_SHRINKING = """
from hypothesis import Phase

settings.register_profile("first", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("first")
"""  # one failure is enough; the smallest takes a while to find


def apply(mutant: Mutant, root: Path) -> tuple[Path, str, str]:
    """The file, its text and its mutated text; ValueError unless `old` stands in it exactly once."""
    path = root / "minilora" / mutant.file
    text = path.read_text(encoding="utf-8")
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"its old text stands {count} times in {mutant.file}")
    return path, text, text.replace(mutant.old, mutant.new)


def witnesses() -> dict[str, str]:
    """Mutant -> the test that saw it last."""
    return dict(json.loads(WITNESSES.read_text())) if WITNESSES.exists() else {}


def witness(red: str) -> str:
    """The name of a test in a failure such as "project/test_imports.py::test_name[3]"."""
    file, _, test = red.partition(".py::")
    return f"{Path(file).name.removeprefix('test_')}::{test if test.endswith(']') else function(test)}"


def function(test: str) -> str:
    """The name of a test without its parameters."""
    return test.partition("[")[0]


def be_pytest(copy: Path, arguments: list[str], said: Path, remember: bool) -> None:
    """Run pytest in a copy of package and tests; what it prints goes to a file.

    Bytecode is read, where there is some, and written if it is to be remembered.
    """
    import pytest

    with open(said, "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if "minilora" in sys.modules:  # a program that is run has imported it; the copy would not be asked
        sys.exit("minilora is imported already, and not from the copy")
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}  # for processes of the tests
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take longer than most tests
    sys.dont_write_bytecode = not remember
    sys.exit(pytest.main(arguments))


def run_tests(copy: Path, tests: Iterable[str], remember: bool = False) -> tuple[bool, str]:
    """Whether a test fails, and which; else what kept pytest from ending green, if anything did.

    The tests are those of a file, "ops", or single ones, "ops::test_name" or "ops::test_name[3]".
    """
    names = [name.partition("::") for name in tests]
    if missing := [file for file, _, _ in names if file not in FILES]:
        return False, f"there is no test_{missing[0]}.py"
    files = [f"{FILES[file]}{colons}{test}" for file, colons, test in names]
    arguments = [
        "-p",
        "xdist.plugin",
        "-x",
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        "--tb=no",
        "--assert=plain",  # nobody reads why; of two pictures, where CI is set, it takes minutes to say
        "-k",
        f"not ({UNFIT})",
    ]
    said = copy / "said"  # what is in the base folder of temporary files belongs to this copy alone
    run = FORKS.Process(
        target=be_pytest, args=(copy, [*arguments, f"--basetemp={copy / 'temp'}", *files], said, remember)
    )
    run.start()
    run.join(LIMIT)
    if run.exitcode is None:
        run.kill()
        run.join()
        return False, f"no end within {LIMIT} s"
    printed = said.read_text(encoding="utf-8", errors="replace")
    red = re.search(r"^(?:FAILED|ERROR) tests/(\S+::.+?)(?: - |$)", printed, re.M)
    last = (printed.strip().splitlines() or ["nothing"])[-1]
    return (True, red[1]) if run.exitcode == 1 and red else (False, last if run.exitcode else "")


@contextlib.contextmanager
def copies(jobs: int) -> Iterator[queue.SimpleQueue[Path]]:
    """Copies of package and tests, one for each job, in a folder that goes."""
    with tempfile.TemporaryDirectory() as temp:
        free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for i in range(jobs):
            copy = Path(temp, str(i))
            for part in ("minilora", "tests"):
                shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            for file in (ROOT / "pyproject.toml", *(file for files in READ for file in ROOT.glob(files))):
                (copy / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy / file.relative_to(ROOT))
            with open(copy / "tests/conftest.py", "a", encoding="utf-8") as conftest:
                conftest.write(NO_SHRINKING)
            free.put(copy)
        yield free


def attempt(
    free: queue.SimpleQueue[Path], tests: Iterable[str], mutated: tuple[str, str] | None = None
) -> tuple[bool, str]:
    """`run_tests` in a copy that is free, where a file below minilora/ holds another text meanwhile."""
    copy = free.get()
    try:
        if mutated is None:
            return run_tests(copy, tests, remember=True)
        path = copy / "minilora" / mutated[0]
        text, was = path.read_text(encoding="utf-8"), path.stat()
        path.write_text(mutated[1], encoding="utf-8")
        os.utime(path, (was.st_atime, was.st_mtime + 2))  # whatever the clock says: its bytecode is another's
        try:
            return run_tests(copy, tests)
        finally:
            path.write_text(text, encoding="utf-8")
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    finally:
        free.put(copy)


def not_green(free: queue.SimpleQueue[Path], pool: ThreadPoolExecutor, tests: Iterable[str]) -> list[str]:
    """What is red in these test files, or in these tests of them, without any change."""
    asked: dict[str, set[str]] = {}
    for name in tests:
        asked.setdefault(name.partition("::")[0], set()).add(name)
    asked = {file: {file} if file in names else names for file, names in asked.items() if file in FILES}

    def red(names: Collection[str]) -> str:
        said = attempt(free, sorted(names))[1]
        if "no match in any of" in said:  # parameters have changed since
            said = attempt(free, sorted({function(name) for name in names}))[1]
        return said

    said = zip(asked, pool.map(red, asked.values()), strict=True)
    return [f"test_{file}.py is not green without any mutant: {why}" for file, why in said if why]


def share_bytecode(free: queue.SimpleQueue[Path]) -> None:
    """Give each copy what all have compiled."""
    all_of_them = [free.get() for _ in range(free.qsize())]
    for one in all_of_them:
        for compiled in one.rglob("*.pyc"):
            for other in all_of_them:
                if not (there := other / compiled.relative_to(one)).exists():
                    there.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(compiled, there)
    for one in all_of_them:
        free.put(one)


def tried(free: queue.SimpleQueue[Path], mutant: Mutant, asked_first: str | None = None) -> tuple[bool, str]:
    """Whether a test is red with the mutant and green without it, and which one; else why not, if known.

    `asked_first` is its witness, which is known to be green. If it does not see the mutant, all tests are
    asked; that a test of theirs is green has not been looked at yet.
    """
    try:
        mutated = mutant.file, apply(mutant, ROOT)[2]
    except ValueError as e:
        return False, str(e)
    if asked_first and (result := attempt(free, [asked_first], mutated))[0]:
        return result
    seen, said = attempt(free, mutant.tests.split(), mutated)
    if seen and asked_first and (red := attempt(free, [witness(said)])[1]):
        return False, f"not green without it either: {red}"
    return seen, said


def main() -> int:
    """Try the mutants named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these mutants")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once (2)")
    given = parser.parse_args()
    if unknown := set(given.names) - {m.name for m in MUTANTS}:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTANTS if not given.names or m.name in given.names]
    known = witnesses()

    os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "OMP", "MKL")}
    with copies(given.jobs) as free, ThreadPoolExecutor(given.jobs) as pool:
        start = time.monotonic()
        asked = [[known[m.name]] if m.name in known else m.tests.split() for m in chosen]
        if red := not_green(free, pool, (name for names in asked for name in names)):
            print(*red, sep="\n")
            return 1
        print(f"what is asked is green without any mutant, {time.monotonic() - start:.0f} s", flush=True)
        share_bytecode(free)
        caught = 0
        results = pool.map(lambda m: tried(free, m, known.get(m.name)), chosen)
        for mutant, (seen, said) in zip(chosen, results, strict=True):
            caught += seen
            if seen:
                known[mutant.name] = witness(said)
            how = f"caught by {said}" if seen else f"SURVIVED{f' ({said})' if said else ''}"
            print(f"{mutant.name:42} {how}", flush=True)
    names = [m.name for m in MUTANTS if m.name in known]
    WITNESSES.write_text(json.dumps({name: known[name] for name in names}, indent=1) + "\n")
    print(f"{caught} of {len(chosen)} mutants caught, {time.monotonic() - start:.0f} s")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
