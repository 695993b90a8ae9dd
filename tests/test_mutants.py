"""The list of seeded bugs fits the source. That each is caught: `python tests/mutants.py`, some minutes."""

import ast

import pytest
from mutants import MUTANTS, ROOT, apply, witness, witnesses


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_still_fits(mutant):
    path, text, mutated = apply(mutant, ROOT)
    assert mutated != text
    compile(mutated, path, "exec")


def test_every_mutant_has_a_name_of_its_own():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


def test_every_witness_is_a_test_that_its_mutant_names():
    """A test that is renamed is renamed there, too; an unknown witness would only cost time."""
    files = {m.name: m.tests.split() for m in MUTANTS}
    for mutant, test in witnesses().items():
        file, _, name = test.partition("::")
        assert file in files[mutant], mutant
        tree = ast.parse((ROOT / f"tests/test_{file}.py").read_text(encoding="utf-8"))
        assert name in {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}, mutant


def test_a_witness_is_the_test_without_its_case():
    assert witness("test_ops.py::test_back[3 of a::b.py::c]") == "ops::test_back"
