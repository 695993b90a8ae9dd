"""The lessons are what their sources make of them, and the checks of their exercises check something."""

import importlib.util
import itertools
import os
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


def need_rows(name):
    rows = build.ROWS.exists() or name != build.LESSONS[2]
    assert rows, "figures/rows.jsonl is missing; `minilora sweep --out figures` makes it"


def stored(name):
    need_rows(name)
    path = BUILD.with_name(f"{name}.ipynb")
    assert path.exists(), f"{path.name} is not there; `python notebooks/build.py {name}` makes it"
    return nbformat.read(path, 4)


def run(*arguments):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize("name", build.LESSONS)
def test_a_lesson_is_what_its_source_says(name):
    nb, fresh = stored(name), build.notebook(name)

    def cells(nb):
        return [(c.cell_type, c.id, c.source, c.metadata) for c in nb.cells]

    assert cells(nb) == cells(fresh), f"build it again: python notebooks/build.py {name}"
    assert nb.metadata.keys() == {"kernelspec", "minilora"}
    assert not list(build.faults(nb))
    counts = [c.execution_count for c in nb.cells if c.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "it was not run from top to bottom"


@pytest.mark.parametrize("name", build.LESSONS)
def test_a_lesson_can_be_read_without_seeing(name):
    nb = stored(name)
    text = "\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    levels = [len(line.split()[0]) for line in text.splitlines() if line.startswith("#")]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    code = [c for c in nb.cells if c.cell_type == "code"]
    for cell, after in itertools.pairwise(code):
        for output in cell.outputs:
            if "<img" in output.get("data", {}).get("text/html", ""):
                assert len(build.FIGURE.search(output.data["text/html"])["says"]) > 40, cell.id
                assert "\n" in after.outputs[0].text, f"{cell.id} is not followed by its numbers"


@pytest.mark.parametrize("name", build.LESSONS)
def test_an_exercise_is_stub_solution_and_check(name):
    nb = build.notebook(name)
    roles = [t for c in nb.cells for t in build.tags_of(c) if t in ("exercise", "solution", "check")]
    assert roles == ["exercise", "solution", "check"] * max(1, len(roles) // 3)
    left = build.student(nb)
    assert "def solution" not in "".join(c.source for c in left.cells)
    assert not any(c.get("outputs") for c in left.cells)


@pytest.mark.parametrize(
    ("now", "tags", "same"),
    [
        ("r8: loss 1.675,  43,776 of 8e-06\n", [], False),
        ("r8: loss 1.675,  43,776 of 8e-06\n", ["trained"], True),
        ("r8: loss 1.673, 43,777 of 7e-06\n", ["trained"], True),
        ("r8: loss 1.672, 43,776 of 8e-06\n", ["trained"], False),
        ("r8: loss 1.674, 43,776 of 8e-05\n", ["trained"], False),
        ("r8: gain 1.674, 43,776 of 8e-06\n", ["trained"], False),
        ("r8: loss 1.674\n", ["trained"], False),
        ("r8: loss 9.1, 1 of 3e-02\n", ["rounding"], True),
    ],
)
def test_numbers_are_compared_as_their_tags_let_one_expect(now, tags, same):
    stored, now = (
        nbformat.v4.new_output("stream", name="stdout", text=text)
        for text in ("r8: loss 1.674, 43,776 of 8e-06\n", now)
    )
    assert build.near(stored, now, tags) is same


@pytest.mark.slow
@pytest.mark.parametrize("name", build.LESSONS)
def test_a_lesson_runs_again_to_the_same_outputs(name):
    need_rows(name)
    done = run(BUILD, "--check", name)
    assert done.returncode == 0, done.stdout + done.stderr


STUDENT = """
import sys
sys.path.insert(0, sys.argv[1])
import build
nb = build.student(build.notebook(sys.argv[2]))
nb.cells = [c for c in nb.cells if "smollm2" not in build.tags_of(c)]  # long, and without exercises
checks = [c for c in nb.cells if "check" in build.tags_of(c)]
for c in checks:
    c.metadata["tags"] = [*c.metadata["tags"], "raises-exception"]
build.execute(nb)
print(*[o.get("ename", "no error") for c in checks for o in c.outputs])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", build.LESSONS)
def test_without_its_solutions_a_lesson_fails_at_each_check_and_nowhere_else(name):
    need_rows(name)
    done = run("-c", STUDENT, BUILD.parent, name)
    checks = [c for c in build.notebook(name).cells if "check" in build.tags_of(c)]
    assert done.stdout.split() == ["AssertionError"] * len(checks), done.stdout + done.stderr
