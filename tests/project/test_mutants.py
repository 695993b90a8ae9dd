"""The list of seeded bugs fits the source. That each is caught: `python tests/mutants.py`, some minutes."""

import ast
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from mutants import (
    FILES,
    ROOT,
    UNFIT,
    apply,
    attempt,
    copies,
    function,
    not_green,
    share_bytecode,
    tried,
    witness,
    witnesses,
)
from seeded_bugs import MUTANTS, Mutant


def test_every_mutant_still_fits():
    """One test for all: they would be a sixth of the suite's, and each takes less than its report."""
    wrong = {}
    for mutant in MUTANTS:
        try:
            path, text, mutated = apply(mutant, ROOT)
            if mutant.file.endswith(".py"):  # and not a page of the lab
                compile(mutated, path, "exec")
        except (ValueError, SyntaxError) as e:
            wrong[mutant.name] = str(e)
        else:
            if mutated == text:
                wrong[mutant.name] = "it changes nothing"
    assert not wrong


def test_mutant_names_are_unique():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("word", UNFIT.split(" or "))
def test_the_tests_that_mutants_leave_out_exist(word):
    assert any(re.search(rf"^def test_\w*{word}", (ROOT / file).read_text(), re.M) for file in FILES.values())


def test_every_witness_is_an_existing_test_of_its_mutant():
    """A test that is renamed is renamed there, too; an unknown witness would only cost time."""
    files = {m.name: m.tests.split() for m in MUTANTS}
    trees = {file: ast.parse((ROOT / path).read_text(encoding="utf-8")) for file, path in FILES.items()}
    tests = {
        file: {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
        for file, tree in trees.items()
    }
    for mutant, test in witnesses().items():
        file, _, name = test.partition("::")
        assert file in files[mutant], mutant
        assert function(name) in tests[file], mutant


def test_a_witness_is_a_test_with_its_parameters_where_they_are_whole():
    assert witness("project/test_imports.py::test_all") == "imports::test_all"
    assert witness("test_ops.py::test_back[3 of a::b.py::c[0]]") == "ops::test_back[3 of a::b.py::c[0]]"
    assert witness("test_ops.py::test_back[3") == "ops::test_back"  # pytest printed [3 - 4]: message and all


COUNTED = "table::test_only_one_is_singular"  # the one test of `counted`
OTHER = "table::test_a_page_shows_its_text_escaped"
TRIED = {  # (what is changed to what, the witness) -> whether it is seen, and by which test or why not
    "a bug, by its witness": ("if n == 1 else", "if n < 2 else", COUNTED, True, "test_only_one_is_singular"),
    "a bug, by another test": ("if n == 1 else", "if n < 2 else", OTHER, True, "test_only_one_is_singular"),
    "a bug without a witness": ("if n == 1 else", "if n < 2 else", None, True, "test_only_one_is_singular"),
    "a bug, whose witness has other parameters now": (
        "if n == 1 else", "if n < 2 else", f"{COUNTED}[0]", True, "test_only_one_is_singular"
    ),
    "another sentence": ("A number and what is counted", "A number", COUNTED, False, ""),
    "no program": ("if n == 1 else", "if n == 1", COUNTED, False, "SyntaxError"),
    "no such place": ("if n == 7 else", "", COUNTED, False, "its old text stands 0 times"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", TRIED)
def test_a_bug_is_caught_and_a_harmless_change_survives(what):
    """So that a mutant is not called caught because something else is red."""
    old, new, known, caught, by = TRIED[what]
    with copies(1) as free:
        seen, said = tried(free, Mutant("x", "table.py", old, new, "table"), known)
    assert (seen, by in said) == (caught, True), said


@pytest.mark.slow
def test_why_a_bug_is_seen_is_not_explained():
    """Of two pictures it takes minutes where the variable CI is set, and the bug would survive."""
    mutated = apply(Mutant("x", "table.py", "if n == 1 else", "if n < 2 else", "table"), ROOT)[2]
    with copies(1) as free:
        assert attempt(free, [COUNTED], ("table.py", mutated))[0]
        assert free.get().joinpath("said").read_text().count(" - AssertionError\n") == 1


@pytest.mark.slow
def test_witnesses_with_other_parameters_are_green_if_their_tests_are():
    with copies(1) as free, ThreadPoolExecutor(1) as pool:
        assert not_green(free, pool, [COUNTED, f"{COUNTED}[0]", OTHER]) == []
        (copy := free.get()).joinpath("minilora/table.py").write_text("")
        free.put(copy)
        (said,) = not_green(free, pool, [f"{COUNTED}[0]"])
    assert said.startswith("test_table.py is not green without any mutant: ")


@pytest.mark.slow
def test_bytecode_is_remembered_of_the_unchanged_source_alone():
    """A mutant of the same length as what it replaces: only the time of its file tells them apart."""
    with copies(2) as free:
        first, second = free.get(), free.get()
        free.put(first)
        assert attempt(free, [COUNTED]) == (False, "")
        free.put(second)
        share_bytecode(free)
        kept = {file.relative_to(first): file.read_bytes() for file in first.rglob("*.pyc")}
        assert any(file.match("minilora/__pycache__/table.*.pyc") for file in kept)
        assert any(file.match("tests/__pycache__/test_table.*.pyc") for file in kept)
        assert kept == {file.relative_to(second): file.read_bytes() for file in second.rglob("*.pyc")}
        mutated = apply(Mutant("x", "table.py", "if n == 1 else", "if n == 2 else", "table"), ROOT)[2]
        here = free.get()
        free.get()
        free.put(here)
        was = (here / "minilora/table.py").stat().st_mtime_ns
        for _ in range(2):  # in one copy
            assert attempt(free, [COUNTED], ("table.py", mutated))[0]
            assert (here / "minilora/table.py").stat().st_mtime_ns == was
            assert attempt(free, [COUNTED]) == (False, "")
