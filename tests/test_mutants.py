"""The list of seeded bugs fits the source. That each is caught: `python tests/mutants.py`, some minutes."""

import pytest
from mutants import MUTANTS, ROOT, apply


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_still_fits(mutant):
    path, text, mutated = apply(mutant, ROOT)
    assert mutated != text
    compile(mutated, path, "exec")


def test_every_mutant_has_a_name_of_its_own():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
